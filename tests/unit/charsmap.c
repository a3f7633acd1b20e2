/* SentencePiece's charsmaps: what the library `tokenizers` makes of texts with them
 * (fixtures/tokenizer.py), for every character, and charsmaps that nobody should have written. */
#include "support/test.h"

#include "base/text.h"
#include "files/json.h"
#include "files/tokenizer.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define FIXTURES ATTN_SOURCE_DIR "/tests/unit/fixtures/tokenizer/"

static json_t *load_json(const char *name) {
  char path[512];
  json_error_t error;
  snprintf(path, sizeof path, FIXTURES "%s.json", name);
  json_t *value = json_load_file(path, JSON_ALLOW_NUL, &error);
  if (!value) fail_msg("%s: %s", path, error.text);
  return value;
}

static const char *made_path(void) {
  static char path[64];
  snprintf(path, sizeof path, "/tmp/attn-charsmap-%ld.json", (long)getpid());
  return path;
}

static void encode(const attn_tokenizer *tokenizer, const char *text, size_t size,
                   attn_tokens *tokens) {
  tokens->count = 0;
  assert_ok(attn_tokenizer_encode(tokenizer, text, size, 0, tokens));
}

static bool same_ids(const attn_tokens *tokens, const json_t *expected) {
  if (tokens->count != json_array_size(expected)) return false;
  for (size_t i = 0; i < tokens->count; ++i)
    if (tokens->ids[i] != json_integer_value(json_array_get(expected, i))) return false;
  return true;
}

static void graphemes_equal_the_library(void **state) {
  (void)state;
  static const char *const names[] = {"xlmr", "charsmap"};
  json_t *file = load_json("graphemes"), *texts = json_object_get(file, "texts"), *ids;
  attn_tokens tokens = {0};
  size_t i;
  int wrong = 0;
  for (int n = 0; n < 2; ++n) {
    attn_tokenizer *tokenizer;
    char path[512];
    snprintf(path, sizeof path, FIXTURES "%s.json", names[n]);
    assert_ok(attn_tokenizer_load(path, &tokenizer));
    assert_int_equal(json_array_size(texts), json_array_size(json_object_get(file, names[n])));
    json_array_foreach(json_object_get(file, names[n]), i, ids) {
      const json_t *text = json_array_get(texts, i);
      encode(tokenizer, json_string_value(text), json_string_length(text), &tokens);
      if (same_ids(&tokens, ids)) continue;
      fprintf(stderr, "%s, text %zu: \"%s\"\n", names[n], i, json_string_value(text));
      ++wrong;
    }
    attn_tokenizer_destroy(tokenizer);
  }
  attn_tokens_free(&tokens);
  json_decref(file);
  assert_int_equal(wrong, 0);
}

/* The normaliser of a file in front of a model whose ids are the bytes of what it makes. */
static attn_tokenizer *load_with_bytes(const char *family) {
  attn_tokenizer *tokenizer;
  json_t *root = load_json(family), *bytes = load_json("charsmap");
  assert_int_equal(json_object_set(bytes, "normalizer", json_object_get(root, "normalizer")), 0);
  assert_int_equal(json_dump_file(bytes, made_path(), 0), 0);
  json_decref(root);
  json_decref(bytes);
  assert_ok(attn_tokenizer_load(made_path(), &tokenizer));
  unlink(made_path());
  return tokenizer;
}

static void add_character(attn_text *text, uint32_t code) {
  char bytes[4];
  size_t size = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
  static const unsigned char leads[] = {0, 0, 0xc0, 0xe0, 0xf0};
  for (size_t i = size; i-- > 1; code >>= 6) bytes[i] = (char)(0x80 | (code & 0x3f));
  bytes[0] = (char)(leads[size] | code);
  attn_text_add(text, bytes, size);
}

static uint64_t hash_of(const attn_tokens *tokens) {
  uint64_t hash = 0xcbf29ce484222325; /* FNV-1a */
  for (size_t i = 0; i < tokens->count; ++i)
    hash = (hash ^ (uint64_t)tokens->ids[i]) * 0x100000001b3;
  return hash;
}

static void every_character_equals_the_library(void **state) {
  (void)state;
  enum { GROUP = 4096 };
  attn_tokenizer *tokenizer = load_with_bytes("xlmr");
  json_t *file = load_json("every"), *context;
  attn_tokens tokens = {0};
  size_t i;
  int wrong = 0;
  json_array_foreach(file, i, context) {
    const json_t *before = json_array_get(context, 0), *after = json_array_get(context, 1);
    const json_t *hashes = json_array_get(context, 2);
    for (uint32_t group = 0; group < json_array_size(hashes); ++group) {
      attn_text text = {0};
      char hash[32];
      for (uint32_t code = group * GROUP; code < (group + 1) * GROUP; ++code) {
        if (!code || (code >= 0xd800 && code < 0xe000)) continue;
        attn_text_add(&text, json_string_value(before), json_string_length(before));
        add_character(&text, code);
        attn_text_add(&text, json_string_value(after), json_string_length(after));
        attn_text_add(&text, "\n", 1);
      }
      encode(tokenizer, text.data, text.length, &tokens);
      attn_text_free(&text);
      snprintf(hash, sizeof hash, "%016llx", (unsigned long long)hash_of(&tokens));
      const json_t *expected = json_array_get(hashes, group);
      if (strcmp(hash, json_string_value(expected)) == 0) continue;
      fprintf(stderr, "context %zu: the characters from U+%04X differ\n", i, group * GROUP);
      ++wrong;
    }
  }
  attn_tokens_free(&tokens);
  json_decref(file);
  attn_tokenizer_destroy(tokenizer);
  assert_int_equal(wrong, 0);
}

static const char base64_digits[] =
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/* A tokenizer.json with a charsmap of `count` units, then `strings`. */
static attn_status load_charsmap(uint32_t trie, const uint32_t *units, size_t count,
                                 const char *strings, size_t size, attn_tokenizer **tokenizer) {
  unsigned char bytes[2048] = {0};
  size_t total = 4 + 4 * count + size;
  attn_text text = {0};
  assert_true(total + 3 <= sizeof bytes);
  for (size_t i = 0; i <= count; ++i)
    for (int b = 0; b < 4; ++b)
      bytes[4 * i + (size_t)b] = (unsigned char)((i ? units[i - 1] : trie) >> 8 * b);
  memcpy(bytes + 4 + 4 * count, strings, size);
  attn_text_print(&text, "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[]},"
                         "\"normalizer\":{\"type\":\"Precompiled\",\"precompiled_charsmap\":\"");
  for (size_t at = 0; at < total; at += 3) {
    uint32_t bits = (uint32_t)bytes[at] << 16 | (uint32_t)bytes[at + 1] << 8 | bytes[at + 2];
    for (size_t i = 0; i < 4; ++i)
      attn_text_add(&text, at + i <= total ? &base64_digits[bits >> (18 - 6 * i) & 63] : "=", 1);
  }
  attn_text_print(&text, "\"}}");
  FILE *file = fopen(made_path(), "wb");
  assert_non_null(file);
  assert_int_equal(fwrite(text.data, 1, text.length, file), text.length);
  assert_int_equal(fclose(file), 0);
  attn_text_free(&text);
  attn_status status = attn_tokenizer_load(made_path(), tokenizer);
  unlink(made_path());
  return status;
}

/* Units that lead nowhere, in circles or to places outside: refused, or without effect. */
static void hostile_charsmaps(void **state) {
  (void)state;
  enum { UNITS = 256 };
  const uint32_t leaf = 1u << 8, place = 1u << 31;
  uint32_t units[UNITS] = {0};
  char longest[200];
  attn_tokenizer *tokenizer;
  attn_tokens tokens = {0};
  memset(longest, 'a', sizeof longest);
  assert_int_equal(load_charsmap(0, units, 0, "", 0, &tokenizer), ATTN_BAD_FORMAT);
  assert_non_null(strstr(attn_error_message(), "normalizer Precompiled: a charsmap of 4 bytes"));
  assert_int_equal(load_charsmap(8, units, 1, "abc", 3, &tokenizer), ATTN_BAD_FORMAT);
  assert_int_equal(load_charsmap(UINT32_MAX, units, 4, "", 0, &tokenizer), ATTN_BAD_FORMAT);
  assert_int_equal(load_charsmap(4, units, 1, "\xff", 1, &tokenizer), ATTN_BAD_FORMAT);
  assert_non_null(strstr(attn_error_message(), "not UTF-8"));

  static const struct {
    uint32_t root, node, end; /* the units 0, 'a' and 1 */
    const char *strings;
    size_t expected; /* how many "a" three of them become */
  } cases[] = {
      {1 << 10, 0, 0, "", 3},               /* no way to 'a' */
      {0, 'a', 0, "", 3},                   /* a way, but no key */
      {0, 'a', 0, "aa", 6},                 /* the place is in a unit that is none: 0 */
      {0, 'a', 1, "xaa", 6},                /* strings without an end */
      {0, 'a', 2, "\xc3\xa9", 3},           /* outside */
      {0, 'a', 1, "\xc3\xa9", 3},           /* inside a character */
      {0, 'a', 0x7fffffff, "aa", 3},        /* far outside */
      {0x7fffffu << 9, 'a', 0, "aa", 3},    /* a root that points outside */
      {0, 'a' | 0x3fffffu << 10, 0, "", 3}, /* and a unit */
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i) {
    memset(units, 0, sizeof units);
    units[0] = cases[i].root;
    units['a'] = cases[i].node;
    if (i >= 2) units['a'] |= leaf | ('a' ^ 1) << 10;
    units[1] = place | cases[i].end;
    if (i == 2) units[1] = 0;
    assert_ok(load_charsmap(sizeof units, units, UNITS, cases[i].strings, strlen(cases[i].strings),
                            &tokenizer));
    encode(tokenizer, "aaa", 3, &tokens);
    if (tokens.count != cases[i].expected) fail_msg("case %zu: %zu", i, tokens.count);
    attn_tokenizer_destroy(tokenizer);
  }

  /* Every byte leads to itself, for ever; and two hundred bytes for each. */
  for (uint32_t i = 0; i < UNITS; ++i) units[i] = i | i << 10;
  assert_ok(load_charsmap(sizeof units, units, UNITS, "", 0, &tokenizer));
  encode(tokenizer, "aaaa\xc3\xa9", 6, &tokens);
  assert_int_equal(tokens.count, 4);
  attn_tokenizer_destroy(tokenizer);
  memset(units, 0, sizeof units);
  units['a'] = 'a' | leaf | ('a' ^ 1) << 10;
  units[1] = place;
  assert_ok(load_charsmap(sizeof units, units, UNITS, longest, sizeof longest, &tokenizer));
  char *text = malloc(1 << 20);
  assert_non_null(text);
  memset(text, 'a', 1 << 20);
  tokens.count = 0;
  assert_int_equal(attn_tokenizer_encode(tokenizer, text, 1 << 20, 0, &tokens), ATTN_UNSUPPORTED);
  assert_non_null(strstr(attn_error_message(), "normalising"));
  free(text);
  attn_tokens_free(&tokens);
  attn_tokenizer_destroy(tokenizer);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(graphemes_equal_the_library),
      cmocka_unit_test(every_character_equals_the_library),
      cmocka_unit_test(hostile_charsmaps),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
