/* Tile products C[m, n] (+)= A[m, k] B[k, n] with B packed into panels: the work of every engine.
 *
 * Packed B, the same on every path: panels of ATTN_PANEL = 16 columns,
 *   float64, float32:  panel[k][16]
 *   bfloat16:          panel[k / 2][16][2]   pairs along k, as VDPBF16PS and TDPBF16PS read them;
 *                      16 pair rows are one AMX tile
 * Columns beyond n are zero. For bfloat16, k is padded with zeros to a multiple of
 * ATTN_BF16_DEPTH = 32. `panel_stride` is the distance between panels in elements, so that a
 * range of rows of a longer packed matrix is addressed by b + row * 16 (row even for bfloat16;
 * a multiple of 32 on AMX).
 *
 * A is row-major with leading dimension lda. On bfloat16, columns k .. round up to 32 of A must be
 * readable; they meet zeros of B, so they must hold finite values. C is row-major; only m x n of it
 * is touched. matmul_bf16 is called between the table's begin and end.
 *
 * VDPBF16PS does two multiply-adds a lane but, on Sapphire Rapids and its successors, starts every
 * other cycle where float32 FMA starts twice a cycle: without AMX, engines that pack a matrix once
 * and use it often are faster with it converted to float32. */
#ifndef ATTN_KERNELS_MATMUL_H
#define ATTN_KERNELS_MATMUL_H

#include <stdbool.h>
#include <stdint.h>

enum { ATTN_PANEL = 16, ATTN_BF16_DEPTH = 32 };

/* Elements of a packed k x n matrix. */
static inline int64_t attn_packed_depth_bf16(int64_t k) {
  return (k + ATTN_BF16_DEPTH - 1) / ATTN_BF16_DEPTH * ATTN_BF16_DEPTH;
}
static inline int64_t attn_panels(int64_t n) {
  return (n + ATTN_PANEL - 1) / ATTN_PANEL;
}

/* Packing reads element (r, c) at source[r * stride_k + c * stride_n]; one of the strides is 1.
 * stride_n == 1 packs a row-major matrix, stride_k == 1 packs the transpose of one. */
#define ATTN_MATMUL_KERNELS(K)                                                                     \
  K(void, pack_f64,                                                                                \
    (double *packed, int64_t panel_stride, const double *source, int64_t k, int64_t n,             \
     int64_t stride_k, int64_t stride_n))                                                          \
  K(void, pack_f32,                                                                                \
    (float *packed, int64_t panel_stride, const float *source, int64_t k, int64_t n,               \
     int64_t stride_k, int64_t stride_n))                                                          \
  K(void, pack_bf16,                                                                               \
    (uint16_t * packed, int64_t panel_stride, const uint16_t *source, int64_t k, int64_t n,        \
     int64_t stride_k, int64_t stride_n))                                                          \
  K(void, matmul_f64,                                                                              \
    (int64_t m, int64_t n, int64_t k, const double *a, int64_t lda, const double *b,               \
     int64_t panel_stride, double *c, int64_t ldc, bool accumulate))                               \
  K(void, matmul_f32,                                                                              \
    (int64_t m, int64_t n, int64_t k, const float *a, int64_t lda, const float *b,                 \
     int64_t panel_stride, float *c, int64_t ldc, bool accumulate))                                \
  K(void, matmul_bf16,                                                                             \
    (int64_t m, int64_t n, int64_t k, const uint16_t *a, int64_t lda, const uint16_t *b,           \
     int64_t panel_stride, float *c, int64_t ldc, bool accumulate))

#endif
