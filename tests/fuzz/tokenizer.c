/* A tokenizer.json, and a text through it and back. */
#include "fuzz.h"

#include "files/tokenizer.h"

#include <string.h>

static const char text[] =
    "Hello, w\xc3\xb6rld!  12345\n\t\xe4\xbd\xa0\xff\xf0\x9f\x98\x80 <s> it's cafe\xcc\x81 "
    "\xef\xac\x81\xe0\xa4\x95\xe0\xa5\x8d\xe0\xa5\x98\r\n";

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  attn_tokenizer *tokenizer;
  const char *path = fuzz_file(".json", data, size);
  if (attn_tokenizer_load(path, &tokenizer) == ATTN_OK) {
    attn_tokens tokens = {0};
    attn_text back = {0};
    if (attn_tokenizer_encode(tokenizer, text, strlen(text), 3, &tokens) == ATTN_OK)
      attn_tokenizer_decode(tokenizer, tokens.ids, tokens.count, 2, &back);
    attn_text_free(&back);
    attn_tokens_free(&tokens);
    attn_tokenizer_destroy(tokenizer);
  }
  unlink(path);
  return 0;
}
