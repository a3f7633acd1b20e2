/* Learning rate schedules: a factor in [0, 1] times the peak rate, as a function of the step.
 *
 * With t = step + 1, W warm-up steps, T steps in all, D decay steps and the floor f (a fraction of
 * the peak):
 *   warm-up                  t / W                                     t <= W
 *   constant                 1
 *   cosine                   f + (1 - f) (1 + cos(pi p)) / 2,          p = (t - W) / (T - W)
 *   warm-up-stable-decay     1, then in the last D steps               p = (t - (T - D)) / D
 *     linear                 f + (1 - f) (1 - p)
 *     1 - sqrt               f + (1 - f) (1 - sqrt(p))
 * Step 0 has a rate above 0, and the last step, T - 1, has the floor. Cosine: Loshchilov and
 * Hutter, arXiv:1608.03983; warm-up-stable-decay: Hu et al., arXiv:2404.06395; 1 - sqrt: Haegele et
 * al., arXiv:2405.18392. */
#ifndef ATTN_TRAINING_SCHEDULE_H
#define ATTN_TRAINING_SCHEDULE_H

#include "attn/base.h"

typedef enum attn_schedule_kind {
  ATTN_SCHEDULE_CONSTANT = 0,
  ATTN_SCHEDULE_COSINE,
  ATTN_SCHEDULE_WSD_LINEAR,
  ATTN_SCHEDULE_WSD_SQRT,
  ATTN_SCHEDULE_COUNT
} attn_schedule_kind;

typedef struct attn_schedule {
  attn_schedule_kind kind;
  double peak;    /* learning rate, > 0 */
  double floor;   /* fraction of the peak, 0 to 1 */
  int64_t warmup; /* steps */
  int64_t total;  /* steps */
  int64_t decay;  /* steps at the end; warm-up-stable-decay only */
} attn_schedule;

const char *
attn_schedule_name(attn_schedule_kind kind); /* "constant", "cosine", "wsd", "wsd-sqrt" */
attn_status attn_schedule_parse(const char *name, attn_schedule_kind *kind);

/* ATTN_INVALID_ARGUMENT on negative counts, warmup + decay > total, a rate or floor out of range.
 */
attn_status attn_schedule_check(const attn_schedule *schedule);
/* The learning rate of a step (0, 1, ...) of a checked schedule; after the last step it stays. */
double attn_schedule_rate(const attn_schedule *schedule, int64_t step);

#endif
