/* The encoder of BERT (arXiv 1810.04805): norms come after the sums.
 *
 *   x = norm(E[token] + P[position] + T[type])
 *   x = norm(x + attention(x));  x = norm(x + W2 f(W1 x + b1) + b2)     for each layer
 *
 * Attention sees the whole text, in both directions. For inference: nothing is recorded. */
#include "graph/operations.h"
#include "models/model.h"

static attn_var *norm(attn_graph *g, const attn_model *model, attn_parameter *const *p,
                      attn_var *x) {
  return attn_layer_layer_norm(g, x, attn_graph_parameter(g, p[0]), attn_graph_parameter(g, p[1]),
                               model->config.norm_epsilon);
}

/* The place of each row in its text; NULL (an error) where the table of positions ends before. */
static int32_t *make_positions(attn_graph *g, const attn_model *model, const attn_layout *layout) {
  int64_t first = model->config.first_position, most = model->config.positions - first;
  if (layout->length > most)
    return attn_graph_fail(g, ATTN_INVALID_ARGUMENT,
                           "a text has %lld tokens, the model has positions for %lld",
                           (long long)layout->length, (long long)most);
  int32_t *positions = attn_arena_alloc(g->arena, (size_t)layout->rows * sizeof *positions);
  if (!positions) return attn_graph_error(g, ATTN_OUT_OF_MEMORY);
  for (int64_t b = 0; b < layout->batch; ++b)
    for (int64_t i = 0; i < attn_layout_length(layout, b); ++i)
      positions[attn_layout_first(layout, b) + i] = (int32_t)(first + i);
  return positions;
}

static attn_var *embed(attn_graph *g, const attn_model *model, const attn_layout *layout,
                       const int32_t *tokens, const int32_t *types) {
  int64_t rows = layout->rows;
  const int32_t *positions = make_positions(g, model, layout);
  if (!positions) return NULL;
  attn_var *x = attn_op_add(g, attn_layer_embedding(g, model->embedding, tokens, rows, 1),
                            attn_layer_embedding(g, model->positions, positions, rows, 1));
  if (!model->token_types) return norm(g, model, model->embedding_norm, x);
  if (!types) types = attn_arena_alloc_zero(g->arena, (size_t)rows * sizeof *types);
  if (!types) return attn_graph_error(g, ATTN_OUT_OF_MEMORY);
  x = attn_op_add(g, x, attn_layer_embedding(g, model->token_types, types, rows, 1));
  return norm(g, model, model->embedding_norm, x);
}

static attn_var *block(attn_graph *g, const attn_model *model, int64_t l, const attn_layout *layout,
                       attn_var *x) {
  const attn_layer_config *layer = &model->config.layers[l];
  attn_layer_parameters *p = &model->layers[l];
  attn_mixer_call call = {.options = &layer->options, .parameters = p->mixer, .layout = *layout};
  x = attn_op_add(g, x, attn_mixer_apply(g, layer->mixer, &call, x));
  x = norm(g, model, p->token_norm, x);
  attn_var *fed =
      attn_layer_mlp(g, model->config.activation, x, p->feed_forward[0], p->feed_forward_bias[0],
                     p->feed_forward[1], p->feed_forward_bias[1]);
  return norm(g, model, p->channel_norm, attn_op_add(g, x, fed));
}

attn_var *attn_encoder_hidden(attn_graph *graph, const attn_model *model, const attn_layout *layout,
                              const int32_t *tokens, const int32_t *types) {
  attn_var *x = embed(graph, model, layout, tokens, types);
  if (!x) return NULL;
  attn_tensor kept[2];
  for (int i = 0; i < 2; ++i) kept[i] = attn_graph_tensor_like(graph, x->value.dtype, &x->value);
  attn_graph_mark mark = attn_graph_get_mark(graph);
  for (int64_t l = 0; l < model->config.layer_count && x; ++l)
    x = attn_keep_result(graph, mark, &kept[l % 2], block(graph, model, l, layout, x));
  return x;
}
