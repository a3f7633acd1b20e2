/* Aaren: attention as a recurrent network (arXiv 2405.13956). Softmax attention of one learned
 * query for all positions, which makes of each token a running mean with three numbers of state.
 *
 *   q = h Wq^T for a learned h, k_t = x_t Wk^T, v_t = x_t Wv^T, s_t = q . k_t / sqrt(dim)
 *   o_t = sum_{j <= t} exp(s_j) v_j / sum_{j <= t} exp(s_j),  y = o Wo^T
 *
 * With m the greatest score so far a step is m' = max(m, s), u' = u e^(m - m') + e^(s - m'), w' = w
 * e^(m - m') + e^(s - m') v, o = w' / u' (section 3.1). There are no positions: the past has no
 * order. */
#include "base/status.h"
#include "graph/operations.h"
#include "layers/layers.h"
#include "mixers/mixer.h"

#include <math.h>

enum { QUERY, Q, K, V, O };
enum { GREATEST, SUM, WEIGHTED };

static attn_status configure(attn_mixer_options *o) {
  ATTN_TRY(attn_mixer_check_options(o, "aaren"));
  ATTN_TRY(attn_mixer_configure_heads(o, "aaren"));
  if (o->kv_heads != o->heads)
    return attn_fail(ATTN_INVALID_ARGUMENT, "aaren: num_kv_heads must equal num_heads");
  return ATTN_OK;
}

static int parameters(const attn_mixer_options *o, attn_parameter_shape *shapes) {
  int64_t keys = o->heads * o->dim, values = o->heads * o->value_dim;
  shapes[QUERY] = attn_vector("query", o->hidden, ATTN_INIT_NORMAL, ATTN_INIT_STD);
  shapes[Q] = attn_matrix("q_proj.weight", keys, o->hidden);
  shapes[K] = attn_matrix("k_proj.weight", keys, o->hidden);
  shapes[V] = attn_matrix("v_proj.weight", values, o->hidden);
  shapes[O] = attn_matrix("o_proj.weight", o->hidden, values);
  return O + 1;
}

static int state(const attn_mixer_options *o, attn_dtype compute, attn_state_part *parts) {
  attn_dtype wide = compute == ATTN_F64 ? ATTN_F64 : ATTN_F32;
  parts[GREATEST] =
      (attn_state_part){.name = "maximum", .dtype = wide, .rank = 1, .shape = {o->heads}};
  parts[SUM] = (attn_state_part){.name = "sum", .dtype = wide, .rank = 1, .shape = {o->heads}};
  parts[WEIGHTED] = (attn_state_part){
      .name = "weighted_sum", .dtype = wide, .rank = 2, .shape = {o->heads, o->value_dim}};
  return 3;
}

/* s [rows, heads], v [rows, heads, value_dim]: the running means. */
static attn_var *means(attn_graph *g, const attn_mixer_call *call, attn_var *const *in, int which) {
  (void)which;
  if (!call->state) return attn_op_prefix_softmax(g, &call->layout, in[0], in[1], NULL);
  attn_prefix_state past = {.greatest = attn_state_fixed(call->state, GREATEST),
                            .sum = attn_state_fixed(call->state, SUM),
                            .weighted = attn_state_fixed(call->state, WEIGHTED)};
  return attn_op_prefix_softmax(g, &call->layout, in[0], in[1], &past);
}

static attn_var *apply(attn_graph *g, const attn_mixer_call *call, attn_var *x) {
  const attn_mixer_options *o = call->options;
  attn_parameter **p = call->parameters;
  attn_var *token = attn_mixer_parameter(g, call, QUERY);
  token = token ? attn_view_reshape(g, token, 2, (int64_t[]){1, o->hidden}) : NULL;
  attn_var *q = attn_split_heads(g, attn_op_linear_wide(g, token, p[Q]), o->heads);
  attn_var *k = attn_split_heads(g, attn_op_linear(g, x, p[K]), o->heads);
  attn_var *s = attn_op_scale(g, attn_op_head_scores(g, k, q), 1 / sqrt((double)o->dim));
  attn_var *in[] = {s, attn_split_heads(g, attn_op_linear(g, x, p[V]), o->heads)};
  return attn_op_linear(g, attn_mixer_each(g, call, means, 0, 2, in), p[O]);
}

const attn_mixer attn_mixer_aaren = {
    .info = {.name = "aaren",
             .title = "Attention as an RNN",
             .arxiv = "2405.13956",
             .abilities = ATTN_ABILITY_CAUSAL | ATTN_ABILITY_DECODE | ATTN_ABILITY_RAGGED |
                          ATTN_ABILITY_TRAINABLE,
             .summary = "softmax attention of one learned query: running means of the past"},
    .configure = configure,
    .parameters = parameters,
    .state = state,
    .apply = apply,
};
