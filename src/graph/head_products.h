/* Products for each sequence and head: what attention without tiles is made of. */
#ifndef ATTN_GRAPH_HEAD_PRODUCTS_H
#define ATTN_GRAPH_HEAD_PRODUCTS_H

#include "graph/graph.h"
#include "graph/layout.h"

/* Whether q [rows, heads, dim], k [key rows, heads, dim] and v [key rows, heads, n] go together. */
bool attn_are_heads(const attn_tensor *q, const attn_layout *layout, const attn_tensor *k,
                    const attn_tensor *v, const attn_layout *key_layout);
/* `count` sequences of `length` rows each, from row `first` on, of rows [rows, heads, n], as
 * [count, heads, length, n]. */
attn_tensor attn_rows_by_head(const attn_tensor *rows, int64_t first, int64_t count,
                              int64_t length);
/* scale times rows [rows, heads, n] in a dtype, each head's numbers side by side; the rows
 * themselves where they are that already. */
attn_tensor attn_rows_in(attn_graph *graph, const attn_tensor *rows, attn_dtype dtype,
                         double scale);

/* c = a b, a b^T or a^T b, for the last two axes of tensors [count, heads, ..] whose innermost axes
 * are contiguous: in batches along the longer of the first two, so that there are few calls.
 * Dtypes as in attn_dense_batch and attn_dense_batch_inner. */
typedef enum attn_head_product {
  ATTN_BY_ROWS,
  ATTN_BY_ROWS_TRANSPOSED,
  ATTN_OVER_ROWS
} attn_head_product;
void attn_multiply_heads(attn_graph *graph, attn_head_product kind, const attn_tensor *a,
                         const attn_tensor *b, const attn_tensor *c);

#endif
