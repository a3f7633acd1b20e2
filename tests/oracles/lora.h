/* Low-rank adaptation in float64, written from its equations; nothing here is shared with the
 * library. W is [outputs, inputs], A [rank, inputs], B [outputs, rank], m [outputs] or NULL. */
#ifndef ATTN_ORACLES_LORA_H
#define ATTN_ORACLES_LORA_H

#include <stdint.h>

typedef struct oracle_lora {
  double *x, *w, *a, *b, *m;
  int64_t rows, inputs, outputs, rank;
  double scale;
} oracle_lora;

/* V = W + scale B A [outputs, inputs], and the norms of its rows [outputs]. */
void oracle_lora_sum(double *v, const oracle_lora *l);
void oracle_lora_norms(double *n, const oracle_lora *l);
/* y [rows, outputs] = V x, of DoRA (m is there) m / n V x with the norms n that are given. */
void oracle_lora_forward(double *y, const oracle_lora *l, const double *n);

#endif
