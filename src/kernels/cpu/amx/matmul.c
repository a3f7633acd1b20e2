/* bfloat16 tile products with AMX: 2 x 2 accumulator tiles of 16 x 16 float32, so that four loads
 * feed four TDPBF16PS (16 cycles each) and the loads are hidden.
 *
 *   tiles 0 1   C rows  0..15, panels 0 and 1      tiles 4 5   A rows 0..15 and 16..31
 *   tiles 2 3   C rows 16..31, panels 0 and 1      tiles 6 7   B panels 0 and 1
 *
 * Between begin and end every tile has 16 rows of 64 bytes; kernels that need fewer rows configure
 * them and put this back. Layout: matmul.h. */
#include "kernels/cpu/amx/tiles.h"
#include "kernels/kernels.h"

#include <immintrin.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* From this depth on there is time, and enough to gain, to ask for the next block's sums. */
enum { TILE_ROWS = 16, DEEP = 128 };

/* `top` rows in the tiles of the upper half of a block, `bottom` in those of the lower half. */
static attn_tile_config ragged_tiles(int64_t top, int64_t bottom) {
  attn_tile_config config = attn_full_tiles;
  config.rows[0] = config.rows[1] = config.rows[4] = (uint8_t)top;
  if (bottom) config.rows[2] = config.rows[3] = config.rows[5] = (uint8_t)bottom;
  return config;
}

/* A tile of C that reaches beyond its last column, through a full tile in memory. */
static void copy_tile(float *to, int64_t to_stride, const float *from, int64_t from_stride,
                      int64_t rows, int64_t columns) {
  __mmask16 mask = (__mmask16)((1 << columns) - 1);
  for (int64_t i = 0; i < rows; ++i)
    _mm512_mask_storeu_ps(to + i * to_stride, mask,
                          _mm512_maskz_loadu_ps(mask, from + i * from_stride));
}

/* Tile numbers are immediates of the instructions, hence macros. */
#define LOAD_C(tile, rows, out, columns)                                                           \
  do {                                                                                             \
    if (!accumulate) {                                                                             \
      attn_tile_zero(tile);                                                                        \
    } else if ((columns) >= ATTN_PANEL) {                                                          \
      attn_tile_load(tile, out, ldc * 4);                                                          \
    } else {                                                                                       \
      copy_tile(edge, ATTN_PANEL, out, ldc, rows, columns);                                        \
      attn_tiles_see_memory();                                                                     \
      attn_tile_load(tile, edge, 64);                                                              \
    }                                                                                              \
  } while (0)

#define STORE_C(tile, rows, out, columns)                                                          \
  do {                                                                                             \
    if ((columns) >= ATTN_PANEL) {                                                                 \
      attn_tile_store(tile, out, ldc * 4);                                                         \
    } else {                                                                                       \
      attn_tile_store(tile, edge, 64);                                                             \
      copy_tile(out, ldc, edge, ATTN_PANEL, rows, columns);                                        \
    }                                                                                              \
  } while (0)

/* Asks for the lines of C that will be stored: a tile store that misses the first-level cache waits
 * for each of its 16 lines in turn, which made a product over 128 half as fast as accumulating into
 * a C that LOAD_C had brought in. */
INLINE void claim_rows(const float *c, int64_t ldc, int64_t rows, int panels) {
  for (int64_t i = 0; i < rows; ++i)
    for (int p = 0; p < panels; ++p) __builtin_prefetch(c + i * ldc + p * ATTN_PANEL, 1, 3);
}

/* top + bottom rows times one or two panels; `bottom` is 0 or top is 16. */
INLINE void multiply(int panels, int64_t top, int64_t bottom, int64_t k, const uint16_t *a,
                     int64_t lda, const uint16_t *b, int64_t panel_stride, float *c, int64_t ldc,
                     bool accumulate, int64_t columns) {
  float edge[TILE_ROWS * ATTN_PANEL] __attribute__((aligned(64)));
  float *c1 = c + ATTN_PANEL, *c2 = c + TILE_ROWS * ldc, *c3 = c2 + ATTN_PANEL;
  if (!accumulate) claim_rows(c, ldc, top + bottom, panels);
  LOAD_C(0, top, c, columns);
  if (panels > 1) LOAD_C(1, top, c1, columns - ATTN_PANEL);
  if (bottom) {
    LOAD_C(2, bottom, c2, columns);
    if (panels > 1) LOAD_C(3, bottom, c3, columns - ATTN_PANEL);
  }
  for (int64_t r = 0; r < k; r += ATTN_BF16_DEPTH) {
    attn_tile_load(6, b + r * ATTN_PANEL, 64);
    attn_tile_load(4, a + r, lda * 2);
    attn_tile_multiply_bf16(0, 4, 6);
    if (panels > 1) {
      attn_tile_load(7, b + panel_stride + r * ATTN_PANEL, 64);
      attn_tile_multiply_bf16(1, 4, 7);
    }
    if (bottom) {
      attn_tile_load(5, a + TILE_ROWS * lda + r, lda * 2);
      attn_tile_multiply_bf16(2, 5, 6);
      if (panels > 1) attn_tile_multiply_bf16(3, 5, 7);
    }
  }
  STORE_C(0, top, c, columns);
  if (panels > 1) STORE_C(1, top, c1, columns - ATTN_PANEL);
  if (bottom) {
    STORE_C(2, bottom, c2, columns);
    if (panels > 1) STORE_C(3, bottom, c3, columns - ATTN_PANEL);
  }
}

/* All panels for one block of rows. */
static void multiply_rows(int64_t top, int64_t bottom, int64_t n, int64_t k, const uint16_t *a,
                          int64_t lda, const uint16_t *b, int64_t panel_stride, float *c,
                          int64_t ldc, bool accumulate) {
  int64_t j = 0;
  for (; j + ATTN_PANEL < n; j += 2 * ATTN_PANEL, b += 2 * panel_stride) {
    if (accumulate && k >= DEEP && j + 2 * ATTN_PANEL < n)
      claim_rows(c + j + 2 * ATTN_PANEL, ldc, top + bottom, 2);
    multiply(2, top, bottom, k, a, lda, b, panel_stride, c + j, ldc, accumulate, n - j);
  }
  if (j < n) multiply(1, top, bottom, k, a, lda, b, panel_stride, c + j, ldc, accumulate, n - j);
}

void attn_amx_matmul_bf16(int64_t m, int64_t n, int64_t k, const uint16_t *a, int64_t lda,
                          const uint16_t *b, int64_t panel_stride, float *c, int64_t ldc,
                          bool accumulate) {
  int64_t i = 0;
  for (; i + 2 * TILE_ROWS <= m; i += 2 * TILE_ROWS)
    multiply_rows(TILE_ROWS, TILE_ROWS, n, k, a + i * lda, lda, b, panel_stride, c + i * ldc, ldc,
                  accumulate);
  if (i == m) return;
  int64_t top = m - i < TILE_ROWS ? m - i : TILE_ROWS, bottom = m - i - top;
  if (top < TILE_ROWS || bottom > 0) {
    attn_tile_config ragged = ragged_tiles(top, bottom);
    attn_tiles_configure(&ragged);
  }
  multiply_rows(top, bottom, n, k, a + i * lda, lda, b, panel_stride, c + i * ldc, ldc, accumulate);
  if (top < TILE_ROWS || bottom > 0) attn_tiles_configure(&attn_full_tiles);
}
