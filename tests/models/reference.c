/* Two small models against values produced independently (fixtures/reference.py, NumPy, float64):
 * logits and losses through the whole way from files, gradients, and one step of AdamW. */
#include "support/models.h"
#include "support/test.h"

#include "attn/model.h"
#include "graph/operations.h"
#include "models/model.h"
#include "training/optimiser.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { BATCH = 2, LENGTH = 150, SHORT = 24 }; /* as in reference.py */

static const attn_adamw adamw = {
    .beta1 = 0.9, .beta2 = 0.95, .epsilon = 1e-6, .weight_decay = 0.1, .clip = 1};
static const double learning_rate = 1e-3;

/* Relative to the norm of what is compared. float64: some hundred roundings. float32: the same.
 * bfloat16: weights, activations and products' inputs are rounded to 8 bits (2^-9 each) about ten
 * times on the way through two layers. A step of AdamW moves every weight by about the learning
 * rate whatever the size of its gradient: rounding shows in the few whose gradient is near 0. */
typedef struct tolerances {
  attn_dtype compute;
  double logits, loss, gradient, step;
} tolerances;

static const tolerances all_tolerances[] = {
    {ATTN_F64, 1e-9, 1e-9, 1e-9, 1e-9},
    {ATTN_F32, 2e-5, 1e-5, 1e-4, 1e-4},
    {ATTN_BF16, 3e-2, 1e-2, 6e-2, 2e-2},
};

typedef struct fixture {
  const tolerances *tolerance;
  attn_model *model;
  attn_safetensors *expected;
  attn_graph *graph;
  const int32_t *tokens; /* [BATCH, LENGTH] */
  double losses[3];      /* of all tokens; of the first SHORT; of those after one step */
} fixture;

static const char *const names[] = {"transnormer", "lightning"};

static void find(const fixture *f, const char *name, attn_tensor *tensor) {
  assert_ok(attn_safetensors_find(f->expected, name, tensor));
}

static fixture open_fixture(const char *name, const tolerances *tolerance) {
  fixture f = {.tolerance = tolerance};
  char path[512];
  snprintf(path, sizeof path, "%s/tests/models/fixtures/%s", ATTN_SOURCE_DIR, name);
  assert_ok(test_model_load(path, tolerance->compute, &f.model));
  strcat(path, "/expected.safetensors");
  assert_ok(attn_safetensors_open(path, &f.expected));
  assert_ok(attn_graph_create_on(test_device(), tolerance->compute, &f.graph));
  attn_tensor tokens, losses;
  find(&f, "tokens", &tokens);
  assert_int_equal(attn_tensor_count(&tokens), BATCH * LENGTH);
  f.tokens = tokens.data;
  find(&f, "losses", &losses);
  memcpy(f.losses, losses.data, sizeof f.losses);
  return f;
}

static void close_fixture(fixture *f) {
  attn_graph_destroy(f->graph);
  attn_safetensors_close(f->expected);
  attn_model_destroy(f->model);
}

static void assert_near(const char *what, double found, double expected, double tolerance) {
  if (!(fabs(found - expected) <= tolerance * fabs(expected)))
    fail_msg("%s: %.12g, expected %.12g, tolerance %g", what, found, expected, tolerance);
}

static void assert_tensors_near(const char *what, const attn_tensor *found,
                                const attn_tensor *expected, double tolerance) {
  double *a = test_to_doubles(found), *b = test_to_doubles(expected);
  assert_int_equal(attn_tensor_count(found), attn_tensor_count(expected));
  double error = test_relative_error(a, b, attn_tensor_count(expected));
  if (!(error <= tolerance)) fail_msg("%s: error %g, tolerance %g", what, error, tolerance);
  free(a);
  free(b);
}

/* The loss of predicting tokens 1 .. length - 1 of each sequence. */
enum { KEEPING, CHECKPOINTS, LEAN, HALF_LEAN, WAYS };

static attn_var *loss_of(fixture *f, int64_t length, bool recording, int way) {
  static int32_t inputs[BATCH * LENGTH], targets[BATCH * LENGTH];
  int64_t rows = 0;
  for (int b = 0; b < BATCH; ++b)
    for (int t = 0; t + 1 < length; ++t, ++rows) {
      inputs[rows] = f->tokens[b * LENGTH + t];
      targets[rows] = f->tokens[b * LENGTH + t + 1];
    }
  attn_layout layout = attn_layout_equal(BATCH, length - 1);
  attn_graph_reset(f->graph, recording);
  int64_t layers = f->model->config.layer_count;
  int64_t checkpoints = way == CHECKPOINTS ? layers : way == HALF_LEAN ? 1 : 0;
  int64_t lean = way == LEAN ? layers : way == HALF_LEAN ? layers / 2 : 0;
  attn_var *loss =
      attn_decoder_loss(f->graph, f->model, &layout, inputs, targets, checkpoints, lean);
  assert_ok(attn_graph_status(f->graph));
  return loss;
}

static double number(const attn_var *loss) {
  return attn_tensor_get(&loss->value, (int64_t[]){0});
}

static void check_logits(fixture *f) {
  attn_tensor expected;
  find(f, "logits", &expected);
  attn_layout layout = attn_layout_equal(1, LENGTH);
  attn_graph_reset(f->graph, false);
  attn_var *hidden = attn_decoder_hidden(f->graph, f->model, &layout, f->tokens, NULL, 0, 0);
  attn_var *logits = attn_decoder_logits(f->graph, f->model, hidden);
  assert_ok(attn_graph_status(f->graph));
  assert_tensors_near("logits", &logits->value, &expected, f->tolerance->logits);
}

/* A session reads the tokens in pieces, then one by one; its logits are float32. */
static void check_session(fixture *f) {
  attn_tensor expected, row;
  find(f, "logits", &expected);
  attn_session *session;
  assert_ok(attn_session_create(f->model, NULL, &session));
  static const int64_t pieces[] = {1, 70, 3, 65, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  const double float_rounding = 1e-6;
  int64_t position = 0;
  for (size_t p = 0; p < sizeof pieces / sizeof *pieces; ++p) {
    assert_ok(attn_session_feed(session, f->tokens + position, pieces[p]));
    position += pieces[p];
    attn_tensor logits;
    assert_ok(attn_tensor_wrap((void *)(uintptr_t)attn_session_logits(session), ATTN_F32, 1,
                               &expected.shape[1], &logits));
    assert_ok(attn_tensor_slice(&expected, 0, position - 1, 1, &row));
    assert_ok(attn_tensor_reshape(&row, 1, &expected.shape[1], &row));
    assert_tensors_near("session", &logits, &row, fmax(f->tolerance->logits, float_rounding));
  }
  assert_int_equal(position, LENGTH);
  attn_session_destroy(session);
}

static void check_evaluate(fixture *f) {
  double mean, sum = 0;
  int64_t counted;
  for (int b = 0; b < BATCH; ++b) {
    assert_ok(
        attn_model_evaluate(f->model, f->tokens + b * LENGTH, LENGTH, LENGTH, 0, &mean, &counted));
    assert_int_equal(counted, LENGTH - 1);
    sum += mean;
  }
  assert_near("evaluate", sum / BATCH, f->losses[0], f->tolerance->loss);
}

static void check_gradients(fixture *f) {
  for (int64_t i = 0; i < f->model->parameter_count; ++i) {
    attn_parameter *parameter = &f->model->parameters[i];
    char name[160];
    attn_tensor expected;
    snprintf(name, sizeof name, "gradient.%s", parameter->name);
    find(f, name, &expected);
    assert_tensors_near(name, &parameter->gradient, &expected, f->tolerance->gradient);
  }
}

static void check_step(fixture *f) {
  attn_parameter *parameters[64];
  attn_tensor norm;
  find(f, "norm", &norm);
  assert_true(f->model->parameter_count <= 64);
  for (int64_t i = 0; i < f->model->parameter_count; ++i) parameters[i] = &f->model->parameters[i];
  attn_optimiser *optimiser;
  attn_step_info info;
  assert_ok(attn_optimiser_create(&adamw, parameters, f->model->parameter_count, &optimiser));
  assert_ok(attn_optimiser_step(optimiser, learning_rate, 1, &info));
  assert_near("norm", info.norm, *(double *)norm.data, f->tolerance->gradient);
  attn_optimiser_destroy(optimiser);
  double change = f->losses[1] - f->losses[2];
  double found = f->losses[1] - number(loss_of(f, SHORT + 1, false, false));
  /* relative to the change that the step makes, plus the rounding of the loss itself */
  double tolerance = f->tolerance->step + f->tolerance->loss * f->losses[1] / change;
  assert_near("change by a step", found, change, tolerance);
}

static void check_training(fixture *f, int way) {
  assert_ok(attn_model_make_trainable(f->model));
  attn_var *loss = loss_of(f, SHORT + 1, true, way);
  assert_near("loss", number(loss), f->losses[1], f->tolerance->loss);
  assert_ok(attn_graph_backward(f->graph, loss, 1));
  check_gradients(f);
  check_step(f);
}

static void equals_numpy(void *context) {
  const tolerances *tolerance = context;
  for (size_t n = 0; n < sizeof names / sizeof *names; ++n)
    for (int way = 0; way < WAYS; ++way) {
      fixture f = open_fixture(names[n], tolerance);
      check_logits(&f);
      check_session(&f);
      check_evaluate(&f);
      assert_near("loss", number(loss_of(&f, LENGTH, false, way)), f.losses[0], tolerance->loss);
      check_training(&f, way);
      close_fixture(&f);
    }
}

static void models_equal_numpy(void **state) {
  (void)state;
  for (size_t t = 0; t < sizeof all_tolerances / sizeof *all_tolerances; ++t) {
    print_message("%s\n", attn_dtype_name(all_tolerances[t].compute));
    test_on_every_path(equals_numpy, (void *)(uintptr_t)&all_tolerances[t]);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(models_equal_numpy)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
