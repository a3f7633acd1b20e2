/* Spiking neurons in float64, written from their equations; nothing here is shared with the
 * library.
 */
#ifndef ATTN_ORACLES_LIF_H
#define ATTN_ORACLES_LIF_H

#include <stdint.h>

/* Leaky integrate-and-fire neurons of one sequence (arXiv 2402.04882): x, spikes [rows, n].
 *   h = v + (x - v) / tau; fires where h >= threshold; then v = 0, else v = h */
void oracle_lif(double *spikes, const double *x, int64_t rows, int64_t n, double tau,
                double threshold);
/* dx for d_spikes where a spike's slope is taken to be that of sigmoid(4 (h - threshold)), and the
 * reset's factor to be a constant: for each token the sum over all later ones. */
void oracle_lif_backward(double *dx, const double *x, const double *d_spikes, int64_t rows,
                         int64_t n, double tau, double threshold);

#endif
