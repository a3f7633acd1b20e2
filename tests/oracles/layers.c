#include "oracles/layers.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static double identity(double x) {
  return x;
}
static double one(double x) {
  (void)x;
  return 1;
}
static double sigmoid(double x) {
  return x > 0 ? 1 / (1 + exp(-x)) : exp(x) / (1 + exp(x));
}
static double sigmoid_slope(double x) {
  return sigmoid(x) * sigmoid(-x);
}
static double silu(double x) {
  return x * sigmoid(x);
}
static double silu_slope(double x) {
  return sigmoid(x) + x * sigmoid(x) * sigmoid(-x);
}
static double normal_below(double x) {
  return 0.5 * erfc(-x / sqrt(2));
}
static double gelu(double x) {
  return x * normal_below(x);
}
/* (1 + tanh(u)) / 2 = e^(2u) / (1 + e^(2u)), which keeps its digits where tanh is near -1. */
static double tanh_gate(double x) {
  double e = exp(2 * sqrt(2 / acos(-1)) * (x + 0.044715 * x * x * x));
  return isinf(e) ? 1 : e / (1 + e);
}
static double gelu_tanh(double x) {
  return x * tanh_gate(x);
}
static double gelu_tanh_slope(double x) {
  double s = tanh_gate(x);
  return s + 2 * x * s * (1 - s) * sqrt(2 / acos(-1)) * (1 + 3 * 0.044715 * x * x);
}
static double gelu_slope(double x) {
  return normal_below(x) + x * exp(-x * x / 2) / sqrt(2 * acos(-1));
}
static double relu(double x) {
  return x > 0 ? x : 0;
}
static double step(double x) {
  return x > 0;
}
static double elu(double x) {
  return x > 0 ? x : expm1(x);
}
static double elu_plus_one(double x) {
  return x > 0 ? x + 1 : exp(x);
}
static double elu_slope(double x) {
  return x > 0 ? 1 : exp(x);
}
static double softplus(double x) {
  return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x));
}
static double log_sigmoid(double x) {
  return -softplus(-x);
}
static double log_sigmoid_slope(double x) {
  return sigmoid(-x);
}

static const struct {
  const char *name;
  oracle_function value, slope;
} activations[] = {
    {"identity", identity, one},
    {"silu", silu, silu_slope},
    {"sigmoid", sigmoid, sigmoid_slope},
    {"gelu", gelu, gelu_slope},
    {"gelu_tanh", gelu_tanh, gelu_tanh_slope},
    {"relu", relu, step},
    {"softplus", softplus, sigmoid},
    {"log_sigmoid", log_sigmoid, log_sigmoid_slope},
    {"exp", exp, exp},
    {"elu", elu, elu_slope},
    {"elu_plus_one", elu_plus_one, elu_slope},
};

oracle_function oracle_activation(const char *name) {
  for (size_t i = 0; i < sizeof activations / sizeof *activations; ++i)
    if (strcmp(name, activations[i].name) == 0) return activations[i].value;
  return NULL;
}

oracle_function oracle_activation_slope(const char *name) {
  for (size_t i = 0; i < sizeof activations / sizeof *activations; ++i)
    if (strcmp(name, activations[i].name) == 0) return activations[i].slope;
  return NULL;
}

void oracle_rms_norm(double *y, const double *x, const double *weight, int64_t rows, int64_t n,
                     double divisor, double epsilon) {
  for (int64_t r = 0; r < rows; ++r) {
    double squares = 0;
    for (int64_t i = 0; i < n; ++i) squares += x[r * n + i] * x[r * n + i];
    for (int64_t i = 0; i < n; ++i)
      y[r * n + i] = x[r * n + i] / sqrt(squares / divisor + epsilon) * (weight ? weight[i] : 1);
  }
}

void oracle_layer_norm(double *y, const double *x, const double *weight, const double *bias,
                       int64_t rows, int64_t n, double epsilon) {
  for (int64_t r = 0; r < rows; ++r) {
    double mean = 0, variance = 0;
    for (int64_t i = 0; i < n; ++i) mean += x[r * n + i] / (double)n;
    for (int64_t i = 0; i < n; ++i) variance += pow(x[r * n + i] - mean, 2) / (double)n;
    for (int64_t i = 0; i < n; ++i)
      y[r * n + i] = (x[r * n + i] - mean) / sqrt(variance + epsilon) * (weight ? weight[i] : 1) +
                     (bias ? bias[i] : 0);
  }
}

void oracle_rotary(double *y, const double *x, const double *position, int64_t rows, int64_t heads,
                   int64_t dim, int64_t rotary_dim, double base) {
  int64_t half = rotary_dim / 2;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t h = 0; h < heads; ++h) {
      const double *from = x + (r * heads + h) * dim;
      double *to = y + (r * heads + h) * dim;
      for (int64_t i = rotary_dim; i < dim; ++i) to[i] = from[i];
      for (int64_t j = 0; j < half; ++j) {
        double angle = position[r] * pow(base, -2.0 * (double)j / (double)rotary_dim);
        to[j] = from[j] * cos(angle) - from[j + half] * sin(angle);
        to[j + half] = from[j + half] * cos(angle) + from[j] * sin(angle);
      }
    }
}

void oracle_lrpe(double *y, const double *x, const double *theta, const double *position,
                 int64_t rows, int64_t heads, int64_t dim) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t j = 0; j < dim; ++j) {
        double angle = position[r] * theta[h * dim + j], value = x[(r * heads + h) * dim + j];
        y[(r * heads + h) * 2 * dim + j] = value * cos(angle);
        y[(r * heads + h) * 2 * dim + dim + j] = value * sin(angle);
      }
}

void oracle_short_convolution(double *y, const double *x, const double *w, const double *position,
                              int64_t rows, int64_t channels, int64_t taps) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0;
      for (int64_t j = 0; j < taps && (double)j <= position[r]; ++j)
        sum += w[c * taps + taps - 1 - j] * x[(r - j) * channels + c];
      y[r * channels + c] = sum;
    }
}

void oracle_product(double *y, const double *x, const double *w, int64_t rows, int64_t inputs,
                    int64_t outputs) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t o = 0; o < outputs; ++o) {
      double sum = 0;
      for (int64_t i = 0; i < inputs; ++i) sum += x[r * inputs + i] * w[o * inputs + i];
      y[r * outputs + o] = sum;
    }
}

double oracle_cross_entropy(const double *x, const double *w, const int32_t *targets, int64_t rows,
                            int64_t inputs, int64_t vocabulary, double *dx, double *dw) {
  double loss = 0, counted = 0, *z = malloc((size_t)vocabulary * sizeof *z);
  for (int64_t r = 0; r < rows; ++r) counted += targets[r] >= 0;
  memset(dx, 0, (size_t)(rows * inputs) * sizeof *dx);
  memset(dw, 0, (size_t)(vocabulary * inputs) * sizeof *dw);
  for (int64_t r = 0; r < rows; ++r) {
    if (targets[r] < 0) continue;
    double greatest = -INFINITY, sum = 0;
    oracle_product(z, x + r * inputs, w, 1, inputs, vocabulary);
    for (int64_t v = 0; v < vocabulary; ++v) greatest = fmax(greatest, z[v]);
    for (int64_t v = 0; v < vocabulary; ++v) sum += exp(z[v] - greatest);
    loss += (greatest + log(sum) - z[targets[r]]) / counted;
    for (int64_t v = 0; v < vocabulary; ++v) {
      double dz = (exp(z[v] - greatest) / sum - (v == targets[r])) / counted;
      for (int64_t i = 0; i < inputs; ++i) {
        dx[r * inputs + i] += dz * w[v * inputs + i];
        dw[v * inputs + i] += dz * x[r * inputs + i];
      }
    }
  }
  free(z);
  return loss;
}

/* The rank of v[i] among v[0 .. n): how many come before it, by value and then by place. */
static int rank_of(const double *v, int n, int i) {
  int before = 0;
  for (int j = 0; j < n; ++j) before += v[j] > v[i] || (v[j] == v[i] && j < i);
  return before;
}

static int chosen(const oracle_experts_options *o, const double *merit, int e) {
  int groups = o->groups ? o->groups : 1, size = o->experts / groups;
  double values[64], left[64];
  for (int g = 0; g < groups; ++g) {
    values[g] = 0;
    for (int i = 0; i < size; ++i) {
      int rank = rank_of(merit + g * size, size, i);
      if (rank == 0 || (rank == 1 && o->two_best)) values[g] += merit[g * size + i];
    }
  }
  for (int i = 0; i < o->experts; ++i) {
    int kept = !o->groups || rank_of(values, groups, i / size) < o->best_groups;
    left[i] = kept ? merit[i] : -1e300;
  }
  return rank_of(left, o->experts, e) < o->active;
}

static void add_expert(double *y, const double *x, double weight, const double *const *w, int64_t n,
                       int64_t width) {
  for (int64_t j = 0; j < width; ++j) {
    double a = 0, b = 0;
    for (int64_t i = 0; i < n; ++i) {
      a += w[0][j * n + i] * x[i];
      b += w[1][j * n + i] * x[i];
    }
    for (int64_t i = 0; i < n; ++i) y[i] += weight * w[2][i * width + j] * silu(a) * b;
  }
}

void oracle_experts(double *y, const double *x, const double *logits, const double *bias,
                    const double *const *w, const oracle_experts_options *o, int64_t rows,
                    int64_t n, int64_t width) {
  memset(y, 0, (size_t)(rows * n) * sizeof *y);
  for (int64_t r = 0; r < rows; ++r) {
    double s[64], merit[64], all = 0, sum = 0;
    for (int e = 0; e < o->experts; ++e) all += exp(logits[r * o->experts + e]);
    for (int e = 0; e < o->experts; ++e) {
      double z = logits[r * o->experts + e];
      s[e] = o->sigmoid ? sigmoid(z) : exp(z) / all;
      merit[e] = s[e] + (bias ? bias[e] : 0);
    }
    for (int e = 0; e < o->experts; ++e) sum += chosen(o, merit, e) ? s[e] : 0;
    for (int e = 0; e < o->experts; ++e)
      if (chosen(o, merit, e))
        add_expert(y + r * n, x + r * n, o->scale * s[e] / (o->normalise ? sum : 1), w + 3 * e, n,
                   width);
  }
}
