/* Aaren (arXiv 2405.13956), every prefix by itself:
 *
 *   q = h Wq^T, s_j = q . k_j / sqrt(dim), o_t = sum_{j <= t} softmax_j(s) v_j,  y = o Wo^T */
#include "oracles/mixers.h"

#include <math.h>
#include <stdlib.h>

enum { QUERY, Q, K, V, O };

void oracle_aaren(const attn_mixer_options *o, int64_t rows, const double *x,
                  const double *const *p, double *y) {
  int64_t keys = o->heads * o->dim, values = o->heads * o->value_dim;
  double *q = oracle_linear(1, keys, o->hidden, p[QUERY], p[Q]);
  double *k = oracle_linear(rows, keys, o->hidden, x, p[K]);
  double *v = oracle_linear(rows, values, o->hidden, x, p[V]);
  double *out = calloc((size_t)(rows * values + 1), sizeof *out);
  double *s = malloc((size_t)(rows + 1) * sizeof *s);
  for (int64_t h = 0; h < o->heads; ++h)
    for (int64_t t = 0; t < rows; ++t) {
      double greatest = -INFINITY, total = 0;
      for (int64_t j = 0; j <= t; ++j) {
        s[j] = 0;
        for (int64_t c = h * o->dim; c < (h + 1) * o->dim; ++c) s[j] += q[c] * k[j * keys + c];
        s[j] /= sqrt((double)o->dim);
        greatest = fmax(greatest, s[j]);
      }
      for (int64_t j = 0; j <= t; ++j) total += exp(s[j] - greatest);
      for (int64_t j = 0; j <= t; ++j)
        for (int64_t c = h * o->value_dim; c < (h + 1) * o->value_dim; ++c)
          out[t * values + c] += exp(s[j] - greatest) / total * v[j * values + c];
    }
  double *result = oracle_linear(rows, o->hidden, values, out, p[O]);
  for (int64_t i = 0; i < rows * o->hidden; ++i) y[i] = result[i];
  free(q), free(k), free(v), free(out), free(s), free(result);
}
