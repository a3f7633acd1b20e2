/* Byte corpora: files, mapped and read as one long text, split into a training and a validation
 * part.
 *
 * The validation part is the end of the text: one contiguous region, so that no window of training
 * overlaps one of validation. Tokens are bytes, 0 to 255, unless attn_corpus_encode has made them a
 * tokenizer's. */
#ifndef ATTN_FILES_CORPUS_H
#define ATTN_FILES_CORPUS_H

#include "files/tokenizer.h"

typedef enum attn_corpus_part { ATTN_TRAINING = 0, ATTN_VALIDATION } attn_corpus_part;

typedef struct attn_corpus attn_corpus;

/* `paths`: files and directories (all files below, in the order of their names, hidden ones left
 * out). The last `validation_fraction` (0 <= f < 1) of all bytes is the validation part. */
attn_status attn_corpus_open(const char *const *paths, int count, double validation_fraction,
                             attn_corpus **corpus);
void attn_corpus_close(attn_corpus *corpus); /* NULL is fine */

/* Makes tokens of the text, in memory: each part, and each file in it, by itself, some lines at a
 * time. Sizes and places are tokens from then on. Once; after an error the corpus can only be
 * closed. */
attn_status attn_corpus_encode(attn_corpus *corpus, const attn_tokenizer *tokenizer);

int64_t attn_corpus_files(const attn_corpus *corpus);
int64_t attn_corpus_size(const attn_corpus *corpus, attn_corpus_part part); /* tokens */
int64_t attn_corpus_bytes(const attn_corpus *corpus, attn_corpus_part part);

/* A hash of the text's bytes and of where it is split; of a text above 64 MiB, of its size and a
 * thousand samples. */
uint64_t attn_corpus_fingerprint(const attn_corpus *corpus);

/* `batch` windows of length + 1 tokens (inputs and, shifted by one, targets) at uniform random
 * places. They depend on (seed, part, step) alone, so that a resumed run sees the same data; batch
 * row r is the same in any larger batch. tokens: [batch, length + 1]. ATTN_INVALID_ARGUMENT when
 * the part has fewer than length + 1 tokens. */
attn_status attn_corpus_batch(const attn_corpus *corpus, attn_corpus_part part, uint64_t seed,
                              uint64_t step, int64_t batch, int64_t length, int32_t *tokens);

/* `length` consecutive tokens of a part from `start`, for evaluation. tokens: [length]. */
attn_status attn_corpus_read(const attn_corpus *corpus, attn_corpus_part part, int64_t start,
                             int64_t length, int32_t *tokens);

#endif
