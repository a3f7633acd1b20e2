/* The recurrent engine on bfloat16: products of bfloat16, everything else float32. */
#define ELEM                 uint16_t
#define REAL                 float
#define SAME_TYPE            0
#define STORE                uint16_t
#define STORE_IS_ELEM        1
#define CALL_STORE           CALL
#define CALL(name, ...)      u->kernels->name##_bf16(__VA_ARGS__)
#define CALL_REAL(name, ...) u->kernels->name##_f32(__VA_ARGS__)
#define ARGS(name)           name##_bf16
#define ARGSR(name)          name##_f32
#define WORK                 attn_recurrent_work_bf16
#include "engines/recurrent/typed.inc"
