/* Base64 (RFC 4648, section 4), which JSON has bytes in. */
#ifndef ATTN_FILES_BASE64_H
#define ATTN_FILES_BASE64_H

#include "base/text.h"

/* Appends what `size` characters stand for. ATTN_BAD_FORMAT when one is foreign or padding is
 * missing: nothing is skipped. */
attn_status attn_base64_decode(const char *text, size_t size, attn_text *bytes);
void attn_base64_encode(const char *bytes, size_t size, attn_text *text);

#endif
