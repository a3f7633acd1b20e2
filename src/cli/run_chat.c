/* attn run --chat: turns and answers.
 *
 * Every turn the whole chat is encoded anew, as the model's template has it, and the session goes
 * back to where its tokens part from that: what was said already is not read again. */
#include "cli/run.h"
#include "base/memory.h"
#include "base/io.h"

#include <errno.h>
#include <string.h>

typedef struct chat {
  runner *run;
  attn_message *messages; /* their contents are ours */
  int count, capacity;
} chat;

static attn_status add_message(chat *c, const char *role, const char *content) {
  if (c->count == c->capacity) {
    int capacity = c->capacity ? 2 * c->capacity : 16;
    attn_message *more = attn_realloc(c->messages, (size_t)capacity * sizeof *more);
    if (!more) return ATTN_OUT_OF_MEMORY;
    c->messages = more;
    c->capacity = capacity;
  }
  char *own = attn_strdup(content);
  if (!own) return ATTN_OUT_OF_MEMORY;
  c->messages[c->count++] = (attn_message){.role = role, .content = own};
  return ATTN_OK;
}

static void forget(chat *c) {
  for (int i = 0; i < c->count; ++i) attn_free((void *)(uintptr_t)c->messages[i].content);
  c->count = 0;
}

/* Brings the session to the end of `tokens`, reading only what it has not. */
static attn_status read_up_to(runner *r, const int32_t *tokens, int64_t count) {
  const int32_t *known = attn_session_tokens(r->session);
  int64_t position = attn_session_position(r->session), common = 0;
  while (common < position && common < count - 1 && known[common] == tokens[common]) ++common;
  if (common < position) ATTN_TRY(attn_session_rewind(r->session, common));
  r->token_count += count - common;
  attn_session_checkpoint(r->session); /* the turn may be written again */
  return run_feed(r, tokens + common, count - common);
}

static attn_status read_messages(chat *c) {
  runner *r = c->run;
  int64_t count = 0;
  ATTN_TRY(attn_model_encode_chat(r->model, c->messages, c->count, NULL, 0, &count));
  int32_t *tokens = attn_alloc_array((size_t)count + 1, sizeof *tokens);
  if (!tokens) return ATTN_OUT_OF_MEMORY;
  attn_status status =
      attn_model_encode_chat(r->model, c->messages, c->count, tokens, count, &count);
  if (status == ATTN_OK) status = read_up_to(r, tokens, count);
  attn_free(tokens);
  return status;
}

static attn_status answer(chat *c, const char *turn) {
  runner *r = c->run;
  ATTN_TRY(add_message(c, "user", turn));
  ATTN_TRY(read_messages(c));
  r->text.length = 0;
  ATTN_TRY(run_generate(r));
  attn_text_add(&r->text, "", 1); /* terminated */
  if (r->text.failed) return ATTN_OUT_OF_MEMORY;
  --r->text.length;
  return add_message(c, "assistant", r->text.data);
}

static attn_status begin(chat *c) {
  const char *system = c->run->options->system;
  forget(c);
  return system ? add_message(c, "system", system) : ATTN_OK;
}

/* A line without its end; false at the end of input. */
static bool read_line(attn_text *line) {
  int byte;
  line->length = 0;
  while ((byte = fgetc(stdin)) != EOF && byte != '\n') {
    char one = (char)byte;
    attn_text_add(line, &one, 1);
  }
  bool more = byte != EOF || line->length;
  attn_text_add(line, "", 1);
  return more && !line->failed && !attn_interrupted;
}

static attn_status converse(chat *c) {
  runner *r = c->run;
  bool terminal = attn_is_terminal(stdin);
  attn_text line = {0};
  attn_status status = ATTN_OK;
  if (terminal) fputs("/new begins anew, /quit or Ctrl-D ends.\n", stderr);
  while (status == ATTN_OK && r->stop != STOP_CONTEXT) {
    if (terminal) fputs("> ", stderr);
    if (!read_line(&line) || strcmp(line.data, "/quit") == 0) break;
    if (strcmp(line.data, "/new") == 0)
      status = begin(c);
    else if (line.data[0])
      status = answer(c, line.data);
    if (status == ATTN_OK && !r->options->json && !attn_is_terminal(stdout)) fputs("\n", stdout);
  }
  if (status == ATTN_OK && line.failed) status = ATTN_OUT_OF_MEMORY;
  attn_text_free(&line);
  return status;
}

attn_status run_chat(runner *r) {
  chat c = {.run = r};
  attn_status status = begin(&c);
  if (status == ATTN_OK) status = r->prompt ? answer(&c, r->prompt) : converse(&c);
  forget(&c);
  attn_free(c.messages);
  return status;
}
