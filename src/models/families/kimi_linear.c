/* Kimi Linear (arXiv 2510.26692): three layers of Kimi Delta Attention to one of multi-head latent
 * attention without positions; the first layers are dense, the others have experts, chosen and
 * corrected as in DeepSeek-V3. */
#include "base/status.h"
#include "files/json.h"
#include "models/families/family.h"

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
    {".channel_mixer.router.bias", ".block_sparse_moe.gate.e_score_correction_bias",
     ".exp_probs_b.bias"},
    {".channel_mixer.router.", ".block_sparse_moe.gate.", ".ffn_gate_inp."},
    {".channel_mixer.experts.#.l1.", ".block_sparse_moe.experts.#.w1.", ".ffn_gate_exps."},
    {".channel_mixer.experts.#.l2.", ".block_sparse_moe.experts.#.w3.", ".ffn_up_exps."},
    {".channel_mixer.experts.#.l3.", ".block_sparse_moe.experts.#.w2.", ".ffn_down_exps."},
    {".channel_mixer.shared.l1.", ".block_sparse_moe.shared_experts.gate_proj.",
     ".ffn_gate_shexp."},
    {".channel_mixer.shared.l2.", ".block_sparse_moe.shared_experts.up_proj.", ".ffn_up_shexp."},
    {".channel_mixer.shared.l3.", ".block_sparse_moe.shared_experts.down_proj.",
     ".ffn_down_shexp."},
    {NULL, NULL, NULL}};

static const attn_family_name kda_names[] = {
    {".token_mixer.q_proj.", ".self_attn.q_proj.", ".attn_q."},
    {".token_mixer.k_proj.", ".self_attn.k_proj.", ".attn_k."},
    {".token_mixer.v_proj.", ".self_attn.v_proj.", ".attn_v."},
    {".token_mixer.o_proj.", ".self_attn.o_proj.", ".attn_output."},
    {".token_mixer.q_conv1d.", ".self_attn.q_conv1d.", ".ssm_conv1d_q."},
    {".token_mixer.k_conv1d.", ".self_attn.k_conv1d.", ".ssm_conv1d_k."},
    {".token_mixer.v_conv1d.", ".self_attn.v_conv1d.", ".ssm_conv1d_v."},
    {".token_mixer.b_proj.", ".self_attn.b_proj.", ".ssm_beta."},
    {".token_mixer.f_a_proj.", ".self_attn.f_a_proj.", ".ssm_f_a."},
    {".token_mixer.f_b_proj.", ".self_attn.f_b_proj.", ".ssm_f_b."},
    {".token_mixer.g_a_proj.", ".self_attn.g_a_proj.", ".ssm_g_a."},
    {".token_mixer.g_b_proj.", ".self_attn.g_b_proj.", ".ssm_g_b."},
    {".token_mixer.o_norm.", ".self_attn.o_norm.", ".ssm_norm."},
    {".token_mixer.A_log", ".self_attn.A_log", ".ssm_a"},
    {".token_mixer.dt_bias", ".self_attn.dt_bias", ".ssm_dt.bias"},
    {NULL, NULL, NULL}};

static const attn_mixer_names mixer_names[] = {
    {"kda", kda_names}, {"mla", attn_family_mla_names}, {NULL, NULL}};

static void store(const attn_model_config *c, int64_t layer, const char *part, attn_naming naming,
                  attn_place *place) {
  if (strcmp(c->layers[layer].mixer->info.name, "mla") == 0)
    attn_family_mla_store(&c->layers[layer].options, part, false, naming, place);
  bool rates = strcmp(part, ".token_mixer.A_log") == 0;
  place->negative_exp = naming != ATTN_IN_SAFETENSORS && rates;
  if (rates) place->axes = ATTN_AXES_HEADS;
  if (strstr(part, "_conv1d.")) place->axes = ATTN_AXES_CONVOLUTION;
}

/* The numbers of linear_attn_config, or those that Transformers writes beside it. */
static attn_status read_kda(const json_t *json, const attn_model_config *c, attn_mixer_options *o) {
  json_t *own = NULL;
  *o = (attn_mixer_options){.hidden = c->hidden,
                            .layers = c->layer_count,
                            .norm_epsilon = c->norm_epsilon,
                            .heads = 32,
                            .dim = 128,
                            .convolution = 4,
                            .plain_gate = true};
  ATTN_TRY(attn_json_int(json, "linear_num_heads", ATTN_OPTIONAL, 1, 1 << 14, &o->heads));
  ATTN_TRY(attn_json_int(json, "linear_head_dim", ATTN_OPTIONAL, 1, 256, &o->dim));
  ATTN_TRY(attn_json_int(json, "linear_conv_kernel_dim", ATTN_OPTIONAL, 1, 16, &o->convolution));
  ATTN_TRY(attn_json_object(json, "linear_attn_config", ATTN_OPTIONAL, &own));
  if (!own) return ATTN_OK;
  ATTN_TRY(attn_json_int(own, "num_heads", ATTN_OPTIONAL, 1, 1 << 14, &o->heads));
  ATTN_TRY(attn_json_int(own, "head_dim", ATTN_OPTIONAL, 1, 256, &o->dim));
  return attn_json_int(own, "short_conv_kernel_size", ATTN_OPTIONAL, 1, 16, &o->convolution);
}

/* linear_attn_config numbers the layers of each kind from 1. */
static attn_status set_layers(const json_t *json, attn_model_config *c,
                              const attn_mixer_options *kda) {
  json_t *own = NULL, *list = NULL;
  int index;
  ATTN_TRY(attn_json_object(json, "linear_attn_config", ATTN_OPTIONAL, &own));
  if (own) ATTN_TRY(attn_json_array(own, "kda_layers", ATTN_OPTIONAL, &list));
  if (!list) return attn_family_set_linear(json, c, "kda", kda, 4);
  ATTN_TRY(attn_mixer_find("kda", &index));
  for (size_t i = 0; i < json_array_size(list); ++i) {
    int64_t number = json_integer_value(json_array_get(list, i));
    if (number < 1 || number > c->layer_count)
      return attn_fail(ATTN_BAD_FORMAT, "kda_layers: expected numbers from 1 to %lld",
                       (long long)c->layer_count);
    attn_layer_config *layer = &c->layers[number - 1];
    layer->mixer = attn_mixer_at(index);
    layer->options = *kda;
    layer->options.layer = number - 1;
  }
  return ATTN_OK;
}

/* Layers with experts: mlp_layer_types, or every moe_layer_freq-th from first_k_dense_replace on.
 */
static attn_status set_experts(const json_t *json, attn_model_config *c) {
  attn_experts_config experts;
  int64_t dense = 1, step = 1;
  json_t *types = NULL;
  const char *function = "sigmoid";
  ATTN_TRY(attn_family_read_deepseek_experts(json, true, &experts));
  experts.routing.normalise = true;
  ATTN_TRY(attn_json_bool(json, "moe_renormalize", ATTN_OPTIONAL, &experts.routing.normalise));
  ATTN_TRY(attn_json_string(json, "moe_router_activation_func", ATTN_OPTIONAL, &function));
  if (strcmp(function, "sigmoid") != 0)
    return attn_fail(ATTN_UNSUPPORTED, "moe_router_activation_func '%s' is not sigmoid", function);
  ATTN_TRY(
      attn_json_int(json, "first_k_dense_replace", ATTN_OPTIONAL, 0, ATTN_MOST_LAYERS, &dense));
  ATTN_TRY(attn_json_int(json, "moe_layer_freq", ATTN_OPTIONAL, 1, ATTN_MOST_LAYERS, &step));
  ATTN_TRY(attn_json_array(json, "mlp_layer_types", ATTN_OPTIONAL, &types));
  for (int64_t l = 0; l < c->layer_count; ++l) {
    const char *type = types ? json_string_value(json_array_get(types, (size_t)l)) : NULL;
    bool sparse = type ? strcmp(type, "sparse") == 0 : l >= dense && l % step == 0;
    if (types && (!type || (strcmp(type, "sparse") != 0 && strcmp(type, "dense") != 0)))
      return attn_fail(ATTN_BAD_FORMAT, "mlp_layer_types: expected sparse or dense for each layer");
    if (sparse) c->layers[l].experts = experts;
  }
  return ATTN_OK;
}

static attn_status configure(const json_t *json, attn_model_config *c) {
  attn_mixer_options mla, kda;
  ATTN_TRY(attn_family_read_llama(json, c, NULL, NULL));
  ATTN_TRY(attn_family_read_mla(json, c, &mla));
  mla.rotary_dim = -1;
  ATTN_TRY(read_kda(json, c, &kda));
  ATTN_TRY(attn_family_make_layers(c, "mla", &mla));
  ATTN_TRY(set_layers(json, c, &kda));
  return set_experts(json, c);
}

/* GGUF -------------------------------------------------------------------------------------------
 */

static const attn_gguf_field fields[] = {
    {"leading_dense_block_count", "first_k_dense_replace", ATTN_GGUF_INTEGER, ATTN_REQUIRED},
    {"attention.q_lora_rank", "q_lora_rank", ATTN_GGUF_INTEGER, ATTN_OPTIONAL},
    {"attention.kv_lora_rank", "kv_lora_rank", ATTN_GGUF_INTEGER, ATTN_REQUIRED},
    {"attention.key_length_mla", "key_length_mla", ATTN_GGUF_INTEGER, ATTN_REQUIRED},
    {"attention.value_length_mla", "v_head_dim", ATTN_GGUF_INTEGER, ATTN_REQUIRED},
    {"rope.dimension_count", "qk_rope_head_dim", ATTN_GGUF_INTEGER, ATTN_REQUIRED},
    {"kda.head_dim", "kda_head_dim", ATTN_GGUF_INTEGER, ATTN_REQUIRED},
    {"ssm.conv_kernel", "conv_kernel", ATTN_GGUF_INTEGER, ATTN_REQUIRED},
    {"expert_shared_count", "num_shared_experts", ATTN_GGUF_INTEGER, ATTN_OPTIONAL},
    {"expert_gating_func", "gating", ATTN_GGUF_INTEGER, ATTN_REQUIRED},
    {"expert_weights_scale", "routed_scaling_factor", ATTN_GGUF_REAL, ATTN_OPTIONAL},
    {NULL, NULL, 0, 0}};

static attn_status complete(const attn_gguf *file, json_t *config) {
  const int64_t sigmoid = 2;
  if (!file)
    return attn_fail(ATTN_UNSUPPORTED, "GGUF files of architecture 'kimi-linear' are not written");
  int64_t gating = json_integer_value(json_object_get(config, "gating"));
  if (gating != sigmoid)
    return attn_fail(ATTN_UNSUPPORTED, "kimi-linear.expert_gating_func is %lld, expected 2",
                     (long long)gating);
  json_t *types = attn_family_linear_layers(file, config);
  json_t *kda = json_array(), *full = json_array();
  for (size_t l = 0; l < json_array_size(types); ++l) {
    const char *type = json_string_value(json_array_get(types, l));
    bool linear = type && strcmp(type, "linear_attention") == 0;
    json_array_append_new(linear ? kda : full, json_integer((json_int_t)l + 1));
  }
  json_decref(types);
  json_t *own = json_pack("{s:o, s:o, s:O, s:O, s:O}", "kda_layers", kda, "full_attn_layers", full,
                          "head_dim", json_object_get(config, "kda_head_dim"), "num_heads",
                          json_object_get(config, "num_attention_heads"), "short_conv_kernel_size",
                          json_object_get(config, "conv_kernel"));
  json_object_set_new(config, "linear_attn_config", own);
  json_object_del(config, "kda_head_dim");
  json_object_del(config, "conv_kernel");
  json_object_del(config, "gating");
  return attn_family_complete_mla(config);
}

const attn_family attn_family_kimi_linear = {.types = (const char *const[]){"kimi_linear", NULL},
                                             .architectures =
                                                 (const char *const[]){"kimi-linear", NULL},
                                             .configure = configure,
                                             .names = names,
                                             .mixer_names = mixer_names,
                                             .store = store,
                                             .gguf_fields = fields,
                                             .gguf_complete = complete,
                                             .gguf_older = attn_family_mla_older_names,
                                             .gguf_own_heads = true};
