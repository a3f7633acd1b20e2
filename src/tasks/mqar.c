/* Multi-query associative recall (Zoology, arXiv 2312.04927, section 3): a list of keys and values,
 * then the keys again at distances that follow a power law; at each of them the model is asked for
 * the key's value.
 *
 *   k_1 v_1 ... k_K v_K | 0 .. k_2 .. 0 .. k_1 .. 0      labels: v_2 and v_1 there, none elsewhere
 *
 * Keys are 1 .. V / 2 - 1, values V / 2 .. V - 1, both distinct within an example. Key i, in order,
 * takes one of the (N - 2 K) / 2 slots behind the list, slot j with a probability that is
 * proportional to a j^(a - 1) among those that are free: its position is even.
 *
 *   pairs   K, below V / 2; the length N is even and at least 4 K
 *   power   a; 1: all slots alike
 *   zeros   0 between the queries, as the published figures were made; else any token of the
 *           vocabulary, as the published code has it */
#include "base/status.h"
#include "tasks/task.h"

#include <math.h>

static attn_status check(const attn_task *task, const attn_task_options *o) {
  (void)task;
  if (o->vocabulary < 4)
    return attn_fail(ATTN_INVALID_ARGUMENT, "mqar: a vocabulary of %lld, expected 4 to %d",
                     (long long)o->vocabulary, INT32_MAX);
  if (o->pairs < 1 || o->pairs >= o->vocabulary / 2)
    return attn_fail(
        ATTN_INVALID_ARGUMENT, "mqar: %lld pairs of a vocabulary of %lld, expected 1 to %lld",
        (long long)o->pairs, (long long)o->vocabulary, (long long)(o->vocabulary / 2 - 1));
  if (o->length % 2 || o->length < 4 * o->pairs)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "mqar: a length of %lld for %lld pairs, expected an even number from %lld on",
                     (long long)o->length, (long long)o->pairs, 4 * (long long)o->pairs);
  if (!(o->power > 0) || !isfinite(o->power))
    return attn_fail(ATTN_INVALID_ARGUMENT, "mqar: the power is %g, expected more than 0",
                     o->power);
  return ATTN_OK;
}

/* Room for one example: the slots' clocks, and the tokens of one half of the vocabulary. */
static int64_t most_slots(const attn_task_options *o) {
  return o->length / 2;
}

static size_t scratch_bytes(const attn_task *task, const attn_task_options *o) {
  (void)task;
  return (size_t)most_slots(o) * sizeof(double) +
         (size_t)((o->vocabulary + 1) / 2) * sizeof(int32_t);
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

static void example(const attn_task *task, const attn_task_options *o, attn_random *random,
                    void *scratch, int32_t *inputs, int32_t *labels) {
  (void)task;
  int64_t half = o->vocabulary / 2, slots = (o->length - 2 * o->pairs) / 2;
  double *clocks = scratch;
  int32_t *tokens = (int32_t *)(clocks + most_slots(o));
  attn_task_draw_distinct(random, tokens, 1, half, o->pairs, inputs, 2);
  attn_task_draw_distinct(random, tokens, half, o->vocabulary, o->pairs, inputs + 1, 2);
  start_clocks(random, o->power, clocks, slots);
  for (int64_t i = 0; i < o->pairs; ++i) {
    int64_t at = 2 * o->pairs + 2 * next_to_ring(clocks, slots);
    inputs[at] = inputs[2 * i];
    labels[at] = inputs[2 * i + 1];
  }
  for (int64_t i = 0; i < o->length && !o->zeros; ++i)
    if (inputs[i] == 0) inputs[i] = (int32_t)attn_random_below(random, (uint64_t)o->vocabulary);
}

static double chance(const attn_task_options *o) {
  return 1 / (double)(o->vocabulary - o->vocabulary / 2);
}

const attn_task attn_task_mqar = {
    .name = "mqar",
    .summary = "recall the values of several keys (Zoology, arXiv 2312.04927)",
    .takes = ATTN_TAKES_PAIRS | ATTN_TAKES_POWER | ATTN_TAKES_ZEROS,
    .usual = {.vocabulary = 8192, .length = 64, .pairs = 4, .power = 0.01},
    .check = check,
    .scratch = scratch_bytes,
    .example = example,
    .chance = chance,
};
