/* The parts of attn info. */
#ifndef ATTN_CLI_INFO_H
#define ATTN_CLI_INFO_H

#include "cli/cli.h"

/* Whether `path` names a GGUF file. */
/* Describes a GGUF file; returns the exit code. */
int attn_info_gguf(const attn_command *command, const char *path, bool json);

#endif
