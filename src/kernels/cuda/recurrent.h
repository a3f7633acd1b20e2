/* The recurrent engine on the GPU: see attn/recurrent.h for the problem and its tensors.
 *
 * The library has checked the problem and the arguments' shapes. Besides float64, float32 and
 * bfloat16 the dtype may be float16. args.offsets is device memory here. The innermost dimension of
 * every tensor is contiguous, other strides are free. */
#ifndef ATTN_KERNELS_CUDA_RECURRENT_H
#define ATTN_KERNELS_CUDA_RECURRENT_H

#include "attn/recurrent.h"

#define ATTN_CUDA_RECURRENT(K)                                                                     \
  /* How one pass (ATTN_PASS_FORWARD or ATTN_PASS_BACKWARD) is done; problem->scale and epsilon    \
   * are filled in. `total` is the number of tokens of all sequences. */                           \
  K(attn_status, recurrent_plan,                                                                   \
    (const attn_cuda_device *device, const attn_recurrent_problem *problem, attn_pass pass,        \
     attn_cuda_choice *choice))                                                                    \
  K(attn_status, recurrent_run,                                                                    \
    (const attn_cuda_device *device, const attn_cuda_choice *choice,                               \
     const attn_recurrent_problem *problem, attn_pass pass, const attn_recurrent_args *args,       \
     void *workspace, attn_cuda_stream stream))

#endif
