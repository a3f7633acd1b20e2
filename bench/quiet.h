/* Timing on a machine that others share. A core whose other hardware thread works for somebody else
 * multiplies tiles at a third of its rate, and which cores are left alone changes from second to
 * second. So: threads go to the processors that are quietest, a sample counts when they were quiet
 * before and after it, and the rate of the multiplications is taken in between, in the same
 * moments.
 *
 * Quiet is a chain of additions at nearly the best rate seen: it halves when a core is shared. */
#ifndef BENCH_QUIET_H
#define BENCH_QUIET_H

#include "engines/plan.h"
#include "kernels/peak.h"

#include <math.h>
#include <omp.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

enum { QUIET_PROCESSORS = 1024, QUIET_ADDITIONS = 60000 };

static double quiet_best; /* additions a second */

static double quiet_rate(void) {
  double best = 0;
  for (int trial = 0; trial < 2; ++trial) {
    uint64_t x = 1;
    double start = attn_seconds();
    for (int i = 0; i < QUIET_ADDITIONS / 20; ++i)
#if defined(__x86_64__)
      __asm__ volatile(".rept 20\n\tadd $1, %0\n\t.endr" : "+r"(x));
#else
      for (int j = 0; j < 20; ++j) __asm__ volatile("" : "+r"(x) : "0"(x + 1));
#endif
    best = fmax(best, QUIET_ADDITIONS / (attn_seconds() - start));
  }
  return best;
}

static bool quiet_now(int threads) {
  double slowest = INFINITY;
#pragma omp parallel num_threads(threads) reduction(min : slowest)
  {
#pragma omp barrier
    slowest = quiet_rate();
  }
  quiet_best = fmax(quiet_best, slowest);
  return slowest > 0.85 * quiet_best;
}

static bool quiet_pin(int processor) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(processor, &set);
  return sched_setaffinity(0, sizeof set, &set) == 0;
}

/* The processors that this program may use; asked for once, before any pinning. */
static int quiet_allowed(int processors[QUIET_PROCESSORS]) {
  static int count, list[QUIET_PROCESSORS];
  cpu_set_t set;
  if (!count && sched_getaffinity(0, sizeof set, &set) == 0)
    for (int i = 0; i < CPU_SETSIZE && count < QUIET_PROCESSORS; ++i)
      if (CPU_ISSET(i, &set)) list[count++] = i;
  for (int i = 0; i < count; ++i) processors[i] = list[i];
  return count;
}

/* Moves the threads to the quietest processors. */
static void quiet_move(int threads) {
  int processors[QUIET_PROCESSORS], count = quiet_allowed(processors);
  double rates[QUIET_PROCESSORS];
  if (count < threads) return;
  for (int i = 0; i < count; ++i) {
    quiet_pin(processors[i]);
    rates[i] = quiet_rate();
    quiet_best = fmax(quiet_best, rates[i]);
  }
  for (int t = 0; t < threads; ++t) /* the best `threads` of them to the front */
    for (int i = t + 1; i < count; ++i)
      if (rates[i] > rates[t]) {
        double rate = rates[i];
        int processor = processors[i];
        rates[i] = rates[t], processors[i] = processors[t];
        rates[t] = rate, processors[t] = processor;
      }
#pragma omp parallel num_threads(threads)
  quiet_pin(processors[omp_get_thread_num()]);
}

/* Samples of a call. Usage: while (quiet_begin(&s)) { call; quiet_end(&s); } */
typedef struct quiet_samples {
  int threads, wanted, tries; /* tries: that may still be made */
  int counted;
  double start, fastest, bf16_rate, f32_rate; /* seconds; flop a second */
} quiet_samples;

static quiet_samples quiet_new(int threads, int wanted) {
  return (quiet_samples){
      .threads = threads, .wanted = wanted, .tries = 25 * wanted, .fastest = INFINITY};
}

static bool quiet_begin(quiet_samples *s) {
  if (s->counted >= s->wanted || s->tries-- <= 0) return false;
  if (!quiet_now(s->threads)) quiet_move(s->threads);
  s->start = attn_seconds();
  return true;
}

static void quiet_end(quiet_samples *s) {
  double seconds = attn_seconds() - s->start;
  if (!quiet_now(s->threads)) return;
  ++s->counted;
  s->fastest = fmin(s->fastest, seconds);
  s->bf16_rate = fmax(s->bf16_rate, attn_kernels_peak_bf16(s->threads));
  s->f32_rate = fmax(s->f32_rate, attn_kernels_peak_f32(s->threads));
}

#endif
