/* GGUF in several files, as llama.cpp's gguf-split makes them: NAME-00001-of-00003.gguf and so on,
 * each a GGUF file of its own with the keys
 *   split.no              0 in the first
 *   split.count           3
 *   split.tensors.count   in all of them together
 * The first has the metadata. */
#ifndef ATTN_FILES_GGUF_SPLIT_H
#define ATTN_FILES_GGUF_SPLIT_H

#include "files/gguf.h"

enum { ATTN_GGUF_MOST_SHARDS = 9999 };

extern const char attn_gguf_split_number[], attn_gguf_split_count[], attn_gguf_split_tensors[];

/* The name of shard `number` (from 0) of `count`: path with or without ".gguf". NULL when out of
 * memory; to be freed by attn_free. */
char *attn_gguf_shard_path(const char *path, int number, int count);

/* One file by itself (gguf.c). */
attn_status attn_gguf_open_one(const char *path, attn_gguf **file);
/* Adds the tensors of `count` others, which become the file's own, array and all, even on an
 * error. ATTN_BAD_FORMAT when a name stands twice. */
attn_status attn_gguf_join(attn_gguf *file, attn_gguf **others, int count);

#endif
