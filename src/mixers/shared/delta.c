#include "mixers/shared/delta.h"
#include "base/status.h"
#include "graph/operations.h"
#include "layers/layers.h"
#include "mixers/shared/convolution.h"

/* In the options of these mixers `heads` are value heads and `kv_heads` the heads of q and k: each
 * of those serves heads / kv_heads value heads. */

attn_status attn_delta_configure(attn_mixer_options *o, const char *mixer) {
  ATTN_TRY(attn_mixer_configure_heads(o, mixer));
  attn_convolution_configure(o);
  return ATTN_OK;
}

/* Starts as a depthwise convolution of `taps` inputs usually does. */
static attn_parameter_shape convolution(const char *name, int64_t channels, int64_t taps) {
  return attn_convolution_taps(name, channels, taps, ATTN_INIT_UNIFORM, 1.0 / (double)taps);
}

int attn_delta_parameters(const attn_mixer_options *o, attn_parameter_shape *shapes) {
  int64_t keys = o->kv_heads * o->dim, values = o->heads * o->value_dim, taps = o->convolution;
  shapes[ATTN_DELTA_Q] = attn_matrix("q_proj.weight", keys, o->hidden);
  shapes[ATTN_DELTA_K] = attn_matrix("k_proj.weight", keys, o->hidden);
  shapes[ATTN_DELTA_V] = attn_matrix("v_proj.weight", values, o->hidden);
  shapes[ATTN_DELTA_BETA] = attn_matrix("b_proj.weight", o->heads, o->hidden);
  shapes[ATTN_DELTA_NORM] = attn_vector("o_norm.weight", o->value_dim, ATTN_INIT_CONSTANT, 1);
  shapes[ATTN_DELTA_OUT] = attn_matrix("o_proj.weight", o->hidden, values);
  shapes[ATTN_DELTA_Q_CONV] = convolution("q_conv1d.weight", keys, taps);
  shapes[ATTN_DELTA_K_CONV] = convolution("k_conv1d.weight", keys, taps);
  shapes[ATTN_DELTA_V_CONV] = convolution("v_conv1d.weight", values, taps);
  return ATTN_DELTA_PARAMETERS;
}

int attn_delta_state(const attn_mixer_options *o, attn_dtype compute, attn_state_part *parts) {
  int64_t keys = o->kv_heads * o->dim, values = o->heads * o->value_dim, taps = o->convolution;
  parts[ATTN_DELTA_MATRIX] = (attn_state_part){.name = "state",
                                               .dtype = compute == ATTN_F64 ? ATTN_F64 : ATTN_F32,
                                               .rank = 3,
                                               .shape = {o->heads, o->dim, o->value_dim}};
  parts[ATTN_DELTA_Q_TAIL] = attn_convolution_tail("q_tail", compute, taps, keys);
  parts[ATTN_DELTA_K_TAIL] = attn_convolution_tail("k_tail", compute, taps, keys);
  parts[ATTN_DELTA_V_TAIL] = attn_convolution_tail("v_tail", compute, taps, values);
  return 4;
}

/* The convolution of q, k or v, whose last inputs the state keeps. */
static attn_var *convolve(attn_graph *g, const attn_mixer_call *call, attn_var *const *in,
                          int which) {
  return attn_convolution_apply(g, call, in[0], ATTN_DELTA_Q_CONV + which,
                                ATTN_DELTA_Q_TAIL + which);
}

/* silu(conv(x W^T)) split into heads. */
static attn_var *project(attn_graph *g, const attn_mixer_call *call, attn_var *x, int which,
                         int64_t heads) {
  attn_var *y = attn_op_linear(g, x, call->parameters[ATTN_DELTA_Q + which]);
  y = attn_mixer_each(g, call, convolve, which, 1, &y);
  return attn_split_heads(g, attn_op_activate(g, ATTN_SILU, y), heads);
}

attn_delta_inputs attn_delta_heads(attn_graph *graph, const attn_mixer_call *call, attn_var *x) {
  const attn_mixer_options *o = call->options;
  attn_var *q = project(graph, call, x, 0, o->kv_heads);
  attn_var *k = project(graph, call, x, 1, o->kv_heads);
  attn_var *v = project(graph, call, x, 2, o->heads);
  return (attn_delta_inputs){
      .q = attn_layer_l2_norm(graph, q), .k = attn_layer_l2_norm(graph, k), .v = v};
}

attn_delta_inputs attn_delta_project(attn_graph *graph, const attn_mixer_call *call, attn_var *x) {
  attn_delta_inputs in = attn_delta_heads(graph, call, x);
  attn_var *beta = attn_op_linear_wide(graph, x, call->parameters[ATTN_DELTA_BETA]);
  in.beta = attn_op_activate(graph, ATTN_SIGMOID, beta);
  return in;
}

attn_var *attn_delta_normalise(attn_graph *graph, const attn_mixer_call *call, attn_var *o) {
  attn_var *weight = attn_mixer_parameter(graph, call, ATTN_DELTA_NORM);
  o = attn_layer_rms_norm(graph, o, weight, call->options->norm_epsilon);
  return attn_join_heads(graph, &call->layout, o);
}

attn_var *attn_delta_log_decay(attn_graph *graph, attn_var *f, attn_var *a_log, attn_var *dt_bias,
                               int64_t repeat) {
  attn_var *rate = attn_op_scale(graph, attn_op_activate_wide(graph, ATTN_EXP, a_log), -1);
  attn_var *dt = attn_op_activate(graph, ATTN_SOFTPLUS, attn_op_add_bias(graph, f, dt_bias));
  return attn_op_scale_columns(graph, dt, rate, repeat);
}
