/* The networks of the Reactive Transformer (arXiv 2510.03561); attn/reactive.h has the formulas.
 *
 * Encoder and decoder take their own tokens' attention from the softmax mixer. Attention between
 * two sets, tokens and slots, is here: the set on one side has no order, so only the other side is
 * turned by its positions. Rows of the memory are [dialogues * slots, hidden], and stay wide. */
#include "models/reactive.h"

enum { Q, K, V, O };

static attn_var *norm(attn_graph *g, const attn_reactive *m, attn_parameter *weight, attn_var *x) {
  return attn_layer_rms_norm(g, x, attn_graph_parameter(g, weight), m->epsilon);
}

attn_var **attn_reactive_layer_vars(attn_graph *graph, const attn_reactive *m) {
  attn_var **vars =
      attn_arena_alloc_zero(graph->arena, (size_t)m->layer_count * sizeof(attn_var *));
  return vars ? vars : attn_graph_error(graph, ATTN_OUT_OF_MEMORY);
}

/* Attention between two sets --------------------------------------------------------------------
 */

static const int32_t *offsets_of(attn_graph *g, const attn_layout *layout) {
  if (layout->offsets) return layout->offsets;
  int32_t *offsets = attn_arena_alloc(g->arena, (size_t)(layout->batch + 1) * sizeof *offsets);
  if (!offsets) return attn_graph_error(g, ATTN_OUT_OF_MEMORY);
  for (int64_t b = 0; b <= layout->batch; ++b) offsets[b] = (int32_t)(b * layout->length);
  return offsets;
}

/* Each sequence of q sees all of its own keys: q [rows, heads, dim]; the result [rows, heads dim].
 */
static attn_var *attend(attn_graph *g, const attn_layout *queries, const attn_layout *keys,
                        attn_var *q, attn_memory_keys kv) {
  attn_softmax_problem problem = ATTN_SOFTMAX_PROBLEM_INIT;
  attn_softmax_args args = {0};
  if (!q || !kv.k || !kv.v) return NULL;
  int64_t joined[2] = {queries->rows, q->value.shape[1] * kv.v->value.shape[2]};
  problem.ragged = queries->offsets || keys->offsets;
  if (problem.ragged) {
    problem.batch = queries->batch;
    problem.query_length = queries->length;
    problem.key_length = keys->length;
    args.query_offsets = offsets_of(g, queries);
    args.key_offsets = offsets_of(g, keys);
    if (!args.query_offsets || !args.key_offsets) return NULL;
  } else {
    q = attn_as_sequences(g, queries, q);
    kv.k = attn_as_sequences(g, keys, kv.k);
    kv.v = attn_as_sequences(g, keys, kv.v);
  }
  return attn_view_reshape(g, attn_op_softmax(g, &problem, &args, q, kv.k, kv.v), 2, joined);
}

static attn_var *rotate(attn_graph *g, const attn_reactive *m, const attn_layout *layout,
                        attn_var *x) {
  const attn_mixer_options *o = &m->cross;
  return o->rotary_dim > 0 ? attn_layer_rotary(g, x, layout, o->rotary_dim, &o->rope) : x;
}

static attn_var *queries_of(attn_graph *g, const attn_reactive *m, attn_parameter *const *p,
                            attn_var *x) {
  return attn_split_heads(g, attn_op_linear(g, x, p[Q]), m->cross.heads);
}

static attn_memory_keys keys_of(attn_graph *g, const attn_reactive *m, attn_parameter *const *p,
                                attn_var *x) {
  return (attn_memory_keys){.k = attn_split_heads(g, attn_op_linear(g, x, p[K]), m->cross.kv_heads),
                            .v =
                                attn_split_heads(g, attn_op_linear(g, x, p[V]), m->cross.kv_heads)};
}

/* The memory ------------------------------------------------------------------------------------
 */

/* [rows, 1], wide: the mean of x over its channels, or what is learnt in its place. */
static attn_var *status_of(attn_graph *g, const attn_reactive *m, const attn_gate_parameters *p,
                           attn_var *x) {
  if (p->status[0])
    return attn_op_add_bias(g, attn_op_linear_wide(g, x, p->status[0]),
                            attn_graph_parameter(g, p->status[1]));
  int64_t shape[3] = {x ? x->value.shape[0] : 0, 1, m->hidden};
  attn_tensor share = attn_graph_tensor(g, g->wide, 3, (int64_t[]){1, 1, m->hidden});
  if (!share.data) return NULL;
  attn_status status = attn_tensor_fill(&share, 1 / (double)m->hidden);
  if (status != ATTN_OK) return attn_graph_error(g, status);
  return attn_op_head_scores(g, attn_view_reshape(g, x, 3, shape), attn_graph_input(g, &share));
}

/* g (.) x for a gate that depends on what it lets through. */
static attn_var *open_by_status(attn_graph *g, const attn_reactive *m,
                                const attn_gate_parameters *p, int64_t batch, double sharpness,
                                attn_var *sum, attn_var *x) {
  attn_var *z = status_of(g, m, p, sum);
  int64_t by_dialogue[2] = {batch, m->slots}, by_slot[2] = {batch * m->slots, 1};
  z = attn_view_reshape(g, z, 2, by_dialogue);
  if (m->gate == ATTN_GATE_LINEAR)
    z = attn_op_add_bias(g, attn_op_linear_wide(g, z, p->weight), attn_graph_parameter(g, p->bias));
  else
    z = attn_op_scale_columns(g, z, attn_graph_parameter(g, p->weight), 1);
  if (sharpness != 1) z = attn_op_scale(g, z, sharpness);
  attn_var *open = attn_op_activate_wide(g, ATTN_SIGMOID, z);
  return attn_op_scale_rows(g, x, attn_view_reshape(g, open, 2, by_slot));
}

/* g (.) x for a gate that a slot has once and for all. */
static attn_var *open_by_slot(attn_graph *g, const attn_reactive *m, const attn_gate_parameters *p,
                              int64_t batch, double sharpness, attn_var *x) {
  attn_var *z = attn_graph_parameter(g, p->weight);
  if (sharpness != 1) z = attn_op_scale(g, z, sharpness);
  attn_var *open = attn_op_activate_wide(g, ATTN_SIGMOID, z);
  int64_t wide[2] = {batch, m->slots * m->hidden}, rows[2] = {batch * m->slots, m->hidden};
  x = attn_op_scale_columns(g, attn_view_reshape(g, x, 2, wide), open, m->hidden);
  return attn_view_reshape(g, x, 2, rows);
}

/* With sigmoid old + g (new - old). With tanh (1 - tanh z) old + (1 + tanh z) new, and since 1 +
 * tanh z = 2 sigmoid(2 z), it is twice that of 2 z. */
static attn_var *residual_gate(attn_graph *g, const attn_reactive *m, const attn_gate_parameters *p,
                               int64_t batch, attn_var *old, attn_var *fresh) {
  if (m->gate == ATTN_GATE_NONE) return attn_op_add(g, old, fresh);
  double sharpness = m->tanh_gate ? 2 : 1;
  attn_var *change = attn_op_add(g, fresh, attn_op_scale(g, old, -1));
  change = m->gate == ATTN_GATE_STATIC
               ? open_by_slot(g, m, p, batch, sharpness, change)
               : open_by_status(g, m, p, batch, sharpness, attn_op_add(g, old, fresh), change);
  attn_var *y = attn_op_add(g, old, change);
  return m->tanh_gate ? attn_op_scale(g, y, 2) : y;
}

static attn_var *mean_of_layers(attn_graph *g, const attn_reactive *m, attn_var *const *stm) {
  attn_var *sum = stm[0];
  for (int64_t l = 1; l < m->layer_count; ++l) sum = attn_op_add(g, sum, stm[l]);
  return attn_op_scale(g, sum, 1 / (double)m->layer_count);
}

/* Slots of a layer among each other, or with what all layers have in the same slots. */
static attn_var *among_slots(attn_graph *g, const attn_reactive *m, int64_t l,
                             const attn_layout *slots, attn_var *stm, attn_var *mean) {
  const attn_reactive_layer *p = &m->layers[l];
  attn_parameter *const *w = p->among.attention;
  attn_var *own = norm(g, m, p->among.norm, stm), *seen = own;
  if (mean) seen = norm(g, m, p->among.other_norm, mean);
  if (m->memory == ATTN_MEMORY_GATED_SELF || m->memory == ATTN_MEMORY_GATED_INTERLAYER)
    seen = residual_gate(g, m, &p->among.inner, slots->batch, attn_op_cast(g, own, g->wide),
                         attn_op_cast(g, seen, g->wide));
  attn_var *mixed = attend(g, slots, slots, queries_of(g, m, w, own), keys_of(g, m, w, seen));
  return residual_gate(g, m, &p->among.gate, slots->batch, stm,
                       attn_op_linear_wide(g, mixed, w[O]));
}

static attn_var *write(attn_graph *g, const attn_reactive *m, int64_t l, const attn_layout *slots,
                       attn_var *stm, const attn_layout *layout, attn_var *encoded) {
  const attn_reactive_layer *p = &m->layers[l];
  attn_parameter *const *w = p->write.attention;
  attn_var *q = queries_of(g, m, w, norm(g, m, p->write.norm, stm));
  attn_memory_keys kv = keys_of(g, m, w, norm(g, m, p->write.encoded_norm, encoded));
  kv.k = rotate(g, m, layout, kv.k);
  attn_var *fresh = attn_op_linear_wide(g, attend(g, slots, layout, q, kv), w[O]);
  return residual_gate(g, m, &p->write.gate, slots->batch, stm, fresh);
}

void attn_reactive_update(attn_graph *graph, const attn_reactive *m, int64_t batch,
                          attn_var *const *stm, const attn_layout *layout, attn_var *const *encoded,
                          attn_var **updated) {
  attn_layout slots = attn_layout_equal(batch, m->slots);
  bool mixes = m->memory != ATTN_MEMORY_SIMPLE, alone = m->memory == ATTN_MEMORY_SELF;
  attn_var *mean = mixes && !alone ? mean_of_layers(graph, m, stm) : NULL;
  for (int64_t l = 0; l < m->layer_count; ++l) {
    attn_var *x = mixes ? among_slots(graph, m, l, &slots, stm[l], mean) : stm[l];
    updated[l] = write(graph, m, l, &slots, x, layout, encoded[l]);
  }
}

attn_memory_keys attn_reactive_memory_keys(attn_graph *graph, const attn_reactive *m, int64_t l,
                                           attn_var *stm) {
  const attn_reactive_layer *p = &m->layers[l];
  return keys_of(graph, m, p->decoder.cross, norm(graph, m, p->decoder.memory_norm, stm));
}

/* Encoder and decoder ---------------------------------------------------------------------------
 */

static attn_var *self_attention(attn_graph *g, const attn_reactive *m,
                                const attn_mixer_options *options, attn_parameter *const *p,
                                const attn_layout *layout, attn_state *state, attn_var *x) {
  attn_mixer_call call = {.options = options,
                          .parameters = (attn_parameter **)(uintptr_t)p,
                          .layout = *layout,
                          .state = state};
  return attn_mixer_apply(g, m->softmax, &call, x);
}

static attn_var *feed_forward(attn_graph *g, attn_parameter *const *p, attn_var *x) {
  return attn_layer_gated_feed_forward(g, ATTN_SILU, x, p[0], p[1], p[2]);
}

attn_var *attn_reactive_encode(attn_graph *graph, const attn_reactive *m, const attn_layout *layout,
                               const int32_t *tokens, attn_var **layers) {
  attn_var *x = attn_layer_embedding(graph, m->embedding, tokens, layout->rows, 1);
  for (int64_t l = 0; l < m->layer_count; ++l) {
    const attn_reactive_layer *p = &m->layers[l];
    attn_var *in = norm(graph, m, p->encoder.norm, x);
    x = attn_op_add(graph, x,
                    self_attention(graph, m, &m->encoder_self, p->encoder.self, layout, NULL, in));
    in = norm(graph, m, p->encoder.feed_norm, x);
    x = layers[l] = attn_op_add(graph, x, feed_forward(graph, p->encoder.feed, in));
  }
  return x;
}

static attn_var *decoder_layer(attn_graph *g, const attn_reactive *m, int64_t l,
                               const attn_layout *layout, const attn_layout *memory,
                               attn_memory_keys kv, attn_state *state, attn_var *x) {
  const attn_reactive_layer *p = &m->layers[l];
  attn_parameter *const *w = p->decoder.cross;
  attn_var *in = norm(g, m, p->decoder.norm, x);
  x = attn_op_add(g, x, self_attention(g, m, &m->self, p->decoder.self, layout, state, in));
  if (x && state) attn_state_advance(state, layout->rows);
  attn_var *q = queries_of(g, m, w, norm(g, m, p->decoder.cross_norm, x));
  attn_var *read = attend(g, layout, memory, rotate(g, m, layout, q), kv);
  x = attn_op_add(g, x, attn_op_linear(g, read, w[O]));
  in = norm(g, m, p->decoder.feed_norm, x);
  return attn_op_add(g, x, feed_forward(g, p->decoder.feed, in));
}

attn_var *attn_reactive_decode(attn_graph *graph, const attn_reactive *m, const attn_layout *layout,
                               const int32_t *tokens, const attn_layout *memory,
                               const attn_memory_keys *keys, attn_state *const *states) {
  attn_var *x = attn_layer_embedding(graph, m->embedding, tokens, layout->rows, 1);
  attn_layout at = *layout;
  if (states) at.position = attn_state_position(states[0]);
  for (int64_t l = 0; l < m->layer_count; ++l)
    x = decoder_layer(graph, m, l, &at, memory, keys[l], states ? states[l] : NULL, x);
  if (!m->head_norm) return attn_op_cast(graph, x, graph->compute);
  return attn_layer_layer_norm(graph, x, attn_graph_parameter(graph, m->final_norm[0]),
                               attn_graph_parameter(graph, m->final_norm[1]), m->epsilon);
}

attn_var *attn_reactive_decode_with(attn_graph *graph, const attn_reactive *m,
                                    const attn_layout *layout, const int32_t *tokens,
                                    const attn_layout *memory, attn_var *const *stm) {
  attn_memory_keys *keys = attn_arena_alloc(graph->arena, (size_t)m->layer_count * sizeof *keys);
  if (!keys) return attn_graph_error(graph, ATTN_OUT_OF_MEMORY);
  for (int64_t l = 0; l < m->layer_count; ++l)
    keys[l] = attn_reactive_memory_keys(graph, m, l, stm[l]);
  return attn_reactive_decode(graph, m, layout, tokens, memory, keys, NULL);
}

attn_var *attn_reactive_logits(attn_graph *graph, const attn_reactive *m, attn_var *hidden) {
  return attn_op_add_bias(graph, attn_op_linear_wide(graph, hidden, m->head[0]),
                          attn_graph_parameter(graph, m->head[1]));
}
