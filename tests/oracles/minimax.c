/* Lightning Attention in MiniMax-01 (arXiv 2501.08313), the recurrence:
 *
 *   q, k, v = silu(W x);  S_t = exp(-s_h) S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t
 *   y = Wo (sigmoid(Wg x) (.) RMSNorm(o)), s_h = 2^(-8 (h + 1) / H) (1 - l / (L - 1 + 1e-5) + 1e-5)
 */
#include "oracles/mixers.h"

#include <math.h>
#include <stdlib.h>

enum { Q, K, V, GATE, NORM, OUT };

void oracle_minimax(const attn_mixer_options *o, int64_t rows, const double *x,
                    const double *const *p, double *y) {
  int64_t n = o->dim, m = o->value_dim, keys = o->heads * n, values = o->heads * m;
  double *q = oracle_linear(rows, keys, o->hidden, x, p[Q]);
  double *k = oracle_linear(rows, keys, o->hidden, x, p[K]);
  double *v = oracle_linear(rows, values, o->hidden, x, p[V]);
  double *gate = oracle_linear(rows, values, o->hidden, x, p[GATE]);
  double *out = calloc((size_t)(rows * values), sizeof *out);
  double *state = malloc((size_t)(n * m) * sizeof *state);
  oracle_silu(q, rows * keys);
  oracle_silu(k, rows * keys);
  oracle_silu(v, rows * values);
  for (int64_t h = 0; h < o->heads; ++h) {
    double depth = (double)o->layer / ((double)o->layers - 1 + 1e-5);
    double decay = exp(-pow(2, -8.0 * (double)(h + 1) / (double)o->heads) * (1 - depth + 1e-5));
    for (int64_t i = 0; i < n * m; ++i) state[i] = 0;
    for (int64_t t = 0; t < rows; ++t)
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < m; ++j) {
          double *s = &state[i * m + j];
          *s = decay * *s + k[t * keys + h * n + i] * v[t * values + h * m + j];
          out[t * values + h * m + j] += q[t * keys + h * n + i] * *s;
        }
  }
  oracle_rms_normalise(out, rows, values, p[NORM], o->norm_epsilon);
  for (int64_t i = 0; i < rows * values; ++i) out[i] *= oracle_sigmoid(gate[i]);
  double *result = oracle_linear(rows, o->hidden, values, out, p[OUT]);
  for (int64_t i = 0; i < rows * o->hidden; ++i) y[i] = result[i];
  free(q), free(k), free(v), free(gate), free(out), free(state), free(result);
}
