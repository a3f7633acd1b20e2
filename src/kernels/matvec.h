/* Matrix-vector products for decode: y[r][o] = sum_i x[r][i] w[o][i] for a few rows r (1 to 8).
 * w is [outputs, inputs], row-major with leading dimension ldw, as stored in model files. The
 * caller splits `outputs` over threads. Sums are float32 (float64 for f64). */
#ifndef ATTN_KERNELS_MATVEC_H
#define ATTN_KERNELS_MATVEC_H

#include <stdint.h>

enum { ATTN_MATVEC_ROWS = 8 };

#define ATTN_MATVEC_KERNELS(K)                                                                     \
  K(void, matvec_f32,                                                                              \
    (int64_t rows, int64_t outputs, int64_t inputs, const float *x, int64_t ldx, const float *w,   \
     int64_t ldw, float *y, int64_t ldy))                                                          \
  K(void, matvec_bf16,                                                                             \
    (int64_t rows, int64_t outputs, int64_t inputs, const float *x, int64_t ldx,                   \
     const uint16_t *w, int64_t ldw, float *y, int64_t ldy))

#endif
