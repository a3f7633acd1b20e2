/* DeltaNet (arXiv 2406.06484; the rule: 2102.11174).
 *
 *   q, k = L2norm(silu(conv(x W^T))), v = silu(conv(x Wv^T)), beta = sigmoid(x Wb^T)
 *   S_t = S_{t-1} + k_t beta_t (v_t - S_{t-1}^T k_t)^T,  o_t = S_t^T q_t / sqrt(dim)
 *   y = RMSNorm_head(o) Wo^T */
#include "base/status.h"
#include "graph/operations.h"
#include "mixers/shared/delta.h"

#include <math.h>

static attn_status configure(attn_mixer_options *o) {
  const int64_t usual_dim = 128;
  ATTN_TRY(attn_mixer_check_options(o, "delta_net"));
  if (!o->heads && !o->dim && o->hidden % usual_dim == 0) o->dim = usual_dim;
  return attn_delta_configure(o, "delta_net");
}

static attn_var *apply(attn_graph *g, const attn_mixer_call *call, attn_var *x) {
  attn_delta_inputs in = attn_delta_project(g, call, x);
  attn_recurrent_problem problem = ATTN_RECURRENT_PROBLEM_INIT;
  problem.update = ATTN_UPDATE_DELTA;
  problem.scale = 1 / sqrt((double)call->options->dim);
  attn_var *out =
      attn_mixer_recurrent(g, call, ATTN_DELTA_MATRIX, &problem, in.q, in.k, in.v, NULL, in.beta);
  return attn_op_linear(g, attn_delta_normalise(g, call, out), call->parameters[ATTN_DELTA_OUT]);
}

const attn_mixer attn_mixer_delta_net = {
    .info = {.name = "delta_net",
             .title = "Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
             .arxiv = "2406.06484",
             .abilities = ATTN_ABILITY_CAUSAL | ATTN_ABILITY_DECODE | ATTN_ABILITY_RAGGED |
                          ATTN_ABILITY_TRAINABLE,
             .summary = "linear attention whose writes correct what the key already recalls"},
    .configure = configure,
    .parameters = attn_delta_parameters,
    .state = attn_delta_state,
    .apply = apply,
};
