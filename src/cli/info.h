/* The parts of attn info. */
#ifndef ATTN_CLI_INFO_H
#define ATTN_CLI_INFO_H

#include "cli/cli.h"

/* Whether `path` names a GGUF file. */
bool attn_is_gguf(const char *path);
/* Describes it; returns the exit code. */
int attn_info_gguf(const attn_command *command, const char *path, bool json);

#endif
