/* Each layout below is that of one block, in the order of its bytes; i counts its elements. "f16 d"
 * is a float16, "u4 q[32]" are 32 numbers of 4 bits. x_i is the element's value.
 *
 * A float16 scale has 11 bits; the scale of a group and the quantised number have 12 together at
 * most (Q6_K). So their product is exact in float32, the value is rounded once at most, where a
 * minimum is added, and no order of operations or fusing of them changes it. */
#include "tensor/blocks.h"
#include "base/status.h"
#include "tensor/float8.h"
#include "tensor/half.h"

#include <math.h>
#include <string.h>

enum {
  SMALL = 32,  /* elements of a simple block */
  LARGE = 256, /* elements of a block with two levels of scales ("K") */
  GROUP = 32,  /* elements of such a block that share a scale in Q4_K and Q5_K */
  HALF = 128,  /* elements of such a block whose bits are interleaved in Q2_K, Q3_K and Q6_K */
};

typedef unsigned char byte;

static float load_f16(const byte *place) {
  uint16_t bits;
  memcpy(&bits, place, sizeof bits);
  return attn_f16_to_f32(bits);
}

static void store_f16(byte *place, float value) {
  uint16_t bits = attn_f32_to_f16(value);
  memcpy(place, &bits, sizeof bits);
}

/* -- Plain numbers -- */

static void f32_to_f32(const byte *source, float *x, int64_t count) {
  memcpy(x, source, (size_t)count * sizeof *x);
}

static void f64_to_f32(const byte *source, float *x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    double value;
    memcpy(&value, source + i * (int64_t)sizeof value, sizeof value);
    x[i] = (float)value;
  }
}

static void f16_to_f32(const byte *source, float *x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = load_f16(source + 2 * i);
}

static void f32_to_f16(const float *x, byte *target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) store_f16(target + 2 * i, x[i]);
}

static void bf16_to_f32(const byte *source, float *x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint16_t bits;
    memcpy(&bits, source + 2 * i, sizeof bits);
    x[i] = attn_bf16_to_f32(bits);
  }
}

static void f32_to_bf16(const float *x, byte *target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint16_t bits = attn_f32_to_bf16(x[i]);
    memcpy(target + 2 * i, &bits, sizeof bits);
  }
}

static void f8_e4m3_to_f32(const byte *source, float *x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = attn_f8_e4m3_to_f32(source[i]);
}

/* -- Blocks of 32 -- */

/* Element i of 32 numbers of 4 bits: the low halves of 16 bytes, then the high ones. */
static int nibble(const byte *q, int i) {
  return i < SMALL / 2 ? q[i] & 15 : q[i - SMALL / 2] >> 4;
}

/* f16 d; i8 q[32]:  x_i = d q_i */
static void unpack_q8_0(const byte *block, float *x) {
  float d = load_f16(block);
  for (int i = 0; i < SMALL; ++i) x[i] = d * (float)(int8_t)block[2 + i];
}

/* f16 d; u4 q[32]:  x_i = d (q_i - 8) */
static void unpack_q4_0(const byte *block, float *x) {
  float d = load_f16(block);
  for (int i = 0; i < SMALL; ++i) x[i] = d * (float)(nibble(block + 2, i) - 8);
}

/* f16 d; f16 m; u4 q[32]:  x_i = d q_i + m */
static void unpack_q4_1(const byte *block, float *x) {
  float d = load_f16(block), m = load_f16(block + 2);
  for (int i = 0; i < SMALL; ++i) x[i] = d * (float)nibble(block + 4, i) + m;
}

/* u1 h[32]; u4 l[32]:  q_i = 16 h_i + l_i */
static int five_bits(const byte *h, int i) {
  return (h[i / 8] >> i % 8 & 1) << 4 | nibble(h + SMALL / 8, i);
}

/* f16 d; u5 q[32]:  x_i = d (q_i - 16) */
static void unpack_q5_0(const byte *block, float *x) {
  float d = load_f16(block);
  for (int i = 0; i < SMALL; ++i) x[i] = d * (float)(five_bits(block + 2, i) - 16);
}

/* f16 d; f16 m; u5 q[32]:  x_i = d q_i + m */
static void unpack_q5_1(const byte *block, float *x) {
  float d = load_f16(block), m = load_f16(block + 2);
  for (int i = 0; i < SMALL; ++i) x[i] = d * (float)five_bits(block + 4, i) + m;
}

/* -- Blocks of 256 -- */

/* Element i of 256 numbers of 2 bits in 64 bytes: each half takes 32 bytes, of which byte j holds
 * the elements j, j + 32, j + 64 and j + 96, the first in its lowest bits. */
static int two_bits(const byte *q, int i) {
  return q[i / HALF * 32 + i % 32] >> i % HALF / 32 * 2 & 3;
}

/* Element i of 256 bits in 32 bytes: byte j holds the elements j, j + 32, ... */
static int one_bit(const byte *h, int i) {
  return h[i % 32] >> i / 32 & 1;
}

/* Element i of 256 numbers of 4 bits in 128 bytes, of which each run of `run` bytes holds the first
 * `run` elements of twice as many in its low halves, the others in its high ones. */
static int large_nibble(const byte *q, int i, int run) {
  int pair = q[i / (2 * run) * run + i % run];
  return i / run % 2 ? pair >> 4 : pair & 15;
}

/* u4+u4 (s, m)[16], s low; u2 q[256]; f16 d; f16 e:  x_i = d s_g q_i - e m_g, g = i / 16 */
static void unpack_q2_k(const byte *block, float *x) {
  const byte *q = block + 16;
  float d = load_f16(block + 80), e = load_f16(block + 82);
  for (int i = 0; i < LARGE; ++i) {
    int pair = block[i / 16];
    x[i] = d * (float)(pair & 15) * (float)two_bits(q, i) - e * (float)(pair >> 4);
  }
}

/* Scale g of 16 of 6 bits in 12 bytes: 4 bits as nibbles of the first 8 bytes, low halves first;
 * the upper 2 in the last 4 bytes, of which byte j holds those of j, j + 4, j + 8 and j + 12. */
static int q3_scale(const byte *s, int g) {
  int low = g < 8 ? s[g] & 15 : s[g - 8] >> 4;
  return (s[8 + g % 4] >> g / 4 * 2 & 3) << 4 | low;
}

/* u1 h[256]; u2 l[256]; u6 s[16]; f16 d:  x_i = d (s_g - 32) (4 h_i + l_i - 4), g = i / 16 */
static void unpack_q3_k(const byte *block, float *x) {
  const byte *l = block + 32, *s = block + 96;
  float d = load_f16(block + 108);
  for (int i = 0; i < LARGE; ++i) {
    int q = 4 * one_bit(block, i) + two_bits(l, i) - 4;
    x[i] = d * (float)(q3_scale(s, i / 16) - 32) * (float)q;
  }
}

/* Scale and minimum g of 8, of 6 bits each, in 12 bytes: those of g < 4 are the lower 6 bits of
 * bytes g and g + 4; those of g >= 4 have their lower 4 bits in byte g + 4 (the scale in its low
 * half) and their upper 2 in the top bits of bytes g - 4 and g. */
static void scale_and_minimum(const byte *s, int g, float *scale, float *minimum) {
  if (g < 4) {
    *scale = (float)(s[g] & 63);
    *minimum = (float)(s[g + 4] & 63);
  } else {
    *scale = (float)(s[g - 4] >> 6 << 4 | (s[g + 4] & 15));
    *minimum = (float)(s[g] >> 6 << 4 | s[g + 4] >> 4);
  }
}

/* f16 d; f16 e; u6+u6 (s, m)[8]; u4 q[256] in runs of 32:  x_i = d s_g q_i - e m_g, g = i / 32 */
static void unpack_q4_k(const byte *block, float *x) {
  float d = load_f16(block), e = load_f16(block + 2);
  for (int g = 0; g < LARGE / GROUP; ++g) {
    float s, m;
    scale_and_minimum(block + 4, g, &s, &m);
    for (int i = g * GROUP; i < (g + 1) * GROUP; ++i)
      x[i] = d * s * (float)large_nibble(block + 16, i, 32) - e * m;
  }
}

/* As Q4_K with u1 h[256] before the nibbles l:  q_i = 16 h_i + l_i */
static void unpack_q5_k(const byte *block, float *x) {
  float d = load_f16(block), e = load_f16(block + 2);
  for (int g = 0; g < LARGE / GROUP; ++g) {
    float s, m;
    scale_and_minimum(block + 4, g, &s, &m);
    for (int i = g * GROUP; i < (g + 1) * GROUP; ++i) {
      int q = one_bit(block + 16, i) << 4 | large_nibble(block + 48, i, 32);
      x[i] = d * s * (float)q - e * m;
    }
  }
}

/* u4 l[256] in runs of 64; u2 h[256]; i8 s[16]; f16 d:
 * x_i = d s_g (16 h_i + l_i - 32), g = i / 16 */
static void unpack_q6_k(const byte *block, float *x) {
  const byte *h = block + 128, *s = block + 192;
  float d = load_f16(block + 208);
  for (int i = 0; i < LARGE; ++i) {
    int q = (two_bits(h, i) << 4 | large_nibble(block, i, 64)) - 32;
    x[i] = d * (float)(int8_t)s[i / 16] * (float)q;
  }
}

/* -- Into blocks -- */

/* 1 / d, and 0 where that is not finite: such a block is 0 in float16 anyway. */
static float reciprocal(float d) {
  float inverse = 1 / d;
  return isfinite(inverse) ? inverse : 0;
}

/* A cast of what the range does not hold, NaN above all, would be undefined. */
static int clamp(float value, int minimum, int maximum) {
  if (!(value > (float)minimum)) return minimum;
  return value < (float)maximum ? (int)value : maximum;
}

/* d = max |x| / 127, q_i = round(x_i / d) */
static void pack_q8_0(const float *x, byte *block) {
  float largest = 0;
  for (int i = 0; i < SMALL; ++i)
    if (fabsf(x[i]) > largest) largest = fabsf(x[i]);
  float d = largest / 127, inverse = reciprocal(d);
  store_f16(block, d);
  for (int i = 0; i < SMALL; ++i) {
    float q = roundf(x[i] * inverse);
    block[2 + i] = (byte)(isnan(q) ? 0 : clamp(q, -127, 127));
  }
}

/* d = x_k / -8 where |x_k| is the largest, so that it takes the code 0, the one without a partner
 * of the other sign; q_i = floor(x_i / d + 8.5), at most 15. */
static void pack_q4_0(const float *x, byte *block) {
  float largest = 0;
  for (int i = 0; i < SMALL; ++i)
    if (fabsf(x[i]) > fabsf(largest)) largest = x[i];
  float d = largest / -8, inverse = reciprocal(d);
  store_f16(block, d);
  memset(block + 2, 0, SMALL / 2);
  for (int i = 0; i < SMALL; ++i) {
    float q = x[i] * inverse + 8.5f;
    int code = isnan(q) ? 8 : clamp(q, 0, 15);
    block[2 + i % (SMALL / 2)] |= (byte)(i < SMALL / 2 ? code : code << 4);
  }
}

/* -- The tables -- */

static const attn_block_format formats[ATTN_BLOCK_TYPES] = {
    [ATTN_BLOCK_F8_E4M3] = {"F8_E4M3", 1, 1},   [ATTN_BLOCK_F32] = {"F32", 1, 4},
    [ATTN_BLOCK_F16] = {"F16", 1, 2},           [ATTN_BLOCK_Q4_0] = {"Q4_0", 32, 18},
    [ATTN_BLOCK_Q4_1] = {"Q4_1", 32, 20},       [ATTN_BLOCK_Q5_0] = {"Q5_0", 32, 22},
    [ATTN_BLOCK_Q5_1] = {"Q5_1", 32, 24},       [ATTN_BLOCK_Q8_0] = {"Q8_0", 32, 34},
    [ATTN_BLOCK_Q8_1] = {"Q8_1", 32, 36},       [ATTN_BLOCK_Q2_K] = {"Q2_K", 256, 84},
    [ATTN_BLOCK_Q3_K] = {"Q3_K", 256, 110},     [ATTN_BLOCK_Q4_K] = {"Q4_K", 256, 144},
    [ATTN_BLOCK_Q5_K] = {"Q5_K", 256, 176},     [ATTN_BLOCK_Q6_K] = {"Q6_K", 256, 210},
    [ATTN_BLOCK_Q8_K] = {"Q8_K", 256, 292},     [ATTN_BLOCK_IQ2_XXS] = {"IQ2_XXS", 256, 66},
    [ATTN_BLOCK_IQ2_XS] = {"IQ2_XS", 256, 74},  [ATTN_BLOCK_IQ3_XXS] = {"IQ3_XXS", 256, 98},
    [ATTN_BLOCK_IQ1_S] = {"IQ1_S", 256, 50},    [ATTN_BLOCK_IQ4_NL] = {"IQ4_NL", 32, 18},
    [ATTN_BLOCK_IQ3_S] = {"IQ3_S", 256, 110},   [ATTN_BLOCK_IQ2_S] = {"IQ2_S", 256, 82},
    [ATTN_BLOCK_IQ4_XS] = {"IQ4_XS", 256, 136}, [ATTN_BLOCK_I8] = {"I8", 1, 1},
    [ATTN_BLOCK_I16] = {"I16", 1, 2},           [ATTN_BLOCK_I32] = {"I32", 1, 4},
    [ATTN_BLOCK_I64] = {"I64", 1, 8},           [ATTN_BLOCK_F64] = {"F64", 1, 8},
    [ATTN_BLOCK_IQ1_M] = {"IQ1_M", 256, 56},    [ATTN_BLOCK_BF16] = {"BF16", 1, 2},
    [ATTN_BLOCK_TQ1_0] = {"TQ1_0", 256, 54},    [ATTN_BLOCK_TQ2_0] = {"TQ2_0", 256, 66},
    [ATTN_BLOCK_MXFP4] = {"MXFP4", 32, 17},     [ATTN_BLOCK_NVFP4] = {"NVFP4", 64, 36},
    [ATTN_BLOCK_Q1_0] = {"Q1_0", 128, 18},
};

typedef struct conversion {
  void (*plain)(const byte *source, float *x, int64_t count); /* of types without blocks */
  void (*unpack)(const byte *block, float *x);
  void (*from_plain)(const float *x, byte *target, int64_t count);
  void (*pack)(const float *x, byte *block);
} conversion;

static const conversion conversions[ATTN_BLOCK_TYPES] = {
    [ATTN_BLOCK_F32] = {.plain = f32_to_f32},
    [ATTN_BLOCK_F64] = {.plain = f64_to_f32},
    [ATTN_BLOCK_F16] = {.plain = f16_to_f32, .from_plain = f32_to_f16},
    [ATTN_BLOCK_BF16] = {.plain = bf16_to_f32, .from_plain = f32_to_bf16},
    [ATTN_BLOCK_F8_E4M3] = {.plain = f8_e4m3_to_f32},
    [ATTN_BLOCK_Q8_0] = {.unpack = unpack_q8_0, .pack = pack_q8_0},
    [ATTN_BLOCK_Q4_0] = {.unpack = unpack_q4_0, .pack = pack_q4_0},
    [ATTN_BLOCK_Q4_1] = {.unpack = unpack_q4_1},
    [ATTN_BLOCK_Q5_0] = {.unpack = unpack_q5_0},
    [ATTN_BLOCK_Q5_1] = {.unpack = unpack_q5_1},
    [ATTN_BLOCK_Q2_K] = {.unpack = unpack_q2_k},
    [ATTN_BLOCK_Q3_K] = {.unpack = unpack_q3_k},
    [ATTN_BLOCK_Q4_K] = {.unpack = unpack_q4_k},
    [ATTN_BLOCK_Q5_K] = {.unpack = unpack_q5_k},
    [ATTN_BLOCK_Q6_K] = {.unpack = unpack_q6_k},
};

const attn_block_format *attn_block_get_format(attn_block_type type) {
  if ((unsigned)type >= ATTN_BLOCK_TYPES || !formats[type].name) return NULL;
  return &formats[type];
}

static attn_status check(attn_block_type type, int64_t count, const attn_block_format **format) {
  *format = attn_block_get_format(type);
  if (!*format) return attn_fail(ATTN_INVALID_ARGUMENT, "block type %d is unknown", (int)type);
  if (count < 0 || count % (*format)->elements != 0)
    return attn_fail(ATTN_INVALID_SHAPE, "%lld elements are not whole blocks of %s (%d)",
                     (long long)count, (*format)->name, (*format)->elements);
  return ATTN_OK;
}

attn_status attn_blocks_to_f32(attn_block_type type, const void *source, float *target,
                               int64_t count) {
  const attn_block_format *format = NULL;
  ATTN_TRY(check(type, count, &format));
  const conversion *conversion = &conversions[type];
  const byte *block = source;
  if (!conversion->plain && !conversion->unpack)
    return attn_fail(ATTN_UNSUPPORTED, "block type %s cannot be converted to float32",
                     format->name);
  if (conversion->plain) {
    conversion->plain(block, target, count);
    return ATTN_OK;
  }
  for (; count > 0; count -= format->elements) {
    conversion->unpack(block, target);
    block += format->bytes;
    target += format->elements;
  }
  return ATTN_OK;
}

attn_status attn_blocks_from_f32(attn_block_type type, const float *source, void *target,
                                 int64_t count) {
  const attn_block_format *format = NULL;
  ATTN_TRY(check(type, count, &format));
  const conversion *conversion = &conversions[type];
  byte *block = target;
  if (!conversion->from_plain && !conversion->pack)
    return attn_fail(ATTN_UNSUPPORTED, "float32 cannot be converted to block type %s",
                     format->name);
  if (conversion->from_plain) {
    conversion->from_plain(source, block, count);
    return ATTN_OK;
  }
  for (; count > 0; count -= format->elements) {
    conversion->pack(source, block);
    source += format->elements;
    block += format->bytes;
  }
  return ATTN_OK;
}
