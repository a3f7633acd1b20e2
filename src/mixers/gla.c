/* Gated linear attention (arXiv 2312.06635).
 *
 *   q, k, v = x Wq^T, x Wk^T, x Wv^T;  alpha = sigmoid(x W1^T W2^T + b)^(1/16) per key channel
 *   S_t = Diag(alpha_t) S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t / sqrt(dim)
 *   y = (RMSNorm_head(o) (.) silu(x Wg^T)) Wo^T */
#include "base/status.h"
#include "graph/operations.h"
#include "layers/layers.h"
#include "mixers/mixer.h"

#include <math.h>

enum { Q, K, V, GATE_DOWN, GATE_UP, GATE_BIAS, G, NORM, O };
enum { MATRIX };

static const double gate_temperature = 16; /* "gate_logit_normalizer" of the published layer */

static attn_status configure(attn_mixer_options *o) {
  const int64_t usual_heads = 4, usual_rank = 16;
  ATTN_TRY(attn_mixer_check_options(o, "gla"));
  if (!o->heads) o->heads = o->dim ? o->hidden / (2 * o->dim) : usual_heads;
  if (!o->heads) o->heads = 1;
  if (!o->dim) o->dim = o->hidden / 2 / o->heads;
  if (!o->value_dim) o->value_dim = 2 * o->dim;
  if (!o->gate_rank) o->gate_rank = o->hidden < usual_rank ? o->hidden : usual_rank;
  ATTN_TRY(attn_mixer_configure_heads(o, "gla"));
  if (o->kv_heads != o->heads)
    return attn_fail(ATTN_INVALID_ARGUMENT, "gla: num_kv_heads must equal num_heads");
  return ATTN_OK;
}

static int parameters(const attn_mixer_options *o, attn_parameter_shape *shapes) {
  int64_t keys = o->heads * o->dim, values = o->heads * o->value_dim;
  shapes[Q] = attn_matrix("q_proj.weight", keys, o->hidden);
  shapes[K] = attn_matrix("k_proj.weight", keys, o->hidden);
  shapes[V] = attn_matrix("v_proj.weight", values, o->hidden);
  shapes[GATE_DOWN] = attn_matrix("gk_proj.0.weight", o->gate_rank, o->hidden);
  shapes[GATE_UP] = attn_matrix("gk_proj.1.weight", keys, o->gate_rank);
  shapes[GATE_BIAS] = attn_vector("gk_proj.1.bias", keys, ATTN_INIT_CONSTANT, 0);
  shapes[G] = attn_matrix("g_proj.weight", values, o->hidden);
  shapes[NORM] = attn_vector("g_norm.weight", o->value_dim, ATTN_INIT_CONSTANT, 1);
  shapes[O] = attn_matrix("o_proj.weight", o->hidden, values);
  return 9;
}

static int state(const attn_mixer_options *o, attn_dtype compute, attn_state_part *parts) {
  parts[MATRIX] = (attn_state_part){.name = "state",
                                    .dtype = compute == ATTN_F64 ? ATTN_F64 : ATTN_F32,
                                    .rank = 3,
                                    .shape = {o->heads, o->dim, o->value_dim}};
  return 1;
}

static attn_var *apply(attn_graph *g, const attn_mixer_call *call, attn_var *x) {
  const attn_mixer_options *o = call->options;
  attn_parameter **p = call->parameters;
  attn_var *q = attn_split_heads(g, attn_op_linear(g, x, p[Q]), o->heads);
  attn_var *k = attn_split_heads(g, attn_op_linear(g, x, p[K]), o->heads);
  attn_var *v = attn_split_heads(g, attn_op_linear(g, x, p[V]), o->heads);
  attn_var *gate = attn_op_linear_wide(g, attn_op_linear(g, x, p[GATE_DOWN]), p[GATE_UP]);
  gate = attn_op_add_bias(g, gate, attn_mixer_parameter(g, call, GATE_BIAS));
  gate = attn_op_scale(g, attn_op_activate(g, ATTN_LOG_SIGMOID, gate), 1 / gate_temperature);

  attn_recurrent_problem problem = ATTN_RECURRENT_PROBLEM_INIT;
  problem.decay = ATTN_DECAY_CHANNEL;
  problem.scale = 1 / sqrt((double)o->dim);
  attn_var *out = attn_mixer_recurrent(g, call, MATRIX, &problem, q, k, v,
                                       attn_split_heads(g, gate, o->heads), NULL);
  out = attn_layer_rms_norm(g, out, attn_mixer_parameter(g, call, NORM), o->norm_epsilon);
  out = attn_join_heads(g, &call->layout, out);
  attn_var *output_gate = attn_op_linear(g, x, p[G]);
  return attn_op_linear(g, attn_op_gate(g, ATTN_SILU, output_gate, out), p[O]);
}

const attn_mixer attn_mixer_gla = {
    .info = {.name = "gla",
             .title = "Gated Linear Attention Transformers with Hardware-Efficient Training",
             .arxiv = "2312.06635",
             .abilities = ATTN_ABILITY_CAUSAL | ATTN_ABILITY_DECODE | ATTN_ABILITY_RAGGED |
                          ATTN_ABILITY_TRAINABLE,
             .summary = "linear attention with a learned decay per key channel and token"},
    .configure = configure,
    .parameters = parameters,
    .state = state,
    .apply = apply,
};
