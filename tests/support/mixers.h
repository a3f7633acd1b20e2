/* A layer of one mixer with random parameters, and its oracle beside it: what the laws run on. */
#ifndef ATTN_TEST_MIXERS_H
#define ATTN_TEST_MIXERS_H

#include "mixers/mixer.h"
#include "oracles/mixers.h"
#include "support/test.h"

/* Options to try. Those without a mixer's name are for every mixer of the table. */
typedef struct test_case {
  const char *mixer, *name;
  attn_mixer_options options; /* not yet configured */
} test_case;

/* Calls body once for each mixer of the table and each of its cases, naming them when it fails. */
void test_each_case(void (*body)(const attn_mixer *mixer, const attn_mixer_options *options));
/* The same for the cases that are causal: those that have a state. */
void test_each_causal_case(void (*body)(const attn_mixer *mixer,
                                        const attn_mixer_options *options));
/* The same for the first case of each mixer: for laws that options do not change. */
void test_each_mixer(void (*body)(const attn_mixer *mixer, const attn_mixer_options *options));

typedef struct test_layer {
  const attn_mixer *mixer;
  oracle_mixer *oracle;
  attn_mixer_options options;
  attn_dtype compute;
  int count;
  attn_parameter_shape shapes[ATTN_MIXER_PARAMETERS];
  attn_parameter parameters[ATTN_MIXER_PARAMETERS];
  attn_parameter *pointers[ATTN_MIXER_PARAMETERS];
  /* the parameters as the layer holds them, and as they were before rounding */
  double *values[ATTN_MIXER_PARAMETERS], *exact[ATTN_MIXER_PARAMETERS];
  attn_graph *graph;
  /* For tests of failing memory: 0, or the bytes + 1 that the tape's arena has left when a run
   * begins; from then on no allocation succeeds until attn_fault_disarm. */
  size_t room;
  double moves; /* of test_moved_inputs and test_moved_parameters: in roundings; 0: one */
  /* Cross-attention: what keys and values are made of, [context_layout.rows, hidden], borrowed, and
   * where its gradient goes. NULL without. */
  const double *context;
  attn_layout context_layout;
  oracle_cross_mixer *cross_oracle;
  double *d_context;
} test_layer;

/* A layer with random parameters of sizes that make every part of the mixer matter; they are the
 * same for each dtype before rounding. Parameters have gradients when `trains`. Only the library's
 * errors are returned, so that allocations may be made to fail; destroy it in any case. */
attn_status test_layer_create(test_layer *layer, const attn_mixer *mixer,
                              const attn_mixer_options *options, attn_dtype compute, bool trains);
void test_layer_destroy(test_layer *layer);
/* New values for parameter i, rounded to what the layer holds. */
attn_status test_layer_set(test_layer *layer, int i, const double *values);
/* The index of a parameter by its name. */
int test_layer_find(const test_layer *layer, const char *name);

/* count numbers as the compute dtype rounds them; malloc'd. */
double *test_rounded(attn_dtype dtype, const double *x, int64_t count);
/* count normal numbers, rounded; malloc'd. */
double *test_inputs(const test_layer *layer, int64_t count, uint64_t seed);

/* y [rows, hidden] of x [rows, hidden]. */
attn_status test_layer_forward(const test_layer *layer, const attn_layout *layout, const double *x,
                               double *y);
/* The same continuing from `state`, which takes the rows if all went well. */
attn_status test_layer_continue(const test_layer *layer, attn_state *state, int64_t rows,
                                const double *x, double *y);
/* Gradients of sum(r (.) y) for x and all parameters, into arrays of their sizes. */
attn_status test_layer_gradients(const test_layer *layer, const attn_layout *layout,
                                 const double *x, const double *r, double *dx,
                                 double *const *d_parameters);
/* y by the oracle, each sequence of the layout for itself. */
void test_layer_oracle(const test_layer *layer, const attn_layout *layout, const double *x,
                       const double *const *parameters, double *y);

int64_t test_parameter_count(const test_layer *layer, int i);
/* One array a parameter, zeroed; freed together. */
void test_parameters_alloc(const test_layer *layer, double *arrays[ATTN_MIXER_PARAMETERS]);
void test_parameters_free(const test_layer *layer, double *arrays[ATTN_MIXER_PARAMETERS]);

/* The relative error that a correct layer may have against the oracle at these inputs, of which the
 * oracle makes `expected`.
 *
 * float64: a fixed 1e-10, some 10^5 roundings of 2^-53 of which each may be amplified. Else it is
 * measured: how far the oracle's own result moves when every input and every weight is moved by a
 * random part of one rounding of the dtype that holds it. A layer rounds about ten intermediate
 * results like that (projections, convolution, activation, norms, rotation, attention, gate), whose
 * errors add like independent ones, sqrt(10), and may each matter twice as much as the inputs'. At
 * least one rounding: that of y. */
/* Of one operation, relative: 2^-9 is bfloat16's rounding; float32's exponentials and the sums of a
 * hundred products are good to 2e-7 (kernels/rows.h), three times its rounding. */
double test_operation_error(attn_dtype dtype);
/* x, and all parameters, moved like that; malloc'd. */
double *test_moved_inputs(const test_layer *layer, const double *x, int64_t count);
void test_moved_parameters(const test_layer *layer, double *parameters[ATTN_MIXER_PARAMETERS]);
#define TEST_FLOAT64_ERROR       1e-10
#define TEST_ROUNDINGS_IN_LAYERS 8
double test_layer_tolerance(const test_layer *layer, const attn_layout *layout, const double *x,
                            const double *expected);

/* An empty state of the layer. */
attn_status test_state_create(const test_layer *layer, int64_t capacity, int64_t sharers,
                              const attn_state *family, attn_state **state);

/* ||a - b|| / ||b|| <= limit, else fails naming the case and `what`. */
void test_assert_close(const test_layer *layer, const char *what, const double *a, const double *b,
                       int64_t count, double limit);
void test_assert_same_bits(const test_layer *layer, const char *what, const double *a,
                           const double *b, int64_t count);
/* Describes the case that runs: "gla, odd sizes, float32, avx2". */
const char *test_case_name(const test_layer *layer);

#endif
