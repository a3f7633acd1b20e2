/* Sessions, for models of every mixer, hybrids and windows: feeding in any pieces, forking,
 * rewinding to any position, saving and restoring all give what a fresh session gives. */
#include "support/test.h"

#include "attn/model.h"
#include "base/fault.h"
#include "base/hash.h"
#include "base/memory.h"
#include "models/session.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { VOCABULARY = 64, TOKENS = 700 };

/* Rounding of the compute dtype, through a few layers: relative error of the logits. float64 logits
 * are handed out as float32. */
static const double tolerance_f64 = 1e-6, tolerance_f32 = 2e-5, tolerance_bf16 = 4e-2;

static const char *const mixer_lists[] = {
    "\"softmax\"",
    "\"lightning\"",
    "\"gla\"",
    "\"delta_net\"",
    "\"gated_delta_net\"",
    "\"kda\"",
    "\"lightning\", \"softmax\"",
    "\"kda\", \"kda\", \"kda\", \"softmax\"",
    "\"mla\"",
    "\"minimax\", \"mla\"",
    "\"hedgehog\", \"softmax\"",
    "\"lawcat\"",
    "\"lmu\"",
    "\"spiking_lmu\", \"lmu\"",
    "\"lolcats\", \"softmax\"",
    "\"diag_attention\", \"diag_attention\", \"norm_attention\", \"norm_attention\"",
    "\"aaren\", \"softmax\"",
    "\"based\", \"softmax\"",
};

typedef struct fixture {
  attn_model *model;
  int32_t tokens[TOKENS];
  double tolerance;
} fixture;

static fixture make_fixture(const char *mixers, const char *more, attn_dtype compute) {
  fixture f;
  char config[512];
  snprintf(config, sizeof config,
           "{\"vocab_size\": %d, \"hidden_size\": 32, \"num_hidden_layers\": 4, "
           "\"num_attention_heads\": 2, \"mixers\": [%s]%s}",
           VOCABULARY, mixers, more);
  assert_ok(attn_model_create(config, 11, compute, &f.model));
  for (int i = 0; i < TOKENS; ++i) f.tokens[i] = (i * 31 + i * i / 7) % VOCABULARY;
  f.tolerance = compute == ATTN_F64   ? tolerance_f64
                : compute == ATTN_F32 ? tolerance_f32
                                      : tolerance_bf16;
  return f;
}

static attn_session *make_session(const fixture *f, int64_t spacing, int64_t checkpoints) {
  attn_session_options options = ATTN_SESSION_OPTIONS_INIT;
  options.max_tokens = 1024;
  options.checkpoint_spacing = spacing;
  options.checkpoints = checkpoints;
  attn_session *session;
  assert_ok(attn_session_create(f->model, &options, &session));
  return session;
}

/* The logits of a session that reads the first `count` tokens at once. */
static void fresh_logits(const fixture *f, int64_t count, double *logits) {
  attn_session *session = make_session(f, 256, 0);
  assert_ok(attn_session_feed(session, f->tokens, count));
  for (int i = 0; i < VOCABULARY; ++i) logits[i] = (double)attn_session_logits(session)[i];
  attn_session_destroy(session);
}

static void assert_logits(const fixture *f, const attn_session *session, int64_t count) {
  double expected[VOCABULARY], got[VOCABULARY];
  assert_int_equal(attn_session_position(session), count);
  assert_memory_equal(attn_session_tokens(session), f->tokens, (size_t)count * sizeof(int32_t));
  assert_non_null(attn_session_logits(session));
  fresh_logits(f, count, expected);
  for (int i = 0; i < VOCABULARY; ++i) got[i] = (double)attn_session_logits(session)[i];
  double error = test_relative_error(got, expected, VOCABULARY);
  if (!(error <= f->tolerance)) fail_msg("%lld tokens: error %g", (long long)count, error);
}

static void any_pieces_give_the_same(const fixture *f) {
  static const int64_t pieces[] = {1, 63, 1, 130, 1, 1, 64, 200, 39};
  attn_session *session = make_session(f, 64, 4);
  int64_t position = 0;
  for (size_t i = 0; i < sizeof pieces / sizeof *pieces; ++i) {
    assert_ok(attn_session_feed(session, f->tokens + position, pieces[i]));
    position += pieces[i];
  }
  assert_logits(f, session, position);
  attn_session_destroy(session);
}

static void rewinding_gives_the_same(const fixture *f) {
  static const int64_t targets[] = {699, 641, 640, 512, 500, 130, 65, 64, 63, 1};
  attn_session *session = make_session(f, 64, 4);
  assert_ok(attn_session_feed(session, f->tokens, TOKENS));
  for (size_t i = 0; i < sizeof targets / sizeof *targets; ++i) {
    assert_ok(attn_session_rewind(session, targets[i]));
    assert_logits(f, session, targets[i]);
  }
  assert_ok(attn_session_rewind(session, 0));
  assert_int_equal(attn_session_position(session), 0);
  assert_null(attn_session_logits(session));
  assert_ok(attn_session_feed(session, f->tokens, 100)); /* and goes on from there */
  assert_logits(f, session, 100);
  assert_int_equal(attn_session_rewind(session, 101), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_session_rewind(session, -1), ATTN_INVALID_ARGUMENT);
  attn_session_destroy(session);
}

static void forks_do_not_disturb_each_other(const fixture *f) {
  attn_session *session = make_session(f, 64, 4), *fork, *second;
  assert_ok(attn_session_feed(session, f->tokens, 150));
  assert_ok(attn_session_fork(session, &fork));
  int32_t others[200];
  for (int i = 0; i < 200; ++i) others[i] = (i * 5 + 3) % VOCABULARY;
  assert_ok(attn_session_feed(fork, others, 200)); /* into the page that both share */
  assert_ok(attn_session_feed(session, f->tokens + 150, 150));
  assert_logits(f, session, 300);
  assert_ok(attn_session_rewind(fork, 150));
  assert_logits(f, fork, 150);
  assert_ok(attn_session_fork(fork, &second));
  attn_session_destroy(session); /* the family outlives its first member */
  assert_ok(attn_session_feed(second, f->tokens + 150, 400));
  assert_logits(f, second, 550);
  assert_ok(attn_session_rewind(fork, 90));
  assert_logits(f, fork, 90);
  attn_session_destroy(fork);
  attn_session_destroy(second);
}

static void sessions_survive_files(const fixture *f) {
  char path[] = "/tmp/attn-session-XXXXXX";
  int descriptor = mkstemp(path);
  assert_true(descriptor >= 0);
  close(descriptor);
  attn_session *session = make_session(f, 64, 4), *other = make_session(f, 64, 4);
  assert_ok(attn_session_feed(session, f->tokens, 333));
  assert_ok(attn_session_save(session, path));
  assert_ok(attn_session_feed(other, f->tokens + 5, 77)); /* to be replaced */
  assert_ok(attn_session_restore(other, path));
  assert_int_equal(attn_session_position(other), 333);
  assert_memory_equal(attn_session_logits(other), attn_session_logits(session),
                      VOCABULARY * sizeof(float));
  for (int64_t t = 333; t < 400; t += 1) { /* exact: the same bits from here on */
    assert_ok(attn_session_feed(session, f->tokens + t, 1));
    assert_ok(attn_session_feed(other, f->tokens + t, 1));
  }
  assert_memory_equal(attn_session_logits(other), attn_session_logits(session),
                      VOCABULARY * sizeof(float));
  assert_ok(attn_session_rewind(other, 200));
  assert_logits(f, other, 200);
  attn_session_destroy(session);
  attn_session_destroy(other);
  unlink(path);
}

static void every_mixer(void **state) {
  (void)state;
  static const attn_dtype dtypes[] = {ATTN_F32, ATTN_BF16};
  for (size_t m = 0; m < sizeof mixer_lists / sizeof *mixer_lists; ++m)
    for (size_t d = 0; d < sizeof dtypes / sizeof *dtypes; ++d) {
      print_message("  %s in %s\n", mixer_lists[m], attn_dtype_name(dtypes[d]));
      fixture f = make_fixture(mixer_lists[m], "", dtypes[d]);
      any_pieces_give_the_same(&f);
      rewinding_gives_the_same(&f);
      forks_do_not_disturb_each_other(&f);
      sessions_survive_files(&f);
      attn_model_destroy(f.model);
    }
}

/* After a long conversation its last turn is written anew, however long the answer to it was: no
 * more than a spacing is read again where checkpoints were asked for. */
static void an_edited_turn(void **state) {
  (void)state;
  for (size_t m = 0; m < sizeof mixer_lists / sizeof *mixer_lists; ++m) {
    fixture f = make_fixture(mixer_lists[m], "", ATTN_F32);
    attn_session_options options = ATTN_SESSION_OPTIONS_INIT;
    attn_session *session, *fresh;
    options.max_tokens = 4096;
    options.checkpoint_spacing = 64;
    options.checkpoints = 8;
    assert_ok(attn_session_create(f.model, &options, &session));
    assert_ok(attn_session_create(f.model, &options, &fresh));
    for (int i = 0; i < 5; ++i) { /* two turns, and an answer of three times their length */
      if (i < 2) attn_session_checkpoint(session);
      assert_ok(attn_session_feed(session, f.tokens, TOKENS - 7));
    }
    int64_t turn = TOKENS - 7, before = session->tokens_read;
    assert_ok(attn_session_rewind(session, turn));
    assert_ok(attn_session_feed(session, f.tokens + 11, 30));
    assert_true(session->tokens_read - before - 30 <= 64);
    assert_ok(attn_session_feed(fresh, attn_session_tokens(session), turn + 30));
    double got[VOCABULARY], expected[VOCABULARY];
    for (int i = 0; i < VOCABULARY; ++i) {
      got[i] = (double)attn_session_logits(session)[i];
      expected[i] = (double)attn_session_logits(fresh)[i];
    }
    assert_true(test_relative_error(got, expected, VOCABULARY) <= f.tolerance);
    attn_session_destroy(session);
    attn_session_destroy(fresh);
    attn_model_destroy(f.model);
  }
}

/* A window frees the pages behind it, so that memory stays flat, and rewinding needs checkpoints.
 */
static void windows(void **state) {
  (void)state;
  fixture f = make_fixture("\"softmax\"", ", \"sliding_window\": 50", ATTN_F32);
  any_pieces_give_the_same(&f);
  rewinding_gives_the_same(&f);
  forks_do_not_disturb_each_other(&f);
  sessions_survive_files(&f);
  attn_session *session = make_session(&f, 64, 0);
  assert_ok(attn_session_feed(session, f.tokens, 200));
  int64_t bytes = attn_session_state_bytes(session);
  assert_ok(attn_session_feed(session, f.tokens + 200, 500));
  assert_true(attn_session_state_bytes(session) <= bytes);
  attn_session_destroy(session);
  attn_model_destroy(f.model);
}

static void decode_allocates_nothing(void **state) {
  (void)state;
  for (size_t m = 0; m < sizeof mixer_lists / sizeof *mixer_lists; ++m) {
    fixture f = make_fixture(mixer_lists[m], "", ATTN_BF16);
    attn_session *session = make_session(&f, 64, 4);
    attn_sampling sampling = ATTN_SAMPLING_INIT;
    sampling.temperature = 1;
    for (int i = 0; i < 10; ++i) assert_ok(attn_session_feed(session, f.tokens + i, 1));
    uint64_t before = attn_memory_get_stats().allocations;
    for (int i = 0; i < 500; ++i) { /* over pages and checkpoints, more than the list holds */
      int32_t token;
      assert_ok(attn_session_sample(session, &sampling, &token));
      assert_ok(attn_session_feed(session, &token, 1));
    }
    if (attn_memory_get_stats().allocations != before)
      fail_msg("%s: %d allocations in 500 steps", mixer_lists[m],
               (int)(attn_memory_get_stats().allocations - before));
    attn_session_destroy(session);
    attn_model_destroy(f.model);
  }
}

static void bad_calls_are_refused(void **state) {
  (void)state;
  fixture f = make_fixture("\"lightning\"", "", ATTN_F32);
  attn_session *session = make_session(&f, 64, 4);
  int32_t token, bad = VOCABULARY, negative = -1;
  attn_sampling sampling = ATTN_SAMPLING_INIT;
  assert_int_equal(attn_session_sample(session, &sampling, &token), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_session_feed(session, &bad, 1), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_session_feed(session, &negative, 1), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_session_feed(session, f.tokens, 0), ATTN_INVALID_ARGUMENT);
  assert_ok(attn_session_feed(session, f.tokens, 700));
  assert_int_equal(attn_session_feed(session, f.tokens, 400), ATTN_OUT_OF_MEMORY);
  assert_logits(&f, session, 700); /* as before */

  attn_session *none;
  attn_session_options options = ATTN_SESSION_OPTIONS_INIT;
  options.checkpoint_spacing = 100;
  assert_int_equal(attn_session_create(f.model, &options, &none), ATTN_INVALID_ARGUMENT);
  options = (attn_session_options)ATTN_SESSION_OPTIONS_INIT;
  options.max_tokens = -5;
  assert_int_equal(attn_session_create(f.model, &options, &none), ATTN_INVALID_ARGUMENT);
  attn_session_destroy(session);
  attn_model_destroy(f.model);
}

static void write_bytes(const char *path, const unsigned char *data, size_t size) {
  FILE *file = fopen(path, "wb");
  assert_non_null(file);
  assert_int_equal(fwrite(data, 1, size, file), size);
  fclose(file);
}

static void foreign_files_are_refused(void **state) {
  (void)state;
  char path[] = "/tmp/attn-session-XXXXXX";
  int descriptor = mkstemp(path);
  assert_true(descriptor >= 0);
  close(descriptor);
  fixture f = make_fixture("\"kda\", \"softmax\"", "", ATTN_F32);
  fixture g = make_fixture("\"kda\", \"lightning\"", "", ATTN_F32);
  attn_session *session = make_session(&f, 64, 4), *foreign = make_session(&g, 64, 4);
  assert_ok(attn_session_feed(session, f.tokens, 100));
  assert_ok(attn_session_save(session, path));
  assert_int_equal(attn_session_restore(foreign, path), ATTN_BAD_FORMAT);

  static unsigned char data[1 << 20];
  FILE *file = fopen(path, "rb");
  size_t size = fread(data, 1, sizeof data, file);
  fclose(file);
  for (size_t cut = 0; cut < size; cut += size / 50 + 1) {
    write_bytes(path, data, cut);
    assert_int_equal(attn_session_restore(session, path), ATTN_BAD_FORMAT);
  }
  for (size_t at = 0; at < size; at += size / 50 + 1) {
    data[at] ^= 0x20;
    write_bytes(path, data, size);
    assert_int_equal(attn_session_restore(session, path), ATTN_BAD_FORMAT);
    data[at] ^= 0x20;
  }
  assert_logits(&f, session, 100); /* a refused file changes nothing */
  assert_int_equal(attn_session_restore(session, "/nonexistent/session"), ATTN_NOT_FOUND);
  attn_session_destroy(session);
  attn_session_destroy(foreign);
  attn_model_destroy(f.model);
  attn_model_destroy(g.model);
  unlink(path);
}

/* Every allocation fails once: creation gives a clean error, and feeding leaves the session as it
 * was (or, if even the way back fails, without tokens), ready to be used again. */
static void allocation_failures(void **state) {
  (void)state;
  fixture f = make_fixture("\"gated_delta_net\", \"softmax\"", "", ATTN_F32);
  size_t live = attn_memory_get_stats().live_bytes;
  for (int64_t n = 0;; ++n) {
    attn_session *session = NULL;
    attn_fault_arm(ATTN_FAULT_ALLOC, n);
    attn_status status = attn_session_create(f.model, NULL, &session);
    bool failed = attn_fault_disarm(ATTN_FAULT_ALLOC);
    if (!failed) {
      assert_ok(status);
      attn_session_destroy(session);
      break;
    }
    assert_int_equal(status, ATTN_OUT_OF_MEMORY);
  }
  assert_int_equal(attn_memory_get_stats().live_bytes, live);
  for (int64_t n = 0;; ++n) {
    attn_session *session = make_session(&f, 64, 4);
    assert_ok(attn_session_feed(session, f.tokens, 20));
    attn_fault_arm(ATTN_FAULT_ALLOC, n);
    attn_status status = attn_session_feed(session, f.tokens + 20, 300);
    bool failed = attn_fault_disarm(ATTN_FAULT_ALLOC);
    if (failed) {
      assert_int_equal(status, ATTN_OUT_OF_MEMORY);
      int64_t position = attn_session_position(session);
      assert_true(position == 20 || position == 0);
      assert_ok(attn_session_feed(session, f.tokens + position, 320 - position));
    } else {
      assert_ok(status);
    }
    assert_logits(&f, session, 320);
    attn_session_destroy(session);
    if (!failed) break;
  }
  attn_model_destroy(f.model);
}

/* As before, logits included: also at a checkpoint, where nothing has to be replayed. */
static void failures_leave_the_logits(void **state) {
  (void)state;
  fixture f = make_fixture("\"gated_delta_net\", \"softmax\"", "", ATTN_F32);
  bool failed = true;
  for (int64_t n = 0; failed; ++n) {
    attn_session *session = make_session(&f, 64, 4);
    for (int i = 0; i < 64; ++i) assert_ok(attn_session_feed(session, f.tokens + i, 1));
    attn_fault_arm(ATTN_FAULT_ALLOC, n); /* 64 rows need more memory than one */
    attn_status status = attn_session_feed(session, f.tokens + 64, 64);
    failed = attn_fault_disarm(ATTN_FAULT_ALLOC);
    assert_true(failed || n > 0);
    assert_int_equal(status, failed ? ATTN_OUT_OF_MEMORY : ATTN_OK);
    assert_logits(&f, session, failed ? 64 : 128);
    attn_session_destroy(session);
  }
  attn_model_destroy(f.model);
}

/* What was read behind the place that a session goes back to has no say afterwards. */
static void retreats_forget(void **state) {
  (void)state;
  fixture f = make_fixture("\"gated_delta_net\", \"softmax\"", "", ATTN_F32);
  attn_session *session = make_session(&f, 64, 4);
  assert_ok(attn_session_feed(session, f.tokens, 20));
  assert_ok(attn_session_feed(session, f.tokens + 100, 200)); /* of another text */
  assert_ok(attn_session_mark(session));
  assert_ok(attn_session_retreat(session, 20));
  assert_null(attn_session_logits(session));
  assert_ok(attn_session_feed(session, f.tokens + 20, 230));
  assert_logits(&f, session, 250);
  static const int64_t targets[] = {230, 193, 192, 130, 65, 64, 20, 3};
  for (size_t i = 0; i < sizeof targets / sizeof *targets; ++i) {
    assert_ok(attn_session_rewind(session, targets[i]));
    assert_logits(&f, session, targets[i]);
  }
  attn_session_destroy(session);
  attn_model_destroy(f.model);
}

/* Checksums are no signatures. */
static void strange_tokens_are_refused(void **state) {
  (void)state;
  enum { HEADER = 56 };
  static unsigned char bytes[1 << 20];
  char path[] = "/tmp/attn-session-XXXXXX";
  int descriptor = mkstemp(path);
  assert_true(descriptor >= 0);
  close(descriptor);
  fixture f = make_fixture("\"gla\"", "", ATTN_F32);
  attn_session *session = make_session(&f, 64, 4);
  assert_ok(attn_session_feed(session, f.tokens, 20));
  assert_ok(attn_session_save(session, path));
  FILE *file = fopen(path, "r+b");
  assert_non_null(file);
  size_t size = fread(bytes, 1, sizeof bytes, file);
  assert_in_range(size, HEADER + 20 * 4, sizeof bytes - 1);
  assert_memory_equal(bytes + HEADER, f.tokens, 20 * sizeof *f.tokens);
  const int32_t strange = VOCABULARY;
  memcpy(bytes + HEADER + 7 * sizeof strange, &strange, sizeof strange);
  uint64_t sum = attn_hash(ATTN_HASH_START, bytes, size - sizeof sum);
  memcpy(bytes + size - sizeof sum, &sum, sizeof sum);
  rewind(file);
  assert_int_equal(fwrite(bytes, 1, size, file), size);
  fclose(file);
  assert_int_equal(attn_session_restore(session, path), ATTN_BAD_FORMAT);
  assert_non_null(strstr(attn_error_message(), "token"));
  assert_int_equal(attn_session_position(session), 0);
  assert_ok(attn_session_feed(session, f.tokens, 30));
  assert_logits(&f, session, 30);
  remove(path);
  attn_session_destroy(session);
  attn_model_destroy(f.model);
}

/* The mean loss does not depend on how the text is cut, as far as the context is the same. */
static void evaluation(void **state) {
  (void)state;
  fixture f = make_fixture("\"lightning\", \"softmax\"", "", ATTN_F64);
  double whole, windows_loss, by_session = 0;
  int64_t counted;
  assert_ok(attn_model_evaluate(f.model, f.tokens, 300, 300, 0, &whole, &counted));
  assert_int_equal(counted, 299);
  attn_session *session = make_session(&f, 64, 0);
  for (int t = 0; t + 1 < 300; ++t) {
    assert_ok(attn_session_feed(session, f.tokens + t, 1));
    const float *logits = attn_session_logits(session);
    double total = 0;
    for (int i = 0; i < VOCABULARY; ++i) total += exp((double)logits[i]);
    by_session += log(total) - (double)logits[f.tokens[t + 1]];
  }
  assert_true(fabs(by_session / 299 - whole) < 1e-6);
  assert_ok(attn_model_evaluate(f.model, f.tokens, 300, 100, 20, &windows_loss, &counted));
  assert_int_equal(counted, 299);
  assert_true(fabs(windows_loss - whole) < 0.2); /* less context: close, not equal */
  assert_int_equal(attn_model_evaluate(f.model, f.tokens, 1, 0, 0, &whole, &counted),
                   ATTN_INVALID_ARGUMENT);
  attn_session_destroy(session);
  attn_model_destroy(f.model);
}

/* The most likely token at every label, as a session finds it. */
static void accuracy(void **state) {
  (void)state;
  enum { COUNT = 7, LONG = 40 };
  fixture f = make_fixture("\"lightning\", \"softmax\"", "", ATTN_F64);
  int32_t labels[COUNT * LONG];
  double expected = 0, found;
  for (int s = 0; s < COUNT; ++s) {
    attn_session *session = make_session(&f, 64, 0);
    int own = 0, hits = 0;
    for (int t = 0; t < LONG; ++t) {
      int at = s * LONG + t, best = 0;
      assert_ok(attn_session_feed(session, f.tokens + at, 1));
      const float *logits = attn_session_logits(session);
      for (int i = 1; i < VOCABULARY; ++i)
        if (logits[i] > logits[best]) best = i;
      /* Every third place is asked for, and every other answer is right; the last sequence has no
       * labels. */
      labels[at] = t % 3 || s == COUNT - 1 ? -1 : (best + (t + s) % 2) % VOCABULARY;
      own += labels[at] >= 0, hits += labels[at] == best;
    }
    if (own) expected += (double)hits / own / COUNT;
    attn_session_destroy(session);
  }
  assert_ok(attn_model_accuracy(f.model, f.tokens, labels, COUNT, LONG, &found));
  assert_true(expected > 0.3 && expected < 0.7);
  assert_true(fabs(found - expected) < 1e-12);
  assert_ok(attn_model_accuracy(f.model, f.tokens, labels + (COUNT - 1) * LONG, 1, LONG, &found));
  assert_true(found == 0);
  attn_model_destroy(f.model);
}

int main(int argc, char **argv) {
  if (argc > 1) cmocka_set_test_filter(argv[1]); /* a pattern of names */
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(every_mixer),
      cmocka_unit_test(an_edited_turn),
      cmocka_unit_test(windows),
      cmocka_unit_test(decode_allocates_nothing),
      cmocka_unit_test(bad_calls_are_refused),
      cmocka_unit_test(foreign_files_are_refused),
      cmocka_unit_test(allocation_failures),
      cmocka_unit_test(failures_leave_the_logits),
      cmocka_unit_test(retreats_forget),
      cmocka_unit_test(strange_tokens_are_refused),
      cmocka_unit_test(evaluation),
      cmocka_unit_test(accuracy),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
