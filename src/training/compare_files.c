/* What a comparison keeps in files: run.json of each run, and results.json. */
#include "base/io.h"
#include "base/memory.h"
#include "base/status.h"
#include "base/text.h"
#include "files/json.h"
#include "tensor/device.h"
#include "training/compare.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static json_t *real(double value) {
  return isfinite(value) ? json_real(value) : json_null();
}

static attn_status out_of_memory(void) {
  return attn_fail(ATTN_OUT_OF_MEMORY, "comparison: out of memory");
}

char *attn_comparison_path(const attn_comparison *c, const attn_comparison_run *run,
                           const char *file) {
  char *runs = attn_path_join(c->options.output, "runs");
  char *folder = runs ? attn_path_join(runs, run->name) : NULL;
  char *path = folder && file ? attn_path_join(folder, file) : NULL;
  attn_free(runs);
  if (file) attn_free(folder);
  return file ? path : folder;
}

/* Options ---------------------------------------------------------------------------------------
 */

static json_t *task_json(const attn_comparison *c) {
  const attn_task_options *o = &c->options.task_options;
  return json_pack("{s:s, s:I, s:I, s:I, s:f, s:b}", "task", c->task->name, "vocabulary",
                   (json_int_t)o->vocabulary, "length", (json_int_t)o->length, "pairs",
                   (json_int_t)o->pairs, "power", o->power, "zeros", o->zeros);
}

static json_t *training_json(const attn_comparison *c) {
  const attn_training_options *o = &c->options.training;
  return json_pack("{s:I, s:I, s:I, s:s, s:f, s:I, s:I, s:f, s:f, s:f, s:f, s:f, s:I, s:s, s:s}",
                   "steps", (json_int_t)o->steps, "batch", (json_int_t)o->batch, "accumulation",
                   (json_int_t)o->accumulation, "schedule", o->schedule, "final_rate",
                   o->final_rate, "warmup", (json_int_t)o->warmup, "decay", (json_int_t)o->decay,
                   "beta1", o->beta1, "beta2", o->beta2, "epsilon", o->epsilon, "weight_decay",
                   o->weight_decay, "clip", o->clip, "validation_examples",
                   (json_int_t)o->validation_windows, "compute", attn_dtype_name(o->compute),
                   "device", attn_is_cuda(o->device) ? "cuda" : "cpu");
}

/* What decides the numbers of a run. */
static json_t *identity(const attn_comparison *c, const attn_comparison_run *run) {
  const attn_comparison_options *o = &c->options;
  const attn_comparison_model *model = &c->models[run->model];
  json_t *all = json_pack("{s:s, s:I, s:I, s:I, s:I, s:I, s:f, s:I}", "mixer", model->mixer,
                          "width", (json_int_t)o->width, "layers", (json_int_t)o->layers, "heads",
                          (json_int_t)o->heads, "feed_forward", (json_int_t)model->feed_forward,
                          "seed", (json_int_t)run->seed, "learning_rate", run->learning_rate,
                          "test_examples", (json_int_t)o->test_examples);
  json_t *task = task_json(c), *training = training_json(c);
  bool whole = all && task && training && json_object_update(all, task) == 0 &&
               json_object_update(all, training) == 0;
  json_decref(task);
  json_decref(training);
  if (whole) return all;
  json_decref(all);
  out_of_memory();
  return NULL;
}

static void add_value(attn_text *text, const json_t *value) {
  char *shown = value ? json_dumps(value, JSON_ENCODE_ANY | JSON_REAL_PRECISION(6)) : NULL;
  attn_text_print(text, "%s", shown ? shown : "absent");
  free(shown); /* jansson's own allocation */
}

/* ATTN_INVALID_ARGUMENT names all differences. */
static attn_status compare_options(const json_t *there, const json_t *here, const char *path) {
  const char *key;
  json_t *value;
  attn_text differences = {0};
  json_object_foreach((json_t *)(uintptr_t)here, key, value) {
    const json_t *other = json_object_get(there, key);
    if (other && json_equal((json_t *)(uintptr_t)other, value)) continue;
    attn_text_print(&differences, "%s%s is ", differences.length ? ", " : "", key);
    add_value(&differences, other);
    attn_text_print(&differences, " there and ");
    add_value(&differences, value);
    attn_text_print(&differences, " here");
  }
  attn_status status = ATTN_OK;
  if (differences.failed)
    status = ATTN_OUT_OF_MEMORY;
  else if (differences.length)
    status = attn_fail(ATTN_INVALID_ARGUMENT,
                       "%s is of a run with other options: %s; name another directory, or begin "
                       "afresh",
                       path, differences.data);
  attn_text_free(&differences);
  return status;
}

/* Results ---------------------------------------------------------------------------------------
 */

typedef struct field {
  const char *key;
  size_t offset;
  attn_json_need need;
} field;

/* The numbers of a finished run; speeds may be unknown. */
static const field fields[] = {
    {"loss", offsetof(attn_comparison_run, loss), ATTN_OPTIONAL},
    {"validation_loss", offsetof(attn_comparison_run, validation_loss), ATTN_REQUIRED},
    {"accuracy", offsetof(attn_comparison_run, accuracy), ATTN_REQUIRED},
    {"training_tokens_per_second", offsetof(attn_comparison_run, training_speed), ATTN_OPTIONAL},
    {"test_tokens_per_second", offsetof(attn_comparison_run, test_speed), ATTN_OPTIONAL},
    {"decode_tokens_per_second", offsetof(attn_comparison_run, decode_speed), ATTN_OPTIONAL},
    {"seconds", offsetof(attn_comparison_run, seconds), ATTN_OPTIONAL},
    {"peak_bytes", offsetof(attn_comparison_run, peak_bytes), ATTN_OPTIONAL},
};
enum { FIELDS = sizeof fields / sizeof *fields };

static double *field_of(const attn_comparison_run *run, int i) {
  return (double *)((uintptr_t)run + fields[i].offset);
}

static json_t *result_json(const attn_comparison_run *run) {
  if (run->stage == ATTN_RUN_FAILED) return json_pack("{s:s}", "problem", run->problem);
  json_t *result = json_object();
  for (int i = 0; result && i < FIELDS; ++i)
    json_object_set_new(result, fields[i].key, real(*field_of(run, i)));
  return result;
}

static attn_status read_result(const json_t *result, attn_comparison_run *run) {
  const char *problem = NULL;
  ATTN_TRY(attn_json_string(result, "problem", ATTN_OPTIONAL, &problem));
  if (problem) snprintf(run->problem, sizeof run->problem, "%s", problem);
  for (int i = 0; i < FIELDS && !problem; ++i) {
    *field_of(run, i) = NAN;
    ATTN_TRY(attn_json_double(result, fields[i].key, fields[i].need, 0, DBL_MAX, field_of(run, i)));
  }
  run->stage = problem ? ATTN_RUN_FAILED : ATTN_RUN_FINISHED;
  run->earlier = true;
  return ATTN_OK;
}

/* run.json --------------------------------------------------------------------------------------
 */

static attn_status take_run(const attn_comparison *c, attn_comparison_run *run, const json_t *read,
                            const char *path) {
  json_t *there = NULL, *result = NULL, *here = identity(c, run);
  if (!here) return ATTN_OUT_OF_MEMORY;
  attn_status status = attn_json_object(read, "options", ATTN_REQUIRED, &there);
  if (status == ATTN_OK) status = attn_json_object(read, "result", ATTN_OPTIONAL, &result);
  if (status == ATTN_OK && result) status = read_result(result, run);
  if (status != ATTN_OK)
    attn_fail_in(status, "%s", path);
  else
    status = compare_options(there, here, path);
  json_decref(here);
  return status;
}

static attn_status remove_file(const attn_comparison *c, const attn_comparison_run *run,
                               const char *name) {
  char *path = attn_comparison_path(c, run, name);
  if (!path) return ATTN_OUT_OF_MEMORY;
  attn_status status = attn_path_exists(path) ? attn_file_remove(path) : ATTN_OK;
  attn_free(path);
  return status;
}

attn_status attn_comparison_read_run(const attn_comparison *c, attn_comparison_run *run) {
  if (c->options.fresh) {
    ATTN_TRY(remove_file(c, run, "run.json"));
    return remove_file(c, run, "training.safetensors");
  }
  char *path = attn_comparison_path(c, run, "run.json");
  json_t *read = NULL;
  if (!path) return ATTN_OUT_OF_MEMORY;
  attn_status status = attn_path_exists(path) ? attn_json_load(path, &read) : ATTN_OK;
  if (read) status = take_run(c, run, read, path);
  json_decref(read);
  attn_free(path);
  return status;
}

attn_status attn_comparison_write_run(const attn_comparison *c, const attn_comparison_run *run) {
  char *folder = attn_comparison_path(c, run, NULL);
  char *path = attn_comparison_path(c, run, "run.json");
  bool over = run->stage != ATTN_RUN_WAITING;
  json_t *options = identity(c, run), *file = NULL;
  if (options)
    file = json_pack("{s:o, s:o*}", "options", options, "result", over ? result_json(run) : NULL);
  attn_status status = folder && path && file ? ATTN_OK : out_of_memory();
  if (status == ATTN_OK) status = attn_make_directories(folder);
  if (status == ATTN_OK) status = attn_json_save(path, file);
  /* The checkpoint is three times the model, and of no more use. */
  if (status == ATTN_OK && over) status = remove_file(c, run, "training.safetensors");
  json_decref(file);
  attn_free(folder);
  attn_free(path);
  return status;
}

/* results.json ----------------------------------------------------------------------------------
 */

static json_t *text_or_null(const char *text) {
  return text && *text ? json_string(text) : json_null();
}

static json_t *accuracies(const attn_comparison *c, const attn_comparison_row *row) {
  json_t *all = json_array();
  for (int i = 0; i < c->run_count; ++i)
    if (&c->models[c->runs[i].model] == row->model && row->finished &&
        c->runs[i].learning_rate == row->learning_rate)
      json_array_append_new(all, real(c->runs[i].accuracy));
  return all;
}

static json_t *row_json(const attn_comparison *c, const attn_comparison_row *r) {
  const attn_comparison_model *m = r->model;
  return json_pack(
      "{s:s, s:o, s:I, s:I, s:{s:I, s:I, s:I}, s:{s:o, s:o, s:o, s:o, s:o}, s:o, s:o, s:o, s:o, "
      "s:o, s:o}",
      "mixer", m->mixer, "problem", text_or_null(r->problem), "parameters",
      (json_int_t)m->parameters, "feed_forward", (json_int_t)m->feed_forward, "state_bytes",
      "fixed", (json_int_t)m->state_fixed_bytes, "per_token", (json_int_t)m->state_token_bytes,
      "at_length", (json_int_t)r->state_bytes, "accuracy", "mean", real(r->accuracy), "least",
      real(r->least), "most", real(r->most), "deviation", real(r->deviation), "seeds",
      accuracies(c, r), "learning_rate", real(r->learning_rate), "validation_loss",
      real(r->validation_loss), "training_tokens_per_second", real(r->training_speed),
      "test_tokens_per_second", real(r->test_speed), "decode_tokens_per_second",
      real(r->decode_speed), "peak_bytes", real(r->peak_bytes));
}

static const char *const stages[] = {"waiting", "finished", "failed"};

static json_t *run_json(const attn_comparison *c, const attn_comparison_run *run) {
  json_t *all = json_pack("{s:s, s:s, s:I, s:f, s:s}", "name", run->name, "mixer",
                          c->models[run->model].mixer, "seed", (json_int_t)run->seed,
                          "learning_rate", run->learning_rate, "stage", stages[run->stage]);
  json_t *result = run->stage == ATTN_RUN_WAITING ? json_object() : result_json(run);
  json_object_update(all, result);
  json_decref(result);
  return all;
}

static json_t *all_rows(const attn_comparison *c) {
  attn_comparison_row *rows = attn_alloc_array((size_t)c->model_count, sizeof *rows);
  json_t *all = rows ? json_array() : NULL;
  if (rows) attn_comparison_rows(c, rows);
  for (int i = 0; all && i < c->model_count; ++i) json_array_append_new(all, row_json(c, &rows[i]));
  attn_free(rows);
  return all;
}

static json_t *all_runs(const attn_comparison *c) {
  json_t *all = json_array();
  for (int i = 0; i < c->run_count; ++i) json_array_append_new(all, run_json(c, &c->runs[i]));
  return all;
}

static json_t *all_rates(const attn_comparison *c) {
  json_t *all = json_array();
  for (int i = 0; i < c->options.rate_count; ++i)
    json_array_append_new(all, json_real(c->options.learning_rates[i]));
  return all;
}

json_t *attn_comparison_json(const attn_comparison *c) {
  const attn_comparison_options *o = &c->options;
  json_t *all = task_json(c);
  json_t *rest =
      json_pack("{s:s, s:f, s:I, s:{s:I, s:I, s:I}, s:o, s:I, s:I, s:o, s:o, s:o}", "libattn",
                attn_version(), "chance", c->task->chance(&o->task_options), "test_examples",
                (json_int_t)o->test_examples, "model", "width", (json_int_t)o->width, "layers",
                (json_int_t)o->layers, "heads", (json_int_t)o->heads, "training", training_json(c),
                "first_seed", (json_int_t)o->training.seed, "seeds", (json_int_t)o->seeds,
                "learning_rates", all_rates(c), "rows", all_rows(c), "runs", all_runs(c));
  bool whole = all && rest && json_object_update(all, rest) == 0;
  json_decref(rest);
  if (whole) return all;
  json_decref(all);
  return NULL;
}

attn_status attn_comparison_write(const attn_comparison *c) {
  json_t *all = attn_comparison_json(c);
  char *path = attn_path_join(c->options.output, "results.json");
  attn_status status = all && path ? attn_json_save(path, all) : out_of_memory();
  json_decref(all);
  attn_free(path);
  return status;
}
