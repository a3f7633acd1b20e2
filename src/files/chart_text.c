/* A chart in a terminal: lines of Braille dots (2 x 4 to a character), marks that tell the series
 * apart without colour too, and a legend. */
#include "base/memory.h"
#include "base/status.h"
#include "files/chart_axis.h"

#include <locale.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
  COLUMNS = 80,
  ROWS = 20,
  FEWEST_COLUMNS = 30,
  FEWEST_ROWS = 8,
  MOST_CELLS = 1000, /* columns or rows */
  DOTS_X = 2,
  DOTS_Y = 4,
  MOST_MARKED = 24, /* points of a series that get its mark; of a longer one, MARKS of them */
  MARKS = 5,
  LONGEST_NAME = 40,
};

static const char *const marks[] = {"●", "■", "▲", "◆", "○", "□", "△", "◇"};
static const int colours[] = {36, 33, 32, 35, 34, 31, 96, 93}; /* ANSI */
enum { KINDS = sizeof marks / sizeof *marks };

typedef struct cell {
  unsigned char dots; /* Braille pattern */
  bool marked;
  int series; /* the last one drawn here */
} cell;

typedef struct canvas {
  const attn_chart *chart;
  attn_axis x, y;
  int columns, rows; /* cells of the plot */
  int margin;        /* characters of the y labels */
  bool colour;
  cell *cells;
  attn_text out;
} canvas;

/* Bit of each dot of a cell, by row and column (Unicode, block "Braille Patterns"). */
static const unsigned char dot_bits[DOTS_Y][DOTS_X] = {
    {0x01, 0x08}, {0x02, 0x10}, {0x04, 0x20}, {0x40, 0x80}};

static cell *cell_at(canvas *c, int x, int y) {
  return &c->cells[(y / DOTS_Y) * c->columns + x / DOTS_X];
}

static void set_dot(canvas *c, int x, int y, int series) {
  cell *cell = cell_at(c, x, y);
  cell->dots |= dot_bits[y % DOTS_Y][x % DOTS_X];
  cell->series = series;
}

static int dot_x(const canvas *c, double value) {
  return (int)lround(attn_axis_place(&c->x, value) * (c->columns * DOTS_X - 1));
}

static int dot_y(const canvas *c, double value) {
  return (int)lround((1 - attn_axis_place(&c->y, value)) * (c->rows * DOTS_Y - 1));
}

static void draw_segment(canvas *c, int x0, int y0, int x1, int y1, int series) {
  int steps = abs(x1 - x0) > abs(y1 - y0) ? abs(x1 - x0) : abs(y1 - y0);
  for (int i = 0; i <= steps; ++i) {
    double t = steps ? (double)i / steps : 0;
    set_dot(c, (int)lround(x0 + t * (x1 - x0)), (int)lround(y0 + t * (y1 - y0)), series);
  }
}

static void draw_line(canvas *c, int s) {
  const attn_chart_series *series = &c->chart->series[s];
  bool joined = false;
  int last_x = 0, last_y = 0;
  for (int64_t i = 0; i < series->count; ++i) {
    if (!attn_chart_drawable(c->chart, series, i)) {
      joined = false;
      continue;
    }
    int x = dot_x(c, series->x[i]), y = dot_y(c, series->y[i]);
    draw_segment(c, joined ? last_x : x, joined ? last_y : y, x, y, s);
    last_x = x;
    last_y = y;
    joined = true;
  }
}

/* All points of a short series; a few along a long one, the series' number shifting their places so
 * that lines that run together do not hide each other's marks. */
static bool is_marked(const attn_chart_series *series, int s, int64_t i) {
  if (series->count <= MOST_MARKED) return true;
  int64_t spacing = series->count / MARKS;
  return (i + spacing / 2 + s * spacing / KINDS) % spacing == 0;
}

static void draw_marks(canvas *c, int s) {
  const attn_chart_series *series = &c->chart->series[s];
  for (int64_t i = 0; i < series->count; ++i) {
    if (!attn_chart_drawable(c->chart, series, i) || !is_marked(series, s, i)) continue;
    cell *cell = cell_at(c, dot_x(c, series->x[i]), dot_y(c, series->y[i]));
    cell->marked = true;
    cell->series = s;
  }
}

static void add_spaces(canvas *c, int count) {
  for (int i = 0; i < count; ++i) attn_text_add(&c->out, " ", 1);
}

static void add_coloured(canvas *c, int series, const char *text) {
  if (c->colour)
    attn_text_print(&c->out, "\x1b[%dm%s\x1b[0m", colours[series % KINDS], text);
  else
    attn_text_add(&c->out, text, strlen(text));
}

/* The mark or the dots of a cell; *colour is the series whose colour is on, -1 for none. */
static void add_cell(canvas *c, const cell *cell, int *colour) {
  bool empty = !cell->marked && !cell->dots;
  int wanted = empty || !c->colour ? -1 : cell->series % KINDS;
  if (wanted != *colour) attn_text_print(&c->out, "\x1b[%dm", wanted < 0 ? 0 : colours[wanted]);
  *colour = wanted;
  /* U+2800 + dots, in UTF-8 */
  char braille[4] = {(char)0xe2, (char)(0xa0 | cell->dots >> 6), (char)(0x80 | (cell->dots & 63)),
                     '\0'};
  attn_text_print(&c->out, "%s",
                  empty          ? " "
                  : cell->marked ? marks[cell->series % KINDS]
                                 : braille);
}

/* The tick whose value falls into this row of characters, or -1. */
static int tick_of_row(const canvas *c, int row) {
  for (int i = 0; i < c->y.ticks; ++i)
    if (dot_y(c, c->y.tick[i]) / DOTS_Y == row) return i;
  return -1;
}

static void add_plot(canvas *c) {
  for (int row = 0; row < c->rows; ++row) {
    int tick = tick_of_row(c, row), filled = c->columns;
    const char *label = tick >= 0 ? c->y.label[tick] : "";
    add_spaces(c, c->margin - (int)strlen(label));
    attn_text_print(&c->out, "%s %s", label, tick >= 0 ? "┤" : "│");
    const cell *cells = c->cells + row * c->columns;
    while (filled > 0 && !cells[filled - 1].dots && !cells[filled - 1].marked) --filled;
    int colour = -1;
    for (int column = 0; column < filled; ++column) add_cell(c, &cells[column], &colour);
    attn_text_print(&c->out, colour < 0 ? "\n" : "\x1b[0m\n");
  }
}

/* The axis with its ticks, then their labels, each centred and left out where two would touch. */
static void add_x_axis(canvas *c) {
  add_spaces(c, c->margin + 1);
  attn_text_print(&c->out, "└");
  for (int column = 0; column < c->columns; ++column) {
    bool tick = false;
    for (int i = 0; i < c->x.ticks; ++i) tick = tick || dot_x(c, c->x.tick[i]) / DOTS_X == column;
    attn_text_print(&c->out, tick ? "┴" : "─");
  }
  attn_text_add(&c->out, "\n", 1);
  int written = 0, limit = c->margin + 2 + c->columns;
  for (int i = 0; i < c->x.ticks; ++i) {
    int length = (int)strlen(c->x.label[i]);
    int start = c->margin + 2 + dot_x(c, c->x.tick[i]) / DOTS_X - length / 2;
    if (start + length > limit) start = limit - length;
    if (start < written + (written > 0)) continue;
    add_spaces(c, start - written);
    attn_text_print(&c->out, "%s", c->x.label[i]);
    written = start + length;
  }
  attn_text_add(&c->out, "\n", 1);
}

static void add_line(canvas *c, int indent, const char *text) {
  if (!text) return;
  add_spaces(c, indent);
  attn_chart_add_text(&c->out, text, c->margin + 2 + c->columns - indent, ATTN_ESCAPE_NONE);
  attn_text_add(&c->out, "\n", 1);
}

static void add_legend(canvas *c) {
  int used = 0, width = c->margin + 2 + c->columns;
  for (int s = 0; s < c->chart->series_count; ++s) {
    const char *name = c->chart->series[s].name;
    int needed = (int)strnlen(name, LONGEST_NAME) + 5; /* at most: bytes, not characters */
    if (used && used + needed > width) {
      attn_text_add(&c->out, "\n", 1);
      used = 0;
    }
    add_spaces(c, used ? 3 : c->margin + 2);
    add_coloured(c, s, marks[s % KINDS]);
    attn_text_add(&c->out, " ", 1);
    attn_chart_add_text(&c->out, name, LONGEST_NAME, ATTN_ESCAPE_NONE);
    used += needed + (used ? 0 : c->margin);
  }
  attn_text_add(&c->out, "\n", 1);
}

static attn_status draw(canvas *c, int columns) {
  c->margin = 1;
  for (int i = 0; i < c->y.ticks; ++i)
    if ((int)strlen(c->y.label[i]) > c->margin) c->margin = (int)strlen(c->y.label[i]);
  c->columns = columns - c->margin - 2;
  c->cells = attn_alloc_array((size_t)c->columns * (size_t)c->rows, sizeof *c->cells);
  if (!c->cells) return ATTN_OUT_OF_MEMORY;
  for (int s = 0; s < c->chart->series_count; ++s) draw_line(c, s);
  for (int s = 0; s < c->chart->series_count; ++s) draw_marks(c, s);
  add_line(c, c->margin + 2, c->chart->title);
  add_line(c, c->margin + 2, c->chart->subtitle);
  add_line(c, 0, c->chart->y_label);
  add_plot(c);
  add_x_axis(c);
  if (c->chart->x_label) {
    int length = (int)strnlen(c->chart->x_label, (size_t)c->columns);
    add_line(c, c->margin + 2 + (c->columns - length) / 2, c->chart->x_label);
  }
  add_legend(c);
  attn_free(c->cells);
  return ATTN_OK;
}

attn_status attn_chart_text(const attn_chart *chart, int columns, int rows, bool colour,
                            char **text) {
  *text = NULL;
  if (!columns) columns = COLUMNS;
  if (!rows) rows = ROWS;
  if (columns < FEWEST_COLUMNS || columns > MOST_CELLS || rows < FEWEST_ROWS || rows > MOST_CELLS)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "chart: %d columns and %d rows are not %d to %d and %d to %d", columns, rows,
                     FEWEST_COLUMNS, MOST_CELLS, FEWEST_ROWS, MOST_CELLS);
  canvas c = {.chart = chart, .colour = colour};
  int around = 3 + (chart->title != NULL) + (chart->subtitle != NULL) + (chart->y_label != NULL) +
               (chart->x_label != NULL); /* lines that are not the plot: axis, labels, legend */
  c.rows = rows - around > 2 ? rows - around : 2;
  int y_ticks = c.rows / 3 < 2 ? 2 : c.rows / 3 > 6 ? 6 : c.rows / 3;
  locale_t plain = newlocale(LC_ALL_MASK, "C", (locale_t)0), before = uselocale(plain);
  attn_status status = attn_chart_axes(chart, columns >= 60 ? 8 : 4, y_ticks, &c.x, &c.y);
  if (status == ATTN_OK) status = draw(&c, columns);
  uselocale(before);
  if (plain) freelocale(plain);
  if (status == ATTN_OK) return attn_text_take(&c.out, text);
  attn_text_free(&c.out);
  return status;
}
