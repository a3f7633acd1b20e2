#include "kernels/kernels.h"

void attn_generic_matvec_f32(int64_t rows, int64_t outputs, int64_t inputs, const float *x,
                             int64_t ldx, const float *w, int64_t ldw, float *y, int64_t ldy) {
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t r = 0; r < rows; ++r) {
      float sum = 0;
      for (int64_t i = 0; i < inputs; ++i) sum += x[r * ldx + i] * w[o * ldw + i];
      y[r * ldy + o] = sum;
    }
}

void attn_generic_matvec_bf16(int64_t rows, int64_t outputs, int64_t inputs, const float *x,
                              int64_t ldx, const uint16_t *w, int64_t ldw, float *y, int64_t ldy) {
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t r = 0; r < rows; ++r) {
      float sum = 0;
      for (int64_t i = 0; i < inputs; ++i) sum += x[r * ldx + i] * attn_bf16_to_f32(w[o * ldw + i]);
      y[r * ldy + o] = sum;
    }
}
