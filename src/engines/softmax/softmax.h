/* The softmax engine's own nouns: its plan, a sequence's views, and which keys a query sees. */
#ifndef ATTN_ENGINES_SOFTMAX_H
#define ATTN_ENGINES_SOFTMAX_H

#include "attn/softmax.h"
#include "engines/plan.h"

/* In which type tiles are multiplied. Scores and sums are float64 for WORK_F64, else float32.
 * bfloat16 tensors are worked on in bfloat16 where the machine has AMX, else in float32, because
 * float32 FMA is as fast as the vector units' bfloat16 products. */
typedef enum attn_softmax_work { WORK_F64 = 0, WORK_F32, WORK_BF16 } attn_softmax_work;

typedef struct softmax_plan {
  attn_plan base;
  attn_softmax_problem problem;
  double scale;
  attn_softmax_work work;
  int64_t group; /* query heads a key head */
  /* Forward: block_rows rows, which an item of work has, against block_keys keys (a multiple of 32)
   * after the other, tile_rows of them at a time; of which step_keys at once where not by runs. */
  int64_t block_rows, block_keys, tile_rows, step_keys;
  bool runs; /* whether keys that all rows of a tile see go through softmax_run */
  /* Heads of one key head that share a tile: 1, or `group` for few queries, so that a key is read
   * once for all its heads. Row r of a tile column is query r / fold of head r % fold. */
  int64_t fold;
  int64_t splits; /* parts of the keys that are worked on independently, then merged */
  /* Whether keys and values are packed before the tiles are computed; not worth it when a pair
   * (a sequence and a key head) has one tile. */
  bool prepack;
  bool direct;         /* few rows: keys and values are read as they are stored, by dot products */
  int64_t at_once;     /* pairs in the workspace at once */
  int64_t slots;       /* backward: independent sums of d_q, added up in order */
  size_t operand_size; /* bytes of an element of a packed matrix */
  size_t real_size;    /* bytes of a score */
  int64_t depth_dim, depth_value; /* dim and value_dim, padded as operands of a product */
  /* Backward: rows and keys of a tile, and of those whose scores are held at once; multiples of 32.
   */
  int64_t grad_rows, grad_keys, grad_step_rows, grad_step_keys;
  bool grad_runs; /* whether keys that all rows see go through softmax_grad_run */

  /* Forward: where things lie in the workspace, in bytes. */
  struct {
    size_t packed, pair;        /* packed keys and values; distance between pairs, 0: see below */
    size_t block, block_values; /* distance between blocks; of a block's values from its keys */
    size_t partial_o, partial_lse; /* [pairs at once][splits][rows of a pair] */
    size_t scratch, scratch_each;  /* for each thread */
    size_t total;
  } forward;
  struct {
    size_t packed, pair; /* packed K^T, V^T and K of each block; distance between pairs */
    size_t block, block_values, block_rows;
    size_t queries, pair_queries; /* what is prepared of the queries of a pair */
    size_t head, d_o, q_turned, d_o_turned, lse, delta; /* of each head, from its start */
    size_t d_q, pair_d_q, slot_d_q, head_d_q;           /* [pairs at once][slots][group] sums */
    size_t sinks;                                       /* float64 [batch * heads] */
    size_t scratch, scratch_each;
    int64_t at_once;
    size_t total;
  } backward;
} softmax_plan;

/* The rows of one tensor that belong to one sequence. */
typedef struct attn_softmax_rows {
  char *data; /* NULL: absent */
  attn_dtype dtype;
  int64_t token, head;  /* strides in elements */
  const int32_t *pages; /* NULL: contiguous */
  int64_t page_size, page_stride;
} attn_softmax_rows;

typedef struct attn_softmax_sequence {
  int64_t batch, queries, keys;
  int64_t stored_keys; /* keys and, after them, those that key_lengths leaves out */
  attn_softmax_rows q, k, v, o, d_o, d_q, d_k, d_v;
  attn_softmax_rows lse, d_lse;   /* token = query */
  attn_softmax_rows bias, d_bias; /* token = query */
  int64_t bias_key, d_bias_key;   /* strides along the keys */
  const int32_t *list_offsets;    /* of the block list; NULL: there is none */
  const int32_t *list;
  int64_t list_head, list_block; /* strides of list_offsets */
} attn_softmax_sequence;

static inline char *attn_softmax_row(const attn_softmax_rows *rows, int64_t token, int64_t head) {
  int64_t at = head * rows->head;
  if (rows->pages)
    at += rows->pages[token / rows->page_size] * rows->page_stride +
          token % rows->page_size * rows->token;
  else
    at += token * rows->token;
  return rows->data + at * (int64_t)attn_dtype_size(rows->dtype);
}

/* How many of the `count` tokens from `token` on are equally spaced in memory. */
static inline int64_t attn_softmax_run(const attn_softmax_rows *rows, int64_t token,
                                       int64_t count) {
  int64_t left = rows->pages ? rows->page_size - token % rows->page_size : count;
  return left < count ? left : count;
}

typedef struct attn_key_range {
  int64_t first, end; /* first <= end; empty when equal */
} attn_key_range;

/* The keys that query i of a sequence sees: always one interval. The last query is aligned with the
 * last key. The one place that knows the masks. */
static inline attn_key_range attn_softmax_visible(const attn_softmax_problem *problem,
                                                  int64_t queries, int64_t keys, int64_t i) {
  int64_t position = i + keys - queries, first = 0, end = keys;
  if (problem->window_left >= 0 && position - problem->window_left > first)
    first = position - problem->window_left;
  if (problem->causal && position + 1 < end) end = position + 1;
  if (problem->window_right >= 0 && position + problem->window_right + 1 < end)
    end = position + problem->window_right + 1;
  if (end < 0) end = 0;
  if (first > end) first = end;
  return (attn_key_range){first, end};
}

/* Whether block `block` of the keys is on the list of a block of a head's queries. */
static inline bool attn_softmax_listed(const attn_softmax_sequence *sequence, int64_t head,
                                       int64_t query_block, int64_t block) {
  const int32_t *offset =
      sequence->list_offsets + head * sequence->list_head + query_block * sequence->list_block;
  int64_t low = offset[0], end = offset[sequence->list_block], high = end;
  while (low < high) {
    int64_t middle = low + (high - low) / 2;
    if (sequence->list[middle] < block)
      low = middle + 1;
    else
      high = middle;
  }
  return low < end && sequence->list[low] == block;
}

static inline int64_t attn_round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}
static inline int64_t attn_ceil_div(int64_t x, int64_t y) {
  return (x + y - 1) / y;
}
static inline int64_t attn_min(int64_t a, int64_t b) {
  return a < b ? a : b;
}
static inline int64_t attn_max(int64_t a, int64_t b) {
  return a > b ? a : b;
}

/* Checks the tensors of a call against the plan (check.c). */
attn_status attn_softmax_check(const softmax_plan *plan, const attn_softmax_args *args,
                               attn_pass pass, const void *workspace);
/* The views of sequence `batch`; args must have been checked. */
attn_softmax_sequence attn_softmax_sequence_of(const softmax_plan *plan,
                                               const attn_softmax_args *args, int64_t batch);

/* Merges `parts` partial results of one row: o[part * stride_o + c], lse[part * stride_lse], into
 * out[value_dim] and the returned LSE; `sink` is one more logit without a value (-inf: none). */
double attn_softmax_merge_f32(int64_t parts, const float *o, int64_t stride_o, const float *lse,
                              int64_t stride_lse, double sink, int64_t value_dim, float *out);
double attn_softmax_merge_f64(int64_t parts, const double *o, int64_t stride_o, const double *lse,
                              int64_t stride_lse, double sink, int64_t value_dim, double *out);

/* Bytes that one thread needs. */
size_t attn_softmax_forward_scratch(const softmax_plan *plan);
size_t attn_softmax_backward_scratch(const softmax_plan *plan);

/* Queues one pass of a plan for a GPU. */
attn_status attn_softmax_run_on_gpu(const softmax_plan *plan, const attn_softmax_args *args,
                                    attn_pass pass, void *workspace);

#endif
