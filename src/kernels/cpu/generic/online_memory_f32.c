#define PATH(name) attn_generic_##name
#include "kernels/cpu/online_memory_f32.inc"
