#define KERNELS_WITH_F64
#define KERNEL(name) attn_generic_##name
#include "kernels/cpu/softmax.inc"

bool attn_generic_softmax_run_bf16(int64_t keys, int64_t depth, int64_t width, float scale,
                                   const uint16_t *q, int64_t ldq, const uint16_t *k,
                                   int64_t k_panel, const uint16_t *v, int64_t v_panel,
                                   const float *maximum, float *sum, float *o, int64_t ldo) {
  float s[ATTN_RUN_ROWS * ATTN_RUN_KEYS], totals[ATTN_RUN_ROWS];
  uint16_t p[ATTN_RUN_ROWS * ATTN_RUN_KEYS];
  attn_generic_matmul_bf16(ATTN_RUN_ROWS, keys, depth, q, ldq, k, k_panel, s, keys, false);
  for (int r = 0; r < ATTN_RUN_ROWS; ++r) {
    totals[r] = 0;
    for (int64_t j = 0; j < keys; ++j) {
      float weight = exp2f(scale * s[r * keys + j] - maximum[r]);
      totals[r] += weight;
      p[r * keys + j] = attn_f32_to_bf16(weight);
    }
    if (!(totals[r] <= ATTN_RUN_LIMIT)) return false; /* no maximum: infinite weights */
  }
  for (int r = 0; r < ATTN_RUN_ROWS; ++r) sum[r] += totals[r];
  attn_generic_matmul_bf16(ATTN_RUN_ROWS, width, keys, p, keys, v, v_panel, o, ldo, true);
  return true;
}
