/* Kernels over rows: activations, gates, norms, sums, the cross-entropy of one row of logits.
 *
 * Written once in portable C (src/kernels/cpu/rows.inc) and compiled for each path with its
 * instruction set. A row is a span: a pointer and its dtype (float64, float32 or bfloat16), so that
 * operands of different dtypes mix freely. Arithmetic is float64 when any operand is, else float32.
 * A span without data is absent. `accumulate` adds to what the target holds. */
#ifndef ATTN_KERNELS_ROWS_H
#define ATTN_KERNELS_ROWS_H

#include <stdbool.h>
#include <stdint.h>

#include "attn/tensor.h"

typedef struct attn_span {
  void *data;
  attn_dtype dtype;
} attn_span;

typedef enum attn_activation {
  ATTN_IDENTITY = 0,
  ATTN_SILU, /* x sigmoid(x) */
  ATTN_SIGMOID,
  ATTN_GELU, /* x Phi(x), Phi the normal distribution function */
  ATTN_RELU,
  ATTN_SOFTPLUS,    /* log(1 + exp(x)) */
  ATTN_LOG_SIGMOID, /* -softplus(-x) */
  ATTN_EXP,
  ATTN_GELU_TANH,    /* x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 (arXiv 1606.08415) */
  ATTN_ELU,          /* x above 0, else exp(x) - 1 (arXiv 1511.07289) */
  ATTN_ELU_PLUS_ONE, /* x + 1 above 0, else exp(x): positive features (arXiv 2006.16236) */
} attn_activation;

#define ATTN_ROWS_KERNELS(K)                                                                       \
  /* y = exp(x), relative error below 2e-7 over [-87, 88]; 0 far below, +inf above */              \
  K(void, exp_f32, (float *y, const float *x, int64_t count))                                      \
  /* y = alpha a + beta b (b may be absent) */                                                     \
  K(void, row_add, (attn_span y, double alpha, attn_span a, double beta, attn_span b, int64_t n))  \
  K(double, row_dot, (attn_span a, attn_span b, int64_t n))                                        \
  /* y (+)= sum_j a[j] (.) b[j]: convolutions, rotations, gradients of element-wise weights */     \
  K(void, row_multiply_sum,                                                                        \
    (attn_span y, bool accumulate, const attn_span *a, const attn_span *b, int count, int64_t n))  \
  /* y (+)= x with its first 2 h channels turned: y_j = x_j c_j - x_{j+h} s_j, y_{j+h} = x_{j+h}   \
   * c_j                                                                                           \
   * + x_j s_j for j < h, with s = direction sines; the others as they are. y may be x */          \
  K(void, row_rotate,                                                                              \
    (attn_span y, bool accumulate, attn_span x, attn_span cosines, attn_span sines,                \
     double direction, int64_t h, int64_t n))                                                      \
  /* y = f(x), and dx (+)= f'(x) dy */                                                             \
  K(void, row_activate, (attn_activation f, attn_span y, attn_span x, int64_t n))                  \
  K(void, row_activate_backward,                                                                   \
    (attn_activation f, attn_span dx, bool accumulate, attn_span x, attn_span dy, int64_t n))      \
  /* y = f(a) b; da (+)= f'(a) b dy, db (+)= f(a) dy, each optional */                             \
  K(void, row_gate, (attn_activation f, attn_span y, attn_span a, attn_span b, int64_t n))         \
  K(void, row_gate_backward,                                                                       \
    (attn_activation f, attn_span da, bool accumulate_a, attn_span db, bool accumulate_b,          \
     attn_span a, attn_span b, attn_span dy, int64_t n))                                           \
  /* r = 1 / sqrt(sum x^2 / divisor + epsilon), y = r x (.) weight; returns r */                   \
  K(double, row_rms_norm,                                                                          \
    (attn_span y, attn_span x, attn_span weight, int64_t n, double divisor, double epsilon))       \
  /* dx (+)= r u - r^3 x (u . x) / divisor, u = dy (.) weight; d_weight += r x (.) dy */           \
  K(void, row_rms_norm_backward,                                                                   \
    (attn_span dx, bool accumulate, attn_span d_weight, attn_span x, attn_span weight,             \
     attn_span dy, int64_t n, double divisor, double r))                                           \
  /* r = 1 / sqrt(var x + epsilon), y = r (x - mean) (.) weight + bias; returns r */               \
  K(double, row_layer_norm,                                                                        \
    (attn_span y, attn_span x, attn_span weight, attn_span bias, int64_t n, double epsilon,        \
     double *mean))                                                                                \
  K(void, row_layer_norm_backward,                                                                 \
    (attn_span dx, bool accumulate, attn_span d_weight, attn_span d_bias, attn_span x,             \
     attn_span weight, attn_span dy, int64_t n, double mean, double r))                            \
  /* y = exp(x - max x), divided by its sum with `divide`; at least `floor`. dx (+)= J^T dy of it, \
   * where y is the floor nothing flows, and with `divide` false the maximum counts too */         \
  K(void, row_softmax, (attn_span y, attn_span x, int64_t n, bool divide, double floor))           \
  K(void, row_softmax_backward,                                                                    \
    (attn_span dx, bool accumulate, attn_span x, attn_span dy, int64_t n, bool divide,             \
     double floor))                                                                                \
  /* Replaces logits z (float32 or float64) by scale (softmax(z) - onehot(target)); returns        \
   * logsumexp(z) - z[target] */                                                                   \
  K(double, row_cross_entropy, (attn_span logits, int64_t n, int64_t target, double scale))

#endif
