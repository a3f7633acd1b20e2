#include "engines/dense/dense.h"
#include "base/status.h"
#include "engines/dense/gpu.h"
#include "engines/dense/product.h"
#include "kernels/kernels.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

enum {
  /* oneDNN's blocking of B does not depend on the exact number of rows; it is asked with this. */
  TYPICAL_ROWS = 1024,
  /* A decode step's thread is worth waking (some microseconds) for this much of W, at least. */
  MATVEC_BYTES_PER_THREAD = 64 << 10,
  MATVEC_GRAIN = 16, /* outputs: one cache line of float32 results is written by one thread */
};

/* One packed form of W, and whether it holds the present values. */
typedef struct form {
  attn_packed packed;
  size_t capacity;                     /* of packed.data */
  _Atomic(const attn_product *) ready; /* made by this product from the present values; or NULL */
} form;

struct attn_weight {
  int64_t outputs, inputs;
  attn_dtype dtype;
  attn_device device;       /* where the values are; on a GPU they have no packed forms */
  attn_matrix values;       /* borrowed, or in `owned`; no data where there are blocks */
  attn_block_matrix blocks; /* borrowed; no data where there are values */
  void *owned;
  size_t owned_bytes;
  pthread_mutex_t lock; /* held while a form is made */
  form forward;         /* of W^T [inputs, outputs] */
  form backward;        /* of W [outputs, inputs] */
};

attn_status attn_weight_create(int64_t outputs, int64_t inputs, attn_dtype compute,
                               attn_weight **weight) {
  if (!weight) return attn_fail(ATTN_INVALID_ARGUMENT, "weight: NULL");
  *weight = NULL;
  if (compute != ATTN_F64 && compute != ATTN_F32 && compute != ATTN_BF16)
    return attn_fail(ATTN_UNSUPPORTED,
                     "weight: cannot compute in %s; float64, float32 and bfloat16 can",
                     attn_dtype_name(compute));
  int64_t bytes;
  if (outputs < 1 || inputs < 1 || __builtin_mul_overflow(outputs, inputs, &bytes) ||
      bytes > INT64_MAX / 16)
    return attn_fail(ATTN_INVALID_SHAPE, "weight: %lld outputs of %lld inputs", (long long)outputs,
                     (long long)inputs);
  attn_weight *fresh = attn_alloc_zero(sizeof *fresh);
  if (!fresh) return ATTN_OUT_OF_MEMORY;
  fresh->outputs = outputs;
  fresh->inputs = inputs;
  fresh->dtype = compute;
  pthread_mutex_init(&fresh->lock, NULL);
  *weight = fresh;
  return ATTN_OK;
}

void attn_weight_destroy(attn_weight *weight) {
  if (!weight) return;
  pthread_mutex_destroy(&weight->lock);
  attn_free(weight->forward.packed.data);
  attn_free(weight->backward.packed.data);
  attn_device_free(weight->device, weight->owned);
  attn_free(weight);
}

attn_tensor attn_weight_values(const attn_weight *weight) {
  const attn_matrix *values = &weight->values;
  return (attn_tensor){.data = values->data,
                       .dtype = weight->dtype,
                       .device = weight->device,
                       .rank = 2,
                       .shape = {weight->outputs, weight->inputs},
                       .stride = {values->stride[0], 1}};
}

size_t attn_weight_bytes(const attn_weight *weight) {
  return weight->owned_bytes + weight->forward.capacity + weight->backward.capacity;
}

/* Checks a [rows, columns] argument; -1 rows: any. */
static attn_status check(const char *name, const attn_tensor *tensor, int64_t rows,
                         int64_t columns) {
  if (!tensor || tensor->rank != 2)
    return attn_fail(ATTN_INVALID_SHAPE, "dense: %s has rank %d, expected 2", name,
                     tensor ? tensor->rank : 0);
  const int64_t *shape = tensor->shape;
  if (shape[0] < 0 || (rows >= 0 && shape[0] != rows) || shape[1] != columns)
    return attn_fail(ATTN_INVALID_SHAPE, "dense: %s is [%lld, %lld], expected [%lld, %lld]", name,
                     (long long)shape[0], (long long)shape[1],
                     (long long)(rows >= 0 ? rows : shape[0]), (long long)columns);
  if (columns > 1 && tensor->stride[1] != 1)
    return attn_fail(ATTN_INVALID_SHAPE, "dense: %s has innermost stride %lld, expected 1", name,
                     (long long)tensor->stride[1]);
  if (shape[0] > 0 && columns > 0 && !tensor->data)
    return attn_fail(ATTN_INVALID_ARGUMENT, "dense: %s has no data", name);
  return ATTN_OK;
}

static attn_status check_dtype(const char *name, const attn_tensor *tensor, attn_dtype expected,
                               attn_dtype alternative) {
  if (tensor->dtype == expected || tensor->dtype == alternative) return ATTN_OK;
  return attn_fail(ATTN_INVALID_ARGUMENT, "dense: %s is %s, expected %s", name,
                   attn_dtype_name(tensor->dtype), attn_dtype_name(expected));
}

/* Results may be wider than bfloat16, never narrower than the sums of float64. */
static attn_dtype wider(attn_dtype compute) {
  return compute == ATTN_BF16 ? ATTN_F32 : compute;
}

/* Rows of a result must not overlap. */
static attn_status check_result(const char *name, const attn_tensor *tensor, attn_dtype compute) {
  ATTN_TRY(check_dtype(name, tensor, compute, wider(compute)));
  if (tensor->shape[0] > 1 && tensor->stride[0] < tensor->shape[1])
    return attn_fail(ATTN_INVALID_SHAPE, "dense: rows of %s overlap: %lld elements, stride %lld",
                     name, (long long)tensor->shape[1], (long long)tensor->stride[0]);
  return ATTN_OK;
}

static attn_matrix matrix_of(const attn_tensor *tensor) {
  return (attn_matrix){.data = tensor->data,
                       .dtype = tensor->dtype,
                       .rows = tensor->shape[0],
                       .columns = tensor->shape[1],
                       .stride = {tensor->stride[0], 1}};
}

static attn_matrix transposed(const attn_matrix *matrix) {
  return (attn_matrix){.data = matrix->data,
                       .dtype = matrix->dtype,
                       .rows = matrix->columns,
                       .columns = matrix->rows,
                       .stride = {matrix->stride[1], matrix->stride[0]}};
}

static void *row_of(const attn_matrix *matrix, int64_t row) {
  return (char *)matrix->data + row * matrix->stride[0] * (int64_t)attn_dtype_size(matrix->dtype);
}

/* Converts float32 rows to bfloat16 with all threads: the step from masters to compute weights. */
static void round_rows(const attn_matrix *source, uint16_t *target) {
  const attn_kernels *kernels = attn_kernels_get();
  int threads = attn_pass_threads(source->rows * source->columns * (int64_t)sizeof(float));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < source->rows; ++i)
    kernels->f32_to_bf16(target + i * source->columns, row_of(source, i), source->columns);
}

static attn_status keep_converted(attn_weight *weight, const attn_tensor *w) {
  size_t bytes = (size_t)(weight->outputs * weight->inputs) * attn_dtype_size(weight->dtype);
  if (!weight->owned) {
    weight->owned = attn_device_alloc(weight->device, bytes);
    if (!weight->owned) return ATTN_OUT_OF_MEMORY;
    weight->owned_bytes = bytes;
  }
  attn_tensor copy;
  ATTN_TRY(attn_tensor_wrap(weight->owned, weight->dtype, 2, w->shape, &copy));
  copy.device = weight->device;
  if (!attn_is_cuda(w->device) && w->dtype == ATTN_F32 && weight->dtype == ATTN_BF16 &&
      w->stride[1] == 1) {
    attn_matrix source = matrix_of(w);
    round_rows(&source, weight->owned);
  } else {
    ATTN_TRY(attn_tensor_copy(w, &copy));
  }
  weight->values = matrix_of(&copy);
  weight->blocks.data = NULL;
  return ATTN_OK;
}

static void drop_form(form *form) {
  attn_free(form->packed.data);
  form->packed.data = NULL;
  form->capacity = 0;
  atomic_store(&form->ready, NULL);
}

/* What the weight has belongs to another device. */
static void change_device(attn_weight *weight, attn_device device) {
  if (attn_same_device(device, weight->device)) return;
  attn_device_free(weight->device, weight->owned);
  weight->owned = NULL;
  weight->owned_bytes = 0;
  weight->device = device;
  drop_form(&weight->forward);
  drop_form(&weight->backward);
}

attn_status attn_weight_set(attn_weight *weight, const attn_tensor *w) {
  if (!weight) return attn_fail(ATTN_INVALID_ARGUMENT, "weight: NULL");
  if (!w || w->rank != 2 || w->shape[0] != weight->outputs || w->shape[1] != weight->inputs)
    return attn_fail(ATTN_INVALID_SHAPE,
                     "weight: w is [%lld, %lld] of rank %d, expected [%lld, %lld]",
                     w ? (long long)w->shape[0] : 0, w ? (long long)w->shape[1] : 0,
                     w ? w->rank : 0, (long long)weight->outputs, (long long)weight->inputs);
  if (!w->data) return attn_fail(ATTN_INVALID_ARGUMENT, "weight: w has no data");
  change_device(weight, w->device);
  atomic_store(&weight->forward.ready, NULL);
  atomic_store(&weight->backward.ready, NULL);
  if (w->dtype != weight->dtype || (w->stride[1] != 1 && weight->inputs > 1))
    return keep_converted(weight, w);
  weight->values = matrix_of(w);
  weight->blocks.data = NULL;
  return ATTN_OK;
}

attn_status attn_weight_set_blocks(attn_weight *weight, attn_device device, attn_block_type type,
                                   const void *blocks) {
  if (!weight) return attn_fail(ATTN_INVALID_ARGUMENT, "weight: NULL");
  if (!blocks) return attn_fail(ATTN_INVALID_ARGUMENT, "weight: blocks is NULL");
  float none = 0;
  ATTN_TRY(attn_blocks_to_f32(type, &none, &none, 0)); /* whether the type can be converted */
  const attn_block_format *format = attn_block_get_format(type);
  if (weight->inputs % format->elements != 0)
    return attn_fail(ATTN_INVALID_SHAPE, "weight: %lld inputs are not whole blocks of %s (%d)",
                     (long long)weight->inputs, format->name, format->elements);
  change_device(weight, device);
  drop_form(&weight->forward);
  drop_form(&weight->backward);
  attn_device_free(weight->device, weight->owned);
  weight->owned = NULL;
  weight->owned_bytes = 0;
  weight->values = (attn_matrix){0};
  weight->blocks = (attn_block_matrix){
      .type = type, .data = blocks, .outputs = weight->outputs, .inputs = weight->inputs};
  return ATTN_OK;
}

attn_status attn_weight_set_scaled(attn_weight *weight, const void *numbers, const float *scales,
                                   int64_t scale_outputs, int64_t scale_inputs) {
  if (!scales) return attn_fail(ATTN_INVALID_ARGUMENT, "weight: scales is NULL");
  if (scale_outputs < 1 || scale_inputs < 1)
    return attn_fail(ATTN_INVALID_ARGUMENT, "weight: a scale for %lld outputs of %lld inputs",
                     (long long)scale_outputs, (long long)scale_inputs);
  ATTN_TRY(attn_weight_set_blocks(weight, (attn_device){0}, ATTN_BLOCK_F8_E4M3, numbers));
  weight->blocks.scales = scales;
  weight->blocks.scale_outputs = scale_outputs;
  weight->blocks.scale_inputs = scale_inputs;
  return ATTN_OK;
}

/* --- Packed forms ----------------------------------------------------------------------------- */

static const attn_product *plan_product(int64_t m, int64_t k, int64_t n, attn_dtype dtype,
                                        attn_packed *packed) {
  static const attn_product *const products[] = {&attn_product_onednn, &attn_product_panels};
  for (size_t i = 0; i < sizeof products / sizeof *products; ++i)
    if (products[i]->plan(m, k, n, dtype, packed)) return products[i];
  return NULL; /* does not happen: panels take everything */
}

/* Under the weight's lock. */
static attn_status make_form(form *form, const attn_matrix *b) {
  attn_packed packed;
  const attn_product *product = plan_product(TYPICAL_ROWS, b->rows, b->columns, b->dtype, &packed);
  if (packed.bytes > form->capacity) {
    void *data = attn_alloc(packed.bytes);
    if (!data) return ATTN_OUT_OF_MEMORY;
    attn_free(form->packed.data);
    form->packed.data = data;
    form->capacity = packed.bytes;
  }
  packed.data = form->packed.data;
  form->packed = packed;
  ATTN_TRY(product->pack(&form->packed, b));
  atomic_store(&form->ready, product);
  return ATTN_OK;
}

/* The form of b made by the product that the present kernel path uses. */
static attn_status need_form(attn_weight *weight, form *form, const attn_matrix *b) {
  bool generic = attn_get_kernel_path() == ATTN_PATH_GENERIC;
  const attn_product *ready = atomic_load_explicit(&form->ready, memory_order_acquire);
  if (ready && (ready == &attn_product_panels || !generic)) return ATTN_OK;
  pthread_mutex_lock(&weight->lock);
  attn_status status = ATTN_OK;
  ready = atomic_load(&form->ready);
  if (!ready || (generic && ready != &attn_product_panels)) status = make_form(form, b);
  pthread_mutex_unlock(&weight->lock);
  return status;
}

/* --- Any strides ------------------------------------------------------------------------------ */

static bool is_gapless(const attn_matrix *matrix) {
  return matrix->rows <= 1 || matrix->stride[0] == matrix->columns;
}

static attn_matrix gapless_matrix(const attn_matrix *like, attn_dtype dtype, attn_arena *scratch) {
  size_t bytes = (size_t)(like->rows * like->columns) * attn_dtype_size(dtype);
  return (attn_matrix){.data = attn_arena_alloc(scratch, bytes),
                       .dtype = dtype,
                       .rows = like->rows,
                       .columns = like->columns,
                       .stride = {like->columns, 1}};
}

static void copy_rows(const attn_matrix *source, const attn_matrix *target) {
  size_t bytes = (size_t)source->columns * attn_dtype_size(source->dtype);
  int threads = attn_pass_threads(source->rows * (int64_t)bytes);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < source->rows; ++i) memcpy(row_of(target, i), row_of(source, i), bytes);
}

/* C (+)= A B for A and C with any row stride. */
static attn_status multiply(const attn_matrix *a, const attn_packed *packed, const attn_matrix *c,
                            bool accumulate, attn_arena *scratch) {
  if (packed->product->any_stride)
    return packed->product->multiply(a, packed, c, accumulate, scratch);
  attn_matrix dense_a = *a, dense_c = *c;
  if (!is_gapless(a)) {
    dense_a = gapless_matrix(a, a->dtype, scratch);
    if (!dense_a.data) return ATTN_OUT_OF_MEMORY;
    copy_rows(a, &dense_a);
  }
  if (!is_gapless(c)) {
    dense_c = gapless_matrix(c, c->dtype, scratch);
    if (!dense_c.data) return ATTN_OUT_OF_MEMORY;
    if (accumulate) copy_rows(c, &dense_c);
  }
  dense_a.stride[0] = a->columns;
  dense_c.stride[0] = c->columns;
  ATTN_TRY(packed->product->multiply(&dense_a, packed, &dense_c, accumulate, scratch));
  if (dense_c.data != c->data) copy_rows(&dense_c, c);
  return ATTN_OK;
}

/* --- Few rows: W is read once, as it is ------------------------------------------------------- */

typedef struct matvec {
  const attn_matrix *x, *w, *y; /* x float32 for bfloat16 w; y float32, or float64 for float64 */
  const attn_kernels *kernels;
} matvec;

static void matvec_f64(const matvec *work, int64_t first, int64_t count) {
  for (int64_t o = first; o < first + count; ++o)
    for (int64_t r = 0; r < work->x->rows; ++r) {
      const double *x = row_of(work->x, r), *w = row_of(work->w, o);
      double sum = 0;
      for (int64_t i = 0; i < work->w->columns; ++i) sum += x[i] * w[i];
      ((double *)row_of(work->y, r))[o] = sum;
    }
}

static void matvec_f32(const matvec *work, int64_t first, int64_t count) {
  work->kernels->matvec_f32(work->x->rows, count, work->w->columns, work->x->data,
                            work->x->stride[0], row_of(work->w, first), work->w->stride[0],
                            (float *)work->y->data + first, work->y->stride[0]);
}

static void matvec_bf16(const matvec *work, int64_t first, int64_t count) {
  work->kernels->matvec_bf16(work->x->rows, count, work->w->columns, work->x->data,
                             work->x->stride[0], row_of(work->w, first), work->w->stride[0],
                             (float *)work->y->data + first, work->y->stride[0]);
}

static int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}

static void split_outputs(const matvec *work) {
  static void (*const bodies[])(const matvec *, int64_t, int64_t) = {
      [ATTN_F64] = matvec_f64, [ATTN_F32] = matvec_f32, [ATTN_BF16] = matvec_bf16};
  void (*body)(const matvec *, int64_t, int64_t) = bodies[work->w->dtype];
  int64_t outputs = work->w->rows;
  int64_t bytes = outputs * work->w->columns * (int64_t)attn_dtype_size(work->w->dtype);
  int64_t threads = min(attn_get_threads(), bytes / MATVEC_BYTES_PER_THREAD);
  if (threads <= 1) {
    body(work, 0, outputs);
    return;
  }
  int64_t share = (outputs + threads - 1) / threads;
  share = (share + MATVEC_GRAIN - 1) / MATVEC_GRAIN * MATVEC_GRAIN;
#pragma omp parallel for num_threads((int)threads) schedule(static)
  for (int64_t first = 0; first < outputs; first += share)
    body(work, first, min(share, outputs - first));
}

/* y (+)= sums, where the product could not go straight into y. */
static void put_sums(const attn_matrix *sums, const attn_matrix *y, bool accumulate) {
  for (int64_t r = 0; r < y->rows; ++r)
    for (int64_t o = 0; o < y->columns; ++o) {
      if (y->dtype == ATTN_F64) {
        ((double *)row_of(y, r))[o] += ((const double *)row_of(sums, r))[o];
        continue;
      }
      float sum = ((const float *)row_of(sums, r))[o];
      if (y->dtype == ATTN_F32) {
        ((float *)row_of(y, r))[o] += sum;
      } else {
        uint16_t *place = (uint16_t *)row_of(y, r) + o;
        *place = attn_f32_to_bf16(accumulate ? attn_bf16_to_f32(*place) + sum : sum);
      }
    }
}

static attn_status few_rows(const attn_matrix *x, const attn_weight *weight, const attn_matrix *y,
                            bool accumulate, attn_arena *scratch) {
  matvec work = {.x = x, .w = &weight->values, .y = y, .kernels = attn_kernels_get()};
  attn_matrix widened, sums;
  if (x->dtype == ATTN_BF16) {
    widened = gapless_matrix(x, ATTN_F32, scratch);
    if (!widened.data) return ATTN_OUT_OF_MEMORY;
    for (int64_t r = 0; r < x->rows; ++r)
      work.kernels->bf16_to_f32(row_of(&widened, r), row_of(x, r), x->columns);
    work.x = &widened;
  }
  bool direct = !accumulate && y->dtype != ATTN_BF16;
  if (!direct) {
    sums = gapless_matrix(y, wider(y->dtype), scratch);
    if (!sums.data) return ATTN_OUT_OF_MEMORY;
    work.y = &sums;
  }
  if (weight->blocks.data)
    ATTN_TRY(attn_blocks_matvec(&weight->blocks, work.x, work.y, x->dtype == ATTN_BF16, scratch));
  else
    split_outputs(&work);
  if (!direct) put_sums(&sums, y, accumulate);
  return ATTN_OK;
}

/* --- The three products ----------------------------------------------------------------------- */

static attn_status check_weight(const attn_weight *weight, const attn_arena *scratch) {
  if (!weight || !scratch)
    return attn_fail(ATTN_INVALID_ARGUMENT, "dense: %s is NULL", weight ? "scratch" : "weight");
  if (!weight->values.data && !weight->blocks.data)
    return attn_fail(ATTN_INVALID_ARGUMENT, "dense: the weight has no values yet");
  return ATTN_OK;
}

static attn_status many_rows(attn_weight *weight, form *form, const attn_matrix *b,
                             const attn_matrix *a, const attn_matrix *c, bool accumulate,
                             attn_arena *scratch) {
  ATTN_TRY(need_form(weight, form, b));
  return multiply(a, &form->packed, c, accumulate, scratch);
}

attn_status attn_dense_forward(attn_weight *weight, const attn_tensor *x, const attn_tensor *y,
                               bool accumulate, attn_arena *scratch) {
  ATTN_TRY(check_weight(weight, scratch));
  ATTN_TRY(check("x", x, -1, weight->inputs));
  ATTN_TRY(check("y", y, x->shape[0], weight->outputs));
  ATTN_TRY(check_dtype("x", x, weight->dtype, weight->dtype));
  ATTN_TRY(check_result("y", y, weight->dtype));
  if (x->shape[0] == 0) return ATTN_OK;
  if (attn_is_cuda(y->device)) {
    if (weight->blocks.data) return attn_gpu_blocks_forward(&weight->blocks, x, y, accumulate);
    attn_tensor w = attn_weight_values(weight);
    return attn_gpu_multiply(x, false, &w, true, y, accumulate);
  }
  attn_matrix a = matrix_of(x), c = matrix_of(y), b = transposed(&weight->values);
  attn_arena_mark mark = attn_arena_get_mark(scratch);
  attn_status status;
  if (x->shape[0] <= ATTN_MATVEC_ROWS)
    status = few_rows(&a, weight, &c, accumulate, scratch);
  else if (weight->blocks.data)
    status = attn_blocks_forward(&weight->blocks, &a, &c, accumulate, scratch);
  else
    status = many_rows(weight, &weight->forward, &b, &a, &c, accumulate, scratch);
  attn_arena_release(scratch, mark);
  return status;
}

attn_status attn_dense_backward_input(attn_weight *weight, const attn_tensor *dy,
                                      const attn_tensor *dx, bool accumulate, attn_arena *scratch) {
  ATTN_TRY(check_weight(weight, scratch));
  ATTN_TRY(check("dy", dy, -1, weight->outputs));
  ATTN_TRY(check("dx", dx, dy->shape[0], weight->inputs));
  ATTN_TRY(check_dtype("dy", dy, weight->dtype, weight->dtype));
  ATTN_TRY(check_result("dx", dx, weight->dtype));
  if (dy->shape[0] == 0) return ATTN_OK;
  if (attn_is_cuda(dx->device)) {
    if (weight->blocks.data)
      return attn_gpu_blocks_backward_input(&weight->blocks, dy, dx, accumulate);
    attn_tensor w = attn_weight_values(weight);
    return attn_gpu_multiply(dy, false, &w, false, dx, accumulate);
  }
  attn_matrix a = matrix_of(dy), c = matrix_of(dx);
  attn_arena_mark mark = attn_arena_get_mark(scratch);
  attn_status status =
      weight->blocks.data
          ? attn_blocks_backward_input(&weight->blocks, &a, &c, accumulate, scratch)
          : many_rows(weight, &weight->backward, &weight->values, &a, &c, accumulate, scratch);
  attn_arena_release(scratch, mark);
  return status;
}

enum { TRANSPOSE_SQUARE = 32, TRANSPOSE_BLOCK = 8 };

/* Transposes columns first .. first + count of `source` into rows of `target`, by squares that stay
 * in the L1 cache. */
#define DEFINE_TRANSPOSE(bits)                                                                     \
  static void transpose_##bits(const attn_matrix *source, const attn_matrix *target,               \
                               int64_t first, int64_t count) {                                     \
    const uint##bits##_t *from = source->data;                                                     \
    uint##bits##_t *to = target->data;                                                             \
    int64_t from_stride = source->stride[0], to_stride = target->stride[0];                        \
    for (int64_t row = 0; row < source->rows; row += TRANSPOSE_SQUARE) {                           \
      int64_t rows = min(source->rows - row, TRANSPOSE_SQUARE);                                    \
      for (int64_t c = first; c < first + count; ++c)                                              \
        for (int64_t r = row; r < row + rows; ++r)                                                 \
          to[c * to_stride + r] = from[r * from_stride + c];                                       \
    }                                                                                              \
  }

DEFINE_TRANSPOSE(32)
DEFINE_TRANSPOSE(64)

/* Eight numbers of 16 bits: what every 64-bit processor holds in a vector register. */
typedef uint16_t vector8 __attribute__((vector_size(16)));

/* An 8 x 8 block in three rounds: each interleaves row i with row i + 4. */
static void transpose_block(const uint16_t *from, int64_t from_stride, uint16_t *to,
                            int64_t to_stride) {
  vector8 x[TRANSPOSE_BLOCK], y[TRANSPOSE_BLOCK];
  for (int i = 0; i < TRANSPOSE_BLOCK; ++i) memcpy(&x[i], from + i * from_stride, sizeof x[i]);
  for (int round = 0; round < 3; ++round) {
    for (int i = 0; i < TRANSPOSE_BLOCK / 2; ++i) {
      y[2 * i] = __builtin_shufflevector(x[i], x[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
      y[2 * i + 1] = __builtin_shufflevector(x[i], x[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    memcpy(x, y, sizeof x);
  }
  for (int i = 0; i < TRANSPOSE_BLOCK; ++i) memcpy(to + i * to_stride, &x[i], sizeof x[i]);
}

/* The same for 16 bits, where single elements would cost as much as a product does. */
static void transpose_16(const attn_matrix *source, const attn_matrix *target, int64_t first,
                         int64_t count) {
  const uint16_t *from = source->data;
  uint16_t *to = target->data;
  int64_t from_stride = source->stride[0], to_stride = target->stride[0];
  for (int64_t row = 0; row < source->rows; row += TRANSPOSE_BLOCK)
    for (int64_t column = first; column < first + count; column += TRANSPOSE_BLOCK) {
      int64_t rows = min(source->rows - row, TRANSPOSE_BLOCK);
      int64_t columns = min(first + count - column, TRANSPOSE_BLOCK);
      if (rows == TRANSPOSE_BLOCK && columns == TRANSPOSE_BLOCK) {
        transpose_block(from + row * from_stride + column, from_stride,
                        to + column * to_stride + row, to_stride);
        continue;
      }
      for (int64_t c = column; c < column + columns; ++c)
        for (int64_t r = row; r < row + rows; ++r)
          to[c * to_stride + r] = from[r * from_stride + c];
    }
}

/* source^T, row-major, with `gap` elements between its rows. */
static attn_status transposed_copy(const attn_matrix *source, int64_t gap, attn_matrix *target,
                                   attn_arena *scratch) {
  static void (*const bodies[])(const attn_matrix *, const attn_matrix *, int64_t, int64_t) = {
      [ATTN_F64] = transpose_64, [ATTN_F32] = transpose_32, [ATTN_BF16] = transpose_16};
  *target = transposed(source);
  target->stride[0] = target->columns + gap;
  target->stride[1] = 1;
  target->data = attn_arena_alloc(scratch, (size_t)(target->rows * target->stride[0]) *
                                               attn_dtype_size(source->dtype));
  if (!target->data) return ATTN_OUT_OF_MEMORY;
  void (*body)(const attn_matrix *, const attn_matrix *, int64_t, int64_t) = bodies[source->dtype];
  int threads =
      attn_pass_threads(source->rows * source->columns * (int64_t)attn_dtype_size(source->dtype));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < source->columns; first += TRANSPOSE_SQUARE)
    body(source, target, first, min(source->columns - first, TRANSPOSE_SQUARE));
  return ATTN_OK;
}

static void clear_rows(const attn_matrix *matrix) {
  size_t bytes = (size_t)matrix->columns * attn_dtype_size(matrix->dtype);
  for (int64_t i = 0; i < matrix->rows; ++i) memset(row_of(matrix, i), 0, bytes);
}

/* Rows that one piece of a weight's gradient takes when our tiles compute it: dY^T and X of a piece
 * then stay in the caches between their rearrangement and the product. The gap keeps the rows of
 * dY^T, a power of two apart, from falling on the same lines of the cache. */
enum { GRADIENT_ROWS = 1024, GRADIENT_GAP = 32 };

static attn_matrix rows_of(const attn_matrix *matrix, int64_t first, int64_t count) {
  attn_matrix rows = *matrix;
  rows.data = row_of(matrix, first);
  rows.rows = count;
  return rows;
}

/* Both operands are rearranged for every product: dY is transposed into A = dY^T, X is packed as B.
 * That reads and writes each once, and the product then runs at its full speed. */
static attn_status gradient_piece(const attn_matrix *dy, const attn_matrix *x, int64_t gap,
                                  const attn_matrix *dw, bool accumulate, attn_arena *scratch) {
  attn_matrix a;
  attn_packed packed;
  ATTN_TRY(transposed_copy(dy, gap, &a, scratch));
  const attn_product *product = plan_product(a.rows, x->rows, x->columns, x->dtype, &packed);
  packed.data = attn_arena_alloc(scratch, packed.bytes);
  if (!packed.data) return ATTN_OUT_OF_MEMORY;
  ATTN_TRY(product->pack(&packed, x));
  return multiply(&a, &packed, dw, accumulate, scratch);
}

/* bfloat16 on AMX goes to our tiles: oneDNN's product is no faster there, and the rearrangement for
 * it, through memory, costs as much again. */
static attn_status weight_gradient(const attn_matrix *dy, const attn_matrix *x,
                                   const attn_matrix *dw, bool accumulate, attn_arena *scratch) {
  attn_packed packed;
  bool ours =
      plan_product(dy->columns, x->rows, x->columns, x->dtype, &packed) == &attn_product_panels;
  if (x->dtype == ATTN_BF16 && (ours || attn_get_kernel_path() == ATTN_PATH_AMX))
    return attn_gradient_by_tiles(dy, x, dw, accumulate, scratch);
  int64_t step = ours ? GRADIENT_ROWS : x->rows, gap = ours ? GRADIENT_GAP : 0;
  for (int64_t first = 0; first < x->rows; first += step) {
    int64_t count = min(x->rows - first, step);
    attn_matrix dy_piece = rows_of(dy, first, count), x_piece = rows_of(x, first, count);
    attn_arena_mark mark = attn_arena_get_mark(scratch);
    ATTN_TRY(gradient_piece(&dy_piece, &x_piece, gap, dw, accumulate || first > 0, scratch));
    attn_arena_release(scratch, mark);
  }
  return ATTN_OK;
}

attn_status attn_dense_backward_weight(const attn_tensor *dy, const attn_tensor *x,
                                       const attn_tensor *dw, bool accumulate,
                                       attn_arena *scratch) {
  if (!scratch || !dy || !x)
    return attn_fail(ATTN_INVALID_ARGUMENT, "dense: %s is NULL", scratch ? "dy or x" : "scratch");
  ATTN_TRY(check("dy", dy, -1, dy->shape[1]));
  ATTN_TRY(check("x", x, dy->shape[0], x->shape[1]));
  ATTN_TRY(check("dw", dw, dy->shape[1], x->shape[1]));
  if (dy->dtype != ATTN_F64 && dy->dtype != ATTN_F32 && dy->dtype != ATTN_BF16)
    return attn_fail(ATTN_UNSUPPORTED, "dense: dy is %s; float64, float32 and bfloat16 compute",
                     attn_dtype_name(dy->dtype));
  ATTN_TRY(check_dtype("x", x, dy->dtype, dy->dtype));
  ATTN_TRY(check_dtype("dw", dw, wider(dy->dtype), wider(dy->dtype)));
  ATTN_TRY(check_result("dw", dw, dy->dtype));
  if (attn_is_cuda(dw->device)) {
    if (dy->shape[0] > 0) return attn_gpu_multiply(dy, true, x, false, dw, accumulate);
    return accumulate ? ATTN_OK : attn_tensor_fill(dw, 0);
  }
  attn_matrix a = matrix_of(dy), b = matrix_of(x), c = matrix_of(dw);
  if (a.rows == 0) {
    if (!accumulate) clear_rows(&c);
    return ATTN_OK;
  }
  attn_arena_mark mark = attn_arena_get_mark(scratch);
  attn_status status = weight_gradient(&a, &b, &c, accumulate, scratch);
  attn_arena_release(scratch, mark);
  return status;
}
