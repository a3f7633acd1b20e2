/* Products with quantised weights that stay in their blocks (tensor/blocks.h). */
#ifndef ATTN_ENGINES_DENSE_BLOCKS_H
#define ATTN_ENGINES_DENSE_BLOCKS_H

#include "engines/dense/product.h"
#include "tensor/blocks.h"

/* W [rows, columns]: rows of whole blocks, one after the other. */
typedef struct attn_block_matrix {
  const void *data; /* NULL: none */
  attn_block_type type;
  int64_t rows, columns;
} attn_block_matrix;

/* Rows first .. first + count - 1 of W in `dtype`, in memory from `scratch`. */
attn_status attn_blocks_unpack(const attn_block_matrix *w, attn_dtype dtype, int64_t first,
                               int64_t count, attn_matrix *values, attn_arena *scratch);

/* y = x W^T for up to ATTN_MATVEC_ROWS rows; x and y are float32, or float64 when `compute` is.
 * bfloat16 may round x to 8 bits where that is faster (kernels/blocks.h), about as coarse as
 * bfloat16 itself; the others compute in their own dtype. */
attn_status attn_blocks_few_rows(const attn_block_matrix *w, attn_dtype compute,
                                 const attn_matrix *x, const attn_matrix *y, attn_arena *scratch);

#endif
