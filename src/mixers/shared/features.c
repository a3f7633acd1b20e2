#include "mixers/shared/features.h"
#include "base/status.h"
#include "graph/operations.h"
#include "layers/layers.h"

static const double least_feature = 1e-12; /* as in the published layers */

int attn_features_state(const attn_mixer_options *o, int64_t features, attn_dtype compute,
                        attn_state_part *parts) {
  attn_dtype wide = compute == ATTN_F64 ? ATTN_F64 : ATTN_F32;
  parts[ATTN_FEATURES_MATRIX] = (attn_state_part){
      .name = "state", .dtype = wide, .rank = 3, .shape = {o->heads, features, o->value_dim}};
  parts[ATTN_FEATURES_NORMALISER] = (attn_state_part){
      .name = "normaliser", .dtype = wide, .rank = 2, .shape = {o->heads, features}};
  return ATTN_FEATURES_PARTS;
}

attn_status attn_features_check(const attn_mixer_options *o, const char *mixer) {
  if (2 * o->feature_dim <= ATTN_MOST_FEATURES) return ATTN_OK;
  return attn_fail(ATTN_INVALID_ARGUMENT, "%s: feature_dim %lld is above %d", mixer,
                   (long long)o->feature_dim, ATTN_MOST_FEATURES / 2);
}

attn_parameter_shape attn_features_matrix(const attn_mixer_options *o, const char *name) {
  attn_parameter_shape shape = attn_matrix(name, o->heads * o->feature_dim, o->dim);
  shape.initial = ATTN_INIT_IDENTITY;
  shape.scale = (double)o->feature_dim;
  shape.decay = false; /* towards the identity it would have to be */
  return shape;
}

attn_var *attn_features_mirrored(attn_graph *g, attn_feature_map map, attn_var *y) {
  attn_var *negative = attn_op_scale(g, y, -1);
  if (map == ATTN_FEATURES_JOINT) {
    attn_var *both = attn_op_scale(g, attn_layer_append_channels(g, y, negative), 2);
    return attn_op_row_softmax(g, both, true, 0);
  }
  bool divide = map == ATTN_FEATURES_SOFTMAX;
  double least = divide ? least_feature : 0;
  return attn_layer_append_channels(g, attn_op_row_softmax(g, y, divide, least),
                                    attn_op_row_softmax(g, negative, divide, least));
}
