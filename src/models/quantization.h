/* quantization_config of config.json: float8 weights with a scale for each block of a matrix, as
 * DeepSeek-V3 and Qwen3 publish them (Transformers' FineGrainedFP8Config). */
#ifndef ATTN_MODELS_QUANTIZATION_H
#define ATTN_MODELS_QUANTIZATION_H

#include "files/json.h"

/* W [rows, columns] in E4M3 has scales [ceil(rows / block_rows), ceil(columns / block_columns)],
 * which its numbers are multiplied by, in the tensor of its name and attn_scale_suffix. */
typedef struct attn_quantization {
  int64_t block_rows, block_columns; /* 0: weights are plain numbers */
} attn_quantization;

extern const char attn_quantization_key[], attn_scale_suffix[];

/* ATTN_UNSUPPORTED names other methods and formats. */
attn_status attn_quantization_read(const json_t *config, attn_quantization *quantization);

#endif
