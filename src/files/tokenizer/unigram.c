/* The unigram model (arXiv 1804.10959): of all ways to cut the text into tokens, the one with the
 * largest sum of scores (logarithms of probabilities), by Viterbi's algorithm. A character that is
 * no token costs more than any token; runs of them become one unknown token. */
#include "files/tokenizer/parts.h"
#include "base/status.h"

#include <string.h>

/* The best way to text[0..i): its score, and the last token, which begins at `begin`. `next` is the
 * end of the token that begins at i, where the best way to the whole passes i. */
typedef struct node {
  double score;
  size_t begin, next;
  int32_t id; /* -1: unknown */
  bool reached;
} node;

static void offer(node *node, double score, size_t begin, int32_t id) {
  if (node->reached && score <= node->score) return;
  node->score = score;
  node->begin = begin;
  node->id = id;
  node->reached = true;
}

static attn_status find_paths(const attn_token_model *model, node *nodes, const char *text,
                              size_t size) {
  int32_t code;
  for (size_t at = 0, bytes; at < size; at += bytes) {
    bytes = (size_t)attn_utf8_next(text + at, size - at, &code);
    if (!bytes) return attn_fail(ATTN_INTERNAL, "a piece is not UTF-8");
    bool alone = false;
    int32_t id;
    attn_prefix_walk walk = {0};
    for (size_t end = at; end < size;) {
      if (!attn_prefixes_step(&model->prefixes, &walk, (unsigned char)text[end++], &id)) break;
      if (id < 0) continue;
      offer(&nodes[end], nodes[at].score + model->scores[id], at, id);
      alone |= end == at + bytes;
    }
    if (!alone) offer(&nodes[at + bytes], nodes[at].score + model->unknown_score, at, -1);
  }
  return ATTN_OK;
}

static attn_status emit(const attn_token_model *model, const attn_vocabulary *vocabulary,
                        const char *text, size_t size, int32_t id, attn_tokens *tokens) {
  if (id < 0) id = attn_vocabulary_find_inside(vocabulary, text, size); /* fused, perhaps a token */
  bool bytes = id < 0 && model->byte_fallback;
  for (size_t i = 0; bytes && i < size; ++i) bytes = model->byte_ids[(unsigned char)text[i]] >= 0;
  for (size_t i = 0; bytes && i < size; ++i)
    ATTN_TRY(attn_tokens_add(tokens, model->byte_ids[(unsigned char)text[i]]));
  if (bytes) return ATTN_OK;
  if (id < 0) id = model->unknown;
  return id < 0 ? ATTN_OK : attn_tokens_add(tokens, id);
}

attn_status attn_unigram_encode(const attn_token_model *model, const attn_vocabulary *vocabulary,
                                attn_scratch *scratch, const char *text, size_t size,
                                attn_tokens *tokens) {
  ATTN_TRY(attn_reserve(&scratch->symbols, &scratch->symbol_capacity, size + 1, sizeof(node)));
  node *nodes = scratch->symbols;
  memset(nodes, 0, (size + 1) * sizeof *nodes);
  ATTN_TRY(find_paths(model, nodes, text, size));
  /* The path is known from its end: turn it round, and let neighbours that are unknown fuse. */
  size_t end = size;
  while (end > 0) {
    size_t begin = nodes[end].begin;
    while (nodes[end].id < 0 && begin > 0 && nodes[begin].id < 0) begin = nodes[begin].begin;
    nodes[begin].next = end;
    end = begin;
  }
  for (size_t at = 0; at < size; at = end) {
    end = nodes[at].next;
    ATTN_TRY(emit(model, vocabulary, text + at, end - at, nodes[end].id, tokens));
  }
  return ATTN_OK;
}
