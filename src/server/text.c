/* /v1/chat/completions and /v1/completions. */
#include "base/memory.h"
#include "base/status.h"
#include "server/exchange.h"

#include <stdlib.h>
#include <string.h>

enum {
  USUAL_TOKENS = 16, /* of a completion that does not say how many (OpenAI's number) */
  ALIVE_SECONDS = 15 /* of silence before a comment shows that the stream is alive */
};
static const double look_seconds = 0.1; /* between two looks whether the client is there */

/* The prompt ------------------------------------------------------------------------------------
 */

static attn_status encode(const attn_exchange *e, int32_t *tokens, int64_t capacity,
                          int64_t *count) {
  const attn_request *r = &e->request;
  const unsigned flags = ATTN_ENCODE_SPECIAL | ATTN_ENCODE_ENDS; /* as `attn run` reads a prompt */
  if (r->messages)
    return attn_model_encode_chat(e->server->model, r->messages, r->message_count, tokens, capacity,
                                  count);
  return attn_model_encode(e->server->model, r->inputs->text, r->inputs->size, flags, tokens,
                           capacity, count);
}

/* There are seldom more tokens than bytes, so that one pass does. */
static attn_status encode_text(attn_exchange *e, attn_job_spec *spec) {
  const attn_request *r = &e->request;
  int64_t capacity = 64 + (r->inputs ? (int64_t)r->inputs->size : 0), count = 0;
  for (int i = 0; i < r->message_count; ++i)
    capacity += 16 + (int64_t)strlen(r->messages[i].content);
  for (;;) {
    spec->tokens = attn_alloc_array((size_t)capacity, sizeof *spec->tokens);
    if (!spec->tokens) return ATTN_OUT_OF_MEMORY;
    ATTN_TRY(encode(e, spec->tokens, capacity, &count));
    spec->token_count = count;
    if (count <= capacity) return ATTN_OK;
    attn_free(spec->tokens);
    capacity = count;
  }
}

static attn_status take_prompt(attn_exchange *e, attn_job_spec *spec) {
  attn_request_input *input = e->request.inputs;
  if (!input || input->text) return encode_text(e, spec);
  spec->tokens = input->tokens;
  spec->token_count = input->token_count;
  input->tokens = NULL;
  return ATTN_OK;
}

static attn_status check_tokens(const attn_exchange *e, const attn_job_spec *spec) {
  attn_model_info info;
  ATTN_TRY(attn_model_get_info(e->server->model, &info));
  if (spec->token_count < 1) return attn_fail(ATTN_INVALID_ARGUMENT, "the prompt has no tokens");
  for (int64_t i = 0; i < spec->token_count; ++i)
    if (spec->tokens[i] < 0 || spec->tokens[i] >= info.vocabulary)
      return attn_fail(ATTN_INVALID_ARGUMENT,
                       "token %d of the prompt is not in the vocabulary: 0 to %lld",
                       spec->tokens[i], (long long)info.vocabulary - 1);
  return ATTN_OK;
}

/* How much may be written; refuses what does not fit the context. */
static void limit_text(attn_exchange *e, attn_job_spec *spec) {
  int64_t context = e->server->options.scheduler.context;
  int64_t room = context - spec->token_count, asked = e->request.most_tokens;
  int64_t usual = e->request.messages || room < USUAL_TOKENS ? room : USUAL_TOKENS;
  spec->most_tokens = asked ? asked : usual;
  if (room >= 1 && spec->most_tokens <= room) return;
  attn_refuse(e, MHD_HTTP_BAD_REQUEST, "context_length_exceeded",
              "the context has %lld tokens; the prompt has %lld, and %lld are asked for "
              "(--max-tokens)",
              (long long)context, (long long)spec->token_count, (long long)(asked ? asked : 1));
}

/* False when the request is refused. */
static bool make_spec(attn_exchange *e, attn_job_spec *spec) {
  attn_status status = take_prompt(e, spec);
  if (status == ATTN_OK) status = check_tokens(e, spec);
  if (status != ATTN_OK)
    attn_refuse_failed(e, status);
  else
    limit_text(e, spec);
  spec->sampling = e->request.sampling;
  if (!e->request.has_seed) spec->sampling.seed = attn_random_bits();
  spec->stops = e->request.stops;
  e->request.stops = (attn_stops){0};
  return !e->refusal.status;
}

static void refuse_admission(attn_exchange *e, attn_admission admission) {
  static const char *const codes[] = {[ATTN_QUEUE_FULL] = "queue_full",
                                      [ATTN_STOPPING] = "shutting_down",
                                      [ATTN_NO_MEMORY] = "out_of_memory"};
  static const char *const messages[] = {[ATTN_QUEUE_FULL] = "too many requests are waiting",
                                         [ATTN_STOPPING] = "the server is shutting down",
                                         [ATTN_NO_MEMORY] = "out of memory"};
  attn_refuse(e, MHD_HTTP_SERVICE_UNAVAILABLE, codes[admission], "%s", messages[admission]);
  e->refusal.header = MHD_HTTP_HEADER_RETRY_AFTER;
  e->refusal.value = "1";
}

/* False when the request is refused. */
static bool submit(attn_exchange *e) {
  attn_job_spec spec = {0};
  if (make_spec(e, &spec)) {
    attn_admission admission = attn_scheduler_submit(e->server->scheduler, &spec, &e->job);
    if (admission != ATTN_ADMITTED) refuse_admission(e, admission);
  }
  attn_free(spec.tokens);
  attn_stops_free(&spec.stops);
  return !e->refusal.status;
}

/* What is said of a job that came to no good end; false when it did. */
static bool refuse_end(attn_exchange *e, const attn_job_news *news) {
  if (news->end == ATTN_JOB_CANCELLED)
    refuse_admission(e, ATTN_STOPPING);
  else if (news->end == ATTN_JOB_FAILED)
    attn_refuse(e, MHD_HTTP_INTERNAL_SERVER_ERROR, NULL, "%s", news->message);
  return e->refusal.status != 0;
}

/* Whole answers ---------------------------------------------------------------------------------
 */

static enum MHD_Result answer_whole(attn_exchange *e) {
  attn_text text = {0};
  attn_job_news news;
  do news = attn_job_wait(e->job, look_seconds, &text);
  while (news.end == ATTN_JOB_RUNNING && !attn_client_is_gone(e));
  enum MHD_Result result = MHD_NO; /* nobody is there to be answered */
  if (news.end != ATTN_JOB_RUNNING && !refuse_end(e, &news))
    result = attn_send_json(e, MHD_HTTP_OK,
                            text.failed ? NULL : attn_answer_whole(&e->answer, &text, &news));
  attn_text_free(&text);
  return result;
}

/* Streams ---------------------------------------------------------------------------------------
 */

/* One server-sent event. Takes the reference. */
static void add_event(attn_exchange *e, json_t *json) {
  char *text = json ? json_dumps(json, JSON_COMPACT) : NULL;
  json_decref(json);
  if (text)
    attn_text_print(&e->events, "data: %s\n\n", text);
  else
    e->events.failed = true;
  free(text);
}

static void add_end(attn_exchange *e, const attn_job_news *news) {
  e->ended = true;
  if (refuse_end(e, news)) {
    add_event(e, attn_refusal_json(&e->refusal));
    return;
  }
  add_event(e, attn_answer_last(&e->answer, news));
  if (e->answer.include_usage) add_event(e, attn_answer_usage(&e->answer, news));
  attn_text_print(&e->events, "data: [DONE]\n\n");
}

/* Waits for the next events; false when the client has gone. */
static bool await_events(attn_exchange *e) {
  attn_text text = {0};
  attn_job_news news;
  double silence = 0;
  do {
    if (attn_client_is_gone(e)) return false;
    news = attn_job_wait(e->job, look_seconds, &text);
    silence += look_seconds;
  } while (news.end == ATTN_JOB_RUNNING && !text.length && silence < ALIVE_SECONDS);
  if (text.length) add_event(e, attn_answer_piece(&e->answer, &text));
  if (text.failed) e->events.failed = true;
  if (news.end != ATTN_JOB_RUNNING) add_end(e, &news);
  if (!e->events.length) attn_text_print(&e->events, ": alive\n\n");
  attn_text_free(&text);
  return !e->events.failed;
}

static ssize_t read_events(void *exchange, uint64_t position, char *buffer, size_t most) {
  attn_exchange *e = exchange;
  (void)position;
  if (e->sent == e->events.length) {
    if (e->ended) return MHD_CONTENT_READER_END_OF_STREAM;
    e->events.length = e->sent = 0;
    attn_set_patience(e, true);
    bool there = await_events(e);
    attn_set_patience(e, false);
    if (!there) return MHD_CONTENT_READER_END_WITH_ERROR;
  }
  size_t size = e->events.length - e->sent;
  if (size > most) size = most;
  memcpy(buffer, e->events.data + e->sent, size);
  e->sent += size;
  return (ssize_t)size;
}

static enum MHD_Result answer_stream(attn_exchange *e) {
  enum { BLOCK = 4096 };
  if (e->answer.chat) add_event(e, attn_answer_role(&e->answer));
  struct MHD_Response *response =
      MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, BLOCK, read_events, e, NULL);
  if (!response) return MHD_NO;
  MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE, "text/event-stream");
  MHD_add_response_header(response, "X-Accel-Buffering", "no"); /* nginx */
  return attn_send(e, MHD_HTTP_OK, response);
}

enum MHD_Result attn_answer_text(attn_exchange *e) {
  if (!attn_read_request(e)) return MHD_NO;
  attn_answer_begin(&e->answer, e->request.messages != NULL, e->server->options.model_name);
  e->answer.include_usage = e->request.include_usage && e->request.stream;
  if (!submit(e)) return MHD_NO;
  return e->request.stream ? answer_stream(e) : answer_whole(e);
}
