#include "files/tokenizer/parts.h"
#include "base/hash.h"
#include "base/memory.h"
#include "base/status.h"

#include <stdlib.h>
#include <string.h>

/* At half load and with keys that nobody chose, a run of so many used slots does not occur; with
 * keys made to collide, searching it would take for ever. */
enum { MOST_PROBES = 2048, FIRST_SLOTS = 1024 };

attn_status attn_reserve(void **items, size_t *capacity, size_t needed, size_t size) {
  if (needed <= *capacity) return ATTN_OK;
  size_t larger = *capacity ? *capacity : 16;
  while (larger < needed) larger *= 2;
  void *memory = attn_realloc(*items, larger * size);
  if (!memory) return ATTN_OUT_OF_MEMORY;
  *items = memory;
  *capacity = larger;
  return ATTN_OK;
}

attn_status attn_copy_bytes(const char *bytes, size_t size, char **copy, size_t *copy_size) {
  *copy = attn_alloc(size + 1);
  if (!*copy) return ATTN_OUT_OF_MEMORY;
  if (size) memcpy(*copy, bytes, size);
  (*copy)[size] = '\0';
  *copy_size = size;
  return ATTN_OK;
}

/* -- Pieces -- */

attn_status attn_pieces_add(attn_pieces *pieces, attn_piece piece) {
  ATTN_TRY(attn_reserve((void **)&pieces->items, &pieces->capacity, pieces->count + 1,
                        sizeof *pieces->items));
  pieces->items[pieces->count++] = piece;
  return ATTN_OK;
}

void attn_pieces_clear(attn_pieces *pieces) {
  pieces->text.length = 0;
  pieces->count = 0;
}

void attn_pieces_free(attn_pieces *pieces) {
  attn_text_free(&pieces->text);
  attn_free(pieces->items);
  *pieces = (attn_pieces){0};
}

/* -- The vocabulary -- */

/* FNV's low bits depend on little of the input: mix before they choose a slot. */
static uint64_t mix(uint64_t value) {
  value = (value ^ value >> 32) * UINT64_C(0x9fb21c651e98df25);
  return value ^ value >> 29;
}

/* The slot of a string, or the empty one where it would go; NULL when it takes too many probes. */
static int32_t *slot_of(const attn_vocabulary *vocabulary, const char *string, size_t size) {
  size_t mask = vocabulary->slots - 1;
  size_t slot = mix(attn_hash(ATTN_HASH_START, string, size)) & mask;
  for (int probes = 0; probes < MOST_PROBES; ++probes, slot = (slot + 1) & mask) {
    int32_t id = vocabulary->table[slot];
    if (id < 0) return &vocabulary->table[slot];
    const struct attn_vocabulary_entry *entry = &vocabulary->entries[id];
    if (entry->size == size && memcmp(vocabulary->text.data + entry->at, string, size) == 0)
      return &vocabulary->table[slot];
  }
  return NULL;
}

static attn_status fail_collisions(void) {
  return attn_fail(ATTN_BAD_FORMAT, "the vocabulary's strings collide beyond chance");
}

static attn_status grow_vocabulary(attn_vocabulary *vocabulary) {
  size_t slots = vocabulary->slots ? vocabulary->slots * 2 : FIRST_SLOTS;
  int32_t *table = attn_alloc(slots * sizeof *table), *old = vocabulary->table;
  if (!table) return ATTN_OUT_OF_MEMORY;
  for (size_t i = 0; i < slots; ++i) table[i] = -1;
  vocabulary->table = table;
  vocabulary->slots = slots;
  attn_free(old);
  for (size_t id = 0; id < vocabulary->count; ++id) {
    const struct attn_vocabulary_entry *entry = &vocabulary->entries[id];
    if (!entry->present) continue;
    int32_t *slot = slot_of(vocabulary, vocabulary->text.data + entry->at, entry->size);
    if (!slot) return fail_collisions();
    *slot = (int32_t)id;
  }
  return ATTN_OK;
}

static attn_status fit_ids(attn_vocabulary *vocabulary, size_t count) {
  if (count <= vocabulary->count) return ATTN_OK;
  ATTN_TRY(attn_reserve((void **)&vocabulary->entries, &vocabulary->capacity, count,
                        sizeof *vocabulary->entries));
  memset(vocabulary->entries + vocabulary->count, 0,
         (count - vocabulary->count) * sizeof *vocabulary->entries);
  vocabulary->count = count;
  return ATTN_OK;
}

attn_status attn_vocabulary_add(attn_vocabulary *vocabulary, const char *string, size_t size,
                                int64_t id) {
  if (id < 0 || id >= ATTN_MOST_TOKENS)
    return attn_fail(ATTN_BAD_FORMAT, "token \"%.40s\" has id %lld, which is not in 0 to %d",
                     string, (long long)id, ATTN_MOST_TOKENS - 1);
  if (size > UINT32_MAX)
    return attn_fail(ATTN_BAD_FORMAT, "token %lld has %zu bytes", (long long)id, size);
  if (vocabulary->used * 2 >= vocabulary->slots) ATTN_TRY(grow_vocabulary(vocabulary));
  ATTN_TRY(fit_ids(vocabulary, (size_t)id + 1));
  struct attn_vocabulary_entry *entry = &vocabulary->entries[id];
  if (entry->present)
    return attn_fail(ATTN_BAD_FORMAT, "id %lld is given to two tokens, \"%.*s\" and \"%.40s\"",
                     (long long)id, entry->size < 40 ? (int)entry->size : 40,
                     vocabulary->text.data + entry->at, string);
  int32_t *slot = slot_of(vocabulary, string, size);
  if (!slot) return fail_collisions();
  if (*slot >= 0)
    return attn_fail(ATTN_BAD_FORMAT, "token \"%.40s\" has two ids, %d and %lld", string, *slot,
                     (long long)id);
  *entry = (struct attn_vocabulary_entry){vocabulary->text.length, (uint32_t)size, true, false};
  attn_text_add(&vocabulary->text, string, size);
  if (vocabulary->text.failed) return ATTN_OUT_OF_MEMORY;
  *slot = (int32_t)id;
  ++vocabulary->used;
  if (size > vocabulary->longest) vocabulary->longest = (uint32_t)size;
  return ATTN_OK;
}

int32_t attn_vocabulary_find(const attn_vocabulary *vocabulary, const char *string, size_t size) {
  if (!vocabulary->slots || size > vocabulary->longest) return -1;
  const int32_t *slot = slot_of(vocabulary, string, size);
  return slot ? *slot : -1;
}

int32_t attn_vocabulary_find_inside(const attn_vocabulary *vocabulary, const char *string,
                                    size_t size) {
  int32_t id = attn_vocabulary_find(vocabulary, string, size);
  return id >= 0 && vocabulary->entries[id].outside ? -1 : id;
}

const char *attn_vocabulary_string(const attn_vocabulary *vocabulary, int64_t id, size_t *size) {
  if (id < 0 || id >= (int64_t)vocabulary->count || !vocabulary->entries[id].present) return NULL;
  if (size) *size = vocabulary->entries[id].size;
  return vocabulary->text.data + vocabulary->entries[id].at;
}

void attn_vocabulary_free(attn_vocabulary *vocabulary) {
  attn_text_free(&vocabulary->text);
  attn_free(vocabulary->entries);
  attn_free(vocabulary->table);
  *vocabulary = (attn_vocabulary){0};
}

/* -- Merges -- */

attn_status attn_merges_create(attn_merges *merges, size_t count) {
  size_t slots = FIRST_SLOTS;
  while (slots < count * 2) slots *= 2;
  merges->table = attn_alloc_array(slots, sizeof *merges->table);
  if (!merges->table) return ATTN_OUT_OF_MEMORY;
  for (size_t i = 0; i < slots; ++i) merges->table[i].left = -1;
  merges->slots = slots;
  return ATTN_OK;
}

static attn_merge *merge_slot(const attn_merges *merges, int32_t left, int32_t right) {
  size_t mask = merges->slots - 1;
  size_t slot =
      mix(((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * UINT64_C(0x9e3779b97f4a7c15)) & mask;
  for (int probes = 0; probes < MOST_PROBES; ++probes, slot = (slot + 1) & mask) {
    attn_merge *merge = &merges->table[slot];
    if (merge->left < 0 || (merge->left == left && merge->right == right)) return merge;
  }
  return NULL;
}

attn_status attn_merges_add(attn_merges *merges, attn_merge merge) {
  attn_merge *slot = merge_slot(merges, merge.left, merge.right);
  if (!slot) return attn_fail(ATTN_BAD_FORMAT, "the merges collide beyond chance");
  *slot = merge;
  return ATTN_OK;
}

const attn_merge *attn_merges_find(const attn_merges *merges, int32_t left, int32_t right) {
  if (!merges->slots || left < 0 || right < 0) return NULL;
  const attn_merge *merge = merge_slot(merges, left, right);
  return merge && merge->left >= 0 ? merge : NULL;
}

void attn_merges_free(attn_merges *merges) {
  attn_free(merges->table);
  *merges = (attn_merges){0};
}

/* -- Sorted strings -- */

attn_status attn_prefixes_add(attn_prefixes *set, const char *string, size_t size, int32_t id) {
  if (size == 0) return ATTN_OK;
  ATTN_TRY(attn_reserve((void **)&set->items, &set->capacity, set->count + 1, sizeof *set->items));
  set->items[set->count++] = (struct attn_prefix){set->text.length, (uint32_t)size, id};
  attn_text_add(&set->text, string, size);
  return set->text.failed ? ATTN_OUT_OF_MEMORY : ATTN_OK;
}

/* The first added of equal strings comes first, and is the one that a walk reports. */
static int compare_prefixes(const void *a, const void *b, void *text) {
  const struct attn_prefix *left = a, *right = b;
  uint32_t size = left->size < right->size ? left->size : right->size;
  int order = memcmp((char *)text + left->at, (char *)text + right->at, size);
  if (order) return order;
  if (left->size != right->size) return left->size < right->size ? -1 : 1;
  return (left->at > right->at) - (left->at < right->at);
}

void attn_prefixes_sort(attn_prefixes *set) {
  if (set->count)
    qsort_r(set->items, set->count, sizeof *set->items, compare_prefixes, set->text.data);
  size_t at = 0;
  for (int byte = 0; byte <= 256; ++byte) {
    while (at < set->count && (unsigned char)set->text.data[set->items[at].at] < byte) ++at;
    set->first[byte] = (uint32_t)at;
  }
}

/* The first item in [low, high), all alike in their first `depth` bytes, whose next byte is at
 * least `byte`. Strings that end here have none, and come before. */
static size_t lower_bound(const attn_prefixes *set, size_t low, size_t high, uint32_t depth,
                          int byte) {
  while (low < high) {
    size_t middle = low + (high - low) / 2;
    const struct attn_prefix *item = &set->items[middle];
    int there = item->size > depth ? (unsigned char)set->text.data[item->at + depth] : -1;
    if (there < byte)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

bool attn_prefixes_step(const attn_prefixes *set, attn_prefix_walk *walk, unsigned char byte,
                        int32_t *id) {
  if (walk->depth == 0) {
    walk->low = set->first[byte];
    walk->high = set->first[byte + 1];
  } else {
    walk->low = lower_bound(set, walk->low, walk->high, walk->depth, byte);
    walk->high = lower_bound(set, walk->low, walk->high, walk->depth, byte + 1);
  }
  *id = -1;
  if (walk->low >= walk->high) return false;
  ++walk->depth;
  const struct attn_prefix *item = &set->items[walk->low];
  if (item->size == walk->depth) *id = item->id;
  return true;
}

void attn_prefixes_free(attn_prefixes *set) {
  attn_text_free(&set->text);
  attn_free(set->items);
  *set = (attn_prefixes){0};
}
