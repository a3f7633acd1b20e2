/* The recurrent engine on float32. */
#define ELEM                 float
#define REAL                 float
#define SAME_TYPE            1
#define STORE                float
#define STORE_IS_ELEM        1
#define CALL_STORE           CALL
#define CALL(name, ...)      u->kernels->name##_f32(__VA_ARGS__)
#define CALL_REAL(name, ...) u->kernels->name##_f32(__VA_ARGS__)
#define ARGS(name)           name##_f32
#define ARGSR(name)          name##_f32
#define WORK                 attn_recurrent_work_f32
#include "engines/recurrent/typed.inc"
