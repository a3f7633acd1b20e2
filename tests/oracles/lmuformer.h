/* LMUFormer in float64, whole sequences, written from its equations (arXiv 2402.04882) by straight
 * loops, with running statistics; nothing here is shared with the library but the mixer's options.
 */
#ifndef ATTN_ORACLES_LMUFORMER_H
#define ATTN_ORACLES_LMUFORMER_H

#include "oracles/mixers.h"

typedef struct oracle_lmuformer {
  int64_t input, hidden, width, classes, layers;
  int spiking;
  double epsilon;
  attn_mixer_options mixer;
  /* The values of a parameter by its name; those of a layer's mixer in its order. */
  const double *(*values)(void *context, const char *name);
  const double *const *(*mixer_values)(void *context, int64_t layer);
  void *context;
} oracle_lmuformer;

/* scores [classes] of one sequence x [rows, input] */
void oracle_lmuformer_scores(const oracle_lmuformer *o, int64_t rows, const double *x,
                             double *scores);

#endif
