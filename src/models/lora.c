/* Adapters of a model: which matrices get one, what is trained, and merging. */
#include "models/lora.h"
#include "base/memory.h"
#include "base/status.h"
#include "base/text.h"

#include <string.h>

static const char *const usual_targets[] = {"q_proj", "k_proj", "v_proj", "o_proj"};
enum { USUAL_TARGETS = sizeof usual_targets / sizeof *usual_targets };

const char attn_lora_config_file[] = "adapter_config.json";
const char attn_lora_weights_file[] = "adapter_model.safetensors";
const char attn_lora_prefix[] = "base_model.model.";

/* Names -----------------------------------------------------------------------------------------
 */

/* The length of a name without its last part, where that says which tensor of a module it is. */
static size_t module_length(const char *name) {
  static const char *const ends[] = {".weight", ".bias"};
  size_t length = strlen(name);
  for (size_t i = 0; i < sizeof ends / sizeof *ends; ++i) {
    size_t end = strlen(ends[i]);
    if (length > end && strcmp(name + length - end, ends[i]) == 0) return length - end;
  }
  return length;
}

bool attn_lora_names(const char *name, const char *pattern) {
  size_t length = module_length(name), size = strlen(pattern);
  if (size == 0 || size > length || strncmp(name + length - size, pattern, size) != 0) return false;
  return size == length || name[length - size - 1] == '.';
}

/* A matrix that a layer multiplies by. */
static bool is_layer_matrix(const attn_model *model, int64_t i) {
  static const char prefix[] = "model.layers.";
  const attn_parameter_shape *shape = &model->shapes[i];
  return shape->product && shape->rank == 2 && strncmp(shape->name, prefix, sizeof prefix - 1) == 0;
}

const char *const *attn_lora_targets(const attn_lora_options *options, int *count) {
  *count = options->targets ? options->target_count : USUAL_TARGETS;
  return options->targets ? options->targets : usual_targets;
}

bool attn_lora_targets_all(const attn_lora_options *o) {
  return o->targets && o->target_count == 1 && strcmp(o->targets[0], "all") == 0;
}

static bool is_target(const attn_model *model, const attn_lora_options *o, int64_t i) {
  int count;
  const char *const *targets = attn_lora_targets(o, &count);
  if (!is_layer_matrix(model, i)) return false;
  if (attn_lora_targets_all(o)) return true;
  for (int t = 0; t < count; ++t)
    if (attn_lora_names(model->parameters[i].name, targets[t])) return true;
  return false;
}

/* The last part of a module's name. */
static const char *last_part(const char *name, int *length) {
  size_t end = module_length(name), start = end;
  while (start > 0 && name[start - 1] != '.') --start;
  *length = (int)(end - start);
  return name + start;
}

/* "no matrix ... named X; there are a, b" */
static attn_status fail_unknown(const attn_model *model, const char *wanted) {
  attn_text text = {0};
  char *list = NULL;
  for (int64_t i = 0; i < model->parameter_count; ++i) {
    int length;
    bool listed = !is_layer_matrix(model, i);
    const char *part = last_part(model->parameters[i].name, &length);
    for (int64_t k = 0; k < i && !listed; ++k) {
      int size;
      const char *other = last_part(model->parameters[k].name, &size);
      listed =
          is_layer_matrix(model, k) && size == length && strncmp(part, other, (size_t)size) == 0;
    }
    if (!listed) attn_text_print(&text, "%s%.*s", text.length ? ", " : "", length, part);
  }
  ATTN_TRY(attn_text_take(&text, &list));
  attn_status status =
      attn_fail(ATTN_INVALID_ARGUMENT, "lora: no layer has a matrix named %s; there are %s, or all",
                wanted, list && *list ? list : "none");
  attn_free(list);
  return status;
}

/* Attaching -------------------------------------------------------------------------------------
 */

static attn_status check_options(const attn_model *model, const attn_lora_options *o) {
  if (!o || o->struct_size != sizeof *o)
    return attn_fail(ATTN_INVALID_ARGUMENT, "lora: struct_size is %zu, expected %zu",
                     o ? o->struct_size : 0, sizeof *o);
  if (model->adapters)
    return attn_fail(ATTN_INVALID_ARGUMENT, "lora: the model has adapters already");
  if (!o->targets || attn_lora_targets_all(o)) return ATTN_OK;
  if (o->target_count < 1)
    return attn_fail(ATTN_INVALID_ARGUMENT, "lora: the list of targets is empty");
  for (int t = 0; t < o->target_count; ++t) {
    bool found = false;
    for (int64_t i = 0; i < model->parameter_count && !found; ++i)
      found =
          is_layer_matrix(model, i) && attn_lora_names(model->parameters[i].name, o->targets[t]);
    if (!found) return fail_unknown(model, o->targets[t]);
  }
  return ATTN_OK;
}

attn_status attn_model_adapt(attn_model *model, int64_t index, attn_lora_kind kind, int64_t rank,
                             double alpha, uint64_t seed) {
  attn_parameter *w = &model->parameters[index];
  /* beside the streams of fresh parameters: an adapter does not depend on the others */
  uint64_t stream = (UINT64_C(1) << 32) + (uint64_t)index;
  if (!w->weight)
    return attn_fail(ATTN_INVALID_ARGUMENT, "lora: %s is not ready for products", w->name);
  if (w->adapter) return attn_fail(ATTN_BAD_FORMAT, "lora: %s has two adapters", w->name);
  if (!model->adapters) {
    model->adapters = attn_alloc_array((size_t)model->parameter_count, sizeof *model->adapters);
    if (!model->adapters) return ATTN_OUT_OF_MEMORY;
  }
  ATTN_TRY(attn_lora_create(kind, rank, alpha, w, model->compute, seed, stream,
                            &model->adapters[index]));
  w->adapter = &model->adapters[index]->adapter;
  return ATTN_OK;
}

/* A file of adapters, or of what is trained besides, names whole tensors. */
static attn_status check_whole(const attn_model *model, int64_t i) {
  attn_place place;
  ATTN_TRY(attn_family_place(&model->config, &model->shapes[i], ATTN_IN_SAFETENSORS, &place));
  if (!place.rows.part) return ATTN_OK;
  return attn_fail(ATTN_UNSUPPORTED, "lora: %s is a part of the tensor %s", model->shapes[i].name,
                   place.name);
}

static attn_status add_gradients(attn_lora *lora) {
  attn_parameter *list[ATTN_LORA_PARAMETERS];
  int count = attn_lora_list(lora, list);
  for (int i = 0; i < count; ++i)
    ATTN_TRY(attn_tensor_create(list[i]->value.dtype, list[i]->value.rank, list[i]->value.shape,
                                &list[i]->gradient));
  return ATTN_OK;
}

static attn_status train_parameters(attn_model *model, const attn_lora_options *o) {
  for (int t = 0; t < o->trained_count; ++t) {
    bool found = false;
    for (int64_t i = 0; i < model->parameter_count; ++i) {
      if (!attn_lora_names(model->parameters[i].name, o->trained[t])) continue;
      found = true;
      if (model->parameters[i].adapter)
        return attn_fail(ATTN_INVALID_ARGUMENT, "lora: %s is both adapted and trained",
                         model->parameters[i].name);
      ATTN_TRY(check_whole(model, i));
      ATTN_TRY(attn_model_make_parameter_trainable(model, i));
    }
    if (!found)
      return attn_fail(ATTN_INVALID_ARGUMENT, "lora: the model has no parameter named %s",
                       o->trained[t]);
  }
  return ATTN_OK;
}

attn_status attn_model_attach_lora(attn_model *model, const attn_lora_options *options,
                                   uint64_t seed) {
  ATTN_TRY(check_options(model, options));
  for (int64_t i = 0; i < model->parameter_count; ++i) {
    if (!is_target(model, options, i)) continue;
    ATTN_TRY(check_whole(model, i));
    ATTN_TRY(attn_model_adapt(model, i, options->kind, options->rank, options->alpha, seed));
    ATTN_TRY(add_gradients(model->adapters[i]));
  }
  if (!model->adapters) return fail_unknown(model, "q_proj, k_proj, v_proj or o_proj");
  return train_parameters(model, options);
}

attn_status attn_model_merge_lora(attn_model *model) {
  if (attn_is_cuda(model->device))
    return attn_fail(ATTN_UNSUPPORTED, "lora: adapters are merged on the processor");
  for (int64_t i = 0; model->adapters && i < model->parameter_count; ++i) {
    attn_parameter *w = &model->parameters[i];
    attn_tensor merged;
    if (!w->adapter) continue;
    ATTN_TRY(attn_lora_merge(model->adapters[i], w, model->compute, &merged));
    w->adapter = NULL;
    attn_lora_destroy(model->adapters[i]);
    model->adapters[i] = NULL;
    ATTN_TRY(attn_model_replace_values(model, i, &merged));
  }
  attn_free(model->adapters);
  model->adapters = NULL;
  return ATTN_OK;
}
