/* Element-wise operations, sums over rows or columns, norms, look-ups and the optimiser's step.
 *
 * Operands are tensors of float64, float32, bfloat16 or float16 with any strides (0 repeats an
 * element) and, unless a comment says otherwise, of one shape; dtypes mix freely. Arithmetic is
 * float64 when an operand is, else float32, as in the CPU's kernels/rows.h. An absent tensor is
 * NULL. `accumulate` adds to what the target holds. Targets may be the same memory as an operand of
 * the same shape and strides. "Rows" are all axes but the innermost: at most 2^31 - 1. Shapes and
 * dtypes are checked; indices and targets, which lie in device memory, are not. The calling
 * thread's current device is the stream's. */
#ifndef ATTN_KERNELS_CUDA_ROWS_H
#define ATTN_KERNELS_CUDA_ROWS_H

#include "attn/tensor.h"
#include "kernels/prefix.h"
#include "kernels/rows.h"
#include "kernels/spikes.h"
#include "kernels/window.h"

/* Sums over rows are made in at most this many parts, each in a fixed order, added up in order. */
enum { ATTN_CUDA_PARTS = 256 };
/* Tensors that sum_squares_all takes at a time. */
enum { ATTN_CUDA_TABLE = 128 };
/* Products that multiply_sum adds up at most. */
enum { ATTN_CUDA_TERMS = 8 };

/* The formatter would break this list. */
/* clang-format off */
#define ATTN_CUDA_ROWS(K)                                                                          \
  /* y = alpha a + beta b; b may be NULL */                                                        \
  K(attn_status, add, (const attn_tensor *y, double alpha, const attn_tensor *a, double beta,      \
                       const attn_tensor *b, attn_cuda_stream stream))                             \
  /* y (+)= sum over j < count <= 8 of a[j] (.) b[j] */                                            \
  K(attn_status, multiply_sum, (const attn_tensor *y, bool accumulate, int count,                  \
                                const attn_tensor *a, const attn_tensor *b,                        \
                                attn_cuda_stream stream))                                          \
  /* y = f(x), and dx (+)= f'(x) dy */                                                             \
  K(attn_status, activate, (attn_activation f, const attn_tensor *y, const attn_tensor *x,         \
                            attn_cuda_stream stream))                                              \
  K(attn_status, activate_backward, (attn_activation f, const attn_tensor *dx, bool accumulate,    \
                                     const attn_tensor *x, const attn_tensor *dy,                  \
                                     attn_cuda_stream stream))                                     \
  /* y = f(a) b; da (+)= f'(a) b dy, db (+)= f(a) dy, y once more, which may lie where dy does; each \
   * optional */                                                                                   \
  K(attn_status, gate, (attn_activation f, const attn_tensor *y, const attn_tensor *a,             \
                        const attn_tensor *b, attn_cuda_stream stream))                            \
  K(attn_status, gate_backward, (attn_activation f, const attn_tensor *da, bool accumulate_a,      \
                                 const attn_tensor *db, bool accumulate_b, const attn_tensor *y,   \
                                 const attn_tensor *a, const attn_tensor *b,                       \
                                 const attn_tensor *dy, attn_cuda_stream stream))                  \
  /* y = exp(x - max x) of each row, divided by its sum with `divide`; at least `floor`; and dx (+)= \
   * J^T dy of it: where y is the floor nothing flows, without `divide` the maximum counts too */    \
  K(attn_status, row_softmax, (const attn_tensor *y, const attn_tensor *x, bool divide,            \
                               double floor, attn_cuda_stream stream))                             \
  K(attn_status, row_softmax_backward, (const attn_tensor *dx, bool accumulate,                    \
                                        const attn_tensor *x, const attn_tensor *dy, bool divide,  \
                                        double floor, attn_cuda_stream stream))                    \
  /* x = cap tanh(x / cap), in place */                                                            \
  K(attn_status, cap, (const attn_tensor *x, double cap, attn_cuda_stream stream))                 \
  /* y[r] = sum over c of a[r, c] b[r, c]: y has the leading axes of a and b */                    \
  K(attn_status, row_dot, (const attn_tensor *y, const attn_tensor *a, const attn_tensor *b,       \
                           attn_cuda_stream stream))                                               \
  /* y[c] (+)= sum over rows of a[r, c] b[r, c]; b NULL: of a. y [n]; workspace: ATTN_CUDA_PARTS n \
   * float64 */                                                                                    \
  K(attn_status, column_dot, (const attn_tensor *y, bool accumulate, const attn_tensor *a,         \
                              const attn_tensor *b, void *workspace, attn_cuda_stream stream))     \
  /* RMS norm: r = 1 / sqrt(sum x^2 / divisor + epsilon), y = r x (.) weight. Layer norm (mean not \
   * NULL): r = 1 / sqrt(var x + epsilon), y = r (x - mean) (.) weight + bias. weight and bias [n] \
   * or NULL; factor and mean: a float64 a row, kept for backward */                               \
  K(attn_status, norm, (const attn_tensor *y, const attn_tensor *x, const attn_tensor *weight,     \
                        const attn_tensor *bias, double divisor, double epsilon, double *factor,   \
                        double *mean, attn_cuda_stream stream))                                    \
  /* dx (+)= ..., each of dx, d_weight [n], d_bias [n] optional, the last two overwritten; copy, if  \
   * not NULL, gets dx in its own dtype; workspace: 2 ATTN_CUDA_PARTS n float64 */                 \
  K(attn_status, norm_backward, (const attn_tensor *dx, bool accumulate, const attn_tensor *copy,  \
                                 const attn_tensor *d_weight, const attn_tensor *d_bias,           \
                                 const attn_tensor *x, const attn_tensor *weight,                  \
                                 const attn_tensor *dy, double divisor, const double *factor,      \
                                 const double *mean, void *workspace, attn_cuda_stream stream))    \
  /* sum = a + b and y = RMS norm of sum, which is float32 or as the others' wide dtype */         \
  K(attn_status, add_norm, (const attn_tensor *sum, const attn_tensor *y, const attn_tensor *a,    \
                            const attn_tensor *b, const attn_tensor *weight, double divisor,       \
                            double epsilon, double *factor, attn_cuda_stream stream))              \
  /* y = RMS norm of x (.) gate; and dx, d_gate (+)= ..., of rows of at most 4096 elements that    \
   * lie together, 8 k of them, at addresses and distances of 16 k bytes, and are not float64 */   \
  K(attn_status, norm_gate, (const attn_tensor *y, const attn_tensor *x, const attn_tensor *gate,  \
                             double divisor, double epsilon, double *factor,                       \
                             attn_cuda_stream stream))                                             \
  K(attn_status, norm_gate_backward, (const attn_tensor *dx, bool accumulate,                      \
                                      const attn_tensor *d_gate, bool accumulate_gate,             \
                                      const attn_tensor *x, const attn_tensor *gate,               \
                                      const attn_tensor *dy, double divisor, const double *factor, \
                                      attn_cuda_stream stream))                                    \
  /* Replaces logits z [rows, n] (float32 or float64) by scale (softmax(z) - onehot(target)), and  \
   * losses[r] = logsumexp(z) - z[target]; a row whose target is negative becomes 0, its loss too. \
   * dz, if not NULL, takes the result instead (any dtype, e.g. bfloat16), z is then only read; or   \
   * each row of dz, of a smaller dtype, begins where that of z does and takes its place. losses   \
   * may be NULL */                                                                                \
  K(attn_status, cross_entropy, (const attn_tensor *z, const int32_t *targets, double scale,       \
                                 const attn_tensor *dz, double *losses, attn_cuda_stream stream))  \
  /* *sum = scale times the sum of values[0 .. n), in a fixed order; *sum in `dtype` */            \
  K(attn_status, total, (const double *values, int64_t n, double scale, void *sum,                 \
                         attn_dtype dtype, attn_cuda_stream stream))                               \
  /* y[r] = factor table[index[r]], 0 where index[r] < 0: table [m, n], m > 0, y [rows, n] */      \
  K(attn_status, gather, (const attn_tensor *y, double factor, const attn_tensor *table,           \
                          const int32_t *index, attn_cuda_stream stream))                          \
  /* table[index[r]] += factor x[r], for each row of the table in an order that the indices alone  \
   * fix, rounded to its dtype once; workspace: (m + 1 + 2 rows) int32, aligned to 256 */          \
  K(attn_status, scatter_add, (const attn_tensor *table, double factor, const attn_tensor *x,      \
                               const int32_t *index, void *workspace, attn_cuda_stream stream))    \
  /* cosines, sines [count, width] of (first + row) theta[column], angles in float64; theta        \
   * [width] is device memory. `position`, if not NULL, is device memory whose value is added to   \
   * first (a replayed graph moves on) */                                                          \
  K(attn_status, angles, (const attn_tensor *cosines, const attn_tensor *sines,                    \
                          const double *theta, int64_t first, const int64_t *position,             \
                          attn_cuda_stream stream))                                                \
  /* y (+)= the rows of x, with their first 2 h channels turned: with t = direction (1 or -1) times \
   * the angle, y_j = x_j cos t - x_{j+h} sin t, y_{j+h} = x_{j+h} cos t + x_j sin t for j < h; the  \
   * others as they are. y, x [.., n]; cosines, sines [.., h] with the same leading axes */         \
  K(attn_status, rotate, (const attn_tensor *y, bool accumulate, const attn_tensor *x,             \
                          const attn_tensor *cosines, const attn_tensor *sines, double direction,  \
                          attn_cuda_stream stream))                                                \
  /* y[b, t, c] (+)= sum over j < W of w[c, W - 1 - j] x[b, t - j, c], or (reverse) of x[b, t + j, \
   * c]: x, y [batch, length, channels], w [channels, W], W <= 16. Beyond the ends x is 0, but with  \
   * `tail` [W - 1, channels] (batch 1, not in reverse) it holds what comes before, and afterwards   \
   * the last W - 1 rows of it and x; else NULL */                                                   \
  K(attn_status, convolve, (const attn_tensor *y, bool accumulate, const attn_tensor *x,           \
                            const attn_tensor *w, const attn_tensor *tail, bool reverse,           \
                            attn_cuda_stream stream))                                              \
  /* Running means with softmax weights and their gradients (kernels/prefix.h); state may be NULL,   \
   * else batch is 1. workspace: 2 batch chunks heads (dim + 2) elements of the dtype of s */      \
  K(attn_status, prefix_softmax, (const attn_prefix_tensors *tensors,                              \
                                  const attn_prefix_state *state, const attn_tensor *workspace,    \
                                  attn_cuda_stream stream))                                        \
  K(attn_status, prefix_softmax_backward, (const attn_prefix_tensors *tensors,                     \
                                           const attn_tensor *workspace, attn_cuda_stream stream)) \
  /* Spikes of leaky integrate-and-fire neurons and their surrogate gradients (kernels/spikes.h) */ \
  K(attn_status, lif, (const attn_lif_tensors *tensors, attn_cuda_stream stream))                  \
  K(attn_status, lif_backward, (const attn_lif_tensors *tensors, attn_cuda_stream stream))         \
  /* y[i] = 1 / sqrt(x[i] + epsilon): vectors */                                                   \
  K(attn_status, inverse_root, (const attn_tensor *y, const attn_tensor *x, double epsilon,        \
                                attn_cuda_stream stream))                                          \
  /* Windows of exact attention beside a linear part (kernels/window.h) */                          \
  K(attn_status, window_greatest, (const attn_window_ranges *ranges,                               \
                                   const attn_greatest_tensors *tensors,                           \
                                   attn_cuda_stream stream))                                       \
  K(attn_status, window_greatest_backward, (const attn_window_ranges *ranges,                      \
                                            const attn_greatest_tensors *tensors,                  \
                                            attn_cuda_stream stream))                              \
  K(attn_status, window_join, (const attn_join_tensors *tensors, attn_cuda_stream stream))         \
  K(attn_status, window_join_backward, (const attn_join_tensors *tensors,                          \
                                        attn_cuda_stream stream))                                  \
  /* *sum = the sum of the squares of x (any shape), float64; workspace: ATTN_CUDA_PARTS float64 */\
  K(attn_status, sum_squares, (const attn_tensor *x, double *sum, void *workspace,                 \
                               attn_cuda_stream stream))                                           \
  /* The same for `count` tensors: sums[i] of x[i]; workspace: ATTN_CUDA_TABLE ATTN_CUDA_PARTS float64 */ \
  K(attn_status, sum_squares_all, (const attn_tensor *const *x, int count, double *sums,           \
                                   void *workspace, attn_cuda_stream stream))                      \
  /* One step of AdamW (arXiv 1711.05101) on contiguous float32 (or float64) w, gradient g and     \
   * moments m, v: g' = scale g;  m = beta1 m + (1 - beta1) g';  v = beta2 v + (1 - beta2) g'^2;   \
   * w -= rate (m / correction1 / (sqrt(v / correction2) + epsilon) + decay w). copy, if not NULL, \
   * gets w in its own dtype (bfloat16), so that no pass of its own is needed. g is zeroed. */     \
  K(attn_status, adamw, (const attn_tensor *w, const attn_tensor *g, const attn_tensor *m,         \
                         const attn_tensor *v, const attn_tensor *copy, double rate, double beta1, \
                         double beta2, double epsilon, double decay, double correction1,           \
                         double correction2, double scale, attn_cuda_stream stream))
/* clang-format on */

#endif
