/* Devices: the processor, and GPUs through the CUDA module.
 *
 * The module (libattn_cuda.so) is loaded when a GPU is first asked for: from $ATTN_CUDA_MODULE,
 * else from beside the library or the program, else from where libraries are installed. Without it,
 * or without a driver or a GPU, everything runs on the processor, and asking for a GPU is an error
 * that says what is missing. */
#ifndef ATTN_DEVICE_H
#define ATTN_DEVICE_H

#include "attn/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

/* GPUs that can be used; 0 when there are none, and attn_error_message says why. */
ATTN_API int attn_cuda_count(void);
/* "cpu", "cuda" (GPU 0), "cuda:1", ... or "auto": GPU 0 where there is one, else the processor.
 * ATTN_INVALID_ARGUMENT for other words, ATTN_NOT_FOUND or ATTN_UNSUPPORTED for a GPU that is not
 * there or cannot be used. */
ATTN_API attn_status attn_device_parse(const char *name, attn_device *device);
/* One line about the device: "NVIDIA H200, 132 multiprocessors, 139.8 GiB, compute 9.0"; "" and a
 * message when it cannot be used. Valid until the thread's next call. */
ATTN_API const char *attn_device_description(attn_device device);
/* Waits for everything that the library has queued on the device. */
ATTN_API attn_status attn_device_synchronize(attn_device device);

/* Fresh zeroed memory on a device; attn_tensor_destroy frees it. ATTN_OUT_OF_MEMORY says what was
 * asked for and what is free. */
ATTN_API attn_status attn_tensor_create_on(attn_device device, attn_dtype dtype, int rank,
                                           const int64_t *shape, attn_tensor *tensor);

#ifdef __cplusplus
}
#endif
#endif
