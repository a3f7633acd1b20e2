#include "kernels/peak.h"
#include "base/memory.h"
#include "kernels/kernels.h"

#include <omp.h>
#include <string.h>
#include <time.h>

/* Products that the caches never slow down, with the 2 x 2 tiles of AMX and the widest blocks of
 * the vector units. The bfloat16 one is so deep (128 TDPBF16PS for 4 tile stores) that what is left
 * is the rate of the multiplications with their loads from the first-level cache: the rows of A
 * overlap (each starts 32 elements after the one above), and so do the panels of B, or they would
 * not fit there. */
enum { ROWS = 32, COLUMNS = 32, DEPTH = 64, REPEATS = 2000, TRIALS = 12 };
enum { DEEP = 1024, NEXT_ROW = 32, NEXT_PANEL = ATTN_BF16_DEPTH * ATTN_PANEL };

typedef union operands {
  struct {
    float a[ROWS * DEPTH], b[COLUMNS * DEPTH], c[ROWS * COLUMNS];
  } f32;
  struct {
    uint16_t a[DEEP + (ROWS - 1) * NEXT_ROW], b[DEEP * ATTN_PANEL + NEXT_PANEL];
    float c[ROWS * COLUMNS];
  } bf16;
  uint16_t all[DEEP * (ATTN_PANEL + 1) + (ROWS - 1) * NEXT_ROW + NEXT_PANEL];
} operands;

static double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void multiply_f32(const attn_kernels *kernels, operands *x) {
  kernels->matmul_f32(ROWS, COLUMNS, DEPTH, x->f32.a, DEPTH, x->f32.b, DEPTH * ATTN_PANEL, x->f32.c,
                      COLUMNS, false);
}

static void multiply_bf16(const attn_kernels *kernels, operands *x) {
  kernels->matmul_bf16(ROWS, COLUMNS, DEEP, x->bf16.a, NEXT_ROW, x->bf16.b, NEXT_PANEL, x->bf16.c,
                       COLUMNS, false);
}

/* The best of some trials, in each of which all threads run at once: a peak is what the machine can
 * do, and other programs only take away from it. */
static double peak(int threads, int depth,
                   void (*multiply)(const attn_kernels *kernels, operands *x)) {
  const attn_kernels *kernels = attn_kernels_get();
  int repeats = REPEATS * DEPTH / depth;
  if (kernels->path == ATTN_PATH_GENERIC) repeats /= 20;
  double best = 1e30;
  for (int trial = 0; trial < TRIALS; ++trial) {
    double slowest = 0;
#pragma omp parallel num_threads(threads) reduction(max : slowest)
    {
      operands x __attribute__((aligned(64)));
      memset(&x, 0, sizeof x); /* then numbers near 2^-7, read either way */
      const int count = (int)(sizeof x.all / sizeof *x.all);
      for (int i = 0; i < count; ++i) x.all[i] = (uint16_t)(0x3c00 + i % 97);
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
  return 2.0 * ROWS * COLUMNS * depth * repeats * threads / best;
}

double attn_kernels_peak_f32(int threads) {
  return peak(threads, DEPTH, multiply_f32);
}

double attn_kernels_peak_bf16(int threads) {
  return peak(threads, DEEP, multiply_bf16);
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
