/* Checks and times the recurrent engine's additive update on the GPU's matrix units.
 *
 *   recurrent_additive          every kind of shape against a float64 loop over the equations
 *   recurrent_additive bench [DECAY LENGTH]    times of 65 536 tokens and more, 16 heads, dim 128,
 * bfloat16
 *
 * The oracle steps S_t = alpha_t S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t token by token, and
 * its gradient by the adjoint recurrence dS_t = alpha_{t+1} dS_{t+1} + scale q_t do_t^T. */
#include "kernels/cuda/common.cuh"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

extern const recurrent_algorithm recurrent_additive_sm90_forward, recurrent_additive_sm90_backward;

static const recurrent_algorithm *const tested[] = {
    &recurrent_additive_sm90_forward,
    &recurrent_additive_sm90_backward,
};

static attn_cuda_device device;
static int failures;

#define CUDA(call)                                                                                 \
  do {                                                                                             \
    cudaError_t error = (call);                                                                    \
    if (error != cudaSuccess) {                                                                    \
      printf("%s: %s\n", #call, cudaGetErrorString(error));                                        \
      exit(1);                                                                                     \
    }                                                                                              \
  } while (0)

static uint64_t random_state = 88172645463325252u;

static double uniform() {
  random_state ^= random_state << 13, random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (double)(random_state >> 11) / 9007199254740992.0;
}

static double normal() {
  return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform());
}

/* A tensor on the device and its values in double. Elements between rows are poison (all bits set)
 * and stay so. */
struct sample {
  attn_tensor tensor{};
  std::vector<double> values; /* dense, row-major */
  std::vector<uint8_t> before;
  size_t bytes = 0, element = 0;

  void make(attn_dtype dtype, std::vector<int64_t> shape, int64_t gap) {
    element = dtype == ATTN_F32 ? 4 : 2;
    tensor.dtype = dtype;
    tensor.device = {ATTN_CUDA, 0};
    tensor.rank = (int)shape.size();
    int64_t stride = 1, count = 1;
    for (int i = tensor.rank - 1; i >= 0; i--) {
      tensor.shape[i] = shape[(size_t)i];
      tensor.stride[i] = stride;
      stride *= shape[(size_t)i];
      if (i > 0) stride += gap;
      count *= shape[(size_t)i];
    }
    values.resize((size_t)count);
    bytes = ((size_t)std::max<int64_t>(stride, 1) + 64) * element;
    before.assign(bytes, 0xff);
    CUDA(cudaMalloc(&tensor.data, bytes));
    CUDA(cudaMemset(tensor.data, 0xff, bytes));
  }
  size_t place(size_t index) const {
    size_t offset = 0;
    for (int i = tensor.rank - 1; i >= 0; i--) {
      offset += index % (size_t)tensor.shape[i] * (size_t)tensor.stride[i];
      index /= (size_t)tensor.shape[i];
    }
    return offset;
  }
  double get(const uint8_t *from, size_t index) const {
    const uint8_t *at = from + place(index) * element;
    if (tensor.dtype == ATTN_F32) return *(const float *)at;
    if (tensor.dtype == ATTN_BF16) return __bfloat162float(*(const __nv_bfloat16 *)at);
    return __half2float(*(const __half *)at);
  }
  /* Rounds `values` and uploads them. */
  void upload() {
    for (size_t i = 0; i < values.size(); i++) {
      uint8_t *at = before.data() + place(i) * element;
      if (tensor.dtype == ATTN_F32)
        *(float *)at = (float)values[i];
      else if (tensor.dtype == ATTN_BF16)
        *(__nv_bfloat16 *)at = __float2bfloat16((float)values[i]);
      else
        *(__half *)at = __float2half((float)values[i]);
      values[i] = get(before.data(), i);
    }
    CUDA(cudaMemcpy(tensor.data, before.data(), bytes, cudaMemcpyHostToDevice));
  }
  /* ||tensor - values|| / ||values||; infinite where gaps were written. */
  double error() const {
    std::vector<uint8_t> after(bytes);
    CUDA(cudaMemcpy(after.data(), tensor.data, bytes, cudaMemcpyDeviceToHost));
    double difference = 0, norm = 0;
    for (size_t i = 0; i < values.size(); i++) {
      double d = get(after.data(), i) - values[i];
      difference += d * d, norm += values[i] * values[i];
      memset(after.data() + place(i) * element, 0xff, element);
    }
    for (size_t i = 0; i < bytes; i++)
      if (after[i] != 0xff) return INFINITY;
    if (values.empty()) return 0;
    return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
  }
  void drop() {
    cudaFree(tensor.data);
    *this = sample();
  }
};

struct test_case {
  const char *what;
  attn_dtype dtype;
  int64_t batch, length, heads, value_heads, dim, value_dim;
  attn_decay decay;
  bool states;              /* initial and final, and their gradients */
  int64_t gap;              /* elements between rows */
  std::vector<int> lengths; /* ragged */
  double strength = 1;      /* of the decay */
};

static double log_decay(const test_case &c, const sample &decay, int64_t token, int64_t h,
                        int64_t i) {
  switch (c.decay) {
  case ATTN_DECAY_NONE: return 0;
  case ATTN_DECAY_HEAD: return decay.values[(size_t)h];
  case ATTN_DECAY_TOKEN: return decay.values[(size_t)(token * c.value_heads + h)];
  default: return decay.values[(size_t)((token * c.value_heads + h) * c.dim + i)];
  }
}

static void check(const test_case &c) {
  const bool ragged = !c.lengths.empty();
  int64_t total = c.batch * c.length;
  std::vector<int32_t> offsets(1, 0);
  for (int length : c.lengths) offsets.push_back(offsets.back() + length);
  if (ragged) total = offsets.back();

  auto shape = [&](int64_t heads, int64_t dim) {
    return ragged ? std::vector<int64_t>{total, heads, dim}
                  : std::vector<int64_t>{c.batch, c.length, heads, dim};
  };
  sample q, k, v, o, decay, initial, final, d_o, d_final, d_q, d_k, d_v, d_decay, d_initial;
  q.make(c.dtype, shape(c.heads, c.dim), c.gap);
  k.make(c.dtype, shape(c.heads, c.dim), c.gap);
  v.make(c.dtype, shape(c.value_heads, c.value_dim), c.gap);
  o.make(c.dtype, shape(c.value_heads, c.value_dim), c.gap);
  d_o.make(c.dtype, shape(c.value_heads, c.value_dim), c.gap);
  d_q.make(c.dtype, shape(c.heads, c.dim), c.gap);
  d_k.make(c.dtype, shape(c.heads, c.dim), c.gap);
  d_v.make(c.dtype, shape(c.value_heads, c.value_dim), c.gap);
  const int64_t sequences = ragged ? (int64_t)c.lengths.size() : c.batch;
  std::vector<int64_t> state_shape = {sequences, c.value_heads, c.dim, c.value_dim};
  for (sample *s : {&initial, &final, &d_final, &d_initial}) s->make(ATTN_F32, state_shape, c.gap);
  if (c.decay == ATTN_DECAY_HEAD) decay.make(ATTN_F32, {c.value_heads}, 0);
  if (c.decay == ATTN_DECAY_CHANNEL) {
    decay.make(ATTN_F32, shape(c.value_heads, c.dim), 0);
    d_decay.make(ATTN_F32, shape(c.value_heads, c.dim), 0);
  }
  if (c.decay == ATTN_DECAY_TOKEN) {
    std::vector<int64_t> s = shape(c.value_heads, 1);
    s.pop_back();
    decay.make(ATTN_F32, s, 0);
    d_decay.make(ATTN_F32, s, 0);
  }
  for (sample *s : {&q, &k, &v, &d_o, &initial, &d_final}) {
    for (double &x : s->values) x = normal();
    s->upload();
  }
  for (size_t h = 0; h < decay.values.size(); h++)
    decay.values[h] = c.decay == ATTN_DECAY_HEAD
                          ? -c.strength * std::pow(2, -8.0 * (double)(h + 1) / c.value_heads)
                      : c.decay == ATTN_DECAY_TOKEN
                          ? c.strength * std::log(1 / (1 + std::exp(-3 - normal())))
                          : c.strength * std::log(1 / (1 + std::exp(-normal()))) / 16;
  if (c.decay != ATTN_DECAY_NONE) decay.upload();

  attn_recurrent_problem problem = ATTN_RECURRENT_PROBLEM_INIT;
  problem.dtype = c.dtype;
  problem.passes = ATTN_PASS_FORWARD | ATTN_PASS_BACKWARD;
  problem.batch = sequences;
  problem.length = ragged ? *std::max_element(c.lengths.begin(), c.lengths.end()) : c.length;
  problem.heads = c.heads, problem.value_heads = c.value_heads;
  problem.dim = c.dim, problem.value_dim = c.value_dim;
  problem.scale = 1 / std::sqrt((double)c.dim);
  problem.decay = c.decay;
  problem.ragged = ragged;
  problem.epsilon = 1e-6;

  /* The oracle. */
  const int64_t dk = c.dim, dv = c.value_dim, group = c.value_heads / c.heads;
  const double scale = problem.scale;
  std::fill(d_q.values.begin(), d_q.values.end(), 0);
  std::fill(d_k.values.begin(), d_k.values.end(), 0);
  for (int64_t b = 0; b < problem.batch; b++)
    for (int64_t h = 0; h < c.value_heads; h++) {
      int64_t first = ragged ? offsets[(size_t)b] : b * c.length;
      int64_t length = ragged ? c.lengths[(size_t)b] : c.length;
      size_t whole = (size_t)(dk * dv), slot = (size_t)(b * c.value_heads + h) * whole;
      std::vector<double> state(whole, 0), d_state(whole, 0), kept;
      if (c.states) std::copy_n(&initial.values[slot], whole, state.begin());
      const bool wants_decay = !d_decay.values.empty();
      for (int64_t t = 0; t < length; t++) {
        const double *qt = &q.values[(size_t)(((first + t) * c.heads + h / group) * dk)];
        const double *kt = &k.values[(size_t)(((first + t) * c.heads + h / group) * dk)];
        size_t at = (size_t)(((first + t) * c.value_heads + h) * dv);
        const double *vt = &v.values[at], *dot = &d_o.values[at];
        double *ot = &o.values[at];
        double *dqt = &d_q.values[(size_t)(((first + t) * c.heads + h / group) * dk)];
        std::fill_n(ot, dv, 0.0);
        for (int64_t i = 0; i < dk; i++) {
          double alpha = std::exp(log_decay(c, decay, first + t, h, i)), sum = 0;
          double *row = &state[(size_t)(i * dv)];
          for (int64_t j = 0; j < dv; j++) {
            row[j] = alpha * row[j];
            if (wants_decay) kept.push_back(row[j]);
            row[j] += kt[i] * vt[j];
            ot[j] += scale * qt[i] * row[j];
            sum += row[j] * dot[j];
          }
          dqt[i] += scale * sum;
        }
      }
      if (c.states) {
        std::copy_n(state.begin(), whole, &final.values[slot]);
        std::copy_n(&d_final.values[slot], whole, d_state.begin());
      }
      for (int64_t t = length - 1; t >= 0; t--) {
        const double *qt = &q.values[(size_t)(((first + t) * c.heads + h / group) * dk)];
        const double *kt = &k.values[(size_t)(((first + t) * c.heads + h / group) * dk)];
        size_t at = (size_t)(((first + t) * c.value_heads + h) * dv);
        const double *vt = &v.values[at], *dot = &d_o.values[at];
        double *dvt = &d_v.values[at];
        double *dkt = &d_k.values[(size_t)(((first + t) * c.heads + h / group) * dk)];
        std::fill_n(dvt, dv, 0.0);
        double d_token = 0;
        for (int64_t i = 0; i < dk; i++) {
          double alpha = std::exp(log_decay(c, decay, first + t, h, i)), sum = 0, dg = 0;
          double *row = &d_state[(size_t)(i * dv)];
          for (int64_t j = 0; j < dv; j++) {
            row[j] += scale * qt[i] * dot[j];
            dvt[j] += row[j] * kt[i];
            sum += row[j] * vt[j];
            if (wants_decay) dg += row[j] * kept[(size_t)t * whole + (size_t)(i * dv + j)];
            row[j] *= alpha;
          }
          dkt[i] += sum;
          d_token += dg;
          if (c.decay == ATTN_DECAY_CHANNEL)
            d_decay.values[(size_t)(((first + t) * c.value_heads + h) * dk + i)] = dg;
        }
        if (c.decay == ATTN_DECAY_TOKEN)
          d_decay.values[(size_t)((first + t) * c.value_heads + h)] = d_token;
      }
      if (c.states) std::copy_n(d_state.begin(), whole, &d_initial.values[slot]);
    }

  attn_recurrent_args args{};
  int32_t *device_offsets = NULL;
  if (ragged) {
    CUDA(cudaMalloc(&device_offsets, offsets.size() * 4));
    CUDA(cudaMemcpy(device_offsets, offsets.data(), offsets.size() * 4, cudaMemcpyHostToDevice));
  }
  args.q = q.tensor, args.k = k.tensor, args.v = v.tensor, args.o = o.tensor;
  args.decay = decay.tensor, args.offsets = device_offsets;
  args.d_o = d_o.tensor, args.d_q = d_q.tensor, args.d_k = d_k.tensor, args.d_v = d_v.tensor;
  args.d_decay = d_decay.tensor;
  if (c.states) {
    args.initial_state = initial.tensor, args.final_state = final.tensor;
    args.d_final_state = d_final.tensor, args.d_initial_state = d_initial.tensor;
  }
  printf("%-26s", c.what);
  for (attn_pass pass : {ATTN_PASS_FORWARD, ATTN_PASS_BACKWARD}) {
    bool ran = false;
    for (const recurrent_algorithm *algorithm : tested) {
      attn_cuda_choice choice{};
      if (algorithm->pass != pass || !algorithm->plan(&device, &problem, &choice)) continue;
      if (algorithm->suits && !algorithm->suits(&problem, &args)) continue;
      void *workspace = NULL;
      size_t guard = 1024;
      CUDA(cudaMalloc(&workspace, choice.workspace_bytes + guard));
      CUDA(cudaMemset(workspace, 0xff, choice.workspace_bytes + guard));
      attn_status status = algorithm->run(&device, &choice, &problem, &args, workspace, 0);
      cudaError_t error = cudaDeviceSynchronize();
      if (status != ATTN_OK || error != cudaSuccess) {
        printf(" FAILED: %s, %s\n", attn_cuda_error(), cudaGetErrorString(error));
        exit(1);
      }
      std::vector<uint8_t> bytes(guard);
      CUDA(cudaMemcpy(bytes.data(), (char *)workspace + choice.workspace_bytes, guard,
                      cudaMemcpyDeviceToHost));
      for (uint8_t byte : bytes)
        if (byte != 0xff) {
          printf(" WORKSPACE OVERRUN");
          failures++;
          break;
        }
      cudaFree(workspace);
      struct {
        const char *name;
        const sample *value;
        bool wanted;
        double bound;
      } outputs[] = {
          /* Rounding o alone to bfloat16 gives 1.7e-3; the scores and the state are rounded too. */
          {"o", &o, pass == ATTN_PASS_FORWARD, c.dtype == ATTN_BF16 ? 4.5e-3 : 1e-3},
          {"S", &final, pass == ATTN_PASS_FORWARD && c.states, c.dtype == ATTN_BF16 ? 5e-3 : 1e-3},
          {"dq", &d_q, pass == ATTN_PASS_BACKWARD, c.dtype == ATTN_BF16 ? 5e-3 : 1e-3},
          {"dk", &d_k, pass == ATTN_PASS_BACKWARD, c.dtype == ATTN_BF16 ? 5e-3 : 1e-3},
          {"dv", &d_v, pass == ATTN_PASS_BACKWARD, c.dtype == ATTN_BF16 ? 5e-3 : 1e-3},
          /* A sum to the sequence's end of differences between products that went through rounded
           * states: errors add up, most in long sequences that forget slowly (8 000 tokens: 3e-2).
           * Under decays of e^-15 a step nothing is left of it beside what cancels. */
          {"dg", &d_decay, pass == ATTN_PASS_BACKWARD && d_decay.tensor.data && c.strength < 100,
           c.dtype == ATTN_BF16 ? 4e-2 : 5e-3},
          {"dS", &d_initial, pass == ATTN_PASS_BACKWARD && c.states,
           c.dtype == ATTN_BF16 ? 5e-3 : 1e-3},
      };
      printf(" [%lldx%lld]", (long long)choice.values[0], (long long)choice.values[1]);
      for (const auto &output : outputs) {
        if (!output.wanted) continue;
        double relative = output.value->error();
        bool good = relative < output.bound; /* false for NaN */
        printf(" %s %.1e%s", output.name, relative, good ? "" : " WRONG");
        failures += !good;
      }
      ran = true;
      break;
    }
    if (!ran) printf(" (pass %d not offered)", pass);
  }
  printf("\n");
  for (sample *s : {&q, &k, &v, &o, &decay, &initial, &final, &d_o, &d_final, &d_q, &d_k, &d_v,
                    &d_decay, &d_initial})
    s->drop();
  cudaFree(device_offsets);
}

static void checks(const char *only) {
  const attn_dtype B = ATTN_BF16, H = ATTN_F16;
  const attn_decay none = ATTN_DECAY_NONE, head = ATTN_DECAY_HEAD, token = ATTN_DECAY_TOKEN,
                   channel = ATTN_DECAY_CHANNEL;
  const test_case cases[] = {
      {"head, exact chunks", B, 2, 256, 2, 2, 128, 128, head, false, 0, {}},
      {"head, states", B, 2, 256, 2, 2, 128, 128, head, true, 0, {}},
      {"none, states, 200", B, 1, 200, 2, 2, 128, 128, none, true, 0, {}},
      {"head, gaps, 321", B, 2, 321, 3, 3, 128, 128, head, true, 8, {}},
      {"head, grouped", B, 2, 200, 2, 6, 128, 128, head, true, 8, {}},
      {"head, ragged", B, 1, 0, 2, 2, 128, 128, head, true, 0, {130, 1, 64, 0, 200, 63}},
      {"head, segments", B, 1, 2000, 2, 2, 128, 128, head, true, 0, {}},
      {"none, segments", B, 1, 2000, 2, 2, 128, 128, none, true, 0, {}},
      {"head, ragged segments", B, 1, 0, 1, 2, 128, 128, head, true, 8, {1500, 3, 700, 1024}},
      {"head, strong", B, 1, 500, 2, 2, 128, 128, head, true, 0, {}, 200},
      {"head, weak segments", B, 1, 2000, 1, 1, 128, 128, head, false, 0, {}, 0.1},
      {"head, 64 x 64", B, 2, 321, 2, 4, 64, 64, head, true, 0, {}},
      {"head, 64 x 64 segments", B, 1, 2000, 2, 4, 64, 64, head, true, 0, {}},
      {"head, 128 x 64", B, 2, 321, 2, 4, 128, 64, head, true, 0, {}},
      {"head, 64 x 128", B, 1, 700, 2, 4, 64, 128, head, true, 0, {}},
      {"head, float16", H, 2, 321, 2, 4, 128, 128, head, true, 0, {}},
      {"none, float16 64", H, 1, 700, 2, 2, 64, 64, none, true, 0, {}},
      {"token", B, 2, 321, 2, 2, 128, 128, token, true, 0, {}},
      {"token, segments", B, 1, 1100, 2, 4, 128, 128, token, true, 0, {}},
      {"token, ragged", B, 1, 0, 2, 2, 128, 128, token, true, 0, {130, 1, 64, 0, 200, 63}},
      {"token, strong", B, 1, 300, 2, 2, 128, 128, token, true, 0, {}, 30},
      {"token, very strong", B, 1, 300, 2, 2, 128, 128, token, true, 0, {}, 300},
      {"token, 64 x 128", B, 1, 700, 2, 4, 64, 128, token, true, 8, {}},
      {"token, long", B, 1, 8000, 1, 1, 64, 64, token, false, 0, {}},
      {"token, float16 64", H, 1, 321, 2, 4, 64, 64, token, true, 0, {}},
      {"channel", B, 2, 321, 2, 2, 128, 128, channel, true, 0, {}},
      {"channel, segments", B, 1, 1100, 2, 4, 128, 128, channel, true, 0, {}},
      {"channel, ragged", B, 1, 0, 2, 2, 128, 128, channel, true, 0, {130, 1, 64, 0, 200, 63}},
      {"channel, strong", B, 1, 300, 2, 2, 128, 128, channel, true, 0, {}, 300},
      {"channel, float16 64", H, 1, 321, 2, 4, 64, 64, channel, true, 0, {}},
  };
  for (const test_case &c : cases)
    if (!only || strstr(c.what, only)) check(c);
}

/* ------------------------------------------------------------------------------------ times */

__global__ static void fill_normal(__nv_bfloat16 *data, int64_t count, uint32_t seed, float scale) {
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
       i += (int64_t)gridDim.x * blockDim.x) {
    uint64_t x = (uint64_t)i * 0x9e3779b97f4a7c15u + seed;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u, x = (x ^ x >> 27) * 0x94d049bb133111ebu, x ^= x >> 31;
    float u = ((uint32_t)x + 0.5f) * 2.3283064e-10f, w = (float)(x >> 32) * 2.3283064e-10f;
    data[i] = __float2bfloat16(scale * sqrtf(-2 * logf(u)) * cospif(2 * w));
  }
}

__global__ static void fill_decay(float *data, int64_t count, uint32_t seed, float divisor) {
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
       i += (int64_t)gridDim.x * blockDim.x) {
    uint64_t x = (uint64_t)i * 0x9e3779b97f4a7c15u + seed;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u, x = (x ^ x >> 27) * 0x94d049bb133111ebu, x ^= x >> 31;
    float u = ((uint32_t)x + 0.5f) * 2.3283064e-10f;
    data[i] = logf(u) / divisor;
  }
}

template <typename F> static double median_us(F &&work, int repeats) {
  cudaEvent_t start, stop;
  CUDA(cudaEventCreate(&start));
  CUDA(cudaEventCreate(&stop));
  for (int i = 0; i < 3; i++) work();
  std::vector<float> times;
  for (int i = 0; i < repeats; i++) {
    CUDA(cudaEventRecord(start));
    work();
    CUDA(cudaEventRecord(stop));
    CUDA(cudaEventSynchronize(stop));
    float ms;
    CUDA(cudaEventElapsedTime(&ms, start, stop));
    times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  return 1e3 * times[times.size() / 2];
}

/* Of one decay and length, or all. */
static void bench(const char *only, int64_t only_length) {
  const int64_t heads = 16, dim = 128, most = (int64_t)1 << 20;
  const size_t tensor = (size_t)(most * heads * dim) * 2;
  char *memory[8];
  for (char *&m : memory) CUDA(cudaMalloc(&m, tensor));
  float *decay;
  CUDA(cudaMalloc(&decay, (size_t)(65536 * heads * dim) * 4));
  double copy = 0;
  size_t copied = (size_t)1 << 30;
  copy = 2 * (double)copied /
         median_us([&] { cudaMemcpyAsync(memory[0], memory[1], copied, cudaMemcpyDeviceToDevice); },
                   20) /
         1e6;
  printf("copy %.2f TB/s; times for 4.27 TB/s in brackets\n", copy);
  const attn_decay decays[] = {ATTN_DECAY_HEAD, ATTN_DECAY_NONE, ATTN_DECAY_TOKEN,
                               ATTN_DECAY_CHANNEL};
  const char *names[] = {"none", "head", "token", "channel"};
  for (int i = 0; i < 8; i++)
    fill_normal<<<1024, 256>>>((__nv_bfloat16 *)memory[i], most * heads * dim, (uint32_t)i + 1, 1);
  for (attn_decay kind : decays)
    for (attn_pass pass : {ATTN_PASS_FORWARD, ATTN_PASS_BACKWARD})
      for (int64_t length : {(int64_t)1024, (int64_t)4096, (int64_t)16384, (int64_t)65536, most}) {
        if (length == most && kind != ATTN_DECAY_HEAD) continue;
        if (only && (strcmp(only, names[kind]) || length != only_length)) continue;
        int64_t tokens = std::max<int64_t>(length, 65536), batch = tokens / length;
        attn_recurrent_problem problem = ATTN_RECURRENT_PROBLEM_INIT;
        problem.dtype = ATTN_BF16;
        problem.passes = pass;
        problem.batch = batch, problem.length = length;
        problem.heads = problem.value_heads = heads;
        problem.dim = problem.value_dim = dim;
        problem.scale = 1 / std::sqrt((double)dim);
        problem.decay = kind;
        attn_recurrent_args args{};
        attn_tensor *tensors[] = {&args.q,   &args.k,   &args.v,   &args.o,
                                  &args.d_o, &args.d_q, &args.d_k, &args.d_v};
        for (int i = 0; i < 8; i++)
          *tensors[i] = attn_tensor{memory[i],
                                    ATTN_BF16,
                                    {ATTN_CUDA, 0},
                                    4,
                                    {batch, length, heads, dim},
                                    {length * heads * dim, heads * dim, dim, 1}};
        if (kind == ATTN_DECAY_HEAD) {
          float slopes[16];
          for (int h = 0; h < heads; h++) slopes[h] = -std::pow(2.f, -8.f * (float)(h + 1) / heads);
          CUDA(cudaMemcpy(decay, slopes, sizeof slopes, cudaMemcpyHostToDevice));
          args.decay = attn_tensor{decay, ATTN_F32, {ATTN_CUDA, 0}, 1, {heads}, {1}};
        } else if (kind != ATTN_DECAY_NONE) {
          bool channel = kind == ATTN_DECAY_CHANNEL;
          int64_t width = channel ? dim : 1;
          fill_decay<<<1024, 256>>>(decay, tokens * heads * width, 77, 16);
          args.decay = attn_tensor{decay,
                                   ATTN_F32,
                                   {ATTN_CUDA, 0},
                                   channel ? 4 : 3,
                                   {batch, length, heads, dim},
                                   {length * heads * width, heads * width, width, 1}};
        }
        for (const recurrent_algorithm *algorithm : tested) {
          attn_cuda_choice choice{};
          if (algorithm->pass != pass || !algorithm->plan(&device, &problem, &choice)) continue;
          void *workspace = NULL;
          CUDA(cudaMalloc(&workspace, choice.workspace_bytes + 256));
          double us = median_us(
              [&] {
                if (algorithm->run(&device, &choice, &problem, &args, workspace, 0) != ATTN_OK) {
                  printf("%s\n", attn_cuda_error());
                  exit(1);
                }
              },
              only             ? 1
              : length == most ? 10
                               : 30);
          CUDA(cudaDeviceSynchronize());
          bool forward = pass == ATTN_PASS_FORWARD;
          double bytes = (double)(tokens * heads * dim) * 2 * (forward ? 4 : 7);
          if (kind == ATTN_DECAY_CHANNEL) bytes += (double)(tokens * heads * dim) * 4;
          printf("%s %-7s N %7lld: %8.1f us (%7.1f), %5.1f%% of copy, %.0f Mtokens/s; %s\n",
                 forward ? "fwd" : "bwd", names[kind], (long long)length, us, us * copy / 4.27,
                 100 * bytes / us / 1e6 / copy, (double)tokens / us, choice.description);
          cudaFree(workspace);
          break;
        }
      }
}

int main(int count, char **arguments) {
  setvbuf(stdout, NULL, _IONBF, 0);
  cudaDeviceProp properties;
  CUDA(cudaGetDeviceProperties(&properties, 0));
  device.major = properties.major, device.minor = properties.minor;
  device.multiprocessors = properties.multiProcessorCount;
  device.shared_bytes = properties.sharedMemPerBlockOptin;
  device.l2_bytes = (size_t)properties.l2CacheSize;
  device.memory_bytes = properties.totalGlobalMem;
  printf("%s\n", properties.name);
  if (count > 1 && !strcmp(arguments[1], "bench"))
    bench(count > 3 ? arguments[2] : NULL, count > 3 ? atoll(arguments[3]) : 0);
  else
    checks(count > 1 ? arguments[1] : NULL);
  printf("%s\n", failures ? "FAILED" : "ok");
  return failures != 0;
}
