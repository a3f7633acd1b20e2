#include "graph/operations.h"
#include "graph/passes.h"
#include "models/model.h"

static attn_var *norm(attn_graph *g, const attn_model_config *config, attn_parameter *const *p,
                      attn_var *x) {
  attn_var *weight = p[0] ? attn_graph_parameter(g, p[0]) : NULL;
  attn_var *bias = p[1] ? attn_graph_parameter(g, p[1]) : NULL;
  if (config->norm == ATTN_NORM_LAYER)
    return attn_layer_layer_norm(g, x, weight, bias, config->norm_epsilon);
  return attn_layer_rms_norm(g, x, weight, config->norm_epsilon);
}

static attn_var *dense(attn_graph *g, attn_feed_forward kind, attn_parameter *const *p,
                       attn_var *x) {
  switch (kind) {
  case ATTN_SWIGLU: return attn_layer_gated_feed_forward(g, ATTN_SILU, x, p[0], p[1], p[2]);
  case ATTN_SGLU: return attn_layer_gated_feed_forward(g, ATTN_IDENTITY, x, p[0], p[1], p[2]);
  case ATTN_GEGLU: return attn_layer_gated_feed_forward(g, ATTN_GELU_TANH, x, p[0], p[1], p[2]);
  case ATTN_GELU_MLP: return attn_layer_mlp(g, ATTN_GELU, x, p[0], NULL, p[1], NULL);
  }
  return NULL;
}

static attn_activation gate_of(attn_feed_forward kind) {
  return kind == ATTN_SGLU ? ATTN_IDENTITY : kind == ATTN_GEGLU ? ATTN_GELU_TANH : ATTN_SILU;
}

static attn_var *mixture(attn_graph *g, attn_feed_forward kind, const attn_experts_config *config,
                         const attn_layer_parameters *p, attn_var *x) {
  attn_var *logits = attn_op_linear_wide(g, x, p->router);
  attn_var *y =
      attn_layer_experts(g, gate_of(kind), &config->routing, x, logits, p->router_bias, p->experts);
  if (!config->shared_width) return y;
  attn_var *shared = dense(g, kind, p->shared, x);
  if (config->shared_gate) {
    attn_var *gate = attn_op_linear_wide(g, x, p->shared_gate);
    shared = attn_op_scale_rows(g, shared, attn_op_activate(g, ATTN_SIGMOID, gate));
  }
  return attn_op_add(g, y, shared);
}

static attn_var *feed_forward(attn_graph *g, const attn_model_config *config,
                              const attn_layer_config *layer, const attn_layer_parameters *p,
                              attn_var *x) {
  if (layer->experts.routing.experts)
    return mixture(g, config->feed_forward, &layer->experts, p, x);
  return dense(g, config->feed_forward, p->feed_forward, x);
}

/* *x = keep x + add y, and the next norm of it, with that norm's parameters; NULL: without one. */
static attn_var *add_residual(attn_graph *g, const attn_model_config *config,
                              const attn_residual *factors, attn_var **x, attn_var *y,
                              attn_parameter *const *next) {
  bool plain = factors->keep == 0 && factors->add == 0;
  if (!plain && factors->keep != 1) *x = attn_op_scale(g, *x, factors->keep);
  if (!plain && factors->add != 1) y = attn_op_scale(g, y, factors->add);
  if (!next || config->norm == ATTN_NORM_LAYER) {
    *x = attn_op_add(g, *x, y);
    return next ? norm(g, config, next, *x) : NULL;
  }
  attn_var *weight = next[0] ? attn_graph_parameter(g, next[0]) : NULL;
  return attn_layer_add_rms_norm(g, *x, y, weight, config->norm_epsilon, x);
}

/* What one layer needs; in the arena when it has to wait for a checkpoint's backward. */
typedef struct block_context {
  const attn_model *model;
  int64_t layer;
  attn_layout layout;
  attn_state *state;
  attn_state *const *states;   /* of a step of several sequences */
  attn_var *normed;            /* its input's norm, where the layer before has made it, */
  attn_parameter *const *next; /* the next layer's norm, to be made of the result here, */
  attn_var *next_normed;       /* and what that gave */
  attn_mixer_visit *visit;     /* or NULL */
  void *visitor;
} block_context;

static attn_var *block(attn_graph *g, void *context, attn_var *x) {
  block_context *c = context;
  const attn_model_config *config = &c->model->config;
  attn_layer_parameters *p = &c->model->layers[c->layer];
  const attn_layer_config *layer = &config->layers[c->layer];
  attn_mixer_call call = {.options = &layer->options,
                          .parameters = p->mixer,
                          .layout = c->layout,
                          .state = c->state,
                          .states = c->states};
  attn_var *in = c->normed ? c->normed : norm(g, config, p->token_norm, x);
  if (c->visit && in) {
    attn_status status = c->visit(c->visitor, c->layer, &in->value);
    if (status != ATTN_OK) return attn_graph_error(g, status);
  }
  attn_var *mixed = attn_mixer_apply(g, layer->mixer, &call, in);
  if (config->sandwich) mixed = norm(g, config, p->token_after, mixed);
  if (config->normed_residual) x = attn_op_cast(g, in, g->wide);
  in = add_residual(g, config, &layer->mixed, &x, mixed, p->channel_norm);
  attn_graph_forget(g, mixed);
  attn_var *fed = feed_forward(g, config, layer, p, in);
  if (config->sandwich) fed = norm(g, config, p->channel_after, fed);
  if (config->normed_residual) x = attn_op_cast(g, in, g->wide);
  c->next_normed = add_residual(g, config, &layer->fed, &x, fed, c->next);
  attn_graph_forget(g, fed);
  return x;
}

attn_var *attn_keep_result(attn_graph *g, attn_graph_mark mark, const attn_tensor *kept,
                           attn_var *x) {
  if (!x) return NULL;
  attn_add_tensor(g, kept, &x->value, 1, false);
  attn_graph_release(g, mark);
  return attn_graph_input(g, kept);
}

/* The states of layer l: one a sequence. */
static attn_state *const *states_of_layer(attn_graph *g, attn_state *const *const *sequences,
                                          int64_t count, int64_t l) {
  attn_state **states = attn_arena_alloc(g->arena, (size_t)count * sizeof(attn_state *));
  for (int64_t i = 0; states && i < count; ++i) states[i] = sequences[i][l];
  return states;
}

/* How the layers are gone through; each field as attn_decoder_hidden, attn_decoder_step and
 * attn_decoder_visit have it. */
typedef struct passage {
  attn_state *const *states;
  attn_state *const *const *sequences;
  int64_t checkpoints, lean;
  attn_mixer_visit *visit;
  void *visitor;
} passage;

static attn_var *run_layers(attn_graph *graph, const attn_model *model, const attn_layout *layout,
                            const int32_t *tokens, const passage *p) {
  const attn_model_config *config = &model->config;
  attn_var *x =
      attn_layer_embedding(graph, model->embedding, tokens, layout->rows, config->embedding_scale);
  if (!x) return NULL;
  attn_tensor kept[2] = {{0}};
  for (int i = 0; i < 2 && !graph->recording; ++i)
    kept[i] = attn_graph_tensor_like(graph, x->value.dtype, &x->value);
  attn_graph_mark mark = attn_graph_get_mark(graph);
  attn_var *normed = NULL;
  const attn_node *since = graph->last; /* what was recorded before this layer and the last one */
  for (int64_t l = 0; l < config->layer_count && x; ++l) {
    block_context *context = attn_arena_alloc(graph->arena, sizeof *context);
    if (!context) return attn_graph_error(graph, ATTN_OUT_OF_MEMORY);
    const attn_node *before = graph->last;
    *context = (block_context){.model = model,
                               .layer = l,
                               .layout = *layout,
                               .state = p->states ? p->states[l] : NULL,
                               .visit = p->visit,
                               .visitor = p->visitor};
    /* A layer that runs again in backward makes its own norm and no other's; neither does one whose
     * activations go with it. */
    bool alone = l < p->checkpoints || !graph->recording, last = l + 1 == config->layer_count;
    context->normed = normed;
    if (!alone) context->next = last ? model->final_norm : model->layers[l + 1].token_norm;
    if (p->sequences) {
      context->states = states_of_layer(graph, p->sequences, layout->batch, l);
      if (!context->states) return attn_graph_error(graph, ATTN_OUT_OF_MEMORY);
    }
    x = l < p->checkpoints ? attn_graph_checkpoint(graph, block, context, x)
                           : block(graph, context, x);
    normed = context->next_normed;
    /* The last layer's too: what it made for this one has been read now. */
    if (l < p->checkpoints + p->lean) attn_graph_discard(graph, since);
    since = before;
    if (!graph->recording) x = attn_keep_result(graph, mark, &kept[l % 2], x);
  }
  return normed ? normed : norm(graph, config, model->final_norm, x);
}

attn_var *attn_decoder_hidden(attn_graph *graph, const attn_model *model, const attn_layout *layout,
                              const int32_t *tokens, attn_state *const *states, int64_t checkpoints,
                              int64_t lean) {
  return run_layers(graph, model, layout, tokens,
                    &(passage){.states = states, .checkpoints = checkpoints, .lean = lean});
}

attn_status attn_decoder_visit(attn_graph *graph, const attn_model *model,
                               const attn_layout *layout, const int32_t *tokens,
                               attn_mixer_visit *visit, void *context) {
  attn_graph_reset(graph, false);
  (void)run_layers(graph, model, layout, tokens, &(passage){.visit = visit, .visitor = context});
  return attn_graph_status(graph);
}

attn_var *attn_decoder_step(attn_graph *graph, const attn_model *model, int64_t count,
                            const int32_t *tokens, attn_state *const *const *sequences) {
  attn_layout layout = attn_layout_equal(count, 1);
  return run_layers(graph, model, &layout, tokens, &(passage){.sequences = sequences});
}

attn_var *attn_decoder_loss(attn_graph *graph, const attn_model *model, const attn_layout *layout,
                            const int32_t *tokens, const int32_t *targets, int64_t checkpoints,
                            int64_t lean) {
  attn_var *hidden = attn_decoder_hidden(graph, model, layout, tokens, NULL, checkpoints, lean);
  return attn_op_linear_cross_entropy(graph, hidden, model->head, model->config.logit_cap, targets);
}

attn_var *attn_decoder_logits(attn_graph *graph, const attn_model *model, attn_var *hidden) {
  attn_var *logits = attn_op_linear_wide(graph, hidden, model->head);
  double cap = model->config.logit_cap;
  if (logits && cap > 0 && graph->recording)
    return attn_graph_fail(graph, ATTN_UNSUPPORTED, "capped logits have no gradient yet");
  if (logits && cap > 0) attn_pass_cap(graph, &logits->value, cap);
  return logits;
}
