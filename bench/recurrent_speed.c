/* Speed of the recurrent engine: tokens/s, GFLOP/s (as the plan counts: the recurrence itself) and
 * GB/s of one pass, for the mechanisms that run on it.
 *
 *   bench_recurrent_speed [words that the names of the cases must contain]
 *
 * Every case is first run at a small length on fresh random inputs with poisoned outputs and
 * compared with the engine in float64 on the generic kernels, which the tests compare with a
 * token-by-token oracle. */
#include "attn/attn.h"
#include "base/random.h"
#include "engines/plan.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct bench_case {
  const char *name;
  attn_dtype dtype;
  int64_t batch, length, heads, dim;
  attn_decay decay;
  attn_update update;
  attn_pass pass;
} bench_case;

#define FORWARD  ATTN_PASS_FORWARD
#define BACKWARD ATTN_PASS_BACKWARD
#define LIGHTNING(n, pass)                                                                         \
  { "lightning", ATTN_BF16, 1, n, 8, 128, ATTN_DECAY_HEAD, ATTN_UPDATE_ADDITIVE, pass }
#define LAYER(name, dtype, n, heads, decay, update, pass)                                          \
  { name, dtype, 1, n, heads, 128, decay, update, pass }

static const bench_case cases[] = {
    LIGHTNING(1024, FORWARD),
    LIGHTNING(4096, FORWARD),
    LIGHTNING(16384, FORWARD),
    LIGHTNING(65536, FORWARD),
    LIGHTNING(262144, FORWARD),
    LIGHTNING(4096, BACKWARD),
    LIGHTNING(32768, BACKWARD),
    LAYER("lightning", ATTN_F32, 4096, 8, ATTN_DECAY_HEAD, ATTN_UPDATE_ADDITIVE, FORWARD),
    LAYER("gdn", ATTN_BF16, 256, 32, ATTN_DECAY_TOKEN, ATTN_UPDATE_DELTA, FORWARD),
    LAYER("gdn", ATTN_F32, 256, 32, ATTN_DECAY_TOKEN, ATTN_UPDATE_DELTA, FORWARD),
    LAYER("gdn", ATTN_BF16, 4096, 8, ATTN_DECAY_TOKEN, ATTN_UPDATE_DELTA, FORWARD),
    LAYER("gdn", ATTN_BF16, 4096, 8, ATTN_DECAY_TOKEN, ATTN_UPDATE_DELTA, BACKWARD),
    LAYER("kda", ATTN_BF16, 4096, 8, ATTN_DECAY_CHANNEL, ATTN_UPDATE_DELTA, FORWARD),
    LAYER("kda", ATTN_BF16, 4096, 8, ATTN_DECAY_CHANNEL, ATTN_UPDATE_DELTA, BACKWARD),
    LAYER("gla", ATTN_BF16, 4096, 8, ATTN_DECAY_CHANNEL, ATTN_UPDATE_ADDITIVE, FORWARD),
    LAYER("gla", ATTN_BF16, 4096, 8, ATTN_DECAY_CHANNEL, ATTN_UPDATE_ADDITIVE, BACKWARD),
    LAYER("lightning-step", ATTN_BF16, 1, 32, ATTN_DECAY_HEAD, ATTN_UPDATE_ADDITIVE, FORWARD),
    LAYER("gdn-step", ATTN_BF16, 1, 32, ATTN_DECAY_TOKEN, ATTN_UPDATE_DELTA, FORWARD),
    LAYER("kda-step", ATTN_BF16, 1, 32, ATTN_DECAY_CHANNEL, ATTN_UPDATE_DELTA, FORWARD),
};

static void stop(const char *what) {
  fprintf(stderr, "bench_recurrent_speed: %s: %s\n", what, attn_error_message());
  exit(1);
}

enum { KEYS, VALUES, GATES, DECAY, STATE };

static attn_tensor make(const bench_case *c, int kind, attn_dtype dtype, int64_t length) {
  int64_t shapes[][4] = {[KEYS] = {c->batch, length, c->heads, c->dim},
                         [VALUES] = {c->batch, length, c->heads, c->dim},
                         [GATES] = {c->batch, length, c->heads},
                         [DECAY] = {c->batch, length, c->heads, c->dim},
                         [STATE] = {c->batch, c->heads, c->dim, c->dim}};
  int ranks[] = {[KEYS] = 4, [VALUES] = 4, [GATES] = 3, [DECAY] = 4, [STATE] = 4};
  attn_tensor tensor;
  if (kind == DECAY && c->decay == ATTN_DECAY_HEAD) shapes[DECAY][0] = c->heads, ranks[DECAY] = 1;
  if (kind == DECAY && c->decay == ATTN_DECAY_TOKEN) ranks[DECAY] = 3;
  if (attn_tensor_create(dtype, ranks[kind], shapes[kind], &tensor) != ATTN_OK) stop("create");
  memset(tensor.data, 0xff, (size_t)attn_tensor_count(&tensor) * attn_dtype_size(dtype)); /* NaN */
  return tensor;
}

/* Random numbers made in float64 and rounded to the tensors of both dtypes. */
static void randomise(attn_tensor *tensor, attn_random *random, double low, double high) {
  enum { TABLE = 8191 }; /* prime, so that no row repeats another */
  static double table[TABLE];
  int64_t count = attn_tensor_count(tensor);
  for (int i = 0; i < TABLE; ++i) table[i] = low + (high - low) * attn_random_uniform(random);
  for (int64_t i = 0; i < count; ++i) {
    double x = table[i % TABLE];
    if (tensor->dtype == ATTN_F64) ((double *)tensor->data)[i] = x;
    if (tensor->dtype == ATTN_F32) ((float *)tensor->data)[i] = (float)x;
    if (tensor->dtype == ATTN_BF16) ((uint16_t *)tensor->data)[i] = attn_f32_to_bf16((float)x);
  }
}

static attn_recurrent_args make_args(const bench_case *c, attn_dtype dtype, int64_t length,
                                     uint64_t seed) {
  attn_dtype real = dtype == ATTN_F64 ? ATTN_F64 : ATTN_F32;
  attn_random random = {.seed = seed};
  double key = 1.7 / sqrt((double)c->dim); /* about unit length */
  attn_recurrent_args a = {0};
  a.q = make(c, KEYS, dtype, length);
  a.k = make(c, KEYS, dtype, length);
  a.v = make(c, VALUES, dtype, length);
  randomise(&a.q, &random, -key, key);
  randomise(&a.k, &random, -key, key);
  randomise(&a.v, &random, -1, 1);
  if (c->decay != ATTN_DECAY_NONE) {
    a.decay = make(c, DECAY, real, length);
    randomise(&a.decay, &random, -0.2, 0);
  }
  if (c->update == ATTN_UPDATE_DELTA) {
    a.beta = make(c, GATES, real, length);
    randomise(&a.beta, &random, 0, 1);
  }
  a.initial_state = make(c, STATE, real, length);
  randomise(&a.initial_state, &random, -1, 1);
  if (c->pass == FORWARD) {
    a.o = make(c, VALUES, dtype, length);
    a.final_state = a.initial_state;
    return a;
  }
  a.d_o = make(c, VALUES, dtype, length);
  randomise(&a.d_o, &random, -1, 1);
  a.d_q = make(c, KEYS, dtype, length);
  a.d_k = make(c, KEYS, dtype, length);
  a.d_v = make(c, VALUES, dtype, length);
  if (c->decay > ATTN_DECAY_HEAD) a.d_decay = make(c, DECAY, real, length);
  if (c->update == ATTN_UPDATE_DELTA) a.d_beta = make(c, GATES, real, length);
  return a;
}

static void free_args(attn_recurrent_args *a) {
  attn_tensor *all[] = {
      &a->q,   &a->k,   &a->v,   &a->o,   &a->decay,   &a->beta,  &a->initial_state,
      &a->d_o, &a->d_q, &a->d_k, &a->d_v, &a->d_decay, &a->d_beta};
  for (size_t i = 0; i < sizeof all / sizeof *all; ++i)
    if (all[i]->data) attn_tensor_destroy(all[i]);
}

typedef struct ready {
  attn_plan *plan;
  attn_plan_info info;
  void *workspace;
} ready;

static ready get_ready(const bench_case *c, attn_dtype dtype, int64_t length) {
  attn_recurrent_problem problem = ATTN_RECURRENT_PROBLEM_INIT;
  ready r;
  problem.dtype = dtype;
  problem.passes = (int)c->pass;
  problem.batch = c->batch;
  problem.length = length;
  problem.heads = problem.value_heads = c->heads;
  problem.dim = problem.value_dim = c->dim;
  problem.decay = c->decay;
  problem.update = c->update;
  if (attn_recurrent_plan(&problem, &r.plan) != ATTN_OK) stop("plan");
  if (attn_plan_get_info(r.plan, &r.info) != ATTN_OK) stop("info");
  r.workspace = aligned_alloc(64, (r.info.workspace_bytes + 127) / 64 * 64);
  if (!r.workspace) stop("workspace");
  memset(r.workspace, 0xff, r.info.workspace_bytes);
  return r;
}

static void run(const bench_case *c, const ready *r, const attn_recurrent_args *args) {
  attn_status status = c->pass == FORWARD ? attn_recurrent_forward(r->plan, args, r->workspace)
                                          : attn_recurrent_backward(r->plan, args, r->workspace);
  if (status != ATTN_OK) stop("execute");
}

static void let_go(ready *r) {
  free(r->workspace);
  attn_plan_destroy(r->plan);
}

static double distance(const attn_tensor *a, const attn_tensor *b) {
  attn_tensor wide;
  int64_t count = attn_tensor_count(a);
  double difference = 0, norm = 0;
  if (attn_tensor_create(ATTN_F64, a->rank, a->shape, &wide) != ATTN_OK) stop("create");
  if (attn_tensor_copy(a, &wide) != ATTN_OK) stop("copy");
  for (int64_t i = 0; i < count; ++i) {
    double x = ((double *)wide.data)[i], y = ((double *)b->data)[i];
    difference += (x - y) * (x - y);
    norm += y * y;
  }
  attn_tensor_destroy(&wide);
  return sqrt(difference / norm);
}

/* Largest relative error over the outputs, at a small length. */
static double check(const bench_case *c) {
  int64_t length = c->length < 300 ? c->length : 300;
  attn_recurrent_args own = make_args(c, c->dtype, length, 5),
                      wide = make_args(c, ATTN_F64, length, 5);
  attn_tensor *from[] = {&own.q,  &own.k, &own.v, &own.decay, &own.beta, &own.initial_state,
                         &own.d_o};
  attn_tensor *to[] = {&wide.q,  &wide.k, &wide.v, &wide.decay, &wide.beta, &wide.initial_state,
                       &wide.d_o};
  for (size_t i = 0; i < sizeof from / sizeof *from; ++i)
    if (from[i]->data && attn_tensor_copy(from[i], to[i]) != ATTN_OK) stop("copy");
  ready r = get_ready(c, c->dtype, length), exact = get_ready(c, ATTN_F64, length);
  run(c, &r, &own);
  run(c, &exact, &wide);
  double worst = 0;
  attn_tensor *a[] = {&own.o,   &own.final_state, &own.d_q,   &own.d_k,
                      &own.d_v, &own.d_decay,     &own.d_beta};
  attn_tensor *b[] = {&wide.o,   &wide.final_state, &wide.d_q,   &wide.d_k,
                      &wide.d_v, &wide.d_decay,     &wide.d_beta};
  for (size_t i = 0; i < sizeof a / sizeof *a; ++i)
    if (a[i]->data) worst = fmax(worst, distance(a[i], b[i]));
  let_go(&r);
  let_go(&exact);
  free_args(&own);
  free_args(&wide);
  return worst;
}

static int ascending(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

/* Median of many runs over rotating inputs that together exceed the second-level caches. */
static double measure(const bench_case *c, const ready *r) {
  enum { MAX_RUNS = 2000, MAX_COPIES = 16 };
  const double enough_bytes = 64e6, enough_seconds = 0.4;
  static double times[MAX_RUNS];
  attn_recurrent_args args[MAX_COPIES];
  int copies = (int)(enough_bytes / r->info.bytes) + 1, runs = 0;
  if (copies > MAX_COPIES) copies = MAX_COPIES;
  for (int i = 0; i < copies; ++i) args[i] = make_args(c, c->dtype, c->length, 11 + (uint64_t)i);
  for (int i = 0; i < copies; ++i) run(c, r, args + i);
  double begin = attn_seconds();
  while (runs < MAX_RUNS && (runs < 3 || attn_seconds() - begin < enough_seconds)) {
    double start = attn_seconds();
    run(c, r, args + runs % copies);
    times[runs++] = attn_seconds() - start;
  }
  for (int i = 0; i < copies; ++i) free_args(args + i);
  qsort(times, (size_t)runs, sizeof *times, ascending);
  return times[runs / 2];
}

static void report(const bench_case *c) {
  const double allowed = c->dtype == ATTN_BF16 ? 0.025 : 2e-5;
  double error = check(c);
  ready r = get_ready(c, c->dtype, c->length);
  if (!(error <= allowed)) {
    printf("%-15s wrong: relative error %g, allowed %g\n", c->name, error, allowed);
    exit(1);
  }
  double seconds = measure(c, &r);
  printf(
      "%-15s %-8s %-8s %7lld x %2lld heads  %9.3f ms  %8.3f Mtokens/s  %7.1f GFLOP/s  %5.1f GB/s "
      " (error %.1e)\n",
      c->name, attn_dtype_name(c->dtype), c->pass == FORWARD ? "forward" : "backward",
      (long long)c->length, (long long)c->heads, seconds * 1e3,
      (double)c->batch * (double)c->length / seconds * 1e-6, r.info.flops / seconds * 1e-9,
      r.info.bytes / seconds * 1e-9, error);
  fflush(stdout);
  let_go(&r);
}

int main(int count, char **words) {
  printf("%s, %d threads, path %s\n", attn_cpu_description(), attn_get_threads(),
         attn_kernel_path_name(attn_get_kernel_path()));
  for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i) {
    char name[64];
    bool chosen = true;
    snprintf(name, sizeof name, "%s %s %s %lld", cases[i].name, attn_dtype_name(cases[i].dtype),
             cases[i].pass == FORWARD ? "forward" : "backward", (long long)cases[i].length);
    for (int w = 1; w < count; ++w) chosen = chosen && strstr(name, words[w]);
    if (chosen) report(cases + i);
  }
  return 0;
}
