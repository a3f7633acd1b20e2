/* Legendre memory units as LMUFormer has them (arXiv 2402.04882): a fixed linear system keeps the
 * last theta values of a few projections, as coefficients of Legendre polynomials.
 *
 *   u_t = relu(W_u x_t + b_u), one number a head (the paper: one head)
 *   m_t = Abar m_{t-1} + Bbar u_t for each head, memory_dim numbers (graph/legendre.c)
 *   h_t = relu(W_h [m_t; x_t] + b_h),  y_t = W_o h_t + b_o
 *
 * The projection behind h is the block's pointwise convolution; its BatchNorm belongs to the host.
 */
#include "base/status.h"
#include "graph/operations.h"
#include "mixers/mixer.h"
#include "mixers/shared/legendre.h"

enum { U, U_BIAS, H, H_BIAS, O, O_BIAS };
enum { MEMORY };

static attn_status configure(attn_mixer_options *o) {
  return attn_legendre_configure(o, "lmu");
}

static int parameters(const attn_mixer_options *o, attn_parameter_shape *shapes) {
  int64_t inputs = o->heads * o->memory_dim + o->hidden;
  attn_legendre_affine(shapes + U, "u_proj.weight", "u_proj.bias", o->heads, o->hidden);
  attn_legendre_affine(shapes + H, "h_proj.weight", "h_proj.bias", o->hidden, inputs);
  attn_legendre_affine(shapes + O, "o_proj.weight", "o_proj.bias", o->hidden, o->hidden);
  return O_BIAS + 1;
}

static int state(const attn_mixer_options *o, attn_dtype compute, attn_state_part *parts) {
  parts[MEMORY] = attn_legendre_state(o, compute);
  return 1;
}

static attn_var *memory(attn_graph *g, const attn_mixer_call *call, attn_var *const *in,
                        int which) {
  (void)which;
  return attn_legendre_memory(g, call, in[0], MEMORY);
}

static attn_var *apply(attn_graph *g, const attn_mixer_call *call, attn_var *x) {
  attn_var *u = attn_op_activate_wide(g, ATTN_RELU, attn_legendre_apply(g, call, x, U));
  attn_var *m = attn_mixer_each(g, call, memory, 0, 1, &u);
  attn_var *both = attn_op_concatenate(g, m, x, g->compute);
  attn_var *h = attn_op_activate(g, ATTN_RELU, attn_legendre_apply(g, call, both, H));
  return attn_op_add_bias(g, attn_op_linear(g, h, call->parameters[O]),
                          attn_mixer_parameter(g, call, O_BIAS));
}

const attn_mixer attn_mixer_lmu = {
    .info = {.name = "lmu",
             .title = "LMUFormer: Low Complexity Yet Powerful Spiking Model With Legendre Memory "
                      "Units",
             .arxiv = "2402.04882",
             .abilities = ATTN_ABILITY_CAUSAL | ATTN_ABILITY_DECODE | ATTN_ABILITY_RAGGED |
                          ATTN_ABILITY_TRAINABLE,
             .summary = "a fixed linear memory of a projection's last values, in Legendre "
                        "polynomials"},
    .configure = configure,
    .parameters = parameters,
    .state = state,
    .apply = apply,
};
