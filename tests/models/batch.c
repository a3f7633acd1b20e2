/* Several sessions that take a step together go on as each would alone, on every family. */
#include "support/models.h"
#include "support/test.h"

#include "attn/model.h"
#include "base/fault.h"

#include <stdio.h>
#include <string.h>

static const char *const families[] = {
    "llama",      "llama_tied",  "mistral",     "qwen2_window", "qwen3",
    "gemma2",     "mixtral",     "qwen2_moe",   "qwen3_moe",    "minimax",
    "qwen3_next", "deepseek_v2", "deepseek_v3", "kimi_linear",
};
/* In float64, where only the order of sums tells the two apart. In float32 the logits of single
 * tokens of the Qwen3-Next fixture move by 1e-4 whatever the order (7e-5 on the generic kernels).
 */
static const double tolerance = 1e-12;

enum { FAMILIES = sizeof families / sizeof *families, VOCABULARY = 96, SESSIONS = 11, STEPS = 70 };

static attn_model *load(const char *family, attn_dtype compute) {
  char path[512];
  attn_model *model;
  snprintf(path, sizeof path, "%s/tests/models/fixtures/families/%s", ATTN_SOURCE_DIR, family);
  assert_ok(test_model_load(path, compute, &model));
  return model;
}

static int32_t token_of(int session, int64_t position) {
  return (int32_t)((position * 7 + session * 13 + position * position / 5) % VOCABULARY);
}

/* Session i begins with 0 to 40 tokens of its own. */
static void start(const attn_model *model, attn_session *sessions[SESSIONS]) {
  attn_session_options options = ATTN_SESSION_OPTIONS_INIT;
  options.max_tokens = 256;
  options.checkpoint_spacing = 64;
  for (int i = 0; i < SESSIONS; ++i) {
    assert_ok(attn_session_create(model, &options, &sessions[i]));
    for (int64_t t = 0; t < 4 * i; ++t) {
      int32_t token = token_of(i, t);
      assert_ok(attn_session_feed(sessions[i], &token, 1));
    }
  }
}

static double difference(const attn_session *a, const attn_session *b) {
  double x[VOCABULARY], y[VOCABULARY];
  assert_non_null(attn_session_logits(a));
  assert_int_equal(attn_session_position(a), attn_session_position(b));
  for (int i = 0; i < VOCABULARY; ++i) {
    x[i] = (double)attn_session_logits(a)[i];
    y[i] = (double)attn_session_logits(b)[i];
  }
  return test_relative_error(x, y, VOCABULARY);
}

static void stop(attn_session *sessions[SESSIONS]) {
  for (int i = 0; i < SESSIONS; ++i) attn_session_destroy(sessions[i]);
}

/* Steps of 1 to 11 sessions; afterwards each equals one that went alone, and rewinds like it. */
static void each_family(void **state) {
  (void)state;
  for (int f = 0; f < FAMILIES; ++f) {
    attn_model *model = load(families[f], ATTN_F64);
    attn_session *together[SESSIONS], *alone[SESSIONS];
    start(model, together);
    start(model, alone);
    for (int s = 0; s < STEPS; ++s) {
      int count = 1 + s % SESSIONS, first = s % (SESSIONS - count + 1);
      int32_t tokens[SESSIONS];
      for (int i = 0; i < count; ++i)
        tokens[i] = token_of(first + i, attn_session_position(together[first + i]));
      assert_ok(attn_session_step(together + first, tokens, count));
      for (int i = 0; i < count; ++i) {
        assert_ok(attn_session_feed(alone[first + i], &tokens[i], 1));
        double error = difference(together[first + i], alone[first + i]);
        if (!(error <= tolerance)) fail_msg("%s, step %d: error %g", families[f], s, error);
      }
    }
    for (int i = 1; i < SESSIONS; ++i) {
      int64_t target = attn_session_position(alone[i]) / 2;
      assert_ok(attn_session_rewind(together[i], target));
      assert_ok(attn_session_rewind(alone[i], target));
      if (target) assert_true(difference(together[i], alone[i]) <= tolerance);
    }
    stop(together);
    stop(alone);
    attn_model_destroy(model);
  }
}

static void bad_calls_are_refused(void **state) {
  (void)state;
  attn_model *model = load("kimi_linear", ATTN_F32), *other = load("llama", ATTN_F32);
  attn_session *sessions[SESSIONS], *alone[SESSIONS], *foreign[SESSIONS];
  int32_t tokens[SESSIONS] = {1, 2, 3};
  start(model, sessions);
  start(model, alone);
  start(other, foreign);
  attn_session *twice[] = {sessions[1], sessions[2], sessions[1]};
  attn_session *mixed[] = {sessions[1], foreign[1]};
  assert_int_equal(attn_session_step(twice, tokens, 3), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_session_step(mixed, tokens, 2), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_session_step(sessions, tokens, 0), ATTN_INVALID_ARGUMENT);
  tokens[2] = VOCABULARY;
  assert_int_equal(attn_session_step(sessions, tokens, 3), ATTN_INVALID_ARGUMENT);
  assert_true(difference(sessions[1], alone[1]) == 0); /* as before */
  stop(sessions);
  stop(alone);
  stop(foreign);
  attn_model_destroy(model);
  attn_model_destroy(other);
}

/* Memory that ends anywhere in a step leaves every session as it was. */
static void allocation_failures(void **state) {
  (void)state;
  attn_model *model = load("qwen3_next", ATTN_F32);
  bool failed = true;
  for (int64_t n = 0; failed; ++n) {
    attn_session *sessions[SESSIONS], *alone[SESSIONS];
    int32_t tokens[3] = {5, 6, 7};
    start(model, sessions);
    start(model, alone);
    attn_fault_arm(ATTN_FAULT_ALLOC, n);
    attn_status status = attn_session_step(sessions + 3, tokens, 3);
    failed = attn_fault_disarm(ATTN_FAULT_ALLOC);
    /* A step that does without the memory is fine too. */
    if (!failed || status != ATTN_OUT_OF_MEMORY) assert_ok(status);
    if (status != ATTN_OK) assert_ok(attn_session_step(sessions + 3, tokens, 3));
    for (int i = 0; i < 3; ++i) {
      assert_ok(attn_session_feed(alone[3 + i], &tokens[i], 1));
      assert_true(difference(sessions[3 + i], alone[3 + i]) <= tolerance);
    }
    stop(sessions);
    stop(alone);
  }
  attn_model_destroy(model);
}

int main(int argc, char **argv) {
  if (argc > 1) cmocka_set_test_filter(argv[1]); /* a pattern of names */
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(each_family),
      cmocka_unit_test(bad_calls_are_refused),
      cmocka_unit_test(allocation_failures),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
