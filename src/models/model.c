/* Making models; load.c loads them and save.c saves them. */
#include "models/model.h"
#include "base/hash.h"
#include "base/memory.h"
#include "base/random.h"
#include "base/status.h"
#include "engines/dense/dense.h"
#include "base/io.h"
#include "files/json.h"
#include "layers/lora.h"
#include "tensor/device.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { NAME_SIZE = 160 };

/* The list of parameters ------------------------------------------------------------------------
 */

/* Counts, or (when the arrays are there) names and places, every parameter in file order. */
typedef struct inventory {
  attn_model *model;
  int64_t count;
  bool counting;
  bool failed;
} inventory;

static attn_parameter *add(inventory *list, const char *prefix, attn_parameter_shape shape) {
  int64_t index = list->count++;
  if (list->counting) return NULL;
  char name[NAME_SIZE];
  snprintf(name, sizeof name, "%s%s", prefix, shape.name);
  attn_parameter *parameter = &list->model->parameters[index];
  shape.name = attn_strdup(name);
  attn_place place = {0};
  if (shape.name)
    list->failed |=
        attn_family_place(&list->model->config, &shape, ATTN_IN_SAFETENSORS, &place) != ATTN_OK;
  parameter->name = attn_strdup(place.name);
  parameter->decay = shape.decay;
  parameter->statistic = shape.statistic;
  list->model->shapes[index] = shape;
  list->failed |= !parameter->name || !shape.name;
  return parameter;
}

static void add_norm(inventory *list, const char *prefix, attn_parameter **norm) {
  const attn_model_config *c = &list->model->config;
  if (c->norm == ATTN_NORM_SRMS) return;
  norm[0] = add(list, prefix, attn_vector("weight", c->hidden, ATTN_INIT_CONSTANT, 1));
  if (c->norm == ATTN_NORM_LAYER)
    norm[1] = add(list, prefix, attn_vector("bias", c->hidden, ATTN_INIT_CONSTANT, 0));
}

/* The matrices of a feed-forward: up and down, or gate, up and down. */
static void add_matrices(inventory *list, const char *prefix, int64_t width, attn_parameter **p) {
  static const char *const names[] = {"l1.weight", "l2.weight", "l3.weight"};
  const attn_model_config *c = &list->model->config;
  int64_t down = c->feed_forward == ATTN_GELU_MLP ? 1 : 2;
  for (int64_t i = 0; i < down; ++i)
    p[i] = add(list, prefix, attn_matrix(names[i], width, c->hidden));
  p[down] = add(list, prefix, attn_matrix(names[down], c->hidden, width));
}

static void add_experts(inventory *list, int64_t l, attn_layer_parameters *p) {
  const attn_model_config *c = &list->model->config;
  const attn_experts_config *experts = &c->layers[l].experts;
  char prefix[NAME_SIZE];
  int64_t count = experts->routing.experts;
  if (!list->counting) {
    p->experts = attn_alloc_array((size_t)count, 3 * sizeof(attn_parameter *));
    if (!p->experts) {
      list->failed = true;
      return;
    }
  }
  snprintf(prefix, sizeof prefix, "model.layers.%lld.channel_mixer.router.", (long long)l);
  p->router = add(list, prefix, attn_matrix("weight", count, c->hidden));
  if (experts->correction)
    p->router_bias = add(list, prefix, attn_vector("bias", count, ATTN_INIT_CONSTANT, 0));
  for (int64_t e = 0; e < count; ++e) {
    attn_parameter *unused[3];
    snprintf(prefix, sizeof prefix, "model.layers.%lld.channel_mixer.experts.%lld.", (long long)l,
             (long long)e);
    add_matrices(list, prefix, experts->width, list->counting ? unused : p->experts + 3 * e);
  }
  if (!experts->shared_width) return;
  snprintf(prefix, sizeof prefix, "model.layers.%lld.channel_mixer.shared.", (long long)l);
  add_matrices(list, prefix, experts->shared_width, p->shared);
  snprintf(prefix, sizeof prefix, "model.layers.%lld.channel_mixer.shared_gate.", (long long)l);
  if (experts->shared_gate) p->shared_gate = add(list, prefix, attn_matrix("weight", 1, c->hidden));
}

static void add_feed_forward(inventory *list, int64_t l, attn_layer_parameters *p) {
  const attn_model_config *c = &list->model->config;
  char prefix[NAME_SIZE];
  snprintf(prefix, sizeof prefix, "model.layers.%lld.channel_mixer.", (long long)l);
  if (c->layers[l].experts.routing.experts)
    add_experts(list, l, p);
  else
    add_matrices(list, prefix, c->feed_forward_width, p->feed_forward);
}

/* Of an encoder's MLP. */
static void add_feed_forward_biases(inventory *list, int64_t l, attn_layer_parameters *p) {
  const attn_model_config *c = &list->model->config;
  char prefix[NAME_SIZE];
  snprintf(prefix, sizeof prefix, "model.layers.%lld.channel_mixer.", (long long)l);
  attn_parameter_shape up = attn_vector("l1.bias", c->feed_forward_width, ATTN_INIT_CONSTANT, 0);
  attn_parameter_shape down = attn_vector("l2.bias", c->hidden, ATTN_INIT_CONSTANT, 0);
  p->feed_forward_bias[0] = add(list, prefix, up);
  p->feed_forward_bias[1] = add(list, prefix, down);
}

static void add_layer(inventory *list, int64_t l) {
  attn_model *model = list->model;
  const attn_model_config *c = &model->config;
  attn_layer_parameters unused = {0}, *p = list->counting ? &unused : &model->layers[l];
  char prefix[NAME_SIZE];
  snprintf(prefix, sizeof prefix, "model.layers.%lld.token_norm.", (long long)l);
  add_norm(list, prefix, p->token_norm);
  attn_parameter_shape shapes[ATTN_MIXER_PARAMETERS];
  int count = c->layers[l].mixer->parameters(&c->layers[l].options, shapes);
  snprintf(prefix, sizeof prefix, "model.layers.%lld.token_mixer.", (long long)l);
  for (int i = 0; i < count; ++i) p->mixer[i] = add(list, prefix, shapes[i]);
  snprintf(prefix, sizeof prefix, "model.layers.%lld.channel_norm.", (long long)l);
  add_norm(list, prefix, p->channel_norm);
  add_feed_forward(list, l, p);
  if (c->encoder) add_feed_forward_biases(list, l, p);
  if (!c->sandwich) return;
  snprintf(prefix, sizeof prefix, "model.layers.%lld.token_after.", (long long)l);
  add_norm(list, prefix, p->token_after);
  snprintf(prefix, sizeof prefix, "model.layers.%lld.channel_after.", (long long)l);
  add_norm(list, prefix, p->channel_after);
}

/* What an encoder adds to the embedding of a token: looked up, never multiplied by. */
static void add_encoder_tables(inventory *list) {
  attn_model *model = list->model;
  const attn_model_config *c = &model->config;
  attn_parameter_shape positions =
      attn_matrix("model.embed_positions.weight", c->positions, c->hidden);
  attn_parameter_shape types = attn_matrix("model.embed_types.weight", c->token_types, c->hidden);
  positions.product = types.product = false;
  model->positions = add(list, "", positions);
  if (c->token_types) model->token_types = add(list, "", types);
  add_norm(list, "model.embed_norm.", model->embedding_norm);
}

static void take_inventory(inventory *list) {
  attn_model *model = list->model;
  const attn_model_config *c = &model->config;
  attn_parameter_shape table = attn_matrix("model.embed_tokens.weight", c->vocabulary, c->hidden);
  table.product = c->tied;
  model->embedding = add(list, "", table);
  if (c->encoder) add_encoder_tables(list);
  for (int64_t l = 0; l < c->layer_count; ++l) add_layer(list, l);
  if (c->encoder) return;
  add_norm(list, "model.norm.", model->final_norm);
  model->head = c->tied ? model->embedding
                        : add(list, "", attn_matrix("lm_head.weight", c->vocabulary, c->hidden));
}

static attn_status list_parameters(attn_model *model) {
  inventory list = {.model = model, .counting = true};
  take_inventory(&list);
  model->parameter_count = list.count;
  model->parameters = attn_alloc_array((size_t)list.count, sizeof *model->parameters);
  model->shapes = attn_alloc_array((size_t)list.count, sizeof *model->shapes);
  model->layers = attn_alloc_array((size_t)model->config.layer_count, sizeof *model->layers);
  model->borrowed = attn_alloc_array((size_t)list.count, sizeof *model->borrowed);
  if (!model->parameters || !model->shapes || !model->layers || !model->borrowed)
    return ATTN_OUT_OF_MEMORY;
  list = (inventory){.model = model};
  take_inventory(&list);
  return list.failed ? ATTN_OUT_OF_MEMORY : ATTN_OK;
}

/* Values ----------------------------------------------------------------------------------------
 */

static double initial_value(const attn_parameter_shape *shape, int64_t index, attn_random *random) {
  switch (shape->initial) {
  case ATTN_INIT_NORMAL: return shape->scale * attn_random_normal(random);
  case ATTN_INIT_CONSTANT: return shape->scale;
  case ATTN_INIT_UNIFORM: return shape->scale * (2 * attn_random_uniform(random) - 1);
  case ATTN_INIT_LOG_A: return log(1 + 15 * attn_random_uniform(random));
  case ATTN_INIT_DT_BIAS: {
    double dt = exp(log(0.001) + (log(0.1) - log(0.001)) * attn_random_uniform(random));
    if (dt < 1e-4) dt = 1e-4;
    return dt + log(-expm1(-dt)); /* softplus^-1 */
  }
  case ATTN_INIT_IDENTITY:
    return index / shape->shape[1] % (int64_t)shape->scale == index % shape->shape[1];
  case ATTN_INIT_LAST_TAP: return (index + 1) % shape->shape[1] == 0 ? 1 : shape->scale;
  case ATTN_INIT_INVERSE_FACTORIAL: return exp(-shape->scale * lgamma((double)index + 1));
  case ATTN_INIT_LRPE: return pow(10000, -2.0 * (double)index / shape->scale);
  }
  return 0;
}

/* Words of 32 bits that an element takes from its parameter's stream. */
static uint64_t words_of(const attn_parameter_shape *shape) {
  return shape->initial == ATTN_INIT_NORMAL ? 4 : 2;
}

/* Every parameter has a random stream of its own: adding one does not change the others; and every
 * element its place in it: threads share a parameter and change no bit. */
void attn_parameter_initialise(const attn_parameter_shape *shape, uint64_t seed, uint64_t stream,
                               const attn_tensor *value) {
  int64_t count = attn_tensor_count(value);
#pragma omp parallel for num_threads(attn_get_threads()) schedule(static) if (count > 1 << 14)
  for (int64_t e = 0; e < count; ++e) {
    attn_random random = {.seed = seed, .stream = stream, .index = (uint64_t)e * words_of(shape)};
    double number = initial_value(shape, e, &random);
    if (value->dtype == ATTN_F64)
      ((double *)value->data)[e] = number;
    else
      ((float *)value->data)[e] = (float)number;
  }
}

static attn_status initialise(attn_model *model, uint64_t seed) {
  for (int64_t i = 0; i < model->parameter_count; ++i) {
    const attn_parameter_shape *shape = &model->shapes[i];
    attn_tensor *value = &model->parameters[i].value;
    attn_dtype dtype = model->compute == ATTN_F64 ? ATTN_F64 : ATTN_F32;
    ATTN_TRY(attn_tensor_create(dtype, shape->rank, shape->shape, value));
    attn_parameter_initialise(shape, seed, (uint64_t)i, value);
  }
  return ATTN_OK;
}

/* Matrices that rows are multiplied by get their compute form. */
attn_status attn_model_make_weights(attn_model *model) {
  for (int64_t i = 0; i < model->parameter_count; ++i) {
    const attn_parameter_shape *shape = &model->shapes[i];
    if (!shape->product) continue;
    ATTN_TRY(attn_weight_create(shape->shape[0], shape->shape[1], model->compute,
                                &model->parameters[i].weight));
  }
  return attn_model_refresh(model);
}

static attn_status set_weight(attn_parameter *p) {
  if (p->scales)
    return attn_weight_set_scaled(p->weight, p->blocks, p->scales, p->scale_rows, p->scale_columns);
  return p->blocks ? attn_weight_set_blocks(p->weight, p->value.device, p->block_type, p->blocks)
                   : attn_weight_set(p->weight, &p->value);
}

/* The parameters of the adapter that parameter `index` has; how many, 0 without one. */
static int list_adapter(const attn_model *model, int64_t index,
                        attn_parameter *list[ATTN_LORA_PARAMETERS]) {
  bool adapted = model->adapters && model->adapters[index];
  return adapted ? attn_lora_list(model->adapters[index], list) : 0;
}

attn_status attn_model_refresh(attn_model *model) {
  for (int64_t i = 0; i < model->parameter_count; ++i) {
    attn_parameter *adapter[ATTN_LORA_PARAMETERS];
    int count = list_adapter(model, i, adapter);
    if (model->parameters[i].weight) ATTN_TRY(set_weight(&model->parameters[i]));
    for (int k = 0; k < count; ++k)
      if (adapter[k]->weight) ATTN_TRY(set_weight(adapter[k]));
  }
  return ATTN_OK;
}

int64_t attn_model_count_all(const attn_model *model) {
  int64_t adapters = 0;
  for (int64_t i = 0; model->adapters && i < model->parameter_count; ++i)
    adapters += model->adapters[i] != NULL;
  return model->parameter_count + adapters * ATTN_LORA_PARAMETERS;
}

int64_t attn_model_list_all(const attn_model *model, attn_parameter **list) {
  int64_t count = 0;
  for (; count < model->parameter_count; ++count) list[count] = &model->parameters[count];
  for (int64_t i = 0; i < model->parameter_count; ++i)
    count += list_adapter(model, i, list + count);
  return count;
}

int64_t attn_model_list_trained(const attn_model *model, attn_parameter **list) {
  int64_t all = attn_model_list_all(model, list), count = 0;
  for (int64_t i = 0; i < all; ++i)
    if (list[i]->gradient.data) list[count++] = list[i];
  return count;
}

static void free_values(attn_parameter *p, bool borrowed) {
  if (!borrowed) {
    if (p->blocks) attn_device_free(p->value.device, (void *)(uintptr_t)p->blocks);
    attn_tensor_destroy(&p->value);
  }
  attn_free((void *)(uintptr_t)p->scales);
  p->scales = NULL;
  p->blocks = NULL;
}

/* The values of a parameter as plain numbers on a device. */
static attn_status copy_plain(const attn_parameter *p, attn_dtype dtype, attn_device device,
                              attn_tensor *copy) {
  attn_tensor unpacked = {0};
  ATTN_TRY(attn_tensor_create_on(device, dtype, p->value.rank, p->value.shape, copy));
  attn_status status = p->blocks ? attn_parameter_copy(p, dtype, &unpacked) : ATTN_OK;
  if (status == ATTN_OK) status = attn_tensor_copy(p->blocks ? &unpacked : &p->value, copy);
  attn_tensor_destroy(&unpacked);
  if (status != ATTN_OK) attn_tensor_destroy(copy);
  return status;
}

attn_status attn_model_replace_values(attn_model *model, int64_t index, attn_tensor *values) {
  attn_parameter *p = &model->parameters[index];
  free_values(p, model->borrowed[index]);
  p->value = *values;
  *values = (attn_tensor){0};
  model->borrowed[index] = false;
  return p->weight ? set_weight(p) : ATTN_OK;
}

attn_status attn_model_make_parameter_trainable(attn_model *model, int64_t index) {
  attn_dtype dtype = model->compute == ATTN_F64 ? ATTN_F64 : ATTN_F32;
  attn_parameter *p = &model->parameters[index];
  if (model->borrowed[index] || p->blocks || p->value.dtype != dtype) {
    attn_tensor master;
    ATTN_TRY(copy_plain(p, dtype, model->device, &master));
    ATTN_TRY(attn_model_replace_values(model, index, &master));
  }
  if (p->gradient.data) return ATTN_OK;
  return attn_tensor_create_on(model->device, dtype, p->value.rank, p->value.shape, &p->gradient);
}

attn_status attn_model_make_trainable(attn_model *model) {
  for (int64_t i = 0; i < model->parameter_count; ++i)
    ATTN_TRY(attn_model_make_parameter_trainable(model, i));
  return attn_model_refresh(model);
}

/* Devices ---------------------------------------------------------------------------------------
 */

static uint64_t hash_sample(uint64_t value, const attn_parameter *p) {
  enum { SAMPLED_BYTES = 64 };
  size_t size = (size_t)attn_tensor_count(&p->value) * attn_dtype_size(p->value.dtype);
  value = attn_hash(value, p->name, strlen(p->name));
  value = attn_hash(value, p->value.shape, (size_t)p->value.rank * sizeof *p->value.shape);
  const void *data = p->blocks ? p->blocks : p->value.data;
  if (p->blocks) /* the smallest is a block of at least as many bytes, or all there is */
    size = (size_t)attn_block_get_format(p->block_type)->bytes;
  if (p->blocks && p->block_type == ATTN_BLOCK_F8_E4M3) size = (size_t)attn_tensor_count(&p->value);
  return attn_hash(value, data, size < SAMPLED_BYTES ? size : SAMPLED_BYTES);
}

uint64_t attn_model_fingerprint(const attn_model *model) {
  uint64_t value = ATTN_HASH_START;
  if (attn_is_cuda(model->device)) return model->fingerprint;
  for (int64_t i = 0; i < model->parameter_count; ++i) {
    attn_parameter *adapter[ATTN_LORA_PARAMETERS];
    int count = list_adapter(model, i, adapter);
    value = hash_sample(value, &model->parameters[i]);
    for (int k = 0; k < count; ++k) value = hash_sample(value, adapter[k]);
  }
  return value;
}

/* What a parameter has on another device. */
typedef struct moved {
  attn_tensor value, gradient;
  void *blocks;
  attn_weight *weight;
} moved;

static size_t block_bytes(const attn_parameter *p) {
  const attn_block_format *format = attn_block_get_format(p->block_type);
  return (size_t)(attn_tensor_count(&p->value) / format->elements * format->bytes);
}

/* GGUF's blocks stay as they are; float8 becomes plain numbers. */
static attn_status copy_values(const attn_model *model, const attn_parameter *p, attn_device device,
                               moved *copy) {
  if (p->blocks && p->block_type < ATTN_BLOCK_GGUF_TYPES) {
    copy->value = p->value;
    copy->value.device = device;
    copy->blocks = attn_device_alloc(device, block_bytes(p));
    if (!copy->blocks) return ATTN_OUT_OF_MEMORY;
    attn_device gpu = attn_is_cuda(device) ? device : p->value.device;
    ATTN_TRY(attn_device_copy(gpu, copy->blocks, p->blocks, block_bytes(p)));
    return attn_device_synchronize(gpu);
  }
  return copy_plain(p, p->blocks ? model->compute : p->value.dtype, device, &copy->value);
}

static attn_status copy_to(const attn_model *model, const attn_parameter *p, attn_device device,
                           moved *copy) {
  const int64_t *shape = p->value.shape;
  ATTN_TRY(copy_values(model, p, device, copy));
  if (p->gradient.data)
    ATTN_TRY(attn_tensor_create_on(device, p->gradient.dtype, p->value.rank, p->value.shape,
                                   &copy->gradient));
  if (!p->weight) return ATTN_OK;
  ATTN_TRY(attn_weight_create(shape[0], shape[1], model->compute, &copy->weight));
  return copy->blocks ? attn_weight_set_blocks(copy->weight, device, p->block_type, copy->blocks)
                      : attn_weight_set(copy->weight, &copy->value);
}

static void free_copy(moved *copy, attn_device device) {
  attn_weight_destroy(copy->weight);
  attn_tensor_destroy(&copy->gradient);
  if (copy->blocks)
    attn_device_free(device, copy->blocks);
  else
    attn_tensor_destroy(&copy->value);
}

static void take_copies(attn_model *model, attn_device device, attn_parameter *const *all,
                        int64_t count, const moved *copies) {
  model->fingerprint = attn_model_fingerprint(model);
  for (int64_t i = 0; i < count; ++i) {
    attn_parameter *p = all[i];
    attn_weight_destroy(p->weight); /* may borrow the values */
    attn_tensor_destroy(&p->gradient);
    free_values(p, i < model->parameter_count && model->borrowed[i]);
    p->value = copies[i].value;
    p->gradient = copies[i].gradient;
    p->blocks = copies[i].blocks;
    p->weight = copies[i].weight;
    if (i < model->parameter_count) model->borrowed[i] = false;
  }
  model->device = device;
}

/* Everything is made there before anything here is given up. */
attn_status attn_model_move(attn_model *model, attn_device device) {
  if (!model) return attn_fail(ATTN_INVALID_ARGUMENT, "model_move: the model is NULL");
  if (attn_same_device(model->device, device)) return ATTN_OK;
  if (attn_is_cuda(device)) {
    attn_gpu *gpu = attn_gpu_open(device.index);
    attn_cuda_dense *products; /* a model that finds no library for them does not move */
    if (!gpu) return ATTN_UNSUPPORTED;
    ATTN_TRY(attn_gpu_dense(gpu, &products));
  }
  size_t most = (size_t)attn_model_count_all(model);
  attn_parameter **all = attn_alloc_array(most, sizeof *all);
  moved *copies = attn_alloc_array(most, sizeof *copies);
  int64_t count = all && copies ? attn_model_list_all(model, all) : 0;
  attn_status status = all && copies ? ATTN_OK : ATTN_OUT_OF_MEMORY;
  for (int64_t i = 0; i < count && status == ATTN_OK; ++i)
    status = copy_to(model, all[i], device, &copies[i]);
  if (status == ATTN_OK)
    take_copies(model, device, all, count, copies);
  else
    for (int64_t i = 0; i < count; ++i) free_copy(&copies[i], device);
  attn_free(all);
  attn_free(copies);
  return status;
}

/* Public ----------------------------------------------------------------------------------------
 */

bool attn_model_norm_offset(const attn_model *model, int64_t index) {
  const attn_parameter_shape *shape = &model->shapes[index];
  return model->config.norm_offset && shape->rank == 1 && strstr(shape->name, ".weight") &&
         !strstr(shape->name, ".o_norm.");
}

void attn_model_destroy(attn_model *model) {
  if (!model) return;
  bool listed = model->parameters && model->shapes && model->borrowed;
  for (int64_t i = 0; listed && i < model->parameter_count; ++i) {
    attn_parameter *p = &model->parameters[i];
    attn_weight_destroy(p->weight);
    attn_tensor_destroy(&p->gradient);
    free_values(p, model->borrowed[i]);
    attn_free((void *)(uintptr_t)p->name);
    attn_free((void *)(uintptr_t)model->shapes[i].name);
    if (model->adapters) attn_lora_destroy(model->adapters[i]);
  }
  for (int64_t l = 0; model->layers && l < model->config.layer_count; ++l)
    attn_free(model->layers[l].experts);
  attn_free(model->parameters);
  attn_free(model->shapes);
  attn_free(model->layers);
  attn_free(model->borrowed);
  attn_free(model->adapters);
  attn_model_text_free(&model->text);
  attn_source_close(&model->source);
  attn_model_config_free(&model->config);
  attn_free(model);
}

attn_status attn_model_check_decoder(const attn_model *model, const char *what) {
  if (!model->config.encoder) return ATTN_OK;
  return attn_fail(
      ATTN_UNSUPPORTED,
      "%s: a model of type %s is an encoder: it embeds texts (attn embed) and predicts "
      "no tokens",
      what, model->config.type);
}

attn_status attn_model_check_compute(attn_dtype compute) {
  if (compute == ATTN_BF16 || compute == ATTN_F32 || compute == ATTN_F64) return ATTN_OK;
  return attn_fail(ATTN_UNSUPPORTED, "models compute in bfloat16, float32 or float64, not %s",
                   attn_dtype_name(compute));
}

attn_status attn_model_start(json_t *config, const char *origin, attn_dtype compute,
                             attn_model *model) {
  model->compute = compute;
  ATTN_TRY(attn_model_config_read(config, origin, &model->config));
  return list_parameters(model);
}

attn_status attn_model_create(const char *config, uint64_t seed, attn_dtype compute,
                              attn_model **model) {
  json_t *json;
  ATTN_TRY(attn_model_check_compute(compute));
  ATTN_TRY(attn_json_parse(config, strlen(config), "configuration", &json));
  attn_model *made = attn_alloc_zero(sizeof *made);
  if (!made) {
    json_decref(json);
    return ATTN_OUT_OF_MEMORY;
  }
  attn_status status = attn_model_start(json, "configuration", compute, made);
  if (status == ATTN_OK) status = initialise(made, seed);
  if (status == ATTN_OK) status = attn_model_make_weights(made);
  if (status == ATTN_OK)
    *model = made;
  else
    attn_model_destroy(made);
  return status;
}

static void add_state_bytes(const attn_model *model, attn_model_info *info) {
  for (int64_t l = 0; l < model->config.layer_count; ++l) {
    const attn_layer_config *layer = &model->config.layers[l];
    attn_state_part parts[ATTN_STATE_PARTS];
    if (layer->options.bidirectional) continue;
    int count = layer->mixer->state(&layer->options, model->compute, parts);
    for (int i = 0; i < count; ++i) {
      int64_t elements = 1;
      for (int axis = 0; axis < parts[i].rank; ++axis) elements *= parts[i].shape[axis];
      int64_t bytes = elements * (int64_t)attn_dtype_size(parts[i].dtype);
      if (parts[i].kind == ATTN_STATE_FIXED)
        info->state_fixed_bytes += bytes;
      else if (parts[i].window)
        info->state_fixed_bytes += bytes * (parts[i].window + ATTN_PAGE_TOKENS);
      else
        info->state_token_bytes += bytes;
    }
  }
}

static void add_stored(const attn_model *model, int64_t index, attn_model_info *info) {
  const attn_parameter *p = &model->parameters[index];
  attn_stored stored;
  info->stored = p->value.dtype;
  if (!p->blocks && attn_model_find_stored(model, index, &stored) && !stored.in_blocks)
    info->stored = stored.dtype;
  bool plain = !p->blocks || p->block_type == ATTN_BLOCK_F8_E4M3;
  if (plain && p->blocks) info->stored = ATTN_F8_E4M3;
  snprintf(info->stored_type, sizeof info->stored_type, "%s",
           !plain ? attn_block_get_format(p->block_type)->name : attn_dtype_name(info->stored));
}

attn_status attn_model_get_info(const attn_model *model, attn_model_info *info) {
  const attn_model_config *c = &model->config;
  *info = (attn_model_info){.layers = c->layer_count,
                            .hidden = c->hidden,
                            .vocabulary = c->vocabulary,
                            .compute = model->compute};
  snprintf(info->type, sizeof info->type, "%s", c->type);
  int64_t largest = 0, largest_index = 0;
  for (int64_t i = 0; i < model->parameter_count; ++i) {
    const attn_tensor *value = &model->parameters[i].value;
    int64_t count = attn_tensor_count(value);
    info->parameters += count;
    const attn_parameter *p = &model->parameters[i];
    const attn_block_format *format = attn_block_get_format(p->block_type);
    info->weight_bytes += p->blocks ? count / format->elements * format->bytes
                                    : count * (int64_t)attn_dtype_size(value->dtype);
    if (count > largest) {
      largest = count;
      largest_index = i;
    }
  }
  add_stored(model, largest_index, info);
  add_state_bytes(model, info);
  return ATTN_OK;
}

const char *attn_model_mixer(const attn_model *model, int64_t layer) {
  if (layer < 0 || layer >= model->config.layer_count) return NULL;
  return model->config.layers[layer].mixer->info.name;
}
