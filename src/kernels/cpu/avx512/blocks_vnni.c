#define KERNEL(name) attn_avx512vnni_##name
#include "kernels/cpu/block_codes.inc"

/* VPDPBUSD multiplies and adds four neighbours in 32 bits. */
static inline __m256i dot(__m256i p, __m256i q) {
  return _mm256_dpbusd_epi32(_mm256_setzero_si256(), p, q);
}

#include "kernels/cpu/blocks_matvec.inc"
