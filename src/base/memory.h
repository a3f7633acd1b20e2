/* Memory: aligned allocation with accounting and fault injection, and arenas.
 *
 * All heap memory of the library comes from here, so that tests can make the n-th allocation fail,
 * benchmarks can report the peak, and a decode step can be shown to allocate nothing. */
#ifndef ATTN_BASE_MEMORY_H
#define ATTN_BASE_MEMORY_H

#include "attn/base.h"

enum { ATTN_ALIGNMENT = 64 }; /* a cache line, an AVX-512 register, a row of an AMX tile */

/* NULL when out of memory (message set) or when size overflows; zeroed only by attn_alloc_zero.
 * A size of 0 gives a valid pointer. */
void *attn_alloc(size_t size);
void *attn_alloc_zero(size_t size);
/* count * size with an overflow check; zeroed. */
void *attn_alloc_array(size_t count, size_t size);
/* Grows or shrinks, keeping the contents; NULL (and the old block intact) on failure. */
void *attn_realloc(void *memory, size_t size);
void attn_free(void *memory);
char *attn_strdup(const char *text);

typedef struct attn_memory_stats {
  size_t live_bytes, peak_bytes;
  uint64_t allocations; /* calls so far */
} attn_memory_stats;
attn_memory_stats attn_memory_get_stats(void);
void attn_memory_reset_peak(void); /* peak := live */

/* An arena hands out memory from large chunks and gives it back all at once. */
typedef struct attn_arena attn_arena;
typedef struct attn_arena_mark {
  size_t chunk, used;
} attn_arena_mark;

attn_arena *attn_arena_create(size_t first_chunk); /* NULL when out of memory */
/* The same over memory that is not the heap's: a GPU's. The arena never looks into it. */
typedef struct attn_arena_source {
  void *(*take)(void *context, size_t size); /* NULL with the message set */
  void (*give)(void *context, void *memory);
  void *context;
  size_t alignment;     /* of what is handed out; `take` gives at least that */
  size_t largest_chunk; /* chunks double up to this size, unless more is asked for at once */
} attn_arena_source;
attn_arena *attn_arena_create_from(size_t first_chunk, attn_arena_source source);
void attn_arena_destroy(attn_arena *arena);
void *attn_arena_alloc(attn_arena *arena, size_t size); /* aligned to 64, not zeroed; NULL on OOM */
void *attn_arena_alloc_zero(attn_arena *arena, size_t size); /* of the heap only */
attn_arena_mark attn_arena_get_mark(const attn_arena *arena);
/* Gives back everything allocated since the mark; chunks are kept for reuse. */
void attn_arena_release(attn_arena *arena, attn_arena_mark mark);
void attn_arena_reset(attn_arena *arena);
/* Before anything is allocated: one chunk of this size, so that no memory is lost at the ends of
 * many. false, and nothing is changed, when there is not as much. */
bool attn_arena_reserve(attn_arena *arena, size_t size);
size_t attn_arena_capacity(const attn_arena *arena);

#endif
