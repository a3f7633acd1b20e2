/* The plan cache: one plan a problem, for the present kernels and threads; the oldest gives way. */
#include "support/test.h"

#include "base/fault.h"
#include "base/memory.h"
#include "engines/plan.h"
#include "engines/plan_cache.h"

enum { MORE_THAN_IT_HOLDS = 80 };

static attn_recurrent_problem problem_of(int64_t length) {
  attn_recurrent_problem problem = ATTN_RECURRENT_PROBLEM_INIT;
  problem.length = length;
  problem.dim = problem.value_dim = 8;
  return problem;
}

static const attn_plan *plan_of(attn_plan_cache *cache, int64_t length) {
  attn_recurrent_problem problem = problem_of(length);
  const attn_plan *plan = NULL;
  assert_ok(attn_plan_cache_recurrent(cache, &problem, &plan));
  assert_non_null(plan);
  assert_int_equal(plan->engine, ATTN_ENGINE_RECURRENT);
  return plan;
}

static void equal_problems_share_a_plan(void **state) {
  (void)state;
  attn_plan_cache *cache = attn_plan_cache_create();
  const attn_plan *first = plan_of(cache, 100);
  const attn_plan *other = plan_of(cache, 200);
  assert_ptr_not_equal(first, other);
  uint64_t before = attn_memory_get_stats().allocations;
  assert_ptr_equal(plan_of(cache, 100), first);
  assert_ptr_equal(plan_of(cache, 200), other);
  assert_int_equal(attn_memory_get_stats().allocations, before);
  attn_plan_cache_destroy(cache);
}

/* Whatever field differs, the plan is another one. */
static void every_field_counts(void **state) {
  (void)state;
  attn_plan_cache *cache = attn_plan_cache_create();
  attn_softmax_problem good = ATTN_SOFTMAX_PROBLEM_INIT;
  good.query_length = good.key_length = 64;
  good.dim = good.value_dim = 8;
  const attn_plan *first, *other;
  assert_ok(attn_plan_cache_softmax(cache, &good, &first));
#define DIFFERS(change)                                                                            \
  do {                                                                                             \
    attn_softmax_problem p = good;                                                                 \
    change;                                                                                        \
    assert_ok(attn_plan_cache_softmax(cache, &p, &other));                                         \
    assert_ptr_not_equal(first, other);                                                            \
  } while (0)
  DIFFERS(p.dtype = ATTN_F64);
  DIFFERS(p.causal = true);
  DIFFERS(p.window_right = 3);
  DIFFERS(p.soft_cap = 2);
  DIFFERS(p.sinks = true);
  DIFFERS((p.paged = true, p.page_size = 16));
  DIFFERS((p.paged = true, p.page_size = 32));
  DIFFERS(p.list_queries = p.list_keys = 32);
  const attn_plan *lists = other;
  DIFFERS((p.list_queries = 32, p.list_keys = 64));
  assert_ptr_not_equal(lists, other);
  DIFFERS(p.splits = 2);
  assert_ok(attn_plan_cache_softmax(cache, &good, &other));
  assert_ptr_equal(first, other);
  attn_plan_cache_destroy(cache);
}

static void threads_and_paths_have_their_own(void **state) {
  (void)state;
  attn_plan_cache *cache = attn_plan_cache_create();
  attn_kernel_path path = attn_get_kernel_path();
  assert_ok(attn_set_threads(1));
  const attn_plan *one = plan_of(cache, 100);
  assert_ok(attn_set_threads(2));
  const attn_plan *two = plan_of(cache, 100);
  assert_ptr_not_equal(one, two);
  assert_int_equal(two->threads, 2);
  assert_ok(attn_set_threads(1));
  assert_ok(attn_set_kernel_path(ATTN_PATH_GENERIC));
  assert_int_equal(plan_of(cache, 100)->info.path, ATTN_PATH_GENERIC);
  assert_ok(attn_set_kernel_path(path));
  assert_ptr_equal(plan_of(cache, 100), one);
  assert_ok(attn_set_threads(0));
  attn_plan_cache_destroy(cache);
}

/* A plan in constant use stays while many others come and go. */
static void the_least_recently_used_goes(void **state) {
  (void)state;
  size_t before = attn_memory_get_stats().live_bytes;
  attn_plan_cache *cache = attn_plan_cache_create();
  const attn_plan *kept = plan_of(cache, 1);
  for (int64_t length = 2; length < MORE_THAN_IT_HOLDS; ++length) {
    plan_of(cache, length);
    assert_ptr_equal(plan_of(cache, 1), kept);
  }
  uint64_t allocations = attn_memory_get_stats().allocations;
  plan_of(cache, 2); /* the oldest: it has to be made again */
  assert_true(attn_memory_get_stats().allocations > allocations);
  attn_plan_cache_destroy(cache);
  assert_int_equal(attn_memory_get_stats().live_bytes, before);
}

static void failures_leave_the_cache_whole(void **state) {
  (void)state;
  attn_plan_cache *cache = attn_plan_cache_create();
  const attn_plan *kept = plan_of(cache, 1), *plan = NULL;
  attn_recurrent_problem bad = problem_of(-3), fresh = problem_of(2);
  assert_int_not_equal(attn_plan_cache_recurrent(cache, &bad, &plan), ATTN_OK);
  attn_fault_arm(ATTN_FAULT_ALLOC, 0);
  attn_status status = attn_plan_cache_recurrent(cache, &fresh, &plan);
  assert_true(attn_fault_disarm(ATTN_FAULT_ALLOC));
  assert_int_equal(status, ATTN_OUT_OF_MEMORY);
  assert_null(plan);
  plan_of(cache, 2);
  assert_ptr_equal(plan_of(cache, 1), kept);
  attn_plan_cache_destroy(cache);
  attn_plan_cache_destroy(NULL);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(equal_problems_share_a_plan),
                                     cmocka_unit_test(every_field_counts),
                                     cmocka_unit_test(threads_and_paths_have_their_own),
                                     cmocka_unit_test(the_least_recently_used_goes),
                                     cmocka_unit_test(failures_leave_the_cache_whole)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
