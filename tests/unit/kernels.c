/* The conversion, matrix-vector and exponential kernels of every path against float64. */
#include "support/test.h"

#include "base/random.h"
#include "kernels/kernels.h"

#include <math.h>
#include <string.h>

/* --- Conversions: exact, so equal to the last bit --------------------------------------------- */

typedef struct format {
  const char *name;
  int fraction_bits, least_exponent, greatest_exponent;
  void (*widen)(float *, const uint16_t *, int64_t);
  void (*narrow)(uint16_t *, const float *, int64_t);
} format;

static void get_formats(format formats[2]) {
  const attn_kernels *kernels = attn_kernels_get();
  formats[0] = (format){"bfloat16", 7, -126, 127, kernels->bf16_to_f32, kernels->f32_to_bf16};
  formats[1] = (format){"float16", 10, -14, 15, kernels->f16_to_f32, kernels->f32_to_f16};
}

/* The value of a pattern, from the definition of the format. */
static double decode(const format *f, uint16_t pattern) {
  int bits = 15 - f->fraction_bits; /* of the exponent */
  int exponent = pattern >> f->fraction_bits & ((1 << bits) - 1);
  int fraction = pattern & ((1 << f->fraction_bits) - 1);
  double sign = pattern & 0x8000 ? -1 : 1;
  if (exponent == (1 << bits) - 1) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * ldexp(fraction, f->least_exponent - f->fraction_bits);
  return sign * ldexp((1 << f->fraction_bits) + fraction,
                      exponent - 1 + f->least_exponent - f->fraction_bits);
}

/* The nearest number of the format, ties to even: a rounding to a multiple of its last place. */
static double nearest(const format *f, double value) {
  if (value == 0 || !isfinite(value)) return value;
  int exponent;
  frexp(value, &exponent);
  exponent = exponent - 1 < f->least_exponent ? f->least_exponent : exponent - 1;
  double place = ldexp(1, exponent - f->fraction_bits);
  double rounded = rint(value / place) * place;
  return fabs(rounded) >= ldexp(1, f->greatest_exponent + 1) ? copysign(INFINITY, value) : rounded;
}

static bool same(double a, double b) {
  return (isnan(a) && isnan(b)) || (a == b && signbit(a) == signbit(b));
}

static void assert_narrows(const format *f, const float *values, int64_t count) {
  uint16_t *patterns = malloc((size_t)count * sizeof *patterns);
  assert_non_null(patterns);
  f->narrow(patterns, values, count);
  for (int64_t i = 0; i < count; ++i)
    if (!same(decode(f, patterns[i]), nearest(f, (double)values[i])))
      fail_msg("%s: %a became pattern %04x", f->name, (double)values[i], patterns[i]);
  free(patterns);
}

static void every_pattern_survives(const format *f) {
  enum { PATTERNS = 1 << 16 };
  uint16_t *patterns = malloc(PATTERNS * sizeof *patterns);
  float *values = malloc(PATTERNS * sizeof *values);
  for (int i = 0; i < PATTERNS; ++i) patterns[i] = (uint16_t)i;
  f->widen(values, patterns, PATTERNS);
  for (int i = 0; i < PATTERNS; ++i)
    if (!same(decode(f, (uint16_t)i), (double)values[i]))
      fail_msg("%s: pattern %04x became %a", f->name, i, (double)values[i]);
  f->narrow(patterns, values, PATTERNS);
  for (int i = 0; i < PATTERNS; ++i) {
    if (isnan(values[i]))
      assert_true(isnan(decode(f, patterns[i])));
    else
      assert_int_equal(patterns[i], i);
  }
  free(patterns);
  free(values);
}

/* Around each number of the format: halfway to its neighbour, and one float32 to either side. */
static void halves_round_to_even(const format *f) {
  enum { PATTERNS = 1 << 16 };
  float *values = malloc(3 * PATTERNS * sizeof *values);
  int64_t count = 0;
  for (int i = 0; i < PATTERNS; ++i) {
    double value = decode(f, (uint16_t)i), next = decode(f, (uint16_t)(i + 1));
    if (!isfinite(value)) continue;
    if (!isfinite(next)) next = copysign(ldexp(1, f->greatest_exponent + 1), value);
    float middle = (float)((value + next) / 2);
    values[count++] = middle;
    values[count++] = nextafterf(middle, INFINITY);
    values[count++] = nextafterf(middle, -INFINITY);
  }
  assert_narrows(f, values, count);
  free(values);
}

static void any_float_rounds_right(const format *f) {
  enum { COUNT = 200003 };
  float *values = malloc(COUNT * sizeof *values);
  attn_random random = {.seed = 11};
  for (int i = 0; i < COUNT; ++i) {
    uint32_t bits = attn_random_u32(&random); /* all exponents, subnormals, infinities and NaN */
    if (i % 97 == 0) bits &= 0x807fffffu;
    memcpy(&values[i], &bits, sizeof bits);
  }
  static const uint32_t specials[] = {0x7f800000, 0xff800000, 0x7f800001, 0x7fffffff, 0xff80ffff,
                                      0x7f7fffff, 0x00000001, 0x807fffff, 0x80000000, 0x477fefff};
  memcpy(values, specials, sizeof specials);
  assert_narrows(f, values, COUNT);
  free(values);
}

/* Every count, so that each kernel's last, partial vector is seen; nothing beyond it is written. */
static void short_counts_stay_inside(const format *f) {
  enum { MOST = 70, GUARD = 0x5a5a };
  float values[MOST + 1], wide[MOST + 1];
  uint16_t patterns[MOST + 1];
  for (int count = 0; count <= MOST; ++count) {
    for (int i = 0; i <= MOST; ++i) {
      values[i] = (float)(i - 20) * 0.25f;
      patterns[i] = GUARD;
      wide[i] = -1234.0f;
    }
    f->narrow(patterns, values, count);
    f->widen(wide, patterns, count);
    assert_int_equal(patterns[count], GUARD);
    assert_true(wide[count] == -1234.0f);
    for (int i = 0; i < count; ++i) assert_true(wide[i] == values[i]); /* few bits: exact */
  }
}

/* E4M3 from its definition: bias 7, no infinities, one pattern of NaN and its negative. */
static double decode_e4m3(unsigned pattern) {
  double sign = pattern & 0x80 ? -1 : 1;
  int exponent = pattern >> 3 & 15, fraction = pattern & 7;
  if (exponent == 15 && fraction == 7) return NAN;
  return sign * (exponent ? ldexp(8 + fraction, exponent - 10) : ldexp(fraction, -9));
}

/* Every pattern at every place of a vector, and counts that end inside one. */
static void float8_on_a_path(void *context) {
  (void)context;
  enum { PATTERNS = 256, MOST = PATTERNS + 40 };
  static const float scales[] = {1, 0.0123f, -3e30f};
  uint8_t patterns[MOST];
  float values[MOST + 1];
  for (int count = 0; count <= MOST; count += count < 40 ? 1 : 37)
    for (size_t s = 0; s < sizeof scales / sizeof *scales; ++s) {
      for (int i = 0; i < MOST; ++i) patterns[i] = (uint8_t)(i + count);
      values[count] = -1234.0f;
      attn_kernels_get()->f8_e4m3_to_f32(values, patterns, scales[s], count);
      assert_true(values[count] == -1234.0f);
      for (int i = 0; i < count; ++i) {
        float expected = (float)(decode_e4m3(patterns[i]) * (double)scales[s]);
        if (!same((double)values[i], (double)expected))
          fail_msg("%02x times %g became %a", patterns[i], (double)scales[s], (double)values[i]);
      }
    }
}

static void float8_is_exact(void **state) {
  (void)state;
  test_on_every_path(float8_on_a_path, NULL);
}

static void conversions_on_a_path(void *context) {
  (void)context;
  format formats[2];
  get_formats(formats);
  for (int i = 0; i < 2; ++i) {
    every_pattern_survives(&formats[i]);
    halves_round_to_even(&formats[i]);
    any_float_rounds_right(&formats[i]);
    short_counts_stay_inside(&formats[i]);
  }
}

static void conversions_are_exact(void **state) {
  (void)state;
  test_on_every_path(conversions_on_a_path, NULL);
}

/* --- Matrix-vector products ------------------------------------------------------------------- */

enum { MATVEC_INPUTS = 300, MATVEC_OUTPUTS = 11, GAP = 3 };

/* Sums of up to 300 products in float32: 300 roundings of 2^-24 relative to the sum of magnitudes
 * is the bound that no order of summation can exceed. */
static const double matvec_bound = MATVEC_INPUTS * 0x1p-24;

static void check_matvec(int64_t rows, int64_t outputs, int64_t inputs, bool bf16) {
  const attn_kernels *kernels = attn_kernels_get();
  float x[ATTN_MATVEC_ROWS * (MATVEC_INPUTS + GAP)], w[MATVEC_OUTPUTS * (MATVEC_INPUTS + GAP)];
  float y[ATTN_MATVEC_ROWS * (MATVEC_OUTPUTS + GAP)];
  uint16_t narrow[MATVEC_OUTPUTS * (MATVEC_INPUTS + GAP)];
  int64_t ldx = inputs + GAP, ldw = inputs + GAP, ldy = outputs + GAP;
  attn_random random = {.seed = (uint64_t)(rows * 1000 + inputs)};
  for (int64_t i = 0; i < rows * ldx; ++i)
    x[i] = i % ldx < inputs ? (float)attn_random_normal(&random) : NAN;
  for (int64_t i = 0; i < outputs * ldw; ++i) {
    narrow[i] = attn_f32_to_bf16(i % ldw < inputs ? (float)attn_random_normal(&random) : NAN);
    w[i] = attn_bf16_to_f32(narrow[i]);
  }
  for (int64_t i = 0; i < rows * ldy; ++i) y[i] = -7;
  if (bf16)
    kernels->matvec_bf16(rows, outputs, inputs, x, ldx, narrow, ldw, y, ldy);
  else
    kernels->matvec_f32(rows, outputs, inputs, x, ldx, w, ldw, y, ldy);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t o = 0; o < outputs; ++o) {
      double expected = 0, magnitude = 0;
      for (int64_t i = 0; i < inputs; ++i) {
        double product = (double)x[r * ldx + i] * (double)w[o * ldw + i];
        expected += product;
        magnitude += fabs(product);
      }
      if (!(fabs((double)y[r * ldy + o] - expected) <= matvec_bound * magnitude))
        fail_msg("matvec_%s rows %lld inputs %lld: y[%lld][%lld] is %g, expected %g",
                 bf16 ? "bf16" : "f32", (long long)rows, (long long)inputs, (long long)r,
                 (long long)o, (double)y[r * ldy + o], expected);
    }
    for (int64_t o = outputs; o < ldy; ++o) assert_true(y[r * ldy + o] == -7);
  }
}

static void matvec_on_a_path(void *context) {
  (void)context;
  static const int64_t inputs[] = {1, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 128, 129, 300};
  for (int64_t rows = 1; rows <= ATTN_MATVEC_ROWS; ++rows)
    for (size_t i = 0; i < sizeof inputs / sizeof *inputs; ++i)
      for (int64_t outputs = 1; outputs <= MATVEC_OUTPUTS; outputs += 5)
        for (int bf16 = 0; bf16 < 2; ++bf16) check_matvec(rows, outputs, inputs[i], bf16);
}

static void matvec_equals_float64(void **state) {
  (void)state;
  test_on_every_path(matvec_on_a_path, NULL);
}

/* --- Exponential ------------------------------------------------------------------------------ */

static const double exp_relative_error = 2e-7; /* promised in kernels/rows.h */

static void exp_on_a_path(void *context) {
  (void)context;
  enum { COUNT = 400001 };
  float *x = malloc(COUNT * sizeof *x), *y = malloc(COUNT * sizeof *y);
  for (int i = 0; i < COUNT; ++i) x[i] = (float)(-87.0 + 175.0 * i / (COUNT - 1));
  attn_kernels_get()->exp_f32(y, x, COUNT);
  double worst = 0;
  for (int i = 0; i < COUNT; ++i) {
    double error = fabs((double)y[i] / exp((double)x[i]) - 1);
    if (!(error <= exp_relative_error))
      fail_msg("exp(%a) is %a, relative error %g", (double)x[i], (double)y[i], error);
    worst = error > worst ? error : worst;
  }
  print_message("    exp: relative error at most %.3g\n", worst);
  const float edges[] = {-INFINITY, -1e30f, -200.0f, 0.0f, -0.0f, 89.0f, 1e30f, INFINITY};
  const float expected[] = {0, 0, 0, 1, 1, INFINITY, INFINITY, INFINITY};
  attn_kernels_get()->exp_f32(y, edges, 8);
  for (int i = 0; i < 8; ++i) assert_true(y[i] == expected[i]);
  free(x);
  free(y);
}

static void exp_keeps_its_promise(void **state) {
  (void)state;
  test_on_every_path(exp_on_a_path, NULL);
}

/* --- A run of attention ----------------------------------------------------------------------- */

/* Errors, in the norm, of weights with the precision of bfloat16: 2^-9 at most each in o; in sums
 * they cancel, as 1 / sqrt of 32 weights or more. */
enum { RUN_ROWS = ATTN_RUN_ROWS, RUN_KEYS = 3 * ATTN_RUN_KEYS, RUN_DEPTH = 256, RUN_WIDTH = 128 };

typedef struct run {
  int64_t keys, depth, width;
  float scale;
  uint16_t q[RUN_ROWS * RUN_DEPTH], k[RUN_KEYS * RUN_DEPTH], v[RUN_KEYS * RUN_WIDTH];
  uint16_t packed_k[RUN_KEYS * RUN_DEPTH], packed_v[RUN_KEYS * RUN_WIDTH];
  float maximum[RUN_ROWS], sum[RUN_ROWS], o[RUN_ROWS * RUN_WIDTH];
  double right_sum[RUN_ROWS], right_o[RUN_ROWS * RUN_WIDTH];
} run;

static void draw(uint16_t *x, int64_t count, attn_random *random) {
  for (int64_t i = 0; i < count; ++i) x[i] = attn_f32_to_bf16((float)attn_random_normal(random));
}

/* What the first `keys` keys add to sums that start at 1 and an o that starts at 2, in float64. */
static void compute_run(run *r, int64_t keys) {
  for (int64_t i = 0; i < RUN_ROWS * r->width; ++i) r->right_o[i] = 2;
  for (int64_t i = 0; i < RUN_ROWS; ++i) {
    r->right_sum[i] = 1;
    for (int64_t j = 0; j < keys; ++j) {
      double score = 0;
      for (int64_t c = 0; c < r->depth; ++c)
        score += (double)attn_bf16_to_f32(r->q[i * r->depth + c]) *
                 (double)attn_bf16_to_f32(r->k[j * r->depth + c]);
      double weight = exp2(score * (double)r->scale - (double)r->maximum[i]);
      r->right_sum[i] += weight;
      for (int64_t c = 0; c < r->width; ++c)
        r->right_o[i * r->width + c] += weight * (double)attn_bf16_to_f32(r->v[j * r->width + c]);
    }
  }
}

static void pack_keys(run *r) {
  attn_kernels_get()->pack_bf16(r->packed_k, r->depth * ATTN_PANEL, r->k, r->depth, r->keys, 1,
                                r->depth);
}

static void make_run(run *r, int64_t keys, int64_t depth, int64_t width) {
  attn_random random = {.seed = (uint64_t)(keys + depth + width)};
  r->keys = keys, r->depth = depth, r->width = width;
  r->scale = (float)(1 / sqrt((double)depth));
  draw(r->q, RUN_ROWS * depth, &random);
  draw(r->k, keys * depth, &random);
  draw(r->v, keys * width, &random);
  pack_keys(r);
  attn_kernels_get()->pack_bf16(r->packed_v, keys * ATTN_PANEL, r->v, keys, width, width, 1);
  for (int64_t i = 0; i < RUN_ROWS * width; ++i) r->o[i] = 2;
  for (int64_t i = 0; i < RUN_ROWS; ++i) r->sum[i] = 1, r->maximum[i] = 1 + 0.125f * (float)i;
  compute_run(r, keys);
}

static int64_t do_run(run *r) {
  const attn_kernels *kernels = attn_kernels_get();
  kernels->begin();
  int64_t done = kernels->softmax_run_bf16(
      r->keys, r->depth, r->width, r->scale, r->q, r->depth, r->packed_k, r->depth * ATTN_PANEL,
      r->packed_v, r->keys * ATTN_PANEL, r->maximum, r->sum, r->o, r->width);
  kernels->end();
  return done;
}

static double norm_error(const float *x, const double *right, int64_t count) {
  double difference = 0, norm = 0;
  for (int64_t i = 0; i < count; ++i) {
    difference += ((double)x[i] - right[i]) * ((double)x[i] - right[i]);
    norm += right[i] * right[i];
  }
  return sqrt(difference / norm);
}

static void assert_near(const char *what, const float *x, const double *right, int64_t count,
                        double tolerance) {
  double error = norm_error(x, right, count);
  if (!(error < tolerance)) fail_msg("%s: error %g, tolerance %g", what, error, tolerance);
}

static void assert_taken(run *r, int64_t keys) {
  assert_int_equal(do_run(r), keys);
  assert_near("sums", r->sum, r->right_sum, RUN_ROWS, 1e-3);
  assert_near("o", r->o, r->right_o, RUN_ROWS * r->width, 4e-3);
}

static void assert_refused(run *r) {
  assert_int_equal(do_run(r), 0);
  for (int64_t i = 0; i < RUN_ROWS; ++i) assert_true(r->sum[i] == 1);
  for (int64_t i = 0; i < RUN_ROWS * r->width; ++i) assert_true(r->o[i] == 2);
}

static void run_on_a_path(void *context) {
  static const int64_t shapes[][3] = {
      {32, 32, 32},   {96, 64, 64},  {256, 128, 128}, {160, 96, 96},  {64, 256, 32},
      {224, 160, 64}, {288, 64, 64}, {768, 128, 128}, {576, 64, 128}, {736, 96, 32},
  };
  run *r = context;
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; ++i) {
    make_run(r, shapes[i][0], shapes[i][1], shapes[i][2]);
    assert_taken(r, r->keys);
  }
  /* A key of the second run that no row's maximum suits, or that is not finite. */
  const float great[] = {1e4f, 1e30f, INFINITY, NAN};
  for (int i = 0; i < 4; ++i) {
    make_run(r, 2 * ATTN_RUN_KEYS, 64, 64);
    for (int c = 0; c < 64; ++c)
      r->k[(ATTN_RUN_KEYS + 77) * 64 + c] = attn_f32_to_bf16(great[i] * (float)(c % 2 * 2 - 1));
    pack_keys(r);
    compute_run(r, ATTN_RUN_KEYS);
    assert_taken(r, ATTN_RUN_KEYS);
  }
  const float bad[] = {-INFINITY, -30, NAN}; /* no maximum yet, one too low, none at all */
  for (int i = 0; i < 3; ++i) {
    make_run(r, 64, 64, 64);
    r->maximum[5 * i + 3] = bad[i];
    assert_refused(r);
  }
}

static void a_run_equals_float64(void **state) {
  (void)state;
  run *r = malloc(sizeof *r);
  assert_non_null(r);
  test_on_every_path(run_on_a_path, r);
  free(r);
}

/* --- The same of the backward pass ------------------------------------------------------------ */

/* The places of p, d_s and the rows of d_s that are beside what a run writes are poisoned. */
enum { GRAD_PANEL = 64 * ATTN_PANEL, GRAD_AT = 32, POISON = 0x7fc1 };

typedef struct grad_run {
  int64_t keys, depth, width;
  float scale, lse[RUN_ROWS], delta[RUN_ROWS];
  uint16_t q[RUN_ROWS * RUN_DEPTH], k[ATTN_RUN_KEYS * RUN_DEPTH];
  uint16_t d_o[RUN_ROWS * RUN_DEPTH], v[ATTN_RUN_KEYS * RUN_DEPTH];
  uint16_t packed_k[ATTN_RUN_KEYS * RUN_DEPTH], packed_v[ATTN_RUN_KEYS * RUN_DEPTH];
  uint16_t p[ATTN_RUN_KEYS / ATTN_PANEL * GRAD_PANEL], d_s[ATTN_RUN_KEYS / ATTN_PANEL * GRAD_PANEL];
  uint16_t rows[RUN_ROWS * (ATTN_RUN_KEYS + 32)];
  float got[3][RUN_ROWS * ATTN_RUN_KEYS];
  double right[2][RUN_ROWS * ATTN_RUN_KEYS];
} grad_run;

static double dot_bf16(const uint16_t *x, const uint16_t *y, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i)
    sum += (double)attn_bf16_to_f32(x[i]) * (double)attn_bf16_to_f32(y[i]);
  return sum;
}

static void make_grad_run(grad_run *r, int64_t keys, int64_t depth, int64_t width) {
  attn_random random = {.seed = (uint64_t)(7 * keys + depth + width)};
  r->keys = keys, r->depth = depth, r->width = width;
  r->scale = (float)(1 / sqrt((double)depth));
  draw(r->q, RUN_ROWS * depth, &random);
  draw(r->k, keys * depth, &random);
  draw(r->d_o, RUN_ROWS * width, &random);
  draw(r->v, keys * width, &random);
  const attn_kernels *kernels = attn_kernels_get();
  kernels->pack_bf16(r->packed_k, depth * ATTN_PANEL, r->k, depth, keys, 1, depth);
  kernels->pack_bf16(r->packed_v, width * ATTN_PANEL, r->v, width, keys, 1, width);
  for (size_t i = 0; i < sizeof r->p / 2; ++i) r->p[i] = r->d_s[i] = POISON;
  for (size_t i = 0; i < sizeof r->rows / 2; ++i) r->rows[i] = POISON;
  for (int64_t i = 0; i < RUN_ROWS; ++i) {
    r->lse[i] = 3 + 0.125f * (float)i;
    r->delta[i] = (float)attn_random_normal(&random);
    for (int64_t j = 0; j < keys; ++j) {
      double score = dot_bf16(r->q + i * depth, r->k + j * depth, depth) * (double)r->scale;
      double weight = exp2(score - (double)r->lse[i]);
      double d_p = dot_bf16(r->d_o + i * width, r->v + j * width, width);
      r->right[0][i * keys + j] = weight;
      r->right[1][i * keys + j] = weight * (d_p - (double)r->delta[i]);
    }
  }
}

static void grad_run_on_a_path(void *context) {
  static const int64_t shapes[][3] = {
      {32, 32, 32},  {96, 64, 64},   {256, 128, 128}, {160, 96, 64},
      {64, 256, 32}, {224, 32, 128}, {64, 256, 256},  {96, 160, 224},
  };
  grad_run *r = context;
  const attn_kernels *kernels = attn_kernels_get();
  for (size_t n = 0; n < sizeof shapes / sizeof *shapes; ++n) {
    int64_t keys = shapes[n][0], depth = shapes[n][1], width = shapes[n][2], ld = keys + 32;
    make_grad_run(r, keys, depth, width);
    kernels->begin();
    kernels->softmax_grad_run_bf16(
        keys, depth, width, r->scale, r->q, depth, r->packed_k, depth * ATTN_PANEL, r->d_o, width,
        r->packed_v, width * ATTN_PANEL, r->lse, r->delta, r->p + GRAD_AT * ATTN_PANEL,
        r->d_s + GRAD_AT * ATTN_PANEL, GRAD_PANEL, r->rows, ld);
    kernels->end();
    for (int64_t i = 0; i < RUN_ROWS; ++i)
      for (int64_t j = 0; j < keys; ++j) {
        int64_t pair = (GRAD_AT + i) / 2 * ATTN_PANEL + j % ATTN_PANEL;
        int64_t at = j / ATTN_PANEL * GRAD_PANEL + 2 * pair + i % 2;
        r->got[0][i * keys + j] = attn_bf16_to_f32(r->p[at]);
        r->got[1][i * keys + j] = attn_bf16_to_f32(r->d_s[at]);
        r->got[2][i * keys + j] = attn_bf16_to_f32(r->rows[i * ld + j]);
        r->p[at] = r->d_s[at] = r->rows[i * ld + j] = POISON;
      }
    assert_near("p", r->got[0], r->right[0], RUN_ROWS * keys, 4e-3);
    assert_near("d_s", r->got[1], r->right[1], RUN_ROWS * keys, 4e-3);
    assert_near("d_s by rows", r->got[2], r->right[1], RUN_ROWS * keys, 4e-3);
    for (size_t i = 0; i < sizeof r->p / 2; ++i)
      assert_true(r->p[i] == POISON && r->d_s[i] == POISON);
    for (size_t i = 0; i < sizeof r->rows / 2; ++i) assert_true(r->rows[i] == POISON);
  }
}

static void a_grad_run_equals_float64(void **state) {
  (void)state;
  grad_run *r = malloc(sizeof *r);
  assert_non_null(r);
  test_on_every_path(grad_run_on_a_path, r);
  free(r);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(conversions_are_exact),     cmocka_unit_test(matvec_equals_float64),
      cmocka_unit_test(exp_keeps_its_promise),     cmocka_unit_test(a_run_equals_float64),
      cmocka_unit_test(a_grad_run_equals_float64), cmocka_unit_test(float8_is_exact),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
