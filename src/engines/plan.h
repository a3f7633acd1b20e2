/* What every engine's plan begins with, and the wisdom that planning by measurement keeps. */
#ifndef ATTN_ENGINES_PLAN_H
#define ATTN_ENGINES_PLAN_H

#include "attn/plan.h"
#include "kernels/kernels.h"
#include "tensor/device.h"

typedef enum attn_engine { ATTN_ENGINE_SOFTMAX, ATTN_ENGINE_RECURRENT } attn_engine;

/* The first member of an engine's plan struct. */
struct attn_plan {
  attn_engine engine;
  attn_plan_info info;
  const attn_kernels *kernels; /* the table of the path that was current when the plan was made */
  int threads;                 /* that the plan was made for; execution uses no more */
  attn_gpu *gpu;               /* of a plan for a GPU, else NULL */
  attn_cuda_choice choice[2];  /* what the CUDA module chose: forward, backward */
};

static inline attn_cuda_choice *attn_plan_choice(attn_plan *plan, attn_pass pass) {
  return &plan->choice[pass == ATTN_PASS_BACKWARD];
}
/* Whether a tensor lies where the plan runs. */
static inline bool attn_plan_has_device(const attn_plan *plan, const attn_tensor *tensor) {
  bool on_gpu = attn_is_cuda(tensor->device);
  return on_gpu == (plan->gpu != NULL) &&
         (!on_gpu || tensor->device.index == plan->gpu->device.index);
}

/* Wisdom: a map from a key (engine, problem, path, threads; no tab or newline, at most 1024
 * characters; the processor is added to it) to a few integers. Thread-safe. Recording keeps it for
 * this process; attn_wisdom_save writes it to the file. */
enum { ATTN_WISDOM_VALUES = 4 };
bool attn_wisdom_lookup(const char *key, int64_t values[ATTN_WISDOM_VALUES]);
attn_status attn_wisdom_record(const char *key, const int64_t values[ATTN_WISDOM_VALUES]);
/* Drops what is in memory, so that the file is read again when next needed. */
void attn_wisdom_reload(void);

/* Seconds of a monotonic clock, for measuring candidates. */
double attn_seconds(void);

#endif
