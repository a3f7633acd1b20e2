/* DLPack 0.8, with the type codes of 1.1: tensors of other libraries in and out without a copy. The
 * structures below are the binary interface as the specification lays it down
 * (https://dmlc.github.io/dlpack). */
#include "attn/tensor.h"
#include "base/memory.h"
#include "base/status.h"

#include <string.h>

enum { DL_CPU = 1, DL_CUDA = 2, DL_CUDA_HOST = 3 };                         /* device types */
enum { DL_INT = 0, DL_UINT = 1, DL_FLOAT = 2, DL_BFLOAT = 4, DL_BOOL = 6 }; /* type codes */
enum { DL_F8_E4M3 = 10, DL_F8_E5M2 = 12, DL_F8_E8M0 = 14 };

typedef struct dl_tensor {
  void *data;
  int32_t device_type, device_id;
  int32_t rank;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape;
  int64_t *strides; /* in elements; NULL: row-major */
  uint64_t byte_offset;
} dl_tensor;

struct DLManagedTensor {
  dl_tensor tensor;
  void *manager;
  void (*deleter)(struct DLManagedTensor *self);
};

static const struct {
  uint8_t code, bits;
} codes[ATTN_DTYPE_COUNT] = {
    [ATTN_F64] = {DL_FLOAT, 64},      [ATTN_F32] = {DL_FLOAT, 32},
    [ATTN_BF16] = {DL_BFLOAT, 16},    [ATTN_F16] = {DL_FLOAT, 16},
    [ATTN_I64] = {DL_INT, 64},        [ATTN_I32] = {DL_INT, 32},
    [ATTN_I16] = {DL_INT, 16},        [ATTN_I8] = {DL_INT, 8},
    [ATTN_U8] = {DL_UINT, 8},         [ATTN_BOOL] = {DL_BOOL, 8},
    [ATTN_F8_E4M3] = {DL_F8_E4M3, 8}, [ATTN_F8_E5M2] = {DL_F8_E5M2, 8},
    [ATTN_F8_E8M0] = {DL_F8_E8M0, 8},
};

static attn_status find_dtype(const dl_tensor *foreign, attn_dtype *dtype) {
  for (int i = 0; i < ATTN_DTYPE_COUNT; ++i)
    if (codes[i].code == foreign->dtype.code && codes[i].bits == foreign->dtype.bits &&
        foreign->dtype.lanes == 1) {
      *dtype = (attn_dtype)i;
      return ATTN_OK;
    }
  return attn_fail(ATTN_UNSUPPORTED, "dlpack: type code %d with %d bits and %d lanes",
                   foreign->dtype.code, foreign->dtype.bits, foreign->dtype.lanes);
}

/* Memory that CUDA has pinned is the processor's own. */
static attn_status find_device(const dl_tensor *foreign, attn_device *device) {
  bool cuda = foreign->device_type == DL_CUDA;
  if (!cuda && foreign->device_type != DL_CPU && foreign->device_type != DL_CUDA_HOST)
    return attn_fail(ATTN_UNSUPPORTED, "dlpack: device type %d; the CPU is 1, CUDA is 2",
                     foreign->device_type);
  *device =
      (attn_device){.kind = cuda ? ATTN_CUDA : ATTN_CPU, .index = cuda ? foreign->device_id : 0};
  return ATTN_OK;
}

/* Every element must lie within an int64 of bytes from the first. */
static attn_status check_reach(const attn_tensor *tensor) {
  int64_t reach = 0, step;
  for (int i = 0; i < tensor->rank; ++i) {
    int64_t stride = tensor->stride[i], last = tensor->shape[i] - 1;
    if (last < 0) return ATTN_OK; /* no elements */
    if (stride == INT64_MIN || __builtin_mul_overflow(stride < 0 ? -stride : stride, last, &step) ||
        __builtin_add_overflow(reach, step, &reach) ||
        reach > INT64_MAX / (int64_t)attn_dtype_size(tensor->dtype))
      return attn_fail(ATTN_INVALID_SHAPE, "dlpack: stride %lld of axis %d reaches too far",
                       (long long)stride, i);
  }
  return ATTN_OK;
}

static attn_status place_data(const dl_tensor *foreign, attn_tensor *view) {
  uintptr_t address;
  if (__builtin_add_overflow((uintptr_t)foreign->data, foreign->byte_offset, &address))
    return attn_fail(ATTN_INVALID_ARGUMENT, "dlpack: byte offset %llu overflows the address",
                     (unsigned long long)foreign->byte_offset);
  if (attn_tensor_count(view) == 0) return ATTN_OK;
  if (!foreign->data) return attn_fail(ATTN_INVALID_ARGUMENT, "dlpack: data is NULL");
  if (address % attn_dtype_size(view->dtype))
    return attn_fail(ATTN_UNSUPPORTED, "dlpack: data is not aligned to its %zu-byte elements",
                     attn_dtype_size(view->dtype));
  view->data = (char *)foreign->data + foreign->byte_offset;
  return ATTN_OK;
}

attn_status attn_tensor_from_dlpack(const struct DLManagedTensor *managed, attn_tensor *view) {
  if (!managed || !view) return attn_fail(ATTN_INVALID_ARGUMENT, "dlpack: NULL argument");
  const dl_tensor *foreign = &managed->tensor;
  attn_dtype dtype = ATTN_DTYPE_COUNT;
  attn_device device;
  attn_tensor result;
  ATTN_TRY(find_dtype(foreign, &dtype));
  ATTN_TRY(find_device(foreign, &device));
  ATTN_TRY(attn_tensor_wrap(NULL, dtype, foreign->rank, foreign->shape, &result));
  if (foreign->strides && foreign->rank)
    memcpy(result.stride, foreign->strides, (size_t)foreign->rank * sizeof *result.stride);
  result.device = device;
  ATTN_TRY(check_reach(&result));
  ATTN_TRY(place_data(foreign, &result));
  *view = result;
  return ATTN_OK;
}

/* What a DLPack consumer gets from us: one block that holds everything it points to. */
typedef struct export {
  struct DLManagedTensor managed; /* first, so that the deleter finds the block */
  int64_t shape[ATTN_MAX_RANK], strides[ATTN_MAX_RANK];
  void (*release)(void *);
  void *context;
}
export;

static void delete_export(struct DLManagedTensor *self) {
  if (!self) return;
  export *block = (export *)self;
  if (block->release) block->release(block->context);
  attn_free(block);
}

attn_status attn_tensor_to_dlpack(const attn_tensor *tensor, void (*release)(void *), void *context,
                                  struct DLManagedTensor **managed) {
  if (!tensor || !managed) return attn_fail(ATTN_INVALID_ARGUMENT, "dlpack: NULL argument");
  if ((unsigned)tensor->dtype >= ATTN_DTYPE_COUNT || tensor->rank < 0 ||
      tensor->rank > ATTN_MAX_RANK)
    return attn_fail(ATTN_INVALID_ARGUMENT, "dlpack: dtype %d, rank %d is no tensor",
                     (int)tensor->dtype, tensor->rank);
  export *block = attn_alloc_zero(sizeof *block);
  if (!block) return ATTN_OUT_OF_MEMORY;
  memcpy(block->shape, tensor->shape, sizeof block->shape);
  memcpy(block->strides, tensor->stride, sizeof block->strides);
  block->release = release;
  block->context = context;
  block->managed = (struct DLManagedTensor){
      .tensor = {.data = tensor->data,
                 .device_type = tensor->device.kind == ATTN_CUDA ? DL_CUDA : DL_CPU,
                 .device_id = tensor->device.index,
                 .rank = tensor->rank,
                 .dtype = {codes[tensor->dtype].code, codes[tensor->dtype].bits, 1},
                 .shape = block->shape,
                 .strides = block->strides},
      .manager = block,
      .deleter = delete_export};
  *managed = &block->managed;
  return ATTN_OK;
}
