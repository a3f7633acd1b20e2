/* A model whose exact attention is replaced by another mixer: the same parameters where both have
 * them, fresh ones where only the new mixer does. It is of libattn's own family, which has any
 * mixer in any layer; so what that family has no key for is refused. */
#include "base/memory.h"
#include "base/status.h"
#include "models/model.h"

#include <math.h>
#include <string.h>

static attn_status refuse(const char *what) {
  return attn_fail(ATTN_UNSUPPORTED,
                   "replace_mixer: the model has %s, which cannot be kept with another mixer yet",
                   what);
}

static bool is_softmax(const attn_layer_config *layer) {
  return strcmp(layer->mixer->info.name, "softmax") == 0;
}

static bool plain_residual(const attn_residual *r) {
  return (r->keep == 0 && r->add == 0) || (r->keep == 1 && r->add == 1);
}

static bool keeps(const attn_replacement *r, int64_t layer) {
  return r->keep_every && (layer + 1) % r->keep_every == 0;
}

static attn_status check_model(const attn_model_config *c) {
  bool scaled = fabs(c->embedding_scale - sqrt((double)c->hidden)) < 1e-9;
  if (c->encoder) return refuse("an encoder");
  if (c->sandwich) return refuse("norms behind its mixers");
  if (c->normed_residual) return refuse("normalised residuals");
  if (c->norm_offset) return refuse("norms that multiply by 1 + weight");
  if (c->logit_cap > 0) return refuse("capped logits");
  if (c->embedding_scale != 1 && !scaled) return refuse("a scale of its embeddings");
  return ATTN_OK;
}

/* To the number: both were read from one place, or are the same key read again. */
static bool same_positions(const attn_mixer_options *a, const attn_mixer_options *b) {
  const attn_rope *x = &a->rope, *y = &b->rope;
  bool same = a->rotary_dim == b->rotary_dim && x->base == y->base && x->scaling == y->scaling &&
              x->factor == y->factor && x->low_factor == y->low_factor &&
              x->high_factor == y->high_factor && x->original_length == y->original_length &&
              x->magnitude == y->magnitude && x->factor_count == y->factor_count;
  for (int64_t i = 0; same && i < x->factor_count; ++i) same = x->factors[i] == y->factors[i];
  return same;
}

static attn_status check_layer(const attn_layer_config *layer, const attn_mixer_options *first) {
  const attn_mixer_options *o = &layer->options;
  if (!is_softmax(layer)) return refuse("mixers other than softmax");
  if (layer->experts.routing.experts) return refuse("experts");
  if (!plain_residual(&layer->mixed) || !plain_residual(&layer->fed))
    return refuse("factors of its residuals");
  if (o->output_gate) return refuse("gated attention");
  if (o->bidirectional) return refuse("attention both ways");
  if (o->scale != 0 && fabs(o->scale * sqrt((double)o->dim) - 1) > 1e-9)
    return refuse("a scale of its logits");
  if (o->window != first->window) return refuse("windows that differ");
  if (!same_positions(o, first)) return refuse("rotary positions that differ");
  if (o->bias != first->bias || o->output_bias != first->output_bias ||
      o->qk_norm != first->qk_norm || (o->qk_norm && o->norm_epsilon != first->norm_epsilon))
    return refuse("biases or normalised heads in some of its layers");
  if (o->value_dim != o->dim || o->heads != first->heads || o->dim != first->dim)
    return refuse("heads that differ");
  return ATTN_OK;
}

/* Heads of keys and values: as many as there are, or, for mixers that want one for every query
 * head, as many as those. */
static attn_status choose_kv_heads(const attn_mixer_options *o, const char *mixer,
                                   int64_t *kv_heads) {
  int index;
  attn_mixer_options trial = *o;
  ATTN_TRY(attn_mixer_find(mixer, &index));
  if (!attn_mixer_at(index)->heads)
    return attn_fail(
        ATTN_UNSUPPORTED,
        "replace_mixer: %s does not have attention's heads: it cannot take their place", mixer);
  *kv_heads = o->kv_heads;
  if (attn_mixer_at(index)->configure(&trial) == ATTN_OK) return ATTN_OK;
  trial = *o;
  *kv_heads = trial.kv_heads = o->heads;
  return attn_mixer_at(index)->configure(&trial);
}

/* What the model's file says of its positions, but for the part of a head that turns, which is in
 * the options. */
static void copy_positions(const attn_model_config *c, json_t *config) {
  static const char *const keys[] = {"rope_scaling", "rope_parameters"};
  if (!c->layers[0].options.rope.scaling) return;
  for (size_t i = 0; i < sizeof keys / sizeof *keys; ++i) {
    json_t *copy = json_deep_copy(json_object_get(c->json, keys[i]));
    if (!json_is_object(copy)) {
      json_decref(copy);
      continue;
    }
    json_object_del(copy, "partial_rotary_factor");
    json_object_set_new(config, keys[i], copy);
  }
  json_t *most = json_object_get(c->json, "max_position_embeddings");
  if (most) json_object_set(config, "max_position_embeddings", most);
}

/* What attention has beside its matrices, and what the new mixer is asked to have. */
static void add_options(const attn_model_config *c, const attn_replacement *r, json_t *config) {
  const attn_mixer_options *o = &c->layers[0].options;
  if (o->window) json_object_set_new(config, "sliding_window", json_integer(o->window));
  if (o->soft_cap > 0) json_object_set_new(config, "soft_cap", json_real(o->soft_cap));
  if (o->bias) json_object_set_new(config, "attention_bias", json_true());
  if (o->output_bias) json_object_set_new(config, "attention_output_bias", json_true());
  if (o->qk_norm) json_object_set_new(config, "use_qk_norm", json_true());
  if (o->qk_norm) json_object_set_new(config, "qk_norm_eps", json_real(o->norm_epsilon));
  copy_positions(c, config);
  if (r->feature_dim) json_object_set_new(config, "feature_dim", json_integer(r->feature_dim));
  if (r->window) json_object_set_new(config, "block_size", json_integer(r->window));
  if (r->window_kind == ATTN_WINDOW_SLIDING)
    json_object_set_new(config, "window_kind", json_string("sliding"));
  if (r->affine) json_object_set_new(config, "affine_window", json_true());
}

static json_t *make_config(const attn_model_config *c, const attn_replacement *r,
                           int64_t kv_heads) {
  static const char *const norms[] = {
      [ATTN_NORM_RMS] = "rms", [ATTN_NORM_SRMS] = "srms", [ATTN_NORM_LAYER] = "layer"};
  static const char *const feed_forwards[] = {[ATTN_SWIGLU] = "swiglu",
                                              [ATTN_SGLU] = "sglu",
                                              [ATTN_GEGLU] = "geglu",
                                              [ATTN_GELU_MLP] = "gelu"};
  const attn_mixer_options *o = &c->layers[0].options;
  json_t *mixers = json_array();
  for (int64_t l = 0; l < c->layer_count; ++l)
    json_array_append_new(mixers, json_string(keeps(r, l) ? "softmax" : r->mixer));
  json_t *config = json_pack(
      "{s:s, s:I, s:I, s:I, s:o, s:I, s:I, s:I, s:I, s:f, s:s, s:I, s:s, s:f, s:b, s:b}",
      "model_type", "attn_decoder", "vocab_size", (json_int_t)c->vocabulary, "hidden_size",
      (json_int_t)c->hidden, "num_hidden_layers", (json_int_t)c->layer_count, "mixers", mixers,
      "num_attention_heads", (json_int_t)o->heads, "num_key_value_heads", (json_int_t)kv_heads,
      "head_dim", (json_int_t)o->dim, "rotary_dim", (json_int_t)o->rotary_dim, "rope_theta",
      o->rope.base, "feed_forward", feed_forwards[c->feed_forward], "intermediate_size",
      (json_int_t)c->feed_forward_width, "norm", norms[c->norm], "norm_eps", c->norm_epsilon,
      "tie_word_embeddings", c->tied, "scale_embedding", c->embedding_scale != 1);
  if (config) add_options(c, r, config);
  return config;
}

/* The parameter of the same name in the host; NULL: there is none. */
static const attn_parameter *find(const attn_model *model, const char *name) {
  for (int64_t i = 0; i < model->parameter_count; ++i)
    if (strcmp(model->shapes[i].name, name) == 0) return &model->parameters[i];
  return NULL;
}

/* Rows of `from`, each head's of them `group` times. */
static attn_status copy_heads(const attn_tensor *from, int64_t dim, const attn_tensor *to) {
  int64_t group = to->shape[0] / from->shape[0];
  for (int64_t head = 0; head < to->shape[0] / dim; ++head) {
    attn_tensor source, target;
    ATTN_TRY(attn_tensor_slice(from, 0, head / group * dim, dim, &source));
    ATTN_TRY(attn_tensor_slice(to, 0, head * dim, dim, &target));
    ATTN_TRY(attn_tensor_copy(&source, &target));
  }
  return ATTN_OK;
}

static attn_status copy_parameter(const attn_parameter *from, int64_t dim,
                                  const attn_parameter *to) {
  attn_tensor plain;
  ATTN_TRY(attn_parameter_copy(from, to->value.dtype, &plain));
  const int64_t *is = plain.shape, *wanted = to->value.shape;
  bool same = plain.rank == to->value.rank && is[0] == wanted[0];
  bool heads = plain.rank >= 1 && is[0] % dim == 0 && wanted[0] % is[0] == 0;
  attn_status status = same    ? attn_tensor_copy(&plain, &to->value)
                       : heads ? copy_heads(&plain, dim, &to->value)
                               : attn_fail(ATTN_INVALID_SHAPE, "replace_mixer: %s has %lld rows",
                                           to->name, (long long)is[0]);
  attn_tensor_destroy(&plain);
  return status;
}

static attn_status copy_parameters(const attn_model *from, attn_model *to, bool *fresh) {
  int64_t dim = from->config.layers[0].options.dim;
  for (int64_t i = 0; i < to->parameter_count; ++i) {
    const attn_parameter *source = find(from, to->shapes[i].name);
    fresh[i] = !source;
    if (source) ATTN_TRY(copy_parameter(source, dim, &to->parameters[i]));
  }
  return attn_model_refresh(to);
}

/* Everything that attention has must have its place in the new mixer. */
static attn_status check_copied(const attn_model *from, const attn_model *to, const char *mixer) {
  for (int64_t i = 0; i < from->parameter_count; ++i)
    if (!find(to, from->shapes[i].name))
      return attn_fail(ATTN_UNSUPPORTED, "replace_mixer: the model has %s, which %s has not",
                       from->shapes[i].name, mixer);
  for (int64_t l = 0; l < from->config.layer_count; ++l)
    if (!same_positions(&from->config.layers[l].options, &to->config.layers[l].options) &&
        to->config.layers[l].options.rotary_dim)
      return refuse("rotary positions of its own");
  return ATTN_OK;
}

static attn_status check_replacement(const attn_replacement *r) {
  bool window = r->window || r->window_kind || r->affine;
  if (window && strcmp(r->mixer, "lolcats") != 0)
    return attn_fail(ATTN_INVALID_ARGUMENT, "replace_mixer: %s has no window: lolcats has",
                     r->mixer);
  return ATTN_OK;
}

attn_status attn_model_replace_mixer(const attn_model *from, const attn_replacement *r,
                                     uint64_t seed, attn_model **to, bool **fresh) {
  const attn_model_config *c = &from->config;
  *to = NULL;
  *fresh = NULL;
  ATTN_TRY(check_model(c));
  for (int64_t l = 0; l < c->layer_count; ++l)
    ATTN_TRY(check_layer(&c->layers[l], &c->layers[0].options));
  int64_t kv_heads;
  ATTN_TRY(choose_kv_heads(&c->layers[0].options, r->mixer, &kv_heads));
  ATTN_TRY(check_replacement(r));
  json_t *config = make_config(c, r, kv_heads);
  char *text = config ? json_dumps(config, JSON_INDENT(2)) : NULL;
  json_decref(config);
  if (!text) return attn_fail(ATTN_OUT_OF_MEMORY, "replace_mixer: out of memory");
  attn_status status = attn_model_create(text, seed, from->compute, to);
  free(text); /* from jansson */
  if (status == ATTN_OK) status = check_copied(from, *to, r->mixer);
  if (status == ATTN_OK) *fresh = attn_alloc_array((size_t)(*to)->parameter_count, sizeof **fresh);
  if (status == ATTN_OK && !*fresh) status = ATTN_OUT_OF_MEMORY;
  if (status == ATTN_OK) status = copy_parameters(from, *to, *fresh);
  if (status == ATTN_OK) return ATTN_OK;
  attn_model_destroy(*to);
  attn_free(*fresh);
  *to = NULL;
  *fresh = NULL;
  return status;
}
