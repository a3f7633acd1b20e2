/* attn bench, in parts: what is measured (bench_operators.c), checking and timing
 * (bench_measure.c; of whole layers bench_layer.c; both with bench_timer.c), reports
 * (bench_report.c), efficiency lengths (bench_length.c). */
#ifndef ATTN_CLI_BENCH_H
#define ATTN_CLI_BENCH_H

#include "cli/cli.h"

/* Operators -------------------------------------------------------------------------------------
 * An engine with the settings of one mixer; q, k, v and gates are projected already. Mixers that
 * are more than one engine are measured as layers only. */

typedef struct attn_bench_operator {
  const char *name; /* of the mixer */
  bool recurrent;   /* the recurrent engine, else softmax; of layers: the state does not grow */
  attn_decay decay;
  attn_update update;
  bool layer;  /* there is a layer, but no operator */
  bool groups; /* a layer takes fewer heads of keys and values than of queries */
} attn_bench_operator;

extern const attn_bench_operator attn_bench_operators[]; /* those with an operator first */
extern const int attn_bench_operator_count, attn_bench_layer_count; /* the latter of all */

typedef enum attn_bench_pass {
  ATTN_BENCH_FORWARD = 0,
  ATTN_BENCH_BACKWARD,
  ATTN_BENCH_STEP, /* one more token behind `length` of them */
} attn_bench_pass;

extern const char *const attn_bench_passes[]; /* their names, then NULL */

typedef struct attn_bench_case {
  const attn_bench_operator *op;
  attn_bench_pass pass;
  attn_dtype dtype;
  attn_planning planning;
  attn_device device;
  int64_t batch, length, heads, kv_heads, dim;
} attn_bench_case;

/* The tensors of one execution, by their part in it. */
typedef enum attn_bench_role {
  ROLE_Q = 0,
  ROLE_K,
  ROLE_V,
  ROLE_O,
  ROLE_LSE,
  ROLE_DECAY,
  ROLE_BETA,
  ROLE_STATE,
  ROLE_FINAL,
  ROLE_D_O,
  ROLE_D_Q,
  ROLE_D_K,
  ROLE_D_V,
  ROLE_D_DECAY,
  ROLE_D_BETA,
  ROLES
} attn_bench_role;

typedef struct attn_bench_set {
  attn_tensor tensor[ROLES]; /* data is NULL where the case has none */
} attn_bench_set;

/* All tensors of a case; inputs are zero. */
attn_status attn_bench_set_create(const attn_bench_case *c, attn_bench_set *set);
void attn_bench_set_destroy(attn_bench_set *set);
int64_t attn_bench_set_bytes(const attn_bench_case *c);
/* Whether the pass writes it. */
bool attn_bench_is_output(const attn_bench_case *c, attn_bench_role role);
/* Fresh random inputs in the range that each has in a model. */
attn_status attn_bench_fill(const attn_bench_case *c, attn_bench_set *set, uint64_t seed);
attn_status attn_bench_fill_one(const attn_bench_case *c, attn_bench_set *set, attn_bench_role role,
                                uint64_t seed);

typedef struct attn_bench_ready {
  attn_plan *plan, *forward; /* forward: what backward needs first; else NULL */
  attn_plan_info info;
  void *workspace;
  size_t workspace_bytes;
  attn_device device; /* where the workspace is */
} attn_bench_ready;

attn_status attn_bench_prepare(const attn_bench_case *c, attn_bench_ready *ready);
void attn_bench_dispose(attn_bench_ready *ready);
/* Backward: computes o and lse. Nothing for the other passes. */
attn_status attn_bench_run_before(const attn_bench_case *c, const attn_bench_ready *ready,
                                  attn_bench_set *set);
/* in_place: a step's state is read and written in the same memory, as decoding does. */
attn_status attn_bench_run(const attn_bench_case *c, const attn_bench_ready *ready,
                           attn_bench_set *set, bool in_place);

/* The machine's limits (kernels/peak.h). */
typedef struct attn_bench_limits {
  double bf16_flops, f32_flops; /* per second, all threads */
  double copy_bytes;            /* per second, read plus written */
} attn_bench_limits;

/* Sets both rates of arithmetic. quiet: of moments in which nobody disturbs, and never less than
 * they are. */
void attn_bench_measure_rates(attn_bench_limits *limits, bool quiet);

/* The same of a GPU, copying included (bench_gpu.c); and, for timing, executions that are queued
 * one behind the other: how many make up a time long enough to be measured. */
attn_status attn_bench_measure_gpu(attn_device device, attn_bench_limits *limits);
int64_t attn_bench_gpu_repeats(double seconds);

/* Measuring -------------------------------------------------------------------------------------
 */

typedef struct attn_bench_row {
  attn_bench_case c;
  double seconds;    /* the median; the fastest where all were disturbed */
  double middle;     /* the mean of the middle half of them */
  int64_t repeats;   /* timed executions */
  int64_t disturbed; /* executions that did not count */
  double error;      /* relative to float64 */
  double extra;      /* bytes beside inputs and outputs */
  double tokens;     /* per second */
  double flops, bytes;
  double peak;             /* operations a second that the dtype allowed, measured beside it */
  double of_peak, of_copy; /* fractions of the limits; NaN where there is none */
  char plan[256];
} attn_bench_row;

enum { ATTN_BENCH_MOST_TIMES = 2000 };

/* Usage: with .seconds to spend, while (attn_bench_timer_begin(&t)) { execute; ..._end(&t); } */
typedef struct attn_bench_timer {
  double seconds;
  bool quiet; /* an execution counts when the processors are left alone before and after it */
  bool alone;
  int count, disturbed;
  double begun, start, last, busy, fastest_disturbed;
  double times[ATTN_BENCH_MOST_TIMES];
} attn_bench_timer;

bool attn_bench_timer_begin(attn_bench_timer *t);
void attn_bench_timer_end(attn_bench_timer *t);
/* Sets seconds, repeats and disturbed; ATTN_INTERRUPTED when nothing was executed. */
attn_status attn_bench_timer_result(attn_bench_timer *t, attn_bench_row *row);

typedef struct attn_bench_effort {
  double seconds; /* for the timed executions, about */
  bool quiet;
} attn_bench_effort;

/* Checks and times one case; ATTN_INTERNAL when the result is wrong. */
attn_status attn_bench_measure(const attn_bench_case *c, const attn_bench_limits *limits,
                               const attn_bench_effort *effort, attn_bench_row *row);

/* The same for a whole layer (bench_layer.c). */
attn_status attn_bench_measure_layer(const attn_bench_case *c, const attn_bench_limits *limits,
                                     const attn_bench_effort *effort, attn_bench_row *row);
/* Fills in what follows from time, operations and bytes. */
void attn_bench_rate(attn_bench_row *row, const attn_bench_limits *limits);

/* Reports ---------------------------------------------------------------------------------------
 */

typedef struct attn_bench_report {
  attn_device device;
  attn_bench_limits limits;
  attn_bench_row *rows;
  bool layer;         /* whole layers rather than operators */
  int count, skipped; /* skipped: rows that the budget had no time for */
} attn_bench_report;

void attn_bench_print_heading(const attn_bench_report *report);
void attn_bench_print_row(const attn_bench_row *row, bool explain);
json_t *attn_bench_json(const attn_bench_report *report);
/* The lengths from which on each layer is cheaper than exact attention's (bench_length.c). */
void attn_bench_print_lengths(const attn_bench_report *report);
json_t *attn_bench_lengths_json(const attn_bench_report *report);
/* Tokens per second against length, in the terminal; nothing with fewer than two lengths, or too
 * many lines. */
attn_status attn_bench_print_chart(const attn_bench_report *report);
attn_status attn_bench_write_svg(const attn_bench_report *report, const char *path);
attn_status attn_bench_write_html(const attn_bench_report *report, const char *path);

#endif
