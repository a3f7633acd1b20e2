/* Tokenizers: text to token ids and back, exactly as the files of a checkpoint state it.
 *
 * Models: byte-level BPE (GPT-2, Llama 3, Qwen2, SmolLM), SentencePiece-style BPE with byte
 * fallback (Llama 2; by merges or by scores), WordPiece (BERT) and Unigram. What a file asks for
 * and libattn lacks is ATTN_UNSUPPORTED, naming it.
 *
 * A tokenizer is not changed by use: threads may share one.
 *
 * Text is UTF-8. Bytes that are not: a byte-level tokenizer encodes each run of them by itself, so
 * that any bytes come back (unless a normaliser changes text, or the vocabulary lacks a byte: such
 * bytes become the unknown token, or nothing where there is none, as SmolLM2's 0x04); the others
 * take every maximal invalid part for U+FFFD, as Python's errors="replace" does. Properties of
 * characters are those of the Unicode versions that PCRE2 and utf8proc were built with. */
#ifndef ATTN_FILES_TOKENIZER_H
#define ATTN_FILES_TOKENIZER_H

#include "attn/text.h"
#include "base/text.h"

typedef struct attn_tokenizer attn_tokenizer;

/* A Hugging Face tokenizer.json. Truncation and padding, which it may state too, are ignored. */
attn_status attn_tokenizer_load(const char *path, attn_tokenizer **tokenizer);

/* What a token is; the numbers are those of GGUF's tokenizer.ggml.token_type. */
typedef enum attn_token_type {
  ATTN_TOKEN_NORMAL = 1,
  ATTN_TOKEN_UNKNOWN = 2,      /* stands for what the vocabulary lacks */
  ATTN_TOKEN_CONTROL = 3,      /* special: found in text only when that is asked for */
  ATTN_TOKEN_USER_DEFINED = 4, /* always found in text, whole, before anything else */
  ATTN_TOKEN_UNUSED = 5,
  ATTN_TOKEN_BYTE = 6 /* "<0x0A>" stands for one byte */
} attn_token_type;

/* A tokenizer in plain arrays, as the metadata of a GGUF file hold it. Nothing is kept: the arrays
 * may go once the tokenizer is created. Start from ATTN_TOKENIZER_SPEC_INIT. */
typedef struct attn_tokenizer_spec {
  /* tokenizer.ggml.model: "gpt2" is byte-level BPE, whose tokens are written in GPT-2's alphabet of
   * bytes; "llama" is SentencePiece BPE by scores; "t5" is Unigram; "bert" is WordPiece, whose
   * words begin with U+2581 and whose continuations do not. */
  const char *model;
  /* tokenizer.ggml.pre, for "gpt2" only: how text is cut into words. "gpt-2" (also NULL),
   * "llama-bpe" (also "llama3", "llama-v3"), "qwen2", "smollm". */
  const char *pre;
  int64_t token_count;
  const char *const *tokens; /* the string of each id, UTF-8 */
  const size_t *token_sizes; /* bytes of each, or NULL when they are NUL-terminated */
  const int32_t *types;      /* attn_token_type of each, or NULL: all are normal */
  const float *scores;       /* of each; "llama" and "t5" need them, the others ignore them */
  int64_t merge_count;
  const char *const *merges; /* "left right", best first; "gpt2" needs them */
  const size_t *merge_sizes; /* like token_sizes */
  int32_t bos, eos;          /* ids, or -1; "bert": its [CLS] and [SEP] */
  int32_t unknown;           /* id, or -1 */
  bool add_bos, add_eos;     /* whether ATTN_ENCODE_ENDS adds them */
  bool add_space_prefix;     /* "llama", "t5": U+2581 before each run of text */
  /* "t5": SentencePiece's charsmap (NULL: none), applied as tokenizer.json's Precompiled is; spaces
   * at the ends and beside others are dropped, and every word gets its U+2581. Where the charsmap
   * makes spaces of all whitespace, words are cut at whitespace, as in tokenizer.json: that counts
   * for U+0085, which SentencePiece's own charsmaps forget. */
  const char *charsmap;
  size_t charsmap_size;
  bool remove_extra_spaces;
  bool lower_case, strip_accents; /* "bert" */
} attn_tokenizer_spec;
#define ATTN_TOKENIZER_SPEC_INIT                                                                   \
  {                                                                                                \
    .bos = -1, .eos = -1, .unknown = -1, .add_space_prefix = true, .lower_case = true,             \
    .strip_accents = true                                                                          \
  }

attn_status attn_tokenizer_create(const attn_tokenizer_spec *spec, attn_tokenizer **tokenizer);
void attn_tokenizer_destroy(attn_tokenizer *tokenizer); /* NULL is fine */

/* The way back: a tokenizer in such arrays, which point into it and into what is freed with them.
 * Ids up to `count` that are no token are "[PAD7]", unused. ATTN_UNSUPPORTED, saying why, when they
 * would not make the same tokenizer again. What is lost: whether special tokens take the spaces
 * beside them, and are looked for in normalised text; and that Unigram tokenizers of the library
 * `tokenizers` find special tokens that are part of the model in any text. */
typedef struct attn_tokenizer_arrays {
  attn_tokenizer_spec spec;
  const char **strings; /* of tokens, then of merges */
  size_t *sizes;
  int32_t *types;
  float *scores;
  attn_text text;
} attn_tokenizer_arrays;
attn_status attn_tokenizer_describe(const attn_tokenizer *tokenizer, int64_t count,
                                    attn_tokenizer_arrays *arrays);
void attn_tokenizer_arrays_free(attn_tokenizer_arrays *arrays);

/* Writes such arrays as a tokenizer.json; the scores of "llama" become merges. */
attn_status attn_tokenizer_save(const attn_tokenizer_spec *spec, const char *path);

/* Token ids in a buffer that grows. Starts as {0}. */
typedef struct attn_tokens {
  int32_t *ids;
  size_t count, capacity;
} attn_tokens;
void attn_tokens_free(attn_tokens *tokens);

/* `flags`: see attn/text.h. Added tokens that are not special are always found.
 *
 * Appends the ids of `size` bytes of text. After an error the count is what it was.
 * ATTN_UNSUPPORTED when a pattern of the tokenizer takes more steps on this text than is sane. */
attn_status attn_tokenizer_encode(const attn_tokenizer *tokenizer, const char *text, size_t size,
                                  unsigned flags, attn_tokens *tokens);

/* Appends the bytes of `count` ids (flags: attn/text.h). A token may end inside a UTF-8 sequence,
 * which the next ones complete: bytes are passed on as they are, and a part that stays incomplete
 * is the caller's to show (src/base/utf8.h). So a stream is decoded by calls with one id, the first
 * with ATTN_DECODE_START. ATTN_INVALID_ARGUMENT for an id that is no token. */
attn_status attn_tokenizer_decode(const attn_tokenizer *tokenizer, const int32_t *ids, size_t count,
                                  unsigned flags, attn_text *text);

/* How many tokens ATTN_ENCODE_ENDS puts behind a text. */
size_t attn_tokenizer_suffix(const attn_tokenizer *tokenizer);
/* One more than the largest id; some below it may be no token. */
int64_t attn_tokenizer_count(const attn_tokenizer *tokenizer);
/* The string as the file states it (borrowed, with *size bytes), or NULL when the id is no token.
 */
const char *attn_tokenizer_string(const attn_tokenizer *tokenizer, int64_t id, size_t *size);
/* The id of such a string, or -1. */
int32_t attn_tokenizer_find(const attn_tokenizer *tokenizer, const char *string, size_t size);
/* Whether the id is a special (control) token. */
bool attn_tokenizer_is_special(const attn_tokenizer *tokenizer, int64_t id);

#endif
