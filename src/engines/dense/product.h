/* C[m, n] (+)= A[m, k] B[k, n] with B packed beforehand: what the dense products are made of.
 *
 * There are two ways to do it, with the same three functions each: oneDNN (onednn.c), and the tile
 * kernels of this library (panels.c), which know float64 and need nothing of the processor. */
#ifndef ATTN_ENGINES_DENSE_PRODUCT_H
#define ATTN_ENGINES_DENSE_PRODUCT_H

#include "attn/tensor.h"
#include "base/memory.h"
#include "tensor/blocks.h"

typedef struct attn_product attn_product;

/* A matrix in memory: element (i, j) at data[i * stride[0] + j * stride[1]]. One stride is 1. */
typedef struct attn_matrix {
  void *data;
  attn_dtype dtype;
  int64_t rows, columns, stride[2];
} attn_matrix;

/* B in the form that one way of multiplying likes best. */
typedef struct attn_packed {
  const attn_product *product; /* NULL: nothing packed yet */
  void *data;
  size_t bytes; /* that the form needs */
  int64_t k, n;
  attn_dtype dtype;
  _Alignas(16) char layout[768]; /* private to the product: the blocking of the packed form */
} attn_packed;

struct attn_product {
  const char *name;
  bool any_stride; /* A and C may have gaps between their rows */
  /* Fills in everything of `packed` but data for B [k, n], to be multiplied by matrices of about m
   * rows; false when this product cannot do it here. */
  bool (*plan)(int64_t m, int64_t k, int64_t n, attn_dtype dtype, attn_packed *packed);
  /* Writes packed->data (bytes, 64-byte aligned) from b. */
  attn_status (*pack)(const attn_packed *packed, const attn_matrix *b);
  /* A and C are row-major, gapless unless any_stride; C is of A's dtype or float32. */
  attn_status (*multiply)(const attn_matrix *a, const attn_packed *packed, const attn_matrix *c,
                          bool accumulate, attn_arena *scratch);
};

/* Threads that a product of m x n x k multiply-adds, or a pass over `bytes` of memory, is worth: a
 * fork and join costs as much as about a million of the former or some hundred kilobytes. */
int attn_product_threads(int64_t m, int64_t n, int64_t k);
int attn_pass_threads(int64_t bytes);

/* A as the panels' kernels want it: bfloat16 is read up to the next multiple of 32 columns, so
 * that A with other columns becomes a copy in `scratch`, padded with zeros. */
attn_status attn_panels_pad_depth(const attn_matrix *a, attn_matrix *padded, attn_arena *scratch);
/* The product of attn_product_panels in the calling thread alone, between the kernels' begin and
 * end: for B that comes a few panels at a time. A from attn_panels_pad_depth. C may be bfloat16
 * with float32 operands, too. */
void attn_panels_multiply_here(const attn_matrix *a, const attn_packed *packed,
                               const attn_matrix *c, bool accumulate);

/* W [outputs, inputs] in the blocks of a GGUF file: rows of whole blocks, one after the other; or
 * float8 E4M3 with scales, one for each block of scale_outputs x scale_inputs, that its numbers are
 * multiplied by. */
typedef struct attn_block_matrix {
  attn_block_type type;
  const void *data; /* borrowed; NULL: none */
  int64_t outputs, inputs;
  const float *scales; /* borrowed; NULL: none */
  int64_t scale_outputs, scale_inputs;
} attn_block_matrix;

/* Y (+)= X W^T, with W dequantised a group of outputs at a time to the dtype of X, or for bfloat16
 * without AMX to float32, to which X is then widened. */
attn_status attn_blocks_forward(const attn_block_matrix *w, const attn_matrix *x,
                                const attn_matrix *y, bool accumulate, attn_arena *scratch);
/* dX (+)= dY W in the same way. */
attn_status attn_blocks_backward_input(const attn_block_matrix *w, const attn_matrix *dy,
                                       const attn_matrix *dx, bool accumulate, attn_arena *scratch);
/* Y = X W^T for up to ATTN_MATVEC_ROWS rows: x and y are float32, or float64 both. With `round`, x
 * may be rounded to 8 bits (kernels/blocks.h). */
attn_status attn_blocks_matvec(const attn_block_matrix *w, const attn_matrix *x,
                               const attn_matrix *y, bool round, attn_arena *scratch);

/* dW[outputs, inputs] (+)= dY[tokens, outputs]^T X[tokens, inputs]: bfloat16 into float32, by our
 * tiles; rows may have gaps between them. */
attn_status attn_gradient_by_tiles(const attn_matrix *dy, const attn_matrix *x,
                                   const attn_matrix *dw, bool accumulate, attn_arena *scratch);

extern const attn_product attn_product_panels; /* can do everything */
extern const attn_product attn_product_onednn; /* float32 from AVX2 on, bfloat16 from AVX-512 on */

#endif
