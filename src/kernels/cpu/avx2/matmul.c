/* Packing and tile products with AVX2; two registers hold a row of a panel. Layout: matmul.h. */
#define KERNEL(name) attn_avx2_##name
#define VECTOR_BYTES 32
#define BLOCK_ROWS   6 /* 12 of the 16 registers hold sums */
#define BLOCK_PANELS 1
#include "kernels/cpu/matmul.inc"

#include <immintrin.h>

/* The transpose of an 8 x 8 block of 32-bit words. */
static void transpose(__m256 x[8]) {
  __m256 y[8], z[8];
  for (int i = 0; i < 8; i += 2) {
    y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      z[i + 2 * j] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0x44);
      z[i + 2 * j + 1] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_permute2f128_ps(z[i], z[i + 4], 0x20);
    x[i + 4] = _mm256_permute2f128_ps(z[i], z[i + 4], 0x31);
  }
}

static int64_t at_most(int64_t a, int64_t b) {
  return a < b ? a : b;
}

/* One 8 x 8 block of a transposed source: `bytes` of each of `columns` source rows exist. */
static void pack_block(void *target, const void *source, int64_t stride_bytes, int64_t columns,
                       int64_t bytes) {
  __m256 x[8];
  for (int c = 0; c < 8; ++c) {
    x[c] = _mm256_setzero_ps();
    if (c < columns && bytes >= 32)
      x[c] = _mm256_loadu_ps((const float *)((const char *)source + c * stride_bytes));
    else if (c < columns && bytes > 0)
      memcpy(&x[c], (const char *)source + c * stride_bytes, (size_t)bytes);
  }
  transpose(x);
  for (int r = 0; r < 8; ++r) _mm256_storeu_ps((float *)target + r * ATTN_PANEL, x[r]);
}

/* `depth` rows of 16 words of one panel from the transpose of a source whose rows are `words_bytes`
 * long in memory. */
static void pack_transpose(void *target, const void *source, int64_t depth, int64_t stride_bytes,
                           int64_t columns, int64_t row_bytes) {
  for (int64_t r = 0; r < depth; r += 8)
    for (int64_t c = 0; c < ATTN_PANEL; c += 8) {
      char block[8 * ATTN_PANEL * 4];
      char *out = (char *)target + (r * ATTN_PANEL + c) * 4;
      const char *from = (const char *)source + c * stride_bytes + r * 4;
      if (r + 8 <= depth) {
        pack_block(out, from, stride_bytes, columns - c, row_bytes - r * 4);
        continue;
      }
      pack_block(block, from, stride_bytes, columns - c, row_bytes - r * 4);
      for (int64_t i = 0; i < depth - r; ++i)
        memcpy(out + i * ATTN_PANEL * 4, block + i * ATTN_PANEL * 4, 32);
    }
}

void attn_avx2_pack_f32(float *packed, int64_t panel_stride, const float *source, int64_t k,
                        int64_t n, int64_t stride_k, int64_t stride_n) {
  for (int64_t p = 0; p < attn_panels(n); ++p) {
    float *target = packed + p * panel_stride;
    const float *from = source + p * ATTN_PANEL * stride_n;
    int64_t columns = at_most(n - p * ATTN_PANEL, ATTN_PANEL);
    if (stride_n != 1) {
      pack_transpose(target, from, k, stride_n * 4, columns, k * 4);
      continue;
    }
    for (int64_t r = 0; r < k; ++r) {
      memcpy(target + r * ATTN_PANEL, from + r * stride_k, (size_t)columns * 4);
      memset(target + r * ATTN_PANEL + columns, 0, (size_t)(ATTN_PANEL - columns) * 4);
    }
  }
}

/* Two rows of 16 bfloat16, interleaved into 16 pairs. */
static void interleave(uint16_t *target, const uint16_t *even, const uint16_t *odd) {
  __m256i low = _mm256_loadu_si256((const __m256i *)even);
  __m256i high = _mm256_loadu_si256((const __m256i *)odd);
  __m256i first = _mm256_unpacklo_epi16(low, high), second = _mm256_unpackhi_epi16(low, high);
  _mm256_storeu_si256((__m256i *)target, _mm256_permute2x128_si256(first, second, 0x20));
  _mm256_storeu_si256((__m256i *)target + 1, _mm256_permute2x128_si256(first, second, 0x31));
}

void attn_avx2_pack_bf16(uint16_t *packed, int64_t panel_stride, const uint16_t *source, int64_t k,
                         int64_t n, int64_t stride_k, int64_t stride_n) {
  int64_t depth = attn_packed_depth_bf16(k);
  for (int64_t p = 0; p < attn_panels(n); ++p) {
    uint16_t *target = packed + p * panel_stride;
    const uint16_t *from = source + p * ATTN_PANEL * stride_n;
    int64_t columns = at_most(n - p * ATTN_PANEL, ATTN_PANEL);
    if (stride_n != 1) {
      pack_transpose(target, from, depth / 2, stride_n * 2, columns, k * 2);
      continue;
    }
    for (int64_t r = 0; r < depth; r += 2) {
      uint16_t edge[2][ATTN_PANEL] = {{0}};
      const uint16_t *even = from + r * stride_k, *odd = even + stride_k;
      if (columns < ATTN_PANEL || r + 2 > k) {
        for (int i = 0; i < 2 && r + i < k; ++i)
          memcpy(edge[i], from + (r + i) * stride_k, (size_t)columns * 2);
        even = edge[0];
        odd = edge[1];
      }
      interleave(target + r * ATTN_PANEL, even, odd);
    }
  }
}
