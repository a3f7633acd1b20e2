/* Every task: a solver that knows the rule and sees the inputs alone, up to the position that is
 * asked, gives every label; examples depend on seed, part and number alone; options that do not fit
 * are refused. tests/unit/mqar.c has more about that task. */
#include "support/test.h"

#include "base/fault.h"
#include "base/memory.h"
#include "tasks/task.h"

#include <math.h>
#include <string.h>

enum { MOST_LENGTH = 4096, EXAMPLES = 200 };

static const attn_task *find(const char *name) {
  const attn_task *task;
  assert_ok(attn_task_find(name, &task));
  return task;
}

/* Solvers ---------------------------------------------------------------------------------------
 * What has to be given after inputs[0 .. t], where something is asked. */

typedef int32_t solver(const attn_task_options *options, const int32_t *inputs, int64_t t);

static int32_t recall(const attn_task_options *o, const int32_t *inputs, int64_t t) {
  for (int64_t i = 0; i < o->pairs; ++i)
    if (inputs[2 * i] == inputs[t]) return inputs[2 * i + 1];
  return -2;
}

/* Of as many symbols as there were delimiters. */
static int32_t copy(const attn_task_options *o, const int32_t *inputs, int64_t t) {
  int32_t delimiter = (int32_t)o->vocabulary - 1;
  int64_t asked = 0, seen = 0;
  for (int64_t i = 0; i <= t; ++i) asked += inputs[i] == delimiter;
  for (int64_t i = 0; i <= t; ++i)
    if (inputs[i] != 0 && inputs[i] != delimiter && ++seen == asked) return inputs[i];
  return -2;
}

static int32_t count_ones(const attn_task_options *o, const int32_t *inputs, int64_t t) {
  int64_t ones = 0;
  (void)o;
  for (int64_t i = 0; i <= t; ++i) ones += inputs[i];
  return ones % 2;
}

/* All words of `n` different letters in the order of a dictionary, by trying all words. */
static int list_words(int n, int words[][5]) {
  int count = 0, word[5], numbers = 1;
  for (int i = 0; i < n; ++i) numbers *= n;
  for (int number = 0; number < numbers; ++number) {
    int used = 0;
    for (int i = n - 1, rest = number; i >= 0; --i, rest /= n) used |= 1 << (word[i] = rest % n);
    if (used == (1 << n) - 1) memcpy(words[count++], word, sizeof word);
  }
  return count;
}

/* Follows each thing through all permutations. */
static int32_t follow(const attn_task_options *o, const int32_t *inputs, int64_t t) {
  int words[120][5], n = o->vocabulary >= 120 ? 5 : 3, count = list_words(n, words), end[5] = {0};
  for (int x = 0; x < n; ++x) {
    end[x] = x;
    for (int64_t i = 0; i <= t; ++i) end[x] = words[inputs[i]][end[x]];
  }
  for (int w = 0; w < count; ++w)
    if (memcmp(words[w], end, (size_t)n * sizeof *end) == 0) return w;
  return -2;
}

/* Goes back to the question; finds the mark that its name follows, or the only one. */
static int32_t search(const int32_t *inputs, int64_t t, int named) {
  enum { MARK = 10, QUESTION = 11 };
  int64_t question = t;
  while (question >= 0 && inputs[question] != QUESTION) --question;
  if (question < 0) return -2;
  for (int64_t i = 0; i < question; ++i)
    if (inputs[i] == MARK && (!named || inputs[i + 1] == inputs[question + 1]))
      return inputs[i + 1 + t - question];
  return -2;
}

static int32_t find_key(const attn_task_options *o, const int32_t *inputs, int64_t t) {
  (void)o;
  return search(inputs, t, 0);
}

static int32_t find_needle(const attn_task_options *o, const int32_t *inputs, int64_t t) {
  (void)o;
  return search(inputs, t, 1);
}

static int compare_ints(const void *a, const void *b) {
  return *(const int *)a - *(const int *)b;
}

/* Reads the expression at *at from the left; -100 where it is none. */
static int read_expression(const int32_t *inputs, int64_t end, int64_t *at) {
  int values[10], count = 0, sum = 0, symbol = *at < end ? inputs[(*at)++] : 0;
  if (symbol >= 1 && symbol <= 10) return symbol - 1;
  if (symbol < 11 || symbol > 14) return -100;
  while (*at < end && inputs[*at] != 15 && count < 10)
    values[count++] = read_expression(inputs, end, at);
  if (*at == end || inputs[(*at)++] != 15 || count < 2) return -100;
  qsort(values, (size_t)count, sizeof *values, compare_ints);
  for (int i = 0; i < count; ++i) sum += values[i];
  const int results[] = {values[0], values[count - 1],
                         (values[(count - 1) / 2] + values[count / 2]) / 2, sum % 10};
  return results[symbol - 11];
}

static int32_t read_all(const attn_task_options *o, const int32_t *inputs, int64_t t) {
  int64_t at = 0;
  (void)o;
  while (at < t && inputs[at] == 0) ++at;
  int value = read_expression(inputs, t + 1, &at);
  return at == t + 1 ? (int32_t)value + 1 : -2;
}

/* SplitMix64, and the words of the texts, from their recipe. */
static uint64_t mix(uint64_t z) {
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

static uint64_t draw(uint64_t *state, uint64_t n) {
  return (mix(*state += 0x9E3779B97F4A7C15u) >> 32) * n >> 32;
}

enum { LEXICON = 656 };
static const char (*lexicon(void))[8] {
  static char words[LEXICON][8];
  if (words[0][0]) return (const char(*)[8])words;
  uint64_t state = mix(mix(1 + 0x9E3779B97F4A7C15u) ^ ((uint64_t)7 << 40 | 1));
  for (int w = 0; w < LEXICON;) {
    char word[8] = "";
    int letters = 2 + (int)draw(&state, 6), i = 0;
    while (i < letters) word[i++] = (char)('a' + draw(&state, 26));
    for (i = 0; i < w && strcmp(words[i], word) != 0;) ++i;
    if (i == w) memcpy(words[w++], word, sizeof word);
  }
  return (const char(*)[8])words;
}

/* The number of the word at *at, behind which *at goes; -1 at the end. */
static int read_word(const int32_t *inputs, int64_t end, int64_t *at) {
  char word[8] = "";
  int letters = 0;
  if (*at < end && inputs[*at] == ' ') ++*at;
  while (*at < end && inputs[*at] >= 'a' && inputs[*at] <= 'z' && letters < 7)
    word[letters++] = (char)inputs[(*at)++];
  for (int w = 0; letters && w < LEXICON; ++w)
    if (strcmp(lexicon()[w], word) == 0) return w;
  return -1;
}

static int32_t weigh_opinion(const attn_task_options *o, const int32_t *inputs, int64_t t) {
  int64_t at = 0;
  int balance = 0, last_negation = -9, n = 0;
  (void)o;
  for (int w; (w = read_word(inputs, t + 1, &at)) >= 0; ++n) {
    int sign = w < 16 ? 1 : w < 32 ? -1 : 0;
    if (w >= 256) return -2; /* no topics here */
    balance += n - last_negation <= 3 ? -sign : sign;
    if (w >= 32 && w < 36) last_negation = n;
  }
  return balance > 0 ? 2 : balance < 0 ? 1 : -2;
}

/* By the topics that are in both: most of those of a long text are in it. */
static int32_t compare_topics(const attn_task_options *o, const int32_t *inputs, int64_t t) {
  bool in[2][LEXICON] = {{false}};
  int64_t at = 0, middle = (o->length - 1) / 2;
  int both = 0;
  for (int w; (w = read_word(inputs, middle, &at)) >= 0;) in[0][w] = w >= 256;
  if (inputs[middle] != 1) return -2;
  at = middle + 1;
  for (int w; (w = read_word(inputs, t + 1, &at)) >= 0;) in[1][w] = w >= 256;
  for (int w = 0; w < LEXICON; ++w) both += in[0][w] && in[1][w];
  return both > 1 ? 2 : 1;
}

/* The tasks -------------------------------------------------------------------------------------
 */

typedef struct test_task {
  const char *name;
  solver *solve;
  attn_task_options options;
  int labels; /* of an example */
} test_task;

static const test_task tests[] = {
    {"mqar", recall, {.vocabulary = 50, .pairs = 8}, 8},
    {"mqar", recall, {.vocabulary = 50, .pairs = 8, .power = 1, .zeros = true}, 8},
    {"copying", copy, {.vocabulary = 9, .length = 60, .pairs = 11}, 11},
    {"copying", copy, {.vocabulary = 4, .length = 2, .pairs = 1}, 1},
    {"selective_copying", copy, {.vocabulary = 9, .length = 60, .pairs = 11}, 11},
    {"selective_copying", copy, {.vocabulary = 4, .length = 10, .pairs = 5}, 5},
    {"parity", count_ones, {.length = 40}, 40},
    {"permutations", follow, {.vocabulary = 120, .length = 30}, 30},
    {"permutations", follow, {.vocabulary = 6, .length = 30}, 30},
    {"passkey", find_key, {.vocabulary = 40, .length = 60, .pairs = 7}, 7},
    {"passkey", find_key, {.vocabulary = 13, .length = 3, .pairs = 1}, 1},
    {"niah1", find_needle, {.vocabulary = 100, .length = 100}, 4},
    {"niah2", find_needle, {.vocabulary = 14, .length = 11}, 4},
    {"niah2", find_needle, {.vocabulary = 60, .length = 100}, 4},
    {"niah3", find_needle, {.vocabulary = 40, .length = 100, .pairs = 9}, 4},
    {"niah3", find_needle, {.vocabulary = 24, .length = 41, .pairs = 6}, 4}, /* no filler at all */
    {"listops", read_all, {.length = 128}, 1},
    {"listops", read_all, {.length = 50}, 1},
    {"listops", read_all, {.length = 10}, 1},
    {"text", weigh_opinion, {.length = 1024}, 1},
    {"text", weigh_opinion, {.length = 64}, 1},
    {"retrieval", compare_topics, {.length = 4001}, 1},
};
enum { TESTS = sizeof tests / sizeof *tests };

typedef struct examples {
  int32_t inputs[EXAMPLES * MOST_LENGTH], labels[EXAMPLES * MOST_LENGTH];
} examples;

static attn_task_options make(const test_task *test, uint64_t seed, attn_task_part part,
                              int64_t first, int64_t count, examples *e) {
  attn_task_options options = test->options;
  assert_ok(attn_task_settle(find(test->name), &options));
  assert_true(options.length <= MOST_LENGTH && count <= EXAMPLES);
  assert_ok(attn_task_generate(find(test->name), &test->options, seed, part, first, count,
                               e->inputs, e->labels));
  return options;
}

static void solvers_find_every_label(void **state) {
  (void)state;
  static examples e;
  for (int i = 0; i < TESTS; ++i) {
    attn_task_options o = make(&tests[i], 3, ATTN_TASK_TEST, 0, EXAMPLES, &e);
    for (int64_t row = 0; row < EXAMPLES * o.length; row += o.length) {
      int labels = 0;
      for (int64_t t = 0; t < o.length; ++t) {
        int32_t token = e.inputs[row + t], label = e.labels[row + t];
        assert_true(token >= 0 && token < o.vocabulary && label < o.vocabulary);
        if (label == ATTN_NO_LABEL) continue;
        ++labels;
        int32_t found = tests[i].solve(&o, e.inputs + row, t);
        if (found != label)
          fail_msg("%s: example %d, position %d: %d, the solver has %d", tests[i].name,
                   (int)(row / o.length), (int)t, label, found);
      }
      assert_int_equal(labels, tests[i].labels);
    }
  }
}

/* Or tests of its own, in image_tasks.c. */
static bool has_solver(const char *name) {
  if (strcmp(name, "digits") == 0 || strcmp(name, "pathfinder") == 0) return true;
  for (int i = 0; i < TESTS; ++i)
    if (strcmp(tests[i].name, name) == 0) return true;
  return false;
}

static void table_is_whole(void **state) {
  (void)state;
  const attn_task *task;
  int i = 0;
  for (; attn_task_at(i); ++i) {
    task = attn_task_at(i);
    assert_string_equal(task->name, attn_task_names[i]);
    if (!has_solver(task->name)) fail_msg("%s has no solver here", task->name);
    attn_task_options usual = {0};
    assert_ok(attn_task_settle(task, &usual));
    assert_memory_equal(&usual, &task->usual, sizeof usual);
    assert_true(task->chance(&usual) > 0 && task->chance(&usual) <= 0.5);
  }
  assert_null(attn_task_names[i]);
  assert_null(attn_task_at(-1));
  assert_int_equal(attn_task_find("recite", &task), ATTN_NOT_FOUND);
  assert_non_null(strstr(attn_error_message(), "recite"));
  assert_non_null(strstr(attn_error_message(), "selective_copying"));
}

static void examples_depend_on_seed_and_number(void **state) {
  (void)state;
  enum { FEW = 16 };
  static examples all, one, other;
  for (int i = 0; i < TESTS; ++i) {
    attn_task_options o = make(&tests[i], 5, ATTN_TASK_TEST, 0, FEW, &all);
    size_t row = (size_t)o.length, bytes = row * sizeof *all.inputs;
    for (int e = 0; e < FEW; ++e) {
      make(&tests[i], 5, ATTN_TASK_TEST, e, 1, &one);
      assert_memory_equal(all.inputs + (size_t)e * row, one.inputs, bytes);
      assert_memory_equal(all.labels + (size_t)e * row, one.labels, bytes);
    }
    make(&tests[i], 6, ATTN_TASK_TEST, 0, FEW, &other);
    assert_memory_not_equal(all.inputs, other.inputs, FEW * bytes);
  }
}

/* No part has an example of another one: of examples so long that none comes twice by chance. */
static void parts_are_disjoint(void **state) {
  (void)state;
  enum { FEW = 16 };
  static examples parts[3];
  for (int i = 0; i < TESTS; ++i) {
    int64_t length = tests[i].options.length;
    if (length && length < 30) continue;
    size_t row = 0;
    for (int part = ATTN_TASK_TRAINING; part <= ATTN_TASK_TEST; ++part)
      row = (size_t)make(&tests[i], 5, (attn_task_part)part, 0, FEW, &parts[part]).length;
    for (int pair = 0; pair < 3 * FEW * FEW; ++pair)
      assert_memory_not_equal(parts[pair % 3].inputs + (size_t)(pair / 3 % FEW) * row,
                              parts[(pair + 1) % 3].inputs + (size_t)(pair / 3 / FEW) * row,
                              row * sizeof(int32_t));
  }
}

/* Distributions ---------------------------------------------------------------------------------
 * Counts of `draws` draws that fall into `classes` classes alike: chi-square has the expectation
 * classes - 1 and the deviation sqrt(2 x that). */

/* Of Long Range Arena's own sizes: 17.1 % of the values are 0 and 16.8 % are 9 of 20 000
 * expressions (deviation of 1 500: 1 %), and their mean length is 1 036 (of 1 500: 10). */
static void listops_is_that_of_long_range_arena(void **state) {
  (void)state;
  enum { LENGTH = 2000, COUNT = 1500, SOME = 50 };
  int32_t *inputs = malloc(2 * SOME * LENGTH * sizeof *inputs), *labels = inputs + SOME * LENGTH;
  double zeros = 0, nines = 0, tokens = 0;
  const attn_task_options o = {.length = LENGTH};
  for (int first = 0; first < COUNT; first += SOME) {
    assert_ok(attn_task_generate(find("listops"), &o, 1, ATTN_TASK_TRAINING, first, SOME, inputs,
                                 labels));
    for (int64_t i = 0; i < SOME * LENGTH; ++i) tokens += inputs[i] != 0;
    for (int64_t row = 0; row < SOME; ++row) {
      zeros += labels[row * LENGTH + LENGTH - 1] == 1;
      nines += labels[row * LENGTH + LENGTH - 1] == 10;
    }
  }
  free(inputs);
  assert_true(fabs(zeros / COUNT - 0.171) < 0.04);
  assert_true(fabs(nines / COUNT - 0.168) < 0.04);
  assert_true(fabs(tokens / COUNT - 1036) < 40);
}

static void assert_uniform(const char *what, const int *counts, int classes) {
  double draws = 0, chi = 0;
  for (int c = 0; c < classes; ++c) draws += counts[c];
  for (int c = 0; c < classes; ++c) {
    double expected = draws / classes;
    chi += (counts[c] - expected) * (counts[c] - expected) / expected;
  }
  if (chi > classes - 1 + 5 * sqrt(2 * (classes - 1.0)))
    fail_msg("%s: chi-square %g of %d classes", what, chi, classes);
}

static void permutations_are_drawn_alike(void **state) {
  (void)state;
  static examples e;
  test_task test = {"permutations", NULL, {.vocabulary = 120, .length = 120}, 0};
  int counts[120] = {0};
  make(&test, 1, ATTN_TASK_TRAINING, 0, EXAMPLES, &e);
  for (int i = 0; i < EXAMPLES * 120; ++i) ++counts[e.inputs[i]];
  assert_uniform("permutations", counts, 120);
}

/* The places of one symbol, and of one needle, among what surrounds them. */
static void places_are_drawn_alike(void **state) {
  (void)state;
  static examples e;
  test_task copying = {"selective_copying", NULL, {.vocabulary = 9, .length = 25, .pairs = 5}, 0};
  test_task passkey = {"passkey", NULL, {.vocabulary = 40, .length = 32, .pairs = 3}, 0};
  int symbols[20] = {0}, depths[32 - 3 - 4 + 1] = {0};
  for (int part = 0; part < 10; ++part) {
    make(&copying, 1, ATTN_TASK_TRAINING, part * EXAMPLES, EXAMPLES, &e);
    for (int i = 0; i < EXAMPLES; ++i)
      for (int t = 0; t < 20; ++t) symbols[t] += e.inputs[25 * i + t] != 0;
    make(&passkey, 1, ATTN_TASK_TRAINING, part * EXAMPLES, EXAMPLES, &e);
    for (int i = 0; i < EXAMPLES; ++i)
      for (int t = 0; t < 26; ++t) depths[t] += e.inputs[32 * i + t] == 10;
  }
  assert_uniform("symbols", symbols, 20);
  assert_uniform("depths", depths, 26);
}

/* Which of the needles is asked for, and that the sentence of niah1 goes on behind the needle. */
static void haystacks(void **state) {
  (void)state;
  static examples e;
  test_task several = {"niah3", NULL, {.vocabulary = 40, .length = 64, .pairs = 4}, 0};
  int asked[4] = {0};
  make(&several, 1, ATTN_TASK_TRAINING, 0, EXAMPLES, &e);
  for (int i = 0; i < EXAMPLES; ++i) {
    const int32_t *x = e.inputs + 64 * i;
    for (int t = 0, needle = 0; t < 59; ++t)
      if (x[t] == 10 && needle++ < 4) asked[needle - 1] += x[t + 1] == x[60];
  }
  assert_int_equal(asked[0] + asked[1] + asked[2] + asked[3], EXAMPLES);
  assert_uniform("needles", asked, 4);

  test_task single = {"niah1", NULL, {.vocabulary = 112, .length = 100}, 0};
  make(&single, 1, ATTN_TASK_TRAINING, 0, EXAMPLES, &e);
  for (int i = 0; i < EXAMPLES; ++i) {
    const int32_t *x = e.inputs + 100 * i;
    for (int t = 0, filler = 0; t < 95; ++t) {
      if (x[t] == 10) t += 6;
      if (t < 95) assert_int_equal(x[t], 62 + filler++ % 24);
    }
  }
}

/* The convention of products, by hand: 3 = (1 2 0), 1 = (0 2 1); 1 after 3 sends 0 to 2, 1 to 1. */
static void what_is_read_last_is_applied_last(void **state) {
  (void)state;
  static examples e;
  test_task test = {"permutations", NULL, {.vocabulary = 6, .length = 2}, 0};
  bool seen = false;
  make(&test, 1, ATTN_TASK_TEST, 0, EXAMPLES, &e);
  for (int i = 0; i < EXAMPLES; ++i)
    if (e.inputs[2 * i] == 3 && e.inputs[2 * i + 1] == 1) {
      assert_int_equal(e.labels[2 * i], 3);
      assert_int_equal(e.labels[2 * i + 1], 5); /* (2 1 0) */
      seen = true;
    }
  assert_true(seen);
}

/* Refusals --------------------------------------------------------------------------------------
 */

static void wrong_options_are_refused(void **state) {
  (void)state;
  static const struct {
    const char *name, *word;
    attn_task_options options;
  } wrong[] = {
      {"mqar", "vocabulary", {.vocabulary = 3}},
      {"mqar", "pairs", {.vocabulary = 16, .pairs = 8}},
      {"copying", "vocabulary", {.vocabulary = 3}},
      {"copying", "pairs", {.pairs = 33}},
      {"copying", "pairs", {.pairs = -1}},
      {"copying", "power", {.power = 1}},
      {"selective_copying", "zeros", {.zeros = true}},
      {"selective_copying", "length", {.length = 10, .pairs = 6}},
      {"parity", "pairs", {.pairs = 1}},
      {"parity", "length", {.length = -1}},
      {"parity", "vocabulary", {.vocabulary = 1}},
      {"parity", "length", {.length = (int64_t)1 << 31}},
      {"parity", "vocabulary", {.vocabulary = (int64_t)1 << 31}},
      {"permutations", "vocabulary", {.vocabulary = 5}},
      {"permutations", "pairs", {.pairs = 2}},
      {"passkey", "vocabulary", {.vocabulary = 12}},
      {"passkey", "length", {.length = 10}},
      {"niah1", "pairs", {.pairs = 2}},
      {"niah2", "vocabulary", {.vocabulary = 13}},
      {"niah2", "length", {.length = 10}},
      {"niah3", "pairs", {.vocabulary = 20, .length = 100, .pairs = 5}},
      {"niah3", "length", {.length = 28, .pairs = 4}},
  };
  int32_t inputs[1], labels[1];
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; ++i) {
    attn_status status = attn_task_generate(find(wrong[i].name), &wrong[i].options, 1,
                                            ATTN_TASK_TEST, 0, 1, inputs, labels);
    const char *message = attn_error_message();
    if (status != ATTN_INVALID_ARGUMENT || !strstr(message, wrong[i].name) ||
        !strstr(message, wrong[i].word))
      fail_msg("case %d: expected %s and %s in: %s", (int)i, wrong[i].name, wrong[i].word, message);
  }
}

static void out_of_memory_is_an_error(void **state) {
  (void)state;
  static examples e;
  for (int i = 0; attn_task_at(i); ++i) {
    const attn_task *task = attn_task_at(i);
    size_t live = attn_memory_get_stats().live_bytes;
    if (!task->scratch) continue;
    attn_fault_arm(ATTN_FAULT_ALLOC, 0);
    attn_status status =
        attn_task_generate(task, &task->usual, 1, ATTN_TASK_TEST, 0, 1, e.inputs, e.labels);
    attn_fault_disarm(ATTN_FAULT_ALLOC);
    assert_int_equal(status, ATTN_OUT_OF_MEMORY);
    assert_int_equal(attn_memory_get_stats().live_bytes, live);
  }
}

int main(void) {
  const struct CMUnitTest all[] = {
      cmocka_unit_test(solvers_find_every_label),
      cmocka_unit_test(listops_is_that_of_long_range_arena),
      cmocka_unit_test(table_is_whole),
      cmocka_unit_test(examples_depend_on_seed_and_number),
      cmocka_unit_test(parts_are_disjoint),
      cmocka_unit_test(permutations_are_drawn_alike),
      cmocka_unit_test(places_are_drawn_alike),
      cmocka_unit_test(haystacks),
      cmocka_unit_test(what_is_read_last_is_applied_last),
      cmocka_unit_test(wrong_options_are_refused),
      cmocka_unit_test(out_of_memory_is_an_error),
  };
  return cmocka_run_group_tests(all, NULL, NULL);
}
