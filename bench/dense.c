/* Times the dense products at a transformer's shapes: TFLOP/s for many rows, GB/s of weights for
 * few. Usage: bench_dense [bfloat16|float32|<block type>] [rows outputs inputs [compute dtype]]
 * With a block type (q4_0, q8_0, q4_k, ...): forward only, by weights in such blocks. */
#include "attn/attn.h"
#include "engines/dense/dense.h"
#include "engines/plan.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

enum { REPEATS = 7, MAX_COPIES = 64 };

typedef struct setting {
  attn_dtype dtype;
  int64_t rows, outputs, inputs;
  attn_weight *weight[MAX_COPIES]; /* few rows: rotated, so that they come from memory */
  int copies;
  attn_tensor x, y, dy, dx, dw;
  attn_arena *scratch;
} setting;

static void stop_on(attn_status status) {
  if (status == ATTN_OK) return;
  fprintf(stderr, "%s: %s\n", attn_status_name(status), attn_error_message());
  exit(1);
}

static attn_tensor random_matrix(attn_dtype dtype, int64_t rows, int64_t columns) {
  attn_tensor tensor;
  stop_on(attn_tensor_create(ATTN_F32, 2, (int64_t[]){rows, columns}, &tensor));
  uint32_t state = 1;
  for (int64_t i = 0; i < rows * columns; ++i) {
    state = state * 1664525u + 1013904223u;
    ((float *)tensor.data)[i] = (float)(state >> 8) * 0x1p-23f - 1.0f;
  }
  attn_tensor result;
  stop_on(attn_tensor_create(dtype, 2, (int64_t[]){rows, columns}, &result));
  stop_on(attn_tensor_copy(&tensor, &result));
  attn_tensor_destroy(&tensor);
  return result;
}

static void forward(setting *s, int turn) {
  stop_on(attn_dense_forward(s->weight[turn % s->copies], &s->x, &s->y, false, s->scratch));
}
static void backward_input(setting *s, int turn) {
  stop_on(
      attn_dense_backward_input(s->weight[turn % s->copies], &s->dy, &s->dx, false, s->scratch));
}
static void backward_weight(setting *s, int turn) {
  (void)turn;
  stop_on(attn_dense_backward_weight(&s->dy, &s->x, &s->dw, false, s->scratch));
}

static int compare(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

/* The median time of one call. */
static double time_of(void (*body)(setting *, int), setting *s, int calls) {
  double times[REPEATS];
  for (int i = 0; i < s->copies; ++i) body(s, i);
  for (int r = 0; r < REPEATS; ++r) {
    double start = attn_seconds();
    for (int i = 0; i < calls; ++i) body(s, i);
    times[r] = (attn_seconds() - start) / calls;
  }
  qsort(times, REPEATS, sizeof *times, compare);
  return times[REPEATS / 2];
}

static void measure(attn_dtype dtype, int64_t rows, int64_t outputs, int64_t inputs) {
  setting s = {.dtype = dtype, .rows = rows, .outputs = outputs, .inputs = inputs, .copies = 1};
  int64_t bytes = outputs * inputs * (int64_t)attn_dtype_size(dtype);
  bool few = rows <= ATTN_MATVEC_ROWS;
  if (few) /* more weights than the last-level cache holds */
    while (s.copies < MAX_COPIES && s.copies * bytes < (int64_t)600 << 20) ++s.copies;
  s.x = random_matrix(dtype, rows, inputs);
  s.dy = random_matrix(dtype, rows, outputs);
  s.y = random_matrix(dtype, rows, outputs);
  s.dx = random_matrix(dtype, rows, inputs);
  s.dw = random_matrix(ATTN_F32, outputs, inputs);
  s.scratch = attn_arena_create(0);
  attn_tensor w[MAX_COPIES];
  for (int i = 0; i < s.copies; ++i) {
    w[i] = random_matrix(dtype, outputs, inputs);
    stop_on(attn_weight_create(outputs, inputs, dtype, &s.weight[i]));
    stop_on(attn_weight_set(s.weight[i], &w[i]));
  }
  printf("%-8s rows %6lld  %5lld x %5lld  ", attn_dtype_name(dtype), (long long)rows,
         (long long)outputs, (long long)inputs);
  double flops = 2.0 * (double)rows * (double)outputs * (double)inputs;
  if (few) {
    double seconds = time_of(forward, &s, s.copies);
    printf("%9.1f us  %6.1f GB/s of weights\n", seconds * 1e6, (double)bytes / seconds * 1e-9);
  } else {
    printf("TFLOP/s: forward %6.3f  backward input %6.3f  backward weight %6.3f\n",
           flops / time_of(forward, &s, 1) * 1e-12, flops / time_of(backward_input, &s, 1) * 1e-12,
           flops / time_of(backward_weight, &s, 1) * 1e-12);
  }
  fflush(stdout);
  attn_tensor *all[] = {&s.x, &s.y, &s.dy, &s.dx, &s.dw};
  for (size_t i = 0; i < sizeof all / sizeof *all; ++i) attn_tensor_destroy(all[i]);
  for (int i = 0; i < s.copies; ++i) {
    attn_weight_destroy(s.weight[i]);
    attn_tensor_destroy(&w[i]);
  }
  attn_arena_destroy(s.scratch);
}

/* Any bytes are blocks, but their scales should be ordinary numbers: 0x2c in each byte makes a
 * float16 of 0.065. */
static void *some_blocks(const attn_block_format *format, int64_t outputs, int64_t inputs) {
  size_t bytes = (size_t)(outputs * inputs / format->elements * format->bytes);
  void *blocks = attn_alloc(bytes);
  if (blocks) memset(blocks, 0x2c, bytes);
  return blocks;
}

static void measure_blocks(attn_block_type type, attn_dtype compute, int64_t rows, int64_t outputs,
                           int64_t inputs) {
  const attn_block_format *format = attn_block_get_format(type);
  setting s = {.dtype = compute, .rows = rows, .outputs = outputs, .inputs = inputs, .copies = 1};
  int64_t bytes = outputs * inputs / format->elements * format->bytes;
  bool few = rows <= ATTN_MATVEC_ROWS;
  while (few && s.copies < MAX_COPIES && s.copies * bytes < (int64_t)600 << 20) ++s.copies;
  s.x = random_matrix(compute, rows, inputs);
  s.y = random_matrix(compute, rows, outputs);
  s.scratch = attn_arena_create(0);
  void *w[MAX_COPIES];
  for (int i = 0; i < s.copies; ++i) {
    w[i] = some_blocks(format, outputs, inputs);
    stop_on(attn_weight_create(outputs, inputs, compute, &s.weight[i]));
    stop_on(attn_weight_set_blocks(s.weight[i], (attn_device){0}, type, w[i]));
  }
  double seconds = time_of(forward, &s, s.copies);
  double flops = 2.0 * (double)rows * (double)outputs * (double)inputs;
  printf("%-5s %-8s rows %5lld  %5lld x %5lld  %9.1f us  %6.2f GB/s of weights  %7.1f GFLOP/s\n",
         format->name, attn_dtype_name(compute), (long long)rows, (long long)outputs,
         (long long)inputs, seconds * 1e6, (double)bytes / seconds * 1e-9, flops / seconds * 1e-9);
  attn_tensor_destroy(&s.x);
  attn_tensor_destroy(&s.y);
  for (int i = 0; i < s.copies; ++i) {
    attn_weight_destroy(s.weight[i]);
    attn_free(w[i]);
  }
  attn_arena_destroy(s.scratch);
}

static bool find_block_type(const char *name, attn_block_type *type) {
  for (int t = 0; t < ATTN_BLOCK_TYPES; ++t) {
    const attn_block_format *format = attn_block_get_format((attn_block_type)t);
    *type = (attn_block_type)t;
    if (format && strcasecmp(name, format->name) == 0) return true;
  }
  return false;
}

static int measure_block_type(attn_block_type type, int count, char **arguments) {
  attn_dtype compute = ATTN_BF16;
  if (count > 5) stop_on(attn_dtype_parse(arguments[5], &compute));
  if (count > 4) {
    measure_blocks(type, compute, atoll(arguments[2]), atoll(arguments[3]), atoll(arguments[4]));
    return 0;
  }
  static const int64_t widths[][2] = {{1536, 768}, {4096, 4096}}, rows[] = {1, 4, 8, 64, 512};
  for (size_t r = 0; r < sizeof rows / sizeof *rows; ++r)
    for (size_t i = 0; i < sizeof widths / sizeof *widths; ++i)
      measure_blocks(type, compute, rows[r], widths[i][0], widths[i][1]);
  return 0;
}

int main(int count, char **arguments) {
  attn_dtype dtype = ATTN_BF16;
  attn_block_type type;
  bool blocks = count > 1 && find_block_type(arguments[1], &type);
  if (count > 1 && !blocks) stop_on(attn_dtype_parse(arguments[1], &dtype));
  printf("%s, %d threads, kernels %s\n", attn_cpu_description(), attn_get_threads(),
         attn_kernel_path_name(attn_get_kernel_path()));
  if (blocks) return measure_block_type(type, count, arguments);
  if (count > 4) {
    measure(dtype, atoll(arguments[2]), atoll(arguments[3]), atoll(arguments[4]));
    return 0;
  }
  static const int64_t widths[][2] = {{512, 512}, {1024, 1024}, {2816, 1024}, {1024, 2816}};
  static const int64_t rows[] = {1, 4, 8, 512, 4096, 16384};
  for (size_t r = 0; r < sizeof rows / sizeof *rows; ++r)
    for (size_t i = 0; i < sizeof widths / sizeof *widths; ++i)
      measure(dtype, rows[r], widths[i][0], widths[i][1]);
  return 0;
}
