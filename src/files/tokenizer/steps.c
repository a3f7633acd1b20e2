#include "files/tokenizer/parts.h"
#include "base/memory.h"
#include "base/status.h"

#include <string.h>
#include <utf8proc.h>

attn_status attn_step_new(attn_step *steps, int *count, attn_step **step) {
  if (*count == ATTN_MOST_STEPS)
    return attn_fail(ATTN_UNSUPPORTED, "more than %d steps of normalising or splitting",
                     ATTN_MOST_STEPS);
  *step = &steps[(*count)++];
  **step = (attn_step){0};
  return ATTN_OK;
}

void attn_step_free(attn_step *step) {
  attn_pattern_free(&step->pattern);
  attn_free(step->content);
  *step = (attn_step){0};
}

/* -- GPT-2's alphabet: printable bytes stand for themselves, the others for U+0100 and on -- */

static bool stands_for_itself(int byte) {
  return (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
}

/* The others in order: 0x00 to 0x20, 0x7f to 0xa0, 0xad. */
int32_t attn_byte_character(unsigned char byte) {
  if (stands_for_itself(byte)) return byte;
  if (byte <= 0x20) return 0x100 + byte;
  return byte == 0xad ? 0x143 : 0x121 + byte - 0x7f;
}

int attn_character_byte(int32_t code) {
  if (code >= 0 && code < 0x100) return stands_for_itself(code) ? code : -1;
  if (code >= 0x100 && code <= 0x120) return code - 0x100;
  if (code >= 0x121 && code <= 0x142) return code - 0x121 + 0x7f;
  return code == 0x143 ? 0xad : -1;
}

static void map_bytes(const char *text, size_t size, attn_text *out) {
  for (size_t i = 0; i < size; ++i) attn_utf8_add(out, attn_byte_character((unsigned char)text[i]));
}

/* -- Unicode normalisation -- */

/* Puts a run of combining marks in the order of their classes, stably. utf8proc's own ordering is
 * quadratic, and a run may be as long as the text. */
static attn_status order_run(int32_t *codes, size_t count) {
  size_t starts[257] = {0};
  int32_t *ordered = attn_alloc(count * sizeof *ordered);
  if (!ordered) return ATTN_OUT_OF_MEMORY;
  for (size_t i = 0; i < count; ++i) ++starts[utf8proc_get_property(codes[i])->combining_class + 1];
  for (int i = 1; i < 257; ++i) starts[i] += starts[i - 1];
  for (size_t i = 0; i < count; ++i)
    ordered[starts[utf8proc_get_property(codes[i])->combining_class]++] = codes[i];
  memcpy(codes, ordered, count * sizeof *codes);
  attn_free(ordered);
  return ATTN_OK;
}

static attn_status order_marks(int32_t *codes, size_t count) {
  for (size_t begin = 0, end; begin < count; begin = end + 1) {
    for (end = begin; end < count && utf8proc_get_property(codes[end])->combining_class; ++end) {
    }
    if (end - begin > 1) ATTN_TRY(order_run(codes + begin, end - begin));
  }
  return ATTN_OK;
}

static bool is_ascii(const char *text, size_t size) {
  for (size_t i = 0; i < size; ++i)
    if ((unsigned char)text[i] >= 0x80) return false;
  return true;
}

static attn_status decompose(const attn_step *step, const char *text, size_t size, int32_t **codes,
                             size_t *count, size_t *capacity) {
  enum { MOST_PARTS = 32 }; /* the longest decomposition of a character has 18 */
  int options = UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | (step->compat ? UTF8PROC_COMPAT : 0);
  int32_t code;
  for (size_t at = 0; at < size;) {
    int bytes = attn_utf8_next(text + at, size - at, &code);
    if (!bytes) return attn_fail(ATTN_INTERNAL, "a piece is not UTF-8");
    at += (size_t)bytes;
    ATTN_TRY(attn_reserve((void **)codes, capacity, *count + MOST_PARTS, sizeof **codes));
    utf8proc_ssize_t parts = utf8proc_decompose_char(code, *codes + *count, MOST_PARTS,
                                                     (utf8proc_option_t)options, NULL);
    if (parts < 0 || parts > MOST_PARTS) return attn_fail(ATTN_INTERNAL, "utf8proc fails");
    *count += (size_t)parts;
  }
  return ATTN_OK;
}

static attn_status normalise(const attn_step *step, const char *text, size_t size, attn_text *out) {
  if (is_ascii(text, size)) { /* is in every form */
    attn_text_add(out, text, size);
    return ATTN_OK;
  }
  int32_t *codes = NULL;
  size_t count = 0, capacity = 0;
  attn_status status = decompose(step, text, size, &codes, &count, &capacity);
  if (status == ATTN_OK) status = order_marks(codes, count);
  if (status == ATTN_OK && step->compose) {
    utf8proc_ssize_t composed = utf8proc_normalize_utf32(
        codes, (utf8proc_ssize_t)count, (utf8proc_option_t)(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
    count = composed < 0 ? 0 : (size_t)composed;
  }
  for (size_t i = 0; i < count && status == ATTN_OK; ++i) attn_utf8_add(out, codes[i]);
  attn_free(codes);
  return status;
}

/* -- Character by character -- */

static void add_lower(attn_text *out, int32_t code) {
  if (code == 0x130) { /* the one capital whose lower case is two characters */
    attn_utf8_add(out, 'i');
    attn_utf8_add(out, 0x307);
  } else {
    attn_utf8_add(out, utf8proc_tolower(code));
  }
}

static bool is_ideograph(int32_t code) {
  return (code >= 0x4e00 && code <= 0x9fff) || (code >= 0x3400 && code <= 0x4dbf) ||
         (code >= 0x20000 && code <= 0x2a6df) || (code >= 0x2a700 && code <= 0x2b73f) ||
         (code >= 0x2b740 && code <= 0x2b81f) || (code >= 0x2b920 && code <= 0x2ceaf) ||
         (code >= 0xf900 && code <= 0xfaff) || (code >= 0x2f800 && code <= 0x2fa1f);
}

static bool is_cleaned_away(int32_t code) {
  if (code == 0 || code == 0xfffd) return true;
  if (code == '\t' || code == '\n' || code == '\r') return false;
  utf8proc_category_t category = utf8proc_category(code);
  return category == UTF8PROC_CATEGORY_CC || category == UTF8PROC_CATEGORY_CF ||
         category == UTF8PROC_CATEGORY_CO;
}

static bool is_mark(int32_t code, bool all) {
  utf8proc_category_t category = utf8proc_category(code);
  return category == UTF8PROC_CATEGORY_MN ||
         (all && (category == UTF8PROC_CATEGORY_MC || category == UTF8PROC_CATEGORY_ME));
}

static void change_character(const attn_step *step, int32_t code, attn_text *out) {
  bool ideograph = step->kind == ATTN_STEP_BERT_CHINESE && is_ideograph(code);
  switch (step->kind) {
  case ATTN_STEP_LOWERCASE: add_lower(out, code); return;
  case ATTN_STEP_STRIP_ACCENTS:
    if (is_mark(code, step->all_marks)) return;
    break;
  case ATTN_STEP_BERT_CLEAN:
    if (is_cleaned_away(code)) return;
    if (attn_is_whitespace(code)) code = ' ';
    break;
  default: break;
  }
  if (ideograph) attn_text_add(out, " ", 1);
  attn_utf8_add(out, code);
  if (ideograph) attn_text_add(out, " ", 1);
}

static void change_characters(const attn_step *step, const char *text, size_t size,
                              attn_text *out) {
  int32_t code;
  for (size_t at = 0; at < size;) {
    int bytes = attn_utf8_next(text + at, size - at, &code);
    if (!bytes) return;
    at += (size_t)bytes;
    change_character(step, code, out);
  }
}

static void strip(const attn_step *step, const char *text, size_t size, attn_text *out) {
  size_t begin = 0, end = 0; /* end: behind the last character that is not whitespace */
  bool seen = false;
  int32_t code;
  for (size_t at = 0; at < size;) {
    int bytes = attn_utf8_next(text + at, size - at, &code);
    if (!bytes) return;
    if (!attn_is_whitespace(code)) {
      if (!seen) begin = at;
      seen = true;
      end = at + (size_t)bytes;
    }
    at += (size_t)bytes;
  }
  if (!step->left) begin = 0;
  if (!step->right) end = size;
  if (!seen && step->left) begin = size;
  if (end > begin) attn_text_add(out, text + begin, end - begin);
}

static attn_status check_growth(const attn_matcher *matcher, const attn_text *text) {
  if (text->failed) return ATTN_OUT_OF_MEMORY;
  if (text->length <= matcher->most_text) return ATTN_OK;
  return attn_fail(ATTN_UNSUPPORTED, "normalising makes more than %zu bytes of this text",
                   matcher->most_text);
}

static attn_status replace(const attn_step *step, attn_matcher *matcher, const char *text,
                           size_t size, attn_text *out) {
  bool found = true;
  for (size_t at = 0, begin, end; at < size; at = end) {
    ATTN_TRY(attn_pattern_next(&step->pattern, matcher, text, size, at, &found, &begin, &end));
    if (!found) begin = end = size;
    attn_text_add(out, text + at, begin - at);
    if (found) attn_text_add(out, step->content, step->content_size);
    ATTN_TRY(check_growth(matcher, out));
  }
  return ATTN_OK;
}

static bool wants_prepended(const attn_step *step, const char *text, size_t size, bool first) {
  if (!size || (step->only_first && !first)) return false;
  return !step->unless_there || size < step->content_size ||
         memcmp(text, step->content, step->content_size) != 0;
}

/* -- Splitting -- */

/* Takes the parts of a piece in order, a match or what lies between, and joins them as the
 * behaviour says. A part is held back until the next one shows whether it joins. */
typedef struct joiner {
  const attn_step *step;
  attn_pieces *out;
  attn_piece piece; /* what holds for all parts */
  size_t base;      /* where the piece begins in out's text */
  size_t held_begin, held_end;
  bool holds, held_match;
} joiner;

static attn_status flush(joiner *joiner) {
  if (!joiner->holds || joiner->held_begin == joiner->held_end) return ATTN_OK;
  attn_piece piece = joiner->piece;
  piece.begin = joiner->base + joiner->held_begin;
  piece.end = joiner->base + joiner->held_end;
  piece.first = joiner->piece.first && joiner->held_begin == 0;
  joiner->holds = false;
  return attn_pieces_add(joiner->out, piece);
}

static attn_status take_part(joiner *joiner, size_t begin, size_t end, bool match) {
  const attn_step *step = joiner->step;
  bool joins = false;
  if (begin == end) return ATTN_OK;
  if (step->invert) match = !match;
  switch (step->behaviour) {
  case ATTN_SPLIT_REMOVED:
    if (match) return ATTN_OK;
    break;
  case ATTN_SPLIT_ISOLATED: break;
  case ATTN_SPLIT_CONTIGUOUS: joins = match == joiner->held_match; break;
  case ATTN_SPLIT_MERGED_WITH_PREVIOUS: joins = match && !joiner->held_match; break;
  case ATTN_SPLIT_MERGED_WITH_NEXT: joins = !match && joiner->held_match; break;
  }
  if (joins && joiner->holds) {
    joiner->held_end = end;
  } else {
    ATTN_TRY(flush(joiner));
    joiner->held_begin = begin;
    joiner->held_end = end;
    joiner->holds = true;
  }
  joiner->held_match = match;
  return ATTN_OK;
}

static attn_status split(const attn_step *step, attn_matcher *matcher, const char *text,
                         size_t size, attn_piece piece, attn_pieces *out) {
  joiner joiner = {.step = step, .out = out, .piece = piece, .base = out->text.length};
  bool found;
  attn_text_add(&out->text, text, size);
  for (size_t at = 0, begin, end; at < size; at = end) {
    ATTN_TRY(attn_pattern_next(&step->pattern, matcher, text, size, at, &found, &begin, &end));
    if (!found) begin = end = size;
    ATTN_TRY(take_part(&joiner, at, begin, false));
    ATTN_TRY(take_part(&joiner, begin, end, true));
  }
  return flush(&joiner);
}

/* -- One step -- */

attn_status attn_step_apply(const attn_step *step, attn_matcher *matcher, const attn_pieces *in,
                            size_t index, attn_pieces *out) {
  attn_piece piece = in->items[index];
  const char *text = in->text.data + piece.begin;
  size_t size = piece.end - piece.begin, begin = out->text.length;
  bool touched = piece.token == ATTN_PIECE_TEXT ||
                 (piece.token == ATTN_PIECE_BYTES && step->kind == ATTN_STEP_BYTES);
  if (touched && step->kind == ATTN_STEP_SPLIT) return split(step, matcher, text, size, piece, out);
  if (!touched) {
    attn_text_add(&out->text, text, size);
  } else {
    switch (step->kind) {
    case ATTN_STEP_UNICODE: ATTN_TRY(normalise(step, text, size, &out->text)); break;
    case ATTN_STEP_STRIP: strip(step, text, size, &out->text); break;
    case ATTN_STEP_REPLACE: ATTN_TRY(replace(step, matcher, text, size, &out->text)); break;
    case ATTN_STEP_CHARSMAP:
      ATTN_TRY(attn_charsmap_apply(step, text, size, matcher->most_text, &out->text));
      break;
    case ATTN_STEP_BYTES: map_bytes(text, size, &out->text); break;
    case ATTN_STEP_PREPEND:
      if (wants_prepended(step, text, size, piece.first))
        attn_text_add(&out->text, step->content, step->content_size);
      attn_text_add(&out->text, text, size);
      break;
    default: change_characters(step, text, size, &out->text); break;
    }
  }
  ATTN_TRY(check_growth(matcher, &out->text));
  piece.begin = begin;
  piece.end = out->text.length;
  return attn_pieces_add(out, piece);
}
