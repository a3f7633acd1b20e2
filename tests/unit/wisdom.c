/* Wisdom: kept between processes, merged, and never a reason to fail. */
#include "support/test.h"

#include "base/cpu.h"
#include "base/fault.h"
#include "base/memory.h"
#include "engines/plan.h"
#include "base/io.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char directory[64], path[128];

static int setup(void **state) {
  (void)state;
  snprintf(directory, sizeof directory, "/tmp/attn-wisdom-XXXXXX");
  if (!mkdtemp(directory)) return -1;
  snprintf(path, sizeof path, "%s/deep/er/wisdom", directory);
  setenv("ATTN_WISDOM", path, 1);
  attn_wisdom_reload();
  return 0;
}

static int teardown(void **state) {
  (void)state;
  attn_wisdom_reload();
  char command[160];
  snprintf(command, sizeof command, "rm -r '%s'", directory);
  return system(command);
}

static void get_contents(char **text) {
  assert_ok(attn_file_read(path, 1 << 20, text, NULL));
}

static bool contains(const char *part) {
  char *text;
  get_contents(&text);
  bool found = strstr(text, part) != NULL;
  attn_free(text);
  return found;
}

static void replace(const char *text) {
  assert_ok(attn_make_directories(directory));
  char *folder = attn_path_directory(path);
  assert_ok(attn_make_directories(folder));
  attn_free(folder);
  assert_ok(attn_file_write(path, text, strlen(text)));
}

static void kept_between_processes(void **state) {
  (void)state;
  int64_t values[4] = {64, -3, INT64_MAX, 0}, found[4] = {0};
  assert_false(attn_wisdom_lookup("softmax q1", found));
  assert_ok(attn_wisdom_record("softmax q1", values));
  assert_true(attn_wisdom_lookup("softmax q1", found));
  assert_memory_equal(found, values, sizeof values);
  assert_false(attn_path_exists(path)); /* recording alone writes nothing */
  assert_ok(attn_wisdom_save());
  attn_wisdom_reload();
  memset(found, 0, sizeof found);
  assert_true(attn_wisdom_lookup("softmax q1", found));
  assert_memory_equal(found, values, sizeof values);
  assert_false(attn_wisdom_lookup("softmax q", found));
  values[0] = 128;
  assert_ok(attn_wisdom_record("softmax q1", values));
  assert_ok(attn_wisdom_save());
  attn_wisdom_reload();
  assert_true(attn_wisdom_lookup("softmax q1", found));
  assert_int_equal(found[0], 128);
}

static void merged_with_what_is_there(void **state) {
  (void)state;
  int64_t values[4] = {1, 2, 3, 4}, found[4];
  assert_ok(attn_wisdom_record("mine", values));
  replace("attn wisdom 1\n5 6 7 8\tAnother processor\tmine\n");
  assert_ok(attn_wisdom_save());
  assert_true(contains("5 6 7 8\tAnother processor\tmine\n"));
  assert_true(contains("1 2 3 4\t"));
  assert_true(attn_wisdom_lookup("mine", found));
  assert_int_equal(found[0], 1);
  assert_ok(attn_wisdom_forget());
  assert_false(attn_wisdom_lookup("mine", found));
  assert_true(contains("Another processor"));
  assert_false(contains("1 2 3 4"));
}

static void malformed_lines_are_ignored(void **state) {
  (void)state;
  int64_t values[4] = {9, 9, 9, 9}, found[4];
  assert_ok(attn_wisdom_record("good", values));
  assert_ok(attn_wisdom_save());
  char *good, mixed[4096];
  get_contents(&good);
  snprintf(mixed, sizeof mixed,
           "attn wisdom 1\n\n\t\t\nnothing\n1 2 3\tp\tk\n1 2 3 4 5\tp\tk\n1 2 3 x\tp\tk\n"
           "1 2 3 4\t\tk\n1 2 3 4\tp\t\n1 2 3 4\tp\tk\textra\n%s1 2 3 4\tcut off",
           strchr(good, '\n') + 1);
  attn_free(good);
  replace(mixed);
  attn_wisdom_reload();
  assert_true(attn_wisdom_lookup("good", found));
  assert_ok(attn_wisdom_save());
  assert_false(contains("nothing"));
  assert_false(contains("extra"));
  replace("attn wisdom 999\n9 9 9 9\tp\tgood\n"); /* a later version: not ours to understand */
  attn_wisdom_reload();
  assert_false(attn_wisdom_lookup("good", found));
  replace("");
  attn_wisdom_reload();
  assert_false(attn_wisdom_lookup("good", found));
}

static void bad_keys_are_refused(void **state) {
  (void)state;
  int64_t values[4] = {0};
  char longest[1100];
  memset(longest, 'k', sizeof longest);
  longest[sizeof longest - 1] = '\0';
  const char *bad[] = {"", "a\nb", "a\tb", NULL, longest};
  for (size_t i = 0; i < sizeof bad / sizeof *bad; ++i)
    assert_int_equal(attn_wisdom_record(bad[i], values), ATTN_INVALID_ARGUMENT);
}

static void an_unwritable_place_is_an_error_and_loses_nothing(void **state) {
  (void)state;
  int64_t values[4] = {1, 1, 1, 1}, found[4];
  replace("attn wisdom 1\n5 6 7 8\tAnother processor\ttheirs\n");
  assert_ok(attn_wisdom_record("b", values));
  for (int64_t fault = 0;; ++fault) {
    attn_fault_arm(ATTN_FAULT_IO, fault);
    attn_status status = attn_wisdom_save();
    if (!attn_fault_disarm(ATTN_FAULT_IO)) break;
    assert_int_equal(status == ATTN_OK, contains("\tb\n"));
    assert_true(contains("\ttheirs\n")); /* whichever it is, nothing is lost */
    assert_true(attn_wisdom_lookup("b", found));
  }
  for (int64_t fault = 0;; ++fault) {
    attn_fault_arm(ATTN_FAULT_ALLOC, fault);
    attn_status status = attn_wisdom_save();
    if (!attn_fault_disarm(ATTN_FAULT_ALLOC)) break;
    if (status != ATTN_OK) assert_int_equal(status, ATTN_OUT_OF_MEMORY);
    assert_true(contains("\ttheirs\n"));
  }
}

static void the_place_follows_the_environment(void **state) {
  (void)state;
  char expected[160];
  int64_t values[4] = {1, 1, 1, 1};
  unsetenv("ATTN_WISDOM");
  setenv("XDG_CACHE_HOME", directory, 1);
  attn_wisdom_reload();
  assert_ok(attn_wisdom_record("a", values));
  assert_ok(attn_wisdom_save());
  snprintf(expected, sizeof expected, "%s/attn/wisdom", directory);
  assert_true(attn_path_exists(expected));
  setenv("XDG_CACHE_HOME", "relative", 1);
  setenv("HOME", directory, 1);
  assert_ok(attn_wisdom_save());
  snprintf(expected, sizeof expected, "%s/.cache/attn/wisdom", directory);
  assert_true(attn_path_exists(expected));
  unsetenv("HOME");
  assert_int_equal(attn_wisdom_save(), ATTN_NOT_FOUND);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_setup_teardown(kept_between_processes, setup, teardown),
      cmocka_unit_test_setup_teardown(merged_with_what_is_there, setup, teardown),
      cmocka_unit_test_setup_teardown(malformed_lines_are_ignored, setup, teardown),
      cmocka_unit_test_setup_teardown(bad_keys_are_refused, setup, teardown),
      cmocka_unit_test_setup_teardown(an_unwritable_place_is_an_error_and_loses_nothing, setup,
                                      teardown),
      cmocka_unit_test_setup_teardown(the_place_follows_the_environment, setup, teardown),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
