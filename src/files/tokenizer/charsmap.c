/* The normaliser that SentencePiece compiles into its models, as the library `tokenizers` applies
 * it ("Precompiled"). A charsmap is, little-endian,
 *
 *   bytes of the trie (32 bits), the trie, replacement strings with a NUL behind each.
 *
 * The trie is a double array (Aoe 1989) of units of 32 bits: bits 0 to 7 are the byte that leads to
 * the unit, bit 8 says that a key ends here, the rest is an offset. From unit i with the offset o
 * the byte b leads to i ^ o ^ b, if that unit has the byte b; where a key ends, i ^ o holds the
 * place of its replacement.
 *
 * The text goes grapheme by grapheme. Where a key begins a grapheme of less than six bytes, the
 * shortest such key's replacement stands for the whole of it, marks that follow included; otherwise
 * it goes character by character. (SentencePiece itself takes the longest key at every place.) */
#include "files/tokenizer/parts.h"
#include "base/status.h"

#include <string.h>

enum { HEADER = 4, UNIT = 4, WHOLE_BELOW = 6 };

static uint32_t load(const char *bytes) {
  const unsigned char *b = (const unsigned char *)bytes;
  return b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
}

static size_t unit_count(const attn_step *step) {
  return load(step->content) / UNIT;
}

attn_status attn_charsmap_set(attn_step *step, const char *bytes, size_t size) {
  size_t trie = size < HEADER ? 0 : (size_t)load(bytes) / UNIT * UNIT;
  int32_t code;
  if (trie < UNIT || trie > size - HEADER)
    return attn_fail(ATTN_BAD_FORMAT, "a charsmap of %zu bytes with a trie of %zu", size, trie);
  for (size_t at = HEADER + trie; at < size;) {
    int step_size = attn_utf8_next(bytes + at, size - at, &code);
    if (!step_size) return attn_fail(ATTN_BAD_FORMAT, "a charsmap's strings are not UTF-8");
    at += (size_t)step_size;
  }
  step->kind = ATTN_STEP_CHARSMAP;
  return attn_copy_bytes(bytes, size, &step->content, &step->content_size);
}

/* Bit 31: of a place, so that no byte is the unit's. */
static const uint32_t is_place = UINT32_C(1) << 31;

/* Unit i; one that nothing leads to when it is outside. */
static uint32_t unit_at(const attn_step *step, size_t i) {
  return i < unit_count(step) ? load(step->content + HEADER + i * UNIT) : is_place;
}

static uint32_t offset_of(uint32_t unit) {
  return (unit >> 10) << (unit >> 9 & 1 ? 8 : 0);
}

/* The string at a place: false when that is outside or inside a character. */
static bool string_at(const attn_step *step, size_t place, const char **string, size_t *size) {
  size_t begin = HEADER + unit_count(step) * UNIT + place;
  if (begin >= step->content_size) return false;
  *string = step->content + begin;
  size_t most = step->content_size - begin;
  const char *end = memchr(*string, 0, most);
  *size = end ? (size_t)(end - *string) : most;
  return (**string & 0xc0) != 0x80;
}

/* The replacement of the shortest key that the text begins with. */
static bool find(const attn_step *step, const char *text, size_t size, const char **string,
                 size_t *string_size) {
  uint32_t at = offset_of(unit_at(step, 0));
  for (size_t i = 0; i < size && text[i]; ++i) {
    unsigned char byte = (unsigned char)text[i];
    at ^= byte;
    uint32_t unit = unit_at(step, at);
    if ((unit & (is_place | 0xff)) != byte) return false;
    at ^= offset_of(unit);
    if (unit >> 8 & 1) return string_at(step, unit_at(step, at) & ~is_place, string, string_size);
  }
  return false;
}

/* -- A text -- */

static void add_grapheme(const attn_step *step, const char *text, size_t size, attn_text *out) {
  const char *string;
  size_t string_size;
  int32_t code;
  if (size < WHOLE_BELOW && find(step, text, size, &string, &string_size)) {
    attn_text_add(out, string, string_size);
    return;
  }
  for (size_t at = 0, bytes; at < size; at += bytes) {
    bytes = (size_t)attn_utf8_next(text + at, size - at, &code);
    if (find(step, text + at, bytes, &string, &string_size))
      attn_text_add(out, string, string_size);
    else
      attn_text_add(out, text + at, bytes);
  }
}

attn_status attn_charsmap_apply(const attn_step *step, const char *text, size_t size, size_t most,
                                attn_text *out) {
  attn_grapheme grapheme = {0};
  size_t begin = 0;
  int32_t code;
  for (size_t at = 0; at < size && out->length <= most;) {
    int bytes = attn_utf8_next(text + at, size - at, &code);
    if (!bytes) return attn_fail(ATTN_INTERNAL, "a piece is not UTF-8");
    if (attn_grapheme_begins(&grapheme, code)) {
      add_grapheme(step, text + begin, at - begin, out);
      begin = at;
    }
    at += (size_t)bytes;
  }
  add_grapheme(step, text + begin, size - begin, out);
  return ATTN_OK;
}

/* What a character becomes is nothing but spaces. */
static attn_status becomes_spaces(const attn_step *step, int32_t code, bool *spaces) {
  attn_text text = {0}, made = {0};
  attn_utf8_add(&text, code);
  attn_status status = text.failed ? ATTN_OUT_OF_MEMORY : ATTN_OK;
  if (status == ATTN_OK)
    status = attn_charsmap_apply(step, text.data, text.length, SIZE_MAX, &made);
  if (status == ATTN_OK && made.failed) status = ATTN_OUT_OF_MEMORY;
  for (size_t i = 0; i < made.length; ++i) *spaces &= made.data[i] == ' ';
  attn_text_free(&text);
  attn_text_free(&made);
  return status;
}

attn_status attn_charsmap_leaves_spaces(const attn_step *step, bool *leaves) {
  enum { NEXT_LINE = 0x85, LOWER_LINE = 0x2581, LAST_WHITESPACE = 0x3000 };
  size_t trie = HEADER + unit_count(step) * UNIT;
  int32_t code;
  *leaves = true;
  for (code = 1; code <= LAST_WHITESPACE && *leaves; ++code)
    if ((attn_is_whitespace(code) && code != NEXT_LINE) || code == LOWER_LINE)
      ATTN_TRY(becomes_spaces(step, code, leaves));
  for (size_t at = trie, bytes; at < step->content_size; at += bytes) {
    bytes = (size_t)attn_utf8_next(step->content + at, step->content_size - at, &code);
    if (!bytes) return attn_fail(ATTN_INTERNAL, "a charsmap's strings are not UTF-8");
    *leaves &= code == ' ' || !attn_is_whitespace(code);
  }
  return ATTN_OK;
}
