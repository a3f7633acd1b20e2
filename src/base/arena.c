/* Arenas: a list of chunks, each twice as large as the one before, up to the largest. */
#include "base/memory.h"
#include "base/status.h"

#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

/* A chunk of this many bytes is worth large pages: the kernel's are 2 MiB on x86-64. */
enum { MAX_CHUNKS = 256, SMALL_PAGE = 4096, HUGE_CHUNK = 8 << 20 };

typedef struct chunk {
  char *memory;
  size_t size, used;
} chunk;

struct attn_arena {
  attn_arena_source source;
  chunk chunks[MAX_CHUNKS];
  size_t count;   /* chunks that exist */
  size_t current; /* the chunk that is being filled; those after it are empty */
};

static size_t align_up(const attn_arena *arena, size_t size) {
  size_t alignment = arena->source.alignment;
  return (size + alignment - 1) / alignment * alignment;
}

/* Asks for large pages, which take a five-hundredth of the page faults and of the translations: the
 * first touch of a training step's memory cost as much as the step. Only a wish; memory that is
 * never touched still costs nothing. */
static void prefer_large_pages(char *memory, size_t size) {
#if defined(MADV_HUGEPAGE)
  if (size < HUGE_CHUNK) return;
  uintptr_t start = ((uintptr_t)memory + SMALL_PAGE - 1) / SMALL_PAGE * SMALL_PAGE;
  uintptr_t end = ((uintptr_t)memory + size) / SMALL_PAGE * SMALL_PAGE;
  madvise((void *)start, end - start, MADV_HUGEPAGE);
#else
  (void)memory, (void)size;
#endif
}

static void *take_from_heap(void *context, size_t size) {
  (void)context;
  char *memory = attn_alloc(size);
  if (memory) prefer_large_pages(memory, size);
  return memory;
}

static void give_to_heap(void *context, void *memory) {
  (void)context;
  attn_free(memory);
}

static bool add_chunk(attn_arena *arena, size_t size) {
  if (arena->count == MAX_CHUNKS) {
    attn_fail(ATTN_OUT_OF_MEMORY, "out of memory: an arena of %d chunks is full", MAX_CHUNKS);
    return false;
  }
  char *memory = arena->source.take(arena->source.context, size);
  if (!memory) return false;
  arena->chunks[arena->count++] = (chunk){.memory = memory, .size = size};
  return true;
}

attn_arena *attn_arena_create(size_t first_chunk) {
  return attn_arena_create_from(first_chunk, (attn_arena_source){.take = take_from_heap,
                                                                 .give = give_to_heap,
                                                                 .alignment = ATTN_ALIGNMENT,
                                                                 .largest_chunk = SIZE_MAX});
}

attn_arena *attn_arena_create_from(size_t first_chunk, attn_arena_source source) {
  attn_arena *arena = attn_alloc_zero(sizeof *arena);
  if (!arena) return NULL;
  arena->source = source;
  if (!add_chunk(arena, align_up(arena, first_chunk ? first_chunk : (size_t)1 << 16))) {
    attn_free(arena);
    return NULL;
  }
  return arena;
}

void attn_arena_destroy(attn_arena *arena) {
  if (!arena) return;
  for (size_t i = 0; i < arena->count; ++i)
    arena->source.give(arena->source.context, arena->chunks[i].memory);
  attn_free(arena);
}

void *attn_arena_alloc(attn_arena *arena, size_t size) {
  size_t needed = align_up(arena, size);
  if (needed < size) {
    attn_fail(ATTN_OUT_OF_MEMORY, "out of memory: %zu bytes asked for", size);
    return NULL;
  }
  for (;;) {
    chunk *current = &arena->chunks[arena->current];
    if (needed <= current->size - current->used) {
      void *memory = current->memory + current->used;
      current->used += needed;
      return memory;
    }
    if (arena->current + 1 == arena->count) {
      size_t size_next = arena->chunks[arena->count - 1].size * 2;
      if (size_next > arena->source.largest_chunk) size_next = arena->source.largest_chunk;
      if (!add_chunk(arena, size_next > needed ? size_next : needed)) return NULL;
    }
    arena->chunks[++arena->current].used = 0;
  }
}

void *attn_arena_alloc_zero(attn_arena *arena, size_t size) {
  void *memory = attn_arena_alloc(arena, size);
  if (memory) memset(memory, 0, size);
  return memory;
}

attn_arena_mark attn_arena_get_mark(const attn_arena *arena) {
  return (attn_arena_mark){.chunk = arena->current, .used = arena->chunks[arena->current].used};
}

void attn_arena_release(attn_arena *arena, attn_arena_mark mark) {
  arena->current = mark.chunk;
  arena->chunks[mark.chunk].used = mark.used;
}

void attn_arena_reset(attn_arena *arena) {
  attn_arena_release(arena, (attn_arena_mark){0});
}

bool attn_arena_reserve(attn_arena *arena, size_t size) {
  chunk *only = &arena->chunks[0];
  size = align_up(arena, size);
  if (arena->count > 1 || only->used > 0 || size <= only->size) return true;
  char *memory = arena->source.take(arena->source.context, size);
  if (!memory) return false;
  arena->source.give(arena->source.context, only->memory);
  *only = (chunk){.memory = memory, .size = size};
  return true;
}

size_t attn_arena_capacity(const attn_arena *arena) {
  size_t total = 0;
  for (size_t i = 0; i < arena->count; ++i) total += arena->chunks[i].size;
  return total;
}
