#include "kernels/kernels.h"

#include <immintrin.h>

enum { LANES = 16 };

static __mmask16 first_lanes(int64_t count) {
  return (__mmask16)((1u << count) - 1);
}

static __m512 widen(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

/* To nearest even: adds just under half of the last kept bit, and the rest of it when that bit is
 * odd. A NaN keeps its upper half and is made quiet, so that it cannot round to infinity. */
static __m256i narrow(__m512 x) {
  __m512i bits = _mm512_castps_si512(x), upper = _mm512_srli_epi32(bits, 16);
  __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_srli_epi32(rounded, 16);
  rounded = _mm512_mask_or_epi32(rounded, nan, upper, _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(rounded);
}

void attn_avx512_bf16_to_f32(float *target, const uint16_t *source, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    _mm512_storeu_ps(target + i, widen(_mm256_loadu_si256((const __m256i *)(source + i))));
  __mmask16 rest = first_lanes(count - i);
  _mm512_mask_storeu_ps(target + i, rest, widen(_mm256_maskz_loadu_epi16(rest, source + i)));
}

void attn_avx512_f32_to_bf16(uint16_t *target, const float *source, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    _mm256_storeu_si256((__m256i *)(target + i), narrow(_mm512_loadu_ps(source + i)));
  __mmask16 rest = first_lanes(count - i);
  _mm256_mask_storeu_epi16(target + i, rest, narrow(_mm512_maskz_loadu_ps(rest, source + i)));
}

void attn_avx512_f16_to_f32(float *target, const uint16_t *source, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    _mm512_storeu_ps(target + i,
                     _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(source + i))));
  __mmask16 rest = first_lanes(count - i);
  _mm512_mask_storeu_ps(target + i, rest,
                        _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(rest, source + i)));
}

void attn_avx512_f32_to_f16(uint16_t *target, const float *source, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    _mm256_storeu_si256((__m256i *)(target + i),
                        _mm512_cvtps_ph(_mm512_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT));
  __mmask16 rest = first_lanes(count - i);
  _mm256_mask_storeu_epi16(
      target + i, rest,
      _mm512_cvtps_ph(_mm512_maskz_loadu_ps(rest, source + i), _MM_FROUND_TO_NEAREST_INT));
}

/* As attn_f8_e4m3_to_f32, by its selections. */
static __m512 widen_e4m3(__m128i bytes) {
  __m512i x = _mm512_cvtepu8_epi32(bytes), magnitude = _mm512_and_si512(x, _mm512_set1_epi32(0x7f));
  __m512i sign = _mm512_slli_epi32(_mm512_xor_si512(x, magnitude), 24);
  __m512i bits = _mm512_add_epi32(_mm512_slli_epi32(magnitude, 20), _mm512_set1_epi32(120 << 23));
  __m512 small = _mm512_mul_ps(_mm512_cvtepi32_ps(magnitude), _mm512_set1_ps(0x1p-9f));
  __mmask16 is_small = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(8));
  __mmask16 is_nan = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7f));
  bits = _mm512_mask_mov_epi32(bits, is_small, _mm512_castps_si512(small));
  bits = _mm512_mask_mov_epi32(bits, is_nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_castsi512_ps(_mm512_or_si512(bits, sign));
}

void attn_avx512_f8_e4m3_to_f32(float *target, const uint8_t *source, float scale, int64_t count) {
  int64_t i = 0;
  __m512 factor = _mm512_set1_ps(scale);
  for (; i + LANES <= count; i += LANES) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)(source + i));
    _mm512_storeu_ps(target + i, _mm512_mul_ps(widen_e4m3(bytes), factor));
  }
  attn_generic_f8_e4m3_to_f32(target + i, source + i, scale, count - i);
}
