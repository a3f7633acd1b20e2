/* A batch of small products by the tile kernels (panels.c): the products by head of feature maps,
 * and those of linear attention. B of each is packed as it comes, into scratch memory. */
#include "base/status.h"
#include "engines/dense/dense.h"
#include "engines/dense/gpu.h"
#include "engines/dense/product.h"
#include "tensor/device.h"

/* Matrix i of a batch; with `transpose` as its transpose. */
static attn_matrix matrix_of(const attn_tensor *t, int64_t i, bool transpose) {
  int64_t size = (int64_t)attn_dtype_size(t->dtype);
  int r = transpose ? 2 : 1, c = transpose ? 1 : 2;
  return (attn_matrix){.data = (char *)t->data + i * t->stride[0] * size,
                       .dtype = t->dtype,
                       .rows = t->shape[r],
                       .columns = t->shape[c],
                       .stride = {t->stride[r], t->stride[c]}};
}

static attn_status check(const char *name, const attn_tensor *t, int64_t batch, int64_t rows,
                         int64_t columns) {
  bool fits = t->rank == 3 && t->shape[0] == batch && t->shape[1] == rows &&
              t->shape[2] == columns && (columns < 2 || t->stride[2] == 1);
  if (fits) return ATTN_OK;
  return attn_fail(ATTN_INVALID_SHAPE,
                   "dense: %s is not a batch [%lld, %lld, %lld] with contiguous rows", name,
                   (long long)batch, (long long)rows, (long long)columns);
}

static attn_status check_batch(const attn_tensor *a, const attn_tensor *b, bool transpose_b,
                               const attn_tensor *c) {
  if (c->rank != 3 || a->rank != 3)
    return attn_fail(ATTN_INVALID_SHAPE, "dense: batches have rank %d and %d, expected 3", a->rank,
                     c->rank);
  int64_t batch = c->shape[0], m = c->shape[1], n = c->shape[2], k = a->shape[2];
  ATTN_TRY(check("a", a, batch, m, k));
  ATTN_TRY(check("b", b, batch, transpose_b ? n : k, transpose_b ? k : n));
  ATTN_TRY(check("c", c, batch, m, n));
  attn_dtype wider = a->dtype == ATTN_BF16 ? ATTN_F32 : a->dtype;
  if (a->dtype == b->dtype && (c->dtype == a->dtype || c->dtype == wider)) return ATTN_OK;
  return attn_fail(ATTN_INVALID_ARGUMENT, "dense: %s times %s cannot give %s",
                   attn_dtype_name(a->dtype), attn_dtype_name(b->dtype), attn_dtype_name(c->dtype));
}

attn_status attn_dense_batch(const attn_tensor *a, const attn_tensor *b, bool transpose_b,
                             const attn_tensor *c, bool accumulate, attn_arena *scratch) {
  ATTN_TRY(check_batch(a, b, transpose_b, c));
  if (attn_is_cuda(c->device)) return attn_gpu_multiply(a, false, b, transpose_b, c, accumulate);
  const attn_product *product = &attn_product_panels;
  attn_arena_mark mark = attn_arena_get_mark(scratch);
  attn_packed packed;
  product->plan(c->shape[1], a->shape[2], c->shape[2], a->dtype, &packed);
  packed.data = attn_arena_alloc(scratch, packed.bytes);
  attn_status status = packed.data ? ATTN_OK : ATTN_OUT_OF_MEMORY;
  for (int64_t i = 0; i < c->shape[0] && status == ATTN_OK; ++i) {
    attn_matrix left = matrix_of(a, i, false), right = matrix_of(b, i, transpose_b);
    attn_matrix to = matrix_of(c, i, false);
    status = product->pack(&packed, &right);
    if (status == ATTN_OK) status = product->multiply(&left, &packed, &to, accumulate, scratch);
  }
  attn_arena_release(scratch, mark);
  return status;
}

attn_status attn_dense_batch_inner(const attn_tensor *a, const attn_tensor *b, const attn_tensor *c,
                                   attn_arena *scratch) {
  if (c->rank != 3 || a->rank != 3)
    return attn_fail(ATTN_INVALID_SHAPE, "dense: batches have rank %d and %d, expected 3", a->rank,
                     c->rank);
  int64_t batch = c->shape[0], m = c->shape[1], n = c->shape[2], k = a->shape[1];
  ATTN_TRY(check("a", a, batch, k, m));
  ATTN_TRY(check("b", b, batch, k, n));
  ATTN_TRY(check("c", c, batch, m, n));
  attn_dtype wider = a->dtype == ATTN_BF16 ? ATTN_F32 : a->dtype;
  if (a->dtype != b->dtype || c->dtype != wider)
    return attn_fail(ATTN_INVALID_ARGUMENT, "dense: sums over rows of %s and %s cannot give %s",
                     attn_dtype_name(a->dtype), attn_dtype_name(b->dtype),
                     attn_dtype_name(c->dtype));
  if (attn_is_cuda(c->device) && k > 0) return attn_gpu_multiply(a, true, b, false, c, false);
  for (int64_t i = 0; i < batch; ++i) {
    attn_tensor left, right, to;
    ATTN_TRY(attn_tensor_select(a, 0, i, &left));
    ATTN_TRY(attn_tensor_select(b, 0, i, &right));
    ATTN_TRY(attn_tensor_select(c, 0, i, &to));
    ATTN_TRY(attn_dense_backward_weight(&left, &right, &to, false, scratch));
  }
  return ATTN_OK;
}
