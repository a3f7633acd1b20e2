/* Quantised weights on the GPU (blocks.h): to plain numbers, and times a few rows.
 *
 * tensor/blocks.c says how each type lays out its block; the names here are those used there. */
#include "kernels/cuda/rows.cuh"

typedef unsigned char byte;

enum { SMALL = 32, LARGE = 256 }; /* elements of a block */

static __device__ inline float half_at(const byte *place) { /* aligned to 2 */
  return __half2float(*(const __half *)place);
}

/* --- One element --------------------------------------------------------------------------------
 *
 * Products of scales and codes are exact in float32: a value is rounded once at most, where a
 * minimum is added, whether or not the compiler fuses that. */

static __device__ inline int nibble(const byte *q, int i) {
  return i < SMALL / 2 ? q[i] & 15 : q[i - SMALL / 2] >> 4;
}
static __device__ inline int five_bits(const byte *h, int i) {
  return (h[i / 8] >> i % 8 & 1) << 4 | nibble(h + SMALL / 8, i);
}
static __device__ inline int two_bits(const byte *q, int i) {
  return q[i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3;
}
static __device__ inline int one_bit(const byte *h, int i) {
  return h[i % 32] >> i / 32 & 1;
}
static __device__ inline int large_nibble(const byte *q, int i, int run) {
  int pair = q[i / (2 * run) * run + i % run];
  return i / run % 2 ? pair >> 4 : pair & 15;
}
static __device__ inline int q3_scale(const byte *s, int g) {
  int low = g < 8 ? s[g] & 15 : s[g - 8] >> 4;
  return (s[8 + g % 4] >> g / 4 * 2 & 3) << 4 | low;
}
static __device__ inline int k_scale(const byte *s, int g) {
  return g < 4 ? s[g] & 63 : s[g - 4] >> 6 << 4 | (s[g + 4] & 15);
}
static __device__ inline int k_minimum(const byte *s, int g) {
  return g < 4 ? s[g + 4] & 63 : s[g] >> 6 << 4 | s[g + 4] >> 4;
}

/* Element i of a block of TYPE. */
template <int TYPE> static __device__ inline float element(const byte *block, int i) {
  if constexpr (TYPE == ATTN_BLOCK_F32) {
    return *(const float *)block;
  } else if constexpr (TYPE == ATTN_BLOCK_F64) {
    uint2 words = make_uint2(((const uint32_t *)block)[0], ((const uint32_t *)block)[1]);
    return (float)__hiloint2double((int)words.y, (int)words.x);
  } else if constexpr (TYPE == ATTN_BLOCK_F16) {
    return half_at(block);
  } else if constexpr (TYPE == ATTN_BLOCK_BF16) {
    return __bfloat162float(*(const __nv_bfloat16 *)block);
  } else if constexpr (TYPE == ATTN_BLOCK_Q8_0) {
    return half_at(block) * (float)(int8_t)block[2 + i];
  } else if constexpr (TYPE == ATTN_BLOCK_Q4_0) {
    return half_at(block) * (float)(nibble(block + 2, i) - 8);
  } else if constexpr (TYPE == ATTN_BLOCK_Q4_1) {
    return half_at(block) * (float)nibble(block + 4, i) + half_at(block + 2);
  } else if constexpr (TYPE == ATTN_BLOCK_Q5_0) {
    return half_at(block) * (float)(five_bits(block + 2, i) - 16);
  } else if constexpr (TYPE == ATTN_BLOCK_Q5_1) {
    return half_at(block) * (float)five_bits(block + 4, i) + half_at(block + 2);
  } else if constexpr (TYPE == ATTN_BLOCK_Q2_K) {
    int pair = block[i / 16];
    return half_at(block + 80) * (float)(pair & 15) * (float)two_bits(block + 16, i) -
           half_at(block + 82) * (float)(pair >> 4);
  } else if constexpr (TYPE == ATTN_BLOCK_Q3_K) {
    int q = 4 * one_bit(block, i) + two_bits(block + 32, i) - 4;
    return half_at(block + 108) * (float)(q3_scale(block + 96, i / 16) - 32) * (float)q;
  } else if constexpr (TYPE == ATTN_BLOCK_Q4_K || TYPE == ATTN_BLOCK_Q5_K) {
    int q = TYPE == ATTN_BLOCK_Q4_K ? large_nibble(block + 16, i, 32)
                                    : one_bit(block + 16, i) << 4 | large_nibble(block + 48, i, 32);
    return half_at(block) * (float)k_scale(block + 4, i / 32) * (float)q -
           half_at(block + 2) * (float)k_minimum(block + 4, i / 32);
  } else {
    static_assert(TYPE == ATTN_BLOCK_Q6_K, "a type without a layout");
    int q = (two_bits(block + 128, i) << 4 | large_nibble(block, i, 64)) - 32;
    return half_at(block + 208) * (float)(int8_t)block[192 + i / 16] * (float)q;
  }
}

/* --- The types ----------------------------------------------------------------------------------
 */

template <int TYPE> struct format; /* elements and bytes of a block */
#define FORMAT(type, elements, bytes)                                                              \
  template <> struct format<ATTN_BLOCK_##type> {                                                   \
    enum { ELEMENTS = elements, BYTES = bytes };                                                   \
  };
/* X(type, elements, bytes): types without blocks, and with */
#define PLAIN_TYPES(X) X(F32, 1, 4) X(F64, 1, 8) X(F16, 1, 2) X(BF16, 1, 2)
#define QUANTISED_TYPES(X)                                                                         \
  X(Q8_0, SMALL, 34)                                                                               \
  X(Q4_0, SMALL, 18)                                                                               \
  X(Q4_1, SMALL, 20)                                                                               \
  X(Q5_0, SMALL, 22)                                                                               \
  X(Q5_1, SMALL, 24)                                                                               \
  X(Q2_K, LARGE, 84) X(Q3_K, LARGE, 110) X(Q4_K, LARGE, 144) X(Q5_K, LARGE, 176) X(Q6_K, LARGE, 210)
PLAIN_TYPES(FORMAT)
QUANTISED_TYPES(FORMAT)
#undef FORMAT

static attn_status check_blocks(const char *function, const void *blocks, int64_t n, int elements,
                                int bytes) {
  if (n % elements != 0)
    return attn_cuda_fail(ATTN_INVALID_SHAPE, "%s: rows of %lld are not whole blocks of %d",
                          function, (long long)n, elements);
  int alignment = bytes % 4 == 0 ? 4 : 2;
  if ((uintptr_t)blocks % alignment != 0)
    return attn_cuda_fail(ATTN_INVALID_ARGUMENT, "%s: blocks of %d bytes at %p: not aligned to %d",
                          function, bytes, blocks, alignment);
  return ATTN_OK;
}

/* --- To plain numbers ---------------------------------------------------------------------------
 */

enum { THREADS = 256, RUN = 8 /* elements of a thread, in one block of the format */ };

/* y [rows, n]; `runs` = runs in a row. */
template <int TYPE>
static __global__ void __launch_bounds__(THREADS)
    expand(const byte *blocks, const int32_t *index, operand y, int64_t y_stride, int64_t n,
           division runs, uint32_t count) {
  constexpr int ELEMENTS = format<TYPE>::ELEMENTS, BYTES = format<TYPE>::BYTES;
  uint32_t at = blockIdx.x * THREADS + threadIdx.x;
  if (at >= count) return;
  uint32_t row = divide(at, runs);
  int64_t first = (int64_t)(at - row * runs.divisor) * RUN;
  int64_t source = index ? index[row] : row;
  const byte *from = blocks + (source * n + first) / ELEMENTS * BYTES;
  char *to = y.data + row * y_stride + first * y.step;
  float x[RUN];
  if constexpr (ELEMENTS == 1) {
#pragma unroll
    for (int i = 0; i < RUN; ++i) x[i] = first + i < n ? element<TYPE>(from + i * BYTES, 0) : 0;
  } else {
    int start = (int)(first % ELEMENTS);
#pragma unroll
    for (int i = 0; i < RUN; ++i) x[i] = element<TYPE>(from, start + i);
  }
  bool vectors = y.dtype != ATTN_F64 && (uintptr_t)to % 16 == 0 && first + RUN <= n &&
                 y.step == dtype_bytes(y.dtype);
  if (vectors) {
    store_vector(to, y.dtype, x);
    return;
  }
#pragma unroll
  for (int i = 0; i < RUN; ++i)
    if (first + i < n) store_element<float>(to + i * y.step, y.dtype, 0, x[i]);
}

attn_status attn_cuda_blocks_expand(attn_block_type type, const void *blocks, const int32_t *index,
                                    const attn_tensor *y, attn_cuda_stream stream) {
  ATTN_CUDA_CHECK(attn_cuda_check_operand("blocks_expand", "y", y, y));
  if (y->rank != 2)
    return attn_cuda_fail(ATTN_INVALID_SHAPE, "blocks_expand: y has rank %d, expected 2", y->rank);
  int64_t rows = y->shape[0], n = y->shape[1];
  if (rows == 0 || n == 0) return ATTN_OK;
  int64_t runs = (n + RUN - 1) / RUN, stride = y->stride[0] * dtype_bytes(y->dtype);
  /* Rows of one launch: indices stay below 2^31. */
  int64_t most = INT32_MAX / runs;
  if (index && most < rows)
    return attn_cuda_fail(ATTN_INVALID_SHAPE, "blocks_expand: %lld rows of %lld chosen by an index",
                          (long long)rows, (long long)n);
  for (int64_t start = 0; start < rows; start += most) {
    int64_t part = rows - start < most ? rows - start : most;
    operand to = operand_of(y);
    to.data += start * stride;
    uint32_t count = (uint32_t)(part * runs);
    unsigned grid = (count + THREADS - 1) / THREADS;
    switch (type) {
#define CASE(name, elements, bytes)                                                                \
  case ATTN_BLOCK_##name:                                                                          \
    ATTN_CUDA_CHECK(check_blocks("blocks_expand", blocks, n, elements, bytes));                    \
    expand<ATTN_BLOCK_##name><<<grid, THREADS, 0, (cudaStream_t)stream>>>(                         \
        (const byte *)blocks + start * (n / (elements)) * (bytes), index, to, stride, n,           \
        make_division(runs), count);                                                               \
    break;
      PLAIN_TYPES(CASE)
      QUANTISED_TYPES(CASE)
#undef CASE
    default:
      return attn_cuda_fail(ATTN_UNSUPPORTED, "blocks_expand: block type %d cannot be converted",
                            (int)type);
    }
    ATTN_CUDA_TRY_LAUNCH("blocks_expand");
  }
  return ATTN_OK;
}

/* --- Times a few rows ---------------------------------------------------------------------------
 *
 * y [m, outputs] = x [m, inputs] w^T by tensor cores (mma.m16n8k16), with 16 rows of w as the left
 * operand and the rows of x as its 8 columns. A code q is a small integer, exact in bfloat16, and
 * with it the product q x in float32; scales and minima come in once a group:
 *
 *   sum_k w_k x_k = sum over groups of  c sum q_k x_k + b sum x_k,   w_k = c q_k + b
 *
 * The instruction wants of lane (g, t) elements 2t, 2t + 1, 2t + 8 and 2t + 9 of row g. Any order
 * does, as long as both operands have it: lane (g, t) takes elements 4t .. 4t + 3 of a step of 16.
 * float32 activations are the sum of three bfloat16 numbers, which go one after the other.
 *
 * Each warp copies pieces of 16 rows x 256 elements to its own shared memory, 16 bytes a lane, a
 * piece ahead of the one that it multiplies: blocks of 18 or 34 bytes could not be read in whole
 * sectors otherwise. The warps of a block share the inputs and add up in order at the end. */

enum {
  MATVEC_WARPS = 8,
  MATVEC_THREADS = MATVEC_WARPS * WARP,
  MATVEC_ROWS = 8, /* of x at most */
  OUTPUTS = 16,    /* of a block */
  PIECE = 256,     /* elements of a row that are copied at once */
  GROUP = 32,      /* elements that are multiplied at once: two steps */
  STAGES = 2,
};

/* Four bytes at an address that is aligned to 2, or to 4 where the type's blocks are. */
template <bool ALIGNED> static __device__ inline uint32_t word_at(const byte *place) {
  if (ALIGNED) return *(const uint32_t *)place;
  unsigned odd = (unsigned)(uintptr_t)place & 2;
  const uint32_t *word = (const uint32_t *)(place - odd);
  return __byte_perm(word[0], word[1], odd ? 0x5432 : 0x3210);
}

/* Four bytes below 128 as bfloat16 numbers minus 128: 0x43xx is 128 + xx. */
static __device__ inline void raise(uint32_t codes, uint32_t (&pair)[2]) {
  pair[0] = __byte_perm(codes, 0x43434343u, 0x4140);
  pair[1] = __byte_perm(codes, 0x43434343u, 0x4342);
}

static __device__ inline uint32_t subtract(uint32_t a, uint32_t b) { /* of bfloat16 pairs */
  __nv_bfloat162 x, y;
  memcpy(&x, &a, sizeof x);
  memcpy(&y, &b, sizeof y);
  x = __hsub2(x, y);
  memcpy(&a, &x, sizeof a);
  return a;
}

/* codes - BIAS for four codes below 128. */
template <int BIAS> static __device__ inline void to_pairs(uint32_t codes, uint32_t (&pair)[2]) {
  constexpr uint32_t above = 0x4300 + BIAS; /* 128 + BIAS, BIAS < 128 */
  raise(codes, pair);
#pragma unroll
  for (int i = 0; i < 2; ++i) pair[i] = subtract(pair[i], above << 16 | above);
}

static __device__ inline uint32_t fifth_bits(uint32_t four) { /* bit i to bit 4 of byte i */
  return four * 0x02040810u & 0x10101010u;
}

/* The codes of group g of a piece, as bfloat16: two steps of lane t; `block` is where the piece's
 * row begins. */
template <int TYPE>
static __device__ inline void codes_of(const byte *row, int g, int t, uint32_t (&step)[2][2]) {
  constexpr int BYTES = format<TYPE>::BYTES;
  constexpr bool ALIGNED = BYTES % 4 == 0;
  auto word = [](const byte *place) { return word_at<ALIGNED>(place); };
  const uint32_t four = 0x0f0f0f0fu, two = 0x03030303u, one = 0x01010101u;
  const byte *block = format<TYPE>::ELEMENTS == SMALL ? row + g * BYTES : row;
  if constexpr (TYPE == ATTN_BLOCK_Q8_0) {
#pragma unroll
    for (int s = 0; s < 2; ++s) { /* q = (q & 127) - (q & 128), both of which `raise` can */
      uint32_t q = word(block + 2 + 16 * s + 4 * t), below[2];
      raise(q & 0x7f7f7f7fu, step[s]);
      raise(q & 0x80808080u, below); /* 0x4380 is 256 */
      step[s][0] = subtract(step[s][0], below[0]);
      step[s][1] = subtract(step[s][1], below[1]);
    }
  } else if constexpr (TYPE == ATTN_BLOCK_Q4_0 || TYPE == ATTN_BLOCK_Q4_1) {
    uint32_t q = word(block + BYTES - 16 + 4 * t);
    to_pairs<TYPE == ATTN_BLOCK_Q4_0 ? 8 : 0>(q & four, step[0]);
    to_pairs<TYPE == ATTN_BLOCK_Q4_0 ? 8 : 0>(q >> 4 & four, step[1]);
  } else if constexpr (TYPE == ATTN_BLOCK_Q5_0 || TYPE == ATTN_BLOCK_Q5_1) {
    uint32_t q = word(block + BYTES - 16 + 4 * t), h = word(block + BYTES - 20) >> 4 * t;
    to_pairs<TYPE == ATTN_BLOCK_Q5_0 ? 16 : 0>((q & four) | fifth_bits(h & 15), step[0]);
    to_pairs<TYPE == ATTN_BLOCK_Q5_0 ? 16 : 0>((q >> 4 & four) | fifth_bits(h >> 16 & 15), step[1]);
  } else {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      int at = 16 * s + 4 * t; /* in the group */
      if constexpr (TYPE == ATTN_BLOCK_Q4_K || TYPE == ATTN_BLOCK_Q5_K) {
        constexpr int LOW = TYPE == ATTN_BLOCK_Q4_K ? 16 : 48;
        uint32_t q = word(block + LOW + g / 2 * 32 + at) >> 4 * (g % 2) & four;
        if constexpr (TYPE == ATTN_BLOCK_Q5_K) q |= (word(block + 16 + at) >> g & one) << 4;
        to_pairs<0>(q, step[s]);
      } else if constexpr (TYPE == ATTN_BLOCK_Q6_K) {
        uint32_t low = word(block + g / 4 * 64 + g % 2 * 32 + at) >> (g % 4 >= 2 ? 4 : 0);
        uint32_t high = word(block + 128 + g / 4 * 32 + at) >> 2 * (g % 4);
        to_pairs<32>((low & four) | (high & two) << 4, step[s]);
      } else if constexpr (TYPE == ATTN_BLOCK_Q2_K) {
        to_pairs<0>(word(block + 16 + g / 4 * 32 + at) >> 2 * (g % 4) & two, step[s]);
      } else {
        uint32_t low = word(block + 32 + g / 4 * 32 + at) >> 2 * (g % 4) & two;
        to_pairs<4>(low | (word(block + at) >> g & one) << 2, step[s]);
      }
    }
  }
}

/* c and b of the two steps of group g. */
template <int TYPE>
static __device__ inline void scales_of(const byte *row, int g, float (&c)[2], float (&b)[2]) {
  constexpr int BYTES = format<TYPE>::BYTES;
  const byte *block = format<TYPE>::ELEMENTS == SMALL ? row + g * BYTES : row;
  b[0] = b[1] = 0;
  if constexpr (format<TYPE>::ELEMENTS == SMALL) {
    c[0] = c[1] = half_at(block);
    if (TYPE == ATTN_BLOCK_Q4_1 || TYPE == ATTN_BLOCK_Q5_1) b[0] = b[1] = half_at(block + 2);
  } else if constexpr (TYPE == ATTN_BLOCK_Q4_K || TYPE == ATTN_BLOCK_Q5_K) {
    c[0] = c[1] = half_at(block) * (float)k_scale(block + 4, g);
    b[0] = b[1] = -half_at(block + 2) * (float)k_minimum(block + 4, g);
  } else {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      if constexpr (TYPE == ATTN_BLOCK_Q6_K) {
        c[s] = half_at(block + 208) * (float)(int8_t)block[192 + 2 * g + s];
      } else if constexpr (TYPE == ATTN_BLOCK_Q2_K) {
        int pair = block[2 * g + s];
        c[s] = half_at(block + 80) * (float)(pair & 15);
        b[s] = -half_at(block + 82) * (float)(pair >> 4);
      } else {
        c[s] = half_at(block + 108) * (float)(q3_scale(block + 96, 2 * g + s) - 32);
      }
    }
  }
}

static __device__ inline void multiply(float (&sum)[4], const uint32_t (&low)[2],
                                       const uint32_t (&high)[2], const uint32_t (&x)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(low[0]), "r"(high[0]), "r"(low[1]), "r"(high[1]), "r"(x[0]), "r"(x[1]));
}

struct matvec {
  const byte *w, *end; /* end: of the last row */
  const char *x;
  char *y;
  int64_t outputs, inputs, row_bytes;
  int64_t x_stride, y_stride; /* elements */
  int m, x_dtype, y_dtype;
  bool accumulate;
};

/* Four activations of a row as PARTS pairs of pairs of bfloat16 whose sum they are. */
template <int PARTS>
static __device__ inline void load_activations(const char *place, int dtype, int64_t at,
                                               uint32_t (&part)[PARTS][2]) {
  if constexpr (PARTS == 1) {
    uint2 four = *(const uint2 *)(place + 2 * at);
    part[0][0] = four.x;
    part[0][1] = four.y;
  } else {
    float x[4];
    if (dtype == ATTN_F32) {
      float4 four = *(const float4 *)(place + 4 * at);
      x[0] = four.x;
      x[1] = four.y;
      x[2] = four.z;
      x[3] = four.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = load_element<float>(place, dtype, at + i);
    }
#pragma unroll
    for (int p = 0; p < PARTS; ++p)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
        memcpy(&part[p][i], &pair, sizeof pair);
        x[2 * i] -= __low2float(pair);
        x[2 * i + 1] -= __high2float(pair);
      }
  }
}

template <int TYPE> struct staging {
  enum {
    BYTES = PIECE / format<TYPE>::ELEMENTS * format<TYPE>::BYTES, /* of a row's piece */
    UNITS = (BYTES + 15 + 15) / 16,   /* of 16 bytes that cover it at any address */
    PITCH = (UNITS / 2 * 2 + 1) * 16, /* odd in units: rows start in different banks */
  };
  static_assert(PITCH >= UNITS * 16, "a row's units must fit");
};

template <int TYPE, int PARTS>
static __global__ void __launch_bounds__(MATVEC_THREADS)
    multiply_blocks(const __grid_constant__ matvec all) {
  typedef staging<TYPE> stage;
  constexpr bool MINIMA = TYPE == ATTN_BLOCK_Q4_1 || TYPE == ATTN_BLOCK_Q5_1 ||
                          TYPE == ATTN_BLOCK_Q2_K || TYPE == ATTN_BLOCK_Q4_K ||
                          TYPE == ATTN_BLOCK_Q5_K;
  constexpr bool HALVES = TYPE == ATTN_BLOCK_Q2_K || TYPE == ATTN_BLOCK_Q3_K ||
                          TYPE == ATTN_BLOCK_Q6_K; /* a scale for each step */
  extern __shared__ __align__(16) byte memory[];
  __shared__ float part[MATVEC_WARPS][WARP][4];
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, row = lane / 4, t = lane % 4;
  int64_t output = (int64_t)blockIdx.x * OUTPUTS;
  byte *mine = memory + warp * (STAGES * OUTPUTS * stage::PITCH);

  /* Outputs beyond the last read it once more; their sums are not stored. */
  auto row_start = [&](int r) {
    int64_t o = output + r < all.outputs ? output + r : all.outputs - 1;
    return all.w + o * all.row_bytes;
  };
  auto copy = [&](int64_t piece, int to) {
    int64_t first = piece * PIECE;
    int bytes = stage::BYTES;
    if (all.inputs - first < PIECE)
      bytes = (int)((all.inputs - first) / format<TYPE>::ELEMENTS) * format<TYPE>::BYTES;
#pragma unroll 4
    for (int i = lane; i < OUTPUTS * stage::UNITS; i += WARP) {
      int r = i / stage::UNITS, unit = i % stage::UNITS;
      const byte *from = row_start(r) + piece * stage::BYTES;
      int before = (int)((uintptr_t)from & 15);
      if (unit * 16 >= before + bytes) continue;
      const byte *source = from - before + unit * 16;
      int size = all.end - source < 16 ? (int)(all.end - source) : 16; /* the rest becomes 0 */
      uint32_t target =
          (uint32_t)__cvta_generic_to_shared(mine + (to * OUTPUTS + r) * stage::PITCH + unit * 16);
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
                   "r"(size)
                   : "memory");
    }
  };

  const char *x_row = all.x + (row < all.m ? row : 0) * all.x_stride * dtype_bytes(all.x_dtype);
  const uint32_t ones[2] = {0x3f803f80u, 0x3f803f80u};
  float total[4] = {};
  int64_t pieces = (all.inputs + PIECE - 1) / PIECE;
  int stage_now = 0;
  if (warp < pieces) copy(warp, 0);
  asm volatile("cp.async.commit_group;" ::: "memory");
  for (int64_t piece = warp; piece < pieces; piece += MATVEC_WARPS, stage_now ^= 1) {
    if (piece + MATVEC_WARPS < pieces) copy(piece + MATVEC_WARPS, stage_now ^ 1);
    asm volatile("cp.async.commit_group;" ::: "memory");
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncwarp();
    const byte *place[2]; /* of output rows `row` and `row` + 8 */
#pragma unroll
    for (int h = 0; h < 2; ++h)
      place[h] = mine + (stage_now * OUTPUTS + row + 8 * h) * stage::PITCH +
                 ((uintptr_t)(row_start(row + 8 * h) + piece * stage::BYTES) & 15);
    int groups =
        (int)((all.inputs - piece * PIECE < PIECE ? all.inputs - piece * PIECE : PIECE) / GROUP);
#pragma unroll 2
    for (int g = 0; g < groups; ++g) {
      uint32_t x[2][PARTS][2], code[2][2][2];
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        if (row < all.m) {
          load_activations<PARTS>(x_row, all.x_dtype, piece * PIECE + g * GROUP + 16 * s + 4 * t,
                                  x[s]);
        } else {
#pragma unroll
          for (int p = 0; p < PARTS; ++p) x[s][p][0] = x[s][p][1] = 0;
        }
      }
      float c[2][2], b[2][2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        codes_of<TYPE>(place[h], g, t, code[h]);
        scales_of<TYPE>(place[h], g, c[h], b[h]);
      }
      float product[2][4] = {}, sum[2][4] = {}; /* of each step, or of both in the first */
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int p = 0; p < PARTS; ++p) {
          multiply(product[HALVES ? s : 0], code[0][s], code[1][s], x[s][p]);
          if (MINIMA) multiply(sum[HALVES ? s : 0], ones, ones, x[s][p]);
        }
#pragma unroll
      for (int s = 0; s < (HALVES ? 2 : 1); ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) { /* i / 2: which output of the lane */
          total[i] += c[i / 2][s] * product[s][i];
          if (MINIMA) total[i] += b[i / 2][s] * sum[s][i];
        }
    }
    __syncwarp();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) part[warp][lane][i] = total[i];
  __syncthreads();
  /* Element i of lane (g, t): output g (+ 8 for i >= 2), row 2t + i % 2. */
  int i = threadIdx.x / WARP;
  if (i >= 4) return;
  float value = 0;
#pragma unroll
  for (int w = 0; w < MATVEC_WARPS; ++w) value += part[w][lane][i];
  int to_row = 2 * t + i % 2;
  output += row + i / 2 * 8;
  if (to_row >= all.m || output >= all.outputs) return;
  int64_t at = to_row * all.y_stride + output;
  if (all.accumulate) value += load_element<float>(all.y, all.y_dtype, at);
  store_element<float>(all.y, all.y_dtype, at, value);
}

template <int TYPE> static attn_status launch_matvec(const matvec &all, cudaStream_t stream) {
  const size_t bytes = (size_t)MATVEC_WARPS * STAGES * OUTPUTS * staging<TYPE>::PITCH;
  auto kernel = all.x_dtype == ATTN_BF16 ? multiply_blocks<TYPE, 1> : multiply_blocks<TYPE, 3>;
  if (bytes > (size_t)32 << 10)
    ATTN_CUDA_TRY(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
  kernel<<<(unsigned)((all.outputs + OUTPUTS - 1) / OUTPUTS), MATVEC_THREADS, bytes, stream>>>(all);
  ATTN_CUDA_TRY_LAUNCH("blocks_matvec");
  return ATTN_OK;
}

attn_status attn_cuda_blocks_matvec(attn_block_type type, const void *w, const attn_tensor *y,
                                    bool accumulate, const attn_tensor *x,
                                    attn_cuda_stream stream) {
  static const char function[] = "blocks_matvec";
  ATTN_CUDA_CHECK(attn_cuda_check_operand(function, "x", x, x));
  ATTN_CUDA_CHECK(attn_cuda_check_operand(function, "y", y, y));
  if (x->rank != 2 || y->rank != 2 || x->shape[0] != y->shape[0] || x->shape[0] > MATVEC_ROWS)
    return attn_cuda_fail(ATTN_INVALID_SHAPE,
                          "blocks_matvec: x has %lld rows and y %lld; expected as many, and at "
                          "most %d, of two matrices",
                          x->rank == 2 ? (long long)x->shape[0] : -1ll,
                          y->rank == 2 ? (long long)y->shape[0] : -1ll, MATVEC_ROWS);
  if (is_wide(x) || is_wide(y))
    return attn_cuda_fail(ATTN_UNSUPPORTED, "blocks_matvec: not offered for float64");
  if (x->shape[0] == 0 || y->shape[1] == 0) return ATTN_OK;
  if (!rows_are_vectors(x) || (y->stride[1] != 1 && y->shape[1] > 1))
    return attn_cuda_fail(ATTN_INVALID_ARGUMENT,
                          "blocks_matvec: x or y has gaps in its rows, or rows of x are not "
                          "aligned to 16 bytes");
  int64_t inputs = x->shape[1];
  matvec all = {(const byte *)w,
                NULL,
                (const char *)x->data,
                (char *)y->data,
                y->shape[1],
                inputs,
                0,
                x->stride[0],
                y->stride[0],
                (int)x->shape[0],
                (int)x->dtype,
                (int)y->dtype,
                accumulate};
  switch (type) {
#define CASE(name, elements, bytes)                                                                \
  case ATTN_BLOCK_##name:                                                                          \
    ATTN_CUDA_CHECK(check_blocks(function, w, inputs, elements, bytes));                           \
    all.row_bytes = inputs / (elements) * (bytes);                                                 \
    all.end = all.w + all.outputs * all.row_bytes;                                                 \
    return launch_matvec<ATTN_BLOCK_##name>(all, (cudaStream_t)stream);
    QUANTISED_TYPES(CASE)
#undef CASE
  default:
    return attn_cuda_fail(ATTN_UNSUPPORTED, "blocks_matvec: block type %d is not offered",
                          (int)type);
  }
}
