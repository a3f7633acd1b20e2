/* LAWCAT (arXiv 2509.18467), the weights of every pair of tokens:
 *
 *   w_ts = sum_c phi(q_t)_c phi(k_s)_c prod_{r = s+1 .. t} alpha_r[c]
 *   o_t = sum_{s <= t} w_ts v_s / (sum_{s <= t} w_ts + 1e-10), w_ts divided by sqrt(features)
 *
 * with q = conv(x Wq^T) and k = conv(x Wk^T, a copy for each query head), phi(y) = [softmax(W_h y),
 * softmax(-W_h y)], at least 1e-12 each, alpha = sigmoid(x W1^T W2^T + b)^(1/16). Query head h
 * reads the values and decays of key head h / (heads / kv_heads). */
#include "oracles/mixers.h"

#include <math.h>
#include <stdlib.h>

enum { Q, K, V, Q_CONV, K_CONV, MAP, GATE_DOWN, GATE_UP, GATE_BIAS, O };

/* The projection of query head h's own or shared channels, [rows, heads dim]. */
static double *projected(const attn_mixer_options *o, int64_t rows, const double *x,
                         const double *w, int64_t own_heads) {
  int64_t width = o->heads * o->dim, times = o->heads / own_heads;
  double *narrow = oracle_linear(rows, own_heads * o->dim, o->hidden, x, w);
  double *y = malloc((size_t)(rows * width + 1) * sizeof *y);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t h = 0; h < o->heads; ++h)
      for (int64_t c = 0; c < o->dim; ++c)
        y[r * width + h * o->dim + c] = narrow[(r * own_heads + h / times) * o->dim + c];
  free(narrow);
  return y;
}

/* softmax of n numbers, at least 1e-12 each */
static void softmax(const double *y, int64_t n, double sign, double *p) {
  double greatest = -INFINITY, sum = 0;
  for (int64_t i = 0; i < n; ++i) greatest = fmax(greatest, sign * y[i]);
  for (int64_t i = 0; i < n; ++i) sum += exp(sign * y[i] - greatest);
  for (int64_t i = 0; i < n; ++i) p[i] = fmax(exp(sign * y[i] - greatest) / sum, 1e-12);
}

/* Features [rows, heads, 2 feature_dim]. */
static double *features(const attn_mixer_options *o, int64_t rows, double *y, const double *taps,
                        const double *map) {
  int64_t n = o->feature_dim, heads = o->heads, dim = o->dim;
  double *convolved = oracle_convolve(rows, heads * dim, o->convolution, y, taps);
  double *phi = malloc((size_t)(rows * heads * 2 * n + 1) * sizeof *phi);
  double *mapped = malloc((size_t)n * sizeof *mapped);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t h = 0; h < heads; ++h) {
      const double *own = convolved + (r * heads + h) * dim;
      for (int64_t i = 0; i < n; ++i) {
        mapped[i] = 0;
        for (int64_t c = 0; c < dim; ++c) mapped[i] += map[(h * n + i) * dim + c] * own[c];
      }
      softmax(mapped, n, 1, phi + (r * heads + h) * 2 * n);
      softmax(mapped, n, -1, phi + (r * heads + h) * 2 * n + n);
    }
  free(y), free(convolved), free(mapped);
  return phi;
}

/* o of token t and head h; reach [features] is for its decays. */
static void attend(const attn_mixer_options *o, int64_t t, int64_t h, const double *q,
                   const double *k, const double *v, const double *alpha, double *reach,
                   double *out) {
  int64_t n = 2 * o->feature_dim, key = h / (o->heads / o->kv_heads);
  double sum = 1e-10;
  for (int64_t c = 0; c < n; ++c) reach[c] = 1;
  for (int64_t c = 0; c < o->value_dim; ++c) out[c] = 0;
  for (int64_t s = t; s >= 0; --s) {
    double weight = 0;
    for (int64_t c = 0; c < n; ++c)
      weight += q[(t * o->heads + h) * n + c] * k[(s * o->heads + h) * n + c] * reach[c];
    weight /= sqrt((double)n);
    sum += weight;
    for (int64_t c = 0; c < o->value_dim; ++c)
      out[c] += weight * v[(s * o->kv_heads + key) * o->value_dim + c];
    for (int64_t c = 0; c < n; ++c) reach[c] *= alpha[(s * o->kv_heads + key) * n + c];
  }
  for (int64_t c = 0; c < o->value_dim; ++c) out[c] /= sum;
}

void oracle_lawcat(const attn_mixer_options *o, int64_t rows, const double *x,
                   const double *const *p, double *y) {
  int64_t heads = o->heads, values = heads * o->value_dim;
  int64_t gates = o->kv_heads * 2 * o->feature_dim;
  double *q = features(o, rows, projected(o, rows, x, p[Q], heads), p[Q_CONV], p[MAP]);
  double *k = features(o, rows, projected(o, rows, x, p[K], o->kv_heads), p[K_CONV], p[MAP]);
  double *v = oracle_linear(rows, o->kv_heads * o->value_dim, o->hidden, x, p[V]);
  double *low = oracle_linear(rows, o->gate_rank, o->hidden, x, p[GATE_DOWN]);
  double *alpha = oracle_affine(rows, gates, o->gate_rank, low, p[GATE_UP], p[GATE_BIAS]);
  double *out = malloc((size_t)(rows * values + 1) * sizeof *out);
  double *reach = malloc((size_t)(2 * o->feature_dim) * sizeof *reach);
  for (int64_t i = 0; i < rows * gates; ++i) alpha[i] = pow(oracle_sigmoid(alpha[i]), 1.0 / 16);
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t h = 0; h < heads; ++h)
      attend(o, t, h, q, k, v, alpha, reach, out + t * values + h * o->value_dim);
  double *result = oracle_linear(rows, o->hidden, values, out, p[O]);
  for (int64_t i = 0; i < rows * o->hidden; ++i) y[i] = result[i];
  free(q), free(k), free(v), free(low), free(alpha), free(out), free(reach), free(result);
}
