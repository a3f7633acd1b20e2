/* One token for each of several sessions, the weights read once for all. */
#include "base/status.h"
#include "graph/operations.h"
#include "models/session.h"

#include <string.h>

static attn_status check(attn_session *const *sessions, const int32_t *tokens, int64_t count) {
  if (count < 1 || !sessions || !tokens)
    return attn_fail(ATTN_INVALID_ARGUMENT, "step: %lld sessions", (long long)count);
  for (int64_t i = 0; i < count; ++i) {
    if (sessions[i]->model != sessions[0]->model)
      return attn_fail(ATTN_INVALID_ARGUMENT, "step: session %lld is of another model",
                       (long long)i);
    for (int64_t j = 0; j < i; ++j)
      if (sessions[i] == sessions[j])
        return attn_fail(ATTN_INVALID_ARGUMENT, "step: sessions %lld and %lld are the same",
                         (long long)j, (long long)i);
    ATTN_TRY(attn_session_check_tokens(sessions[i], &tokens[i], 1));
  }
  return ATTN_OK;
}

static attn_status take_logits(attn_session *session, const attn_tensor *logits, int64_t i) {
  attn_tensor from, to;
  ATTN_TRY(attn_tensor_slice(logits, 0, i, 1, &from));
  ATTN_TRY(attn_tensor_wrap(session->logits, ATTN_F32, 2, from.shape, &to));
  return attn_tensor_copy(&from, &to);
}

static attn_status step(attn_session *const *sessions, const int32_t *tokens, int64_t count) {
  attn_tensor logits;
  ATTN_TRY(attn_token_step_run(&sessions[0]->step, sessions, tokens, count, &logits));
  for (int64_t i = 0; i < count; ++i) ATTN_TRY(take_logits(sessions[i], &logits, i));
  for (int64_t i = 0; i < count; ++i) {
    attn_session *s = sessions[i];
    s->tokens[attn_session_position(s)] = tokens[i];
    s->has_logits = true;
    for (int64_t l = 0; l < attn_session_layers(s); ++l) attn_state_advance(s->states[l], 1);
    attn_session_after_tokens(s);
  }
  return ATTN_OK;
}

attn_status attn_session_step(attn_session *const *sessions, const int32_t *tokens, int64_t count) {
  ATTN_TRY(check(sessions, tokens, count));
  if (count == 1) return attn_session_feed(sessions[0], tokens, 1);
  attn_status status = step(sessions, tokens, count);
  for (int64_t i = 0; i < count && status != ATTN_OK; ++i)
    status = attn_session_recover(sessions[i], attn_session_position(sessions[i]),
                                  sessions[i]->has_logits, status);
  return status;
}
