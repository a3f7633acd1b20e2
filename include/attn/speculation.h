/* Speculative decoding (Leviathan et al., arXiv 2211.17192): several tokens are proposed and read
 * at once, and those that the model would have chosen itself are kept.
 *
 * Tokens are the same that plain decoding chooses, sampled ones too: attn_session_sample draws by
 * seed and position, so each proposed token is compared with the one that would have been drawn.
 * What is
 * read at once, 8 tokens at most, gives the same bits as read one by one. */
#ifndef ATTN_SPECULATION_H
#define ATTN_SPECULATION_H

#include "attn/model.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct attn_speculation {
  size_t struct_size;
  int64_t tokens;          /* proposed at once, 1 to 7 */
  const attn_model *draft; /* a smaller model of the same vocabulary; NULL: prompt look-up */
  /* Prompt look-up: what followed the latest earlier occurrence of the last `longest` tokens, or of
   * fewer, down to `shortest`. */
  int64_t longest, shortest;
} attn_speculation;

#define ATTN_SPECULATION_INIT                                                                      \
  { .struct_size = sizeof(attn_speculation), .tokens = 7, .longest = 4, .shortest = 2 }

typedef struct attn_speculator attn_speculator;

/* For one session, which must outlive it; `options` may be NULL. ATTN_INVALID_ARGUMENT names the
 * field; ATTN_UNSUPPORTED for a draft of another vocabulary. */
ATTN_API attn_status attn_speculator_create(attn_session *session, const attn_speculation *options,
                                            attn_speculator **speculator);
ATTN_API void attn_speculator_destroy(attn_speculator *speculator);

/* Chooses 1 to `capacity` tokens and feeds them: the session, which has logits, stands behind the
 * last and has its logits. Fewer than could be kept when a token ends the text
 * (attn_model_is_end): that one is then the last. */
ATTN_API attn_status attn_speculator_step(attn_speculator *speculator,
                                          const attn_sampling *sampling, int64_t capacity,
                                          int32_t *tokens, int64_t *count);

typedef struct attn_speculation_stats {
  int64_t steps, proposed, accepted, tokens;
} attn_speculation_stats;
ATTN_API attn_speculation_stats attn_speculator_get_stats(const attn_speculator *speculator);

#ifdef __cplusplus
}
#endif
#endif
