/* Planning of the softmax engine: checks the problem, chooses tiles and splits, lays out the
 * workspace. Choices by estimate follow the caches; ATTN_PLAN_MEASURE times a few candidates. */
#include "base/cpu.h"
#include "base/memory.h"
#include "base/status.h"
#include "engines/softmax/tiles.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { MAX_DIM = 1024, MAX_RUN_DIM = 256, FEW_ROWS = 32 };
#define MAX_EXTENT ((int64_t)1 << 31) /* of a length, a batch or a number of heads */

/* Checks of the problem. */

typedef struct bounded {
  const char *name;
  int64_t value, low, high;
} bounded;

static attn_status check_extents(const attn_softmax_problem *problem) {
  const bounded fields[] = {
      {"batch", problem->batch, 1, MAX_EXTENT},
      {"query_length", problem->query_length, 1, MAX_EXTENT},
      {"key_length", problem->key_length, 1, MAX_EXTENT},
      {"heads", problem->heads, 1, MAX_EXTENT},
      {"kv_heads", problem->kv_heads, 1, MAX_EXTENT},
      {"dim", problem->dim, 1, MAX_DIM},
      {"value_dim", problem->value_dim, 1, MAX_DIM},
      {"window_left", problem->window_left, -1, INT64_MAX},
      {"window_right", problem->window_right, -1, INT64_MAX},
      {"splits", problem->splits, 0, 65536},
      {"list_queries", problem->list_queries, 0, MAX_EXTENT},
      {"list_keys", problem->list_keys, 0, MAX_EXTENT},
      {"page_size", problem->page_size, problem->paged ? 1 : INT64_MIN, MAX_EXTENT},
  };
  for (size_t i = 0; i < sizeof fields / sizeof *fields; ++i)
    if (fields[i].value < fields[i].low || fields[i].value > fields[i].high)
      return attn_fail(ATTN_INVALID_ARGUMENT, "softmax: %s is %lld, expected %lld to %lld",
                       fields[i].name, (long long)fields[i].value, (long long)fields[i].low,
                       (long long)fields[i].high);
  if (problem->heads % problem->kv_heads)
    return attn_fail(ATTN_INVALID_SHAPE,
                     "softmax: kv_heads is %lld, heads is %lld: heads is not a multiple of it",
                     (long long)problem->kv_heads, (long long)problem->heads);
  return ATTN_OK;
}

static attn_status check_options(const attn_softmax_problem *problem) {
  const int passes = ATTN_PASS_FORWARD | ATTN_PASS_BACKWARD;
  bool half = problem->dtype == ATTN_F16 && attn_is_cuda(problem->device);
  if (problem->dtype != ATTN_F64 && problem->dtype != ATTN_F32 && problem->dtype != ATTN_BF16 &&
      !half)
    return attn_fail(ATTN_UNSUPPORTED, "softmax: dtype %s, expected float64, float32 or bfloat16",
                     attn_dtype_name(problem->dtype));
  if (problem->passes & ~passes || !(problem->passes & passes))
    return attn_fail(
        ATTN_INVALID_ARGUMENT,
        "softmax: passes is %d, expected ATTN_PASS_FORWARD, ATTN_PASS_BACKWARD or both",
        problem->passes);
  if (!isfinite(problem->scale))
    return attn_fail(ATTN_INVALID_ARGUMENT, "softmax: scale is %g, expected a finite number",
                     problem->scale);
  if (!isfinite(problem->soft_cap) || problem->soft_cap < 0)
    return attn_fail(ATTN_INVALID_ARGUMENT, "softmax: soft_cap is %g, expected 0 or more",
                     problem->soft_cap);
  if (problem->planning != ATTN_PLAN_ESTIMATE && problem->planning != ATTN_PLAN_MEASURE)
    return attn_fail(ATTN_INVALID_ARGUMENT, "softmax: planning is %d, expected %d or %d",
                     (int)problem->planning, ATTN_PLAN_ESTIMATE, ATTN_PLAN_MEASURE);
  if ((problem->list_queries == 0) != (problem->list_keys == 0))
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "softmax: list_queries is %lld and list_keys %lld: a block list needs both",
                     (long long)problem->list_queries, (long long)problem->list_keys);
  if (problem->list_keys % 32 && problem->passes & ATTN_PASS_BACKWARD)
    return attn_fail(ATTN_UNSUPPORTED,
                     "softmax: list_keys is %lld, expected a multiple of 32 with the backward pass",
                     (long long)problem->list_keys);
  if (problem->bias && problem->ragged)
    return attn_fail(ATTN_UNSUPPORTED, "softmax: bias with ragged sequences is not offered");
  if (problem->paged && problem->passes & ATTN_PASS_BACKWARD)
    return attn_fail(ATTN_UNSUPPORTED, "softmax: the backward pass with paged keys is not offered");
  return ATTN_OK;
}

/* What the problem costs. */

/* Scores that one head of one sequence computes: the sum of the visible intervals. Beyond 2^16
 * queries it is sampled, for it is linear but at its few bends. */
static double visible_scores(const attn_softmax_problem *problem) {
  int64_t step = attn_max(1, problem->query_length >> 16);
  double sum = 0;
  for (int64_t i = step / 2; i < problem->query_length; i += step) {
    attn_key_range range =
        attn_softmax_visible(problem, problem->query_length, problem->key_length, i);
    sum += (double)(range.end - range.first) * (double)step;
  }
  return sum;
}

static void count_cost(softmax_plan *plan) {
  const attn_softmax_problem *problem = &plan->problem;
  double batch = (double)problem->batch, width = (double)(problem->dim + problem->value_dim);
  double size = (double)attn_dtype_size(problem->dtype);
  double scores = visible_scores(problem) * batch * (double)problem->heads;
  double queries = batch * (double)(problem->query_length * problem->heads) * width * size;
  double keys = batch * (double)(problem->key_length * problem->kv_heads) * width * size;
  /* Two products forward; backward repeats one and has four more. */
  double forward = 2 * width * scores;
  bool with_forward = problem->passes & ATTN_PASS_FORWARD;
  bool with_backward = problem->passes & ATTN_PASS_BACKWARD;
  plan->base.info.flops = (with_forward ? forward : 0) + (with_backward ? 2.5 * forward : 0);
  plan->base.info.bytes =
      (with_forward ? queries + keys : 0) + (with_backward ? 2 * (queries + keys) : 0);
  if (problem->bias) plan->base.info.bytes += scores * (double)plan->real_size;
}

/* Sizes. */

/* Adds `count` pieces of `each` bytes to *total and returns where they start. A total that
 * overflows sticks at SIZE_MAX. */
static size_t carve(size_t *total, size_t count, size_t each) {
  size_t start = *total, bytes;
  if (__builtin_mul_overflow(count, each, &bytes) || bytes > SIZE_MAX / 4 - 64 ||
      start > SIZE_MAX / 4)
    *total = SIZE_MAX;
  else
    *total = start + (bytes + 63) / 64 * 64;
  return start;
}

static size_t product_bytes(softmax_plan *plan, int64_t rows, int64_t columns) {
  return (size_t)(rows * attn_round_up(columns, ATTN_PANEL)) * plan->operand_size;
}

static void lay_out_forward(softmax_plan *plan) {
  const attn_softmax_problem *problem = &plan->problem;
  int64_t blocks = attn_ceil_div(problem->key_length, plan->block_keys);
  size_t total = 0, block = 0;
  carve(&block, 1, product_bytes(plan, plan->depth_dim, plan->block_keys));
  plan->forward.block_values = block;
  carve(&block, 1, product_bytes(plan, plan->block_keys, problem->value_dim));
  plan->forward.block = block;
  plan->forward.pair = plan->prepack ? block * (size_t)blocks : 0;
  plan->forward.packed = carve(&total, (size_t)plan->at_once, plan->forward.pair);
  if (plan->splits > 1) {
    size_t rows;
    if (__builtin_mul_overflow((size_t)plan->splits,
                               (size_t)problem->query_length * (size_t)plan->group, &rows))
      rows = SIZE_MAX;
    plan->forward.partial_o =
        carve(&total, (size_t)plan->at_once * (size_t)problem->value_dim * plan->real_size, rows);
    plan->forward.partial_lse = carve(&total, (size_t)plan->at_once * plan->real_size, rows);
  }
  plan->forward.scratch_each = attn_softmax_forward_scratch(plan);
  plan->forward.scratch = carve(&total, (size_t)plan->base.threads, plan->forward.scratch_each);
  plan->forward.total = total;
}

/* [block][K^T, V^T, K], [head][Q, dO, Q^T, dO^T, LSE, delta], [slot][head][d_q]: all O(length). */
static void lay_out_backward(softmax_plan *plan) {
  const attn_softmax_problem *problem = &plan->problem;
  size_t group = (size_t)plan->group, at_once = (size_t)plan->backward.at_once;
  int64_t rows = attn_round_up(problem->query_length, plan->grad_rows);
  int64_t blocks = attn_ceil_div(problem->key_length, plan->grad_keys);
  size_t total = 0, block = 0, head = 0;
  carve(&block, 1, product_bytes(plan, plan->depth_dim, plan->grad_keys));
  plan->backward.block_values =
      carve(&block, 1, product_bytes(plan, plan->depth_value, plan->grad_keys));
  plan->backward.block_rows = carve(&block, 1, product_bytes(plan, plan->grad_keys, problem->dim));
  plan->backward.block = block;
  carve(&head, 1, product_bytes(plan, rows, plan->depth_dim));
  plan->backward.d_o = carve(&head, 1, product_bytes(plan, rows, plan->depth_value));
  plan->backward.q_turned = carve(&head, 1, product_bytes(plan, rows, plan->depth_dim));
  plan->backward.d_o_turned = carve(&head, 1, product_bytes(plan, rows, plan->depth_value));
  plan->backward.lse = carve(&head, (size_t)rows, plan->real_size);
  plan->backward.delta = carve(&head, (size_t)rows, plan->real_size);
  plan->backward.head = head;
  plan->backward.head_d_q = (size_t)(rows * attn_round_up(problem->dim, 16)) * plan->real_size;
  size_t slot = 0, pair_d_q = 0, pair = 0, queries = 0;
  carve(&slot, group, plan->backward.head_d_q);
  carve(&pair_d_q, (size_t)plan->slots, slot);
  carve(&pair, (size_t)blocks, block);
  carve(&queries, group, head);
  plan->backward.slot_d_q = slot;
  plan->backward.pair_d_q = pair_d_q;
  plan->backward.pair = pair;
  plan->backward.pair_queries = queries;
  plan->backward.packed = carve(&total, at_once, pair);
  plan->backward.queries = carve(&total, at_once, queries);
  plan->backward.d_q = carve(&total, at_once, pair_d_q);
  plan->backward.sinks = carve(
      &total, problem->sinks ? (size_t)problem->batch * (size_t)problem->heads : 0, sizeof(double));
  plan->backward.scratch_each = attn_softmax_backward_scratch(plan);
  plan->backward.scratch = carve(&total, (size_t)plan->base.threads, plan->backward.scratch_each);
  plan->backward.total = total;
}

/* Choices. */

/* What the threads share out, when the keys are not split. */
static double count_items(const softmax_plan *plan) {
  const attn_softmax_problem *problem = &plan->problem;
  int64_t rows = problem->query_length * plan->fold;
  return (double)problem->batch * (double)problem->kv_heads * (double)(plan->group / plan->fold) *
         (double)attn_ceil_div(rows, plan->block_rows);
}

/* Whether keys that all rows of a tile see can go through softmax_run and softmax_grad_run: plain
 * scores only. */
static bool plain_scores(const softmax_plan *plan) {
  const attn_softmax_problem *problem = &plan->problem;
  bool narrow = problem->dim <= MAX_RUN_DIM && problem->value_dim <= MAX_RUN_DIM;
  return plan->work == WORK_BF16 && narrow && problem->soft_cap == 0 && !problem->bias &&
         !problem->alibi;
}

static bool runs_possible(const softmax_plan *plan) {
  return plain_scores(plan) && plan->problem.value_dim % 32 == 0;
}

/* As many rows as the second-level cache holds share a block of keys, because AMX multiplies faster
 * than the third level delivers; and a tile of rows takes several runs of a block while its sums
 * are in the first level. Where there are fewer tiles than threads, the keys will be split: then
 * blocks are small. */
static void choose_run_tiles(softmax_plan *plan) {
  plan->block_keys = MAX_BLOCK_KEYS;
  plan->block_rows = MAX_BLOCK_ROWS;
  while (plan->block_rows > 64 && count_items(plan) < 4.0 * plan->base.threads)
    plan->block_rows /= 2;
  if (count_items(plan) < plan->base.threads) plan->block_keys = ATTN_RUN_KEYS;
}

/* Keys so that those of a block, their values and scores stay in the second-level cache with room
 * to spare, and the scores and one operand in the first. */
static int64_t tile_keys(const softmax_plan *plan) {
  int64_t widest = attn_max(plan->problem.dim, plan->problem.value_dim);
  return plan->work == WORK_F64 ? 64 : widest > 128 ? 64 : 128;
}

static void choose_tiles(softmax_plan *plan) {
  const attn_softmax_problem *problem = &plan->problem;
  plan->block_keys = tile_keys(plan);
  plan->block_rows = plan->work == WORK_BF16 ? 64 : 60;
  if (plan->work == WORK_F64) plan->block_rows = 32;
  plan->runs = runs_possible(plan);
  if (plan->runs) choose_run_tiles(plan);
  plan->block_keys = attn_min(plan->block_keys, attn_round_up(problem->key_length, 32));
  plan->block_rows = attn_min(plan->block_rows, problem->query_length * plan->fold);
}

/* How much of the threads' time `items` of equal length fill. */
static double fill(double items, double threads) {
  return items / (threads * ceil(items / threads));
}

/* Without enough pairs and tiles for the threads, the keys are split (FlashDecoding); a single tile
 * of rows, as a decode step has, also where the items do not come out even. */
static int64_t choose_splits(const softmax_plan *plan) {
  const attn_softmax_problem *problem = &plan->problem;
  if (problem->splits) return problem->splits;
  double items = count_items(plan);
  int64_t blocks = attn_ceil_div(problem->key_length, plan->block_keys);
  enum { BLOCKS_A_PART = 4 }; /* fewer would not pay for the merge */
  double threads = plan->base.threads, wanted = 1;
  const double well = 0.9, many = 8; /* items a thread: then nothing needs to come out even */
  bool single = problem->query_length * plan->fold <= plan->block_rows;
  if (items < threads)
    wanted = ceil(2 * threads / items);
  else if (single && items < many * threads)
    while (fill(items * wanted, threads) < well && wanted < threads) ++wanted;
  return attn_max(1, attn_min((int64_t)wanted, blocks / BLOCKS_A_PART));
}

/* Pairs whose packed matrices are held at once: enough for all threads, but a bounded amount. */
static int64_t choose_at_once(const softmax_plan *plan, size_t pair_bytes) {
  const double budget = 64 << 20;
  double pairs = (double)plan->problem.batch * (double)plan->problem.kv_heads;
  double fitting = floor(budget / ((double)pair_bytes + 1));
  double wanted = fmax(fitting, 2.0 * plan->base.threads);
  return (int64_t)fmin(pairs, fmin(wanted, 1 << 20));
}

static void finish_choices(softmax_plan *plan) {
  const attn_softmax_problem *problem = &plan->problem;
  int64_t rows = problem->query_length * plan->fold;
  plan->splits = choose_splits(plan);
  plan->step_keys = plan->runs ? attn_min(ATTN_RUN_KEYS, plan->block_keys) : plan->block_keys;
  plan->tile_rows = plan->runs ? attn_min(ATTN_RUN_ROWS, plan->block_rows) : plan->block_rows;
  plan->prepack = plan->group / plan->fold > 1 || rows > plan->block_rows;
  plan->direct = !plan->prepack && plan->work == WORK_F32 && rows <= ATTN_MATVEC_ROWS;
  size_t pair = product_bytes(plan, problem->key_length, plan->depth_dim + problem->value_dim);
  plan->at_once = choose_at_once(plan, plan->prepack ? pair : 0);
  lay_out_forward(plan);
}

/* A key head's blocks are one item, unless there are too few key heads for the threads. */
static void choose_backward(softmax_plan *plan) {
  const attn_softmax_problem *problem = &plan->problem;
  double pairs = (double)problem->batch * (double)problem->kv_heads;
  int64_t wanted = (int64_t)ceil(plan->base.threads / pairs); /* items of a pair */
  /* With AMX the caches feel that each tile moves d_k and d_v, and each of its rows d_q: large
   * tiles, as far as the second level holds them (measured: docs/performance-log.md). */
  bool fast = plan->work == WORK_BF16;
  bool narrow = attn_max(problem->dim, problem->value_dim) <= 64;
  plan->grad_step_rows = fast || plan->work == WORK_F64 ? 32 : 64;
  plan->grad_step_keys = tile_keys(plan);
  plan->grad_rows =
      fast ? attn_min(256, attn_round_up(problem->query_length, 32)) : plan->grad_step_rows;
  plan->grad_keys = !fast ? plan->grad_step_keys : narrow ? 256 : 512;
  while (plan->grad_keys > plan->grad_step_keys &&
         attn_ceil_div(problem->key_length, plan->grad_keys) < wanted)
    plan->grad_keys /= 2;
  plan->grad_keys = attn_min(plan->grad_keys, attn_round_up(problem->key_length, 32));
  plan->grad_step_keys = attn_min(plan->grad_step_keys, plan->grad_keys);
  plan->grad_runs = plain_scores(plan);
  plan->slots = attn_min(attn_ceil_div(problem->key_length, plan->grad_keys), wanted);
  plan->backward.at_once = 1;
  lay_out_backward(plan);
  plan->backward.at_once = choose_at_once(plan, plan->backward.pair + plan->backward.pair_queries +
                                                    plan->backward.pair_d_q);
  lay_out_backward(plan);
}

/* Heads of one key head that share a tile. */
static int64_t choose_fold(const softmax_plan *plan) {
  if (plan->problem.list_keys) return 1; /* heads have lists of their own */
  return plan->problem.query_length < FEW_ROWS ? plan->group : 1;
}

/* Few rows are dot products with keys as they are stored, summed in float32. */
static attn_softmax_work choose_work(const softmax_plan *plan) {
  const attn_softmax_problem *problem = &plan->problem;
  if (problem->dtype == ATTN_F64) return WORK_F64;
  bool few = (double)problem->query_length * (double)plan->fold <= ATTN_MATVEC_ROWS;
  bool tiles = plan->base.kernels->path == ATTN_PATH_AMX && !few;
  return problem->dtype == ATTN_BF16 && tiles ? WORK_BF16 : WORK_F32;
}

/* A window that reaches beyond every key is no window; and then sums cannot overflow. */
static int64_t bounded_window(int64_t window) {
  return window > 2 * MAX_EXTENT ? -1 : window;
}

static void set_up(softmax_plan *plan, const attn_softmax_problem *problem) {
  plan->base.engine = ATTN_ENGINE_SOFTMAX;
  plan->base.kernels = attn_kernels_get();
  plan->base.info.path = plan->base.kernels->path;
  plan->base.threads = attn_get_threads();
  plan->problem = *problem;
  plan->problem.window_left = bounded_window(problem->window_left);
  plan->problem.window_right = bounded_window(problem->window_right);
  plan->scale = problem->scale != 0 ? problem->scale : 1 / sqrt((double)problem->dim);
  plan->group = problem->heads / problem->kv_heads;
  plan->fold = choose_fold(plan);
  plan->work = choose_work(plan);
  plan->operand_size = plan->work == WORK_F64 ? 8 : plan->work == WORK_F32 ? 4 : 2;
  plan->real_size = plan->work == WORK_F64 ? 8 : 4;
  plan->depth_dim = attn_round_up(problem->dim, 32);
  plan->depth_value = attn_round_up(problem->value_dim, 32);
}

static void describe(softmax_plan *plan) {
  static const char *const works[] = {"float64", "float32", "bfloat16"};
  snprintf(plan->base.info.description, sizeof plan->base.info.description,
           "softmax on %s: tiles of %lld rows x %lld keys in %s%s, %lld heads a tile, keys %s, "
           "%lld split%s, %d thread%s",
           attn_kernel_path_name(plan->base.info.path), (long long)plan->block_rows,
           (long long)plan->block_keys, works[plan->work], plan->runs ? " by runs" : "",
           (long long)plan->fold,
           plan->prepack  ? "packed once"
           : plan->direct ? "read as stored"
                          : "packed on the way",
           (long long)plan->splits, plan->splits > 1 ? "s" : "", plan->base.threads,
           plan->base.threads > 1 ? "s" : "");
}

/* Planning by measurement. */

/* Wisdom's values: rows and keys of a forward tile, splits, whether runs are taken. */
enum { WISE_ROWS, WISE_KEYS, WISE_SPLITS, WISE_RUNS };

static void wisdom_key(const softmax_plan *plan, char key[512]) {
  const attn_softmax_problem *p = &plan->problem;
  snprintf(key, 512,
           "softmax %s batch %lld lengths %lld %lld heads %lld %lld dims %lld %lld causal %d "
           "window %lld %lld terms %d%d%d%d ragged %d page %lld splits %lld on %s threads %d",
           attn_dtype_name(p->dtype), (long long)p->batch, (long long)p->query_length,
           (long long)p->key_length, (long long)p->heads, (long long)p->kv_heads, (long long)p->dim,
           (long long)p->value_dim, p->causal, (long long)p->window_left,
           (long long)p->window_right, p->soft_cap != 0, p->bias, p->alibi, p->sinks, p->ragged,
           (long long)(p->paged ? p->page_size : 0), (long long)p->splits,
           attn_kernel_path_name(plan->base.info.path), plan->base.threads);
}

/* Takes over tiles and splits; false when they are none that a plan could have (a foreign file). */
static bool follow(softmax_plan *plan, const int64_t values[ATTN_WISDOM_VALUES]) {
  int64_t rows = values[WISE_ROWS], keys = values[WISE_KEYS], splits = values[WISE_SPLITS];
  if (rows < 1 || rows > MAX_BLOCK_ROWS || keys < 32 || keys > MAX_BLOCK_KEYS || keys % 32)
    return false;
  if (splits < 1 || splits > 65536) return false;
  plan->runs = runs_possible(plan) && values[WISE_RUNS] != 0;
  plan->block_rows = attn_min(rows, plan->problem.query_length * plan->fold);
  plan->block_keys = attn_min(keys, attn_round_up(plan->problem.key_length, 32));
  plan->problem.splits = splits;
  finish_choices(plan);
  return true;
}

/* Tensors of a plain problem like the plan's: what is timed is the tiles, so terms of the scores
 * and the way sequences are stored are left out, and few heads stand for many. */
typedef struct trial {
  attn_softmax_problem problem;
  attn_softmax_args args;
  void *workspace;
  size_t workspace_bytes;
} trial;

static attn_softmax_problem trial_problem(const softmax_plan *plan) {
  attn_softmax_problem problem = plan->problem;
  const int64_t enough = 4096;
  problem.query_length = attn_min(problem.query_length, enough);
  problem.key_length = plan->problem.query_length > enough
                           ? attn_min(problem.key_length, enough)
                           : attn_min(problem.key_length, 16 * enough);
  problem.batch = 1;
  problem.kv_heads = attn_min(problem.kv_heads * plan->problem.batch, plan->base.threads);
  problem.heads = problem.kv_heads * plan->group;
  problem.passes = ATTN_PASS_FORWARD;
  problem.bias = problem.alibi = problem.sinks = problem.ragged = problem.paged = false;
  problem.list_queries = problem.list_keys = 0;
  problem.soft_cap = 0;
  problem.planning = ATTN_PLAN_ESTIMATE;
  return problem;
}

static void end_trial(trial *t) {
  attn_tensor *tensors[] = {&t->args.q, &t->args.k, &t->args.v, &t->args.o};
  for (size_t i = 0; i < sizeof tensors / sizeof *tensors; ++i) attn_tensor_destroy(tensors[i]);
  attn_free(t->workspace);
}

static attn_status begin_trial(const softmax_plan *plan, trial *t) {
  t->problem = trial_problem(plan);
  const attn_softmax_problem *p = &t->problem;
  const int64_t shapes[4][4] = {{1, p->query_length, p->heads, p->dim},
                                {1, p->key_length, p->kv_heads, p->dim},
                                {1, p->key_length, p->kv_heads, p->value_dim},
                                {1, p->query_length, p->heads, p->value_dim}};
  attn_tensor *tensors[] = {&t->args.q, &t->args.k, &t->args.v, &t->args.o};
  for (int i = 0; i < 4; ++i) {
    attn_status status = attn_tensor_create(p->dtype, 4, shapes[i], tensors[i]);
    if (status == ATTN_OK) status = attn_tensor_fill(tensors[i], 0.125);
    if (status != ATTN_OK) return status;
  }
  return ATTN_OK;
}

/* Seconds of one candidate, the better of two runs; infinite when it cannot be run. */
static double time_candidate(trial *t, const softmax_plan *plan,
                             const int64_t values[ATTN_WISDOM_VALUES]) {
  softmax_plan candidate = {0};
  set_up(&candidate, &t->problem);
  candidate.base.threads = plan->base.threads;
  choose_tiles(&candidate);
  if (!follow(&candidate, values)) return INFINITY;
  candidate.base.info.workspace_bytes = candidate.forward.total;
  if (candidate.forward.total > t->workspace_bytes) {
    attn_free(t->workspace);
    t->workspace_bytes = 0;
    t->workspace = attn_alloc(candidate.forward.total);
    if (!t->workspace) return INFINITY;
    t->workspace_bytes = candidate.forward.total;
  }
  double best = INFINITY;
  for (int run = 0; run < 3; ++run) { /* the first warms up */
    double start = attn_seconds();
    if (attn_softmax_forward(&candidate.base, &t->args, t->workspace) != ATTN_OK) return INFINITY;
    if (run) best = fmin(best, attn_seconds() - start);
  }
  return best;
}

/* Tries a few tile shapes around the estimate, then, where keys may be split, a few splits. */
static attn_status measure(softmax_plan *plan, int64_t best[ATTN_WISDOM_VALUES]) {
  static const int64_t rows[] = {32, 48, 60, 64, 96}, keys[] = {64, 128, 256};
  static const int64_t splits[] = {1, 2, 4, 8, 16};
  trial t = {0};
  attn_status status = begin_trial(plan, &t);
  double fastest = status == ATTN_OK ? time_candidate(&t, plan, best) : INFINITY;
  for (int i = 0; status == ATTN_OK && i < 15; ++i) {
    int64_t values[ATTN_WISDOM_VALUES] = {rows[i / 3], keys[i % 3], best[WISE_SPLITS]};
    double time = time_candidate(&t, plan, values);
    if (time >= fastest) continue;
    fastest = time;
    memcpy(best, values, sizeof values);
  }
  static const int64_t run_rows[] = {128, 512, MAX_BLOCK_ROWS};
  static const int64_t run_keys[] = {ATTN_RUN_KEYS, MAX_BLOCK_KEYS};
  for (int i = 0; status == ATTN_OK && runs_possible(plan) && i < 6; ++i) {
    int64_t values[ATTN_WISDOM_VALUES] = {run_rows[i / 2], run_keys[i % 2], best[WISE_SPLITS],
                                          true};
    double time = time_candidate(&t, plan, values);
    if (time >= fastest) continue;
    fastest = time;
    memcpy(best, values, sizeof values);
  }
  bool may_split = plan->problem.splits == 0 && !plan->prepack;
  for (int i = 0; status == ATTN_OK && may_split && i < 5; ++i) {
    int64_t values[ATTN_WISDOM_VALUES] = {best[WISE_ROWS], best[WISE_KEYS], splits[i],
                                          best[WISE_RUNS]};
    double time = time_candidate(&t, plan, values);
    if (time >= fastest) continue;
    fastest = time;
    memcpy(best, values, sizeof values);
  }
  end_trial(&t);
  return status;
}

/* Wisdom where there is any; else, if asked to, measurement. */
static attn_status refine(softmax_plan *plan, attn_planning planning) {
  char key[512];
  int64_t values[ATTN_WISDOM_VALUES] = {0};
  wisdom_key(plan, key);
  if (attn_wisdom_lookup(key, values) && follow(plan, values)) return ATTN_OK;
  if (planning != ATTN_PLAN_MEASURE) return ATTN_OK;
  values[WISE_ROWS] = plan->block_rows;
  values[WISE_KEYS] = plan->block_keys;
  values[WISE_SPLITS] = plan->splits;
  values[WISE_RUNS] = plan->runs;
  ATTN_TRY(measure(plan, values));
  ATTN_TRY(attn_wisdom_record(key, values));
  follow(plan, values);
  return ATTN_OK;
}

/* Lets the CUDA module choose for each pass. */
static attn_status plan_on_gpu(softmax_plan *plan, const attn_softmax_problem *problem) {
  attn_plan *base = &plan->base;
  base->engine = ATTN_ENGINE_SOFTMAX;
  base->kernels = attn_kernels_get();
  base->threads = attn_get_threads();
  base->gpu = attn_gpu_open(problem->device.index);
  if (!base->gpu) return ATTN_UNSUPPORTED;
  plan->problem = *problem;
  plan->scale = problem->scale != 0 ? problem->scale : 1 / sqrt((double)problem->dim);
  plan->problem.scale = plan->scale;
  static const attn_pass passes[] = {ATTN_PASS_FORWARD, ATTN_PASS_BACKWARD};
  for (int i = 0; i < 2; ++i) {
    attn_cuda_choice *choice = attn_plan_choice(base, passes[i]);
    if (!(problem->passes & (int)passes[i])) continue;
    ATTN_TRY(attn_gpu_check(base->gpu, base->gpu->cuda->softmax_plan(
                                           &base->gpu->device, &plan->problem, passes[i], choice)));
    if (choice->workspace_bytes > base->info.workspace_bytes)
      base->info.workspace_bytes = choice->workspace_bytes;
  }
  snprintf(base->info.description, sizeof base->info.description, "softmax %s on %.64s: %s",
           attn_dtype_name(problem->dtype), base->gpu->device.name,
           base->choice[problem->passes == ATTN_PASS_BACKWARD].description);
  return ATTN_OK;
}

static attn_status plan_on_cpu(softmax_plan *plan, const attn_softmax_problem *problem) {
  set_up(plan, problem);
  choose_tiles(plan);
  finish_choices(plan);
  ATTN_TRY(refine(plan, problem->planning));
  if (problem->passes & ATTN_PASS_FORWARD) plan->base.info.workspace_bytes = plan->forward.total;
  if (problem->passes & ATTN_PASS_BACKWARD) {
    choose_backward(plan);
    if (plan->backward.total > plan->base.info.workspace_bytes)
      plan->base.info.workspace_bytes = plan->backward.total;
  }
  if (plan->base.info.workspace_bytes > SIZE_MAX / 4)
    return attn_fail(ATTN_INVALID_SHAPE, "softmax: the problem's workspace does not fit in memory");
  describe(plan);
  return ATTN_OK;
}

attn_status attn_softmax_plan(const attn_softmax_problem *problem, attn_plan **out) {
  if (!problem || !out) return attn_fail(ATTN_INVALID_ARGUMENT, "softmax_plan: NULL argument");
  *out = NULL;
  if (problem->struct_size != sizeof *problem)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "softmax: struct_size is %zu, expected %zu (use ATTN_SOFTMAX_PROBLEM_INIT)",
                     problem->struct_size, sizeof *problem);
  ATTN_TRY(check_extents(problem));
  ATTN_TRY(check_options(problem));
  softmax_plan *plan = attn_alloc_zero(sizeof *plan);
  if (!plan) return ATTN_OUT_OF_MEMORY;
  attn_status status =
      attn_is_cuda(problem->device) ? plan_on_gpu(plan, problem) : plan_on_cpu(plan, problem);
  if (status != ATTN_OK) {
    attn_free(plan);
    return status;
  }
  count_cost(plan);
  *out = &plan->base;
  return ATTN_OK;
}
