/* The server: a model behind HTTP, in the shapes of OpenAI's API (docs/server.md).
 *
 * Every connection has a thread, which reads, checks and answers; the texts are written by the
 * scheduler's thread. */
#ifndef ATTN_SERVER_SERVER_H
#define ATTN_SERVER_SERVER_H

#include "server/access.h"
#include "server/scheduler.h"

typedef struct attn_server attn_server;

typedef struct attn_server_options {
  const char *host; /* an address or a name of this machine */
  int port;         /* 0: any that is free */
  const char *model_name;
  attn_access access; /* `loopback` is found out */
  attn_scheduler_options scheduler;
  size_t most_body;  /* bytes */
  int idle_seconds;  /* without a byte from or to a client, until its connection is closed */
  int drain_seconds; /* for jobs under way when the server is stopped */
} attn_server_options;

/* What the options point to must outlive the server, as must the model. ATTN_IO_ERROR when the
 * address cannot be listened on. */
attn_status attn_server_start(const attn_model *model, const attn_server_options *options,
                              attn_server **server);
int attn_server_port(const attn_server *server);
bool attn_server_is_loopback(const attn_server *server);
/* Lets what is under way finish, then ends everything. */
void attn_server_stop(attn_server *server);

#endif
