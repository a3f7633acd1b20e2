/* What DeltaNet, Gated DeltaNet and KDA share: projections through short convolutions, normalised
 * queries and keys, and a state that is a matrix and three convolution tails. */
#ifndef ATTN_MIXERS_DELTA_H
#define ATTN_MIXERS_DELTA_H

#include "mixers/mixer.h"

/* The first parameters of each. */
enum {
  ATTN_DELTA_Q,
  ATTN_DELTA_K,
  ATTN_DELTA_V,
  ATTN_DELTA_BETA,
  ATTN_DELTA_NORM,
  ATTN_DELTA_OUT,
  ATTN_DELTA_Q_CONV,
  ATTN_DELTA_K_CONV,
  ATTN_DELTA_V_CONV,
  ATTN_DELTA_PARAMETERS
};
enum { ATTN_DELTA_MATRIX, ATTN_DELTA_Q_TAIL, ATTN_DELTA_K_TAIL, ATTN_DELTA_V_TAIL };

/* attn_mixer_configure_heads, and the taps of the convolutions. */
attn_status attn_delta_configure(attn_mixer_options *options, const char *mixer);
/* Fills in shapes[0 .. ATTN_DELTA_PARAMETERS). */
int attn_delta_parameters(const attn_mixer_options *options, attn_parameter_shape *shapes);
int attn_delta_state(const attn_mixer_options *options, attn_dtype compute, attn_state_part *parts);

/* q, k (L2-normalised) and v as [rows, heads, dim], and beta [rows, value heads] = sigmoid(x Wb^T).
 */
typedef struct attn_delta_inputs {
  attn_var *q, *k, *v, *beta;
} attn_delta_inputs;
/* All of it but beta; then all. */
attn_delta_inputs attn_delta_heads(attn_graph *graph, const attn_mixer_call *call, attn_var *x);
attn_delta_inputs attn_delta_project(attn_graph *graph, const attn_mixer_call *call, attn_var *x);
/* RMSNorm over each head of o, joined to [rows, value heads * value dim]. */
attn_var *attn_delta_normalise(attn_graph *graph, const attn_mixer_call *call, attn_var *o);
/* -exp(A_log) softplus(f + dt_bias): f [rows, n] wide, A_log one for each `repeat` columns. */
attn_var *attn_delta_log_decay(attn_graph *graph, attn_var *f, attn_var *a_log, attn_var *dt_bias,
                               int64_t repeat);

#endif
