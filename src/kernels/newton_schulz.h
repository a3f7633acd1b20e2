/* Newton-Schulz iteration as Muon has it: a polynomial that brings every singular value of a matrix
 * near 1 without computing any. With X_0 = S / (||S||_F + 1e-7),
 *
 *   B = X X^T,  X := a X + (b B + c B B) X
 *
 * a few times. Five steps end with singular values of about 0.68 to 1.13, because the coefficients
 * are chosen for speed from near 0, not for a limit of 1. newton_schulz.inc has the code. */
#ifndef ATTN_KERNELS_NEWTON_SCHULZ_H
#define ATTN_KERNELS_NEWTON_SCHULZ_H

#include <stdint.h>

#define ATTN_NEWTON_SCHULZ_A       3.4445
#define ATTN_NEWTON_SCHULZ_B       -4.7750
#define ATTN_NEWTON_SCHULZ_C       2.0315
#define ATTN_NEWTON_SCHULZ_EPSILON 1e-7
enum { ATTN_NEWTON_SCHULZ_STEPS = 5, ATTN_NEWTON_SCHULZ_MOST_STEPS = 16 };

/* Elements of work for a matrix [rows, columns], forward alone or with backward. */
static inline int64_t attn_newton_schulz_work(int64_t rows, int64_t columns, int steps,
                                              int backward) {
  int64_t least = rows < columns ? rows : columns;
  if (!backward) return 2 * rows * columns + 2 * least * least;
  return (steps + 3) * rows * columns + 4 * least * least;
}

/* In float64 only: what is far below the largest singular value is raised by 3.4 in each step, and
 * so is the rounding of what is large. */
#define ATTN_NEWTON_SCHULZ_KERNELS(K)                                                              \
  /* y = the result of `steps` steps on s [rows, columns]; work: attn_newton_schulz_work */        \
  K(void, newton_schulz_f64,                                                                       \
    (double *y, const double *s, int64_t rows, int64_t columns, int steps, double *work))          \
  /* The same, and ds += the gradient of s from dy */                                              \
  K(void, newton_schulz_backward_f64,                                                              \
    (double *y, double *ds, const double *s, const double *dy, int64_t rows, int64_t columns,      \
     int steps, double *work))

#endif
