/* What attn compare found, as a table and as a page. */
#include "cli/compare.h"
#include "base/memory.h"
#include "base/progress.h"
#include "cli/page.h"
#include "files/chart.h"

#include <math.h>

/* What was compared -----------------------------------------------------------------------------
 */

static void describe(const attn_comparison *c, attn_text *out) {
  const attn_comparison_options *o = &c->options;
  const attn_task_options *t = &o->task_options;
  char chance[ATTN_FORMAT_SIZE];
  attn_text_print(out, "%s: ", c->task->name);
  if (t->pairs) attn_text_print(out, "%lld pairs, ", (long long)t->pairs);
  attn_text_print(out,
                  "%lld tokens, a vocabulary of %lld. Models of %lld layers, width %lld, heads: "
                  "%lld. Trained for %lld steps of %lld examples in %s; seeds: %lld, from %llu on. "
                  "Tested on %lld others; a guess is right in %s.",
                  (long long)t->length, (long long)t->vocabulary, (long long)o->layers,
                  (long long)o->width, (long long)o->heads, (long long)o->training.steps,
                  (long long)o->training.batch, attn_dtype_name(o->training.compute),
                  (long long)o->seeds, (unsigned long long)o->training.seed,
                  (long long)o->test_examples, attn_compare_percent(c->task->chance(t), chance));
}

/* Rows ------------------------------------------------------------------------------------------
 */

const char *attn_compare_percent(double share, char text[ATTN_FORMAT_SIZE]) {
  if (isfinite(share))
    snprintf(text, ATTN_FORMAT_SIZE, "%.2f %%", 100 * share);
  else
    snprintf(text, ATTN_FORMAT_SIZE, "-");
  return text;
}

static void format_count(double count, char text[ATTN_FORMAT_SIZE]) {
  if (isfinite(count) && count > 0)
    attn_format_count(count, text, ATTN_FORMAT_SIZE);
  else
    snprintf(text, ATTN_FORMAT_SIZE, "-");
}

static void format_bytes(double bytes, char text[ATTN_FORMAT_SIZE]) {
  if (isfinite(bytes) && bytes > 0)
    attn_format_bytes(bytes, text, ATTN_FORMAT_SIZE);
  else
    snprintf(text, ATTN_FORMAT_SIZE, "-");
}

/* Each column shows one thing of a row. */
static void show_mixer(const attn_comparison_row *r, char *text) {
  snprintf(text, ATTN_FORMAT_SIZE, "%s", r->model->mixer);
}
static void show_accuracy(const attn_comparison_row *r, char *text) {
  attn_compare_percent(r->accuracy, text);
}
static void show_range(const attn_comparison_row *r, char *text) {
  snprintf(text, ATTN_FORMAT_SIZE, r->finished ? "%.2f..%.2f" : "-", 100 * r->least, 100 * r->most);
}
static void show_deviation(const attn_comparison_row *r, char *text) {
  attn_compare_percent(r->deviation, text);
}
static void show_parameters(const attn_comparison_row *r, char *text) {
  format_count((double)r->model->parameters, text);
}
static void show_state(const attn_comparison_row *r, char *text) {
  format_bytes((double)r->state_bytes, text);
}
static void show_rate(const attn_comparison_row *r, char *text) {
  snprintf(text, ATTN_FORMAT_SIZE, r->finished ? "%.4g" : "-", r->learning_rate);
}
static void show_training(const attn_comparison_row *r, char *text) {
  format_count(r->training_speed, text);
}
static void show_decoding(const attn_comparison_row *r, char *text) {
  format_count(r->decode_speed, text);
}
static void show_memory(const attn_comparison_row *r, char *text) {
  format_bytes(r->peak_bytes, text);
}

static const struct {
  const char *name, *title; /* in the table, on the page */
  int width;                /* negative: to the left */
  void (*show)(const attn_comparison_row *row, char text[ATTN_FORMAT_SIZE]);
} columns[] = {
    {"mixer", "mixer", -16, show_mixer},
    {"accuracy", "accuracy", 9, show_accuracy},
    {"range", "least to most", 14, show_range},
    {"spread", "deviation", 8, show_deviation},
    {"weights", "parameters", 8, show_parameters},
    {"state", "state", 9, show_state},
    {"rate", "learning rate", 8, show_rate},
    {"train/s", "training tokens/s", 8, show_training},
    {"decode/s", "decoded tokens/s", 9, show_decoding},
    {"memory", "memory of training", 9, show_memory},
};
enum { COLUMNS = sizeof columns / sizeof *columns };

void attn_compare_print(const attn_comparison *c, const attn_comparison_row *rows) {
  char cell[ATTN_FORMAT_SIZE];
  attn_text about = {0}, lines = {0};
  describe(c, &about);
  if (!about.failed) attn_text_wrap(&lines, about.data, 0, 0);
  if (!lines.failed && lines.length) printf("%s\n", lines.data);
  for (int i = 0; i < COLUMNS; ++i) printf("%*s", columns[i].width, columns[i].name);
  for (int r = 0; r < c->model_count; ++r) {
    putchar('\n');
    for (int i = 0; i < COLUMNS; ++i) {
      columns[i].show(&rows[r], cell);
      printf("%*s", columns[i].width, cell);
    }
    if (rows[r].problem) printf("\n  failed: %s", rows[r].problem);
  }
  putchar('\n');
  attn_text_free(&about);
  attn_text_free(&lines);
}

/* Page ------------------------------------------------------------------------------------------
 */

/* A series for each mixer that has an outcome, of one point. */
typedef struct picture {
  attn_chart chart;
  attn_chart_series *series;
  attn_chart_spread *spread;
  double (*numbers)[4]; /* state, and in percent the accuracy, the least, the most */
} picture;

static void free_picture(picture *p) {
  attn_free(p->series);
  attn_free(p->spread);
  attn_free(p->numbers);
}

static attn_status draw(const attn_comparison *c, const attn_comparison_row *rows, picture *p) {
  size_t count = (size_t)c->model_count;
  *p = (picture){.series = attn_alloc_array(count, sizeof *p->series),
                 .spread = attn_alloc_array(count, sizeof *p->spread),
                 .numbers = attn_alloc_array(count, sizeof *p->numbers)};
  if (!p->series || !p->spread || !p->numbers) return ATTN_OUT_OF_MEMORY;
  int drawn = 0;
  for (; drawn < c->model_count && rows[drawn].finished; ++drawn) {
    const attn_comparison_row *r = &rows[drawn];
    double *n = p->numbers[drawn];
    n[0] = (double)r->state_bytes, n[1] = 100 * r->accuracy;
    n[2] = 100 * r->least, n[3] = 100 * r->most;
    p->series[drawn] = (attn_chart_series){r->model->mixer, &n[0], &n[1], 1};
    p->spread[drawn] = (attn_chart_spread){&n[2], &n[3]};
  }
  p->chart = (attn_chart){.title = "Accuracy against the size of the state",
                          .subtitle = c->options.seeds > 1 ? "bars: from the least to the most "
                                                             "accurate seed"
                                                           : NULL,
                          .x_label = "bytes of state behind an example, all layers",
                          .y_label = "right answers, %",
                          .x_scale = ATTN_LOG2,
                          .y_from_zero = true,
                          .scatter = true,
                          .series = p->series,
                          .spread = p->spread,
                          .series_count = drawn};
  return ATTN_OK;
}

static void add_table(attn_text *out, const attn_comparison *c, const attn_comparison_row *rows) {
  char cell[ATTN_FORMAT_SIZE];
  attn_text_print(out, "<table><tr>");
  for (int i = 0; i < COLUMNS; ++i) attn_text_print(out, "<th>%s</th>", columns[i].title);
  attn_text_print(out, "</tr>\n");
  for (int r = 0; r < c->model_count; ++r) {
    attn_text_print(out, "<tr>");
    for (int i = 0; i < COLUMNS; ++i) {
      columns[i].show(&rows[r], cell);
      attn_text_print(out, "<td>%s</td>", cell);
    }
    attn_text_print(out, "</tr>\n");
  }
  attn_text_print(out, "</table>\n");
  for (int r = 0; r < c->model_count; ++r) {
    if (!rows[r].problem) continue;
    attn_text_print(out, "<p>%s failed: ", rows[r].model->mixer);
    attn_page_text(out, rows[r].problem);
    attn_text_print(out, "</p>\n");
  }
}

static const char *const stages[] = {"waiting", "finished", "failed"};

static void add_runs(attn_text *out, const attn_comparison *c) {
  char accuracy[ATTN_FORMAT_SIZE];
  attn_text_print(out, "<details><summary>All runs</summary>\n<table><tr><th>mixer</th>"
                       "<th>outcome</th><th>seed</th><th>learning rate</th><th>loss</th>"
                       "<th>validation loss</th><th>accuracy</th></tr>\n");
  for (int i = 0; i < c->run_count; ++i) {
    const attn_comparison_run *run = &c->runs[i];
    bool finished = run->stage == ATTN_RUN_FINISHED;
    attn_text_print(out, "<tr><td>%s</td><td>%s</td><td>%llu</td><td>%.4g</td>",
                    c->models[run->model].mixer, stages[run->stage], (unsigned long long)run->seed,
                    run->learning_rate);
    if (finished)
      attn_text_print(out, "<td>%.4f</td><td>%.4f</td><td>%s</td></tr>\n", run->loss,
                      run->validation_loss, attn_compare_percent(run->accuracy, accuracy));
    else
      attn_text_print(out, "<td></td><td></td><td></td></tr>\n");
  }
  attn_text_print(out, "</table></details>\n");
}

static void add_notes(attn_text *out, const attn_comparison *c) {
  attn_text_print(out,
                  "<p>Accuracy: the mean over the seeds, at the learning rate with the lowest "
                  "validation loss. All models have the same number of parameters, within 2 %%: "
                  "those whose mixer has fewer have a wider feed-forward. State: what decoding "
                  "keeps behind an example of %lld tokens, in all layers. Memory: of the "
                  "processor. Computed on: ",
                  (long long)c->options.task_options.length);
  attn_page_text(out, attn_device_description(c->options.training.device));
  attn_text_print(out, "; libattn %s.</p>\n", attn_version());
}

attn_status attn_compare_write_html(const attn_comparison *c, const attn_comparison_row *rows,
                                    const char *path) {
  attn_text out = {0}, about = {0};
  picture p;
  char *svg = NULL;
  attn_status status = draw(c, rows, &p);
  /* Without any outcome there is no chart, but still a page that says why. */
  if (status == ATTN_OK && p.chart.series_count) status = attn_chart_svg(&p.chart, 0, 0, &svg);
  free_picture(&p);
  if (status != ATTN_OK) return status;
  describe(c, &about);
  attn_page_begin(&out, "attn compare");
  attn_text_print(&out, "<p>");
  attn_page_text(&out, about.failed ? "" : about.data);
  attn_text_print(&out, "</p>\n<figure>%s</figure>\n", svg ? svg : "");
  add_table(&out, c, rows);
  add_notes(&out, c);
  add_runs(&out, c);
  attn_page_end(&out);
  status = attn_page_write(&out, path);
  attn_text_free(&about);
  attn_free(svg);
  return status;
}
