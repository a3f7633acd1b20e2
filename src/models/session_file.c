/* Sessions as files. */
#include "base/hash.h"
#include "base/io.h"
#include "base/memory.h"
#include "base/status.h"
#include "models/session.h"

#include <string.h>

/* The file: header, tokens, logits, each layer's state, checksum of all before it. Numbers are
 * little-endian, as in memory on every machine that libattn runs on. */
typedef struct session_header {
  char magic[8];
  uint64_t version;
  uint64_t model; /* fingerprint: a state fits no other */
  int64_t position, vocabulary, has_logits, compute;
} session_header;

static const char session_magic[8] = "attnses";
enum { SESSION_VERSION = 1 };

static session_header make_header(const attn_session *s) {
  session_header header = {.version = SESSION_VERSION,
                           .model = attn_model_fingerprint(s->model),
                           .position = attn_session_position(s),
                           .vocabulary = s->model->config.vocabulary,
                           .has_logits = s->has_logits,
                           .compute = s->model->compute};
  memcpy(header.magic, session_magic, sizeof header.magic);
  return header;
}

typedef struct hashing_writer {
  attn_file_writer *file;
  uint64_t hash;
} hashing_writer;

static attn_status write_hashed(void *context, const void *data, size_t size) {
  hashing_writer *writer = context;
  writer->hash = attn_hash(writer->hash, data, size);
  return attn_file_writer_write(writer->file, data, size);
}

static attn_status write_session(const attn_session *s, hashing_writer *w) {
  session_header header = make_header(s);
  ATTN_TRY(write_hashed(w, &header, sizeof header));
  ATTN_TRY(write_hashed(w, s->tokens, (size_t)header.position * sizeof *s->tokens));
  ATTN_TRY(write_hashed(w, s->logits, (size_t)header.vocabulary * sizeof *s->logits));
  for (int64_t l = 0; l < attn_session_layers(s); ++l)
    ATTN_TRY(attn_state_save(s->states[l], write_hashed, w));
  uint64_t sum = w->hash;
  return attn_file_writer_write(w->file, &sum, sizeof sum);
}

attn_status attn_session_save(const attn_session *session, const char *path) {
  hashing_writer writer = {.hash = ATTN_HASH_START};
  ATTN_TRY(attn_file_writer_open(path, &writer.file));
  attn_status status = write_session(session, &writer);
  if (status == ATTN_OK) return attn_file_writer_commit(writer.file);
  attn_file_writer_abort(writer.file);
  return status;
}

typedef struct reader {
  const unsigned char *data;
  size_t left;
} reader;

static attn_status read_bytes(void *context, void *data, size_t size) {
  reader *r = context;
  if (size > r->left) return attn_fail(ATTN_BAD_FORMAT, "the session file is too short");
  memcpy(data, r->data, size);
  r->data += size;
  r->left -= size;
  return ATTN_OK;
}

static attn_status check_file(const attn_session *s, const attn_file_map *map,
                              session_header *header) {
  uint64_t sum;
  if (map->size < sizeof *header + sizeof sum)
    return attn_fail(ATTN_BAD_FORMAT, "too short for a session");
  memcpy(header, map->data, sizeof *header);
  memcpy(&sum, map->data + map->size - sizeof sum, sizeof sum);
  if (memcmp(header->magic, session_magic, sizeof header->magic) != 0)
    return attn_fail(ATTN_BAD_FORMAT, "not a session of libattn");
  if (header->version != SESSION_VERSION)
    return attn_fail(ATTN_BAD_FORMAT, "session version %llu, this library reads %d",
                     (unsigned long long)header->version, SESSION_VERSION);
  if (attn_hash(ATTN_HASH_START, map->data, map->size - sizeof sum) != sum)
    return attn_fail(ATTN_BAD_FORMAT, "the checksum is wrong: truncated or damaged");
  if (header->model != attn_model_fingerprint(s->model) ||
      header->vocabulary != s->model->config.vocabulary ||
      header->compute != (int64_t)s->model->compute)
    return attn_fail(ATTN_BAD_FORMAT, "the session belongs to another model or dtype");
  if (header->position < 0 || header->position > s->options.max_tokens)
    return attn_fail(ATTN_BAD_FORMAT, "%lld tokens do not fit a session of %lld",
                     (long long)header->position, (long long)s->options.max_tokens);
  return ATTN_OK;
}

static attn_status read_session(attn_session *s, const session_header *header, reader *r) {
  ATTN_TRY(read_bytes(r, s->tokens, (size_t)header->position * sizeof *s->tokens));
  if (header->position && attn_session_check_tokens(s, s->tokens, header->position) != ATTN_OK)
    return attn_fail_in(ATTN_BAD_FORMAT, "its tokens");
  ATTN_TRY(read_bytes(r, s->logits, (size_t)header->vocabulary * sizeof *s->logits));
  for (int64_t l = 0; l < attn_session_layers(s); ++l) {
    ATTN_TRY(attn_state_restore(s->states[l], read_bytes, r));
    if (attn_state_position(s->states[l]) != header->position)
      return attn_fail(ATTN_BAD_FORMAT, "layer %lld is at another position", (long long)l);
  }
  s->has_logits = header->has_logits != 0;
  return ATTN_OK;
}

attn_status attn_session_read_tokens(const attn_session *s, const char *path, int32_t **tokens,
                                     int64_t *count) {
  attn_file_map map;
  ATTN_TRY(attn_file_map_open(path, &map));
  session_header header;
  attn_status status = ATTN_BAD_FORMAT;
  if (map.size > sizeof header) {
    memcpy(&header, map.data, sizeof header);
    uint64_t room = (map.size - sizeof header) / sizeof **tokens;
    bool fits = header.position >= 0 && header.position <= s->options.max_tokens &&
                (uint64_t)header.position <= room;
    bool ours = memcmp(header.magic, session_magic, sizeof header.magic) == 0 &&
                header.version == SESSION_VERSION &&
                header.model == attn_model_fingerprint(s->model) &&
                header.compute == (int64_t)s->model->compute;
    if (fits && ours) status = ATTN_OK;
  }
  if (status == ATTN_OK) {
    *count = header.position;
    *tokens = attn_alloc_array((size_t)*count + 1, sizeof **tokens);
    if (*tokens)
      memcpy(*tokens, map.data + sizeof header, (size_t)*count * sizeof **tokens);
    else
      status = ATTN_OUT_OF_MEMORY;
  }
  attn_file_map_close(&map);
  return status;
}

attn_status attn_session_restore(attn_session *session, const char *path) {
  attn_file_map map;
  session_header header;
  ATTN_TRY(attn_file_map_open(path, &map));
  attn_status status = check_file(session, &map, &header);
  if (status == ATTN_OK) {
    attn_session_clear(session);
    reader r = {.data = map.data + sizeof header, .left = map.size - sizeof header - 8};
    status = read_session(session, &header, &r);
    if (status != ATTN_OK)
      attn_session_clear(session);
    else if (header.position)
      attn_session_take_checkpoint(session);
  }
  attn_file_map_close(&map);
  return status == ATTN_OK ? ATTN_OK : attn_fail_in(status, "%s", path);
}
