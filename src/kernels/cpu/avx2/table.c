#include "kernels/kernels.h"

const attn_kernels attn_kernels_avx2 = {
    .path = ATTN_PATH_AVX2,
#define USE(result, name, parameters) .name = attn_avx2_##name,
    ATTN_ROWS_KERNELS(USE)
    ATTN_RECURRENT_KERNELS(USE)
#undef USE
};
