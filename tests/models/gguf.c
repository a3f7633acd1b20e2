/* Models saved as GGUF: what is loaded again has the same configuration, the weights that their
 * type can have, the same text and the same advice; the reference's files have the same bytes. */
#include "support/models.h"
#include "support/test.h"

#include "attn/text.h"
#include "base/fault.h"
#include "base/io.h"
#include "base/memory.h"
#include "files/gguf_split.h"
#include "files/json.h"
#include "models/model.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static const char *const families[] = {
    "llama",     "llama_tied",   "mistral",      "qwen2",          "qwen3",
    "qwen2_moe", "qwen3_moe",    "gemma2_gguf",  "llama_yarn",     "qwen3_yarn",
    "mixtral",   "deepseek2_v2", "deepseek2_v3", "qwen3_next_gguf"};
enum { FAMILIES = sizeof families / sizeof *families };

static char directory[64];

static int make_directory(void **state) {
  (void)state;
  snprintf(directory, sizeof directory, "/tmp/attn-model-gguf-XXXXXX");
  return mkdtemp(directory) ? 0 : -1;
}

static int remove_directory(void **state) {
  (void)state;
  char command[128];
  snprintf(command, sizeof command, "rm -r %s", directory);
  return system(command);
}

static const char *in_directory(const char *name) {
  static char paths[4][256];
  static int turn;
  char *path = paths[turn = (turn + 1) % 4];
  snprintf(path, sizeof paths[0], "%s/%s", directory, name);
  return path;
}

static const char *fixture(const char *family, const char *name) {
  static char paths[2][512];
  static int turn;
  char *path = paths[turn = !turn];
  snprintf(path, sizeof paths[0], "%s/tests/models/fixtures/families/%s%s%s", ATTN_SOURCE_DIR,
           family, name ? "/" : "", name ? name : "");
  return path;
}

static attn_model *load(const char *path) {
  attn_model *model;
  assert_ok(test_model_load(path, ATTN_F32, &model));
  return model;
}

static void save(const attn_model *model, const char *path, attn_weight_type type,
                 int64_t shard_bytes) {
  attn_gguf_options options = ATTN_GGUF_OPTIONS_INIT;
  options.type = type;
  options.shard_bytes = shard_bytes;
  assert_ok(attn_model_save_gguf(model, path, &options));
}

/* -- Weights -- */

static attn_block_type block_of(attn_weight_type type, int64_t columns) {
  static const attn_block_type blocks[] = {[ATTN_WEIGHTS_F32] = ATTN_BLOCK_F32,
                                           [ATTN_WEIGHTS_F16] = ATTN_BLOCK_F16,
                                           [ATTN_WEIGHTS_BF16] = ATTN_BLOCK_BF16,
                                           [ATTN_WEIGHTS_Q8_0] = ATTN_BLOCK_Q8_0,
                                           [ATTN_WEIGHTS_Q4_0] = ATTN_BLOCK_Q4_0};
  return columns % attn_block_get_format(blocks[type])->elements ? ATTN_BLOCK_F16 : blocks[type];
}

/* What a row becomes in a type and back. */
static void round_row(attn_block_type type, float *row, int64_t columns) {
  char blocks[1024];
  assert_true(columns * 4 <= (int64_t)sizeof blocks);
  if (type == ATTN_BLOCK_F32) return;
  assert_ok(attn_blocks_from_f32(type, row, blocks, columns));
  assert_ok(attn_blocks_to_f32(type, blocks, row, columns));
}

/* W_UK of latent attention, whose blocks lie along the columns of each head. */
static void assert_transposed(const attn_model *a, const attn_model *b, int64_t index,
                              attn_weight_type type) {
  const attn_mixer_options *o = &a->config.layers[0].options;
  attn_tensor s, t;
  float x[256], y[256];
  assert_ok(attn_parameter_copy(&a->parameters[index], ATTN_F32, &s));
  assert_ok(attn_parameter_copy(&b->parameters[index], ATTN_F32, &t));
  for (int64_t h = 0; h < o->heads; ++h)
    for (int64_t c = 0; c < o->latent_rank; ++c) {
      for (int64_t i = 0; i < o->dim; ++i) {
        int64_t at = (h * o->dim + i) * o->latent_rank + c;
        x[i] = ((const float *)s.data)[at];
        y[i] = ((const float *)t.data)[at];
      }
      round_row(block_of(type, o->dim), x, o->dim);
      assert_memory_equal(x, y, (size_t)o->dim * sizeof *x);
    }
  attn_tensor_destroy(&s);
  attn_tensor_destroy(&t);
}

static void assert_vectors(const attn_model *a, const attn_model *b, int64_t index) {
  bool exact = !strstr(a->shapes[index].name, "A_log"); /* stored as -exp(A_log) */
  attn_tensor s, t;
  assert_ok(attn_parameter_copy(&a->parameters[index], ATTN_F32, &s));
  assert_ok(attn_parameter_copy(&b->parameters[index], ATTN_F32, &t));
  const float *x = s.data, *y = t.data;
  for (int64_t i = 0; i < a->shapes[index].shape[0]; ++i)
    assert_true(exact ? x[i] == y[i] : fabsf(x[i] - y[i]) < 1e-6f);
  attn_tensor_destroy(&s);
  attn_tensor_destroy(&t);
}

static void assert_weights(const attn_model *a, const attn_model *b, attn_weight_type type) {
  float x[256], y[256];
  assert_int_equal(a->parameter_count, b->parameter_count);
  for (int64_t i = 0; i < a->parameter_count; ++i) {
    const attn_parameter_shape *shape = &a->shapes[i];
    assert_string_equal(shape->name, b->shapes[i].name);
    assert_memory_equal(shape->shape, b->shapes[i].shape, sizeof shape->shape);
    bool transposed = strstr(shape->name, "k_up_proj");
    if (shape->rank == 1) assert_vectors(a, b, i);
    if (transposed) assert_transposed(a, b, i, type);
    if (shape->rank == 1 || transposed) continue;
    int64_t columns = shape->shape[1];
    bool stays = strstr(shape->name, "router") || strstr(shape->name, "shared_gate") ||
                 strstr(shape->name, "conv1d");
    for (int64_t r = 0; r < shape->shape[0]; ++r) {
      assert_ok(attn_parameter_row(&a->parameters[i], r, x));
      assert_ok(attn_parameter_row(&b->parameters[i], r, y));
      if (!stays) round_row(block_of(type, columns), x, columns);
      assert_memory_equal(x, y, (size_t)columns * sizeof *x);
    }
  }
}

/* -- Logits -- */

static double difference_of_logits(const attn_model *a, const attn_model *b) {
  enum { COUNT = 24 };
  int32_t tokens[COUNT];
  attn_session *s, *t;
  for (int i = 0; i < COUNT; ++i) tokens[i] = (i * 37 + 5) % 96;
  assert_ok(attn_session_create(a, NULL, &s));
  assert_ok(attn_session_create(b, NULL, &t));
  assert_ok(attn_session_feed(s, tokens, COUNT));
  assert_ok(attn_session_feed(t, tokens, COUNT));
  attn_model_info info;
  assert_ok(attn_model_get_info(a, &info));
  const float *x = attn_session_logits(s), *y = attn_session_logits(t);
  double most = 0, size = 0;
  for (int64_t i = 0; i < info.vocabulary; ++i) {
    most = fmax(most, fabs((double)x[i] - (double)y[i]));
    size = fmax(size, fabs((double)x[i]));
  }
  attn_session_destroy(s);
  attn_session_destroy(t);
  return most / size;
}

static void weights_are_rounded_as_asked(void **state) {
  (void)state;
  /* What logits may move by: some 20 times the rounding of a weight (2^-12, 2^-9, 1/256), as large
   * as these random models make it; 4 bits leave little of them. Rotary factors are float32. */
  static const double tolerance[ATTN_WEIGHT_TYPES] = {0, 1e-6, 1e-2, 1e-1, 2e-1, 10};
  for (int f = 0; f < FAMILIES; ++f)
    for (attn_weight_type type = ATTN_WEIGHTS_F32; type < ATTN_WEIGHT_TYPES; ++type) {
      const char *path = in_directory("rounded.gguf");
      attn_model *model = load(fixture(families[f], NULL));
      save(model, path, type, 0);
      attn_model *again = load(path);
      assert_weights(model, again, type);
      double moved = difference_of_logits(model, again);
      if (!(moved <= tolerance[type])) fail_msg("%s type %d: %g", families[f], (int)type, moved);
      bool exact = f != 1 && strcmp(families[f], "qwen3_next_gguf") != 0; /* -exp(A_log) */
      if (type == ATTN_WEIGHTS_F32 && exact) assert_true(moved == 0);
      attn_model_destroy(model);
      attn_model_destroy(again);
    }
}

/* The same tensors as the file has that the reference implementation wrote. */
static void assert_tensors(const char *path, const char *reference) {
  attn_gguf *a, *b;
  assert_ok(attn_gguf_open(path, &a));
  assert_ok(attn_gguf_open(reference, &b));
  assert_int_equal(attn_gguf_tensor_count(a), attn_gguf_tensor_count(b));
  for (int64_t i = 0; i < attn_gguf_tensor_count(a); ++i) {
    const attn_gguf_tensor *s = attn_gguf_tensor_at(a, i), *t = attn_gguf_tensor_at(b, i);
    assert_string_equal(s->name, t->name);
    assert_int_equal(s->type, t->type);
    assert_int_equal(s->rank, t->rank);
    assert_memory_equal(s->shape, t->shape, (size_t)s->rank * sizeof *s->shape);
    if (strcmp(s->name, "rope_freqs.weight") == 0 || strstr(s->name, ".ssm_a")) {
      /* another order of operations there; another exponential */
      for (int64_t e = 0; e < s->count; ++e)
        assert_true(fabsf(((const float *)s->data)[e] / ((const float *)t->data)[e] - 1) < 1e-6f);
      continue;
    }
    assert_memory_equal(s->data, t->data, s->bytes);
  }
  attn_gguf_close(a);
  attn_gguf_close(b);
}

static void tensors_are_those_of_the_reference(void **state) {
  (void)state;
  static const struct {
    const char *family, *file;
    attn_weight_type type;
  } pairs[] = {{"llama", "model.gguf", ATTN_WEIGHTS_AS_STORED},
               {"llama", "model.q8_0.gguf", ATTN_WEIGHTS_Q8_0},
               {"llama_tied", "model.gguf", ATTN_WEIGHTS_F32},
               {"qwen2", "model.q8_0.gguf", ATTN_WEIGHTS_Q8_0},
               {"qwen3", "model.q8_0.gguf", ATTN_WEIGHTS_Q8_0},
               {"qwen2_moe", "model.gguf", ATTN_WEIGHTS_F32},
               {"qwen2_moe", "model.q8_0.gguf", ATTN_WEIGHTS_Q8_0},
               {"qwen3_moe", "model.gguf", ATTN_WEIGHTS_F32},
               {"qwen3_moe", "model.q8_0.gguf", ATTN_WEIGHTS_Q8_0},
               {"gemma2_gguf", "model.gguf", ATTN_WEIGHTS_F32},
               {"gemma2_gguf", "model.q8_0.gguf", ATTN_WEIGHTS_Q8_0},
               {"llama_yarn", "model.gguf", ATTN_WEIGHTS_F32},
               {"deepseek2_v2", "model.gguf", ATTN_WEIGHTS_F32},
               {"deepseek2_v2", "model.q8_0.gguf", ATTN_WEIGHTS_Q8_0},
               {"deepseek2_v3", "model.gguf", ATTN_WEIGHTS_F32},
               {"deepseek2_v3", "model.q8_0.gguf", ATTN_WEIGHTS_Q8_0},
               {"qwen3_next_gguf", "model.gguf", ATTN_WEIGHTS_F32},
               {"qwen3_next_gguf", "model.q8_0.gguf", ATTN_WEIGHTS_Q8_0},
               {"mixtral", "model.gguf", ATTN_WEIGHTS_F32},
               {"mixtral", "model.q8_0.gguf", ATTN_WEIGHTS_Q8_0}};
  const char *path = in_directory("reference.gguf");
  for (size_t i = 0; i < sizeof pairs / sizeof *pairs; ++i) {
    attn_model *model = load(fixture(pairs[i].family, NULL));
    save(model, path, pairs[i].type, 0);
    attn_model_destroy(model);
    assert_tensors(path, fixture(pairs[i].family, pairs[i].file));
    /* and from GGUF to GGUF, as they are */
    model = load(fixture(pairs[i].family, pairs[i].file));
    save(model, path, ATTN_WEIGHTS_AS_STORED, 0);
    attn_model_destroy(model);
    assert_tensors(path, fixture(pairs[i].family, pairs[i].file));
  }
}

static void shards_are_one_model(void **state) {
  (void)state;
  attn_model *model = load(fixture("llama", "model.q8_0.gguf"));
  save(model, in_directory("part.gguf"), ATTN_WEIGHTS_AS_STORED, 8 << 10);
  assert_false(attn_path_exists(in_directory("part.gguf")));
  int count = 1;
  char name[64];
  for (;; ++count) { /* how many there are */
    snprintf(name, sizeof name, "part-00001-of-%05d.gguf", count);
    if (attn_path_exists(in_directory(name))) break;
    assert_true(count < 20);
  }
  assert_true(count > 2);
  snprintf(name, sizeof name, "part-00002-of-%05d.gguf", count);
  attn_model *again = load(in_directory(name));
  assert_true(difference_of_logits(model, again) == 0);
  attn_model_destroy(model);
  attn_model_destroy(again);
}

/* -- Text -- */

static void assert_same_text(const attn_model *a, const attn_model *b) {
  static const char text[] = "users!<|im_start|>user <|im_end|>\n 12";
  for (unsigned flags = 0; flags < 4; ++flags) {
    int32_t x[64], y[64];
    int64_t m, n;
    assert_ok(attn_model_encode(a, text, strlen(text), flags, x, 64, &m));
    assert_ok(attn_model_encode(b, text, strlen(text), flags, y, 64, &n));
    assert_int_equal(m, n);
    assert_memory_equal(x, y, (size_t)m * sizeof *x);
  }
  for (int32_t token = 0; token < 96; ++token)
    assert_int_equal(attn_model_is_end(a, token), attn_model_is_end(b, token));
  assert_string_equal(attn_model_chat_template(a), attn_model_chat_template(b));
  attn_sampling s, t;
  assert_ok(attn_model_default_sampling(a, &s));
  assert_ok(attn_model_default_sampling(b, &t));
  assert_memory_equal(&s, &t, sizeof s);
}

/* GGUF, a directory, and GGUF again; with advice that is given on the way. */
static void text_survives(void **state) {
  (void)state;
  static const char advice[] = "{\"eos_token_id\": [95, 7], \"bos_token_id\": 94, \"do_sample\": "
                               "true, \"temperature\": 0.6, "
                               "\"top_k\": 20, \"top_p\": 0.9}";
  static const char *const names[] = {"llama", "qwen2"};
  for (int i = 0; i < 2; ++i) {
    attn_model *model = load(fixture(names[i], "model.gguf"));
    assert_ok(attn_model_save(model, in_directory("text"), ATTN_F32));
    attn_model *there = load(in_directory("text"));
    assert_same_text(model, there);
    attn_model_destroy(there);
    assert_ok(attn_file_write(in_directory("text/generation_config.json"), advice, strlen(advice)));
    there = load(in_directory("text"));
    attn_sampling sampling;
    assert_ok(attn_model_default_sampling(there, &sampling));
    assert_true(sampling.temperature == 0.6 && sampling.top_k == 20 && sampling.top_p == 0.9);
    assert_true(attn_model_is_end(there, 7));
    save(there, in_directory("text.gguf"), ATTN_WEIGHTS_AS_STORED, 0);
    attn_model *again = load(in_directory("text.gguf"));
    assert_same_text(there, again);
    assert_true(difference_of_logits(model, again) == 0);
    save(again, in_directory("text2.gguf"), ATTN_WEIGHTS_AS_STORED, 0); /* keys are copied */
    attn_model *last = load(in_directory("text2.gguf"));
    assert_same_text(there, last);
    attn_model_destroy(model);
    attn_model_destroy(there);
    attn_model_destroy(again);
    attn_model_destroy(last);
  }
}

/* -- Tokenizers of every kind -- */

static const char *tokenizer_fixture(const char *name) {
  static char path[512];
  snprintf(path, sizeof path, "%s/tests/unit/fixtures/tokenizer/%s.json", ATTN_SOURCE_DIR, name);
  return path;
}

/* The texts of the tokenizers' tests, but for those with special tokens in ways that GGUF cannot
 * say (guide.md). */
static void assert_same_tokens(const attn_model *a, const attn_model *b) {
  json_error_t error;
  json_t *file = json_load_file(tokenizer_fixture("texts"), JSON_ALLOW_NUL, &error), *text;
  size_t i;
  assert_non_null(file);
  json_array_foreach(json_object_get(file, "texts"), i, text) {
    const char *string = json_string_value(text);
    size_t size = json_string_length(text);
    if (memmem(string, size, "<mask>", 6)) continue;
    bool special = memmem(string, size, "<s>", 3) || memmem(string, size, "</s>", 4);
    for (unsigned flags = 0; flags < 4; ++flags) {
      int32_t x[1024], y[1024];
      int64_t m, n;
      if (special && !(flags & ATTN_ENCODE_SPECIAL)) continue;
      assert_ok(attn_model_encode(a, string, size, flags, x, 1024, &m));
      assert_ok(attn_model_encode(b, string, size, flags, y, 1024, &n));
      assert_in_range(m, 0, 1024);
      if (m != n || memcmp(x, y, (size_t)m * sizeof *x))
        fail_msg("\"%s\", flags %u: %lld and %lld tokens", string, flags, (long long)m,
                 (long long)n);
    }
  }
  json_decref(file);
}

static attn_model *load_with_tokenizer(const char *name) {
  static const char config[] =
      "{\"model_type\": \"llama\", \"vocab_size\": 600, \"hidden_size\": 32, "
      "\"intermediate_size\": 64, \"num_hidden_layers\": 1, \"num_attention_heads\": 2, "
      "\"rms_norm_eps\": 1e-5, \"max_position_embeddings\": 64}";
  attn_model *model;
  char *bytes;
  size_t size;
  assert_ok(attn_model_create(config, 1, ATTN_F32, &model));
  assert_ok(attn_model_save(model, in_directory(name), ATTN_F32));
  attn_model_destroy(model);
  char path[64];
  snprintf(path, sizeof path, "%s/tokenizer.json", name);
  assert_ok(attn_file_read(tokenizer_fixture(name), 1 << 20, &bytes, &size));
  assert_ok(attn_file_write(in_directory(path), bytes, size));
  attn_free(bytes);
  return load(in_directory(name));
}

/* A directory, GGUF, a directory. */
static void tokenizers_survive(void **state) {
  (void)state;
  static const char *const names[] = {"bert", "xlmr"};
  for (int i = 0; i < 2; ++i) {
    attn_model *model = load_with_tokenizer(names[i]);
    save(model, in_directory("words.gguf"), ATTN_WEIGHTS_AS_STORED, 0);
    attn_model *again = load(in_directory("words.gguf"));
    assert_same_tokens(model, again);
    assert_ok(attn_model_save(again, in_directory("words"), ATTN_F32));
    attn_model *there = load(in_directory("words"));
    assert_same_tokens(model, there);
    save(there, in_directory("words.gguf"), ATTN_WEIGHTS_AS_STORED, 0);
    attn_model *last = load(in_directory("words.gguf"));
    assert_same_tokens(model, last);
    attn_model_destroy(model);
    attn_model_destroy(again);
    attn_model_destroy(there);
    attn_model_destroy(last);
  }
}

static void bad_advice_names_the_file(void **state) {
  (void)state;
  attn_model *model = load(fixture("llama", NULL));
  assert_ok(attn_model_save(model, in_directory("bad"), ATTN_F32));
  attn_model_destroy(model);
  static const char bad[] = "{\"top_p\": 2}";
  assert_ok(attn_file_write(in_directory("bad/generation_config.json"), bad, strlen(bad)));
  assert_int_equal(attn_model_load(in_directory("bad"), ATTN_F32, &model), ATTN_BAD_FORMAT);
  assert_non_null(strstr(attn_error_message(), "generation_config.json"));
  assert_non_null(strstr(attn_error_message(), "\"top_p\""));
}

/* -- Refusals and faults -- */

static void what_gguf_cannot_say(void **state) {
  (void)state;
  static const char *const pairs[][2] = {{"gemma2", "scale of queries"},
                                         {"qwen2_window", "windows"},
                                         {"deepseek_v3", "positions"},
                                         {"kimi_linear", "kimi-linear"},
                                         {"minimax", "minimax"}};
  const char *path = in_directory("refused.gguf");
  attn_model *model;
  for (size_t i = 0; i < sizeof pairs / sizeof *pairs; ++i) {
    model = load(fixture(pairs[i][0], NULL));
    assert_int_equal(attn_model_save_gguf(model, path, NULL), ATTN_UNSUPPORTED);
    if (!strstr(attn_error_message(), pairs[i][1])) fail_msg("%s", attn_error_message());
    attn_model_destroy(model);
  }
  assert_ok(attn_model_create("{\"vocab_size\": 16, \"hidden_size\": 32, \"num_hidden_layers\": 1, "
                              "\"num_attention_heads\": 2}",
                              1, ATTN_F32, &model));
  assert_int_equal(attn_model_save_gguf(model, path, NULL), ATTN_UNSUPPORTED);
  assert_non_null(strstr(attn_error_message(), "attn_decoder"));
  assert_false(attn_path_exists(path));
  attn_gguf_options options = ATTN_GGUF_OPTIONS_INIT;
  options.type = ATTN_WEIGHT_TYPES;
  assert_int_equal(attn_model_save_gguf(model, path, &options), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_model_save_gguf(NULL, path, NULL), ATTN_INVALID_ARGUMENT);
  attn_model_destroy(model);
}

/* Every allocation and file operation fails once: a clean error, nothing leaked, no file. */
static void check_faults(const char *family) {
  attn_model *model = load(fixture(family, NULL));
  const char *path = in_directory("fault.gguf");
  size_t live = attn_memory_get_stats().live_bytes;
  for (int kind = 0; kind < ATTN_FAULT_KINDS; ++kind)
    for (int skip = 0;; ++skip) {
      attn_fault_arm((attn_fault_kind)kind, skip);
      attn_status status = attn_model_save_gguf(model, path, NULL);
      bool hit = attn_fault_disarm((attn_fault_kind)kind);
      assert_int_equal(attn_memory_get_stats().live_bytes, live);
      if (!hit) {
        assert_ok(status);
        unlink(path);
        break;
      }
      if (status == ATTN_OK) fail_msg("fault %d of kind %d went unnoticed", skip, kind);
    }
  attn_model_destroy(model);
}

static void faults(void **state) {
  (void)state;
  check_faults("llama_tied");
  check_faults("deepseek2_v2");
  check_faults("qwen3_next_gguf");
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(weights_are_rounded_as_asked),
      cmocka_unit_test(tensors_are_those_of_the_reference),
      cmocka_unit_test(shards_are_one_model),
      cmocka_unit_test(text_survives),
      cmocka_unit_test(tokenizers_survive),
      cmocka_unit_test(bad_advice_names_the_file),
      cmocka_unit_test(what_gguf_cannot_say),
      cmocka_unit_test(faults),
  };
  return cmocka_run_group_tests(tests, make_directory, remove_directory);
}
