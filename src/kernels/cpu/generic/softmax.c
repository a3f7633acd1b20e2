#define KERNELS_WITH_F64
#define KERNEL(name) attn_generic_##name
#include "kernels/cpu/softmax.inc"
