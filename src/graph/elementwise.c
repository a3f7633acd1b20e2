#include "graph/operations.h"

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

/* What the nodes of this file keep: their inputs and a number or a function. */
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
  return y;
}

/* A parallel loop over the rows of tensors that were brought to rows. */
#define PRAGMA(text) _Pragma(#text)
#define FOR_ROWS(g, rows, width)                                                                   \
  PRAGMA(omp parallel for num_threads(g->threads) schedule(static)                                 \
         if (rows * width > ATTN_SERIAL_ELEMENTS))                                                 \
  for (int64_t r = 0; r < rows; ++r)

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

attn_var *attn_op_add(attn_graph *graph, attn_var *a, attn_var *b) {
  if (!check_shapes(graph, "add", a, b)) return NULL;
  attn_tensor value = attn_graph_tensor_like(graph, a->value.dtype, &a->value);
  if (!value.data) return NULL;
  attn_tensor to = attn_as_rows(graph, &value);
  attn_tensor from_a = attn_as_rows(graph, &a->value), from_b = attn_as_rows(graph, &b->value);
  if (!to.data || !from_a.data || !from_b.data) return NULL;
  int64_t rows = to.shape[0], width = to.shape[1];
  FOR_ROWS(graph, rows, width)
  graph->kernels->row_add(attn_row(&to, to.stride[0], r), 1, attn_row(&from_a, from_a.stride[0], r),
                          1, attn_row(&from_b, from_b.stride[0], r), width);
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
  attn_tensor x = attn_as_rows(g, &self->a->value);
  attn_tensor dy = attn_as_rows(g, &node->output->gradient);
  if (!dx.data || !x.data || !dy.data) return g->status;
  int64_t rows = x.shape[0], width = x.shape[1];
  FOR_ROWS(g, rows, width)
  g->kernels->row_activate_backward(self->f, attn_row(&dx, dx.stride[0], r), accumulate,
                                    attn_row(&x, x.stride[0], r), attn_row(&dy, dy.stride[0], r),
                                    width);
  attn_gradient_add(g, self->a, &dx);
  return g->status;
}

static attn_var *activate_into(attn_graph *g, attn_activation f, attn_var *x, attn_dtype dtype) {
  if (!x) return NULL;
  attn_tensor value = attn_graph_tensor_like(g, dtype, &x->value);
  attn_tensor from = attn_as_rows(g, &x->value), to = attn_as_rows(g, &value);
  if (!to.data || !from.data) return NULL;
  int64_t rows = from.shape[0], width = from.shape[1];
  FOR_ROWS(g, rows, width)
  g->kernels->row_activate(f, attn_row(&to, to.stride[0], r), attn_row(&from, from.stride[0], r),
                           width);
  return finish(g, value, x, NULL, f, 1, activate_backward);
}

attn_var *attn_op_activate(attn_graph *graph, attn_activation f, attn_var *x) {
  return x ? activate_into(graph, f, x, x->value.dtype) : NULL;
}

attn_var *attn_op_activate_wide(attn_graph *graph, attn_activation f, attn_var *x) {
  return activate_into(graph, f, x, graph->wide);
}

/* One operand's gradient: of a when `first`, else of b. One after the other, because a and b may be
 * views whose rows overlap. */
static void gate_gradient(attn_graph *g, elementwise_node *self, bool first, const attn_tensor *a,
                          const attn_tensor *b, const attn_tensor *dy) {
  attn_var *x = first ? self->a : self->b;
  bool accumulate;
  attn_tensor dx = attn_gradient_rows(g, x, &accumulate);
  if (!dx.data) return;
  int64_t rows = a->shape[0], width = a->shape[1];
  FOR_ROWS(g, rows, width) {
    attn_span none = {0}, to = attn_row(&dx, dx.stride[0], r);
    g->kernels->row_gate_backward(self->f, first ? to : none, accumulate, first ? none : to,
                                  accumulate, attn_row(a, a->stride[0], r),
                                  attn_row(b, b->stride[0], r), attn_row(dy, dy->stride[0], r),
                                  width);
  }
  attn_gradient_add(g, x, &dx);
}

/* Both gradients in one pass over memory, for operands in separate memory. */
static void gate_gradients(attn_graph *g, elementwise_node *self, const attn_tensor *a,
                           const attn_tensor *b, const attn_tensor *dy) {
  bool add_a, add_b;
  attn_tensor da = attn_gradient_rows(g, self->a, &add_a);
  attn_tensor db = attn_gradient_rows(g, self->b, &add_b);
  if (!da.data || !db.data) return;
  int64_t rows = a->shape[0], width = a->shape[1];
  FOR_ROWS(g, rows, width)
  g->kernels->row_gate_backward(self->f, attn_row(&da, da.stride[0], r), add_a,
                                attn_row(&db, db.stride[0], r), add_b, attn_row(a, a->stride[0], r),
                                attn_row(b, b->stride[0], r), attn_row(dy, dy->stride[0], r),
                                width);
  attn_gradient_add(g, self->a, &da);
  attn_gradient_add(g, self->b, &db);
}

static attn_var *owner(attn_var *x) {
  return x->root ? x->root : x;
}

static attn_status gate_backward(attn_graph *g, attn_node *node) {
  elementwise_node *self = (elementwise_node *)node;
  attn_tensor a = attn_as_rows(g, &self->a->value), b = attn_as_rows(g, &self->b->value);
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
  int64_t rows = to.shape[0], width = to.shape[1];
  FOR_ROWS(graph, rows, width)
  graph->kernels->row_gate(f, attn_row(&to, to.stride[0], r),
                           attn_row(&from_a, from_a.stride[0], r),
                           attn_row(&from_b, from_b.stride[0], r), width);
  return finish(graph, value, a, b, f, 1, gate_backward);
}

static attn_status bias_backward(attn_graph *g, attn_node *node) {
  elementwise_node *self = (elementwise_node *)node;
  pass_on(g, self->a, 1, &node->output->gradient);
  if (!self->b->needs_gradient) return g->status;
  attn_tensor dy = attn_as_rows(g, &node->output->gradient);
  attn_tensor sum = attn_graph_tensor(g, g->wide, 1, &dy.shape[1]);
  if (!dy.data || !sum.data) return g->status;
  attn_span to = {sum.data, sum.dtype};
  ATTN_TRY(attn_tensor_fill(&sum, 0));
  for (int64_t r = 0; r < dy.shape[0]; ++r) /* one thread: the sum has one order */
    g->kernels->row_add(to, 1, to, 1, attn_row(&dy, dy.stride[0], r), sum.shape[0]);
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
  int64_t rows = to.shape[0];
  attn_span offset = {bias->value.data, bias->value.dtype};
  FOR_ROWS(graph, rows, width)
  graph->kernels->row_add(attn_row(&to, to.stride[0], r), 1, attn_row(&from, from.stride[0], r), 1,
                          offset, width);
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
  int64_t rows = dy.shape[0], width = dy.shape[1];
  attn_span row = {self->row.data, self->row.dtype};
  bool accumulate;
  attn_tensor target = attn_gradient_of(g, self->x, &accumulate);
  if (target.data) {
    attn_tensor dx = attn_as_rows(g, &target);
    if (dx.data != target.data) return attn_fail(ATTN_INTERNAL, "columns: gradient not in rows");
    FOR_ROWS(g, rows, width) {
      attn_span upstream = attn_row(&dy, dy.stride[0], r);
      g->kernels->row_multiply_sum(attn_row(&dx, dx.stride[0], r), accumulate, &upstream, &row, 1,
                                   width);
    }
  }
  attn_tensor ds = attn_gradient_overwrite(g, self->s);
  if (!ds.data) return g->status;
  attn_tensor sums = attn_graph_tensor_like(g, g->wide, &self->row);
  if (!sums.data) return g->status;
  ATTN_TRY(attn_tensor_fill(&sums, 0));
  attn_span to = {sums.data, sums.dtype};
  for (int64_t r = 0; r < rows; ++r) { /* one thread: the sum has one order */
    attn_span upstream = attn_row(&dy, dy.stride[0], r), from = attn_row(&x, x.stride[0], r);
    g->kernels->row_multiply_sum(to, true, &upstream, &from, 1, width);
  }
  int64_t count = ds.shape[0], repeat = width / count;
  attn_tensor ones = attn_graph_tensor(g, g->wide, 1, &repeat);
  if (!ones.data) return g->status;
  ATTN_TRY(attn_tensor_fill(&ones, 1));
  attn_span one = {ones.data, ones.dtype};
  for (int64_t i = 0; i < count; ++i) {
    double total = g->kernels->row_dot(attn_row(&sums, repeat, i), one, repeat);
    attn_tensor element;
    ATTN_TRY(attn_tensor_slice(&ds, 0, i, 1, &element));
    ATTN_TRY(attn_tensor_fill(&element, total));
  }
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
  int64_t rows = from.shape[0];
  attn_span factor = {row.data, row.dtype};
  FOR_ROWS(graph, rows, width) {
    attn_span in = attn_row(&from, from.stride[0], r);
    graph->kernels->row_multiply_sum(attn_row(&to, to.stride[0], r), false, &in, &factor, 1, width);
  }
  attn_var *y = attn_graph_result(graph, value, 2, (attn_var *[]){x, s});
  columns_node *node = attn_graph_record(graph, sizeof *node, y, columns_backward);
  if (node) {
    node->x = x;
    node->s = s;
    node->row = row;
  }
  return y;
}

/* One number a row, whatever the dtype. */
static double number_at(const attn_graph *g, const attn_tensor *s, int64_t r) {
  double one = 1;
  return g->kernels->row_dot(attn_row(s, s->stride[0], r), (attn_span){&one, ATTN_F64}, 1);
}

static attn_status rows_backward(attn_graph *g, attn_node *node) {
  elementwise_node *self = (elementwise_node *)node;
  attn_tensor dy = attn_as_rows(g, &node->output->gradient);
  attn_tensor x = attn_as_rows(g, &self->a->value), s = attn_as_rows(g, &self->b->value);
  attn_tensor ds = attn_graph_tensor(g, ATTN_F64, 2, s.shape);
  bool accumulate;
  attn_tensor dx = attn_gradient_rows(g, self->a, &accumulate);
  if (!dy.data || !x.data || !s.data || !ds.data || g->status != ATTN_OK) return g->status;
  int64_t rows = x.shape[0], width = x.shape[1];
  FOR_ROWS(g, rows, width) {
    attn_span upstream = attn_row(&dy, dy.stride[0], r);
    ((double *)ds.data)[r] = g->kernels->row_dot(upstream, attn_row(&x, x.stride[0], r), width);
    if (!dx.data) continue;
    attn_span to = attn_row(&dx, dx.stride[0], r);
    g->kernels->row_add(to, number_at(g, &s, r), upstream, accumulate ? 1 : 0,
                        accumulate ? to : (attn_span){0}, width);
  }
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
  int64_t rows = from.shape[0], width = from.shape[1];
  FOR_ROWS(graph, rows, width)
  graph->kernels->row_add(attn_row(&value, width, r), number_at(graph, &factors, r),
                          attn_row(&from, from.stride[0], r), 0, (attn_span){0}, width);
  return finish(graph, value, x, s, ATTN_IDENTITY, 1, rows_backward);
}
