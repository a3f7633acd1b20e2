/* Sending: JSON, refusals in OpenAI's shape, and the headers that every answer has. */
#include "base/status.h"
#include "server/exchange.h"

#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *attn_header(const attn_exchange *e, const char *name) {
  return MHD_lookup_connection_value(e->connection, MHD_HEADER_KIND, name);
}

void attn_refuse(attn_exchange *e, unsigned status, const char *code, const char *format, ...) {
  attn_refusal *r = &e->refusal;
  va_list arguments;
  *r = (attn_refusal){.status = status, .code = code};
  va_start(arguments, format);
  vsnprintf(r->message, sizeof r->message, format, arguments);
  va_end(arguments);
}

void attn_refuse_failed(attn_exchange *e, attn_status status) {
  const char *message = attn_error_message();
  if (!message[0]) message = attn_status_name(status);
  switch (status) {
  case ATTN_INVALID_ARGUMENT:
  case ATTN_INVALID_SHAPE:
  case ATTN_BAD_FORMAT: attn_refuse(e, MHD_HTTP_BAD_REQUEST, NULL, "%s", message); break;
  case ATTN_UNSUPPORTED: attn_refuse(e, MHD_HTTP_BAD_REQUEST, "unsupported", "%s", message); break;
  case ATTN_OUT_OF_MEMORY:
    attn_refuse(e, MHD_HTTP_SERVICE_UNAVAILABLE, "out_of_memory", "%s", message);
    break;
  default: attn_refuse(e, MHD_HTTP_INTERNAL_SERVER_ERROR, NULL, "%s", message); break;
  }
}

/* A message may quote what the client sent, cut off inside a character. */
static json_t *message_of(const attn_refusal *r) {
  json_t *message = json_string(r->message);
  for (size_t size = strlen(r->message); !message && size > 0; --size)
    message = json_stringn(r->message, size - 1);
  return message;
}

json_t *attn_refusal_json(const attn_refusal *r) {
  bool ours = r->status >= MHD_HTTP_INTERNAL_SERVER_ERROR;
  return json_pack("{s:{s:o, s:s, s:s?, s:s?}}", "error", "message", message_of(r), "type",
                   ours ? "server_error" : "invalid_request_error", "param",
                   r->field[0] ? r->field : NULL, "code", r->code);
}

enum MHD_Result attn_send(attn_exchange *e, unsigned status, struct MHD_Response *response) {
  const attn_refusal *r = &e->refusal;
  if (!response) return MHD_NO;
  MHD_add_response_header(response, MHD_HTTP_HEADER_X_CONTENT_TYPE_OPTIONS, "nosniff");
  MHD_add_response_header(response, MHD_HTTP_HEADER_CACHE_CONTROL, "no-store");
  if (e->server->options.access.origin_count)
    MHD_add_response_header(response, MHD_HTTP_HEADER_VARY, "Origin");
  if (e->shared_origin)
    MHD_add_response_header(response, MHD_HTTP_HEADER_ACCESS_CONTROL_ALLOW_ORIGIN,
                            e->shared_origin);
  if (r->header) MHD_add_response_header(response, r->header, r->value);
  enum MHD_Result result = MHD_queue_response(e->connection, status, response);
  MHD_destroy_response(response);
  return result;
}

enum MHD_Result attn_send_json(attn_exchange *e, unsigned status, json_t *json) {
  char *text = json ? json_dumps(json, JSON_COMPACT) : NULL;
  json_decref(json);
  if (!text) return MHD_NO;
  struct MHD_Response *response =
      MHD_create_response_from_buffer(strlen(text), text, MHD_RESPMEM_MUST_FREE);
  if (!response) {
    free(text);
    return MHD_NO;
  }
  MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE, "application/json");
  return attn_send(e, status, response);
}

enum MHD_Result attn_send_refusal(attn_exchange *e) {
  return attn_send_json(e, e->refusal.status, attn_refusal_json(&e->refusal));
}

bool attn_client_is_gone(const attn_exchange *e) {
  const union MHD_ConnectionInfo *info =
      MHD_get_connection_info(e->connection, MHD_CONNECTION_INFO_CONNECTION_FD);
  if (!info) return true;
  struct pollfd look = {.fd = info->connect_fd, .events = POLLRDHUP};
  return poll(&look, 1, 0) > 0 && look.revents & (POLLRDHUP | POLLHUP | POLLERR);
}

/* Setting a timeout after none also starts it anew. */
void attn_set_patience(const attn_exchange *e, bool endless) {
  unsigned seconds = endless ? 0 : (unsigned)e->server->options.idle_seconds;
  MHD_set_connection_option(e->connection, MHD_CONNECTION_OPTION_TIMEOUT, seconds);
}
