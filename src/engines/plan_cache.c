#include "engines/plan_cache.h"
#include "base/memory.h"
#include "base/status.h"
#include "engines/plan.h"

#include <string.h>

enum { ENTRIES = 64, MEMORIES = 8 };

/* A problem as a key: its padding is zero, so that equal problems are equal bytes wherever the
 * caller's struct comes from. */
typedef union problem_key {
  attn_softmax_problem softmax;
  attn_recurrent_problem recurrent;
} problem_key;

typedef struct entry {
  attn_plan *plan;
  uint64_t last_used;
  problem_key key;
} entry;

/* The formatter would move these lists at every pass. */
/* clang-format off */
#define SOFTMAX_FIELDS(X)                                                                          \
  X(struct_size) X(dtype) X(passes) X(batch) X(query_length) X(key_length) X(heads) X(kv_heads)    \
  X(dim) X(value_dim) X(scale) X(causal) X(window_left) X(window_right) X(soft_cap) X(bias)        \
  X(alibi) X(sinks) X(ragged) X(paged) X(page_size) X(list_queries) X(list_keys) X(splits)         \
  X(device.kind) X(device.index) X(planning)
#define RECURRENT_FIELDS(X)                                                                        \
  X(struct_size) X(dtype) X(passes) X(batch) X(length) X(heads) X(value_heads) X(dim) X(value_dim) \
  X(scale) X(decay) X(update) X(normalise) X(epsilon) X(ragged) X(block)        \
  X(device.kind) X(device.index) X(planning)
/* clang-format on */
/* A field added to a problem has to be added above: all of them and what lies between, at most so
 * much with 64-bit pointers, make up the struct. */
enum { SOFTMAX_PADDING = 14, RECURRENT_PADDING = 18 };
#define SOFTMAX_SIZE(field)   +sizeof(((attn_softmax_problem *)0)->field)
#define RECURRENT_SIZE(field) +sizeof(((attn_recurrent_problem *)0)->field)
_Static_assert(SOFTMAX_FIELDS(SOFTMAX_SIZE) + SOFTMAX_PADDING >= sizeof(attn_softmax_problem),
               "the key lacks a field");
_Static_assert(RECURRENT_FIELDS(RECURRENT_SIZE) + RECURRENT_PADDING >=
                   sizeof(attn_recurrent_problem),
               "the key lacks a field");

static void softmax_key(problem_key *key, const attn_softmax_problem *problem) {
  memset(key, 0, sizeof *key);
#define COPY(field) key->softmax.field = problem->field;
  SOFTMAX_FIELDS(COPY)
#undef COPY
}

static void recurrent_key(problem_key *key, const attn_recurrent_problem *problem) {
  memset(key, 0, sizeof *key);
#define COPY(field) key->recurrent.field = problem->field;
  RECURRENT_FIELDS(COPY)
#undef COPY
}

/* A Legendre memory's matrices; `legendre` is NULL in an empty place. */
typedef struct memory_entry {
  attn_legendre *legendre;
  attn_device device;
  attn_dtype dtype;
  int64_t size;
  double theta;
  uint64_t last_used;
} memory_entry;

struct attn_plan_cache {
  entry entries[ENTRIES];
  memory_entry memories[MEMORIES];
  uint64_t clock;
};

attn_plan_cache *attn_plan_cache_create(void) {
  return attn_alloc_zero(sizeof(attn_plan_cache));
}

void attn_plan_cache_destroy(attn_plan_cache *cache) {
  if (!cache) return;
  for (int i = 0; i < ENTRIES; ++i) attn_plan_destroy(cache->entries[i].plan);
  for (int i = 0; i < MEMORIES; ++i) attn_legendre_destroy(cache->memories[i].legendre);
  attn_free(cache);
}

static entry *find(attn_plan_cache *cache, attn_engine engine, const problem_key *key) {
  for (int i = 0; i < ENTRIES; ++i) {
    entry *e = &cache->entries[i];
    if (e->plan && e->plan->engine == engine && memcmp(&e->key, key, sizeof *key) == 0 &&
        e->plan->kernels == attn_kernels_get() && e->plan->threads == attn_get_threads()) {
      e->last_used = ++cache->clock;
      return e;
    }
  }
  return NULL;
}

static entry *replace_oldest(attn_plan_cache *cache, attn_plan *plan, const problem_key *key) {
  entry *oldest = &cache->entries[0];
  for (int i = 1; i < ENTRIES; ++i)
    if (cache->entries[i].last_used < oldest->last_used) oldest = &cache->entries[i];
  attn_plan_destroy(oldest->plan);
  oldest->plan = plan;
  oldest->last_used = ++cache->clock;
  memcpy(&oldest->key, key, sizeof *key); /* an assignment need not keep the padding */
  return oldest;
}

attn_status attn_plan_cache_softmax(attn_plan_cache *cache, const attn_softmax_problem *problem,
                                    const attn_plan **plan) {
  problem_key key;
  softmax_key(&key, problem);
  entry *found = find(cache, ATTN_ENGINE_SOFTMAX, &key);
  if (!found) {
    attn_plan *fresh;
    ATTN_TRY(attn_softmax_plan(problem, &fresh));
    found = replace_oldest(cache, fresh, &key);
  }
  *plan = found->plan;
  return ATTN_OK;
}

attn_status attn_plan_cache_recurrent(attn_plan_cache *cache, const attn_recurrent_problem *problem,
                                      const attn_plan **plan) {
  problem_key key;
  recurrent_key(&key, problem);
  entry *found = find(cache, ATTN_ENGINE_RECURRENT, &key);
  if (!found) {
    attn_plan *fresh;
    ATTN_TRY(attn_recurrent_plan(problem, &fresh));
    found = replace_oldest(cache, fresh, &key);
  }
  *plan = found->plan;
  return ATTN_OK;
}

attn_status attn_plan_cache_legendre(attn_plan_cache *cache, attn_device device, attn_dtype dtype,
                                     int64_t size, double theta, attn_legendre **legendre) {
  memory_entry *oldest = &cache->memories[0];
  for (int i = 0; i < MEMORIES; ++i) {
    memory_entry *e = &cache->memories[i];
    if (e->legendre && e->size == size && e->theta == theta && e->dtype == dtype &&
        attn_same_device(e->device, device)) {
      e->last_used = ++cache->clock;
      *legendre = e->legendre;
      return ATTN_OK;
    }
    if (e->last_used < oldest->last_used) oldest = e;
  }
  ATTN_TRY(attn_legendre_create(device, dtype, size, theta, legendre));
  attn_legendre_destroy(oldest->legendre);
  *oldest = (memory_entry){.legendre = *legendre,
                           .device = device,
                           .dtype = dtype,
                           .size = size,
                           .theta = theta,
                           .last_used = ++cache->clock};
  return ATTN_OK;
}

void attn_plan_cache_visit(const attn_plan_cache *cache,
                           void (*visit)(void *context, const attn_plan_info *info),
                           void *context) {
  for (int i = 0; i < ENTRIES; ++i)
    if (cache->entries[i].plan) visit(context, &cache->entries[i].plan->info);
}
