/* Status codes, messages, threads and the choice of kernels.
 *
 * Every public function of libattn that can fail returns an attn_status. The library never prints,
 * exits or aborts; the message of the last error of the calling thread is kept until the next one.
 */
#ifndef ATTN_BASE_H
#define ATTN_BASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ATTN_VERSION_MAJOR  0
#define ATTN_VERSION_MINOR  1
#define ATTN_VERSION_PATCH  0
#define ATTN_VERSION_STRING "0.1.0"

#if defined(__GNUC__)
#define ATTN_API __attribute__((visibility("default")))
#define ATTN_PRINTF(format_index, first_argument)                                                  \
  __attribute__((format(printf, format_index, first_argument)))
#else
#define ATTN_API
#define ATTN_PRINTF(format_index, first_argument)
#endif

typedef enum attn_status {
  ATTN_OK = 0,
  ATTN_INVALID_ARGUMENT, /* an argument is outside what the function documents */
  ATTN_INVALID_SHAPE,    /* shapes, strides or lengths do not fit together */
  ATTN_UNSUPPORTED,      /* meaningful, but not offered (dtype, device, pass) */
  ATTN_OUT_OF_MEMORY,    /* an allocation failed, or a fixed capacity is used up */
  ATTN_IO_ERROR,         /* reading or writing a file failed */
  ATTN_BAD_FORMAT,       /* a file is malformed, truncated or of a foreign version */
  ATTN_NOT_FOUND,        /* a named thing (file, tensor, mixer) does not exist */
  ATTN_INTERRUPTED,      /* the caller asked to stop */
  ATTN_INTERNAL,         /* a bug in libattn: please report it */
} attn_status;

/* The name of a status code, e.g. "invalid shape". Never NULL. */
ATTN_API const char *attn_status_name(attn_status status);

/* What went wrong in the last failing call of this thread: which argument, what was expected, what
 * was got. Never NULL; "" when nothing has failed. Valid until the thread's next failing call. */
ATTN_API const char *attn_error_message(void);

/* "0.1.0". */
ATTN_API const char *attn_version(void);

/* Threads that the library uses for one call. n >= 1 sets it for the whole process; n = 0 returns
 * to the default, which is OMP_NUM_THREADS or the number of usable processors. */
ATTN_API attn_status attn_set_threads(int n);
ATTN_API int attn_get_threads(void);

/* Kernel paths, slowest first. The best that the machine has is chosen when the library is first
 * used; the environment variable ATTN_KERNELS (generic, avx2, avx512, amx) chooses a lower one. */
typedef enum attn_kernel_path {
  ATTN_PATH_GENERIC = 0, /* portable C */
  ATTN_PATH_AVX2,        /* x86-64 with AVX2, FMA and F16C */
  ATTN_PATH_AVX512,      /* AVX-512 F, BW, VL, DQ; uses BF16 instructions where present */
  ATTN_PATH_AMX,         /* AVX-512 with BF16, and AMX tiles with bfloat16 */
  ATTN_PATH_COUNT
} attn_kernel_path;

ATTN_API const char *attn_kernel_path_name(attn_kernel_path path);
/* Whether this machine and operating system can run the path. */
ATTN_API bool attn_kernel_path_available(attn_kernel_path path);
ATTN_API attn_kernel_path attn_get_kernel_path(void);
/* Selects a path for the whole process; not to be called while another thread is inside the
 * library. ATTN_UNSUPPORTED when the machine lacks it. Plans made before keep their kernels. */
ATTN_API attn_status attn_set_kernel_path(attn_kernel_path path);

/* One line that describes the processor's features as libattn sees them. */
ATTN_API const char *attn_cpu_description(void);

#ifdef __cplusplus
}
#endif
#endif
