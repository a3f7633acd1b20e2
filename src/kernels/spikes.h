/* Tensors of leaky integrate-and-fire neurons that step along a sequence (arXiv 2402.04882):
 *
 *   h_t = v_{t-1} + (x_t - v_{t-1}) / tau,  s_t = 1 if h_t >= threshold, else 0
 *   v_t = h_t (1 - s_t): a spike resets to 0
 *
 * and back, with the derivative of sigmoid(4 (h - threshold)) in place of the step's, and no
 * gradient through the reset's own spike:
 *
 *   dh_t = ds_t 4 sigmoid' + dv_t (1 - s_t),  dx_t = dh_t / tau,  dv_{t-1} = dh_t (1 - 1 / tau) */
#ifndef ATTN_KERNELS_SPIKES_H
#define ATTN_KERNELS_SPIKES_H

#include "attn/tensor.h"

#define ATTN_SURROGATE_SLOPE 4.0

/* All [batch, length, n] with contiguous n and other strides free; x, potential and dx are float64
 * where any is, else float32. */
typedef struct attn_lif_tensors {
  const attn_tensor *x, *spikes; /* spikes: of any floating dtype */
  const attn_tensor *potential;  /* h, written by forward and read by backward; NULL: not kept */
  const attn_tensor *state; /* forward: v [n] before the first token, replaced by the last's, of
                             * the dtype of x; batch is 1. NULL: 0, not kept */
  const attn_tensor *d_spikes, *dx; /* backward: dx is overwritten */
  double tau, threshold;
} attn_lif_tensors;

#endif
