/* A config.json of any family. */
#include "fuzz.h"

#include "models/config.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  attn_model_config config;
  if (attn_model_config_parse((const char *)data, size, "fuzz", &config) == ATTN_OK)
    attn_model_config_free(&config);
  return 0;
}
