#include "files/base64.h"
#include "base/status.h"

#include <string.h>

static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
enum { GROUP = 4, BYTES = 3 }; /* so many digits for so many bytes */

static int value_of(char digit) {
  const char *place = memchr(digits, digit, sizeof digits - 1);
  return place ? (int)(place - digits) : -1;
}

attn_status attn_base64_decode(const char *text, size_t size, attn_text *bytes) {
  if (size % GROUP)
    return attn_fail(ATTN_BAD_FORMAT, "base64 of %zu characters: not a multiple of 4", size);
  for (size_t at = 0; at < size; at += GROUP) {
    char group[BYTES];
    uint32_t bits = 0;
    int padding = 0;
    if (at + GROUP == size) padding = text[size - 1] != '=' ? 0 : text[size - 2] != '=' ? 1 : 2;
    for (int i = 0; i < GROUP; ++i) {
      int value = i < GROUP - padding ? value_of(text[at + (size_t)i]) : 0;
      if (value < 0)
        return attn_fail(ATTN_BAD_FORMAT, "base64 with the byte 0x%02x at %zu",
                         (unsigned char)text[at + (size_t)i], at + (size_t)i);
      bits = bits << 6 | (uint32_t)value;
    }
    for (int i = 0; i < BYTES; ++i) group[i] = (char)(bits >> (16 - 8 * i) & 0xff);
    attn_text_add(bytes, group, (size_t)(BYTES - padding));
  }
  return bytes->failed ? ATTN_OUT_OF_MEMORY : ATTN_OK;
}

void attn_base64_encode(const char *bytes, size_t size, attn_text *text) {
  for (size_t at = 0; at < size; at += BYTES) {
    char group[GROUP];
    size_t count = size - at < BYTES ? size - at : BYTES;
    uint32_t bits = 0;
    for (size_t i = 0; i < BYTES; ++i)
      bits = bits << 8 | (i < count ? (unsigned char)bytes[at + i] : 0);
    for (size_t i = 0; i < GROUP; ++i)
      group[i] = i <= count ? digits[bits >> (18 - 6 * i) & 0x3f] : '=';
    attn_text_add(text, group, GROUP);
  }
}
