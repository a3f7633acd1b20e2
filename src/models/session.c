/* Sessions: one sequence of tokens, its state, and checkpoints of the state to rewind to.
 *
 * A checkpoint is a value: one attn_state a layer, which shares pages with the live state and
 * copies its fixed parts. Checkpoints are shared between forks by reference count and never change
 * once taken. Every session owns spare ones from the start, so that a decode step that takes a
 * checkpoint allocates nothing. */
#include "base/hash.h"
#include "base/memory.h"
#include "base/status.h"
#include "base/io.h"
#include "graph/operations.h"
#include "models/model.h"
#include "models/sampling.h"

#include <stdatomic.h>
#include <string.h>

enum {
  FEED_TOKENS = 512, /* rows that go through the layers at once: bounds the activations */
  MOST_CHECKPOINTS = 256,
};

typedef struct checkpoint {
  _Atomic int64_t users;
  int64_t position;
  attn_state **states; /* a layer each */
} checkpoint;

struct attn_session {
  const attn_model *model;
  attn_session_options options;
  attn_graph *graph;
  attn_state **states;
  int32_t *tokens;
  float *logits;
  bool has_logits;
  void *sampling_workspace;
  bool needs_checkpoints; /* whether any layer's state cannot simply be cut */
  int64_t checkpoint_count, spare_count;
  checkpoint *checkpoints[MOST_CHECKPOINTS]; /* ascending position */
  checkpoint *spares[MOST_CHECKPOINTS];
};

static int64_t layers_of(const attn_session *s) {
  return s->model->config.layer_count;
}

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

/* One state a layer, with the pools of `family` (or new ones). */
static attn_status create_states(const attn_session *s, attn_state *const *family,
                                 attn_state ***states) {
  int64_t count = layers_of(s);
  attn_state **made = attn_alloc_array((size_t)count, sizeof *made);
  if (!made) return ATTN_OUT_OF_MEMORY;
  attn_status status = ATTN_OK;
  for (int64_t l = 0; l < count && status == ATTN_OK; ++l) {
    attn_state_part parts[ATTN_STATE_PARTS];
    int part_count = describe(s->model, l, parts);
    status = attn_state_create(parts, part_count, s->options.max_tokens, s->options.forks,
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

static void free_checkpoint(const attn_session *s, checkpoint *c) {
  if (!c) return;
  destroy_states(c->states, layers_of(s));
  attn_free(c);
}

/* Makes spare checkpoints until there are as many as may be taken. */
static attn_status fill_spares(attn_session *s) {
  int64_t wanted = s->needs_checkpoints ? s->options.checkpoints : 0;
  while (s->spare_count < wanted) {
    checkpoint *c = attn_alloc_zero(sizeof *c);
    if (!c) return ATTN_OUT_OF_MEMORY;
    attn_status status = create_states(s, s->states, &c->states);
    if (status != ATTN_OK) {
      attn_free(c);
      return status;
    }
    s->spares[s->spare_count++] = c;
  }
  return ATTN_OK;
}

/* Takes checkpoint i out of the list; it becomes a spare when no fork uses it any more. */
static void drop_checkpoint(attn_session *s, int64_t i) {
  checkpoint *c = s->checkpoints[i];
  memmove(&s->checkpoints[i], &s->checkpoints[i + 1],
          (size_t)(s->checkpoint_count - i - 1) * sizeof *s->checkpoints);
  --s->checkpoint_count;
  if (atomic_fetch_sub(&c->users, 1) != 1) return;
  if (s->spare_count == MOST_CHECKPOINTS) {
    free_checkpoint(s, c);
    return;
  }
  for (int64_t l = 0; l < layers_of(s); ++l) attn_state_clear(c->states[l]); /* gives pages back */
  s->spares[s->spare_count++] = c;
}

/* Which one to give up when the list is full: where the gap that it leaves is smallest beside its
 * distance from the end, so that the list stays denser near the end. */
static int64_t least_useful(const attn_session *s, int64_t now) {
  int64_t best = 0;
  double least = 1e300;
  for (int64_t i = 0; i < s->checkpoint_count; ++i) {
    int64_t before = i ? s->checkpoints[i - 1]->position : 0;
    int64_t after = i + 1 < s->checkpoint_count ? s->checkpoints[i + 1]->position : now;
    double distance = (double)(now - s->checkpoints[i]->position) + 1;
    double cost = (double)(after - before) / distance;
    if (cost < least) {
      least = cost;
      best = i;
    }
  }
  return best;
}

static void take_checkpoint(attn_session *s) {
  int64_t position = attn_session_position(s);
  if (!s->needs_checkpoints || s->options.checkpoints == 0) return;
  if (s->checkpoint_count && s->checkpoints[s->checkpoint_count - 1]->position >= position) return;
  if (s->checkpoint_count == s->options.checkpoints) drop_checkpoint(s, least_useful(s, position));
  if (s->spare_count == 0) return; /* all are shared with forks: a longer replay, nothing worse */
  checkpoint *c = s->spares[--s->spare_count];
  for (int64_t l = 0; l < layers_of(s); ++l) attn_state_assign(c->states[l], s->states[l]);
  c->position = position;
  atomic_store(&c->users, 1);
  s->checkpoints[s->checkpoint_count++] = c;
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
  if (options->checkpoints < 0 || options->checkpoints > MOST_CHECKPOINTS)
    return attn_fail(ATTN_INVALID_ARGUMENT, "session: checkpoints %lld is not in 0 to %d",
                     (long long)options->checkpoints, MOST_CHECKPOINTS);
  return ATTN_OK;
}

static attn_status create(const attn_model *model, const attn_session_options *options,
                          attn_state *const *family, attn_session *s) {
  s->model = model;
  s->options = *options;
  s->needs_checkpoints = cannot_be_cut(model);
  ATTN_TRY(attn_graph_create(model->compute, &s->graph));
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
  destroy_states(session->states, layers_of(session));
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

/* Runs `count` tokens that stand at the position already; logits of the last one if asked for. */
static attn_status run(attn_session *s, int64_t count, bool wants_logits) {
  attn_graph *g = s->graph;
  attn_graph_reset(g, false);
  attn_layout layout = attn_layout_equal(1, count);
  layout.position = attn_session_position(s);
  attn_var *hidden =
      attn_decoder_hidden(g, s->model, &layout, s->tokens + layout.position, s->states, false);
  if (wants_logits && hidden) {
    attn_var *last = attn_view_slice(g, hidden, 0, count - 1, 1);
    attn_var *logits = attn_decoder_logits(g, s->model, last);
    attn_tensor target;
    if (logits) {
      attn_status status = attn_tensor_wrap(s->logits, ATTN_F32, 2, logits->value.shape, &target);
      if (status == ATTN_OK) status = attn_tensor_copy(&logits->value, &target);
      if (status != ATTN_OK) return status;
      s->has_logits = true;
    }
  }
  ATTN_TRY(attn_graph_status(g));
  for (int64_t l = 0; l < layers_of(s); ++l) attn_state_advance(s->states[l], count);
  return ATTN_OK;
}

/* Runs the tokens up to `end`, in pieces that stop where checkpoints are due. */
static attn_status run_to(attn_session *s, int64_t end) {
  while (attn_session_position(s) < end) {
    int64_t position = attn_session_position(s), spacing = s->options.checkpoint_spacing;
    int64_t stop = (position / spacing + 1) * spacing;
    if (!s->needs_checkpoints || stop > end) stop = end;
    if (stop > position + FEED_TOKENS) stop = position + FEED_TOKENS;
    ATTN_TRY(run(s, stop - position, stop == end));
    if (stop % spacing == 0) take_checkpoint(s);
  }
  return ATTN_OK;
}

/* Puts the state at the nearest checkpoint at or before `position` (or at no tokens). */
static void restore_checkpoint(attn_session *s, int64_t position) {
  int64_t i = s->checkpoint_count - 1;
  while (i >= 0 && s->checkpoints[i]->position > position) --i;
  for (int64_t l = 0; l < layers_of(s); ++l) {
    if (i >= 0)
      attn_state_assign(s->states[l], s->checkpoints[i]->states[l]);
    else
      attn_state_clear(s->states[l]);
  }
}

/* After a failure part of the layers may have moved on: goes back to `position` by replay, or to no
 * tokens at all when that fails too. The message of the first failure is kept. */
static attn_status recover(attn_session *s, int64_t position, attn_status status) {
  char first[512];
  strncpy(first, attn_error_message(), sizeof first - 1);
  first[sizeof first - 1] = 0;
  s->has_logits = false;
  restore_checkpoint(s, position);
  if (run_to(s, position) == ATTN_OK) return attn_fail(status, "%s", first);
  restore_checkpoint(s, -1);
  return attn_fail(status, "%s; the session has lost its tokens", first);
}

attn_status attn_session_feed(attn_session *session, const int32_t *tokens, int64_t count) {
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
  memmove(session->tokens + position, tokens, (size_t)count * sizeof *tokens);
  attn_status status = run_to(session, position + count);
  return status == ATTN_OK ? ATTN_OK : recover(session, position, status);
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
  for (int64_t l = 0; l < layers_of(session); ++l) total += attn_state_bytes(session->states[l]);
  return total;
}

/* Fork and rewind -------------------------------------------------------------------------------
 */

attn_status attn_session_fork(attn_session *session, attn_session **fork) {
  attn_session *child;
  ATTN_TRY(create_session(session->model, &session->options, session->states, &child));
  int64_t position = attn_session_position(session);
  for (int64_t l = 0; l < layers_of(session); ++l)
    attn_state_assign(child->states[l], session->states[l]);
  memcpy(child->tokens, session->tokens, (size_t)position * sizeof *child->tokens);
  memcpy(child->logits, session->logits,
         (size_t)session->model->config.vocabulary * sizeof *child->logits);
  child->has_logits = session->has_logits;
  for (int64_t i = 0; i < session->checkpoint_count; ++i) {
    child->checkpoints[i] = session->checkpoints[i];
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

static bool cut_all(attn_session *s, int64_t position) {
  if (s->needs_checkpoints) return false;
  for (int64_t l = 0; l < layers_of(s); ++l)
    if (!attn_state_cut(s->states[l], position)) return false;
  return true;
}

attn_status attn_session_rewind(attn_session *session, int64_t position) {
  int64_t now = attn_session_position(session);
  if (position < 0 || position > now)
    return attn_fail(ATTN_INVALID_ARGUMENT, "rewind: %lld is not in 0 to %lld", (long long)position,
                     (long long)now);
  if (position == now) return ATTN_OK;
  session->has_logits = false;
  while (session->checkpoint_count &&
         session->checkpoints[session->checkpoint_count - 1]->position > position)
    drop_checkpoint(session, session->checkpoint_count - 1);
  /* The last token is run again in any case: its logits belong to the result. */
  int64_t before = position ? position - 1 : 0;
  if (!cut_all(session, before)) restore_checkpoint(session, before);
  attn_status status = run_to(session, position);
  return status == ATTN_OK ? ATTN_OK : recover(session, position, status);
}

/* Save and restore ------------------------------------------------------------------------------
 */

/* The file: header, tokens, logits, each layer's state, checksum of all before it. Numbers are
 * little-endian, as in memory on every machine that libattn runs on. */
typedef struct session_header {
  char magic[8];
  uint64_t version;
  uint64_t model; /* fingerprint: a state fits no other */
  int64_t position, vocabulary, has_logits, compute;
} session_header;

static const char session_magic[8] = "attnses";
enum { SESSION_VERSION = 1 };

/* Names, shapes and a sample of the values of all parameters. */
static uint64_t fingerprint(const attn_model *model) {
  enum { SAMPLED_BYTES = 64 };
  uint64_t value = ATTN_HASH_START;
  for (int64_t i = 0; i < model->parameter_count; ++i) {
    const attn_parameter *p = &model->parameters[i];
    size_t size = (size_t)attn_tensor_count(&p->value) * attn_dtype_size(p->value.dtype);
    value = attn_hash(value, p->name, strlen(p->name));
    value = attn_hash(value, p->value.shape, (size_t)p->value.rank * sizeof *p->value.shape);
    value = attn_hash(value, p->value.data, size < SAMPLED_BYTES ? size : SAMPLED_BYTES);
  }
  return value;
}

static session_header make_header(const attn_session *s) {
  session_header header = {.version = SESSION_VERSION,
                           .model = fingerprint(s->model),
                           .position = attn_session_position(s),
                           .vocabulary = s->model->config.vocabulary,
                           .has_logits = s->has_logits,
                           .compute = s->model->compute};
  memcpy(header.magic, session_magic, sizeof header.magic);
  return header;
}

typedef struct hashing_writer {
  attn_file_writer *file;
  uint64_t hash;
} hashing_writer;

static attn_status write_hashed(void *context, const void *data, size_t size) {
  hashing_writer *writer = context;
  writer->hash = attn_hash(writer->hash, data, size);
  return attn_file_writer_write(writer->file, data, size);
}

static attn_status write_session(const attn_session *s, hashing_writer *w) {
  session_header header = make_header(s);
  ATTN_TRY(write_hashed(w, &header, sizeof header));
  ATTN_TRY(write_hashed(w, s->tokens, (size_t)header.position * sizeof *s->tokens));
  ATTN_TRY(write_hashed(w, s->logits, (size_t)header.vocabulary * sizeof *s->logits));
  for (int64_t l = 0; l < layers_of(s); ++l)
    ATTN_TRY(attn_state_save(s->states[l], write_hashed, w));
  uint64_t sum = w->hash;
  return attn_file_writer_write(w->file, &sum, sizeof sum);
}

attn_status attn_session_save(const attn_session *session, const char *path) {
  hashing_writer writer = {.hash = ATTN_HASH_START};
  ATTN_TRY(attn_file_writer_open(path, &writer.file));
  attn_status status = write_session(session, &writer);
  if (status == ATTN_OK) return attn_file_writer_commit(writer.file);
  attn_file_writer_abort(writer.file);
  return status;
}

typedef struct reader {
  const unsigned char *data;
  size_t left;
} reader;

static attn_status read_bytes(void *context, void *data, size_t size) {
  reader *r = context;
  if (size > r->left) return attn_fail(ATTN_BAD_FORMAT, "the session file is too short");
  memcpy(data, r->data, size);
  r->data += size;
  r->left -= size;
  return ATTN_OK;
}

static attn_status check_file(const attn_session *s, const attn_file_map *map,
                              session_header *header) {
  uint64_t sum;
  if (map->size < sizeof *header + sizeof sum)
    return attn_fail(ATTN_BAD_FORMAT, "too short for a session");
  memcpy(header, map->data, sizeof *header);
  memcpy(&sum, map->data + map->size - sizeof sum, sizeof sum);
  if (memcmp(header->magic, session_magic, sizeof header->magic) != 0)
    return attn_fail(ATTN_BAD_FORMAT, "not a session of libattn");
  if (header->version != SESSION_VERSION)
    return attn_fail(ATTN_BAD_FORMAT, "session version %llu, this library reads %d",
                     (unsigned long long)header->version, SESSION_VERSION);
  if (attn_hash(ATTN_HASH_START, map->data, map->size - sizeof sum) != sum)
    return attn_fail(ATTN_BAD_FORMAT, "the checksum is wrong: truncated or damaged");
  if (header->model != fingerprint(s->model) || header->vocabulary != s->model->config.vocabulary ||
      header->compute != (int64_t)s->model->compute)
    return attn_fail(ATTN_BAD_FORMAT, "the session belongs to another model or dtype");
  if (header->position < 0 || header->position > s->options.max_tokens)
    return attn_fail(ATTN_BAD_FORMAT, "%lld tokens do not fit a session of %lld",
                     (long long)header->position, (long long)s->options.max_tokens);
  return ATTN_OK;
}

static attn_status read_session(attn_session *s, const session_header *header, reader *r) {
  ATTN_TRY(read_bytes(r, s->tokens, (size_t)header->position * sizeof *s->tokens));
  ATTN_TRY(read_bytes(r, s->logits, (size_t)header->vocabulary * sizeof *s->logits));
  for (int64_t l = 0; l < layers_of(s); ++l) {
    ATTN_TRY(attn_state_restore(s->states[l], read_bytes, r));
    if (attn_state_position(s->states[l]) != header->position)
      return attn_fail(ATTN_BAD_FORMAT, "layer %lld is at another position", (long long)l);
  }
  s->has_logits = header->has_logits != 0;
  return ATTN_OK;
}

attn_status attn_session_restore(attn_session *session, const char *path) {
  attn_file_map map;
  session_header header;
  ATTN_TRY(attn_file_map_open(path, &map));
  attn_status status = check_file(session, &map, &header);
  if (status == ATTN_OK) {
    while (session->checkpoint_count) drop_checkpoint(session, session->checkpoint_count - 1);
    session->has_logits = false;
    reader r = {.data = map.data + sizeof header, .left = map.size - sizeof header - 8};
    status = read_session(session, &header, &r);
    if (status != ATTN_OK)
      restore_checkpoint(session, -1);
    else if (header.position)
      take_checkpoint(session);
  }
  attn_file_map_close(&map);
  return status == ATTN_OK ? ATTN_OK : attn_fail_in(status, "%s", path);
}
