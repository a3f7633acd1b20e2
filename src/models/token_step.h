/* One token more for one session or several: decoding. On a GPU the step of the same sessions is
 * captured when it comes the second time and replayed from then on (graph/replay.h). */
#ifndef ATTN_MODELS_TOKEN_STEP_H
#define ATTN_MODELS_TOKEN_STEP_H

#include "attn/model.h"
#include "graph/replay.h"

/* What a session keeps for the steps that run on its graph. All zero: none so far. */
typedef struct attn_token_step {
  uint64_t *sessions; /* whose step it was last: their numbers */
  int32_t *tokens;    /* where the replay reads them */
  int64_t count, room;
  int64_t seen; /* how often these sessions' step came in a row */
  bool refused; /* it cannot be captured: the host takes part */
  attn_replay *replay;
  attn_tensor logits; /* of the replay */
} attn_token_step;

void attn_token_step_free(attn_token_step *step);

/* Runs tokens[i] through sessions[i] on the graph of sessions[0], to which `step` belongs: *logits
 * [count, vocabulary], float32 on the model's device, until the graph runs something else. The
 * states are not advanced. */
attn_status attn_token_step_run(attn_token_step *step, attn_session *const *sessions,
                                const int32_t *tokens, int64_t count, attn_tensor *logits);

#endif
