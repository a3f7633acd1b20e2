/* The laws of states, for every mixer of the table: however a sequence is cut into pieces, the
 * result is the same; a state survives saving, forking and cutting; windows free their pages; what
 * does not fit is refused and harms nothing; a decode step allocates nothing. */
#include "support/mixers.h"

#include "base/memory.h"
#include "base/random.h"
#include "base/status.h"

#include <math.h>
#include <string.h>

static const attn_dtype dtypes[] = {ATTN_F64, ATTN_F32, ATTN_BF16};
enum { DTYPES = sizeof dtypes / sizeof *dtypes };

/* A layer with one sequence, what the oracle makes of it, and how close is close. */
typedef struct bench {
  test_layer layer;
  int64_t rows, hidden, count;
  double *x, *expected, *y, tolerance;
} bench;

static void bench_create(bench *b, const attn_mixer *mixer, const attn_mixer_options *options,
                         attn_dtype dtype, int64_t rows) {
  assert_ok(test_layer_create(&b->layer, mixer, options, dtype, false));
  attn_layout layout = attn_layout_equal(1, rows);
  b->rows = rows;
  b->hidden = b->layer.options.hidden;
  b->count = rows * b->hidden;
  b->x = test_inputs(&b->layer, b->count, 11);
  b->y = calloc((size_t)b->count, sizeof *b->y);
  b->expected = calloc((size_t)b->count, sizeof *b->expected);
  test_layer_oracle(&b->layer, &layout, b->x, (const double *const *)b->layer.values, b->expected);
  b->tolerance = test_layer_tolerance(&b->layer, &layout, b->x, b->expected);
}

static void bench_destroy(bench *b) {
  free(b->x), free(b->y), free(b->expected);
  test_layer_destroy(&b->layer);
}

static attn_state *new_state(bench *b, int64_t capacity, int64_t sharers,
                             const attn_state *family) {
  attn_state *state = NULL;
  assert_ok(test_state_create(&b->layer, capacity, sharers, family, &state));
  assert_int_equal(attn_state_position(state), 0);
  return state;
}

/* Feeds rows of b->x from the state's position to `end`, into b->y. */
static void feed(bench *b, attn_state *state, int64_t end) {
  int64_t at = attn_state_position(state);
  assert_ok(test_layer_continue(&b->layer, state, end - at, b->x + at * b->hidden,
                                b->y + at * b->hidden));
  assert_int_equal(attn_state_position(state), end);
}

static void assert_expected(bench *b, const char *what, int64_t from, int64_t to) {
  test_assert_close(&b->layer, what, b->y + from * b->hidden, b->expected + from * b->hidden,
                    (to - from) * b->hidden, b->tolerance);
}

static bool has_rows(const test_layer *layer) {
  attn_state_part parts[ATTN_STATE_PARTS];
  int count = layer->mixer->state(&layer->options, layer->compute, parts);
  for (int i = 0; i < count; ++i)
    if (parts[i].kind == ATTN_STATE_ROWS) return true;
  return false;
}

/* Pieces ----------------------------------------------------------------------------------------
 */

static void in_pieces(bench *b, attn_state *state, int64_t most, uint64_t seed) {
  attn_random random = {.seed = seed};
  attn_state_clear(state);
  while (attn_state_position(state) < b->rows) {
    int64_t end =
        attn_state_position(state) + 1 + (int64_t)attn_random_below(&random, (uint64_t)most);
    feed(b, state, end < b->rows ? end : b->rows);
  }
  assert_expected(b, "y in pieces", 0, b->rows);
}

static void pieces_equal_whole(const attn_mixer *mixer, const attn_mixer_options *options) {
  const int64_t most_tokens[] = {1, 7, 100, 1000};
  for (int d = 0; d < DTYPES; ++d) {
    bench b;
    bench_create(&b, mixer, options, dtypes[d], 150);
    attn_state *state = new_state(&b, b.rows, 1, NULL);
    for (size_t i = 0; i < sizeof most_tokens / sizeof *most_tokens; ++i)
      in_pieces(&b, state, most_tokens[i], i);
    attn_state_destroy(state);
    bench_destroy(&b);
  }
}

static void each_case_in_pieces(void *context) {
  (void)context;
  test_each_causal_case(pieces_equal_whole);
}

static void test_pieces(void **state) {
  (void)state;
  test_on_every_path(each_case_in_pieces, NULL);
}

/* A few tokens give the bits of as many steps: speculation relies on it. Blocks end in between. */
static void few_rows_equal_steps(const attn_mixer *mixer, const attn_mixer_options *options) {
  for (int d = 0; d < DTYPES; ++d) {
    bench b;
    bench_create(&b, mixer, options, dtypes[d], 100);
    attn_state *state = new_state(&b, b.rows, 1, NULL);
    double *steps = malloc((size_t)b.count * sizeof *steps);
    feed(&b, state, 50);
    while (attn_state_position(state) < b.rows) feed(&b, state, attn_state_position(state) + 1);
    memcpy(steps, b.y, (size_t)b.count * sizeof *steps);
    attn_state_clear(state);
    feed(&b, state, 50);
    for (int64_t end = 52, rows = 2; end <= b.rows; rows = rows % ATTN_FEW_ROWS + 1, end += rows)
      feed(&b, state, end);
    test_assert_same_bits(&b.layer, "y of a few tokens", b.y, steps,
                          attn_state_position(state) * b.hidden);
    free(steps);
    attn_state_destroy(state);
    bench_destroy(&b);
  }
}

static void each_case_few_rows(void *context) {
  (void)context;
  test_each_causal_case(few_rows_equal_steps);
}

static void test_few_rows(void **state) {
  (void)state;
  test_on_every_path(each_case_few_rows, NULL);
}

enum { STATES = 3 };
static const int64_t lengths[STATES] = {40, 1, 63}; /* of what the states hold */

/* One token each of several states, at positions of their own, in one call. */
static void step_together(bench *b, attn_state *const *states, const double *x, double *y) {
  attn_graph *g = b->layer.graph;
  attn_graph_reset(g, false);
  int64_t shape[2] = {STATES, b->hidden};
  attn_tensor rows = attn_graph_tensor(g, b->layer.compute, 2, shape), numbers;
  assert_ok(attn_tensor_wrap((void *)(uintptr_t)x, ATTN_F64, 2, shape, &numbers));
  assert_ok(attn_tensor_copy(&numbers, &rows));
  attn_mixer_call call = {.options = &b->layer.options,
                          .parameters = b->layer.pointers,
                          .layout = attn_layout_equal(STATES, 1),
                          .states = states};
  attn_var *out = attn_mixer_apply(g, b->layer.mixer, &call, attn_graph_input(g, &rows));
  assert_ok(attn_graph_status(g));
  assert_ok(attn_tensor_wrap(y, ATTN_F64, 2, shape, &numbers));
  assert_ok(attn_tensor_copy(&out->value, &numbers));
  for (int i = 0; i < STATES; ++i) attn_state_advance(states[i], 1);
}

static void steps_together_equal_alone(const attn_mixer *mixer, const attn_mixer_options *options) {
  enum { STEPS = 3 };
  for (int d = 0; d < DTYPES; ++d) {
    bench b;
    bench_create(&b, mixer, options, dtypes[d], 100);
    attn_state *alone[STATES], *together[STATES];
    double *x = malloc((size_t)(STATES * b.hidden) * sizeof *x);
    double *y = malloc((size_t)(STATES * b.hidden) * sizeof *y);
    for (int i = 0; i < STATES; ++i) {
      alone[i] = new_state(&b, b.rows, 2, NULL);
      together[i] = new_state(&b, b.rows, 1, alone[i]);
      feed(&b, alone[i], lengths[i]);
      attn_state_assign(together[i], alone[i]);
    }
    for (int step = 0; step < STEPS; ++step) {
      for (int i = 0; i < STATES; ++i)
        memcpy(x + i * b.hidden, b.x + (lengths[i] + step) * b.hidden,
               (size_t)b.hidden * sizeof *x);
      step_together(&b, together, x, y);
      for (int i = 0; i < STATES; ++i) {
        feed(&b, alone[i], lengths[i] + step + 1);
        test_assert_same_bits(&b.layer, "y of a step together", y + i * b.hidden,
                              b.y + (lengths[i] + step) * b.hidden, b.hidden);
      }
    }
    for (int i = 0; i < STATES; ++i) {
      attn_state_destroy(together[i]);
      attn_state_destroy(alone[i]);
    }
    free(x), free(y);
    bench_destroy(&b);
  }
}

static void test_steps_together(void **state) {
  (void)state;
  test_each_causal_case(steps_together_equal_alone);
}

/* Saving ----------------------------------------------------------------------------------------
 */

typedef struct file {
  char bytes[1 << 22];
  size_t size, read;
} file;

static attn_status write_bytes(void *context, const void *data, size_t size) {
  file *f = context;
  if (size > sizeof f->bytes - f->size) return attn_fail(ATTN_IO_ERROR, "the file is full");
  memcpy(f->bytes + f->size, data, size);
  f->size += size;
  return ATTN_OK;
}

static attn_status read_bytes(void *context, void *data, size_t size) {
  file *f = context;
  if (size > f->size - f->read) return attn_fail(ATTN_BAD_FORMAT, "the file is truncated");
  memcpy(data, f->bytes + f->read, size);
  f->read += size;
  return ATTN_OK;
}

static void assert_empty(bench *b, attn_state *state, double *fresh, int64_t end) {
  assert_int_equal(attn_state_position(state), 0);
  feed(b, state, end);
  test_assert_same_bits(&b->layer, "a cleared state's y", b->y, fresh, end * b->hidden);
}

static void saved_equals_kept(const attn_mixer *mixer, const attn_mixer_options *options) {
  static file f;
  for (int d = 0; d < DTYPES; ++d) {
    bench b;
    bench_create(&b, mixer, options, dtypes[d], 150);
    attn_state *kept = new_state(&b, b.rows, 1, NULL), *restored = new_state(&b, b.rows, 1, NULL);
    feed(&b, kept, 100);
    f.size = 0;
    assert_ok(attn_state_save(kept, write_bytes, &f));
    feed(&b, kept, b.rows);
    double *fresh = malloc((size_t)b.count * sizeof *fresh);
    memcpy(fresh, b.y, (size_t)b.count * sizeof *fresh);

    feed(&b, restored, 30); /* what it held before must not matter */
    f.read = 0;
    assert_ok(attn_state_restore(restored, read_bytes, &f));
    assert_int_equal(f.read, f.size);
    feed(&b, restored, b.rows);
    test_assert_same_bits(&b.layer, "y after restoring", b.y, fresh, b.count);

    size_t whole = f.size, cuts[] = {0, 7, 8, whole / 2, whole - 1};
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; ++i) {
      f.size = cuts[i];
      f.read = 0;
      assert_int_equal(attn_state_restore(restored, read_bytes, &f), ATTN_BAD_FORMAT);
      assert_empty(&b, restored, fresh, 100);
    }
    const int64_t positions[] = {-1, INT64_MIN, INT64_MAX, b.rows + 1};
    for (size_t i = 0; i < sizeof positions / sizeof *positions; ++i) {
      f.size = whole;
      f.read = 0;
      memcpy(f.bytes, &positions[i], sizeof *positions);
      if (positions[i] >= 0 && !has_rows(&b.layer)) continue; /* no limit to their tokens */
      assert_int_equal(attn_state_restore(restored, read_bytes, &f), ATTN_BAD_FORMAT);
      assert_empty(&b, restored, fresh, 100);
    }
    f.size = sizeof f.bytes - 4;
    assert_int_equal(attn_state_save(kept, write_bytes, &f), ATTN_IO_ERROR);
    free(fresh);
    attn_state_destroy(kept);
    attn_state_destroy(restored);
    bench_destroy(&b);
  }
}

static void test_saving(void **state) {
  (void)state;
  test_each_causal_case(saved_equals_kept);
}

/* Forks -----------------------------------------------------------------------------------------
 */

/* Two branches from token `at` on, taken in turns, against each alone. */
static void forks_do_not_meet(const attn_mixer *mixer, const attn_mixer_options *options) {
  const int64_t at = 100, piece = 9;
  bench a, b;
  bench_create(&a, mixer, options, ATTN_F32, 150);
  bench_create(&b, mixer, options, ATTN_F32, 150);
  double *other = test_inputs(&b.layer, b.count, 12);
  memcpy(b.x + at * b.hidden, other + at * b.hidden,
         (size_t)(b.count - at * b.hidden) * sizeof *other);
  double *alone[2] = {malloc((size_t)a.count * sizeof(double)),
                      malloc((size_t)b.count * sizeof(double))};
  bench *branch[2] = {&a, &b};
  for (int i = 0; i < 2; ++i) {
    attn_state *state = new_state(branch[i], 150, 1, NULL);
    for (int64_t end = at; end < 150; end += piece) feed(branch[i], state, end);
    feed(branch[i], state, 150);
    memcpy(alone[i], branch[i]->y, (size_t)a.count * sizeof(double));
    attn_state_destroy(state);
  }
  attn_state *first = new_state(&a, 150, 3, NULL), *second = new_state(&b, 150, 1, first);
  attn_state *checkpoint = new_state(&a, 150, 1, first);
  feed(&a, first, at);
  attn_state_assign(checkpoint, first);
  attn_state_assign(second, first);
  memcpy(b.y, a.y, (size_t)(at * a.hidden) * sizeof *a.y);
  for (int64_t end = at + piece; end < 150; end += piece) {
    feed(&a, first, end);
    feed(&b, second, end);
  }
  feed(&b, second, 150);
  feed(&a, first, 150);
  test_assert_same_bits(&a.layer, "y of the first branch", a.y, alone[0], a.count);
  test_assert_same_bits(&b.layer, "y of the second branch", b.y, alone[1], b.count);

  attn_state_destroy(first); /* the family may leave in any order */
  attn_state_assign(second, checkpoint);
  assert_int_equal(attn_state_position(second), at);
  for (int64_t end = at + piece; end < 150; end += piece) feed(&b, second, end);
  feed(&b, second, 150);
  test_assert_same_bits(&b.layer, "y from the checkpoint", b.y, alone[1], b.count);
  attn_state_destroy(checkpoint);
  attn_state_destroy(second);
  free(other), free(alone[0]), free(alone[1]);
  bench_destroy(&a);
  bench_destroy(&b);
}

static void test_forks(void **state) {
  (void)state;
  test_each_causal_case(forks_do_not_meet);
}

/* Cuts ------------------------------------------------------------------------------------------
 */

static void cuts_are_exact(const attn_mixer *mixer, const attn_mixer_options *options) {
  bench b;
  bench_create(&b, mixer, options, ATTN_F32, 150);
  attn_state *whole = new_state(&b, 150, 3, NULL), *state = new_state(&b, 150, 1, whole);
  feed(&b, whole, 90);
  feed(&b, whole, 140);
  for (int64_t position = -1; position <= 141; ++position) {
    attn_state_assign(state, whole);
    bool cut = attn_state_cut(state, position);
    bool possible = has_rows(&b.layer) && position >= 0 && position <= 140;
    if (b.layer.options.window)
      possible = possible && (position == 0 || position >= 140 - ATTN_PAGE_TOKENS / 2);
    if (position == 140) assert_true(cut);
    if (position < 0 || position > 140) assert_false(cut);
    if (possible && !cut && !b.layer.options.window)
      fail_msg("%s: cannot cut to %lld", test_case_name(&b.layer), (long long)position);
    assert_int_equal(attn_state_position(state), cut ? position : 140);
    int64_t from = attn_state_position(state);
    if (position % 13 != 0 && position < 130) continue;
    feed(&b, state, 150);
    assert_expected(&b, "y after a cut", from, 150);
  }
  attn_state_destroy(state);
  attn_state_destroy(whole);
  bench_destroy(&b);
}

static void test_cuts(void **state) {
  (void)state;
  test_each_causal_case(cuts_are_exact);
}

/* Pages -----------------------------------------------------------------------------------------
 */

/* Fills every page that `family` does not use with NaN, then frees them: numbers of a stranger. */
static void poison(bench *b, const attn_state *family, int64_t tokens) {
  attn_state *stranger = new_state(b, tokens, 1, family);
  attn_state_part parts[ATTN_STATE_PARTS];
  int count = b->layer.mixer->state(&b->layer.options, b->layer.compute, parts);
  for (int i = 0; i < count; ++i) {
    if (parts[i].kind != ATTN_STATE_ROWS) continue;
    attn_tensor rows;
    assert_ok(attn_tensor_create(parts[i].dtype, 2, (int64_t[]){tokens, parts[i].shape[0]}, &rows));
    assert_ok(attn_tensor_fill(&rows, NAN));
    assert_ok(attn_state_append(stranger, i, 0, &rows));
    attn_tensor_destroy(&rows);
  }
  attn_state_advance(stranger, tokens);
  attn_state_destroy(stranger);
}

static void strangers_do_not_leak(const attn_mixer *mixer, const attn_mixer_options *options) {
  for (int d = 0; d < DTYPES; ++d) {
    bench b;
    bench_create(&b, mixer, options, dtypes[d], 300);
    attn_state *state = new_state(&b, 320, 2, NULL);
    for (int64_t end = 50; end <= 300; end += 50) {
      poison(&b, state, 320);
      feed(&b, state, end);
    }
    assert_expected(&b, "y beside a stranger's numbers", 0, 300);
    attn_state_destroy(state);
    bench_destroy(&b);
  }
}

static void each_case_strangers(void *context) {
  (void)context;
  test_each_causal_case(strangers_do_not_leak);
}

static void test_strangers(void **state) {
  (void)state;
  test_on_every_path(each_case_strangers, NULL);
}

static void memory_is_bounded(const attn_mixer *mixer, const attn_mixer_options *options) {
  bench b;
  bench_create(&b, mixer, options, ATTN_F32, 700);
  attn_state *state = new_state(&b, 700, 1, NULL);
  attn_state_part parts[ATTN_STATE_PARTS];
  int count = mixer->state(&b.layer.options, ATTN_F32, parts);
  for (int64_t end = 70; end <= 700; end += 70) {
    feed(&b, state, end);
    int64_t most = 0;
    for (int i = 0; i < count; ++i) {
      int64_t elements = 1, tokens = 1;
      for (int axis = 0; axis < parts[i].rank; ++axis) elements *= parts[i].shape[axis];
      if (parts[i].kind == ATTN_STATE_ROWS) {
        tokens = parts[i].window && parts[i].window < end ? parts[i].window : end;
        tokens = (tokens / ATTN_PAGE_TOKENS + 2) * ATTN_PAGE_TOKENS;
      }
      most += elements * tokens * (int64_t)attn_dtype_size(parts[i].dtype);
    }
    assert_in_range(attn_state_bytes(state), 1, most);
  }
  assert_expected(&b, "y", 0, 700);
  attn_state_destroy(state);
  bench_destroy(&b);
}

static void test_memory(void **state) {
  (void)state;
  test_each_causal_case(memory_is_bounded);
}

/* Limits ----------------------------------------------------------------------------------------
 */

static attn_status try_to_feed(bench *b, attn_state *state, int64_t tokens) {
  int64_t before = attn_state_position(state);
  double *y = malloc((size_t)(tokens * b->hidden) * sizeof *y);
  attn_status status = test_layer_continue(&b->layer, state, tokens, b->x + before * b->hidden, y);
  if (status != ATTN_OK) assert_int_equal(attn_state_position(state), before);
  free(y);
  return status;
}

static void limits_are_kept(const attn_mixer *mixer, const attn_mixer_options *options) {
  bench b;
  bench_create(&b, mixer, options, ATTN_F32, 200);
  if (!has_rows(&b.layer)) {
    bench_destroy(&b);
    return;
  }
  attn_state *state = new_state(&b, 120, 1, NULL); /* two pages, the second not to its end */
  feed(&b, state, 70);
  assert_int_equal(try_to_feed(&b, state, 51), ATTN_OUT_OF_MEMORY);
  assert_non_null(strstr(attn_error_message(), "120"));
  feed(&b, state, 100);

  attn_state *fork = new_state(&b, 120, 1, state);
  attn_state_assign(fork, state);
  int64_t bytes = attn_state_bytes(fork);
  if (!b.layer.options.window) { /* both pages are shared, and the pool has no third */
    assert_int_equal(try_to_feed(&b, fork, 1), ATTN_OUT_OF_MEMORY);
    assert_int_equal(try_to_feed(&b, state, 1), ATTN_OUT_OF_MEMORY);
    assert_int_equal(attn_state_bytes(fork), bytes);
  }
  attn_state_destroy(fork);
  feed(&b, state, 120);
  assert_expected(&b, "y after refusals", 0, 120);
  attn_state_destroy(state);
  bench_destroy(&b);
}

static void test_limits(void **state) {
  (void)state;
  test_each_causal_case(limits_are_kept);
}

static attn_status apply_once(bench *b, attn_state *state, const attn_layout *layout,
                              bool recording) {
  attn_graph *g = b->layer.graph;
  attn_graph_reset(g, recording);
  int64_t shape[2] = {layout->rows, b->hidden};
  attn_tensor x = attn_graph_tensor(g, b->layer.compute, 2, shape);
  assert_ok(attn_tensor_fill(&x, 1));
  attn_mixer_call call = {.options = &b->layer.options,
                          .parameters = b->layer.pointers,
                          .layout = *layout,
                          .state = state};
  attn_var *y = attn_mixer_apply(g, b->layer.mixer, &call, attn_graph_input(g, &x));
  if (attn_graph_status(g) != ATTN_OK) assert_null(y);
  return attn_graph_status(g);
}

static void states_refuse(const attn_mixer *mixer, const attn_mixer_options *options) {
  const int32_t offsets[] = {0, 2, 4};
  bench b;
  bench_create(&b, mixer, options, ATTN_F32, 20);
  attn_state *state = new_state(&b, 64, 1, NULL);
  feed(&b, state, 10);
  attn_layout next = attn_layout_equal(1, 4), two = attn_layout_equal(2, 2);
  attn_layout packed = attn_layout_packed(2, offsets), early = next, late = next;
  next.position = two.position = packed.position = 10;
  early.position = 9;
  late.position = 11;
  assert_int_equal(apply_once(&b, state, &two, false), ATTN_INVALID_ARGUMENT);
  assert_int_equal(apply_once(&b, state, &packed, false), ATTN_INVALID_ARGUMENT);
  assert_int_equal(apply_once(&b, state, &early, false), ATTN_INVALID_ARGUMENT);
  assert_int_equal(apply_once(&b, state, &late, false), ATTN_INVALID_ARGUMENT);
  assert_int_equal(apply_once(&b, state, &next, true), ATTN_INVALID_ARGUMENT);
  feed(&b, state, 20);
  assert_expected(&b, "y after refusals", 0, 20);
  attn_state_destroy(state);
  bench_destroy(&b);
}

static void test_refusals(void **state) {
  (void)state;
  test_each_mixer(states_refuse);
}

/* What comes later would change what the state holds. */
static void bidirectional_refuses(const attn_mixer *mixer, const attn_mixer_options *options) {
  bench b;
  if (!options->bidirectional) return;
  bench_create(&b, mixer, options, ATTN_F32, 20);
  attn_state *state = new_state(&b, 64, 1, NULL);
  assert_int_equal(try_to_feed(&b, state, 10), ATTN_UNSUPPORTED);
  assert_non_null(strstr(attn_error_message(), "bidirectional"));
  attn_state_destroy(state);
  bench_destroy(&b);
}

static void test_bidirectional_refuses(void **state) {
  (void)state;
  test_each_case(bidirectional_refuses);
}

/* Decoding --------------------------------------------------------------------------------------
 */

static void decode_allocates_nothing(const attn_mixer *mixer, const attn_mixer_options *options) {
  const int64_t prompt = 50, warm_up = 3;
  for (int d = 0; d < DTYPES; ++d) {
    bench b;
    bench_create(&b, mixer, options, dtypes[d], prompt + warm_up + 200);
    attn_state *state = new_state(&b, b.rows, 1, NULL);
    feed(&b, state, prompt);
    for (int64_t i = 0; i < warm_up; ++i) feed(&b, state, attn_state_position(state) + 1);
    uint64_t before = attn_memory_get_stats().allocations;
    for (int64_t i = 0; i < 200; ++i) feed(&b, state, attn_state_position(state) + 1);
    uint64_t made = attn_memory_get_stats().allocations - before;
    if (test_device().kind != ATTN_CPU) made = 0; /* copies to and from it count too */
    if (made) fail_msg("%s: %d allocations in 200 steps", test_case_name(&b.layer), (int)made);
    attn_state_destroy(state);
    bench_destroy(&b);
  }
}

static void each_case_decodes(void *context) {
  (void)context;
  test_each_causal_case(decode_allocates_nothing);
}

static void test_decoding(void **state) {
  (void)state;
  test_on_every_path(each_case_decodes, NULL);
}

int main(int argc, char **argv) {
  if (argc > 1) cmocka_set_test_filter(argv[1]); /* a pattern of names */
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_pieces),         cmocka_unit_test(test_few_rows),
      cmocka_unit_test(test_steps_together), cmocka_unit_test(test_saving),
      cmocka_unit_test(test_forks),          cmocka_unit_test(test_cuts),
      cmocka_unit_test(test_strangers),      cmocka_unit_test(test_memory),
      cmocka_unit_test(test_limits),         cmocka_unit_test(test_refusals),
      cmocka_unit_test(test_decoding),       cmocka_unit_test(test_bidirectional_refuses),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
