#include "models/token_step.h"
#include "base/memory.h"
#include "base/status.h"
#include "graph/operations.h"
#include "models/session.h"

#include <string.h>

void attn_token_step_free(attn_token_step *step) {
  attn_replay_destroy(step->replay);
  attn_free(step->tokens);
  attn_free(step->sessions);
}

/* Queues the operations; NULL after an error. */
static attn_var *queue(attn_session *const *sessions, const int32_t *tokens, int64_t count) {
  attn_session *s = sessions[0];
  attn_graph *g = s->graph;
  attn_var *hidden;
  if (count == 1) {
    attn_layout layout = attn_layout_equal(1, 1);
    layout.position = attn_session_position(s);
    layout.position_place = attn_state_position_place(s->states[0]);
    hidden = attn_decoder_hidden(g, s->model, &layout, tokens, s->states, 0, 0);
  } else {
    attn_state *const **states = attn_arena_alloc(g->arena, (size_t)count * sizeof *states);
    if (!states) return attn_graph_error(g, ATTN_OUT_OF_MEMORY);
    for (int64_t i = 0; i < count; ++i) states[i] = sessions[i]->states;
    hidden = attn_decoder_step(g, s->model, count, tokens, states);
  }
  return hidden ? attn_decoder_logits(g, s->model, hidden) : NULL;
}

static attn_status run_plainly(attn_session *const *sessions, const int32_t *tokens, int64_t count,
                               attn_tensor *logits) {
  attn_graph *g = sessions[0]->graph;
  attn_graph_reset(g, false);
  attn_var *found = queue(sessions, tokens, count);
  ATTN_TRY(attn_graph_status(g));
  *logits = found->value;
  return ATTN_OK;
}

/* Pages for the tokens, and their numbers where a replay reads them. */
static attn_status prepare(attn_token_step *step, attn_session *const *sessions,
                           const int32_t *tokens, int64_t count) {
  memcpy(step->tokens, tokens, (size_t)count * sizeof *tokens);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t l = 0; l < attn_session_layers(sessions[i]); ++l)
      ATTN_TRY(attn_state_prepare(sessions[i]->states[l]));
  return ATTN_OK;
}

static attn_status make_room(attn_token_step *step, attn_device device, int64_t count) {
  if (step->room < count) {
    int32_t *tokens = attn_realloc(step->tokens, (size_t)count * sizeof *tokens);
    if (tokens) step->tokens = tokens;
    uint64_t *sessions = attn_realloc(step->sessions, (size_t)count * sizeof *sessions);
    if (sessions) step->sessions = sessions;
    if (!tokens || !sessions) return ATTN_OUT_OF_MEMORY;
    step->room = count;
  }
  return step->replay ? ATTN_OK : attn_replay_create(device, &step->replay);
}

/* How often the step of these sessions has come in a row. States stay where they are as long as
 * their session lives, so the sessions' numbers say that everything is where it was. */
static int64_t count_repeats(attn_token_step *step, attn_session *const *sessions, int64_t count) {
  bool same = step->count == count;
  for (int64_t i = 0; i < count; ++i) {
    same = same && step->sessions[i] == sessions[i]->number;
    step->sessions[i] = sessions[i]->number;
  }
  step->count = count;
  if (!same) step->refused = false;
  return step->seen = same ? step->seen + 1 : 1;
}

/* An error is no failure of the step, which has not run: it cannot be captured. */
static attn_status capture(attn_token_step *step, attn_session *const *sessions, int64_t count) {
  attn_graph *g = sessions[0]->graph;
  ATTN_TRY(attn_replay_begin(step->replay, g));
  attn_var *logits = queue(sessions, step->tokens, count);
  ATTN_TRY(attn_replay_end(step->replay, g));
  step->logits = logits->value;
  return ATTN_OK;
}

attn_status attn_token_step_run(attn_token_step *step, attn_session *const *sessions,
                                const int32_t *tokens, int64_t count, attn_tensor *logits) {
  enum { CAPTURED = 2 }; /* the first time takes memory and makes plans */
  attn_device device = sessions[0]->model->device;
  if (!attn_is_cuda(device) || make_room(step, device, count) != ATTN_OK)
    return run_plainly(sessions, tokens, count, logits);
  int64_t seen = count_repeats(step, sessions, count);
  if (seen < CAPTURED || step->refused) return run_plainly(sessions, tokens, count, logits);
  ATTN_TRY(prepare(step, sessions, tokens, count));
  if (seen == CAPTURED && capture(step, sessions, count) != ATTN_OK) {
    step->refused = true;
    return run_plainly(sessions, tokens, count, logits);
  }
  ATTN_TRY(attn_replay_queue(step->replay));
  *logits = step->logits;
  return ATTN_OK;
}
