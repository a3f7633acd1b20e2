/* Reference tile products; see kernels/matmul.h for the packed layout. */
#include "kernels/kernels.h"

static int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}

#define DEFINE_PACK(suffix, type)                                                                  \
  void attn_generic_pack_##suffix(type *packed, int64_t panel_stride, const type *source,          \
                                  int64_t k, int64_t n, int64_t stride_k, int64_t stride_n) {      \
    for (int64_t panel = 0; panel < attn_panels(n); ++panel) {                                     \
      type *target = packed + panel * panel_stride;                                                \
      int64_t columns = min(n - panel * ATTN_PANEL, ATTN_PANEL);                                   \
      const type *from = source + panel * ATTN_PANEL * stride_n;                                   \
      for (int64_t r = 0; r < k; ++r)                                                              \
        for (int64_t c = 0; c < ATTN_PANEL; ++c)                                                   \
          target[r * ATTN_PANEL + c] = c < columns ? from[r * stride_k + c * stride_n] : 0;        \
    }                                                                                              \
  }

DEFINE_PACK(f64, double)
DEFINE_PACK(f32, float)

void attn_generic_pack_bf16(uint16_t *packed, int64_t panel_stride, const uint16_t *source,
                            int64_t k, int64_t n, int64_t stride_k, int64_t stride_n) {
  for (int64_t panel = 0; panel < attn_panels(n); ++panel) {
    uint16_t *target = packed + panel * panel_stride;
    int64_t columns = min(n - panel * ATTN_PANEL, ATTN_PANEL);
    const uint16_t *from = source + panel * ATTN_PANEL * stride_n;
    for (int64_t r = 0; r < attn_packed_depth_bf16(k); ++r)
      for (int64_t c = 0; c < ATTN_PANEL; ++c)
        target[(r / 2 * ATTN_PANEL + c) * 2 + r % 2] =
            r < k && c < columns ? from[r * stride_k + c * stride_n] : 0;
  }
}

#define DEFINE_MATMUL(suffix, type)                                                                \
  void attn_generic_matmul_##suffix(int64_t m, int64_t n, int64_t k, const type *a, int64_t lda,   \
                                    const type *b, int64_t panel_stride, type *c, int64_t ldc,     \
                                    bool accumulate) {                                             \
    for (int64_t i = 0; i < m; ++i)                                                                \
      for (int64_t panel = 0; panel < attn_panels(n); ++panel) {                                   \
        int64_t columns = min(n - panel * ATTN_PANEL, ATTN_PANEL);                                 \
        const type *rows = b + panel * panel_stride;                                               \
        type *out = c + i * ldc + panel * ATTN_PANEL;                                              \
        type sum[ATTN_PANEL] = {0};                                                                \
        for (int64_t r = 0; r < k; ++r)                                                            \
          for (int64_t j = 0; j < ATTN_PANEL; ++j)                                                 \
            sum[j] += a[i * lda + r] * rows[r * ATTN_PANEL + j];                                   \
        for (int64_t j = 0; j < columns; ++j) out[j] = sum[j] + (accumulate ? out[j] : 0);         \
      }                                                                                            \
  }

DEFINE_MATMUL(f64, double)
DEFINE_MATMUL(f32, float)

void attn_generic_matmul_bf16(int64_t m, int64_t n, int64_t k, const uint16_t *a, int64_t lda,
                              const uint16_t *b, int64_t panel_stride, float *c, int64_t ldc,
                              bool accumulate) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t panel = 0; panel < attn_panels(n); ++panel) {
      int64_t columns = min(n - panel * ATTN_PANEL, ATTN_PANEL);
      const uint16_t *rows = b + panel * panel_stride;
      float *out = c + i * ldc + panel * ATTN_PANEL;
      float sum[ATTN_PANEL] = {0};
      for (int64_t r = 0; r < k; ++r) {
        float value = attn_bf16_to_f32(a[i * lda + r]);
        const uint16_t *pairs = rows + r / 2 * (2 * ATTN_PANEL) + r % 2;
        for (int64_t j = 0; j < ATTN_PANEL; ++j) sum[j] += value * attn_bf16_to_f32(pairs[2 * j]);
      }
      for (int64_t j = 0; j < columns; ++j) out[j] = sum[j] + (accumulate ? out[j] : 0);
    }
}
