/* Byte-pair encoding (arXiv 1508.07909): of all neighbours that may merge, the pair of the lowest
 * rank, the leftmost of equals, becomes one symbol, until none may. Symbols are a linked list and
 * the pairs wait in a heap, so that a piece of n symbols takes O(n log n). */
#include "files/tokenizer/parts.h"
#include "base/memory.h"
#include "base/status.h"

#include <stdio.h>
#include <string.h>

typedef struct symbol {
  size_t begin;
  uint32_t size; /* bytes of text; 0: it has become part of its left neighbour */
  int32_t id;    /* -1: no token (scores only) */
  int32_t previous, next;
} symbol;

/* A pair that could merge when it was pushed; it still can if both sizes are the same. */
typedef struct candidate {
  uint32_t rank;
  int32_t left, result;
  uint32_t left_size, right_size;
} candidate;

typedef struct word {
  const attn_token_model *model;
  const attn_vocabulary *vocabulary;
  attn_scratch *scratch;
  const char *text;
  int32_t count;
} word;

void attn_scratch_free(attn_scratch *scratch) {
  attn_free(scratch->symbols);
  attn_free(scratch->heap);
  attn_text_free(&scratch->text);
  *scratch = (attn_scratch){0};
}

attn_status attn_tokens_add(attn_tokens *tokens, int32_t id) {
  ATTN_TRY(attn_reserve((void **)&tokens->ids, &tokens->capacity, tokens->count + 1,
                        sizeof *tokens->ids));
  tokens->ids[tokens->count++] = id;
  return ATTN_OK;
}

/* -- The heap -- */

static bool before(const candidate *a, const candidate *b) {
  return a->rank != b->rank ? a->rank < b->rank : a->left < b->left;
}

static attn_status push(attn_scratch *scratch, candidate item) {
  ATTN_TRY(attn_reserve(&scratch->heap, &scratch->heap_capacity, scratch->heap_count + 1,
                        sizeof(candidate)));
  candidate *heap = scratch->heap;
  size_t at = scratch->heap_count++;
  for (; at > 0 && before(&item, &heap[(at - 1) / 2]); at = (at - 1) / 2)
    heap[at] = heap[(at - 1) / 2];
  heap[at] = item;
  return ATTN_OK;
}

static candidate pop(attn_scratch *scratch) {
  candidate *heap = scratch->heap, top = heap[0], item = heap[--scratch->heap_count];
  size_t at = 0, count = scratch->heap_count;
  for (size_t child; (child = 2 * at + 1) < count; at = child) {
    if (child + 1 < count && before(&heap[child + 1], &heap[child])) ++child;
    if (!before(&heap[child], &item)) break;
    heap[at] = heap[child];
  }
  if (count) heap[at] = item;
  return top;
}

/* -- Merging -- */

static bool find_merge(const word *word, const symbol *left, const symbol *right, uint32_t *rank,
                       int32_t *result) {
  const attn_token_model *model = word->model;
  if (model->kind == ATTN_BPE_SCORES) {
    *result = attn_vocabulary_find_inside(word->vocabulary, word->text + left->begin,
                                          (size_t)left->size + right->size);
    if (*result >= 0) *rank = model->ranks[*result];
    return *result >= 0;
  }
  const attn_merge *merge = attn_merges_find(&model->merges, left->id, right->id);
  if (!merge) return false;
  *rank = merge->rank;
  *result = merge->result;
  return true;
}

static attn_status push_pair(const word *word, int32_t left) {
  const symbol *symbols = word->scratch->symbols;
  if (left < 0 || symbols[left].next < 0) return ATTN_OK;
  const symbol *a = &symbols[left], *b = &symbols[a->next];
  candidate item = {.left = left, .left_size = a->size, .right_size = b->size};
  if (!find_merge(word, a, b, &item.rank, &item.result)) return ATTN_OK;
  return push(word->scratch, item);
}

static attn_status merge_all(const word *word) {
  symbol *symbols = word->scratch->symbols;
  word->scratch->heap_count = 0;
  for (int32_t i = 0; i + 1 < word->count; ++i) ATTN_TRY(push_pair(word, i));
  while (word->scratch->heap_count) {
    candidate best = pop(word->scratch);
    symbol *left = &symbols[best.left];
    if (left->size != best.left_size || left->next < 0) continue;
    symbol *right = &symbols[left->next];
    if (right->size != best.right_size) continue;
    left->id = best.result;
    left->size += right->size;
    left->next = right->next;
    right->size = 0;
    if (left->next >= 0) symbols[left->next].previous = best.left;
    ATTN_TRY(push_pair(word, left->previous));
    ATTN_TRY(push_pair(word, best.left));
  }
  return ATTN_OK;
}

/* -- The symbols to begin with -- */

static attn_status add_symbol(word *word, int32_t id, size_t begin, size_t size) {
  attn_scratch *scratch = word->scratch;
  ATTN_TRY(attn_reserve(&scratch->symbols, &scratch->symbol_capacity, (size_t)word->count + 1,
                        sizeof(symbol)));
  symbol *symbols = scratch->symbols;
  int32_t at = word->count++;
  symbols[at] = (symbol){begin, (uint32_t)size, id, at - 1, -1};
  if (at) symbols[at - 1].next = at;
  return ATTN_OK;
}

/* The token of a character, which carries a mark inside a word or at its end in some models. */
static int32_t find_character(word *word, size_t begin, size_t bytes, size_t size) {
  const attn_token_model *model = word->model;
  const char *character = word->text + begin;
  bool inside = begin > 0 && model->continuing_prefix;
  bool last = begin + bytes == size && model->word_suffix;
  if (!inside && !last) return attn_vocabulary_find_inside(word->vocabulary, character, bytes);
  attn_text *text = &word->scratch->text;
  text->length = 0;
  if (inside) attn_text_add(text, model->continuing_prefix, model->continuing_size);
  attn_text_add(text, character, bytes);
  if (last) attn_text_add(text, model->word_suffix, model->suffix_size);
  return text->failed ? -1
                      : attn_vocabulary_find_inside(word->vocabulary, text->data, text->length);
}

static bool has_bytes(const attn_token_model *model, const char *text, size_t size) {
  for (size_t i = 0; i < size; ++i)
    if (model->byte_ids[(unsigned char)text[i]] < 0) return false;
  return model->byte_fallback;
}

/* Unknown characters wait (`unknown` bytes from `unknown_begin`) for more of them to fuse with. */
static attn_status split_characters(word *word, size_t size) {
  const attn_token_model *model = word->model;
  size_t unknown = 0, unknown_begin = 0;
  int32_t code;
  for (size_t at = 0, bytes; at < size; at += bytes) {
    bytes = (size_t)attn_utf8_next(word->text + at, size - at, &code);
    if (!bytes) return attn_fail(ATTN_INTERNAL, "a piece is not UTF-8");
    int32_t id = find_character(word, at, bytes, size);
    if (id < 0 && model->kind == ATTN_BPE_SCORES) { /* may merge yet */
      ATTN_TRY(add_symbol(word, -1, at, bytes));
    } else if (id >= 0) {
      if (unknown) ATTN_TRY(add_symbol(word, model->unknown, unknown_begin, unknown));
      unknown = 0;
      ATTN_TRY(add_symbol(word, id, at, bytes));
    } else if (has_bytes(model, word->text + at, bytes)) {
      for (size_t i = 0; i < bytes; ++i)
        ATTN_TRY(add_symbol(word, model->byte_ids[(unsigned char)word->text[at + i]], at + i, 1));
    } else if (model->unknown >= 0) {
      if (unknown && !model->fuse_unknown) {
        ATTN_TRY(add_symbol(word, model->unknown, unknown_begin, unknown));
        unknown = 0;
      }
      if (!unknown) unknown_begin = at;
      unknown += bytes;
    }
  }
  return unknown ? add_symbol(word, model->unknown, unknown_begin, unknown) : ATTN_OK;
}

static attn_status emit(const word *word, const symbol *symbol, attn_tokens *tokens) {
  const attn_token_model *model = word->model;
  if (symbol->id >= 0) return attn_tokens_add(tokens, symbol->id);
  if (!has_bytes(model, word->text + symbol->begin, symbol->size))
    return model->unknown >= 0 ? attn_tokens_add(tokens, model->unknown) : ATTN_OK;
  for (uint32_t i = 0; i < symbol->size; ++i)
    ATTN_TRY(
        attn_tokens_add(tokens, model->byte_ids[(unsigned char)word->text[symbol->begin + i]]));
  return ATTN_OK;
}

attn_status attn_bpe_encode(const attn_token_model *model, const attn_vocabulary *vocabulary,
                            attn_scratch *scratch, const char *text, size_t size,
                            attn_tokens *tokens) {
  word word = {model, vocabulary, scratch, text, 0};
  if (model->ignore_merges) {
    int32_t id = attn_vocabulary_find_inside(vocabulary, text, size);
    if (id >= 0) return attn_tokens_add(tokens, id);
  }
  ATTN_TRY(split_characters(&word, size));
  if (scratch->text.failed) return ATTN_OUT_OF_MEMORY;
  ATTN_TRY(merge_all(&word));
  const symbol *symbols = scratch->symbols;
  for (int32_t i = word.count ? 0 : -1; i >= 0; i = symbols[i].next)
    ATTN_TRY(emit(&word, &symbols[i], tokens));
  return ATTN_OK;
}
