/* What the reader and the writer of safetensors have in common. */
#ifndef ATTN_FILES_SAFETENSORS_FORMAT_H
#define ATTN_FILES_SAFETENSORS_FORMAT_H

#include "attn/tensor.h"

enum {
  ATTN_SAFETENSORS_LENGTH_BYTES = 8,
  ATTN_SAFETENSORS_LARGEST_HEADER = 100 << 20,
  ATTN_SAFETENSORS_MOST_SHARDS = 4096,
};

#define ATTN_SAFETENSORS_METADATA "__metadata__"

/* A dtype of the format. `dtype` is ATTN_DTYPE_COUNT where libattn has no such dtype. */
typedef struct attn_format_dtype {
  const char *name;
  attn_dtype dtype;
  int bits; /* of an element; elements of less than a byte lie side by side */
} attn_format_dtype;

/* NULL: there is none. */
const attn_format_dtype *attn_format_dtype_named(const char *name);
const attn_format_dtype *attn_format_dtype_of(attn_dtype dtype);

/* The bytes of a tensor. ATTN_BAD_FORMAT: the number overflows, or is not whole. */
attn_status attn_format_bytes_of(const attn_format_dtype *dtype, int rank, const int64_t *shape,
                                 uint64_t *bytes);

#endif
