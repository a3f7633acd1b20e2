/* The weights of attention and their gradients with AMX, recomputed for the backward pass:
 *
 *   P = exp2(scale Q K^T - LSE),   dS = P (dO V^T - delta)
 *
 * for 32 rows against keys that all of them see, in the forms that the three products of the
 * backward pass take: both packed by rows, dS by rows too. As in softmax.c, what the vector units
 * do with one step (32 keys) alternates with the products of the next; -delta is what the sums of
 * dO V^T start from. */
#include "kernels/cpu/amx/tiles.h"
#include "kernels/cpu/amx/weights.h"
#include "kernels/kernels.h"

#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

enum { ROWS = ATTN_RUN_ROWS, HALF = 16, STEP = 32, LINE = 64, TILE = 512 /* bfloat16s */ };

/* What the steps share: scores and dO V^T - delta of two steps, and for each row the base of its
 * logits and 16 times -delta. */
typedef struct grad_run {
  float s[2][ROWS * STEP], d_p[2][ROWS * STEP];
  float bases[ROWS], minus_delta[ROWS * HALF];
} grad_run;

/* Where the results of a step go. */
typedef struct grad_step {
  const float *s, *d_p;
  uint16_t *p, *d_s; /* packed: panels of 16 keys, `panel` apart */
  int64_t panel;
  uint16_t *rows; /* of dS, `ld` apart */
  int64_t ld;
} grad_step;

/* P by turns, and dS by turns, of one row; dS is stored by rows. */
INLINE __m512i grad_row(const grad_run *run, const grad_step *step, int row, __m512 scale,
                        __m512i *d_s) {
  const float *s = step->s + row * STEP, *d_p = step->d_p + row * STEP;
  __m512i p = fixed_weights(fixed_logits(s, s + HALF, scale, _mm512_set1_ps(run->bases[row])));
  /* A bfloat16 is the upper half of a float32; unpacking undoes the turns. */
  __m512 low = _mm512_castsi512_ps(_mm512_unpacklo_epi16(_mm512_setzero_si512(), p));
  __m512 high = _mm512_castsi512_ps(_mm512_unpackhi_epi16(_mm512_setzero_si512(), p));
  low = _mm512_mul_ps(low, _mm512_load_ps(d_p));
  high = _mm512_mul_ps(high, _mm512_load_ps(d_p + HALF));
  __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  _mm512_storeu_si512(step->rows + row * step->ld, both);
  *d_s = by_turns(both);
  return p;
}

/* Rows `row` and the next: pairs of rows are the pairs of a packed matrix, and unpacking what is by
 * turns leaves the first 16 keys, and the others. */
INLINE void grad_rows(const grad_run *run, const grad_step *step, int row, int count,
                      __m512 scale) {
#pragma GCC unroll 4
  for (int i = 0; i < count; i += 2) {
    int at = row + i;
    uint16_t *p = step->p + at * ATTN_PANEL, *d_s = step->d_s + at * ATTN_PANEL;
    __m512i d_s0, d_s1;
    __m512i p0 = grad_row(run, step, at, scale, &d_s0);
    __m512i p1 = grad_row(run, step, at + 1, scale, &d_s1);
    _mm512_storeu_si512(p, _mm512_unpacklo_epi16(p0, p1));
    _mm512_storeu_si512(p + step->panel, _mm512_unpackhi_epi16(p0, p1));
    _mm512_storeu_si512(d_s, _mm512_unpacklo_epi16(d_s0, d_s1));
    _mm512_storeu_si512(d_s + step->panel, _mm512_unpackhi_epi16(d_s0, d_s1));
  }
}

/* The product of 32 rows and 32 keys, on top of what the tiles 0 to 3 hold; after every second
 * TDPBF16PS, `each` rows of the step before, from `row` on. Returns the next row. */
INLINE int multiply_step(const grad_run *run, const grad_step *before, int row, int each,
                         int depths, __m512 scale, const uint16_t *a, int64_t lda,
                         const uint16_t *b, int64_t panel) {
#define WEIGH_SOME                                                                                 \
  if (row < ROWS) grad_rows(run, before, row, each, scale), row += each
#pragma GCC unroll 4
  for (int d = 0; d < depths; ++d) {
    attn_tile_load(6, b + d * TILE, LINE);
    attn_tile_load(4, a + d * STEP, lda * 2);
    attn_tile_multiply_bf16(0, 4, 6);
    attn_tile_load(7, b + panel + d * TILE, LINE);
    attn_tile_multiply_bf16(1, 4, 7);
    WEIGH_SOME;
    attn_tile_load(5, a + HALF * lda + d * STEP, lda * 2);
    attn_tile_multiply_bf16(2, 5, 6);
    attn_tile_multiply_bf16(3, 5, 7);
    WEIGH_SOME;
  }
#undef WEIGH_SOME
  return row;
}

INLINE void store_step(float *s) {
  attn_tile_store(0, s, STEP * 4);
  attn_tile_store(1, s + HALF, STEP * 4);
  attn_tile_store(2, s + HALF * STEP, STEP * 4);
  attn_tile_store(3, s + HALF * STEP + HALF, STEP * 4);
}

/* Scores and dO V^T - delta of one step, into s and d_p; of the step before, unless it is NULL, the
 * weights. */
INLINE void do_step(const grad_run *run, const grad_step *before, float *s, float *d_p,
                    int depths_k, int depths_v, __m512 scale, const uint16_t *q, int64_t ldq,
                    const uint16_t *k, int64_t k_panel, const uint16_t *d_o, int64_t ldo,
                    const uint16_t *v, int64_t v_panel) {
  int pairs = 2 * (depths_k + depths_v); /* of products */
  int each = pairs >= ROWS / 2 ? 2 : ROWS / pairs / 2 * 2, row = before ? 0 : ROWS;
  attn_tile_zero(0);
  attn_tile_zero(1);
  attn_tile_zero(2);
  attn_tile_zero(3);
  row = multiply_step(run, before, row, each, depths_k, scale, q, ldq, k, k_panel);
  store_step(s);
  attn_tile_load(0, run->minus_delta, LINE);
  attn_tile_load(1, run->minus_delta, LINE);
  attn_tile_load(2, run->minus_delta + HALF * HALF, LINE);
  attn_tile_load(3, run->minus_delta + HALF * HALF, LINE);
  row = multiply_step(run, before, row, each, depths_v, scale, d_o, ldo, v, v_panel);
  if (row < ROWS) grad_rows(run, before, row, ROWS - row, scale);
  store_step(d_p);
}

INLINE void do_steps(grad_run *run, int steps, int depths_k, int depths_v, float scale,
                     const uint16_t *q, int64_t ldq, const uint16_t *k, int64_t k_panel,
                     const uint16_t *d_o, int64_t ldo, const uint16_t *v, int64_t v_panel,
                     uint16_t *p, uint16_t *d_s, int64_t panel, uint16_t *rows, int64_t ld) {
  const __m512 factor = _mm512_set1_ps(scale * FIXED_ONE);
  do_step(run, NULL, run->s[0], run->d_p[0], depths_k, depths_v, factor, q, ldq, k, k_panel, d_o,
          ldo, v, v_panel);
  for (int step = 1; step <= steps; ++step) {
    int last = step - 1;
    grad_step before = {.s = run->s[last & 1],
                        .d_p = run->d_p[last & 1],
                        .p = p + 2 * last * panel,
                        .d_s = d_s + 2 * last * panel,
                        .panel = panel,
                        .rows = rows + last * STEP,
                        .ld = ld};
    if (step < steps)
      do_step(run, &before, run->s[step & 1], run->d_p[step & 1], depths_k, depths_v, factor, q,
              ldq, k + 2 * step * k_panel, k_panel, d_o, ldo, v + 2 * step * v_panel, v_panel);
    else
      grad_rows(run, &before, 0, ROWS, factor);
  }
}

/* One function for each pair of depths that is common, so that its loops unroll, and one for all.
 */
typedef void do_depths(grad_run *run, int steps, int depths_k, int depths_v, float scale,
                       const uint16_t *q, int64_t ldq, const uint16_t *k, int64_t k_panel,
                       const uint16_t *d_o, int64_t ldo, const uint16_t *v, int64_t v_panel,
                       uint16_t *p, uint16_t *d_s, int64_t panel, uint16_t *rows, int64_t ld);

#define DEFINE_DEPTHS(name, k_constant, v_constant)                                                \
  static __attribute__((noinline)) void name(                                                      \
      grad_run *run, int steps, int depths_k, int depths_v, float scale, const uint16_t *q,        \
      int64_t ldq, const uint16_t *k, int64_t k_panel, const uint16_t *d_o, int64_t ldo,           \
      const uint16_t *v, int64_t v_panel, uint16_t *p, uint16_t *d_s, int64_t panel,               \
      uint16_t *rows, int64_t ld) {                                                                \
    (void)depths_k, (void)depths_v;                                                                \
    do_steps(run, steps, k_constant, v_constant, scale, q, ldq, k, k_panel, d_o, ldo, v, v_panel,  \
             p, d_s, panel, rows, ld);                                                             \
  }
DEFINE_DEPTHS(do_depths_64, 2, 2)
DEFINE_DEPTHS(do_depths_128, 4, 4)
DEFINE_DEPTHS(do_any_depths, depths_k, depths_v)

void attn_amx_softmax_grad_run_bf16(int64_t keys, int64_t depth, int64_t width, float scale,
                                    const uint16_t *q, int64_t ldq, const uint16_t *k,
                                    int64_t k_panel, const uint16_t *d_o, int64_t ldo,
                                    const uint16_t *v, int64_t v_panel, const float *lse2,
                                    const float *delta, uint16_t *p, uint16_t *d_s, int64_t panel,
                                    uint16_t *rows, int64_t ld) {
  grad_run run __attribute__((aligned(64)));
  for (int row = 0; row < ROWS; ++row)
    _mm512_store_ps(run.minus_delta + row * HALF, _mm512_set1_ps(-delta[row]));
  for (int row = 0; row < ROWS; row += HALF)
    _mm512_store_ps(run.bases + row, fixed_base(_mm512_loadu_ps(lse2 + row)));
  attn_tiles_see_memory();
  do_depths *steps = depth == 128 && width == 128 ? do_depths_128
                     : depth == 64 && width == 64 ? do_depths_64
                                                  : do_any_depths;
  steps(&run, (int)(keys / STEP), (int)(depth / STEP), (int)(width / STEP), scale, q, ldq, k,
        k_panel, d_o, ldo, v, v_panel, p, d_s, panel, rows, ld);
}
