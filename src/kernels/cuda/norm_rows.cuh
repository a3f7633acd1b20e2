/* RMS norms that need no sums over rows: what norm.cu hands on. */
#ifndef ATTN_KERNELS_CUDA_NORM_ROWS_CUH
#define ATTN_KERNELS_CUDA_NORM_ROWS_CUH

#include "kernels/cuda/rows.cuh"

/* RMS norm (rows.h); false, and nothing is done, for operands that its vectors do not suit. Shapes
 * are checked by the caller. */
bool attn_cuda_rms_rows(const attn_tensor *y, const attn_tensor *x, const attn_tensor *weight,
                        int64_t rows, double divisor, double epsilon, double *factor,
                        cudaStream_t stream);
/* RMS norm's dx (rows.h, norm_backward) with copy, likewise. */
bool attn_cuda_rms_backward_rows(const attn_tensor *dx, bool accumulate, const attn_tensor *copy,
                                 const attn_tensor *x, const attn_tensor *weight,
                                 const attn_tensor *dy, double divisor, const double *factor,
                                 cudaStream_t stream);

#endif
