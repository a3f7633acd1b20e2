/* Tiles of queries and keys: what does not depend on the type of the work. */
#ifndef ATTN_ENGINES_SOFTMAX_TILES_H
#define ATTN_ENGINES_SOFTMAX_TILES_H

#include "engines/softmax/softmax.h"

#define LOG2_E 1.4426950408889634
#define LN_2   0.6931471805599453

enum { PACKED_ROWS = 32 }; /* packed matrices have whole multiples of so many rows */
enum { MAX_BLOCK_ROWS = 1024, MAX_BLOCK_KEYS = 1024 };

/* Rows first .. first + count - 1 of `fold` heads that share a key head. With a block list (then
 * fold is 1) the keys from `keys_from` to `keys_to` - 1 are in question, which have the same place
 * in the lists of all rows: see next_listed. */
typedef struct tile_rows {
  int64_t first, count, fold, head;
  int64_t keys_from, keys_to;
} tile_rows;

static inline int64_t tile_query(const tile_rows *rows, int64_t r) {
  return (rows->first + r) / rows->fold;
}
static inline int64_t tile_head(const tile_rows *rows, int64_t r) {
  return rows->head + (rows->first + r) % rows->fold;
}

/* The keys that any row of the tile sees by the masks. */
static inline attn_key_range tile_unmasked(const softmax_plan *plan,
                                           const attn_softmax_sequence *sequence,
                                           const tile_rows *rows) {
  /* Both ends grow with the query. */
  attn_key_range low =
      attn_softmax_visible(&plan->problem, sequence->queries, sequence->keys, tile_query(rows, 0));
  attn_key_range high = attn_softmax_visible(&plan->problem, sequence->queries, sequence->keys,
                                             tile_query(rows, rows->count - 1));
  return (attn_key_range){low.first, high.end};
}

/* Whether the keys in question are on the list of a row. */
static inline bool row_listed(const softmax_plan *plan, const attn_softmax_sequence *sequence,
                              const tile_rows *rows, int64_t r) {
  const attn_softmax_problem *problem = &plan->problem;
  return attn_softmax_listed(sequence, rows->head, (rows->first + r) / problem->list_queries,
                             rows->keys_from / problem->list_keys);
}

/* How many rows from r on have the same list. */
static inline int64_t same_list(const softmax_plan *plan, const tile_rows *rows, int64_t r) {
  int64_t size = plan->problem.list_queries;
  return attn_min(rows->count, attn_round_up(rows->first + r + 1, size) - rows->first) - r;
}

/* On the lists of how many rows the keys in question are. */
static inline int64_t rows_listed(const softmax_plan *plan, const attn_softmax_sequence *sequence,
                                  const tile_rows *rows) {
  int64_t count = 0;
  for (int64_t r = 0, same; r < rows->count; r += same) {
    same = same_list(plan, rows, r);
    if (row_listed(plan, sequence, rows, r)) count += same;
  }
  return count;
}

/* Puts the next keys below `end` in question, from keys_to on: those of a block that is on the list
 * of any row, and of the blocks behind it that are on the lists of the same rows. Without a block
 * list everything up to `end`, once. */
static inline bool next_listed(const softmax_plan *plan, const attn_softmax_sequence *sequence,
                               int64_t end, tile_rows *rows) {
  int64_t size = plan->problem.list_keys, listed = 0;
  rows->keys_from = rows->keys_to;
  if (!size) {
    rows->keys_to = end;
    return rows->keys_from < end;
  }
  for (; rows->keys_from < end; rows->keys_from = attn_round_up(rows->keys_from + 1, size))
    if ((listed = rows_listed(plan, sequence, rows))) break;
  if (rows->keys_from >= end) return false;
  tile_rows next = *rows;
  do next.keys_from = attn_round_up(next.keys_from + 1, size);
  while (next.keys_from < end && listed == rows->count &&
         rows_listed(plan, sequence, &next) == listed);
  rows->keys_to = attn_min(next.keys_from, end);
  return true;
}

/* The part of the keys in question that is in a range. */
static inline attn_key_range within(const softmax_plan *plan, const tile_rows *rows,
                                    attn_key_range range) {
  if (!plan->problem.list_keys) return range;
  range.first = attn_max(range.first, rows->keys_from);
  range.end = attn_max(attn_min(range.end, rows->keys_to), range.first);
  return range;
}

/* The keys in question that any row of the tile sees. */
static inline attn_key_range tile_visible(const softmax_plan *plan,
                                          const attn_softmax_sequence *sequence,
                                          const tile_rows *rows) {
  return within(plan, rows, tile_unmasked(plan, sequence, rows));
}

/* Asks for a stored row: heads of a token lie between, so the processor does not foresee the next.
 */
enum { PREFETCHED_ROWS = 8 };
static inline void prefetch_row(const attn_softmax_rows *rows, int64_t token, int64_t head,
                                int64_t width) {
  const char *row = attn_softmax_row(rows, token, head);
  for (int64_t i = 0; i < width * (int64_t)attn_dtype_size(rows->dtype); i += 64)
    __builtin_prefetch(row + i);
}

/* The scores of few rows by dot products with the keys as they are stored. */
static inline void direct_scores(const softmax_plan *plan, const attn_softmax_sequence *sequence,
                                 const tile_rows *rows, int64_t key, int64_t keys, const float *q,
                                 int64_t ldq, float *s, int64_t lds) {
  const attn_kernels *kernels = plan->base.kernels;
  const attn_softmax_rows *k = &sequence->k;
  for (int64_t j = 0, run; j < keys; j += run) {
    const void *row = attn_softmax_row(k, key + j, rows->head / plan->group);
    run = attn_softmax_run(k, key + j, keys - j);
    if (k->dtype == ATTN_BF16)
      kernels->matvec_bf16(rows->count, run, plan->problem.dim, q, ldq, row, k->token, s + j, lds);
    else
      kernels->matvec_f32(rows->count, run, plan->problem.dim, q, ldq, row, k->token, s + j, lds);
  }
}

/* o += P V for few rows; no row sees a key outside first .. end - 1 of the tile. */
static inline void direct_values(const softmax_plan *plan, const attn_softmax_sequence *sequence,
                                 const tile_rows *rows, int64_t key, int64_t first, int64_t end,
                                 const float *p, int64_t ldp, float *o, int64_t ldo) {
  const attn_kernels *kernels = plan->base.kernels;
  const attn_softmax_rows *v = &sequence->v;
  int64_t width = plan->problem.value_dim;
  for (int64_t j = first, run; j < end; j += run) {
    const void *row = attn_softmax_row(v, key + j, rows->head / plan->group);
    run = attn_softmax_run(v, key + j, end - j);
    if (v->dtype == ATTN_BF16)
      kernels->weigh_rows_bf16(rows->count, run, width, p + j, ldp, row, v->token, o, ldo);
    else
      kernels->weigh_rows_f32(rows->count, run, width, p + j, ldp, row, v->token, o, ldo);
  }
}

/* The keys in question that every row of the tile sees. */
static inline attn_key_range tile_seen_by_all(const softmax_plan *plan,
                                              const attn_softmax_sequence *sequence,
                                              const tile_rows *rows) {
  attn_key_range low =
      attn_softmax_visible(&plan->problem, sequence->queries, sequence->keys, tile_query(rows, 0));
  attn_key_range high = attn_softmax_visible(&plan->problem, sequence->queries, sequence->keys,
                                             tile_query(rows, rows->count - 1));
  attn_key_range all = {high.first, low.end};
  if (plan->problem.list_keys && rows_listed(plan, sequence, rows) < rows->count) all.end = 0;
  return within(plan, rows, all);
}

/* The columns that each row sees of the keys key .. key + keys - 1; false when no row sees any. */
static inline bool tile_limits(const softmax_plan *plan, const attn_softmax_sequence *sequence,
                               const tile_rows *rows, int64_t key, int64_t keys, int32_t *begin,
                               int32_t *end) {
  bool any = false, listed = true;
  for (int64_t r = 0, next = 0; r < rows->count; ++r) {
    attn_key_range range = within(plan, rows,
                                  attn_softmax_visible(&plan->problem, sequence->queries,
                                                       sequence->keys, tile_query(rows, r)));
    if (plan->problem.list_keys && r == next) {
      listed = row_listed(plan, sequence, rows, r);
      next += same_list(plan, rows, r);
    }
    if (!listed) range.end = range.first;
    begin[r] = (int32_t)attn_min(attn_max(range.first - key, 0), keys);
    end[r] = (int32_t)attn_min(attn_max(range.end - key, 0), keys);
    any |= begin[r] < end[r];
  }
  return any;
}

#endif
