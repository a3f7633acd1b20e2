/* A tokenizer as the plain arrays that GGUF has, from which the same one can be made again: checked
 * by making it. */
#include "files/tokenizer/parts.h"
#include "base/memory.h"
#include "base/status.h"

#include <stdlib.h>
#include <string.h>

/* -- Whether two are the same -- */

static bool same_bytes(const char *a, size_t a_size, const char *b, size_t b_size) {
  return a_size == b_size && (a_size == 0 || memcmp(a, b, a_size) == 0);
}

static bool same_step(const attn_step *a, const attn_step *b) {
  const attn_pattern *p = &a->pattern, *q = &b->pattern;
  return a->kind == b->kind && p->kind == q->kind && p->class == q->class &&
         same_bytes(p->string, p->size, q->string, q->size) &&
         (a->kind != ATTN_STEP_SPLIT || a->behaviour == b->behaviour) && a->invert == b->invert &&
         a->compose == b->compose && a->compat == b->compat && a->left == b->left &&
         a->right == b->right && a->all_marks == b->all_marks &&
         a->unless_there == b->unless_there && a->only_first == b->only_first &&
         same_bytes(a->content, a->content_size, b->content, b->content_size);
}

static bool same_normalisers(const attn_tokenizer *a, const attn_tokenizer *b) {
  if (a->normaliser_count != b->normaliser_count) return false;
  for (int i = 0; i < a->normaliser_count; ++i)
    if (!same_step(&a->normalisers[i], &b->normalisers[i])) return false;
  return true;
}

bool attn_same_steps(const attn_tokenizer *a, const attn_tokenizer *b) {
  if (!same_normalisers(a, b) || a->split_count != b->split_count) return false;
  for (int i = 0; i < a->split_count; ++i)
    if (!same_step(&a->splits[i], &b->splits[i])) return false;
  return true;
}

static bool same_ids(const attn_tokens *a, const attn_tokens *b) {
  return a->count == b->count &&
         (a->count == 0 || memcmp(a->ids, b->ids, a->count * sizeof *a->ids) == 0);
}

static bool same_strings(const attn_tokenizer *a, const attn_tokenizer *b) {
  for (size_t id = 0; id < a->vocabulary.count; ++id) {
    size_t x = 0, y = 0;
    const char *s = attn_vocabulary_string(&a->vocabulary, (int64_t)id, &x);
    const char *t = attn_vocabulary_string(&b->vocabulary, (int64_t)id, &y);
    if (s && (!t || !same_bytes(s, x, t, y) || a->special[id] != b->special[id])) return false;
  }
  return true;
}

/* What each token, and each byte of it, decodes to. */
static bool same_bytes_of_tokens(const attn_tokenizer *a, const attn_tokenizer *b) {
  for (size_t id = 0; id < a->vocabulary.count; ++id) {
    size_t x = a->decoded_at[id], y = b->decoded_at[id];
    if (attn_vocabulary_string(&a->vocabulary, (int64_t)id, NULL) &&
        !same_bytes(a->decoded.data + x, a->decoded_at[id + 1] - x, b->decoded.data + y,
                    b->decoded_at[id + 1] - y))
      return false;
  }
  return a->decoder.strip == b->decoder.strip;
}

/* -- Merges in their order -- */

static int by_rank(const void *a, const void *b) {
  uint32_t x = ((const attn_merge *)a)->rank, y = ((const attn_merge *)b)->rank;
  return (x > y) - (x < y);
}

static attn_status sort_merges(const attn_merges *merges, attn_merge **sorted, int64_t *count) {
  size_t used = 0;
  for (size_t i = 0; i < merges->slots; ++i) used += merges->table[i].left >= 0;
  *count = 0;
  *sorted = attn_alloc_array(used + 1, sizeof **sorted);
  if (!*sorted) return ATTN_OUT_OF_MEMORY;
  for (size_t i = 0; i < merges->slots; ++i)
    if (merges->table[i].left >= 0) (*sorted)[(*count)++] = merges->table[i];
  qsort(*sorted, (size_t)*count, sizeof **sorted, by_rank);
  return ATTN_OK;
}

/* -- Tokens -- */

static int32_t type_of(const attn_tokenizer *tokenizer, int64_t id) {
  const attn_token_model *model = &tokenizer->model;
  if (model->byte_fallback)
    for (int byte = 0; byte < 256; ++byte)
      if (model->byte_ids[byte] == id) return ATTN_TOKEN_BYTE;
  if (attn_tokenizer_is_special(tokenizer, id))
    return (model->byte_fallback || model->kind == ATTN_UNIGRAM) && id == model->unknown
               ? ATTN_TOKEN_UNKNOWN
               : ATTN_TOKEN_CONTROL;
  return ATTN_TOKEN_NORMAL;
}

static attn_status mark_added(const attn_tokenizer *tokenizer, attn_tokenizer_arrays *arrays) {
  for (size_t i = 0; i < tokenizer->added_count; ++i) {
    const attn_added *added = &tokenizer->added[i];
    if (added->special) continue;
    size_t size = 0;
    const char *string = attn_vocabulary_string(&tokenizer->vocabulary, added->id, &size);
    bool plain = !added->left_strip && !added->right_strip && !added->single_word &&
                 !(added->normalized && tokenizer->normaliser_count);
    if (!plain)
      return attn_fail(ATTN_UNSUPPORTED,
                       "the added token \"%.*s\" is looked for in another way than GGUF can say",
                       size < 40 ? (int)size : 40, string);
    arrays->types[added->id] = ATTN_TOKEN_USER_DEFINED;
  }
  return ATTN_OK;
}

static attn_status allocate(attn_tokenizer_arrays *a, int64_t tokens, int64_t merges) {
  size_t count = (size_t)(tokens + merges);
  a->strings = attn_alloc_array(count, sizeof *a->strings);
  a->sizes = attn_alloc_array(count, sizeof *a->sizes);
  a->types = attn_alloc_array((size_t)tokens, sizeof *a->types);
  if (!a->strings || !a->sizes || !a->types) return ATTN_OUT_OF_MEMORY;
  a->spec.token_count = tokens;
  a->spec.merge_count = merges;
  a->spec.tokens = a->strings;
  a->spec.token_sizes = a->sizes;
  a->spec.types = a->types;
  a->spec.merges = a->strings + tokens;
  a->spec.merge_sizes = a->sizes + tokens;
  return ATTN_OK;
}

/* Strings made here are in `text`, which moves while it grows: offsets first. */
attn_status attn_arrays_set_tokens(const attn_tokenizer *tokenizer, attn_tokenizer_arrays *a) {
  for (int64_t id = 0; id < a->spec.token_count; ++id) {
    a->strings[id] = attn_tokenizer_string(tokenizer, id, &a->sizes[id]);
    a->types[id] = ATTN_TOKEN_UNUSED;
    if (a->strings[id]) {
      a->types[id] = type_of(tokenizer, id);
      continue;
    }
    size_t begin = a->text.length;
    attn_text_print(&a->text, "[PAD%lld]", (long long)id);
    a->sizes[id] = a->text.length - begin;
  }
  return mark_added(tokenizer, a);
}

static void set_merges(const attn_tokenizer *tokenizer, const attn_merge *sorted,
                       attn_tokenizer_arrays *a) {
  const attn_vocabulary *vocabulary = &tokenizer->vocabulary;
  for (int64_t i = 0; i < a->spec.merge_count; ++i) {
    size_t left, right;
    const char *l = attn_vocabulary_string(vocabulary, sorted[i].left, &left);
    const char *r = attn_vocabulary_string(vocabulary, sorted[i].right, &right);
    attn_text_add(&a->text, l, left);
    attn_text_add(&a->text, " ", 1);
    attn_text_add(&a->text, r, right);
    a->sizes[a->spec.token_count + i] = left + right + 1;
  }
}

/* Once the text has its place. */
attn_status attn_arrays_point(attn_tokenizer_arrays *a) {
  if (a->text.failed) return ATTN_OUT_OF_MEMORY;
  const char *at = a->text.data;
  for (int64_t i = 0; i < a->spec.token_count + a->spec.merge_count; ++i)
    if (!a->strings[i]) {
      a->strings[i] = at;
      at += a->sizes[i];
    }
  return ATTN_OK;
}

/* -- gpt2 -- */

attn_status attn_tokenizer_probe(attn_tokenizer **tokenizer) {
  *tokenizer = attn_alloc_zero(sizeof **tokenizer);
  return *tokenizer ? ATTN_OK : ATTN_OUT_OF_MEMORY;
}

static attn_status find_splitter(const attn_tokenizer *tokenizer, const char **name) {
  const attn_word_splitter *splitter;
  for (size_t i = 0; (splitter = attn_word_splitter_at(i)); ++i) {
    attn_tokenizer *probe;
    ATTN_TRY(attn_tokenizer_probe(&probe));
    attn_status status = attn_add_word_splitter(probe, splitter);
    bool same = status == ATTN_OK && attn_same_steps(tokenizer, probe) &&
                tokenizer->model.ignore_merges == splitter->whole_words;
    attn_tokenizer_destroy(probe);
    ATTN_TRY(status);
    *name = splitter->name;
    if (same) return ATTN_OK;
  }
  return attn_fail(ATTN_UNSUPPORTED,
                   "the tokenizer cuts text in a way that has no known name (tokenizer.ggml.pre)");
}

static attn_status describe_gpt2(const attn_tokenizer *tokenizer, const attn_merge *sorted,
                                 attn_tokenizer_arrays *a) {
  a->spec.model = "gpt2";
  ATTN_TRY(find_splitter(tokenizer, &a->spec.pre));
  ATTN_TRY(attn_arrays_set_tokens(tokenizer, a));
  set_merges(tokenizer, sorted, a);
  return attn_arrays_point(a);
}

/* -- llama -- */

static bool is_part(const attn_tokenizer *tokenizer, const char *string, size_t size) {
  int32_t id = attn_vocabulary_find_inside(&tokenizer->vocabulary, string, size);
  return id >= 0 && !tokenizer->special[id];
}

/* In how many ways a token is two others, which text may become. */
static int64_t count_splits(const attn_tokenizer *tokenizer, const char *string, size_t size) {
  int64_t count = 0;
  for (size_t i = 1; i < size; ++i)
    count += is_part(tokenizer, string, i) && is_part(tokenizer, string + i, size - i);
  return count;
}

static attn_status check_splits(const attn_tokenizer *tokenizer, const int32_t *ways,
                                const attn_tokenizer_arrays *a) {
  for (int64_t id = 0; id < a->spec.token_count; ++id) {
    bool special = a->types[id] == ATTN_TOKEN_CONTROL || a->types[id] == ATTN_TOKEN_UNKNOWN;
    if (!special && count_splits(tokenizer, a->strings[id], a->sizes[id]) != ways[id])
      return attn_fail(ATTN_UNSUPPORTED,
                       "token \"%.*s\" has merges for some of its parts only: scores, which GGUF "
                       "has instead, cannot say that",
                       a->sizes[id] < 40 ? (int)a->sizes[id] : 40, a->strings[id]);
  }
  return ATTN_OK;
}

/* Merges are grouped by what they result in, better groups first: that order is the scores'. */
static attn_status set_scores(const attn_merge *sorted, int64_t count, int32_t *ways,
                              attn_tokenizer_arrays *a) {
  float score = 0;
  for (int64_t i = 0; i < count; ++i) {
    int32_t result = sorted[i].result;
    if (i && result != sorted[i - 1].result && ways[result])
      return attn_fail(ATTN_UNSUPPORTED,
                       "the merges of token %d are apart: scores, which GGUF has instead, cannot "
                       "say that",
                       result);
    if (!ways[result]++) a->scores[result] = -(score += 1);
  }
  for (int64_t id = 0; id < a->spec.token_count; ++id)
    if (!ways[id] && a->types[id] == ATTN_TOKEN_NORMAL) a->scores[id] = -(score + 1);
  return ATTN_OK;
}

/* A step that nothing is left to do for: spaces have become U+2581 (Gemma's files have it). */
static bool is_idle(const attn_step *step) {
  const attn_pattern *pattern = &step->pattern;
  return step->kind == ATTN_STEP_SPLIT && !step->invert && pattern->kind == ATTN_PATTERN_STRING &&
         same_bytes(pattern->string, pattern->size, " ", 1);
}

/* Metaspace that puts nothing in front of a text is the replacement of spaces, only later. */
static bool is_late(const attn_tokenizer *tokenizer, const attn_tokenizer *probe) {
  return tokenizer->normaliser_count == 0 && tokenizer->split_count > 0 &&
         probe->normaliser_count == 1 && same_step(&tokenizer->splits[0], &probe->normalisers[0]);
}

static bool cuts_at_lines(const attn_step *step) {
  const attn_pattern *pattern = &step->pattern;
  return step->kind == ATTN_STEP_SPLIT && !step->invert && pattern->kind == ATTN_PATTERN_STRING &&
         step->behaviour == ATTN_SPLIT_MERGED_WITH_NEXT &&
         same_bytes(pattern->string, pattern->size, attn_lower_line, 3);
}

/* Cuts before each U+2581 change nothing where no token has one behind its beginning. */
static attn_status check_lines(const attn_tokenizer *tokenizer) {
  for (size_t id = 0; id < tokenizer->vocabulary.count; ++id) {
    size_t size = 0;
    const char *string = attn_vocabulary_string(&tokenizer->vocabulary, (int64_t)id, &size);
    if (string && size > 3 && !tokenizer->special[id] &&
        memmem(string + 1, size - 1, attn_lower_line, 3))
      return attn_fail(ATTN_UNSUPPORTED,
                       "the tokenizer (pre_tokenizer) cuts text within the token \"%.*s\": GGUF's "
                       "\"llama\" does not cut",
                       size < 40 ? (int)size : 40, string);
  }
  return ATTN_OK;
}

static bool has_step(const attn_step *steps, int count, attn_step_kind kind) {
  for (int i = 0; i < count; ++i)
    if (steps[i].kind == kind) return true;
  return false;
}

static attn_status find_prefix(const attn_tokenizer *tokenizer, bool *prefix) {
  int splits = tokenizer->split_count;
  bool cuts = splits == 2 && cuts_at_lines(&tokenizer->splits[1]);
  for (int i = 0; i < 2; ++i) {
    attn_tokenizer *probe;
    ATTN_TRY(attn_tokenizer_probe(&probe));
    attn_status status = attn_add_line_steps(probe, *prefix = !i);
    bool same = false, late = false;
    if (status == ATTN_OK) {
      same = same_normalisers(tokenizer, probe) &&
             (splits == 0 || (splits == 1 && is_idle(&tokenizer->splits[0])));
      late = is_late(tokenizer, probe) && (splits == 1 || cuts);
    }
    attn_tokenizer_destroy(probe);
    ATTN_TRY(status);
    if (same) return ATTN_OK;
    if (late) return cuts ? check_lines(tokenizer) : ATTN_OK;
  }
  if (has_step(tokenizer->splits, splits, ATTN_STEP_PREPEND))
    return attn_fail(ATTN_UNSUPPORTED,
                     "the tokenizer (pre_tokenizer Metaspace) writes a space before a text that "
                     "has none: GGUF's \"llama\" does so before every text");
  return attn_fail(ATTN_UNSUPPORTED,
                   "the tokenizer (normalizer, pre_tokenizer) writes spaces in another way than "
                   "GGUF's \"llama\" does");
}

static attn_status describe_llama(const attn_tokenizer *tokenizer, const attn_merge *sorted,
                                  int64_t merges, attn_tokenizer_arrays *a) {
  a->spec.model = "llama";
  for (int byte = 0; byte < 256; ++byte)
    if (tokenizer->model.byte_ids[byte] < 0)
      return attn_fail(ATTN_UNSUPPORTED,
                       "the tokenizer has no token <0x%02X>: GGUF's \"llama\" needs all bytes",
                       (unsigned)byte);
  ATTN_TRY(find_prefix(tokenizer, &a->spec.add_space_prefix));
  ATTN_TRY(attn_arrays_set_tokens(tokenizer, a));
  ATTN_TRY(attn_arrays_point(a));
  size_t count = (size_t)a->spec.token_count;
  a->spec.scores = a->scores = attn_alloc_array(count, sizeof *a->scores);
  int32_t *ways = attn_alloc_array(count, sizeof *ways);
  attn_status status = a->scores && ways ? ATTN_OK : ATTN_OUT_OF_MEMORY;
  if (status == ATTN_OK) status = set_scores(sorted, merges, ways, a);
  if (status == ATTN_OK) status = check_splits(tokenizer, ways, a);
  attn_free(ways);
  return status;
}

/* -- The whole -- */

static attn_status set_ends(const attn_tokenizer *tokenizer, attn_tokenizer_spec *spec) {
  if (tokenizer->prefix.count > 1 || tokenizer->suffix.count > 1)
    return attn_fail(ATTN_UNSUPPORTED, "the tokenizer puts several tokens around a text");
  spec->add_bos = tokenizer->prefix.count > 0;
  spec->add_eos = tokenizer->suffix.count > 0;
  if (spec->add_bos) spec->bos = tokenizer->prefix.ids[0];
  if (spec->add_eos) spec->eos = tokenizer->suffix.ids[0];
  spec->unknown = tokenizer->model.unknown;
  return ATTN_OK;
}

/* All but the steps, which each model looks at by itself. */
static attn_status check_same(const attn_tokenizer *tokenizer, const attn_tokenizer_spec *spec) {
  attn_tokenizer *made;
  ATTN_TRY(attn_tokenizer_create(spec, &made));
  const char *part = NULL;
  const attn_merges *merges = &tokenizer->model.merges;
  for (size_t i = 0; made->model.kind == ATTN_BPE && i < merges->slots; ++i) {
    const attn_merge *merge = &merges->table[i], *found;
    if (merge->left < 0) continue;
    found = attn_merges_find(&made->model.merges, merge->left, merge->right);
    if (!found || found->result != merge->result) part = "merges";
  }
  if (!same_bytes_of_tokens(tokenizer, made)) part = "decoder";
  if (!same_strings(tokenizer, made)) part = "tokens, or which of them are special,";
  if (!same_ids(&tokenizer->prefix, &made->prefix) || !same_ids(&tokenizer->suffix, &made->suffix))
    part = "ends of a text (post_processor)";
  attn_tokenizer_destroy(made);
  if (!part) return ATTN_OK;
  return attn_fail(ATTN_UNSUPPORTED, "the tokenizer's %s: GGUF's \"%s\" cannot say that", part,
                   spec->model);
}

static attn_status describe_bpe(const attn_tokenizer *tokenizer, int64_t count,
                                attn_tokenizer_arrays *a) {
  const attn_token_model *model = &tokenizer->model;
  bool by_scores = model->byte_fallback;
  attn_merge *sorted;
  int64_t merges;
  if (model->continuing_prefix || model->word_suffix)
    return attn_fail(ATTN_UNSUPPORTED, "the tokenizer marks the ends of words");
  ATTN_TRY(sort_merges(&model->merges, &sorted, &merges));
  attn_status status = allocate(a, count, by_scores ? 0 : merges);
  if (status == ATTN_OK)
    status = by_scores ? describe_llama(tokenizer, sorted, merges, a)
                       : describe_gpt2(tokenizer, sorted, a);
  attn_free(sorted);
  return status;
}

static attn_status describe(const attn_tokenizer *tokenizer, int64_t count,
                            attn_tokenizer_arrays *a) {
  if (count < (int64_t)tokenizer->vocabulary.count)
    return attn_fail(ATTN_UNSUPPORTED, "the tokenizer has %zu tokens, the model %lld",
                     tokenizer->vocabulary.count, (long long)count);
  ATTN_TRY(set_ends(tokenizer, &a->spec));
  switch (tokenizer->model.kind) {
  case ATTN_BPE: ATTN_TRY(describe_bpe(tokenizer, count, a)); break;
  case ATTN_WORDPIECE:
    ATTN_TRY(allocate(a, count, 0));
    ATTN_TRY(attn_describe_wordpiece(tokenizer, a));
    break;
  case ATTN_UNIGRAM:
    ATTN_TRY(allocate(a, count, 0));
    ATTN_TRY(attn_describe_unigram(tokenizer, a));
    break;
  default: return attn_fail(ATTN_UNSUPPORTED, "the tokenizer has scores instead of merges");
  }
  return check_same(tokenizer, &a->spec);
}

attn_status attn_tokenizer_describe(const attn_tokenizer *tokenizer, int64_t count,
                                    attn_tokenizer_arrays *arrays) {
  *arrays = (attn_tokenizer_arrays){.spec = ATTN_TOKENIZER_SPEC_INIT};
  attn_status status = describe(tokenizer, count, arrays);
  if (status != ATTN_OK) attn_tokenizer_arrays_free(arrays);
  return status;
}

void attn_tokenizer_arrays_free(attn_tokenizer_arrays *arrays) {
  attn_free(arrays->strings);
  attn_free(arrays->sizes);
  attn_free(arrays->types);
  attn_free(arrays->scores);
  attn_text_free(&arrays->text);
  *arrays = (attn_tokenizer_arrays){0};
}
