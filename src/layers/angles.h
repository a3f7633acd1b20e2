/* Tables of cos(n theta_j) and sin(n theta_j) for the positions n of a layout: what rotary
 * embeddings and LRPE multiply by. */
#ifndef ATTN_LAYERS_ANGLES_H
#define ATTN_LAYERS_ANGLES_H

#include "graph/graph.h"
#include "graph/layout.h"

/* Two [length, width] tensors of the wide dtype from the graph's memory, theta [width] float64.
 * Angles are float64, so that position one million keeps its phase. */
attn_status attn_angle_tables(attn_graph *graph, const attn_tensor *theta,
                              const attn_layout *layout, attn_tensor *cosines, attn_tensor *sines);

/* The channels [channel, channel + count) of x [rows, heads, dim] in the sequences [sequence,
 * sequence + batch) of a layout, which are equally long: [batch, length, heads, count]. And a table
 * [longest, heads or 1, width], as rows of [longest, ..], seen in the same shape. */
attn_tensor attn_angle_view(const attn_tensor *x, const attn_layout *layout, int64_t sequence,
                            int64_t batch, int64_t channel, int64_t count);
attn_tensor attn_angle_table_view(const attn_tensor *table, const attn_tensor *view, bool by_head);
/* How many sequences from `sequence` on go in one pass: all, or one when they are packed. */
static inline int64_t attn_angle_batch(const attn_layout *layout) {
  return layout->offsets ? 1 : layout->batch;
}

#endif
