/* Planning: checks the problem, chooses the block and the split, sizes the workspace.
 *
 * Block size C by estimate. A token costs 2 C (dim + value_dim) operations of which half is masked,
 * plus 4 dim value_dim for the state, plus the state's conversion for the products, dim value_dim /
 * C; the delta rule adds a triangular inverse, C^2 / 3, and runs best at 64; decays per channel add
 * work in proportion to the number of secondary blocks before a row, best at 64.
 *
 * Backward keeps the states of one segment of blocks and one checkpoint a segment: with B blocks a
 * sequence and segments of sqrt(B) blocks, 2 sqrt(B) states for each thread and value head of a
 * group; up to SINGLE_SEGMENT blocks, one segment. */
#include "engines/recurrent/recurrent.h"
#include "base/memory.h"
#include "base/status.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { SINGLE_SEGMENT = 64 };

static const char *const decay_names[] = {"no decay", "decay per head", "decay per token",
                                          "decay per channel"};

typedef struct range {
  const char *name;
  int64_t value, low, high;
} range;

static attn_status check_ranges(const attn_recurrent_problem *p) {
  const range ranges[] = {
      {"passes", p->passes, 1, ATTN_PASS_FORWARD | ATTN_PASS_BACKWARD},
      {"batch", p->batch, 1, INT32_MAX},
      {"length", p->length, 0, (int64_t)1 << 40},
      {"heads", p->heads, 1, INT32_MAX},
      {"value_heads", p->value_heads, 1, INT32_MAX},
      {"dim", p->dim, 1, RECURRENT_MAX_DIM},
      {"value_dim", p->value_dim, 1, RECURRENT_MAX_DIM},
      {"block", p->block, 0, RECURRENT_MAX_BLOCK},
      {"decay", (int64_t)p->decay, ATTN_DECAY_NONE, ATTN_DECAY_CHANNEL},
      {"update", (int64_t)p->update, ATTN_UPDATE_ADDITIVE, ATTN_UPDATE_DELTA},
      {"planning", (int64_t)p->planning, ATTN_PLAN_ESTIMATE, ATTN_PLAN_MEASURE},
  };
  for (size_t i = 0; i < sizeof ranges / sizeof *ranges; ++i)
    if (ranges[i].value < ranges[i].low || ranges[i].value > ranges[i].high)
      return attn_fail(ATTN_INVALID_ARGUMENT, "recurrent: %s is %lld, expected %lld to %lld",
                       ranges[i].name, (long long)ranges[i].value, (long long)ranges[i].low,
                       (long long)ranges[i].high);
  return ATTN_OK;
}

static attn_status check_problem(const attn_recurrent_problem *p) {
  bool half = p->dtype == ATTN_F16 && attn_is_cuda(p->device);
  if (p->dtype != ATTN_F64 && p->dtype != ATTN_F32 && p->dtype != ATTN_BF16 && !half)
    return attn_fail(ATTN_UNSUPPORTED,
                     "recurrent: dtype is %s, expected float64, float32 or bfloat16",
                     (unsigned)p->dtype < ATTN_DTYPE_COUNT ? attn_dtype_name(p->dtype) : "unknown");
  ATTN_TRY(check_ranges(p));
  if (p->value_heads % p->heads)
    return attn_fail(ATTN_INVALID_SHAPE,
                     "recurrent: value_heads is %lld, expected a multiple of heads, %lld",
                     (long long)p->value_heads, (long long)p->heads);
  if (!isfinite(p->scale))
    return attn_fail(ATTN_INVALID_ARGUMENT, "recurrent: scale is %g, expected a finite number",
                     p->scale);
  if (!isfinite(p->epsilon) || p->epsilon < 0)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "recurrent: epsilon is %g, expected a finite number of at least 0",
                     p->epsilon);
  /* largest tensor, in bytes of float64, must be addressable */
  double elements = (double)p->batch * (double)p->value_heads * RECURRENT_MAX_DIM *
                    ((double)p->length + RECURRENT_MAX_DIM);
  if (elements * 8 > 0x1p62)
    return attn_fail(ATTN_INVALID_SHAPE,
                     "recurrent: batch %lld x length %lld x value_heads %lld is too large",
                     (long long)p->batch, (long long)p->length, (long long)p->value_heads);
  return ATTN_OK;
}

/* Copies what the caller's version of the struct has and fills in defaults. */
static attn_status read_problem(const attn_recurrent_problem *problem,
                                attn_recurrent_problem *own) {
  if (!problem) return attn_fail(ATTN_INVALID_ARGUMENT, "recurrent: problem is NULL");
  if (problem->struct_size < offsetof(attn_recurrent_problem, planning) ||
      problem->struct_size > sizeof *own)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "recurrent: problem.struct_size is %zu, expected %zu (use "
                     "ATTN_RECURRENT_PROBLEM_INIT)",
                     problem->struct_size, sizeof *own);
  memset(own, 0, sizeof *own);
  memcpy(own, problem, problem->struct_size);
  ATTN_TRY(check_problem(own));
  if (own->scale == 0) own->scale = 1;
  if (own->epsilon == 0) own->epsilon = 1e-6;
  return ATTN_OK;
}

static int64_t estimate_block(const attn_recurrent_problem *p) {
  bool small =
      p->update == ATTN_UPDATE_DELTA || p->decay == ATTN_DECAY_CHANNEL || p->dtype != ATTN_BF16;
  int64_t block = small ? 64 : 128;
  int64_t length = attn_round_up(p->length > 0 ? p->length : 1, ATTN_SUBBLOCK);
  return attn_min(block, length);
}

/* bfloat16 without bfloat16 tiles multiplies in float32. (The generic path takes the form of AMX,
 * so that it runs everywhere.) */
static const recurrent_work *choose_work(const attn_recurrent_problem *p, attn_kernel_path path) {
  if (p->dtype == ATTN_F64) return &attn_recurrent_work_f64;
  if (p->dtype == ATTN_F32) return &attn_recurrent_work_f32;
  bool wide = path == ATTN_PATH_AVX2 || path == ATTN_PATH_AVX512;
  return wide ? &attn_recurrent_work_bf16_wide : &attn_recurrent_work_bf16;
}

static attn_status choose_block(recurrent_plan *plan) {
  const attn_recurrent_problem *p = &plan->problem;
  plan->block = p->block ? p->block : estimate_block(p);
  if (p->block || p->length <= RECURRENT_STEP_TOKENS) return ATTN_OK;
  return attn_recurrent_measured_block(p, plan->base.kernels->path, plan->base.threads,
                                       &plan->block);
}

/* Slices of the value dimension are worth it when heads alone leave threads idle: each repeats the
 * scores, so no more than that, and at least two panels wide. The normaliser belongs to one unit.
 */
static int64_t choose_slices(const attn_recurrent_problem *p, int threads) {
  int64_t units = p->batch * p->value_heads, widest = p->value_dim / (2 * ATTN_PANEL);
  if (p->normalise || units >= threads || widest < 2) return 1;
  return attn_min((threads + units - 1) / units, widest);
}

static void choose_segments(recurrent_plan *plan) {
  int64_t blocks = (plan->problem.length + plan->block - 1) / plan->block;
  if (blocks < 1) blocks = 1;
  plan->segment = blocks <= SINGLE_SEGMENT ? blocks : (int64_t)ceil(sqrt((double)blocks));
  plan->segments = (blocks + plan->segment - 1) / plan->segment;
}

size_t attn_recurrent_heads_bytes(const recurrent_plan *plan) {
  size_t group = (size_t)(plan->problem.value_heads / plan->problem.heads);
  return (group * sizeof(recurrent_head) + 63) / 64 * 64;
}

static attn_status size_workspace(recurrent_plan *plan) {
  const attn_recurrent_problem *p = &plan->problem;
  size_t threads = (size_t)plan->base.threads, forward = 0, backward = 0;
  plan->forward_scratch = plan->work->forward_scratch(plan);
  if (p->passes & ATTN_PASS_FORWARD) forward = threads * plan->forward_scratch;
  if (p->passes & ATTN_PASS_BACKWARD) {
    double states = (double)(p->value_heads / p->heads) * (double)(plan->segment + plan->segments);
    double bytes = states * RECURRENT_MAX_DIM * (RECURRENT_MAX_DIM + 1) * 8 * (double)threads;
    if (bytes > 0x1p60)
      return attn_fail(ATTN_INVALID_SHAPE,
                       "recurrent: length %lld with %lld value heads a head needs too much memory",
                       (long long)p->length, (long long)(p->value_heads / p->heads));
    plan->backward_scratch = plan->work->backward_scratch(plan) + attn_recurrent_heads_bytes(plan);
    backward = threads * plan->backward_scratch;
    if (p->decay == ATTN_DECAY_HEAD)
      backward += (size_t)(p->batch * p->value_heads) * sizeof(double);
  }
  plan->base.info.workspace_bytes = forward > backward ? forward : backward;
  return ATTN_OK;
}

/* Operations and bytes of the recurrence itself, for `length` tokens in every sequence. Forward: a
 * write and a read of the state, with the delta rule one more read; each 2 dim value_dim. Backward:
 * states again, dq, dk, dv and the gradient of the state; with the delta rule three products more.
 */
static void count_work(recurrent_plan *plan) {
  const attn_recurrent_problem *p = &plan->problem;
  bool delta = p->update == ATTN_UPDATE_DELTA;
  double tokens = (double)p->batch * (double)p->length, heads = (double)p->value_heads;
  double product = 2 * tokens * heads * (double)p->dim * (double)p->value_dim;
  double element = (double)attn_dtype_size(p->dtype), real = p->dtype == ATTN_F64 ? 8 : 4;
  double keys = tokens * (double)p->heads * (double)p->dim * element;
  double values = tokens * heads * (double)p->value_dim * element;
  double gates = delta ? tokens * heads * real : 0;
  double states = (double)p->batch * heads * (double)p->dim * (double)p->value_dim * real;
  if (p->decay == ATTN_DECAY_HEAD) gates += heads * real;
  if (p->decay == ATTN_DECAY_TOKEN) gates += tokens * heads * real;
  if (p->decay == ATTN_DECAY_CHANNEL) gates += tokens * heads * (double)p->dim * real;
  attn_plan_info *info = &plan->base.info;
  if (p->passes & ATTN_PASS_FORWARD) {
    info->flops += product * (delta ? 3 : 2);
    info->bytes += 2 * keys + 2 * values + gates + 2 * states;
  }
  if (p->passes & ATTN_PASS_BACKWARD) {
    info->flops += product * (delta ? 8 : 5);
    info->bytes += 4 * keys + 3 * values + 2 * gates + 3 * states;
  }
}

static void describe(recurrent_plan *plan) {
  const attn_recurrent_problem *p = &plan->problem;
  attn_plan_info *info = &plan->base.info;
  info->path = plan->base.kernels->path;
  if (p->passes == ATTN_PASS_FORWARD && p->length <= plan->step_tokens)
    snprintf(info->description, sizeof info->description,
             "recurrent %s, %s, %s%s: token by token, %lld slices, %d threads, path %s",
             attn_dtype_name(p->dtype), decay_names[p->decay],
             p->update == ATTN_UPDATE_DELTA ? "delta rule" : "additive",
             p->normalise ? ", normalised" : "", (long long)plan->slices, plan->base.threads,
             attn_kernel_path_name(info->path));
  else
    snprintf(info->description, sizeof info->description,
             "recurrent %s, %s, %s%s: blocks of %lld, %lld slices, %d threads, path %s; backward "
             "keeps %lld + %lld states",
             attn_dtype_name(p->dtype), decay_names[p->decay],
             p->update == ATTN_UPDATE_DELTA ? "delta rule" : "additive",
             p->normalise ? ", normalised" : "", (long long)plan->block, (long long)plan->slices,
             plan->base.threads, attn_kernel_path_name(info->path), (long long)plan->segment,
             (long long)plan->segments);
}

/* Lets the CUDA module choose for each pass. */
static attn_status plan_on_gpu(recurrent_plan *plan) {
  const attn_recurrent_problem *p = &plan->problem;
  attn_plan *base = &plan->base;
  base->gpu = attn_gpu_open(p->device.index);
  if (!base->gpu) return ATTN_UNSUPPORTED;
  static const attn_pass passes[] = {ATTN_PASS_FORWARD, ATTN_PASS_BACKWARD};
  for (int i = 0; i < 2; ++i) {
    attn_cuda_choice *choice = attn_plan_choice(base, passes[i]);
    if (!(p->passes & (int)passes[i])) continue;
    ATTN_TRY(attn_gpu_check(
        base->gpu, base->gpu->cuda->recurrent_plan(&base->gpu->device, p, passes[i], choice)));
    if (choice->workspace_bytes > base->info.workspace_bytes)
      base->info.workspace_bytes = choice->workspace_bytes;
  }
  snprintf(base->info.description, sizeof base->info.description,
           "recurrent %s, %s, %s on %.64s: %s", attn_dtype_name(p->dtype), decay_names[p->decay],
           p->update == ATTN_UPDATE_DELTA ? "delta rule" : "additive", base->gpu->device.name,
           base->choice[p->passes == ATTN_PASS_BACKWARD].description);
  return ATTN_OK;
}

static attn_status plan_on_cpu(recurrent_plan *plan) {
  const attn_recurrent_problem *p = &plan->problem;
  plan->work = choose_work(p, plan->base.kernels->path);
  plan->step_tokens = p->block ? 0 : RECURRENT_STEP_TOKENS;
  plan->slices = choose_slices(p, plan->base.threads);
  ATTN_TRY(choose_block(plan));
  choose_segments(plan);
  ATTN_TRY(size_workspace(plan));
  describe(plan);
  return ATTN_OK;
}

attn_status attn_recurrent_plan(const attn_recurrent_problem *problem, attn_plan **result) {
  if (!result) return attn_fail(ATTN_INVALID_ARGUMENT, "recurrent: plan is NULL");
  *result = NULL;
  attn_recurrent_problem own;
  ATTN_TRY(read_problem(problem, &own));
  recurrent_plan *plan = attn_alloc_zero(sizeof *plan);
  if (!plan) return ATTN_OUT_OF_MEMORY;
  plan->base.engine = ATTN_ENGINE_RECURRENT;
  plan->base.kernels = attn_kernels_get();
  plan->base.threads = attn_get_threads();
  plan->problem = own;
  attn_status status = attn_is_cuda(own.device) ? plan_on_gpu(plan) : plan_on_cpu(plan);
  if (status != ATTN_OK) {
    attn_free(plan);
    return status;
  }
  count_work(plan);
  *result = &plan->base;
  return ATTN_OK;
}
