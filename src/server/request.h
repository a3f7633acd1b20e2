/* The bodies of requests: bytes to a checked struct, or what is wrong with them. Nothing here knows
 * HTTP or the model.
 *
 * Fields are those of OpenAI's API; top_k, min_p, repetition_penalty and repetition_window are
 * those of attn_sampling besides. What is not offered is accepted where it asks for nothing
 * (n = 1, logprobs = false) and refused otherwise; a field that is unknown is refused. */
#ifndef ATTN_SERVER_REQUEST_H
#define ATTN_SERVER_REQUEST_H

#include "attn/text.h"
#include "server/stops.h"

#include <jansson.h>

typedef enum attn_request_kind {
  ATTN_REQUEST_CHAT = 1,
  ATTN_REQUEST_COMPLETION = 2,
  ATTN_REQUEST_EMBEDDINGS = 4
} attn_request_kind;

enum { ATTN_MOST_INPUTS = 2048 };

/* A text, or (text NULL) tokens. */
typedef struct attn_request_input {
  const char *text;
  size_t size;
  int32_t *tokens;
  int64_t token_count;
} attn_request_input;

typedef struct attn_request {
  json_t *json;      /* the strings below are its own */
  const char *model; /* NULL: not said */
  attn_message *messages;
  int message_count;
  attn_request_input *inputs; /* one prompt, or what to embed */
  int input_count;
  attn_sampling sampling;
  bool has_seed;
  int64_t most_tokens; /* to write; 0: not said */
  attn_stops stops;
  bool stream, include_usage;
} attn_request;

/* The first field that is wrong; "" when it is the body. */
enum { ATTN_FIELD_SIZE = 64 };

/* On failure nothing is left to be freed, and attn_error_message says what was expected:
 * ATTN_BAD_FORMAT or ATTN_INVALID_ARGUMENT for a value, ATTN_UNSUPPORTED for one that is right but
 * not offered, ATTN_OUT_OF_MEMORY. */
attn_status attn_request_parse(attn_request_kind kind, const char *body, size_t size,
                               attn_request *request, char field[ATTN_FIELD_SIZE]);
void attn_request_free(attn_request *request);

#endif
