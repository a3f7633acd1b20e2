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

static bool spells(const json_t *text, const char *token) {
  return memmem(json_string_value(text), json_string_length(text), token, strlen(token));
}

/* <mask>, whose spaces are lost, is left out where it would be found; and where the library finds
 * special tokens in any text (in_any: Unigram), so are all of them where they should not be. */
static void assert_same_texts(const attn_tokenizer *a, const attn_tokenizer *b, bool in_any) {
  static const char *const names[] = {FIXTURES "texts.json", FIXTURES "graphemes.json"};
  for (int n = 0; n < 2; ++n) {
    json_t *file = load_json(names[n]), *text;
    size_t i;
    json_array_foreach(json_object_get(file, "texts"), i, text) {
      bool strips = spells(text, "<mask>");
      bool special = in_any && (strips || spells(text, "<s>") || spells(text, "</s>"));
      for (unsigned flags = 0; flags < 4; ++flags)
        if (flags & ATTN_ENCODE_SPECIAL ? !strips : !special)
          assert_same_text(a, b, json_string_value(text), json_string_length(text), flags);
    }
    json_decref(file);
  }
}

static void assert_same(const attn_tokenizer *a, const attn_tokenizer *b) {
  assert_same_texts(a, b, false);
}

static void check_arrays(const attn_tokenizer *tokenizer, const char *model, const char *pre) {
  enum { PADS = 3 };
  bool in_any = strcmp(model, "t5") == 0;
  attn_tokenizer_arrays arrays;
  attn_tokenizer *made;
  int64_t count = attn_tokenizer_count(tokenizer);
  assert_ok(attn_tokenizer_describe(tokenizer, count + PADS, &arrays));
  assert_string_equal(arrays.spec.model, model);
  if (pre) assert_string_equal(arrays.spec.pre, pre);
  assert_int_equal(arrays.spec.token_count, count + PADS);
  assert_int_equal(arrays.types[count], ATTN_TOKEN_UNUSED);
  assert_ok(attn_tokenizer_create(&arrays.spec, &made));
  assert_same_texts(tokenizer, made, in_any);
  attn_tokenizer_destroy(made);
  assert_ok(attn_tokenizer_save(&arrays.spec, saved_path()));
  attn_tokenizer_arrays_free(&arrays);
  assert_ok(attn_tokenizer_load(saved_path(), &made));
  assert_int_equal(attn_tokenizer_count(made), count + PADS);
  assert_same_texts(tokenizer, made, in_any);
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

/* -- Files that are changed a little -- */

typedef struct change {
  const char *section, *json; /* a section of the file, and what it becomes; NULL: nothing more */
} change;

static attn_tokenizer *load_changed(const char *family, const change *changes) {
  char path[512];
  attn_tokenizer *tokenizer;
  snprintf(path, sizeof path, FIXTURES "%s.json", family);
  json_t *root = load_json(path);
  for (; changes->section; ++changes) {
    json_error_t error;
    json_t *value = json_loads(changes->json, JSON_DECODE_ANY, &error);
    const char *point = strchr(changes->section, '.');
    if (!value) fail_msg("%s: %s", changes->json, error.text);
    json_t *object = point ? json_object_get(root, "model") : root;
    assert_int_equal(json_object_set_new(object, point ? point + 1 : changes->section, value), 0);
  }
  assert_int_equal(json_dump_file(root, saved_path(), 0), 0);
  json_decref(root);
  assert_ok(attn_tokenizer_load(saved_path(), &tokenizer));
  unlink(saved_path());
  return tokenizer;
}

#define LINES   "\"replacement\":\"\xe2\x96\x81\""
#define SPACE   "{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"\xe2\x96\x81\"}"
#define PREPEND "{\"type\":\"Prepend\",\"prepend\":\"\xe2\x96\x81\"}"
#define BERT(clean, lower, accents)                                                                \
  "{\"type\":\"BertNormalizer\",\"clean_text\":" clean                                             \
  ",\"handle_chinese_chars\":true,\"lowercase\":" lower ",\"strip_accents\":" accents "}"

/* As XLM-R has it, without the cut that does nothing there, and with spaces as they are. */
static void unigram(void **state) {
  (void)state;
  static const change changes[][4] = {
      {{NULL, NULL}},
      {{"pre_tokenizer", "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"WhitespaceSplit\"},"
                         "{\"type\":\"Metaspace\"," LINES ",\"split\":false}]}"}},
      {{"pre_tokenizer", "null"},
       {"normalizer", "{\"type\":\"Sequence\",\"normalizers\":[" PREPEND "," SPACE "]}"}},
      {{"pre_tokenizer", "null"},
       {"normalizer", SPACE},
       {"decoder", "{\"type\":\"Metaspace\"," LINES ",\"prepend_scheme\":\"never\"}"}},
      {{"normalizer", "null"},
       {"pre_tokenizer",
        "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":"
        "{\"String\":\" \"},\"behavior\":\"Removed\",\"invert\":false},"
        "{\"type\":\"Metaspace\"," LINES "}]}"}},
  };
  for (size_t i = 0; i < sizeof changes / sizeof *changes; ++i) {
    attn_tokenizer *tokenizer = load_changed("xlmr", changes[i]);
    check_arrays(tokenizer, "t5", NULL);
    attn_tokenizer_destroy(tokenizer);
  }
}

static void wordpiece(void **state) {
  (void)state;
  static const change changes[][2] = {
      {{"normalizer", BERT("true", "true", "null")}},
      {{"normalizer", BERT("true", "false", "null")}},
      {{"normalizer", BERT("true", "false", "true")}},
      {{"normalizer", BERT("true", "true", "false")}},
  };
  for (size_t i = 0; i < sizeof changes / sizeof *changes; ++i) {
    attn_tokenizer *tokenizer = load_changed("bert", changes[i]);
    check_arrays(tokenizer, "bert", NULL);
    attn_tokenizer_destroy(tokenizer);
  }
}

/* A SentencePiece vocabulary of which every way to make a token is a merge. */
#define MERGES "[[\"t\",\"h\"],[\"\xe2\x96\x81\",\"t\"]]"

static attn_tokenizer *load_pieces(const char *more, const char *merges, const change *changes) {
  attn_text pieces = {0};
  change all[8] = {{"model.merges", merges},
                   {"post_processor", "null"},
                   {"added_tokens", "[{\"id\":0,\"content\":\"<unk>\",\"special\":true},"
                                    "{\"id\":1,\"content\":\"<s>\",\"special\":true}]"}};
  attn_text_print(&pieces, "{\"<unk>\":0,\"<s>\":1");
  for (int byte = 0; byte < 256; ++byte)
    attn_text_print(&pieces, ",\"<0x%02X>\":%d", (unsigned)byte, 2 + byte);
  attn_text_print(&pieces,
                  ",\"\xe2\x96\x81\":258,\"t\":259,\"h\":260,\"e\":261,\"th\":262,"
                  "\"\xe2\x96\x81t\":263%s}",
                  more);
  all[3] = (change){"model.vocab", pieces.data};
  for (int i = 0; changes[i].section; ++i) all[4 + i] = changes[i];
  attn_tokenizer *tokenizer = load_changed("llama2", all);
  attn_text_free(&pieces);
  return tokenizer;
}

#define NEVER(split)                                                                               \
  "{\"type\":\"Metaspace\"," LINES ",\"prepend_scheme\":\"never\",\"split\":" split "}"
#define PLAIN_DECODER                                                                              \
  "{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Replace\",\"pattern\":{\"String\":"            \
  "\"\xe2\x96\x81\"},\"content\":\" \"},{\"type\":\"ByteFallback\"},{\"type\":\"Fuse\"}]}"

/* Where spaces become U+2581 before or after the text is cut, and cuts that do nothing. */
static void spaces_of_merges(void **state) {
  (void)state;
  static const change changes[][4] = {
      {{NULL, NULL}},
      {{"normalizer", "null"}, {"pre_tokenizer", NEVER("false")}, {"decoder", PLAIN_DECODER}},
      {{"normalizer", "null"}, {"pre_tokenizer", NEVER("true")}, {"decoder", PLAIN_DECODER}},
      {{"normalizer", SPACE},
       {"pre_tokenizer", "{\"type\":\"Split\",\"pattern\":{\"String\":\" \"},\"behavior\":"
                         "\"MergedWithPrevious\",\"invert\":false}"},
       {"decoder", PLAIN_DECODER}},
  };
  for (size_t i = 0; i < sizeof changes / sizeof *changes; ++i) {
    attn_tokenizer *tokenizer = load_pieces("", MERGES, changes[i]);
    check_arrays(tokenizer, "llama", NULL);
    attn_tokenizer_destroy(tokenizer);
  }
}

/* -- Refusals -- */

static void assert_refused(attn_tokenizer *tokenizer, const char *words) {
  attn_tokenizer_arrays arrays;
  attn_status status = attn_tokenizer_describe(tokenizer, 1 << 20, &arrays);
  if (status != ATTN_UNSUPPORTED || !strstr(attn_error_message(), words))
    fail_msg("\"%s\" expected, got %s: %s", words, attn_status_name(status), attn_error_message());
  assert_null(arrays.strings);
  attn_tokenizer_destroy(tokenizer);
}

static void what_arrays_cannot_say(void **state) {
  (void)state;
  static const char *const refused[][2] = {
      {"roberta", "cuts text"},
      {"splits", "cuts text"},
      {"unigram", "normalizer is no charsmap"},
      {"llama2", "merges"}, /* trained as BPE: not every way to make a token is a merge */
      {"charsmap", "writes spaces in another way"}, /* of other spaces than its charsmap's */
  };
  static const struct {
    const char *family;
    change changes[3];
    const char *words;
  } changed[] = {
      {"xlmr", {{"pre_tokenizer", "null"}}, "writes spaces, or cuts at them"},
      {"xlmr", {{"normalizer", "null"}}, "writes spaces, or cuts at them"},
      {"xlmr", {{"normalizer", "{\"type\":\"NFKC\"}"}}, "normalizer is no charsmap"},
      {"xlmr", {{"model.unk_id", "null"}}, "no unknown token"},
      {"xlmr", {{"decoder", "null"}}, "decoder"},
      {"bert", {{"normalizer", BERT("false", "true", "true")}}, "normalizer or pre_tokenizer"},
      {"bert", {{"pre_tokenizer", "{\"type\":\"Whitespace\"}"}}, "normalizer or pre_tokenizer"},
      {"bert", {{"post_processor", "null"}}, "both sides"},
      {"bert", {{"model.max_input_chars_per_word", "50"}}, "max_input_chars_per_word is 50"},
      {"bert", {{"model.continuing_subword_prefix", "\"@@\""}}, "continuing_subword_prefix"},
      {"bert", {{"decoder", "{\"type\":\"WordPiece\",\"prefix\":\"@@\"}"}}, "decoder"},
      {"bert",
       {{"added_tokens", "[{\"id\":900,\"content\":\"<tool>\"}]"}},
       "added tokens that are not special"},
  };
  for (size_t i = 0; i < sizeof refused / sizeof *refused; ++i)
    assert_refused(load(refused[i][0]), refused[i][1]);
  for (size_t i = 0; i < sizeof changed / sizeof *changed; ++i)
    assert_refused(load_changed(changed[i].family, changed[i].changes), changed[i].words);
  const change first[] = {{"normalizer", "null"},
                          {"pre_tokenizer", "{\"type\":\"Metaspace\"," LINES
                                            ",\"prepend_scheme\":\"first\",\"split\":false}"},
                          {NULL, NULL}};
  assert_refused(load_pieces("", MERGES, first), "pre_tokenizer Metaspace");
  const change none[] = {{"model.vocab", "{\"<unk>\":0,\"a\":1}"},
                         {"model.merges", "[]"},
                         {"post_processor", "null"},
                         {"added_tokens", "[]"},
                         {NULL, NULL}};
  assert_refused(load_changed("llama2", none), "needs all bytes");
  const change cut[] = {{"normalizer", "null"},
                        {"pre_tokenizer", NEVER("true")},
                        {"decoder", PLAIN_DECODER},
                        {NULL, NULL}};
  assert_refused(load_pieces(",\"t\xe2\x96\x81\":264",
                             "[[\"t\",\"h\"],[\"\xe2\x96\x81\",\"t\"],[\"t\",\"\xe2\x96\x81\"]]",
                             cut),
                 "cuts text within the token");
  static const struct {
    const char *vocab, *words;
  } scores[] = {
      {"[[\"<unk>\",0],[\"a\",-0.1],[\"b\",-2]]", "no float32"},
      {"[[\"<unk>\",-5],[\"a\",-1],[\"b\",-2]]", "lowest score is of a special"},
      {"[[\"<unk>\",0],[\"a\",-1],[\"<0x0A>\",-2]]", "falls back to bytes"},
  };
  for (size_t i = 0; i < 3; ++i) {
    const change changes[] = {
        {"model.vocab", scores[i].vocab},
        {"model.unk_id", "0"},
        {"model.byte_fallback", "true"},
        {"post_processor", "null"},
        {"added_tokens", "[{\"id\":0,\"content\":\"<unk>\",\"special\":true}]"},
        {NULL, NULL}};
    assert_refused(load_changed("xlmr", changes), scores[i].words);
  }

  attn_tokenizer_arrays arrays;
  attn_tokenizer *tokenizer = load("gpt2");
  assert_int_equal(attn_tokenizer_describe(tokenizer, 10, &arrays), ATTN_UNSUPPORTED);
  attn_tokenizer_destroy(tokenizer);
  assert_ok(attn_tokenizer_load(FIXTURES "gpt2.json", &tokenizer)); /* "word" by itself only */
  assert_refused(tokenizer, "\"word\"");
  attn_tokenizer_spec spec = ATTN_TOKENIZER_SPEC_INIT;
  static const char *const tokens[] = {"\xff"};
  static const float score[] = {0};
  spec.tokens = tokens;
  spec.token_count = 1;
  spec.unknown = 0;
  spec.scores = score;
  static const char *const all[] = {"bert", "gpt2", "llama", "t5", "rwkv"};
  for (int i = 0; i < 5; ++i) {
    spec.model = all[i];
    assert_int_equal(attn_tokenizer_save(&spec, saved_path()), ATTN_UNSUPPORTED);
  }
}

/* Every allocation fails once (jansson has its own): a clean error, and nothing leaked. */
static void check_faults(const char *family) {
  attn_tokenizer *tokenizer = load(family);
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

static void faults(void **state) {
  (void)state;
  static const char *const all[] = {"smollm", "bert", "xlmr"};
  for (int i = 0; i < 3; ++i) check_faults(all[i]);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(byte_level),       cmocka_unit_test(sentence_piece),
      cmocka_unit_test(spaces_of_merges), cmocka_unit_test(unigram),
      cmocka_unit_test(wordpiece),        cmocka_unit_test(what_arrays_cannot_say),
      cmocka_unit_test(faults),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
