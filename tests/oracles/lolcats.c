/* LoLCATs (arXiv 2410.10254), the weights of every pair of tokens:
 *
 *   w_ni = gamma exp(s_ni - c_n) for i in the window of n, with c_n the greatest s of the window,
 *        = phi(q_n) . phi'(k_i) for what is older, times 1 - gamma where the mix is affine
 *   y_n = sum_{i <= n} w_ni v_i / sum_{i <= n} w_ni
 *
 * s_ni = q_n . k_i / sqrt(dim) after normalised heads and rotary positions, phi(x) = [softmax(W x),
 * softmax(-W x)], at least 1e-12 each, gamma = sigmoid(w). The window of w = block: the last w
 * tokens; or (terrace) the blocks of w tokens that n and n - w are in. Query head h reads key head
 * h / (heads / kv_heads). */
#include "oracles/mixers.h"

#include <math.h>
#include <stdlib.h>

enum { Q, K, V, O, Q_MAP, K_MAP, FACTORS, FIRST_OPTIONAL };

static bool in_window(const attn_mixer_options *o, int64_t n, int64_t i) {
  if (o->window_kind == ATTN_WINDOW_SLIDING) return n - i < o->block;
  return n / o->block - i / o->block <= 1;
}

static void half(const double *y, int64_t n, double sign, double *phi) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += exp(sign * y[i]);
  for (int64_t i = 0; i < n; ++i) phi[i] = fmax(exp(sign * y[i]) / sum, 1e-12);
}

/* Features [rows, heads, 2 feature_dim] of x [rows, own, dim], one of which several heads may read.
 */
static double *features(const attn_mixer_options *o, int64_t rows, int64_t own, const double *x,
                        const double *w) {
  int64_t n = o->feature_dim, times = o->heads / own;
  double *phi = malloc((size_t)(rows * o->heads * 2 * n + 1) * sizeof *phi);
  double *y = malloc((size_t)n * sizeof *y);
  for (int64_t r = 0; r < rows * o->heads; ++r) {
    int64_t h = r % o->heads, token = r / o->heads;
    for (int64_t i = 0; i < n; ++i) {
      y[i] = 0;
      for (int64_t c = 0; c < o->dim; ++c)
        y[i] += w[(h * n + i) * o->dim + c] * x[(token * own + h / times) * o->dim + c];
    }
    half(y, n, 1, phi + r * 2 * n);
    half(y, n, -1, phi + r * 2 * n + n);
  }
  free(y);
  return phi;
}

static double dot(const double *a, const double *b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

typedef struct sequence {
  const double *q, *k, *v, *phi_q, *phi_k, *factors;
} sequence;

/* The weights of tokens 0 .. n for head h. */
static void weigh(const attn_mixer_options *o, const sequence *s, int64_t h, int64_t n, double *w) {
  int64_t key = h / (o->heads / o->kv_heads), features = 2 * o->feature_dim;
  double gamma = oracle_sigmoid(s->factors[h]), greatest = -INFINITY;
  for (int64_t i = 0; i <= n; ++i) {
    const double *phi_k = s->phi_k + (i * o->heads + h) * features;
    if (in_window(o, n, i)) {
      w[i] =
          dot(s->q + (n * o->heads + h) * o->dim, s->k + (i * o->kv_heads + key) * o->dim, o->dim) /
          sqrt((double)o->dim);
      greatest = fmax(greatest, w[i]);
    } else {
      w[i] = (o->affine ? 1 - gamma : 1) *
             dot(s->phi_q + (n * o->heads + h) * features, phi_k, features);
    }
  }
  for (int64_t i = 0; i <= n; ++i)
    if (in_window(o, n, i)) w[i] = gamma * exp(w[i] - greatest);
}

static void attend(const attn_mixer_options *o, const sequence *s, int64_t rows, double *out) {
  int64_t values = o->kv_heads * o->value_dim, group = o->heads / o->kv_heads;
  double *w = malloc((size_t)(rows + 1) * sizeof *w);
  for (int64_t h = 0; h < o->heads; ++h)
    for (int64_t n = 0; n < rows; ++n) {
      double sum = 0, *to = out + (n * o->heads + h) * o->value_dim;
      weigh(o, s, h, n, w);
      for (int64_t i = 0; i <= n; ++i) {
        sum += w[i];
        for (int64_t c = 0; c < o->value_dim; ++c)
          to[c] += w[i] * s->v[i * values + h / group * o->value_dim + c];
      }
      for (int64_t c = 0; c < o->value_dim; ++c) to[c] /= sum;
    }
  free(w);
}

void oracle_lolcats(const attn_mixer_options *o, int64_t rows, const double *x,
                    const double *const *p, double *y) {
  int64_t heads = o->heads, own = o->kv_heads, dim = o->dim, width = heads * o->value_dim;
  const double *const *next = p + FIRST_OPTIONAL, *bias[4] = {NULL};
  for (int i = 0; i < 3 && o->bias; ++i) bias[i] = *next++;
  if (o->output_bias) bias[3] = *next++;
  double *none = calloc((size_t)(heads * (dim + o->value_dim) + o->hidden), sizeof *none);
  double *q = oracle_affine(rows, heads * dim, o->hidden, x, p[Q], bias[0] ? bias[0] : none);
  double *k = oracle_affine(rows, own * dim, o->hidden, x, p[K], bias[1] ? bias[1] : none);
  double *v = oracle_affine(rows, own * o->value_dim, o->hidden, x, p[V], bias[2] ? bias[2] : none);
  if (o->qk_norm) {
    oracle_rms_normalise(q, rows * heads, dim, *next++, o->norm_epsilon);
    oracle_rms_normalise(k, rows * own, dim, *next++, o->norm_epsilon);
  }
  if (o->rotary_dim > 0) {
    oracle_rotate(o, rows, heads, dim, q);
    oracle_rotate(o, rows, own, dim, k);
  }
  double *phi_q = features(o, rows, heads, q, p[Q_MAP]),
         *phi_k = features(o, rows, own, k, p[K_MAP]);
  double *out = calloc((size_t)(rows * width + 1), sizeof *out);
  const sequence s = {q, k, v, phi_q, phi_k, p[FACTORS]};
  attend(o, &s, rows, out);
  double *result = oracle_affine(rows, o->hidden, width, out, p[O], bias[3] ? bias[3] : none);
  for (int64_t i = 0; i < rows * o->hidden; ++i) y[i] = result[i];
  free(q), free(k), free(v), free(phi_q), free(phi_k), free(out), free(result), free(none);
}
