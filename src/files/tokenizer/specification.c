/* Tokenizers from plain arrays, as GGUF's metadata have them. */
#include "files/tokenizer/parts.h"
#include "base/memory.h"
#include "base/status.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

const char attn_lower_line[] = "\xe2\x96\x81";

static size_t size_of(const char *const *strings, const size_t *sizes, int64_t i) {
  return sizes ? sizes[i] : strlen(strings[i]);
}

static attn_status add_tokens(attn_tokenizer *tokenizer, const attn_tokenizer_spec *spec) {
  for (int64_t id = 0; id < spec->token_count; ++id) {
    size_t size = size_of(spec->tokens, spec->token_sizes, id);
    ATTN_TRY(attn_vocabulary_add(&tokenizer->vocabulary, spec->tokens[id], size, id));
  }
  return ATTN_OK;
}

static attn_status add_types(attn_tokenizer *tokenizer, const attn_tokenizer_spec *spec) {
  for (int64_t id = 0; spec->types && id < spec->token_count; ++id) {
    int32_t type = spec->types[id];
    if (type < 0 || type > ATTN_TOKEN_BYTE)
      return attn_fail(ATTN_BAD_FORMAT, "token %lld has the unknown type %d", (long long)id, type);
    bool special = type == ATTN_TOKEN_CONTROL || type == ATTN_TOKEN_UNKNOWN;
    bool unused = type == ATTN_TOKEN_UNUSED && tokenizer->model.kind == ATTN_UNIGRAM;
    tokenizer->vocabulary.entries[id].outside = special || unused;
    if (special || type == ATTN_TOKEN_USER_DEFINED)
      ATTN_TRY(
          attn_tokenizer_add_token(tokenizer, (attn_added){.id = (int32_t)id, .special = special}));
  }
  return ATTN_OK;
}

static attn_status check_id(const attn_tokenizer_spec *spec, const char *name, int32_t id,
                            bool needed) {
  if (id < (needed ? 0 : -1) || id >= spec->token_count)
    return attn_fail(ATTN_BAD_FORMAT, "the %s token is %d, of %lld tokens", name, id,
                     (long long)spec->token_count);
  return ATTN_OK;
}

static attn_status add_ends(attn_tokenizer *tokenizer, const attn_tokenizer_spec *spec) {
  ATTN_TRY(check_id(spec, "BOS", spec->bos, spec->add_bos));
  ATTN_TRY(check_id(spec, "EOS", spec->eos, spec->add_eos));
  ATTN_TRY(check_id(spec, "unknown", spec->unknown, false));
  tokenizer->model.unknown = spec->unknown;
  if (spec->add_bos) ATTN_TRY(attn_tokens_add(&tokenizer->prefix, spec->bos));
  return spec->add_eos ? attn_tokens_add(&tokenizer->suffix, spec->eos) : ATTN_OK;
}

/* -- gpt2 -- */

const char attn_split_digits[] = "digits";

static const attn_word_splitter splitters[] = {
    {"gpt-2", {attn_regex_gpt2}, false, false},
    {"smollm", {attn_split_digits, attn_regex_gpt2}, false, false},
    {"llama-bpe", {attn_regex_llama3}, false, true},
    {"llama3", {attn_regex_llama3}, false, true},
    {"llama-v3", {attn_regex_llama3}, false, true},
    {"qwen2", {attn_regex_qwen2}, true, false},
    {"deepseek-llm",
     {"[\r\n]", attn_regex_deepseek_letters, attn_regex_deepseek_marks, "\\s+$",
      attn_regex_deepseek_east, attn_split_digits},
     false,
     false},
    {"deepseek-v3", {"\\p{N}{1,3}", attn_regex_deepseek3_east, attn_regex_deepseek3}, false, false},
    {"kimi-k2", {attn_regex_kimi}, false, false},
};

const attn_word_splitter *attn_word_splitter_at(size_t i) {
  return i < sizeof splitters / sizeof *splitters ? &splitters[i] : NULL;
}

static const attn_word_splitter *find_splitter(const char *name) {
  const attn_word_splitter *splitter;
  for (size_t i = 0; (splitter = attn_word_splitter_at(i)); ++i)
    if (strcmp(name, splitter->name) == 0) return splitter;
  return NULL;
}

attn_status attn_add_word_splitter(attn_tokenizer *tokenizer, const attn_word_splitter *splitter) {
  attn_step *step;
  if (splitter->compose) {
    ATTN_TRY(attn_step_new(tokenizer->normalisers, &tokenizer->normaliser_count, &step));
    step->kind = ATTN_STEP_UNICODE;
    step->compose = true;
  }
  for (int i = 0; i < ATTN_WORD_SPLITS && splitter->splits[i]; ++i) {
    const char *split = splitter->splits[i];
    ATTN_TRY(attn_step_new(tokenizer->splits, &tokenizer->split_count, &step));
    step->kind = ATTN_STEP_SPLIT;
    step->behaviour = ATTN_SPLIT_ISOLATED;
    if (split == attn_split_digits)
      step->pattern = (attn_pattern){.kind = ATTN_PATTERN_CLASS, .class = attn_is_number};
    else
      ATTN_TRY(attn_pattern_regex(&step->pattern, split, strlen(split)));
  }
  ATTN_TRY(attn_step_new(tokenizer->splits, &tokenizer->split_count, &step));
  step->kind = ATTN_STEP_BYTES;
  return ATTN_OK;
}

static attn_status add_merges(attn_tokenizer *tokenizer, const attn_tokenizer_spec *spec) {
  ATTN_TRY(attn_merges_create(&tokenizer->model.merges, (size_t)spec->merge_count));
  for (int64_t i = 0; i < spec->merge_count; ++i)
    ATTN_TRY(attn_tokenizer_add_merge(tokenizer, spec->merges[i],
                                      size_of(spec->merges, spec->merge_sizes, i), i));
  return ATTN_OK;
}

static attn_status read_gpt2(attn_tokenizer *tokenizer, const attn_tokenizer_spec *spec) {
  const char *name = spec->pre ? spec->pre : "gpt-2";
  const attn_word_splitter *splitter = find_splitter(name);
  if (!splitter)
    return attn_fail(ATTN_UNSUPPORTED, "pre-tokenizer \"%.60s\" (tokenizer.ggml.pre)", name);
  if (spec->merge_count > 0 && !spec->merges)
    return attn_fail(ATTN_INVALID_ARGUMENT, "merges are NULL, merge_count is %lld",
                     (long long)spec->merge_count);
  tokenizer->model.kind = ATTN_BPE;
  tokenizer->model.ignore_merges = splitter->whole_words;
  tokenizer->decoder.byte_level = true;
  ATTN_TRY(add_tokens(tokenizer, spec));
  ATTN_TRY(add_merges(tokenizer, spec));
  return attn_add_word_splitter(tokenizer, splitter);
}

/* -- llama -- */

static int compare_scores(const void *a, const void *b, void *scores) {
  float left = ((const float *)scores)[*(const int32_t *)a];
  float right = ((const float *)scores)[*(const int32_t *)b];
  if (left != right) return left > right ? -1 : 1;
  return (*(const int32_t *)a > *(const int32_t *)b) - (*(const int32_t *)a < *(const int32_t *)b);
}

/* The place of each token among the sorted scores; equal scores share one. */
static attn_status rank_scores(attn_tokenizer *tokenizer, const attn_tokenizer_spec *spec) {
  size_t count = (size_t)spec->token_count;
  for (size_t i = 0; i < count; ++i)
    if (!isfinite(spec->scores[i]))
      return attn_fail(ATTN_BAD_FORMAT, "the score of token %zu is not finite", i);
  int32_t *order = attn_alloc(count * sizeof *order);
  uint32_t *ranks = attn_alloc(count * sizeof *ranks), rank = 0;
  tokenizer->model.ranks = ranks;
  if (order && ranks) {
    for (size_t i = 0; i < count; ++i) order[i] = (int32_t)i;
    qsort_r(order, count, sizeof *order, compare_scores, (void *)(uintptr_t)spec->scores);
    for (size_t i = 0; i < count; ++i) {
      if (i && spec->scores[order[i]] != spec->scores[order[i - 1]]) ++rank;
      ranks[order[i]] = rank;
    }
  }
  attn_free(order);
  return order && ranks ? ATTN_OK : ATTN_OUT_OF_MEMORY;
}

static attn_status add_prepend(attn_step *steps, int *count, bool unless_there) {
  attn_step *step;
  ATTN_TRY(attn_step_new(steps, count, &step));
  step->kind = ATTN_STEP_PREPEND;
  step->unless_there = unless_there;
  return attn_copy_bytes(attn_lower_line, 3, &step->content, &step->content_size);
}

static attn_status add_replace(attn_step *steps, int *count) {
  attn_step *step;
  ATTN_TRY(attn_step_new(steps, count, &step));
  step->kind = ATTN_STEP_REPLACE;
  ATTN_TRY(attn_pattern_string(&step->pattern, " ", 1));
  return attn_copy_bytes(attn_lower_line, 3, &step->content, &step->content_size);
}

static attn_status decode_lines(attn_tokenizer *tokenizer) {
  struct attn_replacement *change = &tokenizer->decoder.replacements[0];
  tokenizer->decoder.replacement_count = 1;
  ATTN_TRY(attn_copy_bytes(attn_lower_line, 3, &change->from, &change->from_size));
  return attn_copy_bytes(" ", 1, &change->to, &change->to_size);
}

attn_status attn_add_line_steps(attn_tokenizer *tokenizer, bool prefix) {
  attn_step *steps = tokenizer->normalisers;
  int *count = &tokenizer->normaliser_count;
  if (prefix) ATTN_TRY(add_prepend(steps, count, false));
  ATTN_TRY(add_replace(steps, count));
  return decode_lines(tokenizer);
}

static attn_status read_llama(attn_tokenizer *tokenizer, const attn_tokenizer_spec *spec) {
  if (!spec->scores) return attn_fail(ATTN_BAD_FORMAT, "a \"llama\" tokenizer without scores");
  tokenizer->model.kind = ATTN_BPE_SCORES;
  tokenizer->model.byte_fallback = true;
  tokenizer->decoder.byte_fallback = true;
  tokenizer->decoder.strip = spec->add_space_prefix;
  ATTN_TRY(add_tokens(tokenizer, spec));
  ATTN_TRY(rank_scores(tokenizer, spec));
  return attn_add_line_steps(tokenizer, spec->add_space_prefix);
}

/* -- t5 -- */

/* Words, each with a U+2581: what Transformers calls WhitespaceSplit and Metaspace. */
static attn_status add_word_steps(attn_tokenizer *tokenizer, bool at_whitespace) {
  attn_step *steps = tokenizer->splits, *step;
  int *count = &tokenizer->split_count;
  ATTN_TRY(attn_step_new(steps, count, &step));
  step->kind = ATTN_STEP_SPLIT;
  step->behaviour = ATTN_SPLIT_REMOVED;
  if (at_whitespace)
    step->pattern = (attn_pattern){.kind = ATTN_PATTERN_CLASS, .class = attn_is_whitespace};
  else
    ATTN_TRY(attn_pattern_string(&step->pattern, " ", 1));
  ATTN_TRY(add_replace(steps, count));
  ATTN_TRY(add_prepend(steps, count, true));
  ATTN_TRY(attn_step_new(steps, count, &step));
  step->kind = ATTN_STEP_SPLIT;
  step->behaviour = ATTN_SPLIT_MERGED_WITH_NEXT;
  ATTN_TRY(attn_pattern_string(&step->pattern, attn_lower_line, 3));
  return decode_lines(tokenizer);
}

attn_status attn_add_unigram_steps(attn_tokenizer *tokenizer, const attn_tokenizer_spec *spec) {
  attn_step *step;
  bool at_whitespace = false;
  tokenizer->decoder.strip = spec->add_space_prefix || spec->remove_extra_spaces;
  if (spec->charsmap) {
    ATTN_TRY(attn_step_new(tokenizer->normalisers, &tokenizer->normaliser_count, &step));
    attn_status status = attn_charsmap_set(step, spec->charsmap, spec->charsmap_size);
    if (status != ATTN_OK) return attn_fail_in(status, "tokenizer.ggml.precompiled_charsmap");
    ATTN_TRY(attn_charsmap_leaves_spaces(step, &at_whitespace));
  }
  return spec->remove_extra_spaces ? add_word_steps(tokenizer, at_whitespace)
                                   : attn_add_line_steps(tokenizer, spec->add_space_prefix);
}

/* The steps write U+2581, so that tokens with it cannot be found in the text beforehand. */
static bool is_in_model(const attn_tokenizer_spec *spec, int64_t id) {
  int32_t type = spec->types ? spec->types[id] : ATTN_TOKEN_NORMAL;
  if (type != ATTN_TOKEN_USER_DEFINED) return type == ATTN_TOKEN_NORMAL;
  return memmem(spec->tokens[id], size_of(spec->tokens, spec->token_sizes, id), attn_lower_line, 3);
}

static attn_status read_t5(attn_tokenizer *tokenizer, const attn_tokenizer_spec *spec) {
  attn_token_model *model = &tokenizer->model;
  double lowest = 1e300;
  if (!spec->scores) return attn_fail(ATTN_BAD_FORMAT, "a \"t5\" tokenizer without scores");
  ATTN_TRY(check_id(spec, "unknown", spec->unknown, true));
  model->kind = ATTN_UNIGRAM;
  ATTN_TRY(add_tokens(tokenizer, spec));
  model->score_count = (size_t)spec->token_count;
  model->scores = attn_alloc_array(model->score_count, sizeof *model->scores);
  if (!model->scores) return ATTN_OUT_OF_MEMORY;
  for (int64_t id = 0; id < spec->token_count; ++id) {
    if (!isfinite(spec->scores[id]))
      return attn_fail(ATTN_BAD_FORMAT, "the score of token %lld is not finite", (long long)id);
    if (!is_in_model(spec, id)) continue;
    bool normal = !spec->types || spec->types[id] == ATTN_TOKEN_NORMAL;
    model->scores[id] = normal ? spec->scores[id] : 0;
    if (normal && model->scores[id] < lowest) lowest = model->scores[id];
    ATTN_TRY(attn_prefixes_add(&model->prefixes, spec->tokens[id],
                               size_of(spec->tokens, spec->token_sizes, id), (int32_t)id));
  }
  model->unknown_score = lowest - ATTN_UNKNOWN_PENALTY;
  attn_prefixes_sort(&model->prefixes);
  return attn_add_unigram_steps(tokenizer, spec);
}

/* -- bert -- */

/* GGUF writes "word" and "##ing" as U+2581 "word" and "ing"; what is in brackets as it is. */
static attn_status add_bert_tokens(attn_tokenizer *tokenizer, const attn_tokenizer_spec *spec) {
  attn_text string = {0};
  attn_status status = ATTN_OK;
  for (int64_t id = 0; id < spec->token_count && status == ATTN_OK; ++id) {
    const char *token = spec->tokens[id];
    size_t size = size_of(spec->tokens, spec->token_sizes, id);
    bool begins = size >= 3 && memcmp(token, attn_lower_line, 3) == 0;
    bool bracket = size >= 2 && token[0] == '[' && token[size - 1] == ']';
    string.length = 0;
    attn_text_add(&string, "##", begins || bracket ? 0 : 2);
    attn_text_add(&string, token + (begins ? 3 : 0), size - (begins ? 3 : 0));
    status = string.failed
                 ? ATTN_OUT_OF_MEMORY
                 : attn_vocabulary_add(&tokenizer->vocabulary, string.data, string.length, id);
  }
  attn_text_free(&string);
  return status;
}

static attn_status read_bert(attn_tokenizer *tokenizer, const attn_tokenizer_spec *spec) {
  attn_token_model *model = &tokenizer->model;
  ATTN_TRY(check_id(spec, "unknown", spec->unknown, true));
  model->kind = ATTN_WORDPIECE;
  model->longest_word = 100;
  tokenizer->decoder.wordpiece = tokenizer->decoder.cleanup = true;
  tokenizer->decoder.strip = 1;
  ATTN_TRY(attn_copy_bytes("##", 2, &model->continuing_prefix, &model->continuing_size));
  ATTN_TRY(attn_copy_bytes("##", 2, &tokenizer->decoder.wordpiece_prefix,
                           &tokenizer->decoder.wordpiece_prefix_size));
  ATTN_TRY(add_bert_tokens(tokenizer, spec));
  ATTN_TRY(attn_bert_normalisers(tokenizer, true, true, spec->strip_accents, spec->lower_case));
  return attn_bert_splits(tokenizer);
}

attn_status attn_bert_normalisers(attn_tokenizer *tokenizer, bool clean, bool chinese, bool accents,
                                  bool lower) {
  attn_step *steps = tokenizer->normalisers, *step;
  int *count = &tokenizer->normaliser_count;
  if (clean) {
    ATTN_TRY(attn_step_new(steps, count, &step));
    step->kind = ATTN_STEP_BERT_CLEAN;
  }
  if (chinese) {
    ATTN_TRY(attn_step_new(steps, count, &step));
    step->kind = ATTN_STEP_BERT_CHINESE;
  }
  if (accents) {
    ATTN_TRY(attn_step_new(steps, count, &step));
    step->kind = ATTN_STEP_UNICODE;
    ATTN_TRY(attn_step_new(steps, count, &step));
    step->kind = ATTN_STEP_STRIP_ACCENTS;
  }
  if (lower) {
    ATTN_TRY(attn_step_new(steps, count, &step));
    step->kind = ATTN_STEP_LOWERCASE;
  }
  return ATTN_OK;
}

attn_status attn_bert_splits(attn_tokenizer *tokenizer) {
  attn_step *step;
  ATTN_TRY(attn_step_new(tokenizer->splits, &tokenizer->split_count, &step));
  step->kind = ATTN_STEP_SPLIT;
  step->behaviour = ATTN_SPLIT_REMOVED;
  step->pattern = (attn_pattern){.kind = ATTN_PATTERN_CLASS, .class = attn_is_whitespace};
  ATTN_TRY(attn_step_new(tokenizer->splits, &tokenizer->split_count, &step));
  step->kind = ATTN_STEP_SPLIT;
  step->behaviour = ATTN_SPLIT_ISOLATED;
  step->pattern = (attn_pattern){.kind = ATTN_PATTERN_CLASS, .class = attn_is_punctuation};
  return ATTN_OK;
}

attn_status attn_tokenizer_read_spec(attn_tokenizer *tokenizer, const attn_tokenizer_spec *spec) {
  static const struct {
    const char *name;
    attn_status (*read)(attn_tokenizer *, const attn_tokenizer_spec *);
  } models[] = {{"gpt2", read_gpt2}, {"llama", read_llama}, {"t5", read_t5}, {"bert", read_bert}};
  if (!spec || !spec->model || !spec->tokens || spec->merge_count < 0)
    return attn_fail(ATTN_INVALID_ARGUMENT, "a tokenizer's model or tokens are missing");
  if (spec->token_count < 1 || spec->token_count > ATTN_MOST_TOKENS)
    return attn_fail(ATTN_BAD_FORMAT, "a tokenizer of %lld tokens; expected 1 to %d",
                     (long long)spec->token_count, ATTN_MOST_TOKENS);
  for (size_t i = 0; i < sizeof models / sizeof *models; ++i) {
    if (strcmp(spec->model, models[i].name) != 0) continue;
    ATTN_TRY(add_ends(tokenizer, spec));
    ATTN_TRY(models[i].read(tokenizer, spec));
    return add_types(tokenizer, spec);
  }
  return attn_fail(ATTN_UNSUPPORTED, "tokenizer model \"%.60s\" (tokenizer.ggml.model)",
                   spec->model);
}
