/* Kimi Delta Attention (arXiv 2510.26692).
 *
 *   q, k, v, beta as in DeltaNet
 *   g_t = -exp(A_log) softplus(x Wfa^T Wfb^T + dt_bias) per key channel, A_log per head
 *   S~_t = Diag(exp(g_t)) S_{t-1},  S_t = S~_t + k_t beta_t (v_t - S~_t^T k_t)^T
 *   o_t = S_t^T q_t / sqrt(dim),  y = (RMSNorm_head(o) (.) sigmoid(x Wga^T Wgb^T + b)) Wo^T
 *
 * b is in the published layer, not in the published model. */
#include "base/status.h"
#include "graph/operations.h"
#include "mixers/shared/delta.h"

#include <math.h>

enum { F_DOWN = ATTN_DELTA_PARAMETERS, F_UP, A_LOG, DT_BIAS, G_DOWN, G_UP, G_BIAS };

static attn_status configure(attn_mixer_options *o) {
  const int64_t usual_dim = 128;
  const double usual_epsilon = 1e-5;
  ATTN_TRY(attn_mixer_check_options(o, "kda"));
  if (!o->heads && !o->dim && o->hidden % usual_dim == 0) o->dim = usual_dim;
  if (o->norm_epsilon == 0) o->norm_epsilon = usual_epsilon;
  ATTN_TRY(attn_delta_configure(o, "kda"));
  if (!o->gate_rank) o->gate_rank = o->value_dim;
  return ATTN_OK;
}

static int parameters(const attn_mixer_options *o, attn_parameter_shape *shapes) {
  int64_t keys = o->heads * o->dim, values = o->heads * o->value_dim;
  attn_delta_parameters(o, shapes);
  shapes[F_DOWN] = attn_matrix("f_a_proj.weight", o->gate_rank, o->hidden);
  shapes[F_UP] = attn_matrix("f_b_proj.weight", keys, o->gate_rank);
  shapes[A_LOG] = attn_vector("A_log", o->heads, ATTN_INIT_LOG_A, 0);
  shapes[DT_BIAS] = attn_vector("dt_bias", keys, ATTN_INIT_DT_BIAS, 0);
  shapes[G_DOWN] = attn_matrix("g_a_proj.weight", o->gate_rank, o->hidden);
  shapes[G_UP] = attn_matrix("g_b_proj.weight", values, o->gate_rank);
  if (o->plain_gate) return G_BIAS;
  shapes[G_BIAS] = attn_vector("g_b_proj.bias", values, ATTN_INIT_CONSTANT, 0);
  return G_BIAS + 1;
}

static attn_var *apply(attn_graph *g, const attn_mixer_call *call, attn_var *x) {
  const attn_mixer_options *o = call->options;
  attn_parameter **p = call->parameters;
  attn_delta_inputs in = attn_delta_project(g, call, x);
  attn_var *f = attn_op_linear_wide(g, attn_op_linear(g, x, p[F_DOWN]), p[F_UP]);
  attn_var *decay = attn_delta_log_decay(g, f, attn_mixer_parameter(g, call, A_LOG),
                                         attn_mixer_parameter(g, call, DT_BIAS), o->dim);
  attn_recurrent_problem problem = ATTN_RECURRENT_PROBLEM_INIT;
  problem.update = ATTN_UPDATE_DELTA;
  problem.decay = ATTN_DECAY_CHANNEL;
  problem.scale = 1 / sqrt((double)o->dim);
  attn_var *out = attn_mixer_recurrent(g, call, ATTN_DELTA_MATRIX, &problem, in.q, in.k, in.v,
                                       attn_split_heads(g, decay, o->heads), in.beta);
  attn_var *gate = attn_op_linear(g, attn_op_linear(g, x, p[G_DOWN]), p[G_UP]);
  if (!o->plain_gate) gate = attn_op_add_bias(g, gate, attn_mixer_parameter(g, call, G_BIAS));
  out = attn_op_gate(g, ATTN_SIGMOID, gate, attn_delta_normalise(g, call, out));
  return attn_op_linear(g, out, p[ATTN_DELTA_OUT]);
}

const attn_mixer attn_mixer_kda = {
    .info = {.name = "kda",
             .title = "Kimi Linear: An Expressive, Efficient Attention Architecture",
             .arxiv = "2510.26692",
             .abilities = ATTN_ABILITY_CAUSAL | ATTN_ABILITY_DECODE | ATTN_ABILITY_RAGGED |
                          ATTN_ABILITY_TRAINABLE,
             .summary = "the delta rule with a learned decay per key channel and token"},
    .configure = configure,
    .parameters = parameters,
    .state = attn_delta_state,
    .apply = apply,
};
