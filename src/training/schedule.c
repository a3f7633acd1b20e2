#include "training/schedule.h"
#include "base/status.h"

#include <math.h>
#include <string.h>

/* Each shape: from the fraction p in [0, 1] of the decay that has passed to [0, 1]. */
static double shape_constant(double p) {
  (void)p;
  return 1;
}

static double shape_cosine(double p) {
  return 0.5 * (1 + cos(3.141592653589793 * p));
}

static double shape_linear(double p) {
  return 1 - p;
}

static double shape_sqrt(double p) {
  return 1 - sqrt(p);
}

static const struct {
  const char *name;
  double (*shape)(double p);
  bool stable; /* decays in the last `decay` steps only */
} kinds[ATTN_SCHEDULE_COUNT] = {
    [ATTN_SCHEDULE_CONSTANT] = {"constant", shape_constant, false},
    [ATTN_SCHEDULE_COSINE] = {"cosine", shape_cosine, false},
    [ATTN_SCHEDULE_WSD_LINEAR] = {"wsd", shape_linear, true},
    [ATTN_SCHEDULE_WSD_SQRT] = {"wsd-sqrt", shape_sqrt, true},
};

const char *attn_schedule_name(attn_schedule_kind kind) {
  return (unsigned)kind < ATTN_SCHEDULE_COUNT ? kinds[kind].name : "unknown";
}

attn_status attn_schedule_parse(const char *name, attn_schedule_kind *kind) {
  for (int i = 0; name && i < ATTN_SCHEDULE_COUNT; ++i)
    if (strcmp(name, kinds[i].name) == 0) {
      *kind = (attn_schedule_kind)i;
      return ATTN_OK;
    }
  return attn_fail(ATTN_INVALID_ARGUMENT,
                   "schedule '%s' is unknown; known: constant, cosine, wsd, wsd-sqrt",
                   name ? name : "(null)");
}

attn_status attn_schedule_check(const attn_schedule *schedule) {
  if ((unsigned)schedule->kind >= ATTN_SCHEDULE_COUNT)
    return attn_fail(ATTN_INVALID_ARGUMENT, "schedule: kind %d is unknown", (int)schedule->kind);
  if (!(schedule->peak > 0 && isfinite(schedule->peak)))
    return attn_fail(ATTN_INVALID_ARGUMENT, "schedule: the learning rate %g is not above 0",
                     schedule->peak);
  if (!(schedule->floor >= 0 && schedule->floor <= 1))
    return attn_fail(ATTN_INVALID_ARGUMENT, "schedule: the floor %g is not in 0 to 1",
                     schedule->floor);
  int64_t decay = kinds[schedule->kind].stable ? schedule->decay : 0;
  if (schedule->total < 1 || schedule->warmup < 0 || decay < 0 ||
      schedule->warmup > schedule->total || decay > schedule->total - schedule->warmup)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "schedule: %lld steps of warm-up and %lld of decay do not fit %lld in all",
                     (long long)schedule->warmup, (long long)decay, (long long)schedule->total);
  return ATTN_OK;
}

double attn_schedule_rate(const attn_schedule *schedule, int64_t step) {
  double t = (double)step + 1, total = (double)schedule->total;
  if (t > total) t = total;
  if (step < schedule->warmup) return schedule->peak * t / (double)schedule->warmup;
  double length =
      kinds[schedule->kind].stable ? (double)schedule->decay : total - (double)schedule->warmup;
  double p = length > 0 ? (t - (total - length)) / length : 0;
  double factor = p > 0 ? kinds[schedule->kind].shape(p) : 1;
  return schedule->peak * (schedule->floor + (1 - schedule->floor) * factor);
}
