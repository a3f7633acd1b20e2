#include "engines/plan_cache.h"
#include "base/memory.h"
#include "engines/plan.h"

#include <string.h>

enum { ENTRIES = 64 };

typedef struct entry {
  attn_plan *plan;
  uint64_t last_used;
  union {
    attn_softmax_problem softmax;
    attn_recurrent_problem recurrent;
  } problem;
} entry;

struct attn_plan_cache {
  entry entries[ENTRIES];
  uint64_t clock;
};

attn_plan_cache *attn_plan_cache_create(void) {
  return attn_alloc_zero(sizeof(attn_plan_cache));
}

void attn_plan_cache_destroy(attn_plan_cache *cache) {
  if (!cache) return;
  for (int i = 0; i < ENTRIES; ++i) attn_plan_destroy(cache->entries[i].plan);
  attn_free(cache);
}

static entry *find(attn_plan_cache *cache, attn_engine engine, const void *problem, size_t size) {
  for (int i = 0; i < ENTRIES; ++i) {
    entry *e = &cache->entries[i];
    /* Padding bytes may differ between equal problems: that costs a plan, never a wrong one. */
    if (e->plan && e->plan->engine == engine && memcmp(&e->problem, problem, size) == 0 &&
        e->plan->kernels == attn_kernels_get() && e->plan->threads == attn_get_threads()) {
      e->last_used = ++cache->clock;
      return e;
    }
  }
  return NULL;
}

static entry *replace_oldest(attn_plan_cache *cache, attn_plan *plan) {
  entry *oldest = &cache->entries[0];
  for (int i = 1; i < ENTRIES; ++i)
    if (cache->entries[i].last_used < oldest->last_used) oldest = &cache->entries[i];
  attn_plan_destroy(oldest->plan);
  oldest->plan = plan;
  oldest->last_used = ++cache->clock;
  return oldest;
}

attn_status attn_plan_cache_softmax(attn_plan_cache *cache, const attn_softmax_problem *problem,
                                    const attn_plan **plan) {
  entry *found = find(cache, ATTN_ENGINE_SOFTMAX, problem, sizeof *problem);
  if (!found) {
    attn_plan *fresh;
    attn_status status = attn_softmax_plan(problem, &fresh);
    if (status != ATTN_OK) return status;
    found = replace_oldest(cache, fresh);
    memcpy(&found->problem, problem, sizeof *problem);
  }
  *plan = found->plan;
  return ATTN_OK;
}

attn_status attn_plan_cache_recurrent(attn_plan_cache *cache, const attn_recurrent_problem *problem,
                                      const attn_plan **plan) {
  entry *found = find(cache, ATTN_ENGINE_RECURRENT, problem, sizeof *problem);
  if (!found) {
    attn_plan *fresh;
    attn_status status = attn_recurrent_plan(problem, &fresh);
    if (status != ATTN_OK) return status;
    found = replace_oldest(cache, fresh);
    memcpy(&found->problem, problem, sizeof *problem);
  }
  *plan = found->plan;
  return ATTN_OK;
}

void attn_plan_cache_visit(const attn_plan_cache *cache,
                           void (*visit)(void *context, const attn_plan_info *info),
                           void *context) {
  for (int i = 0; i < ENTRIES; ++i)
    if (cache->entries[i].plan) visit(context, &cache->entries[i].plan->info);
}
