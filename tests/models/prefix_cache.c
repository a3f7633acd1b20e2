/* The prefix cache: what it finds is the longest beginning that was kept, whatever was kept before,
 * and sessions that begin with it go on as fresh ones do; in memory, from files, and when states
 * are given up. */
#include "support/models.h"
#include "support/test.h"

#include "attn/prefix_cache.h"
#include "attn/speculation.h"
#include "base/random.h"
#include "engines/plan_cache.h"
#include "models/prefix_tree.h"
#include "models/session.h"

#include <dirent.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* The tree --------------------------------------------------------------------------------------
 */

enum { SEQUENCES = 60, LONGEST = 12, ALPHABET = 3 };

typedef struct sequence {
  int32_t tokens[LONGEST];
  int64_t count;
  attn_prefix_node *node; /* NULL: not in the tree */
} sequence;

static sequence random_sequence(attn_random *random) {
  sequence s = {.count = 1 + (int64_t)(attn_random_uniform(random) * LONGEST)};
  if (s.count > LONGEST) s.count = LONGEST;
  for (int64_t i = 0; i < s.count; ++i)
    s.tokens[i] = (int32_t)(attn_random_uniform(random) * ALPHABET);
  return s;
}

static int64_t in_common(const sequence *a, const sequence *b) {
  int64_t n = 0;
  while (n < a->count && n < b->count && a->tokens[n] == b->tokens[n]) ++n;
  return n;
}

static void assert_match(const attn_prefix_tree *tree, const sequence *all,
                         const sequence *wanted) {
  attn_prefix_node *below, *above;
  int64_t longest = 0, whole = 0;
  for (int i = 0; i < SEQUENCES; ++i) {
    if (!all[i].node) continue;
    int64_t same = in_common(&all[i], wanted);
    if (same > longest) longest = same;
    if (same == all[i].count && same > whole) whole = same;
  }
  assert_int_equal(attn_prefix_tree_match(tree, wanted->tokens, wanted->count, &below, &above),
                   longest);
  assert_int_equal(above ? above->depth : 0, whole);
  assert_int_equal(below != NULL, longest > 0);
  if (!below) return;
  const sequence *found = below->entry;
  int32_t tokens[LONGEST];
  assert_int_equal(below->depth, found->count);
  attn_prefix_tree_sequence(below, tokens);
  assert_memory_equal(tokens, found->tokens, (size_t)found->count * sizeof *tokens);
  assert_true(in_common(found, wanted) == longest);
}

/* Edges are as long as they can be: a node is a branch, or has an entry. */
static void assert_no_chains(const attn_prefix_node *node) {
  for (const attn_prefix_node *child = node->child; child; child = child->sibling) {
    assert_true(child->entry || (child->child && child->child->sibling));
    assert_int_equal(child->depth, node->depth + child->count);
    assert_no_chains(child);
  }
}

static void trees_match_a_plain_search(void **state) {
  (void)state;
  attn_prefix_tree tree = {0};
  attn_random random = {.seed = 1};
  sequence all[SEQUENCES] = {{{0}, 0, NULL}};
  for (int round = 0; round < 4000; ++round) {
    sequence *s = &all[(int)(attn_random_uniform(&random) * SEQUENCES) % SEQUENCES];
    if (s->node) {
      attn_prefix_tree_remove(s->node);
      s->node = NULL;
    } else {
      *s = random_sequence(&random);
      attn_prefix_node *node;
      assert_ok(attn_prefix_tree_insert(&tree, s->tokens, s->count, &node));
      if (!node->entry) { /* each sequence once */
        node->entry = s;
        s->node = node;
      }
    }
    sequence wanted = random_sequence(&random);
    assert_match(&tree, all, &wanted);
    assert_no_chains(&tree.root);
  }
  for (int i = 0; i < SEQUENCES; ++i)
    if (all[i].node) attn_prefix_tree_remove(all[i].node);
  assert_null(tree.root.child); /* nothing stays behind */
  attn_prefix_tree_free(&tree);
}

/* The cache -------------------------------------------------------------------------------------
 */

static const char *const families[] = {"llama",   "deepseek_v3", "mistral",
                                       "minimax", "qwen3_next",  "kimi_linear"};
enum { FAMILIES = sizeof families / sizeof *families, VOCABULARY = 96, PROMPT = 300 };

static attn_model *load(const char *family) {
  char path[512];
  attn_model *model;
  snprintf(path, sizeof path, "%s/tests/models/fixtures/families/%s", ATTN_SOURCE_DIR, family);
  assert_ok(test_model_load(path, ATTN_F32, &model));
  return model;
}

/* No rows at all in its states. */
static attn_model *make_recurrent(void) {
  attn_model *model;
  assert_ok(attn_model_create("{\"vocab_size\": 96, \"hidden_size\": 16, \"num_hidden_layers\": 2, "
                              "\"mixer\": \"lightning\"}",
                              3, ATTN_F32, &model));
  return model;
}

static attn_prefix_cache *make_cache(const attn_model *model, int64_t entries,
                                     const char *directory) {
  attn_prefix_cache_options options = ATTN_PREFIX_CACHE_OPTIONS_INIT;
  attn_prefix_cache *cache;
  options.session.max_tokens = 512;
  options.session.checkpoint_spacing = 64;
  options.entries = entries;
  options.directory = directory;
  assert_ok(attn_prefix_cache_create(model, &options, &cache));
  return cache;
}

static void make_prompt(int32_t tokens[PROMPT], int differs_from, int how) {
  for (int i = 0; i < PROMPT; ++i) tokens[i] = (i * 7 + i * i / 11) % VOCABULARY;
  for (int i = differs_from; i < PROMPT; ++i) tokens[i] = (tokens[i] + 1 + how) % VOCABULARY;
}

static void assert_as_fresh(const attn_model *model, const attn_session *session) {
  attn_session *fresh;
  double a[VOCABULARY], b[VOCABULARY];
  assert_ok(attn_session_create(model, NULL, &fresh));
  assert_ok(attn_session_feed(fresh, attn_session_tokens(session), attn_session_position(session)));
  for (int i = 0; i < VOCABULARY; ++i) {
    a[i] = (double)attn_session_logits(session)[i];
    b[i] = (double)attn_session_logits(fresh)[i];
  }
  double error = test_relative_error(a, b, VOCABULARY);
  if (!(error <= 2e-5)) fail_msg("logits differ by %g", error);
  attn_session_destroy(fresh);
}

/* Opens, reads the rest, checks; gives how many tokens were known. */
static int64_t serve(attn_prefix_cache *cache, const attn_model *model, const int32_t *tokens,
                     int64_t count, bool keeps) {
  attn_session *session;
  assert_ok(attn_prefix_cache_open(cache, tokens, count, &session));
  int64_t known = attn_session_position(session);
  assert_memory_equal(attn_session_tokens(session), tokens, (size_t)known * sizeof *tokens);
  assert_ok(attn_session_feed(session, tokens + known, count - known));
  assert_as_fresh(model, session);
  assert_ok(attn_session_rewind(session, count - 40)); /* and back, checkpoints or not */
  assert_as_fresh(model, session);
  assert_ok(attn_session_feed(session, tokens + count - 40, 40));
  if (keeps) assert_ok(attn_prefix_cache_keep(cache, session));
  attn_session_destroy(session);
  return known;
}

static bool can_be_cut(const char *family) {
  return strcmp(family, "llama") == 0 || strcmp(family, "deepseek_v3") == 0;
}

static void each_family(void **state) {
  (void)state;
  for (int f = 0; f < FAMILIES; ++f) {
    attn_model *model = load(families[f]);
    attn_prefix_cache *cache = make_cache(model, 64, NULL);
    bool cut = can_be_cut(families[f]);
    int32_t a[PROMPT], b[PROMPT];
    make_prompt(a, PROMPT, 0);
    make_prompt(b, 200, 0); /* the same up to token 200 */
    assert_int_equal(serve(cache, model, a, PROMPT, true), 0);
    /* the same again: all but the last token, or up to the last checkpoint */
    assert_int_equal(serve(cache, model, a, PROMPT, true), cut ? PROMPT - 1 : 256);
    assert_int_equal(serve(cache, model, b, PROMPT, true), cut ? 200 : 192);
    assert_int_equal(serve(cache, model, a, 100, false), cut ? 99 : 64);
    b[0] += 1;
    assert_int_equal(serve(cache, model, b, PROMPT, false), 0);
    /* a longer one than was kept: all of what was */
    int32_t longer[PROMPT + 50];
    memcpy(longer, a, sizeof a);
    for (int i = 0; i < 50; ++i) longer[PROMPT + i] = i;
    assert_int_equal(serve(cache, model, longer, PROMPT + 50, false), PROMPT);
    attn_prefix_cache_stats stats = attn_prefix_cache_get_stats(cache);
    assert_int_equal(stats.opened, 6);
    assert_int_equal(stats.tokens, 4 * PROMPT + 100 + PROMPT + 50);
    attn_prefix_cache_destroy(cache);
    attn_model_destroy(model);
  }
}

/* Few entries: the least recently used go, and what is left still serves. */
static void old_states_are_given_up(void **state) {
  (void)state;
  attn_model *model = load("qwen3_next");
  attn_prefix_cache *cache = make_cache(model, 6, NULL);
  for (int how = 0; how < 6; ++how) {
    int32_t tokens[PROMPT];
    make_prompt(tokens, 0, how);
    assert_int_equal(serve(cache, model, tokens, PROMPT, true), 0);
    assert_int_equal(serve(cache, model, tokens, PROMPT, false), 256);
    assert_true(attn_prefix_cache_get_stats(cache).entries <= 6);
  }
  int32_t first[PROMPT];
  make_prompt(first, 0, 0);
  assert_int_equal(serve(cache, model, first, PROMPT, false), 0);
  attn_prefix_cache_destroy(cache);
  attn_model_destroy(model);
}

/* What is opened is used: it stays longer than what was kept after it. */
static void opened_states_stay(void **state) {
  (void)state;
  attn_model *model = load("llama");
  attn_prefix_cache *cache = make_cache(model, 2, NULL);
  int32_t tokens[3][PROMPT];
  for (int how = 0; how < 3; ++how) make_prompt(tokens[how], 0, how);
  assert_int_equal(serve(cache, model, tokens[0], PROMPT, true), 0);
  assert_int_equal(serve(cache, model, tokens[1], PROMPT, true), 0);
  assert_int_equal(serve(cache, model, tokens[0], PROMPT, false), PROMPT - 1);
  assert_int_equal(serve(cache, model, tokens[2], PROMPT, true), 0);
  assert_int_equal(serve(cache, model, tokens[1], PROMPT, false), 0);
  assert_int_equal(serve(cache, model, tokens[0], PROMPT, false), PROMPT - 1);
  attn_prefix_cache_destroy(cache);
  attn_model_destroy(model);
}

/* Sessions that are read to their last token, speculate there and are kept, over and over: the pool
 * has room for all that may be there at once. */
static void full_sessions_are_kept(void **state) {
  (void)state;
  enum { FULL = 128, SPECULATED = 20, ROUNDS = 30 };
  static const char *const kinds[] = {"llama", "mistral", "qwen3_next", "kimi_linear"};
  attn_sampling greedy = ATTN_SAMPLING_INIT;
  greedy.temperature = 0;
  for (int k = 0; k < 4; ++k) {
    attn_model *model = load(kinds[k]);
    attn_prefix_cache_options options = ATTN_PREFIX_CACHE_OPTIONS_INIT;
    attn_prefix_cache *cache;
    attn_random random = {.seed = 7 + (uint64_t)k};
    options.session.max_tokens = FULL;
    options.session.checkpoint_spacing = 64;
    options.session.forks = 1;
    options.entries = 3;
    assert_ok(attn_prefix_cache_create(model, &options, &cache));
    for (int round = 0; round < ROUNDS; ++round) {
      int32_t tokens[PROMPT];
      attn_session *session;
      attn_speculator *speculator;
      int64_t count = 50 + (int64_t)attn_random_below(&random, FULL - 50);
      make_prompt(tokens, 40 + (int)attn_random_below(&random, FULL - 40),
                  (int)attn_random_below(&random, 3));
      assert_ok(attn_prefix_cache_open(cache, tokens, count, &session));
      int64_t known = attn_session_position(session);
      assert_ok(attn_session_feed(session, tokens + known, count - known));
      assert_ok(attn_speculator_create(session, NULL, &speculator));
      while (attn_session_position(session) < FULL) {
        int32_t made[SPECULATED];
        assert_ok(attn_speculator_step(speculator, &greedy, SPECULATED, made, &count));
      }
      if (round % 5 == 0) assert_as_fresh(model, session);
      assert_ok(attn_prefix_cache_keep(cache, session));
      attn_speculator_destroy(speculator);
      attn_session_destroy(session);
    }
    assert_true(attn_prefix_cache_get_stats(cache).reused > 0);
    attn_prefix_cache_destroy(cache);
    attn_model_destroy(model);
  }
}

static void empty_directory(const char *path) {
  DIR *directory = opendir(path);
  char name[512];
  for (struct dirent *item; directory && (item = readdir(directory));) {
    snprintf(name, sizeof name, "%s/%s", path, item->d_name);
    unlink(name);
  }
  if (directory) closedir(directory);
  rmdir(path);
}

static void damage_files(const char *path) {
  DIR *directory = opendir(path);
  char name[512];
  for (struct dirent *item; (item = readdir(directory));) {
    snprintf(name, sizeof name, "%s/%s", path, item->d_name);
    FILE *file = fopen(name, "r+b");
    if (!file) continue;
    fseek(file, -100, SEEK_END);
    fputc('x', file);
    fputc('y', file);
    fclose(file);
  }
  closedir(directory);
}

static void files_serve_later_caches(void **state) {
  (void)state;
  static const char *const kinds[] = {"llama", "kimi_linear"};
  for (int k = 0; k < 2; ++k) {
    char directory[] = "/tmp/attn-prefix-XXXXXX";
    assert_non_null(mkdtemp(directory));
    attn_model *model = load(kinds[k]), *other = load("mixtral");
    int32_t tokens[PROMPT];
    make_prompt(tokens, PROMPT, 0);
    attn_prefix_cache *cache = make_cache(model, 8, directory);
    assert_int_equal(serve(cache, model, tokens, PROMPT, true), 0);
    attn_prefix_cache_destroy(cache);

    cache = make_cache(model, 8, directory);
    assert_true(attn_prefix_cache_get_stats(cache).files > 0);
    assert_int_equal(serve(cache, model, tokens, PROMPT, true),
                     can_be_cut(kinds[k]) ? PROMPT - 1 : 256);
    attn_prefix_cache_destroy(cache);

    cache = make_cache(other, 8, directory); /* of another model: not for it */
    assert_int_equal(attn_prefix_cache_get_stats(cache).files, 0);
    attn_prefix_cache_destroy(cache);

    damage_files(directory);
    cache = make_cache(model, 8, directory);
    assert_int_equal(serve(cache, model, tokens, PROMPT, false), 0);
    attn_prefix_cache_destroy(cache);
    empty_directory(directory);
    attn_model_destroy(model);
    attn_model_destroy(other);
  }
}

/* Of more files than may be there the oldest go, in whatever order the directory lists them. */
static void old_files_are_given_up(void **state) {
  (void)state;
  enum { FILES = 6, KEPT = 3 };
  char directory[] = "/tmp/attn-prefix-XXXXXX";
  assert_non_null(mkdtemp(directory));
  attn_model *model = load("llama");
  attn_prefix_cache_options options = ATTN_PREFIX_CACHE_OPTIONS_INIT;
  attn_prefix_cache *cache;
  int32_t tokens[FILES][PROMPT];
  options.session.max_tokens = 512;
  options.directory = directory;
  for (int i = 0; i < FILES; ++i) { /* written one after the other */
    make_prompt(tokens[i], 0, i);
    assert_ok(attn_prefix_cache_create(model, &options, &cache));
    assert_int_equal(serve(cache, model, tokens[i], PROMPT, true), 0);
    attn_prefix_cache_destroy(cache);
  }
  options.files = KEPT;
  assert_ok(attn_prefix_cache_create(model, &options, &cache));
  attn_prefix_cache_destroy(cache);
  assert_ok(attn_prefix_cache_create(model, &options, &cache));
  for (int i = 0; i < FILES; ++i)
    assert_int_equal(serve(cache, model, tokens[i], PROMPT, false),
                     i < FILES - KEPT ? 0 : PROMPT - 1);
  attn_prefix_cache_destroy(cache);
  empty_directory(directory);
  attn_model_destroy(model);
}

/* Sessions outlive the cache that made them. */
static void sessions_live_on(void **state) {
  (void)state;
  attn_model *model = load("minimax");
  attn_prefix_cache *cache = make_cache(model, 8, NULL);
  int32_t tokens[PROMPT];
  make_prompt(tokens, PROMPT, 0);
  attn_session *session;
  assert_int_equal(serve(cache, model, tokens, PROMPT, true), 0);
  assert_ok(attn_prefix_cache_open(cache, tokens, PROMPT, &session));
  attn_prefix_cache_destroy(cache);
  int64_t known = attn_session_position(session);
  assert_ok(attn_session_feed(session, tokens + known, PROMPT - known));
  assert_as_fresh(model, session);
  attn_session_destroy(session);
  attn_model_destroy(model);
}

/* A session of another family has pages elsewhere, and perhaps more tokens than there is room for.
 */
static void strangers_are_refused(void **state) {
  (void)state;
  for (int recurrent = 0; recurrent < 2; ++recurrent) {
    attn_model *model = recurrent ? make_recurrent() : load("llama");
    attn_prefix_cache *cache = make_cache(model, 8, NULL);
    attn_session *stranger;
    assert_ok(attn_session_create(model, NULL, &stranger));
    for (int i = 0; i < 3; ++i) {
      int32_t tokens[PROMPT];
      make_prompt(tokens, PROMPT, 0);
      assert_ok(attn_session_feed(stranger, tokens, PROMPT));
    }
    assert_int_equal(attn_prefix_cache_keep(cache, stranger), ATTN_INVALID_ARGUMENT);
    assert_int_equal(attn_prefix_cache_get_stats(cache).entries, 0);
    attn_session_destroy(stranger);
    attn_prefix_cache_destroy(cache);
    attn_model_destroy(model);
  }
}

static void count_plan(void *count, const attn_plan_info *info) {
  (void)info;
  ++*(int *)count;
}

/* Without checkpoints a kept recurrent state still serves: nothing is read again. */
static void states_serve_without_checkpoints(void **state) {
  (void)state;
  for (int in_files = 0; in_files < 2; ++in_files) {
    char directory[] = "/tmp/attn-prefix-XXXXXX";
    assert_non_null(mkdtemp(directory));
    attn_model *model = load("kimi_linear");
    attn_prefix_cache_options options = ATTN_PREFIX_CACHE_OPTIONS_INIT;
    attn_prefix_cache *cache;
    attn_session *session;
    int32_t tokens[PROMPT];
    int plans = 0;
    options.session.max_tokens = 512;
    options.session.checkpoints = 0;
    options.directory = in_files ? directory : NULL;
    make_prompt(tokens, PROMPT, 0);
    assert_ok(attn_prefix_cache_create(model, &options, &cache));
    assert_int_equal(serve(cache, model, tokens, PROMPT - 1, true), 0);
    if (in_files) {
      attn_prefix_cache_destroy(cache);
      assert_ok(attn_prefix_cache_create(model, &options, &cache));
    }
    assert_ok(attn_prefix_cache_open(cache, tokens, PROMPT, &session));
    assert_int_equal(attn_session_position(session), PROMPT - 1);
    attn_plan_cache_visit(attn_session_plans(session), count_plan, &plans);
    assert_int_equal(plans, 0); /* no layer has run */
    assert_ok(attn_session_feed(session, tokens + PROMPT - 1, 1));
    assert_as_fresh(model, session);
    attn_session_destroy(session);
    attn_prefix_cache_destroy(cache);
    attn_model_destroy(model);
    empty_directory(directory);
  }
}

int main(int argc, char **argv) {
  if (argc > 1) cmocka_set_test_filter(argv[1]); /* a pattern of names */
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(trees_match_a_plain_search),
      cmocka_unit_test(each_family),
      cmocka_unit_test(old_states_are_given_up),
      cmocka_unit_test(files_serve_later_caches),
      cmocka_unit_test(sessions_live_on),
      cmocka_unit_test(strangers_are_refused),
      cmocka_unit_test(states_serve_without_checkpoints),
      cmocka_unit_test(opened_states_stay),
      cmocka_unit_test(old_files_are_given_up),
      cmocka_unit_test(full_sessions_are_kept),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
