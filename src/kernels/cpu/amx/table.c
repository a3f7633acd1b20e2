#include "kernels/kernels.h"

/* clang-format off */

void attn_amx_begin(void);
void attn_amx_end(void);

const attn_kernels attn_kernels_amx = {
    .path = ATTN_PATH_AMX,
    .begin = attn_amx_begin,
    .end = attn_amx_end,
    .matmul_bf16 = attn_amx_matmul_bf16,
    .softmax_run_bf16 = attn_amx_softmax_run_bf16,
    .softmax_grad_run_bf16 = attn_amx_softmax_grad_run_bf16,
};
