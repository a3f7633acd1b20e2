/* Titans: the memory is a network that takes a gradient step with momentum at every token
 * (arXiv 2501.00663).
 *
 *   S_t = theta_t S_{t-1} - eta_t grad ||M(k_t) - v_t||^2,  M_t = alpha_t M_{t-1} + S_t
 *
 * In the terms of mixers/shared/online_memory.h: c = 1, no features, eta there 1 and NS the
 * identity; the step eta_t of the paper is gamma_t there, and its 1 - alpha_t is alpha_t. Chunks of
 * tokens take their gradients at the memory that the chunk began with. */
#include "mixers/shared/online_memory.h"

static const attn_online_mixer kind = {
    .name = "titans", .memory = ATTN_MEMORY_MLP, .windowed = false, .orthogonal = false};

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

const attn_mixer attn_mixer_titans = {
    .info = {.name = "titans",
             .title = "Titans: Learning to Memorize at Test Time",
             .arxiv = "2501.00663",
             .abilities = ATTN_ABILITY_CAUSAL | ATTN_ABILITY_DECODE | ATTN_ABILITY_RAGGED |
                          ATTN_ABILITY_TRAINABLE,
             .summary =
                 "a network learns to recall values by gradient steps with momentum, as it reads"},
    .configure = configure,
    .parameters = parameters,
    .state = state,
    .apply = apply,
};
