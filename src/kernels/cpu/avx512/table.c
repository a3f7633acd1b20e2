#include "kernels/kernels.h"

const attn_kernels attn_kernels_avx512 = {
    .path = ATTN_PATH_AVX512,
#define USE(result, name, parameters) .name = attn_avx512_##name,
    ATTN_ROWS_KERNELS(USE)
    ATTN_RECURRENT_KERNELS(USE)
#undef USE
};
