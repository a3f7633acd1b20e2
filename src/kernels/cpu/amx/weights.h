#ifndef ATTN_KERNELS_AMX_WEIGHTS_H
#define ATTN_KERNELS_AMX_WEIGHTS_H

#include <immintrin.h>
#include <stdint.h>

/* Weights of attention, 2^x, as 16-bit integers, 32 at a time: half the instructions of an
 * exponential in float32, for results that are rounded to bfloat16 anyway.
 *
 * Weights are found in fixed point: X = 256 (x + 127), x the logit in base 2 less the base, is
 * exponent and mantissa of 2^x but for the curve of the mantissa: 256 (1 + f - 2^f) for the
 * fraction f of x, from a table, has to be taken off. Halved with rounding this is the weight in
 * bfloat16. Its relative error has a standard deviation of 0.20 %, where rounding alone has 0.17 %.
 *
 * What is computed is Y = 32766 - X, because then packing to 16 bits with saturation makes the
 * smallest weights 0, and the greatest and NaN (0x80000000 as an integer) the least Y, which tells
 * that the run must be refused. FIXED_OFFSET has a share that makes the mean error 0. */
enum { FIXED_ONE = 256, FIXED_ZERO = 32766, FIXED_BIAS = 127 * FIXED_ONE };
#define FIXED_OFFSET (FIXED_ZERO - FIXED_BIAS + 0.54f)

/* 255 - the curve, for 6 bits of 1 - f. */
static const uint8_t curve[64] __attribute__((aligned(64))) = {
    254, 253, 251, 250, 248, 247, 246, 245, 244, 243, 242, 241, 240, 239, 239, 238,
    237, 237, 236, 235, 235, 235, 234, 234, 234, 233, 233, 233, 233, 233, 233, 233,
    233, 233, 233, 234, 234, 234, 234, 235, 235, 236, 236, 237, 237, 238, 239, 239,
    240, 241, 241, 242, 243, 244, 245, 246, 247, 248, 249, 250, 251, 252, 253, 255};

/* The base of a row's logits, for fixed_logits. */
static inline __m512 fixed_base(__m512 maximum) {
  return _mm512_fmadd_ps(maximum, _mm512_set1_ps(FIXED_ONE), _mm512_set1_ps(FIXED_OFFSET));
}

/* Y of 32 scores, 16 in each of `low` and `high`, by turns: four of `low`, four of `high`, ...
 * `scale` is the scale to base 2, times FIXED_ONE. */
static inline __m512i fixed_logits(const float *low, const float *high, __m512 scale, __m512 base) {
  return _mm512_packs_epi32(
      _mm512_cvtps_epi32(_mm512_fnmadd_ps(_mm512_load_ps(low), scale, base)),
      _mm512_cvtps_epi32(_mm512_fnmadd_ps(_mm512_load_ps(high), scale, base)));
}

/* The weights in bfloat16, in the order of y. */
static inline __m512i fixed_weights(__m512i y) {
  /* 0x7fff less the curve: its low bytes are the table's. */
  __m512i top = _mm512_mask_permutexvar_epi8(_mm512_set1_epi16(0x7f00), 0x5555555555555555u,
                                             _mm512_srli_epi16(y, 2), _mm512_load_si512(curve));
  return _mm512_srli_epi16(_mm512_sub_epi16(top, y), 1);
}

/* What is by turns, in order; and back. */
static inline __m512i in_order(__m512i x) {
  return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), x);
}
static inline __m512i by_turns(__m512i x) {
  return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), x);
}

#endif
