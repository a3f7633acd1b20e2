/* The recurrence by chunks on the GPU, delta and additive rule, against itself token by token in
 * float64; with `bench`, its times. Inputs of the oracle are the rounded inputs of the kernels, so
 * errors are the kernels' own: products of bfloat16 (8 bits) or float16 (11 bits) operands with
 * float32 sums. */
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/cuda/common.cuh"

extern const recurrent_algorithm recurrent_delta_sm90_forward, recurrent_chunks_forward,
    recurrent_chunks_backward;

namespace {

#define CHECK(call)                                                                                \
  do {                                                                                             \
    cudaError_t error = (call);                                                                    \
    if (error != cudaSuccess) {                                                                    \
      printf("%s: %s\n", #call, cudaGetErrorString(error));                                        \
      exit(1);                                                                                     \
    }                                                                                              \
  } while (0)

enum gates { MILD, STRONG, MIXED, USUAL };
const char *const gate_names[] = {"mild", "strong", "mixed", "usual"};

struct shape {
  const char *name;
  attn_dtype dtype;
  attn_update update;
  attn_decay decay;
  gates gate;
  int batch, length, heads, value_heads, dim, value_dim;
  bool ragged, states;
  int gap; /* elements between rows */
};

uint64_t random_state = 88172645463325252ull;
double uniform() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (double)(random_state >> 11) * 0x1p-53;
}
double normal() {
  double u = uniform() + 1e-300, v = uniform();
  return sqrt(-2 * log(u)) * cos(6.283185307179586 * v);
}

float rounded(attn_dtype dtype, double x) {
  return dtype == ATTN_BF16  ? __bfloat162float(__float2bfloat16((float)x))
         : dtype == ATTN_F16 ? __half2float(__float2half((float)x))
                             : (float)x;
}

/* A tensor on both sides: rank axes, the innermost contiguous, `gap` more elements in each row of
 * the last but one axis. Outputs are poisoned with NaN. */
struct tensor {
  attn_tensor device = {};
  std::vector<double> host;
  std::vector<int64_t> place; /* of each element */
  int64_t room = 0;

  tensor() {
  }
  tensor(attn_dtype dtype, std::vector<int64_t> extents, int gap) {
    device.dtype = dtype;
    device.device.kind = ATTN_CUDA;
    device.rank = (int)extents.size();
    int64_t stride = 1, count = 1;
    for (int i = device.rank - 1; i >= 0; --i) {
      device.shape[i] = extents[i];
      device.stride[i] = stride;
      stride *= extents[i];
      if (i == device.rank - 1 && device.rank > 1) stride += gap;
      count *= extents[i];
    }
    room = stride;
    host.assign(count, 0);
    place.resize(count);
    for (int64_t n = 0; n < count; ++n) {
      int64_t left = n, at = 0;
      for (int i = device.rank - 1; i >= 0; --i)
        at += left % extents[i] * device.stride[i], left /= extents[i];
      place[n] = at;
    }
    CHECK(cudaMalloc(&device.data, room * size()));
    poison();
  }
  int size() const {
    return device.dtype == ATTN_F32 ? 4 : 2;
  }
  void poison() {
    CHECK(cudaMemset(device.data, 0xff, room * size()));
  }
  void upload() {
    std::vector<char> bytes(room * size(), (char)0xff);
    for (size_t n = 0; n < host.size(); ++n) {
      char *to = bytes.data() + place[n] * size();
      host[n] = rounded(device.dtype, host[n]);
      if (device.dtype == ATTN_F32) *(float *)to = (float)host[n];
      if (device.dtype == ATTN_BF16) *(__nv_bfloat16 *)to = __float2bfloat16((float)host[n]);
      if (device.dtype == ATTN_F16) *(__half *)to = __float2half((float)host[n]);
    }
    CHECK(cudaMemcpy(device.data, bytes.data(), bytes.size(), cudaMemcpyHostToDevice));
  }
  std::vector<double> download() const {
    std::vector<char> bytes(room * size());
    CHECK(cudaMemcpy(bytes.data(), device.data, bytes.size(), cudaMemcpyDeviceToHost));
    std::vector<double> out(host.size());
    for (size_t n = 0; n < host.size(); ++n) {
      const char *from = bytes.data() + place[n] * size();
      out[n] = device.dtype == ATTN_F32    ? *(const float *)from
               : device.dtype == ATTN_BF16 ? __bfloat162float(*(const __nv_bfloat16 *)from)
                                           : __half2float(*(const __half *)from);
    }
    return out;
  }
  void release() {
    if (device.data) CHECK(cudaFree(device.data));
    device.data = NULL;
  }
};

struct data {
  shape s;
  std::vector<int> offsets;
  int32_t *device_offsets = NULL;
  int64_t total;
  tensor q, k, v, o, g, beta, s0, s1, d_o, d_s1, dq, dk, dv, dg, dbeta, ds0;
  double dg_terms = 0; /* squares of what a constant decay's gradient is the sum of */

  double decay(int64_t token, int h, int c) const {
    if (s.decay == ATTN_DECAY_NONE) return 0;
    if (s.decay == ATTN_DECAY_HEAD) return g.host[h];
    if (s.decay == ATTN_DECAY_TOKEN) return g.host[token * s.value_heads + h];
    return g.host[(token * s.value_heads + h) * s.dim + c];
  }

  tensor make(attn_dtype dtype, int64_t heads, int64_t width, int gap) {
    std::vector<int64_t> extents;
    if (s.ragged)
      extents = {total, heads};
    else
      extents = {s.batch, s.length, heads};
    if (width) extents.push_back(width);
    return tensor(dtype, extents, gap);
  }

  explicit data(const shape &from) : s(from) {
    offsets.push_back(0);
    for (int b = 0; b < s.batch; ++b) {
      int tokens = s.length;
      /* Ragged: the first is the longest, then lengths of every kind, one of them empty. */
      if (s.ragged && b) tokens = b == 2 ? 0 : b == 3 ? 1 : (int)(uniform() * s.length);
      offsets.push_back(offsets.back() + tokens);
    }
    total = offsets.back();
    CHECK(cudaMalloc(&device_offsets, offsets.size() * 4));
    CHECK(cudaMemcpy(device_offsets, offsets.data(), offsets.size() * 4, cudaMemcpyHostToDevice));
    q = make(s.dtype, s.heads, s.dim, s.gap);
    k = make(s.dtype, s.heads, s.dim, s.gap);
    v = make(s.dtype, s.value_heads, s.value_dim, s.gap);
    o = make(s.dtype, s.value_heads, s.value_dim, s.gap);
    if (s.update == ATTN_UPDATE_DELTA) beta = make(ATTN_F32, s.value_heads, 0, 0);
    for (tensor *x : {&q, &k}) {
      for (size_t at = 0; at < x->host.size(); at += s.dim) {
        double norm = 0;
        for (int c = 0; c < s.dim; ++c)
          x->host[at + c] = normal(), norm += x->host[at + c] * x->host[at + c];
        for (int c = 0; c < s.dim; ++c) x->host[at + c] /= sqrt(norm);
      }
      x->upload();
    }
    for (double &x : v.host) x = normal();
    for (double &x : beta.host) x = uniform();
    v.upload();
    if (beta.host.size()) beta.upload();
    if (s.decay == ATTN_DECAY_HEAD) g = tensor(ATTN_F32, {s.value_heads}, 0);
    if (s.decay == ATTN_DECAY_TOKEN) g = make(ATTN_F32, s.value_heads, 0, 0);
    if (s.decay == ATTN_DECAY_CHANNEL) g = make(ATTN_F32, s.value_heads, s.dim, s.gap);
    for (size_t i = 0; i < g.host.size(); ++i) {
      double x = uniform();
      if (s.gate == MILD) g.host[i] = -0.01 * x;
      if (s.gate == STRONG) g.host[i] = -5 * x;
      if (s.gate == USUAL) g.host[i] = -log1p(exp(-normal()));
      /* Channels (or tokens) of every kind, some that forget at once. */
      if (s.gate == MIXED)
        g.host[i] = i % 8 == 3 ? -30 * x : i % 8 == 5 ? (x < 0.1 ? -200 : -0.1) : -x;
    }
    if (g.host.size()) g.upload();
    if (s.states) {
      std::vector<int64_t> extents = {s.batch, s.value_heads, s.dim, s.value_dim};
      s0 = tensor(ATTN_F32, extents, s.gap);
      s1 = tensor(ATTN_F32, extents, s.gap);
      for (double &x : s0.host) x = normal();
      s0.upload();
    }
  }

  void add_gradients() {
    d_o = make(s.dtype, s.value_heads, s.value_dim, s.gap);
    dq = make(s.dtype, s.heads, s.dim, s.gap);
    dk = make(s.dtype, s.heads, s.dim, s.gap);
    dv = make(s.dtype, s.value_heads, s.value_dim, s.gap);
    if (s.update == ATTN_UPDATE_DELTA) dbeta = make(ATTN_F32, s.value_heads, 0, 0);
    for (double &x : d_o.host) x = normal();
    d_o.upload();
    if (s.decay == ATTN_DECAY_HEAD) dg = tensor(ATTN_F32, {s.value_heads}, 0);
    if (s.decay == ATTN_DECAY_TOKEN) dg = make(ATTN_F32, s.value_heads, 0, 0);
    if (s.decay == ATTN_DECAY_CHANNEL) dg = make(ATTN_F32, s.value_heads, s.dim, s.gap);
    if (!s.states) return;
    std::vector<int64_t> extents = {s.batch, s.value_heads, s.dim, s.value_dim};
    d_s1 = tensor(ATTN_F32, extents, s.gap);
    ds0 = tensor(ATTN_F32, extents, s.gap);
    for (double &x : d_s1.host) x = normal();
    d_s1.upload();
  }

  void release() {
    for (tensor *x :
         {&q, &k, &v, &o, &g, &beta, &s0, &s1, &d_o, &d_s1, &dq, &dk, &dv, &dg, &dbeta, &ds0})
      x->release();
    CHECK(cudaFree(device_offsets));
  }
};

double scale_of(const shape &s) {
  return 1 / sqrt((double)s.dim);
}

/* Fills in the host side of the outputs; of the gradients too when there are any. */
void oracle(data &x) {
  const shape &s = x.s;
  int D = s.dim, E = s.value_dim, group = s.value_heads / s.heads;
  double scale = scale_of(s);
  bool gradients = !x.dq.host.empty(), delta = s.update == ATTN_UPDATE_DELTA;
  for (int b = 0; b < s.batch; ++b)
    for (int h = 0; h < s.value_heads; ++h) {
      int first = x.offsets[b], tokens = x.offsets[b + 1] - first;
      std::vector<std::vector<double>> kept;
      std::vector<double> S(D * E, 0), r(E);
      int64_t state = ((int64_t)b * s.value_heads + h) * D * E;
      if (s.states) std::copy_n(x.s0.host.begin() + state, D * E, S.begin());
      for (int i = 0; i < tokens; ++i) {
        int64_t t = first + i;
        const double *q = &x.q.host[(t * s.heads + h / group) * D];
        const double *k = &x.k.host[(t * s.heads + h / group) * D];
        const double *v = &x.v.host[(t * s.value_heads + h) * E];
        double *o = &x.o.host[(t * s.value_heads + h) * E];
        double beta = delta ? x.beta.host[t * s.value_heads + h] : 1;
        if (gradients) kept.push_back(S);
        for (int e = 0; e < E; ++e) r[e] = v[e];
        for (int c = 0; c < D; ++c) {
          double alpha = exp(x.decay(t, h, c));
          for (int e = 0; e < E; ++e) {
            S[c * E + e] *= alpha;
            if (delta) r[e] -= S[c * E + e] * k[c];
          }
        }
        for (int e = 0; e < E; ++e) o[e] = 0;
        for (int c = 0; c < D; ++c)
          for (int e = 0; e < E; ++e) {
            S[c * E + e] += k[c] * beta * r[e];
            o[e] += scale * S[c * E + e] * q[c];
          }
      }
      if (s.states) std::copy(S.begin(), S.end(), x.s1.host.begin() + state);
      if (!gradients) continue;
      std::vector<double> dS(D * E, 0), T(D * E), u(E), du(E), dr(E);
      if (s.states) std::copy_n(x.d_s1.host.begin() + state, D * E, dS.begin());
      for (int i = tokens - 1; i >= 0; --i) {
        int64_t t = first + i;
        const double *q = &x.q.host[(t * s.heads + h / group) * D];
        const double *k = &x.k.host[(t * s.heads + h / group) * D];
        const double *v = &x.v.host[(t * s.value_heads + h) * E];
        const double *d_o = &x.d_o.host[(t * s.value_heads + h) * E];
        double *dq = &x.dq.host[(t * s.heads + h / group) * D];
        double *dk = &x.dk.host[(t * s.heads + h / group) * D];
        double beta = delta ? x.beta.host[t * s.value_heads + h] : 1, dbeta = 0;
        const std::vector<double> &before = kept[i];
        for (int e = 0; e < E; ++e) r[e] = v[e], du[e] = 0;
        for (int c = 0; c < D; ++c) {
          double alpha = exp(x.decay(t, h, c));
          for (int e = 0; e < E; ++e) {
            T[c * E + e] = alpha * before[c * E + e];
            if (delta) r[e] -= T[c * E + e] * k[c];
          }
        }
        for (int e = 0; e < E; ++e) u[e] = beta * r[e];
        for (int c = 0; c < D; ++c)
          for (int e = 0; e < E; ++e) {
            dq[c] += scale * (T[c * E + e] + k[c] * u[e]) * d_o[e];
            dS[c * E + e] += scale * q[c] * d_o[e];
            dk[c] += dS[c * E + e] * u[e];
            du[e] += dS[c * E + e] * k[c];
          }
        for (int e = 0; e < E; ++e) {
          dbeta += du[e] * r[e];
          dr[e] = beta * du[e];
          x.dv.host[(t * s.value_heads + h) * E + e] = dr[e];
        }
        if (delta) x.dbeta.host[t * s.value_heads + h] = dbeta;
        for (int c = 0; c < D; ++c) {
          double alpha = exp(x.decay(t, h, c)), dg = 0;
          for (int e = 0; e < E; ++e) {
            if (delta) dk[c] -= T[c * E + e] * dr[e], dS[c * E + e] -= k[c] * dr[e];
            dg += dS[c * E + e] * T[c * E + e];
            dS[c * E + e] *= alpha;
          }
          if (s.decay == ATTN_DECAY_HEAD) x.dg.host[h] += dg, x.dg_terms += dg * dg;
          if (s.decay == ATTN_DECAY_TOKEN) x.dg.host[t * s.value_heads + h] += dg;
          if (s.decay == ATTN_DECAY_CHANNEL) x.dg.host[(t * s.value_heads + h) * D + c] = dg;
        }
      }
      if (s.states) std::copy(dS.begin(), dS.end(), x.ds0.host.begin() + state);
    }
}

attn_cuda_device device;

void find_device() {
  cudaDeviceProp found;
  CHECK(cudaGetDeviceProperties(&found, 0));
  device.major = found.major, device.minor = found.minor;
  device.multiprocessors = found.multiProcessorCount;
  device.shared_bytes = found.sharedMemPerBlockOptin;
  device.l2_bytes = found.l2CacheSize;
  device.memory_bytes = found.totalGlobalMem;
  snprintf(device.name, sizeof device.name, "%s", found.name);
}

attn_recurrent_problem problem_of(const shape &s) {
  attn_recurrent_problem p = ATTN_RECURRENT_PROBLEM_INIT;
  p.dtype = s.dtype;
  p.batch = s.batch, p.length = s.length;
  p.heads = s.heads, p.value_heads = s.value_heads;
  p.dim = s.dim, p.value_dim = s.value_dim;
  p.scale = scale_of(s);
  p.decay = s.decay;
  p.update = s.update;
  p.epsilon = 1e-6;
  p.ragged = s.ragged;
  return p;
}

attn_recurrent_args args_of(const data &x) {
  attn_recurrent_args a = {};
  a.q = x.q.device, a.k = x.k.device, a.v = x.v.device, a.o = x.o.device;
  a.decay = x.g.device, a.beta = x.beta.device;
  a.initial_state = x.s0.device, a.final_state = x.s1.device;
  a.offsets = x.s.ragged ? x.device_offsets : NULL;
  a.d_o = x.d_o.device, a.d_final_state = x.d_s1.device;
  a.d_q = x.dq.device, a.d_k = x.dk.device, a.d_v = x.dv.device;
  a.d_decay = x.dg.device, a.d_beta = x.dbeta.device, a.d_initial_state = x.ds0.device;
  return a;
}

void *workspace_of(size_t bytes) {
  void *memory = NULL;
  CHECK(cudaMalloc(&memory, bytes + 256));
  CHECK(cudaMemset(memory, 0xff, bytes + 256));
  return memory;
}

int failures = 0;

/* Of the whole tensor, over its norm, or over that of the terms that its elements are sums of: when
 * those cancel, their errors do not. A NaN anywhere fails. */
double error_of(const tensor &x, double terms) {
  std::vector<double> out = x.download();
  double wrong = 0, norm = 0;
  for (size_t i = 0; i < out.size(); ++i) {
    double d = out[i] - x.host[i];
    wrong += d * d, norm += x.host[i] * x.host[i];
  }
  norm = std::max(norm, terms);
  return norm > 0 ? sqrt(wrong / norm) : sqrt(wrong);
}

void judge(const char *what, const tensor &x, double bound, double terms = 0) {
  if (x.host.empty()) return;
  double error = error_of(x, terms);
  bool good = error < bound;
  if (!good) ++failures;
  printf(" %s %.1e%s", what, error, good ? "" : " FAILED");
}

/* Operands are rounded once on each side of a product, states and scores once more: a few units of
 * 2^-9 (2^-12 of float16) in the norm. Gradients pass through twice as many products. */
double forward_bound(attn_dtype dtype) {
  return dtype == ATTN_BF16 ? 1e-2 : 2e-3;
}
double backward_bound(attn_dtype dtype) {
  return dtype == ATTN_BF16 ? 1.5e-2 : 3e-3;
}

bool prepare_run(const recurrent_algorithm &algorithm, const data &x, attn_cuda_choice &choice) {
  attn_recurrent_problem p = problem_of(x.s);
  attn_recurrent_args a = args_of(x);
  choice = attn_cuda_choice{};
  if (algorithm.plan(&device, &p, &choice) && algorithm.suits(&p, &a)) return true;
  printf(" %s: refused FAILED\n", algorithm.name);
  ++failures;
  return false;
}

void run(const recurrent_algorithm &algorithm, const data &x, const attn_cuda_choice &choice,
         void *workspace) {
  attn_recurrent_problem p = problem_of(x.s);
  attn_recurrent_args a = args_of(x);
  if (algorithm.run(&device, &choice, &p, &a, workspace, 0) == ATTN_OK) return;
  printf(" %s\n", attn_cuda_error());
  exit(1);
}

/* Hopper has kernels of its own for most of the additive rule. */
int major_for(attn_update update) {
  return update == ATTN_UPDATE_DELTA ? device.major : 8;
}

void check_forward(const recurrent_algorithm &algorithm, const data &x) {
  attn_cuda_choice choice;
  if (!prepare_run(algorithm, x, choice)) return;
  void *workspace = workspace_of(choice.workspace_bytes);
  run(algorithm, x, choice, workspace);
  CHECK(cudaDeviceSynchronize());
  std::vector<double> before = x.o.download();
  judge("o", x.o, forward_bound(x.s.dtype));
  judge("state", x.s1, forward_bound(x.s.dtype));
  run(algorithm, x, choice, workspace);
  std::vector<double> again = x.o.download();
  if (memcmp(again.data(), before.data(), before.size() * 8)) {
    printf(" second run differs FAILED");
    ++failures;
  }
  CHECK(cudaFree(workspace));
}

/* What recurrent_delta_sm90.cu is for. */
bool hopper_takes(const shape &s) {
  return s.update == ATTN_UPDATE_DELTA && device.major == 9 && s.value_dim % 64 == 0 &&
         (s.decay != ATTN_DECAY_CHANNEL || s.dtype == ATTN_BF16);
}

/* `form` asks for one of a plan's forms by pretending another number of multiprocessors. */
void check(const shape &s, bool backward, int multiprocessors) {
  data x(s);
  if (backward) x.add_gradients();
  int own = device.multiprocessors, major = device.major;
  device.major = major_for(s.update);
  if (multiprocessors) device.multiprocessors = multiprocessors;
  oracle(x);
  printf("%-12s %s %-6s d%d/%d heads %d/%d b%d n%d%s%s:", s.name,
         s.dtype == ATTN_BF16 ? "bf16" : "f16 ", gate_names[s.gate], s.dim, s.value_dim, s.heads,
         s.value_heads, s.batch, s.length, s.ragged ? " ragged" : "", s.states ? " states" : "");
  attn_cuda_choice choice;
  check_forward(recurrent_chunks_forward, x);
  if (hopper_takes(s)) {
    printf(" | wgmma");
    x.o.poison();
    if (s.states) x.s1.poison();
    check_forward(recurrent_delta_sm90_forward, x);
  }
  if (backward && prepare_run(recurrent_chunks_backward, x, choice)) {
    void *workspace = workspace_of(choice.workspace_bytes);
    run(recurrent_chunks_backward, x, choice, workspace);
    CHECK(cudaDeviceSynchronize());
    std::vector<double> before = x.dk.download();
    double bound = backward_bound(s.dtype);
    judge("| dq", x.dq, bound);
    judge("dk", x.dk, bound);
    judge("dv", x.dv, bound);
    judge("dg", x.dg, bound, x.dg_terms);
    judge("dbeta", x.dbeta, bound);
    judge("ds0", x.ds0, bound);
    run(recurrent_chunks_backward, x, choice, workspace);
    std::vector<double> again = x.dk.download();
    if (memcmp(again.data(), before.data(), before.size() * 8)) {
      printf(" second run differs FAILED");
      ++failures;
    }
    CHECK(cudaFree(workspace));
  }
  printf("\n");
  fflush(stdout);
  device.multiprocessors = own, device.major = major;
  x.release();
}

/* ---- Times ---- */

double median(std::vector<float> times) {
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

template <typename F> double time_of(F work, int repeats) {
  cudaEvent_t from, to;
  CHECK(cudaEventCreate(&from));
  CHECK(cudaEventCreate(&to));
  std::vector<float> times;
  for (int i = 0; i < repeats + 3; ++i) {
    float ms;
    CHECK(cudaEventRecord(from));
    work(i);
    CHECK(cudaEventRecord(to));
    CHECK(cudaEventSynchronize(to));
    CHECK(cudaEventElapsedTime(&ms, from, to));
    if (i >= 3) times.push_back(ms * 1e3f);
  }
  CHECK(cudaEventDestroy(from));
  CHECK(cudaEventDestroy(to));
  return median(times);
}

double copy_rate() { /* bytes a microsecond, read plus written */
  size_t bytes = (size_t)1 << 30;
  char *a, *b;
  CHECK(cudaMalloc(&a, bytes));
  CHECK(cudaMalloc(&b, bytes));
  CHECK(cudaMemset(a, 1, bytes));
  double us = time_of([&](int) { cudaMemcpyAsync(b, a, bytes, cudaMemcpyDeviceToDevice); }, 20);
  CHECK(cudaFree(a));
  CHECK(cudaFree(b));
  return 2.0 * bytes / us;
}

__global__ void fill(void *to, int64_t count, int kind, unsigned seed) {
  for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < count;
       i += (int64_t)gridDim.x * blockDim.x) {
    uint64_t x = (uint64_t)i * 0x9e3779b97f4a7c15ull + seed * 0xbf58476d1ce4e5b9ull;
    x ^= x >> 31, x *= 0x94d049bb133111ebull, x ^= x >> 29;
    float u = (x >> 40) * 0x1p-24f;
    float y = ((x >> 16 & 0xffffff) * 0x1p-24f + u - 1) * 2.45f;              /* variance 1 */
    if (kind == 0) ((__nv_bfloat16 *)to)[i] = __float2bfloat16(y * 0.08838f); /* norm 1 in 128 */
    if (kind == 1) ((__nv_bfloat16 *)to)[i] = __float2bfloat16(y);
    if (kind == 2) ((float *)to)[i] = -log1pf(expf(-y));
    if (kind == 3) ((float *)to)[i] = u;
  }
}

attn_tensor device_tensor(attn_dtype dtype, std::vector<int64_t> extents, int kind, unsigned seed) {
  attn_tensor x = {};
  x.dtype = dtype;
  x.rank = (int)extents.size();
  int64_t stride = 1;
  for (int i = x.rank - 1; i >= 0; --i)
    x.shape[i] = extents[i], x.stride[i] = stride, stride *= extents[i];
  CHECK(cudaMalloc(&x.data, stride * (dtype == ATTN_F32 ? 4 : 2)));
  fill<<<1024, 256>>>(x.data, stride, kind, seed);
  return x;
}

const char *name_of(attn_update update, attn_decay decay) {
  bool delta = update == ATTN_UPDATE_DELTA;
  switch (decay) {
  case ATTN_DECAY_CHANNEL: return delta ? "kda" : "gla";
  case ATTN_DECAY_TOKEN: return delta ? "gdn" : "mamba2";
  case ATTN_DECAY_HEAD: return delta ? "delta" : "lightning";
  default: return delta ? "deltanet" : "linear";
  }
}

void bench(attn_update update, attn_decay decay, int length, double rate) {
  const int tokens = 65536, heads = 16, dim = 128, sets = 2;
  shape s = {"",    ATTN_BF16, update, decay, USUAL, tokens / length, length,
             heads, heads,     dim,    dim,   false, false,           0};
  int major = device.major;
  device.major = major_for(update);
  attn_recurrent_problem p = problem_of(s);
  attn_recurrent_args args[sets] = {};
  int64_t batch = tokens / length;
  unsigned seed = 1;
  for (attn_recurrent_args &a : args) {
    a.q = device_tensor(ATTN_BF16, {batch, length, heads, dim}, 0, seed++);
    a.k = device_tensor(ATTN_BF16, {batch, length, heads, dim}, 0, seed++);
    for (attn_tensor *x : {&a.v, &a.o, &a.d_o, &a.d_q, &a.d_k, &a.d_v})
      *x = device_tensor(ATTN_BF16, {batch, length, heads, dim}, 1, seed++);
    for (attn_tensor *x : {&a.decay, &a.d_decay})
      if (decay == ATTN_DECAY_CHANNEL)
        *x = device_tensor(ATTN_F32, {batch, length, heads, dim}, 2, seed++);
      else if (decay == ATTN_DECAY_TOKEN)
        *x = device_tensor(ATTN_F32, {batch, length, heads}, 2, seed++);
    if (decay == ATTN_DECAY_HEAD) a.decay = device_tensor(ATTN_F32, {heads}, 2, seed++);
    for (attn_tensor *x : {&a.beta, &a.d_beta})
      *x = device_tensor(ATTN_F32, {batch, length, heads}, 3, seed++);
  }
  double row = (double)tokens * heads * dim, gates = decay == ATTN_DECAY_CHANNEL ? row * 4 : 0;
  const recurrent_algorithm *passes[] = {&recurrent_delta_sm90_forward, &recurrent_chunks_forward,
                                         &recurrent_chunks_backward};
  for (const recurrent_algorithm *algorithm : passes) {
    bool backward = algorithm->pass == ATTN_PASS_BACKWARD;
    attn_cuda_choice choice = {};
    if (!algorithm->plan(&device, &p, &choice)) continue;
    void *workspace = workspace_of(choice.workspace_bytes);
    double us = time_of(
        [&](int i) {
          if (algorithm->run(&device, &choice, &p, &args[i % sets], workspace, 0) != ATTN_OK)
            printf("%s\n", attn_cuda_error()), exit(1);
        },
        backward ? 7 : 15);
    double bytes = backward ? row * 2 * 7 + 2 * gates : row * 2 * 4 + gates;
    printf("%-9s N=%-5d %-8s %8.1f us, floor %6.1f us (%4.1f%% of copy), %5.0f MB extra: %s\n",
           name_of(update, decay), length, backward ? "backward" : "forward", us, bytes / rate,
           100 * bytes / rate / us, choice.workspace_bytes * 1e-6, choice.description);
    fflush(stdout);
    CHECK(cudaFree(workspace));
  }
  for (attn_recurrent_args &a : args)
    for (attn_tensor *x : {&a.q, &a.k, &a.v, &a.o, &a.d_o, &a.d_q, &a.d_k, &a.d_v, &a.decay,
                           &a.d_decay, &a.beta, &a.d_beta})
      if (x->data) CHECK(cudaFree(x->data));
  device.major = major;
}

} // namespace

int main(int count, char **words) {
  find_device();
  printf("%s\n", device.name);
  const attn_update DELTA = ATTN_UPDATE_DELTA, ADDITIVE = ATTN_UPDATE_ADDITIVE;
  const attn_decay NONE = ATTN_DECAY_NONE, HEAD = ATTN_DECAY_HEAD, TOKEN = ATTN_DECAY_TOKEN;
  const attn_decay CHANNEL = ATTN_DECAY_CHANNEL;
  /* bench [gdn|kda|lightning|gla [length]], or how the names of the shapes to check begin */
  if (count > 1 && !strcmp(words[1], "bench")) {
    double rate = copy_rate();
    printf("copy %.2f TB/s\n", rate * 1e-6);
    struct {
      attn_update update;
      attn_decay decay;
    } const rules[] = {{DELTA, TOKEN}, {DELTA, CHANNEL}, {ADDITIVE, HEAD}, {ADDITIVE, CHANNEL}};
    for (auto rule : rules)
      for (int length : {1024, 4096, 8192, 65536}) {
        if (count > 2 && strcmp(words[2], name_of(rule.update, rule.decay))) continue;
        if (count > 3 && atoi(words[3]) != length) continue;
        bench(rule.update, rule.decay, length, rate);
      }
    return 0;
  }
  const shape shapes[] = {
      {"one chunk", ATTN_BF16, DELTA, TOKEN, MILD, 1, 64, 1, 1, 128, 128, false, false, 0},
      {"one chunk", ATTN_BF16, DELTA, CHANNEL, MILD, 1, 64, 1, 1, 128, 128, false, false, 0},
      {"gdn", ATTN_BF16, DELTA, TOKEN, MILD, 2, 200, 2, 2, 128, 128, false, true, 0},
      {"gdn", ATTN_BF16, DELTA, TOKEN, STRONG, 1, 256, 2, 2, 128, 128, false, true, 0},
      {"gdn", ATTN_BF16, DELTA, TOKEN, MIXED, 2, 131, 2, 2, 64, 128, false, true, 0},
      {"gdn grouped", ATTN_BF16, DELTA, TOKEN, USUAL, 2, 150, 2, 6, 128, 64, false, true, 8},
      {"gdn ragged", ATTN_BF16, DELTA, TOKEN, MILD, 6, 190, 1, 2, 128, 128, true, true, 0},
      {"gdn", ATTN_F16, DELTA, TOKEN, USUAL, 2, 200, 2, 2, 128, 128, false, true, 0},
      {"gdn", ATTN_F16, DELTA, TOKEN, MIXED, 1, 200, 2, 2, 64, 64, false, true, 8},
      {"deltanet", ATTN_BF16, DELTA, NONE, MILD, 2, 333, 1, 1, 128, 128, false, true, 0},
      {"deltanet", ATTN_F16, DELTA, NONE, MILD, 1, 333, 1, 1, 64, 64, false, false, 0},
      {"head decay", ATTN_BF16, DELTA, HEAD, MILD, 1, 100, 1, 2, 64, 64, false, true, 0},
      {"kda", ATTN_BF16, DELTA, CHANNEL, MILD, 2, 200, 2, 2, 128, 128, false, true, 0},
      {"kda", ATTN_BF16, DELTA, CHANNEL, STRONG, 1, 256, 2, 2, 128, 128, false, true, 0},
      {"kda", ATTN_BF16, DELTA, CHANNEL, MIXED, 2, 131, 2, 2, 64, 128, false, true, 0},
      {"kda", ATTN_BF16, DELTA, CHANNEL, MIXED, 1, 256, 2, 2, 128, 128, false, true, 8},
      {"kda grouped", ATTN_BF16, DELTA, CHANNEL, USUAL, 2, 150, 2, 6, 128, 64, false, true, 8},
      {"kda ragged", ATTN_BF16, DELTA, CHANNEL, USUAL, 6, 190, 1, 2, 128, 128, true, true, 0},
      {"kda", ATTN_F16, DELTA, CHANNEL, USUAL, 2, 200, 2, 2, 128, 128, false, true, 0},
      {"kda", ATTN_F16, DELTA, CHANNEL, MIXED, 1, 200, 2, 2, 64, 64, false, true, 8},
      {"kda wide", ATTN_BF16, DELTA, CHANNEL, USUAL, 1, 100, 1, 1, 128, 256, false, true, 0},
      {"gdn narrow", ATTN_F16, DELTA, TOKEN, USUAL, 1, 100, 2, 2, 64, 48, false, true, 0},
      {"short", ATTN_BF16, DELTA, CHANNEL, USUAL, 3, 17, 2, 2, 128, 128, false, true, 0},
      {"linear", ATTN_BF16, ADDITIVE, NONE, MILD, 2, 200, 2, 2, 128, 128, false, true, 0},
      {"linear", ATTN_F16, ADDITIVE, NONE, MILD, 1, 333, 1, 2, 64, 64, false, false, 8},
      {"lightning", ATTN_BF16, ADDITIVE, HEAD, MILD, 2, 300, 2, 4, 128, 128, false, true, 0},
      {"lightning", ATTN_BF16, ADDITIVE, HEAD, STRONG, 6, 190, 3, 3, 128, 64, true, true, 0},
      {"lightning", ATTN_F16, ADDITIVE, HEAD, USUAL, 1, 100, 2, 2, 64, 48, false, true, 0},
      {"mamba2", ATTN_BF16, ADDITIVE, TOKEN, MIXED, 1, 256, 2, 2, 128, 128, false, true, 8},
      {"mamba2", ATTN_BF16, ADDITIVE, TOKEN, STRONG, 6, 190, 1, 3, 64, 128, true, true, 0},
      {"mamba2", ATTN_F16, ADDITIVE, TOKEN, USUAL, 2, 131, 2, 2, 128, 128, false, true, 0},
      {"gla", ATTN_BF16, ADDITIVE, CHANNEL, MILD, 2, 200, 2, 2, 128, 128, false, true, 0},
      {"gla", ATTN_BF16, ADDITIVE, CHANNEL, STRONG, 1, 256, 2, 2, 128, 128, false, true, 0},
      {"gla", ATTN_BF16, ADDITIVE, CHANNEL, MIXED, 2, 131, 2, 2, 64, 128, false, true, 8},
      {"gla", ATTN_BF16, ADDITIVE, CHANNEL, MIXED, 1, 256, 2, 2, 128, 128, false, true, 0},
      {"gla grouped", ATTN_BF16, ADDITIVE, CHANNEL, USUAL, 2, 150, 2, 6, 128, 64, false, true, 8},
      {"gla ragged", ATTN_BF16, ADDITIVE, CHANNEL, USUAL, 6, 190, 1, 2, 128, 128, true, true, 0},
      {"gla", ATTN_F16, ADDITIVE, CHANNEL, USUAL, 2, 200, 2, 2, 128, 128, false, true, 0},
      {"gla", ATTN_F16, ADDITIVE, CHANNEL, MIXED, 1, 200, 2, 2, 64, 64, false, true, 8},
      {"gla wide", ATTN_BF16, ADDITIVE, CHANNEL, USUAL, 1, 100, 1, 1, 128, 256, false, true, 0},
      {"gla narrow", ATTN_BF16, ADDITIVE, CHANNEL, USUAL, 3, 17, 2, 2, 64, 48, false, false, 0},
  };
  /* With one multiprocessor every pair of sequence and head gets a block; with many, the columns
   * of one are split. */
  for (int multiprocessors : {1, 1000})
    for (const shape &s : shapes)
      if (count < 2 || !strncmp(s.name, words[1], strlen(words[1])))
        check(s, multiprocessors == 1, multiprocessors);
  printf(failures ? "%d FAILED\n" : "all good\n", failures);
  return failures != 0;
}
