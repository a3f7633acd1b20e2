/* Tiles of queries and keys: what does not depend on the type of the work. */
#ifndef ATTN_ENGINES_SOFTMAX_TILES_H
#define ATTN_ENGINES_SOFTMAX_TILES_H

#include "engines/softmax/softmax.h"

#define LOG2_E 1.4426950408889634
#define LN_2   0.6931471805599453

enum { PACKED_ROWS = 32 }; /* packed matrices have whole multiples of so many rows */
enum { MAX_BLOCK_ROWS = 1024, MAX_BLOCK_KEYS = 1024 };

/* Rows first .. first + count - 1 of `fold` heads that share a key head. */
typedef struct tile_rows {
  int64_t first, count, fold, head;
} tile_rows;

static inline int64_t tile_query(const tile_rows *rows, int64_t r) {
  return (rows->first + r) / rows->fold;
}
static inline int64_t tile_head(const tile_rows *rows, int64_t r) {
  return rows->head + (rows->first + r) % rows->fold;
}

/* The keys that any row of the tile sees. */
static inline attn_key_range tile_visible(const softmax_plan *plan,
                                          const attn_softmax_sequence *sequence,
                                          const tile_rows *rows) {
  /* Both ends grow with the query. */
  attn_key_range low =
      attn_softmax_visible(&plan->problem, sequence->queries, sequence->keys, tile_query(rows, 0));
  attn_key_range high = attn_softmax_visible(&plan->problem, sequence->queries, sequence->keys,
                                             tile_query(rows, rows->count - 1));
  return (attn_key_range){low.first, high.end};
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

/* The keys that every row of the tile sees. */
static inline attn_key_range tile_seen_by_all(const softmax_plan *plan,
                                              const attn_softmax_sequence *sequence,
                                              const tile_rows *rows) {
  attn_key_range low =
      attn_softmax_visible(&plan->problem, sequence->queries, sequence->keys, tile_query(rows, 0));
  attn_key_range high = attn_softmax_visible(&plan->problem, sequence->queries, sequence->keys,
                                             tile_query(rows, rows->count - 1));
  return (attn_key_range){high.first, low.end};
}

/* The columns that each row sees of the keys key .. key + keys - 1; false when no row sees any. */
static inline bool tile_limits(const softmax_plan *plan, const attn_softmax_sequence *sequence,
                               const tile_rows *rows, int64_t key, int64_t keys, int32_t *begin,
                               int32_t *end) {
  bool any = false;
  for (int64_t r = 0; r < rows->count; ++r) {
    attn_key_range range = attn_softmax_visible(&plan->problem, sequence->queries, sequence->keys,
                                                tile_query(rows, r));
    begin[r] = (int32_t)attn_min(attn_max(range.first - key, 0), keys);
    end[r] = (int32_t)attn_min(attn_max(range.end - key, 0), keys);
    any |= begin[r] < end[r];
  }
  return any;
}

#endif
