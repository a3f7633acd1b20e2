/* The table of families, and what they share. */
#include "models/families/family.h"
#include "base/memory.h"
#include "base/status.h"
#include "files/json.h"

#include <stdio.h>
#include <string.h>

extern const attn_family attn_family_native, attn_family_llama, attn_family_qwen2,
    attn_family_qwen3, attn_family_gemma2, attn_family_bert, attn_family_roberta,
    attn_family_distilbert;

static const attn_family *const table[] = {
    &attn_family_native, &attn_family_llama, &attn_family_qwen2,   &attn_family_qwen3,
    &attn_family_gemma2, &attn_family_bert,  &attn_family_roberta, &attn_family_distilbert};

enum { COUNT = sizeof table / sizeof *table };

static bool among(const char *const *names, const char *name) {
  for (; names && *names; ++names)
    if (strcmp(*names, name) == 0) return true;
  return false;
}

static attn_status find(bool in_gguf, const char *wanted, const attn_family **family) {
  char known[512] = "";
  for (int i = 0; i < COUNT; ++i) {
    const char *const *names = in_gguf ? table[i]->architectures : table[i]->types;
    if (among(names, wanted)) {
      *family = table[i];
      return ATTN_OK;
    }
    for (; names && *names; ++names) {
      size_t used = strlen(known);
      snprintf(known + used, sizeof known - used, "%s%s", used ? ", " : "", *names);
    }
  }
  return attn_fail(ATTN_UNSUPPORTED, "%s '%s' is not among %s",
                   in_gguf ? "general.architecture" : "model_type", wanted, known);
}

attn_status attn_family_find(const char *type, const attn_family **family) {
  return find(false, type, family);
}

attn_status attn_family_find_architecture(const char *architecture, const attn_family **family) {
  return find(true, architecture, family);
}

/* Names ------------------------------------------------------------------------------------------
 */

static const char layer_prefix[] = "model.layers.";

/* Splits "model.layers.12.rest": where ".rest" begins, or NULL when it is not of a layer. */
static const char *part_of_layer(const char *name, int *number_length) {
  if (strncmp(name, layer_prefix, sizeof layer_prefix - 1) != 0) return NULL;
  const char *digits = name + sizeof layer_prefix - 1;
  *number_length = (int)strspn(digits, "0123456789");
  return *number_length && digits[*number_length] == '.' ? digits + *number_length : NULL;
}

static const attn_family_name *find_row(const attn_family *family, const char *part,
                                        const char **rest) {
  for (const attn_family_name *row = family->names; row && row->host; ++row) {
    size_t length = strlen(row->host);
    if (strncmp(part, row->host, length) != 0) continue;
    *rest = part + length;
    return row;
  }
  return NULL;
}

void attn_family_checkpoint_name(const attn_family *family, const char *host, char *name,
                                 size_t size) {
  int number = 0;
  const char *layer = part_of_layer(host, &number), *rest;
  const attn_family_name *row = find_row(family, layer ? layer : host, &rest);
  if (!row)
    snprintf(name, size, "%s", host);
  else if (layer)
    snprintf(name, size, "%s%.*s%s%s", family->layers ? family->layers : layer_prefix, number,
             layer - number, row->checkpoint, rest);
  else
    snprintf(name, size, "%s%s", row->checkpoint, rest);
}

bool attn_family_gguf_name(const attn_family *family, const char *host, char *name, size_t size) {
  int number = 0;
  const char *layer = part_of_layer(host, &number), *rest;
  const attn_family_name *row = find_row(family, layer ? layer : host, &rest);
  if (!row || !row->gguf) return false;
  if (layer)
    snprintf(name, size, "blk.%.*s%s%s", number, layer - number, row->gguf, rest);
  else
    snprintf(name, size, "%s%s", row->gguf, rest);
  return true;
}

static bool begins_with(const char *name, const char *beginning) {
  return strncmp(name, beginning, strlen(beginning)) == 0;
}

const char *attn_family_without_prefix(const attn_family *family, const char *name) {
  for (const char *const *p = family->prefixes; p && *p; ++p)
    if (begins_with(name, *p)) return name + strlen(*p);
  return name;
}

bool attn_family_leaves(const attn_family *family, const char *name) {
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

/* Older files have rope_theta beside rope_scaling, newer ones both in rope_parameters. */
attn_status attn_family_read_rope(const json_t *json, attn_model_config *c, attn_rope *rope) {
  static const double most = 1e12;
  double part = 1;
  const char *type = "default";
  json_t *scaling = NULL;
  ATTN_TRY(attn_json_double(json, "rope_theta", ATTN_OPTIONAL, 1, most, &rope->base));
  ATTN_TRY(attn_json_double(json, "partial_rotary_factor", ATTN_OPTIONAL, 0, 1, &part));
  if (part != 1)
    return attn_fail(ATTN_UNSUPPORTED, "partial_rotary_factor is %g: heads turn whole", part);
  ATTN_TRY(attn_json_object(json, "rope_scaling", ATTN_OPTIONAL, &scaling));
  if (!scaling) ATTN_TRY(attn_json_object(json, "rope_parameters", ATTN_OPTIONAL, &scaling));
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
  if (strcmp(type, "llama3") != 0)
    return attn_fail(ATTN_UNSUPPORTED, "rope_type '%s' is not default, linear or llama3", type);
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
