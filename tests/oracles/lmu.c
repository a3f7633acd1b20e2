/* LMU (arXiv 2402.04882), token by token:
 *
 *   u = relu(W_u x + b_u),  m_t = Abar m_{t-1} + Bbar u_t for each head
 *   h = relu(W_h [m; x] + b_h),  y = W_o h + b_o */
#include "oracles/legendre.h"
#include "oracles/mixers.h"

#include <stdlib.h>

enum { U, U_BIAS, H, H_BIAS, O, O_BIAS };

static void rectify(double *x, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (x[i] < 0) x[i] = 0;
}

void oracle_lmu(const attn_mixer_options *o, int64_t rows, const double *x, const double *const *p,
                double *y) {
  int64_t n = o->memory_dim, hidden = o->hidden, inputs = o->heads * n + hidden;
  double *u = oracle_affine(rows, o->heads, hidden, x, p[U], p[U_BIAS]);
  double *both = calloc((size_t)(rows * inputs + 1), sizeof *both);
  rectify(u, rows * o->heads);
  for (int64_t h = 0; h < o->heads; ++h)
    oracle_legendre_memory(n, o->theta, rows, u + h, o->heads, both + h * n, inputs);
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t i = 0; i < hidden; ++i) both[t * inputs + o->heads * n + i] = x[t * hidden + i];
  double *h = oracle_affine(rows, hidden, inputs, both, p[H], p[H_BIAS]);
  rectify(h, rows * hidden);
  double *result = oracle_affine(rows, hidden, hidden, h, p[O], p[O_BIAS]);
  for (int64_t i = 0; i < rows * hidden; ++i) y[i] = result[i];
  free(u), free(both), free(h), free(result);
}
