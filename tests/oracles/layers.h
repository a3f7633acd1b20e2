/* Layers in float64, written from their equations; nothing here is shared with the library. */
#ifndef ATTN_ORACLES_LAYERS_H
#define ATTN_ORACLES_LAYERS_H

#include <stdint.h>

/* Activations and their derivatives, by name: "identity", "silu", "sigmoid", "gelu", "relu",
 * "softplus", "log_sigmoid", "exp", "elu", "elu_plus_one". NULL for another name. */
typedef double (*oracle_function)(double x);
oracle_function oracle_activation(const char *name);
oracle_function oracle_activation_slope(const char *name);

/* y [rows, n] = x / sqrt(sum x^2 / divisor + epsilon) (.) weight; weight may be NULL. */
void oracle_rms_norm(double *y, const double *x, const double *weight, int64_t rows, int64_t n,
                     double divisor, double epsilon);
void oracle_layer_norm(double *y, const double *x, const double *weight, const double *bias,
                       int64_t rows, int64_t n, double epsilon);

/* x [rows, heads, dim]; position[r] is the position of row r. */
void oracle_rotary(double *y, const double *x, const double *position, int64_t rows, int64_t heads,
                   int64_t dim, int64_t rotary_dim, double base);
/* y [rows, heads, 2 dim], theta [heads, dim] */
void oracle_lrpe(double *y, const double *x, const double *theta, const double *position,
                 int64_t rows, int64_t heads, int64_t dim);
/* x, y [rows, channels], w [channels, taps]; position[r] = 0 begins a sequence. */
void oracle_short_convolution(double *y, const double *x, const double *w, const double *position,
                              int64_t rows, int64_t channels, int64_t taps);

/* A mixture of experts, row by row: scores s = softmax(z) or 1 / (1 + exp(-z)); of `groups` equal
 * groups (0: one) the `best_groups` whose best score + bias (two_best: the sum of the two best) is
 * highest; of their experts the `active` with the highest score + bias;
 *   y = sum of scale s_e / (normalise ? sum of those s : 1) W3_e (silu(W1_e x) (.) W2_e x).
 * bias may be NULL; w[3 e + i] is W1, W2 [width, n] or W3 [n, width] of expert e. */
typedef struct oracle_experts_options {
  int experts, active, groups, best_groups, sigmoid, two_best, normalise;
  double scale;
} oracle_experts_options;
void oracle_experts(double *y, const double *x, const double *logits, const double *bias,
                    const double *const *w, const oracle_experts_options *options, int64_t rows,
                    int64_t n, int64_t width);

/* y [rows, outputs] = x [rows, inputs] w^T */
void oracle_product(double *y, const double *x, const double *w, int64_t rows, int64_t inputs,
                    int64_t outputs);
/* The mean over rows with target >= 0 of -log softmax(x w^T)[target], and its gradients. */
double oracle_cross_entropy(const double *x, const double *w, const int32_t *targets, int64_t rows,
                            int64_t inputs, int64_t vocabulary, double *dx, double *dw);

#endif
