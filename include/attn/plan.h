/* Problem, plan, execute: what the plans of all engines have in common.
 *
 * The caller fills in a struct that describes the problem (attn_softmax_problem,
 * attn_recurrent_problem); planning checks it and picks kernels, block sizes and the algorithm;
 * executing allocates nothing. A plan is immutable, so any number of threads may execute it at the
 * same time, each with a workspace of its own. */
#ifndef ATTN_PLAN_H
#define ATTN_PLAN_H

#include "attn/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum attn_planning {
  ATTN_PLAN_ESTIMATE = 0, /* from a model of the machine, in microseconds; uses wisdom if any */
  ATTN_PLAN_MEASURE,      /* times the candidates once and remembers the best (wisdom) */
} attn_planning;

typedef enum attn_pass {
  ATTN_PASS_FORWARD = 1,
  ATTN_PASS_BACKWARD = 2,
} attn_pass;

typedef struct attn_plan attn_plan;

/* What a plan will do, for benchmarks, `--explain` and memory budgets. */
typedef struct attn_plan_info {
  size_t workspace_bytes; /* to be passed to execute, 64-byte aligned */
  double flops;           /* floating-point operations that the mathematics needs */
  double bytes;           /* the fewest bytes that must move: each input and output once */
  attn_kernel_path path;
  char description[256]; /* the chosen algorithm, block sizes and why, in one line */
} attn_plan_info;

ATTN_API void attn_plan_destroy(attn_plan *plan);
ATTN_API attn_status attn_plan_get_info(const attn_plan *plan, attn_plan_info *info);

/* Wisdom: what ATTN_PLAN_MEASURE found, kept in $ATTN_WISDOM or else
 * ${XDG_CACHE_HOME:-~/.cache}/attn/wisdom. It is read when first needed; forgetting also removes
 * the file's entries for this machine. */
ATTN_API attn_status attn_wisdom_save(void);
ATTN_API attn_status attn_wisdom_forget(void);

#ifdef __cplusplus
}
#endif
#endif
