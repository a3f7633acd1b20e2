#include "oracles/softmax.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static bool visible(const oracle_softmax *x, int64_t i, int64_t j) {
  int64_t distance = i + x->keys - x->queries - j; /* of key j behind the query's own position */
  if (x->listed && !x->listed[i * x->keys + j]) return false;
  if (x->causal && distance < 0) return false;
  if (x->window_left >= 0 && distance > x->window_left) return false;
  if (x->window_right >= 0 && -distance > x->window_right) return false;
  return true;
}

static double capped(const oracle_softmax *x, int64_t i, int64_t j) {
  double s = 0;
  for (int64_t c = 0; c < x->dim; ++c) s += x->q[i * x->dim + c] * x->k[j * x->dim + c];
  s *= x->scale;
  return x->soft_cap ? x->soft_cap * tanh(s / x->soft_cap) : s;
}

/* p[j] and the log of the sum, for query i. */
static double weights(const oracle_softmax *x, int64_t i, double *p) {
  double top = -INFINITY, sum = 0;
  for (int64_t j = 0; j < x->keys; ++j) {
    p[j] = -INFINITY;
    if (!visible(x, i, j)) continue;
    p[j] = capped(x, i, j);
    if (x->bias) p[j] += x->bias[i * x->keys + j];
    if (x->alibi_slope != 0) p[j] -= x->alibi_slope * fabs((double)(i + x->keys - x->queries - j));
    top = fmax(top, p[j]);
  }
  if (top == -INFINITY) { /* no key, whatever the sink */
    memset(p, 0, (size_t)x->keys * sizeof *p);
    return -INFINITY;
  }
  if (x->sink) top = fmax(top, *x->sink);
  for (int64_t j = 0; j < x->keys; ++j) sum += exp(p[j] - top);
  if (x->sink) sum += exp(*x->sink - top);
  for (int64_t j = 0; j < x->keys; ++j) p[j] = exp(p[j] - top) / sum;
  return top + log(sum);
}

void oracle_softmax_forward(const oracle_softmax *x) {
  double *p = malloc((size_t)(x->keys + 1) * sizeof *p);
  for (int64_t i = 0; i < x->queries; ++i) {
    double lse = weights(x, i, p);
    if (x->lse) x->lse[i] = lse;
    for (int64_t c = 0; c < x->value_dim; ++c) {
      double sum = 0;
      for (int64_t j = 0; j < x->keys; ++j) sum += p[j] * x->v[j * x->value_dim + c];
      x->o[i * x->value_dim + c] = sum;
    }
  }
  free(p);
}

/* dp_j = d_o . v_j;  d s_j = p_j (dp_j - sum_l p_l dp_l + d_lse);  through the cap: 1 - (s / c)^2.
 */
void oracle_softmax_backward(const oracle_softmax *x) {
  double *p = malloc((size_t)(x->keys + 1) * sizeof *p);
  double *dp = malloc((size_t)(x->keys + 1) * sizeof *dp);
  for (int64_t i = 0; i < x->queries; ++i) {
    double lse = weights(x, i, p), mean = 0;
    const double *d_o = x->d_o + i * x->value_dim;
    for (int64_t j = 0; j < x->keys; ++j) {
      dp[j] = 0;
      for (int64_t c = 0; c < x->value_dim; ++c) {
        dp[j] += d_o[c] * x->v[j * x->value_dim + c];
        x->d_v[j * x->value_dim + c] += p[j] * d_o[c];
      }
      mean += p[j] * dp[j];
    }
    if (x->d_lse) mean -= x->d_lse[i];
    if (lse == -INFINITY) continue;
    if (x->d_sink) *x->d_sink -= exp(*x->sink - lse) * mean;
    for (int64_t j = 0; j < x->keys; ++j) {
      double ds = p[j] * (dp[j] - mean);
      if (p[j] == 0) continue;
      if (x->d_bias) x->d_bias[i * x->keys + j] += ds;
      if (x->soft_cap) {
        double ratio = capped(x, i, j) / x->soft_cap;
        ds *= 1 - ratio * ratio;
      }
      for (int64_t c = 0; c < x->dim; ++c) {
        x->d_q[i * x->dim + c] += x->scale * ds * x->k[j * x->dim + c];
        x->d_k[j * x->dim + c] += x->scale * ds * x->q[i * x->dim + c];
      }
    }
  }
  free(p);
  free(dp);
}
