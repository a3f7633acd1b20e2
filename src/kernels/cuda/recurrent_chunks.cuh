/* The recurrence by chunks of 64 tokens on the tensor cores: what forward and backward share.
 *
 * With G the running sum of the log decay inside a chunk (a number per token, or one per token and
 * key channel), S the state at its start and C its last token (arXiv 2406.06484, 2412.06464,
 * 2510.26692), the delta rule is
 *   B_ij = sum_c k_ic k_jc exp(G_ic - G_jc), i > j          P_ij likewise of q_i, k_j, i >= j
 *   Y = (I + B Diag(beta))^-1      X = Y (V - Kg S)         V' = Diag(beta) X,  Kg = k exp(G)
 *   O = scale (Qg S + P V')                                     Qg = q exp(G)
 *   S <- Diag(exp(G_C)) S + Kk^T V'                             Kk = k exp(G_C - G)
 * and the additive rule (arXiv 2312.06635, 2401.04658) the last two lines with V' = V: no B, Y, Kg.
 * DELTA says which. "Preparing" a chunk makes Y (forward: Diag(beta) Y), P and the decayed rows;
 * "stepping" (chunks in order) does the rest. Of Y what lies below the diagonal is kept: the
 * diagonal is 1 and most of X, so its share is added as it is, in float32. A step acts on every
 * value column by itself, so a warp owns 16 of them and keeps S^T [16, dim] in registers as the
 * accumulators of m16n8k16 products. Accumulators have the layout of the left operand: S^T Kg^T,
 * R^T Y^T, V'^T P^T and V'^T Kk follow each other in registers, and warps share nothing but the
 * right operands in shared memory.
 *
 * Every factor is the exponential of a non-positive sum, but for one place that is guarded: see
 * prepare_channels. */
#ifndef ATTN_KERNELS_CUDA_RECURRENT_CHUNKS_CUH
#define ATTN_KERNELS_CUDA_RECURRENT_CHUNKS_CUH

#include <stdint.h>

#include "kernels/cuda/common.cuh"

namespace chunked {

enum {
  CHUNK = 64,
  SUBBLOCK = 16, /* tokens that share a border of per-channel decays */
  SUBBLOCKS = CHUNK / SUBBLOCK,
  PREPARE_THREADS = 256, /* two warps for each subblock */
  SLAB = 16,             /* value columns of a warp */
  SQUARE = CHUNK + 8,    /* pitch of Y and P; 16 bytes more than a multiple of 128 for ldmatrix */
  FLOATS = CHUNK + 4,    /* pitch of B Diag(beta) and Y in float32 */
};

/* Y has powers of beta, of which the backward pass divides out one. */
constexpr float MIN_BETA = 1e-30f;
/* Sums of decays are kept as powers of two. 2^-150 is 0 in float32: a stronger decay is the same,
 * and sums stay finite. NaN passes. */
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float MIN_DECAY = -150;
/* A channel that decays further than 2 to this in one subblock does not have its diagonal scores
 * factored: 2^86 and its inverse are far from the ends of float32. */
constexpr float MIN_FACTORED = -86;

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

/* The line of 128 bytes to the second-level cache. */
__device__ inline void prefetch_line(const void *p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}
/* `count` rows of `bytes`, `apart` bytes from each other. */
__device__ inline void prefetch_rows(const void *p, int64_t apart, int count, int bytes, int thread,
                                     int threads) {
  for (int row = thread / 4; row < count; row += threads / 4)
    for (int at = thread % 4 * 128; at < bytes; at += 512)
      prefetch_line((const char *)p + row * apart + at);
}

/* `bytes` in a row. */
__device__ inline void prefetch_span(const void *p, int bytes, int thread, int threads) {
  for (int at = thread * 128; at < bytes; at += threads * 128) prefetch_line((const char *)p + at);
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

/* Whether E has 8 bits and the range of float32. */
template <typename E> __host__ __device__ constexpr bool coarse() {
  return false;
}
template <> __host__ __device__ constexpr bool coarse<__nv_bfloat16>() {
  return true;
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
__device__ inline uint32_t multiply(uint32_t x, uint32_t y, __nv_bfloat16) {
  __nv_bfloat162 z = __hmul2(*(__nv_bfloat162 *)&x, *(__nv_bfloat162 *)&y);
  return *(uint32_t *)&z;
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

__device__ inline float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/* c[16, 8] += a[16, 8] b[8, 8]; a: rows g, g + 8, g, g + 8, columns t, t, t + 4, t + 4; b: column
 * g, rows t, t + 4. Float32 bits: the lowest 13 do not count. */
__device__ inline void product_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* A constant as a parameter. */
template <int N> struct number { static constexpr int value = N; };

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

/* row_count x columns elements at `from` (rows `ld_from` apart) to shared memory; rows from `valid`
 * on are zero. `columns` is a multiple of 8. A thread keeps its 8 columns, so that its addresses
 * differ by constants; with constant counts nothing is left of the loops. */
template <typename E>
__device__ __forceinline__ void copy_rows(E *to, int ld_to, const E *from, int64_t ld_from,
                                          int row_count, int columns, int valid, int thread,
                                          int threads) {
  int pieces = columns > 64 ? 16 : columns > 32 ? 8 : columns > 16 ? 4 : 2;
  int first = thread / pieces, by = threads / pieces;
  for (int column = thread % pieces * 8; column < columns; column += 128) {
    const E *x = from + first * ld_from + column;
    E *y = to + first * ld_to + column;
    int64_t step_from = by * ld_from;
    int step_to = by * ld_to;
#pragma unroll
    for (int n = 0; n < (row_count + by - 1) / by; ++n) {
      int row = first + n * by;
      if (row_count % by == 0 || row < row_count)
        copy_async(y + n * step_to, row < valid ? x : from, row < valid);
      x += step_from;
    }
  }
}

/* ---- The inverse ---- */

/* x in two parts of 11 bits each, the second exact before its own truncation. */
__device__ inline void split(uint32_t &high, uint32_t &low, float x) {
  high = __float_as_uint(x) & 0xffffe000u;
  low = __float_as_uint(x - __uint_as_float(high));
}

/* c += a[16, 8 DEPTH] b[8 DEPTH, 8] to nearly float32 precision, or (SPLIT false) with factors of
 * 11 bits, which bfloat16 results do not notice. */
template <int DEPTH, bool SPLIT>
__device__ inline void product_float(float (&c)[4], const float *a, const float *b, int lane) {
  constexpr int ld = FLOATS;
  int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int k = 0; k < DEPTH; ++k) {
    float x[4], y[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = a[(g + i % 2 * 8) * ld + 8 * k + t + i / 2 * 4];
#pragma unroll
    for (int i = 0; i < 2; ++i) y[i] = b[(8 * k + t + 4 * i) * ld + g];
    uint32_t high[4], low[4], y_high[2], y_low[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) split(high[i], low[i], x[i]);
#pragma unroll
    for (int i = 0; i < 2; ++i) split(y_high[i], y_low[i], y[i]);
    if (SPLIT) {
      product_tf32(c, low, y_high[0], y_high[1]);
      product_tf32(c, high, y_low[0], y_low[1]);
    }
    product_tf32(c, high, y_high[0], y_high[1]);
  }
}

__device__ inline void store_product(float *to, const float (&c)[4], float sign, int lane) {
  constexpr int ld = FLOATS;
  int g = lane / 4, t = lane % 4;
  *(float2 *)(to + g * ld + 2 * t) = make_float2(sign * c[0], sign * c[1]);
  *(float2 *)(to + (g + 8) * ld + 2 * t) = make_float2(sign * c[2], sign * c[3]);
}

/* 16 rows, 8 columns of -Y, each row times its factor. */
template <typename E, bool FOLD>
__device__ inline void round_product(E *to, const float (&c)[4], const float *factor, int lane) {
  int g = lane / 4, t = lane % 4;
  float low = FOLD ? -factor[g] : -1, high = FOLD ? -factor[g + 8] : -1;
  *(uint32_t *)(to + g * SQUARE + 2 * t) = pack<E>(low * c[0], low * c[1]);
  *(uint32_t *)(to + (g + 8) * SQUARE + 2 * t) = pack<E>(high * c[2], high * c[3]);
}

/* a[64, FLOATS], of which only what lies below the diagonal is read, becomes (I + a)^-1, except for
 * blocks of 16 above the diagonal, which are scratch. Rounded, with FOLD each row times its factor,
 * and with zeros on the diagonal also to y. The diagonal blocks of 16 by substitution, then twice
 *   [D1 0; L D2]^-1 = [D1^-1 0; -D2^-1 L D1^-1 D2^-1]. */
template <typename E, bool FOLD>
__device__ inline void invert(float *a, E *y, const float *factor, int thread, int barrier) {
  constexpr bool SPLIT = !coarse<E>();
  int warp = thread / 32, lane = thread % 32;
  if (warp < SUBBLOCKS) {
    int row = warp * SUBBLOCK, column = lane % SUBBLOCK;
    float *block = a + row * (FLOATS + 1);
    float z[SUBBLOCK];
#pragma unroll
    for (int i = 0; i < SUBBLOCK; ++i) z[i] = i == column;
#pragma unroll
    for (int j = 0; j < SUBBLOCK - 1; ++j)
#pragma unroll
      for (int i = j + 1; i < SUBBLOCK; ++i) z[i] -= block[i * FLOATS + j] * z[j];
    __syncwarp();
    /* One half of the warp stores float32, the other one rounds. */
    if (lane < SUBBLOCK) {
#pragma unroll
      for (int i = 0; i < SUBBLOCK; ++i) block[i * FLOATS + column] = z[i];
    } else {
#pragma unroll
      for (int i = 0; i < SUBBLOCK; ++i)
        y[(row + i) * SQUARE + row + column] = E(i == column ? 0
                                                 : FOLD      ? factor[row + i] * z[i]
                                                             : z[i]);
    }
  }
  barrier_sync(barrier, PREPARE_THREADS);
  {
    /* Two warps for each pair of diagonal blocks, 8 columns each. */
    int r = warp / 2 * 32, n = warp % 2 * 8;
    float *above = a + r * FLOATS + r + 16 + n, *below = a + (r + 16) * FLOATS + r;
    if (warp < 4) {
      float c[4] = {};
      product_float<2, SPLIT>(c, below, a + r * FLOATS + r + n, lane);
      store_product(above, c, 1, lane);
    }
    barrier_sync(barrier, PREPARE_THREADS);
    if (warp < 4) {
      float c[4] = {};
      product_float<2, SPLIT>(c, below + 16, above, lane);
      store_product(below + n, c, -1, lane);
      round_product<E, FOLD>(y + (r + 16) * SQUARE + r + n, c, factor + r + 16, lane);
    }
  }
  barrier_sync(barrier, PREPARE_THREADS);
  {
    /* 16 rows, 8 columns a warp. Products with blocks above the diagonal are left out. */
    int r = warp / 4 * 16, n = warp % 4 * 8;
    float *above = a + 32 + n, *below = a + (32 + r) * FLOATS;
    float c[4] = {}, d[4] = {};
    if (n < 16) product_float<2, SPLIT>(c, below, a + n, lane);
    product_float<2, SPLIT>(c, below + 16, a + 16 * FLOATS + n, lane);
    store_product(above + r * FLOATS, c, 1, lane);
    barrier_sync(barrier, PREPARE_THREADS);
    product_float<2, SPLIT>(d, below + 32, above, lane);
    if (r) product_float<2, SPLIT>(d, below + 48, above + 16 * FLOATS, lane);
    store_product(below + n, d, -1, lane);
    round_product<E, FOLD>(y + (32 + r) * SQUARE + n, d, factor + 32 + r, lane);
  }
  barrier_sync(barrier, PREPARE_THREADS);
}

/* ---- Preparing a chunk ---- */

/* What a chunk's step needs, in shared memory. With a decay per token q and k are as they came;
 * with one per channel they are Qg and Kg, and `written` is Kk, which lies in the place of k where
 * there is no Kg. */
template <typename E, int DIM, bool CHANNEL, bool DELTA> struct tiles {
  enum {
    LD = DIM + 8,
    ROWS = CHUNK * (CHANNEL && DELTA ? 3 : 2),
    ELEMENTS = ROWS * LD + (DELTA ? 2 : 1) * CHUNK * SQUARE,
    NUMBERS = (DELTA ? 3 : 2) * CHUNK + DIM,
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
    return (E *)base + (ROWS - CHUNK) * LD;
  }
  __device__ E *squares() const {
    return (E *)base + ROWS * LD;
  }
  __device__ E *y() const {
    static_assert(DELTA, "the additive rule has no inverse");
    return squares();
  }
  __device__ E *p() const {
    return squares() + (DELTA ? CHUNK * SQUARE : 0);
  }
  __device__ float *numbers() const {
    return (float *)((E *)base + ELEMENTS);
  }
  __device__ float *gamma() const {
    return numbers();
  } /* [64] exp(G), per token */
  __device__ float *kappa() const {
    return numbers() + CHUNK;
  } /* [64] exp(G_C - G) */
  __device__ float *full() const {
    return numbers() + 2 * CHUNK;
  } /* exp(G_C): [DIM] or [1] */
  __device__ float *beta() const {
    static_assert(DELTA, "the additive rule has no beta");
    return numbers() + 2 * CHUNK + DIM;
  }
};

/* Scratch of one preparation: B Diag(beta), which becomes Y. Per channel before that keys times the
 * inverse (bfloat16) or the sums inside each subblock [64, DIM + 4] (float16), and after it the
 * subblocks' totals [4, DIM] and 4 numbers each; float16 also has decayed keys [64, DIM + 8] there
 * where Kk takes the place of k. */
template <typename E, int DIM, bool CHANNEL, bool DELTA> constexpr int prepare_floats() {
  constexpr int B = DELTA ? FLOATS : 0;
  if (!CHANNEL) return CHUNK * B;
  if (coarse<E>()) return CHUNK * (DIM / 2 + 4 > B ? DIM / 2 + 4 : B) + SUBBLOCKS * (DIM + 4);
  return (CHUNK + SUBBLOCKS) * (DIM + 4) + (DELTA ? 0 : CHUNK * (DIM + 8) / 2);
}

/* From the natural logarithm. */
__device__ inline float log2_decay(float g) {
  float x = g * LOG2_E;
  return x < MIN_DECAY ? MIN_DECAY : x;
}

template <typename E, int DIM, bool CHANNEL>
__device__ inline float *beta_of(const tiles<E, DIM, CHANNEL, true> &tile) {
  return tile.beta();
}
template <typename E, int DIM, bool CHANNEL>
__device__ inline float *beta_of(const tiles<E, DIM, CHANNEL, false> &) {
  return NULL;
}

__device__ inline float limit_beta(float beta) {
  return fabsf(beta) < MIN_BETA ? MIN_BETA : beta;
}

/* Tokens of one chunk as the preparation reads them. */
struct chunk_gates {
  const float *decay, *beta; /* of its first token; decay may be NULL */
  int64_t decay_token, beta_token;
  int tokens;
  const void *q, *k; /* rows of the first token */
  int64_t q_token, k_token;
};

/* Elements (i, j), (i, j + 1) of P, or of B Diag(beta), whose diagonal and upper part do not
 * matter. */
template <typename E>
__device__ inline void store_score(float *a, E *p, bool of_p, bool diagonal, int i, int j,
                                   float low, float high) {
  if (!of_p) {
    *(float2 *)(a + i * FLOATS + j) = make_float2(low, high);
    return;
  }
  if (diagonal) low = i >= j ? low : 0, high = i > j ? high : 0;
  *(uint32_t *)(p + i * SQUARE + j) = pack<E>(low, high);
}

/* Calls f with the distances of the subblocks whose scores with BLOCK's rows a warp makes, from the
 * first to before the second: of the two warps of a subblock's rows one makes B and the other one
 * P, or they share P. */
template <int BLOCK, bool DELTA, typename F> __device__ inline void own_scores(int side, F f) {
  constexpr int MIDDLE = DELTA ? BLOCK + 1 : BLOCK / 2 + 1;
  if (DELTA || side == 0)
    f(number<0>(), number<MIDDLE>());
  else
    f(number<MIDDLE>(), number<BLOCK + 1>());
}

/* x[0]: the scores of BLOCK's rows with the subblock at distance FROM; then with earlier ones,
 * nearest first. To P or to B Diag(beta), whose diagonal and upper part do not matter. */
template <int BLOCK, int FROM, int TO, typename E>
__device__ inline void store_scores(float *a, E *p, bool of_p, const float *all_beta,
                                    const float (&x)[TO - FROM + 1][2][4], int lane) {
  int g = lane / 4, t = lane % 4, row = BLOCK * SUBBLOCK;
  if (of_p) {
#pragma unroll
    for (int n = 0; n < 4 * (TO - FROM); ++n) {
      int distance = FROM + n / 4;
      int i = row + g + 8 * (n % 2), j = row - distance * SUBBLOCK + n / 2 % 2 * 8 + 2 * t;
      const float *y = x[n / 4][n / 2 % 2] + 2 * (n % 2);
      *(uint32_t *)(p + i * SQUARE + j) =
          pack<E>(distance || i >= j ? y[0] : 0, distance || i > j ? y[1] : 0);
    }
    return;
  }
#pragma unroll
  for (int n = 0; n < 4 * (TO - FROM); ++n) {
    int i = row + g + 8 * (n % 2), j = row - (FROM + n / 4) * SUBBLOCK + n / 2 % 2 * 8 + 2 * t;
    float2 beta = *(const float2 *)(all_beta + j);
    const float *y = x[n / 4][n / 2 % 2] + 2 * (n % 2);
    *(float2 *)(a + i * FLOATS + j) =
        make_float2(limit_beta(beta.x) * y[0], limit_beta(beta.y) * y[1]);
  }
}

/* BLOCK is a constant so that loads of operands can run ahead of the products. */
template <int BLOCK, typename E, int DIM, bool DELTA>
__device__ inline void token_scores(const tiles<E, DIM, false, DELTA> &tile, float *a,
                                    const float *sum, int side, int lane) {
  own_scores<BLOCK, DELTA>(side, [&](auto first, auto end) {
    constexpr int LD = pitch<DIM>(), ROW = BLOCK * SUBBLOCK;
    constexpr int FROM = decltype(first)::value, TO = decltype(end)::value;
    if (FROM == TO) return;
    bool of_p = !DELTA || side;
    int g = lane / 4, t = lane % 4;
    const E *k = tile.k(), *left = (of_p ? tile.q() : k) + ROW * LD;
    float x[TO - FROM + 1][2][4] = {};
#pragma unroll
    for (int c = 0; c < DIM; c += 16) {
      uint32_t l[4], b[4];
      load_left(l, left + c, LD, lane);
#pragma unroll
      for (int s = FROM; s < TO; ++s) {
        load_right(b, k + (BLOCK - s) * SUBBLOCK * LD + c, LD, lane);
        product<E>(x[s - FROM][0], l, b[0], b[1]);
        product<E>(x[s - FROM][1], l, b[2], b[3]);
      }
    }
    float low = sum[ROW + g], high = sum[ROW + g + 8];
#pragma unroll
    for (int s = FROM; s < TO; ++s)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float2 of_column = *(const float2 *)(sum + ROW - s * SUBBLOCK + half * 8 + 2 * t);
        float(&y)[4] = x[s - FROM][half];
        y[0] *= power_of_two(low - of_column.x);
        y[1] *= power_of_two(low - of_column.y);
        y[2] *= power_of_two(high - of_column.x);
        y[3] *= power_of_two(high - of_column.y);
      }
    store_scores<BLOCK, FROM, TO>(a, tile.p(), of_p, beta_of(tile), x, lane);
  });
}

/* G of a chunk's tokens by one warp. */
__device__ inline void sum_decays(float *sum, const chunk_gates &gates, int lane) {
  int i = 2 * lane;
  float x = 0, y = 0;
  if (gates.decay && i < gates.tokens) x = log2_decay(gates.decay[i * gates.decay_token]);
  if (gates.decay && i + 1 < gates.tokens) y = log2_decay(gates.decay[(i + 1) * gates.decay_token]);
  float both = x + y;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    float other = __shfl_up_sync(~0u, both, d);
    if (lane >= d) both += other;
  }
  sum[i] = both - y;
  sum[i + 1] = both;
}

/* q and k are on their way (copy_async, uncommitted or not); waits for them. */
template <bool FOLD, typename E, int DIM, bool DELTA>
__device__ inline void prepare_tokens(const tiles<E, DIM, false, DELTA> &tile, float *a,
                                      const chunk_gates &gates, int thread, int barrier) {
  int warp = thread / 32, lane = thread % 32, block = warp % SUBBLOCKS, side = warp / SUBBLOCKS;
  float *sum = tile.kappa(); /* G until the end */
  if (warp == 0) {
    sum_decays(sum, gates, lane);
  } else if constexpr (DELTA) {
    int i = thread - 32;
    if (i < CHUNK) tile.beta()[i] = i < gates.tokens ? gates.beta[i * gates.beta_token] : 0;
  }
  copy_commit();
  copy_wait<0>();
  barrier_sync(barrier, PREPARE_THREADS);

  switch (block) {
  case 0: token_scores<0>(tile, a, sum, side, lane); break;
  case 1: token_scores<1>(tile, a, sum, side, lane); break;
  case 2: token_scores<2>(tile, a, sum, side, lane); break;
  default: token_scores<3>(tile, a, sum, side, lane);
  }
  barrier_sync(barrier, PREPARE_THREADS);
  if (thread < CHUNK) {
    float last = sum[CHUNK - 1], own = sum[thread];
    tile.gamma()[thread] = power_of_two(own);
    barrier_sync(barrier + 1, CHUNK);
    tile.kappa()[thread] = power_of_two(last - own);
    if (thread == 0) tile.full()[0] = power_of_two(last);
  }
  if constexpr (DELTA) invert<E, FOLD>(a, tile.y(), tile.beta(), thread, barrier);
}

/* The same with a decay per channel. Between two subblocks both sides are decayed to the border
 * before the later one (secondary chunking, arXiv 2312.06635, 2510.26692). Inside a subblock the
 * reading side is decayed from the border before it and the written side is scaled by the inverse,
 * at most 2^86; channels that decay further there are summed pair by pair. */
template <bool FOLD, typename E, int DIM, bool DELTA>
__device__ inline void prepare_channels(const tiles<E, DIM, true, DELTA> &tile, float *scratch,
                                        const chunk_gates &gates, int thread, int barrier) {
  constexpr int LD = pitch<DIM>(), LS = DIM + 4, HALVES = DIM / 64;
  int warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  int block = warp % SUBBLOCKS, row = block * SUBBLOCK, side = warp / SUBBLOCKS;
  bool of_p = !DELTA || side == 1;
  float *sum = scratch, *total = scratch + CHUNK * LS, *a = scratch;
  /* [4, HALVES, 2]: the channels 64 h + 2 lane and + 1 that are not factored. */
  unsigned *steep = (unsigned *)(total + SUBBLOCKS * DIM);
  /* Elementwise, a warp has 64 channels of its subblock: lane l has 2 l, 2 l + 1. */
  int channel = 64 * side + 2 * lane;
  bool elementwise = side < HALVES;
  if (elementwise) {
    float2 x[SUBBLOCK], running = {0, 0};
#pragma unroll
    for (int i = 0; i < SUBBLOCK; ++i)
      x[i] = row + i < gates.tokens
                 ? *(const float2 *)(gates.decay + (row + i) * gates.decay_token + channel)
                 : make_float2(0, 0);
#pragma unroll
    for (int i = 0; i < SUBBLOCK; ++i) {
      running.x += log2_decay(x[i].x);
      running.y += log2_decay(x[i].y);
      *(float2 *)(sum + (row + i) * LS + channel) = running;
    }
    *(float2 *)(total + block * DIM + channel) = running;
    unsigned low = __ballot_sync(~0u, running.x < MIN_FACTORED);
    unsigned high = __ballot_sync(~0u, running.y < MIN_FACTORED);
    if (lane == 0) steep[2 * (block * HALVES + side)] = low;
    if (lane == 0) steep[2 * (block * HALVES + side) + 1] = high;
  }
  if constexpr (DELTA)
    if (thread < CHUNK)
      tile.beta()[thread] = thread < gates.tokens ? gates.beta[thread * gates.beta_token] : 0;
  copy_commit();
  copy_wait<0>();
  barrier_sync(barrier, PREPARE_THREADS);

  /* Keys decayed to the end of their own subblock; with Kg they lie where Kk will. */
  E *q = tile.q() + row * LD, *k = tile.k() + row * LD, *kept = tile.written();
  E *written = DELTA ? kept : (E *)(total + SUBBLOCKS * (DIM + 4));
  const float *own_sum = sum + row * LS;
  if (block < SUBBLOCKS - 1 && elementwise) {
    float2 last = *(const float2 *)(total + block * DIM + channel);
#pragma unroll
    for (int i = 0; i < SUBBLOCK; ++i) {
      float2 x = unpack<E>(*(uint32_t *)(k + i * LD + channel));
      float2 s = *(const float2 *)(own_sum + i * LS + channel);
      *(uint32_t *)(written + (row + i) * LD + channel) =
          pack<E>(x.x * power_of_two(last.x - s.x), x.y * power_of_two(last.y - s.y));
    }
  }
  barrier_sync(barrier, PREPARE_THREADS);

  /* x: products with earlier subblocks, nearest first; x_own with the own one. */
  auto is_own = [&](int distance) { return DELTA || distance % 2 == side; };
  float x[SUBBLOCKS - 1][2][4] = {}, x_own[2][4] = {};
  const E *left = of_p ? q : k;
#pragma unroll 2
  for (int c = 0; c < DIM; c += 16) {
    uint32_t raw[4], raw_k[4], rounded[4];
    load_left(raw, left + c, LD, lane);
    load_left(raw_k, k + c, LD, lane);
    /* Element i of an operand: rows g, g + 8, g, g + 8, columns from c + 2t, the last two + 8. */
    float2 of_left[4], inverse[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int at = c + 2 * t + i / 2 * 8;
      float2 s = *(const float2 *)(own_sum + (g + i % 2 * 8) * LS + at);
      float2 last = *(const float2 *)(total + block * DIM + at);
      float2 y = unpack<E>(raw[i]), z = unpack<E>(raw_k[i]);
      of_left[i].x = y.x * power_of_two(s.x);
      of_left[i].y = y.y * power_of_two(s.y);
      rounded[i] = pack<E>(of_left[i].x, of_left[i].y);
      inverse[i].x = last.x < MIN_FACTORED ? 0 : z.x * power_of_two(-s.x);
      inverse[i].y = last.y < MIN_FACTORED ? 0 : z.y * power_of_two(-s.y);
    }
    /* tf32 products of depth 8 take the two elements of each register as their depths t, t + 4. */
#pragma unroll
    for (int deep = 0; deep < 4; deep += 2) {
      if (!is_own(0)) break;
      uint32_t l[4] = {__float_as_uint(of_left[deep].x), __float_as_uint(of_left[deep + 1].x),
                       __float_as_uint(of_left[deep].y), __float_as_uint(of_left[deep + 1].y)};
#pragma unroll
      for (int half = 0; half < 2; ++half)
        product_tf32(x_own[half], l, __float_as_uint(inverse[deep + half].x),
                     __float_as_uint(inverse[deep + half].y));
    }
    float2 between[2] = {{0, 0}, {0, 0}}; /* the decay of whole subblocks in between */
#pragma unroll
    for (int distance = 1; distance < SUBBLOCKS; ++distance)
      if (distance <= block) {
        uint32_t b[4];
        int s = block - distance;
        load_right(b, written + s * SUBBLOCK * LD + c, LD, lane);
        if (distance > 1)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float2 whole = *(const float2 *)(total + (s + 1) * DIM + c + 2 * t + 8 * i);
            between[i].x += whole.x, between[i].y += whole.y;
            float e0 = power_of_two(between[i].x), e1 = power_of_two(between[i].y);
            float2 y = unpack<E>(b[i]), z = unpack<E>(b[i + 2]);
            b[i] = pack<E>(y.x * e0, y.y * e1);
            b[i + 2] = pack<E>(z.x * e0, z.y * e1);
          }
        if (!is_own(distance)) continue;
        product<E>(x[distance - 1][0], rounded, b[0], b[1]);
        product<E>(x[distance - 1][1], rounded, b[2], b[3]);
      }
  }
  /* Steep channels: every pair has its own decay. */
#pragma unroll
  for (int h = 0; h < 2 * HALVES; ++h)
    for (unsigned rest = is_own(0) ? steep[2 * block * HALVES + h] : 0; rest; rest &= rest - 1) {
      int c = 64 * (h / 2) + 2 * (__ffs(rest) - 1) + h % 2;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        int i = g + 8 * r;
        float of_i = own_sum[i * LS + c], left_i = float(left[i * LD + c]);
#pragma unroll
        for (int at = 0; at < 4; ++at) {
          int j = at / 2 * 8 + 2 * t + at % 2;
          if (i >= j)
            x_own[at / 2][2 * r + at % 2] +=
                left_i * float(k[j * LD + c]) * power_of_two(of_i - own_sum[j * LS + c]);
        }
      }
    }
  barrier_sync(barrier, PREPARE_THREADS); /* the raw rows and decayed keys were read */

  if (elementwise) {
    float2 before = {0, 0}, after = {0, 0};
#pragma unroll
    for (int s = 0; s < SUBBLOCKS; ++s) {
      float2 y = *(const float2 *)(total + s * DIM + channel);
      if (s < block) before.x += y.x, before.y += y.y;
      if (s >= block) after.x += y.x, after.y += y.y;
    }
#pragma unroll 4
    for (int i = 0; i < SUBBLOCK; ++i) {
      float2 s = *(const float2 *)(own_sum + i * LS + channel);
      uint32_t *of_q = (uint32_t *)(q + i * LD + channel);
      uint32_t *of_k = (uint32_t *)(k + i * LD + channel);
      float2 y = unpack<E>(*of_q), z = unpack<E>(*of_k);
      float e0 = power_of_two(before.x + s.x), e1 = power_of_two(before.y + s.y);
      *of_q = pack<E>(y.x * e0, y.y * e1);
      if (DELTA) *of_k = pack<E>(z.x * e0, z.y * e1);
      *(uint32_t *)(kept + (row + i) * LD + channel) =
          pack<E>(z.x * power_of_two(after.x - s.x), z.y * power_of_two(after.y - s.y));
    }
    if (block == 0)
      *(float2 *)(tile.full() + channel) =
          make_float2(power_of_two(after.x), power_of_two(after.y));
  }
  barrier_sync(barrier, PREPARE_THREADS); /* the sums were read: B takes their place */

#pragma unroll
  for (int distance = 0; distance < SUBBLOCKS; ++distance)
    if (distance <= block && is_own(distance))
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float *y = distance ? x[distance ? distance - 1 : 0][half] : x_own[half];
        int j = row - distance * SUBBLOCK + half * 8 + 2 * t;
        float2 f = of_p ? make_float2(1, 1) : *(const float2 *)(beta_of(tile) + j);
        if (!of_p) f.x = limit_beta(f.x), f.y = limit_beta(f.y);
#pragma unroll
        for (int r = 0; r < 2; ++r)
          store_score<E>(a, tile.p(), of_p, distance == 0, row + g + 8 * r, j, f.x * y[2 * r],
                         f.y * y[2 * r + 1]);
      }
  if constexpr (DELTA) {
    barrier_sync(barrier, PREPARE_THREADS);
    invert<E, FOLD>(a, tile.y(), tile.beta(), thread, barrier);
  }
}

/* Scores from operands in shared memory: rows decayed from the border before their subblock, keys
 * times the inverse, keys decayed to the end of their own subblock. `total` as in prepare_channels.
 * Steep channels: every pair has its own decay, and the rows as they came; a lane of the first 16
 * sums up one token's decay. */
template <int BLOCK, int FROM, int TO, int DIM, bool DELTA>
__device__ inline void channel_scores(const tiles<__nv_bfloat16, DIM, true, DELTA> &tile,
                                      const __nv_bfloat16 *inverse, const float *total,
                                      const unsigned *steep, const chunk_gates &gates, bool of_p,
                                      int lane, float (&x)[TO - FROM + 1][2][4]) {
  using E = __nv_bfloat16;
  constexpr int LD = pitch<DIM>(), ROW = BLOCK * SUBBLOCK;
  int g = lane / 4, t = lane % 4;
  const E *left = (of_p ? tile.q() : tile.k()) + ROW * LD;
#pragma unroll
  for (int c = 0; c < DIM; c += 16) {
    uint32_t l[4], b[4];
    load_left(l, left + c, LD, lane);
    float2 between[2] = {{0, 0}, {0, 0}}; /* the decay of whole subblocks in between */
#pragma unroll
    for (int distance = 0; distance < TO; ++distance) {
      int s = BLOCK - distance;
      if (distance > 1)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float2 whole = *(const float2 *)(total + (s + 1) * DIM + c + 2 * t + 8 * i);
          between[i].x += whole.x, between[i].y += whole.y;
        }
      if (distance < FROM) continue;
      load_right(b, (distance ? tile.written() : inverse) + s * SUBBLOCK * LD + c, LD, lane);
      if (distance > 1)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t e = pack<E>(power_of_two(between[i].x), power_of_two(between[i].y));
          b[i] = multiply(b[i], e, E());
          b[i + 2] = multiply(b[i + 2], e, E());
        }
      product<E>(x[distance - FROM][0], l, b[0], b[1]);
      product<E>(x[distance - FROM][1], l, b[2], b[3]);
    }
  }
  if (FROM) return;
  const E *raw = (const E *)(of_p ? gates.q : gates.k), *raw_k = (const E *)gates.k;
  int64_t raw_token = of_p ? gates.q_token : gates.k_token;
  for (int h = 0; h < DIM / 32; ++h)
    for (unsigned rest = steep[h]; rest; rest &= rest - 1) {
      int c = 64 * (h / 2) + 2 * (__ffs(rest) - 1) + h % 2, token = ROW + lane % SUBBLOCK;
      float sum = 0, of_left = 0, of_k = 0;
      if (token < gates.tokens) {
        sum = log2_decay(gates.decay[token * gates.decay_token + c]);
        of_left = float(raw[token * raw_token + c]);
        of_k = float(raw_k[token * gates.k_token + c]);
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
        float pair = __shfl_sync(~0u, of_left, i) * __shfl_sync(~0u, of_k, j);
        if (i >= j) x[0][n / 2 % 2][n / 4 * 2 + n % 2] += pair * power_of_two(decay);
      }
    }
}

/* The same for bfloat16, whose range is that of float32: all operands can be rounded beforehand and
 * the products read nothing else. */
template <bool FOLD, int DIM, bool DELTA>
__device__ inline void prepare_channels(const tiles<__nv_bfloat16, DIM, true, DELTA> &tile,
                                        float *scratch, const chunk_gates &gates, int thread,
                                        int barrier) {
  using E = __nv_bfloat16;
  constexpr int LD = pitch<DIM>(), HALVES = DIM / 64;
  int warp = thread / 32, lane = thread % 32, block = warp % SUBBLOCKS, row = block * SUBBLOCK;
  int side = warp / SUBBLOCKS, channel = 64 * side + 2 * lane;
  bool of_p = !DELTA || side == 1, elementwise = side < HALVES;
  E *inverse = (E *)scratch;
  constexpr int B = DELTA ? FLOATS : 0;
  float *a = scratch, *total = scratch + CHUNK * (LD / 2 > B ? LD / 2 : B);
  unsigned *steep = (unsigned *)(total + SUBBLOCKS * DIM); /* [4, HALVES, 2] */
  float2 s[SUBBLOCK], last = {0, 0};
  if (elementwise) {
    const float *from = gates.decay + row * gates.decay_token + channel;
#pragma unroll
    for (int i = 0; i < SUBBLOCK; ++i) {
      s[i] = row + i < gates.tokens ? *(const float2 *)from : make_float2(0, 0);
      from += gates.decay_token;
    }
#pragma unroll
    for (int i = 0; i < SUBBLOCK; ++i) {
      last.x += log2_decay(s[i].x);
      last.y += log2_decay(s[i].y);
      s[i] = last;
    }
    *(float2 *)(total + block * DIM + channel) = last;
    unsigned low = __ballot_sync(~0u, last.x < MIN_FACTORED);
    unsigned high = __ballot_sync(~0u, last.y < MIN_FACTORED);
    if (lane == 0) *(uint2 *)(steep + 2 * (block * HALVES + side)) = make_uint2(low, high);
  }
  if constexpr (DELTA)
    if (thread < CHUNK)
      tile.beta()[thread] = thread < gates.tokens ? gates.beta[thread * gates.beta_token] : 0;
  copy_commit();
  copy_wait<0>();
  barrier_sync(barrier, PREPARE_THREADS);

  E *q = tile.q() + row * LD + channel, *k = tile.k() + row * LD + channel;
  E *written = tile.written() + row * LD + channel, *inverted = inverse + row * LD + channel;
  if (elementwise) {
    bool low = last.x >= MIN_FACTORED, high = last.y >= MIN_FACTORED;
#pragma unroll
    for (int i = 0; i < SUBBLOCK; ++i) {
      int at = i * LD;
      float2 x = unpack<E>(*(uint32_t *)(q + at)), y = unpack<E>(*(uint32_t *)(k + at));
      float e0 = power_of_two(s[i].x), e1 = power_of_two(s[i].y);
      *(uint32_t *)(q + at) = pack<E>(x.x * e0, x.y * e1);
      if (DELTA) *(uint32_t *)(k + at) = pack<E>(y.x * e0, y.y * e1);
      *(uint32_t *)(written + at) =
          pack<E>(y.x * power_of_two(last.x - s[i].x), y.y * power_of_two(last.y - s[i].y));
      *(uint32_t *)(inverted + at) =
          pack<E>(low ? y.x * power_of_two(-s[i].x) : 0, high ? y.y * power_of_two(-s[i].y) : 0);
    }
  }
  barrier_sync(barrier, PREPARE_THREADS);

  /* Scores into registers, then B takes the operands' place. */
  auto scores = [&](auto constant) {
    constexpr int BLOCK = decltype(constant)::value;
    own_scores<BLOCK, DELTA>(side, [&](auto first, auto end) {
      constexpr int FROM = decltype(first)::value, TO = decltype(end)::value;
      float x[TO - FROM + 1][2][4] = {};
      if (FROM < TO)
        channel_scores<BLOCK, FROM, TO>(tile, inverse, total, steep + 2 * BLOCK * HALVES, gates,
                                        of_p, lane, x);
      barrier_sync(barrier, PREPARE_THREADS);
      store_scores<BLOCK, FROM, TO>(a, tile.p(), of_p, beta_of(tile), x, lane);
    });
  };
  switch (block) {
  case 0: scores(number<0>()); break;
  case 1: scores(number<1>()); break;
  case 2: scores(number<2>()); break;
  default: scores(number<3>());
  }

  /* Rows from the subblocks' borders to the chunk's. */
  if (elementwise) {
    float2 before = {0, 0}, after = {0, 0};
#pragma unroll
    for (int s = 0; s < SUBBLOCKS; ++s) {
      float2 y = *(const float2 *)(total + s * DIM + channel);
      if (s < block) before.x += y.x, before.y += y.y;
      if (s > block) after.x += y.x, after.y += y.y;
    }
    float b0 = power_of_two(before.x), b1 = power_of_two(before.y);
    float a0 = power_of_two(after.x), a1 = power_of_two(after.y);
    auto scale_rows = [&](E *rows, float low, float high) {
#pragma unroll
      for (int i = 0; i < SUBBLOCK; ++i) {
        float2 x = unpack<E>(*(uint32_t *)(rows + i * LD));
        *(uint32_t *)(rows + i * LD) = pack<E>(x.x * low, x.y * high);
      }
    };
    if (block) {
      scale_rows(q, b0, b1);
      if (DELTA) scale_rows(k, b0, b1);
    } else {
      *(float2 *)(tile.full() + channel) =
          make_float2(a0 * power_of_two(last.x), a1 * power_of_two(last.y));
    }
    if (block < SUBBLOCKS - 1) scale_rows(written, a0, a1);
  }
  if constexpr (DELTA) {
    barrier_sync(barrier, PREPARE_THREADS);
    invert<E, FOLD>(a, tile.y(), tile.beta(), thread, barrier);
  }
}

template <bool FOLD, typename E, int DIM, bool DELTA>
__device__ inline void prepare(const tiles<E, DIM, false, DELTA> &tile, float *scratch,
                               const chunk_gates &gates, int thread, int barrier) {
  prepare_tokens<FOLD>(tile, scratch, gates, thread, barrier);
}
template <bool FOLD, typename E, int DIM, bool DELTA>
__device__ inline void prepare(const tiles<E, DIM, true, DELTA> &tile, float *scratch,
                               const chunk_gates &gates, int thread, int barrier) {
  prepare_channels<FOLD>(tile, scratch, gates, thread, barrier);
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
 * the backward pass (I + Diag(beta) B)^-1 = Diag(beta) Y Diag(beta)^-1, like Y without its
 * diagonal. Without Kg, Y and the last one for the additive rule. Bytes. */
template <int DIM, bool CHANNEL, bool DELTA> struct record {
  using tile = tiles<__half, DIM, CHANNEL, DELTA>;
  enum {
    ROWS = CHANNEL ? tile::ROWS : 0,
    SQUARE_BYTES = CHUNK * CHUNK * 2,
    SQUARES = DELTA ? 2 : 1,
    Y = ROWS * DIM * 2,
    P = Y + (SQUARES - 1) * SQUARE_BYTES,
    NUMBERS = P + SQUARE_BYTES,
    FORWARD_BYTES = NUMBERS + tile::NUMBERS * 4,
    LEFT = FORWARD_BYTES,
    BACKWARD_BYTES = LEFT + (DELTA ? SQUARE_BYTES : 0),
  };
};

template <typename E> __device__ inline rows<const E> as(const rows<const void> &x) {
  return {(const E *)x.data, x.batch, x.token, x.head};
}
template <typename E> __device__ inline rows<E> as(const rows<void> &x) {
  return {(E *)x.data, x.batch, x.token, x.head};
}

template <typename E>
__device__ inline chunk_gates gates_of(const parameters &p, const sequence &s, int64_t first,
                                       int head) {
  chunk_gates gates;
  gates.decay = p.decay.data ? p.decay.at(s.batch, s.first + first, head) : NULL;
  gates.beta = p.beta.data ? p.beta.at(s.batch, s.first + first, head) : NULL;
  gates.decay_token = p.decay.token;
  gates.beta_token = p.beta.token;
  gates.tokens = (int)min((int64_t)CHUNK, s.tokens - first);
  gates.q = as<E>(p.q).at(s.batch, s.first + first, head / p.group);
  gates.k = as<E>(p.k).at(s.batch, s.first + first, head / p.group);
  gates.q_token = p.q.token;
  gates.k_token = p.k.token;
  return gates;
}

template <typename E, int DIM, bool CHANNEL, bool DELTA>
__device__ inline void copy_keys(const parameters &p, const tiles<E, DIM, CHANNEL, DELTA> &tile,
                                 const sequence &s, int64_t first, int tokens, int head, int thread,
                                 int threads) {
  rows<const E> q = as<E>(p.q), k = as<E>(p.k);
  copy_rows(tile.k(), pitch<DIM>(), k.at(s.batch, s.first + first, head / p.group), k.token, CHUNK,
            DIM, tokens, thread, threads);
  copy_rows(tile.q(), pitch<DIM>(), q.at(s.batch, s.first + first, head / p.group), q.token, CHUNK,
            DIM, tokens, thread, threads);
}

template <typename E, int DIM, bool CHANNEL, bool DELTA> constexpr int prepare_bytes() {
  return tiles<E, DIM, CHANNEL, DELTA>::BYTES + prepare_floats<E, DIM, CHANNEL, DELTA>() * 4;
}

/* Prepares all chunks at once: blocks over (sequence and chunk, value head). */
template <typename E, int DIM, bool CHANNEL, bool DELTA, bool BACKWARD>
__global__ void __launch_bounds__(PREPARE_THREADS) prepare_kernel(parameters p) {
  extern __shared__ __align__(16) char memory[];
  using tile_type = tiles<E, DIM, CHANNEL, DELTA>;
  using record_type = record<DIM, CHANNEL, DELTA>;
  tile_type tile = {memory};
  int thread = threadIdx.x, head = blockIdx.y;
  int64_t chunk = blockIdx.x % p.chunks, first = chunk * CHUNK;
  sequence s = find_sequence(p.offsets, p.length, (int)(blockIdx.x / p.chunks));
  if (first >= s.tokens) return;
  chunk_gates gates = gates_of<E>(p, s, first, head);
  copy_keys(p, tile, s, first, gates.tokens, head, thread, PREPARE_THREADS);
  prepare<!BACKWARD>(tile, (float *)(memory + tile_type::BYTES), gates, thread, 1);
  __syncthreads();

  char *to = p.prepared + ((int64_t)blockIdx.x * p.value_heads + head) *
                              (BACKWARD ? record_type::BACKWARD_BYTES : record_type::FORWARD_BYTES);
  if (CHANNEL)
    for (int at = thread; at < tile_type::ROWS * DIM / 8; at += PREPARE_THREADS)
      ((uint4 *)to)[at] =
          *(const uint4 *)((E *)memory + at / (DIM / 8) * pitch<DIM>() + at % (DIM / 8) * 8);
  for (int at = thread; at < record_type::SQUARES * CHUNK * CHUNK / 8; at += PREPARE_THREADS)
    ((uint4 *)(to + record_type::Y))[at] =
        *(const uint4 *)(tile.squares() + at / 8 * SQUARE + at % 8 * 8);
  for (int at = thread; at < tile_type::NUMBERS / 4; at += PREPARE_THREADS)
    ((uint4 *)(to + record_type::NUMBERS))[at] = ((const uint4 *)tile.numbers())[at];
  if constexpr (BACKWARD && DELTA) {
    const float *y = (const float *)(memory + tile_type::BYTES);
    for (int at = thread; at < CHUNK * CHUNK / 2; at += PREPARE_THREADS) {
      int i = at / (CHUNK / 2), j = at % (CHUNK / 2) * 2;
      float beta = limit_beta(tile.beta()[i]);
      float low = beta / limit_beta(tile.beta()[j]), high = beta / limit_beta(tile.beta()[j + 1]);
      ((uint32_t *)(to + record_type::LEFT))[at] = pack<E>(
          j < i ? y[i * FLOATS + j] * low : 0, j + 1 < i ? y[i * FLOATS + j + 1] * high : 0);
    }
  }
}

/* ---- On the host ---- */

/* Hopper has kernels of its own for most of the additive rule (recurrent_additive_sm90.cu), which
 * come first. They are left alone with it: a plan's workspace is the largest of all algorithms that
 * take its problem, and the one here is larger. */
inline bool left_to_hopper(const attn_cuda_device *device, const attn_recurrent_problem *problem,
                           attn_pass pass) {
  bool channel = problem->decay == ATTN_DECAY_CHANNEL, forward = pass == ATTN_PASS_FORWARD;
  return device->major == 9 && problem->update == ATTN_UPDATE_ADDITIVE &&
         (problem->value_dim == 64 || problem->value_dim == 128) && problem->length >= 128 &&
         problem->scale > 0 &&
         (!channel ||
          (forward && problem->dtype == ATTN_BF16 && problem->dim == problem->value_dim));
}

/* Whether the problem is one for these kernels. */
inline bool accepts(const attn_cuda_device *device, const attn_recurrent_problem *problem,
                    attn_pass pass) {
  return !problem->normalise && device->major >= 8 && !left_to_hopper(device, problem, pass) &&
         (problem->dtype == ATTN_BF16 || problem->dtype == ATTN_F16) &&
         (problem->dim == 64 || problem->dim == 128) && problem->value_dim % SLAB == 0 &&
         problem->value_heads <= 65535 && problem->batch <= 65535 && problem->length >= SUBBLOCK;
}

inline const char *rule_name(bool delta) {
  return delta ? "delta rule" : "additive rule";
}

/* f(dim, per channel, delta rule) with the problem's as constants. */
template <typename F>
auto with_instance(const attn_recurrent_problem *problem, F f)
    -> decltype(f(number<64>(), number<0>(), number<0>())) {
  auto with_rule = [&](auto dim, auto channel) {
    return problem->update == ATTN_UPDATE_DELTA ? f(dim, channel, number<1>())
                                                : f(dim, channel, number<0>());
  };
  auto with_decay = [&](auto dim) {
    return problem->decay == ATTN_DECAY_CHANNEL ? with_rule(dim, number<1>())
                                                : with_rule(dim, number<0>());
  };
  return problem->dim == 64 ? with_decay(number<64>()) : with_decay(number<128>());
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

/* Of the log decay or its gradient; a constant per head has no tokens. */
template <typename T>
rows<T> decay_rows(const attn_recurrent_problem *problem, const attn_tensor &x) {
  if (problem->decay == ATTN_DECAY_HEAD) return {(T *)x.data, 0, 0, x.stride[0]};
  return rows_of<T>(x, problem->ragged);
}

/* The inputs. */
inline parameters parameters_of(const attn_recurrent_problem *problem,
                                const attn_recurrent_args *args) {
  bool ragged = problem->ragged;
  parameters p = {};
  p.q = rows_of<const void>(args->q, ragged);
  p.k = rows_of<const void>(args->k, ragged);
  p.v = rows_of<const void>(args->v, ragged);
  if (problem->update == ATTN_UPDATE_DELTA) p.beta = rows_of<const float>(args->beta, ragged);
  if (problem->decay != ATTN_DECAY_NONE) p.decay = decay_rows<const float>(problem, args->decay);
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

} // namespace chunked

#endif
