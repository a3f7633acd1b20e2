/* Devices, memory and streams: thin covers of the CUDA runtime that keep the project's errors.
 *
 * Allocation is stream-ordered (cudaMallocAsync) from the device's own pool, which keeps what is
 * given back, so that a warm step reaches no system call. */
#include "kernels/cuda/common.cuh"

#include <cstdio>
#include <cstring>

int attn_cuda_device_count(void) {
  int count = 0;
  if (attn_cuda_check(cudaGetDeviceCount(&count), "cudaGetDeviceCount") != ATTN_OK) return 0;
  if (count == 0) attn_cuda_fail(ATTN_NOT_FOUND, "cuda: the driver sees no GPU");
  return count;
}

attn_status attn_cuda_device_open(int index, attn_cuda_device *device) {
  int count = attn_cuda_device_count();
  if (count == 0) return ATTN_UNSUPPORTED;
  if (index < 0 || index >= count)
    return attn_cuda_fail(ATTN_NOT_FOUND, "cuda: there is no GPU %d; the driver sees %d", index,
                          count);
  cudaDeviceProp properties;
  ATTN_CUDA_TRY(cudaGetDeviceProperties(&properties, index));
  if (properties.major < 8)
    return attn_cuda_fail(ATTN_UNSUPPORTED,
                          "cuda: GPU %d (%s) has compute capability %d.%d; 8.0 or newer is needed",
                          index, properties.name, properties.major, properties.minor);
  memset(device, 0, sizeof *device);
  device->index = index;
  device->major = properties.major;
  device->minor = properties.minor;
  device->multiprocessors = properties.multiProcessorCount;
  device->shared_bytes = properties.sharedMemPerBlockOptin;
  device->l2_bytes = (size_t)properties.l2CacheSize;
  device->memory_bytes = properties.totalGlobalMem;
  snprintf(device->name, sizeof device->name, "%s", properties.name);
  ATTN_CUDA_TRY(cudaSetDevice(index));
  cudaMemPool_t pool;
  ATTN_CUDA_TRY(cudaDeviceGetDefaultMemPool(&pool, index));
  unsigned long long keep = ~0ull;
  ATTN_CUDA_TRY(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep));
  return ATTN_OK;
}

attn_status attn_cuda_memory_info(int device, size_t *free_bytes, size_t *total_bytes) {
  ATTN_CUDA_TRY(cudaSetDevice(device));
  ATTN_CUDA_TRY(cudaMemGetInfo(free_bytes, total_bytes));
  return ATTN_OK;
}

attn_status attn_cuda_allocate(int device, size_t bytes, void **memory, attn_cuda_stream stream) {
  ATTN_CUDA_TRY(cudaSetDevice(device));
  cudaError_t error = cudaMallocAsync(memory, bytes ? bytes : 1, (cudaStream_t)stream);
  if (error != cudaErrorMemoryAllocation) return attn_cuda_check(error, "cudaMallocAsync");
  cudaGetLastError();
  *memory = NULL;
  size_t free_bytes = 0, total_bytes = 0;
  cudaMemGetInfo(&free_bytes, &total_bytes);
  return attn_cuda_fail(
      ATTN_OUT_OF_MEMORY, "cuda: out of GPU memory: %.1f MiB asked for, %.1f of %.1f MiB are free",
      (double)bytes / 1048576, (double)free_bytes / 1048576, (double)total_bytes / 1048576);
}

attn_status attn_cuda_release(int device, void *memory, attn_cuda_stream stream) {
  if (!memory) return ATTN_OK;
  ATTN_CUDA_TRY(cudaSetDevice(device));
  ATTN_CUDA_TRY(cudaFreeAsync(memory, (cudaStream_t)stream));
  return ATTN_OK;
}

attn_status attn_cuda_stream_create(int device, attn_cuda_stream *stream) {
  ATTN_CUDA_TRY(cudaSetDevice(device));
  cudaStream_t created;
  ATTN_CUDA_TRY(cudaStreamCreateWithFlags(&created, cudaStreamNonBlocking));
  *stream = created;
  return ATTN_OK;
}

attn_status attn_cuda_stream_destroy(int device, attn_cuda_stream stream) {
  if (!stream) return ATTN_OK;
  ATTN_CUDA_TRY(cudaSetDevice(device));
  ATTN_CUDA_TRY(cudaStreamDestroy((cudaStream_t)stream));
  return ATTN_OK;
}

attn_status attn_cuda_synchronize(int device, attn_cuda_stream stream) {
  ATTN_CUDA_TRY(cudaSetDevice(device));
  ATTN_CUDA_TRY(cudaStreamSynchronize((cudaStream_t)stream));
  return ATTN_OK;
}

attn_status attn_cuda_copy(int device, void *to, const void *from, size_t bytes,
                           attn_cuda_stream stream) {
  ATTN_CUDA_TRY(cudaSetDevice(device));
  ATTN_CUDA_TRY(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, (cudaStream_t)stream));
  return ATTN_OK;
}

attn_status attn_cuda_zero(int device, void *memory, size_t bytes, attn_cuda_stream stream) {
  ATTN_CUDA_TRY(cudaSetDevice(device));
  ATTN_CUDA_TRY(cudaMemsetAsync(memory, 0, bytes, (cudaStream_t)stream));
  return ATTN_OK;
}
