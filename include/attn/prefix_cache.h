/* A prefix cache: what any session has computed of a beginning, a later one need not compute again.
 *
 * A radix tree over tokens holds states of sessions, for models of any mixers. A state that can be
 * cut (keys and values, latents) serves every beginning that it has in common with a new sequence;
 * a recurrent one serves sequences that begin with all of its tokens, and so do the checkpoints
 * that its session had. Pages are shared until somebody writes to them. The least recently used
 * states are given up first; with a directory they become files, and serve later processes too.
 *
 * A cache and its sessions belong to one thread at a time. */
#ifndef ATTN_PREFIX_CACHE_H
#define ATTN_PREFIX_CACHE_H

#include "attn/model.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct attn_prefix_cache attn_prefix_cache;

typedef struct attn_prefix_cache_options {
  size_t struct_size;
  attn_session_options session; /* of every session; `forks`: how many may be open at once */
  int64_t entries;              /* states kept in memory at most */
  const char *directory;        /* for files, made if needed; NULL: memory only */
  int64_t files;                /* kept at most */
} attn_prefix_cache_options;

#define ATTN_PREFIX_CACHE_OPTIONS_INIT                                                             \
  {                                                                                                \
    .struct_size = sizeof(attn_prefix_cache_options), .session = ATTN_SESSION_OPTIONS_INIT,        \
    .entries = 32, .files = 256                                                                    \
  }

/* `options` may be NULL. The model must outlive the cache. With a directory, files of this model
 * that are there are found again; others are left alone. */
ATTN_API attn_status attn_prefix_cache_create(const attn_model *model,
                                              const attn_prefix_cache_options *options,
                                              attn_prefix_cache **cache);
/* Writes what is in memory to the directory, if there is one. Sessions may live on. */
ATTN_API void attn_prefix_cache_destroy(attn_prefix_cache *cache);

/* A session that stands behind the longest known beginning of tokens[0 .. count - 1): feed the
 * rest, tokens + attn_session_position(session). To be destroyed by the caller. */
ATTN_API attn_status attn_prefix_cache_open(attn_prefix_cache *cache, const int32_t *tokens,
                                            int64_t count, attn_session **session);
/* Remembers what a session of this cache has read so far. */
ATTN_API attn_status attn_prefix_cache_keep(attn_prefix_cache *cache, const attn_session *session);

typedef struct attn_prefix_cache_stats {
  int64_t opened, tokens, reused; /* sessions; tokens asked for; of which were known */
  int64_t entries, files;         /* now */
} attn_prefix_cache_stats;
ATTN_API attn_prefix_cache_stats attn_prefix_cache_get_stats(const attn_prefix_cache *cache);

#ifdef __cplusplus
}
#endif
#endif
