#include "base/io.h"
#include "base/fault.h"
#include "base/memory.h"
#include "base/status.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* `what`: "reading", "opening", ... from errno. A missing file is its own status, so that callers
 * can tell "not there" from "not readable". */
static attn_status fail_errno(const char *what, const char *path) {
  int code = errno;
  attn_status status = code == ENOENT || code == ENOTDIR ? ATTN_NOT_FOUND : ATTN_IO_ERROR;
  char reason[128];
  return attn_fail(status, "%s %s: %s", what, path, strerror_r(code, reason, sizeof reason));
}

/* Whether a test wants this operation to fail. */
static bool injected(void) {
  if (!attn_fault_hit(ATTN_FAULT_IO)) return false;
  errno = EIO;
  return true;
}

char *attn_path_join(const char *base, const char *name) {
  if (name[0] == '/' || base[0] == '\0') return attn_strdup(name);
  size_t base_length = strlen(base), name_length = strlen(name);
  bool slash = base[base_length - 1] != '/';
  char *path = attn_alloc(base_length + slash + name_length + 1);
  if (!path) return NULL;
  memcpy(path, base, base_length);
  if (slash) path[base_length] = '/';
  memcpy(path + base_length + slash, name, name_length + 1);
  return path;
}

char *attn_path_directory(const char *path) {
  const char *slash = strrchr(path, '/');
  char *directory = attn_strdup(!slash ? "." : slash == path ? "/" : path);
  if (directory && slash && slash != path) directory[slash - path] = '\0';
  return directory;
}

bool attn_path_exists(const char *path) {
  struct stat information;
  return stat(path, &information) == 0;
}

bool attn_path_is_directory(const char *path) {
  struct stat information;
  return stat(path, &information) == 0 && S_ISDIR(information.st_mode);
}

bool attn_path_has_suffix(const char *path, const char *suffix) {
  size_t path_length = strlen(path), suffix_length = strlen(suffix);
  return path_length >= suffix_length && strcmp(path + path_length - suffix_length, suffix) == 0;
}

static attn_status make_directory(const char *path) {
  if (attn_path_is_directory(path)) return ATTN_OK;
  if (!injected() && mkdir(path, 0777) == 0) return ATTN_OK;
  return fail_errno("making the directory", path);
}

attn_status attn_make_directories(const char *path) {
  char *prefix = attn_strdup(path);
  if (!prefix) return ATTN_OUT_OF_MEMORY;
  attn_status status = ATTN_OK;
  for (char *slash = prefix + 1; *prefix && status == ATTN_OK; ++slash) {
    if (*slash != '/' && *slash != '\0') continue;
    char end = *slash;
    *slash = '\0';
    status = make_directory(prefix);
    *slash = end;
    if (end == '\0') break;
  }
  attn_free(prefix);
  return status;
}

attn_status attn_file_remove(const char *path) {
  if (!injected() && unlink(path) == 0) return ATTN_OK;
  return fail_errno("removing", path);
}

attn_status attn_directory_remove(const char *path, attn_name_matches *matches,
                                  const void *context) {
  attn_status status = ATTN_OK;
  DIR *directory = injected() ? NULL : opendir(path);
  if (!directory) return fail_errno("opening", path);
  for (struct dirent *item; status == ATTN_OK && (item = readdir(directory));) {
    if (!matches(item->d_name, context)) continue;
    char *name = attn_path_join(path, item->d_name);
    status = name ? attn_file_remove(name) : ATTN_OUT_OF_MEMORY;
    attn_free(name);
  }
  closedir(directory);
  return status;
}

/* Opens for reading; -1 with the message set. Directories are refused here, because the system
 * refuses them only at the first read. */
static int open_to_read(const char *path, struct stat *information, attn_status *status) {
  int file = injected() ? -1 : open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) {
    *status = fail_errno("opening", path);
    return -1;
  }
  if (injected() || fstat(file, information) != 0)
    *status = fail_errno("opening", path);
  else if (S_ISDIR(information->st_mode))
    *status = attn_fail(ATTN_INVALID_ARGUMENT, "opening %s: it is a directory, not a file", path);
  else
    return file;
  close(file);
  return -1;
}

/* Appends to *data until the end of the file, growing it as needed: the size that the system
 * reports is only a first guess (pipes, files that grow). */
static attn_status read_all(int file, const char *path, size_t limit, size_t guess, char **data,
                            size_t *size) {
  size_t capacity = guess + 1, used = 0;
  char *buffer = attn_alloc(capacity + 1);
  if (!buffer) return ATTN_OUT_OF_MEMORY;
  for (;;) {
    ssize_t got = injected() ? -1 : read(file, buffer + used, capacity - used);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      attn_status status = fail_errno("reading", path);
      attn_free(buffer);
      return status;
    }
    if (got == 0) break;
    used += (size_t)got;
    if (used > limit) {
      attn_free(buffer);
      return attn_fail(ATTN_BAD_FORMAT, "reading %s: it is larger than %zu bytes", path, limit);
    }
    if (used < capacity) continue;
    capacity *= 2;
    char *larger = attn_realloc(buffer, capacity + 1);
    if (!larger) {
      attn_free(buffer);
      return ATTN_OUT_OF_MEMORY;
    }
    buffer = larger;
  }
  buffer[used] = '\0';
  *data = buffer;
  if (size) *size = used;
  return ATTN_OK;
}

attn_status attn_file_read(const char *path, size_t limit, char **data, size_t *size) {
  struct stat information;
  attn_status status = ATTN_OK;
  *data = NULL;
  int file = open_to_read(path, &information, &status);
  if (file < 0) return status;
  enum { FIRST_GUESS = 4096 };
  size_t guess = FIRST_GUESS;
  if (S_ISREG(information.st_mode)) {
    guess = (size_t)information.st_size;
    if (guess > limit)
      status = attn_fail(ATTN_BAD_FORMAT, "reading %s: it has %zu bytes, more than %zu", path,
                         guess, limit);
  }
  if (status == ATTN_OK) status = read_all(file, path, limit, guess, data, size);
  close(file);
  return status;
}

attn_status attn_file_map_open(const char *path, attn_file_map *map) {
  static const unsigned char empty[1];
  struct stat information;
  attn_status status = ATTN_OK;
  *map = (attn_file_map){0};
  int file = open_to_read(path, &information, &status);
  if (file < 0) return status;
  if (!S_ISREG(information.st_mode)) {
    status = attn_fail(ATTN_INVALID_ARGUMENT, "mapping %s: it is not a regular file", path);
  } else if (information.st_size == 0) {
    map->data = empty;
  } else {
    void *data = MAP_FAILED;
    if (!injected()) data = mmap(NULL, (size_t)information.st_size, PROT_READ, MAP_SHARED, file, 0);
    if (data == MAP_FAILED)
      status = fail_errno("mapping", path);
    else
      *map = (attn_file_map){.data = data, .size = (size_t)information.st_size};
  }
  close(file);
  return status;
}

void attn_file_map_close(attn_file_map *map) {
  if (map->size) munmap((void *)(uintptr_t)map->data, map->size);
  *map = (attn_file_map){0};
}

enum { BUFFER_SIZE = 1 << 16 };

struct attn_file_writer {
  char *path;      /* the target, symbolic links resolved */
  char *directory; /* where it lies */
  char *temporary; /* NULL when the target is written directly */
  int file;
  attn_status status; /* the first failure */
  size_t used;
  char buffer[BUFFER_SIZE];
};

/* The file that a chain of symbolic links ends at: renaming over a link would replace the link. */
static char *resolve(const char *path) {
  char resolved[PATH_MAX];
  return attn_strdup(realpath(path, resolved) ? resolved : path);
}

/* Creates a temporary that no one else has: a name left over by a crash is passed by. */
static attn_status open_temporary(attn_file_writer *writer, mode_t mode) {
  static _Atomic unsigned counter; /* two writers of one process never share a temporary */
  enum { ATTEMPTS = 100 };
  size_t size = strlen(writer->path) + 48;
  char *name = attn_alloc(size);
  if (!name) return ATTN_OUT_OF_MEMORY;
  for (int attempt = 0; attempt < ATTEMPTS && writer->file < 0; ++attempt) {
    snprintf(name, size, "%s.%ld-%u.tmp", writer->path, (long)getpid(),
             atomic_fetch_add(&counter, 1));
    if (!injected()) writer->file = open(name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
    if (writer->file < 0 && errno != EEXIST) break;
  }
  if (writer->file >= 0) {
    writer->temporary = name;
    return ATTN_OK;
  }
  attn_status status = fail_errno("writing", writer->path);
  attn_free(name);
  return status;
}

static attn_status open_to_write(attn_file_writer *writer) {
  struct stat information;
  bool exists = stat(writer->path, &information) == 0;
  if (exists && S_ISDIR(information.st_mode))
    return attn_fail(ATTN_INVALID_ARGUMENT, "writing %s: it is a directory", writer->path);
  if (!exists || S_ISREG(information.st_mode))
    return open_temporary(writer, exists ? information.st_mode & 0777 : 0666);
  if (!injected()) writer->file = open(writer->path, O_WRONLY | O_CLOEXEC);
  return writer->file < 0 ? fail_errno("writing", writer->path) : ATTN_OK;
}

attn_status attn_file_writer_open(const char *path, attn_file_writer **writer) {
  *writer = NULL;
  attn_file_writer *fresh = attn_alloc_zero(sizeof *fresh);
  if (!fresh) return ATTN_OUT_OF_MEMORY;
  fresh->file = -1;
  fresh->path = resolve(path);
  if (fresh->path) fresh->directory = attn_path_directory(fresh->path);
  attn_status status = fresh->directory ? open_to_write(fresh) : ATTN_OUT_OF_MEMORY;
  if (status == ATTN_OK)
    *writer = fresh;
  else
    attn_file_writer_abort(fresh);
  return status;
}

/* Hands bytes to the system; a short write is continued. */
static attn_status write_through(attn_file_writer *writer, const char *data, size_t size) {
  while (size && writer->status == ATTN_OK) {
    ssize_t put = injected() ? -1 : write(writer->file, data, size);
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) {
      writer->status = fail_errno("writing", writer->path);
      break;
    }
    data += put;
    size -= (size_t)put;
  }
  return writer->status;
}

static attn_status flush(attn_file_writer *writer) {
  size_t used = writer->used;
  writer->used = 0;
  return write_through(writer, writer->buffer, used);
}

attn_status attn_file_writer_write(attn_file_writer *writer, const void *data, size_t size) {
  if (size > BUFFER_SIZE - writer->used) ATTN_TRY(flush(writer));
  if (writer->status != ATTN_OK || size == 0) return writer->status;
  if (size >= BUFFER_SIZE) return write_through(writer, data, size);
  memcpy(writer->buffer + writer->used, data, size);
  writer->used += size;
  return ATTN_OK;
}

/* The new name is durable only once its directory is. Some file systems cannot sync a directory
 * (EINVAL); the data itself is safe then, so only real errors count. */
static attn_status sync_directory(const char *directory) {
  attn_status status = ATTN_OK;
  int file = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (file < 0) return ATTN_OK;
  if (fsync(file) != 0 && errno == EIO) status = fail_errno("syncing the directory", directory);
  close(file);
  return status;
}

attn_status attn_file_writer_finish(attn_file_writer *writer) {
  if (writer->file < 0) return writer->status;
  attn_status status = flush(writer);
  if (status == ATTN_OK && writer->temporary && (injected() || fsync(writer->file) != 0))
    status = fail_errno("syncing", writer->path);
  int file = writer->file;
  writer->file = -1;
  bool closed = close(file) == 0 && !injected();
  if (status == ATTN_OK && !closed) status = fail_errno("closing", writer->path);
  writer->status = status;
  return status;
}

attn_status attn_file_writer_commit(attn_file_writer *writer) {
  attn_status status = attn_file_writer_finish(writer);
  if (status == ATTN_OK && writer->temporary) {
    if (injected() || rename(writer->temporary, writer->path) != 0) {
      status = fail_errno("renaming the new file to", writer->path);
    } else {
      attn_free(writer->temporary);
      writer->temporary = NULL; /* nothing left to remove */
      status = sync_directory(writer->directory);
    }
  }
  attn_file_writer_abort(writer);
  return status;
}

void attn_file_writer_abort(attn_file_writer *writer) {
  if (!writer) return;
  if (writer->file >= 0) close(writer->file);
  if (writer->temporary) unlink(writer->temporary);
  attn_free(writer->temporary);
  attn_free(writer->directory);
  attn_free(writer->path);
  attn_free(writer);
}

attn_status attn_file_write(const char *path, const void *data, size_t size) {
  attn_file_writer *writer;
  ATTN_TRY(attn_file_writer_open(path, &writer));
  attn_file_writer_write(writer, data, size); /* commit returns its failure */
  return attn_file_writer_commit(writer);
}
