/* A chart as SVG: a painted ground, light horizontal lines, and each line's name at its end, so
 * that no legend has to be matched by colour. */
#include "base/memory.h"
#include "base/status.h"
#include "files/chart_axis.h"

#include <locale.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
  WIDTH = 720,
  HEIGHT = 420,
  SMALLEST = 160,
  LARGEST = 8192,
  MOST_SERIES = 64,
  MOST_MARKED = 40, /* points of a series that are drawn as dots too */
  LONGEST_NAME = 30,
  EDGE = 20,
  TITLE_LINE = 22,
  SUBTITLE_LINE = 18,
  LABEL_LINE = 16,
};
static const double character_width = 6.7; /* of the 12-pixel font, on average */

/* Colours that differ for colour-blind readers too (after Okabe and Ito), for each ground. */
static const char *const palette[][2] = {
    {"#0072b2", "#58b5f0"}, {"#d55e00", "#ff9552"}, {"#009e73", "#3fd6a4"}, {"#b5489a", "#f08fd0"},
    {"#6a51c7", "#b3a1ff"}, {"#a67c00", "#e8c547"}, {"#c2334d", "#ff8096"}, {"#5c6773", "#b4bdc8"},
};
enum { COLOURS = sizeof palette / sizeof *palette };

typedef struct drawing {
  const attn_chart *chart;
  attn_axis x, y;
  double left, right, top, bottom; /* the plot, in pixels */
  int width, height;
  attn_text out;
} drawing;

static double x_of(const drawing *d, double value) {
  return d->left + attn_axis_place(&d->x, value) * (d->right - d->left);
}

static double y_of(const drawing *d, double value) {
  return d->bottom - attn_axis_place(&d->y, value) * (d->bottom - d->top);
}

static void add_style(drawing *d) {
  attn_text *out = &d->out;
  attn_text_print(out, "<style>\n"
                       "text{font-family:system-ui,-apple-system,'Segoe UI',Helvetica,Arial,"
                       "sans-serif;font-size:12px;fill:#57606a}\n"
                       ".ground{fill:#ffffff;stroke:#d0d7de}\n"
                       ".title{font-size:16px;font-weight:600;fill:#1f2328}\n"
                       ".name{font-weight:600}\n"
                       ".grid{stroke:#d8dee4;stroke-width:1}\n"
                       ".axis{stroke:#8c959f;stroke-width:1;fill:none}\n"
                       ".line{fill:none;stroke-width:2.25;stroke-linejoin:round;"
                       "stroke-linecap:round}\n"
                       ".dense{stroke-width:1.25}\n"
                       ".lead{fill:none;stroke-width:1;stroke-opacity:0.45}\n"
                       ".dot{stroke:#ffffff;stroke-width:1.5}\n");
  for (int theme = 0; theme < 2; ++theme) {
    if (theme)
      attn_text_print(out, "@media (prefers-color-scheme:dark){\n"
                           "text{fill:#9ea7b3}.ground{fill:#0d1117;stroke:#30363d}"
                           ".title{fill:#f0f3f6}.grid{stroke:#262c36}.axis{stroke:#6e7681}"
                           ".dot{stroke:#0d1117}\n");
    for (int c = 0; c < COLOURS; ++c)
      attn_text_print(out, ".s%d{stroke:%s}.f%d{fill:%s}\n", c, palette[c][theme], c,
                      palette[c][theme]);
  }
  attn_text_print(out, "}\n</style>\n");
}

static void add_label(drawing *d, const char *attributes, double x, double y, const char *text,
                      int limit) {
  attn_text_print(&d->out, "<text x=\"%.1f\" y=\"%.1f\" %s>", x, y, attributes);
  attn_chart_add_text(&d->out, text, limit, ATTN_ESCAPE_XML);
  attn_text_print(&d->out, "</text>\n");
}

static void add_titles(drawing *d) {
  const attn_chart *chart = d->chart;
  int limit = (int)((d->width - 2 * EDGE) / character_width);
  double y = EDGE + 12;
  if (chart->title) {
    add_label(d, "class=\"title\"", EDGE, y, chart->title, limit * 3 / 4);
    y += TITLE_LINE;
  }
  if (chart->subtitle) add_label(d, "", EDGE, y - 2, chart->subtitle, limit);
  if (chart->y_label) add_label(d, "", EDGE, d->top - 12, chart->y_label, limit);
  if (chart->x_label)
    add_label(d, "text-anchor=\"middle\"", (d->left + d->right) / 2, d->height - EDGE + 4,
              chart->x_label, limit);
}

static void add_axes(drawing *d) {
  attn_text *out = &d->out;
  for (int i = 0; i < d->y.ticks; ++i) {
    double y = y_of(d, d->y.tick[i]);
    attn_text_print(out, "<path class=\"grid\" d=\"M%.1f %.1fH%.1f\"/>\n", d->left, y, d->right);
    add_label(d, "text-anchor=\"end\"", d->left - 8, y + 4, d->y.label[i], ATTN_TICK_LABEL);
  }
  for (int i = 0; i < d->x.ticks; ++i) {
    double x = x_of(d, d->x.tick[i]);
    attn_text_print(out, "<path class=\"axis\" d=\"M%.1f %.1fv5\"/>\n", x, d->bottom);
    add_label(d, "text-anchor=\"middle\"", x, d->bottom + 19, d->x.label[i], ATTN_TICK_LABEL);
  }
  attn_text_print(out, "<path class=\"axis\" d=\"M%.1f %.1fH%.1f\"/>\n", d->left, d->bottom,
                  d->right);
}

/* Many points fall into one column of pixels in a long series; the first, lowest, highest and last
 * of each column draw the same picture. */
typedef struct column {
  bool open, started; /* has points; the line has begun and has no gap here */
  double x, first, low, high, last;
} column;

static void add_vertex(drawing *d, column *c, double y) {
  attn_text_print(&d->out, "%c%.1f %.1f", c->started ? 'L' : 'M', c->x, y);
  c->started = true;
}

static void flush_column(drawing *d, column *c) {
  if (!c->open) return;
  add_vertex(d, c, c->first);
  if (c->low < fmin(c->first, c->last)) add_vertex(d, c, c->low);
  if (c->high > fmax(c->first, c->last)) add_vertex(d, c, c->high);
  if (c->last != c->first) add_vertex(d, c, c->last);
  c->open = false;
}

static void add_path(drawing *d, int s) {
  const attn_chart_series *series = &d->chart->series[s];
  bool dense = series->count > 2 * (d->right - d->left);
  column c = {0};
  attn_text_print(&d->out, "<path class=\"line%s s%d\"%s d=\"", dense ? " dense" : "", s % COLOURS,
                  s >= COLOURS ? " stroke-dasharray=\"6 4\"" : "");
  for (int64_t i = 0; i < series->count; ++i) {
    if (!attn_chart_drawable(d->chart, series, i)) {
      flush_column(d, &c);
      c.started = false;
      continue;
    }
    double x = x_of(d, series->x[i]), y = y_of(d, series->y[i]);
    if (dense) x = round(x);
    if (!c.open || c.x != x) {
      flush_column(d, &c);
      c = (column){.open = true, .started = c.started, .x = x, .first = y, .low = y, .high = y};
    }
    c.low = fmin(c.low, y);
    c.high = fmax(c.high, y);
    c.last = y;
  }
  flush_column(d, &c);
  attn_text_print(&d->out, "\"/>\n");
}

static void add_dots(drawing *d, int s) {
  const attn_chart_series *series = &d->chart->series[s];
  if (series->count > MOST_MARKED) return;
  for (int64_t i = 0; i < series->count; ++i)
    if (attn_chart_drawable(d->chart, series, i))
      attn_text_print(&d->out, "<circle class=\"dot f%d\" cx=\"%.1f\" cy=\"%.1f\" r=\"4\"/>\n",
                      s % COLOURS, x_of(d, series->x[i]), y_of(d, series->y[i]));
}

/* The spread of each point, with short ends. */
static void add_bars(drawing *d, int s) {
  const double half = 4; /* of an end, in pixels */
  const attn_chart_series *series = &d->chart->series[s];
  for (int64_t i = 0; i < series->count; ++i) {
    if (!attn_chart_drawable(d->chart, series, i) || !attn_chart_has_spread(d->chart, s, i))
      continue;
    double x = x_of(d, series->x[i]) - half, low = y_of(d, d->chart->spread[s].low[i]);
    double high = y_of(d, d->chart->spread[s].high[i]);
    attn_text_print(&d->out,
                    "<path class=\"line dense s%d\" d=\"M%.1f %.1fh%.0fM%.1f %.1fh%.0fM%.1f "
                    "%.1fV%.1f\"/>\n",
                    s % COLOURS, x, low, 2 * half, x, high, 2 * half, x + half, low, high);
  }
}

/* Names stand at the last point of their lines, moved apart where they would touch. */
typedef struct end_label {
  int series;
  double x, y, point; /* point: where y would like to be */
} end_label;

static int by_y(const void *a, const void *b) {
  double x = ((const end_label *)a)->y, y = ((const end_label *)b)->y;
  if (x != y) return x < y ? -1 : 1;
  return ((const end_label *)a)->series - ((const end_label *)b)->series;
}

static void spread(const drawing *d, end_label *labels, int count) {
  double room = d->bottom - d->top;
  double gap = count > 1 ? fmin(LABEL_LINE, room / (count - 1)) : 0;
  for (int i = 0; i < count; ++i) {
    double least = i ? labels[i - 1].y + gap : d->top;
    labels[i].y = fmax(labels[i].y, least);
  }
  for (int i = count - 1; i >= 0; --i) {
    double most = i + 1 < count ? labels[i + 1].y - gap : d->bottom;
    labels[i].y = fmin(labels[i].y, most);
  }
}

static void add_names(drawing *d) {
  end_label labels[MOST_SERIES];
  int count = 0;
  for (int s = 0; s < d->chart->series_count; ++s) {
    const attn_chart_series *series = &d->chart->series[s];
    int64_t last = series->count - 1;
    while (last >= 0 && !attn_chart_drawable(d->chart, series, last)) --last;
    if (last < 0) continue;
    double y = y_of(d, series->y[last]);
    labels[count++] = (end_label){s, x_of(d, series->x[last]), y, y};
  }
  qsort(labels, (size_t)count, sizeof *labels, by_y);
  spread(d, labels, count);
  for (int i = 0; i < count; ++i) {
    if (d->chart->scatter)
      attn_text_print(&d->out, "<path class=\"lead s%d\" d=\"M%.1f %.1fL%.1f %.1f\"/>\n",
                      labels[i].series % COLOURS, labels[i].x, labels[i].point, d->right + 8,
                      labels[i].y);
    attn_text_print(&d->out, "<text class=\"name f%d\" x=\"%.1f\" y=\"%.1f\">",
                    labels[i].series % COLOURS, d->right + 12, labels[i].y + 4);
    attn_chart_add_text(&d->out, d->chart->series[labels[i].series].name, LONGEST_NAME,
                        ATTN_ESCAPE_XML);
    attn_text_print(&d->out, "</text>\n");
  }
}

static int longest_name(const attn_chart *chart) {
  int longest = 0;
  for (int s = 0; s < chart->series_count; ++s) {
    int length = (int)strnlen(chart->series[s].name, LONGEST_NAME);
    if (length > longest) longest = length;
  }
  return longest;
}

static int longest_label(const attn_axis *axis) {
  int longest = 1;
  for (int i = 0; i < axis->ticks; ++i) {
    int length = (int)strlen(axis->label[i]);
    if (length > longest) longest = length;
  }
  return longest;
}

static void lay_out(drawing *d) {
  const attn_chart *chart = d->chart;
  d->left = EDGE + 8 + longest_label(&d->y) * character_width;
  d->right =
      d->width - EDGE - 12 - fmin(longest_name(chart) * (character_width + 0.5), d->width * 0.35);
  d->top = EDGE + 8 + (chart->title ? TITLE_LINE : 0) + (chart->subtitle ? SUBTITLE_LINE : 0) +
           (chart->y_label ? LABEL_LINE + 8 : 0);
  d->bottom = d->height - EDGE - 22 - (chart->x_label ? LABEL_LINE + 4 : 0);
}

static void draw(drawing *d) {
  attn_text_print(&d->out,
                  "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" "
                  "viewBox=\"0 0 %d %d\" role=\"img\">\n<title>",
                  d->width, d->height, d->width, d->height);
  attn_chart_add_text(&d->out, d->chart->title ? d->chart->title : "Chart", 200, ATTN_ESCAPE_XML);
  attn_text_print(&d->out, "</title>\n");
  add_style(d);
  attn_text_print(&d->out,
                  "<rect class=\"ground\" x=\"0.5\" y=\"0.5\" width=\"%d\" height=\"%d\" "
                  "rx=\"8\"/>\n",
                  d->width - 1, d->height - 1);
  add_titles(d);
  add_axes(d);
  for (int s = 0; s < d->chart->series_count && !d->chart->scatter; ++s) add_path(d, s);
  for (int s = 0; s < d->chart->series_count; ++s) add_bars(d, s);
  if (d->chart->scatter) add_names(d); /* below the points that they lead to */
  for (int s = 0; s < d->chart->series_count; ++s) add_dots(d, s);
  if (!d->chart->scatter) add_names(d);
  attn_text_print(&d->out, "</svg>\n");
}

attn_status attn_chart_svg(const attn_chart *chart, int width, int height, char **svg) {
  drawing d = {.chart = chart, .width = width ? width : WIDTH, .height = height ? height : HEIGHT};
  *svg = NULL;
  if (d.width < SMALLEST || d.width > LARGEST || d.height < SMALLEST || d.height > LARGEST)
    return attn_fail(ATTN_INVALID_ARGUMENT, "chart: %d x %d pixels are not %d to %d each", d.width,
                     d.height, SMALLEST, LARGEST);
  if (chart->series_count > MOST_SERIES)
    return attn_fail(ATTN_INVALID_ARGUMENT, "chart: %d series are more than %d",
                     chart->series_count, MOST_SERIES);
  /* Numbers have a point whatever the caller's locale; this affects only the calling thread. */
  locale_t plain = newlocale(LC_ALL_MASK, "C", (locale_t)0), before = uselocale(plain);
  attn_status status =
      attn_chart_axes(chart, d.width >= 480 ? 8 : 4, d.height >= 300 ? 5 : 3, &d.x, &d.y);
  if (status == ATTN_OK) {
    lay_out(&d);
    draw(&d);
    status = attn_text_take(&d.out, svg);
  }
  uselocale(before);
  if (plain) freelocale(plain);
  return status;
}
