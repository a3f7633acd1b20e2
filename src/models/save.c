/* Saving a model, as the tools of its family expect it: config.json and model.safetensors,
 * or shards of it. */
#include "base/io.h"
#include "base/memory.h"
#include "base/status.h"
#include "files/json.h"
#include "layers/lora.h"
#include "models/model.h"

#include <stdlib.h>
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

/* What is written ---------------------------------------------------------------------------------
 * Parameters that a file keeps together are one tensor. Each is made when its turn comes. */

typedef struct saving {
  const attn_model *model;
  attn_dtype dtype;
  attn_described_tensor *tensors;
  int64_t count;
  int64_t *members; /* parameters, those of a tensor one behind the other */
  int64_t *first;   /* of each tensor, among the members; and the end */
} saving;

typedef struct named_parameter {
  const char *name; /* of the tensor */
  int64_t index;
  int64_t tensor; /* the first parameter of it */
} named_parameter;

static int by_name(const void *a, const void *b) {
  const named_parameter *x = a, *y = b;
  int order = strcmp(x->name, y->name);
  return order ? order : (x->index > y->index) - (x->index < y->index);
}

static int by_tensor(const void *a, const void *b) {
  const named_parameter *x = a, *y = b;
  if (x->tensor != y->tensor) return x->tensor < y->tensor ? -1 : 1;
  return (x->index > y->index) - (x->index < y->index);
}

/* A tensor's place is that of its first parameter; parameters that do not share it have its name
 * alone. */
static void sort_parameters(const attn_model *model, named_parameter *all) {
  size_t count = (size_t)model->parameter_count;
  for (size_t i = 0; i < count; ++i)
    all[i] = (named_parameter){.name = model->parameters[i].name, .index = (int64_t)i};
  qsort(all, count, sizeof *all, by_name);
  for (size_t i = 0; i < count; ++i) {
    bool same = i > 0 && strcmp(all[i].name, all[i - 1].name) == 0;
    all[i].tensor = same ? all[i - 1].tensor : all[i].index;
  }
  qsort(all, count, sizeof *all, by_tensor);
}

static void describe(saving *s, const named_parameter *p, int64_t place) {
  const attn_parameter_shape *shape = &s->model->shapes[p->index];
  s->members[place] = p->index;
  if (p->tensor == p->index) {
    attn_described_tensor *t = &s->tensors[s->count];
    s->first[s->count++] = place;
    *t = (attn_described_tensor){.name = p->name, .rank = shape->rank};
    t->dtype = attn_safetensors_dtype(s->dtype);
    memcpy(t->shape, shape->shape, (size_t)shape->rank * sizeof *t->shape);
  } else {
    s->tensors[s->count - 1].shape[0] += shape->shape[0];
  }
  s->first[s->count] = place + 1;
}

static void add_axes(attn_axes axes, attn_described_tensor *t) {
  int64_t rows = t->shape[0], columns = t->shape[1];
  if (axes == ATTN_AXES_CONVOLUTION) {
    t->rank = 3;
    memcpy(t->shape, (int64_t[]){rows, 1, columns}, 3 * sizeof *t->shape);
  } else if (axes == ATTN_AXES_HEADS) {
    t->rank = 4;
    memcpy(t->shape, (int64_t[]){1, 1, rows, 1}, 4 * sizeof *t->shape);
  }
}

static attn_status place_of(const saving *s, int64_t index, attn_place *place) {
  return attn_family_place(&s->model->config, &s->model->shapes[index], ATTN_IN_SAFETENSORS, place);
}

static attn_status list_tensors(saving *s) {
  size_t count = (size_t)s->model->parameter_count;
  s->tensors = attn_alloc_array(count + 1, sizeof *s->tensors);
  s->members = attn_alloc_array(count + 1, sizeof *s->members);
  s->first = attn_alloc_array(count + 1, sizeof *s->first);
  named_parameter *all = attn_alloc_array(count + 1, sizeof *all);
  bool made = s->tensors && s->members && s->first && all;
  if (made) sort_parameters(s->model, all);
  for (size_t i = 0; made && i < count; ++i) describe(s, &all[i], (int64_t)i);
  attn_free(all);
  for (int64_t t = 0; made && t < s->count; ++t) {
    attn_place place;
    ATTN_TRY(place_of(s, s->members[s->first[t]], &place));
    add_axes(place.axes, &s->tensors[t]);
  }
  return made ? ATTN_OK : ATTN_OUT_OF_MEMORY;
}

/* An adapter goes into the matrix that it is beside. */
static attn_status copy_values(const saving *s, int64_t index, attn_tensor *copy) {
  const attn_parameter *p = &s->model->parameters[index];
  if (p->adapter) return attn_lora_merge(s->model->adapters[index], p, s->dtype, copy);
  return attn_model_norm_offset(s->model, index) ? copy_without_one(p, s->dtype, copy)
                                                 : attn_parameter_copy(p, s->dtype, copy);
}

static attn_status add_member(const saving *s, int64_t index, attn_tensor *whole) {
  attn_place place;
  attn_tensor copy = {0};
  ATTN_TRY(
      attn_family_place(&s->model->config, &s->model->shapes[index], ATTN_IN_SAFETENSORS, &place));
  ATTN_TRY(copy_values(s, index, &copy));
  attn_status status = scatter(&place.rows, &copy, whole);
  attn_tensor_destroy(&copy);
  return status;
}

/* attn_make_tensor */
static attn_status make_tensor(void *context, int64_t index, attn_tensor *tensor) {
  const saving *s = context;
  int64_t first = s->first[index], end = s->first[index + 1];
  attn_place place;
  ATTN_TRY(place_of(s, s->members[first], &place));
  if (!place.rows.part && !place.rows.head && !place.rows.run)
    return copy_values(s, s->members[first], tensor);
  const attn_parameter_shape *shape = &s->model->shapes[s->members[first]];
  int64_t rows[2] = {0, shape->rank == 2 ? shape->shape[1] : 1};
  for (int64_t i = first; i < end; ++i) rows[0] += s->model->shapes[s->members[i]].shape[0];
  ATTN_TRY(attn_tensor_create(s->dtype, shape->rank, rows, tensor));
  attn_status status = ATTN_OK;
  for (int64_t i = first; i < end && status == ATTN_OK; ++i)
    status = add_member(s, s->members[i], tensor);
  return status;
}

static attn_status save_weights(const attn_model *model, const char *directory,
                                const attn_save_options *o) {
  saving s = {.model = model, .dtype = o->dtype};
  attn_status status = list_tensors(&s);
  if (status == ATTN_OK)
    status = attn_safetensors_save(directory, s.tensors, s.count, o->shard_bytes, make_tensor, &s);
  attn_free(s.tensors);
  attn_free(s.members);
  attn_free(s.first);
  return status;
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

static attn_status check_options(const attn_save_options *o) {
  if (o->struct_size != sizeof *o)
    return attn_fail(ATTN_INVALID_ARGUMENT, "save: struct_size is %zu, expected %zu",
                     o->struct_size, sizeof *o);
  if (o->dtype != ATTN_F32 && o->dtype != ATTN_BF16 && o->dtype != ATTN_F16 && o->dtype != ATTN_F64)
    return attn_fail(ATTN_UNSUPPORTED, "weights are not saved as %s", attn_dtype_name(o->dtype));
  if (o->shard_bytes >= 0) return ATTN_OK;
  return attn_fail(ATTN_INVALID_ARGUMENT, "save: shard_bytes is %lld, expected at least 0",
                   (long long)o->shard_bytes);
}

attn_status attn_model_save_as(const attn_model *model, const char *directory,
                               const attn_save_options *options) {
  if (!options) return attn_fail(ATTN_INVALID_ARGUMENT, "save: options is NULL");
  ATTN_TRY(check_options(options));
  ATTN_TRY(attn_make_directories(directory));
  char *config = attn_path_join(directory, "config.json");
  attn_status status = config ? save_weights(model, directory, options) : ATTN_OUT_OF_MEMORY;
  if (status == ATTN_OK) status = save_config(model, config);
  if (status == ATTN_OK) status = attn_model_text_save(model, directory);
  attn_free(config);
  return status;
}

attn_status attn_model_save(const attn_model *model, const char *directory, attn_dtype dtype) {
  attn_save_options options = ATTN_SAVE_OPTIONS_INIT;
  options.dtype = dtype;
  return attn_model_save_as(model, directory, &options);
}
