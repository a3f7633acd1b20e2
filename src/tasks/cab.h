/* Figures that CAB judges attentions by (Comprehensive Attention Benchmarking, arXiv 2210.07661):
 * the compositional index, which merges metrics of different units, and the efficiency length,
 * from which on a mechanism is cheaper than exact attention.
 *
 * The index: each metric x of a task becomes z = +-(x - mean) / deviation, + where more is better;
 * a task's score is the mean of its metrics' z, a pattern's index the mean of its tasks' scores. */
#ifndef ATTN_TASKS_CAB_H
#define ATTN_TASKS_CAB_H

#include "attn/base.h"

#include <jansson.h>

typedef enum attn_cab_pattern {
  ATTN_CAB_NS = 0, /* non-causal self-attention */
  ATTN_CAB_CS,     /* causal self-attention */
  ATTN_CAB_NC,     /* non-causal cross-attention */
  ATTN_CAB_CC,     /* causal cross-attention: queries arrive one by one, keys are complete */
  ATTN_CAB_PATTERNS
} attn_cab_pattern;
extern const char *const attn_cab_pattern_names[]; /* "NS" .. "CC" */

/* Metrics of one task stand side by side. */
typedef struct attn_cab_metric {
  attn_cab_pattern pattern;
  const char *task, *name;
  bool higher; /* is better */
  double mean, deviation;
} attn_cab_metric;

enum { ATTN_CAB_METRICS = 64 };
/* Those of CAB, with the constants of its script. */
extern const attn_cab_metric attn_cab_published[];
extern const int attn_cab_published_count;

typedef struct attn_cab_row {
  const char *name;                /* of the attention */
  double values[ATTN_CAB_METRICS]; /* NaN: not measured */
} attn_cab_row;

typedef struct attn_cab {
  attn_cab_metric metrics[ATTN_CAB_METRICS];
  attn_cab_row *rows;
  int metric_count, row_count;
  int baseline; /* the row that the others are compared with */
  json_t *file; /* names lie in it */
} attn_cab;

/* Reads a table of metrics (docs/tasks.md says how it is written). It keeps a reference to `file`.
 * ATTN_BAD_FORMAT names what is missing or does not fit; *cab needs no closing then. Metrics
 * without constants get mean and deviation (n - 1 in the denominator) over the rows. */
attn_status attn_cab_read(json_t *file, attn_cab *cab);
attn_status attn_cab_load(const char *path, attn_cab *cab);
void attn_cab_close(attn_cab *cab);

/* z of a value; 0 where the compared attentions do not differ. */
double attn_cab_score(const attn_cab_metric *metric, double value);
/* The task that metric `first` begins: one past its last metric. */
int attn_cab_task_end(const attn_cab *cab, int first);
/* Mean z over that task's metrics, and over the tasks of a pattern; NaN where one is missing. */
double attn_cab_task_score(const attn_cab *cab, const attn_cab_row *row, int first);
double attn_cab_index(const attn_cab *cab, const attn_cab_row *row, attn_cab_pattern pattern);

/* efficiency_length.c ----------------------------------------------------------------------------
 * Costs (time, memory) at `count` lengths N: of exact attention, fitted by least squares as a N^2 +
 * b N + c, and of another mechanism, fitted as d N + e. `length` is where the curves cross last:
 * beyond it exact attention is dearer. 0: it is dearer at every length; NaN: nowhere, its cost does
 * not grow faster (its curvature makes less than a thousandth of it). Needs 3 lengths, ascending.
 * ATTN_INVALID_ARGUMENT otherwise. */
typedef struct attn_efficiency {
  double a, b, c, d, e, length;
} attn_efficiency;
attn_status attn_efficiency_length(const double *lengths, const double *exact, const double *other,
                                   int count, attn_efficiency *result);
/* The mean of the values between the quartiles. Sorted values, at least one. */
double attn_middle_mean(const double *sorted, int count);

#endif
