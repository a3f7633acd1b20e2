/* Multi-query associative recall (Zoology, arXiv 2312.04927, section 3): a list of keys and values,
 * then the keys again at distances that follow a power law; at each of them the model is asked for
 * the key's value.
 *
 *   k_1 v_1 ... k_K v_K | 0 .. k_2 .. 0 .. k_1 .. 0      labels: v_2 and v_1 there, none elsewhere
 *
 * Keys are 1 .. V / 2 - 1, values V / 2 .. V - 1, both distinct within an example. Key i, in order,
 * takes one of the (N - 2 K) / 2 slots behind the list, slot j with a probability that is
 * proportional to a j^(a - 1) among those that are free: its position is even. */
#ifndef ATTN_TASKS_MQAR_H
#define ATTN_TASKS_MQAR_H

#include "attn/base.h"

#include <stdbool.h>
#include <stdint.h>

enum { ATTN_NO_LABEL = -1 }; /* as the loss has it: a position that is not counted */

typedef struct attn_mqar {
  int64_t vocabulary; /* V */
  int64_t length;     /* N, even, at least 4 K */
  int64_t pairs;      /* K, below V / 2 */
  double power;       /* a; 1: all slots alike */
  bool random_filler; /* any token of the vocabulary instead of 0 between the queries, as the
                         published code has it; its figures were made with 0 */
} attn_mqar;
#define ATTN_MQAR_INIT                                                                             \
  { .vocabulary = 8192, .length = 64, .pairs = 4, .power = 0.01, .random_filler = true }

/* Whatever the seeds, examples of one part have random streams that no other part has. */
typedef enum attn_task_part {
  ATTN_TASK_TRAINING = 0,
  ATTN_TASK_VALIDATION,
  ATTN_TASK_TEST
} attn_task_part;

/* Examples first .. first + count - 1 (numbers below 2^62): inputs and labels [count, length]. Each
 * depends on seed, part and its number alone. ATTN_INVALID_ARGUMENT names the field that does not
 * fit. */
attn_status attn_mqar_generate(const attn_mqar *task, uint64_t seed, attn_task_part part,
                               int64_t first, int64_t count, int32_t *inputs, int32_t *labels);

#endif
