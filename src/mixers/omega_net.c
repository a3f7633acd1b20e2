/* OmegaNet: the memory of Titans learns from the last c tokens at every step, the Omega rule, over
 * polynomial features of queries and keys (arXiv 2505.23735).
 *
 *   S_t = theta_t S_{t-1} + sum_{t - c < i <= t} gamma_i grad ||M(phi(k_i)) - v_i||^2
 *   M_t = alpha_t M_{t-1} - S_t
 *   phi(x): all monomials of degree <= p, phi(x) . phi(y) = sum_j a_j (x . y)^j, a_j learned
 *
 * In the terms of mixers/shared/online_memory.h: eta is 1 and NS the identity. */
#include "mixers/shared/online_memory.h"

static const attn_online_mixer kind = {
    .name = "omega_net", .memory = ATTN_MEMORY_MLP, .windowed = true, .orthogonal = false};

static attn_status configure(attn_mixer_options *o) {
  return attn_online_configure(o, &kind);
}
static int parameters(const attn_mixer_options *o, attn_parameter_shape *shapes) {
  return attn_online_parameters(o, &kind, shapes);
}
static int state(const attn_mixer_options *o, attn_dtype compute, attn_state_part *parts) {
  return attn_online_state(o, &kind, compute, parts);
}
static attn_var *apply(attn_graph *g, const attn_mixer_call *call, attn_var *x) {
  return attn_online_apply(g, call, &kind, x);
}

const attn_mixer attn_mixer_omega_net = {
    .info = {.name = "omega_net",
             .title = "ATLAS: Learning to Optimally Memorize the Context at Test Time",
             .arxiv = "2505.23735",
             .abilities = ATTN_ABILITY_CAUSAL | ATTN_ABILITY_DECODE | ATTN_ABILITY_RAGGED |
                          ATTN_ABILITY_TRAINABLE,
             .summary =
                 "Titans, with the gradient of a window of tokens, over polynomial features"},
    .configure = configure,
    .parameters = parameters,
    .state = state,
    .apply = apply,
};
