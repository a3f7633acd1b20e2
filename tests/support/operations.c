#include "support/operations.h"

#include "engines/dense/dense.h"
#include "support/test.h"

#include <string.h>

static int rank_of(const int64_t *shape) {
  int rank = 0;
  while (shape[rank]) ++rank;
  return rank;
}

static int64_t count_of(const int64_t *shape) {
  int64_t count = 1;
  for (int i = 0; shape[i]; ++i) count *= shape[i];
  return rank_of(shape) ? count : 0;
}

static const int64_t *shape_of(const operation_case *c, int input) {
  return input < TRIAL_LEAVES ? c->leaf[input] : c->parameter[input - TRIAL_LEAVES];
}

static void fill_bfloat16(double *x, int64_t count, uint64_t seed) {
  test_fill_normal(x, count, 0, 1, seed);
  for (int64_t i = 0; i < count; ++i)
    x[i] = (double)attn_bf16_to_f32(attn_f32_to_bf16((float)x[i]));
}

trial_inputs trial_inputs_create(const operation_case *c, uint64_t seed) {
  trial_inputs inputs = {0};
  for (int i = 0; i < TRIAL_INPUTS; ++i) {
    int64_t count = count_of(shape_of(c, i));
    if (!count) continue;
    inputs.count[i] = count;
    inputs.values[i] = malloc((size_t)count * sizeof(double));
    fill_bfloat16(inputs.values[i], count, seed + (uint64_t)i);
  }
  return inputs;
}

void trial_inputs_destroy(trial_inputs *inputs) {
  for (int i = 0; i < TRIAL_INPUTS; ++i) free(inputs->values[i]);
}

attn_parameter trial_parameter_create(const char *name, const double *values, int rank,
                                      const int64_t *shape, attn_dtype dtype, attn_dtype compute,
                                      bool trains) {
  attn_parameter p = {.name = (char *)(uintptr_t)name};
  p.value = test_from_doubles(values, dtype, rank, shape);
  if (trains) assert_ok(attn_tensor_create_on(test_device(), dtype, rank, shape, &p.gradient));
  if (rank == 2) {
    assert_ok(attn_weight_create(shape[0], shape[1], compute, &p.weight));
    assert_ok(attn_weight_set(p.weight, &p.value));
  }
  return p;
}

void trial_parameter_destroy(attn_parameter *parameter) {
  attn_weight_destroy(parameter->weight);
  attn_tensor_destroy(&parameter->value);
  attn_tensor_destroy(&parameter->gradient);
}

/* sum_i u_i y_i with fixed u */
static attn_var *functional(attn_graph *g, attn_var *y, attn_parameter *u) {
  int64_t row[2] = {1, attn_tensor_count(&y->value)};
  double *weights = malloc((size_t)row[1] * sizeof *weights);
  fill_bfloat16(weights, row[1], 99);
  *u = trial_parameter_create("functional", weights, 2, row, g->wide, g->compute, false);
  free(weights);
  return attn_op_linear_wide(g, attn_view_reshape(g, y, 2, row), u);
}

/* One graph a dtype for all runs of a program: a fresh arena costs more than a small operation. */
static attn_graph *graphs[ATTN_BF16 + 1];

int trial_teardown(void **state) {
  (void)state;
  for (int i = 0; i <= ATTN_BF16; ++i) attn_graph_destroy(graphs[i]);
  memset(graphs, 0, sizeof graphs);
  return 0;
}

trial_outcome trial_run(const operation_case *c, const trial_inputs *inputs, attn_dtype compute,
                        bool recording) {
  trial t = {0};
  trial_outcome outcome = {0};
  attn_tensor leaves[TRIAL_LEAVES] = {{0}};
  if (!graphs[compute]) assert_ok(attn_graph_create_on(test_device(), compute, &graphs[compute]));
  t.g = graphs[compute];
  attn_graph_reset(t.g, recording);
  for (int i = 0; i < TRIAL_INPUTS; ++i) {
    if (!inputs->values[i]) continue;
    const int64_t *shape = shape_of(c, i);
    int rank = rank_of(shape), p = i - TRIAL_LEAVES;
    if (i >= TRIAL_LEAVES) {
      t.parameter[p] =
          trial_parameter_create(c->name, inputs->values[i], rank, shape, t.g->wide, compute, true);
      continue;
    }
    attn_dtype dtype = c->wide >> i & 1 ? t.g->wide : compute;
    leaves[i] = test_from_doubles(inputs->values[i], dtype, rank, shape);
    t.leaf[i] = attn_graph_leaf(t.g, &leaves[i]);
  }
  attn_var *y = c->build(&t);
  if (!y) fail_msg("%s: %s", c->name, attn_error_message());
  attn_parameter u = {0};
  attn_var *loss = functional(t.g, y, &u);
  assert_ok(attn_graph_status(t.g));
  outcome.loss = attn_tensor_get(&loss->value, (int64_t[]){0, 0});
  outcome.value = test_to_doubles(&y->value);
  outcome.count = attn_tensor_count(&y->value);
  if (recording) assert_ok(attn_graph_backward(t.g, loss, 1));
  for (int i = 0; recording && i < TRIAL_INPUTS; ++i) {
    if (!inputs->values[i]) continue;
    const attn_tensor *gradient =
        i < TRIAL_LEAVES ? &t.leaf[i]->gradient : &t.parameter[i - TRIAL_LEAVES].gradient;
    if (!gradient->data) fail_msg("%s: input %d has no gradient", c->name, i);
    outcome.gradient[i] = test_to_doubles(gradient);
  }
  trial_parameter_destroy(&u);
  for (int i = 0; i < TRIAL_LEAVES; ++i) attn_tensor_destroy(&leaves[i]);
  for (int i = 0; i < TRIAL_PARAMETERS; ++i) trial_parameter_destroy(&t.parameter[i]);
  return outcome;
}

void trial_outcome_destroy(trial_outcome *outcome) {
  free(outcome->value);
  for (int i = 0; i < TRIAL_INPUTS; ++i) free(outcome->gradient[i]);
}
