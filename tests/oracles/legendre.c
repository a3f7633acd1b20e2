#include "oracles/legendre.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

void oracle_legendre_continuous(int64_t n, double theta, long double *a, long double *b) {
  for (int64_t i = 0; i < n; ++i) {
    long double row = (2 * (long double)i + 1) / (long double)theta;
    for (int64_t j = 0; j < n; ++j) a[i * n + j] = row * (i < j ? -1 : ((i - j + 1) % 2 ? -1 : 1));
    b[i] = row * (i % 2 ? -1 : 1);
  }
}

static void product(int64_t n, const long double *x, const long double *y, long double *z) {
  for (int64_t i = 0; i < n * n; ++i) z[i] = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < n; ++k)
      for (int64_t j = 0; j < n; ++j) z[i * n + j] += x[i * n + k] * y[k * n + j];
}

/* exp(a) = (sum over k of (a / 2^s)^k / k!)^(2^s) */
static long double *exponential(int64_t n, const long double *a) {
  size_t bytes = (size_t)(n * n) * sizeof(long double);
  long double *sum = calloc(1, bytes), *term = calloc(1, bytes), *next = malloc(bytes);
  long double *scaled = malloc(bytes), greatest = 0;
  for (int64_t i = 0; i < n; ++i) {
    long double row = 0;
    for (int64_t j = 0; j < n; ++j) row += fabsl(a[i * n + j]);
    if (row > greatest) greatest = row;
  }
  int squarings = 0;
  for (; greatest > 0.25L; greatest /= 2) ++squarings;
  for (int64_t i = 0; i < n * n; ++i) scaled[i] = ldexpl(a[i], -squarings);
  for (int64_t i = 0; i < n; ++i) sum[i * n + i] = term[i * n + i] = 1;
  for (int k = 1; k <= 20; ++k) {
    product(n, term, scaled, next);
    for (int64_t i = 0; i < n * n; ++i) {
      term[i] = next[i] / k;
      sum[i] += term[i];
    }
  }
  for (int k = 0; k < squarings; ++k) {
    product(n, sum, sum, next);
    memcpy(sum, next, bytes);
  }
  free(term), free(next), free(scaled);
  return sum;
}

/* a x = b by elimination with pivots; a and b are overwritten, b becomes x. */
static void solve(int64_t n, long double *a, long double *b) {
  for (int64_t k = 0; k < n; ++k) {
    int64_t pivot = k;
    for (int64_t i = k; i < n; ++i)
      if (fabsl(a[i * n + k]) > fabsl(a[pivot * n + k])) pivot = i;
    for (int64_t j = 0; j < n; ++j) {
      long double swap = a[k * n + j];
      a[k * n + j] = a[pivot * n + j];
      a[pivot * n + j] = swap;
    }
    long double swap = b[k];
    b[k] = b[pivot];
    b[pivot] = swap;
    for (int64_t i = k + 1; i < n; ++i) {
      long double factor = a[i * n + k] / a[k * n + k];
      for (int64_t j = k; j < n; ++j) a[i * n + j] -= factor * a[k * n + j];
      b[i] -= factor * b[k];
    }
  }
  for (int64_t i = n - 1; i >= 0; --i) {
    for (int64_t j = i + 1; j < n; ++j) b[i] -= a[i * n + j] * b[j];
    b[i] /= a[i * n + i];
  }
}

enum { KEPT = 4 };
static struct kept {
  int64_t n;
  double theta, *abar, *bbar;
} kept[KEPT];

void oracle_legendre(int64_t n, double theta, const double **abar, const double **bbar) {
  static int next = 0;
  struct kept *k = NULL;
  for (int i = 0; i < KEPT; ++i)
    if (kept[i].abar && kept[i].n == n && kept[i].theta == theta) k = &kept[i];
  if (!k) {
    k = &kept[next++ % KEPT];
    free(k->abar), free(k->bbar);
    *k = (struct kept){n, theta, malloc((size_t)(n * n) * sizeof(double)),
                       malloc((size_t)n * sizeof(double))};
    long double *a = malloc((size_t)(n * n) * sizeof *a), *b = malloc((size_t)n * sizeof *b);
    long double *right = calloc((size_t)n, sizeof *right);
    oracle_legendre_continuous(n, theta, a, b);
    long double *e = exponential(n, a);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) {
        k->abar[i * n + j] = (double)e[i * n + j];
        right[i] += (e[i * n + j] - (i == j)) * b[j];
      }
    solve(n, a, right);
    for (int64_t i = 0; i < n; ++i) k->bbar[i] = (double)right[i];
    free(a), free(b), free(right), free(e);
  }
  *abar = k->abar;
  *bbar = k->bbar;
}

void oracle_legendre_memory(int64_t n, double theta, int64_t rows, const double *u, int64_t stride,
                            double *m, int64_t pitch) {
  const double *abar, *bbar;
  oracle_legendre(n, theta, &abar, &bbar);
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t i = 0; i < n; ++i) {
      double sum = bbar[i] * u[t * stride];
      for (int64_t j = 0; t > 0 && j < n; ++j) sum += abar[i * n + j] * m[(t - 1) * pitch + j];
      m[t * pitch + i] = sum;
    }
}
