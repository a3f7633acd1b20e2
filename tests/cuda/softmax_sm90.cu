/* Checks and times the softmax engine's algorithms for Hopper.
 *
 *   softmax_sm90               every kind of shape against a float64 loop over the equations
 *   softmax_sm90 bench [dim]   times of 65 536 tokens, bfloat16; FLOPs of causal rows count half
 *
 * The oracle: s_ij = scale q_i . k_j for keys seen, p = softmax(s), o = p v; the gradient
 * dv_j = sum_i p_ij do_i, ds_ij = p_ij (do_i . v_j - do_i . o_i), dq = scale ds k, dk = scale ds^T
 * q. Outputs of bfloat16 are compared with 1e-2, of float16 with 2e-3: rounding o alone to bfloat16
 * gives 1.7e-3, rounding p (and ds) to bfloat16 before their products a little more. */
#include "kernels/cuda/common.cuh"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

extern const softmax_algorithm softmax_sm90_forward, softmax_sm90_backward;

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

static uint16_t to_half(attn_dtype dtype, double x) {
  uint16_t bits;
  if (dtype == ATTN_BF16) {
    __nv_bfloat16 y = __float2bfloat16((float)x);
    memcpy(&bits, &y, 2);
  } else {
    __half y = __float2half((float)x);
    memcpy(&bits, &y, 2);
  }
  return bits;
}

static double from_half(attn_dtype dtype, uint16_t bits) {
  if (dtype == ATTN_BF16) {
    __nv_bfloat16 y;
    memcpy(&y, &bits, 2);
    return __bfloat162float(y);
  }
  __half y;
  memcpy(&y, &bits, 2);
  return __half2float(y);
}

/* A tensor on the device and its values in double, row-major. Rows of [heads, dim] are `gap`
 * elements longer than needed, and the gaps are poison, all bits set, and stay so. */
struct sample {
  attn_tensor tensor{};
  std::vector<double> values;
  std::vector<uint8_t> bytes;
  size_t size = 2;

  void make(attn_dtype dtype, std::vector<int64_t> shape, int64_t gap) {
    size = dtype == ATTN_F32 ? 4 : 2;
    tensor.dtype = dtype;
    tensor.device = {ATTN_CUDA, 0};
    tensor.rank = (int)shape.size();
    int64_t stride = 1, count = 1;
    for (int i = tensor.rank - 1; i >= 0; i--) {
      tensor.shape[i] = shape[i], tensor.stride[i] = stride;
      stride = (stride + (i == tensor.rank - 1 ? gap : 0)) * shape[i], count *= shape[i];
      if (i == tensor.rank - 1) stride = shape[i] + gap;
    }
    bytes.assign((size_t)stride * size, 0xff);
    values.assign((size_t)count, 0);
    CUDA(cudaMalloc(&tensor.data, bytes.size()));
    upload();
  }
  size_t offset(size_t i) const {
    size_t at = 0;
    for (int axis = tensor.rank - 1; axis >= 0; axis--) {
      at += i % tensor.shape[axis] * tensor.stride[axis];
      i /= tensor.shape[axis];
    }
    return at;
  }
  void upload() {
    CUDA(cudaMemcpy(tensor.data, bytes.data(), bytes.size(), cudaMemcpyHostToDevice));
  }
  void fill(double deviation) {
    for (size_t i = 0; i < values.size(); i++) {
      uint16_t bits = to_half(tensor.dtype, deviation * normal());
      values[i] = from_half(tensor.dtype, bits);
      memcpy(&bytes[offset(i) * 2], &bits, 2);
    }
    upload();
  }
  /* Values from the device; the gaps must be as they were. */
  void download(const char *name) {
    std::vector<uint8_t> now(bytes.size());
    CUDA(cudaMemcpy(now.data(), tensor.data, now.size(), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < values.size(); i++) {
      uint8_t *at = &now[offset(i) * size];
      if (size == 4) {
        float x;
        memcpy(&x, at, 4);
        values[i] = x;
      } else {
        uint16_t bits;
        memcpy(&bits, at, 2);
        values[i] = from_half(tensor.dtype, bits);
      }
      memset(at, 0xff, size);
    }
    for (uint8_t byte : now)
      if (byte != 0xff) {
        printf(" %s: written outside the tensor", name);
        failures++;
        break;
      }
  }
  void poison() {
    std::fill(bytes.begin(), bytes.end(), 0xff);
    upload();
  }
  ~sample() {
    cudaFree(tensor.data);
  }
};

struct setting {
  const char *name;
  attn_dtype dtype;
  int64_t batch, query_length, key_length, heads, kv_heads, dim;
  bool causal;
  int64_t left, right;
  std::vector<int> queries, keys; /* lengths when ragged */
  std::vector<int> key_lengths;
  int64_t gap;
  int rows; /* > 0: only so many rows of o and dq are checked; dk and dv repeat bit by bit */
};

static void compare(const char *name, const std::vector<double> &got,
                    const std::vector<double> &expected, double bound) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < got.size(); i++) {
    if (std::isinf(expected[i]) && got[i] == expected[i]) continue;
    error += (got[i] - expected[i]) * (got[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  error = norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
  printf(" %s %.1e", name, error);
  if (!(error < bound)) {
    printf(" (expected < %.0e)", bound);
    failures++;
  }
}

static void check(const setting &c) {
  const bool ragged = !c.queries.empty();
  attn_softmax_problem problem{};
  problem.struct_size = sizeof problem;
  problem.dtype = c.dtype;
  problem.passes = ATTN_PASS_FORWARD | ATTN_PASS_BACKWARD;
  problem.batch = c.batch, problem.query_length = c.query_length;
  problem.key_length = c.key_length, problem.heads = c.heads, problem.kv_heads = c.kv_heads;
  problem.dim = problem.value_dim = c.dim;
  problem.scale = 1 / std::sqrt((double)c.dim);
  problem.causal = c.causal, problem.window_left = c.left, problem.window_right = c.right;
  problem.ragged = ragged;
  std::vector<int> query_offsets(1, 0), key_offsets(1, 0);
  for (int n : c.queries) query_offsets.push_back(query_offsets.back() + n);
  for (int n : c.keys) key_offsets.push_back(key_offsets.back() + n);
  const int64_t heads = c.heads, kv_heads = c.kv_heads, dim = c.dim;

  auto shape = [&](bool query, int64_t h) {
    if (ragged)
      return std::vector<int64_t>{query ? query_offsets.back() : key_offsets.back(), h, dim};
    return std::vector<int64_t>{c.batch, query ? c.query_length : c.key_length, h, dim};
  };
  sample q, k, v, o, lse, d_o, d_q, d_k, d_v;
  q.make(c.dtype, shape(true, heads), c.gap), k.make(c.dtype, shape(false, kv_heads), c.gap);
  v.make(c.dtype, shape(false, kv_heads), c.gap), o.make(c.dtype, shape(true, heads), c.gap);
  d_o.make(c.dtype, shape(true, heads), c.gap), d_q.make(c.dtype, shape(true, heads), c.gap);
  d_k.make(c.dtype, shape(false, kv_heads), c.gap),
      d_v.make(c.dtype, shape(false, kv_heads), c.gap);
  if (ragged)
    lse.make(ATTN_F32, {heads, query_offsets.back()}, 0);
  else
    lse.make(ATTN_F32, {c.batch, heads, c.query_length}, 0);
  q.fill(2), k.fill(1), v.fill(1), d_o.fill(1);

  int32_t *offsets = NULL;
  CUDA(cudaMalloc(&offsets, 3 * 4 * (c.batch + 1)));
  attn_softmax_args args{};
  args.q = q.tensor, args.k = k.tensor, args.v = v.tensor, args.o = o.tensor;
  args.lse = lse.tensor, args.d_o = d_o.tensor, args.d_q = d_q.tensor;
  args.d_k = d_k.tensor, args.d_v = d_v.tensor;
  if (ragged) {
    CUDA(cudaMemcpy(offsets, query_offsets.data(), 4 * (c.batch + 1), cudaMemcpyHostToDevice));
    CUDA(cudaMemcpy(offsets + c.batch + 1, key_offsets.data(), 4 * (c.batch + 1),
                    cudaMemcpyHostToDevice));
    args.query_offsets = offsets, args.key_offsets = offsets + c.batch + 1;
  }
  if (!c.key_lengths.empty()) {
    CUDA(cudaMemcpy(offsets + 2 * (c.batch + 1), c.key_lengths.data(), 4 * c.batch,
                    cudaMemcpyHostToDevice));
    args.key_lengths = offsets + 2 * (c.batch + 1);
    /* Keys and values that are not in use are NaN. */
    for (sample *s : {&k, &v}) {
      for (size_t i = 0; i < s->values.size(); i++) {
        int64_t j = i / (kv_heads * dim) % c.key_length, b = i / (kv_heads * dim) / c.key_length;
        if (j >= c.key_lengths[b]) memset(&s->bytes[s->offset(i) * 2], 0xff, 2);
      }
      s->upload();
    }
  }

  printf("%-34s", c.name);
  const double bound = c.dtype == ATTN_BF16 ? 1e-2 : 2e-3;
  std::vector<double> first[5];
  for (int pass = 0; pass < 2; pass++) {
#ifdef FORWARD_ONLY
    if (pass) continue;
    const softmax_algorithm *algorithm = &softmax_sm90_forward;
#else
    const softmax_algorithm *algorithm = pass ? &softmax_sm90_backward : &softmax_sm90_forward;
#endif
    attn_cuda_choice choice{};
    if (!algorithm->plan(&device, &problem, &choice) || !algorithm->suits(&problem, &args)) {
      printf(" %s: refused\n", algorithm->name);
      failures++;
      return;
    }
    void *workspace = NULL;
    CUDA(cudaMalloc(&workspace, choice.workspace_bytes + 256));
    /* The bits must be the same every time. */
    for (int repeat = 0; repeat < (c.rows ? 3 : 2); repeat++) {
      CUDA(cudaMemset(workspace, 0xff, choice.workspace_bytes + 256));
      for (sample *s : {&o, &lse})
        if (!pass) s->poison();
      for (sample *s : {&d_q, &d_k, &d_v})
        if (pass) s->poison();
      if (algorithm->run(&device, &choice, &problem, &args, workspace, 0) != ATTN_OK) {
        printf(" %s\n", attn_cuda_error());
        failures++;
        return;
      }
      CUDA(cudaDeviceSynchronize());
      std::vector<uint8_t> after(256);
      CUDA(cudaMemcpy(after.data(), (char *)workspace + choice.workspace_bytes, 256,
                      cudaMemcpyDeviceToHost));
      for (uint8_t byte : after)
        if (byte != 0xff) {
          printf(" written after the workspace");
          failures++;
          break;
        }
      sample *results[5] = {&o, &lse, &d_q, &d_k, &d_v};
      for (int i = pass ? 2 : 0; i < (pass ? 5 : 2); i++) {
        results[i]->download("output");
        if (repeat && memcmp(first[i].data(), results[i]->values.data(), 8 * first[i].size())) {
          printf(" output %d differs from before", i);
          failures++;
        }
        first[i] = results[i]->values;
      }
    }
    cudaFree(workspace);
  }

  /* The oracle. */
  std::vector<double> eo(o.values.size()), elses(lse.values.size());
  std::vector<double> edq(q.values.size()), edk(k.values.size()), edv(v.values.size());
  std::vector<double> got_o, got_lse, got_dq, want_o, want_lse, want_dq;
  for (int64_t b = 0; b < c.batch; b++) {
    const int64_t nq = ragged ? c.queries[b] : c.query_length;
    const int64_t nk = ragged ? c.keys[b] : c.key_lengths.empty() ? c.key_length : c.key_lengths[b];
    const int64_t q0 = ragged ? query_offsets[b] : b * c.query_length;
    const int64_t k0 = ragged ? key_offsets[b] : b * c.key_length;
    std::vector<double> p(nk), dp(nk);
    for (int64_t h = 0; h < heads; h++) {
      const int64_t kh = h / (heads / kv_heads);
      for (int64_t i = 0; i < nq; i++) {
        if (c.rows && uniform() * (double)(c.batch * heads * nq) > c.rows && i != nq - 1) continue;
        const double *qi = &q.values[((q0 + i) * heads + h) * dim];
        const double *doi = &d_o.values[((q0 + i) * heads + h) * dim];
        double *oi = &eo[((q0 + i) * heads + h) * dim], *dqi = &edq[((q0 + i) * heads + h) * dim];
        const int64_t at = i + nk - nq;
        int64_t low = 0, high = nk; /* keys [low, high) */
        if (c.left >= 0) low = std::max(low, at - c.left);
        if (c.right >= 0) high = std::min(high, at + c.right + 1);
        if (c.causal) high = std::min(high, at + 1);
        double top = -INFINITY, sum = 0;
        for (int64_t j = low; j < high; j++) {
          double s = 0;
          for (int64_t d = 0; d < dim; d++)
            s += qi[d] * k.values[((k0 + j) * kv_heads + kh) * dim + d];
          p[j] = s * problem.scale;
          top = std::max(top, p[j]);
        }
        for (int64_t j = low; j < high; j++) sum += std::exp(p[j] - top);
        const double l = low < high ? top + std::log(sum) : -INFINITY;
        double *li = &elses[ragged ? h * query_offsets.back() + q0 + i : (b * heads + h) * nq + i];
        *li = l;
        for (int64_t j = low; j < high; j++) {
          p[j] = std::exp(p[j] - l);
          for (int64_t d = 0; d < dim; d++)
            oi[d] += p[j] * v.values[((k0 + j) * kv_heads + kh) * dim + d];
        }
        if (c.rows) {
          want_lse.push_back(l), got_lse.push_back(lse.values[li - elses.data()]);
          for (int64_t d = 0; d < dim; d++)
            want_o.push_back(oi[d]), got_o.push_back(o.values[oi - eo.data() + d]);
        }
        double delta = 0;
        for (int64_t d = 0; d < dim; d++) delta += doi[d] * oi[d];
        for (int64_t j = low; j < high; j++) {
          const int64_t at_key = ((k0 + j) * kv_heads + kh) * dim;
          double dpj = 0;
          for (int64_t d = 0; d < dim; d++) dpj += doi[d] * v.values[at_key + d];
          const double ds = problem.scale * p[j] * (dpj - delta);
          for (int64_t d = 0; d < dim; d++) {
            dqi[d] += ds * k.values[at_key + d];
            edk[at_key + d] += ds * qi[d];
            edv[at_key + d] += p[j] * doi[d];
          }
        }
        for (int64_t d = 0; d < dim && c.rows; d++)
          want_dq.push_back(dqi[d]), got_dq.push_back(d_q.values[dqi - edq.data() + d]);
      }
    }
  }
  if (c.rows) {
    compare("o", got_o, want_o, bound), compare("lse", got_lse, want_lse, 1e-5);
#ifndef FORWARD_ONLY
    compare("dq", got_dq, want_dq, bound);
#endif
    printf("\n");
    cudaFree(offsets);
    return;
  }
  compare("o", o.values, eo, bound), compare("lse", lse.values, elses, 1e-5);
#ifndef FORWARD_ONLY
  compare("dq", d_q.values, edq, bound), compare("dk", d_k.values, edk, bound);
  compare("dv", d_v.values, edv, bound);
#endif
  printf("\n");
  cudaFree(offsets);
}

static void checks(const char *only) {
  const attn_dtype B = ATTN_BF16, H = ATTN_F16;
  const setting settings[] = {
      {"full, 1 block", B, 1, 128, 128, 1, 1, 128, false, -1, -1, {}, {}, {}, 0, 0},
      {"full, blocks", B, 2, 256, 512, 2, 2, 128, false, -1, -1, {}, {}, {}, 0, 0},
      {"causal, blocks", B, 2, 512, 512, 2, 2, 128, true, -1, -1, {}, {}, {}, 0, 0},
      {"causal, float16", H, 1, 320, 320, 2, 2, 128, true, -1, -1, {}, {}, {}, 0, 0},
      {"full, odd, grouped, gaps", B, 2, 201, 333, 4, 2, 128, false, -1, -1, {}, {}, {}, 8, 0},
      {"causal, odd, grouped, gaps", H, 2, 301, 333, 6, 2, 128, true, -1, -1, {}, {}, {}, 8, 0},
      {"causal, more queries than keys", B, 1, 400, 150, 2, 1, 128, true, -1, -1, {}, {}, {}, 0, 0},
      {"causal, 17 queries, 700 keys", B, 1, 17, 700, 2, 1, 128, true, -1, -1, {}, {}, {}, 0, 0},
      {"1 key", B, 1, 40, 1, 2, 1, 128, false, -1, -1, {}, {}, {}, 0, 0},
      {"window left 100, causal", B, 1, 700, 700, 2, 2, 128, true, 100, -1, {}, {}, {}, 0, 0},
      {"window 70, 33", B, 1, 500, 550, 2, 1, 128, false, 70, 33, {}, {}, {}, 0, 0},
      {"window 300, 0, float16", H, 1, 900, 900, 1, 1, 128, false, 300, 0, {}, {}, {}, 0, 0},
      {"ragged, causal",
       B,
       4,
       300,
       300,
       2,
       2,
       128,
       true,
       -1,
       -1,
       {300, 1, 64, 129},
       {300, 1, 64, 129},
       {},
       0,
       0},
      {"ragged, full, grouped",
       H,
       4,
       200,
       260,
       4,
       2,
       128,
       false,
       -1,
       -1,
       {200, 0, 130, 3},
       {260, 5, 0, 140},
       {},
       8,
       0},
      {"key lengths", B, 3, 150, 400, 2, 1, 128, true, -1, -1, {}, {}, {400, 150, 37}, 0, 0},
      {"dim 64, causal", B, 2, 500, 500, 2, 2, 64, true, -1, -1, {}, {}, {}, 0, 0},
      {"dim 64, full, grouped, gaps", H, 2, 333, 270, 4, 2, 64, false, -1, -1, {}, {}, {}, 8, 0},
      {"dim 64, ragged, causal",
       B,
       3,
       300,
       300,
       2,
       1,
       64,
       true,
       -1,
       -1,
       {300, 77, 192},
       {300, 77, 192},
       {},
       0,
       0},
      {"ragged, window 90, 40, grouped",
       B,
       5,
       420,
       500,
       6,
       2,
       128,
       false,
       90,
       40,
       {420, 1, 0, 129, 257},
       {300, 500, 64, 0, 256},
       {},
       0,
       0},
      {"ragged, causal, more queries than keys",
       H,
       3,
       500,
       200,
       2,
       1,
       128,
       true,
       -1,
       -1,
       {500, 131, 64},
       {200, 130, 1},
       {},
       8,
       0},
      {"key lengths, full, window 200, 100",
       H,
       4,
       333,
       700,
       2,
       1,
       128,
       false,
       200,
       100,
       {},
       {},
       {700, 0, 333, 129},
       0,
       0},
      {"causal, 520, 8 share a key head",
       B,
       1,
       520,
       520,
       8,
       1,
       128,
       true,
       -1,
       -1,
       {},
       {},
       {},
       0,
       0},
      {"window 1, 0", B, 1, 513, 513, 2, 1, 128, false, 1, 0, {}, {}, {}, 0, 0},
      {"dim 64, window 300, 5", H, 2, 650, 700, 4, 2, 64, false, 300, 5, {}, {}, {}, 0, 0},
      {"causal, 1300", B, 1, 1300, 1300, 1, 1, 128, true, -1, -1, {}, {}, {}, 0, 0},
      {"causal, 3000, 16 heads", B, 1, 3000, 3000, 16, 4, 128, true, -1, -1, {}, {}, {}, 0, 60},
      {"causal, 5000, window 900", B, 1, 5000, 5000, 6, 2, 128, true, 900, -1, {}, {}, {}, 0, 40},
      {"causal, 18000, 1 head", B, 1, 18000, 18000, 1, 1, 128, true, -1, -1, {}, {}, {}, 0, 10},
      {"causal, 1000 queries, 3000 keys",
       B,
       2,
       1000,
       3000,
       8,
       1,
       128,
       true,
       -1,
       -1,
       {},
       {},
       {},
       0,
       40},
      {"dim 64, causal, 3000, 8 heads",
       H,
       1,
       3000,
       3000,
       8,
       4,
       64,
       true,
       -1,
       -1,
       {},
       {},
       {},
       0,
       40},
      {"full, 20 x 130, 16 heads", H, 20, 130, 130, 16, 16, 128, false, -1, -1, {}, {}, {}, 0, 40},
      {"full, 2500, 8 heads", H, 1, 2500, 2500, 8, 8, 128, false, -1, -1, {}, {}, {}, 0, 40},
  };
  for (const setting &c : settings)
    if (!only || !strncmp(c.name, only, strlen(only))) check(c);
}

__global__ static void randomise(__nv_bfloat16 *data, size_t count, uint32_t seed) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count;
       i += (size_t)gridDim.x * blockDim.x) {
    float sum = 0;
    for (int j = 0; j < 4; j++) { /* nearly normal: a sum of uniform numbers */
      uint32_t x = (uint32_t)(i * 4 + j) * 2654435761u + seed;
      x ^= x >> 16, x *= 0x85ebca6bu, x ^= x >> 13, x *= 0xc2b2ae35u, x ^= x >> 16;
      sum += (float)x * 2.3283064e-10f - 0.5f;
    }
    data[i] = __float2bfloat16(sum * 1.732f);
  }
}

static void bench(int dim, const char *passes) {
  const int64_t tokens = 65536, heads = 2048 / dim, count = tokens * heads * dim;
  __nv_bfloat16 *buffers[8];
  for (int i = 0; i < 8; i++) {
    CUDA(cudaMalloc(&buffers[i], count * 2));
    randomise<<<1024, 256>>>(buffers[i], count, i * 7919u);
  }
  float *lse;
  CUDA(cudaMalloc(&lse, tokens * heads * 4));
  cudaEvent_t begin, end;
  CUDA(cudaEventCreate(&begin));
  CUDA(cudaEventCreate(&end));
  CUDA(cudaDeviceSynchronize());
  std::vector<float> times;
  auto median = [&](auto run) {
    times.clear();
    float total = 0;
    for (int i = 0; i < 60 && (i < 6 || total < 400); i++) {
      CUDA(cudaEventRecord(begin));
      run();
      CUDA(cudaEventRecord(end));
      CUDA(cudaEventSynchronize(end));
      float ms;
      CUDA(cudaEventElapsedTime(&ms, begin, end));
      total += ms;
      if (i >= 2) times.push_back(ms);
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2] * 1e-3;
  };
  double copy = median(
      [&] { CUDA(cudaMemcpyAsync(buffers[7], buffers[0], count * 2, cudaMemcpyDeviceToDevice)); });
  copy = 4.0 * count / copy;
  printf("copy %.2f TB/s, dim %d, %d heads\n", copy * 1e-12, dim, (int)heads);
  for (int backward = 0; backward < 2; backward++) {
#ifdef FORWARD_ONLY
    if (backward) continue;
    const softmax_algorithm *algorithm = &softmax_sm90_forward;
#else
    const softmax_algorithm *algorithm = backward ? &softmax_sm90_backward : &softmax_sm90_forward;
#endif
    if (!strchr(passes, backward ? 'b' : 'f')) continue;
    for (int causal = 1; causal >= 0; causal--)
      for (int64_t n = 1024; n <= 16384; n *= 4) {
        attn_softmax_problem problem{};
        problem.struct_size = sizeof problem;
        problem.dtype = ATTN_BF16, problem.passes = ATTN_PASS_FORWARD | ATTN_PASS_BACKWARD;
        problem.batch = tokens / n, problem.query_length = problem.key_length = n;
        problem.heads = problem.kv_heads = heads, problem.dim = problem.value_dim = dim;
        problem.scale = 1 / std::sqrt((double)dim), problem.causal = causal;
        problem.window_left = problem.window_right = -1;
        attn_tensor tensors[8]{};
        for (int i = 0; i < 8; i++)
          tensors[i] = {buffers[i],
                        ATTN_BF16,
                        {ATTN_CUDA, 0},
                        4,
                        {tokens / n, n, heads, dim},
                        {n * heads * dim, heads * dim, dim, 1}};
        attn_softmax_args args{};
        args.q = tensors[0], args.k = tensors[1], args.v = tensors[2], args.o = tensors[3];
        args.d_o = tensors[4], args.d_q = tensors[5], args.d_k = tensors[6], args.d_v = tensors[7];
        args.lse = {lse, ATTN_F32, {ATTN_CUDA, 0}, 3, {tokens / n, heads, n}, {heads * n, n, 1}};
        attn_cuda_choice choice{};
        if (backward) { /* its o and lse */
          softmax_sm90_forward.plan(&device, &problem, &choice);
          void *workspace;
          CUDA(cudaMalloc(&workspace, choice.workspace_bytes));
          softmax_sm90_forward.run(&device, &choice, &problem, &args, workspace, 0);
          CUDA(cudaDeviceSynchronize());
          cudaFree(workspace);
        }
        choice = {};
        if (!algorithm->plan(&device, &problem, &choice)) continue;
        void *workspace = NULL;
        CUDA(cudaMalloc(&workspace, choice.workspace_bytes));
        double seconds = median([&] {
          if (algorithm->run(&device, &choice, &problem, &args, workspace, 0) != ATTN_OK)
            printf("%s\n", attn_cuda_error());
        });
        cudaFree(workspace);
        double flops = 4.0 * n * n * dim * heads * problem.batch * (causal ? 0.5 : 1);
        double bytes = (backward ? 8.0 : 4.0) * count * 2;
        if (backward) flops *= 2.5;
        printf("%s %s N %6lld: %9.1f us %6.1f TFLOP/s, %4.1f%% of copy; %s\n",
               backward ? "bwd" : "fwd", causal ? "causal" : "full  ", (long long)n, seconds * 1e6,
               flops / seconds * 1e-12, 100 * bytes / seconds / copy, choice.description);
      }
  }
}

int main(int count, char **words) {
  if (attn_cuda_device_open(0, &device) != ATTN_OK) {
    printf("%s\n", attn_cuda_error());
    return 1;
  }
  setvbuf(stdout, NULL, _IOLBF, 0);
  printf("%s\n", device.name);
  if (count > 1 && !strcmp(words[1], "bench"))
    bench(count > 2 ? atoi(words[2]) : 128, count > 3 ? words[3] : "fb");
  else
    checks(count > 1 ? words[1] : NULL);
  printf("%s\n", failures ? "FAILED" : "ok");
  return failures != 0;
}
