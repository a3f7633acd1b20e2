#include "base/log.h"
#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static const char *const level_names[] = {"error", "warning", "info", "debug"};
enum { LEVELS = sizeof level_names / sizeof *level_names, LONGEST_MESSAGE = 2048 };

const char *attn_log_level_name(attn_log_level level) {
  return (unsigned)level < LEVELS ? level_names[level] : "unknown";
}

attn_status attn_log_level_parse(const char *name, attn_log_level *level) {
  for (int i = 0; name && i < LEVELS; ++i)
    if (strcmp(name, level_names[i]) == 0) {
      *level = (attn_log_level)i;
      return ATTN_OK;
    }
  return attn_fail(ATTN_INVALID_ARGUMENT,
                   "log level '%s' is unknown; known: error, warning, info, debug",
                   name ? name : "(null)");
}

void attn_log_print(const attn_log *log, attn_log_level level, const char *format, ...) {
  if (!log || !log->write || level > log->most) return;
  char message[LONGEST_MESSAGE];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  log->write(log->context, level, message);
}
