#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define KERNEL(name) attn_avx2_##name
enum { LANES = 8 };

typedef __m256 vector;

static inline vector zero(void) {
  return _mm256_setzero_ps();
}
static inline vector add(vector a, vector b) {
  return _mm256_add_ps(a, b);
}
static inline vector multiply_add(vector a, vector b, vector sum) {
  return _mm256_fmadd_ps(a, b, sum);
}
static inline float sum(vector a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
static inline void store_sums(float *y, const vector sums[4]) {
  vector low = _mm256_hadd_ps(sums[0], sums[1]), high = _mm256_hadd_ps(sums[2], sums[3]);
  vector both = _mm256_hadd_ps(low, high);
  _mm_storeu_ps(y, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
}
static inline vector load_f32(const float *x) {
  return _mm256_loadu_ps(x);
}
static inline vector load_f32_part(const float *x, int64_t count) {
  float part[LANES] = {0};
  memcpy(part, x, (size_t)count * sizeof *x);
  return _mm256_loadu_ps(part);
}
static inline vector load_bf16(const uint16_t *x) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline vector load_bf16_part(const uint16_t *x, int64_t count) {
  uint16_t part[LANES] = {0};
  memcpy(part, x, (size_t)count * sizeof *x);
  return load_bf16(part);
}

#include "kernels/cpu/matvec.inc"
