/* Inside a session: the live state of each layer, and checkpoints of it. session.c makes and feeds
 * sessions, session_file.c saves them, speculate.c, batch.c and prefix_cache.c build on them. */
#ifndef ATTN_MODELS_SESSION_H
#define ATTN_MODELS_SESSION_H

#include "graph/graph.h"
#include "models/model.h"
#include "models/token_step.h"

#include <stdatomic.h>

enum {
  ATTN_FEED_TOKENS = 512, /* rows that go through the layers at once: bounds the activations */
  ATTN_MOST_CHECKPOINTS = 256,
};

typedef struct attn_checkpoint {
  _Atomic int64_t users;
  int64_t position;
  attn_state **states; /* a layer each */
  float *logits; /* [vocabulary], where has_logits: else a way back reads the last token again */
  bool has_logits;
} attn_checkpoint;

struct attn_session {
  uint64_t number; /* its own, of all sessions that ever were */
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
  attn_checkpoint *checkpoints[ATTN_MOST_CHECKPOINTS]; /* ascending position */
  bool kept[ATTN_MOST_CHECKPOINTS]; /* which of them attn_session_checkpoint asked for */
  attn_checkpoint *spares[ATTN_MOST_CHECKPOINTS];
  attn_token_step step;  /* one token more, for this session and others with it */
  int64_t tokens_read;   /* in all, those read again counted */
  attn_checkpoint *mark; /* one more, where attn_session_mark was called last; NULL: never yet */
};

/* Whether `count` tokens may be fed; names what is wrong with them. */
attn_status attn_session_check_tokens(const attn_session *session, const int32_t *tokens,
                                      int64_t count);
/* Runs `count` tokens (at most ATTN_FEED_TOKENS) that stand behind the position already. Writes the
 * logits of the last `logit_rows` of them, [logit_rows, vocabulary], to `logits`. On an error the
 * states may have moved in part: attn_session_recover. */
attn_status attn_session_run(attn_session *session, int64_t count, int64_t logit_rows,
                             float *logits);
/* A checkpoint here, in place of the least useful one when there are enough; and one if one is due
 * at this position. */
void attn_session_take_checkpoint(attn_session *session);
void attn_session_after_tokens(attn_session *session);
/* Goes back to `position` after `status`, which it returns; the message of `status` is kept.
 * Whether session->logits still are those of `position` is for the caller to say. */
attn_status attn_session_recover(attn_session *session, int64_t position, bool logits_stand,
                                 attn_status status);
/* Remembers this place, for going back a few tokens whatever the mixers are. Costs a copy of the
 * recurrent states, nothing where all can be cut. */
attn_status attn_session_mark(attn_session *session);
/* Back to `position` without its logits. */
attn_status attn_session_retreat(attn_session *session, int64_t position);
/* A checkpoint of this place that belongs to the caller, who releases it; NULL is fine there. */
attn_status attn_session_make_checkpoint(const attn_session *session, attn_checkpoint **made);
void attn_session_release_checkpoint(const attn_session *session, attn_checkpoint *checkpoint);
/* Whether states of one may become states of the other. */
bool attn_session_is_related(const attn_session *a, const attn_session *b);
/* A session of the same family as `family` (pools and options are shared) that has read `count`
 * tokens, whose state is that of `checkpoint`, without logits. */
attn_status attn_session_create_at(const attn_session *family, const int32_t *tokens, int64_t count,
                                   attn_checkpoint *checkpoint, attn_session **session);
/* The tokens of a session's file, if it is one of this session's model that would fit; to be freed
 * by attn_free. The state is not looked at. */
attn_status attn_session_read_tokens(const attn_session *session, const char *path,
                                     int32_t **tokens, int64_t *count);
/* Leaves no tokens and no checkpoints. */
void attn_session_clear(attn_session *session);

static inline int64_t attn_session_layers(const attn_session *session) {
  return session->model->config.layer_count;
}

#endif
