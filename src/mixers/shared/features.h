/* What normalised linear attention over features of queries and keys shares: the state, and
 * Hedgehog's feature maps (arXiv 2402.04347), which LAWCAT has too. */
#ifndef ATTN_MIXERS_FEATURES_H
#define ATTN_MIXERS_FEATURES_H

#include "mixers/mixer.h"

enum { ATTN_MOST_FEATURES = 256 }; /* of the engine's keys */
/* Parts of the state, as attn_mixer_recurrent takes them. */
enum { ATTN_FEATURES_MATRIX, ATTN_FEATURES_NORMALISER, ATTN_FEATURES_PARTS };

/* S [heads, features, value_dim] and z [heads, features] into parts[0 .. ATTN_FEATURES_PARTS). */
int attn_features_state(const attn_mixer_options *options, int64_t features, attn_dtype compute,
                        attn_state_part *parts);

/* Refuses a feature_dim whose features, twice as many, are more than the engine takes:
 * ATTN_INVALID_ARGUMENT. */
attn_status attn_features_check(const attn_mixer_options *options, const char *mixer);
/* A feature map's matrix for each head, [heads feature_dim, dim], which starts as the identity. */
attn_parameter_shape attn_features_matrix(const attn_mixer_options *options, const char *name);
/* Hedgehog's features of y [rows, heads, n], [rows, heads, 2 n], by one of its three maps. */
attn_var *attn_features_mirrored(attn_graph *graph, attn_feature_map map, attn_var *y);

#endif
