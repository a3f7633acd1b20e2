#include "support/test.h"

#include "base/random.h"

#include <math.h>

void test_fill_normal(double *x, int64_t count, double mean, double deviation, uint64_t seed) {
  attn_random random = {.seed = seed};
  for (int64_t i = 0; i < count; ++i) x[i] = mean + deviation * attn_random_normal(&random);
}

double test_relative_error(const double *a, const double *b, int64_t count) {
  double difference = 0, norm = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (!isfinite(a[i])) return INFINITY;
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  return difference == 0 ? 0 : sqrt(difference / norm);
}

attn_device test_device(void) {
  const char *name = getenv("ATTN_TEST_DEVICE");
  attn_device device = {0};
  if (name) assert_ok(attn_device_parse(name, &device));
  return device;
}

double *test_to_doubles(const attn_tensor *tensor) {
  int64_t count = attn_tensor_count(tensor);
  double *x = malloc((size_t)(count ? count : 1) * sizeof *x);
  attn_tensor contiguous;
  assert_non_null(x);
  assert_ok(attn_tensor_wrap(x, ATTN_F64, tensor->rank, tensor->shape, &contiguous));
  assert_ok(attn_tensor_copy(tensor, &contiguous));
  return x;
}

attn_tensor test_from_doubles(const double *x, attn_dtype dtype, int rank, const int64_t *shape) {
  attn_tensor tensor, source;
  assert_ok(attn_tensor_create_on(test_device(), dtype, rank, shape, &tensor));
  assert_ok(attn_tensor_wrap((void *)(uintptr_t)x, ATTN_F64, rank, shape, &source));
  assert_ok(attn_tensor_copy(&source, &tensor));
  return tensor;
}

void test_on_every_path(void (*body)(void *context), void *context) {
  if (test_device().kind != ATTN_CPU) { /* it has one path */
    print_message("  %s\n", attn_device_description(test_device()));
    body(context);
    return;
  }
  attn_kernel_path before = attn_get_kernel_path();
  for (int path = 0; path < ATTN_PATH_COUNT; ++path) {
    if (!attn_kernel_path_available((attn_kernel_path)path)) continue;
    assert_ok(attn_set_kernel_path((attn_kernel_path)path));
    print_message("  path %s\n", attn_kernel_path_name((attn_kernel_path)path));
    body(context);
  }
  assert_ok(attn_set_kernel_path(before));
}
