/* attn run, in parts: options, prompt, session and reports (run.c), writing text (run_text.c),
 * chats (run_chat.c). */
#ifndef ATTN_CLI_RUN_H
#define ATTN_CLI_RUN_H

#include "attn/speculation.h"
#include "cli/cli.h"
#include "base/utf8.h"
#include "models/model.h"

typedef struct run_options {
  const char *prompt, *prompt_file, *system;
  /* UNSET where the command line says nothing: run_choose then takes what the model advises. */
  int64_t tokens, threads, max_context;
  double temperature, top_p, min_p, repetition_penalty;
  int64_t top_k, repetition_window;
  uint64_t seed;
  attn_dtype dtype;
  const char *device, *lora;
  const char *save_session, *load_session;
  const char *draft;
  int64_t speculate;
  bool chat, ignore_end, echo, json, stats, explain;
} run_options;

enum { UNSET = -1 };

/* Why a text ended. */
typedef enum run_stop { STOP_LENGTH = 0, STOP_CONTEXT, STOP_INTERRUPTED, STOP_END } run_stop;

typedef struct runner {
  const attn_command *command;
  const run_options *options;
  char *prompt;
  size_t prompt_size;
  int32_t *tokens; /* of the prompt */
  int64_t token_count;
  char *model_path;
  attn_model *model;
  attn_session *session;
  attn_model *draft;
  attn_speculator *speculator; /* NULL without --speculate and --draft */
  attn_sampling sampling;
  int64_t most_tokens; /* to write, of a chat for each answer */
  attn_utf8 utf8;
  attn_text pending, text; /* to be written; all of it, for --json and chats */
  run_stop stop;
  int64_t generated; /* tokens */
  double prompt_seconds, text_seconds;
} runner;

/* Feeds tokens in pieces, so that Ctrl-C is heard. */
attn_status run_feed(runner *r, const int32_t *tokens, int64_t count);
/* Text as it is, with what is not UTF-8 replaced. */
attn_status run_write_bytes(runner *r, const char *bytes, size_t size);
/* Samples and writes up to --tokens tokens behind what the session has. */
attn_status run_generate(runner *r);
/* Reads turns (--prompt, or lines of standard input) and answers each. */
attn_status run_chat(runner *r);

#endif
