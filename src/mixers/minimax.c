/* Lightning Attention as MiniMax-01 uses it (arXiv 2501.08313, section 2.2; decay after
 * 2405.17381).
 *
 *   q, k, v = silu(x Wq^T), silu(x Wk^T), silu(x Wv^T)
 *   o_t = S_t^T q_t,  S_t = exp(-slope) S_{t-1} + k_t v_t^T      (no scale, no denominator)
 *   y = (sigmoid(x Wg^T) (.) RMSNorm(o)) Wo^T, the norm over all heads together
 *
 * slope of head h in layer l: 2^(-8 (h + 1) / H) (1 - l / (L - 1 + 1e-5) + 1e-5), as published code
 * has it. */
#include "base/status.h"
#include "graph/operations.h"
#include "layers/layers.h"
#include "mixers/mixer.h"

#include <math.h>

enum { Q, K, V, GATE, NORM, OUT };
enum { MATRIX };

static attn_status configure(attn_mixer_options *o) {
  const int64_t usual_dim = 128;
  ATTN_TRY(attn_mixer_check_options(o, "minimax"));
  if (!o->heads && !o->dim && o->hidden % usual_dim == 0) o->dim = usual_dim;
  ATTN_TRY(attn_mixer_configure_heads(o, "minimax"));
  if (o->kv_heads != o->heads)
    return attn_fail(ATTN_INVALID_ARGUMENT, "minimax: %lld heads of queries, %lld of keys",
                     (long long)o->heads, (long long)o->kv_heads);
  if (o->layers < 1 || o->layer < 0 || o->layer >= o->layers)
    return attn_fail(ATTN_INVALID_ARGUMENT, "minimax: layer %lld of %lld", (long long)o->layer,
                     (long long)o->layers);
  return ATTN_OK;
}

static int parameters(const attn_mixer_options *o, attn_parameter_shape *shapes) {
  int64_t keys = o->heads * o->dim, values = o->heads * o->value_dim;
  shapes[Q] = attn_matrix("q_proj.weight", keys, o->hidden);
  shapes[K] = attn_matrix("k_proj.weight", keys, o->hidden);
  shapes[V] = attn_matrix("v_proj.weight", values, o->hidden);
  shapes[GATE] = attn_matrix("g_proj.weight", values, o->hidden);
  shapes[NORM] = attn_vector("o_norm.weight", values, ATTN_INIT_CONSTANT, 1);
  shapes[OUT] = attn_matrix("o_proj.weight", o->hidden, values);
  return OUT + 1;
}

static int state(const attn_mixer_options *o, attn_dtype compute, attn_state_part *parts) {
  parts[MATRIX] = (attn_state_part){.name = "state",
                                    .dtype = compute == ATTN_F64 ? ATTN_F64 : ATTN_F32,
                                    .rank = 3,
                                    .shape = {o->heads, o->dim, o->value_dim}};
  return 1;
}

static double log_decay(const attn_mixer_options *o, int64_t head) {
  double depth = (double)o->layer / ((double)o->layers - 1 + 1e-5);
  return -exp2(-8 * (double)(head + 1) / (double)o->heads) * (1 - depth + 1e-5);
}

static attn_var *project(attn_graph *g, const attn_mixer_call *call, attn_var *x, int which) {
  attn_var *y = attn_op_activate(g, ATTN_SILU, attn_op_linear(g, x, call->parameters[which]));
  return attn_split_heads(g, y, call->options->heads);
}

static attn_var *apply(attn_graph *g, const attn_mixer_call *call, attn_var *x) {
  const attn_mixer_options *o = call->options;
  attn_recurrent_problem problem = ATTN_RECURRENT_PROBLEM_INIT;
  problem.decay = ATTN_DECAY_HEAD;
  attn_var *out = attn_mixer_recurrent(g, call, MATRIX, &problem, project(g, call, x, Q),
                                       project(g, call, x, K), project(g, call, x, V),
                                       attn_mixer_decays(g, o, log_decay), NULL);
  out = attn_layer_rms_norm(g, attn_join_heads(g, &call->layout, out),
                            attn_mixer_parameter(g, call, NORM), o->norm_epsilon);
  attn_var *gate = attn_op_linear(g, x, call->parameters[GATE]);
  return attn_op_linear(g, attn_op_gate(g, ATTN_SIGMOID, gate, out), call->parameters[OUT]);
}

const attn_mixer attn_mixer_minimax = {
    .info = {.name = "minimax",
             .title = "MiniMax-01: Scaling Foundation Models with Lightning Attention",
             .arxiv = "2501.08313",
             .abilities = ATTN_ABILITY_CAUSAL | ATTN_ABILITY_DECODE | ATTN_ABILITY_RAGGED |
                          ATTN_ABILITY_TRAINABLE,
             .summary = "Lightning Attention with activated values, a weighted norm and a "
                        "sigmoid gate"},
    .configure = configure,
    .parameters = parameters,
    .state = state,
    .apply = apply,
};
