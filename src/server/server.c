#include "server/server.h"
#include "base/memory.h"
#include "base/status.h"
#include "server/exchange.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
  FEW_CONNECTIONS = 64, /* for what is no job: pages, health, refusals */
  LAST_SECONDS = 5,     /* for the last answers to be sent */
};

/* Address ---------------------------------------------------------------------------------------
 */

static attn_status resolve(const attn_server_options *o, struct addrinfo **found) {
  struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV};
  char port[16];
  snprintf(port, sizeof port, "%d", o->port);
  int error = getaddrinfo(o->host, port, &hints, found);
  return error ? attn_fail(ATTN_IO_ERROR, "the host '%s': %s", o->host, gai_strerror(error))
               : ATTN_OK;
}

static bool is_loopback(const struct sockaddr *address) {
  if (address->sa_family == AF_INET) {
    const struct sockaddr_in *four = (const void *)address;
    return ntohl(four->sin_addr.s_addr) >> 24 == 127;
  }
  const struct sockaddr_in6 *six = (const void *)address;
  return address->sa_family == AF_INET6 && IN6_IS_ADDR_LOOPBACK(&six->sin6_addr);
}

/* The server ------------------------------------------------------------------------------------
 */

static attn_status listen_at(attn_server *s, const struct addrinfo *address) {
  const attn_server_options *o = &s->options;
  const unsigned flags = MHD_USE_THREAD_PER_CONNECTION | MHD_USE_INTERNAL_POLLING_THREAD |
                         MHD_USE_POLL | MHD_USE_ITC |
                         (address->ai_family == AF_INET6 ? MHD_USE_IPv6 : 0);
  int64_t connections = o->scheduler.sessions + o->scheduler.waiting + FEW_CONNECTIONS;
  s->options.access.loopback = is_loopback(address->ai_addr);
  errno = 0;
  s->daemon = MHD_start_daemon(
      flags, (uint16_t)o->port, NULL, NULL, attn_exchange_handle, s, MHD_OPTION_SOCK_ADDR,
      address->ai_addr, MHD_OPTION_NOTIFY_COMPLETED, attn_exchange_end, s,
      MHD_OPTION_CONNECTION_LIMIT, (unsigned)connections, MHD_OPTION_CONNECTION_TIMEOUT,
      (unsigned)o->idle_seconds, MHD_OPTION_STRICT_FOR_CLIENT, 1, MHD_OPTION_END);
  if (s->daemon) return ATTN_OK;
  return attn_fail(ATTN_IO_ERROR, "cannot listen on %s, port %d: %s", o->host, o->port,
                   strerror(errno));
}

static attn_status start(attn_server *s) {
  struct addrinfo *address;
  ATTN_TRY(attn_scheduler_start(s->model, &s->options.scheduler, &s->scheduler));
  ATTN_TRY(resolve(&s->options, &address));
  attn_status status = listen_at(s, address);
  freeaddrinfo(address);
  return status;
}

attn_status attn_server_start(const attn_model *model, const attn_server_options *options,
                              attn_server **server) {
  attn_server *s = attn_alloc_zero(sizeof *s);
  if (!s) return ATTN_OUT_OF_MEMORY;
  s->model = model;
  s->options = *options;
  s->created = (int64_t)time(NULL);
  pthread_mutex_init(&s->lock, NULL);
  pthread_mutex_init(&s->embedding, NULL);
  pthread_cond_init(&s->quiet, NULL);
  attn_status status = start(s);
  if (status == ATTN_OK)
    *server = s;
  else
    attn_server_stop(s);
  return status;
}

int attn_server_port(const attn_server *server) {
  const union MHD_DaemonInfo *info = MHD_get_daemon_info(server->daemon, MHD_DAEMON_INFO_BIND_PORT);
  return info ? info->port : 0;
}

bool attn_server_is_loopback(const attn_server *server) {
  return server->options.access.loopback;
}

/* Lets the last answers go out. */
static void await_exchanges(attn_server *s) {
  struct timespec until;
  int late = 0;
  clock_gettime(CLOCK_REALTIME, &until);
  until.tv_sec += LAST_SECONDS;
  pthread_mutex_lock(&s->lock);
  while (s->exchanges && !late) late = pthread_cond_timedwait(&s->quiet, &s->lock, &until);
  pthread_mutex_unlock(&s->lock);
}

void attn_server_stop(attn_server *s) {
  int socket = s->daemon ? MHD_quiesce_daemon(s->daemon) : MHD_INVALID_SOCKET;
  if (socket != MHD_INVALID_SOCKET) close(socket);
  if (s->scheduler) attn_scheduler_stop(s->scheduler, s->options.drain_seconds);
  if (s->daemon) {
    await_exchanges(s);
    MHD_stop_daemon(s->daemon);
  }
  attn_scheduler_destroy(s->scheduler);
  pthread_cond_destroy(&s->quiet);
  pthread_mutex_destroy(&s->lock);
  pthread_mutex_destroy(&s->embedding);
  attn_free(s);
}
