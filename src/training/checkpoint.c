#include "training/checkpoint.h"
#include "base/memory.h"
#include "base/status.h"
#include "base/text.h"
#include "files/json.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char format_key[] = "format", format_name[] = "attn-training-1";
static const char config_key[] = "config";
static const char model_prefix[] = "model.";
/* Keys that not every run has: one that only the file has is a difference too. */
static const char *const optional_keys[] = {"lora", "task", "device"};
enum { OPTIONAL_KEYS = sizeof optional_keys / sizeof *optional_keys };

enum { COUNTERS = 3, RUN_TENSORS = 3 };

/* -- Identity -- */

static char *next_text(attn_identity *identity, const char *key) {
  identity->keys[identity->count] = key;
  return identity->texts[identity->count++];
}

void attn_identity_integer(attn_identity *identity, const char *key, int64_t value) {
  snprintf(next_text(identity, key), ATTN_IDENTITY_TEXT, "%" PRId64, value);
}

/* 17 digits tell all float64 numbers apart; fewer when they do, for the reader of a message. */
void attn_identity_number(attn_identity *identity, const char *key, double value) {
  char *text = next_text(identity, key);
  snprintf(text, ATTN_IDENTITY_TEXT, "%.6g", value);
  if (strtod(text, NULL) != value) snprintf(text, ATTN_IDENTITY_TEXT, "%.17g", value);
}

void attn_identity_text(attn_identity *identity, const char *key, const char *value) {
  snprintf(next_text(identity, key), ATTN_IDENTITY_TEXT, "%s", value);
}

void attn_identity_hash(attn_identity *identity, const char *key, uint64_t value) {
  snprintf(next_text(identity, key), ATTN_IDENTITY_TEXT, "%016" PRIx64, value);
}

attn_status attn_identity_config(attn_identity *identity, const json_t *config) {
  char *text = json_dumps(config, JSON_COMPACT | JSON_SORT_KEYS);
  identity->config = text ? attn_strdup(text) : NULL;
  free(text); /* of jansson's own allocation */
  return identity->config ? ATTN_OK : ATTN_OUT_OF_MEMORY;
}

void attn_identity_free(attn_identity *identity) {
  attn_free(identity->config);
  *identity = (attn_identity){0};
}

static void add_difference(attn_text *text, const char *key, const char *was, const char *now) {
  attn_text_print(text, "%s%s was %s, now %s", text->length ? "; " : "", key,
                  was ? was : "not recorded", now ? now : "absent");
}

static void compare_values(attn_text *text, const char *key, const json_t *was, const json_t *now) {
  if (json_equal(was, now)) return;
  char *before = was ? json_dumps(was, JSON_ENCODE_ANY | JSON_COMPACT) : NULL;
  char *after = now ? json_dumps(now, JSON_ENCODE_ANY | JSON_COMPACT) : NULL;
  add_difference(text, key, before ? before : "absent", after);
  free(before);
  free(after);
}

/* Each key of the two configurations whose values differ. */
static attn_status compare_configs(attn_text *text, const char *was, const char *now) {
  if (!was) return attn_fail(ATTN_BAD_FORMAT, "it has no configuration");
  if (strcmp(was, now) == 0) return ATTN_OK;
  json_t *before = NULL, *after = NULL;
  attn_status status = attn_json_parse(was, strlen(was), "its configuration", &before);
  if (status == ATTN_OK) status = attn_json_parse(now, strlen(now), "configuration", &after);
  const char *key;
  json_t *value;
  if (status == ATTN_OK) {
    json_object_foreach(before, key, value)
        compare_values(text, key, value, json_object_get(after, key));
    json_object_foreach(after, key, value) if (!json_object_get(before, key))
        compare_values(text, key, NULL, value);
  }
  json_decref(before);
  json_decref(after);
  return status;
}

static bool has_key(const attn_identity *identity, const char *key) {
  for (int i = 0; i < identity->count; ++i)
    if (strcmp(identity->keys[i], key) == 0) return true;
  return false;
}

static attn_status compare(const attn_safetensors *file, const attn_identity *identity) {
  const char *format = attn_safetensors_metadata(file, format_key);
  if (!format || strcmp(format, format_name) != 0)
    return attn_fail(ATTN_BAD_FORMAT,
                     "it is not a training checkpoint of this version (%s, not %s)",
                     format ? format : "no format", format_name);
  attn_text text = {0};
  char *differences = NULL;
  attn_status status =
      compare_configs(&text, attn_safetensors_metadata(file, config_key), identity->config);
  for (int i = 0; i < identity->count && status == ATTN_OK; ++i) {
    const char *was = attn_safetensors_metadata(file, identity->keys[i]);
    if (!was || strcmp(was, identity->texts[i]) != 0)
      add_difference(&text, identity->keys[i], was, identity->texts[i]);
  }
  for (int i = 0; i < OPTIONAL_KEYS && status == ATTN_OK; ++i) {
    const char *was = attn_safetensors_metadata(file, optional_keys[i]);
    if (was && !has_key(identity, optional_keys[i]))
      add_difference(&text, optional_keys[i], was, NULL);
  }
  bool differ = text.length > 0 || text.failed;
  if (status != ATTN_OK || !differ) {
    attn_text_free(&text);
    return status;
  }
  ATTN_TRY(attn_text_take(&text, &differences));
  status =
      attn_fail(ATTN_INVALID_ARGUMENT, "the checkpoint belongs to another run: %s", differences);
  attn_free(differences);
  return status;
}

/* -- Tensors -- */

/* The tensors that are not the optimiser's: masters and the run's own numbers. */
typedef struct inventory {
  attn_named_tensor *tensors;
  int64_t count, own; /* in all; the first `own` names are allocated here */
  int64_t counters[COUNTERS];
} inventory;

static void inventory_free(inventory *list) {
  for (int64_t i = 0; list->tensors && i < list->own; ++i)
    attn_free((void *)(uintptr_t)list->tensors[i].name);
  attn_free(list->tensors);
}

static char *model_name(const char *name) {
  size_t size = sizeof model_prefix + strlen(name);
  char *text = attn_alloc(size);
  if (text) snprintf(text, size, "%s%s", model_prefix, name);
  return text;
}

static attn_status add_numbers(inventory *list, const char *name, attn_dtype dtype, void *data,
                               int rank, const int64_t *shape) {
  attn_named_tensor *entry = &list->tensors[list->count++];
  entry->name = name;
  return attn_tensor_wrap(data, dtype, rank, shape, &entry->tensor);
}

static attn_status take_inventory(const attn_run_state *state, inventory *list) {
  const attn_history *history = state->history;
  int64_t parameters = state->parameter_count;
  int64_t moments = attn_optimiser_state_count(state->optimiser);
  *list = (inventory){.counters = {state->step, state->skipped, state->skipped_in_row}};
  list->tensors =
      attn_alloc_array((size_t)(parameters + moments + RUN_TENSORS), sizeof *list->tensors);
  if (!list->tensors) return ATTN_OUT_OF_MEMORY;
  for (; list->own < parameters; ++list->own) {
    const attn_parameter *parameter = state->parameters[list->own];
    attn_named_tensor *entry = &list->tensors[list->own];
    entry->tensor = parameter->value;
    entry->name = model_name(parameter->name);
    if (!entry->name) return ATTN_OUT_OF_MEMORY;
  }
  attn_optimiser_state(state->optimiser, list->tensors + parameters);
  list->count = parameters + moments;
  ATTN_TRY(add_numbers(list, "run.counters", ATTN_I64, list->counters, 1, (int64_t[]){COUNTERS}));
  ATTN_TRY(add_numbers(list, "run.loss", ATTN_F64, history->loss, 1, &history->steps));
  return add_numbers(list, "run.validation", ATTN_F64, history->validation, 2,
                     (int64_t[]){history->validations, 2});
}

attn_status attn_checkpoint_write(const char *path, const attn_run_state *state,
                                  const attn_identity *identity) {
  attn_metadata metadata[ATTN_IDENTITY_KEYS + 2] = {{format_key, format_name},
                                                    {config_key, identity->config}};
  for (int i = 0; i < identity->count; ++i)
    metadata[2 + i] = (attn_metadata){identity->keys[i], identity->texts[i]};
  inventory list;
  attn_status status = take_inventory(state, &list);
  if (status == ATTN_OK)
    status = attn_safetensors_write(path, list.tensors, list.count, metadata, 2 + identity->count);
  inventory_free(&list);
  return status;
}

/* A tensor of the file with the dtype and rank that it must have. */
static attn_status find(const attn_safetensors *file, const char *name, attn_dtype dtype, int rank,
                        attn_tensor *tensor) {
  attn_status status = attn_safetensors_find(file, name, tensor);
  if (status != ATTN_OK) return attn_fail_in(ATTN_BAD_FORMAT, "incomplete");
  if (tensor->dtype != dtype || tensor->rank != rank)
    return attn_fail(ATTN_BAD_FORMAT, "%s is %s of rank %d, expected %s of rank %d", name,
                     attn_dtype_name(tensor->dtype), tensor->rank, attn_dtype_name(dtype), rank);
  return ATTN_OK;
}

static attn_status read_masters(const attn_safetensors *file, const attn_run_state *state) {
  for (int64_t i = 0; i < state->parameter_count; ++i) {
    const attn_parameter *parameter = state->parameters[i];
    char *name = model_name(parameter->name);
    if (!name) return ATTN_OUT_OF_MEMORY;
    attn_tensor stored;
    attn_status status = find(file, name, parameter->value.dtype, parameter->value.rank, &stored);
    attn_free(name);
    if (status == ATTN_OK) status = attn_tensor_copy(&stored, &parameter->value);
    if (status != ATTN_OK) return attn_fail_in(ATTN_BAD_FORMAT, "%s", parameter->name);
  }
  return attn_model_refresh(state->model);
}

static attn_status read_run(const attn_safetensors *file, attn_run_state *state) {
  attn_history *history = state->history;
  attn_tensor counters, loss, validation;
  ATTN_TRY(find(file, "run.counters", ATTN_I64, 1, &counters));
  ATTN_TRY(find(file, "run.loss", ATTN_F64, 1, &loss));
  ATTN_TRY(find(file, "run.validation", ATTN_F64, 2, &validation));
  const int64_t *counter = counters.data;
  if (counters.shape[0] != COUNTERS || counter[0] < 0 || counter[0] > history->most_steps ||
      counter[0] != loss.shape[0] || counter[1] < 0 || counter[1] > counter[0] || counter[2] < 0 ||
      counter[2] > counter[1] || validation.shape[1] != 2)
    return attn_fail(ATTN_BAD_FORMAT, "its counters do not fit together");
  state->step = counter[0];
  state->skipped = counter[1];
  state->skipped_in_row = counter[2];
  if (attn_optimiser_steps(state->optimiser) != state->step - state->skipped)
    return attn_fail(ATTN_BAD_FORMAT, "the optimiser has done %lld steps, the run %lld",
                     (long long)attn_optimiser_steps(state->optimiser),
                     (long long)(state->step - state->skipped));
  memcpy(history->loss, loss.data, (size_t)state->step * sizeof *history->loss);
  history->steps = state->step;
  const double *pairs = validation.data;
  for (int64_t i = 0; i < validation.shape[0]; ++i) {
    if (!(pairs[2 * i] >= 0 && pairs[2 * i] <= (double)state->step))
      return attn_fail(ATTN_BAD_FORMAT, "a validation at step %g", pairs[2 * i]);
    attn_history_add_validation(history, (int64_t)pairs[2 * i], pairs[2 * i + 1]);
  }
  return ATTN_OK;
}

attn_status attn_checkpoint_read(const char *path, attn_run_state *state,
                                 const attn_identity *identity) {
  attn_safetensors *file;
  ATTN_TRY(attn_safetensors_open(path, &file));
  attn_status status = compare(file, identity);
  if (status == ATTN_OK) status = attn_optimiser_load(state->optimiser, file);
  if (status == ATTN_OK) status = read_run(file, state);
  if (status == ATTN_OK) status = read_masters(file, state);
  attn_safetensors_close(file);
  return status == ATTN_OK ? ATTN_OK : attn_fail_in(status, "%s", path);
}
