/* Comparing mixers: models that are alike but for the mixer, with equal numbers of parameters, are
 * trained on a task (src/tasks/) from several seeds, and tested on examples of their own.
 *
 * Every run is a directory DIR/runs/MIXER-seedS-rateR with the model, its loss curve, and run.json:
 * the options that decide the run's numbers, written when it begins, and its result, when it is
 * over. A comparison that is opened again takes what is over from there, continues what is not from
 * its checkpoint, and refuses what was made with other options. */
#ifndef ATTN_TRAINING_COMPARE_H
#define ATTN_TRAINING_COMPARE_H

#include "attn/training.h"
#include "tasks/task.h"

#include <jansson.h>

typedef struct attn_comparison_options {
  const char *task;
  attn_task_options task_options; /* 0: what is usual for the task, vocabulary included */
  const char *const *mixers;      /* names, each once */
  int mixer_count;
  int64_t width, layers, heads; /* of every model */
  int64_t feed_forward; /* of the model that has most parameters then; others get more; 0: twice the
                           width */
  int64_t seeds;        /* training.seed and those after it */
  const double *learning_rates; /* each is tried from every seed */
  int rate_count;
  int64_t test_examples;
  const char *output; /* DIR, made if needed */
  bool fresh;         /* what is there of these runs is removed first */
  /* How each run is trained: seed (the first one), compute, steps, batch, schedule and what belongs
   * to it, AdamW's numbers, validation_windows, checkpoint_every, line_columns, interrupt, device.
   * The comparison sets the rest. */
  attn_training_options training;
} attn_comparison_options;

/* One mixer. */
typedef struct attn_comparison_model {
  const char *mixer;
  int64_t parameters, feed_forward;
  int64_t state_fixed_bytes, state_token_bytes; /* of all layers, in the compute dtype */
} attn_comparison_model;

typedef enum attn_run_stage {
  ATTN_RUN_WAITING = 0,
  ATTN_RUN_FINISHED,
  ATTN_RUN_FAILED /* `problem` says why */
} attn_run_stage;

enum { ATTN_PROBLEM_SIZE = 400 };

/* One training. Speeds are of tokens a second, NaN where they are not known. */
typedef struct attn_comparison_run {
  int model; /* index */
  uint64_t seed;
  double learning_rate;
  char name[96];
  attn_run_stage stage;
  bool earlier; /* it was over when the comparison was opened */
  char problem[ATTN_PROBLEM_SIZE];
  double loss, validation_loss, accuracy;
  double training_speed; /* of the part that was not continued; */
  double test_speed;     /* whole examples; */
  double decode_speed;   /* one sequence token by token, behind one example */
  double seconds;        /* of training, likewise of the part that was not continued */
  double peak_bytes;     /* most of the device's memory in use while it was trained */
} attn_comparison_run;

/* The outcome of a mixer: over the seeds, at the learning rate that has the lowest mean validation
 * loss among those whose runs are all finished. */
typedef struct attn_comparison_row {
  const attn_comparison_model *model;
  bool finished;       /* else nothing below is known but, where a run failed, the problem */
  const char *problem; /* NULL, or why the mixer has no outcome */
  double learning_rate, validation_loss;
  double accuracy, least, most, deviation; /* mean, extremes, sample standard deviation (NaN: one
                                              seed) */
  double training_speed, test_speed, decode_speed; /* means */
  double peak_bytes;                               /* the largest */
  int64_t state_bytes;                             /* behind one example */
} attn_comparison_row;

typedef struct attn_comparison {
  attn_comparison_options options; /* checked and settled */
  const attn_task *task;
  attn_comparison_model *models;       /* [mixer_count] */
  char (*problems)[ATTN_PROBLEM_SIZE]; /* [mixer_count]: why a model cannot be made, or "" */
  attn_comparison_run *runs;           /* [run_count], in the order in which they are done */
  int model_count, run_count;
} attn_comparison;

/* Chooses the models, and reads which runs are over. What is wrong with one mixer alone becomes its
 * problem. ATTN_NOT_FOUND (a task or mixer), ATTN_INVALID_ARGUMENT (an option; or runs in the
 * directory that have other options: the message names the differences), ATTN_BAD_FORMAT,
 * ATTN_IO_ERROR, ATTN_OUT_OF_MEMORY. To be closed in any case. */
attn_status attn_comparison_open(const attn_comparison_options *options, attn_comparison *c);
void attn_comparison_close(attn_comparison *c);

/* After each step of training, and (training is NULL) when a run is over. */
typedef struct attn_comparison_progress {
  const attn_comparison_run *run;
  const char *mixer;
  int number, runs; /* the run's, from 1 on; of how many */
  const attn_training_progress *training;
} attn_comparison_progress;
/* false: stop, as training.interrupt does. */
typedef bool (*attn_comparison_progress_fn)(void *context, const attn_comparison_progress *p);

/* Does the runs that are waiting. A run that fails does not keep the others from being done; it is
 * tried again when the comparison is opened anew, unless its loss diverged. ATTN_INTERRUPTED; what
 * concerns all runs (ATTN_IO_ERROR of run.json) ends them. */
attn_status attn_comparison_run_all(attn_comparison *c, attn_comparison_progress_fn progress,
                                    void *context);

/* rows [model_count]: the most accurate first, of equals the smallest state; those without an
 * outcome last. */
void attn_comparison_rows(const attn_comparison *c, attn_comparison_row *rows);
/* Everything: options, rows, runs. NULL when out of memory. */
json_t *attn_comparison_json(const attn_comparison *c);
/* The same as DIR/results.json. */
attn_status attn_comparison_write(const attn_comparison *c);

/* The parts (compare_models.c, compare_files.c). */

/* The text of a config.json, to be freed by attn_free; NULL when out of memory. */
char *attn_comparison_config(const attn_comparison *c, const attn_comparison_model *model);
/* Fills in models and their problems. */
attn_status attn_comparison_fit(attn_comparison *c);
/* DIR/runs/NAME, and a file in it (NULL: the directory); to be freed by attn_free. */
char *attn_comparison_path(const attn_comparison *c, const attn_comparison_run *run,
                           const char *file);
/* run.json: reads it where there is one (with `fresh` removes it and the checkpoint), and writes
 * it, with the result if the run is over. */
attn_status attn_comparison_read_run(const attn_comparison *c, attn_comparison_run *run);
attn_status attn_comparison_write_run(const attn_comparison *c, const attn_comparison_run *run);

#endif
