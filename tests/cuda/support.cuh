/* What the tests of the CUDA module's rows, products and blocks share: tensors of any strides on
 * the GPU with their values on the host, comparisons, timing. */
#ifndef ATTN_TESTS_CUDA_SUPPORT_CUH
#define ATTN_TESTS_CUDA_SUPPORT_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "kernels/cuda/common.cuh"

static int failures, checks;

#define CUDA(call)                                                                                 \
  do {                                                                                             \
    cudaError_t cuda_error = (call);                                                               \
    if (cuda_error != cudaSuccess) {                                                               \
      printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(cuda_error));        \
      exit(1);                                                                                     \
    }                                                                                              \
  } while (0)
#define OK(call)                                                                                   \
  do {                                                                                             \
    if ((call) != ATTN_OK) {                                                                       \
      printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, attn_cuda_error());                     \
      exit(1);                                                                                     \
    }                                                                                              \
  } while (0)

/* --- Random numbers (SplitMix64) ---------------------------------------------------------------
 */

static uint64_t random_state = 1;

static inline uint64_t random_bits() {
  uint64_t z = random_state += 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}
static inline double uniform() {
  return (double)(random_bits() >> 11) * 0x1p-53;
}
static inline int below(int n) {
  return (int)(random_bits() % (uint64_t)n);
}
static inline double normal() {
  return sqrt(-2 * log(1 - uniform())) * cos(6.283185307179586 * uniform());
}

/* --- Elements -----------------------------------------------------------------------------------
 */

static inline int bytes_of(attn_dtype dtype) {
  return dtype == ATTN_F64 ? 8 : dtype == ATTN_F32 ? 4 : 2;
}
static inline const char *dtype_name(attn_dtype dtype) {
  return dtype == ATTN_F64    ? "f64"
         : dtype == ATTN_F32  ? "f32"
         : dtype == ATTN_BF16 ? "bf16"
                              : "f16";
}

static inline void write_element(void *place, attn_dtype dtype, double value) {
  if (dtype == ATTN_F64) {
    memcpy(place, &value, 8);
  } else if (dtype == ATTN_F32) {
    float f = (float)value;
    memcpy(place, &f, 4);
  } else if (dtype == ATTN_BF16) {
    __nv_bfloat16 b = __float2bfloat16((float)value);
    memcpy(place, &b, 2);
  } else {
    __half h = __float2half((float)value);
    memcpy(place, &h, 2);
  }
}
static inline double read_element(const void *place, attn_dtype dtype) {
  if (dtype == ATTN_F64) {
    double value;
    memcpy(&value, place, 8);
    return value;
  }
  if (dtype == ATTN_F32) {
    float f;
    memcpy(&f, place, 4);
    return f;
  }
  if (dtype == ATTN_BF16) {
    __nv_bfloat16 b;
    memcpy(&b, place, 2);
    return __bfloat162float(b);
  }
  __half h;
  memcpy(&h, place, 2);
  return __half2float(h);
}

/* --- Tensors ------------------------------------------------------------------------------------
 */

/* A tensor on the GPU; `values` are its elements in row-major order as they were written. Memory
 * that is no element is poisoned, and must still be when the tensor is read. */
struct array {
  attn_tensor tensor = {};
  std::vector<double> values;
  std::vector<unsigned char> image; /* what was uploaded, from `memory` on */
  char *memory = NULL;
  int64_t start = 0; /* bytes before the first element */

  array() = default;
  array(const array &) = delete;
  array &operator=(const array &) = delete;
  ~array() {
    cudaFree(memory);
  }

  int64_t count() const {
    int64_t n = 1;
    for (int i = 0; i < tensor.rank; ++i) n *= tensor.shape[i];
    return n;
  }
  int64_t offset(int64_t index) const {
    int64_t at = 0;
    for (int i = tensor.rank - 1; i >= 0; --i) {
      at += index % tensor.shape[i] * tensor.stride[i];
      index /= tensor.shape[i];
    }
    return at;
  }
};

static const unsigned char POISON = 0xff; /* NaN in every floating dtype */

/* Strides empty: contiguous. `fill` gives elements; NULL: poison. shift: elements by which the
 * beginning is off an aligned address. */
static void make(array &a, attn_dtype dtype, const std::vector<int64_t> &shape,
                 const std::vector<int64_t> &strides, const std::function<double()> &fill,
                 int shift = 0) {
  cudaFree(a.memory);
  a.tensor = attn_tensor{};
  a.tensor.dtype = dtype;
  a.tensor.device.kind = ATTN_CUDA;
  a.tensor.rank = (int)shape.size();
  int64_t next = 1, last = 0;
  for (int i = a.tensor.rank - 1; i >= 0; --i) {
    a.tensor.shape[i] = shape[i];
    a.tensor.stride[i] = strides.empty() ? next : strides[i];
    next *= shape[i];
    last += std::max<int64_t>(shape[i] - 1, 0) * a.tensor.stride[i];
  }
  int64_t n = a.count(), size = bytes_of(dtype);
  a.start = shift * size;
  a.image.assign((size_t)(a.start + (last + 1) * size + 64), POISON);
  a.values.assign((size_t)n, NAN);
  if (fill)
    for (int64_t i = 0; i < n; ++i) {
      unsigned char *place = &a.image[(size_t)(a.start + a.offset(i) * size)];
      write_element(place, dtype, fill());
    }
  for (int64_t i = 0; i < n; ++i) /* after all writes: elements may share memory */
    a.values[(size_t)i] = read_element(&a.image[(size_t)(a.start + a.offset(i) * size)], dtype);
  CUDA(cudaMalloc(&a.memory, a.image.size()));
  CUDA(cudaMemcpy(a.memory, a.image.data(), a.image.size(), cudaMemcpyHostToDevice));
  a.tensor.data = a.memory + a.start;
}

static std::vector<double> read(const array &a, const char *name) {
  std::vector<unsigned char> now(a.image.size());
  CUDA(cudaMemcpy(now.data(), a.memory, now.size(), cudaMemcpyDeviceToHost));
  int64_t n = a.count(), size = bytes_of(a.tensor.dtype);
  std::vector<double> got((size_t)n);
  std::vector<bool> element(now.size(), false);
  for (int64_t i = 0; i < n; ++i) {
    int64_t place = a.start + a.offset(i) * size;
    got[(size_t)i] = read_element(&now[(size_t)place], a.tensor.dtype);
    for (int64_t j = 0; j < size; ++j) element[(size_t)(place + j)] = true;
  }
  for (size_t i = 0; i < now.size(); ++i)
    if (!element[i] && now[i] != POISON) {
      printf("FAILED %s: memory outside the tensor was written (byte %zu)\n", name, i);
      ++failures;
      break;
    }
  return got;
}

/* --- Comparing ----------------------------------------------------------------------------------
 */

/* What one rounding to the dtype costs at most; float32 and float64: some roundings. */
static double bound_of(attn_dtype dtype) {
  return dtype == ATTN_F64 ? 1e-13 : dtype == ATTN_F32 ? 1e-6 : dtype == ATTN_BF16 ? 3.92e-3 : 5e-4;
}

static double worst[ATTN_DTYPE_COUNT]; /* of the group of checks at hand, as a share of the bound */

static double relative_error(const std::vector<double> &got, const std::vector<double> &expected) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (std::isnan(got[i]) != std::isnan(expected[i])) return INFINITY;
    if (std::isnan(got[i]) || got[i] == expected[i]) continue;
    difference += (got[i] - expected[i]) * (got[i] - expected[i]);
  }
  for (double value : expected) norm += std::isfinite(value) ? value * value : 0;
  if (difference == 0) return 0;
  return sqrt(difference / std::max(norm, 1e-300));
}

static void compare(const std::string &name, const std::vector<double> &got,
                    std::vector<double> expected, attn_dtype dtype, double bound) {
  ++checks;
  for (double &value : expected) /* float16 ends at 65504 */
    if (dtype == ATTN_F16 && fabs(value) >= 65520) value = value > 0 ? INFINITY : -INFINITY;
  double error = relative_error(got, expected);
  worst[dtype] = std::max(worst[dtype], error);
  if (error <= bound) return;
  if (++failures < 40)
    printf("FAILED %s: relative error %.2e, at most %.2e expected (%s)\n", name.c_str(), error,
           bound, dtype_name(dtype));
}

static void compare(const std::string &name, const array &a, const std::vector<double> &expected,
                    double bound = 0) {
  std::vector<double> got = read(a, name.c_str());
  compare(name, got, expected, a.tensor.dtype, bound > 0 ? bound : bound_of(a.tensor.dtype));
}

static void report(const char *group) {
  printf("%-18s largest relative error:", group);
  for (attn_dtype dtype : {ATTN_F64, ATTN_F32, ATTN_BF16, ATTN_F16})
    if (worst[dtype] > 0) printf("  %s %.1e", dtype_name(dtype), worst[dtype]);
  printf("\n");
  memset(worst, 0, sizeof worst);
}

/* --- Timing -------------------------------------------------------------------------------------
 */

/* Median microseconds of a call; it gets the number of the call, to rotate its buffers. */
static double time_of(const std::function<void(int)> &call, int repeats = 30) {
  cudaEvent_t from, to;
  CUDA(cudaEventCreate(&from));
  CUDA(cudaEventCreate(&to));
  for (int i = 0; i < 4; ++i) call(i);
  CUDA(cudaDeviceSynchronize());
  std::vector<float> times;
  enum { EACH = 4 }; /* calls between two events */
  for (int i = 0; i < repeats; ++i) {
    CUDA(cudaEventRecord(from));
    for (int j = 0; j < EACH; ++j) call(i * EACH + j);
    CUDA(cudaEventRecord(to));
    CUDA(cudaEventSynchronize(to));
    float ms;
    CUDA(cudaEventElapsedTime(&ms, from, to));
    times.push_back(ms * 1000 / EACH);
  }
  std::sort(times.begin(), times.end());
  cudaEventDestroy(from);
  cudaEventDestroy(to);
  return times[times.size() / 2];
}

static double copy_rate; /* bytes a microsecond, read plus written */

static void measure_copy() {
  const size_t bytes = (size_t)512 << 20;
  char *a, *b;
  CUDA(cudaMalloc(&a, bytes));
  CUDA(cudaMalloc(&b, bytes));
  CUDA(cudaMemset(a, 1, bytes));
  double us = time_of([&](int i) {
    CUDA(cudaMemcpyAsync(i % 2 ? a : b, i % 2 ? b : a, bytes, cudaMemcpyDeviceToDevice));
  });
  copy_rate = 2 * (double)bytes / us;
  cudaDeviceProp properties;
  CUDA(cudaGetDeviceProperties(&properties, 0));
  printf("%s: copies %.2f TB/s\n", properties.name, copy_rate / 1e6);
  cudaFree(a);
  cudaFree(b);
}

static void print_time(const char *name, double bytes, double us) {
  printf("%-44s %9.1f us  %5.2f TB/s  %3.0f %% of copy\n", name, us, bytes / us / 1e6,
         100 * bytes / us / copy_rate);
}

#endif
