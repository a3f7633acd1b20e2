/* Based (arXiv 2402.18668), the weights of every pair of tokens: with s = q_i . k_j / sqrt(n)
 *
 *   o_i = sum_{j <= i} (1 + s + s^2 / 2) v_j / (sum_{j <= i} (1 + s + s^2 / 2) + 1e-12) */
#include "oracles/mixers.h"

#include <math.h>
#include <stdlib.h>

enum { Q, K, V, O };

void oracle_based(const attn_mixer_options *o, int64_t rows, const double *x,
                  const double *const *p, double *y) {
  int64_t n = o->feature_dim, keys = o->heads * n, values = o->heads * o->value_dim;
  double *q = oracle_linear(rows, keys, o->hidden, x, p[Q]);
  double *k = oracle_linear(rows, keys, o->hidden, x, p[K]);
  double *v = oracle_linear(rows, values, o->hidden, x, p[V]);
  double *out = calloc((size_t)(rows * values + 1), sizeof *out);
  for (int64_t h = 0; h < o->heads; ++h)
    for (int64_t i = 0; i < rows; ++i) {
      double total = 1e-12, *to = out + i * values + h * o->value_dim;
      for (int64_t j = 0; j <= i; ++j) {
        double s = 0;
        for (int64_t c = h * n; c < (h + 1) * n; ++c) s += q[i * keys + c] * k[j * keys + c];
        s /= sqrt((double)n);
        double weight = 1 + s + s * s / 2;
        total += weight;
        for (int64_t c = 0; c < o->value_dim; ++c)
          to[c] += weight * v[j * values + h * o->value_dim + c];
      }
      for (int64_t c = 0; c < o->value_dim; ++c) to[c] /= total;
    }
  double *result = oracle_linear(rows, o->hidden, values, out, p[O]);
  for (int64_t i = 0; i < rows * o->hidden; ++i) y[i] = result[i];
  free(q), free(k), free(v), free(out), free(result);
}
