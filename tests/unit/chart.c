/* Charts: the SVG is well-formed XML whatever the numbers and names, ticks are sensible, the text
 * fits its size, CSV returns the numbers. */
#include "support/test.h"

#include "base/fault.h"
#include "base/memory.h"
#include "files/chart.h"
#include "files/chart_axis.h"

#include <locale.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

/* A small checker of well-formedness: tags nest and close, attributes are quoted and stand once,
 * entities are known, text holds no '<' and no control characters. Returns NULL or the complaint.
 */
enum { DEEPEST = 16, LONGEST_TAG = 32 };

static const char *check_entity(const char **at) {
  static const char *const known[] = {"&amp;", "&lt;", "&gt;", "&quot;"};
  for (int i = 0; i < 4; ++i)
    if (strncmp(*at, known[i], strlen(known[i])) == 0) {
      *at += strlen(known[i]);
      return NULL;
    }
  return "unknown entity";
}

static const char *check_attributes(const char **at) {
  while (**at == ' ' || **at == '\n') {
    *at += strspn(*at, " \n");
    if (**at == '>' || **at == '/') break;
    *at += strspn(*at, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-");
    if (strncmp(*at, "=\"", 2) != 0) return "an attribute without a quoted value";
    for (*at += 2; **at != '"';) {
      if ((unsigned char)**at < ' ' || **at == '<') return "a bad character in an attribute";
      const char *error = **at == '&' ? check_entity(at) : (++*at, NULL);
      if (error) return error;
    }
    ++*at;
  }
  return NULL;
}

static const char *check_tag(const char **at, char stack[DEEPEST][LONGEST_TAG], int *depth) {
  bool closing = *++*at == '/';
  *at += closing;
  size_t length = strspn(*at, "abcdefghijklmnopqrstuvwxyz");
  if (length == 0 || length >= LONGEST_TAG) return "a bad tag";
  if (closing) {
    if (*depth == 0 || strncmp(stack[*depth - 1], *at, length) != 0 ||
        stack[*depth - 1][length] != '\0')
      return "a closing tag that does not match";
    --*depth;
    *at += length;
    return *(*at)++ == '>' ? NULL : "a closing tag with attributes";
  }
  if (*depth == DEEPEST) return "too deep";
  memcpy(stack[*depth], *at, length);
  stack[*depth][length] = '\0';
  *at += length;
  const char *error = check_attributes(at);
  if (error) return error;
  bool empty = **at == '/';
  *at += empty;
  *depth += !empty;
  return *(*at)++ == '>' ? NULL : "a tag that does not end";
}

static const char *check_xml(const char *text) {
  char stack[DEEPEST][LONGEST_TAG];
  int depth = 0;
  const char *at = text;
  if (strncmp(text, "<svg ", 5) != 0) return "does not begin with <svg";
  while (*at) {
    const char *error = NULL;
    if (*at == '<')
      error = check_tag(&at, stack, &depth);
    else if (*at == '&')
      error = check_entity(&at);
    else if (((unsigned char)*at < ' ' && *at != '\n') || *at == 0x7f)
      error = "a control character";
    else
      ++at;
    if (error) return error;
    if (depth == 0) break;
  }
  return depth == 0 && strcmp(at, "\n") == 0 ? NULL : "does not end with </svg>";
}

static void assert_drawn(const attn_chart *chart) {
  char *svg, *text, *csv;
  assert_ok(attn_chart_svg(chart, 0, 0, &svg));
  const char *error = check_xml(svg);
  if (error) fail_msg("%s in\n%s", error, svg);
  assert_null(strstr(svg, "nan"));
  assert_null(strstr(svg, "inf"));
  assert_ok(attn_chart_text(chart, 0, 0, true, &text));
  assert_ok(attn_chart_csv(chart, &csv));
  attn_free(svg);
  attn_free(text);
  attn_free(csv);
}

static void the_checker_can_fail(void **state) {
  (void)state;
  assert_null(check_xml("<svg a=\"1\"><g/>x &amp; y</svg>\n"));
  static const char *const bad[] = {"<svg a=1></svg>\n",
                                    "<svg a=\"1\"><g></svg>\n",
                                    "<svg a=\"1\">&x;</svg>\n",
                                    "<svg a=\"1\">\x01</svg>\n",
                                    "<svg a=\"1\">",
                                    "<svg a=\"<\"></svg>\n"};
  for (int i = 0; i < 6; ++i) assert_non_null(check_xml(bad[i]));
}

static attn_chart chart_of(const attn_chart_series *series, int count) {
  return (attn_chart){
      .title = "T", .x_label = "x", .y_label = "y", .series = series, .series_count = count};
}

static void ticks_are_sensible(void **state) {
  (void)state;
  static const struct {
    attn_chart_scale scale;
    double low, high;
    const char *labels;
  } cases[] = {
      {ATTN_LINEAR, 0, 5, "0 1 2 3 4 5"},
      {ATTN_LINEAR, 0, 40000, "0 10k 20k 30k 40k"},
      {ATTN_LINEAR, 0, 1.1, "0 0.25 0.50 0.75 1.00"},
      {ATTN_LINEAR, -0.02, 0.02, "-0.02 -0.01 0 0.01 0.02"},
      {ATTN_LINEAR, 0, 2.4e9, "0 0.5G 1.0G 1.5G 2.0G"},
      {ATTN_LOG2, 1024, 16384, "1K 2K 4K 8K 16K"},
      {ATTN_LOG2, 512, 1048576, "512 2K 8K 32K 128K 512K"},
      {ATTN_LOG2, 0.25, 4, "1/4 1/2 1 2 4"},
      {ATTN_LOG10, 1, 1e6, "1 100 10k 1M"},
      {ATTN_LOG10, 0.01, 100, "0.01 0.1 1 10 100"},
      {ATTN_LOG10, 1, 30, "1 2 5 10 20"},
      {ATTN_LOG10, 31, 34, "31 32 33 34"}, /* no power inside: linear ticks */
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i) {
    double x[] = {cases[i].low, cases[i].high}, y[] = {1, 2};
    attn_chart_series series = {.name = "s", .x = x, .y = y, .count = 2};
    attn_chart chart = chart_of(&series, 1);
    chart.x_scale = cases[i].scale;
    attn_axis axis, other;
    assert_ok(attn_chart_axes(&chart, 5, 5, &axis, &other));
    char labels[512] = "";
    for (int t = 0; t < axis.ticks; ++t) {
      if (t) strcat(labels, " ");
      strcat(labels, axis.label[t]);
      double place = attn_axis_place(&axis, axis.tick[t]);
      assert_true(place > -1e-6 && place < 1 + 1e-6);
    }
    assert_string_equal(labels, cases[i].labels);
  }
}

static void heights_compare_from_zero(void **state) {
  (void)state;
  double x[] = {1, 2}, above[] = {70, 90}, below[] = {-70, -90};
  attn_chart_series series = {"s", x, above, 2};
  attn_chart chart = chart_of(&series, 1);
  attn_axis x_axis, y_axis;
  assert_ok(attn_chart_axes(&chart, 5, 5, &x_axis, &y_axis));
  assert_true(y_axis.low == 70);
  chart.y_from_zero = true;
  assert_ok(attn_chart_axes(&chart, 5, 5, &x_axis, &y_axis));
  assert_true(y_axis.low == 0 && y_axis.high == 100);
  series.y = below;
  assert_ok(attn_chart_axes(&chart, 5, 5, &x_axis, &y_axis));
  assert_true(y_axis.low == -100 && y_axis.high == 0);
  series.count = -1;
  assert_int_equal(attn_chart_axes(&chart, 5, 5, &x_axis, &y_axis), ATTN_INVALID_ARGUMENT);
}

static void hostile_numbers(void **state) {
  (void)state;
  static const double x[] = {1, 2, 3, 4, 5, 6};
  static const double rows[][6] = {
      {NAN, 1, INFINITY, 2, -INFINITY, 3},
      {5, 5, 5, 5, 5, 5},
      {0, 0, 0, 0, 0, 0},
      {1e300, -1e149, 1e149, 0, 1, 2},
      {1, 1 + 1e-15, 1, 1, 1, 1},
      {1e-300, 2e-300, 3e-300, 1e-310, 4e-300, 0},
      {-3, -2, -1, 1, 2, 3},
      {1e17, 1e17 + 16, 1e17 + 32, 1e17, 1e17, 1e17},
      {4.9e-324, 1e-149, 1e149, 1e150, 1, 1e308},
  };
  for (size_t r = 0; r < sizeof rows / sizeof *rows; ++r)
    for (int scales = 0; scales < 9; ++scales) {
      attn_chart_series series = {.name = "s", .x = r % 2 ? rows[r] : x, .y = rows[r], .count = 6};
      attn_chart chart = chart_of(&series, 1);
      chart.x_scale = (attn_chart_scale)(scales % 3);
      chart.y_scale = (attn_chart_scale)(scales / 3);
      bool drawable = false;
      for (int i = 0; i < 6; ++i) drawable = drawable || attn_chart_drawable(&chart, &series, i);
      char *svg;
      if (drawable)
        assert_drawn(&chart);
      else
        assert_int_equal(attn_chart_svg(&chart, 0, 0, &svg), ATTN_INVALID_ARGUMENT);
    }
}

static void hostile_names(void **state) {
  (void)state;
  double x[] = {1, 2}, y[] = {1, 2};
  static const char *const names[] = {"<script>alert(\"1\")</script> & more",
                                      "\x1b[31mred\x07",
                                      "\xff\xfe broken \xc3",
                                      "Überlänge: ein sehr langer Name, der nirgends hinpasst",
                                      "",
                                      "\xed\xa0\x80 surrogate \xf4\x90\x80\x80",
                                      "not characters \xef\xbf\xbe \xef\xbf\xbf",
                                      "line\nbreak"};
  enum { COUNT = sizeof names / sizeof *names };
  attn_chart_series series[COUNT];
  attn_text clean = {0};
  assert_int_equal(attn_chart_add_text(&clean, "a\xef\xbf\xbe\xff<\xc3\xa9", 9, ATTN_ESCAPE_XML),
                   7);
  assert_string_equal(clean.data, "a????&lt;\xc3\xa9");
  attn_text_free(&clean);
  for (int i = 0; i < COUNT; ++i) {
    series[i] = (attn_chart_series){.name = names[i], .x = x, .y = y, .count = 2};
    attn_chart chart = chart_of(series, i + 1);
    chart.title = chart.subtitle = chart.x_label = chart.y_label = names[i];
    assert_drawn(&chart);
    char *text;
    assert_ok(attn_chart_text(&chart, 40, 10, false, &text));
    for (const char *c = text; *c; ++c) assert_true((unsigned char)*c >= ' ' || *c == '\n');
    attn_free(text);
  }
}

/* Characters, not bytes. */
static int width_of_line(const char *line) {
  int width = 0;
  for (; *line && *line != '\n'; ++line) width += (*line & 0xc0) != 0x80;
  return width;
}

static void text_fits(void **state) {
  (void)state;
  double x[50], y[2][50];
  for (int i = 0; i < 50; ++i) {
    x[i] = i * i * (1000.0 / 2401); /* ends at a tick of four characters */
    y[0][i] = exp(-i / 10.0) * 1e6;
    y[1][i] = 1e5 + i;
  }
  attn_chart_series series[2] = {{"falling", x, y[0], 50}, {"flat", x, y[1], 50}};
  attn_chart chart = chart_of(series, 2);
  static const int sizes[][2] = {{30, 8}, {33, 11}, {80, 20}, {200, 60}};
  for (int scale = 0; scale < 3; ++scale)
    for (int s = 0; s < 4; ++s) {
      char *text;
      chart.x_scale = (attn_chart_scale)scale;
      assert_ok(attn_chart_text(&chart, sizes[s][0], sizes[s][1], false, &text));
      int lines = 0;
      for (const char *line = text; *line; line = strchr(line, '\n') + 1, ++lines)
        assert_true(width_of_line(line) <= sizes[s][0]);
      assert_true(lines <= sizes[s][1]);
      assert_non_null(strstr(text, "● falling"));
      attn_free(text);
    }
  char *text;
  assert_int_equal(attn_chart_text(&chart, 20, 20, false, &text), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_chart_svg(&chart, 1, 1, &text), ATTN_INVALID_ARGUMENT);
  chart.series_count = 0;
  assert_int_equal(attn_chart_text(&chart, 0, 0, false, &text), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_chart_csv(&chart, &text), ATTN_INVALID_ARGUMENT);
}

/* Where the n-th grid line from below lies, as it stands in the file. */
static double grid_line(const char *svg, int n) {
  double left, height = 0;
  const char *grid = svg;
  for (int i = 0; i <= n; ++i) {
    grid = strstr(grid + 1, "class=\"grid\"");
    assert_non_null(grid);
    assert_int_equal(sscanf(strchr(grid, 'M') + 1, "%lf %lf", &left, &height), 2);
  }
  return height;
}

static int count_of(const char *text, const char *what) {
  int count = 0;
  for (const char *at = text; (at = strstr(at, what)); ++at) ++count;
  return count;
}

/* Points are not joined; each has the bar of its spread, for which the axis has room, and a line to
 * its name. */
static void points_have_a_spread(void **state) {
  (void)state;
  double x[] = {1, 8}, y[][2] = {{40, 60}, {50, 55}};
  double low[][2] = {{20, NAN}, {50, 55}}, high[][2] = {{90, 70}, {50, 55}};
  attn_chart_series series[] = {{"one", x, y[0], 2}, {"two", x, y[1], 2}};
  attn_chart_spread spread[] = {{low[0], high[0]}, {low[1], high[1]}};
  attn_chart chart = chart_of(series, 2);
  chart.scatter = true;
  chart.x_scale = ATTN_LOG2;
  chart.spread = spread;
  assert_drawn(&chart);
  attn_axis x_axis, y_axis;
  assert_ok(attn_chart_axes(&chart, 5, 5, &x_axis, &y_axis));
  assert_true(y_axis.low <= 20 && y_axis.high >= 90 && y_axis.low > 0 && y_axis.high < 110);
  assert_true(x_axis.low < 0 && x_axis.high > 3);
  char *svg;
  assert_ok(attn_chart_svg(&chart, 0, 0, &svg));
  assert_int_equal(count_of(svg, "class=\"line dense"), 3); /* one of the four has no low end */
  assert_int_equal(count_of(svg, "class=\"line"), 3);
  assert_int_equal(count_of(svg, "class=\"lead"), 2);
  assert_int_equal(count_of(svg, "class=\"dot"), 4);
  attn_free(svg);
}

/* A line of many points is drawn with a bounded number of vertices and keeps its extremes. */
static void long_series_stay_small(void **state) {
  (void)state;
  enum { COUNT = 300000 };
  double *x = malloc(COUNT * sizeof *x), *y = malloc(COUNT * sizeof *y);
  assert_true(x && y);
  for (int i = 0; i < COUNT; ++i) {
    x[i] = i;
    y[i] = i == 123456 ? 10 : i == 223456 ? -10 : sin(i * 0.7);
  }
  attn_chart_series series = {"noise", x, y, COUNT};
  attn_chart chart = chart_of(&series, 1);
  char *svg, vertex[64];
  assert_ok(attn_chart_svg(&chart, 0, 0, &svg));
  assert_true(strlen(svg) < 100000);
  attn_axis x_axis, y_axis;
  assert_ok(attn_chart_axes(&chart, 8, 5, &x_axis, &y_axis));
  assert_true(y_axis.low == -10 && y_axis.high == 10); /* the outermost grid lines */
  for (int end = 0; end < 2; ++end) {
    snprintf(vertex, sizeof vertex, " %.1fL", grid_line(svg, end ? y_axis.ticks - 1 : 0));
    assert_non_null(strstr(strstr(svg, "class=\"line"), vertex));
  }
  attn_free(svg);
  free(x);
  free(y);
}

static void csv_returns_the_numbers(void **state) {
  (void)state;
  double x[] = {1, 0.1, 1e-300}, y[] = {1.0 / 3, NAN, -2};
  attn_chart_series series = {"a \"b\", c", x, y, 3};
  attn_chart chart = chart_of(&series, 1);
  chart.x_label = "step";
  chart.y_label = "loss";
  static const char expected[] = "series,step,loss\n"
                                 "\"a \"\"b\"\", c\",1,0.3333333333333333\n"
                                 "\"a \"\"b\"\", c\",0.1,nan\n"
                                 "\"a \"\"b\"\", c\",1e-300,-2\n";
  static const char *const locales[] = {"C", "de_DE.UTF-8", "fr_FR.UTF-8"}; /* where installed */
  for (int i = 0; i < 3; ++i) {
    setlocale(LC_ALL, locales[i]);
    char *csv;
    assert_ok(attn_chart_csv(&chart, &csv));
    assert_string_equal(csv, expected);
    attn_free(csv);
  }
  setlocale(LC_ALL, "C");
}

static void out_of_memory(void **state) {
  (void)state;
  double x[] = {1, 2, 3}, y[] = {1, 4, 9};
  attn_chart_series series = {"s", x, y, 3};
  attn_chart chart = chart_of(&series, 1);
  size_t live = attn_memory_get_stats().live_bytes;
  for (int kind = 0; kind < 3; ++kind)
    for (int skip = 0;; ++skip) {
      char *out;
      attn_fault_arm(ATTN_FAULT_ALLOC, skip);
      attn_status status = kind == 0   ? attn_chart_svg(&chart, 0, 0, &out)
                           : kind == 1 ? attn_chart_text(&chart, 0, 0, true, &out)
                                       : attn_chart_csv(&chart, &out);
      bool hit = attn_fault_disarm(ATTN_FAULT_ALLOC);
      attn_free(out);
      assert_int_equal(status, hit ? ATTN_OUT_OF_MEMORY : ATTN_OK);
      assert_int_equal(attn_memory_get_stats().live_bytes, live);
      if (!hit) break;
    }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(the_checker_can_fail),
      cmocka_unit_test(ticks_are_sensible),
      cmocka_unit_test(heights_compare_from_zero),
      cmocka_unit_test(hostile_numbers),
      cmocka_unit_test(hostile_names),
      cmocka_unit_test(text_fits),
      cmocka_unit_test(points_have_a_spread),
      cmocka_unit_test(long_series_stay_small),
      cmocka_unit_test(csv_returns_the_numbers),
      cmocka_unit_test(out_of_memory),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
