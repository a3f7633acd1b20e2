/* Llama (arXiv 2302.13971, 2407.21783) and its nearest relatives: SmolLM2, Mistral (2310.06825),
 * Qwen2 (2407.10671), Qwen3 (2505.09388).
 *
 *   x = x + attention(RMSNorm(x));  x = x + (silu(x W1^T) (.) x W3^T) W2^T of RMSNorm(x)
 *
 * Attention is grouped softmax attention with rotary positions. Qwen2 has biases on q, k and v;
 * Qwen3 normalises the heads of q and k; Mistral sees a sliding window. */
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
    {NULL, NULL, NULL}};

static attn_status check_feed_forward(const json_t *json) {
  const char *activation = "silu";
  bool bias = false;
  ATTN_TRY(attn_json_string(json, "hidden_act", ATTN_OPTIONAL, &activation));
  ATTN_TRY(attn_json_bool(json, "mlp_bias", ATTN_OPTIONAL, &bias));
  if (strcmp(activation, "silu") != 0)
    return attn_fail(ATTN_UNSUPPORTED, "hidden_act '%s' is not silu", activation);
  if (bias) return attn_fail(ATTN_UNSUPPORTED, "mlp_bias is true: biases there are not read");
  return ATTN_OK;
}

attn_status attn_family_read_llama(const json_t *json, attn_model_config *c, attn_mixer_options *o,
                                   double *part) {
  ATTN_TRY(attn_family_read_sizes(json, c));
  ATTN_TRY(check_feed_forward(json));
  c->feed_forward = ATTN_SWIGLU;
  c->norm = ATTN_NORM_RMS;
  c->norm_epsilon = 1e-6;
  c->embedding_scale = 1;
  ATTN_TRY(attn_json_double(json, "rms_norm_eps", ATTN_OPTIONAL, 0, 1, &c->norm_epsilon));
  ATTN_TRY(attn_json_bool(json, "tie_word_embeddings", ATTN_OPTIONAL, &c->tied));
  if (!o) return ATTN_OK;
  *o = (attn_mixer_options){
      .hidden = c->hidden, .layers = c->layer_count, .norm_epsilon = c->norm_epsilon};
  ATTN_TRY(attn_json_int(json, "num_attention_heads", ATTN_REQUIRED, 1, 1 << 14, &o->heads));
  ATTN_TRY(attn_json_int(json, "num_key_value_heads", ATTN_OPTIONAL, 1, 1 << 14, &o->kv_heads));
  ATTN_TRY(attn_json_int(json, "head_dim", ATTN_OPTIONAL, 1, 256, &o->dim));
  return attn_family_read_rope(json, c, &o->rope, part);
}

attn_status attn_family_set_windows(const json_t *json, attn_model_config *c, int64_t window,
                                    int64_t from) {
  json_t *types = NULL;
  ATTN_TRY(attn_json_array(json, "layer_types", ATTN_OPTIONAL, &types));
  for (int64_t l = 0; l < c->layer_count; ++l) {
    bool slides = l >= from;
    const char *type = types ? json_string_value(json_array_get(types, (size_t)l)) : NULL;
    if (types &&
        (!type || (strcmp(type, "sliding_attention") != 0 && strcmp(type, "full_attention") != 0)))
      return attn_fail(ATTN_BAD_FORMAT,
                       "layer_types: expected sliding_attention or full_attention for each layer");
    if (type) slides = strcmp(type, "sliding_attention") == 0;
    if (slides) c->layers[l].options.window = window;
  }
  return ATTN_OK;
}

static attn_status configure_llama(const json_t *json, attn_model_config *c) {
  attn_mixer_options o;
  int64_t window = 0;
  ATTN_TRY(attn_family_read_llama(json, c, &o, NULL));
  ATTN_TRY(attn_json_bool(json, "attention_bias", ATTN_OPTIONAL, &o.bias));
  o.output_bias = o.bias;
  ATTN_TRY(attn_json_int(json, "sliding_window", ATTN_OPTIONAL, 0, INT32_MAX, &window));
  ATTN_TRY(attn_family_make_layers(c, "softmax", &o));
  return attn_family_set_windows(json, c, window, 0);
}

/* sliding_window counts only with use_sliding_window, from layer max_window_layers on. */
static attn_status configure_qwen(const json_t *json, attn_model_config *c, bool is_qwen3) {
  attn_mixer_options o;
  int64_t window = 0, from = 28; /* the default of Transformers */
  bool slides = false;
  ATTN_TRY(attn_family_read_llama(json, c, &o, NULL));
  o.bias = !is_qwen3;
  o.qk_norm = is_qwen3;
  if (is_qwen3) {
    ATTN_TRY(attn_json_bool(json, "attention_bias", ATTN_OPTIONAL, &o.bias));
    o.output_bias = o.bias;
  }
  ATTN_TRY(attn_json_bool(json, "use_sliding_window", ATTN_OPTIONAL, &slides));
  ATTN_TRY(attn_json_int(json, "sliding_window", ATTN_OPTIONAL, 0, INT32_MAX, &window));
  ATTN_TRY(attn_json_int(json, "max_window_layers", ATTN_OPTIONAL, 0, INT32_MAX, &from));
  ATTN_TRY(attn_family_make_layers(c, "softmax", &o));
  return slides ? attn_family_set_windows(json, c, window, from) : ATTN_OK;
}

static attn_status configure_qwen2(const json_t *json, attn_model_config *c) {
  return configure_qwen(json, c, false);
}

static attn_status configure_qwen3(const json_t *json, attn_model_config *c) {
  return configure_qwen(json, c, true);
}

/* With experts it is Mixtral's. */
static bool takes(const attn_gguf *file) {
  int64_t experts = 0;
  (void)attn_gguf_int(file, "llama.expert_count", ATTN_OPTIONAL, 0, INT32_MAX, &experts);
  return experts == 0;
}

const attn_family attn_family_llama = {.types = (const char *const[]){"llama", "mistral", NULL},
                                       .architectures = (const char *const[]){"llama", NULL},
                                       .configure = configure_llama,
                                       .names = names,
                                       .gguf_takes = takes,
                                       .gguf_pairs_together = true};

const attn_family attn_family_qwen2 = {.types = (const char *const[]){"qwen2", NULL},
                                       .architectures = (const char *const[]){"qwen2", NULL},
                                       .configure = configure_qwen2,
                                       .names = names};

const attn_family attn_family_qwen3 = {.types = (const char *const[]){"qwen3", NULL},
                                       .architectures = (const char *const[]){"qwen3", NULL},
                                       .configure = configure_qwen3,
                                       .names = names};
