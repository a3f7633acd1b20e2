/* AdamW, clipping and schedules against values made with NumPy, and their behaviour at the edges.
 */
#include "support/test.h"

#include "base/fault.h"
#include "base/memory.h"
#include "engines/dense/dense.h"
#include "models/fixtures/training.h"
#include "training/optimiser.h"
#include "training/schedule.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { FIXTURE_ALL = FIXTURE_FIRST + FIXTURE_SECOND };

/* A few roundings a step, over six steps, of values of order one. */
static const double f64_tolerance = 1e-14, f32_tolerance = 1e-6;

static const attn_adamw fixture_options = {
    .beta1 = 0.9, .beta2 = 0.95, .epsilon = 1e-8, .weight_decay = 0.1, .clip = 2.0};
static const double fixture_scale = 0.5;

typedef struct problem {
  attn_parameter parameters[2], *list[2];
  attn_optimiser *optimiser;
} problem;

static void set(const attn_tensor *tensor, const double *values) {
  attn_tensor source;
  assert_ok(
      attn_tensor_wrap((void *)(uintptr_t)values, ATTN_F64, tensor->rank, tensor->shape, &source));
  assert_ok(attn_tensor_copy(&source, tensor));
}

static void setup(problem *p, attn_dtype dtype, const attn_adamw *options) {
  static const int64_t shapes[2][2] = {{3, 5}, {FIXTURE_SECOND, 0}};
  static char names[2][8] = {"matrix", "norm"};
  for (int i = 0; i < 2; ++i) {
    attn_parameter *parameter = &p->parameters[i];
    p->list[i] = parameter;
    *parameter = (attn_parameter){.name = names[i], .decay = i == 0};
    assert_ok(attn_tensor_create(dtype, 2 - i, shapes[i], &parameter->value));
    assert_ok(attn_tensor_create(dtype, 2 - i, shapes[i], &parameter->gradient));
    set(&parameter->value, fixture_initial + (i ? FIXTURE_FIRST : 0));
  }
  assert_ok(attn_optimiser_create(options, p->list, 2, &p->optimiser));
}

static void teardown(problem *p) {
  attn_optimiser_destroy(p->optimiser);
  for (int i = 0; i < 2; ++i) {
    attn_tensor_destroy(&p->parameters[i].value);
    attn_tensor_destroy(&p->parameters[i].gradient);
  }
}

static void set_gradients(problem *p, int step) {
  for (int i = 0; i < 2; ++i)
    set(&p->parameters[i].gradient,
        fixture_gradients + step * FIXTURE_ALL + (i ? FIXTURE_FIRST : 0));
}

static attn_status fixture_step(problem *p, int step, attn_step_info *info) {
  set_gradients(p, step);
  return attn_optimiser_step(p->optimiser, fixture_rates[step], fixture_scale, info);
}

static void assert_values(problem *p, const double *expected, double tolerance) {
  double found[FIXTURE_ALL];
  for (int i = 0; i < 2; ++i) {
    double *values = test_to_doubles(&p->parameters[i].value);
    memcpy(found + (i ? FIXTURE_FIRST : 0), values,
           sizeof *values * (i ? FIXTURE_SECOND : FIXTURE_FIRST));
    free(values);
  }
  double error = test_relative_error(found, expected, FIXTURE_ALL);
  if (!(error <= tolerance)) fail_msg("relative error %g > %g", error, tolerance);
}

static void adamw_equals_numpy(void **state) {
  (void)state;
  static const attn_dtype dtypes[] = {ATTN_F64, ATTN_F32};
  for (int d = 0; d < 2; ++d) {
    double tolerance = d ? f32_tolerance : f64_tolerance;
    problem p;
    setup(&p, dtypes[d], &fixture_options);
    for (int t = 0; t < FIXTURE_STEPS; ++t) {
      attn_step_info info;
      assert_ok(fixture_step(&p, t, &info));
      assert_true(fabs(info.norm / fixture_norms[t] - 1) <= tolerance);
      assert_int_equal(info.clipped, fixture_norms[t] > fixture_options.clip);
      assert_values(&p, fixture_after + t * FIXTURE_ALL, tolerance);
    }
    assert_int_equal(attn_optimiser_steps(p.optimiser), FIXTURE_STEPS);
    attn_optimiser_zero_gradients(p.optimiser);
    assert_true(attn_optimiser_norm(p.optimiser) == 0);
    teardown(&p);
  }
}

/* Interrupted and resumed gives the same bits as uninterrupted. */
static void state_saves_and_loads(void **state) {
  (void)state;
  char path[] = "/tmp/attn-optimiser-XXXXXX";
  int file_number = mkstemp(path);
  assert_true(file_number >= 0);
  close(file_number);
  problem whole, first, second;
  setup(&whole, ATTN_F32, &fixture_options);
  setup(&first, ATTN_F32, &fixture_options);
  setup(&second, ATTN_F32, &fixture_options);
  for (int t = 0; t < FIXTURE_STEPS; ++t) assert_ok(fixture_step(&whole, t, NULL));
  for (int t = 0; t < 3; ++t) assert_ok(fixture_step(&first, t, NULL));
  attn_named_tensor tensors[5];
  assert_int_equal(attn_optimiser_state_count(first.optimiser), 5);
  attn_optimiser_state(first.optimiser, tensors);
  assert_string_equal(tensors[0].name, "optimiser.step");
  assert_string_equal(tensors[1].name, "optimiser.m.matrix");
  assert_string_equal(tensors[4].name, "optimiser.v.norm");
  assert_ok(attn_safetensors_write(path, tensors, 5, NULL, 0));

  attn_safetensors *file;
  assert_ok(attn_safetensors_open(path, &file));
  assert_ok(attn_optimiser_load(second.optimiser, file));
  attn_safetensors_close(file);
  assert_int_equal(attn_optimiser_steps(second.optimiser), 3);
  for (int i = 0; i < 2; ++i)
    assert_ok(attn_tensor_copy(&first.parameters[i].value, &second.parameters[i].value));
  for (int t = 3; t < FIXTURE_STEPS; ++t) assert_ok(fixture_step(&second, t, NULL));
  for (int i = 0; i < 2; ++i)
    assert_memory_equal(whole.parameters[i].value.data, second.parameters[i].value.data,
                        (i ? FIXTURE_SECOND : FIXTURE_FIRST) * sizeof(float));

  /* A state that lacks a tensor, or has another shape, is refused and changes nothing. */
  for (int bad = 0; bad < 2; ++bad) {
    attn_optimiser_state(whole.optimiser, tensors);
    if (bad) tensors[4].tensor.shape[0] = 3;
    assert_ok(attn_safetensors_write(path, tensors, bad ? 5 : 4, NULL, 0));
    assert_ok(attn_safetensors_open(path, &file));
    assert_int_equal(attn_optimiser_load(first.optimiser, file), ATTN_BAD_FORMAT);
    assert_non_null(strstr(attn_error_message(), "optimiser.v.norm"));
    attn_safetensors_close(file);
  }
  assert_int_equal(attn_optimiser_steps(first.optimiser), 3);
  for (int t = 3; t < FIXTURE_STEPS; ++t) assert_ok(fixture_step(&first, t, NULL));
  assert_memory_equal(whole.parameters[0].value.data, first.parameters[0].value.data,
                      FIXTURE_FIRST * sizeof(float));
  teardown(&whole);
  teardown(&first);
  teardown(&second);
  unlink(path);
}

static void bad_gradients_change_nothing(void **state) {
  (void)state;
  problem p;
  setup(&p, ATTN_F32, &fixture_options);
  assert_ok(fixture_step(&p, 0, NULL));
  set_gradients(&p, 1);
  ((float *)p.parameters[1].gradient.data)[3] = NAN;
  assert_int_equal(attn_optimiser_step(p.optimiser, 0.1, 1, NULL), ATTN_INVALID_ARGUMENT);
  assert_non_null(strstr(attn_error_message(), "norm"));
  ((float *)p.parameters[1].gradient.data)[3] = INFINITY;
  assert_int_equal(attn_optimiser_step(p.optimiser, 0.1, 1, NULL), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_optimiser_step(p.optimiser, -0.1, 1, NULL), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_optimiser_step(p.optimiser, NAN, 1, NULL), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_optimiser_step(p.optimiser, 0.1, INFINITY, NULL), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_optimiser_steps(p.optimiser), 1);
  assert_values(&p, fixture_after, f32_tolerance);
  ((float *)p.parameters[1].gradient.data)[3] = 3e38f; /* the squares overflow float32 only */
  assert_ok(attn_optimiser_step(p.optimiser, 0.1, 1, NULL));
  teardown(&p);
}

/* A product after the step must see the new values. */
static void compute_forms_follow(void **state) {
  (void)state;
  problem p;
  setup(&p, ATTN_F32, &fixture_options);
  attn_weight *weight;
  assert_ok(attn_weight_create(3, 5, ATTN_BF16, &weight));
  p.parameters[0].weight = weight;
  for (int t = 0; t < 2; ++t) {
    assert_ok(fixture_step(&p, t, NULL));
    attn_tensor form = attn_weight_values(weight), rounded;
    assert_ok(attn_tensor_create(ATTN_BF16, 2, p.parameters[0].value.shape, &rounded));
    assert_ok(attn_tensor_copy(&p.parameters[0].value, &rounded));
    assert_memory_equal(form.data, rounded.data, FIXTURE_FIRST * sizeof(uint16_t));
    attn_tensor_destroy(&rounded);
  }
  attn_weight_destroy(weight);
  teardown(&p);
}

/* A parameter of several blocks with a ragged end: the same bits at any number of threads, and a
 * step allocates nothing. */
static void threads_do_not_matter(void **state) {
  (void)state;
  enum { COUNT = 300007 };
  double *normal = malloc(COUNT * sizeof *normal);
  assert_non_null(normal);
  test_fill_normal(normal, COUNT, 0, 1, 3);
  float *results[2];
  double norms[2];
  for (int run = 0; run < 2; ++run) {
    assert_ok(attn_set_threads(run ? 3 : 1));
    char name[] = "w";
    attn_parameter parameter = {.name = name, .decay = true}, *list = &parameter;
    int64_t shape[] = {COUNT};
    parameter.value = test_from_doubles(normal, ATTN_F32, 1, shape);
    parameter.gradient = test_from_doubles(normal, ATTN_F32, 1, shape);
    attn_optimiser *optimiser;
    assert_ok(attn_optimiser_create(&fixture_options, &list, 1, &optimiser));
    uint64_t before = attn_memory_get_stats().allocations;
    attn_step_info info;
    for (int t = 0; t < 3; ++t) assert_ok(attn_optimiser_step(optimiser, 0.01, 1, &info));
    assert_true(attn_memory_get_stats().allocations == before);
    norms[run] = info.norm;
    results[run] = malloc(COUNT * sizeof(float));
    assert_non_null(results[run]);
    memcpy(results[run], parameter.value.data, COUNT * sizeof(float));
    attn_optimiser_destroy(optimiser);
    attn_tensor_destroy(&parameter.value);
    attn_tensor_destroy(&parameter.gradient);
  }
  assert_ok(attn_set_threads(0));
  double sum = 0;
  for (int i = 0; i < COUNT; ++i) sum += (double)(float)normal[i] * (double)(float)normal[i];
  assert_true(fabs(norms[0] / sqrt(sum) - 1) < 1e-12);
  assert_true(norms[0] == norms[1]);
  assert_memory_equal(results[0], results[1], COUNT * sizeof(float));
  free(results[0]);
  free(results[1]);
  free(normal);
}

static void bad_options_are_refused(void **state) {
  (void)state;
  problem p;
  setup(&p, ATTN_F32, &fixture_options);
  attn_optimiser *optimiser;
  const struct {
    attn_adamw options;
    const char *message;
  } cases[] = {
      {{1, 0.95, 1e-8, 0.1, 1}, "beta1"},   {{0.9, -1, 1e-8, 0.1, 1}, "beta2"},
      {{0.9, 0.95, 0, 0.1, 1}, "epsilon"},  {{0.9, 0.95, 1e-8, NAN, 1}, "weight_decay"},
      {{0.9, 0.95, 1e-8, 0.1, -1}, "clip"}, {{NAN, 0.95, 1e-8, 0.1, 1}, "beta1"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i) {
    assert_int_equal(attn_optimiser_create(&cases[i].options, p.list, 2, &optimiser),
                     ATTN_INVALID_ARGUMENT);
    assert_non_null(strstr(attn_error_message(), cases[i].message));
    assert_null(optimiser);
  }
  attn_parameter bad[2], *list[2] = {&bad[0], &bad[1]};
  memcpy(bad, p.parameters, sizeof bad);
  bad[1].gradient.shape[0] = 6;
  assert_int_equal(attn_optimiser_create(&fixture_options, list, 2, &optimiser),
                   ATTN_INVALID_SHAPE);
  bad[1] = p.parameters[1];
  bad[0].value.dtype = ATTN_BF16;
  assert_int_equal(attn_optimiser_create(&fixture_options, list, 2, &optimiser), ATTN_UNSUPPORTED);
  bad[0] = p.parameters[0];
  bad[0].gradient.data = NULL;
  assert_int_equal(attn_optimiser_create(&fixture_options, list, 2, &optimiser),
                   ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_optimiser_create(&fixture_options, list, 0, &optimiser),
                   ATTN_INVALID_ARGUMENT);

  size_t live = attn_memory_get_stats().live_bytes;
  bool hit = true;
  for (int skip = 0; hit; ++skip) { /* out of memory at every place */
    attn_fault_arm(ATTN_FAULT_ALLOC, skip);
    attn_status status = attn_optimiser_create(&fixture_options, p.list, 2, &optimiser);
    hit = attn_fault_disarm(ATTN_FAULT_ALLOC);
    assert_int_equal(status, hit ? ATTN_OUT_OF_MEMORY : ATTN_OK);
    attn_optimiser_destroy(optimiser);
    assert_int_equal(attn_memory_get_stats().live_bytes, live);
  }
  teardown(&p);
}

static void schedules_equal_numpy(void **state) {
  (void)state;
  static const double *const expected[] = {fixture_constant, fixture_cosine, fixture_wsd,
                                           fixture_wsd_sqrt};
  enum { STEPS = sizeof fixture_schedule_steps / sizeof *fixture_schedule_steps };
  for (int kind = 0; kind < ATTN_SCHEDULE_COUNT; ++kind) {
    attn_schedule schedule = {.peak = 3e-4, .floor = 0.1, .warmup = 10, .total = 100, .decay = 20};
    assert_ok(attn_schedule_parse(attn_schedule_name((attn_schedule_kind)kind), &schedule.kind));
    assert_int_equal(schedule.kind, kind);
    assert_ok(attn_schedule_check(&schedule));
    for (int i = 0; i < STEPS; ++i) {
      double rate = attn_schedule_rate(&schedule, fixture_schedule_steps[i]);
      if (!(fabs(rate / expected[kind][i] - 1) < 1e-12)) /* a few roundings in float64 */
        fail_msg("%s, step %d: %g, expected %g", attn_schedule_name(schedule.kind),
                 (int)fixture_schedule_steps[i], rate, expected[kind][i]);
    }
  }
}

static void schedule_edges(void **state) {
  (void)state;
  attn_schedule schedule = {.kind = ATTN_SCHEDULE_COSINE, .peak = 1, .warmup = 5, .total = 5};
  assert_ok(attn_schedule_check(&schedule)); /* warm-up only */
  assert_true(attn_schedule_rate(&schedule, 4) == 1);
  assert_true(isfinite(attn_schedule_rate(&schedule, 5)));
  schedule = (attn_schedule){.kind = ATTN_SCHEDULE_WSD_SQRT, .peak = 1, .total = 5};
  assert_ok(attn_schedule_check(&schedule)); /* no decay */
  assert_true(attn_schedule_rate(&schedule, 4) == 1);
  attn_schedule bad[] = {
      {.kind = ATTN_SCHEDULE_COSINE, .peak = 0, .total = 5},
      {.kind = ATTN_SCHEDULE_COSINE, .peak = NAN, .total = 5},
      {.kind = ATTN_SCHEDULE_COSINE, .peak = 1, .floor = 2, .total = 5},
      {.kind = ATTN_SCHEDULE_COSINE, .peak = 1, .total = 0},
      {.kind = ATTN_SCHEDULE_COSINE, .peak = 1, .warmup = 6, .total = 5},
      {.kind = ATTN_SCHEDULE_COSINE, .peak = 1, .warmup = -1, .total = 5},
      {.kind = ATTN_SCHEDULE_WSD_LINEAR, .peak = 1, .warmup = 3, .total = 5, .decay = 3},
      {.kind = ATTN_SCHEDULE_COUNT, .peak = 1, .total = 5},
  };
  for (size_t i = 0; i < sizeof bad / sizeof *bad; ++i)
    assert_int_equal(attn_schedule_check(&bad[i]), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_schedule_parse("cosin", &schedule.kind), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_schedule_parse(NULL, &schedule.kind), ATTN_INVALID_ARGUMENT);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(adamw_equals_numpy),
      cmocka_unit_test(state_saves_and_loads),
      cmocka_unit_test(bad_gradients_change_nothing),
      cmocka_unit_test(threads_do_not_matter),
      cmocka_unit_test(bad_options_are_refused),
      cmocka_unit_test(schedules_equal_numpy),
      cmocka_unit_test(schedule_edges),
      cmocka_unit_test(compute_forms_follow),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
