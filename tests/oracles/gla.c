/* Gated linear attention (arXiv 2312.06635), the recurrence:
 *
 *   alpha_t = sigmoid(x W1^T W2^T + b)^(1/16) per key channel
 *   S_t = Diag(alpha_t) S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t / sqrt(dim)
 *   y = (RMSNorm_head(o) (.) silu(x Wg^T)) Wo^T */
#include "oracles/mixers.h"

#include <math.h>
#include <stdlib.h>

enum { Q, K, V, GATE_DOWN, GATE_UP, GATE_BIAS, G, NORM, O };

void oracle_gla(const attn_mixer_options *o, int64_t rows, const double *x, const double *const *p,
                double *y) {
  int64_t dim = o->dim, value_dim = o->value_dim;
  int64_t keys = o->heads * dim, values = o->heads * value_dim;
  double *q = oracle_linear(rows, keys, o->hidden, x, p[Q]);
  double *k = oracle_linear(rows, keys, o->hidden, x, p[K]);
  double *v = oracle_linear(rows, values, o->hidden, x, p[V]);
  double *low = oracle_linear(rows, o->gate_rank, o->hidden, x, p[GATE_DOWN]);
  double *gate = oracle_linear(rows, keys, o->gate_rank, low, p[GATE_UP]);
  double *output_gate = oracle_linear(rows, values, o->hidden, x, p[G]);
  double *out = calloc((size_t)(rows * values + 1), sizeof *out);
  double *state = malloc((size_t)(dim * value_dim) * sizeof *state);
  for (int64_t h = 0; h < o->heads; ++h) {
    for (int64_t i = 0; i < dim * value_dim; ++i) state[i] = 0;
    for (int64_t t = 0; t < rows; ++t)
      for (int64_t i = 0; i < dim; ++i) {
        int64_t key = t * keys + h * dim + i;
        double alpha = pow(oracle_sigmoid(gate[key] + p[GATE_BIAS][h * dim + i]), 1.0 / 16);
        for (int64_t j = 0; j < value_dim; ++j) {
          int64_t value = t * values + h * value_dim + j;
          double *s = state + i * value_dim + j;
          *s = alpha * *s + k[key] * v[value];
          out[value] += q[key] * *s / sqrt((double)dim);
        }
      }
  }
  oracle_rms_normalise(out, rows * o->heads, value_dim, p[NORM], o->norm_epsilon);
  oracle_silu(output_gate, rows * values);
  for (int64_t i = 0; i < rows * values; ++i) out[i] *= output_gate[i];
  double *result = oracle_linear(rows, o->hidden, values, out, p[O]);
  for (int64_t i = 0; i < rows * o->hidden; ++i) y[i] = result[i];
  free(q), free(k), free(v), free(low), free(gate), free(output_gate), free(out), free(state);
  free(result);
}
