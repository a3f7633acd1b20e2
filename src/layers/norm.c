/* RMSNorm, SRMSNorm and L2 norm share one formula, y = x / sqrt(sum x^2 / divisor + epsilon) (.) w;
 * LayerNorm centres first. Backward recomputes nothing: the factor of each row is kept. */
#include "graph/operations.h"
#include "graph/passes.h"
#include "layers/layers.h"

#include <float.h>

typedef struct norm_node {
  attn_node node;
  attn_var *x, *weight, *bias;
  double divisor;
  attn_tensor factor, mean; /* [rows] float64; mean only for LayerNorm */
} norm_node;

static const attn_tensor *values_of(const attn_var *x) {
  return x ? &x->value : NULL;
}

static attn_status norm_backward(attn_graph *g, attn_node *node) {
  norm_node *self = (norm_node *)node;
  attn_var *const affine[2] = {self->weight, self->bias};
  bool accumulate;
  attn_tensor dx = attn_gradient_rows(g, self->x, &accumulate);
  attn_tensor x = attn_as_rows(g, &self->x->value);
  attn_tensor dy = attn_as_rows(g, &node->output->gradient), sums[2] = {{0}};
  for (int i = 0; i < 2; ++i)
    if (affine[i] && affine[i]->needs_gradient)
      sums[i] = attn_graph_tensor(g, g->wide, 1, &x.shape[1]);
  if (g->status != ATTN_OK) return g->status;
  attn_pass_norm_options options = {.weight = values_of(self->weight),
                                    .divisor = self->divisor,
                                    .factor = &self->factor,
                                    .mean = self->mean.data ? &self->mean : NULL};
  attn_pass_norm_backward(g, &options, dx.data ? &dx : NULL, accumulate,
                          sums[0].data ? &sums[0] : NULL, sums[1].data ? &sums[1] : NULL, &x, &dy);
  attn_gradient_add(g, self->x, &dx);
  for (int i = 0; i < 2; ++i)
    if (sums[i].data) attn_gradient_add(g, affine[i], &sums[i]);
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
  attn_tensor factor = attn_graph_tensor(g, ATTN_F64, 1, &rows), mean = {0};
  if (centre) mean = attn_graph_tensor(g, ATTN_F64, 1, &rows);
  if (g->status != ATTN_OK) return NULL;
  attn_pass_norm_options options = {.weight = values_of(weight),
                                    .bias = values_of(bias),
                                    .divisor = divisor,
                                    .epsilon = epsilon,
                                    .factor = &factor,
                                    .mean = centre ? &mean : NULL};
  attn_pass_norm(g, &options, &to, &from);
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
