/* Models and sessions: the two nouns that a user of a language model needs.
 *
 * A model is weights and a configuration, read-only once loaded; any number of sessions, in any
 * threads, may run on it. A session is one sequence of tokens with its state: feed tokens, read
 * logits, sample, fork, rewind, save. A session belongs to one thread at a time. */
#ifndef ATTN_MODEL_H
#define ATTN_MODEL_H

#include "attn/sampling.h"
#include "attn/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Models ----------------------------------------------------------------------------------------
 */

typedef struct attn_model attn_model;

/* Loads a directory with config.json and model.safetensors (or shards and their index), or a GGUF
 * file (any one of several that belong together). `compute` is the dtype of products: bfloat16,
 * float32 or float64. Weights in that dtype are used where they lie in the mapped file.
 * ATTN_NOT_FOUND, ATTN_BAD_FORMAT (names the key or tensor). */
ATTN_API attn_status attn_model_load(const char *directory, attn_dtype compute, attn_model **model);
/* A fresh model from the text of a config.json, with random float32 weights from `seed`. */
ATTN_API attn_status attn_model_create(const char *config, uint64_t seed, attn_dtype compute,
                                       attn_model **model);
ATTN_API void attn_model_destroy(attn_model *model);
/* Brings the weights to a device, where sessions made from then on, evaluation and embedding run.
 * Quantised weights stay as they are; float8 becomes plain numbers of the compute dtype on a GPU.
 * No session of the model may be there. After an error the model is as it was: ATTN_UNSUPPORTED
 * where the device cannot be used, ATTN_OUT_OF_MEMORY, which says what was asked for and is free.
 */
ATTN_API attn_status attn_model_move(attn_model *model, attn_device device);
typedef struct attn_save_options {
  size_t struct_size;
  attn_dtype dtype; /* of the weights: float32, bfloat16, float16 or float64 */
  int64_t
      shard_bytes; /* of the weights in one file, as Transformers' max_shard_size; 0: all in one */
} attn_save_options;
#define ATTN_SAVE_OPTIONS_INIT                                                                     \
  { sizeof(attn_save_options), ATTN_BF16, 5000000000 }

/* Writes a directory, which is made if needed: config.json and model.safetensors, or, when the
 * weights take more than shard_bytes, model-00001-of-0000N.safetensors and so on with
 * model.safetensors.index.json; and what the model was loaded with of generation_config, tokenizer
 * and chat template. Needs the memory of one tensor. Weights are plain numbers, whatever they were
 * read from.
 *
 * Files of weights by these names that lay in the directory, in any number of shards, are replaced
 * or removed, once all new ones are written; any other file stays. A crash while shards take the
 * place of as many others leaves no index, and so a directory that is not loaded. */
ATTN_API attn_status attn_model_save_as(const attn_model *model, const char *directory,
                                        const attn_save_options *options);
/* The same with ATTN_SAVE_OPTIONS_INIT but for the dtype. */
ATTN_API attn_status attn_model_save(const attn_model *model, const char *directory,
                                     attn_dtype dtype);

/* How a GGUF file has the matrices. Vectors, norms and routers are float32 in any case, and
 * matrices whose rows are not whole blocks (of 32) are float16 where blocks are asked for. */
typedef enum attn_weight_type {
  ATTN_WEIGHTS_AS_STORED = 0, /* as the model's own file has each, quantised ones included */
  ATTN_WEIGHTS_F32,
  ATTN_WEIGHTS_F16,
  ATTN_WEIGHTS_BF16,
  ATTN_WEIGHTS_Q8_0, /* 34 bytes for 32 weights */
  ATTN_WEIGHTS_Q4_0, /* 18 */
  ATTN_WEIGHT_TYPES
} attn_weight_type;

typedef struct attn_gguf_options {
  size_t struct_size;
  attn_weight_type type;
  int64_t shard_bytes; /* of the weights in one file; 0: all in one */
} attn_gguf_options;
#define ATTN_GGUF_OPTIONS_INIT                                                                     \
  { sizeof(attn_gguf_options), ATTN_WEIGHTS_AS_STORED, 0 }

/* Writes one GGUF file, or, when they take more than shard_bytes, several: NAME-00001-of-0000N.gguf
 * for NAME.gguf, of which any one loads them all. Weights, configuration, tokenizer, chat template
 * and advice for sampling; `options` may be NULL. ATTN_UNSUPPORTED when the model's family has no
 * names in GGUF, or the file could not say all that the model is. */
ATTN_API attn_status attn_model_save_gguf(const attn_model *model, const char *path,
                                          const attn_gguf_options *options);

typedef struct attn_model_info {
  char type[64];        /* model_type of the configuration */
  int64_t parameters;   /* numbers that were learnt */
  int64_t weight_bytes; /* as stored */
  int64_t layers, hidden, vocabulary;
  int64_t state_fixed_bytes; /* of a session, whatever its length */
  int64_t state_token_bytes; /* and for each token */
  attn_dtype compute;        /* of products */
  /* The largest weight in the file: its dtype, float32 where it is quantised; and the name of its
   * type, "bfloat16" or "Q4_0". */
  attn_dtype stored;
  char stored_type[16];
} attn_model_info;
ATTN_API attn_status attn_model_get_info(const attn_model *model, attn_model_info *info);
/* The mixer of layer 0 .. layers - 1, by name; NULL beyond. */
ATTN_API const char *attn_model_mixer(const attn_model *model, int64_t layer);

/* How the model's makers advise to sample: ATTN_SAMPLING_INIT with what generation_config.json (or
 * a GGUF file's general.sampling.*) says of temperature, top_k, top_p, min_p and
 * repetition_penalty; do_sample false is temperature 0. */
ATTN_API attn_status attn_model_default_sampling(const attn_model *model, attn_sampling *sampling);

/* The mean of -ln p(token t | tokens before it) over tokens 1 .. count - 1 of one text, cut into
 * windows of at most `window` tokens (0: 2048) that each start afresh but for `overlap` tokens of
 * context that are not counted. *counted receives how many were. */
ATTN_API attn_status attn_model_evaluate(const attn_model *model, const int32_t *tokens,
                                         int64_t count, int64_t window, int64_t overlap,
                                         double *mean_loss, int64_t *counted);

/* Sessions --------------------------------------------------------------------------------------
 */

typedef struct attn_session attn_session;

typedef struct attn_session_options {
  size_t struct_size;
  int64_t max_tokens;         /* capacity */
  int64_t forks;              /* sessions that may share one family's pages, itself included */
  int64_t checkpoint_spacing; /* tokens between checkpoints of a recurrent state; multiple of 64 */
  int64_t checkpoints;        /* kept at most; denser near the end. 0: rewinding starts afresh */
} attn_session_options;

#define ATTN_SESSION_OPTIONS_INIT                                                                  \
  {                                                                                                \
    .struct_size = sizeof(attn_session_options), .max_tokens = 32768, .forks = 8,                  \
    .checkpoint_spacing = 256, .checkpoints = 16                                                   \
  }

/* `options` may be NULL. The model must outlive the session. */
ATTN_API attn_status attn_session_create(const attn_model *model,
                                         const attn_session_options *options,
                                         attn_session **session);
ATTN_API void attn_session_destroy(attn_session *session);

/* Reads count >= 1 tokens. Afterwards the logits of the last one are there. On an error the session
 * is as before. One token: a decode step, which allocates nothing and takes no lock. */
ATTN_API attn_status attn_session_feed(attn_session *session, const int32_t *tokens, int64_t count);
/* Feeds one token to each of `count` different sessions of one model, as attn_session_feed does,
 * but reads the weights once for all of them: continuous batching. The sessions belong to this
 * thread; they may stand at any positions. On an error all are as before. */
ATTN_API attn_status attn_session_step(attn_session *const *sessions, const int32_t *tokens,
                                       int64_t count);
/* [vocabulary] float32, until the next feed or rewind; NULL before the first token. */
ATTN_API const float *attn_session_logits(const attn_session *session);
/* Draws the next token from the logits without feeding it; history is the session's tokens. */
ATTN_API attn_status attn_session_sample(attn_session *session, const attn_sampling *sampling,
                                         int32_t *token);

ATTN_API int64_t attn_session_position(const attn_session *session); /* tokens so far */
ATTN_API const int32_t *attn_session_tokens(const attn_session *session);
ATTN_API int64_t attn_session_state_bytes(const attn_session *session); /* in use now */

/* A second session with the same past. Pages and checkpoints are shared until one of them writes.
 * Not while another thread uses a session of the family. */
ATTN_API attn_status attn_session_fork(attn_session *session, attn_session **fork);
/* Back to the first `position` tokens (0 <= position <= now), logits included, for any mixer: cut
 * where the state can be cut, else from the nearest checkpoint with a replay. Equals a fresh run.
 */
ATTN_API attn_status attn_session_rewind(attn_session *session, int64_t position);

/* Asks that this place stay cheap to go back to, as the end of a turn of a chat is: a checkpoint
 * here, which is not given up for others before four more are asked for. Where the state can be cut
 * every place is cheap, and nothing is done. */
ATTN_API void attn_session_checkpoint(attn_session *session);

/* The session as a file: tokens, logits and state, with a version and a checksum; a file of another
 * model, version or length is refused (ATTN_BAD_FORMAT). Checkpoints are not saved: a rewind behind
 * the restored position replays from the start unless the state can be cut. */
ATTN_API attn_status attn_session_save(const attn_session *session, const char *path);
ATTN_API attn_status attn_session_restore(attn_session *session, const char *path);

#ifdef __cplusplus
}
#endif
#endif
