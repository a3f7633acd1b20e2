/* DiagAttention (arXiv 2210.10340), T2: for token i in block b = floor(i / w)
 *
 *   o_i = sum_j softmax_j(q_i . k_j / sqrt(dim)) v_j over the tokens j <= i of block b
 *
 * (T1: with weights max(0, s) that are not divided, and o / sqrt(mean o^2 + epsilon) over all
 * heads) (bidirectional: over all tokens of block b), with biases at all four projections and
 * rotary positions on q and k; query head h reads key head h / (heads / kv_heads). */
#include "oracles/mixers.h"

#include <math.h>
#include <stdlib.h>

enum { Q, K, V, O, Q_BIAS, K_BIAS, V_BIAS, O_BIAS };

void oracle_diag_attention(const attn_mixer_options *o, int64_t rows, const double *x,
                           const double *const *p, double *y) {
  int64_t queries = o->heads * o->dim, keys = o->kv_heads * o->dim;
  int64_t values = o->kv_heads * o->value_dim, width = o->heads * o->value_dim;
  double *q = oracle_affine(rows, queries, o->hidden, x, p[Q], p[Q_BIAS]);
  double *k = oracle_affine(rows, keys, o->hidden, x, p[K], p[K_BIAS]);
  double *v = oracle_affine(rows, values, o->hidden, x, p[V], p[V_BIAS]);
  double *out = calloc((size_t)(rows * width + 1), sizeof *out);
  if (o->rotary_dim > 0) {
    oracle_rotate(o, rows, o->heads, o->dim, q);
    oracle_rotate(o, rows, o->kv_heads, o->dim, k);
  }
  for (int64_t h = 0; h < o->heads; ++h)
    for (int64_t i = 0; i < rows; ++i) {
      int64_t shared = h / (o->heads / o->kv_heads);
      double total = 0, *to = out + i * width + h * o->value_dim;
      for (int64_t j = 0; j < rows; ++j) {
        if (j / o->block != i / o->block || (j > i && !o->bidirectional)) continue;
        double score = 0;
        for (int64_t c = 0; c < o->dim; ++c)
          score += q[i * queries + h * o->dim + c] * k[j * keys + shared * o->dim + c];
        score /= sqrt((double)o->dim);
        double weight = o->relu_scores ? fmax(0, score) : exp(score);
        total += weight;
        for (int64_t c = 0; c < o->value_dim; ++c)
          to[c] += weight * v[j * values + shared * o->value_dim + c];
      }
      for (int64_t c = 0; c < o->value_dim && !o->relu_scores; ++c) to[c] /= total;
    }
  if (o->relu_scores) oracle_rms_normalise(out, rows, width, NULL, o->norm_epsilon);
  double *result = oracle_affine(rows, o->hidden, width, out, p[O], p[O_BIAS]);
  for (int64_t i = 0; i < rows * o->hidden; ++i) y[i] = result[i];
  free(q), free(k), free(v), free(out), free(result);
}
