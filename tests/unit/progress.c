/* Progress, formats and the log. */
#include "support/test.h"

#include "base/log.h"
#include "base/progress.h"
#include "base/status.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static void formats(void **state) {
  (void)state;
  static const struct {
    const char *(*format)(double value, char *text, size_t size);
    double value;
    const char *expected;
  } cases[] = {
      {attn_format_duration, 0, "0.0 s"},
      {attn_format_duration, 9.94, "9.9 s"},
      {attn_format_duration, 9.97, "10 s"},
      {attn_format_duration, 59.4, "59 s"},
      {attn_format_duration, 59.6, "1 min 00 s"},
      {attn_format_duration, 200, "3 min 20 s"},
      {attn_format_duration, 3599.7, "1 h 00 min"},
      {attn_format_duration, 3660, "1 h 01 min"},
      {attn_format_duration, 90000, "1 d 01 h"},
      {attn_format_duration, -1, "?"},
      {attn_format_duration, NAN, "?"},
      {attn_format_duration, 1e300, "?"},
      {attn_format_count, 0, "0"},
      {attn_format_count, 950, "950"},
      {attn_format_count, 12.345, "12.3"},
      {attn_format_count, 999.6, "1.00k"},
      {attn_format_count, 1250000, "1.25M"},
      {attn_format_count, 999600, "1.00M"},
      {attn_format_count, 1e300, "1.00e+288T"},
      {attn_format_count, INFINITY, "?"},
      {attn_format_bytes, 512, "512 B"},
      {attn_format_bytes, 1536, "1.50 KiB"},
      {attn_format_bytes, 1023 * 1024.0, "1023 KiB"},
      {attn_format_bytes, 1.5 * (1 << 30), "1.50 GiB"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i) {
    char text[ATTN_FORMAT_SIZE];
    assert_string_equal(cases[i].format(cases[i].value, text, sizeof text), cases[i].expected);
  }
}

static void rate_and_time_left(void **state) {
  (void)state;
  attn_progress p = attn_progress_start(1000, 200, 50); /* resumed at 200 */
  assert_true(attn_progress_fraction(&p) == 0.2);
  assert_true(attn_progress_rate(&p) == 0 && attn_progress_left(&p) == -1);
  for (int i = 1; i <= 10; ++i) attn_progress_update(&p, 200 + 20 * i, 50 + i);
  assert_true(fabs(attn_progress_rate(&p) - 20) < 1e-9); /* steady: exact from the first on */
  assert_true(fabs(attn_progress_left(&p) - 30) < 1e-9);
  attn_progress before = p;
  attn_progress_update(&p, 500, 60); /* no time has passed */
  attn_progress_update(&p, 300, 70); /* backwards */
  attn_progress_update(&p, 500, 40); /* backwards */
  assert_memory_equal(&before, &p, sizeof p);
  for (int i = 1; i <= 300; ++i) attn_progress_update(&p, 400 + i, 60 + i);
  assert_true(fabs(attn_progress_rate(&p) - 1) < 0.01); /* the old rate is forgotten */
  attn_progress_update(&p, 2000, 400);
  assert_true(attn_progress_fraction(&p) == 1 && attn_progress_left(&p) == 0);
  attn_progress none = attn_progress_start(0, 0, 0);
  assert_true(attn_progress_fraction(&none) == 0);
}

static void lines(void **state) {
  (void)state;
  char line[200];
  attn_progress p = attn_progress_start(1000, 0, 0);
  attn_progress_update(&p, 500, 10);
  assert_string_equal(attn_progress_format(&p, "tokens", "loss 1.5", 80, line, sizeof line),
                      "[############------------]  50%  50 tokens/s  10 s left  loss 1.5");
  assert_string_equal(attn_progress_format(&p, "tokens", NULL, 38, line, sizeof line),
                      " 50%  50 tokens/s  10 s left");
  assert_string_equal(attn_progress_format(&p, "tokens", NULL, 10, line, sizeof line),
                      " 50%  50 t");
  for (int columns = 1; columns < 120; ++columns) {
    attn_progress_format(&p, "tokens", "loss 1.5  rate 3e-4", columns, line, sizeof line);
    assert_true(strlen(line) <= (size_t)columns);
  }
  attn_progress_format(&p, "tokens", "x", 80, line, 8);
  assert_int_equal(strlen(line), 7);
  char details[2000];
  memset(details, 'x', sizeof details);
  details[1999] = '\0';
  attn_progress_format(&p, "tokens", details, 5000, line, sizeof line);
  assert_int_equal(strlen(line), sizeof line - 1);
}

typedef struct record {
  int count;
  attn_log_level level;
  char message[64];
} record;

static void keep(void *context, attn_log_level level, const char *message) {
  record *r = context;
  ++r->count;
  r->level = level;
  snprintf(r->message, sizeof r->message, "%s", message);
}

static void logging(void **state) {
  (void)state;
  record r = {0};
  attn_log log = {.write = keep, .context = &r, .most = ATTN_LOG_INFO}, silent = {0};
  attn_fail(ATTN_INTERNAL, "an earlier error");
  attn_log_print(&log, ATTN_LOG_WARNING, "%d of %s", 3, "them");
  assert_int_equal(r.count, 1);
  assert_int_equal(r.level, ATTN_LOG_WARNING);
  assert_string_equal(r.message, "3 of them");
  attn_log_print(&log, ATTN_LOG_DEBUG, "not this");
  attn_log_print(&silent, ATTN_LOG_ERROR, "not this");
  attn_log_print(NULL, ATTN_LOG_ERROR, "not this");
  assert_int_equal(r.count, 1);
  assert_string_equal(attn_error_message(), "an earlier error");
  for (int i = 0; i <= ATTN_LOG_DEBUG; ++i) {
    attn_log_level level;
    assert_ok(attn_log_level_parse(attn_log_level_name((attn_log_level)i), &level));
    assert_int_equal(level, i);
  }
  attn_log_level level;
  assert_int_equal(attn_log_level_parse("loud", &level), ATTN_INVALID_ARGUMENT);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(formats),
                                     cmocka_unit_test(rate_and_time_left), cmocka_unit_test(lines),
                                     cmocka_unit_test(logging)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
