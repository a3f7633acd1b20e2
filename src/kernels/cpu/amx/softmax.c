/* A run of exact attention with AMX: the weights of a run of keys in one pass with their scores.
 *
 * 16 x 16 scores cost the tiles 16 cycles for each 32 of depth and the vector units some 90 for
 * their weights, and both work at once if their instructions lie near each other. So the products
 * of one step (32 rows, 32 keys) alternate with the weights of the step before:
 *
 *   for each step:  S[now] = Q K^T    by 4 TDPBF16PS for 32 of depth, after each of which
 *                   P[step - 1] = exp2(scale S[before] - maximum)      for some of the rows
 *   O += P V        for each 32 columns over the whole run, so that O is moved once a run
 *
 * Everything but K and V stays in the first-level cache: S twice 4 KiB, P 16 KiB, Q 8 KiB at depth
 * 128. K and V come from the second level; the processor does not foresee the rows of tile loads,
 * hence the prefetches.
 *
 * The base of the weights is the maximum of earlier runs (the lazy rescaling of FlashAttention-4):
 * any base gives the same quotient of sums. Only overflow must be prevented; the sums tell. */
#include "kernels/cpu/amx/tiles.h"
#include "kernels/kernels.h"

#include <immintrin.h>
#include <math.h>

#define WITH_BF16
#include "kernels/cpu/avx512/softmax_tile.inc"

enum { ROWS = ATTN_RUN_ROWS, HALF = 16, STEP = 32, LINE = 64, TILE = 512 /* bfloat16s */ };

/* What the steps of a run share. P is kept as tiles, [step][row][key of the step]. */
typedef struct run {
  float s[2][ROWS * STEP], sums[ROWS * HALF];
  uint16_t p[ATTN_RUN_KEYS / STEP][ROWS * STEP];
} run;

/* Asks for a tile's 16 lines. */
INLINE void prefetch_tile(const void *tile) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm_prefetch((const char *)tile + i * LINE, _MM_HINT_T0);
}

/* 2^x, to a relative 1e-4 (weights are rounded to 4e-3); at least 2^-126, so that no result is
 * subnormal, which would be slow. vscalef takes the whole part of x itself. */
INLINE __m512 exp2_whole(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-126), x); /* in this order NaN stays NaN */
  __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 y = _mm512_set1_ps(7.80245200e-2f);
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.26067170e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.95833530e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.99925220e-1f));
  return _mm512_scalef_ps(y, x);
}

/* The weights of one row of one step. */
INLINE void weigh_row(run *run, int step, int row, __m512 scale, const float *maximum) {
  const float *s = run->s[step & 1] + row * STEP;
  float *sum = run->sums + row * HALF;
  __m512 base = _mm512_set1_ps(maximum[row]);
  __m512 low = exp2_whole(_mm512_fmsub_ps(_mm512_load_ps(s), scale, base));
  __m512 high = exp2_whole(_mm512_fmsub_ps(_mm512_load_ps(s + HALF), scale, base));
  _mm512_store_ps(sum, _mm512_add_ps(_mm512_load_ps(sum), _mm512_add_ps(low, high)));
  _mm512_store_si512((void *)(run->p[step] + row * STEP), (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

INLINE void weigh_rows(run *run, int step, int row, int count, __m512 scale, const float *maximum) {
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i) weigh_row(run, step, row + i, scale, maximum);
}

/* The scores of step `step` and, where `weigh`, the weights of the one before. */
INLINE void score_step(run *run, int step, bool weigh, int depths, __m512 scale, const uint16_t *q,
                       int64_t ldq, const uint16_t *k, int64_t k_panel, const uint16_t *next,
                       const float *maximum) {
  int each = HALF / 2 / depths, row = 0; /* rows after each product: 4 products a depth */
#define WEIGH_SOME                                                                                 \
  if (weigh) weigh_rows(run, step - 1, row, each, scale, maximum), row += each
  attn_tile_zero(0);
  attn_tile_zero(1);
  attn_tile_zero(2);
  attn_tile_zero(3);
#pragma GCC unroll 4
  for (int d = 0; d < depths; ++d) {
    attn_tile_load(6, k + d * TILE, LINE);
    attn_tile_load(4, q + d * STEP, ldq * 2);
    attn_tile_multiply_bf16(0, 4, 6);
    prefetch_tile(next + d * TILE);
    WEIGH_SOME;
    attn_tile_load(7, k + k_panel + d * TILE, LINE);
    attn_tile_multiply_bf16(1, 4, 7);
    WEIGH_SOME;
    attn_tile_load(5, q + HALF * ldq + d * STEP, ldq * 2);
    attn_tile_multiply_bf16(2, 5, 6);
    prefetch_tile(next + k_panel + d * TILE);
    WEIGH_SOME;
    attn_tile_multiply_bf16(3, 5, 7);
    WEIGH_SOME;
  }
  for (; weigh && row < ROWS; ++row) weigh_row(run, step - 1, row, scale, maximum);
#undef WEIGH_SOME
  float *s = run->s[step & 1];
  attn_tile_store(0, s, STEP * 4);
  attn_tile_store(1, s + HALF, STEP * 4);
  attn_tile_store(2, s + HALF * STEP, STEP * 4);
  attn_tile_store(3, s + HALF * STEP + HALF, STEP * 4);
}

/* All weights of the run. */
INLINE void weigh_run(run *run, int steps, int depths, float scale, const uint16_t *q, int64_t ldq,
                      const uint16_t *k, int64_t k_panel, const uint16_t *v, int64_t v_panel,
                      const float *maximum) {
  __m512 factor = _mm512_set1_ps(scale);
  for (int step = 0; step < steps; ++step) {
    const uint16_t *now = k + step * 2 * k_panel;
    const uint16_t *next = step + 1 < steps ? now + 2 * k_panel : now;
    if (step)
      score_step(run, step, true, depths, factor, q, ldq, now, k_panel, next, maximum);
    else
      score_step(run, step, false, depths, factor, q, ldq, now, k_panel, next, maximum);
    prefetch_tile(v + step * TILE);
    prefetch_tile(v + v_panel + step * TILE);
  }
  for (int row = 0; row < ROWS; ++row) weigh_row(run, steps - 1, row, factor, maximum);
}

/* O += P V for 32 columns; `next` are the values of the next ones. */
INLINE void add_values(const run *run, int steps, const uint16_t *v, int64_t v_panel,
                       const uint16_t *next, float *o, int64_t ldo) {
  float *below = o + HALF * ldo;
  attn_tile_load(0, o, ldo * 4);
  attn_tile_load(1, o + HALF, ldo * 4);
  attn_tile_load(2, below, ldo * 4);
  attn_tile_load(3, below + HALF, ldo * 4);
  for (int step = 0; step < steps; ++step) {
    attn_tile_load(6, v + step * TILE, LINE);
    attn_tile_load(4, run->p[step], LINE);
    attn_tile_multiply_bf16(0, 4, 6);
    prefetch_tile(next + step * TILE);
    attn_tile_load(7, v + v_panel + step * TILE, LINE);
    attn_tile_multiply_bf16(1, 4, 7);
    prefetch_tile(next + v_panel + step * TILE);
    attn_tile_load(5, run->p[step] + TILE, LINE);
    attn_tile_multiply_bf16(2, 5, 6);
    /* The next columns of O: 32 rows of two lines. */
    for (int row = step * ROWS / steps; row < (step + 1) * ROWS / steps; ++row) {
      _mm_prefetch((const char *)(o + row * ldo + STEP), _MM_HINT_T0);
      _mm_prefetch((const char *)(o + row * ldo + STEP + HALF), _MM_HINT_T0);
    }
    attn_tile_multiply_bf16(3, 5, 7);
  }
  attn_tile_store(0, o, ldo * 4);
  attn_tile_store(1, o + HALF, ldo * 4);
  attn_tile_store(2, below, ldo * 4);
  attn_tile_store(3, below + HALF, ldo * 4);
}

/* Adds the run's sums to `sum`, unless one is too great (or not a number): then false. */
static bool add_sums(const run *run, float *sum) {
  __m512 lanes[HALF], totals[2], limit = _mm512_set1_ps(ATTN_RUN_LIMIT);
  for (int half = 0; half < 2; ++half) {
    for (int row = 0; row < HALF; ++row)
      lanes[row] = _mm512_load_ps(run->sums + (half * HALF + row) * HALF);
    totals[half] = reduce_sums(lanes);
    if (_mm512_cmp_ps_mask(totals[half], limit, _CMP_LE_OQ) != 0xffff) return false;
  }
  for (int half = 0; half < 2; ++half)
    _mm512_storeu_ps(sum + half * HALF,
                     _mm512_add_ps(_mm512_loadu_ps(sum + half * HALF), totals[half]));
  return true;
}

/* One function for each depth that is common, so that its loops unroll, and one for all others. */
typedef void weigh_depth(run *run, int steps, int depths, float scale, const uint16_t *q,
                         int64_t ldq, const uint16_t *k, int64_t k_panel, const uint16_t *v,
                         int64_t v_panel, const float *maximum);

#define DEFINE_DEPTH(name, constant)                                                               \
  static __attribute__((noinline)) void name(run *run, int steps, int depths, float scale,         \
                                             const uint16_t *q, int64_t ldq, const uint16_t *k,    \
                                             int64_t k_panel, const uint16_t *v, int64_t v_panel,  \
                                             const float *maximum) {                               \
    (void)depths;                                                                                  \
    weigh_run(run, steps, constant, scale, q, ldq, k, k_panel, v, v_panel, maximum);               \
  }
DEFINE_DEPTH(weigh_depth_64, 2)
DEFINE_DEPTH(weigh_depth_128, 4)
DEFINE_DEPTH(weigh_any_depth, depths)

bool attn_amx_softmax_run_bf16(int64_t keys, int64_t depth, int64_t width, float scale,
                               const uint16_t *q, int64_t ldq, const uint16_t *k, int64_t k_panel,
                               const uint16_t *v, int64_t v_panel, const float *maximum, float *sum,
                               float *o, int64_t ldo) {
  run run __attribute__((aligned(64)));
  int steps = (int)(keys / STEP);
  for (int row = 0; row < ROWS; ++row) {
    if (maximum[row] == -INFINITY) return false;
    _mm512_store_ps(run.sums + row * HALF, _mm512_setzero_ps());
  }
  weigh_depth *weigh = depth == 128  ? weigh_depth_128
                       : depth == 64 ? weigh_depth_64
                                     : weigh_any_depth;
  weigh(&run, steps, (int)(depth / STEP), scale, q, ldq, k, k_panel, v, v_panel, maximum);
  if (!add_sums(&run, sum)) return false;
  attn_tiles_see_memory();
  for (int64_t c = 0; c < width; c += STEP) {
    const uint16_t *now = v + c / HALF * v_panel;
    const uint16_t *next = c + STEP < width ? now + 2 * v_panel : now;
    add_values(&run, steps, now, v_panel, next, o + c, ldo);
  }
  return true;
}
