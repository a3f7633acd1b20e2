/* Small reactive models of every kind, and the oracle of each. */
#ifndef ATTN_TEST_REACTIVE_H
#define ATTN_TEST_REACTIVE_H

#include "models/reactive.h"
#include "oracles/reactive.h"

enum {
  REACTIVE_VOCABULARY = 13,
  REACTIVE_HIDDEN = 12,
  REACTIVE_SLOTS = 5,
  REACTIVE_LAYERS = 2,
  REACTIVE_MEMORIES = 5,
  REACTIVE_GATES = 7
};
extern const char *const reactive_memories[REACTIVE_MEMORIES];
extern const char *const reactive_gates[REACTIVE_GATES][3]; /* gate, its activation, its status */

/* On test_device(), with weights away from where they begin, so that everything matters; those of
 * one name are alike in all kinds. */
attn_reactive *reactive_make(int memory, int gate, attn_dtype compute);
attn_parameter *reactive_find(attn_reactive *model, const char *name);
void reactive_set(attn_parameter *parameter, const double *values);
void reactive_set_all(attn_parameter *parameter, double value);
void reactive_tokens(int32_t *tokens, int64_t count, int seed);

typedef struct reactive_values {
  attn_reactive *m;
  double **all;
} reactive_values;
/* values: what the oracle reads; reactive_free_values afterwards. */
oracle_reactive reactive_oracle(attn_reactive *model, int memory, int gate,
                                reactive_values *values);
void reactive_free_values(reactive_values *values);

#endif
