/* How a model's texts are embedded, as the files of sentence-transformers or the metadata of a GGUF
 * file say it. */
#ifndef ATTN_MODELS_EMBEDDING_H
#define ATTN_MODELS_EMBEDDING_H

#include "attn/embedding.h"
#include "models/source.h"

typedef struct attn_embedding_config {
  attn_pooling pooling;
  bool normalize;
  int64_t most_tokens;   /* 0: no limit */
  char unsupported[256]; /* what the files ask for and libattn lacks; "": nothing */
} attn_embedding_config;

/* From modules.json and the folders that it names, sentence_bert_config.json and
 * tokenizer_config.json, or from GGUF. What is not offered only stands in `unsupported`: a model
 * may be good for other things. */
attn_status attn_embedding_config_load(const attn_source *source, const attn_model_config *model,
                                       attn_embedding_config *config);

#endif
