/* The table of mixers, and what they share. A new mixer is one file, one oracle and one line here.
 */
#include "mixers/mixer.h"
#include "base/status.h"
#include "graph/operations.h"
#include "graph/passes.h"

#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

extern const attn_mixer attn_mixer_softmax, attn_mixer_lightning, attn_mixer_gla,
    attn_mixer_delta_net, attn_mixer_gated_delta_net, attn_mixer_kda, attn_mixer_mla,
    attn_mixer_minimax, attn_mixer_hedgehog, attn_mixer_norm_attention, attn_mixer_diag_attention,
    attn_mixer_aaren, attn_mixer_based, attn_mixer_lawcat, attn_mixer_lolcats, attn_mixer_lmu,
    attn_mixer_spiking_lmu, attn_mixer_titans, attn_mixer_omega_net, attn_mixer_atlas;

static const attn_mixer *const table[] = {
    &attn_mixer_softmax,
    &attn_mixer_lightning,
    &attn_mixer_gla,
    &attn_mixer_delta_net,
    &attn_mixer_gated_delta_net,
    &attn_mixer_kda,
    &attn_mixer_mla,
    &attn_mixer_minimax,
    &attn_mixer_hedgehog,
    &attn_mixer_norm_attention,
    &attn_mixer_diag_attention,
    &attn_mixer_aaren,
    &attn_mixer_based,
    &attn_mixer_lawcat,
    &attn_mixer_lmu,
    &attn_mixer_spiking_lmu,
    &attn_mixer_lolcats,
    &attn_mixer_titans,
    &attn_mixer_omega_net,
    &attn_mixer_atlas,
};

enum { COUNT = sizeof table / sizeof *table };

int attn_mixer_count(void) {
  return COUNT;
}

const attn_mixer *attn_mixer_at(int index) {
  return index >= 0 && index < COUNT ? table[index] : NULL;
}

attn_status attn_mixer_get_info(int index, attn_mixer_info *info) {
  if (index < 0 || index >= COUNT || !info)
    return attn_fail(ATTN_INVALID_ARGUMENT, "mixer %d is not in 0 to %d", index, COUNT - 1);
  *info = table[index]->info;
  return ATTN_OK;
}

attn_status attn_mixer_find(const char *name, int *index) {
  char known[512] = "";
  if (!index) return attn_fail(ATTN_INVALID_ARGUMENT, "mixer_find: index is NULL");
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
  if (!fixed || !per_token || (bytes != 2 && bytes != 4))
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "state_bytes: elements of %lld bytes, expected 2 or 4, and two results",
                     (long long)bytes);
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

attn_parameter_shape attn_statistic(const char *name, int64_t count, double value) {
  attn_parameter_shape shape = attn_vector(name, count, ATTN_INIT_CONSTANT, value);
  shape.statistic = true;
  return shape;
}

static attn_status in_range(const char *mixer, const char *field, int64_t value, int64_t least,
                            int64_t greatest) {
  if (value >= least && value <= greatest) return ATTN_OK;
  return attn_fail(ATTN_INVALID_ARGUMENT, "%s: %s is %lld, expected %lld to %lld", mixer, field,
                   (long long)value, (long long)least, (long long)greatest);
}

/* Sizes so large that nobody means them, and so small that no product of four overflows. */
enum {
  MOST_HIDDEN = 1 << 20,
  MOST_HEADS = 1 << 14,
  MOST_DIM = 256,
  MOST_TAPS = 16,
  MOST_LATENT = 1024,
  MOST_BLOCK = 1 << 16,
  MOST_MEMORY = 1024, /* ATTN_LEGENDRE_MOST */
  MOST_WIDTH = 1 << 12,
  MOST_TOKENS = 1 << 10,
  MOST_DEGREE = 6
};

/* What the fields of the options may be, defaults included; the names are those of model files. */
static const struct {
  const char *name;
  size_t offset;
  int64_t least, greatest;
} integers[] = {
    {"hidden_size", offsetof(attn_mixer_options, hidden), 1, MOST_HIDDEN},
    {"num_heads", offsetof(attn_mixer_options, heads), 0, MOST_HEADS},
    {"num_kv_heads", offsetof(attn_mixer_options, kv_heads), 0, MOST_HEADS},
    {"head_dim", offsetof(attn_mixer_options, dim), 0, MOST_DIM},
    {"value_dim", offsetof(attn_mixer_options, value_dim), 0, MOST_DIM},
    {"window", offsetof(attn_mixer_options, window), 0, INT32_MAX},
    {"block_size", offsetof(attn_mixer_options, block), 0, MOST_BLOCK},
    {"rotary_dim", offsetof(attn_mixer_options, rotary_dim), -1, MOST_DIM},
    {"feature_dim", offsetof(attn_mixer_options, feature_dim), 0, MOST_DIM},
    {"memory_dim", offsetof(attn_mixer_options, memory_dim), 0, MOST_MEMORY},
    {"memory_width", offsetof(attn_mixer_options, memory_width), 0, MOST_WIDTH},
    {"memory_window", offsetof(attn_mixer_options, memory_window), 0, MOST_TOKENS},
    {"memory_chunk", offsetof(attn_mixer_options, memory_chunk), 0, MOST_TOKENS},
    {"feature_degree", offsetof(attn_mixer_options, feature_degree), 0, MOST_DEGREE},
    {"newton_schulz_steps", offsetof(attn_mixer_options, newton_schulz), -1,
     ATTN_NEWTON_SCHULZ_MOST_STEPS},
    {"latent_rank", offsetof(attn_mixer_options, latent_rank), 0, MOST_LATENT},
    {"query_rank", offsetof(attn_mixer_options, query_rank), 0, MOST_HIDDEN},
    {"shared_dim", offsetof(attn_mixer_options, shared_dim), 0, MOST_DIM},
    {"conv_size", offsetof(attn_mixer_options, convolution), 0, MOST_TAPS},
    {"gate_rank", offsetof(attn_mixer_options, gate_rank), 0, MOST_HIDDEN},
    {"layer", offsetof(attn_mixer_options, layer), 0, INT32_MAX},
    {"layers", offsetof(attn_mixer_options, layers), 0, INT32_MAX},
};
static const struct {
  const char *name;
  size_t offset;
} numbers[] = {
    {"rope_theta", offsetof(attn_mixer_options, rope.base)},
    {"soft_cap", offsetof(attn_mixer_options, soft_cap)},
    {"scale", offsetof(attn_mixer_options, scale)},
    {"theta", offsetof(attn_mixer_options, theta)},
    {"spike_tau", offsetof(attn_mixer_options, spike_tau)},
    {"spike_threshold", offsetof(attn_mixer_options, spike_threshold)},
    {"norm_eps", offsetof(attn_mixer_options, norm_epsilon)},
};

attn_status attn_mixer_check_options(const attn_mixer_options *o, const char *mixer) {
  for (size_t i = 0; i < sizeof integers / sizeof *integers; ++i) {
    const int64_t *value = (const int64_t *)((const char *)o + integers[i].offset);
    ATTN_TRY(in_range(mixer, integers[i].name, *value, integers[i].least, integers[i].greatest));
  }
  for (size_t i = 0; i < sizeof numbers / sizeof *numbers; ++i) {
    const double *value = (const double *)((const char *)o + numbers[i].offset);
    if (!isfinite(*value) || *value < 0)
      return attn_fail(ATTN_INVALID_ARGUMENT, "%s: %s is %g, expected a finite number, 0 or more",
                       mixer, numbers[i].name, *value);
  }
  int index = 0;
  if (o->bidirectional) ATTN_TRY(attn_mixer_find(mixer, &index));
  if (o->bidirectional && !(table[index]->info.abilities & ATTN_ABILITY_BIDIRECTIONAL))
    return attn_fail(ATTN_INVALID_ARGUMENT, "%s: bidirectional is true, but it is causal", mixer);
  ATTN_TRY(in_range(mixer, "feature_map", (int64_t)o->feature_map, ATTN_FEATURES_DEFAULT,
                    ATTN_FEATURES_ELU));
  ATTN_TRY(in_range(mixer, "window_kind", (int64_t)o->window_kind, ATTN_WINDOW_TERRACE,
                    ATTN_WINDOW_SLIDING));
  ATTN_TRY(in_range(mixer, "memory", (int64_t)o->memory, ATTN_MEMORY_DEFAULT, ATTN_MEMORY_GATED));
  return in_range(mixer, "decay schedule", (int64_t)o->schedule, ATTN_SCHEDULE_CODE,
                  ATTN_SCHEDULE_PAPER);
}

attn_status attn_mixer_configure_heads(attn_mixer_options *o, const char *mixer) {
  const double usual_epsilon = 1e-6;
  if (!o->heads) o->heads = o->dim && o->hidden >= o->dim ? o->hidden / o->dim : 1;
  if (!o->kv_heads) o->kv_heads = o->heads;
  if (!o->dim) o->dim = o->hidden / o->heads;
  if (!o->value_dim) o->value_dim = o->dim;
  if (o->norm_epsilon == 0) o->norm_epsilon = usual_epsilon;
  ATTN_TRY(in_range(mixer, "num_heads", o->heads, 1, MOST_HEADS));
  ATTN_TRY(in_range(mixer, "num_kv_heads", o->kv_heads, 1, o->heads));
  ATTN_TRY(in_range(mixer, "head_dim", o->dim, 1, MOST_DIM));
  ATTN_TRY(in_range(mixer, "value_dim", o->value_dim, 1, MOST_DIM));
  if (o->heads % o->kv_heads == 0) return ATTN_OK;
  return attn_fail(ATTN_INVALID_ARGUMENT,
                   "%s: num_heads %lld is not a multiple of num_kv_heads %lld", mixer,
                   (long long)o->heads, (long long)o->kv_heads);
}

attn_status attn_mixer_configure_rotary(attn_mixer_options *o, const char *mixer) {
  const double usual_base = 10000;
  if (o->rotary_dim == 0) o->rotary_dim = o->dim > 1 ? o->dim / 2 * 2 : -1;
  if (o->rotary_dim > o->dim || (o->rotary_dim > 0 && o->rotary_dim % 2))
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "%s: rotary_dim %lld is not even and at most head_dim %lld", mixer,
                     (long long)o->rotary_dim, (long long)o->dim);
  if (o->rope.base == 0) o->rope.base = usual_base;
  bool factors = o->rope.scaling == ATTN_ROPE_FACTORS && o->rotary_dim > 0;
  if (factors && (!o->rope.factors || o->rope.factor_count != o->rotary_dim / 2))
    return attn_fail(ATTN_INVALID_ARGUMENT, "%s: %lld rotary factors, expected %lld", mixer,
                     (long long)o->rope.factor_count, (long long)o->rotary_dim / 2);
  if (!(o->rope.base > 1))
    return attn_fail(ATTN_INVALID_ARGUMENT, "%s: rope_theta %g is not above 1", mixer,
                     o->rope.base);
  return ATTN_OK;
}

static bool layout_adds_up(const attn_layout *layout) {
  if (layout->batch < 1 || layout->length < 0 || layout->rows < 1 || layout->position < 0)
    return false;
  if (!layout->offsets)
    return layout->length > 0 && layout->rows / layout->length == layout->batch &&
           layout->rows % layout->length == 0;
  if (layout->offsets[0] != 0 || layout->offsets[layout->batch] != layout->rows) return false;
  for (int64_t b = 0; b < layout->batch; ++b) {
    int64_t length = (int64_t)layout->offsets[b + 1] - layout->offsets[b];
    if (length < 0 || length > layout->length) return false;
  }
  return true;
}

static attn_var *apply_step(attn_graph *graph, const attn_mixer *mixer, const attn_mixer_call *call,
                            attn_var *x) {
  const attn_layout *layout = &call->layout;
  if (layout->length != 1 || layout->offsets || graph->recording || call->state)
    return attn_graph_fail(graph, ATTN_INVALID_ARGUMENT,
                           "%s: states of several sequences take one token each, without gradients",
                           mixer->info.name);
  return mixer->apply(graph, call, x);
}

/* Whether x, or what keys are made of, has the rows of its layout. */
static bool rows_fit(attn_graph *graph, const attn_mixer_call *call, const char *name,
                     const char *what, const attn_layout *layout, const attn_var *x) {
  char text[128];
  if (x->value.rank != 2 || x->value.shape[0] != layout->rows ||
      x->value.shape[1] != call->options->hidden)
    attn_graph_fail(graph, ATTN_INVALID_SHAPE, "%s: %s is %s, expected [%lld, %lld]", name, what,
                    attn_shape_text(&x->value, text), (long long)layout->rows,
                    (long long)call->options->hidden);
  else if (!layout_adds_up(layout))
    attn_graph_fail(graph, ATTN_INVALID_SHAPE,
                    "%s: %lld sequences of %s%lld tokens do not make the %lld rows of %s", name,
                    (long long)layout->batch, layout->offsets ? "at most " : "",
                    (long long)layout->length, (long long)layout->rows, what);
  else
    return true;
  return false;
}

/* An average over no keys is nothing. */
static bool no_query_is_alone(attn_graph *graph, const attn_mixer_call *call, const char *name) {
  for (int64_t b = 0; b < call->layout.batch; ++b)
    if (attn_layout_length(&call->context_layout, b) == 0 &&
        attn_layout_length(&call->layout, b) > 0) {
      attn_graph_fail(graph, ATTN_INVALID_ARGUMENT, "%s: sequence %lld of the context is empty",
                      name, (long long)b);
      return false;
    }
  return true;
}

static bool context_fits(attn_graph *graph, const attn_mixer *mixer, const attn_mixer_call *call) {
  const char *name = mixer->info.name;
  const attn_layout *layout = &call->context_layout;
  if (!(mixer->info.abilities & ATTN_ABILITY_CROSS))
    attn_graph_fail(graph, ATTN_UNSUPPORTED, "%s: it has no cross-attention", name);
  else if (call->state || call->states)
    attn_graph_fail(graph, ATTN_UNSUPPORTED,
                    "%s: cross-attention reads a whole context: it has no state", name);
  else if (call->options->window)
    attn_graph_fail(graph, ATTN_UNSUPPORTED,
                    "%s: window is %lld, but a context's tokens are at no distance from x", name,
                    (long long)call->options->window);
  else if (layout->batch != call->layout.batch)
    attn_graph_fail(graph, ATTN_INVALID_SHAPE, "%s: x has %lld sequences, the context %lld", name,
                    (long long)call->layout.batch, (long long)layout->batch);
  else if (rows_fit(graph, call, name, "the context", layout, call->context))
    return no_query_is_alone(graph, call, name);
  return false;
}

attn_var *attn_mixer_apply(attn_graph *graph, const attn_mixer *mixer, const attn_mixer_call *call,
                           attn_var *x) {
  if (!x) return NULL;
  const attn_layout *layout = &call->layout;
  const char *name = mixer->info.name;
  if (!rows_fit(graph, call, name, "x", layout, x)) return NULL;
  if (call->context && !context_fits(graph, mixer, call)) return NULL;
  if (call->heads && (!mixer->heads || call->state || call->states))
    return attn_graph_fail(graph, ATTN_UNSUPPORTED,
                           "%s: what its heads give is not offered by itself%s", name,
                           mixer->heads ? " with a state" : "");
  if (call->states) return apply_step(graph, mixer, call, x);
  if (!call->state) return mixer->apply(graph, call, x);
  if (call->options->bidirectional)
    return attn_graph_fail(graph, ATTN_UNSUPPORTED,
                           "%s: bidirectional attention reads whole sequences: it has no state",
                           name);
  if (layout->batch != 1 || layout->offsets || graph->recording)
    return attn_graph_fail(graph, ATTN_INVALID_ARGUMENT,
                           "%s: a state continues one sequence, without gradients", name);
  if (layout->position != attn_state_position(call->state))
    return attn_graph_fail(
        graph, ATTN_INVALID_ARGUMENT, "%s: the tokens begin at %lld, the state ends at %lld", name,
        (long long)layout->position, (long long)attn_state_position(call->state));
  return mixer->apply(graph, call, x);
}

attn_var *attn_mixer_project(attn_graph *graph, const attn_mixer_call *call, attn_var *x, int i) {
  return call->heads ? x : attn_op_linear(graph, x, call->parameters[i]);
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

attn_var *attn_mixer_decays(attn_graph *graph, const attn_mixer_options *options,
                            double (*log_decay)(const attn_mixer_options *options, int64_t head)) {
  double *numbers = attn_arena_alloc(graph->arena, (size_t)options->heads * sizeof *numbers);
  if (!numbers) return attn_graph_error(graph, ATTN_OUT_OF_MEMORY);
  for (int64_t h = 0; h < options->heads; ++h) numbers[h] = log_decay(options, h);
  attn_tensor values = attn_pass_numbers(graph, graph->wide, options->heads, numbers);
  return values.data ? attn_graph_input(graph, &values) : NULL;
}

/* Writes one row to where attn_state_next_row says when the replay runs: to rows of `width`
 * elements from `first` on. */
static attn_status place_row(attn_graph *g, const attn_mixer_call *call, int part,
                             const attn_tensor *first, int64_t width, int64_t column,
                             const attn_tensor *row) {
  const int64_t *next = attn_pass_live(g, attn_state_next_row(call->state, part), sizeof *next);
  if (!next) return g->status;
  size_t element = attn_dtype_size(first->dtype);
  return attn_gpu_check(
      g->gpu, g->gpu->cuda->place(g->device.index, (char *)first->data + (size_t)column * element,
                                  (size_t)width * element, next, row->data,
                                  (size_t)row->shape[1] * element, attn_gpu_stream(g->gpu)));
}

attn_status attn_mixer_append(attn_graph *g, const attn_mixer_call *call, int part, int64_t column,
                              const attn_tensor *rows) {
  if (!g->replay) return attn_state_append(call->state, part, column, rows);
  attn_tensor pages = attn_state_pages(call->state, part);
  return place_row(g, call, part, &pages, pages.shape[2], column, rows);
}

attn_status attn_mixer_put(attn_graph *g, const attn_mixer_call *call, int part, int64_t row,
                           int64_t column, const attn_tensor *rows) {
  attn_tensor fixed = attn_state_fixed(call->state, part), place;
  if (g->replay) return place_row(g, call, part, &fixed, fixed.shape[1], column, rows);
  ATTN_TRY(attn_tensor_slice(&fixed, 0, row, rows->shape[0], &place));
  ATTN_TRY(attn_tensor_slice(&place, 1, column, rows->shape[1], &place));
  attn_add_tensor(g, &place, rows, 1, false);
  return g->status;
}

const int32_t *attn_mixer_block_length(attn_graph *g, const attn_mixer_call *call, int part,
                                       int64_t row) {
  if (g->replay) return attn_state_next_block_length(call->state, part);
  int32_t *length = attn_arena_alloc(g->arena, sizeof *length);
  if (!length) return attn_graph_error(g, ATTN_OUT_OF_MEMORY);
  *length = (int32_t)row + 1;
  return length;
}

const int32_t *attn_mixer_key_length(attn_graph *g, const attn_mixer_call *call) {
  if (g->replay) return attn_state_next_length(call->state);
  int32_t *length = attn_arena_alloc(g->arena, sizeof *length);
  if (!length) return attn_graph_error(g, ATTN_OUT_OF_MEMORY);
  *length = (int32_t)(attn_state_position(call->state) + call->layout.rows);
  return length;
}

/* Copies y to place r of `axis` of `all`; false after an error. */
static bool put_row(attn_graph *graph, const attn_tensor *all, int axis, int64_t r, attn_var *y) {
  attn_tensor target;
  if (!y || !all->data) return false;
  attn_status status = attn_tensor_slice(all, axis, r, 1, &target);
  if (status == ATTN_OK)
    attn_add_tensor(graph, &target, &y->value, 1, false);
  else
    attn_graph_error(graph, status);
  return status == ATTN_OK;
}

/* The call of row r alone: of sequence r, or of the state's r-th token to come. */
static attn_mixer_call call_of(const attn_mixer_call *call, int64_t r) {
  attn_mixer_call one = *call;
  one.states = NULL;
  if (call->states) one.state = call->states[r];
  one.layout = attn_layout_equal(1, 1);
  one.layout.position = attn_state_position(one.state) + (call->states ? 0 : r);
  if (call->states) one.layout.position_place = attn_state_position_place(one.state);
  return one;
}

bool attn_mixer_few_rows(const attn_mixer_call *call) {
  int64_t rows = call->layout.rows;
  return call->state && rows > 1 && rows <= ATTN_FEW_ROWS;
}

static bool all_there(int count, attn_var *const *inputs) {
  for (int i = 0; i < count; ++i)
    if (!inputs[i]) return false;
  return true;
}

/* The part for each row by itself. */
static attn_var *each_row(attn_graph *graph, const attn_mixer_call *call, attn_mixer_part *part,
                          int which, int count, attn_var *const *inputs) {
  attn_tensor all = {0};
  int64_t rows = call->layout.rows;
  for (int64_t r = 0; r < rows; ++r) {
    attn_mixer_call one = call_of(call, r);
    attn_var *row[ATTN_MIXER_INPUTS];
    for (int i = 0; i < count; ++i) row[i] = attn_view_slice(graph, inputs[i], 0, r, 1);
    attn_var *y = attn_join_heads(graph, &one.layout, part(graph, &one, row, which));
    if (!y) return NULL;
    if (r == 0)
      all = attn_graph_tensor(graph, y->value.dtype, 2, (int64_t[]){rows, y->value.shape[1]});
    if (!put_row(graph, &all, 0, r, y)) return NULL;
  }
  return attn_graph_input(graph, &all);
}

attn_var *attn_mixer_each(attn_graph *graph, const attn_mixer_call *call, attn_mixer_part *part,
                          int which, int count, attn_var *const *inputs) {
  if (!all_there(count, inputs)) return NULL;
  if (call->states) return each_row(graph, call, part, which, count, inputs);
  return attn_join_heads(graph, &call->layout, part(graph, call, inputs, which));
}

attn_var *attn_mixer_each_row(attn_graph *graph, const attn_mixer_call *call, attn_mixer_part *part,
                              int which, int count, attn_var *const *inputs) {
  if (!attn_mixer_few_rows(call)) return attn_mixer_each(graph, call, part, which, count, inputs);
  return all_there(count, inputs) ? each_row(graph, call, part, which, count, inputs) : NULL;
}

attn_var *attn_mixer_key_rows(const attn_mixer_call *call, attn_var *x) {
  return call->context ? call->context : x;
}

attn_mixer_call attn_mixer_key_call(const attn_mixer_call *call) {
  attn_mixer_call keys = *call;
  if (call->context) keys.layout = call->context_layout;
  return keys;
}

/* Where the sequences of a layout begin, be they packed or not; NULL after an error. */
static const int32_t *offsets_of(attn_graph *graph, const attn_layout *layout) {
  if (layout->offsets) return layout->offsets;
  int32_t *offsets = attn_arena_alloc(graph->arena, (size_t)(layout->batch + 1) * sizeof *offsets);
  if (!offsets) return attn_graph_error(graph, ATTN_OUT_OF_MEMORY);
  for (int64_t b = 0; b <= layout->batch; ++b) offsets[b] = (int32_t)(b * layout->length);
  return offsets;
}

attn_var *attn_mixer_softmax_across(attn_graph *graph, const attn_layout *layout,
                                    const attn_layout *key_layout,
                                    const attn_softmax_problem *options, attn_var *q, attn_var *k,
                                    attn_var *v) {
  attn_softmax_problem problem = *options;
  attn_softmax_args args = {0};
  problem.ragged = layout->offsets || key_layout->offsets;
  if (!problem.ragged)
    return attn_op_softmax(graph, &problem, &args, attn_as_sequences(graph, layout, q),
                           attn_as_sequences(graph, key_layout, k),
                           attn_as_sequences(graph, key_layout, v));
  problem.batch = layout->batch;
  problem.query_length = layout->length;
  problem.key_length = key_layout->length;
  args.query_offsets = offsets_of(graph, layout);
  args.key_offsets = offsets_of(graph, key_layout);
  if (!args.query_offsets || !args.key_offsets) return NULL;
  return attn_op_softmax(graph, &problem, &args, q, k, v);
}

attn_var *attn_mixer_softmax_within(attn_graph *graph, const attn_layout *layout,
                                    const attn_softmax_problem *options, attn_var *q, attn_var *k,
                                    attn_var *v) {
  return attn_mixer_softmax_across(graph, layout, layout, options, q, k, v);
}

attn_var *attn_mixer_softmax_rows(attn_graph *graph, const attn_softmax_problem *problem,
                                  const attn_softmax_args *args, attn_var *q, attn_var *k,
                                  attn_var *v, int64_t keys) {
  if (!q || !k || !v) return NULL;
  int64_t rows = q->value.shape[1];
  int64_t shape[4] = {1, rows, q->value.shape[2], v->value.shape[3]};
  attn_tensor all = attn_graph_tensor(graph, q->value.dtype, 4, shape);
  int32_t *length = attn_arena_alloc(graph->arena, sizeof *length);
  if (!all.data) return NULL;
  if (!length) return attn_graph_error(graph, ATTN_OUT_OF_MEMORY);
  attn_softmax_args one = *args;
  one.key_lengths = length;
  for (int64_t r = 0; r < rows; ++r) {
    *length = (int32_t)(keys + r);
    attn_var *y = attn_op_softmax(graph, problem, &one, attn_view_slice(graph, q, 1, r, 1), k, v);
    if (!put_row(graph, &all, 1, r, y)) return NULL;
  }
  return attn_graph_input(graph, &all);
}

/* Row by row: each with its own state, or all with one. */
static attn_var *recurrent_rows(attn_graph *graph, const attn_mixer_call *call, int part,
                                const attn_recurrent_problem *options, attn_var *q, attn_var *k,
                                attn_var *v, attn_var *decay, attn_var *beta) {
  attn_tensor all = {0};
  int64_t rows = call->layout.rows;
  for (int64_t r = 0; r < rows; ++r) {
    attn_mixer_call one = call_of(call, r);
    bool by_row = options->decay != ATTN_DECAY_HEAD && decay;
    attn_var *own = by_row ? attn_view_slice(graph, decay, 0, r, 1) : decay;
    attn_var *y =
        attn_mixer_recurrent(graph, &one, part, options, attn_view_slice(graph, q, 0, r, 1),
                             attn_view_slice(graph, k, 0, r, 1), attn_view_slice(graph, v, 0, r, 1),
                             own, beta ? attn_view_slice(graph, beta, 0, r, 1) : NULL);
    if (!y) return NULL;
    const int64_t *one_shape = y->value.shape;
    if (r == 0)
      all = attn_graph_tensor(graph, y->value.dtype, 4,
                              (int64_t[]){rows, 1, one_shape[2], one_shape[3]});
    if (!put_row(graph, &all, 0, r, y)) return NULL;
  }
  return attn_graph_input(graph, &all);
}

/* A fixed part as the engine's batch of one. */
static attn_tensor as_batch(attn_graph *graph, const attn_tensor *fixed) {
  attn_tensor batch = {0};
  int64_t shape[ATTN_MAX_RANK] = {1};
  for (int i = 0; i < fixed->rank; ++i) shape[i + 1] = fixed->shape[i];
  attn_status status = attn_tensor_reshape(fixed, fixed->rank + 1, shape, &batch);
  if (status != ATTN_OK) attn_graph_error(graph, status);
  return batch;
}

static void bind_state(attn_graph *graph, const attn_mixer_call *call, int part, bool normalise,
                       attn_recurrent_args *args) {
  attn_tensor matrix = attn_state_fixed(call->state, part);
  args->initial_state = args->final_state = as_batch(graph, &matrix);
  if (!normalise) return;
  attn_tensor sum = attn_state_fixed(call->state, part + 1);
  args->initial_normaliser = args->final_normaliser = as_batch(graph, &sum);
}

attn_var *attn_mixer_recurrent(attn_graph *graph, const attn_mixer_call *call, int part,
                               const attn_recurrent_problem *options, attn_var *q, attn_var *k,
                               attn_var *v, attn_var *decay, attn_var *beta) {
  const attn_layout *layout = &call->layout;
  attn_recurrent_problem problem = *options;
  attn_recurrent_args args = {0};
  if (!q || !k || !v) return NULL;
  if (call->states || attn_mixer_few_rows(call))
    return recurrent_rows(graph, call, part, options, q, k, v, decay, beta);
  problem.ragged = layout->offsets != NULL;
  if (problem.ragged) {
    problem.batch = layout->batch;
    problem.length = layout->length;
    args.offsets = layout->offsets;
  }
  if (call->state) bind_state(graph, call, part, problem.normalise, &args);
  if (problem.decay != ATTN_DECAY_HEAD) decay = attn_as_sequences(graph, layout, decay);
  return attn_op_recurrent(graph, &problem, &args, attn_as_sequences(graph, layout, q),
                           attn_as_sequences(graph, layout, k), attn_as_sequences(graph, layout, v),
                           decay, attn_as_sequences(graph, layout, beta));
}

attn_var *attn_mixer_linear_attention(attn_graph *graph, const attn_mixer_call *call, int part,
                                      const attn_recurrent_problem *problem, attn_var *q,
                                      attn_var *k, attn_var *v) {
  if (!call->context && !call->options->bidirectional)
    return attn_mixer_recurrent(graph, call, part, problem, q, k, v, NULL, NULL);
  attn_linear_attention options = {.normalise = problem->normalise, .epsilon = problem->epsilon};
  attn_mixer_call keys = attn_mixer_key_call(call);
  return attn_op_linear_attention(graph, &options, &call->layout, &keys.layout, q, k, v);
}
