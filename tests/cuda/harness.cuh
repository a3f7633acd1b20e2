/* What the CUDA tests share: random tensors in device memory, with a copy in float64 of what was
 * stored; poisoned outputs; errors relative to a reference; times. */
#ifndef ATTN_TESTS_CUDA_HARNESS_CUH
#define ATTN_TESTS_CUDA_HARNESS_CUH

#include "kernels/cuda/elements.cuh"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#define REQUIRE(call)                                                                              \
  do {                                                                                             \
    cudaError_t require_error = (call);                                                            \
    if (require_error != cudaSuccess) {                                                            \
      printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(require_error));     \
      exit(1);                                                                                     \
    }                                                                                              \
  } while (0)

static uint64_t random_state = 88172645463325252ull;
static inline double uniform() { /* in (0, 1) */
  random_state ^= random_state << 13, random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return ((double)(random_state >> 11) + 0.5) / 9007199254740992.0;
}
static inline double normal() {
  return sqrt(-2 * log(uniform())) * cos(6.283185307179586 * uniform());
}
static inline int64_t below(int64_t n) {
  return (int64_t)(uniform() * (double)n);
}

static inline size_t size_of(attn_dtype dtype) {
  return dtype == ATTN_F64 ? 8 : dtype == ATTN_F32 || dtype == ATTN_I32 ? 4 : 2;
}
static inline const char *name_of(attn_dtype dtype) {
  return dtype == ATTN_F64    ? "f64"
         : dtype == ATTN_F32  ? "f32"
         : dtype == ATTN_BF16 ? "bf16"
                              : "f16";
}
static inline attn_dtype real_of(attn_dtype dtype) {
  return dtype == ATTN_F64 ? ATTN_F64 : ATTN_F32;
}

static inline void put(void *to, attn_dtype dtype, int64_t i, double x) {
  switch (dtype) {
  case ATTN_F64: ((double *)to)[i] = x; break;
  case ATTN_BF16: ((__nv_bfloat16 *)to)[i] = __float2bfloat16_rn((float)x); break;
  case ATTN_F16: ((__half *)to)[i] = __float2half_rn((float)x); break;
  case ATTN_I32: ((int32_t *)to)[i] = (int32_t)x; break;
  default: ((float *)to)[i] = (float)x;
  }
}
static inline double take(const void *from, attn_dtype dtype, int64_t i) {
  switch (dtype) {
  case ATTN_F64: return ((const double *)from)[i];
  case ATTN_BF16: return __bfloat162float(((const __nv_bfloat16 *)from)[i]);
  case ATTN_F16: return __half2float(((const __half *)from)[i]);
  case ATTN_I32: return ((const int32_t *)from)[i];
  default: return ((const float *)from)[i];
  }
}

/* A tensor and its values in logical order. `gap` elements lie unused behind each index of the
 * second to last axis, and after them poison is looked for. */
struct value {
  attn_tensor tensor = {};
  std::vector<double> x;
  int64_t elements = 0;

  int64_t count() const {
    int64_t n = 1;
    for (int i = 0; i < tensor.rank; ++i) n *= tensor.shape[i];
    return n;
  }
  int64_t place(int64_t index) const {
    int64_t at = 0;
    for (int i = tensor.rank - 1; i >= 0; --i)
      at += index % tensor.shape[i] * tensor.stride[i], index /= tensor.shape[i];
    return at;
  }
  void shape(attn_dtype dtype, std::vector<int64_t> extents, int64_t gap) {
    release();
    tensor.dtype = dtype, tensor.rank = (int)extents.size(), tensor.device = {ATTN_CUDA, 0};
    int64_t stride = 1;
    for (int i = tensor.rank - 1; i >= 0; --i) {
      tensor.shape[i] = extents[i], tensor.stride[i] = stride;
      stride = stride * extents[i] + (i > 0 ? gap : 0);
    }
    elements = std::max<int64_t>(stride, 1);
    REQUIRE(cudaMalloc(&tensor.data, (size_t)elements * size_of(dtype)));
    poison();
  }
  void poison() {
    if (tensor.data)
      REQUIRE(cudaMemset(tensor.data, 0xff, (size_t)elements * size_of(tensor.dtype)));
  }
  void upload() {
    std::vector<char> host((size_t)elements * size_of(tensor.dtype), (char)0xff);
    for (int64_t i = 0; i < count(); ++i) {
      put(host.data(), tensor.dtype, place(i), x[i]);
      x[i] = take(host.data(), tensor.dtype, place(i));
    }
    REQUIRE(cudaMemcpy(tensor.data, host.data(), host.size(), cudaMemcpyHostToDevice));
  }
  void fill(const std::function<double(int64_t)> &f) {
    x.resize(count());
    for (int64_t i = 0; i < count(); ++i) x[i] = f(i);
    upload();
  }
  void random(double scale = 1) {
    fill([&](int64_t) { return scale * normal(); });
  }
  /* Downloads; false when something beside the tensor's elements was written. */
  bool download() {
    std::vector<char> host((size_t)elements * size_of(tensor.dtype));
    REQUIRE(cudaMemcpy(host.data(), tensor.data, host.size(), cudaMemcpyDeviceToHost));
    x.resize(count());
    std::vector<bool> own(elements);
    for (int64_t i = 0; i < count(); ++i) {
      x[i] = take(host.data(), tensor.dtype, place(i));
      own[place(i)] = true;
    }
    for (int64_t i = 0; i < elements; ++i)
      for (size_t b = 0; !own[i] && b < size_of(tensor.dtype); ++b)
        if ((unsigned char)host[i * size_of(tensor.dtype) + b] != 0xff) return false;
    return true;
  }
  void release() {
    if (tensor.data) REQUIRE(cudaFree(tensor.data));
    tensor.data = NULL;
  }
};

/* ||out - ref|| / ||ref||; elements that are equal (infinities too) differ by nothing. */
static inline double difference(const std::vector<double> &out, const std::vector<double> &ref) {
  double above = 0, below = 0;
  for (size_t i = 0; i < ref.size(); ++i) {
    if (out[i] != ref[i]) above += (out[i] - ref[i]) * (out[i] - ref[i]);
    if (std::isfinite(ref[i])) below += ref[i] * ref[i];
  }
  if (!(above <= 1e300)) return INFINITY; /* NaN too */
  return above == 0 ? 0 : sqrt(above / (below > 0 ? below : 1));
}

static int failures;

/* Judges one output. */
static inline double judge(const char *what, const char *name, value &out,
                           const std::vector<double> &reference, double bound) {
  bool clean = out.download();
  double error = difference(out.x, reference);
  if (error <= bound && clean) return error;
  printf("FAILED %s: %s: error %.3g, allowed %.3g%s\n", what, name, error, bound,
         clean ? "" : "; memory between its rows was written");
  ++failures;
  return error;
}

/* Results are rounded to the dtype once: half a unit in the last place at most, bfloat16 2^-9,
 * float16 2^-12 of each; what is left is float32 arithmetic. */
static inline double bound_of(attn_dtype dtype) {
  return dtype == ATTN_F64 ? 1e-12 : dtype == ATTN_F32 ? 1e-5 : dtype == ATTN_BF16 ? 1e-2 : 2e-3;
}

static inline attn_cuda_device open_device() {
  attn_cuda_device device = {};
  if (attn_cuda_device_open(0, &device) != ATTN_OK) {
    printf("%s\n", attn_cuda_error());
    exit(1);
  }
  printf("%s, %d multiprocessors\n", device.name, device.multiprocessors);
  return device;
}

/* Median microseconds of one of the `inner` runs of a graph: run(i, stream) queues run i, and the
 * graph keeps the host's time for it out of the measurement. */
static inline double median_time(int repeats, int inner,
                                 const std::function<void(int, cudaStream_t)> &run) {
  cudaEvent_t start, stop;
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  REQUIRE(cudaEventCreate(&start));
  REQUIRE(cudaEventCreate(&stop));
  REQUIRE(cudaStreamCreate(&stream));
  REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < inner; ++i) run(i, stream);
  REQUIRE(cudaStreamEndCapture(stream, &graph));
  REQUIRE(cudaGraphInstantiate(&executable, graph, 0));
  std::vector<float> times;
  for (int i = -2; i < repeats; ++i) {
    REQUIRE(cudaEventRecord(start, stream));
    REQUIRE(cudaGraphLaunch(executable, stream));
    REQUIRE(cudaEventRecord(stop, stream));
    REQUIRE(cudaEventSynchronize(stop));
    float milliseconds;
    REQUIRE(cudaEventElapsedTime(&milliseconds, start, stop));
    if (i >= 0) times.push_back(milliseconds * 1000 / (float)inner);
  }
  std::sort(times.begin(), times.end());
  REQUIRE(cudaGraphExecDestroy(executable));
  REQUIRE(cudaGraphDestroy(graph));
  REQUIRE(cudaStreamDestroy(stream));
  REQUIRE(cudaEventDestroy(start));
  REQUIRE(cudaEventDestroy(stop));
  return times[times.size() / 2];
}

/* Bytes a microsecond (read plus written) of a large copy on the device. */
static inline double copy_rate() {
  size_t bytes = (size_t)1 << 30;
  char *from, *to;
  REQUIRE(cudaMalloc(&from, bytes));
  REQUIRE(cudaMalloc(&to, bytes));
  REQUIRE(cudaMemset(from, 0x5a, bytes));
  /* Not as a graph: its copies may go through slower engines. */
  cudaEvent_t start, stop;
  REQUIRE(cudaEventCreate(&start));
  REQUIRE(cudaEventCreate(&stop));
  std::vector<double> times;
  for (int i = 0; i < 20; ++i) {
    float milliseconds;
    REQUIRE(cudaEventRecord(start));
    REQUIRE(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, 0));
    REQUIRE(cudaEventRecord(stop));
    REQUIRE(cudaEventSynchronize(stop));
    REQUIRE(cudaEventElapsedTime(&milliseconds, start, stop));
    times.push_back(milliseconds * 1000);
  }
  std::sort(times.begin(), times.end());
  double time = times[10];
  REQUIRE(cudaEventDestroy(start));
  REQUIRE(cudaEventDestroy(stop));
  REQUIRE(cudaFree(from));
  REQUIRE(cudaFree(to));
  printf("copy: %.0f GB/s\n", 2.0 * (double)bytes / time / 1000);
  return 2.0 * (double)bytes / time;
}

#endif
