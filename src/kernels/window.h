/* Tensors of windows of exact attention that a linear part completes (LoLCATs, arXiv 2410.10254):
 * the greatest score in each query's window, and both parts under one normaliser.
 *
 * Rows are [rows, heads, n] with contiguous channels and other strides free. "Wide" is float64 for
 * float64, else float32. */
#ifndef ATTN_KERNELS_WINDOW_H
#define ATTN_KERNELS_WINDOW_H

#include "attn/tensor.h"

/* Query r sees the rows first[r] .. end[r] - 1 of the keys, at least one; the queries that see key
 * j are among the rows from[j] .. until[j] - 1, possibly none. On the device of the tensors. */
typedef struct attn_window_ranges {
  const int32_t *first, *end, *from, *until;
} attn_window_ranges;

/* greatest[r, h] = max over the keys j that query r sees of scale q[r, h] . k[j, h'], and place[r,
 * h] the first j that has it; head h reads h' = h kv_heads / heads. Backward: with the greatest's
 * gradient dg, dq[r, h] = scale dg[r, h] k[place[r, h], h'], dk the transpose. */
typedef struct attn_greatest_tensors {
  const attn_tensor *q, *k;    /* [rows, heads, dim], [keys, kv_heads, dim] */
  const attn_tensor *greatest; /* wide, contiguous [rows, heads] */
  const attn_tensor *place;    /* int32, likewise */
  const attn_tensor *dg;       /* wide, contiguous; backward only */
  const attn_tensor *dq, *dk;  /* overwritten */
  double scale;
} attn_greatest_tensors;

/* With e = exp(factor + lse - greatest), what the window's weights sum to beside the linear ones,
 *   y = (e window + sum_j w_j v_j) / (e + d),  linear = [sum_j w_j v_j, d = sum_j w_j, ...];
 * y = window where d is not above 0. Backward: from dy those of window and linear (0 behind d), and
 * of log e. */
typedef struct attn_join_tensors {
  const attn_tensor *window;         /* [rows, heads, dim] */
  const attn_tensor *linear;         /* [rows, heads, n > dim] */
  const attn_tensor *lse, *greatest; /* wide [rows, heads], any strides */
  const attn_tensor *factor;         /* wide [heads] */
  const attn_tensor *y;              /* as window; forward only */
  const attn_tensor *dy;             /* backward, likewise; the rest is overwritten */
  const attn_tensor *d_window, *d_linear;
  const attn_tensor *d_log; /* wide, contiguous [rows, heads] */
} attn_join_tensors;

#endif
