/* The fastest of some samples in which the processors were left alone (kernels/quiet.h), and the
 * rate of the multiplications taken in between, in the same moments. */
#ifndef BENCH_SAMPLES_H
#define BENCH_SAMPLES_H

#include "engines/plan.h"
#include "kernels/peak.h"
#include "kernels/quiet.h"

#include <math.h>

/* Usage: while (samples_begin(&s)) { call; samples_end(&s); } */
typedef struct samples {
  int threads, wanted, tries; /* tries: that may still be made */
  int counted;
  bool alone;
  double start, fastest, bf16_rate, f32_rate; /* seconds; flop a second */
} samples;

static inline samples samples_new(int threads, int wanted) {
  return (samples){.threads = threads, .wanted = wanted, .tries = 25 * wanted, .fastest = INFINITY};
}

static inline bool samples_begin(samples *s) {
  if (s->counted >= s->wanted || s->tries-- <= 0) return false;
  s->alone = attn_quiet_or_move(s->threads);
  s->start = attn_seconds();
  return true;
}

static inline void samples_end(samples *s) {
  double seconds = attn_seconds() - s->start;
  if (!s->alone || !attn_quiet_now(s->threads)) return;
  ++s->counted;
  s->fastest = fmin(s->fastest, seconds);
  s->bf16_rate = fmax(s->bf16_rate, attn_kernels_peak_bf16(s->threads));
  s->f32_rate = fmax(s->f32_rate, attn_kernels_peak_f32(s->threads));
}

#endif
