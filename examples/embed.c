/* Embeddings: how alike are texts?
 *   example_embed [MODEL_DIRECTORY TEXT...] */
#include <attn/attn.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_TEXTS = 64, MOST_TOKENS = 1 << 16 };

static attn_status embed(const attn_model *model, int count, char **texts, float *embeddings) {
  static int32_t tokens[MOST_TOKENS];
  int64_t offsets[MOST_TEXTS + 1] = {0};
  for (int i = 0; i < count; ++i) {
    int64_t used = offsets[i], made;
    attn_status status = attn_model_encode_for_embedding(
        model, texts[i], strlen(texts[i]), tokens + used, MOST_TOKENS - used, &made, NULL);
    if (status != ATTN_OK) return status;
    if (made > MOST_TOKENS - used) return ATTN_OUT_OF_MEMORY;
    offsets[i + 1] = used + made;
  }
  attn_embedding_options options = ATTN_EMBEDDING_OPTIONS_INIT;
  options.normalize = 1; /* a product of two embeddings is then their cosine */
  return attn_model_embed(model, tokens, offsets, count, &options, embeddings);
}

int main(int argc, char **argv) {
  static const char tiny[] =
      "{\"model_type\": \"bert\", \"vocab_size\": 256, \"hidden_size\": 32, \"num_hidden_layers\":"
      " 2, \"num_attention_heads\": 2, \"intermediate_size\": 64}";
  char *const some[] = {"one text", "one test", "another"};
  char **texts = argc > 2 ? argv + 2 : (char **)some;
  int count = argc > 2 ? argc - 2 : 3;
  attn_model *model = NULL;
  attn_status status = argc > 2 ? attn_model_load(argv[1], ATTN_F32, &model)
                                : attn_model_create(tiny, 1, ATTN_F32, &model);
  int64_t size = attn_model_embedding_size(model);
  float *embeddings = malloc((size_t)(MOST_TEXTS * size + 1) * sizeof *embeddings);
  if (status == ATTN_OK && embeddings && count <= MOST_TEXTS)
    status = embed(model, count, texts, embeddings);
  for (int i = 0; status == ATTN_OK && i < count; ++i) {
    double cosine = 0;
    for (int64_t c = 0; c < size; ++c)
      cosine += (double)embeddings[c] * (double)embeddings[i * size + c];
    printf("%.4f  %s\n", cosine, texts[i]);
  }
  if (status != ATTN_OK) fprintf(stderr, "%s\n", attn_error_message());
  free(embeddings);
  attn_model_destroy(model);
  return status != ATTN_OK;
}
