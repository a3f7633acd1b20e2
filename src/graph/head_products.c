#include "graph/head_products.h"
#include "engines/dense/dense.h"
#include "graph/operations.h"

bool attn_are_heads(const attn_tensor *q, const attn_layout *layout, const attn_tensor *k,
                    const attn_tensor *v, const attn_layout *key_layout) {
  return q->rank == 3 && k->rank == 3 && v->rank == 3 && q->shape[0] == layout->rows &&
         k->shape[0] == key_layout->rows && v->shape[0] == key_layout->rows &&
         k->shape[1] == q->shape[1] && v->shape[1] == q->shape[1] && k->shape[2] == q->shape[2];
}

attn_tensor attn_rows_by_head(const attn_tensor *rows, int64_t first, int64_t count,
                              int64_t length) {
  attn_tensor heads = *rows;
  heads.rank = 4;
  heads.data = (char *)rows->data + first * rows->stride[0] * (int64_t)attn_dtype_size(rows->dtype);
  heads.shape[0] = count, heads.stride[0] = length * rows->stride[0];
  heads.shape[1] = rows->shape[1], heads.stride[1] = rows->stride[1];
  heads.shape[2] = length, heads.stride[2] = rows->stride[0];
  heads.shape[3] = rows->shape[2], heads.stride[3] = rows->stride[2];
  return heads;
}

attn_tensor attn_rows_in(attn_graph *graph, const attn_tensor *rows, attn_dtype dtype,
                         double scale) {
  bool plain = rows->stride[2] == 1 || rows->shape[2] == 1;
  if (rows->dtype == dtype && plain && scale == 1) return *rows;
  attn_tensor copy = attn_graph_tensor_like(graph, dtype, rows);
  if (copy.data) attn_add_tensor(graph, &copy, rows, scale, false);
  return copy;
}

void attn_multiply_heads(attn_graph *graph, attn_head_product kind, const attn_tensor *a,
                         const attn_tensor *b, const attn_tensor *c) {
  int axis = c->shape[0] < c->shape[1] ? 0 : 1;
  for (int64_t i = 0; i < c->shape[axis] && graph->status == ATTN_OK; ++i) {
    attn_tensor left, right, to;
    attn_status status = attn_tensor_select(a, axis, i, &left);
    if (status == ATTN_OK) status = attn_tensor_select(b, axis, i, &right);
    if (status == ATTN_OK) status = attn_tensor_select(c, axis, i, &to);
    if (status == ATTN_OK)
      status = kind == ATTN_OVER_ROWS
                   ? attn_dense_batch_inner(&left, &right, &to, graph->arena)
                   : attn_dense_batch(&left, &right, kind == ATTN_BY_ROWS_TRANSPOSED, &to, false,
                                      graph->arena);
    if (status != ATTN_OK) attn_graph_error(graph, status);
  }
}
