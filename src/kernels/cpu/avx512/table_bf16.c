#include "kernels/kernels.h"

/* Kernels that need AVX512-BF16 instructions (files *_bf16.c beside this one). */
const attn_kernels attn_kernels_avx512bf16 = {
    .path = ATTN_PATH_AVX512,
    .f32_to_bf16 = attn_avx512bf16_f32_to_bf16,
    .matmul_bf16 = attn_avx512bf16_matmul_bf16,
    .softmax_tile_bf16 = attn_avx512bf16_softmax_tile_bf16,
    .softmax_grad_tile_bf16 = attn_avx512bf16_softmax_grad_tile_bf16,
    .recurrent_scale_bf16 = attn_avx512bf16_recurrent_scale_bf16,
    .recurrent_mask_bf16 = attn_avx512bf16_recurrent_mask_bf16,
    .recurrent_round_bf16 = attn_avx512bf16_recurrent_round_bf16,
    .recurrent_residual_bf16 = attn_avx512bf16_recurrent_residual_bf16,
    .recurrent_pack_bf16 = attn_avx512bf16_recurrent_pack_bf16,
    .recurrent_transpose_bf16 = attn_avx512bf16_recurrent_transpose_bf16,
};
