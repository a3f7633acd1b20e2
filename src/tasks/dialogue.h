/* Dialogues that need a memory: a fact is told in each turn, and one that was told some turns
 * before is asked for. What one turn says is never enough to answer it.
 *
 *   turn t:  [bos] [query] key_t value_t key_{t - d} [answer] value_{t - d} [eos]
 *
 * All keys of a dialogue differ; values are drawn freely, and so is the distance d, from 1 to
 * `farthest` or the dialogue's beginning; the first turn asks for its own fact (d = 0). Not one of
 * the tasks of task.h, whose examples are one sequence each. */
#ifndef ATTN_TASKS_DIALOGUE_H
#define ATTN_TASKS_DIALOGUE_H

#include "attn/base.h"

enum {
  ATTN_DIALOGUE_BOS = 0,
  ATTN_DIALOGUE_QUERY,
  ATTN_DIALOGUE_ANSWER,
  ATTN_DIALOGUE_EOS,
  ATTN_DIALOGUE_MARKS,      /* then the keys, then the values */
  ATTN_DIALOGUE_ASKED = 5,  /* the answer token's place in its turn: what follows it is asked */
  ATTN_DIALOGUE_LENGTH = 8, /* tokens a turn */
};

typedef struct attn_dialogue_options {
  int64_t keys, values, turns, farthest; /* turns at most as many as keys; farthest at least 1 */
} attn_dialogue_options;

static inline int64_t attn_dialogue_vocabulary(const attn_dialogue_options *o) {
  return ATTN_DIALOGUE_MARKS + o->keys + o->values;
}

/* Dialogues first .. first + count - 1, each a function of options, seed and its number: tokens and
 * targets [turns, count, ATTN_DIALOGUE_LENGTH], targets -1 but for the value that is asked for at
 * the answer token; distances [turns, count]. ATTN_INVALID_ARGUMENT names the field. */
attn_status attn_dialogue_generate(const attn_dialogue_options *options, uint64_t seed,
                                   int64_t first, int64_t count, int32_t *tokens, int32_t *targets,
                                   int32_t *distances);

#endif
