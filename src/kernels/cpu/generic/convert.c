#include "kernels/kernels.h"

void attn_generic_bf16_to_f32(float *target, const uint16_t *source, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = attn_bf16_to_f32(source[i]);
}

void attn_generic_f32_to_bf16(uint16_t *target, const float *source, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = attn_f32_to_bf16(source[i]);
}

void attn_generic_f16_to_f32(float *target, const uint16_t *source, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = attn_f16_to_f32(source[i]);
}

void attn_generic_f32_to_f16(uint16_t *target, const float *source, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = attn_f32_to_f16(source[i]);
}

void attn_generic_f8_e4m3_to_f32(float *target, const uint8_t *source, float scale, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = attn_f8_e4m3_to_f32(source[i]) * scale;
}
