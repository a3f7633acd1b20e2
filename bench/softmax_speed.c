/* Times exact attention. Each shape is first checked on fresh random inputs, with poisoned outputs,
 * against the float64 engine on a shortened problem; then it prints the rates and, of the rate of
 * the path's matrix products measured between the samples (samples.h), the fraction.
 *
 *   bench_softmax_speed [length [threads [float32|bfloat16 [heads]]]] */
#include "attn/attn.h"
#include "samples.h"
#include "base/random.h"
#include "engines/plan.h"
#include "kernels/peak.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static void require(attn_status status) {
  if (status == ATTN_OK) return;
  fprintf(stderr, "%s\n", attn_error_message());
  exit(1);
}

static attn_tensor tensor(attn_dtype dtype, int rank, const int64_t *shape, uint64_t seed) {
  attn_tensor result;
  require(attn_tensor_create(dtype, rank, shape, &result));
  if (!seed) {
    require(attn_tensor_fill(&result, NAN));
    return result;
  }
  attn_random random = {.seed = seed};
  int64_t count = attn_tensor_count(&result);
  for (int64_t i = 0; i < count; ++i) {
    float x = (float)(attn_random_uniform(&random) * 4 - 2);
    if (dtype == ATTN_F64) ((double *)result.data)[i] = x;
    if (dtype == ATTN_F32) ((float *)result.data)[i] = x;
    if (dtype == ATTN_BF16) ((uint16_t *)result.data)[i] = attn_f32_to_bf16(x);
  }
  return result;
}

enum { TENSORS = 9 };
typedef struct run {
  attn_softmax_problem problem;
  attn_softmax_args args;
} run;

static attn_tensor *tensor_of(attn_softmax_args *args, int i) {
  attn_tensor *all[TENSORS] = {&args->q,   &args->k,   &args->v,   &args->d_o, &args->o,
                               &args->d_q, &args->d_k, &args->d_v, &args->lse};
  return all[i];
}

static run make(attn_softmax_problem problem) {
  run r = {.problem = problem};
  const int64_t q[] = {problem.batch, problem.query_length, problem.heads, problem.dim};
  const int64_t k[] = {problem.batch, problem.key_length, problem.kv_heads, problem.dim};
  const int64_t lse[] = {problem.batch, problem.heads, problem.query_length};
  const int64_t *shapes[TENSORS] = {q, k, k, q, q, q, k, k, lse};
  for (int i = 0; i < TENSORS; ++i)
    *tensor_of(&r.args, i) = tensor(i < 8                       ? problem.dtype
                                    : problem.dtype == ATTN_F64 ? ATTN_F64
                                                                : ATTN_F32,
                                    i < 8 ? 4 : 3, shapes[i], i < 4 ? (uint64_t)i + 1 : 0);
  return r;
}

static void destroy(run *r) {
  for (int i = 0; i < TENSORS; ++i) attn_tensor_destroy(tensor_of(&r->args, i));
}

static void execute(run *r, const attn_plan *plan, void *workspace, attn_pass pass) {
  require(pass == ATTN_PASS_FORWARD ? attn_softmax_forward(plan, &r->args, workspace)
                                    : attn_softmax_backward(plan, &r->args, workspace));
}

/* Executes once and, with samples s, as often as they ask for. */
static void sample(run *r, attn_pass pass, samples *s, char description[256]) {
  attn_plan *plan;
  attn_plan_info info;
  attn_softmax_problem problem = r->problem;
  problem.passes = (int)pass;
  require(attn_softmax_plan(&problem, &plan));
  require(attn_plan_get_info(plan, &info));
  if (description) memcpy(description, info.description, 256);
  void *workspace = aligned_alloc(64, info.workspace_bytes / 64 * 64 + 64);
  execute(r, plan, workspace, pass); /* and warms up */
  while (s && samples_begin(s)) {
    execute(r, plan, workspace, pass);
    samples_end(s);
  }
  free(workspace);
  attn_plan_destroy(plan);
}

static double difference(const attn_tensor *a, const attn_tensor *b) {
  const int64_t count = attn_tensor_count(a);
  attn_tensor x, y;
  require(attn_tensor_create(ATTN_F64, a->rank, a->shape, &x));
  require(attn_tensor_create(ATTN_F64, a->rank, a->shape, &y));
  require(attn_tensor_copy(a, &x));
  require(attn_tensor_copy(b, &y));
  double error = 0, norm = 0;
  for (int64_t i = 0; i < count; ++i) {
    double p = ((double *)x.data)[i], q = ((double *)y.data)[i];
    error += (p - q) * (p - q);
    norm += q * q;
  }
  attn_tensor_destroy(&x);
  attn_tensor_destroy(&y);
  return sqrt(error / norm);
}

/* The same problem at a length that float64 can afford, on new numbers. */
static bool check(attn_softmax_problem problem) {
  problem.query_length = problem.key_length = 611;
  problem.heads = problem.kv_heads = 2;
  run fast = make(problem), exact;
  problem.dtype = ATTN_F64;
  exact = make(problem);
  for (int i = 0; i < 4; ++i)
    require(attn_tensor_copy(tensor_of(&fast.args, i), tensor_of(&exact.args, i)));
  const attn_pass passes[] = {ATTN_PASS_FORWARD, ATTN_PASS_BACKWARD};
  for (int p = 0; p < 2; ++p) {
    sample(&fast, passes[p], NULL, NULL);
    sample(&exact, passes[p], NULL, NULL);
  }
  double worst = 0, tolerance = fast.problem.dtype == ATTN_BF16 ? 2e-2 : 5e-5;
  for (int i = 4; i < TENSORS; ++i) {
    double error = difference(tensor_of(&fast.args, i), tensor_of(&exact.args, i));
    worst = error > worst || !(error == error) ? error : worst;
  }
  destroy(&fast);
  destroy(&exact);
  if (worst <= tolerance) return true;
  printf("WRONG: relative error %g, tolerance %g\n", worst, tolerance);
  return false;
}

static bool measure(attn_dtype dtype, int64_t length, int64_t heads, int64_t dim, int threads) {
  attn_softmax_problem problem = ATTN_SOFTMAX_PROBLEM_INIT;
  problem.dtype = dtype;
  problem.query_length = problem.key_length = length;
  problem.heads = problem.kv_heads = heads;
  problem.dim = problem.value_dim = dim;
  problem.causal = true;
  if (!check(problem)) return false;
  run r = make(problem);
  char description[256];
  double flops = 4.0 * (double)dim * 0.5 * (double)length * (double)(length + 1) * (double)heads;
  for (int pass = ATTN_PASS_FORWARD; pass <= ATTN_PASS_BACKWARD; ++pass) {
    samples s = samples_new(threads, 8);
    sample(&r, (attn_pass)pass, &s, description);
    double rate = (pass == ATTN_PASS_BACKWARD ? 2.5 : 1) * flops / s.fastest;
    printf(
        "%-8s dim %3d length %6lld %-8s %9.3f ms %7.1f GFLOP/s  %5.1f %% of %.0f bf16, %5.1f %% of "
        "%.0f f32; %d samples\n",
        attn_dtype_name(dtype), (int)dim, (long long)length,
        pass == ATTN_PASS_FORWARD ? "forward" : "backward", s.fastest * 1e3, rate * 1e-9,
        100 * rate / s.bf16_rate, s.bf16_rate * 1e-9, 100 * rate / s.f32_rate, s.f32_rate * 1e-9,
        s.counted);
    fflush(stdout);
  }
  printf("  %s\n", description);
  destroy(&r);
  return true;
}

/* One new token over a long cache, grouped heads: bound by reading the keys and values. */
static void measure_decode(attn_dtype dtype, int64_t keys, int threads) {
  attn_softmax_problem problem = ATTN_SOFTMAX_PROBLEM_INIT;
  problem.dtype = dtype;
  problem.query_length = 1;
  problem.key_length = keys;
  problem.heads = 8;
  problem.kv_heads = 2;
  problem.dim = problem.value_dim = 128;
  problem.causal = true;
  run r = make(problem);
  char description[256];
  samples s = samples_new(threads, 8);
  sample(&r, ATTN_PASS_FORWARD, &s, description);
  double bytes = 2.0 * (double)keys * 2 * 128 * (double)attn_dtype_size(dtype);
  double bandwidth = attn_kernels_copy_bandwidth(threads);
  printf("%-8s decode, %lld keys: %.3f ms, %.1f GB/s, %.1f %% of copy bandwidth\n  %s\n",
         attn_dtype_name(dtype), (long long)keys, s.fastest * 1e3, bytes / s.fastest * 1e-9,
         100 * bytes / s.fastest / bandwidth, description);
  destroy(&r);
}

int main(int count, char **arguments) {
  int64_t length = count > 1 ? atoll(arguments[1]) : 8192;
  int threads = count > 2 ? atoi(arguments[2]) : 2;
  int64_t heads = count > 4 ? atoll(arguments[4]) : 8;
  require(attn_set_threads(threads));
  printf("%s, %d threads, %d heads\n", attn_kernel_path_name(attn_get_kernel_path()), threads,
         (int)heads);
  const attn_dtype dtypes[] = {ATTN_F32, ATTN_BF16};
  bool right = true;
  for (int i = 0; i < 2 && right; ++i) {
    if (count > 3 && strcmp(arguments[3], attn_dtype_name(dtypes[i]))) continue;
    for (int64_t dim = 64; dim <= 128; dim += 64)
      right = right && measure(dtypes[i], length, heads, dim, threads);
    measure_decode(dtypes[i], 65536, threads);
  }
  return right ? 0 : 1;
}
