/* Two matrices side by side: y = [a | b], da and db are the columns of dy. */
#include "graph/operations.h"

typedef struct concatenate_node {
  attn_node node;
  attn_var *part[2];
} concatenate_node;

/* The columns of part i of y. */
static attn_tensor columns_of(const attn_tensor *y, attn_var *const part[2], int i) {
  attn_tensor columns = *y;
  int64_t first = i == 0 ? 0 : part[0]->value.shape[1];
  columns.shape[1] = part[i]->value.shape[1];
  columns.data = (char *)columns.data + first * (int64_t)attn_dtype_size(y->dtype);
  return columns;
}

static attn_status concatenate_backward(attn_graph *g, attn_node *node) {
  concatenate_node *self = (concatenate_node *)node;
  for (int i = 0; i < 2; ++i) {
    attn_tensor columns = columns_of(&node->output->gradient, self->part, i);
    if (self->part[i]->needs_gradient) attn_gradient_add(g, self->part[i], &columns);
  }
  return g->status;
}

attn_var *attn_op_concatenate(attn_graph *graph, attn_var *a, attn_var *b, attn_dtype dtype) {
  if (!a || !b) return NULL;
  char text[2][128];
  attn_var *part[2] = {a, b};
  if (a->value.rank != 2 || b->value.rank != 2 || a->value.shape[0] != b->value.shape[0])
    return attn_graph_fail(
        graph, ATTN_INVALID_SHAPE, "concatenate: %s and %s are not matrices of as many rows",
        attn_shape_text(&a->value, text[0]), attn_shape_text(&b->value, text[1]));
  int64_t shape[2] = {a->value.shape[0], a->value.shape[1] + b->value.shape[1]};
  attn_tensor value = attn_graph_tensor(graph, dtype, 2, shape);
  if (!value.data) return NULL;
  for (int i = 0; i < 2; ++i) {
    attn_tensor columns = columns_of(&value, part, i);
    attn_add_tensor(graph, &columns, &part[i]->value, 1, false);
  }
  attn_var *y = attn_graph_result(graph, value, 2, part);
  concatenate_node *node = attn_graph_record(graph, sizeof *node, y, concatenate_backward);
  if (node) {
    node->part[0] = a;
    node->part[1] = b;
    y->unread = true;
  }
  return y;
}
