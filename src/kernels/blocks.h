/* Matrix-vector products for decode with quantised weights, read once and in place:
 * y[r][o] = sum_i x[r][i] w[o][i] for 1 to 8 rows r. w is [outputs, inputs] in the blocks of a GGUF
 * file (tensor/blocks.h), rows of whole blocks one after the other, at any alignment.
 *
 * The activations are rounded to 8 bits first, 32 of them to a scale. The products inside such a
 * block are then sums of integers, which are exact; the rest is float32:
 *
 *   x_i ~ d q_i, |q_i| <= 127, so that x_i is off by at most d / 2 = max |x| / 254 of its block
 *   w_i = c p_i + m:  sum_i x_i w_i ~ sum over blocks of  c d sum p_i q_i + m d sum q_i
 *
 * NaN and infinities in x give results that are not finite. */
#ifndef ATTN_KERNELS_BLOCKS_H
#define ATTN_KERNELS_BLOCKS_H

#include <stdint.h>

enum { ATTN_ROUNDED_BLOCK = 32 };

/* Rows of activations in 8 bits; inputs is a multiple of ATTN_ROUNDED_BLOCK. */
typedef struct attn_rounded {
  const int8_t *q;          /* [rows, inputs], leading dimension ld */
  const float *scale, *sum; /* [rows, inputs / 32], leading dimension ld / 32: d and d sum q_i */
  int64_t ld;
} attn_rounded;

/* X(name, TYPE): kernels for blocks of ATTN_BLOCK_<TYPE>, matvec_<name> and <name>_to_f32, and only
 * the latter. */
#define ATTN_BLOCKS_TYPES(X)                                                                       \
  X(q4_0, Q4_0)                                                                                    \
  X(q4_1, Q4_1) X(q5_0, Q5_0) X(q5_1, Q5_1) X(q8_0, Q8_0) X(q4_k, Q4_K) X(q5_k, Q5_K) X(q6_k, Q6_K)

#define ATTN_BLOCKS_TYPES_TO_F32(X) X(q2_k, Q2_K) X(q3_k, Q3_K)

#define ATTN_BLOCKS_KERNELS(K)                                                                     \
  /* One row of an attn_rounded; count is a multiple of ATTN_ROUNDED_BLOCK */                      \
  K(void, round_blocks, (int8_t * q, float *scale, float *sum, const float *x, int64_t count))     \
  K(void, matvec_q4_0, ATTN_BLOCKS_PARAMETERS)                                                     \
  K(void, matvec_q4_1, ATTN_BLOCKS_PARAMETERS)                                                     \
  K(void, matvec_q5_0, ATTN_BLOCKS_PARAMETERS)                                                     \
  K(void, matvec_q5_1, ATTN_BLOCKS_PARAMETERS)                                                     \
  K(void, matvec_q8_0, ATTN_BLOCKS_PARAMETERS)                                                     \
  K(void, matvec_q4_k, ATTN_BLOCKS_PARAMETERS)                                                     \
  K(void, matvec_q5_k, ATTN_BLOCKS_PARAMETERS)                                                     \
  K(void, matvec_q6_k, ATTN_BLOCKS_PARAMETERS)                                                     \
  /* attn_blocks_to_f32, bit for bit; count is a multiple of the block's elements */               \
  K(void, q4_0_to_f32, (float *x, const void *blocks, int64_t count))                              \
  K(void, q4_1_to_f32, (float *x, const void *blocks, int64_t count))                              \
  K(void, q5_0_to_f32, (float *x, const void *blocks, int64_t count))                              \
  K(void, q5_1_to_f32, (float *x, const void *blocks, int64_t count))                              \
  K(void, q8_0_to_f32, (float *x, const void *blocks, int64_t count))                              \
  K(void, q2_k_to_f32, (float *x, const void *blocks, int64_t count))                              \
  K(void, q3_k_to_f32, (float *x, const void *blocks, int64_t count))                              \
  K(void, q4_k_to_f32, (float *x, const void *blocks, int64_t count))                              \
  K(void, q5_k_to_f32, (float *x, const void *blocks, int64_t count))                              \
  K(void, q6_k_to_f32, (float *x, const void *blocks, int64_t count))
#define ATTN_BLOCKS_PARAMETERS                                                                     \
  (int64_t rows, int64_t outputs, int64_t inputs, const attn_rounded *x, const void *w, float *y,  \
   int64_t ldy)

#endif
