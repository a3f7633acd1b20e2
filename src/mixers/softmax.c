/* Exact softmax attention, multi-head, grouped or multi-query, whole or windowed.
 *
 *   q, k, v = x Wq^T, x Wk^T, x Wv^T (with biases, optional)
 *   q, k normalised by head (Qwen3, optional), then turned by position (rotary, optional)
 *   o_i = sum_j softmax_j(scale q_i . k_j) v_j over i - window < j <= i;  y = o Wo^T
 *   or y = (o (.) sigmoid(x Wg^T)) Wo^T (Qwen3-Next; arXiv 2505.06708)
 *   bidirectional (BERT, arXiv 1810.04805): over i - window < j < i + window
 *   with a context c: k, v = c Wk^T, c Wv^T, over all j
 *
 * FlashAttention (arXiv 2205.14135) is how it is computed; GQA: 2305.13245; rotary: 2104.09864;
 * sliding window as in Longformer (2004.05150) and Mistral (2310.06825). */
#include "base/status.h"
#include "graph/operations.h"
#include "layers/layers.h"
#include "mixers/shared/heads.h"

enum { Q, K, V, O, OPTIONAL }; /* behind them, if there is one, the gate */
enum { KV };                   /* the state: a row a token, its keys and then its values */

static attn_status configure(attn_mixer_options *o) {
  ATTN_TRY(attn_mixer_check_options(o, "softmax"));
  ATTN_TRY(attn_mixer_configure_heads(o, "softmax"));
  return attn_mixer_configure_rotary(o, "softmax");
}

static int parameters(const attn_mixer_options *o, attn_parameter_shape *shapes) {
  attn_heads_matrices(o, shapes);
  int count = OPTIONAL + attn_heads_parameters(o, shapes + OPTIONAL);
  if (o->output_gate)
    shapes[count++] = attn_matrix("g_proj.weight", o->heads * o->value_dim, o->hidden);
  return count;
}

static int state(const attn_mixer_options *o, attn_dtype compute, attn_state_part *parts) {
  parts[KV] = (attn_state_part){.name = "kv",
                                .kind = ATTN_STATE_ROWS,
                                .dtype = compute,
                                .rank = 1,
                                .shape = {o->kv_heads * (o->dim + o->value_dim)},
                                .window = o->window};
  return 1;
}

/* The keys or values in all pages: [pages, page, kv_heads, dim] from column `column` on. */
static attn_tensor page_view(const attn_state *state, int64_t column, int64_t heads, int64_t dim) {
  attn_tensor pages = attn_state_pages(state, KV), view = pages;
  view.rank = 4;
  view.data = (char *)pages.data + column * (int64_t)attn_dtype_size(pages.dtype);
  view.shape[2] = heads;
  view.stride[2] = dim;
  view.shape[3] = dim;
  view.stride[3] = 1;
  return view;
}

/* Appends k and v [rows, kv_heads, dim] and attends over everything that the state holds. */
static attn_var *attend_with_state(attn_graph *g, const attn_mixer_call *call,
                                   attn_softmax_problem problem, attn_var *q, attn_var *k,
                                   attn_var *v) {
  const attn_mixer_options *o = call->options;
  int64_t values = o->kv_heads * o->dim, rows = call->layout.rows;
  attn_var *k_joined = attn_join_heads(g, &call->layout, k);
  attn_var *v_joined = attn_join_heads(g, &call->layout, v);
  if (!k_joined || !v_joined) return NULL;
  attn_tensor k_rows = attn_as_rows(g, &k_joined->value);
  attn_tensor v_rows = attn_as_rows(g, &v_joined->value);
  if (!k_rows.data || !v_rows.data) return NULL;
  attn_status status = attn_mixer_append(g, call, KV, 0, &k_rows);
  if (status == ATTN_OK) status = attn_mixer_append(g, call, KV, values, &v_rows);
  if (status != ATTN_OK) return attn_graph_error(g, status);

  attn_tensor table = attn_state_page_table(call->state, KV);
  const int32_t *length = attn_mixer_key_length(g, call);
  if (!length) return NULL;
  problem.paged = true;
  problem.page_size = ATTN_PAGE_TOKENS;
  problem.key_length = table.shape[1] * ATTN_PAGE_TOKENS;
  attn_softmax_args args = {.page_table = table, .key_lengths = length};
  attn_tensor k_pages = page_view(call->state, 0, o->kv_heads, o->dim);
  attn_tensor v_pages = page_view(call->state, values, o->kv_heads, o->value_dim);
  q = attn_as_sequences(g, &call->layout, q);
  attn_var *keys_of = attn_graph_input(g, &k_pages), *values_of = attn_graph_input(g, &v_pages);
  if (attn_mixer_few_rows(call))
    return attn_mixer_softmax_rows(g, &problem, &args, q, keys_of, values_of, *length - rows + 1);
  return attn_op_softmax(g, &problem, &args, q, keys_of, values_of);
}

/* From projected heads q, k, v to what attention gives. */
static attn_var *attention(attn_graph *g, const attn_mixer_call *call, attn_var *const *in,
                           int which) {
  const attn_mixer_options *o = call->options;
  attn_var *q = attn_heads_position(g, call, in[Q], OPTIONAL, ATTN_HEADS_Q_NORM);
  attn_mixer_call keys = attn_mixer_key_call(call);
  attn_var *k = attn_heads_position(g, &keys, in[K], OPTIONAL, ATTN_HEADS_K_NORM);
  (void)which;
  if (!q || !k) return NULL;
  attn_softmax_problem problem = ATTN_SOFTMAX_PROBLEM_INIT;
  problem.causal = !o->bidirectional && !call->context;
  problem.soft_cap = o->soft_cap;
  problem.scale = o->scale;
  if (o->window) problem.window_left = o->window - 1;
  if (o->window && o->bidirectional) problem.window_right = o->window - 1;
  return call->state
             ? attend_with_state(g, call, problem, q, k, in[V])
             : attn_mixer_softmax_across(g, &call->layout, &keys.layout, &problem, q, k, in[V]);
}

static attn_var *apply(attn_graph *g, const attn_mixer_call *call, attn_var *x) {
  const attn_mixer_options *o = call->options;
  attn_var *q = attn_heads_project(g, call, x, Q, OPTIONAL, ATTN_HEADS_Q_BIAS);
  attn_var *of_keys = attn_mixer_key_rows(call, x);
  attn_var *k = attn_heads_project(g, call, of_keys, K, OPTIONAL, ATTN_HEADS_K_BIAS);
  attn_var *v = attn_heads_project(g, call, of_keys, V, OPTIONAL, ATTN_HEADS_V_BIAS);
  attn_var *heads[] = {[Q] = attn_split_heads(g, q, o->heads),
                       [K] = attn_split_heads(g, k, o->kv_heads),
                       [V] = attn_split_heads(g, v, o->kv_heads)};
  attn_var *out = attn_mixer_each(g, call, attention, 0, 3, heads);
  if (o->output_gate) {
    attn_parameter_shape shapes[ATTN_MIXER_PARAMETERS];
    int gate = parameters(o, shapes) - 1;
    out = attn_op_gate(g, ATTN_SIGMOID, attn_op_linear(g, x, call->parameters[gate]), out);
  }
  return call->heads ? out : attn_heads_project(g, call, out, O, OPTIONAL, ATTN_HEADS_O_BIAS);
}

const attn_mixer attn_mixer_softmax = {
    .info = {.name = "softmax",
             .title = "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
             .arxiv = "2205.14135",
             .abilities = ATTN_ABILITY_CAUSAL | ATTN_ABILITY_BIDIRECTIONAL | ATTN_ABILITY_CROSS |
                          ATTN_ABILITY_DECODE | ATTN_ABILITY_RAGGED | ATTN_ABILITY_TRAINABLE,
             .summary = "exact attention: MHA, GQA, MQA, sliding window, rotary positions"},
    .heads = true,
    .configure = configure,
    .parameters = parameters,
    .state = state,
    .apply = apply,
};
