/* CAB's compositional index and efficiency length: the example that its script comes with, the
 * identities, and files that do not fit. */
#include "support/test.h"

#include "files/json.h"
#include "tasks/cab.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static void assert_near(double got, double expected, double tolerance) {
  if (!(fabs(got - expected) <= tolerance)) fail_msg("%.10g, expected %.10g", got, expected);
}

/* Opens a table whose text may have ' for ". */
static attn_status open_text(const char *text, attn_cab *cab) {
  char buffer[4096];
  json_t *file;
  snprintf(buffer, sizeof buffer, "%s", text);
  for (char *p = buffer; *p; ++p)
    if (*p == '\'') *p = '"';
  assert_ok(attn_json_parse(buffer, strlen(buffer), "test", &file));
  attn_status status = attn_cab_read(file, cab);
  json_decref(file);
  return status;
}

static double task_score(const attn_cab *cab, int row, const char *task) {
  for (int m = 0; m < cab->metric_count; m = attn_cab_task_end(cab, m))
    if (strcmp(cab->metrics[m].task, task) == 0)
      return attn_cab_task_score(cab, &cab->rows[row], m);
  fail_msg("no task %s", task);
  return 0;
}

static void the_published_example(void **context) {
  (void)context;
  const double printed = 0.0035; /* constants and results are printed with few digits */
  attn_cab cab;
  assert_ok(attn_cab_load(ATTN_SOURCE_DIR "/examples/cab.json", &cab));
  assert_int_equal(cab.row_count, 1);
  assert_near(task_score(&cab, 0, "TTS"), -0.301, printed);
  assert_near(task_score(&cab, 0, "Sum"), -0.246, printed);
  assert_near(task_score(&cab, 0, "SR"), -0.077, printed);
  assert_near(task_score(&cab, 0, "MLM"), 0.527, printed);
  assert_near(attn_cab_index(&cab, &cab.rows[0], ATTN_CAB_NS), -0.024, printed);
  for (int p = ATTN_CAB_CS; p < ATTN_CAB_PATTERNS; ++p)
    assert_true(isnan(attn_cab_index(&cab, &cab.rows[0], (attn_cab_pattern)p)));
  attn_cab_close(&cab);
}

/* How many metrics and tasks a pattern has, and that each task is one range. */
static void the_published_groups(void **context) {
  (void)context;
  static const int tasks[] = {4, 3, 2, 2}, metrics[] = {10, 6, 9, 5};
  static const char lower[] = "MCD MSD perplexity CD-l1 CD-l2 MSE MAE";
  int found_tasks[ATTN_CAB_PATTERNS] = {0}, found_metrics[ATTN_CAB_PATTERNS] = {0};
  attn_cab cab;
  assert_ok(open_text("{'attentions': {'x': {}}}", &cab));
  for (int m = 0; m < cab.metric_count; m = attn_cab_task_end(&cab, m)) {
    ++found_tasks[cab.metrics[m].pattern];
    found_metrics[cab.metrics[m].pattern] += attn_cab_task_end(&cab, m) - m;
  }
  for (int m = 0; m < cab.metric_count; ++m) {
    const char *last = strrchr(cab.metrics[m].name, ' ');
    last = last ? last + 1 : cab.metrics[m].name;
    assert_int_equal(cab.metrics[m].higher, strstr(lower, last) == NULL);
  }
  assert_memory_equal(found_tasks, tasks, sizeof tasks);
  assert_memory_equal(found_metrics, metrics, sizeof metrics);
  attn_cab_close(&cab);
}

#define OWN                                                                                        \
  "'metrics': [{'pattern': 'NS', 'task': 'a', 'name': 'loss', 'better': 'lower'},"                 \
  "{'pattern': 'NS', 'task': 'a', 'name': 'accuracy', 'better': 'higher'},"                        \
  "{'pattern': 'CC', 'task': 'b', 'name': 'accuracy', 'better': 'higher'}]"

/* Mean and deviation from the rows: by hand, for 1, 2, 6: mean 3, deviation sqrt(7). */
static void own_constants(void **context) {
  (void)context;
  attn_cab cab;
  assert_ok(open_text("{" OWN ", 'baseline': 'y', 'attentions': {"
                      "'x': {'NS': {'a': [1, 10]}, 'CC': {'b': [4]}},"
                      "'y': {'NS': {'a': [2, 10]}, 'CC': {'b': [null]}},"
                      "'z': {'NS': {'a': [6, 10]}, 'CC': {'b': [8]}}}}",
                      &cab));
  assert_int_equal(cab.baseline, 1);
  assert_near(cab.metrics[0].mean, 3, 1e-15);
  assert_near(cab.metrics[0].deviation, sqrt(7), 1e-15);
  /* nobody differs in accuracy: 0, and the task's score is half of the other's */
  assert_near(task_score(&cab, 0, "a"), 0.5 * 2 / sqrt(7), 1e-15);
  assert_near(task_score(&cab, 2, "a"), 0.5 * -3 / sqrt(7), 1e-15);
  assert_near(attn_cab_index(&cab, &cab.rows[2], ATTN_CAB_CC), sqrt(0.5), 1e-15);
  assert_true(isnan(attn_cab_index(&cab, &cab.rows[1], ATTN_CAB_CC)));
  attn_cab_close(&cab);
}

/* z does not see units: an affine change of a metric, with constants measured again, changes
 * nothing; a change of sign and of direction neither. Equal values have equal scores. */
static void units_do_not_matter(void **context) {
  (void)context;
  static const double values[4] = {3.25, -1, 8, 3.25};
  attn_cab tables[3];
  for (int t = 0; t < 3; ++t) {
    double factor = t == 0 ? 1 : t == 1 ? 1000 : -0.5, shift = t == 1 ? 7 : 0;
    char text[1024];
    size_t used = (size_t)snprintf(
        text, sizeof text,
        "{'metrics': [{'pattern': 'CS', 'task': 'a', 'name': 'm', 'better': '%s'}], "
        "'attentions': {",
        t == 2 ? "higher" : "lower");
    for (int i = 0; i < 4; ++i)
      used += (size_t)snprintf(text + used, sizeof text - used, "%s'%d': {'CS': {'a': [%.17g]}}",
                               i ? "," : "", i, factor * values[i] + shift);
    snprintf(text + used, sizeof text - used, "}}");
    assert_ok(open_text(text, &tables[t]));
  }
  for (int i = 0; i < 4; ++i)
    for (int t = 1; t < 3; ++t)
      assert_near(attn_cab_index(&tables[0], &tables[0].rows[i], ATTN_CAB_CS),
                  attn_cab_index(&tables[t], &tables[t].rows[i], ATTN_CAB_CS), 1e-12);
  assert_true(attn_cab_index(&tables[0], &tables[0].rows[0], ATTN_CAB_CS) ==
              attn_cab_index(&tables[0], &tables[0].rows[3], ATTN_CAB_CS));
  for (int t = 0; t < 3; ++t) attn_cab_close(&tables[t]);
}

static void what_does_not_fit(void **context) {
  (void)context;
  static const struct {
    const char *text, *names;
  } cases[] = {
      {"{}", "attentions"},
      {"{'attentions': {}}", "attentions"},
      {"{'attentions': {'x': 3}}", "x"},
      {"{'attentions': {'x': {'NS': []}}}", "NS"},
      {"{'attentions': {'x': {'NS': {'TTS': 3}}}}", "TTS"},
      {"{'attentions': {'x': {'NS': {'TTS': [1, 2]}}}}", "4 numbers"},
      {"{'attentions': {'x': {'NS': {'TTS': [1, 2, 3, 'a']}}}}", "element 3"},
      {"{'attentions': {'x': {'NS': {'LM': [1]}}}}", "LM"},
      {"{'attentions': {'x': {'XS': {'LM': [1]}}}}", "XS"},
      {"{'attentions': {'x': {}}, 'baseline': 'y'}", "baseline"},
      {"{'attentions': {'x': {}}, 'baselines': 'x'}", "baselines"},
      {"{'attentions': {'x': {}}, 'metrics': []}", "metrics"},
      {"{'attentions': {'x': {}}, 'metrics': [3]}", "metrics"},
      {"{'attentions': {'x': {}}, 'metrics': [{'pattern': 'NS', 'task': 'a', 'name': 'b'}]}",
       "better"},
      {"{'attentions': {'x': {}}, 'metrics': [{'pattern': 'NS', 'task': 'a', 'name': 'b', 'better':"
       " 'lower', 'mean': 1}]}",
       "deviation"},
      {"{'attentions': {'x': {}}, 'metrics': ["
       "{'pattern': 'NS', 'task': 'a', 'name': 'b', 'better': 'lower'},"
       "{'pattern': 'CS', 'task': 'a', 'name': 'b', 'better': 'lower'},"
       "{'pattern': 'NS', 'task': 'a', 'name': 'c', 'better': 'lower'}]}",
       "side by side"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i) {
    attn_cab cab;
    assert_int_equal(open_text(cases[i].text, &cab), ATTN_BAD_FORMAT);
    if (!strstr(attn_error_message(), cases[i].names))
      fail_msg("%s: '%s' does not name %s", cases[i].text, attn_error_message(), cases[i].names);
  }
}

enum { LENGTHS = 6 };
static const double lengths[LENGTHS] = {256, 512, 1024, 2048, 4096, 8192};

/* Curves that cross at known lengths are found again. */
static void known_crossings(void **context) {
  (void)context;
  static const struct {
    double a, b, c, d, e, length;
  } cases[] = {
      {2e-9, 0, 0, 4e-6, 0, 2000},
      {3e-8, 1e-7, 1e-5, 1e-7, 3e-4 + 1e-5, 100},
      {1e-9, 2e-6, 0, 1e-6, 0, 0},       /* dearer at every positive length */
      {1e-9, 0, 1, 0, 0, 0},             /* never meets: dearer everywhere */
      {1e-9, 0, 0, 8e-6, 4e-3, 8472.14}, /* beyond the last length */
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i) {
    double exact[LENGTHS], other[LENGTHS];
    attn_efficiency found;
    for (int n = 0; n < LENGTHS; ++n) {
      double N = lengths[n];
      exact[n] = cases[i].a * N * N + cases[i].b * N + cases[i].c;
      other[n] = cases[i].d * N + cases[i].e;
    }
    assert_ok(attn_efficiency_length(lengths, exact, other, LENGTHS, &found));
    assert_near(found.length, cases[i].length, 1e-2 + 1e-9 * cases[i].length);
    assert_near(found.a, cases[i].a, 1e-8 * cases[i].a);
    assert_near(found.d, cases[i].d, 1e-12);
  }
}

/* A least-squares fit: the residual is orthogonal to every power of the fit, noise or not. */
static void fits_are_least_squares(void **context) {
  (void)context;
  double noise[2 * LENGTHS], exact[LENGTHS], other[LENGTHS];
  attn_efficiency f;
  test_fill_normal(noise, 2 * LENGTHS, 0, 1, 3);
  for (int n = 0; n < LENGTHS; ++n) {
    exact[n] = lengths[n] * lengths[n] * 1e-6 + noise[n];
    other[n] = lengths[n] * 1e-3 + noise[LENGTHS + n];
  }
  assert_ok(attn_efficiency_length(lengths, exact, other, LENGTHS, &f));
  for (int power = 0; power < 3; ++power) {
    double along_exact = 0, along_other = 0;
    for (int n = 0; n < LENGTHS; ++n) {
      double x = lengths[n] / lengths[LENGTHS - 1], N = lengths[n];
      along_exact += pow(x, power) * (exact[n] - (f.a * N * N + f.b * N + f.c));
      along_other += pow(x, power) * (other[n] - (f.d * N + f.e));
    }
    assert_near(along_exact, 0, 1e-9);
    if (power < 2) assert_near(along_other, 0, 1e-9);
  }
}

static void lengths_without_a_crossing(void **context) {
  (void)context;
  double line[LENGTHS], bad[LENGTHS];
  attn_efficiency found;
  for (int n = 0; n < LENGTHS; ++n) line[n] = 1e-3 * lengths[n], bad[n] = n == 2 ? NAN : 1;
  double bent[LENGTHS];
  for (int n = 0; n < LENGTHS; ++n) bent[n] = line[n] - 1e-9 * lengths[n] * lengths[n];
  assert_ok(attn_efficiency_length(lengths, bent, line, LENGTHS, &found));
  assert_true(isnan(found.length));
  for (int n = 0; n < LENGTHS; ++n) bent[n] = line[n] + 1e-11 * lengths[n] * lengths[n];
  assert_ok(attn_efficiency_length(lengths, bent, line, LENGTHS, &found));
  assert_true(isnan(found.length)); /* a curvature of a ten-thousandth */
  assert_int_equal(attn_efficiency_length(lengths, line, line, 2, &found), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_efficiency_length(lengths, bad, line, LENGTHS, &found),
                   ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_efficiency_length((double[]){1, 3, 2}, line, line, 3, &found),
                   ATTN_INVALID_ARGUMENT);
}

static void the_middle_half(void **context) {
  (void)context;
  const double sorted[] = {1, 2, 3, 4, 5, 6, 7, 100};
  assert_near(attn_middle_mean(sorted, 8), 4.5, 0);
  assert_near(attn_middle_mean(sorted, 3), 2, 0);
  assert_near(attn_middle_mean(sorted + 7, 1), 100, 0);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(the_published_example),  cmocka_unit_test(the_published_groups),
      cmocka_unit_test(own_constants),          cmocka_unit_test(units_do_not_matter),
      cmocka_unit_test(what_does_not_fit),      cmocka_unit_test(known_crossings),
      cmocka_unit_test(fits_are_least_squares), cmocka_unit_test(lengths_without_a_crossing),
      cmocka_unit_test(the_middle_half),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
