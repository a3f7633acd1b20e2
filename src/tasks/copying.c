/* Copying and selective copying: K symbols are to be repeated, in their order, when the delimiter
 * comes.
 *
 *   copying             s_1 s_2 s_3 0 0 0 0 0 0 0 | d   d   d        labels: s_1 s_2 s_3 at the
 *   selective_copying   0 s_1 0 0 s_2 0 0 0 s_3 0 | d   d   d        delimiters
 *
 * Copying (arXiv 1511.06464) needs memory only: what is remembered stands at known places. In
 * selective copying (Mamba, arXiv 2312.00752, section 4.1.1) the places are random, all
 * choices alike, so that what is read has to decide what is remembered.
 *
 * The blank is 0, the delimiter d = V - 1, symbols are 1 .. V - 2, drawn with repetition.
 *
 *   pairs   K, symbols, at most half of the length */
#include "base/status.h"
#include "tasks/task.h"

enum { AT_THE_BEGINNING = 0, SCATTERED };

static attn_status check(const attn_task *task, const attn_task_options *o) {
  if (o->vocabulary < 4) /* two symbols */
    return attn_fail(ATTN_INVALID_ARGUMENT, "%s: a vocabulary of %lld, expected at least 4",
                     task->name, (long long)o->vocabulary);
  if (o->pairs < 1 || o->pairs > o->length / 2)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "%s: %lld pairs (symbols to copy) at a length of %lld, expected 1 to %lld",
                     task->name, (long long)o->pairs, (long long)o->length,
                     (long long)o->length / 2);
  return ATTN_OK;
}

static void example(const attn_task *task, const attn_task_options *o, attn_random *random,
                    void *scratch, int32_t *inputs, int32_t *labels) {
  int64_t body = o->length - o->pairs;
  (void)scratch;
  for (int64_t t = 0, i = 0; i < o->pairs; ++t) {
    if (task->variant == SCATTERED && !attn_task_takes_place(random, o->pairs - i, body - t))
      continue;
    inputs[t] = (int32_t)(1 + attn_random_below(random, (uint64_t)(o->vocabulary - 2)));
    inputs[body + i] = (int32_t)(o->vocabulary - 1);
    labels[body + i++] = inputs[t];
  }
}

static double chance(const attn_task_options *o) {
  return 1 / (double)(o->vocabulary - 2);
}

const attn_task attn_task_copying = {
    .name = "copying",
    .summary = "repeat what stood at the beginning (arXiv 1511.06464)",
    .variant = AT_THE_BEGINNING,
    .takes = ATTN_TAKES_PAIRS,
    .usual = {.vocabulary = 16, .length = 64, .pairs = 10},
    .check = check,
    .example = example,
    .chance = chance,
};

const attn_task attn_task_selective_copying = {
    .name = "selective_copying",
    .summary = "repeat what stood at random places (Mamba, arXiv 2312.00752)",
    .variant = SCATTERED,
    .takes = ATTN_TAKES_PAIRS,
    .usual = {.vocabulary = 16, .length = 64, .pairs = 10},
    .check = check,
    .example = example,
    .chance = chance,
};
