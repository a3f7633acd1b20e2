/* The table of families, and what they share. */
#include "models/families/family.h"
#include "base/memory.h"
#include "base/status.h"
#include "files/json.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

extern const attn_family attn_family_native, attn_family_llama, attn_family_qwen2,
    attn_family_qwen3, attn_family_gemma2, attn_family_mixtral, attn_family_qwen2_moe,
    attn_family_qwen3_moe, attn_family_qwen3_next, attn_family_minimax, attn_family_deepseek_v2,
    attn_family_deepseek_v3, attn_family_kimi_linear, attn_family_bert, attn_family_roberta,
    attn_family_distilbert;

static const attn_family *const table[] = {
    &attn_family_native,      &attn_family_llama,       &attn_family_qwen2,
    &attn_family_qwen3,       &attn_family_gemma2,      &attn_family_mixtral,
    &attn_family_qwen2_moe,   &attn_family_qwen3_moe,   &attn_family_qwen3_next,
    &attn_family_minimax,     &attn_family_deepseek_v2, &attn_family_deepseek_v3,
    &attn_family_kimi_linear, &attn_family_bert,        &attn_family_roberta,
    &attn_family_distilbert};

enum { COUNT = sizeof table / sizeof *table };

static bool among(const char *const *names, const char *name) {
  for (; names && *names; ++names)
    if (strcmp(*names, name) == 0) return true;
  return false;
}

/* NULL `file`: by model_type. */
static attn_status find(const attn_gguf *file, const char *wanted, const attn_family **family) {
  char known[512] = "";
  for (int i = 0; i < COUNT; ++i) {
    const char *const *names = file ? table[i]->architectures : table[i]->types;
    bool takes = !file || !table[i]->gguf_takes || table[i]->gguf_takes(file);
    if (among(names, wanted) && takes) {
      *family = table[i];
      return ATTN_OK;
    }
    for (; names && *names; ++names) {
      size_t used = strlen(known);
      snprintf(known + used, sizeof known - used, "%s%s", used ? ", " : "", *names);
    }
  }
  return attn_fail(ATTN_UNSUPPORTED, "%s '%s' is not among %s",
                   file ? "general.architecture" : "model_type", wanted, known);
}

attn_status attn_family_find(const char *type, const attn_family **family) {
  return find(NULL, type, family);
}

attn_status attn_family_find_architecture(const char *architecture, const attn_gguf *file,
                                          const attn_family **family) {
  return find(file, architecture, family);
}

static bool begins_with(const char *name, const char *beginning) {
  return strncmp(name, beginning, strlen(beginning)) == 0;
}

const char *attn_family_without_prefix(const attn_family *family, const char *name) {
  for (const char *const *p = family->prefixes; p && *p; ++p)
    if (begins_with(name, *p)) return name + strlen(*p);
  return name;
}

bool attn_family_leaves(const attn_model_config *config, const char *name) {
  const attn_family *family = config->family;
  if (family->leaves && family->leaves(config, name)) return true;
  name = attn_family_without_prefix(family, name);
  for (const char *const *beginning = family->left; beginning && *beginning; ++beginning)
    if (begins_with(name, *beginning)) return true;
  return false;
}

/* Configurations ---------------------------------------------------------------------------------
 */

attn_status attn_family_read_sizes(const json_t *json, attn_model_config *c) {
  ATTN_TRY(
      attn_json_int(json, "vocab_size", ATTN_REQUIRED, 2, ATTN_MOST_VOCABULARY, &c->vocabulary));
  ATTN_TRY(attn_json_int(json, "hidden_size", ATTN_REQUIRED, 1, ATTN_MOST_HIDDEN, &c->hidden));
  ATTN_TRY(attn_json_int(json, "num_hidden_layers", ATTN_REQUIRED, 1, ATTN_MOST_LAYERS,
                         &c->layer_count));
  return attn_json_int(json, "intermediate_size", ATTN_REQUIRED, 1, ATTN_MOST_WIDTH,
                       &c->feed_forward_width);
}

attn_status attn_family_make_layers(attn_model_config *c, const char *mixer,
                                    const attn_mixer_options *options) {
  int index;
  ATTN_TRY(attn_mixer_find(mixer, &index));
  c->layers = attn_alloc_array((size_t)c->layer_count, sizeof *c->layers);
  if (!c->layers) return ATTN_OUT_OF_MEMORY;
  for (int64_t l = 0; l < c->layer_count; ++l) {
    c->layers[l].mixer = attn_mixer_at(index);
    c->layers[l].options = *options;
    c->layers[l].options.layer = l;
  }
  return ATTN_OK;
}

attn_status attn_family_set_linear(const json_t *json, attn_model_config *c, const char *mixer,
                                   const attn_mixer_options *options, int64_t interval) {
  json_t *types = NULL;
  int index;
  ATTN_TRY(attn_mixer_find(mixer, &index));
  ATTN_TRY(attn_json_array(json, "layer_types", ATTN_OPTIONAL, &types));
  for (int64_t l = 0; l < c->layer_count; ++l) {
    bool linear = (l + 1) % interval != 0;
    const char *type = types ? json_string_value(json_array_get(types, (size_t)l)) : NULL;
    if (types &&
        (!type || (strcmp(type, "linear_attention") != 0 && strcmp(type, "full_attention") != 0)))
      return attn_fail(ATTN_BAD_FORMAT,
                       "layer_types: expected linear_attention or full_attention for each layer");
    if (type) linear = strcmp(type, "linear_attention") == 0;
    if (!linear) continue;
    c->layers[l].mixer = attn_mixer_at(index);
    c->layers[l].options = *options;
    c->layers[l].options.layer = l;
  }
  return ATTN_OK;
}

/* A list of numbers: what gguf.c makes of rope_freqs.weight. */
static attn_status read_factors(const json_t *scaling, attn_model_config *c, attn_rope *rope) {
  json_t *list = NULL;
  ATTN_TRY(attn_json_array(scaling, "factors", ATTN_REQUIRED, &list));
  size_t count = json_array_size(list);
  attn_free(c->rope_factors);
  c->rope_factors = attn_alloc_array(count + 1, sizeof *c->rope_factors);
  if (!c->rope_factors) return ATTN_OUT_OF_MEMORY;
  for (size_t i = 0; i < count; ++i) {
    double factor = json_number_value(json_array_get(list, i));
    if (!(factor > 0)) return attn_fail(ATTN_BAD_FORMAT, "factors: expected numbers above 0");
    c->rope_factors[i] = factor;
  }
  rope->scaling = ATTN_ROPE_FACTORS;
  rope->factors = c->rope_factors;
  rope->factor_count = (int64_t)count;
  return ATTN_OK;
}

static const double most = 1e12;

static double magnitude_of(double factor, double weight) {
  return factor <= 1 ? 1 : 0.1 * weight * log(factor) + 1;
}

/* beta_fast and beta_slow are turns in original_max_position_embeddings. The magnitude is
 * attention_factor, or follows from the factor; DeepSeek's mscale and mscale_all_dim say how much
 * of it is here, the rest being in the scale of the logits. */
static attn_status read_yarn(const json_t *json, const json_t *scaling, attn_rope *rope) {
  double scale = 0, scale_all = 0;
  bool truncate = true;
  rope->scaling = ATTN_ROPE_YARN;
  rope->high_factor = 32;
  rope->low_factor = 1;
  ATTN_TRY(attn_json_double(json, "max_position_embeddings", ATTN_OPTIONAL, 1, most,
                            &rope->original_length));
  ATTN_TRY(attn_json_double(scaling, "original_max_position_embeddings", ATTN_OPTIONAL, 1, most,
                            &rope->original_length));
  if (rope->original_length == 0)
    return attn_fail(ATTN_BAD_FORMAT, "original_max_position_embeddings is missing");
  ATTN_TRY(attn_json_double(scaling, "beta_fast", ATTN_OPTIONAL, 1e-6, most, &rope->high_factor));
  ATTN_TRY(attn_json_double(scaling, "beta_slow", ATTN_OPTIONAL, 1e-6, most, &rope->low_factor));
  ATTN_TRY(attn_json_double(scaling, "mscale", ATTN_OPTIONAL, 0, most, &scale));
  ATTN_TRY(attn_json_double(scaling, "mscale_all_dim", ATTN_OPTIONAL, 0, most, &scale_all));
  ATTN_TRY(attn_json_bool(scaling, "truncate", ATTN_OPTIONAL, &truncate));
  if (!truncate) return attn_fail(ATTN_UNSUPPORTED, "rope_scaling with truncate false");
  rope->magnitude = magnitude_of(rope->factor, 1);
  if (scale > 0 && scale_all > 0)
    rope->magnitude = magnitude_of(rope->factor, scale) / magnitude_of(rope->factor, scale_all);
  ATTN_TRY(
      attn_json_double(scaling, "attention_factor", ATTN_OPTIONAL, 1e-6, most, &rope->magnitude));
  if (rope->low_factor < rope->high_factor) return ATTN_OK;
  return attn_fail(ATTN_BAD_FORMAT, "beta_slow %g is not below beta_fast %g", rope->low_factor,
                   rope->high_factor);
}

/* Older files have rope_theta beside rope_scaling, newer ones both in rope_parameters. */
attn_status attn_family_read_rope(const json_t *json, attn_model_config *c, attn_rope *rope,
                                  double *part) {
  double whole = 1;
  const char *type = "default";
  json_t *scaling = NULL;
  ATTN_TRY(attn_json_object(json, "rope_scaling", ATTN_OPTIONAL, &scaling));
  if (!scaling) ATTN_TRY(attn_json_object(json, "rope_parameters", ATTN_OPTIONAL, &scaling));
  ATTN_TRY(attn_json_double(json, "rope_theta", ATTN_OPTIONAL, 1, most, &rope->base));
  if (!part) part = &whole;
  ATTN_TRY(attn_json_double(json, "partial_rotary_factor", ATTN_OPTIONAL, 0, 1, part));
  if (scaling)
    ATTN_TRY(attn_json_double(scaling, "partial_rotary_factor", ATTN_OPTIONAL, 0, 1, part));
  if (whole != 1)
    return attn_fail(ATTN_UNSUPPORTED, "partial_rotary_factor is %g: heads turn whole", whole);
  if (!scaling) return ATTN_OK;
  ATTN_TRY(attn_json_double(scaling, "rope_theta", ATTN_OPTIONAL, 1, most, &rope->base));
  ATTN_TRY(attn_json_string(scaling, "type", ATTN_OPTIONAL, &type));
  ATTN_TRY(attn_json_string(scaling, "rope_type", ATTN_OPTIONAL, &type));
  if (strcmp(type, "default") == 0) return ATTN_OK;
  if (strcmp(type, "factors") == 0) return read_factors(scaling, c, rope);
  ATTN_TRY(attn_json_double(scaling, "factor", ATTN_REQUIRED, 1, most, &rope->factor));
  if (strcmp(type, "linear") == 0) {
    rope->scaling = ATTN_ROPE_LINEAR;
    return ATTN_OK;
  }
  if (strcmp(type, "yarn") == 0) return read_yarn(json, scaling, rope);
  if (strcmp(type, "llama3") != 0)
    return attn_fail(ATTN_UNSUPPORTED, "rope_type '%s' is not default, linear, llama3 or yarn",
                     type);
  rope->scaling = ATTN_ROPE_LLAMA3;
  ATTN_TRY(
      attn_json_double(scaling, "low_freq_factor", ATTN_REQUIRED, 1e-6, most, &rope->low_factor));
  ATTN_TRY(
      attn_json_double(scaling, "high_freq_factor", ATTN_REQUIRED, 1e-6, most, &rope->high_factor));
  ATTN_TRY(attn_json_double(scaling, "original_max_position_embeddings", ATTN_REQUIRED, 1, most,
                            &rope->original_length));
  if (rope->low_factor < rope->high_factor) return ATTN_OK;
  return attn_fail(ATTN_BAD_FORMAT, "low_freq_factor %g is not below high_freq_factor %g",
                   rope->low_factor, rope->high_factor);
}
