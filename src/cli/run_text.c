/* Writing what a model says, as it is sampled. */
#include "cli/run.h"
#include "base/memory.h"

#include <errno.h>
#include <string.h>

enum {
  USUAL_TOKEN = 256,  /* bytes at most */
  FEED_TOKENS = 4096, /* between two looks at Ctrl-C */
  MOST_AT_ONCE = 8,   /* of a step of speculation */
};

static attn_status write_pending(runner *r) {
  if (r->pending.failed || r->text.failed) return ATTN_OUT_OF_MEMORY;
  if (!r->pending.length) return ATTN_OK;
  if (r->options->json || r->options->chat)
    attn_text_add(&r->text, r->pending.data, r->pending.length);
  if (!r->options->json &&
      (fwrite(r->pending.data, 1, r->pending.length, stdout) < r->pending.length ||
       fflush(stdout) != 0))
    return attn_fail(ATTN_IO_ERROR, "cannot write to standard output: %s", strerror(errno));
  r->pending.length = 0;
  return ATTN_OK;
}

attn_status run_write_bytes(runner *r, const char *bytes, size_t size) {
  for (size_t i = 0; i < size; ++i) attn_utf8_push(&r->utf8, (unsigned char)bytes[i], &r->pending);
  return write_pending(r);
}

static attn_status write_token(runner *r, int32_t token) {
  char some[USUAL_TOKEN], *bytes = some;
  size_t size = 0;
  const unsigned flags = ATTN_DECODE_SKIP_SPECIAL;
  ATTN_TRY(attn_model_decode(r->model, &token, 1, flags, some, sizeof some, &size));
  if (size > sizeof some) {
    bytes = attn_alloc(size);
    if (!bytes) return ATTN_OUT_OF_MEMORY;
    ATTN_TRY(attn_model_decode(r->model, &token, 1, flags, bytes, size, &size));
  }
  attn_status status = run_write_bytes(r, bytes, size);
  if (bytes != some) attn_free(bytes);
  return status;
}

attn_status run_feed(runner *r, const int32_t *tokens, int64_t count) {
  double start = attn_now();
  for (int64_t first = 0; first < count && !attn_interrupted; first += FEED_TOKENS) {
    int64_t more = count - first < FEED_TOKENS ? count - first : FEED_TOKENS;
    ATTN_TRY(attn_session_feed(r->session, tokens + first, more));
  }
  r->prompt_seconds += attn_now() - start;
  return ATTN_OK;
}

static int64_t room(const runner *r) {
  int64_t most = r->options->max_context;
  return most ? most - attn_session_position(r->session) : INT64_MAX;
}

static bool ends(const runner *r, int32_t token) {
  return attn_model_is_end(r->model, token) && !r->options->ignore_end;
}

/* Samples, writes and feeds one token. */
static attn_status one_token(runner *r) {
  int32_t token;
  ATTN_TRY(attn_session_sample(r->session, &r->sampling, &token));
  if (ends(r, token)) {
    r->stop = STOP_END;
    return ATTN_OK;
  }
  ATTN_TRY(write_token(r, token));
  ATTN_TRY(attn_session_feed(r->session, &token, 1));
  r->generated += 1;
  return ATTN_OK;
}

/* The same of up to `most` tokens at once. One that ends the text is taken back: it was not read
 * without speculation. */
static attn_status some_tokens(runner *r, int64_t most) {
  int32_t tokens[MOST_AT_ONCE];
  int64_t count;
  if (most > MOST_AT_ONCE) most = MOST_AT_ONCE;
  ATTN_TRY(attn_speculator_step(r->speculator, &r->sampling, most, tokens, &count));
  for (int64_t i = 0; i < count; ++i) {
    if (ends(r, tokens[i])) {
      r->stop = STOP_END;
      return attn_session_rewind(r->session, attn_session_position(r->session) - 1);
    }
    ATTN_TRY(write_token(r, tokens[i]));
    r->generated += 1;
  }
  return ATTN_OK;
}

attn_status run_generate(runner *r) {
  double start = attn_now();
  attn_status status = ATTN_OK;
  int64_t end = r->generated + r->most_tokens;
  r->stop = STOP_LENGTH;
  while (status == ATTN_OK && r->stop == STOP_LENGTH && r->generated < end && !attn_interrupted) {
    int64_t most = end - r->generated, left = room(r);
    if (left <= 0)
      r->stop = STOP_CONTEXT;
    else
      status = r->speculator ? some_tokens(r, most < left ? most : left) : one_token(r);
  }
  r->text_seconds += attn_now() - start;
  if (status != ATTN_OK) return status;
  if (attn_interrupted) r->stop = STOP_INTERRUPTED;
  attn_utf8_finish(&r->utf8, &r->pending);
  if (!r->options->json && attn_is_terminal(stdout)) attn_text_add(&r->pending, "\n", 1);
  return write_pending(r);
}
