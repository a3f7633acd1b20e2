/* The Legendre memory unit of spiking LMUFormer (arXiv 2402.04882): lmu.c with spikes between its
 * parts. LIF neurons (kernels/spikes.h) step along the sequence, one step a token.
 *
 *   s = LIF(BN(x)), at half the threshold
 *   u = LIF(BN(W_u s + b_u)),  m_t = Abar m_{t-1} + Bbar u_t,  r = LIF(BN(m))
 *   h = LIF(BN(W_h [r; s] + b_h)),  y = BN(W_o h + b_o)
 *
 * One path for whole sequences and for streams, so that r is r in both (the published code leaves
 * LIF(BN(m)) out when it streams). BN is batch_norm.c: with running statistics wherever they are
 * not trained, so that tokens and sequences meet in training only. Potentials, memory and norms are
 * of the wide dtype; spikes are exact in any, and so are the products' inputs. */
#include "base/status.h"
#include "graph/operations.h"
#include "mixers/mixer.h"
#include "mixers/shared/legendre.h"

enum { WEIGHT, BIAS, MEAN, VARIANCE, NORM }; /* of a norm, in a row */
enum { X_NORM, U = X_NORM + NORM, U_BIAS, U_NORM, M_NORM = U_NORM + NORM, H = M_NORM + NORM };
enum { H_BIAS = H + 1, H_NORM, O = H_NORM + NORM, O_BIAS, O_NORM, PARAMETERS = O_NORM + NORM };
/* The state: the memory, and the potentials of each group of neurons. */
enum { MEMORY, X_NEURONS, U_NEURONS, M_NEURONS, H_NEURONS, PARTS };

static attn_status configure(attn_mixer_options *o) {
  const double usual_tau = 2, usual_threshold = 1, usual_epsilon = 1e-5;
  if (o->norm_epsilon == 0) o->norm_epsilon = usual_epsilon;
  ATTN_TRY(attn_legendre_configure(o, "spiking_lmu"));
  if (o->spike_tau == 0) o->spike_tau = usual_tau;
  if (o->spike_threshold == 0) o->spike_threshold = usual_threshold;
  if (o->spike_tau < 1)
    return attn_fail(ATTN_INVALID_ARGUMENT, "spiking_lmu: spike_tau %g is less than one token",
                     o->spike_tau);
  return ATTN_OK;
}

#define NORM_SHAPES(name, n, shapes)                                                               \
  do {                                                                                             \
    (shapes)[WEIGHT] = attn_vector(name ".weight", n, ATTN_INIT_CONSTANT, 1);                      \
    (shapes)[BIAS] = attn_vector(name ".bias", n, ATTN_INIT_CONSTANT, 0);                          \
    (shapes)[MEAN] = attn_statistic(name ".running_mean", n, 0);                                   \
    (shapes)[VARIANCE] = attn_statistic(name ".running_var", n, 1);                                \
  } while (0)

static int parameters(const attn_mixer_options *o, attn_parameter_shape *shapes) {
  int64_t memory = o->heads * o->memory_dim;
  NORM_SHAPES("x_norm", o->hidden, shapes + X_NORM);
  attn_legendre_affine(shapes + U, "u_proj.weight", "u_proj.bias", o->heads, o->hidden);
  NORM_SHAPES("u_norm", o->heads, shapes + U_NORM);
  NORM_SHAPES("m_norm", memory, shapes + M_NORM);
  attn_legendre_affine(shapes + H, "h_proj.weight", "h_proj.bias", o->hidden, memory + o->hidden);
  NORM_SHAPES("h_norm", o->hidden, shapes + H_NORM);
  attn_legendre_affine(shapes + O, "o_proj.weight", "o_proj.bias", o->hidden, o->hidden);
  NORM_SHAPES("o_norm", o->hidden, shapes + O_NORM);
  return PARAMETERS;
}

static attn_state_part potentials(const char *name, attn_dtype compute, int64_t neurons) {
  return (attn_state_part){.name = name,
                           .dtype = compute == ATTN_F64 ? ATTN_F64 : ATTN_F32,
                           .rank = 1,
                           .shape = {neurons}};
}

static int state(const attn_mixer_options *o, attn_dtype compute, attn_state_part *parts) {
  parts[MEMORY] = attn_legendre_state(o, compute);
  parts[X_NEURONS] = potentials("x_potentials", compute, o->hidden);
  parts[U_NEURONS] = potentials("u_potentials", compute, o->heads);
  parts[M_NEURONS] = potentials("m_potentials", compute, o->heads * o->memory_dim);
  parts[H_NEURONS] = potentials("h_potentials", compute, o->hidden);
  return PARTS;
}

/* What touches the state: the memory, and neurons. `which`: the part. */
static attn_var *advance(attn_graph *g, const attn_mixer_call *call, attn_var *const *in,
                         int which) {
  const attn_mixer_options *o = call->options;
  if (which == MEMORY) return attn_legendre_memory(g, call, in[0], MEMORY);
  attn_lif neuron = {.tau = o->spike_tau,
                     .threshold = which == X_NEURONS ? o->spike_threshold / 2 : o->spike_threshold};
  attn_dtype dtype = which == U_NEURONS ? g->wide : g->compute; /* u goes into the memory */
  if (!call->state) return attn_op_lif(g, &call->layout, &neuron, in[0], dtype, NULL);
  attn_tensor past = attn_state_fixed(call->state, which);
  return attn_op_lif(g, &call->layout, &neuron, in[0], dtype, &past);
}

static attn_var *normalised(attn_graph *g, const attn_mixer_call *call, attn_var *x, int norm,
                            attn_dtype dtype) {
  attn_batch_norm running = {.mean = call->parameters[norm + MEAN],
                             .variance = call->parameters[norm + VARIANCE],
                             .epsilon = call->options->norm_epsilon};
  return attn_layer_batch_norm(g, x, attn_mixer_parameter(g, call, norm + WEIGHT),
                               attn_mixer_parameter(g, call, norm + BIAS), &running, dtype);
}

/* LIF(BN(x)) */
static attn_var *fire(attn_graph *g, const attn_mixer_call *call, attn_var *x, int norm,
                      int neurons) {
  attn_var *in = normalised(g, call, x, norm, g->wide);
  return attn_mixer_each(g, call, advance, neurons, 1, &in);
}

static attn_var *apply(attn_graph *g, const attn_mixer_call *call, attn_var *x) {
  attn_var *s = fire(g, call, x, X_NORM, X_NEURONS);
  attn_var *u = fire(g, call, attn_legendre_apply(g, call, s, U), U_NORM, U_NEURONS);
  attn_var *m = attn_mixer_each(g, call, advance, MEMORY, 1, &u);
  attn_var *r = fire(g, call, m, M_NORM, M_NEURONS);
  attn_var *both = attn_op_concatenate(g, r, s, g->compute);
  attn_var *h = fire(g, call, attn_legendre_apply(g, call, both, H), H_NORM, H_NEURONS);
  return normalised(g, call, attn_legendre_apply(g, call, h, O), O_NORM, g->compute);
}

const attn_mixer attn_mixer_spiking_lmu = {
    .info = {.name = "spiking_lmu",
             .title = "LMUFormer: Low Complexity Yet Powerful Spiking Model With Legendre Memory "
                      "Units",
             .arxiv = "2402.04882",
             .abilities = ATTN_ABILITY_CAUSAL | ATTN_ABILITY_DECODE | ATTN_ABILITY_RAGGED |
                          ATTN_ABILITY_TRAINABLE,
             .summary = "a Legendre memory between neurons that fire, with batch norms"},
    .spiking = true,
    .configure = configure,
    .parameters = parameters,
    .state = state,
    .apply = apply,
};
