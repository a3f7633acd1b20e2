#include "fuzz.h"

#include "files/safetensors.h"

#include <stdlib.h>

static volatile unsigned char sink; /* so that every byte is read */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  attn_safetensors *file;
  const char *path = fuzz_file(".safetensors", data, size);
  if (attn_safetensors_open(path, &file) == ATTN_OK) {
    for (int64_t i = 0; i < attn_safetensors_count(file); ++i) {
      attn_described_tensor described;
      attn_tensor tensor;
      if (attn_safetensors_describe(file, i, &described) != ATTN_OK) abort();
      for (uint64_t b = 0; b < described.bytes; ++b)
        sink ^= ((const unsigned char *)described.data)[b];
      if (attn_safetensors_get(file, i, &tensor) != ATTN_OK) continue;
      int64_t bytes = attn_tensor_count(&tensor) * (int64_t)attn_dtype_size(tensor.dtype);
      for (int64_t b = 0; b < bytes; ++b) sink ^= ((const unsigned char *)tensor.data)[b];
    }
    attn_safetensors_close(file);
  }
  unlink(path);
  return 0;
}
