/* What a run is trained and validated on: windows of a text, or examples of a task. Inputs and
 * targets are [count, length]; a negative target is not counted. */
#ifndef ATTN_TRAINING_DATA_H
#define ATTN_TRAINING_DATA_H

#include "attn/training.h"
#include "attn/model.h"
#include "files/corpus.h"
#include "tasks/task.h"
#include "training/checkpoint.h"

typedef struct attn_training_data {
  attn_corpus *corpus;   /* NULL: a task */
  const attn_task *task; /* NULL: a text */
  attn_task_options task_options;
  uint64_t seed;
  int64_t length, validations; /* of a window; how many there are at most */
  int32_t *windows;            /* room for the text of a step */
} attn_training_data;

attn_status attn_training_data_open(const attn_training_options *options, attn_training_data *data);
void attn_training_data_close(attn_training_data *data);
/* Makes a text tokens of the model's tokenizer, where it has one, and says whether its vocabulary
 * holds the tokens; a task takes all of it where none was given. */
attn_status attn_training_data_fit(attn_training_data *data, const attn_model *model);
/* How many bytes of text a token stands for, in the part that is validated, if there is one; 0 of a
 * task. */
double attn_training_data_bytes_per_token(const attn_training_data *data);
/* What a checkpoint may only be continued with. */
void attn_training_data_identify(const attn_training_data *data, attn_identity *identity);

/* Of a step: a function of the seed and the step alone. */
attn_status attn_training_data_step(const attn_training_data *data, int64_t step, int64_t count,
                                    int32_t *inputs, int32_t *targets);
/* How many windows a validation has, and how long they are; 0: there is none. */
int64_t attn_training_data_validations(const attn_training_data *data, int64_t *length);
/* Of those, windows first .. first + count - 1. */
attn_status attn_training_data_validation(const attn_training_data *data, int64_t first,
                                          int64_t count, int32_t *inputs, int32_t *targets);

#endif
