/* Cross-entropy over rows of logits and its gradient (rows.h), a block a row, in two passes: one
 * that keeps a running maximum m and sum s of exp(z - m) (Milakov and Gimelshein, arXiv
 * 1805.02867), and one that writes scale (exp(z - m) / s - onehot). */
#include "kernels/cuda/rows.cuh"

enum { THREADS = 512, WARPS = THREADS / WARP };

static __device__ inline float exponential(float x) {
  return expf(x);
}
static __device__ inline double exponential(double x) {
  return exp(x);
}

template <class real> struct running { real greatest, sum; };

template <class real> static __device__ inline real lowest() {
  return (real)-INFINITY;
}

/* exp(from - to) for a maximum that rose; 0 where nothing was seen before. */
template <class real> static __device__ inline real lowered(real from, real to) {
  return from == lowest<real>() ? (real)0 : exponential(from - to);
}

template <class real>
static __device__ inline running<real> join(const running<real> &a, const running<real> &b) {
  running<real> both;
  both.greatest = a.greatest > b.greatest ? a.greatest : b.greatest;
  both.sum =
      a.sum * lowered(a.greatest, both.greatest) + b.sum * lowered(b.greatest, both.greatest);
  return both;
}

/* Walk: z, dz. */
template <class real, int V>
static __global__ void __launch_bounds__(THREADS)
    cross_entropy_rows(const __grid_constant__ walk<2> rows, operand z, operand dz, int64_t n,
                       const int32_t *targets, double scale, double *losses) {
  __shared__ running<real> shared[WARPS];
  uint32_t row = blockIdx.x;
  coordinates c = locate(rows, row);
  const char *from = z.data + offset_of(rows, c, 0);
  char *to = dz.data + offset_of(rows, c, 1);
  int64_t target = targets[row];
  constexpr int64_t STRIDE = (int64_t)THREADS * V;
  if (target < 0) {
    const real zeros[V] = {};
    for (int64_t i = (int64_t)threadIdx.x * V; i < n; i += STRIDE)
      store_all<real, V>(to + i * dz.step, dz.dtype, zeros);
    if (threadIdx.x == 0 && losses) losses[row] = 0;
    return;
  }
  constexpr int AHEAD = V == VECTOR ? 2 : 4; /* loads in flight together */
  running<real> mine = {lowest<real>(), 0};
  for (int64_t start = (int64_t)threadIdx.x * V; start < n; start += AHEAD * STRIDE) {
    real x[AHEAD][V];
    raw_vector raw[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {
      int64_t i = start + j * STRIDE;
#pragma unroll
      for (int e = 0; e < V; ++e) x[j][e] = lowest<real>();
      if (i >= n) continue;
      if constexpr (V == VECTOR)
        raw[j] = load_raw(from + i * z.step, z.dtype);
      else
        x[j][0] = load_element<real>(from + i * z.step, z.dtype, 0);
    }
    real greatest = mine.greatest;
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {
      if constexpr (V == VECTOR)
        if (start + j * STRIDE < n) unpack(x[j], raw[j], z.dtype);
#pragma unroll
      for (int e = 0; e < V; ++e) greatest = x[j][e] > greatest ? x[j][e] : greatest;
    }
    real base = greatest == lowest<real>() ? (real)0 : greatest;
    mine.sum *= lowered(mine.greatest, base);
    mine.greatest = greatest;
#pragma unroll
    for (int j = 0; j < AHEAD; ++j)
#pragma unroll
      for (int e = 0; e < V; ++e) mine.sum += exponential(x[j][e] - base);
  }
#pragma unroll
  for (int step = 1; step < WARP; step *= 2) {
    running<real> other = {__shfl_xor_sync(~0u, mine.greatest, step),
                           __shfl_xor_sync(~0u, mine.sum, step)};
    mine = join(mine, other);
  }
  if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = mine;
  __syncthreads();
  mine = shared[0];
  for (int w = 1; w < WARPS; ++w) mine = join(mine, shared[w]);
  real at_target = load_element<real>(from + target * z.step, z.dtype, 0);
  __syncthreads(); /* dz may be z: everybody has read the target's logit */
  if (threadIdx.x == 0 && losses)
    losses[row] = log((double)mine.sum) + (double)mine.greatest - (double)at_target;
  real factor = (real)(scale / (double)mine.sum);
  for (int64_t start = (int64_t)threadIdx.x * V; start < n; start += AHEAD * STRIDE) {
    real x[AHEAD][V];
    raw_vector raw[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {
      int64_t i = start + j * STRIDE;
      if (i >= n) continue;
      if constexpr (V == VECTOR)
        raw[j] = load_raw(from + i * z.step, z.dtype);
      else
        x[j][0] = load_element<real>(from + i * z.step, z.dtype, 0);
    }
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {
      int64_t i = start + j * STRIDE;
      if (i >= n) continue;
      if constexpr (V == VECTOR) unpack(x[j], raw[j], z.dtype);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        x[j][e] = factor * exponential(x[j][e] - mine.greatest);
        if (i + e == target) x[j][e] -= (real)scale;
      }
      store_all<real, V>(to + i * dz.step, dz.dtype, x[j]);
    }
  }
}

attn_status attn_cuda_cross_entropy(const attn_tensor *z, const int32_t *targets, double scale,
                                    const attn_tensor *dz, double *losses,
                                    attn_cuda_stream stream) {
  if (!dz) dz = z;
  ATTN_CUDA_CHECK(attn_cuda_check_operand("cross_entropy", "z", z, z));
  ATTN_CUDA_CHECK(attn_cuda_check_operand("cross_entropy", "dz", dz, z));
  int64_t rows;
  ATTN_CUDA_CHECK(attn_cuda_count_rows("cross_entropy", z, &rows));
  int64_t n = z->shape[z->rank - 1];
  if (rows == 0 || n == 0) return ATTN_OK;
  bool wide = is_wide(z), vectors = rows_are_vectors(z) && rows_are_vectors(dz);
  auto kernel = wide      ? cross_entropy_rows<double, 1>
                : vectors ? cross_entropy_rows<float, VECTOR>
                          : cross_entropy_rows<float, 1>;
  kernel<<<(unsigned)rows, THREADS, 0, (cudaStream_t)stream>>>(
      walk_rows<2>(z, {z, dz}), operand_of(z), operand_of(dz), n, targets, scale, losses);
  ATTN_CUDA_TRY_LAUNCH("cross_entropy");
  return ATTN_OK;
}
