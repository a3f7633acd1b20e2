/* A family of models: how its config.json maps to the decoder host, and what its checkpoints call
 * the host's parameters. One file of this folder each; docs/families.md tells how to add one. */
#ifndef ATTN_MODELS_FAMILY_H
#define ATTN_MODELS_FAMILY_H

#include "files/gguf_write.h"
#include "models/config.h"

/* A name in three places; parts of a layer begin with a dot ("model.layers.N" or "blk.N" stands
 * before it). '#' is a number, that of an expert; a file's name without it is of one tensor with
 * all of them. What follows in a name, as "weight" or "bias", is the same everywhere. */
typedef struct attn_family_name {
  const char *host;       /* the decoder's own: "model.norm.", ".token_mixer.q_proj." */
  const char *checkpoint; /* of safetensors: ".self_attn.q_proj." */
  const char *gguf;       /* ".attn_q." */
} attn_family_name;

/* Names in layers of one mixer. */
typedef struct attn_mixer_names {
  const char *mixer;
  const attn_family_name *names;
} attn_mixer_names;

/* Which rows of a stored tensor are a parameter's. Row r is first looked for in its order within
 * heads (`head` rows, of which those from `turned_from` on are stored with the two that turn
 * together side by side; 0: as here), then in runs of `run` rows that begin every `period` rows (0:
 * one run), and `offset` rows further. */
typedef struct attn_row_map {
  int64_t head, turned_from, run, period, offset;
  bool part; /* of a tensor that holds rows of others too */
} attn_row_map;
int64_t attn_row_map_at(const attn_row_map *map, int64_t r);

/* Axes of 1 that safetensors have and parameters have not. */
typedef enum attn_axes {
  ATTN_AXES_SAME = 0,
  ATTN_AXES_CONVOLUTION, /* [channels, 1, taps] */
  ATTN_AXES_HEADS,       /* [1, 1, heads, 1] */
} attn_axes;

/* Where a file keeps a parameter, and how. */
enum { ATTN_PLACE_NAME = 192 };
typedef struct attn_place {
  char name[ATTN_PLACE_NAME];
  attn_row_map rows;
  int64_t transposed; /* each head of so many rows is stored as columns; 0: none */
  bool negative_exp;  /* -exp(value) is stored */
  attn_axes axes;
  int64_t heads; /* the tensor has an axis of so many in front of its rows; 0: it has not */
} attn_place;

/* By whose names. Older GGUF files have other tensors than newer ones in some places. */
typedef enum attn_naming {
  ATTN_IN_SAFETENSORS,
  ATTN_IN_GGUF,
  ATTN_IN_OLDER_GGUF,
} attn_naming;

/* A key of GGUF below the architecture ("block_count") and the one of config.json that it becomes.
 */
typedef enum attn_gguf_kind { ATTN_GGUF_INTEGER, ATTN_GGUF_REAL, ATTN_GGUF_FLAG } attn_gguf_kind;
typedef struct attn_gguf_field {
  const char *gguf, *config;
  attn_gguf_kind kind;
  attn_json_need need;
} attn_gguf_field;

struct attn_family {
  const char *const *types;         /* model_type of config.json, then NULL */
  const char *const *architectures; /* general.architecture of GGUF, then NULL; NULL: none */
  /* Fills in everything but json and type. ATTN_BAD_FORMAT, ATTN_UNSUPPORTED name the key. */
  attn_status (*configure)(const json_t *json, attn_model_config *config);
  const attn_family_name *names;       /* the last has no host; NULL: the host's own names */
  const attn_mixer_names *mixer_names; /* looked into first; the last has no mixer; NULL: none */
  /* Changes `place`, the whole tensor in its order, for parts of layers that are stored otherwise;
   * NULL: there are none. */
  void (*store)(const attn_model_config *config, int64_t layer, const char *part,
                attn_naming naming, attn_place *place);
  /* Whether a stored tensor may be left unused; NULL: none but `left` and those that load.c knows.
   */
  bool (*leaves)(const attn_model_config *config, const char *name);
  /* What GGUF files leave unsaid, as JSON text; NULL: nothing. */
  const char *gguf_defaults;
  /* Where an architecture is that of several families: whether the file is of this one. */
  bool (*gguf_takes)(const attn_gguf *file);
  const attn_gguf_field *gguf_fields; /* beside the common ones; the last has no gguf */
  /* Makes what the fields gave the config.json that it stands for. NULL `file`: it is about to be
   * written. NULL: there is nothing to do. */
  attn_status (*gguf_complete)(const attn_gguf *file, json_t *config);
  /* The way back: adds to `config` what the fields are written from. NULL: they are all there. */
  attn_status (*gguf_say)(const attn_model_config *model, json_t *config);
  const attn_family_name *gguf_older; /* looked into first for ATTN_IN_OLDER_GGUF */
  bool gguf_own_heads;                /* gguf_complete checks the widths of heads */
  bool gguf_mscale; /* YaRN's yarn_log_multiplier is a tenth of mscale and mscale_all_dim */
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
attn_status attn_family_find_architecture(const char *architecture, const attn_gguf *file,
                                          const attn_family **family);

/* Where the family's safetensors, or its GGUF files, keep the parameter that the host calls
 * shape->name (names.c). ATTN_UNSUPPORTED: GGUF files have no name for it. */
attn_status attn_family_place(const attn_model_config *config, const attn_parameter_shape *shape,
                              attn_naming naming, attn_place *place);

/* A name of safetensors without what may stand before it. */
const char *attn_family_without_prefix(const attn_family *family, const char *name);
/* Whether a tensor of safetensors is one that the family does without. */
bool attn_family_leaves(const attn_model_config *config, const char *name);

/* A GGUF file's metadata as the config.json of its family (gguf.c). */
attn_status attn_family_config_from_gguf(const attn_gguf *file, json_t **config);

/* The i-th of the fields that a family's files may have; NULL beyond the last. */
const attn_gguf_field *attn_family_gguf_field(const attn_family *family, size_t i);
/* The way back (gguf_write.c): the keys of a model in a GGUF file. ATTN_UNSUPPORTED when they would
 * not make the same configuration again. */
attn_status attn_family_config_to_gguf(const attn_model_config *config, attn_gguf_draft *draft);
/* Of the tensor rope_freqs.weight; 0: there is none. */
int64_t attn_family_rope_count(const attn_model_config *config);
void attn_family_rope_factors(const attn_model_config *config, float *factors);

/* Helpers for `configure`. */

/* Checks the sizes that every config has: vocab_size, hidden_size, num_hidden_layers,
 * intermediate_size. */
attn_status attn_family_read_sizes(const json_t *json, attn_model_config *config);
/* Layers with `options` as the mixer's; options->layer counts. */
attn_status attn_family_make_layers(attn_model_config *config, const char *mixer,
                                    const attn_mixer_options *options);
/* rope_theta, and rope_scaling or rope_parameters; factors are the configuration's. *part, the part
 * of a head that turns, is read too, or (NULL) has to be 1. */
attn_status attn_family_read_rope(const json_t *json, attn_model_config *config, attn_rope *rope,
                                  double *part);
/* What Llama and its relatives have in common: sizes, SwiGLU without biases, RMSNorm, heads,
 * rotary positions (llama.c). `part` as above; NULL `options`: no attention is read. */
attn_status attn_family_read_llama(const json_t *json, attn_model_config *config,
                                   attn_mixer_options *options, double *part);
/* Which layers see a window only: those that layer_types says, or all from layer `from` on. */
attn_status attn_family_set_windows(const json_t *json, attn_model_config *config, int64_t window,
                                    int64_t from);
/* Gives the layers that layer_types calls linear_attention (without it: all but every interval-th)
 * another mixer than the full_attention that they have. */
attn_status attn_family_set_linear(const json_t *json, attn_model_config *config, const char *mixer,
                                   const attn_mixer_options *options, int64_t interval);
/* Multi-head latent attention of DeepSeek and Kimi: sizes; names; and rows, with `interleaved`
 * those that turn together side by side (deepseek.c). */
attn_status attn_family_read_mla(const json_t *json, attn_model_config *config,
                                 attn_mixer_options *options);
extern const attn_family_name attn_family_mla_names[], attn_family_mla_older_names[];
/* Of what GGUF's keys gave: the widths of heads as config.json has them. */
attn_status attn_family_complete_mla(json_t *config);
void attn_family_mla_store(const attn_mixer_options *options, const char *part, bool interleaved,
                           attn_naming naming, attn_place *place);
/* Their experts, scored by sigmoid with a correction (V3) or by softmax. */
attn_status attn_family_read_deepseek_experts(const json_t *json, bool by_sigmoid,
                                              attn_experts_config *experts);
/* layer_types as a GGUF file's tensors tell them (qwen3_next.c). */
json_t *attn_family_linear_layers(const attn_gguf *file, const json_t *config);
/* The experts of Qwen's models, in the layers that decoder_sparse_step and mlp_only_layers leave to
 * them (qwen_moe.c). */
attn_status attn_family_read_qwen_experts(const json_t *json, attn_model_config *config);

#endif
