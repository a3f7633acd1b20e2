#include "mixers/shared/state.h"
#include "base/memory.h"
#include "base/status.h"
#include "tensor/device.h"

#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>

/* Page pools ------------------------------------------------------------------------------------
 */

struct attn_page_pool {
  _Atomic int64_t users;
  attn_device device;
  int64_t pages;
  size_t page_bytes, mapped_bytes;
  char *memory;              /* reserved address space: pages cost memory once they are written */
  _Atomic int32_t *sharers;  /* of each page; 0: free */
  _Atomic int64_t next_free; /* where to look first */
};

/* Address space that costs memory once it is written; on a GPU, memory. */
static void *reserve(const attn_page_pool *pool) {
  if (attn_is_cuda(pool->device)) return attn_device_alloc(pool->device, pool->mapped_bytes);
  void *memory = mmap(NULL, pool->mapped_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory != MAP_FAILED) return memory;
  (void)attn_fail(ATTN_OUT_OF_MEMORY, "state: cannot reserve %lld pages", (long long)pool->pages);
  return NULL;
}

static void give_back(const attn_page_pool *pool) {
  if (attn_is_cuda(pool->device))
    attn_device_free(pool->device, pool->memory);
  else if (pool->memory)
    munmap(pool->memory, pool->mapped_bytes);
}

attn_status attn_page_pool_create(attn_device device, const attn_state_part *part, int64_t pages,
                                  attn_page_pool **pool) {
  if (pages < 1 || pages > INT32_MAX)
    return attn_fail(ATTN_INVALID_ARGUMENT, "state: %lld pages are not in 1 to %d",
                     (long long)pages, INT32_MAX);
  attn_page_pool *p = attn_alloc_zero(sizeof *p);
  if (!p) return ATTN_OUT_OF_MEMORY;
  p->pages = pages;
  p->page_bytes = (size_t)(ATTN_PAGE_TOKENS * part->shape[0]) * attn_dtype_size(part->dtype);
  p->mapped_bytes = (size_t)pages * p->page_bytes;
  p->sharers = attn_alloc_array((size_t)pages, sizeof *p->sharers);
  p->device = device;
  if (p->sharers) p->memory = reserve(p);
  if (!p->memory) {
    attn_free((void *)p->sharers);
    attn_free(p);
    return ATTN_OUT_OF_MEMORY;
  }
  atomic_store(&p->users, 1);
  *pool = p;
  return ATTN_OK;
}

void attn_page_pool_retain(attn_page_pool *pool) {
  atomic_fetch_add(&pool->users, 1);
}

void attn_page_pool_release(attn_page_pool *pool) {
  if (!pool || atomic_fetch_sub(&pool->users, 1) != 1) return;
  give_back(pool);
  attn_free((void *)pool->sharers);
  attn_free(pool);
}

/* A page with one sharer, or -1. Threads race for a page by compare-and-swap on its count. */
static int32_t take_page(attn_page_pool *pool) {
  int64_t start = atomic_load_explicit(&pool->next_free, memory_order_relaxed);
  for (int64_t i = 0; i < pool->pages; ++i) {
    int64_t page = (start + i) % pool->pages;
    int32_t none = 0;
    if (atomic_load_explicit(&pool->sharers[page], memory_order_relaxed) == 0 &&
        atomic_compare_exchange_strong(&pool->sharers[page], &none, 1)) {
      atomic_store_explicit(&pool->next_free, page + 1, memory_order_relaxed);
      return (int32_t)page;
    }
  }
  return -1;
}

static void share_page(attn_page_pool *pool, int32_t page) {
  atomic_fetch_add(&pool->sharers[page], 1);
}

static void drop_page(attn_page_pool *pool, int32_t page) {
  if (atomic_fetch_sub(&pool->sharers[page], 1) == 1)
    atomic_store_explicit(&pool->next_free, page, memory_order_relaxed);
}

/* States ----------------------------------------------------------------------------------------
 */

enum { NO_PAGE = -1 };

typedef struct part_storage {
  attn_state_part shape;
  attn_tensor fixed;
  attn_page_pool *pool;
  int32_t *owned;        /* the pages of this state, NO_PAGE where there is none */
  int32_t *table;        /* what the engines read: as owned, with a valid page in every entry */
  int64_t first;         /* of the pages; those before it have left the window */
  int32_t *device_table; /* the table where the engines are: the same one on the processor */
  bool moved;            /* the table has changed since device_table was written */
  int64_t next_row;      /* attn_state_prepare */
  int32_t next_length;   /* likewise, of a block */
} part_storage;

struct attn_state {
  attn_device device;
  int count;
  int64_t position, capacity, table_pages;
  int32_t next_length; /* attn_state_prepare */
  part_storage parts[ATTN_STATE_PARTS];
};

static size_t fixed_bytes(const part_storage *part) {
  return (size_t)attn_tensor_count(&part->fixed) * attn_dtype_size(part->fixed.dtype);
}

static int64_t pages_for(int64_t tokens) {
  return (tokens + ATTN_PAGE_TOKENS - 1) / ATTN_PAGE_TOKENS;
}

/* Engines may read whole blocks and mask what is outside the window, so that entries before it must
 * name a page with numbers in it: the first page is one. */
static void set_page(part_storage *part, int64_t index, int32_t page) {
  part->owned[index] = page;
  part->table[index] = page == NO_PAGE ? 0 : page;
  if (index == part->first && page != NO_PAGE)
    for (int64_t i = 0; i < index; ++i) part->table[i] = page;
  part->moved = true;
}

static attn_status create_part(attn_device device, part_storage *part, const attn_state_part *shape,
                               int64_t pages, int64_t sharers, attn_page_pool *family) {
  part->shape = *shape;
  if (shape->kind == ATTN_STATE_FIXED)
    return attn_tensor_create_on(device, shape->dtype, shape->rank, shape->shape, &part->fixed);
  part->owned = attn_alloc_array((size_t)pages, sizeof *part->owned);
  part->table = attn_alloc_array((size_t)pages, sizeof *part->table);
  if (!part->owned || !part->table) return ATTN_OUT_OF_MEMORY;
  part->device_table = part->table;
  if (attn_is_cuda(device))
    part->device_table = attn_device_alloc(device, (size_t)pages * sizeof *part->table);
  if (!part->device_table) return ATTN_OUT_OF_MEMORY;
  for (int64_t i = 0; i < pages; ++i) set_page(part, i, NO_PAGE);
  if (!family) {
    if (sharers > INT32_MAX / pages)
      return attn_fail(ATTN_INVALID_ARGUMENT, "state: %lld times %lld pages are too many",
                       (long long)sharers, (long long)pages);
    return attn_page_pool_create(device, shape, pages * sharers, &part->pool);
  }
  attn_page_pool_retain(family);
  part->pool = family;
  return ATTN_OK;
}

static bool same_part(const attn_state_part *a, const attn_state_part *b) {
  return a->kind == b->kind && a->dtype == b->dtype && a->rank == b->rank &&
         a->window == b->window && a->block == b->block &&
         memcmp(a->shape, b->shape, (size_t)a->rank * sizeof *a->shape) == 0;
}

static attn_status check_create(const attn_state_part *parts, int count, int64_t capacity,
                                int64_t sharers, const attn_state *family) {
  if (count < 0 || count > ATTN_STATE_PARTS || sharers < 1)
    return attn_fail(ATTN_INVALID_ARGUMENT, "state: %d parts, %lld sharers", count,
                     (long long)sharers);
  if (capacity < 1 || capacity > ATTN_STATE_CAPACITY)
    return attn_fail(ATTN_INVALID_ARGUMENT, "state: a capacity of %lld tokens, expected 1 to %d",
                     (long long)capacity, (int)ATTN_STATE_CAPACITY);
  bool related = !family || family->count == count;
  for (int i = 0; family && related && i < count; ++i)
    related = same_part(&parts[i], &family->parts[i].shape);
  if (related) return ATTN_OK;
  return attn_fail(ATTN_INVALID_ARGUMENT, "state: the family's state has other parts");
}

attn_status attn_state_create(attn_device device, const attn_state_part *parts, int count,
                              int64_t capacity, int64_t sharers, const attn_state *family,
                              attn_state **state) {
  ATTN_TRY(check_create(parts, count, capacity, sharers, family));
  attn_state *s = attn_alloc_zero(sizeof *s);
  if (!s) return ATTN_OUT_OF_MEMORY;
  s->device = device;
  s->capacity = capacity;
  s->table_pages = pages_for(capacity);
  attn_status status = ATTN_OK;
  for (int i = 0; i < count && status == ATTN_OK; ++i) {
    s->count = i + 1;
    status = create_part(device, &s->parts[i], &parts[i], s->table_pages, sharers,
                         family ? family->parts[i].pool : NULL);
  }
  if (status != ATTN_OK)
    attn_state_destroy(s);
  else
    *state = s;
  return status;
}

static void drop_pages(attn_state *state, part_storage *part, int64_t from, int64_t to) {
  for (int64_t i = from; i < to && i < state->table_pages; ++i)
    if (part->owned[i] != NO_PAGE) {
      drop_page(part->pool, part->owned[i]);
      set_page(part, i, NO_PAGE);
    }
}

void attn_state_destroy(attn_state *state) {
  if (!state) return;
  for (int i = 0; i < state->count; ++i) {
    part_storage *part = &state->parts[i];
    attn_tensor_destroy(&part->fixed);
    if (part->pool) drop_pages(state, part, 0, state->table_pages);
    attn_page_pool_release(part->pool);
    if (attn_is_cuda(state->device)) attn_device_free(state->device, part->device_table);
    attn_free(part->owned);
    attn_free(part->table);
  }
  attn_free(state);
}

int64_t attn_state_position(const attn_state *state) {
  return state->position;
}

/* The first row that a query at `position` or later may read. */
static int64_t first_needed(const part_storage *part, int64_t position) {
  int64_t window = part->shape.window;
  return window && position > window ? position - window : 0;
}

void attn_state_advance(attn_state *state, int64_t tokens) {
  state->position += tokens;
  for (int i = 0; i < state->count; ++i) {
    part_storage *part = &state->parts[i];
    if (part->shape.kind != ATTN_STATE_ROWS) continue;
    int64_t first = first_needed(part, state->position) / ATTN_PAGE_TOKENS;
    if (first == part->first) continue;
    drop_pages(state, part, part->first, first);
    part->first = first;
    set_page(part, first, part->owned[first]);
  }
}

attn_tensor attn_state_fixed(const attn_state *state, int part) {
  return state->parts[part].fixed;
}

static char *page_address(const part_storage *part, int32_t page) {
  return part->pool->memory + (size_t)page * part->pool->page_bytes;
}

/* Makes page `index` writable: takes a fresh one, or copies one that others share. */
static attn_status own_page(part_storage *part, int64_t index) {
  int32_t old = part->owned[index];
  if (old != NO_PAGE && atomic_load(&part->pool->sharers[old]) == 1) return ATTN_OK;
  int32_t fresh = take_page(part->pool);
  if (fresh < 0)
    return attn_fail(ATTN_OUT_OF_MEMORY,
                     "state: all %lld pages of '%s' are in use; destroy a fork "
                     "or create the session with more",
                     (long long)part->pool->pages, part->shape.name);
  if (old != NO_PAGE) {
    ATTN_TRY(attn_device_copy(part->pool->device, page_address(part, fresh),
                              page_address(part, old), part->pool->page_bytes));
    drop_page(part->pool, old);
  } else {
    /* Engines multiply what they mask by zero: a stranger's infinities must not be there. */
    ATTN_TRY(
        attn_device_zero(part->pool->device, page_address(part, fresh), part->pool->page_bytes));
  }
  set_page(part, index, fresh);
  return ATTN_OK;
}

/* Makes the pages of the `count` tokens behind the position writable, or changes nothing. */
static attn_status make_room(attn_state *state, part_storage *part, int64_t count) {
  if (count > state->capacity - state->position)
    return attn_fail(ATTN_OUT_OF_MEMORY,
                     "the session holds at most %lld tokens; it has %lld and was given %lld more",
                     (long long)state->capacity, (long long)state->position, (long long)count);
  int64_t first = state->position / ATTN_PAGE_TOKENS, end = pages_for(state->position + count);
  attn_status status = ATTN_OK;
  for (int64_t page = first; page < end && status == ATTN_OK; ++page) status = own_page(part, page);
  if (status != ATTN_OK) drop_pages(state, part, pages_for(state->position), state->table_pages);
  return status;
}

/* Brings the table to where the engines read it. */
static attn_status send_table(const attn_state *state, part_storage *part) {
  if (!part->moved || part->device_table == part->table) return ATTN_OK;
  part->moved = false;
  return attn_device_copy(state->device, part->device_table, part->table,
                          (size_t)state->table_pages * sizeof *part->table);
}

attn_status attn_state_append(attn_state *state, int index, int64_t column,
                              const attn_tensor *rows) {
  part_storage *part = &state->parts[index];
  int64_t count = rows->shape[0], width = rows->shape[1], whole = part->shape.shape[0];
  if (rows->rank != 2 || column < 0 || column + width > whole || rows->dtype != part->shape.dtype ||
      (width > 1 && rows->stride[1] != 1))
    return attn_fail(ATTN_INTERNAL, "state: rows of '%s' have another shape", part->shape.name);
  ATTN_TRY(make_room(state, part, count));
  size_t element = attn_dtype_size(part->shape.dtype);
  for (int64_t r = 0, run; r < count; r += run) { /* the rows that go to one page */
    int64_t token = state->position + r, within = token % ATTN_PAGE_TOKENS;
    run = count - r < ATTN_PAGE_TOKENS - within ? count - r : ATTN_PAGE_TOKENS - within;
    char *to = page_address(part, part->owned[token / ATTN_PAGE_TOKENS]) +
               (size_t)(within * whole + column) * element;
    const char *from = (const char *)rows->data + (size_t)(r * rows->stride[0]) * element;
    ATTN_TRY(attn_device_copy_rows(state->device, to, (size_t)whole * element, from,
                                   (size_t)rows->stride[0] * element, (size_t)width * element,
                                   (size_t)run));
  }
  return send_table(state, part);
}

attn_status attn_state_prepare(attn_state *state) {
  int64_t token = state->position;
  state->next_length = (int32_t)(token + 1);
  for (int i = 0; i < state->count; ++i) {
    part_storage *part = &state->parts[i];
    if (part->shape.block) {
      part->next_row = token % part->shape.block;
      part->next_length = (int32_t)part->next_row + 1;
    }
    if (part->shape.kind != ATTN_STATE_ROWS) continue;
    ATTN_TRY(make_room(state, part, 1));
    ATTN_TRY(send_table(state, part));
    part->next_row = part->owned[token / ATTN_PAGE_TOKENS] * (int64_t)ATTN_PAGE_TOKENS +
                     token % ATTN_PAGE_TOKENS;
  }
  return ATTN_OK;
}

const int64_t *attn_state_position_place(const attn_state *state) {
  return &state->position;
}

const int32_t *attn_state_next_length(const attn_state *state) {
  return &state->next_length;
}

const int64_t *attn_state_next_row(const attn_state *state, int part) {
  return &state->parts[part].next_row;
}

const int32_t *attn_state_next_block_length(const attn_state *state, int part) {
  return &state->parts[part].next_length;
}

attn_tensor attn_state_pages(const attn_state *state, int index) {
  const part_storage *part = &state->parts[index];
  int64_t shape[3] = {part->pool->pages, ATTN_PAGE_TOKENS, part->shape.shape[0]};
  attn_tensor pages = {0};
  (void)attn_tensor_wrap(part->pool->memory, part->shape.dtype, 3, shape, &pages);
  pages.device = state->device;
  return pages;
}

attn_tensor attn_state_page_table(const attn_state *state, int index) {
  attn_tensor table = {0};
  (void)attn_tensor_wrap(state->parts[index].device_table, ATTN_I32, 2,
                         (int64_t[]){1, state->table_pages}, &table);
  table.device = state->device;
  return table;
}

attn_status attn_state_copy_rows(const attn_state *state, int index, int64_t count, void *rows) {
  const part_storage *part = &state->parts[index];
  size_t row = part->pool->page_bytes / ATTN_PAGE_TOKENS;
  for (int64_t first = 0; first < count; first += ATTN_PAGE_TOKENS) {
    int64_t run = count - first < ATTN_PAGE_TOKENS ? count - first : ATTN_PAGE_TOKENS;
    ATTN_TRY(attn_device_copy(state->device, (char *)rows + (size_t)first * row,
                              page_address(part, part->table[first / ATTN_PAGE_TOKENS]),
                              (size_t)run * row));
  }
  return ATTN_OK;
}

void attn_state_assign(attn_state *target, const attn_state *source) {
  if (target == source) return;
  for (int i = 0; i < source->count; ++i) {
    part_storage *to = &target->parts[i];
    const part_storage *from = &source->parts[i];
    if (from->shape.kind == ATTN_STATE_FIXED) {
      (void)attn_device_copy(target->device, to->fixed.data, from->fixed.data, fixed_bytes(from));
      continue;
    }
    int64_t used = pages_for(source->position);
    for (int64_t p = 0; p < target->table_pages; ++p) {
      int32_t page = p < used ? from->owned[p] : NO_PAGE;
      if (page != NO_PAGE) share_page(to->pool, page); /* before dropping: they may be the same */
      if (to->owned[p] != NO_PAGE) drop_page(to->pool, to->owned[p]);
      to->owned[p] = page;
      to->table[p] = p < used ? from->table[p] : 0;
    }
    to->first = from->first;
    to->moved = true;
  }
  target->position = source->position;
}

bool attn_state_is_related(const attn_state *a, const attn_state *b) {
  for (int i = 0; i < a->count && i < b->count; ++i)
    if (a->parts[i].pool != b->parts[i].pool) return false;
  return a->count == b->count;
}

void attn_state_clear(attn_state *state) {
  for (int i = 0; i < state->count; ++i) {
    part_storage *part = &state->parts[i];
    if (part->shape.kind == ATTN_STATE_FIXED)
      (void)attn_device_zero(state->device, part->fixed.data, fixed_bytes(part));
    else
      drop_pages(state, part, 0, state->table_pages);
    part->first = 0;
  }
  state->position = 0;
}

bool attn_state_cut(attn_state *state, int64_t position) {
  if (position > state->position || position < 0) return false;
  if (position == state->position) return true;
  for (int i = 0; i < state->count; ++i) {
    const part_storage *part = &state->parts[i];
    if (part->shape.kind == ATTN_STATE_FIXED) return false;
    for (int64_t p = first_needed(part, position) / ATTN_PAGE_TOKENS; p < pages_for(position); ++p)
      if (part->owned[p] == NO_PAGE) return false;
  }
  for (int i = 0; i < state->count; ++i) {
    drop_pages(state, &state->parts[i], pages_for(position), state->table_pages);
    state->parts[i].first = first_needed(&state->parts[i], position) / ATTN_PAGE_TOKENS;
  }
  state->position = position;
  return true;
}

/* Saved form: the position, then each part: fixed data, or the live rows. */
static int64_t first_saved(const part_storage *part, int64_t position) {
  return first_needed(part, position) / ATTN_PAGE_TOKENS * ATTN_PAGE_TOKENS;
}

static size_t row_bytes(const part_storage *part) {
  return (size_t)part->shape.shape[0] * attn_dtype_size(part->shape.dtype);
}

/* Hands memory of the device to `write`, through the processor's; and the other way. */
static attn_status write_from(const attn_state *state, const void *data, size_t size,
                              attn_state_write write, void *context) {
  if (!attn_is_cuda(state->device)) return write(context, data, size);
  void *here = attn_alloc(size);
  attn_status status = here ? ATTN_OK : ATTN_OUT_OF_MEMORY;
  if (status == ATTN_OK) status = attn_device_copy(state->device, here, data, size);
  if (status == ATTN_OK) status = attn_device_synchronize(state->device);
  if (status == ATTN_OK) status = write(context, here, size);
  attn_free(here);
  return status;
}

static attn_status read_to(const attn_state *state, void *data, size_t size, attn_state_read read,
                           void *context) {
  if (!attn_is_cuda(state->device)) return read(context, data, size);
  void *here = attn_alloc(size);
  attn_status status = here ? read(context, here, size) : ATTN_OUT_OF_MEMORY;
  if (status == ATTN_OK) status = attn_device_copy(state->device, data, here, size);
  if (status == ATTN_OK) status = attn_device_synchronize(state->device);
  attn_free(here);
  return status;
}

attn_status attn_state_save(const attn_state *state, attn_state_write write, void *context) {
  ATTN_TRY(write(context, &state->position, sizeof state->position));
  for (int i = 0; i < state->count; ++i) {
    const part_storage *part = &state->parts[i];
    if (part->shape.kind == ATTN_STATE_FIXED) {
      ATTN_TRY(write_from(state, part->fixed.data, fixed_bytes(part), write, context));
      continue;
    }
    for (int64_t t = first_saved(part, state->position); t < state->position;
         t += ATTN_PAGE_TOKENS) {
      int64_t rows =
          state->position - t < ATTN_PAGE_TOKENS ? state->position - t : ATTN_PAGE_TOKENS;
      const char *page = page_address(part, part->owned[t / ATTN_PAGE_TOKENS]);
      ATTN_TRY(write_from(state, page, (size_t)rows * row_bytes(part), write, context));
    }
  }
  return ATTN_OK;
}

static bool has_rows(const attn_state *state) {
  for (int i = 0; i < state->count; ++i)
    if (state->parts[i].shape.kind == ATTN_STATE_ROWS) return true;
  return false;
}

static attn_status read_parts(attn_state *state, attn_state_read read, void *context) {
  int64_t position;
  ATTN_TRY(read(context, &position, sizeof position));
  if (position < 0 || (has_rows(state) && position > state->capacity))
    return attn_fail(ATTN_BAD_FORMAT, "state: %lld tokens do not fit a capacity of %lld",
                     (long long)position, (long long)state->capacity);
  for (int i = 0; i < state->count; ++i) {
    part_storage *part = &state->parts[i];
    if (part->shape.kind == ATTN_STATE_FIXED) {
      ATTN_TRY(read_to(state, part->fixed.data, fixed_bytes(part), read, context));
      continue;
    }
    for (int64_t t = first_saved(part, position); t < position; t += ATTN_PAGE_TOKENS) {
      int64_t rows = position - t < ATTN_PAGE_TOKENS ? position - t : ATTN_PAGE_TOKENS;
      ATTN_TRY(own_page(part, t / ATTN_PAGE_TOKENS));
      char *page = page_address(part, part->owned[t / ATTN_PAGE_TOKENS]);
      ATTN_TRY(read_to(state, page, (size_t)rows * row_bytes(part), read, context));
    }
  }
  attn_state_advance(state, position);
  return ATTN_OK;
}

attn_status attn_state_restore(attn_state *state, attn_state_read read, void *context) {
  attn_state_clear(state);
  attn_status status = read_parts(state, read, context);
  if (status != ATTN_OK) attn_state_clear(state);
  return status;
}

int64_t attn_state_bytes(const attn_state *state) {
  int64_t total = 0;
  for (int i = 0; i < state->count; ++i) {
    const part_storage *part = &state->parts[i];
    if (part->shape.kind == ATTN_STATE_FIXED) {
      total += (int64_t)fixed_bytes(part);
      continue;
    }
    for (int64_t p = 0; p < state->table_pages; ++p)
      if (part->owned[p] != NO_PAGE) total += (int64_t)part->pool->page_bytes;
  }
  return total;
}
