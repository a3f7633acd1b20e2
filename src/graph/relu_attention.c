/* Attention with max(0, s) for exp(s), and no denominator, over short sequences (arXiv 2210.10340,
 * T1's blocks). With M the mask of what is seen, for each sequence and head:
 *
 *   S = M (.) (scale Q K^T),  P = max(0, S),  O = P V
 *   dV = P^T dO,  dS = [S > 0] (.) (dO V^T),  dQ = scale dS K,  dK = dS^T (scale Q)
 *
 * Backward makes S again. Sequences of one length that follow each other go together. */
#include "graph/head_products.h"
#include "graph/operations.h"
#include "graph/passes.h"

#include <string.h>

typedef struct relu_node {
  attn_node node;
  attn_var *q, *k, *v;
  attn_layout layout, key_layout;
  bool causal;
  double scale;
} relu_node;

/* Sequences b .. b + count of one length. */
typedef struct run {
  int64_t b, count, queries, keys;
} run;

/* The one that begins with sequence b. */
static run run_of(const relu_node *n, int64_t b) {
  run r = {b, 1, attn_layout_length(&n->layout, b), attn_layout_length(&n->key_layout, b)};
  while (b + r.count < n->layout.batch &&
         attn_layout_length(&n->layout, b + r.count) == r.queries &&
         attn_layout_length(&n->key_layout, b + r.count) == r.keys)
    ++r.count;
  return r;
}

static attn_tensor queries_of(const relu_node *n, const run *r, const attn_tensor *rows) {
  return attn_rows_by_head(rows, attn_layout_first(&n->layout, r->b), r->count, r->queries);
}

static attn_tensor keys_of(const relu_node *n, const run *r, const attn_tensor *rows) {
  return attn_rows_by_head(rows, attn_layout_first(&n->key_layout, r->b), r->count, r->keys);
}

/* Scores of a run [count, heads, queries, keys], wide. */
static attn_tensor scores_like(attn_graph *g, const relu_node *n, const run *r) {
  int64_t heads = n->q->value.shape[1];
  return attn_graph_tensor(g, g->wide, 4, (int64_t[]){r->count, heads, r->queries, r->keys});
}

/* x := M (.) x: what is not seen has the score 0, and so no weight and no gradient. */
static void mask(attn_graph *g, const run *r, const attn_tensor *x) {
  int64_t count = r->queries * r->keys;
  double *numbers = attn_arena_alloc(g->arena, (size_t)count * sizeof *numbers);
  if (!numbers) {
    attn_graph_error(g, ATTN_OUT_OF_MEMORY);
    return;
  }
  for (int64_t i = 0; i < r->queries; ++i)
    for (int64_t j = 0; j < r->keys; ++j) numbers[i * r->keys + j] = j <= r->keys - r->queries + i;
  attn_tensor one = attn_pass_numbers(g, g->wide, count, numbers), all = *x;
  if (!one.data) return;
  all.data = one.data;
  all.stride[0] = all.stride[1] = 0;
  all.stride[2] = r->keys;
  attn_pass_multiply_sum(g, x, false, 1, x, &all);
}

/* S; q is scaled. */
static attn_tensor scores(attn_graph *g, const relu_node *n, const run *r, const attn_tensor *q,
                          const attn_tensor *k) {
  attn_tensor s = scores_like(g, n, r);
  attn_tensor queries = queries_of(n, r, q), keys = keys_of(n, r, k);
  if (!s.data) return s;
  attn_multiply_heads(g, ATTN_BY_ROWS_TRANSPOSED, &queries, &keys, &s);
  if (n->causal && r->queries > 1 && g->status == ATTN_OK) mask(g, r, &s);
  return s;
}

/* What both directions read, wide. */
typedef struct operands {
  attn_tensor q, k, v; /* q is scaled */
} operands;

static operands read_operands(attn_graph *g, const relu_node *n) {
  return (operands){.q = attn_rows_in(g, &n->q->value, g->wide, n->scale),
                    .k = attn_rows_in(g, &n->k->value, g->wide, 1),
                    .v = attn_rows_in(g, &n->v->value, g->wide, 1)};
}

static void run_backward(attn_graph *g, const relu_node *n, const run *r, const operands *x,
                         const attn_tensor *d_o, const operands *d) {
  attn_tensor s = scores(g, n, r, &x->q, &x->k), p = scores_like(g, n, r);
  if (g->status != ATTN_OK) return;
  attn_tensor upstream = queries_of(n, r, d_o), v = keys_of(n, r, &x->v);
  attn_tensor q = queries_of(n, r, &x->q), k = keys_of(n, r, &x->k);
  attn_tensor dq = queries_of(n, r, &d->q), dk = keys_of(n, r, &d->k), dv = keys_of(n, r, &d->v);
  attn_pass_activate(g, ATTN_RELU, &p, &s);
  attn_multiply_heads(g, ATTN_OVER_ROWS, &p, &upstream, &dv);
  attn_multiply_heads(g, ATTN_BY_ROWS_TRANSPOSED, &upstream, &v, &p); /* dP */
  attn_pass_activate_backward(g, ATTN_RELU, &s, false, &s, &p);       /* dS */
  attn_multiply_heads(g, ATTN_BY_ROWS, &s, &k, &dq);
  attn_multiply_heads(g, ATTN_OVER_ROWS, &s, &q, &dk);
}

static attn_status relu_backward(attn_graph *g, attn_node *node) {
  const relu_node *n = (const relu_node *)node;
  operands x = read_operands(g, n), d = {attn_graph_tensor_like(g, g->wide, &n->q->value),
                                         attn_graph_tensor_like(g, g->wide, &n->k->value),
                                         attn_graph_tensor_like(g, g->wide, &n->v->value)};
  attn_tensor d_o = attn_rows_in(g, &node->output->gradient, g->wide, 1);
  run r;
  for (int64_t b = 0; b < n->layout.batch && g->status == ATTN_OK; b += r.count) {
    r = run_of(n, b);
    attn_graph_mark mark = attn_graph_get_mark(g);
    if (r.queries > 0) run_backward(g, n, &r, &x, &d_o, &d);
    attn_graph_release(g, mark);
  }
  if (g->status != ATTN_OK) return g->status;
  attn_pass_add(g, &d.q, n->scale, &d.q, 0, NULL);
  if (n->q->needs_gradient) attn_gradient_add(g, n->q, &d.q);
  if (n->k->needs_gradient) attn_gradient_add(g, n->k, &d.k);
  if (n->v->needs_gradient) attn_gradient_add(g, n->v, &d.v);
  return g->status;
}

static void answer(attn_graph *g, const relu_node *n, const attn_tensor *o) {
  operands x = read_operands(g, n);
  attn_tensor sums = o->dtype == g->wide ? *o : attn_graph_tensor_like(g, g->wide, o);
  run r;
  for (int64_t b = 0; b < n->layout.batch && g->status == ATTN_OK; b += r.count) {
    r = run_of(n, b);
    attn_graph_mark mark = attn_graph_get_mark(g);
    attn_tensor s = r.queries > 0 ? scores(g, n, &r, &x.q, &x.k) : (attn_tensor){0};
    attn_tensor v = keys_of(n, &r, &x.v), to = queries_of(n, &r, &sums);
    if (s.data && g->status == ATTN_OK) {
      attn_pass_activate(g, ATTN_RELU, &s, &s);
      attn_multiply_heads(g, ATTN_BY_ROWS, &s, &v, &to);
    }
    attn_graph_release(g, mark);
  }
  if (g->status == ATTN_OK && sums.data != o->data) attn_add_tensor(g, o, &sums, 1, false);
}

/* Whether the sequences have keys for their queries, and not too many. */
static bool lengths_fit(const relu_node *n) {
  if (n->layout.batch != n->key_layout.batch || n->key_layout.length > ATTN_RELU_LENGTH)
    return false;
  for (int64_t b = 0; b < n->layout.batch; ++b)
    if (attn_layout_length(&n->layout, b) > attn_layout_length(&n->key_layout, b)) return false;
  return true;
}

attn_var *attn_op_relu_attention(attn_graph *graph, const attn_layout *layout,
                                 const attn_layout *key_layout, bool causal, double scale,
                                 attn_var *q, attn_var *k, attn_var *v) {
  if (!q || !k || !v) return NULL;
  char text[3][128];
  relu_node made = {.q = q, .k = k, .v = v, .causal = causal, .scale = scale};
  made.layout = *layout;
  made.key_layout = *key_layout;
  if (!attn_are_heads(&q->value, layout, &k->value, &v->value, key_layout) || !lengths_fit(&made))
    return attn_graph_fail(graph, ATTN_INVALID_SHAPE,
                           "relu attention: q, k and v are %s, %s and %s, expected [%lld, heads, "
                           "dim], [%lld, heads, dim] and [%lld, heads, n] of sequences of at most "
                           "%d keys, as many as queries or more",
                           attn_shape_text(&q->value, text[0]), attn_shape_text(&k->value, text[1]),
                           attn_shape_text(&v->value, text[2]), (long long)layout->rows,
                           (long long)key_layout->rows, (long long)key_layout->rows,
                           ATTN_RELU_LENGTH);
  int64_t shape[3] = {layout->rows, q->value.shape[1], v->value.shape[2]};
  attn_tensor o = attn_graph_tensor(graph, graph->compute, 3, shape);
  if (!o.data) return NULL;
  attn_graph_mark mark = attn_graph_get_mark(graph);
  answer(graph, &made, &o);
  attn_graph_release(graph, mark);
  if (graph->status != ATTN_OK) return NULL;
  attn_var *y = attn_graph_result(graph, o, 3, (attn_var *[]){q, k, v});
  relu_node *node = attn_graph_record(graph, sizeof *node, y, relu_backward);
  if (node) {
    made.node = node->node;
    *node = made;
  }
  return y;
}
