#include "base/cpu.h"
#include "attn/base.h"

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static attn_cpu cpu;
static char description[256];
static pthread_once_t once = PTHREAD_ONCE_INIT;

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif

static bool bit(unsigned word, int position) {
  return word >> position & 1u;
}

static uint64_t enabled_state(void) { /* XCR0: which registers the system saves */
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low | (uint64_t)high << 32;
}

static bool request_amx(void) {
#if defined(ATTN_EMULATE_AMX)
  return true;
#elif defined(__linux__)
  enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return false;
#endif
}

static void detect_features(void) {
  unsigned a, b, c, d, max = __get_cpuid_max(0, NULL);
  if (max < 7) return;
  __cpuid(1, a, b, c, d);
  bool osxsave = bit(c, 27), avx = bit(c, 28), fma = bit(c, 12), f16c = bit(c, 29);
  if (!osxsave || !avx) return;
  uint64_t state = enabled_state();
  bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6;
  bool tiles = (state & 0x60000) == 0x60000;
  __cpuid_count(7, 0, a, b, c, d);
  unsigned leaf7_a, leaf7_b, leaf7_c, leaf7_d;
  cpu.avx2 = ymm && bit(b, 5) && fma && f16c;
  cpu.avx512 = cpu.avx2 && zmm && bit(b, 16) && bit(b, 30) && bit(b, 31) && bit(b, 17);
  cpu.avx512_fp16 = cpu.avx512 && bit(d, 23);
  cpu.avx512_vnni = cpu.avx512 && bit(c, 11);
  bool amx = tiles && bit(d, 22) && bit(d, 24) && bit(c, 1); /* and AVX512-VBMI */
#if defined(ATTN_EMULATE_AMX)
  amx = bit(c, 1);
#endif
  __cpuid_count(7, 1, leaf7_a, leaf7_b, leaf7_c, leaf7_d);
  cpu.avx512_bf16 = cpu.avx512 && bit(leaf7_a, 5);
  cpu.amx_bf16 = cpu.avx512_bf16 && amx && request_amx();
  if ((unsigned)__get_cpuid_max(0x80000000u, NULL) >= 0x80000004u) {
    unsigned brand[12];
    for (unsigned i = 0; i < 3; ++i)
      __cpuid(0x80000002u + i, brand[4 * i], brand[4 * i + 1], brand[4 * i + 2], brand[4 * i + 3]);
    memcpy(cpu.name, brand, 48);
  }
}
#else
static void detect_features(void) {
}
#endif

static size_t cache_bytes(int name, size_t fallback) {
  long size = sysconf(name);
  return size > 0 ? (size_t)size : fallback;
}

static void detect(void) {
  snprintf(cpu.name, sizeof cpu.name, "unknown processor");
  detect_features();
  cpu.l1d_bytes = cache_bytes(_SC_LEVEL1_DCACHE_SIZE, 32 << 10);
  cpu.l2_bytes = cache_bytes(_SC_LEVEL2_CACHE_SIZE, 1 << 20);
  cpu.l3_bytes = cache_bytes(_SC_LEVEL3_CACHE_SIZE, 8 << 20);
  snprintf(description, sizeof description, "%s, L1d %zu KiB, L2 %zu KiB, L3 %zu KiB%s%s%s%s%s%s",
           cpu.name, cpu.l1d_bytes >> 10, cpu.l2_bytes >> 10, cpu.l3_bytes >> 10,
           cpu.avx2 ? ", AVX2" : "", cpu.avx512 ? ", AVX-512" : "", cpu.avx512_vnni ? ", VNNI" : "",
           cpu.avx512_bf16 ? ", AVX512-BF16" : "", cpu.avx512_fp16 ? ", AVX512-FP16" : "",
           cpu.amx_bf16 ? ", AMX-BF16" : "");
}

const attn_cpu *attn_cpu_get(void) {
  pthread_once(&once, detect);
  return &cpu;
}

const char *attn_cpu_description(void) {
  attn_cpu_get();
  return description;
}
