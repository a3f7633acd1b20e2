/* Operands of the additive scan with a decay per channel. */
#ifndef ATTN_KERNELS_CUDA_RECURRENT_ADDITIVE_CHANNEL_CUH
#define ATTN_KERNELS_CUDA_RECURRENT_ADDITIVE_CHANNEL_CUH

#include "kernels/cuda/recurrent_additive_work.cuh"
#include "kernels/cuda/recurrent_chunks.cuh"

namespace additive {

/* A decay per channel (GLA, arXiv 2312.06635) enters through the operands: with G_i the sum of its
 * log2 from a chunk's start to token i,
 *
 *   o_i = scale sum_{j <= i} (2^{G_i} q_i . 2^{-G_j} k_j) v_j + ...
 *
 * so the scan without decay does it, with 2^{G_i} q_i and 2^{-G_j} k_j for q_i and k_j, if the
 * state is then multiplied by 2^{G_all}, for each of its rows. bfloat16 has float32's exponents: it
 * can hold both while no channel's G_all is below -96. A chunk where one is lower is taken in
 * pieces of 16, 4 or single tokens.
 *
 * Rounding both rows costs the weights P_ij = scale (2^{G_i} q_i . 2^{-G_j} k_j) as much as
 * rounding P itself twice. So they are made here, from rows in two parts of 8 bits each.
 *
 * A block does a chunk of one value head. Writes [tokens, heads, DK], P [tokens, heads, CHUNK] (the
 * first columns are the tokens of the piece, up to the row's own; the others are 0), the pieces'
 * sizes [chunks, heads] and, for whole chunks, the factors 2^{G_all} [chunks, heads, DK]. */
struct channel_parameters {
  const void *q, *k;
  strides q_step, k_step, decay_step;
  int group; /* value heads for each head */
  const float *decay;
  void *q_out, *k_out, *weights;
  float *factors;
  uint8_t *sizes;
};

/* The rows of a chunk in shared memory, each the sum of two tiles. */
template <int DK> struct channel_tiles {
  enum { LD = DK + 8, ROWS = CHUNK * LD, BYTES = 4 * ROWS * 2 };
};

/* x and y as two words, of their leading 8 bits and of the next 8. */
template <typename T>
__device__ __forceinline__ void split_pair(uint32_t &high, uint32_t &low, float x, float y) {
  high = element<T>::pack(x, y);
  const float2 rounded = element<T>::unpack(high);
  low = element<T>::pack(x - rounded.x, y - rounded.y);
}

/* P of the chunk, from the tiles. Of eight warps two have the same 16 rows and take the blocks of
 * 16 columns by turns; warps that share a tensor core, four apart, have few and many of them. */
template <typename T, int DK>
__device__ __forceinline__ void channel_weights(const T *tiles, T *out, int64_t out_token,
                                                float scale, int valid, int size) {
  typedef channel_tiles<DK> S;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int side = warp / 4, block = side ? 3 - warp % 4 : warp, row = 16 * block;
  const T *q_high = tiles + row * S::LD, *q_low = q_high + S::ROWS;
  const T *k_high = tiles + 2 * S::ROWS, *k_low = k_high + S::ROWS;
  if (row >= valid) return;
  float weights[2][2][4] = {}; /* of the columns of block `side`, and of the second next one */
#pragma unroll 2
  for (int c = 0; c < DK; c += 16) {
    uint32_t of_q[4], of_q_low[4];
    chunked::load_left(of_q, q_high + c, S::LD, lane);
    chunked::load_left(of_q_low, q_low + c, S::LD, lane);
#pragma unroll
    for (int j = 0; j < 2; j++) {
      if (side + 2 * j > block) continue;
      uint32_t of_k[4], of_k_low[4];
      const int at = 16 * (side + 2 * j) * S::LD + c;
      chunked::load_right(of_k, k_high + at, S::LD, lane);
      chunked::load_right(of_k_low, k_low + at, S::LD, lane);
#pragma unroll
      for (int n = 0; n < 2; n++) {
        chunked::product<T>(weights[j][n], of_q_low, of_k[2 * n], of_k[2 * n + 1]);
        chunked::product<T>(weights[j][n], of_q, of_k_low[2 * n], of_k_low[2 * n + 1]);
        chunked::product<T>(weights[j][n], of_q, of_k[2 * n], of_k[2 * n + 1]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 2; j++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int i = row + g + 8 * r, column = 16 * (side + 2 * j) + 2 * t;
      if (i >= valid) continue;
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const float *x = weights[j][n] + 2 * r;
        const int at = column + 8 * n, piece = i / size * size;
        const uint32_t pair = element<T>::pack(at >= piece && at <= i ? scale * x[0] : 0,
                                               at + 1 >= piece && at + 1 <= i ? scale * x[1] : 0);
        T *to = out + i * out_token;
        if (size == CHUNK) {
          *(uint32_t *)(to + at) = pair;
        } else { /* round, so that the piece comes first */
          const T *x = (const T *)&pair;
          to[(at - piece + CHUNK) % CHUNK] = x[0];
          to[(at + 1 - piece + CHUNK) % CHUNK] = x[1];
        }
      }
    }
}

template <typename T, int DK>
__global__ void __launch_bounds__(256)
    channel_operands(const __grid_constant__ scan_parameters p,
                     const __grid_constant__ channel_parameters x) {
  constexpr int PAIRS = DK / 2, GROUPS = 256 / PAIRS, TOKENS = CHUNK / GROUPS;
  typedef channel_tiles<DK> S;
  __shared__ float2 totals[GROUPS][PAIRS];
  extern __shared__ __align__(16) char tiles[];
  const int pair = threadIdx.x % PAIRS, group = threadIdx.x / PAIRS;
  work w;
  w.batch = blockIdx.z, w.head = blockIdx.y;
  w.start = p.offsets ? p.offsets[w.batch] : 0;
  w.length = p.offsets ? (int)(p.offsets[w.batch + 1] - w.start) : p.length;
  const int first = blockIdx.x * CHUNK + group * TOKENS, valid = w.length - first;
  if ((int)blockIdx.x * CHUNK >= w.length) return;
  const auto at = [&](const strides &step, int head) {
    return (p.offsets ? 0 : w.batch * step.batch) + (w.start + first) * step.token +
           head * step.head + 2 * pair;
  };
  const float *decay = x.decay + at(x.decay_step, w.head);
  const T *q = (const T *)x.q + at(x.q_step, w.head / x.group);
  const T *k = (const T *)x.k + at(x.k_step, w.head / x.group);
  float2 sums[TOKENS]; /* from the group's first token */
  uint32_t queries[TOKENS], keys[TOKENS];
#pragma unroll
  for (int i = 0; i < TOKENS; i++) {
    sums[i] = make_float2(0, 0);
    queries[i] = keys[i] = 0;
    if (i >= valid) continue;
    sums[i] = *(const float2 *)(decay + i * x.decay_step.token);
    queries[i] = *(const uint32_t *)(q + i * x.q_step.token);
    keys[i] = *(const uint32_t *)(k + i * x.k_step.token);
  }
  float least[3] = {0, 0, 0}; /* sums over 4 tokens, 16 and the chunk */
#pragma unroll
  for (int i = 0; i < TOKENS; i++) {
    sums[i] = make_float2(channel_log2(sums[i].x), channel_log2(sums[i].y));
    if (i > 0) sums[i].x += sums[i - 1].x, sums[i].y += sums[i - 1].y;
    if (i % 4 == 3) {
      const float2 before = i > 3 ? sums[i - 4] : make_float2(0, 0);
      least[0] = fminf(least[0], fminf(sums[i].x - before.x, sums[i].y - before.y));
    }
  }
  totals[group][pair] = sums[TOKENS - 1];
  __syncthreads();
  float2 before = make_float2(0, 0), before16 = before, all = before;
#pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    const float2 total = totals[g][pair];
    all.x += total.x, all.y += total.y;
    if (g < group) before.x += total.x, before.y += total.y;
    const bool same = g * TOKENS / 16 == group * TOKENS / 16;
    if (same && g < group) before16.x += total.x, before16.y += total.y;
    if (same && g == group) least[1] = fminf(before16.x + total.x, before16.y + total.y);
  }
  least[2] = fminf(all.x, all.y);
  int size = CHUNK;
  if (__syncthreads_or(!(least[2] >= CHANNEL_LEAST_LOG2))) {
    size = 16;
    before = before16;
    if (__syncthreads_or(!(least[1] >= CHANNEL_LEAST_LOG2))) {
      size = __syncthreads_or(!(least[0] >= CHANNEL_LEAST_LOG2)) ? 1 : 4;
      before = make_float2(0, 0);
    }
  }
  const int64_t chunk = flat_chunk(p, w) + blockIdx.x, token = flat_start(p, w) + first;
  if (threadIdx.x == 0) x.sizes[chunk * p.heads + w.head] = (uint8_t)size;
  if (group == 0)
    *(float2 *)(x.factors + (chunk * p.heads + w.head) * DK + 2 * pair) =
        make_float2(exp2_approximate(all.x), exp2_approximate(all.y));
  uint32_t *q_out = (uint32_t *)((T *)x.q_out + (token * p.heads + w.head) * DK) + pair;
  uint32_t *k_out = (uint32_t *)((T *)x.k_out + (token * p.heads + w.head) * DK) + pair;
  T *rows = (T *)tiles + group * TOKENS * S::LD + 2 * pair;
#pragma unroll
  for (int i = 0; i < TOKENS; i++) {
    float2 sum = make_float2(before.x + sums[i].x, before.y + sums[i].y);
    if (size < 16) { /* from the piece's start */
      const float2 before4 = i >= 4 ? sums[i / 4 * 4 - 1] : make_float2(0, 0);
      const float2 before1 = i >= 1 ? sums[i - 1] : make_float2(0, 0);
      sum.x -= size == 4 ? before4.x : before1.x;
      sum.y -= size == 4 ? before4.y : before1.y;
    }
    const float2 a = element<T>::unpack(queries[i]), b = element<T>::unpack(keys[i]);
    uint32_t of_q, of_q_low, of_k, of_k_low;
    split_pair<T>(of_q, of_q_low, a.x * exp2_approximate(sum.x), a.y * exp2_approximate(sum.y));
    split_pair<T>(of_k, of_k_low, b.x * exp2_approximate(-sum.x), b.y * exp2_approximate(-sum.y));
    uint32_t *row = (uint32_t *)(rows + i * S::LD);
    row[0] = of_q, row[S::ROWS / 2] = of_q_low;
    row[S::ROWS] = of_k, row[3 * S::ROWS / 2] = of_k_low;
    if (i >= valid) continue;
    q_out[(int64_t)i * p.heads * PAIRS] = of_q;
    k_out[(int64_t)i * p.heads * PAIRS] = of_k;
  }
  __syncthreads();
  const int64_t chunk_token = flat_start(p, w) + blockIdx.x * CHUNK;
  channel_weights<T, DK>((const T *)tiles,
                         (T *)x.weights + (chunk_token * p.heads + w.head) * CHUNK,
                         (int64_t)p.heads * CHUNK, exp2_approximate(p.log2_scale),
                         w.length - (int)blockIdx.x * CHUNK, size);
}

} // namespace additive

#endif
