#include "files/gguf_write.h"
#include "base/io.h"
#include "base/memory.h"
#include "base/status.h"
#include "base/text.h"
#include "files/gguf_split.h"

#include <string.h>

enum { VERSION = 3, ALIGNMENT = 32 };

typedef struct planned {
  char *name;
  attn_block_type type;
  int rank;
  int64_t shape[ATTN_GGUF_MAX_RANK];
  uint64_t bytes;
} planned;

struct attn_gguf_draft {
  attn_text keys; /* as they stand in the file */
  int64_t key_count;
  attn_text names; /* of the keys, each with its NUL */
  planned *tensors;
  int64_t tensor_count, tensor_capacity;
};

attn_gguf_draft *attn_gguf_draft_create(void) {
  return attn_alloc_zero(sizeof(attn_gguf_draft));
}

void attn_gguf_draft_destroy(attn_gguf_draft *draft) {
  if (!draft) return;
  for (int64_t i = 0; i < draft->tensor_count; ++i) attn_free(draft->tensors[i].name);
  attn_free(draft->tensors);
  attn_text_free(&draft->keys);
  attn_text_free(&draft->names);
  attn_free(draft);
}

/* -- Metadata -- */

static void put(attn_text *text, const void *bytes, size_t size) {
  if (size) attn_text_add(text, bytes, size);
}

static void put_u32(attn_text *text, uint32_t value) {
  put(text, &value, sizeof value);
}

static void put_u64(attn_text *text, uint64_t value) {
  put(text, &value, sizeof value);
}

static void put_string(attn_text *text, const char *bytes, size_t size) {
  put_u64(text, size);
  put(text, bytes, size);
}

static void begin(attn_gguf_draft *draft, const char *key, attn_gguf_type type) {
  put_string(&draft->keys, key, strlen(key));
  put_u32(&draft->keys, type);
  put(&draft->names, key, strlen(key) + 1);
  ++draft->key_count;
}

static void begin_array(attn_gguf_draft *draft, const char *key, attn_gguf_type type,
                        int64_t count) {
  begin(draft, key, ATTN_GGUF_ARRAY);
  put_u32(&draft->keys, type);
  put_u64(&draft->keys, (uint64_t)count);
}

void attn_gguf_add_u32(attn_gguf_draft *draft, const char *key, uint32_t value) {
  begin(draft, key, ATTN_GGUF_U32);
  put_u32(&draft->keys, value);
}

void attn_gguf_add_i32(attn_gguf_draft *draft, const char *key, int32_t value) {
  begin(draft, key, ATTN_GGUF_I32);
  put_u32(&draft->keys, (uint32_t)value);
}

void attn_gguf_add_f32(attn_gguf_draft *draft, const char *key, float value) {
  begin(draft, key, ATTN_GGUF_F32);
  put(&draft->keys, &value, sizeof value);
}

void attn_gguf_add_bool(attn_gguf_draft *draft, const char *key, bool value) {
  unsigned char byte = value;
  begin(draft, key, ATTN_GGUF_BOOL);
  put(&draft->keys, &byte, 1);
}

void attn_gguf_add_string(attn_gguf_draft *draft, const char *key, const char *bytes, size_t size) {
  begin(draft, key, ATTN_GGUF_STRING);
  put_string(&draft->keys, bytes, size);
}

void attn_gguf_add_u8s(attn_gguf_draft *draft, const char *key, const char *bytes, size_t size) {
  begin_array(draft, key, ATTN_GGUF_U8, (int64_t)size);
  put(&draft->keys, bytes, size);
}

void attn_gguf_add_i32s(attn_gguf_draft *draft, const char *key, const int32_t *values,
                        int64_t count) {
  begin_array(draft, key, ATTN_GGUF_I32, count);
  put(&draft->keys, values, (size_t)count * sizeof *values);
}

void attn_gguf_add_f32s(attn_gguf_draft *draft, const char *key, const float *values,
                        int64_t count) {
  begin_array(draft, key, ATTN_GGUF_F32, count);
  put(&draft->keys, values, (size_t)count * sizeof *values);
}

void attn_gguf_add_strings(attn_gguf_draft *draft, const char *key, int64_t count) {
  begin_array(draft, key, ATTN_GGUF_STRING, count);
}

void attn_gguf_add_element(attn_gguf_draft *draft, const char *bytes, size_t size) {
  put_string(&draft->keys, bytes, size);
}

void attn_gguf_add_copy(attn_gguf_draft *draft, const attn_gguf *file, int64_t index) {
  const char *key = attn_gguf_key(file, index);
  attn_gguf_list values = attn_gguf_values(file, index);
  if (attn_gguf_key_type(file, index) == ATTN_GGUF_ARRAY)
    begin_array(draft, key, values.type, values.count);
  else
    begin(draft, key, values.type);
  if (values.type != ATTN_GGUF_STRING) {
    put(&draft->keys, values.data, (size_t)values.count * attn_gguf_type_size(values.type));
    return;
  }
  for (int64_t i = 0; i < values.count; ++i) {
    attn_gguf_text text = attn_gguf_string_at(&values, i);
    put_string(&draft->keys, text.data, text.size);
  }
}

bool attn_gguf_has_key(const attn_gguf_draft *draft, const char *key) {
  const char *at = draft->names.data, *end = at ? at + draft->names.length : at;
  for (; at < end; at += strlen(at) + 1)
    if (strcmp(at, key) == 0) return true;
  return false;
}

/* -- Tensors -- */

static attn_status plan(planned *t, const char *name, attn_block_type type, int rank,
                        const int64_t *shape) {
  const attn_block_format *format = attn_block_get_format(type);
  if (!format || type >= ATTN_BLOCK_GGUF_TYPES || rank < 1 || rank > ATTN_GGUF_MAX_RANK ||
      shape[rank - 1] % format->elements != 0)
    return attn_fail(ATTN_INVALID_SHAPE,
                     "%s: rows are not whole blocks of a type of GGUF, or the rank is not 1 to %d",
                     name, ATTN_GGUF_MAX_RANK);
  uint64_t count = 1;
  for (int i = 0; i < rank; ++i) count *= (uint64_t)(t->shape[i] = shape[i]);
  t->type = type;
  t->rank = rank;
  t->bytes = count / (uint64_t)format->elements * (uint64_t)format->bytes;
  t->name = attn_strdup(name);
  return t->name ? ATTN_OK : ATTN_OUT_OF_MEMORY;
}

attn_status attn_gguf_add_tensor(attn_gguf_draft *draft, const char *name, attn_block_type type,
                                 int rank, const int64_t *shape) {
  enum { FIRST = 64 };
  if (draft->tensor_count == draft->tensor_capacity) {
    int64_t larger = draft->tensor_capacity ? 2 * draft->tensor_capacity : FIRST;
    planned *grown = attn_realloc(draft->tensors, (size_t)larger * sizeof *grown);
    if (!grown) return ATTN_OUT_OF_MEMORY;
    draft->tensors = grown;
    draft->tensor_capacity = larger;
  }
  planned t = {0};
  ATTN_TRY(plan(&t, name, type, rank, shape));
  draft->tensors[draft->tensor_count++] = t;
  return ATTN_OK;
}

static uint64_t padded(uint64_t size) {
  return (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

/* -- The file -- */

/* Tensors first .. last - 1; `number` of `count` files. */
typedef struct span {
  int64_t first, last;
  int number, count;
} span;

static void describe(const planned *t, uint64_t offset, attn_text *text) {
  put_string(text, t->name, strlen(t->name));
  put_u32(text, (uint32_t)t->rank);
  for (int i = t->rank - 1; i >= 0; --i) put_u64(text, (uint64_t)t->shape[i]);
  put_u32(text, t->type);
  put_u64(text, offset);
}

static void put_u16_key(attn_text *text, const char *key, int value) {
  uint16_t number = (uint16_t)value;
  put_string(text, key, strlen(key));
  put_u32(text, ATTN_GGUF_U16);
  put(text, &number, sizeof number);
}

/* What tells the shards of a model from one another. */
static void put_split(const attn_gguf_draft *draft, const span *s, attn_text *text) {
  put_u16_key(text, attn_gguf_split_number, s->number);
  put_u16_key(text, attn_gguf_split_count, s->count);
  put_string(text, attn_gguf_split_tensors, strlen(attn_gguf_split_tensors));
  put_u32(text, ATTN_GGUF_I32);
  put_u32(text, (uint32_t)draft->tensor_count);
}

static void put_header(const attn_gguf_draft *draft, const span *s, attn_text *text) {
  enum { SPLIT_KEYS = 3 };
  int64_t own = s->number == 0 ? draft->key_count : 0;
  uint64_t offset = 0;
  put(text, "GGUF", 4);
  put_u32(text, VERSION);
  put_u64(text, (uint64_t)(s->last - s->first));
  put_u64(text, (uint64_t)(own + (s->count > 1 ? SPLIT_KEYS : 0)));
  if (own) put(text, draft->keys.data, draft->keys.length);
  if (s->count > 1) put_split(draft, s, text);
  for (int64_t i = s->first; i < s->last; ++i) {
    describe(&draft->tensors[i], offset, text);
    offset += padded(draft->tensors[i].bytes);
  }
  static const char zeros[ALIGNMENT];
  put(text, zeros, padded(text->length) - text->length);
}

struct attn_gguf_sink {
  attn_file_writer *writer;
  uint64_t left;
};

attn_status attn_gguf_put(attn_gguf_sink *sink, const void *bytes, size_t size) {
  if (size > sink->left)
    return attn_fail(ATTN_INTERNAL, "%zu bytes of a tensor that takes %llu more", size,
                     (unsigned long long)sink->left);
  sink->left -= size;
  return attn_file_writer_write(sink->writer, bytes, size);
}

static attn_status put_tensor(const planned *t, int64_t index, attn_gguf_fill fill,
                              const void *context, attn_file_writer *writer) {
  static const char zeros[ALIGNMENT];
  attn_gguf_sink sink = {writer, t->bytes};
  attn_status status = fill(context, index, &sink);
  if (status != ATTN_OK) return attn_fail_in(status, "%s", t->name);
  if (sink.left)
    return attn_fail(ATTN_INTERNAL, "%s: %llu bytes are missing", t->name,
                     (unsigned long long)sink.left);
  return attn_file_writer_write(writer, zeros, (size_t)(padded(t->bytes) - t->bytes));
}

static attn_status write_shard(const attn_gguf_draft *draft, const span *s, const char *path,
                               attn_gguf_fill fill, const void *context) {
  attn_file_writer *writer;
  attn_text header = {0};
  ATTN_TRY(attn_file_writer_open(path, &writer));
  put_header(draft, s, &header);
  attn_status status = header.failed ? ATTN_OUT_OF_MEMORY : ATTN_OK;
  if (status == ATTN_OK) status = attn_file_writer_write(writer, header.data, header.length);
  attn_text_free(&header);
  for (int64_t i = s->first; i < s->last && status == ATTN_OK; ++i)
    status = put_tensor(&draft->tensors[i], i, fill, context, writer);
  if (status == ATTN_OK) return attn_file_writer_commit(writer);
  attn_file_writer_abort(writer);
  return status;
}

/* Where a shard that begins with tensor `first` ends. */
static int64_t end_of_shard(const attn_gguf_draft *draft, int64_t first, int64_t shard_bytes) {
  uint64_t size = 0, most = shard_bytes > 0 ? (uint64_t)shard_bytes : UINT64_MAX;
  int64_t i = first;
  for (; i < draft->tensor_count; ++i) {
    size += padded(draft->tensors[i].bytes);
    if (i > first && size > most) break;
  }
  return i;
}

attn_status attn_gguf_draft_write(const attn_gguf_draft *draft, const char *path,
                                  int64_t shard_bytes, attn_gguf_fill fill, const void *context,
                                  int *files) {
  if (draft->keys.failed || draft->names.failed) return ATTN_OUT_OF_MEMORY;
  int count = 0;
  for (int64_t first = 0; first < draft->tensor_count || !count; ++count)
    first = end_of_shard(draft, first, shard_bytes);
  if (count > ATTN_GGUF_MOST_SHARDS)
    return attn_fail(ATTN_INVALID_ARGUMENT, "%s: shards of %lld bytes would be %d, the most are %d",
                     path, (long long)shard_bytes, count, ATTN_GGUF_MOST_SHARDS);
  if (files) *files = count;
  span s = {.count = count};
  for (; s.number < count; ++s.number, s.first = s.last) {
    char *name = count > 1 ? attn_gguf_shard_path(path, s.number, count) : attn_strdup(path);
    if (!name) return ATTN_OUT_OF_MEMORY;
    s.last = end_of_shard(draft, s.first, shard_bytes);
    attn_status status = write_shard(draft, &s, name, fill, context);
    attn_free(name);
    ATTN_TRY(status);
  }
  return ATTN_OK;
}
