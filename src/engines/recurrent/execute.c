/* Runs a plan: spreads (sequence, head, slice) over threads. */
#include "engines/recurrent/recurrent.h"
#include "base/status.h"

#include <omp.h>
#include <string.h>

/* Below this many multiplications a second thread costs more than it saves: starting one takes a
 * few microseconds, in which one core does some 10^5 of them. */
enum { WORTH_A_THREAD = 1 << 17 };

static attn_status check_plan(const attn_plan *plan, const attn_recurrent_args *args,
                              attn_pass pass) {
  if (!plan || !args)
    return attn_fail(ATTN_INVALID_ARGUMENT, "recurrent: %s is NULL", plan ? "args" : "plan");
  if (plan->engine != ATTN_ENGINE_RECURRENT)
    return attn_fail(ATTN_INVALID_ARGUMENT, "recurrent: the plan belongs to another engine");
  const recurrent_plan *own = (const recurrent_plan *)plan;
  if (!(own->problem.passes & (int)pass))
    return attn_fail(ATTN_INVALID_ARGUMENT, "recurrent: the plan was made without the %s pass",
                     pass == ATTN_PASS_FORWARD ? "forward" : "backward");
  return ATTN_OK;
}

static int threads_for(const recurrent_plan *plan, int64_t units) {
  const attn_recurrent_problem *p = &plan->problem;
  double work = (double)p->batch * (double)p->value_heads * (double)p->dim * (double)p->value_dim *
                (double)p->length;
  int64_t useful = work / WORTH_A_THREAD > 1e6 ? 1000000 : (int64_t)(work / WORTH_A_THREAD);
  return (int)attn_min(attn_min(plan->base.threads, units), useful > 1 ? useful : 1);
}

static void forward_one(const recurrent_plan *plan, const attn_recurrent_args *args, int64_t unit,
                        void *scratch) {
  const attn_recurrent_problem *problem = &plan->problem;
  int64_t slice = unit % plan->slices, head = unit / plan->slices;
  /* slices in whole panels of columns */
  int64_t panels = attn_panels(problem->value_dim);
  int64_t first = panels * slice / plan->slices * ATTN_PANEL;
  int64_t end = attn_min(panels * (slice + 1) / plan->slices * ATTN_PANEL, problem->value_dim);
  recurrent_head found;
  attn_recurrent_find_head(plan, args, ATTN_PASS_FORWARD, head / problem->value_heads,
                           head % problem->value_heads, &found);
  plan->work->forward(plan, &found, first, end - first, scratch);
}

static attn_status run_on_gpu(const recurrent_plan *plan, const attn_recurrent_args *args,
                              attn_pass pass, void *workspace) {
  const attn_plan *base = &plan->base;
  const attn_cuda_choice *choice = &base->choice[pass == ATTN_PASS_BACKWARD];
  return attn_gpu_check(
      base->gpu, base->gpu->cuda->recurrent_run(&base->gpu->device, choice, &plan->problem, pass,
                                                args, workspace, attn_gpu_stream(base->gpu)));
}

attn_status attn_recurrent_forward(const attn_plan *base, const attn_recurrent_args *args,
                                   void *workspace) {
  ATTN_TRY(check_plan(base, args, ATTN_PASS_FORWARD));
  const recurrent_plan *plan = (const recurrent_plan *)base;
  ATTN_TRY(attn_recurrent_check(plan, args, ATTN_PASS_FORWARD, workspace));
  if (base->gpu) return run_on_gpu(plan, args, ATTN_PASS_FORWARD, workspace);
  int64_t units = plan->problem.batch * plan->problem.value_heads * plan->slices;
  int threads = threads_for(plan, units);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    void *scratch = (char *)workspace + (size_t)omp_get_thread_num() * plan->forward_scratch;
    base->kernels->begin();
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < units; ++unit) forward_one(plan, args, unit, scratch);
    base->kernels->end();
  }
  return ATTN_OK;
}

/* Where the gradient of a constant decay of one sequence and head goes before it is summed. */
static char *partial_decay(const recurrent_plan *plan, void *workspace, int64_t sequence,
                           int64_t head) {
  size_t size = plan->problem.dtype == ATTN_F64 ? sizeof(double) : sizeof(float);
  return (char *)workspace + (size_t)plan->base.threads * plan->backward_scratch +
         (size_t)(sequence * plan->problem.value_heads + head) * size;
}

static void backward_one(const recurrent_plan *plan, const attn_recurrent_args *args, int64_t unit,
                         void *workspace, char *scratch) {
  const attn_recurrent_problem *problem = &plan->problem;
  int64_t group = problem->value_heads / problem->heads;
  int64_t sequence = unit / problem->heads, first = unit % problem->heads * group;
  recurrent_head *heads = (recurrent_head *)scratch;
  for (int64_t h = 0; h < group; ++h) {
    attn_recurrent_find_head(plan, args, ATTN_PASS_BACKWARD, sequence, first + h, heads + h);
    if (problem->decay == ATTN_DECAY_HEAD && heads[h].d_decay.data)
      heads[h].d_decay.data = partial_decay(plan, workspace, sequence, first + h);
  }
  plan->work->backward(plan, heads, group, scratch + attn_recurrent_heads_bytes(plan));
}

/* d_decay[h] = sum over sequences, in their order. */
static void sum_decay(const recurrent_plan *plan, const attn_recurrent_args *args,
                      void *workspace) {
  const attn_recurrent_problem *problem = &plan->problem;
  for (int64_t h = 0; h < problem->value_heads; ++h) {
    double sum = 0;
    for (int64_t b = 0; b < problem->batch; ++b) {
      const char *part = partial_decay(plan, workspace, b, h);
      sum += problem->dtype == ATTN_F64 ? *(const double *)part : *(const float *)part;
    }
    int64_t at = h * args->d_decay.stride[0];
    if (problem->dtype == ATTN_F64)
      ((double *)args->d_decay.data)[at] = sum;
    else
      ((float *)args->d_decay.data)[at] = (float)sum;
  }
}

attn_status attn_recurrent_backward(const attn_plan *base, const attn_recurrent_args *args,
                                    void *workspace) {
  ATTN_TRY(check_plan(base, args, ATTN_PASS_BACKWARD));
  const recurrent_plan *plan = (const recurrent_plan *)base;
  ATTN_TRY(attn_recurrent_check(plan, args, ATTN_PASS_BACKWARD, workspace));
  if (base->gpu) return run_on_gpu(plan, args, ATTN_PASS_BACKWARD, workspace);
  int64_t units = plan->problem.batch * plan->problem.heads;
  int threads = threads_for(plan, units);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    char *scratch = (char *)workspace + (size_t)omp_get_thread_num() * plan->backward_scratch;
    base->kernels->begin();
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < units; ++unit) backward_one(plan, args, unit, workspace, scratch);
    base->kernels->end();
  }
  if (plan->problem.decay == ATTN_DECAY_HEAD && args->d_decay.data)
    sum_decay(plan, args, workspace);
  return ATTN_OK;
}
