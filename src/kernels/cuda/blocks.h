/* Weights in the blocks of a GGUF file (tensor/blocks.h), read where they are.
 *
 * Blocks are bytes in device memory, rows of whole blocks one after the other, aligned to 4 bytes
 * where the block's size is a multiple of 4, else to 2. Types: those that attn_blocks_to_f32
 * converts. */
#ifndef ATTN_KERNELS_CUDA_BLOCKS_H
#define ATTN_KERNELS_CUDA_BLOCKS_H

#include "attn/tensor.h"
#include "tensor/blocks.h"

/* The formatter would break this list. */
/* clang-format off */
#define ATTN_CUDA_BLOCKS(K)                                                                        \
  /* Row r of y [rows, n], of any floating dtype, becomes row index[r] of the blocks, or row r     \
   * when index is NULL: the values of attn_blocks_to_f32, rounded to y's dtype */                  \
  K(attn_status, blocks_expand,                                                                    \
    (attn_block_type type, const void *blocks, const int32_t *index, const attn_tensor *y,         \
     attn_cuda_stream stream))                                                                     \
  /* y [rows, outputs] (+)= x w^T for 1 to 8 rows of x [rows, inputs] and w [outputs, inputs] in   \
   * blocks of Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 or Q2_K to Q6_K. x and y are float32, bfloat16 or      \
   * float16, rows of x aligned to 16 bytes. The weights are exact, sums are float32, and each row \
   * gets the bits that it has alone */                                                            \
  K(attn_status, blocks_matvec,                                                                    \
    (attn_block_type type, const void *w, const attn_tensor *y, bool accumulate,                   \
     const attn_tensor *x, attn_cuda_stream stream))
/* clang-format on */

#endif
