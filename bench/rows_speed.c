/* Elements a second of the row kernels on one core, for rows that stay in the L1 cache.
 *
 *   rows_speed [elements of a row, default 1024]
 *
 * Each figure is the best of several runs, on every kernel path of the machine. */
#include "attn/base.h"
#include "engines/plan.h"
#include "kernels/kernels.h"

#include <stdio.h>
#include <stdlib.h>

enum { LONGEST = 1 << 16, RUNS = 7, OPERANDS = 5 };
static const double run_seconds = 2e-3;

typedef struct operands {
  const attn_kernels *kernels;
  attn_span x[OPERANDS], weight; /* rows of the dtype under test; weight is float32 */
  int64_t n;
} operands;

static void silu_gate(const operands *o) {
  o->kernels->row_gate(ATTN_SILU, o->x[0], o->x[1], o->x[2], o->n);
}
static void silu_gate_backward(const operands *o) {
  o->kernels->row_gate_backward(ATTN_SILU, o->x[0], false, o->x[1], false, o->x[2], o->x[3],
                                o->x[4], o->n);
}
static void gelu(const operands *o) {
  o->kernels->row_activate(ATTN_GELU, o->x[0], o->x[1], o->n);
}
static void softplus(const operands *o) {
  o->kernels->row_activate(ATTN_SOFTPLUS, o->x[0], o->x[1], o->n);
}
static void rms_norm(const operands *o) {
  o->kernels->row_rms_norm(o->x[0], o->x[1], o->weight, o->n, (double)o->n, 1e-6);
}
static void rms_norm_backward(const operands *o) {
  o->kernels->row_rms_norm_backward(o->x[0], false, (attn_span){0}, o->x[1], o->weight, o->x[2],
                                    o->n, (double)o->n, 1);
}
static void layer_norm(const operands *o) {
  double mean;
  o->kernels->row_layer_norm(o->x[0], o->x[1], o->weight, o->weight, o->n, 1e-6, &mean);
}
static void add(const operands *o) {
  o->kernels->row_add(o->x[0], 1, o->x[1], 0.5, o->x[2], o->n);
}
static void multiply_sum(const operands *o) {
  o->kernels->row_multiply_sum(o->x[0], false, &o->x[1], &o->x[3], 2, o->n);
}
static void cross_entropy(const operands *o) {
  if (o->x[0].dtype == ATTN_F32) o->kernels->row_cross_entropy(o->x[0], o->n, 0, 1);
}

static const struct {
  const char *name;
  void (*run)(const operands *);
} rows[] = {{"silu gate", silu_gate},
            {"silu gate backward", silu_gate_backward},
            {"gelu", gelu},
            {"softplus", softplus},
            {"rms_norm", rms_norm},
            {"rms_norm backward", rms_norm_backward},
            {"layer_norm", layer_norm},
            {"row_add", add},
            {"row_multiply_sum (2)", multiply_sum},
            {"cross_entropy", cross_entropy}};

static double elements_per_second(void (*run)(const operands *), const operands *o) {
  double best = 0;
  for (int i = 0; i < RUNS; ++i) {
    double start = attn_seconds(), now;
    int64_t calls = 0;
    do {
      for (int j = 0; j < 16; ++j) run(o);
      calls += 16;
      now = attn_seconds();
    } while (now - start < run_seconds);
    double rate = (double)(calls * o->n) / (now - start);
    best = rate > best ? rate : best;
  }
  return best;
}

static void fill(void *data, attn_dtype dtype, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    float value = (float)(i % 97) / 48.5f - 1;
    if (dtype == ATTN_F32)
      ((float *)data)[i] = value;
    else
      ((uint16_t *)data)[i] = attn_f32_to_bf16(value);
  }
}

int main(int argc, char **argv) {
  int64_t n = argc > 1 ? atoll(argv[1]) : 1024;
  if (n < 1 || n > LONGEST) return 2;
  static float memory[OPERANDS + 1][LONGEST];
  static const attn_dtype dtypes[2] = {ATTN_F32, ATTN_BF16};
  printf("%-22s %-8s  1e9 elements/s: float32, bfloat16 (rows of %lld)\n", "kernel", "path",
         (long long)n);
  for (size_t k = 0; k < sizeof rows / sizeof *rows; ++k)
    for (int path = 0; path < ATTN_PATH_AMX; ++path) {
      if (!attn_kernel_path_available((attn_kernel_path)path)) continue;
      double rate[2];
      for (int d = 0; d < 2; ++d) {
        operands o = {.kernels = attn_kernels_of((attn_kernel_path)path), .n = n};
        for (int i = 0; i < OPERANDS; ++i) {
          o.x[i] = (attn_span){memory[i], dtypes[d]};
          fill(memory[i], dtypes[d], n);
        }
        o.weight = (attn_span){memory[OPERANDS], ATTN_F32};
        fill(memory[OPERANDS], ATTN_F32, n);
        rate[d] = elements_per_second(rows[k].run, &o);
      }
      printf("%-22s %-8s  %6.2f  %6.2f\n", rows[k].name,
             attn_kernel_path_name((attn_kernel_path)path), rate[0] / 1e9, rate[1] / 1e9);
    }
  return 0;
}
