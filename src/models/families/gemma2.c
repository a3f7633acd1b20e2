/* Gemma 2 (arXiv 2408.00118).
 *
 *   x = x + norm(attention(norm(x)));  x = x + norm(W2 (gelu_tanh(W1 h) (.) W3 h)), h = norm(x)
 *
 * Norms multiply by 1 + weight; embeddings by sqrt(hidden). Attention logits and the vocabulary's
 * are soft-capped; every second layer sees a window; queries are scaled by
 * query_pre_attn_scalar^(-1/2). GGUF files do not say that number: it is what llama.cpp takes. */
#include "base/status.h"
#include "files/json.h"
#include "models/families/family.h"

#include <math.h>
#include <string.h>

static const attn_family_name names[] = {
    {"model.embed_tokens.", "model.embed_tokens.", "token_embd."},
    {"model.norm.", "model.norm.", "output_norm."},
    {".token_norm.", ".input_layernorm.", ".attn_norm."},
    {".token_after.", ".post_attention_layernorm.", ".post_attention_norm."},
    {".token_mixer.q_proj.", ".self_attn.q_proj.", ".attn_q."},
    {".token_mixer.k_proj.", ".self_attn.k_proj.", ".attn_k."},
    {".token_mixer.v_proj.", ".self_attn.v_proj.", ".attn_v."},
    {".token_mixer.o_proj.", ".self_attn.o_proj.", ".attn_output."},
    {".channel_norm.", ".pre_feedforward_layernorm.", ".ffn_norm."},
    {".channel_after.", ".post_feedforward_layernorm.", ".post_ffw_norm."},
    {".channel_mixer.l1.", ".mlp.gate_proj.", ".ffn_gate."},
    {".channel_mixer.l2.", ".mlp.up_proj.", ".ffn_up."},
    {".channel_mixer.l3.", ".mlp.down_proj.", ".ffn_down."},
    {NULL, NULL, NULL}};

static const attn_gguf_field fields[] = {
    {"attn_logit_softcapping", "attn_logit_softcapping", ATTN_GGUF_REAL, ATTN_OPTIONAL},
    {"final_logit_softcapping", "final_logit_softcapping", ATTN_GGUF_REAL, ATTN_OPTIONAL},
    {NULL, NULL, 0, 0}};

static attn_status check_activation(const json_t *json) {
  const char *activation = "gelu_pytorch_tanh";
  ATTN_TRY(attn_json_string(json, "hidden_activation", ATTN_OPTIONAL, &activation));
  if (strcmp(activation, "gelu_pytorch_tanh") == 0) return ATTN_OK;
  return attn_fail(ATTN_UNSUPPORTED, "hidden_activation '%s' is not gelu_pytorch_tanh", activation);
}

static attn_status read_attention(const json_t *json, attn_model_config *c, attn_mixer_options *o) {
  double scalar = 256;
  *o = (attn_mixer_options){
      .hidden = c->hidden, .layers = c->layer_count, .dim = 256, .soft_cap = 50};
  ATTN_TRY(attn_json_int(json, "num_attention_heads", ATTN_REQUIRED, 1, 1 << 14, &o->heads));
  ATTN_TRY(attn_json_int(json, "num_key_value_heads", ATTN_OPTIONAL, 1, 1 << 14, &o->kv_heads));
  ATTN_TRY(attn_json_int(json, "head_dim", ATTN_OPTIONAL, 1, 256, &o->dim));
  ATTN_TRY(attn_json_bool(json, "attention_bias", ATTN_OPTIONAL, &o->bias));
  o->output_bias = o->bias;
  ATTN_TRY(attn_json_double(json, "attn_logit_softcapping", ATTN_OPTIONAL, 0, 1e6, &o->soft_cap));
  ATTN_TRY(attn_json_double(json, "query_pre_attn_scalar", ATTN_OPTIONAL, 1e-3, 1e6, &scalar));
  o->scale = 1 / sqrt(scalar);
  return attn_family_read_rope(json, c, &o->rope, NULL);
}

/* layer_types, or the even layers. */
static attn_status set_windows(const json_t *json, attn_model_config *c) {
  int64_t window = 4096;
  json_t *types = NULL;
  ATTN_TRY(attn_json_int(json, "sliding_window", ATTN_OPTIONAL, 0, INT32_MAX, &window));
  ATTN_TRY(attn_json_array(json, "layer_types", ATTN_OPTIONAL, &types));
  for (int64_t l = 0; l < c->layer_count; ++l) {
    const char *type = json_string_value(json_array_get(types, (size_t)l));
    bool slides = type ? strcmp(type, "sliding_attention") == 0 : l % 2 == 0;
    if (types && (!type || (!slides && strcmp(type, "full_attention") != 0)))
      return attn_fail(ATTN_BAD_FORMAT,
                       "layer_types: expected sliding_attention or full_attention for each layer");
    if (slides) c->layers[l].options.window = window;
  }
  return ATTN_OK;
}

static attn_status configure(const json_t *json, attn_model_config *c) {
  attn_mixer_options o;
  ATTN_TRY(attn_family_read_sizes(json, c));
  ATTN_TRY(check_activation(json));
  c->feed_forward = ATTN_GEGLU;
  c->norm = ATTN_NORM_RMS;
  c->norm_epsilon = 1e-6;
  c->norm_offset = c->sandwich = c->tied = true;
  c->embedding_scale = sqrt((double)c->hidden);
  c->logit_cap = 30;
  ATTN_TRY(attn_json_double(json, "rms_norm_eps", ATTN_OPTIONAL, 0, 1, &c->norm_epsilon));
  ATTN_TRY(attn_json_bool(json, "tie_word_embeddings", ATTN_OPTIONAL, &c->tied));
  ATTN_TRY(attn_json_double(json, "final_logit_softcapping", ATTN_OPTIONAL, 0, 1e6, &c->logit_cap));
  ATTN_TRY(read_attention(json, c, &o));
  ATTN_TRY(attn_family_make_layers(c, "softmax", &o));
  return set_windows(json, c);
}

/* The width of a head, but for the model of 27B, which goes by its layers: hidden / heads there. */
static attn_status complete(const attn_gguf *file, json_t *config) {
  const int64_t layers_of_27b = 46;
  int64_t heads = json_integer_value(json_object_get(config, "num_attention_heads"));
  int64_t scalar = json_integer_value(json_object_get(config, "head_dim"));
  int64_t layers = json_integer_value(json_object_get(config, "num_hidden_layers"));
  int64_t hidden = json_integer_value(json_object_get(config, "hidden_size"));
  (void)file;
  if ((layers == layers_of_27b || scalar == 0) && heads > 0) scalar = hidden / heads;
  if (!json_object_get(config, "head_dim")) /* as GGUF means it; Gemma's default is 256 */
    json_object_set_new(config, "head_dim", json_integer(scalar));
  json_object_set_new(config, "query_pre_attn_scalar", json_integer(scalar));
  return ATTN_OK;
}

const attn_family attn_family_gemma2 = {.types = (const char *const[]){"gemma2", NULL},
                                        .architectures = (const char *const[]){"gemma2", NULL},
                                        .configure = configure,
                                        .names = names,
                                        .gguf_fields = fields,
                                        .gguf_complete = complete};
