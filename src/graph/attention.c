/* The engines on the tape: each operation keeps what its backward reads (inputs, output, LSE or
 * initial state) and asks the plan cache for a plan of its problem. */
#include "engines/plan.h"
#include "engines/plan_cache.h"
#include "graph/operations.h"
#include "graph/passes.h"

#include <string.h>

/* A workspace for one execution; the caller releases the graph to *mark afterwards. */
static attn_status workspace_for(attn_graph *g, const attn_plan *plan, attn_graph_mark *mark,
                                 void **workspace) {
  *mark = attn_graph_get_mark(g);
  *workspace =
      plan->info.workspace_bytes ? attn_arena_alloc(g->memory, plan->info.workspace_bytes) : NULL;
  return plan->info.workspace_bytes && !*workspace ? ATTN_OUT_OF_MEMORY : ATTN_OK;
}

static bool is_sequence(attn_graph *g, const char *name, attn_var *x, bool ragged) {
  int rank = ragged ? 3 : 4;
  char text[128];
  if (!x) return false;
  if (x->value.rank == rank) return true;
  attn_graph_fail(g, ATTN_INVALID_SHAPE, "attention: %s is %s, expected %s", name,
                  attn_shape_text(&x->value, text),
                  ragged ? "[total, heads, dim]" : "[batch, length, heads, dim]");
  return false;
}

/* Keys and values may lie in pages: [pages, page_size, heads, dim]. */
static bool are_sequences(attn_graph *g, attn_var *q, attn_var *k, attn_var *v, bool ragged,
                          bool paged) {
  return is_sequence(g, "q", q, ragged) && is_sequence(g, "k", k, ragged && !paged) &&
         is_sequence(g, "v", v, ragged && !paged);
}

/* Host arrays of the call as the plan's device reads them; they may be NULL. */
static bool upload(attn_graph *g, const int32_t **array, int64_t count) {
  if (!*array) return true;
  *array = attn_pass_upload(g, *array, (size_t)count * sizeof **array);
  return *array != NULL;
}

/* Lengths are what changes from one replay to the next: they lie where they last then. */
static bool upload_lengths(attn_graph *g, const int32_t **lengths, int64_t count) {
  if (!*lengths) return true;
  *lengths = attn_pass_live(g, *lengths, (size_t)count * sizeof **lengths);
  return *lengths != NULL;
}

static int64_t extent(const attn_tensor *t, int from_last) {
  return t->shape[t->rank - 1 - from_last];
}

/* softmax ---------------------------------------------------------------------------------------
 */

typedef struct softmax_node {
  attn_node node;
  attn_softmax_problem problem;
  attn_softmax_args args;
  attn_var *q, *k, *v, *lse; /* lse: NULL where it is no result */
} softmax_node;

static attn_status softmax_backward(attn_graph *g, attn_node *node) {
  softmax_node *self = (softmax_node *)node;
  attn_softmax_args args = self->args;
  attn_var *const inputs[3] = {self->q, self->k, self->v};
  attn_tensor *const targets[3] = {&args.d_q, &args.d_k, &args.d_v};
  args.d_o = node->output->gradient;
  if (self->lse) args.d_lse = self->lse->gradient;
  for (int i = 0; i < 3; ++i) *targets[i] = attn_gradient_overwrite(g, inputs[i]);
  attn_graph_mark mark = attn_graph_get_mark(g), inner;
  /* The engine makes all three; what nobody needs goes to scratch. */
  for (int i = 0; i < 3; ++i)
    if (!inputs[i]->needs_gradient)
      *targets[i] = attn_graph_tensor_like(g, self->problem.dtype, &inputs[i]->value);
  if (g->status != ATTN_OK) return g->status;
  const attn_plan *plan;
  ATTN_TRY(attn_plan_cache_softmax(g->plans, &self->problem, &plan));
  void *workspace;
  ATTN_TRY(workspace_for(g, plan, &inner, &workspace));
  ATTN_TRY(attn_softmax_backward(plan, &args, workspace));
  attn_graph_release(g, mark);
  for (int i = 0; i < 3; ++i) attn_gradient_add(g, inputs[i], targets[i]);
  return g->status;
}

attn_var *attn_op_softmax_lse(attn_graph *graph, const attn_softmax_problem *options,
                              const attn_softmax_args *args, attn_var *q, attn_var *k, attn_var *v,
                              attn_var **lse) {
  if (!are_sequences(graph, q, k, v, options->ragged, options->paged)) return NULL;
  attn_softmax_problem problem = *options;
  attn_softmax_args bound = *args;
  bool records = graph->recording && (q->needs_gradient || k->needs_gradient || v->needs_gradient);
  problem.struct_size = sizeof problem;
  problem.device = graph->device;
  problem.dtype = q->value.dtype;
  problem.passes = ATTN_PASS_FORWARD | (records ? ATTN_PASS_BACKWARD : 0);
  problem.heads = extent(&q->value, 1);
  problem.dim = extent(&q->value, 0);
  problem.kv_heads = extent(&k->value, 1);
  problem.value_dim = extent(&v->value, 0);
  if (!problem.ragged) {
    problem.batch = q->value.shape[0];
    problem.query_length = q->value.shape[1];
    if (!problem.paged) problem.key_length = k->value.shape[1];
  }
  const attn_plan *plan;
  attn_status status = attn_plan_cache_softmax(graph->plans, &problem, &plan);
  if (status != ATTN_OK) return attn_graph_error(graph, status);

  int64_t shape[ATTN_MAX_RANK];
  memcpy(shape, q->value.shape, sizeof shape);
  shape[q->value.rank - 1] = problem.value_dim;
  bound.q = q->value;
  bound.k = k->value;
  bound.v = v->value;
  bound.o = attn_graph_tensor(graph, problem.dtype, q->value.rank, shape);
  if (!upload_lengths(graph, &bound.key_lengths, problem.batch) ||
      !upload(graph, &bound.query_offsets, problem.batch + 1) ||
      !upload(graph, &bound.key_offsets, problem.batch + 1))
    return NULL;
  if (records || lse) {
    int64_t equal[3] = {problem.batch, problem.heads, problem.query_length};
    int64_t packed[2] = {problem.heads, q->value.shape[0]};
    bound.lse = problem.ragged ? attn_graph_tensor(graph, graph->wide, 2, packed)
                               : attn_graph_tensor(graph, graph->wide, 3, equal);
  }
  attn_var *o = attn_graph_result(graph, bound.o, 3, (attn_var *[]){q, k, v});
  if (lse && o) *lse = attn_graph_result(graph, bound.lse, 1, &o);
  if (!o || graph->status != ATTN_OK) return NULL;
  attn_graph_mark mark;
  void *workspace;
  status = workspace_for(graph, plan, &mark, &workspace);
  if (status == ATTN_OK) status = attn_softmax_forward(plan, &bound, workspace);
  attn_graph_release(graph, mark);
  if (status != ATTN_OK) return attn_graph_error(graph, status);
  softmax_node *node = attn_graph_record(graph, sizeof *node, o, softmax_backward);
  if (node) {
    node->problem = problem;
    node->args = bound;
    node->q = q;
    node->k = k;
    node->v = v;
    node->lse = lse ? *lse : NULL;
  }
  return o;
}

attn_var *attn_op_softmax(attn_graph *graph, const attn_softmax_problem *options,
                          const attn_softmax_args *args, attn_var *q, attn_var *k, attn_var *v) {
  return attn_op_softmax_lse(graph, options, args, q, k, v, NULL);
}

/* recurrent -------------------------------------------------------------------------------------
 */

typedef struct recurrent_node {
  attn_node node;
  attn_recurrent_problem problem;
  attn_recurrent_args args;
  attn_var *inputs[5]; /* q, k, v, decay, beta; the last two may be NULL */
} recurrent_node;

static attn_status recurrent_backward(attn_graph *g, attn_node *node) {
  recurrent_node *self = (recurrent_node *)node;
  attn_recurrent_args args = self->args;
  attn_tensor *targets[5] = {&args.d_q, &args.d_k, &args.d_v, &args.d_decay, &args.d_beta};
  attn_tensor *values[5] = {&args.q, &args.k, &args.v, &args.decay, &args.beta};
  for (int i = 0; i < 5; ++i)
    if (self->inputs[i]) *values[i] = attn_graph_value(g, self->inputs[i]);
  args.d_o = node->output->gradient;
  args.final_state = args.final_normaliser = (attn_tensor){0};
  for (int i = 0; i < 5; ++i)
    if (self->inputs[i]) *targets[i] = attn_gradient_overwrite(g, self->inputs[i]);
  if (g->status != ATTN_OK) return g->status;
  const attn_plan *plan;
  ATTN_TRY(attn_plan_cache_recurrent(g->plans, &self->problem, &plan));
  attn_graph_mark mark;
  void *workspace;
  ATTN_TRY(workspace_for(g, plan, &mark, &workspace));
  ATTN_TRY(attn_recurrent_backward(plan, &args, workspace));
  attn_graph_release(g, mark);
  for (int i = 0; i < 5; ++i)
    if (self->inputs[i]) attn_gradient_add(g, self->inputs[i], targets[i]);
  return g->status;
}

/* A state that the final one will overwrite is copied: backward begins with it. */
static void keep_state(attn_graph *g, attn_tensor *initial, const attn_tensor *final) {
  if (!initial->data || initial->data != final->data) return;
  attn_tensor copy = attn_graph_tensor_like(g, initial->dtype, initial);
  if (!copy.data) return;
  attn_add_tensor(g, &copy, initial, 1, false);
  *initial = copy;
}

attn_var *attn_op_recurrent(attn_graph *graph, const attn_recurrent_problem *options,
                            const attn_recurrent_args *args, attn_var *q, attn_var *k, attn_var *v,
                            attn_var *decay, attn_var *beta) {
  if (!are_sequences(graph, q, k, v, options->ragged, false)) return NULL;
  attn_var *inputs[5] = {q, k, v, decay, beta};
  attn_recurrent_problem problem = *options;
  attn_recurrent_args bound = *args;
  bool records = false;
  for (int i = 0; i < 5; ++i) records |= graph->recording && inputs[i] && inputs[i]->needs_gradient;
  problem.struct_size = sizeof problem;
  problem.device = graph->device;
  problem.dtype = q->value.dtype;
  problem.passes = ATTN_PASS_FORWARD | (records ? ATTN_PASS_BACKWARD : 0);
  problem.heads = extent(&q->value, 1);
  problem.dim = extent(&q->value, 0);
  problem.value_heads = extent(&v->value, 1);
  problem.value_dim = extent(&v->value, 0);
  if (!problem.ragged) {
    problem.batch = q->value.shape[0];
    problem.length = q->value.shape[1];
  }
  const attn_plan *plan;
  attn_status status = attn_plan_cache_recurrent(graph->plans, &problem, &plan);
  if (status != ATTN_OK) return attn_graph_error(graph, status);

  bound.q = q->value;
  bound.k = k->value;
  bound.v = v->value;
  if (decay) bound.decay = decay->value;
  if (beta) bound.beta = beta->value;
  if (records) {
    keep_state(graph, &bound.initial_state, &bound.final_state);
    keep_state(graph, &bound.initial_normaliser, &bound.final_normaliser);
  }
  bound.o = attn_graph_tensor_like(graph, problem.dtype, &v->value);
  if (!upload(graph, &bound.offsets, problem.batch + 1)) return NULL;
  attn_var *o = attn_graph_result(graph, bound.o, 5, inputs);
  if (!o || graph->status != ATTN_OK) return NULL;
  attn_graph_mark mark;
  void *workspace;
  status = workspace_for(graph, plan, &mark, &workspace);
  if (status == ATTN_OK) status = attn_recurrent_forward(plan, &bound, workspace);
  attn_graph_release(graph, mark);
  if (status != ATTN_OK) return attn_graph_error(graph, status);
  recurrent_node *node = attn_graph_record(graph, sizeof *node, o, recurrent_backward);
  if (node) {
    node->problem = problem;
    node->args = bound;
    memcpy(node->inputs, inputs, sizeof inputs);
  }
  for (int i = 0; i < 5; ++i) attn_graph_restores(inputs[i]);
  return o;
}

void attn_op_recurrent_expect(attn_graph *graph, const attn_recurrent_problem *options,
                              size_t bytes) {
  const attn_plan *plan;
  attn_recurrent_problem problem = *options;
  problem.struct_size = sizeof problem;
  problem.device = graph->device;
  attn_status status = attn_plan_cache_recurrent(graph->plans, &problem, &plan);
  attn_graph_mark mark = attn_graph_get_mark(graph);
  if (status == ATTN_OK && !attn_arena_alloc(graph->memory, plan->info.workspace_bytes + bytes))
    status = ATTN_OUT_OF_MEMORY;
  attn_graph_release(graph, mark);
  if (status != ATTN_OK) attn_graph_error(graph, status);
}
