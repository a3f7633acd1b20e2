/* Sampling: each step against a straight reading of its definition, the distribution by chi-square,
 * determinism, and logits and options that make no sense. */
#include "support/test.h"

#include "base/memory.h"
#include "base/random.h"
#include "models/sampling.h"

#include <math.h>
#include <string.h>

enum { LARGEST = 4096 };
static uint64_t workspace[LARGEST * 2];

static int32_t sample_at(const attn_sampling *sampling, const float *logits, int64_t vocabulary,
                         uint64_t position) {
  int32_t token = -1;
  assert_true(attn_sample_workspace(vocabulary) <= sizeof workspace);
  assert_ok(attn_sample(sampling, logits, vocabulary, NULL, 0, position, workspace, &token));
  assert_true(token >= 0 && token < vocabulary);
  return token;
}

/* -- The definition, in float64 with a full sort (selection of the next in order) -- */

typedef struct oracle {
  double probability[LARGEST];
  bool kept[LARGEST];
} oracle;

static int next_in_order(const float *logits, int n, const bool *candidate, const bool *taken) {
  int best = -1;
  for (int i = 0; i < n; ++i)
    if (candidate[i] && !taken[i] && (best < 0 || logits[i] > logits[best])) best = i;
  return best;
}

/* Keeps the first ones in order until `count` are kept or their mass reaches `mass`. */
static void keep_first(oracle *o, const float *logits, int n, int64_t count, double mass) {
  static bool taken[LARGEST];
  memset(taken, 0, sizeof taken);
  double sum = 0;
  for (int64_t k = 0; k < count && sum < mass; ++k) {
    int next = next_in_order(logits, n, o->kept, taken);
    if (next < 0) break;
    taken[next] = true;
    sum += o->probability[next];
  }
  memcpy(o->kept, taken, sizeof taken);
}

static void normalise(oracle *o, const float *logits, int n, double temperature) {
  double largest = -INFINITY, sum = 0;
  for (int i = 0; i < n; ++i)
    if (o->kept[i]) largest = fmax(largest, logits[i]);
  for (int i = 0; i < n; ++i)
    sum += o->probability[i] = o->kept[i] ? exp((logits[i] - largest) / temperature) : 0;
  for (int i = 0; i < n; ++i) o->probability[i] /= sum;
}

static void expect(oracle *o, const attn_sampling *s, const float *logits, int n) {
  for (int i = 0; i < n; ++i) o->kept[i] = true;
  normalise(o, logits, n, 1);
  if (s->top_k) keep_first(o, logits, n, s->top_k, 2);
  normalise(o, logits, n, 1);
  if (s->top_p < 1) keep_first(o, logits, n, n, s->top_p);
  double largest = 0;
  for (int i = 0; i < n; ++i) largest = fmax(largest, o->probability[i]);
  for (int i = 0; i < n; ++i) o->kept[i] = o->kept[i] && o->probability[i] >= s->min_p * largest;
  normalise(o, logits, n, s->temperature);
}

/* Draws many times; the counts must fit the expected probabilities by Pearson's chi-square, and
 * nothing outside the kept set may appear. The seed is fixed, so the test always gives the same. */
static void assert_distribution(const attn_sampling *sampling, const float *logits, int n) {
  enum { DRAWS = 20000 };
  static oracle o;
  static int counts[LARGEST];
  memset(counts, 0, sizeof counts);
  expect(&o, sampling, logits, n);
  for (uint64_t i = 0; i < DRAWS; ++i) ++counts[sample_at(sampling, logits, n, i)];
  double statistic = 0, rest_expected = 0, rest_count = 0;
  int cells = 0;
  for (int i = 0; i < n; ++i) {
    if (!o.kept[i]) {
      assert_int_equal(counts[i], 0);
      continue;
    }
    double expected = o.probability[i] * DRAWS;
    if (expected < 8) { /* too rare for the approximation: counted together */
      rest_expected += expected;
      rest_count += counts[i];
      continue;
    }
    statistic += (counts[i] - expected) * (counts[i] - expected) / expected;
    ++cells;
  }
  if (rest_expected >= 8) {
    statistic += (rest_count - rest_expected) * (rest_count - rest_expected) / rest_expected;
    ++cells;
  }
  int freedom = cells - 1;
  /* mean + 4 standard deviations of chi-square: exceeded about once in 10^4 for a right sampler */
  double limit = freedom + 4 * sqrt(2.0 * freedom) + 4;
  if (!(statistic <= limit)) fail_msg("chi-square %g > %g, %d cells", statistic, limit, cells);
}

static void distributions(void **state) {
  (void)state;
  static const struct {
    double temperature;
    int64_t top_k;
    double top_p, min_p;
  } cases[] = {
      {1, 0, 1, 0},   {0.7, 0, 1, 0},    {2, 0, 1, 0},      {1, 5, 1, 0},     {1, 1, 1, 0},
      {1, 0, 0.5, 0}, {1.5, 0, 0.9, 0},  {1, 0, 1, 0.2},    {0.8, 7, 0.8, 0}, {1.3, 9, 0.95, 0.1},
      {1, 50, 1, 0},  {1, 0, 0.0001, 0}, {1.1, 12, 1, 0.3}, {1, 0, 1, 1},     {1, 4, 0.9999999, 0},
  };
  double normal[40];
  float logits[40];
  test_fill_normal(normal, 40, 0, 1.5, 2);
  for (int i = 0; i < 40; ++i) logits[i] = (float)normal[i];
  for (int i = 5; i < 40; i += 6) logits[i] = logits[3]; /* ties, across the cut too */
  for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i) {
    attn_sampling sampling = ATTN_SAMPLING_INIT;
    sampling.temperature = cases[i].temperature;
    sampling.top_k = cases[i].top_k;
    sampling.top_p = cases[i].top_p;
    sampling.min_p = cases[i].min_p;
    sampling.seed = 100 + i;
    assert_distribution(&sampling, logits, 40);
    assert_distribution(&sampling, logits, 1);
    assert_distribution(&sampling, logits, 2);
  }
}

static void large_vocabulary_keeps_the_right_set(void **state) {
  (void)state;
  static double normal[LARGEST];
  static float logits[LARGEST];
  static oracle o;
  test_fill_normal(normal, LARGEST, 0, 3, 8);
  for (int i = 0; i < LARGEST; ++i) logits[i] = (float)(round(normal[i] * 8) / 8); /* many ties */
  attn_sampling sampling = ATTN_SAMPLING_INIT;
  sampling.top_k = 60;
  sampling.top_p = 0.9;
  sampling.temperature = 5;
  expect(&o, &sampling, logits, LARGEST);
  static bool seen[LARGEST];
  for (uint64_t i = 0; i < 3000; ++i) seen[sample_at(&sampling, logits, LARGEST, i)] = true;
  int kept = 0;
  for (int i = 0; i < LARGEST; ++i) {
    assert_int_equal(seen[i], o.kept[i]);
    kept += o.kept[i];
  }
  assert_true(kept > 5 && kept < 60);
}

static void greedy_and_ties(void **state) {
  (void)state;
  float logits[] = {-1, 3, 2, 3, 3};
  attn_sampling sampling = ATTN_SAMPLING_INIT;
  sampling.temperature = 0;
  assert_int_equal(sample_at(&sampling, logits, 5, 0), 1);
  sampling.temperature = 1;
  sampling.top_k = 1;
  for (uint64_t i = 0; i < 50; ++i) assert_int_equal(sample_at(&sampling, logits, 5, i), 1);
  sampling.top_k = 2;
  for (uint64_t i = 0; i < 50; ++i) assert_true(sample_at(&sampling, logits, 5, i) % 2 == 1);
  sampling = (attn_sampling)ATTN_SAMPLING_INIT;
  sampling.temperature = 1e-300; /* all but greedy; nothing overflows */
  for (uint64_t i = 0; i < 50; ++i) assert_true(logits[sample_at(&sampling, logits, 5, i)] == 3);
}

static void the_same_numbers_again(void **state) {
  (void)state;
  float logits[64] = {0};
  attn_sampling sampling = ATTN_SAMPLING_INIT;
  int32_t first[64];
  int same_seed = 0, other_seed = 0;
  sampling.seed = 5;
  for (uint64_t i = 0; i < 64; ++i) first[i] = sample_at(&sampling, logits, 64, i);
  for (uint64_t i = 64; i-- > 0;) same_seed += sample_at(&sampling, logits, 64, i) == first[i];
  sampling.seed = 6;
  for (uint64_t i = 0; i < 64; ++i) other_seed += sample_at(&sampling, logits, 64, i) == first[i];
  assert_int_equal(same_seed, 64);
  assert_true(other_seed < 10);
  uint64_t before = attn_memory_get_stats().allocations;
  sample_at(&sampling, logits, 64, UINT64_MAX);
  assert_true(attn_memory_get_stats().allocations == before);
}

static void repetition(void **state) {
  (void)state;
  float logits[] = {4, 3, -1, -1.5f};
  int32_t history[] = {0, 0, 0, 2, 2}, token;
  attn_sampling sampling = ATTN_SAMPLING_INIT;
  sampling.temperature = 0;
  sampling.repetition_penalty = 1.5;
  assert_ok(attn_sample(&sampling, logits, 4, history, 5, 0, workspace, &token));
  assert_int_equal(token, 1); /* 4 / 1.5 < 3, once however often it stands there */
  sampling.repetition_window = 2;
  assert_ok(attn_sample(&sampling, logits, 4, history, 5, 0, workspace, &token));
  assert_int_equal(token, 0); /* 0 has left the window */
  sampling.repetition_window = 0;
  float negative[] = {-4, -10, -1, -1.4f}; /* -1 * 1.5 < -1.4 */
  assert_ok(attn_sample(&sampling, negative, 4, history, 5, 0, workspace, &token));
  assert_int_equal(token, 3);
  sampling.repetition_penalty = 1.3; /* applied once -1.3 > -1.4, twice it would not be */
  assert_ok(attn_sample(&sampling, negative, 4, history, 5, 0, workspace, &token));
  assert_int_equal(token, 2);
  history[1] = 4;
  assert_int_equal(attn_sample(&sampling, logits, 4, history, 5, 0, workspace, &token),
                   ATTN_INVALID_ARGUMENT);
  history[1] = -1;
  assert_int_equal(attn_sample(&sampling, logits, 4, history, 5, 0, workspace, &token),
                   ATTN_INVALID_ARGUMENT);
}

static void logits_that_are_not_numbers(void **state) {
  (void)state;
  float mixed[] = {NAN, -INFINITY, 1, NAN, -INFINITY}, none[] = {NAN, -INFINITY, NAN};
  float infinite[] = {0, INFINITY, 3e38f, INFINITY, -3e38f};
  int32_t token, history[] = {1, 4};
  static const double tops[][3] = {{0, 1, 0}, {2, 0.9, 0.1}, {0, 0.3, 0}, {0, 1, 0.5}};
  for (int i = 0; i < 4; ++i)
    for (int temperature = 0; temperature < 3; ++temperature) {
      attn_sampling sampling = ATTN_SAMPLING_INIT;
      sampling.top_k = (int64_t)tops[i][0];
      sampling.top_p = tops[i][1];
      sampling.min_p = tops[i][2];
      sampling.temperature = temperature == 2 ? 1e30 : temperature;
      assert_int_equal(sample_at(&sampling, mixed, 5, 3), 2);
      assert_int_equal(attn_sample(&sampling, none, 3, NULL, 0, 0, workspace, &token),
                       ATTN_INVALID_ARGUMENT);
      if (temperature < 2) assert_true(sample_at(&sampling, infinite, 5, 3) % 2 == 1);
      sampling.repetition_penalty = 1e30; /* overflows both ways */
      assert_ok(attn_sample(&sampling, infinite, 5, history, 2, 0, workspace, &token));
      assert_true(token != 4);
      sampling.repetition_penalty = 1e-30;
      assert_ok(attn_sample(&sampling, infinite, 5, history, 2, 0, workspace, &token));
    }
}

static void bad_options(void **state) {
  (void)state;
  float logits[] = {0, 1};
  int32_t token;
  const attn_sampling good = ATTN_SAMPLING_INIT;
  attn_sampling bad[13];
  for (int i = 0; i < 13; ++i) bad[i] = good;
  bad[0].temperature = -1;
  bad[1].temperature = NAN;
  bad[2].top_k = -1;
  bad[3].top_p = 0;
  bad[4].top_p = 1.01;
  bad[5].top_p = NAN;
  bad[6].min_p = -0.1;
  bad[7].min_p = 1.1;
  bad[8].repetition_penalty = 0;
  bad[9].repetition_penalty = INFINITY;
  bad[10].repetition_window = -1;
  bad[11].struct_size = 0;
  bad[12].temperature = INFINITY;
  assert_ok(attn_sampling_check(&good));
  assert_int_equal(attn_sampling_check(NULL), ATTN_INVALID_ARGUMENT);
  for (int i = 0; i < 13; ++i)
    assert_int_equal(attn_sample(&bad[i], logits, 2, NULL, 0, 0, workspace, &token),
                     ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_sample(&good, logits, 0, NULL, 0, 0, workspace, &token),
                   ATTN_INVALID_ARGUMENT);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(distributions),   cmocka_unit_test(large_vocabulary_keeps_the_right_set),
      cmocka_unit_test(greedy_and_ties), cmocka_unit_test(the_same_numbers_again),
      cmocka_unit_test(repetition),      cmocka_unit_test(logits_that_are_not_numbers),
      cmocka_unit_test(bad_options),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
