/* The parts of the server that are pure: bodies of requests, stop strings, access. */
#include "support/test.h"

#include "base/fault.h"
#include "base/memory.h"
#include "server/access.h"
#include "server/request.h"

#include <string.h>

/* Requests --------------------------------------------------------------------------------------
 */

static attn_request parsed(attn_request_kind kind, const char *body) {
  attn_request request;
  char field[ATTN_FIELD_SIZE];
  assert_ok(attn_request_parse(kind, body, strlen(body), &request, field));
  return request;
}

static void chat_is_read(void **state) {
  (void)state;
  attn_request r = parsed(
      ATTN_REQUEST_CHAT,
      "{\"model\": \"m\", \"messages\": [{\"role\": \"developer\", \"content\": \"be brief\"},"
      "{\"role\": \"user\", \"content\": [{\"type\": \"text\", \"text\": \"a\"},"
      "{\"type\": \"text\", \"text\": \"\\u00e9\"}]},"
      "{\"role\": \"assistant\", \"content\": \"\", \"tool_calls\": null, \"refusal\": null}],"
      "\"max_tokens\": 5, \"max_completion_tokens\": 7, \"temperature\": 0.5, \"top_p\": 0,"
      "\"top_k\": 3, \"min_p\": 0.1, \"repetition_penalty\": 1.1, \"repetition_window\": 9,"
      "\"seed\": -1, \"stop\": [\"x\", \"yz\"], \"stream\": true, \"n\": 1, \"logprobs\": false,"
      "\"stream_options\": {\"include_usage\": true}, \"frequency_penalty\": 0.0,"
      "\"response_format\": {\"type\": \"text\"}, \"tools\": [], \"user\": \"u\"}");
  assert_string_equal(r.model, "m");
  assert_int_equal(r.message_count, 3);
  assert_string_equal(r.messages[0].role, "system");
  assert_string_equal(r.messages[1].content, "a\xc3\xa9");
  assert_string_equal(r.messages[2].content, "");
  assert_int_equal(r.most_tokens, 7);
  assert_true(r.sampling.temperature == 0.5 && r.sampling.min_p == 0.1);
  assert_true(r.sampling.top_p > 0 && r.sampling.top_p < 1e-6);
  assert_int_equal(r.sampling.top_k, 3);
  assert_int_equal(r.sampling.repetition_window, 9);
  assert_true(r.has_seed && r.sampling.seed == UINT64_MAX);
  assert_int_equal(r.stops.count, 2);
  assert_true(r.stream && r.include_usage);
  attn_request_free(&r);
}

static void prompts_are_texts_or_tokens(void **state) {
  (void)state;
  attn_request r = parsed(ATTN_REQUEST_COMPLETION, "{\"prompt\": \"ab\", \"stop\": \"s\"}");
  assert_string_equal(r.inputs->text, "ab");
  assert_int_equal(r.stops.count, 1);
  assert_true(r.sampling.temperature == 1 && !r.has_seed && !r.most_tokens && !r.stream);
  attn_request_free(&r);
  r = parsed(ATTN_REQUEST_COMPLETION, "{\"prompt\": [\"ab\"], \"seed\": null, \"stop\": null}");
  assert_string_equal(r.inputs->text, "ab");
  assert_false(r.has_seed);
  attn_request_free(&r);
  r = parsed(ATTN_REQUEST_COMPLETION, "{\"prompt\": [1, 2, 3]}");
  assert_null(r.inputs->text);
  assert_int_equal(r.inputs->token_count, 3);
  assert_int_equal(r.inputs->tokens[2], 3);
  attn_request_free(&r);
  r = parsed(ATTN_REQUEST_EMBEDDINGS, "{\"input\": [[1, 2], [3]], \"encoding_format\": \"float\"}");
  assert_int_equal(r.input_count, 2);
  assert_int_equal(r.inputs[1].tokens[0], 3);
  attn_request_free(&r);
}

static const struct {
  attn_request_kind kind;
  attn_status status;
  const char *body, *field, *message;
} refusals[] = {
    {ATTN_REQUEST_COMPLETION, ATTN_BAD_FORMAT, "", "", "not valid JSON"},
    {ATTN_REQUEST_COMPLETION, ATTN_BAD_FORMAT, "[]", "", "object"},
    {ATTN_REQUEST_COMPLETION, ATTN_BAD_FORMAT, "{\"prompt\": \"\\u0000\"}", "", "not valid JSON"},
    {ATTN_REQUEST_COMPLETION, ATTN_BAD_FORMAT, "{\"prompt\": \"\xff\"}", "", "not valid JSON"},
    {ATTN_REQUEST_COMPLETION, ATTN_BAD_FORMAT, "{}", "prompt", "missing"},
    {ATTN_REQUEST_COMPLETION, ATTN_BAD_FORMAT, "{\"prompt\": 1}", "prompt", "expected a string"},
    {ATTN_REQUEST_COMPLETION, ATTN_BAD_FORMAT, "{\"prompt\": [1, -2]}", "prompt", "item 1"},
    {ATTN_REQUEST_COMPLETION, ATTN_BAD_FORMAT, "{\"prompt\": [1, \"x\"]}", "prompt", "item 1"},
    {ATTN_REQUEST_COMPLETION, ATTN_BAD_FORMAT, "{\"prompt\": [9999999999]}", "prompt", "item 0"},
    {ATTN_REQUEST_COMPLETION, ATTN_UNSUPPORTED, "{\"prompt\": [\"a\", \"b\"]}", "prompt", "one"},
    {ATTN_REQUEST_COMPLETION, ATTN_BAD_FORMAT, "{\"prompt\": \"a\", \"temperature\": 2.5}",
     "temperature", "from 0 to 2"},
    {ATTN_REQUEST_COMPLETION, ATTN_BAD_FORMAT, "{\"prompt\": \"a\", \"max_tokens\": 0}",
     "max_tokens", "from 1"},
    {ATTN_REQUEST_COMPLETION, ATTN_BAD_FORMAT, "{\"prompt\": \"a\", \"max_tokens\": 1.0}",
     "max_tokens", "an integer"},
    {ATTN_REQUEST_COMPLETION, ATTN_BAD_FORMAT, "{\"prompt\": \"a\", \"stream\": 1}", "stream",
     "true or false"},
    {ATTN_REQUEST_COMPLETION, ATTN_UNSUPPORTED, "{\"prompt\": \"a\", \"n\": 2}", "n", "only 1"},
    {ATTN_REQUEST_COMPLETION, ATTN_UNSUPPORTED, "{\"prompt\": \"a\", \"logprobs\": 0}", "logprobs",
     "not offered"},
    {ATTN_REQUEST_COMPLETION, ATTN_UNSUPPORTED, "{\"prompt\": \"a\", \"echo\": true}", "echo",
     "not offered"},
    {ATTN_REQUEST_COMPLETION, ATTN_UNSUPPORTED, "{\"prompt\": \"a\", \"presence_penalty\": 1}",
     "presence_penalty", "only 0"},
    {ATTN_REQUEST_COMPLETION, ATTN_INVALID_ARGUMENT,
     "{\"prompt\": \"a\", \"stop\": [\"1\", \"2\", \"3\", \"4\", \"5\"]}", "stop", "at most 4"},
    {ATTN_REQUEST_COMPLETION, ATTN_INVALID_ARGUMENT, "{\"prompt\": \"a\", \"stop\": \"\"}", "stop",
     "0 bytes"},
    {ATTN_REQUEST_COMPLETION, ATTN_BAD_FORMAT, "{\"prompt\": \"a\", \"stop\": [1]}", "stop",
     "a string"},
    {ATTN_REQUEST_COMPLETION, ATTN_BAD_FORMAT,
     "{\"prompt\": \"a\", \"stream_options\": {\"x\": 1}}", "stream_options", "unknown"},
    {ATTN_REQUEST_COMPLETION, ATTN_BAD_FORMAT, "{\"prompt\": \"a\", \"temprature\": 1}", "",
     "close: temperature"},
    {ATTN_REQUEST_COMPLETION, ATTN_BAD_FORMAT, "{\"prompt\": \"a\", \"messages\": []}", "",
     "messages"},
    {ATTN_REQUEST_COMPLETION, ATTN_BAD_FORMAT, "{\"prompt\": \"a\", \"prompt\": \"b\"}", "",
     "duplicate"},
    {ATTN_REQUEST_CHAT, ATTN_BAD_FORMAT, "{\"messages\": []}", "messages", "at least one"},
    {ATTN_REQUEST_CHAT, ATTN_BAD_FORMAT, "{\"messages\": [1]}", "messages", "objects"},
    {ATTN_REQUEST_CHAT, ATTN_BAD_FORMAT,
     "{\"messages\": [{\"role\": \"tool\", \"content\": \"\"}]}", "messages", "message 0"},
    {ATTN_REQUEST_CHAT, ATTN_BAD_FORMAT, "{\"messages\": [{\"role\": \"user\"}]}", "messages",
     "content"},
    {ATTN_REQUEST_CHAT, ATTN_UNSUPPORTED,
     "{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"image_url\"}]}]}", "messages",
     "part 0"},
    {ATTN_REQUEST_CHAT, ATTN_UNSUPPORTED,
     "{\"messages\": [{\"role\": \"user\", \"content\": \"\", \"tool_calls\": [1]}]}", "messages",
     "tool_calls"},
    {ATTN_REQUEST_EMBEDDINGS, ATTN_BAD_FORMAT,
     "{\"input\": \"a\", \"encoding_format\": \"base64\"}", "encoding_format", "float"},
};

static void wrong_requests_are_refused(void **state) {
  (void)state;
  for (size_t i = 0; i < sizeof refusals / sizeof *refusals; ++i) {
    attn_request request;
    char field[ATTN_FIELD_SIZE];
    const char *body = refusals[i].body;
    attn_status status = attn_request_parse(refusals[i].kind, body, strlen(body), &request, field);
    if (status != refusals[i].status || !strstr(attn_error_message(), refusals[i].message))
      fail_msg("%s: %s: %s", body, attn_status_name(status), attn_error_message());
    assert_string_equal(field, refusals[i].field);
  }
}

static void deep_nesting_is_refused(void **state) {
  (void)state;
  enum { DEPTH = 100000 };
  attn_request request;
  char field[ATTN_FIELD_SIZE], *body = attn_alloc(DEPTH);
  memset(body, '[', DEPTH);
  memcpy(body, "{\"prompt\":", 10);
  assert_int_equal(attn_request_parse(ATTN_REQUEST_COMPLETION, body, DEPTH, &request, field),
                   ATTN_BAD_FORMAT);
  assert_non_null(strstr(attn_error_message(), "depth"));
  attn_free(body);
}

static void requests_survive_failing_memory(void **state) {
  (void)state;
  const char *body = "{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"text\","
                     "\"text\": \"a\"}]}], \"stop\": [\"x\"]}";
  size_t live = attn_memory_get_stats().live_bytes;
  for (int64_t skip = 0;; ++skip) {
    attn_request request;
    char field[ATTN_FIELD_SIZE];
    attn_fault_arm(ATTN_FAULT_ALLOC, skip);
    attn_status status = attn_request_parse(ATTN_REQUEST_CHAT, body, strlen(body), &request, field);
    attn_fault_disarm(ATTN_FAULT_ALLOC);
    if (status == ATTN_OK) attn_request_free(&request);
    assert_int_equal(attn_memory_get_stats().live_bytes, live);
    if (status == ATTN_OK) break;
    assert_int_equal(status, ATTN_OUT_OF_MEMORY);
  }
}

/* Stops -----------------------------------------------------------------------------------------
 */

/* Pushes `text` in pieces of `piece` bytes; what comes out, with "|" behind what each push gave. */
static void run_stops(const char *const *strings, const char *text, size_t piece, attn_text *out,
                      bool *met) {
  attn_stops stops = {0};
  *met = false;
  out->length = 0;
  for (; *strings; ++strings) assert_ok(attn_stops_add(&stops, *strings));
  for (size_t at = 0; at < strlen(text) && !*met; at += piece) {
    size_t size = strlen(text) - at < piece ? strlen(text) - at : piece;
    *met = attn_stops_push(&stops, text + at, size, out);
  }
  if (!*met) attn_stops_finish(&stops, out);
  attn_text_add(out, "", 0);
  attn_stops_free(&stops);
}

static void stops_do_not_depend_on_pieces(void **state) {
  (void)state;
  static const struct {
    const char *stops[4], *text, *expected;
    bool met;
  } cases[] = {
      {{"END", NULL}, "some text END more", "some text ", true},
      {{"END", NULL}, "some EN text", "some EN text", false},
      {{"END", NULL}, "ends with EN", "ends with EN", false},
      {{"aab", NULL}, "aaaab", "aa", true},
      {{"abcd", "bc", NULL}, "xabcd", "xa", true}, /* bc is complete first */
      {{"c", "abc", NULL}, "xabc", "x", true},     /* at once: the longest */
      {{"\xc3\xa9", NULL}, "caf\xc3\xa8 caf\xc3\xa9!", "caf\xc3\xa8 caf", true},
      {{"\n\n", NULL}, "a\nb\n\nc", "a\nb", true},
      {{NULL}, "no stops", "no stops", false},
      {{"x", NULL}, "x", "", true},
  };
  attn_text out = {0};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i)
    for (size_t piece = 1; piece <= strlen(cases[i].text); ++piece) {
      bool met;
      run_stops(cases[i].stops, cases[i].text, piece, &out, &met);
      assert_int_equal(met, cases[i].met);
      assert_string_equal(out.data, cases[i].expected);
    }
  attn_text_free(&out);
}

static void only_what_may_be_a_stop_is_held_back(void **state) {
  (void)state;
  attn_stops stops = {0};
  attn_text out = {0};
  assert_ok(attn_stops_add(&stops, "stop"));
  assert_false(attn_stops_push(&stops, "a st", 4, &out));
  assert_int_equal(out.length, 2);
  assert_false(attn_stops_push(&stops, "ill s", 5, &out));
  assert_string_equal(out.data, "a still ");
  assert_true(attn_stops_push(&stops, "top.", 4, &out));
  assert_string_equal(out.data, "a still ");
  attn_stops_free(&stops);
  attn_text_free(&out);
}

/* Access ----------------------------------------------------------------------------------------
 */

static void keys_are_compared_whole(void **state) {
  (void)state;
  const attn_access access = {.key = "secret"}, open = {0};
  assert_true(attn_access_key(&access, "Bearer secret"));
  assert_true(attn_access_key(&access, "bearer secret"));
  static const char *const wrong[] = {"Bearer secre",  "Bearer secrets", "Bearer secretsecret",
                                      "Bearer ",       "secret",         "Basic secret",
                                      "Bearer Secret", "Bearer  secret", ""};
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; ++i)
    assert_false(attn_access_key(&access, wrong[i]));
  assert_false(attn_access_key(&access, NULL));
  assert_true(attn_access_key(&open, NULL));
}

static void loopback_servers_want_loopback_names(void **state) {
  (void)state;
  const attn_access access = {.loopback = true}, keyed = {.loopback = true, .key = "k"}, wide = {0};
  static const char *const right[] = {"localhost",   "localhost:8080", "LOCALHOST:1", "127.0.0.1",
                                      "127.1.2.3:8", "[::1]",          "[::1]:8080"};
  static const char *const wrong[] = {"example.org",
                                      "127.example.org",
                                      "127.0.0.1.example.org",
                                      "localhost.example.org:8080",
                                      "10.0.0.1",
                                      "[::2]:1",
                                      "",
                                      "127.0.0",
                                      "1"};
  for (size_t i = 0; i < sizeof right / sizeof *right; ++i)
    assert_true(attn_access_host(&access, right[i]));
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; ++i) {
    assert_false(attn_access_host(&access, wrong[i]));
    assert_true(attn_access_host(&keyed, wrong[i]));
    assert_true(attn_access_host(&wide, wrong[i]));
  }
}

static void foreign_origins_are_refused(void **state) {
  (void)state;
  const char *const listed[] = {"https://a.example"}, *const star[] = {"*"};
  const attn_access access = {0}, some = {.origins = listed, .origin_count = 1},
                    all = {.origins = star, .origin_count = 1};
  assert_true(attn_access_origin(&access, "localhost:80", NULL));
  assert_true(attn_access_origin(&access, "localhost:80", "http://localhost:80"));
  assert_false(attn_access_origin(&access, "localhost:80", "http://localhost:81"));
  assert_false(attn_access_origin(&access, "localhost:80", "https://a.example"));
  assert_false(attn_access_origin(&access, "localhost:80", "null"));
  assert_false(attn_access_origin(&access, NULL, "http://localhost"));
  assert_true(attn_access_origin(&some, "localhost:80", "https://a.example"));
  assert_false(attn_access_origin(&some, "localhost:80", "https://a.example.org"));
  assert_true(attn_access_origin(&all, "localhost:80", "null"));
  assert_true(attn_access_shares(&some, "https://a.example"));
  assert_false(attn_access_shares(&some, NULL));
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(chat_is_read),
                                     cmocka_unit_test(prompts_are_texts_or_tokens),
                                     cmocka_unit_test(wrong_requests_are_refused),
                                     cmocka_unit_test(deep_nesting_is_refused),
                                     cmocka_unit_test(requests_survive_failing_memory),
                                     cmocka_unit_test(stops_do_not_depend_on_pieces),
                                     cmocka_unit_test(only_what_may_be_a_stop_is_held_back),
                                     cmocka_unit_test(keys_are_compared_whole),
                                     cmocka_unit_test(loopback_servers_want_loopback_names),
                                     cmocka_unit_test(foreign_origins_are_refused)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
