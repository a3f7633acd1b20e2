/* Exact softmax attention and its gradient in float64, by straight loops over every (query, key).
 */
#ifndef ATTN_ORACLE_SOFTMAX_H
#define ATTN_ORACLE_SOFTMAX_H

#include <stdbool.h>
#include <stdint.h>

/* One sequence and one head; arrays are dense. Absent inputs and outputs are NULL. */
typedef struct oracle_softmax {
  int64_t queries, keys, dim, value_dim;
  double scale, soft_cap; /* soft_cap 0: none */
  bool causal;
  int64_t window_left, window_right; /* -1: none */
  double alibi_slope;                /* 0: none */
  const double *sink;                /* one logit */
  const double *q, *k, *v;           /* [queries, dim], [keys, dim], [keys, value_dim] */
  const double *bias;                /* [queries, keys] */
  const bool *listed;                /* [queries, keys]: pairs that the masks may leave */
  double *o, *lse;                   /* [queries, value_dim], [queries] */

  const double *d_o, *d_lse; /* gradients of the loss */
  /* These are added to, so that heads that share keys can share arrays. */
  double *d_q, *d_k, *d_v, *d_bias, *d_sink;
} oracle_softmax;

void oracle_softmax_forward(const oracle_softmax *problem);
/* Recomputes what it needs; o and lse are not read. */
void oracle_softmax_backward(const oracle_softmax *problem);

#endif
