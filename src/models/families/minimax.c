/* MiniMax-Text-01 (arXiv 2501.08313): layers of Lightning Attention and of softmax attention, a
 * mixture of experts in each. What a mixer or a feed-forward gives is added to the normalised x
 * that it was computed from, both with factors. q, k and v of Lightning Attention are stored
 * together by head.
 *
 * model_type minimax is what Transformers calls the converted model, minimax_text_01 the original,
 * whose keys are others; there only the part rotary_dim of a head turns. */
#include "base/status.h"
#include "files/json.h"
#include "models/families/family.h"

#include <string.h>

static const attn_family_name names[] = {
    {"model.embed_tokens.", "model.embed_tokens.", NULL},
    {"model.norm.", "model.norm.", NULL},
    {"lm_head.", "lm_head.", NULL},
    {".token_norm.", ".input_layernorm.", NULL},
    {".channel_norm.", ".post_attention_layernorm.", NULL},
    {".channel_mixer.router.", ".block_sparse_moe.gate.", NULL},
    {".channel_mixer.experts.#.l1.", ".block_sparse_moe.experts.#.w1.", NULL},
    {".channel_mixer.experts.#.l2.", ".block_sparse_moe.experts.#.w3.", NULL},
    {".channel_mixer.experts.#.l3.", ".block_sparse_moe.experts.#.w2.", NULL},
    {NULL, NULL, NULL}};

static const attn_family_name softmax_names[] = {{".token_mixer.", ".self_attn.", NULL},
                                                 {NULL, NULL, NULL}};

static const attn_family_name linear_names[] = {
    {".token_mixer.q_proj.", ".self_attn.qkv_proj.", NULL},
    {".token_mixer.k_proj.", ".self_attn.qkv_proj.", NULL},
    {".token_mixer.v_proj.", ".self_attn.qkv_proj.", NULL},
    {".token_mixer.g_proj.", ".self_attn.output_gate.", NULL},
    {".token_mixer.o_norm.", ".self_attn.norm.", NULL},
    {".token_mixer.o_proj.", ".self_attn.out_proj.", NULL},
    {NULL, NULL, NULL}};

static const attn_mixer_names mixer_names[] = {
    {"softmax", softmax_names}, {"minimax", linear_names}, {NULL, NULL}};

static void store(const attn_model_config *c, int64_t layer, const char *part, attn_naming naming,
                  attn_place *place) {
  static const char *const which[] = {".q_proj.", ".k_proj.", ".v_proj."};
  const attn_layer_config *l = &c->layers[layer];
  int64_t dim = l->options.dim;
  (void)naming;
  if (strcmp(l->mixer->info.name, "minimax") != 0) return;
  for (int i = 0; i < 3; ++i)
    if (strstr(part, which[i]))
      place->rows = (attn_row_map){.run = dim, .period = 3 * dim, .offset = i * dim, .part = true};
}

/* Decays, which follow from the sizes. */
static bool leaves(const attn_model_config *c, const char *name) {
  static const char *const ends[] = {".slope_rate", ".query_decay", ".key_decay",
                                     ".diagonal_decay"};
  size_t length = strlen(name);
  (void)c;
  for (size_t i = 0; i < sizeof ends / sizeof *ends; ++i) {
    size_t end = strlen(ends[i]);
    if (length >= end && strcmp(name + length - end, ends[i]) == 0) return true;
  }
  return false;
}

/* Factors of a residual, under the names of the converted and of the original configuration. */
static attn_status read_factors(const json_t *json, const char *const keys[2],
                                const char *const originals[2], attn_residual *residual) {
  double *const values[2] = {&residual->keep, &residual->add};
  for (int i = 0; i < 2; ++i) {
    const char *key = json_object_get(json, keys[i]) ? keys[i] : originals[i];
    *values[i] = 1;
    ATTN_TRY(attn_json_double(json, key, ATTN_OPTIONAL, 0, 1e6, values[i]));
  }
  return ATTN_OK;
}

typedef struct residuals {
  attn_residual softmax, linear, fed;
} residuals;

static attn_status read_residuals(const json_t *json, residuals *r) {
  static const char *const softmax[] = {"full_attn_alpha_factor", "full_attn_beta_factor"};
  static const char *const linear[] = {"linear_attn_alpha_factor", "linear_attn_beta_factor"};
  static const char *const fed[] = {"mlp_alpha_factor", "mlp_beta_factor"};
  static const char *const originals[3][2] = {
      {"layernorm_full_attention_alpha", "layernorm_full_attention_beta"},
      {"layernorm_linear_attention_alpha", "layernorm_linear_attention_beta"},
      {"layernorm_mlp_alpha", "layernorm_mlp_beta"}};
  ATTN_TRY(read_factors(json, softmax, originals[0], &r->softmax));
  ATTN_TRY(read_factors(json, linear, originals[1], &r->linear));
  return read_factors(json, fed, originals[2], &r->fed);
}

/* The original's attn_type_list: 0 Lightning, 1 softmax. */
static attn_status read_type_list(const json_t *json, attn_model_config *c,
                                  const attn_mixer *linear, const attn_mixer_options *options) {
  json_t *list = NULL;
  ATTN_TRY(attn_json_array(json, "attn_type_list", ATTN_OPTIONAL, &list));
  for (int64_t l = 0; list && l < c->layer_count; ++l) {
    const json_t *type = json_array_get(list, (size_t)l);
    json_int_t value = json_integer_value(type);
    if (!json_is_integer(type) || value < 0 || value > 1)
      return attn_fail(ATTN_BAD_FORMAT, "attn_type_list: expected 0 or 1 for each layer");
    if (value == 1) continue;
    c->layers[l].mixer = linear;
    c->layers[l].options = *options;
    c->layers[l].options.layer = l;
  }
  return ATTN_OK;
}

static attn_status read_softmax(const json_t *json, attn_model_config *c, attn_mixer_options *o) {
  double part = 1;
  int64_t turned = 0;
  ATTN_TRY(attn_family_read_llama(json, c, o, &part));
  ATTN_TRY(attn_json_int(json, "sliding_window", ATTN_OPTIONAL, 0, INT32_MAX, &o->window));
  ATTN_TRY(attn_json_int(json, "rotary_dim", ATTN_OPTIONAL, 2, 256, &turned));
  if (!o->dim) o->dim = c->hidden / o->heads;
  if (part != 1) turned = (int64_t)((double)o->dim * part) / 2 * 2;
  o->rotary_dim = part != 1 && turned == 0 ? -1 : turned;
  return ATTN_OK;
}

static attn_status read_experts(const json_t *json, attn_model_config *c) {
  attn_experts_config experts = {.routing = {.active = 2, .normalise = true, .scale = 1},
                                 .width = c->feed_forward_width};
  int64_t shared = 0;
  ATTN_TRY(attn_json_int(json, "num_local_experts", ATTN_REQUIRED, 1, ATTN_MOST_EXPERTS,
                         &experts.routing.experts));
  ATTN_TRY(attn_json_int(json, "num_experts_per_tok", ATTN_OPTIONAL, 1, experts.routing.experts,
                         &experts.routing.active));
  ATTN_TRY(attn_json_int(json, "shared_intermediate_size", ATTN_OPTIONAL, 0, INT32_MAX, &shared));
  if (shared)
    return attn_fail(ATTN_UNSUPPORTED, "shared_intermediate_size is %lld, expected 0",
                     (long long)shared);
  for (int64_t l = 0; l < c->layer_count; ++l) c->layers[l].experts = experts;
  return ATTN_OK;
}

static attn_status configure(const json_t *json, attn_model_config *c) {
  const double usual_epsilon = 1e-6; /* of Lightning Attention's norm, whatever rms_norm_eps */
  attn_mixer_options softmax;
  residuals r;
  int index;
  bool after = true;
  ATTN_TRY(read_softmax(json, c, &softmax));
  ATTN_TRY(attn_json_bool(json, "postnorm", ATTN_OPTIONAL, &after));
  c->normed_residual = after;
  attn_mixer_options linear = {.hidden = c->hidden,
                               .layers = c->layer_count,
                               .heads = softmax.heads,
                               .dim = softmax.dim,
                               .norm_epsilon = usual_epsilon};
  ATTN_TRY(attn_mixer_find("minimax", &index));
  ATTN_TRY(attn_family_make_layers(c, "softmax", &softmax));
  if (json_is_array(json_object_get(json, "attn_type_list")))
    ATTN_TRY(read_type_list(json, c, attn_mixer_at(index), &linear));
  else
    ATTN_TRY(attn_family_set_linear(json, c, "minimax", &linear, 2));
  ATTN_TRY(read_residuals(json, &r));
  for (int64_t l = 0; l < c->layer_count; ++l) {
    c->layers[l].mixed = c->layers[l].mixer == attn_mixer_at(index) ? r.linear : r.softmax;
    c->layers[l].fed = r.fed;
  }
  return read_experts(json, c);
}

const attn_family attn_family_minimax = {
    .types = (const char *const[]){"minimax", "minimax_text_01", NULL},
    .configure = configure,
    .names = names,
    .mixer_names = mixer_names,
    .store = store,
    .leaves = leaves};
