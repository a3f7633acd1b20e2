/* The forward pass: tiles of query rows against blocks of keys, with a running maximum and sum
 * (FlashAttention-2, arXiv 2307.08691, algorithm 1).
 *
 * A wave of (sequence, key head) pairs at a time: their keys and values are packed once, then their
 * tiles are shared out among the threads, the long ones first. With `splits` > 1 each tile is done
 * in that many parts of the keys (FlashDecoding), whose results are merged by their LSE. What an
 * item computes does not depend on the thread that runs it. */
#include "engines/softmax/tiles.h"

#include "base/status.h"

#include <math.h>
#include <omp.h>
#include <string.h>

typedef struct call {
  const softmax_plan *plan;
  const attn_softmax_args *args;
  char *workspace;
} call;

typedef struct forward_scratch {
  void *q, *s, *p, *o, *maximum, *sum, *gathered;
  char *packed; /* one block, when blocks are packed on the way */
  int32_t *begin, *end;
} forward_scratch;

/* Places the scratch of one thread at `memory`; with NULL, `size` tells how much it takes. */
static forward_scratch place_scratch(const softmax_plan *plan, char *memory, size_t *size) {
  size_t rows = (size_t)plan->block_rows, keys = (size_t)plan->block_keys;
  size_t tile = (size_t)plan->tile_rows * (size_t)plan->step_keys;
  size_t widest = (size_t)attn_max(plan->depth_dim, attn_round_up(plan->problem.value_dim, 32));
  size_t sizes[] = {
      rows * (size_t)plan->depth_dim * plan->operand_size,                         /* q */
      tile * plan->real_size,                                                      /* s */
      plan->work == WORK_BF16 ? tile * plan->operand_size : 0,                     /* p */
      rows * (size_t)attn_round_up(plan->problem.value_dim, 16) * plan->real_size, /* o */
      rows * plan->real_size,
      rows * plan->real_size,
      keys * widest * plan->operand_size, /* gathered */
      plan->prepack || plan->direct ? 0 : plan->forward.block,
      rows * sizeof(int32_t),
      rows * sizeof(int32_t),
  };
  char *places[sizeof sizes / sizeof *sizes];
  size_t total = 0;
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; ++i) {
    places[i] = memory ? memory + total : NULL;
    total += (sizes[i] + 63) / 64 * 64;
  }
  if (size) *size = total;
  return (forward_scratch){.q = places[0],
                           .s = places[1],
                           .p = plan->work == WORK_BF16 ? places[2] : places[1],
                           .o = places[3],
                           .maximum = places[4],
                           .sum = places[5],
                           .gathered = places[6],
                           .packed = places[7],
                           .begin = (int32_t *)(void *)places[8],
                           .end = (int32_t *)(void *)places[9]};
}

size_t attn_softmax_forward_scratch(const softmax_plan *plan) {
  size_t size;
  place_scratch(plan, NULL, &size);
  return size;
}

/* The sink's logit of a head, -inf when there is none. */
static double sink_of(const call *call, int64_t head) {
  if (!call->plan->problem.sinks) return -INFINITY;
  return ((const float *)call->args->sinks.data)[head];
}

#define WORK_FILE "engines/softmax/forward.inc"
#include "engines/softmax/works.inc"

typedef void pack_block(const call *call, const attn_softmax_sequence *sequence, int64_t kv_head,
                        int64_t block, void *keys, void *values, void *gathered);
typedef void forward_item(const call *call, const attn_softmax_sequence *sequence,
                          const tile_rows *rows, int64_t split, char *packed, int64_t partial_row,
                          char *memory);
typedef void merge_item(const call *call, const attn_softmax_sequence *sequence, int64_t query,
                        int64_t head, int64_t partial, int64_t stride, char *memory);

static pack_block *const pack_blocks[] = {pack_block_f64, pack_block_f32, pack_block_bf16};
static forward_item *const forward_items[] = {forward_item_f64, forward_item_f32,
                                              forward_item_bf16};
static merge_item *const merge_items[] = {merge_item_f64, merge_item_f32, merge_item_bf16};

/* How the work of one pair is cut. Rows of a pair: [head group][folded row]. */
typedef struct cut {
  int64_t blocks, tiles, head_groups, group_rows, pair_rows;
} cut;

static cut cut_of(const softmax_plan *plan) {
  const attn_softmax_problem *problem = &plan->problem;
  int64_t group_rows = problem->query_length * plan->fold;
  return (cut){.blocks = attn_ceil_div(problem->key_length, plan->block_keys),
               .tiles = attn_ceil_div(group_rows, plan->block_rows),
               .head_groups = plan->group / plan->fold,
               .group_rows = group_rows,
               .pair_rows = problem->query_length * plan->group};
}

/* Task `task` of packing: a block of a pair, unless no query sees it. */
static void run_pack(const call *call, const cut *cut, int64_t wave, int64_t task, char *scratch) {
  const softmax_plan *plan = call->plan;
  int64_t place = task / cut->blocks, block = task % cut->blocks, pair = wave + place;
  int64_t kv_heads = plan->problem.kv_heads;
  attn_softmax_sequence sequence = attn_softmax_sequence_of(plan, call->args, pair / kv_heads);
  if (sequence.queries == 0 || sequence.keys <= block * plan->block_keys) return;
  tile_rows all = {.count = sequence.queries, .fold = 1};
  attn_key_range visible = tile_unmasked(plan, &sequence, &all);
  if (visible.first >= (block + 1) * plan->block_keys || visible.end <= block * plan->block_keys)
    return;
  char *keys = call->workspace + plan->forward.packed + (size_t)place * plan->forward.pair +
               (size_t)block * plan->forward.block;
  pack_blocks[plan->work](call, &sequence, pair % kv_heads, block, keys,
                          keys + plan->forward.block_values,
                          place_scratch(plan, scratch, NULL).gathered);
}

/* Task `task` of a wave: [pair][head group][tile, last first][split]. */
static void run_item(const call *call, const cut *cut, int64_t wave, int64_t task, char *scratch) {
  const softmax_plan *plan = call->plan;
  int64_t split = task % plan->splits, rest = task / plan->splits;
  int64_t tile = cut->tiles - 1 - rest % cut->tiles;
  int64_t head_group = rest / cut->tiles % cut->head_groups;
  int64_t place = rest / cut->tiles / cut->head_groups, pair = wave + place;
  int64_t kv_heads = plan->problem.kv_heads;
  attn_softmax_sequence sequence = attn_softmax_sequence_of(plan, call->args, pair / kv_heads);
  tile_rows rows = {.first = tile * plan->block_rows,
                    .fold = plan->fold,
                    .head = pair % kv_heads * plan->group + head_group * plan->fold};
  rows.count = attn_min(plan->block_rows, sequence.queries * plan->fold - rows.first);
  if (rows.count <= 0) return;
  char *packed = plan->prepack
                     ? call->workspace + plan->forward.packed + (size_t)place * plan->forward.pair
                     : NULL;
  int64_t partial =
      (place * plan->splits + split) * cut->pair_rows + head_group * cut->group_rows + rows.first;
  forward_items[plan->work](call, &sequence, &rows, split, packed, partial, scratch);
}

static void run_merge(const call *call, const cut *cut, int64_t wave, int64_t task, char *scratch) {
  const softmax_plan *plan = call->plan;
  int64_t place = task / cut->pair_rows, row = task % cut->pair_rows, pair = wave + place;
  int64_t head_group = row / cut->group_rows, folded = row % cut->group_rows;
  int64_t kv_heads = plan->problem.kv_heads, query = folded / plan->fold;
  attn_softmax_sequence sequence = attn_softmax_sequence_of(plan, call->args, pair / kv_heads);
  if (query >= sequence.queries) return;
  int64_t head = pair % kv_heads * plan->group + head_group * plan->fold + folded % plan->fold;
  merge_items[plan->work](call, &sequence, query, head, place * plan->splits * cut->pair_rows + row,
                          cut->pair_rows, place_scratch(plan, scratch, NULL).o);
}

attn_status attn_softmax_forward(const attn_plan *base, const attn_softmax_args *args,
                                 void *workspace) {
  if (!base || !args || base->engine != ATTN_ENGINE_SOFTMAX)
    return attn_fail(ATTN_INVALID_ARGUMENT, "softmax_forward: %s",
                     base && args ? "the plan is of another engine" : "NULL argument");
  const softmax_plan *plan = (const softmax_plan *)base;
  ATTN_TRY(attn_softmax_check(plan, args, ATTN_PASS_FORWARD, workspace));
  if (base->gpu) return attn_softmax_run_on_gpu(plan, args, ATTN_PASS_FORWARD, workspace);
  const call call = {plan, args, workspace};
  const cut cut = cut_of(plan);
  int64_t pairs = plan->problem.batch * plan->problem.kv_heads;
#pragma omp parallel num_threads(base->threads)
  {
    char *scratch = call.workspace + plan->forward.scratch +
                    (size_t)omp_get_thread_num() * plan->forward.scratch_each;
    base->kernels->begin();
    for (int64_t wave = 0; wave < pairs; wave += plan->at_once) {
      int64_t places = attn_min(plan->at_once, pairs - wave);
      int64_t packs = plan->prepack ? places * cut.blocks : 0;
      int64_t items = places * cut.head_groups * cut.tiles * plan->splits;
      int64_t merges = plan->splits > 1 ? places * cut.pair_rows : 0;
#pragma omp for schedule(dynamic, 4)
      for (int64_t task = 0; task < packs; ++task) run_pack(&call, &cut, wave, task, scratch);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < items; ++task) run_item(&call, &cut, wave, task, scratch);
#pragma omp for schedule(static)
      for (int64_t task = 0; task < merges; ++task) run_merge(&call, &cut, wave, task, scratch);
    }
    base->kernels->end();
  }
  return ATTN_OK;
}
