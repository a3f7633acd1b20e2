/* The memory that learns while it reads, by itself: Newton-Schulz, polynomial features, the closed
 * form of a chunk, and how much a matrix can hold. All in float64. */
#include "support/operations.h"
#include "support/test.h"

#include "graph/passes.h"
#include "layers/layers.h"

#include <math.h>
#include <string.h>

static double *normal(int64_t count, double deviation, uint64_t seed) {
  double *x = malloc((size_t)(count + 1) * sizeof *x);
  test_fill_normal(x, count, 0, deviation, seed);
  return x;
}

/* Newton-Schulz -----------------------------------------------------------------------------------
 */

/* Q x for the reflection Q = I - 2 u u^T / u.u, on every column of x [n, columns]. */
static void reflect(double *x, const double *u, int64_t n, int64_t columns) {
  double square = 0;
  for (int64_t i = 0; i < n; ++i) square += u[i] * u[i];
  for (int64_t c = 0; c < columns; ++c) {
    double along = 0;
    for (int64_t i = 0; i < n; ++i) along += u[i] * x[i * columns + c];
    for (int64_t i = 0; i < n; ++i) x[i * columns + c] -= 2 * along / square * u[i];
  }
}

static void reflect_right(double *x, const double *u, int64_t rows, int64_t n) {
  double square = 0;
  for (int64_t i = 0; i < n; ++i) square += u[i] * u[i];
  for (int64_t r = 0; r < rows; ++r) {
    double along = 0;
    for (int64_t i = 0; i < n; ++i) along += u[i] * x[r * n + i];
    for (int64_t i = 0; i < n; ++i) x[r * n + i] -= 2 * along / square * u[i];
  }
}

static void orthogonalise(double *y, const double *s, int64_t rows, int64_t columns) {
  double *work = malloc((size_t)attn_newton_schulz_work(rows, columns, 5, 0) * sizeof *work);
  attn_kernels_get()->newton_schulz_f64(y, s, rows, columns, 5, work);
  free(work);
}

/* A matrix with known singular values and vectors keeps its vectors; the values end near 1. */
static void check_singular_values(int64_t rows, int64_t columns) {
  int64_t least = rows < columns ? rows : columns, n = rows * columns;
  double *u = normal(rows, 1, 1), *v = normal(columns, 1, 2), *y = malloc((size_t)n * sizeof *y);
  double *s = calloc((size_t)n, sizeof *s), *scaled = malloc((size_t)n * sizeof *scaled);
  for (int64_t i = 0; i < least; ++i)
    s[i * columns + i] = pow(10, -1.5 * (double)i / (double)least); /* 1 to about 1/30 */
  reflect(s, u, rows, columns);
  reflect_right(s, v, rows, columns);
  orthogonalise(y, s, rows, columns);
  for (int64_t i = 0; i < n; ++i) scaled[i] = 1000 * s[i];
  orthogonalise(scaled, scaled, rows, columns);
  assert_true(test_relative_error(scaled, y, n) < 1e-6); /* but for the epsilon of 1e-7 */
  reflect(y, u, rows, columns);
  reflect_right(y, v, rows, columns);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      if (r == c)
        assert_true(y[r * columns + c] > 0.5 && y[r * columns + c] < 1.3);
      else
        assert_true(fabs(y[r * columns + c]) < 1e-10);
  free(u), free(v), free(s), free(y), free(scaled);
}

static void each_shape(void *context) {
  (void)context;
  check_singular_values(7, 7);
  check_singular_values(5, 20);
  check_singular_values(33, 8);
  check_singular_values(1, 9);
}

static void test_newton_schulz(void **state) {
  (void)state;
  test_on_every_path(each_shape, NULL);
}

/* Features ----------------------------------------------------------------------------------------
 */

enum { CHANNELS = 5 };

/* phi(x) . phi(y) of two rows. */
static double kernel(const double *rows, int degree, const double *scales) {
  attn_graph *g;
  attn_tensor x, s;
  assert_ok(attn_graph_create(ATTN_F64, &g));
  assert_ok(attn_tensor_wrap((void *)(uintptr_t)rows, ATTN_F64, 2, (int64_t[]){2, CHANNELS}, &x));
  attn_var *by = NULL;
  if (scales) {
    assert_ok(
        attn_tensor_wrap((void *)(uintptr_t)scales, ATTN_F64, 1, (int64_t[]){degree + 1}, &s));
    by = attn_graph_input(g, &s);
  }
  attn_var *y = attn_layer_polynomial(g, attn_graph_input(g, &x), degree, 1, by);
  assert_ok(attn_graph_status(g));
  int64_t n = attn_polynomial_features(CHANNELS, degree);
  assert_int_equal(y->value.shape[1], n);
  const double *phi = y->value.data;
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += phi[i] * phi[n + i];
  attn_graph_destroy(g);
  return sum;
}

static void test_polynomials(void **state) {
  (void)state;
  const double scales[] = {0.5, -2, 0.3, 1.5, 0.7};
  double *x = normal(2 * CHANNELS, 0.4, 4), product = 0, error = INFINITY;
  for (int i = 0; i < CHANNELS; ++i) product += x[i] * x[CHANNELS + i];
  for (int degree = 0; degree <= 4; ++degree) {
    double expected = 0;
    for (int j = 0; j <= degree; ++j) expected += scales[j] * scales[j] * pow(product, j);
    assert_true(fabs(kernel(x, degree, scales) - expected) < 1e-12);
  }
  for (int degree = 1; degree <= 6; ++degree) { /* towards exp */
    double now = fabs(kernel(x, degree, NULL) - exp(product));
    assert_true(now < error);
    error = now;
  }
  assert_true(error < 1e-4);
  assert_int_equal(attn_polynomial_features(64, 2), 2145);
  free(x);
}

/* The closed form ---------------------------------------------------------------------------------
 */

enum { TOKENS = 12, FEATURES = 6, VALUES = 4, WINDOW = 3 };

typedef struct memory_case {
  double *q, *k, *v, *alpha, *theta, *gamma, *w;
  int64_t tokens;
} memory_case;

static attn_var *input(attn_graph *g, const double *x, int rank, const int64_t *shape) {
  attn_tensor t;
  assert_ok(attn_tensor_wrap((void *)(uintptr_t)x, ATTN_F64, rank, shape, &t));
  return attn_graph_input(g, &t);
}

/* o [tokens, VALUES] of one head; the memory behind the last token in `w`. */
static double *run_memory(const memory_case *c, int64_t window, int64_t chunk, double *w) {
  attn_online_memory rule = {.kind = ATTN_MEMORY_MATRIX,
                             .features = FEATURES,
                             .value_dim = VALUES,
                             .window = window,
                             .chunk = chunk};
  attn_graph *g;
  assert_ok(attn_graph_create(ATTN_F64, &g));
  int64_t keys[3] = {c->tokens, 1, FEATURES}, values[3] = {c->tokens, 1, VALUES};
  int64_t gates[2] = {c->tokens, 1}, weights[2] = {VALUES, FEATURES};
  attn_online_memory_inputs in = {.q = input(g, c->q, 3, keys),
                                  .k = input(g, c->k, 3, keys),
                                  .v = input(g, c->v, 3, values),
                                  .alpha = input(g, c->alpha, 2, gates),
                                  .theta = input(g, c->theta, 2, gates),
                                  .gamma = input(g, c->gamma, 2, gates),
                                  .initial = {input(g, c->w, 2, weights)}};
  double *momentum = calloc(VALUES * FEATURES, sizeof *momentum);
  double *start = calloc(VALUES * FEATURES, sizeof *start);
  double *kept = calloc((size_t)(window * (FEATURES + VALUES + 1)), sizeof *kept);
  attn_online_memory_state past = {0};
  int64_t flat[2] = {1, VALUES * FEATURES}, rows[3] = {1, window - 1, FEATURES + VALUES + 1};
  assert_ok(attn_tensor_wrap(w, ATTN_F64, 2, flat, &past.memory));
  assert_ok(attn_tensor_wrap(momentum, ATTN_F64, 2, flat, &past.momentum));
  assert_ok(attn_tensor_wrap(start, ATTN_F64, 2, flat, &past.start));
  assert_ok(attn_tensor_wrap(kept, ATTN_F64, 3, rows, &past.window));
  attn_layout layout = attn_layout_equal(1, c->tokens);
  attn_var *o = attn_op_online_memory(g, &layout, &rule, &in, &past);
  assert_ok(attn_graph_status(g));
  double *y = malloc((size_t)(c->tokens * VALUES) * sizeof *y);
  memcpy(y, o->value.data, (size_t)(c->tokens * VALUES) * sizeof *y);
  attn_graph_destroy(g);
  free(momentum), free(start), free(kept);
  return y;
}

static memory_case make_case(int64_t tokens) {
  memory_case c = {.tokens = tokens,
                   .q = normal(tokens * FEATURES, 0.5, 11),
                   .k = normal(tokens * FEATURES, 0.5, 12),
                   .v = normal(tokens * VALUES, 1, 13),
                   .alpha = calloc((size_t)tokens, sizeof(double)),
                   .theta = calloc((size_t)tokens, sizeof(double)),
                   .gamma = calloc((size_t)tokens, sizeof(double)),
                   .w = normal(VALUES * FEATURES, 0.3, 14)};
  for (int64_t t = 0; t < tokens; ++t) {
    c.alpha[t] = 0.8 + 0.02 * (double)(t % 7);
    c.gamma[t] = 0.05 + 0.03 * (double)(t % 5);
  }
  return c;
}

static void free_case(memory_case *c) {
  free(c->q), free(c->k), free(c->v), free(c->alpha), free(c->theta), free(c->gamma), free(c->w);
}

/* Without momentum, in one chunk: with e_i = M' k_i - v_i, D[n][m] = alpha_n .. alpha_{m+1},
 * Band[m][i] = 1 for 0 <= m - i < c and Wt = D Band Diag(gamma),
 *
 *   y_n = (alpha_n .. alpha_0) M' q_n - 2 sum_i (q_n . k_i) Wt[n][i] e_i
 *   M_end = (alpha_last .. alpha_0) M' - 2 sum_i Wt[last][i] e_i k_i^T */
static void test_closed_form(void **state) {
  (void)state;
  memory_case c = make_case(TOKENS);
  double w[VALUES * FEATURES], end[VALUES * FEATURES], expected[TOKENS * VALUES];
  double *y = run_memory(&c, WINDOW, 64, w), e[TOKENS][VALUES], weight[TOKENS][TOKENS] = {{0}};
  for (int i = 0; i < TOKENS; ++i)
    for (int r = 0; r < VALUES; ++r) {
      e[i][r] = -c.v[i * VALUES + r];
      for (int f = 0; f < FEATURES; ++f) e[i][r] += c.w[r * FEATURES + f] * c.k[i * FEATURES + f];
    }
  for (int n = 0; n < TOKENS; ++n) {
    double kept = 1;
    for (int m = n; m >= 0; kept *= c.alpha[m--])
      for (int i = 0; i < TOKENS; ++i)
        if (m - i >= 0 && m - i < WINDOW) weight[n][i] += kept * c.gamma[i];
    for (int r = 0; r < VALUES; ++r) {
      double *to = &expected[n * VALUES + r];
      *to = 0;
      for (int f = 0; f < FEATURES; ++f)
        *to += kept * c.w[r * FEATURES + f] * c.q[n * FEATURES + f];
      for (int i = 0; i <= n; ++i) {
        double product = 0;
        for (int f = 0; f < FEATURES; ++f) product += c.q[n * FEATURES + f] * c.k[i * FEATURES + f];
        *to -= 2 * product * weight[n][i] * e[i][r];
      }
    }
    for (int j = 0; j < VALUES * FEATURES && n == TOKENS - 1; ++j) {
      end[j] = kept * c.w[j];
      for (int i = 0; i < TOKENS; ++i)
        end[j] -= 2 * weight[n][i] * e[i][j / FEATURES] * c.k[i * FEATURES + j % FEATURES];
    }
  }
  assert_true(test_relative_error(y, expected, TOKENS * VALUES) < 1e-13);
  assert_true(test_relative_error(w, end, VALUES * FEATURES) < 1e-13);
  free(y);
  free_case(&c);
}

/* Capacity ----------------------------------------------------------------------------------------
 */

/* The error that remains of `pairs` pairs after many passes over them, relative to their values. */
static double error_of(int64_t pairs) {
  const int64_t passes = 4000;
  memory_case c = make_case(pairs * passes);
  double w[VALUES * FEATURES], error = 0, all = 0;
  memset(c.w, 0, sizeof w);
  for (int64_t t = 0; t < c.tokens; ++t) {
    c.alpha[t] = 1;
    c.gamma[t] = 0.2;
    memcpy(c.k + t * FEATURES, c.k + t % pairs * FEATURES, FEATURES * sizeof *c.k);
    memcpy(c.v + t * VALUES, c.v + t % pairs * VALUES, VALUES * sizeof *c.v);
  }
  free(run_memory(&c, 1, 1, w));
  for (int64_t t = 0; t < pairs; ++t)
    for (int r = 0; r < VALUES; ++r) {
      double recalled = 0, value = c.v[t * VALUES + r];
      for (int f = 0; f < FEATURES; ++f) recalled += w[r * FEATURES + f] * c.k[t * FEATURES + f];
      error += (recalled - value) * (recalled - value);
      all += value * value;
    }
  free_case(&c);
  return error / all;
}

/* As many independent keys as there are features are recalled exactly, more are not. */
static void test_capacity(void **state) {
  (void)state;
  assert_true(error_of(FEATURES / 2) < 1e-12);
  assert_true(error_of(FEATURES) < 1e-3);
  assert_true(error_of(FEATURES + 3) > 0.02);
}

/* Refusals ----------------------------------------------------------------------------------------
 */

static void test_refusals(void **state) {
  (void)state;
  memory_case c = make_case(TOKENS);
  attn_graph *g;
  assert_ok(attn_graph_create(ATTN_F64, &g));
  int64_t keys[3] = {TOKENS, 1, FEATURES}, values[3] = {TOKENS, 1, VALUES};
  int64_t gates[2] = {TOKENS, 1}, weights[2] = {VALUES, FEATURES};
  const attn_online_memory good = {.kind = ATTN_MEMORY_MATRIX,
                                   .features = FEATURES,
                                   .value_dim = VALUES,
                                   .window = 1,
                                   .chunk = 1};
  attn_layout layout = attn_layout_equal(1, TOKENS);
  for (int bad = 0; bad < 6; ++bad) {
    attn_online_memory rule = good;
    if (bad == 1) rule.window = 0;
    if (bad == 2) rule.chunk = 0;
    if (bad == 3) rule.steps = -1;
    if (bad == 4) rule.features = FEATURES + 1;
    if (bad == 5) rule.kind = ATTN_MEMORY_MLP; /* without a width */
    attn_graph_reset(g, false);
    attn_var *w = input(g, c.w, 2, weights);
    attn_online_memory_inputs in = {.q = input(g, c.q, 3, keys),
                                    .k = input(g, c.k, 3, keys),
                                    .v = input(g, c.v, 3, values),
                                    .alpha = input(g, c.alpha, 2, gates),
                                    .theta = input(g, c.theta, 2, gates),
                                    .gamma = input(g, c.gamma, 2, gates),
                                    .initial = {w, w, w}};
    attn_var *o = attn_op_online_memory(g, &layout, &rule, &in, NULL);
    assert_true((o != NULL) == (bad == 0));
    assert_true((attn_graph_status(g) == ATTN_OK) == (bad == 0));
    if (bad) assert_non_null(strstr(attn_error_message(), "online_memory"));
  }
  attn_graph_destroy(g);
  free_case(&c);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_newton_schulz), cmocka_unit_test(test_polynomials),
      cmocka_unit_test(test_closed_form),   cmocka_unit_test(test_capacity),
      cmocka_unit_test(test_refusals),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
