#define KERNEL(name) attn_avx512_##name
#include "kernels/cpu/softmax.inc"
