/* Tensors: a dtype, a shape, strides, a device and a pointer, as in DLPack.
 *
 * An attn_tensor is a plain value that does not own its memory: copying one makes a view. Memory
 * comes from attn_tensor_create (freed by attn_tensor_destroy), from an arena of the library, or
 * from the caller. */
#ifndef ATTN_TENSOR_H
#define ATTN_TENSOR_H

#include "attn/base.h"

#ifdef __cplusplus
extern "C" {
#endif

#define ATTN_MAX_RANK 8

typedef enum attn_dtype {
  ATTN_F64 = 0,
  ATTN_F32,
  ATTN_BF16,
  ATTN_F16, /* storage only: convert before computing */
  ATTN_I64,
  ATTN_I32,
  ATTN_I16,
  ATTN_I8,
  ATTN_U8,
  ATTN_BOOL,
  /* Storage only, too; every number of theirs is exact in bfloat16. */
  ATTN_F8_E4M3, /* without infinities ("fn"): 448 is the largest */
  ATTN_F8_E5M2,
  ATTN_F8_E8M0, /* powers of two, no sign: scales */
  ATTN_DTYPE_COUNT
} attn_dtype;

typedef enum attn_device_kind { ATTN_CPU = 0, ATTN_CUDA } attn_device_kind;

typedef struct attn_device {
  attn_device_kind kind;
  int index;
} attn_device;

typedef struct attn_tensor {
  void *data;
  attn_dtype dtype;
  attn_device device;
  int rank;
  int64_t shape[ATTN_MAX_RANK];
  int64_t stride[ATTN_MAX_RANK]; /* in elements; 0 repeats one element along the axis */
} attn_tensor;

ATTN_API const char *attn_dtype_name(attn_dtype dtype); /* "float32", "bfloat16", ... */
ATTN_API attn_status attn_dtype_parse(const char *name, attn_dtype *dtype);
ATTN_API size_t attn_dtype_size(attn_dtype dtype); /* bytes */

/* Describes memory that the caller owns as a contiguous (row-major) CPU tensor. `shape` holds
 * `rank` extents, each >= 0. ATTN_INVALID_SHAPE on a bad rank, a negative extent or a size that
 * overflows int64. */
ATTN_API attn_status attn_tensor_wrap(void *data, attn_dtype dtype, int rank, const int64_t *shape,
                                      attn_tensor *tensor);
/* The same over fresh zeroed memory, aligned to 64 bytes. */
ATTN_API attn_status attn_tensor_create(attn_dtype dtype, int rank, const int64_t *shape,
                                        attn_tensor *tensor);
ATTN_API void attn_tensor_destroy(attn_tensor *tensor);

ATTN_API int64_t attn_tensor_count(const attn_tensor *tensor); /* elements */
ATTN_API bool attn_tensor_is_contiguous(const attn_tensor *tensor);

/* Views. None copies; `view` may be the same object as `tensor`. */

/* Elements start, start+1, ..., start+length-1 of one axis. */
ATTN_API attn_status attn_tensor_slice(const attn_tensor *tensor, int axis, int64_t start,
                                       int64_t length, attn_tensor *view);
/* One element of one axis; the axis disappears. */
ATTN_API attn_status attn_tensor_select(const attn_tensor *tensor, int axis, int64_t index,
                                        attn_tensor *view);
/* axes[i] says which old axis becomes axis i. */
ATTN_API attn_status attn_tensor_permute(const attn_tensor *tensor, const int *axes,
                                         attn_tensor *view);
/* A new shape over the same elements; one extent may be -1 (inferred). ATTN_INVALID_SHAPE when the
 * strides do not allow it without a copy. */
ATTN_API attn_status attn_tensor_reshape(const attn_tensor *tensor, int rank, const int64_t *shape,
                                         attn_tensor *view);
/* Repeats extents of 1 (and new leading axes) by stride 0. */
ATTN_API attn_status attn_tensor_expand(const attn_tensor *tensor, int rank, const int64_t *shape,
                                        attn_tensor *view);

/* Copies element by element between any strides and any pair of the floating dtypes, or between
 * equal dtypes; rounds to nearest even. What float8_e4m3 cannot hold becomes its largest number,
 * infinities included; float8_e8m0 takes the nearest power of two. Shapes must be equal. The two
 * may lie on different devices. */
ATTN_API attn_status attn_tensor_copy(const attn_tensor *source, const attn_tensor *target);
ATTN_API attn_status attn_tensor_fill(const attn_tensor *tensor, double value);
/* One element as a double; for tests and small tools, not for loops that matter. */
ATTN_API double attn_tensor_get(const attn_tensor *tensor, const int64_t *index);

/* DLPack (https://dmlc.github.io/dlpack): tensors in and out without a copy.
 * struct DLManagedTensor is declared by the DLPack header of whoever gives or takes it. */
struct DLManagedTensor;

/* A view of a foreign tensor. The caller keeps `managed` alive while the view is used and then
 * calls its deleter. ATTN_UNSUPPORTED for dtypes or devices that libattn does not have. */
ATTN_API attn_status attn_tensor_from_dlpack(const struct DLManagedTensor *managed,
                                             attn_tensor *view);
/* A DLPack description of `tensor`. `release(context)`, if not NULL, is called once when the
 * consumer calls the deleter. */
ATTN_API attn_status attn_tensor_to_dlpack(const attn_tensor *tensor, void (*release)(void *),
                                           void *context, struct DLManagedTensor **managed);

#ifdef __cplusplus
}
#endif
#endif
