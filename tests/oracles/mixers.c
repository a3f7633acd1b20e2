#include "oracles/mixers.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const struct {
  const char *name;
  oracle_mixer *oracle;
} table[] = {
    {"softmax", oracle_softmax_mixer},
    {"lightning", oracle_lightning},
    {"gla", oracle_gla},
    {"delta_net", oracle_delta_net},
    {"gated_delta_net", oracle_gated_delta_net},
    {"kda", oracle_kda},
    {"mla", oracle_mla},
    {"minimax", oracle_minimax},
    {"hedgehog", oracle_hedgehog},
    {"norm_attention", oracle_norm_attention},
    {"diag_attention", oracle_diag_attention},
    {"aaren", oracle_aaren},
    {"based", oracle_based},
    {"lawcat", oracle_lawcat},
    {"lmu", oracle_lmu},
    {"spiking_lmu", oracle_spiking_lmu},
    {"lolcats", oracle_lolcats},
    {"titans", oracle_titans},
    {"omega_net", oracle_omega_net},
    {"atlas", oracle_atlas},
};

oracle_mixer *oracle_of_mixer(const char *name) {
  for (size_t i = 0; i < sizeof table / sizeof *table; ++i)
    if (strcmp(table[i].name, name) == 0) return table[i].oracle;
  return NULL;
}

double oracle_sigmoid(double x) {
  return 1 / (1 + exp(-x));
}

double oracle_softplus(double x) {
  return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x));
}

double *oracle_linear(int64_t rows, int64_t outputs, int64_t inputs, const double *x,
                      const double *w) {
  double *y = malloc((size_t)(rows * outputs + 1) * sizeof *y);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t o = 0; o < outputs; ++o) {
      double sum = 0;
      for (int64_t i = 0; i < inputs; ++i) sum += x[r * inputs + i] * w[o * inputs + i];
      y[r * outputs + o] = sum;
    }
  return y;
}

double *oracle_affine(int64_t rows, int64_t outputs, int64_t inputs, const double *x,
                      const double *w, const double *bias) {
  double *y = oracle_linear(rows, outputs, inputs, x, w);
  for (int64_t i = 0; i < rows * outputs; ++i) y[i] += bias[i % outputs];
  return y;
}

void oracle_silu(double *x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] *= oracle_sigmoid(x[i]);
}

double *oracle_convolve(int64_t rows, int64_t channels, int64_t taps, const double *x,
                        const double *w) {
  double *y = calloc((size_t)(rows * channels + 1), sizeof *y);
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t j = 0; j < taps && j <= t; ++j)
        y[t * channels + c] += w[c * taps + taps - 1 - j] * x[(t - j) * channels + c];
  return y;
}

void oracle_l2_normalise(double *x, int64_t vectors, int64_t dim) {
  for (int64_t r = 0; r < vectors; ++r) {
    double sum = 0;
    for (int64_t i = 0; i < dim; ++i) sum += x[r * dim + i] * x[r * dim + i];
    for (int64_t i = 0; i < dim; ++i) x[r * dim + i] /= sqrt(sum + 1e-6);
  }
}

void oracle_rms_normalise(double *x, int64_t vectors, int64_t dim, const double *weight,
                          double epsilon) {
  for (int64_t r = 0; r < vectors; ++r) {
    double sum = 0;
    for (int64_t i = 0; i < dim; ++i) sum += x[r * dim + i] * x[r * dim + i];
    for (int64_t i = 0; i < dim; ++i)
      x[r * dim + i] *= (weight ? weight[i] : 1) / sqrt(sum / (double)dim + epsilon);
  }
}

double *oracle_convolved(const attn_mixer_options *options, int64_t rows, int64_t channels,
                         const double *x, const double *w, const double *taps) {
  double *projected = oracle_linear(rows, channels, options->hidden, x, w);
  double *y = oracle_convolve(rows, channels, options->convolution, projected, taps);
  oracle_silu(y, rows * channels);
  free(projected);
  return y;
}

oracle_cross_mixer *oracle_of_cross_mixer(const char *name) {
  static const struct {
    const char *name;
    oracle_cross_mixer *oracle;
  } crossing[] = {{"softmax", oracle_softmax_across},
                  {"hedgehog", oracle_hedgehog_across},
                  {"norm_attention", oracle_norm_attention_across}};
  for (size_t i = 0; i < sizeof crossing / sizeof *crossing; ++i)
    if (strcmp(crossing[i].name, name) == 0) return crossing[i].oracle;
  return NULL;
}
