/* y_h = W_h x_h: a product for each head, with gradients.
 *
 *   dx_h = W_h^T dy_h,  dW_h = sum over rows of dy_h x_h^T */
#include "engines/dense/dense.h"
#include "graph/operations.h"
#include "graph/passes.h"
#include "layers/layers.h"

typedef struct heads_node {
  attn_node node;
  attn_var *x;
  attn_tensor rows; /* x in the compute dtype */
  attn_parameter *w;
} heads_node;

/* [rows, heads, n] as [heads, rows, n]. */
static attn_tensor heads_first(const attn_tensor *t) {
  attn_tensor turned = *t;
  turned.shape[0] = t->shape[1], turned.stride[0] = t->stride[1];
  turned.shape[1] = t->shape[0], turned.stride[1] = t->stride[0];
  return turned;
}

/* x [rows, heads, n] in the compute dtype, its heads contiguous. */
static attn_tensor compute_heads(attn_graph *g, const attn_tensor *x) {
  if (x->dtype == g->compute && (x->stride[2] == 1 || x->shape[2] == 1)) return *x;
  attn_tensor converted = attn_graph_tensor(g, g->compute, 3, x->shape);
  if (converted.data) attn_add_tensor(g, &converted, x, 1, false);
  return converted;
}

/* W as [heads, m, n] in the compute dtype: as the weight has it, or unpacked from its blocks. */
static attn_tensor matrices_of(attn_graph *g, const attn_parameter *w, int64_t heads) {
  attn_tensor all = attn_weight_values(w->weight), matrices = {0};
  int64_t outputs = w->value.shape[0], inputs = w->value.shape[1];
  if (w->blocks) {
    all = attn_graph_tensor(g, g->compute, 2, w->value.shape);
    float *row = attn_arena_alloc(g->arena, (size_t)inputs * sizeof *row);
    if (!all.data || !row) return (attn_tensor){0};
    if (g->gpu) attn_pass_expand_blocks(g, &all, 1, w, NULL);
    for (int64_t i = 0; i < outputs && !g->gpu; ++i) {
      attn_tensor from, to;
      attn_status status = attn_parameter_row(w, i, row);
      if (status == ATTN_OK) status = attn_tensor_wrap(row, ATTN_F32, 1, &inputs, &from);
      if (status == ATTN_OK) status = attn_tensor_select(&all, 0, i, &to);
      if (status == ATTN_OK) status = attn_tensor_copy(&from, &to);
      if (status != ATTN_OK) attn_graph_error(g, status);
    }
  }
  attn_status status =
      attn_tensor_reshape(&all, 3, (int64_t[]){heads, outputs / heads, inputs}, &matrices);
  if (status != ATTN_OK) attn_graph_error(g, status);
  return g->status == ATTN_OK ? matrices : (attn_tensor){0};
}

static attn_status weight_gradient(attn_graph *g, const heads_node *self, const attn_tensor *dy) {
  int64_t heads = dy->shape[1], m = dy->shape[2];
  for (int64_t h = 0; h < heads; ++h) {
    attn_tensor upstream, from, to;
    ATTN_TRY(attn_tensor_select(dy, 1, h, &upstream));
    ATTN_TRY(attn_tensor_select(&self->rows, 1, h, &from));
    ATTN_TRY(attn_tensor_slice(&self->w->gradient, 0, h * m, m, &to));
    ATTN_TRY(attn_dense_backward_weight(&upstream, &from, &to, true, g->arena));
  }
  return ATTN_OK;
}

static attn_status heads_backward(attn_graph *g, attn_node *node) {
  heads_node *self = (heads_node *)node;
  attn_tensor dy = compute_heads(g, &node->output->gradient);
  if (!dy.data) return g->status;
  if (self->w->gradient.data) ATTN_TRY(weight_gradient(g, self, &dy));
  if (!self->x->needs_gradient) return g->status;
  attn_tensor matrices = matrices_of(g, self->w, dy.shape[1]);
  attn_tensor dx = attn_graph_tensor(g, g->compute, 3, self->x->value.shape);
  if (!matrices.data || !dx.data) return g->status;
  attn_tensor from = heads_first(&dy), to = heads_first(&dx);
  ATTN_TRY(attn_dense_batch(&from, &matrices, false, &to, false, g->arena));
  attn_gradient_add(g, self->x, &dx);
  return g->status;
}

attn_var *attn_layer_linear_heads(attn_graph *graph, attn_var *x, attn_parameter *w) {
  if (!x) return NULL;
  char text[128];
  const int64_t *shape = x->value.shape;
  if (x->value.rank != 3 || !w->weight || w->value.rank != 2 || w->value.shape[1] != shape[2] ||
      w->value.shape[0] % shape[1] != 0)
    return attn_graph_fail(graph, ATTN_INVALID_SHAPE, "products by head: %s with x %s", w->name,
                           attn_shape_text(&x->value, text));
  if (shape[0] <= ATTN_FEW_ROWS && !graph->recording) return attn_layer_expand(graph, x, w);
  int64_t heads = shape[1], width = w->value.shape[0] / heads;
  attn_tensor value =
      attn_graph_tensor(graph, graph->compute, 3, (int64_t[]){shape[0], heads, width});
  attn_tensor rows = compute_heads(graph, &x->value), matrices = matrices_of(graph, w, heads);
  if (!value.data || !rows.data || !matrices.data) return NULL;
  attn_tensor from = heads_first(&rows), to = heads_first(&value);
  attn_status status = attn_dense_batch(&from, &matrices, true, &to, false, graph->arena);
  if (status != ATTN_OK) return attn_graph_error(graph, status);
  attn_var *y = attn_graph_result(graph, value, 1, &x);
  if (y && graph->recording && w->gradient.data) y->needs_gradient = true;
  heads_node *node = attn_graph_record(graph, sizeof *node, y, heads_backward);
  if (node) {
    node->x = x;
    node->rows = rows;
    node->w = w;
  }
  return y;
}
