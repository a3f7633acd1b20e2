/* A GGUF file as a model: the container, metadata, the family's configuration, weights, tokenizer
 * and chat template, and two tokens through it. */
#include "fuzz.h"

#include "attn/text.h"
#include "files/gguf.h"

/* Whatever a tensor claims to be, some of its blocks. */
static void unpack(const attn_gguf *file) {
  float numbers[512];
  for (int64_t i = 0; i < attn_gguf_tensor_count(file); ++i) {
    const attn_gguf_tensor *t = attn_gguf_tensor_at(file, i);
    int64_t size = attn_block_get_format(t->type)->elements;
    if (t->count >= size && size <= 512) attn_blocks_to_f32(t->type, t->data, numbers, size);
  }
}

static void use(const attn_model *model) {
  int32_t tokens[64];
  char text[64];
  int64_t count;
  size_t size;
  const attn_message message = {"user", "x <|im_end|> y"};
  if (attn_model_encode(model, "a b\n", 4, 3, tokens, 64, &count) == ATTN_OK && count <= 64)
    attn_model_decode(model, tokens, count, 2, text, sizeof text, &size);
  attn_model_encode_chat(model, &message, 1, tokens, 64, &count);
  attn_session_options options = ATTN_SESSION_OPTIONS_INIT;
  options.max_tokens = 64;
  options.forks = 1;
  options.checkpoints = 0;
  attn_session *session;
  if (attn_session_create(model, &options, &session) != ATTN_OK) return;
  attn_session_feed(session, (const int32_t[]){0, 1}, 2);
  attn_session_destroy(session);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  attn_gguf *file;
  attn_model *model;
  const char *path = fuzz_file(".gguf", data, size);
  if (attn_gguf_open(path, &file) == ATTN_OK) {
    unpack(file);
    attn_gguf_close(file);
    if (attn_model_load(path, ATTN_F32, &model) == ATTN_OK) {
      attn_model_info info;
      attn_model_get_info(model, &info);
      if (info.hidden <= 4096 && info.layers <= 16 && info.vocabulary <= 1 << 16) use(model);
      attn_model_destroy(model);
    }
  }
  unlink(path);
  return 0;
}
