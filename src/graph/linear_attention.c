/* Linear attention without an order: what both ways and across sequences have in common. For each
 * sequence and head, with keys and values of any sequence that belongs to the queries':
 *
 *   S = K^T V,  z = K^T 1,  o_i = S^T q_i / (z . q_i + epsilon)   (or without the denominator)
 *
 * and backward, with r_i = 1 / (z . q_i + epsilon), n_i = r_i do_i and e_i = -r_i (do_i . o_i):
 *
 *   dq_i = S n_i + e_i z,  dS = Q^T N,  dz = Q^T e,  dk_j = dS v_j + dz,  dv_j = dS^T k_j
 *
 * All are products of many rows (engines/dense/batch.c): cost grows with the length, memory beside
 * the rows does not. Results do not depend on what other sequences a batch has. */
#include "graph/head_products.h"
#include "graph/operations.h"
#include "graph/passes.h"

typedef struct linear_node {
  attn_node node;
  attn_var *q, *k, *v;
  attn_linear_attention options;
  attn_layout layout, key_layout;
  attn_tensor matrices; /* S [batch, heads, dim, value_dim], wide */
  attn_tensor sums;     /* z [batch, heads, dim], wide; with the normaliser, as is */
  attn_tensor inverses; /* r [rows, heads], wide */
} linear_node;

/* Views ---------------------------------------------------------------------------------------- */

/* How many sequences are treated together: all where both layouts have equal lengths. */
static int64_t step_of(const linear_node *n) {
  return n->layout.offsets || n->key_layout.offsets ? 1 : n->layout.batch;
}

/* Sequence b, or all, of rows [rows, heads, n], as [sequences, heads, length, n]. */
static attn_tensor by_head(const linear_node *n, const attn_tensor *rows, const attn_layout *layout,
                           int64_t b) {
  return attn_rows_by_head(rows, attn_layout_first(layout, b), step_of(n),
                           attn_layout_length(layout, b));
}

/* Rows b, b + 1, .. of a tensor [batch, ..]. */
static attn_tensor part_of(const linear_node *n, const attn_tensor *all, int64_t b) {
  attn_tensor part = *all;
  part.shape[0] = step_of(n);
  part.data = (char *)all->data + b * all->stride[0] * (int64_t)attn_dtype_size(all->dtype);
  return part;
}

/* z [sequences, heads, dim] for each of `like` [sequences, heads, length, dim]. */
static attn_tensor repeated(const attn_tensor *z, const attn_tensor *like) {
  attn_tensor rows = *z;
  rows.rank = 4;
  rows.shape[2] = like->shape[2], rows.stride[2] = 0;
  rows.shape[3] = z->shape[2], rows.stride[3] = z->stride[2];
  return rows;
}

/* [sequences, heads, length] of numbers [rows, heads]. */
static attn_tensor numbers_of(const linear_node *n, const attn_tensor *numbers, int64_t b) {
  attn_tensor column = *numbers;
  column.rank = 3;
  column.shape[2] = 1, column.stride[2] = 1;
  column = by_head(n, &column, &n->layout, b);
  column.rank = 3;
  return column;
}

/* z of each sequence: the sum of its rows, which are contiguous. */
static void sum_rows(attn_graph *g, const linear_node *n, const attn_tensor *z,
                     const attn_tensor *rows, const attn_layout *layout) {
  int64_t width = rows->shape[1] * rows->shape[2];
  attn_tensor flat, sums;
  attn_status status = attn_tensor_reshape(rows, 2, (int64_t[]){rows->shape[0], width}, &flat);
  if (status == ATTN_OK)
    status = attn_tensor_reshape(z, 2, (int64_t[]){n->layout.batch, width}, &sums);
  for (int64_t b = 0; b < layout->batch && status == ATTN_OK; ++b) {
    attn_tensor sequence, sum;
    status = attn_tensor_slice(&flat, 0, attn_layout_first(layout, b),
                               attn_layout_length(layout, b), &sequence);
    if (status == ATTN_OK) status = attn_tensor_select(&sums, 0, b, &sum);
    if (status == ATTN_OK && sequence.shape[0] == 0)
      status = attn_tensor_fill(&sum, 0);
    else if (status == ATTN_OK)
      attn_pass_column_dot(g, &sum, &sequence, NULL);
  }
  if (status != ATTN_OK) attn_graph_error(g, status);
}

/* The sums of a denominator are of rows [rows, heads, n] without gaps. */
static attn_tensor gapless(attn_graph *g, const attn_tensor *x) {
  if (x->stride[1] == x->shape[2] && x->stride[2] == 1 && x->stride[0] == x->shape[1] * x->shape[2])
    return *x;
  attn_tensor copy = attn_graph_tensor_like(g, x->dtype, x);
  if (copy.data) attn_add_tensor(g, &copy, x, 1, false);
  return copy;
}

static bool has_rows(const linear_node *n, int64_t b) {
  return attn_layout_length(&n->layout, b) > 0;
}

/* Backward -------------------------------------------------------------------------------------
 */

/* e [rows, heads], and n in place of do. */
static attn_tensor divide_gradient(attn_graph *g, const linear_node *n, const attn_tensor *o,
                                   const attn_tensor *d_o) {
  attn_tensor e = attn_graph_tensor_like(g, g->wide, &n->inverses);
  attn_tensor dots = attn_graph_tensor_like(g, g->wide, &n->inverses);
  if (!e.data || !dots.data) return e;
  attn_pass_row_dot(g, &dots, d_o, o);
  attn_pass_multiply_sum(g, &e, false, 1, &n->inverses, &dots);
  attn_pass_add(g, &e, -1, &e, 0, NULL);
  attn_pass_scale_rows(g, d_o, false, &n->inverses, d_o);
  return e;
}

static void queries_gradient(attn_graph *g, const linear_node *n, const attn_tensor *d_o,
                             const attn_tensor *e) {
  attn_tensor dq = attn_graph_tensor_like(g, g->wide, &n->q->value);
  if (!dq.data) return;
  for (int64_t b = 0; b < n->layout.batch; b += step_of(n)) {
    if (!has_rows(n, b)) continue;
    attn_tensor to = by_head(n, &dq, &n->layout, b), from = by_head(n, d_o, &n->layout, b);
    attn_tensor s = part_of(n, &n->matrices, b);
    attn_multiply_heads(g, ATTN_BY_ROWS_TRANSPOSED, &from, &s, &to);
    if (!n->options.normalise) continue;
    attn_tensor z = part_of(n, &n->sums, b), each = repeated(&z, &to);
    attn_tensor factors = numbers_of(n, e, b);
    attn_pass_scale_rows(g, &to, true, &factors, &each);
  }
  attn_gradient_add(g, n->q, &dq);
}

/* dS and, with the normaliser, dz; both like S and z. */
static void state_gradient(attn_graph *g, const linear_node *n, const attn_tensor *q,
                           const attn_tensor *d_o, const attn_tensor *e, const attn_tensor *ds,
                           const attn_tensor *dz) {
  for (int64_t b = 0; b < n->layout.batch; b += step_of(n)) {
    attn_tensor from = by_head(n, q, &n->layout, b), upstream = by_head(n, d_o, &n->layout, b);
    attn_tensor to = part_of(n, ds, b);
    attn_multiply_heads(g, ATTN_OVER_ROWS, &from, &upstream, &to);
  }
  if (!n->options.normalise) return;
  attn_tensor weighted = attn_graph_tensor_like(g, g->wide, q);
  if (!weighted.data) return;
  attn_pass_scale_rows(g, &weighted, false, e, q);
  sum_rows(g, n, dz, &weighted, &n->layout);
}

static void keys_gradient(attn_graph *g, const linear_node *n, const attn_tensor *v,
                          const attn_tensor *ds, const attn_tensor *dz) {
  attn_tensor dk = attn_graph_tensor_like(g, g->wide, &n->k->value);
  if (!dk.data) return;
  for (int64_t b = 0; b < n->layout.batch; b += step_of(n)) {
    if (attn_layout_length(&n->key_layout, b) == 0) continue;
    attn_tensor to = by_head(n, &dk, &n->key_layout, b), from = by_head(n, v, &n->key_layout, b);
    attn_tensor s = part_of(n, ds, b);
    attn_multiply_heads(g, ATTN_BY_ROWS_TRANSPOSED, &from, &s, &to);
    if (!n->options.normalise) continue;
    attn_tensor sums = part_of(n, dz, b), each = repeated(&sums, &to);
    attn_pass_add(g, &to, 1, &to, 1, &each);
  }
  attn_gradient_add(g, n->k, &dk);
}

static void values_gradient(attn_graph *g, const linear_node *n, const attn_tensor *k,
                            const attn_tensor *ds) {
  attn_tensor dv = attn_graph_tensor_like(g, g->wide, &n->v->value);
  if (!dv.data) return;
  for (int64_t b = 0; b < n->layout.batch; b += step_of(n)) {
    if (attn_layout_length(&n->key_layout, b) == 0) continue;
    attn_tensor to = by_head(n, &dv, &n->key_layout, b), from = by_head(n, k, &n->key_layout, b);
    attn_tensor s = part_of(n, ds, b);
    attn_multiply_heads(g, ATTN_BY_ROWS, &from, &s, &to);
  }
  attn_gradient_add(g, n->v, &dv);
}

static attn_status linear_backward(attn_graph *g, attn_node *node) {
  const linear_node *n = (const linear_node *)node;
  attn_tensor e = {0}, dz = {0}, ds = attn_graph_tensor_like(g, g->wide, &n->matrices);
  attn_tensor q = attn_rows_in(g, &n->q->value, g->wide, 1),
              k = attn_rows_in(g, &n->k->value, g->wide, 1);
  attn_tensor v = attn_rows_in(g, &n->v->value, g->wide, 1);
  attn_tensor d_o = attn_graph_tensor_like(g, g->wide, &node->output->value);
  if (g->status != ATTN_OK) return g->status;
  attn_add_tensor(g, &d_o, &node->output->gradient, 1, false);
  if (n->options.normalise) {
    dz = attn_graph_tensor_like(g, g->wide, &n->sums);
    e = divide_gradient(g, n, &node->output->value, &d_o);
  }
  if (g->status != ATTN_OK) return g->status;
  if (n->q->needs_gradient) queries_gradient(g, n, &d_o, &e);
  if (!n->k->needs_gradient && !n->v->needs_gradient) return g->status;
  state_gradient(g, n, &q, &d_o, &e, &ds, &dz);
  if (n->k->needs_gradient && g->status == ATTN_OK) keys_gradient(g, n, &v, &ds, &dz);
  if (n->v->needs_gradient && g->status == ATTN_OK) values_gradient(g, n, &k, &ds);
  return g->status;
}

/* Forward --------------------------------------------------------------------------------------
 */

/* S and, with the normaliser, z. */
static void sum_keys(attn_graph *g, const linear_node *n) {
  attn_tensor k = attn_rows_in(g, &n->k->value, g->compute, 1);
  attn_tensor v = attn_rows_in(g, &n->v->value, g->compute, 1);
  if (n->options.normalise) k = gapless(g, &k);
  if (g->status != ATTN_OK) return;
  for (int64_t b = 0; b < n->layout.batch; b += step_of(n)) {
    attn_tensor keys = by_head(n, &k, &n->key_layout, b);
    attn_tensor values = by_head(n, &v, &n->key_layout, b), s = part_of(n, &n->matrices, b);
    attn_multiply_heads(g, ATTN_OVER_ROWS, &keys, &values, &s);
  }
  if (n->options.normalise) sum_rows(g, n, &n->sums, &k, &n->key_layout);
}

/* r, which passes make as the square of an inverse root: denominators are positive. */
static void invert(attn_graph *g, const linear_node *n, const attn_tensor *q) {
  attn_tensor roots = attn_graph_tensor_like(g, g->wide, &n->inverses);
  attn_tensor sums = attn_graph_tensor_like(g, g->wide, &n->inverses), flat, flat_roots;
  if (!roots.data || !sums.data) return;
  for (int64_t b = 0; b < n->layout.batch; b += step_of(n)) {
    if (!has_rows(n, b)) continue;
    attn_tensor rows = by_head(n, q, &n->layout, b), z = part_of(n, &n->sums, b);
    attn_tensor each = repeated(&z, &rows), to = numbers_of(n, &sums, b);
    attn_pass_row_dot(g, &to, &rows, &each);
  }
  int64_t count = attn_tensor_count(&sums);
  attn_status status = attn_tensor_reshape(&sums, 1, &count, &flat);
  if (status == ATTN_OK) status = attn_tensor_reshape(&roots, 1, &count, &flat_roots);
  if (status != ATTN_OK) {
    attn_graph_error(g, status);
    return;
  }
  attn_pass_inverse_root(g, &flat_roots, &flat, n->options.epsilon);
  attn_pass_multiply_sum(g, &n->inverses, false, 1, &roots, &roots);
}

static void answer(attn_graph *g, const linear_node *n, const attn_tensor *o) {
  attn_tensor q = attn_rows_in(g, &n->q->value, g->wide, 1);
  attn_tensor sums = attn_graph_tensor_like(g, g->wide, o);
  if (g->status != ATTN_OK) return;
  for (int64_t b = 0; b < n->layout.batch; b += step_of(n)) {
    if (!has_rows(n, b)) continue;
    attn_tensor rows = by_head(n, &q, &n->layout, b), to = by_head(n, &sums, &n->layout, b);
    attn_tensor s = part_of(n, &n->matrices, b);
    attn_multiply_heads(g, ATTN_BY_ROWS, &rows, &s, &to);
  }
  if (n->options.normalise) {
    invert(g, n, &q);
    attn_pass_scale_rows(g, o, false, &n->inverses, &sums);
  } else {
    attn_add_tensor(g, o, &sums, 1, false);
  }
}

attn_var *attn_op_linear_attention(attn_graph *graph, const attn_linear_attention *options,
                                   const attn_layout *layout, const attn_layout *key_layout,
                                   attn_var *q, attn_var *k, attn_var *v) {
  if (!q || !k || !v) return NULL;
  char text[3][128];
  const int64_t *shape = q->value.shape;
  if (layout->batch != key_layout->batch ||
      !attn_are_heads(&q->value, layout, &k->value, &v->value, key_layout))
    return attn_graph_fail(
        graph, ATTN_INVALID_SHAPE,
        "linear attention: q, k and v are %s, %s and %s, expected [%lld, heads, dim], [%lld, "
        "heads, dim] and [%lld, heads, n] of as many sequences",
        attn_shape_text(&q->value, text[0]), attn_shape_text(&k->value, text[1]),
        attn_shape_text(&v->value, text[2]), (long long)layout->rows, (long long)key_layout->rows,
        (long long)key_layout->rows);
  int64_t batch = layout->batch, heads = shape[1], values = v->value.shape[2];
  linear_node made = {.q = q, .k = k, .v = v, .options = *options};
  made.layout = *layout;
  made.key_layout = *key_layout;
  made.matrices =
      attn_graph_tensor(graph, graph->wide, 4, (int64_t[]){batch, heads, shape[2], values});
  made.sums = attn_graph_tensor(graph, graph->wide, 3, (int64_t[]){batch, heads, shape[2]});
  made.inverses = attn_graph_tensor(graph, graph->wide, 2, (int64_t[]){layout->rows, heads});
  attn_tensor o =
      attn_graph_tensor(graph, graph->compute, 3, (int64_t[]){layout->rows, heads, values});
  if (graph->status != ATTN_OK) return NULL;
  attn_graph_mark mark = attn_graph_get_mark(graph);
  sum_keys(graph, &made);
  if (graph->status == ATTN_OK) answer(graph, &made, &o);
  attn_graph_release(graph, mark);
  if (graph->status != ATTN_OK) return NULL;
  attn_var *y = attn_graph_result(graph, o, 3, (attn_var *[]){q, k, v});
  linear_node *node = attn_graph_record(graph, sizeof *node, y, linear_backward);
  if (node) {
    made.node = node->node;
    *node = made;
  }
  return y;
}
