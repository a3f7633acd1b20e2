/* Dense products against straight float64 loops, at every dtype, row count and stride. */
#include "support/test.h"

#include "engines/dense/dense.h"

#include <math.h>
#include <string.h>

/* A product of k terms with float32 sums: rounding errors grow like sqrt(k) * 2^-24 relative to the
 * norm; 1e-5 leaves room for k up to some thousands. bfloat16 results round once more, to 2^-9. */
static const double float64_sum = 1e-13, float32_sum = 1e-5, bfloat16_result = 4e-3;

typedef struct product {
  attn_dtype compute, result;
  int64_t rows, outputs, inputs;
  int64_t gap; /* elements between the rows of every activation */
  bool accumulate;
} product;

static double tolerance(const product *p) {
  if (p->compute == ATTN_F64) return float64_sum;
  return p->result == ATTN_BF16 ? bfloat16_result : float32_sum;
}

/* A matrix inside a larger one whose gaps hold a NaN that must neither be read nor overwritten. */
typedef struct matrix {
  attn_tensor whole, view;
  double *values; /* what the view holds, after rounding to its dtype */
} matrix;

static matrix matrix_create(attn_dtype dtype, int64_t rows, int64_t columns, int64_t gap,
                            uint64_t seed) {
  matrix m;
  int64_t shape[2] = {rows, columns + gap};
  assert_ok(attn_tensor_create(dtype, 2, shape, &m.whole));
  assert_ok(attn_tensor_fill(&m.whole, NAN));
  assert_ok(attn_tensor_slice(&m.whole, 1, 0, columns, &m.view));
  double *x = malloc((size_t)(rows * columns + 1) * sizeof *x);
  test_fill_normal(x, rows * columns, 0, 1, seed);
  attn_tensor source;
  assert_ok(attn_tensor_wrap(x, ATTN_F64, 2, m.view.shape, &source));
  assert_ok(attn_tensor_copy(&source, &m.view));
  free(x);
  m.values = test_to_doubles(&m.view);
  return m;
}

static void assert_gaps_untouched(const matrix *m) {
  int64_t columns = m->view.shape[1];
  for (int64_t r = 0; r < m->whole.shape[0]; ++r)
    for (int64_t c = columns; c < m->whole.shape[1]; ++c)
      assert_true(isnan(attn_tensor_get(&m->whole, (int64_t[]){r, c})));
}

static void matrix_destroy(matrix *m) {
  attn_tensor_destroy(&m->whole);
  free(m->values);
}

/* c[i][j] (+)= sum_t a(i, t) b(t, j), both by strides. */
static void reference(int64_t m, int64_t n, int64_t k, const double *a, int64_t a_i, int64_t a_t,
                      const double *b, int64_t b_t, int64_t b_j, double *c, bool accumulate) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = accumulate ? c[i * n + j] : 0;
      for (int64_t t = 0; t < k; ++t) sum += a[i * a_i + t * a_t] * b[t * b_t + j * b_j];
      c[i * n + j] = sum;
    }
}

static void assert_result(const char *name, const product *p, const matrix *m, double limit) {
  double *got = test_to_doubles(&m->view);
  double error = test_relative_error(got, m->values, attn_tensor_count(&m->view));
  if (!(error <= limit))
    fail_msg("%s: rows %lld outputs %lld inputs %lld gap %lld, %s to %s%s: error %g over %g", name,
             (long long)p->rows, (long long)p->outputs, (long long)p->inputs, (long long)p->gap,
             attn_dtype_name(p->compute), attn_dtype_name(p->result),
             p->accumulate ? ", accumulating" : "", error, limit);
  assert_gaps_untouched(m);
  free(got);
}

static void check_product(const product *p, attn_arena *scratch) {
  int64_t rows = p->rows, outputs = p->outputs, inputs = p->inputs;
  attn_dtype wide = p->compute == ATTN_BF16 ? ATTN_F32 : p->compute;
  matrix x = matrix_create(p->compute, rows, inputs, p->gap, 1);
  matrix y = matrix_create(p->result, rows, outputs, p->gap, 2);
  matrix dy = matrix_create(p->compute, rows, outputs, p->gap, 3);
  matrix dx = matrix_create(p->result, rows, inputs, p->gap, 4);
  matrix w = matrix_create(p->compute, outputs, inputs, p->gap, 5);
  matrix dw = matrix_create(wide, outputs, inputs, p->gap, 6);
  attn_weight *weight;
  assert_ok(attn_weight_create(outputs, inputs, p->compute, &weight));
  assert_ok(attn_weight_set(weight, &w.view));
  size_t before = attn_arena_get_mark(scratch).used;

  assert_ok(attn_dense_forward(weight, &x.view, &y.view, p->accumulate, scratch));
  reference(rows, outputs, inputs, x.values, inputs, 1, w.values, 1, inputs, y.values,
            p->accumulate);
  assert_result("forward", p, &y, tolerance(p));
  assert_ok(attn_dense_backward_input(weight, &dy.view, &dx.view, p->accumulate, scratch));
  reference(rows, inputs, outputs, dy.values, outputs, 1, w.values, inputs, 1, dx.values,
            p->accumulate);
  assert_result("backward input", p, &dx, tolerance(p));
  assert_ok(attn_dense_backward_weight(&dy.view, &x.view, &dw.view, p->accumulate, scratch));
  reference(outputs, inputs, rows, dy.values, 1, outputs, x.values, inputs, 1, dw.values,
            p->accumulate);
  assert_result("backward weight", p, &dw, p->compute == ATTN_F64 ? float64_sum : float32_sum);

  assert_int_equal(attn_arena_get_mark(scratch).used, before);
  attn_weight_destroy(weight);
  matrix *all[] = {&x, &y, &dy, &dx, &w, &dw};
  for (size_t i = 0; i < sizeof all / sizeof *all; ++i) matrix_destroy(all[i]);
}

static const int64_t shapes[][3] = {
    {1, 64, 64},  {2, 100, 33}, {3, 17, 129},   {4, 48, 31},    {5, 1, 1},
    {6, 33, 64},  {7, 65, 130}, {8, 16, 16},    {9, 64, 64},    {33, 100, 33},
    {64, 1, 200}, {65, 130, 1}, {200, 96, 160}, {129, 257, 63}, {1057, 70, 97},
};
static const attn_dtype pairs[][2] = {
    {ATTN_F64, ATTN_F64}, {ATTN_F32, ATTN_F32}, {ATTN_BF16, ATTN_BF16}, {ATTN_BF16, ATTN_F32}};

static void products_on_a_path(void *context) {
  attn_arena *scratch = context;
  for (size_t s = 0; s < sizeof shapes / sizeof *shapes; ++s)
    for (size_t d = 0; d < sizeof pairs / sizeof *pairs; ++d)
      for (int variant = 0; variant < 4; ++variant) {
        product p = {.compute = pairs[d][0],
                     .result = pairs[d][1],
                     .rows = shapes[s][0],
                     .outputs = shapes[s][1],
                     .inputs = shapes[s][2],
                     .gap = variant & 1 ? 5 : 0,
                     .accumulate = variant & 2};
        check_product(&p, scratch);
      }
}

static void products_equal_straight_loops(void **state) {
  (void)state;
  attn_arena *scratch = attn_arena_create(0);
  test_on_every_path(products_on_a_path, scratch);
  attn_arena_destroy(scratch);
}

/* What a decode step and a training step promise: after the first, no allocation by the library. */
static void later_calls_allocate_nothing(void **state) {
  (void)state;
  enum { OUTPUTS = 96, INPUTS = 160, ROWS = 40 };
  attn_arena *scratch = attn_arena_create((size_t)1 << 20);
  matrix masters = matrix_create(ATTN_F32, OUTPUTS, INPUTS, 0, 1);
  matrix x = matrix_create(ATTN_BF16, ROWS, INPUTS, 0, 2);
  matrix y = matrix_create(ATTN_BF16, ROWS, OUTPUTS, 0, 3);
  attn_weight *weight;
  assert_ok(attn_weight_create(OUTPUTS, INPUTS, ATTN_BF16, &weight));
  uint64_t before = 0;
  for (int step = 0; step < 3; ++step) {
    if (step == 1) before = attn_memory_get_stats().allocations;
    assert_ok(attn_weight_set(weight, &masters.view));
    assert_ok(attn_dense_forward(weight, &x.view, &y.view, false, scratch));
    assert_ok(attn_dense_backward_input(weight, &y.view, &x.view, false, scratch));
    attn_tensor few_x, few_y;
    assert_ok(attn_tensor_slice(&x.view, 0, 0, 3, &few_x));
    assert_ok(attn_tensor_slice(&y.view, 0, 0, 3, &few_y));
    assert_ok(attn_dense_forward(weight, &few_x, &few_y, false, scratch));
  }
  assert_int_equal(attn_memory_get_stats().allocations, before);
  attn_weight_destroy(weight);
  matrix_destroy(&masters);
  matrix_destroy(&x);
  matrix_destroy(&y);
  attn_arena_destroy(scratch);
}

/* Every set is seen by both packed forms and by the few-row path. */
static void set_replaces_the_values(void **state) {
  (void)state;
  enum { OUTPUTS = 40, INPUTS = 24 };
  attn_arena *scratch = attn_arena_create(0);
  attn_weight *weight;
  assert_ok(attn_weight_create(OUTPUTS, INPUTS, ATTN_F32, &weight));
  for (uint64_t seed = 1; seed < 4; ++seed) {
    attn_dtype stored = seed == 2 ? ATTN_BF16 : ATTN_F32; /* borrowed, converted, borrowed again */
    matrix w = matrix_create(stored, OUTPUTS, INPUTS, 3, seed);
    assert_ok(attn_weight_set(weight, &w.view));
    attn_tensor values = attn_weight_values(weight);
    assert_int_equal(values.data == w.view.data, stored == ATTN_F32);
    product p = {.compute = ATTN_F32, .result = ATTN_F32, .outputs = OUTPUTS, .inputs = INPUTS};
    for (p.rows = 4; p.rows <= 64; p.rows *= 4) {
      matrix x = matrix_create(ATTN_F32, p.rows, INPUTS, 0, 9);
      matrix y = matrix_create(ATTN_F32, p.rows, OUTPUTS, 0, 9);
      assert_ok(attn_dense_forward(weight, &x.view, &y.view, false, scratch));
      reference(p.rows, OUTPUTS, INPUTS, x.values, INPUTS, 1, w.values, 1, INPUTS, y.values, false);
      assert_result("forward", &p, &y, float32_sum);
      assert_ok(attn_dense_backward_input(weight, &y.view, &x.view, false, scratch));
      reference(p.rows, INPUTS, OUTPUTS, y.values, OUTPUTS, 1, w.values, INPUTS, 1, x.values,
                false);
      assert_result("backward input", &p, &x, float32_sum);
      matrix_destroy(&x);
      matrix_destroy(&y);
    }
    matrix_destroy(&w);
  }
  attn_weight_destroy(weight);
  attn_arena_destroy(scratch);
}

static void results_repeat_to_the_bit(void **state) {
  (void)state;
  enum { OUTPUTS = 200, INPUTS = 300, ROWS = 500 };
  attn_arena *scratch = attn_arena_create(0);
  for (size_t d = 0; d < sizeof pairs / sizeof *pairs; ++d) {
    attn_dtype compute = pairs[d][0];
    attn_dtype wide = compute == ATTN_BF16 ? ATTN_F32 : compute;
    matrix x = matrix_create(compute, ROWS, INPUTS, 0, 1),
           w = matrix_create(compute, OUTPUTS, INPUTS, 0, 2);
    matrix dy = matrix_create(compute, ROWS, OUTPUTS, 0, 3);
    matrix y[2], dw[2];
    for (int run = 0; run < 2; ++run) {
      attn_weight *weight;
      y[run] = matrix_create(pairs[d][1], ROWS, OUTPUTS, 0, 4 + (uint64_t)run);
      dw[run] = matrix_create(wide, OUTPUTS, INPUTS, 0, 4 + (uint64_t)run);
      assert_ok(attn_weight_create(OUTPUTS, INPUTS, compute, &weight));
      assert_ok(attn_weight_set(weight, &w.view));
      assert_ok(attn_dense_forward(weight, &x.view, &y[run].view, false, scratch));
      assert_ok(attn_dense_backward_weight(&dy.view, &x.view, &dw[run].view, false, scratch));
      attn_weight_destroy(weight);
    }
    assert_memory_equal(y[0].whole.data, y[1].whole.data,
                        ROWS * OUTPUTS * attn_dtype_size(pairs[d][1]));
    assert_memory_equal(dw[0].whole.data, dw[1].whole.data,
                        OUTPUTS * INPUTS * attn_dtype_size(wide));
    matrix *all[] = {&x, &w, &dy, &y[0], &y[1], &dw[0], &dw[1]};
    for (size_t i = 0; i < sizeof all / sizeof *all; ++i) matrix_destroy(all[i]);
  }
  attn_arena_destroy(scratch);
}

/* One weight used by several threads at once, the first calls included. */
static void threads_share_a_weight(void **state) {
  (void)state;
  enum { OUTPUTS = 64, INPUTS = 96, ROWS = 70, THREADS = 4 };
  matrix w = matrix_create(ATTN_F32, OUTPUTS, INPUTS, 0, 1);
  matrix x = matrix_create(ATTN_F32, ROWS, INPUTS, 0, 2);
  attn_weight *weight;
  assert_ok(attn_weight_create(OUTPUTS, INPUTS, ATTN_F32, &weight));
  assert_ok(attn_weight_set(weight, &w.view));
  matrix y[THREADS];
  for (int t = 0; t < THREADS; ++t) y[t] = matrix_create(ATTN_F32, ROWS, OUTPUTS, 0, 3);
  attn_status status[THREADS] = {0};
#pragma omp parallel for num_threads(THREADS) schedule(static, 1)
  for (int t = 0; t < THREADS; ++t) {
    attn_arena *scratch = attn_arena_create(0);
    for (int i = 0; i < 20 && status[t] == ATTN_OK; ++i)
      status[t] = attn_dense_forward(weight, &x.view, &y[t].view, false, scratch);
    attn_arena_destroy(scratch);
  }
  product p = {
      .compute = ATTN_F32, .result = ATTN_F32, .rows = ROWS, .outputs = OUTPUTS, .inputs = INPUTS};
  for (int t = 0; t < THREADS; ++t) {
    assert_int_equal(status[t], ATTN_OK);
    reference(ROWS, OUTPUTS, INPUTS, x.values, INPUTS, 1, w.values, 1, INPUTS, y[t].values, false);
    assert_result("forward", &p, &y[t], float32_sum);
    matrix_destroy(&y[t]);
  }
  attn_weight_destroy(weight);
  matrix_destroy(&w);
  matrix_destroy(&x);
}

static void misuse_is_refused(void **state) {
  (void)state;
  attn_arena *scratch = attn_arena_create(0);
  attn_weight *weight;
  assert_int_equal(attn_weight_create(0, 3, ATTN_F32, &weight), ATTN_INVALID_SHAPE);
  assert_int_equal(attn_weight_create(INT64_MAX / 2, 3, ATTN_F32, &weight), ATTN_INVALID_SHAPE);
  assert_int_equal(attn_weight_create(4, 3, ATTN_F16, &weight), ATTN_UNSUPPORTED);
  assert_ok(attn_weight_create(4, 3, ATTN_F32, &weight));
  matrix w = matrix_create(ATTN_F32, 4, 3, 0, 1), x = matrix_create(ATTN_F32, 10, 3, 0, 2);
  matrix y = matrix_create(ATTN_F32, 10, 4, 0, 3), half = matrix_create(ATTN_BF16, 10, 4, 0, 3);
  assert_int_equal(attn_dense_forward(weight, &x.view, &y.view, false, scratch),
                   ATTN_INVALID_ARGUMENT); /* no values yet */
  assert_int_equal(attn_weight_set(weight, &x.view), ATTN_INVALID_SHAPE);
  assert_ok(attn_weight_set(weight, &w.view));
  assert_int_equal(attn_dense_forward(weight, &y.view, &y.view, false, scratch),
                   ATTN_INVALID_SHAPE);
  assert_string_equal(attn_error_message(), "dense: x is [10, 4], expected [10, 3]");
  assert_int_equal(attn_dense_forward(weight, &x.view, &half.view, false, scratch),
                   ATTN_INVALID_ARGUMENT);
  attn_tensor overlapping = y.view, column = x.view;
  overlapping.stride[0] = 2;
  assert_int_equal(attn_dense_forward(weight, &x.view, &overlapping, false, scratch),
                   ATTN_INVALID_SHAPE);
  column.stride[1] = 10;
  assert_int_equal(attn_dense_forward(weight, &column, &y.view, false, scratch),
                   ATTN_INVALID_SHAPE);
  attn_tensor none = x.view, nothing = y.view;
  none.shape[0] = nothing.shape[0] = 0;
  assert_ok(attn_dense_forward(weight, &none, &nothing, false, scratch));
  assert_ok(attn_dense_backward_weight(&nothing, &none, &w.view, false, scratch));
  assert_true(attn_tensor_get(&w.view, (int64_t[]){3, 2}) == 0);
  attn_weight_destroy(weight);
  matrix *all[] = {&w, &x, &y, &half};
  for (size_t i = 0; i < sizeof all / sizeof *all; ++i) matrix_destroy(all[i]);
  attn_arena_destroy(scratch);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(products_equal_straight_loops),
      cmocka_unit_test(later_calls_allocate_nothing),
      cmocka_unit_test(set_replaces_the_values),
      cmocka_unit_test(results_repeat_to_the_bit),
      cmocka_unit_test(threads_share_a_weight),
      cmocka_unit_test(misuse_is_refused),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
