/* The delta rule forward on Hopper's matrix units for bfloat16 and float16: DeltaNet, Gated
 * DeltaNet, Kimi Delta Attention. The mathematics is that of recurrent_chunks.cuh.
 *
 * Stepping: a warpgroup has 64 value columns and keeps S^T [64, dim] in registers as accumulators
 * of wgmma. Those have the layout of its left operand, so that
 *   U^T = S^T Kg^T,   V'^T = (V - U)^T (Diag(beta) Y)^T,   O^T = S^T Qg^T + V'^T P^T,
 *   S^T <- S^T Diag(exp(G_C)) + V'^T Kk
 * follow each other in registers. The right operands are swizzled tiles, in a ring of stages. Y's
 * diagonal is 1 and most of what V' is made of: its share, beta (V - U), is what the product is
 * added to, in float32, and the tile has zeros there. So neither is rounded on that way.
 *
 * Preparing: a warpgroup makes Y and P of a chunk, 16 tokens a warp. (I + A)^-1 for the strictly
 * lower triangular A = B Diag(beta) goes by blocks of 16: the diagonal blocks D_i by substitution,
 * a warp each, then each warp has one column of blocks to itself,
 *   X_ii = D_i,   X_ij = -D_i sum_{j <= k < i} A_ik X_kj,
 * as X^T, whose accumulators are again the next product's left operand.
 *
 * With enough (sequence, head) pairs to fill the GPU a block does both, a third warpgroup preparing
 * ahead of two that step. With few pairs (long sequences) a step after the other bounds the time:
 * blocks that only step take chunks as other blocks, on all the other multiprocessors, prepare them
 * in the workspace. */
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/recurrent_chunks.cuh"

#include <cstdio>
#include <cstring>

using namespace hopper;
using chunked::CHUNK;
using chunked::sequence;
using chunked::SUBBLOCK;
using chunked::SUBBLOCKS;

namespace {

enum {
  TILE_BYTES = CHUNK * 128, /* 64 rows of 64 columns */
  GROUP = 128,              /* threads of a warpgroup */
  PITCH = CHUNK + 8,        /* of A in float32: pairs of columns in eight rows on different banks */
};

/* A stage of the ring, bytes. With a decay per channel Q and K become Qg and Kg in place. */
template <int DIM, bool CHANNEL, int GROUPS> struct stage {
  enum {
    ROWS = CHUNK * DIM * 2,
    K = 0,
    Q = ROWS,
    WRITTEN = 2 * ROWS, /* Kk, per channel */
    Y = (CHANNEL ? 3 : 2) * ROWS,
    P = Y + TILE_BYTES,
    NUMBERS = P + TILE_BYTES,
    GAMMA = NUMBERS,                     /* [64] exp(G), per token */
    KAPPA = NUMBERS + 256,               /* [64] exp(G_C - G) */
    FULL = NUMBERS + 512,                /* exp(G_C): [DIM] or [1] */
    BETA = CHANNEL ? GAMMA : FULL + 256, /* [64] */
    V = NUMBERS + 1024,                  /* a tile a warpgroup; O takes its place */
    BYTES = V + GROUPS * TILE_BYTES,
    /* What preparing leaves in the workspace for blocks that only step. */
    RECORD = CHANNEL ? 0 : Y,
    RECORD_BYTES = V - RECORD,
    LOADED_BYTES = 2 * ROWS + GROUPS * TILE_BYTES,
  };
};

/* Scratch of a preparation, bytes: A, before which keys times the inverse of their decay lie there;
 * each warp's copy of G and of beta; per channel the subblocks' totals and steep channels. */
template <int DIM, bool CHANNEL> struct scratch {
  enum {
    A = 0,
    SUMS = CHUNK * PITCH * 4,
    BETA = SUMS + 4 * CHUNK * 4,
    TOTALS = BETA + 4 * CHUNK * 4,
    STEEP = TOTALS + (CHANNEL ? SUBBLOCKS * DIM * 4 : 0),
    BYTES = STEEP + (CHANNEL ? 128 : 0),
  };
};

struct forward_parameters {
  CUtensorMap q, k, v, decay; /* decay: float32 as pairs of 16 bits */
  chunked::parameters p;
  /* Where blocks of their own prepare: how many, and a flag for each record. */
  int batch, preparers;
  uint32_t *flags;
};

/* ---- Instructions ---- */

__device__ __forceinline__ void bulk_load(uint32_t target, const void *from, int bytes,
                                          uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
               "[%3];" ::"r"(target),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void bulk_store(void *to, uint32_t source, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(source),
               "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
/* Four 8 x 8 matrices, each transposed; lane l gives the address of row l % 8 of matrix l / 8. */
__device__ __forceinline__ void matrix_store_transposed(uint32_t address, uint32_t a, uint32_t b,
                                                        uint32_t c, uint32_t d) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(a), "r"(b), "r"(c), "r"(d)
      : "memory");
}

/* In one piece; the compiler may split a conditional store. */
__device__ __forceinline__ void store_vector(void *to, const uint4 &x) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z),
               "r"(x.w)
               : "memory");
}

/* ---- Tiles ---- */

/* Addresses for ldmatrix and stmatrix of x[16, 16] at `row`, `column` (multiples of 16) of swizzled
 * tiles, in the order of a left operand's registers (and of a block of accumulators): rows 0..7 and
 * 8..15 of the columns 0..7, then of the columns 8..15. */
__device__ __forceinline__ uint32_t by_columns(uint32_t tile, int row, int column, int lane) {
  return (tile + column / 64 * TILE_BYTES + row * 128 + lane % 16 * 128 +
          ((lane / 16 ^ lane % 8) << 4)) ^
         (column % 64 * 2);
}
/* The columns 0..7 and 8..15 of the rows 0..7, then of the rows 8..15: a right operand that is the
 * transpose of x; with a transposing instruction, a left operand that is. */
__device__ __forceinline__ uint32_t by_rows(uint32_t tile, int row, int column, int lane) {
  return (tile + column / 64 * TILE_BYTES + row * 128 + (lane % 8 + lane / 16 * 8) * 128 +
          ((lane / 8 % 2 ^ lane % 8) << 4)) ^
         (column % 64 * 2);
}

/* Rows from `tokens` on become zero. */
__device__ __forceinline__ void clear_rows(char *tile, int tiles, int tokens, int thread,
                                           int threads) {
  for (int i = thread; i < tiles * (CHUNK - tokens) * 8; i += threads) {
    int row = tokens + i / 8 % (CHUNK - tokens), at = i / 8 / (CHUNK - tokens);
    *(uint4 *)(tile + at * TILE_BYTES + row * 128 + i % 8 * 16) = make_uint4(0, 0, 0, 0);
  }
}

/* ---- The inverse ---- */

/* c[16, 16] += x[16, 16] y^T, x as accumulators and y in float32 in shared memory. A tf32 product
 * of depth 8 takes the columns 2t and 2t + 1 of both sides as its depths t and t + 4. Elements are
 * accumulators' blocks of 8 columns, four each. SPLIT as in chunked::product_float. */
template <bool SPLIT>
__device__ __forceinline__ void times_transposed(float (&c)[2][4], const float (&x)[2][4],
                                                 const float *y, int lane) {
  int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) chunked::split(high[i], low[i], x[k][i % 2 * 2 + i / 2]);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float2 b = *(const float2 *)(y + (8 * n + g) * PITCH + 8 * k + 2 * t);
      uint32_t b_high[2], b_low[2];
      chunked::split(b_high[0], b_low[0], b.x);
      chunked::split(b_high[1], b_low[1], b.y);
      if (SPLIT) {
        chunked::product_tf32(c[n], low, b_high[0], b_high[1]);
        chunked::product_tf32(c[n], high, b_low[0], b_low[1]);
      }
      chunked::product_tf32(c[n], high, b_high[0], b_high[1]);
    }
  }
}

/* Diag(beta) ((I + A)^-1 - I), rounded, to the tile y. Each warp has written its 16 rows of A;
 * nothing on or above the diagonal is read. A warp's rows are announced to the warps before it, at
 * barrier + warp. */
template <typename E>
__device__ __forceinline__ void invert(float *a, uint32_t y, const float *beta, int warp, int lane,
                                       int barrier) {
  constexpr bool SPLIT = !chunked::coarse<E>();
  int g = lane / 4, t = lane % 4;
  {
    int column = lane % SUBBLOCK;
    float *block = a + warp * SUBBLOCK * (PITCH + 1);
    float z[SUBBLOCK];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < SUBBLOCK; ++i) {
      z[i] = i == column;
#pragma unroll
      for (int j = 0; j < i; j += 4) {
        float4 x = *(const float4 *)(block + i * PITCH + j);
        z[i] -= x.x * z[j];
        if (j + 1 < i) z[i] -= x.y * z[j + 1];
        if (j + 2 < i) z[i] -= x.z * z[j + 2];
        if (j + 3 < i) z[i] -= x.w * z[j + 3];
      }
    }
    __syncwarp();
    if (lane < SUBBLOCK) {
#pragma unroll
      for (int i = 0; i < SUBBLOCK; ++i) block[i * PITCH + column] = z[i];
    }
    __syncwarp();
    if (warp) chunked::barrier_arrive(barrier + warp, 32 * (warp + 1));
  }
  float x[SUBBLOCKS][2][4]; /* X_iw^T */
#pragma unroll
  for (int i = 0; i < SUBBLOCKS; ++i) {
    const float *inverse = a + i * SUBBLOCK * (PITCH + 1);
    if (i < warp) continue;
    if (i == warp) {
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int at = 0; at < 4; ++at)
          x[i][n][at] = inverse[(8 * n + 2 * t + at % 2) * PITCH + g + at / 2 * 8];
    } else {
      chunked::barrier_sync(barrier + i, 32 * (i + 1));
      float sum[2][4] = {};
#pragma unroll
      for (int j = 0; j < i; ++j)
        if (j >= warp)
          times_transposed<SPLIT>(sum, x[j], a + i * SUBBLOCK * PITCH + j * SUBBLOCK, lane);
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int at = 0; at < 4; ++at) sum[n][at] = -sum[n][at], x[i][n][at] = 0;
      times_transposed<SPLIT>(x[i], sum, inverse, lane);
    }
  }
  /* Stores at last, so that loads can run ahead of the products. */
#pragma unroll
  for (int i = 0; i < SUBBLOCKS; ++i) {
    if (i < warp) continue;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int at = 0; at < 4; ++at)
        if (i == warp && 8 * n + 2 * t + at % 2 == g + at / 2 * 8) x[i][n][at] = 0;
    float2 low = *(const float2 *)(beta + i * SUBBLOCK + 2 * t);
    float2 high = *(const float2 *)(beta + i * SUBBLOCK + 8 + 2 * t);
    matrix_store_transposed(by_rows(y, i * SUBBLOCK, warp * SUBBLOCK, lane),
                            element<E>::pack(low.x * x[i][0][0], low.y * x[i][0][1]),
                            element<E>::pack(low.x * x[i][0][2], low.y * x[i][0][3]),
                            element<E>::pack(high.x * x[i][1][0], high.y * x[i][1][1]),
                            element<E>::pack(high.x * x[i][1][2], high.y * x[i][1][3]));
  }
}

/* ---- Preparing a chunk ---- */

/* Two tokens' numbers in each lane of every warp, fetched a chunk ahead. */
struct token_numbers {
  float2 decay, beta;
};

template <bool CHANNEL>
__device__ __forceinline__ token_numbers load_numbers(const chunked::parameters &p,
                                                      const sequence &s, int64_t first, int head,
                                                      int lane) {
  token_numbers x = {{0, 0}, {0, 0}};
  int64_t i = first + 2 * lane;
  const float *beta = p.beta.at(s.batch, s.first + i, head);
  if (i < s.tokens) x.beta.x = beta[0];
  if (i + 1 < s.tokens) x.beta.y = beta[p.beta.token];
  if (CHANNEL || !p.decay.data) return x;
  const float *decay = p.decay.at(s.batch, s.first + i, head);
  if (i < s.tokens) x.decay.x = decay[0];
  if (i + 1 < s.tokens) x.decay.y = decay[p.decay.token];
  return x;
}

/* The scores of a warp's 16 rows with 16 columns: x (accumulators) to A, times beta of the column;
 * y to P, on the diagonal without what lies above. */
template <typename E>
__device__ __forceinline__ void store_scores(float *a, uint32_t p, const float *beta, int row_block,
                                             int column_block, const float *x, const float *y,
                                             int lane) {
  int g = lane / 4, t = lane % 4;
  float *to = a + (row_block * SUBBLOCK + g) * PITCH + column_block * SUBBLOCK + 2 * t;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float2 f = *(const float2 *)(beta + column_block * SUBBLOCK + 8 * half + 2 * t);
    const float *from = x + 4 * half;
    *(float2 *)(to + 8 * half) = make_float2(f.x * from[0], f.y * from[1]);
    *(float2 *)(to + 8 * PITCH + 8 * half) = make_float2(f.x * from[2], f.y * from[3]);
  }
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int row = g + i % 2 * 8, column = 2 * t + i / 2 * 8;
    bool all = column_block != row_block;
    words[i] = element<E>::pack(all || row >= column ? y[2 * i] : 0,
                                all || row > column ? y[2 * i + 1] : 0);
  }
  matrix_store(by_columns(p, row_block * SUBBLOCK, column_block * SUBBLOCK, lane), words[0],
               words[1], words[2], words[3]);
}

/* Called by a warpgroup; raw keys and queries are in the stage. While products run, `early` is
 * called. What was written is visible to wgmma and copies after a proxy_fence() of each thread and
 * a barrier. */
template <typename E, int DIM, int GROUPS, typename F>
__device__ __forceinline__ void prepare_tokens(char *memory, char *work, const token_numbers &of,
                                               int barrier, F early) {
  using S = stage<DIM, false, GROUPS>;
  using W = scratch<DIM, false>;
  int thread = threadIdx.x % GROUP, warp = thread / 32, lane = thread % 32, t = lane % 4;
  uint32_t at = shared_address(memory);
  float scores[32], weights[32];
  wgmma_fence();
#pragma unroll
  for (int c = 0; c < DIM / 16; ++c) {
    uint64_t k = descriptor(at + S::K + c / 4 * TILE_BYTES + c % 4 * 32);
    wgmma<E, 0, 0>(scores, k, k, c > 0);
  }
#pragma unroll
  for (int c = 0; c < DIM / 16; ++c) {
    uint32_t to = at + c / 4 * TILE_BYTES + c % 4 * 32;
    wgmma<E, 0, 0>(weights, descriptor(to + S::Q), descriptor(to + S::K), c > 0);
  }
  wgmma_commit();
  early();

  float x = chunked::log2_decay(of.decay.x), y = chunked::log2_decay(of.decay.y), both = x + y;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    float other = __shfl_up_sync(~0u, both, d);
    if (lane >= d) both += other;
  }
  float last = __shfl_sync(~0u, both, 31);
  float *sums = (float *)(work + W::SUMS) + warp * CHUNK;
  float *beta = (float *)(work + W::BETA) + warp * CHUNK;
  ((float2 *)sums)[lane] = make_float2(both - y, both);
  ((float2 *)beta)[lane] = of.beta;
  if (warp == 3) {
    ((float2 *)(memory + S::GAMMA))[lane] =
        make_float2(exp2_approximate(both - y), exp2_approximate(both));
    ((float2 *)(memory + S::KAPPA))[lane] =
        make_float2(exp2_approximate(last - both + y), exp2_approximate(last - both));
    ((float2 *)(memory + S::BETA))[lane] = of.beta;
    if (lane == 0) *(float *)(memory + S::FULL) = exp2_approximate(last);
  }
  __syncwarp();
  wgmma_wait<0>();
  pin(scores);
  pin(weights);

  float *a = (float *)(work + W::A);
  float low = sums[warp * SUBBLOCK + lane / 4], high = sums[warp * SUBBLOCK + lane / 4 + 8];
#pragma unroll
  for (int n = 0; n < 8; ++n)
    if (n / 2 <= warp) {
      float2 of_column = *(const float2 *)(sums + 8 * n + 2 * t);
      float decays[4] = {exp2_approximate(low - of_column.x), exp2_approximate(low - of_column.y),
                         exp2_approximate(high - of_column.x),
                         exp2_approximate(high - of_column.y)};
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[4 * n + i] *= decays[i], weights[4 * n + i] *= decays[i];
    }
#pragma unroll
  for (int block = 0; block < SUBBLOCKS; ++block)
    if (block <= warp)
      store_scores<E>(a, at + S::P, beta, warp, block, scores + 8 * block, weights + 8 * block,
                      lane);
  invert<E>(a, at + S::Y, beta, warp, lane, barrier);
}

/* The decays of a chunk's tokens, per channel, and where its raw rows are, for channels that are
 * not factored. */
struct channel_rows {
  const float *decay;
  int64_t decay_token;
  int tokens;
  int64_t first;
  int head;
};

__device__ __forceinline__ channel_rows rows_of_chunk(const chunked::parameters &p,
                                                      const sequence &s, int64_t first, int head) {
  return {p.decay.at(s.batch, s.first + first, head), p.decay.token,
          (int)min((int64_t)CHUNK, s.tokens - first), first, head};
}

/* Scores of the rows of subblock BLOCK; x[0] with its own columns, then with earlier subblocks,
 * nearest first. Operands as in chunked::channel_scores: rows decayed from the border before their
 * subblock, keys times the inverse of that, keys decayed to the end of their own subblock. */
template <int BLOCK, int UNROLL, typename E, int DIM>
__device__ __forceinline__ void
channel_scores(uint32_t q, uint32_t k, uint32_t written, uint32_t inverse, const float *totals,
               const unsigned *steep, const channel_rows &rows, const chunked::parameters &of,
               const sequence &s, int lane, float (&b)[BLOCK + 1][2][4],
               float (&p)[BLOCK + 1][2][4]) {
  constexpr int ROW = BLOCK * SUBBLOCK;
  int g = lane / 4, t = lane % 4;
#pragma unroll UNROLL
  for (int c = 0; c < DIM; c += 16) {
    uint32_t of_k[4], of_q[4], right[4];
    matrix_load(of_k, by_columns(k, ROW, c, lane));
    matrix_load(of_q, by_columns(q, ROW, c, lane));
    matrix_load(right, by_rows(inverse, ROW, c, lane));
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      chunked::product<E>(b[0][n], of_k, right[2 * n], right[2 * n + 1]);
      chunked::product<E>(p[0][n], of_q, right[2 * n], right[2 * n + 1]);
    }
    float2 between[2] = {{0, 0}, {0, 0}}; /* the decay of whole subblocks in between */
#pragma unroll
    for (int distance = 1; distance <= BLOCK; ++distance) {
      int s = BLOCK - distance;
      matrix_load(right, by_rows(written, s * SUBBLOCK, c, lane));
      if (distance > 1)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float2 whole = *(const float2 *)(totals + (s + 1) * DIM + c + 2 * t + 8 * i);
          between[i].x += whole.x, between[i].y += whole.y;
          uint32_t e =
              element<E>::pack(exp2_approximate(between[i].x), exp2_approximate(between[i].y));
          right[i] = chunked::multiply(right[i], e, E());
          right[i + 2] = chunked::multiply(right[i + 2], e, E());
        }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        chunked::product<E>(b[distance][n], of_k, right[2 * n], right[2 * n + 1]);
        chunked::product<E>(p[distance][n], of_q, right[2 * n], right[2 * n + 1]);
      }
    }
  }
  /* Steep channels: every pair has its own decay; a lane of 16 sums up one token's. */
  for (int h = 0; h < DIM / 32; ++h)
    for (unsigned rest = steep[h]; rest; rest &= rest - 1) {
      int c = 64 * (h / 2) + 2 * (__ffs(rest) - 1) + h % 2, token = ROW + lane % SUBBLOCK;
      float sum = 0, of_q = 0, of_k = 0;
      if (token < rows.tokens) {
        sum = chunked::log2_decay(rows.decay[token * rows.decay_token + c]);
        of_q = float(chunked::as<E>(of.q).at(s.batch, s.first + rows.first + token,
                                             rows.head / of.group)[c]);
        of_k = float(chunked::as<E>(of.k).at(s.batch, s.first + rows.first + token,
                                             rows.head / of.group)[c]);
      }
#pragma unroll
      for (int d = 1; d < SUBBLOCK; d *= 2) {
        float other = __shfl_up_sync(~0u, sum, d, SUBBLOCK);
        if (lane % SUBBLOCK >= d) sum += other;
      }
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        int i = g + n / 4 * 8, j = n / 2 % 2 * 8 + 2 * t + n % 2;
        float decay = __shfl_sync(~0u, sum, i) - __shfl_sync(~0u, sum, j);
        float right = __shfl_sync(~0u, of_k, j);
        float left_k = __shfl_sync(~0u, of_k, i), left_q = __shfl_sync(~0u, of_q, i);
        float factor = i >= j ? right * exp2_approximate(decay) : 0;
        b[0][n / 2 % 2][n / 4 * 2 + n % 2] += left_k * factor;
        p[0][n / 2 % 2][n / 4 * 2 + n % 2] += left_q * factor;
      }
    }
}

/* With a decay per channel. `early` is called once the decays have been read, `late` after the
 * scores. */
template <typename E, int DIM, int GROUPS, typename F, typename G>
__device__ __forceinline__ void prepare_channels(char *memory, char *work, const char *decays,
                                                 const token_numbers &of, const channel_rows &rows,
                                                 const chunked::parameters &p, const sequence &s,
                                                 int barrier, F early, G late) {
  using S = stage<DIM, true, GROUPS>;
  using W = scratch<DIM, true>;
  constexpr bool CLOSE = GROUPS > 0; /* decays have been copied */
  constexpr int HALVES = DIM / 64;
  int thread = threadIdx.x % GROUP, warp = thread / 32, lane = thread % 32, row = warp * SUBBLOCK;
  uint32_t at = shared_address(memory);
  float *totals = (float *)(work + W::TOTALS), *a = (float *)(work + W::A);
  unsigned *steep = (unsigned *)(work + W::STEEP);
  float *beta = (float *)(work + W::BETA) + warp * CHUNK;
  ((float2 *)beta)[lane] = of.beta;
  if (warp == 0) ((float2 *)(memory + S::BETA))[lane] = of.beta;
  /* Elementwise a warp has its 16 rows, and a lane of it two channels of each 64. */
  auto own = [&](char *tiles, int half, int i) {
    return (uint32_t *)(tiles + half * TILE_BYTES + row * 128 + i * 128 +
                        ((lane / 4 ^ i % 8) << 4) + lane % 4 * 4);
  };
#pragma unroll
  for (int h = 0; h < HALVES; ++h) {
    int channel = 64 * h + 2 * lane;
    float2 sum[SUBBLOCK], last = {0, 0};
#pragma unroll
    for (int i = 0; i < SUBBLOCK; ++i)
      if (CLOSE) /* swizzled tiles of 32 channels */
        sum[i] = *(const float2 *)(decays + (2 * h + lane / 16) * TILE_BYTES +
                                   swizzled(row + i, lane % 16 / 2) + lane % 2 * 8);
      else
        sum[i] = *(const float2 *)(rows.decay + min(row + i, rows.tokens - 1) * rows.decay_token +
                                   channel);
#pragma unroll
    for (int i = 0; i < SUBBLOCK; ++i) {
      bool valid = row + i < rows.tokens;
      last.x += valid ? chunked::log2_decay(sum[i].x) : 0;
      last.y += valid ? chunked::log2_decay(sum[i].y) : 0;
      sum[i] = last;
    }
    *(float2 *)(totals + warp * DIM + channel) = last;
    bool low = last.x >= chunked::MIN_FACTORED, high = last.y >= chunked::MIN_FACTORED;
    unsigned steep_low = __ballot_sync(~0u, !low), steep_high = __ballot_sync(~0u, !high);
    if (lane == 0) *(uint2 *)(steep + 2 * (warp * HALVES + h)) = make_uint2(steep_low, steep_high);
    /* Where all channels are factored, what decays to the end does so from the inverse. Loads come
     * first, for they do not pass stores. */
    auto decay_rows = [&](auto factored) {
      constexpr bool FACTORED = decltype(factored)::value;
      const float end0 = exp2_approximate(last.x), end1 = exp2_approximate(last.y);
#pragma unroll
      for (int from = 0; from < SUBBLOCK; from += 8) {
        uint32_t q[8], k[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          q[i] = *own(memory + S::Q, h, from + i);
          k[i] = *own(memory + S::K, h, from + i);
        }
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          const int i = from + n;
          float2 x = element<E>::unpack(q[n]), y = element<E>::unpack(k[n]);
          float e0 = exp2_approximate(sum[i].x), e1 = exp2_approximate(sum[i].y);
          float inverse0 = FACTORED || low ? y.x * exp2_approximate(-sum[i].x) : 0;
          float inverse1 = FACTORED || high ? y.y * exp2_approximate(-sum[i].y) : 0;
          *own(memory + S::Q, h, i) = element<E>::pack(x.x * e0, x.y * e1);
          *own(memory + S::K, h, i) = element<E>::pack(y.x * e0, y.y * e1);
          *own(work + W::A, h, i) = element<E>::pack(inverse0, inverse1);
          *own(memory + S::WRITTEN, h, i) =
              FACTORED ? element<E>::pack(inverse0 * end0, inverse1 * end1)
                       : element<E>::pack(y.x * exp2_approximate(last.x - sum[i].x),
                                          y.y * exp2_approximate(last.y - sum[i].y));
        }
      }
    };
    if (steep_low | steep_high)
      decay_rows(chunked::number<0>());
    else
      decay_rows(chunked::number<1>());
  }
  named_sync(barrier, GROUP);
  early();
  auto scores = [&](auto constant) {
    constexpr int BLOCK = decltype(constant)::value;
    float of_b[BLOCK + 1][2][4] = {}, of_p[BLOCK + 1][2][4] = {};
    channel_scores<BLOCK, GROUPS == 2 ? 1 : 2, E, DIM>(
        at + S::Q, at + S::K, at + S::WRITTEN, shared_address(work + W::A), totals,
        steep + 2 * BLOCK * HALVES, rows, p, s, lane, of_b, of_p);
    if (BLOCK == 0) late();     /* its warp has the fewest */
    named_sync(barrier, GROUP); /* A takes the place of the inverted keys */
#pragma unroll
    for (int distance = 0; distance <= BLOCK; ++distance)
      store_scores<E>(a, at + S::P, beta, BLOCK, BLOCK - distance, &of_b[distance][0][0],
                      &of_p[distance][0][0], lane);
  };
  switch (warp) {
  case 0: scores(chunked::number<0>()); break;
  case 1: scores(chunked::number<1>()); break;
  case 2: scores(chunked::number<2>()); break;
  default: scores(chunked::number<3>());
  }

  /* Rows from the subblocks' borders to the chunk's. */
#pragma unroll
  for (int h = 0; h < HALVES; ++h) {
    int channel = 64 * h + 2 * lane;
    float2 before = {0, 0}, after = {0, 0}, all = {0, 0};
#pragma unroll
    for (int s = 0; s < SUBBLOCKS; ++s) {
      float2 y = *(const float2 *)(totals + s * DIM + channel);
      if (s < warp) before.x += y.x, before.y += y.y;
      if (s > warp) after.x += y.x, after.y += y.y;
      all.x += y.x, all.y += y.y;
    }
    auto scale_rows = [&](char *tiles, float2 by) {
      uint32_t factor = element<E>::pack(exp2_approximate(by.x), exp2_approximate(by.y));
      uint32_t x[SUBBLOCK];
#pragma unroll
      for (int i = 0; i < SUBBLOCK; ++i) x[i] = *own(tiles, h, i);
#pragma unroll
      for (int i = 0; i < SUBBLOCK; ++i) *own(tiles, h, i) = chunked::multiply(x[i], factor, E());
    };
    if (warp) {
      scale_rows(memory + S::Q, before);
      scale_rows(memory + S::K, before);
    } else {
      *(float2 *)(memory + S::FULL + 4 * channel) =
          make_float2(exp2_approximate(all.x), exp2_approximate(all.y));
    }
    if (warp < SUBBLOCKS - 1) scale_rows(memory + S::WRITTEN, after);
  }
  invert<E>(a, at + S::Y, beta, warp, lane, barrier);
}

/* Y and P above the diagonal are zero and stay so. */
template <typename S> __device__ __forceinline__ void clear_squares(char *memory, int thread) {
  for (int i = thread; i < 2 * TILE_BYTES / 16; i += GROUP)
    ((uint4 *)(memory + S::Y))[i] = make_uint4(0, 0, 0, 0);
}

/* ---- Steps ---- */

/* Stages, of which chunk c uses number c % stages, and a barrier of each for what has happened: it
 * is prepared; its copies have arrived; it was read; O lies there (where another warp stores it).
 */
struct ring {
  char *memory;
  uint32_t ready, loaded, freed, written;
};

/* Ends the life of old values, which products that do not add would seem to read. */
__device__ __forceinline__ void forget(float (&x)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) asm volatile("" : "=f"(x[i]));
}

/* out[64, 64] = x[64, DIM] rows^T for rows[64, DIM] in tiles. */
template <typename E, int STEPS>
__device__ __forceinline__ void times_rows(float (&out)[32], const uint32_t (&x)[STEPS][4],
                                           uint32_t tiles, int add) {
  if (!add) forget(out);
#pragma unroll
  for (int c = 0; c < STEPS; ++c)
    wgmma<E, 0>(out, x[c], descriptor(tiles + c / 4 * TILE_BYTES + c % 4 * 32), add || c > 0);
}

template <int STEPS> __device__ __forceinline__ void pin(uint32_t (&x)[STEPS][4]) {
#pragma unroll
  for (int c = 0; c < STEPS; ++c) hopper::pin(x[c]);
}

/* Accumulators [64, 16 STEPS] as left operands. */
template <typename E, int STEPS, int COUNT>
__device__ __forceinline__ void round(uint32_t (&x)[STEPS][4], const float (&from)[COUNT]) {
#pragma unroll
  for (int c = 0; c < STEPS; ++c)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      x[c][i] = element<E>::pack(from[8 * c + 2 * i], from[8 * c + 2 * i + 1]);
}

/* A warpgroup walks over the chunks of one sequence and head with 64 value columns. `part` is the
 * place of its values in a stage; FUSED: values of the last chunk are clean, and so are keys. */
template <typename E, int DIM, bool CHANNEL, int GROUPS, int STAGES, bool FUSED>
__device__ __forceinline__ void walk(const chunked::parameters &p, const ring &r, const sequence &s,
                                     int slot, int head, int column, int part) {
  using S = stage<DIM, CHANNEL, GROUPS>;
  const int thread = threadIdx.x % GROUP, warp = thread / 32, lane = thread % 32;
  const int g = lane / 4, t = lane % 4;
  float state[DIM / 2], u[32], o[32], u_or_w[32];
  float(&w)[32] = FUSED ? u : u_or_w; /* where registers are few */
  uint32_t rounded[DIM / 16][4], x[SUBBLOCKS][4], y[SUBBLOCKS][4];

  const int own = column + warp * SUBBLOCK + g;
#pragma unroll
  for (int i = 0; i < DIM / 2; ++i) state[i] = 0;
  if (p.initial.data) {
    const float *from = p.initial.at(slot, head) + own;
#pragma unroll
    for (int i = 0; i < DIM / 2; ++i)
      state[i] = from[(i / 4 * 8 + 2 * t + i % 2) * p.initial.row + i / 2 % 2 * 8];
  }

  auto wait_ready = [&](int at, uint32_t parity) {
    barrier_wait(r.ready + at * 8, parity);
    if (FUSED) barrier_wait(r.loaded + at * 8, parity);
  };
  /* Where this lane's first row of a chunk goes. */
  E *out = chunked::as<E>(p.o).at(s.batch, s.first + lane / 2, head) + column + warp * SUBBLOCK +
           lane % 2 * 8;
  /* A warp's columns of O to the place of V; in one kernel from there to memory, after which the
   * stage is free. */
  auto write_output = [&](int at, int tokens) {
    char *tile = r.memory + at * S::BYTES + S::V + part * TILE_BYTES;
#pragma unroll
    for (int c = 0; c < SUBBLOCKS; ++c)
      matrix_store_transposed(by_rows(shared_address(tile), c * SUBBLOCK, warp * SUBBLOCK, lane),
                              x[c][0], x[c][1], x[c][2], x[c][3]);
    __syncwarp();
    if constexpr (!FUSED) {
      if (lane == 0) barrier_arrive(r.written + at * 8);
    } else {
      uint4 rows[4];
#pragma unroll
      for (int n = 0; n < 4; ++n)
        rows[n] = *(const uint4 *)(tile + swizzled(16 * n + lane / 2, 2 * warp + lane % 2));
      proxy_fence();
      __syncwarp();
      if (lane == 0) barrier_arrive(r.freed + at * 8);
#pragma unroll
      for (int n = 0; n < 4; ++n)
        if (16 * n + lane / 2 < tokens) store_vector(out + 16 * n * p.o.token, rows[n]);
      out += CHUNK * p.o.token;
    }
  };

  round<E>(rounded, state);
  int at = 0;
  uint32_t parity = 0;
  for (int left = s.tokens; left > 0; left -= CHUNK) {
    char *memory = r.memory + at * S::BYTES;
    const uint32_t here = shared_address(memory), v = here + S::V + part * TILE_BYTES;
    wait_ready(at, parity);
    wgmma_fence();
    times_rows<E>(u, rounded, here + S::K, 0);
    wgmma_commit();
    if (FUSED) { /* registers are few: R takes the place of the rounded state */
      wgmma_fence();
      times_rows<E>(o, rounded, here + S::Q, 0);
      wgmma_commit();
    }
    wgmma_wait<0>();
    hopper::pin(u);
    if (FUSED) {
      hopper::pin(o);
      pin(rounded);
    } else {
      wgmma_fence();
      times_rows<E>(o, rounded, here + S::Q, 0);
      wgmma_commit();
    }
    /* R^T = V^T - U^T, per token U's rows times exp(G); w begins as beta R^T. */
    const float *gamma = (const float *)(memory + S::GAMMA) + 2 * t;
    const float *kappa = gamma + (S::KAPPA - S::GAMMA) / 4;
    const float *beta = gamma + (S::BETA - S::GAMMA) / 4;
#pragma unroll
    for (int c = 0; c < SUBBLOCKS; ++c) {
      uint32_t of_v[4];
      matrix_load_transposed(of_v, by_rows(v, c * SUBBLOCK, warp * SUBBLOCK, lane));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float2 values = element<E>::unpack(of_v[i]);
        float2 factor =
            CHANNEL ? make_float2(1, 1) : *(const float2 *)(gamma + c * SUBBLOCK + i / 2 * 8);
        const float2 of_beta = *(const float2 *)(beta + c * SUBBLOCK + i / 2 * 8);
        const float low = values.x - factor.x * u[8 * c + 2 * i];
        const float high = values.y - factor.y * u[8 * c + 2 * i + 1];
        y[c][i] = element<E>::pack(low, high);
        w[8 * c + 2 * i] = of_beta.x * low, w[8 * c + 2 * i + 1] = of_beta.y * high;
        if (FUSED && !CHANNEL) o[8 * c + 2 * i] *= factor.x, o[8 * c + 2 * i + 1] *= factor.y;
      }
    }
    hopper::pin(w);
    wgmma_fence();
    times_rows<E>(w, y, here + S::Y, 1);
    wgmma_commit();
    const float *full = gamma + (S::FULL - S::GAMMA) / 4;
    if (CHANNEL) {
#pragma unroll
      for (int n = 0; n < DIM / 8; ++n) {
        float2 factor = *(const float2 *)(full + 8 * n);
        state[4 * n] *= factor.x, state[4 * n + 1] *= factor.y;
        state[4 * n + 2] *= factor.x, state[4 * n + 3] *= factor.y;
      }
    } else {
      float factor = *(const float *)(memory + S::FULL);
#pragma unroll
      for (int i = 0; i < DIM / 2; ++i) state[i] *= factor;
    }
    wgmma_wait<0>();
    hopper::pin(w);
    if (!FUSED) {
      hopper::pin(o);
      pin(rounded);
    }
    pin(y);
    /* V' for O and, per token times exp(G_C - G), for S. */
#pragma unroll
    for (int c = 0; c < SUBBLOCKS; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float low = w[8 * c + 2 * i], high = w[8 * c + 2 * i + 1];
        x[c][i] = element<E>::pack(low, high);
        if (!CHANNEL) {
          float2 of_s = *(const float2 *)(kappa + c * SUBBLOCK + i / 2 * 8);
          y[c][i] = element<E>::pack(low * of_s.x, high * of_s.y);
          if (!FUSED) {
            float2 of_o = *(const float2 *)(gamma + c * SUBBLOCK + i / 2 * 8);
            o[8 * c + 2 * i] *= of_o.x, o[8 * c + 2 * i + 1] *= of_o.y;
          }
        }
      }
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < SUBBLOCKS; ++c)
      wgmma<E, 1>(state, CHANNEL ? x[c] : y[c],
                  descriptor(here + (CHANNEL ? S::WRITTEN : S::K) + c * 2048, TILE_BYTES), 1);
    wgmma_commit();
    times_rows<E>(o, x, here + S::P, 1);
    wgmma_commit();
    wgmma_wait<1>();
    hopper::pin(state);
    if (!CHANNEL) pin(y);
    round<E>(rounded, state);
    wgmma_wait<0>();
    hopper::pin(o);
    pin(x);
    /* Before the next product is in flight, lest the compiler waits for it. */
#pragma unroll
    for (int i = 0; i < 32; ++i) o[i] *= p.scale;
    round<E>(x, o);
    write_output(at, left);
    if (++at == STAGES) at = 0, parity ^= 1;
  }
  if (p.final.data) {
    float *to = p.final.at(slot, head) + own;
#pragma unroll
    for (int i = 0; i < DIM / 2; ++i)
      to[(i / 4 * 8 + 2 * t + i % 2) * p.final.row + i / 2 % 2 * 8] = state[i];
  }
}

/* ---- One kernel ---- */

template <int DIM, bool CHANNEL, int GROUPS> struct fused {
  using S = stage<DIM, CHANNEL, GROUPS>;
  enum {
    STAGES = CHANNEL ? 2 : 3,
    THREADS = (GROUPS + 1) * GROUP,
    WORK = STAGES * S::BYTES,
    DECAYS = WORK + (scratch<DIM, CHANNEL>::BYTES + 1023) / 1024 * 1024, /* per channel */
    BARRIERS = DECAYS + (CHANNEL ? CHUNK * DIM * 4 : 0),
    BYTES = BARRIERS + (3 * STAGES + 1) * 8,
    /* Of three warpgroups' 504 a lane. */
    PREPARE_REGISTERS = 120,
    STEP_REGISTERS = 192,
  };
};

template <typename E, int DIM, bool CHANNEL, int GROUPS>
__device__ __forceinline__ void prepare_all(const forward_parameters &f, char *memory,
                                            const ring &r, const sequence &s, int head,
                                            int column) {
  using F = fused<DIM, CHANNEL, GROUPS>;
  using S = typename F::S;
  const chunked::parameters &p = f.p;
  const int thread = threadIdx.x % GROUP, lane = thread % 32;
  const int chunks = (s.tokens + CHUNK - 1) / CHUNK;
  const uint32_t decayed = r.freed + F::STAGES * 8;
  char *decays = memory + F::DECAYS;
  const int key_head = head / p.group;
  auto load = [&](int chunk) {
    int at = chunk % F::STAGES, token = (int)s.first + chunk * CHUNK;
    uint32_t to = shared_address(r.memory + at * S::BYTES), barrier = r.loaded + at * 8;
    barrier_expect(barrier, S::LOADED_BYTES);
    for (int i = 0; i < DIM / 64; ++i) {
      tensor_load(to + S::K + i * TILE_BYTES, &f.k, barrier, 64 * i, key_head, token, (int)s.batch);
      tensor_load(to + S::Q + i * TILE_BYTES, &f.q, barrier, 64 * i, key_head, token, (int)s.batch);
    }
    for (int i = 0; i < GROUPS; ++i)
      tensor_load(to + S::V + i * TILE_BYTES, &f.v, barrier, column + 64 * i, head, token,
                  (int)s.batch);
  };
  auto load_decays = [&](int chunk) {
    barrier_expect(decayed, CHUNK * DIM * 4);
    for (int i = 0; i < DIM / 32; ++i)
      tensor_load(shared_address(decays) + i * TILE_BYTES, &f.decay, decayed, 64 * i, head,
                  (int)s.first + chunk * CHUNK, (int)s.batch);
  };
  if (!chunks) return;
  for (int i = 0; i < F::STAGES; ++i) clear_squares<S>(r.memory + i * S::BYTES, thread);
  if (thread == 0) {
    load(0);
    if (CHANNEL) load_decays(0);
  }
  token_numbers numbers = load_numbers<CHANNEL>(p, s, 0, head, lane);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int at = chunk % F::STAGES, next = chunk + 1;
    char *here = r.memory + at * S::BYTES;
    /* The next chunk's copies: the steps that had their stage are over, or soon will be. */
    auto load_next = [&] {
      if (thread == 0 && next < chunks) {
        if (next >= F::STAGES)
          barrier_wait(r.freed + next % F::STAGES * 8, (next / F::STAGES - 1) & 1);
        load(next);
      }
      __syncwarp();
    };
    token_numbers of = numbers;
    if (next < chunks) numbers = load_numbers<CHANNEL>(p, s, (int64_t)next * CHUNK, head, lane);
    barrier_wait(r.loaded + at * 8, chunk / F::STAGES & 1);
    int tokens = min(CHUNK, s.tokens - chunk * CHUNK);
    if (tokens < CHUNK) {
      clear_rows(here + S::K, 2 * DIM / 64, tokens, thread, GROUP);
      clear_rows(here + S::V, GROUPS, tokens, thread, GROUP);
      proxy_fence();
      named_sync(1, GROUP);
    }
    if constexpr (CHANNEL) {
      barrier_wait(decayed, chunk & 1);
      auto load_next_decays = [&] {
        if (thread == 0 && next < chunks) load_decays(next);
        __syncwarp();
      };
      prepare_channels<E, DIM, GROUPS>(here, memory + F::WORK, decays, of,
                                       rows_of_chunk(p, s, (int64_t)chunk * CHUNK, head), p, s, 1,
                                       load_next_decays, load_next);
    } else {
      prepare_tokens<E, DIM, GROUPS>(here, memory + F::WORK, of, 1, load_next);
    }
    proxy_fence();
    barrier_arrive(r.ready + at * 8);
    named_sync(1, GROUP); /* the scratch was read */
  }
}

template <typename E, int DIM, bool CHANNEL, int GROUPS>
__global__ void __launch_bounds__((GROUPS + 1) * GROUP, 1)
    fused_kernel(const __grid_constant__ forward_parameters f) {
  extern __shared__ __align__(1024) char memory[];
  using F = fused<DIM, CHANNEL, GROUPS>;
  const int head = blockIdx.x, slot = blockIdx.y, column = blockIdx.z * GROUPS * 64;
  const sequence s = chunked::find_sequence(f.p.offsets, f.p.length, slot);
  const uint32_t barriers = shared_address(memory + F::BARRIERS);
  const ring r = {memory, barriers, barriers + F::STAGES * 8, barriers + 2 * F::STAGES * 8, 0};
  if (threadIdx.x == 0) {
    for (int i = 0; i < F::STAGES; ++i) {
      barrier_init(r.ready + i * 8, GROUP);
      barrier_init(r.loaded + i * 8, 1);
      barrier_init(r.freed + i * 8, GROUPS * 4);
    }
    barrier_init(r.freed + F::STAGES * 8, 1);
    barrier_init_fence();
  }
  __syncthreads();
  if (__shfl_sync(~0u, threadIdx.x / GROUP, 0) == 0) {
    if (GROUPS > 1) registers_fewer<F::PREPARE_REGISTERS>();
    prepare_all<E, DIM, CHANNEL, GROUPS>(f, memory, r, s, head, column);
  } else {
    if (GROUPS > 1) registers_more<F::STEP_REGISTERS>();
    int part = threadIdx.x / GROUP - 1;
    walk<E, DIM, CHANNEL, GROUPS, F::STAGES, true>(f.p, r, s, slot, head, column + 64 * part, part);
  }
}

/* ---- Blocks that prepare and blocks that step ---- */

__device__ __forceinline__ void raise_flag(uint32_t *flag) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(1) : "memory");
}
__device__ __forceinline__ uint32_t read_flag(const uint32_t *flag) {
  uint32_t raised;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(raised) : "l"(flag) : "memory");
  return raised;
}
/* Orders ordinary accesses before and after with copies, in all memories. */
__device__ __forceinline__ void proxy_fence_global() {
  asm volatile("fence.proxy.async;" ::: "memory");
}

template <int DIM, bool CHANNEL> struct apart {
  using P = stage<DIM, CHANNEL, 0>;
  using S = stage<DIM, CHANNEL, 1>;
  enum {
    STAGES = 3,
    THREADS = 2 * GROUP,
    AREA = P::BYTES + (scratch<DIM, CHANNEL>::BYTES + 1023) / 1024 * 1024, /* of a preparation */
    PREPARE_BYTES = 2 * (AREA + 8),
    STEP_BYTES = STAGES * (S::BYTES + 3 * 8) + 8,
    BYTES = (int)PREPARE_BYTES > (int)STEP_BYTES ? (int)PREPARE_BYTES : (int)STEP_BYTES,
  };
};

/* A warpgroup prepares chunk after chunk, all first ones first, into the workspace. */
template <typename E, int DIM, bool CHANNEL>
__device__ __forceinline__ void prepare_items(const forward_parameters &f, char *memory,
                                              uint32_t barrier, int group) {
  using S = stage<DIM, CHANNEL, 0>;
  const chunked::parameters &p = f.p;
  const int thread = threadIdx.x % GROUP, lane = thread % 32, barrier_id = 1 + 4 * group;
  const int64_t items = p.chunks * f.batch * p.value_heads;
  const uint32_t at = shared_address(memory);
  char *work = memory + S::BYTES;
  uint32_t parity = 0;
  uint32_t *written = NULL; /* the last record's flag, until it is raised */
  auto raise = [&] {
    if (!written) return;
    tensor_store_wait();
    proxy_fence_global();
    raise_flag(written);
    written = NULL;
  };
  clear_squares<S>(memory, thread);
  for (int64_t item = blockIdx.x * 2 + group; item < items; item += f.preparers * 2) {
    const int head = (int)(item % p.value_heads);
    const int slot = (int)(item / p.value_heads % f.batch);
    const int64_t chunk = item / p.value_heads / f.batch, first = chunk * CHUNK;
    const sequence s = chunked::find_sequence(p.offsets, p.length, slot);
    if (first >= s.tokens) continue;
    const int tokens = (int)min((int64_t)CHUNK, s.tokens - first);
    if (thread == 0) {
      tensor_store_read();
      barrier_expect(barrier, S::LOADED_BYTES);
      for (int i = 0; i < DIM / 64; ++i) {
        tensor_load(at + S::K + i * TILE_BYTES, &f.k, barrier, 64 * i, head / p.group,
                    (int)(s.first + first), (int)s.batch);
        tensor_load(at + S::Q + i * TILE_BYTES, &f.q, barrier, 64 * i, head / p.group,
                    (int)(s.first + first), (int)s.batch);
      }
      raise();
    }
    token_numbers of = load_numbers<CHANNEL>(p, s, first, head, lane);
    barrier_wait(barrier, parity);
    parity ^= 1;
    if (tokens < CHUNK) {
      clear_rows(memory + S::K, 2 * DIM / 64, tokens, thread, GROUP);
      proxy_fence();
      named_sync(barrier_id, GROUP);
    }
    if constexpr (CHANNEL)
      prepare_channels<E, DIM, 0>(
          memory, work, NULL, of, rows_of_chunk(p, s, first, head), p, s, barrier_id, [] {}, [] {});
    else
      prepare_tokens<E, DIM, 0>(memory, work, of, barrier_id, [] {});
    proxy_fence();
    named_sync(barrier_id, GROUP);
    if (thread == 0) {
      const int64_t slot_of_record = (slot * p.chunks + chunk) * p.value_heads + head;
      bulk_store(p.prepared + slot_of_record * S::RECORD_BYTES, at + S::RECORD, S::RECORD_BYTES);
      written = f.flags + slot_of_record;
    }
  }
  if (thread == 0) raise();
}

/* A warp fetches the chunks of one sequence and head, values of 64 columns, once they are there. */
template <typename E, int DIM, bool CHANNEL>
__device__ __forceinline__ void fetch_chunks(const forward_parameters &f, const ring &r,
                                             const sequence &s, int slot, int head, int column) {
  using A = apart<DIM, CHANNEL>;
  using S = typename A::S;
  const chunked::parameters &p = f.p;
  const int lane = threadIdx.x % 32, chunks = (s.tokens + CHUNK - 1) / CHUNK;
  int known = 0; /* chunks that are prepared */
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int at = chunk % A::STAGES, token = (int)s.first + chunk * CHUNK;
    const int tokens = min(CHUNK, s.tokens - chunk * CHUNK);
    char *here = r.memory + at * S::BYTES;
    /* The last chunk is cleaned before it is ready. */
    const uint32_t to = shared_address(here), ready = r.ready + at * 8;
    const uint32_t barrier = tokens < CHUNK ? r.freed + A::STAGES * 8 : ready;
    if (chunk >= A::STAGES) barrier_wait(r.freed + at * 8, (chunk / A::STAGES - 1) & 1);
    /* A look at the flags costs as much as a step: at 32 chunks' at once. */
    while (known <= chunk) {
      const int n = chunk + lane;
      const unsigned up = __ballot_sync(
          ~0u, n < chunks && read_flag(f.flags + (slot * p.chunks + n) * p.value_heads + head));
      known = chunk + (up == ~0u ? 32 : __ffs(~up) - 1);
      __syncwarp();
      if (known > chunk) proxy_fence_global();
    }
    if (lane == 0) {
      const int64_t record = (slot * p.chunks + chunk) * p.value_heads + head;
      barrier_expect(barrier, S::RECORD_BYTES + TILE_BYTES + (CHANNEL ? 0 : 2 * S::ROWS));
      if (!CHANNEL)
        for (int i = 0; i < DIM / 64; ++i) {
          tensor_load(to + S::K + i * TILE_BYTES, &f.k, barrier, 64 * i, head / p.group, token,
                      (int)s.batch);
          tensor_load(to + S::Q + i * TILE_BYTES, &f.q, barrier, 64 * i, head / p.group, token,
                      (int)s.batch);
        }
      tensor_load(to + S::V, &f.v, barrier, column, head, token, (int)s.batch);
      bulk_load(to + S::RECORD, p.prepared + record * S::RECORD_BYTES, S::RECORD_BYTES, barrier);
    }
    __syncwarp();
    if (tokens == CHUNK) continue;
    barrier_wait(barrier, 0);
    if (!CHANNEL) clear_rows(here + S::K, 2 * DIM / 64, tokens, lane, 32);
    clear_rows(here + S::V, 1, tokens, lane, 32);
    proxy_fence();
    __syncwarp();
    if (lane == 0) barrier_arrive(ready);
  }
}

/* A warp stores the results of 64 value columns. */
template <typename E, int DIM, bool CHANNEL>
__device__ __forceinline__ void store_chunks(const chunked::parameters &p, const ring &r,
                                             const sequence &s, int head, int column) {
  using A = apart<DIM, CHANNEL>;
  using S = typename A::S;
  const int lane = threadIdx.x % 32, chunks = (s.tokens + CHUNK - 1) / CHUNK;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int at = chunk % A::STAGES, tokens = s.tokens - chunk * CHUNK;
    const char *tile = r.memory + at * S::BYTES + S::V;
    barrier_wait(r.written + at * 8, chunk / A::STAGES & 1);
    uint4 rows[16];
#pragma unroll
    for (int n = 0; n < 16; ++n)
      rows[n] = *(const uint4 *)(tile + swizzled(4 * n + lane / 8, lane % 8));
    proxy_fence();
    __syncwarp();
    if (lane == 0) barrier_arrive(r.freed + at * 8);
    E *to = chunked::as<E>(p.o).at(s.batch, s.first + chunk * CHUNK + lane / 8, head) + column +
            lane % 8 * 8;
#pragma unroll
    for (int n = 0; n < 16; ++n)
      if (4 * n + lane / 8 < tokens) store_vector(to + 4 * n * p.o.token, rows[n]);
  }
}

/* The first blocks prepare and wait for nobody; they leave multiprocessors to the others, each of
 * which steps over 64 value columns of one sequence and head. */
template <typename E, int DIM, bool CHANNEL>
__global__ void __launch_bounds__(2 * GROUP, 1)
    split_kernel(const __grid_constant__ forward_parameters f) {
  extern __shared__ __align__(1024) char memory[];
  using A = apart<DIM, CHANNEL>;
  using S = typename A::S;
  const chunked::parameters &p = f.p;
  const int group = __shfl_sync(~0u, threadIdx.x / GROUP, 0);
  if ((int)blockIdx.x < f.preparers) {
    const uint32_t barriers = shared_address(memory + 2 * A::AREA);
    if (threadIdx.x == 0) {
      for (int i = 0; i < 2; ++i) barrier_init(barriers + i * 8, 1);
      barrier_init_fence();
    }
    __syncthreads();
    prepare_items<E, DIM, CHANNEL>(f, memory + group * A::AREA, barriers + group * 8, group);
    return;
  }
  const int block = (int)blockIdx.x - f.preparers, parts = p.columns / 64;
  const int column = block % parts * 64, head = block / parts % p.value_heads;
  const int slot = block / parts / p.value_heads;
  const sequence s = chunked::find_sequence(p.offsets, p.length, slot);
  const uint32_t barriers = shared_address(memory + A::STAGES * S::BYTES);
  const ring r = {memory, barriers, barriers, barriers + A::STAGES * 8,
                  barriers + (2 * A::STAGES + 1) * 8};
  if (threadIdx.x == 0) {
    for (int i = 0; i < A::STAGES; ++i) {
      barrier_init(r.ready + i * 8, 1);
      barrier_init(r.freed + i * 8, 1);
      barrier_init(r.written + i * 8, 4);
    }
    barrier_init(r.freed + A::STAGES * 8, 1);
    barrier_init_fence();
  }
  __syncthreads();
  if (group == 0)
    walk<E, DIM, CHANNEL, 1, A::STAGES, false>(p, r, s, slot, head, column, 0);
  else if (threadIdx.x / 32 == 4)
    fetch_chunks<E, DIM, CHANNEL>(f, r, s, slot, head, column);
  else if (threadIdx.x / 32 == 5)
    store_chunks<E, DIM, CHANNEL>(p, r, s, head, column);
}

/* ---- Planning ---- */

enum { FUSED, PREPARERS }; /* of choice->values: warpgroups that step in the one kernel, or 0 */

bool plan(const attn_cuda_device *device, const attn_recurrent_problem *problem,
          attn_cuda_choice *choice) {
  const bool channel = problem->decay == ATTN_DECAY_CHANNEL;
  /* float16 has too few exponents for keys times the inverse of their decay. */
  if (device->major != 9 || device->minor != 0 || problem->update != ATTN_UPDATE_DELTA ||
      !chunked::accepts(device, problem, ATTN_PASS_FORWARD) || problem->value_dim % 64 ||
      (channel && problem->dtype != ATTN_BF16) || problem->length >= (int64_t)1 << 30)
    return false;
  /* Microseconds on an H200: a chunk in one kernel and a step, as measured; a preparation in a
   * block of its own and what such blocks take to begin, as estimated. */
  const double FUSED_CHUNK = channel ? 7.3 : 3.8;
  const double STEP = 1.2, PREPARATION = channel ? 6 : 2.5, LAUNCH = 5;
  const int64_t multiprocessors = device->multiprocessors,
                chunks = (problem->length + CHUNK - 1) / CHUNK;
  const int64_t pairs = problem->batch * problem->value_heads, parts = problem->value_dim / 64;
  const int64_t groups = parts % 2 ? 1 : 2, blocks = pairs * parts / groups;
  const int64_t steppers = pairs * parts, records = pairs * chunks;
  int64_t preparers = multiprocessors - steppers;
  const double rounds = (double)((blocks + multiprocessors - 1) / multiprocessors);
  const double prepared = preparers > 0 ? PREPARATION * (double)pairs / (double)preparers : 0;
  const double apart = LAUNCH + (double)chunks * (prepared > STEP ? prepared : STEP);
  if (preparers <= 0 || FUSED_CHUNK * rounds * (double)chunks <= apart) {
    choice->values[FUSED] = groups;
    snprintf(choice->description, sizeof choice->description,
             "delta rule, wgmma, chunks of %d, prepared and stepped in one kernel", CHUNK);
    return true;
  }
  /* Each block that prepares has two chunks at a time. */
  if (preparers > (records + 1) / 2) preparers = (records + 1) / 2;
  choice->values[FUSED] = 0;
  choice->values[PREPARERS] = preparers;
  const int rows = CHUNK * (int)problem->dim * 2, record = 2 * TILE_BYTES + 1024;
  choice->workspace_bytes = (size_t)records * (size_t)(record + (channel ? 3 * rows : 0) + 4);
  snprintf(choice->description, sizeof choice->description,
           "delta rule, wgmma, chunks of %d, prepared by %d blocks and stepped by %d", CHUNK,
           (int)preparers, (int)steppers);
  return true;
}

bool suits(const attn_recurrent_problem *problem, const attn_recurrent_args *args) {
  const int first = problem->ragged ? 0 : 1;
  if (!chunked::reads_aligned(problem, args) || !chunked::aligned(args->o, 8)) return false;
  for (const attn_tensor *x : {&args->q, &args->k, &args->v, &args->decay}) {
    const int w = x == &args->decay ? 2 : 1;
    if (w == 2 && problem->decay != ATTN_DECAY_CHANNEL) continue;
    int64_t tokens = problem->ragged ? x->shape[0] : problem->length;
    if (!tokens || !map_possible(x->data, x->shape[first + 1], tokens,
                                 problem->ragged ? 1 : problem->batch, w * x->stride[first + 1],
                                 w * x->stride[first], problem->ragged ? 0 : w * x->stride[0]))
      return false;
  }
  return true;
}

template <typename E, int DIM, bool CHANNEL, int GROUPS>
attn_status launch_fused(const attn_recurrent_problem *problem, const forward_parameters &f,
                         cudaStream_t stream) {
  using F = fused<DIM, CHANNEL, GROUPS>;
  attn_status status = chunked::allow_shared(fused_kernel<E, DIM, CHANNEL, GROUPS>, F::BYTES);
  if (status != ATTN_OK) return status;
  dim3 grid((unsigned)f.p.value_heads, (unsigned)problem->batch,
            (unsigned)(f.p.columns / 64 / GROUPS));
  fused_kernel<E, DIM, CHANNEL, GROUPS><<<grid, F::THREADS, F::BYTES, stream>>>(f);
  ATTN_CUDA_TRY_LAUNCH("the delta rule's kernel");
  return ATTN_OK;
}

template <typename E, int DIM, bool CHANNEL>
attn_status launch(const attn_cuda_choice *choice, const attn_recurrent_problem *problem,
                   const forward_parameters &f, cudaStream_t stream) {
  if (choice->values[FUSED] == 1) return launch_fused<E, DIM, CHANNEL, 1>(problem, f, stream);
  if (choice->values[FUSED] == 2) return launch_fused<E, DIM, CHANNEL, 2>(problem, f, stream);
  using A = apart<DIM, CHANNEL>;
  const int64_t records = problem->batch * f.p.chunks * f.p.value_heads;
  forward_parameters g = f;
  g.batch = (int)problem->batch;
  g.preparers = (int)choice->values[PREPARERS];
  g.flags = (uint32_t *)(f.p.prepared + records * A::S::RECORD_BYTES);
  ATTN_CUDA_TRY(cudaMemsetAsync(g.flags, 0, (size_t)records * 4, stream));
  attn_status status = chunked::allow_shared(split_kernel<E, DIM, CHANNEL>, A::BYTES);
  if (status != ATTN_OK) return status;
  int64_t steppers = problem->batch * f.p.value_heads * (f.p.columns / 64);
  split_kernel<E, DIM, CHANNEL>
      <<<(unsigned)(g.preparers + steppers), A::THREADS, A::BYTES, stream>>>(g);
  ATTN_CUDA_TRY_LAUNCH("the delta rule's kernel");
  return ATTN_OK;
}

template <typename E>
attn_status run_as(const attn_cuda_choice *choice, const attn_recurrent_problem *problem,
                   const attn_recurrent_args *args, void *workspace, cudaStream_t stream) {
  forward_parameters f;
  memset(&f, 0, sizeof f);
  f.p = chunked::parameters_of(problem, args);
  f.p.o = chunked::rows_of<void>(args->o, problem->ragged);
  if (args->final_state.data) f.p.final = chunked::states_of(args->final_state);
  f.p.prepared = (char *)workspace;
  const bool channel = problem->decay == ATTN_DECAY_CHANNEL;
  const struct {
    CUtensorMap *map;
    const attn_tensor *tensor;
    int width; /* elements of 16 bits */
  } maps[] = {
      {&f.q, &args->q, 1}, {&f.k, &args->k, 1}, {&f.v, &args->v, 1}, {&f.decay, &args->decay, 2}};
  const int first = problem->ragged ? 0 : 1;
  for (const auto &entry : maps) {
    const attn_tensor *x = entry.tensor;
    const int w = entry.width;
    if (w == 2 && !channel) continue;
    if (!map_encode(entry.map, element<E>::map_type, x->data, w * x->shape[first + 2],
                    x->shape[first + 1], problem->ragged ? x->shape[0] : problem->length,
                    problem->ragged ? 1 : problem->batch, w * x->stride[first + 1],
                    w * x->stride[first], problem->ragged ? 0 : w * x->stride[0]))
      return attn_cuda_fail(ATTN_INTERNAL, "recurrent: the driver refuses a tensor map");
  }
  if constexpr (chunked::coarse<E>())
    if (channel)
      return problem->dim == 64 ? launch<E, 64, true>(choice, problem, f, stream)
                                : launch<E, 128, true>(choice, problem, f, stream);
  return problem->dim == 64 ? launch<E, 64, false>(choice, problem, f, stream)
                            : launch<E, 128, false>(choice, problem, f, stream);
}

attn_status run(const attn_cuda_device *, const attn_cuda_choice *choice,
                const attn_recurrent_problem *problem, const attn_recurrent_args *args,
                void *workspace, cudaStream_t stream) {
  return problem->dtype == ATTN_BF16
             ? run_as<__nv_bfloat16>(choice, problem, args, workspace, stream)
             : run_as<__half>(choice, problem, args, workspace, stream);
}

} // namespace

extern const recurrent_algorithm recurrent_delta_sm90_forward;
const recurrent_algorithm recurrent_delta_sm90_forward = {
    "delta_sm90", ATTN_PASS_FORWARD, plan, suits, run,
};
