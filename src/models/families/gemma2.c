/* Gemma 2 (arXiv 2408.00118).
 *
 *   x = x + norm(attention(norm(x)));  x = x + norm(W2 (gelu_tanh(W1 h) (.) W3 h)), h = norm(x)
 *
 * Norms multiply by 1 + weight; embeddings by sqrt(hidden). Attention logits and the vocabulary's
 * are soft-capped; every second layer sees a window; queries are scaled by
 * query_pre_attn_scalar^(-1/2). GGUF files do not say that number: they are not read. */
#include "base/status.h"
#include "files/json.h"
#include "models/families/family.h"

#include <math.h>
#include <string.h>

static const attn_family_name names[] = {{"model.embed_tokens.", "model.embed_tokens.", NULL},
                                         {"model.norm.", "model.norm.", NULL},
                                         {".token_norm.", ".input_layernorm.", NULL},
                                         {".token_after.", ".post_attention_layernorm.", NULL},
                                         {".token_mixer.q_proj.", ".self_attn.q_proj.", NULL},
                                         {".token_mixer.k_proj.", ".self_attn.k_proj.", NULL},
                                         {".token_mixer.v_proj.", ".self_attn.v_proj.", NULL},
                                         {".token_mixer.o_proj.", ".self_attn.o_proj.", NULL},
                                         {".channel_norm.", ".pre_feedforward_layernorm.", NULL},
                                         {".channel_after.", ".post_feedforward_layernorm.", NULL},
                                         {".channel_mixer.l1.", ".mlp.gate_proj.", NULL},
                                         {".channel_mixer.l2.", ".mlp.up_proj.", NULL},
                                         {".channel_mixer.l3.", ".mlp.down_proj.", NULL},
                                         {NULL, NULL, NULL}};

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
    if (types && !type)
      return attn_fail(ATTN_BAD_FORMAT, "layer_types: expected a name for each layer");
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

const attn_family attn_family_gemma2 = {
    .types = (const char *const[]){"gemma2", NULL}, .configure = configure, .names = names};
