/* WordPiece as BERT uses it (arXiv 1810.04805): from the left, the longest token that the rest of
 * the word begins with; inside a word tokens carry a prefix ("##"). A word that cannot be covered
 * is unknown as a whole. */
#include "files/tokenizer/parts.h"
#include "base/status.h"

static int64_t count_characters(const char *text, size_t size) {
  int64_t count = 0;
  for (size_t i = 0; i < size; ++i) count += ((unsigned char)text[i] & 0xc0) != 0x80;
  return count;
}

/* The token that covers most of text[at..size), -1 if none; *end is behind it. */
static int32_t longest_token(const attn_token_model *model, const attn_vocabulary *vocabulary,
                             attn_text *candidate, const char *text, size_t size, size_t at,
                             size_t *end) {
  for (*end = size; *end > at; --*end) {
    if (*end < size && ((unsigned char)text[*end] & 0xc0) == 0x80) continue; /* in a character */
    candidate->length = 0;
    if (at) attn_text_add(candidate, model->continuing_prefix, model->continuing_size);
    attn_text_add(candidate, text + at, *end - at);
    if (candidate->failed) return -1;
    int32_t id = attn_vocabulary_find_inside(vocabulary, candidate->data, candidate->length);
    if (id >= 0) return id;
  }
  return -1;
}

attn_status attn_wordpiece_encode(const attn_token_model *model, const attn_vocabulary *vocabulary,
                                  attn_scratch *scratch, const char *text, size_t size,
                                  attn_tokens *tokens) {
  size_t count = tokens->count;
  bool known = count_characters(text, size) <= model->longest_word;
  for (size_t at = 0, end; known && at < size; at = end) {
    int32_t id = longest_token(model, vocabulary, &scratch->text, text, size, at, &end);
    if (scratch->text.failed) return ATTN_OUT_OF_MEMORY;
    known = id >= 0;
    if (known) ATTN_TRY(attn_tokens_add(tokens, id));
  }
  if (known) return ATTN_OK;
  tokens->count = count;
  return attn_tokens_add(tokens, model->unknown);
}
