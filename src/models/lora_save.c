/* Saving adapters in the format of PEFT (lora.h). */
#include "base/io.h"
#include "base/memory.h"
#include "base/status.h"
#include "files/json.h"
#include "files/safetensors.h"
#include "models/lora.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* One tensor of the file, and the parameter of the model that it belongs to. */
typedef struct entry {
  int64_t index;
  const attn_parameter *from; /* of the adapter, or the model's own */
  bool by_rows;               /* its rows are those of the model's parameter */
} entry;

typedef struct files {
  const attn_model *model;
  entry *entries;
  attn_named_tensor *tensors;
  int64_t count;
} files;

static bool is_adapted(const attn_model *model, int64_t i) {
  return model->adapters && model->adapters[i];
}

static attn_status list_entries(files *f) {
  const attn_model *model = f->model;
  size_t most = (size_t)attn_model_count_all(model);
  f->entries = attn_alloc_array(most, sizeof *f->entries);
  f->tensors = attn_alloc_array(most, sizeof *f->tensors);
  if (!f->entries || !f->tensors) return ATTN_OUT_OF_MEMORY;
  for (int64_t i = 0; i < model->parameter_count; ++i) {
    attn_parameter *list[ATTN_LORA_PARAMETERS];
    int count = is_adapted(model, i) ? attn_lora_list(model->adapters[i], list) : 0;
    for (int k = 0; k < count; ++k) f->entries[f->count++] = (entry){i, list[k], k > 0};
    const attn_parameter *own = &model->parameters[i];
    if (own->gradient.data) f->entries[f->count++] = (entry){i, own, true};
  }
  return ATTN_OK;
}

/* Row r of `rows` to row attn_row_map_at(map, r) of `file`. */
static attn_status scatter_rows(const attn_row_map *map, const attn_tensor *rows,
                                const attn_tensor *file) {
  for (int64_t r = 0; r < rows->shape[0]; ++r) {
    attn_tensor from, to;
    ATTN_TRY(attn_tensor_slice(rows, 0, r, 1, &from));
    ATTN_TRY(attn_tensor_slice(file, 0, attn_row_map_at(map, r), 1, &to));
    ATTN_TRY(attn_tensor_copy(&from, &to));
  }
  return ATTN_OK;
}

/* The values as the file has them: rows in its order, norms without the 1 that is added to them. */
static attn_status make_tensor(const files *f, const entry *e, attn_tensor *tensor) {
  attn_place place;
  attn_tensor copy;
  const attn_parameter_shape *shape = &f->model->shapes[e->index];
  ATTN_TRY(attn_family_place(&f->model->config, shape, ATTN_IN_SAFETENSORS, &place));
  ATTN_TRY(attn_parameter_copy(e->from, ATTN_F64, &copy));
  bool own = e->from == &f->model->parameters[e->index];
  bool offset = own && attn_model_norm_offset(f->model, e->index);
  for (int64_t i = 0; offset && i < copy.shape[0]; ++i) ((double *)copy.data)[i] -= 1;
  attn_status status = attn_tensor_create(e->from->value.dtype, copy.rank, copy.shape, tensor);
  const attn_row_map same = {0};
  if (status == ATTN_OK) status = scatter_rows(e->by_rows ? &place.rows : &same, &copy, tensor);
  attn_tensor_destroy(&copy);
  return status;
}

static attn_status make_entry(files *f, int64_t i) {
  attn_named_tensor *t = &f->tensors[i];
  const char *own = f->entries[i].from->name;
  size_t size = strlen(attn_lora_prefix) + strlen(own) + 1;
  char *name = attn_alloc(size);
  if (!name) return ATTN_OUT_OF_MEMORY;
  snprintf(name, size, "%s%s", attn_lora_prefix, own);
  t->name = name;
  return make_tensor(f, &f->entries[i], &t->tensor);
}

static attn_status save_weights(const attn_model *model, const char *path) {
  static const attn_metadata metadata = {"format", "pt"};
  files f = {.model = model};
  attn_status status = list_entries(&f);
  for (int64_t i = 0; i < f.count && status == ATTN_OK; ++i) status = make_entry(&f, i);
  if (status == ATTN_OK) status = attn_safetensors_write(path, f.tensors, f.count, &metadata, 1);
  for (int64_t i = 0; f.tensors && i < f.count; ++i) {
    attn_free((void *)(uintptr_t)f.tensors[i].name);
    attn_tensor_destroy(&f.tensors[i].tensor);
  }
  attn_free(f.entries);
  attn_free(f.tensors);
  return status;
}

/* The module of a parameter's name, "x.q_proj" of "x.q_proj.weight". */
static json_t *module_json(const char *name) {
  const char *dot = strrchr(name, '.');
  return json_stringn(name, dot ? (size_t)(dot - name) : strlen(name));
}

/* The targets; of all the modules one by one, since PEFT's "all-linear" takes other ones. */
static json_t *targets_json(const attn_model *model, const attn_lora_options *o) {
  json_t *list = json_array();
  bool all = attn_lora_targets_all(o);
  int count;
  const char *const *targets = attn_lora_targets(o, &count);
  for (int t = 0; !all && t < count; ++t) json_array_append_new(list, json_string(targets[t]));
  for (int64_t i = 0; all && i < model->parameter_count; ++i)
    if (is_adapted(model, i)) json_array_append_new(list, module_json(model->parameters[i].name));
  return list;
}

static json_t *trained_json(const attn_model *model) {
  json_t *list = json_array();
  for (int64_t i = 0; i < model->parameter_count; ++i)
    if (model->parameters[i].gradient.data)
      json_array_append_new(list, module_json(model->parameters[i].name));
  if (json_array_size(list)) return list;
  json_decref(list);
  return json_null();
}

/* PEFT writes whole numbers as integers. */
static json_t *number_json(double value) {
  return value == floor(value) && fabs(value) < 1e9 ? json_integer((json_int_t)value)
                                                    : json_real(value);
}

static attn_status save_config(const attn_model *model, const attn_lora_options *o,
                               const char *base, const char *path) {
  json_t *config = json_pack(
      "{s:s, s:s, s:s?, s:I, s:o, s:f, s:s, s:b, s:b, s:o, s:o, s:b, s:b, s:b, s:{}, s:{}}",
      "peft_type", "LORA", "task_type", "CAUSAL_LM", "base_model_name_or_path", base, "r",
      (json_int_t)o->rank, "lora_alpha", number_json(o->alpha), "lora_dropout", 0.0, "bias", "none",
      "use_rslora", o->kind == ATTN_LORA_RANK_STABLE, "use_dora", o->kind == ATTN_LORA_DORA,
      "target_modules", targets_json(model, o), "modules_to_save", trained_json(model),
      "fan_in_fan_out", 0, "init_lora_weights", 1, "inference_mode", 1, "rank_pattern",
      "alpha_pattern");
  if (!config) return ATTN_OUT_OF_MEMORY;
  attn_status status = attn_json_save(path, config);
  json_decref(config);
  return status;
}

attn_status attn_model_save_lora(const attn_model *model, const attn_lora_options *options,
                                 const char *base, const char *directory) {
  char *weights = attn_path_join(directory, attn_lora_weights_file);
  char *config = attn_path_join(directory, attn_lora_config_file);
  attn_status status = weights && config ? save_weights(model, weights) : ATTN_OUT_OF_MEMORY;
  if (status == ATTN_OK) status = save_config(model, options, base, config);
  attn_free(weights);
  attn_free(config);
  return status;
}
