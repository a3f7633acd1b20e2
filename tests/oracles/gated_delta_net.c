/* Gated DeltaNet (arXiv 2412.06464), the recurrence:
 *
 *   q, k = L2norm(silu(conv(x W^T))), v = silu(conv(x Wv^T)), beta = sigmoid(x Wb^T)
 *   alpha_t = exp(-exp(A_log) softplus(x Wa^T + dt_bias)), a number a head
 *   S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t / sqrt(dim)
 *   y = (RMSNorm_head(o) (.) silu(x Wg^T)) Wo^T */
#include "oracles/mixers.h"

#include <math.h>
#include <stdlib.h>

enum { Q, K, V, BETA, NORM, OUT, Q_CONV, K_CONV, V_CONV, A, A_LOG, DT_BIAS, G };

/* S := alpha (I - beta k k^T) S + beta k v^T */
static void write(double *state, int64_t dim, int64_t value_dim, double alpha, double beta,
                  const double *k, const double *v) {
  for (int64_t j = 0; j < value_dim; ++j) {
    double recalled = 0;
    for (int64_t i = 0; i < dim; ++i) recalled += k[i] * state[i * value_dim + j];
    for (int64_t i = 0; i < dim; ++i) {
      double *s = state + i * value_dim + j;
      *s = alpha * (*s - beta * k[i] * recalled) + beta * k[i] * v[j];
    }
  }
}

void oracle_gated_delta_net(const attn_mixer_options *o, int64_t rows, const double *x,
                            const double *const *p, double *y) {
  int64_t dim = o->dim, value_dim = o->value_dim;
  int64_t keys = o->kv_heads * dim, values = o->heads * value_dim;
  double *q = oracle_convolved(o, rows, keys, x, p[Q], p[Q_CONV]);
  double *k = oracle_convolved(o, rows, keys, x, p[K], p[K_CONV]);
  double *v = oracle_convolved(o, rows, values, x, p[V], p[V_CONV]);
  double *beta = oracle_linear(rows, o->heads, o->hidden, x, p[BETA]);
  double *a = oracle_linear(rows, o->heads, o->hidden, x, p[A]);
  double *gate = oracle_linear(rows, values, o->hidden, x, p[G]);
  double *out = calloc((size_t)(rows * values + 1), sizeof *out);
  double *state = malloc((size_t)(dim * value_dim) * sizeof *state);
  oracle_l2_normalise(q, rows * o->kv_heads, dim);
  oracle_l2_normalise(k, rows * o->kv_heads, dim);
  for (int64_t h = 0; h < o->heads; ++h) {
    int64_t shared = h / (o->heads / o->kv_heads);
    for (int64_t i = 0; i < dim * value_dim; ++i) state[i] = 0;
    for (int64_t t = 0; t < rows; ++t) {
      double dt = oracle_softplus(a[t * o->heads + h] + p[DT_BIAS][h]);
      write(state, dim, value_dim, exp(-exp(p[A_LOG][h]) * dt),
            oracle_sigmoid(beta[t * o->heads + h]), k + t * keys + shared * dim,
            v + t * values + h * value_dim);
      for (int64_t i = 0; i < dim; ++i)
        for (int64_t j = 0; j < value_dim; ++j)
          out[t * values + h * value_dim + j] +=
              q[t * keys + shared * dim + i] * state[i * value_dim + j] / sqrt((double)dim);
    }
  }
  oracle_rms_normalise(out, rows * o->heads, value_dim, p[NORM], o->norm_epsilon);
  oracle_silu(gate, rows * values);
  for (int64_t i = 0; i < rows * values; ++i) out[i] *= gate[i];
  double *result = oracle_linear(rows, o->hidden, values, out, p[OUT]);
  for (int64_t i = 0; i < rows * o->hidden; ++i) y[i] = result[i];
  free(q), free(k), free(v), free(beta), free(a), free(gate), free(out), free(state);
  free(result);
}
