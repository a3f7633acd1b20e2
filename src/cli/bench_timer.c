/* Timed executions of one row, and the limits beside it; on a shared machine, if asked, only while
 * the processors are left alone (kernels/quiet.h). */
#include "cli/bench.h"
#include "kernels/peak.h"
#include "kernels/quiet.h"
#include "tasks/cab.h"

#include <math.h>
#include <stdlib.h>

static int ascending(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

/* Waiting for quiet makes a row longer, but not without end. */
static const double patience = 25;

static bool expired(const attn_bench_timer *t) {
  double spent = attn_now() - t->begun;
  int tried = t->count + t->disturbed;
  if (attn_interrupted || tried == ATTN_BENCH_MOST_TIMES) return true;
  if (t->quiet) return tried && (t->busy >= t->seconds || spent >= patience * t->seconds);
  return tried && spent >= t->seconds;
}

/* Filling cold caches takes some tenths of a millisecond: after a move a short execution only warms
 * them, and a long one does not mind. */
static const double long_execution = 0.02;

static bool left_alone(const attn_bench_timer *t) {
  int threads = attn_get_threads();
  return attn_quiet_or_move(threads) || (t->last > long_execution && attn_quiet_now(threads));
}

bool attn_bench_timer_begin(attn_bench_timer *t) {
  if (!t->begun) t->begun = attn_now();
  if (expired(t)) return false;
  t->alone = !t->quiet || left_alone(t);
  t->start = attn_now();
  return true;
}

void attn_bench_timer_end(attn_bench_timer *t) {
  double taken = attn_now() - t->start;
  t->last = taken;
  if (t->quiet && !(t->alone && attn_quiet_now(attn_get_threads()))) {
    if (!t->disturbed++ || taken < t->fastest_disturbed) t->fastest_disturbed = taken;
    return;
  }
  t->busy += taken;
  t->times[t->count++] = taken;
}

attn_status attn_bench_timer_result(attn_bench_timer *t, attn_bench_row *row) {
  int n = t->count;
  if (!n && !t->disturbed) return attn_fail(ATTN_INTERRUPTED, "interrupted");
  qsort(t->times, (size_t)n, sizeof *t->times, ascending);
  row->seconds = !n      ? t->fastest_disturbed
                 : n % 2 ? t->times[n / 2]
                         : (t->times[n / 2 - 1] + t->times[n / 2]) / 2;
  row->middle = n ? attn_middle_mean(t->times, n) : row->seconds;
  row->repeats = n;
  row->disturbed = t->disturbed;
  return ATTN_OK;
}

/* The better of what is known and what a measurement gives that nobody disturbed. */
static double limit(double (*measure)(int threads), bool quiet, double known) {
  const int tries = 20;
  int threads = attn_get_threads();
  if (!quiet) return measure(threads);
  for (int i = 0; i < tries && !attn_interrupted; ++i) {
    bool alone = attn_quiet_or_move(threads);
    double rate = measure(threads);
    known = fmax(known, rate);
    if (alone && attn_quiet_now(threads)) break;
  }
  return known;
}

void attn_bench_measure_rates(attn_bench_limits *limits, bool quiet) {
  limits->bf16_flops = limit(attn_kernels_peak_bf16, quiet, limits->bf16_flops);
  limits->f32_flops = limit(attn_kernels_peak_f32, quiet, limits->f32_flops);
}
