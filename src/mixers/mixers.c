/* The table of mixers, and what they share. A new mixer is one file, one oracle and one line here.
 */
#include "mixers/mixer.h"
#include "base/status.h"
#include "graph/operations.h"

#include <stdio.h>
#include <string.h>

extern const attn_mixer attn_mixer_softmax, attn_mixer_lightning, attn_mixer_gla,
    attn_mixer_delta_net, attn_mixer_gated_delta_net, attn_mixer_kda;

static const attn_mixer *const table[] = {
    &attn_mixer_softmax,   &attn_mixer_lightning,       &attn_mixer_gla,
    &attn_mixer_delta_net, &attn_mixer_gated_delta_net, &attn_mixer_kda,
};

enum { COUNT = sizeof table / sizeof *table };

int attn_mixer_count(void) {
  return COUNT;
}

const attn_mixer *attn_mixer_at(int index) {
  return table[index];
}

attn_status attn_mixer_get_info(int index, attn_mixer_info *info) {
  if (index < 0 || index >= COUNT || !info)
    return attn_fail(ATTN_INVALID_ARGUMENT, "mixer %d is not in 0 to %d", index, COUNT - 1);
  *info = table[index]->info;
  return ATTN_OK;
}

attn_status attn_mixer_find(const char *name, int *index) {
  char known[512] = "";
  for (int i = 0; i < COUNT; ++i) {
    if (name && strcmp(table[i]->info.name, name) == 0) {
      *index = i;
      return ATTN_OK;
    }
    size_t used = strlen(known);
    snprintf(known + used, sizeof known - used, "%s%s", i ? ", " : "", table[i]->info.name);
  }
  return attn_fail(ATTN_NOT_FOUND, "no mixer is called '%s'; there are %s", name ? name : "(null)",
                   known);
}

attn_status attn_mixer_state_bytes(int index, int64_t hidden, int64_t heads, int64_t dim,
                                   int64_t bytes, int64_t *fixed, int64_t *per_token) {
  if (index < 0 || index >= COUNT)
    return attn_fail(ATTN_INVALID_ARGUMENT, "mixer %d is not in 0 to %d", index, COUNT - 1);
  attn_mixer_options options = {.hidden = hidden, .heads = heads, .dim = dim, .layers = 2};
  ATTN_TRY(table[index]->configure(&options));
  attn_state_part parts[ATTN_STATE_PARTS];
  int count = table[index]->state(&options, bytes == 2 ? ATTN_BF16 : ATTN_F32, parts);
  *fixed = *per_token = 0;
  for (int i = 0; i < count; ++i) {
    int64_t elements = 1;
    for (int axis = 0; axis < parts[i].rank; ++axis) elements *= parts[i].shape[axis];
    *(parts[i].kind == ATTN_STATE_FIXED ? fixed : per_token) +=
        elements * (int64_t)attn_dtype_size(parts[i].dtype);
  }
  return ATTN_OK;
}

attn_parameter_shape attn_matrix(const char *name, int64_t outputs, int64_t inputs) {
  return (attn_parameter_shape){
      .name = name,
      .rank = 2,
      .shape = {outputs, inputs},
      .scale = ATTN_INIT_STD,
      .decay = true,
      .product = true,
  };
}

attn_parameter_shape attn_vector(const char *name, int64_t count, attn_initial initial,
                                 double scale) {
  return (attn_parameter_shape){
      .name = name, .rank = 1, .shape = {count}, .initial = initial, .scale = scale};
}

static attn_status in_range(const char *mixer, const char *field, int64_t value, int64_t least,
                            int64_t greatest) {
  if (value >= least && value <= greatest) return ATTN_OK;
  return attn_fail(ATTN_INVALID_ARGUMENT, "%s: %s is %lld, expected %lld to %lld", mixer, field,
                   (long long)value, (long long)least, (long long)greatest);
}

attn_status attn_mixer_configure_heads(attn_mixer_options *o, const char *mixer) {
  const int64_t most_hidden = 1 << 20, most_heads = 1 << 14, most_dim = 256;
  ATTN_TRY(in_range(mixer, "hidden_size", o->hidden, 1, most_hidden));
  if (!o->heads) o->heads = o->dim > 0 && o->hidden >= o->dim ? o->hidden / o->dim : 1;
  ATTN_TRY(in_range(mixer, "num_heads", o->heads, 1, most_heads));
  if (!o->kv_heads) o->kv_heads = o->heads;
  if (!o->dim) o->dim = o->hidden / o->heads;
  if (!o->value_dim) o->value_dim = o->dim;
  ATTN_TRY(in_range(mixer, "num_kv_heads", o->kv_heads, 1, o->heads));
  ATTN_TRY(in_range(mixer, "head_dim", o->dim, 1, most_dim));
  ATTN_TRY(in_range(mixer, "value_dim", o->value_dim, 1, most_dim));
  if (o->heads % o->kv_heads)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "%s: num_heads %lld is not a multiple of num_kv_heads "
                     "%lld",
                     mixer, (long long)o->heads, (long long)o->kv_heads);
  if (o->norm_epsilon < 0)
    return attn_fail(ATTN_INVALID_ARGUMENT, "%s: norm_eps %g is negative", mixer, o->norm_epsilon);
  if (o->norm_epsilon == 0) o->norm_epsilon = 1e-6;
  return ATTN_OK;
}

attn_var *attn_split_heads(attn_graph *graph, attn_var *x, int64_t heads) {
  if (!x) return NULL;
  int64_t shape[3] = {x->value.shape[0], heads, -1};
  return attn_view_reshape(graph, x, 3, shape);
}

attn_var *attn_as_sequences(attn_graph *graph, const attn_layout *layout, attn_var *x) {
  if (!x || layout->offsets) return x;
  int64_t shape[ATTN_MAX_RANK] = {layout->batch, layout->length};
  for (int i = 1; i < x->value.rank; ++i) shape[i + 1] = x->value.shape[i];
  return attn_view_reshape(graph, x, x->value.rank + 1, shape);
}

attn_var *attn_join_heads(attn_graph *graph, const attn_layout *layout, attn_var *x) {
  return x ? attn_view_reshape(graph, x, 2, (int64_t[]){layout->rows, -1}) : NULL;
}

attn_var *attn_mixer_parameter(attn_graph *graph, const attn_mixer_call *call, int i) {
  return attn_graph_parameter(graph, call->parameters[i]);
}

attn_var *attn_mixer_recurrent(attn_graph *graph, const attn_mixer_call *call, int part,
                               const attn_recurrent_problem *options, attn_var *q, attn_var *k,
                               attn_var *v, attn_var *decay, attn_var *beta) {
  const attn_layout *layout = &call->layout;
  attn_recurrent_problem problem = *options;
  attn_recurrent_args args = {0};
  problem.ragged = layout->offsets != NULL;
  if (problem.ragged) {
    problem.batch = layout->batch;
    problem.length = layout->length;
    args.offsets = layout->offsets;
  }
  if (call->state) {
    attn_tensor matrix = attn_state_fixed(call->state, part);
    int64_t shape[4] = {1, matrix.shape[0], matrix.shape[1], matrix.shape[2]};
    attn_status status = attn_tensor_reshape(&matrix, 4, shape, &args.initial_state);
    if (status != ATTN_OK) return attn_graph_error(graph, status);
    args.final_state = args.initial_state;
  }
  if (problem.decay != ATTN_DECAY_HEAD) decay = attn_as_sequences(graph, layout, decay);
  return attn_op_recurrent(graph, &problem, &args, attn_as_sequences(graph, layout, q),
                           attn_as_sequences(graph, layout, k), attn_as_sequences(graph, layout, v),
                           decay, attn_as_sequences(graph, layout, beta));
}
