/* Kimi Delta Attention (arXiv 2510.26692), the recurrence:
 *
 *   q, k = L2norm(silu(conv(x W^T))), v = silu(conv(x Wv^T)), beta = sigmoid(x Wb^T)
 *   alpha_t = exp(-exp(A_log) softplus(x Wfa^T Wfb^T + dt_bias)) per key channel, A_log per head
 *   S~ = Diag(alpha_t) S_{t-1},  u_t = beta_t (v_t - S~^T k_t),  S_t = S~ + k_t u_t^T
 *   o_t = S_t^T q_t / sqrt(dim),  y = (RMSNorm_head(o) (.) sigmoid(x Wga^T Wgb^T + b)) Wo^T */
#include "oracles/mixers.h"

#include <math.h>
#include <stdlib.h>

enum {
  Q,
  K,
  V,
  BETA,
  NORM,
  OUT,
  Q_CONV,
  K_CONV,
  V_CONV,
  F_DOWN,
  F_UP,
  A_LOG,
  DT_BIAS,
  G_DOWN,
  G_UP,
  G_BIAS
};

/* One token: S := S~ + k u^T; o = S^T q, not yet scaled. */
static void step(double *state, int64_t dim, int64_t value_dim, const double *alpha, double beta,
                 const double *q, const double *k, const double *v, double *o) {
  for (int64_t i = 0; i < dim; ++i)
    for (int64_t j = 0; j < value_dim; ++j) state[i * value_dim + j] *= alpha[i];
  for (int64_t j = 0; j < value_dim; ++j) {
    double u = v[j];
    for (int64_t i = 0; i < dim; ++i) u -= state[i * value_dim + j] * k[i];
    o[j] = 0;
    for (int64_t i = 0; i < dim; ++i) {
      state[i * value_dim + j] += k[i] * beta * u;
      o[j] += state[i * value_dim + j] * q[i];
    }
  }
}

void oracle_kda(const attn_mixer_options *o, int64_t rows, const double *x, const double *const *p,
                double *y) {
  int64_t dim = o->dim, value_dim = o->value_dim;
  int64_t keys = o->kv_heads * dim, values = o->heads * value_dim, channels = o->heads * dim;
  double *q = oracle_convolved(o, rows, keys, x, p[Q], p[Q_CONV]);
  double *k = oracle_convolved(o, rows, keys, x, p[K], p[K_CONV]);
  double *v = oracle_convolved(o, rows, values, x, p[V], p[V_CONV]);
  double *beta = oracle_linear(rows, o->heads, o->hidden, x, p[BETA]);
  double *f_low = oracle_linear(rows, o->gate_rank, o->hidden, x, p[F_DOWN]);
  double *f = oracle_linear(rows, channels, o->gate_rank, f_low, p[F_UP]);
  double *gate_low = oracle_linear(rows, o->gate_rank, o->hidden, x, p[G_DOWN]);
  double *gate = oracle_linear(rows, values, o->gate_rank, gate_low, p[G_UP]);
  double *out = calloc((size_t)(rows * values + 1), sizeof *out);
  double *state = malloc((size_t)(dim * value_dim) * sizeof *state);
  double *alpha = malloc((size_t)dim * sizeof *alpha);
  oracle_l2_normalise(q, rows * o->kv_heads, dim);
  oracle_l2_normalise(k, rows * o->kv_heads, dim);
  for (int64_t h = 0; h < o->heads; ++h) {
    int64_t shared = h / (o->heads / o->kv_heads);
    for (int64_t i = 0; i < dim * value_dim; ++i) state[i] = 0;
    for (int64_t t = 0; t < rows; ++t) {
      for (int64_t i = 0; i < dim; ++i) {
        double dt = oracle_softplus(f[t * channels + h * dim + i] + p[DT_BIAS][h * dim + i]);
        alpha[i] = exp(-exp(p[A_LOG][h]) * dt);
      }
      step(state, dim, value_dim, alpha, oracle_sigmoid(beta[t * o->heads + h]),
           q + t * keys + shared * dim, k + t * keys + shared * dim, v + t * values + h * value_dim,
           out + t * values + h * value_dim);
    }
  }
  for (int64_t i = 0; i < rows * values; ++i) out[i] /= sqrt((double)dim);
  oracle_rms_normalise(out, rows * o->heads, value_dim, p[NORM], o->norm_epsilon);
  for (int64_t i = 0; i < rows * values; ++i)
    out[i] *= oracle_sigmoid(gate[i] + (o->plain_gate ? 0 : p[G_BIAS][i % values]));
  double *result = oracle_linear(rows, o->hidden, values, out, p[OUT]);
  for (int64_t i = 0; i < rows * o->hidden; ++i) y[i] = result[i];
  free(q), free(k), free(v), free(beta), free(f_low), free(f), free(gate_low), free(gate);
  free(out), free(state), free(alpha), free(result);
}
