/* Dense products with the weights of a model: projections, feed-forward, vocabulary.
 *
 *   forward          Y  (+)= X W^T      [rows, outputs]
 *   backward input   dX (+)= dY W       [rows, inputs]
 *   backward weight  dW (+)= dY^T X     [outputs, inputs]
 *
 * with W [outputs, inputs], row-major as model files store it. W is repacked once for the many-row
 * products (panels.h, onednn.h); up to ATTN_MATVEC_ROWS rows read W as it is (kernels/matvec.h),
 * because there every weight is used only a few times and memory sets the speed. Quantised weights
 * are read as they are by both.
 *
 * The tensors here are matrices (rank 2), all on one device (on a GPU the module's library
 * multiplies them as they lie, and scratch is not used), whose innermost dimension is contiguous;
 * the row stride is free (at least the row's length, for outputs). Sums are float32, or float64 for
 * float64. The result is the same bits at the same thread count and kernel path. */
#ifndef ATTN_ENGINES_DENSE_H
#define ATTN_ENGINES_DENSE_H

#include "attn/tensor.h"
#include "base/memory.h"
#include "tensor/blocks.h"

typedef struct attn_weight attn_weight;

/* A weight without values yet. `compute` is float64, float32 or bfloat16 (ATTN_UNSUPPORTED for
 * others); outputs and inputs are at least 1 (ATTN_INVALID_SHAPE). */
attn_status attn_weight_create(int64_t outputs, int64_t inputs, attn_dtype compute,
                               attn_weight **weight);
void attn_weight_destroy(attn_weight *weight);

/* New values, w [outputs, inputs] of any floating dtype, on the device where products will be.
 * Borrows w when its dtype is `compute` and its rows are contiguous: the caller keeps it alive, and
 * calls this again after changing values in place. Otherwise keeps a converted copy. Packed forms
 * are remade when next needed, in the memory that they have. Not to be called while another thread
 * uses the weight. */
attn_status attn_weight_set(attn_weight *weight, const attn_tensor *w);

/* New values from blocks: [outputs, inputs] as a GGUF file has them, rows of whole blocks one after
 * the other, at any alignment. Borrowed: the caller keeps `blocks` alive. Replaces values set
 * before and frees their packed forms; owns nothing itself, products dequantise a few rows at a
 * time into `scratch`. The values are those of attn_blocks_to_f32; bfloat16 products may round them
 * to bfloat16 (many rows) or activations to 8 bits, 32 to a scale (up to ATTN_MATVEC_ROWS rows).
 * ATTN_INVALID_SHAPE when inputs is not a multiple of the block's elements; ATTN_UNSUPPORTED for
 * types that cannot be converted, ATTN_INVALID_ARGUMENT for unknown ones. */
attn_status attn_weight_set_blocks(attn_weight *weight, attn_device device, attn_block_type type,
                                   const void *blocks);

/* The same from float8 E4M3 numbers [outputs, inputs] and what they are multiplied by, a scale for
 * each block of scale_outputs x scale_inputs (at least 1): [ceil(outputs / scale_outputs),
 * ceil(inputs / scale_inputs)]. Both are borrowed. The values are products rounded to float32;
 * activations are not rounded to 8 bits. */
attn_status attn_weight_set_scaled(attn_weight *weight, const void *numbers, const float *scales,
                                   int64_t scale_outputs, int64_t scale_inputs);

/* The row-major [outputs, inputs] values in the compute dtype; data is NULL before the first set,
 * and for blocks. */
attn_tensor attn_weight_values(const attn_weight *weight);

/* Heap bytes that the weight owns: a converted copy, packed forms. */
size_t attn_weight_bytes(const attn_weight *weight);

/* The products. x, dy have the compute dtype; y, dx have the compute dtype or float32; dw is
 * float32 (float64 for float64). With `accumulate` the product is added to what is there. `scratch`
 * gives the temporary memory and has it back on return. Outputs must not overlap inputs.
 * ATTN_INVALID_ARGUMENT (dtype, no values), ATTN_INVALID_SHAPE, ATTN_OUT_OF_MEMORY.
 *
 * Any number of threads may use one weight at the same time, each with its own scratch. Forward
 * with rows <= ATTN_MATVEC_ROWS, the decode step, takes no lock and allocates nothing once
 * `scratch` has room for its rows in float32 and, with blocks, for a row of W for each thread. Not
 * to be called from inside an OpenMP parallel region. */
attn_status attn_dense_forward(attn_weight *weight, const attn_tensor *x, const attn_tensor *y,
                               bool accumulate, attn_arena *scratch);
attn_status attn_dense_backward_input(attn_weight *weight, const attn_tensor *dy,
                                      const attn_tensor *dx, bool accumulate, attn_arena *scratch);
attn_status attn_dense_backward_weight(const attn_tensor *dy, const attn_tensor *x,
                                       const attn_tensor *dw, bool accumulate, attn_arena *scratch);

/* c_i (+)= a_i b_i, or a_i b_i^T, for each i of a batch: a [batch, m, k], b [batch, k, n] or
 * [batch, n, k], c [batch, m, n], with free strides but the innermost, and any matrices: nothing is
 * kept packed. a and b are of one dtype, c of that or float32. Errors and scratch as above. */
attn_status attn_dense_batch(const attn_tensor *a, const attn_tensor *b, bool transpose_b,
                             const attn_tensor *c, bool accumulate, attn_arena *scratch);
/* c_i = a_i^T b_i, sums over rows: a [batch, k, m], b [batch, k, n] of one dtype, c [batch, m, n]
 * float32 (float64 for float64). k may be 0. */
attn_status attn_dense_batch_inner(const attn_tensor *a, const attn_tensor *b, const attn_tensor *c,
                                   attn_arena *scratch);

#endif
