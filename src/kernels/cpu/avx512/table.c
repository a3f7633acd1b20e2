#include "kernels/kernels.h"

/* clang-format off */

const attn_kernels attn_kernels_avx512 = {
    .path = ATTN_PATH_AVX512,
#define USE(result, name, parameters) .name = attn_avx512_##name,
    ATTN_CONVERT_KERNELS(USE)
    ATTN_MATVEC_KERNELS(USE)
    ATTN_BLOCKS_KERNELS(USE)
    ATTN_ROWS_KERNELS(USE)
    ATTN_RECURRENT_KERNELS(USE)
    ATTN_NEWTON_SCHULZ_KERNELS(USE)
    ATTN_ONLINE_MEMORY_KERNELS(USE)
    ATTN_SOFTMAX_FLOAT_KERNELS(USE)
#undef USE
    .pack_f32 = attn_avx512_pack_f32,
    .pack_bf16 = attn_avx512_pack_bf16,
    .matmul_f32 = attn_avx512_matmul_f32,
    .matmul_bf16 = attn_avx512_matmul_bf16,
};
