/* Forward, at each token t with a = exp(g_t):
 *   S~ = Diag(a) S,   u = v  or  u = beta (v - S~^T k),   S = S~ + k u^T,   z = a z + k
 *   o = scale S^T q,  with the normaliser divided by (scale z.q + epsilon)
 * Backward, with dS and dz carried from the last token to the first, e = v - S~^T k:
 *   num = scale S^T q, den = scale z.q + epsilon:  dnum = do / den,  dden = -(do.num) / den^2
 *   dq = scale (S dnum + dden z),  dS += scale q dnum^T,  dz += scale dden q
 *   du = dS^T k,  dk = dS u + dz,  delta: dbeta = du.e, dv = beta du, dS~ = dS - k (beta du)^T,
 *   dk -= S~ (beta du);  dg = a (.) (rowsum(dS~ (.) S_-) + dz (.) z_-),  dS = a dS~,  dz = a dz
 * (The reverse recurrence is stated in arXiv 2510.26692's setting; the normaliser is added here.)
 */
#include "oracles/recurrent.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static double log_decay(const oracle_recurrent *x, int64_t t, int64_t c) {
  switch (x->decay) {
  case ORACLE_DECAY_HEAD: return x->g[0];
  case ORACLE_DECAY_TOKEN: return x->g[t];
  case ORACLE_DECAY_CHANNEL: return x->g[t * x->dim + c];
  default: return 0;
  }
}

static void start(double *to, const double *from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from ? from[i] : 0;
}

/* From the state before token t to the one after; u [value_dim] and e [value_dim] come out. */
static void step(const oracle_recurrent *x, int64_t t, const double *before, double *after,
                 const double *z_before, double *z_after, double *u, double *e) {
  int64_t dim = x->dim, columns = x->value_dim;
  const double *k = x->k + t * dim, *v = x->v + t * columns;
  for (int64_t c = 0; c < dim; ++c)
    for (int64_t j = 0; j < columns; ++j)
      after[c * columns + j] = exp(log_decay(x, t, c)) * before[c * columns + j];
  for (int64_t j = 0; j < columns; ++j) {
    double guess = 0;
    for (int64_t c = 0; c < dim; ++c) guess += after[c * columns + j] * k[c];
    e[j] = v[j] - guess;
    u[j] = x->delta ? x->beta[t] * e[j] : v[j];
  }
  for (int64_t c = 0; c < dim; ++c) {
    for (int64_t j = 0; j < columns; ++j) after[c * columns + j] += k[c] * u[j];
    z_after[c] = exp(log_decay(x, t, c)) * z_before[c] + k[c];
  }
}

typedef struct history {
  double *s, *z, *u, *e; /* states 0 .. tokens, and u, e of each token */
} history;

static history run(const oracle_recurrent *x) {
  int64_t size = x->dim * x->value_dim, n = x->tokens;
  history h = {malloc((size_t)((n + 1) * size) * sizeof(double)),
               malloc((size_t)((n + 1) * x->dim) * sizeof(double)),
               malloc((size_t)((n + 1) * x->value_dim) * sizeof(double)),
               malloc((size_t)((n + 1) * x->value_dim) * sizeof(double))};
  if (!h.s || !h.z || !h.u || !h.e) abort();
  start(h.s, x->s0, size);
  start(h.z, x->z0, x->dim);
  for (int64_t t = 0; t < n; ++t)
    step(x, t, h.s + t * size, h.s + (t + 1) * size, h.z + t * x->dim, h.z + (t + 1) * x->dim,
         h.u + t * x->value_dim, h.e + t * x->value_dim);
  return h;
}

static void release(history h) {
  free(h.s);
  free(h.z);
  free(h.u);
  free(h.e);
}

static double denominator(const oracle_recurrent *x, int64_t t, const double *z) {
  double sum = 0;
  if (!x->normalise) return 1;
  for (int64_t c = 0; c < x->dim; ++c) sum += z[c] * x->q[t * x->dim + c];
  return x->scale * sum + x->epsilon;
}

static double numerator(const oracle_recurrent *x, int64_t t, const double *s, int64_t j) {
  double sum = 0;
  for (int64_t c = 0; c < x->dim; ++c) sum += s[c * x->value_dim + j] * x->q[t * x->dim + c];
  return x->scale * sum;
}

void oracle_recurrent_forward(const oracle_recurrent *x) {
  int64_t size = x->dim * x->value_dim;
  history h = run(x);
  for (int64_t t = 0; t < x->tokens; ++t)
    for (int64_t j = 0; j < x->value_dim; ++j)
      x->o[t * x->value_dim + j] =
          numerator(x, t, h.s + (t + 1) * size, j) / denominator(x, t, h.z + (t + 1) * x->dim);
  if (x->s1) memcpy(x->s1, h.s + x->tokens * size, (size_t)size * sizeof(double));
  if (x->z1) memcpy(x->z1, h.z + x->tokens * x->dim, (size_t)x->dim * sizeof(double));
  release(h);
}

void oracle_recurrent_backward(const oracle_recurrent *x) {
  int64_t dim = x->dim, columns = x->value_dim, size = dim * columns;
  history h = run(x);
  double *ds = malloc((size_t)size * sizeof(double)), *dz = malloc((size_t)dim * sizeof(double));
  double *dnum = malloc((size_t)columns * sizeof(double));
  double *du = malloc((size_t)columns * sizeof(double));
  if (!ds || !dz || !dnum || !du) abort();
  start(ds, x->d_s1, size);
  start(dz, x->d_z1, dim);
  if (x->decay == ORACLE_DECAY_HEAD) x->dg[0] = 0;
  for (int64_t t = x->tokens - 1; t >= 0; --t) {
    const double *before = h.s + t * size, *after = before + size;
    const double *z_before = h.z + t * dim, *z_after = z_before + dim;
    const double *u = h.u + t * columns, *e = h.e + t * columns;
    const double *q = x->q + t * dim, *k = x->k + t * dim;
    double *dq = x->dq + t * dim, *dk = x->dk + t * dim, *dv = x->dv + t * columns;
    double den = denominator(x, t, z_after), dden = 0;
    for (int64_t j = 0; j < columns; ++j) {
      double d_o = x->d_o[t * columns + j];
      dnum[j] = d_o / den;
      if (x->normalise) dden -= d_o * numerator(x, t, after, j) / (den * den);
    }
    for (int64_t c = 0; c < dim; ++c) {
      dq[c] = x->scale * dden * z_after[c];
      dz[c] += x->scale * dden * q[c];
      for (int64_t j = 0; j < columns; ++j) {
        dq[c] += x->scale * after[c * columns + j] * dnum[j];
        ds[c * columns + j] += x->scale * q[c] * dnum[j];
      }
    }
    for (int64_t j = 0; j < columns; ++j) {
      du[j] = 0;
      for (int64_t c = 0; c < dim; ++c) du[j] += ds[c * columns + j] * k[c];
    }
    for (int64_t c = 0; c < dim; ++c) {
      dk[c] = x->normalise ? dz[c] : 0;
      for (int64_t j = 0; j < columns; ++j) dk[c] += ds[c * columns + j] * u[j];
    }
    if (x->delta) {
      x->dbeta[t] = 0;
      for (int64_t j = 0; j < columns; ++j) {
        x->dbeta[t] += du[j] * e[j];
        dv[j] = x->beta[t] * du[j];
      }
      for (int64_t c = 0; c < dim; ++c)
        for (int64_t j = 0; j < columns; ++j) {
          double decayed = exp(log_decay(x, t, c)) * before[c * columns + j];
          ds[c * columns + j] -= k[c] * dv[j];
          dk[c] -= decayed * dv[j];
        }
    } else {
      for (int64_t j = 0; j < columns; ++j) dv[j] = du[j];
    }
    double sum = 0;
    for (int64_t c = 0; c < dim; ++c) {
      double a = exp(log_decay(x, t, c)), own = x->normalise ? dz[c] * z_before[c] : 0;
      for (int64_t j = 0; j < columns; ++j) {
        own += ds[c * columns + j] * before[c * columns + j];
        ds[c * columns + j] *= a;
      }
      dz[c] *= a;
      sum += a * own;
      if (x->decay == ORACLE_DECAY_CHANNEL) x->dg[t * dim + c] = a * own;
    }
    if (x->decay == ORACLE_DECAY_TOKEN) x->dg[t] = sum;
    if (x->decay == ORACLE_DECAY_HEAD) x->dg[0] += sum;
  }
  memcpy(x->ds0, ds, (size_t)size * sizeof(double));
  if (x->normalise) memcpy(x->dz0, dz, (size_t)dim * sizeof(double));
  free(ds);
  free(dz);
  free(dnum);
  free(du);
  release(h);
}
