/* The float8 formats of checkpoints as numbers, one at a time (OCP 8-bit floating point, and E8M0
 * of its microscaling formats). Rows of E4M3 are converted by a kernel of kernels/convert.h.
 *
 *           sign, exponent, fraction   bias   largest             infinity   NaN
 *   E4M3    1, 4, 3                       7   448                 none       0x7f, 0xff
 *   E5M2    1, 5, 2                      15   57344               0x7c       0x7d to 0x7f
 *   E8M0    0, 8, 0                     127   2^127, no zero      none       0xff
 *
 * Every E4M3, E5M2 and E8M0 number is exact in bfloat16. From float32 to nearest even. What is too
 * large becomes the largest E4M3 number, infinities included, or infinity in E5M2; E8M0 takes the
 * nearest power of two to the magnitude, the larger at a tie, and NaN beyond its range. That is
 * what PyTorch 2.15 does (older versions gave NaN for E4M3), but for the E8M0 of subnormal float32.
 */
#ifndef ATTN_TENSOR_FLOAT8_H
#define ATTN_TENSOR_FLOAT8_H

#include <stdint.h>
#include <string.h>

/* With selections in place of branches, so that loops over it vectorise. */
static inline float attn_f8_e4m3_to_f32(uint8_t value) {
  uint32_t magnitude = value & 0x7fu, bits = (magnitude << 20) + (120u << 23), small_bits;
  float small = (float)(int32_t)magnitude * 0x1p-9f, result;
  memcpy(&small_bits, &small, sizeof small_bits);
  bits = magnitude < 8 ? small_bits : bits;
  bits = magnitude == 0x7f ? 0x7fc00000u : bits;
  bits |= (uint32_t)(value & 0x80u) << 24;
  memcpy(&result, &bits, sizeof result);
  return result;
}

float attn_f8_e5m2_to_f32(uint8_t value);
float attn_f8_e8m0_to_f32(uint8_t value);
uint8_t attn_f32_to_f8_e4m3(float value);
uint8_t attn_f32_to_f8_e5m2(float value);
uint8_t attn_f32_to_f8_e8m0(float value);

#endif
