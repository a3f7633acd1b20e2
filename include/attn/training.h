/* Training of language models: from a text and a configuration (or an existing model) to a model's
 * directory, with a checkpoint from which an interrupted run continues to the same bits. */
#ifndef ATTN_TRAINING_H
#define ATTN_TRAINING_H

#include "attn/device.h"
#include "attn/lora.h"

#include <signal.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What to do about a checkpoint in the output directory. */
typedef enum attn_training_start {
  ATTN_START_AUTO = 0, /* continue when there is one, else begin */
  ATTN_START_FRESH,    /* begin, and replace it at the first checkpoint */
  ATTN_START_RESUME,   /* continue; ATTN_NOT_FOUND when there is none */
} attn_training_start;

/* Fields marked (*) decide the numbers: a checkpoint refuses to be continued with others. */
typedef struct attn_training_options {
  size_t struct_size; /* sizeof(attn_training_options), set by ATTN_TRAINING_OPTIONS_INIT */

  /* The model: `config` is the text of a config.json for a fresh one; `model` a directory whose
   * weights are trained further. At most one of them; none: attn_training_default_config(). */
  const char *config;          /* (*) */
  const char *model;           /* (*) its configuration and weights count, not its name */
  uint64_t seed;               /* (*) of fresh weights and of the order of the data */
  attn_dtype compute;          /* (*) bfloat16, float32 or float64; masters are float32 (float64) */
  bool checkpoint_activations; /* checkpointing: layers keep their input only and run again in
                           backward; about a third slower, the same bits */

  /* The text (*): files and directories. Of a model without a tokenizer the tokens are bytes, which
   * are mapped, not loaded; else they are the tokenizer's, four bytes of memory each. The last
   * `validation_fraction` of it is never trained on. */
  const char *const *data;
  int data_count;
  double validation_fraction; /* [0, 1); 0: no validation */

  /* Or a task (*) instead of a text, e.g. "mqar", multi-query associative recall (arXiv
   * 2312.04927), in examples of `length` tokens, validated on others; docs/tasks.md lists them. An
   * option that the task does not have is refused. */
  const char *task;        /* NULL: the text */
  int64_t task_pairs;      /* things to be remembered; 0: as many as is usual for the task */
  int64_t task_vocabulary; /* 0: the model's */
  double task_power;       /* mqar: of the law that spreads queries; 0: 0.01 */
  bool task_zeros;         /* mqar: 0 between the queries instead of any token */

  /* The output directory, made if needed: config.json and model.safetensors (weights in
   * `save_dtype`), training.safetensors (the checkpoint), loss.svg and loss.csv. */
  const char *output;
  attn_dtype save_dtype; /* float32, bfloat16 or float16 */
  attn_training_start start;

  /* The schedule (*): `steps` steps of `accumulation` micro-batches of `batch` windows of `length`
   * tokens. Accumulation trades memory for time; it sees the same data as a larger batch. */
  int64_t steps, batch, length, accumulation;
  const char *schedule; /* "constant", "cosine", "wsd" or "wsd-sqrt" */
  double learning_rate; /* at the peak */
  double final_rate;    /* fraction of the peak that is left at the end, [0, 1] */
  int64_t warmup;       /* steps; -1: a twentieth of all, at most 500 */
  int64_t decay;        /* steps at the end, wsd only; -1: a fifth of all */
  double beta1, beta2, epsilon, weight_decay; /* AdamW */
  double clip;                                /* largest norm of the gradient; 0: no clipping */

  /* While it runs. Validation also happens at the end, and a checkpoint is also written at the end
   * and on interruption. */
  int64_t validation_every;   /* steps; 0: at the end only */
  int64_t validation_windows; /* of `length` tokens, spread evenly over the validation part (*) */
  int64_t checkpoint_every;   /* steps; 0: at the end only */
  int line_columns;           /* width of the ready-made progress line */
  /* When it becomes non-zero the run stops within one micro-batch, writes a checkpoint and returns
   * ATTN_INTERRUPTED: for a signal handler to set. May be NULL. */
  const volatile sig_atomic_t *interrupt;
  attn_device device; /* (*) where it computes; {0}: the processor */

  /* (*) NULL: all weights are trained. Else adapters of `model`, whose own weights stay as they
   * are: gradients, moments and the checkpoint exist for what is trained alone. The output
   * directory gets the adapters in the format of PEFT (adapter_config.json,
   * adapter_model.safetensors), and, with lora_merge, also the model with the adapters in its
   * weights. */
  const attn_lora_options *lora;
  bool lora_merge;
} attn_training_options;

#define ATTN_TRAINING_OPTIONS_INIT                                                                 \
  {                                                                                                \
    .struct_size = sizeof(attn_training_options), .seed = 1, .compute = ATTN_BF16,                 \
    .validation_fraction = 0.02, .save_dtype = ATTN_BF16, .steps = 2000, .batch = 32,              \
    .length = 512, .accumulation = 1, .schedule = "cosine", .learning_rate = 2e-3,                 \
    .final_rate = 0.05, .warmup = -1, .decay = -1, .beta1 = 0.9, .beta2 = 0.95, .epsilon = 1e-8,   \
    .weight_decay = 0.1, .clip = 1.0, .validation_every = 100, .validation_windows = 64,           \
    .checkpoint_every = 250, .line_columns = 100, .lora_merge = true                               \
  }

/* After each step. */
typedef struct attn_training_progress {
  int64_t step, steps;        /* done so far, this one included; in all */
  int64_t tokens;             /* trained on so far */
  double loss, smoothed_loss; /* mean -ln p of a token */
  double learning_rate, gradient_norm;
  double tokens_per_second; /* over about the last half minute; 0 while unknown */
  double seconds_left;      /* -1 while unknown */
  double validation_loss;   /* NaN unless it was computed after this step */
  double best_validation;   /* so far; NaN before the first */
  int64_t skipped;          /* steps so far whose loss or gradient was not finite */
  bool checkpointed;        /* a checkpoint was written after this step */
  const char *warning;      /* NULL, or why a checkpoint could not be written: it is tried again */
  const char *line; /* all of that in one line without a line break; valid during the call */
} attn_training_progress;

/* Called after each step on the thread that trains. false: stop as `interrupt` does. */
typedef bool (*attn_training_progress_fn)(void *context, const attn_training_progress *progress);

typedef struct attn_training_result {
  int64_t parameters;    /* of the model, adapters included */
  int64_t trained;       /* of these, the ones that are trained */
  int64_t first_step;    /* 0, or where the checkpoint continued */
  int64_t steps, tokens; /* done in all */
  int64_t skipped;
  double loss;                             /* smoothed; NaN before the first step */
  double validation_loss, best_validation; /* NaN without */
  double seconds, tokens_per_second;       /* of this run */
  double flop_per_second;                  /* (4 x parameters + 2 x trained) x tokens a second */
  double bytes_per_token;                  /* of the text; 0 of a task */
  size_t peak_bytes;                       /* most of the device's memory in use by the library */
} attn_training_result;

/* The configuration of the small default model: bytes, Lightning Attention, about 4M parameters. */
ATTN_API const char *attn_training_default_config(void);

/* Trains to the end and writes the model. `progress` and `result` may be NULL.
 *   ATTN_INTERRUPTED       stopped by the caller; a checkpoint was written: call again to continue
 *   ATTN_INVALID_ARGUMENT  an option is out of its range; the checkpoint belongs to other options
 *                          or another text (the message names each difference); the loss was not
 *                          finite in several steps in a row
 *   ATTN_IO_ERROR, ATTN_NOT_FOUND, ATTN_BAD_FORMAT, ATTN_OUT_OF_MEMORY
 * After any failure the last checkpoint that was written is whole. */
ATTN_API attn_status attn_train(const attn_training_options *options,
                                attn_training_progress_fn progress, void *context,
                                attn_training_result *result);

/* Conversion of a model with exact attention into one with another mixer, by attention transfer
 * (LoLCATs, arXiv 2410.10254, section 3.2): the new mixer's own parameters learn to give what
 * attention gave in every layer, all others stay as they are. attn_train adapts the rest. */
typedef struct attn_linearise_options {
  size_t struct_size;      /* sizeof(attn_linearise_options), set by ATTN_LINEARISE_OPTIONS_INIT */
  const char *model;       /* a directory or a GGUF file */
  const char *mixer;       /* "hedgehog", ...: one that offers what its heads give */
  int64_t keep_every;      /* every so manieth layer keeps its attention; 0: none does */
  const char *const *data; /* the text, as for attn_train */
  int data_count;
  double validation_fraction;   /* [0, 1), of the text, that losses are measured on */
  int64_t validation_tokens;    /* of that, at most */
  int64_t steps, batch, length; /* windows of `length` tokens in a step; 0 steps: nothing is learnt
                                 */
  double learning_rate;
  uint64_t seed;
  attn_dtype compute;
  attn_device device;
  const char *output; /* the directory for the model, with its tokenizer */
  attn_dtype save_dtype;
  const volatile sig_atomic_t *interrupt; /* stops it; nothing is written then */
  int64_t feature_dim;                    /* of the feature maps; 0: the mixer's default */
  int64_t window;                         /* lolcats: tokens of its window; 0: 64 */
  bool sliding; /* lolcats: the last `window` tokens, not a terrace of blocks of so many */
  bool affine;  /* lolcats: the linear part is multiplied by 1 - gamma */
} attn_linearise_options;

#define ATTN_LINEARISE_OPTIONS_INIT                                                                \
  {                                                                                                \
    .struct_size = sizeof(attn_linearise_options), .validation_fraction = 0.02,                    \
    .validation_tokens = 16384, .steps = 500, .batch = 8, .length = 1024, .learning_rate = 1e-2,   \
    .seed = 1, .compute = ATTN_BF16, .save_dtype = ATTN_BF16                                       \
  }

typedef struct attn_linearise_result {
  int64_t parameters, trained; /* of the new model; of them learnt here */
  int64_t validation_tokens;   /* that were counted */
  /* Mean -ln p of a token of the text's end: of the model that was given; with the new mixer
   * untrained; and trained. NaN where they were not measured. */
  double loss_before, loss_swapped, loss_after;
  double first_error, last_error; /* of the transfer's loss; NaN without steps */
  double seconds;
} attn_linearise_result;

/* After each step: its number and the transfer's loss. false: stop. */
typedef bool (*attn_linearise_progress_fn)(void *context, int64_t step, double error);

/* `progress` and `result` may be NULL. ATTN_UNSUPPORTED names what the model has that the new one
 * could not keep, or a mixer that attention cannot be transferred to; ATTN_INTERRUPTED;
 * ATTN_INVALID_ARGUMENT, ATTN_NOT_FOUND, ATTN_IO_ERROR, ATTN_OUT_OF_MEMORY. */
ATTN_API attn_status attn_linearise(const attn_linearise_options *options,
                                    attn_linearise_progress_fn progress, void *context,
                                    attn_linearise_result *result);

#ifdef __cplusplus
}
#endif
#endif
