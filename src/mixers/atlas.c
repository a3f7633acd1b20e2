/* ATLAS: the Omega rule over polynomial features, with Muon as the inner optimiser: the momentum of
 * each weight matrix is brought near the closest orthogonal matrix before it is a step
 * (arXiv 2505.23735).
 *
 *   S_t = theta_t S_{t-1} + sum_{t - c < i <= t} gamma_i grad ||M(phi(k_i)) - v_i||^2
 *   M_t = alpha_t M_{t-1} - eta_t NS(S_t)
 *
 * See mixers/shared/online_memory.h. The memory is a matrix unless the options say otherwise: five
 * steps of Newton-Schulz cost, at every token, some hundred times what the matrix is read for. */
#include "mixers/shared/online_memory.h"

static const attn_online_mixer kind = {
    .name = "atlas", .memory = ATTN_MEMORY_MATRIX, .windowed = true, .orthogonal = true};

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

const attn_mixer attn_mixer_atlas = {
    .info = {.name = "atlas",
             .title = "ATLAS: Learning to Optimally Memorize the Context at Test Time",
             .arxiv = "2505.23735",
             .abilities = ATTN_ABILITY_CAUSAL | ATTN_ABILITY_DECODE | ATTN_ABILITY_RAGGED |
                          ATTN_ABILITY_TRAINABLE,
             .summary = "OmegaNet whose steps are orthogonalised as in Muon"},
    .configure = configure,
    .parameters = parameters,
    .state = state,
    .apply = apply,
};
