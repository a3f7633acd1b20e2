#include "base/fault.h"

#include <stdatomic.h>

/* Remaining operations that succeed; negative when disarmed. One relaxed load in the usual case. */
static _Atomic int64_t remaining[ATTN_FAULT_KINDS] = {-1, -1};
static _Atomic bool delivered[ATTN_FAULT_KINDS];

void attn_fault_arm(attn_fault_kind kind, int64_t skip) {
  atomic_store(&delivered[kind], false);
  atomic_store(&remaining[kind], skip);
}

bool attn_fault_disarm(attn_fault_kind kind) {
  atomic_store(&remaining[kind], -1);
  return atomic_load(&delivered[kind]);
}

bool attn_fault_hit(attn_fault_kind kind) {
  int64_t left = atomic_load_explicit(&remaining[kind], memory_order_relaxed);
  if (left < 0) return false;
  while (left > 0) {
    if (atomic_compare_exchange_weak(&remaining[kind], &left, left - 1)) return false;
    if (left < 0) return false;
  }
  atomic_store(&delivered[kind], true);
  return true;
}
