/* Integer products of bytes: maddubs takes unsigned weights times signed rows to pairs of 16 bits
 * (at most 2 * 127 * 127, Q8_0 with its signs moved to the row), madd those to 32 bits. */
#include "kernels/kernels.h"

#include <immintrin.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

enum { SIZE = ATTN_BLOCK_ELEMENTS, PREFETCH_BYTES = 1024 };

INLINE float half(const char *bytes) {
  uint16_t bits;
  memcpy(&bits, bytes, sizeof bits);
  return _cvtsh_ss(bits);
}

/* 32 numbers of 4 bits, as bytes. */
INLINE __m256i nibbles(const char *bytes) {
  __m128i packed = _mm_loadu_si128((const __m128i *)bytes);
  __m256i both = _mm256_set_m128i(_mm_srli_epi16(packed, 4), packed);
  return _mm256_and_si256(both, _mm256_set1_epi8(15));
}

INLINE __m256i load(const void *bytes) {
  return _mm256_loadu_si256((const __m256i *)bytes);
}

/* Eight partial sums of 32 products each. */
INLINE __m256 unsigned_products(__m256i w, __m256i q) {
  __m256i pairs = _mm256_maddubs_epi16(w, q);
  return _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

INLINE __m256 signed_products(__m256i w, __m256i q) {
  return unsigned_products(_mm256_abs_epi8(w), _mm256_sign_epi8(q, w));
}

INLINE float sum_lanes(__m256 a) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

/* What a type's block is: where its numbers begin, how they are read and multiplied, and its d and
 * m of w = d w~ + m. */
#define Q4_0_BYTES             18
#define Q4_1_BYTES             20
#define Q8_0_BYTES             34
#define Q4_0_READ(block)       nibbles((block) + 2)
#define Q4_1_READ(block)       nibbles((block) + 4)
#define Q8_0_READ(block)       load((block) + 2)
#define Q4_0_PRODUCTS          unsigned_products
#define Q4_1_PRODUCTS          unsigned_products
#define Q8_0_PRODUCTS          signed_products
#define Q4_0_MINIMUM(block, d) (-8 * (d))
#define Q4_1_MINIMUM(block, d) half((block) + 2)
#define Q8_0_MINIMUM(block, d) 0.0f

/* One output for R rows: a block is read once and multiplied by all of them. */
#define DEFINE_OUTPUT(type, TYPE)                                                                  \
  INLINE void output_##type(const int R, int64_t inputs, const int8_t *q, const float *scale,      \
                            const float *sum, const char *w, float *y, int64_t ldy) {              \
    int64_t blocks = inputs / SIZE;                                                                \
    __m256 sums[8];                                                                                \
    float minima[8];                                                                               \
    UNROLL for (int r = 0; r < R; ++r) {                                                           \
      sums[r] = _mm256_setzero_ps();                                                               \
      minima[r] = 0;                                                                               \
    }                                                                                              \
    for (int64_t b = 0; b < blocks; ++b, w += TYPE##_BYTES) {                                      \
      _mm_prefetch(w + PREFETCH_BYTES, _MM_HINT_T0);                                               \
      float d = half(w), m = TYPE##_MINIMUM(w, d);                                                 \
      __m256i numbers = TYPE##_READ(w);                                                            \
      UNROLL for (int r = 0; r < R; ++r) {                                                         \
        __m256 products = TYPE##_PRODUCTS(numbers, load(q + r * inputs + b * SIZE));               \
        sums[r] = _mm256_fmadd_ps(_mm256_set1_ps(d * scale[r * blocks + b]), products, sums[r]);   \
        minima[r] += m * sum[r * blocks + b];                                                      \
      }                                                                                            \
    }                                                                                              \
    UNROLL for (int r = 0; r < R; ++r) y[r * ldy] = sum_lanes(sums[r]) + minima[r];                \
  }

#define DEFINE_ROWS(type, TYPE, R)                                                                 \
  static void rows##R##_##type(int64_t outputs, int64_t inputs, const int8_t *q,                   \
                               const float *scale, const float *sum, const char *w, float *y,      \
                               int64_t ldy) {                                                      \
    for (int64_t o = 0; o < outputs; ++o)                                                          \
      output_##type(R, inputs, q, scale, sum, w + o * (inputs / SIZE) * TYPE##_BYTES, y + o, ldy); \
  }

#define DEFINE(type, TYPE)                                                                         \
  DEFINE_OUTPUT(type, TYPE)                                                                        \
  DEFINE_ROWS(type, TYPE, 1)                                                                       \
  DEFINE_ROWS(type, TYPE, 2)                                                                       \
  DEFINE_ROWS(type, TYPE, 3)                                                                       \
  DEFINE_ROWS(type, TYPE, 4)                                                                       \
  DEFINE_ROWS(type, TYPE, 5)                                                                       \
  DEFINE_ROWS(type, TYPE, 6)                                                                       \
  DEFINE_ROWS(type, TYPE, 7)                                                                       \
  DEFINE_ROWS(type, TYPE, 8)                                                                       \
  void attn_avx2_matvec_##type(int64_t rows, int64_t outputs, int64_t inputs, const int8_t *q,     \
                               const float *scale, const float *sum, const void *w, float *y,      \
                               int64_t ldy) {                                                      \
    static void (*const bodies[])(int64_t, int64_t, const int8_t *, const float *, const float *,  \
                                  const char *, float *, int64_t) = {                              \
        rows1_##type, rows2_##type, rows3_##type, rows4_##type,                                    \
        rows5_##type, rows6_##type, rows7_##type, rows8_##type};                                   \
    if (rows >= 1 && rows <= ATTN_MATVEC_ROWS)                                                     \
      bodies[rows - 1](outputs, inputs, q, scale, sum, w, y, ldy);                                 \
  }                                                                                                \
  void attn_avx2_unpack_##type(const void *w, float *x, int64_t n) {                               \
    const char *block = w;                                                                         \
    for (int64_t b = 0; b < n / SIZE; ++b, x += SIZE, block += TYPE##_BYTES) {                     \
      float d = half(block);                                                                       \
      __m256 scale = _mm256_set1_ps(d), minimum = _mm256_set1_ps(TYPE##_MINIMUM(block, d));        \
      char bytes[SIZE] __attribute__((aligned(32)));                                               \
      _mm256_store_si256((__m256i *)bytes, TYPE##_READ(block));                                    \
      UNROLL for (int i = 0; i < SIZE; i += 8) {                                                   \
        __m128i eight = _mm_loadl_epi64((const __m128i *)(bytes + i));                             \
        __m256 numbers = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));                          \
        _mm256_storeu_ps(x + i, _mm256_fmadd_ps(scale, numbers, minimum));                         \
      }                                                                                            \
    }                                                                                              \
  }

DEFINE(q4_0, Q4_0)
DEFINE(q4_1, Q4_1)
DEFINE(q8_0, Q8_0)

void attn_avx2_round_to_8_bits(const float *x, int64_t n, int8_t *q, float *scale, float *sum) {
  const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t b = 0; b < n / SIZE; ++b, x += SIZE, q += SIZE) {
    __m256 v[4], most = _mm256_setzero_ps();
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm256_loadu_ps(x + 8 * i);
      most = _mm256_max_ps(most, _mm256_and_ps(v[i], no_sign));
    }
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    float largest = _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
    __m256 inverse = _mm256_set1_ps(largest > 0 ? 127 / largest : 0);
    __m256i whole[4];
    for (int i = 0; i < 4; ++i) whole[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
    __m256i words = _mm256_packs_epi32(whole[0], whole[1]);
    __m256i bytes = _mm256_packs_epi16(words, _mm256_packs_epi32(whole[2], whole[3]));
    bytes = _mm256_permutevar8x32_epi32(bytes, order);
    _mm256_storeu_si256((__m256i *)q, bytes);
    __m256 total = unsigned_products(_mm256_set1_epi8(1), bytes);
    scale[b] = largest / 127;
    sum[b] = scale[b] * sum_lanes(total);
  }
}
