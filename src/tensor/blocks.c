#include "tensor/blocks.h"

static const attn_block_format formats[ATTN_BLOCK_TYPES] = {
    [ATTN_BLOCK_F32] = {"F32", 1, 4},
    [ATTN_BLOCK_F16] = {"F16", 1, 2},
    [ATTN_BLOCK_Q4_0] = {"Q4_0", 32, 18},
    [ATTN_BLOCK_Q4_1] = {"Q4_1", 32, 20},
    [ATTN_BLOCK_Q5_0] = {"Q5_0", 32, 22},
    [ATTN_BLOCK_Q5_1] = {"Q5_1", 32, 24},
    [ATTN_BLOCK_Q8_0] = {"Q8_0", 32, 34},
    [ATTN_BLOCK_Q8_1] = {"Q8_1", 32, 36},
    [ATTN_BLOCK_Q2_K] = {"Q2_K", 256, 84},
    [ATTN_BLOCK_Q3_K] = {"Q3_K", 256, 110},
    [ATTN_BLOCK_Q4_K] = {"Q4_K", 256, 144},
    [ATTN_BLOCK_Q5_K] = {"Q5_K", 256, 176},
    [ATTN_BLOCK_Q6_K] = {"Q6_K", 256, 210},
    [ATTN_BLOCK_Q8_K] = {"Q8_K", 256, 292},
    [ATTN_BLOCK_IQ2_XXS] = {"IQ2_XXS", 256, 66},
    [ATTN_BLOCK_IQ2_XS] = {"IQ2_XS", 256, 74},
    [ATTN_BLOCK_IQ3_XXS] = {"IQ3_XXS", 256, 98},
    [ATTN_BLOCK_IQ1_S] = {"IQ1_S", 256, 50},
    [ATTN_BLOCK_IQ4_NL] = {"IQ4_NL", 32, 18},
    [ATTN_BLOCK_IQ3_S] = {"IQ3_S", 256, 110},
    [ATTN_BLOCK_IQ2_S] = {"IQ2_S", 256, 82},
    [ATTN_BLOCK_IQ4_XS] = {"IQ4_XS", 256, 136},
    [ATTN_BLOCK_I8] = {"I8", 1, 1},
    [ATTN_BLOCK_I16] = {"I16", 1, 2},
    [ATTN_BLOCK_I32] = {"I32", 1, 4},
    [ATTN_BLOCK_I64] = {"I64", 1, 8},
    [ATTN_BLOCK_F64] = {"F64", 1, 8},
    [ATTN_BLOCK_IQ1_M] = {"IQ1_M", 256, 56},
    [ATTN_BLOCK_BF16] = {"BF16", 1, 2},
    [ATTN_BLOCK_TQ1_0] = {"TQ1_0", 256, 54},
    [ATTN_BLOCK_TQ2_0] = {"TQ2_0", 256, 66},
    [ATTN_BLOCK_MXFP4] = {"MXFP4", 32, 17},
    [ATTN_BLOCK_NVFP4] = {"NVFP4", 64, 36},
    [ATTN_BLOCK_Q1_0] = {"Q1_0", 128, 18},
};

const attn_block_format *attn_block_get_format(attn_block_type type) {
  if ((unsigned)type >= ATTN_BLOCK_TYPES || !formats[type].name) return NULL;
  return &formats[type];
}
