/* Devices: names, what is missing where there is no GPU, and what a GPU does when it is asked for
 * too much. Whatever fails, the processor goes on in the same process. */
#include "support/test.h"

#include "attn/attn.h"
#include "graph/graph.h"
#include "models/model.h"
#include "tensor/device.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static void the_processor_works(void) {
  attn_tensor a, b;
  assert_ok(attn_tensor_create_on((attn_device){0}, ATTN_F32, 1, (int64_t[]){3}, &a));
  assert_ok(attn_tensor_create(ATTN_F64, 1, (int64_t[]){3}, &b));
  assert_ok(attn_tensor_fill(&a, 2));
  assert_ok(attn_tensor_copy(&a, &b));
  assert_true(attn_tensor_get(&b, (int64_t[]){1}) == 2);
  attn_tensor_destroy(&a);
  attn_tensor_destroy(&b);
}

static void names(void **state) {
  (void)state;
  static const char *const wrong[] = {"", "gpu", "cuda0", "cuda:", "cuda:x", "cuda:1x", "CPU"};
  attn_device device = {ATTN_CUDA, 5};
  assert_ok(attn_device_parse("cpu", &device));
  assert_int_equal(device.kind, ATTN_CPU);
  assert_ok(attn_device_parse("auto", &device));
  assert_int_equal(device.kind, attn_cuda_count() ? ATTN_CUDA : ATTN_CPU);
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; ++i) {
    assert_int_equal(attn_device_parse(wrong[i], &device), ATTN_INVALID_ARGUMENT);
    assert_non_null(strstr(attn_error_message(), "cpu, cuda, cuda:N or auto"));
  }
  assert_int_equal(attn_device_parse(NULL, &device), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_device_parse("cpu", NULL), ATTN_INVALID_ARGUMENT);
  assert_true(strlen(attn_device_description((attn_device){0})) > 0);
  assert_ok(attn_device_synchronize((attn_device){0}));
}

/* Every call that names a GPU says what is missing, and leaves nothing behind. */
static void without_a_gpu(void **state) {
  (void)state;
  if (attn_cuda_count() > 0) skip();
  attn_device device = {0}, gpu = {ATTN_CUDA, 0};
  attn_tensor tensor = {0};
  attn_graph *graph = NULL;
  size_t live = attn_memory_get_stats().live_bytes;
  assert_int_not_equal(attn_device_parse("cuda", &device), ATTN_OK);
  assert_non_null(strstr(attn_error_message(), "cuda"));
  assert_int_equal(device.kind, ATTN_CPU);
  assert_int_not_equal(attn_device_parse("cuda:7", &device), ATTN_OK);
  assert_string_equal(attn_device_description(gpu), "");
  assert_int_not_equal(attn_device_synchronize(gpu), ATTN_OK);
  assert_int_not_equal(attn_tensor_create_on(gpu, ATTN_F32, 1, (int64_t[]){4}, &tensor), ATTN_OK);
  assert_null(tensor.data);
  assert_int_not_equal(attn_graph_create_on(gpu, ATTN_F32, &graph), ATTN_OK);
  assert_null(graph);
  attn_softmax_problem softmax = ATTN_SOFTMAX_PROBLEM_INIT;
  attn_recurrent_problem recurrent = ATTN_RECURRENT_PROBLEM_INIT;
  attn_plan *plan = NULL;
  softmax.dim = softmax.value_dim = recurrent.dim = recurrent.value_dim = 64;
  softmax.query_length = softmax.key_length = recurrent.length = 8;
  softmax.device = recurrent.device = gpu;
  assert_int_not_equal(attn_softmax_plan(&softmax, &plan), ATTN_OK);
  assert_int_not_equal(attn_recurrent_plan(&recurrent, &plan), ATTN_OK);
  assert_null(plan);
  assert_int_equal(attn_memory_get_stats().live_bytes, live);
  the_processor_works();
}

static void model_writes(const attn_model *model) {
  attn_session *session;
  const int32_t token = 65;
  assert_ok(attn_session_create(model, NULL, &session));
  assert_ok(attn_session_feed(session, &token, 1));
  assert_true(isfinite(attn_session_logits(session)[0]));
  attn_session_destroy(session);
}

/* A model that cannot be moved stays as it is. */
static void models_stay(void **state) {
  (void)state;
  if (attn_cuda_count() > 0) skip();
  attn_model *model;
  assert_ok(attn_model_create(attn_training_default_config(), 1, ATTN_F32, &model));
  assert_int_not_equal(attn_model_move(model, (attn_device){ATTN_CUDA, 0}), ATTN_OK);
  assert_ok(attn_model_move(model, (attn_device){0}));
  model_writes(model);
  attn_model_destroy(model);
}

static void too_much_memory(void **state) {
  (void)state;
  if (attn_cuda_count() == 0) skip();
  attn_device gpu = {ATTN_CUDA, 0};
  attn_tensor tensor;
  int64_t huge = (int64_t)1 << 44;
  assert_int_equal(attn_tensor_create_on(gpu, ATTN_F32, 1, &huge, &tensor), ATTN_OUT_OF_MEMORY);
  assert_non_null(strstr(attn_error_message(), "MiB asked for"));
  assert_non_null(strstr(attn_error_message(), "free"));
  assert_ok(attn_tensor_create_on(gpu, ATTN_F32, 1, (int64_t[]){100}, &tensor));
  assert_true(attn_tensor_get(&tensor, (int64_t[]){99}) == 0);
  attn_tensor_destroy(&tensor);
  the_processor_works();
}

/* With next to no memory left a model stays whole on the processor, and moves once there is some.
 */
static void models_stay_where_memory_ends(void **state) {
  (void)state;
  if (attn_cuda_count() == 0) skip();
  enum { MOST = 256 };
  const size_t least = (size_t)1 << 20;
  attn_device gpu = {ATTN_CUDA, 0};
  void *taken[MOST];
  int count = 0;
  attn_model *model;
  assert_ok(attn_model_create(attn_training_default_config(), 1, ATTN_BF16, &model));
  assert_ok(attn_model_make_trainable(model));
  for (size_t bytes = (size_t)1 << 37; bytes >= least && count < MOST;)
    if ((taken[count] = attn_device_alloc(gpu, bytes)))
      ++count;
    else
      bytes /= 2;
  int64_t live = attn_memory_get_stats().live_bytes;
  assert_int_equal(attn_model_move(model, gpu), ATTN_OUT_OF_MEMORY);
  assert_int_equal(attn_memory_get_stats().live_bytes, live);
  model_writes(model);
  while (count) attn_device_free(gpu, taken[--count]);
  assert_ok(attn_model_move(model, gpu));
  model_writes(model);
  attn_model_destroy(model);
}

/* Between devices, dtypes and strides. */
static void copies_go_round(void **state) {
  (void)state;
  if (attn_cuda_count() == 0) skip();
  attn_device gpu = {ATTN_CUDA, 0};
  attn_tensor here, there, back, part, turned;
  assert_ok(attn_tensor_create(ATTN_F64, 2, (int64_t[]){5, 7}, &here));
  for (int i = 0; i < 35; ++i) ((double *)here.data)[i] = i;
  assert_ok(attn_tensor_create_on(gpu, ATTN_BF16, 2, (int64_t[]){7, 5}, &there));
  assert_ok(attn_tensor_create(ATTN_F32, 2, (int64_t[]){5, 3}, &back));
  assert_ok(attn_tensor_permute(&there, (int[]){1, 0}, &turned));
  assert_ok(attn_tensor_copy(&here, &turned)); /* up, into a transposed view */
  assert_true(attn_tensor_get(&there, (int64_t[]){6, 4}) == 34);
  assert_ok(attn_tensor_slice(&turned, 1, 2, 3, &part));
  assert_ok(attn_tensor_copy(&part, &back)); /* down, a part of it, in another dtype */
  for (int r = 0; r < 5; ++r)
    for (int c = 0; c < 3; ++c)
      assert_true(attn_tensor_get(&back, (int64_t[]){r, c}) == 7 * r + c + 2);
  assert_ok(attn_tensor_fill(&part, -1));
  assert_true(attn_tensor_get(&there, (int64_t[]){2, 0}) == -1);
  assert_true(attn_tensor_get(&there, (int64_t[]){1, 0}) == 1);
  attn_tensor_destroy(&here);
  attn_tensor_destroy(&there);
  attn_tensor_destroy(&back);
}

int main(int argc, char **argv) {
  if (argc > 1) cmocka_set_test_filter(argv[1]);
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(names),
      cmocka_unit_test(without_a_gpu),
      cmocka_unit_test(models_stay),
      cmocka_unit_test(too_much_memory),
      cmocka_unit_test(models_stay_where_memory_ends),
      cmocka_unit_test(copies_go_round),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
