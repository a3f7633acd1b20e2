/* Speculative decoding; attn/speculation.h says what it promises.
 *
 * A step draws one token as always, proposes what may follow, reads all of them at once with the
 * logits of each, and keeps proposals as long as they are what would have been drawn. What was read
 * too much is taken back: cut where the state can be cut, else by going back to a mark and reading
 * the kept ones again. */
#include "attn/speculation.h"
#include "attn/text.h"
#include "base/memory.h"
#include "base/status.h"
#include "graph/layout.h"
#include "models/sampling.h"
#include "models/session.h"

#include <string.h>

/* With the token that is drawn first, few enough to give what they would give one by one. */
enum { MOST_PROPOSED = ATTN_FEW_ROWS - 1, MOST_NGRAM = 64 };

struct attn_speculator {
  attn_session *session, *draft; /* draft: NULL for look-up */
  attn_speculation options;
  attn_speculation_stats stats;
  float *logits; /* [1 + MOST_PROPOSED, vocabulary] */
};

static attn_status check(const attn_session *session, const attn_speculation *o) {
  if (o->struct_size != sizeof *o)
    return attn_fail(ATTN_INVALID_ARGUMENT, "speculation: struct_size is %zu, expected %zu",
                     o->struct_size, sizeof *o);
  if (o->tokens < 1 || o->tokens > MOST_PROPOSED)
    return attn_fail(ATTN_INVALID_ARGUMENT, "speculation: tokens %lld is not in 1 to %d",
                     (long long)o->tokens, MOST_PROPOSED);
  if (o->shortest < 1 || o->longest < o->shortest || o->longest > MOST_NGRAM)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "speculation: shortest %lld and longest %lld are not in 1 to %d",
                     (long long)o->shortest, (long long)o->longest, MOST_NGRAM);
  int64_t own = session->model->config.vocabulary;
  if (!o->draft || o->draft->config.vocabulary == own) return ATTN_OK;
  return attn_fail(ATTN_UNSUPPORTED, "speculation: the draft has %lld tokens, the model %lld",
                   (long long)o->draft->config.vocabulary, (long long)own);
}

static attn_status create_draft(attn_speculator *s) {
  attn_session_options options = s->session->options;
  options.forks = 1;
  return attn_session_create(s->options.draft, &options, &s->draft);
}

attn_status attn_speculator_create(attn_session *session, const attn_speculation *options,
                                   attn_speculator **speculator) {
  const attn_speculation usual = ATTN_SPECULATION_INIT;
  if (!session || !speculator)
    return attn_fail(ATTN_INVALID_ARGUMENT, "speculation: the session or the result is NULL");
  if (!options) options = &usual;
  ATTN_TRY(check(session, options));
  attn_speculator *s = attn_alloc_zero(sizeof *s);
  if (!s) return ATTN_OUT_OF_MEMORY;
  s->session = session;
  s->options = *options;
  s->logits = attn_alloc_array(
      (size_t)(1 + options->tokens) * (size_t)session->model->config.vocabulary, sizeof *s->logits);
  attn_status status = s->logits ? ATTN_OK : ATTN_OUT_OF_MEMORY;
  if (status == ATTN_OK && options->draft) status = create_draft(s);
  if (status == ATTN_OK)
    *speculator = s;
  else
    attn_speculator_destroy(s);
  return status;
}

void attn_speculator_destroy(attn_speculator *s) {
  if (!s) return;
  attn_session_destroy(s->draft);
  attn_free(s->logits);
  attn_free(s);
}

attn_speculation_stats attn_speculator_get_stats(const attn_speculator *s) {
  return s->stats;
}

/* Proposals -------------------------------------------------------------------------------------
 */

/* Where the latest occurrence of the last n tokens that lies before them ends; -1: nowhere. */
static int64_t find_earlier(const int32_t *tokens, int64_t count, int64_t n) {
  const int32_t *last = tokens + count - n;
  for (int64_t end = count - 1; end >= n; --end)
    if (memcmp(tokens + end - n, last, (size_t)n * sizeof *tokens) == 0) return end;
  return -1;
}

/* What may follow tokens[0 .. count), the last of which is not fed yet. */
static int64_t look_up(const attn_speculation *o, const int32_t *tokens, int64_t count,
                       int64_t most, int32_t *proposed) {
  for (int64_t n = o->longest; n >= o->shortest; --n) {
    int64_t end = n < count ? find_earlier(tokens, count, n) : -1;
    if (end < 0) continue;
    int64_t found = count - end < most ? count - end : most;
    memcpy(proposed, tokens + end, (size_t)found * sizeof *proposed);
    return found;
  }
  return 0;
}

/* The draft reads what the session has and the draft has not, and goes on greedily. */
static attn_status ask_draft(attn_speculator *s, const int32_t *tokens, int64_t count, int64_t most,
                             int32_t *proposed, int64_t *found) {
  const attn_sampling greedy = {.struct_size = sizeof greedy, .top_p = 1, .repetition_penalty = 1};
  int64_t known = attn_session_position(s->draft), same = 0;
  const int32_t *read = attn_session_tokens(s->draft);
  while (same < known && same < count - 1 && read[same] == tokens[same]) ++same;
  attn_status status = same < known ? attn_session_retreat(s->draft, same) : ATTN_OK;
  if (status != ATTN_OK) return attn_session_recover(s->draft, same, false, status);
  ATTN_TRY(attn_session_feed(s->draft, tokens + same, count - same));
  ATTN_TRY(attn_session_mark(s->draft));
  for (*found = 0; *found < most;) {
    int32_t token;
    ATTN_TRY(attn_session_sample(s->draft, &greedy, &token));
    proposed[(*found)++] = token;
    if (*found < most && !attn_model_is_end(s->session->model, token))
      ATTN_TRY(attn_session_feed(s->draft, &token, 1));
    else
      break;
  }
  return ATTN_OK;
}

/* Verification ----------------------------------------------------------------------------------
 */

/* The token that plain decoding draws at `position` from these logits. */
static attn_status draw(attn_session *s, const attn_sampling *sampling, const float *logits,
                        int64_t position, int32_t *token) {
  return attn_sample(sampling, logits, s->model->config.vocabulary, s->tokens, position,
                     (uint64_t)position, s->sampling_workspace, token);
}

/* How many of the tokens behind the first would have been drawn. */
static attn_status count_accepted(attn_speculator *s, const attn_sampling *sampling,
                                  int64_t position, int64_t proposed, int64_t *accepted) {
  const int32_t *tokens = s->session->tokens + position;
  int64_t vocabulary = s->session->model->config.vocabulary;
  for (*accepted = 0; *accepted < proposed; ++*accepted) {
    int32_t token;
    if (attn_model_is_end(s->session->model, tokens[*accepted])) return ATTN_OK;
    ATTN_TRY(draw(s->session, sampling, s->logits + *accepted * vocabulary,
                  position + *accepted + 1, &token));
    if (token != tokens[*accepted + 1]) return ATTN_OK;
  }
  return ATTN_OK;
}

/* Reads the 1 + proposed tokens behind the position and keeps those that hold. */
static attn_status read_and_keep(attn_speculator *s, const attn_sampling *sampling,
                                 int64_t proposed, int64_t *accepted) {
  attn_session *session = s->session;
  int64_t position = attn_session_position(session);
  int64_t vocabulary = session->model->config.vocabulary;
  if (proposed) ATTN_TRY(attn_session_mark(session));
  session->has_logits = false;
  ATTN_TRY(attn_session_run(session, 1 + proposed, 1 + proposed, s->logits));
  ATTN_TRY(count_accepted(s, sampling, position, proposed, accepted));
  if (*accepted < proposed) ATTN_TRY(attn_session_retreat(session, position + 1 + *accepted));
  memcpy(session->logits, s->logits + *accepted * vocabulary,
         (size_t)vocabulary * sizeof *session->logits);
  session->has_logits = true;
  return ATTN_OK;
}

static attn_status propose(attn_speculator *s, int64_t most, int64_t *proposed) {
  attn_session *session = s->session;
  int64_t position = attn_session_position(session);
  int32_t *tokens = session->tokens, *behind = tokens + position + 1;
  *proposed = 0;
  if (most <= 0 || attn_model_is_end(session->model, tokens[position])) return ATTN_OK;
  if (s->draft) return ask_draft(s, tokens, position + 1, most, behind, proposed);
  *proposed = look_up(&s->options, tokens, position + 1, most, behind);
  return ATTN_OK;
}

/* Proposals stay on this side of the next checkpoint, which so is taken as always. */
static int64_t room_for(const attn_speculator *s, int64_t capacity) {
  const attn_session *session = s->session;
  int64_t position = attn_session_position(session);
  int64_t room = session->options.max_tokens - position - 1;
  int64_t spacing = session->options.checkpoint_spacing;
  int64_t before = spacing - position % spacing - 1;
  if (session->needs_checkpoints && room > before) room = before;
  if (room > capacity - 1) room = capacity - 1;
  return room < s->options.tokens ? room : s->options.tokens;
}

attn_status attn_speculator_step(attn_speculator *s, const attn_sampling *sampling,
                                 int64_t capacity, int32_t *tokens, int64_t *count) {
  attn_session *session = s->session;
  int64_t position = attn_session_position(session), proposed, accepted = 0;
  int32_t first;
  if (capacity < 1 || !tokens || !count)
    return attn_fail(ATTN_INVALID_ARGUMENT, "speculation: no room for tokens");
  ATTN_TRY(attn_session_sample(session, sampling, &first));
  ATTN_TRY(attn_session_check_tokens(session, &first, 1));
  session->tokens[position] = first;
  ATTN_TRY(propose(s, room_for(s, capacity), &proposed));
  attn_status status = read_and_keep(s, sampling, proposed, &accepted);
  if (status != ATTN_OK) return attn_session_recover(session, position, true, status);
  attn_session_after_tokens(session);
  *count = 1 + accepted;
  memcpy(tokens, session->tokens + position, (size_t)*count * sizeof *tokens);
  s->stats.steps += 1;
  s->stats.proposed += proposed;
  s->stats.accepted += accepted;
  s->stats.tokens += *count;
  return ATTN_OK;
}
