/* A Unigram tokenizer as GGUF's "t5" has it. */
#include "files/tokenizer/parts.h"
#include "base/memory.h"
#include "base/status.h"

#include <string.h>

/* The steps that a reader would make of `spec`, perhaps without the last, which cuts before each
 * U+2581. */
static attn_status compare_steps(const attn_tokenizer *tokenizer, const attn_tokenizer_spec *spec,
                                 bool without_last, bool *same) {
  attn_tokenizer *probe;
  ATTN_TRY(attn_tokenizer_probe(&probe));
  attn_status status = attn_add_unigram_steps(probe, spec);
  if (status == ATTN_OK && without_last) attn_step_free(&probe->splits[--probe->split_count]);
  *same = status == ATTN_OK && attn_same_steps(tokenizer, probe);
  attn_tokenizer_destroy(probe);
  return status;
}

/* Where the charsmap leaves no U+2581, words are whole without that cut too. */
static attn_status find_steps(const attn_tokenizer *tokenizer, attn_tokenizer_spec *spec) {
  const attn_step *first = tokenizer->normalisers;
  bool same = false, spaces = false;
  if (tokenizer->normaliser_count && first->kind == ATTN_STEP_CHARSMAP) {
    spec->charsmap = first->content;
    spec->charsmap_size = first->content_size;
    ATTN_TRY(attn_charsmap_leaves_spaces(first, &spaces));
  }
  for (int shape = 0; shape < 4; ++shape) {
    bool words = shape < 2, short_of_last = shape == 1;
    if (short_of_last && !spaces) continue;
    spec->remove_extra_spaces = words;
    spec->add_space_prefix = shape < 3;
    ATTN_TRY(compare_steps(tokenizer, spec, short_of_last, &same));
    if (same) return ATTN_OK;
  }
  if (spec->charsmap && tokenizer->normaliser_count > 1 &&
      first[tokenizer->normaliser_count - 1].kind != ATTN_STEP_REPLACE)
    return attn_fail(ATTN_UNSUPPORTED,
                     "the tokenizer's normalizer has more than a charsmap: GGUF's \"t5\" has not");
  if (!spec->charsmap && tokenizer->normaliser_count && first->kind != ATTN_STEP_PREPEND &&
      first->kind != ATTN_STEP_REPLACE)
    return attn_fail(ATTN_UNSUPPORTED,
                     "the tokenizer's normalizer is no charsmap (Precompiled): GGUF's \"t5\" has "
                     "nothing else");
  return attn_fail(ATTN_UNSUPPORTED,
                   "the tokenizer (normalizer, pre_tokenizer) writes spaces, or cuts at them, in "
                   "another way than GGUF's \"t5\" does");
}

/* float32, as GGUF has them; the unknown is below the lowest of normal tokens there. */
static attn_status set_scores(const attn_tokenizer *tokenizer, attn_tokenizer_arrays *a) {
  const attn_token_model *model = &tokenizer->model;
  const float unused = -10000; /* as llama.cpp's converter has it */
  double lowest = 1e300;
  size_t count = (size_t)a->spec.token_count;
  a->spec.scores = a->scores = attn_alloc_array(count, sizeof *a->scores);
  if (!a->scores) return ATTN_OUT_OF_MEMORY;
  for (size_t id = 0; id < count; ++id) {
    bool in_model = id < model->score_count;
    double score = in_model ? model->scores[id] : 0;
    a->scores[id] = a->types[id] == ATTN_TOKEN_UNUSED ? unused : (float)score;
    if (a->types[id] != ATTN_TOKEN_NORMAL) continue;
    if (!in_model || (double)a->scores[id] != score)
      return attn_fail(ATTN_UNSUPPORTED,
                       "the tokenizer's score of token %zu, %.17g, is no float32, which GGUF has",
                       id, score);
    if (score < lowest) lowest = score;
  }
  if (lowest - ATTN_UNKNOWN_PENALTY == model->unknown_score) return ATTN_OK;
  return attn_fail(ATTN_UNSUPPORTED,
                   "the tokenizer's lowest score is of a special token: GGUF's \"t5\" looks at "
                   "normal tokens only");
}

static attn_status check_added(const attn_tokenizer_arrays *a) {
  for (int64_t id = 0; id < a->spec.token_count; ++id)
    if (a->types[id] == ATTN_TOKEN_USER_DEFINED &&
        memmem(a->strings[id], a->sizes[id], attn_lower_line, 3))
      return attn_fail(ATTN_UNSUPPORTED,
                       "the added token \"%.*s\" has a U+2581, which GGUF's \"t5\" takes for a "
                       "space",
                       a->sizes[id] < 40 ? (int)a->sizes[id] : 40, a->strings[id]);
  return ATTN_OK;
}

attn_status attn_describe_unigram(const attn_tokenizer *tokenizer, attn_tokenizer_arrays *a) {
  const attn_token_model *model = &tokenizer->model;
  a->spec.model = "t5";
  for (int byte = 0; model->byte_fallback && byte < 256; ++byte)
    if (model->byte_ids[byte] >= 0)
      return attn_fail(ATTN_UNSUPPORTED,
                       "the tokenizer (Unigram) falls back to bytes: GGUF's \"t5\" does not");
  if (model->unknown < 0)
    return attn_fail(ATTN_UNSUPPORTED, "the tokenizer (Unigram) has no unknown token");
  ATTN_TRY(find_steps(tokenizer, &a->spec));
  ATTN_TRY(attn_arrays_set_tokens(tokenizer, a));
  ATTN_TRY(attn_arrays_point(a));
  ATTN_TRY(check_added(a));
  return set_scores(tokenizer, a);
}
