/* The recurrent kernels of every path of this machine against the generic ones, over pseudo-random
 * shapes: what one path alone uses is tested here even where that path is not the one that runs. */
#include "support/test.h"

#include "base/random.h"
#include "kernels/kernels.h"

#include <math.h>
#include <string.h>

enum { ROWS = 70, LD = 96, SIZE = LD * LD };

typedef struct data {
  int64_t rows, columns, width;
  float real[SIZE], factor[SIZE], own[SIZE], expected[SIZE];
  uint16_t elem[SIZE], other[SIZE], y[2 * SIZE], y_expected[2 * SIZE];
} data;

static data d;
static const attn_kernels *fast, *plain;

static void fill(uint64_t seed) {
  attn_random random = {.seed = seed};
  d.rows = 1 + (int64_t)attn_random_below(&random, ROWS);
  d.columns = 1 + (int64_t)attn_random_below(&random, ROWS);
  d.width = (d.columns + 31) / 32 * 32;
  for (int i = 0; i < SIZE; ++i) {
    d.real[i] = (float)attn_random_normal(&random);
    d.factor[i] = (float)attn_random_uniform(&random);
    d.elem[i] = attn_f32_to_bf16((float)attn_random_normal(&random));
    d.other[i] = attn_f32_to_bf16((float)attn_random_normal(&random));
  }
  memset(d.y, 0x55, sizeof d.y); /* what is not written must stay the same on both sides */
  memset(d.y_expected, 0x55, sizeof d.y_expected);
  memset(d.own, 0, sizeof d.own);
  memset(d.expected, 0, sizeof d.expected);
}

/* One bfloat16 step (2^-7 relative): two orders of the same multiplications may round apart. */
static void same_elem(const char *what) {
  for (int i = 0; i < 2 * SIZE; ++i) {
    double a = attn_bf16_to_f32(d.y[i]), b = attn_bf16_to_f32(d.y_expected[i]);
    if (!(fabs(a - b) <= 0x1p-7 * fabs(b)))
      fail_msg("%s on %s: element %d is %g, expected %g (%d x %d)", what,
               attn_kernel_path_name(fast->path), i, a, b, (int)d.rows, (int)d.columns);
  }
}

/* float32 rounding of sums of some hundred terms of size 1. */
static void same_real(const char *what) {
  for (int i = 0; i < SIZE; ++i)
    if (!(fabsf(d.own[i] - d.expected[i]) <= 1e-4f))
      fail_msg("%s on %s: element %d is %g, expected %g", what, attn_kernel_path_name(fast->path),
               i, (double)d.own[i], (double)d.expected[i]);
}

/* Runs `name` of the fast table on y or own, and of the generic table on the expected. */
#define ON_ELEM(seed, name, ...)                                                                   \
  do {                                                                                             \
    uint16_t *y = d.y;                                                                             \
    fill(seed);                                                                                    \
    fast->name(__VA_ARGS__);                                                                       \
    y = d.y_expected;                                                                              \
    plain->name(__VA_ARGS__);                                                                      \
    same_elem(#name);                                                                              \
  } while (0)
#define ON_REAL(seed, name, ...)                                                                   \
  do {                                                                                             \
    float *y = d.own;                                                                              \
    fill(seed);                                                                                    \
    fast->name(__VA_ARGS__);                                                                       \
    y = d.expected;                                                                                \
    plain->name(__VA_ARGS__);                                                                      \
    same_real(#name);                                                                              \
  } while (0)

static void packs(uint64_t seed, bool decay) {
  fill(seed);
  memcpy(d.own, d.real, sizeof d.own);
  memcpy(d.expected, d.real, sizeof d.expected);
  fast->recurrent_pack_bf16(d.y, LD * ATTN_PANEL, d.own, LD, d.rows, d.columns,
                            decay ? d.factor : NULL);
  plain->recurrent_pack_bf16(d.y_expected, LD * ATTN_PANEL, d.expected, LD, d.rows, d.columns,
                             decay ? d.factor : NULL);
  same_elem("recurrent_pack_bf16");
  same_real("recurrent_pack_bf16");
}

static void masks(uint64_t seed) {
  int64_t rows = ROWS; /* square; strips of rows by a negative skip; decays of either direction */
  ON_ELEM(seed, recurrent_mask_bf16, y, LD, d.real, LD, d.factor, LD, NULL, 0.5f, rows, LD, 0);
  ON_ELEM(seed, recurrent_mask_bf16, y, LD, d.real, LD, d.factor + ROWS, -1, d.factor, 1, rows, LD,
          1);
  ON_ELEM(seed, recurrent_mask_bf16, y, LD, d.real, LD, NULL, 0, NULL, -1, 20, LD, -32);
}

static void check_path(void *context) {
  (void)context;
  fast = attn_kernels_get();
  plain = attn_kernels_of(ATTN_PATH_GENERIC);
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    ON_ELEM(seed, recurrent_scale_bf16, y, LD, d.elem, LD, d.rows, d.columns, d.width, NULL, 0, 1);
    ON_ELEM(seed, recurrent_scale_bf16, y, LD, d.elem, LD, d.rows, d.columns, d.width, d.factor, 0,
            2);
    ON_ELEM(seed, recurrent_scale_bf16, y, LD, d.elem, LD, d.rows, d.columns, d.width, d.factor, LD,
            2);
    ON_ELEM(seed, recurrent_transpose_bf16, y, LD, d.elem, LD, d.rows, d.columns,
            (d.rows + 31) / 32 * 32, NULL, 0);
    ON_ELEM(seed, recurrent_transpose_bf16, y, LD, d.elem, LD, d.rows, d.columns,
            (d.rows + 31) / 32 * 32, d.factor, 0);
    ON_ELEM(seed, recurrent_transpose_bf16, y, LD, d.elem, LD, d.rows, d.columns,
            (d.rows + 31) / 32 * 32, d.factor, LD);
    ON_ELEM(seed, recurrent_round_bf16, y, LD, d.real, LD, d.rows, d.columns, d.width, NULL, 3);
    ON_ELEM(seed, recurrent_round_bf16, y, LD, d.real, LD, d.rows, d.columns, d.columns, d.factor,
            3);
    ON_ELEM(seed, recurrent_residual_bf16, y, LD, d.elem, LD, d.real, LD, d.factor, d.rows,
            d.columns, d.width);
    masks(seed);
    packs(seed, false);
    packs(seed, true);
    ON_REAL(seed, recurrent_load_bf16, y, LD, d.elem, LD, d.rows, d.columns);
    ON_REAL(seed, recurrent_dot_bf16, y, d.elem, LD, d.real, LD, d.rows, d.columns, 2);
    ON_REAL(seed, recurrent_product_bf16, y, LD, d.elem, LD, d.real, LD, d.rows, d.columns, 2);
    ON_REAL(seed, recurrent_diagonal_bf16, y, y + LD / 2, LD, d.elem, LD, d.other, LD, d.factor, LD,
            1 + d.rows % 16, d.columns);
    ON_REAL(seed, recurrent_diagonal_f32, y, NULL, LD, d.real, LD, d.factor, LD, d.factor, LD,
            1 + d.rows % 16, d.columns);
    ON_REAL(seed, recurrent_decay_matrix_f32, y, LD, d.factor, d.rows);
  }
}

static void every_path_equals_generic(void **state) {
  (void)state;
  test_on_every_path(check_path, NULL);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(every_path_equals_generic)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
