/* Tokenizers: the ids that the library `tokenizers` gives (fixtures/tokenizer.py), bytes that come
 * back, specifications as GGUF has them, and files that nobody should have written. */
#include "support/test.h"

#include "base/fault.h"
#include "base/io.h"
#include "base/memory.h"
#include "base/random.h"
#include "base/status.h"
#include "base/text.h"
#include "files/json.h"
#include "files/tokenizer.h"

#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define FIXTURES ATTN_SOURCE_DIR "/tests/unit/fixtures/tokenizer/"

static const char *const families[] = {"gpt2",      "roberta", "llama3", "qwen2",   "smollm",
                                       "splits",    "llama2",  "bert",   "unigram", "deepseek2",
                                       "deepseek3", "kimi",    "xlmr",   "charsmap"};
enum { FAMILIES = sizeof families / sizeof *families };

static char directory[64];

static const char *in_directory(const char *name) {
  static char path[256];
  snprintf(path, sizeof path, "%s/%s", directory, name);
  return path;
}

static int make_directory(void **state) {
  (void)state;
  snprintf(directory, sizeof directory, "%s/attn-tokenizer-XXXXXX",
           access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
  return mkdtemp(directory) ? 0 : -1;
}

static int remove_directory(void **state) {
  (void)state;
  char command[128];
  snprintf(command, sizeof command, "rm -r %s", directory);
  return system(command);
}

static void write_bytes(const char *name, const void *bytes, size_t size) {
  FILE *file = fopen(in_directory(name), "wb");
  assert_non_null(file);
  assert_int_equal(fwrite(bytes, 1, size, file), size);
  assert_int_equal(fclose(file), 0);
}

static attn_tokenizer *load(const char *family) {
  char path[512];
  attn_tokenizer *tokenizer;
  snprintf(path, sizeof path, FIXTURES "%s.json", family);
  assert_ok(attn_tokenizer_load(path, &tokenizer));
  return tokenizer;
}

/* A file of the fixtures; texts may contain NUL, which configurations may not. */
static json_t *load_json(const char *name) {
  char path[512];
  json_error_t error;
  snprintf(path, sizeof path, FIXTURES "%s.json", name);
  json_t *value = json_load_file(path, JSON_ALLOW_NUL, &error);
  if (!value) fail_msg("%s: %s", path, error.text);
  return value;
}

/* -- The same ids as the library -- */

static void print_ids(const char *label, const attn_tokenizer *tokenizer, const int32_t *ids,
                      size_t count) {
  fprintf(stderr, "  %s:", label);
  for (size_t i = 0; i < count; ++i) {
    size_t size = 0;
    const char *string = attn_tokenizer_string(tokenizer, ids[i], &size);
    fprintf(stderr, " %d'%.*s'", ids[i], (int)size, string ? string : "?");
  }
  fprintf(stderr, "\n");
}

static bool same_ids(const attn_tokenizer *tokenizer, const json_t *text, unsigned flags,
                     const json_t *expected) {
  attn_tokens tokens = {0};
  int32_t wanted[1024];
  size_t count = json_array_size(expected);
  assert_true(count <= 1024);
  for (size_t i = 0; i < count; ++i)
    wanted[i] = (int32_t)json_integer_value(json_array_get(expected, i));
  assert_ok(attn_tokenizer_encode(tokenizer, json_string_value(text), json_string_length(text),
                                  flags, &tokens));
  bool same =
      tokens.count == count && (!count || !memcmp(tokens.ids, wanted, count * sizeof *wanted));
  if (!same) {
    fprintf(stderr, "\"%s\", flags %u\n", json_string_value(text), flags);
    print_ids("expected", tokenizer, wanted, count);
    print_ids("     got", tokenizer, tokens.ids, tokens.count);
  }
  attn_tokens_free(&tokens);
  return same;
}

/* The library shows bytes that are not UTF-8 as U+FFFD; those texts are left to other tests. */
static bool same_text(const attn_tokenizer *tokenizer, const json_t *ids, const json_t *expected) {
  attn_text text = {0};
  attn_text_add(&text, "before", 6);
  for (size_t i = 0; i < json_array_size(ids); ++i) { /* one at a time, as a stream is */
    int32_t id = (int32_t)json_integer_value(json_array_get(ids, i));
    assert_ok(attn_tokenizer_decode(tokenizer, &id, 1, i ? 0 : ATTN_DECODE_START, &text));
  }
  size_t size = json_string_length(expected);
  const char *wanted = json_string_value(expected);
  bool same = text.length == size + 6 && memcmp(text.data + 6, wanted, size) == 0;
  if (!same && strstr(wanted, "\xef\xbf\xbd")) same = true;
  if (!same) fprintf(stderr, "decoded \"%s\", expected \"%s\"\n", text.data + 6, wanted);
  attn_text_free(&text);
  return same;
}

static const json_t *or_else(const json_t *value, const json_t *otherwise) {
  return json_is_null(value) ? otherwise : value;
}

static int compare_family(const char *family, const json_t *texts) {
  char name[64];
  snprintf(name, sizeof name, "%s.ids", family);
  attn_tokenizer *tokenizer = load(family);
  json_t *file = load_json(name), *results = json_object_get(file, "texts");
  int wrong = 0;
  assert_int_equal(json_array_size(texts), json_array_size(results));
  for (size_t i = 0; i < json_array_size(texts); ++i) {
    const json_t *text = json_array_get(texts, i), *result = json_array_get(results, i);
    const json_t *ids = json_array_get(result, 0);
    int before = wrong;
    wrong += !same_ids(tokenizer, text, ATTN_ENCODE_SPECIAL, ids);
    wrong += !same_ids(tokenizer, text, 0, or_else(json_array_get(result, 1), ids));
    wrong += !same_ids(tokenizer, text, ATTN_ENCODE_SPECIAL | ATTN_ENCODE_ENDS,
                       or_else(json_array_get(result, 2), ids));
    wrong += !same_text(tokenizer, ids, or_else(json_array_get(result, 3), text));
    if (wrong > before) fprintf(stderr, "  (%s, text %zu)\n", family, i);
  }
  json_decref(file);
  attn_tokenizer_destroy(tokenizer);
  return wrong;
}

static void families_equal_the_library(void **state) {
  (void)state;
  json_t *file = load_json("texts");
  int wrong = 0;
  for (int f = 0; f < FAMILIES; ++f)
    wrong += compare_family(families[f], json_object_get(file, "texts"));
  json_decref(file);
  assert_int_equal(wrong, 0);
}

/* What normalising leaves nothing of gets no space in front either. */
static void nothing_is_left(void **state) {
  (void)state;
  static const char file[] =
      "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"\xe2\x96\x81\":0,\"a\":1},\"merges\":[]},"
      "\"normalizer\":{\"type\":\"Strip\",\"strip_left\":true,\"strip_right\":true},"
      "\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"\xe2\x96\x81\"}}";
  attn_tokenizer *tokenizer;
  attn_tokens tokens = {0};
  write_bytes("empty.json", file, sizeof file - 1);
  assert_ok(attn_tokenizer_load(in_directory("empty.json"), &tokenizer));
  assert_ok(attn_tokenizer_encode(tokenizer, " \n", 2, 0, &tokens));
  assert_int_equal(tokens.count, 0);
  assert_ok(attn_tokenizer_encode(tokenizer, " a\n", 3, 0, &tokens));
  assert_int_equal(tokens.count, 2);
  attn_tokens_free(&tokens);
  attn_tokenizer_destroy(tokenizer);
}

/* -- Bytes -- */

static void encode(const attn_tokenizer *tokenizer, const void *text, size_t size, unsigned flags,
                   attn_tokens *tokens) {
  tokens->count = 0;
  assert_ok(attn_tokenizer_encode(tokenizer, text, size, flags, tokens));
}

static void assert_returns(const attn_tokenizer *tokenizer, const void *bytes, size_t size) {
  attn_tokens tokens = {0};
  attn_text text = {0};
  encode(tokenizer, bytes, size, 0, &tokens);
  assert_ok(attn_tokenizer_decode(tokenizer, tokens.ids, tokens.count, 0, &text));
  assert_int_equal(text.length, size);
  if (size) assert_memory_equal(text.data, bytes, size);
  attn_text_free(&text);
  attn_tokens_free(&tokens);
}

/* Any bytes at all, also those with which the alphabet of UTF-8 is often broken in the middle. */
static void byte_level_returns_any_bytes(void **state) {
  (void)state;
  static const char *const names[] = {"gpt2", "llama3", "smollm"};
  static const unsigned char pieces[] =
      " \n\ta1'\xc3\xa9\xe2\x80\x8d\xf0\x9f\x91\x80\xff\xed\xa0\xc0\xf4\x90";
  attn_random random = {.seed = 5};
  for (int n = 0; n < 3; ++n) {
    attn_tokenizer *tokenizer = load(names[n]);
    for (int i = 0; i < 600; ++i) {
      unsigned char bytes[200];
      size_t size = attn_random_below(&random, sizeof bytes);
      for (size_t b = 0; b < size; ++b)
        bytes[b] = i % 2 ? pieces[attn_random_below(&random, sizeof pieces - 1)]
                         : (unsigned char)attn_random_u32(&random);
      assert_returns(tokenizer, bytes, size);
    }
    attn_tokenizer_destroy(tokenizer);
  }
}

/* As Python's errors="replace" reads them. */
static void invalid_text_is_replaced_elsewhere(void **state) {
  (void)state;
  static const char *const texts[][2] = {
      {"a\xff"
       "b",
       "a\xef\xbf\xbd"
       "b"},
      {"\xe2\x82", "\xef\xbf\xbd"},
      {"\xed\xa0\x80", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"},
      {"x\xf0\x9f\x91y\xc3", "x\xef\xbf\xbdy\xef\xbf\xbd"},
  };
  static const char *const names[] = {"llama2", "bert", "unigram"};
  for (int n = 0; n < 3; ++n) {
    attn_tokenizer *tokenizer = load(names[n]);
    for (int i = 0; i < 4; ++i) {
      attn_tokens got = {0}, expected = {0};
      encode(tokenizer, texts[i][0], strlen(texts[i][0]), 0, &got);
      encode(tokenizer, texts[i][1], strlen(texts[i][1]), 0, &expected);
      assert_int_equal(got.count, expected.count);
      if (got.count) assert_memory_equal(got.ids, expected.ids, got.count * sizeof *got.ids);
      attn_tokens_free(&got);
      attn_tokens_free(&expected);
    }
    attn_tokenizer_destroy(tokenizer);
  }
}

static void questions(void **state) {
  (void)state;
  attn_tokenizer *tokenizer = load("gpt2");
  size_t size;
  int32_t end = attn_tokenizer_find(tokenizer, "<|endoftext|>", 13), bad[] = {end, 1 << 20};
  assert_int_equal(end, 0);
  assert_true(attn_tokenizer_is_special(tokenizer, end));
  assert_false(attn_tokenizer_is_special(tokenizer, 5));
  assert_false(attn_tokenizer_is_special(tokenizer, -1));
  assert_false(attn_tokenizer_is_special(tokenizer, INT64_MAX));
  assert_memory_equal(attn_tokenizer_string(tokenizer, end, &size), "<|endoftext|>", 13);
  assert_int_equal(size, 13);
  assert_null(attn_tokenizer_string(tokenizer, -1, &size));
  assert_null(attn_tokenizer_string(tokenizer, attn_tokenizer_count(tokenizer), &size));
  assert_int_equal(attn_tokenizer_find(tokenizer, "no such token", 13), -1);
  attn_text text = {0};
  assert_int_equal(attn_tokenizer_decode(tokenizer, bad, 2, 0, &text), ATTN_INVALID_ARGUMENT);
  assert_int_equal(text.length, 0);
  assert_ok(attn_tokenizer_decode(tokenizer, bad, 1, ATTN_DECODE_SKIP_SPECIAL, &text));
  assert_int_equal(text.length, 0);
  attn_text_free(&text);
  attn_tokenizer_destroy(tokenizer);
  attn_tokenizer_destroy(NULL);
}

/* -- Specifications -- */

enum { MOST = 1024 };
typedef struct specification {
  attn_tokenizer_spec spec;
  const char *tokens[MOST], *merges[MOST];
  int32_t types[MOST];
  float scores[MOST];
  char text[65536];
  size_t used;
} specification;

static const char *keep(specification *s, const char *a, const char *separator, const char *b) {
  char *at = s->text + s->used;
  s->used += (size_t)snprintf(at, sizeof s->text - s->used, "%s%s%s", a, separator, b) + 1;
  assert_true(s->used < sizeof s->text);
  return at;
}

/* The tokens and merges of a tokenizer.json, without the added tokens that are not special. */
static specification *specify(const char *family, const char *model, const char *pre) {
  specification *s = calloc(1, sizeof *s);
  assert_non_null(s);
  json_t *root = load_json(family), *file = json_object_get(root, "model"), *value;
  const char *key;
  size_t i;
  s->spec = (attn_tokenizer_spec)ATTN_TOKENIZER_SPEC_INIT;
  s->spec.model = model;
  s->spec.pre = pre;
  s->spec.tokens = s->tokens;
  s->spec.types = s->types;
  s->spec.scores = s->scores;
  s->spec.merges = s->merges;
  json_object_foreach(json_object_get(file, "vocab"), key, value) {
    json_int_t id = json_integer_value(value);
    bool byte = strncmp(key, "<0x", 3) == 0;
    bool special = key[0] == '<' && strlen(key) > 2 && !byte;
    if (strcmp(model, "bert") == 0) special = key[0] == '[' && strlen(key) > 2;
    s->tokens[id] = keep(s, key, "", "");
    s->types[id] = special ? ATTN_TOKEN_CONTROL : byte ? ATTN_TOKEN_BYTE : ATTN_TOKEN_NORMAL;
    s->scores[id] = -1000000;
    if (id >= s->spec.token_count) s->spec.token_count = id + 1;
  }
  json_array_foreach(json_object_get(file, "merges"), i, value) {
    const char *left = json_string_value(json_array_get(value, 0));
    const char *right = json_string_value(json_array_get(value, 1));
    s->merges[s->spec.merge_count++] = keep(s, left, " ", right);
    const char *both = keep(s, left, "", right);
    for (int64_t t = 0; t < s->spec.token_count; ++t)
      if (strcmp(s->tokens[t], both) == 0) s->scores[t] = -(float)i;
  }
  json_decref(root);
  return s;
}

/* Gives the ids of the fixtures for all texts that have no added token beyond the vocabulary. */
static void assert_like(const char *family, const attn_tokenizer *tokenizer) {
  char name[64];
  snprintf(name, sizeof name, "%s.ids", family);
  json_t *file = load_json(name), *texts = load_json("texts"), *result;
  size_t i, compared = 0, wrong = 0;
  json_array_foreach(json_object_get(file, "texts"), i, result) {
    const json_t *ids = json_array_get(result, 0), *id;
    bool known = true;
    for (size_t k = 0; (id = json_array_get(ids, k)); ++k)
      known &= json_integer_value(id) < attn_tokenizer_count(tokenizer);
    if (!known) continue;
    ++compared;
    wrong += !same_ids(tokenizer, json_array_get(json_object_get(texts, "texts"), i),
                       ATTN_ENCODE_SPECIAL, ids);
  }
  json_decref(file);
  json_decref(texts);
  assert_true(compared > 50);
  assert_int_equal(wrong, 0);
}

static void specifications_equal_files(void **state) {
  (void)state;
  static const char *const pairs[][2] = {{"gpt2", "gpt-2"},
                                         {"gpt2", NULL},
                                         {"llama3", "llama-bpe"},
                                         {"qwen2", "qwen2"},
                                         {"smollm", "smollm"},
                                         {"deepseek2", "deepseek-llm"},
                                         {"deepseek3", "deepseek-v3"},
                                         {"kimi_set", "kimi-k2"}};
  attn_tokenizer *tokenizer;
  for (int i = 0; i < 8; ++i) {
    specification *s = specify(pairs[i][0], "gpt2", pairs[i][1]);
    assert_ok(attn_tokenizer_create(&s->spec, &tokenizer));
    free(s);
    assert_like(pairs[i][0], tokenizer);
    attn_tokenizer_destroy(tokenizer);
  }
  specification *s = specify("llama2", "llama", NULL);
  s->spec.unknown = 0;
  s->spec.bos = 1;
  s->spec.add_bos = true;
  assert_ok(attn_tokenizer_create(&s->spec, &tokenizer));
  assert_like("llama2", tokenizer);
  attn_tokens tokens = {0};
  encode(tokenizer, "", 0, ATTN_ENCODE_ENDS, &tokens);
  assert_int_equal(tokens.count, 1);
  assert_int_equal(tokens.ids[0], 1);
  attn_tokens_free(&tokens);
  attn_tokenizer_destroy(tokenizer);
  free(s);
}

static void bert_specification(void **state) {
  (void)state;
  specification *s = specify("bert", "bert", NULL);
  attn_tokenizer *tokenizer;
  for (int64_t i = 0; i < s->spec.token_count; ++i) {
    const char *token = s->tokens[i];
    if (s->types[i] == ATTN_TOKEN_CONTROL) continue;
    s->tokens[i] =
        strncmp(token, "##", 2) == 0 && token[2] ? token + 2 : keep(s, "\xe2\x96\x81", "", token);
  }
  s->spec.unknown = 1;
  assert_ok(attn_tokenizer_create(&s->spec, &tokenizer));
  assert_like("bert", tokenizer);
  attn_tokenizer_destroy(tokenizer);
  free(s);
}

/* Special and unused tokens are no words; those with U+2581 that the user defined are, at no cost.
 */
static void unigram_specification(void **state) {
  (void)state;
  static const char *const tokens[] = {
      "<unk>", "</s>", "[PAD0]", "\xe2\x96\x81", "a", "b", "ab", "\xe2\x96\x81\xe2\x96\x81", "<u>"};
  static const float scores[] = {0, 0, 0, -3, -2, -2, -5, -1000, -1000};
  static const int32_t types[] = {2, 3, 5, 1, 1, 1, 1, 4, 4};
  static const struct {
    const char *text;
    bool prefix, words;
    size_t count;
    int32_t ids[8];
  } cases[] = {
      {"ab", true, false, 3, {3, 4, 5}}, /* -4 against -5 */
      {"ab", false, false, 2, {4, 5}},
      {"a  b", true, false, 4, {3, 4, 7, 5}},
      {"  a b ", true, true, 4, {3, 4, 3, 5}},
      {"  a b ", false, true, 4, {3, 4, 3, 5}}, /* whatever is said of the prefix */
      {"a\nb", true, true, 4, {3, 4, 0, 5}},    /* no charsmap makes it a space */
      {"xyz</s>", true, false, 2, {3, 0}},
      {"[PAD0]", false, false, 1, {0}},
      {"a<u>b", false, false, 3, {4, 8, 5}},
  };
  attn_tokenizer_spec spec = ATTN_TOKENIZER_SPEC_INIT;
  spec.model = "t5";
  spec.token_count = 9;
  spec.tokens = tokens;
  spec.scores = scores;
  spec.types = types;
  spec.unknown = 0;
  for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i) {
    attn_tokenizer *tokenizer;
    attn_tokens got = {0};
    spec.add_space_prefix = cases[i].prefix;
    spec.remove_extra_spaces = cases[i].words;
    assert_ok(attn_tokenizer_create(&spec, &tokenizer));
    encode(tokenizer, cases[i].text, strlen(cases[i].text), 0, &got);
    if (got.count != cases[i].count || memcmp(got.ids, cases[i].ids, got.count * sizeof *got.ids))
      fail_msg("\"%s\": %zu tokens", cases[i].text, got.count);
    attn_tokens_free(&got);
    attn_tokenizer_destroy(tokenizer);
  }
}

static void bad_specifications(void **state) {
  (void)state;
  static const char *const tokens[] = {"a", "b", "ab", "<s>"}, *const merges[] = {"a b"};
  static const char *const twice[] = {"a", "b", "a", "<s>"}, *const apart[] = {"ab"},
                           *const none[] = {"a c"};
  static const float scores[] = {0, 0, 0, 0}, endless[] = {0, (float)1e39, 0, 0};
  static const int32_t types[] = {1, 1, 9, 3};
  const attn_tokenizer_spec good = {.model = "gpt2",
                                    .token_count = 4,
                                    .tokens = tokens,
                                    .merge_count = 1,
                                    .merges = merges,
                                    .bos = 3,
                                    .eos = -1,
                                    .unknown = -1,
                                    .scores = scores};
  attn_tokenizer *tokenizer;
  assert_ok(attn_tokenizer_create(&good, &tokenizer));
  attn_tokenizer_destroy(tokenizer);
#define REFUSED(change, status, words)                                                             \
  do {                                                                                             \
    attn_tokenizer_spec spec = good;                                                               \
    change;                                                                                        \
    assert_int_equal(attn_tokenizer_create(&spec, &tokenizer), status);                            \
    assert_null(tokenizer);                                                                        \
    if (!strstr(attn_error_message(), words)) fail_msg("%s", attn_error_message());                \
  } while (0)
  REFUSED(spec.model = "rwkv", ATTN_UNSUPPORTED, "rwkv");
  REFUSED(spec.pre = "viking", ATTN_UNSUPPORTED, "viking");
  REFUSED(spec.model = NULL, ATTN_INVALID_ARGUMENT, "missing");
  REFUSED(spec.token_count = 0, ATTN_BAD_FORMAT, "0 tokens");
  REFUSED(spec.token_count = INT64_MAX, ATTN_BAD_FORMAT, "tokens");
  REFUSED(spec.tokens = twice, ATTN_BAD_FORMAT, "two ids, 0 and 2");
  REFUSED(spec.merges = apart, ATTN_BAD_FORMAT, "merge 0");
  REFUSED(spec.merges = none, ATTN_BAD_FORMAT, "the right");
  REFUSED(spec.merges = NULL, ATTN_INVALID_ARGUMENT, "merges");
  REFUSED(spec.types = types, ATTN_BAD_FORMAT, "unknown type 9");
  REFUSED(spec.bos = 4, ATTN_BAD_FORMAT, "BOS");
  REFUSED(spec.add_eos = true, ATTN_BAD_FORMAT, "EOS");
  REFUSED((spec.model = "llama", spec.scores = NULL), ATTN_BAD_FORMAT, "scores");
  REFUSED((spec.model = "llama", spec.scores = endless), ATTN_BAD_FORMAT, "not finite");
  REFUSED(spec.model = "bert", ATTN_BAD_FORMAT, "unknown");
  REFUSED(spec.model = "t5", ATTN_BAD_FORMAT, "unknown");
  REFUSED((spec.model = "t5", spec.scores = NULL), ATTN_BAD_FORMAT, "scores");
  REFUSED((spec.model = "t5", spec.unknown = 0, spec.scores = endless), ATTN_BAD_FORMAT,
          "not finite");
  REFUSED((spec.model = "t5", spec.unknown = 0, spec.charsmap = "\4\0\0\0", spec.charsmap_size = 4),
          ATTN_BAD_FORMAT, "precompiled_charsmap: a charsmap of 4 bytes");
#undef REFUSED
}

/* -- Files that are wrong -- */

#define VOCAB "\"vocab\":{\"a\":0,\"b\":1,\"ab\":2,\"[U]\":3}"
#define BPE   "\"model\":{\"type\":\"BPE\"," VOCAB ",\"merges\":[\"a b\"]}"
#define SPLIT(pattern)                                                                             \
  "{" BPE ",\"pre_tokenizer\":{\"type\":\"Split\",\"behavior\":\"Isolated\",\"pattern\":" pattern  \
  "}}"

static void wrong_files(void **state) {
  (void)state;
  static const struct {
    const char *text;
    attn_status status;
    const char *message;
  } cases[] = {
      {"", ATTN_BAD_FORMAT, "not valid JSON"},
      {"[]", ATTN_BAD_FORMAT, "object"},
      {"{}", ATTN_BAD_FORMAT, "\"model\" is missing"},
      {"{\"model\":{\"type\":\"BPE\"}}", ATTN_BAD_FORMAT, "\"vocab\" is missing"},
      {"{\"model\":{\"type\":\"WordLevel\"}}", ATTN_UNSUPPORTED, "model \"WordLevel\""},
      {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":-1},\"merges\":[]}}", ATTN_BAD_FORMAT,
       "id -1"},
      {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":2000000000},\"merges\":[]}}", ATTN_BAD_FORMAT,
       "2000000000"},
      {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":9223372036854775807},\"merges\":[]}}",
       ATTN_BAD_FORMAT, "id 9223372036854775807"},
      {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":\"0\"},\"merges\":[]}}", ATTN_BAD_FORMAT,
       "not an integer"},
      {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":0},\"merges\":[]}}", ATTN_BAD_FORMAT,
       "two tokens"},
      {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"a\":1},\"merges\":[]}}", ATTN_BAD_FORMAT,
       "duplicate"},
      {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"\xff\":0},\"merges\":[]}}", ATTN_BAD_FORMAT,
       "byte 0xff"},
      {"{\"model\":{\"type\":\"BPE\"," VOCAB ",\"merges\":[\"ab\"]}}", ATTN_BAD_FORMAT, "merge 0"},
      {"{\"model\":{\"type\":\"BPE\"," VOCAB ",\"merges\":[\"a c\"]}}", ATTN_BAD_FORMAT,
       "the right"},
      {"{\"model\":{\"type\":\"BPE\"," VOCAB ",\"merges\":[[\"c\",\"a\"]]}}", ATTN_BAD_FORMAT,
       "the left"},
      {"{\"model\":{\"type\":\"BPE\"," VOCAB ",\"merges\":[[\"b\",\"a\"]]}}", ATTN_BAD_FORMAT,
       "the union"},
      {"{\"model\":{\"type\":\"BPE\"," VOCAB ",\"merges\":[3]}}", ATTN_BAD_FORMAT, "merge 0"},
      {"{\"model\":{\"type\":\"BPE\"," VOCAB ",\"merges\":[],\"unk_token\":\"?\"}}",
       ATTN_BAD_FORMAT, "unk_token"},
      {"{\"model\":{\"type\":\"BPE\"," VOCAB ",\"merges\":[],\"dropout\":0.5}}", ATTN_UNSUPPORTED,
       "dropout"},
      {"{\"model\":{\"type\":\"WordPiece\"," VOCAB ",\"continuing_subword_prefix\":\"##\"}}",
       ATTN_BAD_FORMAT, "unk_token"},
      {"{\"model\":{\"type\":\"Unigram\",\"vocab\":[[\"a\"]]}}", ATTN_BAD_FORMAT, "token 0"},
      {"{\"model\":{\"type\":\"Unigram\",\"vocab\":[[\"a\",1],[\"a\",2]]}}", ATTN_BAD_FORMAT,
       "two ids"},
      {"{\"model\":{\"type\":\"Unigram\",\"vocab\":[[\"a\",1]],\"unk_id\":1}}", ATTN_BAD_FORMAT,
       "unk_id"},
      {"{" BPE ",\"added_tokens\":[{\"id\":4}]}", ATTN_BAD_FORMAT, "added_tokens[0]"},
      {"{" BPE ",\"added_tokens\":[{\"id\":2,\"content\":\"x\"}]}", ATTN_BAD_FORMAT,
       "id 2 is given to two"},
      {"{" BPE ",\"added_tokens\":[{\"id\":9,\"content\":\"a\"}]}", ATTN_BAD_FORMAT,
       "two ids, 0 and 9"},
      {"{" BPE ",\"normalizer\":{\"type\":\"Nmt\"}}", ATTN_UNSUPPORTED, "normalizer \"Nmt\""},
      {"{" BPE ",\"normalizer\":{\"type\":\"Precompiled\"}}", ATTN_BAD_FORMAT,
       "normalizer Precompiled"},
      {"{" BPE ",\"normalizer\":{\"type\":\"Precompiled\",\"precompiled_charsmap\":\"AAAA=\"}}",
       ATTN_BAD_FORMAT, "multiple of 4"},
      {"{" BPE ",\"normalizer\":{\"type\":\"Precompiled\",\"precompiled_charsmap\":\"A=AA\"}}",
       ATTN_BAD_FORMAT, "byte 0x3d at 1"},
      {"{" BPE ",\"normalizer\":{\"type\":\"Precompiled\",\"precompiled_charsmap\":\"\"}}",
       ATTN_BAD_FORMAT, "charsmap of 0 bytes"},
      {"{" BPE ",\"normalizer\":3}", ATTN_BAD_FORMAT, "normalizer"},
      {"{" BPE ",\"pre_tokenizer\":{\"type\":\"UnicodeScripts\"}}", ATTN_UNSUPPORTED,
       "UnicodeScripts"},
      {"{" BPE ",\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{}]}}",
       ATTN_BAD_FORMAT, "pre_tokenizer Sequence"},
      {"{" BPE ",\"decoder\":{\"type\":\"CTC\"}}", ATTN_UNSUPPORTED, "CTC"},
      {"{" BPE
       ",\"post_processor\":{\"type\":\"BertProcessing\",\"sep\":[\"x\",99],\"cls\":[\"x\",0]}}",
       ATTN_BAD_FORMAT, "99"},
      {"{" BPE
       ",\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[],\"special_tokens\":{}}}",
       ATTN_BAD_FORMAT, "0 sequences"},
      {SPLIT("3"), ATTN_BAD_FORMAT, "pattern"},
      {SPLIT("{\"String\":\"\"}"), ATTN_BAD_FORMAT, "empty"},
      {SPLIT("{\"Regex\":\"(\"}"), ATTN_UNSUPPORTED, "the pattern"},
      {SPLIT("{\"Regex\":\"[a&&b]\"}"), ATTN_UNSUPPORTED, "set operation"},
      {SPLIT("{\"Regex\":\"a{1,2}+\"}"), ATTN_UNSUPPORTED, "counted"},
      {SPLIT("{\"Regex\":\"\\\\C\"}"), ATTN_UNSUPPORTED, "the pattern"},
  };
  attn_tokenizer *tokenizer;
  size_t live = attn_memory_get_stats().live_bytes;
  for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i) {
    write_bytes("bad.json", cases[i].text, strlen(cases[i].text));
    attn_status status = attn_tokenizer_load(in_directory("bad.json"), &tokenizer);
    if (status != cases[i].status || !strstr(attn_error_message(), cases[i].message))
      fail_msg("%s\n  gave %s: %s", cases[i].text, attn_status_name(status), attn_error_message());
    assert_null(tokenizer);
  }
  assert_int_equal(attn_tokenizer_load(in_directory("none.json"), &tokenizer), ATTN_NOT_FOUND);
  assert_int_equal(attn_memory_get_stats().live_bytes, live);
}

/* {"type":"Sequence","pretokenizers":[{"type":"Sequence", ... */
static void deep_files(void **state) {
  (void)state;
  static const char open[] = "{\"type\":\"Sequence\",\"pretokenizers\":[";
  attn_tokenizer *tokenizer;
  for (int depth = 20; depth <= 20000; depth *= 1000) {
    attn_text text = {0};
    attn_text_print(&text, "{" BPE ",\"pre_tokenizer\":");
    for (int i = 0; i < depth; ++i) attn_text_add(&text, open, sizeof open - 1);
    for (int i = 0; i < depth; ++i) attn_text_add(&text, "]}", 2);
    attn_text_add(&text, "}", 1);
    write_bytes("deep.json", text.data, text.length);
    attn_text_free(&text);
    assert_int_equal(attn_tokenizer_load(in_directory("deep.json"), &tokenizer),
                     depth > 1000 ? ATTN_BAD_FORMAT : ATTN_UNSUPPORTED);
  }
}

static const char sample[] =
    "In the 1st beginning,\n  God's caf\xc3\xa9 \xe5\xa4\xa9 <s> <mask> \xff word!";

/* Either it loads and can be used, or it is a clean error with a message. */
static bool survives(const char *bytes, size_t size) {
  attn_tokenizer *tokenizer;
  attn_tokens tokens = {0};
  attn_text text = {0};
  write_bytes("mutant.json", bytes, size);
  attn_status status = attn_tokenizer_load(in_directory("mutant.json"), &tokenizer);
  bool loaded = status == ATTN_OK;
  if (loaded && attn_tokenizer_encode(tokenizer, sample, sizeof sample - 1, 3, &tokens) == ATTN_OK)
    assert_ok(attn_tokenizer_decode(tokenizer, tokens.ids, tokens.count, 0, &text));
  if (!loaded) {
    assert_null(tokenizer);
    assert_true(status == ATTN_BAD_FORMAT || status == ATTN_UNSUPPORTED);
    assert_true(strlen(attn_error_message()) > 0);
  }
  attn_tokens_free(&tokens);
  attn_text_free(&text);
  attn_tokenizer_destroy(tokenizer);
  return loaded;
}

static void mutants_never_crash(void **state) {
  (void)state;
  enum { MUTANTS = 300 };
  static const char interesting[] = "0123456789-+.eE[]{},:\"\\ \n\0\x7f\xff*?(|";
  attn_random random = {.seed = 13};
  size_t live = attn_memory_get_stats().live_bytes;
  int refused = 0;
  for (int f = 0; f < FAMILIES; ++f) {
    char path[512], *valid, *mutant;
    size_t size;
    snprintf(path, sizeof path, FIXTURES "%s.json", families[f]);
    assert_ok(attn_file_read(path, 1 << 20, &valid, &size));
    mutant = malloc(size);
    assert_non_null(mutant);
    assert_true(survives(valid, size));
    for (int i = 0; i < MUTANTS; ++i) {
      memcpy(mutant, valid, size);
      int changes = 1 + (int)attn_random_below(&random, 3);
      for (int c = 0; c < changes; ++c) { /* half of them where the settings are */
        size_t place = attn_random_below(&random, c % 2 ? size : size / 4);
        mutant[place] = interesting[attn_random_below(&random, sizeof interesting - 1)];
      }
      refused += !survives(mutant, i % 4 ? size : attn_random_below(&random, size));
    }
    free(mutant);
    attn_free(valid);
  }
  assert_true(refused > FAMILIES * MUTANTS / 4);
  assert_int_equal(attn_memory_get_stats().live_bytes, live);
}

/* -- Memory that runs out -- */

static attn_status use(const char *family) {
  char path[512];
  attn_tokenizer *tokenizer;
  attn_tokens tokens = {0};
  attn_text text = {0};
  snprintf(path, sizeof path, FIXTURES "%s.json", family);
  ATTN_TRY(attn_tokenizer_load(path, &tokenizer));
  attn_status status = attn_tokenizer_encode(tokenizer, sample, sizeof sample - 1, 3, &tokens);
  if (status == ATTN_OK)
    status = attn_tokenizer_decode(tokenizer, tokens.ids, tokens.count, ATTN_DECODE_START, &text);
  if (status != ATTN_OK) assert_int_equal(text.length, 0);
  attn_tokens_free(&tokens);
  attn_text_free(&text);
  attn_tokenizer_destroy(tokenizer);
  return status;
}

static void faults(void **state) {
  (void)state;
  size_t live = attn_memory_get_stats().live_bytes;
  for (int f = 0; f < FAMILIES; ++f)
    for (int kind = 0; kind < ATTN_FAULT_KINDS; ++kind)
      /* a merge is an allocation of its own: most of those in the middle are alike */
      for (int skip = 0;; skip += skip > 40 && skip % 7 ? 6 : 1) {
        attn_fault_arm((attn_fault_kind)kind, skip);
        attn_status status = use(families[f]);
        bool hit = attn_fault_disarm((attn_fault_kind)kind);
        assert_int_equal(attn_memory_get_stats().live_bytes, live);
        if (!hit) {
          assert_ok(status);
          break;
        }
        if (status != (kind == ATTN_FAULT_ALLOC ? ATTN_OUT_OF_MEMORY : ATTN_IO_ERROR))
          fail_msg("%s, fault %d after %d: %s", families[f], kind, skip, attn_error_message());
      }
}

/* -- Texts and patterns that would take for ever -- */

static void long_texts(void **state) {
  (void)state;
  enum { LENGTH = 300000, MOST_SECONDS = 60 }; /* a quadratic step takes many minutes */
  static const char *const repeated[] = {
      "ab", " ", "\n ", "\xcc\x81\xcc\xa3", "the ", "1", "\xf0\x9f\x91\x80", "<s"};
  char *text = malloc(LENGTH);
  assert_non_null(text);
  time_t begin = time(NULL);
  for (int f = 0; f < FAMILIES; ++f) {
    attn_tokenizer *tokenizer = load(families[f]);
    for (size_t r = 0; r < sizeof repeated / sizeof *repeated; ++r) {
      size_t unit = strlen(repeated[r]), size = LENGTH / unit * unit;
      for (size_t i = 0; i < size; ++i) text[i] = repeated[r][i % unit];
      attn_tokens tokens = {0};
      encode(tokenizer, text, size, ATTN_ENCODE_SPECIAL, &tokens);
      attn_tokens_free(&tokens);
    }
    attn_tokenizer_destroy(tokenizer);
  }
  free(text);
  assert_true(time(NULL) - begin < MOST_SECONDS);
}

static void hostile_patterns(void **state) {
  (void)state;
  static const char *const files[] = {SPLIT("{\"Regex\":\"(?:a|aa)+[bc]\"}"),
                                      SPLIT("{\"Regex\":\"(a*)*c\"}"),
                                      SPLIT("{\"Regex\":\"(?:(?=a)|a|(?R))*d\"}")};
  char text[20000];
  memset(text, 'a', sizeof text);
  for (int i = 0; i < 3; ++i) {
    attn_tokenizer *tokenizer;
    attn_tokens tokens = {0};
    write_bytes("hostile.json", files[i], strlen(files[i]));
    assert_ok(attn_tokenizer_load(in_directory("hostile.json"), &tokenizer));
    attn_status status = attn_tokenizer_encode(tokenizer, text, sizeof text, 0, &tokens);
    assert_true(status == ATTN_UNSUPPORTED || status == ATTN_OK);
    if (i == 0) assert_int_equal(status, ATTN_UNSUPPORTED);
    assert_true(status == ATTN_OK || strstr(attn_error_message(), "too many steps"));
    attn_tokens_free(&tokens);
    attn_tokenizer_destroy(tokenizer);
  }
}

/* Replacements that make a hundred megabytes of one byte. */
static void growing_texts(void **state) {
  (void)state;
  static const char step[] = "{\"type\":\"Replace\",\"pattern\":{\"String\":\"a\"},"
                             "\"content\":\"aaaaaaaaaaaaaaaaaaaaaaaa\"}";
  char file[4096];
  snprintf(file, sizeof file,
           "{" BPE ",\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[%s,%s,%s,%s,%s,%s]}}",
           step, step, step, step, step, step);
  attn_tokenizer *tokenizer;
  attn_tokens tokens = {0};
  write_bytes("growing.json", file, strlen(file));
  assert_ok(attn_tokenizer_load(in_directory("growing.json"), &tokenizer));
  assert_int_equal(attn_tokenizer_encode(tokenizer, "a", 1, 0, &tokens), ATTN_UNSUPPORTED);
  assert_non_null(strstr(attn_error_message(), "normalising"));
  assert_int_equal(tokens.count, 0);
  attn_tokens_free(&tokens);
  attn_tokenizer_destroy(tokenizer);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(families_equal_the_library),
      cmocka_unit_test(nothing_is_left),
      cmocka_unit_test(byte_level_returns_any_bytes),
      cmocka_unit_test(invalid_text_is_replaced_elsewhere),
      cmocka_unit_test(questions),
      cmocka_unit_test(specifications_equal_files),
      cmocka_unit_test(bert_specification),
      cmocka_unit_test(unigram_specification),
      cmocka_unit_test(bad_specifications),
      cmocka_unit_test(wrong_files),
      cmocka_unit_test(deep_files),
      cmocka_unit_test(mutants_never_crash),
      cmocka_unit_test(faults),
      cmocka_unit_test(long_texts),
      cmocka_unit_test(hostile_patterns),
      cmocka_unit_test(growing_texts),
  };
  return cmocka_run_group_tests(tests, make_directory, remove_directory);
}
