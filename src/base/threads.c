#include "base/status.h"

#include <omp.h>
#include <stdatomic.h>

static _Atomic int chosen; /* 0: the default */

attn_status attn_set_threads(int n) {
  if (n < 0 || n > 4096)
    return attn_fail(ATTN_INVALID_ARGUMENT, "threads: %d is not in 0 to 4096", n);
  atomic_store(&chosen, n);
  return ATTN_OK;
}

int attn_get_threads(void) {
  int n = atomic_load(&chosen);
  return n ? n : omp_get_max_threads();
}
