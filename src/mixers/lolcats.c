/* LoLCATs: exact attention over a window and linear attention over everything older, under one
 * normaliser, with feature maps that are learned to copy softmax (arXiv 2410.10254).
 *
 *   q, k, v = x Wq^T, x Wk^T, x Wv^T (biases and normalised heads, optional), with rotary positions
 *   y_n = (sum_{i in win(n)} gamma exp(s_ni - c_n) v_i + sum_{j < win(n)} phi(q_n) . phi'(k_j) v_j)
 *         / (the same without v),  s_ni = q_n . k_i / sqrt(dim),  c_n = max over the window of s_ni
 *   phi(x) = [softmax(W_h x), softmax(-W_h x)], at least 1e-12 each; phi' with another W
 *   gamma_h = sigmoid(w_h);  affine: the linear part times 1 - gamma_h;  y = o Wo^T
 *
 * win(n), counting tokens from 0, with w = block:
 *   terrace: w (floor(n / w) - 1) .. n, so that the span is between w + 1 and 2 w
 *   sliding: n - w + 1 .. n
 *
 * c_n is subtracted in the window alone, so what the parts weigh against each other depends on it;
 * gradients flow through it. Unlike in the released code, the terrace's blocks are anchored at the
 * sequence's start, and one rule serves training, prefill and decoding.
 *
 * The linear part is the recurrent engine with ones behind the values for the normaliser. Its
 * tokens are *steps*: the keys that have left the window, each before the first query that does not
 * see it exactly any more. A sliding window's step has a query and the key that it loses; the
 * terrace loses a block of keys at once, which have steps of their own. The state is the sums over
 * the old tokens and the rows of those that the last token saw. */
#include "base/status.h"
#include "graph/operations.h"
#include "graph/passes.h"
#include "layers/layers.h"
#include "mixers/shared/features.h"
#include "mixers/shared/heads.h"

#include <math.h>

enum { Q, K, V, O, Q_MAP, K_MAP, FACTORS, OPTIONAL };
/* The state: the sums [heads, features, values with ones], and token t's keys and values in row
 * t % span of [span, width]. */
enum { SUMS, WINDOW };
enum { PADDING = 16 }; /* channels of values with ones are a multiple: kernels want it */

static const double usual_factor = -2.19722458; /* gamma = 0.1, as in the published layer */

static int64_t padded(const attn_mixer_options *o) {
  return (o->value_dim + PADDING) / PADDING * PADDING;
}

/* Tokens that a token sees exactly, at most. */
static int64_t span_of(const attn_mixer_options *o) {
  return o->window_kind == ATTN_WINDOW_SLIDING ? o->block : 2 * o->block;
}

/* The first of them, for the token at a position. */
static int64_t oldest(const attn_mixer_options *o, int64_t position) {
  int64_t first = o->window_kind == ATTN_WINDOW_SLIDING ? position - o->block + 1
                                                        : (position / o->block - 1) * o->block;
  return first > 0 ? first : 0;
}

static attn_status configure(attn_mixer_options *o) {
  const int64_t usual_window = 64, usual_features = 64;
  ATTN_TRY(attn_mixer_check_options(o, "lolcats"));
  ATTN_TRY(attn_mixer_configure_heads(o, "lolcats"));
  if (!o->feature_map) o->feature_map = ATTN_FEATURES_SOFTMAX;
  if (o->feature_map != ATTN_FEATURES_SOFTMAX)
    return attn_fail(ATTN_INVALID_ARGUMENT, "lolcats: feature_map must be softmax");
  if (!o->feature_dim) o->feature_dim = usual_features;
  if (!o->block) o->block = usual_window;
  if (padded(o) > ATTN_MOST_FEATURES)
    return attn_fail(ATTN_INVALID_ARGUMENT, "lolcats: value_dim %lld is above %d",
                     (long long)o->value_dim, ATTN_MOST_FEATURES - PADDING);
  ATTN_TRY(attn_features_check(o, "lolcats"));
  return attn_mixer_configure_rotary(o, "lolcats");
}

static int parameters(const attn_mixer_options *o, attn_parameter_shape *shapes) {
  attn_heads_matrices(o, shapes);
  shapes[Q_MAP] = attn_features_matrix(o, "q_map.weight");
  shapes[K_MAP] = attn_features_matrix(o, "k_map.weight");
  shapes[FACTORS] = attn_vector("window_factors", o->heads, ATTN_INIT_CONSTANT, usual_factor);
  return OPTIONAL + attn_heads_parameters(o, shapes + OPTIONAL);
}

static int state(const attn_mixer_options *o, attn_dtype compute, attn_state_part *parts) {
  parts[SUMS] = (attn_state_part){.name = "state",
                                  .dtype = compute == ATTN_F64 ? ATTN_F64 : ATTN_F32,
                                  .rank = 3,
                                  .shape = {o->heads, 2 * o->feature_dim, padded(o)}};
  parts[WINDOW] = (attn_state_part){.name = "window",
                                    .dtype = compute,
                                    .rank = 2,
                                    .shape = {span_of(o), o->kv_heads * (o->dim + o->value_dim)}};
  return WINDOW + 1;
}

/* Sequences -------------------------------------------------------------------------------------
 */

/* A sequence's queries and keys as rows of q and k; the last key is the last query's. The keys
 * begin with those that the state kept. */
typedef struct piece {
  int64_t query, key;    /* first rows */
  int64_t queries, keys; /* how many */
  int64_t position;      /* of the first query */
} piece;

typedef struct pieces {
  const attn_mixer_options *options;
  const attn_layout *layout;
  bool state;   /* whether there is one: its keys are in front of the rest, */
  int64_t kept; /* so many */
} pieces;

static int64_t most(int64_t a, int64_t b) {
  return a > b ? a : b;
}
static int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

static piece piece_at(const pieces *all, int64_t b) {
  int64_t first = attn_layout_first(all->layout, b), length = attn_layout_length(all->layout, b);
  return (piece){.query = first,
                 .key = first,
                 .queries = length,
                 .keys = all->kept + length,
                 .position = all->layout->position};
}

/* The row of the key at a position. */
static int64_t key_row(const piece *p, int64_t position) {
  return p->key + position - (p->position + p->queries - p->keys);
}

/* The first position whose key the sums do not have before the query at `position`. */
static int64_t summed(const pieces *all, int64_t position) {
  return position > 0 ? oldest(all->options, position - 1) : 0;
}

static int32_t *numbers(attn_graph *g, int64_t count) {
  int32_t *array = attn_arena_alloc(g->arena, (size_t)(count + 1) * sizeof *array);
  return array ? array : attn_graph_error(g, ATTN_OUT_OF_MEMORY);
}

/* The window ------------------------------------------------------------------------------------
 */

/* What queries see, as sequences for the engine: of keys taken from k, where `rows` is not NULL.
 * The longest are bounds, which do not change from one decode step to the next: plans depend on
 * them. */
typedef struct views {
  int64_t count, rows_count, longest_query, longest_key;
  int32_t *query_offsets, *key_offsets, *rows;
} views;

static bool make_views(attn_graph *g, int64_t sequences, views *v) {
  v->query_offsets = numbers(g, sequences);
  v->key_offsets = numbers(g, sequences);
  if (g->status == ATTN_OK) v->query_offsets[0] = v->key_offsets[0] = 0;
  return g->status == ATTN_OK;
}

static void add_view(views *v, int64_t queries, int64_t keys) {
  v->query_offsets[v->count + 1] = (int32_t)(v->query_offsets[v->count] + queries);
  v->key_offsets[v->count + 1] = (int32_t)(v->key_offsets[v->count] + keys);
  ++v->count;
}

static int64_t longest_key(const pieces *all) {
  return all->layout->length + (all->state ? span_of(all->options) : 0);
}

/* The sequences as they are. */
static bool view_sequences(attn_graph *g, const pieces *all, views *v) {
  const attn_layout *layout = all->layout;
  if (!make_views(g, layout->batch, v)) return false;
  for (int64_t b = 0; b < layout->batch; ++b) {
    piece p = piece_at(all, b);
    add_view(v, p.queries, p.keys);
  }
  v->longest_query = layout->length;
  v->longest_key = longest_key(all);
  return true;
}

/* The terrace: a sequence for the queries of each block, whose keys are those of two. */
static bool view_blocks(attn_graph *g, const pieces *all, views *v) {
  int64_t block = all->options->block, rows = all->layout->rows, batch = all->layout->batch;
  v->rows = numbers(g, 2 * rows + all->kept + block); /* a block is in the views of two */
  if (!v->rows || !make_views(g, rows / block + 2 * batch, v)) return false;
  for (int64_t b = 0; b < batch; ++b) {
    piece p = piece_at(all, b);
    int64_t end = p.position + p.queries;
    for (int64_t from = p.position, to; from < end; from = to) {
      to = least((from / block + 1) * block, end);
      int64_t first = oldest(all->options, from);
      add_view(v, to - from, to - first);
      for (int64_t position = first; position < to; ++position)
        v->rows[v->rows_count++] = (int32_t)key_row(&p, position);
    }
  }
  v->longest_query = least(block, all->layout->length);
  v->longest_key = longest_key(all);
  return true;
}

/* Whether every query sees all tokens before it. */
static bool sees_all(const pieces *all) {
  for (int64_t b = 0; b < all->layout->batch; ++b) {
    piece p = piece_at(all, b);
    if (p.queries && oldest(all->options, p.position + p.queries - 1) > 0) return false;
  }
  return true;
}

/* What the window gives by itself, and its LSE [.., heads, rows]. */
static attn_var *attend(attn_graph *g, const pieces *all, attn_var *q, attn_var *k, attn_var *v,
                        attn_var **lse) {
  const attn_mixer_options *o = all->options;
  const attn_layout *layout = all->layout;
  attn_softmax_problem problem = ATTN_SOFTMAX_PROBLEM_INIT;
  bool sliding = o->window_kind == ATTN_WINDOW_SLIDING, whole = sliding || sees_all(all);
  views seen = {0};
  problem.causal = true;
  if (sliding) problem.window_left = o->block - 1;
  if (whole && layout->batch == 1 && !layout->offsets && !all->state) {
    attn_softmax_args none = {0};
    attn_var *out =
        attn_op_softmax_lse(g, &problem, &none, attn_as_sequences(g, layout, q),
                            attn_as_sequences(g, layout, k), attn_as_sequences(g, layout, v), lse);
    return attn_split_heads(g, attn_join_heads(g, layout, out), o->heads);
  }
  if (!(whole ? view_sequences(g, all, &seen) : view_blocks(g, all, &seen))) return NULL;
  attn_softmax_args args = {.query_offsets = seen.query_offsets, .key_offsets = seen.key_offsets};
  problem.ragged = true;
  problem.batch = seen.count;
  problem.query_length = seen.longest_query, problem.key_length = seen.longest_key;
  if (!whole) k = attn_op_take_rows(g, k, seen.rows, seen.rows_count);
  if (!whole) v = attn_op_take_rows(g, v, seen.rows, seen.rows_count);
  return attn_op_softmax_lse(g, &problem, &args, q, k, v, lse);
}

/* What each query sees, and each key is seen by, in rows. */
static bool find_ranges(attn_graph *g, const pieces *all, int64_t keys, attn_window_ranges *to) {
  int64_t rows = all->layout->rows;
  int32_t *first = numbers(g, rows), *end = numbers(g, rows);
  int32_t *from = numbers(g, keys), *until = numbers(g, keys);
  if (g->status != ATTN_OK) return false;
  for (int64_t b = 0; b < all->layout->batch; ++b) {
    piece p = piece_at(all, b);
    int64_t begun = p.key, ended = p.key; /* keys that some query saw; that none sees any more */
    for (int64_t i = 0; i < p.queries; ++i) {
      int64_t r = p.query + i, position = p.position + i;
      first[r] = (int32_t)key_row(&p, oldest(all->options, position));
      end[r] = (int32_t)key_row(&p, position) + 1;
      for (; begun < end[r]; ++begun) from[begun] = (int32_t)r;
      for (; ended < first[r]; ++ended) until[ended] = (int32_t)r;
    }
    for (; ended < begun; ++ended) until[ended] = (int32_t)(p.query + p.queries);
  }
  *to = (attn_window_ranges){.first = first, .end = end, .from = from, .until = until};
  return true;
}

static attn_var *greatest(attn_graph *g, const pieces *all, attn_var *q, attn_var *k) {
  attn_window_ranges ranges;
  if (!k || !find_ranges(g, all, k->value.shape[0], &ranges)) return NULL;
  return attn_op_greatest_score(g, &ranges, 1 / sqrt((double)all->options->dim), q, k);
}

/* Older tokens ----------------------------------------------------------------------------------
 */

/* What the recurrent engine is given: step i has row key[i] of the old keys and row query[i] of the
 * queries, zeros where these are negative; query r reads its result at step[r]. */
typedef struct steps {
  int64_t count, longest, old_count;
  int32_t *key, *query, *step;
  int32_t *offsets; /* of sequences */
  int32_t *old;     /* rows of k */
} steps;

static void add_step(steps *s, int64_t old, int64_t query) {
  s->key[s->count] = -1;
  if (old >= 0) {
    s->old[s->old_count] = (int32_t)old;
    s->key[s->count] = (int32_t)s->old_count++;
  }
  s->query[s->count] = (int32_t)query;
  if (query >= 0) s->step[query] = (int32_t)s->count;
  ++s->count;
}

static void add_piece(steps *s, const pieces *all, const piece *p) {
  int64_t begin = s->count;
  for (int64_t i = 0; i < p->queries; ++i) {
    int64_t position = p->position + i, end = oldest(all->options, position);
    int64_t lost = summed(all, position);
    for (; lost + 1 < end; ++lost) add_step(s, key_row(p, lost), -1);
    add_step(s, lost < end ? key_row(p, lost) : -1, p->query + i);
  }
  s->longest = most(s->longest, s->count - begin);
}

static bool plan_steps(attn_graph *g, const pieces *all, int64_t keys, steps *s) {
  int64_t rows = all->layout->rows, batch = all->layout->batch;
  s->key = numbers(g, rows + keys), s->query = numbers(g, rows + keys);
  s->step = numbers(g, rows);
  s->offsets = numbers(g, batch);
  s->old = numbers(g, keys);
  if (g->status != ATTN_OK) return false;
  for (int64_t b = 0; b < batch; ++b) {
    piece p = piece_at(all, b);
    s->offsets[b] = (int32_t)s->count;
    add_piece(s, all, &p);
  }
  s->offsets[batch] = (int32_t)s->count;
  return true;
}

/* phi of rows x [rows, heads, dim]: [rows, heads, features]. */
static attn_var *mapped(attn_graph *g, const attn_mixer_call *call, attn_var *x, int map) {
  x = attn_layer_linear_heads(g, x, call->parameters[map]);
  return attn_features_mirrored(g, call->options->feature_map, x);
}

/* Rows of zeros, [count, heads, width], which take no memory but one row. */
static attn_var *zeros(attn_graph *g, int64_t count, int64_t heads, int64_t width) {
  attn_tensor row = attn_graph_tensor(g, g->compute, 3, (int64_t[]){1, heads, width});
  if (!row.data) return NULL;
  attn_status status = attn_tensor_fill(&row, 0);
  if (status != ATTN_OK) return attn_graph_error(g, status);
  row.shape[0] = count;
  row.stride[0] = 0;
  return attn_graph_input(g, &row);
}

/* Values [rows, heads, value_dim] with ones behind them, which sum the weights up. */
static attn_var *with_ones(attn_graph *g, const attn_mixer_options *o, attn_var *v) {
  double one[PADDING] = {1};
  if (!v) return NULL;
  int64_t more = padded(o) - o->value_dim;
  attn_tensor ones = attn_pass_numbers(g, g->compute, more, one);
  if (!ones.data) return NULL;
  ones.rank = 3;
  ones.shape[0] = v->value.shape[0], ones.stride[0] = 0;
  ones.shape[1] = 1, ones.stride[1] = more;
  ones.shape[2] = more, ones.stride[2] = 1;
  return attn_layer_append_channels(g, v, attn_graph_input(g, &ones));
}

/* Keys and values of the steps. */
static void gather_old(attn_graph *g, const attn_mixer_call *call, const steps *s, attn_var **k,
                       attn_var **v) {
  const attn_mixer_options *o = call->options;
  int64_t times = o->heads / o->kv_heads;
  if (s->old_count == 0) {
    *k = zeros(g, s->count, o->heads, 2 * o->feature_dim);
    *v = zeros(g, s->count, o->heads, padded(o));
    return;
  }
  attn_var *old_k = attn_op_take_rows(g, *k, s->old, s->old_count);
  attn_var *old_v = attn_op_take_rows(g, *v, s->old, s->old_count);
  old_k = mapped(g, call, attn_layer_repeat_heads(g, old_k, times), K_MAP);
  old_v = with_ones(g, o, attn_layer_repeat_heads(g, old_v, times));
  *k = attn_op_take_rows(g, old_k, s->key, s->count);
  *v = attn_op_take_rows(g, old_v, s->key, s->count);
}

/* Memory for larger blocks is taken when they come, if they do: a decode step allocates then. */
enum { MOST_EXPECTED = 512 };

/* Plans and memory of later steps: of the first that has older tokens, and of those that begin a
 * block, which sum all tokens of another one up. */
static void expect_steps(attn_graph *g, const attn_mixer_options *o,
                         const attn_recurrent_problem *options) {
  attn_recurrent_problem problem = *options;
  problem.dtype = g->compute;
  problem.length = 1;
  problem.heads = problem.value_heads = o->heads;
  problem.dim = 2 * o->feature_dim, problem.value_dim = padded(o);
  attn_op_recurrent_expect(g, &problem, 0);
  if (o->window_kind != ATTN_WINDOW_TERRACE || o->block > MOST_EXPECTED) return;
  int64_t of_token = o->heads * (16 * problem.dim + 8 * (o->dim + problem.value_dim)); /* about */
  problem.length = o->block;
  attn_op_recurrent_expect(g, &problem,
                           (size_t)((o->block + 2) * of_token) * attn_dtype_size(g->compute));
}

/* Sums over the tokens that each query does not see exactly: [rows, heads, values with ones]; the
 * state takes in what they have lost. NULL with *none where there are no such tokens. */
static attn_var *sum_older(attn_graph *g, const attn_mixer_call *call, const pieces *all,
                           attn_var *q, attn_var *k, attn_var *v, bool *none) {
  const attn_mixer_options *o = call->options;
  steps s = {0};
  attn_recurrent_problem problem = ATTN_RECURRENT_PROBLEM_INIT;
  if (!k || !plan_steps(g, all, k->value.shape[0], &s)) return NULL;
  if (all->state && all->layout->rows == 1) expect_steps(g, o, &problem);
  *none = s.old_count == 0 && summed(all, all->layout->position) == 0;
  if (*none) return NULL;
  gather_old(g, call, &s, &k, &v);
  bool same = s.count == all->layout->rows; /* every step has its query */
  q = mapped(g, call, q, Q_MAP);
  if (!same) q = attn_op_take_rows(g, q, s.query, s.count);
  attn_mixer_call steps_call = *call;
  steps_call.layout = all->layout->batch > 1 ? attn_layout_packed(all->layout->batch, s.offsets)
                                             : attn_layout_equal(1, s.count);
  attn_var *out = attn_mixer_recurrent(g, &steps_call, SUMS, &problem, q, k, v, NULL, NULL);
  out = attn_split_heads(g, attn_join_heads(g, &steps_call.layout, out), o->heads);
  return same ? out : attn_op_take_rows(g, out, s.step, all->layout->rows);
}

/* The layer -------------------------------------------------------------------------------------
 */

/* log gamma, or of gamma / (1 - gamma): what the window's weights are multiplied by. */
static attn_var *factors(attn_graph *g, const attn_mixer_call *call) {
  attn_var *w = attn_mixer_parameter(g, call, FACTORS);
  return call->options->affine ? attn_op_cast(g, w, g->wide)
                               : attn_op_activate_wide(g, ATTN_LOG_SIGMOID, w);
}

/* q, k, v [rows, heads, dim]; of k and v, which have the state's in front, those of `all`. */
static attn_var *mix(attn_graph *g, const attn_mixer_call *call, const pieces *all, attn_var *q,
                     attn_var *k, attn_var *v) {
  attn_var *lse = NULL;
  bool none = false;
  attn_var *window = attend(g, all, q, k, v, &lse);
  attn_var *older = sum_older(g, call, all, q, k, v, &none);
  if (none) return window;
  return attn_op_join_window(g, window, lse, greatest(g, all, q, k), factors(g, call), older);
}

/* With a state ----------------------------------------------------------------------------------
 */

/* Copies between rows of x [rows, kv_heads, dim] and those of the tokens at positions from .. to in
 * the state's window, from column `column` on. */
static void copy_rows(attn_graph *g, const attn_mixer_call *call, const attn_tensor *x,
                      int64_t first, int64_t from, int64_t to, int64_t column, bool save) {
  int64_t span = span_of(call->options), width = x->shape[1] * x->shape[2];
  attn_tensor window = attn_state_fixed(call->state, WINDOW), rows, kept;
  attn_status status = attn_tensor_reshape(x, 2, (int64_t[]){x->shape[0], width}, &rows);
  if (status == ATTN_OK) status = attn_tensor_slice(&window, 1, column, width, &window);
  for (int64_t count; from < to && status == ATTN_OK; from += count, first += count) {
    attn_tensor part;
    count = least(to - from, span - from % span);
    status = attn_tensor_slice(&rows, 0, first, count, &part);
    if (status == ATTN_OK) status = attn_tensor_slice(&window, 0, from % span, count, &kept);
    if (status == ATTN_OK) attn_add_tensor(g, save ? &kept : &part, save ? &part : &kept, 1, false);
  }
  if (status != ATTN_OK) attn_graph_error(g, status);
}

/* The rows of the state's window behind `from`, and then those of x [rows, kv_heads, dim], which
 * take their place there. */
static attn_var *continued(attn_graph *g, const attn_mixer_call *call, attn_var *x, int64_t from,
                           int64_t column) {
  int64_t position = call->layout.position, kept = position - from, rows = call->layout.rows;
  int64_t shape[3] = {kept + rows, x->value.shape[1], x->value.shape[2]};
  attn_tensor all = attn_graph_tensor(g, g->compute, 3, shape), target;
  if (!all.data) return NULL;
  attn_status status = attn_tensor_slice(&all, 0, kept, rows, &target);
  if (status != ATTN_OK) return attn_graph_error(g, status);
  copy_rows(g, call, &all, 0, from, position, column, false);
  attn_add_tensor(g, &target, &x->value, 1, false);
  int64_t skipped = most(0, rows - span_of(call->options));
  copy_rows(g, call, &all, kept + skipped, position + skipped, position + rows, column, true);
  return attn_graph_input(g, &all);
}

/* From projected heads q, k, v to what the layer's heads give. */
static attn_var *heads(attn_graph *g, const attn_mixer_call *call, attn_var *const *in, int which) {
  const attn_mixer_options *o = call->options;
  attn_var *q = attn_heads_position(g, call, in[Q], OPTIONAL, ATTN_HEADS_Q_NORM);
  attn_var *k = attn_heads_position(g, call, in[K], OPTIONAL, ATTN_HEADS_K_NORM);
  attn_var *v = in[V];
  pieces all = {.options = o, .layout = &call->layout};
  (void)which;
  if (!q || !k) return NULL;
  if (g->replay) /* what is summed and what is seen depends on the position */
    return attn_graph_fail(g, ATTN_UNSUPPORTED, "lolcats: a step cannot be captured");
  if (!call->state) return mix(g, call, &all, q, k, v);
  int64_t from = summed(&all, call->layout.position);
  all.state = true;
  all.kept = call->layout.position - from;
  k = continued(g, call, k, from, 0);
  v = continued(g, call, v, from, o->kv_heads * o->dim);
  return k && v ? mix(g, call, &all, q, k, v) : NULL;
}

static attn_var *apply(attn_graph *g, const attn_mixer_call *call, attn_var *x) {
  const attn_mixer_options *o = call->options;
  attn_var *q = attn_heads_project(g, call, x, Q, OPTIONAL, ATTN_HEADS_Q_BIAS);
  attn_var *k = attn_heads_project(g, call, x, K, OPTIONAL, ATTN_HEADS_K_BIAS);
  attn_var *v = attn_heads_project(g, call, x, V, OPTIONAL, ATTN_HEADS_V_BIAS);
  attn_var *in[] = {[Q] = attn_split_heads(g, q, o->heads),
                    [K] = attn_split_heads(g, k, o->kv_heads),
                    [V] = attn_split_heads(g, v, o->kv_heads)};
  attn_var *out = attn_mixer_each_row(g, call, heads, 0, 3, in);
  return call->heads ? out : attn_heads_project(g, call, out, O, OPTIONAL, ATTN_HEADS_O_BIAS);
}

const attn_mixer attn_mixer_lolcats = {
    .info = {.name = "lolcats",
             .title = "LoLCATs: On Low-Rank Linearizing of Large Language Models",
             .arxiv = "2410.10254",
             .abilities = ATTN_ABILITY_CAUSAL | ATTN_ABILITY_DECODE | ATTN_ABILITY_RAGGED |
                          ATTN_ABILITY_TRAINABLE,
             .summary = "exact attention over a window, linear attention with learned feature maps "
                        "over what is older"},
    .heads = true,
    .configure = configure,
    .parameters = parameters,
    .state = state,
    .apply = apply,
};
