#include "engines/plan.h"
#include "base/memory.h"
#include "base/status.h"

#include <time.h>

void attn_plan_destroy(attn_plan *plan) {
  attn_free(plan);
}

attn_status attn_plan_get_info(const attn_plan *plan, attn_plan_info *info) {
  if (!plan || !info) return attn_fail(ATTN_INVALID_ARGUMENT, "plan_get_info: NULL argument");
  *info = plan->info;
  return ATTN_OK;
}

double attn_seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}
