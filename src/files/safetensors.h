/* safetensors: named tensors in one file, or in shards listed by an index.
 *
 * The format (github.com/huggingface/safetensors, "Format"):
 *   8 bytes        N, the length of the header, little-endian
 *   N bytes        JSON: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]},
 *                  ..., "__metadata__": {"key": "value"}}, perhaps padded with spaces
 *   the rest       the data; offsets count from its start; row-major, little-endian; the spans
 *                  cover the data without gap or overlap
 * A sharded model has an index, {"weight_map": {"name": "shard.safetensors", ...}}, beside them. */
#ifndef ATTN_FILES_SAFETENSORS_H
#define ATTN_FILES_SAFETENSORS_H

#include "attn/tensor.h"

typedef struct attn_safetensors attn_safetensors;

/* `path`: a .safetensors file; an index (.json); or a directory with model.safetensors or
 * model.safetensors.index.json. The files are mapped, not read. Everything is checked here:
 * ATTN_BAD_FORMAT names the file, the tensor and what is wrong with it. */
attn_status attn_safetensors_open(const char *path, attn_safetensors **file);
void attn_safetensors_close(attn_safetensors *file); /* NULL is fine; ends all its views */

/* Tensors in ascending order of their names. */
int64_t attn_safetensors_count(const attn_safetensors *file);
const char *attn_safetensors_name(const attn_safetensors *file, int64_t index); /* borrowed */

/* A read-only view of the mapped data, valid until close. ATTN_UNSUPPORTED for the dtypes of the
 * format that libattn lacks (unsigned 16 to 64 bits, complex). */
attn_status attn_safetensors_get(const attn_safetensors *file, int64_t index, attn_tensor *tensor);
/* The same by name. ATTN_NOT_FOUND, with the closest names, when there is none. */
attn_status attn_safetensors_find(const attn_safetensors *file, const char *name,
                                  attn_tensor *tensor);
bool attn_safetensors_has(const attn_safetensors *file, const char *name);

/* The value of a metadata key (borrowed), or NULL. */
const char *attn_safetensors_metadata(const attn_safetensors *file, const char *key);

typedef struct attn_named_tensor {
  const char *name;
  attn_tensor tensor;
} attn_named_tensor;

typedef struct attn_metadata {
  const char *key, *value;
} attn_metadata;

/* Writes tensors (CPU, any strides, dtype kept) in the given order, beside the target and renamed.
 * The data starts at a multiple of 64 bytes. */
attn_status attn_safetensors_write(const char *path, const attn_named_tensor *tensors,
                                   int64_t count, const attn_metadata *metadata,
                                   int64_t metadata_count);

#endif
