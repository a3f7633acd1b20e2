/* Kernels over rows of float32: activations, norms, sums. Written once in portable C
 * (src/kernels/cpu/rows.inc) and compiled for each path with its instruction set. */
#ifndef ATTN_KERNELS_ROWS_H
#define ATTN_KERNELS_ROWS_H

#include <stdint.h>

#define ATTN_ROWS_KERNELS(K)                                                                       \
  /* y = exp(x), relative error below 2e-7 over [-87, 88]; 0 below, +inf above */                  \
  K(void, exp_f32, (float *y, const float *x, int64_t count))                                      \
  K(double, dot_f32, (const float *a, const float *b, int64_t count))

#endif
