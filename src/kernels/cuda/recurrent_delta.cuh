/* The delta rule by chunks of 64 tokens on the tensor cores: what its forward and backward share.
 *
 * With G the running sum of the log decay inside a chunk (a number per token, or one per token and
 * key channel), S the state at its start and C its last token (arXiv 2406.06484, 2412.06464,
 * 2510.26692):
 *   B_ij = sum_c k_ic k_jc exp(G_ic - G_jc), i > j          P_ij likewise of q_i, k_j, i >= j
 *   Y = (I + B Diag(beta))^-1      X = Y (V - Kg S)         V' = Diag(beta) X,  Kg = k exp(G)
 *   O = scale (Qg S + P V')                                     Qg = q exp(G)
 *   S <- Diag(exp(G_C)) S + Kk^T V'                             Kk = k exp(G_C - G)
 * "Preparing" a chunk makes Y (forward: Diag(beta) Y), P and the decayed rows; "stepping" (chunks
 * in order) does the rest. A step acts on every value column by itself, so a warp owns 16 of them
 * and keeps S^T [16, dim] in registers as the accumulators of m16n8k16 products. Accumulators have
 * the layout of the left operand: S^T Kg^T, R^T Y^T, V'^T P^T and V'^T Kk follow each other in
 * registers, and warps share nothing but the right operands in shared memory.
 *
 * Every factor is the exponential of a non-positive sum, but for one place that is guarded: see
 * prepare_channels. */
#ifndef ATTN_KERNELS_CUDA_RECURRENT_DELTA_CUH
#define ATTN_KERNELS_CUDA_RECURRENT_DELTA_CUH

#include <stdint.h>

#include "kernels/cuda/common.cuh"

namespace delta {

enum {
  CHUNK = 64,
  SUBBLOCK = 16, /* tokens that share a border of per-channel decays */
  SUBBLOCKS = CHUNK / SUBBLOCK,
  PREPARE_THREADS = 128, /* a warp for each subblock */
  SLAB = 16,             /* value columns of a warp */
  SQUARE = CHUNK + 8,    /* pitch of Y and P; 16 bytes more than a multiple of 128 for ldmatrix */
  FLOATS = CHUNK + 4,    /* pitch of B Diag(beta) and Y in float32 */
};

/* Y has powers of beta, of which the backward pass divides out one. */
constexpr float MIN_BETA = 1e-30f;
/* exp(-104) is 0 in float32: a stronger decay is the same, and sums stay finite. NaN passes. */
constexpr float MIN_DECAY = -104;
/* A channel that decays further than exp(this) in one subblock does not have its diagonal scores
 * factored: exp(60) and its inverse are far from the ends of float32. */
constexpr float MIN_FACTORED = -60;

template <int DIM> __host__ __device__ constexpr int pitch() {
  return DIM + 8;
}

/* [batch, tokens, heads, ...] of a tensor, strides in elements. */
template <typename T> struct rows {
  T *data;
  int64_t batch, token, head;
  __device__ T *at(int64_t b, int64_t t, int64_t h) const {
    return data + b * batch + t * token + h * head;
  }
};

/* [batch, heads, dim, value_dim]. */
struct states {
  float *data;
  int64_t batch, head, row;
  __device__ float *at(int64_t b, int64_t h) const {
    return data + b * batch + h * head;
  }
};

/* Where a sequence lies: rows.at(batch, first + i, head) for i < tokens. */
struct sequence {
  int64_t batch, first;
  int tokens;
};

__device__ inline sequence find_sequence(const int32_t *offsets, int64_t length, int s) {
  if (!offsets) return {s, 0, (int)length};
  return {0, offsets[s], offsets[s + 1] - offsets[s]};
}

/* ---- Instructions ---- */

__device__ inline uint32_t shared_address(const void *p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}

/* 16 bytes to shared memory, or 16 zero bytes. */
__device__ inline void copy_async(void *to, const void *from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0));
}
__device__ inline void copy_commit() {
  asm volatile("cp.async.commit_group;");
}
template <int PENDING> __device__ inline void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ inline void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* Four 8x8 matrices; lane l gives the address of row l % 8 of matrix l / 8. */
__device__ inline void load_matrices(uint32_t (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline uint32_t transpose_matrix(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

template <typename E> __device__ inline uint32_t pack(float low, float high);
template <> __device__ inline uint32_t pack<__nv_bfloat16>(float low, float high) {
  __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
  return *(uint32_t *)&x;
}
template <> __device__ inline uint32_t pack<__half>(float low, float high) {
  __half2 x = __floats2half2_rn(low, high);
  return *(uint32_t *)&x;
}
template <typename E> __device__ inline float2 unpack(uint32_t x);
template <> __device__ inline float2 unpack<__nv_bfloat16>(uint32_t x) {
  return __bfloat1622float2(*(__nv_bfloat162 *)&x);
}
template <> __device__ inline float2 unpack<__half>(uint32_t x) {
  return __half22float2(*(__half2 *)&x);
}

/* c[16, 8] += a[16, 16] b[16, 8]. With g = lane / 4, t = lane % 4:
 *   c: rows g, g + 8 (elements 0, 1 and 2, 3), columns 2t, 2t + 1
 *   a: rows g, g + 8, g, g + 8; columns 2t, 2t + 1 and in the last two 2t + 8, 2t + 9
 *   b: column g, rows 2t, 2t + 1 and 2t + 8, 2t + 9 */
template <typename E>
__device__ inline void product(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void product<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void product<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                       uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}
/* c[16, 8] += a[16, 8] b[8, 8]; a: rows g, g + 8, g, g + 8, columns t, t, t + 4, t + 4; b: column
 * g, rows t, t + 4. */
__device__ inline void product_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* ---- Operands in shared memory ---- */

/* The left operand x[16, 16]. */
template <typename E>
__device__ inline void load_left(uint32_t (&a)[4], const E *x, int ld, int lane) {
  load_matrices(a, x + (lane % 16) * ld + lane / 16 * 8);
}
/* The left operand that is the transpose of x[16, 16]. */
template <typename E>
__device__ inline void load_left_transposed(uint32_t (&a)[4], const E *x, int ld, int lane) {
  load_matrices_transposed(a, x + (lane % 8 + lane / 16 * 8) * ld + lane / 8 % 2 * 8);
}
/* Two right operands (columns 0..7 in b[0], b[1] and 8..15 in b[2], b[3]) of a product with the
 * transpose of x[16, 16]. */
template <typename E>
__device__ inline void load_right(uint32_t (&b)[4], const E *x, int ld, int lane) {
  load_matrices(b, x + (lane % 8 + lane / 16 * 8) * ld + lane / 8 % 2 * 8);
}
/* The same of a product with x[16, 16] itself. */
template <typename E>
__device__ inline void load_right_transposed(uint32_t (&b)[4], const E *x, int ld, int lane) {
  load_matrices_transposed(b, x + (lane % 16) * ld + lane / 16 * 8);
}

/* rows x columns elements at `from` (rows `ld_from` apart) to shared memory; rows from `valid` on
 * are zero. `columns` is a multiple of 8. */
template <typename E>
__device__ inline void copy_rows(E *to, int ld_to, const E *from, int64_t ld_from, int row_count,
                                 int columns, int valid, int thread, int threads) {
  int pieces = columns / 8;
  for (int at = thread; at < row_count * pieces; at += threads) {
    int row = at / pieces, column = at % pieces * 8;
    copy_async(to + row * ld_to + column, from + (row < valid ? row : 0) * ld_from + column,
               row < valid);
  }
}

/* ---- The inverse ---- */

/* c (+)= a[16, 8 depth] b[8 depth, 8] to float32 precision, each factor in two tf32 parts. */
template <int DEPTH>
__device__ inline void product_float(float (&c)[4], const float *a, const float *b, int ld,
                                     int lane) {
  int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int k = 0; k < DEPTH; ++k) {
    float x[4] = {a[g * ld + 8 * k + t], a[(g + 8) * ld + 8 * k + t], a[g * ld + 8 * k + t + 4],
                  a[(g + 8) * ld + 8 * k + t + 4]};
    float y[2] = {b[(8 * k + t) * ld + g], b[(8 * k + t + 4) * ld + g]};
    uint32_t high[4], low[4], y_high[2], y_low[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      high[i] = to_tf32(x[i]);
      low[i] = to_tf32(x[i] - __uint_as_float(high[i]));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      y_high[i] = to_tf32(y[i]);
      y_low[i] = to_tf32(y[i] - __uint_as_float(y_high[i]));
    }
    product_tf32(c, low, y_high[0], y_high[1]);
    product_tf32(c, high, y_low[0], y_low[1]);
    product_tf32(c, high, y_high[0], y_high[1]);
  }
}

__device__ inline void store_product(float *to, int ld, const float (&c)[4], float sign, int lane) {
  int g = lane / 4, t = lane % 4;
  to[g * ld + 2 * t] = sign * c[0];
  to[g * ld + 2 * t + 1] = sign * c[1];
  to[(g + 8) * ld + 2 * t] = sign * c[2];
  to[(g + 8) * ld + 2 * t + 1] = sign * c[3];
}

/* a[64, FLOATS], strictly lower triangular, becomes (I + a)^-1; what lies above the diagonal is
 * scratch. The diagonal blocks of 16 by substitution, then twice
 *   [D1 0; L D2]^-1 = [D1^-1 0; -D2^-1 L D1^-1 D2^-1]. */
__device__ inline void invert(float *a, int thread, int barrier) {
  int warp = thread / 32, lane = thread % 32;
  {
    float *block = a + warp * SUBBLOCK * (FLOATS + 1);
    int column = lane % SUBBLOCK;
    float y[SUBBLOCK];
#pragma unroll
    for (int i = 0; i < SUBBLOCK; ++i) y[i] = i == column;
#pragma unroll
    for (int j = 0; j < SUBBLOCK - 1; ++j)
#pragma unroll
      for (int i = j + 1; i < SUBBLOCK; ++i) y[i] -= block[i * FLOATS + j] * y[j];
    __syncwarp();
    if (lane < SUBBLOCK)
#pragma unroll
      for (int i = 0; i < SUBBLOCK; ++i) block[i * FLOATS + column] = y[i];
  }
  barrier_sync(barrier, PREPARE_THREADS);
  {
    /* Two warps for each pair of diagonal blocks, 8 columns each. */
    int r = warp / 2 * 32, n = warp % 2 * 8;
    float *above = a + r * FLOATS + r + 16 + n, *below = a + (r + 16) * FLOATS + r;
    float c[4] = {};
    product_float<2>(c, below, a + r * FLOATS + r + n, FLOATS, lane);
    store_product(above, FLOATS, c, 1, lane);
    barrier_sync(barrier, PREPARE_THREADS);
    float d[4] = {};
    product_float<2>(d, below + 16, above, FLOATS, lane);
    store_product(below + n, FLOATS, d, -1, lane);
  }
  barrier_sync(barrier, PREPARE_THREADS);
  {
    /* The blocks above the diagonal are scratch: their products are left out. */
    int n = warp * 8;
    float *above = a + 32 + n, *below = a + 32 * FLOATS;
#pragma unroll
    for (int r = 0; r < 32; r += 16) {
      float c[4] = {};
      if (n < 16) product_float<2>(c, below + r * FLOATS, a + n, FLOATS, lane);
      product_float<2>(c, below + r * FLOATS + 16, a + 16 * FLOATS + n, FLOATS, lane);
      store_product(above + r * FLOATS, FLOATS, c, 1, lane);
    }
    barrier_sync(barrier, PREPARE_THREADS);
#pragma unroll
    for (int r = 0; r < 32; r += 16) {
      float c[4] = {};
      product_float<2>(c, below + r * FLOATS + 32, above, FLOATS, lane);
      if (r) product_float<2>(c, below + r * FLOATS + 48, above + 16 * FLOATS, FLOATS, lane);
      store_product(below + r * FLOATS + n, FLOATS, c, -1, lane);
    }
  }
  barrier_sync(barrier, PREPARE_THREADS);
}

/* ---- Preparing a chunk ---- */

/* What a chunk's step needs, in shared memory. With a decay per token q and k are as they came;
 * with one per channel they are Qg and Kg, and `written` is Kk. */
template <typename E, int DIM, bool CHANNEL> struct tiles {
  enum {
    LD = DIM + 8,
    ELEMENTS = CHUNK * LD * (CHANNEL ? 3 : 2) + 2 * CHUNK * SQUARE,
    NUMBERS = 3 * CHUNK + DIM,
    BYTES = ELEMENTS * 2 + NUMBERS * 4,
  };
  char *base;
  __device__ E *q() const {
    return (E *)base;
  }
  __device__ E *k() const {
    return (E *)base + CHUNK * LD;
  }
  __device__ E *written() const {
    return (E *)base + (CHANNEL ? 2 : 1) * CHUNK * LD;
  }
  __device__ E *y() const {
    return (E *)base + (CHANNEL ? 3 : 2) * CHUNK * LD;
  }
  __device__ E *p() const {
    return y() + CHUNK * SQUARE;
  }
  __device__ float *beta() const {
    return (float *)((E *)base + ELEMENTS);
  }
  __device__ float *gamma() const {
    return beta() + CHUNK;
  } /* [64] exp(G), per token */
  __device__ float *kappa() const {
    return beta() + 2 * CHUNK;
  } /* [64] exp(G_C - G) */
  __device__ float *full() const {
    return beta() + 3 * CHUNK;
  } /* exp(G_C): [DIM] or [1] */
};

/* Scratch of one preparation: B Diag(beta), which becomes Y, or per channel first the sums inside
 * each subblock [64, DIM + 4], then [4, DIM] of its totals. */
template <int DIM, bool CHANNEL> constexpr int prepare_floats() {
  return CHANNEL ? CHUNK * (DIM + 4) + SUBBLOCKS * DIM : CHUNK * FLOATS;
}

__device__ inline float limit_decay(float g) {
  return g < MIN_DECAY ? MIN_DECAY : g;
}

__device__ inline float limit_beta(float beta) {
  return fabsf(beta) < MIN_BETA ? MIN_BETA : beta;
}

/* y <- Y, or Diag(beta) Y, rounded. */
template <typename E>
__device__ inline void round_inverse(E *y, const float *a, const float *beta, bool fold,
                                     int thread) {
  for (int at = thread; at < CHUNK * CHUNK / 4; at += PREPARE_THREADS) {
    int i = at / (CHUNK / 4), j = at % (CHUNK / 4) * 4;
    float4 x = *(const float4 *)(a + i * FLOATS + j);
    float b = fold ? beta[i] : 1;
    uint2 packed = {pack<E>(j <= i ? x.x * b : 0, j + 1 <= i ? x.y * b : 0),
                    pack<E>(j + 2 <= i ? x.z * b : 0, j + 3 <= i ? x.w * b : 0)};
    *(uint2 *)(y + i * SQUARE + j) = packed;
  }
}

/* Tokens of one chunk as the preparation reads them. */
struct chunk_gates {
  const float *decay, *beta; /* of its first token; decay may be NULL */
  int64_t decay_token, beta_token;
  int tokens;
};

/* q and k are on their way (copy_async, uncommitted or not); waits for them. */
template <typename E, int DIM>
__device__ inline void prepare_tokens(const tiles<E, DIM, false> &tile, float *a,
                                      const chunk_gates &gates, bool fold, int thread,
                                      int barrier) {
  int warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  float *sum = tile.kappa(); /* G until the end */
  if (warp == 0) {
    int i = 2 * lane;
    float x = 0, y = 0;
    if (gates.decay && i < gates.tokens) x = limit_decay(gates.decay[i * gates.decay_token]);
    if (gates.decay && i + 1 < gates.tokens)
      y = limit_decay(gates.decay[(i + 1) * gates.decay_token]);
    float both = x + y;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      float other = __shfl_up_sync(~0u, both, d);
      if (lane >= d) both += other;
    }
    sum[i] = both - y;
    sum[i + 1] = both;
  } else if (warp <= 2) {
    int i = thread - 32;
    tile.beta()[i] = i < gates.tokens ? gates.beta[i * gates.beta_token] : 0;
  }
  copy_commit();
  copy_wait<0>();
  barrier_sync(barrier, PREPARE_THREADS);

  float n[SUBBLOCKS][2][4] = {}, p[SUBBLOCKS][2][4] = {};
  const E *q = tile.q(), *k = tile.k();
  constexpr int LD = pitch<DIM>();
#pragma unroll
  for (int c = 0; c < DIM; c += 16) {
    uint32_t of_q[4], of_k[4], b[4];
    load_left(of_q, q + warp * 16 * LD + c, LD, lane);
    load_left(of_k, k + warp * 16 * LD + c, LD, lane);
#pragma unroll
    for (int s = 0; s < SUBBLOCKS; ++s)
      if (s <= warp) {
        load_right(b, k + s * 16 * LD + c, LD, lane);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          product<E>(n[s][half], of_k, b[2 * half], b[2 * half + 1]);
          product<E>(p[s][half], of_q, b[2 * half], b[2 * half + 1]);
        }
      }
  }
#pragma unroll
  for (int s = 0; s < SUBBLOCKS; ++s)
    if (s <= warp)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          int i = warp * 16 + g + 8 * r, j = s * 16 + half * 8 + 2 * t;
          float e0 = i >= j ? __expf(sum[i] - sum[j]) : 0;
          float e1 = i >= j + 1 ? __expf(sum[i] - sum[j + 1]) : 0;
          float beta0 = limit_beta(tile.beta()[j]), beta1 = limit_beta(tile.beta()[j + 1]);
          *(float2 *)(a + i * FLOATS + j) =
              make_float2(i > j ? beta0 * e0 * n[s][half][2 * r] : 0,
                          i > j + 1 ? beta1 * e1 * n[s][half][2 * r + 1] : 0);
          *(uint32_t *)(tile.p() + i * SQUARE + j) =
              pack<E>(e0 * p[s][half][2 * r], e1 * p[s][half][2 * r + 1]);
        }
  barrier_sync(barrier, PREPARE_THREADS);
  if (thread < CHUNK) {
    float last = sum[CHUNK - 1], own = sum[thread];
    tile.gamma()[thread] = __expf(own);
    barrier_sync(barrier + 1, CHUNK);
    tile.kappa()[thread] = __expf(last - own);
    if (thread == 0) tile.full()[0] = __expf(last);
  }
  invert(a, thread, barrier);
  round_inverse(tile.y(), a, tile.beta(), fold, thread);
}

/* The same with a decay per channel. Between two subblocks both sides are decayed to the border
 * before the later one (secondary chunking, arXiv 2312.06635, 2510.26692). Inside a subblock the
 * reading side is decayed from the border before it and the written side is scaled by the inverse,
 * at most exp(60); channels that decay further there are summed pair by pair. */
template <typename E, int DIM>
__device__ inline void prepare_channels(const tiles<E, DIM, true> &tile, float *scratch,
                                        const chunk_gates &gates, bool fold, int thread,
                                        int barrier) {
  constexpr int LD = pitch<DIM>(), LS = DIM + 4, HALVES = DIM / 64;
  int warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4, row = warp * SUBBLOCK;
  float *sum = scratch, *total = scratch + CHUNK * LS, *a = scratch;
  unsigned steep[HALVES][2]; /* channels 64 h + 2 lane and + 1 that are not factored */
  {
    float2 x[HALVES][SUBBLOCK];
#pragma unroll
    for (int h = 0; h < HALVES; ++h)
#pragma unroll
      for (int i = 0; i < SUBBLOCK; ++i)
        x[h][i] =
            row + i < gates.tokens
                ? *(const float2 *)(gates.decay + (row + i) * gates.decay_token + 64 * h + 2 * lane)
                : make_float2(0, 0);
    if (thread < CHUNK)
      tile.beta()[thread] = thread < gates.tokens ? gates.beta[thread * gates.beta_token] : 0;
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
      float2 running = {0, 0};
#pragma unroll
      for (int i = 0; i < SUBBLOCK; ++i) {
        running.x += limit_decay(x[h][i].x);
        running.y += limit_decay(x[h][i].y);
        *(float2 *)(sum + (row + i) * LS + 64 * h + 2 * lane) = running;
      }
      *(float2 *)(total + warp * DIM + 64 * h + 2 * lane) = running;
      steep[h][0] = __ballot_sync(~0u, running.x < MIN_FACTORED);
      steep[h][1] = __ballot_sync(~0u, running.y < MIN_FACTORED);
    }
  }
  copy_commit();
  copy_wait<0>();
  barrier_sync(barrier, PREPARE_THREADS);

  /* Keys decayed to the end of their own subblock; they lie where Kk will. */
  E *q = tile.q() + row * LD, *k = tile.k() + row * LD, *written = tile.written();
  const float *own_sum = sum + row * LS;
  if (warp < SUBBLOCKS - 1)
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
      int c = 64 * h + 2 * lane;
      float2 last = *(const float2 *)(total + warp * DIM + c);
#pragma unroll
      for (int i = 0; i < SUBBLOCK; ++i) {
        float2 x = unpack<E>(*(uint32_t *)(k + i * LD + c));
        float2 s = *(const float2 *)(own_sum + i * LS + c);
        *(uint32_t *)(written + (row + i) * LD + c) =
            pack<E>(x.x * __expf(last.x - s.x), x.y * __expf(last.y - s.y));
      }
    }
  barrier_sync(barrier, PREPARE_THREADS);

  float n[SUBBLOCKS - 1][2][4] = {}, p[SUBBLOCKS - 1][2][4] = {};
  float n_own[2][4] = {}, p_own[2][4] = {};
#pragma unroll 2
  for (int c = 0; c < DIM; c += 16) {
    uint32_t raw_q[4], raw_k[4], of_q[4], of_k[4];
    load_left(raw_q, q + c, LD, lane);
    load_left(raw_k, k + c, LD, lane);
    /* Element i of an operand: rows g, g + 8, g, g + 8, columns from c + 2t, the last two + 8. */
    uint32_t tf_q[4][2], tf_k[4][2], inverse[4][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int channel = c + 2 * t + i / 2 * 8;
      float2 s = *(const float2 *)(own_sum + (g + i % 2 * 8) * LS + channel);
      float2 last = *(const float2 *)(total + warp * DIM + channel);
      float2 x = unpack<E>(raw_q[i]), y = unpack<E>(raw_k[i]);
      float e0 = __expf(s.x), e1 = __expf(s.y);
      of_q[i] = pack<E>(x.x * e0, x.y * e1);
      of_k[i] = pack<E>(y.x * e0, y.y * e1);
      tf_q[i][0] = to_tf32(x.x * e0), tf_q[i][1] = to_tf32(x.y * e1);
      tf_k[i][0] = to_tf32(y.x * e0), tf_k[i][1] = to_tf32(y.y * e1);
      inverse[i][0] = last.x < MIN_FACTORED ? 0 : to_tf32(y.x * __expf(-s.x));
      inverse[i][1] = last.y < MIN_FACTORED ? 0 : to_tf32(y.y * __expf(-s.y));
    }
    /* tf32 products of depth 8 take the two elements of each register as their depths t, t + 4. */
#pragma unroll
    for (int deep = 0; deep < 2; ++deep) {
      uint32_t x[4] = {tf_k[2 * deep][0], tf_k[2 * deep + 1][0], tf_k[2 * deep][1],
                       tf_k[2 * deep + 1][1]};
      uint32_t y[4] = {tf_q[2 * deep][0], tf_q[2 * deep + 1][0], tf_q[2 * deep][1],
                       tf_q[2 * deep + 1][1]};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t b0 = inverse[2 * deep + half][0], b1 = inverse[2 * deep + half][1];
        product_tf32(n_own[half], x, b0, b1);
        product_tf32(p_own[half], y, b0, b1);
      }
    }
    /* Earlier subblocks, nearest first; `between` is the decay of whole subblocks in between. */
    float2 between[2] = {{0, 0}, {0, 0}};
#pragma unroll
    for (int distance = 1; distance < SUBBLOCKS; ++distance)
      if (distance <= warp) {
        uint32_t b[4];
        int s = warp - distance;
        load_right(b, written + s * SUBBLOCK * LD + c, LD, lane);
        if (distance > 1)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float2 whole = *(const float2 *)(total + (s + 1) * DIM + c + 2 * t + 8 * i);
            between[i].x += whole.x, between[i].y += whole.y;
            float e0 = __expf(between[i].x), e1 = __expf(between[i].y);
            float2 x = unpack<E>(b[i]), y = unpack<E>(b[i + 2]);
            b[i] = pack<E>(x.x * e0, x.y * e1);
            b[i + 2] = pack<E>(y.x * e0, y.y * e1);
          }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          product<E>(n[distance - 1][half], of_k, b[2 * half], b[2 * half + 1]);
          product<E>(p[distance - 1][half], of_q, b[2 * half], b[2 * half + 1]);
        }
      }
  }
  /* Steep channels: every pair has its own decay. */
#pragma unroll
  for (int h = 0; h < HALVES; ++h)
#pragma unroll
    for (int odd = 0; odd < 2; ++odd)
      for (unsigned left = steep[h][odd]; left; left &= left - 1) {
        int c = 64 * h + 2 * (__ffs(left) - 1) + odd;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          int i = g + 8 * r;
          float of_i = own_sum[i * LS + c], q_i = float(q[i * LD + c]), k_i = float(k[i * LD + c]);
#pragma unroll
          for (int at = 0; at < 4; ++at) {
            int j = at / 2 * 8 + 2 * t + at % 2;
            if (i < j) continue;
            float x = float(k[j * LD + c]) * __expf(of_i - own_sum[j * LS + c]);
            n_own[at / 2][2 * r + at % 2] += k_i * x;
            p_own[at / 2][2 * r + at % 2] += q_i * x;
          }
        }
      }
  __syncwarp();
  barrier_sync(barrier, PREPARE_THREADS); /* keys decayed to their subblocks' ends were read */

#pragma unroll
  for (int h = 0; h < HALVES; ++h) {
    int c = 64 * h + 2 * lane;
    float2 before = {0, 0}, after = {0, 0};
#pragma unroll
    for (int s = 0; s < SUBBLOCKS; ++s) {
      float2 x = *(const float2 *)(total + s * DIM + c);
      if (s < warp) before.x += x.x, before.y += x.y;
      if (s >= warp) after.x += x.x, after.y += x.y;
    }
#pragma unroll 4
    for (int i = 0; i < SUBBLOCK; ++i) {
      float2 s = *(const float2 *)(own_sum + i * LS + c);
      float2 x = unpack<E>(*(uint32_t *)(q + i * LD + c));
      float2 y = unpack<E>(*(uint32_t *)(k + i * LD + c));
      float e0 = __expf(before.x + s.x), e1 = __expf(before.y + s.y);
      *(uint32_t *)(q + i * LD + c) = pack<E>(x.x * e0, x.y * e1);
      *(uint32_t *)(k + i * LD + c) = pack<E>(y.x * e0, y.y * e1);
      *(uint32_t *)(written + (row + i) * LD + c) =
          pack<E>(y.x * __expf(after.x - s.x), y.y * __expf(after.y - s.y));
    }
    if (warp == 0) *(float2 *)(tile.full() + c) = make_float2(__expf(after.x), __expf(after.y));
  }
  barrier_sync(barrier, PREPARE_THREADS); /* the sums were read: B takes their place */

#pragma unroll
  for (int distance = 0; distance < SUBBLOCKS; ++distance)
    if (distance <= warp)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          int i = row + g + 8 * r, j = row - distance * SUBBLOCK + half * 8 + 2 * t;
          const float *x = distance ? n[distance ? distance - 1 : 0][half] : n_own[half];
          const float *y = distance ? p[distance ? distance - 1 : 0][half] : p_own[half];
          float beta0 = limit_beta(tile.beta()[j]), beta1 = limit_beta(tile.beta()[j + 1]);
          *(float2 *)(a + i * FLOATS + j) =
              make_float2(i > j ? beta0 * x[2 * r] : 0, i > j + 1 ? beta1 * x[2 * r + 1] : 0);
          *(uint32_t *)(tile.p() + i * SQUARE + j) =
              pack<E>(i >= j ? y[2 * r] : 0, i >= j + 1 ? y[2 * r + 1] : 0);
        }
  barrier_sync(barrier, PREPARE_THREADS);
  invert(a, thread, barrier);
  round_inverse(tile.y(), a, tile.beta(), fold, thread);
}

template <typename E, int DIM>
__device__ inline void prepare(const tiles<E, DIM, false> &tile, float *scratch,
                               const chunk_gates &gates, bool fold, int thread, int barrier) {
  prepare_tokens(tile, scratch, gates, fold, thread, barrier);
}
template <typename E, int DIM>
__device__ inline void prepare(const tiles<E, DIM, true> &tile, float *scratch,
                               const chunk_gates &gates, bool fold, int thread, int barrier) {
  prepare_channels(tile, scratch, gates, fold, thread, barrier);
}

/* ---- The problem on the device ---- */

struct parameters {
  rows<const void> q, k, v;
  rows<void> o;
  rows<const float> decay, beta;
  states initial, final;
  const int32_t *offsets;
  int64_t length, chunks; /* of the longest sequence */
  int value_heads, group, columns;
  float scale;
  char *prepared; /* [batch, chunks, value heads] records */
};

/* A prepared chunk in the workspace: per channel Qg, Kg, Kk; Y, P; the numbers of the tiles; for
 * the backward pass (I + Diag(beta) B)^-1 = Diag(beta) Y Diag(beta)^-1. Bytes. */
template <int DIM, bool CHANNEL> struct record {
  enum {
    ROWS = CHANNEL ? CHUNK * DIM * 2 : 0,
    SQUARE_BYTES = CHUNK * CHUNK * 2,
    Y = 3 * ROWS,
    NUMBERS = Y + 2 * SQUARE_BYTES,
    FORWARD_BYTES = NUMBERS + tiles<__half, DIM, CHANNEL>::NUMBERS * 4,
    LEFT = FORWARD_BYTES,
    BACKWARD_BYTES = LEFT + SQUARE_BYTES,
  };
};

template <typename E> __device__ inline rows<const E> as(const rows<const void> &x) {
  return {(const E *)x.data, x.batch, x.token, x.head};
}
template <typename E> __device__ inline rows<E> as(const rows<void> &x) {
  return {(E *)x.data, x.batch, x.token, x.head};
}

__device__ inline chunk_gates gates_of(const parameters &p, const sequence &s, int64_t first,
                                       int head) {
  chunk_gates gates;
  gates.decay = p.decay.data ? p.decay.at(s.batch, s.first + first, head) : NULL;
  gates.beta = p.beta.at(s.batch, s.first + first, head);
  gates.decay_token = p.decay.token;
  gates.beta_token = p.beta.token;
  gates.tokens = (int)min((int64_t)CHUNK, s.tokens - first);
  return gates;
}

template <typename E, int DIM, bool CHANNEL>
__device__ inline void copy_keys(const parameters &p, const tiles<E, DIM, CHANNEL> &tile,
                                 const sequence &s, int64_t first, int tokens, int head, int thread,
                                 int threads) {
  rows<const E> q = as<E>(p.q), k = as<E>(p.k);
  copy_rows(tile.k(), pitch<DIM>(), k.at(s.batch, s.first + first, head / p.group), k.token, CHUNK,
            DIM, tokens, thread, threads);
  copy_rows(tile.q(), pitch<DIM>(), q.at(s.batch, s.first + first, head / p.group), q.token, CHUNK,
            DIM, tokens, thread, threads);
}

/* Prepares all chunks at once: blocks over (sequence and chunk, value head). */
template <typename E, int DIM, bool CHANNEL, bool BACKWARD>
__global__ void __launch_bounds__(PREPARE_THREADS) prepare_kernel(parameters p) {
  extern __shared__ __align__(16) char memory[];
  using tile_type = tiles<E, DIM, CHANNEL>;
  using record_type = record<DIM, CHANNEL>;
  tile_type tile = {memory};
  int thread = threadIdx.x, head = blockIdx.y;
  int64_t chunk = blockIdx.x % p.chunks, first = chunk * CHUNK;
  sequence s = find_sequence(p.offsets, p.length, (int)(blockIdx.x / p.chunks));
  if (first >= s.tokens) return;
  chunk_gates gates = gates_of(p, s, first, head);
  copy_keys(p, tile, s, first, gates.tokens, head, thread, PREPARE_THREADS);
  prepare(tile, (float *)(memory + tile_type::BYTES), gates, !BACKWARD, thread, 1);
  __syncthreads();

  char *to = p.prepared + ((int64_t)blockIdx.x * p.value_heads + head) *
                              (BACKWARD ? record_type::BACKWARD_BYTES : record_type::FORWARD_BYTES);
  if (CHANNEL)
    for (int at = thread; at < 3 * CHUNK * DIM / 8; at += PREPARE_THREADS)
      ((uint4 *)to)[at] =
          *(const uint4 *)((E *)memory + at / (DIM / 8) * pitch<DIM>() + at % (DIM / 8) * 8);
  for (int at = thread; at < 2 * CHUNK * CHUNK / 8; at += PREPARE_THREADS)
    ((uint4 *)(to + record_type::Y))[at] =
        *(const uint4 *)(tile.y() + at / 8 * SQUARE + at % 8 * 8);
  for (int at = thread; at < tile_type::NUMBERS / 4; at += PREPARE_THREADS)
    ((uint4 *)(to + record_type::NUMBERS))[at] = ((const uint4 *)tile.beta())[at];
  if (!BACKWARD) return;
  const float *y = (const float *)(memory + tile_type::BYTES);
  for (int at = thread; at < CHUNK * CHUNK / 2; at += PREPARE_THREADS) {
    int i = at / (CHUNK / 2), j = at % (CHUNK / 2) * 2;
    float beta = limit_beta(tile.beta()[i]);
    float low = beta / limit_beta(tile.beta()[j]), high = beta / limit_beta(tile.beta()[j + 1]);
    ((uint32_t *)(to + record_type::LEFT))[at] = pack<E>(
        j <= i ? y[i * FLOATS + j] * low : 0, j + 1 <= i ? y[i * FLOATS + j + 1] * high : 0);
  }
}

/* ---- On the host ---- */

/* Whether the problem is one for these kernels. */
inline bool accepts(const attn_cuda_device *device, const attn_recurrent_problem *problem) {
  return problem->update == ATTN_UPDATE_DELTA && !problem->normalise && device->major >= 8 &&
         (problem->dtype == ATTN_BF16 || problem->dtype == ATTN_F16) &&
         (problem->dim == 64 || problem->dim == 128) && problem->value_dim % SLAB == 0 &&
         problem->value_heads <= 65535 && problem->batch <= 65535 && problem->length >= SUBBLOCK;
}

/* 16-byte copies of rows; pairs of per-channel decays. */
inline bool aligned(const attn_tensor &x, int64_t elements) {
  if ((uintptr_t)x.data % 16) return false;
  for (int i = 0; i < x.rank - 1; ++i)
    if (x.stride[i] % elements) return false;
  return true;
}

inline bool reads_aligned(const attn_recurrent_problem *problem, const attn_recurrent_args *args) {
  return aligned(args->q, 8) && aligned(args->k, 8) && aligned(args->v, 8) &&
         (problem->decay != ATTN_DECAY_CHANNEL || aligned(args->decay, 4));
}

template <typename T> rows<T> rows_of(const attn_tensor &x, bool ragged) {
  const int64_t *stride = x.stride + (ragged ? 0 : 1);
  return {(T *)x.data, ragged ? 0 : x.stride[0], stride[0], stride[1]};
}

inline states states_of(const attn_tensor &x) {
  return {(float *)x.data, x.stride[0], x.stride[1], x.stride[2]};
}

template <typename K> attn_status allow_shared(K kernel, int bytes) {
  return attn_cuda_check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
      "cudaFuncSetAttribute");
}

/* The inputs. */
inline parameters parameters_of(const attn_recurrent_problem *problem,
                                const attn_recurrent_args *args) {
  bool ragged = problem->ragged;
  parameters p = {};
  p.q = rows_of<const void>(args->q, ragged);
  p.k = rows_of<const void>(args->k, ragged);
  p.v = rows_of<const void>(args->v, ragged);
  p.beta = rows_of<const float>(args->beta, ragged);
  if (problem->decay == ATTN_DECAY_HEAD)
    p.decay = {(const float *)args->decay.data, 0, 0, args->decay.stride[0]};
  else if (problem->decay != ATTN_DECAY_NONE)
    p.decay = rows_of<const float>(args->decay, ragged);
  if (args->initial_state.data) p.initial = states_of(args->initial_state);
  p.offsets = ragged ? args->offsets : NULL;
  p.length = problem->length;
  p.chunks = (problem->length + CHUNK - 1) / CHUNK;
  p.value_heads = (int)problem->value_heads;
  p.group = (int)(problem->value_heads / problem->heads);
  p.columns = (int)problem->value_dim;
  p.scale = (float)problem->scale;
  return p;
}

} // namespace delta

#endif
