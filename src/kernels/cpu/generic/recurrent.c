#define KERNEL(name) attn_generic_##name
#include "kernels/cpu/recurrent.inc"
