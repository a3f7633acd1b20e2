/* Multi-head latent attention (arXiv 2405.04434), in its expanded form, the whole row of scores at
 * once:
 *
 *   q_h = [qC_h; qR_h] = (Wq cq)_h, cq = x or RMSNorm(Wdq x);  [a; b] = Wdkv x;  c = RMSNorm(a)
 *   qR_h and kR = b are turned by position: channels (j, j + r / 2) by n base^(-2j / r)
 *   o_h(t) = sum_{j <= t} softmax_j(scale (qC_h . Wuk,h c_j + qR_h . kR_j)) Wuv,h c_j;  y = Wo o
 *   scale = (d + r)^(-1/2) unless given */
#include "oracles/mixers.h"

#include <math.h>
#include <stdlib.h>

enum { Q, KV_DOWN, KV_NORM, K_UP, V_UP, O, Q_DOWN, Q_NORM };

static void turn(const attn_mixer_options *o, int64_t n, double *x) {
  int64_t half = o->shared_dim / 2;
  for (int64_t j = 0; j < half && o->rotary_dim > 0; ++j) {
    double angle = (double)n * pow(o->rope.base, -(double)j / (double)half);
    double a = x[j], b = x[j + half];
    x[j] = a * cos(angle) - b * sin(angle);
    x[j + half] = b * cos(angle) + a * sin(angle);
  }
}

static double dot(const double *a, const double *b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

void oracle_mla(const attn_mixer_options *o, int64_t rows, const double *x, const double *const *p,
                double *y) {
  int64_t d = o->dim, r = o->shared_dim, v_dim = o->value_dim, rank = o->latent_rank;
  int64_t wide = d + r, stored = rank + r, heads = o->heads, out_width = heads * v_dim;
  double *from = NULL;
  if (o->query_rank) {
    from = oracle_linear(rows, o->query_rank, o->hidden, x, p[Q_DOWN]);
    oracle_rms_normalise(from, rows, o->query_rank, p[Q_NORM], o->norm_epsilon);
  }
  double *q =
      oracle_linear(rows, heads * wide, from ? o->query_rank : o->hidden, from ? from : x, p[Q]);
  double *down = oracle_linear(rows, stored, o->hidden, x, p[KV_DOWN]);
  double *c = malloc((size_t)(rows * rank) * sizeof *c);
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t i = 0; i < rank; ++i) c[t * rank + i] = down[t * stored + i];
  oracle_rms_normalise(c, rows, rank, p[KV_NORM], o->norm_epsilon);
  double *k = oracle_linear(rows, heads * d, rank, c, p[K_UP]);
  double *v = oracle_linear(rows, out_width, rank, c, p[V_UP]);
  for (int64_t t = 0; t < rows; ++t) {
    turn(o, t, down + t * stored + rank);
    for (int64_t h = 0; h < heads; ++h) turn(o, t, q + (t * heads + h) * wide + d);
  }
  double scale = o->scale > 0 ? o->scale : 1 / sqrt((double)wide);
  double *out = calloc((size_t)(rows * out_width), sizeof *out);
  double *weights = malloc((size_t)rows * sizeof *weights);
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t h = 0; h < heads; ++h) {
      const double *query = q + (t * heads + h) * wide;
      double total = 0;
      for (int64_t j = 0; j <= t; ++j) {
        double s =
            dot(query, k + (j * heads + h) * d, d) + dot(query + d, down + j * stored + rank, r);
        total += weights[j] = exp(scale * s);
      }
      for (int64_t j = 0; j <= t; ++j)
        for (int64_t i = 0; i < v_dim; ++i)
          out[t * out_width + h * v_dim + i] +=
              weights[j] / total * v[j * out_width + h * v_dim + i];
    }
  double *result = oracle_linear(rows, o->hidden, out_width, out, p[O]);
  for (int64_t i = 0; i < rows * o->hidden; ++i) y[i] = result[i];
  free(from), free(q), free(down), free(c), free(k), free(v), free(out), free(weights);
  free(result);
}
