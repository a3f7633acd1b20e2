/* DeepSeek-V2 (arXiv 2405.04434) and V3 (2412.19437): multi-head latent attention, and from layer
 * first_k_dense_replace on experts, of which some are for every token. V2 takes the experts of the
 * highest softmax; V3 scores by sigmoid, corrects by a bias, and keeps to the best groups.
 *
 * In the files the channels that turn together lie side by side, and W_UK and W_UV by head in one
 * matrix. */
#include "base/status.h"
#include "files/json.h"
#include "models/families/family.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const attn_family_name names[] = {
    {"model.embed_tokens.", "model.embed_tokens.", "token_embd."},
    {"model.norm.", "model.norm.", "output_norm."},
    {"lm_head.", "lm_head.", "output."},
    {".token_norm.", ".input_layernorm.", ".attn_norm."},
    {".channel_norm.", ".post_attention_layernorm.", ".ffn_norm."},
    {".channel_mixer.l1.", ".mlp.gate_proj.", ".ffn_gate."},
    {".channel_mixer.l2.", ".mlp.up_proj.", ".ffn_up."},
    {".channel_mixer.l3.", ".mlp.down_proj.", ".ffn_down."},
    {".channel_mixer.router.bias", ".mlp.gate.e_score_correction_bias", ".exp_probs_b.bias"},
    {".channel_mixer.router.", ".mlp.gate.", ".ffn_gate_inp."},
    {".channel_mixer.experts.#.l1.", ".mlp.experts.#.gate_proj.", ".ffn_gate_exps."},
    {".channel_mixer.experts.#.l2.", ".mlp.experts.#.up_proj.", ".ffn_up_exps."},
    {".channel_mixer.experts.#.l3.", ".mlp.experts.#.down_proj.", ".ffn_down_exps."},
    {".channel_mixer.shared.l1.", ".mlp.shared_experts.gate_proj.", ".ffn_gate_shexp."},
    {".channel_mixer.shared.l2.", ".mlp.shared_experts.up_proj.", ".ffn_up_shexp."},
    {".channel_mixer.shared.l3.", ".mlp.shared_experts.down_proj.", ".ffn_down_shexp."},
    {NULL, NULL, NULL}};

const attn_family_name attn_family_mla_names[] = {
    {".token_mixer.q_proj.", ".self_attn.q_proj.", ".attn_q."},
    {".token_mixer.q_up_proj.", ".self_attn.q_b_proj.", ".attn_q_b."},
    {".token_mixer.q_down_proj.", ".self_attn.q_a_proj.", ".attn_q_a."},
    {".token_mixer.q_norm.", ".self_attn.q_a_layernorm.", ".attn_q_a_norm."},
    {".token_mixer.kv_down_proj.", ".self_attn.kv_a_proj_with_mqa.", ".attn_kv_a_mqa."},
    {".token_mixer.kv_norm.", ".self_attn.kv_a_layernorm.", ".attn_kv_a_norm."},
    {".token_mixer.k_up_proj.", ".self_attn.kv_b_proj.", ".attn_k_b."},
    {".token_mixer.v_up_proj.", ".self_attn.kv_b_proj.", ".attn_v_b."},
    {".token_mixer.o_proj.", ".self_attn.o_proj.", ".attn_output."},
    {NULL, NULL, NULL}};

/* Until spring 2025, as in safetensors. */
const attn_family_name attn_family_mla_older_names[] = {
    {".token_mixer.k_up_proj.", NULL, ".attn_kv_b."},
    {".token_mixer.v_up_proj.", NULL, ".attn_kv_b."},
    {NULL, NULL, NULL}};

static const attn_mixer_names mixer_names[] = {{"mla", attn_family_mla_names}, {NULL, NULL}};

/* Newer GGUF files have W_UK and W_UV apart, W_UK transposed. */
void attn_family_mla_store(const attn_mixer_options *o, const char *part, bool interleaved,
                           attn_naming naming, attn_place *place) {
  int64_t both = o->dim + o->value_dim;
  attn_row_map *map = &place->rows;
  if (naming == ATTN_IN_GGUF) {
    if (strstr(part, ".k_up_proj.")) place->transposed = o->dim;
    if (strstr(part, ".k_up_proj.") || strstr(part, ".v_up_proj.")) place->heads = o->heads;
  } else if (strstr(part, ".k_up_proj.")) {
    *map = (attn_row_map){.run = o->dim, .period = both, .part = true};
  } else if (strstr(part, ".v_up_proj.")) {
    *map = (attn_row_map){.run = o->value_dim, .period = both, .offset = o->dim, .part = true};
  }
  if (!interleaved) return;
  if (strstr(part, ".q_proj.") || strstr(part, ".q_up_proj."))
    *map = (attn_row_map){.head = o->dim + o->shared_dim, .turned_from = o->dim};
  if (strstr(part, ".kv_down_proj."))
    *map = (attn_row_map){.head = o->latent_rank + o->shared_dim, .turned_from = o->latent_rank};
}

static void store(const attn_model_config *c, int64_t layer, const char *part, attn_naming naming,
                  attn_place *place) {
  bool interleaved = true;
  (void)attn_json_bool(c->json, "rope_interleave", ATTN_OPTIONAL, &interleaved);
  attn_family_mla_store(&c->layers[layer].options, part, interleaved, naming, place);
}

/* Layers beyond the last predict further tokens; they are not read. */
static bool leaves(const attn_model_config *c, const char *name) {
  static const char prefix[] = "model.layers.";
  size_t length = sizeof prefix - 1;
  return strncmp(name, prefix, length) == 0 && strtoll(name + length, NULL, 10) >= c->layer_count;
}

attn_status attn_family_read_mla(const json_t *json, attn_model_config *c, attn_mixer_options *o) {
  const double usual_epsilon = 1e-6; /* of the latents' norms, whatever rms_norm_eps */
  int64_t rank = 0;
  bool bias = false;
  *o = (attn_mixer_options){
      .hidden = c->hidden, .layers = c->layer_count, .norm_epsilon = usual_epsilon};
  ATTN_TRY(attn_json_int(json, "num_attention_heads", ATTN_REQUIRED, 1, 1 << 14, &o->heads));
  ATTN_TRY(attn_json_int(json, "kv_lora_rank", ATTN_REQUIRED, 1, 1024, &o->latent_rank));
  ATTN_TRY(attn_json_int(json, "q_lora_rank", ATTN_OPTIONAL, 0, ATTN_MOST_HIDDEN, &rank));
  ATTN_TRY(attn_json_int(json, "qk_nope_head_dim", ATTN_REQUIRED, 1, 256, &o->dim));
  ATTN_TRY(attn_json_int(json, "qk_rope_head_dim", ATTN_REQUIRED, 1, 256, &o->shared_dim));
  ATTN_TRY(attn_json_int(json, "v_head_dim", ATTN_REQUIRED, 1, 256, &o->value_dim));
  ATTN_TRY(attn_json_bool(json, "attention_bias", ATTN_OPTIONAL, &bias));
  o->query_rank = rank;
  if (bias) return attn_fail(ATTN_UNSUPPORTED, "attention_bias is true: biases are not read");
  return ATTN_OK;
}

/* YaRN's magnitude of mscale_all_dim is in the scale of the logits, squared. */
static attn_status read_positions(const json_t *json, attn_model_config *c, attn_mixer_options *o) {
  json_t *scaling = NULL;
  double all = 0;
  if (o->shared_dim % 2)
    return attn_fail(ATTN_BAD_FORMAT, "qk_rope_head_dim is %lld: channels turn in pairs",
                     (long long)o->shared_dim);
  ATTN_TRY(attn_family_read_rope(json, c, &o->rope, NULL));
  ATTN_TRY(attn_json_object(json, "rope_scaling", ATTN_OPTIONAL, &scaling));
  if (!scaling) ATTN_TRY(attn_json_object(json, "rope_parameters", ATTN_OPTIONAL, &scaling));
  if (!scaling || o->rope.scaling == ATTN_ROPE_PLAIN) return ATTN_OK;
  ATTN_TRY(attn_json_double(scaling, "mscale_all_dim", ATTN_OPTIONAL, 0, 1e6, &all));
  if (all == 0 || o->rope.factor <= 1) return ATTN_OK;
  double magnitude = 0.1 * all * log(o->rope.factor) + 1;
  o->scale = magnitude * magnitude / sqrt((double)(o->dim + o->shared_dim));
  return ATTN_OK;
}

/* Key names differ from family to family: the first that is there counts. */
static attn_status read_int(const json_t *json, const char *const keys[2], attn_json_need need,
                            int64_t least, int64_t most, int64_t *value) {
  const char *key = json_object_get(json, keys[1]) ? keys[1] : keys[0];
  return attn_json_int(json, key, need, least, most, value);
}

attn_status attn_family_read_deepseek_experts(const json_t *json, bool by_sigmoid,
                                              attn_experts_config *experts) {
  static const char *const count[] = {"n_routed_experts", "num_experts"};
  static const char *const local[] = {"n_routed_experts", "num_local_experts"};
  static const char *const active[] = {"num_experts_per_tok", "num_experts_per_token"};
  static const char *const groups[] = {"n_group", "num_expert_group"};
  static const char *const shared[] = {"n_shared_experts", "num_shared_experts"};
  const char *const *key = json_object_get(json, "num_local_experts") ? local : count;
  attn_routing *r = &experts->routing;
  int64_t shared_count = 0;
  *experts = (attn_experts_config){.correction = by_sigmoid};
  *r = (attn_routing){.active = 8, .scale = 1, .sigmoid = by_sigmoid, .best_two = by_sigmoid};
  ATTN_TRY(read_int(json, key, ATTN_REQUIRED, 1, ATTN_MOST_EXPERTS, &r->experts));
  ATTN_TRY(read_int(json, active, ATTN_OPTIONAL, 1, r->experts, &r->active));
  ATTN_TRY(read_int(json, groups, ATTN_OPTIONAL, 1, r->experts, &r->groups));
  ATTN_TRY(attn_json_int(json, "topk_group", ATTN_OPTIONAL, 1, r->experts, &r->active_groups));
  ATTN_TRY(attn_json_double(json, "routed_scaling_factor", ATTN_OPTIONAL, 0, 1e6, &r->scale));
  ATTN_TRY(attn_json_int(json, "moe_intermediate_size", ATTN_REQUIRED, 1, ATTN_MOST_WIDTH,
                         &experts->width));
  ATTN_TRY(read_int(json, shared, ATTN_OPTIONAL, 0, 1 << 10, &shared_count));
  experts->shared_width = shared_count * experts->width;
  if (r->groups <= 1) r->groups = r->active_groups = 0;
  return ATTN_OK;
}

/* V2 has groups only where topk_method says so, and never normalises (as Transformers has it). */
static attn_status read_v2_experts(const json_t *json, attn_experts_config *experts) {
  const char *method = "greedy";
  ATTN_TRY(attn_family_read_deepseek_experts(json, false, experts));
  ATTN_TRY(attn_json_string(json, "topk_method", ATTN_OPTIONAL, &method));
  if (strcmp(method, "greedy") == 0)
    experts->routing.groups = experts->routing.active_groups = 0;
  else if (strcmp(method, "group_limited_greedy") != 0)
    return attn_fail(ATTN_UNSUPPORTED, "topk_method '%s' is not greedy or group_limited_greedy",
                     method);
  return ATTN_OK;
}

static attn_status read_v3_experts(const json_t *json, attn_experts_config *experts) {
  ATTN_TRY(attn_family_read_deepseek_experts(json, true, experts));
  experts->routing.normalise = true;
  return attn_json_bool(json, "norm_topk_prob", ATTN_OPTIONAL, &experts->routing.normalise);
}

static attn_status configure(const json_t *json, attn_model_config *c, bool is_v3) {
  attn_mixer_options o;
  attn_experts_config experts;
  int64_t dense = is_v3 ? 3 : 0, step = 1;
  ATTN_TRY(attn_family_read_llama(json, c, NULL, NULL));
  ATTN_TRY(attn_family_read_mla(json, c, &o));
  ATTN_TRY(read_positions(json, c, &o));
  ATTN_TRY(is_v3 ? read_v3_experts(json, &experts) : read_v2_experts(json, &experts));
  ATTN_TRY(
      attn_json_int(json, "first_k_dense_replace", ATTN_OPTIONAL, 0, ATTN_MOST_LAYERS, &dense));
  ATTN_TRY(attn_json_int(json, "moe_layer_freq", ATTN_OPTIONAL, 1, ATTN_MOST_LAYERS, &step));
  ATTN_TRY(attn_family_make_layers(c, "mla", &o));
  for (int64_t l = dense; l < c->layer_count; ++l)
    if (l % step == 0) c->layers[l].experts = experts;
  return ATTN_OK;
}

static attn_status configure_v2(const json_t *json, attn_model_config *c) {
  return configure(json, c, false);
}

static attn_status configure_v3(const json_t *json, attn_model_config *c) {
  return configure(json, c, true);
}

/* GGUF -------------------------------------------------------------------------------------------
 * V2 and V3 are one architecture, told apart by how experts are scored. Newer files describe
 * attention over the latents, as one key of all heads: those of the heads are in keys of their own.
 */

static const attn_gguf_field fields[] = {
    {"leading_dense_block_count", "first_k_dense_replace", ATTN_GGUF_INTEGER, ATTN_REQUIRED},
    {"attention.q_lora_rank", "q_lora_rank", ATTN_GGUF_INTEGER, ATTN_OPTIONAL},
    {"attention.kv_lora_rank", "kv_lora_rank", ATTN_GGUF_INTEGER, ATTN_REQUIRED},
    {"attention.key_length_mla", "key_length_mla", ATTN_GGUF_INTEGER, ATTN_OPTIONAL},
    {"attention.value_length", "value_length", ATTN_GGUF_INTEGER, ATTN_OPTIONAL},
    {"attention.value_length_mla", "v_head_dim", ATTN_GGUF_INTEGER, ATTN_OPTIONAL},
    {"rope.dimension_count", "qk_rope_head_dim", ATTN_GGUF_INTEGER, ATTN_REQUIRED},
    {"expert_shared_count", "n_shared_experts", ATTN_GGUF_INTEGER, ATTN_OPTIONAL},
    {"expert_gating_func", "gating", ATTN_GGUF_INTEGER, ATTN_OPTIONAL},
    {"expert_group_count", "n_group", ATTN_GGUF_INTEGER, ATTN_OPTIONAL},
    {"expert_group_used_count", "topk_group", ATTN_GGUF_INTEGER, ATTN_OPTIONAL},
    {"expert_weights_scale", "routed_scaling_factor", ATTN_GGUF_REAL, ATTN_OPTIONAL},
    {"expert_weights_norm", "norm_topk_prob", ATTN_GGUF_FLAG, ATTN_OPTIONAL},
    {NULL, NULL, 0, 0}};

static int64_t number(const json_t *json, const char *key) {
  return json_integer_value(json_object_get(json, key));
}

attn_status attn_family_complete_mla(json_t *config) {
  static const char *const gone[] = {"head_dim", "key_length_mla", "value_length",
                                     "mlp_only_layers"};
  bool apart = json_object_get(config, "key_length_mla") != NULL;
  int64_t key = number(config, apart ? "key_length_mla" : "head_dim");
  int64_t turned = number(config, "qk_rope_head_dim");
  if (key <= turned)
    return attn_fail(ATTN_BAD_FORMAT, "attention.key_length%s is %lld, of which %lld turn",
                     apart ? "_mla" : "", (long long)key, (long long)turned);
  json_object_set_new(config, "qk_nope_head_dim", json_integer(key - turned));
  if (!json_object_get(config, "v_head_dim"))
    json_object_set_new(config, "v_head_dim", json_integer(number(config, "value_length")));
  json_object_set(config, "num_key_value_heads", json_object_get(config, "num_attention_heads"));
  for (size_t i = 0; i < sizeof gone / sizeof *gone; ++i) json_object_del(config, gone[i]);
  return ATTN_OK;
}

enum { SOFTMAX = 1, SIGMOID = 2 }; /* of expert_gating_func */

/* Files of V2 from before V3 say nothing. */
static int64_t scored_by(const attn_gguf *file) {
  int64_t function = SOFTMAX;
  (void)attn_gguf_int(file, "deepseek2.expert_gating_func", ATTN_OPTIONAL, 0, 255, &function);
  return function ? function : SOFTMAX;
}

static bool takes_v2(const attn_gguf *file) {
  return scored_by(file) != SIGMOID;
}

static bool takes_v3(const attn_gguf *file) {
  return scored_by(file) == SIGMOID;
}

static attn_status complete(json_t *config) {
  json_object_del(config, "gating");
  json_object_set(config, "n_routed_experts", json_object_get(config, "num_experts"));
  json_object_del(config, "num_experts");
  return attn_family_complete_mla(config);
}

static attn_status complete_v2(const attn_gguf *file, json_t *config) {
  int64_t function = number(config, "gating");
  (void)file;
  if (function != 0 && function != SOFTMAX)
    return attn_fail(ATTN_UNSUPPORTED, "deepseek2.expert_gating_func is %lld, expected 1 or 2",
                     (long long)function);
  ATTN_TRY(complete(config));
  if (json_is_true(json_object_get(config, "norm_topk_prob")))
    return attn_fail(ATTN_UNSUPPORTED,
                     "deepseek2.expert_weights_norm is true beside scores by softmax");
  if (number(config, "n_group") > 1)
    json_object_set_new(config, "topk_method", json_string("group_limited_greedy"));
  return ATTN_OK;
}

static attn_status complete_v3(const attn_gguf *file, json_t *config) {
  (void)file;
  ATTN_TRY(complete(config));
  if (!json_object_get(config, "norm_topk_prob"))
    json_object_set_new(config, "norm_topk_prob", json_false());
  return ATTN_OK;
}

static void set(json_t *config, const char *key, int64_t value) {
  json_object_set_new(config, key, json_integer(value));
}

static void say_experts(const attn_model_config *c, json_t *config) {
  int64_t dense = 0;
  while (dense < c->layer_count && !c->layers[dense].experts.routing.experts) ++dense;
  set(config, "first_k_dense_replace", dense);
  if (dense == c->layer_count) return;
  const attn_experts_config *experts = &c->layers[dense].experts;
  const attn_routing *r = &experts->routing;
  set(config, "n_shared_experts", experts->shared_width / experts->width);
  set(config, "gating", r->sigmoid ? SIGMOID : SOFTMAX);
  json_object_set_new(config, "routed_scaling_factor", json_real(r->scale));
  json_object_set_new(config, "norm_topk_prob", json_boolean(r->normalise));
  set(config, "n_group", r->groups > 1 ? r->groups : 1);
  set(config, "topk_group", r->groups > 1 ? r->active_groups : 1);
}

/* As newer files: of attention over the latents. */
static attn_status say(const attn_model_config *c, json_t *config) {
  const attn_mixer_options *o = &c->layers[0].options;
  say_experts(c, config);
  set(config, "num_key_value_heads", 1);
  set(config, "head_dim", o->latent_rank + o->shared_dim);
  set(config, "value_length", o->latent_rank);
  set(config, "key_length_mla", o->dim + o->shared_dim);
  set(config, "v_head_dim", o->value_dim);
  set(config, "kv_lora_rank", o->latent_rank);
  set(config, "qk_rope_head_dim", o->shared_dim);
  if (o->query_rank) set(config, "q_lora_rank", o->query_rank);
  return ATTN_OK;
}

const attn_family attn_family_deepseek_v2 = {.types = (const char *const[]){"deepseek_v2", NULL},
                                             .architectures =
                                                 (const char *const[]){"deepseek2", NULL},
                                             .configure = configure_v2,
                                             .names = names,
                                             .mixer_names = mixer_names,
                                             .store = store,
                                             .leaves = leaves,
                                             .gguf_takes = takes_v2,
                                             .gguf_fields = fields,
                                             .gguf_complete = complete_v2,
                                             .gguf_say = say,
                                             .gguf_older = attn_family_mla_older_names,
                                             .gguf_own_heads = true,
                                             .gguf_mscale = true};

const attn_family attn_family_deepseek_v3 = {.types = (const char *const[]){"deepseek_v3", NULL},
                                             .architectures =
                                                 (const char *const[]){"deepseek2", NULL},
                                             .configure = configure_v3,
                                             .names = names,
                                             .mixer_names = mixer_names,
                                             .store = store,
                                             .leaves = leaves,
                                             .gguf_takes = takes_v3,
                                             .gguf_fields = fields,
                                             .gguf_complete = complete_v3,
                                             .gguf_say = say,
                                             .gguf_older = attn_family_mla_older_names,
                                             .gguf_own_heads = true,
                                             .gguf_mscale = true};
