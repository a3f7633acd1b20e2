#include "graph/parameter.h"
#include "base/memory.h"
#include "base/status.h"
#include "tensor/device.h"

static const char *block_row(const attn_parameter *p, int64_t r) {
  const attn_block_format *format = attn_block_get_format(p->block_type);
  return (const char *)p->blocks + r * (p->value.shape[1] / format->elements) * format->bytes;
}

static void scale_row(const attn_parameter *p, int64_t r, float *row) {
  int64_t columns = p->value.shape[1], step = p->scale_columns;
  const float *scales = p->scales + r / p->scale_rows * ((columns + step - 1) / step);
  for (int64_t c = 0; c < columns; ++c) row[c] *= scales[c / step];
}

/* A row of blocks that lie on a GPU. */
static attn_status row_from_gpu(const attn_parameter *p, int64_t r, float *row) {
  const attn_block_format *format = attn_block_get_format(p->block_type);
  int64_t columns = p->value.shape[1];
  size_t bytes = (size_t)(columns / format->elements * format->bytes);
  void *blocks = attn_alloc(bytes);
  attn_status status = blocks ? ATTN_OK : ATTN_OUT_OF_MEMORY;
  if (status == ATTN_OK) status = attn_device_copy(p->value.device, blocks, block_row(p, r), bytes);
  if (status == ATTN_OK) status = attn_device_synchronize(p->value.device);
  if (status == ATTN_OK) status = attn_blocks_to_f32(p->block_type, blocks, row, columns);
  attn_free(blocks);
  return status;
}

attn_status attn_parameter_row(const attn_parameter *p, int64_t r, float *row) {
  int64_t columns = p->value.shape[1];
  if (p->blocks && attn_is_cuda(p->value.device)) return row_from_gpu(p, r, row);
  if (p->blocks) {
    ATTN_TRY(attn_blocks_to_f32(p->block_type, block_row(p, r), row, columns));
    if (p->scales) scale_row(p, r, row);
    return ATTN_OK;
  }
  attn_tensor from, to;
  ATTN_TRY(attn_tensor_slice(&p->value, 0, r, 1, &from));
  ATTN_TRY(attn_tensor_wrap(row, ATTN_F32, 2, from.shape, &to));
  return attn_tensor_copy(&from, &to);
}

static attn_status unpack(const attn_parameter *p, const attn_tensor *copy) {
  int64_t columns = p->value.shape[1];
  float *row = attn_alloc_array((size_t)columns, sizeof *row);
  attn_status status = row ? ATTN_OK : ATTN_OUT_OF_MEMORY;
  for (int64_t r = 0; r < p->value.shape[0] && status == ATTN_OK; ++r) {
    attn_tensor from, to;
    status = attn_parameter_row(p, r, row);
    if (status == ATTN_OK) status = attn_tensor_slice(copy, 0, r, 1, &to);
    if (status == ATTN_OK) status = attn_tensor_wrap(row, ATTN_F32, 2, to.shape, &from);
    if (status == ATTN_OK) status = attn_tensor_copy(&from, &to);
  }
  attn_free(row);
  return status;
}

attn_status attn_parameter_copy(const attn_parameter *p, attn_dtype dtype, attn_tensor *copy) {
  ATTN_TRY(attn_tensor_create(dtype, p->value.rank, p->value.shape, copy));
  attn_status status = p->blocks ? unpack(p, copy) : attn_tensor_copy(&p->value, copy);
  if (status != ATTN_OK) attn_tensor_destroy(copy);
  return status;
}
