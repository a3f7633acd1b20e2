#include "kernels/cpu/amx/tiles.h"
#include "kernels/kernels.h"

const attn_tile_config attn_full_tiles = {.palette = 1,
                                          .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
                                          .rows = {16, 16, 16, 16, 16, 16, 16, 16}};

void attn_amx_begin(void) {
  attn_tiles_configure(&attn_full_tiles);
}

void attn_amx_end(void) {
  attn_tiles_release();
}

#if defined(ATTN_EMULATE_AMX)

typedef struct tile {
  uint8_t bytes[16][64];
} tile;

static _Thread_local attn_tile_config shape;
static _Thread_local tile tiles[8];

/* Where the processor would raise an exception, so does the emulation. */
static void require(bool holds) {
  if (!holds) __builtin_trap();
}

void attn_tiles_configure(const attn_tile_config *config) {
  require(config->palette == 1);
  for (int i = 0; i < 8; ++i) require(config->rows[i] <= 16 && config->row_bytes[i] <= 64);
  shape = *config;
  memset(tiles, 0, sizeof tiles);
}

void attn_tiles_release(void) {
  memset(&shape, 0, sizeof shape);
}

void attn_tile_zero(int t) {
  require(shape.palette == 1);
  memset(&tiles[t], 0, sizeof tiles[t]);
}

void attn_tile_load(int t, const void *source, int64_t stride_bytes) {
  attn_tile_zero(t);
  for (int i = 0; i < shape.rows[t]; ++i)
    memcpy(tiles[t].bytes[i], (const char *)source + i * stride_bytes, shape.row_bytes[t]);
}

void attn_tile_store(int t, void *target, int64_t stride_bytes) {
  require(shape.palette == 1);
  for (int i = 0; i < shape.rows[t]; ++i)
    memcpy((char *)target + i * stride_bytes, tiles[t].bytes[i], shape.row_bytes[t]);
}

static float bf16_at(const tile *t, int row, int column) {
  uint16_t value;
  memcpy(&value, t->bytes[row] + 2 * column, sizeof value);
  return attn_bf16_to_f32(value);
}

void attn_tile_multiply_bf16(int sum, int a, int b) {
  int rows = shape.rows[sum], pairs = shape.row_bytes[a] / 4, columns = shape.row_bytes[sum] / 4;
  require(shape.palette == 1 && rows == shape.rows[a] && pairs == shape.rows[b]);
  require(shape.row_bytes[sum] == shape.row_bytes[b]);
  for (int i = 0; i < rows; ++i) {
    float row[16];
    memcpy(row, tiles[sum].bytes[i], sizeof row);
    for (int r = 0; r < pairs; ++r)
      for (int j = 0; j < columns; ++j) {
        row[j] += bf16_at(&tiles[a], i, 2 * r) * bf16_at(&tiles[b], r, 2 * j);
        row[j] += bf16_at(&tiles[a], i, 2 * r + 1) * bf16_at(&tiles[b], r, 2 * j + 1);
      }
    memcpy(tiles[sum].bytes[i], row, sizeof row);
  }
}

#endif
