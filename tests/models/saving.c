/* Models are saved as other tools expect them, in one file and in several: the tensors of the file
 * that Transformers wrote, with their names, shapes and values. */
#include "support/models.h"
#include "support/test.h"

#include "base/memory.h"
#include "models/model.h"

#include <stdio.h>
#include <string.h>

static char directory[64];

static int make_directory(void **state) {
  (void)state;
  strcpy(directory, "/tmp/attn-saving-XXXXXX");
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

static const char *const families[] = {
    "llama",     "llama_tied", "qwen2",   "qwen3",       "gemma2",      "mixtral",    "qwen2_moe",
    "qwen3_moe", "qwen3_next", "minimax", "deepseek_v2", "deepseek_v3", "kimi_linear"};
enum { FAMILIES = sizeof families / sizeof *families };

static attn_model *load(const char *path) {
  attn_model *model;
  assert_ok(test_model_load(path, ATTN_F32, &model));
  return model;
}

static void assert_same_tensor(const char *family, const attn_tensor *a, const attn_tensor *b,
                               const char *name, double tolerance) {
  bool same = a->rank == b->rank;
  for (int i = 0; same && i < a->rank; ++i) same = a->shape[i] == b->shape[i];
  if (!same)
    fail_msg("%s: %s has rank %d, first extent %lld; expected %d, %lld", family, name, a->rank,
             (long long)a->shape[0], b->rank, (long long)b->shape[0]);
  double *x = test_to_doubles(a), *y = test_to_doubles(b);
  double error = test_relative_error(x, y, attn_tensor_count(a));
  if (!(error <= tolerance)) fail_msg("%s: %s is off by %g", family, name, error);
  free(x);
  free(y);
}

/* Norms that are stored without their 1 round when it is added, and again when it is taken away. */
static void assert_same_file(const char *family, const attn_model *model) {
  double tolerance = model->config.norm_offset ? 1e-6 : 0;
  attn_safetensors *saved, *original;
  assert_ok(attn_safetensors_open(directory, &saved));
  assert_ok(attn_safetensors_open(fixture(family), &original));
  for (int64_t i = 0; i < attn_safetensors_count(saved); ++i) {
    attn_tensor a, b;
    const char *name = attn_safetensors_name(saved, i);
    assert_ok(attn_safetensors_get(saved, i, &a));
    assert_ok(attn_safetensors_find(original, name, &b));
    assert_same_tensor(family, &a, &b, name, tolerance);
  }
  int64_t left = 0; /* that the model does without */
  for (int64_t i = 0; i < attn_safetensors_count(original); ++i)
    left += attn_family_leaves(&model->config, attn_safetensors_name(original, i));
  assert_int_equal(attn_safetensors_count(saved), attn_safetensors_count(original) - left);
  attn_safetensors_close(original);
  attn_safetensors_close(saved);
}

static void tensors_are_those_of_the_original(void **state) {
  (void)state;
  static const int64_t limits[] = {0, 20000, 1}; /* one file, several, one for each tensor */
  for (int f = 0; f < FAMILIES; ++f)
    for (int l = 0; l < 3; ++l) {
      attn_save_options options = ATTN_SAVE_OPTIONS_INIT;
      attn_model *model = load(fixture(families[f]));
      options.dtype = ATTN_F32;
      options.shard_bytes = limits[l];
      assert_ok(attn_model_save_as(model, directory, &options));
      assert_same_file(families[f], model);
      attn_model_destroy(model);
    }
}

/* The files that a model lies in are replaced under it. */
static void a_model_is_saved_over_itself(void **state) {
  (void)state;
  static const int64_t limits[] = {20000, 30000, 30000, 0, 20000};
  attn_save_options options = ATTN_SAVE_OPTIONS_INIT;
  options.dtype = ATTN_F32;
  attn_model *original = load(fixture("deepseek_v3"));
  assert_ok(attn_model_save_as(original, directory, &options));
  for (int l = 0; l < 5; ++l) {
    attn_model *model = load(directory);
    options.shard_bytes = limits[l];
    assert_ok(attn_model_save_as(model, directory, &options));
    assert_same_file("deepseek_v3", model);
    assert_ok(attn_model_save_as(model, directory, &options)); /* from what is only mapped now */
    assert_same_file("deepseek_v3", model);
    attn_model_destroy(model);
  }
  attn_model_destroy(original);
}

static void bad_options_are_refused(void **state) {
  (void)state;
  attn_model *model = load(fixture("llama"));
  attn_save_options options = ATTN_SAVE_OPTIONS_INIT;
  options.dtype = ATTN_F8_E4M3;
  assert_int_equal(attn_model_save_as(model, directory, &options), ATTN_UNSUPPORTED);
  options.dtype = ATTN_F32;
  options.shard_bytes = -1;
  assert_int_equal(attn_model_save_as(model, directory, &options), ATTN_INVALID_ARGUMENT);
  options.shard_bytes = 0;
  options.struct_size = 3;
  assert_int_equal(attn_model_save_as(model, directory, &options), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_model_save_as(model, directory, NULL), ATTN_INVALID_ARGUMENT);
  attn_model_destroy(model);
}

int main(int argc, char **argv) {
  if (argc > 1) cmocka_set_test_filter(argv[1]); /* a pattern of names */
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(tensors_are_those_of_the_original),
      cmocka_unit_test(a_model_is_saved_over_itself),
      cmocka_unit_test(bad_options_are_refused),
  };
  return cmocka_run_group_tests(tests, make_directory, remove_directory);
}
