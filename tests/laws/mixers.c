/* The laws of values, for every mixer of the table: it equals its oracle, its gradients equal
 * finite differences, the future does not touch the past, packed equals separate, all kernel paths
 * agree, and a run repeats bit for bit. Those of states are in mixer_states.c. */
#include "support/mixers.h"

#include "base/random.h"
#include "engines/dense/dense.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static const attn_dtype dtypes[] = {ATTN_F64, ATTN_F32, ATTN_BF16};
enum { DTYPES = sizeof dtypes / sizeof *dtypes };

static double *zeros(int64_t count) {
  return calloc((size_t)count + 1, sizeof(double));
}

static void assert_equals_oracle(const test_layer *layer, const attn_layout *layout, double *x) {
  int64_t count = layout->rows * layer->options.hidden;
  double *y = zeros(count), *expected = zeros(count);
  assert_ok(test_layer_forward(layer, layout, x, y));
  test_layer_oracle(layer, layout, x, (const double *const *)layer->values, expected);
  test_assert_close(layer, "y", y, expected, count,
                    test_layer_tolerance(layer, layout, x, expected));
  free(y), free(expected);
}

/* Lengths around those of tiles and blocks: 1, a few, just over 64, over two blocks. */
static const int64_t lengths[] = {1, 5, 65, 150};

static void equals_oracle(const attn_mixer *mixer, const attn_mixer_options *options) {
  for (int d = 0; d < DTYPES; ++d) {
    test_layer layer;
    assert_ok(test_layer_create(&layer, mixer, options, dtypes[d], false));
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; ++i) {
      attn_layout layout = attn_layout_equal(i == 1 ? 3 : 1, lengths[i]);
      double *x = test_inputs(&layer, layout.rows * layer.options.hidden, 7 + i);
      assert_equals_oracle(&layer, &layout, x);
      free(x);
    }
    test_layer_destroy(&layer);
  }
}

static void each_case_equals_oracle(void *context) {
  (void)context;
  test_each_case(equals_oracle);
}

static void test_equals_oracle(void **state) {
  (void)state;
  test_on_every_path(each_case_equals_oracle, NULL);
}

/* More tokens than several of the largest blocks hold. */
static void long_equals_oracle(const attn_mixer *mixer, const attn_mixer_options *options) {
  for (int d = 0; d < DTYPES; ++d) {
    test_layer layer;
    assert_ok(test_layer_create(&layer, mixer, options, dtypes[d], false));
    attn_layout layout = attn_layout_equal(1, 700);
    double *x = test_inputs(&layer, layout.rows * layer.options.hidden, 10);
    assert_equals_oracle(&layer, &layout, x);
    free(x);
    test_layer_destroy(&layer);
  }
}

static void each_mixer_long(void *context) {
  (void)context;
  test_each_mixer(long_equals_oracle);
}

static void test_long_sequences(void **state) {
  (void)state;
  test_on_every_path(each_mixer_long, NULL);
}

/* Parameters may be as a model file stores them: all in bfloat16, decays and norms too. */
static void store_in_bfloat16(test_layer *layer) {
  for (int i = 0; i < layer->count; ++i) {
    attn_parameter *p = &layer->parameters[i];
    double *values = test_rounded(ATTN_BF16, layer->values[i], test_parameter_count(layer, i));
    assert_ok(test_layer_set(layer, i, values));
    attn_tensor_destroy(&p->value);
    p->value = test_from_doubles(values, ATTN_BF16, layer->shapes[i].rank, layer->shapes[i].shape);
    if (p->weight) assert_ok(attn_weight_set(p->weight, &p->value));
    free(values);
  }
}

static void stored_equals_oracle(const attn_mixer *mixer, const attn_mixer_options *options) {
  for (int d = 0; d < DTYPES; ++d) {
    test_layer layer;
    assert_ok(test_layer_create(&layer, mixer, options, dtypes[d], false));
    store_in_bfloat16(&layer);
    attn_layout layout = attn_layout_equal(1, 40);
    double *x = test_inputs(&layer, layout.rows * layer.options.hidden, 9);
    assert_equals_oracle(&layer, &layout, x);
    free(x);
    test_layer_destroy(&layer);
  }
}

static void test_stored_in_bfloat16(void **state) {
  (void)state;
  test_each_case(stored_equals_oracle);
}

/* Gradients -------------------------------------------------------------------------------------
 */

/* What is differentiated: sum(r (.) y) as a function of x, the context and the parameters. */
enum { OF_X = -1, OF_CONTEXT = -2 };

typedef struct function {
  test_layer *layer;
  attn_layout layout;
  double *x, *r, *y;
} function;

static double evaluate(function *f) {
  int64_t count = f->layout.rows * f->layer->options.hidden;
  double sum = 0;
  assert_ok(test_layer_forward(f->layer, &f->layout, f->x, f->y));
  for (int64_t i = 0; i < count; ++i) sum += f->r[i] * f->y[i];
  return sum;
}

/* f at `point + step * direction`, the point being x, the context or parameter i. */
static double evaluate_at(function *f, int i, const double *point, const double *direction,
                          double step, int64_t count) {
  double *values = zeros(count), *x = f->x;
  const double *context = f->layer->context;
  for (int64_t j = 0; j < count; ++j) values[j] = point[j] + step * direction[j];
  if (i == OF_X)
    f->x = values;
  else if (i == OF_CONTEXT)
    f->layer->context = values;
  else
    assert_ok(test_layer_set(f->layer, i, values));
  double result = evaluate(f);
  f->x = x;
  f->layer->context = context;
  free(values);
  return result;
}

/* The five-point formula: its own error is of the order (step / width)^4, width 1e-3 where a norm
 * turns around a vector near zero (its epsilon is 1e-6), and that of the rounding of f is about
 * 1e-16 / step: 1e-8 and 1e-11. */
static double slope(function *f, int i, const double *point, const double *direction,
                    int64_t count) {
  const double h = 1e-5;
  return (8 * (evaluate_at(f, i, point, direction, h, count) -
               evaluate_at(f, i, point, direction, -h, count)) -
          (evaluate_at(f, i, point, direction, 2 * h, count) -
           evaluate_at(f, i, point, direction, -2 * h, count))) /
         (12 * h);
}

/* The gradient along random directions, in which every element takes part, and along single axes.
 */
static void check_gradient(function *f, int i, const double *gradient, int64_t count) {
  const double limit = 1e-7; /* of the formula, relative; a wrong term is off by its own size */
  const int directions = 2, axes = 2;
  double *point = zeros(count), *direction = zeros(count), norm = 0;
  attn_random random = {.seed = 31 + (uint64_t)(i + 2)};
  const double *at = i == OF_X ? f->x : i == OF_CONTEXT ? f->layer->context : f->layer->values[i];
  const char *name = i == OF_X ? "x" : i == OF_CONTEXT ? "the context" : f->layer->shapes[i].name;
  memcpy(point, at, (size_t)count * sizeof *point);
  for (int64_t j = 0; j < count; ++j) norm += gradient[j] * gradient[j];
  norm = sqrt(norm);
  for (int d = 0; d < directions + axes; ++d) {
    test_fill_normal(direction, count, 0, 1 / sqrt((double)count), 50 + (uint64_t)d);
    if (d >= directions) {
      memset(direction, 0, (size_t)count * sizeof *direction);
      direction[attn_random_below(&random, (uint64_t)count)] = 1;
    }
    double expected = slope(f, i, point, direction, count), got = 0;
    for (int64_t j = 0; j < count; ++j) got += gradient[j] * direction[j];
    if (!(fabs(got - expected) <= limit * (norm + 1)))
      fail_msg("%s: the gradient of %s along direction %d is %.10g, by differences %.10g",
               test_case_name(f->layer), name, d, got, expected);
  }
  if (i >= 0) assert_ok(test_layer_set(f->layer, i, point));
  free(point), free(direction);
}

/* Of x, the context if the layer has one, and the parameters. */
static void check_gradients(test_layer *layer, const attn_layout *layout) {
  function f = {.layer = layer, .layout = *layout};
  int64_t count = layout->rows * layer->options.hidden;
  int64_t context = layer->context ? layer->context_layout.rows * layer->options.hidden : 0;
  double *d_parameters[ATTN_MIXER_PARAMETERS], *dx = zeros(count);
  test_parameters_alloc(layer, d_parameters);
  layer->d_context = zeros(context);
  f.x = test_inputs(layer, count, 3);
  f.r = test_inputs(layer, count, 4);
  f.y = zeros(count);
  assert_ok(test_layer_gradients(layer, layout, f.x, f.r, dx, d_parameters));
  check_gradient(&f, OF_X, dx, count);
  if (context) check_gradient(&f, OF_CONTEXT, layer->d_context, context);
  for (int i = 0; i < layer->count; ++i)
    if (!layer->shapes[i].statistic)
      check_gradient(&f, i, d_parameters[i], test_parameter_count(layer, i));
  test_parameters_free(layer, d_parameters);
  free(f.x), free(f.r), free(f.y), free(dx), free(layer->d_context);
}

static void gradients_equal_differences(const attn_mixer *mixer,
                                        const attn_mixer_options *options) {
  if (mixer->spiking) return; /* steps have no slope: tests/unit/spikes.c checks the surrogate */
  test_layer layer;
  assert_ok(test_layer_create(&layer, mixer, options, ATTN_F64, true));
  attn_layout layout = attn_layout_equal(2, 35);
  check_gradients(&layer, &layout);
  test_layer_destroy(&layer);
}

static void test_gradients(void **state) {
  (void)state;
  test_each_case(gradients_equal_differences);
}

/* Gradients of x and of all parameters in one array: x, then parameter by parameter. */
static int64_t gradient_count(const test_layer *layer, const attn_layout *layout) {
  int64_t count = layout->rows * layer->options.hidden;
  for (int i = 0; i < layer->count; ++i) count += test_parameter_count(layer, i);
  return count;
}

static double *gradients_of(const test_layer *layer, const attn_layout *layout, const double *x,
                            const double *r) {
  int64_t used = layout->rows * layer->options.hidden;
  double *all = zeros(gradient_count(layer, layout)), *parts[ATTN_MIXER_PARAMETERS];
  for (int i = 0; i < layer->count; ++i) {
    parts[i] = all + used;
    used += test_parameter_count(layer, i);
  }
  assert_ok(test_layer_gradients(layer, layout, x, r, all, parts));
  return all;
}

/* How far gradients of the float64 layer at the narrow one's numbers move when inputs and weights
 * move by one rounding (as in test_layer_tolerance): the norm of the difference. */
static double *moved_gradients(const test_layer *narrow, test_layer *reference,
                               const attn_layout *layout, const double *x, const double *r) {
  double *parameters[ATTN_MIXER_PARAMETERS];
  double *moved_x = test_moved_inputs(narrow, x, layout->rows * narrow->options.hidden);
  test_moved_parameters(narrow, parameters);
  for (int i = 0; i < narrow->count; ++i) assert_ok(test_layer_set(reference, i, parameters[i]));
  double *moved = gradients_of(reference, layout, moved_x, r);
  test_parameters_free(narrow, parameters);
  free(moved_x);
  return moved;
}

static double distance(const double *a, const double *b, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return sqrt(sum);
}

/* Twice the tolerance of a forward, because a backward rounds about as often as the forward whose
 * results it reads; and one rounding of the layer's whole gradient, because a gradient that is
 * small by cancellation is a sum of terms that are not.
 *
 * Where a score of ReLU changes its sign the gradient jumps, which a move by one rounding seldom
 * shows and any number of times its result does not either: there the inputs are moved by all
 * roundings at once, too, and what that changes is allowed once. */
static void narrow_gradients(const attn_mixer *mixer, const attn_mixer_options *options,
                             attn_dtype dtype) {
  test_layer layer, reference;
  assert_ok(test_layer_create(&layer, mixer, options, dtype, true));
  assert_ok(test_layer_create(&reference, mixer, options, ATTN_F64, true));
  for (int i = 0; i < layer.count; ++i) assert_ok(test_layer_set(&reference, i, layer.values[i]));
  attn_layout layout = attn_layout_equal(1, 70);
  int64_t rows = layout.rows * layer.options.hidden, all = gradient_count(&layer, &layout);
  double *x = test_inputs(&layer, rows, 3), *r = test_inputs(&layer, rows, 4);
  double *got = gradients_of(&layer, &layout, x, r), *none = zeros(all);
  double *expected = gradients_of(&reference, &layout, x, r);
  double *moved = moved_gradients(&layer, &reference, &layout, x, r);
  double floor = test_operation_error(dtype) * distance(expected, none, all);
  layer.moves = TEST_ROUNDINGS_IN_LAYERS;
  double *far = options->relu_scores ? moved_gradients(&layer, &reference, &layout, x, r) : NULL;
  for (int64_t i = -1, first = 0; i < layer.count; ++i) {
    int64_t count = i < 0 ? rows : test_parameter_count(&layer, (int)i);
    double error = distance(got + first, expected + first, count);
    double sensitivity = distance(moved + first, expected + first, count);
    double limit = 2 * TEST_ROUNDINGS_IN_LAYERS * sensitivity + floor;
    if (far) limit += distance(far + first, expected + first, count);
    if (!(error <= limit))
      fail_msg("%s: the gradient of %s is off by %.3g, at most %.3g", test_case_name(&layer),
               i < 0 ? "x" : layer.shapes[i].name, error, limit);
    first += count;
  }
  free(x), free(r), free(got), free(none), free(expected), free(moved), free(far);
  test_layer_destroy(&layer);
  test_layer_destroy(&reference);
}

static void both_narrow_gradients(const attn_mixer *mixer, const attn_mixer_options *options) {
  narrow_gradients(mixer, options, ATTN_F32);
  narrow_gradients(mixer, options, ATTN_BF16);
}

static void each_case_narrow_gradients(void *context) {
  (void)context;
  test_each_case(both_narrow_gradients);
}

static void test_narrow_gradients(void **state) {
  (void)state;
  test_on_every_path(each_case_narrow_gradients, NULL);
}

/* Causality -------------------------------------------------------------------------------------
 */

/* Masked products are exact zeros and blocks begin at fixed tokens, so that what comes later does
 * not even change a rounding of what came before. */
static void future_is_hidden(const attn_mixer *mixer, const attn_mixer_options *options) {
  const int64_t length = 140, starts[] = {1, 17, 64, 100, 139};
  for (int d = 0; d < DTYPES; ++d) {
    test_layer layer;
    assert_ok(test_layer_create(&layer, mixer, options, dtypes[d], false));
    attn_layout layout = attn_layout_equal(1, length);
    int64_t hidden = layer.options.hidden, count = length * hidden;
    double *x = test_inputs(&layer, count, 5), *other = test_inputs(&layer, count, 6);
    double *y = zeros(count), *changed = zeros(count);
    assert_ok(test_layer_forward(&layer, &layout, x, y));
    for (size_t i = 0; i < sizeof starts / sizeof *starts; ++i) {
      int64_t past = starts[i] * hidden;
      memcpy(other, x, (size_t)past * sizeof *x);
      assert_ok(test_layer_forward(&layer, &layout, other, changed));
      test_assert_same_bits(&layer, "y before a change of x", changed, y, past);
      /* a neuron may gather what it was given and fire some tokens later */
      int64_t within = mixer->spiking ? length - starts[i] : 1, patience = 20;
      if (mixer->spiking && within < patience) continue;
      if (memcmp(changed + past, y + past, (size_t)(within * hidden) * sizeof *y) == 0)
        fail_msg("%s: x at token %lld does not reach y", test_case_name(&layer),
                 (long long)starts[i]);
    }
    free(x), free(other), free(y), free(changed);
    test_layer_destroy(&layer);
  }
}

/* The first token that sees the last one of `length`. */
static int64_t first_to_see(const attn_mixer_options *o, int64_t length) {
  if (o->block) return (length - 1) / o->block * o->block;
  return o->window && o->window < length ? length - o->window : 0;
}

/* Without causality the last token reaches the first one, however the sequence is cut into tiles.
 */
static void future_is_seen(const attn_mixer *mixer, const attn_mixer_options *options) {
  if (!options->bidirectional) return;
  const int64_t length = 140, first = first_to_see(options, length);
  for (int d = 0; d < DTYPES; ++d) {
    test_layer layer;
    assert_ok(test_layer_create(&layer, mixer, options, dtypes[d], false));
    attn_layout layout = attn_layout_equal(1, length);
    int64_t hidden = layer.options.hidden, count = length * hidden, last = count - hidden;
    double *x = test_inputs(&layer, count, 5), *other = test_inputs(&layer, count, 6);
    double *y = zeros(count), *changed = zeros(count);
    assert_ok(test_layer_forward(&layer, &layout, x, y));
    memcpy(other, x, (size_t)last * sizeof *x);
    assert_ok(test_layer_forward(&layer, &layout, other, changed));
    test_assert_same_bits(&layer, "y before the window", changed, y, first * hidden);
    if (memcmp(changed + first * hidden, y + first * hidden, (size_t)hidden * sizeof *y) == 0)
      fail_msg("%s: the last token does not reach token %lld", test_case_name(&layer),
               (long long)first);
    free(x), free(other), free(y), free(changed);
    test_layer_destroy(&layer);
  }
}

static void each_case_future(void *context) {
  (void)context;
  test_each_causal_case(future_is_hidden);
  test_each_case(future_is_seen);
}

static void test_future(void **state) {
  (void)state;
  test_on_every_path(each_case_future, NULL);
}

/* Packed sequences ------------------------------------------------------------------------------
 */

static const int32_t offsets[] = {0, 3, 3, 73, 74, 139, 160};
enum { SEQUENCES = sizeof offsets / sizeof *offsets - 1 };

static void packed_forward(const attn_mixer *mixer, const attn_mixer_options *options) {
  attn_layout layout = attn_layout_packed(SEQUENCES, offsets);
  for (int d = 0; d < DTYPES; ++d) {
    test_layer layer;
    assert_ok(test_layer_create(&layer, mixer, options, dtypes[d], false));
    double *x = test_inputs(&layer, layout.rows * layer.options.hidden, 8);
    assert_equals_oracle(&layer, &layout, x);
    free(x);
    test_layer_destroy(&layer);
  }
}

static void each_case_packed(void *context) {
  (void)context;
  test_each_case(packed_forward);
}

/* Gradients of all sequences at once against the sum over each alone. */
static void packed_gradients(const attn_mixer *mixer, const attn_mixer_options *options) {
  attn_layout layout = attn_layout_packed(SEQUENCES, offsets);
  test_layer layer;
  assert_ok(test_layer_create(&layer, mixer, options, ATTN_F64, true));
  int64_t hidden = layer.options.hidden, rows = layout.rows * hidden;
  int64_t count = gradient_count(&layer, &layout);
  double *x = test_inputs(&layer, rows, 8), *r = test_inputs(&layer, rows, 9);
  double *packed = gradients_of(&layer, &layout, x, r), *separate = zeros(count);
  for (int b = 0; b < SEQUENCES; ++b) {
    int64_t length = offsets[b + 1] - offsets[b], first = offsets[b] * hidden;
    attn_layout one = attn_layout_equal(1, length);
    if (length == 0) continue;
    double *part = gradients_of(&layer, &one, x + first, r + first);
    memcpy(separate + first, part, (size_t)(length * hidden) * sizeof *part);
    for (int64_t i = rows; i < count; ++i) separate[i] += part[i - rows + length * hidden];
    free(part);
  }
  test_assert_close(&layer, "packed gradients", packed, separate, count, TEST_FLOAT64_ERROR);
  free(x), free(r), free(packed), free(separate);
  test_layer_destroy(&layer);
}

static void test_packed(void **state) {
  (void)state;
  test_on_every_path(each_case_packed, NULL);
  test_each_case(packed_gradients);
}

/* Cross-attention -------------------------------------------------------------------------------
 */

/* Queries and contexts of these lengths: equal ones, packed ones, and one of each. The second pair
 * of packed sequences has no queries. */
static const int32_t context_offsets[] = {0, 70, 75, 76, 80, 150, 157};
typedef struct across {
  attn_layout layout, context_layout;
} across;
enum { CROSSINGS = 6 };

static across crossing(int i) {
  attn_layout packed = attn_layout_packed(SEQUENCES, offsets);
  attn_layout packed_context = attn_layout_packed(SEQUENCES, context_offsets);
  const across all[CROSSINGS] = {{attn_layout_equal(1, 1), attn_layout_equal(1, 150)},
                                 {attn_layout_equal(3, 65), attn_layout_equal(3, 9)},
                                 {attn_layout_equal(9, 4), attn_layout_equal(9, 1)},
                                 {packed, packed_context},
                                 {packed, attn_layout_equal(SEQUENCES, 11)},
                                 {attn_layout_equal(SEQUENCES, 7), packed_context}};
  return all[i];
}

/* Whether the mixer has cross-attention at these options. */
static bool crosses(const attn_mixer *mixer, const attn_mixer_options *options) {
  return mixer->info.abilities & ATTN_ABILITY_CROSS && !options->window;
}

static void crossing_equals_oracle(const attn_mixer *mixer, const attn_mixer_options *options) {
  for (int d = 0; d < DTYPES && crosses(mixer, options); ++d) {
    test_layer layer;
    assert_ok(test_layer_create(&layer, mixer, options, dtypes[d], false));
    for (int i = 0; i < CROSSINGS; ++i) {
      across c = crossing(i);
      double *x = test_inputs(&layer, c.layout.rows * layer.options.hidden, 7);
      double *context = test_inputs(&layer, c.context_layout.rows * layer.options.hidden, 8);
      layer.context = context;
      layer.context_layout = c.context_layout;
      assert_equals_oracle(&layer, &c.layout, x);
      free(x), free(context);
    }
    test_layer_destroy(&layer);
  }
}

static void each_case_crossing(void *context) {
  (void)context;
  test_each_case(crossing_equals_oracle);
}

static void crossing_gradients(const attn_mixer *mixer, const attn_mixer_options *options) {
  for (int i = 1; i < CROSSINGS && crosses(mixer, options); i += 2) { /* equal, packed, mixed */
    test_layer layer;
    across c = crossing(i);
    assert_ok(test_layer_create(&layer, mixer, options, ATTN_F64, true));
    double *context = test_inputs(&layer, c.context_layout.rows * layer.options.hidden, 8);
    layer.context = context;
    layer.context_layout = c.context_layout;
    check_gradients(&layer, &c.layout);
    free(context);
    test_layer_destroy(&layer);
  }
}

/* Queries do not see each other: those of a prefix, and one alone, have the outputs that they have
 * among all (CAB's check of causal cross-attention). Every row of the context reaches them. */
static void queries_are_alone(const attn_mixer *mixer, const attn_mixer_options *options) {
  enum { QUERIES = 70, KEYS = 90 };
  const double published = 1e-4; /* CAB's limit of the sum of differences */
  if (!crosses(mixer, options)) return;
  test_layer layer;
  assert_ok(test_layer_create(&layer, mixer, options, ATTN_F32, false));
  attn_layout layout = attn_layout_equal(1, QUERIES);
  int64_t hidden = layer.options.hidden, count = QUERIES * hidden;
  double *x = test_inputs(&layer, count, 7), *y = zeros(count), *part = zeros(count);
  double *context = test_inputs(&layer, KEYS * hidden, 8);
  layer.context = context;
  layer.context_layout = attn_layout_equal(1, KEYS);
  assert_ok(test_layer_forward(&layer, &layout, x, y));
  for (int64_t length = 1; length < QUERIES; length += 23) {
    attn_layout prefix = attn_layout_equal(1, length);
    double difference = 0;
    assert_ok(test_layer_forward(&layer, &prefix, x, part));
    for (int64_t i = 0; i < length * hidden; ++i) difference += fabs(part[i] - y[i]);
    if (!(difference < published))
      fail_msg("%s: the first %lld of %d queries differ by %g", test_case_name(&layer),
               (long long)length, QUERIES, difference);
  }
  for (int64_t row = 0; row < KEYS; row += KEYS - 1) {
    context[row * hidden] += 1;
    assert_ok(test_layer_forward(&layer, &layout, x, part));
    context[row * hidden] -= 1;
    for (int64_t q = 0; q < QUERIES; ++q)
      if (memcmp(part + q * hidden, y + q * hidden, (size_t)hidden * sizeof *y) == 0)
        fail_msg("%s: row %lld of the context does not reach query %lld", test_case_name(&layer),
                 (long long)row, (long long)q);
  }
  free(x), free(y), free(part), free(context);
  test_layer_destroy(&layer);
}

/* A bidirectional layer is cross-attention to itself. */
static void self_is_a_crossing(const attn_mixer *mixer, const attn_mixer_options *options) {
  if (!crosses(mixer, options) || !options->bidirectional) return;
  test_layer layer;
  assert_ok(test_layer_create(&layer, mixer, options, ATTN_F64, false));
  attn_layout layout = attn_layout_packed(SEQUENCES, offsets);
  int64_t count = layout.rows * layer.options.hidden;
  double *x = test_inputs(&layer, count, 7), *y = zeros(count), *across_itself = zeros(count);
  assert_ok(test_layer_forward(&layer, &layout, x, y));
  layer.context = x;
  layer.context_layout = layout;
  assert_ok(test_layer_forward(&layer, &layout, x, across_itself));
  test_assert_close(&layer, "y across itself", across_itself, y, count, TEST_FLOAT64_ERROR);
  free(x), free(y), free(across_itself);
  test_layer_destroy(&layer);
}

static void test_crossing(void **state) {
  (void)state;
  test_on_every_path(each_case_crossing, NULL);
  test_each_case(crossing_gradients);
  test_each_case(queries_are_alone);
  test_each_case(self_is_a_crossing);
}

/* Repeating -------------------------------------------------------------------------------------
 */

static void repeats(const attn_mixer *mixer, const attn_mixer_options *options) {
  for (int d = 0; d < DTYPES; ++d) {
    test_layer layer;
    assert_ok(test_layer_create(&layer, mixer, options, dtypes[d], true));
    attn_layout layout = attn_layout_equal(2, 100);
    int64_t rows = layout.rows * layer.options.hidden;
    double *x = test_inputs(&layer, rows, 3), *r = test_inputs(&layer, rows, 4);
    double *y[2];
    for (int run = 0; run < 2; ++run) {
      y[run] = zeros(rows);
      assert_ok(test_layer_forward(&layer, &layout, x, y[run]));
    }
    test_assert_same_bits(&layer, "y, again", y[1], y[0], rows);
    double *first = gradients_of(&layer, &layout, x, r);
    double *again = gradients_of(&layer, &layout, x, r);
    test_assert_same_bits(&layer, "gradients, again", again, first,
                          gradient_count(&layer, &layout));
    free(x), free(r), free(y[0]), free(y[1]), free(first), free(again);
    test_layer_destroy(&layer);
  }
}

static void each_mixer_repeats(void *context) {
  (void)context;
  for (int threads = 1; threads <= 3; ++threads) {
    assert_ok(attn_set_threads(threads));
    test_each_mixer(repeats);
  }
  assert_ok(attn_set_threads(0));
}

static void test_repeats(void **state) {
  (void)state;
  test_on_every_path(each_mixer_repeats, NULL);
}

int main(int argc, char **argv) {
  if (argc > 1) cmocka_set_test_filter(argv[1]); /* a pattern of names */
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_equals_oracle),
      cmocka_unit_test(test_long_sequences),
      cmocka_unit_test(test_stored_in_bfloat16),
      cmocka_unit_test(test_gradients),
      cmocka_unit_test(test_narrow_gradients),
      cmocka_unit_test(test_future),
      cmocka_unit_test(test_packed),
      cmocka_unit_test(test_crossing),
      cmocka_unit_test(test_repeats),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
