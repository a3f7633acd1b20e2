/* Sums over rows that other kernels build on. */
#ifndef ATTN_KERNELS_CUDA_REDUCE_CUH
#define ATTN_KERNELS_CUDA_REDUCE_CUH

#include "kernels/cuda/rows.cuh"

/* y[c] (+)= sum over rows r of factor[r] (a[r, c] - mean[r]) b[r, c]; b, factor and mean may be
 * NULL (1, 1 and 0; a mean needs a factor). partial: ATTN_CUDA_PARTS n float64. Shapes are checked
 * by the caller. */
attn_status attn_cuda_column_sums(const attn_tensor *y, bool accumulate, const attn_tensor *a,
                                  const attn_tensor *b, const double *factor, const double *mean,
                                  double *partial, cudaStream_t stream);

#endif
