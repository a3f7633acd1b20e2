/* Rotary embedding by tables of angles (rows.h): one pass over the elements, forward and, turned
 * the other way, backward. */
#include "kernels/cuda/rows.cuh"

namespace {

enum { THREADS = 256, OPERANDS = 4 }; /* y, x, cosines, sines */

struct rotation {
  operand y, x, cosines, sines;
  walk<OPERANDS> rows;
  division pieces; /* of a row: pairs of vectors that turn, then vectors that do not */
  uint32_t count;  /* of pieces in all rows */
  int turning, half;
  double direction;
  bool accumulate;
};

template <class real, int V>
__device__ __forceinline__ void put(const rotation &p, char *place, real (&value)[V]) {
  if (p.accumulate) {
    real before[V];
    load_all<real, V>(before, place, p.y.dtype);
#pragma unroll
    for (int i = 0; i < V; ++i) value[i] += before[i];
  }
  store_all<real, V>(place, p.y.dtype, value);
}

template <class real, int V> __global__ void __launch_bounds__(THREADS) rotate_rows(rotation p) {
  const uint32_t index = blockIdx.x * THREADS + threadIdx.x;
  if (index >= p.count) return;
  const uint32_t row = divide(index, p.pieces);
  const int piece = (int)(index - row * p.pieces.divisor);
  const coordinates at = locate(p.rows, row);
  const int x_bytes = dtype_bytes(p.x.dtype), y_bytes = dtype_bytes(p.y.dtype);
  const char *x = p.x.data + offset_of(p.rows, at, 1);
  char *y = p.y.data + offset_of(p.rows, at, 0);
  if (piece >= p.turning) {
    const int c = 2 * p.half + (piece - p.turning) * V;
    real value[V];
    load_all<real, V>(value, x + c * x_bytes, p.x.dtype);
    put<real, V>(p, y + c * y_bytes, value);
    return;
  }
  const int c = piece * V;
  real low[V], high[V], cosine[V], sine[V];
  load_all<real, V>(low, x + c * x_bytes, p.x.dtype);
  load_all<real, V>(high, x + (p.half + c) * x_bytes, p.x.dtype);
  load_all<real, V>(cosine,
                    p.cosines.data + offset_of(p.rows, at, 2) + c * dtype_bytes(p.cosines.dtype),
                    p.cosines.dtype);
  load_all<real, V>(sine, p.sines.data + offset_of(p.rows, at, 3) + c * dtype_bytes(p.sines.dtype),
                    p.sines.dtype);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const real turned = (real)p.direction * sine[i], first = low[i];
    low[i] = first * cosine[i] - high[i] * turned;
    high[i] = high[i] * cosine[i] + first * turned;
  }
  put<real, V>(p, y + c * y_bytes, low);
  put<real, V>(p, y + (p.half + c) * y_bytes, high);
}

} // namespace

attn_status attn_cuda_rotate(const attn_tensor *y, bool accumulate, const attn_tensor *x,
                             const attn_tensor *cosines, const attn_tensor *sines, double direction,
                             attn_cuda_stream stream) {
  ATTN_CUDA_CHECK(attn_cuda_check_operand("rotate", "y", y, y));
  ATTN_CUDA_CHECK(attn_cuda_check_operand("rotate", "x", x, y));
  ATTN_CUDA_CHECK(attn_cuda_check_operand("rotate", "sines", sines, cosines));
  const int inner = y->rank - 1;
  bool fits = cosines->rank == y->rank && 2 * cosines->shape[inner] <= y->shape[inner];
  for (int i = 0; fits && i < inner; ++i) fits = cosines->shape[i] == y->shape[i];
  const attn_tensor *const all[OPERANDS] = {y, x, cosines, sines};
  for (const attn_tensor *tensor : all)
    fits = fits && (tensor->stride[inner] == 1 || tensor->shape[inner] == 1);
  if (!fits)
    return attn_cuda_fail(ATTN_INVALID_SHAPE,
                          "rotate: cosines have rows of %lld for rows of %lld, expected the same "
                          "rows, half as wide at most, contiguous",
                          (long long)cosines->shape[inner], (long long)y->shape[inner]);
  int64_t rows;
  ATTN_CUDA_CHECK(attn_cuda_count_rows("rotate", y, &rows));
  const int64_t half = cosines->shape[inner], rest = y->shape[inner] - 2 * half;
  if (rows == 0 || half + rest == 0) return ATTN_OK;
  bool vectors = half % VECTOR == 0, wide = false;
  for (const attn_tensor *tensor : all) {
    vectors = vectors && rows_are_vectors(tensor);
    wide = wide || is_wide(tensor);
  }
  const int width = vectors ? VECTOR : 1;
  rotation p = {operand_of(y), operand_of(x), operand_of(cosines), operand_of(sines)};
  p.rows = walk_rows<OPERANDS>(y, all);
  p.turning = (int)(half / width);
  p.half = (int)half;
  p.direction = direction;
  p.accumulate = accumulate;
  const int64_t pieces = (half + rest) / width;
  if (rows * pieces > INT32_MAX)
    return attn_cuda_fail(ATTN_UNSUPPORTED, "rotate: %lld elements are too many for one call",
                          (long long)(rows * y->shape[inner]));
  p.pieces = make_division(pieces);
  p.count = (uint32_t)(rows * pieces);
  auto kernel = wide      ? rotate_rows<double, 1>
                : vectors ? rotate_rows<float, VECTOR>
                          : rotate_rows<float, 1>;
  kernel<<<(p.count + THREADS - 1) / THREADS, THREADS, 0, (cudaStream_t)stream>>>(p);
  ATTN_CUDA_TRY_LAUNCH("rotate");
  return ATTN_OK;
}
