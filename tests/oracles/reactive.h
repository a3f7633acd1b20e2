/* The Reactive Transformer in float64, one dialogue at a time, written from its equations (arXiv
 * 2510.03561) by straight loops; nothing here is shared with the library but the options of its
 * attentions. */
#ifndef ATTN_ORACLES_REACTIVE_H
#define ATTN_ORACLES_REACTIVE_H

#include "oracles/mixers.h"

typedef struct oracle_reactive {
  int64_t vocabulary, hidden, width, layers, slots;
  double epsilon;
  int head_norm;
  const char *memory; /* "simple", "self", ... */
  const char *gate;   /* "none", "static", "elementwise", "linear" */
  int tanh_gate, learned_status;
  attn_mixer_options self, cross; /* configured */
  const double *(*values)(void *context, const char *name);
  void *context;
} oracle_reactive;

/* encoded [layers, rows, hidden] */
void oracle_reactive_encode(const oracle_reactive *o, int64_t rows, const int32_t *tokens,
                            double *encoded);
/* memory and updated [layers, slots, hidden] */
void oracle_reactive_update(const oracle_reactive *o, const double *memory, int64_t rows,
                            const double *encoded, double *updated);
/* logits [rows, vocabulary], with memory [layers, slots, hidden] of any number of slots */
void oracle_reactive_logits(const oracle_reactive *o, int64_t rows, const int32_t *tokens,
                            int64_t slots, const double *memory, double *logits);

#endif
