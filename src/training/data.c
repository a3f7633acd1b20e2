#include "training/data.h"
#include "base/memory.h"
#include "base/status.h"
#include "models/model.h"

#include <string.h>

enum { BYTE_VALUES = 256 };

static attn_status open_task(const attn_training_options *o, attn_training_data *d) {
  ATTN_TRY(attn_task_find(o->task, &d->task));
  if (o->data_count > 0)
    return attn_fail(ATTN_INVALID_ARGUMENT, "training: both a text and a task are given");
  d->task_options = (attn_task_options){.vocabulary = o->task_vocabulary,
                                        .length = o->length,
                                        .pairs = o->task_pairs,
                                        .power = o->task_power,
                                        .zeros = o->task_zeros};
  return ATTN_OK;
}

static attn_status check_size(const attn_training_data *d) {
  int64_t size = attn_corpus_size(d->corpus, ATTN_TRAINING);
  if (size > d->length) return ATTN_OK;
  return attn_fail(ATTN_INVALID_ARGUMENT,
                   "training: the text has %lld tokens to train on; windows of %lld tokens need "
                   "%lld",
                   (long long)size, (long long)d->length, (long long)d->length + 1);
}

attn_status attn_training_data_open(const attn_training_options *o, attn_training_data *d) {
  *d = (attn_training_data){
      .seed = o->seed, .length = o->length, .validations = o->validation_windows};
  if (o->task) return open_task(o, d);
  if (!o->data || o->data_count < 1)
    return attn_fail(ATTN_INVALID_ARGUMENT, "training: no text is given");
  ATTN_TRY(attn_corpus_open(o->data, o->data_count, o->validation_fraction, &d->corpus));
  ATTN_TRY(check_size(d));
  int64_t windows = o->batch * o->accumulation;
  d->windows = attn_alloc_array((size_t)(windows * (o->length + 1)), sizeof *d->windows);
  return d->windows ? ATTN_OK : ATTN_OUT_OF_MEMORY;
}

void attn_training_data_close(attn_training_data *d) {
  attn_corpus_close(d->corpus);
  attn_free(d->windows);
}

static attn_status encode(attn_training_data *d, const attn_tokenizer *tokenizer) {
  ATTN_TRY(attn_corpus_encode(d->corpus, tokenizer));
  return check_size(d);
}

attn_status attn_training_data_fit(attn_training_data *d, const attn_model *model) {
  int64_t vocabulary = model->config.vocabulary;
  if (d->corpus && model->text.tokenizer) return encode(d, model->text.tokenizer);
  if (d->corpus && vocabulary < BYTE_VALUES)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "training: the model has a vocabulary of %lld; the bytes of a text need %d",
                     (long long)vocabulary, BYTE_VALUES);
  if (d->corpus) return ATTN_OK;
  attn_task_options *o = &d->task_options;
  if (!o->vocabulary) o->vocabulary = vocabulary;
  if (o->vocabulary > vocabulary)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "training: the model has a vocabulary of %lld; the task's is %lld",
                     (long long)vocabulary, (long long)o->vocabulary);
  return attn_task_settle(d->task, o);
}

double attn_training_data_bytes_per_token(const attn_training_data *d) {
  if (!d->corpus) return 0;
  attn_corpus_part part = ATTN_VALIDATION;
  if (attn_corpus_size(d->corpus, part) == 0) part = ATTN_TRAINING;
  return (double)attn_corpus_bytes(d->corpus, part) / (double)attn_corpus_size(d->corpus, part);
}

void attn_training_data_identify(const attn_training_data *d, attn_identity *id) {
  if (d->corpus) {
    attn_identity_integer(id, "training_bytes", attn_corpus_bytes(d->corpus, ATTN_TRAINING));
    attn_identity_integer(id, "validation_bytes", attn_corpus_bytes(d->corpus, ATTN_VALIDATION));
    attn_identity_hash(id, "text", attn_corpus_fingerprint(d->corpus));
    return;
  }
  attn_identity_text(id, "task", d->task->name);
  attn_identity_integer(id, "task_pairs", d->task_options.pairs);
  attn_identity_integer(id, "task_vocabulary", d->task_options.vocabulary);
  attn_identity_number(id, "task_power", d->task_options.power);
  attn_identity_integer(id, "task_zeros", d->task_options.zeros);
}

/* Windows [count, length + 1] as inputs and, one further, targets [count, length]. */
static void split_windows(const int32_t *windows, int64_t count, int64_t length, int32_t *inputs,
                          int32_t *targets) {
  for (int64_t w = 0; w < count; ++w) {
    const int32_t *window = windows + w * (length + 1);
    memcpy(inputs + w * length, window, (size_t)length * sizeof *window);
    memcpy(targets + w * length, window + 1, (size_t)length * sizeof *window);
  }
}

attn_status attn_training_data_step(const attn_training_data *d, int64_t step, int64_t count,
                                    int32_t *inputs, int32_t *targets) {
  if (!d->corpus)
    return attn_task_generate(d->task, &d->task_options, d->seed, ATTN_TASK_TRAINING, step * count,
                              count, inputs, targets);
  ATTN_TRY(attn_corpus_batch(d->corpus, ATTN_TRAINING, d->seed, (uint64_t)step, count, d->length,
                             d->windows));
  split_windows(d->windows, count, d->length, inputs, targets);
  return ATTN_OK;
}

int64_t attn_training_data_validations(const attn_training_data *d, int64_t *length) {
  *length = d->length;
  if (!d->corpus) return d->validations;
  int64_t size = attn_corpus_size(d->corpus, ATTN_VALIDATION);
  if (size - 1 < *length) *length = size - 1;
  if (*length < 1) return 0;
  int64_t places = size / (*length + 1);
  return places < d->validations ? places : d->validations;
}

/* Of a text spread evenly over the part that is never trained on; of a task examples of their own.
 */
attn_status attn_training_data_validation(const attn_training_data *d, int64_t first, int64_t count,
                                          int32_t *inputs, int32_t *targets) {
  if (!d->corpus)
    return attn_task_generate(d->task, &d->task_options, d->seed, ATTN_TASK_VALIDATION, first,
                              count, inputs, targets);
  int64_t length, windows = attn_training_data_validations(d, &length);
  int64_t places = attn_corpus_size(d->corpus, ATTN_VALIDATION) / (length + 1);
  for (int64_t w = 0; w < count; ++w)
    ATTN_TRY(attn_corpus_read(d->corpus, ATTN_VALIDATION,
                              (first + w) * places / windows * (length + 1), length + 1,
                              d->windows + w * (length + 1)));
  split_windows(d->windows, count, length, inputs, targets);
  return ATTN_OK;
}
