/* Charts of lines, or of points with their spread: as SVG (self-contained, follows the reader's
 * light or dark theme), as text for a terminal, and their numbers as CSV. */
#ifndef ATTN_FILES_CHART_H
#define ATTN_FILES_CHART_H

#include "attn/base.h"

typedef enum attn_chart_scale { ATTN_LINEAR = 0, ATTN_LOG2, ATTN_LOG10 } attn_chart_scale;

typedef struct attn_chart_series {
  const char *name;
  const double *x, *y; /* not finite, or not positive on a logarithmic axis: a gap */
  int64_t count;
} attn_chart_series;

/* Of each point of a series: drawn as a bar where both ends fit the axis. */
typedef struct attn_chart_spread {
  const double *low, *high;
} attn_chart_spread;

typedef struct attn_chart {
  const char *title, *subtitle, *x_label, *y_label; /* NULL: none */
  attn_chart_scale x_scale, y_scale;
  bool y_from_zero; /* linear y axis: includes 0, so that heights compare */
  bool scatter;     /* in SVG: points are not joined, and a thin line leads to the name */
  const attn_chart_series *series;
  const attn_chart_spread *spread; /* [series_count], in SVG; NULL: none */
  int series_count;
} attn_chart;

/* SVG of width x height pixels (0: 720 x 420), as text to be freed by attn_free. Valid UTF-8 in
 * names is kept, anything else is replaced. ATTN_INVALID_ARGUMENT when no point can be drawn. */
attn_status attn_chart_svg(const attn_chart *chart, int width, int height, char **svg);
/* Lines of text: `columns` x `rows` characters in all (0: 80 x 20), dots of Braille patterns,
 * colours by ANSI escapes if `colour`, a legend below. To be freed by attn_free. */
attn_status attn_chart_text(const attn_chart *chart, int columns, int rows, bool colour,
                            char **text);
/* "series,x,y" with a heading from the labels; numbers have 17 digits where they need them. */
attn_status attn_chart_csv(const attn_chart *chart, char **csv);

/* The same, into files (written beside and renamed). */
attn_status attn_chart_write_svg(const attn_chart *chart, int width, int height, const char *path);
attn_status attn_chart_write_csv(const attn_chart *chart, const char *path);

#endif
