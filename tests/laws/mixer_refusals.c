/* Bad input is refused with a message and harms nothing, for every mixer of the table: options,
 * shapes, layouts, and memory that runs out at any allocation. */
#include "support/mixers.h"

#include "base/fault.h"
#include "base/memory.h"
#include "base/random.h"

#include <math.h>
#include <string.h>

/* Options ---------------------------------------------------------------------------------------
 */

#define FIELD(name) offsetof(attn_mixer_options, name)
static const size_t integers[] = {
    FIELD(hidden),       FIELD(heads),          FIELD(kv_heads),     FIELD(dim),
    FIELD(value_dim),    FIELD(window),         FIELD(layer),        FIELD(rotary_dim),
    FIELD(convolution),  FIELD(layers),         FIELD(gate_rank),    FIELD(feature_dim),
    FIELD(block),        FIELD(memory_dim),     FIELD(memory_width), FIELD(memory_window),
    FIELD(memory_chunk), FIELD(feature_degree), FIELD(newton_schulz)};
static const size_t numbers[] = {FIELD(rope.base), FIELD(soft_cap), FIELD(scale),
                                 FIELD(norm_epsilon), FIELD(theta)};
enum { INTEGERS = sizeof integers / sizeof *integers, NUMBERS = sizeof numbers / sizeof *numbers };

static void set_integer(attn_mixer_options *o, int field, int64_t value) {
  memcpy((char *)o + integers[field], &value, sizeof value);
}

static void set_number(attn_mixer_options *o, int field, double value) {
  memcpy((char *)o + numbers[field], &value, sizeof value);
}

static void assert_refused(const attn_mixer *mixer, attn_mixer_options options) {
  assert_int_equal(mixer->configure(&options), ATTN_INVALID_ARGUMENT);
  assert_non_null(strstr(attn_error_message(), mixer->info.name)); /* says who refuses */
}

/* Sizes that nothing can have, one at a time. */
static void each_field_has_a_range(const attn_mixer *mixer, const attn_mixer_options *options) {
  const int64_t never[] = {INT64_MIN, INT64_MIN + 1, -2, (int64_t)1 << 40, INT64_MAX};
  const double never_numbers[] = {NAN, INFINITY, -INFINITY, -1, -1e-300};
  for (int f = 0; f < INTEGERS; ++f)
    for (size_t i = 0; i < sizeof never / sizeof *never; ++i) {
      attn_mixer_options bad = *options;
      set_integer(&bad, f, never[i]);
      assert_refused(mixer, bad);
    }
  for (int f = 0; f < NUMBERS; ++f)
    for (size_t i = 0; i < sizeof never_numbers / sizeof *never_numbers; ++i) {
      attn_mixer_options bad = *options;
      set_number(&bad, f, never_numbers[i]);
      assert_refused(mixer, bad);
    }
  attn_mixer_options bad = *options;
  bad.schedule = (attn_decay_schedule)7;
  assert_refused(mixer, bad);
  bad = *options;
  bad.feature_map = (attn_feature_map)99;
  assert_refused(mixer, bad);
  bad = *options;
  bad.hidden = 0;
  assert_refused(mixer, bad);
  bad = *options;
  bad.memory = (attn_memory_kind)9;
  assert_refused(mixer, bad);
}

static void assert_usable(const attn_mixer *mixer, const attn_mixer_options *o) {
  attn_parameter_shape shapes[ATTN_MIXER_PARAMETERS];
  attn_state_part parts[ATTN_STATE_PARTS];
  int count = mixer->parameters(o, shapes);
  assert_in_range(count, 1, ATTN_MIXER_PARAMETERS);
  for (int i = 0; i < count; ++i)
    for (int axis = 0; axis < shapes[i].rank; ++axis)
      assert_in_range(shapes[i].shape[axis], 1, (int64_t)1 << 30);
  count = mixer->state(o, ATTN_BF16, parts);
  assert_in_range(count, 1, ATTN_STATE_PARTS);
  for (int i = 0; i < count; ++i)
    for (int axis = 0; axis < parts[i].rank; ++axis)
      assert_in_range(parts[i].shape[axis], 0, (int64_t)1 << 30);
  attn_mixer_options again = *o; /* defaults that were filled in are not refused */
  assert_ok(mixer->configure(&again));
  assert_memory_equal(&again.hidden, &o->hidden, sizeof again.hidden);
  assert_int_equal(again.heads, o->heads);
  assert_int_equal(again.kv_heads, o->kv_heads);
  assert_int_equal(again.dim, o->dim);
  assert_int_equal(again.value_dim, o->value_dim);
  assert_int_equal(again.rotary_dim, o->rotary_dim);
  assert_int_equal(again.convolution, o->convolution);
  assert_int_equal(again.gate_rank, o->gate_rank);
  assert_int_equal(again.feature_map, o->feature_map);
  assert_int_equal(again.feature_dim, o->feature_dim);
  assert_int_equal(again.block, o->block);
  assert_int_equal(again.memory, o->memory);
  assert_int_equal(again.memory_width, o->memory_width);
  assert_int_equal(again.memory_window, o->memory_window);
  assert_int_equal(again.memory_chunk, o->memory_chunk);
  assert_int_equal(again.feature_degree, o->feature_degree);
  assert_int_equal(again.newton_schulz, o->newton_schulz);
}

/* Any mixture of small, large and absurd is refused or leads to sizes that make sense. */
static void mixtures(const attn_mixer *mixer, const attn_mixer_options *options) {
  const int64_t pool[] = {0,  0,  0,  1,   2,   3,   4,   7,       8,         16,        64,
                          -1, 96, 65, 128, 256, 257, 512, 1 << 14, INT32_MAX, INT64_MAX, INT64_MIN};
  const uint64_t size = sizeof pool / sizeof *pool;
  attn_random random = {.seed = 5};
  int accepted = 0;
  for (int round = 0; round < 4000; ++round) {
    attn_mixer_options o = *options;
    for (int f = 0; f < INTEGERS; ++f) {
      /* mostly the harmless beginning, so that some pass and the later checks are reached */
      uint64_t reach = attn_random_below(&random, 8) ? 3 + size / 2 : size;
      if (attn_random_below(&random, 2))
        set_integer(&o, f, pool[attn_random_below(&random, reach)]);
    }
    attn_status status = mixer->configure(&o);
    if (status == ATTN_OK) {
      ++accepted;
      assert_usable(mixer, &o);
    } else {
      assert_int_equal(status, ATTN_INVALID_ARGUMENT);
    }
  }
  assert_in_range(accepted, 20, 3980);
}

static void test_options(void **state) {
  (void)state;
  test_each_mixer(each_field_has_a_range);
  test_each_mixer(mixtures);
}

static const attn_mixer *find(const char *name) {
  int index = -1;
  assert_ok(attn_mixer_find(name, &index));
  return attn_mixer_at(index);
}

/* Fields that are fine alone and not together. */
static void test_inconsistent_options(void **state) {
  static const test_case bad[] = {
      {"softmax", "groups", {.hidden = 32, .heads = 4, .kv_heads = 3}},
      {"softmax", "more key heads", {.hidden = 32, .heads = 2, .kv_heads = 4}},
      {"softmax", "no channel", {.hidden = 3, .heads = 4}},
      {"softmax", "odd rotation", {.hidden = 32, .heads = 2, .rotary_dim = 5}},
      {"softmax", "odd rotation", {.hidden = 32, .heads = 2, .rotary_dim = 1}},
      {"softmax", "wide rotation", {.hidden = 32, .heads = 2, .rotary_dim = 18}},
      {"softmax", "base", {.hidden = 32, .heads = 2, .rope.base = 1}},
      {"lightning", "both ways", {.hidden = 32, .heads = 4, .layers = 2, .bidirectional = true}},
      {"kda", "both ways", {.hidden = 32, .heads = 4, .bidirectional = true}},
      {"lightning", "groups", {.hidden = 32, .heads = 4, .kv_heads = 2, .layers = 2}},
      {"lightning", "values", {.hidden = 32, .heads = 4, .value_dim = 4, .layers = 2}},
      {"lightning", "layer", {.hidden = 32, .heads = 4, .layer = 2, .layers = 2}},
      {"lightning", "layers", {.hidden = 32, .heads = 4}},
      {"lightning", "lrpe", {.hidden = 32, .dim = 129, .heads = 1, .layers = 1, .lrpe = true}},
      {"gla", "groups", {.hidden = 32, .heads = 4, .kv_heads = 2}},
      {"hedgehog", "groups", {.hidden = 32, .heads = 4, .kv_heads = 2}},
      {"hedgehog", "features", {.hidden = 32, .heads = 4, .feature_dim = 129}},
      {"hedgehog", "wide heads", {.hidden = 258, .heads = 2}},
      {"hedgehog", "odd rotation", {.hidden = 32, .heads = 2, .rotary_dim = 5}},
      {"hedgehog", "features", {.hidden = 32, .heads = 4, .feature_map = ATTN_FEATURES_ELU}},
      {"lawcat", "groups", {.hidden = 32, .heads = 4, .kv_heads = 3}},
      {"lawcat", "features", {.hidden = 32, .heads = 4, .feature_dim = 129}},
      {"lawcat", "feature map", {.hidden = 32, .heads = 4, .feature_map = ATTN_FEATURES_EXP}},
      {"lawcat", "taps", {.hidden = 32, .heads = 4, .convolution = 17}},
      {"lmu", "groups", {.hidden = 32, .heads = 4, .kv_heads = 2}},
      {"lmu", "coefficients", {.hidden = 32, .memory_dim = 1025}},
      {"lmu", "short memory", {.hidden = 32, .theta = 0.5}},
      {"lolcats", "groups", {.hidden = 32, .heads = 4, .kv_heads = 3}},
      {"lolcats", "features", {.hidden = 32, .heads = 4, .feature_dim = 129}},
      {"lolcats", "feature map", {.hidden = 32, .heads = 4, .feature_map = ATTN_FEATURES_EXP}},
      {"lolcats", "values", {.hidden = 32, .heads = 1, .value_dim = 256}},
      {"lolcats", "window", {.hidden = 32, .heads = 4, .block = (1 << 16) + 1}},
      {"lolcats", "kind", {.hidden = 32, .heads = 4, .window_kind = ATTN_WINDOW_SLIDING + 1}},
      {"lolcats", "both ways", {.hidden = 32, .heads = 4, .bidirectional = true}},
      {"norm_attention", "groups", {.hidden = 32, .heads = 4, .kv_heads = 2}},
      {"norm_attention", "features", {.hidden = 32, .heads = 4, .feature_map = ATTN_FEATURES_EXP}},
      {"diag_attention",
       "ReLU, groups",
       {.hidden = 32, .heads = 4, .kv_heads = 2, .relu_scores = true}},
      {"diag_attention",
       "ReLU, large blocks",
       {.hidden = 32, .heads = 4, .block = 1025, .relu_scores = true}},
      {"based", "both ways", {.hidden = 32, .heads = 4, .bidirectional = true}},
      {"diag_attention", "groups", {.hidden = 32, .heads = 4, .kv_heads = 3}},
      {"diag_attention", "block", {.hidden = 32, .heads = 4, .block = (1 << 16) + 1}},
      {"aaren", "groups", {.hidden = 32, .heads = 4, .kv_heads = 2}},
      {"based", "groups", {.hidden = 32, .heads = 4, .kv_heads = 2}},
      {"based", "features", {.hidden = 32, .heads = 4, .feature_dim = 22}},
      {"titans", "groups", {.hidden = 32, .heads = 4, .kv_heads = 3}},
      {"titans", "taps", {.hidden = 32, .heads = 2, .convolution = 17}},
      {"titans", "chunk", {.hidden = 32, .heads = 2, .memory_chunk = 1025}},
      {"omega_net", "groups", {.hidden = 32, .heads = 4, .kv_heads = 3}},
      {"omega_net", "features", {.hidden = 32, .heads = 2, .feature_dim = 90}},
      {"omega_net", "degree", {.hidden = 32, .heads = 2, .feature_degree = 7}},
      {"omega_net", "window", {.hidden = 32, .heads = 2, .memory_window = 1025}},
      {"atlas", "steps", {.hidden = 32, .heads = 2, .newton_schulz = 17}},
      {"atlas", "features", {.hidden = 32, .heads = 2, .feature_dim = 16, .feature_degree = 5}},
      {"delta_net", "groups", {.hidden = 32, .heads = 4, .kv_heads = 3}},
      {"gated_delta_net", "groups", {.hidden = 32, .heads = 6, .kv_heads = 4}},
      {"kda", "groups", {.hidden = 32, .heads = 6, .kv_heads = 5}},
      {"kda", "taps", {.hidden = 32, .heads = 2, .convolution = 17}},
  };
  (void)state;
  for (size_t i = 0; i < sizeof bad / sizeof *bad; ++i)
    assert_refused(find(bad[i].mixer), bad[i].options);
}

/* What published layers have where a configuration says nothing. */
static void test_defaults(void **state) {
  (void)state;
  attn_mixer_options o = {.hidden = 1024, .layers = 24};
  assert_ok(find("lightning")->configure(&o)); /* the 385M model: 8 heads */
  assert_int_equal(o.heads, 8);
  assert_int_equal(o.dim, 128);
  o = (attn_mixer_options){.hidden = 1024};
  assert_ok(find("gla")->configure(&o)); /* keys d / 2, values d, 4 heads, rank 16 */
  assert_int_equal(o.heads, 4);
  assert_int_equal(o.heads * o.dim, 512);
  assert_int_equal(o.heads * o.value_dim, 1024);
  assert_int_equal(o.gate_rank, 16);
  o = (attn_mixer_options){.hidden = 4096};
  assert_ok(find("kda")->configure(&o)); /* 32 heads of 128, rank = head dim, eps 1e-5 */
  assert_int_equal(o.heads, 32);
  assert_int_equal(o.dim, 128);
  assert_int_equal(o.value_dim, 128);
  assert_int_equal(o.gate_rank, 128);
  assert_int_equal(o.convolution, 4);
  assert_true(o.norm_epsilon == 1e-5);
  o = (attn_mixer_options){.hidden = 2048};
  assert_ok(find("gated_delta_net")->configure(&o)); /* keys 1536 = 6 x 256, values twice that */
  assert_int_equal(o.heads * o.dim, 1536);
  assert_int_equal(o.value_dim, 2 * o.dim);
  o = (attn_mixer_options){.hidden = 2048, .heads = 32, .kv_heads = 8};
  assert_ok(find("lawcat")->configure(&o)); /* of Llama 3.2 1B: as many features as channels */
  assert_int_equal(o.feature_dim, 32);
  assert_int_equal(o.gate_rank, 16);
  assert_int_equal(o.convolution, 4);
  o = (attn_mixer_options){.hidden = 4096, .heads = 32, .kv_heads = 8};
  assert_ok(find("lolcats")->configure(&o)); /* of Llama 3 8B: 128 features, a terrace of 64 */
  assert_int_equal(o.feature_dim, 64);
  assert_int_equal(o.block, 64);
  assert_int_equal(o.window_kind, ATTN_WINDOW_TERRACE);
  o = (attn_mixer_options){.hidden = 1024};
  assert_ok(find("delta_net")->configure(&o));
  assert_int_equal(o.heads * o.dim, 1024);
}

static void test_table(void **state) {
  (void)state;
  attn_mixer_info info;
  int64_t fixed, per_token;
  int index = 99, count = attn_mixer_count();
  assert_int_equal(attn_mixer_find("nothing", &index), ATTN_NOT_FOUND);
  assert_non_null(strstr(attn_error_message(), "lightning")); /* names what there is */
  assert_int_equal(attn_mixer_find(NULL, &index), ATTN_NOT_FOUND);
  assert_int_equal(attn_mixer_find("softmax", NULL), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_mixer_get_info(-1, &info), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_mixer_get_info(count, &info), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_mixer_get_info(0, NULL), ATTN_INVALID_ARGUMENT);
  assert_null(attn_mixer_at(-1));
  assert_null(attn_mixer_at(count));
  for (int i = 0; i < count; ++i) {
    assert_ok(attn_mixer_get_info(i, &info));
    assert_ok(attn_mixer_find(info.name, &index));
    assert_int_equal(index, i);
    assert_true(info.title[0] && info.arxiv[0] && info.summary[0]);
    assert_ok(attn_mixer_state_bytes(i, 256, 2, 128, 2, &fixed, &per_token));
    assert_true(fixed + per_token > 0);
    assert_int_equal(attn_mixer_state_bytes(i, -5, 2, 128, 2, &fixed, &per_token),
                     ATTN_INVALID_ARGUMENT);
    assert_int_equal(attn_mixer_state_bytes(i, 256, 2, 128, 3, &fixed, &per_token),
                     ATTN_INVALID_ARGUMENT);
    assert_int_equal(attn_mixer_state_bytes(i, 256, 2, 128, 2, NULL, &per_token),
                     ATTN_INVALID_ARGUMENT);
  }
  assert_int_equal(attn_mixer_state_bytes(count, 256, 2, 128, 2, &fixed, &per_token),
                   ATTN_INVALID_ARGUMENT);
  /* 2 heads of 128 x 128 float32; keys and values of 2 heads of 128 in bfloat16 */
  assert_ok(attn_mixer_find("lightning", &index));
  assert_ok(attn_mixer_state_bytes(index, 256, 2, 128, 2, &fixed, &per_token));
  assert_int_equal(fixed, 2 * 128 * 128 * 4);
  assert_int_equal(per_token, 0);
  assert_ok(attn_mixer_find("softmax", &index));
  assert_ok(attn_mixer_state_bytes(index, 256, 2, 128, 2, &fixed, &per_token));
  assert_int_equal(fixed, 0);
  assert_int_equal(per_token, 2 * 2 * 128 * 2);
}

/* Shapes ----------------------------------------------------------------------------------------
 */

static attn_status apply_to(test_layer *layer, const attn_layout *layout, int rank,
                            const int64_t *shape) {
  attn_graph *g = layer->graph;
  attn_graph_reset(g, false);
  attn_tensor x = attn_graph_tensor(g, layer->compute, rank, shape);
  assert_ok(attn_tensor_fill(&x, 0.5));
  attn_mixer_call call = {
      .options = &layer->options, .parameters = layer->pointers, .layout = *layout};
  attn_var *y = attn_mixer_apply(g, layer->mixer, &call, attn_graph_input(g, &x));
  if (attn_graph_status(g) != ATTN_OK) {
    assert_null(y);
    assert_non_null(strstr(attn_error_message(), layer->mixer->info.name));
  }
  return attn_graph_status(g);
}

static void shapes_are_checked(const attn_mixer *mixer, const attn_mixer_options *options) {
  const int32_t good[] = {0, 2, 6}, late[] = {1, 2, 6}, back[] = {0, 4, 2, 6}, end[] = {0, 2, 5};
  test_layer layer;
  assert_ok(test_layer_create(&layer, mixer, options, ATTN_F32, false));
  int64_t hidden = layer.options.hidden;
  attn_layout six = attn_layout_equal(2, 3);
  assert_ok(apply_to(&layer, &six, 2, (int64_t[]){6, hidden}));
  const struct {
    int rank;
    int64_t shape[3];
  } shapes[] = {{2, {6, hidden + 1}}, {2, {6, hidden - 1}}, {2, {5, hidden}},    {2, {0, hidden}},
                {1, {6 * hidden}},    {3, {2, 3, hidden}},  {3, {6, hidden, 1}}, {2, {hidden, 6}}};
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; ++i)
    assert_int_equal(apply_to(&layer, &six, shapes[i].rank, shapes[i].shape), ATTN_INVALID_SHAPE);

  attn_layout packed = attn_layout_packed(2, good);
  assert_ok(apply_to(&layer, &packed, 2, (int64_t[]){6, hidden}));
  attn_layout layouts[] = {six, six, six, six, six, packed, packed, packed, packed};
  layouts[0].length = 4;
  layouts[1].batch = 0;
  layouts[2].length = INT64_MAX;
  layouts[3].batch = layouts[3].length = (int64_t)1 << 32; /* whose product wraps to 0 */
  layouts[4].position = -1;
  layouts[5].offsets = late;
  layouts[6].offsets = back;
  layouts[6].batch = 3;
  layouts[7].offsets = end;
  layouts[8].length = 3; /* shorter than the longest */
  for (size_t i = 0; i < sizeof layouts / sizeof *layouts; ++i)
    assert_int_equal(apply_to(&layer, &layouts[i], 2, (int64_t[]){6, hidden}), ATTN_INVALID_SHAPE);
  attn_layout none = attn_layout_equal(1, 0);
  assert_int_equal(apply_to(&layer, &none, 2, (int64_t[]){0, hidden}), ATTN_INVALID_SHAPE);
  assert_ok(apply_to(&layer, &six, 2, (int64_t[]){6, hidden}));
  test_layer_destroy(&layer);
}

static void test_shapes(void **state) {
  (void)state;
  test_each_mixer(shapes_are_checked);
}

/* Contexts --------------------------------------------------------------------------------------
 */

static attn_status apply_across(test_layer *layer, const attn_layout *layout,
                                const attn_layout *context_layout, int64_t rows, int64_t width,
                                attn_state *state) {
  attn_graph *g = layer->graph;
  attn_graph_reset(g, false);
  attn_tensor x =
      attn_graph_tensor(g, layer->compute, 2, (int64_t[]){layout->rows, layer->options.hidden});
  attn_tensor context = attn_graph_tensor(g, layer->compute, 2, (int64_t[]){rows, width});
  assert_ok(attn_tensor_fill(&x, 0.5));
  assert_ok(attn_tensor_fill(&context, 0.5));
  attn_mixer_call call = {.options = &layer->options,
                          .parameters = layer->pointers,
                          .layout = *layout,
                          .state = state,
                          .context = attn_graph_input(g, &context),
                          .context_layout = *context_layout};
  attn_var *y = attn_mixer_apply(g, layer->mixer, &call, attn_graph_input(g, &x));
  if (attn_graph_status(g) != ATTN_OK) {
    assert_null(y);
    assert_non_null(strstr(attn_error_message(), layer->mixer->info.name));
  }
  return attn_graph_status(g);
}

static void contexts_are_checked(const attn_mixer *mixer, const attn_mixer_options *options) {
  const int32_t empty[] = {0, 4, 4}, late[] = {1, 2, 4};
  test_layer layer;
  assert_ok(test_layer_create(&layer, mixer, options, ATTN_F32, false));
  int64_t hidden = layer.options.hidden;
  attn_layout six = attn_layout_equal(2, 3), four = attn_layout_equal(2, 2), one = six;
  one.batch = 1, one.length = 6;
  attn_layout without = attn_layout_packed(2, empty), shifted = attn_layout_packed(2, late);
  bool crosses = mixer->info.abilities & ATTN_ABILITY_CROSS;
  assert_int_equal(apply_across(&layer, &six, &four, 4, hidden, NULL),
                   crosses ? ATTN_OK : ATTN_UNSUPPORTED);
  if (crosses) {
    attn_state *state = NULL;
    assert_int_equal(apply_across(&layer, &six, &four, 5, hidden, NULL), ATTN_INVALID_SHAPE);
    assert_int_equal(apply_across(&layer, &six, &four, 4, hidden + 1, NULL), ATTN_INVALID_SHAPE);
    assert_int_equal(apply_across(&layer, &one, &four, 4, hidden, NULL), ATTN_INVALID_SHAPE);
    assert_int_equal(apply_across(&layer, &six, &shifted, 4, hidden, NULL), ATTN_INVALID_SHAPE);
    assert_int_equal(apply_across(&layer, &six, &without, 4, hidden, NULL), ATTN_INVALID_ARGUMENT);
    assert_ok(test_state_create(&layer, 10, 1, NULL, &state));
    attn_layout alone = attn_layout_equal(1, 3);
    assert_int_equal(apply_across(&layer, &alone, &alone, 3, hidden, state), ATTN_UNSUPPORTED);
    layer.options.window = 2;
    assert_int_equal(apply_across(&layer, &six, &four, 4, hidden, NULL), ATTN_UNSUPPORTED);
    attn_state_destroy(state);
  }
  test_layer_destroy(&layer);
}

static void test_contexts(void **state) {
  (void)state;
  test_each_mixer(contexts_are_checked);
}

/* Memory ----------------------------------------------------------------------------------------
 */

enum { ROWS = 70 };

/* Trains once and decodes in two pieces; the first error. */
static attn_status use_layer(test_layer *layer, attn_state **state, const double *x, double *y) {
  attn_layout layout = attn_layout_equal(1, ROWS);
  double *d_parameters[ATTN_MIXER_PARAMETERS];
  double *dx = malloc((size_t)(ROWS * layer->options.hidden) * sizeof *dx);
  test_parameters_alloc(layer, d_parameters);
  attn_status status = test_layer_forward(layer, &layout, x, y);
  if (status == ATTN_OK) status = test_layer_gradients(layer, &layout, x, x, dx, d_parameters);
  if (status == ATTN_OK) status = test_state_create(layer, ROWS, 1, NULL, state);
  if (status == ATTN_OK) status = test_layer_continue(layer, *state, ROWS - 5, x, y);
  if (status == ATTN_OK)
    status = test_layer_continue(layer, *state, 5, x + (ROWS - 5) * layer->options.hidden, y);
  test_parameters_free(layer, d_parameters);
  free(dx);
  return status;
}

/* The layer's own memory and the tape's are made to fail at every allocation in turn; what fails
 * can be used again once there is memory. */
static void survives_every_failure(const attn_mixer *mixer, const attn_mixer_options *options) {
  const attn_dtype dtypes[] = {ATTN_F64, ATTN_F32, ATTN_BF16};
  for (int d = 0; d < 3; ++d) {
    size_t live = attn_memory_get_stats().live_bytes;
    int64_t hidden = options->hidden, n = 0;
    double *x = malloc((size_t)(ROWS * hidden) * sizeof *x),
           *y = malloc((size_t)(ROWS * hidden) * sizeof *y);
    test_fill_normal(x, ROWS * hidden, 0, 1, 3);
    for (bool failed = true; failed; ++n) {
      test_layer layer;
      attn_state *state = NULL;
      attn_fault_arm(ATTN_FAULT_ALLOC, n);
      attn_status status = test_layer_create(&layer, mixer, options, dtypes[d], true);
      bool created = status == ATTN_OK;
      if (created) status = use_layer(&layer, &state, x, y);
      failed = attn_fault_disarm(ATTN_FAULT_ALLOC);
      if (status != (failed ? ATTN_OUT_OF_MEMORY : ATTN_OK))
        fail_msg("%s: allocation %lld fails: %s (%s)", test_case_name(&layer), (long long)n,
                 attn_status_name(status), attn_error_message());
      attn_state_destroy(state);
      state = NULL;
      if (created && failed && n % 7 == 0) assert_ok(use_layer(&layer, &state, x, y));
      attn_state_destroy(state);
      test_layer_destroy(&layer);
      if (attn_memory_get_stats().live_bytes != live)
        fail_msg("%s, %s: allocation %lld fails: %lld bytes leak", mixer->info.name,
                 attn_dtype_name(dtypes[d]), (long long)n,
                 (long long)(attn_memory_get_stats().live_bytes - live));
    }
    assert_true(n > 10);
    free(x), free(y);
  }
}

static void test_memory(void **state) {
  (void)state;
  test_needs_cpu(); /* whose allocator fails */
  test_each_mixer(survives_every_failure);
}

/* The tape's arena is large, so that it seldom asks for memory. Here it is nearly full, by every
 * amount up to what a run needs, and cannot grow: each piece that a mixer takes from it is the one
 * that fails. */
static void survive_full_arena(const attn_mixer *mixer, const attn_mixer_options *options,
                               bool across) {
  const size_t step = 700; /* less than most pieces at the start; workspaces are larger */
  test_layer layer;
  assert_ok(test_layer_create(&layer, mixer, options, ATTN_F32, true));
  attn_layout layout = attn_layout_equal(1, 12);
  int64_t count = layout.rows * layer.options.hidden;
  double *x = test_inputs(&layer, count, 3), *y = calloc((size_t)count, sizeof *y);
  double *expected = calloc((size_t)count, sizeof *y), *d_parameters[ATTN_MIXER_PARAMETERS];
  double *d_context = calloc((size_t)count, sizeof *d_context);
  attn_state *state = NULL;
  test_parameters_alloc(&layer, d_parameters);
  assert_ok(test_state_create(&layer, 100, 1, NULL, &state));
  if (across) {
    layer.context = x;
    layer.context_layout = layout;
    layer.d_context = d_context;
  }
  assert_ok(test_layer_gradients(&layer, &layout, x, x, y, d_parameters));
  assert_ok(test_layer_forward(&layer, &layout, x, expected));
  if (!across) assert_ok(test_layer_continue(&layer, state, layout.rows, x, y));
  for (int use = 0; use < 3; ++use) {
    if (across && use == 1) continue; /* there is no state */
    bool failed = true;
    size_t room = 1, capacity = attn_arena_capacity(layer.graph->arena);
    for (; failed && room <= capacity; room += room / 20 > step ? room / 20 : step) {
      layer.room = room;
      attn_state_clear(state);
      attn_status status = use == 0 ? test_layer_forward(&layer, &layout, x, y)
                           : use == 1
                               ? test_layer_continue(&layer, state, layout.rows, x, y)
                               : test_layer_gradients(&layer, &layout, x, x, y, d_parameters);
      failed = attn_fault_disarm(ATTN_FAULT_ALLOC);
      assert_int_equal(status, failed ? ATTN_OUT_OF_MEMORY : ATTN_OK);
    }
    assert_true(room > 10 * step);
    if (use < 2) assert_false(failed); /* the sum's own weight is new each time, and packed */
  }
  layer.room = 0;
  assert_ok(test_layer_forward(&layer, &layout, x, y));
  test_assert_same_bits(&layer, "y once there is memory", y, expected, count);
  attn_state_destroy(state);
  test_parameters_free(&layer, d_parameters);
  free(x), free(y), free(expected), free(d_context);
  test_layer_destroy(&layer);
}

static void survives_a_full_arena(const attn_mixer *mixer, const attn_mixer_options *options) {
  survive_full_arena(mixer, options, false);
  if (mixer->info.abilities & ATTN_ABILITY_CROSS && !options->window)
    survive_full_arena(mixer, options, true);
}

static void test_full_arena(void **state) {
  (void)state;
  test_needs_cpu(); /* whose allocator fails */
  test_each_causal_case(survives_a_full_arena);
}

int main(int argc, char **argv) {
  if (argc > 1) cmocka_set_test_filter(argv[1]); /* a pattern of names */
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_options),    cmocka_unit_test(test_inconsistent_options),
      cmocka_unit_test(test_defaults),   cmocka_unit_test(test_table),
      cmocka_unit_test(test_shapes),     cmocka_unit_test(test_memory),
      cmocka_unit_test(test_full_arena), cmocka_unit_test(test_contexts),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
