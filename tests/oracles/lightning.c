/* Lightning Attention in TransNormerLLM (arXiv 2405.17381), the recurrence:
 *
 *   [q, k, v, u] = x Wqkvu^T;  q = silu(q), k = silu(k)
 *   with LRPE, at position n: q = [q (.) cos(n theta), q (.) sin(n theta)], k the same
 *   S_t = exp(-slope) S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t;  y = (SRMSNorm(o) (.) u) Wo^T
 *
 * slope of head h in layer l, as published code has it: base_h (1 - l / (L - 1) + 1e-5), base_h the
 * ALiBi slopes; as the paper has it: (8 h / H) (1 - l / L). */
#include "oracles/mixers.h"

#include <math.h>
#include <stdlib.h>

enum { QKVU, OUT, THETA };

/* The h-th of the ALiBi slopes for a power of two of heads: 2^(-8 (h + 1) / heads). */
static double power_slope(int64_t h, int64_t heads) {
  return pow(2, -8.0 * (double)(h + 1) / (double)heads);
}

static double alibi_slope(int64_t h, int64_t heads) {
  int64_t below = 1;
  while (2 * below <= heads) below *= 2;
  if (h < below) return power_slope(h, below);
  return power_slope(2 * (h - below), 2 * below); /* every second one, from the first on */
}

static double slope_of(const attn_mixer_options *o, int64_t h) {
  double l = (double)o->layer, layers = (double)o->layers;
  if (o->schedule == ATTN_SCHEDULE_PAPER)
    return 8.0 * (double)h / (double)o->heads * (1 - l / layers);
  return alibi_slope(h, o->heads) * (1 - (o->layers > 1 ? l / (layers - 1) : 0) + 1e-5);
}

/* One head of q or k at position n, activated, with LRPE if the layer has it. */
static void feature(const attn_mixer_options *o, const double *x, const double *theta, int64_t n,
                    double *f) {
  for (int64_t j = 0; j < o->dim; ++j) {
    double a = x[j] * oracle_sigmoid(x[j]);
    f[j] = o->lrpe ? a * cos((double)n * theta[j]) : a;
    if (o->lrpe) f[o->dim + j] = a * sin((double)n * theta[j]);
  }
}

void oracle_lightning(const attn_mixer_options *o, int64_t rows, const double *x,
                      const double *const *p, double *y) {
  int64_t width = o->heads * o->dim, features = o->lrpe ? 2 * o->dim : o->dim;
  double *qkvu = oracle_linear(rows, 4 * width, o->hidden, x, p[QKVU]);
  double *out = calloc((size_t)(rows * width + 1), sizeof *out);
  double *state = malloc((size_t)(features * o->dim) * sizeof *state);
  double *q = malloc((size_t)features * sizeof *q), *k = malloc((size_t)features * sizeof *k);
  for (int64_t h = 0; h < o->heads; ++h) {
    const double *theta = o->lrpe ? p[THETA] + h * o->dim : NULL;
    double decay = exp(-slope_of(o, h));
    for (int64_t i = 0; i < features * o->dim; ++i) state[i] = 0;
    for (int64_t t = 0; t < rows; ++t) {
      const double *row = qkvu + t * 4 * width + h * o->dim, *v = row + 2 * width;
      feature(o, row, theta, t, q);
      feature(o, row + width, theta, t, k);
      for (int64_t i = 0; i < features; ++i)
        for (int64_t j = 0; j < o->dim; ++j) {
          state[i * o->dim + j] = decay * state[i * o->dim + j] + k[i] * v[j];
          out[t * width + h * o->dim + j] += q[i] * state[i * o->dim + j];
        }
    }
  }
  oracle_rms_normalise(out, rows, width, NULL, o->norm_epsilon);
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t i = 0; i < width; ++i) out[t * width + i] *= qkvu[t * 4 * width + 3 * width + i];
  double *result = oracle_linear(rows, o->hidden, width, out, p[OUT]);
  for (int64_t i = 0; i < rows * o->hidden; ++i) y[i] = result[i];
  free(qkvu), free(out), free(state), free(q), free(k), free(result);
}
