/* Products of a few rows with the transpose of a weight, which dense.cu does not leave to cuBLASLt.
 */
#ifndef ATTN_KERNELS_CUDA_DENSE_CUH
#define ATTN_KERNELS_CUDA_DENSE_CUH

#include "kernels/cuda/rows.cuh"

enum { FEW_ROWS = 8 };

/* c [m, n] (+)= a [m, k] w, a batch of them, with w [n, k]^T (transposed) or w [k, n]; m is at most
 * FEW_ROWS. Any dtypes that attn_cuda_matmul takes. In elements; ld: from row to row, stride: from
 * one product to the next. */
struct few_rows_problem {
  int64_t m, n, k, batch;
  int64_t ld_a, ld_w, ld_c, stride_a, stride_w, stride_c;
  bool transposed;
};
/* Each row of c is the same whatever the number of rows, and wherever it lies. */
attn_status attn_cuda_few_rows(const few_rows_problem *problem, const attn_tensor *a,
                               const attn_tensor *w, const attn_tensor *c, bool accumulate,
                               cudaStream_t stream);

#endif
