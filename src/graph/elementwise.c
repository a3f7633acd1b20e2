#include "graph/operations.h"
#include "graph/passes.h"

#include <stdio.h>
#include <string.h>

bool attn_same_shape(const attn_tensor *a, const attn_tensor *b) {
  return a->rank == b->rank && memcmp(a->shape, b->shape, (size_t)a->rank * sizeof *a->shape) == 0;
}

const char *attn_shape_text(const attn_tensor *tensor, char text[128]) {
  int used = snprintf(text, 128, "[");
  for (int i = 0; i < tensor->rank && used < 110; ++i)
    used += snprintf(text + used, (size_t)(128 - used), "%s%lld", i ? ", " : "",
                     (long long)tensor->shape[i]);
  snprintf(text + used, (size_t)(128 - used), "]");
  return text;
}

attn_tensor attn_graph_tensor_like(attn_graph *graph, attn_dtype dtype,
                                   const attn_tensor *shape_of) {
  return attn_graph_tensor(graph, dtype, shape_of->rank, shape_of->shape);
}

static bool check_shapes(attn_graph *g, const char *operation, attn_var *a, attn_var *b) {
  char text_a[128], text_b[128];
  if (!a || !b) return false;
  if (attn_same_shape(&a->value, &b->value)) return true;
  attn_graph_fail(g, ATTN_INVALID_SHAPE, "%s: shapes %s and %s differ", operation,
                  attn_shape_text(&a->value, text_a), attn_shape_text(&b->value, text_b));
  return false;
}

/* What the nodes of this file keep: their inputs and a number or a function. Their backward does
 * without the inputs' values or asks attn_graph_value. */
typedef struct elementwise_node {
  attn_node node;
  attn_var *a, *b;
  attn_activation f;
  double factor;
} elementwise_node;

static attn_var *finish(attn_graph *g, attn_tensor value, attn_var *a, attn_var *b,
                        attn_activation f, double factor,
                        attn_status (*backward)(attn_graph *, attn_node *)) {
  attn_var *y = attn_graph_result(g, value, 2, (attn_var *[]){a, b});
  elementwise_node *node = attn_graph_record(g, sizeof *node, y, backward);
  if (node) {
    node->a = a;
    node->b = b;
    node->f = f;
    node->factor = factor;
  }
  attn_graph_restores(a);
  attn_graph_restores(b);
  return y;
}

/* The value of an input as rows. */
static attn_tensor rows_of(attn_graph *g, attn_var *x) {
  attn_tensor value = attn_graph_value(g, x);
  return attn_as_rows(g, &value);
}

/* gradient of x += factor * dy */
static void pass_on(attn_graph *g, attn_var *x, double factor, const attn_tensor *dy) {
  bool accumulate;
  attn_tensor dx = attn_gradient_of(g, x, &accumulate);
  if (dx.data) attn_add_tensor(g, &dx, dy, factor, accumulate);
}

static attn_status add_backward(attn_graph *g, attn_node *node) {
  elementwise_node *self = (elementwise_node *)node;
  if (self->b) pass_on(g, self->b, self->factor, &node->output->gradient);
  if (self->factor == 1)
    attn_gradient_hand_over(g, self->a, node->output);
  else
    pass_on(g, self->a, self->factor, &node->output->gradient);
  return g->status;
}

attn_var *attn_op_added(attn_graph *graph, attn_tensor sum, attn_var *a, attn_var *b) {
  return finish(graph, sum, a, b, ATTN_IDENTITY, 1, add_backward);
}

attn_tensor attn_op_take_addend(attn_graph *graph, attn_var *sum) {
  attn_node *node = graph->last;
  if (!node || node->output != sum || node->backward != add_backward) return (attn_tensor){0};
  elementwise_node *self = (elementwise_node *)node;
  attn_var *b = self->b;
  bool plain =
      b && b != self->a && self->factor == 1 && b->needs_gradient && !b->root && !b->gradient.data;
  if (!plain) return (attn_tensor){0};
  bool accumulate;
  self->b = NULL;
  return attn_gradient_of(graph, b, &accumulate);
}

attn_var *attn_op_add(attn_graph *graph, attn_var *a, attn_var *b) {
  if (!check_shapes(graph, "add", a, b)) return NULL;
  attn_tensor value = attn_graph_tensor_like(graph, a->value.dtype, &a->value);
  if (!value.data) return NULL;
  attn_tensor to = attn_as_rows(graph, &value);
  attn_tensor from_a = attn_as_rows(graph, &a->value), from_b = attn_as_rows(graph, &b->value);
  if (!to.data || !from_a.data || !from_b.data) return NULL;
  attn_pass_add(graph, &to, 1, &from_a, 1, &from_b);
  return finish(graph, value, a, b, ATTN_IDENTITY, 1, add_backward);
}

static attn_var *scale_into(attn_graph *g, attn_var *x, double factor, attn_dtype dtype) {
  if (!x) return NULL;
  attn_tensor value = attn_graph_tensor_like(g, dtype, &x->value);
  if (!value.data) return NULL;
  attn_add_tensor(g, &value, &x->value, factor, false);
  return finish(g, value, x, NULL, ATTN_IDENTITY, factor, add_backward);
}

attn_var *attn_op_scale(attn_graph *graph, attn_var *x, double factor) {
  return x ? scale_into(graph, x, factor, x->value.dtype) : NULL;
}

attn_var *attn_op_cast(attn_graph *graph, attn_var *x, attn_dtype dtype) {
  if (!x) return NULL;
  if (dtype != ATTN_F64 && dtype != ATTN_F32 && dtype != ATTN_BF16)
    return attn_graph_fail(graph, ATTN_UNSUPPORTED,
                           "cast: to %s; float64, float32 and bfloat16 are possible",
                           attn_dtype_name(dtype));
  return scale_into(graph, x, 1, dtype);
}

static attn_status activate_backward(attn_graph *g, attn_node *node) {
  elementwise_node *self = (elementwise_node *)node;
  bool accumulate;
  attn_tensor dx = attn_gradient_rows(g, self->a, &accumulate);
  attn_tensor x = rows_of(g, self->a);
  attn_tensor dy = attn_as_rows(g, &node->output->gradient);
  if (!dx.data || !x.data || !dy.data) return g->status;
  attn_pass_activate_backward(g, self->f, &dx, accumulate, &x, &dy);
  attn_gradient_add(g, self->a, &dx);
  return g->status;
}

static attn_status activate_again(attn_graph *g, attn_node *node, const attn_tensor *value) {
  elementwise_node *self = (elementwise_node *)node;
  attn_tensor from = rows_of(g, self->a), to = attn_as_rows(g, value);
  if (g->status == ATTN_OK) attn_pass_activate(g, self->f, &to, &from);
  return g->status;
}

static attn_var *activate_into(attn_graph *g, attn_activation f, attn_var *x, attn_dtype dtype) {
  if (!x) return NULL;
  attn_tensor value = attn_graph_reuse(g, dtype, x->value.rank, x->value.shape);
  attn_tensor from = attn_as_rows(g, &x->value), to = attn_as_rows(g, &value);
  if (!to.data || !from.data) return NULL;
  attn_pass_activate(g, f, &to, &from);
  attn_var *y = finish(g, value, x, NULL, f, 1, activate_backward);
  if (y && y->node) y->node->again = activate_again;
  return y;
}

attn_var *attn_op_activate(attn_graph *graph, attn_activation f, attn_var *x) {
  return x ? activate_into(graph, f, x, x->value.dtype) : NULL;
}

attn_var *attn_op_activate_wide(attn_graph *graph, attn_activation f, attn_var *x) {
  return activate_into(graph, f, x, graph->wide);
}

typedef struct softmax_node {
  attn_node node;
  attn_var *x;
  bool divide;
  double floor;
} softmax_node;

static attn_status softmax_backward(attn_graph *g, attn_node *node) {
  softmax_node *self = (softmax_node *)node;
  bool accumulate;
  attn_tensor dx = attn_gradient_rows(g, self->x, &accumulate);
  attn_tensor x = rows_of(g, self->x), dy = attn_as_rows(g, &node->output->gradient);
  if (!dx.data || !x.data || !dy.data) return g->status;
  attn_pass_softmax_backward(g, &dx, accumulate, &x, &dy, self->divide, self->floor);
  attn_gradient_add(g, self->x, &dx);
  return g->status;
}

static attn_status softmax_again(attn_graph *g, attn_node *node, const attn_tensor *value) {
  softmax_node *self = (softmax_node *)node;
  attn_tensor from = rows_of(g, self->x), to = attn_as_rows(g, value);
  if (g->status == ATTN_OK) attn_pass_softmax(g, &to, &from, self->divide, self->floor);
  return g->status;
}

attn_var *attn_op_row_softmax(attn_graph *graph, attn_var *x, bool divide, double floor) {
  if (!x) return NULL;
  attn_tensor value = attn_graph_reuse(graph, graph->compute, x->value.rank, x->value.shape);
  attn_tensor from = attn_as_rows(graph, &x->value), to = attn_as_rows(graph, &value);
  if (!to.data || !from.data) return NULL;
  attn_pass_softmax(graph, &to, &from, divide, floor);
  attn_var *y = attn_graph_result(graph, value, 1, &x);
  softmax_node *node = attn_graph_record(graph, sizeof *node, y, softmax_backward);
  if (node) {
    node->x = x;
    node->divide = divide;
    node->floor = floor;
    node->node.again = softmax_again;
  }
  attn_graph_restores(x);
  return y;
}

/* One operand's gradient: of a when `first`, else of b. One after the other, because a and b may be
 * views whose rows overlap. */
static void gate_gradient(attn_graph *g, elementwise_node *self, bool first, const attn_tensor *a,
                          const attn_tensor *b, const attn_tensor *dy) {
  attn_var *x = first ? self->a : self->b;
  bool accumulate;
  attn_tensor dx = attn_gradient_rows(g, x, &accumulate);
  if (!dx.data) return;
  attn_pass_gate_backward(g, self->f, first ? &dx : NULL, accumulate, first ? NULL : &dx,
                          accumulate, NULL, a, b, dy);
  attn_gradient_add(g, x, &dx);
}

/* Both gradients in one pass over memory, for operands in separate memory. */
static void gate_gradients(attn_graph *g, elementwise_node *self, const attn_tensor *a,
                           const attn_tensor *b, const attn_tensor *dy) {
  bool add_a, add_b;
  attn_tensor da = attn_gradient_rows(g, self->a, &add_a);
  attn_tensor db = attn_gradient_rows(g, self->b, &add_b);
  if (!da.data || !db.data) return;
  attn_pass_gate_backward(g, self->f, &da, add_a, &db, add_b, NULL, a, b, dy);
  attn_gradient_add(g, self->a, &da);
  attn_gradient_add(g, self->b, &db);
}

static attn_var *owner(attn_var *x) {
  return x->root ? x->root : x;
}

static attn_status gate_backward(attn_graph *g, attn_node *node) {
  elementwise_node *self = (elementwise_node *)node;
  attn_tensor a = rows_of(g, self->a), b = rows_of(g, self->b);
  attn_tensor dy = attn_as_rows(g, &node->output->gradient);
  if (!a.data || !b.data || !dy.data) return g->status;
  bool both = self->a->needs_gradient && self->b->needs_gradient;
  if (both && owner(self->a) != owner(self->b)) {
    gate_gradients(g, self, &a, &b, &dy);
  } else {
    gate_gradient(g, self, true, &a, &b, &dy);
    gate_gradient(g, self, false, &a, &b, &dy);
  }
  return g->status;
}

attn_var *attn_op_gate(attn_graph *graph, attn_activation f, attn_var *a, attn_var *b) {
  if (!check_shapes(graph, "gate", a, b)) return NULL;
  attn_tensor value = attn_graph_tensor_like(graph, a->value.dtype, &a->value);
  attn_tensor to = attn_as_rows(graph, &value);
  attn_tensor from_a = attn_as_rows(graph, &a->value), from_b = attn_as_rows(graph, &b->value);
  if (!to.data || !from_a.data || !from_b.data) return NULL;
  attn_pass_gate(graph, f, &to, &from_a, &from_b);
  return finish(graph, value, a, b, f, 1, gate_backward);
}

/* One row [n] as `rows` of them. */
static attn_tensor repeat_row(const attn_tensor *row, int64_t rows) {
  attn_tensor repeated = *row;
  repeated.rank = 2;
  repeated.shape[0] = rows, repeated.stride[0] = 0;
  repeated.shape[1] = attn_tensor_count(row), repeated.stride[1] = 1;
  return repeated;
}

static attn_status bias_backward(attn_graph *g, attn_node *node) {
  elementwise_node *self = (elementwise_node *)node;
  pass_on(g, self->a, 1, &node->output->gradient);
  if (!self->b->needs_gradient) return g->status;
  attn_tensor dy = attn_as_rows(g, &node->output->gradient);
  attn_tensor sum = attn_graph_tensor(g, g->wide, 1, &dy.shape[1]);
  if (!dy.data || !sum.data) return g->status;
  attn_pass_column_dot(g, &sum, &dy, NULL);
  attn_gradient_add(g, self->b, &sum);
  return g->status;
}

attn_var *attn_op_add_bias(attn_graph *graph, attn_var *x, attn_var *bias) {
  if (!x || !bias) return NULL;
  int64_t width = x->value.rank ? x->value.shape[x->value.rank - 1] : 0;
  if (bias->value.rank != 1 || bias->value.shape[0] != width ||
      !attn_tensor_is_contiguous(&bias->value))
    return attn_graph_fail(graph, ATTN_INVALID_SHAPE,
                           "add_bias: the bias has %lld elements (in a row), the rows %lld",
                           (long long)attn_tensor_count(&bias->value), (long long)width);
  attn_tensor value = attn_graph_tensor_like(graph, x->value.dtype, &x->value);
  attn_tensor to = attn_as_rows(graph, &value), from = attn_as_rows(graph, &x->value);
  if (!to.data || !from.data) return NULL;
  attn_tensor offset = repeat_row(&bias->value, to.shape[0]);
  attn_pass_add(graph, &to, 1, &from, 1, &offset);
  return finish(graph, value, x, bias, ATTN_IDENTITY, 1, bias_backward);
}

typedef struct columns_node {
  attn_node node;
  attn_var *x, *s;
  attn_tensor row; /* s, each element repeated: [n] */
} columns_node;

static attn_status columns_backward(attn_graph *g, attn_node *node) {
  columns_node *self = (columns_node *)node;
  attn_tensor dy = attn_as_rows(g, &node->output->gradient), x = attn_as_rows(g, &self->x->value);
  int64_t width = dy.shape[1];
  attn_tensor row = repeat_row(&self->row, dy.shape[0]);
  bool accumulate;
  attn_tensor dx = attn_gradient_rows(g, self->x, &accumulate);
  if (dx.data) {
    attn_pass_multiply_sum(g, &dx, accumulate, 1, &dy, &row);
    attn_gradient_add(g, self->x, &dx);
  }
  attn_tensor ds = attn_gradient_overwrite(g, self->s);
  if (!ds.data) return g->status;
  attn_tensor sums = attn_graph_tensor_like(g, g->wide, &self->row);
  if (!sums.data) return g->status;
  attn_pass_column_dot(g, &sums, &dy, &x);
  int64_t count = ds.shape[0], shape[2] = {count, width / count};
  attn_tensor ones = attn_graph_tensor(g, g->wide, 2, shape), grid;
  if (!ones.data) return g->status;
  ATTN_TRY(attn_tensor_fill(&ones, 1));
  ATTN_TRY(attn_tensor_reshape(&sums, 2, shape, &grid));
  attn_pass_row_dot(g, &ds, &grid, &ones);
  attn_gradient_add(g, self->s, &ds);
  return g->status;
}

attn_var *attn_op_scale_columns(attn_graph *graph, attn_var *x, attn_var *s, int64_t repeat) {
  if (!x || !s) return NULL;
  int64_t width = x->value.rank ? x->value.shape[x->value.rank - 1] : 0;
  if (s->value.rank != 1 || repeat < 1 || s->value.shape[0] * repeat != width)
    return attn_graph_fail(graph, ATTN_INVALID_SHAPE,
                           "scale_columns: %lld factors, each for %lld columns, rows have %lld",
                           (long long)attn_tensor_count(&s->value), (long long)repeat,
                           (long long)width);
  attn_tensor row = attn_graph_tensor(graph, graph->wide, 1, &width);
  attn_tensor value = attn_graph_tensor_like(graph, x->value.dtype, &x->value);
  attn_tensor from = attn_as_rows(graph, &x->value), to = attn_as_rows(graph, &value);
  if (!row.data || !to.data || !from.data) return NULL;
  int64_t count = s->value.shape[0], shape[2] = {count, repeat};
  attn_tensor factors = s->value, grid;
  factors.rank = 2;
  factors.shape[1] = repeat;
  factors.stride[1] = 0;
  attn_status status = attn_tensor_reshape(&row, 2, shape, &grid);
  if (status == ATTN_OK) status = attn_tensor_copy(&factors, &grid);
  if (status != ATTN_OK) return attn_graph_error(graph, status);
  attn_tensor factor = repeat_row(&row, from.shape[0]);
  attn_pass_multiply_sum(graph, &to, false, 1, &from, &factor);
  attn_var *y = attn_graph_result(graph, value, 2, (attn_var *[]){x, s});
  columns_node *node = attn_graph_record(graph, sizeof *node, y, columns_backward);
  if (node) {
    node->x = x;
    node->s = s;
    node->row = row;
  }
  return y;
}

static attn_status rows_backward(attn_graph *g, attn_node *node) {
  elementwise_node *self = (elementwise_node *)node;
  attn_tensor dy = attn_as_rows(g, &node->output->gradient);
  attn_tensor x = rows_of(g, self->a), s = rows_of(g, self->b);
  attn_tensor ds = attn_graph_tensor(g, g->wide, 2, s.shape), column = ds;
  bool accumulate;
  attn_tensor dx = attn_gradient_rows(g, self->a, &accumulate);
  if (!dy.data || !x.data || !s.data || !ds.data || g->status != ATTN_OK) return g->status;
  column.rank = 1;
  attn_pass_row_dot(g, &column, &dy, &x);
  if (dx.data) attn_pass_scale_rows(g, &dx, accumulate, &s, &dy);
  attn_gradient_add(g, self->a, &dx);
  attn_gradient_add(g, self->b, &ds);
  return g->status;
}

attn_var *attn_op_scale_rows(attn_graph *graph, attn_var *x, attn_var *s) {
  if (!x || !s) return NULL;
  if (x->value.rank != 2 || s->value.rank != 2 || s->value.shape[0] != x->value.shape[0] ||
      s->value.shape[1] != 1)
    return attn_graph_fail(graph, ATTN_INVALID_SHAPE,
                           "scale_rows: %lld factors for rows of rank %d",
                           (long long)attn_tensor_count(&s->value), x->value.rank);
  attn_tensor value = attn_graph_tensor_like(graph, x->value.dtype, &x->value);
  attn_tensor from = attn_as_rows(graph, &x->value), factors = attn_as_rows(graph, &s->value);
  if (!value.data || !from.data || !factors.data) return NULL;
  attn_pass_scale_rows(graph, &value, false, &factors, &from);
  return finish(graph, value, x, s, ATTN_IDENTITY, 1, rows_backward);
}
