/* Tokenizers as plain arrays and back: of files, of arrays, and by way of a tokenizer.json that is
 * written; every text is encoded and decoded the same. */
#include "support/test.h"

#include "base/fault.h"
#include "base/io.h"
#include "base/memory.h"
#include "files/json.h"
#include "files/tokenizer.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define FIXTURES ATTN_SOURCE_DIR "/tests/unit/fixtures/tokenizer/"

static json_t *load_json(const char *name) {
  json_error_t error;
  json_t *value = json_load_file(name, JSON_ALLOW_NUL, &error);
  if (!value) fail_msg("%s: %s", name, error.text);
  return value;
}

static const char *saved_path(void) {
  static char path[64];
  snprintf(path, sizeof path, "/tmp/attn-tokenizer-%ld.json", (long)getpid());
  return path;
}

/* Without the added tokens that are looked for in ways of their own: "word", "</tool>", and what is
 * found in normalised text only. */
static attn_tokenizer *load(const char *family) {
  char path[512];
  attn_tokenizer *tokenizer;
  snprintf(path, sizeof path, FIXTURES "%s.json", family);
  json_t *root = load_json(path), *list = json_object_get(root, "added_tokens");
  for (size_t i = json_array_size(list); i-- > 0;)
    if (json_is_true(json_object_get(json_array_get(list, i), "normalized")))
      json_array_remove(list, i);
  assert_int_equal(json_dump_file(root, saved_path(), 0), 0);
  json_decref(root);
  assert_ok(attn_tokenizer_load(saved_path(), &tokenizer));
  unlink(saved_path());
  return tokenizer;
}

static void assert_same_text(const attn_tokenizer *a, const attn_tokenizer *b, const char *text,
                             size_t size, unsigned flags) {
  attn_tokens x = {0}, y = {0};
  attn_text s = {0}, t = {0};
  assert_ok(attn_tokenizer_encode(a, text, size, flags, &x));
  assert_ok(attn_tokenizer_encode(b, text, size, flags, &y));
  if (x.count != y.count || (x.count && memcmp(x.ids, y.ids, x.count * sizeof *x.ids)))
    fail_msg("\"%s\" with flags %u has %zu or %zu tokens", text, flags, x.count, y.count);
  assert_ok(attn_tokenizer_decode(a, x.ids, x.count, ATTN_DECODE_START, &s));
  assert_ok(attn_tokenizer_decode(b, x.ids, x.count, ATTN_DECODE_START, &t));
  assert_int_equal(s.length, t.length);
  if (s.length) assert_memory_equal(s.data, t.data, s.length);
  attn_text_free(&s);
  attn_text_free(&t);
  attn_tokens_free(&x);
  attn_tokens_free(&y);
}

/* <mask>, whose spaces are lost, is left out where it would be found. */
static void assert_same(const attn_tokenizer *a, const attn_tokenizer *b) {
  json_t *file = load_json(FIXTURES "texts.json"), *text;
  size_t i;
  json_array_foreach(json_object_get(file, "texts"), i, text) {
    size_t size = json_string_length(text);
    bool strips = memmem(json_string_value(text), size, "<mask>", 6);
    for (unsigned flags = 0; flags < 4; ++flags)
      if (!strips || !(flags & ATTN_ENCODE_SPECIAL))
        assert_same_text(a, b, json_string_value(text), size, flags);
  }
  json_decref(file);
}

static void check_arrays(const attn_tokenizer *tokenizer, const char *model, const char *pre) {
  enum { PADS = 3 };
  attn_tokenizer_arrays arrays;
  attn_tokenizer *made;
  int64_t count = attn_tokenizer_count(tokenizer);
  assert_ok(attn_tokenizer_describe(tokenizer, count + PADS, &arrays));
  assert_string_equal(arrays.spec.model, model);
  if (pre) assert_string_equal(arrays.spec.pre, pre);
  assert_int_equal(arrays.spec.token_count, count + PADS);
  assert_int_equal(arrays.types[count], ATTN_TOKEN_UNUSED);
  assert_ok(attn_tokenizer_create(&arrays.spec, &made));
  assert_same(tokenizer, made);
  attn_tokenizer_destroy(made);
  assert_ok(attn_tokenizer_save(&arrays.spec, saved_path()));
  attn_tokenizer_arrays_free(&arrays);
  assert_ok(attn_tokenizer_load(saved_path(), &made));
  assert_int_equal(attn_tokenizer_count(made), count + PADS);
  assert_same(tokenizer, made);
  attn_tokenizer_destroy(made);
  unlink(saved_path());
}

static void byte_level(void **state) {
  (void)state;
  static const char *const pairs[][2] = {
      {"gpt2", "gpt-2"},    {"llama3", "llama-bpe"},       {"qwen2", "qwen2"},
      {"smollm", "smollm"}, {"deepseek2", "deepseek-llm"}, {"deepseek3", "deepseek-v3"},
      {"kimi", "kimi-k2"}};
  for (int i = 0; i < 7; ++i) {
    attn_tokenizer *tokenizer = load(pairs[i][0]);
    check_arrays(tokenizer, "gpt2", pairs[i][1]);
    attn_tokenizer_destroy(tokenizer);
  }
}

/* A SentencePiece vocabulary: what scores say, merges say too. */
static void sentence_piece(void **state) {
  (void)state;
  enum { MOST = 1024 };
  static const char *tokens[MOST];
  static int32_t types[MOST];
  static float scores[MOST];
  json_t *root = load_json(FIXTURES "llama2.json"), *id;
  const char *string;
  attn_tokenizer_spec spec = ATTN_TOKENIZER_SPEC_INIT;
  json_object_foreach(json_object_get(json_object_get(root, "model"), "vocab"), string, id) {
    json_int_t i = json_integer_value(id);
    bool byte = strncmp(string, "<0x", 3) == 0;
    tokens[i] = string;
    types[i] = byte                            ? ATTN_TOKEN_BYTE
               : i == 0                        ? ATTN_TOKEN_UNKNOWN
               : string[0] == '<' && string[1] ? ATTN_TOKEN_CONTROL
                                               : ATTN_TOKEN_NORMAL;
    scores[i] = byte ? 0 : -(float)i;
    if (i >= spec.token_count) spec.token_count = i + 1;
  }
  spec.model = "llama";
  spec.tokens = tokens;
  spec.types = types;
  spec.scores = scores;
  spec.unknown = 0;
  spec.bos = 1;
  for (int turn = 0; turn < 2; ++turn) {
    attn_tokenizer *tokenizer, *made;
    spec.add_space_prefix = spec.add_bos = !turn;
    assert_ok(attn_tokenizer_create(&spec, &tokenizer));
    assert_ok(attn_tokenizer_save(&spec, saved_path()));
    assert_ok(attn_tokenizer_load(saved_path(), &made));
    assert_same(tokenizer, made);
    check_arrays(made, "llama", NULL);
    attn_tokenizer_destroy(tokenizer);
    attn_tokenizer_destroy(made);
  }
  json_decref(root);
}

static void what_arrays_cannot_say(void **state) {
  (void)state;
  static const char *const refused[][2] = {
      {"roberta", "cuts text"}, {"splits", "cuts text"}, {"bert", "merges"},
      {"unigram", "merges"},    {"llama2", "merges"}, /* trained as BPE: not every way to make a
                                                         token is a merge */
  };
  attn_tokenizer_arrays arrays;
  for (size_t i = 0; i < sizeof refused / sizeof *refused; ++i) {
    attn_tokenizer *tokenizer = load(refused[i][0]);
    assert_int_equal(attn_tokenizer_describe(tokenizer, 1 << 20, &arrays), ATTN_UNSUPPORTED);
    if (!strstr(attn_error_message(), refused[i][1])) fail_msg("%s", attn_error_message());
    assert_null(arrays.strings);
    attn_tokenizer_destroy(tokenizer);
  }
  attn_tokenizer *tokenizer = load("gpt2");
  assert_int_equal(attn_tokenizer_describe(tokenizer, 10, &arrays), ATTN_UNSUPPORTED);
  attn_tokenizer_destroy(tokenizer);
  assert_ok(attn_tokenizer_load(FIXTURES "gpt2.json", &tokenizer)); /* "word" by itself only */
  assert_int_equal(attn_tokenizer_describe(tokenizer, 500, &arrays), ATTN_UNSUPPORTED);
  assert_non_null(strstr(attn_error_message(), "\"word\""));
  attn_tokenizer_destroy(tokenizer);
  attn_tokenizer_spec spec = ATTN_TOKENIZER_SPEC_INIT;
  static const char *const tokens[] = {"\xff"};
  spec.model = "bert";
  spec.tokens = tokens;
  spec.token_count = 1;
  assert_int_equal(attn_tokenizer_save(&spec, saved_path()), ATTN_UNSUPPORTED);
  spec.model = "gpt2";
  assert_int_equal(attn_tokenizer_save(&spec, saved_path()), ATTN_UNSUPPORTED);
}

/* Every allocation fails once (jansson has its own): a clean error, and nothing leaked. */
static void faults(void **state) {
  (void)state;
  attn_tokenizer *tokenizer = load("smollm");
  size_t live = attn_memory_get_stats().live_bytes;
  for (int skip = 0;; ++skip) {
    attn_tokenizer_arrays arrays;
    attn_fault_arm(ATTN_FAULT_ALLOC, skip);
    attn_status status = attn_tokenizer_describe(tokenizer, 500, &arrays);
    bool hit = attn_fault_disarm(ATTN_FAULT_ALLOC);
    if (status == ATTN_OK) attn_tokenizer_arrays_free(&arrays);
    assert_int_equal(attn_memory_get_stats().live_bytes, live);
    if (!hit) {
      assert_ok(status);
      break;
    }
    assert_int_equal(status, ATTN_OUT_OF_MEMORY);
  }
  attn_tokenizer_destroy(tokenizer);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(byte_level),
      cmocka_unit_test(sentence_piece),
      cmocka_unit_test(what_arrays_cannot_say),
      cmocka_unit_test(faults),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
