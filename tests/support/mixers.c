#include "support/mixers.h"

#include "base/fault.h"
#include "base/memory.h"
#include "base/random.h"
#include "engines/dense/dense.h"
#include "graph/operations.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* Cases -----------------------------------------------------------------------------------------
 */

static const double rotary_factors[] = {1, 1, 1.5, 2, 4, 8, 8, 8};

static const test_case cases[] = {
    {NULL, "two heads", {.hidden = 32, .heads = 2, .layers = 2}},
    {NULL, "defaults", {.hidden = 48, .layers = 2}},
    {NULL, "odd sizes", {.hidden = 21, .heads = 3, .dim = 7, .layer = 1, .layers = 3}},
    {NULL, "wide head", {.hidden = 24, .heads = 1, .dim = 128, .value_dim = 128, .layers = 2}},
    {"softmax", "one channel", {.hidden = 5, .heads = 5, .dim = 1}},
    {"softmax", "grouped", {.hidden = 32, .heads = 4, .kv_heads = 2}},
    {"softmax", "one key head", {.hidden = 40, .heads = 5, .kv_heads = 1}},
    {"softmax", "window of 10", {.hidden = 32, .heads = 2, .window = 10}},
    {"softmax", "window of 1", {.hidden = 16, .heads = 2, .window = 1}},
    {"softmax", "window of 65, grouped", {.hidden = 32, .heads = 4, .kv_heads = 2, .window = 65}},
    {"softmax", "no positions", {.hidden = 32, .heads = 2, .rotary_dim = -1}},
    {"softmax", "partly rotary", {.hidden = 32, .heads = 2, .rotary_dim = 6, .rope.base = 500}},
    {"softmax", "biases", {.hidden = 32, .heads = 4, .kv_heads = 2, .bias = true}},
    {"softmax", "bias of the output", {.hidden = 24, .heads = 2, .output_bias = true}},
    {"softmax", "normalised heads", {.hidden = 32, .heads = 4, .kv_heads = 1, .qk_norm = true}},
    {"softmax",
     "positions between",
     {.hidden = 32, .heads = 2, .rope = {.base = 500, .scaling = ATTN_ROPE_LINEAR, .factor = 4}}},
    {"softmax",
     "Llama 3.1's positions",
     {.hidden = 32,
      .heads = 2,
      .rope = {.base = 500,
               .scaling = ATTN_ROPE_LLAMA3,
               .factor = 8,
               .low_factor = 1,
               .high_factor = 4,
               .original_length = 64}}},
    {"softmax",
     "positions by factors",
     {.hidden = 32,
      .heads = 2,
      .rope = {.base = 500,
               .scaling = ATTN_ROPE_FACTORS,
               .factors = rotary_factors,
               .factor_count = 8}}},
    {"softmax",
     "YaRN's positions",
     {.hidden = 32,
      .heads = 2,
      .rope = {.base = 500,
               .scaling = ATTN_ROPE_YARN,
               .factor = 8,
               .low_factor = 1,
               .high_factor = 4,
               .original_length = 64,
               .magnitude = 1.2}}},
    {"softmax", "gated output", {.hidden = 32, .heads = 4, .kv_heads = 2, .output_gate = true}},
    {"softmax", "soft cap", {.hidden = 32, .heads = 2, .soft_cap = 1.5}},
    {"softmax", "scale", {.hidden = 32, .heads = 2, .scale = 0.7}},
    {"softmax",
     "bidirectional",
     {.hidden = 32, .heads = 4, .rotary_dim = -1, .bidirectional = true, .bias = true}},
    {"softmax",
     "bidirectional, grouped, window of 20",
     {.hidden = 24, .heads = 4, .kv_heads = 2, .window = 20, .bidirectional = true}},
    {"softmax",
     "everything",
     {.hidden = 36,
      .heads = 6,
      .kv_heads = 2,
      .dim = 10,
      .value_dim = 13,
      .window = 33,
      .rotary_dim = 4,
      .soft_cap = 3,
      .bias = true,
      .output_bias = true,
      .qk_norm = true,
      .output_gate = true}},
    {"lightning", "lrpe", {.hidden = 32, .heads = 2, .layers = 4, .lrpe = true}},
    {"lightning", "lrpe, 12 heads", {.hidden = 48, .heads = 12, .layers = 4, .lrpe = true}},
    {"lightning",
     "schedule of the paper",
     {.hidden = 40, .heads = 5, .layer = 1, .layers = 3, .schedule = ATTN_SCHEDULE_PAPER}},
    {"lightning", "one channel", {.hidden = 5, .heads = 5, .dim = 1, .layers = 1}},
    {"lightning", "last layer", {.hidden = 32, .heads = 2, .layer = 5, .layers = 6}},
    {"lightning", "only layer", {.hidden = 32, .heads = 3, .dim = 16, .layers = 1}},
    {"mla", "latent queries", {.hidden = 32, .heads = 4, .dim = 8, .query_rank = 12}},
    {"mla", "no positions", {.hidden = 32, .heads = 2, .rotary_dim = -1, .shared_dim = 5}},
    {"mla", "one channel", {.hidden = 5, .heads = 5, .dim = 1, .value_dim = 3}},
    {"mla", "scale", {.hidden = 24, .heads = 2, .value_dim = 5, .scale = 0.4, .rope.base = 500}},
    {"minimax",
     "narrow values",
     {.hidden = 24, .heads = 3, .dim = 10, .value_dim = 5, .layers = 1}},
    {"minimax", "last layer", {.hidden = 32, .heads = 2, .layer = 5, .layers = 6}},
    {"hedgehog",
     "exponentials",
     {.hidden = 24, .heads = 2, .value_dim = 5, .feature_map = ATTN_FEATURES_EXP}},
    {"hedgehog", "joint", {.hidden = 24, .heads = 3, .feature_map = ATTN_FEATURES_JOINT}},
    {"hedgehog", "few features", {.hidden = 24, .heads = 2, .feature_dim = 3, .rotary_dim = 4}},
    {"hedgehog", "no positions", {.hidden = 24, .heads = 2, .feature_dim = 20, .rotary_dim = -1}},
    {"hedgehog",
     "biases, normalised heads",
     {.hidden = 24, .heads = 2, .bias = true, .output_bias = true, .qk_norm = true}},
    {"hedgehog", "one channel", {.hidden = 5, .heads = 5, .dim = 1, .value_dim = 3}},
    {"lawcat", "grouped", {.hidden = 32, .heads = 4, .kv_heads = 2, .value_dim = 5}},
    {"lawcat", "one key head", {.hidden = 30, .heads = 3, .kv_heads = 1, .gate_rank = 3}},
    {"lawcat", "many features", {.hidden = 24, .heads = 2, .feature_dim = 20}},
    {"lawcat", "one tap", {.hidden = 24, .heads = 2, .convolution = 1}},
    {"lawcat", "7 taps", {.hidden = 24, .heads = 2, .feature_dim = 3, .convolution = 7}},
    {"lawcat", "one channel", {.hidden = 5, .heads = 5, .dim = 1, .value_dim = 3}},
    {"lmu", "small memory", {.hidden = 24, .memory_dim = 6, .theta = 20}},
    {"lmu", "three channels", {.hidden = 24, .heads = 3, .memory_dim = 5, .theta = 40.5}},
    {"lmu", "one coefficient", {.hidden = 5, .memory_dim = 1, .theta = 1}},
    {"lmu", "more coefficients than tokens", {.hidden = 10, .memory_dim = 70, .theta = 12}},
    {"spiking_lmu", "small memory", {.hidden = 24, .memory_dim = 6, .theta = 20}},
    {"spiking_lmu",
     "three channels, slow neurons",
     {.hidden = 24, .heads = 3, .memory_dim = 5, .theta = 40.5, .spike_tau = 3}},
    {"spiking_lmu",
     "low thresholds",
     {.hidden = 32, .memory_dim = 70, .theta = 12, .spike_threshold = 0.4}},
    {"lolcats",
     "terrace of 7, grouped",
     {.hidden = 32, .heads = 4, .kv_heads = 2, .value_dim = 5, .block = 7}},
    {"lolcats", "terrace of 1", {.hidden = 24, .heads = 2, .block = 1, .feature_dim = 3}},
    {"lolcats",
     "terrace of 32, affine",
     {.hidden = 24, .heads = 2, .block = 32, .feature_dim = 16, .affine = true}},
    {"lolcats",
     "window of 10",
     {.hidden = 30,
      .heads = 3,
      .kv_heads = 1,
      .block = 10,
      .window_kind = ATTN_WINDOW_SLIDING,
      .feature_dim = 8}},
    {"lolcats",
     "window of 1, affine",
     {.hidden = 24,
      .heads = 2,
      .block = 1,
      .window_kind = ATTN_WINDOW_SLIDING,
      .affine = true,
      .rotary_dim = -1}},
    {"lolcats",
     "window of 64",
     {.hidden = 24, .heads = 2, .window_kind = ATTN_WINDOW_SLIDING, .rotary_dim = 4}},
    {"lolcats", "one channel", {.hidden = 5, .heads = 5, .dim = 1, .value_dim = 3, .block = 5}},
    {"lolcats",
     "biases, normalised heads, YaRN's positions",
     {.hidden = 24,
      .heads = 2,
      .kv_heads = 1,
      .block = 9,
      .bias = true,
      .output_bias = true,
      .qk_norm = true,
      .rope = {.base = 500,
               .scaling = ATTN_ROPE_YARN,
               .factor = 8,
               .low_factor = 1,
               .high_factor = 4,
               .original_length = 64,
               .magnitude = 1.2}}},
    {"norm_attention", "elu", {.hidden = 24, .heads = 2, .feature_map = ATTN_FEATURES_ELU}},
    {"norm_attention", "gated", {.hidden = 24, .heads = 3, .value_dim = 5, .output_gate = true}},
    {"norm_attention", "no positions", {.hidden = 24, .heads = 2, .rotary_dim = -1}},
    {"norm_attention", "one channel", {.hidden = 5, .heads = 5, .dim = 1, .value_dim = 3}},
    {"diag_attention", "blocks of 7", {.hidden = 24, .heads = 2, .block = 7}},
    {"norm_attention", "both ways", {.hidden = 24, .heads = 2, .bidirectional = true}},
    {"norm_attention",
     "both ways, elu, gated, no positions",
     {.hidden = 24,
      .heads = 3,
      .value_dim = 5,
      .rotary_dim = -1,
      .output_gate = true,
      .feature_map = ATTN_FEATURES_ELU,
      .bidirectional = true}},
    {"hedgehog", "both ways", {.hidden = 24, .heads = 3, .value_dim = 5, .bidirectional = true}},
    {"hedgehog",
     "both ways, exponentials, biases",
     {.hidden = 24,
      .heads = 2,
      .bias = true,
      .qk_norm = true,
      .feature_dim = 5,
      .feature_map = ATTN_FEATURES_EXP,
      .bidirectional = true}},
    {"diag_attention", "blocks of 1", {.hidden = 24, .heads = 2, .block = 1}},
    {"diag_attention",
     "blocks of 50, grouped",
     {.hidden = 24, .heads = 4, .kv_heads = 2, .value_dim = 5, .block = 50, .rotary_dim = 4}},
    {"diag_attention",
     "one block, no positions",
     {.hidden = 24, .heads = 2, .block = 1000, .rotary_dim = -1}},
    {"diag_attention",
     "bidirectional, blocks of 20",
     {.hidden = 24, .heads = 2, .block = 20, .bidirectional = true}},
    {"diag_attention", "ReLU", {.hidden = 24, .heads = 2, .relu_scores = true}},
    {"diag_attention",
     "ReLU, blocks of 7",
     {.hidden = 24, .heads = 3, .value_dim = 5, .block = 7, .relu_scores = true}},
    {"diag_attention",
     "ReLU, bidirectional, no positions",
     {.hidden = 24,
      .heads = 2,
      .block = 20,
      .rotary_dim = -1,
      .bidirectional = true,
      .relu_scores = true}},
    {"aaren", "narrow values", {.hidden = 24, .heads = 3, .dim = 10, .value_dim = 5}},
    {"aaren", "one channel", {.hidden = 5, .heads = 5, .dim = 1, .value_dim = 3}},
    {"based", "few features", {.hidden = 24, .heads = 2, .value_dim = 5, .feature_dim = 3}},
    {"based", "most features", {.hidden = 24, .heads = 1, .feature_dim = 21}},
    {"based", "one channel", {.hidden = 5, .heads = 5, .dim = 1, .feature_dim = 1}},
    {"titans", "matrix", {.hidden = 24, .heads = 2, .memory = ATTN_MEMORY_MATRIX}},
    {"titans",
     "gated, grouped, chunks of 7",
     {.hidden = 24,
      .heads = 4,
      .kv_heads = 2,
      .dim = 5,
      .value_dim = 3,
      .memory = ATTN_MEMORY_GATED,
      .memory_width = 9,
      .memory_chunk = 7}},
    {"titans", "token by token", {.hidden = 16, .heads = 2, .memory_width = 5, .memory_chunk = 1}},
    {"titans", "narrow keys", {.hidden = 5, .heads = 5, .dim = 2, .value_dim = 3}},
    {"omega_net",
     "cubes, window of 1",
     {.hidden = 24, .heads = 2, .feature_dim = 3, .feature_degree = 3, .memory_window = 1}},
    {"omega_net",
     "matrix, window beyond the chunk",
     {.hidden = 24,
      .heads = 2,
      .feature_dim = 3,
      .memory = ATTN_MEMORY_MATRIX,
      .memory_window = 11,
      .memory_chunk = 4}},
    {"omega_net",
     "gated, token by token",
     {.hidden = 16,
      .heads = 2,
      .value_dim = 3,
      .feature_degree = 1,
      .memory = ATTN_MEMORY_GATED,
      .memory_width = 6,
      .memory_window = 3,
      .memory_chunk = 1}},
    {"atlas",
     "deep",
     {.hidden = 24,
      .heads = 2,
      .feature_dim = 3,
      .memory = ATTN_MEMORY_MLP,
      .memory_width = 7,
      .memory_chunk = 5}},
    {"atlas",
     "gated, grouped, linear features",
     {.hidden = 24,
      .heads = 4,
      .kv_heads = 2,
      .value_dim = 5,
      .feature_degree = 1,
      .memory = ATTN_MEMORY_GATED,
      .memory_width = 4,
      .memory_window = 1}},
    {"atlas", "no Newton-Schulz", {.hidden = 24, .heads = 2, .newton_schulz = -1}},
    {"atlas",
     "token by token, two steps",
     {.hidden = 16,
      .heads = 2,
      .feature_dim = 3,
      .memory_window = 9,
      .memory_chunk = 1,
      .newton_schulz = 2}},
    {"kda", "plain gate", {.hidden = 24, .heads = 2, .plain_gate = true}},
    {"gla", "narrow values", {.hidden = 24, .heads = 3, .dim = 10, .value_dim = 5, .gate_rank = 3}},
    {"gla", "one channel", {.hidden = 5, .heads = 5, .dim = 1, .value_dim = 3}},
    {"gla", "one head", {.hidden = 30, .heads = 1}},
    {"delta_net", "grouped", {.hidden = 32, .heads = 4, .kv_heads = 2, .dim = 12}},
    {"delta_net", "one tap", {.hidden = 24, .heads = 2, .convolution = 1}},
    {"delta_net", "16 taps", {.hidden = 24, .heads = 2, .value_dim = 5, .convolution = 16}},
    {"gated_delta_net",
     "grouped",
     {.hidden = 30, .heads = 6, .kv_heads = 2, .dim = 8, .value_dim = 5}},
    {"gated_delta_net", "two taps", {.hidden = 24, .heads = 2, .convolution = 2}},
    {"kda", "grouped", {.hidden = 30, .heads = 6, .kv_heads = 3, .dim = 8, .value_dim = 5}},
    {"kda", "low rank, 7 taps", {.hidden = 24, .heads = 2, .gate_rank = 3, .convolution = 7}},
};

static const char *current_case = "";

static void run_case(const attn_mixer *mixer, const test_case *c,
                     void (*body)(const attn_mixer *, const attn_mixer_options *)) {
  current_case = c->name;
  body(mixer, &c->options);
  current_case = "";
}

static bool is_case_of(const test_case *c, const attn_mixer *mixer) {
  const char *only = getenv("ATTN_TEST_MIXER"); /* while one is being written */
  if (only && strcmp(only, mixer->info.name) != 0) return false;
  return !c->mixer || strcmp(c->mixer, mixer->info.name) == 0;
}

static void each_case(bool only_first,
                      void (*body)(const attn_mixer *, const attn_mixer_options *)) {
  for (int m = 0; m < attn_mixer_count(); ++m) {
    const attn_mixer *mixer = attn_mixer_at(m);
    for (size_t c = 0; c < sizeof cases / sizeof *cases; ++c) {
      if (!is_case_of(&cases[c], mixer)) continue;
      run_case(mixer, &cases[c], body);
      if (only_first) break;
    }
  }
}

void test_each_case(void (*body)(const attn_mixer *, const attn_mixer_options *)) {
  each_case(false, body);
}

void test_each_causal_case(void (*body)(const attn_mixer *, const attn_mixer_options *)) {
  for (int m = 0; m < attn_mixer_count(); ++m)
    for (size_t c = 0; c < sizeof cases / sizeof *cases; ++c)
      if (is_case_of(&cases[c], attn_mixer_at(m)) && !cases[c].options.bidirectional)
        run_case(attn_mixer_at(m), &cases[c], body);
}

void test_each_mixer(void (*body)(const attn_mixer *, const attn_mixer_options *)) {
  each_case(true, body);
}

const char *test_case_name(const test_layer *layer) {
  static char text[256];
  snprintf(text, sizeof text, "%s, %s, %s, %s", layer->mixer->info.name, current_case,
           attn_dtype_name(layer->compute), attn_kernel_path_name(attn_get_kernel_path()));
  return text;
}

/* Layers ----------------------------------------------------------------------------------------
 */

int64_t test_parameter_count(const test_layer *layer, int i) {
  const attn_parameter_shape *shape = &layer->shapes[i];
  return shape->shape[0] * (shape->rank == 2 ? shape->shape[1] : 1);
}

void test_parameters_alloc(const test_layer *layer, double *arrays[ATTN_MIXER_PARAMETERS]) {
  for (int i = 0; i < layer->count; ++i)
    arrays[i] = calloc((size_t)test_parameter_count(layer, i), sizeof(double));
}

void test_parameters_free(const test_layer *layer, double *arrays[ATTN_MIXER_PARAMETERS]) {
  for (int i = 0; i < layer->count; ++i) free(arrays[i]);
}

static void round_to(attn_dtype dtype, double *x, int64_t count) {
  double *rounded = test_rounded(dtype, x, count);
  memcpy(x, rounded, (size_t)count * sizeof *x);
  free(rounded);
}

/* Through memory of its own, so that it works while the library's allocations are made to fail. */
double *test_rounded(attn_dtype dtype, const double *x, int64_t count) {
  double *y = malloc((size_t)(count + 1) * sizeof *y);
  void *memory = malloc((size_t)(count + 1) * attn_dtype_size(dtype));
  attn_tensor exact, rounded, back;
  assert_ok(attn_tensor_wrap((void *)(uintptr_t)x, ATTN_F64, 1, &count, &exact));
  assert_ok(attn_tensor_wrap(memory, dtype, 1, &count, &rounded));
  assert_ok(attn_tensor_wrap(y, ATTN_F64, 1, &count, &back));
  assert_ok(attn_tensor_copy(&exact, &rounded));
  assert_ok(attn_tensor_copy(&rounded, &back));
  free(memory);
  return y;
}

double *test_inputs(const test_layer *layer, int64_t count, uint64_t seed) {
  double *x = malloc((size_t)(count + 1) * sizeof *x);
  test_fill_normal(x, count, 0, 1, seed);
  round_to(layer->compute, x, count);
  return x;
}

static attn_dtype wide(attn_dtype compute) {
  return compute == ATTN_F64 ? ATTN_F64 : ATTN_F32;
}

/* What a parameter's values are rounded to before they are used. */
static attn_dtype held(const test_layer *layer, int i) {
  return layer->shapes[i].product ? layer->compute : wide(layer->compute);
}

/* Larger than at the start of training, so that no part of a mixer is nearly linear or zero. */
static void fill_parameter(const attn_parameter_shape *shape, double *x, int64_t count,
                           uint64_t seed) {
  double fan_in = shape->rank == 2 ? (double)shape->shape[1] : 1;
  if (shape->statistic && shape->scale > 0) { /* a variance */
    test_fill_normal(x, count, 0, 0.3, seed);
    for (int64_t i = 0; i < count; ++i) x[i] = exp(x[i]);
    return;
  }
  switch (shape->initial) {
  case ATTN_INIT_NORMAL:
  case ATTN_INIT_LAST_TAP:
  case ATTN_INIT_UNIFORM: test_fill_normal(x, count, 0, 1 / sqrt(fan_in), seed); break;
  case ATTN_INIT_CONSTANT: test_fill_normal(x, count, shape->scale, 0.3, seed); break;
  case ATTN_INIT_LOG_A: test_fill_normal(x, count, 0, 0.5, seed); break;
  case ATTN_INIT_DT_BIAS: test_fill_normal(x, count, -2, 1, seed); break;
  case ATTN_INIT_IDENTITY: /* disturbed, so that every element matters */
    test_fill_normal(x, count, 0, 0.5 / sqrt(fan_in), seed);
    for (int64_t i = 0; i < count; ++i)
      x[i] += i / shape->shape[1] % (int64_t)shape->scale == i % shape->shape[1];
    break;
  case ATTN_INIT_INVERSE_FACTORIAL:
    test_fill_normal(x, count, 1, 0.1, seed);
    for (int64_t j = 0; j < count; ++j) x[j] *= pow(tgamma((double)j + 1), -shape->scale);
    break;
  case ATTN_INIT_LRPE: /* frequencies as they start, and disturbed as training would */
    test_fill_normal(x, count, 1, 0.1, seed);
    for (int64_t j = 0; j < count; ++j) x[j] *= pow(10000, -2 * (double)j / shape->scale);
    break;
  }
}

attn_status test_layer_set(test_layer *layer, int i, const double *values) {
  int64_t count = test_parameter_count(layer, i);
  if (layer->exact[i] != values) memcpy(layer->exact[i], values, (size_t)count * sizeof *values);
  memcpy(layer->values[i], values, (size_t)count * sizeof *values);
  round_to(held(layer, i), layer->values[i], count);
  attn_parameter *p = &layer->parameters[i];
  attn_tensor source;
  ATTN_TRY(attn_tensor_wrap(layer->values[i], ATTN_F64, p->value.rank, p->value.shape, &source));
  ATTN_TRY(attn_tensor_copy(&source, &p->value));
  return p->weight ? attn_weight_set(p->weight, &p->value) : ATTN_OK;
}

static attn_status create_parameter(test_layer *layer, int i, bool trains) {
  const attn_parameter_shape *shape = &layer->shapes[i];
  attn_parameter *p = &layer->parameters[i];
  p->name = shape->name;
  p->decay = shape->decay;
  layer->pointers[i] = p;
  ATTN_TRY(attn_tensor_create_on(test_device(), wide(layer->compute), shape->rank, shape->shape,
                                 &p->value));
  p->statistic = shape->statistic;
  if (trains && !shape->statistic) /* without a gradient batch norms use the running ones */
    ATTN_TRY(attn_tensor_create_on(test_device(), wide(layer->compute), shape->rank, shape->shape,
                                   &p->gradient));
  if (shape->product)
    ATTN_TRY(attn_weight_create(shape->shape[0], shape->shape[1], layer->compute, &p->weight));
  return test_layer_set(layer, i, layer->exact[i]);
}

attn_status test_layer_create(test_layer *layer, const attn_mixer *mixer,
                              const attn_mixer_options *options, attn_dtype compute, bool trains) {
  *layer = (test_layer){.mixer = mixer, .options = *options, .compute = compute};
  ATTN_TRY(mixer->configure(&layer->options));
  layer->oracle = oracle_of_mixer(mixer->info.name);
  layer->cross_oracle = oracle_of_cross_mixer(mixer->info.name);
  if (!layer->cross_oracle && mixer->info.abilities & ATTN_ABILITY_CROSS)
    fail_msg("mixer %s has no oracle of cross-attention", mixer->info.name);
  if (!layer->oracle) fail_msg("mixer %s has no oracle in tests/oracles/", mixer->info.name);
  layer->count = mixer->parameters(&layer->options, layer->shapes);
  assert_in_range(layer->count, 1, ATTN_MIXER_PARAMETERS);
  test_parameters_alloc(layer, layer->values);
  test_parameters_alloc(layer, layer->exact);
  for (int i = 0; i < layer->count; ++i)
    fill_parameter(&layer->shapes[i], layer->exact[i], test_parameter_count(layer, i),
                   100 + (uint64_t)i);
  for (int i = 0; i < layer->count; ++i) ATTN_TRY(create_parameter(layer, i, trains));
  return attn_graph_create_on(test_device(), compute, &layer->graph);
}

void test_layer_destroy(test_layer *layer) {
  attn_graph_destroy(layer->graph);
  for (int i = 0; i < layer->count; ++i) {
    attn_tensor_destroy(&layer->parameters[i].value);
    attn_tensor_destroy(&layer->parameters[i].gradient);
    attn_weight_destroy(layer->parameters[i].weight);
  }
  test_parameters_free(layer, layer->values);
  test_parameters_free(layer, layer->exact);
  *layer = (test_layer){0};
}

int test_layer_find(const test_layer *layer, const char *name) {
  for (int i = 0; i < layer->count; ++i)
    if (strcmp(layer->shapes[i].name, name) == 0) return i;
  fail_msg("%s has no parameter %s", layer->mixer->info.name, name);
  return -1;
}

/* Runs --------------------------------------------------------------------------------------------
 */

static attn_tensor from_arena(attn_graph *g, const double *x, int64_t rows, int64_t width) {
  int64_t shape[2] = {rows, width};
  attn_tensor tensor = attn_graph_tensor(g, g->compute, 2, shape), source;
  if (!tensor.data) return tensor;
  assert_ok(attn_tensor_wrap((void *)(uintptr_t)x, ATTN_F64, 2, shape, &source));
  assert_ok(attn_tensor_copy(&source, &tensor));
  return tensor;
}

static void to_doubles(const attn_tensor *tensor, double *y) {
  attn_tensor target;
  assert_ok(attn_tensor_wrap(y, ATTN_F64, tensor->rank, tensor->shape, &target));
  assert_ok(attn_tensor_copy(tensor, &target));
}

/* Fills the arena, which has just been reset, in the smallest pieces and with no memory to grow. */
static size_t fill_arena(attn_arena *arena, size_t pieces) {
  size_t taken = 0;
  while (taken < pieces && attn_arena_alloc(arena, ATTN_ALIGNMENT)) ++taken;
  return taken;
}

static void leave_room(const test_layer *layer) {
  if (!layer->room) return;
  attn_arena *arena = layer->graph->arena;
  attn_fault_arm(ATTN_FAULT_ALLOC, 0);
  size_t all = fill_arena(arena, SIZE_MAX), room = (layer->room - 1) / ATTN_ALIGNMENT;
  attn_arena_reset(arena);
  fill_arena(arena, all > room ? all - room : 0);
  attn_fault_arm(ATTN_FAULT_ALLOC, 0); /* from here on failures count */
}

static attn_mixer_call call_of(const test_layer *layer, const attn_layout *layout,
                               attn_state *state) {
  attn_mixer_call call = {.options = &layer->options,
                          .parameters = (attn_parameter **)(uintptr_t)layer->pointers,
                          .layout = *layout,
                          .state = state,
                          .context_layout = layer->context_layout};
  if (!layer->context) return call;
  attn_graph *g = layer->graph;
  attn_tensor rows =
      from_arena(g, layer->context, layer->context_layout.rows, layer->options.hidden);
  if (rows.data)
    call.context = g->recording ? attn_graph_leaf(g, &rows) : attn_graph_input(g, &rows);
  return call;
}

static attn_status run(const test_layer *layer, const attn_layout *layout, attn_state *state,
                       const double *x, double *y) {
  attn_graph *g = layer->graph;
  attn_graph_reset(g, false);
  leave_room(layer);
  attn_tensor in = from_arena(g, x, layout->rows, layer->options.hidden);
  attn_mixer_call call = call_of(layer, layout, state);
  attn_var *out =
      in.data ? attn_mixer_apply(g, layer->mixer, &call, attn_graph_input(g, &in)) : NULL;
  if (attn_graph_status(g) != ATTN_OK) return attn_graph_status(g);
  assert_non_null(out);
  assert_int_equal(out->value.rank, 2);
  assert_int_equal(out->value.dtype, layer->compute);
  assert_int_equal(out->value.shape[0], layout->rows);
  assert_int_equal(out->value.shape[1], layer->options.hidden);
  to_doubles(&out->value, y);
  return ATTN_OK;
}

attn_status test_layer_forward(const test_layer *layer, const attn_layout *layout, const double *x,
                               double *y) {
  return run(layer, layout, NULL, x, y);
}

attn_status test_layer_continue(const test_layer *layer, attn_state *state, int64_t rows,
                                const double *x, double *y) {
  attn_layout layout = attn_layout_equal(1, rows);
  layout.position = attn_state_position(state);
  ATTN_TRY(run(layer, &layout, state, x, y));
  attn_state_advance(state, rows);
  return ATTN_OK;
}

attn_status test_state_create(const test_layer *layer, int64_t capacity, int64_t sharers,
                              const attn_state *family, attn_state **state) {
  attn_state_part parts[ATTN_STATE_PARTS];
  int count = layer->mixer->state(&layer->options, layer->compute, parts);
  assert_in_range(count, 1, ATTN_STATE_PARTS);
  return attn_state_create(test_device(), parts, count, capacity, sharers, family, state);
}

/* sum(r (.) y) as a product with one row, r, on the tape. */
static attn_var *weighted_sum(const test_layer *layer, attn_var *y, attn_parameter *row) {
  int64_t count = y ? attn_tensor_count(&y->value) : 0;
  y = attn_view_reshape(layer->graph, y, 2, (int64_t[]){1, count});
  return attn_op_linear(layer->graph, y, row);
}

static attn_status make_row(const test_layer *layer, const double *r, int64_t count,
                            attn_parameter *row) {
  *row = (attn_parameter){.name = "r"};
  ATTN_TRY(
      attn_tensor_create_on(test_device(), layer->compute, 2, (int64_t[]){1, count}, &row->value));
  attn_tensor source;
  ATTN_TRY(attn_tensor_wrap((void *)(uintptr_t)r, ATTN_F64, 2, row->value.shape, &source));
  ATTN_TRY(attn_tensor_copy(&source, &row->value));
  ATTN_TRY(attn_weight_create(1, count, layer->compute, &row->weight));
  return attn_weight_set(row->weight, &row->value);
}

static attn_status backward(const test_layer *layer, const attn_layout *layout, const double *x,
                            attn_parameter *row, double *dx) {
  attn_graph *g = layer->graph;
  attn_tensor in = from_arena(g, x, layout->rows, layer->options.hidden);
  attn_var *leaf = in.data ? attn_graph_leaf(g, &in) : NULL;
  attn_mixer_call call = call_of(layer, layout, NULL);
  attn_var *y = attn_mixer_apply(g, layer->mixer, &call, leaf);
  attn_var *loss = weighted_sum(layer, y, row);
  if (attn_graph_status(g) != ATTN_OK) return attn_graph_status(g);
  assert_non_null(loss);
  ATTN_TRY(attn_graph_backward(g, loss, 1));
  assert_non_null(leaf->gradient.data);
  to_doubles(&leaf->gradient, dx);
  if (call.context) {
    assert_non_null(call.context->gradient.data);
    to_doubles(&call.context->gradient, layer->d_context);
  }
  return ATTN_OK;
}

attn_status test_layer_gradients(const test_layer *layer, const attn_layout *layout,
                                 const double *x, const double *r, double *dx,
                                 double *const *d_parameters) {
  attn_parameter row;
  attn_graph_reset(layer->graph, true);
  for (int i = 0; i < layer->count; ++i)
    if (!layer->shapes[i].statistic) assert_ok(attn_tensor_fill(&layer->parameters[i].gradient, 0));
  attn_status status = make_row(layer, r, layout->rows * layer->options.hidden, &row);
  if (status == ATTN_OK) leave_room(layer);
  if (status == ATTN_OK) status = backward(layer, layout, x, &row, dx);
  for (int i = 0; i < layer->count && status == ATTN_OK; ++i)
    if (!layer->shapes[i].statistic) to_doubles(&layer->parameters[i].gradient, d_parameters[i]);
  attn_weight_destroy(row.weight);
  attn_tensor_destroy(&row.value);
  return status;
}

/* Judging ---------------------------------------------------------------------------------------
 */

void test_layer_oracle(const test_layer *layer, const attn_layout *layout, const double *x,
                       const double *const *parameters, double *y) {
  const attn_layout *keys = &layer->context_layout;
  for (int64_t b = 0; b < layout->batch; ++b) {
    int64_t first = attn_layout_first(layout, b) * layer->options.hidden;
    if (layer->context) {
      layer->cross_oracle(&layer->options, attn_layout_length(layout, b), x + first,
                          attn_layout_length(keys, b),
                          layer->context + attn_layout_first(keys, b) * layer->options.hidden,
                          parameters, y + first);
      continue;
    }
    layer->oracle(&layer->options, attn_layout_length(layout, b), x + first, parameters, y + first);
  }
}

double test_operation_error(attn_dtype dtype) {
  return dtype == ATTN_F64 ? 0x1p-53 : dtype == ATTN_F32 ? 2e-7 : 0x1p-9;
}

static double *moved(const test_layer *layer, const double *x, int64_t count, attn_dtype dtype,
                     uint64_t seed) {
  double size = test_operation_error(dtype) * (layer->moves > 0 ? layer->moves : 1);
  double *y = malloc((size_t)(count + 1) * sizeof *y);
  attn_random random = {.seed = seed};
  for (int64_t i = 0; i < count; ++i)
    y[i] = x[i] * (1 + size * (2 * attn_random_uniform(&random) - 1));
  return y;
}

double *test_moved_inputs(const test_layer *layer, const double *x, int64_t count) {
  return moved(layer, x, count, layer->compute, 1);
}

void test_moved_parameters(const test_layer *layer, double *parameters[ATTN_MIXER_PARAMETERS]) {
  for (int i = 0; i < layer->count; ++i)
    parameters[i] = moved(layer, layer->values[i], test_parameter_count(layer, i), held(layer, i),
                          2 + (uint64_t)i);
}

double test_layer_tolerance(const test_layer *layer, const attn_layout *layout, const double *x,
                            const double *expected) {
  if (layer->compute == ATTN_F64) return TEST_FLOAT64_ERROR;
  int64_t count = layout->rows * layer->options.hidden;
  double *parameters[ATTN_MIXER_PARAMETERS], *in = test_moved_inputs(layer, x, count);
  double *y = malloc((size_t)count * sizeof *y);
  test_moved_parameters(layer, parameters);
  test_layer near = *layer;
  double *context = NULL;
  if (layer->context)
    near.context = context = test_moved_inputs(layer, layer->context,
                                               layer->context_layout.rows * layer->options.hidden);
  test_layer_oracle(&near, layout, in, (const double *const *)parameters, y);
  free(context);
  double error = test_relative_error(y, expected, count);
  test_parameters_free(layer, parameters);
  free(in), free(y);
  /* The result is rounded too: all that spikes let through may be that. */
  return fmax(TEST_ROUNDINGS_IN_LAYERS * error, test_operation_error(layer->compute));
}

void test_assert_close(const test_layer *layer, const char *what, const double *a, const double *b,
                       int64_t count, double limit) {
  double error = test_relative_error(a, b, count);
  if (!(error <= limit))
    fail_msg("%s: %s differs by %.3g, at most %.3g", test_case_name(layer), what, error, limit);
}

void test_assert_same_bits(const test_layer *layer, const char *what, const double *a,
                           const double *b, int64_t count) {
  /* Products of many rows are cuBLASLt's there: its sums depend on where operands lie. */
  if (layer->compute == ATTN_F64 && attn_is_cuda(test_device())) {
    test_assert_close(layer, what, a, b, count, TEST_FLOAT64_ERROR);
    return;
  }
  for (int64_t i = 0; i < count; ++i)
    if (memcmp(&a[i], &b[i], sizeof *a) != 0)
      fail_msg("%s: %s: element %lld of %lld is %.17g, not %.17g", test_case_name(layer), what,
               (long long)i, (long long)count, a[i], b[i]);
}
