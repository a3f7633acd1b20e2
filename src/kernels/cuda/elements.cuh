/* Elements of the engines' dtypes in device memory, read and written as the type that a kernel
 * computes in: double for float64, float for float32, bfloat16 and float16. The dtype is a run-time
 * value, so that a kernel exists twice and not four times. */
#ifndef ATTN_KERNELS_CUDA_ELEMENTS_CUH
#define ATTN_KERNELS_CUDA_ELEMENTS_CUH

#include "kernels/cuda/common.cuh"

template <typename Real>
__device__ __forceinline__ Real load_element(const void *data, attn_dtype dtype, int64_t index) {
  if constexpr (sizeof(Real) == 8) return ((const double *)data)[index];
  switch (dtype) {
  case ATTN_BF16: return (Real)__bfloat162float(((const __nv_bfloat16 *)data)[index]);
  case ATTN_F16: return (Real)__half2float(((const __half *)data)[index]);
  default: return (Real)((const float *)data)[index];
  }
}

template <typename Real>
__device__ __forceinline__ void store_element(void *data, attn_dtype dtype, int64_t index, Real x) {
  if constexpr (sizeof(Real) == 8) {
    ((double *)data)[index] = x;
    return;
  }
  switch (dtype) {
  case ATTN_BF16: ((__nv_bfloat16 *)data)[index] = __float2bfloat16_rn((float)x); break;
  case ATTN_F16: ((__half *)data)[index] = __float2half_rn((float)x); break;
  default: ((float *)data)[index] = (float)x;
  }
}

/* Calls f with `data` as a pointer to its elements' type: chosen once, so that the loads of a loop
 * in f do not wait for each other. */
template <typename Real, typename F>
__device__ __forceinline__ void with_elements(const void *data, attn_dtype dtype, const F &f) {
  if constexpr (sizeof(Real) == 8) {
    f((const double *)data);
  } else {
    switch (dtype) {
    case ATTN_BF16: f((const __nv_bfloat16 *)data); break;
    case ATTN_F16: f((const __half *)data); break;
    default: f((const float *)data);
    }
  }
}

__host__ __device__ inline int64_t ceil_divide(int64_t x, int64_t unit) {
  return (x + unit - 1) / unit;
}

/* Hands out aligned pieces of the workspace; with NULL it only counts. */
struct workspace_cutter {
  char *base;
  size_t used;
  void *take(size_t bytes) {
    void *piece = base ? base + used : NULL;
    used += (bytes + 255) / 256 * 256;
    return piece;
  }
};

#endif
