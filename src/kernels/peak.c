#include "kernels/peak.h"
#include "base/memory.h"
#include "kernels/kernels.h"

#include <omp.h>
#include <string.h>
#include <time.h>

/* A product that the caches never slow down: A 8 KiB, B 8 KiB, C 4 KiB (bfloat16: 4, 4 and 4), with
 * the 2 x 2 tiles of AMX and the widest blocks of the vector units. */
enum { ROWS = 32, COLUMNS = 32, DEPTH = 64, REPEATS = 2000, TRIALS = 12 };

typedef struct operands {
  float a[ROWS * DEPTH], b[COLUMNS * DEPTH], c[ROWS * COLUMNS];
} operands;

static double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void multiply_f32(const attn_kernels *kernels, operands *x) {
  kernels->matmul_f32(ROWS, COLUMNS, DEPTH, x->a, DEPTH, x->b, DEPTH * ATTN_PANEL, x->c, COLUMNS,
                      false);
}

static void multiply_bf16(const attn_kernels *kernels, operands *x) {
  kernels->matmul_bf16(ROWS, COLUMNS, DEPTH, (const uint16_t *)(const void *)x->a, DEPTH,
                       (const uint16_t *)(const void *)x->b, DEPTH * ATTN_PANEL, x->c, COLUMNS,
                       false);
}

/* The best of some trials, in each of which all threads run at once: a peak is what the machine can
 * do, and other programs only take away from it. */
static double peak(int threads, void (*multiply)(const attn_kernels *kernels, operands *x)) {
  const attn_kernels *kernels = attn_kernels_get();
  int repeats = kernels->path == ATTN_PATH_GENERIC ? REPEATS / 20 : REPEATS;
  double best = 1e30;
  for (int trial = 0; trial < TRIALS; ++trial) {
    double slowest = 0;
#pragma omp parallel num_threads(threads) reduction(max : slowest)
    {
      operands x __attribute__((aligned(64)));
      for (int i = 0; i < ROWS * DEPTH; ++i) x.a[i] = x.b[i] = 0.001f * (float)(i % 97);
      kernels->begin();
      multiply(kernels, &x);
#pragma omp barrier
      double start = seconds();
      for (int i = 0; i < repeats; ++i) multiply(kernels, &x);
      slowest = seconds() - start;
      kernels->end();
    }
    best = slowest < best ? slowest : best;
  }
  return 2.0 * ROWS * COLUMNS * DEPTH * repeats * threads / best;
}

double attn_kernels_peak_f32(int threads) {
  return peak(threads, multiply_f32);
}

double attn_kernels_peak_bf16(int threads) {
  return peak(threads, multiply_bf16);
}

double attn_kernels_copy_bandwidth(int threads) {
  const size_t each = (size_t)64 << 20;
  char *source = attn_alloc_zero(each * (size_t)threads), *target = NULL;
  if (source) target = attn_alloc_zero(each * (size_t)threads);
  double best = 1e30;
  for (int trial = 0; target && trial < 4; ++trial) {
    double slowest = 0;
#pragma omp parallel num_threads(threads) reduction(max : slowest)
    {
      size_t start = each * (size_t)omp_get_thread_num();
#pragma omp barrier
      double begin = seconds();
      memcpy(target + start, source + start, each);
      slowest = seconds() - begin;
    }
    best = slowest < best ? slowest : best;
  }
  bool measured = target;
  attn_free(source);
  attn_free(target);
  return measured ? 2.0 * (double)each * threads / best : 0;
}
