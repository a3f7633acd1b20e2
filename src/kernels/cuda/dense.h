/* Dense products, by cuBLASLt. */
#ifndef ATTN_KERNELS_CUDA_DENSE_H
#define ATTN_KERNELS_CUDA_DENSE_H

#include "attn/tensor.h"

/* What a device's products need to be at hand: cuBLASLt's handle, the algorithms chosen so far, a
 * workspace. One for each stream that multiplies. */
typedef struct attn_cuda_dense attn_cuda_dense;

/* The formatter would break this list. */
/* clang-format off */
#define ATTN_CUDA_DENSE(K)                                                                         \
  K(attn_status, dense_create, (const attn_cuda_device *device, attn_cuda_dense **dense))          \
  K(void, dense_destroy, (attn_cuda_dense *dense))                                                 \
  /* c [m, n] (+)= op(a) op(b), row-major with free row strides: a [m, k], or [k, m] when           \
   * transpose_a; b [k, n], or [n, k] when transpose_b. Rank 3 is a batch of products: the leading \
   * axis, whose stride is free, too. a and b may instead be contiguous along their columns. They  \
   * have one dtype: float64, float32, bfloat16 or float16; c the same, or float32 where that is   \
   * no narrower. Sums are float32 or wider, never TF32. Up to 8 rows of a, with transpose_b and   \
   * rows that are multiples of 16 bytes, give each row the bits that it has alone. The first      \
   * product of a shape asks cuBLASLt for an algorithm (host time only, allowed in a capture) */   \
  K(attn_status, matmul, (attn_cuda_dense *dense, const attn_tensor *a, bool transpose_a,          \
                          const attn_tensor *b, bool transpose_b, const attn_tensor *c,            \
                          bool accumulate, attn_cuda_stream stream))
/* clang-format on */

#endif
