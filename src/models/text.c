#include "models/text.h"
#include "base/io.h"
#include "base/memory.h"
#include "base/status.h"
#include "files/json.h"
#include "models/model.h"

#include <string.h>

enum { BYTES = 256 };

/* Ends -------------------------------------------------------------------------------------------
 */

/* Tokens that end a text or a turn wherever a vocabulary has them. */
static const char *const end_names[] = {"<|im_end|>",    "<|eot_id|>",      "<|eom_id|>",
                                        "<end_of_turn>", "<|end|>",         "<|endoftext|>",
                                        "</s>",          "<|end_of_text|>", "<eos>"};

static void add_end(attn_model_text *text, int64_t token) {
  if (token < 0 || token > INT32_MAX || text->end_count == ATTN_MOST_ENDS) return;
  for (int i = 0; i < text->end_count; ++i)
    if (text->ends[i] == token) return;
  text->ends[text->end_count++] = (int32_t)token;
}

static void add_known_ends(attn_model_text *text) {
  for (size_t i = 0; text->tokenizer && i < sizeof end_names / sizeof *end_names; ++i) {
    int32_t id = attn_tokenizer_find(text->tokenizer, end_names[i], strlen(end_names[i]));
    if (id >= 0 && attn_tokenizer_is_special(text->tokenizer, id)) add_end(text, id);
  }
}

/* eos_token_id: a number or a list of them. */
static void add_ends_of(attn_model_text *text, const json_t *config) {
  const json_t *ids = json_object_get(config, "eos_token_id");
  if (json_is_integer(ids)) add_end(text, json_integer_value(ids));
  for (size_t i = 0; i < json_array_size(ids); ++i) {
    const json_t *id = json_array_get(ids, i);
    if (json_is_integer(id)) add_end(text, json_integer_value(id));
  }
}

/* A directory ------------------------------------------------------------------------------------
 */

/* `name` in the directory as JSON; NULL when it is absent. */
static attn_status load_beside(const attn_source *source, const char *name, json_t **json) {
  char *path = attn_path_join(source->path, name);
  if (!path) return ATTN_OUT_OF_MEMORY;
  attn_status status = attn_path_exists(path) ? attn_json_load(path, json) : ATTN_OK;
  attn_free(path);
  return status;
}

/* The template is a string in tokenizer_config.json, or a file of its own. */
static attn_status load_template(const attn_source *source, attn_model_text *text) {
  json_t *config = NULL;
  char *path = attn_path_join(source->path, "chat_template.jinja"), *file = NULL;
  size_t size = 0;
  const size_t most = 1 << 20;
  if (!path) return ATTN_OUT_OF_MEMORY;
  attn_status status = attn_path_exists(path) ? attn_file_read(path, most, &file, &size) : ATTN_OK;
  if (status == ATTN_OK && file) status = attn_chat_recognise(file, size, text);
  if (status == ATTN_OK && !file) status = load_beside(source, "tokenizer_config.json", &config);
  const json_t *template = json_object_get(config, "chat_template");
  if (status == ATTN_OK && json_is_string(template))
    status = attn_chat_recognise(json_string_value(template), json_string_length(template), text);
  json_decref(config);
  attn_free(file);
  attn_free(path);
  return status;
}

static attn_status load_from_directory(const attn_source *source, attn_model_text *text) {
  char *path = attn_path_join(source->path, "tokenizer.json");
  if (!path) return ATTN_OUT_OF_MEMORY;
  attn_status status = ATTN_OK;
  if (attn_path_exists(path)) status = attn_tokenizer_load(path, &text->tokenizer);
  attn_free(path);
  ATTN_TRY(status);
  if (!text->tokenizer) return ATTN_OK;
  add_ends_of(text, source->config);
  add_ends_of(text, source->generation);
  return load_template(source, text);
}

/* GGUF -------------------------------------------------------------------------------------------
 */

/* The strings of a list as the tokenizer takes them: pointers and sizes in one block. */
static attn_status spread(const attn_gguf_list *list, const char *const **strings,
                          const size_t **sizes) {
  size_t count = (size_t)list->count;
  const char **pointers = attn_alloc_array(count ? count : 1, sizeof *pointers + sizeof(size_t));
  if (!pointers) return ATTN_OUT_OF_MEMORY;
  size_t *lengths = (size_t *)(pointers + count);
  for (size_t i = 0; i < count; ++i) {
    attn_gguf_text one = attn_gguf_string_at(list, (int64_t)i);
    pointers[i] = one.data;
    lengths[i] = one.size;
  }
  *strings = pointers;
  *sizes = lengths;
  return ATTN_OK;
}

static attn_status read_strings(const attn_gguf *file, attn_gguf_vocabulary *v) {
  attn_gguf_list tokens = {0}, merges = {0}, types = {0}, scores = {0};
  ATTN_TRY(attn_gguf_strings(file, "tokenizer.ggml.tokens", ATTN_REQUIRED, &tokens));
  ATTN_TRY(attn_gguf_strings(file, "tokenizer.ggml.merges", ATTN_OPTIONAL, &merges));
  ATTN_TRY(attn_gguf_ints(file, "tokenizer.ggml.token_type", ATTN_OPTIONAL, 0, 255, &types));
  ATTN_TRY(attn_gguf_doubles(file, "tokenizer.ggml.scores", ATTN_OPTIONAL, &scores));
  if ((types.count && types.count != tokens.count) ||
      (scores.count && scores.count != tokens.count))
    return attn_fail(ATTN_BAD_FORMAT, "tokenizer.ggml: %lld tokens, but %lld types and %lld scores",
                     (long long)tokens.count, (long long)types.count, (long long)scores.count);
  v->spec.token_count = tokens.count;
  v->spec.merge_count = merges.count;
  ATTN_TRY(spread(&tokens, &v->spec.tokens, &v->spec.token_sizes));
  ATTN_TRY(spread(&merges, &v->spec.merges, &v->spec.merge_sizes));
  if (types.count) {
    v->spec.types = v->types = attn_alloc_array((size_t)types.count, sizeof *v->types);
    if (!v->types) return ATTN_OUT_OF_MEMORY;
    for (int64_t i = 0; i < types.count; ++i) v->types[i] = (int32_t)attn_gguf_int_at(&types, i);
  }
  if (scores.count) {
    v->spec.scores = v->scores = attn_alloc_array((size_t)scores.count, sizeof *v->scores);
    if (!v->scores) return ATTN_OUT_OF_MEMORY;
    for (int64_t i = 0; i < scores.count; ++i)
      v->scores[i] = (float)attn_gguf_double_at(&scores, i);
  }
  return ATTN_OK;
}

static attn_status read_text(const attn_gguf *file, const char *key, attn_json_need need, char *to,
                             size_t size) {
  attn_gguf_text text = {0};
  ATTN_TRY(attn_gguf_string(file, key, need, &text));
  if (text.size >= size)
    return attn_fail(ATTN_UNSUPPORTED, "%s: '%.*s' is unknown", key, (int)size, text.data);
  if (text.size) memcpy(to, text.data, text.size);
  to[text.size] = 0;
  return ATTN_OK;
}

static attn_status read_id(const attn_gguf *file, const char *key, int32_t *id) {
  int64_t value = -1;
  ATTN_TRY(attn_gguf_int(file, key, ATTN_OPTIONAL, 0, INT32_MAX, &value));
  if (value >= 0) *id = (int32_t)value;
  return ATTN_OK;
}

/* Files of that time leave the key out: what llama.cpp does then. */
static bool adds_bos(const attn_gguf_vocabulary *v) {
  static const char *const with[] = {"llama-bpe", "llama3", "llama-v3"};
  for (size_t i = 0; i < sizeof with / sizeof *with; ++i)
    if (strcmp(v->pre, with[i]) == 0) return true;
  return strcmp(v->model, "llama") == 0;
}

/* [CLS] and [SEP], by keys of their own (misspelt in the format) or as BOS and EOS; where no key
 * says which tokens they are, those of BERT, as in llama.cpp, which always adds both. */
static attn_status read_bert(const attn_gguf *file, attn_tokenizer_spec *spec) {
  if (spec->unknown < 0) spec->unknown = 100;
  if (spec->bos < 0) spec->bos = 101;
  if (spec->eos < 0) spec->eos = 102;
  spec->add_bos = spec->add_eos = true;
  ATTN_TRY(read_id(file, "tokenizer.ggml.cls_token_id", &spec->bos));
  ATTN_TRY(read_id(file, "tokenizer.ggml.seperator_token_id", &spec->eos));
  ATTN_TRY(attn_gguf_bool(file, "tokenizer.ggml.normalizer.lowercase", ATTN_OPTIONAL,
                          &spec->lower_case));
  spec->strip_accents = spec->lower_case; /* unless stated */
  return attn_gguf_bool(file, "tokenizer.ggml.normalizer.strip_accents", ATTN_OPTIONAL,
                        &spec->strip_accents);
}

/* Where a file says nothing, what llama.cpp takes. */
static attn_status read_t5(const attn_gguf *file, attn_tokenizer_spec *spec) {
  attn_gguf_list map = {0};
  if (spec->unknown < 0) spec->unknown = 2;
  if (spec->eos < 0) spec->eos = 1;
  spec->add_eos = true;
  spec->add_space_prefix = false;
  ATTN_TRY(attn_gguf_bool(file, "tokenizer.ggml.remove_extra_whitespaces", ATTN_OPTIONAL,
                          &spec->remove_extra_spaces));
  ATTN_TRY(attn_gguf_array(file, "tokenizer.ggml.precompiled_charsmap", ATTN_OPTIONAL, &map));
  if (!map.count) return ATTN_OK;
  if (map.type != ATTN_GGUF_U8 && map.type != ATTN_GGUF_I8)
    return attn_fail(ATTN_BAD_FORMAT, "tokenizer.ggml.precompiled_charsmap: expected bytes, got %s",
                     attn_gguf_type_name(map.type));
  spec->charsmap = (const char *)map.data;
  spec->charsmap_size = (size_t)map.count;
  return ATTN_OK;
}

attn_status attn_gguf_vocabulary_read(const attn_gguf *file, attn_gguf_vocabulary *v) {
  attn_tokenizer_spec *spec = &v->spec;
  ATTN_TRY(read_text(file, "tokenizer.ggml.model", ATTN_REQUIRED, v->model, sizeof v->model));
  ATTN_TRY(read_text(file, "tokenizer.ggml.pre", ATTN_OPTIONAL, v->pre, sizeof v->pre));
  spec->model = v->model;
  spec->pre = v->pre[0] ? v->pre : NULL;
  spec->add_bos = adds_bos(v);
  ATTN_TRY(read_id(file, "tokenizer.ggml.bos_token_id", &spec->bos));
  ATTN_TRY(read_id(file, "tokenizer.ggml.eos_token_id", &spec->eos));
  ATTN_TRY(read_id(file, "tokenizer.ggml.unknown_token_id", &spec->unknown));
  if (strcmp(v->model, "t5") == 0) ATTN_TRY(read_t5(file, spec));
  if (strcmp(v->model, "bert") == 0) {
    ATTN_TRY(read_bert(file, spec));
  } else {
    ATTN_TRY(attn_gguf_bool(file, "tokenizer.ggml.add_bos_token", ATTN_OPTIONAL, &spec->add_bos));
    ATTN_TRY(attn_gguf_bool(file, "tokenizer.ggml.add_eos_token", ATTN_OPTIONAL, &spec->add_eos));
  }
  ATTN_TRY(attn_gguf_bool(file, "tokenizer.ggml.add_space_prefix", ATTN_OPTIONAL,
                          &spec->add_space_prefix));
  return read_strings(file, v);
}

void attn_gguf_vocabulary_free(attn_gguf_vocabulary *v) {
  attn_free((void *)(uintptr_t)v->spec.tokens);
  attn_free((void *)(uintptr_t)v->spec.merges);
  attn_free(v->types);
  attn_free(v->scores);
}

bool attn_gguf_has_vocabulary(const attn_gguf *file) {
  static const char *const none[] = {"none", "no_vocab"};
  attn_gguf_text model = {0};
  if (attn_gguf_string(file, "tokenizer.ggml.model", ATTN_OPTIONAL, &model) != ATTN_OK) return true;
  for (int i = 0; i < 2; ++i)
    if (model.size == strlen(none[i]) && memcmp(model.data, none[i], model.size) == 0) return false;
  return true;
}

static attn_status load_from_gguf(const attn_source *source, attn_model_text *text) {
  const attn_gguf *file = source->gguf;
  attn_gguf_vocabulary v = {.spec = ATTN_TOKENIZER_SPEC_INIT};
  attn_gguf_text template = {0};
  if (!attn_gguf_has_vocabulary(file)) return ATTN_OK;
  attn_status status = attn_gguf_vocabulary_read(file, &v);
  if (status == ATTN_OK) status = attn_tokenizer_create(&v.spec, &text->tokenizer);
  attn_gguf_vocabulary_free(&v);
  ATTN_TRY(status);
  add_ends_of(text, source->generation);
  ATTN_TRY(attn_gguf_string(file, "tokenizer.chat_template", ATTN_OPTIONAL, &template));
  return template.size ? attn_chat_recognise(template.data, template.size, text) : ATTN_OK;
}

/* Both -------------------------------------------------------------------------------------------
 */

attn_status attn_model_text_load(const attn_source *source, attn_model_text *text) {
  *text = (attn_model_text){0};
  attn_status status =
      source->gguf ? load_from_gguf(source, text) : load_from_directory(source, text);
  if (status == ATTN_OK)
    add_known_ends(text);
  else
    attn_model_text_free(text);
  return status;
}

void attn_model_text_free(attn_model_text *text) {
  attn_tokenizer_destroy(text->tokenizer);
  attn_free(text->system);
  *text = (attn_model_text){0};
}

/* Public -----------------------------------------------------------------------------------------
 */

static attn_status give(const attn_tokens *made, int32_t *tokens, int64_t capacity,
                        int64_t *count) {
  int64_t copied = (int64_t)made->count < capacity ? (int64_t)made->count : capacity;
  if (copied > 0) memcpy(tokens, made->ids, (size_t)copied * sizeof *tokens);
  *count = (int64_t)made->count;
  return ATTN_OK;
}

attn_status attn_model_text_encode(const attn_model_text *text, const char *bytes, size_t size,
                                   unsigned flags, attn_tokens *tokens) {
  if (text->tokenizer) return attn_tokenizer_encode(text->tokenizer, bytes, size, flags, tokens);
  size_t count = tokens->count + size;
  int32_t *ids = attn_alloc_array(count ? count : 1, sizeof *ids);
  if (!ids) return ATTN_OUT_OF_MEMORY;
  if (tokens->count) memcpy(ids, tokens->ids, tokens->count * sizeof *ids);
  for (size_t i = 0; i < size; ++i) ids[tokens->count + i] = (unsigned char)bytes[i];
  attn_tokens_free(tokens);
  *tokens = (attn_tokens){.ids = ids, .count = count, .capacity = count ? count : 1};
  return ATTN_OK;
}

attn_status attn_model_encode(const attn_model *model, const char *text, size_t size,
                              unsigned flags, int32_t *tokens, int64_t capacity, int64_t *count) {
  if (!model || (size && !text) || !count || (capacity > 0 && !tokens) || capacity < 0)
    return attn_fail(ATTN_INVALID_ARGUMENT, "encode: model, text, tokens or count is NULL");
  if (!model->text.tokenizer) {
    for (size_t i = 0; i < size && (int64_t)i < capacity; ++i) tokens[i] = (unsigned char)text[i];
    *count = (int64_t)size;
    return ATTN_OK;
  }
  attn_tokens made = {0};
  attn_status status = attn_tokenizer_encode(model->text.tokenizer, text, size, flags, &made);
  if (status == ATTN_OK) status = give(&made, tokens, capacity, count);
  attn_tokens_free(&made);
  return status;
}

attn_status attn_model_decode(const attn_model *model, const int32_t *tokens, int64_t count,
                              unsigned flags, char *text, size_t capacity, size_t *size) {
  if (!model || (count > 0 && !tokens) || count < 0 || !size || (capacity && !text))
    return attn_fail(ATTN_INVALID_ARGUMENT, "decode: model, tokens, text or size is NULL");
  attn_text made = {0};
  attn_status status = ATTN_OK;
  if (model->text.tokenizer)
    status = attn_tokenizer_decode(model->text.tokenizer, tokens, (size_t)count, flags, &made);
  for (int64_t i = 0; !model->text.tokenizer && i < count && status == ATTN_OK; ++i) {
    char byte = (char)tokens[i];
    if (tokens[i] < 0 || tokens[i] >= BYTES)
      status = attn_fail(ATTN_INVALID_ARGUMENT, "decode: token %d is not a byte", tokens[i]);
    else
      attn_text_add(&made, &byte, 1);
  }
  if (status == ATTN_OK && made.failed) status = ATTN_OUT_OF_MEMORY;
  size_t copied = made.length < capacity ? made.length : capacity;
  if (status == ATTN_OK && copied) memcpy(text, made.data, copied);
  if (status == ATTN_OK) *size = made.length;
  attn_text_free(&made);
  return status;
}

bool attn_model_is_end(const attn_model *model, int32_t token) {
  for (int i = 0; model && i < model->text.end_count; ++i)
    if (model->text.ends[i] == token) return true;
  return false;
}

attn_status attn_model_encode_chat(const attn_model *model, const attn_message *messages, int count,
                                   int32_t *tokens, int64_t capacity, int64_t *written) {
  if (!model || (count > 0 && !messages) || count < 1 || !written || (capacity > 0 && !tokens) ||
      capacity < 0)
    return attn_fail(ATTN_INVALID_ARGUMENT, "encode_chat: no messages, or an argument is NULL");
  attn_tokens made = {0};
  attn_status status = attn_chat_encode(&model->text, messages, count, &made);
  if (status == ATTN_OK) status = give(&made, tokens, capacity, written);
  attn_tokens_free(&made);
  return status;
}
