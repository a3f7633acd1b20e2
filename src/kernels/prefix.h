/* Tensors of running means with softmax weights: o_t = sum_{j <= t} exp(s_j) v_j / sum_{j <= t}
 * exp(s_j) for each head of each sequence (arXiv 2405.13956). */
#ifndef ATTN_KERNELS_PREFIX_H
#define ATTN_KERNELS_PREFIX_H

#include "attn/tensor.h"

enum {
  ATTN_PREFIX_CHUNK = 64,    /* tokens that are walked one after the other */
  ATTN_PREFIX_MOST_DIM = 256 /* channels of a head */
};

/* v, o and their gradients are [batch, length, heads, dim] with contiguous channels and other
 * strides free; the others are contiguous [batch, length, heads], of float64 for float64, else
 * float32. After token t the greatest score is `greatest`, and `sum` the sum of exp(s - greatest).
 */
typedef struct attn_prefix_tensors {
  const attn_tensor *s, *v;
  const attn_tensor *o, *greatest, *sum; /* written by forward, read by backward */
  const attn_tensor *d_o, *ds, *dv;      /* backward: the last two are overwritten */
} attn_prefix_tensors;

/* What the tokens before the first came to, replaced by what all come to: contiguous, of the dtype
 * of s. weighted is the sum of exp(s - greatest) v; a sum of 0 says that there were no tokens. */
typedef struct attn_prefix_state {
  attn_tensor greatest, sum; /* [heads] */
  attn_tensor weighted;      /* [heads, dim] */
} attn_prefix_state;

#endif
