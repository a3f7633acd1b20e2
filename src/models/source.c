#include "models/source.h"
#include "base/io.h"
#include "base/memory.h"
#include "base/status.h"
#include "files/json.h"
#include "models/generation.h"

#include <stdio.h>
#include <string.h>

bool attn_is_gguf(const char *path) {
  return attn_path_has_suffix(path, ".gguf") && !attn_path_is_directory(path);
}

/* A file that not every model has. */
static attn_status load_if_there(const attn_source *source, const char *name, json_t **json) {
  char *path = attn_path_join(source->path, name);
  if (!path) return ATTN_OUT_OF_MEMORY;
  attn_status status = attn_path_exists(path) ? attn_json_load(path, json) : ATTN_OK;
  attn_free(path);
  return status;
}

static attn_status open_directory(attn_source *source) {
  char *path = attn_path_join(source->path, "config.json");
  if (!path) return ATTN_OUT_OF_MEMORY;
  attn_status status = attn_json_load(path, &source->config);
  attn_free(path);
  ATTN_TRY(status);
  status = attn_quantization_read(source->config, &source->quantization);
  if (status != ATTN_OK) return attn_fail_in(status, "%s", source->path);
  ATTN_TRY(load_if_there(source, "generation_config.json", &source->generation));
  return attn_safetensors_open(source->path, &source->safetensors);
}

static attn_status open_gguf(attn_source *source) {
  ATTN_TRY(attn_gguf_open(source->path, &source->gguf));
  attn_status status = attn_family_config_from_gguf(source->gguf, &source->config);
  if (status == ATTN_OK) status = attn_generation_from_gguf(source->gguf, &source->generation);
  return status == ATTN_OK ? ATTN_OK : attn_fail_in(status, "%s", source->path);
}

attn_status attn_source_open(const char *path, attn_source *source) {
  *source = (attn_source){.path = attn_strdup(path)};
  if (!source->path) return ATTN_OUT_OF_MEMORY;
  attn_status status = attn_is_gguf(path) ? open_gguf(source) : open_directory(source);
  if (status != ATTN_OK) attn_source_close(source);
  return status;
}

void attn_source_close(attn_source *source) {
  attn_safetensors_close(source->safetensors);
  attn_gguf_close(source->gguf);
  json_decref(source->config);
  json_decref(source->generation);
  attn_free(source->path);
  *source = (attn_source){0};
}

static bool plain_dtype(attn_block_type type, attn_dtype *dtype) {
  switch (type) {
  case ATTN_BLOCK_F32: *dtype = ATTN_F32; return true;
  case ATTN_BLOCK_F16: *dtype = ATTN_F16; return true;
  case ATTN_BLOCK_BF16: *dtype = ATTN_BF16; return true;
  case ATTN_BLOCK_F64: *dtype = ATTN_F64; return true;
  default: return false;
  }
}

/* The file's own name for `name`: as it is, behind one of the family's prefixes, or the older name
 * of a norm's weight or bias; unchanged when there is none of them. */
static void as_stored(const attn_source *source, const attn_family *family, char *name,
                      size_t size) {
  static const char *const endings[][2] = {{".weight", ".gamma"}, {".bias", ".beta"}};
  char tried[ATTN_PLACE_NAME];
  for (int older = 0; older <= (family->gamma_beta ? 2 : 0); ++older) {
    size_t length = strlen(name), end = older ? strlen(endings[older - 1][0]) : 0;
    if (older && !attn_path_has_suffix(name, endings[older - 1][0])) continue;
    for (const char *const *prefix = family->prefixes;; ++prefix) {
      snprintf(tried, sizeof tried, "%s%.*s%s", prefix && *prefix ? *prefix : "",
               (int)(length - end), name, older ? endings[older - 1][1] : "");
      if (attn_safetensors_has(source->safetensors, tried)) {
        snprintf(name, size, "%s", tried);
        return;
      }
      if (!prefix || !*prefix) break;
    }
  }
}

static bool gguf_has(const attn_gguf *file, const char *name) {
  const attn_gguf_tensor *tensor;
  return attn_gguf_find(file, name, &tensor) == ATTN_OK;
}

attn_status attn_source_place(const attn_source *source, const attn_model_config *config,
                              const attn_parameter_shape *shape, attn_place *place) {
  attn_place older;
  ATTN_TRY(
      attn_family_place(config, shape, source->gguf ? ATTN_IN_GGUF : ATTN_IN_SAFETENSORS, place));
  if (source->gguf && config->family->gguf_older && !gguf_has(source->gguf, place->name) &&
      attn_family_place(config, shape, ATTN_IN_OLDER_GGUF, &older) == ATTN_OK &&
      gguf_has(source->gguf, older.name))
    *place = older;
  if (source->safetensors) as_stored(source, config->family, place->name, sizeof place->name);
  return ATTN_OK;
}

const char *attn_source_tensor(const attn_source *source, int64_t i) {
  if (!source->gguf)
    return i < attn_safetensors_count(source->safetensors)
               ? attn_safetensors_name(source->safetensors, i)
               : NULL;
  const attn_gguf_tensor *tensor = attn_gguf_tensor_at(source->gguf, i);
  return tensor ? tensor->name : NULL;
}

static attn_status find_in_gguf(const attn_gguf *file, const char *name, attn_stored *stored) {
  const attn_gguf_tensor *tensor;
  ATTN_TRY(attn_gguf_find(file, name, &tensor));
  *stored = (attn_stored){
      .rank = tensor->rank, .count = tensor->count, .type = tensor->type, .data = tensor->data};
  memcpy(stored->shape, tensor->shape, sizeof tensor->shape);
  stored->in_blocks = !plain_dtype(tensor->type, &stored->dtype);
  return ATTN_OK;
}

static int64_t blocks_of(int64_t extent, int64_t block) {
  return (extent + block - 1) / block;
}

static attn_status check_scales(const char *name, const attn_stored *stored,
                                const attn_tensor *scales) {
  int last = stored->rank - 1, end = scales->rank - 1;
  int64_t rows = blocks_of(stored->shape[last - 1], stored->block_rows);
  int64_t columns = blocks_of(stored->shape[last], stored->block_columns);
  bool fits = scales->rank == stored->rank;
  for (int i = 0; fits && i < last - 1; ++i) fits = scales->shape[i] == stored->shape[i];
  if (!fits || scales->shape[last - 1] != rows || scales->shape[last] != columns)
    return attn_fail(ATTN_BAD_FORMAT,
                     "%s%s is [%lld, %lld] of rank %d, expected [%lld, %lld] of rank %d: one for "
                     "each block of %lld x %lld",
                     name, attn_scale_suffix, end > 0 ? (long long)scales->shape[end - 1] : 1,
                     end >= 0 ? (long long)scales->shape[end] : 1, scales->rank, (long long)rows,
                     (long long)columns, stored->rank, (long long)stored->block_rows,
                     (long long)stored->block_columns);
  switch (scales->dtype) {
  case ATTN_F32:
  case ATTN_BF16:
  case ATTN_F16:
  case ATTN_F8_E8M0: return ATTN_OK;
  default:
    return attn_fail(ATTN_UNSUPPORTED,
                     "%s%s is %s; scales are float32, bfloat16, float16 or float8_e8m0", name,
                     attn_scale_suffix, attn_dtype_name(scales->dtype));
  }
}

/* The scales of a float8 tensor, where config.json says that there are some. */
static attn_status find_scales(const attn_source *source, const char *name, attn_stored *stored) {
  const attn_quantization *q = &source->quantization;
  char scales[ATTN_PLACE_NAME + 16];
  bool float8 = stored->dtype == ATTN_F8_E4M3 || stored->dtype == ATTN_F8_E5M2;
  if (!q->block_rows || !float8) return ATTN_OK;
  if (stored->dtype != ATTN_F8_E4M3 || stored->rank < 2)
    return attn_fail(ATTN_UNSUPPORTED, "%s is %s of rank %d; with scales it is float8_e4m3 of 2",
                     name, attn_dtype_name(stored->dtype), stored->rank);
  snprintf(scales, sizeof scales, "%s%s", name, attn_scale_suffix);
  stored->block_rows = q->block_rows;
  stored->block_columns = q->block_columns;
  if (!attn_safetensors_has(source->safetensors, scales))
    return attn_fail(ATTN_NOT_FOUND, "%s is missing: the scales of %s, which is float8_e4m3",
                     scales, name);
  ATTN_TRY(attn_safetensors_find(source->safetensors, scales, &stored->scales));
  return check_scales(name, stored, &stored->scales);
}

attn_status attn_source_find(const attn_source *source, const char *name, attn_stored *stored) {
  attn_tensor tensor;
  if (source->gguf) return find_in_gguf(source->gguf, name, stored);
  ATTN_TRY(attn_safetensors_find(source->safetensors, name, &tensor));
  *stored = (attn_stored){.rank = tensor.rank,
                          .count = attn_tensor_count(&tensor),
                          .dtype = tensor.dtype,
                          .data = tensor.data};
  memcpy(stored->shape, tensor.shape, sizeof tensor.shape);
  return find_scales(source, name, stored);
}
