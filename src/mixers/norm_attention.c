/* NormAttention of TransNormer (arXiv 2210.10340, section 4.1): linear attention whose output is
 * normalised in place of its weights, since a sum of weights in a denominator makes gradients
 * unbounded.
 *
 *   q, k = phi(x Wq^T + bq), phi(x Wk^T + bk), with rotary positions;  v = x Wv^T + bv
 *   o_t = S_t^T q_t,  S_t = S_{t-1} + k_t v_t^T      (no scale, no denominator, no decay)
 *   y = SRMSNorm(o) Wo^T + bo, the norm over all heads together
 *   bidirectional, or with a context that k and v are made of: o_t = S^T q_t, S over all keys
 *
 * phi(x) = 1 + elu(x) (T2, the default), or elu(x) (T1). With the output's gate (TransNormer v2):
 *   v = silu(x Wv^T + bv),  y = (silu(x Wu^T + bu) (.) SRMSNorm(o)) Wo^T + bo
 *
 * Its companion in the first half of the layers is diag_attention. */
#include "base/status.h"
#include "graph/operations.h"
#include "layers/layers.h"
#include "mixers/mixer.h"

enum { Q, K, V, O, Q_BIAS, K_BIAS, V_BIAS, O_BIAS, U, U_BIAS }; /* a gate's are the last */
enum { MATRIX };

static attn_status configure(attn_mixer_options *o) {
  ATTN_TRY(attn_mixer_check_options(o, "norm_attention"));
  ATTN_TRY(attn_mixer_configure_heads(o, "norm_attention"));
  if (o->kv_heads != o->heads)
    return attn_fail(ATTN_INVALID_ARGUMENT, "norm_attention: num_kv_heads must equal num_heads");
  if (!o->feature_map) o->feature_map = ATTN_FEATURES_ELU_PLUS_ONE;
  if (o->feature_map != ATTN_FEATURES_ELU && o->feature_map != ATTN_FEATURES_ELU_PLUS_ONE)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "norm_attention: feature_map must be elu_plus_one or elu");
  return attn_mixer_configure_rotary(o, "norm_attention");
}

static int parameters(const attn_mixer_options *o, attn_parameter_shape *shapes) {
  int64_t keys = o->heads * o->dim, values = o->heads * o->value_dim;
  shapes[Q] = attn_matrix("q_proj.weight", keys, o->hidden);
  shapes[K] = attn_matrix("k_proj.weight", keys, o->hidden);
  shapes[V] = attn_matrix("v_proj.weight", values, o->hidden);
  shapes[O] = attn_matrix("o_proj.weight", o->hidden, values);
  shapes[Q_BIAS] = attn_vector("q_proj.bias", keys, ATTN_INIT_CONSTANT, 0);
  shapes[K_BIAS] = attn_vector("k_proj.bias", keys, ATTN_INIT_CONSTANT, 0);
  shapes[V_BIAS] = attn_vector("v_proj.bias", values, ATTN_INIT_CONSTANT, 0);
  shapes[O_BIAS] = attn_vector("o_proj.bias", o->hidden, ATTN_INIT_CONSTANT, 0);
  if (!o->output_gate) return U;
  shapes[U] = attn_matrix("u_proj.weight", values, o->hidden);
  shapes[U_BIAS] = attn_vector("u_proj.bias", values, ATTN_INIT_CONSTANT, 0);
  return U_BIAS + 1;
}

static int state(const attn_mixer_options *o, attn_dtype compute, attn_state_part *parts) {
  parts[MATRIX] = (attn_state_part){.name = "state",
                                    .dtype = compute == ATTN_F64 ? ATTN_F64 : ATTN_F32,
                                    .rank = 3,
                                    .shape = {o->heads, o->dim, o->value_dim}};
  return 1;
}

static attn_var *project(attn_graph *g, const attn_mixer_call *call, attn_var *x, int weight,
                         int bias) {
  attn_var *y = attn_op_linear(g, x, call->parameters[weight]);
  return attn_op_add_bias(g, y, attn_mixer_parameter(g, call, bias));
}

static attn_var *turn(attn_graph *g, const attn_mixer_call *call, attn_var *const *in, int which) {
  (void)which;
  return attn_layer_rotary(g, in[0], &call->layout, call->options->rotary_dim,
                           &call->options->rope);
}

static attn_var *features(attn_graph *g, const attn_mixer_call *call, attn_var *x, int weight,
                          int bias) {
  const attn_mixer_options *o = call->options;
  bool plus_one = o->feature_map == ATTN_FEATURES_ELU_PLUS_ONE;
  attn_var *phi = attn_op_activate(g, plus_one ? ATTN_ELU_PLUS_ONE : ATTN_ELU,
                                   project(g, call, x, weight, bias));
  phi = attn_split_heads(g, phi, o->heads);
  if (o->rotary_dim <= 0) return phi;
  return attn_split_heads(g, attn_mixer_each(g, call, turn, 0, 1, &phi), o->heads);
}

static attn_var *apply(attn_graph *g, const attn_mixer_call *call, attn_var *x) {
  const attn_mixer_options *o = call->options;
  attn_recurrent_problem problem = ATTN_RECURRENT_PROBLEM_INIT;
  attn_mixer_call keys = attn_mixer_key_call(call);
  attn_var *of_keys = attn_mixer_key_rows(call, x);
  attn_var *q = features(g, call, x, Q, Q_BIAS), *k = features(g, &keys, of_keys, K, K_BIAS);
  attn_var *v = project(g, call, of_keys, V, V_BIAS);
  if (o->output_gate) v = attn_op_activate(g, ATTN_SILU, v);
  v = attn_split_heads(g, v, o->heads);
  attn_var *out = attn_mixer_linear_attention(g, call, MATRIX, &problem, q, k, v);
  out = attn_join_heads(g, &call->layout, out);
  if (o->output_gate) {
    attn_var *u = attn_op_activate(g, ATTN_SILU, project(g, call, x, U, U_BIAS));
    out = attn_layer_rms_norm_gate(g, out, u, o->norm_epsilon);
  } else {
    out = attn_layer_rms_norm(g, out, NULL, o->norm_epsilon);
  }
  return project(g, call, out, O, O_BIAS);
}

const attn_mixer attn_mixer_norm_attention = {
    .info = {.name = "norm_attention",
             .title = "The Devil in Linear Transformer",
             .arxiv = "2210.10340",
             .abilities = ATTN_ABILITY_CAUSAL | ATTN_ABILITY_BIDIRECTIONAL | ATTN_ABILITY_CROSS |
                          ATTN_ABILITY_DECODE | ATTN_ABILITY_RAGGED | ATTN_ABILITY_TRAINABLE,
             .summary = "linear attention normalised at its output: TransNormer's later layers"},
    .configure = configure,
    .parameters = parameters,
    .state = state,
    .apply = apply,
};
