/* Tasks that judge mixers: examples with labels, made by rules from a seed.
 *
 * An example is `length` input tokens, and at each position the token that a model shall give
 * there, having read the inputs up to and including it; ATTN_NO_LABEL where nothing is asked. Where
 * an answer has several tokens, either the input says nothing between them (copying), or it goes on
 * with the right ones, as a text would (the needles).
 *
 * tasks.c has the table; a new task is a file here, a line there and a solver in
 * tests/unit/tasks.c. */
#ifndef ATTN_TASKS_TASK_H
#define ATTN_TASKS_TASK_H

#include "attn/base.h"
#include "base/random.h"

enum { ATTN_NO_LABEL = -1 }; /* as the loss has it: a position that is not counted */

/* What all tasks have in common. 0 is a task's usual value; what a task does not take stays 0. */
typedef struct attn_task_options {
  int64_t vocabulary; /* tokens are 0 .. vocabulary - 1 */
  int64_t length;     /* of an example, in tokens */
  int64_t pairs;      /* things to be remembered: the task says which */
  double power;       /* mqar: of the law by which queries are spread */
  bool zeros;         /* mqar: 0 between the queries instead of any token */
} attn_task_options;

/* Options, beside vocabulary and length, that a task may take. */
enum { ATTN_TAKES_PAIRS = 1, ATTN_TAKES_POWER = 2, ATTN_TAKES_ZEROS = 4 };

typedef struct attn_task attn_task;
struct attn_task {
  const char *name;
  const char *summary; /* one line, with its source */
  int variant;         /* of several tasks in one file, which */
  unsigned takes;
  attn_task_options usual;
  /* Of options without zeros: ATTN_INVALID_ARGUMENT names the field. The others get such as pass.
   */
  attn_status (*check)(const attn_task *task, const attn_task_options *options);
  /* Bytes that example needs; NULL: none. */
  size_t (*scratch)(const attn_task *task, const attn_task_options *options);
  /* Writes what is not 0 in inputs, and labels where there are any; both [length]. */
  void (*example)(const attn_task *task, const attn_task_options *options, attn_random *random,
                  void *scratch, int32_t *inputs, int32_t *labels);
  /* The share of right answers of one who guesses among the tokens that can be answers. */
  double (*chance)(const attn_task_options *options);
};

/* The names, then NULL, and the tasks in the same order; NULL beyond them. */
extern const char *const attn_task_names[];
const attn_task *attn_task_at(int index);
/* ATTN_NOT_FOUND, with the known names in the message. */
attn_status attn_task_find(const char *name, const attn_task **task);

/* Puts the usual values in place of zeros, and checks: ATTN_INVALID_ARGUMENT names the field. */
attn_status attn_task_settle(const attn_task *task, attn_task_options *options);

/* Whatever the seeds, examples of one part have random streams that no other part has. */
typedef enum attn_task_part {
  ATTN_TASK_TRAINING = 0,
  ATTN_TASK_VALIDATION,
  ATTN_TASK_TEST
} attn_task_part;

/* Examples first .. first + count - 1 (numbers below 2^62): inputs and labels [count, length]. Each
 * depends on the options, seed, part and its number alone. Settles a copy of the options first,
 * with what that may return; ATTN_OUT_OF_MEMORY. */
attn_status attn_task_generate(const attn_task *task, const attn_task_options *options,
                               uint64_t seed, attn_task_part part, int64_t first, int64_t count,
                               int32_t *inputs, int32_t *labels);

/* For tasks: the first `count` of a random order of low .. high - 1, to every `stride`-th place of
 * `to`. tokens: room for high - low. */
void attn_task_draw_distinct(attn_random *random, int32_t *tokens, int64_t low, int64_t high,
                             int64_t count, int32_t *to, int64_t stride);
/* Whether the next of `left` places is one of the `wanted` ones that are drawn among them, all
 * choices alike: asked place after place, with what is left of both. */
bool attn_task_takes_place(attn_random *random, int64_t wanted, int64_t left);

#endif
