/* Chooses the kernel path once and completes each path's table from the slower ones. */
#include "base/cpu.h"
#include "base/status.h"
#include "kernels/kernels.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static attn_kernels tables[ATTN_PATH_COUNT];
static bool available[ATTN_PATH_COUNT];
static _Atomic int current;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static const char *const names[ATTN_PATH_COUNT] = {"generic", "avx2", "avx512", "amx"};

static void do_nothing(void) {
}

/* Puts every kernel that `layer` has over what `table` holds so far. */
static void overlay(attn_kernels *table, const attn_kernels *layer) {
  if (layer->begin) table->begin = layer->begin;
  if (layer->end) table->end = layer->end;
#define OVERLAY(result, name, parameters)                                                          \
  if (layer->name) table->name = layer->name;
  ATTN_KERNEL_LIST(OVERLAY)
#undef OVERLAY
}

static void build_tables(void) {
  attn_kernels table = {.begin = do_nothing, .end = do_nothing};
  overlay(&table, &attn_kernels_generic);
  tables[ATTN_PATH_GENERIC] = table;
  available[ATTN_PATH_GENERIC] = true;
#if defined(__x86_64__)
  const attn_cpu *cpu = attn_cpu_get();
  if (cpu->avx2) {
    overlay(&table, &attn_kernels_avx2);
    tables[ATTN_PATH_AVX2] = table;
    available[ATTN_PATH_AVX2] = true;
  }
  if (cpu->avx512) {
    overlay(&table, &attn_kernels_avx512);
    if (cpu->avx512_vnni) overlay(&table, &attn_kernels_avx512vnni);
    if (cpu->avx512_bf16) overlay(&table, &attn_kernels_avx512bf16);
    tables[ATTN_PATH_AVX512] = table;
    available[ATTN_PATH_AVX512] = true;
  }
  if (cpu->amx_bf16) {
    overlay(&table, &attn_kernels_amx);
    tables[ATTN_PATH_AMX] = table;
    available[ATTN_PATH_AMX] = true;
  }
#endif
  int best = ATTN_PATH_GENERIC;
  for (int path = 0; path < ATTN_PATH_COUNT; ++path) {
    tables[path].path = (attn_kernel_path)path;
    if (available[path]) best = path;
  }
  /* A path that the machine lacks, or an unknown name, leaves the best one: the variable lowers
   * the choice and must never make the library fail. */
  const char *wanted = getenv("ATTN_KERNELS");
  for (int path = 0; wanted && path < ATTN_PATH_COUNT; ++path)
    if (available[path] && strcmp(wanted, names[path]) == 0) best = path;
  atomic_store(&current, best);
}

const attn_kernels *attn_kernels_get(void) {
  pthread_once(&once, build_tables);
  return &tables[atomic_load_explicit(&current, memory_order_relaxed)];
}

const attn_kernels *attn_kernels_of(attn_kernel_path path) {
  pthread_once(&once, build_tables);
  return &tables[path];
}

const char *attn_kernel_path_name(attn_kernel_path path) {
  return (unsigned)path < ATTN_PATH_COUNT ? names[path] : "unknown";
}

bool attn_kernel_path_available(attn_kernel_path path) {
  pthread_once(&once, build_tables);
  return (unsigned)path < ATTN_PATH_COUNT && available[path];
}

attn_kernel_path attn_get_kernel_path(void) {
  return attn_kernels_get()->path;
}

attn_status attn_set_kernel_path(attn_kernel_path path) {
  if ((unsigned)path >= ATTN_PATH_COUNT)
    return attn_fail(ATTN_INVALID_ARGUMENT, "kernel path %d is not one of 0 to %d", (int)path,
                     ATTN_PATH_COUNT - 1);
  if (!attn_kernel_path_available(path))
    return attn_fail(ATTN_UNSUPPORTED, "kernel path %s: this machine has %s", names[path],
                     attn_cpu_description());
  atomic_store(&current, (int)path);
  return ATTN_OK;
}
