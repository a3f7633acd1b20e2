/* The metadata of a GGUF file as the config.json that the same model has elsewhere, so that one
 * reader knows each family. Keys below the architecture ("llama.block_count"): gguf.md of ggml. */
#include "base/status.h"
#include "models/families/family.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static const attn_gguf_field fields[] = {
    {"embedding_length", "hidden_size", ATTN_GGUF_INTEGER, ATTN_REQUIRED},
    {"block_count", "num_hidden_layers", ATTN_GGUF_INTEGER, ATTN_REQUIRED},
    {"feed_forward_length", "intermediate_size", ATTN_GGUF_INTEGER, ATTN_REQUIRED},
    {"expert_count", "num_experts", ATTN_GGUF_INTEGER, ATTN_OPTIONAL},
    {"expert_used_count", "num_experts_per_tok", ATTN_GGUF_INTEGER, ATTN_OPTIONAL},
    {"expert_feed_forward_length", "moe_intermediate_size", ATTN_GGUF_INTEGER, ATTN_OPTIONAL},
    {"expert_shared_feed_forward_length", "shared_expert_intermediate_size", ATTN_GGUF_INTEGER,
     ATTN_OPTIONAL},
    {"attention.head_count", "num_attention_heads", ATTN_GGUF_INTEGER, ATTN_REQUIRED},
    {"attention.head_count_kv", "num_key_value_heads", ATTN_GGUF_INTEGER, ATTN_OPTIONAL},
    {"attention.key_length", "head_dim", ATTN_GGUF_INTEGER, ATTN_OPTIONAL},
    {"attention.sliding_window", "sliding_window", ATTN_GGUF_INTEGER, ATTN_OPTIONAL},
    {"attention.layer_norm_rms_epsilon", "rms_norm_eps", ATTN_GGUF_REAL, ATTN_OPTIONAL},
    {"attention.layer_norm_epsilon", "layer_norm_eps", ATTN_GGUF_REAL, ATTN_OPTIONAL},
    {"rope.freq_base", "rope_theta", ATTN_GGUF_REAL, ATTN_OPTIONAL},
    {"context_length", "max_position_embeddings", ATTN_GGUF_INTEGER, ATTN_OPTIONAL},
};

enum { KEY_SIZE = 160 };

static attn_status copy_field(const attn_gguf *file, const char *architecture,
                              const attn_family *family, const attn_gguf_field *f, json_t *config) {
  char key[KEY_SIZE];
  snprintf(key, sizeof key, "%s.%s", architecture, f->gguf);
  int64_t integer = -1;
  double real = -1;
  bool flag = false;
  attn_gguf_list list;
  if (family->gguf_own_heads && strcmp(f->gguf, "attention.head_count_kv") == 0 &&
      attn_gguf_array(file, key, ATTN_REQUIRED, &list) == ATTN_OK)
    return ATTN_OK; /* a number a layer, which their tensors show too */
  if (f->kind == ATTN_GGUF_INTEGER)
    ATTN_TRY(attn_gguf_int(file, key, f->need, 0, INT32_MAX, &integer));
  if (f->kind == ATTN_GGUF_REAL) ATTN_TRY(attn_gguf_double(file, key, f->need, 0, 1e12, &real));
  if (f->kind == ATTN_GGUF_FLAG) ATTN_TRY(attn_gguf_bool(file, key, f->need, &flag));
  if (flag) json_object_set_new(config, f->config, json_true());
  if (f->kind == ATTN_GGUF_INTEGER && integer >= 0)
    json_object_set_new(config, f->config, json_integer(integer));
  if (f->kind == ATTN_GGUF_REAL && real >= 0)
    json_object_set_new(config, f->config, json_real(real));
  return ATTN_OK;
}

/* rope_freqs.weight: what the speed of each pair of channels is divided by. */
static attn_status copy_factors(const attn_gguf_tensor *tensor, json_t *config) {
  enum { MOST = 128 };
  float factors[MOST];
  if (tensor->type != ATTN_BLOCK_F32 || tensor->count > MOST)
    return attn_fail(ATTN_BAD_FORMAT, "rope_freqs.weight: expected at most %d float32", MOST);
  memcpy(factors, tensor->data, (size_t)tensor->count * sizeof *factors);
  json_t *list = json_array();
  for (int64_t i = 0; i < tensor->count; ++i)
    json_array_append_new(list, json_real(isfinite(factors[i]) ? factors[i] : 0));
  json_object_set_new(config, "rope_scaling",
                      json_pack("{s:s, s:o}", "rope_type", "factors", "factors", list));
  return ATTN_OK;
}

/* A real below rope.scaling. */
static attn_status scaling_real(const attn_gguf *file, const char *architecture, const char *name,
                                double least, double *value) {
  char key[KEY_SIZE];
  snprintf(key, sizeof key, "%s.rope.scaling.%s", architecture, name);
  return attn_gguf_double(file, key, ATTN_OPTIONAL, least, 1e12, value);
}

/* The keys that change nothing as converters write them. */
static attn_status check_scaling(const attn_gguf *file, const char *architecture) {
  static const char *const ones[] = {"attn_factor", "yarn_ext_factor"};
  for (int i = 0; i < 2; ++i) {
    double value = 1;
    ATTN_TRY(scaling_real(file, architecture, ones[i], -1, &value));
    if (value != 1 && value != -1) /* -1: by itself */
      return attn_fail(ATTN_UNSUPPORTED, "%s.rope.scaling.%s is %g, expected 1", architecture,
                       ones[i], value);
  }
  return ATTN_OK;
}

static attn_status copy_yarn(const attn_gguf *file, const char *architecture,
                             const attn_family *family, json_t *scaling) {
  static const char *const names[][2] = {
      {"original_context_length", "original_max_position_embeddings"},
      {"yarn_beta_fast", "beta_fast"},
      {"yarn_beta_slow", "beta_slow"},
      {"yarn_attn_factor", "attention_factor"}};
  const double part = 0.1; /* of mscale, that DeepSeek's files have */
  double multiplier = 0;
  for (size_t i = 0; i < sizeof names / sizeof *names; ++i) {
    double value = 0;
    ATTN_TRY(scaling_real(file, architecture, names[i][0], 1e-6, &value));
    if (value > 0) json_object_set_new(scaling, names[i][1], json_real(value));
  }
  ATTN_TRY(scaling_real(file, architecture, "yarn_log_multiplier", 0, &multiplier));
  if (multiplier == 0) return check_scaling(file, architecture);
  if (!family->gguf_mscale)
    return attn_fail(ATTN_UNSUPPORTED, "%s.rope.scaling.yarn_log_multiplier is %g, expected 0",
                     architecture, multiplier);
  json_object_set_new(scaling, "mscale", json_real(multiplier / part));
  json_object_set_new(scaling, "mscale_all_dim", json_real(multiplier / part));
  return check_scaling(file, architecture);
}

static attn_status copy_rope_scaling(const attn_gguf *file, const char *architecture,
                                     const attn_family *family, json_t *config) {
  char key[KEY_SIZE];
  attn_gguf_text type = {0};
  double factor = 1;
  const attn_gguf_tensor *factors;
  snprintf(key, sizeof key, "%s.rope.scaling.type", architecture);
  ATTN_TRY(attn_gguf_string(file, key, ATTN_OPTIONAL, &type));
  snprintf(key, sizeof key, "%s.rope.scaling.factor", architecture);
  ATTN_TRY(attn_gguf_double(file, key, ATTN_OPTIONAL, 1, 1e6, &factor));
  bool none = type.size == 0 || (type.size == 4 && memcmp(type.data, "none", 4) == 0);
  if (attn_gguf_find(file, "rope_freqs.weight", &factors) == ATTN_OK)
    return none ? copy_factors(factors, config)
                : attn_fail(ATTN_UNSUPPORTED, "rope_freqs.weight beside another rope.scaling.type");
  if (none) return ATTN_OK;
  json_t *scaling = json_pack("{s:s%, s:f}", "type", type.data, type.size, "factor", factor);
  json_object_set_new(config, "rope_scaling", scaling);
  bool yarn = type.size == 4 && memcmp(type.data, "yarn", 4) == 0;
  return yarn && scaling ? copy_yarn(file, architecture, family, scaling) : ATTN_OK;
}

/* No key says whether projections have biases: their tensors do. */
static void copy_biases(const attn_gguf *file, json_t *config) {
  const attn_gguf_tensor *bias;
  if (attn_gguf_find(file, "blk.0.attn_q.bias", &bias) == ATTN_OK)
    json_object_set_new(config, "attention_bias", json_true());
}

/* Layers without a router have no experts. */
static void copy_dense_layers(const attn_gguf *file, json_t *config) {
  int64_t layers = json_integer_value(json_object_get(config, "num_hidden_layers"));
  if (json_integer_value(json_object_get(config, "num_experts")) == 0) return;
  json_t *dense = json_array();
  for (int64_t l = 0; l < layers && l < ATTN_MOST_LAYERS; ++l) {
    char name[KEY_SIZE];
    const attn_gguf_tensor *router;
    snprintf(name, sizeof name, "blk.%lld.ffn_gate_inp.weight", (long long)l);
    if (attn_gguf_find(file, name, &router) != ATTN_OK)
      json_array_append_new(dense, json_integer(l));
  }
  json_object_set_new(config, "mlp_only_layers", dense);
}

/* Tables of encoders: as long as their tensors. DistilBERT, which goes by the same architecture,
 * has no token types. */
static void copy_tables(const attn_gguf *file, json_t *config) {
  const attn_gguf_tensor *positions, *types;
  if (attn_gguf_find(file, "position_embd.weight", &positions) != ATTN_OK) return;
  bool typed = attn_gguf_find(file, "token_types.weight", &types) == ATTN_OK;
  json_object_set_new(config, "max_position_embeddings", json_integer(positions->shape[0]));
  json_object_set_new(config, "type_vocab_size", json_integer(typed ? types->shape[0] : 0));
}

/* The vocabulary is as long as the table of embeddings, whose rows come last in GGUF's order. */
static attn_status copy_vocabulary(const attn_gguf *file, json_t *config) {
  const attn_gguf_tensor *table, *head;
  ATTN_TRY(attn_gguf_find(file, "token_embd.weight", &table));
  json_object_set_new(config, "vocab_size", json_integer(table->shape[0]));
  bool tied = attn_gguf_find(file, "output.weight", &head) != ATTN_OK;
  json_object_set_new(config, "tie_word_embeddings", json_boolean(tied));
  return ATTN_OK;
}

/* Heads that turn in part only, or whose values have another width, have no place in the families
 * that GGUF files are read for. */
static attn_status check_heads(const attn_gguf *file, const char *architecture,
                               const json_t *config) {
  static const char *const same[] = {"rope.dimension_count", "attention.value_length"};
  int64_t heads = json_integer_value(json_object_get(config, "num_attention_heads"));
  int64_t dim = json_integer_value(json_object_get(config, "head_dim"));
  if (!dim && heads > 0) dim = json_integer_value(json_object_get(config, "hidden_size")) / heads;
  for (size_t i = 0; i < sizeof same / sizeof *same; ++i) {
    char key[KEY_SIZE];
    int64_t value = dim;
    snprintf(key, sizeof key, "%s.%s", architecture, same[i]);
    ATTN_TRY(attn_gguf_int(file, key, ATTN_OPTIONAL, 0, INT32_MAX, &value));
    if (value != dim)
      return attn_fail(ATTN_UNSUPPORTED, "%s is %lld, expected the width of a head, %lld", key,
                       (long long)value, (long long)dim);
  }
  return ATTN_OK;
}

static attn_status copy_all(const attn_gguf *file, const char *architecture,
                            const attn_family *family, json_t *config) {
  const attn_gguf_field *field;
  for (size_t i = 0; (field = attn_family_gguf_field(family, i)); ++i)
    ATTN_TRY(copy_field(file, architecture, family, field, config));
  if (!family->gguf_own_heads) ATTN_TRY(check_heads(file, architecture, config));
  ATTN_TRY(copy_rope_scaling(file, architecture, family, config));
  copy_biases(file, config);
  copy_dense_layers(file, config);
  copy_tables(file, config);
  ATTN_TRY(copy_vocabulary(file, config));
  return family->gguf_complete ? family->gguf_complete(file, config) : ATTN_OK;
}

attn_status attn_family_config_from_gguf(const attn_gguf *file, json_t **config) {
  attn_gguf_text name = {0};
  char architecture[64];
  const attn_family *family;
  ATTN_TRY(attn_gguf_string(file, "general.architecture", ATTN_REQUIRED, &name));
  snprintf(architecture, sizeof architecture, "%.*s", (int)name.size, name.data);
  ATTN_TRY(attn_family_find_architecture(architecture, file, &family));
  const char *defaults = family->gguf_defaults ? family->gguf_defaults : "{}";
  json_t *made = json_loads(defaults, 0, NULL);
  if (!made) return attn_fail(ATTN_OUT_OF_MEMORY, "out of memory");
  json_object_set_new(made, "model_type", json_string(family->types[0]));
  attn_status status = copy_all(file, architecture, family, made);
  if (status == ATTN_OK)
    *config = made;
  else
    json_decref(made);
  return status;
}

const attn_gguf_field *attn_family_gguf_field(const attn_family *family, size_t i) {
  const size_t common = sizeof fields / sizeof *fields;
  if (i < common) return &fields[i];
  const attn_gguf_field *own = family->gguf_fields;
  for (i -= common; own && own->gguf; ++own, --i)
    if (i == 0) return own;
  return NULL;
}
