/* Patterns by PCRE2. Those of tokenizer.json are written for Oniguruma (Ruby's syntax); where the
 * two would read one differently it is rewritten, or refused: \s     White_Space; PCRE2 adds U+180E
 *   \w     also marks, letter-like numbers and symbols, connectors; PCRE2: letters, numbers and _
 *   ^ $    at every line
 *   \h     a hexadecimal digit
 *   [a&&b] and [a[b]] are set operations, x{1,2}+ is no possessive quantifier: refused */
#include "files/tokenizer/parts.h"
#include "base/memory.h"
#include "base/status.h"

#include <string.h>

/* A match first gets few steps; where they do not suffice, more, out of a budget that is linear in
 * the text. So honest patterns, whose long matches consume what they cost, are never cut off, and
 * the whole of a text costs at most (FEW_STEPS + STEPS_PER_BYTE) for each of its bytes. */
enum { FEW_STEPS = 8192, STEPS_PER_BYTE = 64, STEPS_FACTOR = 8, DEEPEST = 1 << 20 };
/* NFKC makes at most eleven bytes of one; replacements of a hostile file could make gigabytes. */
enum { MOST_GROWTH = 32, FREE_GROWTH = 1 << 20 };

const char attn_regex_gpt2[] =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
const char attn_regex_llama3[] =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"
    " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const char attn_regex_qwen2[] = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|"
                                " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

/* clang-format off */
/* DeepSeek-V2's and V3's, as their tokenizer.json have them. */
const char attn_regex_deepseek_letters[] =
    "\\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕ"
    "ἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛ"
    "Ꜣ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+";
const char attn_regex_deepseek_marks[] = "\\s?[!-/:-~！-／：-～‘-‟　-。]+";
const char attn_regex_deepseek_east[] = "[一-龥ࠀ-一가-퟿]+";
const char attn_regex_deepseek3_east[] = "[一-龥぀-ゟ゠-ヿ]+";
const char attn_regex_deepseek3[] =
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}"
    "\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+";
/* clang-format on */
/* Kimi's: the classes of letters without Han, which tiktoken writes [...&&[^\p{Han}]]. */
#define UPPER "(?:(?!\\p{Han})[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}])"
#define LOWER "(?:(?!\\p{Han})[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}])"
#define SHORT "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
const char attn_regex_kimi[] =
    "[\\p{Han}]+|[^\\r\\n\\p{L}\\p{N}]?" UPPER "*" LOWER "+" SHORT "|[^\\r\\n\\p{L}\\p{N}]?" UPPER
    "+" LOWER "*" SHORT
    "|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

/* The insides of classes. */
static const char white[] =
    "\\x09-\\x0d\\x20\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}"
    "\\x{205f}\\x{3000}";
static const char not_white[] =
    "\\x00-\\x08\\x0e-\\x1f\\x21-\\x{84}\\x{86}-\\x{9f}\\x{a1}-\\x{167f}\\x{1681}-\\x{1fff}"
    "\\x{200b}-\\x{2027}\\x{202a}-\\x{202e}\\x{2030}-\\x{205e}\\x{2060}-\\x{2fff}"
    "\\x{3001}-\\x{d7ff}\\x{e000}-\\x{10ffff}";
static const char word[] =
    "\\p{L}\\p{M}\\p{Nd}\\p{Nl}\\p{Pc}\\x{24b6}-\\x{24e9}\\x{1f130}-\\x{1f149}"
    "\\x{1f150}-\\x{1f169}\\x{1f170}-\\x{1f189}";
static const char hexadecimal[] = "0-9a-fA-F";

/* What stands for \s and its kind; NULL for an escape that is the same in both dialects. */
static const char *class_of(char escape, bool *negated) {
  *negated = escape == 'S' || escape == 'W' || escape == 'H';
  switch (escape) {
  case 's':
  case 'S': return white;
  case 'w':
  case 'W': return word;
  case 'h':
  case 'H': return hexadecimal;
  default: return NULL;
  }
}

static attn_status fail_pattern(const char *expression, const char *why) {
  return attn_fail(ATTN_UNSUPPORTED, "the pattern \"%.200s\" %s", expression, why);
}

/* One escape at text[at]; returns its length. */
static attn_status translate_escape(const char *text, size_t size, size_t at, bool in_class,
                                    attn_text *out, size_t *length) {
  bool negated;
  char escape = at + 1 < size ? text[at + 1] : '\0';
  const char *class = class_of(escape, &negated);
  *length = at + 1 < size ? 2 : 1;
  if (class && in_class && negated) {
    if (class != white)
      return fail_pattern(text, "has \\W or \\H in a class, which is not offered");
    attn_text_add(out, not_white, sizeof not_white - 1);
  } else if (class) {
    attn_text_print(out, "%s%s%s%s", in_class ? "" : "[", negated ? "^" : "", class,
                    in_class ? "" : "]");
  } else {
    if ((escape == 'p' || escape == 'P' || escape == 'x') && at + 2 < size && text[at + 2] == '{')
      while (at + *length < size && text[at + *length - 1] != '}') ++*length;
    attn_text_add(out, text + at, *length);
  }
  return ATTN_OK;
}

static attn_status translate(const char *text, size_t size, attn_text *out) {
  bool in_class = false;
  for (size_t at = 0, length = 1; at < size; at += length) {
    char c = text[at], next = at + 1 < size ? text[at + 1] : '\0';
    length = 1;
    if (c == '\\') {
      ATTN_TRY(translate_escape(text, size, at, in_class, out, &length));
      continue;
    }
    if (in_class && ((c == '[' && next != ':') || (c == '&' && next == '&')))
      return fail_pattern(text, "has a set operation in a class, which is not offered");
    if (in_class && c == '[') { /* [:alpha:] */
      while (at + length < size && text[at + length - 1] != ']') ++length;
    } else if (c == '[' || c == ']') {
      in_class = c == '[';
    } else if (!in_class && c == '}' && next == '+') {
      return fail_pattern(text, "repeats a counted repetition, which is not offered");
    }
    attn_text_add(out, text + at, length);
  }
  return out->failed ? ATTN_OUT_OF_MEMORY : ATTN_OK;
}

static void *allocate(size_t size, void *unused) {
  (void)unused;
  return attn_alloc(size);
}

static void release(void *memory, void *unused) {
  (void)unused;
  attn_free(memory);
}

static attn_status fail_regex(int error, const char *expression) {
  PCRE2_UCHAR reason[128];
  if (error == PCRE2_ERROR_NOMEMORY || error == PCRE2_ERROR_HEAP_FAILED)
    return attn_fail(ATTN_OUT_OF_MEMORY, "out of memory for the pattern \"%.200s\"", expression);
  pcre2_get_error_message(error, reason, sizeof reason);
  return attn_fail(ATTN_UNSUPPORTED, "the pattern \"%.200s\": %s", expression, (char *)reason);
}

static attn_status compile(attn_pattern *pattern, const attn_text *translated,
                           const char *expression) {
  int error;
  PCRE2_SIZE place;
  attn_status status = ATTN_OUT_OF_MEMORY;
  pcre2_general_context *memory = pcre2_general_context_create(allocate, release, NULL);
  pcre2_compile_context *context = memory ? pcre2_compile_context_create(memory) : NULL;
  if (context) {
    pcre2_set_newline(context, PCRE2_NEWLINE_LF);
    pattern->regex = pcre2_compile(
        (PCRE2_SPTR)(translated->data ? translated->data : ""), translated->length,
        PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &error, &place, context);
    status = pattern->regex ? ATTN_OK : fail_regex(error, expression);
  }
  /* Without JIT (other processors, no executable memory) matching is slower, nothing else. */
  if (pattern->regex) pcre2_jit_compile(pattern->regex, PCRE2_JIT_COMPLETE);
  pcre2_compile_context_free(context);
  pcre2_general_context_free(memory);
  return status;
}

attn_status attn_pattern_regex(attn_pattern *pattern, const char *expression, size_t size) {
  attn_text translated = {0};
  *pattern = (attn_pattern){.kind = ATTN_PATTERN_REGEX};
  attn_status status = translate(expression, size, &translated);
  if (status == ATTN_OK) status = compile(pattern, &translated, expression);
  if (status == ATTN_OK)
    status = attn_copy_bytes(expression, size, &pattern->string, &pattern->size);
  attn_text_free(&translated);
  return status;
}

attn_status attn_pattern_string(attn_pattern *pattern, const char *string, size_t size) {
  *pattern = (attn_pattern){.kind = ATTN_PATTERN_STRING};
  if (size == 0) return attn_fail(ATTN_BAD_FORMAT, "a pattern is the empty string");
  return attn_copy_bytes(string, size, &pattern->string, &pattern->size);
}

void attn_pattern_free(attn_pattern *pattern) {
  pcre2_code_free(pattern->regex);
  attn_free(pattern->string);
  *pattern = (attn_pattern){0};
}

/* -- Matching -- */

attn_status attn_matcher_create(attn_matcher *matcher, size_t text_size) {
  *matcher = (attn_matcher){.budget = ((uint64_t)text_size + FEW_STEPS) * STEPS_PER_BYTE,
                            .most_text = MOST_GROWTH * text_size + FREE_GROWTH};
  matcher->memory = pcre2_general_context_create(allocate, release, NULL);
  if (!matcher->memory) return ATTN_OUT_OF_MEMORY;
  matcher->context = pcre2_match_context_create(matcher->memory);
  matcher->data = pcre2_match_data_create(1, matcher->memory);
  if (!matcher->context || !matcher->data) return ATTN_OUT_OF_MEMORY;
  pcre2_set_depth_limit(matcher->context, DEEPEST);
  return ATTN_OK;
}

void attn_matcher_free(attn_matcher *matcher) {
  pcre2_match_data_free(matcher->data);
  pcre2_match_context_free(matcher->context);
  pcre2_general_context_free(matcher->memory);
  *matcher = (attn_matcher){0};
}

static bool is_limit(int result) {
  return result == PCRE2_ERROR_MATCHLIMIT || result == PCRE2_ERROR_DEPTHLIMIT ||
         result == PCRE2_ERROR_HEAPLIMIT;
}

static int match_within(const pcre2_code *regex, attn_matcher *matcher, const char *text,
                        size_t size, size_t from, uint32_t steps) {
  uint32_t options = PCRE2_NO_UTF_CHECK;
  pcre2_set_match_limit(matcher->context, steps);
  int result =
      pcre2_match(regex, (PCRE2_SPTR)text, size, from, options, matcher->data, matcher->context);
  if (result == PCRE2_ERROR_JIT_STACKLIMIT) /* the interpreter keeps its state on the heap */
    result = pcre2_match(regex, (PCRE2_SPTR)text, size, from, options | PCRE2_NO_JIT, matcher->data,
                         matcher->context);
  return result;
}

static attn_status next_regex(const pcre2_code *regex, attn_matcher *matcher, const char *text,
                              size_t size, size_t from, bool *found, size_t *begin, size_t *end) {
  uint64_t steps = FEW_STEPS;
  int result = match_within(regex, matcher, text, size, from, (uint32_t)steps);
  while (is_limit(result) && steps < matcher->budget) {
    steps *= STEPS_FACTOR;
    if (steps > matcher->budget) steps = matcher->budget;
    if (steps > UINT32_MAX) steps = UINT32_MAX;
    matcher->budget -= steps;
    result = match_within(regex, matcher, text, size, from, (uint32_t)steps);
  }
  if (is_limit(result))
    return attn_fail(ATTN_UNSUPPORTED,
                     "a pattern of the tokenizer takes too many steps on this text (at byte %zu)",
                     from);
  if (result == PCRE2_ERROR_NOMEMORY)
    return attn_fail(ATTN_OUT_OF_MEMORY, "out of memory to match");
  if (result < 0 && result != PCRE2_ERROR_NOMATCH)
    return attn_fail(ATTN_INTERNAL, "PCRE2 fails with %d at byte %zu", result, from);
  *found = result >= 0;
  if (*found) {
    *begin = pcre2_get_ovector_pointer(matcher->data)[0];
    *end = pcre2_get_ovector_pointer(matcher->data)[1];
  }
  return ATTN_OK;
}

static bool next_string(const attn_pattern *pattern, const char *text, size_t size, size_t from,
                        size_t *begin, size_t *end) {
  const char *place = memmem(text + from, size - from, pattern->string, pattern->size);
  if (!place) return false;
  *begin = (size_t)(place - text);
  *end = *begin + pattern->size;
  return true;
}

static bool next_of_class(const attn_pattern *pattern, const char *text, size_t size, size_t from,
                          size_t *begin, size_t *end) {
  int32_t code;
  for (int bytes; from < size; from += (size_t)bytes) {
    bytes = attn_utf8_next(text + from, size - from, &code);
    if (!bytes) return false; /* pieces of text are valid: cannot be */
    if (!pattern->class(code)) continue;
    *begin = from;
    *end = from + (size_t)bytes;
    return true;
  }
  return false;
}

attn_status attn_pattern_next(const attn_pattern *pattern, attn_matcher *matcher, const char *text,
                              size_t size, size_t from, bool *found, size_t *begin, size_t *end) {
  *found = false;
  while (from < size) {
    if (pattern->kind == ATTN_PATTERN_REGEX)
      ATTN_TRY(next_regex(pattern->regex, matcher, text, size, from, found, begin, end));
    else if (pattern->kind == ATTN_PATTERN_STRING)
      *found = next_string(pattern, text, size, from, begin, end);
    else
      *found = next_of_class(pattern, text, size, from, begin, end);
    if (!*found || *end > *begin) return ATTN_OK;
    /* Empty: look again behind the next character. */
    *found = false;
    int32_t code;
    if (*begin >= size) return ATTN_OK;
    int bytes = attn_utf8_next(text + *begin, size - *begin, &code);
    from = *begin + (size_t)(bytes ? bytes : 1);
  }
  return ATTN_OK;
}
