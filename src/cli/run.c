/* attn run: a model continues a text, or chats. */
#include "cli/run.h"
#include "base/memory.h"
#include "base/progress.h"
#include "engines/plan_cache.h"
#include "base/io.h"

#include <errno.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
  MOST_PROMPT = 1 << 30,
  /* Tokens that a session may have when --max-context says nothing: a restored one more, a chat. */
  RESTORED_ROOM = 32768,
  CHAT_ROOM = 8192,
};

/* Why the text ended. */
static const char *const stops[] = {"length", "context", "interrupted", "end"};

/* The prompt ------------------------------------------------------------------------------------
 */

static attn_status read_stdin(char **data, size_t *size) {
  attn_text text = {0};
  char piece[4096];
  size_t got;
  while ((got = fread(piece, 1, sizeof piece, stdin)) > 0 && text.length < MOST_PROMPT)
    attn_text_add(&text, piece, got);
  if (ferror(stdin)) {
    attn_text_free(&text);
    return attn_fail(ATTN_IO_ERROR, "cannot read standard input: %s", strerror(errno));
  }
  *size = text.length;
  return attn_text_take(&text, data);
}

static attn_status read_prompt(runner *r) {
  const run_options *o = r->options;
  if (o->prompt) {
    r->prompt = attn_strdup(o->prompt);
    r->prompt_size = strlen(o->prompt);
    return r->prompt ? ATTN_OK : ATTN_OUT_OF_MEMORY;
  }
  if (o->prompt_file && strcmp(o->prompt_file, "-") != 0)
    return attn_file_read(o->prompt_file, MOST_PROMPT, &r->prompt, &r->prompt_size);
  bool has_input = o->prompt_file || (!o->load_session && !o->chat && !attn_is_terminal(stdin));
  return has_input ? read_stdin(&r->prompt, &r->prompt_size) : ATTN_OK;
}

/* A text that goes on does not begin again. */
static attn_status encode_prompt(runner *r) {
  unsigned flags = ATTN_ENCODE_SPECIAL | (r->options->load_session ? 0 : ATTN_ENCODE_ENDS);
  const char *text = r->prompt ? r->prompt : "";
  ATTN_TRY(attn_model_encode(r->model, text, r->prompt_size, flags, NULL, 0, &r->token_count));
  r->tokens = attn_alloc_array((size_t)r->token_count + 1, sizeof *r->tokens);
  if (!r->tokens) return ATTN_OUT_OF_MEMORY;
  return attn_model_encode(r->model, text, r->prompt_size, flags, r->tokens, r->token_count,
                           &r->token_count);
}

/* A model needs something to go on from: without a prompt, an empty line. */
static attn_status complete_prompt(runner *r) {
  if (r->token_count || attn_session_position(r->session)) return ATTN_OK;
  attn_free(r->prompt);
  attn_free(r->tokens);
  r->prompt = attn_strdup("\n");
  r->prompt_size = 1;
  return r->prompt ? encode_prompt(r) : ATTN_OUT_OF_MEMORY;
}

/* Sampling --------------------------------------------------------------------------------------
 */

/* Where neither the command line nor the model says anything. */
static const int64_t usual_tokens = 400;
static const attn_sampling usual_sampling = {.struct_size = sizeof(attn_sampling),
                                             .temperature = 0.8,
                                             .top_p = 0.95,
                                             .repetition_penalty = 1,
                                             .repetition_window = 64};

static void explain_sampling(const runner *r) {
  const attn_sampling *s = &r->sampling;
  fprintf(stderr,
          "sampling: temperature %.6g, top-k %lld, top-p %.6g, min-p %.6g, repetition penalty %.6g "
          "over %lld tokens; %s\n",
          s->temperature, (long long)s->top_k, s->top_p, s->min_p, s->repetition_penalty,
          (long long)s->repetition_window,
          r->model->generation.advises ? "the model advises some of it" : "the model advises none");
}

/* A seed of 0 asks for a new one: the clock and the process, mixed so that both reach all bits
 * (the multiplier is 2^64 over the golden ratio); 53 bits, so that JSON readers keep it exactly. */
static uint64_t fresh_seed(void) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  uint64_t mixed =
      ((uint64_t)now.tv_sec * 1000000007u + (uint64_t)now.tv_nsec) ^ ((uint64_t)getpid() << 40);
  mixed = mixed * 0x9e3779b97f4a7c15u >> 11;
  return mixed ? mixed : 1;
}

/* What the command line says, or what the model advises, or what is usual. */
static void choose_sampling(runner *r) {
  const run_options *o = r->options;
  attn_sampling *s = &r->sampling;
  *s = usual_sampling;
  attn_generation_apply(&r->model->generation, s);
  if (o->temperature >= 0) s->temperature = o->temperature;
  if (o->top_k >= 0) s->top_k = o->top_k;
  if (o->top_p >= 0) s->top_p = o->top_p;
  if (o->min_p >= 0) s->min_p = o->min_p;
  if (o->repetition_penalty >= 0) s->repetition_penalty = o->repetition_penalty;
  if (o->repetition_window >= 0) s->repetition_window = o->repetition_window;
  s->seed = o->seed ? o->seed : fresh_seed();
  int64_t advised = r->model->generation.max_new_tokens;
  r->most_tokens = o->tokens >= 0 ? o->tokens : advised ? advised : usual_tokens;
  if (o->explain) explain_sampling(r);
}

/* The session -----------------------------------------------------------------------------------
 */

static attn_status create_chat_session(runner *r) {
  attn_session_options options = ATTN_SESSION_OPTIONS_INIT;
  options.forks = 1;
  options.max_tokens = r->options->max_context ? r->options->max_context : CHAT_ROOM;
  return attn_session_create(r->model, &options, &r->session);
}

static attn_status create_session(runner *r) {
  const run_options *o = r->options;
  if (o->chat) return create_chat_session(r);
  attn_session_options options = ATTN_SESSION_OPTIONS_INIT;
  ATTN_TRY(encode_prompt(r));
  int64_t needed = r->token_count + 1 + r->most_tokens;
  options.forks = 1;
  options.checkpoints = 0; /* a run never goes back */
  options.max_tokens = o->max_context    ? o->max_context
                       : o->load_session ? needed + RESTORED_ROOM
                                         : needed;
  ATTN_TRY(attn_session_create(r->model, &options, &r->session));
  if (o->load_session) ATTN_TRY(attn_session_restore(r->session, o->load_session));
  return complete_prompt(r);
}

/* --draft proposes --speculate tokens at once, else those of the usual number. */
static attn_status create_speculator(runner *r) {
  const run_options *o = r->options;
  attn_speculation options = ATTN_SPECULATION_INIT;
  if (!o->speculate && !o->draft) return ATTN_OK;
  if (o->speculate) options.tokens = o->speculate;
  if (o->draft) ATTN_TRY(attn_open_model(o->draft, NULL, o->dtype, o->device, &r->draft, NULL));
  options.draft = r->draft;
  return attn_speculator_create(r->session, &options, &r->speculator);
}

/* Reports ---------------------------------------------------------------------------------------
 */

static double rate(double count, double seconds) {
  return seconds > 0 ? count / seconds : 0;
}

static void print_stats(const runner *r) {
  char prompt[ATTN_FORMAT_SIZE], text[ATTN_FORMAT_SIZE], state[ATTN_FORMAT_SIZE],
      peak[ATTN_FORMAT_SIZE];
  double prompt_rate = rate((double)r->token_count, r->prompt_seconds);
  double text_rate = rate((double)r->generated, r->text_seconds);
  fflush(stdout);
  fprintf(
      stderr,
      "%sprompt: %lld tokens, %s tokens/s; text: %lld tokens, %s tokens/s; state %s, memory %s, "
      "seed %llu\n",
      r->options->json || attn_is_terminal(stdout) ? "" : "\n", (long long)r->token_count,
      attn_format_count(prompt_rate, prompt, sizeof prompt), (long long)r->generated,
      attn_format_count(text_rate, text, sizeof text),
      attn_format_bytes((double)attn_session_state_bytes(r->session), state, sizeof state),
      attn_format_bytes((double)attn_memory_get_stats().peak_bytes, peak, sizeof peak),
      (unsigned long long)r->sampling.seed);
  if (!r->speculator) return;
  attn_speculation_stats s = attn_speculator_get_stats(r->speculator);
  fprintf(stderr, "speculation: %lld steps, %lld tokens proposed, %lld of them accepted\n",
          (long long)s.steps, (long long)s.proposed, (long long)s.accepted);
}

static void print_plan(void *context, const attn_plan_info *info) {
  char bytes[ATTN_FORMAT_SIZE];
  (void)context;
  fprintf(stderr, "plan: %s; workspace %s\n", info->description,
          attn_format_bytes((double)info->workspace_bytes, bytes, sizeof bytes));
}

/* A prompt need not be UTF-8; JSON must. */
static json_t *prompt_json(const runner *r) {
  attn_utf8 utf8 = {0};
  attn_text text = {0};
  for (size_t i = 0; i < r->prompt_size; ++i)
    attn_utf8_push(&utf8, (unsigned char)r->prompt[i], &text);
  attn_utf8_finish(&utf8, &text);
  json_t *json = json_stringn(text.length ? text.data : "", text.length);
  attn_text_free(&text);
  return json;
}

static int print_json(const runner *r) {
  json_t *json = json_pack(
      "{s:s, s:o, s:o, s:s, s:I, s:I, s:I, s:o, s:o, s:I, s:I}", "model", r->model_path, "prompt",
      prompt_json(r), "text", json_stringn(r->text.length ? r->text.data : "", r->text.length),
      "stopped", stops[r->stop], "prompt_tokens", (json_int_t)r->token_count, "tokens",
      (json_int_t)r->generated, "position", (json_int_t)attn_session_position(r->session),
      "prompt_tokens_per_second", attn_json_real(rate((double)r->token_count, r->prompt_seconds)),
      "tokens_per_second", attn_json_real(rate((double)r->generated, r->text_seconds)),
      "state_bytes", (json_int_t)attn_session_state_bytes(r->session), "seed",
      (json_int_t)r->sampling.seed);
  return attn_print_json(r->command, json, false);
}

static int finish(runner *r) {
  const run_options *o = r->options;
  if (o->json) {
    int code = print_json(r);
    if (code != ATTN_EXIT_OK) return code;
  }
  if (o->explain) attn_plan_cache_visit(attn_session_plans(r->session), print_plan, NULL);
  if (o->stats) print_stats(r);
  if (r->stop == STOP_CONTEXT)
    attn_complain(r->command, "stopped: the context of %lld tokens is full (--max-context)",
                  (long long)o->max_context);
  return r->stop == STOP_INTERRUPTED ? ATTN_EXIT_INTERRUPTED : ATTN_EXIT_OK;
}

/* The command -----------------------------------------------------------------------------------
 */

static attn_status continue_prompt(runner *r) {
  ATTN_TRY(run_feed(r, r->tokens, r->token_count));
  if (r->options->echo && !r->options->json)
    ATTN_TRY(run_write_bytes(r, r->prompt, r->prompt_size));
  return run_generate(r);
}

static attn_status run_model(runner *r, const char *model) {
  ATTN_TRY(attn_set_threads((int)r->options->threads));
  ATTN_TRY(read_prompt(r));
  ATTN_TRY(attn_open_text_model(model, r->options->lora, r->options->dtype, r->options->device,
                                &r->model, &r->model_path));
  choose_sampling(r);
  attn_catch_interrupts();
  ATTN_TRY(create_session(r));
  ATTN_TRY(create_speculator(r));
  ATTN_TRY(r->options->chat ? run_chat(r) : continue_prompt(r));
  return r->options->save_session ? attn_session_save(r->session, r->options->save_session)
                                  : ATTN_OK;
}

static int run(const attn_command *command, void *options, const attn_words *words) {
  const run_options *o = options;
  runner r = {.command = command, .options = o};
  if (o->prompt && o->prompt_file)
    return attn_misuse(command, "--prompt and --prompt-file exclude each other");
  if (o->system && !o->chat) return attn_misuse(command, "--system needs --chat");
  if (o->chat && (o->load_session || o->echo))
    return attn_misuse(command, "--chat excludes --load-session and --echo");
  if (o->chat && o->json && !o->prompt && !o->prompt_file)
    return attn_misuse(command, "--chat --json needs a --prompt");
  r.utf8.for_terminal = !o->json && attn_is_terminal(stdout);
  attn_status status = run_model(&r, words->count ? words->items[0] : NULL);
  int code = status == ATTN_OK ? finish(&r) : attn_report(command, status);
  attn_speculator_destroy(r.speculator);
  attn_session_destroy(r.session);
  attn_model_destroy(r.draft);
  attn_model_destroy(r.model);
  attn_text_free(&r.pending);
  attn_text_free(&r.text);
  attn_free(r.model_path);
  attn_free(r.tokens);
  attn_free(r.prompt);
  return code;
}

static const run_options defaults = {.tokens = UNSET,
                                     .temperature = UNSET,
                                     .top_k = UNSET,
                                     .top_p = UNSET,
                                     .min_p = UNSET,
                                     .repetition_penalty = UNSET,
                                     .repetition_window = UNSET,
                                     .dtype = ATTN_BF16,
                                     .device = ATTN_DEVICE_AUTO};

#define AT(field) ATTN_FIELD(run_options, field)
static const attn_option table[] = {
    {"prompt", 'p', ATTN_OPTION_TEXT, "TEXT", "The text to continue.", AT(prompt), 0, 0, NULL},
    {"prompt-file", 'f', ATTN_OPTION_TEXT, "FILE",
     "The text to continue, from a file; - is standard input.", AT(prompt_file), 0, 0, NULL},
    {"chat", 'c', ATTN_OPTION_FLAG, NULL,
     "Chat, as the model's template has it: the prompt, or each line of standard input, is a turn.",
     AT(chat), 0, 0, NULL},
    {"system", 0, ATTN_OPTION_TEXT, "TEXT", "What the chat's system message says.", AT(system), 0,
     0, NULL},
    {"tokens", 'n', ATTN_OPTION_INT, "N",
     "Tokens to write; of a chat, for each answer. Without it what the model advises, or 400.",
     AT(tokens), 0, 1 << 30, NULL},
    {"temperature", 't', ATTN_OPTION_REAL, "T",
     "Below 1 is more careful; 0 always takes the likeliest token. Without it what the model "
     "advises (generation_config.json), or 0.8.",
     AT(temperature), 0, 100, NULL},
    {"top-k", 0, ATTN_OPTION_INT, "K",
     "Only the K likeliest tokens; 0: all of them. Without it as advised, or 0.", AT(top_k), 0,
     INT32_MAX, NULL},
    {"top-p", 0, ATTN_OPTION_REAL, "P",
     "Only the likeliest tokens that together have probability "
     "P; 1: all of them. Without it as advised, or 0.95.",
     AT(top_p), 1e-9, 1, NULL},
    {"min-p", 0, ATTN_OPTION_REAL, "P",
     "Only tokens that are at least P times as probable as the "
     "likeliest one; 0: all of them. Without it as advised, or 0.",
     AT(min_p), 0, 1, NULL},
    {"repetition-penalty", 0, ATTN_OPTION_REAL, "R",
     "Above 1 makes recent tokens less likely. Without it as advised, or 1.",
     AT(repetition_penalty), 1e-3, 1e3, NULL},
    {"repetition-window", 0, ATTN_OPTION_INT, "N",
     "How many tokens are recent; 0: all of them. Without it 64, or all where the model advises a "
     "penalty.",
     AT(repetition_window), 0, INT32_MAX, NULL},
    {"seed", 's', ATTN_OPTION_SEED, "S",
     "The same seed gives the same text; 0: a new one each "
     "time.",
     AT(seed), 0, 0, NULL},
    {"ignore-end", 0, ATTN_OPTION_FLAG, NULL, "Go on after a token that ends the text.",
     AT(ignore_end), 0, 0, NULL},
    {"speculate", 0, ATTN_OPTION_INT, "N",
     "Propose N tokens at once from what the text says elsewhere, or from --draft, and keep those "
     "that the model would have written: the same text, sooner. 0: one token at a time.",
     AT(speculate), 0, 7, NULL},
    {"draft", 0, ATTN_OPTION_TEXT, "MODEL",
     "A smaller model with the same tokens, which proposes what comes next.", AT(draft), 0, 0,
     NULL},
    {"echo", 'e', ATTN_OPTION_FLAG, NULL, "Print the prompt before its continuation.", AT(echo), 0,
     0, NULL},
    {"save-session", 0, ATTN_OPTION_TEXT, "FILE",
     "Afterwards, write what the model has read and "
     "written to FILE.",
     AT(save_session), 0, 0, NULL},
    {"load-session", 0, ATTN_OPTION_TEXT, "FILE",
     "Go on from such a file; a prompt is then added "
     "to it.",
     AT(load_session), 0, 0, NULL},
    {"max-context", 0, ATTN_OPTION_INT, "N",
     "Stop when prompt and text have N tokens; 0: as many "
     "as are asked for.",
     AT(max_context), 0, INT32_MAX, NULL},
    {"dtype", 0, ATTN_OPTION_DTYPE, "TYPE", "Of the computation", AT(dtype), 0, 0,
     attn_compute_dtypes},
    ATTN_DEVICE_OPTION(AT(device)),
    ATTN_LORA_OPTION(AT(lora)),
    {"threads", 0, ATTN_OPTION_INT, "N", "Threads; 0: as many as there are processors.",
     AT(threads), 0, 4096, NULL},
    {"json", 0, ATTN_OPTION_FLAG, NULL, "Print one JSON object at the end instead of the text.",
     AT(json), 0, 0, NULL},
    {"stats", 0, ATTN_OPTION_FLAG, NULL, "Print speed and memory on standard error at the end.",
     AT(stats), 0, 0, NULL},
    {"explain", 0, ATTN_OPTION_FLAG, NULL,
     "Print the sampling and the plans that were used on standard error.", AT(explain), 0, 0, NULL},
};

const attn_command attn_command_run = {
    .name = "run",
    .summary = "let a model continue a text",
    .usage = "[MODEL]",
    .description =
        "Continues the prompt and prints the text as it is sampled. MODEL is a directory with "
        "config.json, model.safetensors and tokenizer.json, or a .gguf file; without it, the small "
        "model that comes with attn. The prompt is --prompt, --prompt-file, or standard input when "
        "that is not a terminal; without any, the model starts from an empty line. Special tokens "
        "may be written in it (\"<|im_start|>\").\n\nThe text ends with the model's end of text. "
        "Without a tokenizer, tokens are bytes. Incomplete or invalid UTF-8 is printed as U+FFFD. "
        "Ctrl-C ends the text, and a session is still saved.",
    .examples =
        "attn run --prompt \"In the beginning\"\tthe model that comes with attn\n"
        "attn run model.gguf --chat\ttalk to a model\n"
        "attn run runs/mine -n 1000 -t 0.7 --seed 1 < story.txt\tone's own model, a repeatable "
        "text\n"
        "attn run model --lora runs/tuned --chat\twith adapters\n"
        "attn run --prompt \"One\" --save-session s && attn run --load-session s\tgo on later",
    .options = table,
    .option_count = ATTN_COUNT(table),
    .defaults = &defaults,
    .size = sizeof defaults,
    .most_words = 1,
    .run = run,
};
