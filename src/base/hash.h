/* FNV-1a, 64 bits: finds truncation, bit rot and mixed-up files, not forgery. */
#ifndef ATTN_BASE_HASH_H
#define ATTN_BASE_HASH_H

#include <stddef.h>
#include <stdint.h>

#define ATTN_HASH_START UINT64_C(0xcbf29ce484222325)

/* Continues a hash over `size` more bytes; the first call is given ATTN_HASH_START. */
static inline uint64_t attn_hash(uint64_t value, const void *data, size_t size) {
  const unsigned char *bytes = data;
  for (size_t i = 0; i < size; ++i) value = (value ^ bytes[i]) * UINT64_C(0x100000001b3);
  return value;
}

#endif
