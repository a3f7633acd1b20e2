/* Checks the generic softmax algorithms on the GPU, and the faster ones beside them where they
 * accept, against straight loops in float64, for every feature of attn/softmax.h; `tiles [dtype]`
 * checks just those of mma.sync, `lists` block lists, `others` what has that in its name; `bench`,
 * `bench_tiles` and `bench_lists` time them. */
#include "harness.cuh"

extern const softmax_algorithm softmax_generic_forward, softmax_generic_backward;
extern const softmax_algorithm softmax_decode, softmax_latent, softmax_latent_sm90, softmax_few;
extern const softmax_algorithm softmax_mma_forward, softmax_mma_backward;
extern const softmax_algorithm softmax_sm90_forward, softmax_sm90_backward;

namespace {

struct scenario {
  const char *name;
  attn_softmax_problem problem;
  bool lengths = false;   /* key_lengths is given */
  bool broadcast = false; /* the bias repeats along batch and queries */
  bool some = false;      /* only some outputs are wanted */
  int64_t gap = 0;        /* elements between rows */
  bool latents = false;   /* values are the first elements of the keys */
  double share = 0.4;     /* of the blocks that are on the block list, where there is one */
};

attn_softmax_problem shape(int64_t batch, int64_t queries, int64_t keys, int64_t heads,
                           int64_t kv_heads, int64_t dim, int64_t value_dim) {
  attn_softmax_problem p = {};
  p.struct_size = sizeof p;
  p.batch = batch, p.query_length = queries, p.key_length = keys;
  p.heads = heads, p.kv_heads = kv_heads, p.dim = dim, p.value_dim = value_dim;
  p.window_left = p.window_right = -1;
  p.scale = 1 / sqrt((double)dim);
  p.page_size = 1;
  return p;
}

/* All tensors of one call. */
struct setup {
  value q, k, v, o, lse, bias, slopes, sinks, d_o, d_lse, d_q, d_k, d_v, d_bias, d_sinks, pages;
  value query_offsets, key_offsets, key_lengths, block_offsets, block_indices;
  std::vector<int64_t> queries, stored, keys, query_start, key_start; /* of each sequence */
  attn_softmax_args args = {};
  bool shared = false; /* v lies in k */
  ~setup() {
    if (shared) v.tensor.data = NULL;
    for (value *x : {&q,
                     &k,
                     &v,
                     &o,
                     &lse,
                     &bias,
                     &slopes,
                     &sinks,
                     &d_o,
                     &d_lse,
                     &d_q,
                     &d_k,
                     &d_v,
                     &d_bias,
                     &d_sinks,
                     &pages,
                     &query_offsets,
                     &key_offsets,
                     &key_lengths,
                     &block_offsets,
                     &block_indices})
      x->release();
  }
};

/* A block list on which every block is with the probability `share`, and, where `causal`, the block
 * of the query itself but none behind it. `heads` may be 1: all have the same. Returns the share of
 * the pairs of blocks that are on it. */
double make_lists(const attn_softmax_problem &p, double share, bool causal, int64_t heads,
                  setup &s) {
  int64_t blocks = (p.query_length + p.list_queries - 1) / p.list_queries;
  int64_t key_blocks = (p.key_length + p.list_keys - 1) / p.list_keys, possible = 0;
  std::vector<double> offsets, indices;
  for (int64_t list = 0; list < p.batch * heads; ++list) {
    for (int64_t i = 0; i < blocks; ++i) {
      offsets.push_back((double)indices.size());
      int64_t own = (i * p.list_queries + p.list_queries - 1) / p.list_keys;
      for (int64_t j = 0; j < (causal ? std::min(own + 1, key_blocks) : key_blocks);
           ++j, ++possible)
        if (uniform() < share || (causal && j == own)) indices.push_back((double)j);
    }
    offsets.push_back((double)indices.size());
  }
  double found = (double)indices.size() / (double)std::max<int64_t>(possible, 1);
  if (indices.empty()) indices.push_back(0);
  s.block_offsets.shape(ATTN_I32, {p.batch, heads, blocks + 1}, 0);
  s.block_offsets.fill([&](int64_t i) { return offsets[i]; });
  s.block_indices.shape(ATTN_I32, {(int64_t)indices.size()}, 0);
  s.block_indices.fill([&](int64_t i) { return indices[i]; });
  s.args.block_indices = s.block_indices.tensor;
  s.args.block_offsets = s.block_offsets.tensor;
  s.args.block_offsets.shape[1] = p.heads;
  if (heads == 1) s.args.block_offsets.stride[1] = 0;
  return found;
}

bool listed(const attn_softmax_problem &p, const setup &s, int64_t b, int64_t h, int64_t i,
            int64_t j) {
  const int64_t *n = s.block_offsets.tensor.shape;
  const double *offset =
      &s.block_offsets.x[(b * n[1] + (n[1] == 1 ? 0 : h)) * n[2] + i / p.list_queries];
  for (int64_t e = (int64_t)offset[0]; e < (int64_t)offset[1]; ++e)
    if ((int64_t)s.block_indices.x[e] == j / p.list_keys) return true;
  return false;
}

void make(const scenario &c, setup &s) {
  const attn_softmax_problem &p = c.problem;
  attn_dtype dtype = p.dtype, real = real_of(dtype);
  int64_t total_queries = 0, total_keys = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    bool longest = b == p.batch / 2 || !p.ragged;
    s.queries.push_back(longest ? p.query_length : below(p.query_length + 1));
    s.stored.push_back(longest ? p.key_length : below(p.key_length + 1));
    s.keys.push_back(c.lengths ? below(s.stored[b] + 1) : s.stored[b]);
    s.query_start.push_back(total_queries), s.key_start.push_back(total_keys);
    total_queries += s.queries[b], total_keys += s.stored[b];
  }
  auto tokens = [&](value &x, int64_t length, int64_t total, int64_t heads, int64_t width) {
    if (p.ragged)
      x.shape(dtype, {total, heads, width}, c.gap);
    else
      x.shape(dtype, {p.batch, length, heads, width}, c.gap);
  };
  tokens(s.q, p.query_length, total_queries, p.heads, p.dim), s.q.random();
  tokens(s.o, p.query_length, total_queries, p.heads, p.value_dim);
  tokens(s.d_o, p.query_length, total_queries, p.heads, p.value_dim), s.d_o.random();
  tokens(s.d_q, p.query_length, total_queries, p.heads, p.dim);
  int64_t table = (p.key_length + p.page_size - 1) / p.page_size + 1;
  if (p.paged) {
    s.k.shape(dtype, {p.batch * table, p.page_size, p.kv_heads, p.dim}, c.gap);
    s.v.shape(dtype, {p.batch * table, p.page_size, p.kv_heads, p.value_dim}, c.gap);
    s.pages.shape(ATTN_I32, {p.batch, table}, 0);
    s.pages.fill([&](int64_t i) { return (double)((i * 7 + 3) % (p.batch * table)); });
  } else {
    tokens(s.k, p.key_length, total_keys, p.kv_heads, p.dim);
    tokens(s.v, p.key_length, total_keys, p.kv_heads, p.value_dim);
    tokens(s.d_k, p.key_length, total_keys, p.kv_heads, p.dim);
    tokens(s.d_v, p.key_length, total_keys, p.kv_heads, p.value_dim);
  }
  s.k.random();
  if (c.latents) {
    s.v.release();
    s.shared = true, s.v.tensor = s.k.tensor;
    s.v.tensor.shape[s.v.tensor.rank - 1] = p.value_dim;
    s.v.x.resize(s.v.count());
    for (int64_t i = 0; i < s.v.count(); ++i)
      s.v.x[i] = s.k.x[i / p.value_dim * p.dim + i % p.value_dim];
  } else {
    s.v.random();
  }
  for (value *x : {&s.lse, &s.d_lse})
    if (p.ragged)
      x->shape(real, {p.heads, total_queries}, c.gap);
    else
      x->shape(real, {p.batch, p.heads, p.query_length}, c.gap);
  s.d_lse.random();
  if (p.bias) {
    s.bias.shape(real, {p.batch, p.heads, p.query_length, p.key_length}, c.gap);
    if (c.broadcast) s.bias.tensor.stride[0] = s.bias.tensor.stride[2] = 0;
    std::vector<double> stored(s.bias.elements);
    for (double &x : stored) x = uniform() < 0.1 ? -INFINITY : (double)(float)normal();
    s.bias.fill([&](int64_t i) { return stored[s.bias.place(i)]; });
    s.d_bias.shape(real, {p.batch, p.heads, p.query_length, p.key_length}, c.gap);
  }
  s.slopes.shape(ATTN_F32, {p.heads}, 0), s.slopes.fill([](int64_t) { return uniform(); });
  s.sinks.shape(ATTN_F32, {p.heads}, 0), s.sinks.random(2);
  s.d_sinks.shape(ATTN_F32, {p.heads}, 0);
  auto offsets = [&](value &x, const std::vector<int64_t> &start, int64_t total) {
    x.shape(ATTN_I32, {p.batch + 1}, 0);
    x.fill([&](int64_t b) { return (double)(b < p.batch ? start[b] : total); });
    return (const int32_t *)x.tensor.data;
  };
  s.key_lengths.shape(ATTN_I32, {p.batch}, 0);
  s.key_lengths.fill([&](int64_t b) { return (double)s.keys[b]; });
  attn_softmax_args &a = s.args;
  if (p.list_keys) make_lists(p, c.share, false, c.gap ? 1 : p.heads, s);
  if (p.ragged) {
    a.query_offsets = offsets(s.query_offsets, s.query_start, total_queries);
    a.key_offsets = offsets(s.key_offsets, s.key_start, total_keys);
  }
  if (c.lengths) a.key_lengths = (const int32_t *)s.key_lengths.tensor.data;
  a.q = s.q.tensor, a.k = s.k.tensor, a.v = s.v.tensor, a.o = s.o.tensor, a.d_o = s.d_o.tensor;
  if (!c.some || p.passes & ATTN_PASS_BACKWARD) a.lse = s.lse.tensor;
  a.page_table = s.pages.tensor;
  if (p.bias) a.bias = s.bias.tensor;
  if (p.alibi) a.alibi_slopes = s.slopes.tensor;
  if (p.sinks) a.sinks = s.sinks.tensor;
  a.d_k = s.d_k.tensor;
  if (c.some) return;
  a.d_q = s.d_q.tensor, a.d_v = s.d_v.tensor, a.d_lse = s.d_lse.tensor;
  if (p.bias) a.d_bias = s.d_bias.tensor;
  if (p.sinks) a.d_sinks = s.d_sinks.tensor;
}

/* Index of the first element of a row of a tensor in logical order. */
int64_t row_index(const setup &, const value &x, const attn_softmax_problem &p, int64_t b,
                  int64_t start, int64_t t, int64_t h) {
  const int64_t *n = x.tensor.shape;
  if (p.ragged) return ((start + t) * n[1] + h) * n[2];
  return ((b * n[1] + t) * n[2] + h) * n[3];
}
int64_t key_index(const setup &s, const value &x, const attn_softmax_problem &p, int64_t b,
                  int64_t t, int64_t h) {
  if (!p.paged) return row_index(s, x, p, b, s.key_start[b], t, h);
  const int64_t *n = x.tensor.shape, *table = s.pages.tensor.shape;
  int64_t page = (int64_t)s.pages.x[b * table[1] + t / p.page_size];
  return ((page * n[1] + t % p.page_size) * n[2] + h) * n[3];
}
int64_t statistic_index(const setup &s, const value &x, const attn_softmax_problem &p, int64_t b,
                        int64_t t, int64_t h) {
  if (p.ragged) return h * x.tensor.shape[1] + s.query_start[b] + t;
  return (b * p.heads + h) * p.query_length + t;
}

struct reference {
  std::vector<double> o, lse, d_q, d_k, d_v, d_bias, d_sinks;
};

/* The equations of attn/softmax.h, for every pair. */
void solve(const scenario &c, const setup &s, reference &r) {
  const attn_softmax_problem &p = c.problem;
  r.o.assign(s.o.count(), 0), r.lse.assign(s.lse.count(), 0), r.d_q.assign(s.d_q.count(), 0);
  if (!p.paged) r.d_k.assign(s.d_k.count(), 0), r.d_v.assign(s.d_v.count(), 0);
  if (p.bias) r.d_bias.assign(s.d_bias.count(), 0);
  r.d_sinks.assign(p.heads, 0);
  std::vector<double> w(p.key_length), slope(p.key_length), dp(p.key_length);
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < p.heads; ++h)
      for (int64_t i = 0; i < s.queries[b]; ++i) {
        int64_t kv = h / (p.heads / p.kv_heads), keys = s.keys[b];
        int64_t at = i + keys - s.queries[b];
        const double *q = &s.q.x[row_index(s, s.q, p, b, s.query_start[b], i, h)];
        const double *d_o = &s.d_o.x[row_index(s, s.d_o, p, b, s.query_start[b], i, h)];
        double top = -INFINITY, sum = 0, mean = 0;
        for (int64_t j = 0; j < keys; ++j) {
          w[j] = -INFINITY, slope[j] = 1;
          if (p.list_keys && !listed(p, s, b, h, i, j)) continue;
          if (p.causal && j > at) continue;
          if (p.window_left >= 0 && j < at - p.window_left) continue;
          if (p.window_right >= 0 && j > at + p.window_right) continue;
          const double *k = &s.k.x[key_index(s, s.k, p, b, j, kv)];
          double x = 0;
          for (int64_t e = 0; e < p.dim; ++e) x += q[e] * k[e];
          x *= p.scale;
          if (p.soft_cap > 0) {
            slope[j] = 1 / pow(cosh(x / p.soft_cap), 2);
            x = p.soft_cap * tanh(x / p.soft_cap);
          }
          if (p.bias) x += s.bias.x[((b * p.heads + h) * p.query_length + i) * p.key_length + j];
          if (p.alibi) x -= s.slopes.x[h] * (double)llabs(at - j);
          w[j] = x, top = fmax(top, x);
        }
        double lse = -INFINITY;
        if (top > -INFINITY) {
          if (p.sinks) top = fmax(top, s.sinks.x[h]);
          for (int64_t j = 0; j < keys; ++j) sum += exp(w[j] - top);
          if (p.sinks) sum += exp(s.sinks.x[h] - top);
          lse = top + log(sum);
        }
        r.lse[statistic_index(s, s.lse, p, b, i, h)] = lse;
        if (lse == -INFINITY) continue;
        double *o = &r.o[row_index(s, s.o, p, b, s.query_start[b], i, h)];
        for (int64_t j = 0; j < keys; ++j) {
          w[j] = exp(w[j] - lse), dp[j] = 0;
          const double *v = &s.v.x[key_index(s, s.v, p, b, j, kv)];
          for (int64_t e = 0; e < p.value_dim; ++e) o[e] += w[j] * v[e], dp[j] += d_o[e] * v[e];
          mean += w[j] * dp[j];
        }
        if (p.paged) continue;
        if (!c.some) mean -= s.d_lse.x[statistic_index(s, s.d_lse, p, b, i, h)];
        if (p.sinks) r.d_sinks[h] -= exp(s.sinks.x[h] - lse) * mean;
        double *d_q = &r.d_q[row_index(s, s.d_q, p, b, s.query_start[b], i, h)];
        for (int64_t j = 0; j < keys; ++j) {
          double g = w[j] * (dp[j] - mean);
          if (p.bias) r.d_bias[((b * p.heads + h) * p.query_length + i) * p.key_length + j] = g;
          g *= slope[j] * p.scale;
          const double *k = &s.k.x[key_index(s, s.k, p, b, j, kv)];
          double *d_k = &r.d_k[key_index(s, s.d_k, p, b, j, kv)];
          double *d_v = &r.d_v[key_index(s, s.d_v, p, b, j, kv)];
          for (int64_t e = 0; e < p.dim; ++e) d_q[e] += g * k[e], d_k[e] += g * q[e];
          for (int64_t e = 0; e < p.value_dim; ++e) d_v[e] += w[j] * d_o[e];
        }
      }
}

void run(const attn_cuda_device &device, const softmax_algorithm &algorithm, const scenario &c,
         const setup &s) {
  attn_cuda_choice choice = {};
  if (!algorithm.plan(&device, &c.problem, &choice)) {
    printf("FAILED %s: the plan refuses\n", c.name), ++failures;
    return;
  }
  void *workspace;
  REQUIRE(cudaMalloc(&workspace, choice.workspace_bytes + 1));
  REQUIRE(cudaMemset(workspace, 0xff, choice.workspace_bytes + 1));
  attn_status status = algorithm.run(&device, &choice, &c.problem, &s.args, workspace, 0);
  if (status != ATTN_OK) printf("FAILED %s: %s\n", c.name, attn_cuda_error()), ++failures;
  REQUIRE(cudaDeviceSynchronize());
  REQUIRE(cudaFree(workspace));
}

/* As a graph that is replayed, with a workspace that holds anything when it begins: the same bits
 * each time. */
void replay(const attn_cuda_device &device, const softmax_algorithm &algorithm, const scenario &c,
            setup &s) {
  attn_cuda_choice choice = {};
  algorithm.plan(&device, &c.problem, &choice);
  void *workspace;
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  REQUIRE(cudaMalloc(&workspace, choice.workspace_bytes + 1));
  REQUIRE(cudaMemset(workspace, 0x77, choice.workspace_bytes + 1));
  REQUIRE(cudaStreamCreate(&stream));
  REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  algorithm.run(&device, &choice, &c.problem, &s.args, workspace, stream);
  REQUIRE(cudaStreamEndCapture(stream, &graph));
  REQUIRE(cudaGraphInstantiate(&executable, graph, 0));
  const std::vector<double> expected = s.o.x;
  for (int i = 0; i < 3; ++i) {
    s.o.poison();
    REQUIRE(cudaDeviceSynchronize());
    REQUIRE(cudaGraphLaunch(executable, stream));
    REQUIRE(cudaDeviceSynchronize());
    s.o.download();
    if (s.o.x == expected) continue;
    printf("FAILED %s %s: replay %d differs\n", c.name, algorithm.name, i), ++failures;
    break;
  }
  REQUIRE(cudaGraphExecDestroy(executable));
  REQUIRE(cudaGraphDestroy(graph));
  REQUIRE(cudaStreamDestroy(stream));
  REQUIRE(cudaFree(workspace));
}

/* Whether the problem is not one of tests/cuda/softmax_sm90.cu. */
bool for_this_file(const softmax_algorithm *algorithm, const attn_softmax_problem &p) {
  return (algorithm != &softmax_sm90_forward && algorithm != &softmax_sm90_backward) || p.list_keys;
}

int decoded, over_latents, over_latents_sm90, few, tiled, tiled_backward,
    listed_sm90[2]; /* checks that each faster algorithm took part in */

void check(const attn_cuda_device &device, scenario c, attn_dtype dtype) {
  c.problem.dtype = dtype;
  c.problem.passes = ATTN_PASS_FORWARD | (c.problem.paged ? 0 : ATTN_PASS_BACKWARD);
  setup s;
  make(c, s);
  reference r;
  solve(c, s, r);
  double bound = bound_of(dtype), real = bound_of(real_of(dtype));
  char what[160];
  snprintf(what, sizeof what, "%s %s", c.name, name_of(dtype));
  double worst = 0;
  for (const softmax_algorithm *algorithm :
       {&softmax_decode, &softmax_latent_sm90, &softmax_latent, &softmax_few, &softmax_sm90_forward,
        &softmax_mma_forward, &softmax_generic_forward}) {
    attn_cuda_choice choice = {};
    if (!for_this_file(algorithm, c.problem)) continue;
    if (!algorithm->plan(&device, &c.problem, &choice)) continue;
    if (algorithm->suits && !algorithm->suits(&c.problem, &s.args)) continue;
    snprintf(what, sizeof what, "%s %s %s", c.name, name_of(dtype), algorithm->name);
    /* As if there were one multiprocessor, too: fewer splits of the keys, or none. */
    attn_cuda_device narrow = device;
    narrow.multiprocessors = 1;
    for (const attn_cuda_device *each : {(const attn_cuda_device *)&narrow, &device}) {
      s.o.poison(), s.lse.poison();
      run(*each, *algorithm, c, s);
      worst = fmax(worst, judge(what, "o", s.o, r.o, bound));
      if (s.args.lse.data) judge(what, "lse", s.lse, r.lse, real);
    }
    over_latents_sm90 += algorithm == &softmax_latent_sm90;
    if (algorithm == &softmax_decode || algorithm == &softmax_latent_sm90)
      replay(device, *algorithm, c, s);
    decoded += algorithm == &softmax_decode, over_latents += algorithm == &softmax_latent;
    listed_sm90[0] += algorithm == &softmax_sm90_forward;
    few += algorithm == &softmax_few, tiled += algorithm == &softmax_mma_forward;
  }
  for (const softmax_algorithm *algorithm :
       {&softmax_sm90_backward, &softmax_mma_backward, &softmax_generic_backward}) {
    attn_cuda_choice choice = {};
    if (!for_this_file(algorithm, c.problem)) continue;
    if (c.problem.paged || !algorithm->plan(&device, &c.problem, &choice)) continue;
    if (algorithm->suits && !algorithm->suits(&c.problem, &s.args)) continue;
    snprintf(what, sizeof what, "%s %s %s", c.name, name_of(dtype), algorithm->name);
    value *outputs[] = {&s.d_q, &s.d_k, &s.d_v, &s.d_bias, &s.d_sinks};
    std::vector<double> bits[5];
    for (int repeat = 0; repeat < 2; ++repeat) { /* the second time must give the same bits */
      for (value *x : outputs) x->poison();
      run(device, *algorithm, c, s);
      for (int i = 0; i < 5; ++i) {
        if (!outputs[i]->tensor.data) continue;
        outputs[i]->download();
        if (repeat && memcmp(bits[i].data(), outputs[i]->x.data(), bits[i].size() * 8))
          printf("FAILED %s: output %d differs the second time\n", what, i), ++failures;
        bits[i] = outputs[i]->x;
      }
    }
    tiled_backward += algorithm == &softmax_mma_backward;
    listed_sm90[1] += algorithm == &softmax_sm90_backward;
    /* delta comes from o as it was rounded: its gradients have that error, not float32's. */
    double through_o = dtype == ATTN_F64 || dtype == ATTN_F32 ? 3 * real : bound;
    worst = fmax(worst, judge(what, "d_k", s.d_k, r.d_k, fmax(bound, through_o)));
    if (c.some) continue;
    worst = fmax(worst, judge(what, "d_q", s.d_q, r.d_q, fmax(bound, through_o)));
    worst = fmax(worst, judge(what, "d_v", s.d_v, r.d_v, bound));
    if (c.problem.bias) judge(what, "d_bias", s.d_bias, r.d_bias, through_o);
    /* d_sinks is float32 and a sum of both signs */
    if (c.problem.sinks) judge(what, "d_sinks", s.d_sinks, r.d_sinks, fmax(10 * through_o, 1e-6));
  }
  printf("%-40s worst error %.2g\n", what, worst);
}

/* What the tiles of mma.sync meet, in the dtypes that they take, or in the one that is named. */
void check_tiles(const attn_cuda_device &device, const char *name) {
  std::vector<scenario> all;
  auto add = [&](const char *name, attn_softmax_problem p) -> scenario & {
    all.push_back({name, p});
    return all.back();
  };
  scenario *c;
  const int64_t dims[] = {8, 16, 32, 56, 64, 72, 96, 104, 128, 136, 192, 256};
  static char names[12][32];
  for (int i = 0; i < 12; ++i) {
    snprintf(names[i], sizeof names[i], "tiles, dim %d", (int)dims[i]);
    c = &add(names[i], shape(1, 133 + i, 141 + 2 * i, 4, 2, dims[i], dims[(i * 5 + 3) % 12]));
    c->problem.causal = i % 3 != 0, c->gap = 8 * (i % 2);
  }
  const int64_t pairs[][2] = {{32, 32}, {64, 64}, {96, 96}, {128, 128}, {192, 128}, {256, 256}};
  for (const int64_t(&pair)[2] : pairs) {
    int64_t dim = pair[0], value_dim = pair[1];
    c = &add("tiles, many", shape(1, 517, 517, 2, 1, dim, value_dim));
    c->problem.causal = true;
    c = &add("tiles, window", shape(2, 300, 270, 2, 1, dim, value_dim));
    c->problem.window_left = 70, c->problem.window_right = 33, c->problem.sinks = true;
    c = &add("tiles, ragged, window, lengths", shape(4, 200, 260, 4, 2, dim, value_dim));
    c->problem.ragged = c->problem.causal = true, c->problem.window_left = 65, c->gap = 8;
    c->lengths = true;
    c = &add("tiles, more queries, some see nothing", shape(1, 300, 120, 2, 2, dim, value_dim));
    c->problem.causal = true;
    c = &add("tiles, cap, alibi, sinks, bias", shape(2, 150, 170, 4, 2, dim, value_dim));
    c->problem.soft_cap = 2, c->problem.alibi = c->problem.sinks = c->problem.bias = true;
    c->problem.causal = true, c->lengths = true;
    c = &add("tiles, ragged, cap, alibi", shape(3, 140, 150, 2, 1, dim, value_dim));
    c->problem.soft_cap = 3, c->problem.alibi = c->problem.ragged = true;
    c = &add("tiles, negative scale", shape(1, 70, 90, 2, 2, dim, value_dim));
    c->problem.scale = -0.1, c->some = true;
  }
  for (const scenario &each : all)
    for (attn_dtype dtype : {ATTN_BF16, ATTN_F16})
      if (!name || !strcmp(name, name_of(dtype))) check(device, each, dtype);
}

/* Those whose names have `part` in them. */
void check_all(const attn_cuda_device &device, const char *part) {
  std::vector<scenario> all;
  auto add = [&](const char *name, attn_softmax_problem p) -> scenario & {
    all.push_back({name, p});
    return all.back();
  };
  scenario *c;
  static char lists[28][48];
  for (int i = 0; i < 28; ++i) {
    const int64_t sizes[][2] = {{128, 128}, {128, 64}, {64, 64}, {256, 128}, {32, 32}, {100, 96}};
    const int64_t widths[][2] = {{128, 128}, {64, 64}, {128, 128}, {96, 96}, {64, 64}};
    const int64_t *size = sizes[i % 6], *width = widths[i / 6];
    snprintf(lists[i], sizeof lists[i], "lists of %d x %d, dim %d, %d", (int)size[0], (int)size[1],
             (int)width[0], i / 6);
    c = &add(lists[i], shape(1 + i % 2, 390 + 7 * i, 400 + 5 * i, 4, 2, width[0], width[1]));
    c->problem.list_queries = size[0], c->problem.list_keys = size[1];
    c->problem.causal = i % 3 != 1, c->gap = i % 4 == 3 ? 8 : 0, c->share = i % 5 ? 0.4 : 0.1;
    if (i % 7 == 2) c->problem.window_left = 150, c->problem.sinks = true;
    if (i % 7 == 4) c->problem.ragged = true;
    if (i % 7 == 5) c->lengths = true;
    if (i % 7 == 6) c->problem.soft_cap = 3, c->problem.alibi = true;
  }
  for (int64_t keys : {64, 128}) {
    c = &add("lists, long", shape(1, 2100, 4300, 1, 1, 64, 64));
    c->problem.list_queries = 64, c->problem.list_keys = keys, c->share = 0.08;
    c->problem.causal = keys == 64;
  }
  c = &add("lists, bias", shape(1, 100, 150, 2, 1, 64, 64));
  c->problem.list_queries = 64, c->problem.list_keys = 32, c->problem.bias = true;
  c = &add("lists, wide", shape(1, 100, 150, 2, 1, 256, 256));
  c->problem.list_queries = 64, c->problem.list_keys = 32, c->problem.causal = true;
  c = &add("lists of 10 x 32, odd dims", shape(2, 70, 90, 2, 2, 33, 21));
  c->problem.list_queries = 10, c->problem.list_keys = 32;
  c = &add("lists, paged", shape(3, 1, 300, 4, 2, 128, 128));
  c->problem.list_queries = 1, c->problem.list_keys = 16, c->problem.paged = true;
  c->problem.page_size = 16, c->lengths = true;
  add("one", shape(1, 1, 1, 1, 1, 1, 1));
  add("full", shape(2, 70, 130, 2, 2, 64, 64)).gap = 3;
  c = &add("causal grouped", shape(2, 131, 131, 6, 2, 96, 40));
  c->problem.causal = true, c->gap = 8;
  c = &add("causal, more queries than keys", shape(1, 150, 80, 2, 1, 32, 32));
  c->problem.causal = true, c->problem.sinks = true;
  c = &add("window", shape(1, 200, 210, 2, 1, 40, 72));
  c->problem.window_left = 17, c->problem.window_right = 9;
  c = &add("window, some rows see nothing", shape(2, 100, 150, 2, 2, 16, 24));
  c->problem.window_left = 5, c->problem.causal = true, c->lengths = true;
  c = &add("cap, alibi, sinks", shape(2, 90, 90, 4, 2, 128, 128));
  c->problem.causal = c->problem.alibi = c->problem.sinks = true, c->problem.soft_cap = 2;
  c = &add("bias", shape(2, 67, 75, 2, 1, 24, 24));
  c->problem.bias = true, c->gap = 5;
  c = &add("bias, broadcast, causal", shape(3, 40, 90, 2, 2, 64, 8));
  c->problem.bias = c->problem.causal = true, c->broadcast = true, c->lengths = true;
  c = &add("ragged", shape(5, 100, 120, 4, 2, 48, 56));
  c->problem.ragged = c->problem.causal = true, c->gap = 2;
  c = &add("ragged, lengths, sinks", shape(4, 70, 70, 2, 2, 80, 80));
  c->problem.ragged = c->problem.sinks = true, c->lengths = true;
  c = &add("paged", shape(3, 5, 200, 4, 2, 64, 32));
  c->problem.paged = c->problem.causal = true, c->problem.page_size = 16, c->lengths = true;
  c = &add("paged, ragged", shape(3, 65, 100, 2, 1, 32, 32));
  c->problem.paged = c->problem.ragged = true, c->problem.page_size = 7, c->gap = 4;
  add("wide", shape(1, 66, 70, 1, 1, 576, 512)).problem.causal = true;
  add("widest", shape(1, 3, 65, 2, 1, 1024, 1024));
  add("200 and 256", shape(1, 65, 129, 2, 1, 200, 256)).problem.causal = true;
  c = &add("some outputs", shape(1, 80, 90, 2, 2, 64, 64));
  c->some = true, c->problem.sinks = true;
  add("no queries", shape(2, 0, 10, 2, 2, 16, 16));
  add("no keys", shape(2, 10, 0, 2, 2, 16, 16)).problem.sinks = true;
  c = &add("decode", shape(2, 1, 700, 8, 2, 128, 128));
  c->problem.causal = true, c->gap = 8;
  c = &add("decode, 5 queries, sinks, window", shape(3, 5, 333, 12, 2, 64, 64));
  c->problem.causal = c->problem.sinks = true, c->problem.window_left = 100, c->lengths = true;
  c = &add("decode, wide, cap, alibi", shape(1, 3, 1000, 2, 2, 256, 256));
  c->problem.causal = c->problem.alibi = true, c->problem.soft_cap = 3;
  c = &add("decode, paged", shape(5, 2, 600, 16, 2, 128, 128));
  c->problem.causal = c->problem.paged = true, c->problem.page_size = 16, c->lengths = true;
  c->gap = 8;
  c = &add("decode, paged, ragged", shape(5, 8, 900, 8, 2, 64, 64));
  c->problem.ragged = c->problem.paged = true, c->problem.page_size = 24, c->problem.sinks = true;
  c = &add("decode, ragged", shape(7, 4, 400, 5, 1, 256, 256));
  c->problem.ragged = c->problem.causal = true;
  c = &add("decode, alone", shape(80, 1, 100, 8, 8, 128, 128));
  c->lengths = c->problem.causal = c->problem.sinks = true;
  c = &add("long, bias", shape(1, 150, 200, 4, 2, 72, 120));
  c->problem.bias = c->problem.causal = c->problem.sinks = true, c->gap = 8;
  c = &add("long, wide, cap, alibi", shape(1, 100, 230, 2, 1, 192, 128));
  c->problem.causal = c->problem.alibi = true, c->problem.soft_cap = 3;
  c = &add("long, ragged, paged", shape(4, 90, 300, 4, 2, 128, 128));
  c->problem.ragged = c->problem.paged = c->problem.causal = true, c->problem.page_size = 16;
  c->lengths = true;
  c = &add("few, bias", shape(2, 3, 300, 6, 2, 80, 112));
  c->problem.bias = c->problem.causal = c->problem.sinks = true, c->gap = 4;
  c = &add("few, wide, paged", shape(3, 2, 250, 4, 2, 192, 128));
  c->problem.paged = true, c->problem.page_size = 20, c->lengths = true;
  c = &add("few, ragged", shape(6, 7, 300, 9, 1, 36, 20));
  c->problem.ragged = c->problem.causal = c->problem.alibi = true;
  for (int i = 0; i < 4; ++i) {
    const int64_t heads[] = {16, 5, 40, 128};
    static char names[4][32];
    snprintf(names[i], sizeof names[i], "latents, %d heads", (int)heads[i]);
    c = &add(names[i], shape(2, i == 1 ? 5 : 1, 150 + 90 * i, heads[i], 1, 576, 512));
    c->latents = c->problem.causal = true, c->gap = 8 * i, c->lengths = i > 1;
    c->problem.paged = i % 2, c->problem.page_size = 32 + i, c->problem.sinks = i == 2;
    c->problem.ragged = i == 1;
  }
  c = &add("latents, alone", shape(150, 1, 60, 16, 1, 576, 512));
  c->latents = true, c->problem.sinks = true, c->lengths = true;
  c = &add("latents, 128 heads, pages of 64", shape(3, 1, 777, 128, 1, 576, 512));
  c->latents = c->lengths = c->problem.paged = c->problem.causal = true, c->gap = 8;
  c->problem.page_size = 64;
  c = &add("latents, pages of 16, window", shape(2, 3, 500, 24, 1, 576, 512));
  c->latents = c->lengths = c->problem.paged = c->problem.causal = true;
  c->problem.page_size = 16, c->problem.window_left = 100, c->problem.sinks = true;
  c = &add("latents, one page of 128", shape(1, 1, 50, 16, 1, 576, 512));
  c->latents = c->problem.paged = true, c->problem.page_size = 128;
  c = &add("latents, many splits", shape(1, 2, 5001, 8, 1, 576, 512));
  c->latents = c->problem.causal = c->problem.sinks = true;
  c = &add("latents, ragged", shape(5, 4, 300, 32, 1, 576, 512));
  c->latents = c->problem.ragged = c->problem.causal = true, c->gap = 8;
  c = &add("latents, ragged, both windows", shape(4, 8, 350, 20, 1, 576, 512));
  c->latents = c->problem.ragged = true, c->problem.window_left = 90, c->problem.window_right = 3;
  add("decode, most splits", shape(1, 1, 8960, 8, 1, 128, 128));
  c = &add("decode, many splits", shape(1, 1, 9001, 16, 4, 128, 128));
  c->problem.causal = c->problem.sinks = true;
  for (const scenario &each : all)
    if (strstr(each.name, part))
      for (attn_dtype dtype : {ATTN_F64, ATTN_F32, ATTN_BF16, ATTN_F16}) check(device, each, dtype);
}

/* Values in -1 .. 1. */
template <typename T> __global__ void fill_kernel(T *to, int64_t count) {
  for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < count;
       i += (int64_t)gridDim.x * blockDim.x) {
    uint64_t x = ((uint64_t)i + 1) * 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 29) * 0xbf58476d1ce4e5b9ull;
    to[i] = (T)((float)(x >> 40) / 8388608.0f - 1);
  }
}

/* Long sequences, 65536 tokens in all, causal. */
void bench(const attn_cuda_device &device, int64_t length, int64_t dim, int64_t value_dim,
           attn_dtype dtype, double cap, std::vector<const softmax_algorithm *> algorithms) {
  int64_t tokens = 65536, heads = 2048 / dim;
  attn_softmax_problem p = shape(tokens / length, length, length, heads, heads, dim, value_dim);
  p.dtype = dtype, p.causal = true, p.soft_cap = cap,
  p.passes = ATTN_PASS_FORWARD | ATTN_PASS_BACKWARD;
  value all[8], lse;
  for (int i = 0; i < 8; ++i) {
    value &x = all[i];
    bool values = i == 2 || i == 3 || i == 4 || i == 7; /* v, o, d_o and d_v */
    x.shape(dtype, {tokens / length, length, heads, values ? value_dim : dim}, 0);
    if (dtype == ATTN_F32)
      fill_kernel<<<1024, 256>>>((float *)x.tensor.data, x.elements);
    else
      fill_kernel<<<1024, 256>>>((__nv_bfloat16 *)x.tensor.data, x.elements);
  }
  lse.shape(ATTN_F32, {tokens / length, heads, length}, 0);
  attn_softmax_args args = {};
  args.q = all[0].tensor, args.k = all[1].tensor, args.v = all[2].tensor, args.o = all[3].tensor;
  args.d_o = all[4].tensor, args.d_q = all[5].tensor, args.d_k = all[6].tensor;
  args.d_v = all[7].tensor, args.lse = lse.tensor;
  for (const softmax_algorithm *algorithm : algorithms) {
    attn_cuda_choice choice = {};
    if (!algorithm->plan(&device, &p, &choice)) continue;
    void *workspace;
    REQUIRE(cudaMalloc(&workspace, choice.workspace_bytes + 1));
    double time = median_time(7, 1, [&](int, cudaStream_t stream) {
      algorithm->run(&device, &choice, &p, &args, workspace, stream);
    });
    REQUIRE(cudaFree(workspace));
    bool forward = algorithm->pass == ATTN_PASS_FORWARD;
    double products = (double)((forward ? 1 : 3) * dim + (forward ? 1 : 2) * value_dim);
    double flops = 2 * products * (double)(tokens * heads) * (double)length / 2;
    printf("%-7s %s %-8s causal, %lld x %5lld tokens, %2lld heads, dim %3lld/%3lld%s: %7.0f us, "
           "%5.1f TFLOP/s\n",
           algorithm->name, name_of(dtype), forward ? "forward" : "backward",
           (long long)(tokens / length), (long long)length, (long long)heads, (long long)dim,
           (long long)value_dim, cap ? ", cap" : "", time, flops / time / 1e6);
  }
  for (value &x : all) x.release();
  lse.release();
}

void bench_decode(const attn_cuda_device &device, double rate, int64_t batch, int64_t keys,
                  int64_t queries, int64_t heads, int64_t kv_heads, int64_t dim, int64_t page_size,
                  attn_dtype dtype = ATTN_BF16, bool hopper = true) {
  bool latents = dim == 576;
  int64_t width = latents ? 512 : dim;
  const softmax_algorithm &algorithm = latents && hopper   ? softmax_latent_sm90
                                       : latents           ? softmax_latent
                                       : dtype == ATTN_F32 ? softmax_few
                                                           : softmax_decode;
  attn_softmax_problem p = shape(batch, queries, keys, heads, kv_heads, dim, width);
  p.dtype = dtype, p.passes = ATTN_PASS_FORWARD, p.causal = true;
  int64_t bytes_each = (int64_t)size_of(dtype);
  p.paged = page_size > 0, p.page_size = page_size;
  int64_t size = batch * keys * kv_heads * dim; /* of k, and of v */
  int64_t sets = std::max<int64_t>(1, ((int64_t)512 << 20) / (2 * bytes_each * size));
  value q, k, v, o, table;
  q.shape(p.dtype, {batch, queries, heads, dim}, 0), q.random();
  o.shape(p.dtype, {batch, queries, heads, width}, 0);
  k.shape(p.dtype, {sets, batch, keys, kv_heads, dim}, 0);
  v.shape(p.dtype, {latents ? 1 : sets, latents ? 1 : batch, keys, kv_heads, dim}, 0);
  for (value *x : {&k, &v}) {
    if (dtype == ATTN_F32)
      fill_kernel<<<1024, 256>>>((float *)x->tensor.data, x->elements);
    else
      fill_kernel<<<1024, 256>>>((__nv_bfloat16 *)x->tensor.data, x->elements);
  }
  int64_t pages = page_size ? keys / page_size : 1;
  table.shape(ATTN_I32, {batch, pages}, 0);
  table.fill([&](int64_t i) { return (double)(i * 7919 % (batch * pages)); });
  attn_cuda_choice choice = {};
  if (!algorithm.plan(&device, &p, &choice)) printf("refused\n");
  void *workspace;
  REQUIRE(cudaMalloc(&workspace, choice.workspace_bytes + 1));
  int inner = (int)std::max<int64_t>(sets, 4);
  double time = median_time(10, inner, [&](int i, cudaStream_t stream) {
    attn_softmax_args args = {};
    args.q = q.tensor, args.o = o.tensor, args.page_table = table.tensor;
    attn_tensor *kv[] = {&args.k, &args.v};
    for (int part = 0; part < 2; ++part) {
      attn_tensor &t = *kv[part];
      t = (part && !latents ? v : k).tensor;
      t.data = (char *)t.data + i % sets * size * bytes_each;
      t.rank = 4;
      int64_t extents[] = {p.paged ? batch * pages : batch, p.paged ? page_size : keys, kv_heads,
                           dim};
      int64_t stride = 1;
      for (int axis = 3; axis >= 0; --axis)
        t.shape[axis] = extents[axis], t.stride[axis] = stride, stride *= extents[axis];
    }
    if (algorithm.run(&device, &choice, &p, &args, workspace, stream) != ATTN_OK)
      printf("%s\n", attn_cuda_error());
  });
  REQUIRE(cudaDeviceSynchronize());
  double bytes = (latents ? 1 : 2) * (double)(size * bytes_each);
  double flops = 2.0 * (double)(batch * queries * heads * keys * (dim + width));
  printf("%s %s, batch %2lld, %6lld keys, %lld queries, heads %lld / %lld, dim %3lld, pages of "
         "%2lld, "
         "%lld splits: %.1f us, %.0f %% of copying, %.0f TFLOP/s\n",
         algorithm.name, name_of(dtype), (long long)batch, (long long)keys, (long long)queries,
         (long long)heads, (long long)kv_heads, (long long)dim, (long long)page_size,
         (long long)choice.values[0], time, 100 * bytes / time / rate, flops / time / 1e6);
  for (value *x : {&q, &k, &v, &o, &table}) x->release();
  REQUIRE(cudaFree(workspace));
}

/* 65536 tokens, causal: forward and backward over block lists, beside all blocks. */
void bench_lists(const attn_cuda_device &device) {
  for (int64_t dim : {64, 128}) {
    int64_t length = 65536, heads = 2048 / dim;
    attn_softmax_problem p = shape(1, length, length, heads, heads, dim, dim);
    p.dtype = ATTN_BF16, p.causal = true, p.passes = ATTN_PASS_FORWARD | ATTN_PASS_BACKWARD;
    value all[8], lse;
    for (value &x : all) {
      x.shape(p.dtype, {1, length, heads, dim}, 0);
      fill_kernel<<<1024, 256>>>((__nv_bfloat16 *)x.tensor.data, x.elements);
    }
    lse.shape(ATTN_F32, {1, heads, length}, 0);
    setup s;
    attn_softmax_args &args = s.args;
    args.q = all[0].tensor, args.k = all[1].tensor, args.v = all[2].tensor, args.o = all[3].tensor;
    args.d_o = all[4].tensor, args.d_q = all[5].tensor, args.d_k = all[6].tensor;
    args.d_v = all[7].tensor, args.lse = lse.tensor;
    double dense[2] = {};
    auto measure = [&](const softmax_algorithm *algorithm, double share) {
      attn_cuda_choice choice = {};
      if (!algorithm->plan(&device, &p, &choice)) return;
      void *workspace;
      REQUIRE(cudaMalloc(&workspace, choice.workspace_bytes + 1));
      double time = median_time(5, 1, [&](int, cudaStream_t stream) {
        algorithm->run(&device, &choice, &p, &args, workspace, stream);
      });
      REQUIRE(cudaFree(workspace));
      bool backward = algorithm->pass == ATTN_PASS_BACKWARD;
      if (!p.list_keys) dense[backward] = time;
      printf(
          "%-13s %-8s dim %3d, blocks %3d x %3d, %5.1f %% of them: %8.0f us, %3.0f %% of the speed "
          "with all blocks\n",
          algorithm->name, backward ? "backward" : "forward", (int)dim, (int)p.list_queries,
          (int)p.list_keys, 100 * share, time, 100 * dense[backward] * share / time);
    };
    measure(&softmax_sm90_forward, 1), measure(&softmax_sm90_backward, 1);
    for (int64_t size : {128, 64})
      for (double share : {1.0, 0.5, 0.2, 0.1, 0.05}) {
        p.list_queries = p.list_keys = size;
        double found = make_lists(p, share, true, share == 1 ? 1 : heads, s);
        measure(&softmax_sm90_forward, found), measure(&softmax_mma_forward, found);
        measure(&softmax_sm90_backward, found), measure(&softmax_mma_backward, found);
      }
    for (value &x : all) x.release();
    lse.release();
  }
}

void bench_tiles(const attn_cuda_device &device) {
  const softmax_algorithm *forward = &softmax_mma_forward, *backward = &softmax_mma_backward;
  for (int64_t dim : {64, 96, 128, 256})
    for (int64_t length : {1024, 4096, 16384})
      bench(device, length, dim, dim, ATTN_BF16, 0, {forward, backward});
  bench(device, 4096, 32, 32, ATTN_BF16, 0, {forward, backward});
  bench(device, 4096, 192, 128, ATTN_BF16, 0, {forward, backward});
  for (int64_t dim : {64, 128, 256})
    bench(device, 4096, dim, dim, ATTN_BF16, 50, {forward, backward});
  bench(device, 1024, 128, 128, ATTN_F32, 0, {&softmax_generic_forward, &softmax_generic_backward});
}

} // namespace

int main(int argc, char **argv) {
  attn_cuda_device device = open_device();
  if (argc > 1 && strcmp(argv[1], "bench") == 0) {
    double rate = copy_rate();
    bench_decode(device, rate, 1, 8192, 1, 32, 8, 128, 0);
    bench_decode(device, rate, 1, 32768, 1, 32, 8, 128, 0);
    bench_decode(device, rate, 1, 131072, 1, 32, 8, 128, 0);
    bench_decode(device, rate, 1, 131072, 1, 32, 8, 128, 16);
    bench_decode(device, rate, 1, 131072, 8, 16, 8, 128, 0);
    bench_decode(device, rate, 8, 8192, 1, 32, 8, 128, 0);
    bench_decode(device, rate, 8, 32768, 1, 32, 8, 128, 16);
    bench_decode(device, rate, 64, 8192, 1, 32, 8, 128, 0);
    bench_decode(device, rate, 64, 8192, 1, 32, 8, 128, 64);
    bench_decode(device, rate, 16, 16384, 1, 32, 8, 64, 0);
    bench_decode(device, rate, 16, 16384, 1, 16, 4, 256, 0);
    bench_decode(device, rate, 16, 16384, 1, 16, 16, 128, 0);
    bench_decode(device, rate, 1, 8192, 1, 32, 8, 128, 0, ATTN_F32);
    bench_decode(device, rate, 16, 8192, 1, 32, 8, 128, 0, ATTN_F32);
    bench_decode(device, rate, 16, 8192, 1, 8, 8, 64, 16, ATTN_F32);
    for (bool hopper : {true, false}) {
      if (hopper && device.major != 9) continue;
      bench_decode(device, rate, 1, 8192, 1, 16, 1, 576, 0, ATTN_BF16, hopper);
      bench_decode(device, rate, 1, 131072, 1, 16, 1, 576, 0, ATTN_BF16, hopper);
      bench_decode(device, rate, 16, 16384, 1, 16, 1, 576, 64, ATTN_BF16, hopper);
      bench_decode(device, rate, 64, 8192, 1, 16, 1, 576, 0, ATTN_BF16, hopper);
      bench_decode(device, rate, 64, 8192, 1, 32, 1, 576, 0, ATTN_BF16, hopper);
      bench_decode(device, rate, 64, 8192, 1, 64, 1, 576, 0, ATTN_BF16, hopper);
      bench_decode(device, rate, 64, 8192, 1, 128, 1, 576, 64, ATTN_BF16, hopper);
    }
    bench_tiles(device);
    return 0;
  }
  if (argc > 1 && strcmp(argv[1], "bench_lists") == 0) {
    bench_lists(device);
    return 0;
  }
  if (argc > 1 && strcmp(argv[1], "bench_tiles") == 0) {
    bench_tiles(device);
    return 0;
  }
  /* Everything; or the tiles, in all dtypes or one; or the others with a part of a name. */
  const bool all = argc < 2, tiles = all || strcmp(argv[1], "tiles") == 0;
  if (tiles) check_tiles(device, argc > 2 ? argv[2] : NULL);
  if (all || !tiles) check_all(device, all ? "" : argv[1]);
  if (all && device.major == 9 && !over_latents_sm90)
    printf("FAILED: Hopper's kernel over latents took part in nothing\n"), ++failures;
  if ((all || strcmp(argv[1], "lists") == 0) && device.major == 9 &&
      (!listed_sm90[0] || !listed_sm90[1]))
    printf("FAILED: Hopper's kernel took part in no block list\n"), ++failures;
  if (all && (!decoded || !over_latents || !few || !tiled || !tiled_backward))
    printf("FAILED: a faster algorithm took part in nothing\n"), ++failures;
  printf("%s\n", failures ? "FAILED" : "passed");
  return failures != 0;
}
