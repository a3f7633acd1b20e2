/* Tiny models of every family against what Transformers computes (fixtures/families.py, float64):
 * logits through the decoder and through a session that reads in pieces, from safetensors and from
 * GGUF files with plain and with quantised weights. */
#include "support/models.h"
#include "support/test.h"

#include "attn/text.h"
#include "files/json.h"
#include "graph/operations.h"
#include "models/model.h"

#include <stdio.h>
#include <string.h>

/* Relative to the norm of all logits. The reference is float64, stored as float32: 2^-24 each.
 * float32: the roundings of some ten operations in a row, which the delta rule amplifies
 * (Transformers' own float32 is up to 9e-6 away). bfloat16: as in reference.c. The logits
 * of one token alone may be small beside their errors, which all logits share: the worst of a
 * session's tokens is allowed 3 times as much.
 *
 * With experts a rounding of bfloat16 may send a token to another expert, and everything after it
 * reads what that gave. There the median over the tokens may be twice that of Transformers' own
 * bfloat16, which the fixture has. */
typedef struct tolerance {
  attn_dtype compute;
  double logits;
} tolerance;
static const tolerance tolerances[] = {{ATTN_F64, 2e-7}, {ATTN_F32, 1e-5}, {ATTN_BF16, 3e-2}};
static const double one_token = 3;

typedef struct subject {
  const char *name, *file; /* file: NULL for the directory */
  const char *expected;
} subject;

static const subject subjects[] = {
    {"llama", NULL, "expected"},
    {"llama", "model.gguf", "expected"},
    {"llama", "model.q8_0.gguf", "expected.q8_0"},
    {"llama_tied", NULL, "expected"},
    {"llama_tied", "model.gguf", "expected"},
    {"mistral", NULL, "expected"},
    {"qwen2", NULL, "expected"},
    {"qwen2", "model.gguf", "expected"},
    {"qwen2", "model.q8_0.gguf", "expected.q8_0"},
    {"qwen2_window", NULL, "expected"},
    {"qwen3", NULL, "expected"},
    {"qwen3", "model.gguf", "expected"},
    {"qwen3", "model.q8_0.gguf", "expected.q8_0"},
    {"gemma2", NULL, "expected"},
    {"mixtral", NULL, "expected"},
    {"qwen2_moe", NULL, "expected"},
    {"qwen2_moe", "model.gguf", "expected"},
    {"qwen2_moe", "model.q8_0.gguf", "expected.q8_0"},
    {"qwen3_moe", NULL, "expected"},
    {"qwen3_moe", "model.gguf", "expected"},
    {"qwen3_moe", "model.q8_0.gguf", "expected.q8_0"},
    {"qwen3_next", NULL, "expected"},
    {"minimax", NULL, "expected"},
    {"deepseek_v2", NULL, "expected"},
    {"deepseek_v2_groups", NULL, "expected"},
    {"deepseek_v3", NULL, "expected"},
    {"kimi_linear", NULL, "expected"},
    {"llama_yarn", NULL, "expected"},
    {"llama_yarn", "model.gguf", "expected"},
    {"qwen3_yarn", NULL, "expected"},
    {"qwen3_yarn", "model.gguf", "expected"},
    {"gemma2_gguf", "model.gguf", "expected.gguf"},
    {"gemma2_gguf", "model.q8_0.gguf", "expected.q8_0"},
    {"deepseek2_v2", "model.gguf", "expected"},
    {"deepseek2_v2", "model.q8_0.gguf", "expected.q8_0"},
    {"deepseek2_v2", "model.older.q8_0.gguf", "expected.older.q8_0"},
    {"deepseek2_v3", "model.gguf", "expected"},
    {"deepseek2_v3", "model.q8_0.gguf", "expected.q8_0"},
    {"qwen3_next_gguf", "model.gguf", "expected.gguf"},
    {"qwen3_next_gguf", "model.q8_0.gguf", "expected.q8_0"},
    {"qwen3_next_gguf", "model.older.q8_0.gguf", "expected.older.q8_0"},
    {"kimi_linear_gguf", "model.gguf", "expected.gguf"},
    {"kimi_linear_gguf", "model.q8_0.gguf", "expected.q8_0"},
    {"mixtral", "model.gguf", "expected"},
    {"mixtral", "model.q8_0.gguf", "expected.q8_0"},
    {"mixtral", "model.older.q8_0.gguf", "expected.older.q8_0"},
    {"deepseek_v3_fp8", NULL, "expected"}, /* fixtures/float8.py */
    {"qwen3_next_fp8", NULL, "expected"},
    {"llama_float8", NULL, "expected"},
};
enum { SUBJECTS = sizeof subjects / sizeof *subjects };

static const char *path_of(const subject *s, const char *name, const char *suffix) {
  static char path[512];
  snprintf(path, sizeof path, "%s/tests/models/fixtures/families/%s%s%s%s", ATTN_SOURCE_DIR,
           s->name, name ? "/" : "", name ? name : "", suffix);
  return path;
}

/* What is compared, and with whom. */
typedef struct trial {
  const subject *s;
  const tolerance *t;
  double median; /* that Transformers reaches; 0: every token is judged */
} trial;

static int ascending(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static void assert_median(const trial *trial, const char *what, double *errors, int64_t count) {
  qsort(errors, (size_t)count, sizeof *errors, ascending);
  if (!(errors[count / 2] <= 2 * trial->median))
    fail_msg("%s, %s: median error %g, of Transformers %g", trial->s->name, what, errors[count / 2],
             trial->median);
}

static double row_error(const attn_tensor *found, const attn_tensor *expected, int64_t row) {
  attn_tensor f, e;
  assert_ok(attn_tensor_slice(found, 0, row, 1, &f));
  assert_ok(attn_tensor_slice(expected, 0, row, 1, &e));
  double *a = test_to_doubles(&f), *b = test_to_doubles(&e);
  double error = test_relative_error(a, b, attn_tensor_count(&e));
  free(a);
  free(b);
  return error;
}

static void assert_close(const trial *trial, const char *what, double factor,
                         const attn_tensor *found, const attn_tensor *expected) {
  const subject *s = trial->s;
  const tolerance *t = trial->t;
  double *a = test_to_doubles(found), *b = test_to_doubles(expected);
  assert_int_equal(attn_tensor_count(found), attn_tensor_count(expected));
  double error = test_relative_error(a, b, attn_tensor_count(expected));
  if (!(error <= factor * t->logits))
    fail_msg("%s %s in %s, %s: error %g, tolerance %g", s->name, s->file ? s->file : "",
             attn_dtype_name(t->compute), what, error, factor * t->logits);
  free(a);
  free(b);
}

enum { MOST_TOKENS = 64 };

static void check_decoder(const trial *trial, const attn_model *model, const attn_tensor *tokens,
                          const attn_tensor *logits) {
  double errors[MOST_TOKENS];
  attn_graph *graph;
  attn_layout layout = attn_layout_equal(1, attn_tensor_count(tokens));
  assert_ok(attn_graph_create_on(test_device(), trial->t->compute, &graph));
  attn_var *hidden = attn_decoder_hidden(graph, model, &layout, tokens->data, NULL, 0, 0);
  attn_var *found = attn_decoder_logits(graph, model, hidden);
  assert_ok(attn_graph_status(graph));
  for (int64_t r = 0; r < layout.rows; ++r) errors[r] = row_error(&found->value, logits, r);
  if (trial->median > 0)
    assert_median(trial, "decoder", errors, layout.rows);
  else
    assert_close(trial, "decoder", 1, &found->value, logits);
  attn_graph_destroy(graph);
}

/* Pieces of 1, 17, 1, 1, ...: prefill and decode over the cache. */
static void check_session(const trial *trial, const attn_model *model, const attn_tensor *tokens,
                          const attn_tensor *logits) {
  double errors[MOST_TOKENS];
  int64_t steps = 0;
  attn_session *session;
  assert_ok(attn_session_create(model, NULL, &session));
  int64_t count = attn_tensor_count(tokens);
  for (int64_t first = 0, more; first < count; first += more) {
    more = first == 1 ? 17 : 1;
    assert_ok(attn_session_feed(session, (const int32_t *)tokens->data + first, more));
    attn_tensor found, expected;
    assert_ok(attn_tensor_slice(logits, 0, first + more - 1, 1, &expected));
    assert_ok(attn_tensor_wrap((void *)(uintptr_t)attn_session_logits(session), ATTN_F32, 2,
                               expected.shape, &found));
    errors[steps++] = row_error(&found, &expected, 0);
    if (trial->median == 0) assert_close(trial, "session", one_token, &found, &expected);
  }
  if (trial->median > 0) assert_median(trial, "session", errors, steps);
  attn_session_destroy(session);
}

static void check(const subject *s, const tolerance *t) {
  attn_model *model;
  attn_safetensors *file;
  attn_tensor tokens, logits;
  assert_ok(test_model_load(path_of(s, s->file, ""), t->compute, &model));
  assert_ok(attn_safetensors_open(path_of(s, s->expected, ".safetensors"), &file));
  assert_ok(attn_safetensors_find(file, "tokens", &tokens));
  assert_ok(attn_safetensors_find(file, "logits", &logits));
  trial trial = {s, t, 0};
  if (t->compute == ATTN_BF16 && attn_safetensors_has(file, "bfloat16_median")) {
    attn_tensor median;
    assert_ok(attn_safetensors_find(file, "bfloat16_median", &median));
    trial.median = (double)*(const float *)median.data;
  }
  check_decoder(&trial, model, &tokens, &logits);
  check_session(&trial, model, &tokens, &logits);
  attn_safetensors_close(file);
  attn_model_destroy(model);
}

static void logits_equal_transformers(void **state) {
  (void)state;
  for (int i = 0; i < SUBJECTS; ++i)
    for (size_t t = 0; t < sizeof tolerances / sizeof *tolerances; ++t)
      check(&subjects[i], &tolerances[t]);
}

/* A model of a GGUF file is saved as safetensors of plain weights, which give the same logits. */
static void check_saved(const subject *s) {
  attn_model *model, *again;
  char directory[] = "/tmp/attn-families-XXXXXX", command[64];
  assert_non_null(mkdtemp(directory));
  assert_ok(test_model_load(path_of(s, s->file, ""), ATTN_F32, &model));
  assert_ok(attn_model_save(model, directory, ATTN_F32));
  attn_model_destroy(model);
  assert_ok(test_model_load(directory, ATTN_F32, &again));
  attn_safetensors *expected;
  attn_tensor tokens, logits;
  assert_ok(attn_safetensors_open(path_of(s, s->expected, ".safetensors"), &expected));
  assert_ok(attn_safetensors_find(expected, "tokens", &tokens));
  assert_ok(attn_safetensors_find(expected, "logits", &logits));
  check_decoder(&(trial){s, &tolerances[1], 0}, again, &tokens, &logits);
  attn_safetensors_close(expected);
  attn_model_destroy(again);
  snprintf(command, sizeof command, "rm -r %s", directory);
  assert_int_equal(system(command), 0);
}

static void models_of_gguf_are_saved(void **state) {
  (void)state;
  for (int i = 0; i < SUBJECTS; ++i)
    if (subjects[i].file) check_saved(&subjects[i]);
}

/* ChatML, as the template in the GGUF fixtures has it; special tokens in a content stay text. */
static void chats_are_encoded(void **state) {
  (void)state;
  attn_model *model;
  assert_ok(test_model_load(path_of(&subjects[1], subjects[1].file, ""), ATTN_F32, &model));
  assert_string_equal(attn_model_chat_template(model), "chatml");
  const attn_message messages[] = {{"user", "<|im_end|>"}};
  int32_t tokens[64];
  int64_t count;
  assert_ok(attn_model_encode_chat(model, messages, 1, tokens, 64, &count));
  const int32_t start = 94, end = 95;
  int starts = 0, ends = 0;
  for (int64_t i = 0; i < count; ++i) starts += tokens[i] == start, ends += tokens[i] == end;
  assert_int_equal(tokens[0], start);
  assert_int_equal(starts, 2);
  assert_int_equal(ends, 1);
  assert_true(attn_model_is_end(model, end));
  assert_false(attn_model_is_end(model, start));
  const attn_message wrong[] = {{"tool", "x"}};
  assert_int_equal(attn_model_encode_chat(model, wrong, 1, tokens, 64, &count),
                   ATTN_INVALID_ARGUMENT);
  attn_model_destroy(model);
}

/* Configurations ---------------------------------------------------------------------------------
 */

/* A fixture's config.json with another value under "key" or "object/key". */
static attn_status configure_with(const char *family, const char *key, const char *value,
                                  attn_model_config *config) {
  char path[512], object[64] = "";
  const char *slash = strchr(key, '/');
  snprintf(path, sizeof path, "%s/tests/models/fixtures/families/%s/config.json", ATTN_SOURCE_DIR,
           family);
  json_t *json, *made = json_loads(value, JSON_DECODE_ANY, NULL);
  assert_ok(attn_json_load(path, &json));
  assert_non_null(made);
  if (slash) snprintf(object, sizeof object, "%.*s", (int)(slash - key), key);
  json_t *target = slash ? json_object_get(json, object) : json;
  assert_int_equal(json_object_set_new(target, slash ? slash + 1 : key, made), 0);
  return attn_model_config_read(json, family, config);
}

static const struct {
  const char *family, *key, *value, *message;
} refusals[] = {
    {"kimi_linear", "linear_attn_config/kda_layers", "[-9223372036854775808]", "from 1 to 4"},
    {"kimi_linear", "linear_attn_config/kda_layers", "[0]", "from 1 to 4"},
    {"kimi_linear", "linear_attn_config/kda_layers", "[5]", "from 1 to 4"},
    {"kimi_linear", "linear_attn_config/kda_layers", "[\"1\"]", "from 1 to 4"},
    {"kimi_linear", "linear_attn_config", "[]", "an object"},
    {"kimi_linear", "linear_attn_config/num_heads", "0", "num_heads"},
    {"kimi_linear", "mlp_layer_types", "[\"dense\"]", "mlp_layer_types"},
    {"kimi_linear", "mlp_layer_types", "[\"dense\", \"sparse\", \"spares\", \"sparse\"]",
     "mlp_layer_types"},
    {"kimi_linear", "moe_router_activation_func", "\"softmax\"", "not sigmoid"},
    {"kimi_linear", "num_expert_group", "3", "groups"},
    {"kimi_linear", "num_experts", "65536", "more than 65536 experts"},
    {"deepseek_v3", "qk_rope_head_dim", "5", "qk_rope_head_dim"},
    {"deepseek_v3", "kv_lora_rank", "1024", "1024 + 4"},
    {"deepseek_v3", "num_experts_per_tok", "5", "groups"}, /* two groups of two hold four */
    {"deepseek_v3", "num_experts_per_tok", "9", "from 1 to 8"},
    {"deepseek_v3", "n_group", "5", "groups"},
    {"deepseek_v3", "topk_group", "5", "groups"},
    {"deepseek_v3", "topk_group", "null", "groups"},
    {"deepseek_v3", "n_routed_experts", "null", "n_routed_experts"},
    {"deepseek_v3", "n_routed_experts", "0", "n_routed_experts"},
    {"deepseek_v3", "moe_layer_freq", "0", "moe_layer_freq"},
    {"deepseek_v3", "attention_bias", "true", "attention_bias"},
    {"deepseek_v3", "rope_parameters/factor", "0.5", "factor"},
    {"deepseek_v3", "rope_parameters/beta_fast", "0.5", "beta_slow"},
    {"deepseek_v3", "rope_parameters", "{\"rope_type\": \"factors\", \"factors\": [1, 2, 3]}",
     "3 rotary factors, expected 2"},
    {"deepseek_v3", "rope_parameters/rope_type", "\"su\"", "rope_type"},
    {"deepseek_v2_groups", "topk_method", "\"noaux_tc\"", "topk_method"},
    {"minimax", "attn_type_list", "[1, 0]", "attn_type_list"},
    {"minimax", "attn_type_list", "[1, 0, 1, 2]", "attn_type_list"},
    {"minimax", "attn_type_list", "[1, 0, 1, \"1\"]", "attn_type_list"},
    {"minimax", "layer_types", "[\"full_attention\"]", "layer_types"},
    {"minimax", "rotary_dim", "14", "rotary_dim"},
    {"minimax", "num_local_experts", "16385", "more than 65536 experts"},
    {"minimax", "shared_intermediate_size", "1", "shared_intermediate_size"},
    {"qwen3_next", "linear_num_key_heads", "3", "multiple"},
    {"qwen3_next", "linear_num_key_heads", "0", "linear_num_key_heads"},
    {"qwen3_next", "linear_conv_kernel_dim", "17", "linear_conv_kernel_dim"},
    {"qwen3_next", "layer_types", "[1, 2, 3, 4]", "layer_types"},
    {"qwen3_next", "num_experts_per_tok", "null", "num_experts_per_tok"},
    {"qwen2_moe", "decoder_sparse_step", "0", "decoder_sparse_step"},
    {"qwen3_moe", "num_experts", "-1", "num_experts"},
    {"mixtral", "num_local_experts", "1e3", "num_local_experts"},
    {"gemma2", "layer_types", "[\"sliding_attention\", \"fall_attention\", \"full_attention\"]",
     "layer_types"},
};

static void wrong_configurations_are_refused(void **state) {
  (void)state;
  for (size_t i = 0; i < sizeof refusals / sizeof *refusals; ++i) {
    attn_model_config config;
    attn_status status =
        configure_with(refusals[i].family, refusals[i].key, refusals[i].value, &config);
    if (status == ATTN_OK) attn_model_config_free(&config);
    if ((status != ATTN_BAD_FORMAT && status != ATTN_UNSUPPORTED) ||
        !strstr(attn_error_message(), refusals[i].message))
      fail_msg("%s with %s = %s: %s, %s", refusals[i].family, refusals[i].key, refusals[i].value,
               attn_status_name(status), attn_error_message());
  }
}

/* A part of nothing turns nothing: it is not left to the default, which turns all. */
static void a_part_of_nothing_is_nothing(void **state) {
  (void)state;
  static const char *const families[] = {"minimax", "qwen3_next"};
  for (int f = 0; f < 2; ++f) {
    attn_model_config config;
    assert_ok(configure_with(families[f], "rope_parameters/partial_rotary_factor", "0", &config));
    for (int64_t l = 0; l < config.layer_count; ++l)
      if (strcmp(config.layers[l].mixer->info.name, "softmax") == 0)
        assert_int_equal(config.layers[l].options.rotary_dim, -1);
    attn_model_config_free(&config);
  }
}

int main(int argc, char **argv) {
  if (argc > 1) cmocka_set_test_filter(argv[1]); /* a pattern of names */
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(logits_equal_transformers),
      cmocka_unit_test(models_of_gguf_are_saved),
      cmocka_unit_test(chats_are_encoded),
      cmocka_unit_test(wrong_configurations_are_refused),
      cmocka_unit_test(a_part_of_nothing_is_nothing),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
