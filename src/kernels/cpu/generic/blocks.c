#include "kernels/kernels.h"
#include "tensor/half.h"

#include <math.h>

enum { SIZE = ATTN_BLOCK_ELEMENTS };

void attn_generic_round_to_8_bits(const float *x, int64_t n, int8_t *q, float *scale, float *sum) {
  for (int64_t b = 0; b < n / SIZE; ++b, x += SIZE, q += SIZE) {
    float most = 0;
    int total = 0;
    for (int i = 0; i < SIZE; ++i) most = fmaxf(most, fabsf(x[i]));
    float inverse = most > 0 ? 127 / most : 0;
    for (int i = 0; i < SIZE; ++i) {
      q[i] = (int8_t)lrintf(x[i] * inverse);
      total += q[i];
    }
    scale[b] = most / 127;
    sum[b] = scale[b] * (float)total;
  }
}

/* A block as d (w~ - offset) + m. */
typedef struct block {
  float d, m;
  int w[SIZE];
} block;

static float half(const unsigned char *bytes) {
  uint16_t bits = (uint16_t)(bytes[0] | bytes[1] << 8);
  return attn_f16_to_f32(bits);
}

static void nibbles(const unsigned char *bytes, block *to) {
  for (int i = 0; i < SIZE / 2; ++i) {
    to->w[i] = bytes[i] & 15;
    to->w[i + SIZE / 2] = bytes[i] >> 4;
  }
}

static void read_q4_0(const unsigned char *bytes, block *to) {
  to->d = half(bytes);
  to->m = -8 * to->d;
  nibbles(bytes + 2, to);
}

static void read_q4_1(const unsigned char *bytes, block *to) {
  to->d = half(bytes);
  to->m = half(bytes + 2);
  nibbles(bytes + 4, to);
}

static void read_q8_0(const unsigned char *bytes, block *to) {
  to->d = half(bytes);
  to->m = 0;
  for (int i = 0; i < SIZE; ++i) to->w[i] = (signed char)bytes[2 + i];
}

#define DEFINE(type, bytes)                                                                        \
  void attn_generic_matvec_##type(int64_t rows, int64_t outputs, int64_t inputs, const int8_t *q,  \
                                  const float *scale, const float *sum, const void *w, float *y,   \
                                  int64_t ldy) {                                                   \
    int64_t blocks = inputs / SIZE;                                                                \
    const unsigned char *from = w;                                                                 \
    for (int64_t o = 0; o < outputs; ++o, from += blocks * bytes)                                  \
      for (int64_t r = 0; r < rows; ++r) {                                                         \
        float total = 0;                                                                           \
        for (int64_t b = 0; b < blocks; ++b) {                                                     \
          block one;                                                                               \
          int product = 0;                                                                         \
          read_##type(from + b * bytes, &one);                                                     \
          for (int i = 0; i < SIZE; ++i) product += one.w[i] * q[r * inputs + b * SIZE + i];       \
          total += one.d * scale[r * blocks + b] * (float)product + one.m * sum[r * blocks + b];   \
        }                                                                                          \
        y[r * ldy + o] = total;                                                                    \
      }                                                                                            \
  }                                                                                                \
  void attn_generic_unpack_##type(const void *w, float *x, int64_t n) {                            \
    const unsigned char *from = w;                                                                 \
    for (int64_t b = 0; b < n / SIZE; ++b, x += SIZE) {                                            \
      block one;                                                                                   \
      read_##type(from + b * bytes, &one);                                                         \
      for (int i = 0; i < SIZE; ++i) x[i] = one.d * (float)one.w[i] + one.m;                       \
    }                                                                                              \
  }

DEFINE(q4_0, 18)
DEFINE(q4_1, 20)
DEFINE(q8_0, 34)
