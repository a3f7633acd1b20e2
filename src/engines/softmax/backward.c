/* The backward pass, recomputing the weights from the LSE (FlashAttention-2, arXiv 2307.08691,
 * algorithm 2):
 *   P = exp(S - LSE),  dP = dO V^T,  dS = P (dP - delta) cap'(S),  delta = dO . O - d_lse
 *   dV = P^T dO,  dQ = scale dS K,  dK = scale dS^T Q,  dbias = P (dP - delta)
 *
 * A wave of (sequence, key head) pairs at a time. Work is cut by blocks of keys: d_k and d_v of a
 * block are complete when all tiles of queries have passed, for all heads that share the keys; d_q
 * is summed in the workspace, once for each slot, so that the sums have a fixed order. */
#include "engines/softmax/tiles.h"

#include "base/status.h"

#include <math.h>
#include <omp.h>
#include <string.h>

typedef struct call {
  const softmax_plan *plan;
  const attn_softmax_args *args;
  char *workspace;
} call;

typedef struct backward_scratch {
  void *s, *dp, *slope, *p, *ds, *packed_p, *packed_ds, *d_k, *d_v, *turned, *gathered;
  int32_t *begin, *end;
} backward_scratch;

/* Places the scratch of one thread at `memory`; with NULL, `size` tells how much it takes. */
static backward_scratch place_scratch(const softmax_plan *plan, char *memory, size_t *size) {
  size_t rows = (size_t)plan->grad_rows, keys = (size_t)plan->grad_keys;
  size_t dim = (size_t)plan->depth_dim, value_dim = (size_t)plan->depth_value;
  size_t widest = dim > value_dim ? dim : value_dim;
  size_t step = (size_t)plan->grad_step_rows * (keys > widest ? keys : widest);
  bool narrow = plan->work == WORK_BF16, capped = plan->problem.soft_cap != 0;
  size_t sizes[] = {
      step * plan->real_size,                           /* s */
      step * plan->real_size,                           /* dp */
      capped ? step * plan->real_size : 0,              /* slope */
      narrow ? step * plan->operand_size : 0,           /* p, else in place of s */
      narrow || capped ? step * plan->operand_size : 0, /* ds, else in place of dp */
      rows * attn_round_up((int64_t)keys, ATTN_PANEL) * plan->operand_size, /* packed p */
      rows * attn_round_up((int64_t)keys, ATTN_PANEL) * plan->operand_size, /* packed ds */
      dim * keys * plan->real_size,                                         /* d_k, turned */
      value_dim * keys * plan->real_size,                                   /* d_v, turned */
      keys * widest * plan->real_size,                                      /* rows of these */
      keys * widest * plan->operand_size,                                   /* gathered */
      rows * sizeof(int32_t),
      rows * sizeof(int32_t),
  };
  char *places[sizeof sizes / sizeof *sizes];
  size_t total = 0;
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; ++i) {
    places[i] = memory ? memory + total : NULL;
    total += (sizes[i] + 63) / 64 * 64;
  }
  if (size) *size = total;
  return (backward_scratch){.s = places[0],
                            .dp = places[1],
                            .slope = places[2],
                            .p = places[narrow ? 3 : 0],
                            .ds = places[narrow || capped ? 4 : 1],
                            .packed_p = places[5],
                            .packed_ds = places[6],
                            .d_k = places[7],
                            .d_v = places[8],
                            .turned = places[9],
                            .gathered = places[10],
                            .begin = (int32_t *)(void *)places[11],
                            .end = (int32_t *)(void *)places[12]};
}

size_t attn_softmax_backward_scratch(const softmax_plan *plan) {
  size_t size;
  place_scratch(plan, NULL, &size);
  return size;
}

#define WORK_FILE "engines/softmax/backward.inc"
#include "engines/softmax/works.inc"

/* The functions of each kind of work. */
typedef struct work_functions {
  void (*pack_block)(const call *call, const attn_softmax_sequence *sequence, int64_t kv_head,
                     int64_t block, char *packed, char *memory);
  void (*prepare_tile)(const call *call, const attn_softmax_sequence *sequence,
                       const tile_rows *rows, char *head_memory, char *memory);
  double (*sink_gradient)(const call *call, const attn_softmax_sequence *sequence, int64_t head,
                          const char *head_memory);
  void (*backward_block)(const call *call, const attn_softmax_sequence *sequence, int64_t kv_head,
                         int64_t block, const char *packed, const char *queries, char *d_q,
                         char *memory);
  void (*finish_tile)(const call *call, const attn_softmax_sequence *sequence,
                      const tile_rows *rows, char *d_q);
} work_functions;

#define FUNCTIONS(suffix)                                                                          \
  {                                                                                                \
    pack_block_##suffix, prepare_tile_##suffix, sink_gradient_##suffix, backward_block_##suffix,   \
        finish_tile_##suffix                                                                       \
  }
static const work_functions works[] = {FUNCTIONS(f64), FUNCTIONS(f32), FUNCTIONS(bf16)};

/* The pair at `place` of a wave. */
typedef struct pair {
  attn_softmax_sequence sequence;
  int64_t kv_head;
  char *packed, *queries, *d_q;
} pair;

static pair pair_at(const call *call, int64_t wave, int64_t place) {
  const softmax_plan *plan = call->plan;
  int64_t kv_heads = plan->problem.kv_heads, index = wave + place;
  return (pair){
      .sequence = attn_softmax_sequence_of(plan, call->args, index / kv_heads),
      .kv_head = index % kv_heads,
      .packed = call->workspace + plan->backward.packed + (size_t)place * plan->backward.pair,
      .queries =
          call->workspace + plan->backward.queries + (size_t)place * plan->backward.pair_queries,
      .d_q = call->workspace + plan->backward.d_q + (size_t)place * plan->backward.pair_d_q,
  };
}

static void run_pack(const call *call, int64_t wave, int64_t task, int64_t blocks, char *scratch) {
  const softmax_plan *plan = call->plan;
  pair pair = pair_at(call, wave, task / blocks);
  int64_t block = task % blocks;
  if (block * plan->grad_keys >= pair.sequence.keys) return;
  works[plan->work].pack_block(call, &pair.sequence, pair.kv_head, block,
                               pair.packed + (size_t)block * plan->backward.block, scratch);
}

/* Tile `tile` of head `g` of a pair; count <= 0 when the sequence is shorter. */
static tile_rows tile_of(const call *call, const pair *pair, int64_t g, int64_t tile) {
  const softmax_plan *plan = call->plan;
  tile_rows rows = {
      .first = tile * plan->grad_rows, .fold = 1, .head = pair->kv_head * plan->group + g};
  rows.count = attn_min(plan->grad_rows, pair->sequence.queries - rows.first);
  return rows;
}

static void run_prepare(const call *call, int64_t wave, int64_t task, int64_t tiles,
                        char *scratch) {
  const softmax_plan *plan = call->plan;
  pair pair = pair_at(call, wave, task / tiles / plan->group);
  int64_t g = task / tiles % plan->group;
  tile_rows rows = tile_of(call, &pair, g, task % tiles);
  if (rows.count > 0)
    works[plan->work].prepare_tile(call, &pair.sequence, &rows,
                                   pair.queries + (size_t)g * plan->backward.head, scratch);
}

/* The blocks slot, slot + slots, ... of a pair: taken in turn, so that the slots get like shares of
 * a causal triangle. */
static void run_slot(const call *call, int64_t wave, int64_t task, char *scratch) {
  const softmax_plan *plan = call->plan;
  pair pair = pair_at(call, wave, task / plan->slots);
  int64_t slot = task % plan->slots;
  char *d_q = pair.d_q + (size_t)slot * plan->backward.slot_d_q;
  memset(d_q, 0, plan->backward.slot_d_q);
  int64_t blocks = attn_ceil_div(pair.sequence.stored_keys, plan->grad_keys);
  for (int64_t block = slot; block < blocks; block += plan->slots)
    works[plan->work].backward_block(call, &pair.sequence, pair.kv_head, block,
                                     pair.packed + (size_t)block * plan->backward.block,
                                     pair.queries, d_q, scratch);
}

static void run_finish(const call *call, int64_t wave, int64_t task, int64_t tiles) {
  const softmax_plan *plan = call->plan;
  pair pair = pair_at(call, wave, task / tiles / plan->group);
  int64_t g = task / tiles % plan->group, tile = task % tiles;
  tile_rows rows = tile_of(call, &pair, g, tile);
  if (rows.count > 0)
    works[plan->work].finish_tile(call, &pair.sequence, &rows,
                                  pair.d_q + (size_t)g * plan->backward.head_d_q);
  if (tile == 0 && plan->problem.sinks) {
    double *sinks = (double *)(void *)(call->workspace + plan->backward.sinks);
    sinks[pair.sequence.batch * plan->problem.heads + rows.head] = works[plan->work].sink_gradient(
        call, &pair.sequence, rows.head, pair.queries + (size_t)g * plan->backward.head);
  }
}

static void sum_sinks(const call *call) {
  const attn_softmax_problem *problem = &call->plan->problem;
  const double *sinks =
      (const double *)(const void *)(call->workspace + call->plan->backward.sinks);
  float *d_sinks = call->args->d_sinks.data;
  for (int64_t h = 0; h < problem->heads; ++h) {
    double sum = 0;
    for (int64_t b = 0; b < problem->batch; ++b) sum += sinks[b * problem->heads + h];
    d_sinks[h] = (float)sum;
  }
}

attn_status attn_softmax_backward(const attn_plan *base, const attn_softmax_args *args,
                                  void *workspace) {
  if (!base || !args || base->engine != ATTN_ENGINE_SOFTMAX)
    return attn_fail(ATTN_INVALID_ARGUMENT, "softmax_backward: %s",
                     base && args ? "the plan is of another engine" : "NULL argument");
  const softmax_plan *plan = (const softmax_plan *)base;
  ATTN_TRY(attn_softmax_check(plan, args, ATTN_PASS_BACKWARD, workspace));
  if (base->gpu) return attn_softmax_run_on_gpu(plan, args, ATTN_PASS_BACKWARD, workspace);
  const call call = {plan, args, workspace};
  int64_t pairs = plan->problem.batch * plan->problem.kv_heads, at_once = plan->backward.at_once;
  int64_t blocks = attn_ceil_div(plan->problem.key_length, plan->grad_keys);
  int64_t tiles = attn_ceil_div(plan->problem.query_length, plan->grad_rows);
#pragma omp parallel num_threads(base->threads)
  {
    char *scratch = call.workspace + plan->backward.scratch +
                    (size_t)omp_get_thread_num() * plan->backward.scratch_each;
    base->kernels->begin();
    for (int64_t wave = 0; wave < pairs; wave += at_once) {
      int64_t places = attn_min(at_once, pairs - wave);
#pragma omp for schedule(dynamic, 4) nowait
      for (int64_t task = 0; task < places * blocks; ++task)
        run_pack(&call, wave, task, blocks, scratch);
#pragma omp for schedule(dynamic, 4)
      for (int64_t task = 0; task < places * plan->group * tiles; ++task)
        run_prepare(&call, wave, task, tiles, scratch);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < places * plan->slots; ++task)
        run_slot(&call, wave, task, scratch);
#pragma omp for schedule(dynamic, 4)
      for (int64_t task = 0; task < places * plan->group * tiles; ++task)
        run_finish(&call, wave, task, tiles);
    }
    base->kernels->end();
  }
  if (plan->problem.sinks && args->d_sinks.data) sum_sinks(&call);
  return ATTN_OK;
}
