/* Kernels of the softmax engine: what happens to a tile of scores between its two products.
 *
 * Suffixes: f64 and f32 in one type; bf16 has float32 scores and bfloat16 operands. Scores are kept
 * in base 2: x = scale * s with scale = softmax scale * log2(e), so that a weight is exp2(x - max).
 * Row r of a tile sees the columns begin[r] .. end[r] - 1; the others get weight 0. */
#ifndef ATTN_KERNELS_SOFTMAX_H
#define ATTN_KERNELS_SOFTMAX_H

#include <stdbool.h>
#include <stdint.h>

/* Extents of softmax_run: its rows, and the keys of a run at most. */
enum { ATTN_RUN_ROWS = 32, ATTN_RUN_KEYS = 256 };
/* softmax_run refuses weights greater than 2 to this power. */
enum { ATTN_RUN_LIMIT = 16 };

#define ATTN_SOFTMAX_SCORE_KERNELS(K, suffix, real)                                                \
  /* s[j] = cap * tanh(scale * s[j] / cap); slope[j], where given, = 1 - (s[j] / cap)^2 */         \
  K(void, cap_scores_##suffix, (real * s, real * slope, int64_t count, real scale, real cap))      \
  /* s[j] = scale * s[j] + bias[j * bias_stride] - slope * |distance - j|; bias may be NULL */     \
  K(void, add_scores_##suffix,                                                                     \
    (real * s, int64_t count, real scale, const real *bias, int64_t bias_stride, real slope,       \
     int64_t distance))                                                                            \
  /* dot[r] = sum_c a[r][c] b[r][c] */                                                             \
  K(void, dot_rows_##suffix,                                                                       \
    (real * dot, int64_t rows, int64_t columns, const real *a, int64_t lda, const real *b,         \
     int64_t ldb))

#define ATTN_SOFTMAX_TILE_KERNELS(K, suffix, real, operand)                                        \
  /* One step of the online softmax over a tile: for each row                                      \
   *   m' = max(m, max_j x_j);  p_j = exp2(x_j - m');  a = exp2(m - m')                            \
   *   sum = a sum + sum_j p_j;  o = a o;  m = m'                                                  \
   * p has zeros from `columns` to the next multiple of 32 and outside begin .. end; a row that    \
   * sees no column keeps m, sum and o. p may be the same memory as s where the types agree. */    \
  K(void, softmax_tile_##suffix,                                                                   \
    (int64_t rows, int64_t columns, real scale, real * s, int64_t lds, operand * p, int64_t ldp,   \
     const int32_t *begin, const int32_t *end, real *maximum, real *sum, real *o, int64_t ldo,     \
     int64_t width))                                                                               \
  /* The backward of a tile: p = exp2(scale s - lse2), d = p (dp - delta), ds = d * slope          \
   * (slope, leading dimension lds, may be NULL: 1). dp is overwritten by d. p and ds have zeros   \
   * where the forward has them; p may be the memory of s and ds that of dp. */                    \
  K(void, softmax_grad_tile_##suffix,                                                              \
    (int64_t rows, int64_t columns, real scale, real * s, int64_t lds, real * dp, int64_t ldd,     \
     const int32_t *begin, const int32_t *end, const real *lse2, const real *delta,                \
     const real *slope, operand *p, operand *ds, int64_t ldp))                                     \
  /* target[c][r] = source[r][c] */                                                                \
  K(void, transpose_##suffix,                                                                      \
    (operand * target, int64_t ldt, const operand *source, int64_t lds, int64_t rows,              \
     int64_t columns))

/* o[r][c] += sum_j p[r][j] v[j][c], for few rows and values as they are stored: decoding. */
#define ATTN_SOFTMAX_DECODE_KERNELS(K)                                                             \
  K(void, weigh_rows_f32,                                                                          \
    (int64_t rows, int64_t keys, int64_t width, const float *p, int64_t ldp, const float *v,       \
     int64_t ldv, float *o, int64_t ldo))                                                          \
  K(void, weigh_rows_bf16,                                                                         \
    (int64_t rows, int64_t keys, int64_t width, const float *p, int64_t ldp, const uint16_t *v,    \
     int64_t ldv, float *o, int64_t ldo))

/* ATTN_RUN_ROWS rows against keys that all of them see, scores and values in one, in runs of up to
 * ATTN_RUN_KEYS keys, with the maxima so far as the base of the weights:
 *   p_rj = exp2(scale q_r . k_j - maximum_r);  sum_r += sum_j p_rj;  o_r += sum_j p_rj v_j
 * Returns how many keys were taken, in whole runs from the first on: fewer than `keys`, a multiple
 * of 32, when a row has no maximum yet or one of its weights in a run is greater than
 * 2^ATTN_RUN_LIMIT (its maximum is too low by now) or no number. Weights have the precision of
 * bfloat16, and are summed so. k is K^T [depth, keys] and v is V [keys, width], packed; depth and
 * width are multiples of 32. */
#define ATTN_SOFTMAX_RUN_KERNELS(K)                                                                \
  K(int64_t, softmax_run_bf16,                                                                     \
    (int64_t keys, int64_t depth, int64_t width, float scale, const uint16_t *q, int64_t ldq,      \
     const uint16_t *k, int64_t k_panel, const uint16_t *v, int64_t v_panel, const float *maximum, \
     float *sum, float *o, int64_t ldo))                                                           \
  /* The same rows and keys in the backward pass: with finite lse2 (base 2) and delta of the rows, \
   *   p_rj = exp2(scale q_r . k_j - lse2_r);  ds_rj = p_rj (d_o_r . v_j - delta_r)                \
   * p and d_s are packed by rows (panels of 16 keys, `panel` apart), `rows` is d_s by rows. v is  \
   * V^T [width, keys], packed. */                                                                 \
  K(void, softmax_grad_run_bf16,                                                                   \
    (int64_t keys, int64_t depth, int64_t width, float scale, const uint16_t *q, int64_t ldq,      \
     const uint16_t *k, int64_t k_panel, const uint16_t *d_o, int64_t ldo, const uint16_t *v,      \
     int64_t v_panel, const float *lse2, const float *delta, uint16_t *p, uint16_t *d_s,           \
     int64_t panel, uint16_t *rows, int64_t ld))

#define ATTN_SOFTMAX_FLOAT_KERNELS(K)                                                              \
  ATTN_SOFTMAX_DECODE_KERNELS(K)                                                                   \
  ATTN_SOFTMAX_SCORE_KERNELS(K, f32, float)                                                        \
  ATTN_SOFTMAX_TILE_KERNELS(K, f32, float, float)                                                  \
  ATTN_SOFTMAX_TILE_KERNELS(K, bf16, float, uint16_t)

#define ATTN_SOFTMAX_KERNELS(K)                                                                    \
  ATTN_SOFTMAX_RUN_KERNELS(K)                                                                      \
  ATTN_SOFTMAX_SCORE_KERNELS(K, f64, double)                                                       \
  ATTN_SOFTMAX_TILE_KERNELS(K, f64, double, double)                                                \
  ATTN_SOFTMAX_FLOAT_KERNELS(K)

#endif
