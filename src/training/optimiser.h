/* AdamW with global-norm clipping.
 *
 * For each parameter w with gradient g, at step t = 1, 2, ... with learning rate r:
 *   g   <- s g,  s = gradient_scale min(1, clip / ||gradient_scale G||),  G all gradients together
 *   m   <- beta1 m + (1 - beta1) g
 *   v   <- beta2 v + (1 - beta2) g^2
 *   w   <- w - r (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) - r weight_decay w
 * where the decay term stands only for parameters with `decay` and reads the old w. Kingma and Ba,
 * arXiv:1412.6980; decoupled decay: Loshchilov and Hutter, arXiv:1711.05101; clipping: Pascanu et
 * al., arXiv:1211.5063.
 *
 * What is measured and not learnt (parameter.h: statistic) is w <- w - 0.1 gradient_scale g, g its
 * distance from what was measured; it has no moments and no part in the norm.
 *
 * Values are masters in float32 (or float64, for tests), gradients have the same dtype, moments
 * too. The result does not depend on the number of threads. */
#ifndef ATTN_TRAINING_OPTIMISER_H
#define ATTN_TRAINING_OPTIMISER_H

#include "files/safetensors.h"
#include "graph/parameter.h"

typedef struct attn_adamw {
  double beta1, beta2; /* [0, 1) */
  double epsilon;      /* > 0 */
  double weight_decay; /* >= 0 */
  double clip;         /* largest global norm; 0: no clipping */
} attn_adamw;

#define ATTN_ADAMW_INIT                                                                            \
  { .beta1 = 0.9, .beta2 = 0.95, .epsilon = 1e-8, .weight_decay = 0.1, .clip = 1.0 }

#define ATTN_STATISTIC_SHARE 0.1 /* usual for batch norms */

typedef struct attn_optimiser attn_optimiser;

/* Allocates the moments, all zero. Values and gradients are contiguous, of one shape, both float32
 * or both float64. The parameters must outlive the optimiser (the list itself is copied); their
 * order is part of the result, because the norm is summed in it. */
attn_status attn_optimiser_create(const attn_adamw *options, attn_parameter *const *parameters,
                                  int64_t count, attn_optimiser **optimiser);
/* The same of those among `count` parameters that have a gradient. */
attn_status attn_optimiser_create_trained(const attn_adamw *options, attn_parameter *parameters,
                                          int64_t count, attn_optimiser **optimiser);
void attn_optimiser_destroy(attn_optimiser *optimiser); /* NULL is fine */

typedef struct attn_step_info {
  double norm;  /* of all gradients together, after gradient_scale and before clipping */
  bool clipped; /* norm > clip */
} attn_step_info;

/* One step. `gradient_scale`: 1 / micro-batches when gradients were accumulated over several. When
 * the norm is not finite nothing is changed and ATTN_INVALID_ARGUMENT says which parameter is the
 * first bad one. Gradients are read only. Compute forms of the weights (parameter->weight) are
 * given the new values. `info` may be NULL. Allocates nothing. */
attn_status attn_optimiser_step(attn_optimiser *optimiser, double learning_rate,
                                double gradient_scale, attn_step_info *info);
/* Whether a step leaves the gradients zero: on a GPU, where it costs no pass of its own. */
bool attn_optimiser_zeroes(const attn_optimiser *optimiser);
/* Sets all gradients to zero. */
void attn_optimiser_zero_gradients(attn_optimiser *optimiser);

/* sqrt(sum of squares) of all gradients, accumulated in float64 in a fixed order. */
double attn_optimiser_norm(const attn_optimiser *optimiser);

int64_t attn_optimiser_steps(const attn_optimiser *optimiser); /* done so far */

/* The state for checkpoints: 1 + 2 * learnt parameters tensors, "optimiser.step" (int64 scalar),
 * "optimiser.m.NAME" and "optimiser.v.NAME", views of the live state (names borrowed too). */
int64_t attn_optimiser_state_count(const attn_optimiser *optimiser);
void attn_optimiser_state(attn_optimiser *optimiser, attn_named_tensor *tensors);
/* Takes the state from a file that holds those tensors. ATTN_BAD_FORMAT, and nothing changed, when
 * one is missing or has another dtype or shape. */
attn_status attn_optimiser_load(attn_optimiser *optimiser, const attn_safetensors *file);

#endif
