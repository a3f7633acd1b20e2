#include "oracles/reactive.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const double *of_layer(const oracle_reactive *o, int64_t layer, const char *part,
                              const char *what) {
  char name[160];
  snprintf(name, sizeof name, "layers.%d.%s%s", (int)layer, part, what);
  return o->values(o->context, name);
}

static double *normalised(const oracle_reactive *o, int64_t rows, const double *x,
                          const double *weight) {
  double *y = malloc((size_t)(rows * o->hidden) * sizeof *y);
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0;
    for (int64_t c = 0; c < o->hidden; ++c) sum += pow(x[r * o->hidden + c], 2);
    for (int64_t c = 0; c < o->hidden; ++c)
      y[r * o->hidden + c] =
          x[r * o->hidden + c] / sqrt(sum / (double)o->hidden + o->epsilon) * weight[c];
  }
  return y;
}

enum { TURN_QUERIES = 1, TURN_KEYS = 2, CAUSAL = 4 };

/* Attention of rows x [n, hidden] to rows z [m, hidden], with projections below `part`. */
static double *attention(const oracle_reactive *o, const attn_mixer_options *a, int64_t layer,
                         const char *part, int flags, int64_t n, const double *x, int64_t m,
                         const double *z) {
  int64_t dim = a->dim, shared = a->heads / a->kv_heads;
  double *q =
      oracle_linear(n, a->heads * dim, o->hidden, x, of_layer(o, layer, part, "q_proj.weight"));
  double *k =
      oracle_linear(m, a->kv_heads * dim, o->hidden, z, of_layer(o, layer, part, "k_proj.weight"));
  double *v =
      oracle_linear(m, a->kv_heads * dim, o->hidden, z, of_layer(o, layer, part, "v_proj.weight"));
  double *mixed = calloc((size_t)(n * a->heads * dim), sizeof *mixed);
  double *w = malloc((size_t)m * sizeof *w);
  if (flags & TURN_QUERIES) oracle_rotate(a, n, a->heads, dim, q);
  if (flags & TURN_KEYS) oracle_rotate(a, m, a->kv_heads, dim, k);
  for (int64_t h = 0; h < a->heads; ++h)
    for (int64_t i = 0; i < n; ++i) {
      int64_t seen = flags & CAUSAL ? i + 1 : m;
      double total = 0;
      for (int64_t j = 0; j < seen; ++j) {
        double s = 0;
        for (int64_t c = 0; c < dim; ++c)
          s += q[(i * a->heads + h) * dim + c] * k[(j * a->kv_heads + h / shared) * dim + c];
        total += w[j] = exp(s / sqrt((double)dim));
      }
      for (int64_t j = 0; j < seen; ++j)
        for (int64_t c = 0; c < dim; ++c)
          mixed[(i * a->heads + h) * dim + c] +=
              w[j] / total * v[(j * a->kv_heads + h / shared) * dim + c];
    }
  double *y =
      oracle_linear(n, o->hidden, a->heads * dim, mixed, of_layer(o, layer, part, "o_proj.weight"));
  free(q), free(k), free(v), free(mixed), free(w);
  return y;
}

static void add(double *x, double *y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] += y[i];
  free(y);
}

static double *feed(const oracle_reactive *o, int64_t layer, const char *part, int64_t rows,
                    const double *x) {
  double *gate =
      oracle_linear(rows, o->width, o->hidden, x, of_layer(o, layer, part, "gate_proj.weight"));
  double *up =
      oracle_linear(rows, o->width, o->hidden, x, of_layer(o, layer, part, "up_proj.weight"));
  for (int64_t i = 0; i < rows * o->width; ++i) up[i] *= gate[i] / (1 + exp(-gate[i]));
  double *y =
      oracle_linear(rows, o->hidden, o->width, up, of_layer(o, layer, part, "down_proj.weight"));
  free(gate), free(up);
  return y;
}

static double *embedded(const oracle_reactive *o, int64_t rows, const int32_t *tokens) {
  const double *table = o->values(o->context, "embedding.weight");
  double *x = malloc((size_t)(rows * o->hidden) * sizeof *x);
  for (int64_t r = 0; r < rows; ++r)
    memcpy(x + r * o->hidden, table + tokens[r] * o->hidden, (size_t)o->hidden * sizeof *x);
  return x;
}

void oracle_reactive_encode(const oracle_reactive *o, int64_t rows, const int32_t *tokens,
                            double *encoded) {
  int64_t count = rows * o->hidden;
  double *x = embedded(o, rows, tokens);
  for (int64_t l = 0; l < o->layers; ++l) {
    double *in = normalised(o, rows, x, of_layer(o, l, "encoder.norm.", "weight"));
    add(x, attention(o, &o->self, l, "encoder.self.", TURN_QUERIES | TURN_KEYS, rows, in, rows, in),
        count);
    free(in);
    in = normalised(o, rows, x, of_layer(o, l, "encoder.feed_norm.", "weight"));
    add(x, feed(o, l, "encoder.", rows, in), count);
    free(in);
    memcpy(encoded + l * count, x, (size_t)count * sizeof *x);
  }
  free(x);
}

/* A residual gate: old and fresh [slots, hidden]. */
static void residual_gate(const oracle_reactive *o, int64_t layer, const char *part,
                          const double *old, const double *fresh, double *y) {
  int64_t d = o->hidden, slots = o->slots;
  double *status = calloc((size_t)slots, sizeof *status);
  int linear = strcmp(o->gate, "linear") == 0, fixed = strcmp(o->gate, "static") == 0;
  for (int64_t i = 0; i < slots * d; ++i) y[i] = old[i] + fresh[i];
  if (strcmp(o->gate, "none") == 0) {
    free(status);
    return;
  }
  for (int64_t s = 0; s < slots && !fixed; ++s)
    if (o->learned_status) {
      status[s] = of_layer(o, layer, part, "status.bias")[0];
      for (int64_t c = 0; c < d; ++c)
        status[s] += y[s * d + c] * of_layer(o, layer, part, "status.weight")[c];
    } else {
      for (int64_t c = 0; c < d; ++c) status[s] += y[s * d + c] / (double)d;
    }
  const double *w = of_layer(o, layer, part, "weight");
  for (int64_t s = 0; s < slots; ++s) {
    double z = fixed ? w[s] : w[s] * status[s];
    if (linear) {
      z = of_layer(o, layer, part, "bias")[s];
      for (int64_t t = 0; t < slots; ++t) z += w[s * slots + t] * status[t];
    }
    double g = o->tanh_gate ? tanh(z) : 1 / (1 + exp(-z));
    for (int64_t c = 0; c < d; ++c) {
      double n = fresh[s * d + c], p = old[s * d + c];
      y[s * d + c] = o->tanh_gate ? (1 + g) * n + (1 - g) * p : g * n + (1 - g) * p;
    }
  }
  free(status);
}

static void among(const oracle_reactive *o, int64_t layer, const double *mean, double *stm) {
  int64_t count = o->slots * o->hidden;
  double *own = normalised(o, o->slots, stm, of_layer(o, layer, "memory.among.norm.", "weight"));
  double *seen = malloc((size_t)count * sizeof *seen), *next = malloc((size_t)count * sizeof *next);
  memcpy(seen, own, (size_t)count * sizeof *seen);
  if (strcmp(o->memory, "self") != 0) {
    double *other =
        normalised(o, o->slots, mean, of_layer(o, layer, "memory.among.other_norm.", "weight"));
    if (strncmp(o->memory, "gated", 5) == 0)
      residual_gate(o, layer, "memory.among.inner_gate.", own, other, seen);
    else
      memcpy(seen, other, (size_t)count * sizeof *seen);
    free(other);
  }
  double *fresh = attention(o, &o->cross, layer, "memory.among.", 0, o->slots, own, o->slots, seen);
  residual_gate(o, layer, "memory.among.gate.", stm, fresh, next);
  memcpy(stm, next, (size_t)count * sizeof *next);
  free(own), free(seen), free(next), free(fresh);
}

void oracle_reactive_update(const oracle_reactive *o, const double *memory, int64_t rows,
                            const double *encoded, double *updated) {
  int64_t count = o->slots * o->hidden;
  double *mean = calloc((size_t)count, sizeof *mean);
  double *stm = malloc((size_t)count * sizeof *stm);
  for (int64_t i = 0; i < o->layers * count; ++i) mean[i % count] += memory[i] / (double)o->layers;
  for (int64_t l = 0; l < o->layers; ++l) {
    memcpy(stm, memory + l * count, (size_t)count * sizeof *stm);
    if (strcmp(o->memory, "simple") != 0) among(o, l, mean, stm);
    double *q = normalised(o, o->slots, stm, of_layer(o, l, "memory.write.norm.", "weight"));
    double *k = normalised(o, rows, encoded + l * rows * o->hidden,
                           of_layer(o, l, "memory.write.encoded_norm.", "weight"));
    double *fresh = attention(o, &o->cross, l, "memory.write.", TURN_KEYS, o->slots, q, rows, k);
    residual_gate(o, l, "memory.write.gate.", stm, fresh, updated + l * count);
    free(q), free(k), free(fresh);
  }
  free(mean), free(stm);
}

static void layer_normalise(const oracle_reactive *o, int64_t rows, double *x) {
  const double *weight = o->values(o->context, "decoder.head_norm.weight");
  const double *bias = o->values(o->context, "decoder.head_norm.bias");
  for (int64_t r = 0; r < rows; ++r, x += o->hidden) {
    double mean = 0, variance = 0;
    for (int64_t c = 0; c < o->hidden; ++c) mean += x[c] / (double)o->hidden;
    for (int64_t c = 0; c < o->hidden; ++c) variance += pow(x[c] - mean, 2) / (double)o->hidden;
    for (int64_t c = 0; c < o->hidden; ++c)
      x[c] = (x[c] - mean) / sqrt(variance + o->epsilon) * weight[c] + bias[c];
  }
}

void oracle_reactive_logits(const oracle_reactive *o, int64_t rows, const int32_t *tokens,
                            int64_t slots, const double *memory, double *logits) {
  int64_t count = rows * o->hidden;
  double *x = embedded(o, rows, tokens);
  for (int64_t l = 0; l < o->layers; ++l) {
    double *in = normalised(o, rows, x, of_layer(o, l, "decoder.norm.", "weight"));
    add(x,
        attention(o, &o->self, l, "decoder.self.", TURN_QUERIES | TURN_KEYS | CAUSAL, rows, in,
                  rows, in),
        count);
    free(in);
    in = normalised(o, rows, x, of_layer(o, l, "decoder.cross_norm.", "weight"));
    double *z = normalised(o, slots, memory + l * slots * o->hidden,
                           of_layer(o, l, "decoder.memory_norm.", "weight"));
    add(x, attention(o, &o->cross, l, "decoder.cross.", TURN_QUERIES, rows, in, slots, z), count);
    free(in), free(z);
    in = normalised(o, rows, x, of_layer(o, l, "decoder.feed_norm.", "weight"));
    add(x, feed(o, l, "decoder.", rows, in), count);
    free(in);
  }
  if (o->head_norm) layer_normalise(o, rows, x);
  double *z = oracle_linear(rows, o->vocabulary, o->hidden, x,
                            o->values(o->context, "decoder.head.weight"));
  const double *bias = o->values(o->context, "decoder.head.bias");
  for (int64_t i = 0; i < rows * o->vocabulary; ++i) logits[i] = z[i] + bias[i % o->vocabulary];
  free(z), free(x);
}
