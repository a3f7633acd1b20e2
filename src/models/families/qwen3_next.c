/* Qwen3-Next: three layers of Gated DeltaNet (arXiv 2412.06464) to one of softmax attention, and
 * experts as in Qwen2-MoE. Softmax attention normalises the heads of q and k, turns a part of them,
 * and gates what it gives by sigmoid(x Wg^T) (arXiv 2505.06708). Norms multiply by 1 + weight, but
 * for the one inside Gated DeltaNet.
 *
 * Projections are stored together: q and the gate of softmax attention by head; q, k, v, z, and b
 * and a, of Gated DeltaNet by head of the keys. */
#include "base/status.h"
#include "files/json.h"
#include "models/families/family.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static const attn_family_name names[] = {
    {"model.embed_tokens.", "model.embed_tokens.", "token_embd."},
    {"model.norm.", "model.norm.", "output_norm."},
    {"lm_head.", "lm_head.", "output."},
    {".token_norm.", ".input_layernorm.", ".attn_norm."},
    {".channel_norm.", ".post_attention_layernorm.", ".post_attention_norm."},
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

static const attn_family_name softmax_names[] = {
    {".token_mixer.q_proj.", ".self_attn.q_proj.", ".attn_q."},
    {".token_mixer.g_proj.", ".self_attn.q_proj.", ".attn_q."},
    {".token_mixer.k_proj.", ".self_attn.k_proj.", ".attn_k."},
    {".token_mixer.v_proj.", ".self_attn.v_proj.", ".attn_v."},
    {".token_mixer.o_proj.", ".self_attn.o_proj.", ".attn_output."},
    {".token_mixer.q_norm.", ".self_attn.q_norm.", ".attn_q_norm."},
    {".token_mixer.k_norm.", ".self_attn.k_norm.", ".attn_k_norm."},
    {NULL, NULL, NULL}};

static const attn_family_name delta_names[] = {
    {".token_mixer.q_proj.", ".linear_attn.in_proj_qkvz.", ".attn_qkv."},
    {".token_mixer.k_proj.", ".linear_attn.in_proj_qkvz.", ".attn_qkv."},
    {".token_mixer.v_proj.", ".linear_attn.in_proj_qkvz.", ".attn_qkv."},
    {".token_mixer.g_proj.", ".linear_attn.in_proj_qkvz.", ".attn_gate."},
    {".token_mixer.b_proj.", ".linear_attn.in_proj_ba.", ".ssm_ba."},
    {".token_mixer.a_proj.", ".linear_attn.in_proj_ba.", ".ssm_ba."},
    {".token_mixer.q_conv1d.", ".linear_attn.conv1d.", ".ssm_conv1d."},
    {".token_mixer.k_conv1d.", ".linear_attn.conv1d.", ".ssm_conv1d."},
    {".token_mixer.v_conv1d.", ".linear_attn.conv1d.", ".ssm_conv1d."},
    {".token_mixer.o_norm.", ".linear_attn.norm.", ".ssm_norm."},
    {".token_mixer.o_proj.", ".linear_attn.out_proj.", ".ssm_out."},
    {".token_mixer.A_log", ".linear_attn.A_log", ".ssm_a"},
    {".token_mixer.dt_bias", ".linear_attn.dt_bias", ".ssm_dt.bias"},
    {NULL, NULL, NULL}};

/* In older files together, as in safetensors. What is not of Gated DeltaNet is never looked for by
 * these names: it has its own. */
static const attn_family_name older_names[] = {{".token_mixer.q_proj.", NULL, ".ssm_in."},
                                               {".token_mixer.k_proj.", NULL, ".ssm_in."},
                                               {".token_mixer.v_proj.", NULL, ".ssm_in."},
                                               {".token_mixer.g_proj.", NULL, ".ssm_in."},
                                               {NULL, NULL, NULL}};

static const attn_mixer_names mixer_names[] = {
    {"softmax", softmax_names}, {"gated_delta_net", delta_names}, {NULL, NULL}};

static bool is(const char *part, const char *name) {
  size_t length = strlen(name);
  static const char prefix[] = ".token_mixer.";
  return strncmp(part, prefix, sizeof prefix - 1) == 0 &&
         strncmp(part + sizeof prefix - 1, name, length) == 0 &&
         part[sizeof prefix - 1 + length] == '.';
}

/* `run` of every `period` rows, `offset` from where those begin. */
static void take(attn_row_map *map, int64_t run, int64_t period, int64_t offset) {
  *map = (attn_row_map){.run = run, .period = period, .offset = offset, .part = true};
}

static void store(const attn_model_config *c, int64_t layer, const char *part, attn_naming naming,
                  attn_place *place) {
  const attn_mixer_options *o = &c->layers[layer].options;
  attn_row_map *map = &place->rows;
  if (strcmp(c->layers[layer].mixer->info.name, "softmax") == 0) {
    if (is(part, "q_proj")) take(map, o->dim, 2 * o->dim, 0);
    if (is(part, "g_proj")) take(map, o->dim, 2 * o->dim, o->dim);
    return;
  }
  int64_t shared = o->heads / o->kv_heads, values = shared * o->value_dim;
  int64_t period = 2 * o->dim + 2 * values, keys = o->kv_heads * o->dim;
  if (naming == ATTN_IN_GGUF) {
    if (is(part, "q_proj")) take(map, 0, 0, 0);
    if (is(part, "k_proj")) take(map, 0, 0, keys);
    if (is(part, "v_proj")) take(map, 0, 0, 2 * keys);
  } else {
    if (is(part, "q_proj")) take(map, o->dim, period, 0);
    if (is(part, "k_proj")) take(map, o->dim, period, o->dim);
    if (is(part, "v_proj")) take(map, values, period, 2 * o->dim);
    if (is(part, "g_proj")) take(map, values, period, 2 * o->dim + values);
  }
  place->negative_exp = naming != ATTN_IN_SAFETENSORS && strcmp(part, ".token_mixer.A_log") == 0;
  if (is(part, "b_proj")) take(map, shared, 2 * shared, 0);
  if (is(part, "a_proj")) take(map, shared, 2 * shared, shared);
  if (strstr(part, "_conv1d.")) place->axes = ATTN_AXES_CONVOLUTION;
  if (is(part, "q_conv1d")) take(map, 0, 0, 0);
  if (is(part, "k_conv1d")) take(map, 0, 0, keys);
  if (is(part, "v_conv1d")) take(map, 0, 0, 2 * keys);
}

/* A head that predicts more tokens is not read. */
static bool leaves(const attn_model_config *c, const char *name) {
  (void)c;
  return strncmp(name, "mtp.", 4) == 0;
}

static attn_status read_delta(const json_t *json, const attn_model_config *c,
                              attn_mixer_options *o) {
  *o = (attn_mixer_options){
      .hidden = c->hidden, .layers = c->layer_count, .norm_epsilon = c->norm_epsilon};
  ATTN_TRY(attn_json_int(json, "linear_num_value_heads", ATTN_REQUIRED, 1, 1 << 14, &o->heads));
  ATTN_TRY(attn_json_int(json, "linear_num_key_heads", ATTN_REQUIRED, 1, 1 << 14, &o->kv_heads));
  ATTN_TRY(attn_json_int(json, "linear_key_head_dim", ATTN_REQUIRED, 1, 256, &o->dim));
  ATTN_TRY(attn_json_int(json, "linear_value_head_dim", ATTN_REQUIRED, 1, 256, &o->value_dim));
  return attn_json_int(json, "linear_conv_kernel_dim", ATTN_OPTIONAL, 1, 16, &o->convolution);
}

static attn_status read_softmax(const json_t *json, attn_model_config *c, attn_mixer_options *o) {
  double part = 0.25; /* the default of Transformers */
  ATTN_TRY(attn_family_read_llama(json, c, o, &part));
  if (!o->dim) o->dim = 256;
  o->rotary_dim = (int64_t)((double)o->dim * part) / 2 * 2;
  if (o->rotary_dim == 0) o->rotary_dim = -1;
  o->qk_norm = o->output_gate = true;
  ATTN_TRY(attn_json_bool(json, "attention_bias", ATTN_OPTIONAL, &o->bias));
  if (o->bias) return attn_fail(ATTN_UNSUPPORTED, "attention_bias is true: biases are not read");
  return ATTN_OK;
}

static attn_status configure(const json_t *json, attn_model_config *c) {
  attn_mixer_options softmax, delta;
  int64_t interval = 4;
  ATTN_TRY(read_softmax(json, c, &softmax));
  c->norm_offset = true;
  ATTN_TRY(read_delta(json, c, &delta));
  ATTN_TRY(attn_json_int(json, "full_attention_interval", ATTN_OPTIONAL, 1, INT32_MAX, &interval));
  ATTN_TRY(attn_family_make_layers(c, "softmax", &softmax));
  ATTN_TRY(attn_family_set_linear(json, c, "gated_delta_net", &delta, interval));
  return attn_family_read_qwen_experts(json, c);
}

/* GGUF -------------------------------------------------------------------------------------------
 */

static const attn_gguf_field fields[] = {
    {"attention.value_length", "value_length", ATTN_GGUF_INTEGER, ATTN_OPTIONAL},
    {"rope.dimension_count", "rotary_dim", ATTN_GGUF_INTEGER, ATTN_REQUIRED},
    {"ssm.conv_kernel", "linear_conv_kernel_dim", ATTN_GGUF_INTEGER, ATTN_REQUIRED},
    {"ssm.state_size", "linear_key_head_dim", ATTN_GGUF_INTEGER, ATTN_REQUIRED},
    {"ssm.group_count", "linear_num_key_heads", ATTN_GGUF_INTEGER, ATTN_REQUIRED},
    {"ssm.time_step_rank", "linear_num_value_heads", ATTN_GGUF_INTEGER, ATTN_REQUIRED},
    {"ssm.inner_size", "inner_size", ATTN_GGUF_INTEGER, ATTN_REQUIRED},
    {"full_attention_interval", "full_attention_interval", ATTN_GGUF_INTEGER, ATTN_OPTIONAL},
    {NULL, NULL, 0, 0}};

static int64_t number(const json_t *json, const char *key) {
  return json_integer_value(json_object_get(json, key));
}

/* Which layers are linear is not left to a key: those that have rates of decay. */
json_t *attn_family_linear_layers(const attn_gguf *file, const json_t *config) {
  int64_t layers = number(config, "num_hidden_layers");
  json_t *types = json_array();
  for (int64_t l = 0; l < layers && l < ATTN_MOST_LAYERS; ++l) {
    char name[64];
    const attn_gguf_tensor *rates;
    snprintf(name, sizeof name, "blk.%lld.ssm_a", (long long)l);
    bool linear = attn_gguf_find(file, name, &rates) == ATTN_OK;
    json_array_append_new(types, json_string(linear ? "linear_attention" : "full_attention"));
  }
  return types;
}

/* The part that gives `turned` of `dim` channels when it is rounded down. */
static double part_of(int64_t turned, int64_t dim) {
  double part = (double)turned / (double)dim;
  return (int64_t)((double)dim * part) < turned ? nextafter(part, 2) : part;
}

static attn_status complete(const attn_gguf *file, json_t *config) {
  static const char *const gone[] = {"value_length", "rotary_dim", "inner_size"};
  int64_t dim = number(config, "head_dim"), turned = number(config, "rotary_dim");
  int64_t heads = number(config, "linear_num_value_heads"), all = number(config, "inner_size");
  if (dim < 1 || turned < 1 || turned > dim || number(config, "value_length") != dim)
    return attn_fail(ATTN_BAD_FORMAT,
                     "qwen3next: heads of %lld, values of %lld, of which %lld channels turn",
                     (long long)dim, (long long)number(config, "value_length"), (long long)turned);
  if (heads < 1 || all % heads)
    return attn_fail(ATTN_BAD_FORMAT, "qwen3next.ssm.inner_size is %lld for %lld heads",
                     (long long)all, (long long)heads);
  json_object_set_new(config, "linear_value_head_dim", json_integer(all / heads));
  json_object_set_new(config, "partial_rotary_factor", json_real(part_of(turned, dim)));
  if (file) json_object_set_new(config, "layer_types", attn_family_linear_layers(file, config));
  for (size_t i = 0; i < sizeof gone / sizeof *gone; ++i) json_object_del(config, gone[i]);
  return ATTN_OK;
}

static bool is_linear(const attn_model_config *c, int64_t layer) {
  return strcmp(c->layers[layer].mixer->info.name, "softmax") != 0;
}

/* 0: softmax attention is not in every n-th layer. */
static int64_t interval_of(const attn_model_config *c) {
  int64_t n = 1;
  while (n <= c->layer_count && is_linear(c, n - 1)) ++n;
  for (int64_t l = 0; l < c->layer_count; ++l)
    if (is_linear(c, l) != ((l + 1) % n != 0)) return 0;
  return n > 1 && n <= c->layer_count ? n : 0;
}

static void set(json_t *config, const char *key, int64_t value) {
  json_object_set_new(config, key, json_integer(value));
}

static attn_status say(const attn_model_config *c, json_t *config) {
  int64_t interval = interval_of(c);
  if (!interval)
    return attn_fail(ATTN_UNSUPPORTED,
                     "softmax attention is not in every n-th layer, as GGUF files say it");
  const attn_mixer_options *linear = &c->layers[0].options;
  const attn_mixer_options *softmax = &c->layers[interval - 1].options;
  set(config, "full_attention_interval", interval);
  set(config, "num_key_value_heads", softmax->kv_heads);
  set(config, "head_dim", softmax->dim);
  set(config, "value_length", softmax->value_dim);
  set(config, "rotary_dim", softmax->rotary_dim);
  json_object_set_new(config, "rope_theta", json_real(softmax->rope.base));
  set(config, "linear_conv_kernel_dim", linear->convolution);
  set(config, "linear_key_head_dim", linear->dim);
  set(config, "linear_num_key_heads", linear->kv_heads);
  set(config, "linear_num_value_heads", linear->heads);
  set(config, "inner_size", linear->heads * linear->value_dim);
  return ATTN_OK;
}

const attn_family attn_family_qwen3_next = {.types = (const char *const[]){"qwen3_next", NULL},
                                            .architectures =
                                                (const char *const[]){"qwen3next", NULL},
                                            .configure = configure,
                                            .names = names,
                                            .mixer_names = mixer_names,
                                            .store = store,
                                            .leaves = leaves,
                                            .gguf_defaults = "{\"norm_topk_prob\": true}",
                                            .gguf_fields = fields,
                                            .gguf_complete = complete,
                                            .gguf_say = say,
                                            .gguf_older = older_names,
                                            .gguf_own_heads = true};
