/* Messages on the way: warnings and notes that are no errors.
 *
 * The library never prints. A long operation takes an attn_log from its caller and hands each
 * message to it; a zeroed one, or NULL, drops them. There is no global logger. */
#ifndef ATTN_BASE_LOG_H
#define ATTN_BASE_LOG_H

#include "attn/base.h"

typedef enum attn_log_level {
  ATTN_LOG_ERROR = 0, /* something failed, and the operation goes on without it */
  ATTN_LOG_WARNING,   /* works, but perhaps not as meant */
  ATTN_LOG_INFO,
  ATTN_LOG_DEBUG,
} attn_log_level;

typedef struct attn_log {
  /* One message without a line break; valid during the call only. Called on the thread that runs
   * the operation. */
  void (*write)(void *context, attn_log_level level, const char *message);
  void *context;
  attn_log_level most; /* messages above this level are dropped unformatted */
} attn_log;

const char *attn_log_level_name(attn_log_level level); /* "error", "warning", "info", "debug" */
attn_status attn_log_level_parse(const char *name, attn_log_level *level);

/* Keeps the thread's error message (attn_error_message) as it is. */
void attn_log_print(const attn_log *log, attn_log_level level, const char *format, ...)
    ATTN_PRINTF(3, 4);

#endif
