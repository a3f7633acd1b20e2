/* Based: linear attention with the second-order Taylor map of exp (arXiv 2402.18668; the mixer of
 * Zoology, 2312.04927).
 *
 *   q, k = x Wq^T, x Wk^T with n = feature_dim channels a head,  v = x Wv^T
 *   phi(x) = [1, x', vec(x' x'^T) / sqrt(2)],  x' = x / n^(1/4), so that
 *   phi(q) . phi(k) = 1 + s + s^2 / 2 for s = q . k / sqrt(n): exp(s) to the second order, and > 0
 *   o_t = S_t^T phi(q_t) / (z_t . phi(q_t) + 1e-12),  S_t = S_{t-1} + phi(k_t) v_t^T,
 *   z_t = z_{t-1} + phi(k_t);  y = o Wo^T
 *
 * The two equal halves of x' x'^T are kept once. There are no positions. */
#include "base/status.h"
#include "graph/operations.h"
#include "layers/layers.h"
#include "mixers/mixer.h"

enum { Q, K, V, O };
enum { MATRIX, NORMALISER };
enum { MOST_FEATURES = 256 }; /* of the engine's keys */

static const double least_sum = 1e-12; /* as in the published layer */

static attn_status configure(attn_mixer_options *o) {
  const int64_t usual_features = 16;
  ATTN_TRY(attn_mixer_check_options(o, "based"));
  ATTN_TRY(attn_mixer_configure_heads(o, "based"));
  if (o->kv_heads != o->heads)
    return attn_fail(ATTN_INVALID_ARGUMENT, "based: num_kv_heads must equal num_heads");
  if (!o->feature_dim) o->feature_dim = usual_features;
  if (attn_taylor_features(o->feature_dim) > MOST_FEATURES)
    return attn_fail(ATTN_INVALID_ARGUMENT, "based: feature_dim %lld makes %lld features, above %d",
                     (long long)o->feature_dim, (long long)attn_taylor_features(o->feature_dim),
                     MOST_FEATURES);
  return ATTN_OK;
}

static int parameters(const attn_mixer_options *o, attn_parameter_shape *shapes) {
  int64_t keys = o->heads * o->feature_dim, values = o->heads * o->value_dim;
  shapes[Q] = attn_matrix("q_proj.weight", keys, o->hidden);
  shapes[K] = attn_matrix("k_proj.weight", keys, o->hidden);
  shapes[V] = attn_matrix("v_proj.weight", values, o->hidden);
  shapes[O] = attn_matrix("o_proj.weight", o->hidden, values);
  return O + 1;
}

static int state(const attn_mixer_options *o, attn_dtype compute, attn_state_part *parts) {
  attn_dtype wide = compute == ATTN_F64 ? ATTN_F64 : ATTN_F32;
  int64_t features = attn_taylor_features(o->feature_dim);
  parts[MATRIX] = (attn_state_part){
      .name = "state", .dtype = wide, .rank = 3, .shape = {o->heads, features, o->value_dim}};
  parts[NORMALISER] = (attn_state_part){
      .name = "normaliser", .dtype = wide, .rank = 2, .shape = {o->heads, features}};
  return 2;
}

static attn_var *project(attn_graph *g, const attn_mixer_call *call, attn_var *x, int which) {
  return attn_split_heads(g, attn_op_linear(g, x, call->parameters[which]), call->options->heads);
}

static attn_var *apply(attn_graph *g, const attn_mixer_call *call, attn_var *x) {
  attn_recurrent_problem problem = ATTN_RECURRENT_PROBLEM_INIT;
  problem.normalise = true;
  problem.epsilon = least_sum;
  attn_var *q = attn_layer_taylor(g, project(g, call, x, Q));
  attn_var *k = attn_layer_taylor(g, project(g, call, x, K));
  attn_var *out =
      attn_mixer_recurrent(g, call, MATRIX, &problem, q, k, project(g, call, x, V), NULL, NULL);
  return attn_op_linear(g, attn_join_heads(g, &call->layout, out), call->parameters[O]);
}

const attn_mixer attn_mixer_based = {
    .info = {.name = "based",
             .title = "Simple Linear Attention Language Models Balance the Recall-Throughput "
                      "Tradeoff",
             .arxiv = "2402.18668",
             .abilities = ATTN_ABILITY_CAUSAL | ATTN_ABILITY_DECODE | ATTN_ABILITY_RAGGED |
                          ATTN_ABILITY_TRAINABLE,
             .summary = "linear attention with exp to the second order of its Taylor series"},
    .configure = configure,
    .parameters = parameters,
    .state = state,
    .apply = apply,
};
