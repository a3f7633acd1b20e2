/* DiagAttention of TransNormer (arXiv 2210.10340, section 4.2): exact attention inside blocks of w
 * tokens that do not overlap, for the early layers, where linear attention would spread its weights
 * too thinly.
 *
 *   q, k, v = x Wq^T + bq, x Wk^T + bk, x Wv^T + bv;  q, k with rotary positions
 *   o_i = sum_j softmax_j(q_i . k_j / sqrt(dim)) v_j over w floor(i / w) <= j <= i
 *   y = o Wo^T + bo
 *   bidirectional: over the whole block, w floor(i / w) <= j < w floor(i / w) + w
 *
 * This is the paper's T2. T1 (relu_scores) has max(0, q_i . k_j / sqrt(dim)) for the weights, which
 * are not divided by their sum; in its place o is normalised, as NormAttention's:
 *
 *   y = SRMSNorm(o) Wo^T + bo, the norm over all heads together
 *
 * The mask comes before the softmax and the last block has no padding,
 * unlike in the released code. Blocks are sequences to the engine. The state is the keys and values
 * of the block that the next token is in. */
#include "base/status.h"
#include "graph/operations.h"
#include "layers/layers.h"
#include "mixers/mixer.h"

#include <math.h>

enum { Q, K, V, O, Q_BIAS, K_BIAS, V_BIAS, O_BIAS };
enum { BLOCK }; /* the state: a row a token of the block, its keys and then its values */

static attn_status configure(attn_mixer_options *o) {
  const int64_t usual_block = 64;
  ATTN_TRY(attn_mixer_check_options(o, "diag_attention"));
  ATTN_TRY(attn_mixer_configure_heads(o, "diag_attention"));
  if (!o->block) o->block = usual_block;
  if (o->relu_scores && (o->kv_heads != o->heads || o->block > ATTN_RELU_LENGTH))
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "diag_attention: relu_scores needs num_kv_heads equal to num_heads and a "
                     "block_size of at most %d",
                     ATTN_RELU_LENGTH);
  return attn_mixer_configure_rotary(o, "diag_attention");
}

static int parameters(const attn_mixer_options *o, attn_parameter_shape *shapes) {
  int64_t queries = o->heads * o->dim, keys = o->kv_heads * o->dim;
  int64_t values = o->kv_heads * o->value_dim;
  shapes[Q] = attn_matrix("q_proj.weight", queries, o->hidden);
  shapes[K] = attn_matrix("k_proj.weight", keys, o->hidden);
  shapes[V] = attn_matrix("v_proj.weight", values, o->hidden);
  shapes[O] = attn_matrix("o_proj.weight", o->hidden, o->heads * o->value_dim);
  shapes[Q_BIAS] = attn_vector("q_proj.bias", queries, ATTN_INIT_CONSTANT, 0);
  shapes[K_BIAS] = attn_vector("k_proj.bias", keys, ATTN_INIT_CONSTANT, 0);
  shapes[V_BIAS] = attn_vector("v_proj.bias", values, ATTN_INIT_CONSTANT, 0);
  shapes[O_BIAS] = attn_vector("o_proj.bias", o->hidden, ATTN_INIT_CONSTANT, 0);
  return O_BIAS + 1;
}

static int state(const attn_mixer_options *o, attn_dtype compute, attn_state_part *parts) {
  parts[BLOCK] = (attn_state_part){.name = "block",
                                   .dtype = compute,
                                   .rank = 2,
                                   .shape = {o->block, o->kv_heads * (o->dim + o->value_dim)},
                                   .block = o->block};
  return 1;
}

static int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

/* Blocks ----------------------------------------------------------------------------------------
 */

/* Rows first .. of each sequence cut into blocks, which begin anew with each: writes where they end
 * if `ends` is not NULL; how many there are. */
static int64_t cut(const attn_layout *layout, int64_t block, int32_t *ends) {
  int64_t count = 0;
  for (int64_t b = 0; b < layout->batch; ++b) {
    int64_t first = attn_layout_first(layout, b), length = attn_layout_length(layout, b);
    for (int64_t at = 0; at < length; at += block, ++count)
      if (ends) ends[count] = (int32_t)(first + least(at + block, length));
  }
  return count;
}

/* The blocks of a layout as sequences; false after an error. */
static bool blocks_of(attn_graph *g, const attn_layout *layout, int64_t block,
                      attn_layout *blocks) {
  if (!layout->offsets && layout->length <= block) {
    *blocks = attn_layout_equal(layout->batch, layout->length);
    return true;
  }
  if (!layout->offsets && layout->length % block == 0) {
    *blocks = attn_layout_equal(layout->rows / block, block);
    return true;
  }
  int64_t count = cut(layout, block, NULL);
  int32_t *offsets = attn_arena_alloc(g->arena, (size_t)(count + 1) * sizeof *offsets);
  if (!offsets) {
    attn_graph_error(g, ATTN_OUT_OF_MEMORY);
    return false;
  }
  offsets[0] = 0;
  cut(layout, block, offsets + 1);
  *blocks = attn_layout_packed(count, offsets);
  return true;
}

static attn_softmax_problem problem_of(const attn_mixer_options *o) {
  attn_softmax_problem problem = ATTN_SOFTMAX_PROBLEM_INIT;
  problem.causal = !o->bidirectional;
  return problem;
}

/* Attention within blocks, with the weights of this layer; the result in any shape of rows. */
static attn_var *weigh(attn_graph *g, const attn_mixer_options *o, const attn_layout *blocks,
                       attn_var *q, attn_var *k, attn_var *v) {
  attn_softmax_problem problem = problem_of(o);
  if (!o->relu_scores) return attn_mixer_softmax_within(g, blocks, &problem, q, k, v);
  return attn_op_relu_attention(g, blocks, blocks, problem.causal, 1 / sqrt((double)o->dim), q, k,
                                v);
}

/* Sequences that begin with a block: q, k, v [rows, heads, dim]. */
static attn_var *within_blocks(attn_graph *g, const attn_mixer_options *o,
                               const attn_layout *layout, attn_var *q, attn_var *k, attn_var *v) {
  attn_layout blocks;
  if (!q || !k || !v || !blocks_of(g, layout, o->block, &blocks)) return NULL;
  return attn_join_heads(g, layout, weigh(g, o, &blocks, q, k, v));
}

/* With a state ----------------------------------------------------------------------------------
 */

/* Keys or values of the block [1, block, kv_heads, dim], from column `column` of its rows on. */
static attn_tensor block_view(const attn_state *state, int64_t column, int64_t heads, int64_t dim) {
  attn_tensor rows = attn_state_fixed(state, BLOCK), view = rows;
  view.rank = 4;
  view.data = (char *)rows.data + column * (int64_t)attn_dtype_size(rows.dtype);
  view.shape[0] = 1, view.stride[0] = rows.shape[0] * rows.stride[0];
  view.shape[1] = rows.shape[0], view.stride[1] = rows.stride[0];
  view.shape[2] = heads, view.stride[2] = dim;
  view.shape[3] = dim, view.stride[3] = 1;
  return view;
}

/* Rows first .. first + count of keys or values [rows, kv_heads, dim] into the block. */
static void put(attn_graph *g, const attn_mixer_call *call, attn_var *x, int64_t first,
                int64_t count, int64_t at, int64_t column) {
  attn_tensor joined, part;
  int64_t shape[2] = {x->value.shape[0], x->value.shape[1] * x->value.shape[2]};
  attn_status status = attn_tensor_reshape(&x->value, 2, shape, &joined);
  if (status == ATTN_OK) status = attn_tensor_slice(&joined, 0, first, count, &part);
  if (status == ATTN_OK) status = attn_mixer_put(g, call, BLOCK, at, column, &part);
  if (status != ATTN_OK) attn_graph_error(g, status);
}

static void put_both(attn_graph *g, const attn_mixer_call *call, attn_var *k, attn_var *v,
                     int64_t first, int64_t count, int64_t at) {
  const attn_mixer_options *o = call->options;
  put(g, call, k, first, count, at, 0);
  put(g, call, v, first, count, at, o->kv_heads * o->dim);
}

/* Queries [rows, heads, dim], the last of as many keys of the block as there are. A replay could
 * not change how many that is. */
static attn_var *relu_over_block(attn_graph *g, const attn_mixer_call *call, attn_var *q,
                                 int64_t count) {
  const attn_mixer_options *o = call->options;
  attn_layout layout = attn_layout_equal(1, q ? q->value.shape[0] : 1);
  attn_layout keys = attn_layout_equal(1, count);
  attn_tensor k = block_view(call->state, 0, o->heads, o->dim), k_rows;
  attn_tensor v = block_view(call->state, o->heads * o->dim, o->heads, o->value_dim), v_rows;
  if (g->replay)
    return attn_graph_fail(g, ATTN_UNSUPPORTED, "diag_attention: relu_scores in a replayed step");
  attn_status status = attn_tensor_select(&k, 0, 0, &k_rows);
  if (status == ATTN_OK) status = attn_tensor_select(&v, 0, 0, &v_rows);
  if (status != ATTN_OK) return attn_graph_error(g, status);
  k_rows.shape[0] = v_rows.shape[0] = count;
  return attn_op_relu_attention(g, &layout, &keys, true, 1 / sqrt((double)o->dim), q,
                                attn_graph_input(g, &k_rows), attn_graph_input(g, &v_rows));
}

/* Rows first .. first + count, none beyond the block: into the state, to attend over what it then
 * holds of the block. */
static attn_var *continue_block(attn_graph *g, const attn_mixer_call *call, attn_var *q,
                                attn_var *k, attn_var *v, int64_t first, int64_t count) {
  const attn_mixer_options *o = call->options;
  int64_t at = (attn_state_position(call->state) + first) % o->block;
  put_both(g, call, k, v, first, count, at);
  if (o->relu_scores) {
    attn_layout rows = attn_layout_equal(1, count);
    attn_var *queries = attn_view_slice(g, q, 0, first, count);
    return attn_join_heads(g, &rows, relu_over_block(g, call, queries, at + count));
  }
  attn_softmax_args args = {.key_lengths = attn_mixer_block_length(g, call, BLOCK, at + count - 1)};
  if (g->status != ATTN_OK) return NULL;
  attn_tensor keys = block_view(call->state, 0, o->kv_heads, o->dim);
  attn_tensor values = block_view(call->state, o->kv_heads * o->dim, o->kv_heads, o->value_dim);
  attn_softmax_problem problem = problem_of(o);
  attn_layout layout = attn_layout_equal(1, count);
  q = attn_as_sequences(g, &layout, attn_view_slice(g, q, 0, first, count));
  attn_var *out = attn_op_softmax(g, &problem, &args, q, attn_graph_input(g, &keys),
                                  attn_graph_input(g, &values));
  return attn_join_heads(g, &layout, out);
}

/* What is behind the block that the state ends in: rows first .. of whole blocks and the beginning
 * of another, which the state keeps. */
static attn_var *begin_blocks(attn_graph *g, const attn_mixer_call *call, attn_var *q, attn_var *k,
                              attn_var *v, int64_t first) {
  const attn_mixer_options *o = call->options;
  int64_t rows = call->layout.rows, count = rows - first, kept = count % o->block;
  attn_layout layout = attn_layout_equal(1, count);
  if (kept) put_both(g, call, k, v, rows - kept, kept, 0);
  return within_blocks(g, o, &layout, attn_view_slice(g, q, 0, first, count),
                       attn_view_slice(g, k, 0, first, count),
                       attn_view_slice(g, v, 0, first, count));
}

/* Pieces of the rows: those that end the block that the state is in, then all others. A few rows go
 * one by one, so that their bits are those of as many steps. */
static attn_var *with_state(attn_graph *g, const attn_mixer_call *call, attn_var *q, attn_var *k,
                            attn_var *v) {
  const attn_mixer_options *o = call->options;
  int64_t rows = call->layout.rows, at = attn_state_position(call->state) % o->block;
  bool one_by_one = rows == 1 || attn_mixer_few_rows(call);
  int64_t ends = one_by_one ? rows : at ? least(rows, o->block - at) : 0;
  if (ends == rows && (rows == 1 || !one_by_one)) return continue_block(g, call, q, k, v, 0, rows);
  if (ends == 0) return begin_blocks(g, call, q, k, v, 0);
  attn_tensor all = attn_graph_tensor(g, g->compute, 2, (int64_t[]){rows, o->heads * o->value_dim});
  for (int64_t r = 0, count; r < rows && all.data; r += count) {
    count = one_by_one ? 1 : r ? rows - r : ends;
    attn_var *y = one_by_one || !r ? continue_block(g, call, q, k, v, r, count)
                                   : begin_blocks(g, call, q, k, v, r);
    attn_tensor target;
    if (!y) return NULL;
    attn_status status = attn_tensor_slice(&all, 0, r, count, &target);
    if (status != ATTN_OK) return attn_graph_error(g, status);
    attn_add_tensor(g, &target, &y->value, 1, false);
  }
  return attn_graph_input(g, &all);
}

/* The layer -------------------------------------------------------------------------------------
 */

static attn_var *position(attn_graph *g, const attn_mixer_call *call, attn_var *x) {
  const attn_mixer_options *o = call->options;
  return o->rotary_dim > 0 ? attn_layer_rotary(g, x, &call->layout, o->rotary_dim, &o->rope) : x;
}

static attn_var *attention(attn_graph *g, const attn_mixer_call *call, attn_var *const *in,
                           int which) {
  attn_var *q = position(g, call, in[Q]), *k = position(g, call, in[K]);
  (void)which;
  if (!q || !k) return NULL;
  if (call->state) return with_state(g, call, q, k, in[V]);
  return within_blocks(g, call->options, &call->layout, q, k, in[V]);
}

static attn_var *project(attn_graph *g, const attn_mixer_call *call, attn_var *x, int weight,
                         int bias) {
  attn_var *y = attn_op_linear(g, x, call->parameters[weight]);
  return attn_op_add_bias(g, y, attn_mixer_parameter(g, call, bias));
}

static attn_var *apply(attn_graph *g, const attn_mixer_call *call, attn_var *x) {
  const attn_mixer_options *o = call->options;
  attn_var *heads[] = {[Q] = attn_split_heads(g, project(g, call, x, Q, Q_BIAS), o->heads),
                       [K] = attn_split_heads(g, project(g, call, x, K, K_BIAS), o->kv_heads),
                       [V] = attn_split_heads(g, project(g, call, x, V, V_BIAS), o->kv_heads)};
  attn_var *out = attn_mixer_each(g, call, attention, 0, 3, heads);
  if (o->relu_scores) out = attn_layer_rms_norm(g, out, NULL, o->norm_epsilon);
  return project(g, call, out, O, O_BIAS);
}

const attn_mixer attn_mixer_diag_attention = {
    .info = {.name = "diag_attention",
             .title = "The Devil in Linear Transformer",
             .arxiv = "2210.10340",
             .abilities = ATTN_ABILITY_CAUSAL | ATTN_ABILITY_BIDIRECTIONAL | ATTN_ABILITY_DECODE |
                          ATTN_ABILITY_RAGGED | ATTN_ABILITY_TRAINABLE,
             .summary = "exact attention inside blocks of tokens: TransNormer's early layers"},
    .configure = configure,
    .parameters = parameters,
    .state = state,
    .apply = apply,
};
