/* y = x w^T through the dense engine. */
#include "engines/dense/dense.h"
#include "graph/layout.h"
#include "graph/operations.h"
#include "kernels/matvec.h"

_Static_assert((int)ATTN_FEW_ROWS <= (int)ATTN_MATVEC_ROWS,
               "few rows go through products row by row");

typedef struct linear_node {
  attn_node node;
  attn_var *x, *residual;
  attn_tensor rows; /* x as rows of the compute dtype: what the products read */
  attn_parameter *w;
} linear_node;

/* x as [rows, inputs] in the compute dtype, converted if it is another. */
static attn_tensor compute_rows(attn_graph *g, const attn_tensor *x) {
  attn_tensor rows = attn_as_rows(g, x);
  if (!rows.data || rows.dtype == g->compute) return rows;
  attn_tensor converted = attn_graph_tensor(g, g->compute, 2, rows.shape);
  if (converted.data) attn_add_tensor(g, &converted, &rows, 1, false);
  return converted;
}

static attn_status linear_backward(attn_graph *g, attn_node *node) {
  linear_node *self = (linear_node *)node;
  /* The residual first: it may be x itself, or part of it. */
  if (self->residual) attn_gradient_add(g, self->residual, &node->output->gradient);
  bool accumulate;
  attn_tensor dx = attn_gradient_rows(g, self->x, &accumulate);
  /* Gradients have their place now; what follows is scratch. */
  attn_graph_mark mark = attn_graph_get_mark(g);
  attn_tensor dy = compute_rows(g, &node->output->gradient);
  if (!dy.data || g->status != ATTN_OK) return g->status;
  if (dx.data) ATTN_TRY(attn_dense_backward_input(self->w->weight, &dy, &dx, accumulate, g->arena));
  if (self->w->gradient.data)
    ATTN_TRY(attn_dense_backward_weight(&dy, &self->rows, &self->w->gradient, true, g->arena));
  attn_graph_release(g, mark);
  attn_gradient_add(g, self->x, &dx);
  return g->status;
}

static attn_var *linear(attn_graph *g, attn_var *x, attn_parameter *w, attn_dtype dtype,
                        attn_var *residual) {
  if (!x) return NULL;
  char text[128];
  int last = x->value.rank - 1;
  if (!w->weight || w->value.rank != 2)
    return attn_graph_fail(g, ATTN_INVALID_SHAPE, "linear: %s is not a matrix", w->name);
  if (last < 0 || x->value.shape[last] != w->value.shape[1])
    return attn_graph_fail(g, ATTN_INVALID_SHAPE, "linear: %s takes %lld inputs, x is %s", w->name,
                           (long long)w->value.shape[1], attn_shape_text(&x->value, text));
  int64_t shape[ATTN_MAX_RANK];
  for (int i = 0; i < last; ++i) shape[i] = x->value.shape[i];
  shape[last] = w->value.shape[0];
  attn_tensor value = attn_graph_reuse(g, dtype, x->value.rank, shape);
  attn_tensor rows = compute_rows(g, &x->value);
  if (!value.data || !rows.data) return NULL;
  if (residual) {
    if (!attn_same_shape(&residual->value, &value) || residual->value.dtype != dtype)
      return attn_graph_fail(g, ATTN_INVALID_SHAPE, "linear_add: %s gives %s, the residual is %s",
                             w->name, attn_shape_text(&value, text),
                             attn_shape_text(&residual->value, (char[128]){0}));
    attn_add_tensor(g, &value, &residual->value, 1, false);
  }
  attn_tensor y_rows = attn_as_rows(g, &value);
  attn_graph_mark mark = attn_graph_get_mark(g);
  attn_status status = attn_dense_forward(w->weight, &rows, &y_rows, residual != NULL, g->arena);
  attn_graph_release(g, mark);
  if (status != ATTN_OK) return attn_graph_error(g, status);
  attn_var *y = attn_graph_result(g, value, 2, (attn_var *[]){x, residual});
  if (y && g->recording && w->gradient.data) y->needs_gradient = true;
  linear_node *node = attn_graph_record(g, sizeof *node, y, linear_backward);
  if (node) {
    node->x = x;
    node->residual = residual;
    y->unread = true;
    node->rows = rows;
    node->w = w;
  }
  return y;
}

attn_var *attn_op_linear(attn_graph *graph, attn_var *x, attn_parameter *w) {
  return linear(graph, x, w, graph->compute, NULL);
}

attn_var *attn_op_linear_wide(attn_graph *graph, attn_var *x, attn_parameter *w) {
  return linear(graph, x, w, graph->wide, NULL);
}

attn_var *attn_op_linear_add(attn_graph *graph, attn_var *residual, attn_var *x,
                             attn_parameter *w) {
  return residual ? linear(graph, x, w, residual->value.dtype, residual) : NULL;
}
