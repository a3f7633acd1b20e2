/* Low-rank adaptation as a layer: against straight loops, its gradients against differences, and
 * the identities of its papers; W in every form that a model file has. */
#include "support/operations.h"
#include "support/test.h"

#include "base/fault.h"
#include "base/memory.h"
#include "engines/dense/dense.h"
#include "layers/lora.h"
#include "oracles/lora.h"

#include <math.h>
#include <string.h>

/* Sums of tens of products: 2^-53, 2^-24 each; bfloat16: y before the sum, the narrow rows, the sum
 * and what is multiplied by m / n are each rounded to 2^-9. */
static const double values[] = {[ATTN_F64] = 1e-12, [ATTN_F32] = 1e-5, [ATTN_BF16] = 1.6e-2};
static const attn_dtype dtypes[] = {ATTN_F64, ATTN_F32, ATTN_BF16};
enum { DTYPES = sizeof dtypes / sizeof *dtypes, KINDS = ATTN_LORA_DORA + 1 };
static const double alpha = 6;

/* How W lies: as numbers of the master's dtype, as bfloat16, in blocks of a GGUF file. */
typedef enum form { MASTER = 0, BFLOAT16, BLOCKS, FORMS } form;

/* A frozen matrix with its adapter, and the same in float64. */
typedef struct bench {
  oracle_lora o;
  double *u, *y, *n; /* the loss is sum u y */
  attn_dtype compute;
  attn_parameter w;
  void *blocks;
  attn_lora *lora;
} bench;

static double *rounded(int64_t count, double deviation, uint64_t seed) {
  double *x = malloc((size_t)count * sizeof *x);
  test_fill_normal(x, count, 0, deviation, seed);
  for (int64_t i = 0; i < count; ++i)
    x[i] = (double)attn_bf16_to_f32(attn_f32_to_bf16((float)x[i]));
  return x;
}

/* W in blocks, and the numbers that they stand for. */
static void make_blocks(bench *b) {
  const attn_block_format *format = attn_block_get_format(ATTN_BLOCK_Q8_0);
  int64_t rows = b->o.outputs, columns = b->o.inputs;
  size_t size = (size_t)(columns / format->elements * format->bytes);
  float *row = malloc((size_t)columns * sizeof *row);
  b->blocks = malloc((size_t)rows * size);
  for (int64_t j = 0; j < rows; ++j) {
    char *place = (char *)b->blocks + (size_t)j * size;
    for (int64_t i = 0; i < columns; ++i) row[i] = (float)b->o.w[j * columns + i];
    assert_ok(attn_blocks_from_f32(ATTN_BLOCK_Q8_0, row, place, columns));
    assert_ok(attn_blocks_to_f32(ATTN_BLOCK_Q8_0, place, row, columns));
    for (int64_t i = 0; i < columns; ++i) b->o.w[j * columns + i] = row[i];
  }
  free(row);
  assert_ok(attn_tensor_wrap(NULL, ATTN_F32, 2, (int64_t[]){rows, columns}, &b->w.value));
  b->w.blocks = b->blocks;
  b->w.block_type = ATTN_BLOCK_Q8_0;
  assert_ok(attn_weight_set_blocks(b->w.weight, (attn_device){0}, ATTN_BLOCK_Q8_0, b->blocks));
}

static void make_matrix(bench *b, form form) {
  int64_t shape[2] = {b->o.outputs, b->o.inputs};
  attn_dtype dtype = form == BFLOAT16 ? ATTN_BF16 : b->compute == ATTN_F64 ? ATTN_F64 : ATTN_F32;
  b->w = (attn_parameter){.name = "model.layers.0.self_attn.q_proj.weight"};
  assert_ok(attn_weight_create(shape[0], shape[1], b->compute, &b->w.weight));
  if (form == BLOCKS) {
    make_blocks(b);
    return;
  }
  assert_ok(attn_tensor_create(dtype, 2, shape, &b->w.value));
  attn_tensor from;
  assert_ok(attn_tensor_wrap(b->o.w, ATTN_F64, 2, shape, &from));
  assert_ok(attn_tensor_copy(&from, &b->w.value));
  assert_ok(attn_weight_set(b->w.weight, &b->w.value));
}

static void set(attn_parameter *p, double *numbers) {
  attn_tensor from;
  assert_ok(attn_tensor_wrap(numbers, ATTN_F64, p->value.rank, p->value.shape, &from));
  assert_ok(attn_tensor_copy(&from, &p->value));
  if (p->weight) assert_ok(attn_weight_set(p->weight, &p->value));
}

static void add_gradients(attn_lora *lora) {
  attn_parameter *list[ATTN_LORA_PARAMETERS];
  int count = attn_lora_list(lora, list);
  for (int i = 0; i < count; ++i)
    assert_ok(attn_tensor_create(list[i]->value.dtype, list[i]->value.rank, list[i]->value.shape,
                                 &list[i]->gradient));
}

static bench bench_create(attn_lora_kind kind, form form, attn_dtype compute, int64_t rows,
                          int64_t inputs, int64_t outputs, int64_t rank) {
  test_needs_cpu(); /* adapters are made there; tests/models/lora.c moves them */
  bench b = {.compute = compute};
  b.o = (oracle_lora){.rows = rows, .inputs = inputs, .outputs = outputs, .rank = rank};
  b.o.x = rounded(rows * inputs, 1, 1);
  b.o.w = rounded(outputs * inputs, 0.3, 2);
  b.o.a = rounded(rank * inputs, 0.3, 3);
  b.o.b = rounded(outputs * rank, 0.3, 4);
  b.o.scale = kind == ATTN_LORA_RANK_STABLE ? alpha / sqrt((double)rank) : alpha / (double)rank;
  b.u = rounded(rows * outputs, 1, 6);
  b.y = malloc((size_t)(rows * outputs) * sizeof *b.y);
  b.n = malloc((size_t)outputs * sizeof *b.n);
  make_matrix(&b, form);
  assert_ok(attn_lora_create(kind, rank, alpha, &b.w, compute, 1, 0, &b.lora));
  if (kind == ATTN_LORA_DORA) {
    b.o.m = rounded(outputs, 1, 5);
    for (int64_t j = 0; j < outputs; ++j) b.o.m[j] = fabs(b.o.m[j]) + 0.5;
  }
  return b;
}

/* The adapter gets the numbers of the oracle. */
static void fill(bench *b) {
  set(&b->lora->a, b->o.a);
  set(&b->lora->b, b->o.b);
  if (b->o.m) set(&b->lora->magnitude, b->o.m);
}

static void bench_destroy(bench *b) {
  attn_lora_destroy(b->lora);
  attn_weight_destroy(b->w.weight);
  if (!b->blocks) attn_tensor_destroy(&b->w.value);
  double *all[] = {b->o.x, b->o.w, b->o.a, b->o.b, b->o.m, b->u, b->y, b->n};
  for (size_t i = 0; i < sizeof all / sizeof *all; ++i) free(all[i]);
  free(b->blocks);
}

/* What the layer gives, and the gradients of sum u y. */
typedef struct outcome {
  double *y, *dx, *da, *db, *dm;
} outcome;

static outcome run(bench *b, bool recording) {
  outcome result = {0};
  attn_graph *g;
  int64_t shape[2] = {b->o.rows, b->o.inputs}, flat[2] = {1, b->o.rows * b->o.outputs};
  assert_ok(attn_graph_create(b->compute, &g));
  attn_graph_reset(g, recording);
  attn_tensor x = test_from_doubles(b->o.x, b->compute, 2, shape);
  attn_var *leaf = attn_graph_leaf(g, &x);
  b->w.adapter = &b->lora->adapter;
  attn_var *y = attn_op_linear(g, leaf, &b->w);
  if (!y) fail_msg("%s", attn_error_message());
  result.y = test_to_doubles(&y->value);
  attn_parameter u = trial_parameter_create("u", b->u, 2, flat, g->wide, b->compute, false);
  attn_var *loss = attn_op_linear_wide(g, attn_view_reshape(g, y, 2, flat), &u);
  if (recording) {
    assert_ok(attn_graph_backward(g, loss, 1));
    result.dx = test_to_doubles(&leaf->gradient);
    result.da = test_to_doubles(&b->lora->a.gradient);
    result.db = test_to_doubles(&b->lora->b.gradient);
    if (b->o.m) result.dm = test_to_doubles(&b->lora->magnitude.gradient);
  }
  assert_ok(attn_graph_status(g));
  trial_parameter_destroy(&u);
  attn_graph_destroy(g);
  attn_tensor_destroy(&x);
  return result;
}

static void outcome_destroy(outcome *o) {
  double *all[] = {o->y, o->dx, o->da, o->db, o->dm};
  for (size_t i = 0; i < sizeof all / sizeof *all; ++i) free(all[i]);
}

/* Oracles ---------------------------------------------------------------------------------------
 */

static double loss_of(bench *b) {
  double loss = 0;
  oracle_lora_forward(b->y, &b->o, b->n);
  for (int64_t i = 0; i < b->o.rows * b->o.outputs; ++i) loss += b->u[i] * b->y[i];
  return loss;
}

/* d loss by central differences with n as it is now: the loss is linear in every single number, so
 * they are exact but for rounding, whatever the step. */
static double *differences(bench *b, double *numbers, int64_t count) {
  const double step = 0.5;
  double *slopes = malloc((size_t)count * sizeof *slopes);
  for (int64_t i = 0; i < count; ++i) {
    double was = numbers[i];
    numbers[i] = was + step;
    double above = loss_of(b);
    numbers[i] = was - step;
    slopes[i] = (above - loss_of(b)) / (2 * step);
    numbers[i] = was;
  }
  return slopes;
}

static void compare(const char *what, const double *got, const double *expected, int64_t count,
                    double tolerance) {
  double error = test_relative_error(got, expected, count);
  if (!(error <= tolerance)) fail_msg("%s: error %g, tolerance %g", what, error, tolerance);
}

static void compare_slopes(bench *b, const char *what, const double *got, double *numbers,
                           int64_t count, double tolerance) {
  double *expected = differences(b, numbers, count);
  compare(what, got, expected, count, tolerance);
  free(expected);
}

static void check_bench(bench *b, double tolerance) {
  const oracle_lora *o = &b->o;
  fill(b);
  add_gradients(b->lora);
  oracle_lora_norms(b->n, o);
  outcome found = run(b, true);
  oracle_lora_forward(b->y, o, b->n);
  compare("y", found.y, b->y, o->rows * o->outputs, tolerance);
  compare_slopes(b, "dx", found.dx, o->x, o->rows * o->inputs, tolerance);
  compare_slopes(b, "dA", found.da, o->a, o->rank * o->inputs, tolerance);
  compare_slopes(b, "dB", found.db, o->b, o->outputs * o->rank, tolerance);
  if (o->m) compare_slopes(b, "dm", found.dm, o->m, o->outputs, tolerance);
  outcome_destroy(&found);
}

/* Few rows and many; ranks of 1, of a few, of all, of more. */
static const int64_t sizes[][4] = {
    {3, 32, 10, 1}, {13, 32, 24, 4}, {21, 64, 20, 8}, {9, 32, 16, 16}, {9, 32, 2, 8}};
enum { SIZES = sizeof sizes / sizeof *sizes };

static void equals_oracle_on_path(void *context) {
  (void)context;
  for (int kind = 0; kind < KINDS; ++kind)
    for (int d = 0; d < DTYPES; ++d)
      for (int s = 0; s < SIZES; ++s) {
        const int64_t *n = sizes[s];
        bench b = bench_create((attn_lora_kind)kind, MASTER, dtypes[d], n[0], n[1], n[2], n[3]);
        check_bench(&b, values[dtypes[d]]);
        bench_destroy(&b);
      }
}

static void equals_oracle(void **state) {
  (void)state;
  test_on_every_path(equals_oracle_on_path, NULL);
}

/* W as files have it. Blocks in bfloat16 round few rows of activations to 8 bits. */
static void takes_every_form(void **state) {
  (void)state;
  for (int kind = 0; kind < KINDS; ++kind)
    for (int d = 0; d < DTYPES; ++d)
      for (int form = BFLOAT16; form < FORMS; ++form) {
        bench b = bench_create((attn_lora_kind)kind, (enum form)form, dtypes[d], 13, 64, 24, 4);
        check_bench(&b, values[dtypes[d]]);
        assert_null(b.w.gradient.data);
        bench_destroy(&b);
      }
}

/* Identities ------------------------------------------------------------------------------------
 */

/* The frozen layer's bits. */
static double *frozen(bench *b) {
  attn_graph *g;
  int64_t shape[2] = {b->o.rows, b->o.inputs};
  assert_ok(attn_graph_create(b->compute, &g));
  attn_tensor x = test_from_doubles(b->o.x, b->compute, 2, shape);
  attn_var *y = attn_op_linear_frozen(g, attn_graph_input(g, &x), &b->w, b->compute);
  assert_non_null(y);
  double *numbers = test_to_doubles(&y->value);
  attn_graph_destroy(g);
  attn_tensor_destroy(&x);
  return numbers;
}

static void begins_as_the_frozen_layer(void **state) {
  (void)state;
  for (int kind = 0; kind < KINDS; ++kind)
    for (int d = 0; d < DTYPES; ++d)
      for (int form = 0; form < FORMS; ++form)
        for (int s = 0; s < SIZES; ++s) {
          const int64_t *n = sizes[s];
          bench b = bench_create((attn_lora_kind)kind, (enum form)form, dtypes[d], n[0], n[1], n[2],
                                 n[3]);
          outcome found = run(&b, false);
          double *plain = frozen(&b);
          for (int64_t i = 0; i < n[0] * n[2]; ++i)
            if (found.y[i] != plain[i])
              fail_msg("kind %d, %s, form %d: %.17g, without adapter %.17g", kind,
                       attn_dtype_name(dtypes[d]), form, found.y[i], plain[i]);
          free(plain);
          outcome_destroy(&found);
          bench_destroy(&b);
        }
}

/* A is uniform in +-1 / sqrt(inputs), another one for another stream; B is 0. */
static void begins_as_its_paper_says(void **state) {
  (void)state;
  bench b = bench_create(ATTN_LORA_DORA, MASTER, ATTN_F64, 1, 256, 64, 16);
  const double *a = b.lora->a.value.data, *zero = b.lora->b.value.data;
  const double bound = 1 / sqrt(256.0), expected = bound * bound / 3;
  double squares = 0, most = 0;
  for (int i = 0; i < 16 * 256; ++i) {
    squares += a[i] * a[i] / (16 * 256);
    most = fmax(most, fabs(a[i]));
  }
  assert_true(most <= bound && most > 0.99 * bound);
  /* the deviation of a mean of 4096 squares of uniform numbers: 2 / sqrt(5 * 4096) of it */
  assert_true(fabs(squares / expected - 1) < 5 * 2 / sqrt(5.0 * 4096));
  for (int i = 0; i < 64 * 16; ++i) assert_true(zero[i] == 0);
  for (int j = 0; j < 64; ++j) {
    double square = 0;
    for (int i = 0; i < 256; ++i) square += b.o.w[j * 256 + i] * b.o.w[j * 256 + i];
    assert_true(fabs(((double *)b.lora->magnitude.value.data)[j] - sqrt(square)) < 1e-12);
  }
  attn_lora *other;
  assert_ok(attn_lora_create(ATTN_LORA_DORA, 16, alpha, &b.w, ATTN_F64, 1, 7, &other));
  assert_true(memcmp(other->a.value.data, a, 16 * 256 * sizeof *a) != 0);
  assert_string_equal(other->a.name, "model.layers.0.self_attn.q_proj.lora_A.weight");
  assert_string_equal(other->b.name, "model.layers.0.self_attn.q_proj.lora_B.weight");
  assert_string_equal(other->magnitude.name,
                      "model.layers.0.self_attn.q_proj.lora_magnitude_vector");
  attn_lora_destroy(other);
  bench_destroy(&b);
}

static double *merged_of(bench *b, attn_dtype dtype) {
  attn_tensor merged;
  assert_ok(attn_lora_merge(b->lora, &b->w, dtype, &merged));
  double *numbers = test_to_doubles(&merged);
  attn_tensor_destroy(&merged);
  return numbers;
}

/* The merged matrix is diag(m / n) V; its product is the layer; DoRA's rows have the norms |m|. */
static void merged_equals_unmerged(void **state) {
  (void)state;
  for (int kind = 0; kind < KINDS; ++kind)
    for (int form = 0; form < FORMS; ++form) {
      bench b = bench_create((attn_lora_kind)kind, (enum form)form, ATTN_F32, 13, 64, 24, 4);
      fill(&b);
      double *v = malloc(24 * 64 * sizeof *v), *merged = merged_of(&b, ATTN_F64);
      oracle_lora_norms(b.n, &b.o);
      oracle_lora_sum(v, &b.o);
      for (int j = 0; b.o.m && j < 24; ++j)
        for (int i = 0; i < 64; ++i) v[j * 64 + i] *= b.o.m[j] / b.n[j];
      compare("merged", merged, v, 24 * 64, values[ATTN_F64]);
      for (int j = 0; b.o.m && j < 24; ++j) {
        double square = 0;
        for (int i = 0; i < 64; ++i) square += merged[j * 64 + i] * merged[j * 64 + i];
        assert_true(fabs(sqrt(square) - b.o.m[j]) < 1e-12 * b.o.m[j]);
      }
      oracle_lora plain = b.o;
      double *zero = calloc(24 * 4, sizeof *zero);
      plain.w = merged;
      plain.b = zero;
      plain.m = NULL;
      oracle_lora_forward(b.y, &plain, NULL);
      outcome found = run(&b, false);
      compare("unmerged", found.y, b.y, 13 * 24, values[ATTN_F32]);
      outcome_destroy(&found);
      free(v);
      free(zero);
      free(merged);
      bench_destroy(&b);
    }
}

/* Of W' - W with r = 1 all minors of two rows and two columns vanish. */
static void has_its_rank(void **state) {
  (void)state;
  bench b = bench_create(ATTN_LORA_PLAIN, MASTER, ATTN_F64, 1, 32, 10, 1);
  fill(&b);
  double *d = merged_of(&b, ATTN_F64), largest = 0;
  for (int i = 0; i < 10 * 32; ++i) {
    d[i] -= b.o.w[i];
    largest = fmax(largest, fabs(d[i]));
  }
  assert_true(largest > 0.1);
  for (int j = 1; j < 10; ++j)
    for (int i = 1; i < 32; ++i)
      assert_true(fabs(d[0] * d[j * 32 + i] - d[i] * d[j * 32]) < 1e-14 * (1 + largest * largest));
  free(d);
  bench_destroy(&b);
}

/* With r = min(inputs, outputs) W' - W can be anything: B = D / s with A = 1. */
static void full_rank_represents_all(void **state) {
  (void)state;
  enum { N = 16, OUTPUTS = 24 };
  bench b = bench_create(ATTN_LORA_PLAIN, MASTER, ATTN_F64, 1, N, OUTPUTS, N);
  double *wanted = rounded(OUTPUTS * N, 1, 77);
  for (int k = 0; k < N; ++k)
    for (int i = 0; i < N; ++i) b.o.a[k * N + i] = k == i;
  for (int i = 0; i < OUTPUTS * N; ++i) b.o.b[i] = wanted[i] / b.o.scale;
  fill(&b);
  double *merged = merged_of(&b, ATTN_F64);
  for (int i = 0; i < OUTPUTS * N; ++i) wanted[i] += b.o.w[i];
  compare("any difference", merged, wanted, OUTPUTS * N, values[ATTN_F64]);
  free(merged);
  free(wanted);
  bench_destroy(&b);
}

/* c B and A / c are the same adapter; powers of two to the bit. */
static void factors_are_free(void **state) {
  (void)state;
  for (int kind = 0; kind < KINDS; ++kind) {
    bench b = bench_create((attn_lora_kind)kind, MASTER, ATTN_F32, 13, 64, 24, 4);
    fill(&b);
    outcome before = run(&b, false);
    for (int i = 0; i < 4 * 64; ++i) b.o.a[i] /= 8;
    for (int i = 0; i < 24 * 4; ++i) b.o.b[i] *= 8;
    fill(&b);
    outcome after = run(&b, false);
    assert_memory_equal(before.y, after.y, 13 * 24 * sizeof *before.y);
    outcome_destroy(&before);
    outcome_destroy(&after);
    bench_destroy(&b);
  }
}

/* s = alpha / r, alpha / sqrt(r): what doubles alpha doubles W' - W; rsLoRA is LoRA with alpha
 * sqrt(r); at r = 1 they are one. */
static void scales(void **state) {
  (void)state;
  assert_true(attn_lora_scale(ATTN_LORA_PLAIN, 8, 16) == 2);
  assert_true(attn_lora_scale(ATTN_LORA_DORA, 8, 16) == 2);
  assert_true(attn_lora_scale(ATTN_LORA_RANK_STABLE, 16, 16) == 4);
  for (int64_t r = 1; r <= 256; r *= 2) {
    double plain = attn_lora_scale(ATTN_LORA_PLAIN, r, 3 * sqrt((double)r));
    double stable = attn_lora_scale(ATTN_LORA_RANK_STABLE, r, 3);
    assert_true(fabs(plain - stable) <= 1e-15 * stable);
    assert_true(attn_lora_scale(ATTN_LORA_PLAIN, r, 6) ==
                2 * attn_lora_scale(ATTN_LORA_PLAIN, r, 3));
  }
  assert_true(attn_lora_scale(ATTN_LORA_PLAIN, 1, 5) ==
              attn_lora_scale(ATTN_LORA_RANK_STABLE, 1, 5));
}

/* A row of zeros has no direction: DoRA leaves it 0, and everything finite. */
static void zero_rows_stay(void **state) {
  (void)state;
  bench b = bench_create(ATTN_LORA_DORA, MASTER, ATTN_F32, 13, 32, 10, 2);
  memset((float *)b.w.value.data + 3 * 32, 0, 32 * sizeof(float));
  assert_ok(attn_weight_set(b.w.weight, &b.w.value));
  attn_lora_destroy(b.lora);
  assert_ok(attn_lora_create(ATTN_LORA_DORA, 2, alpha, &b.w, ATTN_F32, 1, 0, &b.lora));
  add_gradients(b.lora);
  outcome found = run(&b, true);
  for (int t = 0; t < 13; ++t) assert_true(found.y[t * 10 + 3] == 0);
  for (int i = 0; i < 13 * 10; ++i) assert_true(isfinite(found.y[i]));
  for (int i = 0; i < 13 * 32; ++i) assert_true(isfinite(found.dx[i]));
  for (int i = 0; i < 10 * 2; ++i) assert_true(isfinite(found.db[i]));
  for (int j = 0; j < 10; ++j) assert_true(isfinite(found.dm[j]));
  outcome_destroy(&found);
  bench_destroy(&b);
}

/* Refusals and faults ---------------------------------------------------------------------------
 */

static void assert_refused(attn_status status, attn_status expected, const char *word) {
  assert_int_equal(status, expected);
  if (!strstr(attn_error_message(), word)) fail_msg("no '%s' in: %s", word, attn_error_message());
}

static void refuses_what_does_not_fit(void **state) {
  (void)state;
  bench b = bench_create(ATTN_LORA_PLAIN, MASTER, ATTN_F32, 1, 32, 10, 2);
  attn_lora *lora;
  attn_parameter vector = b.w;
  vector.value.rank = 1;
#define CREATE(kind, rank, alpha, w) attn_lora_create(kind, rank, alpha, w, ATTN_F32, 1, 0, &lora)
  assert_refused(CREATE(ATTN_LORA_PLAIN, 0, 1, &b.w), ATTN_INVALID_ARGUMENT, "rank is 0");
  assert_refused(CREATE(ATTN_LORA_PLAIN, 1 << 17, 1, &b.w), ATTN_INVALID_ARGUMENT, "131072");
  assert_refused(CREATE(ATTN_LORA_PLAIN, 2, 0, &b.w), ATTN_INVALID_ARGUMENT, "alpha");
  assert_refused(CREATE(ATTN_LORA_PLAIN, 2, NAN, &b.w), ATTN_INVALID_ARGUMENT, "alpha");
  assert_refused(CREATE((attn_lora_kind)3, 2, 1, &b.w), ATTN_INVALID_ARGUMENT, "kind");
  assert_refused(CREATE(ATTN_LORA_PLAIN, 1, 1, &vector), ATTN_INVALID_SHAPE, "q_proj");
#undef CREATE
  bench_destroy(&b);
}

static void fails_cleanly_without_memory(void **state) {
  (void)state;
  enum { MANY = 1000 };
  bench b = bench_create(ATTN_LORA_DORA, MASTER, ATTN_F32, 1, 32, 10, 2);
  size_t before = attn_memory_get_stats().live_bytes;
  for (int pass = 0; pass < 2; ++pass)
    for (int n = 0; n < MANY; ++n) {
      attn_lora *lora = NULL;
      attn_tensor merged = {0};
      attn_fault_arm(ATTN_FAULT_ALLOC, n);
      attn_status status =
          pass ? attn_lora_merge(b.lora, &b.w, ATTN_F32, &merged)
               : attn_lora_create(ATTN_LORA_DORA, 2, alpha, &b.w, ATTN_F32, 1, 0, &lora);
      bool failed = attn_fault_disarm(ATTN_FAULT_ALLOC);
      assert_int_equal(status, failed ? ATTN_OUT_OF_MEMORY : ATTN_OK);
      attn_lora_destroy(lora);
      attn_tensor_destroy(&merged);
      assert_int_equal(attn_memory_get_stats().live_bytes, before);
      if (!failed) break;
      assert_true(n + 1 < MANY);
    }
  bench_destroy(&b);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(equals_oracle),
      cmocka_unit_test(takes_every_form),
      cmocka_unit_test(begins_as_the_frozen_layer),
      cmocka_unit_test(begins_as_its_paper_says),
      cmocka_unit_test(merged_equals_unmerged),
      cmocka_unit_test(has_its_rank),
      cmocka_unit_test(full_rank_represents_all),
      cmocka_unit_test(factors_are_free),
      cmocka_unit_test(scales),
      cmocka_unit_test(zero_rows_stay),
      cmocka_unit_test(refuses_what_does_not_fit),
      cmocka_unit_test(fails_cleanly_without_memory),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
