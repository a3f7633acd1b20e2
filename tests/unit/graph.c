/* The tape itself: errors, memory, accumulation, determinism, and what layers promise about
 * positions and pieces. tests/unit/operations.c checks values and gradients. */
#include "support/operations.h"
#include "support/test.h"

#include "base/fault.h"
#include "layers/layers.h"
#include "oracles/layers.h"

#include <math.h>
#include <string.h>

static const double float32_values = 1e-5;

/* A fresh graph, recording. */
static attn_graph *graph_of(attn_dtype compute) {
  attn_graph *g;
  assert_ok(attn_graph_create_on(test_device(), compute, &g));
  attn_graph_reset(g, true);
  return g;
}

static attn_tensor normal_tensor(attn_dtype dtype, int rank, const int64_t *shape, uint64_t seed) {
  int64_t count = 1;
  for (int i = 0; i < rank; ++i) count *= shape[i];
  double *x = malloc((size_t)(count + 1) * sizeof *x);
  test_fill_normal(x, count, 0, 1, seed);
  attn_tensor tensor = test_from_doubles(x, dtype, rank, shape);
  free(x);
  return tensor;
}

static attn_parameter normal_parameter(int64_t outputs, int64_t inputs, attn_dtype compute,
                                       bool trains, uint64_t seed) {
  double *x = malloc((size_t)(outputs * inputs) * sizeof *x);
  test_fill_normal(x, outputs * inputs, 0, 0.3, seed);
  attn_parameter p =
      trial_parameter_create("weight", x, 2, (int64_t[]){outputs, inputs},
                             compute == ATTN_F64 ? ATTN_F64 : ATTN_F32, compute, trains);
  free(x);
  return p;
}

/* errors ------------------------------------------------------------------------------------------
 */

static void assert_failed(attn_graph *g, const void *result, attn_status status, const char *part) {
  assert_null(result);
  assert_int_equal(attn_graph_status(g), status);
  if (!strstr(attn_error_message(), part))
    fail_msg("'%s' does not mention '%s'", attn_error_message(), part);
  attn_graph_reset(g, true);
}

static void misuse_is_an_error(void **state) {
  (void)state;
  attn_graph *g = graph_of(ATTN_F32);
  attn_tensor a = normal_tensor(ATTN_F32, 2, (int64_t[]){4, 6}, 1);
  attn_tensor b = normal_tensor(ATTN_F32, 2, (int64_t[]){4, 5}, 2);
  attn_tensor half = normal_tensor(ATTN_F16, 2, (int64_t[]){4, 6}, 3), turned, empty = a;
  attn_parameter w = normal_parameter(3, 5, ATTN_F32, true, 4);
  attn_layout layout = attn_layout_equal(1, 4);
  assert_ok(attn_tensor_permute(&a, (int[]){1, 0}, &turned));
  empty.data = NULL;
#define A attn_graph_leaf(g, &a)
#define B attn_graph_leaf(g, &b)
  assert_failed(g, attn_op_add(g, A, B), ATTN_INVALID_SHAPE, "[4, 6] and [4, 5]");
  assert_failed(g, attn_op_gate(g, ATTN_SILU, A, B), ATTN_INVALID_SHAPE, "[4, 6] and [4, 5]");
  assert_failed(g, attn_op_add_bias(g, A, B), ATTN_INVALID_SHAPE, "bias");
  assert_failed(g, attn_op_linear(g, A, &w), ATTN_INVALID_SHAPE, "5 inputs, x is [4, 6]");
  assert_failed(g, attn_op_linear_add(g, A, B, &w), ATTN_INVALID_SHAPE, "residual");
  assert_failed(g, attn_op_cast(g, A, ATTN_F16), ATTN_UNSUPPORTED, "float16");
  assert_failed(g, attn_op_cast(g, A, ATTN_I32), ATTN_UNSUPPORTED, "int32");
  assert_failed(g, attn_graph_input(g, &half), ATTN_UNSUPPORTED, "float16");
  assert_failed(g, attn_graph_leaf(g, &turned), ATTN_INVALID_SHAPE, "contiguous");
  assert_failed(g, attn_graph_input(g, &empty), ATTN_INVALID_ARGUMENT, "no data");
  assert_failed(g, attn_view_reshape(g, A, 1, (int64_t[]){7}), ATTN_INVALID_SHAPE, "reshape");
  assert_failed(g, attn_view_slice(g, A, 1, 4, 3), ATTN_INVALID_SHAPE, "slice");
  assert_failed(g, attn_layer_rms_norm(g, A, B, 1e-5), ATTN_INVALID_SHAPE, "weight");
  assert_failed(g, attn_layer_rms_norm(g, A, NULL, NAN), ATTN_INVALID_ARGUMENT, "epsilon");
  assert_failed(g, attn_layer_rms_norm(g, A, NULL, -1), ATTN_INVALID_ARGUMENT, "epsilon");
  assert_failed(g, attn_layer_rotary(g, A, &layout, 2, &(attn_rope){.base = 1e4}),
                ATTN_INVALID_SHAPE, "[4, 6]");
  assert_failed(g, attn_layer_lrpe(g, A, B, &layout), ATTN_INVALID_SHAPE, "[4, 6]");
  assert_failed(g, attn_layer_short_convolution(g, A, B, &layout, NULL), ATTN_INVALID_SHAPE,
                "[4, 6]");
  assert_failed(g, attn_layer_embedding(g, &w, (int32_t[]){0, 3}, 2, 1), ATTN_INVALID_ARGUMENT,
                "token 3 at 1");
  assert_failed(g, attn_layer_embedding(g, &w, (int32_t[]){-1}, 1, 1), ATTN_INVALID_ARGUMENT,
                "token -1 at 0");
  assert_failed(g, attn_op_linear_cross_entropy(g, B, &w, 0, (int32_t[]){0, 1, 3, 0}),
                ATTN_INVALID_ARGUMENT, "target 3 of row 2");
  assert_failed(g, attn_op_linear_cross_entropy(g, A, &w, 0, (int32_t[]){0, 1, 2, 0}),
                ATTN_INVALID_SHAPE, "[rows >= 1, 5]");
  attn_tensor cube = normal_tensor(ATTN_F32, 3, (int64_t[]){4, 2, 3}, 5);
#define CUBE attn_graph_leaf(g, &cube)
  assert_failed(g, attn_layer_rotary(g, CUBE, &layout, 3, &(attn_rope){.base = 1e4}),
                ATTN_INVALID_SHAPE, "even");
  assert_failed(g, attn_layer_rotary(g, CUBE, &layout, 4, &(attn_rope){.base = 1e4}),
                ATTN_INVALID_SHAPE, "4 (even");
  assert_failed(g, attn_layer_rotary(g, CUBE, &layout, 2, &(attn_rope){.base = INFINITY}),
                ATTN_INVALID_ARGUMENT, "base");
  attn_linear_attention linear = {.normalise = true, .epsilon = 1e-6};
  attn_layout three = attn_layout_equal(1, 3), two = attn_layout_equal(2, 2);
  attn_layout many = attn_layout_equal(1, ATTN_RELU_LENGTH + 1);
  assert_failed(g, attn_op_linear_attention(g, &linear, &layout, &layout, CUBE, A, CUBE),
                ATTN_INVALID_SHAPE, "[4, 2, 3], [4, 6] and");
  assert_failed(g, attn_op_linear_attention(g, &linear, &layout, &three, CUBE, CUBE, CUBE),
                ATTN_INVALID_SHAPE, "[3, heads, dim]");
  assert_failed(g, attn_op_linear_attention(g, &linear, &layout, &two, CUBE, CUBE, CUBE),
                ATTN_INVALID_SHAPE, "as many sequences");
  assert_failed(g, attn_op_relu_attention(g, &layout, &three, true, 1, CUBE, CUBE, CUBE),
                ATTN_INVALID_SHAPE, "[3, heads, dim]");
  assert_failed(g, attn_op_relu_attention(g, &two, &layout, true, 1, CUBE, CUBE, CUBE),
                ATTN_INVALID_SHAPE, "relu attention");
  attn_tensor long_cube = normal_tensor(ATTN_F32, 3, (int64_t[]){many.rows, 1, 2}, 6);
  attn_var *long_var = attn_graph_leaf(g, &long_cube);
  assert_failed(g, attn_op_relu_attention(g, &many, &many, true, 1, long_var, long_var, long_var),
                ATTN_INVALID_SHAPE, "at most 1024");
  attn_tensor_destroy(&long_cube);
  assert_int_equal(attn_graph_create(ATTN_F16, &(attn_graph *){0}), ATTN_UNSUPPORTED);
  attn_tensor_destroy(&cube);
  attn_tensor_destroy(&a);
  attn_tensor_destroy(&b);
  attn_tensor_destroy(&half);
  trial_parameter_destroy(&w);
  attn_graph_destroy(g);
}

static void the_first_error_stays(void **state) {
  (void)state;
  attn_graph *g = graph_of(ATTN_F32);
  attn_tensor a = normal_tensor(ATTN_F32, 2, (int64_t[]){4, 6}, 1);
  attn_tensor b = normal_tensor(ATTN_F32, 2, (int64_t[]){6, 4}, 2);
  attn_parameter w = normal_parameter(6, 6, ATTN_F32, true, 3);
  attn_layout layout = attn_layout_equal(1, 4);
  attn_var *x = attn_op_add(g, attn_graph_leaf(g, &a), attn_graph_leaf(g, &b));
  /* NULL passes through everything */
  x = attn_op_activate(g, ATTN_SILU, attn_op_scale(g, x, 2));
  x = attn_op_gate(g, ATTN_SILU, x, attn_op_activate_wide(g, ATTN_EXP, x));
  x = attn_op_linear_add(g, x, attn_op_linear(g, attn_op_linear_wide(g, x, &w), &w), &w);
  x = attn_layer_rms_norm(g, attn_layer_l2_norm(g, x), NULL, 1e-5);
  x = attn_layer_rotary(g, attn_view_reshape(g, x, 1, (int64_t[]){-1}), &layout, 2,
                        &(attn_rope){.base = 10});
  x = attn_layer_lrpe(g, attn_view_slice(g, x, 0, 0, 1), x, &layout);
  x = attn_layer_short_convolution(g, attn_op_cast(g, x, ATTN_F32), x, &layout, NULL);
  x = attn_layer_gated_feed_forward(g, ATTN_SILU, attn_op_add_bias(g, x, x), &w, &w, &w);
  x = attn_layer_layer_norm(g, attn_layer_mlp(g, ATTN_GELU, x, &w, NULL, &w, NULL), x, x, 1);
  x = attn_op_linear_cross_entropy(g, x, &w, 0, (int32_t[]){0});
  assert_null(x);
  assert_null(attn_layer_embedding(g, &w, (int32_t[]){77}, 1, 1)); /* a second error */
  assert_int_equal(attn_graph_status(g), ATTN_INVALID_SHAPE);
  assert_non_null(strstr(attn_error_message(), "[4, 6] and [6, 4]"));
  assert_int_equal(attn_graph_backward(g, x, 1), ATTN_INVALID_SHAPE);
  attn_tensor_destroy(&a);
  attn_tensor_destroy(&b);
  trial_parameter_destroy(&w);
  attn_graph_destroy(g);
}

static void backward_checks_its_loss(void **state) {
  (void)state;
  attn_graph *g = graph_of(ATTN_F64);
  attn_tensor a = normal_tensor(ATTN_F64, 1, (int64_t[]){1}, 1);
  attn_tensor b = normal_tensor(ATTN_F64, 1, (int64_t[]){2}, 1);
  assert_int_equal(attn_graph_backward(g, NULL, 1), ATTN_INVALID_SHAPE);
  assert_int_equal(attn_graph_backward(g, attn_graph_leaf(g, &b), 1), ATTN_INVALID_SHAPE);
  assert_int_equal(attn_graph_backward(g, attn_graph_input(g, &a), 1), ATTN_INVALID_ARGUMENT);
  attn_var *x = attn_graph_leaf(g, &a), *y = attn_op_scale(g, x, 3);
  assert_ok(attn_graph_backward(g, y, 2));
  assert_true(attn_tensor_get(&x->gradient, (int64_t[]){0}) == 6);
  assert_int_equal(attn_graph_backward(g, y, 2), ATTN_INVALID_ARGUMENT); /* the tape is gone */
  attn_tensor_destroy(&a);
  attn_tensor_destroy(&b);
  attn_graph_destroy(g);
}

/* No rows, in any axis, is no error and no work. */
static void empty_tensors(void **state) {
  (void)state;
  attn_graph *g = graph_of(ATTN_F32);
  static const int64_t shapes[3][3] = {{0, 2, 4}, {2, 0, 4}, {2, 3, 0}};
  for (int i = 0; i < 3; ++i) {
    attn_tensor a = normal_tensor(ATTN_F32, 3, shapes[i], 1);
    attn_var *x = attn_graph_leaf(g, &a);
    x = attn_op_add(g, x, attn_op_activate(g, ATTN_SILU, x));
    x = attn_op_gate(g, ATTN_SILU, x, attn_layer_rms_norm(g, x, NULL, 1e-5));
    assert_non_null(attn_op_scale(g, x, 2));
    attn_tensor_destroy(&a);
  }
  attn_graph_destroy(g);
}

/* a small model ---------------------------------------------------------------------------------
 */

enum { MODEL_WIDTH = 64, MODEL_VOCABULARY = 90, MODEL_HEADS = 4 };

enum { FUSED_NOT, FUSED_APART, FUSED, FUSED_DISCARDED, FUSED_WAYS };
typedef struct model {
  attn_parameter table, norm, up, gate, down, taps, theta;
  attn_layout layout;
  int way;      /* FUSED_NOT: model_loss */
  bool expects; /* the scale of its backward is said beforehand */
} model;

static attn_parameter *parameter_of(model *m, int i) {
  attn_parameter *const all[] = {&m->table, &m->norm, &m->up,   &m->gate,
                                 &m->down,  &m->taps, &m->theta};
  return i < (int)(sizeof all / sizeof *all) ? all[i] : NULL;
}

static model model_create(attn_dtype compute, bool trains) {
  double ones[MODEL_WIDTH];
  for (int i = 0; i < MODEL_WIDTH; ++i) ones[i] = 1 + 0.01 * i;
  model m = {.table = normal_parameter(MODEL_VOCABULARY, MODEL_WIDTH, compute, trains, 1),
             .up = normal_parameter(128, MODEL_WIDTH, compute, trains, 2),
             .gate = normal_parameter(128, MODEL_WIDTH, compute, trains, 3),
             .down = normal_parameter(MODEL_WIDTH, 128, compute, trains, 4),
             .taps = normal_parameter(MODEL_WIDTH, 4, compute, trains, 5),
             .theta = normal_parameter(MODEL_HEADS, MODEL_WIDTH / MODEL_HEADS, compute, trains, 6)};
  m.norm = trial_parameter_create("norm", ones, 1, (int64_t[]){MODEL_WIDTH},
                                  compute == ATTN_F64 ? ATTN_F64 : ATTN_F32, compute, trains);
  return m;
}

static void model_destroy(model *m) {
  for (int i = 0; parameter_of(m, i); ++i) trial_parameter_destroy(parameter_of(m, i));
}

static attn_var *model_block(attn_graph *g, void *context, attn_var *x) {
  model *m = context;
  attn_var *inner = attn_layer_rms_norm(g, x, attn_graph_parameter(g, &m->norm), 1e-5);
  inner =
      attn_layer_short_convolution(g, inner, attn_graph_parameter(g, &m->taps), &m->layout, NULL);
  int64_t heads[3] = {m->layout.rows, MODEL_HEADS, MODEL_WIDTH / MODEL_HEADS};
  inner = attn_layer_rotary(g, attn_view_reshape(g, inner, 3, heads), &m->layout, 8,
                            &(attn_rope){.base = 1e4});
  inner = attn_layer_lrpe(g, inner, attn_graph_parameter(g, &m->theta), &m->layout);
  inner = attn_view_reshape(g, inner, 2, (int64_t[]){m->layout.rows, 2 * MODEL_WIDTH});
  attn_var *half = inner ? attn_view_slice(g, inner, 1, 0, MODEL_WIDTH) : NULL;
  attn_var *a = attn_op_linear(g, half, &m->gate), *b = attn_op_linear(g, half, &m->up);
  return attn_op_linear_add(g, x, attn_op_gate(g, ATTN_SILU, a, b), &m->down);
}

static attn_var *model_loss(attn_graph *g, model *m, const int32_t *tokens) {
  attn_var *x = attn_layer_embedding(g, &m->table, tokens, m->layout.rows, 1);
  x = model_block(g, m, x);
  x = attn_graph_checkpoint(g, model_block, m, x);
  x = attn_layer_layer_norm(g, x, NULL, NULL, 1e-5);
  return attn_op_linear_cross_entropy(g, x, &m->table, 0, tokens);
}

/* Two layers of what fuses: as one operation or as those that it is made of; with all values kept
 * or with what can be made again discarded. */
static attn_var *fused_loss(attn_graph *g, model *m, const int32_t *tokens) {
  attn_var *x = attn_layer_embedding(g, &m->table, tokens, m->layout.rows, 1);
  attn_var *weight = attn_graph_parameter(g, &m->norm);
  for (int l = 0; l < 2; ++l) {
    attn_var *in = attn_layer_rms_norm(g, x, l ? NULL : weight, 1e-5), *normed, *gated;
    attn_var *y = attn_layer_gated_feed_forward(g, ATTN_SILU, in, &m->gate, &m->up, &m->down);
    if (m->way == FUSED_APART) {
      x = attn_op_add(g, x, y);
      normed = attn_layer_rms_norm(g, x, weight, 1e-5);
    } else {
      normed = attn_layer_add_rms_norm(g, x, y, weight, 1e-5, &x);
      attn_graph_forget(g, y);
    }
    attn_var *a = attn_op_linear(g, normed, &m->gate), *b = attn_op_linear(g, normed, &m->up);
    if (m->way == FUSED_APART)
      gated = attn_op_gate(g, ATTN_IDENTITY, attn_layer_rms_norm(g, a, NULL, 1e-5), b);
    else
      gated = attn_layer_rms_norm_gate(g, a, b, 1e-5);
    x = attn_op_add(g, x, attn_op_linear(g, gated, &m->down));
    if (m->way == FUSED_DISCARDED) attn_graph_discard(g, NULL);
  }
  return attn_op_linear_cross_entropy(g, attn_layer_rms_norm(g, x, NULL, 1e-5), &m->table, 0,
                                      tokens);
}

enum { MODEL_ROWS = 600 };
static void fill_tokens(int32_t tokens[MODEL_ROWS]) {
  for (int i = 0; i < MODEL_ROWS; ++i) tokens[i] = (i * 37 + i / 7) % MODEL_VOCABULARY;
}

static void clear_gradients(model *m) {
  for (int i = 0; parameter_of(m, i); ++i)
    assert_ok(attn_tensor_fill(&parameter_of(m, i)->gradient, 0));
}

/* All gradients of a step, one after the other, and the loss at the end. */
static double *gradients_of_step(model *m, attn_dtype compute, int threads, int passes,
                                 int64_t *count) {
  int32_t tokens[MODEL_ROWS];
  fill_tokens(tokens);
  static const int32_t offsets[3] = {0, 250, MODEL_ROWS};
  m->layout = attn_layout_packed(2, offsets);
  assert_ok(attn_set_threads(threads));
  attn_graph *g;
  assert_ok(attn_graph_create_on(test_device(), compute, &g));
  clear_gradients(m);
  double loss = 0;
  for (int i = 0; i < passes; ++i) {
    attn_graph_reset(g, true);
    if (m->expects) attn_graph_expect(g, 1);
    attn_var *y = m->way ? fused_loss(g, m, tokens) : model_loss(g, m, tokens);
    assert_ok(attn_graph_status(g));
    assert_ok(attn_graph_backward(g, y, 1));
    loss = attn_tensor_get(&y->value, (int64_t[]){0});
  }
  attn_graph_destroy(g);
  assert_ok(attn_set_threads(0));
  *count = 1;
  for (int i = 0; parameter_of(m, i); ++i) *count += attn_tensor_count(&parameter_of(m, i)->value);
  double *all = malloc((size_t)*count * sizeof *all), *next = all;
  for (int i = 0; parameter_of(m, i); ++i) {
    const attn_tensor *gradient = &parameter_of(m, i)->gradient;
    double *part = test_to_doubles(gradient);
    memcpy(next, part, (size_t)attn_tensor_count(gradient) * sizeof *part);
    next += attn_tensor_count(gradient);
    free(part);
  }
  *next = loss;
  return all;
}

static void same_threads_same_bits(void **state) {
  (void)state;
  for (int dtype = ATTN_F64; dtype <= ATTN_BF16; ++dtype)
    for (int threads = 1; threads <= 3; ++threads) {
      model m = model_create((attn_dtype)dtype, true);
      int64_t count;
      double *first = gradients_of_step(&m, (attn_dtype)dtype, threads, 1, &count);
      double *second = gradients_of_step(&m, (attn_dtype)dtype, threads, 1, &count);
      assert_memory_equal(first, second, (size_t)count * sizeof *first);
      free(first);
      free(second);
      model_destroy(&m);
    }
}

static void discarded_values_come_back(void **state) {
  (void)state;
  for (int dtype = ATTN_F64; dtype <= ATTN_BF16; ++dtype) {
    model m = model_create((attn_dtype)dtype, true);
    int64_t count;
    double *all[FUSED_WAYS];
    for (int way = FUSED_APART; way < FUSED_WAYS; ++way) {
      m.way = way;
      m.expects = way != FUSED_APART;
      all[way] = gradients_of_step(&m, (attn_dtype)dtype, 2, 1, &count);
    }
    assert_memory_equal(all[FUSED], all[FUSED_DISCARDED], (size_t)count * sizeof **all);
    double bound = dtype == ATTN_F64 ? 1e-13 : dtype == ATTN_F32 ? 1e-5 : 2e-2;
    assert_true(test_relative_error(all[FUSED], all[FUSED_APART], count) < bound);
    for (int way = FUSED_APART; way < FUSED_WAYS; ++way) free(all[way]);
    model_destroy(&m);
  }
}

/* What was promised to the loss must come. */
static void backward_keeps_its_promise(void **state) {
  (void)state;
  attn_graph *g = graph_of(ATTN_F64);
  attn_tensor a = normal_tensor(ATTN_F64, 1, (int64_t[]){1}, 1);
  attn_graph_expect(g, 0.5);
  attn_var *y = attn_op_scale(g, attn_graph_leaf(g, &a), 3);
  assert_int_equal(attn_graph_backward(g, y, 1), ATTN_INVALID_ARGUMENT);
  assert_ok(attn_graph_backward(g, y, 0.5));
  attn_tensor_destroy(&a);
  attn_graph_destroy(g);
}

static void gradients_accumulate(void **state) {
  (void)state;
  model m = model_create(ATTN_F64, true);
  int64_t count;
  double *once = gradients_of_step(&m, ATTN_F64, 1, 1, &count);
  double *twice = gradients_of_step(&m, ATTN_F64, 1, 2, &count);
  for (int64_t i = 0; i + 1 < count; ++i) once[i] *= 2;
  assert_true(test_relative_error(twice, once, count) < 1e-14);
  free(once);
  free(twice);
  model_destroy(&m);
}

/* Operations without dense products promise the same bits for any number of threads. */
static attn_var *without_products(attn_graph *g, model *m, attn_var *x) {
  x = attn_layer_rms_norm(g, x, attn_graph_parameter(g, &m->norm), 1e-5);
  x = attn_op_gate(g, ATTN_SILU, x, attn_op_activate(g, ATTN_GELU, x));
  x = attn_op_add_bias(g, x, attn_graph_parameter(g, &m->norm));
  x = attn_layer_short_convolution(g, x, attn_graph_parameter(g, &m->taps), &m->layout, NULL);
  int64_t heads[3] = {m->layout.rows, MODEL_HEADS, MODEL_WIDTH / MODEL_HEADS};
  x = attn_layer_rotary(g, attn_view_reshape(g, x, 3, heads), &m->layout, 8,
                        &(attn_rope){.base = 1e4});
  return attn_layer_lrpe(g, x, attn_graph_parameter(g, &m->theta), &m->layout);
}

static void threads_change_no_bit(void **state) {
  (void)state;
  double *expected[8] = {0};
  for (int threads = 1; threads <= 4; ++threads) {
    model m = model_create(ATTN_F32, true);
    assert_ok(attn_set_threads(threads));
    int32_t tokens[MODEL_ROWS];
    fill_tokens(tokens);
    m.layout = attn_layout_equal(2, MODEL_ROWS / 2);
    attn_graph *g = graph_of(ATTN_F32);
    attn_var *x = attn_layer_embedding(g, &m.table, tokens, MODEL_ROWS, 1);
    attn_var *y = without_products(g, &m, x);
    assert_ok(attn_graph_status(g));
    /* one element of the product with itself is not enough: seed the whole gradient */
    bool accumulate;
    attn_tensor seed = attn_gradient_of(g, y, &accumulate);
    assert_ok(attn_tensor_copy(&y->value, &seed));
    for (attn_node *node = g->last; node; node = node->previous) assert_ok(node->backward(g, node));
    double *got[8] = {test_to_doubles(&y->value)};
    for (int i = 0; parameter_of(&m, i); ++i)
      got[i + 1] = test_to_doubles(&parameter_of(&m, i)->gradient);
    for (int i = 0; i < 8; ++i) {
      int64_t count =
          i ? attn_tensor_count(&parameter_of(&m, i - 1)->value) : attn_tensor_count(&y->value);
      if (threads > 1) {
        assert_memory_equal(got[i], expected[i], (size_t)count * sizeof(double));
        free(got[i]);
      } else {
        expected[i] = got[i];
      }
    }
    attn_graph_destroy(g);
    model_destroy(&m);
  }
  for (int i = 0; i < 8; ++i) free(expected[i]);
  assert_ok(attn_set_threads(0));
}

/* memory ------------------------------------------------------------------------------------------
 */

/* A step in which every allocation after `skip` ones fails. Returns its status; *hit tells whether
 * an allocation failed. */
static attn_status step_with_fault(model *m, int64_t skip, bool *hit) {
  int32_t tokens[MODEL_ROWS];
  fill_tokens(tokens);
  m->layout = attn_layout_equal(1, MODEL_ROWS);
  attn_graph *g = NULL;
  attn_fault_arm(ATTN_FAULT_ALLOC, skip);
  attn_status status = attn_graph_create(ATTN_F32, &g);
  if (status == ATTN_OK) {
    attn_graph_reset(g, true);
    attn_var *loss = model_loss(g, m, tokens);
    status = attn_graph_status(g);
    if ((loss != NULL) != (status == ATTN_OK)) status = ATTN_INTERNAL;
    if (status == ATTN_OK) status = attn_graph_backward(g, loss, 1);
    if (status != attn_graph_status(g)) status = ATTN_INTERNAL;
    attn_graph_destroy(g);
  }
  *hit = attn_fault_disarm(ATTN_FAULT_ALLOC);
  return status;
}

static void every_allocation_may_fail(void **state) {
  (void)state;
  test_needs_cpu(); /* whose allocator fails */
  bool hit = true;
  int64_t skip = 0;
  for (; hit; ++skip) {
    size_t before = attn_memory_get_stats().live_bytes;
    model m = model_create(ATTN_F32, true);
    attn_status status = step_with_fault(&m, skip, &hit);
    assert_int_equal(status, hit ? ATTN_OUT_OF_MEMORY : ATTN_OK);
    model_destroy(&m);
    assert_int_equal(attn_memory_get_stats().live_bytes, before); /* nothing leaks */
  }
  assert_true(skip > 8); /* the walk saw the graph's, the arena's and the weights' allocations */
}

static size_t arena_used(const attn_graph *g) {
  return attn_arena_get_mark(g->arena).used; /* of the first chunk, which is enough here */
}

static void nothing_is_recorded_when_off(void **state) {
  (void)state;
  enum { ROWS = 20 };
  int32_t tokens[ROWS];
  for (int i = 0; i < ROWS; ++i) tokens[i] = i;
  model m = model_create(ATTN_F32, true);
  m.layout = attn_layout_equal(1, ROWS);
  attn_graph *g;
  assert_ok(attn_graph_create_on(test_device(), ATTN_F32, &g));
  size_t used[2];
  for (int recording = 0; recording < 2; ++recording) {
    attn_graph_reset(g, recording);
    attn_var *x = attn_layer_embedding(g, &m.table, tokens, ROWS, 1);
    x = model_block(g, &m, x);
    assert_non_null(x);
    used[recording] = arena_used(g);
    assert_int_equal(x->needs_gradient, recording);
    assert_int_equal(g->last != NULL, recording);
    if (!recording) assert_int_equal(attn_graph_backward(g, x, 1), ATTN_INVALID_SHAPE);
  }
  assert_true(used[0] < used[1]);
  attn_graph_destroy(g);
  model_destroy(&m);
}

/* After the first step, the same step allocates nothing: the arena is reused. */
static void steps_allocate_nothing(void **state) {
  (void)state;
  int32_t tokens[MODEL_ROWS];
  fill_tokens(tokens);
  model m = model_create(ATTN_F32, true);
  m.layout = attn_layout_equal(1, MODEL_ROWS);
  attn_graph *g = graph_of(ATTN_F32);
  uint64_t before = 0;
  for (int step = 0; step < 3; ++step) {
    attn_graph_reset(g, true);
    attn_var *loss = model_loss(g, &m, tokens);
    assert_ok(attn_graph_status(g));
    assert_ok(attn_graph_backward(g, loss, 1));
    if (step == 0) before = attn_memory_get_stats().allocations;
  }
  assert_int_equal(attn_memory_get_stats().allocations, before);
  attn_graph_destroy(g);
  model_destroy(&m);
}

/* the fused loss --------------------------------------------------------------------------------
 */

enum { LOSS_WIDTH = 4, LOSS_VOCABULARY = 65536 }; /* a chunk of logits is 64 rows */

static void cross_entropy_by_chunks(void **state) {
  (void)state;
  static const int64_t row_counts[] = {1, 63, 64, 65, 150};
  attn_parameter w = normal_parameter(LOSS_VOCABULARY, LOSS_WIDTH, ATTN_F32, true, 1);
  double *weights = test_to_doubles(&w.value);
  double *dw = malloc(LOSS_VOCABULARY * LOSS_WIDTH * sizeof *dw);
  for (size_t i = 0; i < sizeof row_counts / sizeof *row_counts; ++i) {
    int64_t rows = row_counts[i];
    attn_tensor x = normal_tensor(ATTN_F32, 2, (int64_t[]){rows, LOSS_WIDTH}, 2);
    double *values = test_to_doubles(&x), *dx = malloc((size_t)(rows * LOSS_WIDTH) * sizeof *dx);
    int32_t targets[150];
    for (int64_t r = 0; r < rows; ++r)
      targets[r] = r % 5 == 1 ? -1 : (int32_t)(r * 7919 % LOSS_VOCABULARY);
    double expected =
        oracle_cross_entropy(values, weights, targets, rows, LOSS_WIDTH, LOSS_VOCABULARY, dx, dw);
    assert_ok(attn_tensor_fill(&w.gradient, 0));
    attn_graph *g = graph_of(ATTN_F32);
    attn_var *leaf = attn_graph_leaf(g, &x);
    attn_var *loss = attn_op_linear_cross_entropy(g, leaf, &w, 0, targets);
    assert_ok(attn_graph_status(g));
    assert_ok(attn_graph_backward(g, loss, 3));
    double got = attn_tensor_get(&loss->value, (int64_t[]){0});
    assert_true(fabs(got - expected) < float32_values * fabs(expected));
    double *got_dx = test_to_doubles(&leaf->gradient), *got_dw = test_to_doubles(&w.gradient);
    for (int64_t j = 0; j < rows * LOSS_WIDTH; ++j) dx[j] *= 3;
    for (int64_t j = 0; j < LOSS_VOCABULARY * LOSS_WIDTH; ++j) dw[j] *= 3;
    assert_true(test_relative_error(got_dx, dx, rows * LOSS_WIDTH) < float32_values);
    assert_true(test_relative_error(got_dw, dw, LOSS_VOCABULARY * LOSS_WIDTH) < float32_values);
    for (int64_t j = 0; rows > 1 && j < LOSS_WIDTH; ++j)
      assert_true(got_dx[LOSS_WIDTH + j] == 0); /* row 1 is ignored */
    free(values);
    free(dx);
    free(got_dx);
    free(got_dw);
    attn_tensor_destroy(&x);
    attn_graph_destroy(g);
  }
  free(weights);
  free(dw);
  trial_parameter_destroy(&w);
}

static void all_targets_ignored(void **state) {
  (void)state;
  test_needs_cpu(); /* it writes into a tensor */
  attn_parameter w = normal_parameter(5, 3, ATTN_F32, true, 1);
  attn_tensor x = normal_tensor(ATTN_F32, 2, (int64_t[]){2, 3}, 2);
  ((float *)x.data)[0] = INFINITY; /* what an ignored row holds does not matter */
  attn_graph *g = graph_of(ATTN_F32);
  attn_var *leaf = attn_graph_leaf(g, &x);
  attn_var *loss = attn_op_linear_cross_entropy(g, leaf, &w, 0, (int32_t[]){-1, -1});
  assert_ok(attn_graph_backward(g, loss, 1));
  assert_true(attn_tensor_get(&loss->value, (int64_t[]){0}) == 0);
  for (int64_t i = 0; i < 6; ++i)
    assert_true(attn_tensor_get(&leaf->gradient, (int64_t[]){i / 3, i % 3}) == 0);
  attn_tensor_destroy(&x);
  trial_parameter_destroy(&w);
  attn_graph_destroy(g);
}

static size_t loss_memory(int64_t rows) {
  attn_parameter w = normal_parameter(LOSS_VOCABULARY, LOSS_WIDTH, ATTN_F32, true, 1);
  attn_tensor x = normal_tensor(ATTN_F32, 2, (int64_t[]){rows, LOSS_WIDTH}, 2);
  int32_t *targets = calloc((size_t)rows, sizeof *targets);
  size_t before = attn_memory_get_stats().live_bytes;
  attn_memory_reset_peak();
  attn_graph *g = graph_of(ATTN_F32);
  attn_var *loss = attn_op_linear_cross_entropy(g, attn_graph_leaf(g, &x), &w, 0, targets);
  assert_ok(attn_graph_backward(g, loss, 1));
  size_t peak = attn_memory_get_stats().peak_bytes - before;
  attn_graph_destroy(g);
  free(targets);
  attn_tensor_destroy(&x);
  trial_parameter_destroy(&w);
  return peak;
}

static void loss_memory_does_not_grow(void **state) {
  (void)state;
  size_t few = loss_memory(64), many = loss_memory(512);
  size_t logits = (size_t)(512 - 64) * LOSS_VOCABULARY * sizeof(float);
  assert_true(many < few + logits / 20);
}

/* positions and pieces --------------------------------------------------------------------------
 */

static double *
apply_rotation(attn_var *(*apply)(attn_graph *, attn_var *, const attn_layout *, attn_parameter *),
               attn_dtype compute, attn_parameter *theta, const attn_tensor *x, int64_t position) {
  attn_graph *g = graph_of(compute);
  attn_layout layout = attn_layout_equal(1, x->shape[0]);
  layout.position = position;
  attn_var *y = apply(g, attn_graph_input(g, x), &layout, theta);
  assert_ok(attn_graph_status(g));
  double *values = test_to_doubles(&y->value);
  attn_graph_destroy(g);
  return values;
}

static attn_var *apply_rotary(attn_graph *g, attn_var *x, const attn_layout *layout,
                              attn_parameter *theta) {
  (void)theta;
  return attn_layer_rotary(g, x, layout, x->value.shape[2], &(attn_rope){.base = 1e4});
}
static attn_var *apply_lrpe(attn_graph *g, attn_var *x, const attn_layout *layout,
                            attn_parameter *theta) {
  return attn_layer_lrpe(g, x, attn_graph_parameter(g, theta), layout);
}

/* Scores between two rotated sequences depend on the difference of their positions alone. */
static void scores_depend_on_differences(void **state) {
  (void)state;
  enum { LENGTH = 70, ROTATED = 8 }; /* beyond the stretch that the tables rotate through */
  attn_tensor q = normal_tensor(ATTN_F64, 3, (int64_t[]){LENGTH, 1, ROTATED}, 1);
  attn_tensor k = normal_tensor(ATTN_F64, 3, (int64_t[]){LENGTH, 1, ROTATED}, 2);
  attn_parameter theta = normal_parameter(1, ROTATED, ATTN_F64, false, 3);
  attn_var *(*const layers[2])(attn_graph *, attn_var *, const attn_layout *,
                               attn_parameter *) = {apply_rotary, apply_lrpe};
  for (int which = 0; which < 2; ++which) {
    int width = which ? 2 * ROTATED : ROTATED;
    double *at[2][2];
    for (int i = 0; i < 2; ++i) {
      at[i][0] = apply_rotation(layers[which], ATTN_F64, &theta, &q, i ? 1000 : 0);
      at[i][1] = apply_rotation(layers[which], ATTN_F64, &theta, &k, i ? 1000 : 0);
    }
    for (int n = 0; n < LENGTH; n += 7)
      for (int m = 0; m < LENGTH; m += 5) {
        double score[2] = {0, 0};
        for (int i = 0; i < 2; ++i)
          for (int c = 0; c < width; ++c)
            score[i] += at[i][0][n * width + c] * at[i][1][m * width + c];
        assert_true(fabs(score[0] - score[1]) < 1e-10); /* 1000 radians, 2^-53 each, 8 channels */
      }
    for (int i = 0; i < 4; ++i) free(at[i / 2][i % 2]);
  }
  attn_tensor_destroy(&q);
  attn_tensor_destroy(&k);
  trial_parameter_destroy(&theta);
}

/* At position one million, float32 rotations are still right to float32's rounding. */
static void far_positions_keep_their_phase(void **state) {
  (void)state;
  enum { LENGTH = 40, ROTATED = 16 };
  attn_tensor x = normal_tensor(ATTN_F32, 3, (int64_t[]){LENGTH, 1, ROTATED}, 1);
  double *values = test_to_doubles(&x), position[LENGTH], expected[LENGTH * ROTATED];
  for (int t = 0; t < LENGTH; ++t) position[t] = 1e6 + t;
  oracle_rotary(expected, values, position, LENGTH, 1, ROTATED, ROTATED, 1e4);
  double *got = apply_rotation(apply_rotary, ATTN_F32, NULL, &x, 1000000);
  assert_true(test_relative_error(got, expected, LENGTH * ROTATED) < 2e-7);
  free(got);
  free(values);
  attn_tensor_destroy(&x);
}

/* A sequence in pieces of any size, with the tail carried, equals one pass, bit by bit. */
static void convolution_in_pieces(void **state) {
  (void)state;
  enum { LENGTH = 13, CHANNELS = 5, WIDTH = 4 };
  static const int pieces[][LENGTH] = {
      {13}, {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, {2, 5, 1, 4, 1}, {3, 3, 3, 4}};
  attn_tensor x = normal_tensor(ATTN_F32, 2, (int64_t[]){LENGTH, CHANNELS}, 1);
  attn_parameter w = normal_parameter(CHANNELS, WIDTH, ATTN_F32, false, 2);
  attn_graph *g = graph_of(ATTN_F32);
  attn_layout whole = attn_layout_equal(1, LENGTH);
  attn_var *once = attn_layer_short_convolution(g, attn_graph_input(g, &x),
                                                attn_graph_parameter(g, &w), &whole, NULL);
  double *expected = test_to_doubles(&once->value);
  for (size_t i = 0; i < sizeof pieces / sizeof *pieces; ++i) {
    attn_tensor tail;
    assert_ok(
        attn_tensor_create_on(test_device(), ATTN_F32, 2, (int64_t[]){WIDTH - 1, CHANNELS}, &tail));
    for (int first = 0, p = 0; first < LENGTH; first += pieces[i][p++]) {
      attn_tensor part;
      assert_ok(attn_tensor_slice(&x, 0, first, pieces[i][p], &part));
      attn_layout layout = attn_layout_equal(1, pieces[i][p]);
      attn_var *y = attn_layer_short_convolution(g, attn_graph_input(g, &part),
                                                 attn_graph_parameter(g, &w), &layout, &tail);
      assert_ok(attn_graph_status(g));
      double *got = test_to_doubles(&y->value);
      assert_memory_equal(got, expected + first * CHANNELS,
                          (size_t)(pieces[i][p] * CHANNELS) * sizeof *got);
      free(got);
    }
    attn_tensor_destroy(&tail);
  }
  free(expected);
  attn_tensor_destroy(&x);
  trial_parameter_destroy(&w);
  attn_graph_destroy(g);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(misuse_is_an_error),
      cmocka_unit_test(the_first_error_stays),
      cmocka_unit_test(backward_checks_its_loss),
      cmocka_unit_test(empty_tensors),
      cmocka_unit_test(same_threads_same_bits),
      cmocka_unit_test(discarded_values_come_back),
      cmocka_unit_test(backward_keeps_its_promise),
      cmocka_unit_test(gradients_accumulate),
      cmocka_unit_test(threads_change_no_bit),
      cmocka_unit_test(every_allocation_may_fail),
      cmocka_unit_test(nothing_is_recorded_when_off),
      cmocka_unit_test(steps_allocate_nothing),
      cmocka_unit_test(cross_entropy_by_chunks),
      cmocka_unit_test(all_targets_ignored),
      cmocka_unit_test(loss_memory_does_not_grow),
      cmocka_unit_test(scores_depend_on_differences),
      cmocka_unit_test(far_positions_keep_their_phase),
      cmocka_unit_test(convolution_in_pieces),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
