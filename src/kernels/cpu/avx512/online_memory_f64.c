#define PATH(name) attn_avx512_##name
#include "kernels/cpu/online_memory_f64.inc"
