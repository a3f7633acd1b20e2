/* LAWCAT: gated linear attention over features of convolved queries and keys, normalised
 * (arXiv 2509.18467).
 *
 *   q = conv(x Wq^T),  k = conv(repeat(x Wk^T)),  v = repeat(x Wv^T): no positions, no activation
 *   phi(y) = [softmax(W_h y), softmax(-W_h y)], at least 1e-12, W_h the same for q and k
 *   alpha = exp(log sigmoid(x W1^T W2^T + b) / 16), repeated: one for each feature of a key head
 *   S_t = Diag(alpha_t) S_{t-1} + phi(k_t) [v_t, 1]^T,  r_t = S_t^T phi(q_t) / sqrt(features)
 *   o_t = r_t[1 .. dv] / (r_t[dv + 1] + 1e-10),  y = o Wo^T
 *
 * `repeat` gives every query head its own copy of the key head that it reads, which the
 * convolution then makes different. The last column of S is the engine's normaliser. A layer
 * starts close to Hedgehog: taps that pass a token on, W the identity, decays of 0.96. */
#include "base/status.h"
#include "graph/operations.h"
#include "layers/layers.h"
#include "mixers/shared/convolution.h"
#include "mixers/shared/features.h"

#include <math.h>

enum { Q, K, V, Q_CONV, K_CONV, MAP, GATE_DOWN, GATE_UP, GATE_BIAS, O };
enum { Q_TAIL = ATTN_FEATURES_PARTS, K_TAIL };

/* As in the published layer. */
static const double gate_temperature = 16, gate_deviation = 0.006, other_taps = 0.001;
static const double least_sum = 1e-10;

static attn_status configure(attn_mixer_options *o) {
  const int64_t usual_rank = 16;
  ATTN_TRY(attn_mixer_check_options(o, "lawcat"));
  ATTN_TRY(attn_mixer_configure_heads(o, "lawcat"));
  if (!o->feature_map) o->feature_map = ATTN_FEATURES_SOFTMAX;
  if (o->feature_map != ATTN_FEATURES_SOFTMAX)
    return attn_fail(ATTN_INVALID_ARGUMENT, "lawcat: feature_map must be softmax");
  if (!o->feature_dim) o->feature_dim = o->dim > 1 ? o->dim / 2 : 1;
  if (!o->gate_rank) o->gate_rank = usual_rank;
  attn_convolution_configure(o);
  return attn_features_check(o, "lawcat");
}

static int64_t features_of(const attn_mixer_options *o) {
  return 2 * o->feature_dim;
}

/* Taps of the convolution of all query heads. */
static attn_parameter_shape taps(const attn_mixer_options *o, const char *name) {
  attn_parameter_shape shape = attn_convolution_taps(name, o->heads * o->dim, o->convolution,
                                                     ATTN_INIT_LAST_TAP, other_taps);
  shape.decay = false; /* towards where they start it would have to be */
  return shape;
}

static attn_parameter_shape gate(const char *name, int64_t outputs, int64_t inputs) {
  attn_parameter_shape shape = attn_matrix(name, outputs, inputs);
  shape.scale = gate_deviation;
  return shape;
}

static int parameters(const attn_mixer_options *o, attn_parameter_shape *shapes) {
  int64_t gates = o->kv_heads * features_of(o);
  shapes[Q] = attn_matrix("q_proj.weight", o->heads * o->dim, o->hidden);
  shapes[K] = attn_matrix("k_proj.weight", o->kv_heads * o->dim, o->hidden);
  shapes[V] = attn_matrix("v_proj.weight", o->kv_heads * o->value_dim, o->hidden);
  shapes[Q_CONV] = taps(o, "q_conv1d.weight");
  shapes[K_CONV] = taps(o, "k_conv1d.weight");
  shapes[MAP] = attn_features_matrix(o, "feature_map.weight");
  shapes[GATE_DOWN] = gate("gk_proj.0.weight", o->gate_rank, o->hidden);
  shapes[GATE_UP] = gate("gk_proj.1.weight", gates, o->gate_rank);
  shapes[GATE_BIAS] = attn_vector("gk_proj.1.bias", gates, ATTN_INIT_CONSTANT, 0);
  shapes[O] = attn_matrix("o_proj.weight", o->hidden, o->heads * o->value_dim);
  return O + 1;
}

static int state(const attn_mixer_options *o, attn_dtype compute, attn_state_part *parts) {
  int64_t channels = o->heads * o->dim;
  attn_features_state(o, features_of(o), compute, parts);
  parts[Q_TAIL] = attn_convolution_tail("q_tail", compute, o->convolution, channels);
  parts[K_TAIL] = attn_convolution_tail("k_tail", compute, o->convolution, channels);
  return K_TAIL + 1;
}

/* `which`: 0 for queries, 1 for keys. */
static attn_var *convolve(attn_graph *g, const attn_mixer_call *call, attn_var *const *in,
                          int which) {
  return attn_convolution_apply(g, call, in[0], Q_CONV + which, Q_TAIL + which);
}

/* x [rows, kv_heads n] as [rows, heads, n], for each query head what it reads. */
static attn_var *repeat(attn_graph *g, const attn_mixer_options *o, attn_var *x) {
  return attn_layer_repeat_heads(g, attn_split_heads(g, x, o->kv_heads), o->heads / o->kv_heads);
}

/* phi of queries or keys [rows, heads dim]: [rows, heads, features]. */
static attn_var *mapped(attn_graph *g, const attn_mixer_call *call, attn_var *y, int which) {
  y = attn_mixer_each(g, call, convolve, which, 1, &y);
  y = attn_layer_linear_heads(g, attn_split_heads(g, y, call->options->heads),
                              call->parameters[MAP]);
  return attn_features_mirrored(g, call->options->feature_map, y);
}

/* The logarithms of alpha [rows, heads, features]. */
static attn_var *log_decays(attn_graph *g, const attn_mixer_call *call, attn_var *x) {
  attn_parameter **p = call->parameters;
  attn_var *y = attn_op_linear_wide(g, attn_op_linear(g, x, p[GATE_DOWN]), p[GATE_UP]);
  y = attn_op_add_bias(g, y, attn_mixer_parameter(g, call, GATE_BIAS));
  y = attn_op_scale(g, attn_op_activate(g, ATTN_LOG_SIGMOID, y), 1 / gate_temperature);
  return repeat(g, call->options, y);
}

static attn_var *apply(attn_graph *g, const attn_mixer_call *call, attn_var *x) {
  const attn_mixer_options *o = call->options;
  attn_parameter **p = call->parameters;
  attn_var *q = mapped(g, call, attn_op_linear(g, x, p[Q]), 0);
  attn_var *k = repeat(g, o, attn_op_linear(g, x, p[K]));
  k = mapped(g, call, attn_join_heads(g, &call->layout, k), 1);
  attn_var *v = repeat(g, o, attn_op_linear(g, x, p[V]));

  attn_recurrent_problem problem = ATTN_RECURRENT_PROBLEM_INIT;
  problem.decay = ATTN_DECAY_CHANNEL;
  problem.scale = 1 / sqrt((double)features_of(o));
  problem.normalise = true;
  problem.epsilon = least_sum;
  attn_var *out = attn_mixer_recurrent(g, call, ATTN_FEATURES_MATRIX, &problem, q, k, v,
                                       log_decays(g, call, x), NULL);
  return attn_mixer_project(g, call, attn_join_heads(g, &call->layout, out), O);
}

const attn_mixer attn_mixer_lawcat = {
    .info = {.name = "lawcat",
             .title = "LAWCAT: Efficient Distillation from Quadratic to Linear Attention with "
                      "Convolution across Tokens for Long Context Modeling",
             .arxiv = "2509.18467",
             .abilities = ATTN_ABILITY_CAUSAL | ATTN_ABILITY_DECODE | ATTN_ABILITY_RAGGED |
                          ATTN_ABILITY_TRAINABLE,
             .summary = "gated linear attention over learned features of convolved queries and "
                        "keys, normalised"},
    .heads = true,
    .configure = configure,
    .parameters = parameters,
    .state = state,
    .apply = apply,
};
