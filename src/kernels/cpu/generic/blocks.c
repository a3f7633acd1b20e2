#define KERNEL(name) attn_generic_##name
#include "kernels/cpu/round_blocks.inc"

#include "tensor/blocks.h"

enum { LARGEST_BLOCK = 256 };

/* As the definition has it, with the weights of a block as float32 numbers. */
static void multiply(attn_block_type type, int64_t rows, int64_t outputs, int64_t inputs,
                     const attn_rounded *x, const void *w, float *y, int64_t ldy) {
  const attn_block_format *format = attn_block_get_format(type);
  const char *block = w;
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t r = 0; r < rows; ++r) y[r * ldy + o] = 0;
    for (int64_t i = 0; i < inputs; i += format->elements, block += format->bytes) {
      float values[LARGEST_BLOCK];
      (void)attn_blocks_to_f32(type, block, values, format->elements); /* cannot fail */
      for (int64_t r = 0; r < rows; ++r)
        for (int e = 0; e < format->elements; ++e) {
          int64_t place = r * x->ld + i + e;
          float scale = x->scale[place / ATTN_ROUNDED_BLOCK];
          y[r * ldy + o] += scale * (float)x->q[place] * values[e];
        }
    }
  }
}

#define DEFINE(name, type)                                                                         \
  void attn_generic_matvec_##name(int64_t rows, int64_t outputs, int64_t inputs,                   \
                                  const attn_rounded *x, const void *w, float *y, int64_t ldy) {   \
    multiply(ATTN_BLOCK_##type, rows, outputs, inputs, x, w, y, ldy);                              \
  }
ATTN_BLOCKS_TYPES(DEFINE)

#define DEFINE_TO_F32(name, type)                                                                  \
  void attn_generic_##name##_to_f32(float *x, const void *blocks, int64_t count) {                 \
    (void)attn_blocks_to_f32(ATTN_BLOCK_##type, blocks, x, count); /* cannot fail */               \
  }
ATTN_BLOCKS_TYPES(DEFINE_TO_F32)
ATTN_BLOCKS_TYPES_TO_F32(DEFINE_TO_F32)
