/* The text of a model: its tokenizer, the tokens that end a text, and its way of writing a chat.
 *
 * A model whose files have no tokenizer reads and writes bytes: token = byte. */
#ifndef ATTN_TEXT_H
#define ATTN_TEXT_H

#include "attn/model.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
  /* Special tokens written in the text ("<|im_end|>") become those tokens. Without this they are
   * text like any other, which is what untrusted text needs. */
  ATTN_ENCODE_SPECIAL = 1,
  /* Adds what the tokenizer puts around a text: BOS, EOS, [CLS], [SEP]. */
  ATTN_ENCODE_ENDS = 2
};

/* The tokens of `size` bytes of text. Writes the first `capacity` of them to `tokens`, which may be
 * NULL when capacity is 0; *count receives how many there are. */
ATTN_API attn_status attn_model_encode(const attn_model *model, const char *text, size_t size,
                                       unsigned flags, int32_t *tokens, int64_t capacity,
                                       int64_t *count);

enum {
  ATTN_DECODE_SKIP_SPECIAL = 1, /* special tokens give nothing */
  ATTN_DECODE_START = 2 /* the tokens begin a text: a space that encoding put in front is dropped */
};

/* The bytes of `count` tokens, as above. One token may end inside a UTF-8 sequence that the next
 * ones complete. ATTN_INVALID_ARGUMENT for a number that is no token. */
ATTN_API attn_status attn_model_decode(const attn_model *model, const int32_t *tokens,
                                       int64_t count, unsigned flags, char *text, size_t capacity,
                                       size_t *size);

/* Whether a text ends with this token: end of text, or end of a turn of a chat. */
ATTN_API bool attn_model_is_end(const attn_model *model, int32_t token);

typedef struct attn_message {
  const char *role; /* "system", "user", "assistant" */
  const char *content;
} attn_message;

/* The tokens of a chat up to where the assistant is to write, as the model's chat template has
 * them; written as by attn_model_encode. Roles are written by the template alone: special tokens in
 * a content stay text. ATTN_UNSUPPORTED when the model has no template, or one that is not
 * recognised (ChatML, Llama 3, Gemma, Mistral, Zephyr, Phi 3, DeepSeek-V2 and V3, and Kimi are). */
ATTN_API attn_status attn_model_encode_chat(const attn_model *model, const attn_message *messages,
                                            int count, int32_t *tokens, int64_t capacity,
                                            int64_t *written);
/* The name of the recognised template ("chatml"), or NULL. */
ATTN_API const char *attn_model_chat_template(const attn_model *model);

#ifdef __cplusplus
}
#endif
#endif
