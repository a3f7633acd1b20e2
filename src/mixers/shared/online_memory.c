#include "mixers/shared/online_memory.h"
#include "base/status.h"
#include "graph/operations.h"
#include "graph/passes.h"
#include "mixers/shared/delta.h"

#include <math.h>

/* Behind those of the delta rule's mixers, whose beta is gamma here; then the memory's matrices,
 * the features' scales, and eta. */
enum {
  GAMMA_BIAS = ATTN_DELTA_PARAMETERS,
  ALPHA,
  ALPHA_BIAS,
  THETA,
  THETA_BIAS,
  GATE,
  MATRICES,
};
enum { MEMORY = ATTN_DELTA_MATRIX, MOMENTUM = ATTN_DELTA_V_TAIL + 1, WINDOW, START };

static const double alpha_start = 4, theta_start = 0, eta_start = -4;

/* The bias of gamma with which the gammas of a chunk sum to 1/32. All its gradients are taken at
 * one memory, and a constant feature makes them alike: with a curvature of up to 8 and momentum's
 * factor of 2 to 4 that is as much as steps along one direction bear before memories grow without
 * end. */
static double gamma_start(const attn_mixer_options *o) {
  return -log(32 * (double)o->memory_chunk - 1);
}

static attn_online_memory rule_of(const attn_mixer_options *o, const attn_online_mixer *mixer) {
  int64_t channels = mixer->windowed ? o->feature_dim : o->dim;
  attn_online_memory rule = {.kind = o->memory,
                             .features = o->dim,
                             .value_dim = o->value_dim,
                             .width = o->memory_width,
                             .passed = channels < o->value_dim ? channels : o->value_dim,
                             .window = 1,
                             .chunk = o->memory_chunk};
  if (mixer->windowed) {
    rule.features = attn_polynomial_features(o->feature_dim, (int)o->feature_degree);
    rule.residual = 1; /* the channels themselves are behind the constant */
    rule.window = o->memory_window;
  }
  if (mixer->orthogonal && o->newton_schulz > 0) rule.steps = (int)o->newton_schulz;
  return rule;
}

static attn_status configure_features(attn_mixer_options *o, const attn_online_mixer *mixer) {
  const int64_t usual_channels = 8, usual_degree = 2, usual_window = 4, most_features = 4096;
  if (!o->feature_degree) o->feature_degree = usual_degree;
  if (!o->memory_window) o->memory_window = usual_window;
  if (!o->feature_dim)
    o->feature_dim = o->feature_degree == 1 || o->dim < usual_channels ? o->dim : usual_channels;
  int64_t features = attn_polynomial_features(o->feature_dim, (int)o->feature_degree);
  if (features <= most_features) return ATTN_OK;
  return attn_fail(ATTN_INVALID_ARGUMENT,
                   "%s: feature_dim %lld and feature_degree %lld make %lld features, above %lld",
                   mixer->name, (long long)o->feature_dim, (long long)o->feature_degree,
                   (long long)features, (long long)most_features);
}

attn_status attn_online_configure(attn_mixer_options *o, const attn_online_mixer *mixer) {
  const int64_t usual_dim = 64, usual_chunk = 16, most_usual_width = 256;
  ATTN_TRY(attn_mixer_check_options(o, mixer->name));
  if (!o->heads && !o->dim && o->hidden % usual_dim == 0) o->dim = usual_dim;
  ATTN_TRY(attn_delta_configure(o, mixer->name));
  if (o->memory == ATTN_MEMORY_DEFAULT) o->memory = mixer->memory;
  if (!o->memory_chunk) o->memory_chunk = usual_chunk;
  if (!o->memory_width)
    o->memory_width = 4 * o->value_dim < most_usual_width ? 4 * o->value_dim : most_usual_width;
  if (mixer->windowed) ATTN_TRY(configure_features(o, mixer));
  if (mixer->orthogonal && !o->newton_schulz) o->newton_schulz = ATTN_NEWTON_SCHULZ_STEPS;
  return ATTN_OK;
}

/* The options of the delta rule's projections: keys are as wide as features take them. */
static attn_mixer_options projected(const attn_mixer_options *o, const attn_online_mixer *mixer) {
  attn_mixer_options keys = *o;
  if (mixer->windowed) keys.dim = o->feature_dim;
  return keys;
}

static attn_parameter_shape gate(const attn_mixer_options *o, const char *name) {
  return attn_matrix(name, o->heads, o->hidden);
}
static attn_parameter_shape gate_bias(const attn_mixer_options *o, const char *name, double start) {
  return attn_vector(name, o->heads, ATTN_INIT_CONSTANT, start);
}

int attn_online_parameters(const attn_mixer_options *o, const attn_online_mixer *mixer,
                           attn_parameter_shape *shapes) {
  static const char *const names[] = {"memory.w1", "memory.w2", "memory.w3"};
  attn_mixer_options keys = projected(o, mixer);
  attn_online_memory rule = rule_of(o, mixer);
  attn_delta_parameters(&keys, shapes);
  shapes[ATTN_DELTA_BETA] = gate(o, "gamma_proj.weight");
  shapes[GAMMA_BIAS] = gate_bias(o, "gamma_proj.bias", gamma_start(o));
  shapes[ALPHA] = gate(o, "alpha_proj.weight");
  shapes[ALPHA_BIAS] = gate_bias(o, "alpha_proj.bias", alpha_start);
  shapes[THETA] = gate(o, "theta_proj.weight");
  shapes[THETA_BIAS] = gate_bias(o, "theta_proj.bias", theta_start);
  shapes[GATE] = attn_matrix("g_proj.weight", o->heads * o->value_dim, o->hidden);
  int count = MATRICES;
  for (int i = 0; i < attn_online_memory_count(&rule); ++i, ++count) {
    int64_t columns = attn_online_memory_columns(&rule, i);
    shapes[count] = attn_matrix(names[i], o->heads * attn_online_memory_rows(&rule, i), columns);
    shapes[count].scale = 1 / sqrt((double)columns);
    shapes[count].product = false;
  }
  if (mixer->windowed)
    shapes[count++] =
        attn_vector("feature_scale", o->feature_degree + 1, ATTN_INIT_INVERSE_FACTORIAL, 0.5);
  if (mixer->orthogonal) {
    shapes[count++] = gate(o, "eta_proj.weight");
    shapes[count++] = gate_bias(o, "eta_proj.bias", eta_start);
  }
  return count;
}

int attn_online_state(const attn_mixer_options *o, const attn_online_mixer *mixer,
                      attn_dtype compute, attn_state_part *parts) {
  attn_mixer_options keys = projected(o, mixer);
  attn_online_memory rule = rule_of(o, mixer);
  attn_delta_state(&keys, compute, parts);
  attn_state_part weights = parts[MEMORY];
  weights.rank = 2;
  weights.shape[1] = attn_online_memory_weights(&rule);
  weights.name = "memory";
  parts[MEMORY] = weights;
  weights.name = "momentum";
  parts[MOMENTUM] = weights;
  parts[MOMENTUM].dtype = ATTN_F64;
  parts[WINDOW] = weights;
  parts[WINDOW].name = "window";
  parts[WINDOW].rank = 3;
  parts[WINDOW].shape[1] = rule.window - 1;
  parts[WINDOW].shape[2] = attn_online_memory_kept(&rule);
  weights.name = "chunk_start";
  parts[START] = weights;
  return rule.chunk > 1 ? START + 1
                        : START; /* chunks of one token begin with the memory as it is */
}

/* sigmoid(x W^T + b), wide. */
static attn_var *gate_of(attn_graph *g, const attn_mixer_call *call, attn_var *x, int weight,
                         int bias) {
  attn_var *y = attn_op_linear_wide(g, x, call->parameters[weight]);
  y = attn_op_add_bias(g, y, attn_mixer_parameter(g, call, bias));
  return attn_op_activate(g, ATTN_SIGMOID, y);
}

/* What apply hands to the part that has the state. */
enum { IN_Q, IN_K, IN_V, IN_ALPHA, IN_THETA, IN_GAMMA, IN_ETA, INPUTS };

static attn_var *remember(attn_graph *g, const attn_mixer_call *call,
                          const attn_online_mixer *mixer, attn_var *const *in) {
  attn_online_memory rule = rule_of(call->options, mixer);
  attn_online_memory_inputs inputs = {.q = in[IN_Q],
                                      .k = in[IN_K],
                                      .v = in[IN_V],
                                      .alpha = in[IN_ALPHA],
                                      .theta = in[IN_THETA],
                                      .eta = mixer->orthogonal ? in[IN_ETA] : NULL,
                                      .gamma = in[IN_GAMMA]};
  for (int i = 0; i < attn_online_memory_count(&rule); ++i)
    inputs.initial[i] = attn_mixer_parameter(g, call, MATRICES + i);
  if (!call->state) return attn_op_online_memory(g, &call->layout, &rule, &inputs, NULL);
  attn_online_memory_state past = {.memory = attn_state_fixed(call->state, MEMORY),
                                   .momentum = attn_state_fixed(call->state, MOMENTUM),
                                   .window = attn_state_fixed(call->state, WINDOW),
                                   .position = attn_state_position(call->state)};
  if (rule.chunk > 1) past.start = attn_state_fixed(call->state, START);
  if (g->replay) {
    const int64_t *place = attn_state_position_place(call->state);
    past.position_place = attn_pass_live(g, place, sizeof *place);
    if (!past.position_place) return NULL;
  }
  return attn_op_online_memory(g, &call->layout, &rule, &inputs, &past);
}

/* For attn_mixer_each, whose parts know a number: the bits of the mixer's kind. */
enum { WINDOWED = 1, ORTHOGONAL = 2 };
static attn_var *remember_part(attn_graph *g, const attn_mixer_call *call, attn_var *const *in,
                               int which) {
  attn_online_mixer mixer = {.windowed = which & WINDOWED, .orthogonal = which & ORTHOGONAL};
  return remember(g, call, &mixer, in);
}

attn_var *attn_online_apply(attn_graph *g, const attn_mixer_call *call,
                            const attn_online_mixer *mixer, attn_var *x) {
  const attn_mixer_options *o = call->options;
  attn_online_memory rule = rule_of(o, mixer);
  int scales = MATRICES + attn_online_memory_count(&rule), eta = scales + mixer->windowed;
  attn_delta_inputs heads = attn_delta_heads(g, call, x);
  attn_var *in[INPUTS] = {[IN_Q] = heads.q, [IN_K] = heads.k, [IN_V] = heads.v};
  for (int i = IN_Q; i <= IN_K; ++i) {
    if (mixer->windowed)
      in[i] = attn_layer_polynomial(g, in[i], (int)o->feature_degree, 1,
                                    attn_mixer_parameter(g, call, scales));
    in[i] = attn_layer_repeat_heads(g, in[i], o->heads / o->kv_heads);
  }
  in[IN_ALPHA] = gate_of(g, call, x, ALPHA, ALPHA_BIAS);
  in[IN_THETA] = gate_of(g, call, x, THETA, THETA_BIAS);
  in[IN_GAMMA] = gate_of(g, call, x, ATTN_DELTA_BETA, GAMMA_BIAS);
  in[IN_GAMMA] = attn_op_scale(g, in[IN_GAMMA], 1 / (double)rule.window);
  if (mixer->orthogonal) in[IN_ETA] = gate_of(g, call, x, eta, eta + 1);
  int which = (mixer->windowed ? WINDOWED : 0) | (mixer->orthogonal ? ORTHOGONAL : 0);
  attn_var *out =
      attn_mixer_each(g, call, remember_part, which, mixer->orthogonal ? INPUTS : IN_ETA, in);
  out = attn_delta_normalise(g, call, attn_split_heads(g, out, o->heads));
  out = attn_op_gate(g, ATTN_SILU, attn_op_linear(g, x, call->parameters[GATE]), out);
  return attn_op_linear(g, out, call->parameters[ATTN_DELTA_OUT]);
}
