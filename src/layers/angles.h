/* Tables of cos(n theta_j) and sin(n theta_j) for positions n = first, first + 1, ...: what rotary
 * embeddings and LRPE multiply by. */
#ifndef ATTN_LAYERS_ANGLES_H
#define ATTN_LAYERS_ANGLES_H

#include "graph/graph.h"

/* Two [count, width] tensors of the wide dtype from the arena. Angles are float64, so that position
 * one million keeps its phase. */
attn_status attn_angle_tables(attn_graph *graph, const double *theta, int64_t width, int64_t first,
                              int64_t count, attn_tensor *cosines, attn_tensor *sines);

#endif
