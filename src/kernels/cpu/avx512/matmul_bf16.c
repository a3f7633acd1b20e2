/* bfloat16 tile products with VDPBF16PS, which multiplies pairs along k and adds both products to
 * a float32 lane. Layout: matmul.h. The last pair of an odd k meets a zero of B. */
#include "kernels/kernels.h"

#include <immintrin.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum { BLOCK_ROWS = 12, BLOCK_PANELS = 2 };

INLINE __m512bh load_pairs(const uint16_t *source) {
  return (__m512bh)_mm512_loadu_si512(source);
}

INLINE __m512bh broadcast_pair(const uint16_t *source) {
  int32_t pair;
  memcpy(&pair, source, sizeof pair);
  return (__m512bh)_mm512_set1_epi32(pair);
}

INLINE void multiply(int rows, int panels, int64_t k, const uint16_t *a, int64_t lda,
                     const uint16_t *b, int64_t panel_stride, float *c, int64_t ldc,
                     bool accumulate, int64_t columns) {
  __m512 sums[BLOCK_ROWS][BLOCK_PANELS];
  __mmask16 masks[BLOCK_PANELS];
#pragma GCC unroll 2
  for (int p = 0; p < panels; ++p) {
    int64_t left = columns - p * ATTN_PANEL;
    masks[p] = (__mmask16)(left >= ATTN_PANEL ? 0xffff : (1 << left) - 1);
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i)
      sums[i][p] = accumulate ? _mm512_maskz_loadu_ps(masks[p], c + i * ldc + p * ATTN_PANEL)
                              : _mm512_setzero_ps();
  }
  for (int64_t r = 0; r < k; r += 2) {
    __m512bh right[BLOCK_PANELS];
#pragma GCC unroll 2
    for (int p = 0; p < panels; ++p) right[p] = load_pairs(b + p * panel_stride + r * ATTN_PANEL);
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i) {
      __m512bh left = broadcast_pair(a + i * lda + r);
#pragma GCC unroll 2
      for (int p = 0; p < panels; ++p) sums[i][p] = _mm512_dpbf16_ps(sums[i][p], left, right[p]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int p = 0; p < panels; ++p)
      _mm512_mask_storeu_ps(c + i * ldc + p * ATTN_PANEL, masks[p], sums[i][p]);
}

typedef void block(int64_t k, const uint16_t *a, int64_t lda, const uint16_t *b,
                   int64_t panel_stride, float *c, int64_t ldc, bool accumulate, int64_t columns);

/* One function for each number of rows and panels, so that the loops above unroll. */
#define DEFINE_BLOCK(rows, panels)                                                                 \
  static void block_##rows##_##panels(int64_t k, const uint16_t *a, int64_t lda,                   \
                                      const uint16_t *b, int64_t panel_stride, float *c,           \
                                      int64_t ldc, bool accumulate, int64_t columns) {             \
    multiply(rows, panels, k, a, lda, b, panel_stride, c, ldc, accumulate, columns);               \
  }
#define NAME_BLOCK(rows, panels) block_##rows##_##panels,
/* The formatter would move this list at every pass. */
/* clang-format off */
#define EACH_ROWS(X, panels)                                                                       \
  X(1, panels) X(2, panels) X(3, panels) X(4, panels) X(5, panels) X(6, panels)                    \
  X(7, panels) X(8, panels) X(9, panels) X(10, panels) X(11, panels) X(12, panels)
/* clang-format on */
EACH_ROWS(DEFINE_BLOCK, 1)
EACH_ROWS(DEFINE_BLOCK, 2)
static block *const blocks[BLOCK_PANELS][BLOCK_ROWS] = {{EACH_ROWS(NAME_BLOCK, 1)},
                                                        {EACH_ROWS(NAME_BLOCK, 2)}};

void attn_avx512bf16_matmul_bf16(int64_t m, int64_t n, int64_t k, const uint16_t *a, int64_t lda,
                                 const uint16_t *b, int64_t panel_stride, float *c, int64_t ldc,
                                 bool accumulate) {
  int64_t panels = attn_panels(n);
  for (int64_t p = 0; p < panels; p += BLOCK_PANELS) {
    int64_t wide = panels - p < BLOCK_PANELS ? panels - p : BLOCK_PANELS;
    int64_t row_blocks = (m + BLOCK_ROWS - 1) / BLOCK_ROWS;
    for (int64_t i = 0; i < m; --row_blocks) {
      int64_t rows = (m - i + row_blocks - 1) / row_blocks; /* shared out evenly */
      blocks[wide - 1][rows - 1](k, a + i * lda, lda, b + p * panel_stride, panel_stride,
                                 c + i * ldc + p * ATTN_PANEL, ldc, accumulate, n - p * ATTN_PANEL);
      i += rows;
    }
  }
}
