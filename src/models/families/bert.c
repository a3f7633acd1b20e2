/* Encoders: BERT (arXiv 1810.04805) and its kin, as MiniLM (2002.10957), RoBERTa (1907.11692),
 * XLM-R (1911.02116) and DistilBERT (1910.01108). The host is encoder.c.
 *
 * RoBERTa counts positions from padding_idx + 1 on; DistilBERT has no token types and names of its
 * own. What predicts masked tokens or classes is left: the pooler of BERT is not what
 * embeddings are pooled by. */
#include "base/status.h"
#include "files/json.h"
#include "models/families/family.h"

#include <string.h>

static const attn_family_name names[] = {
    {"model.embed_tokens.", "embeddings.word_embeddings.", "token_embd."},
    {"model.embed_positions.", "embeddings.position_embeddings.", "position_embd."},
    {"model.embed_types.", "embeddings.token_type_embeddings.", "token_types."},
    {"model.embed_norm.", "embeddings.LayerNorm.", "token_embd_norm."},
    {".token_mixer.q_proj.", ".attention.self.query.", ".attn_q."},
    {".token_mixer.k_proj.", ".attention.self.key.", ".attn_k."},
    {".token_mixer.v_proj.", ".attention.self.value.", ".attn_v."},
    {".token_mixer.o_proj.", ".attention.output.dense.", ".attn_output."},
    {".token_norm.", ".attention.output.LayerNorm.", ".attn_output_norm."},
    {".channel_mixer.l1.", ".intermediate.dense.", ".ffn_up."},
    {".channel_mixer.l2.", ".output.dense.", ".ffn_down."},
    {".channel_norm.", ".output.LayerNorm.", ".layer_output_norm."},
    {NULL, NULL, NULL}};

static const attn_family_name names_of_distilbert[] = {
    {"model.embed_tokens.", "embeddings.word_embeddings.", NULL},
    {"model.embed_positions.", "embeddings.position_embeddings.", NULL},
    {"model.embed_norm.", "embeddings.LayerNorm.", NULL},
    {".token_mixer.q_proj.", ".attention.q_lin.", NULL},
    {".token_mixer.k_proj.", ".attention.k_lin.", NULL},
    {".token_mixer.v_proj.", ".attention.v_lin.", NULL},
    {".token_mixer.o_proj.", ".attention.out_lin.", NULL},
    {".token_norm.", ".sa_layer_norm.", NULL},
    {".channel_mixer.l1.", ".ffn.lin1.", NULL},
    {".channel_mixer.l2.", ".ffn.lin2.", NULL},
    {".channel_norm.", ".output_layer_norm.", NULL},
    {NULL, NULL, NULL}};

static attn_status read_activation(const json_t *json, const char *key, attn_model_config *c) {
  static const struct {
    const char *name;
    attn_activation f;
  } known[] = {{"gelu", ATTN_GELU},
               {"gelu_new", ATTN_GELU_TANH},
               {"gelu_pytorch_tanh", ATTN_GELU_TANH},
               {"relu", ATTN_RELU},
               {"silu", ATTN_SILU}};
  const char *name = "gelu";
  ATTN_TRY(attn_json_string(json, key, ATTN_OPTIONAL, &name));
  for (size_t i = 0; i < sizeof known / sizeof *known; ++i)
    if (strcmp(name, known[i].name) == 0) {
      c->activation = known[i].f;
      return ATTN_OK;
    }
  return attn_fail(ATTN_UNSUPPORTED,
                   "%s '%s' is not gelu, gelu_new, gelu_pytorch_tanh, relu or silu", key, name);
}

/* Decoders and other positions go by the same name. */
static attn_status refuse_others(const json_t *json) {
  static const char *const flags[] = {"is_decoder", "add_cross_attention"};
  const char *kind = "absolute";
  ATTN_TRY(attn_json_string(json, "position_embedding_type", ATTN_OPTIONAL, &kind));
  if (strcmp(kind, "absolute") != 0)
    return attn_fail(ATTN_UNSUPPORTED, "position_embedding_type '%s' is not absolute", kind);
  for (int i = 0; i < 2; ++i) {
    bool set = false;
    ATTN_TRY(attn_json_bool(json, flags[i], ATTN_OPTIONAL, &set));
    if (set) return attn_fail(ATTN_UNSUPPORTED, "%s is true: encoders are read", flags[i]);
  }
  return ATTN_OK;
}

/* What all have in common once the sizes are there. */
static attn_status make_encoder(const json_t *json, attn_model_config *c, int64_t heads) {
  c->encoder = true;
  c->feed_forward = ATTN_GELU_MLP;
  c->norm = ATTN_NORM_LAYER;
  c->embedding_scale = 1;
  c->positions = 512;
  ATTN_TRY(attn_json_int(json, "max_position_embeddings", ATTN_OPTIONAL, 1, ATTN_MOST_VOCABULARY,
                         &c->positions));
  if (c->hidden % heads)
    return attn_fail(ATTN_BAD_FORMAT, "a width of %lld is not a multiple of %lld heads",
                     (long long)c->hidden, (long long)heads);
  attn_mixer_options options = {.hidden = c->hidden,
                                .layers = c->layer_count,
                                .heads = heads,
                                .rotary_dim = -1,
                                .bidirectional = true,
                                .bias = true,
                                .output_bias = true};
  return attn_family_make_layers(c, "softmax", &options);
}

static attn_status configure_bert(const json_t *json, attn_model_config *c) {
  int64_t heads = 0;
  ATTN_TRY(attn_family_read_sizes(json, c));
  ATTN_TRY(refuse_others(json));
  ATTN_TRY(read_activation(json, "hidden_act", c));
  c->norm_epsilon = 1e-12;
  c->token_types = 2;
  ATTN_TRY(attn_json_double(json, "layer_norm_eps", ATTN_OPTIONAL, 0, 1, &c->norm_epsilon));
  ATTN_TRY(attn_json_int(json, "type_vocab_size", ATTN_OPTIONAL, 0, ATTN_MOST_VOCABULARY,
                         &c->token_types));
  ATTN_TRY(attn_json_int(json, "num_attention_heads", ATTN_REQUIRED, 1, 1 << 14, &heads));
  return make_encoder(json, c, heads);
}

static attn_status configure_roberta(const json_t *json, attn_model_config *c) {
  int64_t padding = 1;
  ATTN_TRY(configure_bert(json, c));
  ATTN_TRY(attn_json_int(json, "pad_token_id", ATTN_OPTIONAL, 0, ATTN_MOST_VOCABULARY, &padding));
  c->first_position = padding + 1;
  if (c->first_position < c->positions) return ATTN_OK;
  return attn_fail(ATTN_BAD_FORMAT, "max_position_embeddings %lld leaves none behind pad_token_id",
                   (long long)c->positions);
}

static attn_status configure_distilbert(const json_t *json, attn_model_config *c) {
  int64_t heads = 12;
  c->hidden = 768;
  c->layer_count = 6;
  c->feed_forward_width = 3072;
  c->norm_epsilon = 1e-12;
  ATTN_TRY(
      attn_json_int(json, "vocab_size", ATTN_REQUIRED, 2, ATTN_MOST_VOCABULARY, &c->vocabulary));
  ATTN_TRY(attn_json_int(json, "dim", ATTN_OPTIONAL, 1, ATTN_MOST_HIDDEN, &c->hidden));
  ATTN_TRY(attn_json_int(json, "n_layers", ATTN_OPTIONAL, 1, ATTN_MOST_LAYERS, &c->layer_count));
  ATTN_TRY(
      attn_json_int(json, "hidden_dim", ATTN_OPTIONAL, 1, ATTN_MOST_WIDTH, &c->feed_forward_width));
  ATTN_TRY(attn_json_int(json, "n_heads", ATTN_OPTIONAL, 1, 1 << 14, &heads));
  ATTN_TRY(read_activation(json, "activation", c));
  return make_encoder(json, c, heads);
}

const attn_family attn_family_bert = {
    .types = (const char *const[]){"bert", NULL},
    .architectures = (const char *const[]){"bert", NULL},
    .configure = configure_bert,
    .names = names,
    .layers = "encoder.layer.",
    .prefixes = (const char *const[]){"bert.", NULL},
    .gamma_beta = true,
    .left = (const char *const[]){"embeddings.position_ids", "pooler.dense.", "cls.", NULL}};

const attn_family attn_family_roberta = {
    .types = (const char *const[]){"roberta", "xlm-roberta", NULL},
    .configure = configure_roberta,
    .names = names,
    .layers = "encoder.layer.",
    .prefixes = (const char *const[]){"roberta.", NULL},
    .left = (const char *const[]){"embeddings.position_ids", "pooler.dense.", "lm_head.", NULL}};

const attn_family attn_family_distilbert = {
    .types = (const char *const[]){"distilbert", NULL},
    .configure = configure_distilbert,
    .names = names_of_distilbert,
    .layers = "transformer.layer.",
    .prefixes = (const char *const[]){"distilbert.", NULL},
    .left =
        (const char *const[]){"vocab_transform.", "vocab_layer_norm.", "vocab_projector.", NULL}};
