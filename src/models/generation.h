/* How a model's makers advise to sample from it: generation_config.json, or general.sampling.* of a
 * GGUF file, which become the same. */
#ifndef ATTN_MODELS_GENERATION_H
#define ATTN_MODELS_GENERATION_H

#include "attn/sampling.h"
#include "files/gguf_write.h"

#include <jansson.h>

typedef enum attn_advice {
  ATTN_ADVISES_TEMPERATURE = 1,
  ATTN_ADVISES_TOP_K = 2,
  ATTN_ADVISES_TOP_P = 4,
  ATTN_ADVISES_MIN_P = 8,
  ATTN_ADVISES_PENALTY = 16
} attn_advice;

typedef struct attn_generation {
  unsigned advises; /* of attn_advice: which fields of `sampling` count */
  attn_sampling sampling;
  int64_t max_new_tokens; /* 0: not said */
} attn_generation;

/* `json` may be NULL. do_sample false is temperature 0. ATTN_BAD_FORMAT names the key. */
attn_status attn_generation_read(const json_t *json, attn_generation *generation);
/* Puts what is advised in place of what `sampling` has. */
void attn_generation_apply(const attn_generation *generation, attn_sampling *sampling);

/* From and to GGUF. *json stays NULL when the file says nothing. */
attn_status attn_generation_from_gguf(const attn_gguf *file, json_t **json);
void attn_generation_to_gguf(const attn_generation *generation, attn_gguf_draft *draft);

#endif
