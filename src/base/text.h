/* Text that grows, and the closest of several names (for "did you mean"). */
#ifndef ATTN_BASE_TEXT_H
#define ATTN_BASE_TEXT_H

#include "attn/base.h"

/* Starts as {0}. After a failed allocation every further append does nothing, so that a writer
 * checks once at the end (attn_text_take). */
typedef struct attn_text {
  char *data; /* NUL-terminated when length > 0 */
  size_t length, capacity;
  bool failed;
} attn_text;

void attn_text_add(attn_text *text, const char *bytes, size_t size);
void attn_text_print(attn_text *text, const char *format, ...) ATTN_PRINTF(2, 3);
/* Hands over the text (to be freed by attn_free) and leaves `text` empty; ATTN_OUT_OF_MEMORY, with
 * everything freed and *result NULL, when an append failed. */
attn_status attn_text_take(attn_text *text, char **result);
void attn_text_free(attn_text *text);

/* The fewest insertions, deletions and substitutions that turn a into b (Levenshtein); names are
 * compared by their first 128 bytes. */
int attn_edit_distance(const char *a, const char *b);

/* Writes up to three names that are close to `wanted`, as "; close: a, b" or "" into `hint`.
 * `name(context, i)` gives the i-th of `count` names. Returns hint. */
enum { ATTN_HINT_SIZE = 256 };
const char *attn_close_names(const char *wanted,
                             const char *(*name)(const void *context, int64_t i),
                             const void *context, int64_t count, char hint[ATTN_HINT_SIZE]);

#endif
