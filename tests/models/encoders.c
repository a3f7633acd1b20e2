/* Tiny encoders against what Transformers and sentence-transformers compute (fixtures/encoders.py):
 * last rows of texts of different lengths in one batch, embeddings of every pooling, tokens as they
 * are cut; from safetensors and from GGUF. And what is refused. */
#include "support/models.h"
#include "support/test.h"

#include "attn/attn.h"
#include "base/fault.h"
#include "base/io.h"
#include "base/memory.h"
#include "base/status.h"
#include "graph/operations.h"
#include "models/model.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* Relative to the norm of all numbers. The reference is float64, rounded to float32 at the end;
 * measured at most 3e-8, 3e-7 and 7e-3, on every kernel path. */
typedef struct tolerance {
  attn_dtype compute;
  double rows;
} tolerance;
static const tolerance tolerances[] = {{ATTN_F64, 1e-7}, {ATTN_F32, 1e-6}, {ATTN_BF16, 2e-2}};
enum { TOLERANCES = sizeof tolerances / sizeof *tolerances };

static const char *path_of(const char *name, const char *file) {
  static char path[512];
  snprintf(path, sizeof path, "%s/tests/models/fixtures/encoders/%s%s%s", ATTN_SOURCE_DIR, name,
           file ? "/" : "", file ? file : "");
  return path;
}

static void assert_near(const char *what, const tolerance *t, const attn_tensor *found,
                        const attn_tensor *expected) {
  double *a = test_to_doubles(found), *b = test_to_doubles(expected);
  assert_int_equal(attn_tensor_count(found), attn_tensor_count(expected));
  double error = test_relative_error(a, b, attn_tensor_count(expected));
  if (!(error <= t->rows))
    fail_msg("%s in %s: error %g, tolerance %g", what, attn_dtype_name(t->compute), error, t->rows);
  free(a);
  free(b);
}

static attn_tensor expected_tensor(const attn_safetensors *file, const char *name) {
  attn_tensor tensor;
  assert_ok(attn_safetensors_find(file, name, &tensor));
  return tensor;
}

/* Rows ------------------------------------------------------------------------------------------
 */

static void check_rows(const char *name, const char *gguf, const tolerance *t) {
  attn_model *model;
  attn_safetensors *file;
  attn_graph *graph;
  assert_ok(test_model_load(path_of(name, gguf), t->compute, &model));
  assert_ok(attn_safetensors_open(path_of(name, "expected.safetensors"), &file));
  assert_ok(attn_graph_create_on(test_device(), t->compute, &graph));
  attn_tensor tokens = expected_tensor(file, "tokens"), types = expected_tensor(file, "types");
  attn_tensor offsets = expected_tensor(file, "offsets"), hidden = expected_tensor(file, "hidden");
  attn_layout layout = attn_layout_packed(attn_tensor_count(&offsets) - 1, offsets.data);
  bool typed = model->config.token_types > 0;
  attn_graph_reset(graph, false);
  attn_var *rows =
      attn_encoder_hidden(graph, model, &layout, tokens.data, typed ? types.data : NULL);
  assert_ok(attn_graph_status(graph));
  assert_near(name, t, &rows->value, &hidden);
  attn_graph_destroy(graph);
  attn_safetensors_close(file);
  attn_model_destroy(model);
}

static void rows_equal_transformers(void **state) {
  static const char *const names[][2] = {{"bert", NULL},
                                         {"bert_masked", NULL},
                                         {"roberta", NULL},
                                         {"distilbert", NULL},
                                         {"distilbert", "model.gguf"}};
  (void)state;
  for (size_t i = 0; i < sizeof names / sizeof *names; ++i)
    for (int t = 0; t < TOLERANCES; ++t) check_rows(names[i][0], names[i][1], &tolerances[t]);
}

/* Sentences -------------------------------------------------------------------------------------
 */

typedef struct sentences {
  attn_model *model;
  attn_safetensors *expected;
  attn_tensor tokens;
  int64_t count, offsets[64];
} sentences;

static void open_sentences(sentences *s, const char *file, const char *expected,
                           attn_dtype compute) {
  assert_ok(test_model_load(path_of("sentences", file), compute, &s->model));
  assert_ok(attn_safetensors_open(path_of("sentences", expected), &s->expected));
  s->tokens = expected_tensor(s->expected, "tokens");
  attn_tensor offsets = expected_tensor(s->expected, "offsets");
  s->count = attn_tensor_count(&offsets) - 1;
  assert_in_range(s->count, 1, 63);
  for (int64_t i = 0; i <= s->count; ++i) s->offsets[i] = ((const int32_t *)offsets.data)[i];
}

static void close_sentences(sentences *s) {
  attn_safetensors_close(s->expected);
  attn_model_destroy(s->model);
}

static void check_embeddings(sentences *s, const tolerance *t, const char *name,
                             const attn_embedding_options *options) {
  attn_tensor expected = expected_tensor(s->expected, name), found;
  assert_ok(attn_tensor_create(ATTN_F32, 2, expected.shape, &found));
  assert_int_equal(expected.shape[1], attn_model_embedding_size(s->model));
  assert_ok(attn_model_embed(s->model, s->tokens.data, s->offsets, s->count, options, found.data));
  assert_near(name, t, &found, &expected);
  attn_tensor_destroy(&found);
}

static const char *const poolings[ATTN_POOLINGS] = {[ATTN_POOLING_MEAN] = "mean",
                                                    [ATTN_POOLING_CLS] = "cls",
                                                    [ATTN_POOLING_LAST] = "lasttoken",
                                                    [ATTN_POOLING_MAX] = "max",
                                                    [ATTN_POOLING_MEAN_SQRT] =
                                                        "mean_sqrt_len_tokens",
                                                    [ATTN_POOLING_WEIGHTED_MEAN] = "weightedmean"};

static void check_sentences(const char *file, const char *expected, const tolerance *t) {
  sentences s;
  open_sentences(&s, file, expected, t->compute);
  attn_embedding_options options = ATTN_EMBEDDING_OPTIONS_INIT;
  options.normalize = 1;
  check_embeddings(&s, t, "normalized", file ? &options : NULL); /* GGUF does not say so */
  options.normalize = 0;
  check_embeddings(&s, t, "mean", &options);
  for (int p = ATTN_POOLING_MEAN; p < ATTN_POOLINGS; ++p) {
    options.pooling = (attn_pooling)p;
    check_embeddings(&s, t, poolings[p], &options);
  }
  close_sentences(&s);
}

static void embeddings_equal_sentence_transformers(void **state) {
  (void)state;
  for (int t = 0; t < TOLERANCES; ++t) {
    check_sentences(NULL, "expected.safetensors", &tolerances[t]);
    check_sentences("model.gguf", "expected.safetensors", &tolerances[t]);
    check_sentences("model.q8_0.gguf", "expected.q8_0.safetensors", &tolerances[t]);
  }
}

/* Batches of any size give the same: one text at a time, a few, all. */
static void batches_agree(void **state) {
  (void)state;
  sentences s;
  const int64_t sizes[] = {1, 10, 33, 0, INT64_MAX};
  open_sentences(&s, NULL, "expected.safetensors", ATTN_F32);
  attn_embedding_options options = ATTN_EMBEDDING_OPTIONS_INIT;
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; ++i) {
    options.batch_tokens = sizes[i];
    check_embeddings(&s, &tolerances[1], "normalized", &options);
  }
  close_sentences(&s);
}

/* Tokens, cut as theirs, from tokenizer.json and from GGUF's vocabulary. */
static void check_tokens(const char *file) {
  sentences s;
  open_sentences(&s, file, "expected.safetensors", ATTN_F32);
  attn_tensor bytes = expected_tensor(s.expected, "texts");
  const char *at = bytes.data, *end = at + attn_tensor_count(&bytes);
  int cuts = 0;
  for (int64_t i = 0; i < s.count; ++i) {
    const char *line = memchr(at, '\n', (size_t)(end - at));
    size_t size = (size_t)((line ? line : end) - at);
    int32_t tokens[64];
    int64_t count, expected = s.offsets[i + 1] - s.offsets[i];
    bool cut = true;
    assert_ok(attn_model_encode_for_embedding(s.model, at, size, tokens, 64, &count, &cut));
    assert_int_equal(count, expected);
    assert_memory_equal(tokens, (const int32_t *)s.tokens.data + s.offsets[i],
                        (size_t)count * sizeof *tokens);
    cuts += cut;
    assert_true(cut == (count == 16 && i != 0));
    assert_ok(attn_model_encode_for_embedding(s.model, at, size, NULL, 0, &count, NULL));
    assert_int_equal(count, expected);
    at += size + 1;
  }
  assert_in_range(cuts, 2, s.count - 1);
  close_sentences(&s);
}

static void tokens_equal_sentence_transformers(void **state) {
  (void)state;
  check_tokens(NULL);
  check_tokens("model.gguf");
}

/* Decoders --------------------------------------------------------------------------------------
 */

/* The normalised rows of each text alone, pooled here. */
static void decoders_embed(void **state) {
  (void)state;
  attn_model *model;
  attn_graph *graph;
  char path[512];
  snprintf(path, sizeof path, "%s/tests/models/fixtures/families/qwen3", ATTN_SOURCE_DIR);
  assert_ok(test_model_load(path, ATTN_F32, &model));
  assert_ok(attn_graph_create_on(test_device(), ATTN_F32, &graph));
  const int32_t tokens[] = {5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const int64_t offsets[] = {0, 4, 5, 11}, width = attn_model_embedding_size(model);
  attn_embedding_options options = ATTN_EMBEDDING_OPTIONS_INIT;
  float *mean = calloc((size_t)(3 * width), sizeof *mean);
  float *last = calloc((size_t)(3 * width), sizeof *last);
  assert_ok(attn_model_embed(model, tokens, offsets, 3, NULL, mean));
  options.pooling = ATTN_POOLING_LAST;
  assert_ok(attn_model_embed(model, tokens, offsets, 3, &options, last));
  for (int64_t i = 0; i < 3; ++i) {
    int64_t n = offsets[i + 1] - offsets[i];
    attn_layout layout = attn_layout_equal(1, n);
    attn_graph_reset(graph, false);
    attn_var *rows = attn_decoder_hidden(graph, model, &layout, tokens + offsets[i], NULL, 0, 0);
    assert_ok(attn_graph_status(graph));
    double *h = test_to_doubles(&rows->value);
    for (int64_t c = 0; c < width; ++c) {
      double sum = 0;
      for (int64_t r = 0; r < n; ++r) sum += h[r * width + c];
      assert_true(fabs((double)mean[i * width + c] - sum / (double)n) < 1e-5);
      assert_true(fabs((double)last[i * width + c] - h[(n - 1) * width + c]) < 1e-5);
    }
    free(h);
  }
  free(mean), free(last);
  attn_graph_destroy(graph);
  attn_model_destroy(model);
}

/* Files -----------------------------------------------------------------------------------------
 */

typedef struct directory {
  char path[64], pooling[96];
} directory;

static void write_file(const directory *d, const char *name, const char *text) {
  char path[160];
  snprintf(path, sizeof path, "%s/%s", d->path, name);
  assert_ok(attn_file_write(path, text, strlen(text)));
}

static const char *const file_names[] = {
    "config.json",  "model.safetensors",     "1_Pooling/config.json",
    "modules.json", "tokenizer_config.json", "sentence_bert_config.json",
    "1_Pooling"};

static const char tiny_bert[] =
    "{\"model_type\": \"bert\", \"vocab_size\": 20, \"hidden_size\": 8, \"num_hidden_layers\": 1,"
    " \"num_attention_heads\": 2, \"intermediate_size\": 16, \"max_position_embeddings\": 12}";

static void make_directory(directory *d) {
  attn_model *model;
  snprintf(d->path, sizeof d->path, "/tmp/attn-encoders-XXXXXX");
  assert_non_null(mkdtemp(d->path));
  snprintf(d->pooling, sizeof d->pooling, "%s/1_Pooling", d->path);
  assert_ok(attn_make_directories(d->pooling));
  assert_ok(attn_model_create(tiny_bert, 3, ATTN_F32, &model));
  assert_ok(attn_model_save(model, d->path, ATTN_F32));
  attn_model_destroy(model);
}

static void remove_directory(const directory *d) {
  char path[160];
  for (size_t i = 0; i < sizeof file_names / sizeof *file_names; ++i) {
    snprintf(path, sizeof path, "%s/%s", d->path, file_names[i]);
    remove(path);
  }
  assert_int_equal(remove(d->path), 0);
}

static attn_embedding_info info_of(const directory *d) {
  attn_model *model;
  attn_embedding_info info;
  assert_ok(test_model_load(d->path, ATTN_F32, &model));
  assert_ok(attn_model_get_embedding_info(model, &info));
  attn_model_destroy(model);
  return info;
}

static attn_status embed_one(const directory *d) {
  attn_model *model;
  const int32_t tokens[] = {1, 2};
  const int64_t offsets[] = {0, 2};
  float embedding[8];
  assert_ok(test_model_load(d->path, ATTN_F32, &model)); /* it may be good for other things */
  attn_status status = attn_model_embed(model, tokens, offsets, 1, NULL, embedding);
  attn_model_destroy(model);
  return status;
}

#define MODULE(type, path)                                                                         \
  "{\"type\": \"sentence_transformers.models." type "\", \"path\": \"" path "\"}"

static void files_say_how(void **state) {
  (void)state;
  directory d;
  make_directory(&d);
  attn_embedding_info info = info_of(&d); /* no files: the mean, as it is */
  assert_int_equal(info.size, 8);
  assert_int_equal(info.pooling, ATTN_POOLING_MEAN);
  assert_false(info.normalize);
  assert_int_equal(info.most_tokens, 12);
  write_file(&d, "tokenizer_config.json", "{\"model_max_length\": 7}");
  assert_int_equal(info_of(&d).most_tokens, 7);
  write_file(&d, "tokenizer_config.json", "{\"model_max_length\": 1e30}");
  assert_int_equal(info_of(&d).most_tokens, 12);
  write_file(&d, "sentence_bert_config.json", "{\"max_seq_length\": 9}");
  assert_int_equal(info_of(&d).most_tokens, 9);
  write_file(&d, "sentence_bert_config.json", "{\"max_seq_length\": 90}"); /* no such positions */
  assert_int_equal(info_of(&d).most_tokens, 12);
  write_file(&d, "sentence_bert_config.json", "{\"max_seq_length\": null}");
  assert_int_equal(info_of(&d).most_tokens, 12);

  write_file(&d, "modules.json",
             "[" MODULE("Transformer", "") "," MODULE("Pooling", "1_Pooling") "]");
  assert_int_equal(info_of(&d).pooling, ATTN_POOLING_MEAN);
  write_file(&d, "1_Pooling/config.json", "{\"pooling_mode_cls_token\": true}");
  assert_int_equal(info_of(&d).pooling, ATTN_POOLING_CLS);
  assert_false(info_of(&d).normalize);
  write_file(&d, "1_Pooling/config.json", "{\"pooling_mode\": \"lasttoken\"}");
  assert_int_equal(info_of(&d).pooling, ATTN_POOLING_LAST);
  write_file(&d, "1_Pooling/config.json", "{\"pooling_mode\": [\"max\"]}");
  assert_int_equal(info_of(&d).pooling, ATTN_POOLING_MAX);
  assert_ok(embed_one(&d));
  write_file(&d, "modules.json",
             "[" MODULE("Transformer", "") "," MODULE("Pooling", "1_Pooling") "," MODULE(
                 "Normalize", "2_Normalize") "]");
  assert_true(info_of(&d).normalize);
  remove_directory(&d);
}

static void assert_lacks(const directory *d, const char *word) {
  assert_int_equal(embed_one(d), ATTN_UNSUPPORTED);
  if (!strstr(attn_error_message(), word))
    fail_msg("'%s' does not name %s", attn_error_message(), word);
}

static void assert_bad(const directory *d, const char *word) {
  attn_model *model;
  assert_int_equal(attn_model_load(d->path, ATTN_F32, &model), ATTN_BAD_FORMAT);
  if (!strstr(attn_error_message(), word))
    fail_msg("'%s' does not name %s", attn_error_message(), word);
}

static void files_that_are_refused(void **state) {
  (void)state;
  directory d;
  make_directory(&d);
  write_file(&d, "modules.json", "[" MODULE("Dense", "2_Dense") "]");
  assert_lacks(&d, "Dense");
  write_file(&d, "modules.json", "[" MODULE("Transformer", "0_Transformer") "]");
  assert_lacks(&d, "0_Transformer");
  write_file(&d, "modules.json", "[" MODULE("Pooling", "1_Pooling") "]");
  write_file(&d, "1_Pooling/config.json",
             "{\"pooling_mode_cls_token\": true, \"pooling_mode_mean_tokens\": true}");
  assert_lacks(&d, "several");
  write_file(&d, "1_Pooling/config.json", "{\"pooling_mode\": [\"max\", \"mean\"]}");
  assert_lacks(&d, "several");
  write_file(&d, "1_Pooling/config.json", "{\"pooling_mode\": \"median\"}");
  assert_lacks(&d, "median");
  write_file(&d, "1_Pooling/config.json", "{\"include_prompt\": false}");
  assert_lacks(&d, "include_prompt");
  write_file(&d, "1_Pooling/config.json", "{}");
  write_file(&d, "sentence_bert_config.json", "{\"do_lower_case\": true}");
  assert_lacks(&d, "do_lower_case");
  write_file(&d, "sentence_bert_config.json", "{}");
  assert_ok(embed_one(&d));

  write_file(&d, "1_Pooling/config.json", "{\"pooling_mode\": 3}");
  assert_bad(&d, "1_Pooling/config.json");
  write_file(&d, "1_Pooling/config.json", "[]");
  assert_bad(&d, "1_Pooling/config.json");
  static const char *const lists[] = {"{}",
                                      "[1]",
                                      "[{}]",
                                      "[",
                                      "",
                                      "[" MODULE("Pooling", "../x") "]",
                                      "[" MODULE("Pooling", "/etc") "]",
                                      "[{\"type\": 3}]"};
  for (size_t i = 0; i < sizeof lists / sizeof *lists; ++i) {
    write_file(&d, "modules.json", lists[i]);
    assert_bad(&d, "modules.json");
  }
  remove_directory(&d);
}

/* Configurations ----------------------------------------------------------------------------------
 */

static void configurations_are_checked(void **state) {
  static const struct {
    const char *more;
    attn_status status;
    const char *word;
  } wrong[] = {{"\"hidden_act\": \"mish\"", ATTN_UNSUPPORTED, "hidden_act"},
               {"\"position_embedding_type\": \"relative_key\"", ATTN_UNSUPPORTED, "relative_key"},
               {"\"is_decoder\": true", ATTN_UNSUPPORTED, "is_decoder"},
               {"\"add_cross_attention\": true", ATTN_UNSUPPORTED, "add_cross_attention"},
               {"\"type_vocab_size\": -1", ATTN_BAD_FORMAT, "type_vocab_size"},
               {"\"layer_norm_eps\": -1", ATTN_BAD_FORMAT, "layer_norm_eps"}};
  (void)state;
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; ++i) {
    char config[512];
    attn_model *model;
    snprintf(config, sizeof config, "%.*s, %s}", (int)strlen(tiny_bert) - 1, tiny_bert,
             wrong[i].more);
    assert_int_equal(attn_model_create(config, 1, ATTN_F32, &model), wrong[i].status);
    if (!strstr(attn_error_message(), wrong[i].word))
      fail_msg("'%s' does not name %s", attn_error_message(), wrong[i].word);
  }
}

static void wrong_calls_are_refused(void **state) {
  (void)state;
  attn_model *model;
  attn_session *session;
  const int32_t tokens[13] = {1, 2, 3}, wrong[] = {1, 20};
  const int64_t two[] = {0, 2}, twelve[] = {0, 12}, thirteen[] = {0, 13}, none[] = {0, 0};
  const int64_t back[] = {2, 0}, before[] = {-1, 2};
  float embedding[8];
  double loss;
  int64_t counted;
  attn_embedding_options options = ATTN_EMBEDDING_OPTIONS_INIT;
  assert_ok(attn_model_create(tiny_bert, 1, ATTN_F32, &model));
  assert_int_equal(attn_session_create(model, NULL, &session), ATTN_UNSUPPORTED);
  assert_non_null(strstr(attn_error_message(), "encoder"));
  assert_int_equal(attn_model_evaluate(model, tokens, 3, 0, 0, &loss, &counted), ATTN_UNSUPPORTED);
  assert_ok(attn_model_embed(model, tokens, two, 1, NULL, embedding));
  assert_ok(attn_model_embed(model, tokens, twelve, 1, NULL, embedding));
  assert_ok(attn_model_embed(model, NULL, NULL, 0, NULL, NULL));
  assert_int_equal(attn_model_embed(model, tokens, thirteen, 1, NULL, embedding),
                   ATTN_INVALID_ARGUMENT);
  assert_non_null(strstr(attn_error_message(), "12"));
  const int64_t *const offsets[] = {none, back, before};
  for (int i = 0; i < 3; ++i)
    assert_int_equal(attn_model_embed(model, tokens, offsets[i], 1, NULL, embedding),
                     ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_model_embed(model, wrong, two, 1, NULL, embedding), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_model_embed(NULL, tokens, two, 1, NULL, embedding), ATTN_INVALID_ARGUMENT);
  options.pooling = ATTN_POOLINGS;
  assert_int_equal(attn_model_embed(model, tokens, two, 1, &options, embedding),
                   ATTN_INVALID_ARGUMENT);
  options = (attn_embedding_options){.struct_size = 3};
  assert_int_equal(attn_model_embed(model, tokens, two, 1, &options, embedding),
                   ATTN_INVALID_ARGUMENT);
  attn_model_info info;
  assert_ok(attn_model_get_info(model, &info));
  assert_int_equal(info.state_token_bytes, 0);
  attn_model_destroy(model);
}

/* Embeddings of a vector of nothing, and of length 1. */
static void lengths_are_one(void **state) {
  (void)state;
  sentences s;
  float embedding[32];
  double squares = 0;
  open_sentences(&s, NULL, "expected.safetensors", ATTN_F32);
  assert_ok(attn_model_embed(s.model, s.tokens.data, s.offsets, 1, NULL, embedding));
  for (int i = 0; i < 32; ++i) squares += (double)embedding[i] * (double)embedding[i];
  assert_true(fabs(squares - 1) < 1e-6);
  for (int p = -1; p <= ATTN_POOLINGS; ++p)
    assert_true((attn_pooling_name((attn_pooling)p) == NULL) == (p <= 0 || p == ATTN_POOLINGS));
  close_sentences(&s);
}

/* Loading, encoding and embedding, with every allocation failing in turn. */
static attn_status load_and_embed(attn_model **model) {
  static const char text[] = "The dogs running (a cat), hello world! the cat runs and runs";
  int32_t tokens[32];
  int64_t offsets[2] = {0};
  float embedding[32];
  bool cut;
  ATTN_TRY(attn_model_load(path_of("sentences", NULL), ATTN_F32, model));
  ATTN_TRY(attn_model_encode_for_embedding(*model, text, sizeof text - 1, tokens, 32, &offsets[1],
                                           &cut));
  assert_true(cut);
  return attn_model_embed(*model, tokens, offsets, 1, NULL, embedding);
}

static void failing_memory_is_an_error(void **state) {
  (void)state;
  size_t live = attn_memory_get_stats().live_bytes;
  int64_t n = 0;
  for (bool failed = true; failed; ++n) {
    attn_model *model = NULL;
    attn_fault_arm(ATTN_FAULT_ALLOC, n);
    attn_status status = load_and_embed(&model);
    failed = attn_fault_disarm(ATTN_FAULT_ALLOC);
    if (status != (failed ? ATTN_OUT_OF_MEMORY : ATTN_OK))
      fail_msg("allocation %lld fails: %s (%s)", (long long)n, attn_status_name(status),
               attn_error_message());
    attn_model_destroy(model);
    assert_int_equal(attn_memory_get_stats().live_bytes, live);
  }
  assert_true(n > 100);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(rows_equal_transformers),
      cmocka_unit_test(embeddings_equal_sentence_transformers),
      cmocka_unit_test(batches_agree),
      cmocka_unit_test(tokens_equal_sentence_transformers),
      cmocka_unit_test(decoders_embed),
      cmocka_unit_test(files_say_how),
      cmocka_unit_test(files_that_are_refused),
      cmocka_unit_test(configurations_are_checked),
      cmocka_unit_test(wrong_calls_are_refused),
      cmocka_unit_test(lengths_are_one),
      cmocka_unit_test(failing_memory_is_an_error),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
