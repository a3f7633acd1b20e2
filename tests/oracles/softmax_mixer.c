/* Softmax attention, the whole row of scores at once:
 *
 *   o_i = sum_j softmax_j(cap(q_i . k_j / sqrt(dim))) v_j over i - window < j <= i,  y = o Wo^T
 *   cap(s) = c tanh(s / c);  query head h reads key head h / (heads / kv_heads)
 *
 * Rotary positions (arXiv 2104.09864) turn the pair of channels (j, j + r / 2) of token n by
 * n base^(-2j / r), r = rotary_dim; the channels from r on stay. */
#include "oracles/mixers.h"

#include <math.h>
#include <stdlib.h>

enum { Q, K, V, O };

static void rotate(const attn_mixer_options *o, int64_t rows, int64_t heads, double *x) {
  int64_t half = o->rotary_dim / 2;
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t j = 0; j < half; ++j) {
        double *pair = x + (n * heads + h) * o->dim + j;
        double angle = (double)n * pow(o->rope_base, -2.0 * (double)j / (double)o->rotary_dim);
        double a = pair[0], b = pair[half];
        pair[0] = a * cos(angle) - b * sin(angle);
        pair[half] = b * cos(angle) + a * sin(angle);
      }
}

static double score(const attn_mixer_options *o, const double *q, const double *k) {
  double s = 0;
  for (int64_t c = 0; c < o->dim; ++c) s += q[c] * k[c];
  s /= sqrt((double)o->dim);
  return o->soft_cap > 0 ? o->soft_cap * tanh(s / o->soft_cap) : s;
}

void oracle_softmax_mixer(const attn_mixer_options *o, int64_t rows, const double *x,
                          const double *const *p, double *y) {
  int64_t keys = o->kv_heads * o->dim, values = o->kv_heads * o->value_dim;
  int64_t width = o->heads * o->value_dim;
  double *q = oracle_linear(rows, o->heads * o->dim, o->hidden, x, p[Q]);
  double *k = oracle_linear(rows, keys, o->hidden, x, p[K]);
  double *v = oracle_linear(rows, values, o->hidden, x, p[V]);
  double *out = calloc((size_t)(rows * width + 1), sizeof *out);
  double *weights = malloc((size_t)(rows + 1) * sizeof *weights);
  if (o->rotary_dim > 0) {
    rotate(o, rows, o->heads, q);
    rotate(o, rows, o->kv_heads, k);
  }
  for (int64_t h = 0; h < o->heads; ++h)
    for (int64_t i = 0; i < rows; ++i) {
      int64_t shared = h / (o->heads / o->kv_heads);
      int64_t first = o->window > 0 && i >= o->window ? i - o->window + 1 : 0;
      double total = 0;
      for (int64_t j = first; j <= i; ++j) {
        weights[j] = exp(score(o, q + (i * o->heads + h) * o->dim, k + j * keys + shared * o->dim));
        total += weights[j];
      }
      for (int64_t j = first; j <= i; ++j)
        for (int64_t c = 0; c < o->value_dim; ++c)
          out[i * width + h * o->value_dim + c] +=
              weights[j] / total * v[j * values + shared * o->value_dim + c];
    }
  double *result = oracle_linear(rows, o->hidden, width, out, p[O]);
  for (int64_t i = 0; i < rows * o->hidden; ++i) y[i] = result[i];
  free(q), free(k), free(v), free(out), free(weights), free(result);
}
