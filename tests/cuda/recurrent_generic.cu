/* Checks the generic recurrent algorithms on the GPU, and the one for a few tokens where it
 * accepts, against the recurrence in float64, token by token, for every feature of
 * attn/recurrent.h; with `bench` it times them. */
#include "harness.cuh"

extern const recurrent_algorithm recurrent_generic_forward, recurrent_generic_backward;
extern const recurrent_algorithm recurrent_step;

namespace {

struct scenario {
  const char *name;
  attn_recurrent_problem problem;
  int64_t gap = 0;       /* elements between rows */
  bool states = false;   /* initial states and gradients of final ones are given */
  bool in_place = false; /* the final state is the same memory as the initial one */
  bool some = false;     /* only d_k and d_initial_state are wanted */
  bool resets = false;   /* some decays are 0 */
  bool bare = false;     /* the caller gives the states */
};

attn_recurrent_problem shape(int64_t batch, int64_t length, int64_t heads, int64_t value_heads,
                             int64_t dim, int64_t value_dim, attn_decay decay, bool delta) {
  attn_recurrent_problem p = {};
  p.struct_size = sizeof p;
  p.batch = batch, p.length = length, p.heads = heads, p.value_heads = value_heads;
  p.dim = dim, p.value_dim = value_dim, p.decay = decay;
  p.update = delta ? ATTN_UPDATE_DELTA : ATTN_UPDATE_ADDITIVE;
  p.scale = 1, p.epsilon = 1e-6;
  return p;
}

struct setup {
  value q, k, v, o, g, beta, s0, s1, z0, z1, offsets, d_o, d_s1, d_z1;
  value d_q, d_k, d_v, d_g, d_beta, d_s0, d_z0;
  std::vector<int64_t> start, tokens;
  attn_recurrent_args args = {};
  ~setup() {
    for (value *x : {&q,   &k,    &v,    &o,   &g,   &beta, &s0,  &s1,     &z0,   &z1,  &offsets,
                     &d_o, &d_s1, &d_z1, &d_q, &d_k, &d_v,  &d_g, &d_beta, &d_s0, &d_z0})
      x->release();
  }
};

void make(const scenario &c, setup &s) {
  const attn_recurrent_problem &p = c.problem;
  attn_dtype dtype = p.dtype, real = real_of(dtype);
  int64_t total = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    s.start.push_back(total);
    s.tokens.push_back(!p.ragged || b == p.batch / 2 ? p.length : below(p.length + 1));
    total += s.tokens[b];
  }
  auto tokens = [&](value &x, attn_dtype type, std::vector<int64_t> behind) {
    std::vector<int64_t> extents =
        p.ragged ? std::vector<int64_t>{total} : std::vector<int64_t>{p.batch, p.length};
    extents.insert(extents.end(), behind.begin(), behind.end());
    x.shape(type, extents, c.gap);
  };
  /* With a normaliser q and k are positive, as after a feature map: the denominators stay away from
   * 0. Keys have length 1, so that the delta rule contracts. */
  auto features = [&](value &x) {
    tokens(x, dtype, {p.heads, p.dim});
    x.fill([&](int64_t) {
      double y = normal() / sqrt((double)p.dim);
      return p.normalise ? fabs(y) + 0.01 : y;
    });
  };
  features(s.q), features(s.k);
  for (value *x : {&s.v, &s.d_o}) tokens(*x, dtype, {p.value_heads, p.value_dim}), x->random();
  for (value *x : {&s.o, &s.d_v}) tokens(*x, dtype, {p.value_heads, p.value_dim});
  for (value *x : {&s.d_q, &s.d_k}) tokens(*x, dtype, {p.heads, p.dim});
  for (value *x : {&s.g, &s.d_g}) {
    if (p.decay == ATTN_DECAY_CHANNEL)
      tokens(*x, real, {p.value_heads, p.dim});
    else if (p.decay == ATTN_DECAY_TOKEN)
      tokens(*x, real, {p.value_heads});
    else
      x->shape(real, {p.value_heads}, 0);
  }
  s.g.fill([&](int64_t) {
    double x = uniform();
    return c.resets && x < 0.1 ? -1e30 : c.resets && x < 0.2 ? 0 : -0.3 * x * x;
  });
  for (value *x : {&s.beta, &s.d_beta}) tokens(*x, real, {p.value_heads});
  s.beta.fill([](int64_t) { return uniform(); });
  for (value *x : {&s.s0, &s.s1, &s.d_s1, &s.d_s0})
    if (!c.bare) x->shape(real, {p.batch, p.value_heads, p.dim, p.value_dim}, c.gap), x->random();
  for (value *x : {&s.z0, &s.z1, &s.d_z1, &s.d_z0}) {
    x->shape(real, {p.batch, p.value_heads, p.dim}, c.gap);
    x->fill([](int64_t) { return fabs(normal()); });
  }
  for (value *x : {&s.s1, &s.d_s0, &s.z1, &s.d_z0}) x->poison();
  s.offsets.shape(ATTN_I32, {p.batch + 1}, 0);
  s.offsets.fill([&](int64_t b) { return (double)(b < p.batch ? s.start[b] : total); });

  attn_recurrent_args &a = s.args;
  if (p.ragged) a.offsets = (const int32_t *)s.offsets.tensor.data;
  a.q = s.q.tensor, a.k = s.k.tensor, a.v = s.v.tensor, a.o = s.o.tensor, a.d_o = s.d_o.tensor;
  if (p.decay != ATTN_DECAY_NONE) a.decay = s.g.tensor;
  if (p.update == ATTN_UPDATE_DELTA) a.beta = s.beta.tensor;
  if (c.states) a.initial_state = s.s0.tensor, a.d_final_state = s.d_s1.tensor;
  if (c.states && p.normalise)
    a.initial_normaliser = s.z0.tensor, a.d_final_normaliser = s.d_z1.tensor;
  a.final_state = s.s1.tensor;
  if (p.normalise) a.final_normaliser = s.z1.tensor;
  a.d_k = s.d_k.tensor, a.d_initial_state = s.d_s0.tensor;
  if (c.some) return;
  a.d_q = s.d_q.tensor, a.d_v = s.d_v.tensor;
  if (p.decay != ATTN_DECAY_NONE) a.d_decay = s.d_g.tensor;
  if (p.update == ATTN_UPDATE_DELTA) a.d_beta = s.d_beta.tensor;
  if (p.normalise) a.d_initial_normaliser = s.d_z0.tensor;
}

struct reference {
  std::vector<double> o, s1, z1, d_q, d_k, d_v, d_g, d_beta, d_s0, d_z0;
};

/* Index of row t of sequence b and head h, in rows of [.., heads]. */
int64_t row(const attn_recurrent_problem &p, const setup &s, int64_t b, int64_t t, int64_t h,
            int64_t heads) {
  return ((p.ragged ? s.start[b] : b * p.length) + t) * heads + h;
}

void solve_head(const scenario &c, const setup &s, reference &r, int64_t b, int64_t h) {
  const attn_recurrent_problem &p = c.problem;
  int64_t D = p.dim, V = p.value_dim, n = s.tokens[b], reader = h / (p.value_heads / p.heads);
  int64_t unit = b * p.value_heads + h;
  bool delta = p.update == ATTN_UPDATE_DELTA;
  std::vector<std::vector<double>> S(n + 1, std::vector<double>(D * V)), z(n + 1), e(n), u(n);
  z[0].assign(D, 0);
  for (int64_t i = 0; c.states && i < D * V; ++i) S[0][i] = s.s0.x[unit * D * V + i];
  for (int64_t i = 0; c.states && i < D; ++i) z[0][i] = s.z0.x[unit * D + i];
  auto q = [&](int64_t t) { return &s.q.x[row(p, s, b, t, reader, p.heads) * D]; };
  auto k = [&](int64_t t) { return &s.k.x[row(p, s, b, t, reader, p.heads) * D]; };
  auto alpha = [&](int64_t t, int64_t i) {
    if (p.decay == ATTN_DECAY_NONE) return 1.0;
    if (p.decay == ATTN_DECAY_HEAD) return exp(s.g.x[h]);
    int64_t at = row(p, s, b, t, h, p.value_heads);
    return exp(s.g.x[p.decay == ATTN_DECAY_TOKEN ? at : at * D + i]);
  };
  std::vector<double> den(n, 1), num(n * V);
  for (int64_t t = 0; t < n; ++t) {
    int64_t at = row(p, s, b, t, h, p.value_heads);
    double beta = delta ? s.beta.x[at] : 1;
    e[t].assign(V, 0), u[t].assign(V, 0), z[t + 1].assign(D, 0);
    for (int64_t i = 0; i < D; ++i)
      for (int64_t j = 0; j < V; ++j) S[t + 1][i * V + j] = alpha(t, i) * S[t][i * V + j];
    for (int64_t j = 0; j < V; ++j) {
      e[t][j] = s.v.x[at * V + j];
      for (int64_t i = 0; delta && i < D; ++i) e[t][j] -= S[t + 1][i * V + j] * k(t)[i];
      u[t][j] = beta * e[t][j];
    }
    for (int64_t i = 0; i < D; ++i) {
      z[t + 1][i] = alpha(t, i) * z[t][i] + k(t)[i];
      for (int64_t j = 0; j < V; ++j) {
        S[t + 1][i * V + j] += k(t)[i] * u[t][j];
        num[t * V + j] += p.scale * S[t + 1][i * V + j] * q(t)[i];
      }
    }
    if (p.normalise) den[t] = p.epsilon;
    for (int64_t i = 0; p.normalise && i < D; ++i) den[t] += p.scale * z[t + 1][i] * q(t)[i];
    for (int64_t j = 0; j < V; ++j) r.o[at * V + j] = num[t * V + j] / den[t];
  }
  for (int64_t i = 0; i < D * V; ++i) r.s1[unit * D * V + i] = S[n][i];
  for (int64_t i = 0; i < D; ++i) r.z1[unit * D + i] = z[n][i];

  std::vector<double> G(D * V, 0), gz(D, 0);
  for (int64_t i = 0; c.states && i < D * V; ++i) G[i] = s.d_s1.x[unit * D * V + i];
  for (int64_t i = 0; c.states && i < D; ++i) gz[i] = s.d_z1.x[unit * D + i];
  for (int64_t t = n - 1; t >= 0; --t) {
    int64_t at = row(p, s, b, t, h, p.value_heads), key = row(p, s, b, t, reader, p.heads);
    double beta = delta ? s.beta.x[at] : 1, d_den = 0, d_beta = 0;
    std::vector<double> d_num(V), du(V);
    for (int64_t j = 0; j < V; ++j) {
      d_num[j] = s.d_o.x[at * V + j] / den[t];
      if (p.normalise) d_den -= s.d_o.x[at * V + j] * num[t * V + j] / (den[t] * den[t]);
    }
    for (int64_t i = 0; i < D; ++i) {
      gz[i] += p.scale * d_den * q(t)[i];
      r.d_q[key * D + i] += p.scale * d_den * z[t + 1][i];
      if (p.normalise) r.d_k[key * D + i] += gz[i];
      for (int64_t j = 0; j < V; ++j) {
        r.d_q[key * D + i] += p.scale * S[t + 1][i * V + j] * d_num[j];
        G[i * V + j] += p.scale * q(t)[i] * d_num[j];
        du[j] += G[i * V + j] * k(t)[i];
        r.d_k[key * D + i] += G[i * V + j] * u[t][j];
      }
    }
    for (int64_t j = 0; j < V; ++j) {
      d_beta += du[j] * e[t][j];
      r.d_v[at * V + j] = beta * du[j];
    }
    r.d_beta[at] = d_beta;
    for (int64_t i = 0; i < D; ++i) {
      double a = alpha(t, i), d_alpha = p.normalise ? gz[i] * z[t][i] : 0;
      for (int64_t j = 0; j < V; ++j) {
        if (delta) {
          r.d_k[key * D + i] -= a * S[t][i * V + j] * beta * du[j];
          G[i * V + j] -= k(t)[i] * beta * du[j];
        }
        d_alpha += G[i * V + j] * S[t][i * V + j];
        G[i * V + j] *= a;
      }
      gz[i] *= a;
      if (p.decay == ATTN_DECAY_HEAD) r.d_g[h] += a * d_alpha;
      if (p.decay == ATTN_DECAY_TOKEN) r.d_g[at] += a * d_alpha;
      if (p.decay == ATTN_DECAY_CHANNEL) r.d_g[at * D + i] = a * d_alpha;
    }
  }
  for (int64_t i = 0; i < D * V; ++i) r.d_s0[unit * D * V + i] = G[i];
  for (int64_t i = 0; i < D; ++i) r.d_z0[unit * D + i] = gz[i];
}

void solve(const scenario &c, const setup &s, reference &r) {
  r.o.assign(s.o.count(), 0), r.s1.assign(s.s1.count(), 0), r.z1.assign(s.z1.count(), 0);
  r.d_q.assign(s.d_q.count(), 0), r.d_k.assign(s.d_k.count(), 0), r.d_v.assign(s.d_v.count(), 0);
  r.d_g.assign(s.d_g.count(), 0), r.d_beta.assign(s.d_beta.count(), 0);
  r.d_s0.assign(s.d_s0.count(), 0), r.d_z0.assign(s.d_z0.count(), 0);
  for (int64_t b = 0; b < c.problem.batch; ++b)
    for (int64_t h = 0; h < c.problem.value_heads; ++h) solve_head(c, s, r, b, h);
}

/* `rows`: of a thread, for the algorithm for a few tokens; 0: as planned. */
void run(const attn_cuda_device &device, const recurrent_algorithm &algorithm, const scenario &c,
         const attn_recurrent_args &args, int64_t rows = 0) {
  attn_cuda_choice choice = {};
  if (!algorithm.plan(&device, &c.problem, &choice)) {
    printf("FAILED %s: the plan refuses\n", c.name), ++failures;
    return;
  }
  /* Waves of one group, so that small problems take several. */
  if (c.gap && &algorithm != &recurrent_step)
    choice.values[0] = c.problem.value_heads / c.problem.heads;
  if (rows) choice.values[0] = rows;
  void *workspace;
  REQUIRE(cudaMalloc(&workspace, choice.workspace_bytes + 1));
  REQUIRE(cudaMemset(workspace, 0xff, choice.workspace_bytes + 1));
  attn_status status = algorithm.run(&device, &choice, &c.problem, &args, workspace, 0);
  if (status != ATTN_OK) printf("FAILED %s: %s\n", c.name, attn_cuda_error()), ++failures;
  REQUIRE(cudaDeviceSynchronize());
  REQUIRE(cudaFree(workspace));
}

int steps; /* checks that the algorithm for a few tokens took part in */

void check(const attn_cuda_device &device, scenario c, attn_dtype dtype) {
  c.problem.dtype = dtype;
  c.problem.passes = ATTN_PASS_FORWARD | ATTN_PASS_BACKWARD;
  setup s;
  make(c, s);
  reference r;
  solve(c, s, r);
  double bound = bound_of(dtype), real = bound_of(real_of(dtype));
  char what[160];
  snprintf(what, sizeof what, "%s %s", c.name, name_of(dtype));
  run(device, recurrent_generic_backward, c, s.args); /* before states are overwritten */
  double worst = judge(what, "d_k", s.d_k, r.d_k, bound);
  judge(what, "d_initial_state", s.d_s0, r.d_s0, real);
  if (!c.some) {
    worst = fmax(worst, judge(what, "d_q", s.d_q, r.d_q, bound));
    worst = fmax(worst, judge(what, "d_v", s.d_v, r.d_v, bound));
    if (s.args.d_decay.data) judge(what, "d_decay", s.d_g, r.d_g, real);
    if (s.args.d_beta.data) judge(what, "d_beta", s.d_beta, r.d_beta, real);
    if (c.problem.normalise) judge(what, "d_initial_normaliser", s.d_z0, r.d_z0, real);
  }
  attn_recurrent_args args = s.args;
  value &state = c.in_place ? s.s0 : s.s1, &normaliser = c.in_place ? s.z0 : s.z1;
  args.final_state = state.tensor;
  if (c.problem.normalise) args.final_normaliser = normaliser.tensor;
  std::vector<double> s0 = s.s0.x, z0 = s.z0.x;
  /* The step with both numbers of rows, where a block of 256 threads has the state's rows. */
  int64_t rows_of_step = c.problem.dim <= 128 ? 8 : 16, turn = 0;
  for (const recurrent_algorithm *algorithm :
       {&recurrent_step, &recurrent_step, &recurrent_generic_forward}) {
    int64_t rows = algorithm != &recurrent_step ? 0 : turn++ ? 16 : rows_of_step;
    attn_cuda_choice choice = {};
    if (!algorithm->plan(&device, &c.problem, &choice)) continue;
    if (algorithm->suits && !algorithm->suits(&c.problem, &args)) continue;
    s.s0.x = s0, s.s0.upload(), s.z0.x = z0, s.z0.upload();
    for (value *x : {&s.o, &s.s1, &s.z1}) x->poison();
    run(device, *algorithm, c, args, rows);
    snprintf(what, sizeof what, "%s %s %s", c.name, name_of(dtype), algorithm->name);
    worst = fmax(worst, judge(what, "o", s.o, r.o, bound));
    judge(what, "final_state", state, r.s1, real);
    if (c.problem.normalise) judge(what, "final_normaliser", normaliser, r.z1, real);
    steps += algorithm == &recurrent_step;
  }
  printf("%-52s worst error %.2g\n", what, worst);
}

void check_all(const attn_cuda_device &device) {
  std::vector<scenario> all;
  auto add = [&](const char *name, attn_recurrent_problem p) -> scenario & {
    all.push_back({name, p});
    return all.back();
  };
  const char *const decays[] = {"no decay", "head decay", "token decay", "channel decay"};
  static char names[8][64];
  for (int i = 0; i < 8; ++i) {
    snprintf(names[i], sizeof names[i], "%s, %s", decays[i / 2], i % 2 ? "delta" : "additive");
    attn_recurrent_problem p =
        shape(2, 45 + i, 2, i < 4 ? 4 : 2, 32 + 8 * i, 24 + 10 * i, (attn_decay)(i / 2), i % 2);
    p.scale = 0.5;
    scenario &c = add(names[i], p);
    c.states = true, c.gap = i % 3, c.in_place = i % 2;
  }
  scenario *c =
      &add("normaliser, token decay", shape(2, 70, 2, 4, 40, 33, ATTN_DECAY_TOKEN, false));
  c->problem.normalise = true, c->states = true, c->in_place = true;
  c = &add("normaliser, head decay, ragged", shape(4, 40, 1, 2, 64, 64, ATTN_DECAY_HEAD, false));
  c->problem.normalise = c->problem.ragged = true, c->gap = 3;
  c = &add("normaliser, channel decay, delta",
           shape(1, 33, 2, 2, 16, 16, ATTN_DECAY_CHANNEL, true));
  c->problem.normalise = true, c->states = true;
  c = &add("ragged, channel decay, delta", shape(6, 80, 2, 4, 48, 40, ATTN_DECAY_CHANNEL, true));
  c->problem.ragged = true, c->states = true, c->gap = 4;
  c = &add("ragged, head decay", shape(5, 65, 2, 2, 24, 24, ATTN_DECAY_HEAD, false));
  c->problem.ragged = true;
  c = &add("resets, token decay, delta", shape(2, 100, 2, 2, 32, 32, ATTN_DECAY_TOKEN, true));
  c->resets = c->states = true;
  c = &add("resets, channel decay", shape(1, 100, 2, 2, 32, 32, ATTN_DECAY_CHANNEL, false));
  c->resets = c->states = true;
  add("dim 256", shape(1, 40, 1, 1, 256, 256, ATTN_DECAY_CHANNEL, true)).states = true;
  add("dim 128", shape(1, 75, 1, 2, 128, 128, ATTN_DECAY_TOKEN, true)).states = true;
  add("dim 1", shape(2, 37, 2, 2, 1, 1, ATTN_DECAY_CHANNEL, true)).states = true;
  add("one token", shape(3, 1, 2, 4, 64, 64, ATTN_DECAY_TOKEN, true)).states = true;
  c = &add("some outputs", shape(1, 50, 2, 2, 32, 48, ATTN_DECAY_TOKEN, true));
  c->some = true;
  add("no tokens", shape(2, 0, 2, 2, 8, 8, ATTN_DECAY_HEAD, false)).states = true;
  for (int i = 0; i < 8; ++i) {
    static char few[8][64];
    snprintf(few[i], sizeof few[i], "%d tokens, %s", i % 4 + 1, names[i]);
    attn_recurrent_problem p = shape(3, i % 4 + 1, 2, 4, i == 5 ? 256 : 32 + 24 * i, 36 + 20 * i,
                                     (attn_decay)(i / 2), i % 2);
    c = &add(few[i], p);
    c->states = i != 3, c->gap = 4 * (i % 3), c->in_place = i % 3 == 1;
    c->problem.normalise = i >= 6 || i == 1, c->problem.ragged = i == 2 || i == 7;
  }
  for (const scenario &each : all)
    for (attn_dtype dtype : {ATTN_F64, ATTN_F32, ATTN_BF16, ATTN_F16}) check(device, each, dtype);
}

void bench(const attn_cuda_device &device, int64_t batch, int64_t length, attn_decay decay,
           bool delta) {
  scenario c = {"bench", shape(batch, length, 16, 16, 128, 128, decay, delta)};
  c.problem.dtype = ATTN_BF16, c.problem.passes = ATTN_PASS_FORWARD | ATTN_PASS_BACKWARD;
  setup s;
  make(c, s);
  for (const recurrent_algorithm *algorithm :
       {&recurrent_generic_forward, &recurrent_generic_backward}) {
    attn_cuda_choice choice = {};
    algorithm->plan(&device, &c.problem, &choice);
    void *workspace;
    REQUIRE(cudaMalloc(&workspace, choice.workspace_bytes + 1));
    double time = median_time(3, 1, [&](int, cudaStream_t stream) {
      algorithm->run(&device, &choice, &c.problem, &s.args, workspace, stream);
    });
    REQUIRE(cudaFree(workspace));
    printf("bf16 %s decay %d delta %d, %lld x %lld tokens, 16 heads, dim 128: %.0f us, workspace "
           "%.0f MiB\n",
           algorithm->pass == ATTN_PASS_FORWARD ? "forward" : "backward", (int)decay, delta,
           (long long)batch, (long long)length, time, (double)choice.workspace_bytes / 1048576);
  }
}

/* One token; every state in turn of several sets that together exceed the L2. */
void bench_step(const attn_cuda_device &device, double rate, int64_t batch, attn_decay decay,
                bool delta, bool in_place, int64_t rows) {
  scenario c = {"step", shape(batch, 1, 16, 16, 128, 128, decay, delta)};
  c.problem.dtype = ATTN_BF16, c.problem.passes = ATTN_PASS_FORWARD, c.bare = true;
  int64_t size = batch * 16 * 128 * 128,
          sets = std::max<int64_t>(2, ((int64_t)256 << 20) / size / 4);
  setup s;
  make(c, s);
  s.s0.shape(ATTN_F32, {in_place ? sets : 2 * sets, batch, 16, 128, 128}, 0);
  REQUIRE(cudaMemset(s.s0.tensor.data, 0x11, (size_t)s.s0.elements * 4));
  attn_cuda_choice choice = {};
  recurrent_step.plan(&device, &c.problem, &choice);
  if (rows) choice.values[0] = rows;
  auto state = [&](int64_t i) {
    attn_tensor t = s.s0.tensor; /* without its first axis */
    t.rank = 4;
    for (int axis = 0; axis < 4; ++axis)
      t.shape[axis] = t.shape[axis + 1], t.stride[axis] = t.stride[axis + 1];
    t.data = (float *)s.s0.tensor.data + i * size;
    return t;
  };
  int inner = (int)std::max<int64_t>(sets, batch > 256 ? 4 : 16);
  double time = median_time(10, inner, [&](int i, cudaStream_t stream) {
    attn_recurrent_args args = s.args;
    args.initial_state = state(i % sets);
    args.final_state = in_place ? args.initial_state : state(i % sets + sets);
    if (recurrent_step.run(&device, &choice, &c.problem, &args, NULL, stream) != ATTN_OK)
      printf("%s\n", attn_cuda_error());
  });
  double bytes = 8.0 * (double)size;
  printf("step, %s decay, %s, batch %lld x 16 heads, %s, %lld rows a thread: %.1f us, %.0f %% of "
         "copying\n",
         decay == ATTN_DECAY_HEAD ? "head" : "channel", delta ? "delta" : "additive",
         (long long)batch, in_place ? "in place" : "elsewhere", (long long)choice.values[0], time,
         100 * bytes / time / rate);
}

} // namespace

int main(int argc, char **argv) {
  attn_cuda_device device = open_device();
  if (argc > 1 && strcmp(argv[1], "bench") == 0) {
    double rate = copy_rate();
    for (int64_t batch : {1024, 64, 8, 1})
      for (int i = 0; i < 4; ++i)
        bench_step(device, rate, batch, i % 2 ? ATTN_DECAY_CHANNEL : ATTN_DECAY_HEAD, i % 2, true,
                   i < 2 ? 8 : 16);
    bench_step(device, rate, 512, ATTN_DECAY_CHANNEL, true, false, 0);
    bench(device, 4, 2048, ATTN_DECAY_HEAD, false);
    bench(device, 4, 2048, ATTN_DECAY_CHANNEL, true);
    return 0;
  }
  check_all(device);
  if (!steps) printf("FAILED: the algorithm for a few tokens took part in nothing\n"), ++failures;
  printf("%s\n", failures ? "FAILED" : "passed");
  return failures != 0;
}
