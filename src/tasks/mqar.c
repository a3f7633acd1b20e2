#include "tasks/mqar.h"
#include "base/memory.h"
#include "base/random.h"
#include "base/status.h"

#include <math.h>

static attn_status check(const attn_mqar *t) {
  if (t->vocabulary < 4 || t->vocabulary > INT32_MAX)
    return attn_fail(ATTN_INVALID_ARGUMENT, "mqar: a vocabulary of %lld, expected 4 to %d",
                     (long long)t->vocabulary, INT32_MAX);
  if (t->pairs < 1 || t->pairs >= t->vocabulary / 2)
    return attn_fail(
        ATTN_INVALID_ARGUMENT, "mqar: %lld pairs of a vocabulary of %lld, expected 1 to %lld",
        (long long)t->pairs, (long long)t->vocabulary, (long long)(t->vocabulary / 2 - 1));
  if (t->length % 2 || t->length < 4 * t->pairs || t->length > INT32_MAX)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "mqar: a length of %lld for %lld pairs, expected an even number from %lld on",
                     (long long)t->length, (long long)t->pairs, 4 * (long long)t->pairs);
  if (!(t->power > 0) || !isfinite(t->power))
    return attn_fail(ATTN_INVALID_ARGUMENT, "mqar: the power is %g, expected more than 0",
                     t->power);
  return ATTN_OK;
}

/* Room for one example. */
typedef struct scratch {
  int32_t *tokens; /* of one half of the vocabulary */
  double *clocks;  /* of the slots */
} scratch;

/* The first `count` of a random order of low .. high - 1, to every second place of `to`. */
static void draw_distinct(attn_random *random, int32_t *tokens, int64_t low, int64_t high,
                          int64_t count, int32_t *to) {
  for (int64_t i = low; i < high; ++i) tokens[i - low] = (int32_t)i;
  for (int64_t i = 0; i < count; ++i) {
    int64_t j = i + (int64_t)attn_random_below(random, (uint64_t)(high - low - i));
    int32_t chosen = tokens[j];
    tokens[j] = tokens[i];
    tokens[i] = chosen;
    to[2 * i] = chosen;
  }
}

/* Draws without replacement by weights are the order in which exponential clocks ring that run with
 * these weights as rates. */
static void start_clocks(attn_random *random, double power, double *clocks, int64_t slots) {
  for (int64_t j = 0; j < slots; ++j)
    clocks[j] = -log1p(-attn_random_uniform(random)) / pow((double)(j + 1), power - 1);
}

static int64_t next_to_ring(double *clocks, int64_t slots) {
  int64_t first = 0;
  for (int64_t j = 1; j < slots; ++j)
    if (clocks[j] < clocks[first]) first = j;
  clocks[first] = INFINITY;
  return first;
}

static void make_example(const attn_mqar *t, attn_random *random, scratch *s, int32_t *inputs,
                         int32_t *labels) {
  int64_t half = t->vocabulary / 2, slots = (t->length - 2 * t->pairs) / 2;
  for (int64_t i = 0; i < t->length; ++i) {
    inputs[i] = 0;
    labels[i] = ATTN_NO_LABEL;
  }
  draw_distinct(random, s->tokens, 1, half, t->pairs, inputs);
  draw_distinct(random, s->tokens, half, t->vocabulary, t->pairs, inputs + 1);
  start_clocks(random, t->power, s->clocks, slots);
  for (int64_t i = 0; i < t->pairs; ++i) {
    int64_t at = 2 * t->pairs + 2 * next_to_ring(s->clocks, slots);
    inputs[at] = inputs[2 * i];
    labels[at] = inputs[2 * i + 1];
  }
  for (int64_t i = 0; i < t->length && t->random_filler; ++i)
    if (inputs[i] == 0) inputs[i] = (int32_t)attn_random_below(random, (uint64_t)t->vocabulary);
}

attn_status attn_mqar_generate(const attn_mqar *task, uint64_t seed, attn_task_part part,
                               int64_t first, int64_t count, int32_t *inputs, int32_t *labels) {
  ATTN_TRY(check(task));
  scratch s = {
      .tokens = attn_alloc_array((size_t)(task->vocabulary + 1) / 2 + 1, sizeof *s.tokens),
      .clocks = attn_alloc_array((size_t)task->length, sizeof *s.clocks),
  };
  attn_status status = s.tokens && s.clocks ? ATTN_OK : ATTN_OUT_OF_MEMORY;
  for (int64_t i = 0; i < count && status == ATTN_OK; ++i) {
    attn_random random = {.seed = seed, .stream = (uint64_t)part << 62 | (uint64_t)(first + i)};
    make_example(task, &random, &s, inputs + i * task->length, labels + i * task->length);
  }
  attn_free(s.tokens);
  attn_free(s.clocks);
  return status;
}
