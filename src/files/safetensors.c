#include "files/safetensors.h"
#include "base/memory.h"
#include "base/status.h"
#include "base/text.h"
#include "base/io.h"
#include "files/json.h"
#include "files/safetensors_format.h"

#include <stdlib.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "safetensors data is little-endian");

typedef struct entry {
  const char *name; /* a key of the shard's header */
  const attn_format_dtype *dtype;
  int rank;
  int64_t shape[ATTN_MAX_RANK];
  uint64_t begin, end; /* within the shard's data */
  const unsigned char *data;
} entry;

typedef struct shard {
  attn_file_map map;
  json_t *header;
  const unsigned char *data;
  uint64_t size; /* of the data */
} shard;

struct attn_safetensors {
  shard *shards;
  int64_t shard_count;
  entry *entries;
  int64_t count;
  json_t *index;       /* of a sharded model, else NULL */
  unsigned char *copy; /* tensors whose place in the file is not aligned for their dtype */
};

/* -- One shard -- */

static attn_status read_header(const char *path, shard *shard) {
  const attn_file_map *map = &shard->map;
  uint64_t length;
  if (map->size < ATTN_SAFETENSORS_LENGTH_BYTES)
    return attn_fail(ATTN_BAD_FORMAT, "%s: %zu bytes are too few for a safetensors file", path,
                     map->size);
  memcpy(&length, map->data, ATTN_SAFETENSORS_LENGTH_BYTES);
  if (length > ATTN_SAFETENSORS_LARGEST_HEADER ||
      length > map->size - ATTN_SAFETENSORS_LENGTH_BYTES)
    return attn_fail(ATTN_BAD_FORMAT,
                     "%s: a header of %llu bytes does not fit a file of %zu (limit %d): not a "
                     "safetensors file, or a truncated one",
                     path, (unsigned long long)length, map->size, ATTN_SAFETENSORS_LARGEST_HEADER);
  shard->data = map->data + ATTN_SAFETENSORS_LENGTH_BYTES + length;
  shard->size = map->size - ATTN_SAFETENSORS_LENGTH_BYTES - length;
  if (length == 0 || map->data[ATTN_SAFETENSORS_LENGTH_BYTES] != '{')
    return attn_fail(ATTN_BAD_FORMAT, "%s: the header does not begin with '{'", path);
  return attn_json_parse((const char *)map->data + ATTN_SAFETENSORS_LENGTH_BYTES, (size_t)length,
                         path, &shard->header);
}

static attn_status check_metadata(const json_t *metadata) {
  const char *key;
  json_t *value;
  if (!metadata) return ATTN_OK;
  if (!json_is_object(metadata))
    return attn_fail(ATTN_BAD_FORMAT, "%s is not an object", ATTN_SAFETENSORS_METADATA);
  json_object_foreach((json_t *)(uintptr_t)metadata, key, value) {
    if (!json_is_string(value))
      return attn_fail(ATTN_BAD_FORMAT, "%s: \"%s\" is not a string", ATTN_SAFETENSORS_METADATA,
                       key);
  }
  return ATTN_OK;
}

static attn_status parse_dtype(const json_t *description, entry *entry) {
  const char *name = NULL;
  ATTN_TRY(attn_json_string(description, "dtype", ATTN_REQUIRED, &name));
  entry->dtype = attn_format_dtype_named(name);
  if (entry->dtype) return ATTN_OK;
  return attn_fail(ATTN_BAD_FORMAT, "dtype \"%.32s\" is unknown", name);
}

/* The shape, and in *bytes the size that it asks for. */
static attn_status parse_shape(const json_t *description, entry *entry, uint64_t *bytes) {
  json_t *shape = NULL;
  ATTN_TRY(attn_json_array(description, "shape", ATTN_REQUIRED, &shape));
  if (json_array_size(shape) > ATTN_MAX_RANK)
    return attn_fail(ATTN_UNSUPPORTED, "rank %zu is larger than %d", json_array_size(shape),
                     ATTN_MAX_RANK);
  entry->rank = (int)json_array_size(shape);
  for (int i = 0; i < entry->rank; ++i) {
    const json_t *extent = json_array_get(shape, (size_t)i);
    if (!json_is_integer(extent) || json_integer_value(extent) < 0)
      return attn_fail(ATTN_BAD_FORMAT, "extent %d is not a non-negative integer", i);
    entry->shape[i] = json_integer_value(extent);
  }
  return attn_format_bytes_of(entry->dtype, entry->rank, entry->shape, bytes);
}

static attn_status parse_offsets(const json_t *description, uint64_t data_size, entry *entry) {
  json_t *offsets = NULL;
  ATTN_TRY(attn_json_array(description, "data_offsets", ATTN_REQUIRED, &offsets));
  json_t *begin = json_array_get(offsets, 0), *end = json_array_get(offsets, 1);
  if (json_array_size(offsets) != 2 || !json_is_integer(begin) || !json_is_integer(end))
    return attn_fail(ATTN_BAD_FORMAT, "data_offsets are not two integers");
  json_int_t first = json_integer_value(begin), last = json_integer_value(end);
  if (first < 0 || last < first || (uint64_t)last > data_size)
    return attn_fail(ATTN_BAD_FORMAT,
                     "data_offsets [%lld, %lld] are outside the data of %llu bytes",
                     (long long)first, (long long)last, (unsigned long long)data_size);
  entry->begin = (uint64_t)first;
  entry->end = (uint64_t)last;
  return ATTN_OK;
}

static attn_status parse_entry(const json_t *description, const shard *shard, entry *entry) {
  uint64_t bytes = 0;
  if (!json_is_object(description))
    return attn_fail(ATTN_BAD_FORMAT, "its description is not an object");
  ATTN_TRY(parse_dtype(description, entry));
  ATTN_TRY(parse_shape(description, entry, &bytes));
  ATTN_TRY(parse_offsets(description, shard->size, entry));
  if (entry->end - entry->begin != bytes)
    return attn_fail(ATTN_BAD_FORMAT, "its shape and dtype need %llu bytes, data_offsets give %llu",
                     (unsigned long long)bytes, (unsigned long long)(entry->end - entry->begin));
  entry->data = shard->data + entry->begin;
  return ATTN_OK;
}

static int by_offset(const void *a, const void *b) {
  const entry *x = a, *y = b;
  if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
  return x->end < y->end ? -1 : x->end > y->end;
}

/* Spans follow each other without gap or overlap and end with the data. Bytes that belong to no
 * tensor could smuggle anything through a checkpoint; spans that overlap would alias weights. */
static attn_status check_cover(entry *entries, int64_t count, const shard *shard) {
  uint64_t reached = 0;
  qsort(entries, (size_t)count, sizeof *entries, by_offset);
  for (int64_t i = 0; i < count; ++i) {
    if (entries[i].begin != reached)
      return attn_fail(ATTN_BAD_FORMAT,
                       "tensor \"%.128s\" begins at %llu, %s the one before ends "
                       "(%llu)",
                       entries[i].name, (unsigned long long)entries[i].begin,
                       entries[i].begin < reached ? "before" : "after",
                       (unsigned long long)reached);
    reached = entries[i].end;
  }
  if (reached != shard->size)
    return attn_fail(ATTN_BAD_FORMAT, "%llu bytes of data, but the tensors take %llu",
                     (unsigned long long)shard->size, (unsigned long long)reached);
  return ATTN_OK;
}

/* Appends the shard's tensors to file->entries. */
static attn_status parse_shard(attn_safetensors *file, const shard *shard) {
  const char *name;
  json_t *description;
  size_t added = json_object_size(shard->header);
  entry *entries = attn_realloc(file->entries, ((size_t)file->count + added) * sizeof *entries);
  if (!entries) return ATTN_OUT_OF_MEMORY;
  file->entries = entries;
  ATTN_TRY(check_metadata(json_object_get(shard->header, ATTN_SAFETENSORS_METADATA)));
  entry *next = entries + file->count;
  json_object_foreach(shard->header, name, description) {
    if (strcmp(name, ATTN_SAFETENSORS_METADATA) == 0) continue;
    *next = (entry){.name = name};
    attn_status status = parse_entry(description, shard, next);
    if (status != ATTN_OK) return attn_fail_in(status, "tensor \"%.128s\"", name);
    ++next;
  }
  int64_t count = next - (entries + file->count);
  ATTN_TRY(check_cover(entries + file->count, count, shard));
  file->count += count;
  return ATTN_OK;
}

static attn_status open_shard(attn_safetensors *file, const char *path) {
  shard *shard = &file->shards[file->shard_count];
  ATTN_TRY(attn_file_map_open(path, &shard->map));
  ++file->shard_count; /* from here on close releases it */
  ATTN_TRY(read_header(path, shard));
  attn_status status = parse_shard(file, shard);
  return status == ATTN_OK ? status : attn_fail_in(status, "%.512s", path);
}

/* -- Sharded models -- */

/* The distinct shard names of a weight map, as the keys of a JSON object. */
static attn_status list_shards(const json_t *weight_map, json_t **names) {
  const char *tensor;
  json_t *value;
  *names = json_object();
  if (!*names) return attn_fail(ATTN_OUT_OF_MEMORY, "out of memory");
  json_object_foreach((json_t *)(uintptr_t)weight_map, tensor, value) {
    const char *name = json_string_value(value);
    /* A shard lies beside its index: a path could reach any file of the machine. */
    if (!name || !*name || strchr(name, '/'))
      return attn_fail(ATTN_BAD_FORMAT, "weight_map: the shard of \"%.128s\" is not a file name",
                       tensor);
    if (json_object_set(*names, name, value) != 0)
      return attn_fail(ATTN_OUT_OF_MEMORY, "out of memory");
  }
  if (json_object_size(*names) == 0 || json_object_size(*names) > ATTN_SAFETENSORS_MOST_SHARDS)
    return attn_fail(ATTN_BAD_FORMAT, "weight_map: %zu shards are not 1 to %d",
                     json_object_size(*names), ATTN_SAFETENSORS_MOST_SHARDS);
  return ATTN_OK;
}

static attn_status open_shards(attn_safetensors *file, const json_t *names, const char *directory) {
  const char *name;
  json_t *value;
  file->shards = attn_alloc_array(json_object_size(names), sizeof *file->shards);
  if (!file->shards) return ATTN_OUT_OF_MEMORY;
  json_object_foreach((json_t *)(uintptr_t)names, name, value) {
    char *path = attn_path_join(directory, name);
    if (!path) return ATTN_OUT_OF_MEMORY;
    attn_status status = open_shard(file, path);
    attn_free(path);
    ATTN_TRY(status);
  }
  return ATTN_OK;
}

static attn_status open_index(attn_safetensors *file, const char *path) {
  json_t *weight_map = NULL, *names = NULL;
  ATTN_TRY(attn_json_load(path, &file->index));
  attn_status status = attn_json_object(file->index, "weight_map", ATTN_REQUIRED, &weight_map);
  if (status == ATTN_OK) status = list_shards(weight_map, &names);
  if (status != ATTN_OK) {
    status = attn_fail_in(status, "%.512s", path);
  } else {
    char *directory = attn_path_directory(path);
    status = directory ? open_shards(file, names, directory) : ATTN_OUT_OF_MEMORY;
    attn_free(directory);
  }
  json_decref(names);
  return status;
}

static attn_status open_single(attn_safetensors *file, const char *path) {
  file->shards = attn_alloc_array(1, sizeof *file->shards);
  return file->shards ? open_shard(file, path) : ATTN_OUT_OF_MEMORY;
}

/* -- The whole -- */

static int by_name(const void *a, const void *b) {
  return strcmp(((const entry *)a)->name, ((const entry *)b)->name);
}

static const entry *find_entry(const attn_safetensors *file, const char *name) {
  entry key = {.name = name};
  if (file->count == 0) return NULL;
  return bsearch(&key, file->entries, (size_t)file->count, sizeof key, by_name);
}

/* A name may stand in one shard only, and the index and the shards must list the same names. */
static attn_status check_names(const attn_safetensors *file, const char *path) {
  const char *name;
  json_t *value, *weight_map = json_object_get(file->index, "weight_map");
  for (int64_t i = 1; i < file->count; ++i)
    if (by_name(&file->entries[i - 1], &file->entries[i]) == 0)
      return attn_fail(ATTN_BAD_FORMAT, "%.512s: two shards hold the tensor \"%.128s\"", path,
                       file->entries[i].name);
  json_object_foreach(weight_map, name, value) {
    if (!find_entry(file, name))
      return attn_fail(ATTN_BAD_FORMAT, "%.512s: no shard holds the tensor \"%.128s\"", path, name);
  }
  return ATTN_OK;
}

static bool is_aligned(const entry *entry) {
  if (entry->dtype->bits < 16) return true;
  return (uintptr_t)entry->data % ((uintptr_t)entry->dtype->bits / 8) == 0;
}

static size_t padded_size(const entry *entry) {
  return (size_t)(entry->end - entry->begin + ATTN_ALIGNMENT - 1) / ATTN_ALIGNMENT * ATTN_ALIGNMENT;
}

/* The format does not align tensors. Those that no load instruction of their dtype may touch in
 * place (behind one of an odd size, or a header of an odd length) are copied. */
static attn_status align(attn_safetensors *file) {
  size_t size = 0;
  for (int64_t i = 0; i < file->count; ++i)
    if (!is_aligned(&file->entries[i])) size += padded_size(&file->entries[i]);
  if (size == 0) return ATTN_OK;
  file->copy = attn_alloc(size);
  if (!file->copy) return ATTN_OUT_OF_MEMORY;
  unsigned char *place = file->copy;
  for (int64_t i = 0; i < file->count; ++i) {
    entry *entry = &file->entries[i];
    if (is_aligned(entry)) continue;
    memcpy(place, entry->data, (size_t)(entry->end - entry->begin));
    entry->data = place;
    place += padded_size(entry);
  }
  return ATTN_OK;
}

static attn_status open_into(attn_safetensors *file, const char *path) {
  ATTN_TRY(attn_path_has_suffix(path, ".json") ? open_index(file, path) : open_single(file, path));
  if (file->count) qsort(file->entries, (size_t)file->count, sizeof *file->entries, by_name);
  ATTN_TRY(check_names(file, path));
  return align(file);
}

/* A directory stands for the model in it. */
static attn_status resolve(const char *path, char **resolved) {
  static const char *const names[] = {"model.safetensors", "model.safetensors.index.json"};
  *resolved = NULL;
  if (!attn_path_is_directory(path)) {
    *resolved = attn_strdup(path);
    return *resolved ? ATTN_OK : ATTN_OUT_OF_MEMORY;
  }
  for (int i = 0; i < 2; ++i) {
    *resolved = attn_path_join(path, names[i]);
    if (!*resolved) return ATTN_OUT_OF_MEMORY;
    if (attn_path_exists(*resolved)) return ATTN_OK;
    attn_free(*resolved);
  }
  *resolved = NULL;
  return attn_fail(ATTN_NOT_FOUND, "%s holds neither %s nor %s", path, names[0], names[1]);
}

attn_status attn_safetensors_open(const char *path, attn_safetensors **file) {
  char *resolved;
  *file = NULL;
  ATTN_TRY(resolve(path, &resolved));
  attn_safetensors *fresh = attn_alloc_zero(sizeof *fresh);
  attn_status status = fresh ? open_into(fresh, resolved) : ATTN_OUT_OF_MEMORY;
  attn_free(resolved);
  if (status == ATTN_OK)
    *file = fresh;
  else
    attn_safetensors_close(fresh);
  return status;
}

void attn_safetensors_close(attn_safetensors *file) {
  if (!file) return;
  for (int64_t i = 0; i < file->shard_count; ++i) {
    json_decref(file->shards[i].header);
    attn_file_map_close(&file->shards[i].map);
  }
  json_decref(file->index);
  attn_free(file->shards);
  attn_free(file->entries);
  attn_free(file->copy);
  attn_free(file);
}

int64_t attn_safetensors_count(const attn_safetensors *file) {
  return file->count;
}

const char *attn_safetensors_name(const attn_safetensors *file, int64_t index) {
  return index >= 0 && index < file->count ? file->entries[index].name : NULL;
}

static attn_status view(const entry *entry, attn_tensor *tensor) {
  if (entry->dtype->dtype == ATTN_DTYPE_COUNT)
    return attn_fail(ATTN_UNSUPPORTED,
                     "tensor \"%.128s\" has dtype %s, which libattn does not have", entry->name,
                     entry->dtype->name);
  return attn_tensor_wrap((void *)(uintptr_t)entry->data, entry->dtype->dtype, entry->rank,
                          entry->shape, tensor);
}

attn_status attn_safetensors_get(const attn_safetensors *file, int64_t index, attn_tensor *tensor) {
  if (index < 0 || index >= file->count)
    return attn_fail(ATTN_INVALID_ARGUMENT, "tensor %lld is not in 0 to %lld", (long long)index,
                     (long long)file->count - 1);
  return view(&file->entries[index], tensor);
}

attn_status attn_safetensors_describe(const attn_safetensors *file, int64_t index,
                                      attn_described_tensor *tensor) {
  if (index < 0 || index >= file->count)
    return attn_fail(ATTN_INVALID_ARGUMENT, "tensor %lld is not in 0 to %lld", (long long)index,
                     (long long)file->count - 1);
  const entry *entry = &file->entries[index];
  *tensor = (attn_described_tensor){.name = entry->name,
                                    .dtype = entry->dtype->name,
                                    .rank = entry->rank,
                                    .data = entry->data,
                                    .bytes = entry->end - entry->begin};
  memcpy(tensor->shape, entry->shape, sizeof entry->shape);
  return ATTN_OK;
}

static const char *name_at(const void *context, int64_t i) {
  return ((const attn_safetensors *)context)->entries[i].name;
}

attn_status attn_safetensors_find(const attn_safetensors *file, const char *name,
                                  attn_tensor *tensor) {
  const entry *found = find_entry(file, name);
  char hint[ATTN_HINT_SIZE];
  if (found) return view(found, tensor);
  return attn_fail(ATTN_NOT_FOUND, "no tensor \"%.128s\" among %lld%s", name,
                   (long long)file->count,
                   attn_close_names(name, name_at, file, file->count, hint));
}

bool attn_safetensors_has(const attn_safetensors *file, const char *name) {
  return find_entry(file, name) != NULL;
}

const char *attn_safetensors_metadata(const attn_safetensors *file, const char *key) {
  const char *value =
      json_string_value(json_object_get(json_object_get(file->index, "metadata"), key));
  for (int64_t i = 0; i < file->shard_count && !value; ++i)
    value = json_string_value(
        json_object_get(json_object_get(file->shards[i].header, ATTN_SAFETENSORS_METADATA), key));
  return value;
}
