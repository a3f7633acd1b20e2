/* Sessions: one sequence of tokens, its state, and checkpoints of the state to rewind to.
 *
 * A checkpoint is a value: one attn_state a layer, which shares pages with the live state and
 * copies its fixed parts. Checkpoints are shared between forks by reference count and never change
 * once taken. Every session owns spare ones from the start, so that a decode step that takes a
 * checkpoint allocates nothing. */
#include "models/session.h"
#include "base/memory.h"
#include "base/status.h"
#include "graph/operations.h"
#include "models/sampling.h"

#include <string.h>

static int describe(const attn_model *model, int64_t layer, attn_state_part *parts) {
  const attn_layer_config *config = &model->config.layers[layer];
  return config->mixer->state(&config->options, model->compute, parts);
}

static bool cannot_be_cut(const attn_model *model) {
  attn_state_part parts[ATTN_STATE_PARTS];
  for (int64_t l = 0; l < model->config.layer_count; ++l) {
    int count = describe(model, l, parts);
    for (int i = 0; i < count; ++i)
      if (parts[i].kind == ATTN_STATE_FIXED || parts[i].window) return true;
  }
  return false;
}

static void destroy_states(attn_state **states, int64_t count) {
  for (int64_t l = 0; states && l < count; ++l) attn_state_destroy(states[l]);
  attn_free(states);
}

/* How many full sequences the pools hold: one a session, and where sessions have marks a page more
 * for each, since the last page of a mark is copied when the session goes on. */
static int64_t sharers_of(const attn_session *s) {
  int64_t forks = s->options.forks;
  int64_t pages = (s->options.max_tokens + ATTN_PAGE_TOKENS - 1) / ATTN_PAGE_TOKENS;
  return s->needs_checkpoints ? forks + (forks + pages - 1) / pages : forks;
}

/* One state a layer, with the pools of `family` (or new ones). */
static attn_status create_states(const attn_session *s, attn_state *const *family,
                                 attn_state ***states) {
  int64_t count = attn_session_layers(s), sharers = sharers_of(s);
  attn_state **made = attn_alloc_array((size_t)count, sizeof *made);
  if (!made) return ATTN_OUT_OF_MEMORY;
  attn_status status = ATTN_OK;
  for (int64_t l = 0; l < count && status == ATTN_OK; ++l) {
    attn_state_part parts[ATTN_STATE_PARTS];
    int part_count = describe(s->model, l, parts);
    status = attn_state_create(s->model->device, parts, part_count, s->options.max_tokens, sharers,
                               family ? family[l] : NULL, &made[l]);
  }
  if (status == ATTN_OK)
    *states = made;
  else
    destroy_states(made, count);
  return status;
}

/* Checkpoints -----------------------------------------------------------------------------------
 */

static void free_checkpoint(const attn_session *s, attn_checkpoint *c) {
  if (!c) return;
  destroy_states(c->states, attn_session_layers(s));
  attn_free(c->logits);
  attn_free(c);
}

static attn_status create_checkpoint(const attn_session *s, attn_checkpoint **made) {
  attn_checkpoint *c = attn_alloc_zero(sizeof *c);
  if (!c) return ATTN_OUT_OF_MEMORY;
  attn_status status = create_states(s, s->states, &c->states);
  if (status == ATTN_OK)
    *made = c;
  else
    attn_free(c);
  return status;
}

/* Makes spare checkpoints until there are as many as may be taken. */
static attn_status fill_spares(attn_session *s) {
  int64_t wanted = s->needs_checkpoints ? s->options.checkpoints : 0;
  while (s->spare_count < wanted) {
    ATTN_TRY(create_checkpoint(s, &s->spares[s->spare_count]));
    ++s->spare_count;
  }
  return ATTN_OK;
}

void attn_session_release_checkpoint(const attn_session *s, attn_checkpoint *c) {
  if (c && atomic_fetch_sub(&c->users, 1) == 1) free_checkpoint(s, c);
}

attn_status attn_session_make_checkpoint(const attn_session *s, attn_checkpoint **made) {
  ATTN_TRY(create_checkpoint(s, made));
  for (int64_t l = 0; l < attn_session_layers(s); ++l)
    attn_state_assign((*made)->states[l], s->states[l]);
  (*made)->position = attn_session_position(s);
  atomic_store(&(*made)->users, 1);
  return ATTN_OK;
}

/* Takes checkpoint i out of the list; it becomes a spare when no fork uses it any more. */
static void drop_checkpoint(attn_session *s, int64_t i) {
  attn_checkpoint *c = s->checkpoints[i];
  memmove(&s->checkpoints[i], &s->checkpoints[i + 1],
          (size_t)(s->checkpoint_count - i - 1) * sizeof *s->checkpoints);
  memmove(&s->kept[i], &s->kept[i + 1], (size_t)(s->checkpoint_count - i - 1) * sizeof *s->kept);
  --s->checkpoint_count;
  if (atomic_fetch_sub(&c->users, 1) != 1) return;
  if (s->spare_count == ATTN_MOST_CHECKPOINTS) {
    free_checkpoint(s, c);
    return;
  }
  for (int64_t l = 0; l < attn_session_layers(s); ++l)
    attn_state_clear(c->states[l]); /* gives pages back */
  s->spares[s->spare_count++] = c;
}

/* Which one to give up when the list is full: where the gap that it leaves is smallest beside its
 * distance from the end, so that the list stays denser near the end. */
enum { MOST_KEPT = 4 }; /* of those asked for: the last ones */
static int64_t least_useful(const attn_session *s, int64_t now) {
  int64_t best = 0;
  double least = 1e300;
  for (int64_t i = 0; i < s->checkpoint_count; ++i) {
    int64_t before = i ? s->checkpoints[i - 1]->position : 0;
    int64_t after = i + 1 < s->checkpoint_count ? s->checkpoints[i + 1]->position : now;
    double distance = (double)(now - s->checkpoints[i]->position) + 1;
    double cost = (double)(after - before) / distance;
    if (s->kept[i]) continue;
    if (cost < least) {
      least = cost;
      best = i;
    }
  }
  return best;
}

void attn_session_take_checkpoint(attn_session *s) {
  int64_t position = attn_session_position(s);
  if (!s->needs_checkpoints || s->options.checkpoints == 0) return;
  if (s->checkpoint_count && s->checkpoints[s->checkpoint_count - 1]->position >= position) return;
  if (s->checkpoint_count == s->options.checkpoints) drop_checkpoint(s, least_useful(s, position));
  if (s->spare_count == 0) return; /* all are shared with forks: a longer replay, nothing worse */
  attn_checkpoint *c = s->spares[--s->spare_count];
  for (int64_t l = 0; l < attn_session_layers(s); ++l)
    attn_state_assign(c->states[l], s->states[l]);
  c->position = position;
  atomic_store(&c->users, 1);
  c->has_logits = false;
  s->kept[s->checkpoint_count] = false;
  s->checkpoints[s->checkpoint_count++] = c;
}

/* Without memory for them it costs a token later. Other sessions may read a shared one. */
static void remember_logits(const attn_session *s, attn_checkpoint *c) {
  size_t count = (size_t)s->model->config.vocabulary;
  if (!s->has_logits || c->has_logits || atomic_load(&c->users) != 1) return;
  if (!c->logits) c->logits = attn_alloc_array(count, sizeof *c->logits);
  if (!c->logits) return;
  memcpy(c->logits, s->logits, count * sizeof *c->logits);
  c->has_logits = true;
}

void attn_session_checkpoint(attn_session *s) {
  attn_session_take_checkpoint(s);
  int64_t position = attn_session_position(s), last = s->checkpoint_count - 1, kept = 0;
  if (last < 0 || s->checkpoints[last]->position != position) return;
  s->kept[last] = true;
  remember_logits(s, s->checkpoints[last]);
  int64_t most = s->options.checkpoints / 2 < MOST_KEPT ? s->options.checkpoints / 2 : MOST_KEPT;
  for (int64_t i = last; i >= 0; --i) {
    kept += s->kept[i];
    if (kept > most) s->kept[i] = false;
  }
}

/* Creation --------------------------------------------------------------------------------------
 */

static attn_status check_options(const attn_session_options *given, attn_session_options *options) {
  *options = (attn_session_options)ATTN_SESSION_OPTIONS_INIT;
  if (!given) return ATTN_OK;
  if (given->struct_size != sizeof *given)
    return attn_fail(ATTN_INVALID_ARGUMENT, "session: struct_size is %zu, expected %zu",
                     given->struct_size, sizeof *given);
  *options = *given;
  if (options->max_tokens < 1 || options->max_tokens > INT32_MAX)
    return attn_fail(ATTN_INVALID_ARGUMENT, "session: max_tokens %lld is not in 1 to %d",
                     (long long)options->max_tokens, INT32_MAX);
  if (options->forks < 1 || options->forks > 4096)
    return attn_fail(ATTN_INVALID_ARGUMENT, "session: forks %lld is not in 1 to 4096",
                     (long long)options->forks);
  if (options->checkpoint_spacing < 1 || options->checkpoint_spacing % ATTN_PAGE_TOKENS)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "session: checkpoint_spacing %lld is not a positive "
                     "multiple of %d",
                     (long long)options->checkpoint_spacing, ATTN_PAGE_TOKENS);
  if (options->checkpoints < 0 || options->checkpoints > ATTN_MOST_CHECKPOINTS)
    return attn_fail(ATTN_INVALID_ARGUMENT, "session: checkpoints %lld is not in 0 to %d",
                     (long long)options->checkpoints, ATTN_MOST_CHECKPOINTS);
  return ATTN_OK;
}

static attn_status create(const attn_model *model, const attn_session_options *options,
                          attn_state *const *family, attn_session *s) {
  static _Atomic uint64_t made;
  s->number = atomic_fetch_add(&made, 1) + 1;
  s->model = model;
  s->options = *options;
  s->needs_checkpoints = cannot_be_cut(model);
  ATTN_TRY(attn_graph_create_on(model->device, model->compute, &s->graph));
  s->tokens = attn_alloc_array((size_t)options->max_tokens, sizeof *s->tokens);
  s->logits = attn_alloc_array((size_t)model->config.vocabulary, sizeof *s->logits);
  s->sampling_workspace = attn_alloc(attn_sample_workspace(model->config.vocabulary));
  if (!s->tokens || !s->logits || !s->sampling_workspace) return ATTN_OUT_OF_MEMORY;
  ATTN_TRY(create_states(s, family, &s->states));
  return fill_spares(s);
}

static attn_status create_session(const attn_model *model, const attn_session_options *options,
                                  attn_state *const *family, attn_session **session) {
  attn_session *s = attn_alloc_zero(sizeof *s);
  if (!s) return ATTN_OUT_OF_MEMORY;
  attn_status status = create(model, options, family, s);
  if (status == ATTN_OK)
    *session = s;
  else
    attn_session_destroy(s);
  return status;
}

attn_status attn_session_create(const attn_model *model, const attn_session_options *options,
                                attn_session **session) {
  attn_session_options checked;
  if (!model || !session)
    return attn_fail(ATTN_INVALID_ARGUMENT, "session: the model or the result is NULL");
  ATTN_TRY(attn_model_check_decoder(model, "session"));
  ATTN_TRY(check_options(options, &checked));
  return create_session(model, &checked, NULL, session);
}

void attn_session_destroy(attn_session *session) {
  if (!session) return;
  while (session->checkpoint_count) drop_checkpoint(session, session->checkpoint_count - 1);
  for (int64_t i = 0; i < session->spare_count; ++i) free_checkpoint(session, session->spares[i]);
  free_checkpoint(session, session->mark);
  destroy_states(session->states, attn_session_layers(session));
  attn_token_step_free(&session->step);
  attn_graph_destroy(session->graph);
  attn_free(session->tokens);
  attn_free(session->logits);
  attn_free(session->sampling_workspace);
  attn_free(session);
}

/* Feeding ---------------------------------------------------------------------------------------
 */

const struct attn_plan_cache *attn_session_plans(const attn_session *session) {
  return session->graph->plans;
}

int64_t attn_session_position(const attn_session *session) {
  return attn_state_position(session->states[0]);
}

/* The usual decode step. */
static attn_status run_token(attn_session *s, float *logits) {
  attn_tensor found, target;
  ATTN_TRY(attn_token_step_run(&s->step, &s, s->tokens + attn_session_position(s), 1, &found));
  ATTN_TRY(attn_tensor_wrap(logits, ATTN_F32, 2, found.shape, &target));
  return attn_tensor_copy(&found, &target);
}

static attn_status run_tokens(attn_session *s, int64_t count, int64_t logit_rows, float *logits) {
  attn_graph *g = s->graph;
  attn_graph_reset(g, false);
  attn_layout layout = attn_layout_equal(1, count);
  layout.position = attn_session_position(s);
  attn_var *hidden =
      attn_decoder_hidden(g, s->model, &layout, s->tokens + layout.position, s->states, 0, 0);
  if (logit_rows && hidden) {
    attn_var *last = attn_view_slice(g, hidden, 0, count - logit_rows, logit_rows);
    attn_var *found = attn_decoder_logits(g, s->model, last);
    attn_tensor target;
    if (found) {
      ATTN_TRY(attn_tensor_wrap(logits, ATTN_F32, 2, found->value.shape, &target));
      ATTN_TRY(attn_tensor_copy(&found->value, &target));
    }
  }
  return attn_graph_status(g);
}

attn_status attn_session_run(attn_session *s, int64_t count, int64_t logit_rows, float *logits) {
  bool token = count == 1 && logit_rows == 1;
  ATTN_TRY(token ? run_token(s, logits) : run_tokens(s, count, logit_rows, logits));
  s->tokens_read += count;
  for (int64_t l = 0; l < attn_session_layers(s); ++l) attn_state_advance(s->states[l], count);
  return ATTN_OK;
}

void attn_session_after_tokens(attn_session *s) {
  if (attn_session_position(s) % s->options.checkpoint_spacing == 0)
    attn_session_take_checkpoint(s);
}

/* Runs the tokens up to `end`, in pieces that stop where checkpoints are due. */
static attn_status run_to(attn_session *s, int64_t end) {
  while (attn_session_position(s) < end) {
    int64_t position = attn_session_position(s), spacing = s->options.checkpoint_spacing;
    int64_t stop = (position / spacing + 1) * spacing;
    if (!s->needs_checkpoints || stop > end) stop = end;
    if (stop > position + ATTN_FEED_TOKENS) stop = position + ATTN_FEED_TOKENS;
    ATTN_TRY(attn_session_run(s, stop - position, stop == end, s->logits));
    s->has_logits = stop == end;
    attn_session_after_tokens(s);
  }
  return ATTN_OK;
}

/* Puts the state at the nearest checkpoint at or before `position` (or at no tokens). */
static void restore_checkpoint(attn_session *s, int64_t position) {
  int64_t i = s->checkpoint_count - 1;
  while (i >= 0 && s->checkpoints[i]->position > position) --i;
  const attn_checkpoint *best = i >= 0 ? s->checkpoints[i] : NULL;
  const attn_checkpoint *mark = s->mark;
  if (mark && mark->position <= position && (!best || mark->position > best->position)) best = mark;
  for (int64_t l = 0; l < attn_session_layers(s); ++l) {
    if (best && best->position > 0)
      attn_state_assign(s->states[l], best->states[l]);
    else
      attn_state_clear(s->states[l]);
  }
}

/* After a failure part of the layers may have moved on: goes back to `position` by replay, or to no
 * tokens at all when that fails too. The message of the first failure is kept. */
attn_status attn_session_recover(attn_session *s, int64_t position, bool logits_stand,
                                 attn_status status) {
  char first[512];
  strncpy(first, attn_error_message(), sizeof first - 1);
  first[sizeof first - 1] = 0;
  s->has_logits = false;
  restore_checkpoint(s, position);
  if (run_to(s, position) == ATTN_OK) {
    s->has_logits = s->has_logits || logits_stand;
    return attn_fail(status, "%s", first);
  }
  restore_checkpoint(s, -1);
  s->has_logits = false;
  return attn_fail(status, "%s; the session has lost its tokens", first);
}

attn_status attn_session_check_tokens(const attn_session *session, const int32_t *tokens,
                                      int64_t count) {
  int64_t position = attn_session_position(session);
  int64_t vocabulary = session->model->config.vocabulary;
  if (count < 1 || !tokens)
    return attn_fail(ATTN_INVALID_ARGUMENT, "feed: %lld tokens", (long long)count);
  if (count > session->options.max_tokens - position)
    return attn_fail(ATTN_OUT_OF_MEMORY,
                     "feed: the session holds at most %lld tokens; it has %lld "
                     "and was given %lld",
                     (long long)session->options.max_tokens, (long long)position, (long long)count);
  for (int64_t i = 0; i < count; ++i)
    if (tokens[i] < 0 || tokens[i] >= vocabulary)
      return attn_fail(ATTN_INVALID_ARGUMENT, "feed: token %d at %lld is not in 0 to %lld",
                       tokens[i], (long long)i, (long long)vocabulary - 1);
  return ATTN_OK;
}

attn_status attn_session_feed(attn_session *session, const int32_t *tokens, int64_t count) {
  int64_t position = attn_session_position(session);
  ATTN_TRY(attn_session_check_tokens(session, tokens, count));
  memmove(session->tokens + position, tokens, (size_t)count * sizeof *tokens);
  bool had_logits = session->has_logits; /* and keeps them until all is read */
  attn_status status = run_to(session, position + count);
  return status == ATTN_OK ? ATTN_OK : attn_session_recover(session, position, had_logits, status);
}

const float *attn_session_logits(const attn_session *session) {
  return session->has_logits ? session->logits : NULL;
}

attn_status attn_session_sample(attn_session *session, const attn_sampling *sampling,
                                int32_t *token) {
  if (!session->has_logits)
    return attn_fail(ATTN_INVALID_ARGUMENT, "sample: feed at least one token first");
  int64_t position = attn_session_position(session);
  return attn_sample(sampling, session->logits, session->model->config.vocabulary, session->tokens,
                     position, (uint64_t)position, session->sampling_workspace, token);
}

const int32_t *attn_session_tokens(const attn_session *session) {
  return session->tokens;
}

int64_t attn_session_state_bytes(const attn_session *session) {
  int64_t total = 0;
  for (int64_t l = 0; l < attn_session_layers(session); ++l)
    total += attn_state_bytes(session->states[l]);
  return total;
}

/* Fork and rewind -------------------------------------------------------------------------------
 */

attn_status attn_session_fork(attn_session *session, attn_session **fork) {
  attn_session *child;
  ATTN_TRY(create_session(session->model, &session->options, session->states, &child));
  int64_t position = attn_session_position(session);
  for (int64_t l = 0; l < attn_session_layers(session); ++l)
    attn_state_assign(child->states[l], session->states[l]);
  memcpy(child->tokens, session->tokens, (size_t)position * sizeof *child->tokens);
  memcpy(child->logits, session->logits,
         (size_t)session->model->config.vocabulary * sizeof *child->logits);
  child->has_logits = session->has_logits;
  for (int64_t i = 0; i < session->checkpoint_count; ++i) {
    child->checkpoints[i] = session->checkpoints[i];
    child->kept[i] = session->kept[i];
    atomic_fetch_add(&child->checkpoints[i]->users, 1);
  }
  child->checkpoint_count = session->checkpoint_count;
  attn_status status = fill_spares(session); /* those that are shared now cannot be reused */
  if (status == ATTN_OK)
    *fork = child;
  else
    attn_session_destroy(child);
  return status;
}

attn_status attn_session_create_at(const attn_session *family, const int32_t *tokens, int64_t count,
                                   attn_checkpoint *checkpoint, attn_session **session) {
  attn_session *made;
  ATTN_TRY(create_session(family->model, &family->options, family->states, &made));
  if (checkpoint) {
    for (int64_t l = 0; l < attn_session_layers(made); ++l)
      attn_state_assign(made->states[l], checkpoint->states[l]);
    memcpy(made->tokens, tokens, (size_t)count * sizeof *tokens);
  }
  if (checkpoint && made->needs_checkpoints && made->options.checkpoints > 0) {
    made->checkpoints[made->checkpoint_count++] = checkpoint;
    atomic_fetch_add(&checkpoint->users, 1);
  }
  *session = made;
  return ATTN_OK;
}

bool attn_session_is_related(const attn_session *a, const attn_session *b) {
  bool related = a->model == b->model && a->options.max_tokens == b->options.max_tokens;
  for (int64_t l = 0; related && l < attn_session_layers(a); ++l)
    related = attn_state_is_related(a->states[l], b->states[l]);
  return related;
}

static bool cut_all(attn_session *s, int64_t position) {
  if (s->needs_checkpoints) return false;
  for (int64_t l = 0; l < attn_session_layers(s); ++l)
    if (!attn_state_cut(s->states[l], position)) return false;
  return true;
}

/* Checkpoints behind `position` are of tokens that are no more. */
static void drop_behind(attn_session *s, int64_t position) {
  while (s->checkpoint_count && s->checkpoints[s->checkpoint_count - 1]->position > position)
    drop_checkpoint(s, s->checkpoint_count - 1);
  if (s->mark && s->mark->position > position) {
    for (int64_t l = 0; l < attn_session_layers(s); ++l) attn_state_clear(s->mark->states[l]);
    s->mark->position = 0;
  }
}

attn_status attn_session_mark(attn_session *s) {
  if (!s->needs_checkpoints) return ATTN_OK;
  if (!s->mark) ATTN_TRY(create_checkpoint(s, &s->mark));
  for (int64_t l = 0; l < attn_session_layers(s); ++l)
    attn_state_assign(s->mark->states[l], s->states[l]);
  s->mark->position = attn_session_position(s);
  return ATTN_OK;
}

attn_status attn_session_retreat(attn_session *s, int64_t position) {
  s->has_logits = false;
  if (position == attn_session_position(s)) return ATTN_OK;
  drop_behind(s, position);
  if (cut_all(s, position)) return ATTN_OK;
  restore_checkpoint(s, position);
  while (attn_session_position(s) < position) {
    int64_t left = position - attn_session_position(s);
    ATTN_TRY(attn_session_run(s, left < ATTN_FEED_TOKENS ? left : ATTN_FEED_TOKENS, 0, NULL));
    attn_session_after_tokens(s);
  }
  return ATTN_OK;
}

void attn_session_clear(attn_session *s) {
  s->has_logits = false;
  drop_behind(s, 0);
  while (s->checkpoint_count) drop_checkpoint(s, s->checkpoint_count - 1);
  for (int64_t l = 0; l < attn_session_layers(s); ++l) attn_state_clear(s->states[l]);
}

/* From a checkpoint of just this place, logits included. */
static bool restore_exactly(attn_session *s, int64_t position) {
  const attn_checkpoint *c = s->checkpoint_count ? s->checkpoints[s->checkpoint_count - 1] : NULL;
  if (!c || c->position != position || !c->has_logits) return false;
  for (int64_t l = 0; l < attn_session_layers(s); ++l)
    attn_state_assign(s->states[l], c->states[l]);
  memcpy(s->logits, c->logits, (size_t)s->model->config.vocabulary * sizeof *s->logits);
  s->has_logits = true;
  return true;
}

attn_status attn_session_rewind(attn_session *session, int64_t position) {
  int64_t now = attn_session_position(session);
  if (position < 0 || position > now)
    return attn_fail(ATTN_INVALID_ARGUMENT, "rewind: %lld is not in 0 to %lld", (long long)position,
                     (long long)now);
  if (position == now) return ATTN_OK;
  session->has_logits = false;
  drop_behind(session, position);
  if (restore_exactly(session, position)) return ATTN_OK;
  /* The last token is run again: its logits belong to the result. */
  int64_t before = position ? position - 1 : 0;
  if (!cut_all(session, before)) restore_checkpoint(session, before);
  attn_status status = run_to(session, position);
  return status == ATTN_OK ? ATTN_OK : attn_session_recover(session, position, false, status);
}
