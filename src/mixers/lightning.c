/* Lightning Attention as TransNormerLLM uses it (arXiv 2405.17381, 2401.04658, 2307.14995).
 *
 *   [q, k, v, u] = x Wqkvu^T;  q = silu(q), k = silu(k), with LRPE if the layer has it
 *   o_t = S_t^T q_t,  S_t = exp(-slope) S_{t-1} + k_t v_t^T      (no scale, no denominator)
 *   y = (SRMSNorm(o) (.) u) Wo^T, the norm over all heads together
 *
 * slope depends on head and layer: see attn_decay_schedule and docs/mixers.md. */
#include "base/status.h"
#include "graph/operations.h"
#include "layers/layers.h"
#include "mixers/mixer.h"

#include <math.h>

enum { QKVU, OUT, THETA };
enum { MATRIX };

static attn_status configure(attn_mixer_options *o) {
  const int64_t usual_dim = 128;
  ATTN_TRY(attn_mixer_check_options(o, "lightning"));
  if (!o->heads && !o->dim && o->hidden % usual_dim == 0) o->dim = usual_dim;
  ATTN_TRY(attn_mixer_configure_heads(o, "lightning"));
  if (o->kv_heads != o->heads || o->value_dim != o->dim)
    return attn_fail(ATTN_INVALID_ARGUMENT, "lightning: queries, keys and values have the same "
                                            "heads and dim");
  if (o->lrpe && 2 * o->dim > 256)
    return attn_fail(ATTN_INVALID_ARGUMENT, "lightning: head_dim %lld is above 128 with lrpe",
                     (long long)o->dim);
  if (o->layers < 1 || o->layer < 0 || o->layer >= o->layers)
    return attn_fail(ATTN_INVALID_ARGUMENT, "lightning: layer %lld of %lld", (long long)o->layer,
                     (long long)o->layers);
  return ATTN_OK;
}

static int parameters(const attn_mixer_options *o, attn_parameter_shape *shapes) {
  int64_t width = o->heads * o->dim;
  shapes[QKVU] = attn_matrix("qkvu_proj.weight", 4 * width, o->hidden);
  shapes[OUT] = attn_matrix("out_proj.weight", o->hidden, width);
  if (!o->lrpe) return 2;
  shapes[THETA] = attn_matrix("lrpe.theta", o->heads, o->dim);
  shapes[THETA].initial = ATTN_INIT_LRPE;
  shapes[THETA].scale = (double)o->hidden;
  shapes[THETA].decay = shapes[THETA].product = false;
  return 3;
}

static int state(const attn_mixer_options *o, attn_dtype compute, attn_state_part *parts) {
  parts[MATRIX] = (attn_state_part){.name = "state",
                                    .dtype = compute == ATTN_F64 ? ATTN_F64 : ATTN_F32,
                                    .rank = 3,
                                    .shape = {o->heads, o->lrpe ? 2 * o->dim : o->dim, o->dim}};
  return 1;
}

/* ALiBi's slopes: 2^(-8 (h + 1) / H) for a power of two; otherwise those of the power of two below,
 * then every second one of twice that power. */
static double alibi_slope(int64_t head, int64_t heads) {
  int64_t power = 1;
  while (2 * power <= heads) power *= 2;
  if (head < power) return exp2(-8.0 * (double)(head + 1) / (double)power);
  return exp2(-8.0 * (double)(2 * (head - power) + 1) / (double)(2 * power));
}

/* -slope of each head: the logarithm of its decay. */
static double log_decay(const attn_mixer_options *o, int64_t head) {
  double layer = (double)o->layer, layers = (double)o->layers;
  if (o->schedule == ATTN_SCHEDULE_PAPER)
    return -8.0 * (double)head / (double)o->heads * (1 - layer / layers);
  double depth = o->layers > 1 ? layer / (layers - 1) : 0;
  return -alibi_slope(head, o->heads) * (1 - depth + 1e-5);
}

static attn_var *encode(attn_graph *g, const attn_mixer_call *call, attn_var *const *in,
                        int which) {
  (void)which;
  return attn_layer_lrpe(g, in[0], attn_mixer_parameter(g, call, THETA), &call->layout);
}

static attn_var *apply(attn_graph *g, const attn_mixer_call *call, attn_var *x) {
  const attn_mixer_options *o = call->options;
  int64_t width = o->heads * o->dim;
  attn_var *qkvu = attn_op_linear(g, x, call->parameters[QKVU]);
  attn_var *qk = attn_op_activate(g, ATTN_SILU, attn_view_slice(g, qkvu, 1, 0, 2 * width));
  attn_var *v = attn_split_heads(g, attn_view_slice(g, qkvu, 1, 2 * width, width), o->heads);
  attn_var *u = attn_view_slice(g, qkvu, 1, 3 * width, width);
  attn_var *q = attn_split_heads(g, attn_view_slice(g, qk, 1, 0, width), o->heads);
  attn_var *k = attn_split_heads(g, attn_view_slice(g, qk, 1, width, width), o->heads);
  if (o->lrpe) {
    q = attn_split_heads(g, attn_mixer_each(g, call, encode, 0, 1, &q), o->heads);
    k = attn_split_heads(g, attn_mixer_each(g, call, encode, 0, 1, &k), o->heads);
  }
  attn_recurrent_problem problem = ATTN_RECURRENT_PROBLEM_INIT;
  problem.decay = ATTN_DECAY_HEAD;
  attn_var *out = attn_mixer_recurrent(g, call, MATRIX, &problem, q, k, v,
                                       attn_mixer_decays(g, o, log_decay), NULL);
  out = attn_layer_rms_norm_gate(g, attn_join_heads(g, &call->layout, out), u, o->norm_epsilon);
  return attn_op_linear(g, out, call->parameters[OUT]);
}

const attn_mixer attn_mixer_lightning = {
    .info = {.name = "lightning",
             .title = "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning "
                      "Attention",
             .arxiv = "2405.17381",
             .abilities = ATTN_ABILITY_CAUSAL | ATTN_ABILITY_DECODE | ATTN_ABILITY_RAGGED |
                          ATTN_ABILITY_TRAINABLE,
             .summary = "linear attention with a constant decay per head and layer, normalised "
                        "and gated"},
    .configure = configure,
    .parameters = parameters,
    .state = state,
    .apply = apply,
};
