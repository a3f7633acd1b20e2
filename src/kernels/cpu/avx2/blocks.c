#define KERNEL(name) attn_avx2_##name
#include "kernels/cpu/round_blocks.inc"

#include "kernels/cpu/block_codes.inc"

/* Neighbouring products fit 16 bits: they are at most 2 * 128 * 127. */
static inline __m256i dot(__m256i p, __m256i q) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(p, q), _mm256_set1_epi16(1));
}

#include "kernels/cpu/blocks_matvec.inc"
#include "kernels/cpu/blocks_to_f32.inc"
