#include "support/test.h"

#include "base/random.h"

/* Known answers of Philox-4x32-10 published with Random123 (kat_vectors). */
static void philox_known_answers(void **state) {
  (void)state;
  static const struct {
    uint32_t counter[4], key[2], out[4];
  } cases[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
       {0xffffffff, 0xffffffff},
       {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i) {
    uint32_t out[4];
    attn_philox(cases[i].counter, cases[i].key, out);
    assert_memory_equal(out, cases[i].out, sizeof out);
  }
}

static void normal_has_its_moments(void **state) {
  (void)state;
  enum { COUNT = 200000 };
  attn_random random = {.seed = 7, .stream = 3};
  double sum = 0, squares = 0;
  for (int i = 0; i < COUNT; ++i) {
    double x = attn_random_normal(&random);
    sum += x;
    squares += x * x;
  }
  assert_true(sum / COUNT < 0.01 && sum / COUNT > -0.01); /* 4.5 standard errors */
  assert_true(squares / COUNT < 1.015 && squares / COUNT > 0.985);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(philox_known_answers),
                                     cmocka_unit_test(normal_has_its_moments)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
