/* The row kernels on rows of bfloat16 and float32, on every path, against the portable ones in
 * float64: every length around a register, and nothing behind the end of a row touched. */
#include "support/test.h"

#include "base/random.h"
#include "kernels/kernels.h"

#include <math.h>
#include <string.h>

enum { LONGEST = 600, GUARD = 40 };
static const int64_t lengths[] = {1, 15, 16, 17, 31, 32, 33, 100, 256, 384, 513, LONGEST};
enum { LENGTHS = sizeof lengths / sizeof *lengths };

/* One rounding to bfloat16 of the result, and one of what it is added to; float32 arithmetic before
 * that errs by a few 1e-6 of the largest term. */
static const double narrow_rounding = 0x1p-8, wide_rounding = 1e-5;

/* A row in the dtype under test, and the same numbers in float64. */
typedef struct row {
  attn_dtype dtype;
  double wide[LONGEST + GUARD];
  uint16_t narrow[LONGEST + GUARD];
  float single[LONGEST + GUARD];
} row;

static row make(attn_dtype dtype, uint64_t seed) {
  row r = {.dtype = dtype};
  attn_random random = {.seed = seed};
  for (int i = 0; i < LONGEST + GUARD; ++i) {
    float x = (float)(3 * attn_random_normal(&random));
    if (i == 3) x = 100;
    if (i == 4) x = -100;
    if (i == 5) x = 0;
    if (dtype == ATTN_BF16) x = attn_bf16_to_f32(attn_f32_to_bf16(x));
    r.narrow[i] = attn_f32_to_bf16(x);
    r.single[i] = x;
    r.wide[i] = (double)x;
  }
  return r;
}

static attn_span under_test(row *r) {
  return r->dtype == ATTN_BF16 ? (attn_span){r->narrow, ATTN_BF16}
                               : (attn_span){r->single, ATTN_F32};
}

static attn_span exact(row *r) {
  return (attn_span){r->wide, ATTN_F64};
}

static double value(const row *r, int64_t i) {
  return r->dtype == ATTN_BF16 ? (double)attn_bf16_to_f32(r->narrow[i]) : (double)r->single[i];
}

static void check(const char *what, const row *result, const row *before, int64_t n) {
  double rounding = result->dtype == ATTN_BF16 ? narrow_rounding : wide_rounding;
  for (int64_t i = 0; i < n; ++i) {
    double allowed = rounding * (fabs(result->wide[i]) + fabs(before->wide[i])) + 2e-5;
    if (!(fabs(value(result, i) - result->wide[i]) <= allowed))
      fail_msg("%s, %s, row of %lld: element %lld is %g, expected %g", what,
               attn_dtype_name(result->dtype), (long long)n, (long long)i, value(result, i),
               result->wide[i]);
  }
  for (int64_t i = n; i < LONGEST + GUARD; ++i)
    if (value(result, i) != value(before, i)) fail_msg("%s writes behind its row", what);
}

typedef struct trial {
  const attn_kernels *kernels, *reference;
  attn_dtype x, y; /* of operands and of results */
  bool accumulate;
  int64_t n;
} trial;

static void check_gates(const trial *t, attn_activation f) {
  row a = make(t->x, 1), b = make(t->x, 2), dy = make(t->x, 3), old = make(t->y, 4), out = old;
  row da = old, db = old;
  t->kernels->row_activate(f, under_test(&out), under_test(&a), t->n);
  t->reference->row_activate(f, exact(&out), exact(&a), t->n);
  check("activate", &out, &old, t->n);
  out = old;
  t->kernels->row_activate_backward(f, under_test(&out), t->accumulate, under_test(&a),
                                    under_test(&dy), t->n);
  t->reference->row_activate_backward(f, exact(&out), t->accumulate, exact(&a), exact(&dy), t->n);
  check("activate backward", &out, &old, t->n);
  t->kernels->row_gate(f, under_test(&out), under_test(&a), under_test(&b), t->n);
  t->reference->row_gate(f, exact(&out), exact(&a), exact(&b), t->n);
  check("gate", &out, &old, t->n);
  t->kernels->row_gate_backward(f, under_test(&da), t->accumulate, under_test(&db), t->accumulate,
                                under_test(&a), under_test(&b), under_test(&dy), t->n);
  t->reference->row_gate_backward(f, exact(&da), t->accumulate, exact(&db), t->accumulate,
                                  exact(&a), exact(&b), exact(&dy), t->n);
  check("gate backward, a", &da, &old, t->n);
  check("gate backward, b", &db, &old, t->n);
  row only = old;
  attn_span absent = {0};
  t->kernels->row_gate_backward(f, absent, false, under_test(&only), t->accumulate, under_test(&a),
                                under_test(&b), under_test(&dy), t->n);
  memcpy(only.wide, db.wide, sizeof only.wide);
  check("gate backward, b alone", &only, &old, t->n);
}

static void check_norms(const trial *t, bool weighted) {
  row x = make(t->x, 5), w = make(ATTN_F32, 6), dy = make(ATTN_BF16, 7), old = make(t->y, 8);
  row y = old, dx = make(t->x, 9), dx_old = dx, dw = make(ATTN_F32, 10), dw_old = dw;
  attn_span none = {0}, weight = weighted ? under_test(&w) : none;
  attn_span weight_exact = weighted ? exact(&w) : none;
  double r =
      t->kernels->row_rms_norm(under_test(&y), under_test(&x), weight, t->n, (double)t->n, 1e-6);
  double expected =
      t->reference->row_rms_norm(exact(&y), exact(&x), weight_exact, t->n, (double)t->n, 1e-6);
  assert_true(fabs(r - expected) <= 1e-6 * expected);
  check("rms_norm", &y, &old, t->n);
  t->kernels->row_rms_norm_backward(under_test(&dx), t->accumulate,
                                    weighted ? under_test(&dw) : none, under_test(&x), weight,
                                    under_test(&dy), t->n, (double)t->n, expected);
  t->reference->row_rms_norm_backward(exact(&dx), t->accumulate, weighted ? exact(&dw) : none,
                                      exact(&x), weight_exact, exact(&dy), t->n, (double)t->n,
                                      expected);
  check("rms_norm backward", &dx, &dx_old, t->n);
  check("rms_norm backward, weight", &dw, &dw_old, t->n);
}

static void check_sums(const trial *t) {
  row a = make(t->x, 11), b = make(t->y, 12), old = make(t->y, 13), out = old;
  t->kernels->row_add(under_test(&out), 1.5, under_test(&a), -0.25, under_test(&b), t->n);
  t->reference->row_add(exact(&out), 1.5, exact(&a), -0.25, exact(&b), t->n);
  check("add", &out, &old, t->n);
  out = old;
  t->kernels->row_add(under_test(&out), 1, under_test(&out), 1, under_test(&a), t->n);
  t->reference->row_add(exact(&out), 1, exact(&out), 1, exact(&a), t->n);
  check("add in place", &out, &old, t->n);
  t->kernels->row_add(under_test(&out), 2, under_test(&a), 0, (attn_span){0}, t->n);
  t->reference->row_add(exact(&out), 2, exact(&a), 0, (attn_span){0}, t->n);
  check("scale", &out, &old, t->n);
}

/* Channels that turn, and those behind them, from the equation. */
static void check_rotation(const trial *t) {
  row x = make(t->x, 21), c = make(ATTN_F32, 22), s = make(ATTN_F32, 23), old = make(t->y, 24);
  row out = old;
  int64_t h = (t->n + 2) / 3 < t->n / 2 ? (t->n + 2) / 3 : t->n / 2;
  if (h == 0) return;
  t->kernels->row_rotate(under_test(&out), t->accumulate, under_test(&x), under_test(&c),
                         under_test(&s), -1, h, t->n);
  for (int64_t j = 0; j < t->n; ++j) {
    int64_t i = j % h, other = j < h ? j + h : j - h;
    double own = x.wide[j], from_other = 0;
    if (j < 2 * h) own *= c.wide[i], from_other = (j < h ? 1 : -1) * x.wide[other] * s.wide[i];
    out.wide[j] = own + from_other + (t->accumulate ? old.wide[j] : 0);
    old.wide[j] = fabs(old.wide[j]) + fabs(own) + fabs(from_other); /* the terms may cancel */
  }
  check("rotate", &out, &old, t->n);
}

static void rows_on_a_path(void *context) {
  (void)context;
  static const attn_activation functions[] = {ATTN_SILU, ATTN_IDENTITY, ATTN_SIGMOID};
  static const attn_dtype dtypes[2] = {ATTN_BF16, ATTN_F32};
  for (int k = 0; k < LENGTHS; ++k)
    for (int variant = 0; variant < 8; ++variant) {
      trial t = {.kernels = attn_kernels_get(),
                 .reference = attn_kernels_of(ATTN_PATH_GENERIC),
                 .x = dtypes[variant & 1],
                 .y = dtypes[variant >> 1 & 1],
                 .accumulate = variant >> 2,
                 .n = lengths[k]};
      for (size_t f = 0; f < sizeof functions / sizeof *functions; ++f)
        check_gates(&t, functions[f]);
      check_norms(&t, false);
      check_norms(&t, true);
      check_sums(&t);
      check_rotation(&t);
    }
}

static void rows_equal_float64(void **state) {
  (void)state;
  test_on_every_path(rows_on_a_path, NULL);
}

/* Casting and copying keep every bit pattern that bfloat16 has, the smallest numbers included. */
static void copies_on_a_path(void *context) {
  (void)context;
  const attn_kernels *kernels = attn_kernels_get();
  static uint16_t all[1 << 16], copy[1 << 16];
  static float wide[1 << 16];
  for (int i = 0; i < 1 << 16; ++i) all[i] = (uint16_t)i;
  attn_span none = {0};
  kernels->row_add((attn_span){wide, ATTN_F32}, 1, (attn_span){all, ATTN_BF16}, 0, none, 1 << 16);
  kernels->row_add((attn_span){copy, ATTN_BF16}, 1, (attn_span){wide, ATTN_F32}, 0, none, 1 << 16);
  for (int i = 0; i < 1 << 16; ++i)
    if (copy[i] != all[i] && !isnan(attn_bf16_to_f32(all[i])))
      fail_msg("%04x became %04x", all[i], copy[i]);
    else if (isnan(attn_bf16_to_f32(all[i])) != isnan(attn_bf16_to_f32(copy[i])))
      fail_msg("%04x is not a number, %04x is", all[i], copy[i]);
}

static void copies_are_exact(void **state) {
  (void)state;
  test_on_every_path(copies_on_a_path, NULL);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(rows_equal_float64),
                                     cmocka_unit_test(copies_are_exact)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
