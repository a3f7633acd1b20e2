/* Quantised weights as GGUF stores them (tensor/blocks.h): Q4_0, Q4_1 and Q8_0, the ones of 32
 * elements a block that files are mostly made of.
 *
 * For products with a few rows the rows are rounded to 8 bits, block by block of 32: with scale =
 * max |x| / 127 and q = round(x / scale), x is scale q but for half a scale. Integer products are
 * then exact, and
 *
 *   sum_i w_i x_i = sum_blocks d scale sum_i w~_i q_i + m sum        (w = d w~ + m, sum = scale sum
 * q)
 *
 * q [rows, inputs]; scale, sum [rows, inputs / 32]; w [outputs, inputs] in blocks; y [rows,
 * outputs] with leading dimension ldy. rows is 1 to 8. */
#ifndef ATTN_KERNELS_BLOCKS_H
#define ATTN_KERNELS_BLOCKS_H

#include <stdint.h>

enum { ATTN_BLOCK_ELEMENTS = 32 };

#define ATTN_BLOCKS_KERNELS(K)                                                                     \
  K(void, round_to_8_bits, (const float *x, int64_t n, int8_t *q, float *scale, float *sum))       \
  K(void, matvec_q4_0,                                                                             \
    (int64_t rows, int64_t outputs, int64_t inputs, const int8_t *q, const float *scale,           \
     const float *sum, const void *w, float *y, int64_t ldy))                                      \
  K(void, matvec_q4_1,                                                                             \
    (int64_t rows, int64_t outputs, int64_t inputs, const int8_t *q, const float *scale,           \
     const float *sum, const void *w, float *y, int64_t ldy))                                      \
  K(void, matvec_q8_0,                                                                             \
    (int64_t rows, int64_t outputs, int64_t inputs, const int8_t *q, const float *scale,           \
     const float *sum, const void *w, float *y, int64_t ldy))                                      \
  /* The same numbers as attn_blocks_to_f32; n is a multiple of 32. */                             \
  K(void, unpack_q4_0, (const void *w, float *x, int64_t n))                                       \
  K(void, unpack_q4_1, (const void *w, float *x, int64_t n))                                       \
  K(void, unpack_q8_0, (const void *w, float *x, int64_t n))

#endif
