/* NormAttention (arXiv 2210.10340), pair by pair:
 *
 *   q, k = phi(x Wq^T + bq), phi(x Wk^T + bk), then positions;  v = x Wv^T + bv
 *   o_t = sum_{s <= t} (q_t . k_s) v_s;  y = (o / sqrt(mean o^2 + epsilon)) Wo^T + bo
 *
 * (over all s both ways; over all s of a context, of which k and v are made, across), with phi = 1
 * + elu or elu. Gated: v is silu(v), and the norm is multiplied by silu(x Wu^T + bu).
 */
#include "oracles/mixers.h"

#include <math.h>
#include <stdlib.h>

enum { Q, K, V, O, Q_BIAS, K_BIAS, V_BIAS, O_BIAS, U, U_BIAS };

static double *features(const attn_mixer_options *o, int64_t rows, const double *x, const double *w,
                        const double *bias) {
  int64_t width = o->heads * o->dim;
  double *y = oracle_affine(rows, width, o->hidden, x, w, bias);
  double above = o->feature_map == ATTN_FEATURES_ELU_PLUS_ONE ? 1 : 0;
  for (int64_t i = 0; i < rows * width; ++i) y[i] = above + (y[i] > 0 ? y[i] : exp(y[i]) - 1);
  if (o->rotary_dim > 0) oracle_rotate(o, rows, o->heads, o->dim, y);
  return y;
}

/* Queries of x and keys of c; a causal one sees keys up to its own place. */
static void layer(const attn_mixer_options *o, int64_t rows, const double *x, int64_t context_rows,
                  const double *context, bool causal, const double *const *p, double *y) {
  int64_t keys = o->heads * o->dim, values = o->heads * o->value_dim;
  double *q = features(o, rows, x, p[Q], p[Q_BIAS]);
  double *k = features(o, context_rows, context, p[K], p[K_BIAS]), *u = NULL;
  double *v = oracle_affine(context_rows, values, o->hidden, context, p[V], p[V_BIAS]);
  double *out = calloc((size_t)(rows * values + 1), sizeof *out);
  if (o->output_gate) {
    u = oracle_affine(rows, values, o->hidden, x, p[U], p[U_BIAS]);
    oracle_silu(u, rows * values);
    oracle_silu(v, context_rows * values);
  }
  for (int64_t h = 0; h < o->heads; ++h)
    for (int64_t t = 0; t < rows; ++t)
      for (int64_t s = 0; s < (causal ? t + 1 : context_rows); ++s) {
        double weight = 0;
        for (int64_t c = 0; c < o->dim; ++c)
          weight += q[t * keys + h * o->dim + c] * k[s * keys + h * o->dim + c];
        for (int64_t c = h * o->value_dim; c < (h + 1) * o->value_dim; ++c)
          out[t * values + c] += weight * v[s * values + c];
      }
  oracle_rms_normalise(out, rows, values, NULL, o->norm_epsilon);
  for (int64_t i = 0; u && i < rows * values; ++i) out[i] *= u[i];
  double *result = oracle_affine(rows, o->hidden, values, out, p[O], p[O_BIAS]);
  for (int64_t i = 0; i < rows * o->hidden; ++i) y[i] = result[i];
  free(q), free(k), free(v), free(u), free(out), free(result);
}

void oracle_norm_attention(const attn_mixer_options *o, int64_t rows, const double *x,
                           const double *const *p, double *y) {
  layer(o, rows, x, rows, x, !o->bidirectional, p, y);
}

void oracle_norm_attention_across(const attn_mixer_options *o, int64_t rows, const double *x,
                                  int64_t context_rows, const double *context,
                                  const double *const *p, double *y) {
  layer(o, rows, x, context_rows, context, false, p, y);
}
