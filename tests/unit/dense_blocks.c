/* Products with quantised weights against a straight loop in float64 over the numbers that the
 * blocks stand for, on every kernel path: all types that can be unpacked, every compute dtype, few
 * and many rows; and the kernels of the small types against their generic twins. */
#include "support/test.h"

#include "base/fault.h"
#include "base/random.h"
#include "engines/dense/dense.h"
#include "kernels/kernels.h"
#include "tensor/half.h"

#include <math.h>
#include <string.h>

enum { MOST_INPUTS = 1024, MOST_OUTPUTS = 100, MOST_ROWS = 130 };

/* Where the float16 scales of a block are: random bits there would be infinite or NaN. */
typedef struct kind {
  attn_block_type type;
  int halves[2]; /* offsets; -1: none */
} kind;
static const kind kinds[] = {
    {ATTN_BLOCK_Q8_0, {0, -1}},   {ATTN_BLOCK_Q4_0, {0, -1}}, {ATTN_BLOCK_Q4_1, {0, 2}},
    {ATTN_BLOCK_Q5_0, {0, -1}},   {ATTN_BLOCK_Q5_1, {0, 2}},  {ATTN_BLOCK_Q2_K, {80, 82}},
    {ATTN_BLOCK_Q3_K, {108, -1}}, {ATTN_BLOCK_Q4_K, {0, 2}},  {ATTN_BLOCK_Q5_K, {0, 2}},
    {ATTN_BLOCK_Q6_K, {208, -1}},
};
enum { KINDS = sizeof kinds / sizeof *kinds };

static unsigned char *random_blocks(const kind *k, int64_t elements, uint64_t seed) {
  const attn_block_format *format = attn_block_get_format(k->type);
  int64_t count = elements / format->elements;
  unsigned char *bytes = malloc((size_t)(count * format->bytes));
  attn_random random = {.seed = seed};
  for (int64_t i = 0; i < count * format->bytes; ++i)
    bytes[i] = (unsigned char)(attn_random_uniform(&random) * 256);
  for (int64_t b = 0; b < count; ++b)
    for (int h = 0; h < 2; ++h) {
      if (k->halves[h] < 0) continue;
      uint16_t bits = attn_f32_to_f16((float)(0.02 * attn_random_uniform(&random) - 0.01));
      memcpy(bytes + b * format->bytes + k->halves[h], &bits, sizeof bits);
    }
  return bytes;
}

/* x as the compute dtype holds it, and the same numbers. */
static attn_tensor random_rows(attn_dtype dtype, int64_t rows, int64_t columns, double *exact) {
  attn_tensor x;
  assert_ok(attn_tensor_create(dtype, 2, (int64_t[]){rows, columns}, &x));
  attn_random random = {.seed = (uint64_t)(rows + columns)};
  for (int64_t i = 0; i < rows * columns; ++i) {
    float value = attn_bf16_to_f32(attn_f32_to_bf16((float)attn_random_normal(&random)));
    exact[i] = value;
    if (dtype == ATTN_F64) ((double *)x.data)[i] = value;
    if (dtype == ATTN_F32) ((float *)x.data)[i] = value;
    if (dtype == ATTN_BF16) ((uint16_t *)x.data)[i] = attn_f32_to_bf16(value);
  }
  return x;
}

/* y, and the norm that all y have when the signs of their terms are random: one y alone may be
 * small by cancellation. */
static double reference(const double *x, const float *w, int64_t rows, int64_t outputs,
                        int64_t inputs, double *y) {
  double squares = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t o = 0; o < outputs; ++o) {
      double sum = 0;
      for (int64_t i = 0; i < inputs; ++i) {
        double term = x[r * inputs + i] * (double)w[o * inputs + i];
        sum += term;
        squares += term * term;
      }
      y[r * outputs + o] = sum;
    }
  return sqrt(squares);
}

static double error_of(const attn_tensor *found, const double *y, double factor) {
  double *values = test_to_doubles(found), squares = 0;
  for (int64_t i = 0; i < attn_tensor_count(found); ++i)
    squares += (values[i] - factor * y[i]) * (values[i] - factor * y[i]);
  free(values);
  return sqrt(squares);
}

/* Norm of the error over that norm. bfloat16: few rows may be rounded to 8 bits, an error of at
 * most max |x| / 254 an element, evenly spread: about 3.2 / 254 / sqrt(3) of their deviation; many
 * rows meet weights rounded to 2^-9. */
static double tolerance(attn_dtype compute) {
  return compute == ATTN_F64 ? 1e-13 : compute == ATTN_F32 ? 2e-6 : 1.2e-2;
}

static void check_product(const kind *k, attn_dtype compute, int64_t rows, int64_t outputs,
                          int64_t inputs) {
  static double x[MOST_ROWS * MOST_INPUTS], y[MOST_ROWS * MOST_OUTPUTS];
  static float w[MOST_OUTPUTS * MOST_INPUTS];
  unsigned char *blocks = random_blocks(k, outputs * inputs, (uint64_t)(7 * outputs + k->type));
  assert_ok(attn_blocks_to_f32(k->type, blocks, w, outputs * inputs));
  attn_tensor from = random_rows(compute, rows, inputs, x), to;
  attn_dtype wide = compute == ATTN_F64 ? ATTN_F64 : ATTN_F32;
  assert_ok(attn_tensor_create(wide, 2, (int64_t[]){rows, outputs}, &to));
  assert_ok(attn_tensor_fill(&to, NAN));
  attn_weight *weight;
  attn_arena *scratch;
  scratch = attn_arena_create(1 << 16);
  assert_ok(attn_weight_create(outputs, inputs, compute, &weight));
  assert_ok(attn_weight_set_blocks(weight, k->type, blocks));
  assert_null(attn_weight_values(weight).data);
  assert_ok(attn_dense_forward(weight, &from, &to, false, scratch));
  double norm = reference(x, w, rows, outputs, inputs, y);
  for (int factor = 1; factor <= 2; ++factor) { /* then added once more */
    if (factor == 2) assert_ok(attn_dense_forward(weight, &from, &to, true, scratch));
    double error = error_of(&to, y, factor) / (factor * norm);
    if (!(error <= tolerance(compute)))
      fail_msg("%s in %s, %lld x %lld x %lld: error %g", attn_block_get_format(k->type)->name,
               attn_dtype_name(compute), (long long)rows, (long long)outputs, (long long)inputs,
               error);
  }
  attn_weight_destroy(weight);
  attn_arena_destroy(scratch);
  attn_tensor_destroy(&from);
  attn_tensor_destroy(&to);
  free(blocks);
}

static void products_match_float64(void **state) {
  (void)state;
  static const attn_dtype dtypes[] = {ATTN_F64, ATTN_F32, ATTN_BF16};
  static const int64_t rows[] = {1, 3, 8, 9, 40, 130};
  static const int64_t shapes[][2] = {{1, 256}, {33, 512}, {100, 1024}};
  attn_kernel_path before = attn_get_kernel_path();
  for (int path = ATTN_PATH_GENERIC; path <= ATTN_PATH_AMX; ++path) {
    if (!attn_kernel_path_available((attn_kernel_path)path)) continue;
    assert_ok(attn_set_kernel_path((attn_kernel_path)path));
    for (int k = 0; k < KINDS; ++k)
      for (int d = 0; d < 3; ++d)
        for (int r = 0; r < 6; ++r) {
          const int64_t *shape = shapes[(k + r) % 3];
          check_product(&kinds[k], dtypes[d], rows[r], shape[0], shape[1]);
        }
  }
  assert_ok(attn_set_kernel_path(before));
}

/* Integer products are exact: what is left is the order of float32 sums over the blocks. */
static void kernels_equal_their_twins(void **state) {
  (void)state;
  enum { INPUTS = 32 * 21, OUTPUTS = 19, ROWS = 8, BLOCKS = INPUTS / 32 };
  static float x[ROWS * INPUTS], scale[2][ROWS * BLOCKS], sum[2][ROWS * BLOCKS];
  static float y[2][ROWS * OUTPUTS], numbers[2][INPUTS];
  static int8_t q[2][ROWS * INPUTS];
  attn_random random = {.seed = 3};
  for (int i = 0; i < ROWS * INPUTS; ++i) x[i] = (float)attn_random_normal(&random);
  memset(x + 32, 0, 32 * sizeof *x); /* a block of zeros */
  const attn_kernels *generic = attn_kernels_of(ATTN_PATH_GENERIC);
  generic->round_to_8_bits(x, ROWS * INPUTS, q[0], scale[0], sum[0]);
  for (int path = ATTN_PATH_AVX2; path <= ATTN_PATH_AMX; ++path) {
    if (!attn_kernel_path_available((attn_kernel_path)path)) continue;
    const attn_kernels *kernels = attn_kernels_of((attn_kernel_path)path);
    kernels->round_to_8_bits(x, ROWS * INPUTS, q[1], scale[1], sum[1]);
    assert_memory_equal(q[0], q[1], sizeof q[0]);
    assert_memory_equal(scale[0], scale[1], sizeof scale[0]);
    assert_memory_equal(sum[0], sum[1], sizeof sum[0]);
    for (int k = 0; k < 3; ++k)
      for (int rows = 1; rows <= ROWS; ++rows) {
        unsigned char *w = random_blocks(&kinds[k], OUTPUTS * INPUTS, 5);
        for (int i = 0; i < 2; ++i) {
          const attn_kernels *table = i ? kernels : generic;
          (k == 0   ? table->matvec_q8_0
           : k == 1 ? table->matvec_q4_0
                    : table->matvec_q4_1)(rows, OUTPUTS, INPUTS, q[0], scale[0], sum[0], w, y[i],
                                          OUTPUTS);
          (k == 0   ? table->unpack_q8_0
           : k == 1 ? table->unpack_q4_0
                    : table->unpack_q4_1)(w, numbers[i], INPUTS);
        }
        for (int i = 0; i < rows * OUTPUTS; ++i)
          assert_true(fabsf(y[0][i] - y[1][i]) <= 2e-5f * (1 + fabsf(y[0][i])));
        assert_memory_equal(numbers[0], numbers[1], sizeof numbers[0]);
        free(w);
      }
  }
}

static void misuse_is_refused(void **state) {
  (void)state;
  attn_weight *weight;
  static const unsigned char blocks[64];
  assert_ok(attn_weight_create(2, 48, ATTN_F32, &weight));
  assert_int_equal(attn_weight_set_blocks(weight, ATTN_BLOCK_Q8_0, blocks), ATTN_INVALID_SHAPE);
  assert_int_equal(attn_weight_set_blocks(weight, ATTN_BLOCK_IQ1_S, blocks), ATTN_UNSUPPORTED);
  assert_int_equal(attn_weight_set_blocks(weight, ATTN_BLOCK_Q8_0, NULL), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_weight_set_blocks(NULL, ATTN_BLOCK_Q8_0, blocks), ATTN_INVALID_ARGUMENT);
  attn_weight_destroy(weight);
  assert_ok(attn_weight_create(1, 32, ATTN_F32, &weight));
  assert_ok(attn_weight_set_blocks(weight, ATTN_BLOCK_Q8_0, blocks));
  attn_arena *scratch;
  attn_tensor dy, dx;
  scratch = attn_arena_create(1 << 12);
  assert_ok(attn_tensor_create(ATTN_F32, 2, (int64_t[]){9, 1}, &dy));
  assert_ok(attn_tensor_create(ATTN_F32, 2, (int64_t[]){9, 32}, &dx));
  assert_int_equal(attn_dense_backward_input(weight, &dy, &dx, false, scratch), ATTN_UNSUPPORTED);
  attn_tensor_destroy(&dy);
  attn_tensor_destroy(&dx);
  attn_arena_destroy(scratch);
  attn_weight_destroy(weight);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(products_match_float64),
      cmocka_unit_test(kernels_equal_their_twins),
      cmocka_unit_test(misuse_is_refused),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
