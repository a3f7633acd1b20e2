#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum { MESSAGE_SIZE = 1024 };
static _Thread_local char message[MESSAGE_SIZE];

const char *attn_status_name(attn_status status) {
  switch (status) {
  case ATTN_OK: return "ok";
  case ATTN_INVALID_ARGUMENT: return "invalid argument";
  case ATTN_INVALID_SHAPE: return "invalid shape";
  case ATTN_UNSUPPORTED: return "unsupported";
  case ATTN_OUT_OF_MEMORY: return "out of memory";
  case ATTN_IO_ERROR: return "input/output error";
  case ATTN_BAD_FORMAT: return "bad format";
  case ATTN_NOT_FOUND: return "not found";
  case ATTN_INTERRUPTED: return "interrupted";
  case ATTN_INTERNAL: return "internal error";
  }
  return "unknown status";
}

const char *attn_error_message(void) {
  return message;
}

const char *attn_version(void) {
  return ATTN_VERSION_STRING;
}

attn_status attn_fail(attn_status status, const char *format, ...) {
  char fresh[MESSAGE_SIZE]; /* an argument may be the present message */
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(fresh, sizeof fresh, format, arguments);
  va_end(arguments);
  memcpy(message, fresh, strlen(fresh) + 1);
  return status;
}

/* Writes text at `used` of the message, cut off at its end; returns where the text ends. */
static size_t put(size_t used, const char *text) {
  size_t length = strlen(text), room = MESSAGE_SIZE - 1 - used;
  if (length > room) length = room;
  memcpy(message + used, text, length);
  message[used + length] = 0;
  return used + length;
}

attn_status attn_fail_in(attn_status status, const char *format, ...) {
  char prefix[MESSAGE_SIZE], old[MESSAGE_SIZE];
  memcpy(old, message, sizeof old);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(prefix, sizeof prefix, format, arguments);
  va_end(arguments);
  put(put(put(0, prefix), ": "), old);
  return status;
}
