/* What a mixer is: one table entry, in one file of this folder. docs/mixers.md tells how to add
 * one.
 *
 * A mixer maps x [rows, hidden] to y [rows, hidden]. `apply` is its only way in: without a state it
 * runs whole sequences (training, evaluation); with one it continues from the state and updates it,
 * be it by a thousand tokens (prefill) or by one (decode). */
#ifndef ATTN_MIXERS_MIXER_H
#define ATTN_MIXERS_MIXER_H

#include "attn/mixer.h"
#include "attn/softmax.h"
#include "graph/graph.h"
#include "graph/layout.h"
#include "kernels/online_memory.h"
#include "layers/layers.h"
#include "mixers/shared/state.h"

enum { ATTN_MIXER_PARAMETERS = 32 };

typedef enum attn_decay_schedule {
  ATTN_SCHEDULE_CODE = 0, /* slope = base (1 - l / (L - 1) + 1e-5), base = ALiBi slopes */
  ATTN_SCHEDULE_PAPER,    /* slope = (8 h / H) (1 - l / L) */
} attn_decay_schedule;

/* What makes features of queries and keys; a mixer refuses those that it has not. */
typedef enum attn_feature_map {
  ATTN_FEATURES_DEFAULT = 0, /* the mixer's first */
  ATTN_FEATURES_SOFTMAX, /* hedgehog, lawcat, lolcats: [softmax(y), softmax(-y)], at least 1e-12 */
  ATTN_FEATURES_EXP,     /* hedgehog: [exp(y - max y), exp(min y - y)] */
  ATTN_FEATURES_JOINT,   /* hedgehog: softmax([2 y, -2 y]) */
  ATTN_FEATURES_ELU_PLUS_ONE, /* norm_attention */
  ATTN_FEATURES_ELU,          /* norm_attention */
} attn_feature_map;

/* What LoLCATs' exact attention sees, with w = block. */
typedef enum attn_window_kind {
  ATTN_WINDOW_TERRACE = 0, /* the token's block of w and the one before: the next begins anew */
  ATTN_WINDOW_SLIDING,     /* the last w tokens */
} attn_window_kind;

/* The numbers that a configuration gives for one layer. 0 means the mixer's default, which its
 * `configure` fills in. attn_mixer_check_options has the range of each. */
typedef struct attn_mixer_options {
  int64_t hidden;     /* width of x and y */
  int64_t heads;      /* of queries */
  int64_t kv_heads;   /* of keys and values; heads for MHA, 1 for MQA */
  int64_t dim;        /* of a query or key head */
  int64_t value_dim;  /* of a value head */
  int64_t window;     /* softmax: keys at most window - 1 tokens away are seen; 0: all */
  int64_t rotary_dim; /* channels that rotary embedding turns; -1: none */
  attn_rope rope;     /* of rotary embedding */
  double soft_cap;    /* softmax: of the logits; 0: none */
  double scale;       /* softmax: of the logits; 0: 1 / sqrt(dim) */
  bool bias;          /* softmax, hedgehog, lolcats: q, k and v have biases */
  bool output_bias;   /* softmax, hedgehog, lolcats: and o has */
  bool qk_norm;       /* softmax, hedgehog, lolcats: RMSNorm of every query and key head, before the
                         rotation */
  bool output_gate; /* norm_attention: as in TransNormer v2; softmax: what o takes is multiplied by
                       sigmoid(x Wg^T) */
  bool bidirectional; /* softmax, diag_attention, norm_attention, hedgehog: later tokens are seen
                         too; there is no state */
  bool relu_scores;   /* diag_attention: weights max(0, s), normalised at the output */
  int64_t block;      /* diag_attention: tokens that see each other; the next block begins anew;
                         lolcats: w of its window */
  attn_window_kind window_kind; /* lolcats */
  bool affine;                  /* lolcats: the linear part is multiplied by 1 - gamma */
  bool lrpe;                    /* lightning: LRPE on q and k */
  attn_decay_schedule schedule;
  attn_feature_map feature_map;
  int64_t memory_dim;     /* lmu, spiking_lmu: coefficients of a head's memory */
  double spike_tau;       /* spiking_lmu: time constant of its neurons in tokens, 1 or more */
  double spike_threshold; /* spiking_lmu: at which they fire; the first ones at half of it */
  double theta;           /* lmu, spiking_lmu: tokens that the memory reaches back, 1 or more */
  int64_t feature_dim; /* hedgehog, lawcat, lolcats: outputs of a map's matrix, half the features;
                        * based: channels of a query or key head; omega_net, atlas: of a key before
                        * its features */
  /* titans, omega_net, atlas: memories that learn while they read */
  attn_memory_kind memory;
  int64_t memory_width;   /* of the hidden layer of a deep memory */
  int64_t memory_window;  /* omega_net, atlas: tokens whose gradients a step takes */
  int64_t memory_chunk;   /* tokens whose gradients are taken at one memory */
  int64_t feature_degree; /* omega_net, atlas: of the monomials; feature_dim is of what */
  int64_t newton_schulz;  /* atlas: steps; -1: none */
  int64_t latent_rank;    /* mla: of the latent that keys and values are made of */
  int64_t query_rank;     /* mla: of the queries' latent; 0: there is none */
  int64_t shared_dim;     /* mla: channels of a key that all heads share, beside its own dim */
  int64_t convolution;    /* taps of short convolutions */
  int64_t gate_rank;      /* of low-rank gates */
  bool plain_gate;        /* kda: no bias in the output's gate */
  double norm_epsilon;    /* of norms inside the mixer */
  int64_t layer, layers;  /* which layer of how many: decay schedules depend on it */
} attn_mixer_options;

typedef enum attn_initial {
  ATTN_INIT_NORMAL = 0, /* mean 0, deviation `scale` */
  ATTN_INIT_CONSTANT,   /* `scale` */
  ATTN_INIT_UNIFORM,    /* between -scale and scale */
  ATTN_INIT_LOG_A,      /* log(uniform(1, 16)): decay rates of Gated DeltaNet and KDA */
  ATTN_INIT_DT_BIAS,    /* softplus^-1(dt), dt log-uniform in [0.001, 0.1], at least 1e-4 */
  ATTN_INIT_IDENTITY,   /* matrices of `scale` rows below each other, each 1 on its diagonal */
  ATTN_INIT_LAST_TAP,   /* `scale`, but the last column 1: a convolution that passes its input on */
  ATTN_INIT_INVERSE_FACTORIAL, /* (1 / j!)^scale for element j */
  ATTN_INIT_LRPE,              /* theta_j = 10000^(-2 j / n), j over all elements, n = `scale` */
} attn_initial;

typedef struct attn_parameter_shape {
  const char *name; /* as in model files, below the mixer: "q_proj.weight" */
  int rank;
  int64_t shape[2];
  attn_initial initial;
  double scale;
  bool decay;     /* whether weight decay applies */
  bool statistic; /* a running mean, see attn_parameter */
  bool product;   /* a matrix that rows are multiplied by: it gets a packed form */
} attn_parameter_shape;

/* What `apply` gets besides x. */
typedef struct attn_mixer_call {
  const attn_mixer_options *options;
  attn_parameter **parameters; /* in the order of `parameters` below */
  attn_layout layout;
  attn_state *state; /* NULL without */
  /* A step of several sequences: the layout has one token of each, and these are their states, in
   * place of `state`. NULL otherwise. */
  attn_state *const *states;
  /* Cross-attention: what keys and values are made of, [context_layout.rows, hidden], in place of
   * x; sequence b of x sees all of sequence b of the context. NULL: x sees itself. */
  attn_var *context;
  attn_layout context_layout;
  /* The result is what the output's projection is given, [rows, heads * value_dim]: for training a
   * mixer to do what another does (training/transfer.h). Only for mixers that say `heads`. */
  bool heads;
} attn_mixer_call;

typedef struct attn_mixer {
  attn_mixer_info info;
  bool spiking; /* its neurons fire at thresholds: gradients are surrogates, not derivatives, and a
                 * rounding may make another spike */
  bool heads;   /* apply can stop before the output's projection */
  /* Fills in defaults and refuses what does not fit: ATTN_INVALID_ARGUMENT names the field. */
  attn_status (*configure)(attn_mixer_options *options);
  /* Both return how many they wrote (at most ATTN_MIXER_PARAMETERS, ATTN_STATE_PARTS). */
  int (*parameters)(const attn_mixer_options *options, attn_parameter_shape *shapes);
  int (*state)(const attn_mixer_options *options, attn_dtype compute, attn_state_part *parts);
  attn_var *(*apply)(attn_graph *graph, const attn_mixer_call *call, attn_var *x);
} attn_mixer;

/* The table (mixers.c); NULL beyond it. */
const attn_mixer *attn_mixer_at(int index);

/* mixer->apply after checking what all mixers rely on: x is [rows, hidden], the layout adds up, and
 * a state belongs to the one sequence that continues at its position, with recording off. After an
 * error a state with fixed parts may have taken some of the tokens: clear it or assign an earlier
 * one. ATTN_UNSUPPORTED for a state of a bidirectional layer: its past would depend on what comes;
 * and for a context of a mixer without ATTN_ABILITY_CROSS, with a window, or with a state: a
 * context is complete, so that queries may come one by one without one. */
attn_var *attn_mixer_apply(attn_graph *graph, const attn_mixer *mixer, const attn_mixer_call *call,
                           attn_var *x);

/* Helpers for mixers. */

#define ATTN_INIT_STD 0.02 /* deviation of weights: N(0, 0.02^2) throughout the catalogue */
attn_parameter_shape attn_matrix(const char *name, int64_t outputs, int64_t inputs);
attn_parameter_shape attn_vector(const char *name, int64_t count, attn_initial initial,
                                 double scale);
/* A running mean that begins as `value`. */
attn_parameter_shape attn_statistic(const char *name, int64_t count, double value);
/* Refuses options that no mixer takes: what every `configure` begins with, so that its defaults can
 * be computed without overflow. */
attn_status attn_mixer_check_options(const attn_mixer_options *options, const char *mixer);
/* Defaults and checks that all share: heads, kv_heads, dim, value_dim, norm_epsilon. */
attn_status attn_mixer_configure_heads(attn_mixer_options *options, const char *mixer);
/* Defaults and checks of rotary_dim and rope. */
attn_status attn_mixer_configure_rotary(attn_mixer_options *options, const char *mixer);
/* x [rows, heads * dim] as [rows, heads, dim], and as what the engines take: [batch, length, heads,
 * dim], or [rows, heads, dim] when the layout is packed. */
attn_var *attn_split_heads(attn_graph *graph, attn_var *x, int64_t heads);
attn_var *attn_as_sequences(attn_graph *graph, const attn_layout *layout, attn_var *x);
/* Back to [rows, heads * dim]. */
attn_var *attn_join_heads(attn_graph *graph, const attn_layout *layout, attn_var *x);
/* What a mixer does with its state, or with positions: a function of rows whose result has rows
 * too, [rows, ...]. In a step of several sequences it is called for each, with its state and its
 * row of every input [rows, ...]; else once. The result is [rows, width]. */
enum { ATTN_MIXER_INPUTS = 8 };
typedef attn_var *attn_mixer_part(attn_graph *graph, const attn_mixer_call *call,
                                  attn_var *const *inputs, int which);
attn_var *attn_mixer_each(attn_graph *graph, const attn_mixer_call *call, attn_mixer_part *part,
                          int which, int count, attn_var *const *inputs);
/* The same for parts that would round a few rows in another way than one: those of
 * attn_mixer_few_rows go one by one too, row r at the position of the call's layout while the state
 * stays where it is. */
attn_var *attn_mixer_each_row(attn_graph *graph, const attn_mixer_call *call, attn_mixer_part *part,
                              int which, int count, attn_var *const *inputs);
/* Whether a state takes 2 to ATTN_FEW_ROWS tokens: what is summed over tokens then goes one by one,
 * so that the result is to the bit that of as many steps. */
bool attn_mixer_few_rows(const attn_mixer_call *call);

/* attn_state_append to the call's state; and how many tokens it holds with those of the call, for
 * attn_softmax_args (NULL after an error). Both serve steps that are replayed (graph/replay.h). */
attn_status attn_mixer_append(attn_graph *graph, const attn_mixer_call *call, int part,
                              int64_t column, const attn_tensor *rows);
const int32_t *attn_mixer_key_length(attn_graph *graph, const attn_mixer_call *call);
/* Rows [n, columns] into a fixed part of a block, from row `row` and column `column` on; in a step
 * that is replayed, the row of the token to come. And how many of the part's rows are in use when
 * row `row` is the last one. */
attn_status attn_mixer_put(attn_graph *graph, const attn_mixer_call *call, int part, int64_t row,
                           int64_t column, const attn_tensor *rows);
const int32_t *attn_mixer_block_length(attn_graph *graph, const attn_mixer_call *call, int part,
                                       int64_t row);
/* attn_op_softmax within each sequence of a layout, or from one layout's to those of another: q, k,
 * v [rows, heads, dim]. */
attn_var *attn_mixer_softmax_within(attn_graph *graph, const attn_layout *layout,
                                    const attn_softmax_problem *problem, attn_var *q, attn_var *k,
                                    attn_var *v);
attn_var *attn_mixer_softmax_across(attn_graph *graph, const attn_layout *layout,
                                    const attn_layout *key_layout,
                                    const attn_softmax_problem *problem, attn_var *q, attn_var *k,
                                    attn_var *v);
/* attn_op_softmax of queries q [1, rows, heads, dim] over pages, one row after the other: row r
 * sees the first keys + r keys. */
attn_var *attn_mixer_softmax_rows(attn_graph *graph, const attn_softmax_problem *problem,
                                  const attn_softmax_args *args, attn_var *q, attn_var *k,
                                  attn_var *v, int64_t keys);
/* x W^T with parameter i, the output's projection; x itself where the call is for the heads. */
attn_var *attn_mixer_project(attn_graph *graph, const attn_mixer_call *call, attn_var *x, int i);
/* The variable of parameter i. */
attn_var *attn_mixer_parameter(attn_graph *graph, const attn_mixer_call *call, int i);
/* Decays that a head has once and for all: their logarithms [heads], wide. */
attn_var *attn_mixer_decays(attn_graph *graph, const attn_mixer_options *options,
                            double (*log_decay)(const attn_mixer_options *options, int64_t head));
/* What keys and values are made of, and the call for what happens to their rows (positions). */
attn_var *attn_mixer_key_rows(const attn_mixer_call *call, attn_var *x);
attn_mixer_call attn_mixer_key_call(const attn_mixer_call *call);
/* attn_op_recurrent with the state of part `part` (a [value_heads, dim, value_dim] matrix) and,
 * with the normaliser, of the part behind it ([value_heads, dim]). */
struct attn_recurrent_problem;
attn_var *attn_mixer_recurrent(attn_graph *graph, const attn_mixer_call *call, int part,
                               const struct attn_recurrent_problem *options, attn_var *q,
                               attn_var *k, attn_var *v, attn_var *decay, attn_var *beta);
/* The same without decays, or, where all keys are seen (bidirectional, a context),
 * attn_op_linear_attention: q, k, v [rows, heads, dim]; the result in any of their shapes. */
attn_var *attn_mixer_linear_attention(attn_graph *graph, const attn_mixer_call *call, int part,
                                      const struct attn_recurrent_problem *options, attn_var *q,
                                      attn_var *k, attn_var *v);

#endif
