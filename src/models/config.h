/* Model configurations: a Hugging Face style config.json. docs/configuration.md lists the keys. */
#ifndef ATTN_MODELS_CONFIG_H
#define ATTN_MODELS_CONFIG_H

#include "layers/layers.h"
#include "mixers/mixer.h"

#include <jansson.h>

typedef enum attn_norm { ATTN_NORM_RMS = 0, ATTN_NORM_SRMS, ATTN_NORM_LAYER } attn_norm;

typedef struct attn_layer_config {
  const attn_mixer *mixer;
  attn_mixer_options options;
} attn_layer_config;

typedef struct attn_model_config {
  json_t *json; /* as read: what is written again */
  char type[64];
  int64_t vocabulary, hidden, layer_count;
  attn_layer_config *layers;
  attn_feed_forward feed_forward;
  int64_t feed_forward_width;
  attn_norm norm;
  double norm_epsilon;
  bool tied;              /* the head is the embedding table */
  double embedding_scale; /* 1, or sqrt(hidden) */
} attn_model_config;

/* ATTN_BAD_FORMAT names the key. `origin` stands in messages. */
attn_status attn_model_config_parse(const char *text, size_t size, const char *origin,
                                    attn_model_config *config);
void attn_model_config_free(attn_model_config *config);

#endif
