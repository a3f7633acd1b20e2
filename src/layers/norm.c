/* RMSNorm, SRMSNorm and L2 norm share one formula, y = x / sqrt(sum x^2 / divisor + epsilon) (.) w;
 * LayerNorm centres first. Backward recomputes nothing: the factor of each row is kept. */
#include "graph/operations.h"
#include "graph/passes.h"
#include "layers/layers.h"

#include <float.h>

typedef struct norm_node {
  attn_node node;
  attn_var *x, *weight, *bias;
  attn_var *gate; /* y is multiplied by it */
  double divisor, epsilon;
  attn_tensor factor, mean; /* [rows] float64; mean only for LayerNorm */
} norm_node;

static const attn_tensor *values_of(const attn_var *x) {
  return x ? &x->value : NULL;
}

static attn_tensor rows_of(attn_graph *g, attn_var *x) {
  attn_tensor value = attn_graph_value(g, x);
  return attn_as_rows(g, &value);
}

static attn_pass_norm_options options_of(norm_node *self) {
  return (attn_pass_norm_options){.weight = values_of(self->weight),
                                  .bias = values_of(self->bias),
                                  .divisor = self->divisor,
                                  .epsilon = self->epsilon,
                                  .factor = &self->factor,
                                  .mean = self->mean.data ? &self->mean : NULL};
}

static attn_status norm_again(attn_graph *g, attn_node *node, const attn_tensor *value) {
  norm_node *self = (norm_node *)node;
  attn_pass_norm_options options = options_of(self);
  attn_tensor x = rows_of(g, self->x), y = attn_as_rows(g, value), gate = {0};
  if (self->gate) gate = rows_of(g, self->gate);
  if (g->status != ATTN_OK) return g->status;
  if (self->gate)
    attn_pass_norm_gate(g, &options, &y, &x, &gate);
  else
    attn_pass_norm(g, &options, &y, &x);
  return g->status;
}

static attn_status norm_backward(attn_graph *g, attn_node *node) {
  norm_node *self = (norm_node *)node;
  attn_var *const affine[2] = {self->weight, self->bias};
  bool accumulate;
  attn_tensor dx = attn_gradient_rows(g, self->x, &accumulate);
  attn_tensor x = rows_of(g, self->x);
  attn_tensor dy = attn_as_rows(g, &node->output->gradient), sums[2] = {{0}}, copy = {0};
  for (int i = 0; i < 2; ++i)
    if (affine[i] && affine[i]->needs_gradient)
      sums[i] = attn_graph_tensor(g, g->wide, 1, &x.shape[1]);
  /* Of a sum, b's gradient too, in the same pass, where dx is in place. */
  if (dx.data && dx.data == self->x->gradient.data) copy = attn_op_take_addend(g, self->x);
  if (copy.data) copy = attn_as_rows(g, &copy);
  if (g->status != ATTN_OK) return g->status;
  attn_pass_norm_options options = options_of(self);
  attn_pass_norm_backward(g, &options, dx.data ? &dx : NULL, accumulate, copy.data ? &copy : NULL,
                          sums[0].data ? &sums[0] : NULL, sums[1].data ? &sums[1] : NULL, &x, &dy);
  attn_gradient_add(g, self->x, &dx);
  for (int i = 0; i < 2; ++i)
    if (sums[i].data) attn_gradient_add(g, affine[i], &sums[i]);
  return g->status;
}

static attn_status gate_backward(attn_graph *g, attn_node *node) {
  norm_node *self = (norm_node *)node;
  bool add_x, add_gate;
  attn_tensor dx = attn_gradient_rows(g, self->x, &add_x);
  attn_tensor d_gate = attn_gradient_rows(g, self->gate, &add_gate);
  attn_tensor x = rows_of(g, self->x), gate = rows_of(g, self->gate);
  attn_tensor dy = attn_as_rows(g, &node->output->gradient);
  if (g->status != ATTN_OK) return g->status;
  attn_pass_norm_options options = options_of(self);
  attn_pass_norm_gate_backward(g, &options, &dx, add_x, &d_gate, add_gate, &x, &gate, &dy);
  attn_gradient_add(g, self->x, &dx);
  attn_gradient_add(g, self->gate, &d_gate);
  return g->status;
}

/* One norm: what it needs besides x. */
typedef struct norm_call {
  attn_var *weight, *bias;
  double divisor, epsilon;
  bool centre;
  attn_var *added; /* the norm is of x + added, which goes to *sum */
  attn_var **sum;
  attn_var *gate; /* y is multiplied by it, with attn_pass_can_gate_norm */
} norm_call;

static bool check(attn_graph *g, const norm_call *call, int64_t width) {
  attn_var *const affine[2] = {call->weight, call->bias};
  if (!(call->epsilon >= 0) || call->epsilon > DBL_MAX)
    attn_graph_fail(g, ATTN_INVALID_ARGUMENT, "norm: epsilon is %g, expected at least 0",
                    call->epsilon);
  for (int i = 0; i < 2; ++i)
    if (affine[i] && (affine[i]->value.rank != 1 || affine[i]->value.shape[0] != width ||
                      !attn_tensor_is_contiguous(&affine[i]->value)))
      attn_graph_fail(g, ATTN_INVALID_SHAPE,
                      "norm: rows have %lld elements, the %s %lld (it must be contiguous)",
                      (long long)width, i ? "bias" : "weight",
                      (long long)attn_tensor_count(&affine[i]->value));
  return g->status == ATTN_OK;
}

static attn_var *norm(attn_graph *g, attn_var *x, const norm_call *call) {
  if (!x || (call->sum && !call->added)) return NULL;
  attn_tensor value = attn_graph_reuse(g, g->compute, x->value.rank, x->value.shape);
  attn_tensor sum = {0}, sum_rows;
  attn_tensor from = attn_as_rows(g, &x->value), to = attn_as_rows(g, &value);
  if (!from.data || !to.data || !check(g, call, from.shape[1])) return NULL;
  int64_t rows = from.shape[0];
  attn_tensor factor = attn_graph_tensor(g, ATTN_F64, 1, &rows), mean = {0};
  if (call->centre) mean = attn_graph_tensor(g, ATTN_F64, 1, &rows);
  if (call->sum) sum = attn_graph_tensor_like(g, x->value.dtype, &x->value);
  if (g->status != ATTN_OK) return NULL;
  attn_pass_norm_options options = {.weight = values_of(call->weight),
                                    .bias = values_of(call->bias),
                                    .divisor = call->divisor,
                                    .epsilon = call->epsilon,
                                    .factor = &factor,
                                    .mean = call->centre ? &mean : NULL};
  if (call->sum) {
    attn_tensor added = attn_as_rows(g, &call->added->value);
    sum_rows = attn_as_rows(g, &sum);
    if (!added.data) return NULL;
    attn_pass_add_norm(g, &options, &sum_rows, &to, &from, &added);
    x = *call->sum = attn_op_added(g, sum, x, call->added);
  } else if (call->gate) {
    attn_tensor gate = attn_as_rows(g, &call->gate->value);
    attn_pass_norm_gate(g, &options, &to, &from, &gate);
  } else {
    attn_pass_norm(g, &options, &to, &from);
  }
  attn_var *y =
      attn_graph_result(g, value, 4, (attn_var *[]){x, call->weight, call->bias, call->gate});
  norm_node *node =
      attn_graph_record(g, sizeof *node, y, call->gate ? gate_backward : norm_backward);
  if (node) {
    node->x = x;
    node->weight = call->weight;
    node->bias = call->bias;
    node->gate = call->gate;
    node->node.again = norm_again;
    node->divisor = call->divisor;
    node->epsilon = call->epsilon;
    node->factor = factor;
    node->mean = mean;
  }
  attn_graph_restores(x);
  attn_graph_restores(call->gate);
  return y;
}

static double width_of(attn_var *x) {
  return x && x->value.rank ? (double)x->value.shape[x->value.rank - 1] : 1;
}

attn_var *attn_layer_rms_norm(attn_graph *graph, attn_var *x, attn_var *weight, double epsilon) {
  norm_call call = {.weight = weight, .divisor = width_of(x), .epsilon = epsilon};
  return norm(graph, x, &call);
}

attn_var *attn_layer_l2_norm(attn_graph *graph, attn_var *x) {
  const double epsilon = 1e-6; /* as in the published Gated DeltaNet and KDA layers */
  return norm(graph, x, &(norm_call){.divisor = 1, .epsilon = epsilon});
}

attn_var *attn_layer_layer_norm(attn_graph *graph, attn_var *x, attn_var *weight, attn_var *bias,
                                double epsilon) {
  norm_call call = {
      .weight = weight, .bias = bias, .divisor = 1, .epsilon = epsilon, .centre = true};
  return norm(graph, x, &call);
}

attn_var *attn_layer_add_rms_norm(attn_graph *graph, attn_var *x, attn_var *y, attn_var *weight,
                                  double epsilon, attn_var **sum) {
  *sum = NULL;
  if (!x || !y) return NULL;
  if (!attn_same_shape(&x->value, &y->value))
    return attn_graph_fail(graph, ATTN_INVALID_SHAPE, "add_rms_norm: shapes %s and %s differ",
                           attn_shape_text(&x->value, (char[128]){0}),
                           attn_shape_text(&y->value, (char[128]){0}));
  norm_call call = {
      .weight = weight, .divisor = width_of(x), .epsilon = epsilon, .added = y, .sum = sum};
  return norm(graph, x, &call);
}

attn_var *attn_layer_rms_norm_gate(attn_graph *graph, attn_var *x, attn_var *gate, double epsilon) {
  if (!x || !gate) return NULL;
  bool both = attn_same_shape(&x->value, &gate->value) && x->needs_gradient == gate->needs_gradient;
  bool apart = (x->root ? x->root : x) != (gate->root ? gate->root : gate);
  if (!both || !apart || !attn_pass_can_gate_norm(graph, &x->value, &gate->value))
    return attn_op_gate(graph, ATTN_IDENTITY, attn_layer_rms_norm(graph, x, NULL, epsilon), gate);
  norm_call call = {.divisor = width_of(x), .epsilon = epsilon, .gate = gate};
  return norm(graph, x, &call);
}
