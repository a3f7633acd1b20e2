/* The default model: small enough to be trained in minutes on two cores, and for its weights in
 * bfloat16 to stay below 8 MB. Only the first layer has LRPE, as in TransNormerLLM. */
#include "attn/training.h"

const char *attn_training_default_config(void) {
  return "{\n"
         "  \"model_type\": \"attn_decoder\",\n"
         "  \"vocab_size\": 256,\n"
         "  \"hidden_size\": 256,\n"
         "  \"num_hidden_layers\": 6,\n"
         "  \"mixer\": \"lightning\",\n"
         "  \"num_attention_heads\": 4,\n"
         "  \"head_dim\": 64,\n"
         "  \"feed_forward\": \"swiglu\",\n"
         "  \"intermediate_size\": 384,\n"
         "  \"norm\": \"rms\",\n"
         "  \"tie_word_embeddings\": true\n"
         "}\n";
}
