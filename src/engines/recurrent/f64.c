/* The recurrent engine on float64. */
#define ELEM                 double
#define REAL                 double
#define SAME_TYPE            1
#define STORE                double
#define STORE_IS_ELEM        1
#define CALL_STORE           CALL
#define CALL(name, ...)      u->kernels->name##_f64(__VA_ARGS__)
#define CALL_REAL(name, ...) u->kernels->name##_f64(__VA_ARGS__)
#define ARGS(name)           name##_f64
#define ARGSR(name)          name##_f64
#define WORK                 attn_recurrent_work_f64
#include "engines/recurrent/typed.inc"
