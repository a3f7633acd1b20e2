/* One step over a prepared chunk, for a slab of 16 value columns in one warp. */
#ifndef ATTN_KERNELS_CUDA_RECURRENT_CHUNKS_STEP_CUH
#define ATTN_KERNELS_CUDA_RECURRENT_CHUNKS_STEP_CUH

#include "kernels/cuda/recurrent_chunks.cuh"

namespace chunked {

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
  for (int j = 0; j < SUBBLOCKS; ++j)
#pragma unroll
    for (int n = 0; n < DIM / 16; ++n) {
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

/* out[16, 64] (+)= slab rows^T for rows[64, DIM]. */
template <typename E, int DIM>
__device__ inline void times_rows(float (&out)[8][4], const slab<DIM> &s, const E *rows, int lane) {
  constexpr int LD = pitch<DIM>();
#pragma unroll
  for (int c = 0; c < DIM / 16; ++c) {
    uint32_t a[4], b[4];
    slab_operand<E>(a, s, c);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      load_right(b, rows + n * 16 * LD + c * 16, LD, lane);
      product<E>(out[2 * n], a, b[0], b[1]);
      product<E>(out[2 * n + 1], a, b[2], b[3]);
    }
  }
}

/* Column (token) j times factor[j]. */
__device__ inline void scale_tokens(float (&x)[8][4], const float *factor, int lane) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    float2 f = *(const float2 *)(factor + 8 * n + lane % 4 * 2);
    x[n][0] *= f.x, x[n][1] *= f.y, x[n][2] *= f.x, x[n][3] *= f.y;
  }
}

/* The tokens of an operand times factor, rounded again. */
template <typename E>
__device__ inline void scale_operand(uint32_t (&x)[SUBBLOCKS][4], const float *factor, int lane) {
#pragma unroll
  for (int j = 0; j < SUBBLOCKS; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float2 f = *(const float2 *)(factor + 16 * j + i / 2 * 8 + lane % 4 * 2);
      float2 y = unpack<E>(x[j][i]);
      x[j][i] = pack<E>(y.x * f.x, y.y * f.y);
    }
}

/* V' of the slab as an operand. Y is Diag(beta) (Y - I) here. */
template <typename E, int DIM, bool CHANNEL>
__device__ inline void written_values(uint32_t (&x)[SUBBLOCKS][4], const slab<DIM> &s,
                                      const tiles<E, DIM, CHANNEL, true> &tile, const E *v,
                                      int ld_v, int lane) {
  float r[8][4] = {};
  times_rows<E>(r, s, tile.k(), lane);
  residual(r, v, ld_v, CHANNEL ? NULL : tile.gamma(), lane);
  tokens_operand<E>(x, r, NULL, lane);
  scale_tokens(r, tile.beta(), lane);
  times_lower(r, x, tile.y(), lane);
  tokens_operand<E>(x, r, NULL, lane);
}
/* The slab of values in shared memory as an operand. */
template <typename E>
__device__ inline void values_operand(uint32_t (&x)[SUBBLOCKS][4], const E *v, int ld_v, int lane) {
#pragma unroll
  for (int j = 0; j < SUBBLOCKS; ++j) load_left_transposed(x[j], v + 16 * j * ld_v, ld_v, lane);
}
/* The additive rule writes V itself. */
template <typename E, int DIM, bool CHANNEL>
__device__ inline void written_values(uint32_t (&x)[SUBBLOCKS][4], const slab<DIM> &,
                                      const tiles<E, DIM, CHANNEL, false> &, const E *v, int ld_v,
                                      int lane) {
  values_operand(x, v, ld_v, lane);
}

/* S after the chunk; x is V' and is lost. */
template <typename E, int DIM, bool CHANNEL, bool DELTA>
__device__ inline void advance(slab<DIM> &s, uint32_t (&x)[SUBBLOCKS][4],
                               const tiles<E, DIM, CHANNEL, DELTA> &tile, int lane) {
  decay_slab<DIM, CHANNEL>(s, tile.full(), lane);
  if (!CHANNEL) scale_operand<E>(x, tile.kappa(), lane);
  add_outer(s, x, CHANNEL ? tile.written() : tile.k(), lane);
}

/* The forward step; V's slab in shared memory becomes O's. */
template <typename E, int DIM, bool CHANNEL, bool DELTA>
__device__ inline void step(slab<DIM> &s, const tiles<E, DIM, CHANNEL, DELTA> &tile, E *v, int ld_v,
                            float scale, int lane) {
  uint32_t x[SUBBLOCKS][4];
  written_values(x, s, tile, v, ld_v, lane);
  float o[8][4] = {};
  times_rows<E>(o, s, tile.q(), lane);
  if (!CHANNEL) scale_tokens(o, tile.gamma(), lane);
  times_lower(o, x, tile.p(), lane);
  __syncwarp();
  store_transposed(v, ld_v, o, scale, lane);
  advance(s, x, tile, lane);
}

/* The same by two warps, so that the first one is soon at the next chunk: it hands over S and V' as
 * operands and the second one makes O. The additive rule's V' is in shared memory. */
template <int DIM, bool DELTA> struct handover {
  uint4 s[DIM / 16][32], x[DELTA ? SUBBLOCKS : 1][32];
};

__device__ inline uint4 to_vector(const uint32_t (&a)[4]) {
  return make_uint4(a[0], a[1], a[2], a[3]);
}
__device__ inline void from_vector(uint32_t (&a)[4], uint4 x) {
  a[0] = x.x, a[1] = x.y, a[2] = x.z, a[3] = x.w;
}

template <typename E, int DIM, bool DELTA>
__device__ inline void hand_state(handover<DIM, DELTA> &to, const slab<DIM> &s, int lane) {
#pragma unroll
  for (int c = 0; c < DIM / 16; ++c) {
    uint32_t a[4];
    slab_operand<E>(a, s, c);
    to.s[c][lane] = to_vector(a);
  }
}

template <typename E, int DIM, bool CHANNEL, bool DELTA>
__device__ inline void state_step(slab<DIM> &s, handover<DIM, DELTA> &to,
                                  const tiles<E, DIM, CHANNEL, DELTA> &tile, const E *v, int ld_v,
                                  int barrier, int lane) {
  uint32_t x[SUBBLOCKS][4];
  written_values(x, s, tile, v, ld_v, lane);
#pragma unroll
  for (int j = 0; DELTA && j < SUBBLOCKS; ++j) to.x[j][lane] = to_vector(x[j]);
  barrier_sync(barrier, 64);
  advance(s, x, tile, lane);
  hand_state<E>(to, s, lane);
}

template <typename E, int DIM, bool CHANNEL, bool DELTA>
__device__ inline void output_step(const handover<DIM, DELTA> &from,
                                   const tiles<E, DIM, CHANNEL, DELTA> &tile, E *v, int ld_v,
                                   float scale, int barrier, int lane) {
  constexpr int LD = pitch<DIM>();
  float o[8][4] = {};
#pragma unroll
  for (int c = 0; c < DIM / 16; ++c) {
    uint32_t a[4], b[4];
    from_vector(a, from.s[c][lane]);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      load_right(b, tile.q() + n * 16 * LD + c * 16, LD, lane);
      product<E>(o[2 * n], a, b[0], b[1]);
      product<E>(o[2 * n + 1], a, b[2], b[3]);
    }
  }
  if (!CHANNEL) scale_tokens(o, tile.gamma(), lane);
  barrier_sync(barrier, 64);
  uint32_t x[SUBBLOCKS][4];
#pragma unroll
  for (int j = 0; DELTA && j < SUBBLOCKS; ++j) from_vector(x[j], from.x[j][lane]);
  if (!DELTA) values_operand(x, v, ld_v, lane);
  times_lower(o, x, tile.p(), lane);
  __syncwarp();
  store_transposed(v, ld_v, o, scale, lane);
}

} // namespace chunked

#endif
