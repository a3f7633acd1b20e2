/* The memory that learns while it reads (kernels/online_memory.h) on the tape. Kept for backward
 * are the memories at the starts of chunks; what happens inside a chunk is done again. */
#include "graph/layout.h"
#include "graph/operations.h"
#include "graph/passes.h"

typedef struct memory_node {
  attn_node node;
  attn_online_memory rule;
  attn_online_memory_inputs in;
  attn_tensor starts, momenta;
  attn_layout layout;
} memory_node;

static attn_online_memory_tensors
tensors_of(const attn_layout *layout, const attn_online_memory_inputs *in, const attn_tensor *o) {
  attn_online_memory_tensors x = {.q = &in->q->value,
                                  .k = &in->k->value,
                                  .v = &in->v->value,
                                  .o = o,
                                  .alpha = &in->alpha->value,
                                  .theta = &in->theta->value,
                                  .eta = in->eta ? &in->eta->value : NULL,
                                  .gamma = &in->gamma->value,
                                  .sequences = layout->batch,
                                  .length = layout->length,
                                  .offsets = layout->offsets};
  for (int i = 0; i < ATTN_MEMORY_MATRICES; ++i)
    x.initial[i] = in->initial[i] ? &in->initial[i]->value : NULL;
  return x;
}

/* Matrix i of d_initial [sequences, heads, weights], summed over sequences in their order, to the
 * gradient of its start [heads rows, columns]. */
static void add_initial(attn_graph *g, const memory_node *self, const attn_tensor *all, int i,
                        int64_t at) {
  attn_var *initial = self->in.initial[i];
  if (!initial->needs_gradient) return;
  int64_t heads = all->shape[1];
  int64_t count = attn_tensor_count(&initial->value) / heads;
  attn_tensor sum = attn_graph_tensor(g, g->wide, 2, (int64_t[]){heads, count}), whole;
  if (!sum.data) return;
  for (int64_t b = 0; b < all->shape[0]; ++b) {
    attn_tensor part, slice;
    attn_status status = attn_tensor_slice(all, 0, b, 1, &part);
    if (status == ATTN_OK) status = attn_tensor_slice(&part, 2, at, count, &part);
    if (status == ATTN_OK) {
      slice = part;
      slice.rank = 2;
      for (int axis = 0; axis < 2; ++axis)
        slice.shape[axis] = part.shape[axis + 1], slice.stride[axis] = part.stride[axis + 1];
      attn_add_tensor(g, &sum, &slice, 1, b > 0);
    } else {
      attn_graph_error(g, status);
    }
  }
  attn_status status = attn_tensor_reshape(&sum, initial->value.rank, initial->value.shape, &whole);
  if (status != ATTN_OK) attn_graph_error(g, status);
  if (g->status == ATTN_OK) attn_gradient_add(g, initial, &whole);
}

static attn_tensor zeros_like(attn_graph *g, const attn_tensor *shape) {
  attn_tensor zeros = attn_graph_tensor_like(g, g->wide, shape);
  if (zeros.data) {
    attn_status status = attn_tensor_fill(&zeros, 0);
    if (status != ATTN_OK) attn_graph_error(g, status);
  }
  return zeros;
}

static attn_status memory_backward(attn_graph *g, attn_node *node) {
  memory_node *self = (memory_node *)node;
  const attn_online_memory_inputs *in = &self->in;
  attn_online_memory_tensors x = tensors_of(&self->layout, in, &node->output->value);
  const attn_tensor *gate = x.alpha;
  attn_tensor dq = attn_graph_tensor_like(g, g->wide, x.q), dk = zeros_like(g, x.k);
  attn_tensor dv = zeros_like(g, x.v), d_gamma = zeros_like(g, gate);
  attn_tensor d_alpha = attn_graph_tensor_like(g, g->wide, gate);
  attn_tensor d_theta = attn_graph_tensor_like(g, g->wide, gate);
  attn_tensor d_eta = attn_graph_tensor_like(g, g->wide, gate);
  int64_t shape[3] = {self->layout.batch, x.v->shape[1], attn_online_memory_weights(&self->rule)};
  attn_tensor d_initial = attn_graph_tensor(g, g->wide, 3, shape);
  if (g->status != ATTN_OK) return g->status;
  x.starts = &self->starts;
  x.momenta = &self->momenta;
  x.d_o = &node->output->gradient;
  x.dq = &dq, x.dk = &dk, x.dv = &dv;
  x.d_alpha = &d_alpha, x.d_theta = &d_theta, x.d_gamma = &d_gamma, x.d_initial = &d_initial;
  x.d_eta = in->eta ? &d_eta : NULL;
  attn_pass_online_memory_backward(g, &self->rule, &x);
  attn_gradient_add(g, in->q, &dq);
  attn_gradient_add(g, in->k, &dk);
  attn_gradient_add(g, in->v, &dv);
  attn_gradient_add(g, in->alpha, &d_alpha);
  attn_gradient_add(g, in->theta, &d_theta);
  attn_gradient_add(g, in->gamma, &d_gamma);
  if (in->eta) attn_gradient_add(g, in->eta, &d_eta);
  for (int64_t i = 0, at = 0; i < attn_online_memory_count(&self->rule); ++i) {
    add_initial(g, self, &d_initial, (int)i, at);
    at += attn_online_memory_rows(&self->rule, (int)i) *
          attn_online_memory_columns(&self->rule, (int)i);
  }
  return g->status;
}

static bool is_gate(const attn_graph *g, const attn_var *gate, int64_t rows, int64_t heads) {
  const attn_tensor *x = &gate->value;
  return x->rank == 2 && x->shape[0] == rows && x->shape[1] == heads && x->dtype == g->wide &&
         attn_tensor_is_contiguous(x);
}

static bool is_heads(const attn_tensor *x, int64_t rows, int64_t heads, int64_t channels) {
  return x->rank == 3 && x->shape[0] == rows && x->shape[1] == heads && x->shape[2] == channels &&
         (x->stride[2] == 1 || channels == 1);
}

static bool fits(attn_graph *g, const attn_layout *layout, const attn_online_memory *rule,
                 const attn_online_memory_inputs *in, const attn_online_memory_state *state) {
  char text_q[128], text_k[128], text_v[128];
  int64_t rows = layout->rows, heads = in->v->value.rank == 3 ? in->v->value.shape[1] : 0;
  bool numbers = rule->features > 0 && rule->value_dim > 0 && rule->window > 0 && rule->chunk > 0 &&
                 rule->steps >= 0 && rule->steps <= ATTN_NEWTON_SCHULZ_MOST_STEPS &&
                 rule->residual >= 0 && rule->passed >= 0 && rule->passed <= rule->value_dim &&
                 rule->residual + rule->passed <= rule->features &&
                 rule->kind > ATTN_MEMORY_DEFAULT && rule->kind <= ATTN_MEMORY_GATED &&
                 (rule->kind == ATTN_MEMORY_MATRIX || rule->width > 0) &&
                 (!state || layout->batch == 1);
  if (!numbers)
    return attn_graph_fail(g, ATTN_INVALID_ARGUMENT,
                           "online_memory: a window of %lld, chunks of %lld, %d steps, a width of "
                           "%lld or %lld sequences with a state do not make a memory",
                           (long long)rule->window, (long long)rule->chunk, rule->steps,
                           (long long)rule->width, (long long)layout->batch),
           false;
  bool right = is_heads(&in->q->value, rows, heads, rule->features) &&
               is_heads(&in->k->value, rows, heads, rule->features) &&
               is_heads(&in->v->value, rows, heads, rule->value_dim) &&
               is_gate(g, in->alpha, rows, heads) && is_gate(g, in->theta, rows, heads) &&
               is_gate(g, in->gamma, rows, heads) && (!in->eta || is_gate(g, in->eta, rows, heads));
  for (int i = 0; right && i < attn_online_memory_count(rule); ++i)
    right = attn_tensor_is_contiguous(&in->initial[i]->value) &&
            attn_tensor_count(&in->initial[i]->value) ==
                heads * attn_online_memory_rows(rule, i) * attn_online_memory_columns(rule, i);
  if (!right)
    attn_graph_fail(g, ATTN_INVALID_SHAPE,
                    "online_memory: q is %s, k %s, v %s, expected [%lld, heads, %lld] twice and "
                    "[%lld, heads, %lld], gates [%lld, heads] (wide), and the weights of each head",
                    attn_shape_text(&in->q->value, text_q), attn_shape_text(&in->k->value, text_k),
                    attn_shape_text(&in->v->value, text_v), (long long)rows,
                    (long long)rule->features, (long long)rows, (long long)rule->value_dim,
                    (long long)rows);
  return right;
}

static bool is_complete(const attn_online_memory *rule, const attn_online_memory_inputs *in) {
  bool there = in->q && in->k && in->v && in->alpha && in->theta && in->gamma;
  for (int i = 0; i < attn_online_memory_count(rule); ++i) there = there && in->initial[i];
  return there;
}

attn_var *attn_op_online_memory(attn_graph *graph, const attn_layout *layout,
                                const attn_online_memory *rule, const attn_online_memory_inputs *in,
                                const attn_online_memory_state *state) {
  if (!is_complete(rule, in) || !fits(graph, layout, rule, in, state)) return NULL;
  attn_tensor value = attn_graph_tensor_like(graph, in->v->value.dtype, &in->v->value);
  attn_var *inputs[7 + ATTN_MEMORY_MATRICES] = {in->q,     in->k,     in->v,
                                                in->alpha, in->theta, in->gamma};
  int count = 6;
  if (in->eta) inputs[count++] = in->eta;
  for (int i = 0; i < attn_online_memory_count(rule); ++i) inputs[count++] = in->initial[i];
  attn_var *o = attn_graph_result(graph, value, count, inputs);
  if (graph->status != ATTN_OK || !o) return NULL;
  attn_online_memory_tensors x = tensors_of(layout, in, &o->value);
  attn_tensor starts = {0}, momenta = {0};
  if (o->needs_gradient) {
    int64_t slots = attn_online_memory_slots(layout->rows, layout->batch, rule->chunk);
    int64_t shape[3] = {slots, in->v->value.shape[1], attn_online_memory_weights(rule)};
    starts = attn_graph_tensor(graph, graph->wide, 3, shape);
    momenta = attn_graph_tensor(graph, ATTN_F64, 3, shape);
    x.starts = &starts;
    x.momenta = &momenta;
  }
  attn_pass_online_memory(graph, rule, &x, state);
  memory_node *node = attn_graph_record(graph, sizeof *node, o, memory_backward);
  if (node) {
    node->rule = *rule;
    node->in = *in;
    node->starts = starts;
    node->momenta = momenta;
    node->layout = *layout;
  }
  return graph->status == ATTN_OK ? o : NULL;
}
