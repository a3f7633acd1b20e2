/* What the machine can do at most, as far as a program sees it: the rate of multiply-adds on
 * operands that stay in the nearest caches, in bfloat16 and float32, and the rate of a copy that
 * does not fit into any cache. All threads at once; the best of several rounds. */
#include "cli/bench.h"
#include "base/cpu.h"
#include "base/memory.h"
#include "kernels/kernels.h"

#include <math.h>
#include <string.h>
#include <unistd.h>

enum { ROUNDS = 5 };

/* Products whose operands fit into a first-level cache; which one is fastest depends on the tile
 * of the path's kernel. */
typedef struct product {
  int64_t m, n, k;
} product;

static const product products[] = {{32, 32, 256}, {32, 64, 128}, {56, 64, 64}, {96, 48, 64}};
enum { MOST = 96 * 256 }; /* elements of an operand, padding included */

typedef struct operands {
  uint16_t a16[MOST], b16[MOST];
  float a32[MOST], b32[MOST], c[MOST];
} operands;

static void multiply(const attn_kernels *kernels, const product *p, attn_dtype dtype, operands *o) {
  if (dtype == ATTN_BF16)
    kernels->matmul_bf16(p->m, p->n, p->k, o->a16, p->k, o->b16, p->k * ATTN_PANEL, o->c, p->n,
                         false);
  else
    kernels->matmul_f32(p->m, p->n, p->k, o->a32, p->k, o->b32, p->k * ATTN_PANEL, o->c, p->n,
                        false);
}

/* Each thread multiplies for a while and counts; the rates add up. Ends are seldom aligned, so the
 * clock is read by each thread for itself, every few products. */
static double round_rate(const product *p, attn_dtype dtype, operands *all) {
  const double seconds = 0.01;
  const int between_looks = 16;
  const attn_kernels *kernels = attn_kernels_get();
  int threads = attn_get_threads();
  double rate = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : rate)
  for (int thread = 0; thread < threads; ++thread) {
    double start, now;
    int64_t count = 0;
    kernels->begin();
    multiply(kernels, p, dtype, &all[thread]);
    start = attn_now();
    do {
      for (int i = 0; i < between_looks; ++i) multiply(kernels, p, dtype, &all[thread]);
      count += between_looks;
    } while ((now = attn_now()) < start + seconds);
    kernels->end();
    rate += 2.0 * (double)(p->m * p->n * p->k * count) / (now - start);
  }
  return rate;
}

static double product_rate(attn_dtype dtype, operands *all) {
  double best = 0;
  for (int round = 0; round < ROUNDS; ++round)
    for (int i = 0; i < ATTN_COUNT(products); ++i)
      best = fmax(best, round_rate(&products[i], dtype, all));
  return best;
}

/* Twice what the caches hold, for source and target together, if the memory is there. */
static size_t copy_size(void) {
  const size_t least = (size_t)32 << 20;
  size_t wanted = attn_cpu_get()->l3_bytes;
  long pages = sysconf(_SC_AVPHYS_PAGES), page = sysconf(_SC_PAGESIZE);
  size_t most = pages > 0 && page > 0 ? (size_t)pages * (size_t)page / 8 : least;
  if (wanted < 2 * least) wanted = 2 * least;
  return wanted < most ? wanted : most;
}

static double time_copy(char *target, const char *source, size_t size) {
  int threads = attn_get_threads();
  size_t part = size / (size_t)threads;
  double start = attn_now();
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; ++thread)
    memcpy(target + (size_t)thread * part, source + (size_t)thread * part, part);
  return attn_now() - start;
}

static attn_status measure_copy(double *rate) {
  size_t size = copy_size();
  char *source = attn_alloc(size), *target = attn_alloc(size);
  if (source && target) {
    memset(source, 1, size);
    time_copy(target, source, size); /* brings the pages into being */
    for (int round = 0; round < ROUNDS; ++round)
      *rate = fmax(*rate, 2 * (double)size / time_copy(target, source, size));
  }
  bool made = source && target;
  attn_free(source);
  attn_free(target);
  return made ? ATTN_OK : ATTN_OUT_OF_MEMORY;
}

attn_status attn_bench_measure_limits(attn_bench_limits *limits) {
  *limits = (attn_bench_limits){0};
  operands *all = attn_alloc_array((size_t)attn_get_threads(), sizeof *all);
  if (!all) return ATTN_OUT_OF_MEMORY;
  limits->bf16_flops = product_rate(ATTN_BF16, all);
  limits->f32_flops = product_rate(ATTN_F32, all);
  attn_free(all);
  return measure_copy(&limits->copy_bytes);
}
