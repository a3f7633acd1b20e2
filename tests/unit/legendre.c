/* The Legendre memory: its matrices by another formula, its four forms (recurrent, chunked, direct
 * convolution, FFT) and their gradient, and what it is for: reading the past back. */
#include "support/test.h"

#include "engines/legendre/legendre.h"
#include "graph/operations.h"
#include "oracles/legendre.h"

#include <complex.h>
#include <math.h>
#include <string.h>

static const double pi = 3.14159265358979323846;

/* The series and the elimination of the oracle lose some digits where A is large (theta 12). */
static const double matrix_error = 1e-11, sum_error = 1e-11;

static const struct {
  int64_t size;
  double theta;
} systems[] = {{1, 1}, {2, 7.5}, {6, 20}, {8, 32}, {40, 128}, {64, 12}, {128, 128}};
enum { SYSTEMS = sizeof systems / sizeof *systems };

static double *numbers(int64_t count) {
  return calloc((size_t)count + 1, sizeof(double));
}

static void test_matrices(void **state) {
  (void)state;
  for (int s = 0; s < SYSTEMS; ++s) {
    int64_t n = systems[s].size;
    double *abar = numbers(n * n), *bbar = numbers(n);
    const double *a, *b;
    assert_ok(attn_legendre_matrices(n, systems[s].theta, abar, bbar));
    oracle_legendre(n, systems[s].theta, &a, &b);
    double error_a = test_relative_error(abar, a, n * n), error_b = test_relative_error(bbar, b, n);
    if (!(error_a < matrix_error && error_b < matrix_error))
      fail_msg("%d coefficients of theta %g: Abar is off by %g, Bbar by %g", (int)n,
               systems[s].theta, error_a, error_b);
    free(abar), free(bbar);
  }
}

/* ||Abar^(2^k)||^(1 / 2^k) falls to the spectral radius. */
static void test_spectral_radius(void **state) {
  (void)state;
  for (int s = 0; s < SYSTEMS; ++s) {
    int64_t n = systems[s].size;
    double *power = numbers(n * n), *next = numbers(n * n), *bbar = numbers(n), norm = 0;
    assert_ok(attn_legendre_matrices(n, systems[s].theta, power, bbar));
    int squarings = 12; /* 4096 tokens */
    for (int k = 0; k < squarings; ++k) {
      for (int64_t i = 0; i < n * n; ++i) next[i] = 0;
      for (int64_t i = 0; i < n; ++i)
        for (int64_t l = 0; l < n; ++l)
          for (int64_t j = 0; j < n; ++j) next[i * n + j] += power[i * n + l] * power[l * n + j];
      memcpy(power, next, (size_t)(n * n) * sizeof *next);
    }
    for (int64_t i = 0; i < n * n; ++i) norm += power[i] * power[i];
    double radius = pow(norm, 0.5 / ldexp(1, squarings));
    assert_true(radius < 1);
    free(power), free(next), free(bbar);
  }
}

static void test_refusals(void **state) {
  (void)state;
  double number;
  assert_int_equal(attn_legendre_matrices(0, 1, &number, &number), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_legendre_matrices(1, 0, &number, &number), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_legendre_matrices(1, NAN, &number, &number), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_legendre_matrices(1 << 20, 1, &number, &number), ATTN_INVALID_ARGUMENT);
}

/* The operation ---------------------------------------------------------------------------------
 */

static attn_tensor on_graph(attn_graph *g, attn_dtype dtype, int rank, const int64_t *shape,
                            const double *x) {
  attn_tensor tensor = attn_graph_tensor(g, dtype, rank, shape), source;
  assert_ok(attn_tensor_wrap((void *)(uintptr_t)x, ATTN_F64, rank, shape, &source));
  assert_ok(attn_tensor_copy(&source, &tensor));
  return tensor;
}

/* m [rows, heads, n] of u [rows, heads]; du, if wanted, is the gradient of sum m^2 / 2. */
static void run(const attn_layout *layout, int64_t heads, int64_t n, double theta, const double *u,
                double *m, double *du) {
  attn_graph *g;
  assert_ok(attn_graph_create_on(test_device(), ATTN_F64, &g));
  attn_graph_reset(g, du != NULL);
  attn_tensor in = on_graph(g, ATTN_F64, 2, (int64_t[]){layout->rows, heads}, u);
  attn_var *leaf = attn_graph_leaf(g, &in);
  attn_var *out = attn_op_legendre_memory(g, layout, leaf, n, theta, NULL);
  assert_ok(attn_graph_status(g));
  double *values = test_to_doubles(&out->value);
  memcpy(m, values, (size_t)(layout->rows * heads * n) * sizeof *m);
  free(values);
  if (du) {
    double *none = numbers(layout->rows * heads * n);
    attn_tensor zero = on_graph(g, ATTN_F64, 3, out->value.shape, none);
    attn_var *loss = attn_op_squared_error(g, out, &zero, 0.5);
    assert_ok(attn_graph_backward(g, loss, 1));
    values = test_to_doubles(&leaf->gradient);
    memcpy(du, values, (size_t)(layout->rows * heads) * sizeof *du);
    free(values), free(none);
  }
  attn_graph_destroy(g);
}

/* H[r] = Abar^r Bbar, [rows, n] */
static double *impulse_response(int64_t n, double theta, int64_t rows) {
  const double *a, *b;
  double *h = numbers(rows * n);
  oracle_legendre(n, theta, &a, &b);
  memcpy(h, b, (size_t)n * sizeof *h);
  for (int64_t r = 1; r < rows; ++r)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) h[r * n + i] += a[i * n + j] * h[(r - 1) * n + j];
  return h;
}

static void transform(double complex *x, int64_t count, int sign) {
  if (count == 1) return;
  double complex *half = malloc((size_t)count * sizeof *half);
  for (int64_t i = 0; i < count; ++i) half[i / 2 + (i % 2) * (count / 2)] = x[i];
  transform(half, count / 2, sign);
  transform(half + count / 2, count / 2, sign);
  for (int64_t i = 0; i < count / 2; ++i) {
    double complex turned =
        cexp(sign * 2 * pi * I * (double)i / (double)count) * half[count / 2 + i];
    x[i] = half[i] + turned;
    x[i + count / 2] = half[i] - turned;
  }
  free(half);
}

/* Recurrent (the oracle), chunked (the operation), direct convolution and FFT; and the gradient by
 * correlation with H, for lengths around those of chunks. */
static void test_forms(void **state) {
  (void)state;
  enum { N = 10 };
  const double theta = 50;
  const int64_t lengths[] = {1, 31, 32, 33, 64, 200};
  for (size_t k = 0; k < sizeof lengths / sizeof *lengths; ++k) {
    int64_t rows = lengths[k], padded = 512;
    double *u = numbers(rows), *m = numbers(rows * N), *du = numbers(rows);
    double *recurrent = numbers(rows * N), *direct = numbers(rows * N), *fast = numbers(rows * N);
    double *expected = numbers(rows), *h = impulse_response(N, theta, rows);
    test_fill_normal(u, rows, 0, 1, 3 + k);
    attn_layout layout = attn_layout_equal(1, rows);
    run(&layout, 1, N, theta, u, m, du);
    oracle_legendre_memory(N, theta, rows, u, 1, recurrent, N);
    for (int64_t t = 0; t < rows; ++t)
      for (int64_t r = 0; r <= t; ++r)
        for (int i = 0; i < N; ++i) {
          direct[t * N + i] += h[r * N + i] * u[t - r];
          expected[t - r] += h[r * N + i] * m[t * N + i];
        }
    double complex *x = malloc((size_t)padded * sizeof *x), *y = malloc((size_t)padded * sizeof *y);
    for (int i = 0; i < N; ++i) {
      for (int64_t t = 0; t < padded; ++t) {
        x[t] = t < rows ? u[t] : 0;
        y[t] = t < rows ? h[t * N + i] : 0;
      }
      transform(x, padded, -1);
      transform(y, padded, -1);
      for (int64_t t = 0; t < padded; ++t) x[t] *= y[t] / (double)padded;
      transform(x, padded, 1);
      for (int64_t t = 0; t < rows; ++t) fast[t * N + i] = creal(x[t]);
    }
    assert_true(test_relative_error(m, recurrent, rows * N) < sum_error);
    assert_true(test_relative_error(m, direct, rows * N) < sum_error);
    assert_true(test_relative_error(m, fast, rows * N) < sum_error);
    assert_true(test_relative_error(du, expected, rows) < sum_error);
    free(u), free(m), free(du), free(recurrent), free(direct), free(fast), free(expected);
    free(h), free(x), free(y);
  }
}

/* Packed sequences of very different lengths, two heads: each like the sequence alone. */
static void test_packed(void **state) {
  (void)state;
  enum { N = 7, HEADS = 2 };
  static const int32_t offsets[] = {0, 33, 33, 40, 200, 201, 265};
  attn_layout layout = attn_layout_packed(6, offsets);
  int64_t rows = layout.rows, all = rows * HEADS;
  double *u = numbers(all), *m = numbers(all * N), *du = numbers(all);
  double *alone = numbers(all * N), *du_alone = numbers(all);
  test_fill_normal(u, all, 0, 1, 5);
  run(&layout, HEADS, N, 30, u, m, du);
  for (int b = 0; b < 6; ++b) {
    int64_t first = offsets[b] * HEADS;
    attn_layout one = attn_layout_equal(1, offsets[b + 1] - offsets[b]);
    if (one.rows) run(&one, HEADS, N, 30, u + first, alone + first * N, du_alone + first);
  }
  assert_true(test_relative_error(m, alone, all * N) < sum_error);
  assert_true(test_relative_error(du, du_alone, all) < sum_error);
  free(u), free(m), free(du), free(alone), free(du_alone);
}

static void test_linearity(void **state) {
  (void)state;
  enum { N = 9, ROWS = 90 };
  attn_layout layout = attn_layout_equal(1, ROWS);
  double u[3][ROWS], m[3][ROWS * N];
  test_fill_normal(u[0], ROWS, 0, 1, 1);
  test_fill_normal(u[1], ROWS, 0, 1, 2);
  for (int t = 0; t < ROWS; ++t) u[2][t] = 2 * u[0][t] - 3 * u[1][t];
  for (int i = 0; i < 3; ++i) run(&layout, 1, N, 25, u[i], m[i], NULL);
  for (int i = 0; i < ROWS * N; ++i) m[0][i] = 2 * m[0][i] - 3 * m[1][i];
  assert_true(test_relative_error(m[2], m[0], ROWS * N) < sum_error);
}

/* u = 1 is the polynomial of degree 0. */
static void test_constant(void **state) {
  (void)state;
  enum { N = 8, ROWS = 1000 };
  attn_layout layout = attn_layout_equal(1, ROWS);
  double u[ROWS], *m = numbers(ROWS * N), expected[N] = {1};
  for (int t = 0; t < ROWS; ++t) u[t] = 1;
  run(&layout, 1, N, 32, u, m, NULL);
  assert_true(test_relative_error(m + (ROWS - 1) * N, expected, N) < 1e-9);
  free(m);
}

/* P_i(r) = (-1)^i sum over j of C(i, j) C(i + j, j) (-r)^j */
static double shifted_legendre(int i, double r) {
  double sum = 0, term = 1;
  for (int j = 0; j <= i; ++j) {
    sum += term;
    term *= -r * (double)(i - j) * (double)(i + j + 1) / (double)((j + 1) * (j + 1));
  }
  return i % 2 ? -sum : sum;
}

/* A sine of period 64 is read back: 8 coefficients of 32 tokens. A held input stands for the time
 * in the middle of its token. */
static void test_decoding(void **state) {
  (void)state;
  enum { N = 8, ROWS = 400, THETA = 32 };
  attn_layout layout = attn_layout_equal(1, ROWS);
  double u[ROWS], *m = numbers(ROWS * N), edge = 0, inside = 0;
  for (int t = 0; t < ROWS; ++t) u[t] = sin(2 * pi * t / 64);
  run(&layout, 1, N, THETA, u, m, NULL);
  for (int t = 200; t < ROWS; ++t)
    for (int tau = 0; tau <= THETA; ++tau) {
      double read = 0, was = sin(2 * pi * (t + 0.5 - tau) / 64);
      for (int i = 0; i < N; ++i) read += m[t * N + i] * shifted_legendre(i, (double)tau / THETA);
      double error = fabs(read - was);
      if (tau == 0 && error > edge) edge = error;
      if (tau >= THETA / 4 && tau <= THETA - THETA / 4 && error > inside) inside = error;
    }
  if (!(edge <= 2e-2 && inside <= 2e-3)) fail_msg("off by %g now, by %g inside", edge, inside);
  free(m);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_matrices), cmocka_unit_test(test_spectral_radius),
      cmocka_unit_test(test_refusals), cmocka_unit_test(test_forms),
      cmocka_unit_test(test_packed),   cmocka_unit_test(test_linearity),
      cmocka_unit_test(test_constant), cmocka_unit_test(test_decoding),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
