/* Partial results over disjoint sets of keys become one:
 *   LSE = log(sum_r exp(LSE_r) + exp(sink)),   o = sum_r exp(LSE_r - LSE) o_r
 * (FlashDecoding). Parts without a key have LSE_r = -inf and take no weight. */
#include "base/status.h"
#include "engines/softmax/softmax.h"

#include <math.h>

#define DEFINE_MERGE(suffix, type)                                                                 \
  double attn_softmax_merge_##suffix(int64_t parts, const type *o, int64_t stride_o,               \
                                     const type *lse, int64_t stride_lse, double sink,             \
                                     int64_t value_dim, type *out) {                               \
    double top = -INFINITY, total = 0;                                                             \
    for (int64_t c = 0; c < value_dim; ++c) out[c] = 0;                                            \
    for (int64_t r = 0; r < parts; ++r) top = fmax(top, lse[r * stride_lse]);                      \
    if (top == -(double)INFINITY) return top;                                                      \
    top = fmax(top, sink);                                                                         \
    for (int64_t r = 0; r < parts; ++r) total += exp(lse[r * stride_lse] - top);                   \
    total += exp(sink - top);                                                                      \
    for (int64_t r = 0; r < parts; ++r) {                                                          \
      type weight = (type)(exp(lse[r * stride_lse] - top) / total);                                \
      if (weight == 0) continue; /* the part may be empty, its o undefined */                      \
      for (int64_t c = 0; c < value_dim; ++c) out[c] += weight * o[r * stride_o + c];              \
    }                                                                                              \
    return top + log(total);                                                                       \
  }

DEFINE_MERGE(f32, float)
DEFINE_MERGE(f64, double)

static attn_status check(const char *name, const attn_tensor *tensor, attn_dtype dtype, int rank,
                         const int64_t *shape) {
  if (!tensor || !tensor->data)
    return attn_fail(ATTN_INVALID_ARGUMENT, "softmax_merge: %s is missing", name);
  if (tensor->dtype != dtype)
    return attn_fail(ATTN_INVALID_ARGUMENT, "softmax_merge: %s is %s, expected %s", name,
                     attn_dtype_name(tensor->dtype), attn_dtype_name(dtype));
  if (tensor->rank != rank)
    return attn_fail(ATTN_INVALID_SHAPE, "softmax_merge: %s has %d axes, expected %d", name,
                     tensor->rank, rank);
  for (int i = 0; i < rank; ++i)
    if (tensor->shape[i] != shape[i])
      return attn_fail(ATTN_INVALID_SHAPE,
                       "softmax_merge: %s has extent %lld in axis %d, expected "
                       "%lld",
                       name, (long long)tensor->shape[i], i, (long long)shape[i]);
  if (!attn_tensor_is_contiguous(tensor))
    return attn_fail(ATTN_INVALID_SHAPE, "softmax_merge: %s is not contiguous", name);
  return ATTN_OK;
}

static void merge_row(attn_dtype dtype, int64_t row, const int64_t shape[3], const void *partial_o,
                      const void *partial_lse, void *o, void *lse) {
  int64_t parts = shape[0], rows = shape[1], width = shape[2];
  if (dtype == ATTN_F64) {
    double merged = attn_softmax_merge_f64(parts, (const double *)partial_o + row * width,
                                           rows * width, (const double *)partial_lse + row, rows,
                                           -INFINITY, width, (double *)o + row * width);
    if (lse) ((double *)lse)[row] = merged;
  } else {
    double merged = attn_softmax_merge_f32(parts, (const float *)partial_o + row * width,
                                           rows * width, (const float *)partial_lse + row, rows,
                                           -INFINITY, width, (float *)o + row * width);
    if (lse) ((float *)lse)[row] = (float)merged;
  }
}

attn_status attn_softmax_merge(const attn_tensor *partial_o, const attn_tensor *partial_lse,
                               const attn_tensor *o, const attn_tensor *lse) {
  if (!partial_o || !partial_o->data || partial_o->rank != 3)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "softmax_merge: partial_o is missing or not [parts, rows, value_dim]");
  attn_dtype dtype = partial_o->dtype;
  if (dtype != ATTN_F32 && dtype != ATTN_F64)
    return attn_fail(ATTN_UNSUPPORTED, "softmax_merge: %s, expected float32 or float64",
                     attn_dtype_name(dtype));
  const int64_t *shape = partial_o->shape;
  ATTN_TRY(check("partial_o", partial_o, dtype, 3, shape));
  ATTN_TRY(check("partial_lse", partial_lse, dtype, 2, shape));
  ATTN_TRY(check("o", o, dtype, 2, shape + 1));
  bool with_lse = lse && lse->data;
  if (with_lse) ATTN_TRY(check("lse", lse, dtype, 1, shape + 1));
#pragma omp parallel for num_threads(attn_get_threads()) if (shape[1] * shape[2] > 65536)
  for (int64_t row = 0; row < shape[1]; ++row)
    merge_row(dtype, row, shape, partial_o->data, partial_lse->data, o->data,
              with_lse ? lse->data : NULL);
  return ATTN_OK;
}
