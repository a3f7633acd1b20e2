/* Plans by problem: a training step or a decode step asks for the same few again and again. */
#ifndef ATTN_ENGINES_PLAN_CACHE_H
#define ATTN_ENGINES_PLAN_CACHE_H

#include "attn/recurrent.h"
#include "attn/softmax.h"
#include "engines/legendre/legendre.h"

typedef struct attn_plan_cache attn_plan_cache;

attn_plan_cache *attn_plan_cache_create(void); /* NULL when out of memory */
void attn_plan_cache_destroy(attn_plan_cache *cache);

/* The plan of the problem for the current kernel path and threads: an earlier one, or a new one
 * that takes the place of the least recently used. The cache owns it. */
attn_status attn_plan_cache_softmax(attn_plan_cache *cache, const attn_softmax_problem *problem,
                                    const attn_plan **plan);
attn_status attn_plan_cache_recurrent(attn_plan_cache *cache, const attn_recurrent_problem *problem,
                                      const attn_plan **plan);

/* The same of Legendre memories, for as many as models usually have; errors are those of
 * attn_legendre_create. */
attn_status attn_plan_cache_legendre(attn_plan_cache *cache, attn_device device, attn_dtype dtype,
                                     int64_t size, double theta, attn_legendre **legendre);

/* Calls visit(context, info) for each plan in the cache. */
void attn_plan_cache_visit(const attn_plan_cache *cache,
                           void (*visit)(void *context, const attn_plan_info *info), void *context);

#endif
