#include "tensor/half.h"

float attn_f16_to_f32(uint16_t value) {
  uint32_t sign = (uint32_t)(value & 0x8000u) << 16, exponent = value >> 10 & 31u;
  uint32_t mantissa = value & 1023u, bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000u | mantissa << 13;
  } else if (exponent) {
    bits = sign | (exponent + 112) << 23 | mantissa << 13;
  } else { /* zero or subnormal: mantissa * 2^-24 is exact in float32 */
    float magnitude = (float)mantissa * 0x1p-24f;
    memcpy(&bits, &magnitude, sizeof bits);
    bits |= sign;
  }
  float result;
  memcpy(&result, &bits, sizeof result);
  return result;
}

uint16_t attn_f32_to_f16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);  /* NaN */
  if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* rounds to infinity */
  if (magnitude < 0x38800000u) { /* subnormal: let float addition round at 2^-24 */
    float absolute;
    memcpy(&absolute, &magnitude, sizeof absolute);
    absolute += 0.5f;
    memcpy(&bits, &absolute, sizeof bits);
    return (uint16_t)(sign | (bits - 0x3f000000u));
  }
  magnitude += 0xfffu + (magnitude >> 13 & 1u);
  return (uint16_t)(sign | (magnitude - 0x38000000u) >> 13);
}
