/* Hedgehog (arXiv 2402.04347), the weights of every pair of tokens:
 *
 *   o_i = sum_{j <= i} (phi(q_i) . phi(k_j)) v_j / (sum_{j <= i} phi(q_i) . phi(k_j) + 1e-12)
 *
 * (over all j both ways; over all j of a context, of which k and v are made, across)
 * with phi(x) of y = W_h x + b_h: [softmax(y), softmax(-y)], at least 1e-12 each; or [exp(y - max
 * y), exp(min y - y)]; or softmax([2 y, -2 y]). Before it come the biases of q,
 * k and v, normalised heads and rotary positions; y may have a bias too. */
#include "oracles/mixers.h"

#include <math.h>
#include <stdlib.h>

enum { Q, K, V, Q_MAP, Q_BIAS, K_MAP, K_BIAS, O, FIRST_OPTIONAL };

/* y := exp(factor y - the greatest of these), divided by the sum or not */
static void exponentials(double *y, int64_t n, double factor, bool divide) {
  double greatest = -INFINITY, sum = 0;
  for (int64_t i = 0; i < n; ++i) greatest = fmax(greatest, factor * y[i]);
  for (int64_t i = 0; i < n; ++i) sum += y[i] = exp(factor * y[i] - greatest);
  for (int64_t i = 0; divide && i < n; ++i) y[i] /= sum;
}

static void map(const attn_mixer_options *o, const double *x, const double *w, const double *bias,
                double *phi) {
  int64_t n = o->feature_dim;
  for (int64_t i = 0; i < n; ++i) {
    phi[i] = bias[i];
    for (int64_t c = 0; c < o->dim; ++c) phi[i] += w[i * o->dim + c] * x[c];
    phi[n + i] = -phi[i];
  }
  if (o->feature_map == ATTN_FEATURES_JOINT) {
    exponentials(phi, 2 * n, 2, true);
    return;
  }
  bool divide = o->feature_map == ATTN_FEATURES_SOFTMAX;
  exponentials(phi, n, 1, divide);
  exponentials(phi + n, n, 1, divide);
  for (int64_t i = 0; divide && i < 2 * n; ++i) phi[i] = fmax(phi[i], 1e-12);
}

/* Features [rows, heads, 2 feature_dim] of y [rows, heads, dim], which is freed. */
static double *features(const attn_mixer_options *o, int64_t rows, double *y, const double *norm,
                        const double *w, const double *bias) {
  int64_t n = o->feature_dim, heads = o->heads, dim = o->dim;
  if (norm) oracle_rms_normalise(y, rows * heads, dim, norm, o->norm_epsilon);
  double *phi = malloc((size_t)(rows * heads * 2 * n + 1) * sizeof *phi);
  if (o->rotary_dim > 0) oracle_rotate(o, rows, heads, dim, y);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t h = 0; h < heads; ++h)
      map(o, y + (r * heads + h) * dim, w + h * n * dim, bias + h * n,
          phi + (r * heads + h) * 2 * n);
  free(y);
  return phi;
}

/* Queries of x and keys of the context; a causal one sees keys up to its own place. */
static void layer(const attn_mixer_options *o, int64_t rows, const double *x, int64_t context_rows,
                  const double *context, bool causal, const double *const *p, double *y) {
  int64_t heads = o->heads, n = 2 * o->feature_dim, values = heads * o->value_dim;
  const double *const *next = p + FIRST_OPTIONAL, *bias[4], *norm[2] = {NULL, NULL};
  double *none = calloc((size_t)(heads * (o->dim + o->value_dim) + o->hidden), sizeof *none);
  for (int i = 0; i < 4; ++i) bias[i] = (i < 3 ? o->bias : o->output_bias) ? *next++ : none;
  for (int i = 0; i < 2 && o->qk_norm; ++i) norm[i] = *next++;
  double *q = oracle_affine(rows, heads * o->dim, o->hidden, x, p[Q], bias[0]);
  double *k = oracle_affine(context_rows, heads * o->dim, o->hidden, context, p[K], bias[1]);
  double *v = oracle_affine(context_rows, values, o->hidden, context, p[V], bias[2]);
  q = features(o, rows, q, norm[0], p[Q_MAP], p[Q_BIAS]);
  k = features(o, context_rows, k, norm[1], p[K_MAP], p[K_BIAS]);
  double *out = calloc((size_t)(rows * values + 1), sizeof *out);
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t i = 0; i < rows; ++i) {
      double sum = 1e-12, *to = out + i * values + h * o->value_dim;
      for (int64_t j = 0; j < (causal ? i + 1 : context_rows); ++j) {
        double weight = 0;
        for (int64_t c = 0; c < n; ++c)
          weight += q[(i * heads + h) * n + c] * k[(j * heads + h) * n + c];
        sum += weight;
        for (int64_t c = 0; c < o->value_dim; ++c)
          to[c] += weight * v[j * values + h * o->value_dim + c];
      }
      for (int64_t c = 0; c < o->value_dim; ++c) to[c] /= sum;
    }
  double *result = oracle_affine(rows, o->hidden, values, out, p[O], bias[3]);
  for (int64_t i = 0; i < rows * o->hidden; ++i) y[i] = result[i];
  free(q), free(k), free(v), free(out), free(result), free(none);
}

void oracle_hedgehog(const attn_mixer_options *o, int64_t rows, const double *x,
                     const double *const *p, double *y) {
  layer(o, rows, x, rows, x, !o->bidirectional, p, y);
}

void oracle_hedgehog_across(const attn_mixer_options *o, int64_t rows, const double *x,
                            int64_t context_rows, const double *context, const double *const *p,
                            double *y) {
  layer(o, rows, x, context_rows, context, false, p, y);
}
