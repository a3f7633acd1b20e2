/* Windows of exact attention beside a linear part: LoLCATs (arXiv 2410.10254, equation 6). The
 * operations are passes of kernels/window.h, which has the formulas. */
#include "graph/operations.h"
#include "graph/passes.h"

/* Rows ------------------------------------------------------------------------------------------
 */

typedef struct take_node {
  attn_node node;
  attn_var *x;
  const int32_t *index;
} take_node;

/* x [rows, ...] as a matrix, one row after the other. */
static attn_tensor as_matrix(attn_graph *g, const attn_tensor *x) {
  attn_tensor matrix;
  int64_t rows = x->shape[0], shape[2] = {rows, rows ? attn_tensor_count(x) / rows : 0};
  if (attn_tensor_is_contiguous(x) && attn_tensor_reshape(x, 2, shape, &matrix) == ATTN_OK)
    return matrix;
  attn_tensor copy = attn_graph_tensor_like(g, x->dtype, x);
  if (!copy.data) return copy;
  attn_add_tensor(g, &copy, x, 1, false);
  attn_status status = attn_tensor_reshape(&copy, 2, shape, &matrix);
  if (status == ATTN_OK) return matrix;
  attn_graph_error(g, status);
  return (attn_tensor){0};
}

static void take(attn_graph *g, const attn_tensor *y, const attn_tensor *x, const int32_t *index) {
  attn_tensor to = as_matrix(g, y), from = as_matrix(g, x);
  const int32_t *uploaded = attn_pass_upload(g, index, (size_t)y->shape[0] * sizeof *index);
  if (g->status == ATTN_OK) attn_pass_gather(g, &to, 1, &from, uploaded);
}

/* From index to who took each row: the `turn`-th time (from 0), -1 where there is none. False when
 * nobody took a row so often. `seen` and `takers` have an entry for each row of x. */
static bool find_takers(const int32_t *index, int64_t count, int64_t rows, int turn, int32_t *seen,
                        int32_t *takers) {
  bool any = false;
  for (int64_t j = 0; j < rows; ++j) {
    seen[j] = 0;
    takers[j] = -1;
  }
  for (int64_t r = 0; r < count; ++r) {
    if (index[r] < 0 || seen[index[r]]++ != turn) continue;
    takers[index[r]] = (int32_t)r;
    any = true;
  }
  return any;
}

/* Sums of as many terms as a row was taken, in the order of who took it. */
static attn_status take_backward(attn_graph *g, attn_node *node) {
  take_node *self = (take_node *)node;
  const attn_tensor *dy = &node->output->gradient, *x = &self->x->value;
  int64_t rows = x->shape[0];
  int32_t *seen = attn_arena_alloc(g->arena, 2 * (size_t)rows * sizeof *seen);
  if (!seen) return ATTN_OUT_OF_MEMORY;
  attn_tensor sum = {0};
  for (int turn = 0;
       find_takers(self->index, dy->shape[0], rows, turn, seen, seen + rows) || turn == 0; ++turn) {
    attn_tensor part = attn_graph_tensor_like(g, x->dtype, x);
    if (!part.data) return g->status;
    take(g, &part, dy, seen + rows);
    if (turn == 1) { /* in the wide dtype, which a copy of the first term begins */
      attn_tensor wide = attn_graph_tensor_like(g, g->wide, x);
      if (!wide.data) return g->status;
      attn_add_tensor(g, &wide, &sum, 1, false);
      sum = wide;
    }
    if (turn == 0)
      sum = part;
    else
      attn_add_tensor(g, &sum, &part, 1, true);
  }
  attn_gradient_add(g, self->x, &sum);
  return g->status;
}

attn_var *attn_op_take_rows(attn_graph *graph, attn_var *x, const int32_t *index, int64_t count) {
  if (!x) return NULL;
  int64_t shape[ATTN_MAX_RANK];
  for (int i = 0; i < x->value.rank; ++i) shape[i] = x->value.shape[i];
  if (x->value.rank < 1 || x->value.shape[0] < 1)
    return attn_graph_fail(graph, ATTN_INVALID_SHAPE, "take_rows: x has no rows");
  shape[0] = count;
  attn_tensor value = attn_graph_tensor(graph, x->value.dtype, x->value.rank, shape);
  if (!value.data) return NULL;
  take(graph, &value, &x->value, index);
  attn_var *y = attn_graph_result(graph, value, 1, &x);
  take_node *node = attn_graph_record(graph, sizeof *node, y, take_backward);
  if (node) {
    node->x = x;
    node->index = index;
  }
  return y;
}

/* The greatest score ----------------------------------------------------------------------------
 */

typedef struct greatest_node {
  attn_node node;
  attn_var *q, *k;
  attn_window_ranges ranges; /* on the device */
  attn_tensor place;
  double scale;
} greatest_node;

static attn_status greatest_backward(attn_graph *g, attn_node *node) {
  greatest_node *self = (greatest_node *)node;
  attn_tensor dq = attn_graph_tensor_like(g, g->wide, &self->q->value);
  attn_tensor dk = attn_graph_tensor_like(g, g->wide, &self->k->value);
  const attn_greatest_tensors x = {.q = &self->q->value,
                                   .k = &self->k->value,
                                   .place = &self->place,
                                   .dg = &node->output->gradient,
                                   .dq = &dq,
                                   .dk = &dk,
                                   .scale = self->scale};
  attn_pass_greatest_backward(g, &self->ranges, &x);
  attn_gradient_add(g, self->q, &dq);
  attn_gradient_add(g, self->k, &dk);
  return g->status;
}

static bool is_heads(const attn_tensor *x) {
  return x->rank == 3 && (x->stride[2] == 1 || x->shape[2] == 1);
}

static bool upload_ranges(attn_graph *g, const attn_window_ranges *from, int64_t queries,
                          int64_t keys, attn_window_ranges *to) {
  to->first = attn_pass_upload(g, from->first, (size_t)queries * sizeof *from->first);
  to->end = attn_pass_upload(g, from->end, (size_t)queries * sizeof *from->end);
  to->from = attn_pass_upload(g, from->from, (size_t)keys * sizeof *from->from);
  to->until = attn_pass_upload(g, from->until, (size_t)keys * sizeof *from->until);
  return g->status == ATTN_OK;
}

attn_var *attn_op_greatest_score(attn_graph *graph, const attn_window_ranges *ranges, double scale,
                                 attn_var *q, attn_var *k) {
  if (!q || !k) return NULL;
  char text_q[128], text_k[128];
  const attn_tensor *of_q = &q->value, *of_k = &k->value;
  if (!is_heads(of_q) || !is_heads(of_k) || of_q->shape[2] != of_k->shape[2] ||
      of_q->shape[1] % of_k->shape[1] != 0 || of_q->dtype != of_k->dtype)
    return attn_graph_fail(graph, ATTN_INVALID_SHAPE,
                           "greatest_score: q is %s, k %s, expected [rows, heads, dim] and [keys, "
                           "kv_heads, dim]",
                           attn_shape_text(of_q, text_q), attn_shape_text(of_k, text_k));
  attn_window_ranges uploaded;
  attn_tensor value = attn_graph_tensor(graph, graph->wide, 2, of_q->shape);
  attn_tensor place = attn_graph_tensor(graph, ATTN_I32, 2, of_q->shape);
  if (!value.data || !place.data ||
      !upload_ranges(graph, ranges, of_q->shape[0], of_k->shape[0], &uploaded))
    return NULL;
  const attn_greatest_tensors x = {
      .q = of_q, .k = of_k, .greatest = &value, .place = &place, .scale = scale};
  attn_pass_greatest(graph, &uploaded, &x);
  attn_var *y = attn_graph_result(graph, value, 2, (attn_var *[]){q, k});
  greatest_node *node = attn_graph_record(graph, sizeof *node, y, greatest_backward);
  if (node) {
    node->q = q;
    node->k = k;
    node->ranges = uploaded;
    node->place = place;
    node->scale = scale;
  }
  return y;
}

/* Both parts under one normaliser ---------------------------------------------------------------
 */

typedef struct join_node {
  attn_node node;
  attn_var *window, *lse, *greatest, *factor, *linear;
} join_node;

/* [heads, rows] or [1, heads, rows] as [rows, heads]. */
static attn_tensor by_row(const attn_tensor *lse) {
  attn_tensor turned = *lse;
  int heads = lse->rank - 2;
  turned.rank = 2;
  turned.shape[0] = lse->shape[heads + 1], turned.stride[0] = lse->stride[heads + 1];
  turned.shape[1] = lse->shape[heads], turned.stride[1] = lse->stride[heads];
  return turned;
}

/* d log e goes to the factor, to the LSE and, negative, to the greatest score. */
static attn_status spread(attn_graph *g, join_node *self, const attn_tensor *d_log) {
  bool accumulate;
  attn_tensor d_greatest = attn_gradient_of(g, self->greatest, &accumulate);
  if (d_greatest.data) attn_add_tensor(g, &d_greatest, d_log, -1, accumulate);
  attn_tensor d_lse = attn_gradient_of(g, self->lse, &accumulate);
  if (d_lse.data) {
    attn_tensor turned = by_row(&d_lse);
    attn_add_tensor(g, &turned, d_log, 1, accumulate);
  }
  if (!self->factor->needs_gradient) return g->status;
  attn_tensor sum = attn_graph_tensor_like(g, g->wide, &self->factor->value);
  if (sum.data) attn_pass_column_dot(g, &sum, d_log, NULL);
  attn_gradient_add(g, self->factor, &sum);
  return g->status;
}

static attn_status join_backward(attn_graph *g, attn_node *node) {
  join_node *self = (join_node *)node;
  const attn_tensor *window = &self->window->value, *linear = &self->linear->value;
  attn_tensor lse = by_row(&self->lse->value);
  attn_tensor d_window = attn_graph_tensor_like(g, window->dtype, window);
  attn_tensor d_linear = attn_graph_tensor_like(g, linear->dtype, linear);
  attn_tensor d_log = attn_graph_tensor_like(g, g->wide, &self->greatest->value);
  const attn_join_tensors x = {.window = window,
                               .linear = linear,
                               .lse = &lse,
                               .greatest = &self->greatest->value,
                               .factor = &self->factor->value,
                               .dy = &node->output->gradient,
                               .d_window = &d_window,
                               .d_linear = &d_linear,
                               .d_log = &d_log};
  attn_pass_join_backward(g, &x);
  attn_gradient_add(g, self->window, &d_window);
  attn_gradient_add(g, self->linear, &d_linear);
  return spread(g, self, &d_log);
}

static bool joins(attn_graph *g, const attn_tensor *window, const attn_tensor *lse,
                  const attn_tensor *greatest, const attn_tensor *factor,
                  const attn_tensor *linear) {
  char text_window[128], text_lse[128], text_linear[128];
  int64_t rows = window->shape[0], heads = window->shape[1];
  bool right = is_heads(window) && is_heads(linear) && linear->shape[0] == rows &&
               linear->shape[1] == heads && linear->shape[2] > window->shape[2] &&
               greatest->rank == 2 && greatest->shape[0] == rows && greatest->shape[1] == heads &&
               factor->rank == 1 && factor->shape[0] == heads && lse->rank >= 2 && lse->rank <= 3 &&
               (lse->rank == 2 || lse->shape[0] == 1) && lse->shape[lse->rank - 2] == heads &&
               lse->shape[lse->rank - 1] == rows && lse->dtype == g->wide &&
               greatest->dtype == g->wide && factor->dtype == g->wide;
  if (!right)
    attn_graph_fail(g, ATTN_INVALID_SHAPE,
                    "join_window: the window is %s, its LSE %s, the linear part %s",
                    attn_shape_text(window, text_window), attn_shape_text(lse, text_lse),
                    attn_shape_text(linear, text_linear));
  return right;
}

attn_var *attn_op_join_window(attn_graph *graph, attn_var *window, attn_var *lse,
                              attn_var *greatest, attn_var *factor, attn_var *linear) {
  if (!window || !lse || !greatest || !factor || !linear) return NULL;
  if (!joins(graph, &window->value, &lse->value, &greatest->value, &factor->value, &linear->value))
    return NULL;
  attn_tensor turned = by_row(&lse->value);
  attn_tensor value = attn_graph_tensor_like(graph, window->value.dtype, &window->value);
  if (!value.data) return NULL;
  const attn_join_tensors x = {.window = &window->value,
                               .linear = &linear->value,
                               .lse = &turned,
                               .greatest = &greatest->value,
                               .factor = &factor->value,
                               .y = &value};
  attn_pass_join(graph, &x);
  attn_var *inputs[5] = {window, lse, greatest, factor, linear};
  attn_var *y = attn_graph_result(graph, value, 5, inputs);
  join_node *node = attn_graph_record(graph, sizeof *node, y, join_backward);
  if (node) {
    node->window = window;
    node->lse = lse;
    node->greatest = greatest;
    node->factor = factor;
    node->linear = linear;
  }
  return y;
}
