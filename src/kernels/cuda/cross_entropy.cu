/* Cross-entropy over rows of logits and its gradient (rows.h), a block a row, in two passes: one
 * that keeps a running maximum m and sum s of exp(z - m) (Milakov and Gimelshein, arXiv
 * 1805.02867), and one that writes scale (exp(z - m) / s - onehot). Shared memory keeps what it can
 * of a row for the second pass: the rows of all blocks together are more than the L2 holds. Short
 * rows stay in the registers of a warp. */
#include "kernels/cuda/rows.cuh"

enum {
  THREADS = 512,
  WARPS = THREADS / WARP,
  SHORT_THREADS = 256,
  SHORT_VECTORS = 4,          /* of a lane */
  KEPT_BYTES = 96 * 1024,     /* of a row in shared memory: two blocks a processor */
  WORTH_KEEPING = THREADS * 8 /* elements */
};

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
/* What is kept in shared memory need not stay in the L2. */
static __device__ inline raw_vector load_once(const void *place) {
  return raw_vector{__ldcs((const uint4 *)place), __ldcs((const uint4 *)place + 1)};
}

template <class real, int V>
static __global__ void __launch_bounds__(THREADS)
    cross_entropy_rows(const __grid_constant__ walk<2> rows, operand z, operand dz, int64_t n,
                       const int32_t *targets, double scale, double *losses, int kept) {
  __shared__ running<real> shared[WARPS];
  extern __shared__ uint4 row_start[]; /* the first `kept` elements, float32 as they are */
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
  constexpr int AHEAD = V == VECTOR || sizeof(real) == 8 ? 2 : 4; /* loads in flight together */
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
        raw[j] = i < kept ? load_once(from + i * z.step) : load_raw(from + i * z.step, z.dtype);
      else
        x[j][0] = load_element<real>(from + i * z.step, z.dtype, 0);
    }
    real greatest = mine.greatest;
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {
      int64_t i = start + j * STRIDE;
      if constexpr (V == VECTOR) {
        if (i < n) unpack(x[j], raw[j], z.dtype);
        if (i < kept) {
          row_start[i / 4] = raw[j].low;
          row_start[i / 4 + 1] = raw[j].high;
        }
      }
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
  /* dz of a smaller dtype in z's own memory overtakes nobody: what a step of all threads writes was
   * read in this step or before. */
  bool shrinks = to == from && dz.dtype != z.dtype;
  for (int64_t first = 0; first < n; first += AHEAD * STRIDE) {
    int64_t start = first + (int64_t)threadIdx.x * V;
    real x[AHEAD][V];
    raw_vector raw[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {
      int64_t i = start + j * STRIDE;
      if (i >= n) continue;
      if constexpr (V == VECTOR) {
        if (i < kept)
          raw[j] = raw_vector{row_start[i / 4], row_start[i / 4 + 1]}; /* by this thread */
        else
          raw[j] = load_raw(from + i * z.step, z.dtype);
      } else {
        x[j][0] = load_element<real>(from + i * z.step, z.dtype, 0);
      }
    }
    if (shrinks) __syncthreads();
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

/* A warp a row, which stays in its registers: at most SHORT_VECTORS vectors a lane. Walk: z, dz. */
static __global__ void __launch_bounds__(SHORT_THREADS)
    cross_entropy_short(const __grid_constant__ walk<2> rows, operand z, operand dz, int n,
                        const int32_t *targets, double scale, double *losses) {
  uint32_t row = blockIdx.x * (SHORT_THREADS / WARP) + threadIdx.x / WARP;
  if (row >= rows.count) return; /* a warp together */
  int lane = threadIdx.x % WARP, target = targets[row];
  coordinates c = locate(rows, row);
  const char *from = z.data + offset_of(rows, c, 0);
  char *to = dz.data + offset_of(rows, c, 1);
  float x[SHORT_VECTORS][VECTOR], greatest = -INFINITY, sum = 0, at_target = 0;
#pragma unroll
  for (int k = 0; k < SHORT_VECTORS; ++k) {
    int at = (lane + k * WARP) * VECTOR;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) x[k][i] = -INFINITY;
    if (at < n) load_all<float, VECTOR>(x[k], from + at * z.step, z.dtype);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      greatest = fmaxf(greatest, x[k][i]);
      if (at + i == target) at_target = x[k][i];
    }
  }
#pragma unroll
  for (int step = 1; step < WARP; step *= 2)
    greatest = fmaxf(greatest, __shfl_xor_sync(~0u, greatest, step));
  at_target = __shfl_sync(~0u, at_target, target < 0 ? 0 : target / VECTOR % WARP);
  float base = greatest == -INFINITY ? 0 : greatest;
#pragma unroll
  for (int k = 0; k < SHORT_VECTORS; ++k)
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      x[k][i] = exponential(x[k][i] - base);
      sum += x[k][i];
    }
#pragma unroll
  for (int step = 1; step < WARP; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (lane == 0 && losses)
    losses[row] = target < 0 ? 0 : log((double)sum) + (double)base - (double)at_target;
  float factor = target < 0 ? 0 : (float)(scale / (double)sum);
#pragma unroll
  for (int k = 0; k < SHORT_VECTORS; ++k) {
    int at = (lane + k * WARP) * VECTOR;
    if (at >= n) continue;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      x[k][i] = target < 0 ? 0 : x[k][i] * factor;
      if (at + i == target) x[k][i] -= (float)scale;
    }
    store_vector(to + at * dz.step, dz.dtype, x[k]);
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
  cudaStream_t queue = (cudaStream_t)stream;
  walk<2> walk_all = walk_rows<2>(z, {z, dz});
  if (!wide && vectors && n <= SHORT_VECTORS * WARP * VECTOR) {
    const int64_t each = SHORT_THREADS / WARP;
    cross_entropy_short<<<(unsigned)((rows + each - 1) / each), SHORT_THREADS, 0, queue>>>(
        walk_all, operand_of(z), operand_of(dz), (int)n, targets, scale, losses);
    ATTN_CUDA_TRY_LAUNCH("cross_entropy");
    return ATTN_OK;
  }
  auto kernel = wide      ? cross_entropy_rows<double, 1>
                : vectors ? cross_entropy_rows<float, VECTOR>
                          : cross_entropy_rows<float, 1>;
  /* Not all GPUs have that much shared memory. */
  int64_t kept = vectors && !wide && z->dtype == ATTN_F32 && n >= WORTH_KEEPING ? n : 0;
  if (kept > KEPT_BYTES / (int64_t)sizeof(float)) kept = KEPT_BYTES / (int64_t)sizeof(float);
  int shared = (int)(kept * (int64_t)sizeof(float));
  if (shared > 0 && cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         shared) != cudaSuccess) {
    cudaGetLastError();
    kept = shared = 0;
  }
  kernel<<<(unsigned)rows, THREADS, (size_t)shared, queue>>>(
      walk_all, operand_of(z), operand_of(dz), n, targets, scale, losses, (int)kept);
  ATTN_CUDA_TRY_LAUNCH("cross_entropy");
  return ATTN_OK;
}
