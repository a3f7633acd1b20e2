/* Dense products by the tile kernels (kernels/matmul.h): every dtype that computes, every path. The
 * rows and the panels of C are split into tasks that the threads share; each element of C is summed
 * by one kernel call, so the split does not change a bit. */
#include "engines/dense/product.h"
#include "base/status.h"
#include "kernels/kernels.h"

#include <string.h>

enum {
  PRODUCTS_PER_THREAD = 1 << 20,
  BYTES_PER_THREAD = 256 << 10,
  TASK_ROWS = 64,  /* times TASK_PANELS * 16 columns: a task's part of C fits the L1 cache */
  TASK_PANELS = 8, /* and its part of B, for k about 1000, the L2 cache */
};

static int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}

static int threads_for(double work, double work_per_thread) {
  double useful = work / work_per_thread, all = attn_get_threads();
  return useful < 1 ? 1 : (int)(useful < all ? useful : all);
}

int attn_product_threads(int64_t m, int64_t n, int64_t k) {
  return threads_for((double)m * (double)n * (double)k, PRODUCTS_PER_THREAD);
}

int attn_pass_threads(int64_t bytes) {
  return threads_for((double)bytes, BYTES_PER_THREAD);
}

static int64_t packed_depth(int64_t k, attn_dtype dtype) {
  return dtype == ATTN_BF16 ? attn_packed_depth_bf16(k) : k;
}

static bool plan(int64_t m, int64_t k, int64_t n, attn_dtype dtype, attn_packed *packed) {
  (void)m;
  int64_t elements = packed_depth(k, dtype) * attn_panels(n) * ATTN_PANEL;
  *packed = (attn_packed){.product = &attn_product_panels,
                          .bytes = (size_t)elements * attn_dtype_size(dtype),
                          .k = k,
                          .n = n,
                          .dtype = dtype};
  return true;
}

static attn_status pack(const attn_packed *packed, const attn_matrix *b) {
  const attn_kernels *kernels = attn_kernels_get();
  int64_t k = packed->k, n = packed->n, stride_k = b->stride[0], stride_n = b->stride[1];
  int64_t panel_stride = packed_depth(k, packed->dtype) * ATTN_PANEL;
  size_t size = attn_dtype_size(packed->dtype);
#pragma omp parallel for num_threads(attn_pass_threads((int64_t)packed->bytes)) schedule(static)
  for (int64_t panel = 0; panel < attn_panels(n); ++panel) {
    void *target = (char *)packed->data + (size_t)(panel * panel_stride) * size;
    const void *source = (const char *)b->data + panel * ATTN_PANEL * stride_n * (int64_t)size;
    int64_t columns = min(n - panel * ATTN_PANEL, ATTN_PANEL);
    if (packed->dtype == ATTN_F64)
      kernels->pack_f64(target, panel_stride, source, k, columns, stride_k, stride_n);
    else if (packed->dtype == ATTN_F32)
      kernels->pack_f32(target, panel_stride, source, k, columns, stride_k, stride_n);
    else
      kernels->pack_bf16(target, panel_stride, source, k, columns, stride_k, stride_n);
  }
  return ATTN_OK;
}

/* The tasks of one product into a C of the kernels' result dtype. */
static void multiply_tasks(const attn_matrix *a, const attn_packed *packed, void *c, int64_t ldc,
                           bool accumulate) {
  const attn_kernels *kernels = attn_kernels_get();
  int64_t k = packed->k, n = packed->n, m = a->rows, lda = a->stride[0];
  int64_t panel_stride = packed_depth(k, packed->dtype) * ATTN_PANEL;
  int64_t row_tasks = (m + TASK_ROWS - 1) / TASK_ROWS;
  int64_t column_tasks = (attn_panels(n) + TASK_PANELS - 1) / TASK_PANELS;
#pragma omp parallel num_threads(attn_product_threads(m, n, k))
  {
    kernels->begin();
#pragma omp for schedule(static)
    for (int64_t task = 0; task < row_tasks * column_tasks; ++task) {
      int64_t row = task % row_tasks * TASK_ROWS, panel = task / row_tasks * TASK_PANELS;
      int64_t column = panel * ATTN_PANEL;
      int64_t rows = min(m - row, TASK_ROWS), columns = min(n - column, TASK_PANELS * ATTN_PANEL);
      if (packed->dtype == ATTN_F64)
        kernels->matmul_f64(rows, columns, k, (const double *)a->data + row * lda, lda,
                            (const double *)packed->data + panel * panel_stride, panel_stride,
                            (double *)c + row * ldc + column, ldc, accumulate);
      else if (packed->dtype == ATTN_F32)
        kernels->matmul_f32(rows, columns, k, (const float *)a->data + row * lda, lda,
                            (const float *)packed->data + panel * panel_stride, panel_stride,
                            (float *)c + row * ldc + column, ldc, accumulate);
      else
        kernels->matmul_bf16(rows, columns, k, (const uint16_t *)a->data + row * lda, lda,
                             (const uint16_t *)packed->data + panel * panel_stride, panel_stride,
                             (float *)c + row * ldc + column, ldc, accumulate);
    }
    kernels->end();
  }
}

/* The bfloat16 kernels read A up to the next multiple of 32 columns: a copy padded with zeros. */
static attn_status pad_depth(const attn_matrix *a, attn_matrix *padded, attn_arena *scratch) {
  int64_t depth = packed_depth(a->columns, a->dtype);
  *padded = *a;
  if (depth == a->columns) return ATTN_OK;
  padded->stride[0] = depth;
  padded->data = attn_arena_alloc_zero(scratch, (size_t)(a->rows * depth) * sizeof(uint16_t));
  if (!padded->data) return ATTN_OUT_OF_MEMORY;
  for (int64_t i = 0; i < a->rows; ++i)
    memcpy((uint16_t *)padded->data + i * depth, (const uint16_t *)a->data + i * a->stride[0],
           (size_t)a->columns * sizeof(uint16_t));
  return ATTN_OK;
}

/* C bfloat16: the sum is float32 until the one rounding at the end. */
static attn_status multiply_rounded(const attn_matrix *a, const attn_packed *packed,
                                    const attn_matrix *c, bool accumulate, attn_arena *scratch) {
  const attn_kernels *kernels = attn_kernels_get();
  int64_t n = packed->n;
  float *sums = attn_arena_alloc(scratch, (size_t)(a->rows * n) * sizeof(float));
  if (!sums) return ATTN_OUT_OF_MEMORY;
  uint16_t *rounded = c->data;
  if (accumulate) kernels->bf16_to_f32(sums, rounded, a->rows * n);
  multiply_tasks(a, packed, sums, n, accumulate);
  kernels->f32_to_bf16(rounded, sums, a->rows * n);
  return ATTN_OK;
}

static attn_status multiply(const attn_matrix *a, const attn_packed *packed, const attn_matrix *c,
                            bool accumulate, attn_arena *scratch) {
  attn_arena_mark mark = attn_arena_get_mark(scratch);
  attn_matrix padded;
  attn_status status = pad_depth(a, &padded, scratch);
  if (status == ATTN_OK && c->dtype == ATTN_BF16)
    status = multiply_rounded(&padded, packed, c, accumulate, scratch);
  else if (status == ATTN_OK)
    multiply_tasks(&padded, packed, c->data, c->stride[0], accumulate);
  attn_arena_release(scratch, mark);
  return status;
}

const attn_product attn_product_panels = {"panels", plan, pack, multiply};
