/* Speculative decoding gives the tokens of plain decoding, on every family, greedy and sampled, by
 * look-up and with drafts; and leaves the session as plain decoding does. */
#include "support/models.h"
#include "support/test.h"

#include "attn/speculation.h"
#include "attn/text.h"
#include "models/session.h"

#include <stdio.h>
#include <string.h>

static const char *const families[] = {
    "llama",     "mistral", "qwen2_window", "qwen3",       "gemma2",      "mixtral",
    "qwen3_moe", "minimax", "qwen3_next",   "deepseek_v2", "deepseek_v3", "kimi_linear",
};
enum { FAMILIES = sizeof families / sizeof *families, VOCABULARY = 96, TOKENS = 120, PROMPT = 40 };

static attn_model *load_in(const char *family, attn_dtype compute) {
  char path[512];
  attn_model *model;
  snprintf(path, sizeof path, "%s/tests/models/fixtures/families/%s", ATTN_SOURCE_DIR, family);
  assert_ok(test_model_load(path, compute, &model));
  return model;
}

static attn_model *load(const char *family) {
  return load_in(family, ATTN_F32);
}

/* A session that has read a prompt with something to look up in it. */
static attn_session *start(const attn_model *model) {
  attn_session_options options = ATTN_SESSION_OPTIONS_INIT;
  attn_session *session;
  int32_t prompt[PROMPT];
  options.max_tokens = 512;
  options.checkpoint_spacing = 64;
  for (int i = 0; i < PROMPT; ++i) prompt[i] = 3 + (i % 13) * 5;
  assert_ok(attn_session_create(model, &options, &session));
  assert_ok(attn_session_feed(session, prompt, PROMPT));
  return session;
}

static attn_session *decode_plainly(const attn_model *model, const attn_sampling *sampling) {
  attn_session *session = start(model);
  for (int i = 0; i < TOKENS; ++i) {
    int32_t token;
    assert_ok(attn_session_sample(session, sampling, &token));
    assert_ok(attn_session_feed(session, &token, 1));
  }
  return session;
}

static double logit_error(const attn_session *a, const attn_session *b) {
  double x[VOCABULARY], y[VOCABULARY];
  for (int i = 0; i < VOCABULARY; ++i) {
    x[i] = (double)attn_session_logits(a)[i];
    y[i] = (double)attn_session_logits(b)[i];
  }
  return test_relative_error(x, y, VOCABULARY);
}

/* Decodes until there are as many tokens as in `plain` and compares. */
static attn_speculation_stats check(const char *name, const attn_session *plain,
                                    const attn_model *model, const attn_sampling *sampling,
                                    const attn_speculation *speculation) {
  attn_session *session = start(model);
  attn_speculator *speculator;
  assert_ok(attn_speculator_create(session, speculation, &speculator));
  for (int64_t left = TOKENS; left > 0;) {
    int32_t tokens[40];
    int64_t count;
    assert_ok(attn_speculator_step(speculator, sampling, left < 40 ? left : 40, tokens, &count));
    assert_true(count >= 1 && count <= left);
    left -= count;
    assert_int_equal(attn_session_position(session), PROMPT + TOKENS - left);
    for (int64_t i = 0; i < PROMPT + TOKENS - left; ++i)
      if (attn_session_tokens(session)[i] != attn_session_tokens(plain)[i])
        fail_msg("%s: token %lld is %d, plain decoding gives %d", name, (long long)i,
                 attn_session_tokens(session)[i], attn_session_tokens(plain)[i]);
  }
  assert_int_equal(session->checkpoint_count, plain->checkpoint_count);
  for (int64_t i = 0; i < plain->checkpoint_count; ++i)
    assert_int_equal(session->checkpoints[i]->position, plain->checkpoints[i]->position);
  if (!(logit_error(session, plain) <= 2e-5))
    fail_msg("%s: logits differ by %g", name, logit_error(session, plain));
  attn_speculation_stats stats = attn_speculator_get_stats(speculator);
  assert_int_equal(stats.tokens, TOKENS);
  assert_int_equal(stats.tokens, stats.steps + stats.accepted);
  attn_speculator_destroy(speculator);
  attn_session_destroy(session);
  return stats;
}

static void each_family(void **state) {
  (void)state;
  attn_model *other = load("llama_tied");
  for (int f = 0; f < FAMILIES; ++f) {
    attn_model *model = load(families[f]);
    for (int sampled = 0; sampled < 2; ++sampled) {
      attn_sampling sampling = ATTN_SAMPLING_INIT;
      sampling.temperature = sampled ? 0.3 : 0;
      sampling.repetition_penalty = sampled ? 1.1 : 1;
      sampling.repetition_window = 20;
      sampling.seed = 5;
      attn_session *plain = decode_plainly(model, &sampling);
      attn_speculation speculation = ATTN_SPECULATION_INIT;
      attn_speculation_stats by_text = check(families[f], plain, model, &sampling, &speculation);
      speculation.draft = other;
      check(families[f], plain, model, &sampling, &speculation);
      speculation.draft = model;
      speculation.tokens = 3;
      attn_speculation_stats by_itself = check(families[f], plain, model, &sampling, &speculation);
      print_message("  %s, %s: look-up %lld of %lld, itself %lld of %lld\n", families[f],
                    sampled ? "sampled" : "greedy", (long long)by_text.accepted,
                    (long long)by_text.proposed, (long long)by_itself.accepted,
                    (long long)by_itself.proposed);
      if (!sampled) assert_true(by_itself.accepted * 10 >= by_itself.proposed * 9);
      attn_session_destroy(plain);
    }
    attn_model_destroy(model);
  }
  attn_model_destroy(other);
}

/* A few tokens at once give the bits that they give one by one: what all of this rests on. */
static void assert_same_bits(const char *name, const attn_model *model) {
  attn_session *together = start(model), *alone = start(model);
  for (int64_t count = 2; count <= 8; ++count) {
    int32_t tokens[8];
    for (int i = 0; i < count; ++i) tokens[i] = (int32_t)(17 * count + 31 * i) % VOCABULARY;
    assert_ok(attn_session_feed(together, tokens, count));
    for (int i = 0; i < count; ++i) assert_ok(attn_session_feed(alone, &tokens[i], 1));
    if (memcmp(attn_session_logits(together), attn_session_logits(alone),
               VOCABULARY * sizeof(float)) != 0)
      fail_msg("%s, %lld tokens: logits differ by %g", name, (long long)count,
               logit_error(together, alone));
  }
  attn_session_destroy(together);
  attn_session_destroy(alone);
}

static void each_gives_the_same_bits(void *context) {
  static const char *const quantised[] = {"llama/model.q8_0.gguf", "qwen2_moe/model.q8_0.gguf",
                                          "qwen3/model.q8_0.gguf"};
  static const attn_dtype dtypes[] = {ATTN_F32, ATTN_BF16, ATTN_F64};
  (void)context;
  for (int d = 0; d < 3; ++d)
    for (int f = 0; f < FAMILIES + 3; ++f) {
      const char *name = f < FAMILIES ? families[f] : quantised[f - FAMILIES];
      attn_model *model = load_in(name, dtypes[d]);
      assert_same_bits(name, model);
      attn_model_destroy(model);
    }
}

static void few_tokens_give_the_same_bits(void **state) {
  (void)state;
  test_on_every_path(each_gives_the_same_bits, NULL);
}

/* Afterwards the session rewinds as any other. */
static void sessions_stay_whole(void **state) {
  (void)state;
  attn_model *model = load("kimi_linear");
  attn_sampling greedy = ATTN_SAMPLING_INIT;
  greedy.temperature = 0;
  attn_session *session = start(model), *fresh;
  attn_speculator *speculator;
  assert_ok(attn_speculator_create(session, NULL, &speculator));
  while (attn_session_position(session) < 300) {
    int32_t tokens[8];
    int64_t count;
    assert_ok(attn_speculator_step(speculator, &greedy, 8, tokens, &count));
  }
  /* around the last mark, one by one; at and between checkpoints */
  static const int64_t targets[] = {299, 298, 297, 296, 295, 294, 293,
                                    292, 291, 290, 256, 200, 65,  41};
  for (size_t i = 0; i < sizeof targets / sizeof *targets; ++i) {
    assert_ok(attn_session_rewind(session, targets[i]));
    assert_ok(attn_session_create(model, NULL, &fresh));
    assert_ok(attn_session_feed(fresh, attn_session_tokens(session), targets[i]));
    assert_true(logit_error(session, fresh) <= 2e-5);
    attn_session_destroy(fresh);
  }
  attn_speculator_destroy(speculator);
  attn_session_destroy(session);
  attn_model_destroy(model);
}

static void full_sessions_and_bad_calls(void **state) {
  (void)state;
  attn_model *model = load("qwen3_next");
  attn_sampling greedy = ATTN_SAMPLING_INIT;
  greedy.temperature = 0;
  attn_session *session = start(model);
  attn_speculator *speculator;
  attn_speculation bad = ATTN_SPECULATION_INIT;
  int32_t tokens[64];
  int64_t count;
  bad.tokens = 8;
  assert_int_equal(attn_speculator_create(session, &bad, &speculator), ATTN_INVALID_ARGUMENT);
  bad.tokens = 4;
  bad.shortest = 0;
  assert_int_equal(attn_speculator_create(session, &bad, &speculator), ATTN_INVALID_ARGUMENT);
  assert_ok(attn_speculator_create(session, NULL, &speculator));
  assert_int_equal(attn_speculator_step(speculator, &greedy, 0, tokens, &count),
                   ATTN_INVALID_ARGUMENT);
  attn_status status = ATTN_OK;
  while (status == ATTN_OK) status = attn_speculator_step(speculator, &greedy, 64, tokens, &count);
  assert_int_equal(status, ATTN_OUT_OF_MEMORY);
  assert_int_equal(attn_session_position(session), 512); /* to the last token */
  attn_speculator_destroy(speculator);
  attn_session_destroy(session);
  attn_model_destroy(model);
}

static int most_frequent(const int32_t text[TOKENS]) {
  int count[VOCABULARY] = {0}, best = 0;
  for (int i = 0; i < TOKENS; ++i) ++count[text[i]];
  for (int token = 0; token < VOCABULARY; ++token)
    if (count[token] > count[best]) best = token;
  return best;
}

/* A token that ends the text is the last of its step, whatever was proposed behind it. */
static void ends_end_steps(void **state) {
  (void)state;
  attn_sampling greedy = ATTN_SAMPLING_INIT;
  greedy.temperature = 0;
  attn_model *model = load("llama");
  attn_session *plain = decode_plainly(model, &greedy), *session;
  const int32_t *text = attn_session_tokens(plain);
  attn_model *ending = load("llama");
  ending->text.ends[ending->text.end_count++] = most_frequent(text + PROMPT);
  for (int drafts = 0; drafts < 2; ++drafts) {
    attn_speculation speculation = ATTN_SPECULATION_INIT;
    attn_speculator *speculator;
    int ended = 0;
    if (drafts) speculation.draft = ending;
    session = start(ending);
    assert_ok(attn_speculator_create(session, &speculation, &speculator));
    while (attn_session_position(session) < PROMPT + TOKENS) {
      int32_t tokens[40];
      int64_t count;
      assert_ok(attn_speculator_step(speculator, &greedy, 40, tokens, &count));
      for (int64_t i = 0; i + 1 < count; ++i) assert_false(attn_model_is_end(ending, tokens[i]));
      ended += attn_model_is_end(ending, tokens[count - 1]);
    }
    assert_true(ended > 1);
    assert_memory_equal(attn_session_tokens(session), text, (PROMPT + TOKENS) * sizeof *text);
    assert_true(attn_speculator_get_stats(speculator).accepted > 0);
    attn_speculator_destroy(speculator);
    attn_session_destroy(session);
  }
  attn_session_destroy(plain);
  attn_model_destroy(ending);
  attn_model_destroy(model);
}

/* A family of one session: its pages hold the mark, too, up to the last token. */
static void one_session_is_filled(void **state) {
  (void)state;
  static const char *const kinds[] = {"qwen3_next", "qwen2_window", "kimi_linear"};
  attn_sampling greedy = ATTN_SAMPLING_INIT;
  greedy.temperature = 0;
  for (int k = 0; k < 3; ++k)
    for (int drafts = 0; drafts < 2; ++drafts) {
      attn_model *model = load(kinds[k]);
      attn_session_options options = ATTN_SESSION_OPTIONS_INIT;
      attn_speculation speculation = ATTN_SPECULATION_INIT;
      attn_session *session;
      attn_speculator *speculator;
      int32_t prompt[PROMPT], tokens[64];
      int64_t count;
      options.max_tokens = 128;
      options.forks = 1;
      for (int i = 0; i < PROMPT; ++i) prompt[i] = 3 + (i % 13) * 5;
      assert_ok(attn_session_create(model, &options, &session));
      assert_ok(attn_session_feed(session, prompt, PROMPT));
      if (drafts) speculation.draft = model;
      assert_ok(attn_speculator_create(session, &speculation, &speculator));
      while (attn_session_position(session) < options.max_tokens)
        assert_ok(attn_speculator_step(speculator, &greedy, 64, tokens, &count));
      attn_speculator_destroy(speculator);
      attn_session_destroy(session);
      attn_model_destroy(model);
    }
}

int main(int argc, char **argv) {
  if (argc > 1) cmocka_set_test_filter(argv[1]); /* a pattern of names */
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(each_family),         cmocka_unit_test(few_tokens_give_the_same_bits),
      cmocka_unit_test(sessions_stay_whole), cmocka_unit_test(full_sessions_and_bad_calls),
      cmocka_unit_test(ends_end_steps),      cmocka_unit_test(one_session_is_filled),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
