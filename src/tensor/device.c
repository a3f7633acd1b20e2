#include "tensor/device.h"
#include "base/status.h"

#include <dlfcn.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_GPUS = 64, DEVICE_ALIGNMENT = 256, LARGEST_CHUNK = 1 << 29 };

#define MODULE_NAME "libattn_cuda.so"

/* Loading the module ----------------------------------------------------------------------------
 */

static const attn_cuda *module; /* NULL: not there; `missing` says why */
static char missing[512];
static pthread_once_t module_once = PTHREAD_ONCE_INIT;

static bool try_path(const char *path) {
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    snprintf(missing, sizeof missing, "cuda: the module cannot be loaded: %s", dlerror());
    return false;
  }
  attn_cuda_entry *entry;
  *(void **)&entry = dlsym(library, ATTN_CUDA_ENTRY);
  const attn_cuda *table = entry ? entry() : NULL;
  if (table && table->abi == ATTN_CUDA_ABI) {
    module = table;
    return true;
  }
  snprintf(missing, sizeof missing, "cuda: %s is of another version (%d, expected %d)", path,
           table ? table->abi : 0, ATTN_CUDA_ABI);
  dlclose(library);
  return false;
}

/* Beside the file that this function is in, be it the shared library or a program; or, for an
 * installed program, in the folder of libraries next to its own. */
static bool try_beside_us(void) {
  static const char *const places[] = {"/" MODULE_NAME, "/../lib/" MODULE_NAME,
                                       "/../lib/x86_64-linux-gnu/" MODULE_NAME};
  char path[PATH_MAX + 64], resolved[PATH_MAX];
  Dl_info info;
  *path = 0;
  if (!dladdr((const void *)&module_once, &info) || !info.dli_fname) return false;
  const char *file = strchr(info.dli_fname, '/') ? info.dli_fname : "/proc/self/exe";
  if (!realpath(file, resolved)) return false;
  *strrchr(resolved, '/') = 0;
  for (size_t i = 0; i < sizeof places / sizeof *places; ++i) {
    snprintf(path, sizeof path, "%s%s", resolved, places[i]);
    FILE *there = fopen(path, "rb");
    if (!there) continue;
    fclose(there);
    return try_path(path);
  }
  return false;
}

static void load_module(void) {
  const char *named = getenv("ATTN_CUDA_MODULE");
  if (named) {
    (void)try_path(named);
    return;
  }
  snprintf(missing, sizeof missing,
           "cuda: there is no %s beside the library; build it with nvcc, or name it in "
           "ATTN_CUDA_MODULE",
           MODULE_NAME);
  (void)try_beside_us();
}

static const attn_cuda *get_module(void) {
  pthread_once(&module_once, load_module);
  if (!module) (void)attn_fail(ATTN_UNSUPPORTED, "%s", missing);
  return module;
}

/* GPUs ------------------------------------------------------------------------------------------
 */

static attn_gpu gpus[MOST_GPUS];
static pthread_mutex_t gpus_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t scratch_lock = PTHREAD_MUTEX_INITIALIZER;

static attn_status check(const attn_cuda *cuda, attn_status status) {
  return status == ATTN_OK ? ATTN_OK : attn_fail(status, "%s", cuda->error());
}

attn_status attn_gpu_check(const attn_gpu *gpu, attn_status status) {
  return check(gpu->cuda, status);
}

int attn_cuda_count(void) {
  const attn_cuda *cuda = get_module();
  if (!cuda) return 0;
  int count = cuda->device_count();
  if (count == 0) (void)attn_fail(ATTN_NOT_FOUND, "%s", cuda->error());
  return count < MOST_GPUS ? count : MOST_GPUS;
}

static attn_gpu *open_gpu(int index) {
  attn_gpu *gpu = &gpus[index];
  if (gpu->cuda) return gpu;
  const attn_cuda *cuda = get_module();
  if (!cuda || check(cuda, cuda->device_open(index, &gpu->device)) != ATTN_OK) return NULL;
  if (check(cuda, cuda->stream_create(index, &gpu->main)) != ATTN_OK) return NULL;
  __atomic_store_n(&gpu->cuda, cuda, __ATOMIC_RELEASE); /* from here on it needs no lock */
  return gpu;
}

attn_gpu *attn_gpu_open(int index) {
  if (index < 0 || index >= MOST_GPUS) {
    (void)attn_fail(ATTN_NOT_FOUND, "cuda: there is no GPU %d", index);
    return NULL;
  }
  if (__atomic_load_n(&gpus[index].cuda, __ATOMIC_ACQUIRE)) return &gpus[index];
  pthread_mutex_lock(&gpus_lock);
  attn_gpu *gpu = open_gpu(index);
  pthread_mutex_unlock(&gpus_lock);
  return gpu;
}

/* The capture of this thread. */
static _Thread_local const attn_gpu *capturing;
static _Thread_local attn_cuda_stream capture_stream;

attn_cuda_stream attn_gpu_stream(const attn_gpu *gpu) {
  return capturing == gpu ? capture_stream : gpu->main;
}

attn_status attn_gpu_capture_begin(attn_gpu *gpu) {
  int index = gpu->device.index;
  if (capturing) return attn_fail(ATTN_INTERNAL, "cuda: a capture inside a capture");
  ATTN_TRY(attn_gpu_check(gpu, gpu->cuda->stream_create(index, &capture_stream)));
  attn_status status = attn_gpu_check(gpu, gpu->cuda->capture_begin(index, capture_stream));
  if (status == ATTN_OK)
    capturing = gpu;
  else
    (void)gpu->cuda->stream_destroy(index, capture_stream);
  return status;
}

attn_status attn_gpu_capture_end(attn_gpu *gpu, attn_cuda_replay *replay) {
  int index = gpu->device.index;
  capturing = NULL;
  attn_status status = attn_gpu_check(gpu, gpu->cuda->capture_end(index, capture_stream, replay));
  (void)gpu->cuda->stream_destroy(index, capture_stream);
  return status;
}

static attn_status refuse_in_capture(const attn_gpu *gpu, const char *what) {
  if (capturing != gpu) return ATTN_OK;
  return attn_fail(ATTN_UNSUPPORTED, "cuda: %s inside a captured step", what);
}

attn_gpu *attn_gpu_of(const attn_tensor *tensor) {
  return attn_gpu_open(tensor->device.index);
}

attn_status attn_gpu_dense(attn_gpu *gpu, attn_cuda_dense **dense) {
  pthread_mutex_lock(&gpus_lock);
  attn_status status = ATTN_OK;
  if (!gpu->dense) status = check(gpu->cuda, gpu->cuda->dense_create(&gpu->device, &gpu->dense));
  *dense = gpu->dense;
  pthread_mutex_unlock(&gpus_lock);
  return status;
}

attn_status attn_device_parse(const char *name, attn_device *device) {
  if (!name || !device)
    return attn_fail(ATTN_INVALID_ARGUMENT, "device: the %s is NULL", name ? "result" : "name");
  *device = (attn_device){0};
  if (strcmp(name, "cpu") == 0) return ATTN_OK;
  if (strcmp(name, "auto") == 0) {
    if (attn_cuda_count() > 0) device->kind = ATTN_CUDA;
    return ATTN_OK;
  }
  char *end = NULL;
  long index = 0;
  if (strncmp(name, "cuda:", 5) == 0 && name[5] >= '0' && name[5] <= '9')
    index = strtol(name + 5, &end, 10);
  if (strcmp(name, "cuda") != 0 && (!end || *end))
    return attn_fail(ATTN_INVALID_ARGUMENT, "device '%s' is unknown: cpu, cuda, cuda:N or auto",
                     name);
  attn_gpu *gpu = attn_gpu_open(index < MOST_GPUS ? (int)index : MOST_GPUS);
  if (!gpu) return get_module() ? ATTN_NOT_FOUND : ATTN_UNSUPPORTED;
  *device = (attn_device){.kind = ATTN_CUDA, .index = (int)index};
  return ATTN_OK;
}

const char *attn_device_description(attn_device device) {
  static _Thread_local char text[384];
  if (!attn_is_cuda(device)) return attn_cpu_description();
  const attn_gpu *gpu = attn_gpu_open(device.index);
  if (!gpu) return "";
  const double gib = 1024.0 * 1024 * 1024;
  snprintf(text, sizeof text, "%s, %d multiprocessors, %.1f GiB, compute %d.%d", gpu->device.name,
           gpu->device.multiprocessors, (double)gpu->device.memory_bytes / gib, gpu->device.major,
           gpu->device.minor);
  return text;
}

attn_status attn_device_synchronize(attn_device device) {
  if (!attn_is_cuda(device)) return ATTN_OK;
  attn_gpu *gpu = attn_gpu_open(device.index);
  if (!gpu) return ATTN_UNSUPPORTED;
  ATTN_TRY(refuse_in_capture(gpu, "waiting"));
  return attn_gpu_check(gpu, gpu->cuda->synchronize(device.index, attn_gpu_stream(gpu)));
}

/* Memory ----------------------------------------------------------------------------------------
 */

void *attn_device_alloc(attn_device device, size_t bytes) {
  if (!attn_is_cuda(device)) return attn_alloc(bytes);
  attn_gpu *gpu = attn_gpu_open(device.index);
  void *memory = NULL;
  if (!gpu || refuse_in_capture(gpu, "taking memory") != ATTN_OK) return NULL;
  attn_status status = gpu->cuda->allocate(device.index, bytes, &memory, attn_gpu_stream(gpu));
  return attn_gpu_check(gpu, status) == ATTN_OK ? memory : NULL;
}

void attn_device_free(attn_device device, void *memory) {
  if (!attn_is_cuda(device)) {
    attn_free(memory);
    return;
  }
  attn_gpu *gpu = memory ? attn_gpu_open(device.index) : NULL;
  if (gpu) (void)gpu->cuda->release(device.index, memory, attn_gpu_stream(gpu));
}

static attn_memory_stats memory_of(attn_device device) {
  if (!attn_is_cuda(device)) return attn_memory_get_stats();
  attn_memory_stats stats = {0};
  attn_gpu *gpu = attn_gpu_open(device.index);
  if (gpu) (void)gpu->cuda->memory_use(device.index, &stats.live_bytes, &stats.peak_bytes);
  return stats;
}

size_t attn_device_live_bytes(attn_device device) {
  return memory_of(device).live_bytes;
}

size_t attn_device_peak_bytes(attn_device device) {
  return memory_of(device).peak_bytes;
}

void attn_device_reset_peak(attn_device device) {
  if (!attn_is_cuda(device)) {
    attn_memory_reset_peak();
    return;
  }
  attn_gpu *gpu = attn_gpu_open(device.index);
  if (gpu) (void)gpu->cuda->memory_reset_peak(device.index);
}

attn_status attn_device_zero(attn_device device, void *memory, size_t bytes) {
  if (!attn_is_cuda(device)) {
    memset(memory, 0, bytes);
    return ATTN_OK;
  }
  attn_gpu *gpu = attn_gpu_open(device.index);
  if (!gpu) return ATTN_UNSUPPORTED;
  return attn_gpu_check(gpu, gpu->cuda->zero(device.index, memory, bytes, attn_gpu_stream(gpu)));
}

attn_status attn_device_copy(attn_device device, void *to, const void *from, size_t bytes) {
  if (!attn_is_cuda(device)) {
    memmove(to, from, bytes);
    return ATTN_OK;
  }
  attn_gpu *gpu = attn_gpu_open(device.index);
  if (!gpu) return ATTN_UNSUPPORTED;
  return attn_gpu_check(gpu, gpu->cuda->copy(device.index, to, from, bytes, attn_gpu_stream(gpu)));
}

attn_status attn_device_copy_rows(attn_device device, void *to, size_t to_step, const void *from,
                                  size_t from_step, size_t bytes, size_t rows) {
  if (!attn_is_cuda(device)) {
    for (size_t r = 0; r < rows; ++r)
      memcpy((char *)to + r * to_step, (const char *)from + r * from_step, bytes);
    return ATTN_OK;
  }
  attn_gpu *gpu = attn_gpu_open(device.index);
  if (!gpu) return ATTN_UNSUPPORTED;
  return attn_gpu_check(gpu, gpu->cuda->copy_rows(device.index, to, to_step, from, from_step, bytes,
                                                  rows, attn_gpu_stream(gpu)));
}

void *attn_gpu_take_scratch(attn_gpu *gpu, size_t bytes) {
  attn_device device = {ATTN_CUDA, gpu->device.index};
  pthread_mutex_lock(&scratch_lock);
  if (refuse_in_capture(gpu, "scratch") != ATTN_OK) return NULL;
  if (bytes > gpu->scratch_bytes) {
    attn_device_free(device, gpu->scratch);
    gpu->scratch = attn_device_alloc(device, bytes);
    gpu->scratch_bytes = gpu->scratch ? bytes : 0;
  }
  return gpu->scratch;
}

void attn_gpu_give_scratch(attn_gpu *gpu) {
  (void)gpu;
  pthread_mutex_unlock(&scratch_lock);
}

static void *take_from_device(void *context, size_t size) {
  attn_gpu *gpu = context;
  return attn_device_alloc((attn_device){ATTN_CUDA, gpu->device.index}, size);
}

static void give_to_device(void *context, void *memory) {
  attn_gpu *gpu = context;
  attn_device_free((attn_device){ATTN_CUDA, gpu->device.index}, memory);
}

attn_arena *attn_device_arena(attn_device device, size_t first_chunk) {
  if (!attn_is_cuda(device)) return attn_arena_create(first_chunk);
  attn_gpu *gpu = attn_gpu_open(device.index);
  if (!gpu) return NULL;
  return attn_arena_create_from(first_chunk, (attn_arena_source){.take = take_from_device,
                                                                 .give = give_to_device,
                                                                 .context = gpu,
                                                                 .alignment = DEVICE_ALIGNMENT,
                                                                 .largest_chunk = LARGEST_CHUNK});
}

attn_status attn_tensor_create_on(attn_device device, attn_dtype dtype, int rank,
                                  const int64_t *shape, attn_tensor *tensor) {
  if (!attn_is_cuda(device)) return attn_tensor_create(dtype, rank, shape, tensor);
  attn_tensor made;
  ATTN_TRY(attn_tensor_wrap(NULL, dtype, rank, shape, &made));
  made.device = device;
  size_t bytes = (size_t)attn_tensor_count(&made) * attn_dtype_size(dtype);
  made.data = attn_device_alloc(device, bytes);
  if (!made.data) return ATTN_OUT_OF_MEMORY;
  *tensor = made;
  return attn_device_zero(device, made.data, bytes);
}
