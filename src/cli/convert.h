/* attn convert: its options, and the part of it that changes the model. */
#ifndef ATTN_CLI_CONVERT_H
#define ATTN_CLI_CONVERT_H

#include "attn/training.h"
#include "cli/cli.h"

typedef struct convert_options {
  int type;
  int64_t split, threads;
  /* --to */
  attn_linearise_options linearise;
  const char *device;
  attn_words data;
  bool quiet, json;
  int window_kind; /* in window_kinds */
} convert_options;

/* convert_mixer.c: words are MODEL and OUT. */
int attn_convert_mixer(const attn_command *command, const convert_options *options,
                       const attn_words *words);

#endif
