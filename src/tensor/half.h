/* bfloat16 and float16 as numbers: one at a time, round to nearest even. Rows of them are converted
 * by the kernels of kernels/convert.h. */
#ifndef ATTN_TENSOR_HALF_H
#define ATTN_TENSOR_HALF_H

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

#endif
