/* The recurrent engine inside: the plan, and the work on one head of one sequence.
 *
 * Work is split over (sequence, value head, slice of the value dimension) forward, and over
 * (sequence, query head) backward, where all value heads of one query head add to the same dq, dk.
 * Each unit runs on one thread with that thread's scratch memory, so results do not depend on the
 * schedule. */
#ifndef ATTN_ENGINES_RECURRENT_H
#define ATTN_ENGINES_RECURRENT_H

#include "attn/recurrent.h"
#include "engines/plan.h"

enum {
  RECURRENT_MAX_DIM = 256,
  RECURRENT_MAX_BLOCK = 256,
  RECURRENT_STEP_TOKENS = 4, /* up to here the plain recurrence moves no more than a block would */
};

/* What is decided before execution. */
typedef struct recurrent_plan recurrent_plan;

/* A matrix of one head: rows are tokens (or key channels), `stride` elements apart. */
typedef struct recurrent_rows {
  char *data; /* NULL when absent */
  int64_t stride;
} recurrent_rows;

/* One head of one sequence. All pointers already point at it. */
typedef struct recurrent_head {
  int64_t tokens;
  recurrent_rows q, k, v, o, decay, beta;
  recurrent_rows initial_state, final_state;
  recurrent_rows initial_normaliser, final_normaliser;
  recurrent_rows d_o, d_final_state, d_final_normaliser;
  recurrent_rows d_q, d_k, d_v, d_decay, d_beta, d_initial_state, d_initial_normaliser;
} recurrent_head;

/* The work for one dtype (typed.inc). Scratch sizes are for one thread. */
typedef struct recurrent_work {
  size_t (*forward_scratch)(const recurrent_plan *plan);
  size_t (*backward_scratch)(const recurrent_plan *plan);
  /* Columns first .. first + columns - 1 of the value dimension; `head` points at column 0. */
  void (*forward)(const recurrent_plan *plan, const recurrent_head *head, int64_t first,
                  int64_t columns, void *scratch);
  /* The `group` value heads that share one query head. */
  void (*backward)(const recurrent_plan *plan, const recurrent_head *heads, int64_t group,
                   void *scratch);
} recurrent_work;

extern const recurrent_work attn_recurrent_work_f64, attn_recurrent_work_f32,
    attn_recurrent_work_bf16, attn_recurrent_work_bf16_wide;

struct recurrent_plan {
  attn_plan base;
  attn_recurrent_problem problem; /* with defaults filled in */
  const recurrent_work *work;
  int64_t block;       /* tokens */
  int64_t step_tokens; /* sequences up to this length take the plain recurrence */
  int64_t slices;      /* of the value dimension, forward */
  int64_t segment;     /* blocks whose states are kept at once, backward */
  int64_t segments;    /* of the longest sequence: one checkpoint each */
  size_t forward_scratch, backward_scratch; /* bytes of one thread */
};

/* Hands out pieces of one thread's scratch memory; with base NULL it only counts. */
typedef struct recurrent_scratch {
  char *base;
  size_t used;
} recurrent_scratch;

static inline void *attn_recurrent_take(recurrent_scratch *scratch, int64_t count, size_t size) {
  char *memory = scratch->base ? scratch->base + scratch->used : NULL;
  scratch->used += ((size_t)count * size + 63) / 64 * 64;
  return memory;
}

static inline int64_t attn_round_up(int64_t x, int64_t unit) {
  return (x + unit - 1) / unit * unit;
}
static inline int64_t attn_min(int64_t a, int64_t b) {
  return a < b ? a : b;
}

/* Checks the arguments of one call against the plan. */
attn_status attn_recurrent_check(const recurrent_plan *plan, const attn_recurrent_args *args,
                                 attn_pass pass, const void *workspace);

/* Where one value head of one sequence lies in every tensor of the pass. */
void attn_recurrent_find_head(const recurrent_plan *plan, const attn_recurrent_args *args,
                              attn_pass pass, int64_t sequence, int64_t head,
                              recurrent_head *found);

/* Changes *block, an estimate, where wisdom knows better or the problem asks to measure. */
attn_status attn_recurrent_measured_block(const attn_recurrent_problem *problem,
                                          attn_kernel_path path, int threads, int64_t *block);

/* Room for the recurrent_heads of one group at the start of a thread's backward scratch. */
size_t attn_recurrent_heads_bytes(const recurrent_plan *plan);

#endif
