/* The mixers' oracles: a layer's y from its x in float64, by straight loops over the equations of
 * each paper: recurrences token by token, softmax over a whole row of scores. Nothing of the
 * library runs here; only the struct of options is shared. */
#ifndef ATTN_ORACLE_MIXERS_H
#define ATTN_ORACLE_MIXERS_H

#include "mixers/mixer.h"

/* y [rows, hidden] of one sequence x [rows, hidden]. Parameters in the order of the mixer's table
 * entry, row-major; options are configured. */
typedef void oracle_mixer(const attn_mixer_options *options, int64_t rows, const double *x,
                          const double *const *parameters, double *y);

/* The same of cross-attention: keys and values are made of the rows of a context. */
typedef void oracle_cross_mixer(const attn_mixer_options *options, int64_t rows, const double *x,
                                int64_t context_rows, const double *context,
                                const double *const *parameters, double *y);

/* The oracles of a mixer's name; NULL when there is none. */
oracle_mixer *oracle_of_mixer(const char *name);
oracle_cross_mixer *oracle_of_cross_mixer(const char *name);

oracle_mixer oracle_softmax_mixer, oracle_lightning, oracle_gla, oracle_delta_net,
    oracle_gated_delta_net, oracle_kda, oracle_mla, oracle_minimax, oracle_hedgehog,
    oracle_norm_attention, oracle_diag_attention, oracle_aaren, oracle_based, oracle_lawcat,
    oracle_lolcats, oracle_lmu, oracle_spiking_lmu, oracle_titans, oracle_omega_net, oracle_atlas;
oracle_cross_mixer oracle_softmax_across, oracle_hedgehog_across, oracle_norm_attention_across;

/* Loops that several oracles need. Arrays are row-major; returned ones are malloc'd. */

double oracle_sigmoid(double x);
double oracle_softplus(double x);
/* y [rows, outputs] = x [rows, inputs] w^T, w [outputs, inputs] */
double *oracle_linear(int64_t rows, int64_t outputs, int64_t inputs, const double *x,
                      const double *w);
/* The same plus bias [outputs] */
double *oracle_affine(int64_t rows, int64_t outputs, int64_t inputs, const double *x,
                      const double *w, const double *bias);
/* x := x sigmoid(x) */
void oracle_silu(double *x, int64_t count);
/* y_t[c] = sum_j w[c][taps - 1 - j] x_{t-j}[c], zeros before the sequence: x [rows, channels] */
double *oracle_convolve(int64_t rows, int64_t channels, int64_t taps, const double *x,
                        const double *w);
/* Rotary positions of options: x [rows, heads, dim], turned in place (softmax_mixer.c). */
void oracle_rotate(const attn_mixer_options *options, int64_t rows, int64_t heads, int64_t dim,
                   double *x);
/* Each of `vectors` vectors: x := x / sqrt(sum x^2 + 1e-6) */
void oracle_l2_normalise(double *x, int64_t vectors, int64_t dim);
/* Each of `vectors` vectors: x := x / sqrt(mean x^2 + epsilon) (.) weight; weight may be NULL. */
void oracle_rms_normalise(double *x, int64_t vectors, int64_t dim, const double *weight,
                          double epsilon);
/* silu(conv(x w^T)) [rows, channels]: what the layers with the delta rule begin with. */
double *oracle_convolved(const attn_mixer_options *options, int64_t rows, int64_t channels,
                         const double *x, const double *w, const double *taps);

#endif
