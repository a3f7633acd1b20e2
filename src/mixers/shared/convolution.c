#include "mixers/shared/convolution.h"
#include "layers/layers.h"

void attn_convolution_configure(attn_mixer_options *o) {
  const int64_t usual_taps = 4;
  if (!o->convolution) o->convolution = usual_taps;
}

attn_parameter_shape attn_convolution_taps(const char *name, int64_t channels, int64_t taps,
                                           attn_initial initial, double scale) {
  attn_parameter_shape shape = attn_matrix(name, channels, taps);
  shape.initial = initial;
  shape.scale = scale;
  shape.product = false;
  return shape;
}

attn_state_part attn_convolution_tail(const char *name, attn_dtype compute, int64_t taps,
                                      int64_t channels) {
  return (attn_state_part){
      .name = name, .dtype = compute, .rank = 2, .shape = {taps - 1, channels}};
}

attn_var *attn_convolution_apply(attn_graph *g, const attn_mixer_call *call, attn_var *x, int i,
                                 int part) {
  attn_tensor memory = {0};
  if (call->state) memory = attn_state_fixed(call->state, part);
  return attn_layer_short_convolution(g, x, attn_mixer_parameter(g, call, i), &call->layout,
                                      call->state ? &memory : NULL);
}
