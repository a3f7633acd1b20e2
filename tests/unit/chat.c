/* Chat templates: each is recognised by what it writes, and a chat is written as it says. Expected
 * texts are those that the published templates give. */
#include "support/test.h"

#include "models/text.h"

#include <stdio.h>
#include <string.h>

#define BAR   "\xef\xbd\x9c"
#define SPACE "\xe2\x96\x81"

typedef struct format {
  const char *name, *template; /* a line of the template that gives it away */
  const char *expected;        /* of the chat below */
  const char *alone;           /* of its first message alone */
} format;

static const attn_message chat[] = {
    {"system", "Be kind."}, {"user", "Hello <|im_end|>"}, {"assistant", "Hi."}, {"user", "Bye"}};

static const format formats[] = {
    {"chatml", "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'}}",
     "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello <|im_end|><|im_end|>\n"
     "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
     "<|im_start|>assistant\n",
     "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>assistant\n"},
    {"llama3", "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>' %}",
     "<|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
     "<|start_header_id|>user<|end_header_id|>\n\nHello <|im_end|><|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\nHi.<|eot_id|>"
     "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n",
     "<|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n"},
    {"gemma", "{{ '<start_of_turn>' + role + '\n' + message['content'] + '<end_of_turn>\n' }}",
     "<start_of_turn>user\nBe kind.\n\nHello <|im_end|><end_of_turn>\n"
     "<start_of_turn>model\nHi.<end_of_turn>\n<start_of_turn>user\nBye<end_of_turn>\n"
     "<start_of_turn>model\n",
     "<start_of_turn>user\nBe kind.<end_of_turn>\n<start_of_turn>model\n"},
    {"mistral", "{{ '[INST] ' + message['content'] + ' [/INST]' }}",
     "[INST] Be kind.\n\nHello <|im_end|> [/INST] Hi.</s>[INST] Bye [/INST]",
     "[INST] Be kind. [/INST]"},
    {"zephyr", "{{ '<|user|>\n' + message['content'] + eos_token }}",
     "<|system|>\nBe kind.</s>\n<|user|>\nHello <|im_end|></s>\n<|assistant|>\nHi.</s>\n"
     "<|user|>\nBye</s>\n<|assistant|>\n",
     "<|system|>\nBe kind.</s>\n<|assistant|>\n"},
    {"phi3", "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}",
     "<|system|>\nBe kind.<|end|>\n<|user|>\nHello <|im_end|><|end|>\n"
     "<|assistant|>\nHi.<|end|>\n<|user|>\nBye<|end|>\n<|assistant|>\n",
     "<|system|>\nBe kind.<|end|>\n<|assistant|>\n"},
    {"deepseek2", "{{ 'Assistant: ' + message['content'] + eos_token }}",
     "Be kind.\n\nUser: Hello <|im_end|>\n\nAssistant: Hi."
     "<" BAR "end" SPACE "of" SPACE "sentence" BAR ">User: Bye\n\nAssistant:",
     "Be kind.\n\nAssistant:"},
    {"deepseek3", "{{ '<" BAR "Assistant" BAR ">' + content + eos }}",
     "Be kind.<" BAR "User" BAR ">Hello <|im_end|><" BAR "Assistant" BAR ">Hi."
     "<" BAR "end" SPACE "of" SPACE "sentence" BAR "><" BAR "User" BAR ">Bye<" BAR "Assistant" BAR
     ">",
     "Be kind.<" BAR "Assistant" BAR ">"},
    {"kimi", "{{ '<|im_user|>' + name + '<|im_middle|>' }}",
     "<|im_system|>system<|im_middle|>Be kind.<|im_end|>"
     "<|im_user|>user<|im_middle|>Hello <|im_end|><|im_end|>"
     "<|im_assistant|>assistant<|im_middle|>Hi.<|im_end|>"
     "<|im_user|>user<|im_middle|>Bye<|im_end|><|im_assistant|>assistant<|im_middle|>",
     "<|im_system|>system<|im_middle|>Be kind.<|im_end|><|im_assistant|>assistant<|im_middle|>"},
};
enum { COUNT = sizeof formats / sizeof *formats };

static attn_tokenizer *load(const char *name) {
  char path[512];
  attn_tokenizer *tokenizer;
  snprintf(path, sizeof path, "%s/tests/unit/fixtures/tokenizer/%s.json", ATTN_SOURCE_DIR, name);
  assert_ok(attn_tokenizer_load(path, &tokenizer));
  return tokenizer;
}

static void assert_written(const attn_model_text *text, const attn_message *messages, int count,
                           const char *expected) {
  attn_tokens tokens = {0};
  attn_text written = {0};
  assert_ok(attn_chat_encode(text, messages, count, &tokens));
  assert_ok(attn_tokenizer_decode(text->tokenizer, tokens.ids, tokens.count, 0, &written));
  attn_text_add(&written, "", 1);
  assert_string_equal(written.data, expected);
  attn_text_free(&written);
  attn_tokens_free(&tokens);
}

static void chats_are_written_as_published(void **state) {
  (void)state;
  attn_tokenizer *tokenizer = load("gpt2"); /* of bytes: any text goes through it */
  for (int i = 0; i < COUNT; ++i) {
    attn_model_text text = {.tokenizer = tokenizer};
    assert_ok(attn_chat_recognise(formats[i].template, strlen(formats[i].template), &text));
    assert_written(&text, chat, 4, formats[i].expected);
    assert_written(&text, chat, 1, formats[i].alone);
    assert_null(text.system);
  }
  attn_tokenizer_destroy(tokenizer);
}

/* Where the vocabulary has the template's tokens they are used; a content never becomes one. */
static void marks_are_tokens(void **state) {
  (void)state;
  attn_model_text text = {.tokenizer = load("kimi")};
  static const char template[] = "'<|im_middle|>'";
  const attn_message message = {"user", "<|im_end|><|im_middle|>"};
  attn_tokens tokens = {0};
  assert_ok(attn_chat_recognise(template, sizeof template - 1, &text));
  assert_ok(attn_chat_encode(&text, &message, 1, &tokens));
  static const char *const marks[] = {"<|im_middle|>", "<|im_end|>"};
  static const int expected[] = {2, 1};
  for (int m = 0; m < 2; ++m) {
    int64_t id = attn_tokenizer_find(text.tokenizer, marks[m], strlen(marks[m]));
    int found = 0;
    for (size_t i = 0; i < (size_t)tokens.count; ++i) found += tokens.ids[i] == id;
    if (id >= 0) assert_int_equal(found, expected[m]);
  }
  attn_tokens_free(&tokens);
  attn_tokenizer_destroy(text.tokenizer);
}

static void own_system_messages_are_found(void **state) {
  (void)state;
  static const char *const templates[] = {
      "{% if no_system %}{{ '<|im_start|>system\\nYou are here.<|im_end|>\\n' }}{% endif %}",
      "{%- if no_system -%}<|im_system|>system<|im_middle|>You are here.<|im_end|>{%- endif -%}"};
  for (int i = 0; i < 2; ++i) {
    attn_model_text text = {0};
    assert_ok(attn_chat_recognise(templates[i], strlen(templates[i]), &text));
    assert_non_null(text.system);
    assert_string_equal(text.system, "You are here.");
    attn_model_text_free(&text);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(chats_are_written_as_published),
      cmocka_unit_test(marks_are_tokens),
      cmocka_unit_test(own_system_messages_are_found),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
