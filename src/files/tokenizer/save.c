/* Plain arrays, as GGUF has them, as Hugging Face's tokenizer.json. */
#include "files/tokenizer/parts.h"
#include "base/memory.h"
#include "base/status.h"
#include "files/base64.h"
#include "files/json.h"

#include <stdlib.h>
#include <string.h>

static size_t size_of(const char *const *strings, const size_t *sizes, int64_t i) {
  return sizes ? sizes[i] : strlen(strings[i]);
}

static json_t *token(const attn_tokenizer_spec *spec, int64_t id) {
  return json_stringn(spec->tokens[id], size_of(spec->tokens, spec->token_sizes, id));
}

static int32_t type_of(const attn_tokenizer_spec *spec, int64_t id) {
  return spec->types ? spec->types[id] : ATTN_TOKEN_NORMAL;
}

static bool is_special(const attn_tokenizer_spec *spec, int64_t id) {
  int32_t type = type_of(spec, id);
  return type == ATTN_TOKEN_CONTROL || type == ATTN_TOKEN_UNKNOWN;
}

static bool has(const attn_tokenizer_spec *spec, int32_t id) {
  return id >= 0 && id < spec->token_count;
}

/* -- Vocabulary and added tokens -- */

static json_t *added_tokens(const attn_tokenizer_spec *spec) {
  json_t *list = json_array();
  for (int64_t id = 0; id < spec->token_count; ++id) {
    bool special = is_special(spec, id);
    if (special || type_of(spec, id) == ATTN_TOKEN_USER_DEFINED)
      json_array_append_new(list,
                            json_pack("{s:I, s:o, s:b, s:b, s:b, s:b, s:b}", "id", (json_int_t)id,
                                      "content", token(spec, id), "single_word", 0, "lstrip", 0,
                                      "rstrip", 0, "normalized", 0, "special", (int)special));
  }
  return list;
}

static attn_status vocabulary(const attn_tokenizer_spec *spec, json_t **map) {
  *map = json_object();
  for (int64_t id = 0; id < spec->token_count; ++id)
    if (json_object_setn_new(*map, spec->tokens[id], size_of(spec->tokens, spec->token_sizes, id),
                             json_integer(id)) != 0)
      return attn_fail(ATTN_UNSUPPORTED, "token %lld is not UTF-8: no tokenizer.json can have it",
                       (long long)id);
  return ATTN_OK;
}

static json_t *plain_merges(const attn_tokenizer_spec *spec) {
  json_t *list = json_array();
  for (int64_t i = 0; i < spec->merge_count; ++i)
    json_array_append_new(
        list, json_stringn(spec->merges[i], size_of(spec->merges, spec->merge_sizes, i)));
  return list;
}

/* -- Merges from scores: every way in which a token is two others, the best token first -- */

typedef struct scored {
  int64_t id;
  float score;
} scored;

static int by_score(const void *a, const void *b) {
  const scored *x = a, *y = b;
  if (x->score != y->score) return x->score > y->score ? -1 : 1;
  return (x->id > y->id) - (x->id < y->id);
}

static bool is_part(const attn_tokenizer_spec *spec, const json_t *map, const char *string,
                    size_t size) {
  const json_t *id = json_object_getn(map, string, size);
  return id && !is_special(spec, json_integer_value(id));
}

static void add_splits(const attn_tokenizer_spec *spec, const json_t *map, int64_t id,
                       json_t *list) {
  const char *string = spec->tokens[id];
  size_t size = size_of(spec->tokens, spec->token_sizes, id);
  for (size_t i = 1; i < size; ++i)
    if (is_part(spec, map, string, i) && is_part(spec, map, string + i, size - i))
      json_array_append_new(
          list, json_pack("[o, o]", json_stringn(string, i), json_stringn(string + i, size - i)));
}

static attn_status scored_merges(const attn_tokenizer_spec *spec, const json_t *map,
                                 json_t **list) {
  scored *order = attn_alloc_array((size_t)spec->token_count, sizeof *order);
  if (!order) return ATTN_OUT_OF_MEMORY;
  for (int64_t id = 0; id < spec->token_count; ++id) order[id] = (scored){id, spec->scores[id]};
  qsort(order, (size_t)spec->token_count, sizeof *order, by_score);
  *list = json_array();
  for (int64_t i = 0; i < spec->token_count; ++i)
    if (!is_special(spec, order[i].id)) add_splits(spec, map, order[i].id, *list);
  attn_free(order);
  return ATTN_OK;
}

/* -- What stands around a text -- */

static void add_end(const attn_tokenizer_spec *spec, int32_t id, json_t *single, json_t *specials) {
  size_t size = size_of(spec->tokens, spec->token_sizes, id);
  json_array_append_new(
      single, json_pack("{s:{s:o, s:i}}", "SpecialToken", "id", token(spec, id), "type_id", 0));
  json_object_setn_new(specials, spec->tokens[id], size,
                       json_pack("{s:o, s:[i], s:[o]}", "id", token(spec, id), "ids", (int)id,
                                 "tokens", token(spec, id)));
}

static json_t *post_processor(const attn_tokenizer_spec *spec) {
  bool begins = spec->add_bos && has(spec, spec->bos), ends = spec->add_eos && has(spec, spec->eos);
  if (!begins && !ends) return json_null();
  json_t *single = json_array(), *specials = json_object();
  json_t *pair = json_pack("[{s:{s:s, s:i}}, {s:{s:s, s:i}}]", "Sequence", "id", "A", "type_id", 0,
                           "Sequence", "id", "B", "type_id", 1);
  if (begins) add_end(spec, spec->bos, single, specials);
  json_array_append_new(single, json_pack("{s:{s:s, s:i}}", "Sequence", "id", "A", "type_id", 0));
  if (ends) add_end(spec, spec->eos, single, specials);
  return json_pack("{s:s, s:o, s:o, s:o}", "type", "TemplateProcessing", "single", single, "pair",
                   pair, "special_tokens", specials);
}

static json_t *with_common(const attn_tokenizer_spec *spec, json_t *normaliser, json_t *splits,
                           json_t *decoder, json_t *model) {
  return json_pack("{s:s, s:n, s:n, s:o, s:o, s:o, s:o, s:o, s:o}", "version", "1.0", "truncation",
                   "padding", "added_tokens", added_tokens(spec), "normalizer", normaliser,
                   "pre_tokenizer", splits, "post_processor", post_processor(spec), "decoder",
                   decoder, "model", model);
}

static json_t *bpe(const attn_tokenizer_spec *spec, bool falls_back, bool whole_words, json_t *map,
                   json_t *merges) {
  return json_pack("{s:s, s:n, s:o, s:n, s:n, s:b, s:b, s:b, s:o, s:o}", "type", "BPE", "dropout",
                   "unk_token", has(spec, spec->unknown) ? token(spec, spec->unknown) : json_null(),
                   "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", (int)falls_back,
                   "byte_fallback", (int)falls_back, "ignore_merges", (int)whole_words, "vocab",
                   map, "merges", merges);
}

/* -- gpt2 -- */

static json_t *byte_level(bool regex) {
  return json_pack("{s:s, s:b, s:b, s:b}", "type", "ByteLevel", "add_prefix_space", 0,
                   "trim_offsets", 1, "use_regex", (int)regex);
}

static json_t *word_splits(const attn_word_splitter *splitter) {
  bool plain = false; /* the expression of GPT-2 is ByteLevel's own */
  json_t *list = json_array();
  for (int i = 0; i < ATTN_WORD_SPLITS && splitter->splits[i]; ++i) {
    const char *split = splitter->splits[i];
    plain = split == attn_regex_gpt2;
    if (split == attn_split_digits)
      json_array_append_new(list,
                            json_pack("{s:s, s:b}", "type", "Digits", "individual_digits", 1));
    else if (!plain)
      json_array_append_new(list, json_pack("{s:s, s:{s:s}, s:s, s:b}", "type", "Split", "pattern",
                                            "Regex", split, "behavior", "Isolated", "invert", 0));
  }
  json_array_append_new(list, byte_level(plain));
  return json_pack("{s:s, s:o}", "type", "Sequence", "pretokenizers", list);
}

static attn_status gpt2(const attn_tokenizer_spec *spec, json_t **root) {
  const char *name = spec->pre ? spec->pre : "gpt-2";
  const attn_word_splitter *splitter;
  json_t *map;
  for (size_t i = 0; (splitter = attn_word_splitter_at(i)); ++i)
    if (strcmp(name, splitter->name) == 0) break;
  if (!splitter) return attn_fail(ATTN_UNSUPPORTED, "pre-tokenizer \"%.60s\"", name);
  attn_status status = vocabulary(spec, &map);
  if (status == ATTN_OK)
    *root = with_common(spec, splitter->compose ? json_pack("{s:s}", "type", "NFC") : json_null(),
                        word_splits(splitter), byte_level(true),
                        bpe(spec, false, splitter->whole_words, map, plain_merges(spec)));
  else
    json_decref(map);
  return status;
}

/* -- llama -- */

static json_t *line_normaliser(const attn_tokenizer_spec *spec, json_t *first) {
  json_t *list = json_array();
  if (first) json_array_append_new(list, first);
  if (spec->add_space_prefix)
    json_array_append_new(list,
                          json_pack("{s:s, s:s}", "type", "Prepend", "prepend", attn_lower_line));
  json_array_append_new(list, json_pack("{s:s, s:{s:s}, s:s}", "type", "Replace", "pattern",
                                        "String", " ", "content", attn_lower_line));
  return json_pack("{s:s, s:o}", "type", "Sequence", "normalizers", list);
}

static json_t *line_decoder(bool prefix) {
  json_t *list =
      json_pack("[{s:s, s:{s:s}, s:s}, {s:s}, {s:s}]", "type", "Replace", "pattern", "String",
                attn_lower_line, "content", " ", "type", "ByteFallback", "type", "Fuse");
  if (prefix)
    json_array_append_new(list, json_pack("{s:s, s:s, s:i, s:i}", "type", "Strip", "content", " ",
                                          "start", 1, "stop", 0));
  return json_pack("{s:s, s:o}", "type", "Sequence", "decoders", list);
}

static attn_status llama(const attn_tokenizer_spec *spec, json_t **root) {
  json_t *map, *merges = NULL;
  if (!spec->scores) return attn_fail(ATTN_BAD_FORMAT, "a \"llama\" tokenizer without scores");
  attn_status status = vocabulary(spec, &map);
  if (status == ATTN_OK) status = scored_merges(spec, map, &merges);
  if (status == ATTN_OK)
    *root = with_common(spec, line_normaliser(spec, NULL), json_null(),
                        line_decoder(spec->add_space_prefix), bpe(spec, true, false, map, merges));
  else
    json_decref(map);
  return status;
}

/* -- t5 -- */

static json_t *charsmap(const attn_tokenizer_spec *spec) {
  attn_text text = {0};
  attn_base64_encode(spec->charsmap, spec->charsmap_size, &text);
  json_t *json = text.failed ? NULL
                             : json_pack("{s:s, s:s%}", "type", "Precompiled",
                                         "precompiled_charsmap", text.data, text.length);
  attn_text_free(&text);
  return json;
}

/* Special tokens cannot be left out of a model in this format, nor have a score below all others:
 * that would be the lowest, which unknown characters are measured by. */
static json_t *scored_vocabulary(const attn_tokenizer_spec *spec) {
  float lowest = 0;
  json_t *list = json_array();
  for (int64_t id = 0; id < spec->token_count; ++id)
    if (type_of(spec, id) == ATTN_TOKEN_NORMAL && spec->scores[id] < lowest)
      lowest = spec->scores[id];
  for (int64_t id = 0; id < spec->token_count; ++id) {
    int32_t type = type_of(spec, id);
    float score = type == ATTN_TOKEN_NORMAL   ? spec->scores[id]
                  : type == ATTN_TOKEN_UNUSED ? lowest
                                              : 0;
    if (json_array_append_new(list, json_pack("[o, f]", token(spec, id), (double)score)) != 0) {
      json_decref(list);
      return NULL;
    }
  }
  return list;
}

static json_t *metaspace(bool prefix) {
  return json_pack("{s:s, s:s, s:s, s:b}", "type", "Metaspace", "replacement", attn_lower_line,
                   "prepend_scheme", prefix ? "always" : "never", "split", 1);
}

static json_t *words(bool at_whitespace) {
  json_t *cut = at_whitespace ? json_pack("{s:s}", "type", "WhitespaceSplit")
                              : json_pack("{s:s, s:{s:s}, s:s, s:b}", "type", "Split", "pattern",
                                          "String", " ", "behavior", "Removed", "invert", 0);
  return json_pack("{s:s, s:[o, o]}", "type", "Sequence", "pretokenizers", cut, metaspace(true));
}

/* Whether its words are cut at whitespace (attn_tokenizer_spec): by making it. */
static attn_status cuts_at_whitespace(const attn_tokenizer_spec *spec, bool *whitespace) {
  attn_tokenizer *probe;
  ATTN_TRY(attn_tokenizer_probe(&probe));
  attn_status status = attn_add_unigram_steps(probe, spec);
  *whitespace = status == ATTN_OK && spec->remove_extra_spaces &&
                probe->splits[0].pattern.kind == ATTN_PATTERN_CLASS;
  attn_tokenizer_destroy(probe);
  return status;
}

static attn_status t5(const attn_tokenizer_spec *spec, json_t **root) {
  bool whitespace;
  if (!spec->scores) return attn_fail(ATTN_BAD_FORMAT, "a \"t5\" tokenizer without scores");
  if (!has(spec, spec->unknown))
    return attn_fail(ATTN_BAD_FORMAT, "a \"t5\" tokenizer without an unknown token");
  ATTN_TRY(cuts_at_whitespace(spec, &whitespace));
  json_t *model = json_pack("{s:s, s:i, s:o, s:b}", "type", "Unigram", "unk_id", (int)spec->unknown,
                            "vocab", scored_vocabulary(spec), "byte_fallback", 0);
  json_t *first = spec->charsmap ? charsmap(spec) : NULL;
  if (spec->remove_extra_spaces)
    *root =
        with_common(spec, first ? first : json_null(), words(whitespace), metaspace(true), model);
  else
    *root = with_common(spec, line_normaliser(spec, first), json_null(),
                        metaspace(spec->add_space_prefix), model);
  if (spec->charsmap && !first) {
    json_decref(*root);
    *root = NULL;
  }
  return ATTN_OK;
}

/* -- bert -- */

static attn_status bert(const attn_tokenizer_spec *spec, json_t **root) {
  attn_tokenizer *made;
  attn_tokenizer_spec words = *spec;
  attn_status status = ATTN_OK;
  ATTN_TRY(attn_tokenizer_create(spec, &made)); /* which has the tokens as words and "##" */
  const char **tokens = attn_alloc_array((size_t)spec->token_count, sizeof *tokens);
  size_t *sizes = attn_alloc_array((size_t)spec->token_count, sizeof *sizes);
  json_t *map = NULL;
  if (!tokens || !sizes) status = ATTN_OUT_OF_MEMORY;
  for (int64_t id = 0; status == ATTN_OK && id < spec->token_count; ++id)
    tokens[id] = attn_tokenizer_string(made, id, &sizes[id]);
  words.tokens = tokens;
  words.token_sizes = sizes;
  if (status == ATTN_OK) status = vocabulary(&words, &map);
  if (status == ATTN_OK) {
    json_t *model = json_pack("{s:s, s:o, s:s, s:i, s:o}", "type", "WordPiece", "unk_token",
                              token(&words, spec->unknown), "continuing_subword_prefix", "##",
                              "max_input_chars_per_word", 100, "vocab", json_incref(map));
    json_t *normaliser = json_pack("{s:s, s:b, s:b, s:b, s:b}", "type", "BertNormalizer",
                                   "clean_text", 1, "handle_chinese_chars", 1, "strip_accents",
                                   (int)spec->strip_accents, "lowercase", (int)spec->lower_case);
    *root = with_common(
        &words, normaliser, json_pack("{s:s}", "type", "BertPreTokenizer"),
        json_pack("{s:s, s:s, s:b}", "type", "WordPiece", "prefix", "##", "cleanup", 1), model);
  }
  json_decref(map);
  attn_free(tokens);
  attn_free(sizes);
  attn_tokenizer_destroy(made);
  return status;
}

attn_status attn_tokenizer_save(const attn_tokenizer_spec *spec, const char *path) {
  static const struct {
    const char *name;
    attn_status (*make)(const attn_tokenizer_spec *, json_t **);
  } models[] = {{"gpt2", gpt2}, {"llama", llama}, {"t5", t5}, {"bert", bert}};
  for (size_t i = 0; i < sizeof models / sizeof *models; ++i) {
    json_t *root = NULL;
    if (strcmp(spec->model, models[i].name) != 0) continue;
    ATTN_TRY(models[i].make(spec, &root));
    if (!root) return attn_fail(ATTN_UNSUPPORTED, "a token is not UTF-8, or out of memory");
    attn_status status = attn_json_save(path, root);
    json_decref(root);
    return status;
  }
  return attn_fail(ATTN_UNSUPPORTED, "a \"%.60s\" tokenizer is not written as tokenizer.json",
                   spec->model);
}
