#include "kernels/kernels.h"

/* Kernels that need AVX512-BF16 instructions (files *_bf16.c beside this one). */
const attn_kernels attn_kernels_avx512bf16 = {
    .path = ATTN_PATH_AVX512,
    .f32_to_bf16 = attn_avx512bf16_f32_to_bf16,
    .matmul_bf16 = attn_avx512bf16_matmul_bf16,
    .row_add = attn_avx512bf16_row_add,
    .row_activate = attn_avx512bf16_row_activate,
    .row_activate_backward = attn_avx512bf16_row_activate_backward,
    .row_gate = attn_avx512bf16_row_gate,
    .row_gate_backward = attn_avx512bf16_row_gate_backward,
    .row_rms_norm = attn_avx512bf16_row_rms_norm,
    .row_rms_norm_backward = attn_avx512bf16_row_rms_norm_backward,
    .softmax_tile_bf16 = attn_avx512bf16_softmax_tile_bf16,
    .softmax_grad_tile_bf16 = attn_avx512bf16_softmax_grad_tile_bf16,
    .recurrent_scale_bf16 = attn_avx512bf16_recurrent_scale_bf16,
    .recurrent_mask_bf16 = attn_avx512bf16_recurrent_mask_bf16,
    .recurrent_round_bf16 = attn_avx512bf16_recurrent_round_bf16,
    .recurrent_residual_bf16 = attn_avx512bf16_recurrent_residual_bf16,
    .recurrent_pack_bf16 = attn_avx512bf16_recurrent_pack_bf16,
    .recurrent_transpose_bf16 = attn_avx512bf16_recurrent_transpose_bf16,
};
