/* Gated DeltaNet (arXiv 2412.06464).
 *
 *   q, k, v, beta as in DeltaNet;  g_t = -exp(A_log) softplus(x Wa^T + dt_bias), a number a head
 *   S~_t = exp(g_t) S_{t-1},  S_t = S~_t + k_t beta_t (v_t - S~_t^T k_t)^T
 *   o_t = S_t^T q_t / sqrt(dim),  y = (RMSNorm_head(o) (.) silu(x Wg^T)) Wo^T */
#include "base/status.h"
#include "graph/operations.h"
#include "mixers/shared/delta.h"

#include <math.h>

enum { A = ATTN_DELTA_PARAMETERS, A_LOG, DT_BIAS, G };

/* Keys take three quarters of the width and values twice that, as in the published layer (width
 * 2048: 6 heads of 256), in heads of at most 128, so that values stay within 256 a head. */
static attn_status configure(attn_mixer_options *o) {
  const int64_t most_dim = 128;
  ATTN_TRY(attn_mixer_check_options(o, "gated_delta_net"));
  if (!o->heads && !o->dim) {
    int64_t keys = o->hidden * 3 / 4;
    o->heads = keys > most_dim ? (keys + most_dim - 1) / most_dim : 1;
    o->dim = keys / o->heads;
  }
  if (!o->value_dim && o->heads > 0) o->value_dim = 2 * (o->dim ? o->dim : o->hidden / o->heads);
  return attn_delta_configure(o, "gated_delta_net");
}

static int parameters(const attn_mixer_options *o, attn_parameter_shape *shapes) {
  attn_delta_parameters(o, shapes);
  shapes[A] = attn_matrix("a_proj.weight", o->heads, o->hidden);
  shapes[A_LOG] = attn_vector("A_log", o->heads, ATTN_INIT_LOG_A, 0);
  shapes[DT_BIAS] = attn_vector("dt_bias", o->heads, ATTN_INIT_DT_BIAS, 0);
  shapes[G] = attn_matrix("g_proj.weight", o->heads * o->value_dim, o->hidden);
  return G + 1;
}

static attn_var *apply(attn_graph *g, const attn_mixer_call *call, attn_var *x) {
  attn_parameter **p = call->parameters;
  attn_delta_inputs in = attn_delta_project(g, call, x);
  attn_var *decay =
      attn_delta_log_decay(g, attn_op_linear_wide(g, x, p[A]), attn_mixer_parameter(g, call, A_LOG),
                           attn_mixer_parameter(g, call, DT_BIAS), 1);
  attn_recurrent_problem problem = ATTN_RECURRENT_PROBLEM_INIT;
  problem.update = ATTN_UPDATE_DELTA;
  problem.decay = ATTN_DECAY_TOKEN;
  problem.scale = 1 / sqrt((double)call->options->dim);
  attn_var *out =
      attn_mixer_recurrent(g, call, ATTN_DELTA_MATRIX, &problem, in.q, in.k, in.v, decay, in.beta);
  attn_var *gate = attn_op_linear(g, x, p[G]);
  out = attn_op_gate(g, ATTN_SILU, gate, attn_delta_normalise(g, call, out));
  return attn_op_linear(g, out, p[ATTN_DELTA_OUT]);
}

const attn_mixer attn_mixer_gated_delta_net = {
    .info = {.name = "gated_delta_net",
             .title = "Gated Delta Networks: Improving Mamba2 with Delta Rule",
             .arxiv = "2412.06464",
             .abilities = ATTN_ABILITY_CAUSAL | ATTN_ABILITY_DECODE | ATTN_ABILITY_RAGGED |
                          ATTN_ABILITY_TRAINABLE,
             .summary = "DeltaNet with a learned decay per head and token"},
    .configure = configure,
    .parameters = parameters,
    .state = attn_delta_state,
    .apply = apply,
};
