/* Identities of the catalogue's entries, on whole layers: limits in which one mixer becomes another
 * or something simple, and changes that must not matter. All in float64. */
#include "support/mixers.h"

#include <math.h>
#include <string.h>

/* float64 rounding through a layer; as for the oracle */
static const double close = TEST_FLOAT64_ERROR;

static void create(test_layer *layer, const char *name, attn_mixer_options options) {
  int index = -1;
  assert_ok(attn_mixer_find(name, &index));
  assert_ok(test_layer_create(layer, attn_mixer_at(index), &options, ATTN_F64, false));
}

static double *apply(const test_layer *layer, int64_t rows, const double *x) {
  attn_layout layout = attn_layout_equal(1, rows);
  double *y = calloc((size_t)(rows * layer->options.hidden), sizeof *y);
  assert_ok(test_layer_forward(layer, &layout, x, y));
  return y;
}

/* Parameters. */

static double *get(const test_layer *layer, const char *name) {
  return layer->values[test_layer_find(layer, name)];
}

static void set(test_layer *layer, const char *name, const double *values) {
  assert_ok(test_layer_set(layer, test_layer_find(layer, name), values));
}

static void fill(test_layer *layer, const char *name, double value) {
  int i = test_layer_find(layer, name);
  int64_t count = test_parameter_count(layer, i);
  double *values = malloc((size_t)count * sizeof *values);
  for (int64_t j = 0; j < count; ++j) values[j] = value;
  assert_ok(test_layer_set(layer, i, values));
  free(values);
}

/* Rows first .. first + rows - 1 of a matrix times `factor`. */
static void scale_rows(test_layer *layer, const char *name, int64_t first, int64_t rows,
                       double factor) {
  int i = test_layer_find(layer, name);
  int64_t count = test_parameter_count(layer, i), width = layer->shapes[i].shape[1];
  double *values = malloc((size_t)count * sizeof *values);
  memcpy(values, layer->values[i], (size_t)count * sizeof *values);
  for (int64_t j = first * width; j < (first + rows) * width; ++j) values[j] *= factor;
  assert_ok(test_layer_set(layer, i, values));
  free(values);
}

/* A matrix whose product with any x is `value`, when channel 0 of x is 1. */
static void make_constant(test_layer *layer, const char *name, double value) {
  int i = test_layer_find(layer, name);
  int64_t count = test_parameter_count(layer, i), width = layer->shapes[i].shape[1];
  double *values = calloc((size_t)count, sizeof *values);
  for (int64_t row = 0; row < count / width; ++row) values[row * width] = value;
  assert_ok(test_layer_set(layer, i, values));
  free(values);
}

/* Copies the parameters that both layers have by the same name. */
static void share_parameters(test_layer *to, const test_layer *from) {
  for (int i = 0; i < to->count; ++i)
    for (int j = 0; j < from->count; ++j)
      if (strcmp(to->shapes[i].name, from->shapes[j].name) == 0 &&
          test_parameter_count(to, i) == test_parameter_count(from, j))
        assert_ok(test_layer_set(to, i, from->values[j]));
}

/* Inputs whose channel 0 is 1: what lets a product without bias be a constant. */
static double *inputs_with_one(const test_layer *layer, int64_t rows) {
  double *x = test_inputs(layer, rows * layer->options.hidden, 21);
  for (int64_t t = 0; t < rows; ++t) x[t * layer->options.hidden] = 1;
  return x;
}

static void assert_scaled(const test_layer *layer, const char *what, const double *y, double factor,
                          const double *reference, int64_t count, double limit) {
  double *scaled = malloc((size_t)count * sizeof *scaled);
  for (int64_t i = 0; i < count; ++i) scaled[i] = factor * reference[i];
  test_assert_close(layer, what, y, scaled, count, limit);
  free(scaled);
}

/* Rows of x in another order: the last stays, the others go backwards. */
static double *past_reversed(const double *x, int64_t rows, int64_t width) {
  double *y = malloc((size_t)(rows * width) * sizeof *y);
  for (int64_t t = 0; t < rows; ++t)
    memcpy(y + t * width, x + (t + 1 < rows ? rows - 2 - t : t) * width, (size_t)width * sizeof *y);
  return y;
}

/* The last y does not depend on the order of the past. */
static void assert_order_does_not_matter(const test_layer *layer) {
  const int64_t rows = 90, hidden = layer->options.hidden;
  double *x = test_inputs(layer, rows * hidden, 22), *reversed = past_reversed(x, rows, hidden);
  double *y = apply(layer, rows, x), *other = apply(layer, rows, reversed);
  test_assert_close(layer, "the last y with its past reversed", other + (rows - 1) * hidden,
                    y + (rows - 1) * hidden, hidden, close);
  free(x), free(reversed), free(y), free(other);
}

/* Each y is that of its token alone. */
static void assert_forgets_everything(const test_layer *layer) {
  const int64_t rows = 70, hidden = layer->options.hidden;
  double *x = test_inputs(layer, rows * hidden, 23), *y = apply(layer, rows, x);
  for (int64_t t = 0; t < rows; t += 23) {
    double *alone = apply(layer, 1, x + t * hidden);
    test_assert_close(layer, "y of a token alone", y + t * hidden, alone, hidden, close);
    free(alone);
  }
  free(x), free(y);
}

/* Softmax ---------------------------------------------------------------------------------------
 */

static const attn_mixer_options plain = {.hidden = 24, .heads = 4};

static void test_softmax(void **state) {
  (void)state;
  const int64_t rows = 100;
  attn_mixer_options o = plain;
  test_layer whole;
  create(&whole, "softmax", o);
  double *x = test_inputs(&whole, rows * o.hidden, 20), *y = apply(&whole, rows, x);
  const struct {
    int64_t window;
    double soft_cap;
  } same[] = {{rows, 0}, {rows + 1, 0}, {INT32_MAX, 0}, {0, 1e7}};
  for (size_t i = 0; i < sizeof same / sizeof *same; ++i) {
    o.window = same[i].window;
    o.soft_cap = same[i].soft_cap;
    test_layer wide;
    create(&wide, "softmax", o);
    double *other = apply(&wide, rows, x);
    test_assert_close(&wide, "y with a limit that does not bind", other, y, rows * o.hidden, close);
    free(other);
    test_layer_destroy(&wide);
  }
  free(x), free(y);
  test_layer_destroy(&whole);

  o = plain;
  o.rotary_dim = -1;
  test_layer unordered;
  create(&unordered, "softmax", o);
  assert_order_does_not_matter(&unordered);
  test_layer_destroy(&unordered);
  o = plain;
  o.window = 1;
  test_layer forgetful;
  create(&forgetful, "softmax", o);
  assert_forgets_everything(&forgetful);
  test_layer_destroy(&forgetful);
}

/* What a window sees does not depend on how many tokens came before: rotary is relative. */
static void test_rotary_is_relative(void **state) {
  (void)state;
  const int64_t window = 20, rows = 60, before[] = {40, 113};
  attn_mixer_options o = plain;
  o.window = window;
  test_layer layer;
  create(&layer, "softmax", o);
  double *tail = test_inputs(&layer, rows * o.hidden, 24), *y[2];
  for (int i = 0; i < 2; ++i) {
    double *x = test_inputs(&layer, (before[i] + rows) * o.hidden, 25 + (uint64_t)i);
    memcpy(x + before[i] * o.hidden, tail, (size_t)(rows * o.hidden) * sizeof *x);
    double *all = apply(&layer, before[i] + rows, x);
    y[i] = malloc((size_t)(rows * o.hidden) * sizeof *all);
    memcpy(y[i], all + before[i] * o.hidden, (size_t)(rows * o.hidden) * sizeof *all);
    free(x), free(all);
  }
  int64_t seen = (window - 1) * o.hidden;
  test_assert_close(&layer, "y after another beginning", y[0] + seen, y[1] + seen,
                    rows * o.hidden - seen, close);
  assert_true(test_relative_error(y[0], y[1], seen) > 0.01); /* there the beginnings show */
  free(tail), free(y[0]), free(y[1]);
  test_layer_destroy(&layer);
}

/* Groups ----------------------------------------------------------------------------------------
 */

/* Repeats each block of `block` rows `times` times. */
static void set_repeated(test_layer *to, const test_layer *from, const char *name, int64_t block,
                         int64_t times) {
  int i = test_layer_find(to, name);
  int64_t width = to->shapes[i].rank == 2 ? to->shapes[i].shape[1] : 1, size = block * width;
  double *values = malloc((size_t)test_parameter_count(to, i) * sizeof *values);
  const double *source = get(from, name);
  for (int64_t b = 0; b < test_parameter_count(to, i) / size; ++b)
    memcpy(values + b * size, source + b / times * size, (size_t)size * sizeof *values);
  assert_ok(test_layer_set(to, i, values));
  free(values);
}

/* A shared key head equals copies of it, one for each head that reads it. */
static void test_groups(void **state) {
  static const struct {
    const char *mixer;
    const char *repeated[5]; /* parameters that belong to shared heads */
  } cases[] = {
      {"softmax", {"k_proj.weight", "v_proj.weight"}},
      {"delta_net", {"q_proj.weight", "k_proj.weight", "q_conv1d.weight", "k_conv1d.weight"}},
      {"gated_delta_net", {"q_proj.weight", "k_proj.weight", "q_conv1d.weight", "k_conv1d.weight"}},
      {"kda", {"q_proj.weight", "k_proj.weight", "q_conv1d.weight", "k_conv1d.weight"}},
      {"lawcat", {"k_proj.weight", "v_proj.weight", "gk_proj.1.weight", "gk_proj.1.bias"}},
      {"lolcats", {"k_proj.weight", "v_proj.weight"}},
  };
  (void)state;
  for (size_t c = 0; c < sizeof cases / sizeof *cases; ++c) {
    const int64_t rows = 70;
    attn_mixer_options o = {.hidden = 24, .heads = 6, .dim = 8, .value_dim = 8, .block = 20};
    test_layer full;
    create(&full, cases[c].mixer, o);
    o.kv_heads = 2;
    test_layer grouped;
    create(&grouped, cases[c].mixer, o);
    share_parameters(&full, &grouped);
    for (int i = 0; cases[c].repeated[i]; ++i)
      set_repeated(&full, &grouped, cases[c].repeated[i], o.dim, 3);
    double *x = test_inputs(&full, rows * o.hidden, 26);
    double *y = apply(&full, rows, x), *other = apply(&grouped, rows, x);
    test_assert_close(&grouped, "y with shared heads", other, y, rows * o.hidden, close);
    free(x), free(y), free(other);
    test_layer_destroy(&full);
    test_layer_destroy(&grouped);
  }
}

/* Lightning -------------------------------------------------------------------------------------
 */

static void test_lightning(void **state) {
  (void)state;
  const int64_t rows = 80;
  attn_mixer_options o = {.hidden = 24, .heads = 3, .layers = 2, .norm_epsilon = 1e-300};
  test_layer layer;
  create(&layer, "lightning", o);
  int64_t width = layer.options.heads * layer.options.dim, count = rows * o.hidden;
  double *x = test_inputs(&layer, count, 27), *y = apply(&layer, rows, x);
  scale_rows(&layer, "qkvu_proj.weight", 2 * width, width, 37); /* v: the norm removes it */
  double *scaled = apply(&layer, rows, x);
  test_assert_close(&layer, "y with v scaled", scaled, y, count, close);
  free(scaled);
  scale_rows(&layer, "qkvu_proj.weight", 3 * width, width, -2.5); /* u */
  scaled = apply(&layer, rows, x);
  assert_scaled(&layer, "y with u scaled", scaled, -2.5, y, count, close);
  free(scaled), free(x), free(y);
  test_layer_destroy(&layer);

  /* Head 0 of the paper's schedule does not decay: linear attention, whose past has no order. */
  o = (attn_mixer_options){
      .hidden = 24, .heads = 1, .layers = 3, .layer = 1, .schedule = ATTN_SCHEDULE_PAPER};
  test_layer linear;
  create(&linear, "lightning", o);
  assert_order_does_not_matter(&linear);
  test_layer_destroy(&linear);
}

/* Tokens of zeros write nothing, so that they only shift positions: nothing may depend on those,
 * not even with LRPE, whose scores depend on the distance alone. */
static void test_shifts(void **state) {
  static const test_case cases[] = {
      {"lightning", "lrpe", {.hidden = 24, .heads = 3, .layers = 2, .lrpe = true}},
      {"lightning", "plain", {.hidden = 24, .heads = 3, .layers = 2}},
      {"gla", "plain", {.hidden = 24, .heads = 2}},
      {"delta_net", "plain", {.hidden = 24, .heads = 2}},
      {"gated_delta_net", "plain", {.hidden = 24, .heads = 2}},
      {"kda", "plain", {.hidden = 24, .heads = 2}},
  };
  (void)state;
  for (size_t c = 0; c < sizeof cases / sizeof *cases; ++c) {
    const int64_t rows = 75, before[] = {1, 50, 64, 200};
    test_layer layer;
    create(&layer, cases[c].mixer, cases[c].options);
    int64_t hidden = layer.options.hidden, count = rows * hidden;
    double *tail = test_inputs(&layer, count, 28), *y = apply(&layer, rows, tail);
    for (size_t i = 0; i < sizeof before / sizeof *before; ++i) {
      double *x = calloc((size_t)((before[i] + rows) * hidden), sizeof *x);
      memcpy(x + before[i] * hidden, tail, (size_t)count * sizeof *x);
      double *shifted = apply(&layer, before[i] + rows, x);
      test_assert_close(&layer, "y after zeros", shifted + before[i] * hidden, y, count, close);
      free(x), free(shifted);
    }
    free(tail), free(y);
    test_layer_destroy(&layer);
  }
}

/* GLA -------------------------------------------------------------------------------------------
 */

/* alpha = 1: linear attention. alpha = 0: S_t = k_t v_t^T alone. */
static void test_gla(void **state) {
  (void)state;
  test_layer layer;
  create(&layer, "gla", (attn_mixer_options){.hidden = 24, .heads = 2});
  fill(&layer, "gk_proj.1.weight", 0);
  fill(&layer, "gk_proj.1.bias", 1e4);
  assert_order_does_not_matter(&layer);
  fill(&layer, "gk_proj.1.bias", -1e5);
  assert_forgets_everything(&layer);
  test_layer_destroy(&layer);
}

/* Hedgehog --------------------------------------------------------------------------------------
 */

static void negate(test_layer *layer, const char *name) {
  int i = test_layer_find(layer, name);
  int64_t count = test_parameter_count(layer, i);
  double *values = malloc((size_t)count * sizeof *values);
  for (int64_t j = 0; j < count; ++j) values[j] = -layer->values[i][j];
  set(layer, name, values);
  free(values);
}

/* y is a mean of values: the same values everywhere make it that value, to the epsilon of the
 * denominators. */
static void assert_means_of_values(test_layer *layer, double limit) {
  const int64_t rows = 80, hidden = layer->options.hidden;
  double *x = inputs_with_one(layer, rows);
  make_constant(layer, "v_proj.weight", 1.75);
  double *y = apply(layer, rows, x), *expected = calloc((size_t)(rows * hidden), sizeof *expected);
  const double *w = get(layer, "o_proj.weight");
  int64_t width = layer->shapes[test_layer_find(layer, "o_proj.weight")].shape[1];
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t i = 0; i < hidden; ++i)
      for (int64_t c = 0; c < width; ++c) expected[t * hidden + i] += 1.75 * w[i * width + c];
  test_assert_close(layer, "y of constant values", y, expected, rows * hidden, limit);
  free(x), free(y), free(expected);
}

/* Row t of y is the mean of what tokens 0 .. t of x give alone. */
static void assert_running_mean(const test_layer *layer, const double *y, int64_t rows,
                                const double *x) {
  int64_t hidden = layer->options.hidden;
  double *mean = calloc((size_t)(rows * hidden), sizeof *mean);
  for (int64_t t = 0; t < rows; ++t) {
    double *alone = apply(layer, 1, x + t * hidden);
    for (int64_t i = 0; i < hidden; ++i)
      for (int64_t later = t; later < rows; ++later)
        mean[later * hidden + i] += alone[i] / (double)(later + 1);
    free(alone);
  }
  test_assert_close(layer, "y of equal weights", y, mean, rows * hidden, close);
  free(mean);
}

/* Both signs of a feature count alike, in every variant; weights sum to 1 and have no order. */
static void test_hedgehog(void **state) {
  static const attn_feature_map maps[] = {ATTN_FEATURES_SOFTMAX, ATTN_FEATURES_EXP,
                                          ATTN_FEATURES_JOINT};
  static const char *const flipped[] = {"q_map.weight", "q_map.bias", "k_map.weight", "k_map.bias"};
  (void)state;
  for (int m = 0; m < 3; ++m) {
    const int64_t rows = 90;
    attn_mixer_options o = {.hidden = 24, .heads = 2, .feature_map = maps[m]};
    test_layer layer;
    create(&layer, "hedgehog", o);
    double *x = test_inputs(&layer, rows * o.hidden, 50), *y = apply(&layer, rows, x);
    for (int i = 0; i < 4; ++i) negate(&layer, flipped[i]);
    double *other = apply(&layer, rows, x);
    test_assert_close(&layer, "y with features negated", other, y, rows * o.hidden, close);
    assert_means_of_values(&layer, close);
    test_layer_destroy(&layer);
    free(x), free(y), free(other);
    o.rotary_dim = -1;
    create(&layer, "hedgehog", o);
    assert_order_does_not_matter(&layer);
    test_layer_destroy(&layer);
  }
}

/* W = 0 attends to all alike: y is the running mean of what each token alone gives. */
static void test_hedgehog_without_features(void **state) {
  (void)state;
  const int64_t rows = 60;
  attn_mixer_options o = {.hidden = 24, .heads = 2};
  test_layer layer;
  create(&layer, "hedgehog", o);
  fill(&layer, "q_map.weight", 0);
  fill(&layer, "k_map.weight", 0);
  double *x = test_inputs(&layer, rows * o.hidden, 51), *y = apply(&layer, rows, x);
  assert_running_mean(&layer, y, rows, x);
  free(x), free(y);
  test_layer_destroy(&layer);
}

/* LAWCAT ----------------------------------------------------------------------------------------
 */

/* What the epsilon of its denominators may change: 1e-10 against weights phi(q) . phi(k) /
 * sqrt(features), which are 0.01 and more at these inputs. */
static const double lawcat_close = 1e-8;

/* Every token is convolved with itself alone. */
static void let_through(test_layer *layer, const char *name) {
  int i = test_layer_find(layer, name);
  int64_t count = test_parameter_count(layer, i), taps = layer->shapes[i].shape[1];
  double *values = calloc((size_t)count, sizeof *values);
  for (int64_t j = taps - 1; j < count; j += taps) values[j] = 1;
  set(layer, name, values);
  free(values);
}

/* alpha = exp(log sigmoid(gate) / 16) for every token and feature. */
static void set_decays(test_layer *layer, double gate) {
  fill(layer, "gk_proj.1.weight", 0);
  fill(layer, "gk_proj.1.bias", gate);
}

/* Without convolution and decay it is Hedgehog with one map for both; alpha = 0 remembers nothing.
 */
static void test_lawcat_is_hedgehog(void **state) {
  (void)state;
  const int64_t rows = 90;
  attn_mixer_options o = {.hidden = 24, .heads = 2, .feature_dim = 6, .rotary_dim = -1};
  test_layer lawcat, hedgehog;
  create(&lawcat, "lawcat", o);
  create(&hedgehog, "hedgehog", o);
  share_parameters(&hedgehog, &lawcat);
  set(&hedgehog, "q_map.weight", get(&lawcat, "feature_map.weight"));
  set(&hedgehog, "k_map.weight", get(&lawcat, "feature_map.weight"));
  fill(&hedgehog, "q_map.bias", 0);
  fill(&hedgehog, "k_map.bias", 0);
  let_through(&lawcat, "q_conv1d.weight");
  let_through(&lawcat, "k_conv1d.weight");
  set_decays(&lawcat, 1e4);
  double *x = test_inputs(&lawcat, rows * o.hidden, 52);
  double *y = apply(&lawcat, rows, x), *reference = apply(&hedgehog, rows, x);
  test_assert_close(&lawcat, "y without decay", y, reference, rows * o.hidden, lawcat_close);
  set_decays(&lawcat, -1e5);
  assert_forgets_everything(&lawcat);
  free(x), free(y), free(reference);
  test_layer_destroy(&lawcat);
  test_layer_destroy(&hedgehog);
}

/* Whatever the gates, and however long the sequence: y lies between the values so far. */
static void test_lawcat_is_a_mean(void **state) {
  (void)state;
  const int64_t rows = 400;
  attn_mixer_options o = {.hidden = 24, .heads = 4, .value_dim = 6};
  test_layer layer;
  create(&layer, "lawcat", o);
  double *eye = calloc((size_t)(o.hidden * o.hidden), sizeof *eye),
         *least = calloc(24, sizeof *eye);
  double *greatest = calloc(24, sizeof *eye), *x = test_inputs(&layer, rows * o.hidden, 53);
  for (int64_t i = 0; i < o.hidden; ++i) {
    eye[i * o.hidden + i] = 1;
    least[i] = INFINITY, greatest[i] = -INFINITY;
  }
  set(&layer, "v_proj.weight", eye); /* values are x, y is what attention gives */
  set(&layer, "o_proj.weight", eye);
  double *y = apply(&layer, rows, x);
  for (int64_t i = 0; i < rows * o.hidden; ++i) {
    int64_t c = i % o.hidden;
    least[c] = fmin(least[c], x[i]);
    greatest[c] = fmax(greatest[c], x[i]);
    assert_true(y[i] >= least[c] - lawcat_close && y[i] <= greatest[c] + lawcat_close);
  }
  assert_means_of_values(&layer, lawcat_close);
  free(eye), free(least), free(greatest), free(x), free(y);
  test_layer_destroy(&layer);
}

/* A sequence gives the same wherever it begins: there are no positions. */
static void test_lawcat_has_no_positions(void **state) {
  (void)state;
  const int64_t rows = 70;
  test_layer layer;
  create(&layer, "lawcat", (attn_mixer_options){.hidden = 24, .heads = 2});
  int64_t count = rows * layer.options.hidden;
  double *x = test_inputs(&layer, count, 54), *y = apply(&layer, rows, x);
  double *later = calloc((size_t)count, sizeof *later);
  attn_layout layout = attn_layout_equal(1, rows);
  layout.position = 1000;
  assert_ok(test_layer_forward(&layer, &layout, x, later));
  test_assert_same_bits(&layer, "y of later positions", later, y, count);
  free(x), free(y), free(later);
  test_layer_destroy(&layer);
}

/* LoLCATs ---------------------------------------------------------------------------------------
 */

static const attn_window_kind windows[] = {ATTN_WINDOW_TERRACE, ATTN_WINDOW_SLIDING};

/* A window over everything is exact attention, whatever gamma is; with features or without. */
static void test_lolcats_with_all_in_its_window(void **state) {
  const double factors[] = {-1000, -2, 0, 1000};
  const int64_t rows = 75;
  (void)state;
  for (int w = 0; w < 2; ++w) {
    attn_mixer_options o = {.hidden = 24, .heads = 4, .kv_heads = 2, .window_kind = windows[w]};
    o.block = windows[w] == ATTN_WINDOW_SLIDING ? rows : (rows + 1) / 2;
    test_layer layer, exact;
    create(&layer, "lolcats", o);
    create(&exact, "softmax", o);
    share_parameters(&exact, &layer);
    double *x = test_inputs(&layer, rows * o.hidden, 60), *reference = apply(&exact, rows, x);
    for (int i = 0; i < 4; ++i) {
      fill(&layer, "window_factors", factors[i]);
      double *y = apply(&layer, rows, x);
      test_assert_close(&layer, "y beside attention", y, reference, rows * o.hidden, close);
      free(y);
    }
    free(x), free(reference);
    test_layer_destroy(&layer);
    test_layer_destroy(&exact);
  }
}

/* An overwhelming gamma leaves the window alone: sliding attention. A vanishing one leaves what is
 * older alone wherever there is something, and the window elsewhere. */
static void test_lolcats_in_its_limits(void **state) {
  const int64_t rows = 75, window = 20;
  (void)state;
  attn_mixer_options o = {.hidden = 24,
                          .heads = 2,
                          .block = window,
                          .window = window,
                          .window_kind = ATTN_WINDOW_SLIDING,
                          .affine = true};
  test_layer layer, exact;
  create(&layer, "lolcats", o);
  create(&exact, "softmax", o);
  share_parameters(&exact, &layer);
  double *x = test_inputs(&layer, rows * o.hidden, 61), *reference = apply(&exact, rows, x);
  fill(&layer, "window_factors", 1000);
  double *y = apply(&layer, rows, x);
  test_assert_close(&layer, "y of the window", y, reference, rows * o.hidden, close);
  fill(&layer, "window_factors", -1000);
  double *older = apply(&layer, rows, x);
  int64_t inside = window * o.hidden;
  test_assert_close(&layer, "y of the window", older, reference, inside, close);
  assert_true(test_relative_error(older + inside, reference + inside, rows * o.hidden - inside) >
              0.01);
  for (int64_t i = 0; i < rows * o.hidden; ++i) assert_true(isfinite(older[i]));
  /* token `window` has one older token: all is of the first token's value, as its own y is */
  test_assert_close(&layer, "y of the first token", older + inside, older, o.hidden, close);
  free(x), free(reference), free(y), free(older);
  test_layer_destroy(&layer);
  test_layer_destroy(&exact);
}

/* The weights are not negative and sum to 1; both windows are one while they see the same. */
static void test_lolcats(void **state) {
  const int64_t rows = 130, block = 24;
  (void)state;
  double *y[2];
  test_layer layer[2];
  for (int w = 0; w < 2; ++w) {
    attn_mixer_options o = {
        .hidden = 24, .heads = 2, .block = block, .window_kind = windows[w], .affine = w == 0};
    create(&layer[w], "lolcats", o);
    if (w) share_parameters(&layer[1], &layer[0]);
    assert_means_of_values(&layer[w], close);
    double *x = test_inputs(&layer[w], rows * o.hidden, 62);
    y[w] = apply(&layer[w], rows, x);
    free(x);
  }
  test_assert_close(&layer[0], "y of either window", y[0], y[1], block * 24, close);
  assert_true(test_relative_error(y[0], y[1], rows * 24) > 0.01);
  for (int w = 0; w < 2; ++w) {
    test_layer_destroy(&layer[w]);
    free(y[w]);
  }
}

/* TransNormer -----------------------------------------------------------------------------------
 */

/* The norm removes what values, features or both are multiplied by; the past has no order. */
static void test_norm_attention(void **state) {
  static const struct {
    const char *weight, *bias;
    attn_feature_map map; /* elu is linear where it is positive */
  } scaled[] = {{"v_proj.weight", "v_proj.bias", ATTN_FEATURES_ELU_PLUS_ONE},
                {"v_proj.weight", "v_proj.bias", ATTN_FEATURES_ELU},
                {"q_proj.weight", "q_proj.bias", ATTN_FEATURES_ELU},
                {"k_proj.weight", "k_proj.bias", ATTN_FEATURES_ELU}};
  (void)state;
  const int64_t rows = 80;
  attn_mixer_options o = {.hidden = 24, .heads = 2, .norm_epsilon = 1e-300};
  for (size_t i = 0; i < sizeof scaled / sizeof *scaled; ++i) {
    test_layer layer;
    o.feature_map = scaled[i].map;
    create(&layer, "norm_attention", o);
    int64_t width = layer.options.heads * layer.options.dim, count = rows * o.hidden;
    double *x = test_inputs(&layer, count, 60), *bias = malloc((size_t)width * sizeof *bias);
    bool keys = scaled[i].weight[0] != 'v';
    for (int64_t c = 0; c < width; ++c) bias[c] = keys ? 100 : get(&layer, scaled[i].bias)[c];
    set(&layer, scaled[i].bias, bias);
    double *y = apply(&layer, rows, x);
    scale_rows(&layer, scaled[i].weight, 0, width, 37);
    for (int64_t c = 0; c < width; ++c) bias[c] *= 37;
    set(&layer, scaled[i].bias, bias);
    double *other = apply(&layer, rows, x);
    test_assert_close(&layer, "y with a factor", other, y, count, close);
    free(x), free(bias), free(y), free(other);
    test_layer_destroy(&layer);
  }
  test_layer unordered;
  o.rotary_dim = -1;
  create(&unordered, "norm_attention", o);
  assert_order_does_not_matter(&unordered);
  test_layer_destroy(&unordered);
}

/* Both ways, the last token sees what it sees causally; and without positions tokens have no order:
 * in another one they give the same. */
static void test_both_ways(void **state) {
  (void)state;
  static const char *const names[] = {"softmax", "norm_attention", "hedgehog"};
  enum { ROWS = 75 };
  for (int m = 0; m < 3; ++m) {
    attn_mixer_options o = {.hidden = 24, .heads = 3, .value_dim = 5};
    int64_t hidden = o.hidden, last = (ROWS - 1) * hidden;
    test_layer causal, both;
    create(&causal, names[m], o);
    o.bidirectional = true;
    create(&both, names[m], o);
    double *x = test_inputs(&both, ROWS * hidden, 63);
    double *y = apply(&causal, ROWS, x), *other = apply(&both, ROWS, x);
    test_assert_close(&both, "the last y", other + last, y + last, hidden, close);
    test_layer_destroy(&causal);
    test_layer_destroy(&both);
    o.rotary_dim = -1;
    create(&both, names[m], o);
    double *turned = malloc(ROWS * (size_t)hidden * sizeof *turned), *first = apply(&both, ROWS, x);
    for (int64_t t = 0; t < ROWS; ++t)
      memcpy(turned + t * hidden, x + t * 31 % ROWS * hidden, (size_t)hidden * sizeof *x);
    double *again = apply(&both, ROWS, turned);
    for (int64_t t = 0; t < ROWS; ++t)
      test_assert_close(&both, "y in another order", again + t * hidden,
                        first + t * 31 % ROWS * hidden, hidden, close);
    free(x), free(y), free(other), free(turned), free(first), free(again);
    test_layer_destroy(&both);
  }
}

/* A block as long as the sequence is softmax attention; one of a token forgets everything. */
static void test_diag_attention(void **state) {
  (void)state;
  const int64_t rows = 100;
  attn_mixer_options o = {.hidden = 24, .heads = 4, .kv_heads = 2, .bias = true};
  for (int both = 0; both < 2; ++both) {
    test_layer softmax, diag;
    o.output_bias = true;
    o.bidirectional = both;
    o.block = rows + both;
    create(&softmax, "softmax", o);
    create(&diag, "diag_attention", o);
    share_parameters(&diag, &softmax);
    double *x = test_inputs(&softmax, rows * o.hidden, 61);
    double *y = apply(&softmax, rows, x), *other = apply(&diag, rows, x);
    test_assert_close(&diag, "y of one block", other, y, rows * o.hidden, close);
    free(x), free(y), free(other);
    test_layer_destroy(&softmax);
    test_layer_destroy(&diag);
  }
  test_layer forgetful;
  create(&forgetful, "diag_attention", (attn_mixer_options){.hidden = 24, .heads = 2, .block = 1});
  assert_forgets_everything(&forgetful);
  test_layer_destroy(&forgetful);
}

/* Blocks do not see each other: in another order they give the same, in that order, and a block of
 * a longer sequence is what it is alone. */
static void check_blocks(attn_mixer_options o) {
  enum { BLOCK = 20, BLOCKS = 5 };
  static const int64_t order[BLOCKS] = {3, 0, 4, 1, 2};
  test_layer layer;
  o.block = BLOCK;
  create(&layer, "diag_attention", o);
  int64_t rows = BLOCK * BLOCKS, piece = BLOCK * o.hidden;
  double *x = test_inputs(&layer, rows * o.hidden, 62), *y = apply(&layer, rows, x);
  double *moved = malloc((size_t)(rows * o.hidden) * sizeof *moved);
  for (int64_t b = 0; b < BLOCKS; ++b)
    memcpy(moved + b * piece, x + order[b] * piece, (size_t)piece * sizeof *x);
  double *other = apply(&layer, rows, moved);
  for (int64_t b = 0; b < BLOCKS; ++b) {
    double *alone = apply(&layer, BLOCK, x + b * piece);
    test_assert_close(&layer, "a block elsewhere", other + b * piece, y + order[b] * piece, piece,
                      close);
    test_assert_close(&layer, "a block alone", alone, y + b * piece, piece, close);
    free(alone);
  }
  free(x), free(y), free(moved), free(other);
  test_layer_destroy(&layer);
}

static void test_diag_blocks(void **state) {
  (void)state;
  check_blocks((attn_mixer_options){.hidden = 24, .heads = 2, .rotary_dim = -1});
  check_blocks(
      (attn_mixer_options){.hidden = 24, .heads = 2, .rotary_dim = -1, .relu_scores = true});
}

/* The norm behind ReLU's weights removes what queries, keys or values are multiplied by. */
static void test_relu_scale(void **state) {
  (void)state;
  static const char *const projections[][2] = {{"q_proj.weight", "q_proj.bias"},
                                               {"k_proj.weight", "k_proj.bias"},
                                               {"v_proj.weight", "v_proj.bias"}};
  const attn_mixer_options o = {
      .hidden = 24, .heads = 2, .relu_scores = true, .norm_epsilon = 1e-300};
  const int64_t rows = 90, count = rows * o.hidden;
  const double factor = 37;
  test_layer layer;
  create(&layer, "diag_attention", o);
  double *x = test_inputs(&layer, count, 64), *y = apply(&layer, rows, x);
  for (int p = 0; p < 3; ++p) {
    double bias[24];
    for (int c = 0; c < 24; ++c) bias[c] = factor * get(&layer, projections[p][1])[c];
    set(&layer, projections[p][1], bias);
    scale_rows(&layer, projections[p][0], 0, o.hidden, factor);
    double *other = apply(&layer, rows, x);
    test_assert_close(&layer, "y with a factor", other, y, count, close);
    free(other);
  }
  free(x), free(y);
  test_layer_destroy(&layer);
}

/* Based -----------------------------------------------------------------------------------------
 */

/* Means of values without an order, 1 + s + s^2 / 2 in place of exp(s): softmax attention where
 * scores are small, with an error of the third order. */
static void test_based(void **state) {
  (void)state;
  const int64_t rows = 80;
  attn_mixer_options o = {.hidden = 24, .heads = 3, .feature_dim = 8, .rotary_dim = -1};
  test_layer based, softmax;
  create(&based, "based", o);
  create(&softmax, "softmax", o);
  assert_order_does_not_matter(&based);
  assert_means_of_values(&based, close);
  share_parameters(&based, &softmax);
  double *x = test_inputs(&based, rows * o.hidden, 71), error[2];
  for (int i = 0; i < 2; ++i) { /* scores shrink to a hundredth, and to a hundredth of that */
    scale_rows(&based, "q_proj.weight", 0, 24, 0.01);
    scale_rows(&softmax, "q_proj.weight", 0, 24, 0.01);
    double *y = apply(&based, rows, x), *expected = apply(&softmax, rows, x);
    error[i] = test_relative_error(y, expected, rows * o.hidden);
    free(y), free(expected);
  }
  assert_true(error[0] < 1e-5); /* s^3 / 6 for scores of some hundredths */
  assert_true(error[1] < 1e-5 * error[0]);
  fill(&based, "q_proj.weight", 0); /* all weights are 1 */
  double *y = apply(&based, rows, x);
  assert_running_mean(&based, y, rows, x);
  free(x), free(y);
  test_layer_destroy(&based);
  test_layer_destroy(&softmax);
}

/* Aaren -----------------------------------------------------------------------------------------
 */

/* Softmax attention whose queries are all W_q h: channel 0 of x, a 1, takes the place of h. With
 * `factor` scores are large, up to some 10^4 beyond what exp can take. */
static void assert_is_softmax(double factor) {
  const int64_t rows = 150;
  attn_mixer_options o = {.hidden = 24, .heads = 3, .rotary_dim = -1};
  test_layer aaren, softmax;
  create(&aaren, "aaren", o);
  create(&softmax, "softmax", o);
  scale_rows(&aaren, "q_proj.weight", 0, 24, factor);
  share_parameters(&softmax, &aaren);
  const double *w = get(&aaren, "q_proj.weight"), *h = get(&aaren, "query");
  double *queries = calloc((size_t)(24 * o.hidden), sizeof *queries);
  for (int64_t i = 0; i < 24; ++i)
    for (int64_t c = 0; c < o.hidden; ++c) queries[i * o.hidden] += w[i * o.hidden + c] * h[c];
  set(&softmax, "q_proj.weight", queries);
  double *x = inputs_with_one(&softmax, rows);
  double *y = apply(&aaren, rows, x), *expected = apply(&softmax, rows, x);
  /* large scores carry their own rounding into the exponent */
  test_assert_close(&aaren, "y", y, expected, rows * o.hidden, close * factor);
  free(queries), free(x), free(y), free(expected);
  test_layer_destroy(&aaren);
  test_layer_destroy(&softmax);
}

static void test_aaren(void **state) {
  (void)state;
  assert_is_softmax(1);
  assert_is_softmax(1e4);
  test_layer layer;
  create(&layer, "aaren", (attn_mixer_options){.hidden = 24, .heads = 2});
  assert_order_does_not_matter(&layer);
  assert_means_of_values(&layer, close);
  fill(&layer, "query", 0); /* all scores are 0 */
  double *x = test_inputs(&layer, 100 * 24, 70), *y = apply(&layer, 100, x);
  assert_running_mean(&layer, y, 100, x);
  free(x), free(y);
  test_layer_destroy(&layer);
}

/* The delta rule --------------------------------------------------------------------------------
 */

static const attn_mixer_options small = {
    .hidden = 24, .heads = 3, .dim = 8, .value_dim = 10, .norm_epsilon = 1e-12};

/* beta = 0 writes nothing: the state, and with it y, stays zero. */
static void test_no_write(void **state) {
  static const char *const mixers[] = {"delta_net", "gated_delta_net", "kda"};
  (void)state;
  for (int m = 0; m < 3; ++m) {
    test_layer layer;
    create(&layer, mixers[m], small);
    double *x = inputs_with_one(&layer, 70);
    make_constant(&layer, "b_proj.weight", -1000);
    double *y = apply(&layer, 70, x);
    for (int64_t i = 0; i < 70 * small.hidden; ++i) assert_true(y[i] == 0);
    free(x), free(y);
    test_layer_destroy(&layer);
  }
}

/* beta = 1 and a key of length 1: the state then holds v_t under k_t, whatever it held before, so
 * that q_t = k_t reads v_t. With DeltaNet y is then a function of v_t alone: that of a memory that
 * was empty. Keys are long before normalisation, so that its epsilon of 1e-6 does not show. */
static void test_perfect_write(void **state) {
  (void)state;
  const int64_t rows = 70;
  attn_mixer_options o = small;
  o.convolution = 1;
  test_layer layer;
  create(&layer, "delta_net", o);
  double *x = inputs_with_one(&layer, rows);
  make_constant(&layer, "b_proj.weight", 1000);
  scale_rows(&layer, "k_proj.weight", 0, o.heads * o.dim, 1e4);
  set(&layer, "q_proj.weight", get(&layer, "k_proj.weight"));
  set(&layer, "q_conv1d.weight", get(&layer, "k_conv1d.weight"));
  double *y = apply(&layer, rows, x);
  for (int64_t t = 0; t < rows; ++t) {
    double *alone = apply(&layer, 1, x + t * o.hidden);
    test_assert_close(&layer, "y of a perfect write", y + t * o.hidden, alone, o.hidden, 1e-8);
    free(alone);
  }
  free(x), free(y);
  test_layer_destroy(&layer);
}

/* Keys e_1, e_2, ... never meet, so that there is nothing to correct: the delta rule is linear
 * attention with values beta v, and the norm removes beta. */
static void test_orthonormal_keys(void **state) {
  (void)state;
  attn_mixer_options o = {.hidden = 16,
                          .heads = 1,
                          .dim = 12,
                          .value_dim = 9,
                          .convolution = 1,
                          .norm_epsilon = 1e-300};
  const int64_t rows = o.dim;
  test_layer layer;
  create(&layer, "delta_net", o);
  /* channel 0 is 1, channels 1 .. 12 one of the keys; the rest is random */
  double *x = inputs_with_one(&layer, rows),
         *keys = calloc((size_t)(o.dim * o.hidden), sizeof *keys);
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t i = 0; i < o.dim; ++i) {
      x[t * o.hidden + 1 + i] = i == t;
      keys[i * o.hidden + 1 + i] = 1e5;
    }
  set(&layer, "k_proj.weight", keys);
  fill(&layer, "k_conv1d.weight", 1);
  make_constant(&layer, "b_proj.weight", 1000); /* beta = 1 */
  double *y = apply(&layer, rows, x);
  make_constant(&layer, "b_proj.weight", -1); /* beta = 0.27 */
  double *weak = apply(&layer, rows, x);
  test_assert_close(&layer, "y with a smaller beta", weak, y, rows * o.hidden, 1e-8);
  for (int64_t i = 0; i < o.dim * o.hidden; ++i)
    keys[i] += 3e4 * (double)(i % 7); /* now they meet */
  set(&layer, "k_proj.weight", keys);
  double *weak_met = apply(&layer, rows, x);
  make_constant(&layer, "b_proj.weight", 1000);
  double *met = apply(&layer, rows, x);
  assert_true(test_relative_error(weak_met, met, rows * o.hidden) > 0.01);
  free(x), free(keys), free(y), free(weak), free(met), free(weak_met);
  test_layer_destroy(&layer);
}

/* alpha = 1 makes Gated DeltaNet a DeltaNet, but for the output gate: silu(1) everywhere. */
static void test_without_decay(void **state) {
  (void)state;
  const int64_t rows = 90;
  test_layer delta, gated;
  create(&delta, "delta_net", small);
  create(&gated, "gated_delta_net", small);
  double *x = inputs_with_one(&delta, rows);
  share_parameters(&gated, &delta);
  fill(&gated, "A_log", -1e4); /* exp(A_log) = 0 */
  make_constant(&gated, "g_proj.weight", 1);
  double *y = apply(&gated, rows, x), *reference = apply(&delta, rows, x);
  assert_scaled(&gated, "y without decay", y, 1 / (1 + exp(-1)), reference, rows * small.hidden,
                close);
  free(x), free(y), free(reference);
  test_layer_destroy(&delta);
  test_layer_destroy(&gated);
}

/* KDA whose channels decay alike is Gated DeltaNet, but for the gate: sigmoid(b) there and silu(1)
 * here. The low-rank gate passes a_proj through: its rank is the number of heads. */
static void test_equal_channels(void **state) {
  (void)state;
  const int64_t rows = 90, heads = small.heads, dim = small.dim;
  attn_mixer_options o = small;
  o.gate_rank = heads;
  test_layer kda, gated;
  create(&kda, "kda", o);
  create(&gated, "gated_delta_net", small);
  double *x = inputs_with_one(&kda, rows);
  double *up = calloc((size_t)(heads * dim * heads), sizeof *up);
  double *bias = calloc((size_t)(heads * dim), sizeof *bias);
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t i = 0; i < dim; ++i) {
      up[(h * dim + i) * heads + h] = 1;
      bias[h * dim + i] = get(&gated, "dt_bias")[h];
    }
  share_parameters(&kda, &gated);
  set(&kda, "f_a_proj.weight", get(&gated, "a_proj.weight"));
  set(&kda, "f_b_proj.weight", up);
  set(&kda, "dt_bias", bias);
  fill(&kda, "g_b_proj.weight", 0);
  fill(&kda, "g_b_proj.bias", 0); /* sigmoid = 1/2 */
  make_constant(&gated, "g_proj.weight", 1);
  double *y = apply(&kda, rows, x), *reference = apply(&gated, rows, x);
  assert_scaled(&kda, "y of equal channels", y, 0.5 * (1 + exp(-1)), reference, rows * o.hidden,
                close);
  free(x), free(up), free(bias), free(y), free(reference);
  test_layer_destroy(&kda);
  test_layer_destroy(&gated);
}

/* Latent attention ------------------------------------------------------------------------------
 */

static const attn_mixer_options latents = {.hidden = 24, .heads = 3, .dim = 8, .latent_rank = 20};

/* M := M (I - 2 u u^T), u a unit vector, on the last axis of rows x width. */
static double *reflected(const double *m, int64_t rows, int64_t width, const double *u) {
  double *out = malloc((size_t)(rows * width) * sizeof *out);
  for (int64_t r = 0; r < rows; ++r) {
    double dot = 0;
    for (int64_t i = 0; i < width; ++i) dot += m[r * width + i] * u[i];
    for (int64_t i = 0; i < width; ++i) out[r * width + i] = m[r * width + i] - 2 * dot * u[i];
  }
  return out;
}

/* (I - 2 u u^T) M on the first `width` rows, the others as they are. */
static double *reflected_rows(const double *m, int64_t rows, int64_t columns, int64_t width,
                              const double *u) {
  double *out = malloc((size_t)(rows * columns) * sizeof *out);
  memcpy(out, m, (size_t)(rows * columns) * sizeof *out);
  for (int64_t c = 0; c < columns; ++c) {
    double dot = 0;
    for (int64_t i = 0; i < width; ++i) dot += m[i * columns + c] * u[i];
    for (int64_t i = 0; i < width; ++i) out[i * columns + c] -= 2 * dot * u[i];
  }
  return out;
}

/* Latents may be turned, as long as their norm has no weights of its own. */
static void test_latents_turn(void **state) {
  (void)state;
  const int64_t rows = 90, rank = latents.latent_rank;
  test_layer layer, turned;
  create(&layer, "mla", latents);
  create(&turned, "mla", latents);
  fill(&layer, "kv_norm.weight", 1);
  double u[64], size = 0;
  test_fill_normal(u, rank, 0, 1, 40);
  for (int64_t i = 0; i < rank; ++i) size += u[i] * u[i];
  for (int64_t i = 0; i < rank; ++i) u[i] /= sqrt(size);
  share_parameters(&turned, &layer);
  int64_t stored = rank + layer.options.shared_dim;
  double *down =
      reflected_rows(get(&layer, "kv_down_proj.weight"), stored, latents.hidden, rank, u);
  double *k_up = reflected(get(&layer, "k_up_proj.weight"), latents.heads * latents.dim, rank, u);
  double *v_up = reflected(get(&layer, "v_up_proj.weight"), latents.heads * latents.dim, rank, u);
  set(&turned, "kv_down_proj.weight", down);
  set(&turned, "k_up_proj.weight", k_up);
  set(&turned, "v_up_proj.weight", v_up);
  double *x = test_inputs(&layer, rows * latents.hidden, 41);
  double *y = apply(&layer, rows, x), *other = apply(&turned, rows, x);
  test_assert_close(&turned, "y of turned latents", other, y, rows * latents.hidden, close);
  free(down), free(k_up), free(v_up), free(x), free(y), free(other);
  test_layer_destroy(&layer);
  test_layer_destroy(&turned);
}

/* At DeepSeek's sizes, absorbed and expanded: one token, more, many behind others, one. */
static void test_latents_absorbed(void **state) {
  (void)state;
  static const int64_t pieces[] = {1, 5, 80, 64, 1};
  enum { ROWS = 1 + 5 + 80 + 64 + 1 };
  const attn_mixer_options o = {
      .hidden = 24, .heads = 2, .dim = 128, .value_dim = 128, .shared_dim = 64, .latent_rank = 512};
  test_layer layer;
  attn_state *past;
  create(&layer, "mla", o);
  double *x = test_inputs(&layer, ROWS * o.hidden, 42), *whole = apply(&layer, ROWS, x);
  double *y = malloc(ROWS * 24 * sizeof *y);
  assert_ok(test_state_create(&layer, 256, 1, NULL, &past));
  for (int64_t i = 0, first = 0; i < 5; first += pieces[i++])
    assert_ok(
        test_layer_continue(&layer, past, pieces[i], x + first * o.hidden, y + first * o.hidden));
  test_assert_close(&layer, "y in pieces", y, whole, ROWS * o.hidden, close);
  attn_state_destroy(past);
  free(x), free(y), free(whole);
  test_layer_destroy(&layer);
}

/* Memories that learn while they read
 * --------------------------------------------------------------
 */

/* A gate that is `value` for every token: 0 and 1 exactly. */
static void set_gate(test_layer *layer, const char *weight, const char *bias, double value) {
  fill(layer, weight, 0);
  fill(layer, bias, log(value / (1 - value)));
}

/* The plain rule: nothing is forgotten, no momentum, memories begin empty, the output's gate is the
 * same everywhere. */
static void make_plain(test_layer *layer, double gamma) {
  set_gate(layer, "alpha_proj.weight", "alpha_proj.bias", 1);
  set_gate(layer, "theta_proj.weight", "theta_proj.bias", 0);
  set_gate(layer, "gamma_proj.weight", "gamma_proj.bias", gamma);
  make_constant(layer, "g_proj.weight", 1);
  fill(layer, "memory.w1", 0);
}

static const double silu_of_one = 0.73105857863000487925;

/* Titans with a matrix, token by token, without momentum: DeltaNet with beta = 2 gamma. The norm's
 * epsilon is too small for the scale of DeltaNet's queries to matter. */
static void test_titans_is_delta_net(void **state) {
  (void)state;
  const int64_t rows = 70;
  attn_mixer_options o = {.hidden = 24,
                          .heads = 4,
                          .kv_heads = 2,
                          .value_dim = 5,
                          .norm_epsilon = 1e-30,
                          .memory = ATTN_MEMORY_MATRIX,
                          .memory_chunk = 1};
  test_layer titans, delta;
  create(&titans, "titans", o);
  create(&delta, "delta_net", o);
  share_parameters(&titans, &delta);
  make_plain(&titans, 0.3);
  make_constant(&delta, "b_proj.weight", log(0.6 / 0.4));
  double *x = inputs_with_one(&titans, rows);
  double *y = apply(&titans, rows, x), *expected = apply(&delta, rows, x);
  assert_scaled(&titans, "y of DeltaNet", y, silu_of_one, expected, rows * o.hidden, close);
  free(x), free(y), free(expected);
  test_layer_destroy(&titans);
  test_layer_destroy(&delta);
}

/* With linear features, no constant among them and a window of 1, OmegaNet is Titans; and ATLAS
 * without Newton-Schulz and with eta = 1 is OmegaNet. */
static void test_omega_net_between(void **state) {
  (void)state;
  const int64_t rows = 70;
  attn_mixer_options o = {.hidden = 24,
                          .heads = 2,
                          .memory = ATTN_MEMORY_MATRIX,
                          .memory_window = 1,
                          .feature_degree = 1,
                          .newton_schulz = -1};
  test_layer titans, omega, atlas;
  create(&titans, "titans", o);
  create(&omega, "omega_net", o);
  create(&atlas, "atlas", o);
  share_parameters(&omega, &titans);
  set(&omega, "feature_scale", (double[]){0, 1});
  fill(&titans, "memory.w1", 0);
  fill(&omega, "memory.w1", 0);
  share_parameters(&atlas, &omega);
  set_gate(&atlas, "eta_proj.weight", "eta_proj.bias", 1);
  double *x = test_inputs(&titans, rows * o.hidden, 51), *expected = apply(&titans, rows, x);
  double *y = apply(&omega, rows, x), *other = apply(&atlas, rows, x);
  test_assert_close(&omega, "y of Titans", y, expected, rows * o.hidden, close);
  test_assert_close(&atlas, "y of OmegaNet", other, y, rows * o.hidden, close);
  free(x), free(y), free(other), free(expected);
  test_layer_destroy(&titans);
  test_layer_destroy(&omega);
  test_layer_destroy(&atlas);
}

/* Newton-Schulz does not see how large a step is: without momentum gamma does not matter. Only its
 * epsilon does, by 1e-7 of a step. */
static void test_atlas_ignores_scale(void **state) {
  (void)state;
  const int64_t rows = 40;
  attn_mixer_options o = {.hidden = 24, .heads = 2, .feature_dim = 3};
  test_layer layer;
  create(&layer, "atlas", o);
  set_gate(&layer, "theta_proj.weight", "theta_proj.bias", 0);
  double *x = test_inputs(&layer, rows * o.hidden, 52);
  set_gate(&layer, "gamma_proj.weight", "gamma_proj.bias", 0.9);
  double *y = apply(&layer, rows, x);
  set_gate(&layer, "gamma_proj.weight", "gamma_proj.bias", 0.5);
  double *other = apply(&layer, rows, x);
  test_assert_close(&layer, "y with another gamma", other, y, rows * o.hidden, 1e-4);
  free(x), free(y), free(other);
  test_layer_destroy(&layer);
}

/* Memories that forget everything and do not learn leave the initial one out of it, too: with alpha
 * = gamma = 0 a matrix recalls nothing. */
static void test_memory_is_all(void **state) {
  (void)state;
  attn_mixer_options o = {.hidden = 24, .heads = 2, .memory = ATTN_MEMORY_MATRIX};
  test_layer layer;
  create(&layer, "omega_net", o);
  set_gate(&layer, "alpha_proj.weight", "alpha_proj.bias", 0);
  set_gate(&layer, "gamma_proj.weight", "gamma_proj.bias", 0);
  double *x = test_inputs(&layer, 30 * o.hidden, 53), *y = apply(&layer, 30, x);
  for (int64_t i = 0; i < 30 * o.hidden; ++i) assert_true(y[i] == 0);
  free(x), free(y);
  test_layer_destroy(&layer);
}

int main(int argc, char **argv) {
  if (argc > 1) cmocka_set_test_filter(argv[1]); /* a pattern of names */
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_softmax),
      cmocka_unit_test(test_rotary_is_relative),
      cmocka_unit_test(test_groups),
      cmocka_unit_test(test_lightning),
      cmocka_unit_test(test_shifts),
      cmocka_unit_test(test_gla),
      cmocka_unit_test(test_no_write),
      cmocka_unit_test(test_perfect_write),
      cmocka_unit_test(test_orthonormal_keys),
      cmocka_unit_test(test_without_decay),
      cmocka_unit_test(test_equal_channels),
      cmocka_unit_test(test_latents_turn),
      cmocka_unit_test(test_latents_absorbed),
      cmocka_unit_test(test_hedgehog),
      cmocka_unit_test(test_hedgehog_without_features),
      cmocka_unit_test(test_lawcat_is_hedgehog),
      cmocka_unit_test(test_lawcat_is_a_mean),
      cmocka_unit_test(test_lawcat_has_no_positions),
      cmocka_unit_test(test_lolcats_with_all_in_its_window),
      cmocka_unit_test(test_lolcats_in_its_limits),
      cmocka_unit_test(test_lolcats),
      cmocka_unit_test(test_norm_attention),
      cmocka_unit_test(test_both_ways),
      cmocka_unit_test(test_diag_attention),
      cmocka_unit_test(test_diag_blocks),
      cmocka_unit_test(test_relu_scale),
      cmocka_unit_test(test_aaren),
      cmocka_unit_test(test_based),
      cmocka_unit_test(test_titans_is_delta_net),
      cmocka_unit_test(test_omega_net_between),
      cmocka_unit_test(test_atlas_ignores_scale),
      cmocka_unit_test(test_memory_is_all),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
