#define KERNELS_WITH_F64
#define KERNEL(name) attn_generic_##name
#include "kernels/cpu/softmax.inc"

/* One run; false when it is refused. */
static bool do_run(int64_t keys, int64_t depth, int64_t width, float scale, const uint16_t *q,
                   int64_t ldq, const uint16_t *k, int64_t k_panel, const uint16_t *v,
                   int64_t v_panel, const float *maximum, float *sum, float *o, int64_t ldo) {
  float s[ATTN_RUN_ROWS * ATTN_RUN_KEYS], totals[ATTN_RUN_ROWS] = {0};
  uint16_t p[ATTN_RUN_ROWS * ATTN_RUN_KEYS];
  attn_generic_matmul_bf16(ATTN_RUN_ROWS, keys, depth, q, ldq, k, k_panel, s, keys, false);
  for (int r = 0; r < ATTN_RUN_ROWS; ++r)
    for (int64_t j = 0; j < keys; ++j) {
      float logit = scale * s[r * keys + j] - maximum[r];
      if (!(logit <= ATTN_RUN_LIMIT)) return false; /* without a maximum, infinite */
      p[r * keys + j] = attn_f32_to_bf16(exp2f(logit));
      totals[r] += attn_bf16_to_f32(p[r * keys + j]);
    }
  for (int r = 0; r < ATTN_RUN_ROWS; ++r) sum[r] += totals[r];
  attn_generic_matmul_bf16(ATTN_RUN_ROWS, width, keys, p, keys, v, v_panel, o, ldo, true);
  return true;
}

int64_t attn_generic_softmax_run_bf16(int64_t keys, int64_t depth, int64_t width, float scale,
                                      const uint16_t *q, int64_t ldq, const uint16_t *k,
                                      int64_t k_panel, const uint16_t *v, int64_t v_panel,
                                      const float *maximum, float *sum, float *o, int64_t ldo) {
  int64_t done = 0;
  while (done < keys) {
    int64_t run = keys - done < ATTN_RUN_KEYS ? keys - done : ATTN_RUN_KEYS;
    if (!do_run(run, depth, width, scale, q, ldq, k + done / ATTN_PANEL * k_panel, k_panel,
                v + done * ATTN_PANEL, v_panel, maximum, sum, o, ldo))
      break;
    done += run;
  }
  return done;
}

void attn_generic_softmax_grad_run_bf16(int64_t keys, int64_t depth, int64_t width, float scale,
                                        const uint16_t *q, int64_t ldq, const uint16_t *k,
                                        int64_t k_panel, const uint16_t *d_o, int64_t ldo,
                                        const uint16_t *v, int64_t v_panel, const float *lse2,
                                        const float *delta, uint16_t *p, uint16_t *d_s,
                                        int64_t panel, uint16_t *rows, int64_t ld) {
  enum { STEP = ATTN_BF16_DEPTH };
  float s[ATTN_RUN_ROWS * STEP], d_p[ATTN_RUN_ROWS * STEP];
  uint16_t weights[ATTN_RUN_ROWS * STEP];
  for (int64_t j = 0; j < keys; j += STEP) {
    int64_t at = j / ATTN_PANEL;
    attn_generic_matmul_bf16(ATTN_RUN_ROWS, STEP, depth, q, ldq, k + at * k_panel, k_panel, s, STEP,
                             false);
    attn_generic_matmul_bf16(ATTN_RUN_ROWS, STEP, width, d_o, ldo, v + at * v_panel, v_panel, d_p,
                             STEP, false);
    for (int r = 0; r < ATTN_RUN_ROWS; ++r)
      for (int c = 0; c < STEP; ++c) {
        float weight = exp2f(scale * s[r * STEP + c] - lse2[r]);
        weights[r * STEP + c] = attn_f32_to_bf16(weight);
        rows[r * ld + j + c] = attn_f32_to_bf16(weight * (d_p[r * STEP + c] - delta[r]));
      }
    attn_generic_pack_bf16(p + at * panel, panel, weights, ATTN_RUN_ROWS, STEP, STEP, 1);
    attn_generic_pack_bf16(d_s + at * panel, panel, rows + j, ATTN_RUN_ROWS, STEP, ld, 1);
  }
}
