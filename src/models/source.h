/* Where a model comes from: a directory with config.json and safetensors, or a GGUF file. */
#ifndef ATTN_MODELS_SOURCE_H
#define ATTN_MODELS_SOURCE_H

#include "files/gguf.h"
#include "files/safetensors.h"
#include "models/families/family.h"
#include "models/quantization.h"

/* One of both files is there. */
typedef struct attn_source {
  char *path;         /* as given */
  json_t *config;     /* of a GGUF file as its family's config.json would have it */
  json_t *generation; /* generation_config.json, of a GGUF file what it would be; or NULL */
  attn_quantization quantization; /* of safetensors */
  attn_safetensors *safetensors;
  attn_gguf *gguf;
} attn_source;

/* Whether a path is that of a GGUF file: by its name, and no directory. */
bool attn_is_gguf(const char *path);
/* ATTN_NOT_FOUND, ATTN_BAD_FORMAT, ATTN_UNSUPPORTED. */
attn_status attn_source_open(const char *path, attn_source *source);
void attn_source_close(attn_source *source); /* ends what was borrowed from it */

/* A tensor of the source, borrowed. */
typedef struct attn_stored {
  int rank;
  int64_t shape[ATTN_MAX_RANK];
  int64_t count;
  attn_dtype dtype;     /* of plain numbers */
  attn_block_type type; /* of GGUF's tensors, with plain numbers too */
  bool in_blocks;       /* quantised: there is no dtype */
  const void *data;
  /* Of float8 that is to be multiplied by them: float32 or a narrower dtype, checked; no data where
   * there are none. Those of a matrix are its last two axes, each for a block of it. */
  attn_tensor scales;
  int64_t block_rows, block_columns;
} attn_stored;

/* Where the source keeps a parameter: as attn_family_place, by the name that is there. */
attn_status attn_source_place(const attn_source *source, const attn_model_config *config,
                              const attn_parameter_shape *shape, attn_place *place);
/* The i-th tensor's name, borrowed; NULL beyond the last. */
const char *attn_source_tensor(const attn_source *source, int64_t i);
/* By its name there. ATTN_NOT_FOUND or ATTN_BAD_FORMAT when it should have scales and they are not
 * there, or are not those of its shape. */
attn_status attn_source_find(const attn_source *source, const char *name, attn_stored *stored);

#endif
