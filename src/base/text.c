#include "base/text.h"
#include "base/memory.h"
#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* Room for `size` more bytes and the final NUL. */
static bool reserve(attn_text *text, size_t size) {
  if (text->failed) return false;
  if (size < text->capacity - text->length) return true;
  size_t capacity = text->capacity ? text->capacity : 256;
  while (capacity - text->length <= size) capacity *= 2;
  char *data = attn_realloc(text->data, capacity);
  if (!data) {
    text->failed = true;
    return false;
  }
  text->data = data;
  text->capacity = capacity;
  return true;
}

void attn_text_add(attn_text *text, const char *bytes, size_t size) {
  if (!reserve(text, size)) return;
  memcpy(text->data + text->length, bytes, size);
  text->length += size;
  text->data[text->length] = '\0';
}

void attn_text_print(attn_text *text, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  int size = vsnprintf(NULL, 0, format, arguments);
  va_end(arguments);
  if (size < 0 || !reserve(text, (size_t)size)) return;
  va_start(arguments, format);
  vsnprintf(text->data + text->length, (size_t)size + 1, format, arguments);
  va_end(arguments);
  text->length += (size_t)size;
}

attn_status attn_text_take(attn_text *text, char **result) {
  attn_text_add(text, "", 0); /* an empty text is "" */
  *result = text->failed ? NULL : text->data;
  attn_status status = text->failed ? ATTN_OUT_OF_MEMORY : ATTN_OK;
  if (text->failed) attn_free(text->data);
  *text = (attn_text){0};
  return status;
}

void attn_text_free(attn_text *text) {
  attn_free(text->data);
  *text = (attn_text){0};
}

enum { LONGEST_NAME = 128, MOST_CLOSE = 3, MOST_COMPARED = 20000 };

int attn_edit_distance(const char *a, const char *b) {
  int a_length = (int)strnlen(a, LONGEST_NAME), b_length = (int)strnlen(b, LONGEST_NAME);
  int row[LONGEST_NAME + 1]; /* row[j]: distance from the first i bytes of a to j bytes of b */
  for (int j = 0; j <= b_length; ++j) row[j] = j;
  for (int i = 1; i <= a_length; ++i) {
    int diagonal = row[0];
    row[0] = i;
    for (int j = 1; j <= b_length; ++j) {
      int best = diagonal + (a[i - 1] != b[j - 1]);
      if (row[j] + 1 < best) best = row[j] + 1;
      if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
      diagonal = row[j];
      row[j] = best;
    }
  }
  return row[b_length];
}

const char *attn_close_names(const char *wanted,
                             const char *(*name)(const void *context, int64_t i),
                             const void *context, int64_t count, char hint[ATTN_HINT_SIZE]) {
  const char *best[MOST_CLOSE];
  int distance[MOST_CLOSE], found = 0;
  int limit = (int)strnlen(wanted, LONGEST_NAME) / 3 + 1; /* farther is no longer a slip */
  if (count > MOST_COMPARED) count = MOST_COMPARED;
  for (int64_t i = 0; i < count; ++i) {
    const char *candidate = name(context, i);
    int d = attn_edit_distance(wanted, candidate);
    if (d > limit || (found == MOST_CLOSE && d >= distance[MOST_CLOSE - 1])) continue;
    int place = found < MOST_CLOSE ? found++ : MOST_CLOSE - 1;
    for (; place > 0 && distance[place - 1] > d; --place) {
      distance[place] = distance[place - 1];
      best[place] = best[place - 1];
    }
    distance[place] = d;
    best[place] = candidate;
  }
  size_t used = 0;
  hint[0] = '\0';
  for (int i = 0; i < found && used < ATTN_HINT_SIZE; ++i)
    used += (size_t)snprintf(hint + used, ATTN_HINT_SIZE - used, "%s%s",
                             i ? ", " : "; close: ", best[i]);
  return hint;
}
