/* Dense products (dense.h). cuBLASLt does those of many rows; it is loaded at the first product, so
 * that the module needs no CUDA library at start. One to eight rows times the transpose of a weight
 * (decode) go to kernels of ours (dense_rows.cu), which read the weight at memory speed.
 *
 * cuBLASLt is column-major: a row-major matrix is its transpose there, so c = op(a) op(b) is asked
 * for as c^T = op(b)^T op(a)^T with the operands as they are. */
#include "kernels/cuda/dense.cuh"

#include <cublasLt.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <string>

/* --- The library --------------------------------------------------------------------------------
 */

#define CUBLASLT_FUNCTIONS(F)                                                                      \
  F(cublasLtCreate)                                                                                \
  F(cublasLtDestroy)                                                                               \
  F(cublasLtMatmul)                                                                                \
  F(cublasLtMatmulAlgoGetHeuristic)                                                                \
  F(cublasLtMatmulDescInit_internal)                                                               \
  F(cublasLtMatmulDescSetAttribute)                                                                \
  F(cublasLtMatrixLayoutInit_internal)                                                             \
  F(cublasLtMatrixLayoutSetAttribute)                                                              \
  F(cublasLtMatmulPreferenceInit_internal)                                                         \
  F(cublasLtMatmulPreferenceSetAttribute)                                                          \
  F(cublasLtGetStatusString)

#define MEMBER(name) decltype(&::name) name;
struct cublaslt {
  CUBLASLT_FUNCTIONS(MEMBER)
};
#undef MEMBER

static cublaslt lt;
static std::string lt_problem; /* why it is not there; empty: it is */

static void load_library(void) {
  static const char *const names[] = {
      "libcublasLt.so.13",
      "libcublasLt.so",
      "/usr/local/cuda/lib64/libcublasLt.so.13",
      "/usr/local/cuda/lib64/libcublasLt.so",
  };
  void *library = NULL;
  for (const char *name : names) {
    library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (library) break;
    const char *why = dlerror();
    if (lt_problem.empty()) lt_problem = why ? why : name;
  }
  if (!library) return;
  lt_problem.clear();
#define LOAD(name)                                                                                 \
  lt.name = (decltype(lt.name))dlsym(library, #name);                                              \
  if (!lt.name) lt_problem = "it has no " #name;
  CUBLASLT_FUNCTIONS(LOAD)
#undef LOAD
}

static attn_status find_library(void) {
  static std::once_flag once;
  std::call_once(once, load_library);
  if (lt_problem.empty()) return ATTN_OK;
  return attn_cuda_fail(ATTN_NOT_FOUND,
                        "dense: cuBLASLt 13 cannot be loaded: %s. It comes with the CUDA toolkit; "
                        "LD_LIBRARY_PATH can say where it is",
                        lt_problem.c_str());
}

static attn_status check(cublasStatus_t status, const char *what) {
  if (status == CUBLAS_STATUS_SUCCESS) return ATTN_OK;
  return attn_cuda_fail(status == CUBLAS_STATUS_ALLOC_FAILED ? ATTN_OUT_OF_MEMORY : ATTN_INTERNAL,
                        "dense: %s (in %s)", lt.cublasLtGetStatusString(status), what);
}

#define TRY_LT(call) ATTN_CUDA_CHECK(check(lt.call, #call))

/* --- Algorithms chosen so far -------------------------------------------------------------------
 */

/* All that the choice depends on; compared as bytes. */
struct problem {
  int64_t m, n, k, batch;
  int64_t ld_a, ld_b, ld_c, stride_a, stride_b, stride_c; /* elements */
  int32_t dtype, dtype_c;
  int32_t transpose_a, transpose_b, accumulate;
  int32_t aligned_a, aligned_b, aligned_c; /* bytes, at most 256 */
};

struct entry {
  entry *next;
  problem key;
  cublasLtMatmulDescOpaque_t product;
  cublasLtMatrixLayoutOpaque_t a, b, c;
  cublasLtMatmulAlgo_t algorithm;
};

enum { BUCKETS = 1024, RESULTS = 8 /* of a heuristic */ };
static const size_t WORKSPACE_BYTES = (size_t)32 << 20;

struct attn_cuda_dense {
  int device, multiprocessors;
  cublasLtHandle_t handle;
  void *workspace;
  std::mutex mutex; /* of the buckets */
  entry *buckets[BUCKETS];
};

static uint64_t hash_of(const problem &key) { /* FNV-1a */
  uint64_t hash = 14695981039346656037ull;
  for (size_t i = 0; i < sizeof key; ++i)
    hash = (hash ^ ((const unsigned char *)&key)[i]) * 1099511628211ull;
  return hash;
}

static cudaDataType data_type(int dtype) {
  return dtype == ATTN_F64    ? CUDA_R_64F
         : dtype == ATTN_F32  ? CUDA_R_32F
         : dtype == ATTN_BF16 ? CUDA_R_16BF
                              : CUDA_R_16F;
}

/* The layout of a row-major matrix [rows, columns]: column-major [columns, rows]. */
static attn_status make_layout(cublasLtMatrixLayoutOpaque_t *layout, int dtype, int64_t rows,
                               int64_t columns, int64_t ld, int64_t batch, int64_t stride) {
  int32_t count = (int32_t)batch;
  TRY_LT(cublasLtMatrixLayoutInit_internal(layout, sizeof *layout, data_type(dtype),
                                           (uint64_t)columns, (uint64_t)rows, ld));
  TRY_LT(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count,
                                          sizeof count));
  TRY_LT(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                          &stride, sizeof stride));
  return ATTN_OK;
}

/* The first of the heuristic's list whose tiles are not too large, where there is one. On an H200
 * cuBLASLt 13.0 puts tiles of 256 x 128, 192 x 192 and 320 x 128 first for many shapes; by
 * themselves, those of 128 x 128 to 176 x 128 took up to 16 % less time. Inside a training step the
 * products that had 192 x 192 took a tenth less; the lower limit for results of 16 bits made no
 * difference to a step in windows of 2 048 (98 ms) and one below the noise, 1 %, at 16 384. For
 * float32 the lower limit was tried and changed nothing. The choice depends on the problem alone,
 * not on a clock, so that bits repeat. The area of a tile follows from the number of waves. */
static int best_of(const attn_cuda_dense *dense, const problem &key,
                   const cublasLtMatmulHeuristicResult_t *result, int found) {
  const double largest =
      key.dtype_c == ATTN_F32 ? 33000 : 23000; /* elements: 256 x 128, 176 x 128 */
  double outputs = (double)key.m * (double)key.n * (double)key.batch;
  for (int i = 0; i < found; ++i) {
    double tiles = (double)result[i].wavesCount * dense->multiprocessors;
    if (result[i].state == CUBLAS_STATUS_SUCCESS && outputs <= tiles * largest) return i;
  }
  return 0;
}

/* Fills in an entry for its key. In cuBLASLt's terms b is A and a is B. */
static attn_status choose(attn_cuda_dense *dense, entry *chosen) {
  const problem &key = chosen->key;
  bool wide = key.dtype == ATTN_F64;
  TRY_LT(cublasLtMatmulDescInit_internal(&chosen->product, sizeof chosen->product,
                                         wide ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F,
                                         wide ? CUDA_R_64F : CUDA_R_32F));
  cublasOperation_t op_a = key.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
  cublasOperation_t op_b = key.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;
  TRY_LT(cublasLtMatmulDescSetAttribute(&chosen->product, CUBLASLT_MATMUL_DESC_TRANSA, &op_a,
                                        sizeof op_a));
  TRY_LT(cublasLtMatmulDescSetAttribute(&chosen->product, CUBLASLT_MATMUL_DESC_TRANSB, &op_b,
                                        sizeof op_b));
  ATTN_CUDA_CHECK(make_layout(&chosen->a, key.dtype, key.transpose_b ? key.n : key.k,
                              key.transpose_b ? key.k : key.n, key.ld_b, key.batch, key.stride_b));
  ATTN_CUDA_CHECK(make_layout(&chosen->b, key.dtype, key.transpose_a ? key.k : key.m,
                              key.transpose_a ? key.m : key.k, key.ld_a, key.batch, key.stride_a));
  ATTN_CUDA_CHECK(
      make_layout(&chosen->c, key.dtype_c, key.m, key.n, key.ld_c, key.batch, key.stride_c));

  cublasLtMatmulPreferenceOpaque_t preference;
  TRY_LT(cublasLtMatmulPreferenceInit_internal(&preference, sizeof preference));
  /* Parts of a sum over k are added in a fixed order and in float32, never in c's own dtype. */
  uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  const uint32_t aligned[] = {(uint32_t)key.aligned_b, (uint32_t)key.aligned_a,
                              (uint32_t)key.aligned_c, (uint32_t)key.aligned_c};
  const cublasLtMatmulPreferenceAttributes_t alignments[] = {
      CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
      CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
  TRY_LT(cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                              &WORKSPACE_BYTES, sizeof WORKSPACE_BYTES));
  TRY_LT(cublasLtMatmulPreferenceSetAttribute(
      &preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reduction, sizeof reduction));
  for (int i = 0; i < 4; ++i)
    TRY_LT(cublasLtMatmulPreferenceSetAttribute(&preference, alignments[i], &aligned[i],
                                                sizeof aligned[i]));
  cublasLtMatmulHeuristicResult_t result[RESULTS];
  int found = 0;
  cublasStatus_t status = lt.cublasLtMatmulAlgoGetHeuristic(
      dense->handle, &chosen->product, &chosen->a, &chosen->b, &chosen->c, &chosen->c, &preference,
      RESULTS, result, &found);
  if (status != CUBLAS_STATUS_SUCCESS || found == 0)
    return attn_cuda_fail(ATTN_UNSUPPORTED,
                          "dense: cuBLASLt has no way to multiply [%lld, %lld] by [%lld, %lld] "
                          "(leading dimensions %lld, %lld, %lld; batch %lld; dtypes %d to %d): %s",
                          (long long)key.m, (long long)key.k, (long long)key.k, (long long)key.n,
                          (long long)key.ld_a, (long long)key.ld_b, (long long)key.ld_c,
                          (long long)key.batch, key.dtype, key.dtype_c,
                          lt.cublasLtGetStatusString(status));
  chosen->algorithm = result[best_of(dense, key, result, found)].algo;
  return ATTN_OK;
}

static attn_status find(attn_cuda_dense *dense, const problem &key, const entry **found) {
  std::lock_guard<std::mutex> lock(dense->mutex);
  entry **bucket = &dense->buckets[hash_of(key) % BUCKETS];
  for (entry *at = *bucket; at; at = at->next)
    if (memcmp(&at->key, &key, sizeof key) == 0) {
      *found = at;
      return ATTN_OK;
    }
  entry *fresh = new (std::nothrow) entry();
  if (!fresh) return attn_cuda_fail(ATTN_OUT_OF_MEMORY, "dense: out of memory");
  fresh->key = key;
  attn_status status = choose(dense, fresh);
  if (status != ATTN_OK) {
    delete fresh;
    return status;
  }
  fresh->next = *bucket;
  *found = *bucket = fresh;
  return ATTN_OK;
}

/* --- The module's functions ---------------------------------------------------------------------
 */

attn_status attn_cuda_dense_create(const attn_cuda_device *device, attn_cuda_dense **dense) {
  *dense = NULL;
  ATTN_CUDA_CHECK(find_library());
  ATTN_CUDA_TRY(cudaSetDevice(device->index));
  attn_cuda_dense *fresh = new (std::nothrow) attn_cuda_dense();
  if (!fresh) return attn_cuda_fail(ATTN_OUT_OF_MEMORY, "dense: out of memory");
  fresh->device = device->index;
  fresh->multiprocessors = device->multiprocessors;
  cudaError_t error = cudaMalloc(&fresh->workspace, WORKSPACE_BYTES);
  if (error == cudaErrorMemoryAllocation && attn_cuda_return_cached(device->index) == cudaSuccess)
    error = cudaMalloc(&fresh->workspace, WORKSPACE_BYTES);
  attn_status status = attn_cuda_check(error, "cudaMalloc of cuBLASLt's workspace");
  if (status == ATTN_OK) status = check(lt.cublasLtCreate(&fresh->handle), "cublasLtCreate");
  if (status == ATTN_OK)
    *dense = fresh;
  else
    attn_cuda_dense_destroy(fresh);
  return status;
}

void attn_cuda_dense_destroy(attn_cuda_dense *dense) {
  if (!dense) return;
  cudaSetDevice(dense->device);
  if (dense->handle) lt.cublasLtDestroy(dense->handle);
  cudaFree(dense->workspace);
  for (entry *at : dense->buckets)
    while (at) {
      entry *next = at->next;
      delete at;
      at = next;
    }
  delete dense;
}

/* A matrix or a batch of them as cuBLASLt takes it. */
struct matrix {
  int64_t rows, columns, ld, batch, stride;
};

/* Refuses what has no contiguous axis; a matrix whose rows are is taken as its transpose where
 * `transpose` can say so. */
static attn_status describe(const char *name, const attn_tensor *tensor, int rank, bool *transpose,
                            matrix *as) {
  if (tensor->rank != rank || rank < 2 || rank > 3)
    return attn_cuda_fail(ATTN_INVALID_SHAPE,
                          "matmul: %s has rank %d; expected 2 for all operands, or 3", name,
                          tensor->rank);
  int64_t rows = tensor->shape[rank - 2], columns = tensor->shape[rank - 1];
  int64_t row_stride = tensor->stride[rank - 2], step = tensor->stride[rank - 1];
  if (step != 1 && columns != 1) {
    if (!transpose || (row_stride != 1 && rows != 1))
      return attn_cuda_fail(ATTN_INVALID_SHAPE,
                            "matmul: elements of a row of %s are %lld apart, "
                            "expected 1",
                            name, (long long)step);
    *transpose = !*transpose;
    int64_t kept = rows;
    rows = columns;
    columns = kept;
    row_stride = step;
  }
  /* With one row its stride says nothing. */
  if (rows == 1 || row_stride < columns) {
    if (rows > 1)
      return attn_cuda_fail(ATTN_INVALID_SHAPE,
                            "matmul: rows of %s overlap: they are %lld apart and %lld long", name,
                            (long long)row_stride, (long long)columns);
    row_stride = columns;
  }
  *as = matrix{rows, columns, row_stride > 0 ? row_stride : 1, rank == 3 ? tensor->shape[0] : 1,
               rank == 3 ? tensor->stride[0] : 0};
  return ATTN_OK;
}

static int32_t alignment_of(const attn_tensor *tensor, const matrix &as) {
  int64_t bytes = dtype_bytes(tensor->dtype);
  uint64_t all = (uint64_t)(uintptr_t)tensor->data | (uint64_t)(as.ld * bytes) |
                 (as.batch > 1 ? (uint64_t)(as.stride * bytes) : 0) | 256;
  return (int32_t)(all & (~all + 1)); /* its lowest bit */
}

attn_status attn_cuda_matmul(attn_cuda_dense *dense, const attn_tensor *a, bool transpose_a,
                             const attn_tensor *b, bool transpose_b, const attn_tensor *c,
                             bool accumulate, attn_cuda_stream stream) {
  ATTN_CUDA_CHECK(attn_cuda_check_operand("matmul", "a", a, a));
  ATTN_CUDA_CHECK(attn_cuda_check_operand("matmul", "b", b, b));
  ATTN_CUDA_CHECK(attn_cuda_check_operand("matmul", "c", c, c));
  if (a->dtype != b->dtype || (c->dtype != a->dtype && c->dtype != ATTN_F32) ||
      (is_wide(a) && !is_wide(c)))
    return attn_cuda_fail(ATTN_UNSUPPORTED,
                          "matmul: dtypes %d, %d and %d; a and b must have one dtype and c that or "
                          "float32 (float64 with float64 only)",
                          (int)a->dtype, (int)b->dtype, (int)c->dtype);
  matrix as_a, as_b, as_c;
  ATTN_CUDA_CHECK(describe("a", a, c->rank, &transpose_a, &as_a));
  ATTN_CUDA_CHECK(describe("b", b, c->rank, &transpose_b, &as_b));
  ATTN_CUDA_CHECK(describe("c", c, c->rank, NULL, &as_c));
  int64_t m = as_c.rows, n = as_c.columns;
  int64_t k = transpose_a ? as_a.rows : as_a.columns;
  if ((transpose_a ? as_a.columns : as_a.rows) != m ||
      (transpose_b ? as_b.rows : as_b.columns) != n ||
      (transpose_b ? as_b.columns : as_b.rows) != k || as_a.batch != as_c.batch ||
      as_b.batch != as_c.batch)
    return attn_cuda_fail(ATTN_INVALID_SHAPE,
                          "matmul: a [%lld, %lld]%s times b [%lld, %lld]%s is no [%lld, %lld] "
                          "(batches %lld, %lld, %lld)",
                          (long long)as_a.rows, (long long)as_a.columns, transpose_a ? "^T" : "",
                          (long long)as_b.rows, (long long)as_b.columns, transpose_b ? "^T" : "",
                          (long long)m, (long long)n, (long long)as_a.batch, (long long)as_b.batch,
                          (long long)as_c.batch);
  if (m == 0 || n == 0 || as_c.batch == 0) return ATTN_OK;
  cudaStream_t queue = (cudaStream_t)stream;
  ATTN_CUDA_TRY(cudaSetDevice(dense->device));
  if (k == 0) {
    size_t bytes = (size_t)dtype_bytes(c->dtype);
    for (int64_t i = 0; i < as_c.batch && !accumulate; ++i)
      ATTN_CUDA_TRY(cudaMemset2DAsync((char *)c->data + (size_t)(i * as_c.stride) * bytes,
                                      (size_t)as_c.ld * bytes, 0, (size_t)n * bytes, (size_t)m,
                                      queue));
    return ATTN_OK;
  }
  if (m <= FEW_ROWS && !transpose_a && (transpose_b || as_c.batch > 1) && as_c.batch <= 65535) {
    const few_rows_problem few = {m,           n,           k,          as_c.batch,
                                  as_a.ld,     as_b.ld,     as_c.ld,    as_a.stride,
                                  as_b.stride, as_c.stride, transpose_b};
    return attn_cuda_few_rows(&few, a, b, c, accumulate, queue);
  }
  problem key;
  memset(&key, 0, sizeof key);
  key.m = m;
  key.n = n;
  key.k = k;
  key.batch = as_c.batch;
  key.ld_a = as_a.ld;
  key.ld_b = as_b.ld;
  key.ld_c = as_c.ld;
  key.stride_a = as_a.stride;
  key.stride_b = as_b.stride;
  key.stride_c = as_c.stride;
  key.dtype = a->dtype;
  key.dtype_c = c->dtype;
  key.transpose_a = transpose_a;
  key.transpose_b = transpose_b;
  key.accumulate = accumulate;
  key.aligned_a = alignment_of(a, as_a);
  key.aligned_b = alignment_of(b, as_b);
  key.aligned_c = alignment_of(c, as_c);
  const entry *use = NULL;
  ATTN_CUDA_CHECK(find(dense, key, &use));
  const double wide_one = 1, wide_beta = accumulate ? 1 : 0;
  const float one = 1, beta = accumulate ? 1 : 0;
  bool wide = is_wide(a);
  TRY_LT(cublasLtMatmul(
      dense->handle, (cublasLtMatmulDesc_t)&use->product, wide ? (const void *)&wide_one : &one,
      b->data, (cublasLtMatrixLayout_t)&use->a, a->data, (cublasLtMatrixLayout_t)&use->b,
      wide ? (const void *)&wide_beta : &beta, c->data, (cublasLtMatrixLayout_t)&use->c, c->data,
      (cublasLtMatrixLayout_t)&use->c, &use->algorithm, dense->workspace, WORKSPACE_BYTES, queue));
  return ATTN_OK;
}
