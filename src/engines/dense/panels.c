/* Dense products by the tile kernels (kernels/matmul.h): every dtype that computes, every path. The
 * rows and the columns of C are split into tasks that the threads share; each element of C is
 * summed by one thread in one order, so the split does not change a bit. */
#include "engines/dense/product.h"
#include "base/status.h"
#include "kernels/kernels.h"

#include <string.h>

enum {
  PRODUCTS_PER_THREAD = 1 << 20,
  BYTES_PER_THREAD = 256 << 10,
  TASK_ROWS = 64, /* times TASK_COLUMNS: the sums of a task fit the L1 cache */
  TASK_COLUMNS = 8 * ATTN_PANEL,
  PIECE_DEPTH = 512, /* a multiple of ATTN_BF16_DEPTH */
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

/* A part of C: rows [row, row + rows) and columns [column, column + columns). */
typedef struct part {
  int64_t row, rows, column, columns;
} part;

/* One part of the product, in the kernels' result dtype, at c with leading dimension ldc: over
 * pieces of the depth whose A and B stay in the L2 cache while C is added to. */
static void multiply_part(const attn_kernels *kernels, const attn_matrix *a,
                          const attn_packed *packed, const part *p, void *c, int64_t ldc,
                          bool accumulate) {
  int64_t k = packed->k, lda = a->stride[0];
  int64_t panel_stride = packed_depth(k, packed->dtype) * ATTN_PANEL;
  int64_t b_start = p->column / ATTN_PANEL * panel_stride;
  for (int64_t start = 0; start < k; start += PIECE_DEPTH) {
    int64_t depth = min(k - start, PIECE_DEPTH), b = b_start + start * ATTN_PANEL;
    int64_t from = p->row * lda + start;
    bool add = accumulate || start > 0;
    if (packed->dtype == ATTN_F64)
      kernels->matmul_f64(p->rows, p->columns, depth, (const double *)a->data + from, lda,
                          (const double *)packed->data + b, panel_stride, c, ldc, add);
    else if (packed->dtype == ATTN_F32)
      kernels->matmul_f32(p->rows, p->columns, depth, (const float *)a->data + from, lda,
                          (const float *)packed->data + b, panel_stride, c, ldc, add);
    else
      kernels->matmul_bf16(p->rows, p->columns, depth, (const uint16_t *)a->data + from, lda,
                           (const uint16_t *)packed->data + b, panel_stride, c, ldc, add);
  }
}

/* The same into bfloat16: the sums are float32, in a buffer in the first caches, until the one
 * rounding at the end. */
static void multiply_part_rounded(const attn_kernels *kernels, const attn_matrix *a,
                                  const attn_packed *packed, const part *p, uint16_t *c,
                                  int64_t ldc, bool accumulate) {
  float sums[TASK_ROWS * TASK_COLUMNS] __attribute__((aligned(64)));
  for (int64_t i = 0; accumulate && i < p->rows; ++i)
    kernels->bf16_to_f32(sums + i * TASK_COLUMNS, c + i * ldc, p->columns);
  multiply_part(kernels, a, packed, p, sums, TASK_COLUMNS, accumulate);
  for (int64_t i = 0; i < p->rows; ++i)
    kernels->f32_to_bf16(c + i * ldc, sums + i * TASK_COLUMNS, p->columns);
}

/* The part into C, of the kernels' result dtype or rounded. */
static void multiply_into(const attn_kernels *kernels, const attn_matrix *a,
                          const attn_packed *packed, const part *p, const attn_matrix *c,
                          bool accumulate) {
  int64_t ldc = c->stride[0];
  void *to = (char *)c->data + (size_t)(p->row * ldc + p->column) * attn_dtype_size(c->dtype);
  if (c->dtype == ATTN_BF16)
    multiply_part_rounded(kernels, a, packed, p, to, ldc, accumulate);
  else
    multiply_part(kernels, a, packed, p, to, ldc, accumulate);
}

void attn_panels_multiply_here(const attn_matrix *a, const attn_packed *packed,
                               const attn_matrix *c, bool accumulate) {
  const attn_kernels *kernels = attn_kernels_get();
  for (int64_t column = 0; column < packed->n; column += TASK_COLUMNS)
    for (int64_t row = 0; row < a->rows; row += TASK_ROWS) {
      part p = {.row = row, .column = column};
      p.rows = min(a->rows - row, TASK_ROWS);
      p.columns = min(packed->n - column, TASK_COLUMNS);
      multiply_into(kernels, a, packed, &p, c, accumulate);
    }
}

/* All parts. A deep product (a weight's gradient) takes larger ones, where that leaves enough for
 * every thread: A and B are then read fewer times. */
static void multiply_parts(const attn_matrix *a, const attn_packed *packed, const attn_matrix *c,
                           bool accumulate) {
  const attn_kernels *kernels = attn_kernels_get();
  int64_t k = packed->k, n = packed->n, m = a->rows;
  int threads = attn_product_threads(m, n, k);
  bool rounded = packed->dtype == ATTN_BF16 && c->dtype == ATTN_BF16;
  bool deep = !rounded && k > 2 * PIECE_DEPTH;
  bool enough = m * n >= 4 * TASK_ROWS * TASK_COLUMNS * (int64_t)threads;
  int64_t scale = deep && enough ? 2 : 1;
  int64_t part_rows = scale * TASK_ROWS, part_columns = scale * TASK_COLUMNS;
  int64_t down = (m + part_rows - 1) / part_rows, across = (n + part_columns - 1) / part_columns;
#pragma omp parallel num_threads(threads)
  {
    kernels->begin();
#pragma omp for schedule(static)
    for (int64_t task = 0; task < down * across; ++task) {
      part p = {.row = task % down * part_rows, .column = task / down * part_columns};
      p.rows = min(m - p.row, part_rows);
      p.columns = min(n - p.column, part_columns);
      multiply_into(kernels, a, packed, &p, c, accumulate);
    }
    kernels->end();
  }
}

attn_status attn_panels_pad_depth(const attn_matrix *a, attn_matrix *padded, attn_arena *scratch) {
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

static attn_status multiply(const attn_matrix *a, const attn_packed *packed, const attn_matrix *c,
                            bool accumulate, attn_arena *scratch) {
  attn_arena_mark mark = attn_arena_get_mark(scratch);
  attn_matrix padded;
  attn_status status = attn_panels_pad_depth(a, &padded, scratch);
  if (status == ATTN_OK) multiply_parts(&padded, packed, c, accumulate);
  attn_arena_release(scratch, mark);
  return status;
}

const attn_product attn_product_panels = {"panels", true, plan, pack, multiply};
