#include "tensor/float8.h"
#include "tensor/half.h"

enum { FLOAT_BIAS = 127, FLOAT_FRACTION = 23 };

static uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* E5M2 is the upper half of a float16. */
float attn_f8_e5m2_to_f32(uint8_t value) {
  return attn_f16_to_f32((uint16_t)(value << 8));
}

float attn_f8_e8m0_to_f32(uint8_t value) {
  if (value == 0xff) return from_bits(0x7fc00000u);
  return from_bits(value ? (uint32_t)value << FLOAT_FRACTION : 0x00400000u);
}

/* The pattern of a magnitude, with an exponent as large as it takes. */
static uint32_t narrow(uint32_t magnitude, int fraction, int bias) {
  int shift = FLOAT_FRACTION - fraction;
  if (magnitude < (uint32_t)(FLOAT_BIAS + 1 - bias) << FLOAT_FRACTION) {
    /* Subnormal: float addition rounds at the last place, 2^(1 - bias - fraction). */
    uint32_t place = (uint32_t)(FLOAT_BIAS + 1 - bias + shift) << FLOAT_FRACTION;
    return bits_of(from_bits(magnitude) + from_bits(place)) - place;
  }
  magnitude += (1u << (shift - 1)) - 1 + (magnitude >> shift & 1u);
  return (magnitude - ((uint32_t)(FLOAT_BIAS - bias) << FLOAT_FRACTION)) >> shift;
}

uint8_t attn_f32_to_f8_e4m3(float value) {
  uint32_t bits = bits_of(value), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return (uint8_t)(sign | 0x7f);
  uint32_t pattern = narrow(magnitude, 3, 7);
  return (uint8_t)(sign | (pattern < 0x7e ? pattern : 0x7e));
}

uint8_t attn_f32_to_f8_e5m2(float value) {
  uint32_t bits = bits_of(value), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return (uint8_t)(sign | 0x7f);
  uint32_t pattern = narrow(magnitude, 2, 15);
  return (uint8_t)(sign | (pattern < 0x7c ? pattern : 0x7c));
}

uint8_t attn_f32_to_f8_e8m0(float value) {
  uint32_t bits = bits_of(value), exponent = bits >> FLOAT_FRACTION & 0xffu;
  if (exponent == 0xff) return 0xff;
  /* The pattern 0 is 2^-127, a subnormal float32: from 1.5 times that on 2^-126 is nearer. */
  if (exponent == 0) return (bits & 0x7fffffu) >= 0x600000u;
  return (uint8_t)(exponent + (bits >> (FLOAT_FRACTION - 1) & 1u));
}
