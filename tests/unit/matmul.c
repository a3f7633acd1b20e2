/* Packing and tile products of every path against float64 sums of the same rounded numbers. */
#include "support/test.h"

#include "base/memory.h"
#include "base/random.h"
#include "kernels/kernels.h"

#include <float.h>
#include <math.h>
#include <string.h>

/* Products of k terms summed in float32: the error of a sum of k rounded terms is at most k * 2^-24
 * of the sum of the terms' magnitudes; 2 covers the products' own rounding. bfloat16 inputs are
 * exact in float32, so the same bound holds for them. */
static double bound(int64_t k, double magnitude) {
  return 2 * (double)k * (FLT_EPSILON / 2) * magnitude + FLT_MIN;
}

typedef struct sizes {
  int64_t m, n, k;
} sizes;

static const sizes cases[] = {
    {1, 1, 1},   {1, 16, 32},  {3, 5, 7},     {16, 16, 32},  {17, 33, 31},  {12, 48, 64},
    {13, 15, 1}, {31, 17, 33}, {32, 32, 64},  {47, 31, 65},  {64, 64, 128}, {33, 100, 63},
    {5, 96, 96}, {48, 20, 95}, {100, 64, 48}, {19, 127, 80}, {2, 300, 256}, {63, 129, 200},
};

static double value_of(const void *x, attn_dtype dtype, int64_t index) {
  return dtype == ATTN_F64   ? ((const double *)x)[index]
         : dtype == ATTN_F32 ? (double)((const float *)x)[index]
                             : (double)attn_bf16_to_f32(((const uint16_t *)x)[index]);
}

static void set_value(void *x, attn_dtype dtype, int64_t index, double value) {
  if (dtype == ATTN_F64) ((double *)x)[index] = value;
  if (dtype == ATTN_F32) ((float *)x)[index] = (float)value;
  if (dtype == ATTN_BF16) ((uint16_t *)x)[index] = attn_f32_to_bf16((float)value);
}

/* C of bfloat16 products is float32. */
static attn_dtype result_dtype(attn_dtype dtype) {
  return dtype == ATTN_BF16 ? ATTN_F32 : dtype;
}

static void pack(const attn_kernels *kernels, attn_dtype dtype, void *packed, int64_t stride,
                 const void *source, sizes size, int64_t stride_k, int64_t stride_n) {
  if (dtype == ATTN_F64)
    kernels->pack_f64(packed, stride, source, size.k, size.n, stride_k, stride_n);
  if (dtype == ATTN_F32)
    kernels->pack_f32(packed, stride, source, size.k, size.n, stride_k, stride_n);
  if (dtype == ATTN_BF16)
    kernels->pack_bf16(packed, stride, source, size.k, size.n, stride_k, stride_n);
}

static void multiply(const attn_kernels *kernels, attn_dtype dtype, sizes size, const void *a,
                     int64_t lda, const void *b, int64_t stride, void *c, int64_t ldc,
                     bool accumulate) {
  if (dtype == ATTN_F64)
    kernels->matmul_f64(size.m, size.n, size.k, a, lda, b, stride, c, ldc, accumulate);
  if (dtype == ATTN_F32)
    kernels->matmul_f32(size.m, size.n, size.k, a, lda, b, stride, c, ldc, accumulate);
  if (dtype == ATTN_BF16)
    kernels->matmul_bf16(size.m, size.n, size.k, a, lda, b, stride, c, ldc, accumulate);
}

/* Memory of exactly the documented size, so that the sanitizers see a step too far. */
static void *exact(int64_t count, attn_dtype dtype) {
  return calloc((size_t)count, attn_dtype_size(dtype));
}

static void check(const attn_kernels *kernels, attn_dtype dtype, sizes size, bool transposed,
                  bool accumulate, attn_random *random) {
  enum { GUARD = 12345 };
  int64_t depth = dtype == ATTN_BF16 ? attn_packed_depth_bf16(size.k) : size.k;
  int64_t lda = depth + 3, ldb = (transposed ? size.k : size.n) + 2, ldc = size.n + 5;
  int64_t stride = (depth + 32) * ATTN_PANEL;
  int64_t b_rows = transposed ? size.n : size.k, b_columns = transposed ? size.k : size.n;
  void *a = exact(size.m * lda, dtype), *b = exact((b_rows - 1) * ldb + b_columns, dtype);
  void *packed = exact((attn_panels(size.n) - 1) * stride + depth * ATTN_PANEL, dtype);
  void *c = exact(size.m * ldc, result_dtype(dtype));
  void *before = exact(size.m * ldc, result_dtype(dtype));
  for (int64_t i = 0; i < size.m * lda; ++i)
    set_value(a, dtype, i, attn_random_normal(random)); /* also beyond k: must not matter */
  for (int64_t i = 0; i < (b_rows - 1) * ldb + b_columns; ++i)
    set_value(b, dtype, i, attn_random_normal(random));
  for (int64_t i = 0; i < size.m * ldc; ++i)
    set_value(c, result_dtype(dtype), i,
              i % ldc >= size.n ? GUARD
              : accumulate      ? attn_random_normal(random)
                                : NAN);
  memcpy(before, c, (size_t)(size.m * ldc) * attn_dtype_size(result_dtype(dtype)));

  int64_t stride_k = transposed ? 1 : ldb, stride_n = transposed ? ldb : 1;
  pack(kernels, dtype, packed, stride, b, size, stride_k, stride_n);
  kernels->begin();
  multiply(kernels, dtype, size, a, lda, packed, stride, c, ldc, accumulate);
  kernels->end();

  for (int64_t i = 0; i < size.m; ++i)
    for (int64_t j = 0; j < ldc; ++j) {
      double got = value_of(c, result_dtype(dtype), i * ldc + j);
      if (j >= size.n) {
        assert_true(got == GUARD);
        continue;
      }
      double want = accumulate ? value_of(before, result_dtype(dtype), i * ldc + j) : 0;
      double magnitude = fabs(want);
      for (int64_t r = 0; r < size.k; ++r) {
        double term =
            value_of(a, dtype, i * lda + r) * value_of(b, dtype, r * stride_k + j * stride_n);
        want += term;
        magnitude += fabs(term);
      }
      if (!(fabs(got - want) <= bound(size.k + 1, magnitude)))
        fail_msg("%s %s m %d n %d k %d, c[%d][%d] is %.9g, not %.9g",
                 attn_kernel_path_name(kernels->path), attn_dtype_name(dtype), (int)size.m,
                 (int)size.n, (int)size.k, (int)i, (int)j, got, want);
    }
  free(a);
  free(b);
  free(packed);
  free(c);
  free(before);
}

static void check_dtype(attn_dtype dtype) {
  attn_random random = {.seed = 11, .stream = dtype};
  for (int path = 0; path < ATTN_PATH_COUNT; ++path) {
    if (!attn_kernel_path_available((attn_kernel_path)path)) continue;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i)
      for (int options = 0; options < 4; ++options)
        check(attn_kernels_of((attn_kernel_path)path), dtype, cases[i], options & 1, options & 2,
              &random);
  }
}

static void products_f64(void **state) {
  (void)state;
  check_dtype(ATTN_F64);
}

static void products_f32(void **state) {
  (void)state;
  check_dtype(ATTN_F32);
}

static void products_bf16(void **state) {
  (void)state;
  check_dtype(ATTN_BF16);
}

/* All paths pack into the same bits, zeros included. */
static void packing_agrees(void **state) {
  (void)state;
  enum { MAX = 90, LD = 97 };
  uint16_t source[MAX * LD], want[MAX * 2 * MAX * 2], got[MAX * 2 * MAX * 2];
  attn_random random = {.seed = 5};
  for (int i = 0; i < MAX * LD; ++i) source[i] = (uint16_t)attn_random_u32(&random);
  for (int path = 0; path < ATTN_PATH_COUNT; ++path) {
    if (!attn_kernel_path_available((attn_kernel_path)path)) continue;
    for (int64_t size = 1; size < MAX; size += 4)
      for (int transposed = 0; transposed < 2; ++transposed) {
        sizes shape = {.n = size, .k = MAX - size};
        int64_t stride = attn_packed_depth_bf16(shape.k) * ATTN_PANEL;
        memset(want, 0x7f, sizeof want);
        memset(got, 0x7f, sizeof got);
        pack(attn_kernels_of(ATTN_PATH_GENERIC), ATTN_BF16, want, stride, source, shape,
             transposed ? 1 : LD, transposed ? LD : 1);
        pack(attn_kernels_of((attn_kernel_path)path), ATTN_BF16, got, stride, source, shape,
             transposed ? 1 : LD, transposed ? LD : 1);
        assert_memory_equal(got, want, sizeof got);
      }
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(products_f64), cmocka_unit_test(products_f32),
                                     cmocka_unit_test(products_bf16),
                                     cmocka_unit_test(packing_agrees)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
