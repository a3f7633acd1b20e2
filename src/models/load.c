/* Loading a model: its parameters take their values from the tensors of a source. */
#include "base/memory.h"
#include "base/status.h"
#include "models/model.h"

#include <stdlib.h>
#include <string.h>

/* Checks ----------------------------------------------------------------------------------------*/

/* Extents of 1 may differ: a depthwise convolution is stored as [channels, 1, taps]. */
static attn_status check_shape(const attn_parameter_shape *shape, const attn_stored *stored) {
  int64_t expected = shape->rank == 2 ? shape->shape[0] * shape->shape[1] : shape->shape[0];
  int64_t rows = stored->rank ? stored->shape[0] : 1;
  if (stored->count == expected && rows == shape->shape[0]) return ATTN_OK;
  return attn_fail(ATTN_BAD_FORMAT, "%s has %lld elements in %lld rows, expected %lld in %lld",
                   shape->name, (long long)stored->count, (long long)rows, (long long)expected,
                   (long long)shape->shape[0]);
}

/* Values ----------------------------------------------------------------------------------------*/

/* Queries and keys of some families are stored in GGUF with the channels of a head that turn
 * together side by side: which row of the file is row r of ours. `dim`: rows of a head; 0: the
 * same.
 */
static int64_t source_row(int64_t r, int64_t dim) {
  if (dim < 2) return r;
  int64_t head = r / dim, in_head = r % dim, half = dim / 2;
  return head * dim + in_head % half * 2 + in_head / half;
}

static int64_t reordered_dim(const attn_model *model, const attn_parameter_shape *shape) {
  static const char prefix[] = "model.layers.";
  if (!model->source.gguf || !model->config.family->gguf_pairs_together) return 0;
  if (!strstr(shape->name, ".q_proj.") && !strstr(shape->name, ".k_proj.")) return 0;
  long layer = strtol(shape->name + sizeof prefix - 1, NULL, 10);
  return model->config.layers[layer].options.dim;
}

/* A copy in `dtype`, row by row. */
static attn_status convert(const attn_parameter_shape *shape, const attn_stored *stored,
                           int64_t dim, attn_dtype dtype, attn_tensor *value) {
  int64_t rows = shape->shape[0], columns = stored->count / rows;
  ATTN_TRY(attn_tensor_create(dtype, shape->rank, shape->shape, value));
  if (stored->in_blocks) /* a vector: one row */
    return attn_blocks_to_f32(stored->type, stored->data, value->data, stored->count);
  attn_status status = ATTN_OK;
  for (int64_t r = 0; r < rows && status == ATTN_OK; ++r) {
    int64_t size = columns * (int64_t)attn_dtype_size(stored->dtype);
    attn_tensor from, to;
    status = attn_tensor_wrap((char *)(uintptr_t)stored->data + source_row(r, dim) * size,
                              stored->dtype, 1, &columns, &from);
    if (status == ATTN_OK)
      status = attn_tensor_wrap((char *)value->data + r * columns * (int64_t)attn_dtype_size(dtype),
                                dtype, 1, &columns, &to);
    if (status == ATTN_OK) status = attn_tensor_copy(&from, &to);
  }
  return status;
}

/* Rows of blocks in our order, for as long as the model lives. */
static attn_status reorder_blocks(const attn_parameter_shape *shape, const attn_stored *stored,
                                  int64_t dim, void **copy) {
  const attn_block_format *format = attn_block_get_format(stored->type);
  size_t row = (size_t)(shape->shape[1] / format->elements * format->bytes);
  char *rows = attn_alloc_array((size_t)shape->shape[0], row);
  if (!rows) return ATTN_OUT_OF_MEMORY;
  for (int64_t r = 0; r < shape->shape[0]; ++r)
    memcpy(rows + (size_t)r * row, (const char *)stored->data + (size_t)source_row(r, dim) * row,
           row);
  *copy = rows;
  return ATTN_OK;
}

/* A matrix stays in its blocks, which products and look-ups read in place. */
static attn_status bind_blocks(attn_model *model, int64_t index, const attn_stored *stored,
                               int64_t dim) {
  const attn_parameter_shape *shape = &model->shapes[index];
  attn_parameter *parameter = &model->parameters[index];
  if (shape->rank != 2) return convert(shape, stored, dim, ATTN_F32, &parameter->value);
  void *copy = NULL;
  ATTN_TRY(attn_blocks_to_f32(stored->type, stored->data, NULL, 0)); /* whether that can be done */
  if (dim) ATTN_TRY(reorder_blocks(shape, stored, dim, &copy));
  parameter->blocks = copy ? copy : stored->data;
  parameter->block_type = stored->type;
  model->borrowed[index] = !copy;
  return attn_tensor_wrap(NULL, ATTN_F32, shape->rank, shape->shape, &parameter->value);
}

/* Takes one tensor of the source: as it lies there, or converted when no kernel reads its dtype. */
static attn_status bind(attn_model *model, int64_t index) {
  const attn_parameter_shape *shape = &model->shapes[index];
  attn_tensor *value = &model->parameters[index].value;
  attn_stored stored;
  ATTN_TRY(attn_source_find(&model->source, model->config.family, shape->name, &stored));
  ATTN_TRY(check_shape(shape, &stored));
  int64_t dim = reordered_dim(model, shape);
  if (stored.in_blocks) return bind_blocks(model, index, &stored, dim);
  if (attn_model_norm_offset(model, index) && model->source.safetensors) {
    ATTN_TRY(convert(shape, &stored, 0, ATTN_F32, value));
    for (int64_t i = 0; i < stored.count; ++i) ((float *)value->data)[i] += 1;
    return ATTN_OK;
  }
  if (stored.dtype == ATTN_F16) return convert(shape, &stored, dim, ATTN_F32, value);
  if (stored.dtype != ATTN_F32 && stored.dtype != ATTN_BF16 && stored.dtype != ATTN_F64)
    return attn_fail(ATTN_UNSUPPORTED,
                     "%s is %s; weights are float64, float32, bfloat16 or float16", shape->name,
                     attn_dtype_name(stored.dtype));
  if (dim) return convert(shape, &stored, dim, stored.dtype, value);
  model->borrowed[index] = true;
  return attn_tensor_wrap((void *)(uintptr_t)stored.data, stored.dtype, shape->rank, shape->shape,
                          value);
}

/* Everything used? --------------------------------------------------------------------------------
 * A tensor that the model does not know is one that it would compute without. */

static int by_name(const void *a, const void *b) {
  return strcmp(*(char *const *)a, *(char *const *)b);
}

/* Tables that older checkpoints keep beside the weights, what rotary embedding is made of, and a
 * head that is the embedding. */
static bool may_be_left(const attn_model *model, const char *name) {
  static const char *const ends[] = {".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"};
  size_t length = strlen(name);
  for (size_t i = 0; i < sizeof ends / sizeof *ends; ++i) {
    size_t end = strlen(ends[i]);
    if (length >= end && strcmp(name + length - end, ends[i]) == 0) return true;
  }
  if (model->source.safetensors && attn_family_leaves(model->config.family, name)) return true;
  return strcmp(name, "rope_freqs.weight") == 0 ||
         (model->config.tied && strcmp(name, "lm_head.weight") == 0);
}

static attn_status name_all(const attn_model *model, char **names, int64_t *made) {
  char name[256];
  for (*made = 0; *made < model->parameter_count; ++*made) {
    ATTN_TRY(attn_source_name(&model->source, model->config.family, model->shapes[*made].name, name,
                              sizeof name));
    names[*made] = attn_strdup(name);
    if (!names[*made]) return ATTN_OUT_OF_MEMORY;
  }
  return ATTN_OK;
}

static attn_status check_all_used(const attn_model *model) {
  int64_t made = 0;
  char **names = attn_alloc_array((size_t)model->parameter_count, sizeof *names);
  attn_status status = names ? name_all(model, names, &made) : ATTN_OUT_OF_MEMORY;
  if (status == ATTN_OK) qsort(names, (size_t)made, sizeof *names, by_name);
  const char *name;
  for (int64_t i = 0; status == ATTN_OK && (name = attn_source_tensor(&model->source, i)); ++i)
    if (!bsearch(&name, names, (size_t)made, sizeof *names, by_name) && !may_be_left(model, name))
      status = attn_fail(ATTN_UNSUPPORTED, "the family %s has no place for the tensor %s",
                         model->config.type, name);
  for (int64_t i = 0; i < made; ++i) attn_free(names[i]);
  attn_free(names);
  return status;
}

static attn_status load(const char *path, attn_dtype compute, attn_model *model) {
  ATTN_TRY(attn_source_open(path, &model->source));
  ATTN_TRY(attn_model_start(json_incref(model->source.config), path, compute, model));
  for (int64_t i = 0; i < model->parameter_count; ++i) {
    attn_status status = bind(model, i);
    if (status != ATTN_OK) return attn_fail_in(status, "%s", path);
  }
  attn_status status = check_all_used(model);
  if (status != ATTN_OK) return attn_fail_in(status, "%s", path);
  ATTN_TRY(attn_model_make_weights(model));
  status = attn_model_text_load(&model->source, &model->text);
  if (status == ATTN_OK)
    status = attn_embedding_config_load(&model->source, &model->config, &model->embedding_config);
  return status == ATTN_OK ? ATTN_OK : attn_fail_in(status, "%s", path);
}

attn_status attn_model_load(const char *path, attn_dtype compute, attn_model **model) {
  ATTN_TRY(attn_model_check_compute(compute));
  attn_model *made = attn_alloc_zero(sizeof *made);
  if (!made) return ATTN_OUT_OF_MEMORY;
  attn_status status = load(path, compute, made);
  if (status == ATTN_OK)
    *model = made;
  else
    attn_model_destroy(made);
  return status;
}
