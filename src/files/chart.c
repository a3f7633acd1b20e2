#include "files/chart.h"
#include "base/memory.h"
#include "base/status.h"
#include "files/chart_axis.h"
#include "base/io.h"

#include <locale.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Beyond these an axis, its margin and its ticks could overflow. */
static const double largest_value = 1e150, smallest_logarithmic = 1e-150;

/* -- Axes -- */

static bool fits(attn_chart_scale scale, double value) {
  return isfinite(value) && fabs(value) < largest_value &&
         (scale == ATTN_LINEAR || value > smallest_logarithmic);
}

bool attn_chart_drawable(const attn_chart *chart, const attn_chart_series *series, int64_t i) {
  return fits(chart->x_scale, series->x[i]) && fits(chart->y_scale, series->y[i]);
}

static double to_scale(attn_chart_scale scale, double value) {
  return scale == ATTN_LOG2 ? log2(value) : scale == ATTN_LOG10 ? log10(value) : value;
}

static double from_scale(attn_chart_scale scale, double value) {
  return scale == ATTN_LOG2 ? exp2(value) : scale == ATTN_LOG10 ? pow(10, value) : value;
}

double attn_axis_place(const attn_axis *axis, double value) {
  return (to_scale(axis->scale, value) - axis->low) / (axis->high - axis->low);
}

/* 1, 2, 2.5 or 5 times a power of ten, at least `least`. */
static double nice_step(double least) {
  static const double steps[] = {1, 2, 2.5, 5};
  double power = pow(10, floor(log10(least)));
  for (int i = 0; i < 4; ++i)
    if (steps[i] * power >= least * (1 - 1e-9)) return steps[i] * power;
  return 10 * power;
}

/* "1500", "20k", "2.5M": one unit for the whole axis, as many decimals as the step needs. */
static void label_linear(attn_axis *axis, double step) {
  static const struct {
    double from, unit;
    const char *suffix;
  } units[] = {{1e12, 1e12, "T"}, {1e9, 1e9, "G"}, {1e6, 1e6, "M"}, {1e4, 1e3, "k"}, {0, 1, ""}};
  double largest = 0;
  for (int i = 0; i < axis->ticks; ++i) largest = fmax(largest, fabs(axis->tick[i]));
  int u = 0;
  while (largest < units[u].from) ++u;
  bool plain = largest < 1e15 && (largest >= 1e-3 || largest == 0);
  double shown = step / units[u].unit;
  int decimals = 0;
  while (decimals < 9 && fabs(shown - round(shown)) > 1e-6 * shown) {
    shown *= 10;
    ++decimals;
  }
  for (int i = 0; i < axis->ticks; ++i) {
    double value = axis->tick[i] / units[u].unit;
    if (!plain)
      snprintf(axis->label[i], ATTN_TICK_LABEL, "%.3g", axis->tick[i]);
    else if (value == 0)
      snprintf(axis->label[i], ATTN_TICK_LABEL, "0");
    else
      snprintf(axis->label[i], ATTN_TICK_LABEL, "%.*f%s", decimals, value, units[u].suffix);
  }
}

static void add_linear_ticks(attn_axis *axis, double low, double high, double step) {
  double first = ceil(low / step - 1e-6), last = floor(high / step + 1e-6);
  axis->ticks = 0;
  for (double k = first; k <= last && axis->ticks < ATTN_MOST_TICKS; ++k)
    axis->tick[axis->ticks++] = k * step;
  label_linear(axis, step);
}

/* 1024 is 1K here: such an axis counts tokens or bytes by doublings. */
static void label_power_of_two(int exponent, char *label) {
  static const char suffix[] = {'\0', 'K', 'M', 'G', 'T'};
  if (exponent < 0)
    snprintf(label, ATTN_TICK_LABEL, exponent >= -10 ? "1/%.0f" : "2^%.0f",
             exponent >= -10 ? exp2(-exponent) : (double)exponent);
  else if (exponent < 50)
    snprintf(label, ATTN_TICK_LABEL, "%d%.1s", 1 << exponent % 10, &suffix[exponent / 10]);
  else
    snprintf(label, ATTN_TICK_LABEL, "2^%d", exponent);
}

static void add_log2_ticks(attn_axis *axis, int wanted) {
  int first = (int)ceil(axis->low - 1e-9), last = (int)floor(axis->high + 1e-9);
  int step = (last - first) / (wanted + 1) + 1;
  axis->ticks = 0;
  for (int e = first; e <= last && axis->ticks < ATTN_MOST_TICKS; e += step) {
    axis->tick[axis->ticks] = exp2(e);
    label_power_of_two(e, axis->label[axis->ticks++]);
  }
}

static void label_si(double value, char *label) {
  static const char *const suffixes[] = {"", "k", "M", "G", "T"};
  int thousands = (int)floor(log10(value) / 3 + 1e-9);
  if (value >= 1 && thousands < 5)
    snprintf(label, ATTN_TICK_LABEL, "%.3g%s", value / pow(1000, thousands), suffixes[thousands]);
  else
    snprintf(label, ATTN_TICK_LABEL, "%.3g", value);
}

/* Powers of ten; with 2 and 5 between them where there is room. */
static void add_log10_ticks(attn_axis *axis, int wanted) {
  static const double steps[] = {1, 2, 5};
  int first = (int)floor(axis->low), last = (int)floor(axis->high + 1e-9);
  int between = 3 * (axis->high - axis->low) <= wanted ? 3 : 1;
  int step = between == 3 ? 1 : (last - first) / wanted + 1;
  axis->ticks = 0;
  for (int e = first; e <= last; e += step)
    for (int i = 0; i < between && axis->ticks < ATTN_MOST_TICKS; ++i) {
      double value = steps[i] * pow(10, e), place = log10(value);
      if (place < axis->low - 1e-9 || place > axis->high + 1e-9) continue;
      axis->tick[axis->ticks] = value;
      label_si(value, axis->label[axis->ticks++]);
    }
}

static void add_ticks(attn_axis *axis, int wanted) {
  double low = from_scale(axis->scale, axis->low), high = from_scale(axis->scale, axis->high);
  if (axis->scale == ATTN_LOG2) add_log2_ticks(axis, wanted);
  if (axis->scale == ATTN_LOG10) add_log10_ticks(axis, wanted);
  /* A narrow range on a logarithmic axis may hold no power at all. */
  if (axis->scale == ATTN_LINEAR || axis->ticks < 2)
    add_linear_ticks(axis, low, high, nice_step((high - low) / wanted));
}

bool attn_chart_has_spread(const attn_chart *chart, int series, int64_t i) {
  const attn_chart_spread *spread = chart->spread ? &chart->spread[series] : NULL;
  return spread && fits(chart->y_scale, spread->low[i]) && fits(chart->y_scale, spread->high[i]);
}

static void extend(attn_axis *axis, double value) {
  double place = to_scale(axis->scale, value);
  axis->low = fmin(axis->low, place);
  axis->high = fmax(axis->high, place);
}

static void find_extents(const attn_chart *chart, attn_axis *x, attn_axis *y) {
  x->low = y->low = INFINITY;
  x->high = y->high = -INFINITY;
  for (int s = 0; s < chart->series_count; ++s) {
    const attn_chart_series *series = &chart->series[s];
    for (int64_t i = 0; i < series->count; ++i) {
      if (!attn_chart_drawable(chart, series, i)) continue;
      extend(x, series->x[i]);
      extend(y, series->y[i]);
      if (!attn_chart_has_spread(chart, s, i)) continue;
      extend(y, chart->spread[s].low[i]);
      extend(y, chart->spread[s].high[i]);
    }
  }
}

/* One value, or values that differ by rounding only, still need an axis of some length. */
static void widen(attn_axis *axis) {
  double largest = fmax(fabs(axis->low), fabs(axis->high));
  if (axis->high - axis->low > largest * 1e-9) return;
  double margin = axis->scale != ATTN_LINEAR ? 1 : largest > 0 ? largest / 2 : 1;
  axis->low -= margin;
  axis->high += margin;
}

static void keep_margin(attn_axis *axis) {
  double span = axis->high - axis->low;
  axis->low -= 0.06 * span;
  axis->high += 0.06 * span;
}

/* The y axis ends at ticks, or keeps a margin where it is logarithmic. */
static void round_outwards(attn_axis *axis, int wanted) {
  double span = axis->high - axis->low;
  if (axis->scale == ATTN_LINEAR) {
    double step = nice_step(span / wanted);
    axis->low = floor(axis->low / step + 1e-6) * step;
    axis->high = ceil(axis->high / step - 1e-6) * step;
  } else {
    keep_margin(axis);
  }
}

static attn_status check(const attn_chart *chart) {
  if (chart->series_count < 1 || !chart->series)
    return attn_fail(ATTN_INVALID_ARGUMENT, "chart: there are no series");
  for (int s = 0; s < chart->series_count; ++s) {
    const attn_chart_series *series = &chart->series[s];
    if (!series->name || series->count < 0 || (series->count && (!series->x || !series->y)))
      return attn_fail(ATTN_INVALID_ARGUMENT, "chart: series %d has no name or no numbers", s);
  }
  return ATTN_OK;
}

attn_status attn_chart_axes(const attn_chart *chart, int x_ticks, int y_ticks, attn_axis *x,
                            attn_axis *y) {
  ATTN_TRY(check(chart));
  *x = (attn_axis){.scale = chart->x_scale};
  *y = (attn_axis){.scale = chart->y_scale};
  find_extents(chart, x, y);
  if (!(x->low <= x->high))
    return attn_fail(ATTN_INVALID_ARGUMENT, "chart: no series has a point that can be drawn");
  if (chart->y_from_zero && y->scale == ATTN_LINEAR) {
    y->low = fmin(y->low, 0);
    y->high = fmax(y->high, 0);
  }
  widen(x);
  widen(y);
  if (chart->scatter) keep_margin(x);
  round_outwards(y, y_ticks);
  add_ticks(x, x_ticks);
  add_ticks(y, y_ticks);
  return ATTN_OK;
}

/* -- Text -- */

/* The length of the UTF-8 sequence at `text` (RFC 3629), or 0 when it is none or not printable. */
static int sequence_length(const unsigned char *text) {
  static const struct {
    unsigned char mask, lead;
    int length;
    uint32_t smallest;
  } forms[] = {{0x80, 0x00, 1, 0x20},
               {0xe0, 0xc0, 2, 0xa0},
               {0xf0, 0xe0, 3, 0x800},
               {0xf8, 0xf0, 4, 0x10000}};
  for (int f = 0; f < 4; ++f) {
    if ((text[0] & forms[f].mask) != forms[f].lead) continue;
    uint32_t code = text[0] & (unsigned char)~forms[f].mask;
    for (int i = 1; i < forms[f].length; ++i) {
      if ((text[i] & 0xc0) != 0x80) return 0; /* also stops at the final NUL */
      code = code << 6 | (text[i] & 0x3f);
    }
    bool refused = code < forms[f].smallest || code == 0x7f || code > 0x10ffff ||
                   (code >= 0xd800 && code <= 0xdfff) || (code & 0xfffe) == 0xfffe;
    return refused ? 0 : forms[f].length;
  }
  return 0;
}

static void add_character(attn_text *out, const char *text, int length, attn_chart_escape escape) {
  static const char *const entities[][2] = {
      {"&", "&amp;"}, {"<", "&lt;"}, {">", "&gt;"}, {"\"", "&quot;"}};
  for (int i = 0; i < 4 && escape == ATTN_ESCAPE_XML && length == 1; ++i)
    if (*text == *entities[i][0]) {
      attn_text_add(out, entities[i][1], strlen(entities[i][1]));
      return;
    }
  attn_text_add(out, length ? text : "?", length ? (size_t)length : 1);
}

static int count_characters(const char *text) {
  int count = 0;
  for (const char *c = text; *c; ++count) {
    int length = sequence_length((const unsigned char *)c);
    c += length ? length : 1;
  }
  return count;
}

int attn_chart_add_text(attn_text *out, const char *text, int limit, attn_chart_escape escape) {
  bool cut = count_characters(text) > limit;
  int count = 0;
  for (const char *c = text; *c && count < limit - cut; ++count) {
    int length = sequence_length((const unsigned char *)c);
    add_character(out, c, length, escape);
    c += length ? length : 1;
  }
  if (cut) attn_text_print(out, "…");
  return count + cut;
}

/* -- CSV -- */

/* RFC 4180: quotes around a field with a comma, a quote or a line break; quotes inside doubled. */
static void add_field(attn_text *out, const char *field) {
  bool quoted = strpbrk(field, ",\"\r\n") != NULL;
  if (quoted) attn_text_add(out, "\"", 1);
  for (const char *c = field; *c; ++c) attn_text_add(out, *c == '"' ? "\"\"" : c, 1 + (*c == '"'));
  if (quoted) attn_text_add(out, "\"", 1);
}

/* The fewest digits that give the same number back. */
static void add_number(attn_text *out, double value) {
  char text[32];
  for (int digits = 15; digits <= 17; ++digits) {
    snprintf(text, sizeof text, "%.*g", digits, value);
    if (strtod(text, NULL) == value) break;
  }
  attn_text_add(out, text, strlen(text));
}

attn_status attn_chart_csv(const attn_chart *chart, char **csv) {
  *csv = NULL;
  ATTN_TRY(check(chart));
  attn_text out = {0};
  /* Numbers have a point whatever the caller's locale; this affects only the calling thread. */
  locale_t plain = newlocale(LC_ALL_MASK, "C", (locale_t)0), before = uselocale(plain);
  attn_text_print(&out, "series,");
  add_field(&out, chart->x_label ? chart->x_label : "x");
  attn_text_print(&out, ",");
  add_field(&out, chart->y_label ? chart->y_label : "y");
  attn_text_print(&out, "\n");
  for (int s = 0; s < chart->series_count; ++s)
    for (int64_t i = 0; i < chart->series[s].count; ++i) {
      add_field(&out, chart->series[s].name);
      attn_text_print(&out, ",");
      add_number(&out, chart->series[s].x[i]);
      attn_text_print(&out, ",");
      add_number(&out, chart->series[s].y[i]);
      attn_text_print(&out, "\n");
    }
  uselocale(before);
  if (plain) freelocale(plain);
  return attn_text_take(&out, csv);
}

static attn_status write_text(const char *path, char *text) {
  attn_status status = attn_file_write(path, text, strlen(text));
  attn_free(text);
  return status;
}

attn_status attn_chart_write_csv(const attn_chart *chart, const char *path) {
  char *csv;
  ATTN_TRY(attn_chart_csv(chart, &csv));
  return write_text(path, csv);
}

attn_status attn_chart_write_svg(const attn_chart *chart, int width, int height, const char *path) {
  char *svg;
  ATTN_TRY(attn_chart_svg(chart, width, height, &svg));
  return write_text(path, svg);
}
