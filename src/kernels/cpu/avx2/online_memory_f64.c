#define PATH(name) attn_avx2_##name
#include "kernels/cpu/online_memory_f64.inc"
