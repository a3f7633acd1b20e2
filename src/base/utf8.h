/* Bytes as they are sampled, as text that may be shown: complete UTF-8 sequences only. */
#ifndef ATTN_BASE_UTF8_H
#define ATTN_BASE_UTF8_H

#include "base/text.h"

typedef struct attn_utf8 {
  bool for_terminal; /* control characters that a terminal would obey are replaced too */
  unsigned char bytes[4];
  int have, need;
} attn_utf8;

/* Appends to `out` what has become complete with this byte; a byte that cannot belong to a sequence
 * becomes U+FFFD. */
void attn_utf8_push(attn_utf8 *state, unsigned char byte, attn_text *out);
/* The end: what is incomplete becomes U+FFFD. */
void attn_utf8_finish(attn_utf8 *state, attn_text *out);

#endif
