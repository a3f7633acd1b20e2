#define KERNEL(name) attn_avx512_##name
#define KERNELS_WITH_OWN_F32_TILES
#include "kernels/cpu/softmax.inc"

#include "kernels/cpu/avx512/softmax_tile.inc"

DEFINE_TILE_KERNELS(attn_avx512, f32, float, false)
