/* The Reactive Transformer: every kind of memory and gate against its oracle; sessions, whose
 * answers depend on what was said through the memory alone; the identities of gates; files;
 * refusals. */
#include "support/test.h"

#include "base/memory.h"
#include "support/reactive.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum {
  VOCABULARY = REACTIVE_VOCABULARY,
  HIDDEN = REACTIVE_HIDDEN,
  SLOTS = REACTIVE_SLOTS,
  LAYERS = REACTIVE_LAYERS,
  MEMORY = LAYERS * SLOTS * HIDDEN
};

static void make_memory(float *memory, uint64_t seed) {
  double x[MEMORY];
  test_fill_normal(x, MEMORY, 0, 0.7, seed);
  for (int i = 0; i < MEMORY; ++i) memory[i] = (float)x[i];
}

static attn_reactive_session *open_session(attn_reactive *m, uint64_t memory) {
  attn_reactive_session *s;
  float numbers[MEMORY];
  assert_ok(attn_reactive_session_create(m, NULL, &s));
  make_memory(numbers, memory);
  assert_ok(attn_reactive_session_set_memory(s, numbers));
  return s;
}

static double error_of(const float *x, const double *y, int64_t count) {
  double *a = malloc((size_t)count * sizeof *a);
  for (int64_t i = 0; i < count; ++i) a[i] = x[i];
  double error = test_relative_error(a, y, count);
  free(a);
  return error;
}

static double distance(const float *x, const float *y, int64_t count) {
  double *b = malloc((size_t)count * sizeof *b);
  for (int64_t i = 0; i < count; ++i) b[i] = y[i];
  double error = error_of(x, b, count);
  free(b);
  return error;
}

/* The oracle ------------------------------------------------------------------------------------
 */

/* Three turns of a session, fed in pieces: logits behind each piece, and the memory. */
static void equals_oracle(void **state) {
  (void)state;
  enum { LONGEST = 9 };
  const int64_t lengths[] = {7, 1, LONGEST}, cuts[] = {4, 1, 2};
  for (int kind = 0; kind < REACTIVE_MEMORIES * REACTIVE_GATES; ++kind) {
    int memory = kind / REACTIVE_GATES, gate = kind % REACTIVE_GATES;
    attn_reactive *m = reactive_make(memory, gate, ATTN_F64);
    reactive_values v;
    oracle_reactive o = reactive_oracle(m, memory, gate, &v);
    attn_reactive_session *s = open_session(m, 5);
    float numbers[MEMORY], logits[VOCABULARY];
    double stm[MEMORY], next[MEMORY], encoded[LAYERS * LONGEST * HIDDEN];
    make_memory(numbers, 5);
    for (int i = 0; i < MEMORY; ++i) stm[i] = numbers[i];
    for (int t = 0; t < 3; ++t) {
      int32_t tokens[LONGEST];
      double expected[LONGEST * VOCABULARY];
      int64_t rows = lengths[t];
      reactive_tokens(tokens, rows, t);
      oracle_reactive_logits(&o, rows, tokens, SLOTS, stm, expected);
      for (int64_t from = 0; from < rows; from += cuts[t]) {
        int64_t count = rows - from < cuts[t] ? rows - from : cuts[t];
        assert_ok(attn_reactive_session_feed(s, tokens + from, count, logits));
        double error = error_of(logits, expected + (from + count - 1) * VOCABULARY, VOCABULARY);
        if (!(error < 1e-6)) /* logits are float32 */
          fail_msg("%s, %s: turn %d is off by %g", reactive_memories[memory],
                   reactive_gates[gate][0], t, error);
      }
      assert_ok(attn_reactive_session_end_turn(s));
      oracle_reactive_encode(&o, rows, tokens, encoded);
      oracle_reactive_update(&o, stm, rows, encoded, next);
      memcpy(stm, next, sizeof stm);
      assert_ok(attn_reactive_session_get_memory(s, numbers));
      double error = error_of(numbers, stm, MEMORY);
      if (!(error < 1e-6))
        fail_msg("%s, %s %s: the memory of turn %d is off by %g", reactive_memories[memory],
                 reactive_gates[gate][0], reactive_gates[gate][1], t, error);
    }
    assert_int_equal(attn_reactive_session_turns(s), 3);
    attn_reactive_session_destroy(s);
    reactive_free_values(&v);
    attn_reactive_destroy(m);
  }
}

/* float32 and bfloat16 give what float64 does, up to rounding. */
static void dtypes_agree(void **state) {
  (void)state;
  const attn_dtype dtypes[] = {ATTN_F64, ATTN_F32, ATTN_BF16};
  const double limits[] = {0, 1e-5, 6e-2};
  float memory[3][MEMORY], logits[3][VOCABULARY];
  for (int d = 0; d < 3; ++d) {
    int32_t tokens[8];
    attn_reactive *m = reactive_make(4, 3, dtypes[d]);
    attn_reactive_session *s = open_session(m, 5);
    for (int t = 0; t < 3; ++t) {
      reactive_tokens(tokens, 8, t);
      assert_ok(attn_reactive_session_feed(s, tokens, 8, logits[d]));
      assert_ok(attn_reactive_session_end_turn(s));
    }
    assert_ok(attn_reactive_session_get_memory(s, memory[d]));
    if (d > 0 && !(distance(memory[d], memory[0], MEMORY) < limits[d] &&
                   distance(logits[d], logits[0], VOCABULARY) < limits[d]))
      fail_msg("%s is off by %g and %g", attn_dtype_name(dtypes[d]),
               distance(memory[d], memory[0], MEMORY), distance(logits[d], logits[0], VOCABULARY));
    attn_reactive_session_destroy(s);
    attn_reactive_destroy(m);
  }
}

/* Sequences of a batch, equally long or packed, do not meet. */
static void packed_equals_separate(void **state) {
  (void)state;
  const int32_t offsets[] = {0, 6, 7, 16};
  int32_t tokens[16];
  for (int gate = 0; gate < REACTIVE_GATES; ++gate) {
    attn_reactive *m = reactive_make(2, gate, ATTN_F64);
    attn_graph *g = m->graph;
    double numbers[3 * SLOTS * HIDDEN];
    reactive_tokens(tokens, 16, 1);
    test_fill_normal(numbers, 3 * SLOTS * HIDDEN, 0, 0.7, 2);
    double *together[3] = {0}, *part;
    for (int b = -1; b < 3; ++b) {
      int first = b < 0 ? 0 : b, count = b < 0 ? 3 : 1;
      attn_layout layout = b < 0 ? attn_layout_packed(3, offsets)
                                 : attn_layout_equal(1, offsets[b + 1] - offsets[b]);
      attn_layout slots = attn_layout_equal(count, SLOTS);
      attn_graph_reset(g, false);
      attn_var *encoded[LAYERS], *stm[LAYERS], *updated[LAYERS];
      for (int l = 0; l < LAYERS; ++l)
        stm[l] = attn_graph_host_rows(g, numbers + first * SLOTS * HIDDEN, ATTN_F64, count * SLOTS,
                                      HIDDEN);
      attn_reactive_encode(g, m, &layout, tokens + offsets[first], encoded);
      attn_reactive_update(g, m, count, stm, &layout, encoded, updated);
      attn_var *z = attn_reactive_logits(
          g, m, attn_reactive_decode_with(g, m, &layout, tokens + offsets[first], &slots, updated));
      assert_ok(attn_graph_status(g));
      if (b < 0) {
        together[0] = test_to_doubles(&z->value);
        for (int l = 0; l < LAYERS; ++l) together[1 + l] = test_to_doubles(&updated[l]->value);
        continue;
      }
      part = test_to_doubles(&z->value);
      assert_true(test_relative_error(part, together[0] + offsets[b] * VOCABULARY,
                                      layout.rows * VOCABULARY) < 1e-12);
      free(part);
      for (int l = 0; l < LAYERS; ++l) {
        part = test_to_doubles(&updated[l]->value);
        assert_true(test_relative_error(part, together[1 + l] + b * SLOTS * HIDDEN,
                                        SLOTS * HIDDEN) < 1e-12);
        free(part);
      }
    }
    for (int i = 0; i < 3; ++i) free(together[i]);
    attn_reactive_destroy(m);
  }
}

/* Identities ------------------------------------------------------------------------------------
 */

/* Another past with the same memory gives the same answer, to the bit. */
static void only_the_memory_remembers(void **state) {
  (void)state;
  attn_reactive *m = reactive_make(2, 1, ATTN_F32);
  attn_reactive_session *a = open_session(m, 5), *b = open_session(m, 6);
  int32_t tokens[6];
  float memory[MEMORY], logits[3][VOCABULARY], other[MEMORY];
  for (int t = 0; t < 4; ++t) {
    reactive_tokens(tokens, 6, t);
    assert_ok(attn_reactive_session_feed(a, tokens, 6, logits[2]));
    assert_ok(attn_reactive_session_end_turn(a));
  }
  assert_ok(attn_reactive_session_get_memory(a, memory));
  reactive_tokens(tokens, 6, 9);
  assert_ok(attn_reactive_session_feed(b, tokens, 6, logits[1])); /* with another memory */
  attn_reactive_session_drop_turn(b);
  assert_ok(attn_reactive_session_set_memory(b, memory));
  assert_ok(attn_reactive_session_feed(a, tokens, 6, logits[0]));
  float with_other[VOCABULARY];
  memcpy(with_other, logits[1], sizeof with_other);
  assert_ok(attn_reactive_session_feed(b, tokens, 6, logits[1]));
  assert_memory_equal(logits[0], logits[1], sizeof logits[0]);
  assert_true(distance(with_other, logits[0], VOCABULARY) > 1e-3);
  assert_ok(attn_reactive_session_end_turn(a));
  assert_ok(attn_reactive_session_end_turn(b));
  assert_ok(attn_reactive_session_get_memory(a, memory));
  assert_ok(attn_reactive_session_get_memory(b, other));
  assert_memory_equal(memory, other, sizeof memory);
  attn_reactive_session_destroy(a);
  attn_reactive_session_destroy(b);
  attn_reactive_destroy(m);
}

static int moved_to(int slot) {
  return (slot * 2 + 1) % SLOTS; /* an order of five */
}

static void permute_gate(attn_parameter *p) {
  double *x = test_to_doubles(&p->value), y[SLOTS * SLOTS];
  for (int s = 0; s < SLOTS; ++s)
    if (p->value.rank == 1)
      y[moved_to(s)] = x[s];
    else
      for (int t = 0; t < SLOTS; ++t) y[moved_to(s) * SLOTS + moved_to(t)] = x[s * SLOTS + t];
  reactive_set(p, y);
  free(x);
}

static bool of_slots(const char *name) {
  return strstr(name, "gate.") && !strstr(name, "status") && strstr(name, "memory.");
}

/* Slots in another order, with what gates have for each: the same answers, and a memory in that
 * order. */
static void slots_are_a_set(void **state) {
  (void)state;
  for (int kind = 0; kind < REACTIVE_MEMORIES * REACTIVE_GATES; ++kind) {
    attn_reactive *m = reactive_make(kind / REACTIVE_GATES, kind % REACTIVE_GATES, ATTN_F64);
    float memory[2][MEMORY], logits[2][VOCABULARY], given[MEMORY];
    int32_t tokens[7];
    reactive_tokens(tokens, 7, kind);
    for (int moved = 0; moved < 2; ++moved) {
      attn_reactive_session *s = open_session(m, 5);
      make_memory(given, 5);
      for (int i = 0; i < MEMORY && moved; ++i) {
        int l = i / (SLOTS * HIDDEN), slot = i / HIDDEN % SLOTS, c = i % HIDDEN;
        memory[1][(l * SLOTS + moved_to(slot)) * HIDDEN + c] = given[i];
      }
      if (moved) assert_ok(attn_reactive_session_set_memory(s, memory[1]));
      for (int64_t i = 0; i < m->list.count && moved; ++i)
        if (of_slots(m->list.parameters[i].name)) permute_gate(&m->list.parameters[i]);
      assert_ok(attn_reactive_session_feed(s, tokens, 7, logits[moved]));
      assert_ok(attn_reactive_session_end_turn(s));
      assert_ok(attn_reactive_session_get_memory(s, memory[moved]));
      attn_reactive_session_destroy(s);
    }
    assert_true(distance(logits[1], logits[0], VOCABULARY) < 1e-6);
    for (int i = 0; i < MEMORY; ++i) {
      int l = i / (SLOTS * HIDDEN), slot = i / HIDDEN % SLOTS, c = i % HIDDEN;
      float there = memory[1][(l * SLOTS + moved_to(slot)) * HIDDEN + c];
      if (!(fabs((double)there - memory[0][i]) < 1e-5))
        fail_msg("kind %d: %g and %g", kind, (double)there, (double)memory[0][i]);
    }
    attn_reactive_destroy(m);
  }
}

/* What the write step lets in: its gate at both ends. With a closed gate the memory stays, to the
 * bit; with an open one nothing is left of the old but what was asked with it: two
 * reactive_memories of one slot's worth, whose queries differ, but with one key there is one
 * answer. */
static void gates_have_limits(void **state) {
  (void)state;
  attn_reactive *m = reactive_make(0, 1, ATTN_F64);
  const int32_t token = 4;
  float before[MEMORY], after[2][MEMORY];
  for (int open = 0; open < 2; ++open) {
    for (int l = 0; l < LAYERS; ++l) {
      char name[64];
      snprintf(name, sizeof name, "layers.%d.memory.write.gate.weight", l);
      reactive_set_all(reactive_find(m, name), open ? 60 : -800);
    }
    for (int which = 0; which < 2; ++which) {
      attn_reactive_session *s = open_session(m, 5 + (uint64_t)which);
      make_memory(before, 5 + (uint64_t)which);
      assert_ok(attn_reactive_session_feed(s, &token, 1, NULL));
      assert_ok(attn_reactive_session_end_turn(s));
      assert_ok(attn_reactive_session_get_memory(s, after[which]));
      if (!open) assert_memory_equal(before, after[which], sizeof before);
      attn_reactive_session_destroy(s);
    }
    if (open) assert_true(distance(after[0], after[1], MEMORY) < 1e-6);
  }
  attn_reactive_destroy(m);
}

static double slot_norm(const double *x) {
  double sum = 0;
  for (int c = 0; c < HIDDEN; ++c) sum += x[c] * x[c];
  return sqrt(sum);
}

/* The memory behind one turn that begins with that of `seed`. */
static void after_a_turn(attn_reactive *m, uint64_t seed, float *memory) {
  attn_reactive_session *s = open_session(m, seed);
  int32_t tokens[6];
  reactive_tokens(tokens, 6, (int)seed);
  assert_ok(attn_reactive_session_feed(s, tokens, 6, NULL));
  assert_ok(attn_reactive_session_end_turn(s));
  assert_ok(attn_reactive_session_get_memory(s, memory));
  attn_reactive_session_destroy(s);
}

/* A slot that a sigmoid gate gives is no longer than the longer of old and new, one of a tanh gate
 * no longer than twice that. The new one is what the model without gates adds. */
static void gates_keep_norms(void **state) {
  (void)state;
  attn_reactive *none = reactive_make(0, 0, ATTN_F64);
  for (int gate = 1; gate < REACTIVE_GATES; ++gate) {
    attn_reactive *m = reactive_make(0, gate, ATTN_F64);
    double most = strcmp(reactive_gates[gate][1], "tanh") == 0 ? 2 : 1, grown = 0;
    for (uint64_t seed = 0; seed < 10; ++seed) {
      float old[MEMORY], sum[MEMORY], got[MEMORY];
      make_memory(old, seed);
      after_a_turn(none, seed, sum);
      after_a_turn(m, seed, got);
      for (int s = 0; s < LAYERS * SLOTS; ++s) {
        double x[3][HIDDEN];
        for (int c = 0, i = s * HIDDEN; c < HIDDEN; ++c, ++i)
          x[0][c] = old[i], x[1][c] = (double)sum[i] - old[i], x[2][c] = got[i];
        double longest = fmax(slot_norm(x[0]), slot_norm(x[1]));
        grown = fmax(grown, slot_norm(x[2]) / longest);
      }
    }
    if (!(grown <= most * (1 + 1e-5) &&
          grown > most / 2)) /* reactive_memories are read as float32 */
      fail_msg("%s %s: %g times", reactive_gates[gate][0], reactive_gates[gate][1], grown);
    attn_reactive_destroy(m);
  }
  attn_reactive_destroy(none);
}

/* (1 - tanh w) old + (1 + tanh w) new is twice the sigmoid gate of 2 w. */
static void tanh_gates_are_twice_sigmoid_gates(void **state) {
  (void)state;
  attn_reactive *m[2] = {reactive_make(0, 1, ATTN_F64), reactive_make(0, 2, ATTN_F64)};
  float memory[2][MEMORY];
  for (int which = 0; which < 2; ++which) {
    for (int l = 0; l < LAYERS; ++l) {
      char name[64];
      snprintf(name, sizeof name, "layers.%d.memory.write.gate.weight", l);
      reactive_set_all(reactive_find(m[which], name), which ? 0.35 : 0.7);
    }
    after_a_turn(m[which], 8, memory[which]);
  }
  for (int i = 0; i < MEMORY; ++i) memory[0][i] *= 2;
  assert_true(distance(memory[1], memory[0], MEMORY) < 1e-6);
  attn_reactive_destroy(m[0]);
  attn_reactive_destroy(m[1]);
}

/* The tenth turn takes no more memory than the second, whatever was said before. */
static void later_turns_take_no_more_memory(void **state) {
  (void)state;
  attn_reactive *m = reactive_make(2, 1, ATTN_F32);
  attn_reactive_session *s = open_session(m, 5);
  int32_t tokens[6];
  size_t bytes = 0;
  for (int t = 0; t < 10; ++t) {
    reactive_tokens(tokens, 6, t);
    assert_ok(attn_reactive_session_feed(s, tokens, 6, NULL));
    assert_ok(attn_reactive_session_end_turn(s));
    if (t == 1) bytes = attn_memory_get_stats().live_bytes;
  }
  assert_int_equal(attn_memory_get_stats().live_bytes, bytes);
  attn_reactive_session_destroy(s);
  attn_reactive_destroy(m);
}

/* Turns of sessions, in which no new token is far from an old one, keep a memory within bounds. */
static void sigmoid_gates_bound_the_memory(void **state) {
  (void)state;
  attn_reactive *m = reactive_make(2, 1, ATTN_F32);
  attn_reactive_session *s = open_session(m, 5);
  float memory[MEMORY];
  double norms[2] = {0};
  int32_t tokens[6];
  for (int t = 0; t < 200; ++t) {
    reactive_tokens(tokens, 6, t);
    assert_ok(attn_reactive_session_feed(s, tokens, 6, NULL));
    assert_ok(attn_reactive_session_end_turn(s));
    if (t != 20 && t != 199) continue;
    assert_ok(attn_reactive_session_get_memory(s, memory));
    for (int i = 0; i < MEMORY; ++i) norms[t == 199] += (double)memory[i] * memory[i];
  }
  assert_true(norms[1] < 4 * norms[0]);
  attn_reactive_session_destroy(s);
  attn_reactive_destroy(m);
}

/* Without values from the memory the decoder is a plain language model: no memory changes it. */
static void without_values_it_is_a_plain_model(void **state) {
  (void)state;
  attn_reactive *m = reactive_make(2, 1, ATTN_F64);
  int32_t tokens[6];
  float logits[2][VOCABULARY];
  for (int l = 0; l < LAYERS; ++l) {
    char name[64];
    snprintf(name, sizeof name, "layers.%d.decoder.cross.v_proj.weight", l);
    reactive_set_all(reactive_find(m, name), 0);
  }
  reactive_tokens(tokens, 6, 2);
  for (int i = 0; i < 2; ++i) {
    attn_reactive_session *s = open_session(m, 5 + (uint64_t)i);
    assert_ok(attn_reactive_session_feed(s, tokens, 6, logits[i]));
    attn_reactive_session_destroy(s);
  }
  assert_memory_equal(logits[0], logits[1], sizeof logits[0]);
  /* And by the oracle that of no attention to a memory at all: values of a memory that is 0. */
  reactive_values v;
  oracle_reactive o = reactive_oracle(m, 2, 1, &v);
  double expected[6 * VOCABULARY], nothing[LAYERS * HIDDEN] = {0};
  oracle_reactive_logits(&o, 6, tokens, 1, nothing, expected);
  assert_true(error_of(logits[0], expected + 5 * VOCABULARY, VOCABULARY) < 1e-6);
  reactive_free_values(&v);
  attn_reactive_destroy(m);
}

/* The keys that a session keeps for a turn give what fresh ones do. */
static void kept_keys_equal_fresh_ones(void **state) {
  (void)state;
  attn_reactive *m = reactive_make(2, 1, ATTN_F64);
  attn_graph *g = m->graph;
  float numbers[MEMORY], logits[VOCABULARY];
  int32_t tokens[6];
  reactive_tokens(tokens, 6, 2);
  make_memory(numbers, 5);
  attn_reactive_session *s = open_session(m, 5);
  for (int i = 0; i < 6; ++i)
    assert_ok(attn_reactive_session_feed(s, tokens + i, 1, i == 5 ? logits : NULL));
  attn_layout layout = attn_layout_equal(1, 6), slots = attn_layout_equal(1, SLOTS);
  attn_graph_reset(g, false);
  attn_var *stm[LAYERS];
  for (int l = 0; l < LAYERS; ++l)
    stm[l] = attn_graph_host_rows(g, numbers + l * SLOTS * HIDDEN, ATTN_F32, SLOTS, HIDDEN);
  attn_var *z =
      attn_reactive_logits(g, m, attn_reactive_decode_with(g, m, &layout, tokens, &slots, stm));
  assert_ok(attn_graph_status(g));
  double *expected = test_to_doubles(&z->value);
  assert_true(error_of(logits, expected + 5 * VOCABULARY, VOCABULARY) < 1e-6);
  free(expected);
  attn_reactive_session_destroy(s);
  attn_reactive_destroy(m);
}

/* Sessions --------------------------------------------------------------------------------------
 */

static void take_turns(attn_reactive_session *s, int first, int count) {
  int32_t tokens[5];
  for (int t = first; t < first + count; ++t) {
    reactive_tokens(tokens, 5, t);
    assert_ok(attn_reactive_session_feed(s, tokens, 5, NULL));
    assert_ok(attn_reactive_session_end_turn(s));
  }
}

static void forks_and_files_keep_the_memory(void **state) {
  (void)state;
  char directory[] = "/tmp/attn-reactive-XXXXXX", path[64], model[64], file[96];
  assert_non_null(mkdtemp(directory));
  snprintf(path, sizeof path, "%s/memory", directory);
  snprintf(model, sizeof model, "%s/model", directory);
  for (int d = 0; d < 2; ++d) {
    attn_reactive *m = reactive_make(2, 1, d ? ATTN_F32 : ATTN_F64), *loaded;
    attn_reactive_session *s = open_session(m, 5), *fork, *back;
    float expected[MEMORY], got[MEMORY];
    take_turns(s, 0, 2);
    assert_ok(attn_reactive_session_fork(s, &fork));
    assert_ok(attn_reactive_session_save(s, path));
    take_turns(s, 2, 2);
    assert_ok(attn_reactive_session_get_memory(s, expected));
    take_turns(fork, 2, 2);
    assert_ok(attn_reactive_session_get_memory(fork, got));
    assert_memory_equal(expected, got, sizeof got);
    assert_int_equal(attn_reactive_session_turns(fork), 4);

    assert_ok(attn_reactive_save(m, model));
    assert_ok(attn_reactive_load(model, d ? ATTN_F32 : ATTN_F64, &loaded));
    assert_ok(attn_reactive_move(loaded, test_device()));
    assert_ok(attn_reactive_session_create(loaded, NULL, &back));
    assert_ok(attn_reactive_session_restore(back, path));
    assert_int_equal(attn_reactive_session_turns(back), 2);
    take_turns(back, 2, 2);
    assert_ok(attn_reactive_session_get_memory(back, got));
    assert_memory_equal(expected, got, sizeof got);

    /* Another model's memory, and no memory at all. */
    reactive_set_all(reactive_find(loaded, "embedding.weight"), 0.5);
    assert_int_equal(attn_reactive_session_restore(back, path), ATTN_BAD_FORMAT);
    assert_non_null(strstr(attn_error_message(), "another model"));
    snprintf(file, sizeof file, "%s/model.safetensors", model);
    assert_int_equal(attn_reactive_session_restore(back, file), ATTN_BAD_FORMAT);
    assert_int_not_equal(attn_reactive_session_restore(back, "/nowhere"), ATTN_OK);
    float still[MEMORY];
    assert_ok(attn_reactive_session_get_memory(back, still));
    assert_memory_equal(still, got, sizeof got);
    attn_reactive_session_destroy(s);
    attn_reactive_session_destroy(fork);
    attn_reactive_session_destroy(back);
    attn_reactive_destroy(loaded);
    attn_reactive_destroy(m);
  }
  unlink(path);
  unlink(file);
  snprintf(file, sizeof file, "%s/config.json", model);
  unlink(file);
  rmdir(model);
  rmdir(directory);
}

static bool three_tokens(void *context, int32_t token) {
  (void)token;
  return ++*(int *)context < 3;
}

/* A turn by the template is the same turn token by token. */
static void asks_by_the_template(void **state) {
  (void)state;
  attn_reactive *m = reactive_make(2, 1, ATTN_F32);
  attn_reactive_session *s = open_session(m, 5), *by_hand = open_session(m, 5);
  const int32_t text[] = {7, 9, 4};
  int32_t answer[12];
  int64_t count;
  reactive_set_all(reactive_find(m, "decoder.head.bias"), 0);
  assert_ok(attn_reactive_session_ask(s, text, 3, NULL, NULL, NULL, answer, 12, &count));
  float logits[VOCABULARY], a[MEMORY], b[MEMORY];
  const int32_t turn[] = {0, 1, 7, 9, 4, 2}, end = 3;
  assert_ok(attn_reactive_session_feed(by_hand, turn, 6, logits));
  for (int64_t i = 0; i <= count; ++i) {
    int32_t best = 0;
    for (int32_t k = 1; k < VOCABULARY; ++k)
      if (logits[k] > logits[best]) best = k;
    if (i == count && count < 12) assert_int_equal(best, 3);
    if (i == count) break;
    assert_int_equal(best, answer[i]);
    assert_ok(attn_reactive_session_feed(by_hand, &best, 1, logits));
  }
  assert_ok(attn_reactive_session_feed(by_hand, &end, 1, NULL));
  assert_ok(attn_reactive_session_end_turn(by_hand));
  assert_ok(attn_reactive_session_get_memory(s, a));
  assert_ok(attn_reactive_session_get_memory(by_hand, b));
  assert_true(distance(a, b, MEMORY) < 1e-5);
  attn_sampling sampling = ATTN_SAMPLING_INIT;
  int told = 0;
  assert_ok(
      attn_reactive_session_ask(s, text, 3, &sampling, three_tokens, &told, answer, 12, &count));
  assert_true(count <= 3 && told == count);
  assert_int_equal(attn_reactive_session_turns(s), 2);
  attn_reactive_session_destroy(s);
  attn_reactive_session_destroy(by_hand);
  attn_reactive_destroy(m);
}

/* Refusals --------------------------------------------------------------------------------------
 */

#define BASE "\"vocab_size\": 9, \"hidden_size\": 4, \"num_memory_slots\": 2"

static void bad_input_is_refused(void **state) {
  (void)state;
  static const struct {
    const char *config, *says;
  } bad[] = {
      {"{\"model_type\": \"llama\", " BASE "}", "llama"},
      {"{\"model_type\": \"reactive\", \"vocab_size\": 9, \"hidden_size\": 4}", "num_memory_slots"},
      {"{\"model_type\": \"reactive\", " BASE ", \"slots\": 3}", "slots"},
      {"{\"model_type\": \"reactive\", " BASE ", \"memory_attention\": \"both\"}",
       "memory_attention"},
      {"{\"model_type\": \"reactive\", " BASE ", \"memory_gate\": \"dynamic\"}", "memory_gate"},
      {"{\"model_type\": \"reactive\", " BASE ", \"num_attention_heads\": 3, "
       "\"num_key_value_heads\": 2}",
       "num_kv_heads"},
      {"{\"model_type\": \"reactive\", " BASE ", \"eos_token_id\": 9}", "eos_token_id"},
      {"[]", "configuration"}};
  attn_reactive *m;
  for (size_t i = 0; i < sizeof bad / sizeof *bad; ++i) {
    assert_int_not_equal(attn_reactive_create(bad[i].config, 1, ATTN_F32, &m), ATTN_OK);
    if (!strstr(attn_error_message(), bad[i].says))
      fail_msg("\"%s\" does not name %s", attn_error_message(), bad[i].says);
  }
  assert_int_equal(
      attn_reactive_create("{\"model_type\": \"reactive\", " BASE "}", 1, ATTN_F16, &m),
      ATTN_UNSUPPORTED);
  assert_int_equal(attn_reactive_load("/nowhere", ATTN_F32, &m), ATTN_NOT_FOUND);
  assert_int_equal(attn_reactive_create(NULL, 1, ATTN_F32, &m), ATTN_INVALID_ARGUMENT);
}

static void bad_turns_are_refused(void **state) {
  (void)state;
  attn_reactive *m = reactive_make(2, 1, ATTN_F32);
  attn_reactive_session_options options = ATTN_REACTIVE_SESSION_INIT;
  attn_reactive_session *s, *fork;
  float memory[MEMORY], logits[2][VOCABULARY];
  int32_t tokens[4], bad = VOCABULARY, answer[4];
  int64_t count;
  options.max_turn_tokens = 0;
  assert_int_equal(attn_reactive_session_create(m, &options, &s), ATTN_INVALID_ARGUMENT);
  options.max_turn_tokens = 4;
  options.deviation = NAN;
  assert_int_equal(attn_reactive_session_create(m, &options, &s), ATTN_INVALID_ARGUMENT);
  options.deviation = 0.02;
  options.seed = 3;
  options.struct_size = 1;
  assert_int_equal(attn_reactive_session_create(m, &options, &s), ATTN_INVALID_ARGUMENT);
  options.struct_size = sizeof options;
  assert_ok(attn_reactive_session_create(m, &options, &s));
  reactive_tokens(tokens, 4, 0);
  assert_int_equal(attn_reactive_session_end_turn(s), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_reactive_session_feed(s, tokens, 0, NULL), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_reactive_session_feed(s, &bad, 1, NULL), ATTN_INVALID_ARGUMENT);
  assert_ok(attn_reactive_session_feed(s, tokens, 2, NULL));
  assert_int_equal(attn_reactive_session_feed(s, tokens, 3, NULL), ATTN_INVALID_ARGUMENT);
  assert_non_null(strstr(attn_error_message(), "max_turn_tokens"));
  assert_int_equal(attn_reactive_session_turn_tokens(s), 2);
  assert_int_equal(attn_reactive_session_get_memory(s, memory), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_reactive_session_fork(s, &fork), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_reactive_session_save(s, "/tmp/never"), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_reactive_session_ask(s, tokens, 1, NULL, NULL, NULL, answer, 4, &count),
                   ATTN_INVALID_ARGUMENT);
  assert_ok(attn_reactive_session_feed(s, tokens + 2, 2, logits[0]));
  attn_reactive_session_drop_turn(s);
  /* Four tokens are already the template's. After the error there is no turn. */
  assert_int_equal(attn_reactive_session_ask(s, tokens, 2, NULL, NULL, NULL, answer, 4, &count),
                   ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_reactive_session_turn_tokens(s), 0);
  assert_int_equal(attn_reactive_session_turns(s), 0);
  assert_ok(attn_reactive_session_feed(s, tokens, 4, logits[1]));
  assert_true(distance(logits[1], logits[0], VOCABULARY) < 1e-6);
  attn_reactive_session_drop_turn(s);
  make_memory(memory, 4);
  memory[7] = INFINITY;
  assert_int_equal(attn_reactive_session_set_memory(s, memory), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_reactive_session_set_memory(s, NULL), ATTN_INVALID_ARGUMENT);
  attn_reactive_session_destroy(s);
  attn_reactive_destroy(m);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(equals_oracle),
      cmocka_unit_test(dtypes_agree),
      cmocka_unit_test(packed_equals_separate),
      cmocka_unit_test(only_the_memory_remembers),
      cmocka_unit_test(slots_are_a_set),
      cmocka_unit_test(gates_have_limits),
      cmocka_unit_test(gates_keep_norms),
      cmocka_unit_test(tanh_gates_are_twice_sigmoid_gates),
      cmocka_unit_test(later_turns_take_no_more_memory),
      cmocka_unit_test(sigmoid_gates_bound_the_memory),
      cmocka_unit_test(without_values_it_is_a_plain_model),
      cmocka_unit_test(kept_keys_equal_fresh_ones),
      cmocka_unit_test(forks_and_files_keep_the_memory),
      cmocka_unit_test(asks_by_the_template),
      cmocka_unit_test(bad_input_is_refused),
      cmocka_unit_test(bad_turns_are_refused),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
