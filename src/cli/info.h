/* The parts of attn info. */
#ifndef ATTN_CLI_INFO_H
#define ATTN_CLI_INFO_H

#include "cli/cli.h"

typedef struct attn_info_subject {
  char *path;
  attn_model *model; /* without what products need */
  attn_model_info info;
} attn_info_subject;

/* What is known of any model: on standard output, or as a JSON object. */
void attn_info_print(const attn_info_subject *subject);
json_t *attn_info_json(const attn_info_subject *subject);

/* Describes a GGUF file, and the model in it when it can be loaded; returns the exit code. */
int attn_info_gguf(const attn_command *command, const char *path, attn_dtype dtype, bool json);

#endif
