/* A family of models: how its config.json maps to the decoder host, and what its checkpoints call
 * the host's parameters. One file of this folder each; docs/families.md tells how to add one. */
#ifndef ATTN_MODELS_FAMILY_H
#define ATTN_MODELS_FAMILY_H

#include "files/gguf.h"
#include "models/config.h"

/* A name in three places; parts of a layer begin with a dot ("model.layers.N" or "blk.N" stands
 * before it). What follows in a name, as "weight" or "bias", is the same everywhere. */
typedef struct attn_family_name {
  const char *host;       /* the decoder's own: "model.norm.", ".token_mixer.q_proj." */
  const char *checkpoint; /* of safetensors: ".self_attn.q_proj." */
  const char *gguf;       /* ".attn_q." */
} attn_family_name;

struct attn_family {
  const char *const *types;         /* model_type of config.json, then NULL */
  const char *const *architectures; /* general.architecture of GGUF, then NULL; NULL: none */
  /* Fills in everything but json and type. ATTN_BAD_FORMAT, ATTN_UNSUPPORTED name the key. */
  attn_status (*configure)(const json_t *json, attn_model_config *config);
  const attn_family_name *names; /* the last has no host; NULL: the host's own names */
  /* In GGUF the rows of queries and keys have rotated channels j and j + dim / 2 side by side. */
  bool gguf_pairs_together;
  const char *layers;          /* before a layer's number in safetensors; NULL: "model.layers." */
  const char *const *prefixes; /* that may stand before all names there, then NULL; NULL: none */
  bool gamma_beta; /* norms' weight and bias may be called gamma and beta there, as TensorFlow had
                    * them */
  const char *const *left; /* beginnings of names, without prefix, of tensors that are not needed,
                            * then NULL; NULL: none */
};

/* ATTN_UNSUPPORTED lists what there is. */
attn_status attn_family_find(const char *type, const attn_family **family);
/* The same by general.architecture of GGUF. */
attn_status attn_family_find_architecture(const char *architecture, const attn_family **family);

/* The name of a host's parameter in the family's safetensors. */
void attn_family_checkpoint_name(const attn_family *family, const char *host, char *name,
                                 size_t size);
/* The same in GGUF; false: it has none. */
bool attn_family_gguf_name(const attn_family *family, const char *host, char *name, size_t size);

/* A name of safetensors without what may stand before it. */
const char *attn_family_without_prefix(const attn_family *family, const char *name);
/* Whether a tensor of safetensors is one that the family does without. */
bool attn_family_leaves(const attn_family *family, const char *name);

/* A GGUF file's metadata as the config.json of its family (gguf.c). */
attn_status attn_family_config_from_gguf(const attn_gguf *file, json_t **config);

/* Helpers for `configure`. */

/* Checks the sizes that every config has: vocab_size, hidden_size, num_hidden_layers,
 * intermediate_size. */
attn_status attn_family_read_sizes(const json_t *json, attn_model_config *config);
/* Layers with `options` as the mixer's; options->layer counts. */
attn_status attn_family_make_layers(attn_model_config *config, const char *mixer,
                                    const attn_mixer_options *options);
/* rope_theta, and rope_scaling or rope_parameters; factors are the configuration's. */
attn_status attn_family_read_rope(const json_t *json, attn_model_config *config, attn_rope *rope);

#endif
