/* Layers: norms, rotations, convolutions, embeddings, feed-forward blocks; one file each, forward
 * and backward together. Shapes are written [..., n]: any leading axes. All return NULL after an
 * error (see graph/graph.h). */
#ifndef ATTN_LAYERS_LAYERS_H
#define ATTN_LAYERS_LAYERS_H

#include "graph/graph.h"
#include "graph/layout.h"

/* norm.c -----------------------------------------------------------------------------------------
 * x [..., n] normalised over n; the result has the compute dtype. weight [n] or NULL. */
/* x / sqrt(mean(x^2) + epsilon) (.) weight: RMSNorm (arXiv 1910.07467); SRMSNorm when weight is
 * NULL (arXiv 2307.14995). */
attn_var *attn_layer_rms_norm(attn_graph *graph, attn_var *x, attn_var *weight, double epsilon);
/* *sum = x + y, in x's dtype, and the RMS norm of it: what a layer's end and the next one's
 * beginning are, in one pass over memory each way on a GPU. */
attn_var *attn_layer_add_rms_norm(attn_graph *graph, attn_var *x, attn_var *y, attn_var *weight,
                                  double epsilon, attn_var **sum);
/* SRMSNorm of x (.) gate, likewise. */
attn_var *attn_layer_rms_norm_gate(attn_graph *graph, attn_var *x, attn_var *gate, double epsilon);
/* x / sqrt(sum(x^2) + 1e-6) */
attn_var *attn_layer_l2_norm(attn_graph *graph, attn_var *x);
/* (x - mean) / sqrt(var + epsilon) (.) weight + bias (arXiv 1607.06450); weight, bias may be NULL.
 */
attn_var *attn_layer_layer_norm(attn_graph *graph, attn_var *x, attn_var *weight, attn_var *bias,
                                double epsilon);

/* batch_norm.c: w (x - mean) / sqrt(variance + epsilon) + b by channel (arXiv 1502.03167): x
 * [rows, n], all others [n]. While recording, where the running statistics have gradients, mean and
 * variance are those of the rows (the variance divided by rows), and backward adds the running
 * ones' distance from them to those gradients, times the loss's scale; else they are the running
 * ones, and rows do not meet. The result is of `dtype`. */
typedef struct attn_batch_norm {
  attn_parameter *mean, *variance; /* running; parameters with `statistic` */
  double epsilon;
} attn_batch_norm;
attn_var *attn_layer_batch_norm(attn_graph *graph, attn_var *x, attn_var *weight, attn_var *bias,
                                const attn_batch_norm *norm, attn_dtype dtype);

/* rotary.c: rotary position embedding (arXiv 2104.09864) of x [rows, heads, dim]. The first
 * rotary_dim channels turn in pairs (j, j + rotary_dim / 2) by position * theta_j. */
typedef enum attn_rope_scaling {
  ATTN_ROPE_PLAIN = 0, /* theta_j = base^(-2j / rotary_dim) */
  ATTN_ROPE_LINEAR,    /* theta_j / factor: position interpolation (arXiv 2306.15595) */
  /* Llama 3.1 (arXiv 2407.21783): theta_j as it is where a turn takes fewer tokens than
   * original_length / high_factor, theta_j / factor where it takes more than original_length /
   * low_factor, between them a mean weighted by turns in original_length. */
  ATTN_ROPE_LLAMA3,
  ATTN_ROPE_FACTORS, /* theta_j / factors[j], as GGUF files have it in rope_freqs.weight */
  /* YaRN (arXiv 2309.00071): theta_j as it is below the pair that makes high_factor turns in
   * original_length, theta_j / factor above the one that makes low_factor, between them a mean
   * weighted by j. */
  ATTN_ROPE_YARN,
} attn_rope_scaling;
typedef struct attn_rope {
  double base;
  attn_rope_scaling scaling;
  double factor, low_factor, high_factor, original_length;
  double magnitude;      /* what is turned is also multiplied by this; 0: 1 */
  const double *factors; /* [factor_count], rotary_dim / 2 of them; borrowed */
  int64_t factor_count;
} attn_rope;
/* What the speed of pair j of `half` is divided by. */
double attn_rope_divisor(const attn_rope *rope, int64_t j, int64_t half);
attn_var *attn_layer_rotary(attn_graph *graph, attn_var *x, const attn_layout *layout,
                            int64_t rotary_dim, const attn_rope *rope);

/* lrpe.c: linearised relative position encoding as TransNormerLLM uses it (arXiv 2307.09270,
 * 2307.14995): x [rows, heads, dim] -> [x cos(n theta), x sin(n theta)] [rows, heads, 2 dim], n the
 * position, theta [heads, dim] learnable. */
attn_var *attn_layer_lrpe(attn_graph *graph, attn_var *x, attn_var *theta,
                          const attn_layout *layout);

/* short_convolution.c: y_t[c] = sum_j w[c][W-1-j] x_{t-j}[c], zeros (or `tail`) before the
 * sequence. x [rows, channels], w [channels, W]. tail, if not NULL, is [W - 1, channels] in x's
 * dtype, holds the inputs before the first row and is moved on; only for one sequence. No gradient
 * flows into it. */
attn_var *attn_layer_short_convolution(attn_graph *graph, attn_var *x, attn_var *w,
                                       const attn_layout *layout, const attn_tensor *tail);

/* embedding.c: y [rows, n] = factor * table[tokens], wide dtype; table [vocabulary, n] a parameter.
 * The tokens are read again in backward. */
attn_var *attn_layer_embedding(attn_graph *graph, attn_parameter *table, const int32_t *tokens,
                               int64_t rows, double factor);

/* feed_forward.c: x [rows, n] -> [rows, n]. */
typedef enum attn_feed_forward {
  ATTN_SWIGLU = 0, /* (silu(x W1^T) (.) (x W2^T)) W3^T   (arXiv 2002.05202) */
  ATTN_SGLU,       /* ((x W1^T) (.) (x W2^T)) W3^T       (arXiv 2307.14995) */
  ATTN_GEGLU,      /* (gelu_tanh(x W1^T) (.) (x W2^T)) W3^T (arXiv 2002.05202) */
  ATTN_GELU_MLP,   /* gelu(x W1^T + b1) W2^T + b2; biases optional */
} attn_feed_forward;
attn_var *attn_layer_gated_feed_forward(attn_graph *graph, attn_activation f, attn_var *x,
                                        attn_parameter *w1, attn_parameter *w2, attn_parameter *w3);
attn_var *attn_layer_mlp(attn_graph *graph, attn_activation f, attn_var *x, attn_parameter *w1,
                         attn_parameter *b1, attn_parameter *w2, attn_parameter *b2);

/* latent.c: for multi-head latent attention. */
/* [rows, heads, n + m]: the channels of b [rows, heads or 1, m] behind those of a [rows, heads, n];
 * one head of b goes to every head. */
attn_var *attn_layer_append_channels(attn_graph *graph, attn_var *a, attn_var *b);
/* y_h = W_h^T x_h: x [rows, heads, n], W [heads n, m], y [rows, heads, m]; and y_h = W_h x_h: x
 * [rows, heads, m], y [rows, heads, n]. For a few rows; not while recording. */
attn_var *attn_layer_absorb(attn_graph *graph, attn_var *x, const attn_parameter *w);
attn_var *attn_layer_expand(attn_graph *graph, attn_var *x, const attn_parameter *w);

/* linear_heads.c: y_h = W_h x_h: x [rows, heads, n], w a parameter [heads m, n], y [rows, heads, m]
 * of the compute dtype. */
attn_var *attn_layer_linear_heads(attn_graph *graph, attn_var *x, attn_parameter *w);

/* polynomial.c: x [.., n] -> all monomials of degree 0 to `degree` of x' = factor x, [..,
 * attn_polynomial_features(n, degree)] of the compute dtype: phi(q) . phi(k) = sum over j of a_j
 * (q' . k')^j, a_j = s_j^2 for scales s [degree + 1] (wide), 1 / j! where they are NULL
 * (arXiv 2505.23735). Monomials are in lexicographic order, degree by degree. */
int64_t attn_polynomial_features(int64_t n, int degree);
attn_var *attn_layer_polynomial(attn_graph *graph, attn_var *x, int degree, double factor,
                                attn_var *scales);
/* The Taylor map of exp to the second order: phi(q) . phi(k) = 1 + s + s^2 / 2, s = q . k / sqrt(n)
 * (arXiv 2402.18668). */
int64_t attn_taylor_features(int64_t n);
attn_var *attn_layer_taylor(attn_graph *graph, attn_var *x);

/* repeat_heads.c: y_{h times + i} = x_h for i < times: x [rows, heads, n], y [rows, heads times, n]
 * of x's dtype; x itself when times is 1. */
attn_var *attn_layer_repeat_heads(attn_graph *graph, attn_var *x, int64_t times);

/* experts.c: a mixture of experts (arXiv 1701.06538; 2401.04088, Mixtral). Router logits z
 * [rows, experts] give scores s = softmax(z), or sigmoid(z); each row goes to the `active` experts
 * of the highest s + bias, and
 *   y = sum_e w_e E_e(x),  w_e = scale s_e / (sum of the chosen s, or 1).
 * With groups (DeepSeek-V2, 2405.04434; V3, 2412.19437) only experts of the best groups count. */
typedef struct attn_routing {
  int64_t experts, active;       /* active at most 64 */
  int64_t groups, active_groups; /* of equal size; 0: none */
  bool sigmoid;                  /* scores */
  bool best_two;  /* a group is as good as its two best together (V3), not as its best (V2) */
  bool normalise; /* the weights of a row's experts sum to `scale` */
  double scale;
} attn_routing;
bool attn_routing_fits(const attn_routing *routing); /* the numbers to each other */
/* x [rows, n], logits [rows, experts] wide, bias [experts] (no gradient) or NULL; experts: W1, W2,
 * W3 of each gated feed-forward. `routing` is read again in backward. */
attn_var *attn_layer_experts(attn_graph *graph, attn_activation f, const attn_routing *routing,
                             attn_var *x, attn_var *logits, attn_parameter *bias,
                             attn_parameter *const *experts);

#endif
