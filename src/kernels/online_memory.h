/* A memory that learns while it reads: for each head of each sequence a small network whose weights
 * are the state. Its rule (arXiv 2505.23735; with a window of 1, no eta and no Newton-Schulz that
 * of Titans, 2501.00663), for token n in a chunk at whose start the weights were M':
 *
 *   g_i = gradient of ||M'(k_i) - v_i||^2 by the weights
 *   S_n = theta_n S_{n-1} + sum_{max(0, n - window) < i <= n} gamma_i g_i
 *   M_n = alpha_n M_{n-1} - eta_n NS(S_n),  o_n = M_n(q_n)
 *
 * matrix by matrix. Chunks begin at multiples of their length, wherever a sequence is cut; with
 * chunks of one token the rule is sequential. NS is the identity with no steps of it.
 *
 * Memories, with E z the `passed` features from `residual` on, as the first channels:
 *
 *   matrix   M(z) = W1 z
 *   mlp      M(z) = E z + W1 gelu(W2 z)
 *   gated    M(z) = E z + W1 (gelu(W2 z) (.) W3 z) */
#ifndef ATTN_KERNELS_ONLINE_MEMORY_H
#define ATTN_KERNELS_ONLINE_MEMORY_H

#include "attn/tensor.h"
#include "kernels/newton_schulz.h"

typedef enum attn_memory_kind {
  ATTN_MEMORY_DEFAULT = 0, /* the mixer's */
  ATTN_MEMORY_MATRIX,
  ATTN_MEMORY_MLP,
  ATTN_MEMORY_GATED,
} attn_memory_kind;

enum { ATTN_MEMORY_MATRICES = 3 };

typedef struct attn_online_memory {
  attn_memory_kind kind;
  int64_t features, value_dim;
  int64_t width;            /* of the hidden layer; of no meaning for a matrix */
  int64_t residual, passed; /* E: the first feature, and how many */
  int64_t window, chunk;
  int steps; /* of Newton-Schulz; 0: none */
} attn_online_memory;

/* How many matrices there are, and the shape of each: W1, W2, W3. */
static inline int attn_online_memory_count(const attn_online_memory *rule) {
  return rule->kind == ATTN_MEMORY_MATRIX ? 1 : rule->kind == ATTN_MEMORY_MLP ? 2 : 3;
}
static inline int64_t attn_online_memory_rows(const attn_online_memory *rule, int matrix) {
  return matrix == 0 ? rule->value_dim : rule->width;
}
static inline int64_t attn_online_memory_columns(const attn_online_memory *rule, int matrix) {
  return matrix == 0 && rule->kind != ATTN_MEMORY_MATRIX ? rule->width : rule->features;
}
/* All weights of a head. */
static inline int64_t attn_online_memory_weights(const attn_online_memory *rule) {
  int64_t all = 0;
  for (int i = 0; i < attn_online_memory_count(rule); ++i)
    all += attn_online_memory_rows(rule, i) * attn_online_memory_columns(rule, i);
  return all;
}
/* What the state keeps of a token of the window: k, v and gamma. */
static inline int64_t attn_online_memory_kept(const attn_online_memory *rule) {
  return rule->features + rule->value_dim + 1;
}

/* Tensors of a pass. "Wide" is float64 for float64, else float32; rows are tokens, sequences one
 * behind the other. */
typedef struct attn_online_memory_tensors {
  const attn_tensor *q, *k;                       /* [rows, heads, features], channels together */
  const attn_tensor *v, *o;                       /* [rows, heads, value_dim], likewise */
  const attn_tensor *alpha, *theta, *eta, *gamma; /* [rows, heads], contiguous, wide; eta NULL: 1 */
  const attn_tensor *initial[ATTN_MEMORY_MATRICES]; /* [heads rows, columns], contiguous */
  /* M and S at the start of each chunk, [slots, heads, weights], contiguous, wide and float64; see
   * attn_online_memory_slot. Written by forward where they are not NULL, read by backward. */
  const attn_tensor *starts, *momenta;
  /* Backward, contiguous and wide; those of k, v and gamma must be 0 before. d_initial is
   * [sequences, heads, weights]. */
  const attn_tensor *d_o; /* as o */
  const attn_tensor *dq, *dk, *dv, *d_alpha, *d_theta, *d_eta, *d_gamma, *d_initial;
  int64_t sequences, length; /* of each */
  const int32_t *offsets;    /* [sequences + 1] where they are not equally long, else NULL */
} attn_online_memory_tensors;

/* What the tokens before the first came to, replaced by what all come to; of one sequence.
 * Contiguous and wide, but the momentum, which is float64: in float32 its rounding has every
 * direction, and Newton-Schulz raises what has none by 400. At position 0 nothing of it is read. */
typedef struct attn_online_memory_state {
  attn_tensor memory, momentum, start; /* [heads, weights]; start: M' of the chunk that is open */
  attn_tensor window; /* [heads, window - 1, kept]: token i in row i % (window - 1) */
  int64_t position;
  const int64_t *position_place; /* where it stands in the device's memory instead, or NULL */
} attn_online_memory_state;

/* The first slot of sequence b in `starts`, and how many slots there are. */
#ifdef __CUDACC__
__host__ __device__
#endif
    static inline int64_t
    attn_online_memory_slot(int64_t first_row, int64_t b, int64_t chunk) {
  return first_row / chunk + b;
}
static inline int64_t attn_online_memory_slots(int64_t rows, int64_t sequences, int64_t chunk) {
  return rows / chunk + sequences;
}

/* Wide elements of scratch for one head of one sequence. */
static inline int64_t attn_online_memory_scratch(const attn_online_memory *rule, int backward) {
  int64_t weights = attn_online_memory_weights(rule), places = rule->window - 1 + rule->chunk;
  int64_t hidden = rule->kind == ATTN_MEMORY_MATRIX ? 0 : rule->width, work = 0;
  int64_t token = attn_online_memory_kept(rule) + 2 * rule->value_dim + 7 * hidden;
  for (int i = 0; i < attn_online_memory_count(rule) && rule->steps; ++i) {
    int64_t rows = attn_online_memory_rows(rule, i), columns = attn_online_memory_columns(rule, i);
    int64_t own = attn_newton_schulz_work(rows, columns, rule->steps, backward);
    own = 2 * (own + 4 * rows * columns) + 1; /* float64, wherever that begins */
    work = own > work ? own : work;
  }
  int64_t exact = (backward ? rule->chunk + 2 : 1) * (weights + 1) + 1; /* momenta are wider */
  int64_t all =
      exact + places * token + 4 * weights + work + rule->features + rule->value_dim + 7 * hidden;
  if (!backward) return all;
  int64_t gradients = rule->features + rule->value_dim + 4 * hidden + 1;
  return all + places * gradients + 2 * rule->chunk * weights + 4 * weights + rule->features +
         4 * rule->value_dim + 10 * hidden + 2;
}

#define ATTN_ONLINE_MEMORY_KERNELS(K)                                                              \
  /* Head `head` of sequence `b`; state may be NULL, else there is one sequence. scratch:          \
   * attn_online_memory_scratch elements */                                                        \
  K(void, online_memory_f32,                                                                       \
    (const attn_online_memory *rule, const attn_online_memory_tensors *x,                          \
     const attn_online_memory_state *state, int64_t b, int64_t head, float *scratch))              \
  K(void, online_memory_f64,                                                                       \
    (const attn_online_memory *rule, const attn_online_memory_tensors *x,                          \
     const attn_online_memory_state *state, int64_t b, int64_t head, double *scratch))             \
  K(void, online_memory_backward_f32,                                                              \
    (const attn_online_memory *rule, const attn_online_memory_tensors *x, int64_t b, int64_t head, \
     float *scratch))                                                                              \
  K(void, online_memory_backward_f64,                                                              \
    (const attn_online_memory *rule, const attn_online_memory_tensors *x, int64_t b, int64_t head, \
     double *scratch))

#endif
