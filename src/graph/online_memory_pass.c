/* The memory that learns while it reads, forward and backward: heads of sequences side by side,
 * each walked from token to token (passes.h). */
#include "graph/passes.h"
#include "kernels/cuda/module.h"

#include <omp.h>

static attn_status on_gpu(attn_graph *g, const attn_online_memory *rule,
                          const attn_online_memory_tensors *tensors,
                          const attn_online_memory_state *state, bool back) {
  attn_online_memory_tensors x = *tensors;
  int64_t walks = x.sequences * x.v->shape[1];
  int64_t elements = walks * attn_online_memory_scratch(rule, back);
  attn_tensor workspace = attn_graph_tensor(g, g->wide, 1, &elements);
  if (!workspace.data) return g->status;
  if (x.offsets) {
    x.offsets = attn_pass_upload(g, x.offsets, (size_t)(x.sequences + 1) * sizeof *x.offsets);
    if (!x.offsets) return g->status;
  }
  const attn_cuda *cuda = g->gpu->cuda;
  attn_cuda_stream stream = attn_gpu_stream(g->gpu);
  if (back)
    return attn_gpu_check(g->gpu, cuda->online_memory_backward(rule, &x, &workspace, stream));
  return attn_gpu_check(g->gpu, cuda->online_memory(rule, &x, state, &workspace, stream));
}

/* One head of one sequence. */
static void walk(const attn_graph *g, const attn_online_memory *rule,
                 const attn_online_memory_tensors *x, const attn_online_memory_state *state,
                 bool back, int64_t b, int64_t head, void *scratch) {
  const attn_kernels *k = g->kernels;
  if (g->wide == ATTN_F64 && back)
    k->online_memory_backward_f64(rule, x, b, head, scratch);
  else if (g->wide == ATTN_F64)
    k->online_memory_f64(rule, x, state, b, head, scratch);
  else if (back)
    k->online_memory_backward_f32(rule, x, b, head, scratch);
  else
    k->online_memory_f32(rule, x, state, b, head, scratch);
}

static void on_processor(attn_graph *g, const attn_online_memory *rule,
                         const attn_online_memory_tensors *x, const attn_online_memory_state *state,
                         bool back) {
  int64_t heads = x->v->shape[1], walks = x->sequences * heads;
  int threads = walks < g->threads ? (int)walks : g->threads;
  int64_t each = attn_online_memory_scratch(rule, back), all = each * threads;
  attn_tensor scratch = attn_graph_tensor(g, g->wide, 1, &all);
  if (!scratch.data) return;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < walks; ++i) {
    size_t first = (size_t)(each * omp_get_thread_num()) * attn_dtype_size(g->wide);
    walk(g, rule, x, state, back, i / heads, i % heads, (char *)scratch.data + first);
  }
}

static void run(attn_graph *g, const attn_online_memory *rule, const attn_online_memory_tensors *x,
                const attn_online_memory_state *state, bool back) {
  if (g->status != ATTN_OK || attn_tensor_count(x->v) == 0) return;
  attn_graph_mark mark = attn_graph_get_mark(g);
  if (g->gpu) {
    attn_status status = on_gpu(g, rule, x, state, back);
    if (status != ATTN_OK) attn_graph_error(g, status);
  } else {
    on_processor(g, rule, x, state, back);
  }
  attn_graph_release(g, mark);
}

void attn_pass_online_memory(attn_graph *g, const attn_online_memory *rule,
                             const attn_online_memory_tensors *x,
                             const attn_online_memory_state *state) {
  run(g, rule, x, state, false);
}

void attn_pass_online_memory_backward(attn_graph *g, const attn_online_memory *rule,
                                      const attn_online_memory_tensors *x) {
  run(g, rule, x, NULL, true);
}
