/* The softmax engine against its oracle over sampled problems, and the identities of exact
 * attention (FlashAttention, arXiv 2205.14135; FlashDecoding). */
#include "support/test.h"

#include "attn/softmax.h"
#include "base/memory.h"
#include "base/random.h"
#include "oracles/softmax.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

/* Relative errors in the Frobenius norm. float64: rounding of exp and of sums. float32: 2^-24 times
 * logits of magnitude up to 30 and sums of up to 600 terms. bfloat16: outputs and, on AMX, weights
 * are rounded to 8 bits, 2^-9 each in the mean square; gradients pass two such roundings and a
 * difference of sums. */
typedef struct tolerances {
  double forward, lse, backward;
} tolerances;

static tolerances tolerance_of(attn_dtype dtype) {
  if (dtype == ATTN_F64) return (tolerances){1e-13, 1e-13, 1e-11};
  if (dtype == ATTN_F32) return (tolerances){1e-5, 1e-5, 5e-5};
  return (tolerances){8e-3, 1e-4, 2e-2};
}

enum { MAX_BATCH = 4 };

/* A problem with its inputs, all as doubles that the dtype represents exactly. Tokens of all
 * sequences follow one another: q is [tokens][heads][dim] and so on. */
typedef struct fixture {
  attn_softmax_problem problem;
  attn_random random;
  int32_t query_offsets[MAX_BATCH + 1], key_offsets[MAX_BATCH + 1], key_lengths[MAX_BATCH];
  bool with_key_lengths, with_d_lse, broadcast_bias;
  int64_t queries, keys;           /* tokens in all */
  double *q, *k, *v, *d_o, *d_lse; /* d_lse: [batch][heads][query_length] or [heads][tokens] */
  double *bias;                    /* [batch][heads][query_length][key_length] */
  double slopes[16], sinks[16];
  double *o, *lse, *d_q, *d_k, *d_v, *d_bias, d_sinks[16]; /* what the oracle says */
} fixture;

static double *zeros(int64_t count) {
  double *x = calloc((size_t)(count + 1), sizeof *x);
  assert_non_null(x);
  return x;
}

/* What the dtype keeps of x. */
static void round_to(attn_dtype dtype, double *x, int64_t count) {
  attn_tensor tensor = test_from_doubles(x, dtype, 1, &count);
  attn_tensor back;
  assert_ok(attn_tensor_wrap(x, ATTN_F64, 1, &count, &back));
  assert_ok(attn_tensor_copy(&tensor, &back));
  attn_tensor_destroy(&tensor);
}

static double *normals(fixture *f, attn_dtype dtype, int64_t count) {
  double *x = zeros(count);
  for (int64_t i = 0; i < count; ++i) x[i] = attn_random_normal(&f->random);
  round_to(dtype, x, count);
  return x;
}

static attn_dtype real_of(attn_dtype dtype) {
  return dtype == ATTN_F64 ? ATTN_F64 : ATTN_F32;
}

static int64_t lse_count(const fixture *f) {
  return f->problem.ragged ? f->problem.heads * f->queries
                           : f->problem.batch * f->problem.heads * f->problem.query_length;
}

static int64_t bias_count(const fixture *f) {
  return f->problem.batch * f->problem.heads * f->problem.query_length * f->problem.key_length;
}

/* Where (sequence, head, query) lies in an array of statistics. */
static int64_t lse_index(const fixture *f, int64_t b, int64_t h, int64_t i) {
  return f->problem.ragged ? h * f->queries + f->query_offsets[b] + i
                           : (b * f->problem.heads + h) * f->problem.query_length + i;
}

/* Fills in the data for a problem whose options are set; ragged lengths are drawn. */
static void fill(fixture *f) {
  attn_softmax_problem *p = &f->problem;
  for (int64_t b = 0; b < p->batch; ++b) {
    int64_t queries = p->query_length, keys = p->key_length;
    if (p->ragged) {
      queries = (int64_t)attn_random_below(&f->random, (uint64_t)queries + 1);
      keys = (int64_t)attn_random_below(&f->random, (uint64_t)keys + 1);
    }
    f->query_offsets[b + 1] = f->query_offsets[b] + (int32_t)queries;
    f->key_offsets[b + 1] = f->key_offsets[b] + (int32_t)keys;
    f->key_lengths[b] = (int32_t)attn_random_below(&f->random, (uint64_t)keys + 1);
  }
  f->queries = f->query_offsets[p->batch];
  f->keys = f->key_offsets[p->batch];
  f->q = normals(f, p->dtype, f->queries * p->heads * p->dim);
  f->k = normals(f, p->dtype, f->keys * p->kv_heads * p->dim);
  f->v = normals(f, p->dtype, f->keys * p->kv_heads * p->value_dim);
  f->d_o = normals(f, p->dtype, f->queries * p->heads * p->value_dim);
  f->d_lse = normals(f, real_of(p->dtype), lse_count(f));
  if (p->bias) {
    f->bias = normals(f, real_of(p->dtype), bias_count(f));
    int64_t matrix = p->query_length * p->key_length;
    for (int64_t m = 1; f->broadcast_bias && m < p->batch * p->heads; ++m)
      memcpy(f->bias + m * matrix, f->bias, (size_t)matrix * sizeof *f->bias);
  }
  for (int64_t h = 0; h < p->heads; ++h) {
    f->slopes[h] = pow(2, -(double)(h + 1));
    f->sinks[h] = attn_random_normal(&f->random);
  }
  round_to(ATTN_F32, f->sinks, p->heads);
  f->o = zeros(f->queries * p->heads * p->value_dim);
  f->lse = zeros(lse_count(f));
  f->d_q = zeros(f->queries * p->heads * p->dim);
  f->d_k = zeros(f->keys * p->kv_heads * p->dim);
  f->d_v = zeros(f->keys * p->kv_heads * p->value_dim);
  f->d_bias = zeros(p->bias ? bias_count(f) : 0);
}

static void clear(fixture *f) {
  double *arrays[] = {f->q, f->k,   f->v,   f->d_o, f->d_lse, f->bias,
                      f->o, f->lse, f->d_q, f->d_k, f->d_v,   f->d_bias};
  for (size_t i = 0; i < sizeof arrays / sizeof *arrays; ++i) free(arrays[i]);
}

/* Rows of one head, gathered (or scattered back, added). */
static double *gather(const double *x, int64_t first, int64_t count, int64_t heads, int64_t head,
                      int64_t width) {
  double *rows = zeros(count * width);
  for (int64_t i = 0; i < count; ++i)
    memcpy(rows + i * width, x + ((first + i) * heads + head) * width,
           (size_t)width * sizeof *rows);
  return rows;
}

static void scatter_add(double *x, int64_t first, int64_t count, int64_t heads, int64_t head,
                        int64_t width, double *rows) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < width; ++c)
      x[((first + i) * heads + head) * width + c] += rows[i * width + c];
  free(rows);
}

static void run_oracle_head(fixture *f, int64_t b, int64_t h) {
  const attn_softmax_problem *p = &f->problem;
  int64_t kv_head = h / (p->heads / p->kv_heads), first = f->query_offsets[b];
  int64_t queries = f->query_offsets[b + 1] - first, first_key = f->key_offsets[b];
  int64_t keys = f->with_key_lengths ? f->key_lengths[b] : f->key_offsets[b + 1] - first_key;
  oracle_softmax x = {.queries = queries,
                      .keys = keys,
                      .dim = p->dim,
                      .value_dim = p->value_dim,
                      .scale = p->scale ? p->scale : 1 / sqrt((double)p->dim),
                      .soft_cap = p->soft_cap,
                      .causal = p->causal,
                      .window_left = p->window_left,
                      .window_right = p->window_right,
                      .alibi_slope = p->alibi ? f->slopes[h] : 0,
                      .sink = p->sinks ? &f->sinks[h] : NULL};
  double *q = gather(f->q, first, queries, p->heads, h, p->dim);
  double *k = gather(f->k, first_key, keys, p->kv_heads, kv_head, p->dim);
  double *v = gather(f->v, first_key, keys, p->kv_heads, kv_head, p->value_dim);
  double *d_o = gather(f->d_o, first, queries, p->heads, h, p->value_dim);
  double *bias = zeros(queries * keys), *d_lse = zeros(queries);
  int64_t matrix = (b * p->heads + h) * p->query_length * p->key_length;
  for (int64_t i = 0; i < queries; ++i) {
    d_lse[i] = f->d_lse[lse_index(f, b, h, i)];
    for (int64_t j = 0; p->bias && j < keys; ++j)
      bias[i * keys + j] = f->bias[matrix + i * p->key_length + j];
  }
  x.q = q, x.k = k, x.v = v, x.d_o = d_o;
  if (p->bias) x.bias = bias;
  if (f->with_d_lse) x.d_lse = d_lse;
  x.o = zeros(queries * p->value_dim);
  x.lse = zeros(queries);
  oracle_softmax_forward(&x);
  for (int64_t i = 0; i < queries; ++i) f->lse[lse_index(f, b, h, i)] = x.lse[i];
  if (p->passes & ATTN_PASS_BACKWARD) {
    x.d_q = zeros(queries * p->dim);
    x.d_k = zeros(keys * p->dim);
    x.d_v = zeros(keys * p->value_dim);
    x.d_bias = zeros(queries * keys);
    if (p->sinks) x.d_sink = &f->d_sinks[h];
    oracle_softmax_backward(&x);
    for (int64_t i = 0; i < queries; ++i)
      for (int64_t j = 0; p->bias && j < keys; ++j)
        f->d_bias[matrix + i * p->key_length + j] = x.d_bias[i * keys + j];
    free(x.d_bias);
    scatter_add(f->d_q, first, queries, p->heads, h, p->dim, x.d_q);
    scatter_add(f->d_k, first_key, keys, p->kv_heads, kv_head, p->dim, x.d_k);
    scatter_add(f->d_v, first_key, keys, p->kv_heads, kv_head, p->value_dim, x.d_v);
  }
  scatter_add(f->o, first, queries, p->heads, h, p->value_dim, x.o);
  double *arrays[] = {q, k, v, d_o, bias, d_lse, x.lse};
  for (size_t i = 0; i < sizeof arrays / sizeof *arrays; ++i) free(arrays[i]);
}

static void run_oracle(fixture *f) {
  for (int64_t b = 0; b < f->problem.batch; ++b)
    for (int64_t h = 0; h < f->problem.heads; ++h) run_oracle_head(f, b, h);
}

/* Tensors of the library's side. `owners` own the memory of the views in args. */
enum { MAX_OWNERS = 24 };
typedef struct tensors {
  attn_softmax_args args;
  attn_tensor owners[MAX_OWNERS];
  int count;
} tensors;

static attn_tensor own(tensors *t, attn_tensor tensor) {
  assert_true(t->count < MAX_OWNERS);
  t->owners[t->count++] = tensor;
  return tensor;
}

static void destroy(tensors *t) {
  for (int i = 0; i < t->count; ++i) attn_tensor_destroy(&t->owners[i]);
}

/* [tokens, heads, width] with gaps between the rows of heads; x NULL: filled with NaN (poison).
 * Not ragged: seen as [batch, length, heads, width]. */
static attn_tensor token_tensor(tensors *t, const fixture *f, const double *x, int64_t tokens,
                                int64_t heads, int64_t width) {
  const int64_t gap = 3, shape[] = {tokens, heads, width + gap}, inner[] = {tokens, heads, width};
  attn_tensor tensor, source;
  assert_ok(attn_tensor_create(f->problem.dtype, 3, shape, &tensor));
  own(t, tensor);
  assert_ok(attn_tensor_fill(&tensor, NAN));
  assert_ok(attn_tensor_slice(&tensor, 2, 0, width, &tensor));
  if (x) {
    assert_ok(attn_tensor_wrap((void *)(uintptr_t)x, ATTN_F64, 3, inner, &source));
    assert_ok(attn_tensor_copy(&source, &tensor));
  }
  if (f->problem.ragged) return tensor;
  attn_tensor view = tensor;
  view.rank = 4;
  view.shape[0] = f->problem.batch;
  view.shape[1] = tokens / f->problem.batch;
  view.stride[0] = tensor.stride[0] * view.shape[1];
  for (int i = 0; i < 3; ++i) {
    view.stride[i + 1] = tensor.stride[i];
    if (i) view.shape[i + 1] = tensor.shape[i];
  }
  return view;
}

static attn_tensor plain_tensor(tensors *t, attn_dtype dtype, const double *x, int rank,
                                const int64_t *shape) {
  attn_tensor tensor;
  if (x) return own(t, test_from_doubles(x, dtype, rank, shape));
  assert_ok(attn_tensor_create(dtype, rank, shape, &tensor));
  assert_ok(attn_tensor_fill(&tensor, NAN));
  return own(t, tensor);
}

static attn_tensor statistics_tensor(tensors *t, const fixture *f, const double *x) {
  const attn_softmax_problem *p = &f->problem;
  const int64_t dense[] = {p->batch, p->heads, p->query_length}, ragged[] = {p->heads, f->queries};
  return plain_tensor(t, real_of(p->dtype), x, p->ragged ? 2 : 3, p->ragged ? ragged : dense);
}

static int64_t page_of(int64_t index, int64_t pages) {
  return (index * 7 + 3) % pages; /* pages is a multiple of no 7: a permutation */
}

/* Tokens of each sequence spread over shuffled pages; unused places hold NaN. */
static attn_tensor paged_tensor(tensors *t, const fixture *f, const double *x, int64_t width,
                                int64_t a_sequence, int64_t pages) {
  const attn_softmax_problem *p = &f->problem;
  const int64_t shape[] = {pages, p->page_size, p->kv_heads, width};
  int64_t row = p->kv_heads * width, count = pages * p->page_size * row;
  double *paged = zeros(count);
  for (int64_t i = 0; i < count; ++i) paged[i] = NAN;
  for (int64_t b = 0; b < p->batch; ++b)
    for (int64_t j = f->key_offsets[b]; j < f->key_offsets[b + 1]; ++j) {
      int64_t local = j - f->key_offsets[b];
      int64_t page = page_of(b * a_sequence + local / p->page_size, pages);
      memcpy(paged + (page * p->page_size + local % p->page_size) * row, x + j * row,
             (size_t)row * sizeof *paged);
    }
  attn_tensor tensor = plain_tensor(t, p->dtype, paged, 4, shape);
  free(paged);
  return tensor;
}

static void make_paged(tensors *t, const fixture *f) {
  const attn_softmax_problem *p = &f->problem;
  int64_t a_sequence = (p->key_length + p->page_size - 1) / p->page_size;
  int64_t pages = p->batch * a_sequence;
  while (pages % 7 == 0) ++pages;
  const int64_t shape[] = {p->batch, a_sequence};
  assert_ok(attn_tensor_create(ATTN_I32, 2, shape, &t->args.page_table));
  own(t, t->args.page_table);
  for (int64_t i = 0; i < p->batch * a_sequence; ++i)
    ((int32_t *)t->args.page_table.data)[i] = (int32_t)page_of(i, pages);
  t->args.k = paged_tensor(t, f, f->k, p->dim, a_sequence, pages);
  t->args.v = paged_tensor(t, f, f->v, p->value_dim, a_sequence, pages);
}

static void make_bias(tensors *t, const fixture *f) {
  const attn_softmax_problem *p = &f->problem;
  const int64_t full[] = {p->batch, p->heads, p->query_length, p->key_length};
  const int64_t one[] = {1, 1, p->query_length, p->key_length};
  attn_dtype real = real_of(p->dtype);
  t->args.bias = plain_tensor(t, real, f->bias, 4, f->broadcast_bias ? one : full);
  if (f->broadcast_bias) assert_ok(attn_tensor_expand(&t->args.bias, 4, full, &t->args.bias));
  t->args.d_bias = plain_tensor(t, real, NULL, 4, full);
}

static tensors make_tensors(const fixture *f) {
  const attn_softmax_problem *p = &f->problem;
  tensors t = {.count = 0};
  t.args.q = token_tensor(&t, f, f->q, f->queries, p->heads, p->dim);
  if (p->paged) {
    make_paged(&t, f);
  } else {
    t.args.k = token_tensor(&t, f, f->k, f->keys, p->kv_heads, p->dim);
    t.args.v = token_tensor(&t, f, f->v, f->keys, p->kv_heads, p->value_dim);
  }
  t.args.o = token_tensor(&t, f, NULL, f->queries, p->heads, p->value_dim);
  t.args.lse = statistics_tensor(&t, f, NULL);
  if (p->bias) make_bias(&t, f);
  if (p->alibi) t.args.alibi_slopes = plain_tensor(&t, ATTN_F32, f->slopes, 1, &p->heads);
  if (p->sinks) t.args.sinks = plain_tensor(&t, ATTN_F32, f->sinks, 1, &p->heads);
  if (p->ragged) t.args.query_offsets = f->query_offsets, t.args.key_offsets = f->key_offsets;
  if (f->with_key_lengths) t.args.key_lengths = f->key_lengths;
  if (!(p->passes & ATTN_PASS_BACKWARD)) return t;
  t.args.d_o = token_tensor(&t, f, f->d_o, f->queries, p->heads, p->value_dim);
  if (f->with_d_lse) t.args.d_lse = statistics_tensor(&t, f, f->d_lse);
  t.args.d_q = token_tensor(&t, f, NULL, f->queries, p->heads, p->dim);
  t.args.d_k = token_tensor(&t, f, NULL, f->keys, p->kv_heads, p->dim);
  t.args.d_v = token_tensor(&t, f, NULL, f->keys, p->kv_heads, p->value_dim);
  if (p->sinks) t.args.d_sinks = plain_tensor(&t, ATTN_F32, NULL, 1, &p->heads);
  return t;
}

static void run_plan(const attn_softmax_problem *problem, const attn_softmax_args *args) {
  attn_plan *plan;
  attn_plan_info info;
  assert_ok(attn_softmax_plan(problem, &plan));
  assert_ok(attn_plan_get_info(plan, &info));
  void *workspace = aligned_alloc(64, (info.workspace_bytes + 64) / 64 * 64);
  memset(workspace, 0xff, info.workspace_bytes); /* NaN in every dtype */
  uint64_t allocations = attn_memory_get_stats().allocations;
  if (problem->passes & ATTN_PASS_FORWARD) assert_ok(attn_softmax_forward(plan, args, workspace));
  if (problem->passes & ATTN_PASS_BACKWARD) assert_ok(attn_softmax_backward(plan, args, workspace));
  assert_int_equal(attn_memory_get_stats().allocations, allocations);
  free(workspace);
  attn_plan_destroy(plan);
}

/* -inf must match -inf; the rest as a norm. */
static double lse_error(const double *got, const double *want, int64_t count) {
  double difference = 0, norm = 1;
  for (int64_t i = 0; i < count; ++i) {
    if (want[i] == -INFINITY || got[i] == -INFINITY) {
      if (got[i] != want[i]) return INFINITY;
      continue;
    }
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return sqrt(difference / norm);
}

static void describe_case(const fixture *f) {
  const attn_softmax_problem *p = &f->problem;
  print_message(
      "  %s on %s: batch %d, %d x %d, heads %d/%d, dims %d %d, scale %g%s, window %d %d, "
      "cap %g%s%s%s%s%s%s%s, splits %d\n",
      attn_dtype_name(p->dtype), attn_kernel_path_name(attn_get_kernel_path()), (int)p->batch,
      (int)p->query_length, (int)p->key_length, (int)p->heads, (int)p->kv_heads, (int)p->dim,
      (int)p->value_dim, p->scale, p->causal ? ", causal" : "", (int)p->window_left,
      (int)p->window_right, p->soft_cap, p->bias ? ", bias" : "", p->alibi ? ", alibi" : "",
      p->sinks ? ", sinks" : "", p->ragged ? ", ragged" : "", p->paged ? ", paged" : "",
      f->with_key_lengths ? ", key lengths" : "", f->with_d_lse ? ", d_lse" : "", (int)p->splits);
}

static void expect(const fixture *f, const char *name, double error, double tolerance) {
  if (error <= tolerance) return;
  describe_case(f);
  fail_msg("%s: relative error %.3g, tolerance %.3g", name, error, tolerance);
}

/* A gradient that is nearly 0 by cancellation (one key: no freedom) is compared with the size of
 * what cancels. */
static double gradient_error(const attn_tensor *got, const double *want, int64_t count) {
  double *values = test_to_doubles(got), difference = 0, norm = 1e-2 * (double)count;
  for (int64_t i = 0; i < count; ++i) {
    difference += (values[i] - want[i]) * (values[i] - want[i]);
    norm += want[i] * want[i];
  }
  free(values);
  return count ? sqrt(difference / norm) : 0;
}

static void compare(const fixture *f, const tensors *t) {
  const attn_softmax_problem *p = &f->problem;
  tolerances tolerance = tolerance_of(p->dtype);
  expect(f, "o", gradient_error(&t->args.o, f->o, f->queries * p->heads * p->value_dim),
         tolerance.forward);
  double *lse = test_to_doubles(&t->args.lse);
  expect(f, "lse", lse_error(lse, f->lse, lse_count(f)), tolerance.lse);
  free(lse);
  if (!(p->passes & ATTN_PASS_BACKWARD)) return;
  expect(f, "d_q", gradient_error(&t->args.d_q, f->d_q, f->queries * p->heads * p->dim),
         tolerance.backward);
  expect(f, "d_k", gradient_error(&t->args.d_k, f->d_k, f->keys * p->kv_heads * p->dim),
         tolerance.backward);
  expect(f, "d_v", gradient_error(&t->args.d_v, f->d_v, f->keys * p->kv_heads * p->value_dim),
         tolerance.backward);
  if (p->bias)
    expect(f, "d_bias", gradient_error(&t->args.d_bias, f->d_bias, bias_count(f)),
           tolerance.backward);
  if (p->sinks)
    expect(f, "d_sinks", gradient_error(&t->args.d_sinks, f->d_sinks, p->heads),
           fmax(tolerance.backward, FLT_EPSILON)); /* stored as float32 in every dtype */
}

static void check_on_all_paths(fixture *f) {
  attn_kernel_path before = attn_get_kernel_path();
  run_oracle(f);
  for (int path = 0; path < ATTN_PATH_COUNT; ++path) {
    if (!attn_kernel_path_available((attn_kernel_path)path)) continue;
    assert_ok(attn_set_kernel_path((attn_kernel_path)path));
    tensors t = make_tensors(f);
    run_plan(&f->problem, &t.args);
    compare(f, &t);
    destroy(&t);
  }
  assert_ok(attn_set_kernel_path(before));
}

static int64_t below(fixture *f, int64_t n) {
  return (int64_t)attn_random_below(&f->random, (uint64_t)n);
}

/* One draw in `n`. */
static bool one_in(fixture *f, int64_t n) {
  return below(f, n) == 0;
}

static fixture sample(attn_dtype dtype, uint64_t seed, int passes) {
  fixture f = {.problem = ATTN_SOFTMAX_PROBLEM_INIT, .random = {.seed = seed}};
  attn_softmax_problem *p = &f.problem;
  p->dtype = dtype;
  p->passes = passes;
  p->batch = 1 + below(&f, 2);
  p->query_length = one_in(&f, 3) ? 1 + below(&f, 4) : 1 + below(&f, 150);
  p->key_length = one_in(&f, 3) ? p->query_length : 1 + below(&f, one_in(&f, 4) ? 500 : 200);
  p->kv_heads = 1 + below(&f, 2);
  p->heads = p->kv_heads * (1 + below(&f, 3));
  p->dim = one_in(&f, 6) ? 256 - below(&f, 20) : 1 + below(&f, 80);
  p->value_dim = one_in(&f, 2) ? p->dim : 1 + below(&f, 80);
  if (one_in(&f, 4)) p->scale = 0.1 + attn_random_uniform(&f.random);
  p->causal = one_in(&f, 2);
  if (one_in(&f, 3)) p->window_left = below(&f, 60);
  if (one_in(&f, 4)) p->window_right = below(&f, 60);
  if (one_in(&f, 4)) p->soft_cap = 1 + 4 * attn_random_uniform(&f.random);
  p->ragged = one_in(&f, 4);
  p->bias = !p->ragged && one_in(&f, 3);
  p->alibi = one_in(&f, 4);
  p->sinks = one_in(&f, 3);
  p->paged = !(passes & ATTN_PASS_BACKWARD) && one_in(&f, 3);
  if (p->paged) p->page_size = 1 + below(&f, 40);
  if (one_in(&f, 2)) p->splits = 1 + below(&f, 4);
  f.with_key_lengths = one_in(&f, 4);
  f.with_d_lse = one_in(&f, 2);
  f.broadcast_bias = one_in(&f, 2);
  fill(&f);
  return f;
}

static void check_samples(attn_dtype dtype, int passes, int count) {
  for (int i = 0; i < count; ++i) {
    fixture f = sample(dtype, (uint64_t)(1000 * (int)dtype + i), passes);
    check_on_all_paths(&f);
    clear(&f);
  }
}

enum { SAMPLES = 40 };

static void forward_f64(void **state) {
  (void)state;
  check_samples(ATTN_F64, ATTN_PASS_FORWARD, SAMPLES);
}

static void forward_f32(void **state) {
  (void)state;
  check_samples(ATTN_F32, ATTN_PASS_FORWARD, SAMPLES);
}

static void forward_bf16(void **state) {
  (void)state;
  check_samples(ATTN_BF16, ATTN_PASS_FORWARD, SAMPLES);
}

enum { BOTH = ATTN_PASS_FORWARD | ATTN_PASS_BACKWARD };

static void backward_f64(void **state) {
  (void)state;
  check_samples(ATTN_F64, BOTH, SAMPLES);
}

static void backward_f32(void **state) {
  (void)state;
  check_samples(ATTN_F32, BOTH, SAMPLES);
}

static void backward_bf16(void **state) {
  (void)state;
  check_samples(ATTN_BF16, BOTH, SAMPLES);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(forward_f64),  cmocka_unit_test(forward_f32),
      cmocka_unit_test(forward_bf16), cmocka_unit_test(backward_f64),
      cmocka_unit_test(backward_f32), cmocka_unit_test(backward_bf16),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
