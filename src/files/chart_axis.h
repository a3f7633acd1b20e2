/* What the drawings of a chart share: axes with ticks, and text made safe for where it goes. */
#ifndef ATTN_FILES_CHART_AXIS_H
#define ATTN_FILES_CHART_AXIS_H

#include "base/text.h"
#include "files/chart.h"

enum { ATTN_MOST_TICKS = 24, ATTN_TICK_LABEL = 24 };

typedef struct attn_axis {
  attn_chart_scale scale;
  double low, high; /* of the scale: the value itself, its log2 or its log10; low < high */
  int ticks;
  double tick[ATTN_MOST_TICKS]; /* values */
  char label[ATTN_MOST_TICKS][ATTN_TICK_LABEL];
} attn_axis;

/* Checks the chart and finds both axes, each with about the wanted number of ticks (2 to 12). */
attn_status attn_chart_axes(const attn_chart *chart, int x_ticks, int y_ticks, attn_axis *x,
                            attn_axis *y);
/* Whether a point can stand on both axes. */
bool attn_chart_drawable(const attn_chart *chart, const attn_chart_series *series, int64_t i);
/* Whether the spread of a point can. */
bool attn_chart_has_spread(const attn_chart *chart, int series, int64_t i);
/* Where a value lies: 0 at the low end, 1 at the high end. */
double attn_axis_place(const attn_axis *axis, double value);

typedef enum attn_chart_escape { ATTN_ESCAPE_NONE = 0, ATTN_ESCAPE_XML } attn_chart_escape;

/* Appends a caller's text: control characters and invalid UTF-8 become '?', at most `limit`
 * characters are kept (the last one is then an ellipsis). Returns the number of characters. */
int attn_chart_add_text(attn_text *out, const char *text, int limit, attn_chart_escape escape);

#endif
