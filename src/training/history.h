/* The losses of a run: every step's, their running mean, and those of validation. */
#ifndef ATTN_TRAINING_HISTORY_H
#define ATTN_TRAINING_HISTORY_H

#include "attn/base.h"

typedef struct attn_history {
  int64_t steps, most_steps; /* recorded; room */
  double *loss;              /* [most_steps]; NaN: the step was skipped */
  int64_t validations, most_validations;
  double *validation; /* [most_validations][2]: step, loss */
} attn_history;

/* All memory is taken here, so that a step takes none. */
attn_status attn_history_create(int64_t most_steps, int64_t most_validations,
                                attn_history *history);
void attn_history_free(attn_history *history);

void attn_history_add(attn_history *history, double loss);
/* Takes the place of an earlier one of the same step. */
void attn_history_add_validation(attn_history *history, int64_t step, double loss);

/* The mean of the losses with weights that fade by the step: smoothed[i] from steps 0 .. i, NaN
 * before the first finite one. */
void attn_history_smooth(const attn_history *history, double *smoothed);
double attn_history_smoothed(const attn_history *history); /* after the last step */
double attn_history_best(const attn_history *history);     /* of validation; NaN: none */

/* The curves: the picture has at most some hundred points a curve, the numbers have all. */
attn_status attn_history_write_svg(const attn_history *history, const char *path);
attn_status attn_history_write_csv(const attn_history *history, const char *path);

#endif
