/* The block size by measurement: a smaller problem of the same kind is run with each candidate, and
 * the fastest is remembered (wisdom). Blocks are independent of each other's time, so a few
 * thousand tokens on as many heads as there are threads tell what any length needs. */
#include "engines/recurrent/recurrent.h"
#include "base/memory.h"
#include "base/status.h"

#include <inttypes.h>
#include <stdio.h>

enum {
  MEASURED_TOKENS = 2048,
  REPEATS = 3,
  MAX_TENSORS = 24,
};

static const int64_t candidates[] = {32, 64, 128, 192, 256};

/* Everything that the choice depends on; lengths count by powers of two, up to where they matter.
 */
static void make_key(const attn_recurrent_problem *p, attn_kernel_path path, int threads, char *key,
                     size_t size) {
  int64_t length = 16;
  while (length < p->length && length < MEASURED_TOKENS) length *= 2;
  snprintf(key, size,
           "recurrent %s passes %d length %" PRId64 " group %" PRId64 " dim %" PRId64 " %" PRId64
           " decay %d update %d normalise %d path %s threads %d",
           attn_dtype_name(p->dtype), p->passes, length, p->value_heads / p->heads, p->dim,
           p->value_dim, (int)p->decay, (int)p->update, (int)p->normalise,
           attn_kernel_path_name(path), threads);
}

typedef struct tensors {
  attn_tensor *made[MAX_TENSORS];
  int count;
} tensors;

/* Small positive numbers (log decays: negative), so that nothing overflows in thousands of steps.
 */
static attn_status make(tensors *all, attn_tensor *tensor, attn_dtype dtype, int rank, double value,
                        const int64_t *shape) {
  ATTN_TRY(attn_tensor_create(dtype, rank, shape, tensor));
  all->made[all->count++] = tensor;
  return attn_tensor_fill(tensor, value);
}

static attn_status make_args(const attn_recurrent_problem *p, attn_recurrent_args *args,
                             tensors *all) {
  attn_dtype real = p->dtype == ATTN_F64 ? ATTN_F64 : ATTN_F32;
  int64_t keys[] = {p->batch, p->length, p->heads, p->dim};
  int64_t values[] = {p->batch, p->length, p->value_heads, p->value_dim};
  int64_t gates[] = {p->batch, p->length, p->value_heads, p->dim};
  const int decay_rank = p->decay == ATTN_DECAY_HEAD ? 1 : p->decay == ATTN_DECAY_TOKEN ? 3 : 4;
  const int64_t *decay_shape = p->decay == ATTN_DECAY_HEAD ? &p->value_heads : gates;
  ATTN_TRY(make(all, &args->q, p->dtype, 4, 0.0625, keys));
  ATTN_TRY(make(all, &args->k, p->dtype, 4, 0.0625, keys));
  ATTN_TRY(make(all, &args->v, p->dtype, 4, 0.5, values));
  ATTN_TRY(make(all, &args->o, p->dtype, 4, 0, values));
  if (p->decay != ATTN_DECAY_NONE)
    ATTN_TRY(make(all, &args->decay, real, decay_rank, -0.1, decay_shape));
  if (p->update == ATTN_UPDATE_DELTA) ATTN_TRY(make(all, &args->beta, real, 3, 0.5, gates));
  if (!(p->passes & ATTN_PASS_BACKWARD)) return ATTN_OK;
  ATTN_TRY(make(all, &args->d_o, p->dtype, 4, 0.5, values));
  ATTN_TRY(make(all, &args->d_q, p->dtype, 4, 0, keys));
  ATTN_TRY(make(all, &args->d_k, p->dtype, 4, 0, keys));
  ATTN_TRY(make(all, &args->d_v, p->dtype, 4, 0, values));
  if (p->decay > ATTN_DECAY_HEAD)
    ATTN_TRY(make(all, &args->d_decay, real, decay_rank, 0, decay_shape));
  if (p->update == ATTN_UPDATE_DELTA) ATTN_TRY(make(all, &args->d_beta, real, 3, 0, gates));
  return ATTN_OK;
}

static attn_status run_passes(const attn_plan *plan, const attn_recurrent_args *args, int passes,
                              void *workspace) {
  if (passes & ATTN_PASS_FORWARD) ATTN_TRY(attn_recurrent_forward(plan, args, workspace));
  if (passes & ATTN_PASS_BACKWARD) ATTN_TRY(attn_recurrent_backward(plan, args, workspace));
  return ATTN_OK;
}

/* The shortest of a few runs after a first one that warms the caches. */
static attn_status time_block(const attn_recurrent_problem *problem,
                              const attn_recurrent_args *args, double *seconds) {
  attn_plan *plan;
  ATTN_TRY(attn_recurrent_plan(problem, &plan));
  void *workspace = attn_alloc(plan->info.workspace_bytes);
  attn_status status = workspace ? ATTN_OK : ATTN_OUT_OF_MEMORY;
  *seconds = 1e30;
  for (int i = 0; status == ATTN_OK && i <= REPEATS; ++i) {
    double begin = attn_seconds();
    status = run_passes(plan, args, problem->passes, workspace);
    double taken = attn_seconds() - begin;
    if (i > 0 && taken < *seconds) *seconds = taken;
  }
  attn_free(workspace);
  attn_plan_destroy(plan);
  return status;
}

static attn_recurrent_problem smaller(const attn_recurrent_problem *problem, int threads) {
  attn_recurrent_problem small = *problem;
  int64_t group = problem->value_heads / problem->heads;
  small.batch = 1;
  small.length = attn_min(problem->length, MEASURED_TOKENS);
  small.heads = attn_min(problem->heads, threads);
  small.value_heads = small.heads * group;
  small.ragged = false;
  small.planning = ATTN_PLAN_ESTIMATE;
  return small;
}

static attn_status measure(const attn_recurrent_problem *problem, int threads, int64_t *block) {
  attn_recurrent_problem small = smaller(problem, threads);
  attn_recurrent_args args = {0};
  tensors all = {0};
  attn_status status = make_args(&small, &args, &all);
  double best = 1e30;
  for (size_t i = 0; status == ATTN_OK && i < sizeof candidates / sizeof *candidates; ++i) {
    double seconds;
    if (i && candidates[i - 1] >= problem->length) break; /* one block already */
    small.block = candidates[i];
    status = time_block(&small, &args, &seconds);
    if (status == ATTN_OK && seconds < best) {
      best = seconds;
      *block = candidates[i];
    }
  }
  for (int i = 0; i < all.count; ++i) attn_tensor_destroy(all.made[i]);
  return status;
}

attn_status attn_recurrent_measured_block(const attn_recurrent_problem *problem,
                                          attn_kernel_path path, int threads, int64_t *block) {
  char key[256];
  int64_t values[ATTN_WISDOM_VALUES] = {0};
  make_key(problem, path, threads, key, sizeof key);
  if (attn_wisdom_lookup(key, values) && values[0] >= 1 && values[0] <= RECURRENT_MAX_BLOCK) {
    *block = values[0];
    return ATTN_OK;
  }
  if (problem->planning != ATTN_PLAN_MEASURE) return ATTN_OK;
  int64_t found[ATTN_WISDOM_VALUES] = {0};
  ATTN_TRY(measure(problem, threads, &found[0]));
  *block = found[0];
  return attn_wisdom_record(key, found);
}
