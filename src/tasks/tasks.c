/* The table of tasks, and what they share. */
#include "base/memory.h"
#include "base/status.h"
#include "tasks/task.h"

#include <stdio.h>
#include <string.h>

#define TASKS(X)                                                                                   \
  X(mqar)                                                                                          \
  X(copying)                                                                                       \
  X(selective_copying)                                                                             \
  X(parity)                                                                                        \
  X(permutations)                                                                                  \
  X(passkey) X(niah1) X(niah2) X(niah3) X(listops) X(text) X(retrieval) X(digits) X(pathfinder)

#define DECLARE(name) extern const attn_task attn_task_##name;
#define ADDRESS(name) &attn_task_##name,
#define NAME(name)    #name,

TASKS(DECLARE)
static const attn_task *const table[] = {TASKS(ADDRESS)};
const char *const attn_task_names[] = {TASKS(NAME) NULL};

enum { COUNT = sizeof table / sizeof *table };

const attn_task *attn_task_at(int index) {
  return index >= 0 && index < COUNT ? table[index] : NULL;
}

attn_status attn_task_find(const char *name, const attn_task **task) {
  char known[512] = "";
  for (int i = 0; i < COUNT; ++i) {
    if (strcmp(table[i]->name, name) == 0) {
      *task = table[i];
      return ATTN_OK;
    }
    size_t used = strlen(known);
    snprintf(known + used, sizeof known - used, "%s%s", i ? ", " : "", table[i]->name);
  }
  return attn_fail(ATTN_NOT_FOUND, "no task is called '%s'; there are %s", name, known);
}

/* Options ---------------------------------------------------------------------------------------
 */

static attn_status refuse(const attn_task *task, const char *option) {
  return attn_fail(ATTN_INVALID_ARGUMENT, "%s: %s is given, which this task does not have",
                   task->name, option);
}

static attn_status check_sizes(const attn_task *task, const attn_task_options *o) {
  if (o->vocabulary < 2 || o->vocabulary > INT32_MAX)
    return attn_fail(ATTN_INVALID_ARGUMENT, "%s: a vocabulary of %lld, expected 2 to %d",
                     task->name, (long long)o->vocabulary, INT32_MAX);
  if (o->length < 1 || o->length > INT32_MAX)
    return attn_fail(ATTN_INVALID_ARGUMENT, "%s: a length of %lld, expected 1 to %d", task->name,
                     (long long)o->length, INT32_MAX);
  if (o->pairs < 0 || o->pairs > INT32_MAX)
    return attn_fail(ATTN_INVALID_ARGUMENT, "%s: %lld pairs, expected 1 to %d", task->name,
                     (long long)o->pairs, INT32_MAX);
  return ATTN_OK;
}

attn_status attn_task_settle(const attn_task *task, attn_task_options *o) {
  if (o->pairs && !(task->takes & ATTN_TAKES_PAIRS)) return refuse(task, "a number of pairs");
  if (o->power != 0 && !(task->takes & ATTN_TAKES_POWER)) return refuse(task, "a power");
  if (o->zeros && !(task->takes & ATTN_TAKES_ZEROS)) return refuse(task, "a filler of zeros");
  if (!o->vocabulary) o->vocabulary = task->usual.vocabulary;
  if (!o->length) o->length = task->usual.length;
  if (!o->pairs) o->pairs = task->usual.pairs;
  if (o->power == 0) o->power = task->usual.power;
  ATTN_TRY(check_sizes(task, o));
  return task->check(task, o);
}

/* Examples --------------------------------------------------------------------------------------
 */

attn_status attn_task_generate(const attn_task *task, const attn_task_options *options,
                               uint64_t seed, attn_task_part part, int64_t first, int64_t count,
                               int32_t *inputs, int32_t *labels) {
  attn_task_options o = *options;
  ATTN_TRY(attn_task_settle(task, &o));
  void *scratch = task->scratch ? attn_alloc(task->scratch(task, &o)) : NULL;
  if (task->scratch && !scratch) return ATTN_OUT_OF_MEMORY;
  for (int64_t i = 0; i < count; ++i, inputs += o.length, labels += o.length) {
    attn_random random = {.seed = seed, .stream = (uint64_t)part << 62 | (uint64_t)(first + i)};
    for (int64_t t = 0; t < o.length; ++t) {
      inputs[t] = 0;
      labels[t] = ATTN_NO_LABEL;
    }
    task->example(task, &o, &random, scratch, inputs, labels);
  }
  attn_free(scratch);
  return ATTN_OK;
}

void attn_task_draw_distinct(attn_random *random, int32_t *tokens, int64_t low, int64_t high,
                             int64_t count, int32_t *to, int64_t stride) {
  for (int64_t i = low; i < high; ++i) tokens[i - low] = (int32_t)i;
  for (int64_t i = 0; i < count; ++i) {
    int64_t j = i + (int64_t)attn_random_below(random, (uint64_t)(high - low - i));
    int32_t chosen = tokens[j];
    tokens[j] = tokens[i];
    tokens[i] = chosen;
    to[stride * i] = chosen;
  }
}

/* Knuth, The Art of Computer Programming 3.4.2, algorithm S. */
bool attn_task_takes_place(attn_random *random, int64_t wanted, int64_t left) {
  return (int64_t)attn_random_below(random, (uint64_t)left) < wanted;
}
