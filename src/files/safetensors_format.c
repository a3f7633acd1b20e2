#include "files/safetensors_format.h"
#include "base/status.h"

#include <string.h>

static const attn_format_dtype dtypes[] = {
    {"F64", ATTN_F64, 64},
    {"F32", ATTN_F32, 32},
    {"BF16", ATTN_BF16, 16},
    {"F16", ATTN_F16, 16},
    {"I64", ATTN_I64, 64},
    {"I32", ATTN_I32, 32},
    {"I16", ATTN_I16, 16},
    {"I8", ATTN_I8, 8},
    {"U8", ATTN_U8, 8},
    {"BOOL", ATTN_BOOL, 8},
    {"F8_E4M3", ATTN_F8_E4M3, 8},
    {"F8_E5M2", ATTN_F8_E5M2, 8},
    {"F8_E8M0", ATTN_F8_E8M0, 8},
    {"U16", ATTN_DTYPE_COUNT, 16},
    {"U32", ATTN_DTYPE_COUNT, 32},
    {"U64", ATTN_DTYPE_COUNT, 64},
    {"F8_E4M3FNUZ", ATTN_DTYPE_COUNT, 8},
    {"F8_E5M2FNUZ", ATTN_DTYPE_COUNT, 8},
    {"F6_E2M3", ATTN_DTYPE_COUNT, 6},
    {"F6_E3M2", ATTN_DTYPE_COUNT, 6},
    {"F4", ATTN_DTYPE_COUNT, 4},
    {"C64", ATTN_DTYPE_COUNT, 64},
};
enum { DTYPES = sizeof dtypes / sizeof *dtypes };

const attn_format_dtype *attn_format_dtype_named(const char *name) {
  for (int i = 0; i < DTYPES; ++i)
    if (strcmp(name, dtypes[i].name) == 0) return &dtypes[i];
  return NULL;
}

const attn_format_dtype *attn_format_dtype_of(attn_dtype dtype) {
  for (int i = 0; i < DTYPES && dtype != ATTN_DTYPE_COUNT; ++i)
    if (dtypes[i].dtype == dtype) return &dtypes[i];
  return NULL;
}

attn_status attn_format_bytes_of(const attn_format_dtype *dtype, int rank, const int64_t *shape,
                                 uint64_t *bytes) {
  int64_t product = dtype->bits; /* of the extents, with 1 in place of 0: strides use it */
  bool empty = false;
  for (int i = 0; i < rank; ++i) {
    empty = empty || shape[i] == 0;
    if (__builtin_mul_overflow(product, shape[i] ? shape[i] : 1, &product))
      return attn_fail(ATTN_BAD_FORMAT, "the size of its shape overflows");
  }
  if (!empty && product % 8 != 0)
    return attn_fail(ATTN_BAD_FORMAT, "its %lld bits of %s are not whole bytes", (long long)product,
                     dtype->name);
  *bytes = empty ? 0 : (uint64_t)product / 8;
  return ATTN_OK;
}
