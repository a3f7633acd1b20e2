#include "engines/dense/gpu.h"
#include "base/status.h"

enum { MATVEC_ROWS = 8 };
static const int64_t unpacked_bytes = (int64_t)64 << 20; /* of W at a time */

attn_status attn_gpu_multiply(const attn_tensor *a, bool transpose_a, const attn_tensor *b,
                              bool transpose_b, const attn_tensor *c, bool accumulate) {
  if (!attn_same_device(a->device, c->device) || !attn_same_device(b->device, c->device))
    return attn_fail(ATTN_UNSUPPORTED, "dense: the operands are on different devices");
  attn_gpu *gpu = attn_gpu_of(c);
  attn_cuda_dense *dense;
  if (!gpu) return ATTN_UNSUPPORTED;
  ATTN_TRY(attn_gpu_dense(gpu, &dense));
  return attn_gpu_check(gpu, gpu->cuda->matmul(dense, a, transpose_a, b, transpose_b, c, accumulate,
                                               attn_gpu_stream(gpu)));
}

static bool has_matvec(attn_block_type type, attn_dtype dtype) {
  bool legacy = type >= ATTN_BLOCK_Q4_0 && type <= ATTN_BLOCK_Q8_0;
  bool k = type >= ATTN_BLOCK_Q2_K && type <= ATTN_BLOCK_Q6_K;
  return (legacy || k) && (dtype == ATTN_F32 || dtype == ATTN_BF16);
}

static size_t row_bytes(const attn_block_matrix *w) {
  const attn_block_format *format = attn_block_get_format(w->type);
  return (size_t)(w->inputs / format->elements * format->bytes);
}

/* Calls `multiply` with pieces of W in the dtype of x, which lie in the GPU's scratch memory. */
typedef attn_status piece_fn(const attn_tensor *piece, int64_t first, const attn_tensor *from,
                             const attn_tensor *to, bool accumulate);

static attn_status by_pieces(const attn_block_matrix *w, attn_gpu *gpu, const attn_tensor *from,
                             const attn_tensor *to, bool accumulate, piece_fn *multiply) {
  int64_t row = w->inputs * (int64_t)attn_dtype_size(from->dtype);
  int64_t step = unpacked_bytes / row;
  if (step < 1) step = 1;
  if (step > w->outputs) step = w->outputs;
  attn_tensor all;
  ATTN_TRY(attn_tensor_wrap(NULL, from->dtype, 2, (int64_t[]){step, w->inputs}, &all));
  all.device = from->device;
  all.data = attn_gpu_take_scratch(gpu, (size_t)(step * row));
  attn_status status = all.data ? ATTN_OK : ATTN_OUT_OF_MEMORY;
  for (int64_t first = 0; first < w->outputs && status == ATTN_OK; first += step) {
    attn_tensor piece = all;
    if (piece.shape[0] > w->outputs - first) piece.shape[0] = w->outputs - first;
    const char *blocks = (const char *)w->data + (size_t)first * row_bytes(w);
    status = attn_gpu_check(
        gpu, gpu->cuda->blocks_expand(w->type, blocks, NULL, &piece, attn_gpu_stream(gpu)));
    if (status == ATTN_OK) status = multiply(&piece, first, from, to, accumulate);
  }
  attn_gpu_give_scratch(gpu);
  return status;
}

static attn_status forward_piece(const attn_tensor *piece, int64_t first, const attn_tensor *x,
                                 const attn_tensor *y, bool accumulate) {
  attn_tensor columns;
  ATTN_TRY(attn_tensor_slice(y, 1, first, piece->shape[0], &columns));
  return attn_gpu_multiply(x, false, piece, true, &columns, accumulate);
}

static attn_status backward_piece(const attn_tensor *piece, int64_t first, const attn_tensor *dy,
                                  const attn_tensor *dx, bool accumulate) {
  attn_tensor columns;
  ATTN_TRY(attn_tensor_slice(dy, 1, first, piece->shape[0], &columns));
  return attn_gpu_multiply(&columns, false, piece, false, dx, accumulate || first > 0);
}

attn_status attn_gpu_blocks_forward(const attn_block_matrix *w, const attn_tensor *x,
                                    const attn_tensor *y, bool accumulate) {
  attn_gpu *gpu = attn_gpu_of(y);
  if (!gpu) return ATTN_UNSUPPORTED;
  bool aligned =
      (uintptr_t)x->data % 16 == 0 && x->stride[0] * (int64_t)attn_dtype_size(x->dtype) % 16 == 0;
  if (x->shape[0] <= MATVEC_ROWS && aligned && has_matvec(w->type, x->dtype))
    return attn_gpu_check(
        gpu, gpu->cuda->blocks_matvec(w->type, w->data, y, accumulate, x, attn_gpu_stream(gpu)));
  return by_pieces(w, gpu, x, y, accumulate, forward_piece);
}

attn_status attn_gpu_blocks_backward_input(const attn_block_matrix *w, const attn_tensor *dy,
                                           const attn_tensor *dx, bool accumulate) {
  attn_gpu *gpu = attn_gpu_of(dx);
  if (!gpu) return ATTN_UNSUPPORTED;
  return by_pieces(w, gpu, dy, dx, accumulate, backward_piece);
}
