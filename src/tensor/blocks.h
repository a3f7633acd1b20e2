/* Block types: how weights are stored in GGUF files, from plain numbers to blocks of 32 or 256
 * elements that share scales.
 *
 * They stand here beside the dtypes, and not with the files, because a product that reads
 * quantised weights in place needs them as much as the reader of a file does. They are not dtypes:
 * an element of a block has no address, so that no attn_tensor can have strides over it. */
#ifndef ATTN_TENSOR_BLOCKS_H
#define ATTN_TENSOR_BLOCKS_H

#include "attn/base.h"

/* The numbers are those of the file format; the gaps are types that were withdrawn. */
typedef enum attn_block_type {
  ATTN_BLOCK_F32 = 0,
  ATTN_BLOCK_F16 = 1,
  ATTN_BLOCK_Q4_0 = 2,
  ATTN_BLOCK_Q4_1 = 3,
  ATTN_BLOCK_Q5_0 = 6,
  ATTN_BLOCK_Q5_1 = 7,
  ATTN_BLOCK_Q8_0 = 8,
  ATTN_BLOCK_Q8_1 = 9,
  ATTN_BLOCK_Q2_K = 10,
  ATTN_BLOCK_Q3_K = 11,
  ATTN_BLOCK_Q4_K = 12,
  ATTN_BLOCK_Q5_K = 13,
  ATTN_BLOCK_Q6_K = 14,
  ATTN_BLOCK_Q8_K = 15,
  ATTN_BLOCK_IQ2_XXS = 16,
  ATTN_BLOCK_IQ2_XS = 17,
  ATTN_BLOCK_IQ3_XXS = 18,
  ATTN_BLOCK_IQ1_S = 19,
  ATTN_BLOCK_IQ4_NL = 20,
  ATTN_BLOCK_IQ3_S = 21,
  ATTN_BLOCK_IQ2_S = 22,
  ATTN_BLOCK_IQ4_XS = 23,
  ATTN_BLOCK_I8 = 24,
  ATTN_BLOCK_I16 = 25,
  ATTN_BLOCK_I32 = 26,
  ATTN_BLOCK_I64 = 27,
  ATTN_BLOCK_F64 = 28,
  ATTN_BLOCK_IQ1_M = 29,
  ATTN_BLOCK_BF16 = 30,
  ATTN_BLOCK_TQ1_0 = 34,
  ATTN_BLOCK_TQ2_0 = 35,
  ATTN_BLOCK_MXFP4 = 39,
  ATTN_BLOCK_NVFP4 = 40,
  ATTN_BLOCK_Q1_0 = 41,
  ATTN_BLOCK_GGUF_TYPES,
  /* Not of GGUF: float8 as safetensors have it, whose scales, if any, stand elsewhere. */
  ATTN_BLOCK_F8_E4M3 = ATTN_BLOCK_GGUF_TYPES,
  ATTN_BLOCK_TYPES
} attn_block_type;

typedef struct attn_block_format {
  const char *name; /* "Q4_0" */
  int elements;     /* of one block; rows are whole blocks */
  int bytes;        /* of one block */
} attn_block_format;

/* NULL when there is no such type. The sizes of all types are known, so that a file which has them
 * can be checked and described; fewer can be converted. */
const attn_block_format *attn_block_get_format(attn_block_type type);

/* `count` elements, a multiple of the block's, to float32. `source` needs no alignment.
 * F64, F32, F16, BF16, F8_E4M3, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K to Q6_K; else ATTN_UNSUPPORTED.
 */
attn_status attn_blocks_to_f32(attn_block_type type, const void *source, float *target,
                               int64_t count);

/* The way back for F16, BF16, Q8_0 and Q4_0; else ATTN_UNSUPPORTED. Rounds as ggml does, so that
 * finite numbers give its bytes: to nearest even for F16 and BF16, to nearest away from zero for
 * Q8_0, to nearest upwards for Q4_0. In quantised blocks NaN becomes 0. */
attn_status attn_blocks_from_f32(attn_block_type type, const float *source, void *target,
                                 int64_t count);

#endif
