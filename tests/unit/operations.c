/* Every operation and layer of the tape: against its oracle, its gradients against finite
 * differences, and each dtype on each kernel path against float64. */
#include "support/operations.h"
#include "support/test.h"

#include "graph/passes.h"
#include "layers/layers.h"
#include "oracles/layers.h"

#include <math.h>
#include <string.h>

/* float64: some tens of operations of 2^-53 each. */
static const double float64_values = 1e-12;
/* Central differences with step h: truncation h^2 f''' / 6, rounding 2^-53 f / h; 1e-9 at h = 1e-5,
 * times the ratio of a loss of many terms to the gradient of one. */
static const double step = 1e-5, differences = 1e-6;
/* float32: sums of tens of products, 2^-24 each; bfloat16: about four roundings to 2^-9 on the way
 * in each direction. */
static const double float32_values = 1e-5, bfloat16_values = 1.6e-2;

enum { ROWS = 8, HEADS = 2, DIM = 6, WIDTH = HEADS * DIM, TAPS = 4, VOCABULARY = 7 };
static const int32_t offsets[] = {0, 3, 3, 8}; /* an empty sequence in the middle */
static const int32_t tokens[ROWS] = {3, 0, 3, 6, 5, 3, 1, 0};
static const int32_t targets[ROWS] = {1, -1, 6, 0, 0, 3, -1, 2};

/* Two sequences of four rows that start at position 5, or three packed ones. */
static attn_layout equal(void) {
  attn_layout layout = attn_layout_equal(2, ROWS / 2);
  layout.position = 5;
  return layout;
}
static attn_layout packed(void) {
  return attn_layout_packed(3, offsets);
}

/* operations --------------------------------------------------------------------------------------
 */

static attn_var *add(trial *t) {
  return attn_op_add(t->g, t->leaf[0], t->leaf[1]);
}
static attn_var *add_twice(trial *t) {
  return attn_op_add(t->g, t->leaf[0], t->leaf[0]);
}
static attn_var *scale(trial *t) {
  return attn_op_scale(t->g, t->leaf[0], -1.5);
}
static attn_var *cast(trial *t) {
  return attn_op_cast(t->g, t->leaf[0], t->g->wide);
}
static attn_var *add_bias(trial *t) {
  return attn_op_add_bias(t->g, t->leaf[0], t->leaf[1]);
}
static attn_var *add_bias_parameter(trial *t) {
  return attn_op_add_bias(t->g, t->leaf[0], attn_graph_parameter(t->g, &t->parameter[0]));
}

#define ACTIVATION(name, f)                                                                        \
  static attn_var *name##_op(trial *t) {                                                           \
    return attn_op_activate(t->g, f, t->leaf[0]);                                                  \
  }                                                                                                \
  static void name##_oracle(double *y, double *const input[]) {                                    \
    for (int i = 0; i < ROWS * WIDTH; ++i) y[i] = oracle_activation(#name)(input[0][i]);           \
  }
ACTIVATION(identity, ATTN_IDENTITY)
ACTIVATION(silu, ATTN_SILU)
ACTIVATION(sigmoid, ATTN_SIGMOID)
ACTIVATION(gelu, ATTN_GELU)
ACTIVATION(gelu_tanh, ATTN_GELU_TANH)
ACTIVATION(relu, ATTN_RELU)
ACTIVATION(elu, ATTN_ELU)
ACTIVATION(elu_plus_one, ATTN_ELU_PLUS_ONE)
ACTIVATION(softplus, ATTN_SOFTPLUS)
ACTIVATION(log_sigmoid, ATTN_LOG_SIGMOID)
ACTIVATION(exp, ATTN_EXP)

static attn_var *activate_wide(trial *t) {
  return attn_op_activate_wide(t->g, ATTN_LOG_SIGMOID, t->leaf[0]);
}
static attn_var *gate(trial *t) {
  return attn_op_gate(t->g, ATTN_SILU, t->leaf[0], t->leaf[1]);
}
static attn_var *gate_twice(trial *t) {
  return attn_op_gate(t->g, ATTN_GELU, t->leaf[0], t->leaf[0]);
}
/* Half and half of a fused projection. */
static attn_var *gate_halves(trial *t) {
  attn_var *a = attn_view_slice(t->g, t->leaf[0], 1, 0, WIDTH / 2);
  attn_var *b = attn_view_slice(t->g, t->leaf[0], 1, WIDTH / 2, WIDTH / 2);
  return attn_op_gate(t->g, ATTN_SIGMOID, a, b);
}
/* Each row gated by the one before: overlapping views. */
static attn_var *gate_shifted(trial *t) {
  attn_var *a = attn_view_slice(t->g, t->leaf[0], 0, 0, ROWS - 1);
  attn_var *b = attn_view_slice(t->g, t->leaf[0], 0, 1, ROWS - 1);
  return attn_op_gate(t->g, ATTN_SIGMOID, a, b);
}
/* A head group of a fused projection as [rows, heads, dim]: rows do not collapse to one stride. */
static attn_var *head_group(trial *t, int64_t first) {
  attn_var *part = attn_view_slice(t->g, t->leaf[0], 1, first, WIDTH);
  return attn_view_reshape(t->g, part, 3, (int64_t[]){ROWS, HEADS, DIM});
}
static attn_var *activate_view(trial *t) {
  return attn_op_activate(t->g, ATTN_SILU, head_group(t, 5));
}
static attn_var *gate_views(trial *t) {
  return attn_op_gate(t->g, ATTN_SILU, head_group(t, 0), head_group(t, WIDTH));
}
static attn_var *add_views(trial *t) {
  return attn_op_add(t->g, head_group(t, 3), head_group(t, WIDTH));
}
/* One channel of each row: an innermost stride. */
static attn_var *add_columns(trial *t) {
  attn_var *column = attn_view_slice(t->g, t->leaf[0], 1, 2, 1);
  column = attn_view_reshape(t->g, column, 1, (int64_t[]){ROWS});
  return attn_op_add(t->g, column, attn_op_activate(t->g, ATTN_SILU, column));
}

static attn_var *linear(trial *t) {
  return attn_op_linear(t->g, t->leaf[0], &t->parameter[0]);
}
static void linear_oracle(double *y, double *const input[]) {
  oracle_linear(y, input[0], input[TRIAL_LEAVES], ROWS, WIDTH, 5);
}
static attn_var *linear_wide(trial *t) {
  return attn_op_linear_wide(t->g, t->leaf[0], &t->parameter[0]);
}
static attn_var *linear_view(trial *t) {
  return attn_op_linear(t->g, head_group(t, 7), &t->parameter[0]);
}
static attn_var *linear_add(trial *t) {
  return attn_op_linear_add(t->g, t->leaf[0], t->leaf[1], &t->parameter[0]);
}
static attn_var *linear_add_itself(trial *t) {
  return attn_op_linear_add(t->g, t->leaf[0], t->leaf[0], &t->parameter[0]);
}
static attn_var *linear_twice(trial *t) { /* one weight, used by two layers */
  return attn_op_linear(t->g, attn_op_linear(t->g, t->leaf[0], &t->parameter[0]), &t->parameter[0]);
}

static double wanted(int64_t i) {
  return sin((double)i);
}
static attn_var *squared_error_of(trial *t, attn_var *x) {
  double numbers[ROWS * WIDTH];
  for (int64_t i = 0; i < ROWS * WIDTH; ++i) numbers[i] = wanted(i);
  attn_tensor all = attn_pass_numbers(t->g, t->g->wide, ROWS * WIDTH, numbers), target = all;
  if (!all.data || !x) return NULL;
  assert_ok(attn_tensor_reshape(&all, x->value.rank, x->value.shape, &target));
  return attn_op_squared_error(t->g, x, &target, 0.3);
}
static attn_var *squared_error(trial *t) {
  return squared_error_of(t, t->leaf[0]);
}
static attn_var *squared_error_of_view(trial *t) {
  return squared_error_of(t, attn_view_slice(t->g, t->leaf[0], 1, WIDTH, WIDTH));
}
static void squared_error_oracle(double *y, double *const input[]) {
  *y = 0;
  for (int64_t i = 0; i < ROWS * WIDTH; ++i) *y += 0.3 * pow(input[0][i] - wanted(i), 2);
}
static attn_var *cross_entropy(trial *t) {
  return attn_op_linear_cross_entropy(t->g, t->leaf[0], &t->parameter[0], 0, targets);
}
static void cross_entropy_oracle(double *y, double *const input[]) {
  double dx[ROWS * WIDTH], dw[VOCABULARY * WIDTH];
  *y =
      oracle_cross_entropy(input[0], input[TRIAL_LEAVES], targets, ROWS, WIDTH, VOCABULARY, dx, dw);
}

/* layers ------------------------------------------------------------------------------------------
 */

static attn_var *rms_norm(trial *t) {
  return attn_layer_rms_norm(t->g, t->leaf[0], attn_graph_parameter(t->g, &t->parameter[0]), 1e-3);
}
static void rms_norm_oracle(double *y, double *const input[]) {
  oracle_rms_norm(y, input[0], input[TRIAL_LEAVES], ROWS, WIDTH, WIDTH, 1e-3);
}
static attn_var *simple_rms_norm(trial *t) {
  return attn_layer_rms_norm(t->g, t->leaf[0], NULL, 1e-3);
}
static void simple_rms_norm_oracle(double *y, double *const input[]) {
  oracle_rms_norm(y, input[0], NULL, ROWS, WIDTH, WIDTH, 1e-3);
}
static attn_var *rms_norm_leaf(trial *t) { /* weights of the compute dtype */
  return attn_layer_rms_norm(t->g, t->leaf[0], t->leaf[1], 1e-3);
}
static attn_var *l2_norm(trial *t) {
  return attn_layer_l2_norm(t->g, t->leaf[0]);
}
static void l2_norm_oracle(double *y, double *const input[]) {
  oracle_rms_norm(y, input[0], NULL, ROWS, WIDTH, 1, 1e-6);
}
static attn_var *l2_norm_view(trial *t) {
  return attn_layer_l2_norm(t->g, head_group(t, 4));
}
static attn_var *layer_norm(trial *t) {
  return attn_layer_layer_norm(t->g, t->leaf[0], attn_graph_parameter(t->g, &t->parameter[0]),
                               attn_graph_parameter(t->g, &t->parameter[1]), 1e-3);
}
static void layer_norm_oracle(double *y, double *const input[]) {
  oracle_layer_norm(y, input[0], input[TRIAL_LEAVES], input[TRIAL_LEAVES + 1], ROWS, WIDTH, 1e-3);
}
static attn_var *plain_layer_norm(trial *t) {
  return attn_layer_layer_norm(t->g, t->leaf[0], NULL, NULL, 1e-3);
}
static void plain_layer_norm_oracle(double *y, double *const input[]) {
  oracle_layer_norm(y, input[0], NULL, NULL, ROWS, WIDTH, 1e-3);
}

static const double equal_positions[ROWS] = {5, 6, 7, 8, 5, 6, 7, 8};
static const double packed_positions[ROWS] = {0, 1, 2, 0, 1, 2, 3, 4};

static attn_var *rotary_equal(trial *t) {
  attn_layout layout = equal();
  return attn_layer_rotary(t->g, t->leaf[0], &layout, DIM - 2, &(attn_rope){.base = 100});
}
static void rotary_equal_oracle(double *y, double *const input[]) {
  oracle_rotary(y, input[0], equal_positions, ROWS, HEADS, DIM, DIM - 2, 100);
}
static attn_var *rotary_packed(trial *t) {
  attn_layout layout = packed();
  return attn_layer_rotary(t->g, t->leaf[0], &layout, DIM, &(attn_rope){.base = 1e4});
}
static void rotary_packed_oracle(double *y, double *const input[]) {
  oracle_rotary(y, input[0], packed_positions, ROWS, HEADS, DIM, DIM, 1e4);
}
static attn_var *rotary_view(trial *t) {
  attn_layout layout = packed();
  return attn_layer_rotary(t->g, head_group(t, 6), &layout, DIM, &(attn_rope){.base = 1e4});
}
static attn_var *lrpe_equal(trial *t) {
  attn_layout layout = equal();
  return attn_layer_lrpe(t->g, t->leaf[0], attn_graph_parameter(t->g, &t->parameter[0]), &layout);
}
static void lrpe_equal_oracle(double *y, double *const input[]) {
  oracle_lrpe(y, input[0], input[TRIAL_LEAVES], equal_positions, ROWS, HEADS, DIM);
}
static attn_var *lrpe_packed(trial *t) {
  attn_layout layout = packed();
  return attn_layer_lrpe(t->g, t->leaf[0], attn_graph_parameter(t->g, &t->parameter[0]), &layout);
}
static void lrpe_packed_oracle(double *y, double *const input[]) {
  oracle_lrpe(y, input[0], input[TRIAL_LEAVES], packed_positions, ROWS, HEADS, DIM);
}
static attn_var *lrpe_view(trial *t) {
  attn_layout layout = packed();
  return attn_layer_lrpe(t->g, head_group(t, 6), attn_graph_parameter(t->g, &t->parameter[0]),
                         &layout);
}

static attn_var *convolution_equal(trial *t) {
  attn_layout layout = attn_layout_equal(2, ROWS / 2);
  return attn_layer_short_convolution(t->g, t->leaf[0],
                                      attn_graph_parameter(t->g, &t->parameter[0]), &layout, NULL);
}
static void convolution_equal_oracle(double *y, double *const input[]) {
  static const double position[ROWS] = {0, 1, 2, 3, 0, 1, 2, 3};
  oracle_short_convolution(y, input[0], input[TRIAL_LEAVES], position, ROWS, WIDTH, TAPS);
}
static attn_var *convolution_packed(trial *t) {
  attn_layout layout = packed();
  return attn_layer_short_convolution(t->g, t->leaf[0],
                                      attn_graph_parameter(t->g, &t->parameter[0]), &layout, NULL);
}
static void convolution_packed_oracle(double *y, double *const input[]) {
  oracle_short_convolution(y, input[0], input[TRIAL_LEAVES], packed_positions, ROWS, WIDTH, TAPS);
}
static attn_var *convolution_view(trial *t) {
  attn_layout layout = packed();
  attn_var *x = attn_view_slice(t->g, t->leaf[0], 1, 3, WIDTH);
  return attn_layer_short_convolution(t->g, x, attn_graph_parameter(t->g, &t->parameter[0]),
                                      &layout, NULL);
}
/* The rows before the first are constants, so the gradient is of the taps and of x alone. */
static attn_var *convolution_tail(trial *t) {
  attn_layout layout = attn_layout_equal(1, ROWS);
  double before[(TAPS - 1) * WIDTH];
  for (int i = 0; i < (TAPS - 1) * WIDTH; ++i) before[i] = 0.125 * (i % 11) - 0.5;
  attn_tensor tail = test_from_doubles(before, t->g->compute, 2, (int64_t[]){TAPS - 1, WIDTH});
  attn_var *y = attn_layer_short_convolution(
      t->g, t->leaf[0], attn_graph_parameter(t->g, &t->parameter[0]), &layout, &tail);
  attn_tensor_destroy(&tail); /* backward does not need it */
  return y;
}

static attn_var *embedding(trial *t) {
  return attn_layer_embedding(t->g, &t->parameter[0], tokens, ROWS, 3);
}
static void embedding_oracle(double *y, double *const input[]) {
  for (int r = 0; r < ROWS; ++r)
    for (int i = 0; i < WIDTH; ++i)
      y[r * WIDTH + i] = 3 * input[TRIAL_LEAVES][tokens[r] * WIDTH + i];
}
/* The embedding is also the head. */
static attn_var *tied(trial *t) {
  attn_var *x = attn_layer_embedding(t->g, &t->parameter[0], tokens, ROWS, 1);
  x = attn_layer_rms_norm(t->g, x, attn_graph_parameter(t->g, &t->parameter[1]), 1e-5);
  return attn_op_linear_cross_entropy(t->g, x, &t->parameter[0], 0, targets);
}

static attn_var *swiglu(trial *t) {
  attn_parameter *w = t->parameter;
  return attn_layer_gated_feed_forward(t->g, ATTN_SILU, t->leaf[0], &w[0], &w[1], &w[2]);
}
static attn_var *sglu(trial *t) {
  attn_parameter *w = t->parameter;
  return attn_layer_gated_feed_forward(t->g, ATTN_IDENTITY, t->leaf[0], &w[0], &w[1], &w[2]);
}
static attn_var *mlp(trial *t) {
  attn_parameter *w = t->parameter;
  return attn_layer_mlp(t->g, ATTN_GELU, t->leaf[0], &w[0], &w[1], &w[2], &w[3]);
}
static attn_var *mlp_without_bias(trial *t) {
  attn_parameter *w = t->parameter;
  return attn_layer_mlp(t->g, ATTN_GELU, t->leaf[0], &w[0], NULL, &w[1], NULL);
}

/* A block as models have them: wide residual stream, rows of the compute dtype. */
static attn_var *block(attn_graph *g, void *context, attn_var *x) {
  trial *t = context;
  attn_var *inner = attn_layer_rms_norm(g, x, attn_graph_parameter(g, &t->parameter[0]), 1e-5);
  inner = attn_op_activate(g, ATTN_SILU, attn_op_linear(g, inner, &t->parameter[1]));
  return attn_op_linear_add(g, x, inner, &t->parameter[2]);
}
static attn_var *checkpoint(trial *t) {
  attn_var *x = attn_op_scale(t->g, t->leaf[0], 1);
  x = attn_graph_checkpoint(t->g, block, t, x);
  return attn_graph_checkpoint(t->g, block, t, x);
}
static attn_var *plain(trial *t) {
  attn_var *x = attn_op_scale(t->g, t->leaf[0], 1);
  return block(t->g, t, block(t->g, t, x));
}
/* The block's input is used outside of it too, before and after. */
static attn_var *checkpoint_shared(trial *t) {
  attn_var *y = attn_op_add(t->g, t->leaf[0], attn_op_scale(t->g, t->leaf[0], 3));
  attn_var *z = attn_graph_checkpoint(t->g, block, t, t->leaf[0]);
  return attn_op_add(t->g, attn_op_add(t->g, y, z), t->leaf[0]);
}
static attn_var *plain_shared(trial *t) {
  attn_var *y = attn_op_add(t->g, t->leaf[0], attn_op_scale(t->g, t->leaf[0], 3));
  attn_var *z = block(t->g, t, t->leaf[0]);
  return attn_op_add(t->g, attn_op_add(t->g, y, z), t->leaf[0]);
}
/* A block that looks at its input through views, and returns one. */
static attn_var *through_views(attn_graph *g, void *context, attn_var *x) {
  (void)context;
  attn_var *rows = attn_view_reshape(g, x, 2, (int64_t[]){ROWS, WIDTH});
  attn_var *y = attn_op_gate(g, ATTN_SILU, rows, attn_op_scale(g, rows, 2));
  return attn_view_reshape(g, y, 3, (int64_t[]){ROWS, HEADS, DIM});
}
static attn_var *checkpoint_view(trial *t) {
  return attn_graph_checkpoint(t->g, through_views, t, head_group(t, 2));
}

/* Views of a result: columns that overlap in part, that are seen twice and that nobody sees. */
static attn_var *views_of_result(trial *t) {
  attn_var *x = attn_op_scale(t->g, t->leaf[0], 0.5);
  attn_var *a = attn_view_slice(t->g, x, 1, 1, 8), *b = attn_view_slice(t->g, x, 1, 5, 8);
  attn_var *c = attn_view_slice(t->g, x, 1, 20, 8);
  attn_var *y = attn_op_gate(t->g, ATTN_SILU, a, b);
  return attn_op_add(t->g, y, attn_op_gate(t->g, ATTN_IDENTITY, c, c));
}
/* All of a result, reshaped, and parts of its rows. */
static attn_var *row_views_of_result(trial *t) {
  attn_var *x = attn_op_scale(t->g, t->leaf[0], 0.5);
  attn_var *all = attn_view_reshape(t->g, x, 3, (int64_t[]){ROWS, HEADS, -1});
  attn_var *halves[2];
  for (int i = 0; i < 2; ++i) halves[i] = attn_view_slice(t->g, x, 0, i * ROWS / 2, ROWS / 2);
  attn_var *y = attn_op_gate(t->g, ATTN_SILU, halves[0], halves[1]);
  all = attn_op_activate(t->g, ATTN_SILU, all);
  attn_var *top = attn_view_slice(t->g, all, 0, 2, ROWS / 2);
  return attn_op_add(t->g, attn_view_reshape(t->g, top, 2, (int64_t[]){ROWS / 2, -1}), y);
}

/* experts -----------------------------------------------------------------------------------------
 * Four experts of three weights that they share in part; leaf 1 has the logits. */

enum { EXPERTS = 4, EXPERT_WIDTH = 5 };
static const attn_routing by_softmax = {
    .experts = EXPERTS, .active = 2, .normalise = true, .scale = 1};
static const attn_routing plain_softmax = {.experts = EXPERTS, .active = 3, .scale = 1.5};
static const attn_routing by_groups = {
    .experts = EXPERTS, .active = 1, .groups = 2, .active_groups = 1, .scale = 2};
static const attn_routing by_sigmoid = {.experts = EXPERTS,
                                        .active = 2,
                                        .groups = 2,
                                        .active_groups = 1,
                                        .best_two = true,
                                        .sigmoid = true,
                                        .normalise = true,
                                        .scale = 2.5};
static const double correction[EXPERTS] = {0.25, -0.5, 0.125, 0};

static attn_var *experts_with(trial *t, const attn_routing *routing, attn_parameter *bias) {
  attn_parameter *p = t->parameter;
  attn_parameter *const all[3 * EXPERTS] = {&p[0], &p[1], &p[3], &p[1], &p[2], &p[3],
                                            &p[2], &p[0], &p[3], &p[0], &p[2], &p[3]};
  return attn_layer_experts(t->g, ATTN_SILU, routing, t->leaf[0], t->leaf[1], bias, all);
}
static void experts_oracle_of(double *y, double *const input[], const attn_routing *r,
                              const double *bias) {
  const double *const *p = (const double *const *)input + TRIAL_LEAVES;
  const double *const all[3 * EXPERTS] = {p[0], p[1], p[3], p[1], p[2], p[3],
                                          p[2], p[0], p[3], p[0], p[2], p[3]};
  const oracle_experts_options options = {(int)r->experts,       (int)r->active, (int)r->groups,
                                          (int)r->active_groups, r->sigmoid,     r->best_two,
                                          r->normalise,          r->scale};
  oracle_experts(y, input[0], input[1], bias, all, &options, ROWS, WIDTH, EXPERT_WIDTH);
}
#define EXPERTS_CASE(routing)                                                                      \
  static attn_var *experts_##routing(trial *t) {                                                   \
    return experts_with(t, &routing, NULL);                                                        \
  }                                                                                                \
  static void experts_##routing##_oracle(double *y, double *const input[]) {                       \
    experts_oracle_of(y, input, &routing, NULL);                                                   \
  }
EXPERTS_CASE(by_softmax)
EXPERTS_CASE(plain_softmax)
EXPERTS_CASE(by_groups)
static attn_var *experts_corrected(trial *t) {
  attn_parameter bias = {.name = "bias", .value = {.rank = 1}};
  int64_t count = EXPERTS;
  assert_ok(attn_tensor_wrap((void *)(uintptr_t)correction, ATTN_F64, 1, &count, &bias.value));
  return experts_with(t, &by_sigmoid, &bias);
}
static void experts_corrected_oracle(double *y, double *const input[]) {
  experts_oracle_of(y, input, &by_sigmoid, correction);
}
static attn_var *scale_rows(trial *t) {
  return attn_op_scale_rows(t->g, t->leaf[0], t->leaf[1]);
}
static void scale_rows_oracle(double *y, double *const input[]) {
  for (int i = 0; i < ROWS * WIDTH; ++i) y[i] = input[1][i / WIDTH] * input[0][i];
}
static attn_var *softmax_divided(trial *t) {
  return attn_op_row_softmax(t->g, t->leaf[0], true, 0);
}
static attn_var *softmax_with_floor(trial *t) {
  return attn_op_row_softmax(t->g, t->leaf[0], true, 0.06);
}
static attn_var *softmax_undivided(trial *t) {
  return attn_op_row_softmax(t->g, t->leaf[0], false, 0);
}
static attn_var *softmax_of_view(trial *t) {
  return attn_op_row_softmax(t->g, head_group(t, 5), true, 0.1);
}
static void row_softmax_oracle(double *y, const double *x, bool divide, double least) {
  for (int r = 0; r < ROWS; ++r, x += WIDTH, y += WIDTH) {
    double greatest = -INFINITY, sum = 0;
    for (int i = 0; i < WIDTH; ++i) greatest = fmax(greatest, x[i]);
    for (int i = 0; i < WIDTH; ++i) sum += exp(x[i] - greatest);
    for (int i = 0; i < WIDTH; ++i) y[i] = fmax(exp(x[i] - greatest) / (divide ? sum : 1), least);
  }
}
static void softmax_divided_oracle(double *y, double *const input[]) {
  row_softmax_oracle(y, input[0], true, 0);
}
static void softmax_with_floor_oracle(double *y, double *const input[]) {
  row_softmax_oracle(y, input[0], true, 0.06);
}
static void softmax_undivided_oracle(double *y, double *const input[]) {
  row_softmax_oracle(y, input[0], false, 0);
}
enum { MAPPED = 5, MANY_ROWS = 3 * ROWS };
static attn_var *linear_heads(trial *t) {
  return attn_layer_linear_heads(t->g, t->leaf[0], &t->parameter[0]);
}
static void linear_heads_oracle(double *y, double *const input[]) {
  for (int r = 0; r < MANY_ROWS; ++r)
    for (int i = 0; i < HEADS * MAPPED; ++i) {
      const double *w = input[TRIAL_LEAVES] + i * DIM;
      const double *x = input[0] + r * WIDTH + i / MAPPED * DIM;
      y[r * HEADS * MAPPED + i] = 0;
      for (int c = 0; c < DIM; ++c) y[r * HEADS * MAPPED + i] += w[c] * x[c];
    }
}
static attn_var *linear_heads_view(trial *t) { /* of a fused projection */
  return attn_layer_linear_heads(t->g, head_group(t, 5), &t->parameter[0]);
}
static attn_var *taylor(trial *t) {
  return attn_layer_taylor(t->g, t->leaf[0]);
}
static void taylor_oracle(double *y, double *const input[]) {
  for (int r = 0; r < ROWS * HEADS; ++r) {
    double x[DIM];
    for (int i = 0; i < DIM; ++i) x[i] = input[0][r * DIM + i] / pow(DIM, 0.25);
    *y++ = 1;
    for (int i = 0; i < DIM; ++i) *y++ = x[i];
    for (int i = 0; i < DIM; ++i) *y++ = x[i] * x[i] / sqrt(2);
    for (int i = 0; i < DIM; ++i)
      for (int j = i + 1; j < DIM; ++j) *y++ = x[i] * x[j];
  }
}
static attn_var *taylor_of_view(trial *t) {
  return attn_layer_taylor(t->g, head_group(t, 5));
}
static attn_var *head_scores(trial *t) {
  return attn_op_head_scores(t->g, t->leaf[0], t->leaf[1]);
}
static void head_scores_oracle(double *y, double *const input[]) {
  for (int i = 0; i < ROWS * HEADS; ++i) {
    y[i] = 0;
    for (int c = 0; c < DIM; ++c) y[i] += input[0][i * DIM + c] * input[1][i % HEADS * DIM + c];
  }
}
static attn_var *head_scores_view(trial *t) {
  return attn_op_head_scores(t->g, head_group(t, 5), t->leaf[1]);
}

/* Two sequences of more than two chunks, or three packed ones. */
enum { PREFIX_LENGTH = 2 * ATTN_PREFIX_CHUNK + 3, PREFIX_ROWS = 2 * PREFIX_LENGTH, PREFIX_DIM = 3 };
static const int32_t prefix_offsets[] = {0, 5, 5, PREFIX_ROWS};
static const int32_t prefix_halves[] = {0, PREFIX_LENGTH, PREFIX_ROWS};
static attn_var *prefix_equal(trial *t) {
  attn_layout layout = attn_layout_equal(2, PREFIX_LENGTH);
  return attn_op_prefix_softmax(t->g, &layout, t->leaf[0], t->leaf[1], NULL);
}
static attn_var *prefix_packed(trial *t) {
  attn_layout layout = attn_layout_packed(3, prefix_offsets);
  return attn_op_prefix_softmax(t->g, &layout, t->leaf[0], t->leaf[1], NULL);
}
static attn_var *prefix_of_view(trial *t) { /* of a fused projection */
  attn_layout layout = attn_layout_packed(3, offsets);
  return attn_op_prefix_softmax(t->g, &layout, t->leaf[1], head_group(t, 5), NULL);
}
static void prefix_oracle(double *y, double *const input[], const int32_t *ends) {
  for (int r = 0, first = 0; r < PREFIX_ROWS; ++r) {
    while (r >= ends[1]) first = *++ends;
    for (int h = 0; h < HEADS; ++h) {
      double total = 0, *to = y + (r * HEADS + h) * PREFIX_DIM;
      for (int c = 0; c < PREFIX_DIM; ++c) to[c] = 0;
      for (int j = first; j <= r; ++j) total += exp(input[0][j * HEADS + h]);
      for (int j = first; j <= r; ++j)
        for (int c = 0; c < PREFIX_DIM; ++c)
          to[c] +=
              exp(input[0][j * HEADS + h]) / total * input[1][(j * HEADS + h) * PREFIX_DIM + c];
    }
  }
}
static void prefix_equal_oracle(double *y, double *const input[]) {
  prefix_oracle(y, input, prefix_halves);
}
static void prefix_packed_oracle(double *y, double *const input[]) {
  prefix_oracle(y, input, prefix_offsets);
}

enum { COPIES = 3 };
static attn_var *repeat_heads(trial *t) {
  return attn_layer_repeat_heads(t->g, t->leaf[0], COPIES);
}
static void repeat_heads_oracle(double *y, double *const input[]) {
  for (int r = 0; r < ROWS; ++r)
    for (int h = 0; h < HEADS * COPIES; ++h)
      for (int c = 0; c < DIM; ++c) *y++ = input[0][(r * HEADS + h / COPIES) * DIM + c];
}
static attn_var *repeat_heads_of_view(trial *t) {
  return attn_layer_repeat_heads(t->g, head_group(t, 5), COPIES);
}
static attn_var *repeat_heads_once(trial *t) {
  return attn_op_scale(t->g, attn_layer_repeat_heads(t->g, head_group(t, 0), 1), -1.5);
}
static attn_var *scale_rows_of_view(trial *t) {
  attn_var *x = attn_view_slice(t->g, t->leaf[0], 1, 2, WIDTH);
  return attn_op_scale_rows(t->g, x, attn_view_slice(t->g, t->leaf[0], 1, 4, 1));
}

/* window.c ---------------------------------------------------------------------------------------
 */

enum { TAKEN = 8, SEEN = 3 };
static const int32_t taken[TAKEN] = {2, -1, 0, 2, 1, 2, -1, 1}; /* rows above 2 by nobody */
static attn_var *take_rows(trial *t) {
  return attn_op_take_rows(t->g, t->leaf[0], taken, TAKEN);
}
static attn_var *take_rows_of_view(trial *t) {
  return attn_op_take_rows(t->g, head_group(t, 5), taken, TAKEN);
}
static void take_rows_oracle(double *y, double *const input[]) {
  for (int r = 0; r < TAKEN; ++r)
    for (int c = 0; c < WIDTH; ++c) *y++ = taken[r] < 0 ? 0 : input[0][taken[r] * WIDTH + c];
}
/* Query r sees keys r - SEEN + 1 .. r; the last keys are seen by fewer queries. */
static attn_var *greatest_score(trial *t) {
  static int32_t first[ROWS], end[ROWS], from[ROWS], until[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    first[r] = r < SEEN ? 0 : r - SEEN + 1;
    end[r] = r + 1;
    from[r] = r;
    until[r] = r + SEEN < ROWS ? r + SEEN : ROWS;
  }
  const attn_window_ranges ranges = {first, end, from, until};
  return attn_op_greatest_score(t->g, &ranges, 0.7, t->leaf[0], t->leaf[1]);
}
static void greatest_score_oracle(double *y, double *const input[]) {
  for (int r = 0; r < ROWS; ++r)
    for (int h = 0; h < HEADS; ++h) {
      double greatest = -INFINITY;
      for (int j = r < SEEN ? 0 : r - SEEN + 1; j <= r; ++j) {
        double score = 0;
        for (int c = 0; c < DIM; ++c)
          score += 0.7 * input[0][(r * HEADS + h) * DIM + c] * input[1][j * DIM + c];
        greatest = fmax(greatest, score);
      }
      *y++ = greatest;
    }
}
enum { WEIGHED = DIM + 2 };
static attn_var *join_window(trial *t) { /* sums of weights above 0 */
  attn_var *linear = attn_op_activate(t->g, ATTN_SOFTPLUS, t->leaf[4]);
  return attn_op_join_window(t->g, t->leaf[0], t->leaf[1], t->leaf[2], t->leaf[3], linear);
}
static void join_window_oracle(double *y, double *const input[]) {
  for (int r = 0; r < ROWS; ++r)
    for (int h = 0; h < HEADS; ++h) {
      const double *linear = input[4] + (r * HEADS + h) * WEIGHED;
      double e = exp(input[3][h] + input[1][h * ROWS + r] - input[2][r * HEADS + h]);
      double d = log1p(exp(linear[DIM]));
      for (int c = 0; c < DIM; ++c)
        *y++ = (e * input[0][(r * HEADS + h) * DIM + c] + log1p(exp(linear[c]))) / (e + d);
    }
}
/* Sums that are not above 0 are of no tokens: the window's answer stays, whatever the factor. */
static attn_var *join_nothing(trial *t) {
  attn_var *linear = attn_op_scale(t->g, attn_op_activate(t->g, ATTN_SOFTPLUS, t->leaf[4]), -1);
  return attn_op_join_window(t->g, t->leaf[0], t->leaf[1], t->leaf[2], t->leaf[3], linear);
}
static void join_nothing_oracle(double *y, double *const input[]) {
  for (int i = 0; i < ROWS * WIDTH; ++i) *y++ = input[0][i];
}

/* engines -----------------------------------------------------------------------------------------
 */

enum { LENGTH = 5, TOTAL = 2 * LENGTH };
static const int32_t pieces[] = {0, 3, 3, TOTAL};

static attn_var *recurrent_with(trial *t, attn_recurrent_problem problem) {
  attn_recurrent_args args = {0};
  attn_var *decay = NULL, *beta = NULL;
  if (problem.decay) /* g <= 0 */
    decay = attn_op_scale(t->g, attn_op_activate_wide(t->g, ATTN_SOFTPLUS, t->leaf[3]), -1);
  if (problem.update == ATTN_UPDATE_DELTA)
    beta = attn_op_activate_wide(t->g, ATTN_SIGMOID, t->leaf[4]);
  problem.passes = 0; /* set by the operation, as are shapes and dtype */
  problem.scale = 0.5;
  if (problem.ragged) {
    problem.batch = 3;
    problem.length = TOTAL - 3;
    args.offsets = pieces;
  }
  return attn_op_recurrent(t->g, &problem, &args, t->leaf[0], t->leaf[1], t->leaf[2], decay, beta);
}
#define RECURRENT(name, ...)                                                                       \
  static attn_var *name(trial *t) {                                                                \
    attn_recurrent_problem problem = ATTN_RECURRENT_PROBLEM_INIT, set = {__VA_ARGS__};             \
    problem.decay = set.decay;                                                                     \
    problem.update = set.update;                                                                   \
    problem.ragged = set.ragged;                                                                   \
    return recurrent_with(t, problem);                                                             \
  }
RECURRENT(recurrent_plain, .decay = ATTN_DECAY_NONE)
RECURRENT(recurrent_token, .decay = ATTN_DECAY_TOKEN)
RECURRENT(recurrent_channel, .decay = ATTN_DECAY_CHANNEL)
RECURRENT(recurrent_delta, .decay = ATTN_DECAY_TOKEN, .update = ATTN_UPDATE_DELTA)
RECURRENT(recurrent_ragged, .decay = ATTN_DECAY_CHANNEL, .ragged = true)
static attn_var *recurrent_itself(trial *t) { /* q, k and v are one variable */
  attn_recurrent_problem problem = ATTN_RECURRENT_PROBLEM_INIT;
  return attn_op_recurrent(t->g, &problem, &(attn_recurrent_args){0}, t->leaf[0], t->leaf[0],
                           t->leaf[0], NULL, NULL);
}

static attn_var *fused_part(trial *t, int which) {
  attn_var *part = attn_view_slice(t->g, t->leaf[0], 1, which * WIDTH, WIDTH);
  return attn_view_reshape(t->g, part, 4, (int64_t[]){2, LENGTH, HEADS, DIM});
}
static attn_var *recurrent_views(trial *t) { /* of one fused projection */
  attn_recurrent_problem problem = ATTN_RECURRENT_PROBLEM_INIT;
  return attn_op_recurrent(t->g, &problem, &(attn_recurrent_args){0}, fused_part(t, 0),
                           fused_part(t, 1), fused_part(t, 2), NULL, NULL);
}

static attn_var *softmax_causal(trial *t) {
  attn_softmax_problem problem = ATTN_SOFTMAX_PROBLEM_INIT;
  problem.causal = true;
  return attn_op_softmax(t->g, &problem, &(attn_softmax_args){0}, t->leaf[0], t->leaf[1],
                         t->leaf[2]);
}
static attn_var *softmax_cross(trial *t) {
  attn_softmax_problem problem = ATTN_SOFTMAX_PROBLEM_INIT;
  return attn_op_softmax(t->g, &problem, &(attn_softmax_args){0}, t->leaf[0], t->leaf[1],
                         t->leaf[2]);
}
static attn_var *softmax_ragged(trial *t) {
  attn_softmax_problem problem = ATTN_SOFTMAX_PROBLEM_INIT;
  problem.causal = problem.ragged = true;
  problem.batch = 3;
  problem.query_length = problem.key_length = TOTAL - 3;
  attn_softmax_args args = {.query_offsets = pieces, .key_offsets = pieces};
  return attn_op_softmax(t->g, &problem, &args, t->leaf[0], t->leaf[1], t->leaf[2]);
}
static attn_var *softmax_itself(trial *t) {
  attn_softmax_problem problem = ATTN_SOFTMAX_PROBLEM_INIT;
  return attn_op_softmax(t->g, &problem, &(attn_softmax_args){0}, t->leaf[0], t->leaf[0],
                         t->leaf[0]);
}
static attn_var *softmax_views(trial *t) {
  attn_softmax_problem problem = ATTN_SOFTMAX_PROBLEM_INIT;
  problem.causal = true;
  return attn_op_softmax(t->g, &problem, &(attn_softmax_args){0}, fused_part(t, 0),
                         fused_part(t, 1), fused_part(t, 2));
}

#define SEQUENCE                                                                                   \
  { 2, LENGTH, HEADS, DIM }
#define PACKED                                                                                     \
  { TOTAL, HEADS, DIM }
#define X                                                                                          \
  {                                                                                                \
    { ROWS, WIDTH }                                                                                \
  }
#define XX                                                                                         \
  {                                                                                                \
    {ROWS, WIDTH}, {                                                                               \
      ROWS, WIDTH                                                                                  \
    }                                                                                              \
  }
#define QKV                                                                                        \
  {                                                                                                \
    { ROWS, 3 * WIDTH }                                                                            \
  }
#define H                                                                                          \
  {                                                                                                \
    { ROWS, HEADS, DIM }                                                                           \
  }
#define UNARY(function)                                                                            \
  { .name = #function, .build = function##_op, .leaf = X, .oracle = function##_oracle }

#define EXPERT_PARAMETERS                                                                          \
  {                                                                                                \
    {EXPERT_WIDTH, WIDTH}, {EXPERT_WIDTH, WIDTH}, {EXPERT_WIDTH, WIDTH}, {                         \
      WIDTH, EXPERT_WIDTH                                                                          \
    }                                                                                              \
  }

static const operation_case cases[] = {
    {.name = "add", .build = add, .leaf = {{ROWS, WIDTH}, {ROWS, WIDTH}}, .wide = 1},
    {.name = "add to itself", .build = add_twice, .leaf = X},
    {.name = "add views", .build = add_views, .leaf = QKV},
    {.name = "add columns", .build = add_columns, .leaf = X},
    {.name = "scale", .build = scale, .leaf = X},
    {.name = "cast", .build = cast, .leaf = X},
    {.name = "add_bias", .build = add_bias, .leaf = {{2, 4, WIDTH}, {WIDTH}}},
    {.name = "add_bias of a parameter",
     .build = add_bias_parameter,
     .leaf = X,
     .parameter = {{WIDTH}}},
    UNARY(identity),
    UNARY(silu),
    UNARY(sigmoid),
    UNARY(gelu),
    UNARY(gelu_tanh),
    UNARY(relu),
    UNARY(elu),
    UNARY(elu_plus_one),
    UNARY(softplus),
    UNARY(log_sigmoid),
    UNARY(exp),
    {.name = "softmax of rows",
     .build = softmax_divided,
     .leaf = X,
     .oracle = softmax_divided_oracle},
    {.name = "softmax of rows, with a floor",
     .build = softmax_with_floor,
     .leaf = X,
     .oracle = softmax_with_floor_oracle},
    {.name = "softmax of rows, undivided",
     .build = softmax_undivided,
     .leaf = X,
     .oracle = softmax_undivided_oracle},
    {.name = "softmax of a view's rows", .build = softmax_of_view, .leaf = QKV},
    {.name = "linear_heads",
     .build = linear_heads,
     .leaf = {{MANY_ROWS, HEADS, DIM}},
     .parameter = {{HEADS * MAPPED, DIM}},
     .oracle = linear_heads_oracle},
    {.name = "linear_heads of a view",
     .build = linear_heads_view,
     .leaf = QKV,
     .parameter = {{HEADS * MAPPED, DIM}}},
    {.name = "taylor", .build = taylor, .leaf = H, .oracle = taylor_oracle},
    {.name = "taylor of a view", .build = taylor_of_view, .leaf = QKV},
    {.name = "head_scores",
     .build = head_scores,
     .leaf = {{ROWS, HEADS, DIM}, {1, HEADS, DIM}},
     .wide = 2,
     .oracle = head_scores_oracle},
    {.name = "head_scores of a view",
     .build = head_scores_view,
     .leaf = {{ROWS, 3 * WIDTH}, {1, HEADS, DIM}}},
    {.name = "take_rows",
     .build = take_rows,
     .leaf = {{ROWS, HEADS, DIM}},
     .oracle = take_rows_oracle},
    {.name = "take_rows of a view", .build = take_rows_of_view, .leaf = {{ROWS, 3 * WIDTH}}},
    {.name = "greatest_score",
     .build = greatest_score,
     .leaf = {{ROWS, HEADS, DIM}, {ROWS, 1, DIM}},
     .oracle = greatest_score_oracle},
    {.name = "join_window",
     .build = join_window,
     .leaf = {{ROWS, HEADS, DIM}, {HEADS, ROWS}, {ROWS, HEADS}, {HEADS}, {ROWS, HEADS, WEIGHED}},
     .wide = 14,
     .oracle = join_window_oracle},
    {.name = "join_window with nothing",
     .build = join_nothing,
     .leaf = {{ROWS, HEADS, DIM}, {HEADS, ROWS}, {ROWS, HEADS}, {HEADS}, {ROWS, HEADS, WEIGHED}},
     .wide = 14,
     .oracle = join_nothing_oracle},
    {.name = "prefix_softmax",
     .build = prefix_equal,
     .leaf = {{PREFIX_ROWS, HEADS}, {PREFIX_ROWS, HEADS, PREFIX_DIM}},
     .wide = 1,
     .oracle = prefix_equal_oracle},
    {.name = "prefix_softmax, packed",
     .build = prefix_packed,
     .leaf = {{PREFIX_ROWS, HEADS}, {PREFIX_ROWS, HEADS, PREFIX_DIM}},
     .wide = 1,
     .oracle = prefix_packed_oracle},
    {.name = "prefix_softmax of a view",
     .build = prefix_of_view,
     .leaf = {{ROWS, 3 * WIDTH}, {ROWS, HEADS}},
     .wide = 2},
    {.name = "repeat_heads",
     .build = repeat_heads,
     .leaf = {{ROWS, HEADS, DIM}},
     .oracle = repeat_heads_oracle},
    {.name = "repeat_heads of a view", .build = repeat_heads_of_view, .leaf = QKV},
    {.name = "repeat_heads, once", .build = repeat_heads_once, .leaf = QKV},
    {.name = "activate_wide", .build = activate_wide, .leaf = X},
    {.name = "views of a result", .build = views_of_result, .leaf = QKV},
    {.name = "views of rows of a result", .build = row_views_of_result, .leaf = QKV},
    {.name = "activate a view", .build = activate_view, .leaf = QKV},
    {.name = "gate", .build = gate, .leaf = XX},
    {.name = "gate, mixed dtypes", .build = gate, .leaf = XX, .wide = 2},
    {.name = "gate with itself", .build = gate_twice, .leaf = X},
    {.name = "gate of halves", .build = gate_halves, .leaf = X},
    {.name = "gate of shifted rows", .build = gate_shifted, .leaf = X},
    {.name = "gate of views", .build = gate_views, .leaf = QKV},
    {.name = "linear",
     .build = linear,
     .leaf = X,
     .parameter = {{5, WIDTH}},
     .oracle = linear_oracle},
    {.name = "linear, many rows",
     .build = linear,
     .leaf = {{2, 3, 4, WIDTH}},
     .parameter = {{5, WIDTH}}},
    {.name = "linear from wide rows",
     .build = linear,
     .leaf = X,
     .parameter = {{5, WIDTH}},
     .wide = 1},
    {.name = "linear_wide",
     .build = linear_wide,
     .leaf = X,
     .parameter = {{5, WIDTH}},
     .oracle = linear_oracle},
    {.name = "linear of a view", .build = linear_view, .leaf = QKV, .parameter = {{5, DIM}}},
    {.name = "linear_add",
     .build = linear_add,
     .leaf = {{ROWS, 5}, {ROWS, WIDTH}},
     .parameter = {{5, WIDTH}},
     .wide = 1},
    {.name = "linear_add to itself",
     .build = linear_add_itself,
     .leaf = X,
     .parameter = {{WIDTH, WIDTH}},
     .wide = 1},
    {.name = "linear twice", .build = linear_twice, .leaf = X, .parameter = {{WIDTH, WIDTH}}},
    {.name = "squared_error", .build = squared_error, .leaf = X, .oracle = squared_error_oracle},
    {.name = "squared_error of a view", .build = squared_error_of_view, .leaf = QKV},
    {.name = "cross_entropy",
     .build = cross_entropy,
     .leaf = X,
     .parameter = {{VOCABULARY, WIDTH}},
     .oracle = cross_entropy_oracle},
    {.name = "rms_norm",
     .build = rms_norm,
     .leaf = X,
     .parameter = {{WIDTH}},
     .wide = 1,
     .oracle = rms_norm_oracle},
    {.name = "simple rms_norm",
     .build = simple_rms_norm,
     .leaf = X,
     .oracle = simple_rms_norm_oracle},
    {.name = "rms_norm, weight a leaf", .build = rms_norm_leaf, .leaf = {{ROWS, WIDTH}, {WIDTH}}},
    {.name = "l2_norm", .build = l2_norm, .leaf = X, .oracle = l2_norm_oracle},
    {.name = "l2_norm of a view", .build = l2_norm_view, .leaf = QKV},
    {.name = "layer_norm",
     .build = layer_norm,
     .leaf = X,
     .parameter = {{WIDTH}, {WIDTH}},
     .oracle = layer_norm_oracle},
    {.name = "plain layer_norm",
     .build = plain_layer_norm,
     .leaf = X,
     .oracle = plain_layer_norm_oracle},
    {.name = "rotary", .build = rotary_equal, .leaf = H, .oracle = rotary_equal_oracle},
    {.name = "rotary, packed", .build = rotary_packed, .leaf = H, .oracle = rotary_packed_oracle},
    {.name = "rotary of a view", .build = rotary_view, .leaf = QKV},
    {.name = "lrpe",
     .build = lrpe_equal,
     .leaf = H,
     .parameter = {{HEADS, DIM}},
     .oracle = lrpe_equal_oracle},
    {.name = "lrpe, packed",
     .build = lrpe_packed,
     .leaf = H,
     .parameter = {{HEADS, DIM}},
     .oracle = lrpe_packed_oracle},
    {.name = "lrpe of a view", .build = lrpe_view, .leaf = QKV, .parameter = {{HEADS, DIM}}},
    {.name = "convolution",
     .build = convolution_equal,
     .leaf = X,
     .parameter = {{WIDTH, TAPS}},
     .oracle = convolution_equal_oracle},
    {.name = "convolution, packed",
     .build = convolution_packed,
     .leaf = X,
     .parameter = {{WIDTH, TAPS}},
     .oracle = convolution_packed_oracle},
    {.name = "convolution of a view",
     .build = convolution_view,
     .leaf = QKV,
     .parameter = {{WIDTH, TAPS}}},
    {.name = "convolution after a tail",
     .build = convolution_tail,
     .leaf = X,
     .parameter = {{WIDTH, TAPS}}},
    {.name = "embedding",
     .build = embedding,
     .parameter = {{VOCABULARY, WIDTH}},
     .oracle = embedding_oracle},
    {.name = "tied embedding and head", .build = tied, .parameter = {{VOCABULARY, WIDTH}, {WIDTH}}},
    {.name = "swiglu",
     .build = swiglu,
     .leaf = X,
     .parameter = {{5, WIDTH}, {5, WIDTH}, {WIDTH, 5}}},
    {.name = "sglu", .build = sglu, .leaf = X, .parameter = {{5, WIDTH}, {5, WIDTH}, {WIDTH, 5}}},
    {.name = "mlp", .build = mlp, .leaf = X, .parameter = {{5, WIDTH}, {5}, {WIDTH, 5}, {WIDTH}}},
    {.name = "mlp without biases",
     .build = mlp_without_bias,
     .leaf = X,
     .parameter = {{5, WIDTH}, {WIDTH, 5}}},
    {.name = "experts",
     .build = experts_by_softmax,
     .leaf = {{ROWS, WIDTH}, {ROWS, EXPERTS}},
     .parameter = EXPERT_PARAMETERS,
     .wide = 2,
     .oracle = experts_by_softmax_oracle},
    {.name = "experts, weights as they are",
     .build = experts_plain_softmax,
     .leaf = {{ROWS, WIDTH}, {ROWS, EXPERTS}},
     .parameter = EXPERT_PARAMETERS,
     .wide = 2,
     .oracle = experts_plain_softmax_oracle},
    {.name = "experts in groups",
     .build = experts_by_groups,
     .leaf = {{ROWS, WIDTH}, {ROWS, EXPERTS}},
     .parameter = EXPERT_PARAMETERS,
     .wide = 2,
     .oracle = experts_by_groups_oracle},
    {.name = "experts by sigmoid, corrected",
     .build = experts_corrected,
     .leaf = {{ROWS, WIDTH}, {ROWS, EXPERTS}},
     .parameter = EXPERT_PARAMETERS,
     .wide = 2,
     .oracle = experts_corrected_oracle},
    {.name = "scale_rows",
     .build = scale_rows,
     .leaf = {{ROWS, WIDTH}, {ROWS, 1}},
     .wide = 2,
     .oracle = scale_rows_oracle},
    {.name = "scale_rows of views", .build = scale_rows_of_view, .leaf = QKV},
    {.name = "checkpoint",
     .build = checkpoint,
     .leaf = X,
     .parameter = {{WIDTH}, {5, WIDTH}, {WIDTH, 5}},
     .wide = 1},
    {.name = "checkpoint of a view", .build = checkpoint_view, .leaf = QKV},
    {.name = "recurrent", .build = recurrent_plain, .leaf = {SEQUENCE, SEQUENCE, SEQUENCE}},
    {.name = "recurrent, grouped heads",
     .build = recurrent_plain,
     .leaf = {SEQUENCE, SEQUENCE, {2, LENGTH, 2 * HEADS, 3}}},
    {.name = "recurrent, decay by token",
     .build = recurrent_token,
     .leaf = {SEQUENCE, SEQUENCE, SEQUENCE, {2, LENGTH, HEADS}},
     .wide = 8},
    {.name = "recurrent, decay by channel",
     .build = recurrent_channel,
     .leaf = {SEQUENCE, SEQUENCE, SEQUENCE, SEQUENCE},
     .wide = 8},
    {.name = "recurrent, delta rule",
     .build = recurrent_delta,
     .leaf = {SEQUENCE, SEQUENCE, SEQUENCE, {2, LENGTH, HEADS}, {2, LENGTH, HEADS}},
     .wide = 24},
    {.name = "recurrent, packed",
     .build = recurrent_ragged,
     .leaf = {PACKED, PACKED, PACKED, PACKED},
     .wide = 8},
    {.name = "recurrent of one variable", .build = recurrent_itself, .leaf = {SEQUENCE}},
    {.name = "recurrent of views", .build = recurrent_views, .leaf = {{TOTAL, 3 * WIDTH}}},
    {.name = "softmax, causal", .build = softmax_causal, .leaf = {SEQUENCE, SEQUENCE, SEQUENCE}},
    {.name = "softmax, cross",
     .build = softmax_cross,
     .leaf = {SEQUENCE, {2, LENGTH + 3, 1, DIM}, {2, LENGTH + 3, 1, 3}}},
    {.name = "softmax, packed", .build = softmax_ragged, .leaf = {PACKED, PACKED, PACKED}},
    {.name = "softmax of one variable", .build = softmax_itself, .leaf = {SEQUENCE}},
    {.name = "softmax of views", .build = softmax_views, .leaf = {{TOTAL, 3 * WIDTH}}},
};
enum { CASES = sizeof cases / sizeof *cases };

static void close_to_oracles(void **state) {
  (void)state;
  for (int i = 0; i < CASES; ++i) {
    if (!cases[i].oracle) continue;
    trial_inputs inputs = trial_inputs_create(&cases[i], 11);
    trial_outcome got = trial_run(&cases[i], &inputs, ATTN_F64, false);
    double *expected = malloc((size_t)got.count * sizeof *expected);
    cases[i].oracle(expected, inputs.values);
    double error = test_relative_error(got.value, expected, got.count);
    if (!(error < float64_values)) fail_msg("%s: relative error %g", cases[i].name, error);
    free(expected);
    trial_outcome_destroy(&got);
    trial_inputs_destroy(&inputs);
  }
}

/* Of experts that score the same the first are chosen. */
static void equal_scores(void **state) {
  (void)state;
  for (int i = 0; i < CASES; ++i) {
    if (strncmp(cases[i].name, "experts", strlen("experts")) != 0) continue;
    trial_inputs inputs = trial_inputs_create(&cases[i], 11);
    memset(inputs.values[1], 0, (size_t)inputs.count[1] * sizeof(double));
    trial_outcome got = trial_run(&cases[i], &inputs, ATTN_F64, false);
    double *expected = malloc((size_t)got.count * sizeof *expected);
    cases[i].oracle(expected, inputs.values);
    double error = test_relative_error(got.value, expected, got.count);
    if (!(error < float64_values)) fail_msg("%s: relative error %g", cases[i].name, error);
    free(expected);
    trial_outcome_destroy(&got);
    trial_inputs_destroy(&inputs);
  }
}

static double loss_at(const operation_case *c, const trial_inputs *inputs, double *place,
                      double value) {
  double before = *place;
  *place = value;
  trial_outcome outcome = trial_run(c, inputs, ATTN_F64, false);
  double loss = outcome.loss;
  trial_outcome_destroy(&outcome);
  *place = before;
  return loss;
}

static void gradients_equal_differences(void **state) {
  (void)state;
  for (int i = 0; i < CASES; ++i) {
    trial_inputs inputs = trial_inputs_create(&cases[i], 21);
    trial_outcome got = trial_run(&cases[i], &inputs, ATTN_F64, true);
    for (int j = 0; j < TRIAL_INPUTS; ++j) {
      if (!inputs.values[j]) continue;
      double *expected = malloc((size_t)inputs.count[j] * sizeof *expected);
      for (int64_t k = 0; k < inputs.count[j]; ++k) {
        double *x = &inputs.values[j][k];
        expected[k] = (loss_at(&cases[i], &inputs, x, *x + step) -
                       loss_at(&cases[i], &inputs, x, *x - step)) /
                      (2 * step);
      }
      double error = test_relative_error(got.gradient[j], expected, inputs.count[j]);
      if (!(error < differences))
        fail_msg("%s: the gradient of input %d differs by %g", cases[i].name, j, error);
      free(expected);
    }
    trial_outcome_destroy(&got);
    trial_inputs_destroy(&inputs);
  }
}

static void compare(const char *name, const char *what, int input, const double *got,
                    const double *expected, int64_t count, double tolerance) {
  double error = test_relative_error(got, expected, count);
  if (!(error < tolerance)) fail_msg("%s: %s %d differs by %g", name, what, input, error);
}

static void dtypes_agree_on_path(void *context) {
  (void)context;
  static const attn_dtype dtypes[3] = {ATTN_F64, ATTN_F32, ATTN_BF16};
  const double tolerance[3] = {float64_values, float32_values, bfloat16_values};
  for (int i = 0; i < CASES; ++i) {
    trial_inputs inputs = trial_inputs_create(&cases[i], 31);
    attn_kernel_path path = attn_get_kernel_path();
    assert_ok(attn_set_kernel_path(ATTN_PATH_GENERIC));
    trial_outcome wide = trial_run(&cases[i], &inputs, ATTN_F64, true);
    assert_ok(attn_set_kernel_path(path));
    for (int d = 0; d < 3; ++d) {
      trial_outcome got = trial_run(&cases[i], &inputs, dtypes[d], true);
      compare(cases[i].name, "the value in dtype", d, got.value, wide.value, got.count,
              tolerance[d]);
      for (int j = 0; j < TRIAL_INPUTS; ++j)
        if (inputs.values[j])
          compare(cases[i].name, d == 2 ? "in bfloat16, the gradient of" : "the gradient of", j,
                  got.gradient[j], wide.gradient[j], inputs.count[j], tolerance[d]);
      trial_outcome_destroy(&got);
    }
    trial_outcome_destroy(&wide);
    trial_inputs_destroy(&inputs);
  }
}

static void dtypes_agree(void **state) {
  (void)state;
  test_on_every_path(dtypes_agree_on_path, NULL);
}

static void same_bits(const operation_case *a, const operation_case *b, attn_dtype compute) {
  trial_inputs inputs = trial_inputs_create(a, 41);
  trial_outcome x = trial_run(a, &inputs, compute, true), y = trial_run(b, &inputs, compute, true);
  assert_memory_equal(x.value, y.value, (size_t)x.count * sizeof(double));
  for (int j = 0; j < TRIAL_INPUTS; ++j)
    if (inputs.values[j])
      assert_memory_equal(x.gradient[j], y.gradient[j], (size_t)inputs.count[j] * sizeof(double));
  trial_outcome_destroy(&x);
  trial_outcome_destroy(&y);
  trial_inputs_destroy(&inputs);
}

static void checkpoints_change_no_bit(void **state) {
  (void)state;
  static const operation_case pairs[2][2] = {{{.name = "checkpoint",
                                               .build = checkpoint,
                                               .leaf = {{40, WIDTH}},
                                               .parameter = {{WIDTH}, {5, WIDTH}, {WIDTH, 5}},
                                               .wide = 1},
                                              {.name = "plain",
                                               .build = plain,
                                               .leaf = {{40, WIDTH}},
                                               .parameter = {{WIDTH}, {5, WIDTH}, {WIDTH, 5}},
                                               .wide = 1}},
                                             {{.name = "shared",
                                               .build = checkpoint_shared,
                                               .leaf = {{40, WIDTH}},
                                               .parameter = {{WIDTH}, {5, WIDTH}, {WIDTH, 5}},
                                               .wide = 1},
                                              {.name = "plain",
                                               .build = plain_shared,
                                               .leaf = {{40, WIDTH}},
                                               .parameter = {{WIDTH}, {5, WIDTH}, {WIDTH, 5}},
                                               .wide = 1}}};
  for (int i = 0; i < 2; ++i)
    for (int dtype = ATTN_F64; dtype <= ATTN_BF16; ++dtype)
      same_bits(&pairs[i][0], &pairs[i][1], (attn_dtype)dtype);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(close_to_oracles), cmocka_unit_test(gradients_equal_differences),
      cmocka_unit_test(dtypes_agree), cmocka_unit_test(checkpoints_change_no_bit),
      cmocka_unit_test(equal_scores)};
  return cmocka_run_group_tests(tests, NULL, trial_teardown);
}
