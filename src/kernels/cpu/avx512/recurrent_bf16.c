/* The recurrent engine's kernels that write bfloat16, with the conversion instructions of
 * AVX512-BF16; the portable forms are in recurrent_typed.inc. (The instructions take subnormal
 * inputs as zero, which is what these kernels want.) */
#include "kernels/kernels.h"

#include <immintrin.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum { LANE = 16 };

INLINE __mmask16 first_lanes(int64_t count) {
  return (__mmask16)(count >= LANE ? 0xffff : (1 << count) - 1);
}

INLINE __m512 widen(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

INLINE __m512 load_row(const uint16_t *x, __mmask16 lanes) {
  return widen(_mm256_maskz_loadu_epi16(lanes, x));
}

INLINE void store_row(uint16_t *y, __mmask16 lanes, __m512 x) {
  _mm256_mask_storeu_epi16(y, lanes, (__m256i)_mm512_cvtneps_pbh(x));
}

INLINE void clear_row(uint16_t *y, int64_t from, int64_t to) {
  if (to > from) memset(y + from, 0, (size_t)(to - from) * sizeof *y);
}

/* Factors of a row: a vector of its own or a common one, else one number. */
INLINE __m512 row_factors(const float *factor, int64_t ldf, int64_t i, int64_t c, __mmask16 lanes,
                          float scale) {
  __m512 all = _mm512_set1_ps(scale);
  if (!factor) return all;
  if (!ldf) return _mm512_set1_ps(factor[i] * scale);
  return _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, factor + (ldf > 0 ? i * ldf : 0) + c), all);
}

void attn_avx512bf16_recurrent_scale_bf16(uint16_t *y, int64_t ldy, const uint16_t *x, int64_t ldx,
                                          int64_t rows, int64_t columns, int64_t width,
                                          const float *factor, int64_t ldf, float scale) {
  for (int64_t i = 0; i < rows; ++i, y += ldy, x += ldx) {
    if (!factor && scale == 1) {
      memcpy(y, x, (size_t)columns * sizeof *y);
    } else {
      for (int64_t c = 0; c < columns; c += LANE) {
        __mmask16 lanes = first_lanes(columns - c);
        __m512 f = row_factors(factor, ldf, i, c, lanes, scale);
        store_row(y + c, lanes, _mm512_mul_ps(load_row(x + c, lanes), f));
      }
    }
    clear_row(y, columns, width);
  }
}

void attn_avx512bf16_recurrent_mask_bf16(uint16_t *y, int64_t ldy, const float *x, int64_t ldx,
                                         const float *decay, int64_t ldd, const float *row_factor,
                                         float scale, int64_t rows, int64_t width, int64_t skip) {
  for (int64_t i = 0; i < rows; ++i, y += ldy, x += ldx) {
    __m512 f = _mm512_set1_ps(row_factor ? scale * row_factor[i] : scale);
    const float *d = decay ? decay + i * ldd : NULL;
    int64_t end = i + 1 - skip, c = 0;
    for (; c < end; c += LANE) { /* writes zeros behind the end, up to a whole register */
      __mmask16 lanes = first_lanes(end - c);
      __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + c), f);
      if (d) value = _mm512_mul_ps(value, _mm512_maskz_loadu_ps(lanes, d + c));
      store_row(y + c, first_lanes(width - c), value);
    }
    clear_row(y, c, width);
  }
}

void attn_avx512bf16_recurrent_round_bf16(uint16_t *y, int64_t ldy, const float *x, int64_t ldx,
                                          int64_t rows, int64_t columns, int64_t width,
                                          const float *row_factor, float scale) {
  for (int64_t i = 0; i < rows; ++i, y += ldy, x += ldx) {
    __m512 f = _mm512_set1_ps(row_factor ? scale * row_factor[i] : scale);
    for (int64_t c = 0; c < columns; c += LANE) {
      __mmask16 lanes = first_lanes(columns - c);
      store_row(y + c, lanes, _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + c), f));
    }
    clear_row(y, columns, width);
  }
}

void attn_avx512bf16_recurrent_residual_bf16(uint16_t *y, int64_t ldy, const uint16_t *v,
                                             int64_t ldv, const float *r, int64_t ldr,
                                             const float *beta, int64_t rows, int64_t columns,
                                             int64_t width) {
  for (int64_t i = 0; i < rows; ++i, y += ldy, v += ldv, r += ldr) {
    __m512 b = _mm512_set1_ps(beta[i]);
    for (int64_t c = 0; c < columns; c += LANE) {
      __mmask16 lanes = first_lanes(columns - c);
      __m512 error = _mm512_sub_ps(load_row(v + c, lanes), _mm512_maskz_loadu_ps(lanes, r + c));
      store_row(y + c, lanes, _mm512_mul_ps(b, error));
    }
    clear_row(y, columns, width);
  }
}

/* Rows a and b as pairs: lane c holds a[c] below b[c]. */
INLINE __m512i pair_rows(__m512 a, __m512 b) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(b, a));
}

void attn_avx512bf16_recurrent_pack_bf16(uint16_t *packed, int64_t panel_stride, float *x,
                                         int64_t ldx, int64_t k, int64_t n,
                                         const float *row_factor) {
  int64_t depth = attn_packed_depth_bf16(k);
  for (int64_t r = 0; r < depth; r += 2) {
    float *top = x + r * ldx, *bottom = top + ldx;
    for (int64_t j = 0; j < n; j += ATTN_PANEL) {
      __mmask16 lanes = first_lanes(n - j);
      __mmask16 upper = r < k ? lanes : 0, lower = r + 1 < k ? lanes : 0;
      __m512 a = _mm512_maskz_loadu_ps(upper, top + j);
      __m512 b = _mm512_maskz_loadu_ps(lower, bottom + j);
      _mm512_storeu_si512(packed + j / ATTN_PANEL * panel_stride + r * ATTN_PANEL, pair_rows(a, b));
      if (!row_factor) continue;
      if (upper)
        _mm512_mask_storeu_ps(top + j, upper, _mm512_mul_ps(a, _mm512_set1_ps(row_factor[r])));
      if (lower)
        _mm512_mask_storeu_ps(bottom + j, lower,
                              _mm512_mul_ps(b, _mm512_set1_ps(row_factor[r + 1])));
    }
  }
}

/* 16 x 16 transpose of 32-bit lanes, in place. */
INLINE void transpose_lanes(__m512i v[LANE]) {
  __m512i t[LANE];
  for (int i = 0; i < LANE; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < LANE; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

INLINE __m512i pair_scaled(const uint16_t *x, int64_t ldx, int64_t row, int64_t rows,
                           __mmask16 lanes, const float *factor, int64_t ldf, int64_t c) {
  __mmask16 upper = row < rows ? lanes : 0, lower = row + 1 < rows ? lanes : 0;
  __m256i a = _mm256_maskz_loadu_epi16(upper, x + row * ldx + c);
  __m256i b = _mm256_maskz_loadu_epi16(lower, x + (row + 1) * ldx + c);
  if (!factor || row >= rows)
    return _mm512_or_si512(_mm512_cvtepu16_epi32(a),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
  __m512 fa = row_factors(factor, ldf, row, c, upper, 1), fb = fa;
  if (lower) fb = row_factors(factor, ldf, row + 1, c, lower, 1);
  return pair_rows(_mm512_mul_ps(widen(a), fa), _mm512_mul_ps(widen(b), fb));
}

/* Two rows make one register of pairs, 32 rows a square of 16 x 16 pairs. */
void attn_avx512bf16_recurrent_transpose_bf16(uint16_t *y, int64_t ldy, const uint16_t *x,
                                              int64_t ldx, int64_t rows, int64_t columns,
                                              int64_t width, const float *factor, int64_t ldf) {
  for (int64_t r = 0; r < width; r += 2 * LANE) {
    __mmask32 out = width - r >= 32 ? 0xffffffffu : (1u << (width - r)) - 1;
    for (int64_t c = 0; c < columns; c += LANE) {
      __mmask16 lanes = first_lanes(columns - c);
      __m512i square[LANE];
      for (int i = 0; i < LANE; ++i)
        square[i] = pair_scaled(x, ldx, r + 2 * i, rows, lanes, factor, ldf, c);
      transpose_lanes(square);
      int64_t height = columns - c < LANE ? columns - c : LANE;
      for (int64_t i = 0; i < height; ++i)
        _mm512_mask_storeu_epi16(y + (c + i) * ldy + r, out, square[i]);
    }
  }
}
