/* y[j] = x[j] cos(n t_j) - x[j + h] sin(n t_j),  y[j + h] = x[j + h] cos(n t_j) + x[j] sin(n t_j),
 * h = rotary_dim / 2, t_j = base^(-j / h), perhaps stretched. The backward turns the other way. */
#include "graph/operations.h"
#include "layers/angles.h"
#include "layers/layers.h"

#include <float.h>
#include <math.h>

typedef struct rotary_node {
  attn_node node;
  attn_var *x;
  attn_tensor cosines, sines; /* [longest, rotary_dim / 2] */
  attn_layout layout;
} rotary_node;

/* One head of one token: direction +1 turns, -1 turns back. Works on float64 or through float32. */
static void turn(attn_graph *g, attn_span y, bool accumulate, attn_span x, attn_span cosine,
                 attn_span sine, attn_span negative_sine, int64_t half, int64_t dim) {
  size_t x_size = attn_dtype_size(x.dtype), y_size = attn_dtype_size(y.dtype);
  attn_span x1 = {(char *)x.data + (size_t)half * x_size, x.dtype};
  attn_span y1 = {(char *)y.data + (size_t)half * y_size, y.dtype};
  attn_span pair[2] = {x, x1}, low[2] = {cosine, negative_sine}, high[2] = {sine, cosine};
  g->kernels->row_multiply_sum(y, accumulate, pair, low, 2, half);
  g->kernels->row_multiply_sum(y1, accumulate, pair, high, 2, half);
  if (dim > 2 * half) { /* channels that do not turn */
    attn_span rest_x = {(char *)x.data + 2 * (size_t)half * x_size, x.dtype};
    attn_span rest_y = {(char *)y.data + 2 * (size_t)half * y_size, y.dtype};
    g->kernels->row_add(rest_y, 1, rest_x, accumulate ? 1 : 0, accumulate ? rest_y : (attn_span){0},
                        dim - 2 * half);
  }
}

static void turn_all(attn_graph *g, const attn_tensor *y, bool accumulate, const attn_tensor *x,
                     const attn_tensor *cosines, const attn_tensor *sines,
                     const attn_tensor *negative_sines, const attn_layout *layout) {
  int64_t heads = x->shape[1], dim = x->shape[2], half = cosines->shape[1];
  for (int64_t b = 0; b < layout->batch; ++b) {
    int64_t first = attn_layout_first(layout, b), length = attn_layout_length(layout, b);
#pragma omp parallel for num_threads(g->threads)                                                   \
    schedule(static) if (length * heads * dim > ATTN_SERIAL_ELEMENTS)
    for (int64_t t = 0; t < length; ++t)
      for (int64_t h = 0; h < heads; ++h)
        turn(g, attn_row(y, 1, (first + t) * y->stride[0] + h * y->stride[1]), accumulate,
             attn_row(x, 1, (first + t) * x->stride[0] + h * x->stride[1]),
             attn_row(cosines, half, t), attn_row(sines, half, t),
             attn_row(negative_sines, half, t), half, dim);
  }
}

static attn_status rotary_backward(attn_graph *g, attn_node *node) {
  rotary_node *self = (rotary_node *)node;
  bool accumulate;
  attn_tensor dx = attn_gradient_of(g, self->x, &accumulate);
  attn_tensor negative = attn_graph_tensor_like(g, g->wide, &self->sines);
  if (!dx.data || !negative.data) return g->status;
  attn_add_tensor(g, &negative, &self->sines, -1, false);
  turn_all(g, &dx, accumulate, &node->output->gradient, &self->cosines, &negative, &self->sines,
           &self->layout);
  return ATTN_OK;
}

/* The pair, as a real number, that makes `turns` turns in the length trained on. */
static double pair_of(const attn_rope *rope, double turns, int64_t half) {
  return (double)half * log(rope->original_length / (turns * 2 * acos(-1))) / log(rope->base);
}

static double yarn(const attn_rope *rope, double theta, int64_t j, int64_t half) {
  double first = fmax(floor(pair_of(rope, rope->high_factor, half)), 0);
  double last = fmin(ceil(pair_of(rope, rope->low_factor, half)), (double)(2 * half - 1));
  if (first == last) last += 0.001; /* as published: no division by zero */
  double stretch = fmin(fmax(((double)j - first) / (last - first), 0), 1);
  return stretch * theta / rope->factor + (1 - stretch) * theta;
}

static double stretched(const attn_rope *rope, double theta, int64_t j, int64_t half) {
  if (rope->scaling == ATTN_ROPE_YARN) return yarn(rope, theta, j, half);
  if (rope->scaling == ATTN_ROPE_PLAIN) return theta;
  if (rope->scaling == ATTN_ROPE_FACTORS) return theta / rope->factors[j];
  if (rope->scaling == ATTN_ROPE_LINEAR) return theta / rope->factor;
  double turns = rope->original_length * theta / (2 * acos(-1)); /* in the length trained on */
  double kept = (turns - rope->low_factor) / (rope->high_factor - rope->low_factor);
  kept = fmin(fmax(kept, 0), 1);
  return (1 - kept) * theta / rope->factor + kept * theta;
}

double attn_rope_divisor(const attn_rope *rope, int64_t j, int64_t half) {
  double theta = pow(rope->base, -(double)j / (double)half);
  return theta / stretched(rope, theta, j, half);
}

attn_var *attn_layer_rotary(attn_graph *graph, attn_var *x, const attn_layout *layout,
                            int64_t rotary_dim, const attn_rope *rope) {
  if (!x) return NULL;
  char text[128];
  if (x->value.rank != 3 || x->value.shape[0] != layout->rows || x->value.stride[2] != 1 ||
      rotary_dim % 2 || rotary_dim < 2 || rotary_dim > x->value.shape[2])
    return attn_graph_fail(
        graph, ATTN_INVALID_SHAPE,
        "rotary: x is %s, expected [%lld, heads, dim >= %lld (even, contiguous)]",
        attn_shape_text(&x->value, text), (long long)layout->rows, (long long)rotary_dim);
  if (!(rope->base > 0) || rope->base > DBL_MAX)
    return attn_graph_fail(graph, ATTN_INVALID_ARGUMENT, "rotary: the base is %g, expected > 0",
                           rope->base);
  int64_t half = rotary_dim / 2;
  if (rope->scaling == ATTN_ROPE_FACTORS && (!rope->factors || rope->factor_count != half))
    return attn_graph_fail(graph, ATTN_INVALID_SHAPE, "rotary: %lld factors, expected %lld",
                           (long long)rope->factor_count, (long long)half);
  double *theta = attn_arena_alloc(graph->arena, (size_t)half * sizeof *theta);
  if (!theta) return attn_graph_error(graph, ATTN_OUT_OF_MEMORY);
  for (int64_t j = 0; j < half; ++j)
    theta[j] = stretched(rope, pow(rope->base, -(double)j / (double)half), j, half);
  attn_tensor cosines, sines;
  attn_status status =
      attn_angle_tables(graph, theta, half, layout->position, layout->length, &cosines, &sines);
  if (status != ATTN_OK) return attn_graph_error(graph, status);
  if (rope->magnitude != 0 && rope->magnitude != 1) {
    attn_add_tensor(graph, &cosines, &cosines, rope->magnitude, false);
    attn_add_tensor(graph, &sines, &sines, rope->magnitude, false);
  }
  attn_tensor negative = attn_graph_tensor_like(graph, graph->wide, &sines);
  attn_tensor value = attn_graph_tensor_like(graph, x->value.dtype, &x->value);
  if (!negative.data || !value.data) return NULL;
  attn_add_tensor(graph, &negative, &sines, -1, false);
  turn_all(graph, &value, false, &x->value, &cosines, &sines, &negative, layout);
  attn_var *y = attn_graph_result(graph, value, 1, &x);
  rotary_node *node = attn_graph_record(graph, sizeof *node, y, rotary_backward);
  if (node) {
    node->x = x;
    node->cosines = cosines;
    node->sines = sines;
    node->layout = *layout;
  }
  return y;
}
