/* Inside a model: its parameters, where each layer finds its own, and the decoder that runs them.
 *
 *   x = scale * E[token]
 *   x = x + mixer(norm(x));  x = x + feed_forward(norm(x))     for each layer
 *   logits = norm(x) W^T
 *
 * Sandwich norms (Gemma 2) also normalise what mixer and feed-forward give; logits may be capped. A
 * feed-forward may be a mixture of experts. MiniMax adds to norm(x), both with factors. Encoders
 * (BERT) have a host of their own, encoder.c, which shares the parameters' list. */
#ifndef ATTN_MODELS_MODEL_H
#define ATTN_MODELS_MODEL_H

#include "attn/model.h"
#include "models/embedding.h"
#include "models/generation.h"
#include "models/source.h"
#include "models/text.h"

typedef struct attn_layer_parameters {
  attn_parameter *token_norm[2]; /* weight, bias; NULL where the norm has none */
  attn_parameter *mixer[ATTN_MIXER_PARAMETERS];
  attn_parameter *channel_norm[2];
  attn_parameter *feed_forward[3];                   /* gate, up, down; of an MLP: up, down */
  attn_parameter *feed_forward_bias[2];              /* of an encoder's MLP */
  attn_parameter *token_after[2], *channel_after[2]; /* sandwich norms */
  /* Where there are experts: three parameters each, in place of feed_forward. */
  attn_parameter *router, *router_bias, **experts, *shared[3], *shared_gate;
} attn_layer_parameters;

struct attn_model {
  attn_model_config config;
  attn_dtype compute;
  attn_device device;   /* where the parameters are, and so the states of sessions */
  uint64_t fingerprint; /* of the parameters when they left the processor */
  attn_source source;   /* that parameters may point into; empty without */
  attn_model_text text;
  attn_embedding_config embedding_config;
  attn_generation generation;
  int64_t parameter_count;
  attn_parameter *parameters;
  attn_parameter_shape
      *shapes;    /* of each, with the host's full name; parameters have the family's */
  bool *borrowed; /* whose values lie in the source */
  struct attn_lora **adapters; /* of each parameter that has one, else NULL; NULL: there are none */
  attn_parameter *embedding, *head; /* the same one when tied; an encoder has no head */
  attn_parameter *final_norm[2];
  attn_parameter *positions, *token_types, *embedding_norm[2]; /* of an encoder */
  attn_layer_parameters *layers;
};

/* Making one (model.c), step by step: the configuration, whose reference is taken, and the list of
 * parameters; then, when all have values, what products need. */
attn_status attn_model_check_compute(attn_dtype compute);
attn_status attn_model_start(json_t *config, const char *origin, attn_dtype compute,
                             attn_model *model);
attn_status attn_model_make_weights(attn_model *model);
/* Whether parameter `index` is the weight of a norm that safetensors store without the 1 that is
 * added to it: here, and in GGUF files, it has it. Not so the norm of what a mixer computes. */
bool attn_model_norm_offset(const attn_model *model, int64_t index);

/* As attn_model_load, but without what products need: to look at, and to be saved. */
attn_status attn_model_read(const char *path, attn_dtype compute, attn_model **model);

/* attn_model_save_gguf; *files receives how many there are. */
attn_status attn_model_write_gguf(const attn_model *model, const char *path,
                                  const attn_gguf_options *options, int *files);

/* Another mixer in the place of exact attention. */
typedef struct attn_replacement {
  const char *mixer;
  int64_t keep_every;  /* every so manieth layer keeps its attention; 0: none does */
  int64_t feature_dim; /* of the mixer, 0: its default; */
  int64_t window;      /* likewise; lolcats alone has the rest */
  attn_window_kind window_kind;
  bool affine;
} attn_replacement;

/* A new model, on the processor, whose exact attention is replaced; (*fresh)[i] says whether its
 * parameter i is new, with values from `seed`, or a copy. `from` lies on the processor too.
 * ATTN_UNSUPPORTED names what cannot be kept. */
attn_status attn_model_replace_mixer(const attn_model *from, const attn_replacement *replacement,
                                     uint64_t seed, attn_model **to, bool **fresh);

/* The tensor of the source that a parameter is, or is part of; false: the model has no source. */
bool attn_model_find_stored(const attn_model *model, int64_t index, attn_stored *stored);

/* Names, shapes and a sample of the values of all parameters: which model a session is of, whatever
 * the device. */
uint64_t attn_model_fingerprint(const attn_model *model);

/* First values of a parameter, from random stream number `stream` of a seed: float64 or float32,
 * contiguous, on the processor. */
void attn_parameter_initialise(const attn_parameter_shape *shape, uint64_t seed, uint64_t stream,
                               const attn_tensor *value);
/* Training: turns every parameter into a float32 (float64 for float64) master of its own with a
 * zeroed gradient; and the same of one. */
attn_status attn_model_make_trainable(attn_model *model);
attn_status attn_model_make_parameter_trainable(attn_model *model, int64_t index);
/* All parameters, those of adapters (lora.h) behind the model's own; and those that are trained, in
 * the same order. Room for attn_model_count_all of them. */
int64_t attn_model_count_all(const attn_model *model);
int64_t attn_model_list_all(const attn_model *model, attn_parameter **list);
int64_t attn_model_list_trained(const attn_model *model, attn_parameter **list);
/* Gives a parameter other values, which are taken, instead of those in any form that it has. */
attn_status attn_model_replace_values(attn_model *model, int64_t index, attn_tensor *values);
/* How often the most likely next token is the label: of each of `count` sequences, inputs and
 * labels [count, length], the share of its positions with a label (>= 0), and of these the mean. */
attn_status attn_model_accuracy(const attn_model *model, const int32_t *inputs,
                                const int32_t *labels, int64_t count, int64_t length,
                                double *accuracy);
/* After masters have changed: renews the compute forms. */
attn_status attn_model_refresh(attn_model *model);

/* The decoder: tokens [layout.rows] to normalised hidden rows [rows, hidden] in the compute dtype.
 * states: one a layer, or NULL. The first `checkpoints` layers keep only their inputs for backward,
 * and the `lean` layers after them what is slow to make again (attn_graph_discard). */
attn_var *attn_decoder_hidden(attn_graph *graph, const attn_model *model, const attn_layout *layout,
                              const int32_t *tokens, attn_state *const *states, int64_t checkpoints,
                              int64_t lean);
/* The same without gradients or states, for what each layer's mixer is given: normalised rows
 * [rows, hidden] that last until `visit` returns. Resets the graph. */
typedef attn_status attn_mixer_visit(void *context, int64_t layer, const attn_tensor *in);
attn_status attn_decoder_visit(attn_graph *graph, const attn_model *model,
                               const attn_layout *layout, const int32_t *tokens,
                               attn_mixer_visit *visit, void *context);
/* One token of each of `count` sequences, tokens [count], with the states of each, a layer each; to
 * [count, hidden] as above. */
attn_var *attn_decoder_step(attn_graph *graph, const attn_model *model, int64_t count,
                            const int32_t *tokens, attn_state *const *const *sequences);
/* The mean loss of predicting targets [rows] (-1: not counted); one element. */
attn_var *attn_decoder_loss(attn_graph *graph, const attn_model *model, const attn_layout *layout,
                            const int32_t *tokens, const int32_t *targets, int64_t checkpoints,
                            int64_t lean);
/* Logits [rows, vocabulary] in the wide dtype of hidden rows. */
attn_var *attn_decoder_logits(attn_graph *graph, const attn_model *model, attn_var *hidden);

/* For hosts without a tape: a layer's inside is of no use once its result is there, so the result
 * moves to `kept`, and the memory since `mark` is free again. */
attn_var *attn_keep_result(attn_graph *graph, attn_graph_mark mark, const attn_tensor *kept,
                           attn_var *x);

/* The encoder (encoder.c): tokens [layout.rows] to rows [rows, hidden] in the compute dtype. types:
 * of each token, or NULL: all are 0. */
attn_var *attn_encoder_hidden(attn_graph *graph, const attn_model *model, const attn_layout *layout,
                              const int32_t *tokens, const int32_t *types);
/* ATTN_UNSUPPORTED, saying who asked, when the model is an encoder: it does not predict tokens. */
attn_status attn_model_check_decoder(const attn_model *model, const char *what);

/* The plans that a session has used, for `--explain`. */
const struct attn_plan_cache *attn_session_plans(const attn_session *session);

#endif
