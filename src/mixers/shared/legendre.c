#include "mixers/shared/legendre.h"
#include "base/status.h"
#include "engines/legendre/legendre.h"
#include "graph/operations.h"

#include <math.h>

attn_status attn_legendre_configure(attn_mixer_options *o, const char *mixer) {
  const double usual_theta = 128; /* the paper's, the length of its inputs */
  ATTN_TRY(attn_mixer_check_options(o, mixer));
  if (!o->heads) o->heads = 1;
  ATTN_TRY(attn_mixer_configure_heads(o, mixer));
  if (o->kv_heads != o->heads)
    return attn_fail(ATTN_INVALID_ARGUMENT, "%s: num_kv_heads must equal num_heads", mixer);
  if (!o->memory_dim) {
    o->memory_dim = o->hidden > o->heads ? o->hidden / o->heads : 1;
    if (o->memory_dim > ATTN_LEGENDRE_MOST) o->memory_dim = ATTN_LEGENDRE_MOST;
  }
  if (o->theta == 0) o->theta = usual_theta;
  if (o->theta < 1)
    return attn_fail(ATTN_INVALID_ARGUMENT, "%s: theta %g is less than one token", mixer, o->theta);
  return ATTN_OK;
}

void attn_legendre_affine(attn_parameter_shape shapes[2], const char *weight, const char *bias,
                          int64_t outputs, int64_t inputs) {
  double bound = 1 / sqrt((double)inputs);
  shapes[0] = attn_matrix(weight, outputs, inputs);
  shapes[0].initial = ATTN_INIT_UNIFORM;
  shapes[0].scale = bound;
  shapes[1] = attn_vector(bias, outputs, ATTN_INIT_UNIFORM, bound);
}

attn_var *attn_legendre_apply(attn_graph *g, const attn_mixer_call *call, attn_var *x, int i) {
  return attn_op_add_bias(g, attn_op_linear_wide(g, x, call->parameters[i]),
                          attn_mixer_parameter(g, call, i + 1));
}

attn_state_part attn_legendre_state(const attn_mixer_options *o, attn_dtype compute) {
  return (attn_state_part){.name = "memory",
                           .dtype = compute == ATTN_F64 ? ATTN_F64 : ATTN_F32,
                           .rank = 2,
                           .shape = {o->heads, o->memory_dim}};
}

attn_var *attn_legendre_memory(attn_graph *g, const attn_mixer_call *call, attn_var *u, int part) {
  const attn_mixer_options *o = call->options;
  if (!call->state)
    return attn_op_legendre_memory(g, &call->layout, u, o->memory_dim, o->theta, NULL);
  attn_tensor past = attn_state_fixed(call->state, part);
  return attn_op_legendre_memory(g, &call->layout, u, o->memory_dim, o->theta, &past);
}
