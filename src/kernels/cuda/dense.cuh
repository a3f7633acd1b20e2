/* Products of a few rows with the transpose of a weight, which dense.cu does not leave to cuBLASLt.
 */
#ifndef ATTN_KERNELS_CUDA_DENSE_CUH
#define ATTN_KERNELS_CUDA_DENSE_CUH

#include "kernels/cuda/rows.cuh"

enum { FEW_ROWS = 8 };

/* Whether c [m, n] (+)= a [m, k] w [n, k]^T goes to attn_cuda_few_rows: at most FEW_ROWS rows of
 * float32, bfloat16 or float16 that 16-byte loads suit. ld: elements from row to row. */
bool attn_cuda_few_rows_suit(int64_t m, int64_t k, int64_t ld_a, int64_t ld_w, const attn_tensor *a,
                             const attn_tensor *w);
/* Each row of c is the same whatever the number of rows. */
attn_status attn_cuda_few_rows(int64_t m, int64_t n, int64_t k, const attn_tensor *a, int64_t ld_a,
                               const attn_tensor *w, int64_t ld_w, const attn_tensor *c,
                               int64_t ld_c, bool accumulate, cudaStream_t stream);

#endif
