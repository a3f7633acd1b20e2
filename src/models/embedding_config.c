/* What says how a model's texts are embedded.
 *
 * A directory of sentence-transformers has modules.json, a list of modules that a text goes
 * through: {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}, each with a
 * folder. Read are Transformer (the model itself, in the directory), Pooling (config.json: modes as
 * flags, or "pooling_mode" in newer files) and Normalize. sentence_bert_config.json has
 * max_seq_length; without it a text may have as many tokens as the tokenizer and the model allow.
 * GGUF: pooling_type and context_length below the architecture. */
#include "base/io.h"
#include "base/memory.h"
#include "base/status.h"
#include "models/embedding.h"

#include <stdio.h>
#include <string.h>

/* Remembers the first thing that is not offered. */
static void lacks(attn_embedding_config *c, const char *what, const char *name) {
  if (!c->unsupported[0])
    snprintf(c->unsupported, sizeof c->unsupported, "%s '%.100s' is not offered", what, name);
}

/* Pooling ----------------------------------------------------------------------------------------
 */

static const struct {
  const char *flag, *mode;
  attn_pooling pooling;
} modes[] = {
    {"pooling_mode_cls_token", "cls", ATTN_POOLING_CLS},
    {"pooling_mode_max_tokens", "max", ATTN_POOLING_MAX},
    {"pooling_mode_mean_tokens", "mean", ATTN_POOLING_MEAN},
    {"pooling_mode_mean_sqrt_len_tokens", "mean_sqrt_len_tokens", ATTN_POOLING_MEAN_SQRT},
    {"pooling_mode_weightedmean_tokens", "weightedmean", ATTN_POOLING_WEIGHTED_MEAN},
    {"pooling_mode_lasttoken", "lasttoken", ATTN_POOLING_LAST},
};
enum { MODES = sizeof modes / sizeof *modes };

static void set_mode(attn_embedding_config *c, const char *name) {
  for (int i = 0; i < MODES; ++i)
    if (strcmp(modes[i].mode, name) == 0) {
      c->pooling = modes[i].pooling;
      return;
    }
  lacks(c, "pooling_mode", name);
}

/* One mode, or a list: several are laid one behind the other. */
static attn_status read_mode(const json_t *mode, attn_embedding_config *c) {
  if (json_array_size(mode) == 1) mode = json_array_get(mode, 0);
  if (json_is_array(mode)) {
    lacks(c, "pooling_mode", "several in a row");
    return ATTN_OK;
  }
  if (!json_is_string(mode))
    return attn_fail(ATTN_BAD_FORMAT, "pooling_mode: expected a name or a list of names");
  set_mode(c, json_string_value(mode));
  return ATTN_OK;
}

static attn_status read_pooling(const json_t *json, attn_embedding_config *c) {
  const json_t *mode = json_object_get(json, "pooling_mode");
  bool with_prompt = true;
  int set = 0;
  ATTN_TRY(attn_json_bool(json, "include_prompt", ATTN_OPTIONAL, &with_prompt));
  if (!with_prompt) lacks(c, "include_prompt", "false");
  if (mode) return read_mode(mode, c);
  for (int i = 0; i < MODES; ++i) {
    bool flag = false;
    ATTN_TRY(attn_json_bool(json, modes[i].flag, ATTN_OPTIONAL, &flag));
    if (!flag) continue;
    if (++set > 1) lacks(c, "pooling", "several in a row");
    c->pooling = modes[i].pooling;
  }
  return ATTN_OK;
}

/* Files ------------------------------------------------------------------------------------------
 */

/* folder/name in the source's directory; NULL when it is absent. */
static attn_status load_file(const attn_source *source, const char *folder, const char *name,
                             json_t **json) {
  *json = NULL;
  char *inside = attn_path_join(folder, name);
  char *path = inside ? attn_path_join(source->path, inside) : NULL;
  attn_status status = path ? ATTN_OK : ATTN_OUT_OF_MEMORY;
  if (path && attn_path_exists(path)) status = attn_json_load(path, json);
  attn_free(inside);
  attn_free(path);
  return status;
}

static attn_status load_pooling(const attn_source *source, const char *folder,
                                attn_embedding_config *c) {
  json_t *json;
  ATTN_TRY(load_file(source, folder, "config.json", &json));
  attn_status status = json ? read_pooling(json, c) : ATTN_OK;
  json_decref(json);
  return status == ATTN_OK ? ATTN_OK : attn_fail_in(status, "%s/config.json", folder);
}

static bool inside_directory(const char *path) {
  return path[0] != '/' && !strstr(path, "..");
}

static attn_status read_module(const attn_source *source, const json_t *module,
                               attn_embedding_config *c) {
  const char *type = "", *path = "";
  if (!json_is_object(module)) return attn_fail(ATTN_BAD_FORMAT, "expected a list of objects");
  ATTN_TRY(attn_json_string(module, "type", ATTN_REQUIRED, &type));
  ATTN_TRY(attn_json_string(module, "path", ATTN_OPTIONAL, &path));
  if (!inside_directory(path))
    return attn_fail(ATTN_BAD_FORMAT, "path '%.100s' leads out of the directory", path);
  const char *class = strrchr(type, '.') ? strrchr(type, '.') + 1 : type;
  if (strcmp(class, "Pooling") == 0) return load_pooling(source, path, c);
  if (strcmp(class, "Normalize") == 0)
    c->normalize = true;
  else if (strcmp(class, "Transformer") != 0 && strcmp(class, "Dropout") != 0)
    lacks(c, "the module", class);
  else if (path[0] && strcmp(path, ".") != 0 && strcmp(class, "Transformer") == 0)
    lacks(c, "a Transformer in a folder of its own,", path);
  return ATTN_OK;
}

/* The one file whose top level is a list. */
static attn_status parse_list(const char *path, json_t **list) {
  const size_t most = 1 << 20;
  char *text = NULL;
  size_t size = 0;
  json_error_t error;
  ATTN_TRY(attn_file_read(path, most, &text, &size));
  *list = json_loadb(text, size, JSON_REJECT_DUPLICATES, &error);
  attn_free(text);
  if (!*list) return attn_fail(ATTN_BAD_FORMAT, "line %d: %s", error.line, error.text);
  if (json_is_array(*list)) return ATTN_OK;
  return attn_fail(ATTN_BAD_FORMAT, "expected a list of modules");
}

static attn_status load_modules(const attn_source *source, attn_embedding_config *c) {
  json_t *list = NULL;
  char *path = attn_path_join(source->path, "modules.json");
  if (!path) return ATTN_OUT_OF_MEMORY;
  bool there = attn_path_exists(path);
  attn_status status = there ? parse_list(path, &list) : ATTN_OK;
  for (size_t i = 0; status == ATTN_OK && i < json_array_size(list); ++i)
    status = read_module(source, json_array_get(list, i), c);
  json_decref(list);
  attn_free(path);
  return status == ATTN_OK ? ATTN_OK : attn_fail_in(status, "modules.json");
}

/* A prompt that goes before every text unless the caller says otherwise. */
static attn_status check_prompt(const attn_source *source, attn_embedding_config *c) {
  json_t *json;
  const char *name = NULL;
  ATTN_TRY(load_file(source, "", "config_sentence_transformers.json", &json));
  if (!json) return ATTN_OK;
  attn_status status = attn_json_string(json, "default_prompt_name", ATTN_OPTIONAL, &name);
  if (status == ATTN_OK && name) lacks(c, "default_prompt_name", name);
  json_decref(json);
  return status == ATTN_OK ? ATTN_OK : attn_fail_in(status, "config_sentence_transformers.json");
}

/* Lengths ----------------------------------------------------------------------------------------
 */

static void at_most(int64_t limit, int64_t *most) {
  if (limit > 0 && (*most == 0 || limit < *most)) *most = limit;
}

/* Tokenizers without a limit say 1e30. */
static int64_t model_max_length(const json_t *tokenizer) {
  double length = json_number_value(json_object_get(tokenizer, "model_max_length"));
  return length >= 1 && length < INT32_MAX ? (int64_t)length : 0;
}

static attn_status read_lengths(const json_t *sentence, const json_t *tokenizer,
                                const json_t *model, attn_embedding_config *c) {
  int64_t given = 0, positions = 0;
  bool lower = false;
  if (sentence) {
    ATTN_TRY(attn_json_int(sentence, "max_seq_length", ATTN_OPTIONAL, 1, INT32_MAX, &given));
    ATTN_TRY(attn_json_bool(sentence, "do_lower_case", ATTN_OPTIONAL, &lower));
    if (lower) lacks(c, "do_lower_case", "true");
  }
  c->most_tokens = given;
  if (given) return ATTN_OK;
  ATTN_TRY(
      attn_json_int(model, "max_position_embeddings", ATTN_OPTIONAL, -1, INT32_MAX, &positions));
  at_most(model_max_length(tokenizer), &c->most_tokens);
  at_most(positions, &c->most_tokens);
  return ATTN_OK;
}

static attn_status load_lengths(const attn_source *source, attn_embedding_config *c) {
  json_t *sentence = NULL, *tokenizer = NULL;
  attn_status status = ATTN_OK;
  if (!source->gguf) {
    status = load_file(source, "", "sentence_bert_config.json", &sentence);
    if (status == ATTN_OK) status = load_file(source, "", "tokenizer_config.json", &tokenizer);
  }
  if (status == ATTN_OK) status = read_lengths(sentence, tokenizer, source->config, c);
  json_decref(sentence);
  json_decref(tokenizer);
  return status;
}

/* GGUF -------------------------------------------------------------------------------------------
 */

/* llama.cpp's numbers: none, mean, cls, last, rank. Its embeddings are normalised by whoever
 * asks. */
static attn_status read_gguf(const attn_gguf *file, attn_embedding_config *c) {
  static const attn_pooling poolings[] = {ATTN_POOLING_MEAN, ATTN_POOLING_MEAN, ATTN_POOLING_CLS,
                                          ATTN_POOLING_LAST};
  char key[96];
  attn_gguf_text name = {0};
  int64_t type = 0, context = 0;
  ATTN_TRY(attn_gguf_string(file, "general.architecture", ATTN_REQUIRED, &name));
  snprintf(key, sizeof key, "%.*s.pooling_type", (int)name.size, name.data);
  ATTN_TRY(attn_gguf_int(file, key, ATTN_OPTIONAL, -1, INT32_MAX, &type));
  snprintf(key, sizeof key, "%.*s.context_length", (int)name.size, name.data);
  ATTN_TRY(attn_gguf_int(file, key, ATTN_OPTIONAL, 0, INT32_MAX, &context));
  at_most(context, &c->most_tokens);
  if (type > 3) lacks(c, "pooling_type", "4, for ranking,");
  if (type >= 0 && type <= 3) c->pooling = poolings[type];
  return ATTN_OK;
}

attn_status attn_embedding_config_load(const attn_source *source, const attn_model_config *model,
                                       attn_embedding_config *config) {
  *config = (attn_embedding_config){.pooling = ATTN_POOLING_MEAN};
  ATTN_TRY(load_lengths(source, config));
  if (model->encoder) at_most(model->positions - model->first_position, &config->most_tokens);
  if (source->gguf) return read_gguf(source->gguf, config);
  ATTN_TRY(load_modules(source, config));
  return check_prompt(source, config);
}
