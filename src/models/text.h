/* A model's text: loaded from the same source as its weights. */
#ifndef ATTN_MODELS_TEXT_H
#define ATTN_MODELS_TEXT_H

#include "attn/text.h"
#include "files/gguf_write.h"
#include "files/tokenizer.h"
#include "models/source.h"

enum { ATTN_MOST_ENDS = 16 };

typedef enum attn_chat_format {
  ATTN_CHAT_NONE = 0, /* no template */
  ATTN_CHAT_UNKNOWN,  /* one that is not recognised */
  ATTN_CHAT_CHATML,
  ATTN_CHAT_LLAMA3,
  ATTN_CHAT_GEMMA,
  ATTN_CHAT_MISTRAL,
  ATTN_CHAT_ZEPHYR,
  ATTN_CHAT_PHI3,
  ATTN_CHAT_DEEPSEEK2,
  ATTN_CHAT_DEEPSEEK3,
  ATTN_CHAT_KIMI,
  ATTN_CHAT_FORMATS
} attn_chat_format;

typedef struct attn_model_text {
  attn_tokenizer *tokenizer; /* NULL: bytes */
  int end_count;
  int32_t ends[ATTN_MOST_ENDS];
  attn_chat_format chat;
  char *system; /* what the template says when a chat has no system message; NULL: nothing */
} attn_model_text;

/* The vocabulary of a GGUF file, whose strings `spec` points into. Starts with
 * ATTN_TOKENIZER_SPEC_INIT and is freed also after an error. */
typedef struct attn_gguf_vocabulary {
  attn_tokenizer_spec spec;
  char model[32], pre[64];
  int32_t *types;
  float *scores;
} attn_gguf_vocabulary;
bool attn_gguf_has_vocabulary(const attn_gguf *file); /* or says that there is none */
attn_status attn_gguf_vocabulary_read(const attn_gguf *file, attn_gguf_vocabulary *vocabulary);
void attn_gguf_vocabulary_free(attn_gguf_vocabulary *vocabulary);

attn_status attn_model_text_load(const attn_source *source, attn_model_text *text);
void attn_model_text_free(attn_model_text *text);

/* Appends the tokens of a text (flags: attn/text.h); without a tokenizer, its bytes. */
attn_status attn_model_text_encode(const attn_model_text *text, const char *bytes, size_t size,
                                   unsigned flags, attn_tokens *tokens);
/* save_text.c: the tokenizer, its template and what is advised for sampling, beside a model's
 * weights in a directory, or as the keys tokenizer.* and general.sampling.*. They come from the
 * source that the model was loaded from; a model without one has none. */
attn_status attn_model_text_save(const attn_model *model, const char *directory);
attn_status attn_model_text_to_gguf(const attn_model *model, attn_gguf_draft *draft);

/* chat.c: which template it is, and its own system message. */
attn_status attn_chat_recognise(const char *template, size_t size, attn_model_text *text);
attn_status attn_chat_encode(const attn_model_text *text, const attn_message *messages, int count,
                             attn_tokens *tokens);

#endif
