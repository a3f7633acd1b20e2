/* Kernels of the recurrent engine: rows and small triangles around the tile products.
 *
 * Written once in portable C (src/kernels/cpu/recurrent.inc) and compiled for each path with its
 * instruction set. `elem` is the storage dtype (double, float, bfloat16 as uint16_t), `real` what
 * it is computed in (double for float64, else float). Matrices are row-major with leading
 * dimensions ld*; `width` is where a written row ends: columns from the last one up to width become
 * zero, as the tile products want. */
#ifndef ATTN_KERNELS_RECURRENT_H
#define ATTN_KERNELS_RECURRENT_H

#include <stdbool.h>
#include <stdint.h>

/* Rows of a secondary block: decays between its tokens are products of single ones. */
enum { ATTN_SUBBLOCK = 16, ATTN_SAME_ROW = -1 };

/* What a step reads and writes, for one head: `tokens` tokens of one sequence in order, columns
 * 0 .. columns-1 of the state. */
#define ATTN_RECURRENT_STEP(name, real)                                                            \
  typedef struct name {                                                                            \
    int64_t tokens, dim, columns;                                                                  \
    const real *q, *k;  /* [tokens, dim], leading dimension ld */                                  \
    const real *v;      /* [tokens, columns], leading dimension ldv */                             \
    const real *alpha;  /* [tokens, dim] or, with scalar_alpha, [tokens]; NULL: 1 */               \
    const real *beta;   /* [tokens]; NULL: additive update */                                      \
    const real *source; /* state before, leading dimension lds; NULL: zero */                      \
    real *target;       /* state after, leading dimension ldt; may be the source */                \
    real *o;            /* [tokens, columns], leading dimension ldv: S^T q */                      \
    int64_t ld, ldv, lds, ldt;                                                                     \
    bool scalar_alpha;                                                                             \
  } name;
ATTN_RECURRENT_STEP(attn_recurrent_step_args_f64, double)
ATTN_RECURRENT_STEP(attn_recurrent_step_args_f32, float)
#undef ATTN_RECURRENT_STEP

/* The gradient of the scores inside one secondary block, decays alpha per channel. */
#define ATTN_RECURRENT_DIAGONAL(name, real, elem)                                                  \
  typedef struct name {                                                                            \
    int64_t rows, dim;                                                                             \
    const elem *q, *k;   /* [rows, dim], leading dimensions ldq, ldk */                            \
    const real *alpha;   /* [rows, dim], leading dimension lda */                                  \
    const real *ds, *dn; /* d(q_i.k_j) for j <= i and d(k_i.k_j) for j < i, ldd; dn may be NULL */ \
    real *dq, *dk_read, *dk_write, *dg; /* [rows, dim], lda: added to */                           \
    int64_t ldq, ldk, lda, ldd;                                                                    \
  } name;
ATTN_RECURRENT_DIAGONAL(attn_recurrent_diagonal_args_f64, double, double)
ATTN_RECURRENT_DIAGONAL(attn_recurrent_diagonal_args_f32, float, float)
ATTN_RECURRENT_DIAGONAL(attn_recurrent_diagonal_args_bf16, float, uint16_t)
#undef ATTN_RECURRENT_DIAGONAL

#define ATTN_RECURRENT_TYPED(K, suffix, elem, real)                                                \
  /* y = scale * factor (.) x. factor NULL: 1; ldf 0: one factor a row; ldf > 0: [rows, columns];  \
   * ATTN_SAME_ROW: one row of factors for all */                                                  \
  K(void, recurrent_scale_##suffix,                                                                \
    (elem * y, int64_t ldy, const elem *x, int64_t ldx, int64_t rows, int64_t columns,             \
     int64_t width, const real *factor, int64_t ldf, real scale))                                  \
  /* y[columns][rows .. width] = (factor (.) x)^T, factor as in scale (NULL: 1) */                 \
  K(void, recurrent_transpose_##suffix,                                                            \
    (elem * y, int64_t ldy, const elem *x, int64_t ldx, int64_t rows, int64_t columns,             \
     int64_t width, const real *factor, int64_t ldf))                                              \
  /* Packs x[k, n] as the right side of a product (matmul.h); with row_factor, then x = row_factor \
   * (.) x: the state on its way through a block */                                                \
  K(void, recurrent_pack_##suffix,                                                                 \
    (elem * packed, int64_t panel_stride, real * x, int64_t ldx, int64_t k, int64_t n,             \
     const real *row_factor))                                                                      \
  /* y[i][j] = scale row_factor[i] x[i][j] decay[i][j] for j <= i - skip, else 0. decay and        \
   * row_factor may be NULL (1); ldd may be negative */                                            \
  K(void, recurrent_mask_##suffix,                                                                 \
    (elem * y, int64_t ldy, const real *x, int64_t ldx, const real *decay, int64_t ldd,            \
     const real *row_factor, real scale, int64_t rows, int64_t width, int64_t skip))               \
  /* y = row_factor (.) x, rounded; row_factor may be NULL */                                      \
  K(void, recurrent_round_##suffix,                                                                \
    (elem * y, int64_t ldy, const real *x, int64_t ldx, int64_t rows, int64_t columns,             \
     int64_t width, const real *row_factor, real scale))                                           \
  /* y = beta (v - r) */                                                                           \
  K(void, recurrent_residual_##suffix,                                                             \
    (elem * y, int64_t ldy, const elem *v, int64_t ldv, const real *r, int64_t ldr,                \
     const real *beta, int64_t rows, int64_t columns, int64_t width))                              \
  K(void, recurrent_load_##suffix,                                                                 \
    (real * y, int64_t ldy, const elem *x, int64_t ldx, int64_t rows, int64_t columns))            \
  /* y[i] += scale a_i . b_i; ldb 0 repeats one b */                                               \
  K(void, recurrent_dot_##suffix,                                                                  \
    (real * y, const elem *a, int64_t lda, const real *b, int64_t ldb, int64_t rows,               \
     int64_t columns, real scale))                                                                 \
  /* y[i][c] += scale a[i][c] b[i][c] */                                                           \
  K(void, recurrent_product_##suffix,                                                              \
    (real * y, int64_t ldy, const elem *a, int64_t lda, const real *b, int64_t ldb, int64_t rows,  \
     int64_t columns, real scale))                                                                 \
  /* Scores of one secondary block with decays per channel, [16, 16] each: s[i][j] =               \
   * sum_c q_i k_j exp(G_i - G_j) for j <= i, and n[i][j] the same of k_i for j < i; else 0.       \
   * n may be NULL */                                                                              \
  K(void, recurrent_diagonal_##suffix,                                                             \
    (real * s, real * n, int64_t lds, const elem *q, int64_t ldq, const elem *k, int64_t ldk,      \
     const real *alpha, int64_t lda, int64_t rows, int64_t dim))                                   \
  K(void, recurrent_diagonal_backward_##suffix, (const attn_recurrent_diagonal_args_##suffix *args))

#define ATTN_RECURRENT_REAL(K, suffix, real)                                                       \
  /* exp, with 0 far below; any x <= 0 including -infinity */                                      \
  K(void, recurrent_exp_##suffix, (real * y, const real *x, int64_t count))                        \
  /* x = factor (.) x, factor as in scale */                                                       \
  K(void, recurrent_decay_##suffix,                                                                \
    (real * x, int64_t ldx, int64_t rows, int64_t columns, const real *factor, int64_t ldf))       \
  /* y += factor (.) x, factor as above (NULL: 1), times scale */                                  \
  K(void, recurrent_add_##suffix,                                                                  \
    (real * y, int64_t ldy, const real *x, int64_t ldx, int64_t rows, int64_t columns,             \
     const real *factor, int64_t ldf, real scale))                                                 \
  /* d[i][j] = alpha[j+1] ... alpha[i] for j <= i: decay inside a block, one alpha a token */      \
  K(void, recurrent_decay_matrix_##suffix,                                                         \
    (real * d, int64_t ldd, const real *alpha, int64_t rows))                                      \
  /* Decays per channel, by secondary blocks: from g [rows, dim] (ldg) alpha = exp(g), prefix =    \
   * alpha from the start of the secondary block to the row inclusive, suffix = from the row       \
   * exclusive to its end (ld each), total = the whole of each secondary block [blocks, dim], ld   \
   */                                                                                              \
  K(void, recurrent_channel_decay_##suffix,                                                        \
    (real * alpha, real * prefix, real * suffix, real * total, int64_t ld, const real *g,          \
     int64_t ldg, int64_t rows, int64_t dim))                                                      \
  /* y = (I + Diag(factor) a)^-1 for the strictly lower triangular a [n, n]; zeros above the       \
   * diagonal; what a holds on and above the diagonal does not matter */                           \
  K(void, recurrent_invert_##suffix,                                                               \
    (real * y, int64_t ldy, const real *a, int64_t lda, const real *factor, int64_t n))            \
  K(void, recurrent_step_##suffix, (const attn_recurrent_step_args_##suffix *args))

#define ATTN_RECURRENT_KERNELS(K)                                                                  \
  ATTN_RECURRENT_TYPED(K, f64, double, double)                                                     \
  ATTN_RECURRENT_TYPED(K, f32, float, float)                                                       \
  ATTN_RECURRENT_TYPED(K, bf16, uint16_t, float)                                                   \
  ATTN_RECURRENT_REAL(K, f64, double)                                                              \
  ATTN_RECURRENT_REAL(K, f32, float)

#endif
