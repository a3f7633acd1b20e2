/* Models whose weights are float8 (fixtures/float8.py; families.c has their logits): they stay as
 * the file has them, become plain numbers when they are saved, and scales that are not as they
 * should be are refused by name. */
#include "support/models.h"
#include "support/test.h"

#include "base/io.h"
#include "base/memory.h"
#include "files/json.h"
#include "models/model.h"

#include <stdio.h>
#include <string.h>

static char directory[64];

static int make_directory(void **state) {
  (void)state;
  strcpy(directory, "/tmp/attn-float8-XXXXXX");
  return mkdtemp(directory) ? 0 : -1;
}

static int remove_directory(void **state) {
  (void)state;
  char command[128];
  snprintf(command, sizeof command, "rm -r %s", directory);
  return system(command);
}

static const char *fixture(const char *family) {
  static char path[512];
  snprintf(path, sizeof path, "%s/tests/models/fixtures/families/%s", ATTN_SOURCE_DIR, family);
  return path;
}

/* One tensor of the fixture and its configuration, changed ---------------------------------------
 */

typedef struct change {
  const char *name;    /* of the tensor; NULL: none */
  const char *renamed; /* NULL: it is left out */
  attn_dtype dtype;    /* of zeros in its place; ATTN_DTYPE_COUNT: its values stay */
  int rank;
  int64_t shape[3];
} change;

/* `changes`: two, or NULL. */
static void write_changed(const change *changes, const char *key, const char *value) {
  enum { MOST = 256 };
  static attn_named_tensor tensors[MOST];
  attn_safetensors *file;
  json_t *config, *json = value ? json_loads(value, JSON_DECODE_ANY, NULL) : NULL;
  attn_tensor zeros[2] = {{0}, {0}};
  char *path = attn_path_join(fixture("deepseek_v3_fp8"), "config.json");
  int64_t count = 0;
  assert_ok(attn_json_load(path, &config));
  attn_free(path);
  if (key && json)
    json_object_set_new(json_object_get(config, "quantization_config"), key, json);
  else if (key)
    json_object_del(config, key);
  assert_ok(attn_safetensors_open(fixture("deepseek_v3_fp8"), &file));
  assert_true(attn_safetensors_count(file) <= MOST);
  for (int64_t i = 0; i < attn_safetensors_count(file); ++i) {
    attn_named_tensor *t = &tensors[count];
    t->name = attn_safetensors_name(file, i);
    assert_ok(attn_safetensors_get(file, i, &t->tensor));
    bool left_out = false;
    for (int n = 0; changes && n < 2; ++n) {
      const change *c = &changes[n];
      if (!c->name || strcmp(t->name, c->name) != 0) continue;
      left_out = !c->renamed;
      if (!left_out) t->name = c->renamed;
      if (left_out || c->dtype == ATTN_DTYPE_COUNT) break;
      assert_ok(attn_tensor_create(c->dtype, c->rank, c->shape, &zeros[n]));
      t->tensor = zeros[n];
      break;
    }
    if (left_out) continue;
    ++count;
  }
  path = attn_path_join(directory, "config.json");
  assert_ok(attn_json_save(path, config));
  attn_free(path);
  path = attn_path_join(directory, "model.safetensors");
  assert_ok(attn_safetensors_write(path, tensors, count, NULL, 0));
  attn_free(path);
  for (int n = 0; n < 2; ++n) attn_tensor_destroy(&zeros[n]);
  attn_safetensors_close(file);
  json_decref(config);
}

static void assert_load(attn_status expected, const char *message) {
  attn_model *model = NULL;
  attn_status status = attn_model_load(directory, ATTN_F32, &model);
  if (status != expected || (message && !strstr(attn_error_message(), message)))
    fail_msg("%s: %s, expected %s: ...%s...", attn_status_name(status), attn_error_message(),
             attn_status_name(expected), message ? message : "");
  if (status == ATTN_OK) attn_model_destroy(model);
}

#define DOWN   "model.layers.0.mlp.down_proj.weight" /* [136, 144] */
#define SCALES DOWN "_scale_inv"                     /* [2, 2] */
#define NORM   "model.norm.weight"
#define KEEP   ATTN_DTYPE_COUNT

static void wrong_scales_are_refused(void **state) {
  (void)state;
  static const struct {
    change changes[2];
    attn_status status;
    const char *message;
  } cases[] = {
      {{{SCALES, NULL, 0, 0, {0}}}, ATTN_NOT_FOUND, SCALES " is missing"},
      {{{SCALES, DOWN "_scale", KEEP, 0, {0}}}, ATTN_NOT_FOUND, SCALES " is missing"},
      {{{SCALES, SCALES, ATTN_F32, 2, {1, 2}}}, ATTN_BAD_FORMAT, SCALES " is [1, 2] of rank 2, ex"},
      {{{SCALES, SCALES, ATTN_F32, 2, {2, 3}}}, ATTN_BAD_FORMAT, "2, expected [2, 2] of rank 2"},
      {{{SCALES, SCALES, ATTN_F32, 2, {0, 2}}}, ATTN_BAD_FORMAT, "is [0, 2] of rank 2, expected"},
      {{{SCALES, SCALES, ATTN_F32, 1, {4}}}, ATTN_BAD_FORMAT, "of rank 1, expected [2, 2] of rank"},
      {{{SCALES, SCALES, ATTN_F32, 0, {0}}}, ATTN_BAD_FORMAT, "of rank 0, expected [2, 2] of rank"},
      {{{SCALES, SCALES, ATTN_F32, 3, {1, 2, 2}}},
       ATTN_BAD_FORMAT,
       "of rank 3, expected [2, 2] of"},
      {{{SCALES, SCALES, ATTN_I32, 2, {2, 2}}}, ATTN_UNSUPPORTED, SCALES " is int32"},
      {{{DOWN, DOWN, ATTN_F8_E5M2, 2, {136, 144}}}, ATTN_UNSUPPORTED, DOWN " is float8_e5m2"},
      {{{DOWN, DOWN, ATTN_I8, 2, {136, 144}}}, ATTN_UNSUPPORTED, "is int8"},
      {{{DOWN, DOWN, ATTN_F8_E4M3, 2, {144, 136}}}, ATTN_BAD_FORMAT, DOWN " has 19584 elements in"},
      {{{NORM, NORM, ATTN_F8_E4M3, 1, {136}}}, ATTN_UNSUPPORTED, NORM " is float8_e4m3 of rank 1"},
      /* The blocks of other axes. */
      {{{DOWN, DOWN, ATTN_F8_E4M3, 3, {136, 144, 1}}, {SCALES, SCALES, ATTN_F32, 3, {136, 2, 1}}},
       ATTN_BAD_FORMAT,
       DOWN " has rows of 1, expected 144"},
      /* Scales of what has none: the numbers would be other ones. */
      {{{DOWN, DOWN, ATTN_BF16, 2, {136, 144}}},
       ATTN_UNSUPPORTED,
       "no place for the tensor " SCALES},
  };
  write_changed(NULL, NULL, NULL);
  assert_load(ATTN_OK, NULL);
  for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i) {
    write_changed(cases[i].changes, NULL, NULL);
    assert_load(cases[i].status, cases[i].message);
  }
}

static void other_methods_are_refused(void **state) {
  (void)state;
  static const struct {
    const char *key, *value;
    attn_status status;
    const char *message;
  } cases[] = {
      {"quant_method", "\"gptq\"", ATTN_UNSUPPORTED, "quantization_config: quant_method 'gptq'"},
      {"quant_method", "\"compressed-tensors\"", ATTN_UNSUPPORTED, "'compressed-tensors'"},
      {"quant_method", "null", ATTN_BAD_FORMAT, "quant_method"},
      {"fmt", "\"e5m2\"", ATTN_UNSUPPORTED, "fmt 'e5m2' is not e4m3"},
      {"activation_scheme", "\"static\"", ATTN_UNSUPPORTED, "activation_scheme 'static'"},
      {"weight_block_size", "null", ATTN_UNSUPPORTED, "weight_block_size is null"},
      {"weight_block_size", "[128]", ATTN_BAD_FORMAT, "weight_block_size"},
      {"weight_block_size", "[0, 128]", ATTN_BAD_FORMAT, "weight_block_size"},
      {"weight_block_size", "[128, 9223372036854775807]", ATTN_BAD_FORMAT, "weight_block_size"},
      {"weight_block_size", "[128, \"128\"]", ATTN_BAD_FORMAT, "weight_block_size"},
      {"weight_block_size", "[64, 128]", ATTN_BAD_FORMAT, "expected [3, 1] of rank 2"},
      {"scale_fmt", "\"ue8m0\"", ATTN_OK, NULL},
      {"modules_to_not_convert", "[\"lm_head\"]", ATTN_OK, NULL},
      /* without it the numbers have no scales */
      {"quantization_config", NULL, ATTN_UNSUPPORTED, "_scale_inv"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i) {
    write_changed(NULL, cases[i].key, cases[i].value);
    assert_load(cases[i].status, cases[i].message);
  }
}

/* What models are made of ------------------------------------------------------------------------
 */

static void weights_stay_in_the_file(void **state) {
  (void)state;
  test_needs_cpu(); /* on a GPU they become plain numbers */
  attn_model *model;
  attn_model_info info;
  size_t before = attn_memory_get_stats().live_bytes;
  assert_ok(test_model_load(fixture("deepseek_v3_fp8"), ATTN_BF16, &model));
  assert_ok(attn_model_get_info(model, &info));
  assert_string_equal(info.stored_type, "float8_e4m3");
  assert_int_equal(info.stored, ATTN_F8_E4M3);
  int64_t matrices = 0, kept = 0;
  for (int64_t i = 0; i < model->parameter_count; ++i) {
    const attn_parameter *p = &model->parameters[i];
    if (!p->scales) continue;
    ++matrices;
    kept += model->borrowed[i];
    assert_int_equal(p->block_type, ATTN_BLOCK_F8_E4M3);
  }
  assert_true(matrices > 20 && kept > matrices / 2); /* others have their rows in another order */
  size_t used = attn_memory_get_stats().live_bytes - before;
  assert_true(used < (size_t)info.weight_bytes);
  attn_model_destroy(model);
  assert_int_equal(attn_memory_get_stats().live_bytes, before);
}

static void assert_same_values(const attn_model *a, const attn_model *b, double tolerance) {
  assert_int_equal(a->parameter_count, b->parameter_count);
  for (int64_t i = 0; i < a->parameter_count; ++i) {
    attn_tensor x, y;
    assert_ok(attn_parameter_copy(&a->parameters[i], ATTN_F64, &x));
    assert_ok(attn_parameter_copy(&b->parameters[i], ATTN_F64, &y));
    double error = test_relative_error(x.data, y.data, attn_tensor_count(&x));
    if (!(error <= tolerance)) fail_msg("%s: %g", a->parameters[i].name, error);
    attn_tensor_destroy(&x);
    attn_tensor_destroy(&y);
  }
}

/* Nothing is left of quantization_config, and a GGUF file has bfloat16 or what is asked for. */
static void saved_models_have_plain_numbers(void **state) {
  (void)state;
  static const char *const names[] = {"deepseek_v3_fp8", "qwen3_next_fp8", "llama_float8"};
  char *path = attn_path_join(directory, "model.gguf");
  for (int f = 0; f < 3; ++f) {
    attn_model *model, *again;
    assert_ok(test_model_load(fixture(names[f]), ATTN_F32, &model));
    assert_ok(attn_model_save(model, directory, ATTN_F32));
    assert_ok(test_model_load(directory, ATTN_F32, &again));
    assert_null(json_object_get(again->config.json, "quantization_config"));
    assert_same_values(model, again, 0);
    attn_model_destroy(again);
    if (f != 1) { /* Qwen3-Next's layers are not those of GGUF */
      assert_ok(attn_model_save_gguf(model, path, NULL));
      assert_ok(test_model_load(path, ATTN_F32, &again));
      assert_same_values(model, again, f == 2 ? 0 : 0x1p-8);
      attn_model_destroy(again);
    }
    attn_model_destroy(model);
  }
  attn_free(path);
}

static void training_unpacks(void **state) {
  (void)state;
  attn_model *model, *plain;
  assert_ok(test_model_load(fixture("deepseek_v3_fp8"), ATTN_F32, &plain));
  assert_ok(test_model_load(fixture("deepseek_v3_fp8"), ATTN_F32, &model));
  assert_ok(attn_model_make_trainable(model));
  assert_same_values(plain, model, 0);
  for (int64_t i = 0; i < model->parameter_count; ++i)
    assert_true(!model->parameters[i].scales && !model->parameters[i].blocks);
  attn_model_destroy(model);
  attn_model_destroy(plain);
}

int main(int argc, char **argv) {
  if (argc > 1) cmocka_set_test_filter(argv[1]); /* a pattern of names */
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(wrong_scales_are_refused), cmocka_unit_test(other_methods_are_refused),
      cmocka_unit_test(weights_stay_in_the_file), cmocka_unit_test(saved_models_have_plain_numbers),
      cmocka_unit_test(training_unpacks),
  };
  return cmocka_run_group_tests(tests, make_directory, remove_directory);
}
