/* Spikes and batch norms: neurons against their oracle, surrogate gradient included; batch norms by
 * their definition and by finite differences, with statistics of the batch and with running ones,
 * which the optimiser takes along. */
#include "support/test.h"

#include "graph/operations.h"
#include "layers/layers.h"
#include "oracles/lif.h"
#include "training/optimiser.h"

#include <math.h>
#include <string.h>

static double *numbers(int64_t count) {
  return calloc((size_t)count + 1, sizeof(double));
}

static attn_tensor on_graph(attn_graph *g, attn_dtype dtype, int rank, const int64_t *shape,
                            const double *x) {
  attn_tensor tensor = attn_graph_tensor(g, dtype, rank, shape), source;
  assert_ok(attn_tensor_wrap((void *)(uintptr_t)x, ATTN_F64, rank, shape, &source));
  assert_ok(attn_tensor_copy(&source, &tensor));
  return tensor;
}

static void take(const attn_tensor *tensor, double *y) {
  double *values = test_to_doubles(tensor);
  memcpy(y, values, (size_t)attn_tensor_count(tensor) * sizeof *y);
  free(values);
}

/* Neurons ---------------------------------------------------------------------------------------
 */

enum { N = 70 }; /* more than a block of channels */
static const int32_t offsets[] = {0, 40, 40, 41, 90};
enum { SEQUENCES = 4, ROWS = 90 };

/* Spikes and, for the loss sum (s - target)^2 / 2, dx. */
static void run_neurons(attn_dtype compute, const attn_layout *layout, const attn_lif *neuron,
                        const double *x, const double *target, double *spikes, double *dx) {
  attn_graph *g;
  assert_ok(attn_graph_create_on(test_device(), compute, &g));
  attn_graph_reset(g, true);
  const int64_t shape[2] = {layout->rows, N};
  attn_tensor in = on_graph(g, g->wide, 2, shape, x);
  attn_tensor aim = on_graph(g, g->wide, 2, shape, target);
  attn_var *leaf = attn_graph_leaf(g, &in);
  attn_var *s = attn_op_lif(g, layout, neuron, leaf, g->compute, NULL);
  attn_var *loss = attn_op_squared_error(g, s, &aim, 0.5);
  assert_ok(attn_graph_backward(g, loss, 1));
  take(&s->value, spikes);
  take(&leaf->gradient, dx);
  attn_graph_destroy(g);
}

static void test_neurons(void **state) {
  (void)state;
  const attn_dtype dtypes[] = {ATTN_F64, ATTN_F32, ATTN_BF16};
  const double errors[] = {1e-12, 1e-5, 1e-2};
  const attn_lif neurons[] = {{2, 1}, {2, 0.5}, {1, 1}, {5, 0.3}};
  const attn_layout layouts[] = {attn_layout_equal(3, 30), attn_layout_packed(SEQUENCES, offsets)};
  double *x = numbers(ROWS * N), *target = numbers(ROWS * N), *spikes = numbers(ROWS * N);
  double *dx = numbers(ROWS * N), *expected = numbers(ROWS * N), *d_expected = numbers(ROWS * N);
  double *ds = numbers(ROWS * N);
  for (int i = 0; i < 4 * 2 * 3; ++i) {
    const attn_lif *neuron = &neurons[i % 4];
    const attn_layout *layout = &layouts[i / 4 % 2];
    test_fill_normal(x, ROWS * N, 0.5, 1.5, 1 + (uint64_t)i);
    test_fill_normal(target, ROWS * N, 0, 1, 100);
    for (int j = 0; j < ROWS * N; ++j) x[j] = (float)x[j], target[j] = (float)target[j];
    run_neurons(dtypes[i / 8], layout, neuron, x, target, spikes, dx);
    int ones = 0;
    for (int j = 0; j < ROWS * N; ++j) {
      assert_true(spikes[j] == 0 || spikes[j] == 1);
      ones += spikes[j] == 1;
    }
    assert_in_range(ones, ROWS * N / 50, ROWS * N / 50 * 49);
    for (int64_t b = 0; b < layout->batch; ++b) {
      int64_t first = attn_layout_first(layout, b) * N, rows = attn_layout_length(layout, b);
      oracle_lif(expected + first, x + first, rows, N, neuron->tau, neuron->threshold);
      for (int64_t j = first; j < first + rows * N; ++j) ds[j] = expected[j] - target[j];
      oracle_lif_backward(d_expected + first, x + first, ds + first, rows, N, neuron->tau,
                          neuron->threshold);
    }
    assert_true(test_relative_error(spikes, expected, ROWS * N) == 0);
    assert_true(test_relative_error(dx, d_expected, ROWS * N) < errors[i / 8]);
  }
  free(x), free(target), free(spikes), free(dx), free(expected), free(d_expected), free(ds);
}

/* Potentials carry over: two pieces give the spikes of one. */
static void test_potentials(void **state) {
  (void)state;
  const attn_lif neuron = {2, 1};
  double *x = numbers(ROWS * N), *whole = numbers(ROWS * N), *pieces = numbers(ROWS * N);
  test_fill_normal(x, ROWS * N, 1, 1, 3);
  oracle_lif(whole, x, ROWS, N, neuron.tau, neuron.threshold);
  attn_tensor v;
  const int64_t n = N;
  assert_ok(attn_tensor_create_on(test_device(), ATTN_F64, 1, &n, &v));
  assert_ok(attn_tensor_fill(&v, 0));
  attn_graph *g;
  assert_ok(attn_graph_create_on(test_device(), ATTN_F64, &g));
  for (int64_t t = 0, rows; t < ROWS; t += rows) {
    rows = t == 0 ? 37 : t == 37 ? 1 : ROWS - t;
    attn_graph_reset(g, false);
    attn_layout layout = attn_layout_equal(1, rows);
    attn_tensor in = on_graph(g, ATTN_F64, 2, (int64_t[]){rows, N}, x + t * N);
    attn_var *s = attn_op_lif(g, &layout, &neuron, attn_graph_input(g, &in), ATTN_F64, &v);
    assert_ok(attn_graph_status(g));
    take(&s->value, pieces + t * N);
  }
  assert_true(test_relative_error(pieces, whole, ROWS * N) == 0);
  attn_graph_destroy(g);
  attn_tensor_destroy(&v);
  free(x), free(whole), free(pieces);
}

static void test_refusals(void **state) {
  (void)state;
  attn_graph *g;
  attn_layout layout = attn_layout_equal(1, 2);
  double x[6] = {0};
  assert_ok(attn_graph_create_on(test_device(), ATTN_F32, &g));
  const attn_lif bad[] = {{0.5, 1}, {2, 0}, {NAN, 1}};
  for (int i = 0; i < 4; ++i) {
    attn_graph_reset(g, false);
    attn_tensor in = on_graph(g, i == 3 ? ATTN_BF16 : ATTN_F32, 2, (int64_t[]){2, 3}, x);
    assert_null(attn_op_lif(g, &layout, i == 3 ? &(attn_lif){2, 1} : &bad[i],
                            attn_graph_input(g, &in), ATTN_F32, NULL));
    assert_int_equal(attn_graph_status(g), ATTN_INVALID_SHAPE);
  }
  attn_graph_destroy(g);
}

/* Batch norms -----------------------------------------------------------------------------------
 */

enum { CHANNELS = 5, BATCH = 23 };
static const double epsilon = 1e-3;

typedef struct norm_test {
  attn_parameter weight, bias, mean, variance;
  double x[BATCH * CHANNELS], target[BATCH * CHANNELS];
} norm_test;

static void make_vector(attn_parameter *p, const char *name, double mean, double deviation,
                        uint64_t seed, bool trains) {
  double values[CHANNELS];
  const int64_t n = CHANNELS;
  test_fill_normal(values, CHANNELS, mean, deviation, seed);
  *p = (attn_parameter){.name = name};
  p->value = test_from_doubles(values, ATTN_F64, 1, &n);
  if (!trains) return;
  assert_ok(attn_tensor_create_on(test_device(), ATTN_F64, 1, &n, &p->gradient));
  assert_ok(attn_tensor_fill(&p->gradient, 0));
}

static void make_norm(norm_test *n, bool of_batch) {
  make_vector(&n->weight, "weight", 1, 0.3, 1, true);
  make_vector(&n->bias, "bias", 0, 0.3, 2, true);
  make_vector(&n->mean, "mean", 0, 1, 3, of_batch);
  make_vector(&n->variance, "variance", 2, 0.2, 4, of_batch);
  n->mean.statistic = n->variance.statistic = true;
  test_fill_normal(n->x, BATCH * CHANNELS, 3, 2, 5);
  test_fill_normal(n->target, BATCH * CHANNELS, 0, 1, 6);
}

static void free_norm(norm_test *n) {
  attn_parameter *all[] = {&n->weight, &n->bias, &n->mean, &n->variance};
  for (int i = 0; i < 4; ++i) {
    attn_tensor_destroy(&all[i]->value);
    attn_tensor_destroy(&all[i]->gradient);
  }
}

/* The loss sum (y - target)^2 / 2; y and, if wanted, dx, with gradients of parameters times `scale`
 * added up. */
static double run_norm(norm_test *n, bool recording, double scale, double *y, double *dx) {
  attn_graph *g;
  assert_ok(attn_graph_create_on(test_device(), ATTN_F64, &g));
  attn_graph_reset(g, recording);
  const int64_t shape[2] = {BATCH, CHANNELS};
  attn_tensor in = on_graph(g, ATTN_F64, 2, shape, n->x);
  attn_tensor aim = on_graph(g, ATTN_F64, 2, shape, n->target);
  attn_var *leaf = attn_graph_leaf(g, &in);
  attn_batch_norm norm = {&n->mean, &n->variance, epsilon};
  attn_var *out = attn_layer_batch_norm(g, leaf, attn_graph_parameter(g, &n->weight),
                                        attn_graph_parameter(g, &n->bias), &norm, ATTN_F64);
  attn_var *loss = attn_op_squared_error(g, out, &aim, 0.5);
  assert_ok(attn_graph_status(g));
  double value;
  take(&loss->value, &value);
  if (y) take(&out->value, y);
  if (dx) {
    assert_ok(attn_graph_backward(g, loss, scale));
    take(&leaf->gradient, dx);
  }
  attn_graph_destroy(g);
  return value;
}

static double *values_of(const attn_tensor *t) {
  return test_to_doubles(t);
}

/* mean and (biased) variance of a channel of the batch */
static void measure(const norm_test *n, int c, double *mean, double *variance) {
  *mean = *variance = 0;
  for (int r = 0; r < BATCH; ++r) *mean += n->x[r * CHANNELS + c] / BATCH;
  for (int r = 0; r < BATCH; ++r) *variance += pow(n->x[r * CHANNELS + c] - *mean, 2) / BATCH;
}

static void check_values(norm_test *n, bool of_batch) {
  double y[BATCH * CHANNELS], expected[BATCH * CHANNELS];
  double *w = values_of(&n->weight.value), *b = values_of(&n->bias.value);
  double *means = values_of(&n->mean.value), *variances = values_of(&n->variance.value);
  run_norm(n, of_batch, 1, y, NULL);
  for (int c = 0; c < CHANNELS; ++c) {
    double mean = means[c], variance = variances[c];
    if (of_batch) measure(n, c, &mean, &variance);
    for (int r = 0; r < BATCH; ++r)
      expected[r * CHANNELS + c] =
          (n->x[r * CHANNELS + c] - mean) / sqrt(variance + epsilon) * w[c] + b[c];
  }
  assert_true(test_relative_error(y, expected, BATCH * CHANNELS) < 1e-13);
  free(w), free(b), free(means), free(variances);
}

static void set(const attn_tensor *vector, int c, double value) {
  attn_tensor element;
  assert_ok(attn_tensor_select(vector, 0, c, &element));
  assert_ok(attn_tensor_fill(&element, value));
}

/* The gradient of x by differences, of a recorded forward, since that is what decides. */
static void check_gradient(norm_test *n) {
  double dx[BATCH * CHANNELS];
  const double h = 1e-5;
  run_norm(n, true, 1, NULL, dx);
  double *dw = values_of(&n->weight.gradient), *db = values_of(&n->bias.gradient);
  for (int i = 0; i < BATCH * CHANNELS; i += 7) {
    double x = n->x[i];
    n->x[i] = x + h;
    double above = run_norm(n, true, 1, NULL, NULL);
    n->x[i] = x - h;
    double below = run_norm(n, true, 1, NULL, NULL);
    n->x[i] = x;
    assert_true(fabs((above - below) / (2 * h) - dx[i]) < 1e-7);
  }
  attn_parameter *vectors[] = {&n->weight, &n->bias};
  for (int p = 0; p < 2; ++p)
    for (int c = 0; c < CHANNELS; ++c) {
      int64_t at[1] = {c};
      double w = attn_tensor_get(&vectors[p]->value, at);
      set(&vectors[p]->value, c, w + h);
      double above = run_norm(n, true, 1, NULL, NULL);
      set(&vectors[p]->value, c, w - h);
      double below = run_norm(n, true, 1, NULL, NULL);
      set(&vectors[p]->value, c, w);
      assert_true(fabs((above - below) / (2 * h) - (p ? db : dw)[c]) < 1e-7);
    }
  free(dw), free(db);
}

static void test_running(void **state) {
  (void)state;
  norm_test n;
  make_norm(&n, false);
  check_values(&n, false);
  check_gradient(&n);
  free_norm(&n);
}

static void test_of_batch(void **state) {
  (void)state;
  norm_test n;
  make_norm(&n, true);
  check_values(&n, true);
  check_gradient(&n);
  double recorded[BATCH * CHANNELS], still[BATCH * CHANNELS];
  run_norm(&n, true, 1, recorded, NULL); /* what is not recorded takes the running ones */
  run_norm(&n, false, 1, still, NULL);
  assert_true(test_relative_error(still, recorded, BATCH * CHANNELS) > 0.1);
  free_norm(&n);
}

/* Two halves of a micro-batch, each with half of the loss, then a step: running := 0.9 running +
 * 0.1 mean of the estimates, the variance's being unbiased. */
static void test_statistics(void **state) {
  (void)state;
  norm_test n;
  make_norm(&n, true);
  double *means = values_of(&n.mean.value), *variances = values_of(&n.variance.value);
  double dx[BATCH * CHANNELS], mean_sum[CHANNELS] = {0}, variance_sum[CHANNELS] = {0};
  for (int half = 0; half < 2; ++half) {
    test_fill_normal(n.x, BATCH * CHANNELS, 3, 2, 50 + (uint64_t)half);
    run_norm(&n, true, 0.5, NULL, dx);
    for (int c = 0; c < CHANNELS; ++c) {
      double mean, variance;
      measure(&n, c, &mean, &variance);
      mean_sum[c] += mean / 2;
      variance_sum[c] += variance / 2 * BATCH / (BATCH - 1);
    }
  }
  attn_parameter *all[] = {&n.mean, &n.weight, &n.variance, &n.bias};
  attn_adamw options = ATTN_ADAMW_INIT;
  attn_optimiser *optimiser;
  attn_step_info info;
  assert_ok(attn_optimiser_create(&options, all, 4, &optimiser));
  assert_int_equal(attn_optimiser_state_count(optimiser), 5); /* none of what is measured */
  double *dw = values_of(&n.weight.gradient), *db = values_of(&n.bias.gradient), squares = 0;
  for (int c = 0; c < CHANNELS; ++c) squares += dw[c] * dw[c] + db[c] * db[c];
  assert_ok(attn_optimiser_step(optimiser, 1e-3, 1, &info));
  assert_true(fabs(info.norm - sqrt(squares)) < 1e-9);
  double *new_means = values_of(&n.mean.value), *new_variances = values_of(&n.variance.value);
  for (int c = 0; c < CHANNELS; ++c) {
    assert_true(fabs(new_means[c] - (0.9 * means[c] + 0.1 * mean_sum[c])) < 1e-12);
    assert_true(fabs(new_variances[c] - (0.9 * variances[c] + 0.1 * variance_sum[c])) < 1e-12);
  }
  attn_optimiser_zero_gradients(optimiser);
  double *zeroed = values_of(&n.variance.gradient);
  for (int c = 0; c < CHANNELS; ++c) assert_true(zeroed[c] == 0);
  attn_optimiser_destroy(optimiser);
  attn_parameter *measured[] = {&n.mean, &n.variance};
  assert_int_equal(attn_optimiser_create(&options, measured, 2, &optimiser), ATTN_INVALID_ARGUMENT);
  free(means), free(variances), free(dw), free(db), free(new_means), free(new_variances);
  free(zeroed);
  free_norm(&n);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_neurons),  cmocka_unit_test(test_potentials),
      cmocka_unit_test(test_refusals), cmocka_unit_test(test_running),
      cmocka_unit_test(test_of_batch), cmocka_unit_test(test_statistics),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
