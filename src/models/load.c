/* Loading a model: its parameters take their values from the tensors of a source. */
#include "base/memory.h"
#include "base/status.h"
#include "models/model.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Where -------------------------------------------------------------------------------------------
 * A parameter's tensor, and which of the tensor's rows are the parameter's. */

typedef struct origin {
  attn_place place;
  attn_stored stored;
  int64_t rows;  /* of the stored tensor, whose last axis is a row */
  bool in_order; /* the parameter's rows lie one behind the other, from row `first` on */
  int64_t first;
} origin;

/* The longest axis but 1s from the end: a depthwise convolution is stored as [channels, 1, taps],
 * rates of decay as [1, 1, heads, 1]. */
static int64_t last_axis(int rank, const int64_t *shape) {
  for (int i = rank - 1; i >= 0; --i)
    if (shape[i] != 1) return shape[i];
  return 1;
}

static attn_status check_shape(const attn_parameter_shape *shape, const origin *from) {
  const attn_stored *stored = &from->stored;
  int64_t columns = shape->rank == 2 ? shape->shape[1] : 1, rows = shape->shape[0];
  bool fits = stored->count == from->rows * columns;
  if (columns > 1) fits = fits && last_axis(stored->rank, stored->shape) == columns;
  if (!from->place.rows.part && from->rows != rows) fits = false;
  if (fits && attn_row_map_at(&from->place.rows, rows - 1) < from->rows) return ATTN_OK;
  return attn_fail(
      ATTN_BAD_FORMAT, "%s has %lld elements in rows of %lld, expected %lld rows of %lld",
      from->place.name, (long long)stored->count, (long long)last_axis(stored->rank, stored->shape),
      (long long)rows, (long long)columns);
}

/* A head's matrix lies there as columns: rows of the tensor are as long as the head has rows here.
 */
static attn_status check_transposed(const attn_parameter_shape *shape, const origin *from) {
  const attn_stored *stored = &from->stored;
  int64_t head = from->place.transposed, rows = shape->shape[0], columns = shape->shape[1];
  if (rows % head == 0 && stored->count == rows * columns &&
      stored->shape[stored->rank - 1] == head)
    return ATTN_OK;
  return attn_fail(ATTN_BAD_FORMAT,
                   "%s has %lld elements in rows of %lld, expected %lld of %lld in rows of %lld",
                   from->place.name, (long long)stored->count,
                   (long long)stored->shape[stored->rank - 1], (long long)rows, (long long)columns,
                   (long long)head);
}

static attn_status find(const attn_model *model, const attn_parameter_shape *shape, origin *from) {
  ATTN_TRY(attn_source_place(&model->source, &model->config, shape, &from->place));
  ATTN_TRY(attn_source_find(&model->source, from->place.name, &from->stored));
  if (from->place.transposed) return check_transposed(shape, from);
  const attn_row_map *map = &from->place.rows;
  int64_t columns = shape->rank == 2 ? shape->shape[1] : 1;
  from->rows = from->stored.count / columns;
  from->first = attn_row_map_at(map, 0);
  from->in_order = !map->head && (!map->run || map->run >= shape->shape[0]);
  return check_shape(shape, from);
}

/* Values ----------------------------------------------------------------------------------------*/

/* A copy in `dtype`, row by row. */
static attn_status convert(const attn_parameter_shape *shape, const origin *from, attn_dtype dtype,
                           attn_tensor *value) {
  const attn_stored *stored = &from->stored;
  int64_t rows = shape->shape[0], columns = shape->rank == 2 ? shape->shape[1] : 1;
  ATTN_TRY(attn_tensor_create(dtype, shape->rank, shape->shape, value));
  if (stored->in_blocks) { /* a vector: one row */
    if (!from->place.rows.part)
      return attn_blocks_to_f32(stored->type, stored->data, value->data, stored->count);
    return attn_fail(ATTN_UNSUPPORTED, "%s: part of a quantised vector", from->place.name);
  }
  attn_status status = ATTN_OK;
  int64_t size = columns * (int64_t)attn_dtype_size(stored->dtype);
  for (int64_t r = 0; r < rows && status == ATTN_OK; ++r) {
    attn_tensor source, target;
    status = attn_tensor_wrap((char *)(uintptr_t)stored->data +
                                  attn_row_map_at(&from->place.rows, r) * size,
                              stored->dtype, 1, &columns, &source);
    if (status == ATTN_OK)
      status = attn_tensor_wrap((char *)value->data + r * columns * (int64_t)attn_dtype_size(dtype),
                                dtype, 1, &columns, &target);
    if (status == ATTN_OK) status = attn_tensor_copy(&source, &target);
  }
  return status;
}

/* Row `r` of a stored tensor, whose rows have `count` elements, as `dtype`: float32 of blocks. */
static attn_status read_row(const attn_stored *stored, int64_t r, int64_t count, attn_dtype dtype,
                            void *row) {
  attn_tensor source, target;
  if (stored->in_blocks) {
    const attn_block_format *format = attn_block_get_format(stored->type);
    int64_t size = count / format->elements * format->bytes;
    return attn_blocks_to_f32(stored->type, (const char *)stored->data + r * size, row, count);
  }
  int64_t size = count * (int64_t)attn_dtype_size(stored->dtype);
  ATTN_TRY(attn_tensor_wrap((char *)(uintptr_t)stored->data + r * size, stored->dtype, 1, &count,
                            &source));
  ATTN_TRY(attn_tensor_wrap(row, dtype, 1, &count, &target));
  return attn_tensor_copy(&source, &target);
}

/* A copy of what is stored as columns of each head; blocks, which lie across our rows, become
 * float32. */
static attn_status convert_transposed(const attn_parameter_shape *shape, const origin *from,
                                      attn_tensor *value) {
  const attn_stored *stored = &from->stored;
  int64_t head = from->place.transposed, columns = shape->shape[1];
  bool widened = stored->in_blocks || stored->dtype == ATTN_F16;
  attn_dtype dtype = widened ? ATTN_F32 : stored->dtype;
  size_t size = attn_dtype_size(dtype);
  ATTN_TRY(attn_tensor_create(dtype, shape->rank, shape->shape, value));
  char *row = attn_alloc_array((size_t)head, size);
  attn_status status = row ? ATTN_OK : ATTN_OUT_OF_MEMORY;
  for (int64_t r = 0; r < shape->shape[0] / head * columns && status == ATTN_OK; ++r) {
    char *first = (char *)value->data + (size_t)(r / columns * head * columns + r % columns) * size;
    status = read_row(stored, r, head, dtype, row);
    for (int64_t i = 0; i < head && status == ATTN_OK; ++i)
      memcpy(first + (size_t)(i * columns) * size, row + (size_t)i * size, size);
  }
  attn_free(row);
  return status;
}

/* What is stored as -exp(value), in float64: so that it can be written again as it was. */
static attn_status convert_negative_exp(const attn_parameter_shape *shape, const origin *from,
                                        attn_tensor *value) {
  if (from->stored.in_blocks)
    return attn_fail(ATTN_UNSUPPORTED, "%s is quantised", from->place.name);
  ATTN_TRY(convert(shape, from, ATTN_F64, value));
  double *numbers = value->data;
  for (int64_t i = 0; i < shape->shape[0]; ++i) {
    if (!(numbers[i] < 0))
      return attn_fail(ATTN_BAD_FORMAT, "%s: expected numbers below 0", from->place.name);
    numbers[i] = log(-numbers[i]);
  }
  return ATTN_OK;
}

/* The weight of a norm that is stored without the 1 that is added to it. */
static attn_status convert_offset(const attn_model *model, const attn_parameter_shape *shape,
                                  const origin *from, attn_tensor *value) {
  bool wide = model->compute == ATTN_F64;
  ATTN_TRY(convert(shape, from, wide ? ATTN_F64 : ATTN_F32, value));
  for (int64_t i = 0; i < shape->shape[0]; ++i) {
    if (wide)
      ((double *)value->data)[i] += 1;
    else
      ((float *)value->data)[i] += 1;
  }
  return ATTN_OK;
}

/* Rows of blocks in our order, for as long as the model lives. */
static attn_status reorder_blocks(const attn_parameter_shape *shape, const origin *from, size_t row,
                                  void **copy) {
  char *rows = attn_alloc_array((size_t)shape->shape[0], row);
  if (!rows) return ATTN_OUT_OF_MEMORY;
  for (int64_t r = 0; r < shape->shape[0]; ++r)
    memcpy(rows + (size_t)r * row,
           (const char *)from->stored.data + (size_t)attn_row_map_at(&from->place.rows, r) * row,
           row);
  *copy = rows;
  return ATTN_OK;
}

/* A matrix stays in its blocks, which products and look-ups read in place. */
static attn_status keep_blocks(attn_model *model, int64_t index, const origin *from,
                               attn_block_type type) {
  const attn_parameter_shape *shape = &model->shapes[index];
  attn_parameter *parameter = &model->parameters[index];
  const attn_block_format *format = attn_block_get_format(type);
  size_t row = (size_t)(shape->shape[1] / format->elements * format->bytes);
  void *copy = NULL;
  if (!from->in_order) ATTN_TRY(reorder_blocks(shape, from, row, &copy));
  parameter->blocks = copy ? copy : (const char *)from->stored.data + (size_t)from->first * row;
  parameter->block_type = type;
  model->borrowed[index] = !copy;
  return attn_tensor_wrap(NULL, ATTN_F32, shape->rank, shape->shape, &parameter->value);
}

static attn_status bind_blocks(attn_model *model, int64_t index, const origin *from) {
  const attn_parameter_shape *shape = &model->shapes[index];
  const attn_stored *stored = &from->stored;
  if (shape->rank != 2) return convert(shape, from, ATTN_F32, &model->parameters[index].value);
  ATTN_TRY(attn_blocks_to_f32(stored->type, stored->data, NULL, 0)); /* whether that can be done */
  return keep_blocks(model, index, from, stored->type);
}

/* float8 ----------------------------------------------------------------------------------------*/

/* Blocks are those of the last two axes, so that these have to be rows and columns as here. */
static attn_status check_axes(const attn_parameter_shape *shape, const origin *from) {
  int64_t columns = shape->rank == 2 ? shape->shape[1] : 1;
  int64_t last = from->stored.shape[from->stored.rank - 1];
  if (last == columns) return ATTN_OK;
  return attn_fail(ATTN_BAD_FORMAT, "%s has rows of %lld, expected %lld, and scales",
                   from->place.name, (long long)last, (long long)columns);
}

/* The scales of a parameter's rows. Where its rows begin a row of blocks they are those of the
 * blocks, else each row gets its own. */
static attn_status take_scales(const attn_parameter_shape *shape, const origin *from,
                               attn_parameter *parameter) {
  const attn_stored *stored = &from->stored;
  const attn_tensor *all = &stored->scales;
  ATTN_TRY(check_axes(shape, from));
  int64_t rows = stored->shape[stored->rank - 2], at = from->first % rows; /* of one matrix */
  int64_t blocks = all->shape[all->rank - 2], columns = all->shape[all->rank - 1];
  bool aligned = from->in_order && at % stored->block_rows == 0 && at + shape->shape[0] <= rows;
  int64_t step = aligned ? stored->block_rows : 1, count = (shape->shape[0] + step - 1) / step;
  size_t size = attn_dtype_size(all->dtype);
  float *scales = attn_alloc_array((size_t)(count * columns), sizeof *scales);
  if (!scales) return ATTN_OUT_OF_MEMORY;
  parameter->scales = scales;
  parameter->scale_rows = step;
  parameter->scale_columns = stored->block_columns;
  for (int64_t i = 0; i < count; ++i) {
    attn_tensor source, target;
    int64_t r = attn_row_map_at(&from->place.rows, i * step);
    int64_t row = r / rows * blocks + r % rows / stored->block_rows;
    ATTN_TRY(attn_tensor_wrap((char *)all->data + (size_t)(row * columns) * size, all->dtype, 1,
                              &columns, &source));
    ATTN_TRY(attn_tensor_wrap(scales + i * columns, ATTN_F32, 1, &columns, &target));
    ATTN_TRY(attn_tensor_copy(&source, &target));
  }
  return ATTN_OK;
}

/* What no product reads becomes float32, since the scales go into it. */
static attn_status convert_scaled(const attn_parameter_shape *shape, const origin *from,
                                  attn_parameter *parameter) {
  ATTN_TRY(convert(shape, from, ATTN_F32, &parameter->value));
  int64_t columns = shape->rank == 2 ? shape->shape[1] : 1;
  int64_t groups = (columns + parameter->scale_columns - 1) / parameter->scale_columns;
  float *values = parameter->value.data;
  for (int64_t r = 0; r < shape->shape[0]; ++r)
    for (int64_t c = 0; c < columns; ++c)
      values[r * columns + c] *=
          parameter->scales[r / parameter->scale_rows * groups + c / parameter->scale_columns];
  attn_free((void *)(uintptr_t)parameter->scales);
  parameter->scales = NULL;
  return ATTN_OK;
}

/* E4M3 matrices stay as they are, and their scales beside them; bfloat16 holds any other float8. */
static attn_status bind_float8(attn_model *model, int64_t index, const origin *from) {
  const attn_parameter_shape *shape = &model->shapes[index];
  attn_parameter *parameter = &model->parameters[index];
  bool in_place = shape->rank == 2 && shape->product;
  if (!from->stored.scales.data && (from->stored.dtype != ATTN_F8_E4M3 || !in_place))
    return convert(shape, from, ATTN_BF16, &parameter->value);
  if (from->stored.scales.data) ATTN_TRY(take_scales(shape, from, parameter));
  return in_place ? keep_blocks(model, index, from, ATTN_BLOCK_F8_E4M3)
                  : convert_scaled(shape, from, parameter);
}

static bool is_float8(attn_dtype dtype) {
  return dtype == ATTN_F8_E4M3 || dtype == ATTN_F8_E5M2 || dtype == ATTN_F8_E8M0;
}

/* Takes one tensor of the source: as it lies there, or converted when no kernel reads its dtype. */
static attn_status bind(attn_model *model, int64_t index) {
  const attn_parameter_shape *shape = &model->shapes[index];
  attn_tensor *value = &model->parameters[index].value;
  origin from;
  ATTN_TRY(find(model, shape, &from));
  const attn_stored *stored = &from.stored;
  if (from.place.transposed) return convert_transposed(shape, &from, value);
  if (from.place.negative_exp) return convert_negative_exp(shape, &from, value);
  if (stored->in_blocks) return bind_blocks(model, index, &from);
  if (attn_model_norm_offset(model, index) && model->source.safetensors)
    return convert_offset(model, shape, &from, value);
  if (stored->dtype == ATTN_F16) return convert(shape, &from, ATTN_F32, value);
  if (is_float8(stored->dtype)) return bind_float8(model, index, &from);
  if (stored->dtype != ATTN_F32 && stored->dtype != ATTN_BF16 && stored->dtype != ATTN_F64)
    return attn_fail(ATTN_UNSUPPORTED,
                     "%s is %s; weights are float64, float32, bfloat16, float16 or float8",
                     shape->name, attn_dtype_name(stored->dtype));
  if (!from.in_order) return convert(shape, &from, stored->dtype, value);
  int64_t row = (shape->rank == 2 ? shape->shape[1] : 1) * (int64_t)attn_dtype_size(stored->dtype);
  model->borrowed[index] = true;
  return attn_tensor_wrap((char *)(uintptr_t)stored->data + from.first * row, stored->dtype,
                          shape->rank, shape->shape, value);
}

/* Everything used? --------------------------------------------------------------------------------
 * A tensor that the model does not know is one that it would compute without. */

/* A stored tensor, and how many of its rows parameters have taken. */
typedef struct used {
  attn_place place;
  int64_t rows;
} used;

static int by_name(const void *a, const void *b) {
  return strcmp(((const used *)a)->place.name, ((const used *)b)->place.name);
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
  if (model->source.safetensors && attn_family_leaves(&model->config, name)) return true;
  return strcmp(name, "rope_freqs.weight") == 0 ||
         (model->config.tied && strcmp(name, "lm_head.weight") == 0);
}

/* Whether a tensor is the scales of one that parameters have taken. */
static bool is_scales(const attn_model *model, const char *name, const used *all, int64_t count) {
  used key;
  attn_stored stored;
  size_t length = strlen(name), end = strlen(attn_scale_suffix);
  if (length <= end || strcmp(name + length - end, attn_scale_suffix) != 0) return false;
  snprintf(key.place.name, sizeof key.place.name, "%.*s", (int)(length - end), name);
  return bsearch(&key, all, (size_t)count, sizeof *all, by_name) &&
         attn_source_find(&model->source, key.place.name, &stored) == ATTN_OK && stored.scales.data;
}

/* Every parameter's place, sorted, those in one tensor as one. */
static attn_status name_all(const attn_model *model, used *all, int64_t *count) {
  for (int64_t i = 0; i < model->parameter_count; ++i) {
    ATTN_TRY(attn_source_place(&model->source, &model->config, &model->shapes[i], &all[i].place));
    all[i].rows = model->shapes[i].shape[0];
  }
  qsort(all, (size_t)model->parameter_count, sizeof *all, by_name);
  *count = 0;
  for (int64_t i = 0; i < model->parameter_count; ++i) {
    if (*count && by_name(&all[*count - 1], &all[i]) == 0)
      all[*count - 1].rows += all[i].rows;
    else
      all[(*count)++] = all[i];
  }
  return ATTN_OK;
}

static attn_status check_rows(const attn_model *model, const used *tensor) {
  attn_stored stored;
  if (!tensor->place.rows.part) return ATTN_OK;
  ATTN_TRY(attn_source_find(&model->source, tensor->place.name, &stored));
  int64_t rows = stored.count / last_axis(stored.rank, stored.shape);
  if (rows == tensor->rows || stored.count == tensor->rows) return ATTN_OK;
  return attn_fail(ATTN_BAD_FORMAT, "%s has %lld rows; the model uses %lld", tensor->place.name,
                   (long long)rows, (long long)tensor->rows);
}

static attn_status check_names(const attn_model *model, const used *all, int64_t count) {
  used key;
  const char *name;
  for (int64_t i = 0; (name = attn_source_tensor(&model->source, i)); ++i) {
    snprintf(key.place.name, sizeof key.place.name, "%s", name);
    if (!bsearch(&key, all, (size_t)count, sizeof *all, by_name) && !may_be_left(model, name) &&
        !is_scales(model, name, all, count))
      return attn_fail(ATTN_UNSUPPORTED, "the family %s has no place for the tensor %s",
                       model->config.type, name);
  }
  for (int64_t i = 0; i < count; ++i) ATTN_TRY(check_rows(model, &all[i]));
  return ATTN_OK;
}

static attn_status check_all_used(const attn_model *model) {
  int64_t count = 0;
  used *all = attn_alloc_array((size_t)model->parameter_count, sizeof *all);
  attn_status status = all ? name_all(model, all, &count) : ATTN_OUT_OF_MEMORY;
  if (status == ATTN_OK) status = check_names(model, all, count);
  attn_free(all);
  return status;
}

static attn_status load(const char *path, attn_dtype compute, bool to_compute, attn_model *model) {
  ATTN_TRY(attn_source_open(path, &model->source));
  ATTN_TRY(attn_model_start(json_incref(model->source.config), path, compute, model));
  for (int64_t i = 0; i < model->parameter_count; ++i) {
    attn_status status = bind(model, i);
    if (status != ATTN_OK) return attn_fail_in(status, "%s", path);
  }
  attn_status status = check_all_used(model);
  if (status != ATTN_OK) return attn_fail_in(status, "%s", path);
  status = attn_generation_read(model->source.generation, &model->generation);
  if (status != ATTN_OK) return attn_fail_in(status, "%s: generation_config.json", path);
  if (to_compute) ATTN_TRY(attn_model_make_weights(model));
  status = attn_model_text_load(&model->source, &model->text);
  if (status == ATTN_OK)
    status = attn_embedding_config_load(&model->source, &model->config, &model->embedding_config);
  return status == ATTN_OK ? ATTN_OK : attn_fail_in(status, "%s", path);
}

static attn_status make(const char *path, attn_dtype compute, bool to_compute, attn_model **model) {
  attn_model *made = attn_alloc_zero(sizeof *made);
  if (!made) return ATTN_OUT_OF_MEMORY;
  attn_status status = load(path, compute, to_compute, made);
  if (status == ATTN_OK)
    *model = made;
  else
    attn_model_destroy(made);
  return status;
}

attn_status attn_model_load(const char *path, attn_dtype compute, attn_model **model) {
  ATTN_TRY(attn_model_check_compute(compute));
  return make(path, compute, true, model);
}

attn_status attn_model_read(const char *path, attn_dtype compute, attn_model **model) {
  return make(path, compute, false, model);
}

bool attn_model_find_stored(const attn_model *model, int64_t index, attn_stored *stored) {
  attn_place place;
  return (model->source.gguf || model->source.safetensors) &&
         attn_source_place(&model->source, &model->config, &model->shapes[index], &place) ==
             ATTN_OK &&
         attn_source_find(&model->source, place.name, stored) == ATTN_OK;
}
