/* The kernels of decode with quantised weights (kernels/blocks.h) of every path against float64. */
#include "support/test.h"

#include "base/random.h"
#include "kernels/kernels.h"
#include "tensor/blocks.h"

#include <math.h>
#include <string.h>

/* --- Rounding activations --------------------------------------------------------------------- */

enum { COUNT = 4 * ATTN_ROUNDED_BLOCK };

typedef struct rounded {
  int8_t q[COUNT + 1];
  float scale[COUNT / ATTN_ROUNDED_BLOCK + 1], sum[COUNT / ATTN_ROUNDED_BLOCK + 1];
} rounded;

static void round_all(const float *x, rounded *r) {
  memset(r, 0x5a, sizeof *r);
  attn_kernels_get()->round_blocks(r->q, r->scale, r->sum, x, COUNT);
  float guard;
  memset(&guard, 0x5a, sizeof guard);
  assert_int_equal(r->q[COUNT], 0x5a); /* nothing behind is written */
  assert_memory_equal(&r->scale[COUNT / ATTN_ROUNDED_BLOCK], &guard, sizeof guard);
  assert_memory_equal(&r->sum[COUNT / ATTN_ROUNDED_BLOCK], &guard, sizeof guard);
}

/* Half a step at most, and some roundings of float32. */
static void assert_rounded(const float *x, const rounded *r) {
  for (int b = 0; b < COUNT / ATTN_ROUNDED_BLOCK; ++b) {
    double most = 0, total = 0, scale = (double)r->scale[b];
    for (int i = b * ATTN_ROUNDED_BLOCK; i < (b + 1) * ATTN_ROUNDED_BLOCK; ++i) {
      most = fmax(most, fabs((double)x[i]));
      total += r->q[i];
    }
    for (int i = b * ATTN_ROUNDED_BLOCK; i < (b + 1) * ATTN_ROUNDED_BLOCK; ++i) {
      assert_in_range(r->q[i] + 127, 0, 254);
      assert_true(fabs((double)x[i] - scale * r->q[i]) <= most / 254 * (1 + 1e-4) + 0x1p-110);
    }
    assert_true(fabs(scale - most / 127) <= most * 1e-6 + 0x1p-149);
    assert_true(fabs((double)r->sum[b] - scale * total) <= fabs(scale * total) * 1e-6 + 0x1p-149);
  }
}

static void rounding_on_a_path(void *context) {
  (void)context;
  rounded r;
  float x[COUNT];
  attn_random random = {.seed = 3};
  for (int exponent = -140; exponent <= 120; exponent += 4) {
    for (int i = 0; i < COUNT; ++i)
      x[i] = ldexpf((float)attn_random_normal(&random), exponent + i / ATTN_ROUNDED_BLOCK);
    round_all(x, &r);
    assert_rounded(x, &r);
  }
  memset(x, 0, sizeof x);
  x[40] = -3;
  x[COUNT - 1] = 5;
  round_all(x, &r); /* blocks of zeros, and of one number */
  assert_rounded(x, &r);
  assert_int_equal(r.q[40], -127);
  static const float specials[] = {NAN, -NAN, INFINITY, -INFINITY};
  for (int s = 0; s < 4; ++s) {
    x[33] = specials[s];
    round_all(x, &r);
    assert_true(!isfinite(r.scale[1]) && isfinite(r.scale[0]) && isfinite(r.scale[2]));
  }
}

static void activations_round_to_8_bits(void **state) {
  (void)state;
  test_on_every_path(rounding_on_a_path, NULL);
}

/* --- Products --------------------------------------------------------------------------------- */

/* The sums of products of integers are exact; what is left are roundings of float32, of numbers
 * that may be larger than the weights where a minimum cancels them. */
static const double tolerance = 1e-5;

enum {
  MOST_OUTPUTS = 5,
  MOST_INPUTS = 1792,
  ROWS = ATTN_MATVEC_ROWS,
  LD = MOST_INPUTS + 256,
  LDY = MOST_OUTPUTS + 1
};

typedef void matvec(int64_t rows, int64_t outputs, int64_t inputs, const attn_rounded *x,
                    const void *w, float *y, int64_t ldy);

typedef struct kernel {
  attn_block_type type;
  matvec *run;
  int scales, place[2]; /* of float16 in a block */
} kernel;

/* Weights of any bytes, or of one byte everywhere; scales are finite. */
static char *fill_weights(const kernel *k, int64_t count, int filling, uint64_t seed) {
  const attn_block_format *format = attn_block_get_format(k->type);
  int64_t blocks = count / format->elements, bytes = blocks * format->bytes;
  char *w = malloc((size_t)bytes);
  attn_random random = {.seed = seed};
  for (int64_t i = 0; i < bytes; ++i)
    w[i] = (char)(filling < 0 ? attn_random_u32(&random) : (uint32_t)filling);
  for (int64_t b = 0; b < blocks; ++b)
    for (int s = 0; s < k->scales; ++s) {
      uint16_t scale = attn_f32_to_f16((float)attn_random_normal(&random));
      memcpy(w + b * format->bytes + k->place[s], &scale, sizeof scale);
    }
  return w;
}

typedef struct activations {
  int8_t q[ROWS * LD];
  float scale[ROWS * LD / ATTN_ROUNDED_BLOCK], sum[ROWS * LD / ATTN_ROUNDED_BLOCK];
} activations;

/* Codes of any size, or the largest of either sign. */
static void fill_activations(activations *x, bool largest, uint64_t seed) {
  attn_random random = {.seed = seed};
  for (int i = 0; i < ROWS * LD; ++i) {
    int code = (int)attn_random_below(&random, 255) - 127;
    x->q[i] = (int8_t)(!largest ? code : i / ATTN_ROUNDED_BLOCK % 3 ? 127 : -127);
  }
  for (int b = 0; b < ROWS * LD / ATTN_ROUNDED_BLOCK; ++b) {
    int total = 0;
    for (int i = 0; i < ATTN_ROUNDED_BLOCK; ++i) total += x->q[b * ATTN_ROUNDED_BLOCK + i];
    x->scale[b] = (float)attn_random_uniform(&random);
    x->sum[b] = x->scale[b] * (float)total;
  }
}

static void check_matvec(const kernel *k, const activations *x, const char *w, int64_t rows,
                         int64_t outputs, int64_t inputs) {
  float y[(ROWS + 1) * LDY];
  for (int i = 0; i < (ROWS + 1) * LDY; ++i) y[i] = NAN;
  attn_rounded rounded = {.q = x->q, .scale = x->scale, .sum = x->sum, .ld = LD};
  k->run(rows, outputs, inputs, &rounded, w, y, LDY);
  float *values = malloc((size_t)(outputs * inputs) * sizeof *values);
  assert_ok(attn_blocks_to_f32(k->type, w, values, outputs * inputs));
  for (int64_t r = 0; r <= ROWS; ++r)
    for (int64_t o = 0; o <= MOST_OUTPUTS; ++o) {
      if (r >= rows || o >= outputs) {
        assert_true(isnan(y[r * LDY + o]));
        continue;
      }
      double want = 0, size = 0;
      for (int64_t i = 0; i < inputs; ++i) {
        int64_t place = r * LD + i;
        double term = (double)x->scale[place / ATTN_ROUNDED_BLOCK] * x->q[place] *
                      (double)values[o * inputs + i];
        want += term;
        size += fabs(term);
      }
      if (!(fabs((double)y[r * LDY + o] - want) <= tolerance * size))
        fail_msg("%s, %lld rows, %lld x %lld: row %lld, output %lld: %g for %g, terms of %g",
                 attn_block_get_format(k->type)->name, (long long)rows, (long long)outputs,
                 (long long)inputs, (long long)r, (long long)o, (double)y[r * LDY + o], want, size);
    }
  free(values);
}

/* Random weights, and those whose codes are the least and the greatest, where a sum of neighbouring
 * products in 16 bits would be the first to overflow. */
static void check_kernel(const kernel *k, activations *x) {
  static const int fillings[] = {-1, 0x00, 0x7f, 0x80, 0xff};
  int64_t elements = attn_block_get_format(k->type)->elements;
  for (size_t f = 0; f < sizeof fillings / sizeof *fillings; ++f)
    for (int64_t blocks = 1; blocks <= 7; blocks += 1 + (blocks == 5)) {
      int64_t inputs = blocks * elements;
      char *w = fill_weights(k, MOST_OUTPUTS * inputs, fillings[f], (uint64_t)blocks);
      for (int largest = 0; largest < 2; ++largest) {
        fill_activations(x, largest, (uint64_t)blocks);
        for (int64_t rows = 1; rows <= ROWS; ++rows)
          check_matvec(k, x, w, rows, 1 + (rows + blocks) % MOST_OUTPUTS, inputs);
      }
      free(w);
    }
}

static void products_on_a_path(void *context) {
  const attn_kernels *kernels = attn_kernels_get();
  const kernel all[] = {
      {ATTN_BLOCK_Q4_0, kernels->matvec_q4_0, 1, {0}},
      {ATTN_BLOCK_Q4_1, kernels->matvec_q4_1, 2, {0, 2}},
      {ATTN_BLOCK_Q5_0, kernels->matvec_q5_0, 1, {0}},
      {ATTN_BLOCK_Q5_1, kernels->matvec_q5_1, 2, {0, 2}},
      {ATTN_BLOCK_Q8_0, kernels->matvec_q8_0, 1, {0}},
      {ATTN_BLOCK_Q4_K, kernels->matvec_q4_k, 2, {0, 2}},
      {ATTN_BLOCK_Q5_K, kernels->matvec_q5_k, 2, {0, 2}},
      {ATTN_BLOCK_Q6_K, kernels->matvec_q6_k, 1, {208}},
  };
  for (size_t i = 0; i < sizeof all / sizeof *all; ++i) check_kernel(&all[i], context);
}

static void products_equal_straight_loops(void **state) {
  (void)state;
  activations *x = malloc(sizeof *x);
  test_on_every_path(products_on_a_path, x);
  free(x);
}

/* --- To float32 ------------------------------------------------------------------------------- */

typedef struct expansion {
  attn_block_type type;
  void (*run)(float *x, const void *blocks, int64_t count);
  int scales, place[2];
} expansion;

/* As integers, so that zeros have their signs and NaN equals NaN. */
static void check_expansion(const expansion *e, const int8_t *bytes) {
  enum { BLOCKS = 40, GUARD = 0x5a };
  const attn_block_format *format = attn_block_get_format(e->type);
  int64_t count = BLOCKS * (int64_t)format->elements;
  size_t size = BLOCKS * (size_t)format->bytes;
  float *want = malloc((size_t)count * sizeof *want),
        *got = malloc(((size_t)count + 1) * sizeof *got);
  char *blocks = malloc(size); /* of this size: nothing may be read behind it */
  memcpy(blocks, bytes, size);
  for (int b = 0; b < BLOCKS; ++b)
    for (int s = 0; s < e->scales; ++s)
      blocks[b * format->bytes + e->place[s] + 1] &= (char)0xbf; /* below 2: neither inf nor NaN */
  assert_ok(attn_blocks_to_f32(e->type, blocks, want, count));
  memset(got, GUARD, ((size_t)count + 1) * sizeof *got);
  e->run(got, blocks, count);
  for (int64_t i = 0; i < count; ++i)
    if (memcmp(&want[i], &got[i], sizeof *got) != 0)
      fail_msg("%s: element %lld of block %lld is %a, not %a", format->name,
               (long long)(i % format->elements), (long long)(i / format->elements), (double)got[i],
               (double)want[i]);
  assert_int_equal(((char *)(got + count))[0], GUARD);
  free(want);
  free(got);
  free(blocks);
}

static void expansions_on_a_path(void *context) {
  const attn_kernels *kernels = attn_kernels_get();
  const expansion all[] = {
      {ATTN_BLOCK_Q4_0, kernels->q4_0_to_f32, 1, {0}},
      {ATTN_BLOCK_Q4_1, kernels->q4_1_to_f32, 2, {0, 2}},
      {ATTN_BLOCK_Q5_0, kernels->q5_0_to_f32, 1, {0}},
      {ATTN_BLOCK_Q5_1, kernels->q5_1_to_f32, 2, {0, 2}},
      {ATTN_BLOCK_Q8_0, kernels->q8_0_to_f32, 1, {0}},
      {ATTN_BLOCK_Q2_K, kernels->q2_k_to_f32, 2, {80, 82}},
      {ATTN_BLOCK_Q3_K, kernels->q3_k_to_f32, 1, {108}},
      {ATTN_BLOCK_Q4_K, kernels->q4_k_to_f32, 2, {0, 2}},
      {ATTN_BLOCK_Q5_K, kernels->q5_k_to_f32, 2, {0, 2}},
      {ATTN_BLOCK_Q6_K, kernels->q6_k_to_f32, 1, {208}},
  };
  for (size_t i = 0; i < sizeof all / sizeof *all; ++i) check_expansion(&all[i], context);
}

static void expansions_equal_the_definition(void **state) {
  (void)state;
  enum { BYTES = 40 * 210 };
  static int8_t bytes[BYTES];
  attn_random random = {.seed = 8};
  for (int round = 0; round < 20; ++round) {
    for (int i = 0; i < BYTES; ++i) bytes[i] = (int8_t)attn_random_u32(&random);
    test_on_every_path(expansions_on_a_path, bytes);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(activations_round_to_8_bits),
      cmocka_unit_test(products_equal_straight_loops),
      cmocka_unit_test(expansions_equal_the_definition),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
