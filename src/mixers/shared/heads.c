#include "mixers/shared/heads.h"
#include "graph/operations.h"
#include "layers/layers.h"

void attn_heads_matrices(const attn_mixer_options *o,
                         attn_parameter_shape matrices[ATTN_HEADS_MATRICES]) {
  matrices[0] = attn_matrix("q_proj.weight", o->heads * o->dim, o->hidden);
  matrices[1] = attn_matrix("k_proj.weight", o->kv_heads * o->dim, o->hidden);
  matrices[2] = attn_matrix("v_proj.weight", o->kv_heads * o->value_dim, o->hidden);
  matrices[3] = attn_matrix("o_proj.weight", o->hidden, o->heads * o->value_dim);
}

static bool is_there(const attn_mixer_options *o, attn_heads_optional which) {
  if (which < ATTN_HEADS_O_BIAS) return o->bias;
  return which == ATTN_HEADS_O_BIAS ? o->output_bias : o->qk_norm;
}

int attn_heads_place(const attn_mixer_options *o, int first, attn_heads_optional which) {
  if (!is_there(o, which)) return -1;
  for (int i = 0; i < (int)which; ++i) first += is_there(o, (attn_heads_optional)i);
  return first;
}

int attn_heads_parameters(const attn_mixer_options *o, attn_parameter_shape *shapes) {
  const struct {
    const char *name;
    int64_t count;
    double initial;
  } all[ATTN_HEADS_OPTIONAL] = {
      [ATTN_HEADS_Q_BIAS] = {"q_proj.bias", o->heads * o->dim, 0},
      [ATTN_HEADS_K_BIAS] = {"k_proj.bias", o->kv_heads * o->dim, 0},
      [ATTN_HEADS_V_BIAS] = {"v_proj.bias", o->kv_heads * o->value_dim, 0},
      [ATTN_HEADS_O_BIAS] = {"o_proj.bias", o->hidden, 0},
      [ATTN_HEADS_Q_NORM] = {"q_norm.weight", o->dim, 1},
      [ATTN_HEADS_K_NORM] = {"k_norm.weight", o->dim, 1},
  };
  int count = 0;
  for (int i = 0; i < ATTN_HEADS_OPTIONAL; ++i)
    if (is_there(o, (attn_heads_optional)i))
      shapes[count++] = attn_vector(all[i].name, all[i].count, ATTN_INIT_CONSTANT, all[i].initial);
  return count;
}

attn_var *attn_heads_project(attn_graph *g, const attn_mixer_call *call, attn_var *x, int weight,
                             int first, attn_heads_optional bias) {
  attn_var *y = attn_op_linear(g, x, call->parameters[weight]);
  int at = attn_heads_place(call->options, first, bias);
  return at < 0 ? y : attn_op_add_bias(g, y, attn_mixer_parameter(g, call, at));
}

attn_var *attn_heads_position(attn_graph *g, const attn_mixer_call *call, attn_var *x, int first,
                              attn_heads_optional norm) {
  const attn_mixer_options *o = call->options;
  int at = attn_heads_place(o, first, norm);
  if (at >= 0) x = attn_layer_rms_norm(g, x, attn_mixer_parameter(g, call, at), o->norm_epsilon);
  if (o->rotary_dim > 0) x = attn_layer_rotary(g, x, &call->layout, o->rotary_dim, &o->rope);
  return x;
}
