/* The base: messages, memory, arenas, fault injection, threads, the choice of kernels, text. */
#include "support/test.h"

#include "attn/attn.h"
#include "base/cpu.h"
#include "base/fault.h"
#include "base/memory.h"
#include "base/status.h"
#include "kernels/kernels.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static void messages_are_kept(void **state) {
  (void)state;
  assert_int_equal(attn_fail(ATTN_INVALID_SHAPE, "k has %d heads", 3), ATTN_INVALID_SHAPE);
  assert_string_equal(attn_error_message(), "k has 3 heads");
  assert_int_equal(attn_fail_in(ATTN_BAD_FORMAT, "layer %d", 2), ATTN_BAD_FORMAT);
  assert_string_equal(attn_error_message(), "layer 2: k has 3 heads");
  attn_fail(ATTN_INTERNAL, "again: %s", attn_error_message());
  assert_string_equal(attn_error_message(), "again: layer 2: k has 3 heads");
  char longest[3000];
  memset(longest, 'x', sizeof longest);
  longest[sizeof longest - 1] = '\0';
  attn_fail(ATTN_INTERNAL, "%s", longest); /* cut, not overrun */
  size_t length = strlen(attn_error_message());
  assert_true(length > 100 && length < 3000);
  attn_fail_in(ATTN_INTERNAL, "%s", longest);
  assert_int_equal(strlen(attn_error_message()), length);
}

static void *fail_in_a_thread(void *context) {
  (void)context;
  attn_fail(ATTN_INTERNAL, "of the thread");
  return (void *)(uintptr_t)(strcmp(attn_error_message(), "of the thread") == 0);
}

static void messages_belong_to_a_thread(void **state) {
  (void)state;
  attn_fail(ATTN_INTERNAL, "of the main thread");
  pthread_t thread;
  void *right;
  assert_int_equal(pthread_create(&thread, NULL, fail_in_a_thread, NULL), 0);
  pthread_join(thread, &right);
  assert_non_null(right);
  assert_string_equal(attn_error_message(), "of the main thread");
}

static void every_status_has_its_name(void **state) {
  (void)state;
  for (int a = ATTN_OK; a <= ATTN_INTERNAL; ++a) {
    assert_string_not_equal(attn_status_name((attn_status)a), "unknown status");
    for (int b = ATTN_OK; b < a; ++b)
      assert_string_not_equal(attn_status_name((attn_status)a), attn_status_name((attn_status)b));
  }
  assert_string_equal(attn_status_name((attn_status)-1), "unknown status");
  char version[32];
  snprintf(version, sizeof version, "%d.%d.%d", ATTN_VERSION_MAJOR, ATTN_VERSION_MINOR,
           ATTN_VERSION_PATCH);
  assert_string_equal(attn_version(), version);
}

static void memory_is_accounted_for(void **state) {
  (void)state;
  attn_memory_stats before = attn_memory_get_stats();
  attn_memory_reset_peak();
  char *a = attn_alloc(1000), *b = attn_alloc_zero(24);
  assert_int_equal((uintptr_t)a % ATTN_ALIGNMENT, 0);
  assert_int_equal((uintptr_t)b % ATTN_ALIGNMENT, 0);
  for (int i = 0; i < 24; ++i) assert_int_equal(b[i], 0);
  assert_int_equal(attn_memory_get_stats().live_bytes, before.live_bytes + 1024);
  assert_int_equal(attn_memory_get_stats().allocations, before.allocations + 2);
  memset(a, 7, 1000);
  a = attn_realloc(a, 3000);
  for (int i = 0; i < 1000; ++i) assert_int_equal(a[i], 7);
  a = attn_realloc(a, 10);
  assert_int_equal(a[9], 7);
  assert_int_equal(attn_memory_get_stats().live_bytes, before.live_bytes + 34);
  assert_int_equal(attn_memory_get_stats().peak_bytes, before.live_bytes + 1000 + 24 + 3000);
  attn_free(a);
  attn_free(b);
  attn_free(NULL);
  char *text = attn_strdup("key"), *nothing = attn_alloc(0);
  assert_string_equal(text, "key");
  assert_non_null(nothing);
  attn_free(text);
  attn_free(nothing);
  assert_int_equal(attn_memory_get_stats().live_bytes, before.live_bytes);
}

static void impossible_sizes_are_refused(void **state) {
  (void)state;
  static const size_t sizes[] = {SIZE_MAX, SIZE_MAX - 63, SIZE_MAX - 64, SIZE_MAX / 2};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; ++i) {
    attn_fail(ATTN_OK, "%s", "");
    assert_null(attn_alloc(sizes[i]));
    assert_string_not_equal(attn_error_message(), "");
    attn_arena *arena = attn_arena_create(64);
    assert_null(attn_arena_alloc(arena, sizes[i]));
    assert_non_null(attn_arena_alloc(arena, 8)); /* still usable */
    attn_arena_destroy(arena);
  }
  assert_null(attn_alloc_array(SIZE_MAX / 8 + 1, 16));
  void *none = attn_alloc_array(5, 0);
  assert_non_null(none);
  attn_free(none);
}

static void arenas_give_distinct_aligned_memory(void **state) {
  (void)state;
  enum { BLOCKS = 300 };
  size_t live = attn_memory_get_stats().live_bytes;
  attn_arena *arena = attn_arena_create(256);
  char *blocks[BLOCKS];
  size_t sizes[BLOCKS];
  for (int i = 0; i < BLOCKS; ++i) {
    sizes[i] = (size_t)(i * 37 % 900 + 1);
    blocks[i] = attn_arena_alloc(arena, sizes[i]);
    assert_non_null(blocks[i]);
    assert_int_equal((uintptr_t)blocks[i] % ATTN_ALIGNMENT, 0);
    memset(blocks[i], i & 0xff, sizes[i]);
  }
  for (int i = 0; i < BLOCKS; ++i)
    for (size_t j = 0; j < sizes[i]; ++j) assert_int_equal(blocks[i][j] & 0xff, i & 0xff);
  char *zero = attn_arena_alloc_zero(arena, 5000);
  for (int i = 0; i < 5000; ++i) assert_int_equal(zero[i], 0);
  attn_arena_destroy(arena);
  attn_arena_destroy(NULL);
  assert_int_equal(attn_memory_get_stats().live_bytes, live);
}

/* The promise that hot loops rest on: after a first round, the same round allocates nothing and
 * gets the same addresses. */
static void released_arenas_are_reused(void **state) {
  (void)state;
  attn_arena *arena = attn_arena_create(128);
  char *kept = attn_arena_alloc(arena, 10);
  strcpy(kept, "kept");
  attn_arena_mark mark = attn_arena_get_mark(arena);
  void *first[20];
  size_t capacity = 0;
  uint64_t allocations = 0;
  for (int round = 0; round < 3; ++round) {
    for (int i = 0; i < 20; ++i) {
      void *memory = attn_arena_alloc(arena, (size_t)(100 * (i + 1)));
      if (round == 0) first[i] = memory;
      assert_ptr_equal(memory, first[i]);
    }
    if (round == 0) {
      capacity = attn_arena_capacity(arena);
      allocations = attn_memory_get_stats().allocations;
    }
    attn_arena_release(arena, mark);
  }
  assert_int_equal(attn_arena_capacity(arena), capacity);
  assert_int_equal(attn_memory_get_stats().allocations, allocations);
  assert_string_equal(kept, "kept");
  attn_arena_reset(arena);
  assert_ptr_equal(attn_arena_alloc(arena, 10), kept);
  attn_arena_destroy(arena);
}

static void faults_hit_where_they_are_armed(void **state) {
  (void)state;
  assert_false(attn_fault_hit(ATTN_FAULT_ALLOC));
  attn_fault_arm(ATTN_FAULT_ALLOC, 2);
  void *a = attn_alloc(1), *b = attn_alloc(1);
  assert_non_null(a);
  assert_non_null(b);
  assert_null(attn_alloc(1));
  assert_null(attn_realloc(a, 100)); /* and `a` is whole */
  assert_null(attn_arena_create(64));
  assert_false(attn_fault_hit(ATTN_FAULT_IO)); /* the kinds are apart */
  assert_true(attn_fault_disarm(ATTN_FAULT_ALLOC));
  attn_free(a);
  attn_free(b);
  attn_fault_arm(ATTN_FAULT_ALLOC, 5);
  assert_false(attn_fault_disarm(ATTN_FAULT_ALLOC)); /* never delivered */
  size_t live = attn_memory_get_stats().live_bytes;
  attn_fault_arm(ATTN_FAULT_ALLOC, 1); /* the arena's struct, but not its first chunk */
  assert_null(attn_arena_create(64));
  attn_fault_disarm(ATTN_FAULT_ALLOC);
  assert_int_equal(attn_memory_get_stats().live_bytes, live);
  attn_arena *arena = attn_arena_create(64);
  attn_fault_arm(ATTN_FAULT_ALLOC, 0);
  assert_null(attn_arena_alloc(arena, 1000));
  attn_fault_disarm(ATTN_FAULT_ALLOC);
  assert_non_null(attn_arena_alloc(arena, 1000));
  attn_arena_destroy(arena);
}

static void threads_are_set(void **state) {
  (void)state;
  int usual = attn_get_threads();
  assert_true(usual >= 1);
  assert_ok(attn_set_threads(3));
  assert_int_equal(attn_get_threads(), 3);
  assert_int_equal(attn_set_threads(-1), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_set_threads(1 << 20), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_get_threads(), 3);
  assert_ok(attn_set_threads(0));
  assert_int_equal(attn_get_threads(), usual);
}

/* What a fresh process with ATTN_KERNELS=value chooses. */
static int path_of_a_process(const char *value) {
  char command[512];
  char self[256];
  ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
  assert_true(length > 0);
  self[length] = '\0';
  snprintf(command, sizeof command, "ATTN_KERNELS='%s' '%s' --print-path", value, self);
  int status = system(command);
  assert_true(WIFEXITED(status));
  return WEXITSTATUS(status);
}

static void kernels_are_chosen(void **state) {
  (void)state;
  assert_true(attn_kernel_path_available(ATTN_PATH_GENERIC));
  assert_false(attn_kernel_path_available((attn_kernel_path)17));
  int best = ATTN_PATH_GENERIC;
  for (int path = 0; path < ATTN_PATH_COUNT; ++path) {
    bool available = attn_kernel_path_available((attn_kernel_path)path);
    attn_status status = attn_set_kernel_path((attn_kernel_path)path);
    assert_int_equal(status, available ? ATTN_OK : ATTN_UNSUPPORTED);
    if (!available) continue;
    best = path;
    assert_int_equal(attn_get_kernel_path(), path);
    const attn_kernels *kernels = attn_kernels_get();
    assert_int_equal(kernels->path, path);
#define ASSERT_FILLED(result, name, parameters) assert_true(kernels->name != NULL);
    ATTN_KERNEL_LIST(ASSERT_FILLED) /* every path's table is complete */
#undef ASSERT_FILLED
    assert_int_equal(path_of_a_process(attn_kernel_path_name((attn_kernel_path)path)), path);
  }
  assert_int_equal(path_of_a_process(""), best);
  assert_int_equal(path_of_a_process("quantum"), best); /* an unknown name leaves the best */
  assert_int_equal(attn_set_kernel_path((attn_kernel_path)-1), ATTN_INVALID_ARGUMENT);
  assert_string_equal(attn_kernel_path_name((attn_kernel_path)-1), "unknown");
}

static void the_processor_is_described(void **state) {
  (void)state;
  const attn_cpu *cpu = attn_cpu_get();
  assert_true(cpu->l1d_bytes >= 1024 && cpu->l2_bytes >= cpu->l1d_bytes);
  assert_non_null(strstr(attn_cpu_description(), cpu->name));
  assert_int_equal(strstr(attn_cpu_description(), "AVX-512") != NULL, cpu->avx512);
  assert_true(!cpu->avx512 || cpu->avx2);
  assert_true(!cpu->amx_bf16 || cpu->avx512_bf16);
}

int main(int count, char **arguments) {
  if (count > 1 && strcmp(arguments[1], "--print-path") == 0) return (int)attn_get_kernel_path();
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(messages_are_kept),
      cmocka_unit_test(messages_belong_to_a_thread),
      cmocka_unit_test(every_status_has_its_name),
      cmocka_unit_test(memory_is_accounted_for),
      cmocka_unit_test(impossible_sizes_are_refused),
      cmocka_unit_test(arenas_give_distinct_aligned_memory),
      cmocka_unit_test(released_arenas_are_reused),
      cmocka_unit_test(faults_hit_where_they_are_armed),
      cmocka_unit_test(threads_are_set),
      cmocka_unit_test(kernels_are_chosen),
      cmocka_unit_test(the_processor_is_described),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
