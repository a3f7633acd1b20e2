/* libattn's own models, model_type attn_decoder, and TransNormerLLM (arXiv 2307.14995): any mixer
 * in any layer. docs/configuration.md lists the keys. */
#include "base/memory.h"
#include "base/status.h"
#include "files/json.h"
#include "models/families/family.h"

#include <math.h>
#include <string.h>

static const char *const feed_forward_names[] = {"swiglu", "sglu", "geglu", "gelu"};
static const char *const norm_names[] = {"rms", "srms", "layer"};
static const char *const schedule_names[] = {"code", "paper"};
static const char *const feature_names[] = {"softmax", "exp", "joint_softmax", "elu_plus_one",
                                            "elu"};
static const char *const memory_names[] = {"matrix", "mlp", "gated_mlp"};

/* In the order of attn_window_kind. */
static const char *const window_names[] = {"terrace", "sliding"};

static const char *const known_keys[] = {
    "model_type", "architectures", "torch_dtype", "tokenizer", "vocab_size", "hidden_size",
    "num_hidden_layers", "mixer", "mixers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "value_head_dim", "sliding_window", "rotary_dim", "rope_theta", "soft_cap",
    "use_lrpe", "lrpe_layers", "decay_schedule", "conv_size", "gate_rank", "feed_forward",
    "intermediate_size", "norm", "norm_eps", "tie_word_embeddings", "scale_embedding",
    "max_position_embeddings", "initializer_range", "transformers_version", "bos_token_id",
    "eos_token_id", "pad_token_id", "use_cache", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim",
    "use_qk_norm", "use_output_gate", "num_experts", "num_experts_per_tok", "norm_topk_prob",
    "moe_intermediate_size", "shared_expert_intermediate_size", "decoder_sparse_step", "memory_dim",
    "theta", "spike_tau", "spike_threshold", "mlp_only_layers", "feature_map", "feature_dim",
    "block_size", "window_kind", "affine_window", "rope_scaling", "rope_parameters",
    "attention_bias", "attention_output_bias", "qk_norm_eps", "memory", "memory_width",
    "memory_window", "memory_chunk", "feature_degree", "newton_schulz_steps", "relu_scores",
    /* TransNormerLLM's own names */
    "decoder_layers", "decoder_embed_dim", "decoder_attention_heads", "hidden_dim", "glu_dim",
    "no_scale_embedding", "linear_use_lrpe_list", "norm_type", "linear_act_fun", "glu_act",
    "add_bos_token", "init_std", "bias", "causal", "auto_map", "dropout"};

/* Reads an integer under the first of two names that is there. */
static attn_status integer(const json_t *json, const char *key, const char *alias,
                           attn_json_need need, int64_t least, int64_t most, int64_t *value) {
  if (alias && json_object_get(json, alias) && !json_object_get(json, key))
    return attn_json_int(json, alias, need, least, most, value);
  return attn_json_int(json, key, need, least, most, value);
}

/* The mixer of each layer: "mixers" (a list, repeated over the layers) or "mixer" (one name). */
static attn_status choose_mixer(const json_t *json, const char *fallback, int64_t layer,
                                const attn_mixer **mixer) {
  json_t *list = NULL;
  const char *name = fallback;
  int index;
  ATTN_TRY(attn_json_array(json, "mixers", ATTN_OPTIONAL, &list));
  if (list) {
    if (json_array_size(list) == 0) return attn_fail(ATTN_BAD_FORMAT, "mixers: the list is empty");
    name = json_string_value(json_array_get(list, (size_t)layer % json_array_size(list)));
    if (!name) return attn_fail(ATTN_BAD_FORMAT, "mixers: expected a list of names");
  } else {
    ATTN_TRY(attn_json_string(json, "mixer", ATTN_OPTIONAL, &name));
  }
  attn_status status = attn_mixer_find(name, &index);
  if (status != ATTN_OK) return attn_fail_in(ATTN_BAD_FORMAT, "mixer");
  *mixer = attn_mixer_at(index);
  return ATTN_OK;
}

/* LRPE: a flag for all layers, or a list of 0, 1, true or false with one entry a layer. */
static attn_status choose_lrpe(const json_t *json, int64_t layer, bool *lrpe) {
  json_t *list = NULL;
  ATTN_TRY(attn_json_bool(json, "use_lrpe", ATTN_OPTIONAL, lrpe));
  ATTN_TRY(attn_json_array(json, "lrpe_layers", ATTN_OPTIONAL, &list));
  if (!list) ATTN_TRY(attn_json_array(json, "linear_use_lrpe_list", ATTN_OPTIONAL, &list));
  if (!list) return ATTN_OK;
  json_t *entry = json_array_get(list, (size_t)layer);
  if (!entry || !(json_is_boolean(entry) || json_is_integer(entry)))
    return attn_fail(ATTN_BAD_FORMAT, "lrpe_layers: expected one 0 or 1 for each layer");
  *lrpe = json_is_true(entry) || json_integer_value(entry) > 0;
  return ATTN_OK;
}

static attn_status read_layer(const json_t *json, int64_t layer, const attn_mixer_options *common,
                              bool transnormer, attn_layer_config *out) {
  out->options = *common;
  out->options.layer = layer;
  out->options.lrpe = transnormer && layer == 0; /* the paper's default */
  ATTN_TRY(choose_mixer(json, "lightning", layer, &out->mixer));
  if (out->options.qk_norm) /* whose epsilon is not that of the mixers' other norms */
    ATTN_TRY(
        attn_json_double(json, "qk_norm_eps", ATTN_OPTIONAL, 0, 1, &out->options.norm_epsilon));
  return choose_lrpe(json, layer, &out->options.lrpe);
}

/* Numbers that all layers share; each mixer takes what it knows. */
static attn_status read_options(const json_t *json, attn_model_config *c, attn_mixer_options *o) {
  int window = ATTN_WINDOW_TERRACE;
  int schedule = ATTN_SCHEDULE_CODE, features = ATTN_FEATURES_DEFAULT - 1; /* in feature_names */
  int memory = ATTN_MEMORY_DEFAULT - 1;                                    /* in memory_names */
  int64_t steps = -1;
  ATTN_TRY(integer(json, "num_attention_heads", "decoder_attention_heads", ATTN_OPTIONAL, 1,
                   1 << 14, &o->heads));
  ATTN_TRY(integer(json, "num_key_value_heads", NULL, ATTN_OPTIONAL, 1, 1 << 14, &o->kv_heads));
  ATTN_TRY(integer(json, "head_dim", NULL, ATTN_OPTIONAL, 1, 256, &o->dim));
  ATTN_TRY(integer(json, "value_head_dim", NULL, ATTN_OPTIONAL, 1, 256, &o->value_dim));
  ATTN_TRY(integer(json, "sliding_window", NULL, ATTN_OPTIONAL, 0, INT32_MAX, &o->window));
  ATTN_TRY(integer(json, "rotary_dim", NULL, ATTN_OPTIONAL, -1, 256, &o->rotary_dim));
  ATTN_TRY(integer(json, "conv_size", NULL, ATTN_OPTIONAL, 1, 16, &o->convolution));
  ATTN_TRY(integer(json, "gate_rank", NULL, ATTN_OPTIONAL, 1, ATTN_MOST_HIDDEN, &o->gate_rank));
  ATTN_TRY(integer(json, "kv_lora_rank", NULL, ATTN_OPTIONAL, 1, 1024, &o->latent_rank));
  ATTN_TRY(integer(json, "q_lora_rank", NULL, ATTN_OPTIONAL, 1, ATTN_MOST_HIDDEN, &o->query_rank));
  ATTN_TRY(integer(json, "qk_rope_head_dim", NULL, ATTN_OPTIONAL, 1, 256, &o->shared_dim));
  ATTN_TRY(integer(json, "block_size", NULL, ATTN_OPTIONAL, 1, 1 << 16, &o->block));
  ATTN_TRY(integer(json, "feature_dim", NULL, ATTN_OPTIONAL, 1, 256, &o->feature_dim));
  ATTN_TRY(integer(json, "memory_dim", NULL, ATTN_OPTIONAL, 1, 1024, &o->memory_dim));
  ATTN_TRY(attn_json_double(json, "theta", ATTN_OPTIONAL, 1, 1e9, &o->theta));
  ATTN_TRY(attn_json_double(json, "spike_tau", ATTN_OPTIONAL, 1, 1e9, &o->spike_tau));
  ATTN_TRY(
      attn_json_double(json, "spike_threshold", ATTN_OPTIONAL, 1e-6, 1e6, &o->spike_threshold));
  ATTN_TRY(integer(json, "memory_width", NULL, ATTN_OPTIONAL, 1, 1 << 12, &o->memory_width));
  ATTN_TRY(integer(json, "memory_window", NULL, ATTN_OPTIONAL, 1, 1 << 10, &o->memory_window));
  ATTN_TRY(integer(json, "memory_chunk", NULL, ATTN_OPTIONAL, 1, 1 << 10, &o->memory_chunk));
  ATTN_TRY(integer(json, "feature_degree", NULL, ATTN_OPTIONAL, 1, 6, &o->feature_degree));
  ATTN_TRY(integer(json, "newton_schulz_steps", NULL, ATTN_OPTIONAL, 0,
                   ATTN_NEWTON_SCHULZ_MOST_STEPS, &steps));
  ATTN_TRY(attn_json_bool(json, "use_qk_norm", ATTN_OPTIONAL, &o->qk_norm));
  ATTN_TRY(attn_json_bool(json, "use_output_gate", ATTN_OPTIONAL, &o->output_gate));
  ATTN_TRY(attn_json_bool(json, "relu_scores", ATTN_OPTIONAL, &o->relu_scores));
  ATTN_TRY(attn_family_read_rope(json, c, &o->rope, NULL));
  ATTN_TRY(attn_json_bool(json, "attention_bias", ATTN_OPTIONAL, &o->bias));
  ATTN_TRY(attn_json_bool(json, "attention_output_bias", ATTN_OPTIONAL, &o->output_bias));
  ATTN_TRY(attn_json_double(json, "soft_cap", ATTN_OPTIONAL, 0, 1e6, &o->soft_cap));
  ATTN_TRY(attn_json_choice(json, "decay_schedule", ATTN_OPTIONAL, schedule_names, 2, &schedule));
  ATTN_TRY(attn_json_choice(json, "feature_map", ATTN_OPTIONAL, feature_names,
                            sizeof feature_names / sizeof *feature_names, &features));
  ATTN_TRY(attn_json_choice(json, "window_kind", ATTN_OPTIONAL, window_names,
                            sizeof window_names / sizeof *window_names, &window));
  ATTN_TRY(attn_json_bool(json, "affine_window", ATTN_OPTIONAL, &o->affine));
  ATTN_TRY(attn_json_choice(json, "memory", ATTN_OPTIONAL, memory_names,
                            sizeof memory_names / sizeof *memory_names, &memory));
  o->memory = (attn_memory_kind)(memory + 1);
  o->newton_schulz = steps == 0 ? -1 : steps < 0 ? 0 : steps;
  o->schedule = (attn_decay_schedule)schedule;
  o->window_kind = (attn_window_kind)window;
  o->feature_map = (attn_feature_map)(features + 1);
  return ATTN_OK;
}

/* TransNormerLLM spells two of its choices negatively or differently. */
static attn_status read_scale(const json_t *json, bool transnormer, attn_model_config *c) {
  bool scale = transnormer, unscaled = !scale;
  ATTN_TRY(attn_json_bool(json, "no_scale_embedding", ATTN_OPTIONAL, &unscaled));
  scale = !unscaled;
  ATTN_TRY(attn_json_bool(json, "scale_embedding", ATTN_OPTIONAL, &scale));
  c->embedding_scale = scale ? sqrt((double)c->hidden) : 1;
  return ATTN_OK;
}

static attn_status configure(const json_t *json, attn_model_config *c) {
  char unknown[512];
  int count = (int)(sizeof known_keys / sizeof *known_keys);
  if (attn_json_unknown(json, known_keys, count, unknown, sizeof unknown))
    return attn_fail(ATTN_BAD_FORMAT, "unknown keys: %s", unknown);
  bool transnormer = strncmp(c->type, "transnormer", 11) == 0;
  ATTN_TRY(
      integer(json, "vocab_size", NULL, ATTN_REQUIRED, 2, ATTN_MOST_VOCABULARY, &c->vocabulary));
  ATTN_TRY(integer(json, "hidden_size", "decoder_embed_dim", ATTN_REQUIRED, 1, ATTN_MOST_HIDDEN,
                   &c->hidden));
  ATTN_TRY(integer(json, "num_hidden_layers", "decoder_layers", ATTN_REQUIRED, 1, ATTN_MOST_LAYERS,
                   &c->layer_count));
  /* 8/3 of the width, to a multiple of 32: a gated block of 4x the parameters of one matrix */
  c->feed_forward_width = (c->hidden * 8 / 3 + 31) / 32 * 32;
  ATTN_TRY(integer(json, "intermediate_size", "glu_dim", ATTN_OPTIONAL, 1, ATTN_MOST_WIDTH,
                   &c->feed_forward_width));
  int feed_forward = transnormer ? ATTN_SGLU : ATTN_SWIGLU;
  int norm = transnormer ? ATTN_NORM_SRMS : ATTN_NORM_RMS;
  ATTN_TRY(
      attn_json_choice(json, "feed_forward", ATTN_OPTIONAL, feed_forward_names, 4, &feed_forward));
  ATTN_TRY(attn_json_choice(json, "norm", ATTN_OPTIONAL, norm_names, 3, &norm));
  c->feed_forward = (attn_feed_forward)feed_forward;
  c->norm = (attn_norm)norm;
  c->norm_epsilon = 1e-6;
  ATTN_TRY(attn_json_double(json, "norm_eps", ATTN_OPTIONAL, 0, 1, &c->norm_epsilon));
  c->tied = !transnormer;
  ATTN_TRY(attn_json_bool(json, "tie_word_embeddings", ATTN_OPTIONAL, &c->tied));
  ATTN_TRY(read_scale(json, transnormer, c));

  attn_mixer_options common = {.hidden = c->hidden, .layers = c->layer_count};
  ATTN_TRY(read_options(json, c, &common));
  c->layers = attn_alloc_array((size_t)c->layer_count, sizeof *c->layers);
  if (!c->layers) return ATTN_OUT_OF_MEMORY;
  for (int64_t l = 0; l < c->layer_count; ++l)
    ATTN_TRY(read_layer(json, l, &common, transnormer, &c->layers[l]));
  if (json_object_get(json, "num_experts_per_tok") && !json_object_get(json, "num_experts"))
    return attn_fail(ATTN_BAD_FORMAT, "num_experts_per_tok without num_experts");
  return attn_family_read_qwen_experts(json, c);
}

const attn_family attn_family_native = {
    .types = (const char *const[]){"attn_decoder", "transnormerllm", "transnormer", NULL},
    .configure = configure};
