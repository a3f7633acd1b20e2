/* The second-order Taylor map of exp, as Based has it (arXiv 2402.18668; 2312.04927):
 *
 *   phi(x) = [1, x', x'_i^2 / sqrt(2), x'_i x'_j for i < j],  x' = x / n^(1/4)
 *   phi(q) . phi(k) = 1 + s + s^2 / 2,  s = q . k / sqrt(n)
 *
 * with each product once, where the published layer has x'_i x'_j / sqrt(2) twice. Backward, with
 * d the gradient's parts in that order: dx'_i = d_i + sqrt(2) x'_i d_ii + sum over j of d_ij x'_j.
 */
#include "graph/operations.h"
#include "graph/passes.h"
#include "layers/layers.h"

#include <math.h>

typedef struct taylor_node {
  attn_node node;
  attn_var *x;
  attn_tensor scaled; /* x' [.., n] */
} taylor_node;

int64_t attn_taylor_features(int64_t n) {
  return 1 + 2 * n + n * (n - 1) / 2;
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

/* Where the products of x'_i with all later channels begin. */
static int64_t products_of(int64_t n, int64_t i) {
  return 1 + 2 * n + i * (2 * n - i - 1) / 2;
}

static void fill_features(attn_graph *g, const attn_tensor *y, const attn_tensor *scaled) {
  int64_t n = scaled->shape[scaled->rank - 1];
  attn_tensor one = channels(y, 0, 1), first = channels(y, 1, n), squares = channels(y, 1 + n, n);
  attn_tensor shrunk = attn_graph_tensor_like(g, scaled->dtype, scaled);
  attn_tensor ones = attn_pass_numbers(g, g->wide, 1, (double[]){1});
  if (g->status != ATTN_OK) return;
  ones.rank = y->rank;
  for (int i = 0; i < y->rank; ++i) ones.shape[i] = one.shape[i], ones.stride[i] = 0;
  attn_pass_add(g, &one, 1, &ones, 0, NULL);
  attn_pass_add(g, &first, 1, scaled, 0, NULL);
  attn_pass_add(g, &shrunk, sqrt(0.5), scaled, 0, NULL);
  attn_pass_multiply_sum(g, &squares, false, 1, scaled, &shrunk);
  for (int64_t i = 0; i + 1 < n; ++i) {
    attn_tensor to = channels(y, products_of(n, i), n - 1 - i);
    attn_tensor later = channels(scaled, i + 1, n - 1 - i), own = channel(scaled, i);
    attn_pass_scale_rows(g, &to, false, &own, &later);
  }
}

static attn_status taylor_backward(attn_graph *g, attn_node *node) {
  taylor_node *self = (taylor_node *)node;
  const attn_tensor *scaled = &self->scaled, *dy = &node->output->gradient;
  int64_t n = scaled->shape[scaled->rank - 1];
  if (!self->x->needs_gradient) return g->status;
  attn_tensor sum = attn_graph_tensor_like(g, g->wide, scaled);
  attn_tensor pulls = attn_graph_tensor_like(g, g->wide, scaled); /* by later channels */
  attn_tensor doubled = attn_graph_tensor_like(g, g->wide, scaled);
  attn_tensor first = channels(dy, 1, n), squares = channels(dy, 1 + n, n);
  if (g->status != ATTN_OK) return g->status;
  attn_pass_add(g, &sum, 1, &first, 0, NULL);
  attn_pass_add(g, &doubled, sqrt(2), scaled, 0, NULL);
  attn_pass_multiply_sum(g, &sum, true, 1, &doubled, &squares);
  ATTN_TRY(attn_tensor_fill(&pulls, 0));
  for (int64_t i = 0; i + 1 < n; ++i) {
    attn_tensor upstream = channels(dy, products_of(n, i), n - 1 - i);
    attn_tensor later = channels(scaled, i + 1, n - 1 - i), own = channel(scaled, i);
    attn_tensor pull = channel(&pulls, i), to = channels(&sum, i + 1, n - 1 - i);
    attn_pass_row_dot(g, &pull, &upstream, &later);
    attn_pass_scale_rows(g, &to, true, &own, &upstream);
  }
  attn_pass_add(g, &sum, 1, &sum, 1, &pulls);
  bool accumulate;
  attn_tensor dx = attn_gradient_of(g, self->x, &accumulate);
  if (dx.data) attn_add_tensor(g, &dx, &sum, pow((double)n, -0.25), accumulate);
  return g->status;
}

attn_var *attn_layer_taylor(attn_graph *graph, attn_var *x) {
  if (!x || x->value.rank < 1) return NULL;
  int64_t shape[ATTN_MAX_RANK], n = x->value.shape[x->value.rank - 1];
  for (int i = 0; i < x->value.rank; ++i) shape[i] = x->value.shape[i];
  shape[x->value.rank - 1] = attn_taylor_features(n);
  attn_tensor value = attn_graph_tensor(graph, graph->compute, x->value.rank, shape);
  attn_tensor scaled = attn_graph_tensor_like(graph, graph->wide, &x->value);
  if (graph->status != ATTN_OK) return NULL;
  attn_add_tensor(graph, &scaled, &x->value, pow((double)n, -0.25), false);
  fill_features(graph, &value, &scaled);
  attn_var *y = attn_graph_result(graph, value, 1, &x);
  taylor_node *node = attn_graph_record(graph, sizeof *node, y, taylor_backward);
  if (node) {
    node->x = x;
    node->scaled = scaled;
  }
  return y;
}
