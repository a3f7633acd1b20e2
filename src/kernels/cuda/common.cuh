/* What the module's files share: errors, conversions, and how an engine's algorithms are listed. */
#ifndef ATTN_KERNELS_CUDA_COMMON_CUH
#define ATTN_KERNELS_CUDA_COMMON_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels/cuda/module.h"

/* Keeps a message for attn_cuda_error() and returns the status. */
attn_status attn_cuda_fail(attn_status status, const char *format, ...) ATTN_PRINTF(2, 3);
/* ATTN_OK for cudaSuccess, else an error that says what failed. */
attn_status attn_cuda_check(cudaError_t error, const char *what);
/* Gives memory that the pool keeps for later back to the device, for those who take none from it.
 * Waits for the device. */
cudaError_t attn_cuda_return_cached(int device);

#define ATTN_CUDA_TRY(call)                                                                        \
  do {                                                                                             \
    attn_status attn_try_status = attn_cuda_check((call), #call);                                  \
    if (attn_try_status != ATTN_OK) return attn_try_status;                                        \
  } while (0)
/* After a launch. */
#define ATTN_CUDA_TRY_LAUNCH(name)                                                                 \
  do {                                                                                             \
    attn_status attn_try_status = attn_cuda_check(cudaGetLastError(), "launch of " name);          \
    if (attn_try_status != ATTN_OK) return attn_try_status;                                        \
  } while (0)

/* One way to do one pass of the recurrent engine. Dispatch (recurrent.cu) takes the first of its
 * list whose plan accepts the problem and the device; the last one accepts all. */
typedef struct recurrent_algorithm {
  const char *name;
  attn_pass pass;
  /* Whether it can do the problem on the device and is worth it; then fills in choice->values,
   * workspace_bytes and description. */
  bool (*plan)(const attn_cuda_device *device, const attn_recurrent_problem *problem,
               attn_cuda_choice *choice);
  /* Whether it can read these tensors (alignment, strides); NULL: any. */
  bool (*suits)(const attn_recurrent_problem *problem, const attn_recurrent_args *args);
  attn_status (*run)(const attn_cuda_device *device, const attn_cuda_choice *choice,
                     const attn_recurrent_problem *problem, const attn_recurrent_args *args,
                     void *workspace, cudaStream_t stream);
} recurrent_algorithm;

/* The same for the softmax engine (softmax.cu). */
typedef struct softmax_algorithm {
  const char *name;
  attn_pass pass;
  bool (*plan)(const attn_cuda_device *device, const attn_softmax_problem *problem,
               attn_cuda_choice *choice);
  bool (*suits)(const attn_softmax_problem *problem, const attn_softmax_args *args);
  attn_status (*run)(const attn_cuda_device *device, const attn_cuda_choice *choice,
                     const attn_softmax_problem *problem, const attn_softmax_args *args,
                     void *workspace, cudaStream_t stream);
} softmax_algorithm;

#endif
