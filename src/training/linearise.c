/* From a model with exact attention to one with another mixer: the models, their losses, files. */
#include "base/memory.h"
#include "base/status.h"
#include "models/model.h"
#include "training/transfer.h"

#include <math.h>
#include <string.h>
#include <time.h>

typedef struct job {
  attn_linearise_options options;
  attn_linearise_progress_fn progress;
  void *context;
  attn_linearise_result result;
  attn_model *teacher, *student;
  bool *fresh;
  attn_training_data data;
  int32_t *tokens; /* that losses are measured on */
  int64_t count;
} job;

static double seconds_now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static attn_status take_options(const attn_linearise_options *given, job *j) {
  attn_linearise_options *o = &j->options;
  *o = (attn_linearise_options)ATTN_LINEARISE_OPTIONS_INIT;
  if (!given || given->struct_size < sizeof given->struct_size || given->struct_size > sizeof *o)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "linearise: options.struct_size is %zu, expected %zu: begin with "
                     "ATTN_LINEARISE_OPTIONS_INIT",
                     given ? given->struct_size : 0, sizeof *o);
  memcpy(o, given, given->struct_size);
  if (!o->model || !o->output || !o->mixer)
    return attn_fail(ATTN_INVALID_ARGUMENT, "linearise: %s is missing",
                     !o->model    ? "the model"
                     : !o->output ? "the output directory"
                                  : "the mixer");
  if (o->feature_dim < 0 || o->window < 0)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "linearise: feature_dim is %lld, window %lld: expected at least 0",
                     (long long)o->feature_dim, (long long)o->window);
  if (o->keep_every < 0 || o->validation_tokens < 0 || o->steps < 0 || o->batch < 1 ||
      o->length < 1)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "linearise: keep_every is %lld, validation_tokens %lld, steps %lld, batch "
                     "%lld, length %lld: expected at least 0, 0, 0, 1 and 1",
                     (long long)o->keep_every, (long long)o->validation_tokens, (long long)o->steps,
                     (long long)o->batch, (long long)o->length);
  return ATTN_OK;
}

static attn_status open_data(job *j) {
  const attn_linearise_options *o = &j->options;
  attn_training_options t = ATTN_TRAINING_OPTIONS_INIT;
  t.data = o->data;
  t.data_count = o->data_count;
  t.validation_fraction = o->validation_fraction;
  t.seed = o->seed;
  t.batch = o->batch;
  t.length = o->length;
  ATTN_TRY(attn_training_data_open(&t, &j->data));
  ATTN_TRY(attn_training_data_fit(&j->data, j->teacher));
  j->count = attn_corpus_size(j->data.corpus, ATTN_VALIDATION);
  if (j->count > o->validation_tokens) j->count = o->validation_tokens;
  j->tokens = attn_alloc_array((size_t)j->count + 1, sizeof *j->tokens);
  if (!j->tokens) return ATTN_OUT_OF_MEMORY;
  return attn_corpus_read(j->data.corpus, ATTN_VALIDATION, 0, j->count, j->tokens);
}

static attn_status open(job *j) {
  const attn_linearise_options *o = &j->options;
  ATTN_TRY(attn_model_load(o->model, o->compute, &j->teacher));
  ATTN_TRY(attn_model_check_decoder(j->teacher, "linearise"));
  const attn_replacement replacement = {.mixer = o->mixer,
                                        .keep_every = o->keep_every,
                                        .feature_dim = o->feature_dim,
                                        .window = o->window,
                                        .window_kind =
                                            o->sliding ? ATTN_WINDOW_SLIDING : ATTN_WINDOW_TERRACE,
                                        .affine = o->affine};
  ATTN_TRY(attn_model_replace_mixer(j->teacher, &replacement, o->seed, &j->student, &j->fresh));
  ATTN_TRY(open_data(j));
  for (int64_t i = 0; i < j->student->parameter_count; ++i) {
    int64_t count = attn_tensor_count(&j->student->parameters[i].value);
    j->result.parameters += count;
    if (j->fresh[i]) j->result.trained += count;
  }
  ATTN_TRY(attn_model_move(j->teacher, o->device));
  return attn_model_move(j->student, o->device);
}

static attn_status measure(job *j, const attn_model *model, double *loss) {
  if (j->count < 2) return ATTN_OK;
  int64_t window = j->options.length > 1 ? j->options.length : 2;
  return attn_model_evaluate(model, j->tokens, j->count, window, 0, loss,
                             &j->result.validation_tokens);
}

static bool report(void *context, int64_t step, double error) {
  job *j = context;
  if (step == 1) j->result.first_error = error;
  return !j->progress || j->progress(j->context, step, error);
}

static attn_status learn(job *j) {
  const attn_linearise_options *o = &j->options;
  const attn_transfer_options t = {.steps = o->steps,
                                   .batch = o->batch,
                                   .length = o->length,
                                   .learning_rate = o->learning_rate,
                                   .interrupt = o->interrupt};
  return attn_transfer(j->teacher, j->student, j->fresh, &j->data, &t, report, j,
                       &j->result.last_error);
}

static attn_status convert(job *j) {
  const attn_linearise_options *o = &j->options;
  ATTN_TRY(open(j));
  ATTN_TRY(measure(j, j->teacher, &j->result.loss_before));
  ATTN_TRY(measure(j, j->student, &j->result.loss_swapped));
  if (o->steps > 0) {
    ATTN_TRY(learn(j));
    ATTN_TRY(measure(j, j->student, &j->result.loss_after));
  }
  ATTN_TRY(attn_model_save(j->student, o->output, o->save_dtype));
  return attn_model_text_save(j->teacher, o->output);
}

attn_status attn_linearise(const attn_linearise_options *options,
                           attn_linearise_progress_fn progress, void *context,
                           attn_linearise_result *result) {
  job j = {.progress = progress, .context = context};
  double start = seconds_now();
  j.result.loss_before = j.result.loss_swapped = j.result.loss_after = NAN;
  j.result.first_error = j.result.last_error = NAN;
  attn_status status = take_options(options, &j);
  if (status == ATTN_OK) status = convert(&j);
  j.result.seconds = seconds_now() - start;
  if (result) *result = j.result;
  attn_training_data_close(&j.data);
  attn_model_destroy(j.teacher);
  attn_model_destroy(j.student);
  attn_free(j.fresh);
  attn_free(j.tokens);
  return status;
}
