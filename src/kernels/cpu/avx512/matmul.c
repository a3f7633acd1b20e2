/* Packing and tile products with AVX-512; one register holds a row of a panel. Layout: matmul.h. */
#define KERNEL(name) attn_avx512_##name
#define VECTOR_BYTES 64
#define BLOCK_ROWS   12 /* 24 of the 32 registers hold sums */
#define BLOCK_PANELS 2
#include "kernels/cpu/matmul.inc"

#include <immintrin.h>

/* The transpose of a 16 x 16 block of 32-bit words, in four rounds of exchanges at distance
 * 1, 2 (within 128-bit lanes), 4 and 8 (between lanes). */
INLINE void transpose(__m512i x[16]) {
  __m512i y[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
    x[i + 4] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0x88);
    x[i + 12] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0xdd);
  }
}

static int64_t at_most(int64_t a, int64_t b) {
  return a < b ? a : b;
}

static uint32_t low_bits(int64_t count) {
  return count >= 32 ? 0xffffffffu : count <= 0 ? 0 : (1u << count) - 1;
}

/* `depth` rows of 16 words of one panel from the transpose of a source with rows of `halves` 16-bit
 * units, `stride` units apart. Units beyond the source are zero. */
static void pack_transpose(void *target, const void *source, int64_t depth, int64_t stride,
                           int64_t columns, int64_t halves) {
  for (int64_t r = 0; r < depth; r += 16) {
    __m512i x[16];
    __mmask32 mask = low_bits(halves - 2 * r);
#pragma GCC unroll 16
    for (int c = 0; c < 16; ++c)
      x[c] = c < columns
                 ? _mm512_maskz_loadu_epi16(mask, (const uint16_t *)source + c * stride + 2 * r)
                 : _mm512_setzero_si512();
    transpose(x);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      if (r + i < depth) _mm512_storeu_si512((uint32_t *)target + (r + i) * ATTN_PANEL, x[i]);
  }
}

void attn_avx512_pack_f32(float *packed, int64_t panel_stride, const float *source, int64_t k,
                          int64_t n, int64_t stride_k, int64_t stride_n) {
  for (int64_t p = 0; p < attn_panels(n); ++p) {
    float *target = packed + p * panel_stride;
    const float *from = source + p * ATTN_PANEL * stride_n;
    int64_t columns = at_most(n - p * ATTN_PANEL, ATTN_PANEL);
    if (stride_n != 1) {
      pack_transpose(target, from, k, 2 * stride_n, columns, 2 * k);
      continue;
    }
    __mmask16 mask = (__mmask16)low_bits(columns);
    for (int64_t r = 0; r < k; ++r)
      _mm512_storeu_ps(target + r * ATTN_PANEL, _mm512_maskz_loadu_ps(mask, from + r * stride_k));
  }
}

/* Rows are read from end to end, which prefetchers follow; their panels are written side by side.
 */
static void pack_pairs(uint16_t *packed, int64_t panel_stride, const uint16_t *source, int64_t k,
                       int64_t n, int64_t stride_k) {
  int64_t depth = attn_packed_depth_bf16(k);
  for (int64_t r = 0; r < depth; r += 2, source += 2 * stride_k)
    for (int64_t c = 0; c < n; c += ATTN_PANEL) {
      __mmask16 mask = (__mmask16)low_bits(at_most(n - c, ATTN_PANEL));
      __mmask16 even_mask = r < k ? mask : 0, odd_mask = r + 1 < k ? mask : 0;
      __m256i even = _mm256_maskz_loadu_epi16(even_mask, source + c);
      __m256i odd = _mm256_maskz_loadu_epi16(odd_mask, source + stride_k + c);
      __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                                      _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
      _mm512_storeu_si512(packed + c / ATTN_PANEL * panel_stride + r * ATTN_PANEL, pairs);
    }
}

void attn_avx512_pack_bf16(uint16_t *packed, int64_t panel_stride, const uint16_t *source,
                           int64_t k, int64_t n, int64_t stride_k, int64_t stride_n) {
  if (stride_n == 1) {
    pack_pairs(packed, panel_stride, source, k, n, stride_k);
    return;
  }
  for (int64_t p = 0; p < attn_panels(n); ++p)
    pack_transpose(packed + p * panel_stride, source + p * ATTN_PANEL * stride_n,
                   attn_packed_depth_bf16(k) / 2, stride_n, at_most(n - p * ATTN_PANEL, ATTN_PANEL),
                   k);
}
