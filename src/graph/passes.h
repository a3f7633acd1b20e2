/* Passes over tensors, on the graph's device: what operations are made of.
 *
 * On the processor a pass is a parallel loop of row kernels (kernels/rows.h), on a GPU one launch
 * (kernels/cuda/rows.h). This is the one place where operations meet the device: above it there are
 * formulas only. Errors go to the graph.
 *
 * Operands have equal shapes [..., n] with a contiguous innermost axis; the other strides are free,
 * and 0 repeats a row. An absent tensor is NULL. `accumulate` adds to what the target holds. */
#ifndef ATTN_GRAPH_PASSES_H
#define ATTN_GRAPH_PASSES_H

#include "graph/graph.h"
#include "kernels/prefix.h"
#include "kernels/spikes.h"
#include "kernels/window.h"

/* y = alpha a + beta b; b may be absent. */
void attn_pass_add(attn_graph *graph, const attn_tensor *y, double alpha, const attn_tensor *a,
                   double beta, const attn_tensor *b);
/* y (+)= sum over j < count of a[j] (.) b[j]; count is at most ATTN_PASS_TERMS. */
enum { ATTN_PASS_TERMS = 16 };
void attn_pass_multiply_sum(attn_graph *graph, const attn_tensor *y, bool accumulate, int count,
                            const attn_tensor *a, const attn_tensor *b);
/* y (+)= the rows of x with their channels turned as row_rotate does (kernels/rows.h): x and y
 * [.., n]; cosines and sines [.., h] have the same leading axes. */
void attn_pass_rotate(attn_graph *graph, const attn_tensor *y, bool accumulate,
                      const attn_tensor *x, const attn_tensor *cosines, const attn_tensor *sines,
                      double direction);
/* A causal convolution down the rows, attn_cuda_convolve (kernels/cuda/rows.h); on a GPU only. */
void attn_pass_convolve(attn_graph *graph, const attn_tensor *y, bool accumulate,
                        const attn_tensor *x, const attn_tensor *w, const attn_tensor *tail,
                        bool reverse);
/* y[r] (+)= s[r] x[r], one number a row: s has the leading axes of x. */
void attn_pass_scale_rows(attn_graph *graph, const attn_tensor *y, bool accumulate,
                          const attn_tensor *s, const attn_tensor *x);
/* y (+)= s x, with one number s (a tensor of one element) for all. Any strides. */
void attn_pass_scale_by(attn_graph *graph, const attn_tensor *y, bool accumulate,
                        const attn_tensor *s, const attn_tensor *x);
/* y = f(x), and dx (+)= f'(x) dy. */
void attn_pass_activate(attn_graph *graph, attn_activation f, const attn_tensor *y,
                        const attn_tensor *x);
void attn_pass_activate_backward(attn_graph *graph, attn_activation f, const attn_tensor *dx,
                                 bool accumulate, const attn_tensor *x, const attn_tensor *dy);
/* y = f(a) b; da (+)= f'(a) b dy, db (+)= f(a) dy, and y once more, which may lie where dy does;
 * each optional. */
void attn_pass_gate(attn_graph *graph, attn_activation f, const attn_tensor *y,
                    const attn_tensor *a, const attn_tensor *b);
void attn_pass_gate_backward(attn_graph *graph, attn_activation f, const attn_tensor *da,
                             bool accumulate_a, const attn_tensor *db, bool accumulate_b,
                             const attn_tensor *y, const attn_tensor *a, const attn_tensor *b,
                             const attn_tensor *dy);
/* y = row_softmax of the rows of x (kernels/rows.h), and dx (+)= its backward. */
void attn_pass_softmax(attn_graph *graph, const attn_tensor *y, const attn_tensor *x, bool divide,
                       double floor);
void attn_pass_softmax_backward(attn_graph *graph, const attn_tensor *dx, bool accumulate,
                                const attn_tensor *x, const attn_tensor *dy, bool divide,
                                double floor);
/* x = cap tanh(x / cap), in place: contiguous, wide. */
void attn_pass_cap(attn_graph *graph, const attn_tensor *x, double cap);
/* y[r] = a[r] . b[r]: y has the leading axes of a and b. */
void attn_pass_row_dot(attn_graph *graph, const attn_tensor *y, const attn_tensor *a,
                       const attn_tensor *b);
/* y = sum over rows of a (.) b, of a alone when b is absent; y [n], wide. One order of summation.
 */
void attn_pass_column_dot(attn_graph *graph, const attn_tensor *y, const attn_tensor *a,
                          const attn_tensor *b);

/* Norms of rows (kernels/rows.h): with `mean`, LayerNorm, else RMSNorm with its divisor. weight and
 * bias [n] or absent; factor and mean [rows] float64 are kept for backward, whose d_weight and
 * d_bias [n] (wide, absent where not wanted) are overwritten. */
typedef struct attn_pass_norm_options {
  const attn_tensor *weight, *bias;
  double divisor, epsilon;
  const attn_tensor *factor, *mean;
} attn_pass_norm_options;
void attn_pass_norm(attn_graph *graph, const attn_pass_norm_options *options, const attn_tensor *y,
                    const attn_tensor *x);
/* copy, if present, gets what dx holds afterwards, in its own dtype. */
void attn_pass_norm_backward(attn_graph *graph, const attn_pass_norm_options *options,
                             const attn_tensor *dx, bool accumulate, const attn_tensor *copy,
                             const attn_tensor *d_weight, const attn_tensor *d_bias,
                             const attn_tensor *x, const attn_tensor *dy);
/* sum = a + b and y = the norm of sum: one pass over memory for RMS norms on a GPU. */
void attn_pass_add_norm(attn_graph *graph, const attn_pass_norm_options *options,
                        const attn_tensor *sum, const attn_tensor *y, const attn_tensor *a,
                        const attn_tensor *b);
/* Of RMS norms without a weight, where attn_pass_can_gate_norm: y = norm(x) (.) gate, and dx,
 * d_gate
 * (+)= .... */
bool attn_pass_can_gate_norm(const attn_graph *graph, const attn_tensor *x,
                             const attn_tensor *gate);
void attn_pass_norm_gate(attn_graph *graph, const attn_pass_norm_options *options,
                         const attn_tensor *y, const attn_tensor *x, const attn_tensor *gate);
void attn_pass_norm_gate_backward(attn_graph *graph, const attn_pass_norm_options *options,
                                  const attn_tensor *dx, bool accumulate, const attn_tensor *d_gate,
                                  bool accumulate_gate, const attn_tensor *x,
                                  const attn_tensor *gate, const attn_tensor *dy);

/* losses [rows] (float64) of logits z [rows, n] (wide, contiguous): logsumexp(z) - z[target], and
 * dz, which may be z itself or of the compute dtype: scale (softmax(z) - onehot(target)). Both are
 * 0 where the target is negative; what z holds afterwards is of no use. On a GPU rows of a smaller
 * dtype may begin where those of z do. */
void attn_pass_cross_entropy(attn_graph *graph, const attn_tensor *z, const int32_t *targets,
                             double scale, const attn_tensor *dz, const attn_tensor *losses);
/* *sum (one element, wide) = scale times the sum of `values` (float64, contiguous), in order. */
void attn_pass_total(attn_graph *graph, const attn_tensor *sum, double scale,
                     const attn_tensor *values);

/* y[r] = factor table[index[r]], 0 where index[r] is negative, and table[index[r]] += factor x[r]
 * in the order of r. */
void attn_pass_gather(attn_graph *graph, const attn_tensor *y, double factor,
                      const attn_tensor *table, const int32_t *index);
void attn_pass_scatter_add(attn_graph *graph, const attn_tensor *table, double factor,
                           const attn_tensor *x, const int32_t *index);

/* y[r] = factor times row index[r] of a table in blocks; on a GPU. index is the host's; NULL: row
 * r. */
void attn_pass_expand_blocks(attn_graph *graph, const attn_tensor *y, double factor,
                             const attn_parameter *table, const int32_t *index);

/* Running means with softmax weights (kernels/prefix.h); state may be NULL, else batch is 1. Chunks
 * begin at fixed tokens, and one of a few tokens gives the bits of as many steps. */
void attn_pass_prefix_softmax(attn_graph *graph, const attn_prefix_tensors *tensors,
                              const attn_prefix_state *state);
void attn_pass_prefix_softmax_backward(attn_graph *graph, const attn_prefix_tensors *tensors);

/* Spikes of leaky integrate-and-fire neurons, and their surrogate gradients (kernels/spikes.h). */
void attn_pass_lif(attn_graph *graph, const attn_lif_tensors *tensors);
void attn_pass_lif_backward(attn_graph *graph, const attn_lif_tensors *tensors);
/* y = 1 / sqrt(x + epsilon): vectors, y wide. */
void attn_pass_inverse_root(attn_graph *graph, const attn_tensor *y, const attn_tensor *x,
                            double epsilon);
/* Windows of exact attention beside a linear part (kernels/window.h). */
void attn_pass_greatest(attn_graph *graph, const attn_window_ranges *ranges,
                        const attn_greatest_tensors *tensors);
void attn_pass_greatest_backward(attn_graph *graph, const attn_window_ranges *ranges,
                                 const attn_greatest_tensors *tensors);
void attn_pass_join(attn_graph *graph, const attn_join_tensors *tensors);
void attn_pass_join_backward(attn_graph *graph, const attn_join_tensors *tensors);

/* Host arrays as the device's kernels read them: the same memory on the processor, a copy in the
 * graph's memory on a GPU. NULL after an error. */
const void *attn_pass_upload(attn_graph *graph, const void *host, size_t bytes);
/* The same of what changes from step to step: while a step is captured to be replayed (replay.h),
 * `host` has to last as long as the replay does. */
const void *attn_pass_live(attn_graph *graph, const void *host, size_t bytes);
/* A few numbers [count] as a tensor of the device; data is NULL after an error. */
attn_tensor attn_pass_numbers(attn_graph *graph, attn_dtype dtype, int64_t count,
                              const double *numbers);

#endif
