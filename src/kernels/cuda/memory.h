/* Devices, memory and streams. */
#ifndef ATTN_KERNELS_CUDA_MEMORY_H
#define ATTN_KERNELS_CUDA_MEMORY_H

#include "attn/tensor.h"

enum { ATTN_CUDA_STORE = 2048 };

/* The formatter would break this list. */
/* clang-format off */
#define ATTN_CUDA_MEMORY(K)                                                                        \
  /* GPUs that the driver sees; 0 with a message when there is no driver. */                       \
  K(int, device_count, (void))                                                                     \
  /* Describes a GPU and makes it ready; refuses one older than 8.0. May take a moment. */         \
  K(attn_status, device_open, (int index, attn_cuda_device *device))                               \
  /* Free and total bytes now. */                                                                  \
  K(attn_status, memory_info, (int device, size_t *free_bytes, size_t *total_bytes))               \
  /* Bytes that were allocated and not released: now, and the most since memory_reset_peak. */     \
  K(attn_status, memory_use, (int device, size_t *live_bytes, size_t *peak_bytes))                 \
  K(attn_status, memory_reset_peak, (int device))                                                  \
  /* Memory that work queued behind it on the stream may use; given back in the stream's order.    \
   * The error names what was asked for and what is free. */                                       \
  K(attn_status, allocate, (int device, size_t bytes, void **memory, attn_cuda_stream stream))     \
  K(attn_status, release, (int device, void *memory, attn_cuda_stream stream))                     \
  K(attn_status, stream_create, (int device, attn_cuda_stream *stream))                            \
  K(attn_status, stream_destroy, (int device, attn_cuda_stream stream))                            \
  /* Waits until all work of the stream is done; errors of kernels show here. */                   \
  K(attn_status, synchronize, (int device, attn_cuda_stream stream))                               \
  /* Bytes between any two of host and device memory. From or to pageable host memory it waits. */ \
  K(attn_status, copy,                                                                             \
    (int device, void *to, const void *from, size_t bytes, attn_cuda_stream stream))               \
  K(attn_status, zero, (int device, void *memory, size_t bytes, attn_cuda_stream stream))         \
  /* `rows` rows of `bytes`, with a distance in bytes between their starts */                      \
  K(attn_status, copy_rows, (int device, void *to, size_t to_step, const void *from,               \
                             size_t from_step, size_t bytes, size_t rows,                          \
                             attn_cuda_stream stream))                                             \
  /* At most ATTN_CUDA_STORE bytes of the host's, which may change as soon as this returns: they   \
   * travel with the launch, so nothing waits and a graph can be captured */                       \
  K(attn_status, store, (int device, void *to, const void *from, size_t bytes,                     \
                         attn_cuda_stream stream))                                                 \
  /* `bytes` at `from` to the row that *row, device memory, names: table + *row * step */          \
  K(attn_status, place, (int device, void *table, size_t step, const int64_t *row,                 \
                         const void *from, size_t bytes, attn_cuda_stream stream))                 \
  /* From now on what this thread queues on `stream` is kept instead of done. Waiting, allocating  \
   * and copies to the host are errors until the end, which then fails as well. */                 \
  K(attn_status, capture_begin, (int device, attn_cuda_stream stream))                             \
  /* The work that was kept, in *replay: a new one where that is NULL, else brought up to date,    \
   * or made anew. After an error *replay is NULL */                                               \
  K(attn_status, capture_end, (int device, attn_cuda_stream stream, attn_cuda_replay *replay))     \
  K(attn_status, replay_queue, (int device, attn_cuda_replay replay, attn_cuda_stream stream))     \
  K(attn_status, replay_destroy, (int device, attn_cuda_replay replay))                            \
  /* All elements of a tensor of any dtype (floating or not) and strides := value */               \
  K(attn_status, fill, (const attn_tensor *tensor, double value, attn_cuda_stream stream))
/* clang-format on */

#endif
