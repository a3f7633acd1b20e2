/* A GGUF file as a model: the container, metadata, the family's configuration, weights, tokenizer
 * and chat template, two tokens through it, and writing it again. A file that says to be one of
 * several stands for the second of two as well. */
#include "fuzz.h"

#include "attn/text.h"
#include "files/gguf.h"

#include <string.h>

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

static void save(const attn_model *model) {
  char path[64];
  snprintf(path, sizeof path, "/tmp/attn-fuzz-%ld-again.gguf", (long)getpid());
  attn_gguf_options options = ATTN_GGUF_OPTIONS_INIT;
  for (int type = 0; type < ATTN_WEIGHT_TYPES; type += ATTN_WEIGHTS_Q8_0) {
    options.type = (attn_weight_type)type;
    attn_model *again;
    if (attn_model_save_gguf(model, path, &options) != ATTN_OK) continue;
    if (attn_model_load(path, ATTN_F32, &again) != ATTN_OK) abort(); /* what is written is read */
    attn_model_destroy(again);
  }
  unlink(path);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  attn_gguf *file;
  attn_model *model;
  char first[64];
  static const char split[] = "split.count";
  snprintf(first, sizeof first, "%s", fuzz_file("-00001-of-00002.gguf", data, size));
  const char *path = first, *second = NULL;
  if (size && memmem(data, size, split, sizeof split - 1))
    second = fuzz_file("-00002-of-00002.gguf", data, size);
  if (attn_gguf_open(path, &file) == ATTN_OK) {
    unpack(file);
    attn_gguf_close(file);
    if (attn_model_load(path, ATTN_F32, &model) == ATTN_OK) {
      attn_model_info info;
      attn_model_get_info(model, &info);
      if (info.hidden <= 4096 && info.layers <= 16 && info.vocabulary <= 1 << 16) {
        use(model);
        save(model);
      }
      attn_model_destroy(model);
    }
  }
  unlink(path);
  if (second) unlink(second);
  return 0;
}
