/* The GPUs of this process: the CUDA module's table, and what the library keeps for each GPU.
 *
 * A GPU is opened when it is first asked for and stays until the process ends. All of the library's
 * work on it is queued on one stream, so that whatever one call writes the next may read, and
 * memory that is given back may be handed out again at once. */
#ifndef ATTN_TENSOR_DEVICE_H
#define ATTN_TENSOR_DEVICE_H

#include "attn/device.h"
#include "base/memory.h"
#include "kernels/cuda/module.h"

typedef struct attn_gpu {
  const attn_cuda *cuda; /* the module's functions */
  attn_cuda_device device;
  attn_cuda_stream main;  /* what attn_gpu_stream gives but for captures */
  attn_cuda_dense *dense; /* NULL until the first product: attn_gpu_dense */
  void *scratch;
  size_t scratch_bytes;
} attn_gpu;

/* The GPU of an ATTN_CUDA device; NULL with the message set when it cannot be used. */
attn_gpu *attn_gpu_open(int index);
static inline bool attn_is_cuda(attn_device device) {
  return device.kind == ATTN_CUDA;
}
/* The GPU of a tensor that says it lies on one; NULL with the message set where there is none. */
attn_gpu *attn_gpu_of(const attn_tensor *tensor);
/* What products need, made at the first one. */
attn_status attn_gpu_dense(attn_gpu *gpu, attn_cuda_dense **dense);

/* Where this thread's work goes: the GPU's one stream, or, between the two calls below, a stream of
 * this thread's own that keeps the work instead of doing it. Until the end it must not wait for the
 * GPU, take memory or scratch: the call then fails, and so does the end. */
attn_cuda_stream attn_gpu_stream(const attn_gpu *gpu);
attn_status attn_gpu_capture_begin(attn_gpu *gpu);
/* Ends it in any case: *replay, where it is not NULL, is renewed or made anew; it is NULL after an
 * error. */
attn_status attn_gpu_capture_end(attn_gpu *gpu, attn_cuda_replay *replay);

/* Memory for work that is queued at once and done with when the next is: one holder at a time,
 * others wait. NULL with the message set; give it back in any case. */
void *attn_gpu_take_scratch(attn_gpu *gpu, size_t bytes);
void attn_gpu_give_scratch(attn_gpu *gpu);

/* Takes over the module's message where a status is an error. */
attn_status attn_gpu_check(const attn_gpu *gpu, attn_status status);

/* Memory of a device: host memory from attn_alloc for the processor. NULL with the message set. */
void *attn_device_alloc(attn_device device, size_t bytes);
void attn_device_free(attn_device device, void *memory);
/* Bytes of the device's memory that the library has taken and not given back, and the most there
 * were since the last reset. Zeros for a GPU that cannot be used. */
size_t attn_device_live_bytes(attn_device device);
size_t attn_device_peak_bytes(attn_device device);
void attn_device_reset_peak(attn_device device);
attn_status attn_device_zero(attn_device device, void *memory, size_t bytes);
/* Bytes from or to memory of `device`, the other end being on the same device or the processor.
 * Waits where the processor's memory is read or written. */
attn_status attn_device_copy(attn_device device, void *to, const void *from, size_t bytes);

/* The same for `rows` rows of `bytes`, `step` bytes apart, all on the device. */
attn_status attn_device_copy_rows(attn_device device, void *to, size_t to_step, const void *from,
                                  size_t from_step, size_t bytes, size_t rows);

/* An arena whose chunks are memory of the device. */
attn_arena *attn_device_arena(attn_device device, size_t first_chunk);

static inline bool attn_same_device(attn_device a, attn_device b) {
  return a.kind == b.kind && (a.kind == ATTN_CPU || a.index == b.index);
}

#endif
