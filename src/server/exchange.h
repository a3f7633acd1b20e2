/* One request and its answer, on its connection's thread; what the parts of the server share. */
#ifndef ATTN_SERVER_EXCHANGE_H
#define ATTN_SERVER_EXCHANGE_H

#include "server/answer.h"
#include "server/request.h"
#include "server/server.h"

#include <microhttpd.h>
#include <pthread.h>

struct attn_server {
  const attn_model *model;
  attn_server_options options;
  attn_scheduler *scheduler;
  struct MHD_Daemon *daemon;
  int64_t created;           /* seconds since 1970 */
  pthread_mutex_t embedding; /* held while embeddings are computed */

  pthread_mutex_t lock; /* of what follows */
  pthread_cond_t quiet;
  int64_t exchanges; /* under way */
};

/* What is said instead of an answer; status 0: nothing. */
typedef struct attn_refusal {
  unsigned status;
  const char *code;
  char field[ATTN_FIELD_SIZE];
  char message[512];
  const char *header, *value; /* one more header, or NULL */
} attn_refusal;

typedef struct attn_exchange attn_exchange;
typedef struct attn_route attn_route;

struct attn_exchange {
  attn_server *server;
  struct MHD_Connection *connection;
  const attn_route *route;
  const char *shared_origin; /* of a page that may read the answer, or NULL */
  attn_refusal refusal;
  double started;
  attn_text body;
  size_t received; /* bytes of the body, kept or not */
  attn_request request;
  attn_job *job;
  attn_answer answer;
  /* A streamed answer. */
  attn_text events; /* on their way */
  size_t sent;      /* of those */
  bool ended;
};

/* An endpoint: answers, or refuses (e->refusal). MHD_NO closes the connection. */
typedef enum MHD_Result attn_endpoint(attn_exchange *e);

attn_endpoint attn_answer_page, attn_answer_health, attn_answer_models, attn_answer_text,
    attn_answer_embeddings;

/* routes.c: the callbacks of libmicrohttpd. */
enum MHD_Result attn_exchange_handle(void *server, struct MHD_Connection *connection,
                                     const char *url, const char *method, const char *version,
                                     const char *upload, size_t *upload_size, void **exchange);
void attn_exchange_end(void *server, struct MHD_Connection *connection, void **exchange,
                       enum MHD_RequestTerminationCode code);

/* reply.c. */
void attn_refuse(attn_exchange *e, unsigned status, const char *code, const char *format, ...)
    ATTN_PRINTF(4, 5);
/* What a failed call says; the status follows from its own. */
void attn_refuse_failed(attn_exchange *e, attn_status status);
enum MHD_Result attn_send_refusal(attn_exchange *e);
/* Takes the reference. */
enum MHD_Result attn_send_json(attn_exchange *e, unsigned status, json_t *json);
/* Adds the headers that every answer has, and takes the response. */
enum MHD_Result attn_send(attn_exchange *e, unsigned status, struct MHD_Response *response);
const char *attn_header(const attn_exchange *e, const char *name);
/* {"error": ...}, as a new reference. */
json_t *attn_refusal_json(const attn_refusal *refusal);
/* Whether the client has gone: nobody waits for the answer. */
bool attn_client_is_gone(const attn_exchange *e);
/* While the model works, silence is no reason to close the connection. */
void attn_set_patience(const attn_exchange *e, bool endless);

/* The request's body, read and checked; false when it is refused. */
bool attn_read_request(attn_exchange *e);

#endif
