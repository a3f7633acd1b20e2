#include "base/progress.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* The rate forgets with this time constant: long enough to be steady, short enough to follow a
 * machine that becomes busy. */
static const double memory_seconds = 30;

attn_progress attn_progress_start(double total, double done, double now) {
  return (attn_progress){.total = total, .done = done, .first = done, .start = now, .now = now};
}

void attn_progress_update(attn_progress *progress, double done, double now) {
  double elapsed = now - progress->now, more = done - progress->done;
  if (!(elapsed > 0) || !(more >= 0)) return;
  /* sum and weight fade alike, so that their ratio is an average from the first update on */
  double fresh = -expm1(-elapsed / memory_seconds);
  progress->rate_sum += fresh * (more / elapsed - progress->rate_sum);
  progress->weight += fresh * (1 - progress->weight);
  progress->done = done;
  progress->now = now;
}

double attn_progress_fraction(const attn_progress *progress) {
  double fraction = progress->total > 0 ? progress->done / progress->total : 0;
  return fraction < 0 ? 0 : fraction > 1 ? 1 : fraction;
}

double attn_progress_rate(const attn_progress *progress) {
  return progress->weight > 0 ? progress->rate_sum / progress->weight : 0;
}

double attn_progress_left(const attn_progress *progress) {
  double rate = attn_progress_rate(progress), rest = progress->total - progress->done;
  if (rest <= 0) return 0;
  return rate > 0 ? rest / rate : -1;
}

/* -- Formats -- */

const char *attn_format_duration(double seconds, char *text, size_t size) {
  static const double minute = 60, hour = 3600, day = 86400, longest = 1e4 * 86400;
  double whole = round(seconds); /* 59.6 s is 1 min 00 s, not 60 s */
  if (!(seconds >= 0) || seconds > longest)
    snprintf(text, size, "?");
  else if (seconds < 9.95)
    snprintf(text, size, "%.1f s", seconds);
  else if (whole < minute)
    snprintf(text, size, "%.0f s", whole);
  else if (whole < hour)
    snprintf(text, size, "%d min %02d s", (int)(whole / minute), (int)whole % 60);
  else if (whole < day)
    snprintf(text, size, "%d h %02d min", (int)(whole / hour), (int)(whole / minute) % 60);
  else
    snprintf(text, size, "%d d %02d h", (int)(whole / day), (int)(whole / hour) % 24);
  return text;
}

/* Three significant digits with the largest unit that leaves at least 1. */
static const char *format_scaled(double value, double base, const char *const *units, int count,
                                 char *text, size_t size) {
  int unit = 0;
  if (!isfinite(value)) {
    snprintf(text, size, "?");
    return text;
  }
  /* 999.6 would print as 1000: it belongs to the next unit. */
  while (unit + 1 < count && fabs(value) >= (base == 1000 ? 999.5 : base)) {
    value /= base;
    ++unit;
  }
  double magnitude = fabs(value);
  int decimals = value == round(value) && unit == 0 ? 0
                 : magnitude < 9.995                ? 2
                 : magnitude < 99.95                ? 1
                                                    : 0;
  if (magnitude < 1e15)
    snprintf(text, size, "%.*f%s", decimals, value, units[unit]);
  else
    snprintf(text, size, "%.2e%s", value, units[unit]);
  return text;
}

const char *attn_format_count(double count, char *text, size_t size) {
  static const char *const units[] = {"", "k", "M", "G", "T"};
  return format_scaled(count, 1000, units, 5, text, size);
}

const char *attn_format_bytes(double bytes, char *text, size_t size) {
  static const char *const units[] = {" B", " KiB", " MiB", " GiB", " TiB"};
  return format_scaled(bytes, 1024, units, 5, text, size);
}

/* -- The line -- */

enum { LONGEST_BAR = 24, SHORTEST_BAR = 8, LONGEST_LINE = 512 };

static int add_bar(double fraction, int width, char *line) {
  if (width < SHORTEST_BAR) return 0;
  if (width > LONGEST_BAR) width = LONGEST_BAR;
  int filled = (int)(fraction * width);
  line[0] = '[';
  memset(line + 1, '#', (size_t)filled);
  memset(line + 1 + filled, '-', (size_t)(width - filled));
  memcpy(line + 1 + width, "] ", 3);
  return width + 3;
}

const char *attn_progress_format(const attn_progress *progress, const char *unit,
                                 const char *details, int columns, char *line, size_t size) {
  char rest[LONGEST_LINE], whole[LONGEST_LINE + LONGEST_BAR + 4];
  char rate[ATTN_FORMAT_SIZE], left[ATTN_FORMAT_SIZE + 8] = "";
  double seconds = attn_progress_left(progress);
  if (seconds >= 0) {
    attn_format_duration(seconds, left, sizeof left);
    strcat(left, " left");
  }
  attn_format_count(attn_progress_rate(progress), rate, sizeof rate);
  int length = snprintf(rest, sizeof rest, "%3.0f%%  %s %s/s%s%s%s%s",
                        floor(100 * attn_progress_fraction(progress)), rate, unit,
                        *left ? "  " : "", left, details ? "  " : "", details ? details : "");
  int bar = add_bar(attn_progress_fraction(progress), columns - length - 3, whole);
  snprintf(whole + bar, sizeof whole - (size_t)bar, "%s", rest);
  if (columns > 0 && (size_t)columns < strlen(whole)) whole[columns] = '\0';
  snprintf(line, size, "%s", whole);
  return line;
}
