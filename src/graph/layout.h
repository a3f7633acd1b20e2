/* How the rows of a batch make up sequences: equal lengths, or packed with offsets. */
#ifndef ATTN_GRAPH_LAYOUT_H
#define ATTN_GRAPH_LAYOUT_H

#include <stdbool.h>
#include <stdint.h>

typedef struct attn_layout {
  int64_t batch;          /* sequences */
  int64_t length;         /* of each; the longest when packed */
  int64_t rows;           /* in all: batch * length, or offsets[batch] */
  const int32_t *offsets; /* packed: batch + 1 cumulative lengths; else NULL */
  int64_t position;       /* of the first token of every sequence: what a state has seen before */
  const int64_t *position_place; /* where `position` stands in memory that lasts and moves on, which
                                  * steps that are replayed (replay.h) need; else NULL */
} attn_layout;

/* So many tokens behind a state give what they would give one by one, to the bit: products take
 * them row by row, and so do the engines (mixers/mixer.h). Speculation relies on it. */
enum { ATTN_FEW_ROWS = 8 };

static inline attn_layout attn_layout_equal(int64_t batch, int64_t length) {
  return (attn_layout){.batch = batch, .length = length, .rows = batch * length};
}

static inline attn_layout attn_layout_packed(int64_t batch, const int32_t *offsets) {
  attn_layout layout = {.batch = batch, .rows = offsets[batch], .offsets = offsets};
  for (int64_t b = 0; b < batch; ++b)
    if (offsets[b + 1] - offsets[b] > layout.length) layout.length = offsets[b + 1] - offsets[b];
  return layout;
}

/* The rows [first, first + length) of sequence b. */
static inline int64_t attn_layout_first(const attn_layout *layout, int64_t b) {
  return layout->offsets ? layout->offsets[b] : b * layout->length;
}
static inline int64_t attn_layout_length(const attn_layout *layout, int64_t b) {
  return layout->offsets ? layout->offsets[b + 1] - layout->offsets[b] : layout->length;
}

#endif
