#include "server/stops.h"
#include "base/memory.h"
#include "base/status.h"

#include <string.h>

attn_status attn_stops_add(attn_stops *stops, const char *string) {
  size_t size = strlen(string);
  if (stops->count == ATTN_MOST_STOPS)
    return attn_fail(ATTN_INVALID_ARGUMENT, "at most %d stop strings", ATTN_MOST_STOPS);
  if (size == 0 || size > ATTN_LONGEST_STOP)
    return attn_fail(ATTN_INVALID_ARGUMENT, "a stop string has %zu bytes, expected 1 to %d", size,
                     ATTN_LONGEST_STOP);
  char *copy = attn_strdup(string);
  if (!copy) return ATTN_OUT_OF_MEMORY;
  stops->strings[stops->count] = copy;
  stops->sizes[stops->count++] = size;
  return ATTN_OK;
}

static bool ends_with(const attn_text *text, const char *bytes, size_t size) {
  return text->length >= size && memcmp(text->data + text->length - size, bytes, size) == 0;
}

/* The size of the longest stop string that `held` ends with; 0: none. */
static size_t completed(const attn_stops *stops) {
  size_t longest = 0;
  for (int i = 0; i < stops->count; ++i)
    if (stops->sizes[i] > longest && ends_with(&stops->held, stops->strings[i], stops->sizes[i]))
      longest = stops->sizes[i];
  return longest;
}

/* How many bytes at the end of `held` may be the beginning of a stop string. */
static size_t uncertain(const attn_stops *stops) {
  size_t most = 0;
  for (int i = 0; i < stops->count; ++i) {
    size_t size = stops->sizes[i] - 1;
    while (size > most && !ends_with(&stops->held, stops->strings[i], size)) --size;
    if (size > most) most = size;
  }
  return most;
}

/* Hands over the first `size` bytes. */
static void release(attn_stops *stops, size_t size, attn_text *out) {
  attn_text *held = &stops->held;
  if (!size) return;
  attn_text_add(out, held->data, size);
  memmove(held->data, held->data + size, held->length - size);
  held->length -= size;
}

bool attn_stops_push(attn_stops *stops, const char *text, size_t size, attn_text *out) {
  if (!stops->count) {
    if (size) attn_text_add(out, text, size);
    return false;
  }
  for (size_t i = 0; i < size; ++i) {
    attn_text_add(&stops->held, text + i, 1);
    if (stops->held.failed) break;
    size_t stop = completed(stops);
    if (!stop) continue;
    release(stops, stops->held.length - stop, out);
    stops->held.length = 0;
    return true;
  }
  if (stops->held.failed)
    out->failed = true;
  else
    release(stops, stops->held.length - uncertain(stops), out);
  return false;
}

void attn_stops_finish(attn_stops *stops, attn_text *out) {
  release(stops, stops->held.length, out);
}

void attn_stops_free(attn_stops *stops) {
  for (int i = 0; i < stops->count; ++i) attn_free(stops->strings[i]);
  attn_text_free(&stops->held);
  *stops = (attn_stops){0};
}
