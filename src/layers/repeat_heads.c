/* Heads that several others read, once for each of them:
 *
 *   y_{h times + i} = x_h for i < times,  dx_h = sum over i of dy_{h times + i} */
#include "graph/operations.h"
#include "layers/layers.h"

typedef struct repeat_node {
  attn_node node;
  attn_var *x;
  int64_t times;
} repeat_node;

/* y [rows, heads times, n] as [rows, heads, times, n]. */
static attn_tensor by_group(const attn_tensor *y, int64_t times) {
  attn_tensor grouped = *y;
  grouped.rank = 4;
  grouped.shape[1] = y->shape[1] / times, grouped.stride[1] = y->stride[1] * times;
  grouped.shape[2] = times, grouped.stride[2] = y->stride[1];
  grouped.shape[3] = y->shape[2], grouped.stride[3] = y->stride[2];
  return grouped;
}

/* x [rows, heads, n] as [rows, heads, times, n]. */
static attn_tensor again(const attn_tensor *x, int64_t times) {
  attn_tensor repeated = *x;
  repeated.rank = 4;
  repeated.shape[2] = times, repeated.stride[2] = 0;
  repeated.shape[3] = x->shape[2], repeated.stride[3] = x->stride[2];
  return repeated;
}

static attn_status repeat_backward(attn_graph *g, attn_node *node) {
  repeat_node *self = (repeat_node *)node;
  attn_tensor dy = by_group(&node->output->gradient, self->times);
  attn_tensor sum = attn_graph_tensor_like(g, g->wide, &self->x->value);
  for (int64_t i = 0; i < self->times && sum.data; ++i) {
    attn_tensor part;
    ATTN_TRY(attn_tensor_select(&dy, 2, i, &part));
    attn_add_tensor(g, &sum, &part, 1, i > 0);
  }
  attn_gradient_add(g, self->x, &sum);
  return g->status;
}

attn_var *attn_layer_repeat_heads(attn_graph *graph, attn_var *x, int64_t times) {
  if (!x || times == 1) return x;
  char text[128];
  if (x->value.rank != 3 || times < 1)
    return attn_graph_fail(graph, ATTN_INVALID_SHAPE,
                           "repeat_heads: %lld times x %s, expected [rows, heads, n]",
                           (long long)times, attn_shape_text(&x->value, text));
  int64_t shape[3] = {x->value.shape[0], x->value.shape[1] * times, x->value.shape[2]};
  attn_tensor value = attn_graph_tensor(graph, x->value.dtype, 3, shape);
  if (!value.data) return NULL;
  attn_tensor to = by_group(&value, times), from = again(&x->value, times);
  attn_add_tensor(graph, &to, &from, 1, false);
  attn_var *y = attn_graph_result(graph, value, 1, &x);
  repeat_node *node = attn_graph_record(graph, sizeof *node, y, repeat_backward);
  if (node) {
    node->x = x;
    node->times = times;
  }
  attn_graph_restores(x); /* its value is not read again */
  return y;
}
