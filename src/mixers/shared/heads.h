/* What mixers share whose queries, keys and values are those of attention in published models:
 * biases of the projections, normalised heads, rotary positions. */
#ifndef ATTN_MIXERS_HEADS_H
#define ATTN_MIXERS_HEADS_H

#include "mixers/mixer.h"

/* Parameters that there are by the options `bias`, `output_bias` and `qk_norm`, in this order. */
typedef enum attn_heads_optional {
  ATTN_HEADS_Q_BIAS,
  ATTN_HEADS_K_BIAS,
  ATTN_HEADS_V_BIAS,
  ATTN_HEADS_O_BIAS,
  ATTN_HEADS_Q_NORM,
  ATTN_HEADS_K_NORM,
  ATTN_HEADS_OPTIONAL
} attn_heads_optional;

/* q_proj, k_proj, v_proj, o_proj, in this order of `place`. */
enum { ATTN_HEADS_MATRICES = 4 };
void attn_heads_matrices(const attn_mixer_options *options,
                         attn_parameter_shape matrices[ATTN_HEADS_MATRICES]);
/* Writes those that there are; how many. */
int attn_heads_parameters(const attn_mixer_options *options, attn_parameter_shape *shapes);
/* Where `which` stands when they begin at `first`; -1: there is none. */
int attn_heads_place(const attn_mixer_options *options, int first, attn_heads_optional which);

/* x W^T + b, W parameter `weight`, b as above. */
attn_var *attn_heads_project(attn_graph *graph, const attn_mixer_call *call, attn_var *x,
                             int weight, int first, attn_heads_optional bias);
/* Queries or keys [rows, heads, dim], normalised and turned by their positions. */
attn_var *attn_heads_position(attn_graph *graph, const attn_mixer_call *call, attn_var *x,
                              int first, attn_heads_optional norm);

#endif
