#include "kernels/kernels.h"

/* clang-format off */

/* Kernels that need AVX512-VNNI instructions (files *_vnni.c beside this one). */
const attn_kernels attn_kernels_avx512vnni = {
    .path = ATTN_PATH_AVX512,
#define USE(name, type) .matvec_##name = attn_avx512vnni_matvec_##name,
    ATTN_BLOCKS_TYPES(USE)
#undef USE
};
