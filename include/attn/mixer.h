/* The mixers: every attention mechanism of the library, as one table. */
#ifndef ATTN_MIXER_H
#define ATTN_MIXER_H

#include "attn/base.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum attn_ability {
  ATTN_ABILITY_CAUSAL = 1,
  ATTN_ABILITY_BIDIRECTIONAL = 2,
  ATTN_ABILITY_CROSS = 4,
  ATTN_ABILITY_DECODE = 8,     /* continues from a state, token by token */
  ATTN_ABILITY_RAGGED = 16,    /* packed sequences of different lengths */
  ATTN_ABILITY_TRAINABLE = 32, /* has a backward */
} attn_ability;

typedef struct attn_mixer_info {
  const char *name;    /* in configurations, e.g. "lightning" */
  const char *title;   /* of the paper */
  const char *arxiv;   /* its identifier, e.g. "2405.17381" */
  unsigned abilities;  /* attn_ability, or-ed */
  const char *summary; /* one line */
} attn_mixer_info;

ATTN_API int attn_mixer_count(void);
/* index from 0; ATTN_INVALID_ARGUMENT beyond the table. */
ATTN_API attn_status attn_mixer_get_info(int index, attn_mixer_info *info);
/* ATTN_NOT_FOUND, with the known names in the message. */
ATTN_API attn_status attn_mixer_find(const char *name, int *index);

/* Bytes of decode state of one layer of this shape (0 takes the mixer's default): what it always
 * needs, and what each token adds. `bytes` is that of an element of the cache: 2 for bfloat16. */
ATTN_API attn_status attn_mixer_state_bytes(int index, int64_t hidden, int64_t heads, int64_t dim,
                                            int64_t bytes, int64_t *fixed, int64_t *per_token);

#ifdef __cplusplus
}
#endif
#endif
