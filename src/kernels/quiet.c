#include "kernels/quiet.h"

#include <math.h>
#include <omp.h>
#include <sched.h>
#include <stdint.h>

enum { MOST_PROCESSORS = 1024, ADDITIONS = 60000, UNROLLED = 20 };
static const double nearly = 0.85;

static double best_rate; /* additions a second */

static double rate_now(void) {
  double best = 0;
  for (int trial = 0; trial < 2; ++trial) {
    uint64_t x = 1;
    double start = omp_get_wtime();
    for (int i = 0; i < ADDITIONS / UNROLLED; ++i)
#if defined(__x86_64__)
      __asm__ volatile(".rept %c1\n\tadd $1, %0\n\t.endr" : "+r"(x) : "i"(UNROLLED));
#else
      for (int j = 0; j < UNROLLED; ++j) __asm__ volatile("" : "=r"(x) : "0"(x + 1));
#endif
    best = fmax(best, ADDITIONS / (omp_get_wtime() - start));
  }
  return best;
}

bool attn_quiet_now(int threads) {
  double slowest = INFINITY;
#pragma omp parallel num_threads(threads) reduction(min : slowest)
  {
#pragma omp barrier
    slowest = rate_now();
  }
  best_rate = fmax(best_rate, slowest);
  return slowest > nearly * best_rate;
}

#if defined(__linux__)
static bool run_on(int processor) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(processor, &set);
  return sched_setaffinity(0, sizeof set, &set) == 0;
}

/* The processors that this program may use; asked for once, before any thread is bound. */
static int allowed(int processors[MOST_PROCESSORS]) {
  static int count, list[MOST_PROCESSORS];
  cpu_set_t set;
  if (!count && sched_getaffinity(0, sizeof set, &set) == 0)
    for (int i = 0; i < CPU_SETSIZE && count < MOST_PROCESSORS; ++i)
      if (CPU_ISSET(i, &set)) list[count++] = i;
  for (int i = 0; i < count; ++i) processors[i] = list[i];
  return count;
}

void attn_quiet_move(int threads) {
  int processors[MOST_PROCESSORS], count = allowed(processors);
  double rates[MOST_PROCESSORS];
  if (count < threads) return;
  for (int i = 0; i < count; ++i) {
    run_on(processors[i]);
    rates[i] = rate_now();
    best_rate = fmax(best_rate, rates[i]);
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
  run_on(processors[omp_get_thread_num()]);
}
#else
void attn_quiet_move(int threads) {
  (void)threads;
}
#endif

bool attn_quiet_or_move(int threads) {
  bool quiet = attn_quiet_now(threads);
  if (!quiet) attn_quiet_move(threads);
  return quiet;
}
