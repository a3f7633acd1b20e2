/* One step of the delta rule over a prepared chunk, for a slab of 16 value columns in one warp. */
#ifndef ATTN_KERNELS_CUDA_RECURRENT_DELTA_STEP_CUH
#define ATTN_KERNELS_CUDA_RECURRENT_DELTA_STEP_CUH

#include "kernels/cuda/recurrent_delta.cuh"

namespace delta {

/* S^T of a slab: accumulators [16 value columns, DIM], 8 channels each. */
template <int DIM> struct slab { float s[DIM / 8][4]; };

template <int DIM>
__device__ inline void load_slab(slab<DIM> &x, const float *state, int64_t ld, int lane) {
  int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < DIM / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      x.s[n][i] = state ? state[(8 * n + 2 * t + i % 2) * ld + g + i / 2 * 8] : 0;
}

template <int DIM>
__device__ inline void store_slab(const slab<DIM> &x, float *state, int64_t ld, int lane) {
  int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < DIM / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) state[(8 * n + 2 * t + i % 2) * ld + g + i / 2 * 8] = x.s[n][i];
}

/* The slab's columns 16 c .. 16 c + 15 as a left operand. */
template <typename E, int DIM>
__device__ inline void slab_operand(uint32_t (&a)[4], const slab<DIM> &x, int c) {
  a[0] = pack<E>(x.s[2 * c][0], x.s[2 * c][1]);
  a[1] = pack<E>(x.s[2 * c][2], x.s[2 * c][3]);
  a[2] = pack<E>(x.s[2 * c + 1][0], x.s[2 * c + 1][1]);
  a[3] = pack<E>(x.s[2 * c + 1][2], x.s[2 * c + 1][3]);
}

/* [16, 64] accumulators, 8 tokens each, as left operands of depth 64; each column times factor. */
template <typename E>
__device__ inline void tokens_operand(uint32_t (&a)[SUBBLOCKS][4], const float (&x)[8][4],
                                      const float *factor, int lane) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    float2 f = factor ? *(const float2 *)(factor + 8 * n + lane % 4 * 2) : make_float2(1, 1);
    a[n / 2][n % 2 * 2] = pack<E>(x[n][0] * f.x, x[n][1] * f.y);
    a[n / 2][n % 2 * 2 + 1] = pack<E>(x[n][2] * f.x, x[n][3] * f.y);
  }
}

/* out[16, 64] += x[16, 64] l^T for the lower triangular l[64, 64] in shared memory. */
template <typename E>
__device__ inline void times_lower(float (&out)[8][4], const uint32_t (&x)[SUBBLOCKS][4],
                                   const E *l, int lane) {
#pragma unroll
  for (int j = 0; j < SUBBLOCKS; ++j)
#pragma unroll
    for (int i = j; i < SUBBLOCKS; ++i) {
      uint32_t b[4];
      load_right(b, l + i * 16 * SQUARE + j * 16, SQUARE, lane);
      product<E>(out[2 * i], x[j], b[0], b[1]);
      product<E>(out[2 * i + 1], x[j], b[2], b[3]);
    }
}

/* S^T <- S^T Diag(full) + x[16, 64] rows[64, DIM]. */
template <typename E, int DIM>
__device__ inline void add_outer(slab<DIM> &s, const uint32_t (&x)[SUBBLOCKS][4], const E *rows,
                                 int lane) {
  constexpr int LD = pitch<DIM>();
#pragma unroll
  for (int n = 0; n < DIM / 16; ++n)
#pragma unroll
    for (int j = 0; j < SUBBLOCKS; ++j) {
      uint32_t b[4];
      load_right_transposed(b, rows + j * 16 * LD + n * 16, LD, lane);
      product<E>(s.s[2 * n], x[j], b[0], b[1]);
      product<E>(s.s[2 * n + 1], x[j], b[2], b[3]);
    }
}

template <int DIM, bool CHANNEL>
__device__ inline void decay_slab(slab<DIM> &s, const float *full, int lane) {
#pragma unroll
  for (int n = 0; n < DIM / 8; ++n) {
    float2 f =
        CHANNEL ? *(const float2 *)(full + 8 * n + lane % 4 * 2) : make_float2(full[0], full[0]);
    s.s[n][0] *= f.x, s.s[n][1] *= f.y, s.s[n][2] *= f.x, s.s[n][3] *= f.y;
  }
}

/* V[64, 16] of the slab in shared memory, minus x^T (each token times its factor): R^T in x. */
template <typename E>
__device__ inline void residual(float (&x)[8][4], const E *v, int ld, const float *factor,
                                int lane) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    uint32_t of_v[4];
    /* Matrices: tokens 0..7 then 8..15, value columns 0..7; then the columns 8..15. */
    load_matrices_transposed(of_v, v + (16 * n + lane % 16) * ld + lane / 16 * 8);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float(&r)[4] = x[2 * n + half];
      float2 f =
          factor ? *(const float2 *)(factor + 16 * n + 8 * half + lane % 4 * 2) : make_float2(1, 1);
      float2 low = unpack<E>(of_v[half]), high = unpack<E>(of_v[half + 2]);
      r[0] = low.x - f.x * r[0], r[1] = low.y - f.y * r[1];
      r[2] = high.x - f.x * r[2], r[3] = high.y - f.y * r[3];
    }
  }
}

/* x^T, each token times its factor and `scale`, to out[64, 16] in shared memory. */
template <typename E>
__device__ inline void store_transposed(E *out, int ld, const float (&x)[8][4], float scale,
                                        int lane) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    E *row = out + (8 * n + lane / 4) * ld + lane % 4 * 2;
    *(uint32_t *)row = transpose_matrix(pack<E>(scale * x[n][0], scale * x[n][1]));
    *(uint32_t *)(row + 8) = transpose_matrix(pack<E>(scale * x[n][2], scale * x[n][3]));
  }
}

/* The 16 columns of a warp's rows in shared memory to rows of `out`. */
template <typename E>
__device__ inline void write_slab(E *out, int64_t ld_out, const E *x, int ld, int tokens,
                                  int lane) {
#pragma unroll
  for (int at = 0; at < 4; ++at) {
    int i = at * 16 + lane / 2, c = lane % 2 * 8;
    if (i < tokens) *(uint4 *)(out + i * ld_out + c) = *(const uint4 *)(x + i * ld + c);
  }
}

/* The forward step; V's slab in shared memory becomes O's. */
template <typename E, int DIM, bool CHANNEL>
__device__ inline void step(slab<DIM> &s, const tiles<E, DIM, CHANNEL> &tile, E *v, int ld_v,
                            float scale, int lane) {
  constexpr int LD = pitch<DIM>();
  float r[8][4] = {}, o[8][4] = {};
#pragma unroll
  for (int c = 0; c < DIM / 16; ++c) {
    uint32_t a[4], b[4];
    slab_operand<E>(a, s, c);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      load_right(b, tile.k() + n * 16 * LD + c * 16, LD, lane);
      product<E>(r[2 * n], a, b[0], b[1]);
      product<E>(r[2 * n + 1], a, b[2], b[3]);
      load_right(b, tile.q() + n * 16 * LD + c * 16, LD, lane);
      product<E>(o[2 * n], a, b[0], b[1]);
      product<E>(o[2 * n + 1], a, b[2], b[3]);
    }
  }
  residual(r, v, ld_v, CHANNEL ? NULL : tile.gamma(), lane);
  uint32_t x[SUBBLOCKS][4];
  tokens_operand<E>(x, r, NULL, lane);
#pragma unroll
  for (int n = 0; n < 8; ++n) r[n][0] = r[n][1] = r[n][2] = r[n][3] = 0;
  times_lower(r, x, tile.y(), lane);
  decay_slab<DIM, CHANNEL>(s, tile.full(), lane);
  tokens_operand<E>(x, r, CHANNEL ? NULL : tile.kappa(), lane);
  add_outer(s, x, CHANNEL ? tile.written() : tile.k(), lane);
  if (!CHANNEL) {
    tokens_operand<E>(x, r, NULL, lane);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      float2 f = *(const float2 *)(tile.gamma() + 8 * n + lane % 4 * 2);
      o[n][0] *= f.x, o[n][1] *= f.y, o[n][2] *= f.x, o[n][3] *= f.y;
    }
  }
  times_lower(o, x, tile.p(), lane);
  store_transposed(v, ld_v, o, scale, lane);
}

} // namespace delta

#endif
