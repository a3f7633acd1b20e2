/* Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; V3, 2412.19437).
 *
 *   q_h = [qC_h; qR_h] = (W_Q x)_h, or (W_Q RMSNorm(W_DQ x))_h
 *   [a; b] = W_DKV x;  c = RMSNorm(a);  kR = RoPE(b), one for all heads;  qR_h = RoPE(qR_h)
 *   kC_h = W_UK,h c;  v_h = W_UV,h c
 *   o_h = sum_j softmax_j(scale (qC_h . kC_h(j) + qR_h . kR(j))) v_h(j);  y = W_O o
 *
 * Only c and kR are kept of a token. A few new tokens are absorbed: qC_h . kC_h = (W_UK,h^T qC_h) .
 * c, so that all heads attend over the latents themselves, and W_UV,h meets what they give. Many
 * are expanded: keys and values of every head are made from the latents (section 2.1.2). */
#include "base/status.h"
#include "graph/operations.h"
#include "layers/layers.h"
#include "mixers/mixer.h"

#include <math.h>
#include <string.h>

enum { Q, KV_DOWN, KV_NORM, K_UP, V_UP, O, Q_DOWN, Q_NORM };
enum { LATENT }; /* the state: a row a token, c and then kR */

enum {
  EXPANDED_ROWS = 64,         /* from so many new tokens on, behind others */
  EXPANDED_BYTES = 256 << 20, /* as long as keys and values take no more than this */
  MOST_LATENT = 1024,         /* what the softmax engine takes as a head, kR included */
};

static attn_status configure(attn_mixer_options *o) {
  const int64_t usual_heads_of_latent = 4; /* V2's latent is as wide as four heads, here
                                            * at most as the model */
  bool given = o->latent_rank != 0;
  ATTN_TRY(attn_mixer_check_options(o, "mla"));
  ATTN_TRY(attn_mixer_configure_heads(o, "mla"));
  if (o->kv_heads != o->heads)
    return attn_fail(ATTN_INVALID_ARGUMENT, "mla: all %lld heads have keys, not %lld",
                     (long long)o->heads, (long long)o->kv_heads);
  if (!o->shared_dim) o->shared_dim = o->dim > 3 ? o->dim / 4 * 2 : 2;
  if (!o->latent_rank) o->latent_rank = usual_heads_of_latent * o->dim;
  if (o->latent_rank > o->hidden && !given) o->latent_rank = o->hidden;
  if (!o->rotary_dim) o->rotary_dim = o->shared_dim % 2 ? -1 : o->shared_dim;
  if (o->rotary_dim > 0 && o->rotary_dim != o->shared_dim)
    return attn_fail(ATTN_INVALID_ARGUMENT, "mla: rotary_dim %lld is not the shared %lld channels",
                     (long long)o->rotary_dim, (long long)o->shared_dim);
  if (o->latent_rank + o->shared_dim > MOST_LATENT)
    return attn_fail(ATTN_INVALID_ARGUMENT, "mla: latents of %lld + %lld channels, at most %d",
                     (long long)o->latent_rank, (long long)o->shared_dim, MOST_LATENT);
  bool factors = o->rotary_dim > 0 && o->rope.scaling == ATTN_ROPE_FACTORS;
  if (factors && (!o->rope.factors || o->rope.factor_count != o->shared_dim / 2))
    return attn_fail(ATTN_INVALID_ARGUMENT, "mla: %lld rotary factors, expected %lld",
                     (long long)o->rope.factor_count, (long long)o->shared_dim / 2);
  if (o->rope.base == 0) o->rope.base = 10000;
  if (o->rope.base > 1) return ATTN_OK;
  return attn_fail(ATTN_INVALID_ARGUMENT, "mla: rope_theta %g is not above 1", o->rope.base);
}

static int parameters(const attn_mixer_options *o, attn_parameter_shape *shapes) {
  int64_t queries = o->heads * (o->dim + o->shared_dim);
  shapes[Q] = o->query_rank ? attn_matrix("q_up_proj.weight", queries, o->query_rank)
                            : attn_matrix("q_proj.weight", queries, o->hidden);
  shapes[KV_DOWN] = attn_matrix("kv_down_proj.weight", o->latent_rank + o->shared_dim, o->hidden);
  shapes[KV_NORM] = attn_vector("kv_norm.weight", o->latent_rank, ATTN_INIT_CONSTANT, 1);
  shapes[K_UP] = attn_matrix("k_up_proj.weight", o->heads * o->dim, o->latent_rank);
  shapes[V_UP] = attn_matrix("v_up_proj.weight", o->heads * o->value_dim, o->latent_rank);
  shapes[O] = attn_matrix("o_proj.weight", o->hidden, o->heads * o->value_dim);
  if (!o->query_rank) return Q_DOWN;
  shapes[Q_DOWN] = attn_matrix("q_down_proj.weight", o->query_rank, o->hidden);
  shapes[Q_NORM] = attn_vector("q_norm.weight", o->query_rank, ATTN_INIT_CONSTANT, 1);
  return Q_NORM + 1;
}

static int state(const attn_mixer_options *o, attn_dtype compute, attn_state_part *parts) {
  parts[LATENT] = (attn_state_part){.name = "latent",
                                    .kind = ATTN_STATE_ROWS,
                                    .dtype = compute,
                                    .rank = 1,
                                    .shape = {o->latent_rank + o->shared_dim}};
  return 1;
}

/* What both forms begin with. */
typedef struct inputs {
  attn_var *q, *q_shared; /* [rows, heads, dim] without positions; [rows, heads, shared] with */
  attn_var *latent;       /* c [rows, 1, rank] */
  attn_var *k_shared;     /* kR [rows, 1, shared] */
} inputs;

static attn_var *turn(attn_graph *g, const attn_mixer_call *call, attn_var *x) {
  const attn_mixer_options *o = call->options;
  return o->rotary_dim > 0 ? attn_layer_rotary(g, x, &call->layout, o->rotary_dim, &o->rope) : x;
}

/* From projected queries [rows, heads, dim + shared] and W_DKV x [rows, 1, rank + shared]. */
static inputs take_apart(attn_graph *g, const attn_mixer_call *call, attn_var *const *in) {
  const attn_mixer_options *o = call->options;
  attn_var *latent = attn_view_slice(g, in[1], 2, 0, o->latent_rank);
  attn_var *shared = attn_view_slice(g, in[1], 2, o->latent_rank, o->shared_dim);
  return (inputs){
      .q = attn_view_slice(g, in[0], 2, 0, o->dim),
      .q_shared = turn(g, call, attn_view_slice(g, in[0], 2, o->dim, o->shared_dim)),
      .latent =
          attn_layer_rms_norm(g, latent, attn_mixer_parameter(g, call, KV_NORM), o->norm_epsilon),
      .k_shared = turn(g, call, shared),
  };
}

static attn_softmax_problem problem_of(const attn_mixer_options *o) {
  attn_softmax_problem problem = ATTN_SOFTMAX_PROBLEM_INIT;
  problem.causal = true;
  problem.scale = o->scale > 0 ? o->scale : 1 / sqrt((double)(o->dim + o->shared_dim));
  return problem;
}

/* Keys and values of every head from latents [keys, 1, rank] and kR [keys, 1, shared]. */
static attn_var *expanded(attn_graph *g, const attn_mixer_call *call, attn_var *q, attn_var *latent,
                          attn_var *k_shared) {
  const attn_mixer_options *o = call->options;
  const attn_layout *layout = &call->layout;
  attn_softmax_problem problem = problem_of(o);
  attn_softmax_args args = {0};
  if (!latent || !q) return NULL;
  int64_t keys = latent->value.shape[0];
  latent = attn_view_reshape(g, latent, 2, (int64_t[]){keys, o->latent_rank});
  attn_var *k = attn_split_heads(g, attn_op_linear(g, latent, call->parameters[K_UP]), o->heads);
  attn_var *v = attn_split_heads(g, attn_op_linear(g, latent, call->parameters[V_UP]), o->heads);
  k = attn_layer_append_channels(g, k, k_shared);
  problem.ragged = layout->offsets != NULL;
  if (problem.ragged) {
    problem.batch = layout->batch;
    problem.query_length = problem.key_length = layout->length;
    args.query_offsets = args.key_offsets = layout->offsets;
  }
  attn_layout of_keys = *layout;
  if (call->state) of_keys = attn_layout_equal(1, keys);
  return attn_op_softmax(g, &problem, &args, attn_as_sequences(g, layout, q),
                         attn_as_sequences(g, &of_keys, k), attn_as_sequences(g, &of_keys, v));
}

/* The heads as those of one key: over the pages of the state. */
static attn_var *absorbed(attn_graph *g, const attn_mixer_call *call, const inputs *in,
                          int64_t keys) {
  const attn_mixer_options *o = call->options;
  attn_softmax_problem problem = problem_of(o);
  attn_tensor table = attn_state_page_table(call->state, LATENT);
  attn_tensor pages = attn_state_pages(call->state, LATENT), k = pages, v;
  const int32_t *length = attn_mixer_key_length(g, call);
  if (!length) return NULL;
  problem.paged = true;
  problem.page_size = ATTN_PAGE_TOKENS;
  problem.key_length = table.shape[1] * ATTN_PAGE_TOKENS;
  attn_softmax_args args = {.page_table = table, .key_lengths = length};
  k.rank = 4;
  k.shape[2] = 1, k.stride[2] = pages.shape[2];
  k.shape[3] = pages.shape[2], k.stride[3] = 1;
  v = k;
  v.shape[3] = o->latent_rank;
  attn_var *q = attn_layer_absorb(g, in->q, call->parameters[K_UP]);
  q = attn_layer_append_channels(g, q, in->q_shared);
  q = attn_as_sequences(g, &call->layout, q);
  attn_var *keys_of = attn_graph_input(g, &k), *values_of = attn_graph_input(g, &v);
  int64_t rows = call->layout.rows;
  attn_var *out =
      attn_mixer_few_rows(call)
          ? attn_mixer_softmax_rows(g, &problem, &args, q, keys_of, values_of, keys - rows + 1)
          : attn_op_softmax(g, &problem, &args, q, keys_of, values_of);
  out = attn_split_heads(g, attn_join_heads(g, &call->layout, out), o->heads);
  return attn_layer_expand(g, out, call->parameters[V_UP]);
}

/* The latents of all tokens, copied from their pages: [keys, 1, rank + shared]. */
static attn_var *gather(attn_graph *g, const attn_mixer_call *call, int64_t keys) {
  attn_tensor pages = attn_state_pages(call->state, LATENT);
  attn_tensor rows = attn_graph_tensor(g, pages.dtype, 3, (int64_t[]){keys, 1, pages.shape[2]});
  if (!rows.data) return NULL;
  attn_status status = attn_state_copy_rows(call->state, LATENT, keys, rows.data);
  if (status != ATTN_OK) return attn_graph_error(g, status);
  return attn_graph_input(g, &rows);
}

static bool append(attn_graph *g, const attn_mixer_call *call, const inputs *in) {
  const attn_mixer_options *o = call->options;
  if (!in->latent || !in->k_shared) return false;
  attn_tensor latent = attn_as_rows(g, &in->latent->value);
  attn_tensor shared = attn_as_rows(g, &in->k_shared->value);
  if (!latent.data || !shared.data) return false;
  attn_status status = attn_mixer_append(g, call, LATENT, 0, &latent);
  if (status == ATTN_OK) status = attn_mixer_append(g, call, LATENT, o->latent_rank, &shared);
  if (status != ATTN_OK) attn_graph_error(g, status);
  return status == ATTN_OK;
}

static attn_var *with_state(attn_graph *g, const attn_mixer_call *call, const inputs *in) {
  const attn_mixer_options *o = call->options;
  int64_t rows = call->layout.rows, past = attn_state_position(call->state), keys = past + rows;
  if (!append(g, call, in)) return NULL;
  int64_t bytes = keys * o->heads * (2 * o->dim + o->shared_dim + o->value_dim) *
                  (int64_t)attn_dtype_size(g->compute);
  bool expands = (rows >= EXPANDED_ROWS || (past == 0 && rows > 1)) && bytes <= EXPANDED_BYTES;
  /* Products by head read the matrices alone. */
  if (call->parameters[K_UP]->adapter || call->parameters[V_UP]->adapter) expands = true;
  if (!expands) return absorbed(g, call, in, keys);
  attn_var *q = attn_layer_append_channels(g, in->q, in->q_shared);
  if (past == 0) return expanded(g, call, q, in->latent, in->k_shared);
  attn_var *all = gather(g, call, keys);
  attn_var *latent = attn_op_cast(g, attn_view_slice(g, all, 2, 0, o->latent_rank), g->compute);
  return expanded(g, call, q, latent, attn_view_slice(g, all, 2, o->latent_rank, o->shared_dim));
}

static attn_var *attention(attn_graph *g, const attn_mixer_call *call, attn_var *const *projected,
                           int which) {
  inputs in = take_apart(g, call, projected);
  (void)which;
  if (call->state) return with_state(g, call, &in);
  attn_var *q = attn_layer_append_channels(g, in.q, in.q_shared);
  return expanded(g, call, q, in.latent, in.k_shared);
}

static attn_var *apply(attn_graph *g, const attn_mixer_call *call, attn_var *x) {
  const attn_mixer_options *o = call->options;
  attn_parameter **p = call->parameters;
  attn_var *from = x;
  if (o->query_rank)
    from = attn_layer_rms_norm(g, attn_op_linear(g, x, p[Q_DOWN]),
                               attn_mixer_parameter(g, call, Q_NORM), o->norm_epsilon);
  attn_var *projected[] = {attn_split_heads(g, attn_op_linear(g, from, p[Q]), o->heads),
                           attn_split_heads(g, attn_op_linear(g, x, p[KV_DOWN]), 1)};
  return attn_op_linear(g, attn_mixer_each(g, call, attention, 0, 2, projected), p[O]);
}

const attn_mixer attn_mixer_mla = {
    .info = {.name = "mla",
             .title = "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts "
                      "Language Model",
             .arxiv = "2405.04434",
             .abilities = ATTN_ABILITY_CAUSAL | ATTN_ABILITY_DECODE | ATTN_ABILITY_RAGGED |
                          ATTN_ABILITY_TRAINABLE,
             .summary = "multi-head latent attention: keys and values of all heads from one "
                        "low-rank latent a token"},
    .configure = configure,
    .parameters = parameters,
    .state = state,
    .apply = apply,
};
