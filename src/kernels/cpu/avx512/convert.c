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
