/* Running parity: inputs are bits, and at each position the label is the exclusive or of all bits
 * up to and including it.
 *
 *   1 0 1 1 0      labels: 1 1 0 1 1
 *
 * The smallest state that a sum with positive decays cannot keep: a bit that every 1 turns over.
 * Linear recurrences need eigenvalues below 0 for it (arXiv 2411.12537). */
#include "tasks/task.h"

static attn_status check(const attn_task *task, const attn_task_options *o) {
  (void)task;
  (void)o; /* any vocabulary has two tokens */
  return ATTN_OK;
}

static void example(const attn_task *task, const attn_task_options *o, attn_random *random,
                    void *scratch, int32_t *inputs, int32_t *labels) {
  int32_t parity = 0;
  (void)task, (void)scratch;
  for (int64_t t = 0; t < o->length; ++t) {
    inputs[t] = (int32_t)attn_random_below(random, 2);
    labels[t] = parity ^= inputs[t];
  }
}

static double chance(const attn_task_options *o) {
  (void)o;
  return 0.5;
}

const attn_task attn_task_parity = {
    .name = "parity",
    .summary = "whether the ones so far are odd, at every position (arXiv 2411.12537)",
    .usual = {.vocabulary = 2, .length = 64},
    .check = check,
    .example = example,
    .chance = chance,
};
