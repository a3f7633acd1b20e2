/* Titans (arXiv 2501.00663), OmegaNet and ATLAS (2505.23735), token by token: for token t in a
 * chunk at whose start the weights were M',
 *
 *   l_i(M) = ||M(phi(k_i)) - v_i||^2,  G_t = sum_{t - c < i <= t} gamma_i grad l_i(M')
 *   S_t = theta_t S_{t-1} + G_t,  M_t = alpha_t M_{t-1} - eta_t NS(S_t),  o_t = M_t(phi(q_t))
 *
 *   M(z) = W1 z, or E z + W1 gelu(W2 z), or E z + W1 (gelu(W2 z) (.) W3 z), E z the channels
 *   themselves among the features (not the constant), as far as there are as many of both
 *   NS: X = S / (||S||_F + 1e-7), then X := 3.4445 X + (-4.7750 B + 2.0315 B^2) X, B = X X^T
 *   phi(x): of every multiset of at most p channels the product, times the square root of the
 *   number of its orders, times s_j
 *
 * with alpha, theta, eta = sigmoid(x W^T + b), gamma = sigmoid(x W^T + b) / c. The gradient of a
 * matrix is written out as a matrix here. */
#include "oracles/mixers.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { Q, K, V, GAMMA, NORM, OUT, Q_CONV, K_CONV, V_CONV, GAMMA_BIAS, ALPHA, ALPHA_BIAS, THETA };
enum { THETA_BIAS = THETA + 1, GATE, WEIGHTS };

/* Features ---------------------------------------------------------------------------------------
 */

static double factorial(int64_t n) {
  return n > 1 ? (double)n * factorial(n - 1) : 1;
}

/* Appends the products of `left` more channels, `from` or later, to those of `taken` so far. */
static void append_products(double **y, const double *x, int64_t n, int64_t from, int64_t left,
                            int64_t taken, double product, int64_t repeats, double orders,
                            double scale) {
  if (left == 0) {
    *(*y)++ = scale * product * sqrt(factorial(taken) / (orders * factorial(repeats)));
    return;
  }
  for (int64_t i = from; i < n; ++i) { /* `repeats` times channel `from` were taken last */
    int same = i == from;
    append_products(y, x, n, i, left - 1, taken + 1, product * x[i], same ? repeats + 1 : 1,
                    same ? orders : orders * factorial(repeats), scale);
  }
}

/* [vectors, n] -> [vectors, features] */
static double *features(const double *x, int64_t vectors, int64_t n, int64_t degree,
                        const double *scales, int64_t *count) {
  double *all = malloc((size_t)(vectors * 4096 + 1) * sizeof *all), *y = all;
  for (int64_t r = 0; r < vectors; ++r)
    for (int64_t j = 0; j <= degree; ++j)
      append_products(&y, x + r * n, n, 0, j, 0, 1, 0, 1, scales[j]);
  *count = vectors ? (y - all) / vectors : 0;
  return all;
}

/* Newton-Schulz -----------------------------------------------------------------------------------
 */

static void orthogonalise(double *out, const double *s, int64_t rows, int64_t columns,
                          int64_t steps) {
  int64_t r = rows < columns ? rows : columns, c = rows < columns ? columns : rows;
  double norm = 0, *x = malloc((size_t)(r * c) * sizeof *x),
         *y = malloc((size_t)(r * c) * sizeof *y);
  double *b = malloc((size_t)(r * r) * sizeof *b), *a = malloc((size_t)(r * r) * sizeof *a);
  for (int64_t i = 0; i < rows * columns; ++i) norm += s[i] * s[i];
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < c; ++j)
      x[i * c + j] =
          (rows > columns ? s[j * columns + i] : s[i * columns + j]) / (sqrt(norm) + 1e-7);
  for (int64_t step = 0; step < steps; ++step) {
    for (int64_t i = 0; i < r; ++i)
      for (int64_t j = 0; j < r; ++j) {
        b[i * r + j] = 0;
        for (int64_t k = 0; k < c; ++k) b[i * r + j] += x[i * c + k] * x[j * c + k];
      }
    for (int64_t i = 0; i < r; ++i)
      for (int64_t j = 0; j < r; ++j) {
        double square = 0;
        for (int64_t k = 0; k < r; ++k) square += b[i * r + k] * b[k * r + j];
        a[i * r + j] = -4.7750 * b[i * r + j] + 2.0315 * square;
      }
    for (int64_t i = 0; i < r; ++i)
      for (int64_t j = 0; j < c; ++j) y[i * c + j] = 3.4445 * x[i * c + j];
    for (int64_t i = 0; i < r; ++i)
      for (int64_t k = 0; k < r; ++k)
        for (int64_t j = 0; j < c; ++j) y[i * c + j] += a[i * r + k] * x[k * c + j];
    memcpy(x, y, (size_t)(r * c) * sizeof *x);
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      out[i * columns + j] = rows > columns ? x[j * c + i] : x[i * c + j];
  free(x), free(y), free(a), free(b);
}

/* The memory --------------------------------------------------------------------------------------
 */

/* Of one head: matrices [rows, columns] one behind the other. */
typedef struct memory {
  int matrices;
  int64_t rows[3], columns[3], count;
  int64_t channels, first; /* E z: so many, from feature `first` on */
} memory;

static double normal(double x) {
  return erfc(-x / sqrt(2)) / 2;
}

static double *hidden(const memory *m, const double *w, const double *z, double *slopes2,
                      double *slopes3) {
  const double *w2 = w + m->rows[0] * m->columns[0], *w3 = w2 + m->rows[1] * m->columns[1];
  double *a = malloc((size_t)m->columns[0] * sizeof *a);
  for (int64_t i = 0; i < m->columns[0]; ++i) {
    double pre = 0, by = m->matrices == 2;
    if (m->matrices == 1) {
      a[i] = z[i];
      continue;
    }
    for (int64_t j = 0; j < m->columns[1]; ++j) pre += w2[i * m->columns[1] + j] * z[j];
    for (int64_t j = 0; j < m->columns[1] && m->matrices == 3; ++j)
      by += w3[i * m->columns[1] + j] * z[j];
    a[i] = pre * normal(pre) * by;
    slopes2[i] = by * (normal(pre) + pre * exp(-pre * pre / 2) / sqrt(2 * acos(-1)));
    slopes3[i] = pre * normal(pre);
  }
  return a;
}

static void read_memory(const memory *m, const double *w, const double *z, const double *a,
                        double *y) {
  for (int64_t r = 0; r < m->rows[0]; ++r) {
    y[r] = r < m->channels ? z[m->first + r] : 0;
    for (int64_t i = 0; i < m->columns[0]; ++i) y[r] += w[r * m->columns[0] + i] * a[i];
  }
}

/* sum += gamma times the gradient of ||M(z) - v||^2 at w. */
static void add_gradient(const memory *m, const double *w, double gamma, const double *z,
                         const double *v, double *sum) {
  int64_t width = m->columns[0], n = m->columns[1], values = m->rows[0];
  double *slopes2 = calloc((size_t)width, sizeof *slopes2);
  double *slopes3 = calloc((size_t)width, sizeof *slopes3);
  double *a = hidden(m, w, z, slopes2, slopes3), *y = malloc((size_t)values * sizeof *y);
  double *sum2 = sum + values * width, *sum3 = sum2 + width * n;
  read_memory(m, w, z, a, y);
  for (int64_t r = 0; r < values; ++r)
    for (int64_t i = 0; i < width; ++i) sum[r * width + i] += gamma * 2 * (y[r] - v[r]) * a[i];
  for (int64_t i = 0; i < width && m->matrices > 1; ++i) {
    double back = 0;
    for (int64_t r = 0; r < values; ++r) back += 2 * (y[r] - v[r]) * w[r * width + i];
    for (int64_t j = 0; j < n; ++j) sum2[i * n + j] += gamma * back * slopes2[i] * z[j];
    for (int64_t j = 0; j < n && m->matrices > 2; ++j)
      sum3[i * n + j] += gamma * back * slopes3[i] * z[j];
  }
  free(slopes2), free(slopes3), free(a), free(y);
}

static memory memory_of(const attn_mixer_options *o, int64_t features, int64_t channels,
                        int64_t first) {
  memory m = {.matrices = o->memory == ATTN_MEMORY_MATRIX ? 1
                          : o->memory == ATTN_MEMORY_MLP  ? 2
                                                          : 3};
  m.rows[0] = o->value_dim;
  m.columns[0] = m.matrices == 1 ? features : o->memory_width;
  for (int i = 1; i < m.matrices; ++i) m.rows[i] = o->memory_width, m.columns[i] = features;
  for (int i = 0; i < m.matrices; ++i) m.count += m.rows[i] * m.columns[i];
  m.first = first;
  m.channels = m.matrices == 1                   ? 0
               : channels - first < o->value_dim ? channels - first
                                                 : o->value_dim;
  return m;
}

static void load_initial(const memory *m, const double *const *matrices, int64_t head, double *w) {
  for (int i = 0; i < m->matrices; ++i) {
    int64_t n = m->rows[i] * m->columns[i];
    memcpy(w, matrices[i] + head * n, (size_t)n * sizeof *w);
    w += n;
  }
}

/* The layer ---------------------------------------------------------------------------------------
 */

static double *gate(const attn_mixer_options *o, int64_t rows, const double *x,
                    const double *const *p, int weight) {
  int bias = weight == GAMMA ? GAMMA_BIAS : weight + 1;
  double *y = oracle_affine(rows, o->heads, o->hidden, x, p[weight], p[bias]);
  for (int64_t i = 0; i < rows * o->heads; ++i) y[i] = oracle_sigmoid(y[i]);
  return y;
}

typedef struct inputs {
  double *q, *k, *v, *alpha, *theta, *eta, *gamma;
  int64_t features, window, steps;
} inputs;

static void run_head(const attn_mixer_options *o, const memory *m, const inputs *in, int64_t rows,
                     int64_t h, const double *const *initial, double *out) {
  int64_t n = in->features, shared = h / (o->heads / o->kv_heads), values = o->value_dim;
  size_t bytes = (size_t)m->count * sizeof(double);
  double *w = malloc(bytes), *start = malloc(bytes), *s = calloc(1, bytes), *step = malloc(bytes);
  load_initial(m, initial, h, w);
  for (int64_t t = 0; t < rows; ++t) {
    if (t % o->memory_chunk == 0) memcpy(start, w, bytes);
    for (int64_t i = 0; i < m->count; ++i) s[i] *= in->theta[t * o->heads + h];
    for (int64_t i = t - in->window + 1; i <= t; ++i)
      if (i >= 0)
        add_gradient(m, start, in->gamma[i * o->heads + h] / (double)in->window,
                     in->k + (i * o->kv_heads + shared) * n, in->v + (i * o->heads + h) * values,
                     s);
    for (int64_t i = 0, at = 0; i < m->matrices; at += m->rows[i] * m->columns[i], ++i)
      if (in->steps > 0)
        orthogonalise(step + at, s + at, m->rows[i], m->columns[i], in->steps);
      else
        memcpy(step + at, s + at, (size_t)(m->rows[i] * m->columns[i]) * sizeof *s);
    double eta = in->eta ? in->eta[t * o->heads + h] : 1;
    for (int64_t i = 0; i < m->count; ++i)
      w[i] = in->alpha[t * o->heads + h] * w[i] - eta * step[i];
    const double *z = in->q + (t * o->kv_heads + shared) * n;
    double *none = malloc((size_t)m->columns[0] * 2 * sizeof *none);
    double *a = hidden(m, w, z, none, none + m->columns[0]);
    read_memory(m, w, z, a, out + (t * o->heads + h) * values);
    free(none), free(a);
  }
  free(w), free(start), free(s), free(step);
}

static void run(const attn_mixer_options *o, int windowed, int orthogonal, int64_t rows,
                const double *x, const double *const *p, double *y) {
  int matrices = o->memory == ATTN_MEMORY_MATRIX ? 1 : o->memory == ATTN_MEMORY_MLP ? 2 : 3;
  int64_t channels = windowed ? o->feature_dim : o->dim, values = o->heads * o->value_dim;
  int64_t keys = o->kv_heads * channels;
  inputs in = {.features = channels, .window = windowed ? o->memory_window : 1};
  in.q = oracle_convolved(o, rows, keys, x, p[Q], p[Q_CONV]);
  in.k = oracle_convolved(o, rows, keys, x, p[K], p[K_CONV]);
  in.v = oracle_convolved(o, rows, values, x, p[V], p[V_CONV]);
  oracle_l2_normalise(in.q, rows * o->kv_heads, channels);
  oracle_l2_normalise(in.k, rows * o->kv_heads, channels);
  int next = WEIGHTS + matrices;
  if (windowed) {
    double *of_q =
        features(in.q, rows * o->kv_heads, channels, o->feature_degree, p[next], &in.features);
    double *of_k =
        features(in.k, rows * o->kv_heads, channels, o->feature_degree, p[next], &in.features);
    free(in.q), free(in.k);
    in.q = of_q, in.k = of_k;
    ++next;
  }
  in.alpha = gate(o, rows, x, p, ALPHA);
  in.theta = gate(o, rows, x, p, THETA);
  in.gamma = gate(o, rows, x, p, GAMMA);
  if (orthogonal) {
    in.eta = gate(o, rows, x, p, next);
    in.steps = o->newton_schulz;
  }
  memory m = memory_of(o, in.features, channels + windowed, windowed);
  double *out = calloc((size_t)(rows * values + 1), sizeof *out);
  for (int64_t h = 0; h < o->heads; ++h) run_head(o, &m, &in, rows, h, p + WEIGHTS, out);
  oracle_rms_normalise(out, rows * o->heads, o->value_dim, p[NORM], o->norm_epsilon);
  double *by = oracle_linear(rows, values, o->hidden, x, p[GATE]);
  oracle_silu(by, rows * values);
  for (int64_t i = 0; i < rows * values; ++i) out[i] *= by[i];
  double *result = oracle_linear(rows, o->hidden, values, out, p[OUT]);
  memcpy(y, result, (size_t)(rows * o->hidden) * sizeof *y);
  free(in.q), free(in.k), free(in.v), free(in.alpha), free(in.theta), free(in.gamma), free(in.eta);
  free(out), free(by), free(result);
}

void oracle_titans(const attn_mixer_options *o, int64_t rows, const double *x,
                   const double *const *p, double *y) {
  run(o, 0, 0, rows, x, p, y);
}

void oracle_omega_net(const attn_mixer_options *o, int64_t rows, const double *x,
                      const double *const *p, double *y) {
  run(o, 1, 0, rows, x, p, y);
}

void oracle_atlas(const attn_mixer_options *o, int64_t rows, const double *x,
                  const double *const *p, double *y) {
  run(o, 1, 1, rows, x, p, y);
}
