/* Sessions of reactive models: a memory between turns; within a turn also its tokens, with keys and
 * values of the decoder's own attention, and those of the memory, which stays as it is. */
#include "base/hash.h"
#include "base/memory.h"
#include "base/random.h"
#include "base/status.h"
#include "models/reactive.h"
#include "models/sampling.h"

#include <math.h>
#include <string.h>

struct attn_reactive_session {
  attn_reactive *m;
  attn_reactive_session_options options;
  attn_tensor memory;   /* [layers, slots, hidden], wide */
  attn_tensor *keys[2]; /* each layer's keys, values [slots, kv_heads, dim] of this turn's memory */
  bool projected;       /* they are */
  attn_state **states;  /* each layer's: of this turn's tokens */
  int32_t *tokens;      /* [max_turn_tokens] */
  int64_t count, turns;
};

/* Making one ------------------------------------------------------------------------------------
 */

static attn_status take_options(const attn_reactive_session_options *given,
                                attn_reactive_session_options *o) {
  *o = (attn_reactive_session_options)ATTN_REACTIVE_SESSION_INIT;
  if (given && given->struct_size != sizeof *o)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "reactive session: options.struct_size is %zu, expected %zu: begin with "
                     "ATTN_REACTIVE_SESSION_INIT",
                     given->struct_size, sizeof *o);
  if (given) *o = *given;
  if (o->max_turn_tokens < 1 || o->max_turn_tokens > ATTN_STATE_CAPACITY)
    return attn_fail(ATTN_INVALID_ARGUMENT, "reactive session: max_turn_tokens is %lld",
                     (long long)o->max_turn_tokens);
  if (!(o->deviation >= 0) || !isfinite(o->deviation))
    return attn_fail(ATTN_INVALID_ARGUMENT, "reactive session: deviation is %g, expected 0 or more",
                     o->deviation);
  return ATTN_OK;
}

static attn_status make(attn_reactive_session *s) {
  const attn_reactive *m = s->m;
  const attn_mixer_options *o = &m->cross;
  attn_state_part parts[ATTN_STATE_PARTS];
  attn_dtype wide = m->graph->wide;
  attn_device device = m->list.device;
  int64_t layers = m->layer_count, heads[3] = {m->slots, o->kv_heads, o->dim};
  int count = m->softmax->state(&m->self, m->compute, parts);
  s->states = attn_alloc_array((size_t)layers, sizeof *s->states);
  s->tokens = attn_alloc_array((size_t)s->options.max_turn_tokens, sizeof *s->tokens);
  for (int i = 0; i < 2; ++i) s->keys[i] = attn_alloc_array((size_t)layers, sizeof **s->keys);
  if (!s->states || !s->tokens || !s->keys[0] || !s->keys[1]) return ATTN_OUT_OF_MEMORY;
  ATTN_TRY(
      attn_tensor_create_on(device, wide, 3, (int64_t[]){layers, m->slots, m->hidden}, &s->memory));
  for (int64_t l = 0; l < layers; ++l) {
    ATTN_TRY(attn_state_create(device, parts, count, s->options.max_turn_tokens, 1, NULL,
                               &s->states[l]));
    for (int i = 0; i < 2; ++i)
      ATTN_TRY(attn_tensor_create_on(device, m->compute, 3, heads, &s->keys[i][l]));
  }
  return ATTN_OK;
}

/* The memory from host numbers. */
static attn_status put_memory(attn_reactive_session *s, const void *numbers, attn_dtype dtype) {
  attn_tensor from;
  ATTN_TRY(attn_tensor_wrap((void *)(uintptr_t)numbers, dtype, 3, s->memory.shape, &from));
  s->projected = false;
  return attn_tensor_copy(&from, &s->memory);
}

static attn_status first_memory(attn_reactive_session *s) {
  int64_t count = attn_tensor_count(&s->memory);
  attn_random random = {.seed = s->options.seed};
  if (s->options.seed == 0) return attn_tensor_fill(&s->memory, 0);
  double *numbers = attn_alloc_array((size_t)count, sizeof *numbers);
  if (!numbers) return ATTN_OUT_OF_MEMORY;
  for (int64_t i = 0; i < count; ++i)
    numbers[i] = s->options.deviation * attn_random_normal(&random);
  attn_status status = put_memory(s, numbers, ATTN_F64);
  attn_free(numbers);
  return status;
}

attn_status attn_reactive_session_create(attn_reactive *m,
                                         const attn_reactive_session_options *options,
                                         attn_reactive_session **session) {
  attn_reactive_session_options o;
  if (!m || !session)
    return attn_fail(ATTN_INVALID_ARGUMENT, "reactive_session_create: an argument is NULL");
  *session = NULL;
  ATTN_TRY(take_options(options, &o));
  attn_reactive_session *s = attn_alloc_zero(sizeof *s);
  if (!s) return ATTN_OUT_OF_MEMORY;
  s->m = m;
  s->options = o;
  attn_status status = make(s);
  if (status == ATTN_OK) status = first_memory(s);
  if (status == ATTN_OK)
    *session = s;
  else
    attn_reactive_session_destroy(s);
  return status;
}

void attn_reactive_session_destroy(attn_reactive_session *s) {
  if (!s) return;
  for (int64_t l = 0; l < s->m->layer_count; ++l) {
    if (s->states) attn_state_destroy(s->states[l]);
    for (int i = 0; i < 2; ++i)
      if (s->keys[i]) attn_tensor_destroy(&s->keys[i][l]);
  }
  attn_tensor_destroy(&s->memory);
  attn_free(s->keys[0]);
  attn_free(s->keys[1]);
  attn_free(s->states);
  attn_free(s->tokens);
  attn_free(s);
}

/* A turn ----------------------------------------------------------------------------------------
 */

/* A layer's memory as a graph's input [slots, hidden]. */
static attn_var *memory_of(attn_graph *g, const attn_reactive_session *s, int64_t l) {
  attn_tensor rows;
  attn_status status = attn_tensor_select(&s->memory, 0, l, &rows);
  return status == ATTN_OK ? attn_graph_input(g, &rows) : attn_graph_error(g, status);
}

/* Once a turn. */
static attn_status project(attn_reactive_session *s) {
  attn_graph *g = s->m->graph;
  if (s->projected) return ATTN_OK;
  attn_graph_reset(g, false);
  for (int64_t l = 0; l < s->m->layer_count; ++l) {
    attn_memory_keys made = attn_reactive_memory_keys(g, s->m, l, memory_of(g, s, l));
    if (!made.k || !made.v) return attn_graph_status(g);
    attn_add_tensor(g, &s->keys[0][l], &made.k->value, 1, false);
    attn_add_tensor(g, &s->keys[1][l], &made.v->value, 1, false);
  }
  ATTN_TRY(attn_graph_status(g));
  s->projected = true;
  return ATTN_OK;
}

static attn_status check_tokens(const attn_reactive_session *s, const int32_t *tokens,
                                int64_t count) {
  if (!tokens || count < 1)
    return attn_fail(ATTN_INVALID_ARGUMENT, "reactive session: %lld tokens, expected at least one",
                     (long long)count);
  if (count > s->options.max_turn_tokens - s->count)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "reactive session: a turn of %lld tokens, max_turn_tokens is %lld",
                     (long long)(s->count + count), (long long)s->options.max_turn_tokens);
  for (int64_t i = 0; i < count; ++i)
    if (tokens[i] < 0 || tokens[i] >= s->m->vocabulary)
      return attn_fail(ATTN_INVALID_ARGUMENT, "reactive session: token %d is not in 0 to %lld",
                       tokens[i], (long long)s->m->vocabulary - 1);
  return ATTN_OK;
}

static attn_status decode(attn_reactive_session *s, const int32_t *tokens, int64_t count,
                          float *logits) {
  const attn_reactive *m = s->m;
  attn_graph *g = m->graph;
  attn_layout layout = attn_layout_equal(1, count), slots = attn_layout_equal(1, m->slots);
  attn_graph_reset(g, false);
  attn_memory_keys *keys = attn_arena_alloc(g->arena, (size_t)m->layer_count * sizeof *keys);
  if (!keys) return ATTN_OUT_OF_MEMORY;
  for (int64_t l = 0; l < m->layer_count; ++l)
    keys[l] = (attn_memory_keys){attn_graph_input(g, &s->keys[0][l]),
                                 attn_graph_input(g, &s->keys[1][l])};
  attn_var *x = attn_reactive_decode(g, m, &layout, tokens, &slots, keys, s->states);
  if (!logits) return attn_graph_status(g);
  attn_var *z = attn_reactive_logits(g, m, attn_view_slice(g, x, 0, count - 1, 1));
  ATTN_TRY(attn_graph_status(g));
  attn_tensor to;
  ATTN_TRY(attn_tensor_wrap(logits, ATTN_F32, 2, z->value.shape, &to));
  return attn_tensor_copy(&z->value, &to);
}

attn_status attn_reactive_session_feed(attn_reactive_session *s, const int32_t *tokens,
                                       int64_t count, float *logits) {
  if (!s) return attn_fail(ATTN_INVALID_ARGUMENT, "reactive_session_feed: the session is NULL");
  ATTN_TRY(check_tokens(s, tokens, count));
  ATTN_TRY(project(s));
  attn_status status = decode(s, tokens, count, logits);
  if (status != ATTN_OK) { /* layers may have taken the tokens: keys can be cut */
    for (int64_t l = 0; l < s->m->layer_count; ++l) (void)attn_state_cut(s->states[l], s->count);
    return status;
  }
  memcpy(s->tokens + s->count, tokens, (size_t)count * sizeof *tokens);
  s->count += count;
  return ATTN_OK;
}

void attn_reactive_session_drop_turn(attn_reactive_session *s) {
  for (int64_t l = 0; l < s->m->layer_count; ++l) attn_state_clear(s->states[l]);
  s->count = 0;
}

static attn_status update(attn_reactive_session *s) {
  const attn_reactive *m = s->m;
  attn_graph *g = m->graph;
  attn_layout layout = attn_layout_equal(1, s->count);
  attn_graph_reset(g, false);
  attn_var **encoded = attn_reactive_layer_vars(g, m), **stm = attn_reactive_layer_vars(g, m);
  attn_var **updated = attn_reactive_layer_vars(g, m);
  if (!encoded || !stm || !updated) return ATTN_OUT_OF_MEMORY;
  for (int64_t l = 0; l < m->layer_count; ++l) stm[l] = memory_of(g, s, l);
  attn_reactive_encode(g, m, &layout, s->tokens, encoded);
  attn_reactive_update(g, m, 1, stm, &layout, encoded, updated);
  ATTN_TRY(attn_graph_status(g));
  for (int64_t l = 0; l < m->layer_count; ++l) {
    attn_tensor rows;
    ATTN_TRY(attn_tensor_select(&s->memory, 0, l, &rows));
    attn_add_tensor(g, &rows, &updated[l]->value, 1, false);
  }
  return attn_graph_status(g);
}

attn_status attn_reactive_session_end_turn(attn_reactive_session *s) {
  if (!s || s->count == 0)
    return attn_fail(ATTN_INVALID_ARGUMENT, "reactive session: the turn has no tokens");
  ATTN_TRY(update(s));
  attn_reactive_session_drop_turn(s);
  s->projected = false;
  ++s->turns;
  return ATTN_OK;
}

int64_t attn_reactive_session_turns(const attn_reactive_session *s) {
  return s->turns;
}

int64_t attn_reactive_session_turn_tokens(const attn_reactive_session *s) {
  return s->count;
}

/* By the template -------------------------------------------------------------------------------
 */

typedef struct asking {
  attn_reactive_session *s;
  attn_sampling sampling;
  attn_reactive_on_token *on_token;
  void *context;
  int32_t *answer;
  int64_t most, count;
  float *logits;
  void *workspace;
} asking;

static attn_status feed_mark(asking *a, int64_t token, bool last) {
  int32_t mark = (int32_t)token;
  return token < 0 ? ATTN_OK : attn_reactive_session_feed(a->s, &mark, 1, last ? a->logits : NULL);
}

static attn_status feed_query(asking *a, const int32_t *text, int64_t count) {
  const attn_reactive *m = a->s->m;
  ATTN_TRY(feed_mark(a, m->bos, false));
  ATTN_TRY(feed_mark(a, m->query, false));
  ATTN_TRY(attn_reactive_session_feed(a->s, text, count, m->answer < 0 ? a->logits : NULL));
  return feed_mark(a, m->answer, true);
}

static attn_status draw_answer(asking *a) {
  const attn_reactive *m = a->s->m;
  bool goes_on = true;
  while (goes_on && a->count < a->most) {
    int32_t token;
    ATTN_TRY(attn_sample(&a->sampling, a->logits, m->vocabulary, a->answer, a->count,
                         (uint64_t)a->s->turns << 32 | (uint64_t)a->count, a->workspace, &token));
    if (token == m->eos) break;
    a->answer[a->count++] = token;
    ATTN_TRY(attn_reactive_session_feed(a->s, &token, 1, a->logits));
    goes_on = !a->on_token || a->on_token(a->context, token);
  }
  return feed_mark(a, m->eos, false);
}

static attn_status ask(asking *a, const int32_t *text, int64_t count) {
  a->logits = attn_alloc_array((size_t)a->s->m->vocabulary, sizeof *a->logits);
  a->workspace = attn_alloc(attn_sample_workspace(a->s->m->vocabulary));
  attn_status status = a->logits && a->workspace ? ATTN_OK : ATTN_OUT_OF_MEMORY;
  if (status == ATTN_OK) status = feed_query(a, text, count);
  if (status == ATTN_OK) status = draw_answer(a);
  if (status == ATTN_OK) status = attn_reactive_session_end_turn(a->s);
  if (status != ATTN_OK) attn_reactive_session_drop_turn(a->s);
  attn_free(a->logits);
  attn_free(a->workspace);
  return status;
}

static attn_status between_turns(const attn_reactive_session *s, const char *what) {
  if (s && s->count == 0) return ATTN_OK;
  return attn_fail(ATTN_INVALID_ARGUMENT, "%s: %s", what,
                   s ? "a turn is under way: end or drop it" : "the session is NULL");
}

attn_status attn_reactive_session_ask(attn_reactive_session *s, const int32_t *text, int64_t count,
                                      const attn_sampling *sampling,
                                      attn_reactive_on_token *on_token, void *context,
                                      int32_t *answer, int64_t max_answer, int64_t *answer_tokens) {
  ATTN_TRY(between_turns(s, "reactive_session_ask"));
  if (!answer_tokens || max_answer < 0 || (max_answer && !answer))
    return attn_fail(ATTN_INVALID_ARGUMENT, "reactive_session_ask: there is no room for an answer");
  asking a = {.s = s,
              .sampling = ATTN_SAMPLING_INIT,
              .on_token = on_token,
              .context = context,
              .answer = answer,
              .most = max_answer};
  a.sampling.temperature = 0;
  if (sampling) a.sampling = *sampling;
  ATTN_TRY(attn_sampling_check(&a.sampling));
  attn_status status = ask(&a, text, count);
  *answer_tokens = status == ATTN_OK ? a.count : 0;
  return status;
}

/* The memory ------------------------------------------------------------------------------------
 */

attn_status attn_reactive_session_get_memory(const attn_reactive_session *s, float *memory) {
  attn_tensor to;
  ATTN_TRY(between_turns(s, "reactive_session_get_memory"));
  if (!memory) return attn_fail(ATTN_INVALID_ARGUMENT, "reactive session: the memory is NULL");
  ATTN_TRY(attn_tensor_wrap(memory, ATTN_F32, 3, s->memory.shape, &to));
  return attn_tensor_copy(&s->memory, &to);
}

attn_status attn_reactive_session_set_memory(attn_reactive_session *s, const float *memory) {
  ATTN_TRY(between_turns(s, "reactive_session_set_memory"));
  if (!memory) return attn_fail(ATTN_INVALID_ARGUMENT, "reactive session: the memory is NULL");
  for (int64_t i = 0; i < attn_tensor_count(&s->memory); ++i)
    if (!isfinite(memory[i]))
      return attn_fail(ATTN_INVALID_ARGUMENT, "reactive session: number %lld of the memory is %g",
                       (long long)i, (double)memory[i]);
  return put_memory(s, memory, ATTN_F32);
}

attn_status attn_reactive_session_fork(const attn_reactive_session *s,
                                       attn_reactive_session **fork) {
  ATTN_TRY(between_turns(s, "reactive_session_fork"));
  ATTN_TRY(attn_reactive_session_create(s->m, &s->options, fork));
  (*fork)->turns = s->turns;
  attn_status status = attn_tensor_copy(&s->memory, &(*fork)->memory);
  if (status == ATTN_OK) return ATTN_OK;
  attn_reactive_session_destroy(*fork);
  *fork = NULL;
  return status;
}

/* Files -----------------------------------------------------------------------------------------
 */

/* Which model a memory is of: names, shapes and a sample of its parameters. */
static attn_status fingerprint(const attn_reactive *m, int64_t *print) {
  uint64_t value = ATTN_HASH_START;
  for (int64_t i = 0; i < m->list.count; ++i) {
    const attn_parameter *p = &m->list.parameters[i];
    attn_tensor first = p->value, sample;
    double numbers[8] = {0};
    first.rank = 1;
    first.shape[0] = attn_tensor_count(&p->value) < 8 ? attn_tensor_count(&p->value) : 8;
    first.stride[0] = 1;
    ATTN_TRY(attn_tensor_wrap(numbers, ATTN_F64, 1, first.shape, &sample));
    ATTN_TRY(attn_tensor_copy(&first, &sample));
    value = attn_hash(value, p->name, strlen(p->name));
    value = attn_hash(value, p->value.shape, (size_t)p->value.rank * sizeof *p->value.shape);
    value = attn_hash(value, numbers, sizeof numbers);
  }
  *print = (int64_t)(value >> 1);
  return ATTN_OK;
}

static const char *const file_names[2] = {"reactive.memory", "reactive.turns_and_model"};

attn_status attn_reactive_session_save(const attn_reactive_session *s, const char *path) {
  ATTN_TRY(between_turns(s, "reactive_session_save"));
  if (!path) return attn_fail(ATTN_INVALID_ARGUMENT, "reactive_session_save: the path is NULL");
  int64_t numbers[2] = {s->turns, 0}, two = 2;
  attn_named_tensor tensors[2] = {{.name = file_names[0]}, {.name = file_names[1]}};
  ATTN_TRY(fingerprint(s->m, &numbers[1]));
  ATTN_TRY(attn_tensor_wrap(numbers, ATTN_I64, 1, &two, &tensors[1].tensor));
  ATTN_TRY(attn_tensor_create(s->memory.dtype, 3, s->memory.shape, &tensors[0].tensor));
  attn_status status = attn_tensor_copy(&s->memory, &tensors[0].tensor);
  if (status == ATTN_OK) status = attn_safetensors_write(path, tensors, 2, NULL, 0);
  attn_tensor_destroy(&tensors[0].tensor);
  return status;
}

static attn_status all_finite(const attn_tensor *memory) {
  int64_t count = attn_tensor_count(memory);
  for (int64_t i = 0; i < count; ++i)
    if (!isfinite(memory->dtype == ATTN_F64 ? ((const double *)memory->data)[i]
                                            : (double)((const float *)memory->data)[i]))
      return attn_fail(ATTN_BAD_FORMAT, "number %lld of the memory is not finite", (long long)i);
  return ATTN_OK;
}

static attn_status take_file(attn_reactive_session *s, const attn_safetensors *file) {
  attn_tensor memory, numbers;
  int64_t print;
  for (int i = 0; i < 2; ++i)
    if (attn_safetensors_find(file, file_names[i], i ? &numbers : &memory) != ATTN_OK)
      return attn_fail_in(ATTN_BAD_FORMAT, "not the memory of a reactive model");
  ATTN_TRY(fingerprint(s->m, &print));
  bool counts = numbers.dtype == ATTN_I64 && numbers.rank == 1 && numbers.shape[0] == 2;
  if (!counts || ((const int64_t *)numbers.data)[1] != print || memory.dtype != s->memory.dtype ||
      !attn_same_shape(&memory, &s->memory))
    return attn_fail(ATTN_BAD_FORMAT, "the memory belongs to another model or dtype");
  if (((const int64_t *)numbers.data)[0] < 0)
    return attn_fail(ATTN_BAD_FORMAT, "the memory's turns are negative");
  ATTN_TRY(all_finite(&memory));
  ATTN_TRY(attn_tensor_copy(&memory, &s->memory));
  s->turns = ((const int64_t *)numbers.data)[0];
  return ATTN_OK;
}

attn_status attn_reactive_session_restore(attn_reactive_session *s, const char *path) {
  attn_safetensors *file;
  if (!s || !path)
    return attn_fail(ATTN_INVALID_ARGUMENT, "reactive_session_restore: session or path is NULL");
  ATTN_TRY(attn_safetensors_open(path, &file));
  attn_status status = take_file(s, file);
  attn_safetensors_close(file);
  if (status != ATTN_OK) return attn_fail_in(status, "%s", path);
  attn_reactive_session_drop_turn(s);
  s->projected = false;
  return ATTN_OK;
}
