/* c [m, n] (+)= a [m, k] w [n, k]^T for m <= 8 rows (decode): w is read once, at memory speed.
 *
 * Two bytes an element: tensor cores (mma.m16n8k16) with w as the left operand, 16 outputs at a
 * time, and the rows of a as its 8 columns. The order of the products in a sum over k is free, so
 * each lane loads 16 bytes of one row and calls them the k that the instruction wants from it: lane
 * (g, t) of the instruction holds k = 2t, 2t + 1 and 2t + 8, 2t + 9 of row g, and takes elements
 * 8t + 4s .. 8t + 4s + 3 of 32 for step s. a is loaded the same way.
 * float32: fused multiply-adds, each warp four outputs.
 *
 * Where loads of 16 bytes do not suit, the same is loaded element by element: a view's rows may be
 * aligned alone and not among others, and must not be summed in another order then. float64: each
 * warp one output. With w as it is, [k, n], which batches of small matrices may be (latents
 * absorbed by head): each lane one output.
 *
 * The warps of a block share k and add up through shared memory in order. Rows of a do not touch
 * each other's sums, so a row gives the same bits alone and among others. */
#include "kernels/cuda/dense.cuh"

enum { WARPS = 8, THREADS = WARPS * WARP, OUTPUTS = 16, STEP = 32 /* k of a warp's step */ };

struct few_rows {
  const char *a, *w;
  char *c;
  int64_t ld_a, ld_w, ld_c;             /* elements */
  int64_t stride_a, stride_w, stride_c; /* bytes, from one product of the batch to the next */
  int m;
  attn_dtype dtype_c;
  int64_t n, k;
  bool accumulate;
};

/* The block's product of the batch. */
static __device__ inline few_rows product_of(const few_rows &batch) {
  few_rows one = batch;
  one.a += blockIdx.y * batch.stride_a;
  one.w += blockIdx.y * batch.stride_w;
  one.c += blockIdx.y * batch.stride_c;
  return one;
}

template <typename Real>
static __device__ inline void put(const few_rows &all, int row, int64_t output, Real value) {
  int64_t at = row * all.ld_c + output;
  if (all.accumulate) value += load_element<Real>(all.c, all.dtype_c, at);
  store_element<Real>(all.c, all.dtype_c, at, value);
}

template <int DTYPE>
static __device__ inline void multiply(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                       uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (DTYPE == ATTN_BF16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* Elements at `from`, of which `left` are in the row; zeros behind them. ONCE: nobody else reads
 * them. */
template <bool ALIGNED, bool ONCE>
static __device__ inline uint4 load_eight(const char *from, int64_t left) {
  if (ALIGNED && left <= 0) return make_uint4(0, 0, 0, 0);
  if (ALIGNED) return ONCE ? __ldcs((const uint4 *)from) : *(const uint4 *)from;
  uint32_t word[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < left) word[i / 2] |= (uint32_t)((const uint16_t *)from)[i] << i % 2 * 16;
  return make_uint4(word[0], word[1], word[2], word[3]);
}
template <bool ALIGNED, bool ONCE>
static __device__ inline float4 load_four(const char *from, int64_t left) {
  if (ALIGNED) return ONCE ? __ldcs((const float4 *)from) : *(const float4 *)from;
  const float *x = (const float *)from;
  return make_float4(x[0], left > 1 ? x[1] : 0, left > 2 ? x[2] : 0, left > 3 ? x[3] : 0);
}

template <int DTYPE, bool ALIGNED>
static __global__ void __launch_bounds__(THREADS)
    few_rows_halves(const __grid_constant__ few_rows batch) {
  const few_rows all = product_of(batch);
  constexpr int AHEAD = 4; /* steps whose loads are in flight together */
  __shared__ float part[WARPS][WARP][4];
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  int64_t output = (int64_t)blockIdx.x * OUTPUTS + g;
  /* Rows beyond the last read another one; their sums are not stored. */
  int64_t low = output < all.n ? output : all.n - 1;
  int64_t high = output + 8 < all.n ? output + 8 : all.n - 1;
  const char *w_low = all.w + 2 * low * all.ld_w, *w_high = all.w + 2 * high * all.ld_w;
  const char *a_row = all.a + 2 * (g < all.m ? g : 0) * all.ld_a;
  float sum[4] = {};
  for (int64_t start = (int64_t)warp * AHEAD * STEP; start < all.k; start += WARPS * AHEAD * STEP) {
    uint4 wl[AHEAD], wh[AHEAD], x[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {
      int64_t at = start + j * STEP + 8 * t;
      wl[j] = load_eight<ALIGNED, true>(w_low + 2 * at, all.k - at);
      wh[j] = load_eight<ALIGNED, true>(w_high + 2 * at, all.k - at);
      x[j] = load_eight<ALIGNED, false>(a_row + 2 * at, all.k - at);
    }
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {
      multiply<DTYPE>(sum, wl[j].x, wh[j].x, wl[j].y, wh[j].y, x[j].x, x[j].y);
      multiply<DTYPE>(sum, wl[j].z, wh[j].z, wl[j].w, wh[j].w, x[j].z, x[j].w);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) part[warp][lane][i] = sum[i];
  __syncthreads();
  /* Element i of a lane: output g (+ 8 for i >= 2), row 2t + i % 2. */
  int i = threadIdx.x / WARP;
  if (i >= 4) return;
  float total = 0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) total += part[w][lane][i];
  int row = 2 * t + i % 2;
  int64_t to = output + i / 2 * 8;
  if (row < all.m && to < all.n) put(all, row, to, total);
}

/* M rows of a, 4 outputs a block; the warps share k. */
template <int M, bool ALIGNED>
static __global__ void __launch_bounds__(THREADS)
    few_rows_floats(const __grid_constant__ few_rows batch) {
  const few_rows all = product_of(batch);
  constexpr int FOUR = 4, ACROSS = WARP * 4; /* k of a warp's step */
  __shared__ float part[WARPS][FOUR][M];
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  int64_t output = (int64_t)blockIdx.x * FOUR;
  float sum[FOUR][M] = {};
  for (int64_t at = (int64_t)warp * ACROSS + lane * 4; at < all.k; at += WARPS * ACROSS) {
    float4 w[FOUR];
#pragma unroll
    for (int o = 0; o < FOUR; ++o) {
      int64_t row = output + o < all.n ? output + o : all.n - 1;
      w[o] = load_four<ALIGNED, true>(all.w + 4 * (row * all.ld_w + at), all.k - at);
    }
#pragma unroll
    for (int r = 0; r < M; ++r) {
      float4 x = load_four<ALIGNED, false>(all.a + 4 * (r * all.ld_a + at), all.k - at);
#pragma unroll
      for (int o = 0; o < FOUR; ++o) {
        float value = fmaf(w[o].x, x.x, sum[o][r]);
        value = fmaf(w[o].y, x.y, value);
        value = fmaf(w[o].z, x.z, value);
        sum[o][r] = fmaf(w[o].w, x.w, value);
      }
    }
  }
#pragma unroll
  for (int o = 0; o < FOUR; ++o)
#pragma unroll
    for (int r = 0; r < M; ++r) {
#pragma unroll
      for (int step = 1; step < WARP; step *= 2) sum[o][r] += __shfl_xor_sync(~0u, sum[o][r], step);
      if (lane == 0) part[warp][o][r] = sum[o][r];
    }
  __syncthreads();
  if (threadIdx.x >= FOUR * M) return;
  int o = threadIdx.x / M, r = threadIdx.x % M;
  float total = 0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) total += part[w][o][r];
  if (output + o < all.n) put(all, r, output + o, total);
}

/* float64: a warp an output. */
static __global__ void __launch_bounds__(THREADS)
    few_rows_doubles(const __grid_constant__ few_rows batch) {
  const few_rows all = product_of(batch);
  const double *a = (const double *)all.a, *w = (const double *)all.w;
  int64_t output = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP;
  if (output >= all.n) return;
  double sum[FEW_ROWS] = {};
  for (int64_t at = threadIdx.x % WARP; at < all.k; at += WARP) {
    double x = w[output * all.ld_w + at];
#pragma unroll
    for (int r = 0; r < FEW_ROWS; ++r)
      if (r < all.m) sum[r] += x * a[r * all.ld_a + at];
  }
#pragma unroll
  for (int r = 0; r < FEW_ROWS; ++r) {
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) sum[r] += __shfl_xor_sync(~0u, sum[r], step);
    if (r < all.m && threadIdx.x % WARP == 0) put(all, r, output, sum[r]);
  }
}

/* w [k, n]: the warps share k. */
template <typename Real>
static __global__ void __launch_bounds__(THREADS)
    few_rows_columns(const __grid_constant__ few_rows batch, attn_dtype dtype) {
  __shared__ Real part[WARPS][FEW_ROWS][WARP];
  const few_rows all = product_of(batch);
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  int64_t output = (int64_t)blockIdx.x * WARP + lane;
  Real sum[FEW_ROWS] = {};
  if (output < all.n)
    for (int64_t at = all.k * warp / WARPS; at < all.k * (warp + 1) / WARPS; ++at) {
      Real w = load_element<Real>(all.w, dtype, at * all.ld_w + output);
#pragma unroll
      for (int r = 0; r < FEW_ROWS; ++r)
        if (r < all.m) sum[r] += w * load_element<Real>(all.a, dtype, r * all.ld_a + at);
    }
#pragma unroll
  for (int r = 0; r < FEW_ROWS; ++r) part[warp][r][lane] = sum[r];
  __syncthreads();
  static_assert(FEW_ROWS <= WARPS, "a warp for every row");
  if (warp >= all.m || output >= all.n) return;
  Real total = 0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) total += part[w][warp][lane];
  put(all, warp, output, total);
}

/* 16-byte loads of rows of `k` elements that lie `ld` apart, in matrices `stride` apart. */
static bool vectors_suit(const attn_tensor *t, int64_t k, int64_t ld, int64_t stride) {
  int each = 16 / dtype_bytes(t->dtype);
  return k % each == 0 && ld % each == 0 && stride % each == 0 && (uintptr_t)t->data % 16 == 0;
}

template <bool ALIGNED> static auto floats_kernel(int rows) {
  static void (*const kernels[])(const few_rows) = {
      few_rows_floats<1, ALIGNED>, few_rows_floats<2, ALIGNED>, few_rows_floats<3, ALIGNED>,
      few_rows_floats<4, ALIGNED>, few_rows_floats<5, ALIGNED>, few_rows_floats<6, ALIGNED>,
      few_rows_floats<7, ALIGNED>, few_rows_floats<8, ALIGNED>};
  return kernels[rows - 1];
}

attn_status attn_cuda_few_rows(const few_rows_problem *p, const attn_tensor *a,
                               const attn_tensor *w, const attn_tensor *c, bool accumulate,
                               cudaStream_t stream) {
  const int64_t bytes = dtype_bytes(a->dtype);
  const few_rows all = {(const char *)a->data,
                        (const char *)w->data,
                        (char *)c->data,
                        p->ld_a,
                        p->ld_w,
                        p->ld_c,
                        p->stride_a * bytes,
                        p->stride_w * bytes,
                        p->stride_c * (int64_t)dtype_bytes(c->dtype),
                        (int)p->m,
                        c->dtype,
                        p->n,
                        p->k,
                        accumulate};
  auto grid = [&](int outputs) {
    return dim3((unsigned)((p->n + outputs - 1) / outputs), (unsigned)p->batch);
  };
  const bool wide = a->dtype == ATTN_F64;
  const bool aligned =
      vectors_suit(a, p->k, p->ld_a, p->stride_a) && vectors_suit(w, p->k, p->ld_w, p->stride_w);
  if (!p->transposed) {
    auto kernel = wide ? few_rows_columns<double> : few_rows_columns<float>;
    kernel<<<grid(WARP), THREADS, 0, stream>>>(all, a->dtype);
  } else if (wide) {
    few_rows_doubles<<<grid(WARPS), THREADS, 0, stream>>>(all);
  } else if (a->dtype == ATTN_F32) {
    const auto kernel = aligned ? floats_kernel<true>(all.m) : floats_kernel<false>(all.m);
    kernel<<<grid(4), THREADS, 0, stream>>>(all);
  } else {
    const bool brain = a->dtype == ATTN_BF16;
    auto kernel = brain ? few_rows_halves<ATTN_BF16, false> : few_rows_halves<ATTN_F16, false>;
    if (aligned)
      kernel = brain ? few_rows_halves<ATTN_BF16, true> : few_rows_halves<ATTN_F16, true>;
    kernel<<<grid(OUTPUTS), THREADS, 0, stream>>>(all);
  }
  ATTN_CUDA_TRY_LAUNCH("matmul of a few rows");
  return ATTN_OK;
}
