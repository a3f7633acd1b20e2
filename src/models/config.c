#include "models/config.h"
#include "base/memory.h"
#include "base/status.h"
#include "files/json.h"
#include "models/families/family.h"

#include <stdio.h>

static attn_status check_experts(const attn_model_config *c, const attn_layer_config *layer) {
  const attn_routing *r = &layer->experts.routing;
  if (!attn_routing_fits(r))
    return attn_fail(ATTN_BAD_FORMAT,
                     "%lld of %lld experts, from %lld of %lld groups: expected at most 64, and "
                     "groups of equal size that hold as many",
                     (long long)r->active, (long long)r->experts, (long long)r->active_groups,
                     (long long)r->groups);
  if (c->feed_forward == ATTN_GELU_MLP)
    return attn_fail(ATTN_UNSUPPORTED, "experts are gated feed-forwards, not gelu");
  return ATTN_OK;
}

static attn_status configure_layers(attn_model_config *c) {
  int64_t experts = 0;
  for (int64_t l = 0; l < c->layer_count; ++l) {
    attn_layer_config *layer = &c->layers[l];
    experts += layer->experts.routing.experts;
    if (experts > ATTN_MOST_EXPERTS)
      return attn_fail(ATTN_UNSUPPORTED, "more than %d experts in all layers", ATTN_MOST_EXPERTS);
    if (layer->experts.routing.experts) ATTN_TRY(check_experts(c, layer));
    if (layer->mixer->configure(&layer->options) != ATTN_OK)
      return attn_fail_in(ATTN_BAD_FORMAT, "layer %lld of %lld", (long long)l,
                          (long long)c->layer_count);
  }
  return ATTN_OK;
}

static attn_status read_config(attn_model_config *c) {
  const char *type = "attn_decoder";
  ATTN_TRY(attn_json_string(c->json, "model_type", ATTN_OPTIONAL, &type));
  ATTN_TRY(attn_family_find(type, &c->family));
  snprintf(c->type, sizeof c->type, "%s", type);
  ATTN_TRY(c->family->configure(c->json, c));
  return configure_layers(c);
}

attn_status attn_model_config_read(json_t *json, const char *origin, attn_model_config *config) {
  *config = (attn_model_config){.json = json};
  attn_status status = read_config(config);
  if (status != ATTN_OK) {
    attn_model_config_free(config);
    return attn_fail_in(status, "%s", origin);
  }
  return ATTN_OK;
}

attn_status attn_model_config_parse(const char *text, size_t size, const char *origin,
                                    attn_model_config *config) {
  json_t *json;
  *config = (attn_model_config){0};
  ATTN_TRY(attn_json_parse(text, size, origin, &json));
  return attn_model_config_read(json, origin, config);
}

void attn_model_config_free(attn_model_config *config) {
  json_decref(config->json);
  attn_free(config->layers);
  attn_free(config->rope_factors);
  *config = (attn_model_config){0};
}
