#include "oracles/lif.h"

#include <math.h>
#include <stdlib.h>

/* h of channel c at every token; `fired` likewise */
static void potentials(double *h, int *fired, const double *x, int64_t rows, int64_t n, int64_t c,
                       double tau, double threshold) {
  double v = 0;
  for (int64_t t = 0; t < rows; ++t) {
    h[t] = v + (x[t * n + c] - v) / tau;
    fired[t] = h[t] >= threshold;
    v = fired[t] ? 0 : h[t];
  }
}

void oracle_lif(double *spikes, const double *x, int64_t rows, int64_t n, double tau,
                double threshold) {
  double *h = malloc((size_t)(rows + 1) * sizeof *h);
  int *fired = malloc((size_t)(rows + 1) * sizeof *fired);
  for (int64_t c = 0; c < n; ++c) {
    potentials(h, fired, x, rows, n, c, tau, threshold);
    for (int64_t t = 0; t < rows; ++t) spikes[t * n + c] = fired[t];
  }
  free(h), free(fired);
}

/* h_j depends on x_t by (1 / tau) times (1 - 1 / tau) for every token in between, as long as no
 * spike between t and j - 1 has reset the potential. */
void oracle_lif_backward(double *dx, const double *x, const double *d_spikes, int64_t rows,
                         int64_t n, double tau, double threshold) {
  double *h = malloc((size_t)(rows + 1) * sizeof *h);
  int *fired = malloc((size_t)(rows + 1) * sizeof *fired);
  for (int64_t c = 0; c < n; ++c) {
    potentials(h, fired, x, rows, n, c, tau, threshold);
    for (int64_t t = 0; t < rows; ++t) {
      double share = 1 / tau, sum = 0;
      for (int64_t j = t; j < rows; ++j) {
        double s = 1 / (1 + exp(-4 * (h[j] - threshold)));
        sum += d_spikes[j * n + c] * 4 * s * (1 - s) * share;
        if (fired[j]) break;
        share *= 1 - 1 / tau;
      }
      dx[t * n + c] = sum;
    }
  }
  free(h), free(fired);
}
