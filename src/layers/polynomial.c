/* All monomials of degree 0 to p of n channels, weighted so that their products are powers:
 *
 *   phi(x) = [s_j sqrt(j! / (m_1! .. m_n!)) x'_1^m_1 .. x'_n^m_n],  j = m_1 + .. + m_n <= p
 *   phi(q) . phi(k) = sum over j of s_j^2 (q' . k')^j,  x' = factor x
 *
 * With s_j^2 = 1 / j! it is exp to order p (arXiv 2402.18668 for p = 2, 2505.23735 for any p).
 *
 * Monomials are in lexicographic order within each degree. Those of degree j that begin with
 * channel i are x'_i times the ones of degree j - 1 in channels i and later, which are the end of
 * their block; so both directions go from block to block. */
#include "graph/operations.h"
#include "graph/passes.h"
#include "layers/layers.h"

#include <math.h>

typedef struct polynomial_node {
  attn_node node;
  attn_var *x, *scales;
  attn_tensor monomials; /* without weights, [.., features], wide */
  attn_tensor weights;   /* [features] as rows of stride 0, wide */
  int degree;
  double factor;
} polynomial_node;

/* Monomials of degree `degree` in n channels: n + degree - 1 over degree. */
static int64_t monomials_of(int64_t n, int degree) {
  int64_t count = 1;
  for (int j = 1; j <= degree; ++j) count = count * (n + j - 1) / j;
  return count;
}

int64_t attn_polynomial_features(int64_t n, int degree) {
  int64_t count = 0;
  for (int j = 0; j <= degree; ++j) count += monomials_of(n, j);
  return count;
}

/* Where the monomials of degree `degree` in channels `channel` and later begin. */
static int64_t place_of(int64_t n, int degree, int64_t channel) {
  return attn_polynomial_features(n, degree) - monomials_of(n - channel, degree);
}

/* Channels first .. first + count. */
static attn_tensor channels(const attn_tensor *x, int64_t first, int64_t count) {
  attn_tensor part = *x;
  part.data = (char *)x->data + first * (int64_t)attn_dtype_size(x->dtype);
  part.shape[x->rank - 1] = count;
  return part;
}

/* Channel i without its axis. */
static attn_tensor channel(const attn_tensor *x, int64_t i) {
  attn_tensor part = channels(x, i, 1);
  part.rank -= 1;
  return part;
}

static attn_tensor block(const attn_tensor *x, int64_t n, int degree) {
  return channels(x, place_of(n, degree, 0), monomials_of(n, degree));
}

/* x'_i times `later`, of degree j, and where it goes. */
typedef struct product {
  attn_tensor own, later, to;
} product;

static product product_of(const attn_tensor *monomials, const attn_tensor *to, int64_t n,
                          int degree, int64_t i) {
  int64_t count = monomials_of(n - i, degree - 1);
  return (product){.own = channel(monomials, 1 + i),
                   .later = channels(monomials, place_of(n, degree - 1, i), count),
                   .to = channels(to, place_of(n, degree, i), count)};
}

/* The weights, with s_j = 1 / sqrt(j!) where scales are none of the caller's. A monomial that
 * begins with m_i times channel i is j / m_i times as often among the products of j factors as what
 * is left of it without one of them. */
static attn_tensor make_weights(attn_graph *g, int64_t n, int degree, bool taylor) {
  int64_t count = attn_polynomial_features(n, degree);
  double *weights = attn_arena_alloc(g->arena, (size_t)count * sizeof *weights);
  int64_t *run = attn_arena_alloc(g->arena, (size_t)count * sizeof *run);
  int64_t *lead = attn_arena_alloc(g->arena, (size_t)count * sizeof *lead);
  if (!weights || !run || !lead) {
    attn_graph_error(g, ATTN_OUT_OF_MEMORY);
    return (attn_tensor){0};
  }
  weights[0] = 1, run[0] = 0, lead[0] = -1;
  for (int j = 1; j <= degree; ++j)
    for (int64_t i = 0; i < n; ++i) {
      int64_t from = place_of(n, j - 1, i), to = place_of(n, j, i);
      if (j == 1) from = 0;
      for (int64_t m = 0; m < monomials_of(n - i, j - 1); ++m) {
        lead[to + m] = i;
        run[to + m] = lead[from + m] == i ? run[from + m] + 1 : 1;
        weights[to + m] = weights[from + m] * (double)j / (double)run[to + m];
      }
    }
  double scale = 1;
  for (int j = 0; j <= degree; ++j) {
    if (j && taylor) scale /= j;
    for (int64_t m = 0; m < monomials_of(n, j); ++m) {
      double *weight = &weights[place_of(n, j, 0) + m];
      *weight = sqrt(*weight * scale);
    }
  }
  return attn_pass_numbers(g, g->wide, count, weights);
}

/* The same row for all rows of x. */
static attn_tensor repeated(const attn_tensor *row, const attn_tensor *x) {
  attn_tensor rows = *row;
  rows.rank = x->rank;
  for (int i = 0; i < x->rank; ++i) rows.shape[i] = x->shape[i], rows.stride[i] = 0;
  rows.stride[x->rank - 1] = 1;
  return rows;
}

static void fill_monomials(attn_graph *g, const attn_tensor *y, const attn_tensor *x, int degree,
                           double factor) {
  int64_t n = x->shape[x->rank - 1];
  attn_tensor one = channels(y, 0, 1);
  attn_tensor number = attn_pass_numbers(g, g->wide, 1, (double[]){1});
  if (g->status != ATTN_OK) return;
  attn_tensor ones = repeated(&number, &one);
  attn_pass_add(g, &one, 1, &ones, 0, NULL);
  if (degree < 1) return;
  attn_tensor first = channels(y, 1, n);
  attn_add_tensor(g, &first, x, factor, false);
  for (int j = 2; j <= degree; ++j)
    for (int64_t i = 0; i < n; ++i) {
      product p = product_of(y, y, n, j, i);
      attn_pass_scale_rows(g, &p.to, false, &p.own, &p.later);
    }
}

static attn_tensor scale_of(const attn_var *scales, int degree) {
  attn_tensor scale = channels(&scales->value, degree, 1);
  return scale;
}

/* d [.., features] becomes the gradient of the weighted monomials, and scales get theirs: for s_j
 * the sum of d (.) what it multiplies. */
static void scales_backward(attn_graph *g, polynomial_node *self, const attn_tensor *d, int64_t n) {
  int64_t rows = attn_rows(d), count = self->degree + 1;
  attn_tensor sums = attn_graph_tensor(g, g->wide, 2, (int64_t[]){rows, count});
  attn_tensor total = attn_graph_tensor(g, g->wide, 1, &count);
  attn_tensor flat_d = *d, flat = self->monomials;
  if (g->status != ATTN_OK) return;
  flat_d.rank = flat.rank = 2;
  flat_d.shape[0] = flat.shape[0] = rows;
  flat_d.shape[1] = flat.shape[1] = d->shape[d->rank - 1];
  flat_d.stride[0] = flat.stride[0] = flat_d.shape[1];
  flat_d.stride[1] = flat.stride[1] = 1;
  for (int j = 0; j <= self->degree; ++j) {
    attn_tensor of_d = block(&flat_d, n, j), of_y = block(&flat, n, j);
    attn_tensor sum = channel(&sums, j), s = scale_of(self->scales, j);
    attn_pass_row_dot(g, &sum, &of_d, &of_y);
    attn_pass_scale_by(g, &of_d, false, &s, &of_d);
  }
  attn_pass_column_dot(g, &total, &sums, NULL);
  attn_gradient_add(g, self->scales, &total);
}

static attn_status polynomial_backward(attn_graph *g, attn_node *node) {
  polynomial_node *self = (polynomial_node *)node;
  const attn_tensor *y = &self->monomials, *dy = &node->output->gradient;
  int64_t n = self->x->value.shape[self->x->value.rank - 1];
  attn_tensor d = attn_graph_tensor_like(g, g->wide, y);
  attn_tensor pulls = attn_graph_tensor_like(g, g->wide, &self->x->value); /* by later factors */
  if (g->status != ATTN_OK) return g->status;
  attn_tensor weights = repeated(&self->weights, y);
  attn_pass_multiply_sum(g, &d, false, 1, dy, &weights);
  if (self->scales) scales_backward(g, self, &d, n);
  attn_tensor first = channels(&d, 1, n);
  for (int j = self->degree; j >= 2; --j) {
    for (int64_t i = 0; i < n; ++i) {
      product p = product_of(y, &d, n, j, i); /* `to` has the gradient of the product */
      attn_tensor pull = channel(&pulls, i),
                  later = channels(&d, place_of(n, j - 1, i), p.later.shape[y->rank - 1]);
      attn_pass_row_dot(g, &pull, &p.to, &p.later);
      attn_pass_scale_rows(g, &later, true, &p.own, &p.to);
    }
    attn_pass_add(g, &first, 1, &first, 1, &pulls);
  }
  bool accumulate;
  attn_tensor dx = attn_gradient_of(g, self->x, &accumulate);
  if (dx.data) attn_add_tensor(g, &dx, &first, self->factor, accumulate);
  return g->status;
}

attn_var *attn_layer_polynomial(attn_graph *graph, attn_var *x, int degree, double factor,
                                attn_var *scales) {
  if (!x || x->value.rank < 1) return NULL;
  int64_t shape[ATTN_MAX_RANK], n = x->value.shape[x->value.rank - 1];
  if (scales && (scales->value.rank != 1 || scales->value.shape[0] != degree + 1))
    return attn_graph_fail(graph, ATTN_INVALID_SHAPE, "polynomial: %lld scales of degrees 0 to %d",
                           (long long)attn_tensor_count(&scales->value), degree);
  for (int i = 0; i < x->value.rank; ++i) shape[i] = x->value.shape[i];
  shape[x->value.rank - 1] = attn_polynomial_features(n, degree);
  attn_tensor value = attn_graph_tensor(graph, graph->compute, x->value.rank, shape);
  attn_tensor monomials = attn_graph_tensor(graph, graph->wide, x->value.rank, shape);
  attn_tensor weights = make_weights(graph, n, degree, !scales);
  if (graph->status != ATTN_OK) return NULL;
  fill_monomials(graph, &monomials, &x->value, degree, factor);
  attn_tensor rows = repeated(&weights, &monomials);
  attn_tensor scaled = scales ? attn_graph_tensor_like(graph, graph->wide, &monomials) : monomials;
  if (graph->status != ATTN_OK) return NULL;
  for (int j = 0; scales && j <= degree; ++j) {
    attn_tensor to = block(&scaled, n, j), from = block(&monomials, n, j), s = scale_of(scales, j);
    attn_pass_scale_by(graph, &to, false, &s, &from);
  }
  attn_pass_multiply_sum(graph, &value, false, 1, &scaled, &rows);
  attn_var *y = attn_graph_result(graph, value, scales ? 2 : 1, (attn_var *[]){x, scales});
  polynomial_node *node = attn_graph_record(graph, sizeof *node, y, polynomial_backward);
  if (node) {
    node->x = x;
    node->scales = scales;
    node->monomials = monomials;
    node->weights = weights;
    node->degree = degree;
    node->factor = factor;
  }
  return y;
}

int64_t attn_taylor_features(int64_t n) {
  return attn_polynomial_features(n, 2);
}

attn_var *attn_layer_taylor(attn_graph *graph, attn_var *x) {
  if (!x || x->value.rank < 1) return NULL;
  double n = (double)x->value.shape[x->value.rank - 1];
  return attn_layer_polynomial(graph, x, 2, pow(n, -0.25), NULL);
}
