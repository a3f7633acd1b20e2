#include "kernels/kernels.h"

const attn_kernels attn_kernels_amx = {
    .path = ATTN_PATH_AMX,
};
