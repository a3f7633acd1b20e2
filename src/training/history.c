/* smoothed_n = sum_i a^(n - i) loss_i / sum_i a^(n - i), over the steps i <= n that have a loss. */
#include "training/history.h"
#include "base/memory.h"
#include "base/status.h"
#include "files/chart.h"

#include <math.h>

static const double fade = 0.98;        /* a: a memory of about 50 steps */
enum { MOST_POINTS = 500, CURVES = 3 }; /* of one curve in the picture; of the table */

attn_status attn_history_create(int64_t most_steps, int64_t most_validations,
                                attn_history *history) {
  *history = (attn_history){.most_steps = most_steps, .most_validations = most_validations};
  history->loss = attn_alloc_array((size_t)most_steps, sizeof *history->loss);
  history->validation = attn_alloc_array((size_t)most_validations, 2 * sizeof *history->validation);
  if (history->loss && history->validation) return ATTN_OK;
  attn_history_free(history);
  return ATTN_OUT_OF_MEMORY;
}

void attn_history_free(attn_history *history) {
  attn_free(history->loss);
  attn_free(history->validation);
  *history = (attn_history){0};
}

void attn_history_add(attn_history *history, double loss) {
  if (history->steps < history->most_steps) history->loss[history->steps++] = loss;
}

void attn_history_add_validation(attn_history *history, int64_t step, double loss) {
  int64_t last = history->validations - 1;
  bool again = last >= 0 && history->validation[2 * last] == (double)step;
  int64_t place = again ? last : history->validations;
  if (place >= history->most_validations) return;
  history->validation[2 * place] = (double)step;
  history->validation[2 * place + 1] = loss;
  history->validations = place + 1;
}

/* Sum and weight of the faded mean after one more loss. */
typedef struct mean {
  double sum, weight;
} mean;

static double advance(mean *m, double loss) {
  if (isfinite(loss)) {
    m->sum = fade * m->sum + loss;
    m->weight = fade * m->weight + 1;
  }
  return m->weight > 0 ? m->sum / m->weight : NAN;
}

void attn_history_smooth(const attn_history *history, double *smoothed) {
  mean m = {0};
  for (int64_t i = 0; i < history->steps; ++i) smoothed[i] = advance(&m, history->loss[i]);
}

double attn_history_smoothed(const attn_history *history) {
  /* Older losses weigh less than one rounding: 0.98^2000 < 2^-53. */
  const int64_t memory = 2000;
  double last = NAN;
  mean m = {0};
  int64_t first = history->steps > memory ? history->steps - memory : 0;
  for (int64_t i = first; i < history->steps; ++i) last = advance(&m, history->loss[i]);
  return last;
}

double attn_history_best(const attn_history *history) {
  double best = NAN;
  for (int64_t i = 0; i < history->validations; ++i)
    best = fmin(best, history->validation[2 * i + 1]);
  return best;
}

/* The curves as arrays, in one block of memory. */
typedef struct curves {
  double *block;
  attn_chart_series series[CURVES];
} curves;

enum { SMOOTHED, VALIDATION, RAW };

static attn_status make_curves(const attn_history *h, curves *c) {
  int64_t steps = h->steps, validations = h->validations;
  c->block = attn_alloc_array((size_t)(2 * steps + 2 * validations + 1), sizeof *c->block);
  if (!c->block) return ATTN_OUT_OF_MEMORY;
  double *x = c->block, *smoothed = x + steps, *when = smoothed + steps, *loss = when + validations;
  for (int64_t i = 0; i < steps; ++i) x[i] = (double)(i + 1);
  attn_history_smooth(h, smoothed);
  for (int64_t i = 0; i < validations; ++i) {
    when[i] = h->validation[2 * i];
    loss[i] = h->validation[2 * i + 1];
  }
  c->series[SMOOTHED] = (attn_chart_series){"training, smoothed", x, smoothed, steps};
  c->series[VALIDATION] = (attn_chart_series){"validation", when, loss, validations};
  c->series[RAW] = (attn_chart_series){"training", x, h->loss, steps};
  return ATTN_OK;
}

/* Keeps every n-th point and the last one, in place. */
static void thin(attn_chart_series *series) {
  double *x = (double *)(uintptr_t)series->x, *y = (double *)(uintptr_t)series->y;
  int64_t every = (series->count + MOST_POINTS - 1) / MOST_POINTS, kept = 0;
  for (int64_t i = 0; every > 1 && i < series->count; ++i) {
    if (i % every != every - 1 && i != series->count - 1) continue;
    x[kept] = x[i];
    y[kept++] = y[i];
  }
  if (every > 1) series->count = kept;
}

static attn_chart chart_of(const curves *c, int count) {
  return (attn_chart){.title = "Training",
                      .x_label = "step",
                      .y_label = "loss (nats per byte)",
                      .series = c->series,
                      .series_count = count};
}

attn_status attn_history_write_svg(const attn_history *history, const char *path) {
  curves c;
  ATTN_TRY(make_curves(history, &c));
  thin(&c.series[SMOOTHED]);
  thin(&c.series[VALIDATION]);
  attn_chart chart = chart_of(&c, VALIDATION + 1);
  attn_status status = attn_chart_write_svg(&chart, 0, 0, path);
  attn_free(c.block);
  return status;
}

attn_status attn_history_write_csv(const attn_history *history, const char *path) {
  curves c;
  ATTN_TRY(make_curves(history, &c));
  attn_chart chart = chart_of(&c, CURVES);
  attn_status status = attn_chart_write_csv(&chart, path);
  attn_free(c.block);
  return status;
}
