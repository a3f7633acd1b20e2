/* What a GPU allows: the rate of a large matrix product, and of copying memory. */
#include "cli/bench.h"
#include "tensor/device.h"

#include <math.h>

enum { SIZE = 8192, SMALL = 4096, TRIES = 10 };
static const size_t copied_bytes = (size_t)2 << 30;
static const double measured_seconds = 0.002; /* of executions that are timed together */

int64_t attn_bench_gpu_repeats(double seconds) {
  const int64_t most = 1000;
  double repeats = ceil(measured_seconds / fmax(seconds, 1e-9));
  return repeats < 1 ? 1 : repeats > (double)most ? most : (int64_t)repeats;
}

/* On random numbers: zeros multiply faster. */
static attn_status fill(const attn_tensor *x) {
  const int64_t period = 1009; /* rows that differ */
  int64_t size = x->shape[1], rows = size < period ? size : period;
  attn_tensor numbers, part;
  ATTN_TRY(attn_tensor_create(ATTN_F32, 2, (int64_t[]){rows, size}, &numbers));
  uint32_t state = 1;
  for (int64_t i = 0; i < rows * size; ++i) {
    state = state * 1664525u + 1013904223u;
    ((float *)numbers.data)[i] = (float)(state >> 8) / (float)(1 << 23) - 1;
  }
  attn_status status = ATTN_OK;
  for (int64_t first = 0; first < size && status == ATTN_OK; first += rows) {
    int64_t count = size - first < rows ? size - first : rows;
    attn_tensor from;
    status = attn_tensor_slice(x, 0, first, count, &part);
    if (status == ATTN_OK) status = attn_tensor_slice(&numbers, 0, 0, count, &from);
    if (status == ATTN_OK) status = attn_tensor_copy(&from, &part);
  }
  attn_tensor_destroy(&numbers);
  return status;
}

static attn_status multiply(attn_gpu *gpu, const attn_tensor *x, double *flops) {
  attn_cuda_dense *dense;
  ATTN_TRY(attn_gpu_dense(gpu, &dense));
  double size = (double)x[0].shape[0], best = INFINITY;
  for (int i = 0; i <= TRIES; ++i) {
    double start = attn_now();
    for (int j = 0; j < 4; ++j)
      ATTN_TRY(attn_gpu_check(gpu, gpu->cuda->matmul(dense, &x[0], false, &x[1], true, &x[2], false,
                                                     attn_gpu_stream(gpu))));
    ATTN_TRY(attn_device_synchronize(x[0].device));
    if (i > 0) best = fmin(best, (attn_now() - start) / 4); /* the first chooses an algorithm */
  }
  *flops = 2 * size * size * size / best;
  return ATTN_OK;
}

static attn_status measure_products(attn_gpu *gpu, attn_device device, attn_dtype dtype,
                                    int64_t size, double *flops) {
  attn_tensor x[3] = {{0}};
  attn_status status = ATTN_OK;
  for (int i = 0; i < 3 && status == ATTN_OK; ++i)
    status = attn_tensor_create_on(device, dtype, 2, (int64_t[]){size, size}, &x[i]);
  for (int i = 0; i < 2 && status == ATTN_OK; ++i) status = fill(&x[i]);
  if (status == ATTN_OK) status = multiply(gpu, x, flops);
  for (int i = 0; i < 3; ++i) attn_tensor_destroy(&x[i]);
  return status;
}

static attn_status measure_copies(attn_device device, double *bytes) {
  void *from = attn_device_alloc(device, copied_bytes), *to = NULL;
  if (from) to = attn_device_alloc(device, copied_bytes);
  attn_status status = from && to ? ATTN_OK : ATTN_OUT_OF_MEMORY;
  double best = INFINITY;
  for (int i = 0; i <= TRIES && status == ATTN_OK; ++i) {
    double start = attn_now();
    status = attn_device_copy(device, to, from, copied_bytes);
    if (status == ATTN_OK) status = attn_device_synchronize(device);
    if (i > 0) best = fmin(best, attn_now() - start);
  }
  attn_device_free(device, from);
  attn_device_free(device, to);
  *bytes = 2 * (double)copied_bytes / best;
  return status;
}

attn_status attn_bench_measure_gpu(attn_device device, attn_bench_limits *limits) {
  attn_gpu *gpu = attn_gpu_open(device.index);
  if (!gpu) return ATTN_UNSUPPORTED;
  ATTN_TRY(measure_products(gpu, device, ATTN_BF16, SIZE, &limits->bf16_flops));
  ATTN_TRY(measure_products(gpu, device, ATTN_F32, SMALL, &limits->f32_flops));
  return measure_copies(device, &limits->copy_bytes);
}
