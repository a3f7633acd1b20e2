/* Mixtral (arXiv 2401.04088): Mistral with a mixture of experts in every layer. */
#include "base/status.h"
#include "files/json.h"
#include "models/families/family.h"

static const attn_family_name names[] = {
    {"model.embed_tokens.", "model.embed_tokens.", NULL},
    {"model.norm.", "model.norm.", NULL},
    {"lm_head.", "lm_head.", NULL},
    {".token_norm.", ".input_layernorm.", NULL},
    {".token_mixer.", ".self_attn.", NULL},
    {".channel_norm.", ".post_attention_layernorm.", NULL},
    {".channel_mixer.router.", ".block_sparse_moe.gate.", NULL},
    {".channel_mixer.experts.#.l1.", ".block_sparse_moe.experts.#.w1.", NULL},
    {".channel_mixer.experts.#.l2.", ".block_sparse_moe.experts.#.w3.", NULL},
    {".channel_mixer.experts.#.l3.", ".block_sparse_moe.experts.#.w2.", NULL},
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

const attn_family attn_family_mixtral = {
    .types = (const char *const[]){"mixtral", NULL}, .configure = configure, .names = names};
