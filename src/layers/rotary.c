/* y[j] = x[j] cos(n t_j) - x[j + h] sin(n t_j),  y[j + h] = x[j + h] cos(n t_j) + x[j] sin(n t_j),
 * h = rotary_dim / 2, t_j = base^(-j / h), perhaps stretched. The backward turns the other way. */
#include "graph/operations.h"
#include "graph/passes.h"
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

/* y (+)= x turned by the angles, or, with direction -1, the other way. */
static void turn(attn_graph *g, const attn_tensor *y, bool accumulate, const attn_tensor *x,
                 const attn_tensor *cosines, const attn_tensor *sines, double direction,
                 const attn_layout *layout) {
  int64_t half = cosines->shape[1], step = attn_angle_batch(layout), dim = x->shape[2];
  for (int64_t b = 0; b < layout->batch; b += step) {
    if (attn_layout_length(layout, b) == 0) continue;
    attn_tensor from = attn_angle_view(x, layout, b, step, 0, dim);
    attn_tensor to = attn_angle_view(y, layout, b, step, 0, dim);
    attn_tensor pairs = attn_angle_view(y, layout, b, step, 0, half);
    attn_tensor cosine = attn_angle_table_view(cosines, &pairs, false);
    attn_tensor sine = attn_angle_table_view(sines, &pairs, false);
    attn_pass_rotate(g, &to, accumulate, &from, &cosine, &sine, direction);
  }
}

static attn_status rotary_backward(attn_graph *g, attn_node *node) {
  rotary_node *self = (rotary_node *)node;
  bool accumulate;
  attn_tensor dx = attn_gradient_of(g, self->x, &accumulate);
  if (!dx.data) return g->status;
  turn(g, &dx, accumulate, &node->output->gradient, &self->cosines, &self->sines, -1,
       &self->layout);
  return g->status;
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
  attn_tensor cosines, sines, thetas = attn_pass_numbers(graph, ATTN_F64, half, theta);
  if (!thetas.data) return NULL;
  attn_status status = attn_angle_tables(graph, &thetas, layout, &cosines, &sines);
  if (status != ATTN_OK) return attn_graph_error(graph, status);
  if (rope->magnitude != 0 && rope->magnitude != 1) {
    attn_add_tensor(graph, &cosines, &cosines, rope->magnitude, false);
    attn_add_tensor(graph, &sines, &sines, rope->magnitude, false);
  }
  attn_tensor value = attn_graph_tensor_like(graph, x->value.dtype, &x->value);
  if (!value.data) return NULL;
  turn(graph, &value, false, &x->value, &cosines, &sines, 1, layout);
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
