/* Dense products by oneDNN's matmul primitive, with B reordered once into the blocked form that
 * oneDNN asks for (format tag `any`): on AVX-512 and AMX that is many times faster than reading
 * row-major weights.
 *
 * Making a primitive compiles code, so primitives are kept in one small process-wide table, found
 * by what they compute. An entry is used by one thread at a time (its memory objects carry the
 * pointers of the call); a second thread with the same product gets an entry of its own. */
#include "engines/dense/product.h"
#include "base/status.h"
#include "kernels/kernels.h"

#include <omp.h>
#include <pthread.h>
#include <string.h>
#include <oneapi/dnnl/dnnl.h>

_Static_assert(sizeof(dnnl_memory_desc_t) <= sizeof((attn_packed *)0)->layout, "layout too small");

typedef enum work { WORK_LAYOUT, WORK_REORDER, WORK_MULTIPLY } work;

/* What an entry computes. Compared as bytes: always made by key_of, which zeroes the padding. */
typedef struct key {
  work work;
  int threads; /* primitives fix their split of the work when they are made */
  int64_t m, n, k;
  int64_t stride_k, stride_n;  /* reorder: of the matrix that is read */
  int32_t dtype, result_dtype; /* dnnl_data_type_t */
  int32_t accumulate, unused;  /* no padding, so that memcmp compares */
} key;
_Static_assert(sizeof(key) == 2 * sizeof(int) + 5 * sizeof(int64_t) + 4 * sizeof(int32_t),
               "keys are compared as bytes: no padding");

enum { MAX_ARGUMENTS = 4, TABLE_SIZE = 192 };

typedef struct entry {
  key key;
  dnnl_memory_desc_t layout; /* of B */
  dnnl_primitive_t primitive;
  dnnl_exec_arg_t arguments[MAX_ARGUMENTS];
  int argument_count;
  size_t scratch_bytes;
  bool used, busy;
  uint64_t last_use;
} entry;

static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static entry table[TABLE_SIZE];
static uint64_t uses;
static dnnl_engine_t engine;
static dnnl_stream_t stream; /* the CPU stream has no state: executing is a plain call */
static dnnl_status_t start_status;

#define TRY(expression)                                                                            \
  do {                                                                                             \
    dnnl_status_t try_status_ = (expression);                                                      \
    if (try_status_ != dnnl_success) return try_status_;                                           \
  } while (0)

static attn_status failed(dnnl_status_t status, const key *key) {
  if (status == dnnl_success) return ATTN_OK;
  if (status == dnnl_out_of_memory)
    return attn_fail(ATTN_OUT_OF_MEMORY,
                     "out of memory in oneDNN, product of m %lld, n %lld, k %lld",
                     (long long)key->m, (long long)key->n, (long long)key->k);
  return attn_fail(ATTN_INTERNAL, "oneDNN status %d in a product of m %lld, n %lld, k %lld",
                   (int)status, (long long)key->m, (long long)key->n, (long long)key->k);
}

/* A lower kernel path, chosen before the first product, also limits oneDNN, so that ATTN_KERNELS
 * tests what a lesser machine would run. oneDNN takes this only once a process. */
static void start(void) {
  static const dnnl_cpu_isa_t limits[ATTN_PATH_COUNT] = {
      [ATTN_PATH_GENERIC] = dnnl_cpu_isa_sse41,
      [ATTN_PATH_AVX2] = dnnl_cpu_isa_avx2,
      [ATTN_PATH_AVX512] = dnnl_cpu_isa_avx512_core_bf16,
      [ATTN_PATH_AMX] = dnnl_cpu_isa_all,
  };
  attn_kernel_path path = attn_get_kernel_path();
  bool lower = false;
  for (int better = path + 1; better < ATTN_PATH_COUNT; ++better)
    lower = lower || attn_kernel_path_available((attn_kernel_path)better);
  if (lower) dnnl_set_max_cpu_isa(limits[path]); /* refused when the program uses oneDNN itself */
  start_status = dnnl_engine_create(&engine, dnnl_cpu, 0);
  if (start_status == dnnl_success)
    start_status = dnnl_stream_create(&stream, engine, dnnl_stream_default_flags);
}

/* oneDNN uses as many threads as the calling thread's OpenMP setting says. That setting is the
 * calling thread's own, so it is set for the duration of a call and then put back. */
static int enter_threads(const key *key) {
  int before = omp_get_max_threads();
  if (before != key->threads) omp_set_num_threads(key->threads);
  return before;
}

static void leave_threads(int before) {
  if (before != omp_get_max_threads()) omp_set_num_threads(before);
}

static dnnl_data_type_t type_of(attn_dtype dtype) {
  return dtype == ATTN_BF16 ? dnnl_bf16 : dnnl_f32;
}

static key key_of(work work, int64_t m, int64_t k, int64_t n, dnnl_data_type_t dtype) {
  key result;
  memset(&result, 0, sizeof result);
  result.work = work;
  result.threads = work == WORK_REORDER
                       ? attn_pass_threads(k * n * (int64_t)dnnl_data_type_size(dtype))
                       : attn_product_threads(m, n, k);
  result.m = m;
  result.k = k;
  result.n = n;
  result.dtype = (int32_t)dtype;
  return result;
}

static dnnl_status_t describe(dnnl_memory_desc_t *matrix, int64_t rows, int64_t columns,
                              int32_t dtype, int64_t row_stride, int64_t column_stride) {
  dnnl_dims_t extents = {rows, columns}, strides = {row_stride, column_stride};
  return dnnl_memory_desc_init_by_strides(matrix, 2, extents, (dnnl_data_type_t)dtype, strides);
}

static dnnl_status_t add_argument(entry *entry, int name, const dnnl_memory_desc_t *matrix) {
  dnnl_exec_arg_t *argument = &entry->arguments[entry->argument_count];
  TRY(dnnl_memory_create(&argument->memory, matrix, engine, DNNL_MEMORY_NONE));
  argument->arg = name;
  ++entry->argument_count;
  return dnnl_success;
}

static void clear(entry *entry) {
  for (int i = 0; i < entry->argument_count; ++i) dnnl_memory_destroy(entry->arguments[i].memory);
  if (entry->primitive) dnnl_primitive_destroy(entry->primitive);
  memset(entry, 0, sizeof *entry);
}

/* Temporary memory is the caller's; float32 is really computed in float32; accumulating is a sum
 * with what the result holds. */
static dnnl_status_t make_attributes(const key *key, dnnl_primitive_attr_t *attributes) {
  TRY(dnnl_primitive_attr_create(attributes));
  TRY(dnnl_primitive_attr_set_scratchpad_mode(*attributes, dnnl_scratchpad_mode_user));
  TRY(dnnl_primitive_attr_set_fpmath_mode(*attributes, dnnl_fpmath_mode_strict));
  if (!key->accumulate) return dnnl_success;
  dnnl_post_ops_t operations;
  TRY(dnnl_post_ops_create(&operations));
  dnnl_status_t status = dnnl_post_ops_append_sum(operations, 1.0f);
  if (status == dnnl_success) status = dnnl_primitive_attr_set_post_ops(*attributes, operations);
  dnnl_post_ops_destroy(operations);
  return status;
}

static dnnl_status_t make_matmul(const key *key, const dnnl_memory_desc_t *b,
                                 dnnl_primitive_desc_t *primitive) {
  dnnl_memory_desc_t a, c;
  TRY(describe(&a, key->m, key->k, key->dtype, key->k, 1));
  TRY(describe(&c, key->m, key->n, key->result_dtype, key->n, 1));
  dnnl_matmul_desc_t operation;
  TRY(dnnl_matmul_desc_init(&operation, &a, b, NULL, &c));
  dnnl_primitive_attr_t attributes = NULL;
  dnnl_status_t status = make_attributes(key, &attributes);
  if (status == dnnl_success)
    status = dnnl_primitive_desc_create(primitive, &operation, attributes, engine, NULL);
  if (attributes) dnnl_primitive_attr_destroy(attributes);
  return status;
}

static bool is_reference(dnnl_primitive_desc_t primitive) {
  const char *name = NULL;
  dnnl_primitive_desc_query(primitive, dnnl_query_impl_info_str, 0, (void *)&name);
  return name && strncmp(name, "ref", 3) == 0;
}

/* Asks oneDNN how it wants B. */
static dnnl_status_t fill_layout(entry *entry) {
  const key *key = &entry->key;
  dnnl_dims_t extents = {key->k, key->n};
  dnnl_memory_desc_t any;
  TRY(dnnl_memory_desc_init_by_tag(&any, 2, extents, (dnnl_data_type_t)key->dtype,
                                   dnnl_format_tag_any));
  dnnl_primitive_desc_t primitive;
  TRY(make_matmul(key, &any, &primitive));
  dnnl_status_t status = is_reference(primitive) ? dnnl_unimplemented : dnnl_success;
  const dnnl_memory_desc_t *chosen =
      dnnl_primitive_desc_query_md(primitive, dnnl_query_weights_md, 0);
  if (chosen) entry->layout = *chosen;
  dnnl_primitive_desc_destroy(primitive);
  return status;
}

static dnnl_status_t fill_reorder(entry *entry) {
  const key *key = &entry->key;
  dnnl_memory_desc_t source;
  TRY(describe(&source, key->k, key->n, key->dtype, key->stride_k, key->stride_n));
  dnnl_primitive_desc_t reorder;
  TRY(dnnl_reorder_primitive_desc_create(&reorder, &source, engine, &entry->layout, engine, NULL));
  dnnl_status_t status = dnnl_primitive_create(&entry->primitive, reorder);
  dnnl_primitive_desc_destroy(reorder);
  TRY(status);
  TRY(add_argument(entry, DNNL_ARG_FROM, &source));
  return add_argument(entry, DNNL_ARG_TO, &entry->layout);
}

static dnnl_status_t fill_multiply(entry *entry) {
  const key *key = &entry->key;
  dnnl_primitive_desc_t matmul;
  TRY(make_matmul(key, &entry->layout, &matmul));
  dnnl_status_t status = dnnl_primitive_create(&entry->primitive, matmul);
  const struct {
    int argument;
    dnnl_query_t query;
  } parts[] = {{DNNL_ARG_SRC, dnnl_query_src_md},
               {DNNL_ARG_WEIGHTS, dnnl_query_weights_md},
               {DNNL_ARG_DST, dnnl_query_dst_md},
               {DNNL_ARG_SCRATCHPAD, dnnl_query_scratchpad_md}};
  for (int i = 0; status == dnnl_success && i < MAX_ARGUMENTS; ++i)
    status = add_argument(entry, parts[i].argument,
                          dnnl_primitive_desc_query_md(matmul, parts[i].query, 0));
  const dnnl_memory_desc_t *scratchpad =
      dnnl_primitive_desc_query_md(matmul, dnnl_query_scratchpad_md, 0);
  entry->scratch_bytes = scratchpad ? dnnl_memory_desc_get_size(scratchpad) : 0;
  dnnl_primitive_desc_destroy(matmul);
  return status;
}

static dnnl_status_t fill(entry *entry) {
  static dnnl_status_t (*const makers[])(struct entry *) = {
      [WORK_LAYOUT] = fill_layout, [WORK_REORDER] = fill_reorder, [WORK_MULTIPLY] = fill_multiply};
  return makers[entry->key.work](entry);
}

static bool matches(const entry *entry, const key *key, const dnnl_memory_desc_t *layout) {
  return entry->used && memcmp(&entry->key, key, sizeof *key) == 0 &&
         (!layout || dnnl_memory_desc_equal(&entry->layout, layout));
}

/* Under the lock: a free entry that does this, or else the emptied place that was unused longest.
 */
static entry *find(const key *key, const dnnl_memory_desc_t *layout) {
  entry *oldest = NULL;
  for (entry *e = table; e < table + TABLE_SIZE; ++e) {
    if (e->busy) continue;
    if (matches(e, key, layout)) return e;
    if (!oldest || e->last_use < oldest->last_use) oldest = e;
  }
  if (oldest) clear(oldest);
  return oldest;
}

/* Gives the calling thread an entry of its own that does `key`, until check_in. The entry is made
 * outside the lock, so that a slow compilation stops nobody else. */
static dnnl_status_t check_out(const key *key, const dnnl_memory_desc_t *layout, entry **result) {
  pthread_once(&once, start);
  TRY(start_status);
  pthread_mutex_lock(&lock);
  entry *entry = find(key, layout);
  bool fresh = entry && !entry->used;
  if (entry) {
    entry->busy = true;
    entry->last_use = ++uses;
  }
  pthread_mutex_unlock(&lock);
  if (!entry) return dnnl_runtime_error; /* more threads than places */
  *result = entry;
  if (!fresh) return dnnl_success;
  entry->key = *key;
  if (layout) entry->layout = *layout;
  dnnl_status_t status = fill(entry);
  pthread_mutex_lock(&lock);
  if (status == dnnl_success)
    entry->used = true;
  else
    clear(entry); /* also no longer busy */
  pthread_mutex_unlock(&lock);
  return status;
}

static void check_in(entry *entry) {
  pthread_mutex_lock(&lock);
  entry->busy = false;
  pthread_mutex_unlock(&lock);
}

static dnnl_status_t execute(entry *entry, void *const data[]) {
  for (int i = 0; i < entry->argument_count; ++i)
    TRY(dnnl_memory_set_data_handle(entry->arguments[i].memory, data[i]));
  TRY(dnnl_primitive_execute(entry->primitive, stream, entry->argument_count, entry->arguments));
  return dnnl_stream_wait(stream);
}

static bool plan(int64_t m, int64_t k, int64_t n, attn_dtype dtype, attn_packed *packed) {
  attn_kernel_path least = dtype == ATTN_F32    ? ATTN_PATH_AVX2
                           : dtype == ATTN_BF16 ? ATTN_PATH_AVX512
                                                : ATTN_PATH_COUNT;
  if (attn_get_kernel_path() < least) return false;
  key key = key_of(WORK_LAYOUT, m, k, n, type_of(dtype));
  int before = enter_threads(&key);
  key.result_dtype = key.dtype;
  entry *entry;
  dnnl_status_t status = check_out(&key, NULL, &entry);
  leave_threads(before);
  if (status != dnnl_success) return false;
  *packed = (attn_packed){.product = &attn_product_onednn,
                          .bytes = dnnl_memory_desc_get_size(&entry->layout),
                          .k = k,
                          .n = n,
                          .dtype = dtype};
  memcpy(packed->layout, &entry->layout, sizeof entry->layout);
  check_in(entry);
  return true;
}

static attn_status pack(const attn_packed *packed, const attn_matrix *b) {
  const dnnl_memory_desc_t *layout = (const void *)packed->layout;
  key key = key_of(WORK_REORDER, 0, packed->k, packed->n, type_of(packed->dtype));
  int before = enter_threads(&key);
  key.stride_k = b->stride[0];
  key.stride_n = b->stride[1];
  entry *entry;
  dnnl_status_t status = check_out(&key, layout, &entry);
  if (status == dnnl_success) {
    status = execute(entry, (void *const[]){b->data, packed->data});
    check_in(entry);
  }
  leave_threads(before);
  return failed(status, &key);
}

static dnnl_status_t run(entry *entry, const attn_matrix *a, const attn_packed *packed,
                         const attn_matrix *c, attn_arena *scratch) {
  void *scratchpad = attn_arena_alloc(scratch, entry->scratch_bytes);
  if (!scratchpad) return dnnl_out_of_memory;
  return execute(entry, (void *const[]){a->data, packed->data, c->data, scratchpad});
}

static attn_status multiply(const attn_matrix *a, const attn_packed *packed, const attn_matrix *c,
                            bool accumulate, attn_arena *scratch) {
  const dnnl_memory_desc_t *layout = (const void *)packed->layout;
  key key = key_of(WORK_MULTIPLY, a->rows, packed->k, packed->n, type_of(packed->dtype));
  int before = enter_threads(&key);
  key.result_dtype = (int32_t)type_of(c->dtype);
  key.accumulate = accumulate;
  entry *entry;
  dnnl_status_t status = check_out(&key, layout, &entry);
  if (status == dnnl_success) {
    attn_arena_mark mark = attn_arena_get_mark(scratch);
    status = run(entry, a, packed, c, scratch);
    attn_arena_release(scratch, mark);
    check_in(entry);
  }
  leave_threads(before);
  return failed(status, &key);
}

const attn_product attn_product_onednn = {"oneDNN", plan, pack, multiply};
