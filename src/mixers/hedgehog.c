/* Hedgehog: linear attention whose feature maps are learned to copy softmax (arXiv 2402.04347).
 *
 *   q, k, v = x Wq^T, x Wk^T, x Wv^T (biases and normalised heads, optional), with rotary
 *   positions;  y = W_h q_h + b_h, the same for keys
 *   phi(y) = [softmax(y), softmax(-y)], each number at least 1e-12 (softmax, the default: as
 *            LoLCATs has it, arXiv 2410.10254)
 *          = [exp(y - max y), exp(min y - y)]  (exp)
 *          = softmax([2 y, -2 y])              (joint_softmax: as flash-linear-attention has it)
 *   o_t = S_t^T phi(q_t) / (z_t . phi(q_t) + 1e-12),  S_t = S_{t-1} + phi(k_t) v_t^T,
 *   z_t = z_{t-1} + phi(k_t);  y = o Wo^T
 *   bidirectional, or with a context that k and v are made of: S and z over all keys
 *
 * The maxima are those of a token's own features, so that nothing waits for later tokens. W starts
 * as the identity and b as 0, where phi(q) . phi(k) grows with q . k already. */
#include "base/status.h"
#include "graph/operations.h"
#include "layers/layers.h"
#include "mixers/shared/features.h"
#include "mixers/shared/heads.h"

enum { Q, K, V, Q_MAP, Q_BIAS, K_MAP, K_BIAS, O, OPTIONAL };

static const double least_sum = 1e-12; /* as in the published layers */

static attn_status configure(attn_mixer_options *o) {
  ATTN_TRY(attn_mixer_check_options(o, "hedgehog"));
  ATTN_TRY(attn_mixer_configure_heads(o, "hedgehog"));
  if (o->kv_heads != o->heads)
    return attn_fail(ATTN_INVALID_ARGUMENT, "hedgehog: num_kv_heads must equal num_heads");
  if (!o->feature_map) o->feature_map = ATTN_FEATURES_SOFTMAX;
  if (o->feature_map > ATTN_FEATURES_JOINT)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "hedgehog: feature_map must be softmax, exp or joint_softmax");
  if (!o->feature_dim) o->feature_dim = o->dim;
  ATTN_TRY(attn_features_check(o, "hedgehog"));
  return attn_mixer_configure_rotary(o, "hedgehog");
}

static int parameters(const attn_mixer_options *o, attn_parameter_shape *shapes) {
  int64_t keys = o->heads * o->dim, values = o->heads * o->value_dim;
  int64_t mapped = o->heads * o->feature_dim;
  shapes[Q] = attn_matrix("q_proj.weight", keys, o->hidden);
  shapes[K] = attn_matrix("k_proj.weight", keys, o->hidden);
  shapes[V] = attn_matrix("v_proj.weight", values, o->hidden);
  shapes[Q_MAP] = attn_features_matrix(o, "q_map.weight");
  shapes[Q_BIAS] = attn_vector("q_map.bias", mapped, ATTN_INIT_CONSTANT, 0);
  shapes[K_MAP] = attn_features_matrix(o, "k_map.weight");
  shapes[K_BIAS] = attn_vector("k_map.bias", mapped, ATTN_INIT_CONSTANT, 0);
  shapes[O] = attn_matrix("o_proj.weight", o->hidden, values);
  return OPTIONAL + attn_heads_parameters(o, shapes + OPTIONAL);
}

static int state(const attn_mixer_options *o, attn_dtype compute, attn_state_part *parts) {
  return attn_features_state(o, 2 * o->feature_dim, compute, parts);
}

/* `which`: ATTN_HEADS_Q_NORM or K_NORM. */
static attn_var *position(attn_graph *g, const attn_mixer_call *call, attn_var *const *in,
                          int which) {
  return attn_heads_position(g, call, in[0], OPTIONAL, (attn_heads_optional)which);
}

/* Features of heads y [rows, heads dim] that are normalised and turned. */
static attn_var *mapped(attn_graph *g, const attn_mixer_call *call, attn_var *y, int norm, int map,
                        int bias) {
  const attn_mixer_options *o = call->options;
  y = attn_split_heads(g, y, o->heads);
  if (o->rotary_dim > 0 || o->qk_norm)
    y = attn_split_heads(g, attn_mixer_each(g, call, position, norm, 1, &y), o->heads);
  y = attn_layer_linear_heads(g, y, call->parameters[map]);
  y = attn_op_add_bias(g, attn_join_heads(g, &call->layout, y),
                       attn_mixer_parameter(g, call, bias));
  return attn_features_mirrored(g, o->feature_map, attn_split_heads(g, y, o->heads));
}

static attn_var *apply(attn_graph *g, const attn_mixer_call *call, attn_var *x) {
  attn_recurrent_problem problem = ATTN_RECURRENT_PROBLEM_INIT;
  problem.normalise = true;
  problem.epsilon = least_sum;
  attn_var *q = attn_heads_project(g, call, x, Q, OPTIONAL, ATTN_HEADS_Q_BIAS);
  attn_mixer_call keys = attn_mixer_key_call(call);
  attn_var *of_keys = attn_mixer_key_rows(call, x);
  attn_var *k = attn_heads_project(g, call, of_keys, K, OPTIONAL, ATTN_HEADS_K_BIAS);
  attn_var *v = attn_heads_project(g, call, of_keys, V, OPTIONAL, ATTN_HEADS_V_BIAS);
  q = mapped(g, call, q, ATTN_HEADS_Q_NORM, Q_MAP, Q_BIAS);
  k = mapped(g, &keys, k, ATTN_HEADS_K_NORM, K_MAP, K_BIAS);
  v = attn_split_heads(g, v, call->options->heads);
  attn_var *out = attn_mixer_linear_attention(g, call, ATTN_FEATURES_MATRIX, &problem, q, k, v);
  out = attn_join_heads(g, &call->layout, out);
  return call->heads ? out : attn_heads_project(g, call, out, O, OPTIONAL, ATTN_HEADS_O_BIAS);
}

const attn_mixer attn_mixer_hedgehog = {
    .info = {.name = "hedgehog",
             .title = "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax "
                      "Mimicry",
             .arxiv = "2402.04347",
             .abilities = ATTN_ABILITY_CAUSAL | ATTN_ABILITY_BIDIRECTIONAL | ATTN_ABILITY_CROSS |
                          ATTN_ABILITY_DECODE | ATTN_ABILITY_RAGGED | ATTN_ABILITY_TRAINABLE,
             .summary = "linear attention with feature maps that are learned for each head, "
                        "normalised"},
    .heads = true,
    .configure = configure,
    .parameters = parameters,
    .state = state,
    .apply = apply,
};
