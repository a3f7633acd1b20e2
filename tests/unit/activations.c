/* The activation kernels and their derivatives on every path, against float64. */
#include "support/test.h"

#include "kernels/kernels.h"
#include "oracles/layers.h"

#include <float.h>
#include <math.h>
#include <string.h>

enum { POINTS = 60001, TAIL = 16 };

/* Relative error of a value: exp and log1p err by about 2e-7 each, with a few roundings around
 * them. exp(-x^2 / 2) loses the rounding of x^2, x^2 / 2 times 2^-24 relative: GELU's tail. */
static const double float32_value = 5e-7, float64_value = 1e-14;
/* Slopes are of order 1 and are sums of terms up to |x| s (1 - s): absolute error. */
static const double float32_slope = 6e-7, float64_slope = 1e-14;

static const struct {
  attn_activation f;
  const char *name;
  double tail; /* growth of the relative error with x^2 / 2 */
} functions[] = {
    {ATTN_IDENTITY, "identity", 0},
    {ATTN_SILU, "silu", 0},
    {ATTN_SIGMOID, "sigmoid", 0},
    {ATTN_GELU, "gelu", 0.25},
    {ATTN_RELU, "relu", 0},
    {ATTN_SOFTPLUS, "softplus", 0},
    {ATTN_LOG_SIGMOID, "log_sigmoid", 0},
    {ATTN_EXP, "exp", 0},
    /* Its exponent, 1.6 x + 0.071 x^3, is rounded some three times: 68 x 3 x 2^-24 at x = -9, below
     * which nothing is left. */
    {ATTN_GELU_TANH, "gelu_tanh", 1},
    {ATTN_ELU, "elu", 0},
    {ATTN_ELU_PLUS_ONE, "elu_plus_one", 0},
};
enum { FUNCTIONS = sizeof functions / sizeof *functions };

static void check_point(int k, double x, double y, double slope, bool wide) {
  double value = oracle_activation(functions[k].name)(x);
  double derivative = oracle_activation_slope(functions[k].name)(x);
  double relative = wide ? float64_value : float32_value;
  relative *= 1 + functions[k].tail * x * x / 2;
  /* sigmoid may be flushed to zero below the least normal number; silu multiplies it by x */
  double allowed = relative * fabs(value) + (wide ? DBL_MIN : FLT_MIN) * fmax(1, fabs(x));
  if (!(fabs(y - value) <= allowed))
    fail_msg("%s(%.9g) = %.9g, expected %.9g", functions[k].name, x, y, value);
  allowed = (wide ? float64_slope : float32_slope) * fmax(1, fabs(derivative)) * fmax(1, fabs(x));
  if (!(fabs(slope - derivative) <= allowed))
    fail_msg("%s'(%.9g) = %.9g, expected %.9g", functions[k].name, x, slope, derivative);
}

/* One point every 0.001 over [-30, 30]. */
static void close_to_float64(void *context) {
  (void)context;
  const attn_kernels *kernels = attn_kernels_get();
  static float x[POINTS], y[POINTS], slope[POINTS], one[POINTS];
  static double wide_x[POINTS], wide_y[POINTS], wide_slope[POINTS];
  for (int i = 0; i < POINTS; ++i) {
    wide_x[i] = 1e-3 * (i - POINTS / 2);
    x[i] = (float)wide_x[i];
    one[i] = 1;
  }
  attn_span in = {x, ATTN_F32}, upstream = {one, ATTN_F32}, wide_in = {wide_x, ATTN_F64};
  for (int k = 0; k < FUNCTIONS; ++k) {
    attn_activation f = functions[k].f;
    kernels->row_activate(f, (attn_span){y, ATTN_F32}, in, POINTS);
    kernels->row_activate_backward(f, (attn_span){slope, ATTN_F32}, false, in, upstream, POINTS);
    for (int i = 0; i < POINTS; ++i)
      check_point(k, (double)x[i], (double)y[i], (double)slope[i], false);
    kernels->row_activate(f, (attn_span){wide_y, ATTN_F64}, wide_in, POINTS);
    kernels->row_activate_backward(f, (attn_span){wide_slope, ATTN_F64}, false, wide_in, upstream,
                                   POINTS);
    for (int i = 0; i < POINTS; i += 10) check_point(k, wide_x[i], wide_y[i], wide_slope[i], true);
  }
}

/* Far out: the limits, never a NaN. Padded to a multiple of a vector and repeated without, so that
 * vector body and scalar rest are both seen. */
static void extreme_values(void *context) {
  (void)context;
  static const float points[] = {0,     -0.0f, 1e-45f, 1e-38f, 1e-30f, 30,    87.5f,
                                 88.8f, 89,    90,     104,    1e4f,   1e30f, FLT_MAX};
  enum { COUNT = 2 * sizeof points / sizeof *points };
  const attn_kernels *kernels = attn_kernels_get();
  float x[COUNT + TAIL] = {0}, y[COUNT + TAIL], slope[COUNT + TAIL], one[COUNT + TAIL];
  for (int i = 0; i < COUNT; ++i) x[i] = i % 2 ? -points[i / 2] : points[i / 2];
  for (int i = 0; i < COUNT + TAIL; ++i) one[i] = 1;
  for (int n = COUNT; n <= COUNT + TAIL; ++n)
    for (int k = 0; k < FUNCTIONS; ++k) {
      attn_span in = {x, ATTN_F32};
      kernels->row_activate(functions[k].f, (attn_span){y, ATTN_F32}, in, n);
      kernels->row_activate_backward(functions[k].f, (attn_span){slope, ATTN_F32}, false, in,
                                     (attn_span){one, ATTN_F32}, n);
      for (int i = 0; i < n; ++i) {
        if (functions[k].f == ATTN_EXP && x[i] > 88.7f) {
          assert_true(isinf(y[i]) && y[i] > 0 && isinf(slope[i]));
          continue;
        }
        check_point(k, (double)x[i], (double)y[i], (double)slope[i], false);
      }
    }
}

/* Both gradients of a gate at once, one at a time, and added to what is there. */
static void gate_gradients(void *context) {
  (void)context;
  enum { N = 1000 }; /* more than a chunk, and no multiple of a vector */
  const attn_kernels *kernels = attn_kernels_get();
  double a[N], b[N], dy[N], da[N], db[N], alone[N];
  test_fill_normal(a, N, 0, 3, 1);
  test_fill_normal(b, N, 0, 1, 2);
  test_fill_normal(dy, N, 0, 1, 3);
  attn_span sa = {a, ATTN_F64}, sb = {b, ATTN_F64}, sy = {dy, ATTN_F64}, none = {0};
  for (int k = 0; k < FUNCTIONS; ++k) {
    attn_span to_a = {da, ATTN_F64}, to_b = {db, ATTN_F64}, to = {alone, ATTN_F64};
    for (int i = 0; i < N; ++i) db[i] = 2;
    kernels->row_gate_backward(functions[k].f, to_a, false, to_b, true, sa, sb, sy, N);
    for (int i = 0; i < N; ++i) {
      double expected_a = oracle_activation_slope(functions[k].name)(a[i]) * b[i] * dy[i];
      double expected_b = 2 + oracle_activation(functions[k].name)(a[i]) * dy[i];
      assert_true(fabs(da[i] - expected_a) <=
                  1e-13 * fmax(1, fabs(expected_a)) * fmax(1, fabs(a[i])));
      assert_true(fabs(db[i] - expected_b) <= 1e-13 * fmax(1, fabs(expected_b)));
    }
    kernels->row_gate_backward(functions[k].f, to, false, none, false, sa, sb, sy, N);
    assert_true(test_relative_error(alone, da, N) < float64_value);
    for (int i = 0; i < N; ++i) alone[i] = 2;
    kernels->row_gate_backward(functions[k].f, none, false, to, true, sa, sb, sy, N);
    assert_true(test_relative_error(alone, db, N) < float64_value);
  }
}

static void values_and_slopes(void **state) {
  (void)state;
  test_on_every_path(close_to_float64, NULL);
}
static void limits(void **state) {
  (void)state;
  test_on_every_path(extreme_values, NULL);
}
static void gates(void **state) {
  (void)state;
  test_on_every_path(gate_gradients, NULL);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(values_and_slopes), cmocka_unit_test(limits),
                                     cmocka_unit_test(gates)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
