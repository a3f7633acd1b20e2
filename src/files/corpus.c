#include "files/corpus.h"
#include "base/hash.h"
#include "base/memory.h"
#include "base/random.h"
#include "base/status.h"
#include "base/io.h"

#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { DEEPEST_DIRECTORY = 32 };

typedef struct piece {
  attn_file_map map;
  int64_t start; /* of this file in the whole text */
} piece;

struct attn_corpus {
  piece *pieces;
  int64_t count, capacity;
  int64_t size, training; /* bytes in all; bytes of the training part, which comes first */
  bool encoded;           /* as the tokens below, the first `training_tokens` of them to be trained
                             on */
  attn_tokens tokens;
  int64_t training_tokens;
};

static attn_status add_file(attn_corpus *corpus, const char *path) {
  if (corpus->count == corpus->capacity) {
    int64_t capacity = corpus->capacity ? 2 * corpus->capacity : 16;
    piece *pieces = attn_realloc(corpus->pieces, (size_t)capacity * sizeof *pieces);
    if (!pieces) return ATTN_OUT_OF_MEMORY;
    corpus->pieces = pieces;
    corpus->capacity = capacity;
  }
  piece *next = &corpus->pieces[corpus->count];
  ATTN_TRY(attn_file_map_open(path, &next->map));
  next->start = corpus->size;
  if (next->map.size == 0) return ATTN_OK; /* the next file takes its place */
  corpus->size += (int64_t)next->map.size;
  ++corpus->count;
  return ATTN_OK;
}

static attn_status add_path(attn_corpus *corpus, const char *path, int depth);

static int visible(const struct dirent *item) {
  return item->d_name[0] != '.';
}

/* The order of bytes in the names: the same on every machine, whatever its locale. */
static int by_bytes(const struct dirent **a, const struct dirent **b) {
  return strcmp((*a)->d_name, (*b)->d_name);
}

static attn_status add_directory(attn_corpus *corpus, const char *path, int depth) {
  struct dirent **items = NULL;
  if (depth > DEEPEST_DIRECTORY)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "corpus: %s is deeper than %d directories (a loop of "
                     "symbolic links?)",
                     path, DEEPEST_DIRECTORY);
  int count = scandir(path, &items, visible, by_bytes);
  if (count < 0)
    return attn_fail(ATTN_IO_ERROR, "corpus: reading the directory %s: %s", path, strerror(errno));
  attn_status status = ATTN_OK;
  for (int i = 0; i < count; ++i) {
    char *item = status == ATTN_OK ? attn_path_join(path, items[i]->d_name) : NULL;
    if (status == ATTN_OK) status = item ? add_path(corpus, item, depth + 1) : ATTN_OUT_OF_MEMORY;
    attn_free(item);
    free(items[i]); /* from scandir, as the list is */
  }
  free(items);
  return status;
}

static attn_status add_path(attn_corpus *corpus, const char *path, int depth) {
  return attn_path_is_directory(path) ? add_directory(corpus, path, depth) : add_file(corpus, path);
}

static attn_status add_paths(attn_corpus *corpus, const char *const *paths, int count) {
  for (int i = 0; i < count; ++i) {
    int64_t before = corpus->size;
    ATTN_TRY(add_path(corpus, paths[i], 0));
    if (corpus->size == before)
      return attn_fail(ATTN_INVALID_ARGUMENT, "corpus: %s is empty", paths[i]);
  }
  return ATTN_OK;
}

attn_status attn_corpus_open(const char *const *paths, int count, double validation_fraction,
                             attn_corpus **corpus) {
  *corpus = NULL;
  if (count < 1) return attn_fail(ATTN_INVALID_ARGUMENT, "corpus: no file was given");
  if (!(validation_fraction >= 0 && validation_fraction < 1))
    return attn_fail(ATTN_INVALID_ARGUMENT, "corpus: the validation fraction %g is not in [0, 1)",
                     validation_fraction);
  attn_corpus *fresh = attn_alloc_zero(sizeof *fresh);
  attn_status status = fresh ? add_paths(fresh, paths, count) : ATTN_OUT_OF_MEMORY;
  if (status != ATTN_OK) {
    attn_corpus_close(fresh);
    return status;
  }
  fresh->training = fresh->size - (int64_t)((double)fresh->size * validation_fraction);
  *corpus = fresh;
  return ATTN_OK;
}

void attn_corpus_close(attn_corpus *corpus) {
  if (!corpus) return;
  for (int64_t i = 0; i < corpus->count; ++i) attn_file_map_close(&corpus->pieces[i].map);
  attn_free(corpus->pieces);
  attn_tokens_free(&corpus->tokens);
  attn_free(corpus);
}

/* Tokens
 * --------------------------------------------------------------------------------------------
 */

/* How many of `size` bytes to encode at once: up to the end of a line, if there is one. */
static int64_t some_lines(const uint8_t *text, int64_t size) {
  const int64_t enough = 1 << 20;
  if (size <= enough) return size;
  for (int64_t end = enough; end > 0; --end)
    if (text[end - 1] == '\n') return end;
  return enough;
}

/* Bytes first .. end - 1 of the text. */
static attn_status encode_part(attn_corpus *corpus, const attn_tokenizer *tokenizer, int64_t first,
                               int64_t end) {
  for (int64_t p = 0; p < corpus->count; ++p) {
    const piece *piece = &corpus->pieces[p];
    int64_t from = first > piece->start ? first - piece->start : 0;
    int64_t to = end - piece->start < (int64_t)piece->map.size ? end - piece->start
                                                               : (int64_t)piece->map.size;
    for (int64_t count; from < to; from += count) {
      const uint8_t *text = (const uint8_t *)piece->map.data + from;
      count = some_lines(text, to - from);
      ATTN_TRY(
          attn_tokenizer_encode(tokenizer, (const char *)text, (size_t)count, 0, &corpus->tokens));
    }
  }
  return ATTN_OK;
}

attn_status attn_corpus_encode(attn_corpus *corpus, const attn_tokenizer *tokenizer) {
  ATTN_TRY(encode_part(corpus, tokenizer, 0, corpus->training));
  corpus->training_tokens = (int64_t)corpus->tokens.count;
  ATTN_TRY(encode_part(corpus, tokenizer, corpus->training, corpus->size));
  corpus->encoded = true;
  return ATTN_OK;
}

int64_t attn_corpus_files(const attn_corpus *corpus) {
  return corpus->count;
}

int64_t attn_corpus_bytes(const attn_corpus *corpus, attn_corpus_part part) {
  return part == ATTN_TRAINING ? corpus->training : corpus->size - corpus->training;
}

/* Where a part begins. */
static int64_t part_start(const attn_corpus *corpus, attn_corpus_part part) {
  if (part == ATTN_TRAINING) return 0;
  return corpus->encoded ? corpus->training_tokens : corpus->training;
}

int64_t attn_corpus_size(const attn_corpus *corpus, attn_corpus_part part) {
  if (!corpus->encoded) return attn_corpus_bytes(corpus, part);
  return part == ATTN_TRAINING ? corpus->training_tokens
                               : (int64_t)corpus->tokens.count - corpus->training_tokens;
}

/* The last file that starts at or before `place`. */
static int64_t find_piece(const attn_corpus *corpus, int64_t place) {
  int64_t low = 0, high = corpus->count; /* pieces[low].start <= place < pieces[high].start */
  while (high - low > 1) {
    int64_t middle = low + (high - low) / 2;
    if (corpus->pieces[middle].start <= place)
      low = middle;
    else
      high = middle;
  }
  return low;
}

/* Copies tokens; bytes that may run over several files. */
static void gather(const attn_corpus *corpus, int64_t place, int64_t length, int32_t *tokens) {
  if (corpus->encoded) {
    memcpy(tokens, corpus->tokens.ids + place, (size_t)length * sizeof *tokens);
    return;
  }
  for (int64_t p = find_piece(corpus, place); length > 0; ++p) {
    const piece *piece = &corpus->pieces[p];
    int64_t offset = place - piece->start, left = (int64_t)piece->map.size - offset;
    int64_t count = left < length ? left : length;
    for (int64_t i = 0; i < count; ++i) tokens[i] = piece->map.data[offset + i];
    tokens += count;
    place += count;
    length -= count;
  }
}

uint64_t attn_corpus_fingerprint(const attn_corpus *corpus) {
  enum { SAMPLE = 1 << 16, SAMPLES = 1 << 10 };
  const int64_t sizes[] = {corpus->size, corpus->training};
  uint64_t value = attn_hash(ATTN_HASH_START, sizes, sizeof sizes);
  int64_t blocks = (corpus->size + SAMPLE - 1) / SAMPLE,
          samples = blocks < SAMPLES ? blocks : SAMPLES;
  for (int64_t s = 0; s < samples; ++s) {
    int64_t place = s * blocks / samples * SAMPLE, end = place + SAMPLE;
    if (end > corpus->size) end = corpus->size;
    for (int64_t p = find_piece(corpus, place); place < end; ++p) {
      const piece *piece = &corpus->pieces[p];
      int64_t offset = place - piece->start, left = (int64_t)piece->map.size - offset;
      int64_t count = left < end - place ? left : end - place;
      value = attn_hash(value, piece->map.data + offset, (size_t)count);
      place += count;
    }
  }
  return value;
}

static const char *const part_names[] = {"training", "validation"};

attn_status attn_corpus_batch(const attn_corpus *corpus, attn_corpus_part part, uint64_t seed,
                              uint64_t step, int64_t batch, int64_t length, int32_t *tokens) {
  /* The stream keeps these numbers apart from those that other parts of a run draw with the same
   * seed; each row has words of its own, because drawing below n may take more than one. */
  static const uint64_t stream[] = {UINT64_C(0xc0e9) << 48, UINT64_C(0xc0ea) << 48};
  enum { WORDS_PER_ROW = 256 };
  int64_t size = attn_corpus_size(corpus, part), start = part_start(corpus, part);
  if (batch < 1 || length < 1)
    return attn_fail(ATTN_INVALID_ARGUMENT, "corpus: a batch of %lld windows of %lld tokens",
                     (long long)batch, (long long)length);
  if (size <= length)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "corpus: the %s part has %lld tokens, a window of %lld tokens and its target "
                     "need %lld: give more text or a shorter length",
                     part_names[part], (long long)size, (long long)length, (long long)length + 1);
  for (int64_t row = 0; row < batch; ++row) {
    attn_random random = {
        .seed = seed, .stream = stream[part] ^ step, .index = (uint64_t)row * WORDS_PER_ROW};
    int64_t place = (int64_t)attn_random_below(&random, (uint64_t)(size - length));
    gather(corpus, start + place, length + 1, tokens + row * (length + 1));
  }
  return ATTN_OK;
}

attn_status attn_corpus_read(const attn_corpus *corpus, attn_corpus_part part, int64_t start,
                             int64_t length, int32_t *tokens) {
  int64_t size = attn_corpus_size(corpus, part);
  if (start < 0 || length < 0 || start > size || length > size - start)
    return attn_fail(ATTN_INVALID_ARGUMENT, "corpus: %lld tokens from %lld, the %s part has %lld",
                     (long long)length, (long long)start, part_names[part], (long long)size);
  gather(corpus, part_start(corpus, part) + start, length, tokens);
  return ATTN_OK;
}
