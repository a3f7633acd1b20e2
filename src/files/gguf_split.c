#include "files/gguf_split.h"
#include "base/io.h"
#include "base/memory.h"
#include "base/status.h"

#include <stdio.h>
#include <string.h>

const char attn_gguf_split_number[] = "split.no";
const char attn_gguf_split_count[] = "split.count";
const char attn_gguf_split_tensors[] = "split.tensors.count";

static const char suffix[] = ".gguf";
enum { ENDING = 20 /* "-00001-of-00003.gguf" */, SUFFIX = sizeof suffix - 1 };

char *attn_gguf_shard_path(const char *path, int number, int count) {
  size_t stem = strlen(path) - (attn_path_has_suffix(path, suffix) ? SUFFIX : 0);
  size_t size = stem + ENDING + 16;
  char *name = attn_alloc(size);
  if (name) snprintf(name, size, "%.*s-%05d-of-%05d%s", (int)stem, path, number + 1, count, suffix);
  return name;
}

/* What stands before "-00001-of-00003.gguf", with ".gguf"; *stem is NULL when the path does not end
 * like that. */
static attn_status find_stem(const char *path, int number, int count, char **stem) {
  size_t size = strlen(path);
  char expected[ENDING + 32];
  *stem = NULL;
  snprintf(expected, sizeof expected, "-%05d-of-%05d%s", number + 1, count, suffix);
  if (!attn_path_has_suffix(path, expected)) return ATTN_OK;
  size -= strlen(expected);
  *stem = attn_alloc(size + sizeof suffix);
  if (!*stem) return ATTN_OUT_OF_MEMORY;
  memcpy(*stem, path, size);
  memcpy(*stem + size, suffix, sizeof suffix);
  return ATTN_OK;
}

/* Shards of a model, while they are opened. */
typedef struct shards {
  const char *stem;
  int count;
  int64_t tensors;   /* that the first file says there are; -1: it does not */
  int64_t found;     /* that the files have */
  attn_gguf **files; /* [count] */
} shards;

static attn_status check_shard(const shards *s, const attn_gguf *file, int number) {
  int64_t said = -1, count = -1;
  ATTN_TRY(attn_gguf_int(file, attn_gguf_split_number, ATTN_REQUIRED, 0, INT32_MAX, &said));
  ATTN_TRY(attn_gguf_int(file, attn_gguf_split_count, ATTN_REQUIRED, 0, INT32_MAX, &count));
  if (said == number && count == s->count) return ATTN_OK;
  return attn_fail(ATTN_BAD_FORMAT, "%s is %lld and %s %lld, expected %d and %d",
                   attn_gguf_split_number, (long long)said, attn_gguf_split_count, (long long)count,
                   number, s->count);
}

static attn_status open_shard(shards *s, int number) {
  char *path = attn_gguf_shard_path(s->stem, number, s->count);
  if (!path) return ATTN_OUT_OF_MEMORY;
  attn_status status = attn_gguf_open_one(path, &s->files[number]);
  if (status == ATTN_NOT_FOUND) status = attn_fail_in(status, "a shard of %d is missing", s->count);
  if (status == ATTN_OK) {
    s->found += attn_gguf_tensor_count(s->files[number]);
    status = check_shard(s, s->files[number], number);
    if (status != ATTN_OK) status = attn_fail_in(status, "%s", path);
  }
  attn_free(path);
  return status;
}

static attn_status open_all(shards *s) {
  for (int i = 0; i < s->count; ++i) ATTN_TRY(open_shard(s, i));
  ATTN_TRY(attn_gguf_int(s->files[0], attn_gguf_split_tensors, ATTN_OPTIONAL, 0, INT64_MAX,
                         &s->tensors));
  if (s->tensors < 0 || s->tensors == s->found) return ATTN_OK;
  return attn_fail(ATTN_BAD_FORMAT, "%s: %s is %lld, but the %d files have %lld", s->stem,
                   attn_gguf_split_tensors, (long long)s->tensors, s->count, (long long)s->found);
}

/* Joined into the first, which is handed over. */
static attn_status open_shards(const char *stem, int count, attn_gguf **file) {
  shards s = {.stem = stem, .count = count, .tensors = -1};
  s.files = attn_alloc_array((size_t)count, sizeof(attn_gguf *));
  if (!s.files) return ATTN_OUT_OF_MEMORY;
  attn_status status = open_all(&s);
  attn_gguf *first = s.files[0];
  if (status != ATTN_OK) {
    for (int i = 0; i < count; ++i) attn_gguf_close(s.files[i]);
    attn_free(s.files);
    return status;
  }
  s.files[0] = NULL; /* closing ignores it */
  status = attn_gguf_join(first, s.files, count);
  if (status == ATTN_OK)
    *file = first;
  else
    attn_gguf_close(first);
  return status == ATTN_OK ? status : attn_fail_in(status, "%s", stem);
}

static attn_status open_others(const char *path, const attn_gguf *one, int count,
                               attn_gguf **file) {
  int64_t number = 0;
  char *stem;
  attn_status status =
      attn_gguf_int(one, attn_gguf_split_number, ATTN_REQUIRED, 0, count - 1, &number);
  if (status != ATTN_OK) return attn_fail_in(status, "%s", path);
  ATTN_TRY(find_stem(path, (int)number, count, &stem));
  if (!stem)
    return attn_fail(ATTN_BAD_FORMAT,
                     "%s is file %d of %d of a model: expected a name that ends in "
                     "-%05d-of-%05d%s",
                     path, (int)number + 1, count, (int)number + 1, count, suffix);
  status = open_shards(stem, count, file);
  attn_free(stem);
  return status;
}

attn_status attn_gguf_open(const char *path, attn_gguf **file) {
  attn_gguf *one;
  int64_t count = 1;
  *file = NULL;
  ATTN_TRY(attn_gguf_open_one(path, &one));
  attn_status status =
      attn_gguf_int(one, attn_gguf_split_count, ATTN_OPTIONAL, 0, ATTN_GGUF_MOST_SHARDS, &count);
  if (status == ATTN_OK && count <= 1) {
    *file = one;
    return ATTN_OK;
  }
  status = status == ATTN_OK ? open_others(path, one, (int)count, file)
                             : attn_fail_in(status, "%s", path);
  attn_gguf_close(one);
  return status;
}
