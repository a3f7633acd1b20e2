#include "base/memory.h"
#include "base/fault.h"
#include "base/status.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* Each block is preceded by a header of one alignment unit that remembers its size. */
typedef struct header {
  size_t size;
} header;

static _Atomic size_t live_bytes, peak_bytes;
static _Atomic uint64_t allocations;

static header *header_of(void *memory) {
  return (header *)((char *)memory - ATTN_ALIGNMENT);
}

static void account(size_t added) {
  size_t live = atomic_fetch_add(&live_bytes, added) + added;
  size_t peak = atomic_load(&peak_bytes);
  while (live > peak && !atomic_compare_exchange_weak(&peak_bytes, &peak, live)) {
  }
  atomic_fetch_add(&allocations, 1);
}

void *attn_alloc(size_t size) {
  size_t padded = (size + ATTN_ALIGNMENT - 1) / ATTN_ALIGNMENT * ATTN_ALIGNMENT;
  char *block = NULL;
  if (padded >= size && padded <= SIZE_MAX - ATTN_ALIGNMENT && !attn_fault_hit(ATTN_FAULT_ALLOC))
    block = aligned_alloc(ATTN_ALIGNMENT, padded + ATTN_ALIGNMENT);
  if (!block) {
    attn_fail(ATTN_OUT_OF_MEMORY, "out of memory: %zu bytes asked for", size);
    return NULL;
  }
  ((header *)block)->size = size;
  account(size);
  return block + ATTN_ALIGNMENT;
}

void *attn_alloc_zero(size_t size) {
  void *memory = attn_alloc(size);
  if (memory) memset(memory, 0, size);
  return memory;
}

void *attn_alloc_array(size_t count, size_t size) {
  if (size && count > SIZE_MAX / size) {
    attn_fail(ATTN_OUT_OF_MEMORY, "out of memory: %zu elements of %zu bytes overflow", count, size);
    return NULL;
  }
  return attn_alloc_zero(count * size);
}

void *attn_realloc(void *memory, size_t size) {
  void *fresh = attn_alloc(size);
  if (!fresh || !memory) return fresh;
  size_t old = header_of(memory)->size;
  memcpy(fresh, memory, old < size ? old : size);
  attn_free(memory);
  return fresh;
}

void attn_free(void *memory) {
  if (!memory) return;
  atomic_fetch_sub(&live_bytes, header_of(memory)->size);
  free(header_of(memory));
}

char *attn_strdup(const char *text) {
  size_t size = strlen(text) + 1;
  char *copy = attn_alloc(size);
  if (copy) memcpy(copy, text, size);
  return copy;
}

attn_memory_stats attn_memory_get_stats(void) {
  return (attn_memory_stats){.live_bytes = atomic_load(&live_bytes),
                             .peak_bytes = atomic_load(&peak_bytes),
                             .allocations = atomic_load(&allocations)};
}

void attn_memory_reset_peak(void) {
  atomic_store(&peak_bytes, atomic_load(&live_bytes));
}
