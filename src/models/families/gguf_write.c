/* A configuration as the metadata of a GGUF file. First the config.json is made that gguf.c would
 * make of them: when that one configures another model, GGUF cannot say what this one is. */
#include "base/memory.h"
#include "base/status.h"
#include "models/families/family.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum {
  KEY_SIZE = 160,
  UNSAID_CONTEXT = 2048, /* llama.cpp wants a context_length, also where config.json has none */
};

static const attn_mixer_options *first_layer(const attn_model_config *c) {
  return &c->layers[0].options;
}

int64_t attn_family_rope_count(const attn_model_config *c) {
  const attn_mixer_options *o = first_layer(c);
  bool scaled = o->rope.scaling == ATTN_ROPE_LLAMA3 || o->rope.scaling == ATTN_ROPE_FACTORS;
  return scaled ? o->rotary_dim / 2 : 0;
}

void attn_family_rope_factors(const attn_model_config *c, float *factors) {
  int64_t count = attn_family_rope_count(c);
  for (int64_t j = 0; j < count; ++j)
    factors[j] = (float)attn_rope_divisor(&first_layer(c)->rope, j, count);
}

/* What a reader has ------------------------------------------------------------------------------
 */

/* What config.json may leave out, as it was understood. */
static void set_understood(const attn_model_config *c, json_t *json) {
  const attn_mixer_options *o = first_layer(c);
  json_object_set_new(json, "num_key_value_heads", json_integer(o->kv_heads));
  json_object_set_new(json, "head_dim", json_integer(o->dim));
  json_object_set_new(json, "rms_norm_eps", json_real(c->norm_epsilon));
  json_object_set_new(json, "rope_theta", json_real(o->rope.base));
  json_object_set_new(json, "vocab_size", json_integer(c->vocabulary));
  json_object_set_new(json, "tie_word_embeddings", json_boolean(c->tied));
  if (o->bias) json_object_set_new(json, "attention_bias", json_true());
}

/* Layers without experts are those without a router, and all others are alike. */
static void set_experts(const attn_model_config *c, json_t *json) {
  const attn_experts_config *experts = NULL;
  json_t *dense = json_array();
  for (int64_t l = 0; l < c->layer_count; ++l)
    if (c->layers[l].experts.routing.experts)
      experts = &c->layers[l].experts;
    else
      json_array_append_new(dense, json_integer(l));
  if (experts) {
    json_object_set_new(json, "num_experts", json_integer(experts->routing.experts));
    json_object_set_new(json, "num_experts_per_tok", json_integer(experts->routing.active));
    json_object_set_new(json, "moe_intermediate_size", json_integer(experts->width));
    json_object_set(json, "mlp_only_layers", dense);
  }
  json_decref(dense);
}

/* DeepSeek's mscale_all_dim; 0: the model has none. */
static double mscale_of(const attn_model_config *c) {
  json_t *scaling = json_object_get(c->json, "rope_scaling");
  if (!json_is_object(scaling)) scaling = json_object_get(c->json, "rope_parameters");
  return c->family->gguf_mscale ? json_number_value(json_object_get(scaling, "mscale_all_dim")) : 0;
}

static void set_scaling(const attn_model_config *c, json_t *json) {
  const attn_rope *rope = &first_layer(c)->rope;
  int64_t count = attn_family_rope_count(c);
  if (rope->scaling == ATTN_ROPE_LINEAR)
    json_object_set_new(json, "rope_scaling",
                        json_pack("{s:s, s:f}", "type", "linear", "factor", rope->factor));
  double scale = mscale_of(c);
  if (rope->scaling == ATTN_ROPE_YARN && scale > 0)
    json_object_set_new(json, "rope_scaling",
                        json_pack("{s:s, s:f, s:f, s:f, s:f, s:f, s:f}", "type", "yarn", "factor",
                                  rope->factor, "original_max_position_embeddings",
                                  rope->original_length, "beta_fast", rope->high_factor,
                                  "beta_slow", rope->low_factor, "mscale", scale, "mscale_all_dim",
                                  scale));
  else if (rope->scaling == ATTN_ROPE_YARN)
    json_object_set_new(json, "rope_scaling",
                        json_pack("{s:s, s:f, s:f, s:f, s:f, s:f}", "type", "yarn", "factor",
                                  rope->factor, "original_max_position_embeddings",
                                  rope->original_length, "beta_fast", rope->high_factor,
                                  "beta_slow", rope->low_factor, "attention_factor",
                                  rope->magnitude > 0 ? rope->magnitude : 1));
  if (!count) return;
  json_t *list = json_array();
  for (int64_t j = 0; j < count; ++j)
    json_array_append_new(list, json_real(attn_rope_divisor(rope, j, count)));
  json_object_set_new(json, "rope_scaling",
                      json_pack("{s:s, s:o}", "rope_type", "factors", "factors", list));
}

static json_t *config_of_reader(const attn_model_config *c) {
  const attn_gguf_field *field;
  const char *defaults = c->family->gguf_defaults ? c->family->gguf_defaults : "{}";
  json_t *json = json_loads(defaults, 0, NULL);
  json_object_set_new(json, "model_type", json_string(c->family->types[0]));
  for (size_t i = 0; (field = attn_family_gguf_field(c->family, i)); ++i) {
    json_t *value = json_object_get(c->json, field->config);
    if (json_is_number(value) || json_is_boolean(value))
      json_object_set(json, field->config, value);
  }
  if (json_object_get(json, "sliding_window") && !first_layer(c)->window)
    json_object_del(json, "sliding_window"); /* Qwen's, which its layers do not use */
  set_understood(c, json);
  set_experts(c, json);
  set_scaling(c, json);
  return json;
}

/* Whether it is the same model -------------------------------------------------------------------
 */

static bool near(double a, double b) {
  const double f32 = 1e-6; /* GGUF has float32 */
  return fabs(a - b) <= f32 * fabs(a);
}

static const char *different_experts(const attn_experts_config *a, const attn_experts_config *b) {
  const attn_routing *x = &a->routing, *y = &b->routing;
  bool same = a->width == b->width && a->shared_width == b->shared_width &&
              a->shared_gate == b->shared_gate && a->correction == b->correction &&
              x->experts == y->experts && x->active == y->active && x->groups == y->groups &&
              x->active_groups == y->active_groups && x->sigmoid == y->sigmoid &&
              x->best_two == y->best_two && x->normalise == y->normalise &&
              near(x->scale, y->scale);
  return same ? NULL : "experts";
}

/* Llama 3's scaling becomes factors. */
static bool different_rope(const attn_rope *x, const attn_rope *y) {
  if (!near(x->base, y->base) || !near(x->magnitude, y->magnitude)) return true;
  bool factors = x->scaling == ATTN_ROPE_LLAMA3 || x->scaling == ATTN_ROPE_FACTORS;
  if (factors) return y->scaling != ATTN_ROPE_FACTORS;
  if (x->scaling != y->scaling || !near(x->factor, y->factor)) return true;
  if (x->scaling != ATTN_ROPE_YARN) return false;
  return !near(x->factor, y->factor) || !near(x->low_factor, y->low_factor) ||
         !near(x->high_factor, y->high_factor) || !near(x->original_length, y->original_length);
}

static const char *different_layer(const attn_layer_config *a, const attn_layer_config *b) {
  const attn_mixer_options *x = &a->options, *y = &b->options;
  if (a->mixer != b->mixer) return "mixers";
  if (x->heads != y->heads || x->kv_heads != y->kv_heads || x->dim != y->dim ||
      x->value_dim != y->value_dim)
    return "heads";
  if (x->latent_rank != y->latent_rank || x->query_rank != y->query_rank ||
      x->shared_dim != y->shared_dim)
    return "latents";
  if (x->convolution != y->convolution) return "convolutions";
  if (x->window != y->window) return "windows";
  if (!near(x->soft_cap, y->soft_cap)) return "soft caps";
  if (!near(x->scale, y->scale)) return "scale of queries";
  if (x->bias != y->bias || x->output_bias != y->output_bias) return "biases";
  if (x->qk_norm != y->qk_norm) return "norms of heads";
  if (x->output_gate != y->output_gate) return "gates of outputs";
  if (x->rotary_dim != y->rotary_dim || different_rope(&x->rope, &y->rope)) return "positions";
  if (!near(a->mixed.keep, b->mixed.keep) || !near(a->mixed.add, b->mixed.add) ||
      !near(a->fed.keep, b->fed.keep) || !near(a->fed.add, b->fed.add))
    return "residuals";
  return different_experts(&a->experts, &b->experts);
}

/* What the reader would have otherwise; NULL: nothing. */
static const char *difference(const attn_model_config *a, const attn_model_config *b) {
  if (a->family != b->family) return "family";
  if (a->vocabulary != b->vocabulary || a->hidden != b->hidden ||
      a->layer_count != b->layer_count || a->feed_forward_width != b->feed_forward_width)
    return "sizes";
  if (a->feed_forward != b->feed_forward) return "feed-forward";
  if (a->norm != b->norm || !near(a->norm_epsilon, b->norm_epsilon) ||
      a->norm_offset != b->norm_offset || a->sandwich != b->sandwich ||
      a->normed_residual != b->normed_residual)
    return "norms";
  if (!near(a->logit_cap, b->logit_cap)) return "soft caps";
  if (a->tied != b->tied || !near(a->embedding_scale, b->embedding_scale)) return "embeddings";
  for (int64_t l = 0; l < a->layer_count; ++l) {
    const char *found = different_layer(&a->layers[l], &b->layers[l]);
    if (found) return found;
  }
  return NULL;
}

static attn_status check_same(const attn_model_config *c, json_t *json) {
  attn_model_config again;
  attn_status status = attn_model_config_read(json_incref(json), "GGUF metadata", &again);
  if (status != ATTN_OK) return attn_fail_in(ATTN_UNSUPPORTED, "no GGUF file can say it");
  const char *found = difference(c, &again);
  attn_model_config_free(&again);
  if (!found) return ATTN_OK;
  return attn_fail(ATTN_UNSUPPORTED, "GGUF files of architecture '%s' cannot say its %s",
                   c->family->architectures[0], found);
}

/* The keys ---------------------------------------------------------------------------------------
 */

static void add_value(const char *architecture, const char *name, bool real, const json_t *value,
                      attn_gguf_draft *draft) {
  char key[KEY_SIZE];
  snprintf(key, sizeof key, "%s.%s", architecture, name);
  if (attn_gguf_has_key(draft, key)) return;
  if (json_is_number(value) && real)
    attn_gguf_add_f32(draft, key, (float)json_number_value(value));
  else if (json_is_integer(value))
    attn_gguf_add_u32(draft, key, (uint32_t)json_integer_value(value));
  else if (json_is_boolean(value))
    attn_gguf_add_bool(draft, key, json_is_true(value));
}

static void add_integer(const char *architecture, const char *name, int64_t value,
                        attn_gguf_draft *draft) {
  char key[KEY_SIZE];
  snprintf(key, sizeof key, "%s.%s", architecture, name);
  if (!attn_gguf_has_key(draft, key)) attn_gguf_add_u32(draft, key, (uint32_t)value);
}

static void add_scaling_real(const char *architecture, const char *name, double value,
                             attn_gguf_draft *draft) {
  char key[KEY_SIZE];
  snprintf(key, sizeof key, "%s.rope.scaling.%s", architecture, name);
  attn_gguf_add_f32(draft, key, (float)value);
}

/* The magnitude is written where it does not follow from the factor. */
static void add_yarn(const attn_model_config *c, const char *architecture, attn_gguf_draft *draft) {
  const attn_rope *rope = &first_layer(c)->rope;
  const double part = 0.1; /* of mscale, that DeepSeek's files have */
  double usual = rope->factor > 1 ? 0.1 * log(rope->factor) + 1 : 1;
  char key[KEY_SIZE];
  snprintf(key, sizeof key, "%s.rope.scaling.original_context_length", architecture);
  attn_gguf_add_u32(draft, key, (uint32_t)rope->original_length);
  add_scaling_real(architecture, "yarn_beta_fast", rope->high_factor, draft);
  add_scaling_real(architecture, "yarn_beta_slow", rope->low_factor, draft);
  if (mscale_of(c) > 0)
    add_scaling_real(architecture, "yarn_log_multiplier", part * mscale_of(c), draft);
  else if (!near(usual, rope->magnitude))
    add_scaling_real(architecture, "yarn_attn_factor", rope->magnitude, draft);
}

static void add_scaling(const attn_model_config *c, const char *architecture,
                        attn_gguf_draft *draft) {
  const attn_rope *rope = &first_layer(c)->rope;
  bool yarn = rope->scaling == ATTN_ROPE_YARN;
  char key[KEY_SIZE];
  if (rope->scaling != ATTN_ROPE_LINEAR && !yarn) return;
  snprintf(key, sizeof key, "%s.rope.scaling.type", architecture);
  attn_gguf_add_string(draft, key, yarn ? "yarn" : "linear", strlen(yarn ? "yarn" : "linear"));
  add_scaling_real(architecture, "factor", rope->factor, draft);
  if (yarn) add_yarn(c, architecture, draft);
}

static void add_keys(const attn_model_config *c, const json_t *json, attn_gguf_draft *draft) {
  const char *architecture = c->family->architectures[0];
  const attn_gguf_field *field;
  const attn_mixer_options *o = first_layer(c);
  for (size_t i = 0; (field = attn_family_gguf_field(c->family, i)); ++i)
    add_value(architecture, field->gguf, field->kind == ATTN_GGUF_REAL,
              json_object_get(json, field->config), draft);
  add_integer(architecture, "attention.value_length", o->value_dim, draft);
  add_integer(architecture, "rope.dimension_count", o->rotary_dim, draft);
  add_integer(architecture, "vocab_size", c->vocabulary, draft);
  add_integer(architecture, "context_length", UNSAID_CONTEXT, draft);
  add_scaling(c, architecture, draft);
}

attn_status attn_family_config_to_gguf(const attn_model_config *c, attn_gguf_draft *draft) {
  if (!c->family->architectures)
    return attn_fail(ATTN_UNSUPPORTED, "models of type '%s' have no names in GGUF files", c->type);
  const attn_family *family = c->family;
  json_t *said = config_of_reader(c), *read = NULL;
  attn_status status = said && family->gguf_say ? family->gguf_say(c, said) : ATTN_OK;
  if (status == ATTN_OK && !(read = json_deep_copy(said)))
    status = attn_fail(ATTN_OUT_OF_MEMORY, "out of memory");
  if (status == ATTN_OK && family->gguf_complete) status = family->gguf_complete(NULL, read);
  if (status == ATTN_OK) status = check_same(c, read);
  if (status == ATTN_OK) add_keys(c, said, draft);
  json_decref(said);
  json_decref(read);
  return status;
}
