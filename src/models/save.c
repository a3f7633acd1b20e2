/* Saving a model, as the tools of its family expect it: config.json and model.safetensors. */
#include "base/io.h"
#include "base/memory.h"
#include "base/status.h"
#include "files/json.h"
#include "models/model.h"

#include <string.h>

/* The weight of a norm as files have it; the 1 goes before anything is rounded. */
static attn_status copy_without_one(const attn_parameter *p, attn_dtype dtype, attn_tensor *copy) {
  attn_tensor wide;
  ATTN_TRY(attn_parameter_copy(p, ATTN_F64, &wide));
  for (int64_t i = 0; i < wide.shape[0]; ++i) ((double *)wide.data)[i] -= 1;
  attn_status status = attn_tensor_create(dtype, wide.rank, wide.shape, copy);
  if (status == ATTN_OK) status = attn_tensor_copy(&wide, copy);
  attn_tensor_destroy(&wide);
  return status;
}

/* Tensors to write. Parameters that a file keeps together become one. */
typedef struct tensor_list {
  const attn_model *model;
  attn_dtype dtype;
  attn_named_tensor *tensors;
  int64_t count;
  int64_t *shared; /* which of them hold several parameters */
  int64_t shared_count;
} tensor_list;

/* Rows of all parameters that are kept in the tensor of parameter `first`, the first of them. */
static int64_t count_rows(const attn_model *model, int64_t first) {
  int64_t rows = 0;
  for (int64_t i = first; i < model->parameter_count; ++i)
    if (strcmp(model->parameters[i].name, model->parameters[first].name) == 0)
      rows += model->shapes[i].shape[0];
  return rows;
}

static attn_status shared_tensor(tensor_list *list, int64_t index, attn_tensor **tensor) {
  const char *name = list->model->parameters[index].name;
  for (int64_t i = list->shared_count - 1; i >= 0; --i) {
    attn_named_tensor *t = &list->tensors[list->shared[i]];
    if (strcmp(t->name, name) != 0) continue;
    *tensor = &t->tensor;
    return ATTN_OK;
  }
  const attn_parameter_shape *shape = &list->model->shapes[index];
  int64_t full[2] = {count_rows(list->model, index), shape->shape[1]};
  attn_named_tensor *t = &list->tensors[list->count];
  ATTN_TRY(attn_tensor_create(list->dtype, shape->rank, full, &t->tensor));
  t->name = name;
  list->shared[list->shared_count++] = list->count++;
  *tensor = &t->tensor;
  return ATTN_OK;
}

/* Puts the rows of `from` where `map` has them. */
static attn_status scatter(const attn_row_map *map, const attn_tensor *from, attn_tensor *to) {
  size_t row = (size_t)(from->rank == 2 ? from->shape[1] : 1) * attn_dtype_size(from->dtype);
  for (int64_t r = 0; r < from->shape[0]; ++r) {
    int64_t at = attn_row_map_at(map, r);
    if (at < 0 || at >= to->shape[0])
      return attn_fail(ATTN_INTERNAL, "row %lld of %lld", (long long)at, (long long)to->shape[0]);
    memcpy((char *)to->data + (size_t)at * row, (const char *)from->data + (size_t)r * row, row);
  }
  return ATTN_OK;
}

static attn_status add_rows(tensor_list *list, int64_t index, const attn_row_map *map,
                            attn_tensor *copy) {
  attn_tensor *whole;
  attn_status status = ATTN_OK;
  if (map->part) {
    status = shared_tensor(list, index, &whole);
  } else {
    attn_named_tensor *t = &list->tensors[list->count];
    status = attn_tensor_create(list->dtype, copy->rank, copy->shape, &t->tensor);
    if (status == ATTN_OK) {
      t->name = list->model->parameters[index].name;
      ++list->count;
    }
    whole = &t->tensor;
  }
  return status == ATTN_OK ? scatter(map, copy, whole) : status;
}

static attn_status add(tensor_list *list, int64_t index) {
  const attn_parameter *p = &list->model->parameters[index];
  attn_place place;
  attn_tensor copy = {0};
  ATTN_TRY(attn_family_place(&list->model->config, &list->model->shapes[index], ATTN_IN_SAFETENSORS,
                             &place));
  bool offset = attn_model_norm_offset(list->model, index);
  ATTN_TRY(offset ? copy_without_one(p, list->dtype, &copy)
                  : attn_parameter_copy(p, list->dtype, &copy));
  if (!place.rows.part && !place.rows.head && !place.rows.run) {
    list->tensors[list->count++] = (attn_named_tensor){.name = p->name, .tensor = copy};
    return ATTN_OK;
  }
  attn_status status = add_rows(list, index, &place.rows, &copy);
  attn_tensor_destroy(&copy);
  return status;
}

static attn_status write_weights(const char *path, tensor_list *list) {
  attn_metadata metadata = {"format", "pt"}; /* what the usual readers expect to find */
  for (int64_t i = 0; i < list->model->parameter_count; ++i) ATTN_TRY(add(list, i));
  return attn_safetensors_write(path, list->tensors, list->count, &metadata, 1);
}

/* Weights are written as plain numbers, whatever they were read from. */
static attn_status save_config(const attn_model *model, const char *path) {
  json_t *config = json_copy(model->config.json);
  if (!config) return attn_fail(ATTN_OUT_OF_MEMORY, "out of memory");
  json_object_del(config, attn_quantization_key);
  attn_status status = attn_json_save(path, config);
  json_decref(config);
  return status;
}

attn_status attn_model_save(const attn_model *model, const char *directory, attn_dtype dtype) {
  if (dtype != ATTN_F32 && dtype != ATTN_BF16 && dtype != ATTN_F16 && dtype != ATTN_F64)
    return attn_fail(ATTN_UNSUPPORTED, "weights are not saved as %s", attn_dtype_name(dtype));
  ATTN_TRY(attn_make_directories(directory));
  char *weights = attn_path_join(directory, "model.safetensors");
  char *config = attn_path_join(directory, "config.json");
  size_t count = (size_t)model->parameter_count;
  tensor_list list = {.model = model, .dtype = dtype};
  list.tensors = attn_alloc_array(count, sizeof *list.tensors);
  list.shared = attn_alloc_array(count, sizeof *list.shared);
  bool made = weights && config && list.tensors && list.shared;
  attn_status status = made ? write_weights(weights, &list) : ATTN_OUT_OF_MEMORY;
  if (status == ATTN_OK) status = save_config(model, config);
  if (status == ATTN_OK) status = attn_model_text_save(model, directory);
  for (int64_t i = 0; i < list.count; ++i) attn_tensor_destroy(&list.tensors[i].tensor);
  attn_free(list.tensors);
  attn_free(list.shared);
  attn_free(weights);
  attn_free(config);
  return status;
}
