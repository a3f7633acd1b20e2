/* attn bench --efficiency-length: from which length on each mixer's layer is cheaper than exact
 * attention's (tasks/cab.h), in time and in memory. */
#include "cli/bench.h"
#include "base/progress.h"
#include "tasks/cab.h"

#include <math.h>

typedef enum cost { COST_TIME = 0, COST_MEMORY, COSTS } cost;
static const char *const cost_names[COSTS] = {"time", "memory"};

static double cost_of(const attn_bench_row *row, cost which) {
  return which == COST_TIME ? row->middle : row->extra;
}

static bool is_exact(const attn_bench_row *row) {
  return !row->c.op->recurrent;
}

static const attn_bench_row *exact_row(const attn_bench_report *report, const attn_bench_row *row) {
  for (int i = 0; i < report->count; ++i) {
    const attn_bench_row *r = &report->rows[i];
    if (is_exact(r) && r->c.pass == row->c.pass && r->c.dtype == row->c.dtype &&
        r->c.length == row->c.length)
      return r;
  }
  return NULL;
}

static bool is_series(const attn_bench_row *a, const attn_bench_row *b) {
  return a->c.op == b->c.op && a->c.pass == b->c.pass && a->c.dtype == b->c.dtype;
}

/* Fits over the rows of the series that begins with row `first`; false where there are too few. The
 * time at the shortest length is mostly that of starting, so that it is left out. */
static bool fit(const attn_bench_report *report, int first, cost which, attn_efficiency *result) {
  double lengths[ATTN_MOST_NUMBERS], exact[ATTN_MOST_NUMBERS], other[ATTN_MOST_NUMBERS];
  const int least = 3;
  int count = 0;
  for (int i = first; i < report->count && count < ATTN_MOST_NUMBERS; ++i) {
    const attn_bench_row *row = &report->rows[i], *pair = exact_row(report, row);
    if (!pair || !is_series(row, &report->rows[first])) continue;
    lengths[count] = (double)row->c.length;
    exact[count] = cost_of(pair, which);
    other[count++] = cost_of(row, which);
  }
  int skipped = which == COST_TIME && count > least ? 1 : 0;
  return attn_efficiency_length(lengths + skipped, exact + skipped, other + skipped,
                                count - skipped, result) == ATTN_OK;
}

static bool begins_series(const attn_bench_report *report, int row) {
  if (is_exact(&report->rows[row])) return false;
  for (int i = 0; i < row; ++i)
    if (is_series(&report->rows[i], &report->rows[row])) return false;
  return true;
}

static void format(bool fits, double length, char text[ATTN_FORMAT_SIZE]) {
  snprintf(text, ATTN_FORMAT_SIZE, "%.0f", length);
  if (!fits)
    snprintf(text, ATTN_FORMAT_SIZE, "-");
  else if (isnan(length))
    snprintf(text, ATTN_FORMAT_SIZE, "never");
  else if (length <= 0)
    snprintf(text, ATTN_FORMAT_SIZE, "always");
}

void attn_bench_print_lengths(const attn_bench_report *report) {
  printf("\nefficiency length: tokens from which on the layer is cheaper than exact attention's\n");
  printf("%-15s %-8s %-8s %9s %9s\n", "mixer", "pass", "type", cost_names[0], cost_names[1]);
  for (int i = 0; i < report->count; ++i) {
    if (!begins_series(report, i)) continue;
    const attn_bench_case *c = &report->rows[i].c;
    printf("%-15s %-8s %-8s", c->op->name, attn_bench_passes[c->pass], attn_dtype_name(c->dtype));
    for (int which = 0; which < COSTS; ++which) {
      char text[ATTN_FORMAT_SIZE];
      attn_efficiency e = {0};
      bool fits = fit(report, i, (cost)which, &e);
      format(fits, e.length, text);
      printf(" %9s", text);
    }
    putchar('\n');
  }
}

static json_t *fit_json(const attn_bench_report *report, int first, cost which) {
  attn_efficiency e;
  if (!fit(report, first, which, &e)) return json_null();
  return json_pack("{s:o, s:[o, o, o], s:[o, o]}", "length", attn_json_real(e.length), "exact",
                   attn_json_real(e.a), attn_json_real(e.b), attn_json_real(e.c), "mixer",
                   attn_json_real(e.d), attn_json_real(e.e));
}

json_t *attn_bench_lengths_json(const attn_bench_report *report) {
  json_t *all = json_array();
  for (int i = 0; i < report->count; ++i) {
    if (!begins_series(report, i)) continue;
    const attn_bench_case *c = &report->rows[i].c;
    json_array_append_new(
        all, json_pack("{s:s, s:s, s:s, s:o, s:o}", "mixer", c->op->name, "pass",
                       attn_bench_passes[c->pass], "dtype", attn_dtype_name(c->dtype), "time",
                       fit_json(report, i, COST_TIME), "memory", fit_json(report, i, COST_MEMORY)));
  }
  return all;
}
