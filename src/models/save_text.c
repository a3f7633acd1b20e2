/* A model's text, saved: files are copied from directory to directory and keys from GGUF file to
 * GGUF file; between the two, tokenizers are written anew. */
#include "base/io.h"
#include "base/memory.h"
#include "base/status.h"
#include "files/json.h"
#include "models/model.h"

#include <stdio.h>
#include <string.h>

enum { LARGEST_FILE = 256 << 20, LARGEST_TEMPLATE = 1 << 20 };

/* To a directory ---------------------------------------------------------------------------------
 */

static attn_status copy_file(const char *from, const char *to, const char *name) {
  char *source = attn_path_join(from, name), *target = attn_path_join(to, name), *data = NULL;
  size_t size = 0;
  attn_status status = source && target ? ATTN_OK : ATTN_OUT_OF_MEMORY;
  if (status == ATTN_OK && attn_path_exists(source)) {
    status = attn_file_read(source, LARGEST_FILE, &data, &size);
    if (status == ATTN_OK) status = attn_file_write(target, data, size);
  }
  attn_free(data);
  attn_free(source);
  attn_free(target);
  return status;
}

static attn_status copy_files(const char *from, const char *to) {
  static const char *const names[] = {"tokenizer.json",
                                      "tokenizer_config.json",
                                      "special_tokens_map.json",
                                      "chat_template.jinja",
                                      "added_tokens.json",
                                      "tokenizer.model",
                                      "vocab.json",
                                      "merges.txt"};
  for (size_t i = 0; i < sizeof names / sizeof *names; ++i) ATTN_TRY(copy_file(from, to, names[i]));
  return ATTN_OK;
}

static attn_status save_json(const char *directory, const char *name, const json_t *json) {
  char *path = attn_path_join(directory, name);
  attn_status status = path ? attn_json_save(path, json) : ATTN_OUT_OF_MEMORY;
  attn_free(path);
  return status;
}

static void name_token(json_t *json, const char *key, const attn_tokenizer_spec *spec, int64_t id) {
  if (id >= 0 && id < spec->token_count)
    json_object_set_new(json, key, json_stringn(spec->tokens[id], spec->token_sizes[id]));
}

/* tokenizer_config.json: what is not in tokenizer.json. */
static attn_status save_tokenizer_config(const attn_gguf *file, const attn_tokenizer_spec *spec,
                                         const char *directory) {
  attn_gguf_text template = {0};
  int64_t padding = -1;
  ATTN_TRY(attn_gguf_string(file, "tokenizer.chat_template", ATTN_OPTIONAL, &template));
  ATTN_TRY(attn_gguf_int(file, "tokenizer.ggml.padding_token_id", ATTN_OPTIONAL, 0, UINT32_MAX,
                         &padding));
  json_t *json = json_pack("{s:s, s:b, s:b, s:b}", "tokenizer_class", "PreTrainedTokenizerFast",
                           "add_bos_token", (int)spec->add_bos, "add_eos_token", (int)spec->add_eos,
                           "clean_up_tokenization_spaces", 0);
  if (!json) return attn_fail(ATTN_OUT_OF_MEMORY, "out of memory");
  name_token(json, "bos_token", spec, spec->bos);
  name_token(json, "eos_token", spec, spec->eos);
  name_token(json, "unk_token", spec, spec->unknown);
  name_token(json, "pad_token", spec, padding);
  if (template.size)
    json_object_set_new(json, "chat_template", json_stringn(template.data, template.size));
  attn_status status = save_json(directory, "tokenizer_config.json", json);
  json_decref(json);
  return status;
}

static attn_status save_vocabulary(const attn_gguf *file, const char *directory) {
  attn_gguf_vocabulary v = {.spec = ATTN_TOKENIZER_SPEC_INIT};
  if (!attn_gguf_has_vocabulary(file)) return ATTN_OK;
  char *path = attn_path_join(directory, "tokenizer.json");
  attn_status status = path ? attn_gguf_vocabulary_read(file, &v) : ATTN_OUT_OF_MEMORY;
  if (status == ATTN_OK) status = attn_tokenizer_save(&v.spec, path);
  if (status == ATTN_OK) status = save_tokenizer_config(file, &v.spec, directory);
  attn_gguf_vocabulary_free(&v);
  attn_free(path);
  return status;
}

attn_status attn_model_text_save(const attn_model *model, const char *directory) {
  const attn_source *source = &model->source;
  if (source->generation)
    ATTN_TRY(save_json(directory, "generation_config.json", source->generation));
  if (source->gguf) return save_vocabulary(source->gguf, directory);
  return source->path ? copy_files(source->path, directory) : ATTN_OK;
}

/* To a GGUF file ---------------------------------------------------------------------------------
 */

static attn_status load_beside(const attn_source *source, const char *name, json_t **json) {
  char *path = attn_path_join(source->path, name);
  if (!path) return ATTN_OUT_OF_MEMORY;
  attn_status status = attn_path_exists(path) ? attn_json_load(path, json) : ATTN_OK;
  attn_free(path);
  return status;
}

/* The id of a token that tokenizer_config.json names, "<s>" or {"content": "<s>"}; -1: none. */
static int64_t named_token(const attn_model *model, const json_t *config, const char *key) {
  const json_t *name = json_object_get(config, key);
  if (json_is_object(name)) name = json_object_get(name, "content");
  if (!json_is_string(name)) return -1;
  return attn_tokenizer_find(model->text.tokenizer, json_string_value(name),
                             json_string_length(name));
}

/* The first that is said: by name, by number. */
static int64_t find_token(const attn_model *model, const json_t *config, const char *name,
                          const char *id) {
  const json_t *const places[] = {model->source.config, model->source.generation};
  int64_t found = named_token(model, config, name);
  for (int i = 0; found < 0 && i < 2; ++i) {
    const json_t *value = json_object_get(places[i], id);
    if (json_is_array(value)) value = json_array_get(value, 0);
    if (json_is_integer(value)) found = json_integer_value(value);
  }
  return found < attn_tokenizer_count(model->text.tokenizer) ? found : -1;
}

static void add_id(attn_gguf_draft *draft, const char *key, int64_t id) {
  if (id >= 0) attn_gguf_add_u32(draft, key, (uint32_t)id);
}

/* The other tokens at which the configuration says that a text ends: keys for two of them. */
static void add_more_ends(const attn_model *model, int64_t end, attn_gguf_draft *draft) {
  static const char *const keys[] = {"tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"};
  const json_t *const places[] = {model->source.config, model->source.generation};
  int64_t first = end;
  int used = 0;
  for (int p = 0; p < 2; ++p) {
    const json_t *ids = json_object_get(places[p], "eos_token_id");
    size_t count = json_is_array(ids) ? json_array_size(ids) : 1;
    for (size_t i = 0; i < count && used < 2; ++i) {
      const json_t *value = json_is_array(ids) ? json_array_get(ids, i) : ids;
      int64_t id = json_is_integer(value) ? json_integer_value(value) : -1;
      if (id < 0 || id >= model->config.vocabulary || id == end || id == first) continue;
      add_id(draft, keys[used++], id);
      first = id;
    }
  }
}

static void add_ids(const attn_model *model, const json_t *config, const attn_tokenizer_spec *spec,
                    attn_gguf_draft *draft) {
  int64_t begin =
      spec->add_bos ? spec->bos : find_token(model, config, "bos_token", "bos_token_id");
  int64_t end = spec->add_eos ? spec->eos : find_token(model, config, "eos_token", "eos_token_id");
  add_id(draft, "tokenizer.ggml.bos_token_id", begin);
  add_id(draft, "tokenizer.ggml.eos_token_id", end);
  add_more_ends(model, end, draft);
  add_id(draft, "tokenizer.ggml.unknown_token_id", spec->unknown);
  add_id(draft, "tokenizer.ggml.padding_token_id",
         find_token(model, config, "pad_token", "pad_token_id"));
  attn_gguf_add_bool(draft, "tokenizer.ggml.add_bos_token", spec->add_bos);
  attn_gguf_add_bool(draft, "tokenizer.ggml.add_eos_token", spec->add_eos);
  if (strcmp(spec->model, "bert") != 0) return;
  add_id(draft, "tokenizer.ggml.cls_token_id", spec->bos);
  add_id(draft, "tokenizer.ggml.seperator_token_id", spec->eos); /* the format's spelling */
}

static void add_strings(attn_gguf_draft *draft, const char *key, const char *const *strings,
                        const size_t *sizes, int64_t count) {
  attn_gguf_add_strings(draft, key, count);
  for (int64_t i = 0; i < count; ++i) attn_gguf_add_element(draft, strings[i], sizes[i]);
}

static void add_vocabulary(const attn_tokenizer_spec *spec, attn_gguf_draft *draft) {
  const char *pre = spec->pre ? spec->pre : "default";
  attn_gguf_add_string(draft, "tokenizer.ggml.model", spec->model, strlen(spec->model));
  attn_gguf_add_string(draft, "tokenizer.ggml.pre", pre, strlen(pre));
  add_strings(draft, "tokenizer.ggml.tokens", spec->tokens, spec->token_sizes, spec->token_count);
  attn_gguf_add_i32s(draft, "tokenizer.ggml.token_type", spec->types, spec->token_count);
  if (spec->scores) {
    attn_gguf_add_f32s(draft, "tokenizer.ggml.scores", spec->scores, spec->token_count);
    attn_gguf_add_bool(draft, "tokenizer.ggml.add_space_prefix", spec->add_space_prefix);
  }
  if (strcmp(spec->model, "gpt2") == 0)
    add_strings(draft, "tokenizer.ggml.merges", spec->merges, spec->merge_sizes, spec->merge_count);
  if (strcmp(spec->model, "t5") == 0) {
    attn_gguf_add_bool(draft, "tokenizer.ggml.remove_extra_whitespaces", spec->remove_extra_spaces);
    if (spec->charsmap)
      attn_gguf_add_u8s(draft, "tokenizer.ggml.precompiled_charsmap", spec->charsmap,
                        spec->charsmap_size);
  }
  if (strcmp(spec->model, "bert") == 0 && !(spec->lower_case && spec->strip_accents)) {
    attn_gguf_add_bool(draft, "tokenizer.ggml.normalizer.lowercase", spec->lower_case);
    attn_gguf_add_bool(draft, "tokenizer.ggml.normalizer.strip_accents", spec->strip_accents);
  }
}

static attn_status add_template(const attn_source *source, const json_t *config,
                                attn_gguf_draft *draft) {
  const json_t *string = json_object_get(config, "chat_template");
  char *path = attn_path_join(source->path, "chat_template.jinja"), *text = NULL;
  size_t size = 0;
  if (!path) return ATTN_OUT_OF_MEMORY;
  attn_status status = ATTN_OK;
  if (attn_path_exists(path)) status = attn_file_read(path, LARGEST_TEMPLATE, &text, &size);
  attn_free(path);
  if (text)
    attn_gguf_add_string(draft, "tokenizer.chat_template", text, size);
  else if (status == ATTN_OK && json_is_string(string))
    attn_gguf_add_string(draft, "tokenizer.chat_template", json_string_value(string),
                         json_string_length(string));
  attn_free(text);
  return status;
}

static attn_status add_tokenizer(const attn_model *model, attn_gguf_draft *draft) {
  attn_tokenizer_arrays arrays;
  json_t *config = NULL;
  ATTN_TRY(load_beside(&model->source, "tokenizer_config.json", &config));
  attn_status status =
      attn_tokenizer_describe(model->text.tokenizer, model->config.vocabulary, &arrays);
  if (status == ATTN_OK) {
    add_vocabulary(&arrays.spec, draft);
    add_ids(model, config, &arrays.spec, draft);
    attn_tokenizer_arrays_free(&arrays);
    status = add_template(&model->source, config, draft);
  } else {
    status = attn_fail_in(status, "tokenizer.json");
  }
  json_decref(config);
  return status;
}

static void copy_keys(const attn_gguf *file, attn_gguf_draft *draft) {
  static const char *const prefixes[] = {"tokenizer.", "general.sampling."};
  for (int64_t i = 0; i < attn_gguf_key_count(file); ++i)
    for (int p = 0; p < 2; ++p)
      if (strncmp(attn_gguf_key(file, i), prefixes[p], strlen(prefixes[p])) == 0)
        attn_gguf_add_copy(draft, file, i);
}

attn_status attn_model_text_to_gguf(const attn_model *model, attn_gguf_draft *draft) {
  if (model->source.gguf) {
    copy_keys(model->source.gguf, draft);
    return ATTN_OK;
  }
  attn_generation_to_gguf(&model->generation, draft);
  if (model->text.tokenizer) return add_tokenizer(model, draft);
  attn_gguf_add_string(draft, "tokenizer.ggml.model", "none", strlen("none"));
  return ATTN_OK;
}
