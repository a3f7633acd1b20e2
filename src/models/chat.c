/* Chat templates. They are Jinja programs; the common ones are recognised by what they write, and
 * written here.
 *
 *   ChatML    <|im_start|>ROLE\nCONTENT<|im_end|>\n ...              <|im_start|>assistant\n
 *   Llama 3   BOS <|start_header_id|>ROLE<|end_header_id|>\n\nCONTENT<|eot_id|> ...
 *   Gemma     BOS <start_of_turn>ROLE\nCONTENT<end_of_turn>\n ...    (assistant is "model")
 *   Mistral   BOS [INST] CONTENT [/INST] CONTENT</s> ...             (system before the first user)
 *   Zephyr    <|ROLE|>\nCONTENT</s>\n ...                            <|assistant|>\n
 *   Phi 3     <|ROLE|>\nCONTENT<|end|>\n ...                         <|assistant|>\n
 *   DeepSeek-V2  BOS SYSTEM\n\nUser: CONTENT\n\nAssistant: CONTENT EOS ...     Assistant:
 *   DeepSeek-V3  BOS SYSTEM<|User|>CONTENT<|Assistant|>CONTENT EOS ...        <|Assistant|>
 *   Kimi      <|im_ROLE|>ROLE<|im_middle|>CONTENT<|im_end|> ...
 * <|im_assistant|>assistant<|im_middle|>
 *
 * (DeepSeek's own bars and underlines are U+FF5C and U+2581.)
 *
 * A piece between special tokens is encoded whole, as a template's text and a content together, and
 * special tokens only where the template has them. */
#include "base/memory.h"
#include "base/status.h"
#include "models/model.h"
#include "models/text.h"

#include <string.h>

static const char *const format_names[ATTN_CHAT_FORMATS] = {
    NULL,     NULL,   "chatml",    "llama3",    "gemma", "mistral",
    "zephyr", "phi3", "deepseek2", "deepseek3", "kimi"};

#define BAR   "\xef\xbd\x9c"
#define SPACE "\xe2\x96\x81"
static const char deepseek_user[] = "<" BAR "User" BAR ">";
static const char deepseek_assistant[] = "<" BAR "Assistant" BAR ">";
static const char deepseek_end[] = "<" BAR "end" SPACE "of" SPACE "sentence" BAR ">";

const char *attn_model_chat_template(const attn_model *model) {
  return model ? format_names[model->text.chat] : NULL;
}

/* Recognising ------------------------------------------------------------------------------------
 */

static const char *find(const char *text, size_t size, const char *wanted) {
  return memmem(text, size, wanted, strlen(wanted));
}

/* ChatML's templates and Kimi's may begin a chat that has no system message with one of their own:
 * '<|im_start|>system\nYou are ...<|im_end|>' as a literal of the template. */
static attn_status find_system(const char *template, size_t size, attn_model_text *text) {
  static const char *const starts[] = {"<|im_start|>system\\n", "<|im_start|>system\n",
                                       "<|im_system|>system<|im_middle|>"};
  const char *end = template + size;
  for (int i = 0; i < 3; ++i) {
    const char *at = template;
    while ((at = find(at, (size_t)(end - at), starts[i]))) {
      at += strlen(starts[i]);
      const char *stop = find(at, (size_t)(end - at), "<|im_end|>");
      if (!stop) break;
      bool literal = stop > at;
      for (const char *c = at; c < stop; ++c) literal &= *c != '\'' && *c != '{' && *c != '"';
      if (!literal) continue;
      text->system = attn_alloc((size_t)(stop - at) + 1);
      if (!text->system) return ATTN_OUT_OF_MEMORY;
      memcpy(text->system, at, (size_t)(stop - at));
      text->system[stop - at] = 0;
      return ATTN_OK;
    }
  }
  return ATTN_OK;
}

attn_status attn_chat_recognise(const char *template, size_t size, attn_model_text *text) {
  static const struct {
    const char *mark;
    attn_chat_format format;
  } marks[] = {{deepseek_assistant, ATTN_CHAT_DEEPSEEK3},
               {"<|im_middle|>", ATTN_CHAT_KIMI},
               {"'Assistant: ' + message['content'] + eos_token", ATTN_CHAT_DEEPSEEK2},
               {"<|im_start|>", ATTN_CHAT_CHATML},
               {"<|start_header_id|>", ATTN_CHAT_LLAMA3},
               {"<start_of_turn>", ATTN_CHAT_GEMMA},
               {"[INST]", ATTN_CHAT_MISTRAL},
               {"<|end|>", ATTN_CHAT_PHI3},
               {"<|user|>", ATTN_CHAT_ZEPHYR}};
  text->chat = ATTN_CHAT_UNKNOWN;
  for (size_t i = 0; i < sizeof marks / sizeof *marks; ++i)
    if (find(template, size, marks[i].mark)) {
      text->chat = marks[i].format;
      break;
    }
  bool may_have_system = text->chat == ATTN_CHAT_CHATML || text->chat == ATTN_CHAT_KIMI;
  return may_have_system ? find_system(template, size, text) : ATTN_OK;
}

/* Writing ----------------------------------------------------------------------------------------
 */

typedef struct writer {
  const attn_tokenizer *tokenizer;
  attn_tokens *tokens;
  attn_text plain; /* since the last special token */
  attn_status status;
} writer;

static void flush(writer *w) {
  if (w->status == ATTN_OK && w->plain.failed) w->status = ATTN_OUT_OF_MEMORY;
  if (w->status == ATTN_OK && w->plain.length)
    w->status = attn_tokenizer_encode(w->tokenizer, w->plain.data, w->plain.length, 0, w->tokens);
  w->plain.length = 0;
}

static void plain(writer *w, const char *text) {
  attn_text_add(&w->plain, text, strlen(text));
}

/* A token of the vocabulary by its name; as text where the vocabulary lacks it. */
static void special(writer *w, const char *name) {
  if (attn_tokenizer_find(w->tokenizer, name, strlen(name)) < 0) {
    plain(w, name);
    return;
  }
  flush(w);
  if (w->status == ATTN_OK)
    w->status =
        attn_tokenizer_encode(w->tokenizer, name, strlen(name), ATTN_ENCODE_SPECIAL, w->tokens);
}

/* BOS where the tokenizer adds one: the tokens of an empty text up to an end. */
static void begin(writer *w, const attn_model_text *text) {
  attn_tokens ends = {0};
  w->status = attn_tokenizer_encode(w->tokenizer, "", 0, ATTN_ENCODE_ENDS, &ends);
  if (w->status == ATTN_OK && ends.count) {
    bool is_end = false;
    for (int i = 0; i < text->end_count; ++i) is_end |= text->ends[i] == ends.ids[0];
    size_t length;
    const char *name = attn_tokenizer_string(w->tokenizer, ends.ids[0], &length);
    if (name && !is_end)
      w->status = attn_tokenizer_encode(w->tokenizer, name, length, ATTN_ENCODE_SPECIAL, w->tokens);
  }
  attn_tokens_free(&ends);
}

/* DeepSeek's: nothing before a system message, and only V2 has something behind it. */
static void deepseek_turn(writer *w, bool is_v3, const char *role, const char *content) {
  bool system = strcmp(role, "system") == 0, assistant = strcmp(role, "assistant") == 0;
  if (is_v3 && !system)
    special(w, assistant ? deepseek_assistant : deepseek_user);
  else if (!system)
    plain(w, assistant ? "Assistant:" : "User:");
  if (!content) return;
  if (!is_v3 && !system) plain(w, " ");
  plain(w, content);
  if (assistant)
    special(w, deepseek_end);
  else if (!is_v3)
    plain(w, "\n\n");
}

/* One message with what stands around it; content NULL: only the beginning. */
static void turn(writer *w, attn_chat_format format, const char *role, const char *content) {
  bool assistant = strcmp(role, "assistant") == 0;
  char tag[32];
  switch (format) {
  case ATTN_CHAT_CHATML:
    special(w, "<|im_start|>");
    plain(w, role);
    plain(w, "\n");
    if (!content) return;
    plain(w, content);
    special(w, "<|im_end|>");
    plain(w, "\n");
    return;
  case ATTN_CHAT_LLAMA3:
    special(w, "<|start_header_id|>");
    plain(w, role);
    special(w, "<|end_header_id|>");
    plain(w, "\n\n");
    if (!content) return;
    plain(w, content);
    special(w, "<|eot_id|>");
    return;
  case ATTN_CHAT_GEMMA:
    special(w, "<start_of_turn>");
    plain(w, assistant ? "model" : "user");
    plain(w, "\n");
    if (!content) return;
    plain(w, content);
    special(w, "<end_of_turn>");
    plain(w, "\n");
    return;
  case ATTN_CHAT_DEEPSEEK2:
  case ATTN_CHAT_DEEPSEEK3: deepseek_turn(w, format == ATTN_CHAT_DEEPSEEK3, role, content); return;
  case ATTN_CHAT_KIMI:
    snprintf(tag, sizeof tag, "<|im_%.20s|>", role);
    special(w, tag);
    plain(w, role);
    special(w, "<|im_middle|>");
    if (!content) return;
    plain(w, content);
    special(w, "<|im_end|>");
    return;
  case ATTN_CHAT_MISTRAL:
    if (!content) return;
    if (!assistant) special(w, "[INST]");
    plain(w, " ");
    plain(w, content);
    if (!assistant) plain(w, " ");
    special(w, assistant ? "</s>" : "[/INST]");
    return;
  default:
    snprintf(tag, sizeof tag, "<|%.20s|>", role);
    special(w, tag);
    plain(w, "\n");
    if (!content) return;
    plain(w, content);
    special(w, format == ATTN_CHAT_PHI3 ? "<|end|>" : "</s>");
    plain(w, "\n");
  }
}

/* Gemma and Mistral have no system role: it goes in front of the first message of the user. */
static bool has_system_role(attn_chat_format format) {
  return format != ATTN_CHAT_GEMMA && format != ATTN_CHAT_MISTRAL;
}

static void write_messages(writer *w, const attn_model_text *text, const attn_message *messages,
                           int count) {
  bool own_system = has_system_role(text->chat);
  const char *pending = NULL;
  if (text->system && strcmp(messages[0].role, "system") != 0)
    turn(w, text->chat, "system", text->system);
  for (int i = 0; i < count; ++i) {
    if (!own_system && strcmp(messages[i].role, "system") == 0) {
      pending = messages[i].content;
      continue;
    }
    attn_text joined = {0};
    if (pending) attn_text_print(&joined, "%s\n\n%s", pending, messages[i].content);
    if (joined.failed) w->status = ATTN_OUT_OF_MEMORY;
    turn(w, text->chat, messages[i].role,
         pending && !joined.failed ? joined.data : messages[i].content);
    attn_text_free(&joined);
    pending = NULL;
  }
  if (pending) turn(w, text->chat, "user", pending); /* nothing followed it */
  turn(w, text->chat, "assistant", NULL);
}

static attn_status check_messages(const attn_message *messages, int count) {
  static const char *const roles[] = {"system", "user", "assistant"};
  for (int i = 0; i < count; ++i) {
    bool known = false;
    for (int r = 0; messages[i].role && r < 3; ++r)
      known |= strcmp(messages[i].role, roles[r]) == 0;
    if (!known || !messages[i].content)
      return attn_fail(ATTN_INVALID_ARGUMENT,
                       "message %d: role '%s', expected system, user or assistant, with a content",
                       i, messages[i].role ? messages[i].role : "(null)");
  }
  return ATTN_OK;
}

attn_status attn_chat_encode(const attn_model_text *text, const attn_message *messages, int count,
                             attn_tokens *tokens) {
  if (!text->tokenizer || text->chat == ATTN_CHAT_NONE)
    return attn_fail(ATTN_UNSUPPORTED, "the model has no chat template");
  if (text->chat == ATTN_CHAT_UNKNOWN)
    return attn_fail(ATTN_UNSUPPORTED, "the model's chat template is not one of those known");
  ATTN_TRY(check_messages(messages, count));
  writer w = {.tokenizer = text->tokenizer, .tokens = tokens};
  begin(&w, text);
  write_messages(&w, text, messages, count);
  flush(&w);
  attn_text_free(&w.plain);
  return w.status;
}
