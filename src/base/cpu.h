/* What this processor and operating system can run. */
#ifndef ATTN_BASE_CPU_H
#define ATTN_BASE_CPU_H

#include <stdbool.h>
#include <stddef.h>

typedef struct attn_cpu {
  bool avx2;        /* AVX2, FMA and F16C, enabled by the system */
  bool avx512;      /* F, BW, VL and DQ */
  bool avx512_bf16; /* VDPBF16PS and VCVTNE2PS2BF16 */
  bool avx512_vnni; /* VPDPBUSD */
  bool avx512_fp16;
  bool amx_bf16; /* AMX-TILE and AMX-BF16, and the system has granted tile data */
  size_t l1d_bytes, l2_bytes, l3_bytes;
  char name[64];
} attn_cpu;

/* Detected once, thread-safe. Asking for AMX tile data (arch_prctl) is part of it. */
const attn_cpu *attn_cpu_get(void);

#endif
