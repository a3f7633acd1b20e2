/* The prefix cache: a radix tree whose entries are checkpoints, in memory or in files. */
#include "attn/prefix_cache.h"
#include "base/hash.h"
#include "base/io.h"
#include "base/memory.h"
#include "base/status.h"
#include "models/prefix_tree.h"
#include "models/session.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* A state of the tree: a checkpoint, or a file. */
typedef struct entry {
  attn_prefix_node *node;
  attn_checkpoint *checkpoint; /* NULL: it is a file */
  char *file;                  /* NULL: it is in memory only */
  uint64_t used;               /* when, by the cache's count of uses */
  struct entry *next, *previous;
} entry;

struct attn_prefix_cache {
  attn_prefix_cache_options options;
  char *directory;
  attn_session *root; /* whose page pools every session and checkpoint shares; reads nothing */
  attn_prefix_tree tree;
  entry *first; /* of all entries, in no order */
  uint64_t uses;
  attn_prefix_cache_stats stats;
};

static const char suffix[] = ".session";

/* Entries ---------------------------------------------------------------------------------------
 */

static void link_entry(attn_prefix_cache *cache, entry *e) {
  e->next = cache->first;
  if (e->next) e->next->previous = e;
  cache->first = e;
}

static void free_entry(attn_prefix_cache *cache, entry *e) {
  if (e->previous)
    e->previous->next = e->next;
  else
    cache->first = e->next;
  if (e->next) e->next->previous = e->previous;
  attn_prefix_tree_remove(e->node);
  if (e->checkpoint) --cache->stats.entries;
  if (e->file) --cache->stats.files;
  attn_session_release_checkpoint(cache->root, e->checkpoint);
  attn_free(e->file);
  attn_free(e);
}

/* The entry of a sequence, made without a state if there is none. */
static attn_status entry_of(attn_prefix_cache *cache, const int32_t *tokens, int64_t count,
                            entry **result) {
  attn_prefix_node *node;
  ATTN_TRY(attn_prefix_tree_insert(&cache->tree, tokens, count, &node));
  if (!node->entry) {
    entry *e = attn_alloc_zero(sizeof *e);
    if (!e) {
      attn_prefix_tree_remove(node);
      return ATTN_OUT_OF_MEMORY;
    }
    e->node = node;
    node->entry = e;
    link_entry(cache, e);
  }
  *result = node->entry;
  (*result)->used = ++cache->uses;
  return ATTN_OK;
}

/* Files -----------------------------------------------------------------------------------------
 */

static char *file_name(const attn_prefix_cache *cache, const int32_t *tokens, int64_t count) {
  char name[64];
  uint64_t hash = attn_hash(ATTN_HASH_START, tokens, (size_t)count * sizeof *tokens);
  snprintf(name, sizeof name, "%016llx-%lld%s", (unsigned long long)hash, (long long)count, suffix);
  return attn_path_join(cache->directory, name);
}

/* A session that holds the tokens and the state of an entry in memory. */
static attn_status revive(attn_prefix_cache *cache, const entry *e, attn_session **session) {
  int64_t count = e->node->depth;
  int32_t *tokens = attn_alloc_array((size_t)count, sizeof *tokens);
  if (!tokens) return ATTN_OUT_OF_MEMORY;
  attn_prefix_tree_sequence(e->node, tokens);
  attn_status status = attn_session_create_at(cache->root, tokens, count, e->checkpoint, session);
  attn_free(tokens);
  return status;
}

static attn_status write_file(attn_prefix_cache *cache, entry *e) {
  attn_session *session;
  ATTN_TRY(revive(cache, e, &session));
  char *file = file_name(cache, attn_session_tokens(session), e->node->depth);
  attn_status status = file ? attn_session_save(session, file) : ATTN_OUT_OF_MEMORY;
  attn_session_destroy(session);
  if (status == ATTN_OK) {
    e->file = file;
    ++cache->stats.files;
  } else {
    attn_free(file);
  }
  return status;
}

/* The entry with the least recent use, of those in memory or of the files. */
static entry *oldest(const attn_prefix_cache *cache, bool in_memory) {
  entry *found = NULL;
  for (entry *e = cache->first; e; e = e->next) {
    bool counts = in_memory ? e->checkpoint != NULL : e->file != NULL;
    if (counts && (!found || e->used < found->used)) found = e;
  }
  return found;
}

static void forget_files(attn_prefix_cache *cache) {
  while (cache->stats.files > cache->options.files) {
    entry *e = oldest(cache, false);
    unlink(e->file);
    if (!e->checkpoint) {
      free_entry(cache, e);
      continue;
    }
    attn_free(e->file);
    e->file = NULL;
    --cache->stats.files;
  }
}

/* Out of memory, to a file where there is a directory. What cannot be written is forgotten. */
static void put_away(attn_prefix_cache *cache, entry *e) {
  if (cache->directory && !e->file) (void)write_file(cache, e);
  if (!e->file) {
    free_entry(cache, e);
    return;
  }
  attn_session_release_checkpoint(cache->root, e->checkpoint);
  e->checkpoint = NULL;
  --cache->stats.entries;
}

static void make_room(attn_prefix_cache *cache) {
  while (cache->stats.entries > cache->options.entries) put_away(cache, oldest(cache, true));
  forget_files(cache);
}

/* A file of this model becomes an entry; what else lies there is passed over. */
static void find_file(attn_prefix_cache *cache, const char *name) {
  int32_t *tokens = NULL;
  int64_t count;
  char *path = attn_path_join(cache->directory, name);
  entry *e = NULL;
  if (path && attn_session_read_tokens(cache->root, path, &tokens, &count) == ATTN_OK &&
      count >= 1 && entry_of(cache, tokens, count, &e) == ATTN_OK && !e->file) {
    e->file = path;
    ++cache->stats.files;
    path = NULL;
  }
  attn_free(tokens);
  attn_free(path);
}

typedef struct found_file {
  char *name;
  int64_t seconds, nanoseconds; /* when it was written */
} found_file;

static int by_age(const void *a, const void *b) {
  const found_file *x = a, *y = b;
  if (x->seconds != y->seconds) return x->seconds < y->seconds ? -1 : 1;
  if (x->nanoseconds != y->nanoseconds) return x->nanoseconds < y->nanoseconds ? -1 : 1;
  return strcmp(x->name, y->name);
}

static attn_status add_found(DIR *directory, const char *name, found_file **files, size_t *count) {
  struct stat status;
  if (!attn_path_has_suffix(name, suffix) || fstatat(dirfd(directory), name, &status, 0) != 0)
    return ATTN_OK;
  if ((*count & (*count - 1)) == 0) { /* room for a power of two */
    found_file *more = attn_realloc(*files, (*count ? 2 * *count : 1) * sizeof *more);
    if (!more) return ATTN_OUT_OF_MEMORY;
    *files = more;
  }
  char *copy = attn_strdup(name);
  if (!copy) return ATTN_OUT_OF_MEMORY;
  (*files)[(*count)++] = (found_file){copy, status.st_mtim.tv_sec, status.st_mtim.tv_nsec};
  return ATTN_OK;
}

/* The oldest first: it is the first to be given up. */
static attn_status find_files(attn_prefix_cache *cache) {
  found_file *files = NULL;
  size_t count = 0;
  ATTN_TRY(attn_make_directories(cache->directory));
  DIR *directory = opendir(cache->directory);
  if (!directory) return attn_fail(ATTN_IO_ERROR, "cannot read %s", cache->directory);
  attn_status status = ATTN_OK;
  for (struct dirent *item; status == ATTN_OK && (item = readdir(directory));)
    status = add_found(directory, item->d_name, &files, &count);
  closedir(directory);
  if (count) qsort(files, count, sizeof *files, by_age);
  for (size_t i = 0; i < count; ++i) {
    if (status == ATTN_OK) find_file(cache, files[i].name);
    attn_free(files[i].name);
  }
  attn_free(files);
  return status;
}

/* Public ----------------------------------------------------------------------------------------
 */

static attn_status create(const attn_model *model, const attn_prefix_cache_options *options,
                          attn_prefix_cache *cache) {
  if (options->struct_size != sizeof *options)
    return attn_fail(ATTN_INVALID_ARGUMENT, "prefix cache: struct_size is %zu, expected %zu",
                     options->struct_size, sizeof *options);
  if (options->entries < 1 || options->entries > 1 << 20 || options->files < 0)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "prefix cache: entries %lld and files %lld, expected 1 to %d, 0 or more",
                     (long long)options->entries, (long long)options->files, 1 << 20);
  cache->options = *options;
  /* Every entry and every open session may have pages of its own. */
  attn_session_options root = options->session;
  int64_t sharers = root.forks + options->entries + 1;
  root.forks = sharers < 4096 ? sharers : 4096;
  ATTN_TRY(attn_session_create(model, &root, &cache->root));
  if (!options->directory) return ATTN_OK;
  cache->directory = attn_strdup(options->directory);
  return cache->directory ? find_files(cache) : ATTN_OUT_OF_MEMORY;
}

attn_status attn_prefix_cache_create(const attn_model *model,
                                     const attn_prefix_cache_options *options,
                                     attn_prefix_cache **cache) {
  const attn_prefix_cache_options usual = ATTN_PREFIX_CACHE_OPTIONS_INIT;
  if (!model || !cache)
    return attn_fail(ATTN_INVALID_ARGUMENT, "prefix cache: the model or the result is NULL");
  attn_prefix_cache *made = attn_alloc_zero(sizeof *made);
  if (!made) return ATTN_OUT_OF_MEMORY;
  attn_status status = create(model, options ? options : &usual, made);
  if (status == ATTN_OK)
    *cache = made;
  else
    attn_prefix_cache_destroy(made);
  return status;
}

void attn_prefix_cache_destroy(attn_prefix_cache *cache) {
  if (!cache) return;
  for (entry *e = cache->first; e && cache->directory; e = e->next)
    if (e->checkpoint && !e->file) (void)write_file(cache, e);
  if (cache->root) forget_files(cache);
  while (cache->first) free_entry(cache, cache->first);
  attn_prefix_tree_free(&cache->tree);
  attn_session_destroy(cache->root);
  attn_free(cache->directory);
  attn_free(cache);
}

/* A session at the first `count` tokens, from a state of these and perhaps more. */
static attn_status open_at(attn_prefix_cache *cache, entry *e, const int32_t *tokens, int64_t count,
                           attn_session **session) {
  attn_session *made;
  e->used = ++cache->uses;
  if (e->checkpoint) {
    ATTN_TRY(revive(cache, e, &made));
  } else {
    ATTN_TRY(attn_session_create_at(cache->root, NULL, 0, NULL, &made));
    attn_status status = attn_session_restore(made, e->file);
    bool same = status == ATTN_OK && attn_session_position(made) == e->node->depth &&
                memcmp(attn_session_tokens(made), tokens, (size_t)count * sizeof *tokens) == 0;
    if (!same) { /* damaged, or gone: serve without it */
      free_entry(cache, e);
      attn_session_clear(made);
      *session = made;
      return ATTN_OK;
    }
  }
  attn_status status = attn_session_retreat(made, count);
  if (status == ATTN_OK)
    *session = made;
  else
    attn_session_destroy(made);
  return status;
}

attn_status attn_prefix_cache_open(attn_prefix_cache *cache, const int32_t *tokens, int64_t count,
                                   attn_session **session) {
  attn_prefix_node *below, *above;
  if (count < 1 || !tokens || !session)
    return attn_fail(ATTN_INVALID_ARGUMENT, "prefix cache: %lld tokens", (long long)count);
  /* The last token is read in any case: its logits are wanted. */
  int64_t matched = attn_prefix_tree_match(&cache->tree, tokens, count - 1, &below, &above);
  attn_prefix_node *best = cache->root->needs_checkpoints ? above : below;
  if (cache->root->needs_checkpoints) matched = above ? above->depth : 0;
  attn_status status = best ? open_at(cache, best->entry, tokens, matched, session)
                            : attn_session_create_at(cache->root, NULL, 0, NULL, session);
  ATTN_TRY(status);
  ++cache->stats.opened;
  cache->stats.tokens += count;
  cache->stats.reused += attn_session_position(*session);
  return ATTN_OK;
}

static attn_status keep(attn_prefix_cache *cache, const int32_t *tokens,
                        attn_checkpoint *checkpoint) {
  entry *e;
  ATTN_TRY(entry_of(cache, tokens, checkpoint->position, &e));
  if (e->checkpoint) return ATTN_OK;
  e->checkpoint = checkpoint;
  atomic_fetch_add(&checkpoint->users, 1);
  ++cache->stats.entries;
  return ATTN_OK;
}

attn_status attn_prefix_cache_keep(attn_prefix_cache *cache, const attn_session *session) {
  attn_checkpoint *now;
  if (!attn_session_is_related(cache->root, session))
    return attn_fail(ATTN_INVALID_ARGUMENT, "prefix cache: the session is not of this cache");
  if (attn_session_position(session) == 0) return ATTN_OK;
  attn_status status = ATTN_OK;
  for (int64_t i = 0; i < session->checkpoint_count && status == ATTN_OK; ++i)
    status = keep(cache, session->tokens, session->checkpoints[i]);
  if (status == ATTN_OK) status = attn_session_make_checkpoint(session, &now);
  if (status == ATTN_OK) {
    status = keep(cache, session->tokens, now);
    attn_session_release_checkpoint(cache->root, now);
  }
  make_room(cache);
  return status;
}

attn_prefix_cache_stats attn_prefix_cache_get_stats(const attn_prefix_cache *cache) {
  return cache->stats;
}
