/* A small world around one operation of the tape: its leaves and parameters, and a loss that is a
 * fixed random functional of its result. */
#ifndef ATTN_TEST_OPERATIONS_H
#define ATTN_TEST_OPERATIONS_H

#include "graph/layout.h"
#include "graph/operations.h"

enum { TRIAL_LEAVES = 5, TRIAL_PARAMETERS = 4, TRIAL_INPUTS = TRIAL_LEAVES + TRIAL_PARAMETERS };

typedef struct trial {
  attn_graph *g;
  attn_var *leaf[TRIAL_LEAVES];
  attn_parameter parameter[TRIAL_PARAMETERS];
} trial;

typedef struct operation_case {
  const char *name;
  attn_var *(*build)(trial *t);
  int64_t leaf[TRIAL_LEAVES][5];          /* shapes, ended by 0 */
  int64_t parameter[TRIAL_PARAMETERS][3]; /* likewise; matrices get a weight */
  unsigned wide;                          /* bit i: leaf i has the wide dtype, not compute's */
  void (*oracle)(double *y, double *const input[TRIAL_INPUTS]); /* or NULL */
} operation_case;

/* The numbers of leaves and parameters, all of them bfloat16 values, so that every dtype computes
 * with the same ones. */
typedef struct trial_inputs {
  double *values[TRIAL_INPUTS]; /* NULL where the case has none */
  int64_t count[TRIAL_INPUTS];
} trial_inputs;

typedef struct trial_outcome {
  double loss;
  double *value; /* of the result */
  int64_t count;
  double *gradient[TRIAL_INPUTS];
} trial_outcome;

trial_inputs trial_inputs_create(const operation_case *c, uint64_t seed);
void trial_inputs_destroy(trial_inputs *inputs);

/* Runs forward and, when recording, backward. Fails the test on any error. */
trial_outcome trial_run(const operation_case *c, const trial_inputs *inputs, attn_dtype compute,
                        bool recording);
/* For the group of tests: destroys what the runs share. */
int trial_teardown(void **state);
void trial_outcome_destroy(trial_outcome *outcome);

/* A parameter over the given doubles, rounded to dtype, with a weight if it is a matrix. */
attn_parameter trial_parameter_create(const char *name, const double *values, int rank,
                                      const int64_t *shape, attn_dtype dtype, attn_dtype compute,
                                      bool trains);
void trial_parameter_destroy(attn_parameter *parameter);

#endif
