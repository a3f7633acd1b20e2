/* loss = scale sum (x - target)^2,  dx = 2 scale (x - target) d loss
 *
 * The differences are made in the wide dtype when the loss is, and kept for backward. */
#include "base/status.h"
#include "graph/operations.h"
#include "graph/passes.h"

typedef struct squared_error_node {
  attn_node node;
  attn_var *x;
  attn_tensor slope; /* dx for d loss = 1, as rows */
} squared_error_node;

static attn_status squared_error_backward(attn_graph *g, attn_node *node) {
  squared_error_node *self = (squared_error_node *)node;
  bool accumulate;
  attn_tensor dx = attn_gradient_rows(g, self->x, &accumulate);
  if (!dx.data) return g->status;
  attn_pass_scale_by(g, &dx, accumulate, &node->output->gradient, &self->slope);
  attn_gradient_add(g, self->x, &dx);
  return g->status;
}

attn_var *attn_op_squared_error(attn_graph *graph, attn_var *x, const attn_tensor *target,
                                double scale) {
  if (!x) return NULL;
  char is[128], wanted[128];
  if (!attn_same_shape(&x->value, target) || x->value.rank < 1)
    return attn_graph_fail(graph, ATTN_INVALID_SHAPE, "squared_error: x is %s, the target %s",
                           attn_shape_text(&x->value, is), attn_shape_text(target, wanted));
  attn_tensor from = attn_as_rows(graph, &x->value), to = attn_as_rows(graph, target);
  attn_tensor value = attn_graph_tensor(graph, graph->wide, 1, (int64_t[]){1});
  attn_var *loss = attn_graph_result(graph, value, 1, &x);
  if (!loss || !from.data || !to.data) return NULL;
  attn_tensor difference = attn_graph_tensor(graph, graph->wide, 2, from.shape);
  attn_tensor sums = attn_graph_tensor(graph, ATTN_F64, 1, from.shape);
  if (!difference.data || !sums.data) return NULL;
  attn_pass_add(graph, &difference, 1, &from, -1, &to);
  attn_pass_row_dot(graph, &sums, &difference, &difference);
  attn_pass_total(graph, &value, scale, &sums);
  if (graph->status != ATTN_OK) return NULL;
  squared_error_node *node = attn_graph_record(graph, sizeof *node, loss, squared_error_backward);
  if (!node) return loss;
  attn_pass_add(graph, &difference, 2 * scale, &difference, 0, NULL);
  node->x = x;
  node->slope = difference;
  return loss;
}
