/* Linear attention with a carried state, token by token in float64, for one head of one sequence:
 * straight loops from the equations of include/attn/recurrent.h, and the reverse recurrence for the
 * gradients. All arrays are contiguous, row-major. */
#ifndef ATTN_ORACLE_RECURRENT_H
#define ATTN_ORACLE_RECURRENT_H

#include <stdbool.h>
#include <stdint.h>

typedef enum oracle_decay {
  ORACLE_DECAY_NONE,
  ORACLE_DECAY_HEAD,
  ORACLE_DECAY_TOKEN,
  ORACLE_DECAY_CHANNEL
} oracle_decay;

typedef struct oracle_recurrent {
  int64_t tokens, dim, value_dim;
  oracle_decay decay;
  bool delta, normalise;
  double scale, epsilon;
  const double *q, *k;   /* [tokens, dim] */
  const double *v;       /* [tokens, value_dim] */
  const double *g;       /* log decay: [1], [tokens] or [tokens, dim] */
  const double *beta;    /* [tokens] */
  const double *s0, *z0; /* [dim, value_dim], [dim]; NULL: zero */
  double *o, *s1, *z1;   /* outputs; s1 and z1 may be NULL */

  const double *d_o, *d_s1, *d_z1;               /* d_s1 and d_z1 may be NULL */
  double *dq, *dk, *dv, *dg, *dbeta, *ds0, *dz0; /* dg like g, summed over tokens per head */
} oracle_recurrent;

void oracle_recurrent_forward(const oracle_recurrent *x);
/* Overwrites all of dq, dk, dv, dg (with decay), dbeta (with delta), ds0, dz0 (normalise). */
void oracle_recurrent_backward(const oracle_recurrent *x);

#endif
