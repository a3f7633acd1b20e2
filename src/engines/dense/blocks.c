#include "engines/dense/blocks.h"
#include "base/status.h"
#include "kernels/kernels.h"

#include <omp.h>
#include <string.h>

enum {
  BYTES_PER_THREAD = 32 << 10, /* of blocks: what a decode step's thread is worth waking for */
  GRAIN = 16, /* outputs: one cache line of float32 results is written by one thread */
};

static int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}

static int64_t row_bytes(const attn_block_matrix *w) {
  const attn_block_format *format = attn_block_get_format(w->type);
  return w->columns / format->elements * format->bytes;
}

static const char *row_at(const attn_block_matrix *w, int64_t row) {
  return (const char *)w->data + row * row_bytes(w);
}

/* Unpacking --------------------------------------------------------------------------------------
 */

static void unpack_f32(const attn_kernels *kernels, const attn_block_matrix *w, int64_t row,
                       float *x) {
  const char *from = row_at(w, row);
  switch (w->type) {
  case ATTN_BLOCK_Q4_0: kernels->unpack_q4_0(from, x, w->columns); return;
  case ATTN_BLOCK_Q4_1: kernels->unpack_q4_1(from, x, w->columns); return;
  case ATTN_BLOCK_Q8_0: kernels->unpack_q8_0(from, x, w->columns); return;
  default: attn_blocks_to_f32(w->type, from, x, w->columns);
  }
}

/* `wide` has room for a row of float32. */
static void unpack_row(const attn_kernels *kernels, const attn_block_matrix *w, int64_t row,
                       attn_dtype dtype, void *target, float *wide) {
  unpack_f32(kernels, w, row, dtype == ATTN_F32 ? target : wide);
  if (dtype == ATTN_BF16) kernels->f32_to_bf16(target, wide, w->columns);
  for (int64_t i = 0; dtype == ATTN_F64 && i < w->columns; ++i) ((double *)target)[i] = wide[i];
}

attn_status attn_blocks_unpack(const attn_block_matrix *w, attn_dtype dtype, int64_t first,
                               int64_t count, attn_matrix *values, attn_arena *scratch) {
  const attn_kernels *kernels = attn_kernels_get();
  int64_t size = (int64_t)attn_dtype_size(dtype), columns = w->columns;
  int threads = attn_pass_threads(count * columns * size);
  char *data = attn_arena_alloc(scratch, (size_t)(count * columns * size));
  float *wide = attn_arena_alloc(scratch, (size_t)(threads * columns) * sizeof *wide);
  if (!data || !wide) return ATTN_OUT_OF_MEMORY;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < count; ++r)
    unpack_row(kernels, w, first + r, dtype, data + r * columns * size,
               wide + omp_get_thread_num() * columns);
  *values = (attn_matrix){
      .data = data, .dtype = dtype, .rows = count, .columns = columns, .stride = {columns, 1}};
  return ATTN_OK;
}

/* A few rows -------------------------------------------------------------------------------------
 */

/* One product, its outputs shared among threads. */
typedef struct few_rows {
  const attn_kernels *kernels;
  const attn_block_matrix *w;
  const attn_matrix *x, *y;
  int8_t *q; /* x in 8 bits; NULL: it stays as it is */
  float *scale, *sum;
  char *rows; /* for each thread GRAIN unpacked rows */
  float *wide;
} few_rows;

static void multiply_rounded(const few_rows *f, int64_t first, int64_t count) {
  float *y = (float *)f->y->data + first;
  const void *w = row_at(f->w, first);
  int64_t rows = f->x->rows, inputs = f->w->columns, ldy = f->y->stride[0];
  switch (f->w->type) {
  case ATTN_BLOCK_Q4_0:
    f->kernels->matvec_q4_0(rows, count, inputs, f->q, f->scale, f->sum, w, y, ldy);
    return;
  case ATTN_BLOCK_Q4_1:
    f->kernels->matvec_q4_1(rows, count, inputs, f->q, f->scale, f->sum, w, y, ldy);
    return;
  default: f->kernels->matvec_q8_0(rows, count, inputs, f->q, f->scale, f->sum, w, y, ldy);
  }
}

static bool has_rounded_product(attn_block_type type) {
  return type == ATTN_BLOCK_Q4_0 || type == ATTN_BLOCK_Q4_1 || type == ATTN_BLOCK_Q8_0;
}

static void multiply_f64(const few_rows *f, const double *w, int64_t first, int64_t count) {
  int64_t inputs = f->w->columns;
  for (int64_t o = 0; o < count; ++o)
    for (int64_t r = 0; r < f->x->rows; ++r) {
      const double *x = (const double *)f->x->data + r * f->x->stride[0];
      double sum = 0;
      for (int64_t i = 0; i < inputs; ++i) sum += x[i] * w[o * inputs + i];
      ((double *)f->y->data)[r * f->y->stride[0] + first + o] = sum;
    }
}

static void multiply_unpacked(const few_rows *f, int64_t first, int64_t count) {
  int64_t inputs = f->w->columns, thread = omp_get_thread_num();
  attn_dtype dtype = f->x->dtype;
  int64_t size = (int64_t)attn_dtype_size(dtype);
  char *rows = f->rows + thread * GRAIN * inputs * size;
  for (int64_t o = 0; o < count; ++o)
    unpack_row(f->kernels, f->w, first + o, dtype, rows + o * inputs * size,
               f->wide + thread * inputs);
  if (dtype == ATTN_F64)
    multiply_f64(f, (const double *)rows, first, count);
  else
    f->kernels->matvec_f32(f->x->rows, count, inputs, f->x->data, f->x->stride[0],
                           (const float *)rows, inputs, (float *)f->y->data + first,
                           f->y->stride[0]);
}

static attn_status round_rows(few_rows *f, attn_arena *scratch) {
  int64_t rows = f->x->rows, inputs = f->w->columns, blocks = inputs / ATTN_BLOCK_ELEMENTS;
  f->q = attn_arena_alloc(scratch, (size_t)(rows * inputs));
  f->scale = attn_arena_alloc(scratch, (size_t)(rows * blocks) * sizeof *f->scale);
  f->sum = attn_arena_alloc(scratch, (size_t)(rows * blocks) * sizeof *f->sum);
  if (!f->q || !f->scale || !f->sum) return ATTN_OUT_OF_MEMORY;
  for (int64_t r = 0; r < rows; ++r)
    f->kernels->round_to_8_bits((const float *)f->x->data + r * f->x->stride[0], inputs,
                                f->q + r * inputs, f->scale + r * blocks, f->sum + r * blocks);
  return ATTN_OK;
}

static attn_status make_room(few_rows *f, int threads, attn_arena *scratch) {
  size_t elements = (size_t)f->w->columns * (size_t)threads;
  f->rows = attn_arena_alloc(scratch, GRAIN * elements * attn_dtype_size(f->x->dtype));
  f->wide = attn_arena_alloc(scratch, elements * sizeof *f->wide);
  return f->rows && f->wide ? ATTN_OK : ATTN_OUT_OF_MEMORY;
}

attn_status attn_blocks_few_rows(const attn_block_matrix *w, attn_dtype compute,
                                 const attn_matrix *x, const attn_matrix *y, attn_arena *scratch) {
  few_rows f = {.kernels = attn_kernels_get(), .w = w, .x = x, .y = y};
  int threads = (int)min(attn_get_threads(), w->rows * row_bytes(w) / BYTES_PER_THREAD + 1);
  bool rounded = compute == ATTN_BF16 && has_rounded_product(w->type);
  ATTN_TRY(rounded ? round_rows(&f, scratch) : make_room(&f, threads, scratch));
  int64_t share = rounded ? (w->rows + threads - 1) / threads : GRAIN;
  share = (share + GRAIN - 1) / GRAIN * GRAIN;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t first = 0; first < w->rows; first += share)
    (rounded ? multiply_rounded : multiply_unpacked)(&f, first, min(share, w->rows - first));
  return ATTN_OK;
}
