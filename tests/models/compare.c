/* Comparisons of mixers: equal parameters, outcomes over seeds and learning rates, and that nothing
 * is lost or done twice. tests/cli/test_compare.sh has the command. */
#include "support/test.h"

#include "attn/attn.h"
#include "base/fault.h"
#include "base/io.h"
#include "base/memory.h"
#include "training/compare.h"

#include <ftw.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { PATH_SIZE = 64, MOST_MIXERS = 32 };

static char place[PATH_SIZE];

static int make_place(void **state) {
  (void)state;
  snprintf(place, sizeof place, "/tmp/attn-compare-XXXXXX");
  return mkdtemp(place) ? 0 : -1;
}

static int remove_entry(const char *path, const struct stat *info, int kind, struct FTW *at) {
  (void)info, (void)kind, (void)at;
  return remove(path);
}

static int remove_place(void **state) {
  (void)state;
  return nftw(place, remove_entry, 8, FTW_DEPTH | FTW_PHYS);
}

static const char *const two[] = {"softmax", "lightning"};
static const double rates[] = {1e-3, 1e-2};

static attn_comparison_options small_options(void) {
  attn_comparison_options o = {
      .task = "parity",
      .task_options = {.length = 8},
      .mixers = two,
      .mixer_count = 2,
      .width = 16,
      .layers = 1,
      .heads = 2,
      .seeds = 1,
      .learning_rates = rates,
      .rate_count = 1,
      .test_examples = 4,
      .output = place,
      .training = ATTN_TRAINING_OPTIONS_INIT,
  };
  o.training.steps = 3;
  o.training.batch = 2;
  o.training.validation_windows = 2;
  o.training.device = test_device();
  return o;
}

/* Models ----------------------------------------------------------------------------------------
 */

static void models_have_equal_parameters(void **state) {
  (void)state;
  const char *names[MOST_MIXERS];
  attn_comparison_options o = small_options();
  attn_mixer_info info;
  o.mixers = names;
  for (o.mixer_count = 0; o.mixer_count < attn_mixer_count(); ++o.mixer_count) {
    assert_ok(attn_mixer_get_info(o.mixer_count, &info));
    names[o.mixer_count] = info.name;
  }
  for (o.width = 16; o.width <= 48; o.width += 32)
    for (o.layers = 1; o.layers <= 3; o.layers += 2) {
      attn_comparison c;
      int kept = 0;
      int64_t most = 0;
      o.task_options.vocabulary = 8 * o.layers;
      assert_ok(attn_comparison_open(&o, &c));
      assert_int_equal(c.run_count, o.mixer_count);
      for (int m = 0; m < c.model_count; ++m)
        if (c.models[m].parameters > most) most = c.models[m].parameters;
      for (int m = 0; m < c.model_count; ++m) {
        assert_string_equal(c.problems[m], "");
        assert_true(c.models[m].feed_forward >= 2 * o.width);
        assert_true((double)c.models[m].parameters >= 0.98 * (double)most);
        kept += c.models[m].feed_forward == 2 * o.width;
      }
      assert_true(kept >= 1);
      attn_comparison_close(&c);
    }
}

/* Outcomes --------------------------------------------------------------------------------------
 */

static void finish(attn_comparison *c, int model, uint64_t seed, double rate, double validation,
                   double accuracy) {
  for (int i = 0; i < c->run_count; ++i) {
    attn_comparison_run *run = &c->runs[i];
    if (run->model != model || run->seed != seed || run->learning_rate != rate) continue;
    run->stage = ATTN_RUN_FINISHED;
    run->validation_loss = validation;
    run->accuracy = accuracy;
    run->training_speed = 100 * (double)seed;
    run->peak_bytes = 1000 * (double)seed;
    return;
  }
  fail();
}

static void the_best_learning_rate_counts(void **state) {
  (void)state;
  attn_comparison_options o = small_options();
  attn_comparison c;
  attn_comparison_row rows[2];
  o.seeds = 2, o.rate_count = 2;
  assert_ok(attn_comparison_open(&o, &c));
  assert_int_equal(c.run_count, 8);
  /* The first rate has the lower mean, though the second has the best single run. */
  finish(&c, 0, 1, rates[0], 0.3, 0.8), finish(&c, 0, 2, rates[0], 0.4, 0.6);
  finish(&c, 0, 1, rates[1], 0.1, 0.99), finish(&c, 0, 2, rates[1], 0.9, 0.51);
  /* A rate with a failed run does not count, however good the others are. */
  finish(&c, 1, 1, rates[0], 0.0, 1.0);
  finish(&c, 1, 1, rates[1], 0.5, 0.9), finish(&c, 1, 2, rates[1], 0.5, 0.7);
  for (int i = 0; i < c.run_count; ++i)
    if (c.runs[i].stage == ATTN_RUN_WAITING) c.runs[i].stage = ATTN_RUN_FAILED;
  attn_comparison_rows(&c, rows);
  assert_string_equal(rows[0].model->mixer, "lightning");
  assert_true(rows[0].finished && rows[0].learning_rate == rates[1] && !rows[0].problem);
  assert_float_equal(rows[0].accuracy, 0.8, 1e-12);
  assert_string_equal(rows[1].model->mixer, "softmax");
  assert_true(rows[1].finished && rows[1].learning_rate == rates[0]);
  assert_float_equal(rows[1].accuracy, 0.7, 1e-12);
  assert_true(rows[1].least == 0.6 && rows[1].most == 0.8);
  assert_float_equal(rows[1].deviation, 0.1 * sqrt(2), 1e-12);
  assert_float_equal(rows[1].validation_loss, 0.35, 1e-12);
  assert_float_equal(rows[1].training_speed, 150, 1e-9);
  assert_true(rows[1].peak_bytes == 2000);
  attn_comparison_close(&c);
}

static void mixers_without_an_outcome_come_last(void **state) {
  (void)state;
  attn_comparison_options o = small_options();
  attn_comparison c;
  attn_comparison_row rows[2];
  assert_ok(attn_comparison_open(&o, &c));
  finish(&c, 1, 1, rates[0], 3, 0);
  c.runs[0].stage = ATTN_RUN_FAILED;
  snprintf(c.runs[0].problem, ATTN_PROBLEM_SIZE, "no luck");
  attn_comparison_rows(&c, rows);
  assert_true(rows[0].finished && isnan(rows[0].deviation)); /* of one seed */
  assert_true(!rows[1].finished && isnan(rows[1].accuracy));
  assert_string_equal(rows[1].problem, "no luck");
  /* A model that cannot be made has no runs, and no outcome either. */
  snprintf(c.problems[0], ATTN_PROBLEM_SIZE, "no model");
  c.runs[0].model = 1;
  c.runs[0].learning_rate = 7;
  attn_comparison_rows(&c, rows);
  assert_string_equal(rows[1].problem, "no model");
  attn_comparison_close(&c);
}

/* Runs ------------------------------------------------------------------------------------------
 */

typedef struct journal {
  int steps, ends, earlier;
  int stop_after, fault_after; /* steps in all; 0: never */
} journal;

static bool record(void *context, const attn_comparison_progress *p) {
  journal *seen = context;
  assert_true(p->number >= 1 && p->number <= p->runs);
  seen->steps += p->training != NULL;
  seen->ends += !p->training;
  seen->earlier += !p->training && p->run->earlier;
  if (seen->fault_after && seen->steps == seen->fault_after) attn_fault_arm(ATTN_FAULT_IO, 0);
  if (!p->training) attn_fault_disarm(ATTN_FAULT_IO);
  return seen->steps != seen->stop_after || !seen->stop_after;
}

static void runs_are_done_once(void **state) {
  (void)state;
  attn_comparison_options o = small_options();
  attn_comparison c;
  double accuracy[2], validation[2];
  journal seen = {0};
  assert_ok(attn_comparison_open(&o, &c));
  assert_ok(attn_comparison_run_all(&c, record, &seen));
  assert_int_equal(seen.steps, 6);
  assert_int_equal(seen.ends, 2);
  assert_int_equal(seen.earlier, 0);
  for (int i = 0; i < 2; ++i) {
    assert_int_equal(c.runs[i].stage, ATTN_RUN_FINISHED);
    assert_true(c.runs[i].training_speed > 0 && c.runs[i].decode_speed > 0);
    accuracy[i] = c.runs[i].accuracy, validation[i] = c.runs[i].validation_loss;
  }
  attn_comparison_close(&c);

  seen = (journal){0};
  o.seeds = 2;
  assert_ok(attn_comparison_open(&o, &c));
  assert_ok(attn_comparison_run_all(&c, record, &seen));
  assert_int_equal(seen.steps, 6); /* of the seed that is new */
  assert_int_equal(seen.earlier, 2);
  for (int i = 0; i < 2; ++i)
    assert_true(c.runs[i].accuracy == accuracy[i] && c.runs[i].validation_loss == validation[i]);
  attn_comparison_close(&c);

  seen = (journal){0};
  o.fresh = true;
  assert_ok(attn_comparison_open(&o, &c));
  assert_ok(attn_comparison_run_all(&c, record, &seen));
  assert_int_equal(seen.steps, 12);
  for (int i = 0; i < 2; ++i) assert_true(c.runs[i].accuracy == accuracy[i]);
  attn_comparison_close(&c);
}

static void other_options_are_refused(void **state) {
  (void)state;
  attn_comparison_options o = small_options(), other[5];
  static const char *const words[] = {"steps", "length", "feed_forward", "batch", "test_examples"};
  attn_comparison c;
  assert_ok(attn_comparison_open(&o, &c));
  assert_ok(attn_comparison_run_all(&c, NULL, NULL));
  attn_comparison_close(&c);
  for (int i = 0; i < 5; ++i) other[i] = o;
  other[0].training.steps = 4;
  other[1].task_options.length = 9;
  other[2].feed_forward = 40;
  other[3].training.batch = 3;
  other[4].test_examples = 5;
  for (int i = 0; i < 5; ++i) {
    assert_int_equal(attn_comparison_open(&other[i], &c), ATTN_INVALID_ARGUMENT);
    if (!strstr(attn_error_message(), words[i]))
      fail_msg("expected %s in: %s", words[i], attn_error_message());
    attn_comparison_close(&c);
  }
}

/* Stopped in the second run, which then continues where it was. */
static void a_stop_loses_nothing(void **state) {
  (void)state;
  attn_comparison_options o = small_options();
  attn_comparison c;
  journal seen = {.stop_after = 5};
  assert_ok(attn_comparison_open(&o, &c));
  assert_int_equal(attn_comparison_run_all(&c, record, &seen), ATTN_INTERRUPTED);
  assert_int_equal(c.runs[0].stage, ATTN_RUN_FINISHED);
  assert_int_equal(c.runs[1].stage, ATTN_RUN_WAITING);
  attn_comparison_close(&c);
  seen = (journal){0};
  assert_ok(attn_comparison_open(&o, &c));
  assert_ok(attn_comparison_run_all(&c, record, &seen));
  assert_int_equal(seen.steps, 1);
  assert_int_equal(seen.earlier, 1);
  attn_comparison_close(&c);
}

/* A full disk at the end of the first run: the other one is done, and the first one later. */
static void what_failed_is_tried_again(void **state) {
  (void)state;
  attn_comparison_options o = small_options();
  attn_comparison c;
  journal seen = {.fault_after = 3};
  assert_ok(attn_comparison_open(&o, &c));
  assert_ok(attn_comparison_run_all(&c, record, &seen));
  assert_int_equal(c.runs[0].stage, ATTN_RUN_FAILED);
  assert_true(strlen(c.runs[0].problem) > 0);
  assert_int_equal(c.runs[1].stage, ATTN_RUN_FINISHED);
  attn_comparison_close(&c);
  seen = (journal){0};
  assert_ok(attn_comparison_open(&o, &c));
  assert_ok(attn_comparison_run_all(&c, record, &seen));
  assert_int_equal(c.runs[0].stage, ATTN_RUN_FINISHED);
  assert_int_equal(seen.earlier, 1);
  attn_comparison_close(&c);
}

/* Every file operation fails once, and all after it: an error or a failed run, and what is done
 * afterwards is right. */
static void io_faults_lose_nothing(void **state) {
  (void)state;
  attn_comparison_options o = small_options();
  attn_comparison c;
  bool hit = true;
  double accuracy = NAN;
  int faults = 0;
  o.mixer_count = 1;
  for (int skip = 0; hit; skip += 1 + skip / 8) {
    o.fresh = true;
    assert_ok(attn_comparison_open(&o, &c));
    attn_fault_arm(ATTN_FAULT_IO, skip);
    attn_status status = attn_comparison_run_all(&c, NULL, NULL);
    if (status == ATTN_OK) status = attn_comparison_write(&c);
    hit = attn_fault_disarm(ATTN_FAULT_IO);
    faults += hit;
    assert_true(status == ATTN_OK || (hit && status == ATTN_IO_ERROR));
    attn_comparison_close(&c);
    o.fresh = false;
    assert_ok(attn_comparison_open(&o, &c));
    assert_ok(attn_comparison_run_all(&c, NULL, NULL));
    assert_int_equal(c.runs[0].stage, ATTN_RUN_FINISHED);
    if (isnan(accuracy)) accuracy = c.runs[0].accuracy;
    assert_true(c.runs[0].accuracy == accuracy);
    attn_comparison_close(&c);
  }
  assert_true(faults > 10);
}

/* Refusals --------------------------------------------------------------------------------------
 */

static void wrong_options_are_refused(void **state) {
  (void)state;
  static const char *const twice[] = {"softmax", "softmax"}, *const unknown[] = {"softmix"};
  static const double same[] = {0.1, 0.1};
  enum { CASES = 12 };
  attn_comparison_options o[CASES];
  const char *words[CASES];
  int n = 0;
  for (int i = 0; i < CASES; ++i) o[i] = small_options();
#define CASE(change, word) (o[n].change, words[n++] = (word))
  CASE(mixer_count = 0, "mixers");
  CASE(mixers = twice, "twice");
  o[n].mixer_count = 1;
  CASE(mixers = unknown, "softmix");
  CASE(rate_count = 0, "learning rates");
  o[n].rate_count = 2;
  CASE(learning_rates = same, "twice");
  CASE(seeds = 0, "seeds");
  CASE(width = 0, "width");
  CASE(heads = 17, "heads");
  CASE(feed_forward = -1, "feed_forward");
  CASE(test_examples = 0, "test_examples");
  CASE(task = "recite", "recite");
  CASE(task_options.pairs = 2, "pairs");
#undef CASE
  assert_int_equal(n, CASES);
  size_t live = attn_memory_get_stats().live_bytes;
  for (int i = 0; i < CASES; ++i) {
    attn_comparison c;
    attn_status status = attn_comparison_open(&o[i], &c);
    if (status == ATTN_OK || !strstr(attn_error_message(), words[i]))
      fail_msg("case %d: expected \"%s\" in: %s", i, words[i], attn_error_message());
    attn_comparison_close(&c);
    assert_int_equal(attn_memory_get_stats().live_bytes, live);
  }
}

static attn_status open_and_tell(const attn_comparison_options *o) {
  attn_comparison c;
  attn_status status = attn_comparison_open(o, &c);
  if (status == ATTN_OK) status = attn_comparison_write(&c);
  attn_comparison_close(&c);
  return status;
}

static void out_of_memory_is_an_error(void **state) {
  (void)state;
  attn_comparison_options o = small_options();
  attn_comparison c;
  assert_ok(attn_comparison_open(&o, &c));
  assert_ok(attn_comparison_run_all(&c, NULL, NULL));
  attn_comparison_close(&c);
  assert_ok(open_and_tell(&o));
  size_t live = attn_memory_get_stats().live_bytes;
  bool hit = true;
  for (int skip = 0; hit; ++skip) {
    attn_fault_arm(ATTN_FAULT_ALLOC, skip);
    attn_status status = open_and_tell(&o);
    hit = attn_fault_disarm(ATTN_FAULT_ALLOC);
    assert_int_equal(status, hit ? ATTN_OUT_OF_MEMORY : ATTN_OK);
    assert_int_equal(attn_memory_get_stats().live_bytes, live);
  }
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, make_place, remove_place)

int main(void) {
  const struct CMUnitTest tests[] = {
      TEST(models_have_equal_parameters),        TEST(the_best_learning_rate_counts),
      TEST(mixers_without_an_outcome_come_last), TEST(runs_are_done_once),
      TEST(other_options_are_refused),           TEST(a_stop_loses_nothing),
      TEST(what_failed_is_tried_again),          TEST(io_faults_lose_nothing),
      TEST(wrong_options_are_refused),           TEST(out_of_memory_is_an_error),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
