/* Conversions between storage dtypes and float32, round to nearest even. */
#ifndef ATTN_KERNELS_CONVERT_H
#define ATTN_KERNELS_CONVERT_H

#include <stdint.h>

#include "tensor/float8.h"
#include "tensor/half.h"

#define ATTN_CONVERT_KERNELS(K)                                                                    \
  K(void, bf16_to_f32, (float *target, const uint16_t *source, int64_t count))                     \
  K(void, f32_to_bf16, (uint16_t * target, const float *source, int64_t count))                    \
  K(void, f16_to_f32, (float *target, const uint16_t *source, int64_t count))                      \
  K(void, f32_to_f16, (uint16_t * target, const float *source, int64_t count))                     \
  /* E4M3 times `scale`, rounded once */                                                           \
  K(void, f8_e4m3_to_f32, (float *target, const uint8_t *source, float scale, int64_t count))

#endif
