/* Fuzz targets: each tests/fuzz/<name>.c has LLVMFuzzerTestOneInput, which must neither crash, read
 * beyond its input nor leak, whatever the bytes. `make fuzz` lets libFuzzer look for such bytes;
 * every build replays tests/fuzz/corpus/<name>/ (replay.c). What is found goes there. */
#ifndef TESTS_FUZZ_H
#define TESTS_FUZZ_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* The bytes as a file of this process, for readers that take a path; the same name every time. */
static inline const char *fuzz_file(const char *suffix, const uint8_t *data, size_t size) {
  static char path[64];
  snprintf(path, sizeof path, "/tmp/attn-fuzz-%ld%s", (long)getpid(), suffix);
  FILE *file = fopen(path, "wb");
  if (!file || fwrite(data, 1, size, file) < size || fclose(file) != 0) abort();
  return path;
}

#endif
