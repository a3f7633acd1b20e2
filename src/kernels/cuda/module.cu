/* The table that the library takes from the module, and the module's errors. */
#include "kernels/cuda/common.cuh"

#include <cstdarg>
#include <cstdio>

static thread_local char last_error[512];

const char *attn_cuda_error(void) {
  return last_error;
}

attn_status attn_cuda_fail(attn_status status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

attn_status attn_cuda_check(cudaError_t error, const char *what) {
  if (error == cudaSuccess) return ATTN_OK;
  cudaGetLastError(); /* forgets errors that leave the context usable */
  attn_status status = error == cudaErrorMemoryAllocation ? ATTN_OUT_OF_MEMORY
                       : error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver
                           ? ATTN_UNSUPPORTED
                           : ATTN_INTERNAL;
  return attn_cuda_fail(status, "cuda: %s (%s, in %s)", cudaGetErrorString(error),
                        cudaGetErrorName(error), what);
}

#define MEMBER(result, name, parameters) attn_cuda_##name,
static const attn_cuda table = {ATTN_CUDA_ABI, ATTN_CUDA_LIST(MEMBER)};

extern "C" __attribute__((visibility("default"))) const attn_cuda *attn_cuda_module(void) {
  return &table;
}
