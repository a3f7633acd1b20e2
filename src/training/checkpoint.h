/* The checkpoint of a training run: one safetensors file, written beside and renamed, so that the
 * earlier one stays whole until the new one is.
 *
 *   model.NAME, optimiser.*   masters and moments of what is trained, as they are in memory
 *   run.counters              [step, skipped, skipped in a row]
 *   run.loss                  [steps]; run.validation [validations, 2]
 * Metadata: who wrote it, and the identity of the run, one key for each thing that decides its
 * numbers. The place in the data follows from seed and step. */
#ifndef ATTN_TRAINING_CHECKPOINT_H
#define ATTN_TRAINING_CHECKPOINT_H

#include "models/model.h"
#include "training/history.h"
#include "training/optimiser.h"

/* What a run needs to continue; everything is borrowed. */
typedef struct attn_run_state {
  attn_model *model;
  attn_parameter *const *parameters; /* that are trained */
  int64_t parameter_count;
  attn_optimiser *optimiser;
  attn_history *history;
  int64_t step, skipped, skipped_in_row;
} attn_run_state;

/* What decides the numbers of a run, as text. */
enum { ATTN_IDENTITY_KEYS = 40, ATTN_IDENTITY_TEXT = 40 };
typedef struct attn_identity {
  const char *keys[ATTN_IDENTITY_KEYS];
  char texts[ATTN_IDENTITY_KEYS][ATTN_IDENTITY_TEXT];
  int count;
  char *config; /* the model's configuration as compact JSON with sorted keys */
} attn_identity;

void attn_identity_integer(attn_identity *identity, const char *key, int64_t value);
void attn_identity_number(attn_identity *identity, const char *key, double value);
void attn_identity_text(attn_identity *identity, const char *key, const char *value);
void attn_identity_hash(attn_identity *identity, const char *key, uint64_t value);
attn_status attn_identity_config(attn_identity *identity, const json_t *config);
void attn_identity_free(attn_identity *identity);

attn_status attn_checkpoint_write(const char *path, const attn_run_state *state,
                                  const attn_identity *identity);
/* ATTN_INVALID_ARGUMENT names every difference between the file's run and this one;
 * ATTN_BAD_FORMAT when it is not a checkpoint, or is damaged. After an error the state is not to be
 * used. */
attn_status attn_checkpoint_read(const char *path, attn_run_state *state,
                                 const attn_identity *identity);

#endif
