/* From a request to its endpoint: paths, methods, access, and the body.
 *
 * What can be refused by the headers is refused by them. The body is read all the same, and
 * dropped, where it is small: a client that is still sending would not see the answer. */
#include "base/memory.h"
#include "base/status.h"
#include "engines/plan.h"
#include "server/exchange.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

enum {
  BODY_SECONDS = 60, /* for a whole body */
  DROPPED = 4,       /* times the largest body are read to say that it is too large */
};

struct attn_route {
  const char *path;
  bool posts; /* POST with a body, otherwise GET */
  bool open;  /* without a key, too */
  attn_endpoint *answer;
  attn_request_kind kind;
};

static const attn_route routes[] = {
    {"/", false, true, attn_answer_page, 0},
    {"/health", false, true, attn_answer_health, 0},
    {"/v1/models", false, false, attn_answer_models, 0},
    {"/v1/chat/completions", true, false, attn_answer_text, ATTN_REQUEST_CHAT},
    {"/v1/completions", true, false, attn_answer_text, ATTN_REQUEST_COMPLETION},
    {"/v1/embeddings", true, false, attn_answer_embeddings, ATTN_REQUEST_EMBEDDINGS},
};

static const attn_route *find_route(const char *path) {
  for (size_t i = 0; i < sizeof routes / sizeof *routes; ++i)
    if (strcmp(routes[i].path, path) == 0) return &routes[i];
  return NULL;
}

/* Headers ---------------------------------------------------------------------------------------
 */

static void check_access(attn_exchange *e, bool needs_key) {
  const attn_access *access = &e->server->options.access;
  const char *host = attn_header(e, MHD_HTTP_HEADER_HOST);
  const char *origin = attn_header(e, MHD_HTTP_HEADER_ORIGIN);
  if (attn_access_shares(access, origin)) e->shared_origin = origin;
  if (!attn_access_host(access, host))
    attn_refuse(e, MHD_HTTP_FORBIDDEN, "forbidden_host",
                "this server answers to the names of the loopback device: localhost, 127.0.0.1");
  else if (!attn_access_origin(access, host, origin))
    attn_refuse(e, MHD_HTTP_FORBIDDEN, "forbidden_origin",
                "pages of other origins may not use this server (--allow-origin)");
  else if (needs_key && !attn_access_key(access, attn_header(e, MHD_HTTP_HEADER_AUTHORIZATION))) {
    attn_refuse(e, MHD_HTTP_UNAUTHORIZED, "invalid_api_key",
                "expected the header Authorization: Bearer KEY with the server's key");
    e->refusal.header = MHD_HTTP_HEADER_WWW_AUTHENTICATE;
    e->refusal.value = "Bearer realm=\"attn\"";
  }
}

static bool is_json(const char *type) {
  static const char json[] = "application/json";
  const size_t size = sizeof json - 1;
  return type && strncasecmp(type, json, size) == 0 && (!type[size] || strchr("; \t", type[size]));
}

/* The length that the header states; *size stays for one that comes in chunks. */
static void check_length(attn_exchange *e, uint64_t *size) {
  const char *length = attn_header(e, MHD_HTTP_HEADER_CONTENT_LENGTH);
  const char *coding = attn_header(e, MHD_HTTP_HEADER_TRANSFER_ENCODING);
  if (length && coding)
    attn_refuse(e, MHD_HTTP_BAD_REQUEST, NULL, "both Content-Length and Transfer-Encoding");
  else if (length)
    *size = strtoull(length, NULL, 10); /* which libmicrohttpd has checked */
  else if (!coding)
    attn_refuse(e, MHD_HTTP_LENGTH_REQUIRED, "length_required",
                "a body needs a Content-Length, or comes in chunks");
}

static void refuse_size(attn_exchange *e) {
  attn_refuse(e, MHD_HTTP_CONTENT_TOO_LARGE, "body_too_large",
              "the body has more than %zu bytes (--max-body)", e->server->options.most_body);
}

/* Refuses what is wrong by its headers; whether the answer is due before the body. */
static bool check_post(attn_exchange *e) {
  uint64_t size = 0;
  bool waits = attn_header(e, MHD_HTTP_HEADER_EXPECT) != NULL;
  if (!e->refusal.status) check_length(e, &size);
  if (!e->refusal.status && !is_json(attn_header(e, MHD_HTTP_HEADER_CONTENT_TYPE)))
    attn_refuse(e, MHD_HTTP_UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type",
                "expected Content-Type: application/json");
  if (size <= e->server->options.most_body) return e->refusal.status && waits;
  if (!e->refusal.status) refuse_size(e);
  return true;
}

/* What a browser asks before a page of another origin may send. */
static enum MHD_Result answer_options(attn_exchange *e) {
  struct MHD_Response *response = MHD_create_response_from_buffer(0, "", MHD_RESPMEM_PERSISTENT);
  const char *methods = e->route->posts ? "POST, OPTIONS" : "GET, HEAD, OPTIONS";
  if (!response) return MHD_NO;
  MHD_add_response_header(response, MHD_HTTP_HEADER_ALLOW, methods);
  if (e->shared_origin) {
    MHD_add_response_header(response, MHD_HTTP_HEADER_ACCESS_CONTROL_ALLOW_METHODS, methods);
    MHD_add_response_header(response, MHD_HTTP_HEADER_ACCESS_CONTROL_ALLOW_HEADERS,
                            "Authorization, Content-Type");
    MHD_add_response_header(response, MHD_HTTP_HEADER_ACCESS_CONTROL_MAX_AGE, "600");
  }
  return attn_send(e, MHD_HTTP_NO_CONTENT, response);
}

static bool is_method(const attn_exchange *e, const char *method) {
  if (e->route->posts) return strcmp(method, MHD_HTTP_METHOD_POST) == 0;
  return strcmp(method, MHD_HTTP_METHOD_GET) == 0 || strcmp(method, MHD_HTTP_METHOD_HEAD) == 0;
}

/* The first look at a request: its headers. */
static enum MHD_Result handle_headers(attn_exchange *e, const char *path, const char *method) {
  bool asks = strcmp(method, MHD_HTTP_METHOD_OPTIONS) == 0;
  e->route = find_route(path);
  if (!e->route) {
    check_access(e, true);
    if (!e->refusal.status) attn_refuse(e, MHD_HTTP_NOT_FOUND, "not_found", "nothing is here");
    return attn_send_refusal(e);
  }
  check_access(e, !e->route->open && !asks);
  if (asks) return e->refusal.status ? attn_send_refusal(e) : answer_options(e);
  if (!e->refusal.status && !is_method(e, method)) {
    attn_refuse(e, MHD_HTTP_METHOD_NOT_ALLOWED, "method_not_allowed", "expected %s",
                e->route->posts ? "POST" : "GET");
    e->refusal.header = MHD_HTTP_HEADER_ALLOW;
    e->refusal.value = e->route->posts ? "POST, OPTIONS" : "GET, HEAD, OPTIONS";
    return attn_send_refusal(e);
  }
  bool at_once = e->route->posts ? check_post(e) : e->refusal.status != 0;
  return at_once ? attn_send_refusal(e) : MHD_YES;
}

/* Bodies ----------------------------------------------------------------------------------------
 */

/* A part of the body. MHD_NO gives up a client that sends without end, or too slowly. */
static enum MHD_Result handle_body(attn_exchange *e, const char *bytes, size_t size) {
  size_t most = e->server->options.most_body;
  e->received += size;
  if (e->received > DROPPED * most || attn_seconds() > e->started + BODY_SECONDS) return MHD_NO;
  if (e->received > most && !e->refusal.status) refuse_size(e);
  if (!e->refusal.status) attn_text_add(&e->body, bytes, size);
  return MHD_YES;
}

static enum MHD_Result handle_end(attn_exchange *e) {
  enum MHD_Result result = MHD_YES;
  attn_set_patience(e, true);
  if (!e->refusal.status && e->body.failed)
    attn_refuse(e, MHD_HTTP_SERVICE_UNAVAILABLE, "out_of_memory", "no memory for the body");
  if (!e->refusal.status) result = e->route->answer(e);
  if (e->refusal.status) result = attn_send_refusal(e);
  attn_set_patience(e, false);
  return result;
}

bool attn_read_request(attn_exchange *e) {
  char field[ATTN_FIELD_SIZE];
  const char *body = e->body.length ? e->body.data : "";
  attn_status status = attn_request_parse(e->route->kind, body, e->body.length, &e->request, field);
  attn_text_free(&e->body);
  if (status != ATTN_OK) {
    attn_refuse_failed(e, status);
    memcpy(e->refusal.field, field, sizeof field);
    return false;
  }
  const char *model = e->request.model, *ours = e->server->options.model_name;
  if (!model || strcmp(model, ours) == 0) return true;
  attn_refuse(e, MHD_HTTP_NOT_FOUND, "model_not_found", "the model here is '%s', not '%s'", ours,
              model);
  memcpy(e->refusal.field, "model", sizeof "model");
  return false;
}

/* Exchanges -------------------------------------------------------------------------------------
 */

static attn_exchange *begin_exchange(attn_server *server, struct MHD_Connection *connection) {
  attn_exchange *e = attn_alloc_zero(sizeof *e);
  if (!e) return NULL;
  e->server = server;
  e->connection = connection;
  e->started = attn_seconds();
  pthread_mutex_lock(&server->lock);
  ++server->exchanges;
  pthread_mutex_unlock(&server->lock);
  return e;
}

enum MHD_Result attn_exchange_handle(void *server, struct MHD_Connection *connection,
                                     const char *url, const char *method, const char *version,
                                     const char *upload, size_t *upload_size, void **exchange) {
  attn_exchange *e = *exchange;
  (void)version;
  if (!e) {
    *exchange = e = begin_exchange(server, connection);
    return e ? handle_headers(e, url, method) : MHD_NO;
  }
  if (!*upload_size) return handle_end(e);
  enum MHD_Result result = handle_body(e, upload, *upload_size);
  *upload_size = 0;
  return result;
}

void attn_exchange_end(void *server, struct MHD_Connection *connection, void **exchange,
                       enum MHD_RequestTerminationCode code) {
  attn_server *s = server;
  attn_exchange *e = *exchange;
  (void)connection;
  (void)code;
  if (!e) return;
  if (e->job) attn_job_release(e->job);
  attn_request_free(&e->request);
  attn_text_free(&e->body);
  attn_text_free(&e->events);
  attn_free(e);
  *exchange = NULL;
  pthread_mutex_lock(&s->lock);
  if (--s->exchanges == 0) pthread_cond_signal(&s->quiet);
  pthread_mutex_unlock(&s->lock);
}
