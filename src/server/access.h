/* Who may use the server. Pure functions over the headers of a request.
 *
 * A page of any site that the user visits may send requests to a server on this machine. Two checks
 * keep it out where no key does: the Origin that browsers add must be the server's own or an
 * allowed one, and a server that listens on the loopback device wants to be called by a name of
 * that device, so that a foreign name that was pointed here (DNS rebinding) is no way around the
 * first check. */
#ifndef ATTN_SERVER_ACCESS_H
#define ATTN_SERVER_ACCESS_H

#include <stdbool.h>

typedef struct attn_access {
  const char *key; /* NULL: none is asked for */
  bool loopback;   /* the server listens on the loopback device only */
  const char *const *origins;
  int origin_count; /* other origins that are allowed; "*": all */
} attn_access;

/* Headers are NULL when the request has none. */

/* "Bearer KEY", compared in a time that does not tell how much of it is right. */
bool attn_access_key(const attn_access *access, const char *authorization);
bool attn_access_host(const attn_access *access, const char *host);
bool attn_access_origin(const attn_access *access, const char *host, const char *origin);
/* Whether the origin is on the list: its pages may read what is answered (CORS). */
bool attn_access_shares(const attn_access *access, const char *origin);

#endif
