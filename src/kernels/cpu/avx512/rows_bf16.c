/* The row kernels that training spends its time in, where rows are bfloat16, with the conversion
 * instructions of AVX512-BF16: SiLU and identity as activation and gate, RMSNorm, sums. What is not
 * here goes to the portable kernels (rows.inc), which say what each computes.
 *
 * Sixteen numbers pass through registers from load to store, one loop a kernel. The conversions
 * take results below the least normal number as zero; sums, which also copy, round exactly. */
#include "kernels/kernels.h"

#include <immintrin.h>
#include <math.h>

#define INLINE static inline __attribute__((always_inline))

enum { LANE = 16 };

INLINE __mmask16 first_lanes(int64_t count) {
  return (__mmask16)(count >= LANE ? 0xffff : (1 << count) - 1);
}

INLINE __m512 widen(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

INLINE __m512 load_narrow(const void *row, int64_t i, __mmask16 lanes) {
  return widen(_mm256_maskz_loadu_epi16(lanes, (const uint16_t *)row + i));
}

INLINE __m512 load_wide(const void *row, int64_t i, __mmask16 lanes) {
  return _mm512_maskz_loadu_ps(lanes, (const float *)row + i);
}

INLINE __m512 load(attn_span row, bool is_narrow, int64_t i, __mmask16 lanes) {
  return is_narrow ? load_narrow(row.data, i, lanes) : load_wide(row.data, i, lanes);
}

INLINE void store_narrow(void *row, int64_t i, __mmask16 lanes, __m512 x) {
  _mm256_mask_storeu_epi16((uint16_t *)row + i, lanes, (__m256i)_mm512_cvtneps_pbh(x));
}

static bool is_narrow(attn_span span) {
  return span.data && span.dtype == ATTN_BF16;
}

static bool is_wide(attn_span span) {
  return span.data && span.dtype == ATTN_F32;
}

/* 1 / (1 + e^-x). The exponential errs by 3e-6, far below the rounding of the result; 14 bits of
 * the reciprocal become 28 by one step of Newton's method. Clamping keeps NaN (the second operand).
 */
INLINE __m512 sigmoid(__m512 x) {
  __m512 one = _mm512_set1_ps(1), y = _mm512_sub_ps(_mm512_setzero_ps(), x);
  y = _mm512_min_ps(_mm512_set1_ps(87), _mm512_max_ps(_mm512_set1_ps(-87), y));
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(y, _mm512_set1_ps(1.44269504f)),
                                  _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.69314718f), y);
  __m512 p = _mm512_set1_ps(1.0f / 120);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, one);
  p = _mm512_fmadd_ps(p, r, one);
  __m512 d = _mm512_add_ps(one, _mm512_scalef_ps(p, n));
  __m512 guess = _mm512_rcp14_ps(d);
  return _mm512_mul_ps(guess, _mm512_fnmadd_ps(d, guess, _mm512_set1_ps(2)));
}

/* f and its slope; `silu` is a constant where this is used: else the identity. */
INLINE __m512 value_of(bool silu, __m512 x) {
  return silu ? _mm512_mul_ps(x, sigmoid(x)) : x;
}

INLINE __m512 slope_of(bool silu, __m512 x, __m512 *value) {
  *value = x;
  if (!silu) return _mm512_set1_ps(1);
  __m512 s = sigmoid(x);
  *value = _mm512_mul_ps(x, s);
  return _mm512_fnmadd_ps(*value, s, _mm512_add_ps(*value, s)); /* s + v - v s */
}

INLINE void activate(bool silu, attn_span y, attn_span x, int64_t n) {
  for (int64_t i = 0; i < n; i += LANE) {
    __mmask16 lanes = first_lanes(n - i);
    store_narrow(y.data, i, lanes, value_of(silu, load_narrow(x.data, i, lanes)));
  }
}

INLINE void activate_backward(bool silu, attn_span dx, attn_span x, attn_span dy, int64_t n) {
  for (int64_t i = 0; i < n; i += LANE) {
    __mmask16 lanes = first_lanes(n - i);
    __m512 value, slope = slope_of(silu, load_narrow(x.data, i, lanes), &value);
    store_narrow(dx.data, i, lanes, _mm512_mul_ps(slope, load_narrow(dy.data, i, lanes)));
  }
}

INLINE void gate(bool silu, attn_span y, attn_span a, attn_span b, int64_t n) {
  for (int64_t i = 0; i < n; i += LANE) {
    __mmask16 lanes = first_lanes(n - i);
    __m512 value = value_of(silu, load_narrow(a.data, i, lanes));
    store_narrow(y.data, i, lanes, _mm512_mul_ps(value, load_narrow(b.data, i, lanes)));
  }
}

INLINE void gate_backward(bool silu, attn_span da, attn_span db, attn_span a, attn_span b,
                          attn_span dy, int64_t n) {
  for (int64_t i = 0; i < n; i += LANE) {
    __mmask16 lanes = first_lanes(n - i);
    __m512 upstream = load_narrow(dy.data, i, lanes), factor = load_narrow(b.data, i, lanes);
    __m512 value, slope = slope_of(silu, load_narrow(a.data, i, lanes), &value);
    if (da.data)
      store_narrow(da.data, i, lanes, _mm512_mul_ps(slope, _mm512_mul_ps(factor, upstream)));
    if (db.data) store_narrow(db.data, i, lanes, _mm512_mul_ps(value, upstream));
  }
}

static bool has_own_loop(attn_activation f) {
  return f == ATTN_SILU || f == ATTN_IDENTITY;
}

void attn_avx512bf16_row_activate(attn_activation f, attn_span y, attn_span x, int64_t n) {
  if (!has_own_loop(f) || !is_narrow(y) || !is_narrow(x))
    attn_avx512_row_activate(f, y, x, n);
  else if (f == ATTN_SILU)
    activate(true, y, x, n);
  else
    activate(false, y, x, n);
}

void attn_avx512bf16_row_activate_backward(attn_activation f, attn_span dx, bool accumulate,
                                           attn_span x, attn_span dy, int64_t n) {
  if (!has_own_loop(f) || accumulate || !is_narrow(dx) || !is_narrow(x) || !is_narrow(dy))
    attn_avx512_row_activate_backward(f, dx, accumulate, x, dy, n);
  else if (f == ATTN_SILU)
    activate_backward(true, dx, x, dy, n);
  else
    activate_backward(false, dx, x, dy, n);
}

void attn_avx512bf16_row_gate(attn_activation f, attn_span y, attn_span a, attn_span b, int64_t n) {
  if (!has_own_loop(f) || !is_narrow(y) || !is_narrow(a) || !is_narrow(b))
    attn_avx512_row_gate(f, y, a, b, n);
  else if (f == ATTN_SILU)
    gate(true, y, a, b, n);
  else
    gate(false, y, a, b, n);
}

void attn_avx512bf16_row_gate_backward(attn_activation f, attn_span da, bool accumulate_a,
                                       attn_span db, bool accumulate_b, attn_span a, attn_span b,
                                       attn_span dy, int64_t n) {
  bool overwrites_a = !da.data || (is_narrow(da) && !accumulate_a);
  bool overwrites_b = !db.data || (is_narrow(db) && !accumulate_b);
  bool narrow = is_narrow(a) && is_narrow(b) && is_narrow(dy);
  if (!has_own_loop(f) || !overwrites_a || !overwrites_b || !narrow)
    attn_avx512_row_gate_backward(f, da, accumulate_a, db, accumulate_b, a, b, dy, n);
  else if (f == ATTN_SILU)
    gate_backward(true, da, db, a, b, dy, n);
  else
    gate_backward(false, da, db, a, b, dy, n);
}

INLINE double rms_norm(bool narrow, attn_span y, attn_span x, const float *weight, int64_t n,
                       double divisor, double epsilon) {
  __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t i = 0; i < n; i += 2 * LANE)
    for (int j = 0; j < 2; ++j) {
      __mmask16 lanes = i + j * LANE < n ? first_lanes(n - i - j * LANE) : 0;
      __m512 u = load(x, narrow, i + j * LANE, lanes);
      sum[j] = _mm512_fmadd_ps(u, u, sum[j]);
    }
  double squares = (double)_mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
  double r = 1 / sqrt(squares / divisor + epsilon);
  __m512 factor = _mm512_set1_ps((float)r);
  for (int64_t i = 0; i < n; i += LANE) {
    __mmask16 lanes = first_lanes(n - i);
    __m512 u = _mm512_mul_ps(factor, load(x, narrow, i, lanes));
    if (weight) u = _mm512_mul_ps(u, load_wide(weight, i, lanes));
    store_narrow(y.data, i, lanes, u);
  }
  return r;
}

double attn_avx512bf16_row_rms_norm(attn_span y, attn_span x, attn_span weight, int64_t n,
                                    double divisor, double epsilon) {
  bool known = is_narrow(y) && (is_narrow(x) || is_wide(x)) && (!weight.data || is_wide(weight));
  if (!known) return attn_avx512_row_rms_norm(y, x, weight, n, divisor, epsilon);
  return is_narrow(x) ? rms_norm(true, y, x, weight.data, n, divisor, epsilon)
                      : rms_norm(false, y, x, weight.data, n, divisor, epsilon);
}

/* x and dx are both narrow, or both wide; dy is narrow. */
INLINE void rms_norm_backward(bool narrow, attn_span dx, bool accumulate, float *d_weight,
                              attn_span x, const float *weight, attn_span dy, int64_t n,
                              double divisor, double r) {
  __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t i = 0; i < n; i += 2 * LANE)
    for (int j = 0; j < 2; ++j) {
      int64_t at = i + j * LANE;
      __mmask16 lanes = at < n ? first_lanes(n - at) : 0;
      __m512 u = load_narrow(dy.data, at, lanes);
      if (weight) u = _mm512_mul_ps(u, load_wide(weight, at, lanes));
      sum[j] = _mm512_fmadd_ps(u, load(x, narrow, at, lanes), sum[j]);
    }
  double projection = (double)_mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
  __m512 factor = _mm512_set1_ps((float)r);
  __m512 pull = _mm512_set1_ps((float)(r * r * r * projection / divisor));
  for (int64_t i = 0; i < n; i += LANE) {
    __mmask16 lanes = first_lanes(n - i);
    __m512 u = load(x, narrow, i, lanes);
    __m512 scaled = _mm512_mul_ps(factor, load_narrow(dy.data, i, lanes));
    if (d_weight)
      _mm512_mask_storeu_ps(d_weight + i, lanes,
                            _mm512_fmadd_ps(u, scaled, load_wide(d_weight, i, lanes)));
    if (!dx.data) continue;
    if (weight) scaled = _mm512_mul_ps(scaled, load_wide(weight, i, lanes));
    __m512 out = _mm512_fnmadd_ps(pull, u, scaled);
    if (accumulate) out = _mm512_add_ps(out, load(dx, narrow, i, lanes));
    if (narrow)
      store_narrow(dx.data, i, lanes, out);
    else
      _mm512_mask_storeu_ps((float *)dx.data + i, lanes, out);
  }
}

void attn_avx512bf16_row_rms_norm_backward(attn_span dx, bool accumulate, attn_span d_weight,
                                           attn_span x, attn_span weight, attn_span dy, int64_t n,
                                           double divisor, double r) {
  bool affine = (!weight.data || is_wide(weight)) && (!d_weight.data || is_wide(d_weight));
  bool narrow = is_narrow(x) && (!dx.data || is_narrow(dx));
  bool wide = is_wide(x) && (!dx.data || is_wide(dx));
  if (!affine || !is_narrow(dy) || (!narrow && !wide))
    attn_avx512_row_rms_norm_backward(dx, accumulate, d_weight, x, weight, dy, n, divisor, r);
  else if (narrow)
    rms_norm_backward(true, dx, accumulate, d_weight.data, x, weight.data, dy, n, divisor, r);
  else
    rms_norm_backward(false, dx, accumulate, d_weight.data, x, weight.data, dy, n, divisor, r);
}

/* To nearest even, exactly: adds just under half of the last kept bit, and the rest of it when that
 * bit is odd. A NaN keeps its upper half and is made quiet. */
INLINE __m256i round_exactly(__m512 x) {
  __m512i bits = _mm512_castps_si512(x), upper = _mm512_srli_epi32(bits, 16);
  __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
  __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  sum = _mm512_srli_epi32(sum, 16);
  return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(sum, nan, upper, _mm512_set1_epi32(0x40)));
}

void attn_avx512bf16_row_add(attn_span y, double alpha, attn_span a, double beta, attn_span b,
                             int64_t n) {
  bool known = (is_narrow(y) || is_wide(y)) && (is_narrow(a) || is_wide(a)) &&
               (!b.data || is_narrow(b) || is_wide(b));
  if (!known) {
    attn_avx512_row_add(y, alpha, a, beta, b, n);
    return;
  }
  bool narrow_y = is_narrow(y), narrow_a = is_narrow(a), narrow_b = is_narrow(b);
  __m512 p = _mm512_set1_ps((float)alpha), q = _mm512_set1_ps((float)beta);
  for (int64_t i = 0; i < n; i += LANE) {
    __mmask16 lanes = first_lanes(n - i);
    __m512 sum = _mm512_mul_ps(p, load(a, narrow_a, i, lanes));
    if (b.data) sum = _mm512_fmadd_ps(q, load(b, narrow_b, i, lanes), sum);
    if (narrow_y)
      _mm256_mask_storeu_epi16((uint16_t *)y.data + i, lanes, round_exactly(sum));
    else
      _mm512_mask_storeu_ps((float *)y.data + i, lanes, sum);
  }
}
