/* c [m, n] (+)= a [m, k] w [n, k]^T for m <= 8 rows (decode): w is read once, at memory speed.
 *
 * Two bytes an element: tensor cores (mma.m16n8k16) with w as the left operand, 16 outputs at a
 * time, and the rows of a as its 8 columns. The order of the products in a sum over k is free, so
 * each lane loads 16 bytes of one row and calls them the k that the instruction wants from it: lane
 * (g, t) of the instruction holds k = 2t, 2t + 1 and 2t + 8, 2t + 9 of row g, and takes elements
 * 8t + 4s .. 8t + 4s + 3 of 32 for step s. a is loaded the same way.
 * float32: fused multiply-adds, each warp four outputs.
 *
 * The warps of a block share k and add up through shared memory in order. Rows of a do not touch
 * each other's sums, so a row gives the same bits alone and among others. */
#include "kernels/cuda/dense.cuh"

enum { WARPS = 8, THREADS = WARPS * WARP, OUTPUTS = 16, STEP = 32 /* k of a warp's step */ };

struct few_rows {
  const char *a, *w;
  char *c;
  int64_t ld_a, ld_w, ld_c; /* elements */
  int m, dtype_c;
  int64_t n, k;
  bool accumulate;
};

static __device__ inline void put(const few_rows &all, int row, int64_t output, float value) {
  int64_t at = row * all.ld_c + output;
  if (all.accumulate) value += load_element<float>(all.c, all.dtype_c, at);
  store_element<float>(all.c, all.dtype_c, at, value);
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

template <int DTYPE>
static __global__ void __launch_bounds__(THREADS)
    few_rows_halves(const __grid_constant__ few_rows all) {
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
  const uint4 zero = make_uint4(0, 0, 0, 0);
  for (int64_t start = (int64_t)warp * AHEAD * STEP; start < all.k; start += WARPS * AHEAD * STEP) {
    uint4 wl[AHEAD], wh[AHEAD], x[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {
      int64_t at = start + j * STEP + 8 * t;
      bool inside = at < all.k;
      wl[j] = inside ? __ldcs((const uint4 *)(w_low + 2 * at)) : zero;
      wh[j] = inside ? __ldcs((const uint4 *)(w_high + 2 * at)) : zero;
      x[j] = inside ? *(const uint4 *)(a_row + 2 * at) : zero;
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
template <int M>
static __global__ void __launch_bounds__(THREADS)
    few_rows_floats(const __grid_constant__ few_rows all) {
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
      w[o] = __ldcs((const float4 *)(all.w + 4 * (row * all.ld_w + at)));
    }
#pragma unroll
    for (int r = 0; r < M; ++r) {
      float4 x = *(const float4 *)(all.a + 4 * (r * all.ld_a + at));
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

bool attn_cuda_few_rows_suit(int64_t m, int64_t k, int64_t ld_a, int64_t ld_w, const attn_tensor *a,
                             const attn_tensor *w) {
  int bytes = dtype_bytes(a->dtype), each = 16 / bytes;
  return m <= FEW_ROWS && a->dtype != ATTN_F64 && k % each == 0 && ld_a % each == 0 &&
         ld_w % each == 0 && (uintptr_t)a->data % 16 == 0 && (uintptr_t)w->data % 16 == 0;
}

attn_status attn_cuda_few_rows(int64_t m, int64_t n, int64_t k, const attn_tensor *a, int64_t ld_a,
                               const attn_tensor *w, int64_t ld_w, const attn_tensor *c,
                               int64_t ld_c, bool accumulate, cudaStream_t stream) {
  few_rows all = {(const char *)a->data,
                  (const char *)w->data,
                  (char *)c->data,
                  ld_a,
                  ld_w,
                  ld_c,
                  (int)m,
                  (int)c->dtype,
                  n,
                  k,
                  accumulate};
  if (a->dtype != ATTN_F32) {
    auto kernel = a->dtype == ATTN_BF16 ? few_rows_halves<ATTN_BF16> : few_rows_halves<ATTN_F16>;
    kernel<<<(unsigned)((n + OUTPUTS - 1) / OUTPUTS), THREADS, 0, stream>>>(all);
  } else {
    static void (*const kernels[])(const few_rows) = {
        few_rows_floats<1>, few_rows_floats<2>, few_rows_floats<3>, few_rows_floats<4>,
        few_rows_floats<5>, few_rows_floats<6>, few_rows_floats<7>, few_rows_floats<8>};
    kernels[m - 1]<<<(unsigned)((n + 3) / 4), THREADS, 0, stream>>>(all);
  }
  ATTN_CUDA_TRY_LAUNCH("matmul of a few rows");
  return ATTN_OK;
}
