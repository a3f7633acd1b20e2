/* Reporting errors: set the thread's message and return the code. */
#ifndef ATTN_BASE_STATUS_H
#define ATTN_BASE_STATUS_H

#include "attn/base.h"

/* Formats the message and returns `status`:
 *   return attn_fail(ATTN_INVALID_SHAPE, "k has %d heads, q has %d", ...); */
attn_status attn_fail(attn_status status, const char *format, ...) ATTN_PRINTF(2, 3);
/* Puts "prefix: " in front of the current message, for callers that know more (a file, a tensor).
 */
attn_status attn_fail_in(attn_status status, const char *format, ...) ATTN_PRINTF(2, 3);

#define ATTN_TRY(expression)                                                                       \
  do {                                                                                             \
    attn_status attn_try_status_ = (expression);                                                   \
    if (attn_try_status_ != ATTN_OK) return attn_try_status_;                                      \
  } while (0)

#endif
