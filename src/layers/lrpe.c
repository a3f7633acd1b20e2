/* y = [x (.) cos(n theta), x (.) sin(n theta)], so that y_n(q) . y_m(k) = sum_j q_j k_j cos((n - m)
 * theta_j). Backward: dx = cos (.) dy1 + sin (.) dy2,
 * d theta = sum over tokens of n x (.) (cos (.) dy2 - sin (.) dy1). */
#include "graph/operations.h"
#include "graph/passes.h"
#include "layers/angles.h"
#include "layers/layers.h"

typedef struct lrpe_node {
  attn_node node;
  attn_var *x, *theta;
  attn_tensor cosines, sines; /* [longest, heads * dim] */
  attn_layout layout;
} lrpe_node;

/* A table seen as the rows of `view`. */
static attn_tensor turns(const attn_tensor *table, const attn_tensor *view) {
  return attn_angle_table_view(table, view, true);
}

static attn_status backward_x(attn_graph *g, lrpe_node *self, const attn_tensor *dy) {
  const attn_layout *layout = &self->layout;
  bool accumulate;
  attn_tensor dx = attn_gradient_of(g, self->x, &accumulate);
  if (!dx.data) return g->status;
  int64_t dim = dx.shape[2], step = attn_angle_batch(layout);
  for (int64_t b = 0; b < layout->batch; b += step) {
    if (attn_layout_length(layout, b) == 0) continue;
    attn_tensor to = attn_angle_view(&dx, layout, b, step, 0, dim);
    attn_tensor upstream[2] = {attn_angle_view(dy, layout, b, step, 0, dim),
                               attn_angle_view(dy, layout, b, step, dim, dim)};
    attn_tensor by[2] = {turns(&self->cosines, &to), turns(&self->sines, &to)};
    attn_pass_multiply_sum(g, &to, accumulate, 2, upstream, by);
  }
  return g->status;
}

/* The positions of a table's rows. */
static attn_tensor make_positions(attn_graph *g, const attn_layout *layout) {
  double *numbers = attn_arena_alloc(g->arena, (size_t)layout->length * sizeof *numbers);
  if (!numbers) {
    attn_graph_error(g, ATTN_OUT_OF_MEMORY);
    return (attn_tensor){0};
  }
  for (int64_t t = 0; t < layout->length; ++t) numbers[t] = (double)(layout->position + t);
  return attn_pass_numbers(g, g->wide, layout->length, numbers);
}

/* d theta[h][c] = sum over tokens of x (.) n (cos (.) dy2 - sin (.) dy1), sequence by sequence. */
static attn_status backward_theta(attn_graph *g, lrpe_node *self, const attn_tensor *dy) {
  const attn_layout *layout = &self->layout;
  const attn_tensor *x = &self->x->value;
  int64_t heads = x->shape[1], dim = x->shape[2], width = heads * dim;
  attn_tensor total = attn_graph_tensor(g, g->wide, 1, &width);
  attn_tensor sum = attn_graph_tensor(g, g->wide, 1, &width);
  attn_tensor turned = attn_graph_tensor(g, g->wide, 2, (int64_t[]){layout->length, width});
  attn_tensor negative = attn_graph_tensor_like(g, g->wide, &self->sines);
  attn_tensor positions = make_positions(g, layout);
  if (g->status != ATTN_OK) return g->status;
  ATTN_TRY(attn_tensor_fill(&total, 0));
  attn_add_tensor(g, &negative, &self->sines, -1, false);
  for (int64_t b = 0; b < layout->batch; ++b) {
    int64_t length = attn_layout_length(layout, b);
    if (length == 0) continue;
    attn_tensor from = attn_angle_view(x, layout, b, 1, 0, dim), product = from, rows, n;
    product.data = turned.data;
    product.dtype = turned.dtype;
    product.stride[1] = width, product.stride[2] = dim;
    attn_tensor upstream[2] = {attn_angle_view(dy, layout, b, 1, dim, dim),
                               attn_angle_view(dy, layout, b, 1, 0, dim)};
    attn_tensor by[2] = {turns(&self->cosines, &from), turns(&negative, &from)};
    attn_pass_multiply_sum(g, &product, false, 2, upstream, by);
    attn_pass_multiply_sum(g, &product, false, 1, &product, &from);
    ATTN_TRY(attn_tensor_slice(&turned, 0, 0, length, &rows));
    ATTN_TRY(attn_tensor_slice(&positions, 0, 0, length, &n));
    attn_pass_scale_rows(g, &rows, false, &n, &rows);
    attn_pass_column_dot(g, &sum, &rows, NULL);
    attn_add_tensor(g, &total, &sum, 1, true);
  }
  attn_tensor d_theta;
  ATTN_TRY(
      attn_tensor_reshape(&total, self->theta->value.rank, self->theta->value.shape, &d_theta));
  attn_gradient_add(g, self->theta, &d_theta);
  return g->status;
}

static attn_status lrpe_backward(attn_graph *g, attn_node *node) {
  lrpe_node *self = (lrpe_node *)node;
  if (self->x->needs_gradient) ATTN_TRY(backward_x(g, self, &node->output->gradient));
  if (self->theta->needs_gradient) ATTN_TRY(backward_theta(g, self, &node->output->gradient));
  return g->status;
}

attn_var *attn_layer_lrpe(attn_graph *graph, attn_var *x, attn_var *theta,
                          const attn_layout *layout) {
  if (!x || !theta) return NULL;
  char text[128];
  int64_t heads = x->value.rank == 3 ? x->value.shape[1] : -1;
  int64_t dim = x->value.rank == 3 ? x->value.shape[2] : -1;
  if (heads < 0 || x->value.shape[0] != layout->rows || (dim > 1 && x->value.stride[2] != 1) ||
      attn_tensor_count(&theta->value) != heads * dim)
    return attn_graph_fail(graph, ATTN_INVALID_SHAPE,
                           "lrpe: x is %s, expected [%lld, heads, dim (contiguous)] with %lld "
                           "angles",
                           attn_shape_text(&x->value, text), (long long)layout->rows,
                           (long long)attn_tensor_count(&theta->value));
  int64_t width = heads * dim, step = attn_angle_batch(layout);
  attn_tensor flat, angles = attn_graph_tensor(graph, ATTN_F64, 1, &width), cosines, sines;
  if (!angles.data) return NULL;
  attn_status status = attn_tensor_reshape(&theta->value, 1, &width, &flat);
  if (status == ATTN_OK) status = attn_tensor_copy(&flat, &angles);
  if (status == ATTN_OK) status = attn_angle_tables(graph, &angles, layout, &cosines, &sines);
  if (status != ATTN_OK) return attn_graph_error(graph, status);

  attn_tensor value =
      attn_graph_tensor(graph, x->value.dtype, 3, (int64_t[]){layout->rows, heads, 2 * dim});
  if (!value.data) return NULL;
  for (int64_t b = 0; b < layout->batch; b += step) {
    if (attn_layout_length(layout, b) == 0) continue;
    attn_tensor from = attn_angle_view(&x->value, layout, b, step, 0, dim);
    attn_tensor cosine = turns(&cosines, &from), sine = turns(&sines, &from);
    attn_tensor low = attn_angle_view(&value, layout, b, step, 0, dim);
    attn_tensor high = attn_angle_view(&value, layout, b, step, dim, dim);
    attn_pass_multiply_sum(graph, &low, false, 1, &from, &cosine);
    attn_pass_multiply_sum(graph, &high, false, 1, &from, &sine);
  }
  attn_var *y = attn_graph_result(graph, value, 2, (attn_var *[]){x, theta});
  lrpe_node *node = attn_graph_record(graph, sizeof *node, y, lrpe_backward);
  if (node) {
    node->x = x;
    node->theta = theta;
    node->cosines = cosines;
    node->sines = sines;
    node->layout = *layout;
  }
  return y;
}
