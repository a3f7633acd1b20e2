/* Progress of a long operation: how far, how fast, how long still; formatted, and printed by the
 * caller. Times are seconds of any clock that never goes back. Also the formats for durations,
 * counts and bytes that the rest of the command shares. */
#ifndef ATTN_BASE_PROGRESS_H
#define ATTN_BASE_PROGRESS_H

#include "attn/base.h"

typedef struct attn_progress {
  double total, done;       /* in the caller's unit, e.g. tokens */
  double first, start, now; /* done and the time at the start; the time of the last update */
  double rate_sum, weight;  /* units per second, averaged with exponentially fading weights */
} attn_progress;

/* `done` is above 0 for a resumed operation: the rate counts only what is done from here on. */
attn_progress attn_progress_start(double total, double done, double now);
/* Calls that go back in time, or in `done`, change nothing. */
void attn_progress_update(attn_progress *progress, double done, double now);

double attn_progress_fraction(const attn_progress *progress); /* 0 to 1 */
/* Units per second over about the last half minute; 0 while unknown. */
double attn_progress_rate(const attn_progress *progress);
double attn_progress_left(const attn_progress *progress); /* seconds; -1 while unknown */

/* "[########------]  57%  1.25M tokens/s  3 min 20 s left  " and then `details` (NULL: none), of at
 * most `columns` characters, which also decides the length of the bar. Returns line. */
const char *attn_progress_format(const attn_progress *progress, const char *unit,
                                 const char *details, int columns, char *line, size_t size);

/* Each writes at most size bytes with the NUL and returns `text`; 24 bytes are always enough. */
enum { ATTN_FORMAT_SIZE = 24 };
const char *attn_format_duration(double seconds, char *text, size_t size); /* "3 min 20 s" */
const char *attn_format_count(double count, char *text, size_t size);      /* "950", "1.25M" */
const char *attn_format_bytes(double bytes, char *text, size_t size);      /* "1.5 GiB" */

#endif
