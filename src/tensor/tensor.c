#include "attn/tensor.h"
#include "base/memory.h"
#include "base/status.h"
#include "tensor/device.h"
#include "tensor/float8.h"
#include "tensor/half.h"

#include <string.h>

static const struct {
  const char *name;
  size_t size;
  bool floating;
} dtypes[ATTN_DTYPE_COUNT] = {
    [ATTN_F64] = {"float64", 8, true},         [ATTN_F32] = {"float32", 4, true},
    [ATTN_BF16] = {"bfloat16", 2, true},       [ATTN_F16] = {"float16", 2, true},
    [ATTN_I64] = {"int64", 8, false},          [ATTN_I32] = {"int32", 4, false},
    [ATTN_I16] = {"int16", 2, false},          [ATTN_I8] = {"int8", 1, false},
    [ATTN_U8] = {"uint8", 1, false},           [ATTN_BOOL] = {"bool", 1, false},
    [ATTN_F8_E4M3] = {"float8_e4m3", 1, true}, [ATTN_F8_E5M2] = {"float8_e5m2", 1, true},
    [ATTN_F8_E8M0] = {"float8_e8m0", 1, true},
};

const char *attn_dtype_name(attn_dtype dtype) {
  return (unsigned)dtype < ATTN_DTYPE_COUNT ? dtypes[dtype].name : "unknown";
}

size_t attn_dtype_size(attn_dtype dtype) {
  return (unsigned)dtype < ATTN_DTYPE_COUNT ? dtypes[dtype].size : 0;
}

attn_status attn_dtype_parse(const char *name, attn_dtype *dtype) {
  for (int i = 0; name && i < ATTN_DTYPE_COUNT; ++i)
    if (strcmp(name, dtypes[i].name) == 0) {
      *dtype = (attn_dtype)i;
      return ATTN_OK;
    }
  return attn_fail(ATTN_INVALID_ARGUMENT,
                   "dtype '%s' is unknown; known: float64, float32, "
                   "bfloat16, float16, int64, int32, int16, int8, uint8, bool, float8_e4m3, "
                   "float8_e5m2, float8_e8m0",
                   name ? name : "(null)");
}

attn_status attn_tensor_wrap(void *data, attn_dtype dtype, int rank, const int64_t *shape,
                             attn_tensor *tensor) {
  if ((unsigned)dtype >= ATTN_DTYPE_COUNT)
    return attn_fail(ATTN_INVALID_ARGUMENT, "tensor: dtype %d is unknown", (int)dtype);
  if (rank < 0 || rank > ATTN_MAX_RANK)
    return attn_fail(ATTN_INVALID_SHAPE, "tensor: rank %d is not in 0 to %d", rank, ATTN_MAX_RANK);
  if (rank && !shape) return attn_fail(ATTN_INVALID_ARGUMENT, "tensor: shape is NULL");
  *tensor = (attn_tensor){.data = data, .dtype = dtype, .rank = rank};
  int64_t count = 1;
  for (int i = rank - 1; i >= 0; --i) {
    if (shape[i] < 0)
      return attn_fail(ATTN_INVALID_SHAPE, "tensor: extent %d is negative (%lld)", i,
                       (long long)shape[i]);
    tensor->shape[i] = shape[i];
    tensor->stride[i] = count;
    if (__builtin_mul_overflow(count, shape[i] ? shape[i] : 1, &count) ||
        count > INT64_MAX / (int64_t)dtypes[dtype].size)
      return attn_fail(ATTN_INVALID_SHAPE, "tensor: the number of elements overflows");
  }
  return ATTN_OK;
}

attn_status attn_tensor_create(attn_dtype dtype, int rank, const int64_t *shape,
                               attn_tensor *tensor) {
  ATTN_TRY(attn_tensor_wrap(NULL, dtype, rank, shape, tensor));
  tensor->data = attn_alloc_zero((size_t)attn_tensor_count(tensor) * dtypes[dtype].size);
  return tensor->data ? ATTN_OK : ATTN_OUT_OF_MEMORY;
}

void attn_tensor_destroy(attn_tensor *tensor) {
  if (!tensor) return;
  attn_device_free(tensor->device, tensor->data);
  *tensor = (attn_tensor){0};
}

int64_t attn_tensor_count(const attn_tensor *tensor) {
  int64_t count = 1;
  for (int i = 0; i < tensor->rank; ++i) count *= tensor->shape[i];
  return count;
}

bool attn_tensor_is_contiguous(const attn_tensor *tensor) {
  int64_t expected = 1;
  if (attn_tensor_count(tensor) == 0) return true;
  for (int i = tensor->rank - 1; i >= 0; --i) {
    if (tensor->shape[i] != 1 && tensor->stride[i] != expected) return false;
    expected *= tensor->shape[i];
  }
  return true;
}

static attn_status check_axis(const attn_tensor *tensor, int axis) {
  if (axis < 0 || axis >= tensor->rank)
    return attn_fail(ATTN_INVALID_ARGUMENT, "axis %d is not in 0 to %d", axis, tensor->rank - 1);
  return ATTN_OK;
}

static void *offset(const attn_tensor *tensor, int64_t elements) {
  return tensor->data ? (char *)tensor->data + elements * (int64_t)dtypes[tensor->dtype].size
                      : NULL;
}

attn_status attn_tensor_slice(const attn_tensor *tensor, int axis, int64_t start, int64_t length,
                              attn_tensor *view) {
  ATTN_TRY(check_axis(tensor, axis));
  int64_t extent = tensor->shape[axis];
  if (start < 0 || length < 0 || start > extent || length > extent - start)
    return attn_fail(ATTN_INVALID_SHAPE, "slice: %lld elements from %lld, axis %d has %lld",
                     (long long)length, (long long)start, axis, (long long)extent);
  *view = *tensor;
  view->data = offset(tensor, start * tensor->stride[axis]);
  view->shape[axis] = length;
  return ATTN_OK;
}

attn_status attn_tensor_select(const attn_tensor *tensor, int axis, int64_t index,
                               attn_tensor *view) {
  attn_tensor slice;
  ATTN_TRY(attn_tensor_slice(tensor, axis, index, 1, &slice));
  for (int i = axis; i + 1 < slice.rank; ++i) {
    slice.shape[i] = slice.shape[i + 1];
    slice.stride[i] = slice.stride[i + 1];
  }
  --slice.rank;
  *view = slice;
  return ATTN_OK;
}

attn_status attn_tensor_permute(const attn_tensor *tensor, const int *axes, attn_tensor *view) {
  attn_tensor result = *tensor;
  unsigned seen = 0;
  for (int i = 0; i < tensor->rank; ++i) {
    ATTN_TRY(check_axis(tensor, axes[i]));
    if (seen >> axes[i] & 1u)
      return attn_fail(ATTN_INVALID_ARGUMENT, "permute: axis %d stands twice", axes[i]);
    seen |= 1u << axes[i];
    result.shape[i] = tensor->shape[axes[i]];
    result.stride[i] = tensor->stride[axes[i]];
  }
  *view = result;
  return ATTN_OK;
}

/* Extents of 1 say nothing about memory, whatever their strides. */
static attn_tensor without_ones(const attn_tensor *tensor) {
  attn_tensor result = *tensor;
  result.rank = 0;
  for (int i = 0; i < tensor->rank; ++i) {
    if (tensor->shape[i] == 1) continue;
    result.shape[result.rank] = tensor->shape[i];
    result.stride[result.rank++] = tensor->stride[i];
  }
  return result;
}

/* Finds strides for the new shape by matching runs of old axes with runs of new axes that have the
 * same number of elements, which is not 0; a run of old axes must be contiguous in itself. */
static bool match_strides(const attn_tensor *tensor, attn_tensor *fresh) {
  attn_tensor old = without_ones(tensor);
  int o = 0, n = 0;
  while (n < fresh->rank) {
    if (fresh->shape[n] == 1) {
      fresh->stride[n++] = 1;
      continue;
    }
    int o_end = o + 1, n_end = n + 1;
    int64_t o_count = old.shape[o], n_count = fresh->shape[n];
    while (o_count != n_count) {
      if (o_count < n_count) {
        if (old.stride[o_end - 1] != old.shape[o_end] * old.stride[o_end]) return false;
        o_count *= old.shape[o_end++];
      } else {
        n_count *= fresh->shape[n_end++];
      }
    }
    int64_t stride = old.stride[o_end - 1];
    for (int i = n_end - 1; i >= n; --i) {
      fresh->stride[i] = stride;
      stride *= fresh->shape[i];
    }
    o = o_end;
    n = n_end;
  }
  return true;
}

attn_status attn_tensor_reshape(const attn_tensor *tensor, int rank, const int64_t *shape,
                                attn_tensor *view) {
  int64_t known = 1, extents[ATTN_MAX_RANK], total = attn_tensor_count(tensor);
  int inferred = -1;
  if (rank < 0 || rank > ATTN_MAX_RANK)
    return attn_fail(ATTN_INVALID_SHAPE, "reshape: rank %d is not in 0 to %d", rank, ATTN_MAX_RANK);
  for (int i = 0; i < rank; ++i) {
    extents[i] = shape[i];
    if (shape[i] == -1 && inferred < 0)
      inferred = i;
    else if (shape[i] < 0)
      return attn_fail(ATTN_INVALID_SHAPE, "reshape: extent %d is %lld", i, (long long)shape[i]);
    else if (__builtin_mul_overflow(known, shape[i], &known))
      return attn_fail(ATTN_INVALID_SHAPE, "reshape: the number of elements overflows");
  }
  if (inferred >= 0) extents[inferred] = known ? total / known : 0;
  attn_tensor result;
  ATTN_TRY(attn_tensor_wrap(tensor->data, tensor->dtype, rank, extents, &result));
  result.device = tensor->device;
  if (attn_tensor_count(&result) != total)
    return attn_fail(ATTN_INVALID_SHAPE, "reshape: %lld elements do not fit a shape of %lld",
                     (long long)total, (long long)attn_tensor_count(&result));
  if (total && !attn_tensor_is_contiguous(tensor) && !match_strides(tensor, &result))
    return attn_fail(ATTN_INVALID_SHAPE, "reshape: the strides do not allow it without a copy");
  *view = result;
  return ATTN_OK;
}

attn_status attn_tensor_expand(const attn_tensor *tensor, int rank, const int64_t *shape,
                               attn_tensor *view) {
  if (rank < tensor->rank || rank > ATTN_MAX_RANK)
    return attn_fail(ATTN_INVALID_SHAPE, "expand: rank %d cannot become %d", tensor->rank, rank);
  attn_tensor result;
  ATTN_TRY(attn_tensor_wrap(tensor->data, tensor->dtype, rank, shape, &result));
  result.device = tensor->device;
  int added = rank - tensor->rank;
  for (int i = 0; i < rank; ++i) {
    int64_t old = i < added ? 1 : tensor->shape[i - added];
    if (old != shape[i] && old != 1)
      return attn_fail(ATTN_INVALID_SHAPE, "expand: extent %lld cannot become %lld", (long long)old,
                       (long long)shape[i]);
    result.stride[i] = i < added || (old == 1 && shape[i] != 1) ? 0 : tensor->stride[i - added];
  }
  *view = result;
  return ATTN_OK;
}

static double load(const void *address, attn_dtype dtype) {
  switch (dtype) {
  case ATTN_F64: return *(const double *)address;
  case ATTN_F32: return *(const float *)address;
  case ATTN_BF16: return attn_bf16_to_f32(*(const uint16_t *)address);
  case ATTN_F16: return attn_f16_to_f32(*(const uint16_t *)address);
  case ATTN_I64: return (double)*(const int64_t *)address;
  case ATTN_I32: return *(const int32_t *)address;
  case ATTN_I16: return *(const int16_t *)address;
  case ATTN_I8: return *(const int8_t *)address;
  case ATTN_U8:
  case ATTN_BOOL: return *(const uint8_t *)address;
  case ATTN_F8_E4M3: return attn_f8_e4m3_to_f32(*(const uint8_t *)address);
  case ATTN_F8_E5M2: return attn_f8_e5m2_to_f32(*(const uint8_t *)address);
  case ATTN_F8_E8M0: return attn_f8_e8m0_to_f32(*(const uint8_t *)address);
  case ATTN_DTYPE_COUNT: break;
  }
  return 0;
}

/* float64 goes to the narrower formats through float32 with the sticky bit kept ("round to odd"),
 * so that the two roundings give the same result as one. */
static float round_to_odd(double value) {
  float rounded = (float)value;
  uint32_t bits;
  memcpy(&bits, &rounded, sizeof bits);
  if ((double)rounded == value || value != value || (bits & 0x7f800000u) == 0x7f800000u)
    return rounded;
  double magnitude = value < 0 ? -value : value, near = rounded < 0 ? -(double)rounded : rounded;
  if (near > magnitude) --bits; /* truncate towards zero ... */
  bits |= 1u;                   /* ... and remember that something was cut off */
  memcpy(&rounded, &bits, sizeof rounded);
  return rounded;
}

static void store(void *address, attn_dtype dtype, double value) {
  switch (dtype) {
  case ATTN_F64: *(double *)address = value; break;
  case ATTN_F32: *(float *)address = (float)value; break;
  case ATTN_BF16: *(uint16_t *)address = attn_f32_to_bf16(round_to_odd(value)); break;
  case ATTN_F16: *(uint16_t *)address = attn_f32_to_f16(round_to_odd(value)); break;
  case ATTN_I64: *(int64_t *)address = (int64_t)value; break;
  case ATTN_I32: *(int32_t *)address = (int32_t)value; break;
  case ATTN_I16: *(int16_t *)address = (int16_t)value; break;
  case ATTN_I8: *(int8_t *)address = (int8_t)value; break;
  case ATTN_U8: *(uint8_t *)address = (uint8_t)value; break;
  case ATTN_BOOL: *(uint8_t *)address = value != 0; break;
  case ATTN_F8_E4M3: *(uint8_t *)address = attn_f32_to_f8_e4m3(round_to_odd(value)); break;
  case ATTN_F8_E5M2: *(uint8_t *)address = attn_f32_to_f8_e5m2(round_to_odd(value)); break;
  case ATTN_F8_E8M0: *(uint8_t *)address = attn_f32_to_f8_e8m0(round_to_odd(value)); break;
  case ATTN_DTYPE_COUNT: break;
  }
}

static bool is_floating(attn_dtype dtype) {
  return dtypes[dtype].floating;
}

static int64_t element_offset(const attn_tensor *tensor, const int64_t *index) {
  int64_t elements = 0;
  for (int i = 0; i < tensor->rank; ++i) elements += index[i] * tensor->stride[i];
  return elements;
}

/* Only memory that this processor can touch. */
static attn_status check_readable(const char *what, const attn_tensor *tensor) {
  if (!tensor->data && attn_tensor_count(tensor))
    return attn_fail(ATTN_INVALID_ARGUMENT, "%s: a tensor has no data", what);
  return ATTN_OK;
}

/* Advances a row-major index over all axes but the last; false after the last row. */
static bool next_row(const attn_tensor *tensor, int64_t *index) {
  for (int i = tensor->rank - 2; i >= 0; --i) {
    if (++index[i] < tensor->shape[i]) return true;
    index[i] = 0;
  }
  return false;
}

/* The pairs that weights and activations meet in, for gapless rows: loops that vectorise. */
#define DEFINE_CONVERT_ROW(name, from_type, to_type, expression)                                   \
  static void name(void *target, const void *source, int64_t length) {                             \
    const from_type *from = source;                                                                \
    to_type *to = target;                                                                          \
    for (int64_t i = 0; i < length; ++i) to[i] = expression;                                       \
  }
DEFINE_CONVERT_ROW(row_f32_to_bf16, float, uint16_t, attn_f32_to_bf16(from[i]))
DEFINE_CONVERT_ROW(row_bf16_to_f32, uint16_t, float, attn_bf16_to_f32(from[i]))
DEFINE_CONVERT_ROW(row_f16_to_f32, uint16_t, float, attn_f16_to_f32(from[i]))
DEFINE_CONVERT_ROW(row_f8_e4m3_to_f32, uint8_t, float, attn_f8_e4m3_to_f32(from[i]))
DEFINE_CONVERT_ROW(row_f32_to_f64, float, double, from[i])
DEFINE_CONVERT_ROW(row_f64_to_f32, double, float, (float)from[i])

static void (*const convert_row[ATTN_DTYPE_COUNT][ATTN_DTYPE_COUNT])(void *, const void *,
                                                                     int64_t) = {
    [ATTN_F32] = {[ATTN_BF16] = row_f32_to_bf16, [ATTN_F64] = row_f32_to_f64},
    [ATTN_BF16] = {[ATTN_F32] = row_bf16_to_f32},
    [ATTN_F16] = {[ATTN_F32] = row_f16_to_f32},
    [ATTN_F64] = {[ATTN_F32] = row_f64_to_f32},
    [ATTN_F8_E4M3] = {[ATTN_F32] = row_f8_e4m3_to_f32},
};

/* Between devices ------------------------------------------------------------------------------ */

static size_t bytes_of(const attn_tensor *tensor) {
  return (size_t)attn_tensor_count(tensor) * dtypes[tensor->dtype].size;
}

/* Both on one GPU. */
static attn_status copy_on_gpu(const attn_tensor *source, const attn_tensor *target) {
  attn_gpu *gpu = attn_gpu_of(source);
  if (!gpu) return ATTN_UNSUPPORTED;
  int index = source->device.index;
  if (source->dtype == target->dtype && attn_tensor_is_contiguous(source) &&
      attn_tensor_is_contiguous(target))
    return attn_device_copy(source->device, target->data, source->data, bytes_of(source));
  if (is_floating(source->dtype))
    return attn_gpu_check(gpu, gpu->cuda->add(target, 1, source, 0, NULL, attn_gpu_stream(gpu)));
  int last = source->rank - 1;
  if (source->rank == 2 && source->stride[last] == 1 && target->stride[last] == 1) {
    size_t size = dtypes[source->dtype].size;
    return attn_gpu_check(
        gpu,
        gpu->cuda->copy_rows(index, target->data, (size_t)target->stride[0] * size, source->data,
                             (size_t)source->stride[0] * size, (size_t)source->shape[1] * size,
                             (size_t)source->shape[0], attn_gpu_stream(gpu)));
  }
  return attn_fail(ATTN_UNSUPPORTED, "copy: %s with gaps on a GPU", attn_dtype_name(source->dtype));
}

/* A gapless tensor of source's shape. */
static attn_status like(const attn_tensor *source, attn_device device, attn_dtype dtype,
                        attn_tensor *made) {
  return attn_tensor_create_on(device, dtype, source->rank, source->shape, made);
}

/* One end on a GPU: through gapless tensors of the target's dtype on the side of the processor and
 * of the source's shape on both, where the two are not gapless and equal already. */
static attn_status copy_across(const attn_tensor *source, const attn_tensor *target) {
  bool up = attn_is_cuda(target->device);
  const attn_tensor *here = up ? source : target, *there = up ? target : source;
  attn_tensor host = {0}, device = {0};
  attn_status status = ATTN_OK;
  bool plain_here = attn_tensor_is_contiguous(here) && here->dtype == there->dtype;
  bool plain_there = attn_tensor_is_contiguous(there);
  if (!plain_here) status = like(source, (attn_device){0}, there->dtype, &host);
  if (status == ATTN_OK && !plain_there)
    status = like(source, there->device, there->dtype, &device);
  void *near = plain_here ? here->data : host.data, *far = plain_there ? there->data : device.data;
  if (status == ATTN_OK && up) {
    if (!plain_here) status = attn_tensor_copy(source, &host);
    if (status == ATTN_OK) status = attn_device_copy(there->device, far, near, bytes_of(there));
    if (status == ATTN_OK && !plain_there) status = attn_tensor_copy(&device, target);
  } else if (status == ATTN_OK) {
    if (!plain_there) status = attn_tensor_copy(source, &device);
    if (status == ATTN_OK) status = attn_device_copy(there->device, near, far, bytes_of(there));
    if (status == ATTN_OK) status = attn_device_synchronize(there->device);
    if (status == ATTN_OK && !plain_here) status = attn_tensor_copy(&host, target);
  }
  attn_tensor_destroy(&host);
  attn_tensor_destroy(&device);
  return status;
}

static attn_status copy_between(const attn_tensor *source, const attn_tensor *target) {
  if (!attn_is_cuda(source->device) || !attn_is_cuda(target->device))
    return copy_across(source, target);
  if (attn_same_device(source->device, target->device)) return copy_on_gpu(source, target);
  attn_tensor host; /* from one GPU to another */
  ATTN_TRY(like(source, (attn_device){0}, source->dtype, &host));
  attn_status status = copy_across(source, &host);
  if (status == ATTN_OK) status = copy_across(&host, target);
  attn_tensor_destroy(&host);
  return status;
}

attn_status attn_tensor_copy(const attn_tensor *source, const attn_tensor *target) {
  if (source->rank != target->rank)
    return attn_fail(ATTN_INVALID_SHAPE, "copy: rank %d to rank %d", source->rank, target->rank);
  for (int i = 0; i < source->rank; ++i)
    if (source->shape[i] != target->shape[i])
      return attn_fail(ATTN_INVALID_SHAPE,
                       "copy: extent %d is %lld in the source, %lld in the target", i,
                       (long long)source->shape[i], (long long)target->shape[i]);
  bool same = source->dtype == target->dtype;
  if (!same && !(is_floating(source->dtype) && is_floating(target->dtype)))
    return attn_fail(ATTN_UNSUPPORTED, "copy: %s to %s", attn_dtype_name(source->dtype),
                     attn_dtype_name(target->dtype));
  ATTN_TRY(check_readable("copy", source));
  ATTN_TRY(check_readable("copy", target));
  if (attn_tensor_count(source) == 0) return ATTN_OK;
  if (attn_is_cuda(source->device) || attn_is_cuda(target->device))
    return copy_between(source, target);

  size_t source_size = dtypes[source->dtype].size, target_size = dtypes[target->dtype].size;
  int last = source->rank - 1;
  int64_t length = source->rank ? source->shape[last] : 1;
  int64_t source_step = source->rank ? source->stride[last] : 1;
  int64_t target_step = source->rank ? target->stride[last] : 1;
  int64_t index[ATTN_MAX_RANK] = {0};
  do {
    const char *from =
        (const char *)source->data + element_offset(source, index) * (int64_t)source_size;
    char *to = (char *)target->data + element_offset(target, index) * (int64_t)target_size;
    if (same && source_step == 1 && target_step == 1) {
      memcpy(to, from, (size_t)length * source_size);
      continue;
    }
    if (!same && source_step == 1 && target_step == 1 &&
        convert_row[source->dtype][target->dtype]) {
      convert_row[source->dtype][target->dtype](to, from, length);
      continue;
    }
    for (int64_t i = 0; i < length; ++i) {
      const char *element = from + i * source_step * (int64_t)source_size;
      char *place = to + i * target_step * (int64_t)target_size;
      if (same)
        memcpy(place, element, source_size);
      else
        store(place, target->dtype, load(element, source->dtype));
    }
  } while (next_row(source, index));
  return ATTN_OK;
}

/* Converting a double to an integer that cannot hold it is undefined in C. */
static attn_status check_holds(attn_dtype dtype, double value) {
  if (is_floating(dtype) || dtype == ATTN_BOOL) return ATTN_OK;
  bool is_signed = dtype != ATTN_U8;
  int bits = (int)(8 * dtypes[dtype].size) - is_signed;
  double limit = (double)(1ull << (bits - 1)) * 2;
  if (value < limit && value >= (is_signed ? -limit : 0)) return ATTN_OK;
  return attn_fail(ATTN_INVALID_ARGUMENT, "fill: %s cannot hold %g", dtypes[dtype].name, value);
}

attn_status attn_tensor_fill(const attn_tensor *tensor, double value) {
  ATTN_TRY(check_readable("fill", tensor));
  ATTN_TRY(check_holds(tensor->dtype, value));
  if (attn_tensor_count(tensor) == 0) return ATTN_OK;
  if (attn_is_cuda(tensor->device)) {
    attn_gpu *gpu = attn_gpu_of(tensor);
    if (!gpu) return ATTN_UNSUPPORTED;
    return attn_gpu_check(gpu, gpu->cuda->fill(tensor, value, attn_gpu_stream(gpu)));
  }
  size_t size = dtypes[tensor->dtype].size;
  int64_t length = tensor->rank ? tensor->shape[tensor->rank - 1] : 1;
  int64_t step = tensor->rank ? tensor->stride[tensor->rank - 1] : 1;
  int64_t index[ATTN_MAX_RANK] = {0};
  do {
    char *to = (char *)tensor->data + element_offset(tensor, index) * (int64_t)size;
    for (int64_t i = 0; i < length; ++i) store(to + i * step * (int64_t)size, tensor->dtype, value);
  } while (next_row(tensor, index));
  return ATTN_OK;
}

double attn_tensor_get(const attn_tensor *tensor, const int64_t *index) {
  size_t size = dtypes[tensor->dtype].size;
  const char *element = (const char *)tensor->data + element_offset(tensor, index) * (int64_t)size;
  if (!attn_is_cuda(tensor->device)) return load(element, tensor->dtype);
  char here[8] = {0}; /* zero where the device has failed: whoever reads next is told */
  if (attn_device_copy(tensor->device, here, element, size) == ATTN_OK)
    (void)attn_device_synchronize(tensor->device);
  return load(here, tensor->dtype);
}
