/* Zero-order hold by scaling and squaring, in float64.
 *
 * The exponential is taken in the coordinates m_i / sqrt(2i + 1), where A + A^T is negative
 * semi-definite: there every exp(s A) is a contraction, and squaring loses no digits however large
 * A is. Going back multiplies elements by sqrt((2i + 1) / (2j + 1)). */
#include "engines/legendre/legendre.h"
#include "base/memory.h"
#include "base/status.h"
#include "tensor/device.h"

#include <math.h>
#include <string.h>

/* The Taylor series of exp of a matrix whose 1-norm is at most 1/2: the rest is below 2^-60. */
enum { TERMS = 14 };
static const double largest_norm = 0.5;

/* z = x y, [n, n] each. */
static void multiply(int64_t n, double *restrict z, const double *restrict x,
                     const double *restrict y) {
  memset(z, 0, (size_t)(n * n) * sizeof *z);
#pragma omp parallel for num_threads(attn_get_threads()) schedule(static) if (n > 64)
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < n; ++k) {
      double factor = x[i * n + k];
      for (int64_t j = 0; j < n; ++j) z[i * n + j] += factor * y[k * n + j];
    }
}

/* x := x * factor + I */
static void scale_add_identity(int64_t n, double *x, double factor) {
  for (int64_t i = 0; i < n * n; ++i) x[i] *= factor;
  for (int64_t i = 0; i < n; ++i) x[i * n + i] += 1;
}

/* [[A, B], [0, 0]] in the coordinates above, [n, n]. */
static void augmented(int64_t n, double theta, double *x) {
  memset(x, 0, (size_t)(n * n) * sizeof *x);
  for (int64_t i = 0; i + 1 < n; ++i) {
    double row = sqrt(2.0 * (double)i + 1);
    for (int64_t j = 0; j + 1 < n; ++j) {
      double sign = i < j || (i - j) % 2 == 0 ? -1 : 1;
      x[i * n + j] = sign * row * sqrt(2.0 * (double)j + 1) / theta;
    }
    x[i * n + n - 1] = (i % 2 ? -row : row) / theta;
  }
}

static double norm(int64_t n, const double *x) {
  double greatest = 0;
  for (int64_t j = 0; j < n; ++j) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += fabs(x[i * n + j]);
    if (sum > greatest) greatest = sum;
  }
  return greatest;
}

/* *x := exp(*x); the two may change places. */
static void exponential(int64_t n, double **x, double **work, double *scaled) {
  int squarings = 0;
  double size = norm(n, *x);
  for (; size > largest_norm; size /= 2) ++squarings;
  for (int64_t i = 0; i < n * n; ++i) scaled[i] = ldexp((*x)[i], -squarings);
  memset(*x, 0, (size_t)(n * n) * sizeof **x);
  for (int64_t i = 0; i < n; ++i) (*x)[i * n + i] = 1;
  for (int k = TERMS + squarings; k > 0; --k) {
    bool term = k > squarings; /* I + scaled / k (I + scaled / (k + 1) (...)) */
    multiply(n, *work, term ? scaled : *x, *x);
    if (term) scale_add_identity(n, *work, 1.0 / (k - squarings));
    double *swap = *x;
    *x = *work;
    *work = swap;
  }
}

attn_status attn_legendre_matrices(int64_t size, double theta, double *abar, double *bbar) {
  if (size < 1 || size > ATTN_LEGENDRE_MOST || !(theta > 0) || !isfinite(theta))
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "legendre memory: %lld coefficients of theta %g, expected 1 to %d, above 0",
                     (long long)size, theta, (int)ATTN_LEGENDRE_MOST);
  int64_t n = size + 1;
  double *buffer = attn_alloc_array((size_t)(3 * n * n), sizeof *buffer);
  if (!buffer) return ATTN_OUT_OF_MEMORY;
  double *x = buffer, *work = buffer + n * n;
  augmented(n, theta, x);
  exponential(n, &x, &work, buffer + 2 * n * n);
  for (int64_t i = 0; i < size; ++i) {
    double row = sqrt(2.0 * (double)i + 1);
    for (int64_t j = 0; j < size; ++j)
      abar[i * size + j] = x[i * n + j] * row / sqrt(2.0 * (double)j + 1);
    bbar[i] = x[i * n + size] * row;
  }
  attn_free(buffer);
  return ATTN_OK;
}

/* A tensor of these values on a device. */
static attn_status place(attn_device device, attn_dtype dtype, int rank, const int64_t *shape,
                         double *values, attn_tensor *tensor) {
  attn_tensor from;
  ATTN_TRY(attn_tensor_wrap(values, ATTN_F64, rank, shape, &from));
  ATTN_TRY(attn_tensor_create_on(device, dtype, rank, shape, tensor));
  return attn_tensor_copy(&from, tensor);
}

/* work: [size, 3 size + 1 + C]. */
static attn_status fill(attn_legendre *l, attn_device device, attn_dtype dtype, double theta,
                        double *work) {
  enum { CHUNK = ATTN_LEGENDRE_CHUNK };
  int64_t n = l->size;
  double *abar = work, *bbar = abar + n * n, *power = bbar + n, *next = power + n * n;
  double *sums = next + n * n;
  ATTN_TRY(attn_legendre_matrices(n, theta, abar, bbar));
  memcpy(power, abar, (size_t)(n * n) * sizeof *power);
  for (int k = 1; k < CHUNK; k *= 2) {
    multiply(n, next, power, power);
    double *swap = power;
    power = next;
    next = swap;
  }
  for (int64_t i = 0; i < n; ++i) sums[i * CHUNK + CHUNK - 1] = bbar[i];
  for (int j = CHUNK - 2; j >= 0; --j)
    for (int64_t i = 0; i < n; ++i) {
      double sum = 0;
      for (int64_t k = 0; k < n; ++k) sum += abar[i * n + k] * sums[k * CHUNK + j + 1];
      sums[i * CHUNK + j] = sum;
    }
  const int64_t square[2] = {n, n}, wide[2] = {n, CHUNK};
  ATTN_TRY(place(device, dtype, 2, square, abar, &l->step));
  ATTN_TRY(place(device, dtype, 2, square, power, &l->jump));
  ATTN_TRY(place(device, dtype, 2, wide, sums, &l->sums));
  ATTN_TRY(place(device, dtype, 1, &n, bbar, &l->input));
  ATTN_TRY(attn_weight_create(n, n, dtype, &l->step_weight));
  return attn_weight_set(l->step_weight, &l->step);
}

_Static_assert((ATTN_LEGENDRE_CHUNK & (ATTN_LEGENDRE_CHUNK - 1)) == 0,
               "the power of a chunk comes by squaring");

attn_status attn_legendre_create(attn_device device, attn_dtype dtype, int64_t size, double theta,
                                 attn_legendre **legendre) {
  *legendre = NULL;
  if (size < 1 || size > ATTN_LEGENDRE_MOST) return attn_legendre_matrices(size, theta, NULL, NULL);
  attn_legendre *l = attn_alloc_zero(sizeof *l);
  double *work =
      attn_alloc_array((size_t)(size * (3 * size + 1 + ATTN_LEGENDRE_CHUNK)), sizeof *work);
  attn_status status = l && work ? ATTN_OK : ATTN_OUT_OF_MEMORY;
  if (l) l->size = size;
  if (status == ATTN_OK) status = fill(l, device, dtype, theta, work);
  attn_free(work);
  if (status == ATTN_OK)
    *legendre = l;
  else
    attn_legendre_destroy(l);
  return status;
}

void attn_legendre_destroy(attn_legendre *l) {
  if (!l) return;
  attn_weight_destroy(l->step_weight);
  attn_tensor_destroy(&l->step);
  attn_tensor_destroy(&l->jump);
  attn_tensor_destroy(&l->sums);
  attn_tensor_destroy(&l->input);
  attn_free(l);
}
