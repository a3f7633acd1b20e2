/* The softmax engine on the GPU: see attn/softmax.h for the problem and its tensors.
 *
 * The library has checked the problem and the arguments' shapes. Besides float64, float32 and
 * bfloat16 the dtype may be float16. args.query_offsets, key_offsets and key_lengths are device
 * memory here. The innermost dimension of q, k, v, o and their gradients is contiguous, other
 * strides are free. */
#ifndef ATTN_KERNELS_CUDA_SOFTMAX_H
#define ATTN_KERNELS_CUDA_SOFTMAX_H

#include "attn/softmax.h"

#define ATTN_CUDA_SOFTMAX(K)                                                                       \
  /* How one pass is done; problem->scale is filled in. */                                         \
  K(attn_status, softmax_plan,                                                                     \
    (const attn_cuda_device *device, const attn_softmax_problem *problem, attn_pass pass,          \
     attn_cuda_choice *choice))                                                                    \
  K(attn_status, softmax_run,                                                                      \
    (const attn_cuda_device *device, const attn_cuda_choice *choice,                               \
     const attn_softmax_problem *problem, attn_pass pass, const attn_softmax_args *args,           \
     void *workspace, attn_cuda_stream stream))

#endif
