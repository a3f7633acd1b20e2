/* Attention transfer: the parameters that only the student's mixers have are trained so that each
 * mixer's heads give what the teacher's attention gives for the same input (LoLCATs, arXiv
 * 2410.10254, section 3.2; LAWCAT, arXiv 2509.18467):
 *
 *   loss = 1000 mean over layers of mean over elements of (y' - y)^2
 *
 * y and y' being the heads' outputs before the output's projection. Every layer gets the input that
 * the teacher's own layers give it: what the student gives is not passed on. */
#ifndef ATTN_TRAINING_TRANSFER_H
#define ATTN_TRAINING_TRANSFER_H

#include "training/data.h"

typedef struct attn_transfer_options {
  int64_t steps, batch, length; /* windows of `length` tokens in a step */
  double learning_rate;         /* at the start; it falls to a tenth as a cosine */
  const volatile sig_atomic_t *interrupt;
} attn_transfer_options;

/* After each step, with its loss. false: stop. */
typedef bool (*attn_transfer_progress_fn)(void *context, int64_t step, double loss);

/* Layers whose mixers are the same in both are left alone. Both models on one device; `fresh`
 * [parameters of the student] says which parameters are trained: they are masters in float32
 * (float64), as attn_model_replace_mixer makes them. All others keep their bits. *loss: of the last
 * step; NaN after none. ATTN_INTERRUPTED after `interrupt`, or when progress says so;
 * ATTN_INVALID_ARGUMENT when the loss is not finite. */
attn_status attn_transfer(const attn_model *teacher, attn_model *student, const bool *fresh,
                          const attn_training_data *data, const attn_transfer_options *options,
                          attn_transfer_progress_fn progress, void *context, double *loss);

#endif
