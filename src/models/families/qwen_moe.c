/* Qwen's mixtures of experts: Qwen1.5-MoE and Qwen2-57B (qwen2_moe, arXiv 2407.10671), Qwen3-30B
 * and 235B (qwen3_moe, arXiv 2505.09388): attention of Qwen2 and Qwen3, experts chosen by softmax.
 * Qwen2's have one more expert that every token goes to, gated by sigmoid(x w^T). */
#include "base/status.h"
#include "files/json.h"
#include "models/families/family.h"

#include <string.h>

static const attn_family_name names[] = {
    {"model.embed_tokens.", "model.embed_tokens.", "token_embd."},
    {"model.norm.", "model.norm.", "output_norm."},
    {"lm_head.", "lm_head.", "output."},
    {".token_norm.", ".input_layernorm.", ".attn_norm."},
    {".token_mixer.q_proj.", ".self_attn.q_proj.", ".attn_q."},
    {".token_mixer.k_proj.", ".self_attn.k_proj.", ".attn_k."},
    {".token_mixer.v_proj.", ".self_attn.v_proj.", ".attn_v."},
    {".token_mixer.o_proj.", ".self_attn.o_proj.", ".attn_output."},
    {".token_mixer.q_norm.", ".self_attn.q_norm.", ".attn_q_norm."},
    {".token_mixer.k_norm.", ".self_attn.k_norm.", ".attn_k_norm."},
    {".channel_norm.", ".post_attention_layernorm.", ".ffn_norm."},
    {".channel_mixer.l1.", ".mlp.gate_proj.", ".ffn_gate."},
    {".channel_mixer.l2.", ".mlp.up_proj.", ".ffn_up."},
    {".channel_mixer.l3.", ".mlp.down_proj.", ".ffn_down."},
    {".channel_mixer.router.", ".mlp.gate.", ".ffn_gate_inp."},
    {".channel_mixer.experts.#.l1.", ".mlp.experts.#.gate_proj.", ".ffn_gate_exps."},
    {".channel_mixer.experts.#.l2.", ".mlp.experts.#.up_proj.", ".ffn_up_exps."},
    {".channel_mixer.experts.#.l3.", ".mlp.experts.#.down_proj.", ".ffn_down_exps."},
    {".channel_mixer.shared.l1.", ".mlp.shared_expert.gate_proj.", ".ffn_gate_shexp."},
    {".channel_mixer.shared.l2.", ".mlp.shared_expert.up_proj.", ".ffn_up_shexp."},
    {".channel_mixer.shared.l3.", ".mlp.shared_expert.down_proj.", ".ffn_down_shexp."},
    {".channel_mixer.shared_gate.", ".mlp.shared_expert_gate.", ".ffn_gate_inp_shexp."},
    {NULL, NULL, NULL}};

static bool listed(const json_t *list, int64_t layer) {
  for (size_t i = 0; i < json_array_size(list); ++i)
    if (json_integer_value(json_array_get(list, i)) == layer) return true;
  return false;
}

attn_status attn_family_read_qwen_experts(const json_t *json, attn_model_config *c) {
  attn_experts_config experts = {.routing = {.scale = 1}, .shared_gate = true};
  attn_routing *routing = &experts.routing;
  int64_t step = 1;
  json_t *dense = NULL;
  ATTN_TRY(attn_json_int(json, "num_local_experts", ATTN_OPTIONAL, 0, ATTN_MOST_EXPERTS,
                         &routing->experts));
  ATTN_TRY(
      attn_json_int(json, "num_experts", ATTN_OPTIONAL, 0, ATTN_MOST_EXPERTS, &routing->experts));
  if (routing->experts == 0) return ATTN_OK;
  ATTN_TRY(attn_json_int(json, "num_experts_per_tok", ATTN_REQUIRED, 1, routing->experts,
                         &routing->active));
  ATTN_TRY(attn_json_bool(json, "norm_topk_prob", ATTN_OPTIONAL, &routing->normalise));
  ATTN_TRY(attn_json_int(json, "moe_intermediate_size", ATTN_REQUIRED, 1, ATTN_MOST_WIDTH,
                         &experts.width));
  ATTN_TRY(attn_json_int(json, "shared_expert_intermediate_size", ATTN_OPTIONAL, 0, ATTN_MOST_WIDTH,
                         &experts.shared_width));
  ATTN_TRY(attn_json_int(json, "decoder_sparse_step", ATTN_OPTIONAL, 1, INT32_MAX, &step));
  ATTN_TRY(attn_json_array(json, "mlp_only_layers", ATTN_OPTIONAL, &dense));
  for (int64_t l = 0; l < c->layer_count; ++l)
    if ((l + 1) % step == 0 && !listed(dense, l)) c->layers[l].experts = experts;
  return ATTN_OK;
}

/* Windows as in Qwen2: with use_sliding_window, from layer max_window_layers on. */
static attn_status configure(const json_t *json, attn_model_config *c, bool is_qwen3) {
  attn_mixer_options o;
  int64_t window = 0, from = is_qwen3 ? 0 : 28;
  bool slides = false;
  ATTN_TRY(attn_family_read_llama(json, c, &o, NULL));
  o.bias = !is_qwen3;
  o.qk_norm = is_qwen3;
  ATTN_TRY(attn_json_bool(json, is_qwen3 ? "attention_bias" : "qkv_bias", ATTN_OPTIONAL, &o.bias));
  o.output_bias = is_qwen3 && o.bias;
  ATTN_TRY(attn_json_bool(json, "use_sliding_window", ATTN_OPTIONAL, &slides));
  ATTN_TRY(attn_json_int(json, "sliding_window", ATTN_OPTIONAL, 0, INT32_MAX, &window));
  if (!is_qwen3)
    ATTN_TRY(attn_json_int(json, "max_window_layers", ATTN_OPTIONAL, 0, INT32_MAX, &from));
  ATTN_TRY(attn_family_make_layers(c, "softmax", &o));
  if (slides) ATTN_TRY(attn_family_set_windows(json, c, window, from));
  return attn_family_read_qwen_experts(json, c);
}

static attn_status configure_qwen2(const json_t *json, attn_model_config *c) {
  return configure(json, c, false);
}

static attn_status configure_qwen3(const json_t *json, attn_model_config *c) {
  return configure(json, c, true);
}

const attn_family attn_family_qwen2_moe = {.types = (const char *const[]){"qwen2_moe", NULL},
                                           .architectures = (const char *const[]){"qwen2moe", NULL},
                                           .configure = configure_qwen2,
                                           .names = names};

const attn_family attn_family_qwen3_moe = {.types = (const char *const[]){"qwen3_moe", NULL},
                                           .architectures = (const char *const[]){"qwen3moe", NULL},
                                           .gguf_defaults = "{\"norm_topk_prob\": true}",
                                           .configure = configure_qwen3,
                                           .names = names};
