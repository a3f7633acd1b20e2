#include "server/answer.h"

#include <stdio.h>
#include <sys/random.h>
#include <time.h>

uint64_t attn_random_bits(void) {
  uint64_t bits = 0;
  if (getrandom(&bits, sizeof bits, 0) != (ssize_t)sizeof bits) bits ^= (uint64_t)time(NULL);
  return bits;
}

void attn_answer_begin(attn_answer *answer, bool chat, const char *model) {
  answer->chat = chat;
  answer->created = (int64_t)time(NULL);
  answer->model = model;
  snprintf(answer->id, sizeof answer->id, "%s-%016llx", chat ? "chatcmpl" : "cmpl",
           (unsigned long long)attn_random_bits());
}

static json_t *string_of(const attn_text *text) {
  return json_stringn(text->length ? text->data : "", text->length);
}

static json_t *finish_reason(attn_job_end end) {
  return end == ATTN_JOB_STOP     ? json_string("stop")
         : end == ATTN_JOB_LENGTH ? json_string("length")
                                  : json_null();
}

static json_t *usage(const attn_job_news *news) {
  json_int_t prompt = news->prompt_tokens, text = news->text_tokens;
  return json_pack("{s:I, s:I, s:I, s:{s:I}}", "prompt_tokens", prompt, "completion_tokens", text,
                   "total_tokens", prompt + text, "prompt_tokens_details", "cached_tokens",
                   (json_int_t)news->reused_tokens);
}

/* Takes the choices. */
static json_t *envelope(const attn_answer *a, const char *object, json_t *choices) {
  return json_pack("{s:s, s:s, s:I, s:s, s:o}", "id", a->id, "object", object, "created",
                   (json_int_t)a->created, "model", a->model, "choices", choices);
}

json_t *attn_answer_whole(const attn_answer *a, const attn_text *text, const attn_job_news *news) {
  json_t *choice = a->chat ? json_pack("{s:i, s:{s:s, s:o}, s:o, s:n}", "index", 0, "message",
                                       "role", "assistant", "content", string_of(text),
                                       "finish_reason", finish_reason(news->end), "logprobs")
                           : json_pack("{s:i, s:o, s:o, s:n}", "index", 0, "text", string_of(text),
                                       "finish_reason", finish_reason(news->end), "logprobs");
  json_t *whole =
      envelope(a, a->chat ? "chat.completion" : "text_completion", json_pack("[o]", choice));
  if (whole) json_object_set_new(whole, "usage", usage(news));
  return whole;
}

/* Takes the choices. Where counts come at the end, the others say that they have none. */
static json_t *chunk(const attn_answer *a, json_t *choices) {
  json_t *json = envelope(a, a->chat ? "chat.completion.chunk" : "text_completion", choices);
  if (json && a->include_usage) json_object_set_new(json, "usage", json_null());
  return json;
}

static json_t *choice(const attn_answer *a, json_t *content, json_t *finish) {
  return json_pack("[{s:i, s:o, s:o, s:n}]", "index", 0, a->chat ? "delta" : "text", content,
                   "finish_reason", finish, "logprobs");
}

json_t *attn_answer_role(const attn_answer *a) {
  json_t *delta = json_pack("{s:s, s:s}", "role", "assistant", "content", "");
  return chunk(a, choice(a, delta, json_null()));
}

json_t *attn_answer_piece(const attn_answer *a, const attn_text *text) {
  json_t *content = string_of(text);
  if (a->chat) content = json_pack("{s:o}", "content", content);
  return chunk(a, choice(a, content, json_null()));
}

json_t *attn_answer_last(const attn_answer *a, const attn_job_news *news) {
  json_t *content = a->chat ? json_object() : json_string("");
  return chunk(a, choice(a, content, finish_reason(news->end)));
}

json_t *attn_answer_usage(const attn_answer *a, const attn_job_news *news) {
  json_t *json = chunk(a, json_array());
  if (json) json_object_set_new(json, "usage", usage(news));
  return json;
}
