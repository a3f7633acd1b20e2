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

#include <string.h>

static const attn_family_name names[] = {
    {"model.embed_tokens.", "model.embed_tokens.", NULL},
    {"model.norm.", "model.norm.", NULL},
    {"lm_head.", "lm_head.", NULL},
    {".token_norm.", ".input_layernorm.", NULL},
    {".channel_norm.", ".post_attention_layernorm.", NULL},
    {".channel_mixer.l1.", ".mlp.gate_proj.", NULL},
    {".channel_mixer.l2.", ".mlp.up_proj.", NULL},
    {".channel_mixer.l3.", ".mlp.down_proj.", NULL},
    {".channel_mixer.router.", ".mlp.gate.", NULL},
    {".channel_mixer.experts.#.l1.", ".mlp.experts.#.gate_proj.", NULL},
    {".channel_mixer.experts.#.l2.", ".mlp.experts.#.up_proj.", NULL},
    {".channel_mixer.experts.#.l3.", ".mlp.experts.#.down_proj.", NULL},
    {".channel_mixer.shared.l1.", ".mlp.shared_expert.gate_proj.", NULL},
    {".channel_mixer.shared.l2.", ".mlp.shared_expert.up_proj.", NULL},
    {".channel_mixer.shared.l3.", ".mlp.shared_expert.down_proj.", NULL},
    {".channel_mixer.shared_gate.", ".mlp.shared_expert_gate.", NULL},
    {NULL, NULL, NULL}};

static const attn_family_name softmax_names[] = {
    {".token_mixer.g_proj.", ".self_attn.q_proj.", NULL},
    {".token_mixer.", ".self_attn.", NULL},
    {NULL, NULL, NULL}};

static const attn_family_name delta_names[] = {
    {".token_mixer.q_proj.", ".linear_attn.in_proj_qkvz.", NULL},
    {".token_mixer.k_proj.", ".linear_attn.in_proj_qkvz.", NULL},
    {".token_mixer.v_proj.", ".linear_attn.in_proj_qkvz.", NULL},
    {".token_mixer.g_proj.", ".linear_attn.in_proj_qkvz.", NULL},
    {".token_mixer.b_proj.", ".linear_attn.in_proj_ba.", NULL},
    {".token_mixer.a_proj.", ".linear_attn.in_proj_ba.", NULL},
    {".token_mixer.q_conv1d.", ".linear_attn.conv1d.", NULL},
    {".token_mixer.k_conv1d.", ".linear_attn.conv1d.", NULL},
    {".token_mixer.v_conv1d.", ".linear_attn.conv1d.", NULL},
    {".token_mixer.o_norm.", ".linear_attn.norm.", NULL},
    {".token_mixer.o_proj.", ".linear_attn.out_proj.", NULL},
    {".token_mixer.", ".linear_attn.", NULL},
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
  (void)naming;
  if (strcmp(c->layers[layer].mixer->info.name, "softmax") == 0) {
    if (is(part, "q_proj")) take(map, o->dim, 2 * o->dim, 0);
    if (is(part, "g_proj")) take(map, o->dim, 2 * o->dim, o->dim);
    return;
  }
  int64_t shared = o->heads / o->kv_heads, values = shared * o->value_dim;
  int64_t period = 2 * o->dim + 2 * values, keys = o->kv_heads * o->dim;
  if (is(part, "q_proj")) take(map, o->dim, period, 0);
  if (is(part, "k_proj")) take(map, o->dim, period, o->dim);
  if (is(part, "v_proj")) take(map, values, period, 2 * o->dim);
  if (is(part, "g_proj")) take(map, values, period, 2 * o->dim + values);
  if (is(part, "b_proj")) take(map, shared, 2 * shared, 0);
  if (is(part, "a_proj")) take(map, shared, 2 * shared, shared);
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

const attn_family attn_family_qwen3_next = {.types = (const char *const[]){"qwen3_next", NULL},
                                            .configure = configure,
                                            .names = names,
                                            .mixer_names = mixer_names,
                                            .store = store,
                                            .leaves = leaves};
