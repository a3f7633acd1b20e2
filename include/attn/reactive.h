/* Conversations with a memory of fixed size: the Reactive Transformer (arXiv 2510.03561).
 *
 * A turn is processed alone. A decoder answers it while it attends to a memory STM [layers, slots,
 * hidden]; afterwards an encoder reads the turn, query and answer, and a memory attention writes
 * its layers' outputs ED into the memory. So a turn costs the same however long the conversation
 * is, and all that lasts from one to the next is the memory. With RN a root-mean-square norm, for
 * each layer l:
 *
 *   decoder   x += attention(RN(x)), causal, rotary;  x += cross(RN(x), RN(STM_l)), the queries
 *             rotary;  x += W3 (silu(W1 RN(x)) (.) W2 RN(x));  at the end logits = W x + b
 *   encoder   the same both ways and without cross attention, over the same embedding; ED_l = x
 *   memory    STM_l' = gate(STM_l, attention(RN(STM_l), RN(ED_l))), the keys rotary; before it, by
 *             memory_attention, a step STM_l <- gate(STM_l, attention(RN(STM_l), kv)) with kv
 *             "self": RN(STM_l);  "interlayer": RN(mean over layers of STM);
 *             "gated_self", "gated_interlayer": gate(RN(STM_l), RN(mean));  "simple": no such step
 *   gate      "none": old + new;  else with sigmoid (1 - g) old + g new, g = sigmoid(z), with tanh
 *             (1 - g) old + (1 + g) new, g = tanh(z), which is twice the sigmoid gate of 2 z;
 *             "static": z = w, a number a slot;  "elementwise": z = w status;
 *             "linear": z = W status + b, W [slots, slots];  status: the mean of old + new over
 *             channels, or u . (old + new) + c with memory_gate_status "learned"
 *
 * A tanh gate and none let the memory grow, about twofold a turn.
 *
 * config.json: model_type "reactive", vocab_size, hidden_size, num_memory_slots (required);
 * num_hidden_layers (1), num_attention_heads (1), num_key_value_heads, head_dim (hidden_size /
 * heads), memory_attention_heads, memory_key_value_heads, memory_head_dim (those of the others),
 * intermediate_size (4 hidden_size), rope_theta (10000), rms_norm_eps (1e-6), head_norm (false: a
 * layer norm before the head), memory_attention ("interlayer"), memory_gate ("static"),
 * memory_gate_activation ("sigmoid" or "tanh"), memory_gate_status ("mean"), memory_gate_init (3),
 * bos_token_id, query_token_id, answer_token_id, eos_token_id (-1: the template lacks it).
 *
 * One model, its trainer and its sessions belong to one thread at a time. */
#ifndef ATTN_REACTIVE_H
#define ATTN_REACTIVE_H

#include "attn/sampling.h"
#include "attn/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct attn_reactive attn_reactive;

typedef struct attn_reactive_info {
  int64_t vocabulary, hidden, layers, slots;
  int64_t parameters; /* numbers that are learnt */
  attn_dtype compute;
  int32_t bos, query, answer, eos; /* of the template; -1: none */
} attn_reactive_info;

/* A fresh one from the text of a config.json. compute: bfloat16, float32 or float64.
 * ATTN_BAD_FORMAT names a key that is wrong or not known; ATTN_UNSUPPORTED another model_type or
 * dtype; ATTN_OUT_OF_MEMORY. */
ATTN_API attn_status attn_reactive_create(const char *config, uint64_t seed, attn_dtype compute,
                                          attn_reactive **model);
/* From a directory with config.json and model.safetensors. Besides: ATTN_NOT_FOUND, ATTN_IO_ERROR,
 * and ATTN_BAD_FORMAT for a tensor that is missing or has another shape. */
ATTN_API attn_status attn_reactive_load(const char *directory, attn_dtype compute,
                                        attn_reactive **model);
/* Writes such a directory, made if needed; weights as float32 (of float64 ones, float64). */
ATTN_API attn_status attn_reactive_save(const attn_reactive *model, const char *directory);
/* To another device, before there are sessions or a trainer. ATTN_UNSUPPORTED: it cannot be used.
 */
ATTN_API attn_status attn_reactive_move(attn_reactive *model, attn_device device);
ATTN_API void attn_reactive_destroy(attn_reactive *model); /* NULL is fine */
ATTN_API attn_status attn_reactive_get_info(const attn_reactive *model, attn_reactive_info *info);

/* Sessions ---------------------------------------------------------------------------------------
 * Between turns a session is its memory. Within one it also has the turn's tokens, and their keys
 * and values; the memory's keys and values are made once a turn. */
typedef struct attn_reactive_session attn_reactive_session;

typedef struct attn_reactive_session_options {
  size_t struct_size;      /* set by ATTN_REACTIVE_SESSION_INIT */
  int64_t max_turn_tokens; /* of a turn, query and answer together */
  double deviation;        /* the first memory is N(0, deviation^2), */
  uint64_t seed;           /* from this seed; 0: zeros */
} attn_reactive_session_options;

#define ATTN_REACTIVE_SESSION_INIT                                                                 \
  {                                                                                                \
    .struct_size = sizeof(attn_reactive_session_options), .max_turn_tokens = 4096,                 \
    .deviation = 0.02, .seed = 0                                                                   \
  }

/* options may be NULL. The model must outlive it, and not be trained or moved meanwhile. */
ATTN_API attn_status attn_reactive_session_create(attn_reactive *model,
                                                  const attn_reactive_session_options *options,
                                                  attn_reactive_session **session);
ATTN_API void attn_reactive_session_destroy(attn_reactive_session *session); /* NULL is fine */

/* Takes the next tokens [count] of the turn, query or answer. logits [vocabulary], if not NULL: of
 * the token behind them. After an error the turn is as it was: ATTN_INVALID_ARGUMENT for a token
 * that is not in the vocabulary or one too many, ATTN_OUT_OF_MEMORY. */
ATTN_API attn_status attn_reactive_session_feed(attn_reactive_session *session,
                                                const int32_t *tokens, int64_t count,
                                                float *logits);
/* Ends the turn: the encoder reads its tokens and the memory takes them up. This may wait until the
 * answer has been given out. ATTN_INVALID_ARGUMENT when nothing was fed. After an error nothing has
 * changed. */
ATTN_API attn_status attn_reactive_session_end_turn(attn_reactive_session *session);
/* Forgets the turn's tokens; the memory is as it was before them. */
ATTN_API void attn_reactive_session_drop_turn(attn_reactive_session *session);
ATTN_API int64_t attn_reactive_session_turns(const attn_reactive_session *session); /* that ended */
ATTN_API int64_t attn_reactive_session_turn_tokens(const attn_reactive_session *session);

/* A whole turn by the template [bos] [query] text [answer] ANSWER [eos]: of its tokens those that
 * the model has. Feeds it, draws at most max_answer tokens (sampling NULL: the most likely ones)
 * up to eos, and ends the turn. answer has room for max_answer; eos is not among the
 * *answer_tokens. on_token, if not NULL, is given each as it comes, and stops the answer by false.
 * After an error the turn is dropped. */
typedef bool attn_reactive_on_token(void *context, int32_t token);
ATTN_API attn_status attn_reactive_session_ask(attn_reactive_session *session, const int32_t *text,
                                               int64_t count, const attn_sampling *sampling,
                                               attn_reactive_on_token *on_token, void *context,
                                               int32_t *answer, int64_t max_answer,
                                               int64_t *answer_tokens);

/* The memory [layers, slots, hidden], read and set between turns: ATTN_INVALID_ARGUMENT within one,
 * or for a number that is not finite. */
ATTN_API attn_status attn_reactive_session_get_memory(const attn_reactive_session *session,
                                                      float *memory);
ATTN_API attn_status attn_reactive_session_set_memory(attn_reactive_session *session,
                                                      const float *memory);
/* Another session with the same memory, turns and options; between turns. */
ATTN_API attn_status attn_reactive_session_fork(const attn_reactive_session *session,
                                                attn_reactive_session **fork);
/* The memory, exactly, as a file (safetensors) that says which model it belongs to; between turns.
 * Restoring drops a turn under way. ATTN_BAD_FORMAT: another model's, or none; nothing has changed
 * then. */
ATTN_API attn_status attn_reactive_session_save(const attn_reactive_session *session,
                                                const char *path);
ATTN_API attn_status attn_reactive_session_restore(attn_reactive_session *session,
                                                   const char *path);

#ifdef __cplusplus
}
#endif
#endif
