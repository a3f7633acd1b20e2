#include "oracles/lmuformer.h"
#include "oracles/lif.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static const double *named(const oracle_lmuformer *o, const char *prefix, const char *name) {
  char text[128];
  snprintf(text, sizeof text, "%s%s", prefix, name);
  return o->values(o->context, text);
}

static void normalise(const oracle_lmuformer *o, const char *prefix, int64_t rows, int64_t n,
                      double *x) {
  const double *w = named(o, prefix, "weight"), *b = named(o, prefix, "bias");
  const double *mean = named(o, prefix, "running_mean"), *var = named(o, prefix, "running_var");
  for (int64_t i = 0; i < rows * n; ++i)
    x[i] = (x[i] - mean[i % n]) / sqrt(var[i % n] + o->epsilon) * w[i % n] + b[i % n];
}

/* LIF(BN(x)), a new array */
static double *fire(const oracle_lmuformer *o, const char *prefix, int64_t rows, int64_t n,
                    const double *x) {
  double *in = calloc((size_t)(rows * n), sizeof *in), *s = calloc((size_t)(rows * n), sizeof *s);
  for (int64_t i = 0; i < rows * n; ++i) in[i] = x[i];
  normalise(o, prefix, rows, n, in);
  oracle_lif(s, in, rows, n, o->mixer.spike_tau, o->mixer.spike_threshold);
  free(in);
  return s;
}

/* y_t = sum over k of w[.., .., k] x_{t + k - 1}: w [hidden, 3, inputs] */
static double *convolve(const oracle_lmuformer *o, int i, int64_t rows, const double *x) {
  char prefix[64];
  snprintf(prefix, sizeof prefix, "embedding.%d.conv.", i);
  const double *w = named(o, prefix, "weight");
  int64_t inputs = i ? o->hidden : o->input;
  double *y = calloc((size_t)(rows * o->hidden), sizeof *y);
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t h = 0; h < o->hidden; ++h)
      for (int64_t c = 0; c < inputs; ++c)
        for (int64_t k = 0; k < 3; ++k)
          if (t + k - 1 >= 0 && t + k - 1 < rows)
            y[t * o->hidden + h] += w[(h * 3 + k) * inputs + c] * x[(t + k - 1) * inputs + c];
  return y;
}

static double *embed(const oracle_lmuformer *o, int64_t rows, const double *frames) {
  int64_t count = rows * o->hidden;
  double *x = NULL;
  for (int i = 0; i < 5; ++i) {
    char prefix[64];
    snprintf(prefix, sizeof prefix, "embedding.%d.norm.", i);
    double *fired = o->spiking && i ? fire(o, prefix, rows, o->hidden, x) : NULL;
    double *y = convolve(o, i, rows, fired ? fired : x ? x : frames);
    for (int64_t j = 0; j < count && !o->spiking && i < 4; ++j)
      if (y[j] < 0) y[j] = 0;
    if (!o->spiking && i < 4) normalise(o, prefix, rows, o->hidden, y);
    for (int64_t j = 0; j < count && i == 4; ++j) y[j] += x[j];
    free(fired), free(x);
    x = y;
  }
  return x;
}

static void layer(const oracle_lmuformer *o, int64_t l, int64_t rows, double *x) {
  char up[64], down[64], up_norm[64], down_norm[64], mixer_norm[64];
  int64_t count = rows * o->hidden, wide = rows * o->width;
  snprintf(up, sizeof up, "layers.%d.up.", (int)l);
  snprintf(down, sizeof down, "layers.%d.down.", (int)l);
  snprintf(up_norm, sizeof up_norm, "layers.%d.up_norm.", (int)l);
  snprintf(down_norm, sizeof down_norm, "layers.%d.down_norm.", (int)l);
  snprintf(mixer_norm, sizeof mixer_norm, "layers.%d.mixer_norm.", (int)l);
  double *y = calloc((size_t)count, sizeof *y);
  (o->spiking ? oracle_spiking_lmu : oracle_lmu)(&o->mixer, rows, x, o->mixer_values(o->context, l),
                                                 y);
  if (!o->spiking) normalise(o, mixer_norm, rows, o->hidden, y);
  for (int64_t i = 0; i < count; ++i) x[i] += y[i];
  free(y);
  double *in = o->spiking ? fire(o, up_norm, rows, o->hidden, x) : NULL;
  double *a = oracle_affine(rows, o->width, o->hidden, in ? in : x, named(o, up, "weight"),
                            named(o, up, "bias"));
  double *fired = o->spiking ? fire(o, down_norm, rows, o->width, a) : NULL;
  if (!o->spiking) {
    normalise(o, up_norm, rows, o->width, a);
    for (int64_t i = 0; i < wide; ++i) a[i] *= 0.5 * (1 + erf(a[i] / sqrt(2)));
  }
  double *b = oracle_affine(rows, o->hidden, o->width, fired ? fired : a, named(o, down, "weight"),
                            named(o, down, "bias"));
  if (!o->spiking) normalise(o, down_norm, rows, o->hidden, b);
  for (int64_t i = 0; i < count; ++i) x[i] += o->spiking || b[i] > 0 ? b[i] : 0;
  free(in), free(a), free(fired), free(b);
}

void oracle_lmuformer_scores(const oracle_lmuformer *o, int64_t rows, const double *frames,
                             double *scores) {
  double *x = embed(o, rows, frames);
  for (int64_t l = 0; l < o->layers; ++l) layer(o, l, rows, x);
  if (o->spiking) {
    double *fired = fire(o, "head_norm.", rows, o->hidden, x);
    free(x);
    x = fired;
  }
  double *each = oracle_affine(rows, o->classes, o->hidden, x, named(o, "head.", "weight"),
                               named(o, "head.", "bias"));
  for (int64_t k = 0; k < o->classes; ++k) {
    scores[k] = 0;
    for (int64_t t = 0; t < rows; ++t) scores[k] += each[t * o->classes + k] / (double)rows;
  }
  free(x), free(each);
}
