/* Dense products with quantised weights against straight float64 loops over attn_blocks_to_f32. */
#include "support/test.h"

#include "attn/attn.h"
#include "base/fault.h"
#include "base/random.h"
#include "engines/dense/dense.h"
#include "kernels/kernels.h"

#include <math.h>
#include <string.h>

/* Errors are bounded element by element, relative to sum |w_i x_i|: float32 sums of some thousand
 * terms, float64 ones, and weights rounded to bfloat16, each by at most 2^-8 of itself. A bfloat16
 * result is rounded once more, by at most 2^-8 of itself. */
static const double float64_sum = 1e-14, float32_sum = 1e-5, bfloat16_place = 0x1p-8;

enum { GAP = 3, MOST_SCALES = 2, SCALE_OUTPUTS = 7, SCALE_INPUTS = 20 };

/* The types that convert, and where their blocks have float16 scales, which must be finite; or that
 * there is a scale for each SCALE_OUTPUTS x SCALE_INPUTS of float8 numbers. */
enum { BESIDE = -1 };
typedef struct kind {
  attn_block_type type;
  int scales, place[MOST_SCALES];
} kind;
static const kind kinds[] = {
    {ATTN_BLOCK_F32, 0, {0}},          {ATTN_BLOCK_F16, 0, {0}},    {ATTN_BLOCK_BF16, 0, {0}},
    {ATTN_BLOCK_F64, 0, {0}},          {ATTN_BLOCK_Q8_0, 1, {0}},   {ATTN_BLOCK_Q4_0, 1, {0}},
    {ATTN_BLOCK_Q4_1, 2, {0, 2}},      {ATTN_BLOCK_Q5_0, 1, {0}},   {ATTN_BLOCK_Q5_1, 2, {0, 2}},
    {ATTN_BLOCK_Q2_K, 2, {80, 82}},    {ATTN_BLOCK_Q3_K, 1, {108}}, {ATTN_BLOCK_Q4_K, 2, {0, 2}},
    {ATTN_BLOCK_Q5_K, 2, {0, 2}},      {ATTN_BLOCK_Q6_K, 1, {208}}, {ATTN_BLOCK_F8_E4M3, 0, {0}},
    {ATTN_BLOCK_F8_E4M3, BESIDE, {0}},
};
enum { KINDS = sizeof kinds / sizeof *kinds };

static const attn_dtype pairs[][2] = {
    {ATTN_F64, ATTN_F64}, {ATTN_F32, ATTN_F32}, {ATTN_BF16, ATTN_BF16}, {ATTN_BF16, ATTN_F32}};
enum { PAIRS = sizeof pairs / sizeof *pairs };

/* --- Weights ---------------------------------------------------------------------------------- */

typedef struct quantised {
  const kind *kind;
  int64_t outputs, inputs;
  char *memory, *blocks; /* the latter at an odd address where asked for */
  float *scales;         /* NULL: none */
  double *values;        /* [outputs, inputs] */
} quantised;

static void fill_float8(const quantised *w, int64_t count, uint64_t seed) {
  attn_random random = {.seed = seed};
  for (int64_t i = 0; i < count; ++i) {
    unsigned bits = attn_random_u32(&random) & 0xff;
    w->blocks[i] = (char)((bits & 0x7f) == 0x7f ? bits - 1 : bits); /* no NaN */
  }
}

static int64_t ceil_of(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

static void scale_values(quantised *w, float *values, uint64_t seed) {
  int64_t columns = ceil_of(w->inputs, SCALE_INPUTS);
  int64_t count = ceil_of(w->outputs, SCALE_OUTPUTS) * columns;
  attn_random random = {.seed = seed, .stream = 1};
  w->scales = malloc((size_t)count * sizeof *w->scales);
  for (int64_t i = 0; i < count; ++i) w->scales[i] = 0.1f * (float)attn_random_normal(&random);
  for (int64_t i = 0; i < w->outputs * w->inputs; ++i)
    values[i] *= w->scales[i / w->inputs / SCALE_OUTPUTS * columns + i % w->inputs / SCALE_INPUTS];
}

static void fill_plain(const quantised *w, int64_t count, uint64_t seed) {
  double *x = malloc((size_t)count * sizeof *x);
  float *single = malloc((size_t)count * sizeof *single);
  test_fill_normal(x, count, 0, 1, seed);
  for (int64_t i = 0; i < count; ++i) single[i] = (float)x[i];
  if (w->kind->type == ATTN_BLOCK_F64)
    memcpy(w->blocks, x, (size_t)count * sizeof *x);
  else if (w->kind->type == ATTN_BLOCK_F32)
    memcpy(w->blocks, single, (size_t)count * sizeof *single);
  else
    assert_ok(attn_blocks_from_f32(w->kind->type, single, w->blocks, count));
  free(x);
  free(single);
}

/* Any bytes are a block, as long as its scales are finite numbers. */
static void fill_blocks(const quantised *w, int64_t blocks, int bytes, uint64_t seed) {
  attn_random random = {.seed = seed};
  for (int64_t i = 0; i < blocks * bytes; ++i) w->blocks[i] = (char)attn_random_u32(&random);
  for (int64_t b = 0; b < blocks; ++b)
    for (int s = 0; s < w->kind->scales; ++s) {
      uint16_t scale = attn_f32_to_f16((float)attn_random_normal(&random) * 0.1f);
      memcpy(w->blocks + b * bytes + w->kind->place[s], &scale, sizeof scale);
    }
}

static quantised quantised_create(const kind *kind, int64_t outputs, int64_t inputs, bool odd,
                                  uint64_t seed) {
  const attn_block_format *format = attn_block_get_format(kind->type);
  int64_t count = outputs * inputs, blocks = count / format->elements;
  quantised w = {.kind = kind, .outputs = outputs, .inputs = inputs};
  w.memory = malloc((size_t)(blocks * format->bytes) + odd); /* nothing may be read behind it */
  w.blocks = w.memory + odd;
  if (kind->type == ATTN_BLOCK_F8_E4M3)
    fill_float8(&w, count, seed);
  else if (format->elements == 1)
    fill_plain(&w, count, seed);
  else
    fill_blocks(&w, blocks, format->bytes, seed);
  float *single = malloc((size_t)count * sizeof *single);
  assert_ok(attn_blocks_to_f32(kind->type, w.blocks, single, count));
  if (kind->scales == BESIDE) scale_values(&w, single, seed);
  w.values = malloc((size_t)count * sizeof *w.values);
  for (int64_t i = 0; i < count; ++i) w.values[i] = (double)single[i];
  free(single);
  return w;
}

static void quantised_destroy(quantised *w) {
  free(w->memory);
  free(w->scales);
  free(w->values);
}

static attn_weight *weight_of(const quantised *w, attn_dtype compute) {
  attn_weight *weight;
  assert_ok(attn_weight_create(w->outputs, w->inputs, compute, &weight));
  if (w->scales)
    assert_ok(attn_weight_set_scaled(weight, w->blocks, w->scales, SCALE_OUTPUTS, SCALE_INPUTS));
  else
    assert_ok(attn_weight_set_blocks(weight, (attn_device){0}, w->kind->type, w->blocks));
  return weight;
}

/* --- Activations ------------------------------------------------------------------------------ */

/* A matrix inside a larger one whose gaps hold NaN. */
typedef struct matrix {
  attn_tensor whole, view;
  double *values; /* after rounding to its dtype; 0 where the view holds NaN instead */
} matrix;

static matrix matrix_create(attn_dtype dtype, int64_t rows, int64_t columns, uint64_t seed) {
  matrix m;
  assert_ok(attn_tensor_create(dtype, 2, (int64_t[]){rows, columns + GAP}, &m.whole));
  assert_ok(attn_tensor_fill(&m.whole, NAN));
  assert_ok(attn_tensor_slice(&m.whole, 1, 0, columns, &m.view));
  double *x = malloc((size_t)(rows * columns) * sizeof *x);
  uint64_t random = seed; /* a cheap generator: there are hundreds of millions of them */
  for (int64_t i = 0; i < rows * columns; ++i) {
    random = random * 6364136223846793005u + 1442695040888963407u;
    x[i] = (double)(random >> 11) * 0x1p-52 - 1;
  }
  attn_tensor source;
  assert_ok(attn_tensor_wrap(x, ATTN_F64, 2, m.view.shape, &source));
  assert_ok(attn_tensor_copy(&source, &m.view));
  free(x);
  m.values = test_to_doubles(&m.view);
  return m;
}

/* What is not added to must be overwritten: NaN would stay. */
static matrix result_create(attn_dtype dtype, int64_t rows, int64_t columns, bool accumulate) {
  matrix m = matrix_create(dtype, rows, columns, 7);
  if (accumulate) return m;
  assert_ok(attn_tensor_fill(&m.view, NAN));
  memset(m.values, 0, (size_t)(rows * columns) * sizeof *m.values);
  return m;
}

static void matrix_destroy(matrix *m) {
  attn_tensor_destroy(&m->whole);
  free(m->values);
}

/* --- Products --------------------------------------------------------------------------------- */

typedef struct product {
  const quantised *w;
  attn_dtype compute, result;
  int64_t rows;
  bool accumulate;
} product;

/* Decode in bfloat16 rounds activations to 8 bits where there are kernels for the type, in blocks
 * of 32: each is off by at most max |x| / 254, half a step, and a little for the division. The
 * result is off by at most the sum of that times |w|. */
static bool rounds_activations(const product *p) {
  if (p->compute != ATTN_BF16 || p->rows > ATTN_MATVEC_ROWS) return false;
  switch (p->w->kind->type) {
#define CASE(name, TYPE) case ATTN_BLOCK_##TYPE:
    ATTN_BLOCKS_TYPES(CASE)
#undef CASE
    return true;
  default: return false;
  }
}

static double rounding_error(const double *x, const double *w, int64_t count) {
  double error = 0;
  for (int64_t b = 0; b < count; b += ATTN_ROUNDED_BLOCK) {
    double most = 0, weights = 0;
    for (int64_t i = b; i < b + ATTN_ROUNDED_BLOCK; ++i) {
      most = fmax(most, fabs(x[i]));
      weights += fabs(w[i]);
    }
    error += most / 254 * (1 + float32_sum) * weights;
  }
  return error;
}

/* What the rounding of the weights, and the sums, may change relative to sum |w_i x_i|. */
static double weight_error(const product *p, bool few) {
  if (p->compute == ATTN_F64) return float64_sum;
  return p->compute == ATTN_F32 || few ? float32_sum : bfloat16_place + float32_sum;
}

/* c[r][o] = sum_i a[r][i] w(o, i) and no further off than the roundings allow. */
static void assert_product(const char *name, const product *p, const matrix *a, const matrix *c,
                           int64_t depth, int64_t w_o, int64_t w_i, double relative) {
  bool rounds = w_i == 1 && rounds_activations(p);
  double *got = test_to_doubles(&c->view);
  int64_t columns = c->view.shape[1];
  double place = p->result == ATTN_BF16 ? bfloat16_place : 0;
  for (int64_t r = 0; r < p->rows; ++r)
    for (int64_t o = 0; o < columns; ++o) {
      double want = c->values[r * columns + o], size = fabs(want);
      const double *x = a->values + r * depth, *w = p->w->values + o * w_o;
      for (int64_t i = 0; i < depth; ++i) {
        want += x[i] * w[i * w_i];
        size += fabs(x[i] * w[i * w_i]);
      }
      double error = fabs(got[r * columns + o] - want);
      double limit = relative * size;
      if (rounds) limit += rounding_error(x, w, depth);
      limit += place * (fabs(want) + limit);
      if (!(error <= limit))
        fail_msg("%s: %s, %s to %s, %lld rows, %lld x %lld%s: element %lld, %lld: %g for %g, "
                 "error %g over %g",
                 name, attn_block_get_format(p->w->kind->type)->name, attn_dtype_name(p->compute),
                 attn_dtype_name(p->result), (long long)p->rows, (long long)p->w->outputs,
                 (long long)p->w->inputs, p->accumulate ? ", accumulating" : "", (long long)r,
                 (long long)o, got[r * columns + o], want, error, limit);
    }
  for (int64_t r = 0; r < p->rows; ++r)
    for (int64_t g = columns; g < columns + GAP; ++g)
      assert_true(isnan(attn_tensor_get(&c->whole, (int64_t[]){r, g})));
  free(got);
}

static void check_forward(const product *p, attn_weight *weight, attn_arena *scratch) {
  matrix x = matrix_create(p->compute, p->rows, p->w->inputs, 1);
  matrix y = result_create(p->result, p->rows, p->w->outputs, p->accumulate);
  size_t before = attn_arena_get_mark(scratch).used;
  assert_ok(attn_dense_forward(weight, &x.view, &y.view, p->accumulate, scratch));
  assert_int_equal(attn_arena_get_mark(scratch).used, before);
  assert_product("forward", p, &x, &y, p->w->inputs, p->w->inputs, 1,
                 weight_error(p, p->rows <= ATTN_MATVEC_ROWS));
  matrix_destroy(&x);
  matrix_destroy(&y);
}

static void check_backward(const product *p, attn_weight *weight, attn_arena *scratch) {
  matrix dy = matrix_create(p->compute, p->rows, p->w->outputs, 2);
  matrix dx = result_create(p->result, p->rows, p->w->inputs, p->accumulate);
  size_t before = attn_arena_get_mark(scratch).used;
  assert_ok(attn_dense_backward_input(weight, &dy.view, &dx.view, p->accumulate, scratch));
  assert_int_equal(attn_arena_get_mark(scratch).used, before);
  assert_product("backward input", p, &dy, &dx, p->w->outputs, 1, p->w->inputs,
                 weight_error(p, false));
  matrix_destroy(&dy);
  matrix_destroy(&dx);
}

static void check_weight(const quantised *w, attn_arena *scratch) {
  static const int64_t rows[] = {1, 3, 8, 9, 40, 130};
  for (int d = 0; d < PAIRS; ++d) {
    attn_weight *weight = weight_of(w, pairs[d][0]);
    for (size_t r = 0; r < sizeof rows / sizeof *rows; ++r) {
      product p = {.w = w,
                   .compute = pairs[d][0],
                   .result = pairs[d][1],
                   .rows = rows[r],
                   .accumulate = (r + (size_t)d) % 2};
      check_forward(&p, weight, scratch);
      if (p.rows == 3 || p.rows == 9) check_backward(&p, weight, scratch);
    }
    assert_int_equal(attn_weight_bytes(weight), 0);
    attn_weight_destroy(weight);
  }
}

/* One block, several, and more than the product dequantises at once. */
static void get_inputs(const kind *kind, int64_t inputs[3]) {
  static const int64_t plain[] = {1, 37, 600}, small[] = {32, 96, 544}, large[] = {256, 256, 768};
  int elements = attn_block_get_format(kind->type)->elements;
  memcpy(inputs, elements == 1 ? plain : elements == 32 ? small : large, sizeof plain);
}

static void products_on_a_path(void *context) {
  static const int64_t outputs[] = {1, 33, 100};
  for (int k = 0; k < KINDS; ++k)
    for (int o = 0; o < 3; ++o)
      for (int i = 0; i < 3; ++i) {
        int64_t inputs[3];
        get_inputs(&kinds[k], inputs);
        if (i > 0 && inputs[i] == inputs[i - 1]) continue;
        quantised w = quantised_create(&kinds[k], outputs[o], inputs[i], (o + i) % 2, 5);
        check_weight(&w, context);
        quantised_destroy(&w);
      }
}

static void products_equal_straight_loops(void **state) {
  (void)state;
  attn_arena *scratch = attn_arena_create(0);
  test_on_every_path(products_on_a_path, scratch);
  attn_arena_destroy(scratch);
}

/* Large enough for several threads and groups; the same twice gives the same bits. */
static void threads_share_the_outputs(void **state) {
  (void)state;
  enum { OUTPUTS = 300, INPUTS = 1280 };
  attn_arena *scratch = attn_arena_create(0);
  for (int k = 0; k < KINDS; ++k) {
    quantised w = quantised_create(&kinds[k], OUTPUTS, INPUTS, false, 6);
    for (int d = 0; d < PAIRS; ++d)
      for (int64_t rows = 5; rows < 100; rows += 64) {
        product p = {.w = &w, .compute = pairs[d][0], .result = pairs[d][1], .rows = rows};
        attn_weight *weight = weight_of(&w, p.compute);
        matrix x = matrix_create(p.compute, rows, INPUTS, 1);
        matrix y = result_create(p.result, rows, OUTPUTS, false);
        matrix again = result_create(p.result, rows, OUTPUTS, false);
        assert_ok(attn_dense_forward(weight, &x.view, &y.view, false, scratch));
        assert_ok(attn_dense_forward(weight, &x.view, &again.view, false, scratch));
        assert_product("forward", &p, &x, &y, INPUTS, INPUTS, 1,
                       weight_error(&p, rows <= ATTN_MATVEC_ROWS));
        assert_memory_equal(y.whole.data, again.whole.data,
                            (size_t)(rows * (OUTPUTS + GAP)) * attn_dtype_size(p.result));
        check_backward(&p, weight, scratch);
        attn_weight_destroy(weight);
        matrix *all[] = {&x, &y, &again};
        for (size_t i = 0; i < sizeof all / sizeof *all; ++i) matrix_destroy(all[i]);
      }
    quantised_destroy(&w);
  }
  attn_arena_destroy(scratch);
}

/* --- Contracts -------------------------------------------------------------------------------- */

static void later_calls_allocate_nothing(void **state) {
  (void)state;
  enum { OUTPUTS = 96, INPUTS = 512 };
  for (int k = 0; k < KINDS; ++k) {
    quantised w = quantised_create(&kinds[k], OUTPUTS, INPUTS, false, 1);
    attn_weight *weight = weight_of(&w, ATTN_BF16);
    attn_arena *scratch = attn_arena_create(0);
    uint64_t before = 0;
    for (int step = 0; step < 3; ++step)
      for (int64_t rows = 40; rows > 0; rows /= 6) {
        matrix x = matrix_create(ATTN_BF16, rows, INPUTS, 2);
        matrix y = matrix_create(ATTN_BF16, rows, OUTPUTS, 3);
        before = attn_memory_get_stats().allocations;
        assert_ok(attn_dense_forward(weight, &x.view, &y.view, false, scratch));
        if (step > 0) assert_int_equal(attn_memory_get_stats().allocations, before);
        matrix_destroy(&x);
        matrix_destroy(&y);
      }
    attn_arena_destroy(scratch);
    attn_weight_destroy(weight);
    quantised_destroy(&w);
  }
}

static void callers_share_a_weight(void **state) {
  (void)state;
  enum { OUTPUTS = 64, INPUTS = 512, CALLERS = 4 };
  for (int k = 0; k < KINDS; ++k)
    for (int64_t rows = 4; rows <= 32; rows *= 8) {
      quantised w = quantised_create(&kinds[k], OUTPUTS, INPUTS, false, 1);
      product p = {.w = &w, .compute = ATTN_F32, .result = ATTN_F32, .rows = rows};
      attn_weight *weight = weight_of(&w, ATTN_F32);
      matrix x = matrix_create(ATTN_F32, rows, INPUTS, 2), y[CALLERS];
      for (int t = 0; t < CALLERS; ++t) y[t] = result_create(ATTN_F32, rows, OUTPUTS, false);
      attn_status status[CALLERS] = {0};
#pragma omp parallel for num_threads(CALLERS) schedule(static, 1)
      for (int t = 0; t < CALLERS; ++t) {
        attn_arena *scratch = attn_arena_create(0);
        for (int i = 0; i < 5 && status[t] == ATTN_OK; ++i)
          status[t] = attn_dense_forward(weight, &x.view, &y[t].view, false, scratch);
        attn_arena_destroy(scratch);
      }
      for (int t = 0; t < CALLERS; ++t) {
        assert_int_equal(status[t], ATTN_OK);
        assert_product("forward", &p, &x, &y[t], INPUTS, INPUTS, 1, float32_sum);
        matrix_destroy(&y[t]);
      }
      matrix_destroy(&x);
      attn_weight_destroy(weight);
      quantised_destroy(&w);
    }
}

/* Values, blocks, values, blocks: each set is what the next product sees. */
static void set_replaces_the_values(void **state) {
  (void)state;
  enum { OUTPUTS = 40, INPUTS = 64, ROWS = 20 };
  static const kind q4_1 = {ATTN_BLOCK_Q4_1, 2, {0, 2}};
  attn_arena *scratch = attn_arena_create(0);
  attn_weight *weight;
  assert_ok(attn_weight_create(OUTPUTS, INPUTS, ATTN_F32, &weight));
  for (uint64_t turn = 0; turn < 4; ++turn) {
    quantised w = quantised_create(&q4_1, OUTPUTS, INPUTS, false, turn);
    attn_tensor plain = test_from_doubles(w.values, ATTN_F64, 2, (int64_t[]){OUTPUTS, INPUTS});
    if (turn % 2)
      assert_ok(attn_weight_set_blocks(weight, (attn_device){0}, ATTN_BLOCK_Q4_1, w.blocks));
    else
      assert_ok(attn_weight_set(weight, &plain));
    assert_int_equal(attn_weight_values(weight).data == NULL, turn % 2);
    for (int64_t rows = 2; rows <= ROWS; rows *= 10) {
      product p = {.w = &w, .compute = ATTN_F32, .result = ATTN_F32, .rows = rows};
      check_forward(&p, weight, scratch);
      check_backward(&p, weight, scratch);
    }
    assert_int_equal(attn_weight_bytes(weight) == 0, turn % 2);
    attn_tensor_destroy(&plain);
    quantised_destroy(&w);
  }
  attn_weight_destroy(weight);
  attn_arena_destroy(scratch);
}

/* Every allocation fails once: a clean error, and the scratch memory is back where it was. */
static void failed_allocations_are_clean(void **state) {
  (void)state;
  enum { OUTPUTS = 40, ROWS = 9 };
  for (int k = 0; k < KINDS; ++k)
    for (int64_t rows = 1; rows <= ROWS; rows += ROWS - 1)
      for (int backward = 0; backward < 2; ++backward) {
        int64_t inputs = attn_block_get_format(kinds[k].type)->elements == 1 ? 37 : 256;
        quantised w = quantised_create(&kinds[k], OUTPUTS, inputs, false, 1);
        attn_weight *weight = weight_of(&w, ATTN_BF16);
        matrix x = matrix_create(ATTN_BF16, rows, inputs, 2);
        matrix y = matrix_create(ATTN_BF16, rows, OUTPUTS, 3);
        bool failed = true;
        for (int skip = 0; failed; ++skip) {
          attn_arena *scratch = attn_arena_create(1); /* every piece is a chunk of its own */
          attn_fault_arm(ATTN_FAULT_ALLOC, skip);
          attn_status status =
              backward ? attn_dense_backward_input(weight, &y.view, &x.view, false, scratch)
                       : attn_dense_forward(weight, &x.view, &y.view, false, scratch);
          failed = attn_fault_disarm(ATTN_FAULT_ALLOC);
          assert_int_equal(status, failed ? ATTN_OUT_OF_MEMORY : ATTN_OK);
          assert_true(failed || skip > 0);
          assert_int_equal(attn_arena_get_mark(scratch).used, 0);
          attn_arena_destroy(scratch);
        }
        matrix_destroy(&x);
        matrix_destroy(&y);
        attn_weight_destroy(weight);
        quantised_destroy(&w);
      }
}

static void misuse_is_refused(void **state) {
  (void)state;
  char blocks[4 * 210] = {0};
  attn_weight *weight;
  assert_ok(attn_weight_create(4, 48, ATTN_F32, &weight));
  assert_int_equal(attn_weight_set_blocks(NULL, (attn_device){0}, ATTN_BLOCK_F32, blocks),
                   ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_weight_set_blocks(weight, (attn_device){0}, ATTN_BLOCK_F32, NULL),
                   ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_weight_set_blocks(weight, (attn_device){0}, ATTN_BLOCK_Q4_0, blocks),
                   ATTN_INVALID_SHAPE);
  assert_string_equal(attn_error_message(), "weight: 48 inputs are not whole blocks of Q4_0 (32)");
  assert_int_equal(attn_weight_set_blocks(weight, (attn_device){0}, ATTN_BLOCK_Q6_K, blocks),
                   ATTN_INVALID_SHAPE);
  assert_int_equal(attn_weight_set_blocks(weight, (attn_device){0}, ATTN_BLOCK_IQ2_XS, blocks),
                   ATTN_UNSUPPORTED);
  assert_int_equal(attn_weight_set_blocks(weight, (attn_device){0}, ATTN_BLOCK_I8, blocks),
                   ATTN_UNSUPPORTED);
  assert_int_equal(attn_weight_set_blocks(weight, (attn_device){0}, (attn_block_type)4, blocks),
                   ATTN_INVALID_ARGUMENT);
  attn_arena *scratch = attn_arena_create(0);
  matrix x = matrix_create(ATTN_F32, 2, 48, 1), y = matrix_create(ATTN_F32, 2, 4, 1);
  assert_int_equal(attn_dense_forward(weight, &x.view, &y.view, false, scratch),
                   ATTN_INVALID_ARGUMENT); /* what was refused set nothing */
  float scale = 1;
  assert_int_equal(attn_weight_set_scaled(weight, blocks, NULL, 1, 1), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_weight_set_scaled(weight, blocks, &scale, 0, 1), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_weight_set_scaled(weight, blocks, &scale, 1, 0), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_weight_set_scaled(weight, NULL, &scale, 1, 1), ATTN_INVALID_ARGUMENT);
  assert_ok(attn_weight_set_blocks(weight, (attn_device){0}, ATTN_BLOCK_BF16, blocks));
  attn_tensor none = x.view, nothing = y.view;
  none.shape[0] = nothing.shape[0] = 0;
  assert_ok(attn_dense_forward(weight, &none, &nothing, false, scratch));
  assert_ok(attn_dense_backward_input(weight, &nothing, &none, false, scratch));
  assert_int_equal(attn_dense_forward(weight, &y.view, &y.view, false, scratch),
                   ATTN_INVALID_SHAPE);
  matrix_destroy(&x);
  matrix_destroy(&y);
  attn_arena_destroy(scratch);
  attn_weight_destroy(weight);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(products_equal_straight_loops),
      cmocka_unit_test(threads_share_the_outputs),
      cmocka_unit_test(later_calls_allocate_nothing),
      cmocka_unit_test(callers_share_a_weight),
      cmocka_unit_test(set_replaces_the_values),
      cmocka_unit_test(failed_allocations_are_clean),
      cmocka_unit_test(misuse_is_refused),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
