/* A WordPiece tokenizer as GGUF's "bert" has it: words begin with U+2581, continuations have no
 * prefix, special tokens are as they are. */
#include "files/tokenizer/parts.h"
#include "base/status.h"

#include <string.h>

static const char prefix[] = "##";

static attn_status find_steps(const attn_tokenizer *tokenizer, attn_tokenizer_spec *spec) {
  for (int i = 0; i < 4; ++i) {
    attn_tokenizer *probe;
    ATTN_TRY(attn_tokenizer_probe(&probe));
    spec->lower_case = !(i & 1);
    spec->strip_accents = !(i & 2);
    attn_status status =
        attn_bert_normalisers(probe, true, true, spec->strip_accents, spec->lower_case);
    if (status == ATTN_OK) status = attn_bert_splits(probe);
    bool same = status == ATTN_OK && attn_same_steps(tokenizer, probe);
    attn_tokenizer_destroy(probe);
    ATTN_TRY(status);
    if (same) return ATTN_OK;
  }
  return attn_fail(ATTN_UNSUPPORTED,
                   "the tokenizer's normalizer or pre_tokenizer is not BERT's (with clean_text and "
                   "handle_chinese_chars), as GGUF's \"bert\" has it");
}

static attn_status check(const attn_tokenizer *tokenizer) {
  enum { LONGEST_WORD = 100 };
  const attn_token_model *model = &tokenizer->model;
  if (model->continuing_size != 2 || memcmp(model->continuing_prefix, prefix, 2) != 0)
    return attn_fail(ATTN_UNSUPPORTED, "the tokenizer's continuing_subword_prefix is not \"##\"");
  if (model->longest_word != LONGEST_WORD)
    return attn_fail(ATTN_UNSUPPORTED,
                     "the tokenizer's max_input_chars_per_word is %lld, not BERT's 100",
                     (long long)model->longest_word);
  if (!tokenizer->prefix.count || !tokenizer->suffix.count)
    return attn_fail(ATTN_UNSUPPORTED, "the tokenizer (post_processor) does not put a token on "
                                       "both sides of a text, as GGUF's \"bert\" does");
  for (size_t i = 0; i < tokenizer->added_count; ++i)
    if (!tokenizer->added[i].special)
      return attn_fail(ATTN_UNSUPPORTED,
                       "the tokenizer has added tokens that are not special: GGUF's \"bert\" takes "
                       "them for words");
  return ATTN_OK;
}

attn_status attn_describe_wordpiece(const attn_tokenizer *tokenizer, attn_tokenizer_arrays *a) {
  a->spec.model = "bert";
  ATTN_TRY(check(tokenizer));
  ATTN_TRY(find_steps(tokenizer, &a->spec));
  ATTN_TRY(attn_arrays_set_tokens(tokenizer, a));
  a->text.length = 0; /* with words in it, it is another */
  for (int64_t id = 0; id < a->spec.token_count; ++id) {
    size_t size = 0, begin = a->text.length;
    const char *string = attn_tokenizer_string(tokenizer, id, &size);
    if (string && a->types[id] == ATTN_TOKEN_CONTROL) continue;
    if (string && size > 2 && memcmp(string, prefix, 2) == 0) {
      a->strings[id] += 2;
      a->sizes[id] -= 2;
      continue;
    }
    a->strings[id] = NULL;
    if (string) {
      attn_text_add(&a->text, attn_lower_line, 3);
      attn_text_add(&a->text, string, size);
    } else {
      attn_text_print(&a->text, "[PAD%lld]", (long long)id);
    }
    a->sizes[id] = a->text.length - begin;
  }
  return attn_arrays_point(a);
}
