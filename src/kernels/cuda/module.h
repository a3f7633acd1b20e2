/* What the CUDA module gives to the library: one table of functions, as the CPU kernels are one.
 *
 * The module (libattn_cuda.so) is loaded at run time (src/tensor/device.c), so that
 * one installation serves machines with and without a GPU. It exports attn_cuda_module(), which
 * returns the table below. Each family of functions has a header with its list: memory.h, rows.h,
 * dense.h, blocks.h, softmax.h, recurrent.h. Function `x` of the table is attn_cuda_x in
 * src/kernels/cuda/.
 *
 * Rules for all of them:
 *  - Tensors, spans and `workspace` lie in device memory; structs that hold them in host memory.
 *  - Work is queued on `stream` (a cudaStream_t) and nothing waits for it, allocates or copies to
 *    the host, unless the function says so. So a step can be captured as a CUDA graph.
 *  - Results have a fixed order of summation: the same call gives the same bits. No float atomics.
 *  - An error is a status; attn_cuda_error() has its message (of the calling thread). */
#ifndef ATTN_KERNELS_CUDA_MODULE_H
#define ATTN_KERNELS_CUDA_MODULE_H

#include "attn/base.h"
#include "attn/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Raised with every change of the table: a module of another build is refused. */
#define ATTN_CUDA_ABI 6

typedef void *attn_cuda_stream; /* a cudaStream_t */
typedef void *attn_cuda_replay; /* a cudaGraphExec_t: work that was captured, ready to be queued */

/* A GPU as planning sees it. */
typedef struct attn_cuda_device {
  int index;
  int major, minor; /* compute capability */
  int multiprocessors;
  size_t shared_bytes; /* that a block may have at most */
  size_t l2_bytes, memory_bytes;
  char name[256];
} attn_cuda_device;

/* What planning chose for one pass of a problem. */
typedef struct attn_cuda_choice {
  const void *algorithm;  /* of the module */
  int64_t values[8];      /* block sizes, splits: the algorithm's own */
  size_t workspace_bytes; /* device memory, aligned to 256 */
  char description[128];  /* in one line: what was chosen and why */
} attn_cuda_choice;

#ifdef __cplusplus
}
#endif

#include "kernels/cuda/memory.h"
#include "kernels/cuda/rows.h"
#include "kernels/cuda/dense.h"
#include "kernels/cuda/blocks.h"
#include "kernels/cuda/recurrent.h"
#include "kernels/cuda/softmax.h"

#ifdef __cplusplus
extern "C" {
#endif

/* K(result, name, (parameters)) for every function. */
#define ATTN_CUDA_LIST(K)                                                                          \
  /* The message of the last error in this thread. */                                              \
  K(const char *, error, (void))                                                                   \
  ATTN_CUDA_MEMORY(K)                                                                              \
  ATTN_CUDA_ROWS(K)                                                                                \
  ATTN_CUDA_DENSE(K)                                                                               \
  ATTN_CUDA_BLOCKS(K)                                                                              \
  ATTN_CUDA_RECURRENT(K)                                                                           \
  ATTN_CUDA_SOFTMAX(K)

typedef struct attn_cuda {
  int abi; /* ATTN_CUDA_ABI */
#define ATTN_CUDA_MEMBER(result, name, parameters) result(*name) parameters;
  ATTN_CUDA_LIST(ATTN_CUDA_MEMBER)
#undef ATTN_CUDA_MEMBER
} attn_cuda;

#define ATTN_CUDA_DECLARE(result, name, parameters) result attn_cuda_##name parameters;
ATTN_CUDA_LIST(ATTN_CUDA_DECLARE)
#undef ATTN_CUDA_DECLARE

/* The module's one exported symbol. */
#define ATTN_CUDA_ENTRY "attn_cuda_module"
typedef const attn_cuda *attn_cuda_entry(void);

#ifdef __cplusplus
}
#endif
#endif
