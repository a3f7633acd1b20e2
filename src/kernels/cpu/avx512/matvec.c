#include <immintrin.h>
#include <stdint.h>

#define KERNEL(name) attn_avx512_##name
enum { LANES = 16 };

typedef __m512 vector;

static inline vector zero(void) {
  return _mm512_setzero_ps();
}
static inline vector add(vector a, vector b) {
  return _mm512_add_ps(a, b);
}
static inline vector multiply_add(vector a, vector b, vector sum) {
  return _mm512_fmadd_ps(a, b, sum);
}
static inline float sum(vector a) {
  return _mm512_reduce_add_ps(a);
}
static inline void store_sums(float *y, const vector sums[4]) {
  __m256 half[4];
  for (int i = 0; i < 4; ++i)
    half[i] = _mm256_add_ps(_mm512_castps512_ps256(sums[i]), _mm512_extractf32x8_ps(sums[i], 1));
  __m256 low = _mm256_hadd_ps(half[0], half[1]), high = _mm256_hadd_ps(half[2], half[3]);
  __m256 both = _mm256_hadd_ps(low, high);
  _mm_storeu_ps(y, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
}
static inline vector load_f32(const float *x) {
  return _mm512_loadu_ps(x);
}
static inline vector load_f32_part(const float *x, int64_t count) {
  return _mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), x);
}
static inline vector widen(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
static inline vector load_bf16(const uint16_t *x) {
  return widen(_mm256_loadu_si256((const __m256i *)x));
}
static inline vector load_bf16_part(const uint16_t *x, int64_t count) {
  return widen(_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), x));
}

#include "kernels/cpu/matvec.inc"
