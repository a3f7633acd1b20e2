#include "models/parameter_list.h"
#include "attn/device.h"
#include "base/io.h"
#include "base/memory.h"
#include "base/status.h"
#include "engines/dense/dense.h"
#include "graph/operations.h"
#include "models/model.h"
#include "tensor/device.h"

#include <stdio.h>

/* The list --------------------------------------------------------------------------------------
 */

attn_parameter *attn_inventory_add(attn_inventory *inventory, const char *prefix,
                                   attn_parameter_shape shape) {
  int64_t index = inventory->count++;
  if (inventory->counting) return NULL;
  char name[128];
  snprintf(name, sizeof name, "%s%s", prefix, shape.name);
  attn_parameter *p = &inventory->list->parameters[index];
  shape.name = attn_strdup(name);
  p->name = shape.name;
  p->decay = shape.decay;
  p->statistic = shape.statistic;
  inventory->list->shapes[index] = shape;
  inventory->failed |= !shape.name;
  return p;
}

attn_status attn_parameter_list_make(attn_parameter_list *list, attn_dtype compute,
                                     void (*walk)(attn_inventory *inventory, void *host),
                                     void *host) {
  attn_inventory inventory = {.list = list, .counting = true};
  walk(&inventory, host);
  list->compute = compute;
  list->parameters = attn_alloc_array((size_t)inventory.count, sizeof *list->parameters);
  list->shapes = attn_alloc_array((size_t)inventory.count, sizeof *list->shapes);
  if (!list->parameters || !list->shapes) return ATTN_OUT_OF_MEMORY;
  list->count = inventory.count;
  inventory = (attn_inventory){.list = list};
  walk(&inventory, host);
  return inventory.failed ? ATTN_OUT_OF_MEMORY : ATTN_OK;
}

static attn_status take_value(const attn_safetensors *file, const attn_parameter_shape *shape,
                              const attn_tensor *value) {
  attn_tensor found;
  attn_status status = attn_safetensors_find(file, shape->name, &found);
  if (status != ATTN_OK) return attn_fail_in(ATTN_BAD_FORMAT, "weights");
  if (!attn_same_shape(&found, value))
    return attn_fail(ATTN_BAD_FORMAT, "%s is not of the shape that config.json asks for",
                     shape->name);
  return attn_tensor_copy(&found, value);
}

static attn_status make_product(attn_dtype compute, const attn_tensor *value,
                                attn_weight **weight) {
  ATTN_TRY(attn_weight_create(value->shape[0], value->shape[1], compute, weight));
  return attn_weight_set(*weight, value);
}

attn_status attn_parameter_list_fill(attn_parameter_list *list, uint64_t seed,
                                     const attn_safetensors *file) {
  attn_dtype dtype = list->compute == ATTN_F64 ? ATTN_F64 : ATTN_F32;
  for (int64_t i = 0; i < list->count; ++i) {
    const attn_parameter_shape *shape = &list->shapes[i];
    attn_parameter *p = &list->parameters[i];
    ATTN_TRY(attn_tensor_create(dtype, shape->rank, shape->shape, &p->value));
    if (file)
      ATTN_TRY(take_value(file, shape, &p->value));
    else
      attn_parameter_initialise(shape, seed, (uint64_t)i, &p->value);
    if (shape->product) ATTN_TRY(make_product(list->compute, &p->value, &p->weight));
  }
  return ATTN_OK;
}

int64_t attn_parameter_list_numbers(const attn_parameter_list *list) {
  int64_t numbers = 0;
  for (int64_t i = 0; i < list->count; ++i)
    if (!list->parameters[i].statistic) numbers += attn_tensor_count(&list->parameters[i].value);
  return numbers;
}

/* Gradients -------------------------------------------------------------------------------------
 */

void attn_parameter_list_drop_gradients(attn_parameter_list *list) {
  for (int64_t i = 0; i < list->count; ++i) attn_tensor_destroy(&list->parameters[i].gradient);
}

attn_status attn_parameter_list_add_gradients(attn_parameter_list *list,
                                              bool (*chosen)(const void *host, const char *name),
                                              const void *host) {
  attn_parameter_list_drop_gradients(list);
  for (int64_t i = 0; i < list->count; ++i) {
    attn_parameter *p = &list->parameters[i];
    if (chosen && !chosen(host, p->name)) continue;
    ATTN_TRY(attn_tensor_create_on(list->device, p->value.dtype, p->value.rank, p->value.shape,
                                   &p->gradient));
  }
  return ATTN_OK;
}

/* Devices ---------------------------------------------------------------------------------------
 */

static void free_forms(attn_parameter *p) {
  attn_weight_destroy(p->weight); /* may borrow the values */
  attn_tensor_destroy(&p->value);
  attn_tensor_destroy(&p->gradient);
}

static attn_status copy_to(const attn_parameter_list *list, const attn_parameter *p,
                           attn_device device, attn_parameter *copy) {
  const attn_tensor *value = &p->value;
  *copy = *p;
  copy->value = copy->gradient = (attn_tensor){0};
  copy->weight = NULL;
  ATTN_TRY(attn_tensor_create_on(device, value->dtype, value->rank, value->shape, &copy->value));
  ATTN_TRY(attn_tensor_copy(value, &copy->value));
  if (p->gradient.data)
    ATTN_TRY(
        attn_tensor_create_on(device, value->dtype, value->rank, value->shape, &copy->gradient));
  return p->weight ? make_product(list->compute, &copy->value, &copy->weight) : ATTN_OK;
}

attn_status attn_parameter_list_move(attn_parameter_list *list, attn_device device) {
  if (attn_same_device(list->device, device)) return ATTN_OK;
  if (attn_is_cuda(device)) {
    attn_gpu *gpu = attn_gpu_open(device.index);
    attn_cuda_dense *products; /* who finds no library for them does not move */
    if (!gpu) return ATTN_UNSUPPORTED;
    ATTN_TRY(attn_gpu_dense(gpu, &products));
  }
  attn_parameter *copies = attn_alloc_array((size_t)list->count, sizeof *copies);
  attn_status status = copies ? ATTN_OK : ATTN_OUT_OF_MEMORY;
  for (int64_t i = 0; i < list->count && status == ATTN_OK; ++i)
    status = copy_to(list, &list->parameters[i], device, &copies[i]);
  for (int64_t i = 0; copies && i < list->count; ++i) {
    attn_parameter *p = &list->parameters[i], *dropped = status == ATTN_OK ? p : &copies[i];
    free_forms(dropped);
    if (status == ATTN_OK) *p = copies[i];
  }
  if (status == ATTN_OK) list->device = device;
  attn_free(copies);
  return status;
}

void attn_parameter_list_free(attn_parameter_list *list) {
  for (int64_t i = 0; i < list->count; ++i) {
    free_forms(&list->parameters[i]);
    attn_free((void *)(uintptr_t)list->shapes[i].name);
  }
  attn_free(list->parameters);
  attn_free(list->shapes);
}

/* Files -----------------------------------------------------------------------------------------
 */

static attn_status write_values(const attn_parameter_list *list, const char *path) {
  attn_named_tensor *tensors = attn_alloc_array((size_t)list->count, sizeof *tensors);
  attn_status status = tensors ? ATTN_OK : ATTN_OUT_OF_MEMORY;
  for (int64_t i = 0; status == ATTN_OK && i < list->count; ++i) {
    const attn_tensor *value = &list->parameters[i].value;
    tensors[i].name = list->parameters[i].name;
    status = attn_tensor_create(value->dtype, value->rank, value->shape, &tensors[i].tensor);
    if (status == ATTN_OK) status = attn_tensor_copy(value, &tensors[i].tensor);
  }
  if (status == ATTN_OK) status = attn_safetensors_write(path, tensors, list->count, NULL, 0);
  for (int64_t i = 0; tensors && i < list->count; ++i) attn_tensor_destroy(&tensors[i].tensor);
  attn_free(tensors);
  return status;
}

attn_status attn_parameter_list_save(const attn_parameter_list *list, const json_t *config,
                                     const char *directory) {
  ATTN_TRY(attn_make_directories(directory));
  char *config_path = attn_path_join(directory, "config.json");
  char *weights_path = attn_path_join(directory, "model.safetensors");
  attn_status status = config_path && weights_path ? ATTN_OK : ATTN_OUT_OF_MEMORY;
  if (status == ATTN_OK) status = write_values(list, weights_path);
  if (status == ATTN_OK) status = attn_json_save(config_path, config);
  attn_free(config_path);
  attn_free(weights_path);
  return status;
}

attn_status attn_parameter_list_open(const char *directory, json_t **config,
                                     attn_safetensors **file) {
  char *path = attn_path_join(directory, "config.json");
  *config = NULL;
  *file = NULL;
  attn_status status = path ? attn_json_load(path, config) : ATTN_OUT_OF_MEMORY;
  attn_free(path);
  if (status == ATTN_OK) status = attn_safetensors_open(directory, file);
  if (status == ATTN_OK) return ATTN_OK;
  json_decref(*config);
  *config = NULL;
  return status;
}

/* Inputs ----------------------------------------------------------------------------------------
 */

attn_var *attn_graph_host_rows(attn_graph *graph, const void *values, attn_dtype dtype,
                               int64_t rows, int64_t columns) {
  int64_t shape[2] = {rows, columns};
  attn_tensor from, to = attn_graph_tensor(graph, graph->wide, 2, shape);
  if (!to.data) return NULL;
  attn_status status = attn_tensor_wrap((void *)(uintptr_t)values, dtype, 2, shape, &from);
  if (status == ATTN_OK) status = attn_tensor_copy(&from, &to);
  return status == ATTN_OK ? attn_graph_input(graph, &to) : attn_graph_error(graph, status);
}
