#include "base/utf8.h"

static void add_replacement(attn_text *out) {
  attn_text_add(out, "\xef\xbf\xbd", 3); /* U+FFFD */
}

/* Bytes of the sequence that begins with `first`; 0 if none does (RFC 3629). */
static int sequence_length(unsigned char first) {
  if (first < 0x80) return 1;
  if (first < 0xc2 || first > 0xf4) return 0;
  return first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
}

/* The second byte is limited where a shorter form, a surrogate or a number beyond U+10FFFF would
 * result. */
static bool continues(const attn_utf8 *s, unsigned char byte) {
  unsigned char low = 0x80, high = 0xbf;
  if (s->have == 1) {
    if (s->bytes[0] == 0xe0) low = 0xa0;
    if (s->bytes[0] == 0xed) high = 0x9f;
    if (s->bytes[0] == 0xf0) low = 0x90;
    if (s->bytes[0] == 0xf4) high = 0x8f;
  }
  return byte >= low && byte <= high;
}

/* C0 but for tab and line feed, delete, and C1 (U+0080 to U+009F). */
static bool is_control(const unsigned char *bytes, int size) {
  if (size == 1)
    return (bytes[0] < 0x20 && bytes[0] != '\n' && bytes[0] != '\t') || bytes[0] == 127;
  return size == 2 && bytes[0] == 0xc2 && bytes[1] < 0xa0;
}

void attn_utf8_push(attn_utf8 *s, unsigned char byte, attn_text *out) {
  if (s->have && !continues(s, byte)) attn_utf8_finish(s, out);
  if (!s->have) {
    s->need = sequence_length(byte);
    if (!s->need) {
      add_replacement(out);
      return;
    }
  }
  s->bytes[s->have++] = byte;
  if (s->have < s->need) return;
  if (s->for_terminal && is_control(s->bytes, s->have))
    add_replacement(out);
  else
    attn_text_add(out, (const char *)s->bytes, (size_t)s->have);
  s->have = 0;
}

void attn_utf8_finish(attn_utf8 *s, attn_text *out) {
  if (s->have) add_replacement(out);
  s->have = 0;
}
