/* Inside a reactive model: its parameters, and the parts that sessions and training are made of. */
#ifndef ATTN_MODELS_REACTIVE_H
#define ATTN_MODELS_REACTIVE_H

#include "attn/reactive.h"
#include "graph/operations.h"
#include "models/parameter_list.h"

typedef enum attn_memory_attention {
  ATTN_MEMORY_SIMPLE = 0,
  ATTN_MEMORY_SELF,
  ATTN_MEMORY_INTERLAYER,
  ATTN_MEMORY_GATED_SELF,
  ATTN_MEMORY_GATED_INTERLAYER
} attn_memory_attention;

typedef enum attn_memory_gate {
  ATTN_GATE_NONE = 0,
  ATTN_GATE_STATIC,
  ATTN_GATE_ELEMENTWISE,
  ATTN_GATE_LINEAR
} attn_memory_gate;

enum { ATTN_REACTIVE_PROJECTIONS = 4 }; /* of an attention: q, k, v, o */

typedef struct attn_gate_parameters {
  attn_parameter *weight, *bias; /* [slots], or [slots, slots] and [slots] */
  attn_parameter *status[2];     /* [1, hidden], [1]: where it is learnt */
} attn_gate_parameters;

typedef struct attn_reactive_layer {
  struct {
    attn_parameter *norm, *self[ATTN_REACTIVE_PROJECTIONS];
    attn_parameter *cross_norm, *memory_norm, *cross[ATTN_REACTIVE_PROJECTIONS];
    attn_parameter *feed_norm, *feed[3];
  } decoder;
  struct {
    attn_parameter *norm, *self[ATTN_REACTIVE_PROJECTIONS], *feed_norm, *feed[3];
  } encoder;
  struct {
    attn_parameter *norm, *other_norm, *attention[ATTN_REACTIVE_PROJECTIONS];
    attn_gate_parameters gate, inner; /* inner: of what is attended to */
  } among;                            /* slots: the step before what follows */
  struct {
    attn_parameter *norm, *encoded_norm, *attention[ATTN_REACTIVE_PROJECTIONS];
    attn_gate_parameters gate;
  } write;
} attn_reactive_layer;

struct attn_reactive {
  json_t *config;
  attn_dtype compute;
  int64_t vocabulary, hidden, width, layer_count, slots;
  double epsilon;
  bool head_norm;
  attn_memory_attention memory;
  attn_memory_gate gate;
  bool tanh_gate, learned_status;
  double gate_initial;
  int64_t bos, query, answer, eos; /* -1: none */
  const attn_mixer *softmax;
  attn_mixer_options self, encoder_self, cross; /* configured for it */
  attn_parameter_list list;
  attn_parameter *embedding, *final_norm[2], *head[2], *masked_head[2];
  attn_reactive_layer *layers;
  attn_graph *graph;
};

/* One set of keys and values, as heads [rows, kv_heads, dim]. */
typedef struct attn_memory_keys {
  attn_var *k, *v;
} attn_memory_keys;

/* The encoder: outputs of each layer [rows, hidden], wide, to layers[layer_count]; the last one is
 * returned. */
attn_var *attn_reactive_encode(attn_graph *graph, const attn_reactive *model,
                               const attn_layout *layout, const int32_t *tokens, attn_var **layers);
/* The memory of `batch` dialogues: stm[l] [batch * slots, hidden] wide, to updated[l]; encoded[l]
 * as from the encoder, a sequence a dialogue. */
void attn_reactive_update(attn_graph *graph, const attn_reactive *model, int64_t batch,
                          attn_var *const *stm, const attn_layout *layout, attn_var *const *encoded,
                          attn_var **updated);
/* What decoder layer l attends to in memory rows [rows, hidden] of any number of slots. */
attn_memory_keys attn_reactive_memory_keys(attn_graph *graph, const attn_reactive *model, int64_t l,
                                           attn_var *stm);
/* The decoder: tokens to rows [rows, hidden] that the head takes, of the compute dtype. `memory`
 * says which slots belong to which sequence; keys: of each layer. states: of one sequence, each
 * layer's, moved on by its tokens; or NULL. */
attn_var *attn_reactive_decode(attn_graph *graph, const attn_reactive *model,
                               const attn_layout *layout, const int32_t *tokens,
                               const attn_layout *memory, const attn_memory_keys *keys,
                               attn_state *const *states);
/* The same with the memory itself, [rows, hidden] of each layer. */
attn_var *attn_reactive_decode_with(attn_graph *graph, const attn_reactive *model,
                                    const attn_layout *layout, const int32_t *tokens,
                                    const attn_layout *memory, attn_var *const *stm);
/* Logits [rows, vocabulary], wide. */
attn_var *attn_reactive_logits(attn_graph *graph, const attn_reactive *model, attn_var *hidden);

/* For arrays of a variable a layer, in the graph's arena; NULL after an error. */
attn_var **attn_reactive_layer_vars(attn_graph *graph, const attn_reactive *model);

#endif
