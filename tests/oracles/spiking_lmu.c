/* Spiking LMU (arXiv 2402.04882), token by token; LIF is in lif.c:
 *
 *   s = LIF(BN(x)) at half the threshold,  u = LIF(BN(W_u s + b_u)),  r = LIF(BN(m))
 *   h = LIF(BN(W_h [r; s] + b_h)),  y = BN(W_o h + b_o), with running statistics */
#include "oracles/legendre.h"
#include "oracles/lif.h"
#include "oracles/mixers.h"

#include <math.h>
#include <stdlib.h>

enum { X_NORM = 0, U = 4, U_BIAS, U_NORM, M_NORM = 10, H = 14, H_BIAS, H_NORM, O = 20, O_BIAS };
enum { O_NORM = 22 };

/* x := (x - mean) / sqrt(variance + epsilon) weight + bias; p: weight, bias, mean, variance */
static void normalise(double *x, int64_t rows, int64_t n, const double *const *p, double epsilon) {
  for (int64_t i = 0; i < rows * n; ++i) {
    int64_t c = i % n;
    x[i] = (x[i] - p[2][c]) / sqrt(p[3][c] + epsilon) * p[0][c] + p[1][c];
  }
}

/* x := its neurons' spikes */
static void fire(double *x, int64_t rows, int64_t n, double tau, double threshold) {
  double *spikes = malloc((size_t)(rows * n + 1) * sizeof *spikes);
  oracle_lif(spikes, x, rows, n, tau, threshold);
  for (int64_t i = 0; i < rows * n; ++i) x[i] = spikes[i];
  free(spikes);
}

void oracle_spiking_lmu(const attn_mixer_options *o, int64_t rows, const double *x,
                        const double *const *p, double *y) {
  int64_t n = o->memory_dim, hidden = o->hidden, memory = o->heads * n, inputs = memory + hidden;
  double tau = o->spike_tau, threshold = o->spike_threshold, epsilon = o->norm_epsilon;
  double *s = calloc((size_t)(rows * hidden + 1), sizeof *s);
  double *m = calloc((size_t)(rows * memory + 1), sizeof *m);
  double *both = malloc((size_t)(rows * inputs + 1) * sizeof *both);
  for (int64_t i = 0; i < rows * hidden; ++i) s[i] = x[i];
  normalise(s, rows, hidden, p + X_NORM, epsilon);
  fire(s, rows, hidden, tau, threshold / 2);
  double *u = oracle_affine(rows, o->heads, hidden, s, p[U], p[U_BIAS]);
  normalise(u, rows, o->heads, p + U_NORM, epsilon);
  fire(u, rows, o->heads, tau, threshold);
  for (int64_t h = 0; h < o->heads; ++h)
    oracle_legendre_memory(n, o->theta, rows, u + h, o->heads, m + h * n, memory);
  normalise(m, rows, memory, p + M_NORM, epsilon);
  fire(m, rows, memory, tau, threshold);
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t i = 0; i < memory; ++i) both[t * inputs + i] = m[t * memory + i];
    for (int64_t i = 0; i < hidden; ++i) both[t * inputs + memory + i] = s[t * hidden + i];
  }
  double *h = oracle_affine(rows, hidden, inputs, both, p[H], p[H_BIAS]);
  normalise(h, rows, hidden, p + H_NORM, epsilon);
  fire(h, rows, hidden, tau, threshold);
  double *result = oracle_affine(rows, hidden, hidden, h, p[O], p[O_BIAS]);
  normalise(result, rows, hidden, p + O_NORM, epsilon);
  for (int64_t i = 0; i < rows * hidden; ++i) y[i] = result[i];
  free(s), free(m), free(both), free(u), free(h), free(result);
}
