/* Writing GGUF (the format: gguf.h), version 3. Keys and descriptions of tensors are collected in a
 * draft; their data are asked for one tensor at a time, so that nothing as large as the weights is
 * ever held. */
#ifndef ATTN_FILES_GGUF_WRITE_H
#define ATTN_FILES_GGUF_WRITE_H

#include "files/gguf.h"

typedef struct attn_gguf_draft attn_gguf_draft;

/* NULL when out of memory. */
attn_gguf_draft *attn_gguf_draft_create(void);
void attn_gguf_draft_destroy(attn_gguf_draft *draft); /* NULL is fine */

/* Metadata: a key once, in the order of the file. What fails for want of memory fails when the
 * draft is written. */
void attn_gguf_add_u32(attn_gguf_draft *draft, const char *key, uint32_t value);
void attn_gguf_add_i32(attn_gguf_draft *draft, const char *key, int32_t value);
void attn_gguf_add_f32(attn_gguf_draft *draft, const char *key, float value);
void attn_gguf_add_bool(attn_gguf_draft *draft, const char *key, bool value);
void attn_gguf_add_string(attn_gguf_draft *draft, const char *key, const char *bytes, size_t size);
void attn_gguf_add_u8s(attn_gguf_draft *draft, const char *key, const char *bytes, size_t size);
void attn_gguf_add_i32s(attn_gguf_draft *draft, const char *key, const int32_t *values,
                        int64_t count);
void attn_gguf_add_f32s(attn_gguf_draft *draft, const char *key, const float *values,
                        int64_t count);
/* An array of `count` strings, each of which is then given by attn_gguf_add_element. */
void attn_gguf_add_strings(attn_gguf_draft *draft, const char *key, int64_t count);
void attn_gguf_add_element(attn_gguf_draft *draft, const char *bytes, size_t size);
/* The index-th key of another file, as it is. */
void attn_gguf_add_copy(attn_gguf_draft *draft, const attn_gguf *file, int64_t index);
bool attn_gguf_has_key(const attn_gguf_draft *draft, const char *key);

/* The next tensor; its rows are whole blocks of the type. */
attn_status attn_gguf_add_tensor(attn_gguf_draft *draft, const char *name, attn_block_type type,
                                 int rank, const int64_t *shape);

/* Where the data of one tensor go: exactly as many bytes as its description asks for. */
typedef struct attn_gguf_sink attn_gguf_sink;
attn_status attn_gguf_put(attn_gguf_sink *sink, const void *bytes, size_t size);
typedef attn_status (*attn_gguf_fill)(const void *context, int64_t tensor, attn_gguf_sink *sink);

/* Writes the file beside its target and renames it. With shard_bytes > 0 and more data than that,
 * several: NAME-00001-of-0000N.gguf and so on, each with at most so many bytes of data or one
 * tensor, the first with all the metadata; `path` itself is not written then. *files (may be NULL)
 * receives N. */
attn_status attn_gguf_draft_write(const attn_gguf_draft *draft, const char *path,
                                  int64_t shard_bytes, attn_gguf_fill fill, const void *context,
                                  int *files);

#endif
