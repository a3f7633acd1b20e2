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

/* What a file says of a tensor, whether libattn has the dtype or not. */
typedef struct attn_described_tensor {
  const char *name;
  const char *dtype; /* of the format, "BF16" */
  int rank;
  int64_t shape[ATTN_MAX_RANK];
  const void *data; /* of one that was read, at any alignment; not needed to begin a file */
  uint64_t bytes;
} attn_described_tensor;
/* The format's name of a dtype of libattn. */
const char *attn_safetensors_dtype(attn_dtype dtype);
/* Borrowed. */
attn_status attn_safetensors_describe(const attn_safetensors *file, int64_t index,
                                      attn_described_tensor *tensor);

/* Writing (safetensors_write.c) ------------------------------------------------------------------
 */

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

/* The same for tensors that come one at a time, so that no two have to be in memory: the header,
 * which has to be known from the start, then the data of each in the order of the header. Any dtype
 * of the format. */
typedef struct attn_safetensors_writer attn_safetensors_writer;
attn_status attn_safetensors_writer_open(const char *path, const attn_described_tensor *tensors,
                                         int64_t count, const attn_metadata *metadata,
                                         int64_t metadata_count, attn_safetensors_writer **writer);
/* The next tensor, row-major. ATTN_INVALID_ARGUMENT when it has other than the bytes announced. */
attn_status attn_safetensors_writer_add(attn_safetensors_writer *writer, const void *data,
                                        uint64_t bytes);
/* All data is there and on the disk, in a file beside the target that commit renames to it: to be
 * called before, where several files should appear together. */
attn_status attn_safetensors_writer_finish(attn_safetensors_writer *writer);
/* Both free the writer and leave no temporary behind. */
attn_status attn_safetensors_writer_commit(attn_safetensors_writer *writer);
void attn_safetensors_writer_abort(attn_safetensors_writer *writer); /* NULL is fine */

/* A model as a directory (safetensors_shards.c): model.safetensors, or, where the tensors take more
 * than shard_bytes (0: no limit), model-00001-of-0000N.safetensors and so on with
 * model.safetensors.index.json. Tensors stay in their order; a larger one has a file of its own, as
 * Transformers divides them.
 *
 * All files are written whole before the first one is renamed. Weights that lay in the directory
 * under these names, in another number of shards too, are gone afterwards; until all new ones are
 * written they are as they were. Where shards replace others of the same names, a crash between
 * two renamings leaves no index, and so no model, rather than a mixture.
 *
 * `make` gives tensor `index`, contiguous and as described; it is destroyed after it was written.
 */
typedef attn_status attn_make_tensor(void *context, int64_t index, attn_tensor *tensor);
attn_status attn_safetensors_save(const char *directory, const attn_described_tensor *tensors,
                                  int64_t count, int64_t shard_bytes, attn_make_tensor *make,
                                  void *context);

#endif
