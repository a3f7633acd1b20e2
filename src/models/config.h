/* Model configurations: a Hugging Face style config.json, read by the family that its model_type
 * names (families/). docs/configuration.md lists the keys. */
#ifndef ATTN_MODELS_CONFIG_H
#define ATTN_MODELS_CONFIG_H

#include "layers/layers.h"
#include "mixers/mixer.h"

#include <jansson.h>

/* Bounds that keep every product of sizes within int64 and a hostile file from being believed. */
enum {
  ATTN_MOST_LAYERS = 4096,
  ATTN_MOST_HIDDEN = 1 << 20,
  ATTN_MOST_WIDTH = 1 << 22,
  ATTN_MOST_VOCABULARY = 1 << 24,
  ATTN_MOST_EXPERTS = 1 << 16 /* in all layers together */
};

typedef struct attn_family attn_family;

typedef enum attn_norm { ATTN_NORM_RMS = 0, ATTN_NORM_SRMS, ATTN_NORM_LAYER } attn_norm;

/* The mixture of experts of a layer; routing.experts is 0 where the feed-forward is dense. */
typedef struct attn_experts_config {
  attn_routing routing;
  int64_t width;        /* of an expert */
  int64_t shared_width; /* of the expert that every token goes to; 0: none */
  bool shared_gate;     /* whose answer is multiplied by sigmoid(x w^T) */
  bool correction;      /* scores are corrected by a bias when experts are chosen */
} attn_experts_config;

/* keep (.) residual + add (.) what was computed; {0, 0} is {1, 1}. */
typedef struct attn_residual {
  double keep, add;
} attn_residual;

typedef struct attn_layer_config {
  const attn_mixer *mixer;
  attn_mixer_options options;
  attn_experts_config experts;
  attn_residual mixed, fed; /* of the mixer, of the feed-forward */
} attn_layer_config;

typedef struct attn_model_config {
  json_t *json; /* as read: what is written again */
  char type[64];
  const attn_family *family;
  int64_t vocabulary, hidden, layer_count;
  attn_layer_config *layers;
  attn_feed_forward feed_forward;
  int64_t feed_forward_width;
  attn_norm norm;
  double norm_epsilon;
  bool norm_offset;       /* norms multiply by 1 + weight (Gemma) */
  bool sandwich;          /* what a mixer or feed-forward gives is normalised before it is added */
  bool normed_residual;   /* it is added to the normalised x that it was computed from (MiniMax) */
  double logit_cap;       /* c tanh(z / c) on the logits; 0: none */
  bool tied;              /* the head is the embedding table */
  double embedding_scale; /* 1, or sqrt(hidden) */
  double *rope_factors;   /* that layers' options point to; NULL without */
  /* The encoder (encoder.c) instead of the decoder: */
  bool encoder;
  attn_activation activation; /* of its MLPs */
  int64_t positions;          /* rows of the table of positions */
  int64_t first_position;     /* of a text's first token in it */
  int64_t token_types;        /* rows of the table of token types; 0: none */
} attn_model_config;

/* ATTN_BAD_FORMAT names the key. `origin` stands in messages. */
attn_status attn_model_config_parse(const char *text, size_t size, const char *origin,
                                    attn_model_config *config);
/* The same of an object, whose reference is taken even on an error. */
attn_status attn_model_config_read(json_t *json, const char *origin, attn_model_config *config);
void attn_model_config_free(attn_model_config *config);

#endif
