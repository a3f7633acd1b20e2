/* The operations that every model needs; norms, rotations and the like are in src/layers/.
 *
 * Shapes are written [..., n]: any leading axes. All return NULL after an error (see graph.h). */
#ifndef ATTN_GRAPH_OPERATIONS_H
#define ATTN_GRAPH_OPERATIONS_H

#include "attn/recurrent.h"
#include "attn/softmax.h"
#include "graph/graph.h"
#include "graph/layout.h"
#include "kernels/online_memory.h"
#include "kernels/prefix.h"
#include "kernels/window.h"

/* elementwise.c ---------------------------------------------------------------------------------
 * Operands have equal shapes; the result has the dtype of the first. */
attn_var *attn_op_add(attn_graph *graph, attn_var *a, attn_var *b);
/* The same for a sum whose values some other pass makes. */
attn_var *attn_op_added(attn_graph *graph, attn_tensor sum, attn_var *a, attn_var *b);
/* For the backward of an operation that was recorded right after such a sum, and so is the last to
 * add to its gradient: where b's gradient, a copy of the sum's, goes. The sum leaves b alone then.
 * Data is NULL when b's cannot be a plain copy. */
attn_tensor attn_op_take_addend(attn_graph *graph, attn_var *sum);
attn_var *attn_op_scale(attn_graph *graph, attn_var *x, double factor);
attn_var *attn_op_activate(attn_graph *graph, attn_activation f, attn_var *x);
/* f with a result of the wide dtype: for decays and gates that the engines take in float32. */
attn_var *attn_op_activate_wide(attn_graph *graph, attn_activation f, attn_var *x);
/* f(a) (.) b: gated units, output gates. */
attn_var *attn_op_gate(attn_graph *graph, attn_activation f, attn_var *a, attn_var *b);
/* x [..., n] + bias [n] */
attn_var *attn_op_add_bias(attn_graph *graph, attn_var *x, attn_var *bias);
/* y[.., c] = x[.., c] s[c / repeat]: x [..., n], s [n / repeat]. */
attn_var *attn_op_scale_columns(attn_graph *graph, attn_var *x, attn_var *s, int64_t repeat);
/* y[r] = s[r] x[r]: x [rows, n], s [rows, 1]. */
attn_var *attn_op_scale_rows(attn_graph *graph, attn_var *x, attn_var *s);
/* y = exp(x - max x) over the innermost axis, divided by its sum with `divide`, at least `floor`:
 * feature maps. The result has the compute dtype. */
attn_var *attn_op_row_softmax(attn_graph *graph, attn_var *x, bool divide, double floor);
/* A copy in another dtype, contiguous. */
attn_var *attn_op_cast(attn_graph *graph, attn_var *x, attn_dtype dtype);

/* linear.c ---------------------------------------------------------------------------------------
 * y [..., outputs] = x [..., inputs] w^T, w a parameter [outputs, inputs], and what w's adapter
 * makes of it, if there is one. x is converted to the compute dtype if needed; y has the compute
 * dtype, or the wide one. */
attn_var *attn_op_linear(attn_graph *graph, attn_var *x, attn_parameter *w);
attn_var *attn_op_linear_wide(attn_graph *graph, attn_var *x, attn_parameter *w);
/* The same in a dtype (the compute or the wide one) without the adapter that w may have. */
attn_var *attn_op_linear_frozen(attn_graph *graph, attn_var *x, attn_parameter *w,
                                attn_dtype dtype);
/* residual + x w^T in the residual's dtype, without a pass over memory of its own. */
attn_var *attn_op_linear_add(attn_graph *graph, attn_var *residual, attn_var *x, attn_parameter *w);

/* (f(a) (.) b) w^T. While recording on a GPU the product of a and b is not kept but made again
 * where backward passes over a and b anyway. */
attn_var *attn_op_gated_linear(attn_graph *graph, attn_activation f, attn_var *a, attn_var *b,
                               attn_parameter *w);

/* cross_entropy.c --------------------------------------------------------------------------------
 * The mean of -log softmax(x w^T)[target] over the rows whose target is >= 0: the vocabulary head
 * fused with the loss, by chunks of rows, so that only one chunk of logits ever exists. x
 * [rows, inputs], w [vocabulary, inputs], targets [rows]. cap > 0: of cap tanh(x w^T / cap), not
 * while recording. The result has one element, wide. */
attn_var *attn_op_linear_cross_entropy(attn_graph *graph, attn_var *x, attn_parameter *w,
                                       double cap, const int32_t *targets);
/* The same of x w^T + bias, a parameter [vocabulary]. */
attn_var *attn_op_affine_cross_entropy(attn_graph *graph, attn_var *x, attn_parameter *w,
                                       attn_parameter *bias, const int32_t *targets);

/* scale times the sum of (x - target)^2 over all elements; one element, wide. target: of x's shape,
 * on its device, of any floating dtype. */
attn_var *attn_op_squared_error(attn_graph *graph, attn_var *x, const attn_tensor *target,
                                double scale);

/* attention.c ------------------------------------------------------------------------------------
 * The engines on the tape. The caller fills in the problem's options and, in args, what is not a
 * variable (tables, offsets, states); shapes, dtypes and passes are set here from the variables. */
attn_var *attn_op_softmax(attn_graph *graph, const attn_softmax_problem *options,
                          const attn_softmax_args *args, attn_var *q, attn_var *k, attn_var *v);
/* The same with the logarithms of the sums of weights as a second result: *lse is wide, [batch,
 * heads, length], when ragged [heads, total]. Gradients flow back from both, if they do from the
 * first. */
attn_var *attn_op_softmax_lse(attn_graph *graph, const attn_softmax_problem *options,
                              const attn_softmax_args *args, attn_var *q, attn_var *k, attn_var *v,
                              attn_var **lse);
/* decay and beta may be NULL where the problem has none; decay may be a variable without gradient.
 */
attn_var *attn_op_recurrent(attn_graph *graph, const attn_recurrent_problem *options,
                            const attn_recurrent_args *args, attn_var *q, attn_var *k, attn_var *v,
                            attn_var *decay, attn_var *beta);
/* Makes the plan of a problem that a later step will have, all but the device filled in, and the
 * graph large enough for it and some bytes more, so that that step allocates nothing. */
void attn_op_recurrent_expect(attn_graph *graph, const attn_recurrent_problem *problem,
                              size_t bytes);

/* prefix_softmax.c -------------------------------------------------------------------------------
 * s[r, h] = x[r, h] . q[h]: x [rows, heads, dim], q [1, heads, dim]; s has the wide dtype. */
attn_var *attn_op_head_scores(attn_graph *graph, attn_var *x, attn_var *q);
/* o_t = sum_{j <= t} exp(s_j) v_j / sum_{j <= t} exp(s_j) in each sequence: softmax attention whose
 * scores do not depend on t. s [rows, heads] wide, v and o [rows, heads, dim <= 256]. state, for
 * one sequence, is continued from and moved on; no gradient flows into it. NULL: none. */
attn_var *attn_op_prefix_softmax(attn_graph *graph, const attn_layout *layout, attn_var *s,
                                 attn_var *v, const attn_prefix_state *state);

/* linear_attention.c -----------------------------------------------------------------------------
 * Linear attention without an order: in each sequence o_i = S^T q_i, S = sum over all j of k_j
 * v_j^T. With `normalise` it is divided by z . q_i + epsilon, z = sum of k_j, which must be
 * positive. Queries q [rows, heads, dim] of one layout, keys k [.., heads, dim] and values v [..,
 * heads, value_dim] of another, with as many sequences; o [rows, heads, value_dim], 0 where there
 * are no keys. S, z and all sums are wide. */
typedef struct attn_linear_attention {
  bool normalise;
  double epsilon;
} attn_linear_attention;
attn_var *attn_op_linear_attention(attn_graph *graph, const attn_linear_attention *options,
                                   const attn_layout *layout, const attn_layout *key_layout,
                                   attn_var *q, attn_var *k, attn_var *v);

/* relu_attention.c -------------------------------------------------------------------------------
 * o_i = sum_j max(0, scale q_i . k_j) v_j in each sequence, not divided by anything; causal: query
 * i of m sees the first n - m + i + 1 of n keys. All scores of a sequence exist at once: sequences
 * are short (blocks), at most ATTN_RELU_LENGTH keys. q, k, v [rows, heads, ..] of two layouts with
 * as many sequences, o [rows, heads, value_dim]. Sums are wide. */
enum { ATTN_RELU_LENGTH = 1024 };
attn_var *attn_op_relu_attention(attn_graph *graph, const attn_layout *layout,
                                 const attn_layout *key_layout, bool causal, double scale,
                                 attn_var *q, attn_var *k, attn_var *v);

/* legendre.c -------------------------------------------------------------------------------------
 * m_t = Abar m_{t-1} + Bbar u_t in each sequence, for each head by itself: the coefficients of the
 * last theta inputs (engines/legendre/legendre.h). u [rows, heads] wide, m [rows, heads, size]
 * wide. state [heads, size], for one sequence, is continued from and moved on; no gradient flows
 * into it. NULL: none. */
attn_var *attn_op_legendre_memory(attn_graph *graph, const attn_layout *layout, attn_var *u,
                                  int64_t size, double theta, const attn_tensor *state);

/* sequences.c ------------------------------------------------------------------------------------
 * x [rows, n] with its neighbours in its sequence, y [rows, taps n] in the compute dtype: y[t, k n
 * + c] = x[t + k - taps / 2, c], 0 beyond the ends. taps is odd. A centred convolution is this and
 * a product. */
attn_var *attn_op_unfold(attn_graph *graph, const attn_layout *layout, attn_var *x, int64_t taps);
/* The mean over time of each sequence, [batch, n], wide. None may be empty. */
attn_var *attn_op_sequence_mean(attn_graph *graph, const attn_layout *layout, attn_var *x);

/* lif.c ------------------------------------------------------------------------------------------
 * Spikes, 0 or 1, of leaky integrate-and-fire neurons that step along each sequence, one a channel
 * (kernels/spikes.h). x [rows, n] wide, the result [rows, n] of `dtype`. The gradient is the
 * surrogate's: that of sigmoid(4 (potential - threshold)), none through resets. state [n], of one
 * sequence, holds the potentials and is moved on; NULL: none, they begin at 0. */
typedef struct attn_lif {
  double tau, threshold; /* 1 or more; above 0 */
} attn_lif;
attn_var *attn_op_lif(attn_graph *graph, const attn_layout *layout, const attn_lif *neuron,
                      attn_var *x, attn_dtype dtype, const attn_tensor *state);

/* concatenate.c ----------------------------------------------------------------------------------
 * y [rows, a + b] = [x1 | x2] of x1 [rows, a] and x2 [rows, b], of any dtypes, in the compute dtype
 * or another. */
attn_var *attn_op_concatenate(attn_graph *graph, attn_var *a, attn_var *b, attn_dtype dtype);
/* window.c ---------------------------------------------------------------------------------------
 * y[r] = x[index[r]], 0 where index[r] is negative: x [rows, ...], y [count, ...]. */
attn_var *attn_op_take_rows(attn_graph *graph, attn_var *x, const int32_t *index, int64_t count);
/* The greatest of the scores scale q . k that each query sees, [rows, heads] wide: q [rows, heads,
 * dim], k [keys, kv_heads, dim]. The ranges are the host's (kernels/window.h). The gradient goes to
 * the query and the key that have it. */
attn_var *attn_op_greatest_score(attn_graph *graph, const attn_window_ranges *ranges, double scale,
                                 attn_var *q, attn_var *k);
/* What exact attention over a window gives, [rows, heads, dim], and linear attention over other
 * keys, [rows, heads, n > dim] (weighted sums, sums of weights, zeros), under one normaliser, in
 * which the window's weights are exp(factor + score - greatest): [rows, heads, dim]. lse [heads,
 * rows] wide (also as [1, heads, rows]), greatest [rows, heads] wide, factor [heads] wide. */
attn_var *attn_op_join_window(attn_graph *graph, attn_var *window, attn_var *lse,
                              attn_var *greatest, attn_var *factor, attn_var *linear);
/* A memory that learns while it reads (kernels/online_memory.h): q, k [rows, heads, features], v
 * and o [rows, heads, value_dim], gates [rows, heads] wide; eta may be NULL: 1. initial: the
 * weights of each head before a sequence's first token, matrix by matrix [heads rows, columns].
 * state, for one sequence, is continued from and moved on; no gradient flows into it. NULL: none.
 * Any number of tokens gives the bits of as many steps. */
typedef struct attn_online_memory_inputs {
  attn_var *q, *k, *v, *alpha, *theta, *eta, *gamma;
  attn_var *initial[ATTN_MEMORY_MATRICES];
} attn_online_memory_inputs;
attn_var *attn_op_online_memory(attn_graph *graph, const attn_layout *layout,
                                const attn_online_memory *rule, const attn_online_memory_inputs *in,
                                const attn_online_memory_state *state);

/* Helpers shared by operations. */
/* Rows x [rows, ..] as [sequences, length, ..]: all of them where they are equally long, sequence b
 * alone where they are packed. */
attn_tensor attn_sequences_of(const attn_tensor *x, const attn_layout *layout, int64_t b);
bool attn_same_shape(const attn_tensor *a, const attn_tensor *b);
const char *attn_shape_text(const attn_tensor *tensor, char text[128]);
/* Contiguous, like `shape_of`, in a dtype. */
attn_tensor attn_graph_tensor_like(attn_graph *graph, attn_dtype dtype,
                                   const attn_tensor *shape_of);
/* Rows a loop may take before more than one thread is worth its start. */
#define ATTN_SERIAL_ELEMENTS (1 << 14)

#endif
