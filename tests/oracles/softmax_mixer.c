/* Softmax attention, the whole row of scores at once:
 *
 *   o_i = sum_j softmax_j(cap(scale q_i . k_j)) v_j over i - window < j <= i,  y = o Wo^T
 *   bidirectional: over i - window < j < i + window; across: over all j of a context, of which k
 *   and v are made
 *   cap(s) = c tanh(s / c);  query head h reads key head h / (heads / kv_heads)
 *
 * o may be multiplied by sigmoid(x Wg^T), Qwen3-Next's gate, before Wo;
 * q, k, v and y may have biases; q and k heads may be normalised, x / sqrt(mean(x^2) + epsilon) w.
 *
 * Rotary positions (arXiv 2104.09864) turn the pair of channels (j, j + r / 2) of token n by
 * n t_j, t_j = base^(-2j / r), r = rotary_dim; the channels from r on stay. Llama 3.1 (arXiv
 * 2407.21783): the wavelength L_j = 2 pi / t_j; t_j stays where L_j < original / high, is divided
 * by the factor where L_j > original / low, and between is (1 - s) t_j / factor + s t_j with s =
 * (original / L_j - low) / (high - low). YaRN (arXiv 2309.00071, as published code has it): the
 * pair p(n) = r / 2 ln(original / (2 pi n)) / ln(base) makes n turns in the original length; t_j
 * becomes g t_j / factor + (1 - g) t_j, g = (j - a) / (b - a) kept within 0 and 1, a =
 * floor(p(high)), b = ceil(p(low)), both kept within 0 and r - 1; and what is turned is multiplied
 * by the magnitude. */
#include "oracles/mixers.h"

#include <math.h>
#include <stdlib.h>

enum { Q, K, V, O, FIRST_OPTIONAL };

static double yarn(const attn_rope *rope, double theta, double j, double r) {
  double p[2] = {rope->high_factor, rope->low_factor};
  for (int i = 0; i < 2; ++i)
    p[i] = r / 2 * log(rope->original_length / (2 * acos(-1) * p[i])) / log(rope->base);
  double a = floor(p[0]), b = ceil(p[1]);
  if (a < 0) a = 0;
  if (b > r - 1) b = r - 1;
  double g = (j - a) / (b - a);
  if (g < 0) g = 0;
  if (g > 1) g = 1;
  return g * theta / rope->factor + (1 - g) * theta;
}

static double speed(const attn_rope *rope, double theta, int64_t j) {
  if (rope->scaling == ATTN_ROPE_FACTORS) return theta / rope->factors[j];
  double length = 2 * acos(-1) / theta, original = rope->original_length;
  if (rope->scaling == ATTN_ROPE_LINEAR) return theta / rope->factor;
  if (rope->scaling == ATTN_ROPE_PLAIN || length < original / rope->high_factor) return theta;
  if (length > original / rope->low_factor) return theta / rope->factor;
  double s = (original / length - rope->low_factor) / (rope->high_factor - rope->low_factor);
  return (1 - s) * theta / rope->factor + s * theta;
}

static void add_bias(int64_t rows, int64_t width, double *x, const double *bias) {
  for (int64_t i = 0; i < rows * width; ++i) x[i] += bias[i % width];
}

static void normalise(const attn_mixer_options *o, int64_t heads, double *x, const double *w) {
  for (int64_t h = 0; h < heads; ++h, x += o->dim) {
    double sum = 0;
    for (int64_t c = 0; c < o->dim; ++c) sum += x[c] * x[c];
    double factor = 1 / sqrt(sum / (double)o->dim + o->norm_epsilon);
    for (int64_t c = 0; c < o->dim; ++c) x[c] *= factor * w[c];
  }
}

void oracle_rotate(const attn_mixer_options *o, int64_t rows, int64_t heads, int64_t dim,
                   double *x) {
  int64_t half = o->rotary_dim / 2;
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t j = 0; j < half; ++j) {
        double *pair = x + (n * heads + h) * dim + j;
        double theta = pow(o->rope.base, -2.0 * (double)j / (double)o->rotary_dim);
        double angle = (double)n * (o->rope.scaling == ATTN_ROPE_YARN
                                        ? yarn(&o->rope, theta, (double)j, (double)o->rotary_dim)
                                        : speed(&o->rope, theta, j));
        double size = o->rope.magnitude > 0 ? o->rope.magnitude : 1;
        double a = size * pair[0], b = size * pair[half];
        pair[0] = a * cos(angle) - b * sin(angle);
        pair[half] = b * cos(angle) + a * sin(angle);
      }
}

static double score(const attn_mixer_options *o, const double *q, const double *k) {
  double s = 0;
  for (int64_t c = 0; c < o->dim; ++c) s += q[c] * k[c];
  s *= o->scale > 0 ? o->scale : 1 / sqrt((double)o->dim);
  return o->soft_cap > 0 ? o->soft_cap * tanh(s / o->soft_cap) : s;
}

/* Queries of x and keys of the context, which is x itself or all of which is seen. */
static void layer(const attn_mixer_options *o, int64_t rows, const double *x, int64_t context_rows,
                  const double *context, bool across, const double *const *p, double *y) {
  int64_t keys = o->kv_heads * o->dim, values = o->kv_heads * o->value_dim;
  int64_t width = o->heads * o->value_dim;
  double *q = oracle_linear(rows, o->heads * o->dim, o->hidden, x, p[Q]);
  double *k = oracle_linear(context_rows, keys, o->hidden, context, p[K]);
  double *v = oracle_linear(context_rows, values, o->hidden, context, p[V]);
  double *out = calloc((size_t)(rows * width + 1), sizeof *out);
  double *weights = malloc((size_t)(context_rows + 1) * sizeof *weights);
  const double *const *next = p + FIRST_OPTIONAL, *out_bias = NULL;
  double *gate = NULL;
  if (o->bias) {
    add_bias(rows, o->heads * o->dim, q, *next++);
    add_bias(context_rows, keys, k, *next++);
    add_bias(context_rows, values, v, *next++);
  }
  if (o->output_bias) out_bias = *next++;
  if (o->qk_norm) {
    normalise(o, rows * o->heads, q, *next++);
    normalise(o, context_rows * o->kv_heads, k, *next++);
  }
  if (o->output_gate) gate = oracle_linear(rows, width, o->hidden, x, *next++);
  if (o->rotary_dim > 0) {
    oracle_rotate(o, rows, o->heads, o->dim, q);
    oracle_rotate(o, context_rows, o->kv_heads, o->dim, k);
  }
  for (int64_t h = 0; h < o->heads; ++h)
    for (int64_t i = 0; i < rows; ++i) {
      int64_t shared = h / (o->heads / o->kv_heads);
      int64_t first = o->window > 0 && i >= o->window ? i - o->window + 1 : 0;
      int64_t after = i + 1; /* the last key that is seen, and one more */
      if (o->bidirectional) after = o->window > 0 && i + o->window < rows ? i + o->window : rows;
      if (across) after = context_rows;
      double total = 0;
      for (int64_t j = first; j < after; ++j) {
        weights[j] = exp(score(o, q + (i * o->heads + h) * o->dim, k + j * keys + shared * o->dim));
        total += weights[j];
      }
      for (int64_t j = first; j < after; ++j)
        for (int64_t c = 0; c < o->value_dim; ++c)
          out[i * width + h * o->value_dim + c] +=
              weights[j] / total * v[j * values + shared * o->value_dim + c];
    }
  for (int64_t i = 0; gate && i < rows * width; ++i) out[i] *= oracle_sigmoid(gate[i]);
  double *result = oracle_linear(rows, o->hidden, width, out, p[O]);
  if (out_bias) add_bias(rows, o->hidden, result, out_bias);
  for (int64_t i = 0; i < rows * o->hidden; ++i) y[i] = result[i];
  free(q), free(k), free(v), free(out), free(weights), free(result), free(gate);
}

void oracle_softmax_mixer(const attn_mixer_options *o, int64_t rows, const double *x,
                          const double *const *p, double *y) {
  layer(o, rows, x, rows, x, false, p, y);
}

void oracle_softmax_across(const attn_mixer_options *o, int64_t rows, const double *x,
                           int64_t context_rows, const double *context, const double *const *p,
                           double *y) {
  layer(o, rows, x, context_rows, context, true, p, y);
}
