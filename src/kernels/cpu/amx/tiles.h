/* The AMX instructions that the kernels use, by the names of their operations.
 *
 * With ATTN_EMULATE_AMX (a CMake option, for tests) they are functions in portable C that follow
 * the instructions' definition (Intel's Software Developer's Manual, TDPBF16PS and TILELOADD), so
 * that every AMX kernel runs, and can be checked by the sanitizers, on machines without AMX. */
#ifndef ATTN_KERNELS_AMX_TILES_H
#define ATTN_KERNELS_AMX_TILES_H

#include <stddef.h>
#include <stdint.h>

typedef struct __attribute__((aligned(64))) attn_tile_config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
} attn_tile_config;

#if defined(ATTN_EMULATE_AMX)

void attn_tiles_configure(const attn_tile_config *config);
void attn_tiles_release(void);
void attn_tile_zero(int tile);
void attn_tile_load(int tile, const void *source, int64_t stride_bytes);
void attn_tile_store(int tile, void *target, int64_t stride_bytes);
void attn_tile_multiply_bf16(int sum, int a, int b);
#define attn_tiles_see_memory() ((void)0)

#else

#include <immintrin.h>

/* Tile numbers are immediates of the instructions, hence macros. */
#define attn_tiles_configure(config)                _tile_loadconfig(config)
#define attn_tiles_release()                        _tile_release()
#define attn_tile_zero(tile)                        _tile_zero(tile)
#define attn_tile_load(tile, source, stride_bytes)  _tile_loadd(tile, source, stride_bytes)
#define attn_tile_store(tile, target, stride_bytes) _tile_stored(tile, target, stride_bytes)
#define attn_tile_multiply_bf16(sum, a, b)          _tile_dpbf16ps(sum, a, b)
/* Compilers do not know that a tile load reads memory: between writing to memory otherwise and
 * loading tiles from it. */
#define attn_tiles_see_memory()                     __asm__ volatile("" ::: "memory")

#endif

/* What every kernel may rely on between begin and end: all eight tiles have 16 rows of 64 bytes. */
extern const attn_tile_config attn_full_tiles;

#endif
