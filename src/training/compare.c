/* The runs of a comparison, one after the other, and what they say together. */
#include "training/compare.h"
#include "base/io.h"
#include "base/memory.h"
#include "base/status.h"
#include "engines/plan.h"
#include "models/model.h"
#include "tensor/device.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Whatever seed a model was trained from; what `attn eval` takes unless it is told otherwise. */
static const uint64_t test_seed = 0;

enum { DECODED = 64, DECODED_BEFORE = 8 }; /* tokens that are timed; and not, before them */

/* Opening ---------------------------------------------------------------------------------------
 */

static attn_status check_counts(const attn_comparison_options *o) {
  const int64_t most_runs = 100000;
  const struct {
    const char *name;
    int64_t value, least, most;
  } checks[] = {
      {"mixers", o->mixer_count, 1, attn_mixer_count()},
      {"learning rates", o->rate_count, 1, most_runs},
      {"seeds", o->seeds, 1, most_runs},
      {"runs", o->mixer_count * o->rate_count * o->seeds, 1, most_runs},
      {"width", o->width, 1, ATTN_MOST_HIDDEN},
      {"layers", o->layers, 1, ATTN_MOST_LAYERS},
      {"heads", o->heads, 1, o->width},
      {"feed_forward", o->feed_forward, 1, ATTN_MOST_WIDTH},
      {"test_examples", o->test_examples, 1, INT32_MAX},
  };
  for (size_t i = 0; i < sizeof checks / sizeof *checks; ++i)
    if (checks[i].value < checks[i].least || checks[i].value > checks[i].most)
      return attn_fail(ATTN_INVALID_ARGUMENT, "comparison: %s is %lld, expected %lld to %lld",
                       checks[i].name, (long long)checks[i].value, (long long)checks[i].least,
                       (long long)checks[i].most);
  return ATTN_OK;
}

static attn_status check_lists(const attn_comparison_options *o) {
  int index;
  for (int i = 0; i < o->mixer_count; ++i) {
    ATTN_TRY(attn_mixer_find(o->mixers[i], &index));
    for (int j = 0; j < i; ++j)
      if (strcmp(o->mixers[i], o->mixers[j]) == 0)
        return attn_fail(ATTN_INVALID_ARGUMENT, "comparison: the mixer %s is given twice",
                         o->mixers[i]);
  }
  for (int i = 0; i < o->rate_count; ++i)
    for (int j = 0; j < i; ++j)
      if (o->learning_rates[i] == o->learning_rates[j])
        return attn_fail(ATTN_INVALID_ARGUMENT, "comparison: the learning rate %g is given twice",
                         o->learning_rates[i]);
  if (!o->output || !*o->output)
    return attn_fail(ATTN_INVALID_ARGUMENT, "comparison: no output directory is given");
  return ATTN_OK;
}

static attn_status settle(attn_comparison *c) {
  attn_comparison_options *o = &c->options;
  if (!o->feed_forward) o->feed_forward = 2 * o->width;
  ATTN_TRY(check_counts(o));
  ATTN_TRY(check_lists(o));
  ATTN_TRY(attn_task_find(o->task, &c->task));
  return attn_task_settle(c->task, &o->task_options);
}

/* Seeds outermost: what is stopped early has compared all mixers. */
static void list_runs(attn_comparison *c) {
  const attn_comparison_options *o = &c->options;
  for (int64_t s = 0; s < o->seeds; ++s)
    for (int m = 0; m < c->model_count; ++m)
      for (int r = 0; r < o->rate_count && !*c->problems[m]; ++r) {
        attn_comparison_run *run = &c->runs[c->run_count++];
        run->model = m;
        run->seed = o->training.seed + (uint64_t)s;
        run->learning_rate = o->learning_rates[r];
        snprintf(run->name, sizeof run->name, "%s-seed%llu-rate%.9g", c->models[m].mixer,
                 (unsigned long long)run->seed, run->learning_rate);
      }
}

attn_status attn_comparison_open(const attn_comparison_options *options, attn_comparison *c) {
  *c = (attn_comparison){.options = *options};
  ATTN_TRY(settle(c));
  size_t models = (size_t)options->mixer_count;
  size_t runs = models * (size_t)options->rate_count * (size_t)options->seeds;
  c->model_count = options->mixer_count;
  c->models = attn_alloc_array(models, sizeof *c->models);
  c->problems = attn_alloc_array(models, sizeof *c->problems);
  c->runs = attn_alloc_array(runs, sizeof *c->runs);
  if (!c->models || !c->problems || !c->runs) return ATTN_OUT_OF_MEMORY;
  ATTN_TRY(attn_comparison_fit(c));
  list_runs(c);
  for (int i = 0; i < c->run_count; ++i) ATTN_TRY(attn_comparison_read_run(c, &c->runs[i]));
  return attn_make_directories(c->options.output);
}

void attn_comparison_close(attn_comparison *c) {
  attn_free(c->models);
  attn_free(c->problems);
  attn_free(c->runs);
  *c = (attn_comparison){0};
}

/* One run ---------------------------------------------------------------------------------------
 */

typedef struct runner {
  const attn_comparison *c;
  attn_comparison_run *run;
  attn_comparison_progress_fn progress;
  void *context;
  bool stop; /* the caller wants to */
} runner;

static void report(runner *r, const attn_training_progress *training) {
  attn_comparison_progress p = {.run = r->run,
                                .mixer = r->c->models[r->run->model].mixer,
                                .number = (int)(r->run - r->c->runs) + 1,
                                .runs = r->c->run_count,
                                .training = training};
  if (r->progress && !r->progress(r->context, &p)) r->stop = true;
}

static bool report_step(void *context, const attn_training_progress *p) {
  runner *r = context;
  report(r, p);
  return !r->stop;
}

static bool asked_to_stop(const runner *r) {
  const volatile sig_atomic_t *interrupt = r->c->options.training.interrupt;
  return r->stop || (interrupt && *interrupt);
}

/* diverged: the failure follows from the options, so that it need not be tried again. */
static attn_status train(runner *r, const char *folder, bool *diverged) {
  const attn_comparison_options *o = &r->c->options;
  attn_training_options t = o->training;
  attn_training_result result;
  char *config = attn_comparison_config(r->c, &r->c->models[r->run->model]);
  if (!config) return ATTN_OUT_OF_MEMORY;
  t.config = config;
  t.task = o->task;
  t.task_vocabulary = o->task_options.vocabulary;
  t.length = o->task_options.length;
  t.task_pairs = o->task_options.pairs;
  t.task_power = o->task_options.power;
  t.task_zeros = o->task_options.zeros;
  t.seed = r->run->seed;
  t.learning_rate = r->run->learning_rate;
  t.output = folder;
  t.save_dtype = ATTN_F32;
  t.validation_every = 0;
  attn_device_reset_peak(t.device);
  attn_status status = attn_train(&t, report_step, r, &result);
  attn_free(config);
  bool measured = result.steps > result.first_step;
  *diverged = status == ATTN_INVALID_ARGUMENT && result.skipped > 0;
  r->run->loss = result.loss;
  r->run->validation_loss = result.validation_loss;
  r->run->training_speed = measured ? result.tokens_per_second : NAN;
  r->run->seconds = result.seconds;
  r->run->peak_bytes = (double)result.peak_bytes;
  return status;
}

static double speed(double tokens, double seconds) {
  return seconds > 0 ? tokens / seconds : NAN;
}

/* One sequence, behind `length` tokens. */
static attn_status time_decoding(const attn_model *model, const int32_t *tokens, int64_t length,
                                 double *rate) {
  attn_session_options options = ATTN_SESSION_OPTIONS_INIT;
  attn_session *session;
  double start = 0;
  options.max_tokens = length + DECODED_BEFORE + DECODED;
  options.forks = 1;
  options.checkpoints = 0;
  ATTN_TRY(attn_session_create(model, &options, &session));
  attn_status status = attn_session_feed(session, tokens, length);
  for (int i = 0; i < DECODED_BEFORE + DECODED && status == ATTN_OK; ++i) {
    if (i == DECODED_BEFORE) start = attn_seconds();
    status = attn_session_feed(session, &tokens[i % length], 1);
  }
  *rate = speed(DECODED, attn_seconds() - start);
  attn_session_destroy(session);
  return status;
}

static attn_status answer(runner *r, const attn_model *model) {
  const attn_comparison_options *o = &r->c->options;
  int64_t length = o->task_options.length, count = o->test_examples * length;
  int32_t *inputs = attn_alloc_array((size_t)count, 2 * sizeof *inputs);
  if (!inputs) return ATTN_OUT_OF_MEMORY;
  attn_status status = attn_task_generate(r->c->task, &o->task_options, test_seed, ATTN_TASK_TEST,
                                          0, o->test_examples, inputs, inputs + count);
  double start = attn_seconds();
  if (status == ATTN_OK)
    status = attn_model_accuracy(model, inputs, inputs + count, o->test_examples, length,
                                 &r->run->accuracy);
  r->run->test_speed = speed((double)count, attn_seconds() - start);
  if (status == ATTN_OK) status = time_decoding(model, inputs, length, &r->run->decode_speed);
  attn_free(inputs);
  return status;
}

static attn_status test(runner *r, const char *folder) {
  const attn_training_options *t = &r->c->options.training;
  attn_model *model = NULL;
  attn_status status = attn_model_load(folder, t->compute, &model);
  if (status == ATTN_OK) status = attn_model_move(model, t->device);
  if (status == ATTN_OK) status = answer(r, model);
  attn_model_destroy(model);
  return status;
}

/* Only what ends the comparison is returned. */
static attn_status do_run(runner *r) {
  char *folder = attn_comparison_path(r->c, r->run, NULL);
  bool diverged = false;
  if (!folder) return ATTN_OUT_OF_MEMORY;
  attn_status status = attn_comparison_write_run(r->c, r->run);
  if (status != ATTN_OK) {
    attn_free(folder);
    return status;
  }
  status = train(r, folder, &diverged);
  if (status == ATTN_OK) status = test(r, folder);
  attn_free(folder);
  if (status == ATTN_INTERRUPTED) return status;
  r->run->stage = status == ATTN_OK ? ATTN_RUN_FINISHED : ATTN_RUN_FAILED;
  if (status != ATTN_OK)
    snprintf(r->run->problem, sizeof r->run->problem, "%s", attn_error_message());
  return status == ATTN_OK || diverged ? attn_comparison_write_run(r->c, r->run) : ATTN_OK;
}

attn_status attn_comparison_run_all(attn_comparison *c, attn_comparison_progress_fn progress,
                                    void *context) {
  runner r = {.c = c, .progress = progress, .context = context};
  for (int i = 0; i < c->run_count; ++i) {
    r.run = &c->runs[i];
    if (r.run->stage == ATTN_RUN_WAITING) {
      if (asked_to_stop(&r)) return attn_fail(ATTN_INTERRUPTED, "comparison: stopped");
      ATTN_TRY(do_run(&r));
    }
    report(&r, NULL);
  }
  return ATTN_OK;
}

/* Outcomes --------------------------------------------------------------------------------------
 */

static bool belongs(const attn_comparison *c, const attn_comparison_run *run,
                    const attn_comparison_row *row) {
  return &c->models[run->model] == row->model && run->learning_rate == row->learning_rate;
}

/* The mean validation loss of the row's mixer and learning rate; infinite when not all of its runs
 * are finished. */
static double mean_validation(const attn_comparison *c, const attn_comparison_row *row) {
  double sum = 0;
  int64_t finished = 0;
  for (int i = 0; i < c->run_count; ++i) {
    if (!belongs(c, &c->runs[i], row) || c->runs[i].stage != ATTN_RUN_FINISHED) continue;
    sum += c->runs[i].validation_loss;
    ++finished;
  }
  return finished == c->options.seeds ? sum / (double)finished : INFINITY;
}

static void choose_rate(const attn_comparison *c, attn_comparison_row *row) {
  double best = NAN;
  row->validation_loss = INFINITY;
  for (int i = 0; i < c->options.rate_count; ++i) {
    row->learning_rate = c->options.learning_rates[i];
    double loss = mean_validation(c, row);
    if (loss >= row->validation_loss) continue;
    row->validation_loss = loss;
    best = row->learning_rate;
  }
  row->learning_rate = best;
  row->finished = isfinite(row->validation_loss);
}

static void add_up(const attn_comparison *c, attn_comparison_row *row) {
  double seeds = (double)c->options.seeds, squares = 0;
  row->least = INFINITY;
  row->most = -INFINITY;
  for (int i = 0; i < c->run_count; ++i) {
    const attn_comparison_run *run = &c->runs[i];
    if (!belongs(c, run, row)) continue;
    row->accuracy += run->accuracy / seeds;
    row->least = fmin(row->least, run->accuracy);
    row->most = fmax(row->most, run->accuracy);
    row->training_speed += run->training_speed / seeds;
    row->test_speed += run->test_speed / seeds;
    row->decode_speed += run->decode_speed / seeds;
    row->peak_bytes = fmax(row->peak_bytes, run->peak_bytes);
  }
  for (int i = 0; i < c->run_count; ++i)
    if (belongs(c, &c->runs[i], row)) squares += pow(c->runs[i].accuracy - row->accuracy, 2);
  row->deviation = c->options.seeds > 1 ? sqrt(squares / (seeds - 1)) : NAN;
}

static const char *find_problem(const attn_comparison *c, int model) {
  if (*c->problems[model]) return c->problems[model];
  for (int i = 0; i < c->run_count; ++i)
    if (c->runs[i].model == model && c->runs[i].stage == ATTN_RUN_FAILED) return c->runs[i].problem;
  return NULL;
}

static void make_row(const attn_comparison *c, int model, attn_comparison_row *row) {
  const attn_comparison_model *m = &c->models[model];
  *row = (attn_comparison_row){.model = m};
  row->state_bytes = m->state_fixed_bytes + m->state_token_bytes * c->options.task_options.length;
  choose_rate(c, row);
  if (row->finished) {
    add_up(c, row);
    return;
  }
  row->problem = find_problem(c, model);
  row->validation_loss = row->accuracy = row->least = row->most = row->deviation = NAN;
  row->training_speed = row->test_speed = row->decode_speed = row->peak_bytes = NAN;
}

static int by_accuracy(const void *a, const void *b) {
  const attn_comparison_row *x = a, *y = b;
  if (x->finished != y->finished) return x->finished ? -1 : 1;
  if (x->finished && x->accuracy != y->accuracy) return x->accuracy > y->accuracy ? -1 : 1;
  if (x->state_bytes != y->state_bytes) return x->state_bytes < y->state_bytes ? -1 : 1;
  return strcmp(x->model->mixer, y->model->mixer);
}

void attn_comparison_rows(const attn_comparison *c, attn_comparison_row *rows) {
  for (int m = 0; m < c->model_count; ++m) make_row(c, m, &rows[m]);
  qsort(rows, (size_t)c->model_count, sizeof *rows, by_accuracy);
}
