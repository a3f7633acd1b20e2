/* RMSNorm, SRMSNorm and L2 norm share one formula, y = x / sqrt(sum x^2 / divisor + epsilon) (.) w;
 * LayerNorm centres first. Backward recomputes nothing: the factor of each row is kept. */
#include "graph/operations.h"
#include "layers/layers.h"

#include <float.h>
#include <string.h>

typedef struct norm_node {
  attn_node node;
  attn_var *x, *weight, *bias;
  double divisor;
  double *factor, *mean; /* a row each; mean only for LayerNorm */
} norm_node;

static attn_span values_of(attn_var *x) {
  return x ? (attn_span){x->value.data, x->value.dtype} : (attn_span){0};
}

/* One row of a backward, with partial gradients of weight and bias to add to. */
static void backward_row(attn_graph *g, norm_node *self, const attn_tensor *dx, bool accumulate,
                         attn_span d_weight, attn_span d_bias, const attn_tensor *x,
                         const attn_tensor *dy, int64_t r) {
  int64_t width = x->shape[1];
  attn_span to = dx->data ? attn_row(dx, dx->stride[0], r) : (attn_span){0};
  attn_span from = attn_row(x, x->stride[0], r), upstream = attn_row(dy, dy->stride[0], r);
  attn_span weight = values_of(self->weight);
  if (self->mean)
    g->kernels->row_layer_norm_backward(to, accumulate, d_weight, d_bias, from, weight, upstream,
                                        width, self->mean[r], self->factor[r]);
  else
    g->kernels->row_rms_norm_backward(to, accumulate, d_weight, from, weight, upstream, width,
                                      self->divisor, self->factor[r]);
}

/* Weight gradients are sums over rows: each of a fixed number of parts is summed by one thread in
 * row order, then the parts in their order, so that the result depends on nothing else. */
enum { PARTS = 16 };

static attn_status norm_backward(attn_graph *g, attn_node *node) {
  norm_node *self = (norm_node *)node;
  attn_var *const affine[2] = {self->weight, self->bias};
  bool accumulate, trains[2];
  for (int i = 0; i < 2; ++i) trains[i] = affine[i] && affine[i]->needs_gradient;
  attn_tensor dx = attn_gradient_rows(g, self->x, &accumulate);
  attn_tensor x = attn_as_rows(g, &self->x->value);
  attn_tensor dy = attn_as_rows(g, &node->output->gradient);
  int64_t rows = x.shape[0], width = x.shape[1];
  attn_tensor parts = {0};
  if (trains[0] || trains[1]) {
    parts = attn_graph_tensor(g, g->wide, 3, (int64_t[]){PARTS, 2, width});
    if (parts.data)
      memset(parts.data, 0, (size_t)(PARTS * 2 * width) * attn_dtype_size(parts.dtype));
  }
  if (g->status != ATTN_OK) return g->status;
#pragma omp parallel for num_threads(g->threads)                                                   \
    schedule(static) if (rows * width > ATTN_SERIAL_ELEMENTS)
  for (int64_t part = 0; part < PARTS; ++part) {
    attn_span w = {0}, b = {0};
    if (trains[0]) w = attn_row(&parts, width, 2 * part);
    if (trains[1]) b = attn_row(&parts, width, 2 * part + 1);
    for (int64_t r = rows * part / PARTS; r < rows * (part + 1) / PARTS; ++r)
      backward_row(g, self, &dx, accumulate, w, b, &x, &dy, r);
  }
  attn_gradient_add(g, self->x, &dx);
  for (int which = 0; which < 2; ++which) {
    if (!trains[which]) continue;
    attn_span to = attn_row(&parts, width, which);
    for (int64_t part = 1; part < PARTS; ++part)
      g->kernels->row_add(to, 1, to, 1, attn_row(&parts, width, 2 * part + which), width);
    attn_tensor sum;
    ATTN_TRY(attn_tensor_wrap(to.data, to.dtype, 1, &width, &sum));
    attn_gradient_add(g, affine[which], &sum);
  }
  return g->status;
}

static attn_var *norm(attn_graph *g, attn_var *x, attn_var *weight, attn_var *bias, double divisor,
                      double epsilon, bool centre) {
  if (!x) return NULL;
  if (!(epsilon >= 0) || epsilon > DBL_MAX)
    return attn_graph_fail(g, ATTN_INVALID_ARGUMENT, "norm: epsilon is %g, expected at least 0",
                           epsilon);
  attn_tensor value = attn_graph_tensor_like(g, g->compute, &x->value);
  attn_tensor from = attn_as_rows(g, &x->value), to = attn_as_rows(g, &value);
  if (!from.data || !to.data) return NULL;
  int64_t rows = from.shape[0], width = from.shape[1];
  attn_var *const affine[2] = {weight, bias};
  for (int i = 0; i < 2; ++i)
    if (affine[i] && (affine[i]->value.rank != 1 || affine[i]->value.shape[0] != width ||
                      !attn_tensor_is_contiguous(&affine[i]->value)))
      return attn_graph_fail(g, ATTN_INVALID_SHAPE,
                             "norm: rows have %lld elements, the %s %lld (it must be contiguous)",
                             (long long)width, i ? "bias" : "weight",
                             (long long)attn_tensor_count(&affine[i]->value));
  double *factor = attn_arena_alloc(g->arena, (size_t)rows * sizeof *factor);
  double *mean = centre ? attn_arena_alloc(g->arena, (size_t)rows * sizeof *mean) : NULL;
  if (!factor || (centre && !mean)) return attn_graph_error(g, ATTN_OUT_OF_MEMORY);
  attn_span w = values_of(weight), b = values_of(bias);
#pragma omp parallel for num_threads(g->threads)                                                   \
    schedule(static) if (rows * width > ATTN_SERIAL_ELEMENTS)
  for (int64_t r = 0; r < rows; ++r) {
    attn_span y = attn_row(&to, to.stride[0], r), u = attn_row(&from, from.stride[0], r);
    factor[r] = centre ? g->kernels->row_layer_norm(y, u, w, b, width, epsilon, &mean[r])
                       : g->kernels->row_rms_norm(y, u, w, width, divisor, epsilon);
  }
  attn_var *y = attn_graph_result(g, value, 3, (attn_var *[]){x, weight, bias});
  norm_node *node = attn_graph_record(g, sizeof *node, y, norm_backward);
  if (node) {
    node->x = x;
    node->weight = weight;
    node->bias = bias;
    node->divisor = divisor;
    node->factor = factor;
    node->mean = mean;
  }
  return y;
}

static double width_of(attn_var *x) {
  return x && x->value.rank ? (double)x->value.shape[x->value.rank - 1] : 1;
}

attn_var *attn_layer_rms_norm(attn_graph *graph, attn_var *x, attn_var *weight, double epsilon) {
  return norm(graph, x, weight, NULL, width_of(x), epsilon, false);
}

attn_var *attn_layer_l2_norm(attn_graph *graph, attn_var *x) {
  const double epsilon = 1e-6; /* as in the published Gated DeltaNet and KDA layers */
  return norm(graph, x, NULL, NULL, 1, epsilon, false);
}

attn_var *attn_layer_layer_norm(attn_graph *graph, attn_var *x, attn_var *weight, attn_var *bias,
                                double epsilon) {
  return norm(graph, x, weight, bias, 1, epsilon, true);
}
