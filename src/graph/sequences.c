/* Rows as sequences, and operations along them that classifiers need: neighbours side by side, and
 * means. */
#include "graph/operations.h"
#include "graph/passes.h"

attn_tensor attn_sequences_of(const attn_tensor *x, const attn_layout *layout, int64_t b) {
  attn_tensor part = *x;
  part.rank = x->rank + 1;
  part.data = attn_row(x, x->stride[0], attn_layout_first(layout, b)).data;
  part.shape[0] = layout->offsets ? 1 : layout->batch;
  part.shape[1] = attn_layout_length(layout, b);
  part.stride[0] = part.shape[1] * x->stride[0];
  part.stride[1] = x->stride[0];
  for (int i = 1; i < x->rank; ++i) {
    part.shape[i + 1] = x->shape[i];
    part.stride[i + 1] = x->stride[i];
  }
  return part;
}

/* A sequence's rows [first, first + count) of x, counted from its beginning. */
static attn_tensor part_of(const attn_tensor *x, const attn_layout *layout, int64_t b,
                           int64_t first, int64_t count) {
  attn_tensor rows = *x;
  rows.shape[0] = count;
  rows.data = (char *)x->data + (attn_layout_first(layout, b) + first) * x->stride[0] *
                                    (int64_t)attn_dtype_size(x->dtype);
  return rows;
}

/* Neighbours ------------------------------------------------------------------------------------
 */

typedef struct unfold_node {
  attn_node node;
  attn_var *x;
  attn_layout layout;
  int64_t taps;
} unfold_node;

/* Tap k of y [rows, n taps], as [rows, n]. */
static attn_tensor tap_of(const attn_tensor *y, int64_t taps, int64_t k) {
  attn_tensor columns = *y;
  columns.shape[1] = y->shape[1] / taps;
  columns.data = (char *)y->data + k * columns.shape[1] * (int64_t)attn_dtype_size(y->dtype);
  return columns;
}

/* y's tap k gets x moved by k - taps / 2, or, back, x gets y's taps added up. */
static void move(attn_graph *g, const attn_layout *layout, const attn_tensor *x,
                 const attn_tensor *y, int64_t taps, bool back) {
  for (int64_t b = 0; b < layout->batch; ++b)
    for (int64_t k = 0; k < taps; ++k) {
      int64_t length = attn_layout_length(layout, b), shift = k - taps / 2;
      int64_t first = shift < 0 ? -shift : 0, count = length - (shift < 0 ? -shift : shift);
      if (count <= 0) continue;
      attn_tensor tap = tap_of(y, taps, k), to = part_of(&tap, layout, b, first, count);
      attn_tensor from = part_of(x, layout, b, first + shift, count);
      attn_add_tensor(g, back ? &from : &to, back ? &to : &from, 1, back);
    }
}

static attn_status unfold_backward(attn_graph *g, attn_node *node) {
  unfold_node *self = (unfold_node *)node;
  attn_tensor dx = attn_graph_tensor_like(g, g->wide, &self->x->value);
  if (!dx.data) return g->status;
  ATTN_TRY(attn_tensor_fill(&dx, 0));
  move(g, &self->layout, &dx, &node->output->gradient, self->taps, true);
  attn_gradient_add(g, self->x, &dx);
  return g->status;
}

attn_var *attn_op_unfold(attn_graph *graph, const attn_layout *layout, attn_var *x, int64_t taps) {
  if (!x) return NULL;
  char text[128];
  if (x->value.rank != 2 || x->value.shape[0] != layout->rows || taps < 1 || taps % 2 == 0)
    return attn_graph_fail(graph, ATTN_INVALID_SHAPE,
                           "unfold: x is %s, %lld taps, expected [%lld, n] and an odd number",
                           attn_shape_text(&x->value, text), (long long)taps,
                           (long long)layout->rows);
  int64_t shape[2] = {layout->rows, x->value.shape[1] * taps};
  attn_tensor value = attn_graph_tensor(graph, graph->compute, 2, shape);
  if (!value.data) return NULL;
  attn_status status = attn_tensor_fill(&value, 0);
  if (status != ATTN_OK) return attn_graph_error(graph, status);
  move(graph, layout, &x->value, &value, taps, false);
  attn_var *y = attn_graph_result(graph, value, 1, &x);
  unfold_node *node = attn_graph_record(graph, sizeof *node, y, unfold_backward);
  if (node) {
    node->x = x;
    node->layout = *layout;
    node->taps = taps;
  }
  return y;
}

/* Means -----------------------------------------------------------------------------------------
 */

typedef struct mean_node {
  attn_node node;
  attn_var *x;
  attn_layout layout;
} mean_node;

/* Row b of y, [n]. */
static attn_tensor row_of(const attn_tensor *y, int64_t b) {
  attn_tensor row = {0};
  if (attn_tensor_select(y, 0, b, &row) != ATTN_OK) row.data = NULL;
  return row;
}

static attn_status mean_backward(attn_graph *g, attn_node *node) {
  mean_node *self = (mean_node *)node;
  attn_tensor dx = attn_graph_tensor_like(g, g->wide, &self->x->value);
  if (!dx.data) return g->status;
  for (int64_t b = 0; b < self->layout.batch; ++b) {
    int64_t length = attn_layout_length(&self->layout, b);
    attn_tensor to = part_of(&dx, &self->layout, b, 0, length), from = to;
    from.data = row_of(&node->output->gradient, b).data;
    from.stride[0] = 0;
    if (length) attn_pass_add(g, &to, 1 / (double)length, &from, 0, NULL);
  }
  attn_gradient_add(g, self->x, &dx);
  return g->status;
}

attn_var *attn_op_sequence_mean(attn_graph *graph, const attn_layout *layout, attn_var *x) {
  if (!x) return NULL;
  char text[128];
  if (x->value.rank != 2 || x->value.shape[0] != layout->rows)
    return attn_graph_fail(graph, ATTN_INVALID_SHAPE, "sequence_mean: x is %s, expected [%lld, n]",
                           attn_shape_text(&x->value, text), (long long)layout->rows);
  attn_tensor value =
      attn_graph_tensor(graph, graph->wide, 2, (int64_t[]){layout->batch, x->value.shape[1]});
  if (!value.data) return NULL;
  for (int64_t b = 0; b < layout->batch; ++b) {
    int64_t length = attn_layout_length(layout, b);
    attn_tensor to = row_of(&value, b), from = part_of(&x->value, layout, b, 0, length);
    if (length == 0)
      return attn_graph_fail(graph, ATTN_INVALID_ARGUMENT, "sequence_mean: sequence %lld is empty",
                             (long long)b);
    attn_pass_column_dot(graph, &to, &from, NULL);
    attn_pass_add(graph, &to, 1 / (double)length, &to, 0, NULL);
  }
  attn_var *y = attn_graph_result(graph, value, 1, &x);
  mean_node *node = attn_graph_record(graph, sizeof *node, y, mean_backward);
  if (node) {
    node->x = x;
    node->layout = *layout;
  }
  return y;
}
