/* The efficiency length of CAB (arXiv 2210.07661, section 4.4): from which length on a mechanism is
 * cheaper than exact attention. With L the greater root of a L^2 + (b - d) L + (c - e) = 0:
 *
 *   L* = (-(b - d) + sqrt((b - d)^2 - 4 a (c - e))) / (2 a) */
#include "base/status.h"
#include "tasks/cab.h"

#include <math.h>

enum { TERMS = 3 };

/* Least squares: y as the sum over i < terms of coefficient[i] x^i, by orthogonalising the powers,
 * which loses fewer digits than the normal equations do. x is at most 1. */
static void fit(const double *x, const double *y, int count, int terms, double *coefficient) {
  double basis[TERMS][TERMS] = {{0}}; /* polynomial i as coefficients of powers */
  for (int i = 0; i < terms; ++i) coefficient[i] = 0;
  for (int i = 0; i < terms; ++i) {
    double square = 0, along_y = 0;
    basis[i][i] = 1;
    for (int j = 0; j < i; ++j) { /* minus its part along polynomial j */
      double dot = 0, norm = 0;
      for (int n = 0; n < count; ++n) {
        double pi = 0, pj = 0;
        for (int k = TERMS - 1; k >= 0; --k) {
          pi = pi * x[n] + basis[i][k];
          pj = pj * x[n] + basis[j][k];
        }
        dot += pi * pj;
        norm += pj * pj;
      }
      for (int k = 0; k < TERMS; ++k) basis[i][k] -= dot / norm * basis[j][k];
    }
    for (int n = 0; n < count; ++n) {
      double p = 0;
      for (int k = TERMS - 1; k >= 0; --k) p = p * x[n] + basis[i][k];
      square += p * p;
      along_y += p * y[n];
    }
    for (int k = 0; k < terms; ++k) coefficient[k] += along_y / square * basis[i][k];
  }
}

/* A curvature that makes less of the cost at the longest length is none: what is fitted there is
 * rounding, or a few bytes of a plan. */
static const double least_curvature = 1e-3;

/* The last crossing of two fitted curves, whose lengths are in parts of the longest. */
static double crossing(const double exact[3], const double other[2]) {
  double a = exact[2], b = exact[1] - other[1], c = exact[0] - other[0];
  if (!(a > least_curvature * fabs(exact[0] + exact[1] + exact[2]))) return NAN;
  double inside = b * b - 4 * a * c;
  if (inside < 0) return 0;
  double root = (-b + sqrt(inside)) / (2 * a);
  return root > 0 ? root : 0;
}

attn_status attn_efficiency_length(const double *lengths, const double *exact, const double *other,
                                   int count, attn_efficiency *result) {
  enum { MOST = 64 };
  double x[MOST], curve[TERMS], line[2];
  if (count < TERMS || count > MOST)
    return attn_fail(ATTN_INVALID_ARGUMENT, "efficiency length: %d lengths, expected %d to %d",
                     count, TERMS, MOST);
  double longest = lengths[count - 1];
  for (int i = 0; i < count; ++i) {
    if (!(lengths[i] > (i ? lengths[i - 1] : 0)) || !isfinite(exact[i]) || !isfinite(other[i]))
      return attn_fail(ATTN_INVALID_ARGUMENT,
                       "efficiency length: place %d: lengths must ascend and costs be finite", i);
    x[i] = lengths[i] / longest;
  }
  fit(x, exact, count, TERMS, curve);
  fit(x, other, count, 2, line);
  *result = (attn_efficiency){.a = curve[2] / longest / longest,
                              .b = curve[1] / longest,
                              .c = curve[0],
                              .d = line[1] / longest,
                              .e = line[0],
                              .length = crossing(curve, line) * longest};
  return ATTN_OK;
}

double attn_middle_mean(const double *sorted, int count) {
  int skipped = count / 4;
  double sum = 0;
  for (int i = skipped; i < count - skipped; ++i) sum += sorted[i];
  return sum / (count - 2 * skipped);
}
