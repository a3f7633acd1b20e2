/* What a model advises for sampling: from generation_config.json, from and to GGUF; and what is no
 * advice at all. */
#include "support/test.h"

#include "files/gguf_write.h"
#include "files/json.h"
#include "models/generation.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

static attn_status read_text(const char *text, attn_generation *g) {
  json_t *json;
  assert_ok(attn_json_parse(text, strlen(text), "test", &json));
  attn_status status = attn_generation_read(json, g);
  json_decref(json);
  return status;
}

static void advice_is_read(void **state) {
  (void)state;
  attn_generation g;
  attn_sampling s = {.temperature = 7, .top_k = 8, .top_p = 0.9, .repetition_window = 64};
  assert_ok(attn_generation_read(NULL, &g));
  assert_int_equal(g.advises, 0);
  attn_generation_apply(&g, &s);
  assert_true(s.temperature == 7 && s.top_k == 8 && s.top_p == 0.9 && s.repetition_window == 64);
  assert_ok(read_text("{\"do_sample\": true, \"temperature\": 0.6, \"top_k\": 20, "
                      "\"eos_token_id\": [1, 2], \"max_new_tokens\": 33, \"pad_token_id\": 0}",
                      &g));
  assert_int_equal(g.advises, ATTN_ADVISES_TEMPERATURE | ATTN_ADVISES_TOP_K);
  assert_int_equal(g.max_new_tokens, 33);
  attn_generation_apply(&g, &s);
  assert_true(s.temperature == 0.6 && s.top_k == 20 && s.top_p == 0.9 && s.repetition_window == 64);
  assert_ok(
      read_text("{\"do_sample\": false, \"temperature\": 0.6, \"top_p\": 0.5, \"min_p\": 0.1, "
                "\"repetition_penalty\": 1.1, \"eos_token_id\": null}",
                &g));
  attn_generation_apply(&g, &s);
  assert_true(s.temperature == 0 && s.top_p == 0.5 && s.min_p == 0.1);
  assert_true(s.repetition_penalty == 1.1 && s.repetition_window == 0);
}

static void bad_advice_is_refused(void **state) {
  (void)state;
  static const char *const bad[][2] = {
      {"{\"temperature\": -1}", "temperature"},
      {"{\"temperature\": \"warm\"}", "temperature"},
      {"{\"top_p\": 0}", "top_p"},
      {"{\"top_p\": 1.5}", "top_p"},
      {"{\"top_k\": -2}", "top_k"},
      {"{\"top_k\": 2.5}", "top_k"},
      {"{\"min_p\": 2}", "min_p"},
      {"{\"repetition_penalty\": 0}", "repetition_penalty"},
      {"{\"do_sample\": 1}", "do_sample"},
      {"{\"max_new_tokens\": 0}", "max_new_tokens"},
      {"{\"eos_token_id\": \"x\"}", "eos_token_id"},
      {"{\"eos_token_id\": [1, \"x\"]}", "eos_token_id"},
  };
  attn_generation g;
  for (size_t i = 0; i < sizeof bad / sizeof *bad; ++i) {
    assert_int_equal(read_text(bad[i][0], &g), ATTN_BAD_FORMAT);
    assert_non_null(strstr(attn_error_message(), bad[i][1]));
  }
}

static attn_gguf *file_of(attn_gguf_draft *draft) {
  char path[64];
  attn_gguf *file;
  snprintf(path, sizeof path, "/tmp/attn-generation-%ld.gguf", (long)getpid());
  assert_ok(attn_gguf_draft_write(draft, path, 0, NULL, NULL, NULL));
  attn_gguf_draft_destroy(draft);
  assert_ok(attn_gguf_open(path, &file));
  unlink(path);
  return file;
}

static void gguf_says_the_same(void **state) {
  (void)state;
  attn_generation g, again;
  assert_ok(read_text("{\"temperature\": 0.6, \"top_k\": 20, \"top_p\": 0.95, \"min_p\": 0.05, "
                      "\"repetition_penalty\": 1.1}",
                      &g));
  for (int window = 0; window <= 64; window += 64) {
    g.sampling.repetition_window = window;
    attn_gguf_draft *draft = attn_gguf_draft_create();
    attn_generation_to_gguf(&g, draft);
    attn_gguf_add_u32(draft, "tokenizer.ggml.eos_token_id", 5);
    attn_gguf_add_u32(draft, "tokenizer.ggml.eom_token_id", 7);
    attn_gguf *file = file_of(draft);
    json_t *json = NULL;
    assert_ok(attn_generation_from_gguf(file, &json));
    assert_ok(attn_generation_read(json, &again));
    assert_int_equal(json_integer_value(json_array_get(json_object_get(json, "eos_token_id"), 1)),
                     7);
    assert_int_equal(again.advises, g.advises);
    assert_memory_equal(&again.sampling, &g.sampling, sizeof g.sampling); /* decimals come back */
    json_decref(json);
    attn_gguf_close(file);
  }
  /* No penalty at all; a key out of its range. */
  attn_gguf_draft *draft = attn_gguf_draft_create();
  attn_gguf_add_f32(draft, "general.sampling.penalty_repeat", 1.5f);
  attn_gguf_add_i32(draft, "general.sampling.penalty_last_n", 0);
  attn_gguf *file = file_of(draft);
  json_t *json = NULL;
  assert_ok(attn_generation_from_gguf(file, &json));
  assert_null(json);
  attn_gguf_close(file);
  draft = attn_gguf_draft_create();
  attn_gguf_add_f32(draft, "general.sampling.temp", -1);
  file = file_of(draft);
  assert_int_equal(attn_generation_from_gguf(file, &json), ATTN_BAD_FORMAT);
  assert_non_null(strstr(attn_error_message(), "general.sampling.temp"));
  attn_gguf_close(file);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(advice_is_read),
      cmocka_unit_test(bad_advice_is_refused),
      cmocka_unit_test(gguf_says_the_same),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
