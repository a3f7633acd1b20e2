/* What the functions over rows share on the host's side: checks of their operands, and the last
 * step of sums over rows. */
#include "kernels/cuda/rows.cuh"

static const char *name_of(int dtype) {
  static const char *const names[] = {"float64", "float32", "bfloat16", "float16", "int64",
                                      "int32",   "int16",   "int8",     "uint8",   "bool"};
  return dtype >= 0 && dtype < ATTN_DTYPE_COUNT ? names[dtype] : "unknown";
}

static attn_status check_dtype(const char *function, const char *name, const attn_tensor *tensor) {
  if (tensor->dtype == ATTN_F64 || tensor->dtype == ATTN_F32 || tensor->dtype == ATTN_BF16 ||
      tensor->dtype == ATTN_F16)
    return ATTN_OK;
  return attn_cuda_fail(ATTN_UNSUPPORTED,
                        "%s: %s is %s; expected float64, float32, bfloat16 or float16", function,
                        name, name_of(tensor->dtype));
}

attn_status attn_cuda_check_operand(const char *function, const char *name,
                                    const attn_tensor *tensor, const attn_tensor *shape) {
  if (!tensor) return ATTN_OK;
  ATTN_CUDA_CHECK(check_dtype(function, name, tensor));
  if (tensor->rank != shape->rank)
    return attn_cuda_fail(ATTN_INVALID_SHAPE, "%s: %s has rank %d, expected %d", function, name,
                          tensor->rank, shape->rank);
  for (int i = 0; i < shape->rank; ++i)
    if (tensor->shape[i] != shape->shape[i])
      return attn_cuda_fail(ATTN_INVALID_SHAPE, "%s: axis %d of %s is %lld, expected %lld",
                            function, i, name, (long long)tensor->shape[i],
                            (long long)shape->shape[i]);
  return ATTN_OK;
}

attn_status attn_cuda_check_vector(const char *function, const char *name,
                                   const attn_tensor *tensor, int64_t n) {
  if (!tensor) return ATTN_OK;
  ATTN_CUDA_CHECK(check_dtype(function, name, tensor));
  if (tensor->rank != 1 || tensor->shape[0] != n)
    return attn_cuda_fail(ATTN_INVALID_SHAPE,
                          "%s: %s has rank %d and %lld elements, expected a "
                          "vector of %lld",
                          function, name, tensor->rank,
                          tensor->rank > 0 ? (long long)tensor->shape[0] : 1ll, (long long)n);
  return ATTN_OK;
}

attn_status attn_cuda_count_rows(const char *function, const attn_tensor *tensor, int64_t *rows) {
  if (tensor->rank < 1)
    return attn_cuda_fail(ATTN_INVALID_SHAPE, "%s: a scalar has no rows", function);
  *rows = 1;
  for (int i = 0; i + 1 < tensor->rank; ++i) *rows *= tensor->shape[i];
  if (*rows > INT32_MAX)
    return attn_cuda_fail(ATTN_INVALID_SHAPE, "%s: %lld rows; up to %d are offered", function,
                          (long long)*rows, INT32_MAX);
  return ATTN_OK;
}

/* A block adds 32 columns: thread (x, y) the y-th run of parts of column x. */
static __global__ void __launch_bounds__(1024)
    add_parts(operand y, bool accumulate, const double *partial, int parts, int64_t n) {
  __shared__ double run[WARP][WARP];
  int64_t column = (int64_t)blockIdx.x * WARP + threadIdx.x;
  int from = threadIdx.y * parts / WARP, to = (threadIdx.y + 1) * parts / WARP;
  double sum = 0;
  if (column < n)
#pragma unroll 4
    for (int part = from; part < to; ++part) sum += partial[part * n + column];
  run[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= n) return;
  for (int i = 1; i < WARP; ++i) sum += run[i][threadIdx.x];
  char *place = y.data + column * y.step;
  if (accumulate) sum += load_element<double>(place, y.dtype, 0);
  store_element<double>(place, y.dtype, 0, sum);
}

attn_status attn_cuda_add_parts(const attn_tensor *y, bool accumulate, const double *partial,
                                int parts, cudaStream_t stream) {
  int64_t n = y->shape[0];
  add_parts<<<(unsigned)((n + WARP - 1) / WARP), dim3(WARP, WARP), 0, stream>>>(
      operand_of(y), accumulate, partial, parts, n);
  ATTN_CUDA_TRY_LAUNCH("add_parts");
  return ATTN_OK;
}
