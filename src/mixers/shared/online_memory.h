/* What Titans, OmegaNet and ATLAS share: projections through short convolutions, gates, and a
 * memory that learns while it reads (kernels/online_memory.h), whose weights are the state.
 *
 *   q, k = L2norm(silu(conv(x W^T))), v = silu(conv(x Wv^T))
 *   alpha, theta, eta, gamma' = sigmoid(x W^T + b), a number a head and token
 *   g_i = gradient of ||M'(phi(k_i)) - v_i||^2 by the memory's weights
 *   S_t = theta_t S_{t-1} + sum_{t - c < i <= t} gamma_i g_i,  gamma_i = gamma'_i / c
 *   M_t = alpha_t M_{t-1} - eta_t NS(S_t),  o_t = M_t(phi(q_t))
 *   M(z) = W1 z, or E z + W1 gelu(W2 z), or E z + W1 (gelu(W2 z) (.) W3 z), where E z is the key
 *   or query itself among its features, cut or filled up with 0 to the channels of a value
 *   y = (RMSNorm_head(o) (.) silu(x Wg^T)) Wo^T
 *
 * Nothing is published about gamma: it is one number a token here, and a window is a mean, so that
 * a step is as large whatever c is. Biases start such that memories forget slowly (alpha 0.98) and
 * learn in steps that do not overshoot within a chunk. */
#ifndef ATTN_MIXERS_ONLINE_MEMORY_H
#define ATTN_MIXERS_ONLINE_MEMORY_H

#include "mixers/mixer.h"

/* What a mixer has of all that. */
typedef struct attn_online_mixer {
  const char *name;
  attn_memory_kind memory; /* unless the options say another */
  bool windowed;           /* the Omega rule and polynomial features; else c = 1 and phi(x) = x */
  bool orthogonal;         /* eta and NS; else 1 and the identity */
} attn_online_mixer;

attn_status attn_online_configure(attn_mixer_options *options, const attn_online_mixer *mixer);
int attn_online_parameters(const attn_mixer_options *options, const attn_online_mixer *mixer,
                           attn_parameter_shape *shapes);
int attn_online_state(const attn_mixer_options *options, const attn_online_mixer *mixer,
                      attn_dtype compute, attn_state_part *parts);
attn_var *attn_online_apply(attn_graph *graph, const attn_mixer_call *call,
                            const attn_online_mixer *mixer, attn_var *x);

#endif
