/* The linear system of a Legendre memory, discretised, in the forms that products take.
 *
 *   A[i][j] = (2i + 1) / theta (i < j ? -1 : (-1)^(i - j + 1)),  B[i] = (2i + 1) (-1)^i / theta
 *   m_t = Abar m_{t-1} + Bbar u_t,  Abar = exp(A),  Bbar = A^-1 (Abar - I) B
 *
 * m holds the last theta inputs as coefficients of shifted Legendre polynomials (arXiv 2402.04882,
 * section 3). Only theta and the number of coefficients decide the matrices, so that they belong to
 * no layer: graphs keep them in their plan cache. */
#ifndef ATTN_ENGINES_LEGENDRE_H
#define ATTN_ENGINES_LEGENDRE_H

#include "attn/tensor.h"
#include "engines/dense/dense.h"

enum {
  ATTN_LEGENDRE_CHUNK = 32, /* tokens that a long sequence is cut into */
  ATTN_LEGENDRE_MOST = 1024 /* coefficients */
};

/* Abar [size, size] and Bbar [size], row-major, in float64: the top blocks of exp([[A, B], [0,
 * 0]]). ATTN_INVALID_ARGUMENT unless size is 1 to ATTN_LEGENDRE_MOST and theta finite and above 0.
 */
attn_status attn_legendre_matrices(int64_t size, double theta, double *abar, double *bbar);

/* The system on a device, in float32 or float64: matrices W that rows x are multiplied by, as x W^T
 * and back as x W. */
typedef struct attn_legendre {
  int64_t size;
  attn_tensor step;  /* Abar [size, size] */
  attn_tensor jump;  /* Abar^C, over a chunk of C tokens */
  attn_tensor sums;  /* [size, C]: what the inputs of a chunk come to at its last token; column
                      * j is Abar^(C - 1 - j) Bbar */
  attn_tensor input; /* Bbar [size] */
  attn_weight *step_weight; /* Abar for single tokens */
} attn_legendre;

/* Errors as of attn_legendre_matrices, and what memory and devices give. */
attn_status attn_legendre_create(attn_device device, attn_dtype dtype, int64_t size, double theta,
                                 attn_legendre **legendre);
void attn_legendre_destroy(attn_legendre *legendre); /* NULL is fine */

#endif
