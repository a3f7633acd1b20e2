/* Failing memory and failing files, where models have experts, latents and linear layers: loading,
 * training steps, speculation and the prefix cache end in a clean error, lose no memory, and go on
 * afterwards as if nothing had been. */
#include "support/models.h"
#include "support/test.h"

#include "attn/prefix_cache.h"
#include "attn/speculation.h"
#include "base/fault.h"
#include "base/memory.h"
#include "graph/operations.h"
#include "models/model.h"

#include <dirent.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { VOCABULARY = 96, PROMPT = 40, TOKENS = 24, MANY = 100000 };

static const char *path_of(const char *family) {
  static char path[512];
  snprintf(path, sizeof path, "%s/tests/models/fixtures/families/%s", ATTN_SOURCE_DIR, family);
  return path;
}

static attn_model *load(const char *family) {
  attn_model *model;
  assert_ok(test_model_load(path_of(family), ATTN_F32, &model));
  return model;
}

static size_t live(void) {
  return attn_memory_get_stats().live_bytes;
}

/* Every allocation of the first ones, then fewer and fewer of the many that are alike. */
static int64_t next(int64_t n) {
  return n < 60 ? n + 1 : n + n / 12;
}

/* Loading and training --------------------------------------------------------------------------
 */

static void models_load_or_not(void **state) {
  (void)state;
  static const char *const families[] = {"qwen3_next", "minimax", "deepseek_v3", "kimi_linear"};
  for (int f = 0; f < 4; ++f) {
    attn_model_destroy(load(families[f])); /* what stays for the whole process is there */
    size_t before = live();
    for (int64_t n = 0; n < MANY; n = next(n)) {
      attn_model *model = NULL;
      attn_fault_arm(ATTN_FAULT_ALLOC, n);
      attn_status status = attn_model_load(path_of(families[f]), ATTN_F32, &model);
      bool failed = attn_fault_disarm(ATTN_FAULT_ALLOC);
      assert_int_equal(status, failed ? ATTN_OUT_OF_MEMORY : ATTN_OK);
      if (!failed) {
        attn_model_destroy(model);
        break;
      }
      assert_int_equal(live(), before);
    }
    assert_int_equal(live(), before);
  }
}

/* Takes at most `units` of the arena's alignment; gives how many there were. */
static size_t fill_arena(attn_arena *arena, size_t units) {
  size_t taken = 0;
  for (size_t size = (size_t)1 << 40; size; size /= 2)
    while (size <= units - taken && attn_arena_alloc(arena, size * ATTN_ALIGNMENT)) taken += size;
  return taken;
}

/* Leaves `room` units of what the arena has, and no more memory. */
static void leave_room(attn_arena *arena, size_t room) {
  attn_fault_arm(ATTN_FAULT_ALLOC, 0);
  size_t all = fill_arena(arena, (size_t)1 << 41);
  attn_arena_reset(arena);
  fill_arena(arena, all > room ? all - room : 0);
  attn_fault_arm(ATTN_FAULT_ALLOC, 0); /* from here on failures count */
}

static attn_status train_once(attn_graph *g, const attn_model *model, int64_t room) {
  static int32_t tokens[PROMPT], targets[PROMPT];
  attn_layout layout = attn_layout_equal(1, PROMPT);
  for (int i = 0; i < PROMPT; ++i) {
    tokens[i] = i * 7 % VOCABULARY;
    targets[i] = (i + 1) * 7 % VOCABULARY;
  }
  attn_graph_reset(g, true);
  if (room >= 0) leave_room(g->arena, (size_t)room);
  attn_var *loss = attn_decoder_loss(g, model, &layout, tokens, targets, 0, 0);
  if (!loss) return attn_graph_status(g);
  return attn_graph_backward(g, loss, 1);
}

static void training_steps_fail_cleanly(void **state) {
  (void)state;
  static const char *const families[] = {"minimax", "deepseek_v3", "kimi_linear", "qwen3_next"};
  for (int f = 0; f < 4; ++f) {
    attn_model *model = load(families[f]);
    attn_graph *g;
    assert_ok(attn_model_make_trainable(model));
    assert_ok(attn_graph_create(ATTN_F32, &g));
    assert_ok(train_once(g, model, -1)); /* compute forms are made that stay */
    size_t before = live();
    bool failed = true;
    for (int64_t room = 0; failed; room += 1 + room / 48) {
      attn_status status = train_once(g, model, room);
      failed = attn_fault_disarm(ATTN_FAULT_ALLOC);
      assert_int_equal(status, failed ? ATTN_OUT_OF_MEMORY : ATTN_OK);
      assert_int_equal(live(), before);
    }
    attn_graph_destroy(g);
    attn_model_destroy(model);
  }
}

/* Speculation -----------------------------------------------------------------------------------
 */

static const attn_sampling greedy = {
    .struct_size = sizeof greedy, .top_p = 1, .repetition_penalty = 1};

static void make_prompt(int32_t prompt[PROMPT]) {
  for (int i = 0; i < PROMPT; ++i) prompt[i] = 3 + (i % 13) * 5;
}

static attn_session *start(const attn_model *model) {
  attn_session_options options = ATTN_SESSION_OPTIONS_INIT;
  attn_session *session;
  int32_t prompt[PROMPT];
  options.max_tokens = 128;
  options.checkpoint_spacing = 64;
  options.forks = 1;
  make_prompt(prompt);
  assert_ok(attn_session_create(model, &options, &session));
  assert_ok(attn_session_feed(session, prompt, PROMPT));
  return session;
}

/* A few steps; the first error ends them. */
static attn_status speculate(attn_session *session, const attn_speculation *speculation) {
  attn_speculator *speculator;
  attn_status status = attn_speculator_create(session, speculation, &speculator);
  if (status != ATTN_OK) return status;
  while (status == ATTN_OK && attn_session_position(session) < PROMPT + TOKENS) {
    int32_t tokens[8];
    int64_t count, left = PROMPT + TOKENS - attn_session_position(session);
    status = attn_speculator_step(speculator, &greedy, left < 8 ? left : 8, tokens, &count);
  }
  attn_speculator_destroy(speculator);
  return status;
}

static void speculation_fails_cleanly(void **state) {
  (void)state;
  static const char *const families[] = {"llama", "qwen2_window", "kimi_linear", "minimax"};
  for (int f = 0; f < 4; ++f)
    for (int drafts = 0; drafts < 2; ++drafts) {
      attn_model *model = load(families[f]);
      attn_speculation speculation = ATTN_SPECULATION_INIT;
      int32_t expected[PROMPT + TOKENS];
      if (drafts) speculation.draft = model;
      attn_session *session = start(model);
      assert_ok(speculate(session, &speculation));
      memcpy(expected, attn_session_tokens(session), sizeof expected);
      attn_session_destroy(session);
      size_t before = live();
      bool failed = true;
      for (int64_t n = 0; failed && n < MANY; n = next(n)) {
        session = start(model);
        attn_fault_arm(ATTN_FAULT_ALLOC, n);
        attn_status status = speculate(session, &speculation);
        failed = attn_fault_disarm(ATTN_FAULT_ALLOC);
        assert_int_equal(status, failed ? ATTN_OUT_OF_MEMORY : ATTN_OK);
        int64_t position = attn_session_position(session);
        assert_true(position == 0 || position >= PROMPT);
        if (position == 0) assert_ok(attn_session_feed(session, expected, PROMPT));
        assert_ok(speculate(session, &speculation));
        assert_memory_equal(attn_session_tokens(session), expected, sizeof expected);
        attn_session_destroy(session);
        assert_int_equal(live(), before);
      }
      assert_false(failed);
      attn_model_destroy(model);
    }
}

/* The prefix cache ------------------------------------------------------------------------------
 */

static void empty_directory(const char *path) {
  DIR *directory = opendir(path);
  char name[512];
  for (struct dirent *item; directory && (item = readdir(directory));) {
    snprintf(name, sizeof name, "%s/%s", path, item->d_name);
    unlink(name);
  }
  if (directory) closedir(directory);
}

static attn_status create_cache(const attn_model *model, const char *directory,
                                attn_prefix_cache **cache) {
  attn_prefix_cache_options options = ATTN_PREFIX_CACHE_OPTIONS_INIT;
  options.session.max_tokens = 256;
  options.session.checkpoint_spacing = 64;
  options.session.forks = 2;
  options.entries = 2;
  options.directory = directory;
  return attn_prefix_cache_create(model, &options, cache);
}

/* Serves a sequence of 100 tokens that has `same` tokens in common with others. */
static attn_status serve(attn_prefix_cache *cache, int same, int how) {
  int32_t tokens[100];
  attn_session *session;
  for (int i = 0; i < 100; ++i) tokens[i] = (i * 5 + (i < same ? 0 : how)) % VOCABULARY;
  attn_status status = attn_prefix_cache_open(cache, tokens, 100, &session);
  if (status != ATTN_OK) return status;
  int64_t known = attn_session_position(session);
  assert_memory_equal(attn_session_tokens(session), tokens, (size_t)known * sizeof *tokens);
  status = attn_session_feed(session, tokens + known, 100 - known);
  if (status == ATTN_OK) status = attn_prefix_cache_keep(cache, session);
  attn_session_destroy(session);
  return status;
}

static attn_status use_cache(const attn_model *model, const char *directory) {
  attn_prefix_cache *cache;
  attn_status status = create_cache(model, directory, &cache);
  if (status != ATTN_OK) return status;
  for (int how = 0; how < 3 && status == ATTN_OK; ++how) status = serve(cache, 80, how);
  attn_prefix_cache_destroy(cache);
  return status;
}

static void check_cache(const attn_model *model, attn_fault_kind kind, const char *directory) {
  assert_ok(use_cache(model, directory));
  empty_directory(directory ? directory : "/nonexistent");
  size_t before = live();
  bool failed = true;
  for (int64_t n = 0; failed && n < MANY; n = next(n)) {
    attn_fault_arm(kind, n);
    attn_status status = use_cache(model, directory);
    failed = attn_fault_disarm(kind);
    if (!failed) assert_ok(status);
    assert_true(status == ATTN_OK || status == ATTN_OUT_OF_MEMORY || status == ATTN_IO_ERROR);
    assert_int_equal(live(), before);
    assert_ok(use_cache(model, directory)); /* what was left behind does no harm */
    if (directory) empty_directory(directory);
  }
  assert_false(failed);
}

static void caches_fail_cleanly(void **state) {
  (void)state;
  static const char *const families[] = {"deepseek_v3", "kimi_linear"};
  char directory[] = "/tmp/attn-faults-XXXXXX";
  assert_non_null(mkdtemp(directory));
  for (int f = 0; f < 2; ++f) {
    attn_model *model = load(families[f]);
    check_cache(model, ATTN_FAULT_ALLOC, NULL);
    check_cache(model, ATTN_FAULT_ALLOC, directory);
    check_cache(model, ATTN_FAULT_IO, directory);
    attn_model_destroy(model);
  }
  rmdir(directory);
}

int main(int argc, char **argv) {
  if (argc > 1) cmocka_set_test_filter(argv[1]); /* a pattern of names */
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(models_load_or_not),
      cmocka_unit_test(training_steps_fail_cleanly),
      cmocka_unit_test(speculation_fails_cleanly),
      cmocka_unit_test(caches_fail_cleanly),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
