#include "kernels/kernels.h"

/* clang-format off */

const attn_kernels attn_kernels_generic = {
    .path = ATTN_PATH_GENERIC,
#define USE(result, name, parameters) .name = attn_generic_##name,
    ATTN_KERNEL_LIST(USE)
#undef USE
};
