/* Dense products on a GPU: cuBLASLt takes plain matrices as they lie; blocks are multiplied by the
 * module's own kernel, or unpacked a few outputs at a time into the GPU's scratch memory. */
#ifndef ATTN_ENGINES_DENSE_GPU_H
#define ATTN_ENGINES_DENSE_GPU_H

#include "engines/dense/product.h"
#include "tensor/device.h"

/* c (+)= op(a) op(b); all three on one GPU, else ATTN_UNSUPPORTED. */
attn_status attn_gpu_multiply(const attn_tensor *a, bool transpose_a, const attn_tensor *b,
                              bool transpose_b, const attn_tensor *c, bool accumulate);
/* Y (+)= X W^T, and dX (+)= dY W, with W in blocks on the GPU of the tensors. Rows of Y do not
 * depend on how many there are, up to eight. */
attn_status attn_gpu_blocks_forward(const attn_block_matrix *w, const attn_tensor *x,
                                    const attn_tensor *y, bool accumulate);
attn_status attn_gpu_blocks_backward_input(const attn_block_matrix *w, const attn_tensor *dy,
                                           const attn_tensor *dx, bool accumulate);

#endif
