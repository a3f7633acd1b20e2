/* y = [x (.) cos(n theta), x (.) sin(n theta)], so that y_n(q) . y_m(k) = sum_j q_j k_j cos((n - m)
 * theta_j). Backward: dx = cos (.) dy1 + sin (.) dy2,
 * d theta = sum over tokens of n x (.) (cos (.) dy2 - sin (.) dy1). */
#include "graph/operations.h"
#include "layers/angles.h"
#include "layers/layers.h"

typedef struct lrpe_node {
  attn_node node;
  attn_var *x, *theta;
  attn_tensor cosines, sines; /* [longest, heads * dim] */
  attn_layout layout;
} lrpe_node;

static attn_span head_row(const attn_tensor *x, int64_t row, int64_t head, int64_t channel) {
  return attn_row(x, 1, row * x->stride[0] + head * x->stride[1] + channel);
}

static attn_span table_row(const attn_tensor *table, int64_t t, int64_t head, int64_t dim) {
  return attn_row(table, 1, t * table->shape[1] + head * dim);
}

static attn_status backward_x(attn_graph *g, lrpe_node *self, const attn_tensor *dy) {
  bool accumulate;
  attn_tensor dx = attn_gradient_of(g, self->x, &accumulate);
  if (!dx.data) return g->status;
  int64_t heads = dx.shape[1], dim = dx.shape[2];
  for (int64_t b = 0; b < self->layout.batch; ++b) {
    int64_t first = attn_layout_first(&self->layout, b);
    int64_t length = attn_layout_length(&self->layout, b);
#pragma omp parallel for num_threads(g->threads)                                                   \
    schedule(static) if (length * heads * dim > ATTN_SERIAL_ELEMENTS)
    for (int64_t t = 0; t < length; ++t)
      for (int64_t h = 0; h < heads; ++h) {
        attn_span upstream[2] = {head_row(dy, first + t, h, 0), head_row(dy, first + t, h, dim)};
        attn_span turns[2] = {table_row(&self->cosines, t, h, dim),
                              table_row(&self->sines, t, h, dim)};
        g->kernels->row_multiply_sum(head_row(&dx, first + t, h, 0), accumulate, upstream, turns, 2,
                                     dim);
      }
  }
  return ATTN_OK;
}

/* One head a thread at a time: tokens are summed in order. */
static attn_status backward_theta(attn_graph *g, lrpe_node *self, const attn_tensor *dy) {
  const attn_tensor *x = &self->x->value, *theta = &self->theta->value;
  int64_t heads = x->shape[1], dim = x->shape[2];
  attn_tensor d_theta = attn_graph_tensor_like(g, g->wide, theta);
  attn_tensor scratch = attn_graph_tensor(g, g->wide, 3, (int64_t[]){heads, 2, dim});
  if (!d_theta.data || !scratch.data) return g->status;
  ATTN_TRY(attn_tensor_fill(&d_theta, 0));
#pragma omp parallel for num_threads(g->threads)                                                   \
    schedule(static) if (attn_tensor_count(x) > ATTN_SERIAL_ELEMENTS)
  for (int64_t h = 0; h < heads; ++h) {
    attn_span sum = attn_row(&d_theta, dim, h), turned = attn_row(&scratch, dim, 2 * h);
    attn_span product = attn_row(&scratch, dim, 2 * h + 1);
    for (int64_t b = 0; b < self->layout.batch; ++b)
      for (int64_t t = 0; t < attn_layout_length(&self->layout, b); ++t) {
        int64_t row = attn_layout_first(&self->layout, b) + t;
        attn_span dy1 = head_row(dy, row, h, 0), dy2 = head_row(dy, row, h, dim);
        attn_span cosine = table_row(&self->cosines, t, h, dim);
        attn_span sine = table_row(&self->sines, t, h, dim), from = head_row(x, row, h, 0);
        double n = (double)(self->layout.position + t);
        g->kernels->row_multiply_sum(turned, false, &dy2, &cosine, 1, dim);
        g->kernels->row_multiply_sum(product, false, &dy1, &sine, 1, dim);
        g->kernels->row_add(turned, n, turned, -n, product, dim);
        g->kernels->row_multiply_sum(sum, true, &turned, &from, 1, dim);
      }
  }
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
  double *angles = attn_arena_alloc(graph->arena, (size_t)(heads * dim) * sizeof *angles);
  if (!angles) return attn_graph_error(graph, ATTN_OUT_OF_MEMORY);
  attn_tensor flat, doubles;
  attn_status status = attn_tensor_reshape(&theta->value, 1, (int64_t[]){-1}, &flat);
  if (status == ATTN_OK)
    status = attn_tensor_wrap(angles, ATTN_F64, 1, (int64_t[]){heads * dim}, &doubles);
  if (status == ATTN_OK) status = attn_tensor_copy(&flat, &doubles);
  attn_tensor cosines, sines;
  if (status == ATTN_OK)
    status = attn_angle_tables(graph, angles, heads * dim, layout->position, layout->length,
                               &cosines, &sines);
  if (status != ATTN_OK) return attn_graph_error(graph, status);

  attn_tensor value =
      attn_graph_tensor(graph, x->value.dtype, 3, (int64_t[]){layout->rows, heads, 2 * dim});
  if (!value.data) return NULL;
  for (int64_t b = 0; b < layout->batch; ++b) {
    int64_t first = attn_layout_first(layout, b), length = attn_layout_length(layout, b);
#pragma omp parallel for num_threads(graph->threads)                                               \
    schedule(static) if (length * heads * dim > ATTN_SERIAL_ELEMENTS)
    for (int64_t t = 0; t < length; ++t)
      for (int64_t h = 0; h < heads; ++h) {
        attn_span from = head_row(&x->value, first + t, h, 0);
        attn_span cosine = table_row(&cosines, t, h, dim), sine = table_row(&sines, t, h, dim);
        graph->kernels->row_multiply_sum(head_row(&value, first + t, h, 0), false, &from, &cosine,
                                         1, dim);
        graph->kernels->row_multiply_sum(head_row(&value, first + t, h, dim), false, &from, &sine,
                                         1, dim);
      }
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
