/* The rows of attn bench as a table, as JSON, as a chart and as a page. */
#include "cli/bench.h"
#include "cli/page.h"
#include "base/cpu.h"
#include "base/memory.h"
#include "base/progress.h"
#include "files/chart.h"
#include "base/io.h"

#include <math.h>
#include <string.h>

static const char *short_dtype(attn_dtype dtype) {
  return dtype == ATTN_BF16 ? "bf16" : dtype == ATTN_F32 ? "f32" : "f64";
}

static const char *format_length(int64_t length, char text[ATTN_FORMAT_SIZE]) {
  bool round = length >= 1024 && length % 1024 == 0;
  snprintf(text, ATTN_FORMAT_SIZE, round ? "%lldK" : "%lld",
           (long long)(round ? length / 1024 : length));
  return text;
}

static const char *format_time(double seconds, char text[ATTN_FORMAT_SIZE]) {
  const char *unit = seconds < 1e-3 ? "us" : seconds < 1 ? "ms" : "s";
  double value = seconds * (seconds < 1e-3 ? 1e6 : seconds < 1 ? 1e3 : 1);
  snprintf(text, ATTN_FORMAT_SIZE,
           value < 10    ? "%.2f %s"
           : value < 100 ? "%.1f %s"
                         : "%.0f %s",
           value, unit);
  return text;
}

static const char *format_percent(double fraction, char text[ATTN_FORMAT_SIZE]) {
  if (isfinite(fraction))
    snprintf(text, ATTN_FORMAT_SIZE, "%.0f%%", 100 * fraction);
  else
    snprintf(text, ATTN_FORMAT_SIZE, "-");
  return text;
}

/* Table -----------------------------------------------------------------------------------------
 */

void attn_bench_print_heading(const attn_bench_report *report) {
  const attn_bench_limits *l = &report->limits;
  if (report->device.kind == ATTN_CUDA)
    printf("%s\n", attn_device_description(report->device));
  else
    printf("%s, %d threads, kernels %s\n", attn_cpu_get()->name, attn_get_threads(),
           attn_kernel_path_name(attn_get_kernel_path()));
  printf("limits: bfloat16 %.3g TFLOP/s, float32 %.3g TFLOP/s, copy %.3g GB/s\n\n",
         l->bf16_flops / 1e12, l->f32_flops / 1e12, l->copy_bytes / 1e9);
  printf("%-15s %-8s %6s %-4s %9s %8s %9s %6s %5s %5s\n", "mixer", "pass", "length", "type", "time",
         "tokens/s", "memory", "TFLOP/s", "peak", "copy");
  fflush(stdout);
}

void attn_bench_print_row(const attn_bench_row *r, bool explain) {
  char length[ATTN_FORMAT_SIZE], time[ATTN_FORMAT_SIZE], tokens[ATTN_FORMAT_SIZE],
      memory[ATTN_FORMAT_SIZE], peak[ATTN_FORMAT_SIZE], copy[ATTN_FORMAT_SIZE];
  printf("%-15s %-8s %6s %-4s %9s %8s %9s %7.3f %5s %5s\n", r->c.op->name,
         attn_bench_passes[r->c.pass], format_length(r->c.length, length), short_dtype(r->c.dtype),
         format_time(r->seconds, time), attn_format_count(r->tokens, tokens, sizeof tokens),
         attn_format_bytes(r->extra, memory, sizeof memory), r->flops / r->seconds / 1e12,
         format_percent(r->of_peak, peak), format_percent(r->of_copy, copy));
  if (r->disturbed)
    printf("  %s; %lld executions were disturbed\n",
           r->repeats ? "counted while quiet" : "never quiet: the fastest",
           (long long)r->disturbed);
  if (explain) printf("  plan: %s\n", r->plan);
  fflush(stdout);
}

/* JSON ------------------------------------------------------------------------------------------
 */

static json_t *row_json(const attn_bench_row *r) {
  return json_pack(
      "{s:s, s:s, s:s, s:I, s:I, s:I, s:I, s:I, s:o, s:I, s:I, s:o, s:o, s:o, s:o, s:o, s:o, s:o, "
      "s:o, s:o, s:s}",
      "mixer", r->c.op->name, "pass", attn_bench_passes[r->c.pass], "dtype",
      attn_dtype_name(r->c.dtype), "batch", (json_int_t)r->c.batch, "length",
      (json_int_t)r->c.length, "heads", (json_int_t)r->c.heads, "kv_heads",
      (json_int_t)(r->c.op->recurrent ? r->c.heads : r->c.kv_heads), "dim", (json_int_t)r->c.dim,
      "seconds", attn_json_real(r->seconds), "repeats", (json_int_t)r->repeats, "disturbed",
      (json_int_t)r->disturbed, "tokens_per_second", attn_json_real(r->tokens), "extra_bytes",
      attn_json_real(r->extra), "flop", attn_json_real(r->flops), "bytes", attn_json_real(r->bytes),
      "flop_per_second", attn_json_real(r->flops / r->seconds), "peak_flop_per_second",
      attn_json_real(r->peak), "fraction_of_peak", attn_json_real(r->of_peak), "fraction_of_copy",
      attn_json_real(r->of_copy), "error", attn_json_real(r->error), "plan", r->plan);
}

json_t *attn_bench_json(const attn_bench_report *report) {
  json_t *rows = json_array();
  for (int i = 0; i < report->count; ++i) json_array_append_new(rows, row_json(&report->rows[i]));
  return json_pack("{s:{s:s, s:s, s:s, s:i, s:s, s:o, s:o, s:o}, s:s, s:o, s:i}", "machine",
                   "processor", attn_cpu_get()->name, "device",
                   attn_device_description(report->device), "features", attn_cpu_description(),
                   "threads", attn_get_threads(), "kernels",
                   attn_kernel_path_name(attn_get_kernel_path()), "bfloat16_flop_per_second",
                   attn_json_real(report->limits.bf16_flops), "float32_flop_per_second",
                   attn_json_real(report->limits.f32_flops), "copy_bytes_per_second",
                   attn_json_real(report->limits.copy_bytes), "level",
                   report->layer ? "layer" : "operator", "rows", rows, "skipped", report->skipped);
}

/* Chart -----------------------------------------------------------------------------------------
 */

enum { MOST_SERIES = 16, MOST_POINTS = ATTN_MOST_NUMBERS };
enum { MOST_IN_TERMINAL = 8 }; /* series that Braille dots can tell apart */

typedef struct series {
  const attn_bench_row *first; /* the case that they share but for the length */
  char name[64];
  double x[MOST_POINTS], y[MOST_POINTS];
  int count;
} series;

typedef struct picture {
  series all[MOST_SERIES];
  int count;
  char subtitle[128];
  attn_chart_series lines[MOST_SERIES];
  attn_chart chart;
} picture;

static bool same_series(const attn_bench_row *a, const attn_bench_row *b) {
  return a->c.op == b->c.op && a->c.pass == b->c.pass && a->c.dtype == b->c.dtype;
}

static series *series_of(picture *p, const attn_bench_row *row) {
  for (int i = 0; i < p->count; ++i)
    if (same_series(p->all[i].first, row)) return &p->all[i];
  if (p->count == MOST_SERIES) return NULL;
  p->all[p->count].first = row;
  return &p->all[p->count++];
}

/* A series is named by the mixer, and by pass and dtype where the rows differ in them. */
static void name_series(picture *p, const attn_bench_report *report) {
  bool passes = false, dtypes = false;
  const attn_bench_case *c = &report->rows[0].c;
  for (int i = 1; i < report->count; ++i) {
    passes |= report->rows[i].c.pass != c->pass;
    dtypes |= report->rows[i].c.dtype != c->dtype;
  }
  for (int i = 0; i < p->count; ++i) {
    const attn_bench_case *own = &p->all[i].first->c;
    snprintf(p->all[i].name, sizeof p->all[i].name, "%s%s%s%s%s", own->op->name, passes ? " " : "",
             passes ? attn_bench_passes[own->pass] : "", dtypes ? " " : "",
             dtypes ? short_dtype(own->dtype) : "");
  }
  snprintf(p->subtitle, sizeof p->subtitle, "%s%s%s%sbatch %lld, %lld heads of %lld, %d threads",
           passes ? "" : attn_bench_passes[c->pass], passes ? "" : ", ",
           dtypes ? "" : attn_dtype_name(c->dtype), dtypes ? "" : ", ", (long long)c->batch,
           (long long)c->heads, (long long)c->dim, attn_get_threads());
}

/* NULL when there is nothing to draw or no memory. To be freed by attn_free. */
static picture *draw(const attn_bench_report *report) {
  picture *p = report->count ? attn_alloc_zero(sizeof *p) : NULL;
  if (!p) return NULL;
  for (int i = 0; i < report->count; ++i) {
    series *s = series_of(p, &report->rows[i]);
    if (!s || s->count == MOST_POINTS) continue;
    s->x[s->count] = (double)report->rows[i].c.length;
    s->y[s->count++] = report->rows[i].tokens;
  }
  name_series(p, report);
  for (int i = 0; i < p->count; ++i)
    p->lines[i] = (attn_chart_series){p->all[i].name, p->all[i].x, p->all[i].y, p->all[i].count};
  p->chart = (attn_chart){.title = "Tokens per second against length",
                          .subtitle = p->subtitle,
                          .x_label = "length in tokens",
                          .y_label = "tokens/s",
                          .x_scale = ATTN_LOG2,
                          .y_from_zero = true,
                          .series = p->lines,
                          .series_count = p->count};
  return p;
}

static bool has_lengths(const attn_bench_report *report) {
  for (int i = 1; i < report->count; ++i)
    if (report->rows[i].c.length != report->rows[0].c.length) return true;
  return false;
}

attn_status attn_bench_print_chart(const attn_bench_report *report) {
  const int columns = 80, rows = 22;
  char *text;
  picture *p = has_lengths(report) ? draw(report) : NULL;
  if (!p || p->count > MOST_IN_TERMINAL) {
    attn_free(p);
    return ATTN_OK;
  }
  attn_status status = attn_chart_text(&p->chart, columns, rows, attn_has_colour(stdout), &text);
  attn_free(p);
  ATTN_TRY(status);
  printf("\n%s", text);
  attn_free(text);
  return ATTN_OK;
}

attn_status attn_bench_write_svg(const attn_bench_report *report, const char *path) {
  picture *p = draw(report);
  if (!p) return attn_fail(ATTN_INVALID_ARGUMENT, "there is no row to draw into %s", path);
  char *folder = attn_path_directory(path);
  attn_status status = folder ? attn_make_directories(folder) : ATTN_OUT_OF_MEMORY;
  if (status == ATTN_OK) status = attn_chart_write_svg(&p->chart, 0, 0, path);
  attn_free(folder);
  attn_free(p);
  return status;
}

/* Page ------------------------------------------------------------------------------------------
 */

static void page_row(attn_text *out, const attn_bench_row *r) {
  char length[ATTN_FORMAT_SIZE], time[ATTN_FORMAT_SIZE], tokens[ATTN_FORMAT_SIZE],
      memory[ATTN_FORMAT_SIZE], peak[ATTN_FORMAT_SIZE], copy[ATTN_FORMAT_SIZE];
  attn_text_print(out, "<tr title=\"");
  attn_page_text(out, r->plan);
  attn_text_print(out,
                  "\"><td>%s</td><td>%s</td><td>%s</td><td>%s</td><td>%s</td><td>%s</td><td>%s</td>"
                  "<td>%.3f</td><td>%s</td><td>%s</td><td>%.1e</td></tr>\n",
                  r->c.op->name, attn_bench_passes[r->c.pass], format_length(r->c.length, length),
                  attn_dtype_name(r->c.dtype), format_time(r->seconds, time),
                  attn_format_count(r->tokens, tokens, sizeof tokens),
                  attn_format_bytes(r->extra, memory, sizeof memory), r->flops / r->seconds / 1e12,
                  format_percent(r->of_peak, peak), format_percent(r->of_copy, copy), r->error);
}

static void page(attn_text *out, const attn_bench_report *report, const char *svg) {
  const attn_bench_limits *l = &report->limits;
  attn_page_begin(out, "attn bench");
  attn_text_print(out, "<p>");
  attn_page_text(out, attn_device_description(report->device));
  attn_text_print(out,
                  "; %d threads, kernels %s; libattn %s.<br>Limits measured in this run: bfloat16 "
                  "%.3g TFLOP/s, float32 %.3g TFLOP/s, copy %.3g GB/s.</p>\n<figure>%s</figure>\n"
                  "<table><tr><th>mixer</th><th>pass</th><th>length</th><th>dtype</th>"
                  "<th>time</th><th>tokens/s</th><th>extra memory</th><th>TFLOP/s</th>"
                  "<th>of peak</th><th>of copy</th><th>error</th></tr>\n",
                  attn_get_threads(), attn_kernel_path_name(attn_get_kernel_path()), attn_version(),
                  l->bf16_flops / 1e12, l->f32_flops / 1e12, l->copy_bytes / 1e9, svg);
  for (int i = 0; i < report->count; ++i) page_row(out, &report->rows[i]);
  attn_text_print(out, "</table>\n<p>Time is the median; error is relative to float64.</p>\n");
  attn_page_end(out);
}

attn_status attn_bench_write_html(const attn_bench_report *report, const char *path) {
  picture *p = draw(report);
  if (!p) return attn_fail(ATTN_INVALID_ARGUMENT, "there is no row to write into %s", path);
  attn_text out = {0};
  char *svg = NULL;
  attn_status status = attn_chart_svg(&p->chart, 0, 0, &svg);
  attn_free(p);
  if (status == ATTN_OK) {
    page(&out, report, svg);
    status = attn_page_write(&out, path);
  }
  attn_free(svg);
  return status;
}
