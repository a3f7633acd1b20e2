/* What the mixers with a Legendre memory share: lmu and spiking_lmu. */
#ifndef ATTN_MIXERS_LEGENDRE_H
#define ATTN_MIXERS_LEGENDRE_H

#include "mixers/mixer.h"

/* Defaults and checks: one head, a memory of hidden / heads, theta 128. */
attn_status attn_legendre_configure(attn_mixer_options *options, const char *mixer);
/* A matrix [outputs, inputs] and a bias, uniform between +-1 / sqrt(inputs) as in the published
 * code. */
void attn_legendre_affine(attn_parameter_shape shapes[2], const char *weight, const char *bias,
                          int64_t outputs, int64_t inputs);
/* x W^T + b with parameters i and i + 1 of a call, wide. */
attn_var *attn_legendre_apply(attn_graph *graph, const attn_mixer_call *call, attn_var *x, int i);
/* m [heads, memory_dim]. */
attn_state_part attn_legendre_state(const attn_mixer_options *options, attn_dtype compute);
/* u [rows, heads] into m [rows, heads, memory_dim], with the state of part `part` where there is
 * one. */
attn_var *attn_legendre_memory(attn_graph *graph, const attn_mixer_call *call, attn_var *u,
                               int part);

#endif
