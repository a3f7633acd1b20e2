/* Exact attention over keys that all rows see, with AMX: 32 rows, in runs of up to 256 keys.
 *
 * The tiles and the vector units work at once if their instructions lie near each other. So the
 * products of one step (32 rows, 32 keys) alternate with the weights of the step before, and the
 * products with the values alternate with the sums of the weights:
 *
 *   for each run
 *     for each step of it, and the first of the next run:
 *                             S[now] = Q K^T, after each TDPBF16PS of which
 *                             P[step - 1] = exp2(scale S[before] - maximum) for some of the rows
 *     for each 32 columns:    O += P V over the whole run, so that O is moved once a run, and
 *                             the sums of some rows of P
 *
 * Everything but K and V stays in the first-level cache: S twice 4 KiB, P 16 KiB, Q 8 KiB and O 16
 * KiB at depth 128. K and V come from the second level.
 *
 * Weights are computed in fixed point (weights.h): with the instructions of exponentials in float32
 * beside them, the products ran at half their rate.
 *
 * The base of the weights is the maximum of earlier keys (the lazy rescaling of FlashAttention-4):
 * any base gives the same quotient of sums. Only overflow must be prevented: the least Y
 * (weights.h) of a run tells. */
#include "kernels/cpu/amx/tiles.h"
#include "kernels/cpu/amx/weights.h"
#include "kernels/kernels.h"

#include <immintrin.h>
#include <math.h>

#define WITH_BF16
#include "kernels/cpu/avx512/softmax_tile.inc"

enum { ROWS = ATTN_RUN_ROWS, HALF = 16, STEP = 32, LINE = 64, TILE = 512 /* bfloat16s */ };

enum { STEPS = ATTN_RUN_KEYS / STEP };

/* What the steps of a run share. P is kept as tiles, [step][row][key of the step]. */
typedef struct run {
  float s[2][ROWS * STEP];
  uint16_t p[STEPS][ROWS * STEP];
  float sums[ROWS * HALF]; /* of each row over all runs, in 16 lanes */
  float bases[ROWS];       /* for weigh_row */
} run;

/* The weights of one row of a step, from the step's scores; returns the least Y so far. */
INLINE __m512i weigh_row(run *run, const float *scores, int step, int row, __m512 scale,
                         __m512i least) {
  const float *s = scores + row * STEP;
  __m512i y = fixed_logits(s, s + HALF, scale, _mm512_set1_ps(run->bases[row]));
  _mm512_store_si512((void *)(run->p[step] + row * STEP), in_order(fixed_weights(y)));
  return _mm512_min_epi16(least, y);
}

INLINE __m512i weigh_rows(run *run, const float *scores, int step, int row, int count, __m512 scale,
                          __m512i least) {
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i) least = weigh_row(run, scores, step, row + i, scale, least);
  return least;
}

/* Adds the sum of a row's weights to its 16 lanes: a pair of bfloat16s is two float32s less 16 bits
 * each. */
INLINE void sum_row(run *run, int steps, int row) {
  __m512 even = _mm512_load_ps(run->sums + row * HALF), odd = _mm512_setzero_ps();
  for (int step = 0; step < steps; ++step) {
    __m512i pairs = _mm512_load_si512((const void *)(run->p[step] + row * STEP));
    even = _mm512_add_ps(even, _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)));
    odd = _mm512_add_ps(
        odd, _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000))));
  }
  _mm512_store_ps(run->sums + row * HALF, _mm512_add_ps(even, odd));
}

/* The scores of 32 keys and, where `weigh`, the weights of step `before` of the run, from its
 * `scores`. */
INLINE __m512i score_step(run *run, float *s, bool weigh, const float *scores, int before,
                          int depths, __m512 scale, const uint16_t *q, int64_t ldq,
                          const uint16_t *k, int64_t k_panel, __m512i least) {
  int each = HALF / 2 / depths, row = 0; /* rows after each product: 4 products a depth */
#define WEIGH_SOME                                                                                 \
  if (weigh) least = weigh_rows(run, scores, before, row, each, scale, least), row += each
  attn_tile_zero(0);
  attn_tile_zero(1);
  attn_tile_zero(2);
  attn_tile_zero(3);
#pragma GCC unroll 4
  for (int d = 0; d < depths; ++d) {
    attn_tile_load(6, k + d * TILE, LINE);
    attn_tile_load(4, q + d * STEP, ldq * 2);
    attn_tile_multiply_bf16(0, 4, 6);
    WEIGH_SOME;
    attn_tile_load(7, k + k_panel + d * TILE, LINE);
    attn_tile_multiply_bf16(1, 4, 7);
    WEIGH_SOME;
    attn_tile_load(5, q + HALF * ldq + d * STEP, ldq * 2);
    attn_tile_multiply_bf16(2, 5, 6);
    WEIGH_SOME;
    attn_tile_multiply_bf16(3, 5, 7);
    WEIGH_SOME;
  }
  if (weigh) least = weigh_rows(run, scores, before, row, ROWS - row, scale, least);
#undef WEIGH_SOME
  attn_tile_store(0, s, STEP * 4);
  attn_tile_store(1, s + HALF, STEP * 4);
  attn_tile_store(2, s + HALF * STEP, STEP * 4);
  attn_tile_store(3, s + HALF * STEP + HALF, STEP * 4);
  return least;
}

/* O += P V for 32 columns, and the sums of the rows first .. first + rows - 1. */
INLINE void add_columns(run *run, int steps, const uint16_t *v, int64_t v_panel, float *o,
                        int64_t ldo, int first, int rows) {
  float *below = o + HALF * ldo;
  attn_tile_load(0, o, ldo * 4);
  attn_tile_load(1, o + HALF, ldo * 4);
  attn_tile_load(2, below, ldo * 4);
  attn_tile_load(3, below + HALF, ldo * 4);
  for (int step = 0; step < steps; ++step) {
    attn_tile_load(6, v + step * TILE, LINE);
    attn_tile_load(4, run->p[step], LINE);
    attn_tile_multiply_bf16(0, 4, 6);
    attn_tile_load(7, v + v_panel + step * TILE, LINE);
    attn_tile_multiply_bf16(1, 4, 7);
    for (int r = step * rows / steps; r < (step + 1) * rows / steps; ++r)
      sum_row(run, steps, first + r);
    attn_tile_load(5, run->p[step] + TILE, LINE);
    attn_tile_multiply_bf16(2, 5, 6);
    attn_tile_multiply_bf16(3, 5, 7);
  }
  attn_tile_store(0, o, ldo * 4);
  attn_tile_store(1, o + HALF, ldo * 4);
  attn_tile_store(2, below, ldo * 4);
  attn_tile_store(3, below + HALF, ldo * 4);
}

INLINE void add_values(run *run, int steps, int64_t width, const uint16_t *v, int64_t v_panel,
                       float *o, int64_t ldo) {
  int groups = (int)(width / STEP);
  for (int g = 0; g < groups; ++g) {
    int first = g * ROWS / groups, rows = (g + 1) * ROWS / groups - first;
    add_columns(run, steps, v + 2 * g * v_panel, v_panel, o + g * STEP, ldo, first, rows);
  }
}

static void add_sums(const run *run, float *sum) {
  __m512 lanes[HALF];
  for (int half = 0; half < 2; ++half) {
    for (int row = 0; row < HALF; ++row)
      lanes[row] = _mm512_load_ps(run->sums + (half * HALF + row) * HALF);
    _mm512_storeu_ps(sum + half * HALF,
                     _mm512_add_ps(_mm512_loadu_ps(sum + half * HALF), reduce_sums(lanes)));
  }
}

/* Steps of the next run, of `left`: runs of like lengths. */
INLINE int run_steps(int left) {
  int runs = (left + STEPS - 1) / STEPS;
  return (left + runs - 1) / runs;
}

/* All runs; returns the steps that were done before one was refused. */
INLINE int do_runs(run *run, int steps, int depths, int64_t width, float scale, const uint16_t *q,
                   int64_t ldq, const uint16_t *k, int64_t k_panel, const uint16_t *v,
                   int64_t v_panel, float *o, int64_t ldo) {
  const __m512i limit = _mm512_set1_epi16(FIXED_ZERO - FIXED_BIAS - ATTN_RUN_LIMIT * FIXED_ONE);
  __m512i least = _mm512_set1_epi16(FIXED_ZERO);
  __m512 factor = _mm512_set1_ps(scale * FIXED_ONE);
  int done = 0;
  score_step(run, run->s[0], false, NULL, 0, depths, factor, q, ldq, k, k_panel, least);
  while (done < steps) {
    int count = run_steps(steps - done);
    for (int i = 1; i <= count; ++i) {
      int step = done + i;
      const float *scores = run->s[(step - 1) & 1];
      if (step < steps)
        least = score_step(run, run->s[step & 1], true, scores, i - 1, depths, factor, q, ldq,
                           k + step * 2 * k_panel, k_panel, least);
      else
        least = weigh_rows(run, scores, i - 1, 0, ROWS, factor, least);
    }
    if (_mm512_cmplt_epi16_mask(least, limit)) break;
    attn_tiles_see_memory();
    const uint16_t *values = v + done * TILE;
    if (count == STEPS)
      add_values(run, STEPS, width, values, v_panel, o, ldo);
    else
      add_values(run, count, width, values, v_panel, o, ldo);
    done += count;
  }
  return done;
}

/* One function for each depth that is common, so that its loops unroll, and one for all others. */
typedef int do_depth(run *run, int steps, int depths, int64_t width, float scale, const uint16_t *q,
                     int64_t ldq, const uint16_t *k, int64_t k_panel, const uint16_t *v,
                     int64_t v_panel, float *o, int64_t ldo);

#define DEFINE_DEPTH(name, constant)                                                               \
  static __attribute__((noinline)) int name(run *run, int steps, int depths, int64_t width,        \
                                            float scale, const uint16_t *q, int64_t ldq,           \
                                            const uint16_t *k, int64_t k_panel, const uint16_t *v, \
                                            int64_t v_panel, float *o, int64_t ldo) {              \
    (void)depths;                                                                                  \
    return do_runs(run, steps, constant, width, scale, q, ldq, k, k_panel, v, v_panel, o, ldo);    \
  }
DEFINE_DEPTH(do_depth_64, 2)
DEFINE_DEPTH(do_depth_128, 4)
DEFINE_DEPTH(do_any_depth, depths)

/* Whether every row has a maximum; prepares their bases. */
static bool take_bases(run *run, const float *maximum) {
  for (int row = 0; row < ROWS; row += HALF) {
    __m512 base = _mm512_loadu_ps(maximum + row);
    if (_mm512_cmp_ps_mask(base, _mm512_set1_ps(-INFINITY), _CMP_EQ_OQ)) return false;
    _mm512_store_ps(run->bases + row,
                    _mm512_fmadd_ps(base, _mm512_set1_ps(FIXED_ONE), _mm512_set1_ps(FIXED_OFFSET)));
  }
  return true;
}

int64_t attn_amx_softmax_run_bf16(int64_t keys, int64_t depth, int64_t width, float scale,
                                  const uint16_t *q, int64_t ldq, const uint16_t *k,
                                  int64_t k_panel, const uint16_t *v, int64_t v_panel,
                                  const float *maximum, float *sum, float *o, int64_t ldo) {
  run run __attribute__((aligned(64)));
  if (!take_bases(&run, maximum)) return 0;
  for (int row = 0; row < ROWS; ++row) _mm512_store_ps(run.sums + row * HALF, _mm512_setzero_ps());
  do_depth *runs = depth == 128 ? do_depth_128 : depth == 64 ? do_depth_64 : do_any_depth;
  int done = runs(&run, (int)(keys / STEP), (int)(depth / STEP), width, scale, q, ldq, k, k_panel,
                  v, v_panel, o, ldo);
  if (done) add_sums(&run, sum);
  return done * STEP;
}
