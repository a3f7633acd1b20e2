/* A config.json of any family; and where each parameter of its mixers is kept. */
#include "fuzz.h"

#include "mixers/shared/state.h"
#include "models/config.h"
#include "models/families/family.h"
#include "models/quantization.h"

#include <stdio.h>
#include <stdlib.h>

enum { MOST_LAYERS = 8 };

static void place(const attn_model_config *config, int64_t layer, attn_parameter_shape shape,
                  bool in_gguf) {
  char name[160];
  attn_place place;
  snprintf(name, sizeof name, "model.layers.%lld.token_mixer.%s", (long long)layer, shape.name);
  shape.name = name;
  if (attn_family_place(config, &shape, in_gguf, &place) != ATTN_OK) return;
  if (attn_row_map_at(&place.rows, 0) < 0) abort();
  if (attn_row_map_at(&place.rows, shape.shape[0] - 1) < 0) abort();
}

static void look_at_layer(const attn_model_config *config, int64_t l) {
  const attn_layer_config *layer = &config->layers[l];
  attn_parameter_shape shapes[ATTN_MIXER_PARAMETERS];
  attn_state_part parts[ATTN_STATE_PARTS];
  int count = layer->mixer->parameters(&layer->options, shapes);
  if (count < 1 || count > ATTN_MIXER_PARAMETERS) abort();
  for (int i = 0; i < 2 * count; ++i) place(config, l, shapes[i / 2], i % 2);
  for (int i = 0; i < count; ++i)
    if (shapes[i].shape[0] < 1 || (shapes[i].rank == 2 && shapes[i].shape[1] < 1)) abort();
  if (layer->mixer->state(&layer->options, ATTN_F32, parts) > ATTN_STATE_PARTS) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  attn_model_config config;
  if (attn_model_config_parse((const char *)data, size, "fuzz", &config) != ATTN_OK) return 0;
  attn_quantization quantization;
  if (attn_quantization_read(config.json, &quantization) == ATTN_OK && quantization.block_rows &&
      (quantization.block_rows < 1 || quantization.block_columns < 1))
    abort();
  for (int64_t l = 0; l < config.layer_count && l < MOST_LAYERS; ++l) look_at_layer(&config, l);
  attn_model_config_free(&config);
  return 0;
}
