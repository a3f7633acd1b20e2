/* Tokenizers from Hugging Face's tokenizer.json: each section is an object whose "type" names a
 * reader in a table. */
#include "files/tokenizer/parts.h"
#include "base/io.h"
#include "base/memory.h"
#include "base/status.h"
#include "files/base64.h"
#include "files/json.h"

#include <string.h>

enum { LARGEST_FILE = 256 << 20, DEEPEST_SEQUENCE = 8 };

typedef attn_status (*reader)(attn_tokenizer *tokenizer, const json_t *section, int depth);
typedef struct reader_entry {
  const char *type;
  reader read;
} reader_entry;
#define COUNT(table) (sizeof(table) / sizeof *(table))

static attn_status dispatch(attn_tokenizer *tokenizer, const json_t *section, const char *what,
                            const reader_entry *readers, size_t count, int depth) {
  const char *type = NULL;
  if (!section || json_is_null(section)) return ATTN_OK;
  if (!json_is_object(section)) return attn_fail(ATTN_BAD_FORMAT, "a %s is not an object", what);
  ATTN_TRY(attn_json_string(section, "type", ATTN_REQUIRED, &type));
  if (depth > DEEPEST_SEQUENCE)
    return attn_fail(ATTN_UNSUPPORTED, "%ss are nested more than %d deep", what, DEEPEST_SEQUENCE);
  for (size_t i = 0; i < count; ++i)
    if (strcmp(type, readers[i].type) == 0) {
      attn_status status = readers[i].read(tokenizer, section, depth);
      return status == ATTN_OK ? ATTN_OK : attn_fail_in(status, "%s %s", what, type);
    }
  return attn_fail(ATTN_UNSUPPORTED, "%s \"%.60s\"", what, type);
}

static attn_status nothing(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  (void)tokenizer, (void)section, (void)depth;
  return ATTN_OK;
}

/* -- What several sections have -- */

/* {"String": "..."} or {"Regex": "..."} */
static attn_status read_pattern(const json_t *section, attn_pattern *pattern) {
  const json_t *object = json_object_get(section, "pattern");
  const json_t *string = json_object_get(object, "String"),
               *regex = json_object_get(object, "Regex");
  if (json_is_string(string))
    return attn_pattern_string(pattern, json_string_value(string), json_string_length(string));
  if (json_is_string(regex))
    return attn_pattern_regex(pattern, json_string_value(regex), json_string_length(regex));
  return attn_fail(ATTN_BAD_FORMAT, "\"pattern\" is neither a \"String\" nor a \"Regex\"");
}

static attn_status copy_string(const json_t *section, const char *key, attn_json_need need,
                               char **copy, size_t *size) {
  const char *string = NULL;
  ATTN_TRY(attn_json_string(section, key, need, &string));
  if (!string) return ATTN_OK;
  return attn_copy_bytes(string, json_string_length(json_object_get(section, key)), copy, size);
}

static attn_status new_normaliser(attn_tokenizer *tokenizer, attn_step_kind kind,
                                  attn_step **step) {
  ATTN_TRY(attn_step_new(tokenizer->normalisers, &tokenizer->normaliser_count, step));
  (*step)->kind = kind;
  return ATTN_OK;
}

static attn_status new_split(attn_tokenizer *tokenizer, attn_step_kind kind, attn_step **step) {
  ATTN_TRY(attn_step_new(tokenizer->splits, &tokenizer->split_count, step));
  (*step)->kind = kind;
  (*step)->behaviour = ATTN_SPLIT_ISOLATED;
  return ATTN_OK;
}

/* -- Normalisers -- */

static attn_status read_normaliser(attn_tokenizer *tokenizer, const json_t *section, int depth);

static attn_status read_sequence(attn_tokenizer *tokenizer, const json_t *section, const char *key,
                                 reader read, int depth) {
  json_t *list = NULL, *item;
  size_t i;
  ATTN_TRY(attn_json_array(section, key, ATTN_REQUIRED, &list));
  json_array_foreach(list, i, item) ATTN_TRY(read(tokenizer, item, depth + 1));
  return ATTN_OK;
}

static attn_status normaliser_sequence(attn_tokenizer *tokenizer, const json_t *section,
                                       int depth) {
  return read_sequence(tokenizer, section, "normalizers", read_normaliser, depth);
}

static attn_status unicode_form(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  const char *type = json_string_value(json_object_get(section, "type"));
  attn_step *step;
  (void)depth;
  ATTN_TRY(new_normaliser(tokenizer, ATTN_STEP_UNICODE, &step));
  step->compat = type[2] == 'K';
  step->compose = type[strlen(type) - 1] == 'C';
  return ATTN_OK;
}

static attn_status lowercase(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  attn_step *step;
  (void)section, (void)depth;
  return new_normaliser(tokenizer, ATTN_STEP_LOWERCASE, &step);
}

static attn_status strip_accents(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  attn_step *step;
  (void)section, (void)depth;
  ATTN_TRY(new_normaliser(tokenizer, ATTN_STEP_STRIP_ACCENTS, &step));
  step->all_marks = true;
  return ATTN_OK;
}

static attn_status strip(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  attn_step *step;
  (void)depth;
  ATTN_TRY(new_normaliser(tokenizer, ATTN_STEP_STRIP, &step));
  ATTN_TRY(attn_json_bool(section, "strip_left", ATTN_REQUIRED, &step->left));
  return attn_json_bool(section, "strip_right", ATTN_REQUIRED, &step->right);
}

static attn_status prepend(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  attn_step *step;
  (void)depth;
  ATTN_TRY(new_normaliser(tokenizer, ATTN_STEP_PREPEND, &step));
  return copy_string(section, "prepend", ATTN_REQUIRED, &step->content, &step->content_size);
}

static attn_status replace(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  attn_step *step;
  (void)depth;
  ATTN_TRY(new_normaliser(tokenizer, ATTN_STEP_REPLACE, &step));
  ATTN_TRY(read_pattern(section, &step->pattern));
  return copy_string(section, "content", ATTN_REQUIRED, &step->content, &step->content_size);
}

static attn_status precompiled(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  const char *encoded = NULL;
  attn_text bytes = {0};
  attn_step *step;
  (void)depth;
  ATTN_TRY(new_normaliser(tokenizer, ATTN_STEP_CHARSMAP, &step));
  ATTN_TRY(attn_json_string(section, "precompiled_charsmap", ATTN_REQUIRED, &encoded));
  size_t size = json_string_length(json_object_get(section, "precompiled_charsmap"));
  attn_status status = attn_base64_decode(encoded, size, &bytes);
  if (status == ATTN_OK) status = attn_charsmap_set(step, bytes.data, bytes.length);
  attn_text_free(&bytes);
  return status;
}

static attn_status normalise_bytes(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  attn_step *step;
  (void)section, (void)depth;
  return new_normaliser(tokenizer, ATTN_STEP_BYTES, &step);
}

static attn_status bert_normaliser(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  bool clean = true, chinese = true, lower = true, accents;
  (void)depth;
  ATTN_TRY(attn_json_bool(section, "clean_text", ATTN_OPTIONAL, &clean));
  ATTN_TRY(attn_json_bool(section, "handle_chinese_chars", ATTN_OPTIONAL, &chinese));
  ATTN_TRY(attn_json_bool(section, "lowercase", ATTN_OPTIONAL, &lower));
  accents = lower; /* unless stated */
  ATTN_TRY(attn_json_bool(section, "strip_accents", ATTN_OPTIONAL, &accents));
  return attn_bert_normalisers(tokenizer, clean, chinese, accents, lower);
}

static attn_status read_normaliser(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  static const reader_entry readers[] = {
      {"Sequence", normaliser_sequence},
      {"NFC", unicode_form},
      {"NFD", unicode_form},
      {"NFKC", unicode_form},
      {"NFKD", unicode_form},
      {"Lowercase", lowercase},
      {"StripAccents", strip_accents},
      {"Strip", strip},
      {"Prepend", prepend},
      {"Replace", replace},
      {"Precompiled", precompiled},
      {"ByteLevel", normalise_bytes},
      {"BertNormalizer", bert_normaliser},
  };
  return dispatch(tokenizer, section, "normalizer", readers, COUNT(readers), depth);
}

/* -- Pre-tokenizers -- */

static attn_status read_split(attn_tokenizer *tokenizer, const json_t *section, int depth);

static attn_status split_sequence(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  return read_sequence(tokenizer, section, "pretokenizers", read_split, depth);
}

static attn_status read_behaviour(const json_t *section, attn_json_need need, attn_step *step) {
  static const char *const names[] = {"Removed", "Isolated", "MergedWithPrevious", "MergedWithNext",
                                      "Contiguous"};
  int behaviour = step->behaviour;
  ATTN_TRY(attn_json_choice(section, "behavior", need, names, COUNT(names), &behaviour));
  step->behaviour = (attn_behaviour)behaviour;
  return ATTN_OK;
}

static attn_status split(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  attn_step *step;
  (void)depth;
  ATTN_TRY(new_split(tokenizer, ATTN_STEP_SPLIT, &step));
  ATTN_TRY(read_behaviour(section, ATTN_REQUIRED, step));
  ATTN_TRY(attn_json_bool(section, "invert", ATTN_OPTIONAL, &step->invert));
  return read_pattern(section, &step->pattern);
}

static attn_status add_regex_split(attn_tokenizer *tokenizer, const char *regex, bool invert) {
  attn_step *step;
  ATTN_TRY(new_split(tokenizer, ATTN_STEP_SPLIT, &step));
  step->invert = invert;
  if (invert) step->behaviour = ATTN_SPLIT_REMOVED;
  return attn_pattern_regex(&step->pattern, regex, strlen(regex));
}

static attn_status add_class_split(attn_tokenizer *tokenizer, bool (*class)(int32_t),
                                   attn_behaviour behaviour) {
  attn_step *step;
  ATTN_TRY(new_split(tokenizer, ATTN_STEP_SPLIT, &step));
  step->behaviour = behaviour;
  step->pattern = (attn_pattern){.kind = ATTN_PATTERN_CLASS, .class = class};
  return ATTN_OK;
}

static attn_status byte_level(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  bool space = true, regex = true;
  attn_step *step;
  (void)depth;
  ATTN_TRY(attn_json_bool(section, "add_prefix_space", ATTN_OPTIONAL, &space));
  ATTN_TRY(attn_json_bool(section, "use_regex", ATTN_OPTIONAL, &regex));
  if (space) {
    ATTN_TRY(new_split(tokenizer, ATTN_STEP_PREPEND, &step));
    step->unless_there = true;
    ATTN_TRY(attn_copy_bytes(" ", 1, &step->content, &step->content_size));
  }
  if (regex) ATTN_TRY(add_regex_split(tokenizer, attn_regex_gpt2, false));
  return new_split(tokenizer, ATTN_STEP_BYTES, &step);
}

static attn_status digits(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  bool individual = false;
  (void)depth;
  ATTN_TRY(attn_json_bool(section, "individual_digits", ATTN_OPTIONAL, &individual));
  return add_class_split(tokenizer, attn_is_number,
                         individual ? ATTN_SPLIT_ISOLATED : ATTN_SPLIT_CONTIGUOUS);
}

static attn_status punctuation(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  (void)depth;
  ATTN_TRY(add_class_split(tokenizer, attn_is_punctuation, ATTN_SPLIT_ISOLATED));
  return read_behaviour(section, ATTN_OPTIONAL, &tokenizer->splits[tokenizer->split_count - 1]);
}

static attn_status whitespace(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  (void)section, (void)depth;
  return add_regex_split(tokenizer, "\\w+|[^\\w\\s]+", true);
}

static attn_status whitespace_split(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  (void)section, (void)depth;
  return add_class_split(tokenizer, attn_is_whitespace, ATTN_SPLIT_REMOVED);
}

static attn_status bert_splits(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  (void)section, (void)depth;
  return attn_bert_splits(tokenizer);
}

typedef enum prepend_scheme { ALWAYS = 0, FIRST, NEVER } prepend_scheme;

/* Older files say "add_prefix_space" instead. */
static attn_status read_scheme(const json_t *section, int *scheme) {
  static const char *const names[] = {"always", "first", "never"};
  bool space = true;
  ATTN_TRY(attn_json_bool(section, "add_prefix_space", ATTN_OPTIONAL, &space));
  *scheme = space ? ALWAYS : NEVER;
  return attn_json_choice(section, "prepend_scheme", ATTN_OPTIONAL, names, COUNT(names), scheme);
}

static attn_status metaspace(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  bool cuts = true;
  int scheme;
  attn_step *step;
  (void)depth;
  ATTN_TRY(read_scheme(section, &scheme));
  ATTN_TRY(attn_json_bool(section, "split", ATTN_OPTIONAL, &cuts));
  ATTN_TRY(new_split(tokenizer, ATTN_STEP_REPLACE, &step));
  ATTN_TRY(attn_pattern_string(&step->pattern, " ", 1));
  ATTN_TRY(copy_string(section, "replacement", ATTN_REQUIRED, &step->content, &step->content_size));
  const char *mark = step->content;
  size_t size = step->content_size;
  if (scheme != NEVER) {
    ATTN_TRY(new_split(tokenizer, ATTN_STEP_PREPEND, &step));
    step->unless_there = true;
    step->only_first = scheme == FIRST;
    ATTN_TRY(attn_copy_bytes(mark, size, &step->content, &step->content_size));
  }
  if (!cuts) return ATTN_OK;
  ATTN_TRY(new_split(tokenizer, ATTN_STEP_SPLIT, &step));
  step->behaviour = ATTN_SPLIT_MERGED_WITH_NEXT;
  return attn_pattern_string(&step->pattern, mark, size);
}

static attn_status read_split(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  static const reader_entry readers[] = {
      {"Sequence", split_sequence},
      {"Split", split},
      {"ByteLevel", byte_level},
      {"Digits", digits},
      {"Punctuation", punctuation},
      {"Whitespace", whitespace},
      {"WhitespaceSplit", whitespace_split},
      {"BertPreTokenizer", bert_splits},
      {"Metaspace", metaspace},
  };
  return dispatch(tokenizer, section, "pre_tokenizer", readers, COUNT(readers), depth);
}

/* -- Decoders -- */

static attn_status read_decoder(attn_tokenizer *tokenizer, const json_t *section, int depth);

static attn_status decoder_sequence(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  return read_sequence(tokenizer, section, "decoders", read_decoder, depth);
}

static attn_status decode_bytes(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  (void)section, (void)depth;
  tokenizer->decoder.byte_level = true;
  return ATTN_OK;
}

static attn_status decode_fallback(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  (void)section, (void)depth;
  tokenizer->decoder.byte_fallback = true;
  return ATTN_OK;
}

static attn_status new_replacement(attn_tokenizer *tokenizer, struct attn_replacement **change) {
  struct attn_token_decoder *decoder = &tokenizer->decoder;
  if (decoder->replacement_count == (int)COUNT(decoder->replacements))
    return attn_fail(ATTN_UNSUPPORTED, "more than %zu replacements", COUNT(decoder->replacements));
  *change = &decoder->replacements[decoder->replacement_count++];
  return ATTN_OK;
}

static attn_status decode_replace(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  struct attn_replacement *change = NULL;
  (void)depth;
  const json_t *pattern = json_object_get(section, "pattern");
  if (!json_is_string(json_object_get(pattern, "String")))
    return attn_fail(ATTN_UNSUPPORTED, "a pattern that is not a \"String\"");
  ATTN_TRY(new_replacement(tokenizer, &change));
  ATTN_TRY(copy_string(pattern, "String", ATTN_REQUIRED, &change->from, &change->from_size));
  if (!change->from_size) return attn_fail(ATTN_BAD_FORMAT, "the pattern is the empty string");
  return copy_string(section, "content", ATTN_REQUIRED, &change->to, &change->to_size);
}

/* Spaces at the start of the whole text, which is how Llama's files use it. */
static attn_status decode_strip(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  const char *content = NULL;
  int64_t start = 0, stop = 0;
  (void)depth;
  ATTN_TRY(attn_json_string(section, "content", ATTN_REQUIRED, &content));
  ATTN_TRY(attn_json_int(section, "start", ATTN_REQUIRED, 0, 1 << 20, &start));
  ATTN_TRY(attn_json_int(section, "stop", ATTN_REQUIRED, 0, 1 << 20, &stop));
  if (strcmp(content, " ") != 0 || stop != 0)
    return attn_fail(ATTN_UNSUPPORTED, "other than spaces at the start");
  tokenizer->decoder.strip = (size_t)start;
  return ATTN_OK;
}

static attn_status decode_metaspace(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  struct attn_replacement *change = NULL;
  int scheme;
  (void)depth;
  ATTN_TRY(read_scheme(section, &scheme));
  ATTN_TRY(new_replacement(tokenizer, &change));
  ATTN_TRY(copy_string(section, "replacement", ATTN_REQUIRED, &change->from, &change->from_size));
  if (!change->from_size) return attn_fail(ATTN_BAD_FORMAT, "the replacement is the empty string");
  tokenizer->decoder.strip = scheme != NEVER;
  return attn_copy_bytes(" ", 1, &change->to, &change->to_size);
}

static attn_status decode_wordpiece(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  struct attn_token_decoder *decoder = &tokenizer->decoder;
  (void)depth;
  if (decoder->wordpiece) return attn_fail(ATTN_BAD_FORMAT, "stands twice");
  decoder->wordpiece = decoder->cleanup = true;
  decoder->strip = 1;
  ATTN_TRY(attn_json_bool(section, "cleanup", ATTN_OPTIONAL, &decoder->cleanup));
  return copy_string(section, "prefix", ATTN_REQUIRED, &decoder->wordpiece_prefix,
                     &decoder->wordpiece_prefix_size);
}

static attn_status read_decoder(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  static const reader_entry readers[] = {
      {"Sequence", decoder_sequence},    {"ByteLevel", decode_bytes},
      {"ByteFallback", decode_fallback}, {"Fuse", nothing},
      {"Replace", decode_replace},       {"Strip", decode_strip},
      {"Metaspace", decode_metaspace},   {"WordPiece", decode_wordpiece},
  };
  if (depth == 0 && (!section || json_is_null(section))) { /* tokens are joined by spaces */
    tokenizer->decoder.spaces = true;
    tokenizer->decoder.strip = 1;
  }
  return dispatch(tokenizer, section, "decoder", readers, COUNT(readers), depth);
}

/* -- Post-processors: what stands around a text. A later one stands around the earlier. -- */

static attn_status read_post(attn_tokenizer *tokenizer, const json_t *section, int depth);

static attn_status post_sequence(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  return read_sequence(tokenizer, section, "processors", read_post, depth);
}

static attn_status check_token(const attn_tokenizer *tokenizer, const json_t *id) {
  json_int_t value = json_is_integer(id) ? json_integer_value(id) : -1;
  if (!attn_vocabulary_string(&tokenizer->vocabulary, value, NULL))
    return attn_fail(ATTN_BAD_FORMAT, "the id of a special token, %lld, is no token",
                     (long long)value);
  return ATTN_OK;
}

static attn_status insert_token(attn_tokens *tokens, size_t at, int32_t id) {
  ATTN_TRY(attn_tokens_add(tokens, id));
  memmove(tokens->ids + at + 1, tokens->ids + at, (tokens->count - 1 - at) * sizeof *tokens->ids);
  tokens->ids[at] = id;
  return ATTN_OK;
}

/* ["[SEP]", 102] */
static attn_status read_end(const attn_tokenizer *tokenizer, const json_t *section, const char *key,
                            int32_t *id) {
  json_t *pair = NULL;
  ATTN_TRY(attn_json_array(section, key, ATTN_REQUIRED, &pair));
  ATTN_TRY(check_token(tokenizer, json_array_get(pair, 1)));
  *id = (int32_t)json_integer_value(json_array_get(pair, 1));
  return ATTN_OK;
}

static attn_status post_bert(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  int32_t sep = -1, cls = -1;
  (void)depth;
  ATTN_TRY(read_end(tokenizer, section, "sep", &sep));
  ATTN_TRY(read_end(tokenizer, section, "cls", &cls));
  ATTN_TRY(insert_token(&tokenizer->prefix, 0, cls));
  return attn_tokens_add(&tokenizer->suffix, sep);
}

static attn_status add_template_token(attn_tokenizer *tokenizer, const json_t *tokens,
                                      const char *name, bool behind, size_t *in_front) {
  json_t *description = NULL, *ids = NULL, *id;
  size_t i;
  ATTN_TRY(attn_json_object(tokens, name, ATTN_REQUIRED, &description));
  ATTN_TRY(attn_json_array(description, "ids", ATTN_REQUIRED, &ids));
  json_array_foreach(ids, i, id) {
    ATTN_TRY(check_token(tokenizer, id));
    int32_t value = (int32_t)json_integer_value(id);
    if (behind)
      ATTN_TRY(attn_tokens_add(&tokenizer->suffix, value));
    else
      ATTN_TRY(insert_token(&tokenizer->prefix, (*in_front)++, value));
  }
  return ATTN_OK;
}

static attn_status post_template(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  json_t *single = NULL, *tokens = NULL, *item;
  size_t i, in_front = 0;
  int sequences = 0;
  (void)depth;
  ATTN_TRY(attn_json_array(section, "single", ATTN_REQUIRED, &single));
  ATTN_TRY(attn_json_object(section, "special_tokens", ATTN_REQUIRED, &tokens));
  json_array_foreach(single, i, item) {
    const json_t *special = json_object_get(item, "SpecialToken");
    const char *name = NULL;
    sequences += json_object_get(item, "Sequence") != NULL;
    if (!special) continue;
    ATTN_TRY(attn_json_string(special, "id", ATTN_REQUIRED, &name));
    ATTN_TRY(add_template_token(tokenizer, tokens, name, sequences > 0, &in_front));
  }
  if (sequences != 1)
    return attn_fail(ATTN_BAD_FORMAT, "\"single\" has %d sequences, expected one", sequences);
  return ATTN_OK;
}

static attn_status read_post(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  static const reader_entry readers[] = {
      {"Sequence", post_sequence},           {"ByteLevel", nothing},
      {"TemplateProcessing", post_template}, {"BertProcessing", post_bert},
      {"RobertaProcessing", post_bert},
  };
  return dispatch(tokenizer, section, "post_processor", readers, COUNT(readers), depth);
}

/* -- Models -- */

static attn_status read_vocabulary(attn_tokenizer *tokenizer, const json_t *section) {
  json_t *map = NULL, *id;
  const char *string;
  size_t size;
  ATTN_TRY(attn_json_object(section, "vocab", ATTN_REQUIRED, &map));
  json_object_keylen_foreach(map, string, size, id) {
    if (!json_is_integer(id))
      return attn_fail(ATTN_BAD_FORMAT, "the id of token \"%.40s\" is not an integer", string);
    ATTN_TRY(attn_vocabulary_add(&tokenizer->vocabulary, string, size, json_integer_value(id)));
  }
  return ATTN_OK;
}

static attn_status read_unknown(attn_tokenizer *tokenizer, const json_t *section,
                                attn_json_need need) {
  const char *string = NULL;
  ATTN_TRY(attn_json_string(section, "unk_token", need, &string));
  if (!string) return ATTN_OK;
  tokenizer->model.unknown = attn_vocabulary_find(&tokenizer->vocabulary, string, strlen(string));
  if (tokenizer->model.unknown >= 0) return ATTN_OK;
  return attn_fail(ATTN_BAD_FORMAT, "\"unk_token\": \"%.40s\" is not in the vocabulary", string);
}

/* "left right", or, in newer files, ["left", "right"]. */
static attn_status read_merges(attn_tokenizer *tokenizer, const json_t *section) {
  json_t *list = NULL, *item;
  size_t i;
  ATTN_TRY(attn_json_array(section, "merges", ATTN_REQUIRED, &list));
  ATTN_TRY(attn_merges_create(&tokenizer->model.merges, json_array_size(list)));
  json_array_foreach(list, i, item) {
    const json_t *left = json_array_get(item, 0), *right = json_array_get(item, 1);
    if (json_is_string(item))
      ATTN_TRY(attn_tokenizer_add_merge(tokenizer, json_string_value(item),
                                        json_string_length(item), (int64_t)i));
    else if (json_array_size(item) == 2 && json_is_string(left) && json_is_string(right))
      ATTN_TRY(attn_tokenizer_add_pair(tokenizer, json_string_value(left), json_string_length(left),
                                       json_string_value(right), json_string_length(right),
                                       (int64_t)i));
    else
      return attn_fail(ATTN_BAD_FORMAT, "merge %zu is neither a string nor two", i);
  }
  return ATTN_OK;
}

static attn_status model_bpe(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  attn_token_model *model = &tokenizer->model;
  double dropout = 0;
  (void)depth;
  model->kind = ATTN_BPE;
  ATTN_TRY(attn_json_double(section, "dropout", ATTN_OPTIONAL, 0, 1, &dropout));
  if (dropout > 0) return attn_fail(ATTN_UNSUPPORTED, "\"dropout\" %g", dropout);
  ATTN_TRY(attn_json_bool(section, "byte_fallback", ATTN_OPTIONAL, &model->byte_fallback));
  ATTN_TRY(attn_json_bool(section, "fuse_unk", ATTN_OPTIONAL, &model->fuse_unknown));
  ATTN_TRY(attn_json_bool(section, "ignore_merges", ATTN_OPTIONAL, &model->ignore_merges));
  ATTN_TRY(copy_string(section, "continuing_subword_prefix", ATTN_OPTIONAL,
                       &model->continuing_prefix, &model->continuing_size));
  ATTN_TRY(copy_string(section, "end_of_word_suffix", ATTN_OPTIONAL, &model->word_suffix,
                       &model->suffix_size));
  ATTN_TRY(read_vocabulary(tokenizer, section));
  ATTN_TRY(read_unknown(tokenizer, section, ATTN_OPTIONAL));
  return read_merges(tokenizer, section);
}

static attn_status model_wordpiece(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  attn_token_model *model = &tokenizer->model;
  (void)depth;
  model->kind = ATTN_WORDPIECE;
  model->longest_word = 100;
  ATTN_TRY(attn_json_int(section, "max_input_chars_per_word", ATTN_OPTIONAL, 1, 10000,
                         &model->longest_word));
  ATTN_TRY(copy_string(section, "continuing_subword_prefix", ATTN_REQUIRED,
                       &model->continuing_prefix, &model->continuing_size));
  ATTN_TRY(read_vocabulary(tokenizer, section));
  return read_unknown(tokenizer, section, ATTN_REQUIRED);
}

static attn_status read_scored(attn_tokenizer *tokenizer, const json_t *item, size_t id,
                               double *lowest) {
  const json_t *string = json_array_get(item, 0), *score = json_array_get(item, 1);
  if (json_array_size(item) != 2 || !json_is_string(string) || !json_is_number(score))
    return attn_fail(ATTN_BAD_FORMAT, "token %zu is not a string and a score", id);
  const char *text = json_string_value(string);
  size_t size = json_string_length(string);
  double value = json_number_value(score);
  ATTN_TRY(attn_vocabulary_add(&tokenizer->vocabulary, text, size, (int64_t)id));
  ATTN_TRY(attn_prefixes_add(&tokenizer->model.prefixes, text, size, (int32_t)id));
  tokenizer->model.scores[id] = value;
  if (value < *lowest) *lowest = value;
  return ATTN_OK;
}

static attn_status model_unigram(attn_tokenizer *tokenizer, const json_t *section, int depth) {
  attn_token_model *model = &tokenizer->model;
  json_t *list = NULL, *item;
  size_t i;
  int64_t unknown = -1;
  double lowest = 1e300;
  (void)depth;
  model->kind = ATTN_UNIGRAM;
  ATTN_TRY(attn_json_bool(section, "byte_fallback", ATTN_OPTIONAL, &model->byte_fallback));
  ATTN_TRY(attn_json_array(section, "vocab", ATTN_REQUIRED, &list));
  ATTN_TRY(attn_json_int(section, "unk_id", ATTN_OPTIONAL, 0, (int64_t)json_array_size(list) - 1,
                         &unknown));
  model->unknown = (int32_t)unknown;
  model->scores = attn_alloc_array(json_array_size(list), sizeof *model->scores);
  if (!model->scores) return ATTN_OUT_OF_MEMORY;
  model->score_count = json_array_size(list);
  json_array_foreach(list, i, item) ATTN_TRY(read_scored(tokenizer, item, i, &lowest));
  model->unknown_score = lowest - ATTN_UNKNOWN_PENALTY;
  attn_prefixes_sort(&model->prefixes);
  return ATTN_OK;
}

static attn_status read_model(attn_tokenizer *tokenizer, const json_t *root) {
  static const reader_entry readers[] = {
      {"BPE", model_bpe}, {"WordPiece", model_wordpiece}, {"Unigram", model_unigram}};
  json_t *section = NULL;
  ATTN_TRY(attn_json_object(root, "model", ATTN_REQUIRED, &section));
  if (!json_object_get(section, "type") && json_object_get(section, "merges"))
    return model_bpe(tokenizer, section, 0); /* files from before "type" */
  return dispatch(tokenizer, section, "model", readers, COUNT(readers), 0);
}

/* -- Added tokens -- */

static attn_status read_added(attn_tokenizer *tokenizer, const json_t *description) {
  int64_t id = 0;
  const char *content = NULL;
  attn_added added = {0};
  ATTN_TRY(attn_json_int(description, "id", ATTN_REQUIRED, 0, ATTN_MOST_TOKENS - 1, &id));
  ATTN_TRY(attn_json_string(description, "content", ATTN_REQUIRED, &content));
  ATTN_TRY(attn_json_bool(description, "special", ATTN_OPTIONAL, &added.special));
  added.normalized = !added.special;
  ATTN_TRY(attn_json_bool(description, "normalized", ATTN_OPTIONAL, &added.normalized));
  ATTN_TRY(attn_json_bool(description, "lstrip", ATTN_OPTIONAL, &added.left_strip));
  ATTN_TRY(attn_json_bool(description, "rstrip", ATTN_OPTIONAL, &added.right_strip));
  ATTN_TRY(attn_json_bool(description, "single_word", ATTN_OPTIONAL, &added.single_word));
  size_t size = json_string_length(json_object_get(description, "content"));
  if (attn_vocabulary_find(&tokenizer->vocabulary, content, size) != id) {
    ATTN_TRY(attn_vocabulary_add(&tokenizer->vocabulary, content, size, id));
    tokenizer->vocabulary.entries[id].outside = true;
  }
  added.id = (int32_t)id;
  return attn_tokenizer_add_token(tokenizer, added);
}

static attn_status read_all_added(attn_tokenizer *tokenizer, const json_t *root) {
  json_t *list = NULL, *item;
  size_t i;
  ATTN_TRY(attn_json_array(root, "added_tokens", ATTN_OPTIONAL, &list));
  json_array_foreach(list, i, item) {
    attn_status status = read_added(tokenizer, item);
    if (status != ATTN_OK) return attn_fail_in(status, "added_tokens[%zu]", i);
  }
  return ATTN_OK;
}

static attn_status read_root(attn_tokenizer *tokenizer, const json_t *root) {
  ATTN_TRY(read_model(tokenizer, root));
  ATTN_TRY(read_all_added(tokenizer, root));
  ATTN_TRY(read_normaliser(tokenizer, json_object_get(root, "normalizer"), 0));
  ATTN_TRY(read_split(tokenizer, json_object_get(root, "pre_tokenizer"), 0));
  ATTN_TRY(read_decoder(tokenizer, json_object_get(root, "decoder"), 0));
  return read_post(tokenizer, json_object_get(root, "post_processor"), 0);
}

/* Unlike configurations, tokens may contain NUL. */
static attn_status parse(const char *path, json_t **root) {
  char *text;
  size_t size;
  json_error_t error;
  ATTN_TRY(attn_file_read(path, LARGEST_FILE, &text, &size));
  *root = json_loadb(text, size, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &error);
  attn_free(text);
  if (!*root)
    return attn_fail(ATTN_BAD_FORMAT, "%s: not valid JSON at line %d, column %d: %s", path,
                     error.line, error.column, error.text);
  if (json_is_object(*root)) return ATTN_OK;
  json_decref(*root);
  return attn_fail(ATTN_BAD_FORMAT, "%s: expected a JSON object at the top level", path);
}

attn_status attn_tokenizer_read_json(attn_tokenizer *tokenizer, const char *path) {
  json_t *root;
  ATTN_TRY(parse(path, &root));
  attn_status status = read_root(tokenizer, root);
  json_decref(root);
  return status == ATTN_OK ? ATTN_OK : attn_fail_in(status, "%s", path);
}
