/* Loading adapters in the format of PEFT (lora.h). A module may be several parameters of ours,
 * whose rows it has one behind the other, or in another order (attn_row_map): the rows of B and m
 * go with them, and A is that of all. */
#include "base/io.h"
#include "base/memory.h"
#include "base/status.h"
#include "files/json.h"
#include "files/safetensors.h"
#include "graph/operations.h"
#include "models/lora.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

typedef enum part { PART_A = 0, PART_B, PART_MAGNITUDE, PART_WHOLE } part;
static const char *const ends[] = {
    [PART_A] = ".lora_A.weight",
    [PART_B] = ".lora_B.weight",
    [PART_MAGNITUDE] = ".lora_magnitude_vector",
};
enum { LOW_RANK_PARTS = PART_WHOLE };

/* A tensor's name taken apart. */
typedef struct address {
  const char *tensor, *module;
  int length; /* of the module's name */
  part part;
} address;

typedef struct loading {
  attn_model *model;
  attn_safetensors *file;
  int64_t rank;
  double alpha; /* such that alpha / rank is the scale */
  bool stable, magnitudes, ranks_vary;
} loading;

/* What would make other numbers than the equations here, if it were passed over. */
static attn_status check_config(const json_t *config) {
  static const char *const empty[] = {"alpha_pattern", "layer_replication",
                                      "trainable_token_indices"};
  static const char *const off[] = {"fan_in_fan_out", "lora_bias", "use_qalora"};
  static const char *const moving[] = {"pissa", "olora", "loftq", "corda"};
  const char *type = NULL, *bias = "none";
  ATTN_TRY(attn_json_string(config, "peft_type", ATTN_REQUIRED, &type));
  if (strcmp(type, "LORA") != 0)
    return attn_fail(ATTN_UNSUPPORTED, "peft_type is %s, expected LORA", type);
  ATTN_TRY(attn_json_string(config, "bias", ATTN_OPTIONAL, &bias));
  if (strcmp(bias, "none") != 0)
    return attn_fail(ATTN_UNSUPPORTED, "bias is %s, expected none", bias);
  for (size_t i = 0; i < sizeof empty / sizeof *empty; ++i) {
    const json_t *value = json_object_get(config, empty[i]);
    if (json_object_size(value) || json_array_size(value))
      return attn_fail(ATTN_UNSUPPORTED, "%s is not empty", empty[i]);
  }
  for (size_t i = 0; i < sizeof off / sizeof *off; ++i) {
    bool on = false;
    ATTN_TRY(attn_json_bool(config, off[i], ATTN_OPTIONAL, &on));
    if (on) return attn_fail(ATTN_UNSUPPORTED, "%s is true", off[i]);
  }
  const char *initial = json_string_value(json_object_get(config, "init_lora_weights"));
  for (size_t i = 0; initial && i < sizeof moving / sizeof *moving; ++i)
    if (strncmp(initial, moving[i], strlen(moving[i])) == 0)
      return attn_fail(ATTN_UNSUPPORTED,
                       "init_lora_weights is %s, which changes the base model's weights", initial);
  return ATTN_OK;
}

static attn_status read_config(const json_t *config, loading *l) {
  const double most_alpha = 1e9;
  l->alpha = 8; /* PEFT's defaults */
  l->rank = 8;
  ATTN_TRY(check_config(config));
  ATTN_TRY(attn_json_int(config, "r", ATTN_OPTIONAL, 1, ATTN_LORA_MOST_RANK, &l->rank));
  ATTN_TRY(attn_json_double(config, "lora_alpha", ATTN_OPTIONAL, 0, most_alpha, &l->alpha));
  ATTN_TRY(attn_json_bool(config, "use_rslora", ATTN_OPTIONAL, &l->stable));
  ATTN_TRY(attn_json_bool(config, "use_dora", ATTN_OPTIONAL, &l->magnitudes));
  l->ranks_vary = json_object_size(json_object_get(config, "rank_pattern")) > 0;
  return ATTN_OK;
}

static bool has_end(const char *name, size_t length, const char *end) {
  size_t size = strlen(end);
  return length > size && strncmp(name + length - size, end, size) == 0;
}

/* A tensor's name as "base_model.model." MODULE and one of the ends. */
static attn_status split(const char *name, address *to) {
  static const char weight[] = ".weight";
  size_t before = strlen(attn_lora_prefix), size = strlen(name);
  if (strncmp(name, attn_lora_prefix, before) != 0)
    return attn_fail(ATTN_BAD_FORMAT, "%s does not begin with %s", name, attn_lora_prefix);
  *to = (address){.tensor = name, .module = name + before, .part = PART_WHOLE};
  size -= before;
  to->length = (int)size;
  /* some files have ".weight" behind the magnitudes as well */
  size_t bare = has_end(to->module, size, weight) ? size - (sizeof weight - 1) : size;
  for (int p = 0; p < LOW_RANK_PARTS; ++p) {
    size_t whole = p == PART_MAGNITUDE ? bare : size;
    if (!has_end(to->module, whole, ends[p])) continue;
    to->part = (part)p;
    to->length = (int)(whole - strlen(ends[p]));
    return ATTN_OK;
  }
  if (strstr(to->module, ".lora_"))
    return attn_fail(ATTN_UNSUPPORTED,
                     "%s is neither lora_A, lora_B nor lora_magnitude_vector of a matrix", name);
  return ATTN_OK;
}

/* Whether parameter i is the module or a part of it; of a tensor that is there whole: that tensor.
 */
static bool belongs(const attn_model *model, int64_t i, const address *a) {
  const attn_family *family = model->config.family;
  char module[ATTN_PLACE_NAME];
  if (snprintf(module, sizeof module, "%.*s", a->length, a->module) >= (int)sizeof module)
    return false;
  const char *own = attn_family_without_prefix(family, model->parameters[i].name);
  const char *wanted = attn_family_without_prefix(family, module);
  size_t size = strlen(wanted);
  if (strncmp(own, wanted, size) != 0) return false;
  if (a->part == PART_WHOLE) return own[size] == '\0';
  return strcmp(own + size, ".weight") == 0 && model->parameters[i].weight;
}

/* The tensor of the same module with another end; no data where there is none. */
static attn_status find_part(const loading *l, const address *a, part which, attn_tensor *tensor) {
  char name[2 * ATTN_PLACE_NAME];
  *tensor = (attn_tensor){0};
  for (int longer = 0; longer <= (which == PART_MAGNITUDE); ++longer) {
    snprintf(name, sizeof name, "%s%.*s%s%s", attn_lora_prefix, a->length, a->module, ends[which],
             longer ? ".weight" : "");
    if (attn_safetensors_has(l->file, name)) return attn_safetensors_find(l->file, name, tensor);
  }
  return ATTN_OK;
}

/* The tensors of one module. */
typedef struct module {
  const address *address;
  attn_tensor parts[LOW_RANK_PARTS];
} module;

/* Refuses a part that is not [rows, columns]; columns 0: a vector, of any rank. */
static attn_status check_part(const module *m, part which, int64_t rows, int64_t columns) {
  const attn_tensor *t = &m->parts[which];
  char name[2 * ATTN_PLACE_NAME], text[128];
  bool matrix = t->rank == 2 && t->shape[0] == rows && t->shape[1] == columns;
  if (t->data && (columns ? matrix : attn_tensor_count(t) == rows)) return ATTN_OK;
  snprintf(name, sizeof name, "%s%.*s%s", attn_lora_prefix, m->address->length, m->address->module,
           ends[which]);
  if (!t->data) return attn_fail(ATTN_BAD_FORMAT, "%s is missing", name);
  return attn_fail(ATTN_BAD_FORMAT,
                   columns ? "%s is %s, expected [%lld, %lld]" : "%s is %s, expected [%lld]", name,
                   attn_shape_text(t, text), (long long)rows, (long long)columns);
}

static attn_status check_module(const loading *l, const module *m, int64_t outputs,
                                int64_t inputs) {
  const attn_tensor *a = &m->parts[PART_A];
  int64_t rank = l->ranks_vary && a->rank == 2 ? a->shape[0] : l->rank;
  ATTN_TRY(check_part(m, PART_A, rank, inputs));
  ATTN_TRY(check_part(m, PART_B, outputs, rank));
  if (l->magnitudes) return check_part(m, PART_MAGNITUDE, outputs, 0);
  if (!m->parts[PART_MAGNITUDE].data) return ATTN_OK;
  return attn_fail(ATTN_BAD_FORMAT, "%.*s has magnitudes, but use_dora is not true",
                   m->address->length, m->address->module);
}

/* Row r of `rows` from row attn_row_map_at(map, r) of `file`. */
static attn_status gather_rows(const attn_row_map *map, const attn_tensor *file,
                               const attn_tensor *rows) {
  for (int64_t r = 0; r < rows->shape[0]; ++r) {
    attn_tensor from, to;
    ATTN_TRY(attn_tensor_slice(file, 0, attn_row_map_at(map, r), 1, &from));
    ATTN_TRY(attn_tensor_slice(rows, 0, r, 1, &to));
    ATTN_TRY(attn_tensor_copy(&from, &to));
  }
  return ATTN_OK;
}

/* Gives parameter `index`, the module or a part of it, its adapter. */
static attn_status adapt(loading *l, const module *m, int64_t index) {
  attn_model *model = l->model;
  attn_place place;
  attn_lora_kind kind = l->magnitudes ? ATTN_LORA_DORA : ATTN_LORA_PLAIN;
  int64_t rank = m->parts[PART_A].shape[0];
  double alpha = l->alpha * (l->stable ? sqrt((double)rank) : 1); /* so that s = alpha / sqrt(r) */
  ATTN_TRY(attn_family_place(&model->config, &model->shapes[index], ATTN_IN_SAFETENSORS, &place));
  ATTN_TRY(attn_model_adapt(model, index, kind, rank, alpha, 0));
  attn_lora *lora = model->adapters[index];
  ATTN_TRY(attn_tensor_copy(&m->parts[PART_A], &lora->a.value));
  ATTN_TRY(gather_rows(&place.rows, &m->parts[PART_B], &lora->b.value));
  if (kind != ATTN_LORA_DORA) return ATTN_OK;
  attn_tensor flat;
  const attn_tensor *magnitudes = &m->parts[PART_MAGNITUDE];
  ATTN_TRY(attn_tensor_reshape(magnitudes, 1, (int64_t[]){attn_tensor_count(magnitudes)}, &flat));
  return gather_rows(&place.rows, &flat, &lora->magnitude.value);
}

static attn_status load_module(loading *l, const address *a) {
  const attn_model *model = l->model;
  module m = {.address = a};
  int64_t outputs = 0, inputs = 0;
  for (int64_t i = 0; i < model->parameter_count; ++i)
    if (belongs(model, i, a)) {
      outputs += model->shapes[i].shape[0];
      inputs = model->shapes[i].shape[1];
    }
  if (!outputs)
    return attn_fail(ATTN_BAD_FORMAT, "%s: the model, of type %s, has no matrix %.*s", a->tensor,
                     model->config.type, a->length, a->module);
  for (int p = 0; p < LOW_RANK_PARTS; ++p) ATTN_TRY(find_part(l, a, (part)p, &m.parts[p]));
  ATTN_TRY(check_module(l, &m, outputs, inputs));
  for (int64_t i = 0; i < model->parameter_count; ++i)
    if (belongs(model, i, a)) ATTN_TRY(adapt(l, &m, i));
  return ATTN_OK;
}

/* The weight of a norm that files have without the 1 that is added to it. */
static void add_one(const attn_tensor *values) {
  for (int64_t i = 0; i < values->shape[0]; ++i) {
    if (values->dtype == ATTN_F64)
      ((double *)values->data)[i] += 1;
    else
      ((float *)values->data)[i] += 1;
  }
}

static attn_status check_whole(const address *a, const attn_tensor *stored,
                               const attn_parameter_shape *shape) {
  attn_tensor expected;
  char is[128], should[128];
  ATTN_TRY(attn_tensor_wrap(NULL, stored->dtype, shape->rank, shape->shape, &expected));
  if (attn_same_shape(stored, &expected)) return ATTN_OK;
  return attn_fail(ATTN_BAD_FORMAT, "%s is %s, expected %s", a->tensor, attn_shape_text(stored, is),
                   attn_shape_text(&expected, should));
}

/* A parameter that was trained itself. */
static attn_status load_whole(loading *l, const address *a) {
  attn_model *model = l->model;
  attn_tensor stored, values;
  attn_place place;
  int64_t index = 0;
  while (index < model->parameter_count && !belongs(model, index, a)) ++index;
  if (index == model->parameter_count)
    return attn_fail(ATTN_BAD_FORMAT, "%s: the model, of type %s, has no tensor %.*s", a->tensor,
                     model->config.type, a->length, a->module);
  const attn_parameter_shape *shape = &model->shapes[index];
  ATTN_TRY(attn_family_place(&model->config, shape, ATTN_IN_SAFETENSORS, &place));
  if (place.rows.part)
    return attn_fail(ATTN_UNSUPPORTED, "%s holds several parameters of the model", a->tensor);
  ATTN_TRY(attn_safetensors_find(l->file, a->tensor, &stored));
  ATTN_TRY(check_whole(a, &stored, shape));
  attn_dtype dtype = model->compute == ATTN_F64 ? ATTN_F64 : ATTN_F32;
  ATTN_TRY(attn_tensor_create(dtype, shape->rank, shape->shape, &values));
  attn_status status = gather_rows(&place.rows, &stored, &values);
  if (attn_model_norm_offset(model, index)) add_one(&values);
  if (status == ATTN_OK) return attn_model_replace_values(model, index, &values);
  attn_tensor_destroy(&values);
  return status;
}

/* Each module by its lora_A, which a lora_B or a magnitude has to have. */
static attn_status load_tensor(loading *l, const char *name) {
  address a;
  attn_tensor first;
  ATTN_TRY(split(name, &a));
  if (a.part == PART_A) return load_module(l, &a);
  if (a.part == PART_WHOLE) return load_whole(l, &a);
  ATTN_TRY(find_part(l, &a, PART_A, &first));
  return first.data ? ATTN_OK : attn_fail(ATTN_BAD_FORMAT, "%s is there without its lora_A", name);
}

static attn_status load_weights(loading *l, const char *path) {
  ATTN_TRY(attn_safetensors_open(path, &l->file));
  attn_status status = ATTN_OK;
  for (int64_t i = 0; i < attn_safetensors_count(l->file) && status == ATTN_OK; ++i)
    status = load_tensor(l, attn_safetensors_name(l->file, i));
  attn_safetensors_close(l->file);
  if (status != ATTN_OK) return attn_fail_in(status, "%s", path);
  return attn_model_merge_lora(l->model);
}

attn_status attn_model_load_lora(attn_model *model, const char *directory) {
  if (!model || !directory)
    return attn_fail(ATTN_INVALID_ARGUMENT, "load_lora: the model or the directory is NULL");
  if (attn_is_cuda(model->device) || model->adapters)
    return attn_fail(ATTN_UNSUPPORTED, "load_lora: the model %s",
                     model->adapters ? "has adapters already" : "is on a GPU");
  loading l = {.model = model};
  json_t *config = NULL;
  char *config_path = attn_path_join(directory, attn_lora_config_file);
  char *weights_path = attn_path_join(directory, attn_lora_weights_file);
  attn_status status =
      config_path && weights_path ? attn_json_load(config_path, &config) : ATTN_OUT_OF_MEMORY;
  if (status == ATTN_OK) {
    status = read_config(config, &l);
    if (status != ATTN_OK) status = attn_fail_in(status, "%s", config_path);
  }
  if (status == ATTN_OK) status = load_weights(&l, weights_path);
  json_decref(config);
  attn_free(config_path);
  attn_free(weights_path);
  return status;
}
