/* The recurrent engine on bfloat16 with products of float32, for machines without bfloat16 tiles:
 * there float32 multiplies faster (VDPBF16PS against float32 FMA: docs/performance-log.md). */
#define ELEM                  float
#define REAL                  float
#define SAME_TYPE             1
#define STORE                 uint16_t
#define STORE_IS_ELEM         0
#define CALL(name, ...)       u->kernels->name##_f32(__VA_ARGS__)
#define CALL_REAL(name, ...)  u->kernels->name##_f32(__VA_ARGS__)
#define CALL_STORE(name, ...) u->kernels->name##_bf16(__VA_ARGS__)
#define ARGS(name)            name##_f32
#define ARGSR(name)           name##_f32
#define WORK                  attn_recurrent_work_bf16_wide
#include "engines/recurrent/typed.inc"
