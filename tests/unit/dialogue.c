/* Dialogues with facts: every answer was told as many turns before as is said, in one place; each
 * dialogue is a function of its number; bad options. */
#include "support/test.h"

#include "tasks/dialogue.h"

#include <string.h>

enum { COUNT = 40, TURNS = 6, LENGTH = ATTN_DIALOGUE_LENGTH, ROWS = TURNS * COUNT * LENGTH };

static const attn_dialogue_options options = {
    .keys = 9, .values = 5, .turns = TURNS, .farthest = 4};

static void answers_were_told(void **state) {
  (void)state;
  static int32_t tokens[ROWS], targets[ROWS], distances[TURNS * COUNT];
  int seen[TURNS] = {0}, values[5] = {0};
  assert_int_equal(attn_dialogue_vocabulary(&options), 4 + 9 + 5);
  assert_ok(attn_dialogue_generate(&options, 3, 10, COUNT, tokens, targets, distances));
  for (int b = 0; b < COUNT; ++b) {
    int told[32], when[32];
    memset(told, -1, sizeof told);
    for (int t = 0; t < TURNS; ++t) {
      const int32_t *turn = tokens + (t * COUNT + b) * LENGTH;
      const int32_t *target = targets + (t * COUNT + b) * LENGTH;
      assert_int_equal(turn[0], ATTN_DIALOGUE_BOS);
      assert_int_equal(turn[1], ATTN_DIALOGUE_QUERY);
      assert_int_equal(turn[5], ATTN_DIALOGUE_ANSWER);
      assert_int_equal(turn[7], ATTN_DIALOGUE_EOS);
      assert_in_range(turn[2], 4, 12);
      assert_in_range(turn[3], 13, 17);
      assert_int_equal(told[turn[2]], -1); /* a key is told once */
      told[turn[2]] = turn[3];
      when[turn[2]] = t;
      ++values[turn[3] - 13];
      assert_int_equal(told[turn[4]], turn[6]);
      int distance = distances[t * COUNT + b];
      assert_int_equal(t - when[turn[4]], distance);
      assert_in_range(distance, t > 0, t < 4 ? t : 4);
      ++seen[distance];
      for (int i = 0; i < LENGTH; ++i)
        assert_int_equal(target[i], i == ATTN_DIALOGUE_ASKED ? turn[6] : -1);
    }
  }
  for (int d = 0; d <= 4; ++d) assert_true(seen[d] > 5);
  for (int v = 0; v < 5; ++v) assert_true(values[v] > 20);
}

static void a_number_is_a_dialogue(void **state) {
  (void)state;
  static int32_t all[3][ROWS], one[3][TURNS * LENGTH];
  assert_ok(attn_dialogue_generate(&options, 3, 0, COUNT, all[0], all[1], all[2]));
  assert_ok(attn_dialogue_generate(&options, 3, 17, 1, one[0], one[1], one[2]));
  for (int t = 0; t < TURNS; ++t)
    assert_memory_equal(one[0] + t * LENGTH, all[0] + (t * COUNT + 17) * LENGTH,
                        LENGTH * sizeof(int32_t));
  assert_ok(attn_dialogue_generate(&options, 4, 17, 1, one[1], one[2], all[2]));
  assert_memory_not_equal(one[0], one[1], sizeof one[0]);
}

static void bad_options_are_refused(void **state) {
  (void)state;
  int32_t x[TURNS * LENGTH];
  const struct {
    attn_dialogue_options options;
    const char *says;
  } bad[] = {{{.keys = 0, .values = 5, .turns = 1, .farthest = 1}, "keys"},
             {{.keys = 4, .values = 0, .turns = 1, .farthest = 1}, "values"},
             {{.keys = 4, .values = 5, .turns = 5, .farthest = 1}, "turns"},
             {{.keys = 4, .values = 5, .turns = 4, .farthest = 0}, "farthest"}};
  for (int i = 0; i < 4; ++i) {
    assert_int_equal(attn_dialogue_generate(&bad[i].options, 1, 0, 1, x, x, x),
                     ATTN_INVALID_ARGUMENT);
    assert_non_null(strstr(attn_error_message(), bad[i].says));
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(answers_were_told),
      cmocka_unit_test(a_number_is_a_dialogue),
      cmocka_unit_test(bad_options_are_refused),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
