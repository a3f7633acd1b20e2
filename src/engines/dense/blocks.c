/* Dense products with quantised weights, which stay as a GGUF file, or float8 as
 * safetensors, has them. W is dequantised a few
 * panels at a time into the caches of the thread that multiplies them, and the next ones take their
 * place: memory holds the blocks and one such group for each thread.
 *
 * Threads share out columns of the result, so that each element is summed by one thread in one
 * order. The values of W are those of attn_blocks_to_f32, rounded at most to the compute dtype. */
#include "engines/dense/product.h"
#include "base/status.h"
#include "kernels/kernels.h"

#include <string.h>

enum {
  /* Outputs whose rows of W a thread holds dequantised. More read X fewer times; 64 rows of some
   * thousand bfloat16 are half of an L2 cache. */
  GROUP_OUTPUTS = 4 * ATTN_PANEL,
  PIECE_INPUTS = 512, /* of a panel on its way: a multiple of every block and of ATTN_BF16_DEPTH */
  /* Rows a power of two apart would fall on the same lines of the L1 cache. */
  PIECE_STRIDE = PIECE_INPUTS + 16,
  /* The gradient's group: columns are a multiple of every block. */
  GROUP_INPUTS = 256,
  PIECE_OUTPUTS = 128,
  /* A decode step's thread is worth waking (some microseconds) for this much of W, dequantised or
   * in place. */
  MATVEC_ELEMENTS_PER_THREAD = 32 << 10,
  ROUNDED_ELEMENTS_PER_THREAD = 96 << 10,
  MATVEC_GRAIN = 16, /* outputs: a cache line of float32 has one writer */
};

static int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}

static int64_t round_up(int64_t a, int64_t multiple) {
  return (a + multiple - 1) / multiple * multiple;
}

static void *element_of(const attn_matrix *matrix, int64_t row, int64_t column) {
  int64_t place = row * matrix->stride[0] + column;
  return (char *)matrix->data + place * (int64_t)attn_dtype_size(matrix->dtype);
}

static const void *block_of(const attn_block_matrix *w, int64_t output, int64_t input) {
  const attn_block_format *format = attn_block_get_format(w->type);
  int64_t place = (output * w->inputs + input) / format->elements;
  return (const char *)w->data + place * format->bytes;
}

/* float8, each number times the scale of its part of the row. */
static void read_scaled(const attn_kernels *kernels, const attn_block_matrix *w, int64_t output,
                        int64_t first, int64_t count, float *target) {
  int64_t step = w->scale_inputs, end = first + count;
  const float *scales = w->scales + output / w->scale_outputs * ((w->inputs + step - 1) / step);
  const uint8_t *source = (const uint8_t *)w->data + output * w->inputs;
  for (int64_t i = first, next; i < end; i = next) {
    next = min((i / step + 1) * step, end);
    kernels->f8_e4m3_to_f32(target + i - first, source + i, scales[i / step], next - i);
  }
}

/* W[output][first .. first + count], `first` and `count` whole blocks. */
static void read_row(const attn_kernels *kernels, const attn_block_matrix *w, int64_t output,
                     int64_t first, int64_t count, float *target) {
  if (w->scales) {
    read_scaled(kernels, w, output, first, count, target);
    return;
  }
  const void *source = block_of(w, output, first);
  bool aligned = (uintptr_t)source % sizeof(uint16_t) == 0; /* the kernels want what a file has */
  switch (w->type) {
#define CASE(name, TYPE)                                                                           \
  case ATTN_BLOCK_##TYPE: kernels->name##_to_f32(target, source, count); return;
    ATTN_BLOCKS_TYPES(CASE)
    ATTN_BLOCKS_TYPES_TO_F32(CASE)
#undef CASE
  case ATTN_BLOCK_F8_E4M3: kernels->f8_e4m3_to_f32(target, source, 1, count); return;
  case ATTN_BLOCK_F16:
    if (aligned) {
      kernels->f16_to_f32(target, source, count);
      return;
    }
    break;
  case ATTN_BLOCK_BF16:
    if (aligned) {
      kernels->bf16_to_f32(target, source, count);
      return;
    }
    break;
  default: break;
  }
  (void)attn_blocks_to_f32(w->type, source, target, count); /* cannot fail: checked by set */
}

/* --- Groups ----------------------------------------------------------------------------------- */

/* What a thread works with, in its part of the scratch memory. */
typedef struct workspace {
  float *values;   /* dequantised, row-major */
  void *converted; /* the same in the compute dtype; `values` itself for float32 */
  void *packed;    /* panels */
  float *sums;     /* of a result that is rounded to bfloat16, where they take several steps */
} workspace;

/* Elements of the above. */
typedef struct group_size {
  int64_t values, packed, sums;
} group_size;

static size_t workspace_bytes(const group_size *size, attn_dtype dtype) {
  int64_t element = (int64_t)attn_dtype_size(dtype);
  int64_t converted = dtype == ATTN_F32 ? 0 : size->values * element;
  return (size_t)(round_up(size->values * 4, ATTN_ALIGNMENT) + round_up(converted, ATTN_ALIGNMENT) +
                  round_up(size->packed * element, ATTN_ALIGNMENT) +
                  round_up(size->sums * 4, ATTN_ALIGNMENT));
}

static workspace workspace_at(void *memory, const group_size *size, attn_dtype dtype) {
  int64_t element = (int64_t)attn_dtype_size(dtype);
  char *next = memory;
  workspace space = {.values = (float *)next, .converted = next};
  next += round_up(size->values * 4, ATTN_ALIGNMENT);
  if (dtype != ATTN_F32) {
    space.converted = next;
    next += round_up(size->values * element, ATTN_ALIGNMENT);
  }
  space.packed = next;
  next += round_up(size->packed * element, ATTN_ALIGNMENT);
  space.sums = (float *)next;
  return space;
}

/* Dequantises count outputs x inputs of W into rows `stride` apart, in dtype. */
static void convert(const attn_kernels *kernels, const attn_block_matrix *w, int64_t output,
                    int64_t outputs, int64_t input, int64_t inputs, int64_t stride,
                    attn_dtype dtype, const workspace *space) {
  for (int64_t o = 0; o < outputs; ++o) {
    float *values = space->values + o * stride;
    read_row(kernels, w, output + o, input, inputs, values);
    if (dtype == ATTN_BF16)
      kernels->f32_to_bf16((uint16_t *)space->converted + o * stride, values, inputs);
    for (int64_t i = 0; dtype == ATTN_F64 && i < inputs; ++i)
      ((double *)space->converted)[o * stride + i] = (double)values[i];
  }
}

/* Packs `converted` as B[k, n], one of whose strides is 1, from element `to` of the panels on. */
static void pack(const attn_kernels *kernels, const workspace *space, attn_dtype dtype, int64_t to,
                 int64_t panel_stride, int64_t k, int64_t n, int64_t stride_k, int64_t stride_n) {
  if (dtype == ATTN_F64)
    kernels->pack_f64((double *)space->packed + to, panel_stride, space->converted, k, n, stride_k,
                      stride_n);
  else if (dtype == ATTN_F32)
    kernels->pack_f32((float *)space->packed + to, panel_stride, space->converted, k, n, stride_k,
                      stride_n);
  else
    kernels->pack_bf16((uint16_t *)space->packed + to, panel_stride, space->converted, k, n,
                       stride_k, stride_n);
}

/* Of B[k, n], in panels. */
static attn_packed panels_of(const workspace *space, int64_t k, int64_t n, attn_dtype dtype) {
  attn_packed packed;
  attn_product_panels.plan(1, k, n, dtype, &packed);
  packed.data = space->packed;
  return packed;
}

/* X or dY as the product takes it. Without AMX the float32 tiles are faster than those of bfloat16
 * (docs/performance-log.md), and W, which is dequantised to float32, need not be rounded. */
static attn_status prepare_left(const attn_matrix *x, attn_matrix *left, attn_arena *scratch) {
  if (x->dtype != ATTN_BF16 || attn_get_kernel_path() == ATTN_PATH_AMX)
    return attn_panels_pad_depth(x, left, scratch);
  const attn_kernels *kernels = attn_kernels_get();
  int64_t rows = x->rows, columns = x->columns, bytes = rows * columns * (int64_t)sizeof(float);
  *left = (attn_matrix){.data = attn_arena_alloc(scratch, (size_t)bytes),
                        .dtype = ATTN_F32,
                        .rows = rows,
                        .columns = columns,
                        .stride = {columns, 1}};
  if (!left->data) return ATTN_OUT_OF_MEMORY;
#pragma omp parallel for num_threads(attn_pass_threads(bytes)) schedule(static)
  for (int64_t r = 0; r < rows; ++r)
    kernels->bf16_to_f32(element_of(left, r, 0), element_of(x, r, 0), columns);
  return ATTN_OK;
}

/* --- Y (+)= X W^T ----------------------------------------------------------------------------- */

static int64_t packed_depth(int64_t k, attn_dtype dtype) {
  return dtype == ATTN_BF16 ? attn_packed_depth_bf16(k) : k;
}

/* The rows first .. first + outputs of W as panels of W^T [inputs, outputs]. */
static attn_packed read_outputs(const attn_kernels *kernels, const attn_block_matrix *w,
                                int64_t first, int64_t outputs, attn_dtype dtype,
                                const workspace *space) {
  int64_t panel_stride = packed_depth(w->inputs, dtype) * ATTN_PANEL;
  for (int64_t o = 0; o < outputs; o += ATTN_PANEL)
    for (int64_t i = 0; i < w->inputs; i += PIECE_INPUTS) {
      int64_t columns = min(outputs - o, ATTN_PANEL), depth = min(w->inputs - i, PIECE_INPUTS);
      convert(kernels, w, first + o, columns, i, depth, PIECE_STRIDE, dtype, space);
      pack(kernels, space, dtype, o / ATTN_PANEL * panel_stride + i * ATTN_PANEL, panel_stride,
           depth, columns, 1, PIECE_STRIDE);
    }
  return panels_of(space, w->inputs, outputs, dtype);
}

/* The columns of Y that a group gives. */
static attn_matrix columns_of(const attn_matrix *matrix, int64_t first, int64_t count) {
  attn_matrix columns = *matrix;
  columns.data = element_of(matrix, 0, first);
  columns.columns = count;
  return columns;
}

/* Outputs of a group: fewer where there would not be one for each thread. */
static int64_t group_outputs(int64_t outputs, int threads) {
  int64_t group = GROUP_OUTPUTS;
  while (group > ATTN_PANEL && outputs < group * threads) group /= 2;
  return group;
}

attn_status attn_blocks_forward(const attn_block_matrix *w, const attn_matrix *x,
                                const attn_matrix *y, bool accumulate, attn_arena *scratch) {
  attn_matrix a;
  ATTN_TRY(prepare_left(x, &a, scratch));
  attn_dtype dtype = a.dtype;
  int threads = attn_product_threads(x->rows, w->outputs, w->inputs);
  int64_t step = group_outputs(w->outputs, threads);
  int64_t groups = (w->outputs + step - 1) / step;
  threads = (int)min(threads, groups);
  group_size size = {.values = ATTN_PANEL * PIECE_STRIDE,
                     .packed = packed_depth(w->inputs, dtype) * step};
  size_t bytes = workspace_bytes(&size, dtype);
  char *memory = attn_arena_alloc(scratch, (size_t)threads * bytes);
  if (!memory) return ATTN_OUT_OF_MEMORY;
  const attn_kernels *kernels = attn_kernels_get();
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; ++t) {
    workspace space = workspace_at(memory + (size_t)t * bytes, &size, dtype);
    kernels->begin();
    for (int64_t g = t; g < groups; g += threads) {
      int64_t first = g * step, outputs = min(w->outputs - first, step);
      attn_packed packed = read_outputs(kernels, w, first, outputs, dtype, &space);
      attn_matrix c = columns_of(y, first, outputs);
      attn_panels_multiply_here(&a, &packed, &c, accumulate);
    }
    kernels->end();
  }
  return ATTN_OK;
}

/* --- dX (+)= dY W ----------------------------------------------------------------------------- */

/* dX's columns first .. first + inputs into c: over pieces of the outputs, which are the depth. */
static void multiply_inputs(const attn_kernels *kernels, const attn_block_matrix *w,
                            const attn_matrix *dy, int64_t first, int64_t inputs,
                            const attn_matrix *c, bool accumulate, const workspace *space) {
  for (int64_t o = 0; o < w->outputs; o += PIECE_OUTPUTS) {
    int64_t depth = min(w->outputs - o, PIECE_OUTPUTS);
    int64_t panel_stride = packed_depth(depth, dy->dtype) * ATTN_PANEL;
    convert(kernels, w, o, depth, first, inputs, GROUP_INPUTS, dy->dtype, space);
    pack(kernels, space, dy->dtype, 0, panel_stride, depth, inputs, GROUP_INPUTS, 1);
    attn_packed packed = panels_of(space, depth, inputs, dy->dtype);
    attn_matrix a = columns_of(dy, o, depth);
    attn_panels_multiply_here(&a, &packed, c, accumulate || o > 0);
  }
}

/* The same into bfloat16, which is rounded once, after all pieces. */
static void multiply_inputs_rounded(const attn_kernels *kernels, const attn_block_matrix *w,
                                    const attn_matrix *dy, int64_t first, int64_t inputs,
                                    const attn_matrix *c, bool accumulate, const workspace *space) {
  attn_matrix sums = {.data = space->sums,
                      .dtype = ATTN_F32,
                      .rows = c->rows,
                      .columns = inputs,
                      .stride = {GROUP_INPUTS, 1}};
  for (int64_t r = 0; accumulate && r < c->rows; ++r)
    kernels->bf16_to_f32(element_of(&sums, r, 0), element_of(c, r, 0), inputs);
  multiply_inputs(kernels, w, dy, first, inputs, &sums, accumulate, space);
  for (int64_t r = 0; r < c->rows; ++r)
    kernels->f32_to_bf16(element_of(c, r, 0), element_of(&sums, r, 0), inputs);
}

attn_status attn_blocks_backward_input(const attn_block_matrix *w, const attn_matrix *dy,
                                       const attn_matrix *dx, bool accumulate,
                                       attn_arena *scratch) {
  attn_matrix a;
  ATTN_TRY(prepare_left(dy, &a, scratch));
  attn_dtype dtype = a.dtype;
  int64_t groups = (w->inputs + GROUP_INPUTS - 1) / GROUP_INPUTS;
  int threads = (int)min(attn_product_threads(dy->rows, w->inputs, w->outputs), groups);
  group_size size = {.values = PIECE_OUTPUTS * GROUP_INPUTS,
                     .packed = PIECE_OUTPUTS * GROUP_INPUTS,
                     .sums = dx->dtype == ATTN_BF16 ? dx->rows * GROUP_INPUTS : 0};
  size_t bytes = workspace_bytes(&size, dtype);
  char *memory = attn_arena_alloc(scratch, (size_t)threads * bytes);
  if (!memory) return ATTN_OUT_OF_MEMORY;
  const attn_kernels *kernels = attn_kernels_get();
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; ++t) {
    workspace space = workspace_at(memory + (size_t)t * bytes, &size, dtype);
    kernels->begin();
    for (int64_t g = t; g < groups; g += threads) {
      int64_t first = g * GROUP_INPUTS, inputs = min(w->inputs - first, GROUP_INPUTS);
      attn_matrix c = columns_of(dx, first, inputs);
      if (c.dtype == ATTN_BF16)
        multiply_inputs_rounded(kernels, w, &a, first, inputs, &c, accumulate, &space);
      else
        multiply_inputs(kernels, w, &a, first, inputs, &c, accumulate, &space);
    }
    kernels->end();
  }
  return ATTN_OK;
}

/* --- Few rows --------------------------------------------------------------------------------- */

/* A product with blocks in place; NULL for types that have none. */
typedef void matvec_blocks(int64_t rows, int64_t outputs, int64_t inputs, const attn_rounded *x,
                           const void *w, float *y, int64_t ldy);

static matvec_blocks *find_matvec(const attn_kernels *kernels, attn_block_type type) {
  switch (type) {
#define CASE(name, TYPE)                                                                           \
  case ATTN_BLOCK_##TYPE: return kernels->matvec_##name;
    ATTN_BLOCKS_TYPES(CASE)
#undef CASE
  default: return NULL;
  }
}

/* x, y and W of a decode step. */
typedef struct matvec {
  const attn_kernels *kernels;
  const attn_block_matrix *w;
  const attn_matrix *x, *y;
  matvec_blocks *in_place; /* of the rounded x; NULL: rows are dequantised */
  attn_rounded rounded;
  float *values; /* a dequantised row for each thread */
  int64_t stride;
} matvec;

static void dot_f64(const matvec *work, int64_t output, const float *w) {
  for (int64_t r = 0; r < work->x->rows; ++r) {
    const double *x = element_of(work->x, r, 0);
    double sum = 0;
    for (int64_t i = 0; i < work->w->inputs; ++i) sum += x[i] * (double)w[i];
    *(double *)element_of(work->y, r, output) = sum;
  }
}

/* Outputs first .. first + count of W that are plain numbers which a kernel reads as they are;
 * false where they are not, or not aligned. */
static bool multiply_plain(const matvec *work, int64_t first, int64_t count) {
  int64_t inputs = work->w->inputs;
  const void *w = block_of(work->w, first, 0);
  void *y = element_of(work->y, 0, first);
  if (work->x->dtype != ATTN_F32) return false;
  if (work->w->type == ATTN_BLOCK_BF16 && (uintptr_t)w % sizeof(uint16_t) == 0)
    work->kernels->matvec_bf16(work->x->rows, count, inputs, work->x->data, work->x->stride[0], w,
                               inputs, y, work->y->stride[0]);
  else if (work->w->type == ATTN_BLOCK_F32 && (uintptr_t)w % sizeof(float) == 0)
    work->kernels->matvec_f32(work->x->rows, count, inputs, work->x->data, work->x->stride[0], w,
                              inputs, y, work->y->stride[0]);
  else
    return false;
  return true;
}

/* Outputs first .. first + count, by thread t. */
static void multiply_outputs(const matvec *work, int64_t first, int64_t count, int64_t t) {
  int64_t rows = work->x->rows, inputs = work->w->inputs;
  if (multiply_plain(work, first, count)) return;
  if (work->in_place) {
    work->in_place(rows, count, inputs, &work->rounded, block_of(work->w, first, 0),
                   element_of(work->y, 0, first), work->y->stride[0]);
    return;
  }
  float *values = work->values + t * work->stride;
  for (int64_t o = first; o < first + count; ++o) {
    read_row(work->kernels, work->w, o, 0, inputs, values);
    if (work->x->dtype == ATTN_F64)
      dot_f64(work, o, values);
    else
      work->kernels->matvec_f32(rows, 1, inputs, work->x->data, work->x->stride[0], values, inputs,
                                element_of(work->y, 0, o), work->y->stride[0]);
  }
}

static attn_status round_rows(matvec *work, attn_arena *scratch) {
  int64_t rows = work->x->rows, inputs = work->w->inputs, blocks = inputs / ATTN_ROUNDED_BLOCK;
  int8_t *q = attn_arena_alloc(scratch, (size_t)(rows * inputs));
  float *scale = attn_arena_alloc(scratch, (size_t)(2 * rows * blocks) * sizeof *scale);
  if (!q || !scale) return ATTN_OUT_OF_MEMORY;
  float *sum = scale + rows * blocks;
  for (int64_t r = 0; r < rows; ++r)
    work->kernels->round_blocks(q + r * inputs, scale + r * blocks, sum + r * blocks,
                                element_of(work->x, r, 0), inputs);
  work->rounded = (attn_rounded){.q = q, .scale = scale, .sum = sum, .ld = inputs};
  return ATTN_OK;
}

static attn_status prepare_rows(matvec *work, int64_t threads, attn_arena *scratch) {
  if (work->in_place) return round_rows(work, scratch);
  work->stride = round_up(work->w->inputs, MATVEC_GRAIN);
  work->values = attn_arena_alloc(scratch, (size_t)(threads * work->stride) * sizeof(float));
  return work->values ? ATTN_OK : ATTN_OUT_OF_MEMORY;
}

attn_status attn_blocks_matvec(const attn_block_matrix *w, const attn_matrix *x,
                               const attn_matrix *y, bool round, attn_arena *scratch) {
  matvec work = {.kernels = attn_kernels_get(), .w = w, .x = x, .y = y};
  if (round) work.in_place = find_matvec(work.kernels, w->type);
  int64_t useful = w->outputs * w->inputs /
                   (work.in_place ? ROUNDED_ELEMENTS_PER_THREAD : MATVEC_ELEMENTS_PER_THREAD);
  int64_t threads = min(attn_get_threads(), useful < 1 ? 1 : useful), outputs = w->outputs;
  ATTN_TRY(prepare_rows(&work, threads, scratch));
  if (threads == 1) {
    multiply_outputs(&work, 0, outputs, 0);
    return ATTN_OK;
  }
  int64_t share = round_up((outputs + threads - 1) / threads, MATVEC_GRAIN);
#pragma omp parallel for num_threads((int)threads) schedule(static)
  for (int64_t t = 0; t < threads; ++t) {
    int64_t first = min(t * share, outputs);
    multiply_outputs(&work, first, min(share, outputs - first), t);
  }
  return ATTN_OK;
}
