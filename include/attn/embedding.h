/* Embeddings: one vector for a whole text, from any model.
 *
 * A model gives a row for each token: an encoder (BERT and its kin) its last one, a decoder the
 * normalised one that its logits are computed from. Pooling makes one row of them, which may be
 * normalised to length 1. As Sentence-BERT (arXiv 1908.10084) and the package sentence-transformers
 * have it: its files beside a model say which pooling, whether to normalise and how many tokens a
 * text may have. */
#ifndef ATTN_EMBEDDING_H
#define ATTN_EMBEDDING_H

#include "attn/model.h"

#ifdef __cplusplus
extern "C" {
#endif

/* How the rows h_1 ... h_n of a text become one. */
typedef enum attn_pooling {
  ATTN_POOLING_DEFAULT = 0, /* what the model's files say; the mean where they say nothing */
  ATTN_POOLING_MEAN,
  ATTN_POOLING_CLS,           /* h_1: of [CLS], or whatever comes first */
  ATTN_POOLING_LAST,          /* h_n */
  ATTN_POOLING_MAX,           /* of each number for itself */
  ATTN_POOLING_MEAN_SQRT,     /* sum h_i / sqrt(n) */
  ATTN_POOLING_WEIGHTED_MEAN, /* sum i h_i / sum i (arXiv 2202.08904) */
  ATTN_POOLINGS
} attn_pooling;

/* "mean", "cls", "last", "max", "mean-sqrt", "weighted-mean"; NULL for other numbers. */
ATTN_API const char *attn_pooling_name(attn_pooling pooling);

typedef struct attn_embedding_options {
  size_t struct_size;
  attn_pooling pooling;
  int normalize;        /* to length 1: 1 yes, 0 no, -1 as the model's files say (else no) */
  int64_t batch_tokens; /* texts are computed together up to so many tokens, which sets the memory
                         * (a longer text goes alone); 0: some hundred a thread */
} attn_embedding_options;

#define ATTN_EMBEDDING_OPTIONS_INIT                                                                \
  { .struct_size = sizeof(attn_embedding_options), .normalize = -1 }

typedef struct attn_embedding_info {
  int64_t size;         /* numbers of an embedding */
  int64_t most_tokens;  /* of a text, [CLS] and [SEP] counted; 0: no limit */
  attn_pooling pooling; /* the default; never ATTN_POOLING_DEFAULT */
  bool normalize;
} attn_embedding_info;
ATTN_API attn_status attn_model_get_embedding_info(const attn_model *model,
                                                   attn_embedding_info *info);
/* Numbers of an embedding: the model's width. */
ATTN_API int64_t attn_model_embedding_size(const attn_model *model);

/* The tokens of a text as sentence-transformers embeds it: as attn_model_encode with
 * ATTN_ENCODE_ENDS and ATTN_ENCODE_SPECIAL (a "[MASK]" in the text is that token), but cut at the
 * model's most_tokens, of which the tokens that end a text ([SEP]) still are the last. *cut, which
 * may be NULL, tells whether something was left out. */
ATTN_API attn_status attn_model_encode_for_embedding(const attn_model *model, const char *text,
                                                     size_t size, int32_t *tokens, int64_t capacity,
                                                     int64_t *count, bool *cut);

/* The embeddings [count, attn_model_embedding_size] float32 of `count` texts: text i is tokens
 * [offsets[i], offsets[i + 1]), at least one. Texts are packed, not padded, and the result of each
 * does not depend on the others beyond rounding. `options` may be NULL. Threads may call this with
 * the same model at once.
 *
 * ATTN_INVALID_ARGUMENT: a text has no tokens, a token is not in the vocabulary, or an encoder has
 * no positions for so long a text. ATTN_UNSUPPORTED: the model's files ask for something that
 * libattn lacks (a dense layer behind the pooling, several poolings in a row). */
ATTN_API attn_status attn_model_embed(const attn_model *model, const int32_t *tokens,
                                      const int64_t *offsets, int64_t count,
                                      const attn_embedding_options *options, float *embeddings);

#ifdef __cplusplus
}
#endif
#endif
