/* src/mixers/shared/state.c alone, without a mixer: page counts, sharing, copies on writing,
 * windows, and many threads at one pool. */
#include "support/test.h"

#include "base/fault.h"
#include "base/memory.h"
#include "mixers/shared/state.h"

#include <pthread.h>
#include <string.h>

enum { WIDTH = 3, PAGE = ATTN_PAGE_TOKENS };

static const attn_state_part rows_part = {
    .name = "rows", .kind = ATTN_STATE_ROWS, .dtype = ATTN_F32, .rank = 1, .shape = {WIDTH}};
static const int64_t page_bytes = PAGE * WIDTH * sizeof(float);

static attn_state *create(const attn_state_part *part, int64_t capacity, int64_t sharers,
                          const attn_state *family) {
  attn_state *state = NULL;
  assert_ok(attn_state_create((attn_device){0}, part, 1, capacity, sharers, family, &state));
  return state;
}

/* What token t of writer `mark` holds in column c. */
static float content(float mark, int64_t t, int64_t c) {
  return mark * 10000 + (float)(t * WIDTH + c);
}

static attn_status append(attn_state *state, int64_t tokens, float mark) {
  attn_tensor rows;
  assert_ok(attn_tensor_create(ATTN_F32, 2, (int64_t[]){tokens, WIDTH}, &rows));
  int64_t first = attn_state_position(state);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t c = 0; c < WIDTH; ++c)
      ((float *)rows.data)[t * WIDTH + c] = content(mark, first + t, c);
  attn_status status = attn_state_append(state, 0, 0, &rows);
  if (status == ATTN_OK) attn_state_advance(state, tokens);
  attn_tensor_destroy(&rows);
  return status;
}

static int32_t page_of(const attn_state *state, int64_t token) {
  attn_tensor table = attn_state_page_table(state, 0);
  return ((const int32_t *)table.data)[token / PAGE];
}

static bool holds(const attn_state *state, int64_t from, int64_t to, float mark) {
  attn_tensor pages = attn_state_pages(state, 0);
  for (int64_t t = from; t < to; ++t) {
    const float *row = (const float *)pages.data + (page_of(state, t) * PAGE + t % PAGE) * WIDTH;
    for (int64_t c = 0; c < WIDTH; ++c)
      if (row[c] != content(mark, t, c)) return false;
  }
  return true;
}

static void test_columns(void **unused) {
  (void)unused;
  attn_state *state = create(&rows_part, 100, 1, NULL);
  float left[4] = {1, 2, 3, 4}, right[8] = {5, 6, 7, 8, 9, 10, 11, 12};
  attn_tensor one, two;
  assert_ok(attn_tensor_wrap(left, ATTN_F32, 2, (int64_t[]){4, 1}, &one));
  assert_ok(attn_tensor_wrap(right, ATTN_F32, 2, (int64_t[]){4, 2}, &two));
  assert_ok(attn_state_append(state, 0, 0, &one));
  assert_ok(attn_state_append(state, 0, 1, &two));
  const float *page = attn_state_pages(state, 0).data;
  for (int t = 0; t < 4; ++t) {
    assert_true(page[t * WIDTH] == left[t]);
    assert_true(page[t * WIDTH + 1] == right[2 * t] && page[t * WIDTH + 2] == right[2 * t + 1]);
  }
  assert_int_equal(attn_state_append(state, 0, 2, &two), ATTN_INTERNAL); /* beyond the row */
  assert_int_equal(attn_state_append(state, 0, -1, &one), ATTN_INTERNAL);
  two.dtype = ATTN_F64;
  assert_int_equal(attn_state_append(state, 0, 0, &two), ATTN_INTERNAL);
  attn_state_destroy(state);
}

/* Shared pages are the same memory until one side writes; full pages stay shared for good. */
static void test_sharing(void **unused) {
  (void)unused;
  attn_state *a = create(&rows_part, 4 * PAGE, 2, NULL), *b = create(&rows_part, 4 * PAGE, 1, a);
  assert_ok(append(a, PAGE + 10, 1));
  attn_state_assign(b, a);
  assert_int_equal(page_of(a, 0), page_of(b, 0));
  assert_int_equal(page_of(a, PAGE), page_of(b, PAGE));
  assert_ok(append(b, 5, 2));
  assert_int_equal(page_of(a, 0), page_of(b, 0));
  assert_int_not_equal(page_of(a, PAGE), page_of(b, PAGE));
  assert_ok(append(a, 7, 1)); /* alone again on its page: no copy */
  int32_t own = page_of(a, PAGE);
  assert_ok(append(a, 1, 1));
  assert_int_equal(page_of(a, PAGE), own);
  assert_true(holds(a, 0, PAGE + 18, 1));
  assert_true(holds(b, 0, PAGE + 10, 1) && holds(b, PAGE + 10, PAGE + 15, 2));
  attn_state_assign(b, b);
  assert_true(holds(b, PAGE + 10, PAGE + 15, 2));
  attn_state_destroy(a);
  assert_true(holds(b, 0, PAGE + 10, 1) && holds(b, PAGE + 10, PAGE + 15, 2));
  attn_state_destroy(b);
}

/* Every page comes back: the pool serves its whole size again and again. */
static void test_pages_return(void **unused) {
  (void)unused;
  attn_state *a = create(&rows_part, 8 * PAGE, 1, NULL), *b = create(&rows_part, 8 * PAGE, 1, a);
  for (int round = 0; round < 20; ++round) {
    assert_ok(append(a, 3 * PAGE + round, 1));
    attn_state_assign(b, a);
    assert_ok(append(b, PAGE, 2));
    assert_true(attn_state_cut(b, 2 * PAGE + round));
    assert_ok(append(b, 2 * PAGE, 3));
    attn_state_assign(a, b);
    assert_true(holds(a, 2 * PAGE + round, 4 * PAGE + round, 3));
    attn_state_clear(a);
    attn_state_clear(b);
    assert_int_equal(attn_state_bytes(a) + attn_state_bytes(b), 0);
    assert_ok(append(a, 8 * PAGE, 4));
    assert_int_equal(append(b, 1, 4), ATTN_OUT_OF_MEMORY);
    assert_int_equal(attn_state_bytes(b), 0);
    attn_state_clear(a);
  }
  attn_state_destroy(a);
  attn_state_destroy(b);
}

/* A refused append keeps no pages that others could have. */
static void test_refused_append(void **unused) {
  (void)unused;
  attn_state *a = create(&rows_part, 4 * PAGE, 1, NULL), *b = create(&rows_part, 4 * PAGE, 1, a);
  assert_ok(append(a, PAGE + 1, 1));
  assert_int_equal(append(b, 3 * PAGE, 2), ATTN_OUT_OF_MEMORY);
  assert_int_equal(attn_state_position(b), 0);
  assert_int_equal(attn_state_bytes(b), 0);
  assert_ok(append(a, 2 * PAGE, 1));
  assert_true(holds(a, 0, 3 * PAGE + 1, 1));
  assert_int_equal(append(a, PAGE, 1), ATTN_OUT_OF_MEMORY); /* beyond the capacity */
  assert_ok(append(a, PAGE - 1, 1));
  assert_true(holds(a, 0, 4 * PAGE, 1));
  attn_state_destroy(a);
  attn_state_destroy(b);
}

static void test_windows(void **unused) {
  (void)unused;
  attn_state_part part = rows_part;
  for (part.window = 1; part.window < 3 * PAGE; part.window += 31) {
    attn_state *state = create(&part, 20 * PAGE, 1, NULL);
    for (int64_t step = 1; attn_state_position(state) + step <= 20 * PAGE; step = step * 3 % 89) {
      assert_ok(append(state, step, 1));
      int64_t end = attn_state_position(state), from = end > part.window ? end - part.window : 0;
      assert_true(holds(state, from, end, 1));
      assert_true(attn_state_bytes(state) <= (part.window / PAGE + 2) * page_bytes);
      attn_tensor table = attn_state_page_table(state, 0);
      int32_t pages = (int32_t)attn_state_pages(state, 0).shape[0];
      for (int64_t p = 0; p < table.shape[1]; ++p)
        assert_in_range(((const int32_t *)table.data)[p], 0, pages - 1);
      for (int64_t t = 0; t < from / PAGE * PAGE; t += PAGE) /* to numbers of its own */
        assert_int_equal(page_of(state, t), page_of(state, from));
    }
    /* To nothing, and from there as if it were new. */
    assert_true(attn_state_cut(state, 0));
    assert_int_equal(attn_state_bytes(state), 0);
    assert_ok(append(state, 5 * PAGE, 2));
    assert_true(attn_state_bytes(state) <= (part.window / PAGE + 2) * page_bytes);
    attn_state_destroy(state);
  }
}

static void test_bad_arguments(void **unused) {
  (void)unused;
  attn_state *state = NULL;
  const int64_t capacities[] = {0, -1, INT64_MIN, INT64_MAX, (int64_t)INT32_MAX};
  for (size_t i = 0; i < sizeof capacities / sizeof *capacities; ++i)
    assert_int_equal(
        attn_state_create((attn_device){0}, &rows_part, 1, capacities[i], 1, NULL, &state),
        ATTN_INVALID_ARGUMENT);
  const int64_t sharers[] = {0, -1, INT64_MAX};
  for (size_t i = 0; i < sizeof sharers / sizeof *sharers; ++i)
    assert_int_equal(
        attn_state_create((attn_device){0}, &rows_part, 1, 1000, sharers[i], NULL, &state),
        ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_state_create((attn_device){0}, &rows_part, -1, 10, 1, NULL, &state),
                   ATTN_INVALID_ARGUMENT);
  assert_int_equal(
      attn_state_create((attn_device){0}, &rows_part, ATTN_STATE_PARTS + 1, 10, 1, NULL, &state),
      ATTN_INVALID_ARGUMENT);
  attn_state *family = create(&rows_part, 10, 1, NULL);
  attn_state_part wider = rows_part;
  wider.shape[0] = WIDTH + 1;
  assert_int_equal(attn_state_create((attn_device){0}, &wider, 1, 10, 1, family, &state),
                   ATTN_INVALID_ARGUMENT);
  attn_state_destroy(family);
  attn_state_destroy(NULL);
}

static void test_out_of_memory(void **unused) {
  (void)unused;
  const attn_state_part parts[] = {
      rows_part, {.name = "matrix", .dtype = ATTN_F32, .rank = 2, .shape = {4, 4}}};
  size_t live = attn_memory_get_stats().live_bytes;
  int64_t n = 0;
  for (bool failed = true; failed; ++n) {
    attn_state *state = NULL;
    attn_fault_arm(ATTN_FAULT_ALLOC, n);
    attn_status status = attn_state_create((attn_device){0}, parts, 2, 100, 1, NULL, &state);
    failed = attn_fault_disarm(ATTN_FAULT_ALLOC);
    assert_int_equal(status, failed ? ATTN_OUT_OF_MEMORY : ATTN_OK);
    attn_state_destroy(state);
    assert_int_equal(attn_memory_get_stats().live_bytes, live);
  }
  assert_true(n > 4);
}

/* Threads, each with a state of one family: they take pages, fork, copy and free at once, and all
 * begin with the same prompt, whose last page each has to copy. A page that two of them owned would
 * hold one's numbers in the other's state. */
enum { THREADS = 4, ROUNDS = 400, PROMPT = PAGE + 10 };

typedef struct worker {
  const attn_state *prompt;
  attn_state *state, *fork;
  float mark;
  int wrong, refused;
} worker;

/* Without assertions: cmocka's jump must not leave a thread. */
static bool add(attn_state *state, int64_t tokens, float mark) {
  float numbers[2 * PAGE * WIDTH];
  int64_t first = attn_state_position(state);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t c = 0; c < WIDTH; ++c) numbers[t * WIDTH + c] = content(mark, first + t, c);
  attn_tensor rows;
  if (attn_tensor_wrap(numbers, ATTN_F32, 2, (int64_t[]){tokens, WIDTH}, &rows) != ATTN_OK)
    return false;
  if (attn_state_append(state, 0, 0, &rows) != ATTN_OK) return false;
  attn_state_advance(state, tokens);
  return true;
}

static void *work(void *context) {
  worker *w = context;
  attn_state_assign(w->state, w->prompt);
  for (int round = 0; round < ROUNDS; ++round) {
    int64_t tokens = 1 + (round * 37 + (int)w->mark * 11) % (2 * PAGE);
    if (attn_state_position(w->state) + tokens + 10 > 6 * PAGE)
      attn_state_assign(w->state, w->prompt);
    if (!add(w->state, tokens, w->mark)) {
      ++w->refused;
      attn_state_clear(w->fork);
      attn_state_assign(w->state, w->prompt);
      continue;
    }
    int64_t middle = attn_state_position(w->state);
    if (!holds(w->state, 0, PROMPT, 0) || !holds(w->state, PROMPT, middle, w->mark)) ++w->wrong;
    if (round % 3) continue;
    attn_state_assign(w->fork, w->state);
    if (!add(w->fork, 10, w->mark + THREADS)) {
      ++w->refused;
      continue;
    }
    if (!add(w->state, 10, w->mark)) ++w->refused;
    if (!holds(w->state, PROMPT, attn_state_position(w->state), w->mark)) ++w->wrong;
    if (!holds(w->fork, 0, PROMPT, 0) || !holds(w->fork, PROMPT, middle, w->mark)) ++w->wrong;
    if (!holds(w->fork, middle, middle + 10, w->mark + THREADS)) ++w->wrong;
  }
  return NULL;
}

static void test_threads(void **unused) {
  (void)unused;
  worker workers[THREADS];
  pthread_t threads[THREADS];
  /* about as many pages as the threads want at their fullest, so that some are refused */
  attn_state *family = create(&rows_part, 6 * PAGE, 4, NULL);
  assert_ok(append(family, PROMPT, 0));
  for (int i = 0; i < THREADS; ++i)
    workers[i] = (worker){.prompt = family,
                          .state = create(&rows_part, 6 * PAGE, 1, family),
                          .fork = create(&rows_part, 6 * PAGE, 1, family),
                          .mark = (float)(i + 1)};
  for (int i = 0; i < THREADS; ++i)
    assert_int_equal(pthread_create(&threads[i], NULL, work, &workers[i]), 0);
  for (int i = 0; i < THREADS; ++i) pthread_join(threads[i], NULL);
  for (int i = 0; i < THREADS; ++i) {
    assert_int_equal(workers[i].wrong, 0);
    attn_state_destroy(workers[i].state);
    attn_state_destroy(workers[i].fork);
  }
  assert_true(holds(family, 0, PROMPT, 0));
  assert_ok(append(family, 6 * PAGE - PROMPT, 1));
  attn_state *others[3]; /* nothing was lost: all 24 pages can be had */
  for (int i = 0; i < 3; ++i) {
    others[i] = create(&rows_part, 6 * PAGE, 1, family);
    assert_ok(append(others[i], 6 * PAGE, 2));
  }
  for (int i = 0; i < 3; ++i) attn_state_destroy(others[i]);
  attn_state_destroy(family);
}

int main(int argc, char **argv) {
  if (argc > 1) cmocka_set_test_filter(argv[1]); /* a pattern of names */
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_columns),       cmocka_unit_test(test_sharing),
      cmocka_unit_test(test_pages_return),  cmocka_unit_test(test_refused_append),
      cmocka_unit_test(test_windows),       cmocka_unit_test(test_bad_arguments),
      cmocka_unit_test(test_out_of_memory), cmocka_unit_test(test_threads),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
