/* y = x w^T through the dense engine. */
#include "engines/dense/dense.h"
#include "graph/layout.h"
#include "graph/operations.h"
#include "graph/passes.h"
#include "kernels/matvec.h"

_Static_assert((int)ATTN_FEW_ROWS <= (int)ATTN_MATVEC_ROWS,
               "few rows go through products row by row");

typedef struct linear_node {
  attn_node node;
  attn_var *x, *residual;
  attn_tensor rows; /* x as rows of the compute dtype: what the products read */
  attn_parameter *w;
} linear_node;

/* The rows again: a conversion is kept, x itself may have been discarded. */
static attn_tensor rows_of(attn_graph *g, const linear_node *self) {
  attn_tensor rows = self->rows;
  if (rows.data == self->x->value.data) rows.data = attn_graph_value(g, self->x).data;
  return rows;
}

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
  attn_tensor dx = attn_gradient_rows(g, self->x, &accumulate), rows = rows_of(g, self);
  /* Gradients have their place now; what follows is scratch. */
  attn_graph_mark mark = attn_graph_get_mark(g);
  attn_tensor dy = compute_rows(g, &node->output->gradient);
  if (!dy.data || g->status != ATTN_OK) return g->status;
  if (dx.data) ATTN_TRY(attn_dense_backward_input(self->w->weight, &dy, &dx, accumulate, g->arena));
  if (self->w->gradient.data)
    ATTN_TRY(attn_dense_backward_weight(&dy, &rows, &self->w->gradient, true, g->arena));
  attn_graph_release(g, mark);
  attn_gradient_add(g, self->x, &dx);
  return g->status;
}

static attn_status linear_again(attn_graph *g, attn_node *node, const attn_tensor *value) {
  linear_node *self = (linear_node *)node;
  attn_tensor rows = rows_of(g, self), y = attn_as_rows(g, value);
  if (g->status != ATTN_OK) return g->status;
  return attn_dense_forward(self->w->weight, &rows, &y, false, g->arena);
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
    node->node.again = residual ? NULL : linear_again;
    y->unread = true;
    node->rows = rows;
    node->w = w;
  }
  attn_graph_restores(x);
  attn_graph_restores(residual);
  return y;
}

attn_var *attn_op_linear_frozen(attn_graph *graph, attn_var *x, attn_parameter *w,
                                attn_dtype dtype) {
  return linear(graph, x, w, dtype, NULL);
}

static attn_var *adapted(attn_graph *g, attn_var *x, attn_parameter *w, attn_dtype dtype) {
  attn_var *y = linear(g, x, w, dtype, NULL);
  return y && w->adapter ? w->adapter->apply(g, w, x, y) : y;
}

attn_var *attn_op_linear(attn_graph *graph, attn_var *x, attn_parameter *w) {
  return adapted(graph, x, w, graph->compute);
}

attn_var *attn_op_linear_wide(attn_graph *graph, attn_var *x, attn_parameter *w) {
  return adapted(graph, x, w, graph->wide);
}

attn_var *attn_op_linear_add(attn_graph *graph, attn_var *residual, attn_var *x,
                             attn_parameter *w) {
  if (!residual) return NULL;
  if (w->adapter) return attn_op_add(graph, residual, attn_op_linear(graph, x, w));
  return linear(graph, x, w, residual->value.dtype, residual);
}

typedef struct gated_node {
  attn_node node;
  attn_var *a, *b;
  attn_activation f;
  attn_parameter *w;
} gated_node;

static attn_tensor value_rows(attn_graph *g, attn_var *x) {
  attn_tensor value = attn_graph_value(g, x);
  return attn_as_rows(g, &value);
}

/* With p = f(a) (.) b: dp = dy w, which makes da and db and then room for p, made again in the same
 * pass; dw += dy^T p. */
static attn_status gated_backward(attn_graph *g, attn_node *node) {
  gated_node *self = (gated_node *)node;
  bool add_a, add_b;
  attn_tensor da = attn_gradient_rows(g, self->a, &add_a);
  attn_tensor db = attn_gradient_rows(g, self->b, &add_b);
  attn_tensor a = value_rows(g, self->a), b = value_rows(g, self->b);
  if (g->status != ATTN_OK) return g->status;
  attn_graph_mark mark = attn_graph_get_mark(g);
  attn_tensor dy = compute_rows(g, &node->output->gradient);
  attn_tensor p = attn_graph_tensor(g, g->compute, 2, a.shape);
  if (!dy.data || !p.data) return g->status;
  ATTN_TRY(attn_dense_backward_input(self->w->weight, &dy, &p, false, g->arena));
  attn_pass_gate_backward(g, self->f, &da, add_a, &db, add_b, &p, &a, &b, &p);
  if (self->w->gradient.data)
    ATTN_TRY(attn_dense_backward_weight(&dy, &p, &self->w->gradient, true, g->arena));
  attn_graph_release(g, mark);
  attn_gradient_add(g, self->a, &da);
  attn_gradient_add(g, self->b, &db);
  return g->status;
}

attn_var *attn_op_gated_linear(attn_graph *graph, attn_activation f, attn_var *a, attn_var *b,
                               attn_parameter *w) {
  if (!a || !b) return NULL;
  bool fuses = graph->gpu && graph->recording && a->needs_gradient && b->needs_gradient &&
               (a->root ? a->root : a) != (b->root ? b->root : b) &&
               attn_same_shape(&a->value, &b->value) && a->value.dtype == graph->compute &&
               w->weight && w->value.rank == 2 && a->value.rank == 2 &&
               a->value.shape[1] == w->value.shape[1] && !w->adapter;
  if (!fuses) return attn_op_linear(graph, attn_op_gate(graph, f, a, b), w);
  int64_t shape[2] = {a->value.shape[0], w->value.shape[0]};
  attn_tensor value = attn_graph_reuse(graph, graph->compute, 2, shape);
  attn_tensor from_a = attn_as_rows(graph, &a->value), from_b = attn_as_rows(graph, &b->value);
  attn_graph_mark mark = attn_graph_get_mark(graph);
  attn_tensor p = attn_graph_tensor(graph, graph->compute, 2, a->value.shape);
  if (!value.data || !from_a.data || !from_b.data || !p.data) return NULL;
  attn_pass_gate(graph, f, &p, &from_a, &from_b);
  attn_status status = graph->status;
  if (status == ATTN_OK) status = attn_dense_forward(w->weight, &p, &value, false, graph->arena);
  attn_graph_release(graph, mark);
  if (status != ATTN_OK) return attn_graph_error(graph, status);
  attn_var *y = attn_graph_result(graph, value, 2, (attn_var *[]){a, b});
  gated_node *node = attn_graph_record(graph, sizeof *node, y, gated_backward);
  if (node) {
    node->a = a;
    node->b = b;
    node->f = f;
    node->w = w;
    y->unread = true;
  }
  attn_graph_restores(a);
  attn_graph_restores(b);
  return y;
}
