/* Reactive models: configuration, parameters, files. The network is in reactive_network.c, sessions
 * are in reactive_session.c. */
#include "models/reactive.h"
#include "base/memory.h"
#include "base/status.h"
#include "models/model.h"
#include "tensor/device.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* Configuration ---------------------------------------------------------------------------------
 */

static const char *const known_keys[] = {
    "model_type",          "architectures",          "vocab_size",
    "hidden_size",         "num_memory_slots",       "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads",    "head_dim",
    "rope_theta",          "memory_attention_heads", "memory_key_value_heads",
    "memory_head_dim",     "intermediate_size",      "rms_norm_eps",
    "head_norm",           "memory_attention",       "memory_gate",
    "memory_gate_init",    "memory_gate_activation", "memory_gate_status",
    "bos_token_id",        "query_token_id",         "answer_token_id",
    "eos_token_id"};

static attn_status read_memory(attn_reactive *m) {
  static const char *const kinds[] = {"simple", "self", "interlayer", "gated_self",
                                      "gated_interlayer"};
  static const char *const gates[] = {"none", "static", "elementwise", "linear"};
  static const char *const activations[] = {"sigmoid", "tanh"};
  static const char *const statuses[] = {"mean", "learned"};
  int kind = ATTN_MEMORY_INTERLAYER, gate = ATTN_GATE_STATIC, activation = 0, status = 0;
  ATTN_TRY(attn_json_choice(m->config, "memory_attention", ATTN_OPTIONAL, kinds, 5, &kind));
  ATTN_TRY(attn_json_choice(m->config, "memory_gate", ATTN_OPTIONAL, gates, 4, &gate));
  ATTN_TRY(attn_json_choice(m->config, "memory_gate_activation", ATTN_OPTIONAL, activations, 2,
                            &activation));
  ATTN_TRY(attn_json_choice(m->config, "memory_gate_status", ATTN_OPTIONAL, statuses, 2, &status));
  m->memory = (attn_memory_attention)kind;
  m->gate = (attn_memory_gate)gate;
  m->tanh_gate = activation == 1;
  m->learned_status = status == 1;
  m->gate_initial = 3;
  return attn_json_double(m->config, "memory_gate_init", ATTN_OPTIONAL, -1e3, 1e3,
                          &m->gate_initial);
}

static attn_status read_heads(attn_reactive *m, attn_mixer_options *o, const char *const keys[3]) {
  const int64_t most = 1 << 14;
  ATTN_TRY(attn_json_int(m->config, keys[0], ATTN_OPTIONAL, 1, most, &o->heads));
  ATTN_TRY(attn_json_int(m->config, keys[1], ATTN_OPTIONAL, 1, most, &o->kv_heads));
  ATTN_TRY(attn_json_int(m->config, keys[2], ATTN_OPTIONAL, 1, most, &o->dim));
  attn_status status = m->softmax->configure(o);
  return status == ATTN_OK ? ATTN_OK : attn_fail_in(ATTN_BAD_FORMAT, "configuration");
}

static attn_status read_attention(attn_reactive *m) {
  static const char *const self[3] = {"num_attention_heads", "num_key_value_heads", "head_dim"};
  static const char *const cross[3] = {"memory_attention_heads", "memory_key_value_heads",
                                       "memory_head_dim"};
  int index;
  ATTN_TRY(attn_mixer_find("softmax", &index));
  m->softmax = attn_mixer_at(index);
  m->self = (attn_mixer_options){.hidden = m->hidden, .heads = 1, .norm_epsilon = m->epsilon};
  ATTN_TRY(
      attn_json_double(m->config, "rope_theta", ATTN_OPTIONAL, 1.0001, 1e12, &m->self.rope.base));
  attn_mixer_options plain = m->self;
  ATTN_TRY(read_heads(m, &m->self, self));
  m->cross = plain;
  m->cross.heads = m->self.heads;
  /* Other heads begin with keys of their own number; the same ones are shared alike. */
  if (!json_object_get(m->config, cross[0])) m->cross.kv_heads = m->self.kv_heads;
  m->cross.dim = m->self.dim;
  ATTN_TRY(read_heads(m, &m->cross, cross));
  m->encoder_self = m->self;
  m->encoder_self.bidirectional = true;
  return ATTN_OK;
}

static attn_status read_template(attn_reactive *m) {
  const char *const keys[] = {"bos_token_id", "query_token_id", "answer_token_id", "eos_token_id"};
  int64_t *const places[] = {&m->bos, &m->query, &m->answer, &m->eos};
  for (int i = 0; i < 4; ++i) {
    *places[i] = -1;
    ATTN_TRY(attn_json_int(m->config, keys[i], ATTN_OPTIONAL, -1, m->vocabulary - 1, places[i]));
  }
  return ATTN_OK;
}

static attn_status read_config(attn_reactive *m) {
  const json_t *json = m->config;
  const char *type = "";
  char text[256];
  ATTN_TRY(attn_json_string(json, "model_type", ATTN_REQUIRED, &type));
  if (strcmp(type, "reactive") != 0)
    return attn_fail(ATTN_UNSUPPORTED, "a model_type %s, expected reactive", type);
  if (attn_json_unknown(json, known_keys, sizeof known_keys / sizeof *known_keys, text,
                        sizeof text))
    return attn_fail(ATTN_BAD_FORMAT, "unknown keys: %s", text);
  const int64_t most_slots = 1 << 16, most_hidden = 1 << 16, most_layers = 1024;
  m->layer_count = 1;
  m->epsilon = 1e-6;
  ATTN_TRY(
      attn_json_int(json, "vocab_size", ATTN_REQUIRED, 2, ATTN_MOST_VOCABULARY, &m->vocabulary));
  ATTN_TRY(attn_json_int(json, "hidden_size", ATTN_REQUIRED, 1, most_hidden, &m->hidden));
  ATTN_TRY(attn_json_int(json, "num_memory_slots", ATTN_REQUIRED, 1, most_slots, &m->slots));
  ATTN_TRY(
      attn_json_int(json, "num_hidden_layers", ATTN_OPTIONAL, 1, most_layers, &m->layer_count));
  m->width = 4 * m->hidden;
  ATTN_TRY(attn_json_int(json, "intermediate_size", ATTN_OPTIONAL, 1, ATTN_MOST_WIDTH, &m->width));
  ATTN_TRY(attn_json_double(json, "rms_norm_eps", ATTN_OPTIONAL, 1e-12, 1, &m->epsilon));
  ATTN_TRY(attn_json_bool(json, "head_norm", ATTN_OPTIONAL, &m->head_norm));
  ATTN_TRY(read_memory(m));
  ATTN_TRY(read_attention(m));
  return read_template(m);
}

/* Parameters ------------------------------------------------------------------------------------
 */

/* Where the next parameters go: names below a prefix. */
typedef struct place {
  attn_inventory *list;
  const attn_reactive *m;
  int64_t layer;
} place;

static attn_parameter *add(const place *at, const char *part, attn_parameter_shape shape) {
  char prefix[96];
  snprintf(prefix, sizeof prefix, "layers.%lld.%s.", (long long)at->layer, part);
  return attn_inventory_add(at->list, prefix, shape);
}

static attn_parameter *add_norm(const place *at, const char *part) {
  return add(at, part, attn_vector("weight", at->m->hidden, ATTN_INIT_CONSTANT, 1));
}

static void add_attention(const place *at, const char *part, const attn_mixer_options *options,
                          attn_parameter *p[ATTN_REACTIVE_PROJECTIONS]) {
  attn_parameter_shape shapes[ATTN_MIXER_PARAMETERS];
  int count = at->m->softmax->parameters(options, shapes);
  for (int i = 0; i < count && i < ATTN_REACTIVE_PROJECTIONS; ++i) p[i] = add(at, part, shapes[i]);
}

static void add_feed(const place *at, const char *part, attn_parameter *p[3]) {
  int64_t width = at->m->width, hidden = at->m->hidden;
  p[0] = add(at, part, attn_matrix("gate_proj.weight", width, hidden));
  p[1] = add(at, part, attn_matrix("up_proj.weight", width, hidden));
  p[2] = add(at, part, attn_matrix("down_proj.weight", hidden, width));
}

static void add_gate(const place *at, const char *part, attn_gate_parameters *p) {
  const attn_reactive *m = at->m;
  if (m->gate == ATTN_GATE_NONE) return;
  if (m->gate == ATTN_GATE_LINEAR) {
    p->weight = add(at, part, attn_matrix("weight", m->slots, m->slots));
    p->bias = add(at, part, attn_vector("bias", m->slots, ATTN_INIT_CONSTANT, 0));
  } else {
    p->weight = add(at, part, attn_vector("weight", m->slots, ATTN_INIT_CONSTANT, m->gate_initial));
  }
  if (m->gate == ATTN_GATE_STATIC || !m->learned_status) return;
  attn_parameter_shape mean = attn_matrix("status.weight", 1, m->hidden);
  mean.initial = ATTN_INIT_CONSTANT; /* it begins as the mean that it stands for */
  mean.scale = 1 / (double)m->hidden;
  p->status[0] = add(at, part, mean);
  p->status[1] = add(at, part, attn_vector("status.bias", 1, ATTN_INIT_CONSTANT, 0));
}

static void add_memory(const place *at, attn_reactive_layer *p) {
  const attn_reactive *m = at->m;
  bool gated = m->memory == ATTN_MEMORY_GATED_SELF || m->memory == ATTN_MEMORY_GATED_INTERLAYER;
  if (m->memory != ATTN_MEMORY_SIMPLE) {
    p->among.norm = add_norm(at, "memory.among.norm");
    if (m->memory != ATTN_MEMORY_SELF)
      p->among.other_norm = add_norm(at, "memory.among.other_norm");
    add_attention(at, "memory.among", &m->cross, p->among.attention);
    add_gate(at, "memory.among.gate", &p->among.gate);
    if (gated) add_gate(at, "memory.among.inner_gate", &p->among.inner);
  }
  p->write.norm = add_norm(at, "memory.write.norm");
  p->write.encoded_norm = add_norm(at, "memory.write.encoded_norm");
  add_attention(at, "memory.write", &m->cross, p->write.attention);
  add_gate(at, "memory.write.gate", &p->write.gate);
}

static void add_layer(const place *at, attn_reactive_layer *p) {
  const attn_reactive *m = at->m;
  p->decoder.norm = add_norm(at, "decoder.norm");
  add_attention(at, "decoder.self", &m->self, p->decoder.self);
  p->decoder.cross_norm = add_norm(at, "decoder.cross_norm");
  p->decoder.memory_norm = add_norm(at, "decoder.memory_norm");
  add_attention(at, "decoder.cross", &m->cross, p->decoder.cross);
  p->decoder.feed_norm = add_norm(at, "decoder.feed_norm");
  add_feed(at, "decoder", p->decoder.feed);
  p->encoder.norm = add_norm(at, "encoder.norm");
  add_attention(at, "encoder.self", &m->encoder_self, p->encoder.self);
  p->encoder.feed_norm = add_norm(at, "encoder.feed_norm");
  add_feed(at, "encoder", p->encoder.feed);
  add_memory(at, p);
}

static void add_head(attn_inventory *list, const attn_reactive *m, const char *prefix,
                     attn_parameter *p[2]) {
  p[0] = attn_inventory_add(list, prefix, attn_matrix("weight", m->vocabulary, m->hidden));
  p[1] =
      attn_inventory_add(list, prefix, attn_vector("bias", m->vocabulary, ATTN_INIT_CONSTANT, 0));
}

static void add_all(attn_inventory *list, void *host) {
  attn_reactive *m = host;
  attn_parameter_shape table = attn_matrix("weight", m->vocabulary, m->hidden);
  table.product = false; /* rows are looked up */
  m->embedding = attn_inventory_add(list, "embedding.", table);
  for (int64_t l = 0; l < m->layer_count; ++l)
    add_layer(&(place){.list = list, .m = m, .layer = l}, &m->layers[l]);
  for (int i = 0; i < 2 && m->head_norm; ++i)
    m->final_norm[i] = attn_inventory_add(
        list, "decoder.head_norm.",
        attn_vector(i ? "bias" : "weight", m->hidden, ATTN_INIT_CONSTANT, i ? 0 : 1));
  add_head(list, m, "decoder.head.", m->head);
  add_head(list, m, "encoder.masked_head.", m->masked_head);
}

/* Public ----------------------------------------------------------------------------------------
 */

static attn_status fill(attn_reactive *m, uint64_t seed, const attn_safetensors *file) {
  ATTN_TRY(attn_model_check_compute(m->compute));
  ATTN_TRY(read_config(m));
  m->layers = attn_alloc_array((size_t)m->layer_count, sizeof *m->layers);
  if (!m->layers) return ATTN_OUT_OF_MEMORY;
  ATTN_TRY(attn_parameter_list_make(&m->list, m->compute, add_all, m));
  ATTN_TRY(attn_parameter_list_fill(&m->list, seed, file));
  return attn_graph_create(m->compute, &m->graph);
}

/* Takes `config`. */
static attn_status make(json_t *config, uint64_t seed, attn_dtype compute,
                        const attn_safetensors *file, attn_reactive **model) {
  *model = NULL;
  attn_reactive *m = attn_alloc_zero(sizeof *m);
  if (!m) {
    json_decref(config);
    return ATTN_OUT_OF_MEMORY;
  }
  m->config = config;
  m->compute = compute;
  attn_status status = fill(m, seed, file);
  if (status == ATTN_OK)
    *model = m;
  else
    attn_reactive_destroy(m);
  return status;
}

attn_status attn_reactive_create(const char *config, uint64_t seed, attn_dtype compute,
                                 attn_reactive **model) {
  json_t *json;
  if (!config || !model)
    return attn_fail(ATTN_INVALID_ARGUMENT, "reactive_create: config or model is NULL");
  *model = NULL;
  ATTN_TRY(attn_json_parse(config, strlen(config), "configuration", &json));
  return make(json, seed, compute, NULL, model);
}

attn_status attn_reactive_load(const char *directory, attn_dtype compute, attn_reactive **model) {
  json_t *json;
  attn_safetensors *file;
  if (!directory || !model)
    return attn_fail(ATTN_INVALID_ARGUMENT, "reactive_load: directory or model is NULL");
  *model = NULL;
  ATTN_TRY(attn_parameter_list_open(directory, &json, &file));
  attn_status status = make(json, 0, compute, file, model);
  attn_safetensors_close(file);
  return status;
}

attn_status attn_reactive_save(const attn_reactive *m, const char *directory) {
  if (!m || !directory)
    return attn_fail(ATTN_INVALID_ARGUMENT, "reactive_save: model or directory is NULL");
  return attn_parameter_list_save(&m->list, m->config, directory);
}

attn_status attn_reactive_move(attn_reactive *m, attn_device device) {
  attn_graph *graph;
  if (!m) return attn_fail(ATTN_INVALID_ARGUMENT, "reactive_move: the model is NULL");
  if (attn_same_device(m->list.device, device)) return ATTN_OK;
  ATTN_TRY(attn_graph_create_on(device, m->compute, &graph));
  attn_status status = attn_parameter_list_move(&m->list, device);
  attn_graph *old = status == ATTN_OK ? m->graph : graph;
  if (status == ATTN_OK) m->graph = graph;
  attn_graph_destroy(old);
  return status;
}

void attn_reactive_destroy(attn_reactive *m) {
  if (!m) return;
  attn_graph_destroy(m->graph);
  attn_parameter_list_free(&m->list);
  attn_free(m->layers);
  json_decref(m->config);
  attn_free(m);
}

attn_status attn_reactive_get_info(const attn_reactive *m, attn_reactive_info *info) {
  if (!m || !info)
    return attn_fail(ATTN_INVALID_ARGUMENT, "reactive_get_info: model or info is NULL");
  *info = (attn_reactive_info){.vocabulary = m->vocabulary,
                               .hidden = m->hidden,
                               .layers = m->layer_count,
                               .slots = m->slots,
                               .parameters = attn_parameter_list_numbers(&m->list),
                               .compute = m->compute,
                               .bos = (int32_t)m->bos,
                               .query = (int32_t)m->query,
                               .answer = (int32_t)m->answer,
                               .eos = (int32_t)m->eos};
  return ATTN_OK;
}
