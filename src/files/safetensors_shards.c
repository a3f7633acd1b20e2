/* A model's tensors as model.safetensors, or as shards with an index. */
#include "base/io.h"
#include "base/memory.h"
#include "base/status.h"
#include "files/json.h"
#include "files/safetensors.h"
#include "files/safetensors_format.h"

#include <ctype.h>
#include <stdio.h>
#include <string.h>

static const char single_name[] = "model.safetensors";
static const char index_name[] = "model.safetensors.index.json";

enum { SHARD_NAME = 64 };

typedef struct saving {
  const char *directory;
  const attn_described_tensor *tensors;
  int64_t count;
  int *shard_of; /* of each tensor */
  int shards;
  uint64_t total; /* bytes of all */
  attn_make_tensor *make;
  void *context;
  attn_safetensors_writer **writers; /* of each shard, once it is written */
} saving;

/* Which tensor goes where ---------------------------------------------------------------------- */

enum { OPEN_SHARD = -1 };

/* The shard that is being filled gets its number when it is full. */
static void close_shard(saving *s, int64_t end) {
  bool any = false;
  for (int64_t i = end - 1; i >= 0; --i) {
    if (s->shard_of[i] != OPEN_SHARD) continue;
    s->shard_of[i] = s->shards;
    any = true;
  }
  if (any) ++s->shards;
}

/* As huggingface_hub: in the order of the tensors; one that is too large alone, between those
 * before and behind it, which may still share a file. */
static attn_status divide(saving *s, int64_t shard_bytes) {
  uint64_t most = shard_bytes > 0 ? (uint64_t)shard_bytes : UINT64_MAX, used = 0;
  for (int64_t i = 0; i < s->count; ++i) {
    const attn_described_tensor *t = &s->tensors[i];
    const attn_format_dtype *dtype = attn_format_dtype_named(t->dtype);
    uint64_t bytes = 0;
    if (!dtype) return attn_fail(ATTN_INVALID_ARGUMENT, "dtype \"%.32s\" is unknown", t->dtype);
    ATTN_TRY(attn_format_bytes_of(dtype, t->rank, t->shape, &bytes));
    s->total += bytes;
    s->shard_of[i] = OPEN_SHARD;
    if (bytes > most) {
      s->shard_of[i] = s->shards++;
      continue;
    }
    if (bytes > most - used) {
      close_shard(s, i);
      used = 0;
    }
    used += bytes;
    if (s->shards >= ATTN_SAFETENSORS_MOST_SHARDS)
      return attn_fail(ATTN_INVALID_ARGUMENT, "more than %d files of at most %lld bytes",
                       ATTN_SAFETENSORS_MOST_SHARDS, (long long)shard_bytes);
  }
  close_shard(s, s->count);
  if (s->shards == 0) s->shards = 1; /* without a tensor */
  return ATTN_OK;
}

static void name_shard(const saving *s, int shard, char name[SHARD_NAME]) {
  if (s->shards == 1)
    snprintf(name, SHARD_NAME, "%s", single_name);
  else
    snprintf(name, SHARD_NAME, "model-%05d-of-%05d.safetensors", shard + 1, s->shards);
}

/* Whether a name is one of these, and which. */
static bool parse_name(const char *name, int *shard, int *shards) {
  static const char form[] = "model-ddddd-of-ddddd.safetensors";
  for (size_t i = 0; i < sizeof form; ++i) /* the end, too */
    if (form[i] == 'd' && i >= 6 && i < 20 ? !isdigit((unsigned char)name[i]) : name[i] != form[i])
      return false;
  return sscanf(name, "model-%5d-of-%5d", shard, shards) == 2;
}

/* Writing -------------------------------------------------------------------------------------- */

static attn_status write_tensors(saving *s, int shard, attn_safetensors_writer *writer) {
  attn_status status = ATTN_OK;
  for (int64_t i = 0; i < s->count && status == ATTN_OK; ++i) {
    attn_tensor tensor = {0};
    if (s->shard_of[i] != shard) continue;
    status = s->make(s->context, i, &tensor);
    uint64_t bytes = (uint64_t)attn_tensor_count(&tensor) * attn_dtype_size(tensor.dtype);
    if (status == ATTN_OK) status = attn_safetensors_writer_add(writer, tensor.data, bytes);
    attn_tensor_destroy(&tensor);
  }
  return status;
}

/* To a temporary, which is not renamed yet. */
static attn_status write_shard(saving *s, int shard) {
  const attn_metadata metadata = {"format", "pt"}; /* what the usual readers expect to find */
  char name[SHARD_NAME];
  int64_t count = 0;
  name_shard(s, shard, name);
  char *path = attn_path_join(s->directory, name);
  attn_described_tensor *mine = attn_alloc_array((size_t)s->count + 1, sizeof *mine);
  for (int64_t i = 0; mine && i < s->count; ++i)
    if (s->shard_of[i] == shard) mine[count++] = s->tensors[i];
  attn_status status = ATTN_OUT_OF_MEMORY;
  attn_safetensors_writer **writer = &s->writers[shard];
  if (path && mine) status = attn_safetensors_writer_open(path, mine, count, &metadata, 1, writer);
  attn_free(mine);
  attn_free(path);
  if (status == ATTN_OK) status = write_tensors(s, shard, *writer);
  return status == ATTN_OK ? attn_safetensors_writer_finish(*writer) : status;
}

/* {"metadata": {"total_size": bytes}, "weight_map": {tensor: file}} */
static attn_status make_index(const saving *s, json_t **index) {
  json_t *map = json_object();
  char name[SHARD_NAME];
  bool failed = !map;
  for (int64_t i = 0; i < s->count && !failed; ++i) {
    name_shard(s, s->shard_of[i], name);
    failed = json_object_set_new(map, s->tensors[i].name, json_string(name)) != 0;
  }
  *index = failed ? NULL
                  : json_pack("{s:{s:I}, s:O}", "metadata", "total_size", (json_int_t)s->total,
                              "weight_map", map);
  json_decref(map);
  return *index ? ATTN_OK : attn_fail(ATTN_OUT_OF_MEMORY, "out of memory");
}

/* Files of weights that are not of the model which was just written. */
static bool is_stale(const char *name, const void *context) {
  const saving *s = context;
  int shard, shards;
  if (strcmp(name, single_name) == 0) return s->shards != 1;
  if (strcmp(name, index_name) == 0) return s->shards == 1;
  return parse_name(name, &shard, &shards) &&
         (s->shards == 1 || shards != s->shards || shard < 1 || shard > s->shards);
}

/* An index beside shards of the same names would stand for a mixture while they are replaced. */
static attn_status remove_index(const saving *s, const char *index) {
  char name[SHARD_NAME];
  bool replaced = false;
  for (int i = 0; i < s->shards && !replaced; ++i) {
    name_shard(s, i, name);
    char *path = attn_path_join(s->directory, name);
    if (!path) return ATTN_OUT_OF_MEMORY;
    replaced = attn_path_exists(path);
    attn_free(path);
  }
  return replaced && attn_path_exists(index) ? attn_file_remove(index) : ATTN_OK;
}

static attn_status rename_all(saving *s) {
  attn_status status = ATTN_OK;
  for (int i = 0; i < s->shards && status == ATTN_OK; ++i) {
    status = attn_safetensors_writer_commit(s->writers[i]);
    s->writers[i] = NULL;
  }
  return status;
}

static attn_status publish(saving *s, const char *index_path) {
  json_t *index = NULL;
  if (s->shards > 1) ATTN_TRY(make_index(s, &index));
  attn_status status = index ? remove_index(s, index_path) : ATTN_OK;
  if (status == ATTN_OK) status = rename_all(s);
  if (status == ATTN_OK && index) status = attn_json_save(index_path, index);
  json_decref(index);
  return status == ATTN_OK ? attn_directory_remove(s->directory, is_stale, s) : status;
}

static attn_status write_all(saving *s) {
  s->writers = attn_alloc_array((size_t)s->shards, sizeof *s->writers);
  char *index = attn_path_join(s->directory, index_name);
  attn_status status = s->writers && index ? ATTN_OK : ATTN_OUT_OF_MEMORY;
  for (int i = 0; i < s->shards && status == ATTN_OK; ++i) status = write_shard(s, i);
  if (status == ATTN_OK) status = publish(s, index);
  for (int i = 0; s->writers && i < s->shards; ++i) attn_safetensors_writer_abort(s->writers[i]);
  attn_free(s->writers);
  attn_free(index);
  return status;
}

attn_status attn_safetensors_save(const char *directory, const attn_described_tensor *tensors,
                                  int64_t count, int64_t shard_bytes, attn_make_tensor *make,
                                  void *context) {
  saving s = {
      .directory = directory, .tensors = tensors, .count = count, .make = make, .context = context};
  s.shard_of = attn_alloc_array((size_t)count + 1, sizeof *s.shard_of);
  if (!s.shard_of) return ATTN_OUT_OF_MEMORY;
  attn_status status = divide(&s, shard_bytes);
  if (status == ATTN_OK) status = write_all(&s);
  attn_free(s.shard_of);
  return status;
}
