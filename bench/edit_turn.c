/* Editing the last turn of a long conversation:
 *
 *   bench_edit_turn MODEL [TOKENS [THREADS]]
 *
 * A session reads TOKENS (32768) tokens in turns of 300 to 700, asking for a checkpoint at the end
 * of each; then the last turn is replaced by another, for which the session goes back. Prints how
 * many tokens were read again besides the new turn, how long the next token took, and whether it is
 * the one, and its logits those, of a fresh session that reads everything. In float32. */
#include "attn/model.h"
#include "base/io.h"
#include "engines/plan.h"
#include "models/session.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { NEW_TURN = 120, SPACING = 256 };

static void must(attn_status status) {
  if (status == ATTN_OK) return;
  fprintf(stderr, "bench_edit_turn: %s: %s\n", attn_status_name(status), attn_error_message());
  exit(1);
}

static int32_t token_at(int64_t i, int64_t vocabulary) {
  uint64_t x = (uint64_t)i * 0x9e3779b97f4a7c15u;
  return (int32_t)((x >> 33) % (uint64_t)vocabulary);
}

static attn_session *make_session(const attn_model *model, int64_t tokens) {
  attn_session_options options = ATTN_SESSION_OPTIONS_INIT;
  attn_session *session;
  options.max_tokens = tokens + 2 * NEW_TURN;
  options.checkpoint_spacing = SPACING;
  must(attn_session_create(model, &options, &session));
  return session;
}

/* Reads the turns; gives where the last one begins. */
static int64_t converse(attn_session *session, const int32_t *tokens, int64_t count) {
  int64_t last = 0;
  for (int64_t at = 0, turn = 0; at < count; ++turn) {
    int64_t length = 300 + turn * 37 % 400;
    if (length > count - at || count - at - length < 300) length = count - at;
    attn_session_checkpoint(session);
    last = at;
    must(attn_session_feed(session, tokens + at, length));
    at += length;
  }
  return last;
}

static int64_t greatest(const float *logits, int64_t count) {
  int64_t best = 0;
  for (int64_t i = 1; i < count; ++i)
    if (logits[i] > logits[best]) best = i;
  return best;
}

static double difference(const float *a, const float *b, int64_t count) {
  double error = 0, norm = 0;
  for (int64_t i = 0; i < count; ++i) {
    error += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
    norm += (double)b[i] * (double)b[i];
  }
  return sqrt(error / norm);
}

int main(int argc, char **argv) {
  if (argc < 2) {
    fprintf(stderr, "usage: bench_edit_turn MODEL [TOKENS [THREADS]]\n");
    return 2;
  }
  int64_t count = argc > 2 ? atoll(argv[2]) : 32768;
  must(attn_set_threads(argc > 3 ? atoi(argv[3]) : 0));
  attn_model *model;
  attn_model_info info;
  must(attn_model_load(argv[1], ATTN_F32, &model));
  must(attn_model_get_info(model, &info));
  int32_t *tokens = malloc((size_t)(count + 2 * NEW_TURN) * sizeof *tokens);
  if (!tokens) return 1;
  for (int64_t i = 0; i < count; ++i) tokens[i] = token_at(i, info.vocabulary);
  attn_session *session = make_session(model, count), *fresh = make_session(model, count);
  double start = attn_seconds();
  int64_t turn = converse(session, tokens, count);
  double read = attn_seconds() - start;

  for (int64_t i = 0; i < NEW_TURN; ++i)
    tokens[turn + i] = token_at(7 * i + 1, info.vocabulary); /* another text */
  int64_t before = session->tokens_read;
  start = attn_seconds();
  must(attn_session_rewind(session, turn));
  must(attn_session_feed(session, tokens + turn, NEW_TURN));
  double edited = attn_seconds() - start;
  int64_t again = session->tokens_read - before - NEW_TURN;

  start = attn_seconds();
  must(attn_session_feed(fresh, tokens, turn + NEW_TURN));
  double anew = attn_seconds() - start;
  const float *a = attn_session_logits(session), *b = attn_session_logits(fresh);
  bool same = greatest(a, info.vocabulary) == greatest(b, info.vocabulary);
  printf(
      "%s: %lld tokens read in %.2f s; the last turn edited at %lld: %lld tokens read again, next "
      "token after %.4f s (from the start: %.2f s); %s token, logits within %.1e\n",
      info.type, (long long)count, read, (long long)turn, (long long)again, edited, anew,
      same ? "the same" : "ANOTHER", difference(a, b, info.vocabulary));
  attn_session_destroy(session);
  attn_session_destroy(fresh);
  attn_model_destroy(model);
  free(tokens);
  return same && again <= SPACING ? 0 : 1;
}
