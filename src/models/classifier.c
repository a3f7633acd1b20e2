/* Classifiers: configuration, parameters, files. The network is in classifier_network.c. */
#include "models/classifier.h"
#include "base/memory.h"
#include "base/status.h"
#include "models/model.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { CONVOLUTIONS = ATTN_CLASSIFIER_CONVOLUTIONS, TAPS = ATTN_CLASSIFIER_TAPS, NAME_SIZE = 96 };

/* Configuration ---------------------------------------------------------------------------------
 */

static const char *const known_keys[] = {
    "model_type",          "architectures", "input_size",        "num_classes",
    "hidden_size",         "memory_dim",    "num_hidden_layers", "intermediate_size",
    "num_attention_heads", "theta",         "spiking",           "spike_tau",
    "spike_threshold",     "norm_eps"};

static attn_status read_config(attn_classifier *c) {
  const int64_t most = 1 << 16, most_layers = 1024;
  const json_t *json = c->config;
  const char *type = "";
  char text[256];
  int index;
  ATTN_TRY(attn_json_string(json, "model_type", ATTN_REQUIRED, &type));
  if (strcmp(type, "lmuformer") != 0)
    return attn_fail(ATTN_UNSUPPORTED, "a classifier of model_type %s, expected lmuformer", type);
  if (attn_json_unknown(json, known_keys, sizeof known_keys / sizeof *known_keys, text,
                        sizeof text))
    return attn_fail(ATTN_BAD_FORMAT, "unknown keys: %s", text);
  c->layer_count = 1;
  c->epsilon = 1e-5;
  ATTN_TRY(attn_json_int(json, "input_size", ATTN_REQUIRED, 1, most, &c->input));
  ATTN_TRY(attn_json_int(json, "num_classes", ATTN_REQUIRED, 2, most, &c->classes));
  ATTN_TRY(attn_json_int(json, "hidden_size", ATTN_REQUIRED, 1, most, &c->hidden));
  ATTN_TRY(
      attn_json_int(json, "num_hidden_layers", ATTN_OPTIONAL, 1, most_layers, &c->layer_count));
  c->width = 4 * c->hidden;
  ATTN_TRY(attn_json_int(json, "intermediate_size", ATTN_OPTIONAL, 1, 4 * most, &c->width));
  ATTN_TRY(attn_json_bool(json, "spiking", ATTN_OPTIONAL, &c->spiking));
  ATTN_TRY(attn_json_double(json, "norm_eps", ATTN_OPTIONAL, 1e-12, 1, &c->epsilon));
  attn_mixer_options *o = &c->options;
  *o = (attn_mixer_options){.hidden = c->hidden, .heads = 1, .norm_epsilon = c->epsilon};
  ATTN_TRY(attn_json_int(json, "num_attention_heads", ATTN_OPTIONAL, 1, 1 << 14, &o->heads));
  ATTN_TRY(attn_json_int(json, "memory_dim", ATTN_OPTIONAL, 1, 1024, &o->memory_dim));
  ATTN_TRY(attn_json_double(json, "theta", ATTN_OPTIONAL, 1, 1e9, &o->theta));
  ATTN_TRY(attn_json_double(json, "spike_tau", ATTN_OPTIONAL, 1, 1e9, &o->spike_tau));
  ATTN_TRY(
      attn_json_double(json, "spike_threshold", ATTN_OPTIONAL, 1e-6, 1e6, &o->spike_threshold));
  if (c->spiking && !o->memory_dim && 2 * c->hidden <= 1024 * o->heads)
    o->memory_dim = 2 * c->hidden / o->heads > 0 ? 2 * c->hidden / o->heads : 1;
  ATTN_TRY(attn_mixer_find(c->spiking ? "spiking_lmu" : "lmu", &index));
  c->mixer = attn_mixer_at(index);
  attn_status status = c->mixer->configure(o);
  return status == ATTN_OK ? ATTN_OK : attn_fail_in(ATTN_BAD_FORMAT, "configuration");
}

/* Parameters ------------------------------------------------------------------------------------
 */

static attn_norm_parameters add_norm(attn_inventory *list, const char *prefix, int64_t n) {
  attn_norm_parameters norm;
  norm.weight = attn_inventory_add(list, prefix, attn_vector("weight", n, ATTN_INIT_CONSTANT, 1));
  norm.bias = attn_inventory_add(list, prefix, attn_vector("bias", n, ATTN_INIT_CONSTANT, 0));
  norm.mean = attn_inventory_add(list, prefix, attn_statistic("running_mean", n, 0));
  norm.variance = attn_inventory_add(list, prefix, attn_statistic("running_var", n, 1));
  return norm;
}

static attn_parameter_shape uniform(attn_parameter_shape shape, int64_t inputs) {
  shape.initial = ATTN_INIT_UNIFORM;
  shape.scale = 1 / sqrt((double)inputs);
  return shape;
}

static void add_affine(attn_inventory *list, const char *prefix, int64_t outputs, int64_t inputs,
                       attn_parameter *p[2]) {
  p[0] = attn_inventory_add(list, prefix, uniform(attn_matrix("weight", outputs, inputs), inputs));
  p[1] = attn_inventory_add(list, prefix,
                            uniform(attn_vector("bias", outputs, ATTN_INIT_UNIFORM, 0), inputs));
}

static void add_embedding(attn_inventory *list, attn_classifier *c) {
  char prefix[NAME_SIZE];
  for (int i = 0; i < CONVOLUTIONS; ++i) {
    int64_t inputs = (i ? c->hidden : c->input) * TAPS;
    snprintf(prefix, sizeof prefix, "embedding.%d.conv.", i);
    c->convolution[i] =
        attn_inventory_add(list, prefix, uniform(attn_matrix("weight", c->hidden, inputs), inputs));
    snprintf(prefix, sizeof prefix, "embedding.%d.norm.", i);
    if (c->spiking ? i > 0 : i + 1 < CONVOLUTIONS)
      c->convolution_norm[i] = add_norm(list, prefix, c->hidden);
  }
}

static void add_layer(attn_inventory *list, attn_classifier *c, int64_t l) {
  attn_classifier_layer *p = &c->layers[l];
  attn_parameter_shape shapes[ATTN_MIXER_PARAMETERS];
  char prefix[NAME_SIZE];
  int count = c->mixer->parameters(&c->options, shapes);
  snprintf(prefix, sizeof prefix, "layers.%lld.mixer.", (long long)l);
  for (int i = 0; i < count; ++i) p->mixer[i] = attn_inventory_add(list, prefix, shapes[i]);
  snprintf(prefix, sizeof prefix, "layers.%lld.mixer_norm.", (long long)l);
  if (!c->spiking) p->mixer_norm = add_norm(list, prefix, c->hidden);
  snprintf(prefix, sizeof prefix, "layers.%lld.up.", (long long)l);
  add_affine(list, prefix, c->width, c->hidden, p->up);
  snprintf(prefix, sizeof prefix, "layers.%lld.up_norm.", (long long)l);
  p->up_norm = add_norm(list, prefix, c->spiking ? c->hidden : c->width);
  snprintf(prefix, sizeof prefix, "layers.%lld.down.", (long long)l);
  add_affine(list, prefix, c->hidden, c->width, p->down);
  snprintf(prefix, sizeof prefix, "layers.%lld.down_norm.", (long long)l);
  p->down_norm = add_norm(list, prefix, c->spiking ? c->width : c->hidden);
}

static void add_all(attn_inventory *list, void *host) {
  attn_classifier *c = host;
  add_embedding(list, c);
  for (int64_t l = 0; l < c->layer_count; ++l) add_layer(list, c, l);
  if (c->spiking) c->head_norm = add_norm(list, "head_norm.", c->hidden);
  add_affine(list, "head.", c->classes, c->hidden, c->head);
}

static attn_status list_parameters(attn_classifier *c) {
  c->layers = attn_alloc_array((size_t)c->layer_count, sizeof *c->layers);
  if (!c->layers) return ATTN_OUT_OF_MEMORY;
  return attn_parameter_list_make(&c->list, c->compute, add_all, c);
}

/* Takes `config`. */
static attn_status make(json_t *config, uint64_t seed, attn_dtype compute,
                        const attn_safetensors *file, attn_classifier **classifier) {
  *classifier = NULL;
  attn_classifier *c = attn_alloc_zero(sizeof *c);
  if (!c) {
    json_decref(config);
    return ATTN_OUT_OF_MEMORY;
  }
  c->config = config;
  c->compute = compute;
  attn_status status = attn_model_check_compute(compute);
  if (status == ATTN_OK) status = read_config(c);
  if (status == ATTN_OK) status = list_parameters(c);
  if (status == ATTN_OK) status = attn_parameter_list_fill(&c->list, seed, file);
  if (status == ATTN_OK) status = attn_graph_create(compute, &c->graph);
  if (status == ATTN_OK)
    *classifier = c;
  else
    attn_classifier_destroy(c);
  return status;
}

attn_status attn_classifier_create(const char *config, uint64_t seed, attn_dtype compute,
                                   attn_classifier **classifier) {
  json_t *json;
  if (!config || !classifier)
    return attn_fail(ATTN_INVALID_ARGUMENT, "classifier_create: config or classifier is NULL");
  ATTN_TRY(attn_json_parse(config, strlen(config), "configuration", &json));
  return make(json, seed, compute, NULL, classifier);
}

attn_status attn_classifier_load(const char *directory, attn_dtype compute,
                                 attn_classifier **classifier) {
  if (!directory || !classifier)
    return attn_fail(ATTN_INVALID_ARGUMENT, "classifier_load: directory or classifier is NULL");
  json_t *json;
  attn_safetensors *file;
  ATTN_TRY(attn_parameter_list_open(directory, &json, &file));
  attn_status status = make(json, 0, compute, file, classifier);
  attn_safetensors_close(file);
  return status;
}

attn_status attn_classifier_save(const attn_classifier *c, const char *directory) {
  if (!c || !directory)
    return attn_fail(ATTN_INVALID_ARGUMENT, "classifier_save: classifier or directory is NULL");
  return attn_parameter_list_save(&c->list, c->config, directory);
}

void attn_classifier_destroy(attn_classifier *c) {
  if (!c) return;
  attn_graph_destroy(c->graph);
  attn_parameter_list_free(&c->list);
  attn_free(c->layers);
  json_decref(c->config);
  attn_free(c);
}

attn_status attn_classifier_get_info(const attn_classifier *c, attn_classifier_info *info) {
  if (!c || !info)
    return attn_fail(ATTN_INVALID_ARGUMENT, "classifier_get_info: classifier or info is NULL");
  *info = (attn_classifier_info){.input_size = c->input,
                                 .classes = c->classes,
                                 .hidden = c->hidden,
                                 .layers = c->layer_count,
                                 .parameters = attn_parameter_list_numbers(&c->list),
                                 .delay = CONVOLUTIONS,
                                 .spiking = c->spiking};
  return ATTN_OK;
}
