/* The softmax engine against its oracle over sampled problems, and the identities of exact
 * attention (FlashAttention, arXiv 2205.14135; FlashDecoding). */
#include "support/test.h"

#include "attn/softmax.h"
#include "base/fault.h"
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

enum { MAX_BATCH = 4, BOTH = ATTN_PASS_FORWARD | ATTN_PASS_BACKWARD };

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
  bool same_lists;                 /* of all heads */
  int32_t *list[2];                /* of blocks: offsets [batch][heads][blocks + 1], indices */
  double slopes[16], sinks[16];
  double *o, *lse, *d_q, *d_k, *d_v, *d_bias, d_sinks[16]; /* what the oracle says */
} fixture;

static double *zeros(int64_t count) {
  double *x = calloc((size_t)(count + 1), sizeof *x);
  assert_non_null(x);
  return x;
}

static int64_t below(fixture *f, int64_t n) {
  return (int64_t)attn_random_below(&f->random, (uint64_t)n);
}

/* One draw in `n`. */
static bool one_in(fixture *f, int64_t n) {
  return below(f, n) == 0;
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

/* Blocks of queries of the longest sequence. */
static int64_t list_blocks(const fixture *f) {
  return (f->problem.query_length + f->problem.list_queries - 1) / f->problem.list_queries;
}

/* Every block of keys is on a list with the probability `share`. */
static void fill_lists(fixture *f, double share) {
  const attn_softmax_problem *p = &f->problem;
  int64_t blocks = list_blocks(f), keys = (p->key_length + p->list_keys - 1) / p->list_keys;
  int64_t lists = (f->same_lists ? 1 : p->heads) * p->batch, count = 0;
  f->list[0] = calloc((size_t)(lists * (blocks + 1)), sizeof(int32_t));
  f->list[1] = calloc((size_t)(lists * blocks * keys + 1), sizeof(int32_t));
  for (int64_t l = 0; l < lists; ++l)
    for (int64_t b = 0; b <= blocks; ++b) {
      f->list[0][l * (blocks + 1) + b] = (int32_t)count;
      for (int64_t j = 0; b < blocks && j < keys; ++j)
        if (attn_random_uniform(&f->random) < share) f->list[1][count++] = (int32_t)j;
    }
}

static bool listed(const fixture *f, int64_t b, int64_t h, int64_t i, int64_t j) {
  const attn_softmax_problem *p = &f->problem;
  int64_t list = f->same_lists ? b : b * p->heads + h;
  const int32_t *offset = f->list[0] + list * (list_blocks(f) + 1) + i / p->list_queries;
  for (int64_t e = offset[0]; e < offset[1]; ++e)
    if (f->list[1][e] == j / p->list_keys) return true;
  return false;
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
  if (p->list_keys) fill_lists(f, one_in(f, 3) ? 0.15 : 0.5);
}

static void clear(fixture *f) {
  double *arrays[] = {f->q, f->k,   f->v,   f->d_o, f->d_lse, f->bias,
                      f->o, f->lse, f->d_q, f->d_k, f->d_v,   f->d_bias};
  for (size_t i = 0; i < sizeof arrays / sizeof *arrays; ++i) free(arrays[i]);
  free(f->list[0]);
  free(f->list[1]);
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
  bool *seen = calloc((size_t)(queries * keys + 1), sizeof *seen);
  int64_t matrix = (b * p->heads + h) * p->query_length * p->key_length;
  for (int64_t i = 0; i < queries; ++i) {
    d_lse[i] = f->d_lse[lse_index(f, b, h, i)];
    for (int64_t j = 0; p->list_keys && j < keys; ++j) seen[i * keys + j] = listed(f, b, h, i, j);
    for (int64_t j = 0; p->bias && j < keys; ++j)
      bias[i * keys + j] = f->bias[matrix + i * p->key_length + j];
  }
  x.q = q, x.k = k, x.v = v, x.d_o = d_o;
  if (p->bias) x.bias = bias;
  if (p->list_keys) x.listed = seen;
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
  free(seen);
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

static void make_lists(tensors *t, const fixture *f) {
  const attn_softmax_problem *p = &f->problem;
  int64_t heads = f->same_lists ? 1 : p->heads, blocks = list_blocks(f) + 1;
  const int64_t stored[] = {p->batch, heads, blocks}, full[] = {p->batch, p->heads, blocks};
  const int64_t entries = f->list[0][p->batch * heads * blocks - 1];
  assert_ok(attn_tensor_wrap(f->list[0], ATTN_I32, 3, stored, &t->args.block_offsets));
  if (f->same_lists)
    assert_ok(attn_tensor_expand(&t->args.block_offsets, 3, full, &t->args.block_offsets));
  assert_ok(attn_tensor_wrap(f->list[1], ATTN_I32, 1, &entries, &t->args.block_indices));
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
  if (p->list_keys) make_lists(&t, f);
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
  print_message("  %s on %s: batch %d, %d x %d, heads %d/%d, dims %d %d, scale %g%s, window %d %d, "
                "cap %g%s%s%s%s%s%s%s, lists %d x %d%s, splits %d\n",
                attn_dtype_name(p->dtype), attn_kernel_path_name(attn_get_kernel_path()),
                (int)p->batch, (int)p->query_length, (int)p->key_length, (int)p->heads,
                (int)p->kv_heads, (int)p->dim, (int)p->value_dim, p->scale,
                p->causal ? ", causal" : "", (int)p->window_left, (int)p->window_right, p->soft_cap,
                p->bias ? ", bias" : "", p->alibi ? ", alibi" : "", p->sinks ? ", sinks" : "",
                p->ragged ? ", ragged" : "", p->paged ? ", paged" : "",
                f->with_key_lengths ? ", key lengths" : "", f->with_d_lse ? ", d_lse" : "",
                (int)p->list_queries, (int)p->list_keys, f->same_lists ? " for all heads" : "",
                (int)p->splits);
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
  if (one_in(&f, 12)) { /* latents */
    p->dim = 512 + below(&f, 100);
    p->value_dim = 512;
  }
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
  if (one_in(&f, 3)) {
    p->list_queries = one_in(&f, 2) ? 32 * (1 + below(&f, 3)) : 1 + below(&f, 60);
    p->list_keys =
        one_in(&f, 2) || passes & ATTN_PASS_BACKWARD ? 32 * (1 + below(&f, 4)) : 1 + below(&f, 60);
    f.same_lists = one_in(&f, 2);
  }
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

/* Shapes of which most keys are seen by whole tiles of rows, which AMX takes in runs. `growth`
 * multiplies the keys by 1 + growth * position: maxima that grow from run to run, so that runs find
 * their base too low (8: at once, and on every path a softmax of nearly one key). */
typedef struct long_shape {
  int64_t queries, keys, dim, value_dim, window_left;
  bool causal;
  double growth;
} long_shape;

static void long_rows_bf16(void **state) {
  (void)state;
  static const long_shape shapes[] = {
      {64, 700, 64, 64, -1, false, 0},    {300, 300, 128, 128, -1, true, 0},
      {97, 420, 96, 32, 200, true, 0},    {40, 333, 256, 64, -1, false, 0},
      {64, 700, 64, 64, -1, false, 0.01}, {130, 600, 40, 96, -1, true, 8},
  };
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; ++i) {
    const long_shape *s = &shapes[i];
    fixture f = {.problem = ATTN_SOFTMAX_PROBLEM_INIT, .random = {.seed = 100 + i}};
    attn_softmax_problem *p = &f.problem;
    p->dtype = ATTN_BF16;
    p->query_length = s->queries, p->key_length = s->keys, p->dim = s->dim;
    p->value_dim = s->value_dim, p->window_left = s->window_left, p->causal = s->causal;
    p->heads = p->kv_heads = 1;
    p->sinks = i % 2;
    fill(&f);
    for (int64_t j = 0; j < f.keys * p->dim; ++j) f.k[j] *= 1 + s->growth * (double)(j / p->dim);
    round_to(ATTN_BF16, f.k, f.keys * p->dim);
    check_on_all_paths(&f);
    clear(&f);
  }
}

/* sum(o d_o) + sum(lse d_lse) as the library computes it. */
static double loss(const fixture *f) {
  attn_softmax_problem problem = f->problem;
  problem.passes = ATTN_PASS_FORWARD;
  tensors t = make_tensors(f);
  run_plan(&problem, &t.args);
  double *o = test_to_doubles(&t.args.o), *lse = test_to_doubles(&t.args.lse), sum = 0;
  for (int64_t i = 0; i < f->queries * f->problem.heads * f->problem.value_dim; ++i)
    sum += o[i] * f->d_o[i];
  for (int64_t i = 0; i < lse_count(f); ++i)
    if (lse[i] != -INFINITY) sum += lse[i] * f->d_lse[i];
  free(o);
  free(lse);
  destroy(&t);
  return sum;
}

/* The derivative along a random direction of one input against central differences. */
static void check_direction(fixture *f, const char *name, double *x, int64_t count,
                            const attn_tensor *gradient) {
  /* A power of two, so that sinks, which are float32, take the step exactly. The error of central
   * differences is of order step^2. */
  const double step = 0x1p-10, tolerance = 1e-5;
  double *direction = zeros(count), *g = test_to_doubles(gradient), analytic = 0;
  for (int64_t i = 0; i < count; ++i) {
    direction[i] = attn_random_u32(&f->random) & 1 ? 1 : -1;
    analytic += direction[i] * g[i];
    x[i] += step * direction[i];
  }
  double above = loss(f);
  for (int64_t i = 0; i < count; ++i) x[i] -= 2 * step * direction[i];
  double below_it = loss(f);
  for (int64_t i = 0; i < count; ++i) x[i] += step * direction[i];
  double numeric = (above - below_it) / (2 * step);
  free(direction);
  free(g);
  if (!(fabs(numeric - analytic) <= tolerance * (1 + fabs(analytic)) * (double)count))
    fail_msg("%s: finite differences %.12g, gradient %.12g", name, numeric, analytic);
}

static void gradients_equal_finite_differences(void **state) {
  (void)state;
  fixture f = {.problem = ATTN_SOFTMAX_PROBLEM_INIT, .random = {.seed = 77}, .with_d_lse = true};
  attn_softmax_problem *p = &f.problem;
  p->dtype = ATTN_F64;
  p->passes = BOTH;
  p->query_length = 9, p->key_length = 13, p->heads = 4, p->kv_heads = 2, p->dim = 5;
  p->value_dim = 3, p->causal = true, p->window_left = 6, p->soft_cap = 1.5;
  p->bias = p->alibi = p->sinks = true;
  fill(&f);
  for (int64_t h = 0; h < p->heads; ++h) f.sinks[h] = round(f.sinks[h] * 256) / 256;
  tensors t = make_tensors(&f);
  run_plan(p, &t.args);
  check_direction(&f, "q", f.q, f.queries * p->heads * p->dim, &t.args.d_q);
  check_direction(&f, "k", f.k, f.keys * p->kv_heads * p->dim, &t.args.d_k);
  check_direction(&f, "v", f.v, f.keys * p->kv_heads * p->value_dim, &t.args.d_v);
  check_direction(&f, "bias", f.bias, bias_count(&f), &t.args.d_bias);
  check_direction(&f, "sinks", f.sinks, p->heads, &t.args.d_sinks);
  destroy(&t);
  clear(&f);
}

/* A plain float32 problem, filled; the caller may change options before `fill`. */
static fixture plain(int64_t queries, int64_t keys, bool causal) {
  fixture f = {.problem = ATTN_SOFTMAX_PROBLEM_INIT, .random = {.seed = 5}};
  attn_softmax_problem *p = &f.problem;
  p->query_length = queries, p->key_length = keys, p->causal = causal;
  p->heads = p->kv_heads = 2, p->dim = p->value_dim = 48;
  return f;
}

static double *output(const fixture *f, double **lse) {
  tensors t = make_tensors(f);
  run_plan(&f->problem, &t.args);
  double *o = test_to_doubles(&t.args.o);
  if (lse) *lse = test_to_doubles(&t.args.lse);
  destroy(&t);
  return o;
}

static const double reordered = 2e-6; /* float32 sums in another order */

static void splits_do_not_matter(void *context) {
  (void)context;
  fixture f = plain(7, 700, true);
  fill(&f);
  double *lse_one, *one;
  f.problem.splits = 1;
  one = output(&f, &lse_one);
  for (int splits = 2; splits < 9; ++splits) {
    double *lse, *o;
    f.problem.splits = splits;
    o = output(&f, &lse);
    assert_true(test_relative_error(o, one, f.queries * 2 * 48) < reordered);
    assert_true(test_relative_error(lse, lse_one, lse_count(&f)) < reordered);
    free(o);
    free(lse);
  }
  free(one);
  free(lse_one);
  clear(&f);
}

static void a_constant_shifts_the_lse_alone(void *context) {
  (void)context;
  fixture f = plain(30, 90, true);
  f.problem.bias = true;
  fill(&f);
  double *lse, *shifted_lse, *o = output(&f, &lse);
  for (int64_t i = 0; i < bias_count(&f); ++i) f.bias[i] += 3;
  double *shifted = output(&f, &shifted_lse);
  assert_true(test_relative_error(shifted, o, f.queries * 2 * 48) < reordered);
  for (int64_t i = 0; i < lse_count(&f); ++i) assert_true(fabs(shifted_lse[i] - lse[i] - 3) < 1e-5);
  free(o);
  free(shifted);
  free(lse);
  free(shifted_lse);
  clear(&f);
}

/* The keys in two halves, merged by attn_softmax_merge, equal one pass. */
static void halves_merge_into_the_whole(void *context) {
  (void)context;
  enum { QUERIES = 11, KEYS = 130, CUT = 57, HEADS = 2, DIM = 48, ROWS = QUERIES * HEADS };
  fixture f = plain(QUERIES, KEYS, false);
  fill(&f);
  double *lse, *o = output(&f, &lse), *parts = zeros(2 * ROWS * DIM), *part_lse = zeros(2 * ROWS);
  for (int half = 0; half < 2; ++half) {
    fixture part = f;
    int64_t first = half ? CUT : 0;
    part.keys = part.problem.key_length = half ? KEYS - CUT : CUT;
    part.k += first * HEADS * DIM;
    part.v += first * HEADS * DIM;
    double *half_lse, *half_o = output(&part, &half_lse);
    memcpy(parts + half * ROWS * DIM, half_o, sizeof *parts * ROWS * DIM);
    for (int i = 0; i < QUERIES; ++i) /* from [heads][queries] to the rows of o */
      for (int h = 0; h < HEADS; ++h)
        part_lse[half * ROWS + i * HEADS + h] = half_lse[h * QUERIES + i];
    free(half_o);
    free(half_lse);
  }
  const int64_t shape[] = {2, ROWS, DIM};
  attn_tensor a = test_from_doubles(parts, ATTN_F32, 3, shape);
  attn_tensor b = test_from_doubles(part_lse, ATTN_F32, 2, shape), merged, merged_lse;
  assert_ok(attn_tensor_create(ATTN_F32, 2, shape + 1, &merged));
  assert_ok(attn_tensor_create(ATTN_F32, 1, shape + 1, &merged_lse));
  assert_ok(attn_softmax_merge(&a, &b, &merged, &merged_lse));
  double *got = test_to_doubles(&merged);
  assert_true(test_relative_error(got, o, ROWS * DIM) < reordered);
  assert_int_equal(attn_softmax_merge(&a, &a, &merged, NULL), ATTN_INVALID_SHAPE);
  assert_int_equal(attn_softmax_merge(&a, &b, &merged_lse, NULL), ATTN_INVALID_SHAPE);
  double *arrays[] = {o, lse, parts, part_lse, got};
  for (size_t i = 0; i < sizeof arrays / sizeof *arrays; ++i) free(arrays[i]);
  attn_tensor *owned[] = {&a, &b, &merged, &merged_lse};
  for (size_t i = 0; i < sizeof owned / sizeof *owned; ++i) attn_tensor_destroy(owned[i]);
  clear(&f);
}

/* The last query alone, as in decoding, equals the last row of the whole. */
static void decoding_continues_the_prefill(void *context) {
  (void)context;
  enum { LENGTH = 77, WIDTH = 2 * 48 };
  fixture f = plain(LENGTH, LENGTH, true);
  f.problem.window_left = 50;
  f.problem.alibi = true;
  fill(&f);
  double *whole = output(&f, NULL);
  fixture step = f;
  step.problem.query_length = step.queries = 1;
  step.q += (LENGTH - 1) * WIDTH;
  double *o = output(&step, NULL);
  assert_true(test_relative_error(o, whole + (LENGTH - 1) * WIDTH, WIDTH) < reordered);
  free(whole);
  free(o);
  clear(&f);
}

static void runs_are_identical(void *context) {
  (void)context;
  fixture f = plain(150, 300, true);
  f.problem.passes = BOTH;
  fill(&f);
  tensors a = make_tensors(&f), b = make_tensors(&f);
  assert_ok(attn_set_threads(3));
  run_plan(&f.problem, &a.args);
  run_plan(&f.problem, &b.args);
  assert_ok(attn_set_threads(0));
  const attn_tensor *pairs[][2] = {{&a.args.o, &b.args.o},
                                   {&a.args.d_q, &b.args.d_q},
                                   {&a.args.d_k, &b.args.d_k},
                                   {&a.args.d_v, &b.args.d_v}};
  for (size_t i = 0; i < sizeof pairs / sizeof *pairs; ++i) {
    double *x = test_to_doubles(pairs[i][0]), *y = test_to_doubles(pairs[i][1]);
    assert_memory_equal(x, y, (size_t)attn_tensor_count(pairs[i][0]) * sizeof *x);
    free(x);
    free(y);
  }
  destroy(&a);
  destroy(&b);
  clear(&f);
}

/* Logits of 1e4: nothing overflows, and the largest key of a row wins as it should. */
static void large_logits_do_not_overflow(void *context) {
  (void)context;
  fixture f = plain(40, 80, true);
  f.problem.passes = BOTH;
  f.problem.scale = 1e3;
  fill(&f);
  run_oracle(&f);
  tensors t = make_tensors(&f);
  run_plan(&f.problem, &t.args);
  /* A logit of 1e4 has a rounding error of 1e-3 in float32, and so has every weight. */
  assert_true(gradient_error(&t.args.o, f.o, f.queries * 2 * 48) < 1e-2);
  const attn_tensor *gradients[] = {&t.args.d_q, &t.args.d_k, &t.args.d_v};
  for (int i = 0; i < 3; ++i) {
    double *x = test_to_doubles(gradients[i]);
    for (int64_t j = 0; j < attn_tensor_count(gradients[i]); ++j) assert_true(isfinite(x[j]));
    free(x);
  }
  destroy(&t);
  clear(&f);
}

/* More queries than keys: the first see nothing. Also rows whose bias is -inf everywhere. */
static void empty_rows_are_zero(void *context) {
  (void)context;
  fixture f = plain(100, 20, true);
  f.problem.passes = BOTH;
  f.problem.bias = true;
  f.problem.sinks = true;
  fill(&f);
  for (int64_t j = 0; j < 20; ++j) f.bias[90 * 20 + j] = -INFINITY; /* head 0 */
  tensors t = make_tensors(&f);
  run_plan(&f.problem, &t.args);
  double *o = test_to_doubles(&t.args.o), *lse = test_to_doubles(&t.args.lse);
  double *d_q = test_to_doubles(&t.args.d_q);
  for (int64_t i = 0; i < 100; ++i) {
    bool empty = i < 80;
    assert_true((lse[i] == -INFINITY) == (empty || i == 90));
    for (int64_t c = 0; c < 48; ++c) {
      assert_true(isfinite(o[i * 96 + c]) && isfinite(d_q[i * 96 + c]));
      if (empty || i == 90) assert_true(o[i * 96 + c] == 0 && d_q[i * 96 + c] == 0);
    }
  }
  free(o);
  free(lse);
  free(d_q);
  destroy(&t);
  clear(&f);
}

static void identities(void **state) {
  (void)state;
  test_on_every_path(splits_do_not_matter, NULL);
  test_on_every_path(a_constant_shifts_the_lse_alone, NULL);
  test_on_every_path(halves_merge_into_the_whole, NULL);
  test_on_every_path(decoding_continues_the_prefill, NULL);
  test_on_every_path(runs_are_identical, NULL);
  test_on_every_path(large_logits_do_not_overflow, NULL);
  test_on_every_path(empty_rows_are_zero, NULL);
}

static void refuse(attn_softmax_problem problem, attn_status status, const char *word) {
  attn_plan *plan = NULL;
  assert_int_equal(attn_softmax_plan(&problem, &plan), status);
  assert_null(plan);
  if (!strstr(attn_error_message(), word))
    fail_msg("\"%s\" does not name %s", attn_error_message(), word);
}

static void bad_problems_are_refused(void **state) {
  (void)state;
  const attn_softmax_problem good = plain(10, 10, true).problem;
  attn_plan *plan;
  assert_ok(attn_softmax_plan(&good, &plan));
  attn_plan_destroy(plan);
#define REFUSE(field, value, status)                                                               \
  do {                                                                                             \
    attn_softmax_problem bad = good;                                                               \
    bad.field = value;                                                                             \
    refuse(bad, status, #field);                                                                   \
  } while (0)
  REFUSE(struct_size, 3, ATTN_INVALID_ARGUMENT);
  REFUSE(dtype, ATTN_F16, ATTN_UNSUPPORTED);
  REFUSE(dtype, (attn_dtype)99, ATTN_UNSUPPORTED);
  REFUSE(passes, 0, ATTN_INVALID_ARGUMENT);
  REFUSE(passes, 8, ATTN_INVALID_ARGUMENT);
  REFUSE(batch, 0, ATTN_INVALID_ARGUMENT);
  REFUSE(batch, -1, ATTN_INVALID_ARGUMENT);
  REFUSE(batch, INT64_MAX, ATTN_INVALID_ARGUMENT);
  REFUSE(query_length, 0, ATTN_INVALID_ARGUMENT);
  REFUSE(key_length, INT64_MIN, ATTN_INVALID_ARGUMENT);
  REFUSE(heads, 0, ATTN_INVALID_ARGUMENT);
  REFUSE(heads, 3, ATTN_INVALID_SHAPE);
  REFUSE(kv_heads, -2, ATTN_INVALID_ARGUMENT);
  REFUSE(dim, 0, ATTN_INVALID_ARGUMENT);
  REFUSE(dim, 1025, ATTN_INVALID_ARGUMENT);
  REFUSE(value_dim, 1025, ATTN_INVALID_ARGUMENT);
  REFUSE(scale, NAN, ATTN_INVALID_ARGUMENT);
  REFUSE(scale, INFINITY, ATTN_INVALID_ARGUMENT);
  REFUSE(soft_cap, -1, ATTN_INVALID_ARGUMENT);
  REFUSE(soft_cap, NAN, ATTN_INVALID_ARGUMENT);
  REFUSE(window_left, -2, ATTN_INVALID_ARGUMENT);
  REFUSE(window_right, INT64_MIN, ATTN_INVALID_ARGUMENT);
  REFUSE(splits, -1, ATTN_INVALID_ARGUMENT);
  REFUSE(planning, (attn_planning)7, ATTN_INVALID_ARGUMENT);
  REFUSE(list_queries, -1, ATTN_INVALID_ARGUMENT);
  REFUSE(list_queries, 16, ATTN_INVALID_ARGUMENT);
  REFUSE(list_keys, 16, ATTN_INVALID_ARGUMENT);
  attn_softmax_problem uneven = good;
  uneven.list_queries = uneven.list_keys = 48;
  uneven.passes = BOTH;
  refuse(uneven, ATTN_UNSUPPORTED, "list_keys");
  attn_softmax_problem paged = good;
  paged.paged = true;
  refuse(paged, ATTN_INVALID_ARGUMENT, "page_size");
  paged.page_size = 16;
  paged.passes = BOTH;
  refuse(paged, ATTN_UNSUPPORTED, "paged");
  attn_softmax_problem huge = good; /* legal field by field; must neither crash nor overflow */
  huge.batch = huge.query_length = huge.key_length = huge.heads = (int64_t)1 << 31;
  huge.kv_heads = 1;
  huge.dim = huge.value_dim = 256;
  huge.window_left = huge.window_right = INT64_MAX;
  huge.splits = 65536;
  huge.passes = BOTH;
  refuse(huge, ATTN_INVALID_SHAPE, "memory");
}

static void bad_tensors_are_refused(void **state) {
  (void)state;
  fixture f = plain(10, 12, true);
  f.problem.passes = BOTH;
  f.problem.bias = f.problem.sinks = true;
  fill(&f);
  tensors t = make_tensors(&f);
  attn_plan *plan;
  attn_plan_info info;
  assert_ok(attn_softmax_plan(&f.problem, &plan));
  assert_ok(attn_plan_get_info(plan, &info));
  void *workspace = aligned_alloc(64, (info.workspace_bytes + 64) / 64 * 64);
  const attn_softmax_args good = t.args;
#define REFUSE_ARGS(change, execute, word)                                                         \
  do {                                                                                             \
    attn_softmax_args bad = good;                                                                  \
    change;                                                                                        \
    assert_int_not_equal(execute(plan, &bad, workspace), ATTN_OK);                                 \
    if (!strstr(attn_error_message(), word))                                                       \
      fail_msg("\"%s\" does not name %s", attn_error_message(), word);                             \
  } while (0)
  REFUSE_ARGS(bad.q.data = NULL, attn_softmax_forward, "q is missing");
  REFUSE_ARGS(bad.k.shape[1] = 11, attn_softmax_forward, "k has shape");
  REFUSE_ARGS(bad.v.dtype = ATTN_F64, attn_softmax_forward, "v is float64");
  REFUSE_ARGS(bad.o.stride[1] = 0, attn_softmax_forward, "o has stride 0");
  REFUSE_ARGS(bad.q.stride[3] = 2, attn_softmax_forward, "q has stride 2");
  REFUSE_ARGS(bad.q.rank = 3, attn_softmax_forward, "q has shape");
  REFUSE_ARGS(bad.q.device.kind = ATTN_CUDA, attn_softmax_forward, "q is not in CPU");
  REFUSE_ARGS(bad.bias.data = NULL, attn_softmax_forward, "bias is missing");
  REFUSE_ARGS(bad.sinks.shape[0] = 1, attn_softmax_forward, "sinks has shape");
  REFUSE_ARGS(bad.lse.data = NULL, attn_softmax_backward, "lse is missing");
  REFUSE_ARGS(bad.d_o.data = NULL, attn_softmax_backward, "d_o is missing");
  REFUSE_ARGS(bad.d_k.shape[3] = 5, attn_softmax_backward, "d_k has shape");
  const int32_t too_long[] = {13};
  REFUSE_ARGS(bad.key_lengths = too_long, attn_softmax_forward, "key_lengths[0] is 13");
  assert_int_not_equal(attn_softmax_forward(plan, &good, NULL), ATTN_OK);
  assert_int_not_equal(attn_softmax_forward(NULL, &good, workspace), ATTN_OK);
  attn_plan_destroy(plan);
  destroy(&t);

  f.problem.bias = false;
  f.problem.ragged = true;
  t = make_tensors(&f);
  assert_ok(attn_softmax_plan(&f.problem, &plan));
  const int32_t backwards[] = {5, 2}, beyond[] = {5, 14};
  attn_softmax_args bad = t.args;
  bad.query_offsets = backwards;
  assert_int_equal(attn_softmax_forward(plan, &bad, workspace), ATTN_INVALID_SHAPE);
  bad.query_offsets = f.query_offsets;
  bad.key_offsets = beyond;
  assert_int_equal(attn_softmax_forward(plan, &bad, workspace), ATTN_INVALID_SHAPE);
  bad.key_offsets = NULL;
  assert_int_equal(attn_softmax_forward(plan, &bad, workspace), ATTN_INVALID_ARGUMENT);
  attn_plan_destroy(plan);
  destroy(&t);

  f.problem.ragged = false;
  f.problem.list_queries = 5;
  f.problem.list_keys = 32;
  fill_lists(&f, 1);
  t = make_tensors(&f);
  assert_ok(attn_softmax_plan(&f.problem, &plan));
  f.list[1][1] = 1;
  assert_int_equal(attn_softmax_forward(plan, &t.args, workspace), ATTN_INVALID_SHAPE);
  assert_non_null(strstr(attn_error_message(), "block_indices[1] is 1"));
  f.list[1][1] = 0;
  f.list[0][1] = 9;
  assert_int_equal(attn_softmax_forward(plan, &t.args, workspace), ATTN_INVALID_SHAPE);
  assert_non_null(strstr(attn_error_message(), "block_offsets"));
  t.args.block_offsets.data = NULL;
  assert_int_equal(attn_softmax_forward(plan, &t.args, workspace), ATTN_INVALID_ARGUMENT);
  attn_plan_destroy(plan);
  destroy(&t);
  f.problem.list_queries = f.problem.list_keys = 0;

  f.problem.paged = true;
  f.problem.page_size = 5;
  f.problem.passes = ATTN_PASS_FORWARD;
  t = make_tensors(&f);
  assert_ok(attn_softmax_plan(&f.problem, &plan));
  ((int32_t *)t.args.page_table.data)[1] = 1000;
  assert_int_equal(attn_softmax_forward(plan, &t.args, workspace), ATTN_INVALID_SHAPE);
  assert_non_null(strstr(attn_error_message(), "page_table[0][1]"));
  attn_plan_destroy(plan);
  destroy(&t);
  free(workspace);
  clear(&f);
}

/* A measured plan computes the same. */
static void measured_plans_are_right(void **state) {
  (void)state;
  const int64_t queries[] = {70, 1};
  for (int i = 0; i < 2; ++i) {
    fixture f = plain(queries[i], 200, true);
    f.problem.planning = ATTN_PLAN_MEASURE;
    fill(&f);
    check_on_all_paths(&f);
    clear(&f);
  }
}

static void planning_survives_no_memory(void **state) {
  (void)state;
  fixture f = plain(61, 203, true);
  f.problem.planning = ATTN_PLAN_MEASURE;
  for (int skip = 0; skip < 4; ++skip) { /* the plan, then the tensors of the measurement */
    attn_plan *plan = NULL;
    attn_fault_arm(ATTN_FAULT_ALLOC, skip);
    attn_status status = attn_softmax_plan(&f.problem, &plan);
    attn_fault_disarm(ATTN_FAULT_ALLOC);
    assert_int_equal(status, ATTN_OUT_OF_MEMORY);
    assert_null(plan);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(forward_f64),
      cmocka_unit_test(forward_f32),
      cmocka_unit_test(forward_bf16),
      cmocka_unit_test(long_rows_bf16),
      cmocka_unit_test(backward_f64),
      cmocka_unit_test(backward_f32),
      cmocka_unit_test(backward_bf16),
      cmocka_unit_test(gradients_equal_finite_differences),
      cmocka_unit_test(identities),
      cmocka_unit_test(bad_problems_are_refused),
      cmocka_unit_test(bad_tensors_are_refused),
      cmocka_unit_test(measured_plans_are_right),
      cmocka_unit_test(planning_survives_no_memory),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
