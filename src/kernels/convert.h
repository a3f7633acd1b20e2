/* Conversions between storage dtypes and float32, round to nearest even. */
#ifndef ATTN_KERNELS_CONVERT_H
#define ATTN_KERNELS_CONVERT_H

#include <stdint.h>
#include <string.h>

/* bfloat16 is the upper half of a float32; NaN stays NaN. */
static inline float attn_bf16_to_f32(uint16_t value) {
  uint32_t bits = (uint32_t)value << 16;
  float result;
  memcpy(&result, &bits, sizeof result);
  return result;
}

static inline uint16_t attn_f32_to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40u);
  return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

float attn_f16_to_f32(uint16_t value);
uint16_t attn_f32_to_f16(float value);

#define ATTN_CONVERT_KERNELS(K)                                                                    \
  K(void, bf16_to_f32, (float *target, const uint16_t *source, int64_t count))                     \
  K(void, f32_to_bf16, (uint16_t * target, const float *source, int64_t count))                    \
  K(void, f16_to_f32, (float *target, const uint16_t *source, int64_t count))                      \
  K(void, f32_to_f16, (uint16_t * target, const float *source, int64_t count))

#endif
