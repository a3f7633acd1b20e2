/* Multi-query associative recall: what every example must be, how queries are spread, and that the
 * same seed gives the same examples. */
#include "support/test.h"

#include "base/memory.h"
#include "tasks/task.h"

#include <math.h>
#include <string.h>

enum { LENGTH = 64, PAIRS = 8, VOCABULARY = 50, EXAMPLES = 300 };

static attn_task_options small(bool random_filler) {
  return (attn_task_options){
      .vocabulary = VOCABULARY, .length = LENGTH, .pairs = PAIRS, .zeros = !random_filler};
}

static attn_status generate(const attn_task_options *options, uint64_t seed, attn_task_part part,
                            int64_t first, int64_t count, int32_t *inputs, int32_t *labels) {
  const attn_task *mqar;
  assert_ok(attn_task_find("mqar", &mqar));
  return attn_task_generate(mqar, options, seed, part, first, count, inputs, labels);
}

/* One example against its definition: a dictionary of the list answers every query. */
static void check_example(const int32_t *inputs, const int32_t *labels, bool random_filler) {
  int32_t value_of[VOCABULARY] = {0};
  bool asked[VOCABULARY] = {false}, given[VOCABULARY] = {false};
  int labelled = 0;
  for (int i = 0; i < PAIRS; ++i) {
    int32_t key = inputs[2 * i], value = inputs[2 * i + 1];
    assert_true(key >= 1 && key < VOCABULARY / 2);
    assert_true(value >= VOCABULARY / 2 && value < VOCABULARY);
    assert_true(!value_of[key] && !given[value]);
    value_of[key] = value;
    given[value] = true;
    assert_true(labels[2 * i] == ATTN_NO_LABEL && labels[2 * i + 1] == ATTN_NO_LABEL);
  }
  for (int t = 2 * PAIRS; t < LENGTH; ++t) {
    if (labels[t] == ATTN_NO_LABEL) {
      assert_true(random_filler ? inputs[t] >= 0 && inputs[t] < VOCABULARY : inputs[t] == 0);
      continue;
    }
    assert_int_equal(t % 2, 0);
    assert_int_equal(labels[t], value_of[inputs[t]]);
    assert_true(!asked[inputs[t]]);
    asked[inputs[t]] = true;
    ++labelled;
  }
  assert_int_equal(labelled, PAIRS);
}

static void examples_are_what_they_should_be(void **state) {
  (void)state;
  static int32_t inputs[EXAMPLES * LENGTH], labels[EXAMPLES * LENGTH];
  for (int filler = 0; filler < 2; ++filler) {
    attn_task_options task = small(filler);
    assert_ok(generate(&task, 3, ATTN_TASK_TEST, 0, EXAMPLES, inputs, labels));
    for (int e = 0; e < EXAMPLES; ++e)
      check_example(inputs + e * LENGTH, labels + e * LENGTH, filler);
  }
}

/* As many pairs as there are keys, in a list that the queries fill. */
static void extremes(void **state) {
  (void)state;
  int32_t inputs[12], labels[12];
  attn_task_options task = {.vocabulary = 8, .length = 12, .pairs = 3, .power = 1, .zeros = true};
  assert_ok(generate(&task, 1, ATTN_TASK_TEST, 0, 1, inputs, labels));
  for (int t = 0; t < 12; ++t) assert_int_equal(labels[t] != ATTN_NO_LABEL, t >= 6 && t % 2 == 0);
}

/* The first key's slot has p(j) = j^(a - 1) / sum: chi-square over the slots, the rare ones in one
 * class; its expectation is the number of classes less one, its deviation sqrt(2 x that). */
static void queries_follow_the_power_law(void **state) {
  (void)state;
  enum { DRAWS = 20000, SLOTS = 24, CLASSES = 12 };
  static const double powers[] = {0.01, 0.5, 1};
  static int32_t inputs[DRAWS * 50], labels[DRAWS * 50];
  for (size_t k = 0; k < sizeof powers / sizeof *powers; ++k) {
    attn_task_options task = {
        .vocabulary = 16, .length = 50, .pairs = 1, .power = powers[k], .zeros = true};
    double expected[CLASSES] = {0}, seen[CLASSES] = {0}, sum = 0, chi = 0;
    assert_ok(generate(&task, 11, ATTN_TASK_TEST, 0, DRAWS, inputs, labels));
    for (int j = 0; j < SLOTS; ++j) sum += pow(j + 1, powers[k] - 1);
    for (int j = 0; j < SLOTS; ++j)
      expected[j < CLASSES ? j : CLASSES - 1] += DRAWS * pow(j + 1, powers[k] - 1) / sum;
    for (int e = 0; e < DRAWS; ++e)
      for (int j = 0; j < SLOTS; ++j)
        if (labels[e * 50 + 2 + 2 * j] != ATTN_NO_LABEL) ++seen[j < CLASSES ? j : CLASSES - 1];
    for (int c = 0; c < CLASSES; ++c)
      chi += (seen[c] - expected[c]) * (seen[c] - expected[c]) / expected[c];
    assert_true(chi < CLASSES - 1 + 5 * sqrt(2 * (CLASSES - 1)));
  }
}

static void examples_depend_on_seed_and_number(void **state) {
  (void)state;
  int32_t inputs[4][4 * LENGTH], labels[4][4 * LENGTH];
  attn_task_options task = small(true);
  assert_ok(generate(&task, 5, ATTN_TASK_TEST, 0, 4, inputs[0], labels[0]));
  for (int e = 0; e < 4; ++e)
    assert_ok(
        generate(&task, 5, ATTN_TASK_TEST, e, 1, inputs[1] + e * LENGTH, labels[1] + e * LENGTH));
  assert_memory_equal(inputs[0], inputs[1], sizeof inputs[0]);
  assert_memory_equal(labels[0], labels[1], sizeof labels[0]);
  assert_ok(generate(&task, 6, ATTN_TASK_TEST, 0, 4, inputs[2], labels[2]));
  assert_memory_not_equal(inputs[0], inputs[2], sizeof inputs[0]);
  /* No part has an example of another one. */
  for (int part = ATTN_TASK_TRAINING; part < ATTN_TASK_TEST; ++part) {
    assert_ok(generate(&task, 5, (attn_task_part)part, 0, 4, inputs[3], labels[3]));
    for (int e = 0; e < 16; ++e)
      assert_memory_not_equal(inputs[0] + e / 4 * LENGTH, inputs[3] + e % 4 * LENGTH,
                              sizeof inputs[0] / 4);
  }
}

static void refusals(void **state) {
  (void)state;
  static const attn_task_options wrong[] = {
      {.vocabulary = 3, .length = 4, .pairs = 1, .power = 1},
      {.vocabulary = 16, .length = 64, .pairs = 8, .power = 1},
      {.vocabulary = 16, .length = 64, .pairs = -1, .power = 1},
      {.vocabulary = 16, .length = 13, .pairs = 3, .power = 1},
      {.vocabulary = 16, .length = 10, .pairs = 3, .power = 1},
      {.vocabulary = 16, .length = 12, .pairs = 3, .power = -1},
      {.vocabulary = 16, .length = 12, .pairs = 3, .power = NAN},
  };
  int32_t inputs[64], labels[64];
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; ++i)
    assert_int_equal(generate(&wrong[i], 1, ATTN_TASK_TEST, 0, 1, inputs, labels),
                     ATTN_INVALID_ARGUMENT);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(examples_are_what_they_should_be),
      cmocka_unit_test(extremes),
      cmocka_unit_test(queries_follow_the_power_law),
      cmocka_unit_test(examples_depend_on_seed_and_number),
      cmocka_unit_test(refusals),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
