#include "files/gguf.h"
#include "base/memory.h"
#include "base/status.h"
#include "base/text.h"
#include "base/io.h"
#include "files/gguf_split.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "GGUF data is little-endian");

enum {
  OLDEST_VERSION = 2, /* 1 had lengths of 32 bits */
  NEWEST_VERSION = 3,
  LENGTH_BYTES = 8,        /* of a string or an array */
  LONGEST_NAME = 65535,    /* the format's limit of a key; that of tensors is lower */
  SHOWN_NAME = 128,        /* in messages */
  DEFAULT_ALIGNMENT = 32,  /* the format's */
  LEAST_ALIGNMENT = 8,     /* so that every plain number can be read in place */
  LEAST_KEY_BYTES = 14,    /* a length, one character, a type, one byte of value */
  LEAST_TENSOR_BYTES = 33, /* a length, one character, rank, one extent, type, offset */
};

static const char alignment_key[] = "general.alignment";

/* Bytes of a value; 0 where it says itself how long it is. */
static const struct {
  const char *name;
  int size;
} types[ATTN_GGUF_TYPES] = {
    [ATTN_GGUF_U8] = {"uint8", 1},      [ATTN_GGUF_I8] = {"int8", 1},
    [ATTN_GGUF_U16] = {"uint16", 2},    [ATTN_GGUF_I16] = {"int16", 2},
    [ATTN_GGUF_U32] = {"uint32", 4},    [ATTN_GGUF_I32] = {"int32", 4},
    [ATTN_GGUF_F32] = {"float32", 4},   [ATTN_GGUF_BOOL] = {"bool", 1},
    [ATTN_GGUF_STRING] = {"string", 0}, [ATTN_GGUF_ARRAY] = {"array", 0},
    [ATTN_GGUF_U64] = {"uint64", 8},    [ATTN_GGUF_I64] = {"int64", 8},
    [ATTN_GGUF_F64] = {"float64", 8},
};

typedef struct entry {
  const char *key; /* while parsing: in the mapped file, not terminated */
  size_t key_size;
  bool is_array;
  attn_gguf_list values;
} entry;

typedef struct tensor {
  attn_gguf_tensor shown; /* its name: as an entry's key */
  size_t name_size;
  uint64_t offset; /* within the data */
} tensor;

struct attn_gguf {
  attn_file_map map; /* zeroed when the bytes are the caller's */
  int version;
  uint64_t alignment;
  entry *entries;
  int64_t entry_count;
  tensor *tensors;
  int64_t tensor_count;
  char *keys, *names; /* copies, terminated */
  uint64_t *starts;   /* where the strings of all arrays are: the lists' `starts` point here */
  attn_gguf **others; /* of a model in several files: those that tensors were taken from */
  int other_count;
};

const char *attn_gguf_type_name(attn_gguf_type type) {
  return (unsigned)type < ATTN_GGUF_TYPES ? types[type].name : "unknown";
}

size_t attn_gguf_type_size(attn_gguf_type type) {
  return (unsigned)type < ATTN_GGUF_TYPES ? (size_t)types[type].size : 0;
}

/* -- Bytes -- */

/* What is left to parse. `begin` is the start of the file: messages give places in it. */
typedef struct reader {
  const unsigned char *begin, *at, *end;
} reader;

static uint64_t left(const reader *r) {
  return (uint64_t)(r->end - r->at);
}

static attn_status take(reader *r, uint64_t size, const char *what, const unsigned char **bytes) {
  if (size > left(r))
    return attn_fail(ATTN_BAD_FORMAT, "%s at byte %llu needs %llu bytes, %llu are left", what,
                     (unsigned long long)(r->at - r->begin), (unsigned long long)size,
                     (unsigned long long)left(r));
  *bytes = r->at;
  r->at += size;
  return ATTN_OK;
}

static attn_status take_u32(reader *r, const char *what, uint32_t *value) {
  const unsigned char *bytes = NULL;
  ATTN_TRY(take(r, sizeof *value, what, &bytes));
  memcpy(value, bytes, sizeof *value);
  return ATTN_OK;
}

static attn_status take_u64(reader *r, const char *what, uint64_t *value) {
  const unsigned char *bytes = NULL;
  ATTN_TRY(take(r, sizeof *value, what, &bytes));
  memcpy(value, bytes, sizeof *value);
  return ATTN_OK;
}

static attn_status take_string(reader *r, const char *what, attn_gguf_text *text) {
  const unsigned char *bytes = NULL;
  uint64_t size = 0;
  ATTN_TRY(take_u64(r, what, &size));
  ATTN_TRY(take(r, size, what, &bytes));
  *text = (attn_gguf_text){(const char *)bytes, (size_t)size};
  return ATTN_OK;
}

/* A key or a tensor's name. Control characters have no place in either, and a NUL would make two
 * names equal that are not. */
static attn_status take_name(reader *r, const char *what, attn_gguf_text *name) {
  ATTN_TRY(take_string(r, what, name));
  if (name->size == 0 || name->size > LONGEST_NAME)
    return attn_fail(ATTN_BAD_FORMAT, "%s of %zu bytes: expected 1 to %d", what, name->size,
                     LONGEST_NAME);
  for (size_t i = 0; i < name->size; ++i) {
    unsigned char c = (unsigned char)name->data[i];
    if (c < ' ' || c == 0x7f)
      return attn_fail(ATTN_BAD_FORMAT, "%s has the control character %d at its byte %zu", what, c,
                       i);
  }
  return ATTN_OK;
}

static int shown_size(size_t size) {
  return size < SHOWN_NAME ? (int)size : SHOWN_NAME;
}

/* Room for item `count` of a list. Lists grow with what has been parsed, not to what a count
 * claims. NULL (and the list as it was) when out of memory. */
static void *grow(void *items, int64_t count, int64_t *capacity, size_t size) {
  enum { FIRST = 64 };
  if (count < *capacity) return items;
  int64_t larger = *capacity ? *capacity * 2 : FIRST;
  void *grown = attn_realloc(items, (size_t)larger * size);
  if (grown) *capacity = larger;
  return grown;
}

/* Names are copied and terminated, so that they can be sorted, compared and shown as C strings. */
static const char *copy_name(char **place, const char *name, size_t size) {
  char *copy = *place;
  memcpy(copy, name, size);
  copy[size] = '\0';
  *place += size + 1;
  return copy;
}

/* -- Metadata -- */

/* Strings one after the other: each has to end within the file. */
static attn_status skip_strings(reader *r, int64_t count) {
  attn_gguf_text text = {NULL, 0};
  for (int64_t i = 0; i < count; ++i) {
    attn_status status = take_string(r, "a string", &text);
    if (status != ATTN_OK) return attn_fail_in(status, "element %lld", (long long)i);
  }
  return ATTN_OK;
}

static attn_status check_bools(const attn_gguf_list *list) {
  for (int64_t i = 0; i < list->count; ++i)
    if (list->data[i] > 1)
      return attn_fail(ATTN_BAD_FORMAT, "element %lld is the bool %d: expected 0 or 1",
                       (long long)i, list->data[i]);
  return ATTN_OK;
}

/* `count` values of a type that is neither unknown nor an array. */
static attn_status parse_values(reader *r, attn_gguf_type type, uint64_t count,
                                attn_gguf_list *list) {
  uint64_t least = types[type].size ? (uint64_t)types[type].size : LENGTH_BYTES;
  const unsigned char *bytes = NULL;
  if (count > left(r) / least)
    return attn_fail(ATTN_BAD_FORMAT,
                     "%llu values of type %s need at least %llu bytes each, "
                     "%llu bytes are left",
                     (unsigned long long)count, types[type].name, (unsigned long long)least,
                     (unsigned long long)left(r));
  *list = (attn_gguf_list){.type = type, .count = (int64_t)count, .data = r->at};
  if (type == ATTN_GGUF_STRING) return skip_strings(r, list->count);
  ATTN_TRY(take(r, count * least, "the value", &bytes));
  return type == ATTN_GGUF_BOOL ? check_bools(list) : ATTN_OK;
}

static attn_status parse_type(reader *r, const char *what, attn_gguf_type *type) {
  uint32_t number = 0;
  ATTN_TRY(take_u32(r, what, &number));
  if (number >= ATTN_GGUF_TYPES)
    return attn_fail(ATTN_BAD_FORMAT, "%s is %u: expected 0 to %d", what, number,
                     ATTN_GGUF_TYPES - 1);
  *type = (attn_gguf_type)number;
  return ATTN_OK;
}

static attn_status parse_value(reader *r, entry *entry) {
  attn_gguf_type type = ATTN_GGUF_TYPES;
  uint64_t count = 1;
  ATTN_TRY(parse_type(r, "the type", &type));
  entry->is_array = type == ATTN_GGUF_ARRAY;
  if (entry->is_array) {
    ATTN_TRY(parse_type(r, "the type of the elements", &type));
    if (type == ATTN_GGUF_ARRAY)
      return attn_fail(ATTN_BAD_FORMAT, "an array of arrays: expected an array of single values");
    ATTN_TRY(take_u64(r, "the number of elements", &count));
  }
  return parse_values(r, type, count, &entry->values);
}

static attn_status parse_entry(reader *r, int64_t index, entry *entry) {
  attn_gguf_text key = {NULL, 0};
  attn_status status = take_name(r, "the key", &key);
  if (status != ATTN_OK) return attn_fail_in(status, "key %lld", (long long)index);
  entry->key = key.data;
  entry->key_size = key.size;
  status = parse_value(r, entry);
  if (status == ATTN_OK) return status;
  return attn_fail_in(status, "key \"%.*s\"", shown_size(key.size), key.data);
}

static attn_status parse_entries(attn_gguf *file, reader *r, int64_t count) {
  int64_t capacity = 0;
  for (int64_t i = 0; i < count; ++i) {
    entry *entries = grow(file->entries, i, &capacity, sizeof *entries);
    if (!entries) return ATTN_OUT_OF_MEMORY;
    file->entries = entries;
    entries[i] = (entry){0};
    ATTN_TRY(parse_entry(r, i, &entries[i]));
    file->entry_count = i + 1;
  }
  return ATTN_OK;
}

static int by_key(const void *a, const void *b) {
  return strcmp(((const entry *)a)->key, ((const entry *)b)->key);
}

static attn_status sort_entries(attn_gguf *file) {
  size_t size = 0;
  for (int64_t i = 0; i < file->entry_count; ++i) size += file->entries[i].key_size + 1;
  char *place = file->keys = attn_alloc(size);
  if (!place) return ATTN_OUT_OF_MEMORY;
  for (int64_t i = 0; i < file->entry_count; ++i)
    file->entries[i].key = copy_name(&place, file->entries[i].key, file->entries[i].key_size);
  if (file->entry_count)
    qsort(file->entries, (size_t)file->entry_count, sizeof *file->entries, by_key);
  for (int64_t i = 1; i < file->entry_count; ++i)
    if (by_key(&file->entries[i - 1], &file->entries[i]) == 0)
      return attn_fail(ATTN_BAD_FORMAT, "two keys are named \"%.128s\"", file->entries[i].key);
  return ATTN_OK;
}

static bool is_string_array(const entry *entry) {
  return entry->is_array && entry->values.type == ATTN_GGUF_STRING;
}

/* Writes where each string of a list (checked before) starts; returns the place after the last. */
static uint64_t *index_list(attn_gguf_list *list, uint64_t *starts) {
  uint64_t place = 0, size;
  list->starts = starts;
  for (int64_t i = 0; i < list->count; ++i) {
    memcpy(&size, list->data + place, sizeof size);
    *starts++ = place;
    place += LENGTH_BYTES + size;
  }
  return starts;
}

/* A vocabulary has some 100,000 strings, which nobody should have to walk to find one. The index
 * takes as many bytes as the strings' lengths in the file. */
static attn_status index_strings(attn_gguf *file) {
  size_t count = 0;
  for (int64_t i = 0; i < file->entry_count; ++i)
    if (is_string_array(&file->entries[i])) count += (size_t)file->entries[i].values.count;
  uint64_t *next = file->starts = attn_alloc(count * sizeof *next);
  if (!next) return ATTN_OUT_OF_MEMORY;
  for (int64_t i = 0; i < file->entry_count; ++i)
    if (is_string_array(&file->entries[i])) next = index_list(&file->entries[i].values, next);
  return ATTN_OK;
}

static attn_status read_alignment(attn_gguf *file) {
  int64_t alignment = DEFAULT_ALIGNMENT;
  ATTN_TRY(
      attn_gguf_int(file, alignment_key, ATTN_OPTIONAL, LEAST_ALIGNMENT, INT32_MAX, &alignment));
  if (alignment & (alignment - 1))
    return attn_fail(ATTN_BAD_FORMAT, "\"%s\": expected a power of two, found %lld", alignment_key,
                     (long long)alignment);
  file->alignment = (uint64_t)alignment;
  return ATTN_OK;
}

static attn_status parse_metadata(attn_gguf *file, reader *r, int64_t count) {
  ATTN_TRY(parse_entries(file, r, count));
  ATTN_TRY(sort_entries(file));
  ATTN_TRY(index_strings(file));
  return read_alignment(file);
}

/* -- Tensors -- */

/* The extents, and in `shown` the elements and bytes that they ask for. */
static attn_status parse_shape(reader *r, attn_gguf_tensor *shown) {
  uint32_t rank = 0;
  ATTN_TRY(take_u32(r, "the rank", &rank));
  if (rank < 1 || rank > ATTN_GGUF_MAX_RANK)
    return attn_fail(ATTN_BAD_FORMAT, "rank %u: expected 1 to %d", rank, ATTN_GGUF_MAX_RANK);
  shown->rank = (int)rank;
  shown->count = 1;
  for (int i = shown->rank - 1; i >= 0; --i) { /* the fastest axis first */
    uint64_t extent = 0;
    ATTN_TRY(take_u64(r, "an extent", &extent));
    if (extent < 1 || extent > INT64_MAX)
      return attn_fail(ATTN_BAD_FORMAT, "extent %d is %llu: expected 1 to %lld", i,
                       (unsigned long long)extent, (long long)INT64_MAX);
    shown->shape[i] = (int64_t)extent;
    if (__builtin_mul_overflow(shown->count, shown->shape[i], &shown->count))
      return attn_fail(ATTN_BAD_FORMAT, "the number of its elements overflows");
  }
  return ATTN_OK;
}

static attn_status parse_block_type(reader *r, attn_gguf_tensor *shown) {
  uint32_t number = 0;
  ATTN_TRY(take_u32(r, "the block type", &number));
  const attn_block_format *format =
      number < ATTN_BLOCK_GGUF_TYPES ? attn_block_get_format((attn_block_type)number) : NULL;
  if (!format) return attn_fail(ATTN_BAD_FORMAT, "block type %u is unknown", number);
  shown->type = (attn_block_type)number;
  int64_t row = shown->shape[shown->rank - 1], bytes;
  if (row % format->elements != 0)
    return attn_fail(ATTN_BAD_FORMAT, "rows of %lld elements are not whole blocks of %s (%d)",
                     (long long)row, format->name, format->elements);
  if (__builtin_mul_overflow(shown->count / format->elements, (int64_t)format->bytes, &bytes))
    return attn_fail(ATTN_BAD_FORMAT, "the number of its bytes overflows");
  shown->bytes = (size_t)bytes;
  return ATTN_OK;
}

static attn_status parse_description(reader *r, uint64_t alignment, tensor *tensor) {
  ATTN_TRY(parse_shape(r, &tensor->shown));
  ATTN_TRY(parse_block_type(r, &tensor->shown));
  ATTN_TRY(take_u64(r, "the offset", &tensor->offset));
  if (tensor->offset % alignment != 0)
    return attn_fail(ATTN_BAD_FORMAT, "offset %llu is not a multiple of the alignment %llu",
                     (unsigned long long)tensor->offset, (unsigned long long)alignment);
  return ATTN_OK;
}

static attn_status parse_tensor(reader *r, int64_t index, uint64_t alignment, tensor *tensor) {
  attn_gguf_text name = {NULL, 0};
  attn_status status = take_name(r, "the name", &name);
  if (status != ATTN_OK) return attn_fail_in(status, "tensor %lld", (long long)index);
  tensor->shown.name = name.data;
  tensor->name_size = name.size;
  status = parse_description(r, alignment, tensor);
  if (status == ATTN_OK) return status;
  return attn_fail_in(status, "tensor \"%.*s\"", shown_size(name.size), name.data);
}

static attn_status parse_descriptions(attn_gguf *file, reader *r, int64_t count) {
  int64_t capacity = 0;
  for (int64_t i = 0; i < count; ++i) {
    tensor *tensors = grow(file->tensors, i, &capacity, sizeof *tensors);
    if (!tensors) return ATTN_OUT_OF_MEMORY;
    file->tensors = tensors;
    tensors[i] = (tensor){0};
    ATTN_TRY(parse_tensor(r, i, file->alignment, &tensors[i]));
    file->tensor_count = i + 1;
  }
  return ATTN_OK;
}

static attn_status name_tensors(attn_gguf *file) {
  size_t size = 0;
  for (int64_t i = 0; i < file->tensor_count; ++i) size += file->tensors[i].name_size + 1;
  char *place = file->names = attn_alloc(size);
  if (!place) return ATTN_OUT_OF_MEMORY;
  for (int64_t i = 0; i < file->tensor_count; ++i) {
    tensor *t = &file->tensors[i];
    t->shown.name = copy_name(&place, t->shown.name, t->name_size);
  }
  return ATTN_OK;
}

/* Where the data begins; a file without tensors may end before. */
static attn_status find_data(const attn_gguf *file, const reader *r, const unsigned char **data,
                             uint64_t *size) {
  uint64_t position = (uint64_t)(r->at - r->begin), mask = file->alignment - 1;
  uint64_t begin = (position + mask) & ~mask; /* no overflow: alignments have 32 bits */
  *size = 0;
  *data = r->end;
  if (file->tensor_count == 0) return ATTN_OK;
  uint64_t end = (uint64_t)(r->end - r->begin);
  if (begin > end)
    return attn_fail(ATTN_BAD_FORMAT, "the data begins at byte %llu, the file ends at %llu",
                     (unsigned long long)begin, (unsigned long long)end);
  *data = r->begin + begin;
  *size = end - begin;
  return ATTN_OK;
}

static int by_offset(const void *a, const void *b) {
  const tensor *x = a, *y = b;
  return x->offset < y->offset ? -1 : x->offset > y->offset;
}

/* Spans lie in the data and do not overlap: that would alias weights. Gaps are allowed, since other
 * writers leave some. Gives each tensor its address. */
static attn_status place_tensors(attn_gguf *file, const reader *r) {
  const unsigned char *data;
  uint64_t size, reached = 0;
  ATTN_TRY(find_data(file, r, &data, &size));
  if (file->tensor_count == 0) return ATTN_OK;
  qsort(file->tensors, (size_t)file->tensor_count, sizeof *file->tensors, by_offset);
  for (int64_t i = 0; i < file->tensor_count; ++i) {
    tensor *t = &file->tensors[i];
    if (t->offset > size || t->shown.bytes > size - t->offset)
      return attn_fail(ATTN_BAD_FORMAT,
                       "tensor \"%.128s\": %zu bytes at offset %llu are outside the data of %llu "
                       "bytes: a truncated file?",
                       t->shown.name, t->shown.bytes, (unsigned long long)t->offset,
                       (unsigned long long)size);
    if (t->offset < reached)
      return attn_fail(ATTN_BAD_FORMAT,
                       "tensor \"%.128s\" begins at offset %llu, before \"%.128s\" ends (%llu)",
                       t->shown.name, (unsigned long long)t->offset, t[-1].shown.name,
                       (unsigned long long)reached);
    reached = t->offset + t->shown.bytes;
    t->shown.data = data + t->offset;
  }
  return ATTN_OK;
}

static int by_name(const void *a, const void *b) {
  return strcmp(((const tensor *)a)->shown.name, ((const tensor *)b)->shown.name);
}

static attn_status sort_tensors(attn_gguf *file) {
  if (file->tensor_count)
    qsort(file->tensors, (size_t)file->tensor_count, sizeof *file->tensors, by_name);
  for (int64_t i = 1; i < file->tensor_count; ++i)
    if (by_name(&file->tensors[i - 1], &file->tensors[i]) == 0)
      return attn_fail(ATTN_BAD_FORMAT, "two tensors are named \"%.128s\"",
                       file->tensors[i].shown.name);
  return ATTN_OK;
}

static attn_status parse_tensors(attn_gguf *file, reader *r, int64_t count) {
  ATTN_TRY(parse_descriptions(file, r, count));
  ATTN_TRY(name_tensors(file));
  ATTN_TRY(place_tensors(file, r));
  return sort_tensors(file);
}

/* -- The whole -- */

static attn_status parse_version(attn_gguf *file, reader *r) {
  const unsigned char *magic = NULL;
  uint32_t version = 0;
  ATTN_TRY(take(r, 4, "the magic number", &magic));
  if (memcmp(magic, "GGUF", 4) != 0)
    return attn_fail(ATTN_BAD_FORMAT,
                     "begins with the bytes %02x %02x %02x %02x: expected \"GGUF\"", magic[0],
                     magic[1], magic[2], magic[3]);
  ATTN_TRY(take_u32(r, "the version", &version));
  /* A big-endian version has its number in the other end. */
  if (version != 0 && (version & 0xffff) == 0)
    return attn_fail(ATTN_BAD_FORMAT, "a big-endian GGUF file: expected a little-endian one");
  if (version < OLDEST_VERSION || version > NEWEST_VERSION)
    return attn_fail(ATTN_BAD_FORMAT, "GGUF version %u: expected %d to %d", version, OLDEST_VERSION,
                     NEWEST_VERSION);
  file->version = (int)version;
  return ATTN_OK;
}

/* What a count claims, checked against the bytes that are left. */
static attn_status take_count(reader *r, const char *what, uint64_t least_bytes, int64_t *count) {
  uint64_t claimed = 0;
  ATTN_TRY(take_u64(r, what, &claimed));
  if (claimed > left(r) / least_bytes)
    return attn_fail(
        ATTN_BAD_FORMAT, "%s is %llu: %llu bytes are left, and each takes %llu or more", what,
        (unsigned long long)claimed, (unsigned long long)left(r), (unsigned long long)least_bytes);
  *count = (int64_t)claimed;
  return ATTN_OK;
}

static attn_status parse(attn_gguf *file, const unsigned char *bytes, size_t size) {
  reader r = {bytes, bytes, bytes + size};
  int64_t tensors = 0, entries = 0;
  ATTN_TRY(parse_version(file, &r));
  ATTN_TRY(take_count(&r, "the number of tensors", LEAST_TENSOR_BYTES, &tensors));
  ATTN_TRY(take_count(&r, "the number of keys", LEAST_KEY_BYTES, &entries));
  ATTN_TRY(parse_metadata(file, &r, entries));
  return parse_tensors(file, &r, tensors);
}

static attn_status parse_file(attn_gguf *file, const char *path) {
  ATTN_TRY(attn_file_map_open(path, &file->map));
  attn_status status = parse(file, file->map.data, file->map.size);
  return status == ATTN_OK ? status : attn_fail_in(status, "%.512s", path);
}

/* Hands over what parsed, closes what did not. */
static attn_status finish(attn_gguf *fresh, attn_status status, attn_gguf **file) {
  if (status == ATTN_OK)
    *file = fresh;
  else
    attn_gguf_close(fresh);
  return status;
}

attn_status attn_gguf_open_one(const char *path, attn_gguf **file) {
  *file = NULL;
  attn_gguf *fresh = attn_alloc_zero(sizeof *fresh);
  if (!fresh) return ATTN_OUT_OF_MEMORY;
  return finish(fresh, parse_file(fresh, path), file);
}

attn_status attn_gguf_open_memory(const void *bytes, size_t size, attn_gguf **file) {
  *file = NULL;
  attn_gguf *fresh = attn_alloc_zero(sizeof *fresh);
  if (!fresh) return ATTN_OUT_OF_MEMORY;
  return finish(fresh, parse(fresh, bytes, size), file);
}

attn_status attn_gguf_join(attn_gguf *file, attn_gguf **others, int count) {
  int64_t sum = file->tensor_count;
  file->others = others;
  file->other_count = count;
  for (int i = 0; i < count; ++i) sum += others[i] ? others[i]->tensor_count : 0;
  tensor *tensors = attn_realloc(file->tensors, (size_t)(sum + 1) * sizeof *tensors);
  if (!tensors) return ATTN_OUT_OF_MEMORY;
  file->tensors = tensors;
  for (int i = 0; i < count; ++i) {
    if (!others[i] || !others[i]->tensor_count) continue;
    memcpy(tensors + file->tensor_count, others[i]->tensors,
           (size_t)others[i]->tensor_count * sizeof *tensors);
    file->tensor_count += others[i]->tensor_count;
  }
  return sort_tensors(file);
}

void attn_gguf_close(attn_gguf *file) {
  if (!file) return;
  for (int i = 0; i < file->other_count; ++i) attn_gguf_close(file->others[i]);
  attn_free(file->others);
  attn_file_map_close(&file->map);
  attn_free(file->entries);
  attn_free(file->tensors);
  attn_free(file->keys);
  attn_free(file->names);
  attn_free(file->starts);
  attn_free(file);
}

int attn_gguf_version(const attn_gguf *file) {
  return file->version;
}

/* -- Values -- */

static bool is_integer(attn_gguf_type type) {
  return type <= ATTN_GGUF_I32 || type == ATTN_GGUF_U64 || type == ATTN_GGUF_I64;
}

static bool is_number(attn_gguf_type type) {
  return is_integer(type) || type == ATTN_GGUF_F32 || type == ATTN_GGUF_F64;
}

static bool is_inside(const attn_gguf_list *list, int64_t i) {
  return i >= 0 && i < list->count;
}

attn_gguf_text attn_gguf_string_at(const attn_gguf_list *list, int64_t i) {
  uint64_t size;
  if (!is_inside(list, i) || list->type != ATTN_GGUF_STRING) return (attn_gguf_text){"", 0};
  const unsigned char *place = list->data + (list->starts ? list->starts[i] : 0);
  memcpy(&size, place, sizeof size);
  return (attn_gguf_text){(const char *)place + LENGTH_BYTES, (size_t)size};
}

/* Values stand unaligned: they are copied out. */
typedef union number {
  uint8_t u8;
  int8_t i8;
  uint16_t u16;
  int16_t i16;
  uint32_t u32;
  int32_t i32;
  uint64_t u64;
  int64_t i64;
  float f32;
  double f64;
} number;

static number load(const attn_gguf_list *list, int64_t i) {
  number n = {.u64 = 0}; /* of a string: nothing is loaded */
  size_t size = (size_t)types[list->type].size;
  memcpy(&n, list->data + (size_t)i * size, size);
  return n;
}

int64_t attn_gguf_int_at(const attn_gguf_list *list, int64_t i) {
  if (!is_inside(list, i)) return 0;
  number n = load(list, i);
  switch (list->type) {
  case ATTN_GGUF_BOOL:
  case ATTN_GGUF_U8: return n.u8;
  case ATTN_GGUF_I8: return n.i8;
  case ATTN_GGUF_U16: return n.u16;
  case ATTN_GGUF_I16: return n.i16;
  case ATTN_GGUF_U32: return n.u32;
  case ATTN_GGUF_I32: return n.i32;
  case ATTN_GGUF_U64: return n.u64 > INT64_MAX ? INT64_MAX : (int64_t)n.u64;
  case ATTN_GGUF_I64: return n.i64;
  default: return 0;
  }
}

double attn_gguf_double_at(const attn_gguf_list *list, int64_t i) {
  if (!is_inside(list, i)) return 0;
  number n = load(list, i);
  switch (list->type) {
  case ATTN_GGUF_F32: return (double)n.f32;
  case ATTN_GGUF_F64: return n.f64;
  case ATTN_GGUF_U64: return (double)n.u64;
  default: return (double)attn_gguf_int_at(list, i);
  }
}

/* -- Getters -- */

int64_t attn_gguf_key_count(const attn_gguf *file) {
  return file->entry_count;
}

const char *attn_gguf_key(const attn_gguf *file, int64_t index) {
  return index >= 0 && index < file->entry_count ? file->entries[index].key : NULL;
}

attn_gguf_type attn_gguf_key_type(const attn_gguf *file, int64_t index) {
  if (index < 0 || index >= file->entry_count) return ATTN_GGUF_TYPES;
  const entry *entry = &file->entries[index];
  return entry->is_array ? ATTN_GGUF_ARRAY : entry->values.type;
}

attn_gguf_list attn_gguf_values(const attn_gguf *file, int64_t index) {
  if (index < 0 || index >= file->entry_count) return (attn_gguf_list){.type = ATTN_GGUF_TYPES};
  return file->entries[index].values;
}

/* The value in a few characters, for messages. */
static const char *describe(const entry *entry, char *text, size_t size) {
  enum { SHOWN = 40 };
  const attn_gguf_list *values = &entry->values;
  const char *type = types[values->type].name;
  attn_gguf_text string = attn_gguf_string_at(values, 0);
  if (entry->is_array)
    snprintf(text, size, "an array of %lld values of type %s", (long long)values->count, type);
  else if (values->type == ATTN_GGUF_STRING)
    snprintf(text, size, "the string \"%.*s\"", string.size < SHOWN ? (int)string.size : SHOWN,
             string.data);
  else if (values->type == ATTN_GGUF_BOOL)
    snprintf(text, size, "%s", attn_gguf_int_at(values, 0) ? "true" : "false");
  else if (values->type == ATTN_GGUF_U64)
    snprintf(text, size, "%llu (%s)", (unsigned long long)load(values, 0).u64, type);
  else if (is_integer(values->type))
    snprintf(text, size, "%lld (%s)", (long long)attn_gguf_int_at(values, 0), type);
  else
    snprintf(text, size, "%.17g (%s)", attn_gguf_double_at(values, 0), type);
  return text;
}

static attn_status fail_found(const char *key, const char *expected, const entry *found) {
  char text[96];
  return attn_fail(ATTN_BAD_FORMAT, "\"%.128s\": expected %s, found %s", key, expected,
                   describe(found, text, sizeof text));
}

/* *found is NULL when the key is absent and optional. */
static attn_status look_up(const attn_gguf *file, const char *key, attn_json_need need,
                           const char *expected, const entry **found) {
  entry wanted = {.key = key};
  *found = NULL;
  if (file->entry_count)
    *found = bsearch(&wanted, file->entries, (size_t)file->entry_count, sizeof wanted, by_key);
  if (*found || need == ATTN_OPTIONAL) return ATTN_OK;
  return attn_fail(ATTN_BAD_FORMAT, "\"%.128s\" is missing: expected %s", key, expected);
}

static bool in_range(const attn_gguf_list *list, int64_t i, int64_t minimum, int64_t maximum) {
  if (list->type == ATTN_GGUF_U64 && load(list, i).u64 > INT64_MAX) return false;
  int64_t value = attn_gguf_int_at(list, i);
  return value >= minimum && value <= maximum;
}

attn_status attn_gguf_int(const attn_gguf *file, const char *key, attn_json_need need,
                          int64_t minimum, int64_t maximum, int64_t *value) {
  char expected[96];
  const entry *found;
  snprintf(expected, sizeof expected, "an integer from %lld to %lld", (long long)minimum,
           (long long)maximum);
  ATTN_TRY(look_up(file, key, need, expected, &found));
  if (!found) return ATTN_OK;
  if (found->is_array || !is_integer(found->values.type) ||
      !in_range(&found->values, 0, minimum, maximum))
    return fail_found(key, expected, found);
  *value = attn_gguf_int_at(&found->values, 0);
  return ATTN_OK;
}

/* The decimal of the fewest digits that is this float32. */
static double shortest(double value) {
  enum { FEWEST = 6, MOST = 9 };
  char text[32];
  double found = value;
  for (int digits = FEWEST; digits <= MOST; ++digits) {
    snprintf(text, sizeof text, "%.*g", digits, value);
    found = strtod(text, NULL);
    if ((float)found == (float)value) return found;
  }
  return value;
}

attn_status attn_gguf_double(const attn_gguf *file, const char *key, attn_json_need need,
                             double minimum, double maximum, double *value) {
  char expected[96];
  const entry *found;
  snprintf(expected, sizeof expected, "a number from %g to %g", minimum, maximum);
  ATTN_TRY(look_up(file, key, need, expected, &found));
  if (!found) return ATTN_OK;
  if (found->is_array || !is_number(found->values.type)) return fail_found(key, expected, found);
  double number = attn_gguf_double_at(&found->values, 0);
  if (found->values.type == ATTN_GGUF_F32) number = shortest(number);
  if (!(number >= minimum && number <= maximum)) return fail_found(key, expected, found);
  *value = number;
  return ATTN_OK;
}

attn_status attn_gguf_bool(const attn_gguf *file, const char *key, attn_json_need need,
                           bool *value) {
  static const char expected[] = "true or false";
  const entry *found;
  ATTN_TRY(look_up(file, key, need, expected, &found));
  if (!found) return ATTN_OK;
  if (found->is_array || found->values.type != ATTN_GGUF_BOOL)
    return fail_found(key, expected, found);
  *value = attn_gguf_int_at(&found->values, 0) != 0;
  return ATTN_OK;
}

attn_status attn_gguf_string(const attn_gguf *file, const char *key, attn_json_need need,
                             attn_gguf_text *value) {
  static const char expected[] = "a string";
  const entry *found;
  ATTN_TRY(look_up(file, key, need, expected, &found));
  if (!found) return ATTN_OK;
  if (found->is_array || found->values.type != ATTN_GGUF_STRING)
    return fail_found(key, expected, found);
  *value = attn_gguf_string_at(&found->values, 0);
  return ATTN_OK;
}

static bool is_any(attn_gguf_type type) {
  (void)type;
  return true;
}

static bool is_string(attn_gguf_type type) {
  return type == ATTN_GGUF_STRING;
}

/* An array whose elements have a type that `fits` accepts. */
static attn_status find_array(const attn_gguf *file, const char *key, attn_json_need need,
                              bool (*fits)(attn_gguf_type), const char *expected,
                              const entry **found) {
  ATTN_TRY(look_up(file, key, need, expected, found));
  if (!*found || ((*found)->is_array && fits((*found)->values.type))) return ATTN_OK;
  return fail_found(key, expected, *found);
}

attn_status attn_gguf_array(const attn_gguf *file, const char *key, attn_json_need need,
                            attn_gguf_list *list) {
  const entry *found;
  ATTN_TRY(find_array(file, key, need, is_any, "an array", &found));
  if (found) *list = found->values;
  return ATTN_OK;
}

attn_status attn_gguf_strings(const attn_gguf *file, const char *key, attn_json_need need,
                              attn_gguf_list *list) {
  const entry *found;
  ATTN_TRY(find_array(file, key, need, is_string, "an array of strings", &found));
  if (found) *list = found->values;
  return ATTN_OK;
}

attn_status attn_gguf_doubles(const attn_gguf *file, const char *key, attn_json_need need,
                              attn_gguf_list *list) {
  const entry *found;
  ATTN_TRY(find_array(file, key, need, is_number, "an array of numbers", &found));
  if (found) *list = found->values;
  return ATTN_OK;
}

attn_status attn_gguf_ints(const attn_gguf *file, const char *key, attn_json_need need,
                           int64_t minimum, int64_t maximum, attn_gguf_list *list) {
  const entry *found;
  ATTN_TRY(find_array(file, key, need, is_integer, "an array of integers", &found));
  if (!found) return ATTN_OK;
  for (int64_t i = 0; i < found->values.count; ++i)
    if (!in_range(&found->values, i, minimum, maximum))
      return attn_fail(ATTN_BAD_FORMAT,
                       "\"%.128s\": element %lld is %lld: expected an integer from %lld to %lld",
                       key, (long long)i, (long long)attn_gguf_int_at(&found->values, i),
                       (long long)minimum, (long long)maximum);
  *list = found->values;
  return ATTN_OK;
}

/* -- Tensors by index and name -- */

int64_t attn_gguf_tensor_count(const attn_gguf *file) {
  return file->tensor_count;
}

const attn_gguf_tensor *attn_gguf_tensor_at(const attn_gguf *file, int64_t index) {
  return index >= 0 && index < file->tensor_count ? &file->tensors[index].shown : NULL;
}

static const char *name_at(const void *context, int64_t i) {
  return ((const attn_gguf *)context)->tensors[i].shown.name;
}

attn_status attn_gguf_find(const attn_gguf *file, const char *name,
                           const attn_gguf_tensor **result) {
  tensor wanted = {.shown = {.name = name}};
  const tensor *found = NULL;
  char hint[ATTN_HINT_SIZE];
  if (file->tensor_count)
    found = bsearch(&wanted, file->tensors, (size_t)file->tensor_count, sizeof wanted, by_name);
  *result = found ? &found->shown : NULL;
  if (found) return ATTN_OK;
  return attn_fail(ATTN_NOT_FOUND, "no tensor \"%.128s\" among %lld%s", name,
                   (long long)file->tensor_count,
                   attn_close_names(name, name_at, file, file->tensor_count, hint));
}
