/* A Legendre memory in float64, written from its equations (arXiv 2402.04882, section 3); nothing
 * here is shared with the library. */
#ifndef ATTN_ORACLES_LEGENDRE_H
#define ATTN_ORACLES_LEGENDRE_H

#include <stdint.h>

/* A [n, n] and B [n] of the continuous system. */
void oracle_legendre_continuous(int64_t n, double theta, long double *a, long double *b);
/* Abar = exp(A) by its series in long double, and Bbar = A^-1 (Abar - I) B by elimination. Kept:
 * valid until the call after the next three. */
void oracle_legendre(int64_t n, double theta, const double **abar, const double **bbar);
/* m [rows, n] of u [rows], token by token; u's elements are `stride` apart, m's rows `pitch`. */
void oracle_legendre_memory(int64_t n, double theta, int64_t rows, const double *u, int64_t stride,
                            double *m, int64_t pitch);

#endif
