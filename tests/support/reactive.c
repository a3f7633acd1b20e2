#include "support/reactive.h"
#include "base/hash.h"
#include "engines/dense/dense.h"
#include "support/test.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum {
  VOCABULARY = REACTIVE_VOCABULARY,
  HIDDEN = REACTIVE_HIDDEN,
  SLOTS = REACTIVE_SLOTS,
  LAYERS = REACTIVE_LAYERS
};

const char *const reactive_memories[] = {"simple", "self", "interlayer", "gated_self",
                                         "gated_interlayer"};
/* gate, its activation, its status */
const char *const reactive_gates[][3] = {
    {"none", "sigmoid", "mean"},        {"static", "sigmoid", "mean"},
    {"static", "tanh", "mean"},         {"elementwise", "sigmoid", "mean"},
    {"elementwise", "tanh", "learned"}, {"linear", "sigmoid", "mean"},
    {"linear", "sigmoid", "learned"},
};

static attn_reactive *create(int memory, int gate, attn_dtype compute) {
  char config[768];
  attn_reactive *m;
  snprintf(config, sizeof config,
           "{\"model_type\": \"reactive\", \"vocab_size\": %d, \"hidden_size\": %d, "
           "\"num_memory_slots\": %d, \"num_hidden_layers\": %d, \"num_attention_heads\": 2, "
           "\"num_key_value_heads\": 1, \"memory_attention_heads\": 4, "
           "\"memory_key_value_heads\": 2, \"memory_head_dim\": 4, \"intermediate_size\": 20, "
           "\"memory_attention\": \"%s\", \"memory_gate\": \"%s\", "
           "\"memory_gate_activation\": \"%s\", \"memory_gate_status\": \"%s\", "
           "\"head_norm\": %s, \"bos_token_id\": 0, \"query_token_id\": 1, "
           "\"answer_token_id\": 2, \"eos_token_id\": 3}",
           VOCABULARY, HIDDEN, SLOTS, LAYERS, reactive_memories[memory], reactive_gates[gate][0],
           reactive_gates[gate][1], reactive_gates[gate][2], gate % 2 ? "true" : "false");
  assert_ok(attn_reactive_create(config, 3, compute, &m));
  return m;
}

attn_parameter *reactive_find(attn_reactive *m, const char *name) {
  for (int64_t i = 0; i < m->list.count; ++i)
    if (strcmp(m->list.parameters[i].name, name) == 0) return &m->list.parameters[i];
  fail_msg("there is no %s", name);
  return NULL;
}

void reactive_set(attn_parameter *p, const double *x) {
  attn_tensor from;
  assert_ok(attn_tensor_wrap((void *)(uintptr_t)x, ATTN_F64, p->value.rank, p->value.shape, &from));
  assert_ok(attn_tensor_copy(&from, &p->value));
  if (p->weight) assert_ok(attn_weight_set(p->weight, &p->value));
}

void reactive_set_all(attn_parameter *p, double value) {
  int64_t count = attn_tensor_count(&p->value);
  double *x = malloc((size_t)count * sizeof *x);
  for (int64_t i = 0; i < count; ++i) x[i] = value;
  reactive_set(p, x);
  free(x);
}

/* One seed a name: models that differ in gates or kind of memory have the other weights in common.
 */
static uint64_t seed_of(const char *name) {
  return attn_hash(ATTN_HASH_START, name, strlen(name)) % 100000;
}

/* Weights away from where they begin, so that everything matters. */
attn_reactive *reactive_make(int memory, int gate, attn_dtype compute) {
  attn_reactive *m = create(memory, gate, compute);
  for (int64_t i = 0; i < m->list.count; ++i) {
    attn_parameter *p = &m->list.parameters[i];
    int64_t count = attn_tensor_count(&p->value);
    double *x = malloc((size_t)count * sizeof *x);
    bool one = m->list.shapes[i].initial == ATTN_INIT_CONSTANT && m->list.shapes[i].scale == 1;
    test_fill_normal(x, count, 0, p->weight ? 1.2 / sqrt((double)p->value.shape[1]) : 0.4,
                     seed_of(p->name));
    for (int64_t j = 0; j < count; ++j) x[j] = (float)(one ? exp(x[j]) : x[j]);
    reactive_set(p, x);
    free(x);
  }
  assert_ok(attn_reactive_move(m, test_device()));
  return m;
}

void reactive_tokens(int32_t *tokens, int64_t count, int seed) {
  for (int64_t i = 0; i < count; ++i)
    tokens[i] = (int32_t)((i * i * 5 + 3 * i + seed * 7 + 4) % VOCABULARY);
}

static const double *by_name(void *context, const char *name) {
  reactive_values *v = context;
  return v->all[reactive_find(v->m, name) - v->m->list.parameters];
}

oracle_reactive reactive_oracle(attn_reactive *m, int memory, int gate, reactive_values *v) {
  *v = (reactive_values){.m = m, .all = malloc((size_t)m->list.count * sizeof *v->all)};
  for (int64_t i = 0; i < m->list.count; ++i)
    v->all[i] = test_to_doubles(&m->list.parameters[i].value);
  return (oracle_reactive){.vocabulary = VOCABULARY,
                           .hidden = HIDDEN,
                           .width = 20,
                           .layers = LAYERS,
                           .slots = SLOTS,
                           .epsilon = 1e-6,
                           .head_norm = gate % 2,
                           .memory = reactive_memories[memory],
                           .gate = reactive_gates[gate][0],
                           .tanh_gate = strcmp(reactive_gates[gate][1], "tanh") == 0,
                           .learned_status = strcmp(reactive_gates[gate][2], "learned") == 0,
                           .self = m->self,
                           .cross = m->cross,
                           .values = by_name,
                           .context = v};
}

void reactive_free_values(reactive_values *v) {
  for (int64_t i = 0; i < v->m->list.count; ++i) free(v->all[i]);
  free(v->all);
}
