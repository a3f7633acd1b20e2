#include "kernels/kernels.h"

#include <immintrin.h>

enum { LANES = 8 };

/* See the AVX-512 kernel for the rounding. */
static __m128i narrow(__m256 x) {
  __m256i bits = _mm256_castps_si256(x), upper = _mm256_srli_epi32(bits, 16);
  __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), quiet, nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}

void attn_avx2_bf16_to_f32(float *target, const uint16_t *source, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(source + i)));
    _mm256_storeu_ps(target + i, _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
  }
  attn_generic_bf16_to_f32(target + i, source + i, count - i);
}

void attn_avx2_f32_to_bf16(uint16_t *target, const float *source, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    _mm_storeu_si128((__m128i *)(target + i), narrow(_mm256_loadu_ps(source + i)));
  attn_generic_f32_to_bf16(target + i, source + i, count - i);
}

void attn_avx2_f16_to_f32(float *target, const uint16_t *source, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    _mm256_storeu_ps(target + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(source + i))));
  attn_generic_f16_to_f32(target + i, source + i, count - i);
}

void attn_avx2_f32_to_f16(uint16_t *target, const float *source, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    _mm_storeu_si128((__m128i *)(target + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT));
  attn_generic_f32_to_f16(target + i, source + i, count - i);
}

/* As attn_f8_e4m3_to_f32, by its selections. */
static __m256 widen_e4m3(__m128i bytes) {
  __m256i x = _mm256_cvtepu8_epi32(bytes), magnitude = _mm256_and_si256(x, _mm256_set1_epi32(0x7f));
  __m256i sign = _mm256_slli_epi32(_mm256_xor_si256(x, magnitude), 24);
  __m256i bits = _mm256_add_epi32(_mm256_slli_epi32(magnitude, 20), _mm256_set1_epi32(120 << 23));
  __m256 small = _mm256_mul_ps(_mm256_cvtepi32_ps(magnitude), _mm256_set1_ps(0x1p-9f));
  __m256i is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(8), magnitude);
  __m256i is_nan = _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7f));
  bits = _mm256_blendv_epi8(bits, _mm256_castps_si256(small), is_small);
  bits = _mm256_blendv_epi8(bits, _mm256_set1_epi32(0x7fc00000), is_nan);
  return _mm256_castsi256_ps(_mm256_or_si256(bits, sign));
}

void attn_avx2_f8_e4m3_to_f32(float *target, const uint8_t *source, float scale, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    __m128i bytes = _mm_loadl_epi64((const __m128i *)(source + i));
    _mm256_storeu_ps(target + i, _mm256_mul_ps(widen_e4m3(bytes), _mm256_set1_ps(scale)));
  }
  attn_generic_f8_e4m3_to_f32(target + i, source + i, scale, count - i);
}
