#include "server/access.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <string.h>
#include <strings.h>

/* The time depends on the length of what was given alone. */
static bool equal_secret(const char *given, const char *secret) {
  size_t size = strlen(given), wanted = strlen(secret);
  volatile unsigned char difference = size != wanted;
  for (size_t i = 0; i < size; ++i)
    difference |= (unsigned char)(given[i] ^ secret[wanted ? i % wanted : 0]);
  return !difference;
}

bool attn_access_key(const attn_access *access, const char *authorization) {
  static const char scheme[] = "Bearer ";
  const size_t length = sizeof scheme - 1;
  if (!access->key) return true;
  if (!authorization || strncasecmp(authorization, scheme, length) != 0) return false;
  return equal_secret(authorization + length, access->key);
}

/* The name in "name:port" or "[address]:port". */
static bool host_name(const char *host, char *name, size_t size) {
  bool bracket = host[0] == '[';
  size_t length = strcspn(host + bracket, bracket ? "]" : ":");
  if (length >= size) return false;
  memcpy(name, host + bracket, length);
  name[length] = '\0';
  return true;
}

static bool is_loopback(const char *name) {
  struct in_addr four;
  struct in6_addr six;
  if (strcasecmp(name, "localhost") == 0) return true;
  if (inet_pton(AF_INET, name, &four) == 1) return ntohl(four.s_addr) >> 24 == 127;
  return inet_pton(AF_INET6, name, &six) == 1 && IN6_IS_ADDR_LOOPBACK(&six);
}

bool attn_access_host(const attn_access *access, const char *host) {
  char name[256];
  if (access->key || !access->loopback || !host) return true;
  return host_name(host, name, sizeof name) && is_loopback(name);
}

bool attn_access_shares(const attn_access *access, const char *origin) {
  for (int i = 0; origin && i < access->origin_count; ++i)
    if (strcmp(access->origins[i], "*") == 0 || strcasecmp(access->origins[i], origin) == 0)
      return true;
  return false;
}

static bool is_same(const char *origin, const char *host) {
  static const char *const schemes[] = {"http://", "https://"};
  for (int i = 0; host && i < 2; ++i) {
    size_t length = strlen(schemes[i]);
    if (strncasecmp(origin, schemes[i], length) == 0 && strcasecmp(origin + length, host) == 0)
      return true;
  }
  return false;
}

bool attn_access_origin(const attn_access *access, const char *host, const char *origin) {
  return !origin || is_same(origin, host) || attn_access_shares(access, origin);
}
