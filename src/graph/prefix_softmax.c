/* Softmax attention whose query is the same at every position: running means of values, in time and
 * memory linear in the length; and the scores that it takes. */
#include "graph/layout.h"
#include "graph/operations.h"
#include "graph/passes.h"

/* Scores ----------------------------------------------------------------------------------------
 */

typedef struct scores_node {
  attn_node node;
  attn_var *x, *q;
} scores_node;

/* q [1, heads, dim] for each row of x. */
static attn_tensor repeated(const attn_tensor *q, const attn_tensor *x) {
  attn_tensor rows = *q;
  rows.shape[0] = x->shape[0];
  rows.stride[0] = 0;
  return rows;
}

/* dx = ds q, dq = sum over rows of ds x */
static attn_status scores_backward(attn_graph *g, attn_node *node) {
  scores_node *self = (scores_node *)node;
  const attn_tensor *ds = &node->output->gradient, *x = &self->x->value;
  int64_t width = x->shape[1] * x->shape[2];
  attn_tensor q = repeated(&self->q->value, x);
  bool accumulate;
  attn_tensor dx = attn_gradient_of(g, self->x, &accumulate);
  if (dx.data) attn_pass_scale_rows(g, &dx, accumulate, ds, &q);
  if (!self->q->needs_gradient) return g->status;
  attn_tensor products = attn_graph_tensor(g, g->wide, 3, x->shape), rows;
  attn_tensor sums = attn_graph_tensor(g, g->wide, 1, &width), dq;
  if (g->status != ATTN_OK) return g->status;
  attn_pass_scale_rows(g, &products, false, ds, x);
  ATTN_TRY(attn_tensor_reshape(&products, 2, (int64_t[]){x->shape[0], width}, &rows));
  attn_pass_column_dot(g, &sums, &rows, NULL);
  ATTN_TRY(attn_tensor_reshape(&sums, 3, self->q->value.shape, &dq));
  attn_gradient_add(g, self->q, &dq);
  return g->status;
}

attn_var *attn_op_head_scores(attn_graph *graph, attn_var *x, attn_var *q) {
  if (!x || !q) return NULL;
  char text_x[128], text_q[128];
  const attn_tensor *of_x = &x->value, *of_q = &q->value;
  if (of_x->rank != 3 || of_q->rank != 3 || of_q->shape[0] != 1 ||
      of_q->shape[1] != of_x->shape[1] || of_q->shape[2] != of_x->shape[2] ||
      !attn_tensor_is_contiguous(of_q))
    return attn_graph_fail(graph, ATTN_INVALID_SHAPE,
                           "head_scores: x is %s, q %s, expected [rows, heads, dim] and, "
                           "contiguous, [1, heads, dim]",
                           attn_shape_text(of_x, text_x), attn_shape_text(of_q, text_q));
  attn_tensor value = attn_graph_tensor(graph, graph->wide, 2, of_x->shape);
  if (!value.data) return NULL;
  attn_tensor rows = repeated(of_q, of_x);
  attn_pass_row_dot(graph, &value, of_x, &rows);
  attn_var *s = attn_graph_result(graph, value, 2, (attn_var *[]){x, q});
  scores_node *node = attn_graph_record(graph, sizeof *node, s, scores_backward);
  if (node) {
    node->x = x;
    node->q = q;
  }
  return s;
}

/* Running means ---------------------------------------------------------------------------------
 */

typedef struct prefix_node {
  attn_node node;
  attn_var *s, *v;
  attn_tensor greatest, sum;
  attn_layout layout;
} prefix_node;

enum { TENSORS = 8 }; /* of attn_prefix_tensors, in its order */

/* The pass for each sequence, or for all at once where they are equally long. */
static void each_sequence(attn_graph *g, const attn_layout *layout,
                          const attn_tensor *const all[TENSORS], const attn_prefix_state *state,
                          bool back) {
  int64_t step = layout->offsets ? 1 : layout->batch;
  for (int64_t b = 0; b < layout->batch; b += step) {
    attn_tensor part[TENSORS];
    if (attn_layout_length(layout, b) == 0) continue;
    for (int i = 0; i < TENSORS; ++i)
      if (all[i]) part[i] = attn_sequences_of(all[i], layout, b);
    attn_prefix_tensors x = {.s = &part[0],
                             .v = &part[1],
                             .o = &part[2],
                             .greatest = &part[3],
                             .sum = &part[4],
                             .d_o = &part[5],
                             .ds = &part[6],
                             .dv = &part[7]};
    if (back)
      attn_pass_prefix_softmax_backward(g, &x);
    else
      attn_pass_prefix_softmax(g, &x, state);
  }
}

static attn_status prefix_backward(attn_graph *g, attn_node *node) {
  prefix_node *self = (prefix_node *)node;
  const attn_tensor *s = &self->s->value, *v = &self->v->value;
  attn_tensor ds = attn_graph_tensor_like(g, g->wide, s);
  attn_tensor dv = attn_graph_tensor_like(g, v->dtype, v);
  if (g->status != ATTN_OK) return g->status;
  const attn_tensor *const all[TENSORS] = {
      s, v, &node->output->value, &self->greatest, &self->sum, &node->output->gradient, &ds, &dv};
  each_sequence(g, &self->layout, all, NULL, true);
  attn_gradient_add(g, self->s, &ds);
  attn_gradient_add(g, self->v, &dv);
  return g->status;
}

static bool fits(attn_graph *g, const attn_layout *layout, const attn_tensor *s,
                 const attn_tensor *v, const attn_prefix_state *state) {
  char text_s[128], text_v[128];
  bool right = s->rank == 2 && v->rank == 3 && s->shape[0] == layout->rows &&
               v->shape[0] == layout->rows && s->shape[1] == v->shape[1] && s->dtype == g->wide &&
               attn_tensor_is_contiguous(s) && (v->stride[2] == 1 || v->shape[2] == 1) &&
               v->shape[2] <= ATTN_PREFIX_MOST_DIM && (!state || layout->batch == 1);
  if (!right)
    attn_graph_fail(g, ATTN_INVALID_SHAPE,
                    "prefix_softmax: scores are %s, values %s, expected [%lld, heads] (wide, "
                    "contiguous) and [%lld, heads, 1 to %d]%s",
                    attn_shape_text(s, text_s), attn_shape_text(v, text_v), (long long)layout->rows,
                    (long long)layout->rows, (int)ATTN_PREFIX_MOST_DIM,
                    state ? ", one sequence" : "");
  return right;
}

attn_var *attn_op_prefix_softmax(attn_graph *graph, const attn_layout *layout, attn_var *s,
                                 attn_var *v, const attn_prefix_state *state) {
  if (!s || !v || !fits(graph, layout, &s->value, &v->value, state)) return NULL;
  attn_tensor value = attn_graph_tensor_like(graph, v->value.dtype, &v->value);
  attn_tensor greatest = attn_graph_tensor_like(graph, graph->wide, &s->value);
  attn_tensor sum = attn_graph_tensor_like(graph, graph->wide, &s->value);
  if (graph->status != ATTN_OK) return NULL;
  const attn_tensor *const all[TENSORS] = {&s->value, &v->value, &value, &greatest, &sum};
  each_sequence(graph, layout, all, state, false);
  attn_var *o = attn_graph_result(graph, value, 2, (attn_var *[]){s, v});
  prefix_node *node = attn_graph_record(graph, sizeof *node, o, prefix_backward);
  if (node) {
    node->s = s;
    node->v = v;
    node->greatest = greatest;
    node->sum = sum;
    node->layout = *layout;
  }
  return o;
}
