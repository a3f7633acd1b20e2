#include "kernels/kernels.h"

#include <immintrin.h>

/* VCVTNE2PS2BF16 rounds 32 numbers at once, but takes subnormal numbers for zeros: blocks that have
 * one (they are rare) go to the exact kernel. */
void attn_avx512bf16_f32_to_bf16(uint16_t *target, const float *source, int64_t count) {
  enum { LANES = 16, SUBNORMAL = 0x20 };
  int64_t i = 0;
  for (; i + 2 * LANES <= count; i += 2 * LANES) {
    __m512 low = _mm512_loadu_ps(source + i), high = _mm512_loadu_ps(source + i + LANES);
    __mmask16 tiny =
        _mm512_fpclass_ps_mask(low, SUBNORMAL) | _mm512_fpclass_ps_mask(high, SUBNORMAL);
    if (__builtin_expect(tiny != 0, 0)) {
      attn_avx512_f32_to_bf16(target + i, source + i, 2 * LANES);
    } else {
      __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
      _mm512_storeu_si512(target + i, (__m512i)rounded);
    }
  }
  attn_avx512_f32_to_bf16(target + i, source + i, count - i);
}
