#include "server/request.h"
#include "base/memory.h"
#include "base/status.h"
#include "files/json.h"

#include <stdio.h>
#include <string.h>

enum { MOST_TOKENS = INT32_MAX };

static attn_status refuse(const char *name) {
  return attn_fail(ATTN_UNSUPPORTED, "\"%s\" is not offered: leave it out", name);
}

static attn_status expect(const char *name, const char *expected) {
  return attn_fail(ATTN_BAD_FORMAT, "\"%s\": expected %s", name, expected);
}

/* Names that are close are looked for, which takes time: not for a body of nothing but names. */
static attn_status check_names(const json_t *object, const char *const *known, int count) {
  enum { MOST_NAMES = 100 };
  char unknown[256];
  if (json_object_size(object) > MOST_NAMES)
    return attn_fail(ATTN_BAD_FORMAT, "more than %d fields", MOST_NAMES);
  if (!attn_json_unknown(object, known, count, unknown, sizeof unknown)) return ATTN_OK;
  return attn_fail(ATTN_BAD_FORMAT, "unknown: %s", unknown);
}

/* Strings and tokens ----------------------------------------------------------------------------
 */

/* The text of a content: a string, or parts that are all text. The copy is the caller's. */
static attn_status read_content(const json_t *content, char **text) {
  attn_text joined = {0};
  if (json_is_string(content)) {
    *text = attn_strdup(json_string_value(content));
    return *text ? ATTN_OK : ATTN_OUT_OF_MEMORY;
  }
  if (!json_is_array(content)) return expect("content", "a string or an array of text parts");
  for (size_t i = 0; i < json_array_size(content); ++i) {
    const json_t *part = json_array_get(content, i);
    const json_t *string = json_object_get(part, "text");
    const char *type = json_string_value(json_object_get(part, "type"));
    if (!type || strcmp(type, "text") != 0 || !json_is_string(string)) {
      attn_text_free(&joined);
      return attn_fail(ATTN_UNSUPPORTED,
                       "\"content\": part %zu is not {\"type\": \"text\", \"text\": ...}", i);
    }
    attn_text_add(&joined, json_string_value(string), json_string_length(string));
  }
  return attn_text_take(&joined, text);
}

static bool is_token(const json_t *value) {
  return json_is_integer(value) && json_integer_value(value) >= 0 &&
         json_integer_value(value) <= INT32_MAX;
}

static attn_status read_tokens(const char *name, const json_t *array, attn_request_input *input) {
  size_t count = json_array_size(array);
  int32_t *tokens = attn_alloc_array(count + 1, sizeof *tokens);
  if (!tokens) return ATTN_OUT_OF_MEMORY;
  for (size_t i = 0; i < count; ++i) {
    const json_t *token = json_array_get(array, i);
    if (!is_token(token)) {
      attn_free(tokens);
      return attn_fail(ATTN_BAD_FORMAT, "\"%s\": item %zu is not a token", name, i);
    }
    tokens[i] = (int32_t)json_integer_value(token);
  }
  *input = (attn_request_input){.tokens = tokens, .token_count = (int64_t)count};
  return ATTN_OK;
}

static attn_status read_input(const char *name, const json_t *value, attn_request_input *input) {
  if (json_is_array(value)) return read_tokens(name, value, input);
  if (!json_is_string(value)) return expect(name, "a string, strings or tokens");
  *input =
      (attn_request_input){.text = json_string_value(value), .size = json_string_length(value)};
  return ATTN_OK;
}

/* Fields ----------------------------------------------------------------------------------------
 */

typedef attn_status field_reader(attn_request *r, const char *name, const json_t *value);

static attn_status read_model(attn_request *r, const char *name, const json_t *value) {
  (void)value;
  return attn_json_string(r->json, name, ATTN_OPTIONAL, &r->model);
}

/* "developer" is OpenAI's newer word for "system". */
static const char *role_of(const json_t *message) {
  static const char *const roles[][2] = {
      {"system", "system"}, {"developer", "system"}, {"user", "user"}, {"assistant", "assistant"}};
  const char *role = json_string_value(json_object_get(message, "role"));
  for (int i = 0; role && i < 4; ++i)
    if (strcmp(role, roles[i][0]) == 0) return roles[i][1];
  return NULL;
}

/* null, false, "", [] and {}: a field that asks for nothing. */
static bool is_empty(const json_t *value) {
  return json_is_null(value) || json_is_false(value) ||
         (json_is_string(value) && json_string_length(value) == 0) ||
         (json_is_array(value) && json_array_size(value) == 0) ||
         (json_is_object(value) && json_object_size(value) == 0);
}

/* A message of an assistant comes back with what it was sent with: empty fields are fine. */
static attn_status check_message(const json_t *message) {
  static const char *const known[] = {"role", "content", "name"};
  const char *key;
  json_t *value;
  json_object_foreach((json_t *)(uintptr_t)message, key, value) {
    bool is_known = false;
    for (int i = 0; i < 3; ++i) is_known |= strcmp(key, known[i]) == 0;
    if (!is_known && !is_empty(value)) return refuse(key);
  }
  return ATTN_OK;
}

static attn_status read_message(const json_t *json, attn_message *message) {
  char *content;
  if (!json_is_object(json)) return expect("messages", "objects");
  ATTN_TRY(check_message(json));
  message->role = role_of(json);
  if (!message->role) return expect("role", "system, developer, user or assistant");
  ATTN_TRY(read_content(json_object_get(json, "content"), &content));
  message->content = content;
  return ATTN_OK;
}

static attn_status read_messages(attn_request *r, const char *name, const json_t *value) {
  size_t count = json_array_size(value);
  if (count == 0 || count > INT32_MAX) return expect(name, "an array of at least one message");
  r->messages = attn_alloc_array(count, sizeof *r->messages);
  if (!r->messages) return ATTN_OUT_OF_MEMORY;
  for (size_t i = 0; i < count; ++i, ++r->message_count) {
    attn_status status = read_message(json_array_get(value, i), &r->messages[i]);
    if (status != ATTN_OK) return attn_fail_in(status, "message %zu", i);
  }
  return ATTN_OK;
}

/* A string, tokens, or an array of those. */
static attn_status read_inputs(attn_request *r, const char *name, const json_t *value) {
  const json_t *first = json_array_get(value, 0);
  bool many = json_is_string(first) || json_is_array(first);
  size_t count = many ? json_array_size(value) : 1;
  if (count > ATTN_MOST_INPUTS)
    return attn_fail(ATTN_INVALID_ARGUMENT, "\"%s\" has %zu items, expected at most %d", name,
                     count, ATTN_MOST_INPUTS);
  r->inputs = attn_alloc_array(count, sizeof *r->inputs);
  if (!r->inputs) return ATTN_OUT_OF_MEMORY;
  for (size_t i = 0; i < count; ++i, ++r->input_count)
    ATTN_TRY(read_input(name, many ? json_array_get(value, i) : value, &r->inputs[i]));
  return ATTN_OK;
}

static attn_status read_prompt(attn_request *r, const char *name, const json_t *value) {
  ATTN_TRY(read_inputs(r, name, value));
  if (r->input_count == 1) return ATTN_OK;
  return attn_fail(ATTN_UNSUPPORTED, "\"%s\": one prompt a request, found %d", name,
                   r->input_count);
}

static attn_status read_most_tokens(attn_request *r, const char *name, const json_t *value) {
  (void)value;
  return attn_json_int(r->json, name, ATTN_OPTIONAL, 1, MOST_TOKENS, &r->most_tokens);
}

static attn_status read_temperature(attn_request *r, const char *name, const json_t *value) {
  (void)value;
  return attn_json_double(r->json, name, ATTN_OPTIONAL, 0, 2, &r->sampling.temperature);
}

/* 0 is what OpenAI allows: only the likeliest token. */
static attn_status read_top_p(attn_request *r, const char *name, const json_t *value) {
  const double least = 1e-9;
  (void)value;
  ATTN_TRY(attn_json_double(r->json, name, ATTN_OPTIONAL, 0, 1, &r->sampling.top_p));
  if (r->sampling.top_p < least) r->sampling.top_p = least;
  return ATTN_OK;
}

static attn_status read_top_k(attn_request *r, const char *name, const json_t *value) {
  (void)value;
  return attn_json_int(r->json, name, ATTN_OPTIONAL, 0, INT32_MAX, &r->sampling.top_k);
}

static attn_status read_min_p(attn_request *r, const char *name, const json_t *value) {
  (void)value;
  return attn_json_double(r->json, name, ATTN_OPTIONAL, 0, 1, &r->sampling.min_p);
}

static attn_status read_penalty(attn_request *r, const char *name, const json_t *value) {
  (void)value;
  return attn_json_double(r->json, name, ATTN_OPTIONAL, 1e-3, 1e3, &r->sampling.repetition_penalty);
}

static attn_status read_window(attn_request *r, const char *name, const json_t *value) {
  (void)value;
  return attn_json_int(r->json, name, ATTN_OPTIONAL, 0, INT32_MAX, &r->sampling.repetition_window);
}

static attn_status read_seed(attn_request *r, const char *name, const json_t *value) {
  int64_t seed = 0;
  ATTN_TRY(attn_json_int(r->json, name, ATTN_OPTIONAL, INT64_MIN, INT64_MAX, &seed));
  r->sampling.seed = (uint64_t)seed;
  r->has_seed = !json_is_null(value);
  return ATTN_OK;
}

static attn_status read_stop(attn_request *r, const char *name, const json_t *value) {
  size_t count = json_is_array(value) ? json_array_size(value) : 1;
  for (size_t i = 0; i < count && !json_is_null(value); ++i) {
    const json_t *item = json_is_array(value) ? json_array_get(value, i) : value;
    if (!json_is_string(item)) return expect(name, "a string, or up to 4 of them");
    ATTN_TRY(attn_stops_add(&r->stops, json_string_value(item)));
  }
  return ATTN_OK;
}

static attn_status read_stream(attn_request *r, const char *name, const json_t *value) {
  (void)value;
  return attn_json_bool(r->json, name, ATTN_OPTIONAL, &r->stream);
}

static attn_status read_stream_options(attn_request *r, const char *name, const json_t *value) {
  static const char *const known[] = {"include_usage"};
  json_t *options = NULL;
  (void)value;
  ATTN_TRY(attn_json_object(r->json, name, ATTN_OPTIONAL, &options));
  if (!options) return ATTN_OK;
  ATTN_TRY(check_names(options, known, 1));
  return attn_json_bool(options, known[0], ATTN_OPTIONAL, &r->include_usage);
}

/* {"type": "text"} is how answers are written anyway. */
static attn_status read_format(attn_request *r, const char *name, const json_t *value) {
  (void)r;
  const char *type = json_string_value(json_object_get(value, "type"));
  return is_empty(value) || (type && strcmp(type, "text") == 0) ? ATTN_OK : refuse(name);
}

static attn_status read_encoding(attn_request *r, const char *name, const json_t *value) {
  static const char *const names[] = {"float"};
  int choice = 0;
  (void)value;
  return attn_json_choice(r->json, name, ATTN_OPTIONAL, names, 1, &choice);
}

static attn_status expect_one(attn_request *r, const char *name, const json_t *value) {
  (void)r;
  return json_is_null(value) || (json_is_integer(value) && json_integer_value(value) == 1)
             ? ATTN_OK
             : attn_fail(ATTN_UNSUPPORTED, "\"%s\": only 1 is offered", name);
}

static attn_status expect_zero(attn_request *r, const char *name, const json_t *value) {
  (void)r;
  return json_is_null(value) || (json_is_number(value) && json_number_value(value) == 0)
             ? ATTN_OK
             : attn_fail(ATTN_UNSUPPORTED, "\"%s\": only 0 is offered; see repetition_penalty",
                         name);
}

static attn_status expect_empty(attn_request *r, const char *name, const json_t *value) {
  (void)r;
  return is_empty(value) ? ATTN_OK : refuse(name);
}

/* What concerns a service with accounts. */
static attn_status pass_over(attn_request *r, const char *name, const json_t *value) {
  (void)r;
  (void)name;
  (void)value;
  return ATTN_OK;
}

/* The body --------------------------------------------------------------------------------------
 */

enum {
  CHAT = ATTN_REQUEST_CHAT,
  COMPLETION = ATTN_REQUEST_COMPLETION,
  EMBEDDINGS = ATTN_REQUEST_EMBEDDINGS,
  TEXT = CHAT | COMPLETION,
  ALL = TEXT | EMBEDDINGS
};

typedef struct field {
  const char *name;
  unsigned kinds, required; /* of which kinds of request */
  field_reader *read;
} field;

static const field fields[] = {
    {"model", ALL, 0, read_model},
    {"messages", CHAT, CHAT, read_messages},
    {"prompt", COMPLETION, COMPLETION, read_prompt},
    {"input", EMBEDDINGS, EMBEDDINGS, read_inputs},
    {"encoding_format", EMBEDDINGS, 0, read_encoding},
    {"dimensions", EMBEDDINGS, 0, expect_empty},
    {"max_tokens", TEXT, 0, read_most_tokens},
    {"max_completion_tokens", CHAT, 0, read_most_tokens}, /* after the older name: it counts */
    {"temperature", TEXT, 0, read_temperature},
    {"top_p", TEXT, 0, read_top_p},
    {"top_k", TEXT, 0, read_top_k},
    {"min_p", TEXT, 0, read_min_p},
    {"repetition_penalty", TEXT, 0, read_penalty},
    {"repetition_window", TEXT, 0, read_window},
    {"frequency_penalty", TEXT, 0, expect_zero},
    {"presence_penalty", TEXT, 0, expect_zero},
    {"seed", TEXT, 0, read_seed},
    {"stop", TEXT, 0, read_stop},
    {"stream", TEXT, 0, read_stream},
    {"stream_options", TEXT, 0, read_stream_options},
    {"n", TEXT, 0, expect_one},
    {"best_of", COMPLETION, 0, expect_one},
    {"echo", COMPLETION, 0, expect_empty},
    {"suffix", COMPLETION, 0, expect_empty},
    {"logprobs", TEXT, 0, expect_empty},
    {"top_logprobs", CHAT, 0, expect_empty},
    {"logit_bias", TEXT, 0, expect_empty},
    {"response_format", CHAT, 0, read_format},
    {"tools", CHAT, 0, expect_empty},
    {"functions", CHAT, 0, expect_empty},
    {"tool_choice", CHAT, 0, pass_over}, /* without tools there is no choice */
    {"parallel_tool_calls", CHAT, 0, pass_over},
    {"user", ALL, 0, pass_over},
    {"metadata", TEXT, 0, pass_over},
    {"store", CHAT, 0, pass_over},
    {"service_tier", CHAT, 0, pass_over},
    {"safety_identifier", CHAT, 0, pass_over},
    {"prompt_cache_key", CHAT, 0, pass_over},
};
enum { FIELDS = sizeof fields / sizeof *fields };

static void name_field(char name[ATTN_FIELD_SIZE], const char *text) {
  snprintf(name, ATTN_FIELD_SIZE, "%s", text);
}

static attn_status read_fields(attn_request_kind kind, attn_request *r, char *name) {
  for (int i = 0; i < FIELDS; ++i) {
    const field *f = &fields[i];
    const json_t *value = json_object_get(r->json, f->name);
    if (!(f->kinds & kind)) continue;
    name_field(name, f->name);
    if (value)
      ATTN_TRY(f->read(r, f->name, value));
    else if (f->required & kind)
      return attn_fail(ATTN_BAD_FORMAT, "\"%s\" is missing", f->name);
  }
  return ATTN_OK;
}

static attn_status refuse_unknown(attn_request_kind kind, const attn_request *r, char *name) {
  const char *known[FIELDS];
  int count = 0;
  for (int i = 0; i < FIELDS; ++i)
    if (fields[i].kinds & kind) known[count++] = fields[i].name;
  name_field(name, "");
  return check_names(r->json, known, count);
}

static attn_status parse(attn_request_kind kind, const char *body, size_t size, attn_request *r,
                         char *name) {
  name_field(name, "");
  ATTN_TRY(attn_json_parse(body, size, "the body", &r->json));
  ATTN_TRY(read_fields(kind, r, name));
  return refuse_unknown(kind, r, name);
}

attn_status attn_request_parse(attn_request_kind kind, const char *body, size_t size,
                               attn_request *request, char name[ATTN_FIELD_SIZE]) {
  *request = (attn_request){.sampling = ATTN_SAMPLING_INIT};
  attn_status status = parse(kind, body, size, request, name);
  if (status != ATTN_OK) attn_request_free(request);
  return status;
}

void attn_request_free(attn_request *request) {
  for (int i = 0; i < request->message_count; ++i)
    attn_free((void *)(uintptr_t)request->messages[i].content);
  for (int i = 0; i < request->input_count; ++i) attn_free(request->inputs[i].tokens);
  attn_free(request->messages);
  attn_free(request->inputs);
  attn_stops_free(&request->stops);
  json_decref(request->json);
  *request = (attn_request){0};
}
