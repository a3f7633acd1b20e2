#define KERNEL(name) attn_avx2_##name
#include "kernels/cpu/softmax.inc"
