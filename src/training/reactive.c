/* Training of reactive models, stage by stage (arXiv 2510.03561, section 4; attn/reactive.h). */
#include "attn/device.h"
#include "base/memory.h"
#include "base/random.h"
#include "base/status.h"
#include "models/reactive.h"
#include "training/optimiser.h"

#include <math.h>
#include <string.h>

struct attn_reactive_trainer {
  attn_reactive *m;
  attn_reactive_training o;
  attn_optimiser *optimiser;
  uint64_t draws; /* streams of random numbers that were used */
};

/* The trainer -----------------------------------------------------------------------------------
 */

static attn_status in_range(const char *field, double value, double least, double most) {
  if (value >= least && value <= most) return ATTN_OK; /* and so not NaN */
  return attn_fail(ATTN_INVALID_ARGUMENT, "reactive training: %s is %g, expected %g to %g", field,
                   value, least, most);
}

static attn_status take_options(const attn_reactive *m, const attn_reactive_training *given,
                                attn_reactive_training *o) {
  const double most = 1e9;
  *o = (attn_reactive_training)ATTN_REACTIVE_TRAINING_INIT;
  if (given && given->struct_size != sizeof *o)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "reactive training: options.struct_size is %zu, expected %zu: begin with "
                     "ATTN_REACTIVE_TRAINING_INIT",
                     given->struct_size, sizeof *o);
  if (given) *o = *given;
  ATTN_TRY(in_range("parts", o->parts, 1, ATTN_REACTIVE_ALL));
  ATTN_TRY(in_range("deviation", o->deviation, 0, most));
  ATTN_TRY(in_range("mask_rate", o->mask_rate, 0, 1));
  ATTN_TRY(in_range("mask_token", o->mask_token, 0, (double)m->vocabulary - 1));
  ATTN_TRY(in_range("noise", o->noise, 0, most));
  ATTN_TRY(in_range("through", (double)o->through, 0, most));
  ATTN_TRY(in_range("new_first", o->new_first, 0, 1));
  ATTN_TRY(in_range("new_then", o->new_then, 0, 1));
  ATTN_TRY(in_range("new_decay", o->new_decay, 0, 1));
  return in_range("new_least", o->new_least, 0, 1);
}

static bool learns(const void *options, const char *name) {
  const attn_reactive_training *o = options;
  const struct {
    const char *part;
    int flag;
  } parts[] = {{"embedding.", ATTN_REACTIVE_EMBEDDING},
               {"decoder.", ATTN_REACTIVE_DECODER}, /* before its "memory_norm" */
               {"encoder.", ATTN_REACTIVE_ENCODER},
               {"memory.", ATTN_REACTIVE_MEMORY}};
  for (int i = 0; i < 4; ++i)
    if (strstr(name, parts[i].part)) return o->parts & parts[i].flag;
  return false;
}

attn_status attn_reactive_trainer_create(attn_reactive *m, const attn_reactive_training *options,
                                         attn_reactive_trainer **trainer) {
  attn_reactive_training o;
  if (!m || !trainer)
    return attn_fail(ATTN_INVALID_ARGUMENT, "reactive_trainer_create: an argument is NULL");
  *trainer = NULL;
  ATTN_TRY(take_options(m, options, &o));
  attn_reactive_trainer *t = attn_alloc_zero(sizeof *t);
  if (!t) return ATTN_OUT_OF_MEMORY;
  t->m = m;
  t->o = o;
  attn_adamw adamw = {.beta1 = o.beta1,
                      .beta2 = o.beta2,
                      .epsilon = o.epsilon,
                      .weight_decay = o.weight_decay,
                      .clip = o.clip};
  attn_status status = attn_parameter_list_add_gradients(&m->list, learns, &o);
  if (status == ATTN_OK)
    status =
        attn_optimiser_create_trained(&adamw, m->list.parameters, m->list.count, &t->optimiser);
  if (status == ATTN_OK)
    *trainer = t;
  else
    attn_reactive_trainer_destroy(t);
  return status;
}

void attn_reactive_trainer_destroy(attn_reactive_trainer *t) {
  if (!t) return;
  attn_parameter_list_drop_gradients(&t->m->list);
  attn_optimiser_destroy(t->optimiser);
  attn_free(t);
}

static double value_of(const attn_var *loss) {
  return attn_tensor_get(&loss->value, (int64_t[]){0});
}

static attn_status step(attn_reactive_trainer *t, attn_var *loss, double learning_rate) {
  attn_graph *g = t->m->graph;
  ATTN_TRY(attn_graph_status(g));
  if (!isfinite(value_of(loss)))
    return attn_fail(ATTN_INVALID_ARGUMENT, "reactive training: the loss is %g", value_of(loss));
  if (!loss->needs_gradient)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "reactive training: no part that learns takes part in this loss");
  ATTN_TRY(attn_graph_backward(g, loss, 1));
  return attn_optimiser_step(t->optimiser, learning_rate, 1, NULL);
}

/* A fresh tape and gradients of zero. */
static void begin(attn_reactive_trainer *t) {
  attn_graph_reset(t->m->graph, true);
  attn_optimiser_zero_gradients(t->optimiser);
}

/* Turns -----------------------------------------------------------------------------------------
 */

static attn_status check_turns(const attn_reactive *m, const attn_turns *turns) {
  if (!turns || !turns->tokens || !turns->offsets || turns->sequences < 1 || turns->offsets[0] != 0)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "reactive training: turns need tokens and offsets from 0 of at least one");
  for (int64_t b = 0; b < turns->sequences; ++b)
    if (turns->offsets[b + 1] <= turns->offsets[b])
      return attn_fail(ATTN_INVALID_ARGUMENT, "reactive training: sequence %lld is empty",
                       (long long)b);
  for (int64_t r = 0; r < turns->offsets[turns->sequences]; ++r) {
    int32_t target = turns->targets ? turns->targets[r] : -1;
    if (turns->tokens[r] < 0 || turns->tokens[r] >= m->vocabulary || target >= m->vocabulary)
      return attn_fail(ATTN_INVALID_ARGUMENT,
                       "reactive training: token %d with target %d, expected 0 to %lld",
                       turns->tokens[r], target, (long long)m->vocabulary - 1);
  }
  return ATTN_OK;
}

static attn_status check_dialogues(const attn_reactive *m, const attn_turns *turns, int64_t count) {
  if (!turns || count < 1)
    return attn_fail(ATTN_INVALID_ARGUMENT, "reactive training: there are no turns");
  for (int64_t t = 0; t < count; ++t) {
    ATTN_TRY(check_turns(m, &turns[t]));
    if (turns[t].sequences != turns[0].sequences)
      return attn_fail(ATTN_INVALID_ARGUMENT,
                       "reactive training: turn %lld is of %lld dialogues, the first of %lld",
                       (long long)t, (long long)turns[t].sequences, (long long)turns[0].sequences);
  }
  return ATTN_OK;
}

/* Equal lengths are seen as such: they take fewer passes. */
static attn_layout layout_of(const attn_turns *turns) {
  int64_t length = turns->offsets[1];
  for (int64_t b = 1; b < turns->sequences; ++b)
    if (turns->offsets[b + 1] - turns->offsets[b] != length)
      return attn_layout_packed(turns->sequences, turns->offsets);
  return attn_layout_equal(turns->sequences, length);
}

/* The targets, in the graph's memory where they are the next tokens; *counted of them are asked. */
static const int32_t *targets_of(attn_graph *g, const attn_turns *turns, int64_t *counted) {
  int64_t rows = turns->offsets[turns->sequences];
  int32_t *next = attn_arena_alloc(g->arena, (size_t)rows * sizeof *next);
  *counted = 0;
  if (!next) return attn_graph_error(g, ATTN_OUT_OF_MEMORY);
  for (int64_t b = 0; b < turns->sequences; ++b)
    for (int64_t r = turns->offsets[b]; r < turns->offsets[b + 1]; ++r) {
      next[r] = r + 1 < turns->offsets[b + 1] ? turns->tokens[r + 1] : -1;
      if (turns->targets) next[r] = turns->targets[r];
      *counted += next[r] >= 0;
    }
  return next;
}

/* [rows, hidden], wide, of N(0, deviation^2). */
static attn_var *random_rows(attn_reactive_trainer *t, int64_t rows, double deviation) {
  attn_graph *g = t->m->graph;
  int64_t count = rows * t->m->hidden;
  double *numbers = attn_arena_alloc(g->arena, (size_t)count * sizeof *numbers);
  attn_random random = {.seed = t->o.seed, .stream = t->draws++};
  if (!numbers) return attn_graph_error(g, ATTN_OUT_OF_MEMORY);
  for (int64_t i = 0; i < count; ++i) numbers[i] = deviation * attn_random_normal(&random);
  return attn_graph_host_rows(g, numbers, ATTN_F64, rows, t->m->hidden);
}

static attn_var *detached(attn_graph *g, attn_var *x) {
  return x ? attn_graph_input(g, &x->value) : NULL;
}

/* Joint -----------------------------------------------------------------------------------------
 */

/* What the encoder sees, and what it shall guess. */
static bool mask(attn_reactive_trainer *t, const attn_turns *texts, int32_t **seen,
                 int32_t **targets) {
  attn_graph *g = t->m->graph;
  size_t rows = (size_t)texts->offsets[texts->sequences];
  attn_random random = {.seed = t->o.seed, .stream = t->draws++};
  *seen = attn_arena_alloc(g->arena, rows * sizeof **seen);
  *targets = attn_arena_alloc(g->arena, rows * sizeof **targets);
  if (!*seen || !*targets) return attn_graph_error(g, ATTN_OUT_OF_MEMORY);
  for (size_t r = 0; r < rows; ++r) {
    bool masked = attn_random_uniform(&random) < t->o.mask_rate;
    (*seen)[r] = masked ? t->o.mask_token : texts->tokens[r];
    (*targets)[r] = masked ? texts->tokens[r] : -1;
  }
  return true;
}

attn_status attn_reactive_train_joint(attn_reactive_trainer *t, const attn_turns *texts,
                                      double learning_rate, double losses[2]) {
  if (!t) return attn_fail(ATTN_INVALID_ARGUMENT, "reactive_train_joint: the trainer is NULL");
  const attn_reactive *m = t->m;
  attn_graph *g = m->graph;
  ATTN_TRY(check_turns(m, texts));
  attn_layout layout = layout_of(texts);
  int32_t *seen, *hidden_tokens;
  int64_t counted;
  begin(t);
  attn_var **stm = attn_reactive_layer_vars(g, m);
  const int32_t *targets = targets_of(g, texts, &counted);
  if (!stm || !targets || !mask(t, texts, &seen, &hidden_tokens)) return attn_graph_status(g);
  attn_var *x = attn_reactive_encode(g, m, &layout, seen, stm);
  attn_var *encoder = attn_op_affine_cross_entropy(
      g, attn_op_cast(g, x, g->compute), m->masked_head[0], m->masked_head[1], hidden_tokens);
  for (int64_t l = 0; l < m->layer_count; ++l) {
    stm[l] = detached(g, stm[l]);
    if (t->o.noise > 0) stm[l] = attn_op_add(g, stm[l], random_rows(t, layout.rows, t->o.noise));
  }
  x = attn_reactive_decode_with(g, m, &layout, texts->tokens, &layout, stm);
  attn_var *decoder = attn_op_affine_cross_entropy(g, x, m->head[0], m->head[1], targets);
  attn_var *loss = attn_op_add(g, decoder, encoder);
  ATTN_TRY(attn_graph_status(g));
  if (losses) {
    losses[0] = value_of(decoder);
    losses[1] = value_of(encoder);
  }
  return step(t, loss, learning_rate);
}

/* A memory that outlives the tape ---------------------------------------------------------------
 */

typedef struct carried {
  attn_tensor *layers; /* [batch slots, hidden], wide; a tape reads them until it has gone back, */
  attn_tensor *next;   /* so what follows goes here */
  int64_t count, batch;
} carried;

static attn_status carried_create(attn_reactive_trainer *t, int64_t batch, carried *c) {
  const attn_reactive *m = t->m;
  *c = (carried){.count = m->layer_count, .batch = batch};
  c->layers = attn_alloc_array((size_t)c->count, sizeof *c->layers);
  c->next = attn_alloc_array((size_t)c->count, sizeof *c->next);
  if (!c->layers || !c->next) return ATTN_OUT_OF_MEMORY;
  attn_graph_reset(m->graph, false);
  for (int64_t l = 0; l < c->count; ++l) {
    attn_var *x = random_rows(t, batch * m->slots, t->o.deviation);
    ATTN_TRY(attn_graph_status(m->graph));
    for (int i = 0; i < 2; ++i)
      ATTN_TRY(attn_tensor_create_on(m->list.device, m->graph->wide, 2, x->value.shape,
                                     i ? &c->next[l] : &c->layers[l]));
    attn_add_tensor(m->graph, &c->layers[l], &x->value, 1, false);
  }
  return attn_graph_status(m->graph);
}

static void carried_free(carried *c) {
  for (int64_t l = 0; l < c->count; ++l) {
    if (c->layers) attn_tensor_destroy(&c->layers[l]);
    if (c->next) attn_tensor_destroy(&c->next[l]);
  }
  attn_free(c->layers);
  attn_free(c->next);
}

/* A step whose tape leaves this memory to the next one. */
static attn_status step_and_carry(attn_reactive_trainer *t, attn_var *loss, carried *c,
                                  attn_var *const *stm, double learning_rate) {
  for (int64_t l = 0; l < c->count; ++l)
    attn_add_tensor(t->m->graph, &c->next[l], &stm[l]->value, 1, false);
  if (loss) ATTN_TRY(step(t, loss, learning_rate));
  attn_tensor *layers = c->layers;
  c->layers = c->next;
  c->next = layers;
  return attn_graph_status(t->m->graph);
}

static attn_var **carried_vars(attn_graph *g, const attn_reactive *m, const carried *c) {
  attn_var **stm = attn_reactive_layer_vars(g, m);
  for (int64_t l = 0; stm && l < c->count; ++l) stm[l] = attn_graph_input(g, &c->layers[l]);
  return stm;
}

/* Memory attention ------------------------------------------------------------------------------
 */

/* The sum over rows of -cosine / rows / layers: of unit vectors a and b it is |a - b|^2 / 2 - 1. */
static attn_var *cosine_loss(attn_graph *g, int64_t layers, attn_var *x, attn_var *target) {
  attn_var *a = attn_layer_l2_norm(g, x), *b = attn_layer_l2_norm(g, target);
  if (!a || !b) return NULL;
  double rows = (double)attn_rows(&a->value);
  return attn_op_squared_error(g, a, &b->value, 0.5 / rows / (double)layers);
}

static attn_status memory_step(attn_reactive_trainer *t, const attn_turns *turn, double weight,
                               carried *c, double learning_rate, double *loss) {
  const attn_reactive *m = t->m;
  attn_graph *g = m->graph;
  attn_layout layout = layout_of(turn);
  begin(t);
  attn_var **stm = carried_vars(g, m, c), **encoded = attn_reactive_layer_vars(g, m);
  attn_var **updated = attn_reactive_layer_vars(g, m), *sum = NULL;
  if (!stm || !encoded || !updated) return attn_graph_status(g);
  attn_reactive_encode(g, m, &layout, turn->tokens, encoded);
  for (int64_t l = 0; l < m->layer_count; ++l) encoded[l] = detached(g, encoded[l]);
  attn_reactive_update(g, m, c->batch, stm, &layout, encoded, updated);
  for (int64_t l = 0; l < m->layer_count; ++l) {
    attn_var *target =
        attn_op_add(g, attn_op_scale(g, encoded[l], weight), attn_op_scale(g, stm[l], 1 - weight));
    attn_var *one = cosine_loss(g, m->layer_count, updated[l], target);
    sum = l ? attn_op_add(g, sum, one) : one;
  }
  ATTN_TRY(attn_graph_status(g));
  *loss = value_of(sum) - 1;
  return step_and_carry(t, sum, c, updated, learning_rate);
}

attn_status attn_reactive_train_memory(attn_reactive_trainer *t, const attn_turns *turns,
                                       int64_t count, double learning_rate, double *loss) {
  carried c;
  double total = 0;
  if (!t) return attn_fail(ATTN_INVALID_ARGUMENT, "reactive_train_memory: the trainer is NULL");
  ATTN_TRY(check_dialogues(t->m, turns, count));
  for (int64_t n = 0; n < count; ++n) {
    attn_layout layout = layout_of(&turns[n]);
    if (layout.offsets || layout.length != t->m->slots)
      return attn_fail(ATTN_INVALID_ARGUMENT,
                       "reactive training: turn %lld is not of %lld tokens, as many as slots",
                       (long long)n, (long long)t->m->slots);
  }
  attn_status status = carried_create(t, turns[0].sequences, &c);
  for (int64_t n = 0; n < count && status == ATTN_OK; ++n) {
    double later = fmax(t->o.new_then - (double)(n - 1) * t->o.new_decay, t->o.new_least);
    double one = 0;
    status = memory_step(t, &turns[n], n ? later : t->o.new_first, &c, learning_rate, &one);
    if (status == ATTN_OK) total += one / (double)count;
  }
  carried_free(&c);
  if (loss) *loss = total;
  return status;
}

/* Dialogues -------------------------------------------------------------------------------------
 */

/* The memory behind a turn. */
static attn_var **behind(attn_graph *g, const attn_reactive *m, const attn_turns *turn,
                         attn_var *const *stm) {
  attn_layout layout = layout_of(turn);
  attn_var **encoded = attn_reactive_layer_vars(g, m), **next = attn_reactive_layer_vars(g, m);
  if (!encoded || !next) return NULL;
  attn_reactive_encode(g, m, &layout, turn->tokens, encoded);
  attn_reactive_update(g, m, turn->sequences, stm, &layout, encoded, next);
  return next;
}

/* The loss of a turn, times its targets, `asked` of them. */
static attn_var *turn_loss(attn_graph *g, const attn_reactive *m, const attn_turns *turn,
                           attn_var *const *stm, int64_t *asked) {
  attn_layout layout = layout_of(turn), slots = attn_layout_equal(turn->sequences, m->slots);
  const int32_t *targets = targets_of(g, turn, asked);
  if (!targets || *asked == 0) return NULL;
  attn_var *x = attn_reactive_decode_with(g, m, &layout, turn->tokens, &slots, stm);
  attn_var *loss = attn_op_affine_cross_entropy(g, x, m->head[0], m->head[1], targets);
  return attn_op_scale(g, loss, (double)*asked);
}

/* Turns first to end - 1. The memory that is carried is the one which turn first - 1 was decoded
 * with: what that turn writes is written here, and so learnt from the turns that read it. */
static attn_status dialogue_step(attn_reactive_trainer *t, const attn_turns *turns, int64_t first,
                                 int64_t end, carried *c, double learning_rate, double *total,
                                 int64_t *all) {
  attn_graph *g = t->m->graph;
  attn_var *sum = NULL;
  int64_t counted = 0;
  begin(t);
  attn_var **stm = carried_vars(g, t->m, c);
  for (int64_t n = first; n < end && stm; ++n) {
    int64_t asked = 0;
    if (n > 0) stm = behind(g, t->m, &turns[n - 1], stm);
    attn_var *one = stm ? turn_loss(g, t->m, &turns[n], stm, &asked) : NULL;
    if (one) counted += asked;
    sum = one && sum ? attn_op_add(g, sum, one) : one ? one : sum;
  }
  ATTN_TRY(attn_graph_status(g));
  if (sum) *total += value_of(sum);
  *all += counted;
  attn_var *loss = sum ? attn_op_scale(g, sum, 1 / (double)counted) : NULL;
  return step_and_carry(t, loss, c, stm, learning_rate);
}

attn_status attn_reactive_train_dialogues(attn_reactive_trainer *t, const attn_turns *turns,
                                          int64_t count, double learning_rate, double *loss) {
  carried c;
  double total = 0;
  int64_t all = 0;
  if (!t) return attn_fail(ATTN_INVALID_ARGUMENT, "reactive_train_dialogues: the trainer is NULL");
  ATTN_TRY(check_dialogues(t->m, turns, count));
  int64_t through = t->o.through ? t->o.through : count;
  attn_status status = carried_create(t, turns[0].sequences, &c);
  for (int64_t n = 0; n < count && status == ATTN_OK; n += through) {
    int64_t some = count - n < through ? count - n : through;
    status = dialogue_step(t, turns, n, n + some, &c, learning_rate, &total, &all);
  }
  carried_free(&c);
  if (status == ATTN_OK && all == 0)
    return attn_fail(ATTN_INVALID_ARGUMENT, "reactive training: no turn has a target");
  if (loss) *loss = all ? total / (double)all : 0;
  return status;
}
