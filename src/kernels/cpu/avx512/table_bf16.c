#include "kernels/kernels.h"

/* Kernels that need AVX512-BF16 instructions (files *_bf16.c beside this one). */
const attn_kernels attn_kernels_avx512bf16 = {
    .path = ATTN_PATH_AVX512,
    .f32_to_bf16 = attn_avx512bf16_f32_to_bf16,
    .matmul_bf16 = attn_avx512bf16_matmul_bf16,
    .softmax_tile_bf16 = attn_avx512bf16_softmax_tile_bf16,
    .softmax_grad_tile_bf16 = attn_avx512bf16_softmax_grad_tile_bf16,
};
