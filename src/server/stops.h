/* Stop strings: a text ends where the first of them is complete, wherever the tokens part.
 *
 * Text that may yet become a stop string is held back. Stops are looked for byte by byte, so that
 * the result does not depend on how the text was cut; of several that end at the same byte the
 * longest counts. */
#ifndef ATTN_SERVER_STOPS_H
#define ATTN_SERVER_STOPS_H

#include "base/text.h"

enum { ATTN_MOST_STOPS = 4, ATTN_LONGEST_STOP = 1024 /* bytes */ };

typedef struct attn_stops {
  char *strings[ATTN_MOST_STOPS]; /* valid UTF-8, not empty */
  size_t sizes[ATTN_MOST_STOPS];
  int count;
  attn_text held;
} attn_stops;

/* Starts from {0}; ATTN_INVALID_ARGUMENT for a string too many, too long or empty. */
attn_status attn_stops_add(attn_stops *stops, const char *string);
/* Appends to `out` what of the text up to here is certain; whole characters only. True when a stop
 * string was met: it and what follows are dropped. */
bool attn_stops_push(attn_stops *stops, const char *text, size_t size, attn_text *out);
/* The text ends here: what was held back belongs to it. */
void attn_stops_finish(attn_stops *stops, attn_text *out);
void attn_stops_free(attn_stops *stops);

#endif
