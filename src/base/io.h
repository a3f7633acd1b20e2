/* Files: reading whole, mapping into memory, and writing so that a failure loses nothing.
 *
 * Every operation that the system can refuse passes attn_fault_hit(ATTN_FAULT_IO), so that tests
 * can make the n-th fail. Messages carry the path and the system's reason. */
#ifndef ATTN_BASE_IO_H
#define ATTN_BASE_IO_H

#include "attn/base.h"

/* "base/name", or a copy of `name` when it is absolute or base is "". NULL when out of memory; to
 * be freed by attn_free. */
char *attn_path_join(const char *base, const char *name);
/* The part before the last '/', "." when there is none, "/" at the root. */
char *attn_path_directory(const char *path);
bool attn_path_exists(const char *path);
bool attn_path_is_directory(const char *path);
/* Whether `path` ends in `suffix`, e.g. ".safetensors". */
bool attn_path_has_suffix(const char *path, const char *suffix);
/* Makes the directory and those above it; one that exists is fine. */
attn_status attn_make_directories(const char *path);

attn_status attn_file_remove(const char *path);
/* Removes the files of a directory whose names match. */
typedef bool attn_name_matches(const char *name, const void *context);
attn_status attn_directory_remove(const char *path, attn_name_matches *matches,
                                  const void *context);

/* The whole file, with a NUL after it (not counted in *size, which may be NULL); to be freed by
 * attn_free. ATTN_BAD_FORMAT when the file is larger than `limit` bytes. Pipes work too. */
attn_status attn_file_read(const char *path, size_t limit, char **data, size_t *size);

/* A file in memory, read-only. An empty file has data != NULL and size 0. If another process
 * shortens the file while it is mapped, touching the lost pages is fatal (SIGBUS): replace files by
 * renaming, as the writer below does. */
typedef struct attn_file_map {
  const unsigned char *data;
  size_t size;
} attn_file_map;

attn_status attn_file_map_open(const char *path, attn_file_map *map);
void attn_file_map_close(attn_file_map *map); /* a closed or zeroed map is fine */

/* Writes to a temporary beside the target; commit makes it durable (fsync) and renames it over the
 * target. Until then, and after any failure, the old file is whole. A target that is not a regular
 * file (/dev/stdout, a pipe) is written directly. */
typedef struct attn_file_writer attn_file_writer;

attn_status attn_file_writer_open(const char *path, attn_file_writer **writer);
/* After a failure the writer stays failed: further writes and commit return the same status. */
attn_status attn_file_writer_write(attn_file_writer *writer, const void *data, size_t size);
/* All is written, on the disk and closed; commit, which does this otherwise, only renames it. */
attn_status attn_file_writer_finish(attn_file_writer *writer);
/* Both free the writer and leave no temporary behind. */
attn_status attn_file_writer_commit(attn_file_writer *writer);
void attn_file_writer_abort(attn_file_writer *writer); /* NULL is fine */

/* Open, write and commit in one. */
attn_status attn_file_write(const char *path, const void *data, size_t size);

#endif
