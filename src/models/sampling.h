/* Choosing a token; the options and their order are described in attn/sampling.h. */
#ifndef ATTN_MODELS_SAMPLING_H
#define ATTN_MODELS_SAMPLING_H

#include "attn/sampling.h"

/* Bytes that attn_sample needs, aligned to 8 bytes. */
size_t attn_sample_workspace(int64_t vocabulary);

/* One token from logits [vocabulary]. Equal logits rank by the lower id. The random number is a
 * function of (seed, position), so that a run repeated, resumed or rewound draws the same tokens.
 *
 * A NaN counts as -infinity; +infinity as the largest float; ATTN_INVALID_ARGUMENT when no token
 * is left, or a token of `history` [history_length] is not in the vocabulary. Allocates nothing. */
attn_status attn_sample(const attn_sampling *sampling, const float *logits, int64_t vocabulary,
                        const int32_t *history, int64_t history_length, uint64_t position,
                        void *workspace, int32_t *token);

#endif
