/* Mixtral (arXiv 2401.04088): Mistral with a mixture of experts in every layer. */
#include "base/status.h"
#include "files/json.h"
#include "models/families/family.h"

extern const attn_family attn_family_llama;

static const attn_family_name names[] = {
    {"model.embed_tokens.", "model.embed_tokens.", "token_embd."},
    {"model.norm.", "model.norm.", "output_norm."},
    {"lm_head.", "lm_head.", "output."},
    {".token_norm.", ".input_layernorm.", ".attn_norm."},
    {".token_mixer.q_proj.", ".self_attn.q_proj.", ".attn_q."},
    {".token_mixer.k_proj.", ".self_attn.k_proj.", ".attn_k."},
    {".token_mixer.v_proj.", ".self_attn.v_proj.", ".attn_v."},
    {".token_mixer.o_proj.", ".self_attn.o_proj.", ".attn_output."},
    {".channel_norm.", ".post_attention_layernorm.", ".ffn_norm."},
    {".channel_mixer.router.", ".block_sparse_moe.gate.", ".ffn_gate_inp."},
    {".channel_mixer.experts.#.l1.", ".block_sparse_moe.experts.#.w1.", ".ffn_gate_exps."},
    {".channel_mixer.experts.#.l2.", ".block_sparse_moe.experts.#.w3.", ".ffn_up_exps."},
    {".channel_mixer.experts.#.l3.", ".block_sparse_moe.experts.#.w2.", ".ffn_down_exps."},
    {NULL, NULL, NULL}};

/* Until spring 2024 each expert had tensors of its own. */
static const attn_family_name older_names[] = {
    {".channel_mixer.experts.#.l1.", NULL, ".ffn_gate.#."},
    {".channel_mixer.experts.#.l2.", NULL, ".ffn_up.#."},
    {".channel_mixer.experts.#.l3.", NULL, ".ffn_down.#."},
    {NULL, NULL, NULL}};

static attn_status configure(const json_t *json, attn_model_config *c) {
  attn_mixer_options o;
  int64_t window = 0;
  attn_routing routing = {.active = 2, .normalise = true, .scale = 1};
  ATTN_TRY(attn_family_read_llama(json, c, &o, NULL));
  ATTN_TRY(attn_json_int(json, "sliding_window", ATTN_OPTIONAL, 0, INT32_MAX, &window));
  ATTN_TRY(attn_json_int(json, "num_local_experts", ATTN_REQUIRED, 1, ATTN_MOST_EXPERTS,
                         &routing.experts));
  ATTN_TRY(attn_json_int(json, "num_experts_per_tok", ATTN_OPTIONAL, 1, routing.experts,
                         &routing.active));
  o.window = window;
  ATTN_TRY(attn_family_make_layers(c, "softmax", &o));
  for (int64_t l = 0; l < c->layer_count; ++l)
    c->layers[l].experts =
        (attn_experts_config){.routing = routing, .width = c->feed_forward_width};
  return ATTN_OK;
}

static bool takes(const attn_gguf *file) {
  return !attn_family_llama.gguf_takes(file);
}

static attn_status complete(const attn_gguf *file, json_t *config) {
  (void)file;
  json_object_set(config, "num_local_experts", json_object_get(config, "num_experts"));
  return ATTN_OK;
}

const attn_family attn_family_mixtral = {.types = (const char *const[]){"mixtral", NULL},
                                         .architectures = (const char *const[]){"llama", NULL},
                                         .configure = configure,
                                         .names = names,
                                         .gguf_takes = takes,
                                         .gguf_complete = complete,
                                         .gguf_older = older_names,
                                         .gguf_pairs_together = true};
