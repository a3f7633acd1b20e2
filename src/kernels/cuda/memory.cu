/* Devices, memory and streams: thin covers of the CUDA runtime that keep the project's errors.
 *
 * Allocation is stream-ordered (cudaMallocAsync) from the device's own pool, which keeps what is
 * given back, so that a warm step reaches no system call; until memory runs out for the first time:
 * from then on what is given back is there for others too, the driver's own needs among them. */
#include "kernels/cuda/common.cuh"

#include <atomic>
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

attn_status attn_cuda_memory_use(int device, size_t *live_bytes, size_t *peak_bytes) {
  cudaMemPool_t pool;
  unsigned long long live = 0, peak = 0;
  ATTN_CUDA_TRY(cudaDeviceGetDefaultMemPool(&pool, device));
  ATTN_CUDA_TRY(cudaMemPoolGetAttribute(pool, cudaMemPoolAttrUsedMemCurrent, &live));
  ATTN_CUDA_TRY(cudaMemPoolGetAttribute(pool, cudaMemPoolAttrUsedMemHigh, &peak));
  *live_bytes = (size_t)live;
  *peak_bytes = (size_t)(peak > live ? peak : live);
  return ATTN_OK;
}

attn_status attn_cuda_memory_reset_peak(int device) {
  cudaMemPool_t pool;
  unsigned long long none = 0;
  ATTN_CUDA_TRY(cudaDeviceGetDefaultMemPool(&pool, device));
  ATTN_CUDA_TRY(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrUsedMemHigh, &none));
  return ATTN_OK;
}

enum { MOST_DEVICES = 64 };
static std::atomic<bool> scarce[MOST_DEVICES]; /* where memory has run out before */

static void stop_keeping(int device) {
  cudaMemPool_t pool;
  unsigned long long none = 0;
  if (device < MOST_DEVICES) scarce[device] = true;
  if (cudaDeviceGetDefaultMemPool(&pool, device) == cudaSuccess)
    cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &none);
}

cudaError_t attn_cuda_return_cached(int device) {
  cudaMemPool_t pool;
  cudaError_t error = cudaDeviceGetDefaultMemPool(&pool, device);
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  return error == cudaSuccess ? cudaMemPoolTrimTo(pool, 0) : error;
}

attn_status attn_cuda_allocate(int device, size_t bytes, void **memory, attn_cuda_stream stream) {
  ATTN_CUDA_TRY(cudaSetDevice(device));
  cudaError_t error = cudaMallocAsync(memory, bytes ? bytes : 1, (cudaStream_t)stream);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    stop_keeping(device);
    if (attn_cuda_return_cached(device) == cudaSuccess) /* what is cached may lie in pieces */
      error = cudaMallocAsync(memory, bytes ? bytes : 1, (cudaStream_t)stream);
  }
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
  if (device < MOST_DEVICES && scarce[device])
    ATTN_CUDA_TRY(cudaStreamSynchronize((cudaStream_t)stream)); /* now the pool lets it go */
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
  cudaStreamCaptureStatus capture;
  ATTN_CUDA_TRY(cudaStreamIsCapturing((cudaStream_t)stream, &capture));
  /* A captured copy would read the host's memory when it is replayed: refused. */
  cudaMemcpyKind kind =
      capture == cudaStreamCaptureStatusNone ? cudaMemcpyDefault : cudaMemcpyDeviceToDevice;
  ATTN_CUDA_TRY(cudaMemcpyAsync(to, from, bytes, kind, (cudaStream_t)stream));
  return ATTN_OK;
}

attn_status attn_cuda_zero(int device, void *memory, size_t bytes, attn_cuda_stream stream) {
  ATTN_CUDA_TRY(cudaSetDevice(device));
  ATTN_CUDA_TRY(cudaMemsetAsync(memory, 0, bytes, (cudaStream_t)stream));
  return ATTN_OK;
}

attn_status attn_cuda_copy_rows(int device, void *to, size_t to_step, const void *from,
                                size_t from_step, size_t bytes, size_t rows,
                                attn_cuda_stream stream) {
  if (bytes == 0 || rows == 0) return ATTN_OK;
  ATTN_CUDA_TRY(cudaSetDevice(device));
  ATTN_CUDA_TRY(cudaMemcpy2DAsync(to, to_step, from, from_step, bytes, rows, cudaMemcpyDefault,
                                  (cudaStream_t)stream));
  return ATTN_OK;
}

struct packet {
  unsigned char bytes[ATTN_CUDA_STORE];
};

__global__ void store_packet(unsigned char *to, __grid_constant__ const packet from, int bytes) {
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) to[i] = from.bytes[i];
}

attn_status attn_cuda_store(int device, void *to, const void *from, size_t bytes,
                            attn_cuda_stream stream) {
  if (bytes > ATTN_CUDA_STORE)
    return attn_cuda_fail(ATTN_INTERNAL, "cuda: store of %zu bytes, at most %d", bytes,
                          (int)ATTN_CUDA_STORE);
  packet data;
  memcpy(data.bytes, from, bytes);
  ATTN_CUDA_TRY(cudaSetDevice(device));
  store_packet<<<1, 256, 0, (cudaStream_t)stream>>>((unsigned char *)to, data, (int)bytes);
  ATTN_CUDA_TRY_LAUNCH("store");
  return ATTN_OK;
}

template <class Word>
__global__ void place_words(char *table, size_t step, const int64_t *row, const Word *from,
                            int count) {
  Word *to = (Word *)(table + (size_t)*row * step);
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
    to[i] = from[i];
}

attn_status attn_cuda_place(int device, void *table, size_t step, const int64_t *row,
                            const void *from, size_t bytes, attn_cuda_stream stream) {
  if (bytes == 0) return ATTN_OK;
  bool wide = ((uintptr_t)table | step | (uintptr_t)from | bytes) % sizeof(uint4) == 0;
  int count = (int)(wide ? bytes / sizeof(uint4) : bytes), blocks = (count + 255) / 256;
  if (blocks > 64) blocks = 64;
  ATTN_CUDA_TRY(cudaSetDevice(device));
  if (wide)
    place_words<<<blocks, 256, 0, (cudaStream_t)stream>>>((char *)table, step, row,
                                                          (const uint4 *)from, count);
  else
    place_words<<<blocks, 256, 0, (cudaStream_t)stream>>>((char *)table, step, row,
                                                          (const char *)from, count);
  ATTN_CUDA_TRY_LAUNCH("place");
  return ATTN_OK;
}

attn_status attn_cuda_capture_begin(int device, attn_cuda_stream stream) {
  ATTN_CUDA_TRY(cudaSetDevice(device));
  ATTN_CUDA_TRY(cudaStreamBeginCapture((cudaStream_t)stream, cudaStreamCaptureModeThreadLocal));
  return ATTN_OK;
}

attn_status attn_cuda_capture_end(int device, attn_cuda_stream stream, attn_cuda_replay *replay) {
  cudaGraph_t graph = NULL;
  cudaGraphExec_t made = (cudaGraphExec_t)*replay;
  ATTN_CUDA_TRY(cudaSetDevice(device));
  cudaError_t error = cudaStreamEndCapture((cudaStream_t)stream, &graph);
  cudaGraphExecUpdateResultInfo info;
  bool renewed =
      error == cudaSuccess && made && cudaGraphExecUpdate(made, graph, &info) == cudaSuccess;
  if (!renewed && made) {
    cudaGetLastError(); /* another shape of work is no error */
    cudaGraphExecDestroy(made);
    made = NULL;
  }
  if (error == cudaSuccess && !renewed) error = cudaGraphInstantiate(&made, graph, 0);
  if (graph) cudaGraphDestroy(graph);
  *replay = error == cudaSuccess ? made : NULL;
  return attn_cuda_check(error, "a capture");
}

attn_status attn_cuda_replay_queue(int device, attn_cuda_replay replay, attn_cuda_stream stream) {
  ATTN_CUDA_TRY(cudaSetDevice(device));
  ATTN_CUDA_TRY(cudaGraphLaunch((cudaGraphExec_t)replay, (cudaStream_t)stream));
  return ATTN_OK;
}

attn_status attn_cuda_replay_destroy(int device, attn_cuda_replay replay) {
  if (!replay) return ATTN_OK;
  ATTN_CUDA_TRY(cudaSetDevice(device));
  ATTN_CUDA_TRY(cudaGraphExecDestroy((cudaGraphExec_t)replay));
  return ATTN_OK;
}

/* A value of up to eight bytes, to be repeated. */
struct pattern {
  unsigned char bytes[8];
  int size;
};

struct extents {
  long long shape[ATTN_MAX_RANK], stride[ATTN_MAX_RANK], count;
  int rank;
};

__global__ void fill_elements(char *data, extents e, pattern value) {
  long long step = (long long)gridDim.x * blockDim.x;
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < e.count; i += step) {
    long long rest = i, at = 0;
    for (int axis = e.rank - 1; axis >= 0; --axis) {
      at += rest % e.shape[axis] * e.stride[axis];
      rest /= e.shape[axis];
    }
    for (int b = 0; b < value.size; ++b) data[at * value.size + b] = (char)value.bytes[b];
  }
}

static pattern pattern_of(attn_dtype dtype, double value) {
  pattern p = {};
  p.size = dtype == ATTN_F64 || dtype == ATTN_I64                       ? 8
           : dtype == ATTN_F32 || dtype == ATTN_I32                     ? 4
           : dtype == ATTN_I8 || dtype == ATTN_U8 || dtype == ATTN_BOOL ? 1
                                                                        : 2;
  float f = (float)value;
  long long whole = (long long)value;
  __nv_bfloat16 b = __double2bfloat16(value);
  __half h = __double2half(value);
  const void *from = &whole; /* little-endian: the low bytes of an integer of any size */
  if (dtype == ATTN_F64) from = &value;
  if (dtype == ATTN_F32) from = &f;
  if (dtype == ATTN_BF16) from = &b;
  if (dtype == ATTN_F16) from = &h;
  memcpy(p.bytes, from, (size_t)p.size);
  return p;
}

attn_status attn_cuda_fill(const attn_tensor *tensor, double value, attn_cuda_stream stream) {
  extents e = {};
  e.rank = tensor->rank;
  e.count = 1;
  for (int i = 0; i < tensor->rank; ++i) {
    e.shape[i] = tensor->shape[i];
    e.stride[i] = tensor->stride[i];
    e.count *= tensor->shape[i];
  }
  if (e.count == 0) return ATTN_OK;
  ATTN_CUDA_TRY(cudaSetDevice(tensor->device.index));
  long long blocks = (e.count + 255) / 256;
  fill_elements<<<(unsigned)(blocks < 4096 ? blocks : 4096), 256, 0, (cudaStream_t)stream>>>(
      (char *)tensor->data, e, pattern_of(tensor->dtype, value));
  ATTN_CUDA_TRY_LAUNCH("fill");
  return ATTN_OK;
}
