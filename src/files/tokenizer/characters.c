#include "files/tokenizer/parts.h"

#include <utf8proc.h>

int attn_utf8_next(const char *text, size_t size, int32_t *code) {
  if (size && (unsigned char)*text < 0x80) {
    *code = (unsigned char)*text;
    return 1;
  }
  size_t most = size < 4 ? size : 4;
  utf8proc_ssize_t bytes =
      utf8proc_iterate((const utf8proc_uint8_t *)text, (utf8proc_ssize_t)most, code);
  return bytes > 0 ? (int)bytes : 0;
}

/* Unicode, "U+FFFD substitution of maximal subparts" (table 3-7 says which bytes may follow). */
int attn_utf8_invalid(const char *text, size_t size) {
  const unsigned char *bytes = (const unsigned char *)text;
  unsigned char lead = bytes[0];
  int length = lead >= 0xf0 && lead <= 0xf4 ? 4 : lead >= 0xe0 && lead <= 0xef ? 3 : 1;
  if (lead >= 0xc2 && lead <= 0xdf) length = 2;
  int valid = 1;
  for (; valid < length && (size_t)valid < size; ++valid) {
    unsigned char low = 0x80, high = 0xbf;
    if (valid == 1 && lead == 0xe0) low = 0xa0;
    if (valid == 1 && lead == 0xed) high = 0x9f;
    if (valid == 1 && lead == 0xf0) low = 0x90;
    if (valid == 1 && lead == 0xf4) high = 0x8f;
    if (bytes[valid] < low || bytes[valid] > high) break;
  }
  return valid;
}

void attn_utf8_add(attn_text *text, int32_t code) {
  utf8proc_uint8_t bytes[4];
  utf8proc_ssize_t size = utf8proc_encode_char(code, bytes);
  attn_text_add(text, (const char *)bytes, (size_t)size);
}

bool attn_is_whitespace(int32_t code) {
  return (code >= 9 && code <= 13) || code == 0x20 || code == 0x85 || code == 0xa0 ||
         code == 0x1680 || (code >= 0x2000 && code <= 0x200a) || code == 0x2028 || code == 0x2029 ||
         code == 0x202f || code == 0x205f || code == 0x3000;
}

bool attn_is_number(int32_t code) {
  utf8proc_category_t category = utf8proc_category(code);
  return category == UTF8PROC_CATEGORY_ND || category == UTF8PROC_CATEGORY_NL ||
         category == UTF8PROC_CATEGORY_NO;
}

bool attn_is_word(int32_t code) {
  if (code == 0x200c || code == 0x200d) return true; /* joiners */
  if ((code >= 0x24b6 && code <= 0x24e9) || (code >= 0x1f130 && code <= 0x1f149) ||
      (code >= 0x1f150 && code <= 0x1f169) || (code >= 0x1f170 && code <= 0x1f189))
    return true; /* letters in circles and squares */
  switch (utf8proc_category(code)) {
  case UTF8PROC_CATEGORY_LU:
  case UTF8PROC_CATEGORY_LL:
  case UTF8PROC_CATEGORY_LT:
  case UTF8PROC_CATEGORY_LM:
  case UTF8PROC_CATEGORY_LO:
  case UTF8PROC_CATEGORY_MN:
  case UTF8PROC_CATEGORY_MC:
  case UTF8PROC_CATEGORY_ME:
  case UTF8PROC_CATEGORY_ND:
  case UTF8PROC_CATEGORY_NL:
  case UTF8PROC_CATEGORY_PC: return true;
  default: return false;
  }
}

bool attn_is_punctuation(int32_t code) {
  if (code < 0x80)
    return code > 0x20 && code < 0x7f &&
           !((code >= '0' && code <= '9') || (code >= 'A' && code <= 'Z') ||
             (code >= 'a' && code <= 'z'));
  utf8proc_category_t category = utf8proc_category(code);
  return category >= UTF8PROC_CATEGORY_PC && category <= UTF8PROC_CATEGORY_PO;
}
