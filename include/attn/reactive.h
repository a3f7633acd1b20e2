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
 * A sigmoid gate's slot is never longer than the longer of old and new. Without a gate every turn
 * adds to it, and a tanh gate multiplies what was there by 1 - tanh z, which grows without end
 * where z is below 0.
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

/* Training ---------------------------------------------------------------------------------------
 * AdamW, in the paper's supervised stages:
 *   1, 2  attn_reactive_train_joint     decoder and encoder as language models, on texts, then on
 *                                       turns by themselves
 *   3     attn_reactive_train_memory    the memory attention, towards what the encoder gives
 *   4     attn_reactive_train_dialogues turn after turn, through the memory: first with encoder and
 *                                       memory frozen (parts: the decoder), then with all
 * Which parts learn is a trainer's; another stage is another trainer, with fresh moments. */
enum {
  ATTN_REACTIVE_DECODER = 1,
  ATTN_REACTIVE_ENCODER = 2,
  ATTN_REACTIVE_MEMORY = 4,    /* the memory attention */
  ATTN_REACTIVE_EMBEDDING = 8, /* which encoder and decoder share */
  ATTN_REACTIVE_ALL = 15
};

typedef struct attn_reactive_training {
  size_t struct_size;                               /* set by ATTN_REACTIVE_TRAINING_INIT */
  int parts;                                        /* that learn: a sum of the above */
  double beta1, beta2, epsilon, weight_decay, clip; /* AdamW; see attn_training_options */
  uint64_t seed;                                    /* of masks, noise and first memories */
  double deviation;   /* of first memories, N(0, deviation^2); dialogues and stage 3 */
  double mask_rate;   /* joint: share of tokens that the encoder shall guess, 0 to 1, */
  int32_t mask_token; /* which it sees as this one */
  double noise;       /* joint: deviation of what is added to the encoder's outputs; 0: nothing */
  int64_t through;    /* dialogues: turns a step; 0: all of a call */
  double new_first, new_then, new_decay, new_least; /* memory: see attn_reactive_train_memory */
} attn_reactive_training;

#define ATTN_REACTIVE_TRAINING_INIT                                                                \
  {                                                                                                \
    .struct_size = sizeof(attn_reactive_training), .parts = ATTN_REACTIVE_ALL, .beta1 = 0.9,       \
    .beta2 = 0.95, .epsilon = 1e-8, .weight_decay = 0.01, .clip = 1.0, .seed = 1,                  \
    .deviation = 0.02, .mask_rate = 0.15, .mask_token = 0, .noise = 0, .through = 0,               \
    .new_first = 0.9, .new_then = 0.5, .new_decay = 0.05, .new_least = 0.05                        \
  }

/* Sequences of tokens, one behind the other: texts, or one turn of each of several dialogues.
 * offsets [sequences + 1] are cumulative, from 0; no sequence is empty. targets: at each token the
 * one that shall follow, -1 where nothing is asked; NULL: the next one, and nothing at the end. */
typedef struct attn_turns {
  const int32_t *tokens, *targets, *offsets;
  int64_t sequences;
} attn_turns;

typedef struct attn_reactive_trainer attn_reactive_trainer;
/* The model must outlive it, and have no other. options may be NULL. ATTN_INVALID_ARGUMENT names
 * the field. */
ATTN_API attn_status attn_reactive_trainer_create(attn_reactive *model,
                                                  const attn_reactive_training *options,
                                                  attn_reactive_trainer **trainer);
ATTN_API void attn_reactive_trainer_destroy(attn_reactive_trainer *trainer); /* NULL is fine */

/* In the next three *loss is that before the step, or the mean over several steps. When a loss or
 * its gradient is not finite, or nothing that learns takes part in it, that step changes nothing:
 * ATTN_INVALID_ARGUMENT, as for turns that do not fit. */

/* One step on the sum of two losses: the encoder's, -log p of the tokens that were masked for it,
 * from its last layer through a head of its own; and the decoder's, -log p of the targets, whose
 * memory is what the encoder made of the same sequence with its masks, token by token, with noise,
 * and without a gradient. losses, if not NULL: the decoder's, the encoder's. */
ATTN_API attn_status attn_reactive_train_joint(attn_reactive_trainer *trainer,
                                               const attn_turns *texts, double learning_rate,
                                               double losses[2]);
/* `count` steps, one a turn, from a random memory: turns[t] is turn t of all dialogues, as many in
 * each, and of as many tokens as the memory has slots. With ED the encoder's outputs the loss is
 * minus the mean, over layers and slots, of the cosine of the new memory and w ED + (1 - w) STM; w
 * is new_first at the first turn, then new_then less new_decay a turn, and never below new_least.
 * No gradient goes from one turn to the one before, and none into the encoder. */
ATTN_API attn_status attn_reactive_train_memory(attn_reactive_trainer *trainer,
                                                const attn_turns *turns, int64_t count,
                                                double learning_rate, double *loss);
/* turns[t] is turn t of all dialogues, as many in each. Each turn is decoded with the memory of
 * those before, which starts at random. A step takes `through` turns: the loss is the mean of -log
 * p over their targets, and gradients go back through what they and the turn before them write,
 * no further. So with 1 it is the paper's: encode turn t - 1, update the memory, answer turn t. */
ATTN_API attn_status attn_reactive_train_dialogues(attn_reactive_trainer *trainer,
                                                   const attn_turns *turns, int64_t count,
                                                   double learning_rate, double *loss);

#ifdef __cplusplus
}
#endif
#endif
