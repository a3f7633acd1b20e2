/* Quantised weights on the GPU (blocks.h): to plain numbers, and times a few rows.
 *
 * tensor/blocks.c says how each type lays out its block; the names here are those used there. */
#include "kernels/cuda/rows.cuh"

#include <atomic>

typedef unsigned char byte;

enum { SMALL = 32, LARGE = 256 }; /* elements of a block */

static __device__ inline float half_at(const byte *place) { /* aligned to 2 */
  return __half2float(*(const __half *)place);
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

/* --- Eight elements -----------------------------------------------------------------------------
 *
 * Products of scales and codes are exact in float32: a value is rounded once at most, where a
 * minimum is added, whether or not the compiler fuses that. */

enum { RUN = 8 /* elements that share every scale */ };

struct run_bytes {
  uint32_t word[2];
  __device__ int at(int i) const {
    return (int)(word[i / 4] >> i % 4 * 8 & 255);
  }
};

template <bool ALIGNED> static __device__ inline run_bytes bytes_at(const byte *place) {
  run_bytes bytes;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint16_t *half = (const uint16_t *)(place + 4 * i);
    bytes.word[i] = ALIGNED ? *(const uint32_t *)half : half[0] | (uint32_t)half[1] << 16;
  }
  return bytes;
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

/* Elements i .. i + 7 of a block of TYPE, i a multiple of 8. */
template <int TYPE> static __device__ inline void unpack_run(const byte *block, int i, float *x) {
  constexpr bool ALIGNED = format<TYPE>::BYTES % 4 == 0;
  auto bytes = [](const byte *place) { return bytes_at<ALIGNED>(place); };
  run_bytes low, high = {};
  float scale, minimum = 0; /* x = scale code + minimum */
  int shift, bias = 0;
  if constexpr (TYPE == ATTN_BLOCK_Q8_0) {
    scale = half_at(block);
    low = bytes(block + 2 + i);
#pragma unroll
    for (int e = 0; e < RUN; ++e) x[e] = scale * (float)(int8_t)low.at(e);
    return;
  } else if constexpr (format<TYPE>::ELEMENTS == SMALL) {
    constexpr bool FIVE = TYPE == ATTN_BLOCK_Q5_0 || TYPE == ATTN_BLOCK_Q5_1;
    low = bytes(block + format<TYPE>::BYTES - 16 + i % 16);
    shift = i / 16 * 4;
    scale = half_at(block);
    if (TYPE == ATTN_BLOCK_Q4_1 || TYPE == ATTN_BLOCK_Q5_1) minimum = half_at(block + 2);
    if (TYPE == ATTN_BLOCK_Q4_0) bias = 8;
    if (TYPE == ATTN_BLOCK_Q5_0) bias = 16;
    int fifth = FIVE ? block[format<TYPE>::BYTES - 20 + i / 8] : 0;
#pragma unroll
    for (int e = 0; e < RUN; ++e) {
      int code = (low.at(e) >> shift & 15) | (FIVE ? (fifth >> e & 1) << 4 : 0);
      x[e] = scale * (float)(code - bias) + minimum;
    }
    return;
  } else if constexpr (TYPE == ATTN_BLOCK_Q4_K || TYPE == ATTN_BLOCK_Q5_K) {
    constexpr bool FIVE = TYPE == ATTN_BLOCK_Q5_K;
    low = bytes(block + (FIVE ? 48 : 16) + i / 64 * 32 + i % 32);
    if (FIVE) high = bytes(block + 16 + i % 32);
    scale = half_at(block) * (float)k_scale(block + 4, i / 32);
    minimum = -half_at(block + 2) * (float)k_minimum(block + 4, i / 32);
    shift = i / 32 % 2 * 4;
#pragma unroll
    for (int e = 0; e < RUN; ++e) {
      int code = (low.at(e) >> shift & 15) | (FIVE ? (high.at(e) >> i / 32 & 1) << 4 : 0);
      x[e] = scale * (float)code + minimum;
    }
  } else if constexpr (TYPE == ATTN_BLOCK_Q6_K) {
    low = bytes(block + i / 128 * 64 + i % 64);
    high = bytes(block + 128 + i / 128 * 32 + i % 32);
    scale = half_at(block + 208) * (float)(int8_t)block[192 + i / 16];
    shift = i / 64 % 2 * 4;
#pragma unroll
    for (int e = 0; e < RUN; ++e) {
      int code = (low.at(e) >> shift & 15) | (high.at(e) >> i % 128 / 32 * 2 & 3) << 4;
      x[e] = scale * (float)(code - 32);
    }
  } else if constexpr (TYPE == ATTN_BLOCK_Q2_K) {
    int pair = block[i / 16];
    low = bytes(block + 16 + i / 128 * 32 + i % 32);
    scale = half_at(block + 80) * (float)(pair & 15);
    minimum = -half_at(block + 82) * (float)(pair >> 4);
    shift = i % 128 / 32 * 2;
#pragma unroll
    for (int e = 0; e < RUN; ++e) x[e] = scale * (float)(low.at(e) >> shift & 3) + minimum;
  } else {
    static_assert(TYPE == ATTN_BLOCK_Q3_K, "a type without a layout");
    low = bytes(block + 32 + i / 128 * 32 + i % 32);
    high = bytes(block + i % 32);
    scale = half_at(block + 108) * (float)(q3_scale(block + 96, i / 16) - 32);
    shift = i % 128 / 32 * 2;
#pragma unroll
    for (int e = 0; e < RUN; ++e) {
      int code = (low.at(e) >> shift & 3) | (high.at(e) >> i / 32 & 1) << 2;
      x[e] = scale * (float)(code - 4);
    }
  }
}

/* An element of a type without blocks. */
template <int TYPE> static __device__ inline float plain_element(const byte *place) {
  if constexpr (TYPE == ATTN_BLOCK_F32) {
    return *(const float *)place;
  } else if constexpr (TYPE == ATTN_BLOCK_F64) { /* aligned to 4 only */
    const uint32_t *word = (const uint32_t *)place;
    return (float)__hiloint2double((int)word[1], (int)word[0]);
  } else if constexpr (TYPE == ATTN_BLOCK_F16) {
    return half_at(place);
  } else {
    return __bfloat162float(*(const __nv_bfloat16 *)place);
  }
}

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

enum { THREADS = 256 };

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
    for (int i = 0; i < RUN; ++i) x[i] = first + i < n ? plain_element<TYPE>(from + i * BYTES) : 0;
  } else {
    unpack_run<TYPE>(from, (int)(first % ELEMENTS), x);
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
 * piece or two ahead of the one that it multiplies: blocks of 18 or 34 bytes could not be read in
 * whole sectors otherwise. The warps of a block share the inputs and add up in order at the end. */

enum {
  MATVEC_WARPS = 8,
  MATVEC_THREADS = MATVEC_WARPS * WARP,
  MATVEC_ROWS = 8,  /* of x at most */
  OUTPUTS = 16,     /* of a block */
  PIECE = 256,      /* elements of a row that are copied at once */
  STEP = 16,        /* elements of one instruction */
  GROUP = 2 * STEP, /* that share a scale, or two */
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

/* Byte i of `bytes` as a float: 0x4b0000xx is 2^23 + xx. */
static __device__ inline float byte_of(uint32_t bytes, int i) {
  return __uint_as_float(__byte_perm(bytes, 0x4b000000u, 0x7440 + i)) - 8388608.0f;
}

/* The scales of a piece of a row of large blocks, read once: bytes of scales and minima. */
template <int TYPE> struct piece_scales {
  float d, e;
  uint32_t scale[4], minimum[2];

  __device__ void load(const byte *block) {
    constexpr bool ALIGNED = format<TYPE>::BYTES % 4 == 0;
    const uint32_t four = 0x0f0f0f0fu, six = 0x3f3f3f3fu, two = 0x30303030u;
    if constexpr (TYPE == ATTN_BLOCK_Q4_K || TYPE == ATTN_BLOCK_Q5_K) {
      float2 both = __half22float2(*(const __half2 *)block);
      d = both.x;
      e = -both.y;
      uint32_t s = word_at<ALIGNED>(block + 4), m = word_at<ALIGNED>(block + 8);
      uint32_t high = word_at<ALIGNED>(block + 12);
      scale[0] = s & six;
      scale[1] = (high & four) | (s >> 2 & two);
      minimum[0] = m & six;
      minimum[1] = (high >> 4 & four) | (m >> 2 & two);
    } else if constexpr (TYPE == ATTN_BLOCK_Q2_K) {
      d = half_at(block + 80);
      e = -half_at(block + 82);
#pragma unroll
      for (int i = 0; i < 4; ++i) scale[i] = word_at<ALIGNED>(block + 4 * i);
    } else if constexpr (TYPE == ATTN_BLOCK_Q3_K) {
      d = half_at(block + 108);
      uint32_t low = word_at<ALIGNED>(block + 96), next = word_at<ALIGNED>(block + 100);
      uint32_t high = word_at<ALIGNED>(block + 104);
      scale[0] = (low & four) | (high << 4 & two);
      scale[1] = (next & four) | (high << 2 & two);
      scale[2] = (low >> 4 & four) | (high & two);
      scale[3] = (next >> 4 & four) | (high >> 2 & two);
    } else if constexpr (TYPE == ATTN_BLOCK_Q6_K) {
      d = half_at(block + 208);
#pragma unroll
      for (int i = 0; i < 4; ++i) scale[i] = word_at<ALIGNED>(block + 192 + 4 * i) ^ 0x80808080u;
    }
  }

  /* c and b of the two steps of group g; `row` is where the piece's row begins. */
  __device__ void get(const byte *row, int g, float (&c)[2], float (&b)[2]) const {
    b[0] = b[1] = 0;
    if constexpr (format<TYPE>::ELEMENTS == SMALL) {
      const byte *block = row + g * format<TYPE>::BYTES;
      if constexpr (TYPE == ATTN_BLOCK_Q4_1 || TYPE == ATTN_BLOCK_Q5_1) {
        float2 both = __half22float2(*(const __half2 *)block);
        c[0] = c[1] = both.x;
        b[0] = b[1] = both.y;
      } else {
        c[0] = c[1] = half_at(block);
      }
    } else if constexpr (TYPE == ATTN_BLOCK_Q4_K || TYPE == ATTN_BLOCK_Q5_K) {
      c[0] = c[1] = d * byte_of(scale[g / 4], g % 4);
      b[0] = b[1] = e * byte_of(minimum[g / 4], g % 4);
    } else {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        int at = 2 * g + s;
        uint32_t bytes = scale[at / 4];
        if constexpr (TYPE == ATTN_BLOCK_Q2_K) {
          c[s] = d * byte_of(bytes & 0x0f0f0f0fu, at % 4);
          b[s] = e * byte_of(bytes >> 4 & 0x0f0f0f0fu, at % 4);
        } else {
          c[s] = d * (byte_of(bytes, at % 4) - (TYPE == ATTN_BLOCK_Q6_K ? 128.0f : 32.0f));
        }
      }
    }
  }
};

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

/* Four activations of a row: as they lie in memory, and as PARTS pairs of pairs of bfloat16 whose
 * sum they are. */
template <int PARTS> struct activations;

template <> struct activations<1> { /* bfloat16 */
  uint2 raw;
  __device__ void load(const char *place, int) {
    raw = *(const uint2 *)place;
  }
  __device__ void split(int, uint32_t (&part)[1][2]) const {
    part[0][0] = raw.x;
    part[0][1] = raw.y;
  }
};

template <> struct activations<3> { /* float32, or float16 */
  uint4 raw;
  __device__ void load(const char *place, int dtype) {
    if (dtype == ATTN_F32) {
      raw = *(const uint4 *)place;
    } else {
      uint2 four = *(const uint2 *)place;
      raw = make_uint4(four.x, four.y, 0, 0);
    }
  }
  __device__ void split(int dtype, uint32_t (&part)[3][2]) const {
    float x[VECTOR];
    unpack(x, raw_vector{raw, raw}, dtype);
#pragma unroll
    for (int p = 0; p < 3; ++p)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
        memcpy(&part[p][i], &pair, sizeof pair);
        x[2 * i] -= __low2float(pair);
        x[2 * i + 1] -= __high2float(pair);
      }
  }
};

template <int TYPE> struct staging {
  enum {
    BYTES = PIECE / format<TYPE>::ELEMENTS * format<TYPE>::BYTES, /* of a row's piece */
    UNITS = (BYTES + 15 + 15) / 16,   /* of 16 bytes that cover it at any address */
    PITCH = (UNITS / 2 * 2 + 1) * 16, /* odd in units: rows start in different banks */
    STAGES = BYTES > 192 ? 2 : 3,     /* pieces in shared memory at once */
  };
  static_assert(PITCH >= UNITS * 16, "a row's units must fit");
};

/* A block takes the tiles of 16 outputs blockIdx.x, blockIdx.x + gridDim.x, ... */
template <int TYPE, int PARTS>
static __global__ void __launch_bounds__(MATVEC_THREADS, 2)
    multiply_blocks(const __grid_constant__ matvec all) {
  typedef staging<TYPE> stage;
  constexpr bool MINIMA = TYPE == ATTN_BLOCK_Q4_1 || TYPE == ATTN_BLOCK_Q5_1 ||
                          TYPE == ATTN_BLOCK_Q2_K || TYPE == ATTN_BLOCK_Q4_K ||
                          TYPE == ATTN_BLOCK_Q5_K;
  constexpr bool HALVES = TYPE == ATTN_BLOCK_Q2_K || TYPE == ATTN_BLOCK_Q3_K ||
                          TYPE == ATTN_BLOCK_Q6_K; /* a scale for each step */
  constexpr bool WHOLE = stage::BYTES % 16 == 0;   /* pieces of aligned rows are whole units */
  constexpr int COPIES = (OUTPUTS * stage::BYTES / 16 + WARP - 1) / WARP; /* of a lane, then */
  extern __shared__ __align__(16) byte memory[];
  __shared__ float part[2][MATVEC_WARPS][WARP][4];
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, row = lane / 4, t = lane % 4;
  byte *mine = memory + warp * (stage::STAGES * OUTPUTS * stage::PITCH);
  uint32_t mine_shared = (uint32_t)__cvta_generic_to_shared(mine);
  int64_t tiles = (all.outputs + OUTPUTS - 1) / OUTPUTS, pieces = (all.inputs + PIECE - 1) / PIECE;
  bool aligned = WHOLE && ((uintptr_t)all.w | (uintptr_t)all.row_bytes) % 16 == 0;

  /* Outputs beyond the last read it once more; their sums are not stored. */
  auto row_start = [&](int64_t tile, int r) {
    int64_t o = tile * OUTPUTS + r < all.outputs ? tile * OUTPUTS + r : all.outputs - 1;
    return all.w + o * all.row_bytes;
  };
  auto copy = [&](int64_t tile, int64_t piece, int to) {
    bool full = all.inputs - piece * PIECE >= PIECE;
    uint32_t target = mine_shared + to * (OUTPUTS * stage::PITCH);
    if (aligned && full && tile * OUTPUTS + OUTPUTS <= all.outputs) {
      constexpr int EACH = stage::BYTES / 16; /* units of a row */
      const byte *from = all.w + tile * OUTPUTS * all.row_bytes + piece * stage::BYTES;
#pragma unroll
      for (int j = 0; j < COPIES; ++j) {
        int i = j * WARP + lane, r = i / EACH, unit = i % EACH;
        if (r < OUTPUTS)
          asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target + r * stage::PITCH +
                                                                         unit * 16),
                       "l"(from + r * all.row_bytes + unit * 16)
                       : "memory");
      }
      return;
    }
    int bytes =
        full ? stage::BYTES
             : (int)((all.inputs - piece * PIECE) / format<TYPE>::ELEMENTS) * format<TYPE>::BYTES;
#pragma unroll 4
    for (int i = lane; i < OUTPUTS * stage::UNITS; i += WARP) {
      int r = i / stage::UNITS, unit = i % stage::UNITS;
      const byte *from = row_start(tile, r) + piece * stage::BYTES;
      int before = (int)((uintptr_t)from & 15);
      if (unit * 16 >= before + bytes) continue;
      const byte *source = from - before + unit * 16;
      int size = all.end - source < 16 ? (int)(all.end - source) : 16; /* the rest becomes 0 */
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target + r * stage::PITCH +
                                                                         unit * 16),
                   "l"(source), "r"(size)
                   : "memory");
    }
  };

  /* Columns beyond the last row of x read row 0; their sums are not stored. */
  const char *x_row =
      all.x + ((row < all.m ? row : 0) * all.x_stride + 4 * t) * dtype_bytes(all.x_dtype);
  const uint32_t ones[2] = {0x3f803f80u, 0x3f803f80u};
  int stage_now = 0, part_now = 0;
  /* What is copied next: the warp's pieces of one tile after the other. */
  int64_t next_tile = warp < pieces ? blockIdx.x : tiles, next_piece = warp;
  auto copy_next = [&](int to) {
    if (next_tile < tiles) {
      copy(next_tile, next_piece, to);
      next_piece += MATVEC_WARPS;
      if (next_piece >= pieces) {
        next_piece = warp;
        next_tile += gridDim.x;
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  for (int i = 0; i < stage::STAGES - 1; ++i) copy_next(i);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x, part_now ^= 1) {
    float total[4] = {};
    for (int64_t piece = warp; piece < pieces; piece += MATVEC_WARPS) {
      copy_next((stage_now + stage::STAGES - 1) % stage::STAGES);
      /* The activations come from the L2 cache, at its latency: all of the piece at once. */
      int64_t left = all.inputs - piece * PIECE;
      const char *x_piece = x_row + piece * PIECE * dtype_bytes(all.x_dtype);
      activations<PARTS> x_all[PIECE / STEP];
#pragma unroll
      for (int s = 0; s < PIECE / STEP; ++s)
        if (s * STEP < left)
          x_all[s].load(x_piece + s * STEP * dtype_bytes(all.x_dtype), all.x_dtype);
      asm volatile("cp.async.wait_group %0;" ::"n"(stage::STAGES - 1) : "memory");
      __syncwarp();
      const byte *place[2]; /* of output rows `row` and `row` + 8 */
      piece_scales<TYPE> scales[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        place[h] = mine + (stage_now * OUTPUTS + row + 8 * h) * stage::PITCH;
        if (!aligned)
          place[h] += (uintptr_t)(row_start(tile, row + 8 * h) + piece * stage::BYTES) & 15;
        scales[h].load(place[h]);
      }
      auto multiply_group = [&](int g) {
        uint32_t x[2][PARTS][2], code[2][2][2];
#pragma unroll
        for (int s = 0; s < 2; ++s) x_all[2 * g + s].split(all.x_dtype, x[s]);
        float c[2][2], b[2][2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          codes_of<TYPE>(place[h], g, t, code[h]);
          scales[h].get(place[h], g, c[h], b[h]);
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
      };
      if (format<TYPE>::ELEMENTS == LARGE || left >= PIECE) {
#pragma unroll
        for (int g = 0; g < PIECE / GROUP; ++g) multiply_group(g);
      } else {
#pragma unroll
        for (int g = 0; g < PIECE / GROUP; ++g)
          if (g * GROUP < left) multiply_group(g);
      }
      __syncwarp();
      stage_now = (stage_now + 1) % stage::STAGES;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) part[part_now][warp][lane][i] = total[i];
    __syncthreads();
    /* Element i of lane (g, t): output g (+ 8 for i >= 2), row 2t + i % 2. */
    int i = warp, to_row = 2 * t + i % 2;
    int64_t output = tile * OUTPUTS + row + i / 2 * 8;
    if (i >= 4 || to_row >= all.m || output >= all.outputs) continue;
    float value = 0;
#pragma unroll
    for (int w = 0; w < MATVEC_WARPS; ++w) value += part[part_now][w][lane][i];
    int64_t at = to_row * all.y_stride + output;
    if (all.accumulate) value += load_element<float>(all.y, all.y_dtype, at);
    store_element<float>(all.y, all.y_dtype, at, value);
  }
}

template <int TYPE, int PARTS>
static attn_status launch_matvec(const matvec &all, cudaStream_t stream) {
  const size_t bytes =
      (size_t)MATVEC_WARPS * staging<TYPE>::STAGES * OUTPUTS * staging<TYPE>::PITCH;
  auto kernel = multiply_blocks<TYPE, PARTS>;
  static std::atomic<int> resident(0); /* blocks that the GPU holds at once */
  int at_once = resident.load(std::memory_order_relaxed);
  if (at_once == 0) {
    int device, processors, blocks;
    ATTN_CUDA_TRY(cudaGetDevice(&device));
    ATTN_CUDA_TRY(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    ATTN_CUDA_TRY(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    ATTN_CUDA_TRY(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, MATVEC_THREADS, bytes));
    at_once = processors * (blocks > 0 ? blocks : 1);
    resident.store(at_once, std::memory_order_relaxed);
  }
  /* As many tiles for each block as for any other. */
  int64_t tiles = (all.outputs + OUTPUTS - 1) / OUTPUTS, each = (tiles + at_once - 1) / at_once;
  kernel<<<(unsigned)((tiles + each - 1) / each), MATVEC_THREADS, bytes, stream>>>(all);
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
    return (x->dtype == ATTN_BF16                                                                  \
                ? launch_matvec<ATTN_BLOCK_##name, 1>                                              \
                : launch_matvec<ATTN_BLOCK_##name, 3>)(all, (cudaStream_t)stream);
    QUANTISED_TYPES(CASE)
#undef CASE
  default:
    return attn_cuda_fail(ATTN_UNSUPPORTED, "blocks_matvec: block type %d is not offered",
                          (int)type);
  }
}
