#define WITH_BF16
#include "kernels/cpu/avx512/softmax_tile.inc"

DEFINE_TILE_KERNELS(attn_avx512bf16, bf16, uint16_t, true)
